//! The MCS DNS specification (schema 1.0.0), row by row, asked over UDP and TCP: `cargo test --package mesh-dns --test
//! conformance -- --nocapture` prints the table.

mod support;

use hickory_proto::{
    op::Message,
    rr::RecordType::{self, A, AAAA, ANY, PTR, SRV, TXT},
};
use mesh_dns::Names;
use support::{bookstore, cluster, question, records, tcp, udp};

struct Row {
    requirement: &'static str,
    name: String,
    kind: RecordType,
    expected: String,
}

fn row(requirement: &'static str, name: impl Into<String>, kind: RecordType, expected: &str) -> Row {
    Row { requirement, name: name.into(), kind, expected: expected.into() }
}

fn rows() -> Vec<Row> {
    let set = "svc.clusterset.local";
    let label = "a".repeat(63);
    vec![
        row("version of the schema", "dns-version.clusterset.local", TXT, "NOERROR aa: TXT 1.0.0"),
        row("ClusterSetIP: A", format!("ratings.books.{set}"), A, "NOERROR aa: A 240.240.3.4"),
        row("ClusterSetIP: AAAA", format!("ratings.books.{set}"), AAAA, "NOERROR aa: AAAA 2001:db8::34"),
        row("names have no case", "RATINGS.Books.SVC.clusterset.LOCAL", A, "NOERROR aa: A 240.240.3.4"),
        row(
            "ClusterSetIP: SRV of a named port, target the service",
            format!("_http._tcp.ratings.books.{set}"),
            SRV,
            "NOERROR aa: SRV 0 100 9080 ratings.books.svc.clusterset.local. + A 240.240.3.4, AAAA 2001:db8::34",
        ),
        row(
            "ClusterSetIP: SRV of UDP",
            format!("_dns._udp.ratings.books.{set}"),
            SRV,
            "NOERROR aa: SRV 0 100 53 ratings.books.svc.clusterset.local. + A 240.240.3.4, AAAA 2001:db8::34",
        ),
        row(
            "SRV: of the port's protocol only",
            format!("_http._udp.ratings.books.{set}"),
            SRV,
            "NXDOMAIN aa soa: ",
        ),
        row("SRV: named ports only", format!("_9080._tcp.ratings.books.{set}"), SRV, "NXDOMAIN aa soa: "),
        row(
            "ClusterSetIP: no name of one cluster",
            format!("east.ratings.books.{set}"),
            A,
            "NXDOMAIN aa soa: ",
        ),
        row(
            "Headless: A, ready pods",
            format!("db.books.{set}"),
            A,
            "NOERROR aa: A 10.0.0.1, A 10.0.0.2, A 10.0.0.3",
        ),
        row("Headless: AAAA, none has one", format!("db.books.{set}"), AAAA, "NOERROR aa soa: "),
        row("Headless: none ready", format!("empty.books.{set}"), AAAA, "NXDOMAIN aa soa: "),
        row(
            "Headless: a pod by host name and cluster",
            format!("db-0.east.db.books.{set}"),
            A,
            "NOERROR aa: A 10.0.0.1",
        ),
        row("Headless: not in another cluster", format!("db-0.west.db.books.{set}"), A, "NXDOMAIN aa soa: "),
        row("Headless: not without its cluster", format!("db-0.db.books.{set}"), A, "NXDOMAIN aa soa: "),
        row(
            "Headless: SRV, a record for each pod and port",
            format!("_sql._tcp.db.books.{set}"),
            SRV,
            "NOERROR aa: SRV 0 100 5432 db-0.east.db.books.svc.clusterset.local., \
             SRV 0 100 5432 db-1.east.db.books.svc.clusterset.local. + A 10.0.0.1, A 10.0.0.2",
        ),
        // It is above its pods, so it exists (RFC 8020), but has no record of any kind.
        row("Headless: no records of one cluster", format!("east.db.books.{set}"), ANY, "NOERROR aa soa: "),
        row(
            "PTR: the name in the cluster, where there is one",
            "4.3.240.240.in-addr.arpa",
            PTR,
            "NOERROR aa: PTR ratings.books.svc.cluster.local.",
        ),
        row(
            "PTR: AAAA",
            "4.3.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa",
            PTR,
            "NOERROR aa: PTR ratings.books.svc.cluster.local.",
        ),
        row(
            "PTR: else the name in the cluster set",
            "5.3.240.240.in-addr.arpa",
            PTR,
            "NOERROR aa: PTR only.books.svc.clusterset.local.",
        ),
        row("PTR: a pod", "1.0.0.10.in-addr.arpa", PTR, "NOERROR aa: PTR db-0.db.books.svc.cluster.local."),
        row("PTR: not ours to deny", "9.9.9.9.in-addr.arpa", PTR, "SERVFAIL: "),
        row("a service that is not there", format!("nothing.books.{set}"), A, "NXDOMAIN aa soa: "),
        row("a type that the name has not", format!("ratings.books.{set}"), TXT, "NOERROR aa soa: "),
        row("names between", format!("books.{set}"), A, "NOERROR aa soa: "),
        row("labels of 63 bytes", format!("{label}.books.{set}"), A, "NOERROR aa: A 240.240.3.6"),
        row("the cluster's zone stays", "ratings.books.svc.cluster.local", A, "NOERROR aa: A 240.240.3.4"),
        row(
            "search list: denied here, at once",
            format!("ratings.books.{set}.books.svc.cluster.local"),
            A,
            "NXDOMAIN aa soa: ",
        ),
    ]
}

/// An answer as it is written in the table.
fn shown(m: &Message) -> String {
    let code = match u16::from(m.metadata.response_code) {
        0 => "NOERROR".to_owned(),
        2 => "SERVFAIL".to_owned(),
        3 => "NXDOMAIN".to_owned(),
        other => other.to_string(),
    };
    let aa = if m.metadata.authoritative { " aa" } else { "" };
    let soa = if m.authorities.is_empty() { "" } else { " soa" };
    let more = records(&m.additionals);
    let more = if more.is_empty() { String::new() } else { format!(" + {}", more.join(", ")) };
    format!("{code}{aa}{soa}: {}{more}", records(&m.answers).join(", "))
}

#[tokio::test(flavor = "multi_thread")]
async fn mcs_dns_specification() {
    let mut hosts = bookstore();
    for (name, ip) in [("only", "240.240.3.5"), (&"a".repeat(63), "240.240.3.6")] {
        let host = mesh_dns::Host { addresses: vec![ip.parse().unwrap()], ..Default::default() };
        hosts.push((format!("{name}.books.svc.clusterset.local"), std::sync::Arc::new(host)));
    }
    // Nobody answers for foreign names, and nothing may be denied for them.
    let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let running = cluster(Names::for_cluster(hosts), vec![nobody.local_addr().unwrap()]).await;
    let mut failed = 0;
    for Row { requirement, name, kind, expected } in rows() {
        let q = question(&name, kind, Some(1232));
        let (by_udp, by_tcp) = (shown(&udp(running.address(), &q)), shown(&tcp(running.address(), &q)));
        let good = by_udp == expected && by_tcp == expected;
        println!("{} | {requirement} | {name} {kind} | {expected}", if good { "ok    " } else { "FAILED" });
        if !good {
            failed += 1;
            println!("         by UDP {by_udp}\n         by TCP {by_tcp}");
        }
    }
    assert_eq!(failed, 0);
}

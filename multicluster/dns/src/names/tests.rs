use super::*;

fn port(name: &str, number: u16, udp: bool) -> Port {
    Port { name: name.into(), number, udp }
}

fn table(short: bool) -> Names {
    let host = Arc::new(Host {
        addresses: vec!["240.240.0.1".parse().unwrap()],
        ports: vec![port("http", 9080, false), port("dns", 53, true)],
        ..Host::default()
    });
    let pods = ["db-0", "db-1"].into_iter().zip(["10.0.0.1", "10.0.0.2"]).map(|(name, ip)| Pod {
        name: name.into(),
        cluster: "east".into(),
        addresses: vec![ip.parse().unwrap()],
        ports: vec![port("sql", 5432, false)],
    });
    let pods: Vec<Pod> = pods.collect();
    let addresses = pods.iter().flat_map(|p| p.addresses.clone()).collect();
    let headless = Arc::new(Host { addresses, ports: vec![port("sql", 5432, false)], headless: true, pods });
    let hosts = [
        ("Reviews.books.svc.cluster.local.", &host),
        ("ratings.books.svc.clusterset.local", &host),
        ("*.wild.example", &host),
        ("db.books.svc.cluster.local", &headless),
        ("db.books.svc.clusterset.local", &headless),
        ("db.books.global", &headless),
        (&"x.".repeat(200), &host),
    ]
    .map(|(n, h)| (n.to_owned(), h.clone()));
    if short { Names::new(hosts) } else { Names::for_cluster(hosts) }
}

/// What is found, in a word.
fn find(names: &Names, name: &str) -> String {
    let labels = wire::labels(name).unwrap();
    match names.find(&labels).found {
        Found::Host(r) => format!("host {}", r.a.count + r.aaaa.count),
        Found::Service { host, target, port, udp } => {
            let own = host.port(port, udp).unwrap_or_default();
            format!("port {own} at {target}")
        }
        Found::Pointer(names) => {
            let text = |n: &[u8]| {
                let m: Vec<_> =
                    n.iter().map(|b| if b.is_ascii_graphic() { char::from(*b) } else { '.' }).collect();
                String::from_iter(m)
            };
            names.iter().map(|n| text(n)).collect()
        }
        other => format!("{other:?}").to_lowercase(),
    }
}

#[test]
fn what_the_table_says() {
    let n = table(true);
    for (name, expected) in [
        ("reviews.books.svc.cluster.local", "host 1"),
        ("reviews.books.svc", "host 1"),
        ("reviews.books", "host 1"),
        ("ratings.books.svc.clusterset.local", "host 1"),
        ("a.wild.example", "host 1"),
        ("a.b.wild.example", "host 1"),
        ("_http._tcp.ratings.books.svc.clusterset.local", "port 9080 at 11"),
        ("_dns._udp.reviews.books.svc.cluster.local", "port 53 at 10"),
        ("_http._tcp.reviews.books", "port 9080 at 11"),
        ("dns-version.clusterset.local", "version"),
        // Pods of headless services.
        ("db.books.svc.cluster.local", "host 2"),
        ("db-0.db.books.svc.cluster.local", "host 1"),
        ("db-1.east.db.books.svc.clusterset.local", "host 1"),
        ("east.db.books.svc.clusterset.local", "empty"),
        ("db-0.db.books.svc.clusterset.local", "missing"),
        ("db-0.east.db.books.svc.cluster.local", "missing"),
        ("db-0.db.books.global", "missing"),
        ("db-2.db.books.svc.cluster.local", "missing"),
        ("_sql._tcp.db.books.svc.cluster.local", "port 5432 at 10"),
        ("_sql._tcp.db-0.db.books.svc.cluster.local", "missing"),
    ] {
        assert_eq!(find(&n, name), expected, "{name}");
    }
    for name in [
        "nothing.books.svc.cluster.local",
        "x.ratings.books.svc.clusterset.local",
        "a.global",
        "_http._udp.ratings.books.svc.clusterset.local",
        "_https._tcp.ratings.books.svc.clusterset.local",
        "_http._tcp.nothing.books.svc.clusterset.local",
        "http._tcp.ratings.books.svc.clusterset.local",
        // A member's part of a service has no name of this form (MCS DNS specification).
        "east.ratings.books.svc.clusterset.local",
        // What search lists make of names.
        "ratings.books.svc.clusterset.local.books.svc.cluster.local",
        "ratings.books.svc.clusterset.local.svc.cluster.local",
        "ratings.books.svc.clusterset.local.cluster.local",
        "reviews.books.svc.cluster.local.cluster.local",
        "reviews.books.global.cluster.local",
    ] {
        assert_eq!(find(&n, name), "missing", "{name}");
    }
    for name in [
        "books.svc.cluster.local",
        "svc.cluster.local",
        "svc.clusterset.local",
        "clusterset.local",
        "books.global",
        "_tcp.ratings.books.svc.clusterset.local",
    ] {
        assert_eq!(find(&n, name), "empty", "{name}");
    }
    for name in
        ["example.com", "nothing.books", "wild.example", "cluster.local", "", "notglobal", "_a._tcp.b.c"]
    {
        assert_eq!(find(&n, name), "foreign", "{name}");
    }
}

#[test]
fn a_cluster_has_no_short_names() {
    let n = table(false);
    for name in ["reviews.books.svc", "reviews.books", "_http._tcp.reviews.books"] {
        assert_eq!(find(&n, name), "foreign", "{name}");
    }
    assert_eq!(find(&n, "reviews.books.svc.cluster.local"), "host 1");
    assert_eq!(find(&n, "a.wild.example"), "host 1");
}

#[test]
fn addresses_have_the_names_of_the_cluster_first() {
    let n = table(true);
    for (name, expected) in [
        // Of the service that is known by both, the name of the cluster.
        ("1.0.240.240.in-addr.arpa", ".reviews.books.svc.cluster.local."),
        ("1.0.0.10.in-addr.arpa", ".db-0.db.books.svc.cluster.local."),
        ("3.0.0.10.in-addr.arpa", "foreign"),
    ] {
        assert_eq!(find(&n, name), expected, "{name}");
    }
}

#[test]
fn nothing_is_denied_before_the_table_is_there() {
    let n = Names::unknown();
    assert_eq!(find(&n, "ratings.books.svc.clusterset.local"), "unknown");
    assert_eq!(find(&n, "clusterset.local"), "empty");
    assert_eq!(find(&n, "dns-version.clusterset.local"), "version");
    assert_eq!(find(&n, "example.com"), "foreign");
}

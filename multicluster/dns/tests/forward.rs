//! Foreign names: several resolvers behind, what is remembered and for how long, and what may be denied.

mod support;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, MessageType, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{A, CNAME, SOA},
    },
};
use mesh_dns::Names;
use support::{behind, bookstore, cluster, question, records, tcp, udp};

fn reply(q: &Message, code: ResponseCode, answers: Vec<Record>, authorities: Vec<Record>) -> Message {
    let mut m = q.clone();
    m.metadata.message_type = MessageType::Response;
    m.metadata.response_code = code;
    m.metadata.recursion_available = true;
    m.answers = answers;
    m.authorities = authorities;
    m
}

fn name(n: &str) -> Name {
    n.parse().unwrap()
}

fn a(owner: &str, ttl: u32, last: u8) -> Record {
    Record::from_rdata(name(owner), ttl, RData::A(A::new(192, 0, 2, last)))
}

fn soa(minimum: u32) -> Record {
    let data = SOA::new(name("ns.example.com."), name("mail.example.com."), 1, 60, 60, 60, minimum);
    Record::from_rdata(name("example.com."), 300, RData::SOA(data))
}

/// Answers by the first label of the name, and counts.
async fn example(asked: Arc<AtomicUsize>) -> SocketAddr {
    behind(move |q, by_tcp| {
        asked.fetch_add(1, SeqCst);
        let n = q.queries[0].name().to_ascii();
        let ok = ResponseCode::NoError;
        Some(match n.split('.').next().unwrap() {
            "short" => reply(&q, ok, vec![a(&n, 1, 1)], vec![]),
            "long" => reply(&q, ok, vec![a(&n, 300, 2)], vec![]),
            "gone" => reply(&q, ResponseCode::NXDomain, vec![], vec![soa(120)]),
            "once" => reply(&q, ResponseCode::NXDomain, vec![], vec![]),
            "none" => reply(&q, ok, vec![], vec![soa(120)]),
            "alias" => {
                let to = RData::CNAME(CNAME(name("long.example.com.")));
                reply(
                    &q,
                    ok,
                    vec![Record::from_rdata(name(&n), 300, to), a("long.example.com.", 300, 2)],
                    vec![],
                )
            }
            "big" if by_tcp => reply(&q, ok, (0..200).map(|i| a(&n, 300, i)).collect(), vec![]),
            "big" => {
                let mut m = reply(&q, ok, vec![], vec![]);
                m.metadata.truncation = true;
                m
            }
            _ => reply(&q, ResponseCode::ServFail, vec![], vec![]),
        })
    })
    .await
}

fn ask(at: SocketAddr, n: &str) -> Message {
    udp(at, &question(n, RecordType::A, Some(1232)))
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_and_denials_are_remembered_as_long_as_they_say() {
    let asked = Arc::new(AtomicUsize::new(0));
    let up = example(asked.clone()).await;
    let running = cluster(Names::default(), vec![up]).await;
    let at = running.address();
    let times = |n: &str| {
        let before = asked.load(SeqCst);
        let first = ask(at, n);
        let second = ask(at, n);
        assert_eq!(records(&first.answers), records(&second.answers), "{n}");
        (first, second, asked.load(SeqCst) - before)
    };
    let (m, again, n) = times("long.example.com");
    assert_eq!((records(&m.answers), n), (vec!["A 192.0.2.2".to_owned()], 1));
    assert!(!m.metadata.authoritative && m.metadata.recursion_available && again.metadata.id == 7);
    let (m, again, n) = times("gone.example.com");
    assert_eq!((m.metadata.response_code, n), (ResponseCode::NXDomain, 1));
    assert_eq!(records(&again.authorities).len(), 1, "who remembers a denial must know for how long");
    let (m, _, n) = times("none.example.com");
    assert_eq!((m.metadata.response_code, m.answers.len(), n), (ResponseCode::NoError, 0, 1));
    // Without an SOA nobody has said how long that holds (RFC 2308, section 5).
    let (m, _, n) = times("once.example.com");
    assert_eq!((m.metadata.response_code, n), (ResponseCode::NXDomain, 2));
    // What is remembered of a name holds for it in any case, and the question comes back as it was.
    let (m, _, n) = times("LONG.Example.com");
    assert_eq!((m.queries[0].name().to_ascii().as_str(), m.answers.len(), n), ("LONG.Example.com.", 1, 0));
    let (m, ..) = times("alias.example.com");
    assert_eq!(records(&m.answers), ["A 192.0.2.2", "CNAME long.example.com."]);

    // Ages are counted down, and what is too old is asked for again.
    let (_, _, n) = times("short.example.com");
    assert_eq!(n, 1);
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert!(ask(at, "long.example.com").answers[0].ttl < 300);
    let gone = ask(at, "gone.example.com");
    assert!(gone.authorities[0].ttl < 300, "{gone:?}");
    let (_, _, n) = times("short.example.com");
    assert_eq!(n, 1);
    let shown = running.shown();
    assert!(shown.contains("flotilla_dns_cache_hits_total 10"), "{shown}");
    assert!(shown.contains("flotilla_dns_queries_total{zone=\"foreign\",rcode=\"NXDOMAIN\"} 5"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_truncated_is_asked_for_again_over_tcp() {
    let up = example(Arc::default()).await;
    let running = cluster(Names::default(), vec![up]).await;
    let q = question("big.example.com", RecordType::A, Some(1232));
    // Too large for the client, too, which has to ask again itself.
    let short = udp(running.address(), &q);
    assert!(short.metadata.truncation && short.answers.is_empty());
    assert_eq!(tcp(running.address(), &q).answers.len(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn upstreams_are_asked_in_turn_and_only_they_deny() {
    let asked = Arc::new(AtomicUsize::new(0));
    let (good, count) = (example(asked.clone()).await, asked.clone());
    let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let refuses = behind(|q, _| Some(reply(&q, ResponseCode::Refused, vec![], vec![]))).await;
    let silent = behind(|_, _| None).await;
    for bad in [nobody.local_addr().unwrap(), refuses, silent] {
        let running = cluster(Names::default(), vec![bad, good]).await;
        let begun = Instant::now();
        let m = ask(running.address(), "gone.example.com");
        assert_eq!(m.metadata.response_code, ResponseCode::NXDomain, "{bad}");
        assert!(begun.elapsed() < Duration::from_millis(3500), "{:?}", begun.elapsed());
        // From then on the one that answers is asked first.
        let begun = Instant::now();
        assert_eq!(records(&ask(running.address(), "long.example.com").answers), ["A 192.0.2.2"]);
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
        let shown = running.shown();
        assert!(shown.contains(&format!("upstream_failures_total{{upstream=\"{bad}\"}} 1")), "{shown}");
    }
    // When all fail nothing is denied.
    let running = cluster(Names::default(), vec![refuses, good]).await;
    let before = count.load(SeqCst);
    let m = ask(running.address(), "broken.example.com");
    assert_eq!(m.metadata.response_code, ResponseCode::ServFail);
    assert!(count.load(SeqCst) > before);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_the_mesh_do_not_depend_on_upstreams() {
    let silent = behind(|_, _| None).await;
    let running = cluster(Names::unknown(), vec![silent]).await;
    let at = running.address();
    // Nobody has told yet what there is.
    let code = |n: &str| ask(at, n).metadata.response_code;
    assert_eq!(code("ratings.books.svc.clusterset.local"), ResponseCode::ServFail);
    running.names.send_replace(Arc::new(Names::for_cluster(bookstore())));
    let begun = Instant::now();
    for n in [
        "ratings.books.svc.clusterset.local.books.svc.cluster.local",
        "ratings.books.svc.clusterset.local.svc.cluster.local",
        "ratings.books.svc.clusterset.local.cluster.local",
        "ratings.books.global.cluster.local",
    ] {
        let m = ask(at, n);
        assert_eq!(
            (m.metadata.response_code, m.metadata.authoritative),
            (ResponseCode::NXDomain, true),
            "{n}"
        );
        assert_eq!(m.authorities.len(), 1, "{n}");
    }
    assert_eq!(records(&ask(at, "ratings.books.global").answers), ["A 240.240.3.4"]);
    assert!(begun.elapsed() < Duration::from_secs(1), "no upstream was waited for");
    let shown = running.shown();
    assert!(shown.contains("flotilla_dns_queries_total{zone=\"search\",rcode=\"NXDOMAIN\"} 2"), "{shown}");

    // What is being asked when it stops is answered: here with the failure of the upstream.
    let asking = std::thread::spawn(move || ask(at, "slow.example.com").metadata.response_code);
    tokio::time::sleep(Duration::from_millis(300)).await;
    running.server.stop(Duration::from_secs(4)).await;
    assert_eq!(asking.join().unwrap(), ResponseCode::ServFail);
}

#[tokio::test]
async fn it_does_not_ask_itself() {
    let (_tx, names) = tokio::sync::watch::channel(Arc::new(Names::default()));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for (listen, upstream, expected) in [
        ("127.0.0.1:23053", "127.0.0.1:23053", "upstream 127.0.0.1:23053 is this resolver itself"),
        ("0.0.0.0:23054", "127.0.0.1:23054", "upstream 127.0.0.1:23054 is this resolver itself"),
        (&taken.local_addr().unwrap().to_string(), "192.0.2.1:53", "cannot listen on 127.0.0.1:"),
    ] {
        let started = mesh_dns::ClusterServer::start(mesh_dns::ClusterOptions {
            listen: vec![listen.parse().unwrap()],
            workers: 1,
            upstreams: vec![upstream.parse().unwrap()],
            names: names.clone(),
            metrics: mesh_dns::Metrics::new(),
        });
        let error = started.await.err().unwrap().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}

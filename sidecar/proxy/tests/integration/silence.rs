//! A way to another cluster that falls silent: nothing refuses, nothing answers.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_model::proxy::*;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
};

use crate::{
    support::*,
    tls::{REVIEWS, SNI, client_side, server_side},
};

/// A way to a server that can fall silent: its connections stay, and no byte passes.
struct Way {
    address: SocketAddr,
    open: watch::Sender<bool>,
}

impl Way {
    async fn to(server: SocketAddr) -> Self {
        let l = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = l.local_addr().unwrap();
        let (open, seen) = watch::channel(true);
        tokio::spawn(async move {
            loop {
                let (a, _) = l.accept().await.unwrap();
                let mut seen = seen.clone();
                tokio::spawn(async move {
                    seen.wait_for(|open| *open).await.unwrap();
                    let b = TcpStream::connect(server).await.unwrap();
                    let (a, b) = (Arc::new(a), Arc::new(b));
                    tokio::spawn(pass(Arc::clone(&a), Arc::clone(&b), seen.clone()));
                    pass(b, a, seen).await;
                });
            }
        });
        Self { address, open }
    }

    fn set(&self, open: bool) {
        self.open.send_replace(open);
    }
}

async fn pass(from: Arc<TcpStream>, to: Arc<TcpStream>, mut open: watch::Receiver<bool>) {
    let mut buf = [0; 4096];
    loop {
        from.readable().await.unwrap();
        if open.wait_for(|open| *open).await.is_err() {
            return;
        }
        let n = match from.try_read(&mut buf) {
            Ok(0) => return,
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(_) => return,
        };
        let mut sent = 0;
        while sent < n {
            if to.writable().await.is_err() {
                return;
            }
            match to.try_write(&buf[sent..n]) {
                Ok(k) => sent += k,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    }
}

/// A workload with its sidecar.
struct Workload {
    address: SocketAddr,
    _app: Upstream,
    _sidecar: Proxy,
}

async fn workload(ca: &Ca, name: &'static str) -> Workload {
    let app = Upstream::new(name).await;
    let sidecar = server_side(ca, app.address, vec![], false).run();
    Workload { address: sidecar.address("l"), _app: app, _sidecar: sidecar }
}

/// A caller whose cluster has endpoints of other clusters, `(gateway, member)`, and maybe one of its own.
fn caller(ca: &Ca, http: UpstreamHttp, far: &[(SocketAddr, &str)], own: Option<SocketAddr>) -> Proxy {
    caller_with(ca, http, far, own, None)
}

fn caller_with(
    ca: &Ca,
    http: UpstreamHttp,
    far: &[(SocketAddr, &str)],
    own: Option<SocketAddr>,
    timeout: Option<Duration>,
) -> Proxy {
    let all: Vec<_> = far.iter().map(|f| f.0).chain(own).collect();
    let p = client_side(ca, all[0], http, &[], REVIEWS);
    let name = "outbound|9080||reviews.books.svc.cluster.local";
    let mut c = cluster(name, &all);
    c.lb = LbPolicy::RoundRobin;
    c.http = http;
    c.connect_timeout = Duration::from_secs(30);
    c.outlier = Some(Box::new(OutlierDetection {
        consecutive_5xx: 0,
        consecutive_gateway: 5,
        max_percent: 100,
        ..OutlierDetection::default()
    }));
    let alpn: &[&str] = if http == UpstreamHttp::Http2 { &["istio", "h2"] } else { &["istio"] };
    c.tls_matches = vec![TransportSocketMatch {
        name: "mtls".into(),
        labels: BTreeMap::new(),
        tls: Some(upstream_mtls(SNI, REVIEWS, alpn)),
        hbone: false,
    }];
    if let Discovery::Static(a) = &mut c.discovery {
        for (slot, (e, (_, member))) in a.localities[0].endpoints.iter_mut().zip(far).enumerate() {
            e.workload = format!("reviews;books;reviews;;{member}");
            e.slots = Slots::Asks(u32::try_from(slot).unwrap());
        }
    }
    let mut f = forward(name);
    f.timeout = timeout.or(f.timeout);
    f.retry = Some(Box::new(RetryPolicy {
        on: vec![RetryOn::ConnectFailure],
        attempts: 2,
        ..RetryPolicy::default()
    }));
    let l = listener(Direction::Outbound, vec![http_chain(inline(vec![vhost(&["*"], vec![route(f)])]))]);
    p.cluster(c).listener(l).run()
}

/// Who answered a request, within a time.
async fn ask(at: SocketAddr, patience: Duration) -> Option<String> {
    let client = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
        .build_http::<http_body_util::Empty<bytes::Bytes>>();
    let uri: hyper::Uri = format!("http://{at}/name").parse().unwrap();
    let answer = async {
        use http_body_util::BodyExt as _;
        let r = client.get(uri).await.ok().filter(|r| r.status() == 200)?;
        let body = r.into_body().collect().await.ok()?;
        String::from_utf8(body.to_bytes().to_vec()).ok()
    };
    tokio::time::timeout(patience, answer).await.ok().flatten()
}

async fn both_answer(at: SocketAddr, limit: Duration) -> Duration {
    let begun = Instant::now();
    loop {
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..4 {
            seen.extend(ask(at, Duration::from_millis(500)).await);
        }
        if seen.len() == 2 {
            return begun.elapsed();
        }
        assert!(begun.elapsed() < limit, "only {seen:?} within {limit:?}");
    }
}

/// `patience`: how long callers wait that were there when silence began. Impatient ones come now and then only, so that
/// nothing but the suspicion itself remembers one while the next is awaited.
async fn new_requests_leave(http: UpstreamHttp, patience: Duration) {
    let ca = Ca::new();
    let (east, west) = (workload(&ca, "east").await, workload(&ca, "west").await);
    let way = Way::to(east.address).await;
    let p = caller(&ca, http, &[(way.address, "east")], Some(west.address));
    let at = p.address("l");
    both_answer(at, Duration::from_secs(5)).await;

    way.set(false);
    let pause = Duration::from_millis(if patience < Duration::from_secs(1) { 400 } else { 20 });
    let silent = Instant::now();
    let first: Vec<_> = (0..4).map(|_| tokio::spawn(ask(at, patience))).collect();
    let mut left = None;
    while silent.elapsed() < Duration::from_secs(8) {
        let begun = silent.elapsed();
        match ask(at, Duration::from_millis(400)).await.as_deref() {
            Some("west") => {}
            other => {
                assert_eq!(other, None);
                left = Some(begun);
            }
        }
        tokio::time::sleep(pause).await;
    }
    let left = left.expect("requests were sent there at first");
    assert!(left < Duration::from_secs(4), "a request begun after {left:?} was sent there");

    way.set(true);
    for a in first {
        let by = a.await.unwrap();
        // Whoever is patient is answered in the end.
        assert!(by.is_some() || patience < Duration::from_secs(1), "{by:?}");
    }
    let back = both_answer(at, Duration::from_secs(5)).await;
    println!("  {http:?}, {patience:?}: left after {left:?}, back after {back:?}");
}

#[tokio::test]
async fn new_requests_leave_a_silent_way_and_return() {
    let (long, short) = (Duration::from_secs(30), Duration::from_millis(300));
    tokio::join!(
        new_requests_leave(UpstreamHttp::Http2, long),
        new_requests_leave(UpstreamHttp::Http1, long),
        new_requests_leave(UpstreamHttp::Http2, short),
        new_requests_leave(UpstreamHttp::Http1, short),
    );
}

/// A way that no dial gets through is left, too: there is no session yet that could be asked.
#[tokio::test]
async fn a_dial_that_hangs_is_not_waited_for() {
    let ca = Ca::new();
    let (east, west) = (workload(&ca, "east").await, workload(&ca, "west").await);
    let way = Way::to(east.address).await;
    way.set(false);
    let p = caller(&ca, UpstreamHttp::Http2, &[(way.address, "east")], Some(west.address));
    let at = p.address("l");
    let begun = Instant::now();
    for by in futures::future::join_all((0..4).map(|_| ask(at, Duration::from_secs(9)))).await {
        assert_eq!(by.as_deref(), Some("west"), "after {:?}", begun.elapsed());
    }
    let long = begun.elapsed();
    assert!(long > Duration::from_secs(1), "{long:?}: the silent way was not tried");
    let begun = Instant::now();
    for _ in 0..4 {
        assert_eq!(ask(at, Duration::from_secs(9)).await.as_deref(), Some("west"));
    }
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}: it was tried again", begun.elapsed());
    way.set(true);
    both_answer(at, Duration::from_secs(6)).await;
}

/// The same where the route's timeout ends requests long before, and dials with them: they need not find out one after the
/// other for ever.
#[tokio::test]
async fn dials_that_nobody_waits_for_are_suspected() {
    for http in [UpstreamHttp::Http2, UpstreamHttp::Http1] {
        let ca = Ca::new();
        let (east, west) = (workload(&ca, "east").await, workload(&ca, "west").await);
        let way = Way::to(east.address).await;
        way.set(false);
        let timeout = Some(Duration::from_millis(300));
        let p = caller_with(&ca, http, &[(way.address, "east")], Some(west.address), timeout);
        let at = p.address("l");
        let begun = Instant::now();
        let (mut failed, mut last) = (0, Duration::ZERO);
        while begun.elapsed() < Duration::from_secs(7) {
            let asked = begun.elapsed();
            if ask(at, Duration::from_secs(9)).await.is_none() {
                (failed, last) = (failed + 1, asked);
            }
            tokio::time::sleep(Duration::from_millis(400)).await;
        }
        assert!(
            failed > 0 && last < Duration::from_secs(4),
            "{http:?}: a request begun after {last:?} was sent there"
        );
        way.set(true);
        both_answer(at, Duration::from_secs(6)).await;
    }
}

/// A request's timeout is over when it is over, whatever it waits for.
#[tokio::test]
async fn the_timeout_of_a_route_includes_the_dial() {
    for http in [UpstreamHttp::Http2, UpstreamHttp::Http1] {
        let ca = Ca::new();
        let way = Way::to(workload(&ca, "east").await.address).await;
        way.set(false);
        let timeout = Some(Duration::from_millis(300));
        let p = caller_with(&ca, http, &[(way.address, "east")], None, timeout);
        let begun = Instant::now();
        let answer = p.raw("l", "GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 504"), "{answer}");
        assert!(begun.elapsed() < Duration::from_secs(2), "{http:?}: {:?}", begun.elapsed());
    }
}

/// Where nobody else can answer, silence changes nothing: what comes late comes.
#[tokio::test]
async fn an_only_way_is_waited_for() {
    for http in [UpstreamHttp::Http2, UpstreamHttp::Http1] {
        let ca = Ca::new();
        let (east, north) = (workload(&ca, "east").await, workload(&ca, "north").await);
        let (to_east, to_north) = (Way::to(east.address).await, Way::to(north.address).await);
        let p = caller(&ca, http, &[(to_east.address, "east"), (to_north.address, "north")], None);
        let at = p.address("l");
        both_answer(at, Duration::from_secs(5)).await;
        to_east.set(false);
        to_north.set(false);
        let patient: Vec<_> = (0..8).map(|_| tokio::spawn(ask(at, Duration::from_secs(30)))).collect();
        tokio::time::sleep(Duration::from_secs(4)).await;
        let more: Vec<_> = (0..4).map(|_| tokio::spawn(ask(at, Duration::from_secs(30)))).collect();
        tokio::time::sleep(Duration::from_secs(1)).await;
        to_east.set(true);
        to_north.set(true);
        for a in patient.into_iter().chain(more) {
            assert!(a.await.unwrap().is_some());
        }
        both_answer(at, Duration::from_secs(6)).await;
    }
}

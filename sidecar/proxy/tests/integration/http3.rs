//! HTTP/3 from a client that is not ours (the `h3` crate over quinn). What that client cannot do is in `e2e`.

mod client;
mod transport;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use mesh_model::proxy::*;

use self::client::*;
use crate::support::*;

const SERVER: &str = "spiffe://mesh.local/ns/edge/sa/gateway";

/// A chain for one server name, behind which is one cluster.
fn chain_for(names: &[&str], up: &str, client: ClientCertificate) -> FilterChain {
    let mut m = inline(vec![vhost(&["*"], vec![route(forward(up))])]);
    (m.codec, m.connect, m.use_remote_address) = (HttpCodec::Http3, false, true);
    m.forward_client_cert = ForwardClientCert::SanitizeSet;
    let mut c = http_chain(m);
    c.name = names.join(",");
    c.matches.server_names = names.iter().map(|n| (*n).to_owned()).collect();
    c.tls = Some(DownstreamTls {
        certificate: SecretRef::Sds("default".into()),
        client_certificate: client,
        // What a listener of TCP would have; QUIC has its own.
        alpn: vec!["h2".into()],
        min_version: TlsVersion::V1_2,
        options: TlsServerOptions::default(),
    });
    c
}

fn manager_of(c: &mut FilterChain) -> &mut HttpConnectionManager {
    match c.filters.last_mut() {
        Some(NetworkFilter::Http(h)) => h,
        other => panic!("{other:?}"),
    }
}

fn quic(chains: Vec<FilterChain>) -> Listener {
    let mut l = listener(Direction::Unspecified, chains);
    l.quic = Some(QuicOptions::default());
    l
}

fn gateway(proxy: Proxy, ca: &Ca, up: std::net::SocketAddr, chains: Vec<FilterChain>) -> Proxy {
    let p = proxy.cluster(cluster("up", &[up])).listener(quic(chains));
    ca.enroll(&p.secrets, "west", SERVER);
    p.run()
}

fn simple_gateway(ca: &Ca, up: std::net::SocketAddr) -> Proxy {
    gateway(Proxy::new(), ca, up, vec![chain_for(&["a.test"], "up", ClientCertificate::None)])
}

#[tokio::test]
async fn a_request_goes_the_way_of_every_other() {
    let app = Upstream::new("app").await;
    let ca = Ca::new();
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let mut c = chain_for(&["a.test"], "up", ClientCertificate::None);
    manager_of(&mut c).access_log = vec![AccessLog::File(FileLog {
        path: log.display().to_string(),
        format: AccessLogFormat::Text(
            "%PROTOCOL% %RESPONSE_CODE% %REQUESTED_SERVER_NAME% %BYTES_SENT% %RESPONSE_CODE_DETAILS%\n"
                .into(),
        ),
        omit_empty: false,
    })];
    let p = gateway(Proxy::new(), &ca, app.address, vec![c]);
    let client = Client::new(&ca, &p, "a.test").await;
    let (head, body, _) = client.get("/x?y=1").await.unwrap();
    assert_eq!((head.status().as_u16(), &head.headers()["server"]), (200, &"flotilla".parse().unwrap()));
    let text = String::from_utf8(body.to_vec()).unwrap();
    assert!(text.starts_with("app GET /x?y=1 HTTP/1.1\n"), "{text}");
    for line in ["host: a.test\n", "x-forwarded-proto: https\n", "x-forwarded-for: 127.0.0.1\n"] {
        assert!(text.contains(line), "{text}");
    }
    assert_eq!(client.get("/status/503").await.unwrap().0.status(), 503);
    assert_eq!(client.get("/empty").await.unwrap().0.status(), 204);
    p.metric(&["istio_requests_total", "request_protocol=\"http\"", "response_code=\"503\""]).await;
    assert_eq!(p.engine.status().connections, 1);
    let lines = lines(&log, 3).await;
    assert_eq!(lines[0], format!("HTTP/3 200 a.test {} via_upstream", body.len()));
}

#[tokio::test]
async fn bodies_and_trailers_in_both_directions() {
    let app = Upstream::new("app").await;
    let ca = Ca::new();
    let p = simple_gateway(&ca, app.address);
    let client = Client::new(&ca, &p, "a.test").await;
    // Much more than any window.
    let sent: Bytes = (0..8u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (head, body, _) = client.post("/stream", sent.clone(), None).await.unwrap();
    assert_eq!((head.status().as_u16(), body.len(), body == sent), (200, sent.len(), true));
    let mut trailers = http::HeaderMap::new();
    trailers.insert("x-t", "7".parse().unwrap());
    let (_, body, back) = client.post("/echo", Bytes::from_static(b"abc"), Some(trailers)).await.unwrap();
    assert_eq!((body, back.unwrap()["x-t"].to_str().unwrap()), (Bytes::from_static(b"abc"), "7"));
    let (head, _, back) = client.get("/trailers").await.unwrap();
    assert_eq!((head.status().as_u16(), &back.unwrap()["grpc-status"]), (200, &"0".parse().unwrap()));
}

#[tokio::test]
async fn many_streams_at_once() {
    let app = Upstream::new("app").await;
    let ca = Ca::new();
    let p = simple_gateway(&ca, app.address);
    let client = Client::new(&ca, &p, "a.test").await;
    let all = (0..300).map(|i| {
        let client = client.clone();
        async move {
            if i % 3 == 0 {
                client.get("/big").await.unwrap().1.len()
            } else {
                client.get(&format!("/{i}")).await.unwrap().1.len()
            }
        }
    });
    let sizes = futures::future::join_all(all).await;
    assert_eq!(sizes.iter().filter(|n| **n == 1 << 20).count(), 100);
    assert_eq!(p.engine.status().requests, 0);
}

#[tokio::test]
async fn the_server_name_chooses_certificate_and_chain() {
    let (one, two) = (Upstream::new("one").await, Upstream::new("two").await);
    let ca = Ca::new();
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let mut c = chain_for(&["*.b.test"], "two", ClientCertificate::Required(validation(&[])));
    c.tls.as_mut().unwrap().certificate = SecretRef::Sds("other".into());
    let chains = vec![chain_for(&["a.test"], "up", ClientCertificate::None), c];
    let mut l = quic(chains);
    l.access_log = vec![AccessLog::File(FileLog {
        path: log.display().to_string(),
        format: AccessLogFormat::Text("%RESPONSE_FLAGS% %REQUESTED_SERVER_NAME%\n".into()),
        omit_empty: false,
    })];
    let p = Proxy::new()
        .cluster(cluster("up", &[one.address]))
        .cluster(cluster("two", &[two.address]))
        .listener(l);
    ca.enroll(&p.secrets, "west", SERVER);
    let (chain, key) = ca.workload("west", "spiffe://mesh.local/ns/edge/sa/other");
    p.secrets.set_identity("other", chain.as_bytes(), key.as_bytes()).unwrap();
    let p = p.run();
    let get = |name: &'static str, with_cert: bool| {
        let (ca, p) = (&ca, &p);
        async move {
            let c = Client::connect(ca, p, name, with_cert).await?;
            let (_, body, _) = c.get("/h").await?;
            Ok::<_, String>(String::from_utf8_lossy(&body).into_owned())
        }
    };
    let body = get("a.test", false).await.unwrap();
    assert!(body.starts_with("one ") && !body.contains("x-forwarded-client-cert"), "{body}");
    let body = get("x.b.test", true).await.unwrap();
    assert!(body.starts_with("two ") && body.contains(&format!("URI={CLIENT}")), "{body}");
    let refused = get("x.b.test", false).await.unwrap_err();
    assert!(refused.contains("CertificateRequired") || refused.contains("error 116"), "{refused}");
    let refused = get("c.test", false).await.unwrap_err();
    assert!(refused.contains("error 112"), "{refused}");
    // A session without a certificate fails at the server only once the client's last flight is there.
    let mut seen = lines(&log, 2).await;
    seen.sort();
    assert_eq!(seen, ["- x.b.test", "NR c.test"]);
}

#[tokio::test]
async fn limits_of_heads_and_bodies() {
    let app = Upstream::new("app").await;
    let ca = Ca::new();
    let mut c = chain_for(&["a.test"], "up", ClientCertificate::None);
    manager_of(&mut c).filters = vec![HttpFilter::Buffer(1000)];
    let p = gateway(Proxy::new(), &ca, app.address, vec![c]);
    let client = Client::new(&ca, &p, "a.test").await;
    let status = |n: usize, fields: usize| {
        let client = client.clone();
        async move {
            let mut r = http::Request::get("https://a.test/h");
            for i in 0..fields {
                r = r.header(format!("x-{i}"), "v".repeat(n));
            }
            client.send(r.body(()).unwrap(), None, None).await.unwrap().0.status().as_u16()
        }
    };
    assert_eq!(status(1000, 10).await, 200);
    // This client keeps to the limit that it was told, so here are the first bytes of a head beyond it.
    let (mut send, mut recv) = client.quic.open_bi().await.unwrap();
    send.write_all(&[0x01, 0x80, 0x01, 0x86, 0xa0, 0, 0]).await.unwrap();
    let answer = recv.read_to_end(1000).await.unwrap();
    assert!(answer.windows(3).any(|w| w == b"431"), "{answer:?}");
    assert_eq!(status(1, 101).await, 431);
    assert_eq!(status(1000, 1).await, 200, "the connection goes on");
    let body = client.post("/echo", Bytes::from(vec![b'x'; 1000]), None).await.unwrap();
    assert_eq!((body.0.status().as_u16(), body.1.len()), (200, 1000));
    let over = client.post("/echo", Bytes::from(vec![b'x'; 1001]), None).await.unwrap();
    assert_eq!(over.0.status(), 413);
}

#[tokio::test]
async fn a_drain_lets_streams_finish() {
    let app = Upstream::new("app").await;
    let ca = Ca::new();
    let p = simple_gateway(&ca, app.address);
    let client = Client::new(&ca, &p, "a.test").await;
    let mut stream = client.open("/stream").await;
    assert_eq!(stream.recv_response().await.unwrap().status(), 200);
    let drained = p.engine.drain(WAIT);
    let finished = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(client.get("/late").await.is_err(), "the client was told to go elsewhere");
        stream.send_data(Bytes::from_static(b"the end")).await.unwrap();
        stream.finish().await.unwrap();
        let mut body = vec![];
        while let Some(piece) = stream.recv_data().await.unwrap() {
            body.extend_from_slice(bytes::Buf::chunk(&piece));
        }
        assert_eq!(body, b"the end");
        client.quic.closed().await
    };
    let begun = std::time::Instant::now();
    let (_, end) = tokio::join!(drained, finished);
    assert!(begun.elapsed() < Duration::from_secs(5), "the drain waited for nothing");
    // H3_NO_ERROR.
    assert!(
        matches!(&end, quinn::ConnectionError::ApplicationClosed(c) if c.error_code == 0x100u32.into()),
        "{end}"
    );
}

#[tokio::test]
async fn certificates_rotate_under_connections() {
    let app = Upstream::new("app").await;
    let ca = Ca::new();
    let p = simple_gateway(&ca, app.address);
    let old = Client::new(&ca, &p, "a.test").await;
    ca.enroll(&p.secrets, "west", SERVER);
    let new = Client::new(&ca, &p, "a.test").await;
    assert_ne!(old.leaf(), new.leaf());
    for c in [old, new] {
        assert_eq!(c.get("/h").await.unwrap().0.status(), 200);
    }
}

#[tokio::test]
async fn what_a_quic_listener_cannot_be_is_refused() {
    let ca = Ca::new();
    let refused = |edit: &dyn Fn(&mut Listener), reason: &str| {
        let mut l = quic(vec![chain_for(&["a.test"], "up", ClientCertificate::None)]);
        edit(&mut l);
        let p = Proxy::new().listener(l);
        ca.enroll(&p.secrets, "west", SERVER);
        let report = p.apply();
        assert!(report.rejected[0].2.contains(reason), "{report:?}");
    };
    refused(&|l| l.quic = None, "needs a QUIC listener");
    refused(&|l| l.filter_chains[0].tls = None, "needs a certificate");
    refused(&|l| manager_of(&mut l.filter_chains[0]).codec = HttpCodec::Auto, "for HTTP/3");
    refused(&|l| manager_of(&mut l.filter_chains[0]).connect = true, "CONNECT");
    // The same port of TCP is another address, if nobody has it.
    let shared = (0..20).any(|_| {
        let chains = vec![chain_for(&["a.test"], "up", ClientCertificate::None)];
        let p = Proxy::new().listener(quic(chains)).run();
        let mut tcp = listener(Direction::Unspecified, vec![chain(vec![tcp_filter("up")])]);
        (tcp.name, tcp.address) = ("tcp".into(), p.address("l"));
        let p = p.listener(tcp);
        p.apply().rejected.is_empty() && p.address("tcp") == p.address("l")
    });
    assert!(shared);
}

/// Lines of a log, once there are so many.
async fn lines(log: &std::path::Path, n: usize) -> Vec<String> {
    for _ in 0..500 {
        let text = std::fs::read_to_string(log).unwrap_or_default();
        if text.lines().count() >= n {
            return text.lines().map(str::to_owned).collect();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{:?}", std::fs::read_to_string(log));
}

fn client_config(ca: &Ca, name: &str, with_cert: bool) -> Arc<rustls::ClientConfig> {
    let store = mesh_identity::SecretStore::new();
    ca.enroll(&store, "west", CLIENT);
    let mut tls = upstream_mtls(name, "", &["h3"]);
    tls.validation.sans = vec![];
    if !with_cert {
        tls.certificate = None;
    }
    store.client_config(&tls).unwrap()
}

//! Mutual TLS between two engines, and the choice of chains by what a ClientHello says.

use std::{collections::BTreeMap, time::Duration};

use mesh_model::proxy::*;
use mesh_proxy::{EngineOptions, Hooks, NodeInfo};

use crate::support::*;

pub(crate) const REVIEWS: &str = "spiffe://mesh.local/ns/books/sa/reviews";
const PRODUCT: &str = "spiffe://mesh.local/ns/front/sa/product";
pub(crate) const SNI: &str = "outbound_.9080_._.reviews.books.svc.cluster.local";

/// A server's sidecar: mutual TLS or plain text in, the application behind.
pub(crate) fn server_side(
    ca: &Ca,
    app: std::net::SocketAddr,
    filters: Vec<HttpFilter>,
    permissive: bool,
) -> Proxy {
    let mut m = inline(vec![vhost(&["*"], vec![route(forward("inbound|9080||"))])]);
    m.filters = filters;
    let mut tls = http_chain(m.clone());
    tls.tls = Some(downstream_mtls());
    tls.matches = FilterChainMatch {
        transport_protocol: Some(TransportProtocol::Tls),
        server_names: vec!["*.reviews.books.svc.cluster.local".into()],
        ..FilterChainMatch::default()
    };
    let mut chains = vec![tls];
    if permissive {
        let mut plain = http_chain(m);
        plain.name = "plain".into();
        plain.matches.transport_protocol = Some(TransportProtocol::RawBuffer);
        chains.push(plain);
    }
    let p = Proxy::new()
        .cluster(cluster("inbound|9080||", &[app]))
        .listener(listener(Direction::Inbound, chains));
    ca.enroll(&p.secrets, "east", REVIEWS);
    p
}

pub(crate) fn client_side(
    ca: &Ca,
    server: std::net::SocketAddr,
    http: UpstreamHttp,
    alpn: &[&str],
    san: &str,
) -> Proxy {
    let node = NodeInfo {
        workload: "product-v1".into(),
        namespace: "front".into(),
        cluster: "west".into(),
        principal: PRODUCT.into(),
        ..NodeInfo::default()
    };
    let mut c = cluster("outbound|9080||reviews.books.svc.cluster.local", &[server]);
    c.http = http;
    c.tls_matches = vec![TransportSocketMatch {
        name: "mtls".into(),
        labels: [("tlsMode".to_owned(), "istio".to_owned())].into(),
        tls: Some(upstream_mtls(SNI, san, alpn)),
        hbone: false,
    }];
    if let Discovery::Static(a) = &mut c.discovery {
        a.localities[0].endpoints[0].transport_labels =
            BTreeMap::from([("tlsMode".to_owned(), "istio".to_owned())]);
    }
    let name = c.name.clone();
    let p = Proxy::with(EngineOptions { node, ..EngineOptions::default() }, Hooks::default())
        .cluster(c)
        .listener(listener(
            Direction::Outbound,
            vec![http_chain(inline(vec![vhost(&["*"], vec![route(forward(&name))])]))],
        ));
    ca.enroll(&p.secrets, "west", PRODUCT);
    p
}

#[tokio::test]
async fn two_sidecars_speak_mutual_tls_over_one_http2_connection() {
    let app = Upstream::new("app").await;
    let ca = Ca::new();
    let server = server_side(&ca, app.address, vec![], false).run();
    let client = client_side(&ca, server.address("l"), UpstreamHttp::Auto, &["h2"], REVIEWS).run();
    let all = (0..20).map(|_| client.get("reviews.books:9080", "/a"));
    for r in futures::future::join_all(all).await {
        assert_eq!(r.status, 200, "{r:?}");
        assert!(
            r.body.contains("x-forwarded-client-cert: By=spiffe://mesh.local/ns/books/sa/reviews;Hash="),
            "{r:?}"
        );
        assert!(r.body.contains(&format!("URI={PRODUCT}")), "{r:?}");
        assert!(r.body.contains("x-forwarded-proto: http\n"), "{r:?}");
    }
    assert_eq!(server.engine.status().connections_total, 1, "one connection between the sidecars");
    server
        .metric(&[
            "istio_requests_total",
            "reporter=\"destination\"",
            "source_workload_namespace=\"front\"",
            "source_cluster=\"west\"",
            "connection_security_policy=\"mutual_tls\"",
            "response_code=\"200\"",
        ])
        .await;
    client
        .metric(&[
            "istio_requests_total",
            "reporter=\"source\"",
            "destination_service=\"reviews.books.svc.cluster.local\"",
            "destination_service_namespace=\"books\"",
            "destination_principal=\"spiffe://mesh.local/ns/books/sa/reviews\"",
        ])
        .await;
}

#[tokio::test]
async fn http1_between_sidecars_when_h2_is_not_offered() {
    let app = Upstream::new("app").await;
    let ca = Ca::new();
    let server = server_side(&ca, app.address, vec![], false).run();
    let client = client_side(&ca, server.address("l"), UpstreamHttp::Auto, &["http/1.1"], REVIEWS).run();
    for _ in 0..3 {
        assert_eq!(client.get("reviews", "/a").await.status, 200);
    }
    assert_eq!(server.engine.status().connections_total, 1);
}

#[tokio::test]
async fn the_wrong_server_and_plain_text_are_refused() {
    let app = Upstream::new("app").await;
    let ca = Ca::new();
    let server = server_side(&ca, app.address, vec![], false).run();
    let client = client_side(
        &ca,
        server.address("l"),
        UpstreamHttp::Auto,
        &["h2"],
        "spiffe://mesh.local/ns/books/sa/ratings",
    )
    .run();
    let r = client.get("reviews", "/a").await;
    assert_eq!(r.status, 503, "{r:?}");
    assert!(!r.body.contains("spiffe"), "the reason is not for the client: {r:?}");
    assert_eq!(server.raw("l", "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await, "", "strict");
    assert_eq!(app.requests(), 0);
    let other = Ca::new();
    let stranger = client_side(&other, server.address("l"), UpstreamHttp::Auto, &["h2"], REVIEWS).run();
    assert_eq!(stranger.get("reviews", "/a").await.status, 503);
    assert_eq!(app.requests(), 0);
}

#[tokio::test]
async fn permissive_takes_both_and_policy_tells_them_apart() {
    let app = Upstream::new("app").await;
    let ca = Ca::new();
    let policy = Rbac {
        rules: Some(RbacRules {
            action: RbacAction::Allow,
            policies: [(
                "p".to_owned(),
                RbacPolicy {
                    permissions: vec![Permission::Any],
                    principals: vec![Principal::And(vec![
                        Principal::Authenticated(Some(StringMatch::exact(PRODUCT))),
                        Principal::SourceCluster(StringMatch::exact("west")),
                    ])],
                },
            )]
            .into(),
        }),
        ..Rbac::default()
    };
    let server = server_side(&ca, app.address, vec![HttpFilter::Rbac(policy)], true).run();
    let client = client_side(&ca, server.address("l"), UpstreamHttp::Auto, &["h2"], REVIEWS).run();
    assert_eq!(client.get("reviews", "/a").await.status, 200);
    let r = server
        .send("reviews", "/a", "X-Forwarded-Client-Cert: URI=spiffe://mesh.local/ns/front/sa/product\r\n")
        .await;
    assert_eq!((r.status, r.body.as_str()), (403, "RBAC: access denied"));
    assert_eq!(app.requests(), 1);
}

/// `allowTls` of release 1.0: a certificate that is shown must be good, and only with one is there a principal.
#[tokio::test]
async fn a_certificate_that_need_not_be_shown() {
    let app = Upstream::new("app").await;
    let ca = Ca::new();
    let rbac = |action, who: Principal| {
        let policy = RbacPolicy {
            permissions: vec![Permission::Path(StringMatch::prefix("/proved"))],
            principals: vec![who],
        };
        let rules = Some(RbacRules { action, policies: [("p".to_owned(), policy)].into() });
        HttpFilter::Rbac(Rbac { rules, ..Rbac::default() })
    };
    // Under `/proved` only who is proved.
    let nobody = Principal::Not(Box::new(Principal::Authenticated(Some(StringMatch::exact(PRODUCT)))));
    let mut server = server_side(&ca, app.address, vec![rbac(RbacAction::Deny, nobody)], false);
    let mut l = Listener::clone(&server.snap.listeners["l"]);
    l.filter_chains[0].tls.as_mut().unwrap().client_certificate =
        ClientCertificate::Optional(validation(&[]));
    server.snap.listeners.insert("l".into(), l.into());
    let server = server.run();
    let side = |change: &dyn Fn(&mut UpstreamTls)| {
        let mut p = client_side(&ca, server.address("l"), UpstreamHttp::Auto, &["h2"], REVIEWS);
        for c in p.snap.clusters.values_mut() {
            let mut changed = Cluster::clone(c);
            change(changed.tls_matches[0].tls.as_mut().unwrap());
            *c = changed.into();
        }
        p
    };
    let known = side(&|_| ()).run();
    let anonymous = side(&|tls| tls.certificate = None).run();
    let stranger = side(&|_| ());
    let (chain, key) = Ca::new().workload("west", PRODUCT);
    stranger.secrets.set_identity("default", chain.as_bytes(), key.as_bytes()).unwrap();
    let stranger = stranger.run();

    for (who, open, proved) in [(&known, 200, 200), (&anonymous, 200, 403), (&stranger, 503, 503)] {
        assert_eq!(who.get("reviews", "/open").await.status, open);
        assert_eq!(who.get("reviews", "/proved").await.status, proved);
    }
    // Nor does it become somebody by saying so.
    let header = format!("X-Forwarded-Client-Cert: URI={PRODUCT}\r\n");
    assert_eq!(anonymous.send("reviews", "/proved", &header).await.status, 403);
    assert!(!anonymous.send("reviews", "/open", &header).await.body.contains(PRODUCT));
    assert!(known.get("reviews", "/open").await.body.contains(PRODUCT));
}

/// Connections are shared and kept; who is revoked on either side loses them at once, over HTTP/1 as over HTTP/2.
#[tokio::test]
async fn who_is_revoked_loses_its_connections() {
    for (http, alpn) in [(UpstreamHttp::Auto, "h2"), (UpstreamHttp::Http1, "http/1.1")] {
        for server_is_revoked in [false, true] {
            let app = Upstream::new("app").await;
            let ca = Ca::new();
            let (server, ours) = (server_side(&ca, app.address, vec![], false), ca.workload("east", REVIEWS));
            server.secrets.set_identity("default", ours.0.as_bytes(), ours.1.as_bytes()).unwrap();
            let at_server = server.secrets.clone();
            let server = server.run();
            let (client, theirs) =
                (client_side(&ca, server.address("l"), http, &[alpn], REVIEWS), ca.workload("west", PRODUCT));
            client.secrets.set_identity("default", theirs.0.as_bytes(), theirs.1.as_bytes()).unwrap();
            let at_client = client.secrets.clone();
            let client = client.run();
            // A workload of the same cluster under another intermediate is somebody else.
            ca.tell(&at_server, ca.revoking(&ca.workload("west", PRODUCT).0));
            for _ in 0..3 {
                assert_eq!(client.get("reviews", "/a").await.status, 200);
            }
            if server_is_revoked {
                ca.tell(&at_client, ca.revoking(&ours.0));
            } else {
                ca.tell(&at_server, ca.revoking(&theirs.0));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
            let r = client.get("reviews", "/a").await;
            assert_eq!(r.status, 503, "{alpn}, server revoked: {server_is_revoked}: {r:?}");
        }
    }
}

/// A connection that carries bytes ends as well, whichever end is revoked.
#[tokio::test]
async fn bytes_of_who_is_revoked_end() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    for server_is_revoked in [false, true] {
        let listener_of_app = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let app = listener_of_app.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut s, _)) = listener_of_app.accept().await {
                tokio::spawn(async move {
                    let (mut r, mut w) = s.split();
                    let _ = tokio::io::copy(&mut r, &mut w).await;
                });
            }
        });
        let ca = Ca::new();
        let mut c = chain(vec![tcp_filter("inbound|9080||")]);
        c.tls = Some(downstream_mtls());
        let server = Proxy::new()
            .cluster(cluster("inbound|9080||", &[app]))
            .listener(listener(Direction::Inbound, vec![c]));
        ca.enroll(&server.secrets, "east", REVIEWS);
        let ours = ca.workload("east", REVIEWS);
        server.secrets.set_identity("default", ours.0.as_bytes(), ours.1.as_bytes()).unwrap();
        let at_server = server.secrets.clone();
        let server = server.run();
        let mut to = cluster("out", &[server.address("l")]);
        to.tls = Some(Box::new(upstream_mtls(SNI, REVIEWS, &["istio"])));
        let client = Proxy::new()
            .cluster(to)
            .listener(listener(Direction::Outbound, vec![chain(vec![tcp_filter("out")])]));
        ca.enroll(&client.secrets, "west", PRODUCT);
        let theirs = ca.workload("west", PRODUCT);
        client.secrets.set_identity("default", theirs.0.as_bytes(), theirs.1.as_bytes()).unwrap();
        let at_client = client.secrets.clone();
        let client = client.run();
        let mut s = tokio::net::TcpStream::connect(client.address("l")).await.unwrap();
        s.write_all(b"a").await.unwrap();
        assert_eq!(s.read_u8().await.unwrap(), b'a');
        if server_is_revoked {
            ca.tell(&at_client, ca.revoking(&ours.0));
        } else {
            ca.tell(&at_server, ca.revoking(&theirs.0));
        }
        let ended = tokio::time::timeout(Duration::from_secs(5), s.read(&mut [0; 8])).await;
        assert!(matches!(ended, Ok(Ok(0) | Err(_))), "server revoked: {server_is_revoked}: {ended:?}");
    }
}

#[tokio::test]
async fn a_gateway_passes_sessions_through_by_sni() {
    let app = Upstream::new("app").await;
    let ca = Ca::new();
    let server = server_side(&ca, app.address, vec![], false).run();
    let mut c = chain(vec![NetworkFilter::SniCluster, tcp_filter("none")]);
    c.matches.transport_protocol = Some(TransportProtocol::Tls);
    let gateway = Proxy::new()
        .cluster(cluster("outbound_.9080_._.reviews.books.svc.cluster.local", &[server.address("l")]))
        .listener(listener(Direction::Unspecified, vec![c]))
        .run();
    let client = client_side(&ca, gateway.address("l"), UpstreamHttp::Auto, &["h2"], REVIEWS).run();
    let r = client.get("reviews", "/a").await;
    assert_eq!(r.status, 200, "{r:?}");
    assert!(r.body.contains(&format!("URI={PRODUCT}")), "the caller's identity survives: {r:?}");
    assert_eq!(gateway.raw("l", "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await, "", "not TLS");
}

#[tokio::test]
async fn certificates_rotate_under_open_connections() {
    let app = Upstream::new("app").await;
    let ca = Ca::new();
    let server = server_side(&ca, app.address, vec![], false).run();
    let client = client_side(&ca, server.address("l"), UpstreamHttp::Auto, &["h2"], REVIEWS).run();
    assert_eq!(client.get("reviews", "/a").await.status, 200);
    ca.enroll(&server.secrets, "east", REVIEWS);
    ca.enroll(&client.secrets, "west", PRODUCT);
    for _ in 0..3 {
        assert_eq!(client.get("reviews", "/a").await.status, 200);
    }
    assert_eq!(server.engine.status().connections_total, 1);
    tokio::time::sleep(Duration::from_millis(1)).await;
}

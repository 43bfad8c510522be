//! Sessions that stay on a host, whatever else is said of where requests go.

use std::{sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use mesh_model::proxy::*;

use crate::support::*;

fn cookie(absolute: Duration) -> StatefulSession {
    let state = SessionState::Cookie { name: "stay".into(), path: "/".into(), ttl: Duration::ZERO };
    StatefulSession { state: Some(state), absolute, ..StatefulSession::default() }
}

/// A route with these destinations, whose sessions stay.
fn proxy(clusters: Vec<Cluster>, weights: &[(&str, u32)], session: StatefulSession) -> Proxy {
    let mut f = forward("");
    f.clusters =
        weights.iter().map(|(n, w)| WeightedCluster { weight: *w, ..WeightedCluster::only(*n) }).collect();
    let mut r = route(f);
    r.filters =
        RouteFilters { session: Some(SessionOverride::Set(session)), ..RouteFilters::default() }.into();
    let mut m = inline(vec![vhost(&["*"], vec![r])]);
    m.filters = vec![HttpFilter::StatefulSession(Arc::default())];
    let all = clusters.into_iter().fold(Proxy::new(), Proxy::cluster);
    all.listener(listener(Direction::Outbound, vec![http_chain(m)])).run()
}

fn pair(r: &Response) -> String {
    r.header("set-cookie").unwrap_or_else(|| panic!("{r:?}")).split(';').next().unwrap().to_owned()
}

#[tokio::test]
async fn weights_are_for_those_who_begin() {
    let (a, b) = (Upstream::new("a").await, Upstream::new("b").await);
    let clusters = || vec![cluster("a", &[a.address]), cluster("b", &[b.address])];
    let all_to_b = proxy(clusters(), &[("a", 0), ("b", 1)], cookie(Duration::ZERO));
    let at_a = format!("cookie: stay={}\r\n", STANDARD.encode(a.address.to_string()));
    for _ in 0..8 {
        assert_eq!(all_to_b.get("h", "/name").await.body, "b");
        let r = all_to_b.send("h", "/name", &at_a).await;
        assert_eq!((r.body.as_str(), r.header("set-cookie")), ("a", None));
    }
    // Of a cluster that is none of the route's the host is nobody's.
    let only_b = proxy(clusters(), &[("b", 1)], cookie(Duration::ZERO));
    let r = only_b.send("h", "/name", &at_a).await;
    assert_eq!(r.body, "b");
    assert_eq!(
        only_b.send("h", "/name", &format!("cookie: {}\r\n", pair(&r))).await.header("set-cookie"),
        None
    );
}

#[tokio::test]
async fn the_end_of_a_session_is_not_the_clients_to_choose() {
    let up = Upstream::new("a").await;
    let clusters = || vec![cluster("a", &[up.address])];
    let p = proxy(clusters(), &[("a", 1)], cookie(Duration::from_secs(1)));
    let first = p.get("h", "/name").await;
    let set = first.header("set-cookie").unwrap();
    assert!(!set.contains("Max-Age") && !set.contains("Expires"), "{set}");
    let told = format!("cookie: {}\r\n", pair(&first));
    assert_eq!(p.send("h", "/name", &told).await.header("set-cookie"), None);
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert!(p.send("h", "/name", &told).await.header("set-cookie").is_some(), "it is over");
    let mut header = cookie(Duration::from_secs(1));
    header.state = Some(SessionState::Header("stay".into()));
    let p = proxy(clusters(), &[("a", 1)], header);
    let told = p.get("h", "/name").await.header("stay").unwrap().to_owned();
    assert_eq!(p.send("h", "/name", &format!("stay: {told}\r\n")).await.header("stay"), None);
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert!(p.send("h", "/name", &format!("stay: {told}\r\n")).await.header("stay").is_some());
}

#[tokio::test]
async fn workloads_behind_one_gateway_are_told_apart() {
    let gateway = Upstream::new("gw").await;
    let mut c = cluster("a", &[gateway.address, gateway.address]);
    if let Discovery::Static(a) = &mut c.discovery {
        let all = a.localities.iter_mut().flat_map(|l| &mut l.endpoints);
        for (e, slot) in all.zip([1, 2]) {
            e.slots = Slots::Asks(slot);
        }
    }
    let p = proxy(vec![c], &[("a", 1)], cookie(Duration::ZERO));
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..32 {
        let r = p.get("h", "/name").await;
        let token = pair(&r);
        let token = token.split_once('=').unwrap().1.trim_matches('"');
        let text = STANDARD.decode(token).unwrap();
        seen.insert(String::from_utf8_lossy(&text[2..]).into_owned());
        let next = p.send("h", "/name", &format!("cookie: stay={token}\r\n")).await;
        assert_eq!(next.header("set-cookie"), None, "it was the same slot");
    }
    let want = [1, 2].map(|s| format!("{}/{s:08x}", gateway.address));
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), want);
    // The gateway without a slot is no workload.
    let bare = format!("cookie: stay={}\r\n", STANDARD.encode(gateway.address.to_string()));
    assert!(p.send("h", "/name", &bare).await.header("set-cookie").is_some());
}

#[tokio::test]
async fn a_session_leaves_a_host_that_takes_no_traffic_unless_it_is_strict() {
    let (a, b) = (Upstream::new("a").await, Upstream::new("b").await);
    let with = |health: EndpointHealth, strict: bool| {
        let mut c = cluster("c", &[a.address, b.address]);
        let Discovery::Static(l) = &mut c.discovery else { panic!() };
        l.localities[0].endpoints[1].health = health;
        proxy(vec![c], &[("c", 1)], StatefulSession { strict, ..cookie(Duration::ZERO) })
    };
    let at_b = format!("cookie: stay={}\r\n", STANDARD.encode(b.address.to_string()));
    for strict in [false, true] {
        let p = with(EndpointHealth::Healthy, strict);
        for _ in 0..4 {
            let r = p.send("h", "/name", &at_b).await;
            assert_eq!((r.body.as_str(), r.header("set-cookie")), ("b", None));
        }
    }
    let p = with(EndpointHealth::Unhealthy, false);
    let r = p.send("h", "/name", &at_b).await;
    assert!(r.body == "a" && r.header("set-cookie").is_some(), "it begins anew: {r:?}");
    let r = with(EndpointHealth::Unhealthy, true).send("h", "/name", &at_b).await;
    assert_eq!((r.status, b.requests()), (503, 8), "{r:?}");
}

#[tokio::test]
async fn a_cookie_is_of_its_path() {
    let (a, b) = (Upstream::new("a").await, Upstream::new("b").await);
    let mut c = cookie(Duration::ZERO);
    c.state = Some(SessionState::Cookie { name: "stay".into(), path: "/shop".into(), ttl: Duration::ZERO });
    let p = proxy(vec![cluster("c", &[a.address, b.address])], &[("c", 1)], c);
    for within in ["/shop", "/shop/name", "/shop?a=/"] {
        let r = p.get("h", within).await;
        assert!(r.header("set-cookie").is_some_and(|c| c.contains("Path=/shop")), "{within}: {r:?}");
    }
    for outside in ["/", "/shopping", "/name"] {
        assert_eq!(p.get("h", outside).await.header("set-cookie"), None, "{outside}");
    }
}

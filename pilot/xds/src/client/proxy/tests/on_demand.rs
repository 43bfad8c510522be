//! What traffic asks for, with our own server and without one.

use mesh_model::proxy::{OnDemandHosts, VirtualHost};

use super::*;
use crate::client::proxy::on_demand::{Asked, Kind, OnDemandNames};

const NOBODY: &dyn Fn(Kind, &str) -> bool = &|_, _| false;

fn routes(name: &str) -> (String, pb::Any) {
    let config = RouteConfiguration {
        name: name.into(),
        virtual_hosts: vec![],
        on_demand: Some(OnDemandHosts::default()),
    };
    (name.into(), codec::encode_route(&config))
}

fn host(name: &str) -> (String, pb::Any) {
    let host = VirtualHost {
        name: name.into(),
        domains: vec![name.into()],
        require_tls: false,
        attempt_count: false,
        routes: vec![],
        request_headers: Default::default(),
        response_headers: Default::default(),
        filters: Default::default(),
    };
    (name.into(), codec::encode_virtual_host(&host))
}

fn update(all: Vec<(String, pb::Any)>) -> Update {
    let changed = all
        .into_iter()
        .map(|(name, any)| pb::Resource { name, resource: Some(any), ..pb::Resource::default() })
        .collect();
    Update { changed, removed: vec![] }
}

fn asked(kind: Kind, name: &str) -> Asked {
    Asked { ask: [(kind, name.to_owned())].into(), round: 1, ..Asked::default() }
}

#[test]
fn a_cluster_on_demand_waits_for_its_endpoints_and_nobody_for_it() {
    let mut inner = Inner::new(None);
    inner.apply(CDS, update(vec![]));
    inner.apply(LDS, update(vec![]));
    assert!(inner.ask(asked(Kind::Cluster, "a")).is_empty());
    inner.apply(CDS, update(vec![cluster("a")]));
    assert!(inner.references()[EDS].contains("a"));
    assert!(inner.complete(), "the rest goes on");
    let view = inner.view();
    assert!(view.clusters.is_empty());
    assert_eq!(inner.find(&view, Kind::Cluster, "a"), None);
    inner.apply(EDS, update(vec![endpoints("a")]));
    let view = inner.view();
    assert_eq!(inner.find(&view, Kind::Cluster, "a"), Some(true));
    // Asked for once more, it is subscribed once more.
    assert_eq!(inner.ask(asked(Kind::Cluster, "a"))[&Kind::Cluster], BTreeSet::from(["a".to_owned()]));
    // Given up, it is gone with what it refers to.
    inner.ask(Asked { gone: [(Kind::Cluster, "a".to_owned())].into(), ..Asked::default() });
    inner.prune();
    assert!(inner.view().clusters.is_empty() && inner.state.endpoints.is_empty());
    assert!(inner.raw[CDS].is_empty());
}

#[test]
fn what_is_refused_or_removed_is_absent() {
    let mut inner = Inner::new(None);
    inner.apply(RDS, update(vec![routes("r")]));
    inner.ask(asked(Kind::VirtualHost, "r/a"));
    let view = inner.view();
    assert_eq!(inner.find(&view, Kind::VirtualHost, "r/a"), None);
    inner.apply(VHDS, Update { changed: vec![], removed: vec!["r/a".into()] });
    assert_eq!(inner.find(&view, Kind::VirtualHost, "r/a"), Some(false));
    inner.ask(asked(Kind::VirtualHost, "r/a"));
    assert_eq!(
        inner.find(&view, Kind::VirtualHost, "r/a"),
        None,
        "that was the answer to an earlier question"
    );
    let bad = inner.apply(VHDS, update(vec![("r/a".into(), cluster("a").1)]));
    assert_eq!(bad.len(), 1);
    assert_eq!(inner.find(&view, Kind::VirtualHost, "r/a"), Some(false));
}

#[test]
fn the_state_of_the_world_has_nothing_on_demand() {
    let mut inner = Inner::new(None);
    inner.without_on_demand = Some("needs an ads_config of api_type DELTA_GRPC");
    let bad = inner.apply(RDS, update(vec![routes("r")]));
    assert!(bad[0].reason.starts_with("vhds: needs"), "{bad:?}");
    let asking = crate::codec::tests::listener();
    let bad = inner.apply(LDS, update(vec![(asking.name.clone(), codec::encode_listener(&asking))]));
    assert!(bad[0].reason.starts_with("on_demand: needs"), "{bad:?}");
}

/// Our own server need not know the type to answer.
#[tokio::test]
async fn our_server_answers_for_names_that_it_does_not_have() {
    let (addr, source, _service, _stop) = serve().await;
    source.set(&[(CDS, vec![]), (LDS, vec![listener("r")]), (RDS, vec![routes("r")])]);
    let names = OnDemandNames::new(9);
    let client = ProxyClient::start(ProxyClientOptions {
        on_demand: names.clone(),
        ..options(addr, Mode::Delta, None)
    });
    let mut state = client.state();
    until(&mut state, "routes", |s| s.routes.contains_key("r")).await;
    for (kind, name) in [(Kind::VirtualHost, "r/a"), (Kind::Cluster, "a")] {
        let mut settled = names.want(kind, name, NOBODY).unwrap();
        until(&mut settled, name, |s| *s).await;
    }
    assert!(state.borrow().clusters.is_empty());
    // And for those that it has.
    source.set(&[(VHDS, vec![host("r/b")])]);
    let mut settled = names.want(Kind::VirtualHost, "r/b", NOBODY).unwrap();
    let s =
        until(&mut state, "the host", |s| !s.routes["r"].on_demand.as_ref().unwrap().hosts.is_empty()).await;
    assert!(!*settled.borrow(), "not before it is in force");
    names.applied(s.revision);
    until(&mut settled, "r/b", |s| *s).await;
}

use std::collections::HashMap;

use super::*;
use crate::http::message::{BodyKind, Version};

fn req(authority: &str, path: &str) -> RequestHead {
    RequestHead {
        method: Method::GET,
        version: Version::Http11,
        https: false,
        authority: authority.into(),
        path: path.into(),
        headers: Headers::default(),
        body: BodyKind::Empty,
        upgrade: None,
        expect_continue: false,
    }
}

fn direct(path: model::PathMatch, body: &str) -> model::Route {
    model::Route {
        name: body.into(),
        matches: model::RouteMatch { path, ..model::RouteMatch::any() },
        action: model::RouteAction::Direct(model::DirectResponse { status: 200, body: body.into() }),
        request_headers: Rare::default(),
        response_headers: Rare::default(),
        fault: None,
        cors: None,
        operation: String::new(),
        filters: Rare::default(),
    }
}

fn host(name: &str, domains: &[&str], routes: Vec<model::Route>) -> model::VirtualHost {
    model::VirtualHost {
        name: name.into(),
        domains: domains.iter().map(|d| (*d).to_owned()).collect(),
        require_tls: false,
        attempt_count: false,
        routes,
        request_headers: Rare::default(),
        response_headers: Rare::default(),
        filters: Rare::default(),
    }
}

fn table(hosts: Vec<model::VirtualHost>) -> Result<RouteTable, CompileError> {
    RouteTable::new(
        &model::RouteConfiguration { name: "r".into(), virtual_hosts: hosts, on_demand: None },
        None,
        &mut ClusterSlot::new,
    )
}

#[test]
fn domains_by_specificity() {
    let t = table(vec![
        host("any", &["*"], vec![]),
        host("suffix", &["*.a.com"], vec![]),
        host("longer", &["*.b.a.com"], vec![]),
        host("prefix", &["www.*"], vec![]),
        host("exact", &["x.b.a.com", "x.b.a.com:80"], vec![]),
    ])
    .unwrap();
    for (a, want) in [
        ("x.b.a.com", "exact"),
        ("X.b.A.com:80", "exact"),
        ("x.b.a.com:81", "any"),
        ("y.b.a.com", "longer"),
        ("www.a.com", "suffix"),
        ("www.c.com", "prefix"),
        ("a.com", "any"),
        ("", "any"),
    ] {
        assert_eq!(&*t.host(a).unwrap().name, want, "{a}");
    }
    assert!(matches!(
        table(vec![host("a", &["x"], vec![]), host("b", &["X"], vec![])]),
        Err(CompileError::DuplicateDomain(_))
    ));
}

#[test]
fn first_route_wins() {
    use model::PathMatch as P;
    let mut folded = direct(P::Prefix("/Fold".into()), "fold");
    folded.matches.case_sensitive = false;
    let t = table(vec![host(
        "h",
        &["*"],
        vec![
            direct(P::Exact("/a".into()), "exact"),
            direct(P::SegmentPrefix("/seg".into()), "segments"),
            direct(P::Regex("/r/[0-9]+".into()), "regex"),
            folded,
            direct(P::Prefix("/a".into()), "prefix"),
        ],
    )])
    .unwrap();
    for (path, want) in [
        ("/a", Some("exact")),
        ("/a?x=1", Some("exact")),
        ("/ab", Some("prefix")),
        ("/seg", Some("segments")),
        ("/seg/x", Some("segments")),
        ("/segx", None),
        ("/r/12", Some("regex")),
        ("/r/12/3", None),
        ("/fOLD/x", Some("fold")),
    ] {
        let got = match t.find(&req("h", path), None) {
            Found::Route(_, r) => Some(r.name.to_string()),
            _ => None,
        };
        assert_eq!(got.as_deref(), want, "{path}");
    }
}

#[test]
fn rewrites() {
    let f = model::Forward { clusters: vec![model::WeightedCluster::only("c")], ..model::Forward::default() };
    let route = |path, f: model::Forward| {
        let mut r = direct(path, "x");
        r.action = model::RouteAction::Forward(Box::new(f));
        Route::new(&r, &r.filters, &mut ClusterSlot::new).unwrap()
    };
    let go = |r: &Route, p: &str| {
        let Action::Forward(f) = &r.action else { unreachable!() };
        f.rewritten_path(r, p).unwrap()
    };
    let r = route(
        model::PathMatch::Prefix("/api/".into()),
        model::Forward { prefix_rewrite: Some("/".into()), ..f.clone() },
    );
    assert_eq!(go(&r, "/api/v1?x=/api/"), "/v1?x=/api/");
    let r = route(
        model::PathMatch::Prefix("/".into()),
        model::Forward { regex_rewrite: Some(("^/user/([^/]+)".into(), r"/u$-\1".into())), ..f },
    );
    assert_eq!(go(&r, "/user/joe/x?y"), "/u$-joe/x?y");
}

#[test]
fn weights_split_traffic() {
    let w = |n: &str, weight| model::WeightedCluster { weight, ..model::WeightedCluster::only(n) };
    let f = model::Forward { clusters: vec![w("a", 80), w("b", 20), w("c", 0)], ..model::Forward::default() };
    let f = Forward::new(&f, &mut ClusterSlot::new).unwrap();
    let mut counts = HashMap::new();
    for i in 0..1000u64 {
        *counts.entry(f.destination(i).cluster.name.to_string()).or_insert(0) += 1;
    }
    assert_eq!((counts["a"], counts["b"], counts.get("c")), (800, 200, None));
}

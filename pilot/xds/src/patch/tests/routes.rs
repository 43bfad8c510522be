//! Route configurations, virtual hosts and routes.

use envoy_types::pb::envoy::config::route::v3 as r;

use super::*;

fn show_routes(any: &pb::Any) -> String {
    let m: r::RouteConfiguration = codec::unpack(any).unwrap();
    let host = |h: &r::VirtualHost| {
        let routes: Vec<_> = h.routes.iter().map(|r| r.name.as_str()).collect();
        format!("{}[{}]", h.domains.join(","), routes.join(" "))
    };
    m.virtual_hosts.iter().map(host).collect::<Vec<_>>().join(" ")
}

#[test]
fn routes() {
    let route = json!({"name": "new", "match": {"prefix": "/n"}, "direct_response": {"status": 418}});
    let host = json!({"name": "c:80", "domains": ["c"], "routes": [route]});
    let (a, b) = ("a,a:80[one two]", "b[two]");
    let any = json!({});
    let vhost = |v: Json| json!({"vhost": v});
    let named = |n: &str| json!({"vhost": {"route": {"name": n}}});
    let action = |n: &str| json!({"vhost": {"route": {"action": n}}});
    type Row = (&'static str, Json, &'static str, Json, String);
    let rows: Vec<Row> = vec![
        (
            "ROUTE_CONFIGURATION",
            any.clone(),
            "MERGE",
            json!({"virtual_hosts": [host]}),
            format!("{a} {b} c[new]"),
        ),
        (
            "ROUTE_CONFIGURATION",
            json!({"name": "80"}),
            "MERGE",
            json!({"max_direct_response_body_size_bytes": 9}),
            format!("{a} {b}"),
        ),
        ("ROUTE_CONFIGURATION", json!({"name": "81"}), "MERGE", json!({"name": "x"}), String::new()),
        ("VIRTUAL_HOST", any.clone(), "ADD", host.clone(), format!("{a} {b} c[new]")),
        ("VIRTUAL_HOST", json!({"portNumber": 80}), "ADD", host.clone(), format!("{a} {b} c[new]")),
        ("VIRTUAL_HOST", json!({"portNumber": 81}), "ADD", host.clone(), String::new()),
        ("VIRTUAL_HOST", vhost(json!({"name": "b:80"})), "REMOVE", Json::Null, a.into()),
        ("VIRTUAL_HOST", vhost(json!({"domainName": "a"})), "REMOVE", Json::Null, b.into()),
        ("VIRTUAL_HOST", vhost(json!({"domainName": "z"})), "REMOVE", Json::Null, String::new()),
        ("VIRTUAL_HOST", vhost(json!({"name": "b:80"})), "REPLACE", host, format!("{a} c[new]")),
        (
            "VIRTUAL_HOST",
            vhost(json!({"name": "b:80"})),
            "MERGE",
            json!({"domains": ["d"]}),
            format!("{a} b,d[two]"),
        ),
        (
            "VIRTUAL_HOST",
            vhost(json!({"name": "b:80"})),
            "MERGE",
            json!({"domains": ["A"]}),
            "! virtual_hosts[b:80].domains: \"A\" is one of \"a:80\"".into(),
        ),
        ("HTTP_ROUTE", any.clone(), "ADD", route.clone(), "a,a:80[one two new] b[two new]".into()),
        (
            "HTTP_ROUTE",
            vhost(json!({"name": "a:80"})),
            "ADD",
            route.clone(),
            format!("a,a:80[one two new] {b}"),
        ),
        ("HTTP_ROUTE", any.clone(), "INSERT_FIRST", route.clone(), "a,a:80[new one two] b[new two]".into()),
        ("HTTP_ROUTE", named("one"), "INSERT_FIRST", route.clone(), format!("a,a:80[new one two] {b}")),
        ("HTTP_ROUTE", named("two"), "INSERT_BEFORE", route.clone(), "a,a:80[one new two] b[new two]".into()),
        ("HTTP_ROUTE", named("one"), "INSERT_AFTER", route.clone(), format!("a,a:80[one new two] {b}")),
        ("HTTP_ROUTE", named("two"), "REMOVE", Json::Null, "a,a:80[one] b[]".into()),
        ("HTTP_ROUTE", action("REDIRECT"), "REMOVE", Json::Null, format!("a,a:80[two] {b}")),
        ("HTTP_ROUTE", action("ROUTE"), "REMOVE", Json::Null, format!("a,a:80[one] {b}")),
        ("HTTP_ROUTE", action("DIRECT_RESPONSE"), "REMOVE", Json::Null, format!("{a} b[]")),
        ("HTTP_ROUTE", named("one"), "MERGE", json!({"name": "uno"}), format!("a,a:80[uno two] {b}")),
        // Another action takes the place of the first.
        (
            "HTTP_ROUTE",
            named("one"),
            "MERGE",
            json!({"direct_response": {"status": 200}}),
            format!("{a} {b}"),
        ),
        (
            "HTTP_ROUTE",
            any,
            "ADD",
            json!({"name": "x"}),
            "! virtual_hosts[a:80].routes[2]: needs a match of the path and an action".into(),
        ),
    ];
    for (to, matches, operation, value, want) in rows {
        let p = json!({"applyTo": to, "match": {"context": "SIDECAR_OUTBOUND", "routeConfiguration": matches},
            "patch": {"operation": operation, "value": value}});
        let run = |context| {
            let place = Place { context, ..Place::default() };
            let got = made(&super::routes(&the_routes("80"), &place, &[&patch(&p)], false));
            got.map_or_else(|e| format!("! {e}"), |any| any.map_or(String::new(), |any| show_routes(&any)))
        };
        assert_eq!(run(Side::SidecarOutbound), want, "{p}");
        assert_eq!(run(Side::Gateway), "", "{p}");
    }
    // Those of a gateway say more in their name.
    for (matches, hit) in [
        (json!({"portNumber": 443, "portName": "web", "gateway": "ns/gw"}), true),
        (json!({"portName": "other"}), false),
        (json!({"gateway": "ns/other"}), false),
        (json!({"portNumber": 80}), false),
    ] {
        let p = patch(
            &json!({"applyTo": "VIRTUAL_HOST", "match": {"context": "GATEWAY", "routeConfiguration": matches},
            "patch": {"operation": "REMOVE"}}),
        );
        let place = Place { context: Side::Gateway, ..Place::default() };
        let got = made(&super::routes(&the_routes("https.443.web.gw.ns"), &place, &[&p], false)).unwrap();
        assert_eq!(got.is_some(), hit, "{matches}");
    }
}

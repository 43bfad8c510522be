//! grpcio's `xds:///` client and its xDS-enabled server against our control plane, without a proxy anywhere.
//!
//! `FLOTILLA_PYTHON` names a Python with grpcio, else it is the one that `cargo verify` prepares.

#[path = "grpc_xds/stage.rs"]
mod stage;
#[allow(dead_code, unused_imports, reason = "not every target that includes this uses all of it")]
mod support;

use serde_json::json;
use stage::{Client, PORT, TARGET, bootstrap, cluster, greeter, nothing_refused, routes, rule, server};

const V1: &str = ", version: v1";
const V2: &str = ", version: v2";
const TO_V1: &str = "    route: [{destination: {host: greeter, subset: v1}}]\n";
const TO_V2: &str = "    route: [{destination: {host: greeter, subset: v2}}]\n";

fn weights(v1: u32, v2: u32) -> String {
    routes(&format!(
        "  - route:\n    - {{destination: {{host: greeter, subset: v1}}, weight: {v1}}}\n    - {{destination: {{host: greeter, \
         subset: v2}}, weight: {v2}}}\n"
    ))
}

/// Within five standard deviations of a share.
fn is_share(part: u32, all: u32, share: f64) -> bool {
    let (part, all) = (f64::from(part), f64::from(all));
    (part - all * share).abs() < 5.0 * (all * share * (1.0 - share)).sqrt()
}

#[test]
#[ignore = "needs the flotilla binary and grpcio; cargo verify builds and installs them"]
fn routes_mean_what_they_mean_to_a_sidecar() {
    let c = cluster();
    let (a, b) = (c.workload(11), c.workload(12));
    c.write("greeter.yaml", &greeter(&[("greeter-v1", a, V1), ("greeter-v2", b, V2)]));
    c.write("rule.yaml", &rule("{loadBalancer: {simple: ROUND_ROBIN}}"));
    let _servers = [server(&c, "v1", a, None), server(&c, "v2", b, None)];
    let ip = c.workload(1);
    let boot = bootstrap(&c, "client", ip, json!({"app": "client"}));
    let mut client = Client::start(&c, "client", &boot, TARGET, false);

    // Without a document: all endpoints of the service.
    let t = client.until("calls", 100, &json!({}), |t| t.failed() == 0 && t.served.len() == 2);
    // In turn; who was connected first has had a call more.
    assert!((40..=60).contains(&t.by("v1")) && (40..=60).contains(&t.by("v2")), "{t:?}");
    // By a short name, as a caller of the namespace has it.
    let mut short = Client::start(&c, "short", &boot, "xds:///greeter:7070", false);
    assert_eq!(short.hello(20).servers(), ["v1", "v2"]);
    drop(short);

    // A subset, by headers and by methods; what no call can match is nobody's.
    c.write(
        "routes.yaml",
        &routes(&format!(
            "  - match: [{{headers: {{x-user: {{exact: jason}}}}}}]\n{TO_V2}  - match: [{{uri: {{exact: \
             /greeter.Greeter/Other}}}}]\n{TO_V2}  - match: [{{method: {{exact: GET}}}}]\n{TO_V2}  - match: [{{headers: \
             {{x-name: {{regex: \"b.*\"}}}}, withoutHeaders: {{x-not: {{}}}}}}]\n{TO_V2}  - match: [{{headers: {{x-other: {{}}}}, \
             withoutHeaders: {{x-kind: {{exact: plain}}}}}}]\n{TO_V2}  -{}",
            &TO_V1[3..]
        )),
    );
    client.until("routes", 20, &json!({}), |t| t.by("v1") == 20);
    let with = |name: &str, value: &str| json!({"metadata": {name: value}});
    assert_eq!(client.calls(20, with("x-user", "jason")).servers(), ["v2"]);
    assert_eq!(client.calls(20, with("x-user", "jasons")).servers(), ["v1"]);
    assert_eq!(client.calls(20, json!({"method": "Other"})).servers(), ["v2"]);
    assert_eq!(client.calls(20, with("x-name", "bob")).servers(), ["v2"]);
    assert_eq!(client.calls(20, json!({"metadata": {"x-name": "bob", "x-not": "1"}})).servers(), ["v1"]);
    // Not for a value: without the header, or with another.
    assert_eq!(client.calls(20, with("x-other", "1")).servers(), ["v2"]);
    for (kind, to) in [("plain", "v1"), ("fancy", "v2")] {
        let t = client.calls(20, json!({"metadata": {"x-other": "1", "x-kind": kind}}));
        assert_eq!(t.servers(), [to], "{kind}");
    }

    // Weights, and a change of them that no call notices.
    c.write("routes.yaml", &weights(80, 20));
    client.until("weights", 100, &json!({}), |t| t.by("v2") > 0 && t.failed() == 0);
    let t = client.hello(2_000);
    assert_eq!(t.failed(), 0, "{t:?}");
    assert!(is_share(t.by("v2"), 2_000, 0.2), "{t:?}");
    let mut load = Client::start(&c, "load", &boot, TARGET, false);
    load.begin(json!({}));
    for (v1, v2) in [(20, 80), (0, 100), (100, 0), (20, 80)] {
        c.write("routes.yaml", &weights(v1, v2));
        let wanted = f64::from(v2) / 100.0;
        client
            .until("other weights", 200, &json!({}), |t| is_share(t.by("v2"), 200, wanted.clamp(0.01, 0.99)));
    }
    let t = load.end();
    assert_eq!(t.failed(), 0, "{t:?}");
    assert!(t.of("OK") > 500 && t.by("v1") > 0 && t.by("v2") > 0, "{t:?}");
    let t = client.hello(1_000);
    assert!(t.failed() == 0 && is_share(t.by("v2"), 1_000, 0.8), "{t:?}");

    // One that hashes a header: a user stays, users spread.
    c.write(
        "routes.yaml",
        &routes("  - route: [{destination: {host: greeter}}]\n    mirror: {host: greeter}\n"),
    );
    c.write("rule.yaml", &rule("{loadBalancer: {consistentHash: {httpHeaderName: x-user}}}"));
    client.until("hashing", 30, &with("x-user", "anna"), |t| t.failed() == 0 && t.served.len() == 1);
    let servers: std::collections::BTreeSet<String> = (0..20)
        .map(|i| {
            let t = client.calls(5, with("x-user", &format!("user-{i}")));
            assert_eq!(t.servers().len(), 1, "{t:?}");
            t.servers()[0].to_owned()
        })
        .collect();
    assert_eq!(servers.len(), 2);
    // What was left out is told.
    let said = stage::problems(&c);
    assert!(said.contains("VirtualService books/greeter") && said.contains("mirroring"), "{said}");
    nothing_refused(&c, 2);
}

#[test]
#[ignore = "needs the flotilla binary and grpcio; cargo verify builds and installs them"]
fn failures_are_retried_injected_and_bounded() {
    let c = cluster();
    let (a, b) = (c.workload(11), c.workload(12));
    c.write("greeter.yaml", &greeter(&[("greeter-v1", a, V1)]));
    let _servers = [server(&c, "v1", a, None), server(&c, "v2-broken", b, None)];
    let boot = bootstrap(&c, "client", c.workload(1), json!({"app": "client"}));
    let mut client = Client::start(&c, "client", &boot, TARGET, false);
    client.until("calls", 10, &json!({}), |t| t.failed() == 0);
    let to = "    route: [{destination: {host: greeter}}]\n";
    let match_all = |more: &str| routes(&format!("  - name: all\n{to}{more}"));
    let flaky =
        |key: &str, fail: &str| json!({"method": "Flaky", "metadata": {"x-key": key, "x-fail": fail}});

    // Retries: as many as the document says, on what it says.
    c.write("routes.yaml", &match_all("    retries: {attempts: 3, retryOn: unavailable, backoff: 10ms}\n"));
    let mut n = 0;
    support::until("retries", || {
        n += 1;
        let t = client.calls(1, flaky(&format!("three-{n}"), "3"));
        if t.by("v1 4") == 1 { Ok(()) } else { Err(format!("{t:?}")) }
    });
    let t = client.calls(1, flaky("four", "4"));
    assert_eq!((t.of("UNAVAILABLE"), t.error.as_str()), (1, "try 4"), "{t:?}");
    c.write("routes.yaml", &match_all("    retries: {attempts: 0}\n"));
    support::until("no retries", || {
        n += 1;
        let t = client.calls(1, flaky(&format!("none-{n}"), "1"));
        if t.error == "try 1" { Ok(()) } else { Err(format!("{t:?}")) }
    });

    // Faults: statuses of gRPC, statuses of HTTP as gRPC has them, and delays.
    let only = |header: &str, fault: &str| {
        format!("  - match: [{{headers: {{x-fault: {{exact: {header}}}}}}}]\n{to}    fault: {fault}\n")
    };
    c.write(
        "routes.yaml",
        &routes(
            &[
                only("grpc", "{abort: {percentage: {value: 100}, grpcStatus: RESOURCE_EXHAUSTED}}"),
                only("http", "{abort: {percentage: {value: 100}, httpStatus: 404}}"),
                only("half", "{abort: {percentage: {value: 50}, grpcStatus: DATA_LOSS}}"),
                only("delay", "{delay: {percentage: {value: 100}, fixedDelay: 1s}}"),
                format!("  - name: rest\n{to}    timeout: 4s\n"),
            ]
            .concat(),
        ),
    );
    let fault = |kind: &str| json!({"metadata": {"x-fault": kind}});
    let t = client.until("faults", 10, &fault("grpc"), |t| t.failed() == 10);
    assert_eq!(t.of("RESOURCE_EXHAUSTED"), 10, "{t:?}");
    assert_eq!(client.calls(5, fault("http")).of("UNIMPLEMENTED"), 5);
    let t = client.calls(400, fault("half"));
    assert!(is_share(t.of("DATA_LOSS"), 400, 0.5) && t.of("OK") + t.of("DATA_LOSS") == 400, "{t:?}");
    let t = client.calls(2, fault("delay"));
    assert!(t.of("OK") == 2 && t.seconds >= 2.0, "{t:?}");
    let t = client.hello(20);
    assert!(t.failed() == 0 && t.seconds < 1.0, "without the header nothing happens: {t:?}");

    // A timeout of the document, below the caller's own. grpcio counts a second or two of its own (grpc/grpc#34547), so a
    // short one would be over at once.
    let t = client.calls(1, json!({"method": "Slow", "metadata": {"x-seconds": "8"}, "timeout": 30}));
    assert!(t.of("DEADLINE_EXCEEDED") == 1 && (1.0..5.0).contains(&t.seconds), "{t:?}");

    // A limit of calls at once.
    c.write("routes.yaml", &match_all(""));
    c.write("rule.yaml", &rule("{connectionPool: {http: {http2MaxRequests: 2}}}"));
    let slow = json!({"method": "Slow", "metadata": {"x-seconds": "0.5"}, "parallel": 8});
    let t = client.until("a limit", 8, &slow, |t| t.of("UNAVAILABLE") > 0);
    assert_eq!((t.of("OK"), t.of("UNAVAILABLE")), (2, 6), "{t:?}");

    // A server whose calls all fail is left alone.
    c.write(
        "rule.yaml",
        &rule("{outlierDetection: {consecutive5xxErrors: 5, interval: 1s, baseEjectionTime: 60s, maxEjectionPercent: 50}}"),
    );
    c.write("greeter.yaml", &greeter(&[("greeter-v1", a, V1), ("greeter-v2", b, V2)]));
    c.write("routes.yaml", &match_all("    retries: {attempts: 0}\n"));
    let bad = json!({"method": "Bad"});
    client.until("failures of one of two", 40, &bad, |t| (10..=30).contains(&t.failed()));
    client.until("its ejection", 40, &bad, |t| t.failed() == 0 && t.by("v1") == 40);
    nothing_refused(&c, 1);
}

#[test]
#[ignore = "needs the flotilla binary and grpcio; cargo verify builds and installs them"]
fn endpoints_come_and_go_without_a_failed_call() {
    let c = cluster();
    let (a, b, d) = (c.workload(11), c.workload(12), c.workload(13));
    let (first, second, third) =
        (("greeter-v1", a, V1), ("greeter-v2", b, V2), ("greeter-v3", d, ", version: v3"));
    c.write("greeter.yaml", &greeter(&[first, second]));
    let one = server(&c, "v1", a, None);
    let _two = server(&c, "v2", b, None);
    let boot = bootstrap(&c, "client", c.workload(1), json!({"app": "client"}));
    let mut client = Client::start(&c, "client", &boot, TARGET, false);
    let mut load = Client::start(&c, "load", &boot, TARGET, false);
    client.until("two servers", 40, &json!({}), |t| t.failed() == 0 && t.served.len() == 2);
    load.until("two servers", 40, &json!({}), |t| t.failed() == 0 && t.served.len() == 2);

    // One comes, and one is taken out before it ends.
    load.begin(json!({}));
    let _three = server(&c, "v3", d, None);
    c.write("greeter.yaml", &greeter(&[first, second, third]));
    client.until("the third", 60, &json!({}), |t| t.by("v3") > 0);
    c.write("greeter.yaml", &greeter(&[second, third]));
    client.until("two again", 60, &json!({}), |t| t.failed() == 0 && t.by("v1") == 0);
    let t = load.end();
    assert!(t.failed() == 0 && t.by("v3") > 0 && t.by("v1") > 0, "{t:?}");
    // What had been begun before the change has ended by now.
    let settled = load.hello(200);
    assert_eq!(settled.servers(), ["v2", "v3"]);
    drop(one);
    let t = load.hello(200);
    assert_eq!(t.servers(), ["v2", "v3"]);

    // One dies, and then the registry says so: once that has settled nothing fails.
    drop(_two);
    c.write("greeter.yaml", &greeter(&[third]));
    client.until("one alone", 40, &json!({}), |t| t.failed() == 0 && t.by("v3") == 40);
    assert_eq!(client.hello(500).servers(), ["v3"]);

    // None is left: calls fail at once, with what happened, and the next server ends that.
    c.write("greeter.yaml", &greeter(&[]));
    let t = client.until("nobody", 1, &json!({"timeout": 5}), |t| t.failed() == 1);
    assert!(t.of("UNAVAILABLE") == 1 && t.seconds < 3.0, "{t:?}");
    c.write("greeter.yaml", &greeter(&[third]));
    client.until("somebody", 20, &json!({}), |t| t.failed() == 0);
    nothing_refused(&c, 2);
}

/// A policy of the namespace for the service's workloads.
fn policy(action: &str, rules: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: greeter, namespace: books}}\nspec:\n  \
         selector: {{matchLabels: {{app: greeter}}}}\n  action: {action}\n  rules: {rules}\n"
    )
}

fn mtls(mode: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: books}}\nspec: \
         {{mtls: {{mode: {mode}}}}}\n"
    )
}

#[test]
#[ignore = "needs the flotilla binary and grpcio; cargo verify builds and installs them"]
fn identities_and_policies_hold_without_a_proxy() {
    let mut c = cluster();
    let (ip, friend_ip, stranger_ip) = (c.workload(11), c.workload(1), c.workload(2));
    let in_mesh = support::IN_MESH;
    c.write("greeter.yaml", &greeter(&[("greeter", ip, in_mesh)]));
    c.write("mtls.yaml", &mtls("STRICT"));
    // xDS over mutual TLS, with the files that the agent keeps.
    let server_boot = c.grpc_agent("greeter", ip, "app=greeter,security.istio.io/tlsMode=istio");
    let friend_boot = c.grpc_agent("friend", friend_ip, "app=friend");
    let stranger_boot = c.grpc_agent("stranger", stranger_ip, "app=stranger");
    let _server = server(&c, "v1", ip, Some(&server_boot));
    let mut friend = Client::start(&c, "friend-client", &friend_boot, TARGET, true);
    let mut stranger = Client::start(&c, "stranger-client", &stranger_boot, TARGET, true);
    let as_friend = "v1 spiffe://mesh.local/ns/books/sa/friend";
    let as_stranger = "v1 spiffe://mesh.local/ns/books/sa/stranger";
    let short = json!({"timeout": 3});

    // The server knows the caller by its certificate, and takes nobody without one.
    friend.until("a call", 1, &short, |t| t.by(as_friend) == 1);
    stranger.until("a call", 1, &short, |t| t.by(as_stranger) == 1);
    // A caller with a sidecar is one like any other.
    let web = c.workload(3);
    c.sidecar("web", web, None);
    c.ready(web);
    let mut through = Client::through(&c, web);
    through.until("a call through a sidecar", 1, &short, |t| {
        t.by("v1 spiffe://mesh.local/ns/books/sa/web") == 1
    });
    let mut plain = Client::plain(&c, (ip, PORT).into());
    let t = plain.calls(2, short.clone());
    assert_eq!(t.of("UNAVAILABLE"), 2, "{t:?}");
    // The same library with the same configuration, if the application does not want credentials of xDS.
    let mut careless = Client::start(&c, "careless", &friend_boot, TARGET, false);
    let t = careless.calls(2, short.clone());
    assert_eq!(t.of("UNAVAILABLE"), 2, "{t:?}");
    drop(careless);

    // The client takes no server but one with the service's identity.
    let other = |account: &str| {
        rule(&format!(
            "{{tls: {{mode: ISTIO_MUTUAL, subjectAltNames: ['spiffe://mesh.local/ns/books/sa/{account}']}}}}"
        ))
    };
    c.write("rule.yaml", &other("somebody"));
    let t = friend.until("another identity", 1, &short, |t| t.failed() == 1);
    assert_eq!(t.of("UNAVAILABLE"), 1, "{t:?}");
    c.write("rule.yaml", &other("greeter"));
    friend.until("the identity", 1, &short, |t| t.by(as_friend) == 1);
    stranger.until("the identity", 1, &short, |t| t.by(as_stranger) == 1);

    // Policies, in the server itself.
    let denied = |t: &stage::Tally| t.of("PERMISSION_DENIED") == 1;
    c.write(
        "policy.yaml",
        &policy("DENY", "[{from: [{source: {principals: [mesh.local/ns/books/sa/stranger]}}]}]"),
    );
    stranger.until("DENY", 1, &short, denied);
    assert_eq!(friend.calls(20, short.clone()).by(as_friend), 20);
    c.write("policy.yaml", &policy("DENY", "[{to: [{operation: {paths: [/greeter.Greeter/Other]}}]}]"));
    let method = json!({"method": "Other", "timeout": 3});
    friend.until("DENY of a method", 1, &method, denied);
    stranger.until("DENY of a method alone", 1, &short, |t| t.by(as_stranger) == 1);
    c.write(
        "policy.yaml",
        &policy(
            "ALLOW",
            "[{from: [{source: {principals: [mesh.local/ns/books/sa/friend]}}], when: [{key: 'request.headers[x-pass]', \
             values: [please]}]}]",
        ),
    );
    stranger.until("ALLOW of others", 1, &short, denied);
    let please = json!({"timeout": 3, "metadata": {"x-pass": "please"}});
    friend.until("ALLOW", 1, &please, |t| t.by(as_friend) == 1);
    assert!(denied(&friend.calls(1, short.clone())) && denied(&stranger.calls(1, please)));
    // Tokens are not looked at, so nobody has one.
    c.write("policy.yaml", &policy("ALLOW", "[{from: [{source: {requestPrincipals: ['*']}}]}]"));
    friend.until("ALLOW of tokens", 1, &json!({"timeout": 3, "metadata": {"x-pass": "please"}}), denied);
    c.remove("policy.yaml");
    friend.until("no policy", 1, &short, |t| t.by(as_friend) == 1);

    // In clear where the mesh says so, and no longer when it does not.
    c.write("rule.yaml", &rule("{tls: {mode: DISABLE}}"));
    friend.until("clear text, STRICT", 1, &short, |t| t.of("UNAVAILABLE") == 1);
    c.write("mtls.yaml", &mtls("DISABLE"));
    plain.until("clear text", 1, &short, |t| t.by("v1") == 1);
    friend.until("clear text", 1, &short, |t| t.by("v1") == 1);
    c.write("mtls.yaml", &mtls("STRICT"));
    plain.until("clear text, STRICT", 1, &short, |t| t.of("UNAVAILABLE") == 1);
    friend.until("clear text, STRICT", 1, &short, |t| t.of("UNAVAILABLE") == 1);
    // Each library, each agent, and the sidecar.
    nothing_refused(&c, 7);
}

#[test]
#[ignore = "needs the flotilla binary and grpcio; cargo verify builds and installs them"]
fn a_sidecar_and_a_library_understand_each_other() {
    let mut c = cluster();
    let (ip, app, client_ip) = (c.workload(11), c.workload(111), c.workload(1));
    c.write("greeter.yaml", &greeter(&[("greeter", ip, support::IN_MESH)]));
    c.write("mtls.yaml", &mtls("STRICT"));
    c.write(
        "policy.yaml",
        &policy("ALLOW", "[{from: [{source: {principals: [mesh.local/ns/books/sa/friend]}}]}]"),
    );
    let _server = server(&c, "v1", app, None);
    c.sidecar_of("greeter", ip, PORT, (app, PORT).into());
    c.ready(ip);
    let boot = c.grpc_agent("friend", client_ip, "app=friend");
    let stranger = c.grpc_agent("stranger", c.workload(2), "app=stranger");
    let mut friend = Client::start(&c, "friend-client", &boot, TARGET, true);
    friend.until("a call", 20, &json!({"timeout": 3}), |t| t.by("v1") == 20);
    let mut stranger = Client::start(&c, "stranger-client", &stranger, TARGET, true);
    stranger.until("a refusal", 1, &json!({"timeout": 3}), |t| t.of("PERMISSION_DENIED") == 1);
}

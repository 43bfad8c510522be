//! VirtualService.

use serde_json::{Value, json};

use crate::{Base, Row, View, from, get, refused, row, support::bookinfo, with_headers};

const X: &str = "GET http://reviews:9080/x";

fn document(spec: Value) -> Value {
    json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
           "metadata": {"name": "vs", "namespace": "default"}, "spec": spec})
}

fn v1() -> Value {
    json!({"destination": {"host": "reviews", "subset": "v1"}})
}

fn v2() -> Value {
    json!({"destination": {"host": "reviews", "subset": "v2"}})
}

/// Everything goes to v1.
fn plain() -> Base {
    Base::new(bookinfo().with(document(json!({"hosts": ["reviews"], "http": [{"route": [v1()]}]}))))
}

/// What matches goes to v2, the rest to v1.
fn matching() -> Base {
    Base::new(bookinfo().with(document(json!({
        "hosts": ["reviews"], "http": [{"match": [{"uri": {"prefix": "/"}}], "route": [v2()]}, {"route": [v1()]}]
    }))))
}

fn split(one: u32, two: u32) -> Value {
    json!([{"destination": v1()["destination"], "weight": one}, {"destination": v2()["destination"], "weight": two}])
}

fn is_v1() -> Value {
    json!({"subset": "v1"})
}

fn is_v2() -> Value {
    json!({"subset": "v2"})
}

pub(crate) fn rows() -> Vec<Row> {
    let mut all = selection();
    all.extend(matches());
    all.extend(answers());
    all.extend(forwarding());
    all.extend(bytes());
    all
}

fn selection() -> Vec<Row> {
    let p = plain();
    vec![
        row("VirtualService.hosts", &p, "/spec/hosts", json!(["reviews"]), get(X), is_v1())
            .instead_of(json!(["ratings"])),
        row("VirtualService.gateways", &p, "/spec/gateways", json!(["mesh", "edge"]), get(X), is_v1())
            .instead_of(json!(["edge"])),
        row(
            "VirtualService.exportTo",
            &p,
            "/spec/exportTo",
            json!(["."]),
            from("other/app", "GET http://reviews.default:9080/"),
            json!({"subset": ""}),
        ),
        row(
            "VirtualService.http[].name",
            &p,
            "/spec/http/0/name",
            json!("all"),
            get(X),
            json!({"route": "all"}),
        ),
        row(
            "VirtualService.http[].delegate.name",
            &delegating(),
            "/spec/http/0/delegate/name",
            json!("part"),
            get(X),
            is_v2(),
        )
        .instead_of(json!("nobody")),
        row(
            "VirtualService.http[].delegate.namespace",
            &delegating(),
            "/spec/http/0/delegate/namespace",
            json!("default"),
            get(X),
            is_v2(),
        )
        .instead_of(json!("other")),
    ]
}

fn delegating() -> Base {
    let part = json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
        "metadata": {"name": "part", "namespace": "default"}, "spec": {"http": [{"route": [v2()]}]}});
    let root = document(
        json!({"hosts": ["reviews"], "http": [{"delegate": {"name": "part", "namespace": "default"}}]}),
    );
    Base::new(bookinfo().with(part).with(root))
}

fn matches() -> Vec<Row> {
    let m = matching();
    let at = |field, pointer, value, view| row(field, &m, pointer, value, view, is_v1());
    vec![
        at(
            "VirtualService.http[].match[].uri",
            "/spec/http/0/match/0/uri",
            json!({"exact": "/other"}),
            get(X),
        ),
        at(
            "VirtualService.http[].match[].scheme",
            "/spec/http/0/match/0/scheme",
            json!({"exact": "https"}),
            get(X),
        ),
        at(
            "VirtualService.http[].match[].method",
            "/spec/http/0/match/0/method",
            json!({"exact": "POST"}),
            get(X),
        ),
        at(
            "VirtualService.http[].match[].authority",
            "/spec/http/0/match/0/authority",
            json!({"prefix": "other"}),
            get(X),
        ),
        at(
            "VirtualService.http[].match[].headers",
            "/spec/http/0/match/0/headers",
            json!({"a": {"exact": "1"}}),
            with_headers(X, &["a: 2"]),
        ),
        at(
            "VirtualService.http[].match[].withoutHeaders",
            "/spec/http/0/match/0/withoutHeaders",
            json!({"a": {"exact": "2"}}),
            with_headers(X, &["a: 2"]),
        ),
        at(
            "VirtualService.http[].match[].queryParams",
            "/spec/http/0/match/0/queryParams",
            json!({"q": {"exact": "1"}}),
            get("GET http://reviews:9080/x?q=2"),
        ),
        at("VirtualService.http[].match[].port", "/spec/http/0/match/0/port", json!(80), get(X)),
        at(
            "VirtualService.http[].match[].sourceLabels",
            "/spec/http/0/match/0/sourceLabels",
            json!({"app": "other"}),
            get(X),
        ),
        at(
            "VirtualService.http[].match[].sourceNamespace",
            "/spec/http/0/match/0/sourceNamespace",
            json!("other"),
            get(X),
        ),
        at(
            "VirtualService.http[].match[].gateways",
            "/spec/http/0/match/0/gateways",
            json!(["edge"]),
            get(X),
        ),
        row(
            "VirtualService.http[].match[].name",
            &m.and("/spec/http/0/name", json!("r")),
            "/spec/http/0/match/0/name",
            json!("m"),
            get(X),
            json!({"route": "r.m"}),
        ),
        row(
            "VirtualService.http[].match[].ignoreUriCase",
            &m.and("/spec/http/0/match/0/uri", json!({"exact": "/X"})),
            "/spec/http/0/match/0/ignoreUriCase",
            json!(true),
            get(X),
            is_v2(),
        ),
        row(
            "VirtualService.http[].match[].statPrefix",
            &m,
            "/spec/http/0/match/0/statPrefix",
            json!("s"),
            View::Config { from: "default/productpage-v1" },
            json!({"routes": {"9080": {"virtual_hosts": {"reviews.default.svc.cluster.local:9080": {"routes": [
                {"filters": {"stat_prefix": "s"}}]}}}}}),
        ),
    ]
}

fn answers() -> Vec<Row> {
    let redirect = |r: Value| {
        Base::new(bookinfo().with(document(json!({"hosts": ["reviews"], "http": [{"redirect": r}]}))))
    };
    let to = |l: &str| json!({"action": "redirect", "location": l});
    let direct = Base::new(
        bookinfo()
            .with(document(json!({"hosts": ["reviews"], "http": [{"directResponse": {"status": 200}}]}))),
    );
    let routes = View::Config { from: "default/productpage-v1" };
    let fault = |f: Value| plain().and("/spec/http/0/fault", f);
    let abort = |n: Value| json!({"fault": {"abort": n}});
    vec![
        row(
            "VirtualService.http[].redirect.uri",
            &redirect(json!({"authority": "a"})),
            "/spec/http/0/redirect/uri",
            json!("/n"),
            get(X),
            to("http://a/n"),
        ),
        row(
            "VirtualService.http[].redirect.prefixRewrite",
            &redirect(json!({"authority": "a"})),
            "/spec/http/0/redirect/prefixRewrite",
            json!("/p"),
            get(X),
            to("http://a/px"),
        ),
        row(
            "VirtualService.http[].redirect.authority",
            &redirect(json!({"uri": "/n"})),
            "/spec/http/0/redirect/authority",
            json!("a"),
            get(X),
            to("http://a/n"),
        ),
        row(
            "VirtualService.http[].redirect.scheme",
            &redirect(json!({"authority": "a"})),
            "/spec/http/0/redirect/scheme",
            json!("https"),
            get(X),
            to("https://a/x"),
        ),
        row(
            "VirtualService.http[].redirect.port",
            &redirect(json!({"uri": "/n"})),
            "/spec/http/0/redirect/port",
            json!(8443),
            get(X),
            to("http://reviews:8443/n"),
        ),
        row(
            "VirtualService.http[].redirect.derivePort",
            &redirect(json!({"scheme": "https", "uri": "/n"})),
            "/spec/http/0/redirect/derivePort",
            json!("FROM_PROTOCOL_DEFAULT"),
            get(X),
            to("https://reviews:443/n"),
        ),
        row(
            "VirtualService.http[].redirect.redirectCode",
            &redirect(json!({"uri": "/n"})),
            "/spec/http/0/redirect/redirectCode",
            json!(308),
            get(X),
            json!({"status": 308}),
        ),
        row(
            "VirtualService.http[].directResponse.status",
            &direct,
            "/spec/http/0/directResponse/status",
            json!(418),
            get(X),
            json!({"action": "direct-response", "status": 418}),
        )
        .instead_of(json!(200)),
        row(
            "VirtualService.http[].directResponse.body.string",
            &direct,
            "/spec/http/0/directResponse/body/string",
            json!("t"),
            routes.clone(),
            body(b"t"),
        ),
        row(
            "VirtualService.http[].directResponse.body.bytes",
            &direct,
            "/spec/http/0/directResponse/body/bytes",
            json!("dA=="),
            routes,
            body(b"t"),
        ),
        row(
            "VirtualService.http[].fault.abort.httpStatus",
            &fault(json!({"abort": {"httpStatus": 500, "percentage": {"value": 100}}})),
            "/spec/http/0/fault/abort/httpStatus",
            json!(555),
            get(X),
            json!({"status": 555, "action": "direct-response"}),
        )
        .instead_of(json!(500)),
        row(
            "VirtualService.http[].fault.abort.grpcStatus",
            &plain().and("/spec/http/0/fault/abort/percentage/value", json!(100)),
            "/spec/http/0/fault/abort/grpcStatus",
            json!("UNAVAILABLE"),
            get(X),
            json!({"status": 503}),
        )
        .instead_of(json!("PERMISSION_DENIED")),
        refused(
            "VirtualService.http[].fault.abort.http2Error",
            &plain(),
            "/spec/http/0/fault/abort",
            json!({"http2Error": "x"}),
            "http2Error",
        ),
        refused(
            "VirtualService.http[].fault.delay.exponentialDelay",
            &plain(),
            "/spec/http/0/fault/delay",
            json!({"exponentialDelay": "1s"}),
            "exponentialDelay",
        ),
        row(
            "VirtualService.http[].fault.abort.percentage",
            &fault(json!({"abort": {"httpStatus": 500}})),
            "/spec/http/0/fault/abort/percentage/value",
            json!(12.5),
            get(X),
            abort(json!({"value": 500, "percentage": 12.5})),
        ),
        row(
            "VirtualService.http[].fault.abort.percent",
            &fault(json!({"abort": {"httpStatus": 500}})),
            "/spec/http/0/fault/abort/percent",
            json!(12),
            get(X),
            abort(json!({"value": 500, "percentage": 12.0})),
        ),
        row(
            "VirtualService.http[].fault.delay.fixedDelay",
            &fault(json!({"delay": {"fixedDelay": "1s", "percentage": {"value": 10}}})),
            "/spec/http/0/fault/delay/fixedDelay",
            json!("7s"),
            get(X),
            json!({"fault": {"delay": {"value": "7s"}}}),
        )
        .instead_of(json!("1s")),
        row(
            "VirtualService.http[].fault.delay.percentage.value",
            &fault(json!({"delay": {"fixedDelay": "1s"}})),
            "/spec/http/0/fault/delay/percentage/value",
            json!(0.1),
            get(X),
            json!({"fault": {"delay": {"percentage": 0.1}}}),
        ),
        row(
            "VirtualService.http[].fault.delay.percent",
            &fault(json!({"delay": {"fixedDelay": "1s"}})),
            "/spec/http/0/fault/delay/percent",
            json!(3),
            get(X),
            json!({"fault": {"delay": {"percentage": 3.0}}}),
        ),
    ]
}

fn body(b: &[u8]) -> Value {
    json!({"routes": {"9080": {"virtual_hosts": {"reviews.default.svc.cluster.local:9080": {"routes": [
        {"action": {"Direct": {"body": b}}}]}}}}})
}

fn forwarding() -> Vec<Row> {
    let p = plain();
    let to = "/spec/http/0/route/0/destination/port/number";
    let two_ports = Base::new(
        bookinfo()
            .with(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "two", "namespace": "default"},
                "spec": {"clusterIP": "10.96.0.8", "selector": {"app": "reviews"},
                         "ports": [{"name": "http", "port": 9080}, {"name": "http-b", "port": 81}]}}))
            .with(document(json!({"hosts": ["reviews"], "http": [{"route": [{"destination": {"host": "two", "port": {"number": 9080}}}]}]}))),
    );
    let headers = |h: Value| json!({"headers": h});
    let upstream = |u: Value| json!({"upstream": u});
    let rewrite = |r: Value| plain().and("/spec/http/0/rewrite", r);
    let mirror = json!({"mirrors": [{"cluster": "outbound|9080||ratings.default.svc.cluster.local", "percentage": 100.0}]});
    let share = |n: f64| json!({"mirrors": [{"percentage": n}]});
    let mirrored = plain().and("/spec/http/0/mirror", json!({"host": "ratings"}));
    let retries = plain().and("/spec/http/0/retries", json!({"attempts": 5}));
    let cors =
        plain().and("/spec/http/0/corsPolicy", json!({"allowOrigins": [{"exact": "https://a.example"}]}));
    let preflight = || {
        with_headers(
            "OPTIONS http://reviews:9080/x",
            &["origin: https://a.example", "access-control-request-method: GET"],
        )
    };
    let answered = |n: &str, v: &str| json!({"action": "direct-response", "responseHeaders": {n: v}});
    let simple = || with_headers(X, &["origin: https://a.example"]);
    let origin = json!({"responseHeaders": {"access-control-allow-origin": "https://a.example"}});
    let config = View::Config { from: "default/productpage-v1" };
    let retry = |r: Value| {
        json!({"routes": {"9080": {"virtual_hosts": {"reviews.default.svc.cluster.local:9080": {"routes": [
        {"action": {"Forward": {"retry": r}}}]}}}}})
    };
    vec![
        row(
            "VirtualService.http[].route[].destination.host",
            &p,
            "/spec/http/0/route/0/destination",
            json!({"host": "ratings"}),
            get(X),
            json!({"cluster": "outbound|9080||ratings.default.svc.cluster.local"}),
        )
        .instead_of(json!({"host": "reviews"})),
        row(
            "VirtualService.http[].route[].destination.subset",
            &p,
            "/spec/http/0/route/0/destination/subset",
            json!("v3"),
            get(X),
            json!({"subset": "v3"}),
        )
        .instead_of(json!("v1")),
        row(
            "VirtualService.http[].route[].destination.port.number",
            &two_ports,
            to,
            json!(81),
            get(X),
            json!({"cluster": "outbound|81||two.default.svc.cluster.local"}),
        )
        .instead_of(json!(9080)),
        row(
            "VirtualService.http[].route[].weight",
            &p,
            "/spec/http/0/route",
            split(25, 75),
            get(X),
            json!({"weights": [{"weight": 25}, {"weight": 75}], "subset": "v2"}),
        )
        .instead_of(split(60, 40)),
        row(
            "VirtualService.http[].route[].headers.request.set",
            &p,
            "/spec/http/0/route/0/headers/request/set",
            json!({"a": "1"}),
            get(X),
            headers(json!({"a": "1"})),
        ),
        row(
            "VirtualService.http[].route[].headers.request.add",
            &p,
            "/spec/http/0/route/0/headers/request/add",
            json!({"a": "1"}),
            with_headers(X, &["a: 0"]),
            headers(json!({"a": "0,1"})),
        ),
        row(
            "VirtualService.http[].route[].headers.request.remove",
            &p,
            "/spec/http/0/route/0/headers/request/remove",
            json!(["a"]),
            with_headers(X, &["a: 0"]),
            headers(json!({"a": null})),
        ),
        row(
            "VirtualService.http[].route[].headers.response",
            &p,
            "/spec/http/0/route/0/headers/response/set",
            json!({"a": "1"}),
            get(X),
            json!({"responseHeaders": {"a": "1"}}),
        ),
        row(
            "VirtualService.http[].headers",
            &p,
            "/spec/http/0/headers",
            json!({"request": {"set": {"a": "1"}}, "response": {"add": {"b": "2"}}}),
            get(X),
            json!({"headers": {"a": "1"}, "responseHeaders": {"b": "2"}}),
        ),
        row(
            "VirtualService.http[].appendHeaders",
            &p,
            "/spec/http/0/appendHeaders",
            json!({"a": "1"}),
            get(X),
            headers(json!({"a": "1"})),
        ),
        row(
            "VirtualService.http[].removeResponseHeaders",
            &p,
            "/spec/http/0/removeResponseHeaders",
            json!({"a": ""}),
            View::Config { from: "default/productpage-v1" },
            json!({"routes": {"9080": {"virtual_hosts": {"reviews.default.svc.cluster.local:9080": {"routes": [
                {"response_headers": {"remove": ["a"]}}]}}}}}),
        ),
        refused(
            "VirtualService.http[].route[].destination.port.name",
            &p,
            "/spec/http/0/route/0/destination/port",
            json!({"name": "http"}),
            "selected by number, not by name",
        ),
        row(
            "VirtualService.http[].timeout",
            &p,
            "/spec/http/0/timeout",
            json!("3s"),
            get(X),
            json!({"timeout": "3s"}),
        ),
        row(
            "VirtualService.http[].retries.attempts",
            &p,
            "/spec/http/0/retries/attempts",
            json!(7),
            get(X),
            json!({"retries": {"attempts": 7}}),
        ),
        row(
            "VirtualService.http[].retries.perTryTimeout",
            &retries,
            "/spec/http/0/retries/perTryTimeout",
            json!("2s"),
            get(X),
            json!({"retries": {"perTryTimeout": "2s"}}),
        ),
        row(
            "VirtualService.http[].retries.retryOn",
            &retries,
            "/spec/http/0/retries/retryOn",
            json!("5xx,418"),
            get(X),
            json!({"retries": {"retryOn": "5xx,retriable-status-codes,418"}}),
        ),
        row(
            "VirtualService.http[].retries.backoff",
            &retries,
            "/spec/http/0/retries/backoff",
            json!("0.1s"),
            config.clone(),
            retry(json!({"base_interval": {"secs": 0, "nanos": 100_000_000}})),
        ),
        row(
            "VirtualService.http[].retries.retryIgnorePreviousHosts",
            &retries,
            "/spec/http/0/retries/retryIgnorePreviousHosts",
            json!(false),
            config.clone(),
            retry(json!({"host_selection_attempts": 0})),
        ),
        row(
            "VirtualService.http[].retries.retryRemoteLocalities",
            &retries,
            "/spec/http/0/retries/retryRemoteLocalities",
            json!(true),
            config,
            retry(json!({"leave_priorities": 2})),
        ),
        row(
            "VirtualService.http[].rewrite.uri",
            &p,
            "/spec/http/0/rewrite/uri",
            json!("/y"),
            get(X),
            upstream(json!({"path": "/yx"})),
        ),
        row(
            "VirtualService.http[].rewrite.authority",
            &p,
            "/spec/http/0/rewrite/authority",
            json!("a"),
            get(X),
            upstream(json!({"authority": "a"})),
        ),
        row(
            "VirtualService.http[].rewrite.uriRegexRewrite.match",
            &rewrite(json!({"uriRegexRewrite": {"match": "/nope", "rewrite": "/y"}})),
            "/spec/http/0/rewrite/uriRegexRewrite/match",
            json!("^/x$"),
            get(X),
            upstream(json!({"path": "/y"})),
        )
        .instead_of(json!("/nope")),
        row(
            "VirtualService.http[].rewrite.uriRegexRewrite.rewrite",
            &rewrite(json!({"uriRegexRewrite": {"match": "^/(x)$", "rewrite": "/y"}})),
            "/spec/http/0/rewrite/uriRegexRewrite/rewrite",
            json!("/z\\1"),
            get(X),
            upstream(json!({"path": "/zx"})),
        )
        .instead_of(json!("/y")),
        row(
            "VirtualService.http[].mirror",
            &p,
            "/spec/http/0/mirror",
            json!({"host": "ratings"}),
            get(X),
            mirror.clone(),
        ),
        row(
            "VirtualService.http[].mirrorPercent",
            &mirrored,
            "/spec/http/0/mirrorPercent",
            json!(20),
            get(X),
            share(20.0),
        ),
        row(
            "VirtualService.http[].mirrorPercentage",
            &mirrored,
            "/spec/http/0/mirrorPercentage/value",
            json!(0.5),
            get(X),
            share(0.5),
        ),
        row(
            "VirtualService.http[].mirrors[].destination",
            &p,
            "/spec/http/0/mirrors",
            json!([{"destination": {"host": "ratings"}}]),
            get(X),
            mirror,
        ),
        row(
            "VirtualService.http[].mirrors[].percentage",
            &p.and("/spec/http/0/mirrors", json!([{"destination": {"host": "ratings"}}])),
            "/spec/http/0/mirrors/0/percentage/value",
            json!(5),
            get(X),
            share(5.0),
        ),
        row(
            "VirtualService.http[].corsPolicy.allowOrigins[]",
            &p,
            "/spec/http/0/corsPolicy/allowOrigins",
            json!([{"prefix": "https://a"}]),
            simple(),
            origin.clone(),
        ),
        row(
            "VirtualService.http[].corsPolicy.allowOrigin",
            &p,
            "/spec/http/0/corsPolicy/allowOrigin",
            json!(["https://a.example"]),
            simple(),
            origin,
        ),
        row(
            "VirtualService.http[].corsPolicy.allowMethods",
            &cors,
            "/spec/http/0/corsPolicy/allowMethods",
            json!(["PUT", "GET"]),
            preflight(),
            answered("access-control-allow-methods", "PUT,GET"),
        ),
        row(
            "VirtualService.http[].corsPolicy.allowHeaders",
            &cors,
            "/spec/http/0/corsPolicy/allowHeaders",
            json!(["x-a"]),
            preflight(),
            answered("access-control-allow-headers", "x-a"),
        ),
        row(
            "VirtualService.http[].corsPolicy.maxAge",
            &cors,
            "/spec/http/0/corsPolicy/maxAge",
            json!("24h"),
            preflight(),
            answered("access-control-max-age", "86400"),
        ),
        row(
            "VirtualService.http[].corsPolicy.exposeHeaders",
            &cors,
            "/spec/http/0/corsPolicy/exposeHeaders",
            json!(["x-b"]),
            simple(),
            json!({"responseHeaders": {"access-control-expose-headers": "x-b"}}),
        ),
        row(
            "VirtualService.http[].corsPolicy.allowCredentials",
            &cors,
            "/spec/http/0/corsPolicy/allowCredentials",
            json!(true),
            simple(),
            json!({"responseHeaders": {"access-control-allow-credentials": "true"}}),
        ),
        row(
            "VirtualService.http[].corsPolicy.unmatchedPreflights",
            &cors,
            "/spec/http/0/corsPolicy/unmatchedPreflights",
            json!("IGNORE"),
            with_headers(
                "OPTIONS http://reviews:9080/x",
                &["origin: https://other.example", "access-control-request-method: GET"],
            ),
            json!({"action": "direct-response", "status": 200}),
        )
        .instead_of(json!("FORWARD")),
    ]
}

fn bytes() -> Vec<Row> {
    let db = |name: &str, ip: &str| {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": ip, "selector": {"app": "ratings"}, "ports": [{"name": "tcp", "port": 5432}]}})
    };
    let to = |h: &str| json!({"destination": {"host": h, "port": {"number": 5432}}});
    let tcp = |spec: Value| {
        Base::new(bookinfo().with(db("db", "10.96.0.20")).with(db("db2", "10.96.0.21")).with(document(spec)))
    };
    let base = tcp(json!({"hosts": ["db"], "tcp": [{"match": [{"port": 5432}], "route": [to("db2")]}]}));
    let ask = || get("tcp://db:5432");
    let db1 = json!({"cluster": "outbound|5432||db.default.svc.cluster.local"});
    let db2 = json!({"cluster": "outbound|5432||db2.default.svc.cluster.local"});
    let secure = |name: &str| {
        json!({"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"hosts": [format!("{name}.example")], "resolution": "DNS", "location": "MESH_EXTERNAL",
                 "ports": [{"number": 443, "name": "tls", "protocol": "TLS"}]}})
    };
    let dest = |h: &str| json!({"destination": {"host": format!("{h}.example"), "port": {"number": 443}}});
    let tls = Base::new(bookinfo().with(secure("a")).with(secure("b")).with(document(
        json!({"hosts": ["a.example", "c.example"], "tls": [{"match": [{"sniHosts": ["a.example"]}], "route": [dest("b")]}]}))));
    let a = json!({"cluster": "outbound|443||a.example"});
    let b = json!({"cluster": "outbound|443||b.example"});
    let hello = || get("tls://a.example:443");
    vec![
        row("VirtualService.tcp[].route[]", &base, "/spec/tcp/0/route", json!([to("db2")]), ask(), db2.clone()).instead_of(json!([to("db")])),
        row("VirtualService.tcp[].match[].port", &base, "/spec/tcp/0/match/0/port", json!(5432), ask(), db2).instead_of(json!(1)),
        row("VirtualService.tcp[].match[].destinationSubnets", &base, "/spec/tcp/0/match/0/destinationSubnets", json!(["10.0.0.0/16"]), ask(), db1.clone()),
        row("VirtualService.tcp[].match[].sourceLabels", &base, "/spec/tcp/0/match/0/sourceLabels", json!({"app": "x"}), ask(), db1.clone()),
        row("VirtualService.tcp[].match[].sourceNamespace", &base, "/spec/tcp/0/match/0/sourceNamespace", json!("other"), ask(), db1.clone()),
        row("VirtualService.tcp[].match[].gateways", &base, "/spec/tcp/0/match/0/gateways", json!(["edge"]), ask(), db1.clone()),
        row("VirtualService.tcp[].match[].sourceSubnet", &base, "/spec/tcp/0/match/0/sourceSubnet", json!("192.0.2.0/24"), ask(), db1.clone())
            .instead_of(json!("10.0.0.0/8")),
        row("VirtualService.tls[].match[].sniHosts", &tls, "/spec/tls/0/match/0/sniHosts", json!(["a.example"]), hello(), b.clone())
            .instead_of(json!(["c.example"])),
        row("VirtualService.tls[].match[].port", &tls, "/spec/tls/0/match/0/port", json!(444), hello(), a.clone()),
        row("VirtualService.tls[].match[].destinationSubnets", &tls, "/spec/tls/0/match/0/destinationSubnets", json!(["10.0.0.0/16"]), hello(), a.clone()),
        row("VirtualService.tls[].match[].sourceLabels", &tls, "/spec/tls/0/match/0/sourceLabels", json!({"app": "x"}), hello(), a.clone()),
        row("VirtualService.tls[].match[].sourceNamespace", &tls, "/spec/tls/0/match/0/sourceNamespace", json!("other"), hello(), a.clone()),
        row("VirtualService.tls[].match[].gateways", &tls, "/spec/tls/0/match/0/gateways", json!(["edge"]), hello(), a.clone()),
        row("VirtualService.tls[].match[].sourceSubnet", &tls, "/spec/tls/0/match/0/sourceSubnet", json!("192.0.2.0/24"), hello(), a.clone())
            .instead_of(json!("10.0.0.0/8")),
        row("VirtualService.tls[].route[].destination", &tls, "/spec/tls/0/route", json!([dest("b")]), hello(), b).instead_of(json!([dest("a")])),
        row("VirtualService.tls[].route[].weight", &tls, "/spec/tls/0/route",
            json!([{"destination": dest("a")["destination"], "weight": 10}, {"destination": dest("b")["destination"], "weight": 90}]),
            hello(), json!({"weights": [{"weight": 10}, {"weight": 90}]})).instead_of(json!([dest("a")])),
    ]
}

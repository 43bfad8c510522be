//! DestinationRule.

use serde_json::{Value, json};

use crate::{Base, Row, View, from, get, row, support::bookinfo};

const X: &str = "GET http://ratings:9080/x";
const CLUSTER: &str = "outbound|9080||ratings.default.svc.cluster.local";
const TP: &str = "DestinationRule.trafficPolicy.";

fn document(spec: Value) -> Value {
    json!({"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
           "metadata": {"name": "dr", "namespace": "default"}, "spec": spec})
}

fn rule(policy: Value) -> Base {
    Base::new(bookinfo().with(document(json!({"host": "ratings", "trafficPolicy": policy}))))
}

/// A field of the traffic policy, by what the cluster then has.
fn cluster(field: &'static str, base: &Base, pointer: &'static str, value: Value, want: Value) -> Row {
    row(
        field,
        base,
        pointer,
        value,
        View::Config { from: "default/productpage-v1" },
        json!({"clusters": {CLUSTER: want}}),
    )
}

fn policy(field: &'static str, base: &Base, pointer: &'static str, value: Value, want: Value) -> Row {
    row(field, base, pointer, value, get(X), json!({"trafficPolicy": want}))
}

macro_rules! tp {
    ($name:literal) => {
        concat!("DestinationRule.trafficPolicy.", $name)
    };
}

pub(crate) fn rows() -> Vec<Row> {
    debug_assert!(tp!("tls").starts_with(TP));
    let mut all = selection();
    all.extend(pools());
    all.extend(balancing());
    all.extend(localities());
    all.extend(health());
    all.extend(tls());
    all
}

fn selection() -> Vec<Row> {
    let b = rule(json!({"loadBalancer": {"simple": "RANDOM"}}));
    let random = json!({"trafficPolicy": {"loadBalancer": "RANDOM"}});
    let subset = Base::new(
        bookinfo()
            .with(json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
                "metadata": {"name": "vs", "namespace": "default"},
                "spec": {"hosts": ["ratings"], "http": [{"route": [{"destination": {"host": "ratings", "subset": "v1"}}]}]}}))
            .with(document(json!({"host": "ratings", "subsets": [{"name": "v1", "labels": {"version": "v1"}}]}))),
    );
    vec![
        row("DestinationRule.host", &b, "/spec/host", json!("ratings"), get(X), random.clone())
            .instead_of(json!("reviews.default.svc.cluster.local")),
        row(
            "DestinationRule.exportTo",
            &b,
            "/spec/exportTo",
            json!(["."]),
            from("other/app", "GET http://ratings.default:9080/"),
            json!({"trafficPolicy": {"loadBalancer": "LEAST_REQUEST"}}),
        ),
        row(
            "DestinationRule.workloadSelector.matchLabels",
            &b,
            "/spec/workloadSelector/matchLabels",
            json!({"app": "other"}),
            get(X),
            json!({"trafficPolicy": {"loadBalancer": "LEAST_REQUEST"}}),
        ),
        row(
            "DestinationRule.subsets[].name",
            &subset,
            "/spec/subsets/0/name",
            json!("v1"),
            get(X),
            json!({"subset": "v1", "endpoints": [{"address": "10.1.0.21:9080"}]}),
        )
        .instead_of(json!("v9")),
        row(
            "DestinationRule.subsets[].labels",
            &subset,
            "/spec/subsets/0/labels",
            json!({"version": "v9"}),
            get(X),
            json!({"endpoints": [], "status": 503}),
        )
        .instead_of(json!({"version": "v1"})),
        row(
            "DestinationRule.subsets[].trafficPolicy",
            &subset,
            "/spec/subsets/0/trafficPolicy",
            json!({"loadBalancer": {"simple": "RANDOM"}}),
            get(X),
            random.clone(),
        ),
        row(
            tp!("portLevelSettings[].port"),
            &b,
            "/spec/trafficPolicy/portLevelSettings",
            json!([{"port": {"number": 9080}, "loadBalancer": {"simple": "ROUND_ROBIN"}}]),
            get(X),
            json!({"trafficPolicy": {"loadBalancer": "ROUND_ROBIN"}}),
        )
        .instead_of(json!([{"port": {"number": 1}, "loadBalancer": {"simple": "ROUND_ROBIN"}}])),
        row(
            tp!("portLevelSettings[].loadBalancer"),
            &b,
            "/spec/trafficPolicy/portLevelSettings",
            json!([{"port": {"number": 9080}, "loadBalancer": {"simple": "ROUND_ROBIN"}}]),
            get(X),
            json!({"trafficPolicy": {"loadBalancer": "ROUND_ROBIN"}}),
        ),
        row(
            tp!("portLevelSettings[].connectionPool"),
            &b,
            "/spec/trafficPolicy/portLevelSettings",
            json!([{"port": {"number": 9080}, "connectionPool": {"tcp": {"maxConnections": 3}}}]),
            get(X),
            json!({"trafficPolicy": {"maxConnections": 3, "loadBalancer": "LEAST_REQUEST"}}),
        ),
        row(
            tp!("portLevelSettings[].outlierDetection"),
            &b,
            "/spec/trafficPolicy/portLevelSettings",
            json!([{"port": {"number": 9080}, "outlierDetection": {"consecutive5xxErrors": 2}}]),
            get(X),
            json!({"trafficPolicy": {"outlierDetection": {"consecutive5xxErrors": 2}}}),
        ),
        row(
            tp!("portLevelSettings[].tls"),
            &b,
            "/spec/trafficPolicy/portLevelSettings",
            json!([{"port": {"number": 9080}, "tls": {"mode": "DISABLE"}}]),
            get(X),
            json!({"endpoints": [{"tls": "none"}]}),
        ),
    ]
}

fn pools() -> Vec<Row> {
    let b = rule(json!({"connectionPool": {"tcp": {"maxConnections": 100}, "http": {"maxRetries": 9}}}));
    let tcp = Base::new(
        bookinfo()
            .with(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "db", "namespace": "default"},
                "spec": {"clusterIP": "10.96.0.20", "selector": {"app": "ratings"}, "ports": [{"name": "tcp", "port": 5432}]}}))
            .with(document(json!({"host": "db", "trafficPolicy": {"connectionPool": {"tcp": {"maxConnections": 100}}}}))),
    );
    let secs = |n: u64| json!({"secs": n, "nanos": 0});
    let tunnel = |field, value, want: Value| {
        row(field, &tcp, "/spec/trafficPolicy/tunnel", value, get("tcp://db:5432"), json!({"tunnel": want}))
            .instead_of(json!({"protocol": "CONNECT", "targetHost": "b.example", "targetPort": 443}))
    };
    vec![
        policy(
            tp!("connectionPool.tcp.maxConnections"),
            &b,
            "/spec/trafficPolicy/connectionPool/tcp/maxConnections",
            json!(7),
            json!({"maxConnections": 7}),
        )
        .instead_of(json!(100)),
        policy(
            tp!("connectionPool.tcp.connectTimeout"),
            &b,
            "/spec/trafficPolicy/connectionPool/tcp/connectTimeout",
            json!("0.03s"),
            json!({"connectTimeout": "0.03s"}),
        ),
        cluster(
            tp!("connectionPool.tcp.tcpKeepalive.time"),
            &b,
            "/spec/trafficPolicy/connectionPool/tcp/tcpKeepalive/time",
            json!("75s"),
            json!({"keepalive": {"time": secs(75)}}),
        ),
        cluster(
            tp!("connectionPool.tcp.tcpKeepalive.probes"),
            &b,
            "/spec/trafficPolicy/connectionPool/tcp/tcpKeepalive/probes",
            json!(3),
            json!({"keepalive": {"time": secs(7200), "probes": 3}}),
        ),
        cluster(
            tp!("connectionPool.tcp.tcpKeepalive.interval"),
            &b,
            "/spec/trafficPolicy/connectionPool/tcp/tcpKeepalive/interval",
            json!("5s"),
            json!({"keepalive": {"interval": secs(5)}}),
        ),
        policy(
            tp!("connectionPool.tcp.maxConnectionDuration"),
            &b,
            "/spec/trafficPolicy/connectionPool/tcp/maxConnectionDuration",
            json!("5s"),
            json!({"maxConnectionDuration": "5s"}),
        ),
        row(
            tp!("connectionPool.tcp.maxConnectionDuration"),
            &tcp,
            "/spec/trafficPolicy/connectionPool/tcp/maxConnectionDuration",
            json!("9s"),
            View::Config { from: "default/productpage-v1" },
            json!({"listeners": {"10.96.0.20_5432": {"filter_chains": [{"filters": [{"Tcp": {"max_duration": secs(9)}}]}]}}}),
        ),
        row(
            tp!("connectionPool.tcp.idleTimeout"),
            &tcp,
            "/spec/trafficPolicy/connectionPool/tcp/idleTimeout",
            json!("9s"),
            View::Config { from: "default/productpage-v1" },
            json!({"listeners": {"10.96.0.20_5432": {"filter_chains": [{"filters": [{"Tcp": {"idle_timeout": secs(9)}}]}]}}}),
        ),
        policy(
            tp!("connectionPool.http.http1MaxPendingRequests"),
            &b,
            "/spec/trafficPolicy/connectionPool/http/http1MaxPendingRequests",
            json!(2),
            json!({"http1MaxPendingRequests": 2}),
        ),
        policy(
            tp!("connectionPool.http.http2MaxRequests"),
            &b,
            "/spec/trafficPolicy/connectionPool/http/http2MaxRequests",
            json!(3),
            json!({"http2MaxRequests": 3}),
        ),
        policy(
            tp!("connectionPool.http.maxRequestsPerConnection"),
            &b,
            "/spec/trafficPolicy/connectionPool/http/maxRequestsPerConnection",
            json!(1),
            json!({"maxRequestsPerConnection": 1}),
        ),
        policy(
            tp!("connectionPool.http.maxRetries"),
            &b,
            "/spec/trafficPolicy/connectionPool/http/maxRetries",
            json!(4),
            json!({"maxRetries": 4}),
        )
        .instead_of(json!(9)),
        policy(
            tp!("connectionPool.http.idleTimeout"),
            &b,
            "/spec/trafficPolicy/connectionPool/http/idleTimeout",
            json!("30s"),
            json!({"idleTimeout": "30s"}),
        ),
        policy(
            tp!("connectionPool.http.h2UpgradePolicy"),
            &b,
            "/spec/trafficPolicy/connectionPool/http/h2UpgradePolicy",
            json!("UPGRADE"),
            json!({"protocol": "http2"}),
        ),
        policy(
            tp!("connectionPool.http.useClientProtocol"),
            &b,
            "/spec/trafficPolicy/connectionPool/http/useClientProtocol",
            json!(true),
            json!({"protocol": "downstream"}),
        ),
        policy(
            tp!("connectionPool.http.maxConcurrentStreams"),
            &b,
            "/spec/trafficPolicy/connectionPool/http/maxConcurrentStreams",
            json!(3),
            json!({"maxConcurrentStreams": 3}),
        ),
        cluster(
            tp!("connectionPool.http.http2KeepAlive.interval"),
            &b,
            "/spec/trafficPolicy/connectionPool/http/http2KeepAlive",
            json!({"interval": "5s", "timeout": "1s"}),
            json!({"http2": {"keepalive": {"interval": secs(5)}}}),
        )
        .instead_of(json!({"interval": "6s", "timeout": "1s"})),
        cluster(
            tp!("connectionPool.http.http2KeepAlive.timeout"),
            &b,
            "/spec/trafficPolicy/connectionPool/http/http2KeepAlive",
            json!({"interval": "5s", "timeout": "1s"}),
            json!({"http2": {"keepalive": {"timeout": secs(1)}}}),
        )
        .instead_of(json!({"interval": "5s", "timeout": "2s"})),
        cluster(
            tp!("retryBudget.percent"),
            &b,
            "/spec/trafficPolicy/retryBudget/percent",
            json!(12.5),
            json!({"limits": {"retry_budget": {"share": 1250, "min_concurrency": 3}}}),
        ),
        cluster(
            tp!("retryBudget.minRetryConcurrency"),
            &b,
            "/spec/trafficPolicy/retryBudget/minRetryConcurrency",
            json!(8),
            json!({"limits": {"retry_budget": {"share": 2000, "min_concurrency": 8}}}),
        ),
        cluster(
            tp!("retryBudget.budgetInterval"),
            &b,
            "/spec/trafficPolicy/retryBudget/budgetInterval",
            json!("5s"),
            json!({"limits": {"retry_budget": {"share": 2000, "interval": secs(5)}}}),
        ),
        cluster(
            tp!("proxyProtocol.version"),
            &b,
            "/spec/trafficPolicy/proxyProtocol/version",
            json!("V2"),
            json!({"proxy_protocol": "V2"}),
        ),
        tunnel(
            tp!("tunnel.protocol"),
            json!({"protocol": "POST", "targetHost": "a.example", "targetPort": 443}),
            json!("POST a.example:443"),
        ),
        tunnel(
            tp!("tunnel.targetHost"),
            json!({"targetHost": "a.example", "targetPort": 443}),
            json!("CONNECT a.example:443"),
        ),
        tunnel(
            tp!("tunnel.targetPort"),
            json!({"targetHost": "b.example", "targetPort": 8443}),
            json!("CONNECT b.example:8443"),
        ),
    ]
}

fn balancing() -> Vec<Row> {
    let b = rule(json!({"loadBalancer": {"simple": "ROUND_ROBIN"}}));
    let hash = |h: Value| rule(json!({"loadBalancer": {"consistentHash": h}}));
    let by_ip = hash(json!({"useSourceIp": true}));
    let hashed = |what: &str| json!({"hash": [what]});
    let cookie = hash(json!({"httpCookie": {"name": "c", "ttl": "10s"}}));
    let policy_of = |want: Value| {
        json!({"routes": {"9080": {"virtual_hosts": {"ratings.default.svc.cluster.local:9080": {"routes": [
        {"action": {"Forward": {"hash": [want]}}}]}}}}})
    };
    let config = || View::Config { from: "default/productpage-v1" };
    let utilization = |field, value: Value, want| {
        let value = json!({"backendUtilization": value});
        cluster(
            field,
            &b,
            "/spec/trafficPolicy/loadBalancer",
            value,
            json!({"utilization": want, "lb": "Utilization"}),
        )
        .instead_of(json!({"backendUtilization": {"weightUpdatePeriod": "1s"}}))
    };
    vec![
        utilization(
            tp!("loadBalancer.backendUtilization.errorUtilizationPenaltyPercent"),
            json!({"errorUtilizationPenaltyPercent": 10}),
            json!({"error_penalty": 10}),
        ),
        utilization(
            tp!("loadBalancer.backendUtilization.metricNamesForComputingUtilization"),
            json!({"metricNamesForComputingUtilization": ["m"]}),
            json!({"metrics": ["m"]}),
        ),
        utilization(
            tp!("loadBalancer.backendUtilization.weightExpirationPeriod"),
            json!({"weightExpirationPeriod": "3s"}),
            json!({"expiration": {"secs": 3, "nanos": 0}}),
        ),
        utilization(
            tp!("loadBalancer.backendUtilization.weightStabilizationPeriod"),
            json!({"weightStabilizationPeriod": "3s"}),
            json!({"blackout": {"secs": 3, "nanos": 0}}),
        ),
        utilization(
            tp!("loadBalancer.backendUtilization.weightUpdatePeriod"),
            json!({"weightUpdatePeriod": "3s"}),
            json!({"update": {"secs": 3, "nanos": 0}}),
        ),
        policy(
            tp!("loadBalancer.simple"),
            &b,
            "/spec/trafficPolicy/loadBalancer/simple",
            json!("RANDOM"),
            json!({"loadBalancer": "RANDOM"}),
        )
        .instead_of(json!("ROUND_ROBIN")),
        cluster(
            tp!("loadBalancer.warmup.duration"),
            &b,
            "/spec/trafficPolicy/loadBalancer/warmup/duration",
            json!("45s"),
            json!({"slow_start": {"window": {"secs": 45, "nanos": 0}, "aggression": 1000, "min_weight": 1000}}),
        ),
        cluster(
            tp!("loadBalancer.warmup.aggression"),
            &b,
            "/spec/trafficPolicy/loadBalancer/warmup",
            json!({"duration": "45s", "aggression": 2.5}),
            json!({"slow_start": {"aggression": 2500}}),
        )
        .instead_of(json!({"duration": "45s"})),
        cluster(
            tp!("loadBalancer.warmup.minimumPercent"),
            &b,
            "/spec/trafficPolicy/loadBalancer/warmup",
            json!({"duration": "45s", "minimumPercent": 25}),
            json!({"slow_start": {"min_weight": 2500}}),
        )
        .instead_of(json!({"duration": "45s"})),
        policy(
            tp!("loadBalancer.warmupDurationSecs"),
            &b,
            "/spec/trafficPolicy/loadBalancer/warmupDurationSecs",
            json!("30s"),
            json!({"warmup": "30s"}),
        ),
        row(
            tp!("loadBalancer.consistentHash.httpHeaderName"),
            &by_ip,
            "/spec/trafficPolicy/loadBalancer/consistentHash",
            json!({"httpHeaderName": "x-u"}),
            get(X),
            hashed("header x-u"),
        )
        .instead_of(json!({"useSourceIp": true})),
        row(
            tp!("loadBalancer.consistentHash.httpQueryParameterName"),
            &by_ip,
            "/spec/trafficPolicy/loadBalancer/consistentHash",
            json!({"httpQueryParameterName": "q"}),
            get(X),
            hashed("query parameter q"),
        )
        .instead_of(json!({"useSourceIp": true})),
        row(
            tp!("loadBalancer.consistentHash.useSourceIp"),
            &b,
            "/spec/trafficPolicy/loadBalancer",
            json!({"consistentHash": {"useSourceIp": true}}),
            get(X),
            hashed("source address"),
        )
        .instead_of(json!({"simple": "RANDOM"})),
        row(
            tp!("loadBalancer.consistentHash.httpCookie.name"),
            &cookie,
            "/spec/trafficPolicy/loadBalancer/consistentHash/httpCookie/name",
            json!("d"),
            get(X),
            hashed("cookie d"),
        )
        .instead_of(json!("c")),
        row(
            tp!("loadBalancer.consistentHash.httpCookie.path"),
            &cookie,
            "/spec/trafficPolicy/loadBalancer/consistentHash/httpCookie/path",
            json!("/p"),
            config(),
            policy_of(json!({"Cookie": {"path": "/p"}})),
        ),
        row(
            tp!("loadBalancer.consistentHash.httpCookie.ttl"),
            &cookie,
            "/spec/trafficPolicy/loadBalancer/consistentHash/httpCookie/ttl",
            json!("60s"),
            config(),
            policy_of(json!({"Cookie": {"ttl": {"secs": 60, "nanos": 0}}})),
        )
        .instead_of(json!("10s")),
        row(
            tp!("loadBalancer.consistentHash.httpCookie.attributes[].name"),
            &cookie,
            "/spec/trafficPolicy/loadBalancer/consistentHash/httpCookie/attributes",
            json!([{"name": "Secure"}]),
            config(),
            policy_of(json!({"Cookie": {"attributes": [["Secure", ""]]}})),
        ),
        row(
            tp!("loadBalancer.consistentHash.httpCookie.attributes[].value"),
            &cookie,
            "/spec/trafficPolicy/loadBalancer/consistentHash/httpCookie/attributes",
            json!([{"name": "SameSite", "value": "Lax"}]),
            config(),
            policy_of(json!({"Cookie": {"attributes": [["SameSite", "Lax"]]}})),
        )
        .instead_of(json!([{"name": "SameSite", "value": "Strict"}])),
        policy(
            tp!("loadBalancer.consistentHash.minimumRingSize"),
            &by_ip,
            "/spec/trafficPolicy/loadBalancer/consistentHash/minimumRingSize",
            json!(512),
            json!({"loadBalancer": "RING_HASH(512)"}),
        ),
        policy(
            tp!("loadBalancer.consistentHash.ringHash.minimumRingSize"),
            &by_ip,
            "/spec/trafficPolicy/loadBalancer/consistentHash/ringHash/minimumRingSize",
            json!(256),
            json!({"loadBalancer": "RING_HASH(256)"}),
        ),
        policy(
            tp!("loadBalancer.consistentHash.maglev.tableSize"),
            &by_ip,
            "/spec/trafficPolicy/loadBalancer/consistentHash/maglev/tableSize",
            json!(251),
            json!({"loadBalancer": "MAGLEV(251)"}),
        ),
    ]
}

fn localities() -> Vec<Row> {
    let place = |mut v: Value, at: &str| {
        v["spec"]["locality"] = json!(at);
        v
    };
    // Three places for reviews; the page is in the first.
    let mut mesh = bookinfo();
    for d in &mut mesh.0 {
        let at = match d["metadata"]["name"].as_str() {
            Some("reviews-v1" | "productpage-v1") => "r1/z1/a",
            Some("reviews-v2") => "r1/z2/a",
            Some("reviews-v3") => "r2/z1/a",
            _ => continue,
        };
        if d["kind"] == "WorkloadEntry" {
            *d = place(d.take(), at);
        }
    }
    mesh.0.retain(|d| d["kind"] != "DestinationRule");
    let base = Base::new(mesh.with(document(json!({"host": "reviews", "trafficPolicy": {
        "outlierDetection": {"consecutive5xxErrors": 5}, "loadBalancer": {"localityLbSetting": {"enabled": true}}}}))));
    let ask = || get("GET http://reviews:9080/");
    let at =
        |field, pointer, value, want| row(field, &base, pointer, value, ask(), json!({"endpoints": want}));
    let lb = "/spec/trafficPolicy/loadBalancer";
    let l = "/spec/trafficPolicy/loadBalancer/localityLbSetting";
    vec![
        at(tp!("loadBalancer.localityLbSetting.enabled"), "/spec/trafficPolicy/loadBalancer/localityLbSetting/enabled", json!(false),
            json!([{"priority": 0}, {"priority": 0}, {"priority": 0}])),
        row(tp!("loadBalancer.localityLbSetting.failover[].from"), &base, l,
            json!({"failover": [{"from": "r1", "to": "r3"}]}), View::Config { from: "default/productpage-v1" }, priorities(&[0, 1, 2]))
            .instead_of(json!({"enabled": false})),
        row(tp!("loadBalancer.localityLbSetting.failover[].to"), &regions(), l, json!({"failover": [{"from": "r1", "to": "r3"}]}),
            ask(), json!({"endpoints": [{"locality": "r1/z1/a", "priority": 0}, {"locality": "r3/z1/a", "priority": 1}, {"locality": "r2/z1/a", "priority": 2}]}))
            .instead_of(json!({"failover": [{"from": "r1", "to": "r2"}]})),
        at(tp!("loadBalancer.localityLbSetting.failoverPriority"), "/spec/trafficPolicy/loadBalancer/localityLbSetting/failoverPriority",
            json!(["version=v3"]), json!([{"locality": "r2/z1/a", "priority": 0}, {"priority": 1}, {"priority": 1}])),
        at(tp!("loadBalancer.localityLbSetting.distribute[].to"), "/spec/trafficPolicy/loadBalancer/localityLbSetting/distribute",
            json!([{"from": "r1/*", "to": {"r2/*": 100}}]), json!([{"locality": "r2/z1/a", "priority": 0}])),
        at(tp!("loadBalancer.localityLbSetting.distribute[].from"), "/spec/trafficPolicy/loadBalancer/localityLbSetting/distribute",
            json!([{"from": "r1/z1/*", "to": {"r1/z2/*": 100}}]), json!([{"locality": "r1/z2/a"}])),
        row(tp!("loadBalancer.zoneAwareLbSetting.enabled"), &base, lb, json!({"zoneAwareLbSetting": {"enabled": true}}), ask(),
            json!({"endpoints": [{"locality": "r1/z1/a", "priority": 0}, {"locality": "r1/z2/a", "priority": 0}, {"priority": 1}]}))
            .instead_of(json!({"zoneAwareLbSetting": {"enabled": false}})),
        row(tp!("loadBalancer.zoneAwareLbSetting.failover[]"), &regions(), lb,
            json!({"zoneAwareLbSetting": {"failover": [{"from": "r1", "to": "r3"}]}}), ask(),
            json!({"endpoints": [{"locality": "r1/z1/a", "priority": 0}, {"locality": "r3/z1/a", "priority": 1}, {"locality": "r2/z1/a", "priority": 2}]}))
            .instead_of(json!({"zoneAwareLbSetting": {"failover": [{"from": "r1", "to": "r2"}]}})),
        row(tp!("loadBalancer.zoneAwareLbSetting.failoverPriority"), &base, lb,
            json!({"zoneAwareLbSetting": {"failoverPriority": ["version=v3"]}}), ask(),
            json!({"endpoints": [{"locality": "r2/z1/a", "priority": 0}, {"priority": 1}, {"priority": 1}]}))
            .instead_of(json!({"zoneAwareLbSetting": {}})),
        // All callers are in one of two zones that have a server each: half of the traffic stays.
        row(tp!("loadBalancer.zoneAwareLbSetting.minClusterSize"), &base, lb,
            json!({"zoneAwareLbSetting": {"minClusterSize": 2}}), View::Config { from: "default/productpage-v1" },
            json!({"endpoints": {"outbound|9080||reviews.default.svc.cluster.local": {"localities": [{"weight": 500_000}, {"weight": 500_000}, {}]}}}))
            .instead_of(json!({"zoneAwareLbSetting": {"minClusterSize": 3}})),
    ]
}

/// One workload of reviews in each of three regions.
fn regions() -> Base {
    let mut mesh = bookinfo();
    for d in mesh.0.iter_mut().filter(|d| d["kind"] == "WorkloadEntry") {
        let at = match d["metadata"]["name"].as_str() {
            Some("reviews-v1" | "productpage-v1") => "r1/z1/a",
            Some("reviews-v2") => "r2/z1/a",
            Some("reviews-v3") => "r3/z1/a",
            _ => continue,
        };
        d["spec"]["locality"] = json!(at);
    }
    mesh.0.retain(|d| d["kind"] != "DestinationRule");
    Base::new(mesh.with(document(
        json!({"host": "reviews", "trafficPolicy": {"outlierDetection": {"consecutive5xxErrors": 5}}}),
    )))
}

fn priorities(p: &[u32]) -> Value {
    let all: Vec<_> = p.iter().map(|p| json!({"priority": p})).collect();
    json!({"endpoints": {"outbound|9080||reviews.default.svc.cluster.local": {"localities": all}}})
}

fn health() -> Vec<Row> {
    let b = rule(json!({"outlierDetection": {"interval": "7s"}}));
    let at =
        |field, pointer, value, want| policy(field, &b, pointer, value, json!({"outlierDetection": want}));
    let split = b.and("/spec/trafficPolicy/outlierDetection/splitExternalLocalOriginErrors", json!(true));
    vec![
        at(
            tp!("outlierDetection.consecutive5xxErrors"),
            "/spec/trafficPolicy/outlierDetection/consecutive5xxErrors",
            json!(2),
            json!({"consecutive5xxErrors": 2}),
        ),
        at(
            tp!("outlierDetection.consecutiveGatewayErrors"),
            "/spec/trafficPolicy/outlierDetection/consecutiveGatewayErrors",
            json!(3),
            json!({"consecutiveGatewayErrors": 3}),
        ),
        at(
            tp!("outlierDetection.consecutiveErrors"),
            "/spec/trafficPolicy/outlierDetection/consecutiveErrors",
            json!(4),
            json!({"consecutiveGatewayErrors": 4, "consecutive5xxErrors": 0}),
        ),
        at(
            tp!("outlierDetection.interval"),
            "/spec/trafficPolicy/outlierDetection/interval",
            json!("8s"),
            json!({"interval": "8s"}),
        )
        .instead_of(json!("7s")),
        at(
            tp!("outlierDetection.baseEjectionTime"),
            "/spec/trafficPolicy/outlierDetection/baseEjectionTime",
            json!("3m"),
            json!({"baseEjectionTime": "180s"}),
        ),
        at(
            tp!("outlierDetection.maxEjectionPercent"),
            "/spec/trafficPolicy/outlierDetection/maxEjectionPercent",
            json!(100),
            json!({"maxEjectionPercent": 100}),
        ),
        cluster(
            tp!("outlierDetection.minHealthPercent"),
            &b,
            "/spec/trafficPolicy/outlierDetection/minHealthPercent",
            json!(40),
            json!({"panic_threshold": 40}),
        ),
        cluster(
            tp!("outlierDetection.splitExternalLocalOriginErrors"),
            &b,
            "/spec/trafficPolicy/outlierDetection/splitExternalLocalOriginErrors",
            json!(true),
            json!({"outlier": {"local_origin": {"consecutive": 5}}}),
        ),
        cluster(
            tp!("outlierDetection.consecutiveLocalOriginFailures"),
            &split,
            "/spec/trafficPolicy/outlierDetection/consecutiveLocalOriginFailures",
            json!(2),
            json!({"outlier": {"local_origin": {"consecutive": 2}}}),
        ),
        at(
            tp!("outlierDetection.outlierDetectionHttpErrorCodes"),
            "/spec/trafficPolicy/outlierDetection/outlierDetectionHttpErrorCodes",
            json!([429, 503]),
            json!({"errorCodes": [429, 503]}),
        ),
    ]
}

fn tls() -> Vec<Row> {
    let b = rule(json!({"tls": {"mode": "SIMPLE"}}));
    let mutual = rule(
        json!({"tls": {"mode": "MUTUAL", "clientCertificate": "/c", "privateKey": "/k", "caCertificates": "/r"}}),
    );
    let at =
        |field, base: &Base, pointer, value, want| cluster(field, base, pointer, value, json!({"tls": want}));
    vec![
        row(
            tp!("tls.mode"),
            &b,
            "/spec/trafficPolicy/tls/mode",
            json!("DISABLE"),
            get(X),
            json!({"endpoints": [{"tls": "none"}]}),
        )
        .instead_of(json!("SIMPLE")),
        at(
            tp!("tls.clientCertificate"),
            &mutual,
            "/spec/trafficPolicy/tls/clientCertificate",
            json!("/c2"),
            json!({"certificate": {"Files": {"chain": "/c2"}}}),
        )
        .instead_of(json!("/c")),
        at(
            tp!("tls.privateKey"),
            &mutual,
            "/spec/trafficPolicy/tls/privateKey",
            json!("/k2"),
            json!({"certificate": {"Files": {"key": "/k2"}}}),
        )
        .instead_of(json!("/k")),
        at(
            tp!("tls.caCertificates"),
            &b,
            "/spec/trafficPolicy/tls/caCertificates",
            json!("/r2"),
            json!({"validation": {"trusted": {"Files": {"chain": "/r2"}}}}),
        ),
        at(
            tp!("tls.credentialName"),
            &rule(json!({"tls": {"mode": "SIMPLE"}})),
            "/spec/trafficPolicy/tls/credentialName",
            json!("s"),
            json!({"validation": {"trusted": {"Sds": "kubernetes://s-cacert"}}}),
        ),
        at(
            tp!("tls.subjectAltNames"),
            &b,
            "/spec/trafficPolicy/tls/subjectAltNames",
            json!(["a.example"]),
            json!({"validation": {"sans": [{"kind": {"Exact": "a.example"}}]}}),
        ),
        at(
            tp!("tls.sni"),
            &b,
            "/spec/trafficPolicy/tls/sni",
            json!("s.example"),
            json!({"sni": "s.example"}),
        ),
        at(
            tp!("tls.insecureSkipVerify"),
            &b,
            "/spec/trafficPolicy/tls/insecureSkipVerify",
            json!(true),
            json!({"validation": {"trusted": null}}),
        ),
        at(
            tp!("tls.caCrl"),
            &b,
            "/spec/trafficPolicy/tls/caCrl",
            json!("/crl"),
            json!({"validation": {"crl": "/crl"}}),
        ),
    ]
}

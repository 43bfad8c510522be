//! VirtualService and DestinationRule.

use super::{accepts, refuses, warns};

const NET: &str = "networking.istio.io/v1";

/// A VirtualService with one HTTP route that has these members.
fn route(members: &str) -> String {
    format!("hosts: [a]\nhttp: [{{{members}}}]")
}

fn routed(members: &str) -> String {
    route(&format!("{members}, route: [{{destination: {{host: a}}}}]"))
}

#[test]
fn virtual_services_of_all_versions_are_accepted() {
    let specs = [
        "hosts: [a]\nhttp: [{route: [{destination: {host: a}, weight: 1}, {destination: {host: b}, weight: 2}]}]",
        "hosts: [10.1.2.3]\nhttp: [{route: [{destination: {host: a}}]}]",
        "hosts: ['*']\ngateways: [gw]\nhttp: [{route: [{destination: {host: a}}]}]",
        "hosts: ['*.example.com', other.com]\nhttp: [{redirect: {scheme: https}}]",
        "hosts: [a]\nhttp: [{delegate: {name: part, namespace: other}}]",
        "http: [{route: [{destination: {host: a}}]}]",
        "hosts: ['outbound_.80_._.a.mesh']\ngateways: [gw]\ntls: [{match: [{sniHosts: ['outbound_.80_._.a.mesh']}], route: [{destination: {host: a}}]}]",
        "hosts: [a.com]\ntls: [{match: [{sniHosts: [a.com], port: 443}], route: [{destination: {host: a}}]}]",
        "hosts: [a]\ntcp: [{match: [{destinationSubnets: ['2001:1::/64', 10.0.0.1]}], route: [{destination: {host: a}}]}]",
        "hosts: [a]\nhttp: [{route: [{destination: {host: '*.example.com'}}]}]",
        "hosts: [a]\nexportTo: [., other]\nhttp: [{directResponse: {status: 503, body: {string: x}}}]",
    ];
    for api in ["networking.istio.io/v1alpha3", "networking.istio.io/v1beta1", NET] {
        accepts(api, "VirtualService", &specs);
    }
}

#[test]
fn virtual_service_routes_are_accepted() {
    for members in [
        "timeout: 1.5s, retries: {attempts: 3, perTryTimeout: 2s, retryOn: '5xx,gateway-error,503', backoff: 10ms}",
        "retries: {attempts: 0}",
        "match: [{uri: {prefix: ''}}]",
        "match: [{headers: {':method': {exact: GET}, x: {}}}]",
        "match: [{withoutHeaders: {x: {regex: '*'}}}]",
        "fault: {delay: {percentage: {value: 0.0001}, fixedDelay: 5s}, abort: {percentage: {value: 10}, grpcStatus: UNAVAILABLE}}",
        "fault: {abort: {percentage: {value: 10}}}",
        "corsPolicy: {allowOrigins: [{exact: 'https://a'}], allowMethods: ['*'], allowHeaders: ['*'], maxAge: 24h}",
        "headers: {request: {set: {host: a.b, x: 'v %REQ(x-id)%'}, remove: [y]}, response: {add: {z: '100%%'}}}",
        "rewrite: {uriRegexRewrite: {match: '^/a/(.*)', rewrite: '/\\1'}}",
        "mirrors: [{destination: {host: b}, percentage: {value: 50}}]",
    ] {
        accepts(NET, "VirtualService", &[&routed(members)]);
    }
}

#[test]
fn virtual_services_are_refused() {
    refuses(
        NET,
        "VirtualService",
        &[
            ("hosts: [a, a]\nhttp: [{redirect: {uri: /}}]", "hosts[1]"),
            ("hosts: ['a_b']\nhttp: [{redirect: {uri: /}}]", "hosts[0]"),
            ("hosts: ['*']\nhttp: [{redirect: {uri: /}}]", "hosts[0]"),
            ("hosts: ['outbound_.80_._.a.mesh']\nhttp: [{redirect: {uri: /}}]", "hosts[0]"),
            ("hosts: [a]\ngateways: [./gw]\nhttp: [{redirect: {uri: /}}]", "gateways[0]"),
            ("hosts: [a]\ngateways: [ns/gw.x]\nhttp: [{redirect: {uri: /}}]", "gateways[0]"),
            ("hosts: [a]\nexportTo: [., books]\nhttp: [{redirect: {uri: /}}]", "exportTo[1]"),
            ("hosts: [a]\nexportTo: ['~']\nhttp: [{redirect: {uri: /}}]", "exportTo[0]"),
            (
                "hosts: [a]\nhttp: [{directResponse: {status: 200}, fault: {abort: {httpStatus: 500}}}]",
                "http[0].fault",
            ),
            (
                "hosts: [a]\ntls: [{match: [{}], route: [{destination: {host: a}}]}]",
                "tls[0].match[0].sniHosts",
            ),
            ("hosts: [a]\ntcp: [{}]", "tcp[0].route"),
            (
                "hosts: [a]\ntcp: [{route: [{destination: {host: a}, weight: 0}, {destination: {host: b}}]}]",
                "tcp[0].route",
            ),
            (
                "hosts: [a]\nhttp: [{route: [{destination: {host: 'a..b'}}]}]",
                "http[0].route[0].destination.host",
            ),
            (
                "hosts: [a]\nhttp: [{route: [{destination: {host: a}, weight: -1}]}]",
                "http[0].route[0].weight",
            ),
            ("hosts: [a]\nhttps: []", "https"),
        ],
    );
    for (members, path) in [
        ("timeout: 0s", "timeout"),
        ("timeout: 1500us", "timeout"),
        ("retries: {attempts: 0, retryRemoteLocalities: true}", "retries"),
        ("retries: {attempts: 1, retryOn: '5xx, reset'}", "retries.retryOn"),
        ("retries: {attempts: 1, retryOn: '599'}", "retries.retryOn"),
        ("match: [{headers: {x: {prefix: ''}}}]", "match[0].headers.x.prefix"),
        ("match: [{method: {regex: ''}}]", "match[0].method.regex"),
        (
            "match: [{headers: {'@request.auth.claims[sub': {exact: a}}}]",
            r#"match[0].headers["@request.auth.claims[sub"]"#,
        ),
        ("match: [{sourceNamespace: 'a.b'}]", "match[0].sourceNamespace"),
        ("match: [{port: 70000}]", "match[0].port"),
        ("fault: {delay: {percentage: {value: 0.00001}, fixedDelay: 5s}}", "fault.delay.percentage.value"),
        ("fault: {abort: {percentage: {value: 1}, grpcStatus: unavailable}}", "fault.abort.grpcStatus"),
        ("corsPolicy: {allowOrigins: [{exact: ''}]}", "corsPolicy.allowOrigins[0]"),
        ("corsPolicy: {maxAge: 0s}", "corsPolicy.maxAge"),
        ("headers: {request: {set: {x: '50%'}}}", "headers.request.set.x"),
        ("headers: {response: {set: {host: a}}}", "headers.response.set.host"),
        ("{rewrite: {authority: a}, headers: {request: {set: {Host: b}}}}", "headers.request"),
        ("rewrite: {uriRegexRewrite: {match: a}}", "rewrite.uriRegexRewrite.rewrite"),
        ("rewrite: {uri: /, uriRegexRewrite: {match: a, rewrite: b}}", "rewrite"),
        ("mirrors: [{}]", "mirrors[0].destination"),
        ("{mirror: {host: b}, mirrorPercentage: {value: 101}}", "mirrorPercentage.value"),
    ] {
        let members = members.strip_prefix('{').and_then(|m| m.strip_suffix('}')).unwrap_or(members);
        refuses(NET, "VirtualService", &[(&routed(members), &format!("http[0].{path}"))]);
    }
    refuses(
        NET,
        "VirtualService",
        &[
            (
                &route("match: [{uri: {exact: /a}}], redirect: {prefixRewrite: /b}"),
                "http[0].redirect.prefixRewrite",
            ),
            (&route("redirect: {uri: /a, prefixRewrite: /b}"), "http[0].redirect"),
            (&route("redirect: {port: 0}"), "http[0].redirect.port"),
            (&route("redirect: {scheme: ftp}"), "http[0].redirect.scheme"),
            (
                &route("directResponse: {status: 200, body: {string: a, bytes: b}}"),
                "http[0].directResponse.body",
            ),
        ],
    );
}

#[test]
fn virtual_service_warnings() {
    let two = |first: &str, second: &str| {
        format!(
            "hosts: [a]\nhttp:\n- {{match: [{first}], route: [{{destination: {{host: a}}}}]}}\n- {{match: [{second}], route: [{{destination: {{host: b}}}}]}}"
        )
    };
    warns(
        NET,
        "VirtualService",
        &[
            (
                &two("{uri: {prefix: /a}}", "{uri: {prefix: /ab}}"),
                "http[1].match[0]",
                "covered by prefix \"/a\"",
            ),
            (&two("{uri: {exact: /a}}", "{uri: {exact: /a}}"), "http[1]", "never reached"),
            (
                &two("{uri: {exact: /a}}", "{uri: {exact: /a}}, {uri: {exact: /b}}"),
                "http[1].match[0]",
                "same match",
            ),
            (&two("{uri: {prefix: /}}", "{uri: {exact: /b}}"), "http[1]", "never reached"),
            (&routed("mirror: {host: b}, mirrorPercent: 10"), "http[0].mirrorPercent", "deprecated"),
            (
                &routed("retries: {attempts: 1, retryOn: http3-post-connect-failure}"),
                "http[0].retries.retryOn",
                "never holds",
            ),
            (
                "hosts: [a]\ngateways: [gw.ns.svc.cluster.local]\nhttp: [{redirect: {uri: /}}]",
                "gateways[0]",
                "ns/gw",
            ),
            (
                "hosts: [10.0.0.1]\ntls: [{match: [{sniHosts: [10.0.0.1]}], route: [{destination: {host: a}}]}]",
                "tls[0].match[0].sniHosts[0]",
                "IP address",
            ),
        ],
    );
    for (first, second) in [
        ("{uri: {prefix: /ab}}", "{uri: {prefix: /a}}"),
        ("{uri: {prefix: /a}, port: 80}", "{uri: {prefix: /ab}}"),
        ("{uri: {prefix: /a}, headers: {x: {exact: y}}}", "{uri: {prefix: /ab}}"),
        ("{uri: {prefix: /a}, method: {exact: POST}}", "{uri: {prefix: /ab}, method: {exact: PUT}}"),
    ] {
        let p = super::parse(NET, "VirtualService", &two(first, second));
        assert!(p.coded.is_empty(), "{first} {second}: {:?}", p.coded);
    }
}

#[test]
fn destination_rules() {
    accepts(
        NET,
        "DestinationRule",
        &[
            "host: '*'",
            "host: a\nsubsets: [{name: v1}]",
            "host: a\nworkloadSelector: {matchLabels: {app: a}}\nexportTo: [.]",
            "host: a\ntrafficPolicy: {loadBalancer: {localityLbSetting: {failoverPriority: [topology.kubernetes.io/region], distribute: [{from: 'r/*', to: {'r/z1/*': 60, r/z2: 40}}]}}}",
            "host: a\ntrafficPolicy: {outlierDetection: {consecutiveLocalOriginFailures: 0, consecutive5xxErrors: 3}}",
            "host: a\ntrafficPolicy: {tls: {mode: ISTIO_MUTUAL, clientCertificate: /x}}",
            "host: a\ntrafficPolicy: {tls: {mode: SIMPLE, credentialName: c}}",
            "host: a\ntrafficPolicy: {connectionPool: {tcp: {idleTimeout: 0s}, http: {http2KeepAlive: {interval: 1s, timeout: 2s}}}}",
            "host: a\ntrafficPolicy: {tunnel: {targetHost: b.com, targetPort: 443}}",
            "host: a\ntrafficPolicy: {loadBalancer: {simple: ROUND_ROBIN, warmup: {duration: 10s, minimumPercent: 20, aggression: 1.5}}}",
            "host: a\ntrafficPolicy: {loadBalancer: {zoneAwareLbSetting: {enabled: true, minClusterSize: 3}}}",
            "host: a\ntrafficPolicy: {loadBalancer: {consistentHash: {httpCookie: {name: c, ttl: 0s, attributes: [{name: SameSite, value: Lax}]}, maglev: {tableSize: 251}}}}",
        ],
    );
    let policy = |p: &str| format!("host: a\ntrafficPolicy: {{{p}}}");
    for (p, path) in [
        ("tunnel: {protocol: PUT, targetHost: b, targetPort: 1}", "tunnel.protocol"),
        ("tunnel: {targetHost: 'b c', targetPort: 1}", "tunnel.targetHost"),
        ("tunnel: {targetHost: b.com}", "tunnel.targetPort"),
        ("proxyProtocol: {version: V3}", "proxyProtocol.version"),
        (
            "outlierDetection: {consecutiveLocalOriginFailures: 3}",
            "outlierDetection.consecutiveLocalOriginFailures",
        ),
        ("outlierDetection: {interval: 0s}", "outlierDetection.interval"),
        ("outlierDetection: {minHealthPercent: -1}", "outlierDetection.minHealthPercent"),
        ("connectionPool: {http: {idleTimeout: 0s}}", "connectionPool.http.idleTimeout"),
        (
            "connectionPool: {http: {http2KeepAlive: {interval: 1s}}}",
            "connectionPool.http.http2KeepAlive.timeout",
        ),
        (
            "connectionPool: {http: {h2UpgradePolicy: UPGRADE, useClientProtocol: true}}",
            "connectionPool.http",
        ),
        ("connectionPool: {tcp: {tcpKeepalive: {time: 0s}}}", "connectionPool.tcp.tcpKeepalive.time"),
        ("connectionPool: {http: {maxRetries: -1}}", "connectionPool.http.maxRetries"),
        ("loadBalancer: {simple: RANDOM, consistentHash: {useSourceIp: true}}", "loadBalancer"),
        (
            "loadBalancer: {consistentHash: {httpCookie: {ttl: 1s}}}",
            "loadBalancer.consistentHash.httpCookie.name",
        ),
        (
            "loadBalancer: {consistentHash: {httpCookie: {name: c, attributes: [{name: a}, {name: a}]}}}",
            "loadBalancer.consistentHash.httpCookie.attributes[1].name",
        ),
        (
            "loadBalancer: {consistentHash: {useSourceIp: true, minimumRingSize: 3, ringHash: {}}}",
            "loadBalancer.consistentHash.minimumRingSize",
        ),
        (
            "loadBalancer: {consistentHash: {useSourceIp: true, maglev: {}}}",
            "loadBalancer.consistentHash.maglev.tableSize",
        ),
        ("loadBalancer: {warmup: {minimumPercent: 1}}", "loadBalancer.warmup.duration"),
        ("loadBalancer: {warmup: {duration: 1s, minimumPercent: 101}}", "loadBalancer.warmup.minimumPercent"),
        ("loadBalancer: {warmup: {duration: 1s, aggression: 0}}", "loadBalancer.warmup.aggression"),
        ("loadBalancer: {localityLbSetting: {}, zoneAwareLbSetting: {}}", "loadBalancer.zoneAwareLbSetting"),
        (
            "loadBalancer: {localityLbSetting: {distribute: [{from: a, to: {b: 100}}], failover: [{from: a, to: b}]}}",
            "loadBalancer.localityLbSetting",
        ),
        (
            "loadBalancer: {localityLbSetting: {distribute: [{from: 'a/*/b', to: {b: 100}}]}}",
            "loadBalancer.localityLbSetting.distribute[0].from",
        ),
        (
            "loadBalancer: {localityLbSetting: {distribute: [{from: a, to: {'b/*': 50, b/z: 50}}]}}",
            "loadBalancer.localityLbSetting.distribute[0].to[\"b/z\"]",
        ),
        (
            "loadBalancer: {localityLbSetting: {distribute: [{from: a, to: {r/z: 50, r/z/s: 50}}]}}",
            "loadBalancer.localityLbSetting.distribute[0].to[\"r/z/s\"]",
        ),
        (
            "loadBalancer: {localityLbSetting: {failover: [{from: a, to: a}]}}",
            "loadBalancer.localityLbSetting.failover[0]",
        ),
        ("tls: {mode: MUTUAL, clientCertificate: /a}", "tls.privateKey"),
        ("tls: {mode: SIMPLE, credentialName: c, caCertificates: /a}", "tls.credentialName"),
        ("tls: {mode: SIMPLE, insecureSkipVerify: true, caCertificates: /a}", "tls.insecureSkipVerify"),
        ("tls: {mode: SIMPLE, insecureSkipVerify: true, credentialName: a}", "tls.insecureSkipVerify"),
        ("portLevelSettings: [{port: {number: 80}}]", "portLevelSettings[0]"),
        ("portLevelSettings: [{port: {number: 0}, tls: {}}]", "portLevelSettings[0].port.number"),
    ] {
        refuses(NET, "DestinationRule", &[(&policy(p), &format!("trafficPolicy.{path}"))]);
        refuses(
            NET,
            "DestinationRule",
            &[(
                &format!("host: a\nsubsets: [{{name: v, trafficPolicy: {{{p}}}}}]"),
                &format!("subsets[0].trafficPolicy.{path}"),
            )],
        );
    }
    refuses(
        NET,
        "DestinationRule",
        &[
            ("host: 'a b'", "host"),
            ("host: a\nworkloadSelector: {matchLabels: {app: a}}\nexportTo: ['*']", "exportTo"),
            ("host: a\nworkloadSelector: {matchLabels: {app: 'a*'}}", "workloadSelector.matchLabels.app"),
            ("host: a\nsubsets: [{name: v1, labels: {'a b': c}}]", "subsets[0].labels[\"a b\"]"),
            ("host: a\nsubsets: [{name: v1, labels: {a: c-}}]", "subsets[0].labels.a"),
            ("host: a\nsubsets: [{name: v_1}]", "subsets[0].name"),
        ],
    );
    warns(
        NET,
        "DestinationRule",
        &[
            (
                &policy("outlierDetection: {consecutiveErrors: 3}"),
                "trafficPolicy.outlierDetection.consecutiveErrors",
                "deprecated",
            ),
            (
                &policy("loadBalancer: {localityLbSetting: {failover: [{from: a, to: b}]}}"),
                "trafficPolicy.loadBalancer.localityLbSetting",
                "outlierDetection",
            ),
            ("host: a\nworkloadSelector: {}", "workloadSelector", "without labels"),
        ],
    );
}

//! Gateway, Sidecar, ServiceEntry, WorkloadEntry, WorkloadGroup.

use super::{accepts, refuses, warns};

const NET: &str = "networking.istio.io/v1";

#[test]
fn gateways() {
    let server = |s: &str| format!("servers: [{{{s}}}]");
    let https = |tls: &str| {
        server(&format!("port: {{number: 443, name: a, protocol: HTTPS}}, hosts: ['*'], tls: {{{tls}}}"))
    };
    accepts(
        NET,
        "Gateway",
        &[
            &server(
                "port: {number: 80, name: a, protocol: http}, hosts: ['*.example.com', ./b.com, '*/c.com', 10.0.0.1]",
            ),
            &server("port: {number: 80, name: a, protocol: TCP}, bind: 127.0.0.1, hosts: ['*']"),
            &https("mode: MUTUAL, credentialName: c, cipherSuites: [ECDHE-RSA-AES128-SHA]"),
            &https("mode: SIMPLE, tlsCertificates: [{serverCertificate: a, privateKey: b}]"),
            &https("mode: OPTIONAL_MUTUAL, serverCertificate: a, privateKey: b, caCertificates: c"),
            &https("mode: ISTIO_MUTUAL"),
            &https("mode: PASSTHROUGH"),
        ],
    );
    let both = "servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: ['*']}, {port: {number: 81, name: a, protocol: HTTP}, hosts: ['*']}]";
    refuses(
        NET,
        "Gateway",
        &[
            (both, "servers[1].port.name"),
            (&server("port: {number: 80, name: a, protocol: HTTP}, hosts: [short]"), "servers[0].hosts[0]"),
            (
                &server("port: {number: 80, name: a, protocol: HTTP}, hosts: ['*foo.com']"),
                "servers[0].hosts[0]",
            ),
            (&server("port: {number: 80, name: a, protocol: HTTP}, hosts: ['ns/']"), "servers[0].hosts[0]"),
            (
                &server("port: {number: 80, name: a, protocol: HTTP, targetPort: 1}, hosts: ['*']"),
                "servers[0].port.targetPort",
            ),
            (&server("port: {number: 0, name: a, protocol: HTTP}, hosts: ['*']"), "servers[0].port.number"),
            (
                &server("port: {number: 80, name: a, protocol: HTTP}, bind: x, hosts: ['*']"),
                "servers[0].bind",
            ),
            (
                &https("mode: OPTIONAL_MUTUAL, serverCertificate: a, privateKey: b"),
                "servers[0].tls.caCertificates",
            ),
            (
                &https("mode: SIMPLE, tlsCertificates: [{serverCertificate: a}]"),
                "servers[0].tls.tlsCertificates[0].privateKey",
            ),
            (
                &https("mode: SIMPLE, credentialName: c, serverCertificate: a, privateKey: b"),
                "servers[0].tls",
            ),
            (&https("mode: SIMPLE, credentialName: c, caCrl: d"), "servers[0].tls.caCrl"),
            (&https("mode: ISTIO_MUTUAL, caCertificates: d"), "servers[0].tls"),
        ],
    );
    warns(
        NET,
        "Gateway",
        &[
            (
                &https("mode: SIMPLE, credentialName: c, cipherSuites: [NONE-SUCH]"),
                "servers[0].tls.cipherSuites[0]",
                "not a cipher suite",
            ),
            (&https("mode: PASSTHROUGH, credentialName: c"), "servers[0].tls", "without effect"),
            (
                &https("mode: SIMPLE, credentialName: c, httpsRedirect: true"),
                "servers[0].tls.httpsRedirect",
                "without effect",
            ),
        ],
    );
    let text = "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {name: a.b, namespace: n}\nspec: {servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: ['*']}]}\n";
    let p = crate::document::parse_file("t", &std::sync::Arc::new(text.as_bytes().to_vec()), "default");
    assert_eq!(p[0].report.errors[0].path, "metadata.name");
}

#[test]
fn sidecars() {
    accepts(
        NET,
        "Sidecar",
        &[
            "egress: [{hosts: ['./*', istio-system/*]}]",
            "outboundTrafficPolicy: {mode: REGISTRY_ONLY}",
            "inboundConnectionPool: {http: {http2MaxRequests: 1}}",
            "ingress: [{port: {number: 80}, defaultEndpoint: 'unix:///run/a.sock'}]",
            "ingress: [{port: {number: 80, protocol: HTTP, name: web}, defaultEndpoint: '[::1]:8080'}]",
            "ingress: [{port: {number: 443, protocol: HTTPS, name: web}, tls: {mode: SIMPLE, serverCertificate: a, privateKey: b}}]",
            "egress: [{port: {number: 0, protocol: HTTP}, bind: 'unix://@a', hosts: ['*/a.com']}, {hosts: ['~/*']}]",
        ],
    );
    refuses(
        NET,
        "Sidecar",
        &[
            ("workloadSelector: {labels: {app: a}}", ""),
            (
                "workloadSelector: {labels: {app: '*'}}\negress: [{hosts: ['./*']}]",
                "workloadSelector.labels.app",
            ),
            ("ingress: [{defaultEndpoint: 127.0.0.1:1}]", "ingress[0].port"),
            ("ingress: [{port: {number: 80}}, {port: {number: 80}}]", "ingress[1].port.number"),
            ("ingress: [{port: {number: 80, name: a_b}}]", "ingress[0].port.name"),
            ("ingress: [{port: {number: 80}, defaultEndpoint: 10.0.0.1:80}]", "ingress[0].defaultEndpoint"),
            ("ingress: [{port: {number: 80}, bind: x}]", "ingress[0].bind"),
            (
                "ingress: [{port: {number: 80, protocol: HTTP}, tls: {mode: SIMPLE, serverCertificate: a, privateKey: b}}]",
                "ingress[0].tls",
            ),
            (
                "ingress: [{port: {number: 80, protocol: TLS}, tls: {mode: ISTIO_MUTUAL}}]",
                "ingress[0].tls.mode",
            ),
            (
                "ingress: [{port: {number: 80, protocol: TLS}, tls: {mode: SIMPLE, credentialName: c}}]",
                "ingress[0].tls.credentialName",
            ),
            ("egress: [{}]", "egress[0].hosts"),
            ("egress: [{hosts: [a.com]}]", "egress[0].hosts[0]"),
            ("egress: [{hosts: ['./short']}]", "egress[0].hosts[0]"),
            ("egress: [{hosts: ['./*a.com']}]", "egress[0].hosts[0]"),
            ("egress: [{hosts: ['./*']}, {hosts: ['./*']}]", "egress[0]"),
            (
                "egress: [{port: {number: 80}, hosts: ['./*']}, {port: {number: 80}, hosts: ['./*']}]",
                "egress[1].port.number",
            ),
            ("egress: [{port: {number: 0}, hosts: ['./*']}]", "egress[0].port.number"),
            (
                "egress: [{port: {number: 0}, bind: 'unix:///a', captureMode: IPTABLES, hosts: ['./*']}]",
                "egress[0].captureMode",
            ),
            (
                "outboundTrafficPolicy: {mode: REGISTRY_ONLY, egressProxy: {host: a.b, port: {number: 1}}}",
                "outboundTrafficPolicy.egressProxy",
            ),
            ("outboundTrafficPolicy: {egressProxy: {host: a.b}}", "outboundTrafficPolicy.egressProxy.port"),
        ],
    );
    warns(
        NET,
        "Sidecar",
        &[
            ("workloadSelector: {}\negress: [{hosts: ['./*']}]", "workloadSelector", "without labels"),
            ("egress: [{hosts: ['./*', books/a.com]}]", "egress[0].hosts[1]", "overlap"),
            ("egress: [{hosts: ['*/*', other/a.com]}]", "egress[0].hosts", "everything"),
            (
                "ingress: [{port: {number: 80, protocol: TCP}, connectionPool: {http: {maxRetries: 1}}}]",
                "ingress[0].connectionPool.http",
                "not HTTP",
            ),
        ],
    );
}

#[test]
fn service_entries() {
    let ports = "ports: [{number: 80, name: http, protocol: HTTP}]";
    let se = |s: &str| format!("hosts: [a.com]\n{ports}\n{s}");
    accepts(
        NET,
        "ServiceEntry",
        &[
            "hosts: [a.com]",
            "hosts: [a.com]\nports: [{number: 80, name: a}]",
            "hosts: [a.com, b.com]\nresolution: DNS\nports: [{number: 443, name: a, protocol: TLS}]",
            "hosts: [a.com, b.com]\nports: [{number: 443, name: a, protocol: TCP}]",
            "hosts: ['*.a.com']\nresolution: DNS\nports: [{number: 443, name: a, protocol: TLS}]\nendpoints: [{address: b.com}]",
            "hosts: ['*.a.com']\nresolution: DYNAMIC_DNS\nports: [{number: 443, name: a, protocol: TLS}]",
            &se("resolution: STATIC\nendpoints: [{network: n1}]"),
            &se("resolution: STATIC\naddresses: [10.0.0.0/8]\nworkloadSelector: {labels: {app: a}}"),
            &se("exportTo: ['~']"),
            &se("resolution: STATIC\nendpoints: [{address: 'unix:///run/a.sock'}, {address: 'unix://@a'}]"),
        ],
    );
    refuses(
        NET,
        "ServiceEntry",
        &[
            (ports, "hosts"),
            (
                "hosts: [a.com, b.com]\nresolution: DNS\nports: [{number: 80, name: a, protocol: TCP}]",
                "hosts",
            ),
            ("hosts: [a.com, b.com]\nresolution: STATIC\nports: [{number: 80, name: a}]", "hosts"),
            (
                "hosts: [10.0.0.1]\nresolution: DNS\nports: [{number: 80, name: a, protocol: HTTP}]",
                "hosts[0]",
            ),
            ("hosts: [a.com]\nports: [{number: 80, name: a_b, protocol: HTTP}]", "ports[0].name"),
            ("hosts: [a.com]\nports: [{number: 80, name: a, protocol: SMTP}]", "ports[0].protocol"),
            ("hosts: [a.com]\nports: [{number: 80, name: a, targetPort: 70000}]", "ports[0].targetPort"),
            (&se("addresses: [10.0.0.300]"), "addresses[0]"),
            (
                &se("resolution: DNS_ROUND_ROBIN\nendpoints: [{address: a.com}, {address: b.com}]"),
                "endpoints",
            ),
            (&se("resolution: DYNAMIC_DNS"), "hosts[0]"),
            (
                "hosts: ['*.a.com']\nresolution: DYNAMIC_DNS\nports: [{number: 80, name: a, protocol: HTTP}]\naddresses: [10.0.0.1]",
                "addresses",
            ),
            (
                "hosts: ['*.a.com']\nresolution: DYNAMIC_DNS\nports: [{number: 80, name: a, protocol: HTTP}]\nendpoints: [{address: b.com}]",
                "endpoints",
            ),
            (
                "hosts: ['*.a.com']\nresolution: DYNAMIC_DNS\nports: [{number: 9, name: t, protocol: TCP}]",
                "ports[0].protocol",
            ),
            (
                &se("resolution: STATIC\nendpoints: [{address: 1.1.1.1, labels: {a: '-'}}]"),
                "endpoints[0].labels.a",
            ),
            (&se("exportTo: ['~', a]"), "exportTo[0]"),
            (&se("resolution: DNS\nendpoints: [{address: 'unix:///run/a.sock'}]"), "endpoints[0].address"),
            (&se("workloadSelector: {labels: {a: 'b*'}}"), "workloadSelector.labels.a"),
        ],
    );
    warns(
        NET,
        "ServiceEntry",
        &[
            ("hosts: ['*a.com']", "hosts[0]", "whole label"),
            (&se("workloadSelector: {labels: {a: b}}"), "workloadSelector", "resolution NONE"),
            (&se("resolution: STATIC\nworkloadSelector: {}"), "workloadSelector", "without labels"),
        ],
    );
}

#[test]
fn workloads() {
    accepts(
        NET,
        "WorkloadEntry",
        &[
            "address: a.com",
            "address: 'unix:///run/a.sock'",
            "network: n1",
            "address: '2001:db8::1'\nports: {http: 80}",
        ],
    );
    refuses(
        NET,
        "WorkloadEntry",
        &[
            ("address: 'unix://a'", "address"),
            ("address: 'unix:///a'\nports: {http: 1}", "ports"),
            ("address: 1.1.1.1\nports: {a_b: 1}", "ports.a_b"),
            ("address: 1.1.1.1\nlocality: a/b/c/d", "locality"),
        ],
    );
    accepts(
        NET,
        "WorkloadGroup",
        &[
            "template: {}",
            "metadata: {labels: {app: a}}\ntemplate: {serviceAccount: a}\nprobe: {httpGet: {port: 80, scheme: HTTPS}, periodSeconds: 5}",
            "template: {}\nprobe: {exec: {command: [a]}}",
        ],
    );
    refuses(
        NET,
        "WorkloadGroup",
        &[
            ("metadata: {}", "template"),
            ("template: {}\nmetadata: {labels: {'a b': c}}", "metadata.labels[\"a b\"]"),
            ("template: {}\nprobe: {}", "probe"),
            ("template: {}\nprobe: {periodSeconds: -1, tcpSocket: {port: 1}}", "probe.periodSeconds"),
            ("template: {}\nprobe: {tcpSocket: {port: 0}}", "probe.tcpSocket.port"),
            ("template: {}\nprobe: {httpGet: {port: 1, scheme: http}}", "probe.httpGet.scheme"),
            ("template: {}\nprobe: {exec: {}}", "probe.exec.command"),
            ("template: {}\nprobe: {grpc: {}}", "probe.grpc.port"),
        ],
    );
}

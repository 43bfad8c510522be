//! Gateway.

use serde_json::{Value, json};

use crate::{Base, Row, View, from, refused, row, support::bookinfo};

const EDGE: &str = "istio-system/istio-ingressgateway";

fn document(server: Value) -> Value {
    json!({"apiVersion": "networking.istio.io/v1", "kind": "Gateway", "metadata": {"name": "edge", "namespace": "default"},
           "spec": {"selector": {"istio": "ingressgateway"}, "servers": [server]}})
}

fn base(server: Value) -> Base {
    let vs = json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
        "metadata": {"name": "vs", "namespace": "default"},
        "spec": {"hosts": ["*"], "gateways": ["edge"], "http": [{"route": [{"destination": {"host": "ratings"}}]}],
                 "tcp": [{"route": [{"destination": {"host": "ratings", "port": {"number": 9080}}}]}]}});
    Base::new(bookinfo().with(vs).with(document(server)))
}

fn port(number: u32, name: &str, protocol: &str) -> Value {
    json!({"number": number, "name": name, "protocol": protocol})
}

fn plain() -> Base {
    base(json!({"port": port(80, "http", "HTTP"), "hosts": ["a.example"]}))
}

fn secure(tls: Value) -> Base {
    base(json!({"port": port(443, "https", "HTTPS"), "hosts": ["a.example"], "tls": tls}))
}

/// TLS of the server's filter chain.
fn tls(want: Value) -> Value {
    json!({"listeners": {"0.0.0.0_443": {"filter_chains": [{"tls": want}]}}})
}

pub(crate) fn rows() -> Vec<Row> {
    let p = plain();
    let s = secure(json!({"mode": "SIMPLE", "credentialName": "c"}));
    let files = secure(
        json!({"mode": "MUTUAL", "serverCertificate": "/c", "privateKey": "/k", "caCertificates": "/r"}),
    );
    let mutual = secure(json!({"mode": "MUTUAL", "credentialName": "c"}));
    let config = || View::Config { from: EDGE };
    let served = json!({"action": "forward", "cluster": "outbound|9080||ratings.default.svc.cluster.local"});
    let http = || from(EDGE, "GET http://a.example/");
    let chain =
        |field, base: &Base, pointer, value, want| row(field, base, pointer, value, config(), tls(want));
    let list = secure(json!({"mode": "SIMPLE"}));
    vec![
        chain(
            "Gateway.servers[].tls.ecdhCurves",
            &s,
            "/spec/servers/0/tls/ecdhCurves",
            json!(["P-256", "unknown"]),
            json!({"options": {"curves": ["P-256"]}}),
        ),
        row(
            "Gateway.selector",
            &p,
            "/spec/selector",
            json!({"istio": "ingressgateway"}),
            http(),
            served.clone(),
        )
        .instead_of(json!({"istio": "other"})),
        row(
            "Gateway.servers[].port.number",
            &p,
            "/spec/servers/0/port/number",
            json!(8080),
            from(EDGE, "GET http://a.example:8080/"),
            served.clone(),
        )
        .instead_of(json!(80)),
        row(
            "Gateway.servers[].port.protocol",
            &p,
            "/spec/servers/0/port/protocol",
            json!("TCP"),
            http(),
            json!({"action": "forward-tcp"}),
        )
        .instead_of(json!("HTTP")),
        row(
            "Gateway.servers[].port.name",
            &s,
            "/spec/servers/0/port/name",
            json!("web"),
            from(EDGE, "GET https://a.example/"),
            json!({"routeConfiguration": "https.443.web.edge.default"}),
        )
        .instead_of(json!("https")),
        refused(
            "Gateway.servers[].port.targetPort",
            &p,
            "/spec/servers/0/port/targetPort",
            json!(8080),
            "listens on number",
        ),
        row(
            "Gateway.servers[].hosts",
            &p,
            "/spec/servers/0/hosts",
            json!(["b.example"]),
            http(),
            json!({"action": "not-found"}),
        )
        .instead_of(json!(["a.example"])),
        row(
            "Gateway.servers[].bind",
            &p,
            "/spec/servers/0/bind",
            json!("10.9.0.1"),
            config(),
            json!({"listeners": {"10.9.0.1_80": {"address": "10.9.0.1:80"}}}),
        ),
        row(
            "Gateway.servers[].tls.httpsRedirect",
            &p,
            "/spec/servers/0/tls/httpsRedirect",
            json!(true),
            http(),
            json!({"status": 301}),
        ),
        row(
            "Gateway.servers[].tls.mode",
            &s,
            "/spec/servers/0/tls/mode",
            json!("MUTUAL"),
            from(EDGE, "GET https://a.example/"),
            json!({"action": "close"}),
        )
        .instead_of(json!("SIMPLE")),
        chain(
            "Gateway.servers[].tls.serverCertificate",
            &files,
            "/spec/servers/0/tls/serverCertificate",
            json!("/c2"),
            json!({"certificate": {"Files": {"chain": "/c2"}}}),
        )
        .instead_of(json!("/c")),
        chain(
            "Gateway.servers[].tls.privateKey",
            &files,
            "/spec/servers/0/tls/privateKey",
            json!("/k2"),
            json!({"certificate": {"Files": {"key": "/k2"}}}),
        )
        .instead_of(json!("/k")),
        chain(
            "Gateway.servers[].tls.caCertificates",
            &files,
            "/spec/servers/0/tls/caCertificates",
            json!("/r2"),
            json!({"client_certificate": {"Required": {"trusted": {"Files": {"chain": "/r2"}}}}}),
        )
        .instead_of(json!("/r")),
        chain(
            "Gateway.servers[].tls.credentialName",
            &s,
            "/spec/servers/0/tls/credentialName",
            json!("d"),
            json!({"certificate": {"Sds": "kubernetes://d"}}),
        )
        .instead_of(json!("c")),
        chain(
            "Gateway.servers[].tls.credentialNames",
            &s,
            "/spec/servers/0/tls",
            json!({"mode": "SIMPLE", "credentialNames": ["d"]}),
            json!({"certificate": {"Sds": "kubernetes://d"}}),
        )
        .instead_of(json!({"mode": "SIMPLE", "credentialName": "c"})),
        chain(
            "Gateway.servers[].tls.caCertCredentialName",
            &mutual,
            "/spec/servers/0/tls/caCertCredentialName",
            json!("ca"),
            json!({"client_certificate": {"Required": {"trusted": {"Sds": "kubernetes://ca"}}}}),
        ),
        chain(
            "Gateway.servers[].tls.subjectAltNames",
            &mutual,
            "/spec/servers/0/tls/subjectAltNames",
            json!(["x.example"]),
            json!({"client_certificate": {"Required": {"sans": [{"kind": {"Exact": "x.example"}}]}}}),
        ),
        chain(
            "Gateway.servers[].tls.minProtocolVersion",
            &s,
            "/spec/servers/0/tls/minProtocolVersion",
            json!("TLSV1_3"),
            json!({"min_version": "V1_3"}),
        ),
        chain(
            "Gateway.servers[].tls.maxProtocolVersion",
            &s,
            "/spec/servers/0/tls/maxProtocolVersion",
            json!("TLSV1_2"),
            json!({"options": {"max_version": "V1_2"}}),
        ),
        chain(
            "Gateway.servers[].tls.cipherSuites",
            &s,
            "/spec/servers/0/tls/cipherSuites",
            json!(["ECDHE-RSA-AES256-GCM-SHA384", "unknown"]),
            json!({"options": {"ciphers": ["ECDHE-RSA-AES256-GCM-SHA384"]}}),
        ),
        chain(
            "Gateway.servers[].tls.caCrl",
            &files,
            "/spec/servers/0/tls/caCrl",
            json!("/crl"),
            json!({"client_certificate": {"Required": {"crl": "/crl"}}}),
        ),
        chain(
            "Gateway.servers[].tls.tlsCertificates[].serverCertificate",
            &list,
            "/spec/servers/0/tls/tlsCertificates",
            json!([{"serverCertificate": "/c", "privateKey": "/k"}]),
            json!({"certificate": {"Files": {"chain": "/c"}}}),
        )
        .instead_of(json!([{"serverCertificate": "/c2", "privateKey": "/k"}])),
        chain(
            "Gateway.servers[].tls.tlsCertificates[].privateKey",
            &list,
            "/spec/servers/0/tls/tlsCertificates",
            json!([{"serverCertificate": "/c", "privateKey": "/k"}]),
            json!({"certificate": {"Files": {"key": "/k"}}}),
        )
        .instead_of(json!([{"serverCertificate": "/c", "privateKey": "/k2"}])),
        chain(
            "Gateway.servers[].tls.tlsCertificates[].caCertificates",
            &list,
            "/spec/servers/0/tls",
            json!({"mode": "MUTUAL", "tlsCertificates":
                   [{"serverCertificate": "/c", "privateKey": "/k", "caCertificates": "/r"}]}),
            json!({"client_certificate": {"Required": {"trusted": {"Files": {"chain": "/r"}}}}}),
        )
        .instead_of(json!({"mode": "MUTUAL", "caCertificates": "/r0", "tlsCertificates":
                           [{"serverCertificate": "/c", "privateKey": "/k", "caCertificates": "/r"}]})),
        chain(
            "Gateway.servers[].tls.tlsCertificates[].serverCertificate",
            &list,
            "/spec/servers/0/tls/tlsCertificates",
            json!([{"serverCertificate": "/c", "privateKey": "/k"}, {"serverCertificate": "/c2", "privateKey": "/k2"}]),
            json!({"options": {"certificates": [{"Files": {"chain": "/c2", "key": "/k2"}}]}}),
        )
        .instead_of(json!([{"serverCertificate": "/c", "privateKey": "/k"}])),
        chain(
            "Gateway.servers[].tls.verifyCertificateHash",
            &mutual,
            "/spec/servers/0/tls/verifyCertificateHash",
            json!(["0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b"]),
            json!({"options": {"pins": [{"Whole": vec![11; 32]}]}}),
        ),
        chain(
            "Gateway.servers[].tls.verifyCertificateSpki",
            &mutual,
            "/spec/servers/0/tls/verifyCertificateSpki",
            json!(["CwsLCwsLCwsLCwsLCwsLCwsLCwsLCwsLCwsLCwsLCws="]),
            json!({"options": {"pins": [{"PublicKey": vec![11; 32]}]}}),
        ),
        refused(
            "Gateway.servers[].tls.insecureSkipVerify",
            &s,
            "/spec/servers/0/tls/insecureSkipVerify",
            json!(true),
            "insecureSkipVerify",
        ),
    ]
}

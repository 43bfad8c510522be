//! HBONE with a real Envoy at the other end: CONNECT streams over mutual TLS, in both directions.
//!
//! `ENVOY_BIN` names an Envoy, `FLOTILLA_BIN` the binary under test (else what cargo built here).

mod lab;

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use lab::{Cluster, MESH, NAMESPACE, Rows, entry, flags, flotilla, get, ranges, service, strict, until};
use serde_json::{Value, json};

/// Only the storefront may call ratings.
const ONLY_STOREFRONT: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: ratings, namespace: bookstore}
spec:
  selector: {matchLabels: {app: ratings}}
  action: ALLOW
  rules: [{from: [{source: {principals: [mesh.local/ns/bookstore/sa/storefront]}}]}]
";

/// A workload whose proxy takes tunnels.
fn tunnelled(app: &str, version: &str, ip: Ipv4Addr) -> String {
    entry(app, version, ip).replace("labels: {", "labels: {networking.istio.io/tunnel: http, ")
}

fn address(ip: Ipv4Addr, port: u16) -> Value {
    json!({"socket_address": {"address": ip.to_string(), "port_value": port}})
}

fn cluster(name: &str, ip: Ipv4Addr, port: u16, more: Value) -> Value {
    let mut c = json!({
        "name": name, "type": "STATIC", "connect_timeout": "2s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [
            {"endpoint": {"address": address(ip, port)}}]}]}
    });
    for (k, v) in more.as_object().into_iter().flatten() {
        c[k] = v.clone();
    }
    c
}

/// The certificate of a member as files, in Envoy's words.
fn tls(c: &Cluster, member: &str) -> Value {
    let file = |f: &str| json!({"filename": c.dir.join("state").join(member).join(f).display().to_string()});
    json!({
        "alpn_protocols": ["h2"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [{"certificate_chain": file("svid-chain.pem"), "private_key": file("svid-key.pem")}],
        "validation_context": {"trusted_ca": {"filename": c.dir.join("state/ca/root-cert.pem").display().to_string()}}
    })
}

const EXT: &str = "type.googleapis.com/envoy.extensions";

/// A listener that sends each connection through a tunnel for `authority` to the proxy at `to`.
fn client(at: SocketAddr, authority: &str) -> Value {
    json!({
        "name": at.to_string(), "address": {"socket_address": {"address": at.ip().to_string(), "port_value": at.port()}},
        "filter_chains": [{"filters": [{"name": "tcp", "typed_config": {
            "@type": format!("{EXT}.filters.network.tcp_proxy.v3.TcpProxy"), "stat_prefix": "t", "cluster": "peer",
            "tunneling_config": {"hostname": authority}}}]}]
    })
}

fn write(c: &Cluster, name: &str, admin: SocketAddr, listeners: &[Value], clusters: &[Value]) -> Vec<String> {
    let config = json!({
        "admin": {"address": {"socket_address": {"address": admin.ip().to_string(), "port_value": admin.port()}}},
        "static_resources": {"listeners": listeners, "clusters": clusters}
    });
    let path = c.dir.join("state").join(name);
    std::fs::write(&path, config.to_string()).unwrap();
    let path = path.display().to_string();
    ["-c", &path, "--use-dynamic-base-id", "--disable-hot-restart", "--concurrency", "1", "-l", "warning"]
        .map(str::to_owned)
        .to_vec()
}

#[test]
#[ignore = "needs Envoy; cargo verify installs it"]
fn envoy_at_the_other_end_of_a_tunnel() {
    let envoy = PathBuf::from(std::env::var_os("ENVOY_BIN").expect("ENVOY_BIN names an Envoy binary"));
    let dir = tempfile::tempdir().unwrap();
    let mut west = Cluster::new("west", ranges().0, dir.path());
    let (storefront, reviews, ratings) = (west.workload(1), west.workload(2), west.workload(3));
    west.write(
        "app.yaml",
        &[
            service("reviews", "reviews", "http", 9080),
            service("ratings", "ratings", "http", 9080),
            service("storefront", "storefront", "http", 9080),
            entry("storefront", "v1", storefront),
            tunnelled("reviews", "v2", reviews),
            tunnelled("ratings", "v1", ratings),
            strict(),
            MESH.to_owned(),
            ONLY_STOREFRONT.to_owned(),
        ]
        .concat(),
    );
    west.control_plane();
    west.operator(&["found"]);
    west.sidecar("storefront", "v1", storefront, &[]);
    west.sidecar("ratings", "v1", ratings, &[]);

    // Beside reviews is an Envoy that takes tunnels and nothing else; the agent gets its certificate.
    let mut agent = west.app("reviews", "v2", reviews);
    agent.push(("sds", dir.path().join("sds.sock").display().to_string()));
    west.spawn("reviews-agent", &flotilla(), &flags("agent", &agent));
    west.ready(reviews, 15021, "/healthz/ready", "reviews-agent");
    let key = west.dir.join("state/reviews-v2/svid-key.pem");
    until("the certificate of reviews", || key.exists().then_some(()));

    let ends = |cluster: &str| {
        json!({"match": {"connect_matcher": {}}, "route": {"cluster": cluster,
            "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}]}})
    };
    let server = json!({
        "name": "hbone", "address": address(reviews, 15008),
        "filter_chains": [{
            "transport_socket": {"name": "tls", "typed_config": {
                "@type": format!("{EXT}.transport_sockets.tls.v3.DownstreamTlsContext"),
                "require_client_certificate": true, "common_tls_context": tls(&west, "reviews-v2")}},
            "filters": [{"name": "http", "typed_config": {
                "@type": format!("{EXT}.filters.network.http_connection_manager.v3.HttpConnectionManager"),
                "stat_prefix": "hbone", "codec_type": "HTTP2", "http2_protocol_options": {"allow_connect": true},
                "upgrade_configs": [{"upgrade_type": "CONNECT"}],
                "route_config": {"virtual_hosts": [
                    {"name": "own", "domains": [format!("{reviews}:9080")], "routes": [ends("app")]}]},
                "http_filters": [{"name": "router", "typed_config": {"@type": format!("{EXT}.filters.http.router.v3.Router")}}]}}]
        }]
    });
    let admin = SocketAddr::from((reviews, 15002));
    let args =
        write(&west, "envoy-server.json", admin, &[server], &[cluster("app", reviews, 19080, json!({}))]);
    west.spawn("envoy-server", &envoy, &args);

    // Two Envoys that are clients, with the storefront's certificate and with that of reviews.
    let mut clients = Vec::new();
    for (n, member) in ["storefront-v1", "reviews-v2"].iter().enumerate() {
        let ip = west.host(20 + u8::try_from(n).unwrap());
        let at = |port| SocketAddr::from((ip, port));
        let peer = json!({
            "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": format!("{EXT}.upstreams.http.v3.HttpProtocolOptions"),
                "explicit_http_config": {"http2_protocol_options": {}}}},
            "transport_socket": {"name": "tls", "typed_config": {
                "@type": format!("{EXT}.transport_sockets.tls.v3.UpstreamTlsContext"),
                "common_tls_context": tls(&west, member)}}
        });
        let listeners =
            [client(at(15101), &format!("{ratings}:9080")), client(at(15102), &format!("{storefront}:9080"))];
        let args = write(
            &west,
            &format!("envoy-{n}.json"),
            at(15103),
            &listeners,
            &[cluster("peer", ratings, 15008, peer)],
        );
        west.spawn(&format!("envoy-{n}"), &envoy, &args);
        west.ready(ip, 15103, "/ready", &format!("envoy-{n}"));
        clients.push(ip);
    }
    west.ready(reviews, 15002, "/ready", "envoy-server");

    let mut rows = Rows::default();
    let stat = |admin: SocketAddr, name: &str| {
        let page = get(admin, &format!("/stats?filter={name}")).map(|a| a.body).unwrap_or_default();
        String::from_utf8_lossy(&page).trim().to_owned()
    };
    let used = |s: &str| s.lines().any(|l| l.rsplit(' ').next().is_some_and(|n| n != "0"));

    let a = until("Envoy -> Flotilla", || {
        get((clients[0], 15101).into(), "/ratings").filter(|a| a.status == 200)
    });
    rows.call("Envoy -> Flotilla", &a.json(), a.status.into(), "west", "storefront");
    let shared = stat((clients[0], 15103).into(), "peer.upstream_cx_http2_total");
    for _ in 0..5 {
        get((clients[0], 15101).into(), "/ratings");
    }
    let after = stat((clients[0], 15103).into(), "peer.upstream_cx_http2_total");
    rows.add("... on one connection", after.clone(), shared == after && after.ends_with(": 1"));
    let denied = get((clients[1], 15101).into(), "/ratings").map_or(0, |a| a.status);
    rows.add("Envoy with another identity -> Flotilla, storefront only", denied.to_string(), denied == 403);
    let stray = get((clients[0], 15102).into(), "/").map_or(0, |a| a.status);
    rows.add("Envoy -> an address that is not the workload's", format!("{stray} (0: closed)"), stray == 0);

    let through = |uri: &str| get((storefront, 15001).into(), uri).filter(|a| a.status == 200);
    let a = until("Flotilla -> Envoy", || through(&format!("http://reviews.{NAMESPACE}:9080/reviews")));
    let streams = stat(admin, "http.hbone.downstream_cx_http2_total");
    rows.add("Flotilla -> Envoy", a.status.to_string(), a.status == 200 && used(&streams));
    let verified = stat(admin, "ssl.no_certificate");
    rows.add("... with a client certificate", verified.clone(), !used(&verified));
    let a = until("Flotilla -> Flotilla", || through(&format!("http://ratings.{NAMESPACE}:9080/ratings")));
    rows.call("Flotilla -> Flotilla, HTTP", &a.json(), a.status.into(), "west", "storefront");
    let status = west.operator(&["proxy-status", "-o", "json"]);
    let clean = !status.contains("NACKED") && !status.contains("STALE");
    rows.add("proxy-status", "nothing refused or stale", clean);
    rows.end();
}

//! HTTP/3 at the ingress gateway, with clients that are not ours: aioquic and Envoy.
//!
//! `ENVOY_BIN` names an Envoy; Python is where `cargo verify` installs aioquic, or what `FLOTILLA_PYTHON` names.

use std::{
    fs,
    net::{SocketAddr, TcpListener, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::{Value, json};

use super::support::{
    Authority, Cluster, HttpServer, NAMESPACE, SYSTEM, curl, flotilla, mesh, run, service, until,
    until_status,
};

const CLIENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/gateways/http3.py");

fn python() -> PathBuf {
    flotilla_e2e::programs::venv_python().into()
}

fn envoy() -> PathBuf {
    std::env::var_os("ENVOY_BIN").expect("ENVOY_BIN names an Envoy binary").into()
}

/// A `Gateway` with two HTTPS servers, and the shop behind both.
fn edge(port: u16) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {{name: edge, namespace: {SYSTEM}}}\nspec:\n  \
         selector: {{istio: ingressgateway}}\n  servers:\n  \
         - port: {{number: {port}, name: shop, protocol: HTTPS}}\n    hosts: [shop.example]\n    \
         tls: {{mode: SIMPLE, credentialName: shop}}\n  \
         - port: {{number: {port}, name: staff, protocol: HTTPS}}\n    hosts: [staff.example]\n    \
         tls: {{mode: MUTUAL, credentialName: staff}}\n\
         ---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: shop, namespace: \
         {NAMESPACE}}}\nspec:\n  hosts: [shop.example, staff.example]\n  gateways: [{SYSTEM}/edge]\n  http:\n  \
         - route:\n    - destination: {{host: shop, port: {{number: 9080}}}}\n"
    )
}

/// A cluster whose gateways take HTTP/3, and the root of their certificates.
fn with_http3(server: u16) -> (Cluster, Authority, String) {
    let west = Cluster::founded();
    let ca = Authority::new("edge");
    let root = ca.write_root(&west.path("edge.pem"));
    ca.issue(&west.credentials().join("shop"), "shop.example");
    ca.issue(&west.credentials().join("staff"), "staff.example");
    ca.write_root(&west.credentials().join("staff/ca.crt"));
    west.write("mesh.yaml", &mesh("  enableQuicListeners: true\n"));
    west.write("shop.yaml", &service("shop", west.host(2), server, ""));
    west.write("edge.yaml", &edge(8443));
    (west, ca, root)
}

#[test]
#[ignore = "needs the flotilla binary and aioquic; cargo verify has both"]
fn aioquic_at_the_ingress_gateway() {
    let (mut west, ca, root) = with_http3(9080);
    let (crt, key) = ca.issue(&west.path("alice"), "alice");
    let ip = west.host(2);
    west.gateway("ingress", ip, &[]);
    // Both listeners come together; the server behind is the client's.
    let at = format!("shop.example:8443:{ip}");
    let url = ["--resolve", &at, "--cacert", &root, "https://shop.example:8443/"];
    until_status("the gateway over TCP", 503, &url);
    let pid = west.pid("ingress").to_string();
    let (ip, python) = (ip.to_string(), python());
    let o = run(&python, &[CLIENT, &ip, "8443", "9080", &root, &crt, &key, &pid]);
    eprintln!("{}", o.out);
    assert_eq!(o.code, 0, "{}\n{}", o.out, o.err);
    // Access logs of the gateway, with what Envoy calls the protocol.
    west.logged("ingress", &["\"GET /x?y=1 HTTP/3\" 200"]);
    west.logged("ingress", &["\"POST /sum HTTP/3\" 200"]);
}

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // What has ended already is as dead as wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(program: &Path, args: &[&str], log: &Path) -> Process {
    let out = fs::File::create(log).unwrap();
    let child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(out.try_clone().unwrap())
        .stderr(out)
        .spawn()
        .unwrap();
    Process(child)
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn any(kind: &str, mut fields: Value) -> Value {
    fields["@type"] = format!("type.googleapis.com/{kind}").into();
    fields
}

fn hcm(codec: &str, cluster: &str) -> Value {
    let router = any("envoy.extensions.filters.http.router.v3.Router", json!({}));
    any(
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        json!({
            "stat_prefix": "h", "codec_type": codec,
            "access_log": [{"name": "f", "typed_config": any("envoy.extensions.access_loggers.file.v3.FileAccessLog",
                json!({"path": "/dev/stdout", "log_format": {"text_format_source": {"inline_string": "log %PROTOCOL% %REQ(:PATH)% %RESPONSE_CODE%\n"}}}))}],
            "route_config": {"virtual_hosts": [{"name": "v", "domains": ["*"],
                "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster}}]}]},
            "http_filters": [{"name": "envoy.filters.http.router", "typed_config": router}]
        }),
    )
}

fn address(a: SocketAddr, protocol: &str) -> Value {
    json!({"socket_address": {"protocol": protocol, "address": a.ip().to_string(), "port_value": a.port()}})
}

fn cluster(name: &str, at: SocketAddr, protocol: &str, more: Value) -> Value {
    let mut c = json!({"name": name, "type": "STATIC", "connect_timeout": "5s", "load_assignment": {"cluster_name": name,
        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(at, protocol)}}]}]}});
    for (k, v) in more.as_object().unwrap() {
        c[k] = v.clone();
    }
    c
}

fn bootstrap(admin: SocketAddr, listener: Value, cluster: Value) -> Value {
    json!({"node": {"id": "n", "cluster": "c"}, "admin": {"address": address(admin, "TCP")},
        "static_resources": {"listeners": [listener], "clusters": [cluster]}})
}

/// HTTP/1 in, HTTP/3 out.
fn http3_client(listen: SocketAddr, admin: SocketAddr, gateway: SocketAddr, root: &str) -> Value {
    let tls = json!({"sni": "shop.example", "common_tls_context": {"validation_context": {
        "trusted_ca": {"filename": root}, "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": "shop.example"}}]}}});
    let quic = any(
        "envoy.extensions.transport_sockets.quic.v3.QuicUpstreamTransport",
        json!({"upstream_tls_context": tls}),
    );
    let options = any(
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        json!({"explicit_http_config": {"http3_protocol_options": {}}}),
    );
    let more = json!({
        "transport_socket": {"name": "envoy.transport_sockets.quic", "typed_config": quic},
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options}
    });
    let listener = json!({"name": "in", "address": address(listen, "TCP"),
        "filter_chains": [{"filters": [{"name": "hcm", "typed_config": hcm("HTTP1", "gateway")}]}]});
    bootstrap(admin, listener, cluster("gateway", gateway, "UDP", more))
}

/// HTTP/3 in, HTTP/1 out: a file that Envoy and we execute.
fn http3_server(listen: SocketAddr, admin: SocketAddr, app: SocketAddr, crt: &str, key: &str) -> Value {
    let tls = json!({"common_tls_context": {"alpn_protocols": ["h3"], "tls_certificates": [
        {"certificate_chain": {"filename": crt}, "private_key": {"filename": key}}]}});
    let quic = json!({"downstream_tls_context": tls, "enable_early_data": false});
    let quic = any("envoy.extensions.transport_sockets.quic.v3.QuicDownstreamTransport", quic);
    let mut manager = hcm("HTTP3", "app");
    manager["http3_protocol_options"] = json!({});
    let listener = json!({"name": "quic", "address": address(listen, "UDP"),
        "udp_listener_config": {"quic_options": {"idle_timeout": "30s", "quic_protocol_options": {"max_concurrent_streams": 100}}},
        "filter_chains": [{"filters": [{"name": "hcm", "typed_config": manager}],
            "transport_socket": {"name": "envoy.transport_sockets.quic", "typed_config": quic}}]});
    bootstrap(admin, listener, cluster("app", app, "TCP", json!({})))
}

fn write(path: &Path, v: &Value) -> String {
    fs::write(path, v.to_string()).unwrap();
    path.display().to_string()
}

fn free_udp() -> SocketAddr {
    UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

#[test]
#[ignore = "needs the flotilla binary and Envoy; cargo verify has both"]
fn envoy_speaks_http3_to_the_gateway() {
    let (mut west, _, root) = with_http3(9080);
    let ip = west.host(2);
    let _app = HttpServer::start((ip, 9080).into(), "shop");
    west.gateway("ingress", ip, &[]);
    // TCP says where HTTP/3 is.
    let at = format!("shop.example:8443:{ip}");
    let head = until("the gateway over TCP", || {
        let args =
            ["-sSi", "--noproxy", "*", "--resolve", &at, "--cacert", &root, "https://shop.example:8443/"];
        let o = run("curl", &args);
        if o.out.starts_with("HTTP/2 200") { Ok(o.out) } else { Err(format!("{o:?}")) }
    });
    assert!(head.contains("alt-svc: h3=\":8443\"; ma=86400"), "{head}");
    let (listen, admin) = ((ip, free_port()).into(), (ip, free_port()).into());
    let config = write(&west.path("client.json"), &http3_client(listen, admin, (ip, 8443).into(), &root));
    let _client = start(
        &envoy(),
        &["-c", &config, "--use-dynamic-base-id", "--concurrency", "1"],
        &west.path("client.log"),
    );
    let url = format!("http://{listen}/from-envoy");
    let a = until_status("Envoy's client", 200, &["-H", "host: shop.example", &url]);
    assert!(a.body.starts_with("served-by: shop\nGET /from-envoy"), "{a:?}");
    for _ in 0..50 {
        assert_eq!(curl(&["-H", "host: shop.example", &url]).status, 200);
    }
    let line = west.logged("ingress", &["GET /from-envoy HTTP/3", "200"]);
    assert!(line.contains("shop.example"), "{line}");
}

#[test]
#[ignore = "needs the flotilla binary and Envoy; cargo verify has both"]
fn one_bootstrap_file_for_both() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Authority::new("edge");
    let root = ca.write_root(&dir.path().join("root.pem"));
    let (crt, key) = ca.issue(&dir.path().join("shop"), "shop.example");
    let app = HttpServer::start(([127, 0, 0, 1], free_port()).into(), "app");
    let local = || SocketAddr::from(([127, 0, 0, 1], free_port()));
    let ours = flotilla();
    let (listen, admin) = (free_udp(), local());
    let file = write(&dir.path().join("server.json"), &http3_server(listen, admin, app.address, &crt, &key));
    for (name, program, args) in [
        ("flotilla", &ours, vec!["sidecar", "--bootstrap", &file]),
        ("envoy", &envoy(), vec!["-c", &file, "--use-dynamic-base-id", "--concurrency", "1"]),
    ] {
        let log = dir.path().join(format!("{name}.log"));
        let _server = start(program, &args, &log);
        let (to, admin) = (local(), local());
        let client = write(&dir.path().join("client.json"), &http3_client(to, admin, listen, &root));
        let args = ["-c", &client, "--use-dynamic-base-id", "--concurrency", "1"];
        let _client = start(&envoy(), &args, &dir.path().join("client.log"));
        let url = format!("http://{to}/to-{name}");
        let a = until_status(name, 200, &["-H", "host: shop.example", &url]);
        assert!(a.body.contains(&format!("GET /to-{name}")), "{a:?}");
        until(&format!("{name}'s log"), || {
            let text = fs::read_to_string(&log).unwrap();
            if text.contains(&format!("log HTTP/3 /to-{name} 200")) { Ok(()) } else { Err(text) }
        });
    }
}

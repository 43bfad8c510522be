//! The bootstrap files that both data planes run, certificates, and what backends serve.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    SanType,
};
use serde_json::{Value, json};

/// First of the ports, in the program's own namespace and outside of it.
const BASE: (u16, u16) = (2100, 21000);
const EXTENSIONS: &str = "type.googleapis.com/envoy.extensions.filters";

/// Addresses of everything.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ports {
    base: u16,
}

impl Ports {
    pub(crate) fn new(own_namespace: bool) -> Self {
        Self { base: if own_namespace { BASE.0 } else { BASE.1 } }
    }

    fn at(self, n: u16) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.base + n))
    }
    /// Where clients connect.
    pub(crate) fn listen(self) -> SocketAddr {
        self.at(0)
    }
    /// Between the two proxies.
    pub(crate) fn mid(self) -> SocketAddr {
        self.at(1)
    }
    pub(crate) fn client_admin(self) -> SocketAddr {
        self.at(2)
    }
    pub(crate) fn server_admin(self) -> SocketAddr {
        self.at(3)
    }
    pub(crate) fn http1(self) -> SocketAddr {
        self.at(4)
    }
    pub(crate) fn http2(self) -> SocketAddr {
        self.at(5)
    }
    pub(crate) fn iperf(self) -> SocketAddr {
        self.at(6)
    }
}

/// What varies in the templates.
#[derive(Debug, Clone)]
pub(crate) struct Variant {
    pub(crate) ports: Ports,
    pub(crate) backend: SocketAddr,
    pub(crate) grpc: bool,
    pub(crate) access_log: bool,
    pub(crate) resume: bool,
    /// YAML of filters before the router.
    pub(crate) filters: Vec<Value>,
}

fn template(name: &str) -> &'static str {
    match name {
        "http-single" => include_str!("../templates/http-single.yaml"),
        "http-client" => include_str!("../templates/http-client.yaml"),
        "http-server" => include_str!("../templates/http-server.yaml"),
        "tcp-client" => include_str!("../templates/tcp-client.yaml"),
        "tcp-server" => include_str!("../templates/tcp-server.yaml"),
        "tunnel-client" => include_str!("../templates/tunnel-client.yaml"),
        _ => include_str!("../templates/tunnel-server.yaml"),
    }
}

/// Writes a bootstrap file from a template.
pub(crate) fn render(work: &Path, name: &str, v: &Variant) -> anyhow::Result<PathBuf> {
    let log = |who: &str| {
        if !v.access_log {
            return "[]".to_owned();
        }
        json!([{"name": "envoy.access_loggers.file", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
            "path": work.join(format!("access-{who}.log")),
        }}])
        .to_string()
    };
    let filters: String = v.filters.iter().map(|f| format!("          - {f}\n")).collect();
    let port = |a: SocketAddr| a.port().to_string();
    let values = BTreeMap::from([
        ("LISTEN", port(v.ports.listen())),
        ("MID", port(v.ports.mid())),
        ("CLIENT_ADMIN", port(v.ports.client_admin())),
        ("SERVER_ADMIN", port(v.ports.server_admin())),
        ("CERTS", work.join("certs").display().to_string()),
        ("FULL", "true".to_owned()),
        ("REJECT_STATS", "false".to_owned()),
        ("SESSION_KEYS", if v.resume { "1" } else { "0" }.to_owned()),
        ("BACKEND_HOST", v.backend.ip().to_string()),
        ("BACKEND_PORT", port(v.backend)),
        ("BACKEND_PROTO", if v.grpc { "http2_protocol_options" } else { "http_protocol_options" }.to_owned()),
        ("ACCESS_LOG_CLIENT", log("client")),
        ("ACCESS_LOG_SERVER", log("server")),
        ("FILTERS", filters),
    ]);
    let mut text = template(name).to_owned();
    for (k, value) in values {
        text = text.replace(&format!("@{k}@"), &value);
    }
    write(work, &format!("{name}.yaml"), &text)
}

fn write(work: &Path, name: &str, text: &str) -> anyhow::Result<PathBuf> {
    let path = work.join(name);
    std::fs::write(&path, text).with_context(|| path.display().to_string())?;
    Ok(path)
}

fn address(a: SocketAddr) -> Value {
    json!({"socket_address": {"address": a.ip().to_string(), "port_value": a.port()}})
}

/// `scale`: `n` clusters and virtual hosts with a route each; `update` the same, the clusters from the control plane
/// `ads`. `routes`: `n` prefix routes in one virtual host.
pub(crate) fn big(
    work: &Path,
    kind: &str,
    n: usize,
    v: &Variant,
    ads: Option<SocketAddr>,
) -> anyhow::Result<PathBuf> {
    let cluster = |name: &str| {
        json!({"name": name, "type": "STATIC", "load_assignment": {"cluster_name": name, "endpoints": [
            {"lb_endpoints": [{"endpoint": {"address": address(v.backend)}}]}]}})
    };
    let (clusters, hosts): (Vec<Value>, Vec<Value>) = if kind != "routes" {
        (0..n)
            .map(|i| {
                let name = format!("svc-{i}");
                let host = json!({"name": name, "domains": [format!("{name}.bench.local")], "routes": [
                    {"match": {"prefix": "/"}, "route": {"cluster": name}}]});
                (cluster(&name), host)
            })
            .unzip()
    } else {
        let routes: Vec<Value> = (0..n)
            .map(|i| json!({"match": {"prefix": format!("/r{i}/")}, "route": {"cluster": "one"}}))
            .collect();
        (vec![cluster("one")], vec![json!({"name": "all", "domains": ["*"], "routes": routes})])
    };
    let manager = json!({
        "@type": format!("{EXTENSIONS}.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "in",
        "route_config": {"virtual_hosts": hosts, "validate_clusters": false},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {
            "@type": format!("{EXTENSIONS}.http.router.v3.Router")}}],
    });
    let mut bootstrap = json!({
        "admin": {"address": address(v.ports.client_admin())},
        "static_resources": {
            "listeners": [{"name": "in", "address": address(v.ports.listen()), "filter_chains": [{"filters": [
                {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}]}],
            "clusters": clusters,
        },
    });
    if let Some(ads) = ads {
        bootstrap["node"] = json!({"id": "bench", "cluster": "bench"});
        bootstrap["dynamic_resources"] = json!({
            "ads_config": {"api_type": "DELTA_GRPC", "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": "ads"}}]},
            "cds_config": {"ads": {}, "resource_api_version": "V3"},
        });
        bootstrap["static_resources"]["clusters"] = json!([{
            "name": "ads", "type": "STATIC",
            "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}}}},
            "load_assignment": {"cluster_name": "ads", "endpoints": [
                {"lb_endpoints": [{"endpoint": {"address": address(ads)}}]}]},
        }]);
    }
    write(work, &format!("{kind}-{n}.json"), &serde_json::to_string(&bootstrap)?)
}

/// Authorization with `n` policies, of which the last lets the request pass: each names a path, a method and the
/// port, as a generated one does.
pub(crate) fn rbac(n: usize, port: u16) -> Value {
    let policies: serde_json::Map<String, Value> = (0..n)
        .map(|i| {
            let path = if i + 1 == n { "/".to_owned() } else { format!("/denied/{i}") };
            let policy = json!({
                "permissions": [{"and_rules": {"rules": [
                    {"url_path": {"path": {"exact": path}}},
                    {"header": {"name": ":method", "string_match": {"exact": "GET"}}},
                    {"destination_port": port},
                ]}}],
                "principals": [{"any": true}],
            });
            (format!("policy-{i:04}"), policy)
        })
        .collect();
    json!({"name": "envoy.filters.http.rbac", "typed_config": {
        "@type": format!("{EXTENSIONS}.http.rbac.v3.RBAC"),
        "rules": {"action": "ALLOW", "policies": policies},
    }})
}

/// JWT validation with a key in the configuration.
pub(crate) fn jwt(jwks: &str) -> Value {
    json!({"name": "envoy.filters.http.jwt_authn", "typed_config": {
        "@type": format!("{EXTENSIONS}.http.jwt_authn.v3.JwtAuthentication"),
        "providers": {"bench": {
            "issuer": crate::token::ISSUER,
            "audiences": [crate::token::AUDIENCE],
            "local_jwks": {"inline_string": jwks},
            "forward": true,
        }},
        "rules": [{"match": {"prefix": "/"}, "requires": {"provider_name": "bench"}}],
    }})
}

/// A root, a client's and a server's certificate with SPIFFE identities: ECDSA P-256.
pub(crate) fn certificates(dir: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir)?;
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.distinguished_name.push(DnType::CommonName, "bench-ca");
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate()?)?;
    std::fs::write(dir.join("ca.crt"), ca.pem())?;
    for who in ["client", "server"] {
        let mut p = CertificateParams::default();
        p.distinguished_name.push(DnType::OrganizationName, "bench");
        p.subject_alt_names = vec![
            SanType::URI(format!("spiffe://cluster.local/ns/default/sa/{who}").try_into()?),
            SanType::DnsName(who.try_into()?),
        ];
        p.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        std::fs::write(dir.join(format!("{who}.crt")), p.signed_by(&key, &ca)?.pem())?;
        std::fs::write(dir.join(format!("{who}.key")), key.serialize_pem())?;
    }
    Ok(())
}

/// nginx with one worker that answers everything with 128 bytes.
pub(crate) fn nginx(work: &Path, ports: Ports) -> anyhow::Result<PathBuf> {
    let dir = work.display();
    let body = "x".repeat(128);
    let text = format!(
        "worker_processes 1; pid {dir}/nginx.pid; error_log {dir}/nginx.err; daemon off;\n\
         events {{ worker_connections 8192; }}\n\
         http {{ access_log off; keepalive_requests 100000000; server {{ listen {} backlog=4096;\n\
           location / {{ return 200 '{body}'; }} }} }}\n",
        ports.http1()
    );
    write(work, "nginx.conf", &text)
}

/// nginx as a plain reverse proxy with one worker: what there is to reach.
pub(crate) fn nginx_proxy(work: &Path, ports: Ports) -> anyhow::Result<PathBuf> {
    let dir = work.display();
    let text = format!(
        "worker_processes 1; master_process off; pid {dir}/nginx-proxy.pid; error_log {dir}/nginx-proxy.err; daemon off;\n\
         events {{ worker_connections 8192; }}\n\
         http {{ access_log off; keepalive_requests 100000000;\n\
           upstream backend {{ server {}; keepalive 256; keepalive_requests 100000000; }}\n\
           server {{ listen {} backlog=4096; location / {{ proxy_pass http://backend; proxy_http_version 1.1; proxy_set_header Connection \"\"; }} }} }}\n",
        ports.http1(),
        ports.listen()
    );
    write(work, "nginx-proxy.conf", &text)
}

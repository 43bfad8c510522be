//! A real Envoy takes what pilot generates.

use std::{
    fs,
    process::{Child, Command, Stdio},
    time::Duration,
};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{documents, plane, until};

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn get(port: u16, path: &str) -> Option<String> {
    let mut s = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n");
    s.write_all(request.as_bytes()).await.ok()?;
    let mut out = String::new();
    tokio::time::timeout(Duration::from_secs(10), s.read_to_string(&mut out)).await.ok()?.ok()?;
    Some(out)
}

fn write_certificates(dir: &std::path::Path) {
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = ca.self_signed(&ca_key).unwrap();
    let issuer = Issuer::new(ca, ca_key);
    let key = KeyPair::generate().unwrap();
    let mut leaf = CertificateParams::default();
    leaf.subject_alt_names =
        vec![SanType::URI("spiffe://mesh.local/ns/books/sa/productpage".try_into().unwrap())];
    let leaf = leaf.signed_by(&key, &issuer).unwrap();
    fs::write(dir.join("cert.pem"), leaf.pem()).unwrap();
    fs::write(dir.join("key.pem"), key.serialize_pem()).unwrap();
    fs::write(dir.join("root.pem"), root.pem()).unwrap();
}

/// Documents that use every feature whose encoding Envoy checks.
fn rich() -> Vec<(&'static str, &'static str, Value)> {
    let mut docs = crate::bookstore();
    docs.extend([
        ("core/v1/Service", "books/db", json!({"selector": {"app": "db"}, "clusterIP": "10.96.0.9", "ports": [{"name": "tcp", "port": 3306}, {"name": "any", "port": 7000}, {"name": "tls", "port": 8443}]})),
        ("networking.istio.io/v1/ServiceEntry", "books/ext", json!({"hosts": ["ext.example.com"], "resolution": "DNS",
            "ports": [{"number": 443, "name": "https", "protocol": "HTTPS"}, {"number": 80, "name": "http", "protocol": "HTTP"}]})),
        ("networking.istio.io/v1/ServiceEntry", "books/ranges", json!({"hosts": ["ranges.example.com"], "resolution": "NONE",
            "addresses": ["172.20.0.0/16", "172.20.7.0/24", "172.21.0.9"],
            "ports": [{"number": 6379, "name": "tcp", "protocol": "TCP"}, {"number": 6443, "name": "tls", "protocol": "TLS"}, {"number": 7000, "name": "any"}]})),
        ("networking.istio.io/v1/ServiceEntry", "books/ranges-too", json!({"hosts": ["ranges-too.example.com"], "resolution": "STATIC",
            "addresses": ["172.20.0.0/16", "172.22.0.0/16"], "endpoints": [{"address": "unix:///run/app.sock"}],
            "ports": [{"number": 6379, "name": "tcp", "protocol": "TCP"}]})),
        ("networking.istio.io/v1/ServiceEntry", "books/any", json!({"hosts": ["*.any.example.com"], "resolution": "NONE",
            "ports": [{"number": 443, "name": "https", "protocol": "HTTPS"}]})),
        ("networking.istio.io/v1/DestinationRule", "books/reviews", json!({"host": "reviews", "subsets": [{"name": "v1", "labels": {"app": "reviews"}}],
            "trafficPolicy": {"loadBalancer": {"consistentHash": {"httpCookie": {"name": "u", "path": "/", "ttl": "0s"}}},
                "connectionPool": {"tcp": {"maxConnections": 10, "tcpKeepalive": {"time": "300s"}}, "http": {"maxRequestsPerConnection": 5, "idleTimeout": "30s"}},
                "outlierDetection": {"consecutive5xxErrors": 3, "consecutiveGatewayErrors": 2, "interval": "1s", "baseEjectionTime": "3s"}}})),
        ("networking.istio.io/v1/VirtualService", "books/reviews", json!({"hosts": ["reviews"], "http": [
            {"match": [{"uri": {"prefix": "/a"}, "headers": {"x": {"regex": "a.*"}}, "queryParams": {"q": {"exact": "1"}}, "withoutHeaders": {"n": {}}}],
             "rewrite": {"uri": "/b"}, "timeout": "2s", "retries": {"attempts": 2, "retryOn": "5xx,503"},
             "fault": {"delay": {"fixedDelay": "1s", "percentage": {"value": 1.0}}, "abort": {"httpStatus": 503, "percentage": {"value": 1.0}}},
             "corsPolicy": {"allowOrigins": [{"exact": "*"}], "maxAge": "60s"}, "mirror": {"host": "productpage"},
             "headers": {"request": {"set": {"a": "b"}, "add": {"c": "d"}, "remove": ["e"]}},
             "route": [{"destination": {"host": "reviews", "subset": "v1"}, "weight": 90}, {"destination": {"host": "reviews"}, "weight": 10}]},
            {"match": [{"uri": {"exact": "/r"}}], "redirect": {"uri": "/n"}},
            {"match": [{"uri": {"regex": "/t/.*"}}], "rewrite": {"uriRegexRewrite": {"match": "^/t", "rewrite": "/u"}}, "route": [{"destination": {"host": "reviews"}}]},
            {"directResponse": {"status": 404, "body": {"string": "no"}}}]})),
        ("networking.istio.io/v1/VirtualService", "books/tls", json!({"hosts": ["db"], "tls": [{"match": [{"sniHosts": ["db.example.com"]}], "route": [{"destination": {"host": "db", "port": {"number": 8443}}}]}]})),
        ("networking.istio.io/v1/Gateway", "books/edge", json!({"selector": {"istio": "ingressgateway"}, "servers": [
            {"port": {"number": 18080, "name": "http", "protocol": "HTTP"}, "hosts": ["shop.example.com"]},
            {"port": {"number": 18443, "name": "https", "protocol": "HTTPS"}, "hosts": ["shop.example.com"], "tls": {"mode": "ISTIO_MUTUAL"}},
            {"port": {"number": 18443, "name": "tls", "protocol": "TLS"}, "hosts": ["raw.example.com"], "tls": {"mode": "PASSTHROUGH"}}]})),
        ("networking.istio.io/v1/VirtualService", "books/shop", json!({"hosts": ["shop.example.com", "raw.example.com"], "gateways": ["edge"],
            "http": [{"route": [{"destination": {"host": "reviews"}}]}],
            "tls": [{"match": [{"sniHosts": ["raw.example.com"]}], "route": [{"destination": {"host": "db", "port": {"number": 8443}}}]}]})),
        ("security.istio.io/v1/AuthorizationPolicy", "books/allow", json!({"rules": [
            {"from": [{"source": {"principals": ["mesh.local/ns/books/sa/*"], "notNamespaces": ["x"], "ipBlocks": ["10.0.0.0/8"]}}],
             "to": [{"operation": {"methods": ["GET"], "paths": ["/a*", "/b/{*}"], "hosts": ["a.b"], "ports": ["9080"]}}],
             "when": [{"key": "request.headers[x]", "values": ["*"]}, {"key": "connection.sni", "values": ["a*"]}]}]})),
        ("security.istio.io/v1/AuthorizationPolicy", "books/deny", json!({"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["1"]}}]}]})),
        ("security.istio.io/v1/AuthorizationPolicy", "books/audit", json!({"action": "AUDIT", "rules": [{}]})),
        ("core/v1/Service", "books/authz", json!({"selector": {"app": "authz"}, "clusterIP": "10.96.0.77", "ports": [{"name": "http", "port": 8000}, {"name": "grpc", "port": 9000}]})),
        ("security.istio.io/v1/AuthorizationPolicy", "books/ask-http", json!({"action": "CUSTOM", "provider": {"name": "h"}, "rules": [{"to": [{"operation": {"paths": ["/a*"]}}]}]})),
        ("security.istio.io/v1/AuthorizationPolicy", "books/ask-grpc", json!({"action": "CUSTOM", "provider": {"name": "g"}, "rules": [{}]})),
        ("flotilla.dev/v1alpha1/MeshConfig", "mesh", json!({"accessLogFile": "/dev/null", "accessLogEncoding": "JSON", "traceSampling": 50.0, "enableQuicListeners": true,
            "outboundTrafficPolicy": {"mode": "ALLOW_ANY_DYNAMIC_DNS", "tls": {"mode": "SIMPLE"}},
            "defaultTrafficPolicy": {"connectionPool": {"tcp": {"maxConnections": 99}}, "outlierDetection": {"consecutive5xxErrors": 9}},
            "defaultConfig": {
                "proxyHeaders": {"forwardedClientCert": "SANITIZE_SET", "setCurrentClientCertDetails": {"chain": true, "cert": true, "dns": false},
                    "requestId": {"disabled": true}, "server": {"value": "me"}, "envoyDebugHeaders": {"disabled": true},
                    "preserveHttp1HeaderCase": true, "xForwardedHost": {"enabled": true}, "xForwardedPort": {"enabled": true}},
                "connectionSettings": {"listenerConnectionLimit": 1000, "profile": "EDGE", "clusterPerConnectionBufferLimitBytes": 70000, "httpMaxConnectionDuration": "1h",
                    "httpDrainTimeout": "7s", "httpMaxStreamDuration": "1h", "httpHeadersWithUnderscoresAction": "HEADERS_WITH_UNDERSCORES_DROP_HEADER"}},
            "defaultProviders": {"accessLogging": ["text", "json"]},
            "extensionProviders": [
                {"name": "text", "envoyFileAccessLog": {"path": "/dev/null"}},
                {"name": "json", "envoyFileAccessLog": {"path": "/dev/null", "omitEmptyValues": true, "logFormat": {"labels": {}}}},
                {"name": "h", "envoyExtAuthzHttp": {"service": "authz.books.svc.cluster.local", "port": 8000, "pathPrefix": "/check", "statusOnError": "503",
                    "includeRequestHeadersInCheck": ["x-a", "x-b*"], "includeAdditionalHeadersInCheck": {"x-c": "1"}, "headersToUpstreamOnAllow": ["x-user"],
                    "headersToDownstreamOnDeny": ["x-why"], "headersToDownstreamOnAllow": ["set-cookie"], "includeRequestBodyInCheck": {"maxRequestBytes": 99}, "clearRouteCache": true}},
                {"name": "g", "envoyExtAuthzGrpc": {"service": "books/authz.books.svc.cluster.local", "port": 9000, "timeout": "2s", "failOpen": true,
                    "includeRequestBodyInCheck": {"maxRequestBytes": 99, "allowPartialMessage": true, "packAsBytes": true}}}]})),
    ]);
    docs
}

/// The same of the Gateway API: at a gateway, and for callers of a service.
fn gateway_api() -> Vec<(&'static str, &'static str, Value)> {
    let backend = json!([{"name": "reviews", "port": 9080}]);
    let to_db = json!([{"backendRefs": [{"name": "db", "port": 8443}]}]);
    let rules = json!([
        {"matches": [{"path": {"value": "/old"}, "method": "GET", "headers": [{"name": "X-A", "value": "a+", "type": "RegularExpression"}],
                      "queryParams": [{"name": "q", "value": "1"}]}],
         "filters": [{"type": "URLRewrite", "urlRewrite": {"hostname": "i.example.com", "path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/"}}},
                     {"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "a", "value": "b"}], "remove": ["c"]}},
                     {"type": "RequestMirror", "requestMirror": {"backendRef": backend[0], "fraction": {"numerator": 1, "denominator": 3}}},
                     {"type": "CORS", "cors": {"allowOrigins": ["https://*.example.com"], "allowCredentials": true}}],
         "backendRefs": [{"name": "reviews", "port": 9080, "weight": 3}, {"name": "nobody", "port": 1}],
         "timeouts": {"request": "2s", "backendRequest": "1s"}, "retry": {"codes": [503], "attempts": 1, "backoff": "10ms"}},
        {"matches": [{"path": {"value": "/a"}}, {"path": {"type": "RegularExpression", "value": "/t/.*"}}], "backendRefs": backend,
         "filters": [{"type": "URLRewrite", "urlRewrite": {"path": {"type": "ReplaceFullPath", "replaceFullPath": "/all"}}}]},
        {"matches": [{"path": {"value": "/r"}}], "filters": [{"type": "RequestRedirect", "requestRedirect": {"scheme": "https",
         "path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/n"}}}]},
        {"matches": [{"path": {"value": "/none"}}]}]);
    vec![
        (
            "gateway.networking.k8s.io/v1/Gateway",
            "books/front",
            json!({"gatewayClassName": "istio", "listeners": [
            {"name": "http", "port": 18445, "protocol": "HTTP"},
            {"name": "narrow", "port": 18445, "protocol": "HTTP", "hostname": "front.example.com"},
            {"name": "tls", "port": 18446, "protocol": "TLS", "hostname": "*.example.com", "tls": {"mode": "Passthrough"}},
            {"name": "tcp", "port": 18447, "protocol": "TCP"}]}),
        ),
        (
            "gateway.networking.k8s.io/v1/HTTPRoute",
            "books/front",
            json!({"parentRefs": [{"name": "front", "sectionName": "http"}], "rules": rules}),
        ),
        (
            "gateway.networking.k8s.io/v1/GRPCRoute",
            "books/front",
            json!({"parentRefs": [{"name": "front", "port": 18445}], "hostnames": ["g.example.com"],
            "rules": [{"matches": [{"method": {"service": "a.B"}}, {"method": {"method": "C"}}], "backendRefs": backend}]}),
        ),
        (
            "gateway.networking.k8s.io/v1/TLSRoute",
            "books/front",
            json!({"parentRefs": [{"name": "front"}], "hostnames": ["db.example.com"], "rules": to_db}),
        ),
        (
            "gateway.networking.k8s.io/v1/TCPRoute",
            "books/front",
            json!({"parentRefs": [{"name": "front"}], "rules": [
            {"backendRefs": [{"name": "db", "port": 3306}, {"name": "nobody", "port": 1}]}]}),
        ),
        (
            "gateway.networking.k8s.io/v1/HTTPRoute",
            "books/ratings",
            json!({"parentRefs": [{"group": "", "kind": "Service", "name": "productpage"}], "rules": rules}),
        ),
        (
            "gateway.networking.k8s.io/v1/BackendTLSPolicy",
            "books/db",
            json!({"targetRefs": [{"group": "", "kind": "Service", "name": "db", "sectionName": "tls"}],
            "validation": {"hostname": "db.example.com", "wellKnownCACertificates": "System"}}),
        ),
    ]
}

fn import() -> Value {
    json!({"cluster": "east", "lease": "live", "service": {
        "name": "reviews", "namespace": "books", "host": "reviews.books.svc.cluster.local",
        "ports": [{"name": "http", "port": 9080, "protocol": "http"}],
        "groups": [{"labels": {"app": "reviews"}, "locality": "r/z", "healthyWeight": 2}],
        "serviceAccounts": ["spiffe://mesh.local/ns/books/sa/reviews"], "exportedAt": 5, "slots": 1}})
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Runs the Envoy named by `ENVOY_BIN` as a node and returns its dump once it has listeners.
async fn run(plane: &crate::Plane, id: &str, metadata: Value, delta: bool) -> Value {
    start(plane, id, metadata, delta).await.1
}

/// The same, and the process.
async fn start(plane: &crate::Plane, id: &str, mut metadata: Value, delta: bool) -> (Running, Value) {
    let envoy = std::env::var("ENVOY_BIN").expect("ENVOY_BIN names an Envoy binary");
    let dir = plane.dir.path();
    for (key, file) in [
        ("TLS_CLIENT_CERT_CHAIN", "cert.pem"),
        ("TLS_CLIENT_KEY", "key.pem"),
        ("TLS_CLIENT_ROOT_CERT", "root.pem"),
    ] {
        metadata[key] = dir.join(file).to_str().unwrap().into();
    }
    let admin = free_port();
    let bootstrap = json!({
        "node": {"id": id, "cluster": "test", "metadata": metadata},
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": admin}}},
        "dynamic_resources": {
            "ads_config": {"api_type": if delta { "DELTA_GRPC" } else { "GRPC" }, "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": "xds"}}]},
            "cds_config": {"ads": {}, "resource_api_version": "V3"},
            "lds_config": {"ads": {}, "resource_api_version": "V3"}},
        "static_resources": {"clusters": [{"name": "xds", "type": "STATIC", "connect_timeout": "1s",
            "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}}}},
            "load_assignment": {"cluster_name": "xds", "endpoints": [{"lb_endpoints": [{"endpoint": {"address":
                {"socket_address": {"address": "127.0.0.1", "port_value": plane.xds.port()}}}}]}]}}]}});
    let config = dir.join(format!("envoy-{admin}.json"));
    fs::write(&config, bootstrap.to_string()).unwrap();
    let log = dir.join(format!("envoy-{admin}.log"));
    let child = Command::new(envoy)
        .args([
            "-c",
            config.to_str().unwrap(),
            "--use-dynamic-base-id",
            "-l",
            "warning",
            "--concurrency",
            "1",
        ])
        .args(["--log-path", log.to_str().unwrap()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let running = Running(child);
    let board = plane.pilot.status();
    // Until all types are answered; what forwards by server name has no routes.
    for _ in 0..300 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let clients = board.clients();
        let Some(c) = clients.iter().find(|c| c.node.id == id) else { continue };
        let nacked: Vec<String> =
            c.types.iter().filter_map(|(t, s)| s.error.as_ref().map(|e| format!("{t}: {e}"))).collect();
        assert!(nacked.is_empty(), "{nacked:#?}");
        let synced = c.types.len() >= if id.starts_with("router") { 3 } else { 4 }
            && c.types.values().all(|s| s.state() == "SYNCED");
        if synced {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let dump = get(admin, "/config_dump?include_eds").await.unwrap_or_default();
            let body = dump.split_once("\r\n\r\n").map(|(_, b)| b).unwrap_or_default();
            // Chunked: the JSON starts at the first brace, and chunk sizes are lines of their own.
            return (running, parse_chunked(body));
        }
    }
    panic!("{:#?}\n{}", board.clients(), fs::read_to_string(log).unwrap_or_default());
}

fn parse_chunked(body: &str) -> Value {
    let mut out = String::new();
    let mut rest = body;
    while let Some((size, after)) = rest.split_once("\r\n") {
        let Ok(n) = usize::from_str_radix(size.trim(), 16) else { break };
        if n == 0 {
            break;
        }
        out.push_str(&after[..n]);
        rest = &after[n + 2..];
    }
    serde_json::from_str(if out.is_empty() { body } else { &out }).unwrap()
}

fn no_errors(dump: &Value) {
    let text = dump.to_string();
    assert!(!text.contains("error_state"), "{dump:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an Envoy binary in ENVOY_BIN"]
async fn envoy_accepts_everything() {
    let plane = plane().await;
    write_certificates(plane.dir.path());
    let mut docs = rich();
    docs.extend(gateway_api());
    docs.push((
        "authentication.istio.io/v1alpha1/Policy",
        "books/default",
        json!({"peers": [{"mtls": {"mode": "PERMISSIVE", "allowTls": true}}]}),
    ));
    let file = |name: &str| plane.dir.path().join(name).display().to_string();
    docs.push(("networking.istio.io/v1/Gateway", "books/quic", json!({"selector": {"istio": "ingressgateway"}, "servers": [
        {"port": {"number": 18444, "name": "https", "protocol": "HTTPS"}, "hosts": ["shop.example.com"],
         "tls": {"mode": "MUTUAL", "serverCertificate": file("cert.pem"), "privateKey": file("key.pem"), "caCertificates": file("root.pem")}}]})));
    plane.galley.publish(documents(&docs));
    plane.federation.publish(documents(&[(
        mesh_model::federation::type_url::IMPORTED_SERVICE,
        "east/books/reviews",
        import(),
    )]));
    plane.federation.publish(documents(&[(
        mesh_model::federation::type_url::PEER_CLUSTER,
        "east",
        json!({"id": "east", "network": "east", "gateways": [{"address": "127.20.0.2:15443", "weight": 1}],
               "transports": ["tcp"], "lease": "live"}),
    )]));
    until(&mut plane.pilot.ready(), "readiness", |r| *r).await;
    let source = plane.pilot.ads_service().source().clone();
    for _ in 0..100 {
        let w = source.world();
        if w.is_some_and(|w| !w.config.peers.is_empty() && !w.config.authorization_policies.is_empty()) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let labels = json!({"app": "productpage"});
    for delta in [true, false] {
        let meta = json!({"NAMESPACE": "books", "SERVICE_ACCOUNT": "productpage", "LABELS": labels});
        let id = "sidecar~127.10.0.1~productpage-v1.books~books.svc.cluster.local";
        let dump = run(&plane, id, meta, delta).await;
        no_errors(&dump);
        let text = dump.to_string();
        for part in [
            "virtualInbound",
            "virtualOutbound",
            "outbound|9080|v1|reviews.books.svc.cluster.local",
            "ext.example.com",
            "istio_ext_authz_g_",
            "AllowAnyDynamicDNSCluster",
            "suppress_envoy_headers",
            "PreserveCaseFormatterConfig",
            "include_request_attempt_count",
            "DROP_HEADER",
            // Istio's line, which Envoy's is not.
            "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
            "omit_empty_values",
            "envoy.filters.network.ext_authz",
            "envoy.filters.network.connection_limit",
        ] {
            assert!(text.contains(part), "{part} is missing");
        }

        let meta = json!({"NAMESPACE": "books", "LABELS": {"istio": "eastwestgateway"}, "ROUTER_MODE": "sni-dnat", "INTERCEPTION_MODE": "NONE"});
        let id = "router~127.10.0.2~eastwest.books~books.svc.cluster.local";
        let dump = run(&plane, id, meta, delta).await;
        no_errors(&dump);
        assert!(dump.to_string().contains("peer|east"));

        let meta =
            json!({"NAMESPACE": "books", "LABELS": {"istio": "ingressgateway"}, "INTERCEPTION_MODE": "NONE"});
        let id = "router~127.10.0.3~ingress.books~books.svc.cluster.local";
        let dump = run(&plane, id, meta, delta).await;
        no_errors(&dump);
        let text = dump.to_string();
        for part in
            ["shop.example.com", "initial_connection_window_size", "per_connection_buffer_limit_bytes"]
        {
            assert!(text.contains(part), "{part} is missing");
        }

        let name = json!({"gateway.networking.k8s.io/gateway-name": "front"});
        let meta = json!({"NAMESPACE": "books", "LABELS": name, "INTERCEPTION_MODE": "NONE"});
        let id = "router~127.10.0.4~front.books~books.svc.cluster.local";
        let dump = run(&plane, id, meta, delta).await;
        no_errors(&dump);
        let text = dump.to_string();
        for part in
            ["path_separated_prefix", "books/front/0", "g.example.com", "db.example.com", "127.10.0.4_18447"]
        {
            assert!(text.contains(part), "{part} is missing");
        }
    }
}

/// Every collector of spans and log entries that the mesh may have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an Envoy binary in ENVOY_BIN"]
async fn envoy_takes_collectors() {
    let at = |port: u16, more: Value| {
        let mut of = json!({"service": "authz.books.svc.cluster.local", "port": port});
        of.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        of
    };
    let keys = json!([{"name": "k", "value": "v"}]);
    let logs = json!([
        {"name": "h", "envoyHttpAls": at(9000, json!({"additionalRequestHeadersToLog": ["x-a"]}))},
        {"name": "t", "envoyTcpAls": at(9000, json!({}))},
        {"name": "o", "envoyOtelAls": at(9000, json!({"logFormat": {"labels": {"a": "%PROTOCOL%"}}}))}]);
    for (tracer, part) in [
        (json!({"zipkin": at(8000, json!({"headers": keys}))}), "/api/v2/spans"),
        (
            json!({"zipkin": at(8000, json!({"enable64bitTraceId": true, "traceContextOption": "USE_B3_WITH_W3C_PROPAGATION"}))}),
            "USE_B3_WITH_W3C_PROPAGATION",
        ),
        (
            json!({"opentelemetry": at(9000, json!({"grpc": {"timeout": "2s", "initialMetadata": keys},
            "serviceAttributeEnrichment": "OTEL_SEMANTIC_CONVENTIONS"}))}),
            "EnvironmentResourceDetectorConfig",
        ),
        (
            json!({"opentelemetry": at(8000, json!({"http": {"path": "/v1/traces", "timeout": "2s", "headers": keys}}))}),
            "/v1/traces",
        ),
        (json!({"datadog": at(8000, json!({}))}), "DatadogConfig"),
        (json!({"skywalking": at(9000, json!({}))}), "SkyWalkingConfig"),
    ] {
        let mut tracer = tracer;
        tracer["name"] = json!("s");
        let mut providers = logs.as_array().unwrap().clone();
        providers.push(tracer);
        let mesh = json!({"extensionProviders": providers,
            "defaultProviders": {"accessLogging": ["h", "t", "o"], "tracing": ["s"]},
            "defaultConfig": {"tracing": {"sampling": 100.0, "maxPathTagLength": 99, "customTags": {
                "a": {"literal": {"value": "l"}}, "b": {"environment": {"name": "HOME", "defaultValue": "d"}},
                "c": {"header": {"name": "x-c"}}}}}});
        let plane = plane().await;
        write_certificates(plane.dir.path());
        let mut docs = rich();
        // Who uses the providers of the other mesh.
        docs.retain(|(t, n, _)| !t.ends_with("MeshConfig") && !n.contains("/ask-"));
        docs.push(("flotilla.dev/v1alpha1/MeshConfig", "mesh", mesh));
        plane.galley.publish(documents(&docs));
        until(&mut plane.pilot.ready(), "readiness", |r| *r).await;
        for (kind, labels) in
            [("sidecar", json!({"app": "productpage"})), ("router", json!({"istio": "ingressgateway"}))]
        {
            let mode = if kind == "router" { "NONE" } else { "REDIRECT" };
            let meta = json!({"NAMESPACE": "books", "WORKLOAD_NAME": "w", "LABELS": labels, "INTERCEPTION_MODE": mode});
            let id = format!("{kind}~127.10.0.1~w.books~books.svc.cluster.local");
            let dump = run(&plane, &id, meta, true).await;
            no_errors(&dump);
            let text = dump.to_string();
            let mut wanted = vec![
                part,
                "HttpGrpcAccessLogConfig",
                "TcpGrpcAccessLogConfig",
                "OpenTelemetryAccessLogConfig",
                "custom_tags",
            ];
            if kind == "router" {
                wanted.push("spawn_upstream_span");
            } else {
                wanted.push("istio.canonical_service");
            }
            for part in wanted {
                assert!(text.contains(part), "{part} is missing at a {kind}");
            }
        }
    }
}

/// One request, and the head of its answer.
async fn ask(address: &str, path: &str) -> String {
    let mut s = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: shop.example.com\r\nConnection: close\r\n\r\n");
    s.write_all(request.as_bytes()).await.unwrap();
    let mut out = String::new();
    tokio::time::timeout(Duration::from_secs(10), s.read_to_string(&mut out)).await.unwrap().unwrap();
    out.to_ascii_lowercase()
}

fn patch(to: &str, matches: Value, operation: &str, value: Value) -> Value {
    json!({"applyTo": to, "match": matches, "patch": {"operation": operation, "value": value}})
}

/// What EnvoyFilters patch in is there, nothing of it is refused, and it does what it should.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an Envoy binary in ENVOY_BIN"]
async fn envoy_takes_patches() {
    const HTTP: &str = "type.googleapis.com/envoy.extensions.filters.http";
    let plane = plane().await;
    write_certificates(plane.dir.path());
    let mut docs = rich();
    // Whose answer would be theirs.
    docs.retain(|(t, ..)| !t.ends_with("AuthorizationPolicy"));
    docs.push((
        "networking.istio.io/v1/Gateway",
        "books/patched",
        json!({"selector": {"istio": "ingressgateway"},
        "servers": [{"port": {"number": 18090, "name": "http", "protocol": "HTTP"}, "hosts": ["*"]}]}),
    ));
    docs.push(("networking.istio.io/v1/VirtualService", "books/patched", json!({"hosts": ["shop.example.com"],
        "gateways": ["patched"], "http": [{"name": "all", "directResponse": {"status": 200, "body": {"string": "hello"}}}]})));
    let router = |context: &str| {
        json!({"context": context, "listener": {"filterChain": {"filter": {
            "name": "envoy.filters.network.http_connection_manager", "subFilter": {"name": "envoy.filters.http.router"}}}}})
    };
    let lua = json!({"name": "books.lua", "typed_config": {"@type": format!("{HTTP}.lua.v3.Lua"), "default_source_code":
        {"inline_string": "function envoy_on_response(h) h:headers():add('x-lua', 'yes') end"}}});
    let mutation = json!({"name": "books.mutation", "typed_config": {"@type": format!("{HTTP}.header_mutation.v3.HeaderMutation"),
        "mutations": {"response_mutations": [{"append": {"header": {"key": "x-mutated", "value": "%REQ(:PATH)%"}}}]}}});
    let untyped = json!({"name": "books.untyped", "typed_config": {"@type": "type.googleapis.com/udpa.type.v1.TypedStruct",
        "type_url": format!("{HTTP}.lua.v3.Lua"), "value": {"default_source_code":
        {"inline_string": "function envoy_on_response(h) h:headers():add('x-untyped', 'yes') end"}}}});
    let discovered = json!({"name": "books.apart", "config_discovery": {"config_source": {"ads": {}, "resource_api_version": "V3"},
        "type_urls": [format!("{HTTP}.lua.v3.Lua")]}});
    let apart = json!({"name": "books.apart", "typed_config": {"@type": format!("{HTTP}.lua.v3.Lua"), "default_source_code":
        {"inline_string": "function envoy_on_response(h) h:headers():add('x-apart', 'yes') end"}}});
    let teapot = json!({"name": "teapot", "match": {"path": "/teapot"}, "direct_response": {"status": 418}});
    docs.push(("networking.istio.io/v1alpha3/EnvoyFilter", "books/patches", json!({"configPatches": [
        patch("HTTP_FILTER", router("ANY"), "INSERT_BEFORE", lua),
        patch("HTTP_FILTER", router("ANY"), "INSERT_BEFORE", mutation),
        patch("HTTP_FILTER", router("GATEWAY"), "INSERT_BEFORE", untyped),
        patch("HTTP_FILTER", router("GATEWAY"), "INSERT_BEFORE", discovered),
        patch("EXTENSION_CONFIG", json!({"context": "GATEWAY"}), "ADD", apart),
        patch("HTTP_ROUTE", json!({"context": "GATEWAY", "routeConfiguration": {"portNumber": 18090, "vhost": {"route": {"name": "all"}}}}),
            "MERGE", json!({"response_headers_to_add": [{"header": {"key": "x-route", "value": "yes"}}]})),
        patch("HTTP_ROUTE", json!({"context": "GATEWAY", "routeConfiguration": {"portNumber": 18090}}), "INSERT_FIRST", teapot),
        patch("CLUSTER", json!({"cluster": {"service": "reviews.books.svc.cluster.local", "subset": "v1"}}), "MERGE",
            json!({"connect_timeout": "1.250s", "circuit_breakers": {"thresholds": [{"priority": "HIGH", "max_requests": 77}]}})),
        patch("CLUSTER", json!({"context": "SIDECAR_INBOUND"}), "MERGE", json!({"alt_stat_name": "own"})),
        patch("CLUSTER", json!({}), "ADD", json!({"name": "added", "type": "STATIC", "connect_timeout": "1s"})),
        patch("NETWORK_FILTER", json!({"listener": {"filterChain": {"filter": {"name": "envoy.filters.network.http_connection_manager"}}}}),
            "MERGE", json!({"typed_config": {"@type":
                "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                "max_request_headers_kb": 33}})),
        patch("LISTENER", json!({"context": "SIDECAR_OUTBOUND"}), "MERGE", json!({"per_connection_buffer_limit_bytes": 44_444})),
        patch("LISTENER", json!({"context": "GATEWAY"}), "ADD", json!({"name": "added-listener",
            "address": {"socket_address": {"address": "127.10.0.3", "port_value": 18091}},
            "filter_chains": [{"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": {"@type":
                "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": "a", "cluster": "added"}}]}]})),
        // Two that would break it.
        patch("HTTP_FILTER", router("ANY"), "REMOVE", Value::Null),
        patch("CLUSTER", json!({}), "MERGE", json!({"connect_timeout": "0s"})),
    ]})));
    plane.galley.publish(documents(&docs));
    until(&mut plane.pilot.ready(), "readiness", |r| *r).await;
    let source = plane.pilot.ads_service().source().clone();
    for _ in 0..100 {
        if source.world().is_some_and(|w| !w.config.envoy_filters.is_empty()) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for delta in [true, false] {
        let meta =
            json!({"NAMESPACE": "books", "LABELS": {"istio": "ingressgateway"}, "INTERCEPTION_MODE": "NONE"});
        let id = "router~127.10.0.3~ingress.books~books.svc.cluster.local";
        let (envoy, dump) = start(&plane, id, meta, delta).await;
        no_errors(&dump);
        let text = dump.to_string();
        for part in ["added-listener", "\"max_request_headers_kb\":33", "books.untyped"] {
            assert!(text.contains(part), "{part} is missing");
        }
        let answer = ask("127.10.0.3:18090", "/some").await;
        for part in
            ["200 ok", "x-lua: yes", "x-mutated: /some", "x-untyped: yes", "x-apart: yes", "x-route: yes"]
        {
            assert!(answer.contains(part), "{part} is missing: {answer}");
        }
        assert!(ask("127.10.0.3:18090", "/teapot").await.contains("418"));
        let problems = plane.pilot.problems();
        let left_out: Vec<&str> = problems
            .iter()
            .filter(|p| p.object == "EnvoyFilter books/patches")
            .map(|p| p.message.split_once(':').unwrap().0)
            .collect();
        assert_eq!(left_out, ["configPatches[13]", "configPatches[14]"], "{problems:#?}");
        drop(envoy);

        let meta =
            json!({"NAMESPACE": "books", "SERVICE_ACCOUNT": "productpage", "LABELS": {"app": "productpage"}});
        let id = "sidecar~127.10.0.1~productpage-v1.books~books.svc.cluster.local";
        let dump = run(&plane, id, meta, delta).await;
        no_errors(&dump);
        let text = dump.to_string();
        for part in [
            "\"connect_timeout\":\"1.250s\"",
            "\"max_requests\":77",
            "\"alt_stat_name\":\"own\"",
            "\"name\":\"added\"",
            "books.lua",
            "44444",
        ] {
            assert!(text.contains(part), "{part} is missing");
        }
    }
}

//! Gateways as their users meet them: real processes on loopback addresses, `curl` and `openssl` as
//! clients and as servers.

#[path = "gateways/conformance.rs"]
mod conformance;
#[path = "gateways/gateway_api.rs"]
mod gateway_api;
#[path = "gateways/http3.rs"]
mod http3;
#[path = "gateways/restart.rs"]
mod restart;
mod support;
#[path = "gateways/tls.rs"]
mod tls;

use std::{net::SocketAddr, time::Duration};

use support::{
    Authority, Cluster, HTTP_PROXY, HttpServer, IN_MESH, NAMESPACE, SYSTEM, TlsClient, TlsServer, Transport,
    curl, flotilla, mesh, metric, run, service, until, until_status,
};

/// A `Gateway` in the system namespace that selects `<gateway>gateway`.
fn gateway(name: &str, gateway: &str, servers: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {{name: {name}, namespace: {SYSTEM}}}\nspec:\n  \
         selector: {{istio: {gateway}gateway}}\n  servers:\n{servers}"
    )
}

fn virtual_service(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: {name}, namespace: \
         {NAMESPACE}}}\nspec:\n{spec}"
    )
}

/// `host:port:address`, as `curl --resolve` wants it.
fn resolve(host: &str, at: SocketAddr) -> String {
    format!("{host}:{}:{}", at.port(), at.ip())
}

#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn ingress_terminates_tls() {
    let mut west = Cluster::founded();
    let app = HttpServer::start((west.workload(1), 9080).into(), "shop");
    let (first, second, clients) =
        (Authority::new("first"), Authority::new("second"), Authority::new("clients"));
    let (first_root, second_root) =
        (first.write_root(&west.path("first.pem")), second.write_root(&west.path("second.pem")));
    let credentials = west.credentials();
    first.issue(&credentials.join("shop"), "shop.example");
    first.issue(&credentials.join("staff"), "staff.example");
    clients.write_root(&credentials.join("staff/ca.crt"));
    let (crt, key) = clients.issue(&west.path("alice"), "alice");
    west.write("shop.yaml", &service("shop", west.workload(1), app.address.port(), ""));
    west.write(
        "edge.yaml",
        &[
            gateway(
                "edge",
                "ingress",
                "  - port: {number: 8443, name: shop, protocol: HTTPS}\n    hosts: [shop.example]\n    \
                 tls: {mode: SIMPLE, credentialName: shop}\n  \
                 - port: {number: 8443, name: staff, protocol: HTTPS}\n    hosts: [staff.example]\n    \
                 tls: {mode: MUTUAL, credentialName: staff, minProtocolVersion: TLSV1_3}\n  \
                 - port: {number: 8080, name: http, protocol: HTTP}\n    hosts: [shop.example]\n    \
                 tls: {httpsRedirect: true}\n",
            ),
            virtual_service(
                "shop",
                &format!(
                    "  hosts: [shop.example, staff.example]\n  gateways: [{SYSTEM}/edge]\n  http:\n  \
                     - route:\n    - destination: {{host: shop, port: {{number: 9080}}}}\n"
                ),
            ),
        ]
        .concat(),
    );
    let ip = west.host(2);
    west.gateway("ingress", ip, &[]);
    let at = SocketAddr::from((ip, 8443));
    let (shop, staff) = (resolve("shop.example", at), resolve("staff.example", at));
    let to_shop = ["--resolve", shop.as_str(), "--cacert", &first_root, "https://shop.example:8443/x"];

    let a = until_status("the shop over HTTPS", 200, &to_shop);
    assert!(a.body.starts_with("served-by: shop\nGET /x"), "{a:?}");
    for version in [["--tlsv1.2", "--tls-max", "1.2"], ["--tlsv1.3", "--tls-max", "1.3"]] {
        let a = curl(&[&version[..], &to_shop].concat());
        assert_eq!(a.status, 200, "{version:?}: {a:?}");
    }
    let o = run(
        "openssl",
        &[
            "s_client",
            "-connect",
            &at.to_string(),
            "-servername",
            "shop.example",
            "-tls1_1",
            "-cipher",
            "ALL:@SECLEVEL=0",
        ],
    );
    assert!(o.code != 0 && o.err.contains("alert"), "the gateway refuses TLS 1.1: {o:?}");

    // A certificate of another root, a name that nobody serves, and a host behind the wrong name.
    let a = curl(&["--resolve", &shop, "--cacert", &second_root, "https://shop.example:8443/"]);
    assert_eq!((a.code, a.status), (60, 0), "curl does not believe another root: {a:?}");
    let other = resolve("other.example", at);
    let a = curl(&["-k", "--resolve", &other, "https://other.example:8443/"]);
    assert_eq!((a.code, a.status), (35, 0), "an unknown server name is closed: {a:?}");
    let a = curl(&[&to_shop[..], &["-H", "host: other.example"]].concat());
    assert_eq!(a.status, 404, "{a:?}");

    let a = curl(&["-H", "host: shop.example", &format!("http://{ip}:8080/x?y=1")]);
    assert_eq!((a.status, a.location.as_str()), (301, "https://shop.example/x?y=1"), "{a:?}");

    // MUTUAL.
    let to_staff = ["--resolve", staff.as_str(), "--cacert", &first_root, "https://staff.example:8443/"];
    let a = curl(&to_staff);
    assert!(a.code != 0 && a.status == 0, "without a certificate: {a:?}");
    let with = ["--cert", crt.as_str(), "--key", &key];
    let a = curl(&[&with[..], &to_staff].concat());
    assert_eq!(a.status, 200, "with a certificate: {a:?}");
    let a = curl(&[&with[..], &to_staff, &["--tls-max", "1.2"]].concat());
    assert!(a.code != 0 && a.status == 0, "minProtocolVersion is 1.3: {a:?}");
    let (crt, key) = first.issue(&west.path("mallory"), "mallory");
    let a = curl(&[&["--cert", crt.as_str(), "--key", &key][..], &to_staff].concat());
    assert!(a.code != 0 && a.status == 0, "with a certificate of another root: {a:?}");

    // Rotation: new connections see the new certificate, the open one does not notice.
    let mut open = TlsClient::connect(at, "shop.example", &[]);
    open.get("shop.example", "/before", "GET /before").unwrap();
    second.issue(&credentials.join("shop"), "shop.example");
    let to_new = ["--resolve", shop.as_str(), "--cacert", &second_root, "https://shop.example:8443/"];
    until_status("the new certificate", 200, &to_new);
    assert_eq!(curl(&to_shop).code, 60, "the old certificate is gone");
    open.get("shop.example", "/after", "GET /after").unwrap();
}

#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn ingress_passes_tls_through_by_server_name() {
    let mut west = Cluster::founded();
    let (bank, post) = (Authority::new("bank"), Authority::new("post"));
    let (bank_root, post_root) =
        (bank.write_root(&west.path("bank.pem")), post.write_root(&west.path("post.pem")));
    let (ip, port) = (west.host(2), 9443);
    let mut servers = Vec::new();
    let mut config = gateway(
        "edge",
        "ingress",
        "  - port: {number: 8443, name: tls, protocol: TLS}\n    hosts: ['*.example']\n    tls: {mode: PASSTHROUGH}\n",
    );
    for (authority, name, n) in [(&bank, "bank", 1), (&post, "post", 2)] {
        let host = format!("{name}.example");
        let (crt, key) = authority.issue(&west.path(name), &host);
        servers.push(TlsServer::start((west.workload(n), port).into(), &crt, &key));
        config += &format!(
            "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: \
             {NAMESPACE}}}\nspec:\n  hosts: [{name}.internal]\n  location: MESH_EXTERNAL\n  resolution: STATIC\n  ports:\n  \
             - {{number: 443, name: tls, protocol: TLS, targetPort: {port}}}\n  endpoints:\n  - address: {}\n",
            west.workload(n)
        );
        config += &virtual_service(
            name,
            &format!(
                "  hosts: [{host}]\n  gateways: [{SYSTEM}/edge]\n  tls:\n  - match:\n    - {{port: 8443, sniHosts: \
                 [{host}]}}\n    route:\n    - destination: {{host: {name}.internal, port: {{number: 443}}}}\n"
            ),
        );
    }
    west.write("edge.yaml", &config);
    west.gateway("ingress", ip, &[]);
    let at = SocketAddr::from((ip, 8443));
    for (name, root, other) in [("bank", &bank_root, &post_root), ("post", &post_root, &bank_root)] {
        let (host, url) = (format!("{name}.example"), format!("https://{name}.example:8443/"));
        let to = resolve(&host, at);
        // The session ends at the server of that name: its own root, and no other, verifies it.
        let a = until_status(name, 200, &["--resolve", &to, "--cacert", root, &url]);
        assert!(a.body.contains("s_server"), "{a:?}");
        assert_eq!(curl(&["--resolve", &to, "--cacert", other, &url]).code, 60);
    }
    let a = curl(&["-k", "--resolve", &resolve("nobody.example", at), "https://nobody.example:8443/"]);
    assert_eq!((a.code, a.status), (35, 0), "{a:?}");
    let a = curl(&[&format!("http://{at}/")]);
    assert!(a.code != 0 && a.status == 0, "plaintext: {a:?}");
}

fn service_entry(name: &str, host: &str, resolution: &str, address: &str, port: u16) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: \
         {NAMESPACE}}}\nspec:\n  hosts: [{host}]\n  location: MESH_EXTERNAL\n  resolution: {resolution}\n  ports:\n  \
         - {{number: 80, name: http, protocol: HTTP}}\n  endpoints:\n  - {{address: {address}, ports: {{http: {port}}}}}\n"
    )
}

#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn egress_directly_and_through_a_gateway() {
    let mut west = Cluster::founded();
    // Two servers that the mesh knows by documents only, one found by DNS.
    let fixed = HttpServer::start((west.workload(200), 0).into(), "fixed");
    let named = HttpServer::start(([127, 0, 0, 1], 0).into(), "named");
    west.write(
        "external.yaml",
        &[
            service_entry(
                "fixed",
                "fixed.example",
                "STATIC",
                &fixed.address.ip().to_string(),
                fixed.address.port(),
            ),
            service_entry("named", "named.example", "DNS", "localhost", named.address.port()),
        ]
        .concat(),
    );
    let (caller, egress) = (west.workload(1), west.host(4));
    west.sidecar("caller", caller, None);
    west.ready(caller);
    let proxy = format!("http://{caller}:{HTTP_PROXY}");
    for (name, more) in [("fixed", ""), ("named", ":80")] {
        let url = format!("http://{name}.example{more}/direct");
        let a = until_status(&url, 200, &["-x", &proxy, &url]);
        assert!(a.body.starts_with(&format!("served-by: {name}\nGET /direct")), "{a:?}");
    }
    west.logged("caller", &["GET /direct", "outbound|80||fixed.example"]);

    // Through the gateway: the sidecar proves who it is, the gateway calls in clear text.
    west.gateway("egress", egress, &[]);
    west.write(
        "egress.yaml",
        &[
            format!(
                "---\napiVersion: v1\nkind: Service\nmetadata: {{name: egress, namespace: {SYSTEM}}}\nspec:\n  selector: \
                 {{istio: egressgateway}}\n  ports:\n  - {{name: https, port: 8443}}\n\
                 ---\napiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: egress, namespace: \
                 {SYSTEM}}}\nspec:\n  address: {egress}\n  serviceAccount: egress\n  labels: {{istio: \
                 egressgateway{IN_MESH}}}\n\
                 ---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: egress, namespace: \
                 {NAMESPACE}}}\nspec:\n  host: egress.{SYSTEM}.svc.cluster.local\n  trafficPolicy:\n    tls: {{mode: \
                 ISTIO_MUTUAL, sni: fixed.example}}\n"
            ),
            gateway(
                "egress",
                "egress",
                "  - port: {number: 8443, name: https, protocol: HTTPS}\n    hosts: [fixed.example]\n    tls: {mode: \
                 ISTIO_MUTUAL}\n",
            ),
            virtual_service(
                "fixed",
                &format!(
                    "  hosts: [fixed.example]\n  gateways: [mesh, {SYSTEM}/egress]\n  http:\n  \
                     - match: [{{gateways: [mesh], port: 80}}]\n    route:\n    - destination: {{host: \
                     egress.{SYSTEM}.svc.cluster.local, port: {{number: 8443}}}}\n  \
                     - match: [{{gateways: [{SYSTEM}/egress], port: 8443}}]\n    route:\n    - destination: {{host: \
                     fixed.example, port: {{number: 80}}}}\n"
                ),
            ),
        ]
        .concat(),
    );
    let through = "http://fixed.example/through";
    let line = until("the gateway carries it", || {
        let a = curl(&["-x", &proxy, through]);
        let log = west.log("egress");
        let line = log.lines().find(|l| l.contains("GET /through") && l.contains(" 200 ")).map(str::to_owned);
        line.filter(|_| a.status == 200).ok_or(format!("{a:?}\n{log}"))
    });
    assert!(line.contains("fixed.example"), "{line}");
    let a = curl(&["-x", &proxy, through]);
    assert!(a.body.starts_with("served-by: fixed\nGET /through"), "{a:?}");
    // Nobody gets out through it without an identity of the mesh.
    let at = SocketAddr::from((egress, 8443));
    let a = curl(&["-k", "--resolve", &resolve("fixed.example", at), "https://fixed.example:8443/"]);
    assert!(a.code != 0 && a.status == 0, "{a:?}");
}

#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn undeclared_hosts_are_refused() {
    let mut west = Cluster::founded();
    let server = HttpServer::start((west.workload(200), 0).into(), "declared");
    west.write("mesh.yaml", &mesh("  outboundTrafficPolicy: {mode: REGISTRY_ONLY}\n"));
    west.write(
        "external.yaml",
        &service_entry(
            "declared",
            "declared.example",
            "STATIC",
            &server.address.ip().to_string(),
            server.address.port(),
        ),
    );
    let caller = west.workload(1);
    west.sidecar("caller", caller, None);
    west.ready(caller);
    let proxy = format!("http://{caller}:{HTTP_PROXY}");
    until_status("the declared host", 200, &["-x", &proxy, "http://declared.example/"]);
    // By name and by the very address that the declared host has.
    for url in ["http://undeclared.example/".to_owned(), format!("http://{}/", server.address)] {
        let a = curl(&["-x", &proxy, &url]);
        assert_eq!(a.status, 502, "{url}: {a:?}");
        assert!(!a.body.contains("served-by"), "{a:?}");
    }
    west.logged("caller", &["undeclared.example", " 502 "]);
}

#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn east_west_refuses_what_is_not_exported() {
    let mut west = Cluster::founded();
    let mut config = String::new();
    let mut apps = Vec::new();
    for (name, n) in [("public", 1), ("private", 2)] {
        let ip = west.workload(n);
        apps.push(HttpServer::start((ip, 19080).into(), if n == 1 { "public" } else { "private" }));
        config += &service(name, ip, 9080, IN_MESH);
        west.sidecar(name, ip, Some((ip, 19080).into()));
    }
    config += &format!(
        "---\napiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\nmetadata: {{name: public, namespace: \
         {NAMESPACE}}}\n"
    );
    west.write("app.yaml", &config);
    west.east_west_gateway();
    for ip in [west.host(3), west.workload(1), west.workload(2)] {
        west.ready(ip);
    }
    let at = west.east_west();
    let name = |service: &str, cluster: &str| {
        format!("outbound_.9080_._.{service}.{NAMESPACE}.svc.{cluster}.clusterset.local")
    };
    let state = west.proxy_state("private");
    // `openssl` takes the leaf from one file and what follows it from another.
    let pem = std::fs::read_to_string(state.join("svid-chain.pem")).unwrap();
    let end = "-----END CERTIFICATE-----\n";
    let (leaf, above) = pem.split_once(end).unwrap();
    let (chain, crt) = (west.path("above.pem"), west.path("leaf.pem"));
    std::fs::write(&crt, format!("{leaf}{end}")).unwrap();
    std::fs::write(&chain, above).unwrap();
    let [crt, chain, key] = [crt, chain, state.join("svid-key.pem")].map(|p| p.display().to_string());
    // Sessions of the mesh say so by ALPN.
    let identity = ["-cert", &crt, "-cert_chain", &chain, "-key", &key, "-alpn", "istio"];

    // What is exported is served, to a workload of the mesh.
    until("the exported service", || {
        TlsClient::connect(at, &name("public", "west"), &identity).get("public", "/in", "served-by: public")
    });
    let refused = |what: &str, server_name: &str, extra: &[&str]| {
        let got = TlsClient::connect(at, server_name, extra).get("x", "/refused", "HTTP/1.1");
        assert!(got.is_err(), "{what} was answered");
    };
    let private = name("private", "west");
    refused("a service that is not exported", &private, &identity);
    let istio = format!("outbound_.9080_._.private.{NAMESPACE}.svc.cluster.local");
    refused("the same by its name in Istio", &istio, &identity);
    let unknown = name("public", "nowhere");
    refused("a cluster that is not a member", &unknown, &identity);
    for server_name in [&private, &istio, &unknown] {
        west.logged("eastwest", &[server_name, "NR"]);
    }
    let a = curl(&[&format!("http://{at}/plain")]);
    assert!(a.code != 0 && a.status == 0, "plaintext: {a:?}");
    until("a line for plaintext", || {
        let log = west.log("eastwest");
        let n = log.lines().filter(|l| l.contains(" NR ")).count();
        if n >= 4 { Ok(()) } else { Err(log) }
    });
    // Gateways terminate nothing, so a client without an identity meets the workload's proxy, and no further.
    let public = name("public", "west");
    refused("a client without certificate", &public, &["-alpn", "istio"]);
    let stranger = Authority::new("stranger");
    let (crt, key) = stranger.issue(&west.path("stranger"), "stranger");
    refused("a certificate of another root", &public, &["-cert", &crt, "-key", &key, "-alpn", "istio"]);
    refused("TLS that is not the mesh's", &public, &[]);
    until("lines for failed handshakes", || {
        let log = west.log("public");
        let failed = log.lines().filter(|l| l.contains("\"- - -\" 0 ") && l.contains(&public)).count();
        if failed >= 2 { Ok(()) } else { Err(log) }
    });
    for process in ["public", "private"] {
        let log = west.log(process);
        assert!(!log.contains("/refused"), "{process}: {log}");
    }
}

/// Two clusters, one mesh; west calls `ratings`, which east alone has.
fn joined(transport: Transport) -> (Cluster, Cluster, HttpServer) {
    let mut west = Cluster::start("west", transport);
    west.found();
    let mut east = Cluster::start("east", transport);
    let token = west.flotilla(&["token", "create"]);
    assert_eq!(token.code, 0, "{token:?}");
    west.east_west_gateway();
    west.ready(west.host(3));
    let o = east.flotilla(&["join-cluster", token.out.trim()]);
    assert_eq!(o.code, 0, "{o:?}");
    let ip = east.workload(1);
    let app = HttpServer::start((ip, 19080).into(), "ratings");
    let mut config = service("ratings", ip, 9080, IN_MESH);
    config += &format!(
        "---\napiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\nmetadata: {{name: ratings, namespace: \
         {NAMESPACE}}}\n"
    );
    east.write("app.yaml", &config);
    east.east_west_gateway();
    east.sidecar("ratings", ip, Some(app.address));
    east.ready(east.host(3));
    east.ready(ip);
    // How workloads of west find their own gateway.
    let caller = west.workload(1);
    west.sidecar("caller", caller, None);
    west.ready(caller);
    (west, east, app)
}

#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn gateways_carry_sessions_over_quic() {
    let (west, east, _app) = joined(Transport::Quic);
    let proxy = format!("http://{}:{HTTP_PROXY}", west.workload(1));
    let url = format!("http://ratings.{NAMESPACE}:9080/over");
    let a = until_status("ratings from west", 200, &["-x", &proxy, &url]);
    assert!(a.body.contains("served-by: ratings"), "{a:?}");
    // A gateway that was dialled before it had its certificate is dialled over TCP for ten seconds, and
    // sessions that began so stay there: each look begins one of its own.
    let name = format!("outbound_.9080_._.ratings.{NAMESPACE}.svc.east.clusterset.local");
    let at = |c: &Cluster, name: &str| metric(c.metrics(c.host(3)), name);
    until("sessions over QUIC", || {
        let _session = TlsClient::connect(west.east_west(), &name, &["-alpn", "istio"]);
        std::thread::sleep(Duration::from_millis(200));
        let sent = at(&west, "flotilla_trunk_quic_sessions_total");
        let received = at(&east, "flotilla_trunk_accepted_sessions_total");
        if sent > 0.0 && received > 0.0 { Ok(()) } else { Err(format!("sent {sent}, received {received}")) }
    });
    assert_eq!(curl(&["-x", &proxy, &url]).status, 200);
}

#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn the_demo_passes_over_quic() {
    let o = run(flotilla(), &["demo", "--check", "--transport", "quic"]);
    let report: serde_json::Value = serde_json::from_str(&o.out).unwrap_or_default();
    assert!(o.code == 0 && report["ok"] == true, "{}\n{}", o.err, o.out);
}

#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn commands_answer_in_json_and_exit_codes() {
    let (west, east, _app) = joined(Transport::Tcp);
    let json = |c: &Cluster, args: &[&str]| -> serde_json::Value {
        let o = c.flotilla(args);
        assert_eq!(o.code, 0, "{args:?}: {o:?}");
        serde_json::from_str(&o.out).unwrap_or_else(|e| panic!("{args:?}: {e}: {}", o.out))
    };

    // clusters
    let clusters = until("the peer is connected", || {
        let v = json(&west, &["clusters", "-o", "json"]);
        let c = &v["clusters"][0];
        if c["state"] == "connected" && c["importedServices"] == 1 { Ok(v) } else { Err(v.to_string()) }
    });
    assert_eq!((&clusters["self"], &clusters["trustDomain"]), (&"west".into(), &"mesh.local".into()));
    let peer = &clusters["clusters"][0];
    assert_eq!(peer["cluster"], "east");
    assert_eq!(peer["gateways"], serde_json::json!([east.east_west().to_string()]));
    let text = west.flotilla(&["clusters"]);
    assert!(text.code == 0 && text.out.contains("east"), "{text:?}");

    // proxy-status
    let status = until("all proxies are in sync", || {
        let v = json(&west, &["proxy-status", "-o", "json"]);
        let all = v.as_array().unwrap();
        let synced = all.len() == 2
            && all.iter().all(|p| {
                let t = p["types"].as_object().unwrap();
                !t.is_empty() && t.values().all(|t| t["status"] == "SYNCED")
            });
        if synced { Ok(v) } else { Err(v.to_string()) }
    });
    let names: Vec<&str> = status.as_array().unwrap().iter().map(|p| p["proxy"].as_str().unwrap()).collect();
    assert!(names.contains(&"eastwest.flotilla-system") && names.contains(&"caller.books"), "{names:?}");
    assert!(status.as_array().unwrap().iter().all(|p| p["cluster_id"] == "west"), "{status}");

    // proxy-config
    let caller = format!("caller.{NAMESPACE}");
    // In sync with a control plane that has not yet generated anything for the service that was just imported.
    let ratings = format!("outbound|9080||ratings.{NAMESPACE}.svc.cluster.local");
    let dump = until("the import is in the proxy's configuration", || {
        let v = json(&west, &["proxy-config", &caller, "-o", "json"]);
        let lacks = |k: &&&str| !v[**k].to_string().contains(&ratings);
        match ["clusters", "endpoints"].iter().find(lacks) {
            Some(kind) => Err(format!("no {ratings} in {kind}: {v}")),
            None => Ok(v),
        }
    });
    for kind in ["listeners", "routes"] {
        assert!(dump[kind].as_array().is_some_and(|a| !a.is_empty()), "no {kind}: {dump}");
    }
    let shown = json(&west, &["proxy-config", &caller, "--show", "clusters"]);
    assert_eq!(shown, dump["clusters"]);
    let text = west.flotilla(&["proxy-config", &caller]);
    assert!(text.out.contains(&ratings), "{text:?}");
    let o = west.flotilla(&["proxy-config", "nobody.books"]);
    assert!(o.code == 1 && o.err.contains("nobody.books"), "{o:?}");
    let o = run(flotilla(), &["proxy-status", "--state-dir", "/nonexistent"]);
    assert!(o.code == 2 && o.err.contains("no control plane answers"), "{o:?}");

    // validate
    let (good, bad) = (west.path("good.yaml"), west.path("bad.yaml"));
    std::fs::write(&good, mesh("")).unwrap();
    let wrong = virtual_service("bad", "  hosts: [x]\n  http:\n  - rout: []\n");
    std::fs::write(&bad, mesh("") + &wrong).unwrap();
    let (good, bad) = (good.display().to_string(), bad.display().to_string());
    let o = run(flotilla(), &["validate", "-f", &good, "-o", "json"]);
    assert_eq!(o.code, 0, "{o:?}");
    let o = run(flotilla(), &["validate", "-f", &bad, "-o", "json"]);
    assert_eq!(o.code, 1, "{o:?}");
    let reports: serde_json::Value = serde_json::from_str(&o.out).unwrap();
    assert_eq!(reports.as_array().map(Vec::len), Some(2), "{reports}");
    assert_eq!((&reports[0]["valid"], &reports[1]["valid"]), (&true.into(), &false.into()));
    let r = &reports[1];
    assert_eq!(
        (&r["kind"], &r["namespace"], &r["name"]),
        (&"VirtualService".into(), &NAMESPACE.into(), &"bad".into())
    );
    assert_eq!((&r["document"], &r["file"]), (&serde_json::json!(2), &bad.as_str().into()));
    let e = &r["errors"][0];
    assert!(e["path"].is_string() && e["line"].as_u64() > Some(5) && e["message"].is_string(), "{reports}");
    let o = run(flotilla(), &["validate", "-f", "/nonexistent.yaml", "-o", "json"]);
    assert_eq!(o.code, 2, "{o:?}");
}

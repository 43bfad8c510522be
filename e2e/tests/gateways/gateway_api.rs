//! An ingress gateway that documents of the Gateway API configure.

use std::net::SocketAddr;

use serde_json::Value;

use crate::{
    resolve,
    support::{
        Authority, Cluster, HttpServer, NAMESPACE, SYSTEM, TlsServer, curl, service, until, until_status,
    },
};

fn document(kind: &str, namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: \
         {namespace}}}\nspec:\n{spec}"
    )
}

/// `status` of what there is, as the control plane tells it.
fn status(west: &Cluster) -> Value {
    let socket = west.path("state/debug.sock").display().to_string();
    let a = curl(&["--unix-socket", &socket, "http://localhost/pilot/debug/gatewayz"]);
    serde_json::from_str(&a.body).unwrap_or_else(|e| panic!("{e}: {a:?}"))
}

fn condition(conditions: &Value, name: &str) -> String {
    let all = conditions.as_array().into_iter().flatten();
    let found: Vec<_> =
        all.filter(|c| c["type"] == name).map(|c| format!("{} {}", c["status"], c["reason"])).collect();
    found.concat().replace('"', "")
}

#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn ingress_by_the_gateway_api() {
    let mut west = Cluster::founded();
    let app = HttpServer::start((west.workload(1), 9080).into(), "shop");
    let (edge, inner, clients) = (Authority::new("edge"), Authority::new("inner"), Authority::new("clients"));
    let root = edge.write_root(&west.path("edge.pem"));
    let credentials = west.credentials();
    edge.issue(&credentials.join("shop"), "shop.example");
    // ConfigMaps with roots and nothing else.
    for name in ["clients", "bank-ca"] {
        std::fs::create_dir_all(credentials.join(name)).unwrap();
    }
    clients.write_root(&credentials.join("clients/ca.crt"));
    let (alice, alice_key) = clients.issue(&west.path("alice"), "alice");
    // A backend that speaks TLS.
    let (crt, key) = inner.issue(&west.path("bank"), "bank.example");
    let _bank = TlsServer::start((west.workload(2), 9443).into(), &crt, &key);
    inner.write_root(&credentials.join("bank-ca/ca.crt"));

    let roots = |name: &str| format!("caCertificateRefs: [{{group: '', kind: ConfigMap, name: {name}}}]");
    let parent = |section: &str| {
        format!("  parentRefs: [{{name: edge, namespace: {SYSTEM}, sectionName: {section}}}]\n")
    };
    west.write(
        "edge.yaml",
        &[
            format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}, labels: {{edge: open}}}}\n"),
            service("shop", west.workload(1), app.address.port(), ""),
            service("bank", west.workload(2), 9443, ""),
            document(
                "Gateway",
                SYSTEM,
                "edge",
                &format!(
                    "  gatewayClassName: flotilla\n  tls: {{frontend: {{perPort: [{{port: 8444, tls: {{validation: \
                     {{{}}}}}}}]}}}}\n  listeners:\n  \
                     - {{name: http, port: 8080, protocol: HTTP, allowedRoutes: &open {{namespaces: {{from: Selector, \
                     selector: {{matchLabels: {{edge: open}}}}}}}}}}\n  \
                     - {{name: https, port: 8443, protocol: HTTPS, hostname: shop.example, tls: &tls {{certificateRefs: \
                     [{{name: shop}}]}}, allowedRoutes: *open}}\n  \
                     - {{name: staff, port: 8444, protocol: HTTPS, tls: *tls, allowedRoutes: *open}}\n",
                    roots("clients")
                ),
            ),
            document(
                "HTTPRoute",
                NAMESPACE,
                "to-https",
                &format!(
                    "{}  rules:\n  - filters: [{{type: RequestRedirect, requestRedirect: {{scheme: https, port: 8443}}}}]\n",
                    parent("http")
                ),
            ),
            document(
                "HTTPRoute",
                NAMESPACE,
                "shop",
                &format!(
                    "{}  rules:\n  - matches: [{{path: {{value: /old}}}}]\n    filters:\n    \
                     - {{type: URLRewrite, urlRewrite: {{path: {{type: ReplacePrefixMatch, replacePrefixMatch: /}}}}}}\n    \
                     backendRefs: [{{name: shop, port: 9080}}]\n  \
                     - matches: [{{path: {{value: /bank}}}}]\n    backendRefs: [{{name: bank, port: 9080}}]\n  \
                     - matches: [{{path: {{value: /lost}}}}]\n    backendRefs: [{{name: nobody, port: 9080}}]\n  \
                     - matches: [{{path: {{type: Exact, value: /x}}}}]\n    backendRefs: [{{name: shop, port: 9080}}]\n",
                    parent("https")
                ),
            ),
            document(
                "HTTPRoute",
                NAMESPACE,
                "staff",
                &format!("{}  rules: [{{backendRefs: [{{name: shop, port: 9080}}]}}]\n", parent("staff")),
            ),
            document(
                "BackendTLSPolicy",
                NAMESPACE,
                "bank",
                &format!(
                    "  targetRefs: [{{group: '', kind: Service, name: bank}}]\n  validation: {{hostname: bank.example, {}}}\n",
                    roots("bank-ca")
                ),
            ),
        ]
        .concat(),
    );
    let ip = west.host(2);
    let programmed =
        |west: &Cluster| condition(&status(west)["Gateway"][0]["status"]["conditions"], "Programmed");
    until("the gateway waits for a proxy", || match programmed(&west) {
        p if p == "False Pending" => Ok(()),
        p => Err(p),
    });
    west.gateway("ingress", ip, &["--labels=gateway.networking.k8s.io/gateway-name=edge"]);

    let at = |port: u16| resolve("shop.example", SocketAddr::from((ip, port)));
    let (shop, staff) = (at(8443), at(8444));
    let get = |path: &str| {
        let url = format!("https://shop.example:8443{path}");
        curl(&["--resolve", &shop, "--cacert", &root, &url])
    };
    until_status("the shop", 200, &["--resolve", &shop, "--cacert", &root, "https://shop.example:8443/x"]);
    let a = get("/old/thing");
    assert!(a.body.starts_with("served-by: shop\nGET /thing"), "{a:?}");
    let a = get("/old?q");
    assert!(a.body.starts_with("served-by: shop\nGET /?q"), "{a:?}");
    // Whole segments, an equal path, and a backend that is none.
    assert_eq!((get("/older").status, get("/x/y").status, get("/lost").status), (404, 404, 500));
    let a = curl(&["-H", "host: shop.example", &format!("http://{ip}:8080/x?y")]);
    assert_eq!((a.status, a.location.as_str()), (302, "https://shop.example:8443/x?y"), "{a:?}");

    // TLS to the backend.
    let a = get("/bank");
    assert!(a.status == 200 && a.body.contains("s_server"), "{a:?}");

    // Clients with a certificate.
    let to_staff = ["--resolve", staff.as_str(), "--cacert", &root, "https://shop.example:8444/"];
    let a = curl(&to_staff);
    assert!(a.code != 0 && a.status == 0, "without a certificate: {a:?}");
    let a = curl(&[&["--cert", alice.as_str(), "--key", &alice_key][..], &to_staff].concat());
    assert_eq!(a.status, 200, "with a certificate: {a:?}");

    let s = status(&west);
    let gateway = &s["Gateway"][0]["status"];
    assert_eq!(programmed(&west), "True Programmed", "{s:#}");
    assert_eq!(gateway["addresses"][0]["value"], ip.to_string(), "{s:#}");
    let attached: Vec<_> =
        gateway["listeners"].as_array().into_iter().flatten().map(|l| &l["attachedRoutes"]).collect();
    assert_eq!(attached, [1, 1, 1], "{s:#}");
    let routes = s["HTTPRoute"].as_array().unwrap();
    let shop = routes.iter().find(|r| r["name"] == "shop").unwrap();
    let conditions = &shop["status"]["parents"][0]["conditions"];
    assert_eq!(condition(conditions, "Accepted"), "True Accepted", "{s:#}");
    assert_eq!(condition(conditions, "ResolvedRefs"), "False BackendNotFound", "{s:#}");
}

//! Whole processes: two meshes of different trust domains, each with its own root, federate and part.

#[expect(dead_code, unused_imports, reason = "what is shared is more than this test uses")]
mod support;

use std::{fs, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use mesh_identity::{SecretStore, WORKLOAD_SVID};
use mesh_model::proxy::{SecretRef, UpstreamTls, Validation};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::support::*;

const CONTROL_PLANE: &str = "spiffe://b.example/ns/flotilla-system/sa/control-plane";
const STOREFRONT: &str = "spiffe://b.example/ns/books/sa/storefront";

fn clusters(c: &Cluster) -> Result<Value, String> {
    let o = c.flotilla(&["clusters", "-o", "json"]);
    if o.code != 0 {
        return Err(format!("{o:?}"));
    }
    serde_json::from_str(&o.out).map_err(|e| e.to_string())
}

fn told(what: &str, c: &Cluster, so: impl Fn(&Value) -> bool) -> Value {
    until(&format!("{what}, in {}", c.name), || {
        let v = clusters(c)?;
        if so(&v) { Ok(v) } else { Err(format!("{v:#}")) }
    })
}

fn ok(c: &Cluster, args: &[&str]) -> String {
    let o = c.flotilla(args);
    assert_eq!(o.code, 0, "{args:?}: {o:?}");
    o.out
}

fn connected(v: &Value, n: usize) -> bool {
    let all = v["clusters"].as_array().cloned().unwrap_or_default();
    all.len() == n && all.iter().all(|c| c["state"] == "connected")
}

fn exported(c: &Cluster, name: &str, app: SocketAddr) -> String {
    service(name, c.workload(1), app.port(), IN_MESH)
        + &format!(
            "---\napiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\nmetadata: {{name: {name}, namespace: \
             {NAMESPACE}}}\n"
        )
}

/// A cluster with an exported service at its first workload, and a storefront that calls at its second.
struct Mesh {
    cluster: Cluster,
    name: &'static str,
    app: SocketAddr,
}

impl Mesh {
    fn start(&mut self) {
        self.cluster.write("service.yaml", &exported(&self.cluster, self.name, self.app));
        self.proxies();
    }

    fn proxies(&mut self) {
        let c = &mut self.cluster;
        c.east_west_gateway();
        c.ready(c.host(3));
        c.sidecar(self.name, c.workload(1), Some(self.app));
        c.sidecar("storefront", c.workload(2), None);
        c.ready(c.workload(1));
        c.ready(c.workload(2));
    }

    /// What a storefront here gets of a service.
    fn get(&self, service: &str) -> Answer {
        let proxy = format!("http://{}:{HTTP_PROXY}", self.cluster.workload(2));
        curl(&["--proxy", &proxy, "--noproxy", "", &format!("http://{service}.{NAMESPACE}:9080/")])
    }

    fn gets(&self, what: &str, service: &str, status: u16) -> Answer {
        until(&format!("{what}: {service} from {}", self.cluster.name), || {
            let a = self.get(service);
            if a.status == status { Ok(a) } else { Err(format!("{a:?}")) }
        })
    }

    /// For a while, and not only now.
    fn keeps(&self, what: &str, service: &str, status: u16) {
        for _ in 0..20 {
            let a = self.get(service);
            assert_eq!(a.status, status, "{what}: {service} from {}: {a:?}", self.cluster.name);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn restart(&mut self) {
        for p in ["storefront", self.name, "eastwest", "control-plane"] {
            self.cluster.kill(p);
        }
        self.cluster.control_plane();
        self.proxies();
    }
}

/// Somebody at the other end of a TLS session.
struct Caller {
    chain: String,
    key: String,
}

impl Caller {
    /// With what a proxy of ours keeps.
    fn honest(c: &Cluster, proxy: &str) -> Self {
        let read = |n: &str| fs::read_to_string(c.proxy_state(proxy).join(n)).unwrap();
        Self { chain: read("svid-chain.pem"), key: read("svid-key.pem") }
    }

    /// By the root of `c`, in the name of the other domain's cluster.
    fn forged(c: &Cluster, identity: &str) -> Self {
        let read = |n: &str| fs::read_to_string(c.path("state/ca").join(n)).unwrap();
        let root = KeyPair::from_pem(&read("root-key.pem")).unwrap();
        let root = Issuer::from_ca_cert_pem(&read("root-cert.pem"), root).unwrap();
        let uri = |u: &str| vec![SanType::URI(u.try_into().unwrap())];
        let key = KeyPair::generate().unwrap();
        let mut p = CertificateParams::default();
        p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        p.subject_alt_names = uri("spiffe://b.example/cluster/north");
        let intermediate = p.signed_by(&key, &root).unwrap().pem();
        let issuer = Issuer::from_ca_cert_pem(&intermediate, key).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut p = CertificateParams::default();
        p.subject_alt_names = uri(identity);
        p.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = p.signed_by(&key, &issuer).unwrap().pem();
        Self { chain: leaf + &intermediate, key: key.serialize_pem() }
    }

    /// Whether a server takes the certificate: with TLS 1.3 that shows in its first answer.
    fn knocks(&self, at: SocketAddr, sni: &str, alpn: &str) -> Result<(), String> {
        let store = SecretStore::new();
        store.set_identity(WORKLOAD_SVID, self.chain.as_bytes(), self.key.as_bytes()).unwrap();
        let config = store
            .client_config(&UpstreamTls {
                certificate: Some(SecretRef::Sds(WORKLOAD_SVID.into())),
                validation: Validation { trusted: None, sans: vec![], crl: None },
                sni: sni.into(),
                by_name: false,
                alpn: vec![alpn.into()],
            })
            .unwrap();
        let hello: &[u8] = if alpn == "h2" {
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"
        } else {
            b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
        };
        let name = rustls_pki_types::ServerName::try_from(sni.to_owned()).unwrap();
        let session = async {
            let tcp = TcpStream::connect(at).await?;
            let mut tls = tokio_rustls::TlsConnector::from(Arc::clone(&config)).connect(name, tcp).await?;
            tls.write_all(hello).await?;
            let mut first = [0; 16];
            match tls.read(&mut first).await? {
                0 => Err(std::io::Error::other("closed")),
                _ => Ok(()),
            }
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let limited = async { tokio::time::timeout(Duration::from_secs(10), session).await };
        runtime.block_on(limited).map_err(|e| e.to_string())?.map_err(|e| e.to_string())
    }
}

fn workload_sni(name: &str) -> String {
    format!("outbound_.9080_._.{name}.{NAMESPACE}.svc.cluster.local")
}

/// By principal at the service of a cluster.
fn allow(c: &Cluster, name: &str, principal: &str) {
    c.write(
        "policy.yaml",
        &format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: callers, namespace: \
             {NAMESPACE}}}\nspec:\n  selector: {{matchLabels: {{app: {name}}}}}\n  rules:\n  - from:\n    - source: \
             {{{principal}}}\n"
        ),
    );
}

fn federate(a: &Cluster, b: &Cluster) {
    let token = ok(a, &["token", "create", "--federate", "b.example"]);
    let said = ok(b, &["join-cluster", token.trim()]);
    assert!(said.contains("Federated in"), "{said}");
}

#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn two_trust_domains_federate_and_part() {
    whole(Transport::Tcp);
}

/// The gateways verify each other as well.
#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn two_trust_domains_federate_over_trunks() {
    whole(Transport::Quic);
}

fn whole(transport: Transport) {
    let start = |name, domain| Cluster::start_in(name, domain, transport);
    let (west, east, north) =
        (start("west", "a.example"), start("east", "a.example"), start("north", "b.example"));
    let (details, reviews) = (
        HttpServer::start((west.workload(3), 9080).into(), "details"),
        HttpServer::start((north.workload(3), 9080).into(), "reviews"),
    );
    let other = HttpServer::start((east.workload(3), 9080).into(), "ratings");
    let mut west = Mesh { cluster: west, name: "details", app: details.address };
    let mut east = Mesh { cluster: east, name: "ratings", app: other.address };
    let mut north = Mesh { cluster: north, name: "reviews", app: reviews.address };
    west.cluster.found();
    west.start();
    let token = ok(&west.cluster, &["token", "create"]);
    ok(&east.cluster, &["join-cluster", token.trim()]);
    let o = north.cluster.flotilla(&["found", "--trust-domain", "a.example"]);
    assert!(o.code != 0 && o.err.contains("--trust-domain"), "the control plane is of b.example: {o:?}");
    ok(&north.cluster, &["found", "--trust-domain", "b.example"]);
    east.start();
    north.start();

    // What a token does not say, it does not allow.
    let plain = ok(&west.cluster, &["token", "create"]);
    let o = north.cluster.flotilla(&["join-cluster", plain.trim()]);
    assert!(o.code != 0 && o.err.contains("--federate"), "{o:?}");
    let another = ok(&west.cluster, &["token", "create", "--federate", "c.example"]);
    let o = north.cluster.flotilla(&["join-cluster", another.trim()]);
    assert!(o.code != 0 && o.err.contains("c.example"), "{o:?}");
    let o = west.cluster.flotilla(&["token", "create", "--federate", "a.example"]);
    assert!(o.code != 0 && o.err.contains("without --federate"), "{o:?}");
    let stranger = Caller::honest(&north.cluster, "storefront");
    let inbound = |m: &Mesh| SocketAddr::from((m.cluster.workload(1), 9080));
    stranger.knocks(inbound(&west), &workload_sni("details"), "istio").unwrap_err();

    federate(&west.cluster, &north.cluster);
    for (m, domain) in [(&west, "b.example"), (&east, "b.example"), (&north, "a.example")] {
        let v = told("all are connected", &m.cluster, |v| connected(v, 2));
        let bundle = &v["trustBundles"][0];
        assert_eq!((&bundle["trustDomain"], &bundle["roots"]), (&domain.into(), &1.into()), "{v:#}");
    }
    if transport == Transport::Quic {
        for m in [&west, &north] {
            told("over QUIC", &m.cluster, |v| {
                v["clusters"].as_array().is_some_and(|a| a.iter().all(|c| c["transport"] == "quic"))
            });
        }
    }
    let shown = ok(&east.cluster, &["clusters"]);
    assert!(shown.contains("Trust domain b.example: north; bundle 1"), "{shown}");

    // 200 in all directions, and the server hears who calls, by the full name.
    let a = west.gets("federated", "reviews", 200);
    assert!(a.body.contains("spiffe://a.example/ns/books/sa/storefront"), "{a:?}");
    east.gets("by hearsay of west", "reviews", 200);
    for name in ["details", "ratings"] {
        let a = north.gets("federated", name, 200);
        assert!(a.body.contains(STOREFRONT), "{a:?}");
    }

    // A principal carries its domain.
    allow(&west.cluster, "details", "principals: [\"b.example/ns/books/sa/storefront\"]");
    until_denied(&east, "details");
    north.keeps("allowed by its full name", "details", 200);
    allow(&west.cluster, "details", "principals: [\"a.example/ns/books/sa/storefront\"]");
    until_denied(&north, "details");
    east.keeps("allowed by its full name", "details", 200);
    // A namespace without a domain is of the own one.
    allow(&west.cluster, "details", "namespaces: [books]");
    std::thread::sleep(Duration::from_secs(1));
    north.keeps("that namespace is another", "details", 403);
    allow(&west.cluster, "details", "namespaces: [books], trustDomains: [b.example]");
    north.gets("unless the domain is said", "details", 200);
    west.cluster.remove("policy.yaml");
    east.gets("no policy", "details", 200);

    // The root of a makes an intermediate for a cluster of b. Nobody falls for it, and the honest one gets in.
    let forged = Caller::forged(&west.cluster, STOREFRONT);
    let impostor = Caller::forged(&west.cluster, CONTROL_PLANE);
    let honest = Caller::honest(&north.cluster, "storefront");
    for m in [&west, &north] {
        let (at, sni) = (inbound(m), workload_sni(m.name));
        honest.knocks(at, &sni, "istio").unwrap();
        let e = forged.knocks(at, &sni, "istio").unwrap_err();
        assert!(e.contains("alert"), "the workload in {}: {e}", m.cluster.name);
        for (port, sni) in
            [(15016, format!("federation.{}.clusterset.local", m.cluster.name)), (15012, "cp".into())]
        {
            let at = SocketAddr::from((m.cluster.host(1), port));
            // Proxies of the own domain alone are served.
            let served = port == 15016 || m.cluster.name == "north";
            assert_eq!(honest.knocks(at, &sni, "h2").is_ok(), served, "{} at {port}", m.cluster.name);
            let e = impostor.knocks(at, &sni, "h2").unwrap_err();
            assert!(e.contains("alert"), "the control plane of {} at {port}: {e}", m.cluster.name);
        }
    }

    // Everything is restarted; and b has a second root by then.
    let ca = north.cluster.path("state/ca/root-cert.pem");
    let second = Authority::new("second");
    second.write_root(&north.cluster.path("second.pem"));
    let both =
        fs::read_to_string(&ca).unwrap() + &fs::read_to_string(north.cluster.path("second.pem")).unwrap();
    fs::write(&ca, both).unwrap();
    for m in [&mut north, &mut west, &mut east] {
        m.restart();
    }
    for m in [&west, &east] {
        told("the new bundle", &m.cluster, |v| {
            let b = &v["trustBundles"][0];
            (&b["sequence"], &b["roots"]) == (&2.into(), &2.into()) && connected(v, 2)
        });
        m.gets("after the restart", "reviews", 200);
    }
    for name in ["details", "ratings"] {
        north.gets("after the restart", name, 200);
    }
    let doctor = west.cluster.flotilla(&["doctor"]);
    assert!(doctor.out.contains("the trust bundle of b.example (sequence 2)"), "{doctor:?}");

    // A sidecar that starts without its control plane still knows the roots of the other domain.
    north.cluster.kill("control-plane");
    north.cluster.kill("reviews");
    north.cluster.sidecar("reviews", north.cluster.workload(1), Some(north.app));
    north.cluster.ready(north.cluster.workload(1));
    west.gets("with roots that were kept", "reviews", 200);
    north.cluster.control_plane();
    told("north is back", &north.cluster, |v| connected(v, 2));

    // North leaves whom it is federated with, and keeps its mesh.
    let said = ok(&north.cluster, &["leave-cluster"]);
    assert!(said.contains("Ended the federation with a.example") && said.contains("b.example"), "{said}");
    parted(&west, &east, &north);
    assert!(ok(&north.cluster, &["clusters"]).starts_with("Mesh b.example"));

    // Again, and evicted: by one cluster of a for all of them.
    federate(&west.cluster, &north.cluster);
    west.gets("federated again", "reviews", 200);
    east.gets("federated again", "reviews", 200);
    north.gets("federated again", "details", 200);
    let said = ok(&east.cluster, &["evict-cluster", "north"]);
    assert!(said.contains("the last cluster of b.example"), "{said}");
    parted(&west, &east, &north);
    // North has not been asked, and is told why nothing goes any more.
    for command in [&["explain", "storefront.books", "details.books:9080"][..], &["doctor"]] {
        until(&format!("{command:?} names the reason"), || {
            let o = north.cluster.flotilla(command);
            let named = o.code == 1 && o.out.contains("west does not accept this cluster's certificates");
            if named { Ok(()) } else { Err(format!("{o:?}")) }
        });
    }
    ok(&north.cluster, &["leave-cluster", "--force"]);
    assert!(clusters(&north.cluster).unwrap()["trustBundles"].as_array().unwrap().is_empty());
}

/// An Envoy in a's place: it chooses the roots by the domain in a name as well.
#[test]
#[ignore = "needs Envoy; cargo verify installs it"]
fn a_foreign_envoy_verifies_by_domain() {
    let envoy = PathBuf::from(std::env::var_os("ENVOY_BIN").expect("ENVOY_BIN names an Envoy binary"));
    let west = Cluster::start_in("west", "a.example", Transport::Tcp);
    let north = Cluster::start_in("north", "b.example", Transport::Tcp);
    let details = HttpServer::start((west.workload(3), 9080).into(), "details");
    let reviews = HttpServer::start((north.workload(3), 9080).into(), "reviews");
    let mut west = Mesh { cluster: west, name: "details", app: details.address };
    let mut north = Mesh { cluster: north, name: "reviews", app: reviews.address };
    west.cluster.found();
    north.cluster.found();
    let c = &mut west.cluster;
    c.write("service.yaml", &exported(c, "details", details.address));
    c.east_west_gateway();
    c.ready(c.host(3));
    c.envoy_sidecar(&envoy, "details", c.workload(1), details.address);
    north.start();

    let ip = west.cluster.workload(1);
    let (at, sni) = (SocketAddr::from((ip, 9080)), workload_sni("details"));
    let honest = Caller::honest(&north.cluster, "storefront");
    let forged = Caller::forged(&west.cluster, STOREFRONT);
    let refused = |caller: &Caller, what: &str| {
        let e = caller.knocks(at, &sni, "istio").expect_err(what);
        assert!(e.contains("alert"), "{what}: {e}");
    };
    refused(&honest, "b is nobody yet");
    federate(&west.cluster, &north.cluster);
    let a = north.gets("to Envoy", "details", 200);
    assert!(a.body.contains(STOREFRONT), "{a:?}");
    // The storefront of west is the Envoy itself.
    let proxy = format!("http://{}:{HTTP_PROXY}", west.cluster.workload(1));
    let uri = format!("http://reviews.{NAMESPACE}:9080/");
    let a = until_status("from Envoy", 200, &["--proxy", &proxy, "--noproxy", "", &uri]);
    assert!(a.body.contains("spiffe://a.example/ns/books/sa/details"), "{a:?}");
    honest.knocks(at, &sni, "istio").unwrap();
    refused(&forged, "a's root in the name of b");

    // What its own domain has revoked it refuses, and nobody else, of either domain.
    let c = &mut west.cluster;
    for (name, n) in [("thief", 4), ("other", 5)] {
        c.sidecar(name, c.workload(n), None);
        c.ready(c.workload(n));
    }
    let (thief, other) = (Caller::honest(c, "thief"), Caller::honest(c, "other"));
    for caller in [&thief, &other] {
        caller.knocks(at, &sni, "istio").unwrap();
    }
    ok(c, &["ca", "revoke", "--identity", "ns/books/sa/thief"]);
    until("the Envoy refuses what was revoked", || match thief.knocks(at, &sni, "istio") {
        Err(e) if e.contains("alert") => Ok(()),
        other => Err(format!("{other:?}")),
    });
    for caller in [&honest, &other] {
        caller.knocks(at, &sni, "istio").unwrap();
    }

    // An agent that starts again without its control plane takes nothing away.
    west.cluster.kill("control-plane");
    west.cluster.kill("details");
    west.cluster.agent("details", ip, details.address);
    std::thread::sleep(Duration::from_secs(2));
    honest.knocks(at, &sni, "istio").unwrap();
    west.cluster.control_plane();
    ok(&north.cluster, &["leave-cluster"]);
    until("nobody of b is accepted", || match honest.knocks(at, &sni, "istio") {
        Err(e) if e.contains("alert") => Ok(()),
        other => Err(format!("{other:?}")),
    });
}

fn until_denied(m: &Mesh, service: &str) {
    m.gets("denied", service, 403);
    m.keeps("denied", service, 403);
}

/// Nothing of north is accepted in west and east any more.
fn parted(west: &Mesh, east: &Mesh, north: &Mesh) {
    for m in [west, east] {
        told("there is no bundle", &m.cluster, |v| {
            v["trustBundles"].as_array().is_some_and(Vec::is_empty) && connected(v, 1)
        });
        until(&format!("{} calls reviews no more", m.cluster.name), || {
            let a = m.get("reviews");
            if a.status == 200 { Err(format!("{a:?}")) } else { Ok(()) }
        });
        let caller = Caller::honest(&north.cluster, "storefront");
        let at = (m.cluster.workload(1), 9080).into();
        until("its certificate is refused", || match caller.knocks(at, &workload_sni(m.name), "istio") {
            Err(e) if e.contains("alert") => Ok(()),
            other => Err(format!("{other:?}")),
        });
        for port in [15016, 15012] {
            let at = (m.cluster.host(1), port).into();
            assert!(caller.knocks(at, "cp", "h2").unwrap_err().contains("alert"));
        }
    }
    until("north calls details no more", || {
        let a = north.get("details");
        if a.status == 200 { Err(format!("{a:?}")) } else { Ok(()) }
    });
}

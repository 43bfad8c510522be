//! Listeners that a `Sidecar` declares: what the application connects to itself, what it may call where, TLS of a port's
//! own, a proxy for what nobody declared, and hosts that requests name. Once with our proxy and once with Envoy in its place.

use std::path::Path;

use anyhow::ensure;
use flotilla_e2e::netns::{Cluster, NAMESPACE, Options, World, exec, until};

use crate::{
    certs::Authority,
    edges::{Got, curl, readable},
    security::CONVERGE,
    support::{host, scenario},
};

/// `client` may call `alpha` on a listener of its own and `beta` through a proxy; `gamma` takes what nobody declared.
fn egress() -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {{name: client, namespace: {NAMESPACE}}}\nspec:\n  \
         workloadSelector: {{labels: {{app: client}}}}\n  egress:\n  - port: {{number: 7000, protocol: HTTP, name: own}}\n    \
         bind: 127.0.0.9\n    captureMode: NONE\n    hosts: [\"./own.example\"]\n  - port: {{number: 3128, protocol: HTTP_PROXY, \
         name: proxy}}\n    captureMode: NONE\n    hosts: [\"./{}\"]\n  - hosts: [\"./*.wild.example\", \"./range.example\"]\n  outboundTrafficPolicy:\n    mode: ALLOW_ANY\n    \
         egressProxy: {{host: {}, port: {{number: 8080}}}}\n---\napiVersion: networking.istio.io/v1\nkind: VirtualService\n\
         metadata: {{name: own, namespace: {NAMESPACE}}}\nspec: {{hosts: [own.example], http: [{{route: [{{destination: {{host: \
         {}, port: {{number: 8080}}}}}}]}}]}}\n",
        host("beta"),
        host("gamma"),
        host("alpha"),
    )
}

/// Whatever has a name in this domain, as it resolves where the proxy is.
fn wild() -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: wild, namespace: {NAMESPACE}}}\nspec:\n  \
         hosts: [\"*.wild.example\"]\n  location: MESH_EXTERNAL\n  resolution: DYNAMIC_DNS\n  ports:\n  - {{number: 8080, name: \
         http, protocol: HTTP}}\n  - {{number: 9443, name: tls, protocol: TLS}}\n"
    )
}

/// A range of addresses that `beta` answers for.
fn range(beta: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: range, namespace: {NAMESPACE}}}\nspec:\n  \
         hosts: [range.example]\n  addresses: [198.51.100.0/24]\n  resolution: STATIC\n  ports:\n  - {{number: 5432, name: tcp, \
         protocol: TCP, targetPort: 8080}}\n  endpoints: [{{address: {beta}}}]\n"
    )
}

/// Where `gamma` has a server that listens at the workload's own address alone.
const OWN_ADDRESS: u16 = 8181;

fn own_address() -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: page, namespace: {NAMESPACE}}}\nspec:\n  selector: {{app: gamma}}\n  \
         ports: [{{name: http, port: {OWN_ADDRESS}}}]\n"
    )
}

/// Istio's settings of the mesh as its installation keeps them.
const MESH: &str = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: istio\n  namespace: istio-system\ndata:\n  mesh: |-\n    \
                    defaultConfig:\n      discoveryAddress: istiod.istio-system.svc:15012\n    inboundTrafficPolicy:\n      \
                    mode: PASSTHROUGH\n    tcpKeepalive:\n      time: 30s\n    dnsRefreshRate: 20s\n    protocolDetectionTimeout: 1s\n    \
                    outboundClusterStatName: '%SERVICE%_%SERVICE_PORT%'\n    inboundClusterStatName: '%SERVICE%_%TARGET_PORT%'\n    \
                    meshMTLS:\n      ecdhCurves: [X25519]\n";

/// `alpha` ends TLS of its own for strangers, on a port that nothing captures.
fn ingress(chain: &str, key: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {{name: alpha, namespace: {NAMESPACE}}}\nspec:\n  \
         workloadSelector: {{labels: {{app: alpha}}}}\n  ingress:\n  - port: {{number: 8080, protocol: HTTP, name: http}}\n    \
         defaultEndpoint: 127.0.0.1:8080\n  - port: {{number: 9443, protocol: HTTPS, name: https}}\n    captureMode: NONE\n    \
         defaultEndpoint: 127.0.0.1:8080\n    tls: {{mode: SIMPLE, serverCertificate: {chain}, privateKey: {key}}}\n---\n\
         apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: alpha, namespace: {NAMESPACE}}}\nspec:\n  \
         selector: {{matchLabels: {{app: alpha}}}}\n  mtls: {{mode: STRICT}}\n  portLevelMtls: {{9443: {{mode: DISABLE}}}}\n"
    )
}

#[test]
#[ignore = "needs root, network namespaces and an Envoy"]
fn listeners_of_a_sidecar() {
    scenario("listeners that a Sidecar declares", async || {
        let envoy = std::env::var("ENVOY_BIN")?;
        let mut world = World::start(&Options {
            clusters: vec![(
                "west",
                vec![("client", "v1"), ("alpha", "v1"), ("beta", "v1"), ("gamma", "v1")],
            )],
            ..crate::support::options(false)
        })
        .await?;
        let authority = Authority::new("strangers");
        let dir = world.dir.join("own-tls");
        let (chain, key) = authority.issue(&dir, "alpha.example");
        std::os::unix::fs::chown(&dir, Some(1337), Some(1337))?;
        let root = authority.write_root(&world.dir.join("strangers.pem"));
        for f in [&chain, &key] {
            readable(Path::new(f))?;
        }
        let west = &mut world.clusters[0];
        west.write("ingress.yaml", &ingress(&chain, &key))?;
        west.write("egress.yaml", &egress())?;
        west.write("wild.yaml", &wild())?;
        west.write("range.yaml", &range(&west.workload("beta").ip))?;
        west.write("own-address.yaml", &own_address())?;
        let at = format!("{}:{OWN_ADDRESS}", west.workload("gamma").ip);
        west.start_page("gamma", &at)?;
        resolve(west)?;
        observe(west, "Flotilla", &root).await?;
        for service in ["client", "alpha", "gamma"] {
            west.replace_by_envoy(service, Path::new(&envoy), &[host("beta")]).await?;
        }
        resolve(west)?;
        observe(west, "Envoy", &root).await?;
        for part in ["client-v1", "alpha-v1", "gamma-v1"] {
            let dump = west.admin(part, "/config_dump")?;
            ensure!(!dump.contains("\"error_state\""), "{part} refused something: {dump}");
        }
        Ok(())
    });
}

/// What the workload's own resolver says of names of that domain.
fn resolve(west: &Cluster) -> anyhow::Result<()> {
    let hosts = Path::new("/etc/netns").join(&west.workload("client").netns).join("hosts");
    let mut known = std::fs::read_to_string(&hosts)?;
    for (name, ip) in
        [("a", &*west.workload("gamma").ip), ("b", &*west.workload("alpha").ip), ("inward", "127.0.0.1")]
    {
        known += &format!("{ip} {name}.wild.example\n");
    }
    Ok(std::fs::write(&hosts, known)?)
}

async fn observe(west: &Cluster, whose: &str, root: &str) -> anyhow::Result<()> {
    let app = |args: &[&str]| west.as_app("client", &curl(args)).map(Got::of);
    let from = |g: &Got, who: &str| g.status == 200 && g.body.contains(&format!("\"workload\":\"{who}\""));
    until("the listener of the application's own", CONVERGE, async || {
        let got = app(&["-H", "host: own.example:7000", "http://127.0.0.9:7000/"])?;
        ensure!(from(&got, "alpha") && got.body.contains("/sa/client"), "{got:?}");
        Ok(())
    })
    .await?;
    println!("   {whose}: 127.0.0.9:7000 is alpha, over mutual TLS");
    let other = app(&["http://127.0.0.9:7000/"])?;
    ensure!(from(&other, "gamma"), "a host that is not of this listener: {other:?}");
    let proxied = app(&["-x", "http://127.0.0.1:3128", &format!("http://{}:8080/", host("beta"))])?;
    ensure!(from(&proxied, "beta"), "through the HTTP proxy: {proxied:?}");
    let unknown = app(&["http://192.0.2.1:8080/"])?;
    ensure!(from(&unknown, "gamma"), "what nobody declared: {unknown:?}");
    println!("   {whose}: beta by the HTTP proxy, gamma for what nobody declared");
    for (ip, who) in [("198.51.100.7", "beta"), ("198.51.100.255", "beta"), ("198.51.101.7", "gamma")] {
        let got = app(&[&format!("http://{ip}:5432/")])?;
        ensure!(from(&got, who), "{ip}: {got:?}");
    }
    println!("   {whose}: beta for a range of addresses, gamma beside it");
    let ip = &west.workload("alpha").ip;
    let (node, at) = (west.netns("node"), format!("alpha.example:9443:{ip}"));
    let tls = ["--cacert", root, "--resolve", &at, "https://alpha.example:9443/"];
    until("TLS of the port's own", CONVERGE, async || {
        let got = exec(&node, &curl(&tls)).map(Got::of)?;
        ensure!(from(&got, "alpha"), "{got:?}");
        Ok(())
    })
    .await?;
    let clear = exec(&node, &curl(&[&format!("http://{ip}:9443/")])).map(Got::of)?;
    ensure!(clear.status == 0, "in clear: {clear:?}");
    println!("   {whose}: strangers get 200 over TLS at 9443, and nothing in clear");
    // Where the application believes the name to be does not matter: nobody is there.
    let elsewhere = |name: &str, port| format!("{name}.wild.example:{port}:192.0.2.9");
    let named = |name: &str| {
        app(&["-m", "20", "--resolve", &elsewhere(name, 8080), &format!("http://{name}.wild.example:8080/")])
    };
    until("a host that the request names", CONVERGE, async || {
        let got = named("a")?;
        ensure!(from(&got, "gamma"), "{got:?}");
        Ok(())
    })
    .await?;
    let tls = app(&["-k", "--resolve", &elsewhere("b", 9443), "https://b.wild.example:9443/"])?;
    ensure!(from(&tls, "alpha"), "a host that the SNI names: {tls:?}");
    for name in ["inward", "nobody"] {
        let got = named(name)?;
        ensure!(got.status == 503 && got.body.contains("DNS resolution failure"), "{name}: {got:?}");
    }
    inbound(west, whose).await?;
    println!(
        "   {whose}: *.wild.example is where the name leads, by Host and by SNI; 503 for no name, and for 127.0.0.1"
    );
    Ok(())
}

/// Where inbound connections go: to loopback unless the mesh's settings say that it is the workload's own address, where
/// they come from one that capture leaves alone.
async fn inbound(west: &Cluster, whose: &str) -> anyhow::Result<()> {
    let page = format!("http://{}:{OWN_ADDRESS}/", host("page"));
    let get = || west.as_app("beta", &curl(&[&page])).map(Got::of);
    until("loopback, where nothing listens", CONVERGE, async || {
        let got = get()?;
        ensure!(got.status == 503, "{got:?}");
        Ok(())
    })
    .await?;
    west.write("mesh.yaml", MESH)?;
    until("the workload's own address", CONVERGE, async || {
        let got = get()?;
        ensure!(got.status == 200 && got.body.contains("page of gamma for 127.0.0.6"), "{got:?}");
        Ok(())
    })
    .await?;
    // What listens everywhere is reached as before.
    let beta = west.as_app("beta", &curl(&[&format!("http://{}:8080/", host("gamma"))])).map(Got::of)?;
    ensure!(beta.status == 200 && beta.body.contains("\"workload\":\"gamma\""), "{beta:?}");
    println!(
        "   {whose}: 503 from a server that loopback does not have, and 200 with Istio's ConfigMap that says PASSTHROUGH"
    );
    west.remove("mesh.yaml")
}

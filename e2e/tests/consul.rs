//! Whole processes with a real Consul agent as the registry: what is registered there can be called, what fails its
//! check or is taken out cannot, and an agent that is away takes nothing with it.

#[expect(dead_code, unused_imports, reason = "what is shared is more than this test uses")]
mod support;

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use flotilla_e2e::programs;
use serde_json::{Value, json};

use crate::support::*;

/// How soon traffic follows what Consul knows.
const SOON_ENOUGH: Duration = Duration::from_secs(1);
/// Port of the service.
const PORT: u16 = 9080;

struct Bed {
    cluster: Cluster,
    agent: Ipv4Addr,
    /// The caller's sidecar.
    proxy: String,
}

/// Starts an agent in development mode, which forgets everything when it ends.
fn start_agent(c: &mut Cluster, more: &[&str]) {
    let ip = c.host(9).to_string();
    let mut args =
        vec!["agent", "-dev", "-bind", &ip, "-client", &ip, "-node", "host-9", "-log-level", "warn"];
    args.extend(more);
    c.spawn_program(&programs::consul().unwrap(), "consul", &args);
}

impl Bed {
    fn start() -> Self {
        let mut cluster = Cluster::start_after("west", |c| {
            start_agent(c, &[]);
            let mut args = vec![format!("--consul=http://{}:8500", c.host(9))];
            args.extend(
                [NAMESPACE, "shop-=shop", "shop-back-=backoffice"]
                    .map(|ns| format!("--consul-namespace={ns}")),
            );
            args
        });
        cluster.found();
        let (client, agent) = (cluster.workload(1), cluster.host(9));
        cluster.sidecar("client", client, None);
        cluster.ready(client);
        let b = Self { proxy: format!("http://{client}:{HTTP_PROXY}"), cluster, agent };
        b.agent_is_up();
        b
    }

    fn agent_is_up(&self) {
        until("the agent has a leader", || {
            let a = curl(&[&format!("http://{}:8500/v1/status/leader", self.agent)]);
            if a.body.len() > 4 { Ok(()) } else { Err(format!("{a:?}")) }
        });
    }

    /// Changes something at the agent.
    fn put(&self, path: &str, body: &Value) {
        let url = format!("http://{}:8500/v1/{path}", self.agent);
        let a = curl(&["-X", "PUT", "-d", &body.to_string(), &url]);
        assert_eq!(a.status, 200, "{path}: {a:?}");
    }

    /// Registers an instance of `name` on the service's port, with a check that its owner answers for.
    fn register(&self, name: &str, id: &str, ip: Ipv4Addr, tags: &[&str]) {
        self.put(
            "agent/service/register",
            &json!({"ID": id, "Name": name, "Address": ip.to_string(), "Port": PORT, "Tags": tags,
                    "Meta": {"service-account": name},
                    "Check": {"CheckID": format!("{id}-check"), "TTL": "1h", "Status": "passing"}}),
        );
    }

    fn check(&self, id: &str, verdict: &str) {
        self.put(&format!("agent/check/{verdict}/{id}-check"), &json!({}));
    }

    /// A request through the caller's sidecar: status, and which server answered with what.
    fn call(&self, host: &str, headers: &[&str]) -> (u16, String, String) {
        let url = format!("http://{host}:{PORT}/");
        let mut args = vec!["-x", &self.proxy];
        headers.iter().for_each(|h| args.extend(["-H", h]));
        args.push(&url);
        let a = curl(&args);
        let by = a.body.lines().next().unwrap_or_default().trim_start_matches("served-by: ").to_owned();
        (a.status, by, a.body)
    }

    /// Waits until exactly these servers answer.
    fn until_served_by(&self, host: &str, servers: &[&str]) {
        let wanted: BTreeSet<String> = servers.iter().map(|s| (*s).to_owned()).collect();
        until(&format!("{host} is served by {servers:?}"), || {
            let found: BTreeSet<String> = (0..12)
                .map(|_| self.call(host, &[]))
                .map(|(s, by, _)| if s == 200 { by } else { s.to_string() })
                .collect();
            if found == wanted { Ok(()) } else { Err(format!("{found:?}")) }
        });
    }

    /// How long after `change` a server still answered, while every request is answered.
    fn gone_after(&self, host: &str, server: &str, change: impl FnOnce()) -> Duration {
        change();
        let (begun, mut last) = (Instant::now(), Duration::ZERO);
        // Until it has not answered for a while, or should have gone long since.
        while begun.elapsed() < last + SOON_ENOUGH && last < SOON_ENOUGH {
            let (status, by, body) = self.call(host, &[]);
            assert_eq!(status, 200, "{body}");
            if by == server {
                last = begun.elapsed();
            }
        }
        last
    }

    /// What the control plane tells of the agent.
    fn told(&self) -> Value {
        let socket = format!("{}/debug.sock", self.cluster.state());
        let a = curl(&["--unix-socket", &socket, "http://flotilla/pilot/debug/consulz"]);
        serde_json::from_str::<Value>(&a.body).unwrap_or_default()[0].clone()
    }

    fn control_metric(&self, name: &str) -> Option<f64> {
        let page = curl(&[&format!("http://{}:15014/metrics", self.cluster.host(1))]).body;
        page.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    }

    /// What `flotilla doctor` says about Consul: state and text.
    fn doctor(&self) -> (String, String) {
        let o = self.cluster.flotilla(&["doctor", "-o", "json"]);
        let v: Value = serde_json::from_str(&o.out).unwrap_or_default();
        let step = v["checks"].as_array().into_iter().flatten().find(|s| s["step"] == "consul").cloned();
        let step = step.unwrap_or_default();
        let text = |k: &str| step[k].as_str().unwrap_or_default().to_owned();
        (text("state"), text("says"))
    }
}

/// A routing document for a host that only Consul has: requests that ask for it get version v2.
const ROUTES: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: web, namespace: books}
spec: {host: web.service.consul, subsets: [{name: v2, labels: {version: v2}}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: books}
spec:
  hosts: [web.service.consul]
  http:
  - match: [{headers: {version: {exact: v2}}}]
    route: [{destination: {host: web.service.consul, subset: v2}}]
  - route: [{destination: {host: web.service.consul}}]
";

#[test]
#[ignore = "needs the flotilla binary and a Consul agent; cargo verify runs it"]
fn services_follow_the_agent() {
    let mut b = Bed::start();
    let (host, one, two) = ("web.service.consul", b.cluster.workload(2), b.cluster.workload(3));

    // The first instance has a sidecar, the others are servers alone.
    let app = HttpServer::start(SocketAddr::from((b.cluster.workload(12), 8080)), "one");
    b.cluster.sidecar("web", one, Some(app.address));
    b.cluster.ready(one);
    let _two = HttpServer::start(SocketAddr::from((two, PORT)), "two");
    assert_ne!(b.call(host, &[]).0, 200, "not registered yet");
    b.register("web", "web-1", one, &["version|v1", "security.istio.io/tlsMode|istio"]);
    b.until_served_by(host, &["one"]);
    let (_, _, body) = b.call(host, &[]);
    assert!(body.contains("spiffe://mesh.local/ns/books/sa/client"), "in mTLS: {body}");
    assert_eq!(b.doctor().0, "ok");

    b.register("web", "web-2", two, &["version|v2"]);
    b.until_served_by(host, &["one", "two"]);
    b.cluster.write("routes.yaml", ROUTES);
    until("a route by a label from a tag", || {
        let all: Vec<_> = (0..8).map(|_| b.call(host, &["version: v2"]).1).collect();
        if all.iter().all(|by| by == "two") { Ok(()) } else { Err(format!("{all:?}")) }
    });

    let after = b.gone_after(host, "two", || b.check("web-2", "fail"));
    eprintln!("a critical check: no request after {after:?}");
    assert!(after < SOON_ENOUGH, "{after:?}");
    b.check("web-2", "pass");
    b.until_served_by(host, &["one", "two"]);
    let after = b.gone_after(host, "two", || b.put("agent/service/deregister/web-2", &json!({})));
    eprintln!("deregistered: no request after {after:?}");
    assert!(after < SOON_ENOUGH, "{after:?}");

    // Away: nothing goes, the control plane says so, and a new one knows what there was.
    let index = b.told()["index"].as_u64().unwrap();
    b.cluster.kill("consul");
    until("the agent is missed", || if b.told()["up"] == false { Ok(()) } else { Err(b.told().to_string()) });
    assert_eq!(b.control_metric("pilot_consul_agents_down"), Some(1.0));
    let (state, says) = b.doctor();
    assert!(
        state == "broken" && says.contains("does not answer") && says.contains("1 services"),
        "{state} {says}"
    );
    b.cluster.logged("control-plane", &["Consul does not answer", "last known services stay"]);
    b.until_served_by(host, &["one"]);
    until("what is known is kept", || {
        let name = format!(
            "{}/consul-http---{}-8500.json",
            b.cluster.state(),
            b.agent.to_string().replace('.', "-")
        );
        let kept = std::fs::read_to_string(&name).map_err(|e| format!("{name}: {e}"))?;
        if kept.contains("web-1") && !kept.contains("web-2") { Ok(()) } else { Err(kept) }
    });
    b.cluster.kill("control-plane");
    b.cluster.control_plane();
    assert_eq!(b.control_metric("pilot_consul_services"), Some(1.0));
    let later = b.cluster.workload(4);
    b.cluster.sidecar("later", later, None);
    b.cluster.ready(later);
    let (through, url) = (format!("http://{later}:{HTTP_PROXY}"), format!("http://{host}:{PORT}/"));
    until_status("a caller that came while the agent was away", 200, &["-x", &through, &url]);
    b.until_served_by(host, &["one"]);

    // Back, empty, and counting from the start: it is believed.
    start_agent(&mut b.cluster, &[]);
    b.agent_is_up();
    b.register("other", "other-1", two, &[]);
    b.until_served_by("other.service.consul", &["two"]);
    let told = b.told();
    assert!(told["up"] == true && told["index"].as_u64().unwrap() < index, "{told} after {index}");
    until("what is not registered any more goes", || match b.call(host, &[]).0 {
        200 => Err("still served".to_owned()),
        _ => Ok(()),
    });
    b.register("web", "web-1", one, &["security.istio.io/tlsMode|istio"]);
    b.until_served_by(host, &["one"]);
    assert_eq!(b.doctor().0, "ok");
    assert_eq!(b.control_metric("pilot_consul_agents_down"), Some(0.0));

    // Whose name begins so is in the namespace of the longest beginning.
    for (name, namespace) in [("shop-cart", "shop"), ("shop-back-stock", "backoffice"), ("other", NAMESPACE)]
    {
        b.register(name, &format!("{name}-1"), two, &[]);
        b.until_served_by(&format!("{name}.service.consul"), &["two"]);
        let of = format!("destination_service_namespace=\"{namespace}\"");
        let host = format!("destination_service=\"{name}.service.consul\"");
        until(&format!("{name} is counted in {namespace}"), || {
            let page = curl(&[&format!("http://{}:15090/stats/prometheus", b.cluster.workload(1))]).body;
            let lines: Vec<_> = page.lines().filter(|l| l.contains(&host)).collect();
            let here = |l: &&str| l.starts_with("istio_requests_total") && l.contains(&of);
            if lines.iter().any(here) { Ok(()) } else { Err(lines.join("\n")) }
        });
    }
}

/// An agent that wants a token and serves TLS only.
#[test]
#[ignore = "needs the flotilla binary and a Consul agent; cargo verify runs it"]
fn tokens_and_tls() {
    let authority = Authority::new("consul");
    let cluster = Cluster::start_after("west", |c| {
        let (ip, dir) = (c.host(9).to_string(), c.path("consul"));
        let (crt, key) = authority.issue(&dir, &ip);
        let root = authority.write_root(&dir.join("root.pem"));
        let config = json!({
            "ports": {"http": -1, "https": 8501}, "cert_file": crt, "key_file": key, "ca_file": root,
            "verify_incoming_https": true,
            "acl": {"enabled": true, "default_policy": "deny", "tokens": {"master": "let-me-read"}},
            "services": [{"name": "web", "port": 80, "token": "let-me-read"}],
        });
        std::fs::write(dir.join("agent.json"), config.to_string()).unwrap();
        std::fs::write(c.path("token"), "wrong").unwrap();
        start_agent(c, &["-config-file", &dir.join("agent.json").display().to_string()]);
        vec![
            format!("--consul=https://{ip}:8501"),
            format!("--consul-token-file={}", c.path("token").display()),
            format!("--consul-ca-file={root}"),
            format!("--consul-cert-file={crt}"),
            format!("--consul-key-file={key}"),
            "--consul-datacenter=dc1".to_owned(),
        ]
    });
    let b = Bed { agent: cluster.host(9), proxy: String::new(), cluster };
    until("the token is refused", || {
        let told = b.told();
        match told["error"].as_str() {
            Some(e) if e.contains("ACL not found") => Ok(()),
            _ => Err(told.to_string()),
        }
    });
    assert_eq!(b.told()["up"], false);
    std::fs::write(b.cluster.path("token"), "let-me-read\n").unwrap();
    until("the right token is used without a restart", || {
        let told = b.told();
        if told["up"] == true && told["services"] == 1 && told["failing"] == 0 {
            Ok(())
        } else {
            Err(told.to_string())
        }
    });
}

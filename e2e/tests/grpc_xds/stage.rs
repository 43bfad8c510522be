//! A cluster with grpcio's clients and servers, and what they are told.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::support::{Cluster, HTTP_PROXY, NAMESPACE, curl, until};

/// Port of the service, and of its servers.
pub(crate) const PORT: u16 = 7070;
/// What clients dial.
pub(crate) const TARGET: &str = "xds:///greeter.books.svc.cluster.local:7070";
const PLAINTEXT: u16 = 15010;

/// One of the Python programs. It ends with this process.
pub(crate) struct Program {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Program {
    fn start(c: &Cluster, log: &str, bootstrap: Option<&Path>, args: &[&str]) -> Self {
        let script = format!("{}/tests/grpc_xds/{}", env!("CARGO_MANIFEST_DIR"), args[0]);
        let mut command = Command::new(flotilla_e2e::programs::venv_python());
        for name in ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"] {
            command.env_remove(name);
        }
        if let Some(b) = bootstrap {
            command.env("GRPC_XDS_BOOTSTRAP", b);
        }
        let log = File::create(c.path("logs").join(format!("{log}.log"))).unwrap();
        let mut child = command
            .arg(script)
            .args(&args[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let (to, from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut program = Self { child, to, from };
        program.answer();
        program
    }

    fn answer(&mut self) -> Value {
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("the program ended: {e}"))
    }

    fn ask(&mut self, order: &Value) -> Value {
        writeln!(self.to, "{order}").unwrap();
        self.answer()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // A process that has ended already is as dead as wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What became of calls.
#[derive(Debug, Deserialize)]
pub(crate) struct Tally {
    /// By status.
    pub(crate) codes: BTreeMap<String, u32>,
    /// By what the server said.
    pub(crate) served: BTreeMap<String, u32>,
    pub(crate) error: String,
    pub(crate) seconds: f64,
}

impl Tally {
    /// Calls that ended so.
    pub(crate) fn of(&self, code: &str) -> u32 {
        self.codes.get(code).copied().unwrap_or(0)
    }

    pub(crate) fn failed(&self) -> u32 {
        self.codes.iter().filter(|(c, _)| *c != "OK").map(|(_, n)| n).sum()
    }

    /// Calls that a server answered.
    pub(crate) fn by(&self, server: &str) -> u32 {
        self.served.get(server).copied().unwrap_or(0)
    }

    /// Who answered, if all calls were.
    pub(crate) fn servers(&self) -> Vec<&str> {
        assert_eq!(self.failed(), 0, "{self:?}");
        self.served.keys().map(String::as_str).collect()
    }
}

/// A client of the service.
pub(crate) struct Client(Program);

impl Client {
    pub(crate) fn start(c: &Cluster, name: &str, bootstrap: &Path, target: &str, mtls: bool) -> Self {
        let mut args = vec!["client.py", target];
        args.extend(mtls.then_some("mtls"));
        Self(Program::start(c, name, Some(bootstrap), &args))
    }

    /// One that knows nothing of xDS.
    pub(crate) fn plain(c: &Cluster, to: SocketAddr) -> Self {
        Self(Program::start(c, "plain-client", None, &["client.py", &to.to_string()]))
    }

    /// One that knows nothing of xDS either, and calls through a sidecar.
    pub(crate) fn through(c: &Cluster, sidecar: Ipv4Addr) -> Self {
        let (to, authority) =
            (SocketAddr::from((sidecar, HTTP_PROXY)).to_string(), &TARGET["xds:///".len()..]);
        Self(Program::start(c, "through-sidecar", None, &["client.py", &to, authority]))
    }

    fn tally(&mut self, order: &Value) -> Tally {
        serde_json::from_value(self.0.ask(order)).unwrap()
    }

    /// Makes calls as `more` says (`method`, `metadata`, `timeout`, `parallel`).
    pub(crate) fn calls(&mut self, n: u32, more: Value) -> Tally {
        let mut order = more;
        order["calls"] = json!(n);
        self.tally(&order)
    }

    pub(crate) fn hello(&mut self, n: u32) -> Tally {
        self.calls(n, json!({}))
    }

    /// The same until it ends in a way, which a change takes some time for.
    pub(crate) fn until(&mut self, what: &str, n: u32, more: &Value, good: impl Fn(&Tally) -> bool) -> Tally {
        until(what, || {
            let t = self.calls(n, more.clone());
            if good(&t) { Ok(t) } else { Err(format!("{t:?}")) }
        })
    }

    pub(crate) fn begin(&mut self, order: Value) {
        self.0.ask(&json!({ "begin": order }));
    }

    pub(crate) fn end(&mut self) -> Tally {
        self.tally(&json!({"end": true}))
    }
}

/// Starts a server; with a bootstrap it is one that asks what it may accept.
pub(crate) fn server(c: &Cluster, name: &str, ip: Ipv4Addr, bootstrap: Option<&Path>) -> Program {
    let address = SocketAddr::from((ip, PORT)).to_string();
    let mut args = vec!["server.py", name, &address];
    args.extend(bootstrap.map(|_| "xds"));
    Program::start(c, name, bootstrap, &args)
}

/// A mesh of one cluster that serves xDS in clear as well.
pub(crate) fn cluster() -> Cluster {
    let c = Cluster::start_after("west", |c| vec![format!("--xds-plaintext={}:{PLAINTEXT}", c.host(1))]);
    c.found();
    c
}

/// A bootstrap for xDS in clear.
pub(crate) fn bootstrap(c: &Cluster, name: &str, ip: Ipv4Addr, labels: Value) -> std::path::PathBuf {
    let text = json!({
        "xds_servers": [{
            "server_uri": format!("{}:{PLAINTEXT}", c.host(1)),
            "channel_creds": [{"type": "insecure"}],
            "server_features": ["xds_v3"],
        }],
        "node": {
            "id": format!("sidecar~{ip}~{name}.{NAMESPACE}~{NAMESPACE}.svc.cluster.local"),
            "metadata": {
                "GENERATOR": "grpc",
                "NAMESPACE": NAMESPACE,
                "CLUSTER_ID": c.name,
                "SERVICE_ACCOUNT": name,
                "LABELS": labels,
            },
        },
        // The name in gRPC's own documentation, which is served as Istio's is.
        "server_listener_resource_name_template": "grpc/server?xds.resource.listening_address=%s",
    });
    let path = c.path(&format!("{name}.json"));
    std::fs::write(&path, text.to_string()).unwrap();
    path
}

/// The service and a workload of it for each server.
pub(crate) fn greeter(servers: &[(&str, Ipv4Addr, &str)]) -> String {
    let mut out = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: greeter, namespace: {NAMESPACE}}}\nspec:\n  \
         selector: {{app: greeter}}\n  ports: [{{name: grpc, port: {PORT}}}]\n"
    );
    for (name, ip, labels) in servers {
        out += &format!(
            "---\napiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: {name}, namespace: \
             {NAMESPACE}}}\nspec:\n  address: {ip}\n  serviceAccount: greeter\n  labels: {{app: greeter{labels}}}\n"
        );
    }
    out
}

/// A VirtualService with these HTTP routes.
pub(crate) fn routes(http: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: greeter, namespace: \
         {NAMESPACE}}}\nspec:\n  hosts: [greeter]\n  http:\n{http}"
    )
}

/// A DestinationRule with subsets by version and `policy`.
pub(crate) fn rule(policy: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: greeter, namespace: \
         {NAMESPACE}}}\nspec:\n  host: greeter\n  subsets:\n  - {{name: v1, labels: {{version: v1}}}}\n  - {{name: v2, \
         labels: {{version: v2}}}}\n  trafficPolicy: {policy}\n"
    )
}

/// What the control plane says that it cannot do as written.
pub(crate) fn problems(c: &Cluster) -> String {
    let socket = format!("{}/debug.sock", c.state());
    curl(&["--unix-socket", &socket, "http://localhost/pilot/debug/problems"]).body
}

/// Nothing was refused: as the control plane saw it, by client and type.
pub(crate) fn nothing_refused(c: &Cluster, proxies: usize) {
    // What was sent last may not be answered yet.
    until("everything is acknowledged", || {
        let o = c.flotilla(&["proxy-status", "-o", "json"]);
        let all: Vec<Value> = serde_json::from_str(&o.out).map_err(|e| format!("{e}: {o:?}"))?;
        let synced = |p: &Value| {
            let types = p["types"].as_object().unwrap();
            !types.is_empty() && types.values().all(|t| t["status"] == "SYNCED")
        };
        if all.len() == proxies && all.iter().all(synced) { Ok(()) } else { Err(o.out) }
    });
    // Of one that was refused earlier the log tells.
    let log = c.log("control-plane");
    let refused: Vec<&str> = log.lines().filter(|l| l.contains("rejected by the client")).collect();
    assert!(refused.is_empty(), "{refused:#?}");
}

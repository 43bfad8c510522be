//! A real Kubernetes API server with its etcd, on an address of this machine: for everything that has to hold with what
//! clusters run, and not with a server of our own.
//!
//! There are no controllers, no scheduler and no kubelets: objects are what a test writes, and nothing becomes of them. Users
//! are authorised by RBAC, and service-account tokens are signed with an RSA key, as in clusters that kubeadm makes.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::programs::{self, Process};

/// The issuer in tokens, as in most clusters; only their own DNS knows it.
pub const ISSUER: &str = "https://kubernetes.default.svc";
/// A cold start takes five seconds, on a busy machine several times that.
const PATIENCE: Duration = Duration::from_secs(120);
const PORT: u16 = 6443;

/// A server, its store and its certificates; all of it ends when this is dropped.
pub struct ApiServer {
    dir: PathBuf,
    ip: Ipv4Addr,
    etcd: Option<Process>,
    server: Option<Process>,
}

impl ApiServer {
    /// Makes certificates and keys in `dir`, starts etcd and the server at `ip`, and waits until it is ready.
    ///
    /// # Errors
    /// A program is missing (Debian's `etcd-server`; the error says how to get the other), ends, or is not ready within two minutes.
    pub fn start(dir: &Path, ip: Ipv4Addr) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let mut s = Self { dir: dir.to_owned(), ip, etcd: None, server: None };
        s.make_certificates()?;
        let at = |port: u16| format!("http://{ip}:{port}");
        let etcd = [
            "etcd",
            "--name=kubernetes",
            "--logger=zap",
            "--log-level=warn",
            // Nobody wants this store back: waiting for the disk is all that it would cost.
            "--unsafe-no-fsync",
            &format!("--data-dir={}", s.file("etcd")),
            &format!("--listen-client-urls={}", at(2379)),
            &format!("--advertise-client-urls={}", at(2379)),
            &format!("--listen-peer-urls={}", at(2380)),
            &format!("--initial-advertise-peer-urls={}", at(2380)),
            &format!("--initial-cluster=kubernetes={}", at(2380)),
        ]
        .map(str::to_owned);
        s.etcd = Some(Process::start("etcd", dir, &[dies_with_us(), etcd.to_vec()].concat())?);
        s.resume()?;
        Ok(s)
    }

    /// Kills the server; its store stays.
    pub fn stop(&mut self) {
        self.server = None;
    }

    /// Starts the server again, at the same address with the same keys, and waits until it is ready.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn resume(&mut self) -> anyhow::Result<()> {
        let ip = self.ip;
        let flag = |name: &str, file: &str| format!("--{name}={}", self.file(file));
        let server = vec![
            programs::kube_apiserver()?.display().to_string(),
            format!("--etcd-servers=http://{ip}:2379"),
            format!("--bind-address={ip}"),
            format!("--secure-port={PORT}"),
            // Where pods would reach it, as in a cluster: not where we do. It must not be on loopback.
            "--advertise-address=192.0.2.1".to_owned(),
            "--endpoint-reconciler-type=none".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            "--authorization-mode=RBAC".to_owned(),
            format!("--service-account-issuer={ISSUER}"),
            flag("service-account-signing-key-file", "sa.key"),
            flag("service-account-key-file", "sa.pub"),
            flag("client-ca-file", "ca.crt"),
            flag("tls-cert-file", "server.crt"),
            flag("tls-private-key-file", "server.key"),
            flag("cert-dir", "certs"),
        ];
        let command = [dies_with_us(), server].concat();
        let url = self.url();
        let server = self.server.insert(Process::start("kube-apiserver", &self.dir, &command)?);
        let begun = Instant::now();
        loop {
            server.check()?;
            if let Some(etcd) = &mut self.etcd {
                etcd.check()?;
            }
            // Ready once the roles are there that every cluster has.
            let ready = curl(&self.dir, &url, "GET", "/readyz", None);
            match ready {
                Ok((200, _)) => return Ok(()),
                _ if begun.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(100)),
                other => bail!("the API server is not ready within {PATIENCE:?}: {other:?}"),
            }
        }
    }

    /// `https://<address>`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}", SocketAddr::from((self.ip, PORT)))
    }

    /// The authority of its certificate.
    #[must_use]
    pub fn ca(&self) -> String {
        self.file("ca.crt")
    }

    /// The key that signs service-account tokens.
    #[must_use]
    pub fn token_key(&self) -> PathBuf {
        self.dir.join("sa.key")
    }

    /// Configuration for clients that may do everything.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("admin.conf")
    }

    /// Asks as administrator; answers with the status and what came with it.
    ///
    /// # Errors
    /// Nobody answers.
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> anyhow::Result<(u16, Value)> {
        curl(&self.dir, &self.url(), method, path, body)
    }

    /// Creates an object below `path`.
    ///
    /// # Errors
    /// It is refused; the error is the server's.
    pub fn create(&self, path: &str, object: &Value) -> anyhow::Result<Value> {
        let (status, answer) = self.ask("POST", path, Some(object))?;
        if status != 201 {
            bail!("{path}: {status}: {}", answer["message"]);
        }
        Ok(answer)
    }

    /// Deletes an object, at once.
    ///
    /// # Errors
    /// It is refused; the error is the server's.
    pub fn delete(&self, path: &str) -> anyhow::Result<()> {
        let (status, answer) = self.ask("DELETE", &format!("{path}?gracePeriodSeconds=0"), None)?;
        if status != 200 {
            bail!("{path}: {status}: {}", answer["message"]);
        }
        Ok(())
    }

    /// Creates a namespace.
    ///
    /// # Errors
    /// As for [`Self::create`].
    pub fn namespace(&self, name: &str) -> anyhow::Result<()> {
        let o = json!({"metadata": {"name": name}});
        self.create("/api/v1/namespaces", &o).map(drop)
    }

    /// Creates a service account.
    ///
    /// # Errors
    /// As for [`Self::create`].
    pub fn service_account(&self, namespace: &str, name: &str) -> anyhow::Result<()> {
        let o = json!({"metadata": {"name": name}});
        self.create(&format!("/api/v1/namespaces/{namespace}/serviceaccounts"), &o).map(drop)
    }

    /// A token of an account as a kubelet asks for it (TokenRequest); bound to a pod if there is one.
    ///
    /// # Errors
    /// As for [`Self::create`].
    pub fn token(
        &self,
        namespace: &str,
        account: &str,
        audience: &str,
        pod: Option<&str>,
    ) -> anyhow::Result<String> {
        let mut spec = json!({"audiences": [audience], "expirationSeconds": 3600});
        if let Some(pod) = pod {
            spec["boundObjectRef"] = json!({"apiVersion": "v1", "kind": "Pod", "name": pod});
        }
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
        let answer = self.create(&path, &json!({"spec": spec}))?;
        Ok(answer["status"]["token"].as_str().context("no token in the answer")?.to_owned())
    }

    fn file(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    fn make_certificates(&self) -> anyhow::Result<()> {
        let openssl = |line: &str| -> anyhow::Result<()> {
            // Paths without spaces: this directory is a test's own.
            let line = line.replace('@', &format!("{}/", self.dir.display()));
            programs::must(&format!("openssl {line}")).map(drop)
        };
        let new = "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
        openssl(&format!("{new} -x509 -days 2 -subj /CN=kubernetes -keyout @ca.key -out @ca.crt"))?;
        for (name, subject, usage) in [
            ("server", "/CN=kube-apiserver", "serverAuth"),
            ("admin", "/O=system:masters/CN=admin", "clientAuth"),
        ] {
            let ext = format!(
                "subjectAltName=DNS:kubernetes.default.svc,DNS:localhost,IP:{}\nextendedKeyUsage={usage}\n",
                self.ip
            );
            std::fs::write(self.dir.join("ext"), ext)?;
            openssl(&format!("{new} -subj {subject} -keyout @{name}.key -out @{name}.csr"))?;
            openssl(&format!(
                "x509 -req -in @{name}.csr -CA @ca.crt -CAkey @ca.key -CAcreateserial -days 2 -extfile @ext \
                 -out @{name}.crt"
            ))?;
        }
        openssl("genrsa -out @sa.key 2048")?;
        openssl("rsa -in @sa.key -pubout -out @sa.pub")?;
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "admin",
            "clusters": [{"name": "here", "cluster": {"server": self.url(), "certificate-authority": self.ca()}}],
            "users": [{"name": "admin", "user": {
                "client-certificate": self.file("admin.crt"), "client-key": self.file("admin.key")}}],
            "contexts": [{"name": "admin", "context": {"cluster": "here", "user": "admin"}}],
        });
        std::fs::write(self.kubeconfig(), config.to_string())?;
        Ok(())
    }
}

/// Nothing is left behind if the test is killed.
fn dies_with_us() -> Vec<String> {
    ["setpriv", "--pdeathsig", "KILL"].map(str::to_owned).to_vec()
}

fn curl(
    dir: &Path,
    server: &str,
    method: &str,
    path: &str,
    body: Option<&Value>,
) -> anyhow::Result<(u16, Value)> {
    let file = |name: &str| dir.join(name).display().to_string();
    let (ca, cert, key) = (file("ca.crt"), file("admin.crt"), file("admin.key"));
    let (url, body) = (format!("{server}{path}"), body.map(Value::to_string));
    let mut args = vec!["-sS", "--max-time", "20", "--noproxy", "*", "-X", method, "-w", "\n%{http_code}"];
    args.extend(["--cacert", &ca, "--cert", &cert, "--key", &key, &url]);
    if let Some(body) = &body {
        args.extend(["-H", "content-type: application/json", "--data-binary", body]);
    }
    let said = programs::run("curl", &args)?.ok(&url)?;
    let (text, status) = said.rsplit_once('\n').unwrap_or(("", &said));
    // What is no JSON, as `ok` of /readyz, is told as text.
    let answer = serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()));
    Ok((status.parse()?, answer))
}

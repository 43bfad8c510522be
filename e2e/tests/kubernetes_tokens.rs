//! Service-account tokens of a real Kubernetes API server as proof of identity: verified by its keys, or by asking it.
//!
//! Each token is shown by a sidecar that has nothing else, and the CA's log of issuance is where it is seen what became of it.

#[expect(dead_code, unused_imports, reason = "what is shared is more than this test uses")]
mod support;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use flotilla_e2e::kubernetes::{ApiServer, ISSUER};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

use crate::support::*;

/// An API server keeps a token that it knew for ten seconds, and notices what was deleted a little later.
const CACHED: Duration = Duration::from_secs(20);

struct Bed {
    cluster: Cluster,
    server: ApiServer,
    workloads: u8,
    running: Option<String>,
}

impl Bed {
    /// A control plane with the flags that `flags` makes of the server and the path of its credential.
    fn start(flags: impl FnOnce(&ApiServer) -> Vec<String>) -> Self {
        let mut server = None;
        let cluster = Cluster::start_after("west", |c| {
            let s = ApiServer::start(&c.path("kubernetes"), c.host(8)).unwrap();
            for (namespace, account) in
                [("flotilla-system", "control-plane"), ("books", "reviews"), ("books", "gone")]
            {
                // Two of the three are in one namespace.
                let _ = s.namespace(namespace);
                s.service_account(namespace, account).unwrap();
            }
            let own = s.token("flotilla-system", "control-plane", ISSUER, None).unwrap();
            std::fs::write(c.path("credential"), own).unwrap();
            let mut flags = flags(&s);
            flags.push(format!("--token-ca={}", s.ca()));
            flags.push(format!("--token-credential={}", c.path("credential").display()));
            server = Some(s);
            flags
        });
        cluster.found();
        Self { cluster, server: server.unwrap(), workloads: 0, running: None }
    }

    /// Lets the control plane's account ask about tokens.
    fn allow(&self) {
        let binding = json!({
            "metadata": {"name": "flotilla"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:auth-delegator"},
            "subjects": [{"kind": "ServiceAccount", "name": "control-plane", "namespace": "flotilla-system"}],
        });
        self.server.create("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", &binding).unwrap();
    }

    fn pod(&self, name: &str, account: &str) {
        let pod = json!({"metadata": {"name": name},
            "spec": {"serviceAccountName": account, "containers": [{"name": "app", "image": "app"}]}});
        self.server.create("/api/v1/namespaces/books/pods", &pod).unwrap();
    }

    /// Starts a sidecar of `books/<account>` with a token; answers with its address.
    fn shows(&mut self, account: &str, token: &str) -> std::net::Ipv4Addr {
        self.workloads += 1;
        let ip = self.cluster.workload(self.workloads);
        // One that was refused keeps asking; the next has nothing of the one before it.
        if let Some(last) = self.running.replace(account.to_owned()) {
            self.cluster.kill(&last);
            let _ = std::fs::remove_dir_all(self.cluster.proxy_state(&last));
        }
        std::fs::write(self.cluster.path("tokens").join(account), token).unwrap();
        self.cluster.sidecar(account, ip, None);
        ip
    }

    /// It gets a certificate for who the token is about; answers with how that was proved.
    fn proves(&mut self, account: &str, token: &str) -> String {
        let before = self.issued().len();
        let ip = self.shows(account, token);
        self.cluster.ready(ip);
        let all = self.issued();
        let id = format!("spiffe://mesh.local/ns/books/sa/{account}");
        let new = all[before..].iter().find(|e| e["identity"] == id.as_str());
        let new = new.unwrap_or_else(|| panic!("no certificate of {id}: {all:#?}"));
        new["proof"]["kind"].as_str().unwrap_or_default().to_owned()
    }

    /// It gets none, for a reason with these words.
    fn is_refused(&mut self, account: &str, token: &str, words: &[&str]) {
        let before = self.issued().len();
        self.shows(account, token);
        let line = self.cluster.logged(account, words);
        assert!(line.contains("refused"), "{line}");
        assert_eq!(self.issued().len(), before, "{words:?}");
    }

    /// Certificates of workloads so far, as the log of issuance has them.
    fn issued(&self) -> Vec<Value> {
        let log = std::fs::read_to_string(self.cluster.path("state/audit/issuance.jsonl")).unwrap();
        log.lines()
            .map(|l| serde_json::from_str::<Value>(l).unwrap())
            .filter(|e| {
                e["event"] == "issued" && e["identity"].as_str().is_some_and(|i| i.contains("/ns/books/"))
            })
            .collect()
    }

    /// What a token says, signed once more with the server's own key after `change`.
    fn signed(&self, token: &str, change: impl FnOnce(&mut Value)) -> String {
        let key = std::fs::read(self.server.token_key()).unwrap();
        let kid = jsonwebtoken::decode_header(token).unwrap().kid;
        let mut claims = jsonwebtoken::dangerous::insecure_decode::<Value>(token).unwrap().claims;
        change(&mut claims);
        let header = Header { kid, ..Header::new(Algorithm::RS256) };
        jsonwebtoken::encode(&header, &claims, &EncodingKey::from_rsa_pem(&key).unwrap()).unwrap()
    }

    fn token(&self, account: &str, audience: &str, pod: Option<&str>) -> String {
        self.server.token("books", account, audience, pod).unwrap()
    }

    /// A token as secrets of old hold it, without an end and an audience, with its secret.
    fn legacy(&self) -> String {
        let accounts = "/api/v1/namespaces/books/serviceaccounts/reviews";
        let uid = self.server.ask("GET", accounts, None).unwrap().1["metadata"]["uid"].clone();
        let some = self.token("reviews", "istio-ca", None);
        let token = self.signed(&some, |claims| {
            *claims = json!({
                "iss": "kubernetes/serviceaccount", "sub": "system:serviceaccount:books:reviews",
                "kubernetes.io/serviceaccount/namespace": "books",
                "kubernetes.io/serviceaccount/secret.name": "reviews-token",
                "kubernetes.io/serviceaccount/service-account.name": "reviews",
                "kubernetes.io/serviceaccount/service-account.uid": uid,
            });
        });
        // In a cluster a controller fills it in.
        let secret = json!({
            "type": "kubernetes.io/service-account-token", "stringData": {"token": token},
            "metadata": {"name": "reviews-token", "annotations": {
                "kubernetes.io/service-account.name": "reviews", "kubernetes.io/service-account.uid": uid}},
        });
        self.server.create("/api/v1/namespaces/books/secrets", &secret).unwrap();
        token
    }
}

fn past(claims: &mut Value) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    (claims["iat"], claims["nbf"], claims["exp"]) = (json!(now - 7200), json!(now - 7200), json!(now - 3600));
}

/// A token of another cluster of the same name: only its key tells them apart.
fn of_another_cluster(c: &Cluster) -> String {
    let s = ApiServer::start(&c.path("other"), c.host(9)).unwrap();
    s.namespace("books").unwrap();
    s.service_account("books", "reviews").unwrap();
    s.token("books", "reviews", "istio-ca", None).unwrap()
}

#[test]
#[ignore = "needs the flotilla binary, etcd and a Kubernetes API server; `cargo verify --with kubernetes` runs it"]
fn the_api_server_is_asked_about_tokens() {
    let mut b = Bed::start(|s| vec![format!("--token-review={}", s.url())]);
    b.pod("reviews-1", "reviews");
    let good = b.token("reviews", "istio-ca", Some("reviews-1"));

    // Without the role nobody is believed, and both sides say what is missing.
    b.is_refused("reviews", &good, &["403 Forbidden", "system:auth-delegator"]);
    b.cluster.logged("control-plane", &["system:auth-delegator", "cannot create resource", "tokenreviews"]);
    b.allow();
    let waited = b.workloads;
    b.cluster.ready(b.cluster.workload(waited));
    assert_eq!(b.proves("reviews", &good), "token review");

    let wrong = b.token("reviews", ISSUER, None);
    b.is_refused("reviews", &wrong, &["is invalid for the target audiences"]);
    let expired = b.signed(&good, past);
    b.is_refused("reviews", &expired, &["service account token has expired"]);
    let other = of_another_cluster(&b.cluster);
    b.is_refused("reviews", &other, &["invalid bearer token"]);
    let legacy = b.legacy();
    b.is_refused("reviews", &legacy, &["is invalid for the target audiences"]);

    // What is deleted takes its tokens with it.
    let of_gone = b.token("gone", "istio-ca", None);
    assert_eq!(b.proves("gone", &of_gone), "token review");
    b.server.delete("/api/v1/namespaces/books/serviceaccounts/gone").unwrap();
    b.server.delete("/api/v1/namespaces/books/pods/reviews-1").unwrap();
    std::thread::sleep(CACHED);
    b.is_refused("gone", &of_gone, &["invalid bearer token"]);
    b.is_refused("reviews", &good, &["invalid bearer token"]);

    // Away: said at once, and who asks again gets its certificate when it is back.
    let good = b.token("reviews", "istio-ca", None);
    b.server.stop();
    let begun = Instant::now();
    b.is_refused("reviews", &good, &["the API server could not be asked"]);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let ip = b.cluster.workload(b.workloads);
    b.server.resume().unwrap();
    let back = Instant::now();
    b.cluster.ready(ip);
    eprintln!("a certificate {:?} after the API server was back", back.elapsed());
}

#[test]
#[ignore = "needs the flotilla binary, etcd and a Kubernetes API server; `cargo verify --with kubernetes` runs it"]
fn tokens_are_verified_by_the_keys_of_the_api_server() {
    let mut b = Bed::start(|s| vec![format!("--token-issuer={ISSUER}={}", s.url())]);
    b.pod("reviews-1", "reviews");
    let good = b.token("reviews", "istio-ca", Some("reviews-1"));
    assert_eq!(b.proves("reviews", &good), "token of an issuer");

    let wrong = b.token("reviews", ISSUER, None);
    b.is_refused("reviews", &wrong, &["InvalidAudience"]);
    let expired = b.signed(&good, past);
    b.is_refused("reviews", &expired, &["ExpiredSignature"]);
    let other = of_another_cluster(&b.cluster);
    b.is_refused("reviews", &other, &["its issuer has no such key"]);
    let legacy = b.legacy();
    b.is_refused("reviews", &legacy, &["workload token"]);

    // By keys alone nobody notices what is gone: such a token is good until it ends.
    b.server.delete("/api/v1/namespaces/books/pods/reviews-1").unwrap();
    let of_gone = b.token("gone", "istio-ca", None);
    b.server.delete("/api/v1/namespaces/books/serviceaccounts/gone").unwrap();
    std::thread::sleep(CACHED);
    assert_eq!(b.proves("gone", &of_gone), "token of an issuer");
    assert_eq!(b.proves("reviews", &good), "token of an issuer");

    // Nor does anybody need the server as long as its keys are known; a control plane that starts without it does.
    b.server.stop();
    assert_eq!(b.proves("reviews", &good), "token of an issuer");
    b.cluster.kill("control-plane");
    b.cluster.control_plane();
    b.is_refused("reviews", &good, &["keys of its issuer are not known yet"]);
    let ip = b.cluster.workload(b.workloads);
    b.server.resume().unwrap();
    let back = Instant::now();
    b.cluster.ready(ip);
    eprintln!("a certificate {:?} after the API server was back", back.elapsed());
}

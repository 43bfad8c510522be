//! Meshes on paper for tests.
#![allow(dead_code, reason = "each test program uses a part")]

use flotilla_simulate::{Error, Options, Question};
use serde_json::{Value, json};

/// Documents.
#[derive(Clone, Default)]
pub(crate) struct Mesh(pub(crate) Vec<Value>);

impl Mesh {
    #[must_use]
    pub(crate) fn with(mut self, document: Value) -> Self {
        self.0.push(document);
        self
    }

    /// Loads the mesh; the error names what is not valid.
    pub(crate) fn try_load(&self) -> Result<flotilla_simulate::Mesh, String> {
        let text: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        let stdin = text.join("\n---\n");
        let mesh = flotilla_simulate::Mesh::load(&["-".into()], &mut stdin.as_bytes(), &Options::default())
            .map_err(|e| e.to_string())?;
        match mesh.validation().reports.iter().find(|r| !r.valid) {
            Some(r) => Err(format!("{} is not valid: {:?}", r.subject(), r.errors)),
            None => Ok(mesh),
        }
    }

    pub(crate) fn load(&self) -> flotilla_simulate::Mesh {
        self.try_load().unwrap()
    }

    pub(crate) fn try_ask(&self, from: &str, request: &str, headers: &[&str]) -> Result<Value, Error> {
        let question = Question {
            from: from.to_owned(),
            request: request.to_owned(),
            headers: headers.iter().map(|h| (*h).to_owned()).collect(),
            ..Question::default()
        };
        self.load().ask(&question).map(|a| serde_json::to_value(a).unwrap())
    }

    /// Asks, and expects an answer that has everything in `want`.
    #[track_caller]
    pub(crate) fn asks(&self, from: &str, request: &str, headers: &[&str], want: &Value) -> Value {
        let answer = self.try_ask(from, request, headers).unwrap();
        if let Err(e) = contains(&answer, want, "") {
            panic!("{from}: {request}: {e}\n{answer:#}");
        }
        answer
    }
}

/// Whether a value has everything that another one has; lists have the same length.
pub(crate) fn contains(have: &Value, want: &Value, at: &str) -> Result<(), String> {
    match (have, want) {
        (Value::Object(h), Value::Object(w)) => w
            .iter()
            .try_for_each(|(k, v)| contains(h.get(k).unwrap_or(&Value::Null), v, &format!("{at}.{k}"))),
        (Value::Array(h), Value::Array(w)) if h.len() == w.len() => {
            h.iter().zip(w).enumerate().try_for_each(|(i, (h, w))| contains(h, w, &format!("{at}[{i}]")))
        }
        _ if have == want => Ok(()),
        _ => Err(format!("{at} is {have}, expected {want}")),
    }
}

fn service(name: &str, ip: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": ip, "selector": {"app": name}, "ports": [{"name": "http", "port": 9080}]}
    })
}

fn workload(app: &str, version: &str, ip: &str) -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
        "metadata": {"name": format!("{app}-{version}"), "namespace": "default"},
        "spec": {"address": ip, "serviceAccount": app,
                 "labels": {"app": app, "version": version, "security.istio.io/tlsMode": "istio"}}
    })
}

/// Reviews in three versions, ratings and a product page.
#[must_use]
pub(crate) fn bookinfo() -> Mesh {
    let subset = |v: &str| json!({"name": v, "labels": {"version": v}});
    Mesh(vec![
        service("reviews", "10.96.0.1"),
        service("ratings", "10.96.0.2"),
        service("productpage", "10.96.0.3"),
        workload("reviews", "v1", "10.1.0.11"),
        workload("reviews", "v2", "10.1.0.12"),
        workload("reviews", "v3", "10.1.0.13"),
        workload("ratings", "v1", "10.1.0.21"),
        workload("productpage", "v1", "10.1.0.31"),
        json!({
            "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
            "metadata": {"name": "reviews", "namespace": "default"},
            "spec": {"host": "reviews", "subsets": [subset("v1"), subset("v2"), subset("v3")]}
        }),
    ])
}

//! Every field of what users author, and what shows that it does something.
//!
//! A row sets one field in a mesh on paper and says what an answer (or a proxy's configuration) then holds. The same mesh
//! without the field must not hold it, so each row fails without its field by construction. `pilot/FIELDS.md` is made of
//! the rows (`FLOTILLA_WRITE=1` writes it), and a field that no row names fails the test.

#[path = "../support/mod.rs"]
mod support;

mod destination_rule;
mod elsewhere;
mod envoy_filter;
mod gateway;
mod gateway_api;
mod ingress;
mod mesh_collectors;
mod mesh_config;
mod mesh_defaults;
mod mesh_proxies;
mod schema;
mod security;
mod service_entry;
mod sidecar;
mod v1alpha1;
mod virtual_service;

use std::collections::{BTreeMap, BTreeSet};

use schema::Schema;
use serde_json::{Value, json};
use support::{Mesh, contains};

/// Kinds with their fields; a message that several have is listed at the first.
const KINDS: [&str; 19] = [
    "VirtualService",
    "DestinationRule",
    "Gateway",
    "ServiceEntry",
    "WorkloadEntry",
    "WorkloadGroup",
    "Sidecar",
    "ProxyConfig",
    "PeerAuthentication",
    "RequestAuthentication",
    "AuthorizationPolicy",
    "AuthenticationPolicy",
    "RbacConfig",
    "ServiceRole",
    "ServiceRoleBinding",
    "MeshConfig",
    "EnvoyFilter",
    "Ingress",
    "IngressClass",
];

/// Kinds of the Gateway API: the type, and whose it is. Fields are `api/<type>.<field>` in rows.
const GATEWAY_API: [(&str, &str); 7] = [
    ("GatewayClass", "GatewayClass"),
    ("Gateway", "Gateway"),
    ("HttpRoute", "HTTPRoute"),
    ("GrpcRoute", "GRPCRoute"),
    ("L4Route", "TLSRoute, TCPRoute"),
    ("ReferenceGrant", "ReferenceGrant"),
    ("BackendTlsPolicy", "BackendTLSPolicy"),
];

/// What is looked at.
#[derive(Clone)]
pub(crate) enum View {
    /// The answer to a request.
    Answer { from: &'static str, request: &'static str, headers: &'static [&'static str] },
    /// The configuration of a proxy.
    Config { from: &'static str },
    /// `status` of documents of the Gateway API: conditions by object and type.
    Status,
    /// A warning about the document, that says this: the field is known and does nothing.
    Warned(&'static str),
    /// The document is refused, and the error says this.
    Refused(&'static str),
}

pub(crate) fn get(request: &'static str) -> View {
    View::Answer { from: "default/productpage-v1", request, headers: &[] }
}

pub(crate) fn with_headers(request: &'static str, headers: &'static [&'static str]) -> View {
    View::Answer { from: "default/productpage-v1", request, headers }
}

pub(crate) fn from(from: &'static str, request: &'static str) -> View {
    View::Answer { from, request, headers: &[] }
}

/// A mesh, and the place of one of its documents.
#[derive(Clone)]
pub(crate) struct Base {
    pub(crate) mesh: Mesh,
    at: usize,
}

impl Base {
    /// A mesh whose last document is the one that fields are set in.
    pub(crate) fn new(mesh: Mesh) -> Self {
        let at = mesh.0.len() - 1;
        Self { mesh, at }
    }

    fn set(&self, pointer: &str, value: Value) -> Mesh {
        let mut mesh = self.mesh.clone();
        set(&mut mesh.0[self.at], pointer, value);
        mesh
    }

    /// The same with another field set as well.
    pub(crate) fn and(&self, pointer: &str, value: Value) -> Self {
        Self { mesh: self.set(pointer, value), at: self.at }
    }
}

/// Sets a value by JSON pointer and makes what is missing on the way.
fn set(v: &mut Value, pointer: &str, value: Value) {
    let mut at = v;
    for key in pointer.trim_start_matches('/').split('/') {
        let key = key.replace("~1", "/").replace("~0", "~");
        at = match key.parse::<usize>() {
            Ok(i) => {
                if at.is_null() {
                    *at = json!([]);
                }
                let list = at.as_array_mut().expect("a list");
                while list.len() <= i {
                    list.push(Value::Null);
                }
                &mut list[i]
            }
            Err(_) => {
                if at.is_null() {
                    *at = json!({});
                }
                at.as_object_mut().expect("an object").entry(key).or_insert(Value::Null)
            }
        };
    }
    *at = value;
}

/// A field and what it does.
pub(crate) struct Row {
    field: &'static str,
    base: Base,
    pointer: &'static str,
    value: Value,
    /// What stands there instead, where something must.
    other: Option<Value>,
    view: View,
    want: Value,
}

pub(crate) fn row(
    field: &'static str,
    base: &Base,
    pointer: &'static str,
    value: Value,
    view: View,
    want: Value,
) -> Row {
    Row { field, base: base.clone(), pointer, value, other: None, view, want }
}

impl Row {
    /// The same for a field whose place is not its name.
    pub(crate) fn named(self, field: &'static str) -> Self {
        Self { field, ..self }
    }
}

/// A field that is accepted, with a warning, and not enforced.
pub(crate) fn unenforced(field: &'static str, base: &Base, pointer: &'static str, value: Value) -> Row {
    row(field, base, pointer, value, View::Warned("accepted but not enforced yet"), Value::Null)
}

/// A field that is accepted and has no effect, which a warning says in these words.
pub(crate) fn warned(
    field: &'static str,
    base: &Base,
    pointer: &'static str,
    value: Value,
    says: &'static str,
) -> Row {
    row(field, base, pointer, value, View::Warned(says), Value::Null)
}

/// A field that is refused as not supported, which the error says in these words.
pub(crate) fn refused(
    field: &'static str,
    base: &Base,
    pointer: &'static str,
    value: Value,
    says: &'static str,
) -> Row {
    row(field, base, pointer, value, View::Refused(says), Value::Null)
}

impl Row {
    /// Compared with another value instead of none.
    pub(crate) fn instead_of(mut self, other: Value) -> Self {
        self.other = Some(other);
        self
    }

    fn check(&self) -> Result<(), String> {
        let with = self.base.set(self.pointer, self.value.clone());
        match self.view {
            View::Warned(says) => {
                let loaded = with.try_load()?;
                let all = loaded.validation().reports.iter().flat_map(|r| &r.warnings);
                let given: Vec<_> = all.map(|w| w.message.clone()).collect();
                let found = given.iter().any(|w| w.contains(says));
                return if found { Ok(()) } else { Err(format!("no warning says {says:?}, but {given:?}")) };
            }
            View::Refused(says) => {
                return match with.try_load() {
                    Err(e) if e.contains(says) => Ok(()),
                    Err(e) => Err(format!("{says:?} is not in {e}")),
                    Ok(_) => Err("is not refused".to_owned()),
                };
            }
            _ => {}
        }
        let without = match &self.other {
            Some(o) => self.base.set(self.pointer, o.clone()),
            None => self.base.mesh.clone(),
        };
        let see = |m: &Mesh| match &self.view {
            View::Answer { from, request, headers } => {
                m.try_load()?;
                m.try_ask(from, request, headers).map_err(|e| e.to_string())
            }
            View::Config { from } => m.try_load()?.configuration(from).map_err(|e| e.to_string()),
            View::Status => {
                m.try_load().map(|m| conditions(&serde_json::to_value(m.gateway_api_status()).unwrap()))
            }
            View::Warned(_) | View::Refused(_) => Ok(Value::Null),
        };
        let seen = see(&with)?;
        contains(&seen, &self.want, "").map_err(|e| format!("with the field: {e}"))?;
        match contains(&see(&without)?, &self.want, "") {
            Err(_) => Ok(()),
            Ok(()) => Err("holds without the field, too".into()),
        }
    }

    fn shows(&self) -> String {
        match &self.view {
            View::Warned(says) => format!("no effect; galley warns: {says}"),
            View::Refused(says) => format!("refused: {says}"),
            View::Answer { from, request, headers } => {
                let of = if *from == "default/productpage-v1" { String::new() } else { format!("{from}: ") };
                let with = headers.iter().map(|h| format!(" `{h}`")).collect::<String>();
                format!("{of}`{request}`{with}: {}", short(&self.want))
            }
            View::Config { from } => format!("configuration of {from}: {}", short(&self.want)),
            View::Status => format!("status: {}", short(&self.want)),
        }
    }
}

/// Conditions of all objects, such as `{"HTTPRoute r": {"Accepted": {"status": "True"}}}`; those of listeners are under the
/// listener's name.
fn conditions(status: &Value) -> Value {
    fn walk(v: &Value, into: &mut serde_json::Map<String, Value>) {
        match v {
            Value::Array(l) => l.iter().for_each(|v| walk(v, into)),
            Value::Object(o) => {
                if let Some(t) = o.get("type").and_then(Value::as_str).filter(|_| o.contains_key("reason")) {
                    into.insert(t.to_owned(), v.clone());
                }
                let named = |v: &Value| v.get("name").and_then(Value::as_str).map(str::to_owned);
                for (k, v) in o {
                    match (k.as_str(), v) {
                        ("listeners", Value::Array(l)) => {
                            for v in l {
                                let mut own = serde_json::Map::new();
                                walk(v, &mut own);
                                into.insert(named(v).unwrap_or_default(), Value::Object(own));
                            }
                        }
                        _ => walk(v, into),
                    }
                }
            }
            _ => {}
        }
    }
    let mut out = serde_json::Map::new();
    for (kind, list) in status.as_object().into_iter().flatten() {
        for object in list.as_array().into_iter().flatten() {
            let mut own = serde_json::Map::new();
            walk(&object["status"], &mut own);
            let name = object["name"].as_str().unwrap_or_default();
            out.insert(format!("{kind} {name}"), Value::Object(own));
        }
    }
    Value::Object(out)
}

fn short(want: &Value) -> String {
    let text = want.to_string().replace('|', "\\|");
    format!("`{text}`")
}

#[test]
fn every_field_does_something() {
    let mut rows = virtual_service::rows();
    rows.extend(destination_rule::rows());
    rows.extend(gateway::rows());
    rows.extend(service_entry::rows());
    rows.extend(sidecar::rows());
    rows.extend(security::rows());
    rows.extend(v1alpha1::rows());
    rows.extend(mesh_config::rows());
    rows.extend(mesh_defaults::rows());
    rows.extend(mesh_proxies::rows());
    rows.extend(mesh_collectors::rows());
    rows.extend(gateway_api::rows());
    rows.extend(envoy_filter::rows());
    rows.extend(ingress::rows());
    let mut failed = Vec::new();
    let mut shown: BTreeMap<&str, String> = BTreeMap::new();
    // Each row makes worlds of its own, which takes long enough to use every core.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|s| {
        let parts = rows.chunks(rows.len().div_ceil(cores * 8));
        let all: Vec<_> = parts
            .map(|rows| {
                let check = |r: &Row| r.check().err().map(|e| format!("{}: {e}", r.field));
                s.spawn(move || rows.iter().filter_map(check).collect::<Vec<_>>())
            })
            .collect();
        for part in all {
            failed.extend(part.join().unwrap());
        }
    });
    for r in &rows {
        shown.entry(r.field).or_insert_with(|| r.shows());
    }
    for (field, test) in elsewhere::TESTS {
        if !elsewhere::exists(test) {
            failed.push(format!("{field}: there is no test {test}"));
        }
        shown.entry(field).or_insert_with(|| format!("test `{test}`"));
    }
    for (field, why) in elsewhere::DESCRIPTIVE {
        shown.entry(field).or_insert_with(|| (*why).to_owned());
    }
    let schema = Schema::read();
    let mut seen = BTreeSet::new();
    let mut text = String::from(
        "# Fields\n\nWhat shows that each field of Istio's configuration, of the Gateway API and of Ingress does something: a request in a mesh on paper whose \
         answer holds\nthis with the field and not without it, or a test. Made by `multicluster/simulate/tests/fields`; \
         `FLOTILLA_WRITE=1 cargo\ntest -p flotilla-simulate --test fields` writes it anew.\n",
    );
    for kind in KINDS {
        text += &format!("\n## {kind}\n\n| field | shown by |\n|---|---|\n");
        for path in schema.paths(kind, &mut seen) {
            let field = path.strip_prefix(kind).unwrap_or(&path).trim_start_matches('.');
            match shown.remove(path.as_str()) {
                Some(by) => text += &format!("| `{field}` | {by} |\n"),
                None => failed.push(format!("{path}: no row")),
            }
        }
    }
    let schema = Schema::gateway_api();
    let mut seen = BTreeSet::new();
    for (kind, title) in GATEWAY_API {
        text += &format!("\n## {title} (Gateway API)\n\n| field | shown by |\n|---|---|\n");
        for path in schema.paths(kind, &mut seen) {
            let field = path.strip_prefix(kind).unwrap_or(&path).trim_start_matches('.');
            match shown.remove(format!("api/{path}").as_str()) {
                Some(by) => text += &format!("| `{field}` | {by} |\n"),
                None => failed.push(format!("api/{path}: no row")),
            }
        }
    }
    failed.extend(shown.keys().map(|f| format!("{f}: there is no such field")));
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../pilot/FIELDS.md");
    if std::env::var_os("FLOTILLA_WRITE").is_some() {
        std::fs::write(&file, &text).unwrap();
    }
    if failed.is_empty() && std::fs::read_to_string(&file).unwrap_or_default() != text {
        failed.push("pilot/FIELDS.md is not what the rows say: run with FLOTILLA_WRITE=1".into());
    }
    assert!(failed.is_empty(), "{} of {} rows:\n{}", failed.len(), rows.len(), failed.join("\n"));
}

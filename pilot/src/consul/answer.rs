//! What an agent answers, as far as it matters here.
//!
//! The agent is not trusted to be in order: what cannot be read rejects itself alone, and everything has a bound. Go
//! writes empty lists and maps as `null`.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// Services beyond these are not looked at: a mesh has fewer virtual addresses than that.
pub(crate) const MAX_SERVICES: usize = 20_000;
/// Instances of one service beyond these are not used.
pub(crate) const MAX_INSTANCES: usize = 10_000;
/// Tags of an instance, and entries of its metadata, beyond these are not used. Consul itself allows 64 of the latter.
const MAX_WORDS: usize = 128;
/// Longer tags and values are not used: Consul allows 512 bytes in metadata.
const MAX_WORD: usize = 512;

/// The registry's own service.
const OWN: &str = "consul";

/// Why an answer is of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AnswerError {
    /// Not the JSON that the interface describes.
    #[error("the answer is not what Consul's interface describes")]
    Shape(#[from] serde_json::Error),
}

/// What the checks of an instance say together: the worst of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    #[default]
    Passing,
    Warning,
    /// Also under maintenance, which Consul tells as a critical check.
    Critical,
}

/// An instance of a service.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Instance {
    pub(crate) node: String,
    pub(crate) datacenter: String,
    pub(crate) node_meta: BTreeMap<String, String>,
    pub(crate) id: String,
    pub(crate) tags: Vec<String>,
    /// Its own address, or else its node's.
    pub(crate) address: String,
    /// 0 if it has none.
    pub(crate) port: u16,
    pub(crate) meta: BTreeMap<String, String>,
    /// While it passes, and while it warns; 0 takes no traffic.
    pub(crate) weights: (u32, u32),
    pub(crate) status: Status,
}

/// Names of `/v1/catalog/services` without Consul's own, and how many were too many.
pub(crate) fn catalog(body: &[u8]) -> Result<(BTreeSet<String>, usize), AnswerError> {
    let all: BTreeMap<String, Value> = serde_json::from_slice(body)?;
    let mut names: BTreeSet<String> = all.into_keys().filter(|n| n != OWN).collect();
    let surplus = names.len().saturating_sub(MAX_SERVICES);
    while names.len() > MAX_SERVICES {
        names.pop_last();
    }
    Ok((names, surplus))
}

/// Services and nodes of the checks of `/v1/health/state/critical`; a check of a node alone has no service.
pub(crate) fn critical(body: &[u8]) -> Result<BTreeSet<(String, String)>, AnswerError> {
    let all: Vec<Value> = serde_json::from_slice(body)?;
    let text = |v: &Value, key: &str| v[key].as_str().unwrap_or_default().to_owned();
    Ok(all.iter().map(|v| (text(v, "ServiceName"), text(v, "Node"))).collect())
}

/// Instances of `/v1/health/service/<name>` in a fixed order, and what of the answer was not used. Proxies and
/// gateways of Consul's own mesh are left out.
pub(crate) fn instances(body: &[u8]) -> Result<(Vec<Instance>, Vec<String>), AnswerError> {
    let all: Vec<Value> = serde_json::from_slice(body)?;
    let mut unused = Vec::new();
    if all.len() > MAX_INSTANCES {
        unused.push(format!(
            "{} instances are ignored: {MAX_INSTANCES} are the limit",
            all.len() - MAX_INSTANCES
        ));
    }
    let mut out = Vec::with_capacity(all.len().min(MAX_INSTANCES));
    for v in all.into_iter().take(MAX_INSTANCES) {
        match WireEntry::deserialize(v) {
            Ok(e) if e.service.kind.is_empty() => out.push(e.into()),
            Ok(_) => {}
            Err(e) => unused.push(format!("an instance is ignored: {e}")),
        }
    }
    out.sort_by(|a: &Instance, b| (&a.datacenter, &a.node, &a.id).cmp(&(&b.datacenter, &b.node, &b.id)));
    Ok((out, unused))
}

/// `null` is the default.
fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(d: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(d)?.unwrap_or_default())
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct WireEntry {
    node: WireNode,
    service: WireService,
    #[serde(default, deserialize_with = "nullable")]
    checks: Vec<WireCheck>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct WireNode {
    node: String,
    #[serde(default, deserialize_with = "nullable")]
    address: String,
    #[serde(default, deserialize_with = "nullable")]
    datacenter: String,
    #[serde(default, deserialize_with = "nullable")]
    meta: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct WireService {
    #[serde(rename = "ID")]
    id: String,
    #[serde(default, deserialize_with = "nullable")]
    kind: String,
    #[serde(default, deserialize_with = "nullable")]
    tags: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    address: String,
    #[serde(default, deserialize_with = "nullable")]
    port: i64,
    #[serde(default, deserialize_with = "nullable")]
    meta: BTreeMap<String, String>,
    weights: Option<WireWeights>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct WireWeights {
    passing: i64,
    warning: i64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct WireCheck {
    #[serde(default, deserialize_with = "nullable")]
    status: String,
}

impl From<WireEntry> for Instance {
    fn from(e: WireEntry) -> Self {
        let status = e.checks.iter().map(|c| match c.status.as_str() {
            "passing" => Status::Passing,
            "warning" => Status::Warning,
            // What is not known to be well gets no traffic, as in Consul's own DNS.
            _ => Status::Critical,
        });
        let weight = |n: i64| u32::try_from(n.clamp(0, 65_535)).unwrap_or(1);
        let weights = e.service.weights.map_or((1, 1), |w| (weight(w.passing), weight(w.warning)));
        Self {
            node: e.node.node,
            datacenter: e.node.datacenter,
            node_meta: bounded(e.node.meta),
            id: e.service.id,
            tags: e.service.tags.into_iter().filter(|t| t.len() <= MAX_WORD).take(MAX_WORDS).collect(),
            address: if e.service.address.is_empty() { e.node.address } else { e.service.address },
            port: u16::try_from(e.service.port).unwrap_or(0),
            meta: bounded(e.service.meta),
            weights,
            status: status.max().unwrap_or_default(),
        }
    }
}

fn bounded(meta: BTreeMap<String, String>) -> BTreeMap<String, String> {
    meta.into_iter().filter(|(k, v)| k.len() <= MAX_WORD && v.len() <= MAX_WORD).take(MAX_WORDS).collect()
}

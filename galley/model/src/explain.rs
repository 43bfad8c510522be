//! The way of a request, step by step, as parts of the mesh tell it to `flotilla explain`.

use serde::{Deserialize, Serialize};

/// How a step went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// It works, and not as well as it could, or only for some requests.
    Warning,
    /// No request gets past it.
    Broken,
}

/// One step on the way from a caller to a workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Which: `proxy`, `name`, `port`, `route`, `endpoints`, `policy`, `lease`, `tunnel`, `gateway`, `backend` ...
    pub step: String,
    /// How it went.
    pub state: State,
    /// What was found.
    pub says: String,
    /// What to do about it; empty if nothing is to be done.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub fix: String,
}

impl Step {
    /// As it should be.
    pub fn ok(step: &str, says: impl Into<String>) -> Self {
        Self { step: step.into(), state: State::Ok, says: says.into(), fix: String::new() }
    }

    /// Works, with a remark.
    pub fn warning(step: &str, says: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { step: step.into(), state: State::Warning, says: says.into(), fix: fix.into() }
    }

    /// Does not work.
    pub fn broken(step: &str, says: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { step: step.into(), state: State::Broken, says: says.into(), fix: fix.into() }
    }

    /// No request gets past it.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.state == State::Broken
    }
}

/// Where requests may end, beyond this cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Target {
    /// Member of the federation.
    pub cluster: String,
    /// Its part is used only when nothing else is left.
    pub lapsed: bool,
    /// Percent of requests that go there now.
    pub share: f64,
    /// Server name of sessions.
    pub sni: String,
    /// SPIFFE IDs of which the workload must have one.
    pub identities: Vec<String>,
    /// Service name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Service port.
    pub port: u16,
    /// The port is one of UDP.
    #[serde(default)]
    pub udp: bool,
    /// Subset; empty is all.
    pub subset: String,
}

/// What a caller's own control plane knows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Way {
    /// Steps in order; those after a broken one are missing.
    pub steps: Vec<Step>,
    /// SPIFFE ID of the caller.
    pub principal: String,
    /// Host that was meant.
    pub host: String,
    /// Whether workloads of this cluster serve it.
    pub local: bool,
    /// Other clusters that serve it.
    pub targets: Vec<Target>,
}

//! Workloads that register themselves in a `WorkloadGroup`, as virtual machines do: `flotilla.workload.v1.Registration/Report`.
//!
//! A proxy reports every few seconds, and at once when its workload's health changes. A registration holds for a few
//! reports, so whoever vanishes is gone soon, and a control plane that is away for a moment forgets nobody.

use std::{sync::Arc, time::Duration};

use tonic::{Status, transport::Channel};

use crate::{
    beside::{self, Beside, Call},
    node::NodeInfo,
    pb,
    server::PeerInfo,
};

/// From one report to the next, if nothing changes.
pub const INTERVAL: Duration = Duration::from_secs(5);
/// How long a registration holds without one.
pub const HOLDS: Duration = Duration::from_secs(17);
/// Largest report, bytes: a node, and little more.
const MAX_REPORT: usize = 256 * 1024;
/// Longest reason, bytes.
const MAX_REASON: usize = 1024;

/// How a workload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum State {
    /// Its probe fails, or has not been answered yet.
    Unhealthy = 0,
    /// It can be called, or nobody asked for a probe.
    Healthy = 1,
    /// It is about to end.
    Leaving = 2,
}

/// What a proxy tells of its workload.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Workload {
    /// The `WorkloadGroup`, of the proxy's namespace.
    pub group: String,
    /// How it is.
    pub state: State,
    /// Why it is not healthy.
    pub reason: String,
}

/// One report.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Report {
    #[prost(message, optional, tag = "1")]
    node: Option<pb::Node>,
    #[prost(string, tag = "2")]
    group: String,
    #[prost(enumeration = "State", tag = "3")]
    state: i32,
    #[prost(string, tag = "4")]
    reason: String,
}

/// The answer.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Registered {
    /// The group's `probe` as JSON; empty for none.
    #[prost(string, tag = "1")]
    pub probe: String,
}

/// Tells a control plane; `None` if it does not know what to do with it.
///
/// # Errors
/// What it answers.
pub async fn report(channel: Channel, node: &NodeInfo, w: Workload) -> Result<Option<Registered>, Status> {
    let Workload { group, state, reason } = w;
    let said = Report { node: Some(node.to_pb()), group, state: state.into(), reason };
    beside::tell::<RegistrationCall<Nobody>>(channel, said).await
}

/// Takes registrations.
pub trait RegistrationSink: Send + Sync + 'static {
    /// A proxy tells; answers the probe of the group as JSON.
    ///
    /// # Errors
    /// If it may not, or there is no such group.
    fn register(&self, peer: &PeerInfo, node: NodeInfo, what: Workload) -> Result<Option<String>, Status>;
}

/// The call over a [`RegistrationSink`].
pub struct RegistrationCall<S>(Arc<S>);

/// The same for a tonic server.
pub type RegistrationService<S> = Beside<RegistrationCall<S>>;

impl<S> RegistrationService<S> {
    /// A service that passes registrations on.
    pub fn new(sink: Arc<S>) -> Self {
        Self(Arc::new(RegistrationCall(sink)))
    }
}

impl<S: RegistrationSink> Call for RegistrationCall<S> {
    type Said = Report;
    type Answer = Registered;
    const NAME: &'static str = "flotilla.workload.v1.Registration";
    const PATH: &'static str = "/flotilla.workload.v1.Registration/Report";
    const MAX: usize = MAX_REPORT;

    fn answer(&self, peer: &PeerInfo, said: Report) -> Result<Registered, Status> {
        // A state of a later release is none in which it should be called.
        let state = State::try_from(said.state).unwrap_or(State::Unhealthy);
        let Report { node, group, reason, .. } = said;
        if group.is_empty() || group.len() > 253 || reason.len() > MAX_REASON {
            return Err(Status::invalid_argument("group or reason is missing or too long"));
        }
        let node = beside::node(node.as_ref())?;
        let probe = self.0.register(peer, node, Workload { group, state, reason })?;
        Ok(Registered { probe: probe.unwrap_or_default() })
    }
}

/// Whoever only tells.
struct Nobody;

impl RegistrationSink for Nobody {
    fn register(&self, _: &PeerInfo, _: NodeInfo, _: Workload) -> Result<Option<String>, Status> {
        Ok(None)
    }
}

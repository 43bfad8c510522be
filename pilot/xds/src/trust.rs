//! What proxies tell their control plane of the roots that they trust and the certificate that they show:
//! `flotilla.identity.v1.Trust/Report`.
//!
//! The acknowledgement of a bundle over ADS says that it has arrived. Before a root is taken away it must be known besides
//! which certificate a proxy shows, which its ADS stream does not tell: that outlives the certificate it was opened with.
//! A call of its own, on the same port and with the same certificates; a control plane that does not know it answers
//! `Unimplemented`, and no traffic depends on an answer.

use std::sync::Arc;

use tonic::{Status, transport::Channel};

use crate::{
    beside::{self, Beside, Call, Heard},
    node::NodeInfo,
    pb,
    server::PeerInfo,
};

/// Largest report, bytes: a node, and little more.
const MAX_REPORT: usize = 256 * 1024;

/// What a proxy trusts and shows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Trusting {
    /// Number of the own trust domain's bundle that it verifies with; 0 if it was told none.
    pub sequence: u64,
    /// SHA-256 of the intermediate in the certificate that it shows, hexadecimal.
    pub intermediate: String,
}

/// One report.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Report {
    #[prost(message, optional, tag = "1")]
    node: Option<pb::Node>,
    #[prost(uint64, tag = "2")]
    sequence: u64,
    #[prost(string, tag = "3")]
    intermediate: String,
}

/// Tells a control plane; answers whether it knows what to do with it.
///
/// # Errors
/// What it answers.
pub async fn report(channel: Channel, node: &NodeInfo, what: Trusting) -> Result<bool, Status> {
    let Trusting { sequence, intermediate } = what;
    let said = Report { node: Some(node.to_pb()), sequence, intermediate };
    Ok(beside::tell::<TrustCall<Nobody>>(channel, said).await?.is_some())
}

/// Takes reports.
pub trait TrustSink: Send + Sync + 'static {
    /// A proxy tells; sizes are within bounds.
    ///
    /// # Errors
    /// If it may not.
    fn report(&self, peer: &PeerInfo, node: NodeInfo, what: Trusting) -> Result<(), Status>;
}

/// The call over a [`TrustSink`].
pub struct TrustCall<S>(Arc<S>);

/// The same for a tonic server.
pub type TrustService<S> = Beside<TrustCall<S>>;

impl<S> TrustService<S> {
    /// A service that passes reports on.
    pub fn new(sink: Arc<S>) -> Self {
        Self(Arc::new(TrustCall(sink)))
    }
}

impl<S: TrustSink> Call for TrustCall<S> {
    type Said = Report;
    type Answer = Heard;
    const NAME: &'static str = "flotilla.identity.v1.Trust";
    const PATH: &'static str = "/flotilla.identity.v1.Trust/Report";
    const MAX: usize = MAX_REPORT;

    fn answer(&self, peer: &PeerInfo, said: Report) -> Result<Heard, Status> {
        let Report { node, sequence, intermediate } = said;
        let node = beside::node(node.as_ref())?;
        if intermediate.len() > 64 {
            return Err(Status::invalid_argument("intermediate: is no SHA-256"));
        }
        self.0.report(peer, node, Trusting { sequence, intermediate })?;
        Ok(Heard {})
    }
}

/// Whoever only tells.
struct Nobody;

impl TrustSink for Nobody {
    fn report(&self, _: &PeerInfo, _: NodeInfo, _: Trusting) -> Result<(), Status> {
        Ok(())
    }
}

//! What gateways tell their control plane of the ways to other clusters: `flotilla.gateway.v1.Links/Report`.
//!
//! A call of its own beside ADS, on the same port and with the same certificates, since a node of ADS belongs to a stream
//! and cannot be told anew in it. A control plane that does not know the call answers `Unimplemented`, and nothing
//! depends on an answer.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tonic::{Status, transport::Channel};

use crate::{
    beside::{self, Beside, Call, Heard},
    node::NodeInfo,
    pb,
    server::PeerInfo,
};

/// Clusters in a report; a federation has fewer.
pub const MAX_PEERS: usize = 4096;
/// Longest text in a report, bytes; longer ones are cut.
const MAX_TEXT: usize = 256;
/// Largest report, bytes.
const MAX_REPORT: usize = 2 * 1024 * 1024;

/// The ways from a gateway to one cluster.
#[derive(Clone, PartialEq, prost::Message, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PeerLink {
    /// That cluster.
    #[prost(string, tag = "1")]
    pub cluster: String,
    /// What carries sessions now: `quic`, `tcp`; empty is not known.
    #[prost(string, tag = "2")]
    pub transport: String,
    /// Open connections of QUIC.
    #[prost(uint32, tag = "3")]
    pub connections: u32,
    /// Smoothed round trip of the slowest of them, microseconds.
    #[prost(uint64, optional, tag = "4")]
    pub rtt_us: Option<u64>,
    /// Packets sent during the last minute.
    #[prost(uint64, optional, tag = "5")]
    pub packets_sent: Option<u64>,
    /// Of those, given up as lost.
    #[prost(uint64, optional, tag = "6")]
    pub packets_lost: Option<u64>,
    /// Why TCP carries what QUIC should.
    #[prost(string, tag = "7")]
    pub why_tcp: String,
    /// Why the transport was chosen, where there was a choice.
    #[prost(string, tag = "8")]
    pub choice: String,
    /// Congestion control of QUIC, `bbr` or `cubic`.
    #[prost(string, tag = "9")]
    pub congestion: String,
}

/// One report.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Report {
    #[prost(message, optional, tag = "1")]
    node: Option<pb::Node>,
    #[prost(message, repeated, tag = "2")]
    peers: Vec<PeerLink>,
}

/// Tells a control plane; answers whether it knows what to do with it.
///
/// # Errors
/// What it answers.
pub async fn report(channel: Channel, node: &NodeInfo, peers: Vec<PeerLink>) -> Result<bool, Status> {
    let said = Report { node: Some(node.to_pb()), peers };
    Ok(beside::tell::<LinkCall<Nobody>>(channel, said).await?.is_some())
}

/// Takes reports.
pub trait LinkSink: Send + Sync + 'static {
    /// A gateway tells; sizes are within bounds.
    ///
    /// # Errors
    /// If it may not.
    fn report(&self, peer: &PeerInfo, node: NodeInfo, peers: Vec<PeerLink>) -> Result<(), Status>;
}

/// The call over a [`LinkSink`].
pub struct LinkCall<S>(Arc<S>);

/// The same for a tonic server.
pub type LinkService<S> = Beside<LinkCall<S>>;

impl<S> LinkService<S> {
    /// A service that passes reports on.
    pub fn new(sink: Arc<S>) -> Self {
        Self(Arc::new(LinkCall(sink)))
    }
}

fn cut(text: &mut String) {
    let end = (0..=MAX_TEXT.min(text.len())).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
    text.truncate(end);
}

impl<S: LinkSink> Call for LinkCall<S> {
    type Said = Report;
    type Answer = Heard;
    const NAME: &'static str = "flotilla.gateway.v1.Links";
    const PATH: &'static str = "/flotilla.gateway.v1.Links/Report";
    const MAX: usize = MAX_REPORT;

    fn answer(&self, peer: &PeerInfo, said: Report) -> Result<Heard, Status> {
        let Report { node, mut peers } = said;
        let node = beside::node(node.as_ref())?;
        if peers.len() > MAX_PEERS {
            return Err(Status::invalid_argument(format!("peers: {} (at most {MAX_PEERS})", peers.len())));
        }
        for p in &mut peers {
            [&mut p.cluster, &mut p.transport, &mut p.why_tcp, &mut p.choice, &mut p.congestion]
                .into_iter()
                .for_each(cut);
        }
        self.0.report(peer, node, peers)?;
        Ok(Heard {})
    }
}

/// Whoever only tells.
struct Nobody;

impl LinkSink for Nobody {
    fn report(&self, _: &PeerInfo, _: NodeInfo, _: Vec<PeerLink>) -> Result<(), Status> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut_between_characters() {
        let mut s = "ü".repeat(MAX_TEXT);
        s.insert(0, 'x');
        cut(&mut s);
        assert_eq!(s.len(), MAX_TEXT - 1);
        let mut short = "tcp".to_owned();
        cut(&mut short);
        assert_eq!(short, "tcp");
    }
}

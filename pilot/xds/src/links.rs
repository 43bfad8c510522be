//! What gateways tell their control plane of the ways to other clusters: `flotilla.gateway.v1.Links/Report`.
//!
//! A call of its own beside ADS, on the same port and with the same certificates, since a node of ADS belongs to a stream
//! and cannot be told anew in it. A control plane that does not know the call answers `Unimplemented`, and nothing
//! depends on an answer.

use std::{convert::Infallible, sync::Arc};

use serde::{Deserialize, Serialize};
use tonic::{
    Code, Request, Response, Status,
    client::Grpc as Client,
    codegen::{Body, BoxFuture, Context, Poll, StdError, http},
    server::{Grpc, NamedService, UnaryService},
    transport::Channel,
};

use crate::{
    node::NodeInfo,
    pb,
    server::{PeerInfo, Transport},
};

/// Clusters in a report; a federation has fewer.
pub const MAX_PEERS: usize = 4096;
/// Longest text in a report, bytes; longer ones are cut.
const MAX_TEXT: usize = 256;
/// Largest report, bytes.
const MAX_REPORT: usize = 2 * 1024 * 1024;
const PATH: &str = "/flotilla.gateway.v1.Links/Report";

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
struct Report {
    #[prost(message, optional, tag = "1")]
    node: Option<pb::Node>,
    #[prost(message, repeated, tag = "2")]
    peers: Vec<PeerLink>,
}

/// The answer; nothing is in it.
#[derive(Clone, PartialEq, prost::Message)]
struct Heard {}

/// Tells a control plane; answers whether it knows what to do with it.
///
/// # Errors
/// What it answers.
pub async fn report(channel: Channel, node: &NodeInfo, peers: Vec<PeerLink>) -> Result<bool, Status> {
    let mut client = Client::new(channel);
    client.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
    let request = Request::new(Report { node: Some(node.to_pb()), peers });
    let codec = tonic_prost::ProstCodec::<Report, Heard>::default();
    match client.unary(request, http::uri::PathAndQuery::from_static(PATH), codec).await {
        Ok(_) => Ok(true),
        Err(s) if s.code() == Code::Unimplemented => Ok(false),
        Err(s) => Err(s),
    }
}

/// Takes reports.
pub trait LinkSink: Send + Sync + 'static {
    /// A gateway tells; sizes are within bounds.
    ///
    /// # Errors
    /// If it may not.
    fn report(&self, peer: &PeerInfo, node: NodeInfo, peers: Vec<PeerLink>) -> Result<(), Status>;
}

/// The call over a [`LinkSink`]: register it with a tonic server.
pub struct LinkService<S>(Arc<S>);

impl<S> LinkService<S> {
    /// A service that passes reports on.
    pub fn new(sink: Arc<S>) -> Self {
        Self(sink)
    }
}

impl<S> Clone for LinkService<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S> NamedService for LinkService<S> {
    const NAME: &'static str = "flotilla.gateway.v1.Links";
}

fn cut(text: &mut String) {
    let end = (0..=MAX_TEXT.min(text.len())).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
    text.truncate(end);
}

impl<S: LinkSink> UnaryService<Report> for LinkService<S> {
    type Response = Heard;
    type Future = BoxFuture<Response<Heard>, Status>;

    fn call(&mut self, request: Request<Report>) -> Self::Future {
        let sink = self.0.clone();
        Box::pin(async move {
            let peer = request
                .extensions()
                .get::<PeerInfo>()
                .cloned()
                .unwrap_or_else(|| PeerInfo::plain(Transport::Plaintext, request.remote_addr()));
            let Report { node, mut peers } = request.into_inner();
            let node =
                NodeInfo::from_pb(node.as_ref()).map_err(|e| Status::invalid_argument(e.to_string()))?;
            if peers.len() > MAX_PEERS {
                return Err(Status::invalid_argument(format!(
                    "peers: {} (at most {MAX_PEERS})",
                    peers.len()
                )));
            }
            for p in &mut peers {
                [&mut p.cluster, &mut p.transport, &mut p.why_tcp, &mut p.choice, &mut p.congestion]
                    .into_iter()
                    .for_each(cut);
            }
            sink.report(&peer, node, peers)?;
            Ok(Response::new(Heard {}))
        })
    }
}

impl<S: LinkSink, B> tower::Service<http::Request<B>> for LinkService<S>
where
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, req: http::Request<B>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            if req.uri().path() != PATH {
                return Ok(Status::unimplemented("only Report is served").into_http());
            }
            let codec = tonic_prost::ProstCodec::<Heard, Report>::default();
            let mut grpc = Grpc::new(codec).apply_max_message_size_config(Some(MAX_REPORT), None);
            Ok(grpc.unary(service, req).await)
        })
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

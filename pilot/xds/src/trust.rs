//! What proxies tell their control plane of the roots that they trust and the certificate that they show:
//! `flotilla.identity.v1.Trust/Report`.
//!
//! The acknowledgement of a bundle over ADS says that it has arrived. Before a root is taken away it must be known besides
//! which certificate a proxy shows, which its ADS stream does not tell: that outlives the certificate it was opened with.
//! A call of its own, on the same port and with the same certificates; a control plane that does not know it answers
//! `Unimplemented`, and no traffic depends on an answer.

use std::{convert::Infallible, sync::Arc};

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

/// Largest report, bytes: a node, and little more.
const MAX_REPORT: usize = 256 * 1024;
const PATH: &str = "/flotilla.identity.v1.Trust/Report";

/// What a proxy trusts and shows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Trusting {
    /// Number of the own trust domain's bundle that it verifies with; 0 if it was told none.
    pub sequence: u64,
    /// SHA-256 of the intermediate in the certificate that it shows, hexadecimal.
    pub intermediate: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Report {
    #[prost(message, optional, tag = "1")]
    node: Option<pb::Node>,
    #[prost(uint64, tag = "2")]
    sequence: u64,
    #[prost(string, tag = "3")]
    intermediate: String,
}

/// The answer; nothing is in it.
#[derive(Clone, PartialEq, prost::Message)]
struct Heard {}

/// Tells a control plane; answers whether it knows what to do with it.
///
/// # Errors
/// What it answers.
pub async fn report(channel: Channel, node: &NodeInfo, what: Trusting) -> Result<bool, Status> {
    let mut client = Client::new(channel);
    client.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
    let Trusting { sequence, intermediate } = what;
    let request = Request::new(Report { node: Some(node.to_pb()), sequence, intermediate });
    let codec = tonic_prost::ProstCodec::<Report, Heard>::default();
    match client.unary(request, http::uri::PathAndQuery::from_static(PATH), codec).await {
        Ok(_) => Ok(true),
        Err(s) if s.code() == Code::Unimplemented => Ok(false),
        Err(s) => Err(s),
    }
}

/// Takes reports.
pub trait TrustSink: Send + Sync + 'static {
    /// A proxy tells; sizes are within bounds.
    ///
    /// # Errors
    /// If it may not.
    fn report(&self, peer: &PeerInfo, node: NodeInfo, what: Trusting) -> Result<(), Status>;
}

/// The call over a [`TrustSink`]: register it with a tonic server.
pub struct TrustService<S>(Arc<S>);

impl<S> TrustService<S> {
    /// A service that passes reports on.
    pub fn new(sink: Arc<S>) -> Self {
        Self(sink)
    }
}

impl<S> Clone for TrustService<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S> NamedService for TrustService<S> {
    const NAME: &'static str = "flotilla.identity.v1.Trust";
}

impl<S: TrustSink> UnaryService<Report> for TrustService<S> {
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
            let Report { node, sequence, intermediate } = request.into_inner();
            let node =
                NodeInfo::from_pb(node.as_ref()).map_err(|e| Status::invalid_argument(e.to_string()))?;
            if intermediate.len() > 64 {
                return Err(Status::invalid_argument("intermediate: is no SHA-256"));
            }
            sink.report(&peer, node, Trusting { sequence, intermediate })?;
            Ok(Response::new(Heard {}))
        })
    }
}

impl<S: TrustSink, B> tower::Service<http::Request<B>> for TrustService<S>
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

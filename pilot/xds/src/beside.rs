//! Calls of our own beside ADS, on the same port and with the same certificates: one message there, one back.
//!
//! A node of ADS belongs to a stream and cannot be told anew in it. A control plane that does not know a call answers
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

/// One method of one service.
pub trait Call: Send + Sync + 'static {
    /// What is told.
    type Said: prost::Message + Default + 'static;
    /// What is answered.
    type Answer: prost::Message + Default + 'static;
    /// The service.
    const NAME: &'static str;
    /// `/service/method`.
    const PATH: &'static str;
    /// Largest message, bytes.
    const MAX: usize;

    /// Answers.
    ///
    /// # Errors
    /// What the caller is told instead.
    fn answer(&self, peer: &PeerInfo, said: Self::Said) -> Result<Self::Answer, Status>;
}

/// The answer to what needs none.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Heard {}

/// The node of a message.
pub(crate) fn node(of: Option<&pb::Node>) -> Result<NodeInfo, Status> {
    NodeInfo::from_pb(of).map_err(|e| Status::invalid_argument(e.to_string()))
}

/// Tells; `None` if the other side does not know the call.
pub(crate) async fn tell<C: Call>(channel: Channel, said: C::Said) -> Result<Option<C::Answer>, Status> {
    let mut client = Client::new(channel);
    client.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
    let codec = tonic_prost::ProstCodec::<C::Said, C::Answer>::default();
    let path = http::uri::PathAndQuery::from_static(C::PATH);
    match client.unary(Request::new(said), path, codec).await {
        Ok(answer) => Ok(Some(answer.into_inner())),
        Err(s) if s.code() == Code::Unimplemented => Ok(None),
        Err(s) => Err(s),
    }
}

/// A [`Call`] for a tonic server.
pub struct Beside<C>(pub(crate) Arc<C>);

impl<C> Clone for Beside<C> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<C: Call> NamedService for Beside<C> {
    const NAME: &'static str = C::NAME;
}

impl<C: Call> UnaryService<C::Said> for Beside<C> {
    type Response = C::Answer;
    type Future = BoxFuture<Response<C::Answer>, Status>;

    fn call(&mut self, request: Request<C::Said>) -> Self::Future {
        let call = self.0.clone();
        Box::pin(async move {
            let peer = request
                .extensions()
                .get::<PeerInfo>()
                .cloned()
                .unwrap_or_else(|| PeerInfo::plain(Transport::Plaintext, request.remote_addr()));
            call.answer(&peer, request.into_inner()).map(Response::new)
        })
    }
}

impl<C: Call, B> tower::Service<http::Request<B>> for Beside<C>
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
            if req.uri().path() != C::PATH {
                return Ok(Status::unimplemented(format!("only {} is served", C::PATH)).into_http());
            }
            let codec = tonic_prost::ProstCodec::<C::Answer, C::Said>::default();
            let mut grpc = Grpc::new(codec).apply_max_message_size_config(Some(C::MAX), None);
            Ok(grpc.unary(service, req).await)
        })
    }
}

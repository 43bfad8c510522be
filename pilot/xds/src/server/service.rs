//! The gRPC service around [`Session`].

use std::{convert::Infallible, sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Status,
    codegen::{Body, BoxFuture, Context, Poll, StdError, http},
    server::NamedService,
};

use super::{
    PeerInfo, ResourceSource, StatusBoard, Transport,
    frames::{Requests, Responses},
    state::{Mode, ProtocolError, Push, Session},
};
use crate::{node::NodeInfo, pb};

/// A stream whose first request does not arrive in this time is closed.
const FIRST_REQUEST: Duration = Duration::from_secs(15);
/// A client that does not take a response for this long is disconnected; it comes back and gets the
/// state of that moment instead of a queue of old ones.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// Requests are names and nonces; the largest is a reconnect that lists everything it has.
const MAX_REQUEST: usize = 32 * 1024 * 1024;
/// Responses waiting in a stream. One per type may be in flight, so a handful suffices.
const QUEUE: usize = 8;

/// What large responses that no client has answered may hold together, KiB. When everybody comes back at once, they are
/// served in the order in which they came, instead of all of them from memory.
const UNANSWERED: u32 = 32 * 1024;
/// Responses below this many KiB do not count.
const LARGE: u32 = 64;
/// A client that does not answer a large response for this long no longer keeps others from theirs.
const PATIENCE: Duration = Duration::from_secs(5);

/// Names of things on demand that a stream may ask for at once ...
const ASKED_AT_ONCE: u32 = 1000;
/// ... and for how long one counts. A stream that asks for more is read no further until it may.
const ASKED_EVERY: Duration = Duration::from_millis(5);

/// ADS over a [`ResourceSource`]: register it with a tonic server or router.
pub struct AdsService<S> {
    source: Arc<S>,
    board: Arc<StatusBoard>,
    unanswered: Arc<Semaphore>,
    stop: CancellationToken,
}

impl<S> Clone for AdsService<S> {
    fn clone(&self) -> Self {
        Self {
            source: self.source.clone(),
            board: self.board.clone(),
            unanswered: self.unanswered.clone(),
            stop: self.stop.clone(),
        }
    }
}

impl<S: ResourceSource> AdsService<S> {
    /// A service over `source`.
    pub fn new(source: Arc<S>) -> Self {
        let unanswered = Arc::new(Semaphore::new(UNANSWERED as usize));
        Self { source, board: Arc::default(), unanswered, stop: CancellationToken::new() }
    }

    /// The same service whose streams end when `stop` is cancelled. Streams never end by themselves,
    /// so a server that is to shut down gracefully needs it.
    #[must_use]
    pub fn until(&self, stop: CancellationToken) -> Self {
        Self { stop, ..self.clone() }
    }

    /// Who is connected and in sync.
    #[must_use]
    pub fn status(&self) -> Arc<StatusBoard> {
        self.board.clone()
    }

    /// The source.
    #[must_use]
    pub fn source(&self) -> &Arc<S> {
        &self.source
    }

    /// The same as `envoy.service.secret.v3.SecretDiscoveryService`, for proxies that fetch secrets
    /// outside ADS.
    #[must_use]
    pub fn secrets(&self) -> SecretService<S> {
        SecretService(self.clone())
    }
}

/// [`AdsService`] under the name of the secret discovery service.
pub struct SecretService<S>(AdsService<S>);

impl<S> Clone for SecretService<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S> NamedService for AdsService<S> {
    const NAME: &'static str = "envoy.service.discovery.v3.AggregatedDiscoveryService";
}

impl<S> NamedService for SecretService<S> {
    const NAME: &'static str = "envoy.service.secret.v3.SecretDiscoveryService";
}

/// A variant of the protocol on the wire.
trait Variant: Send + 'static {
    const MODE: Mode;
    type Req: prost::Message + Default + 'static;
    type Resp: prost::Message + Default + 'static;
    fn node(req: &Self::Req) -> Option<&pb::Node>;
    fn failed(req: &Self::Req) -> Option<(&str, &str)>;
    fn apply(session: &mut Session, req: &Self::Req) -> Result<(), ProtocolError>;
    fn build(push: Push) -> Self::Resp;
}

struct Sotw;
struct Delta;

impl Variant for Sotw {
    const MODE: Mode = Mode::Sotw;
    type Req = pb::DiscoveryRequest;
    type Resp = pb::DiscoveryResponse;
    fn node(req: &Self::Req) -> Option<&pb::Node> {
        req.node.as_ref()
    }
    fn failed(req: &Self::Req) -> Option<(&str, &str)> {
        req.error_detail.as_ref().map(|e| (req.type_url.as_str(), e.message.as_str()))
    }
    fn apply(session: &mut Session, req: &Self::Req) -> Result<(), ProtocolError> {
        session.on_sotw(req)
    }
    fn build(push: Push) -> Self::Resp {
        pb::DiscoveryResponse {
            version_info: push.version,
            resources: push.resources.iter().filter_map(|r| r.resource.clone()).collect(),
            type_url: push.type_url,
            nonce: push.nonce,
        }
    }
}

impl Variant for Delta {
    const MODE: Mode = Mode::Delta;
    type Req = pb::DeltaDiscoveryRequest;
    type Resp = pb::DeltaDiscoveryResponse;
    fn node(req: &Self::Req) -> Option<&pb::Node> {
        req.node.as_ref()
    }
    fn failed(req: &Self::Req) -> Option<(&str, &str)> {
        req.error_detail.as_ref().map(|e| (req.type_url.as_str(), e.message.as_str()))
    }
    fn apply(session: &mut Session, req: &Self::Req) -> Result<(), ProtocolError> {
        session.on_delta(req)
    }
    fn build(push: Push) -> Self::Resp {
        pb::DeltaDiscoveryResponse {
            system_version_info: push.version,
            resources: push.resources.iter().map(|r| pb::Resource::clone(r)).collect(),
            type_url: push.type_url,
            nonce: push.nonce,
            removed_resources: push.removed,
        }
    }
}

/// A place for a large response, until the client has answered it.
struct Place {
    nonce: String,
    until: Instant,
    _permit: OwnedSemaphorePermit,
}

/// Waits for a place for a large response; none is needed for others.
async fn place(unanswered: &Arc<Semaphore>, push: &Push) -> Option<Place> {
    let bytes: usize = push.resources.iter().filter_map(|r| r.resource.as_ref()).map(|a| a.value.len()).sum();
    let size = u32::try_from(bytes / 1024).unwrap_or(UNANSWERED).min(UNANSWERED);
    if size < LARGE {
        return None;
    }
    // First come, first served. It is never closed.
    let permit = Arc::clone(unanswered).acquire_many_owned(size).await.ok()?;
    Some(Place { nonce: push.nonce.clone(), until: Instant::now() + PATIENCE, _permit: permit })
}

/// What a stream has asked for of late, as the time at which none of it counts any more.
struct Pace(Instant);

impl Pace {
    /// Takes note of names. Returns until when no more are to be read.
    fn asked(&mut self, names: usize, now: Instant) -> Option<Instant> {
        let names = u32::try_from(names).unwrap_or(u32::MAX);
        self.0 = self.0.max(now) + ASKED_EVERY.saturating_mul(names).min(Duration::from_secs(3600));
        let read = self.0.checked_sub(ASKED_EVERY * ASKED_AT_ONCE)?;
        (read > now).then_some(read)
    }
}

/// Removes the client from the board and the source, however its stream ends.
struct Registered<S: ResourceSource> {
    service: AdsService<S>,
    id: u64,
    node: NodeInfo,
}

impl<S: ResourceSource> Drop for Registered<S> {
    fn drop(&mut self) {
        self.service.board.close(self.id);
        self.service.source.disconnected(&self.node);
    }
}

async fn run<S: ResourceSource, V: Variant, B>(
    service: AdsService<S>,
    peer: PeerInfo,
    mut requests: Requests<B, V::Req>,
    out: mpsc::Sender<Result<V::Resp, Status>>,
) -> Result<(), Status>
where
    B: Body,
    B::Error: std::fmt::Display,
{
    let first = match tokio::time::timeout(FIRST_REQUEST, requests.message()).await {
        Err(_) => return Err(Status::deadline_exceeded("no request on the stream")),
        Ok(r) => match r? {
            None => return Ok(()),
            Some(r) => r,
        },
    };
    let mut node = NodeInfo::from_pb(V::node(&first)).map_err(|e| Status::invalid_argument(e.to_string()))?;
    node.incremental = V::MODE == Mode::Delta;
    service.source.authorize(&peer, &node)?;
    tracing::info!(node = %node.id, peer = ?peer.address, mode = ?V::MODE, "xDS client connected");
    service.source.connected(&node);
    let registered =
        Registered { id: service.board.open(&node, !peer.certificates.is_empty()), service, node };
    let (service, node) = (&registered.service, &registered.node);

    let mut changes = service.source.changes();
    let mut session = Session::new(V::MODE);
    let mut next = Some(first);
    let mut taken: Option<Place> = None;
    let (mut pace, mut waits) = (Pace(Instant::now()), None);
    loop {
        if let Some(req) = next.take() {
            if let Some((type_url, message)) = V::failed(&req) {
                service.board.count(0, 1);
                tracing::warn!(node = %node.id, type_url, message, "configuration rejected by the client");
            }
            V::apply(&mut session, &req).map_err(|e| Status::invalid_argument(e.to_string()))?;
        }
        // A change may have come in while a request was handled; it must not be marked as seen only.
        if changes.has_changed().unwrap_or(false) {
            changes.borrow_and_update();
            session.mark_dirty();
        }
        if taken.as_ref().is_some_and(|p| Instant::now() >= p.until || !session.awaits(&p.nonce)) {
            taken = None;
        }
        // One that waits for a place must not hold another.
        while taken.is_none() {
            let Some(push) = session.poll(|t| service.source.snapshot(node, t)) else { break };
            taken = tokio::select! {
                p = place(&service.unanswered, &push) => p,
                () = out.closed() => return Ok(()),
                () = service.stop.cancelled() => {
                    return Err(Status::unavailable("the server is shutting down"));
                }
            };
            service.board.count(1, 0);
            tracing::debug!(
                node = %node.id, type_url = %push.type_url, resources = push.resources.len(),
                removed = push.removed.len(), nonce = %push.nonce, "push"
            );
            match tokio::time::timeout(SEND_TIMEOUT, out.send(Ok(V::build(push)))).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Ok(()),
                Err(_) => return Err(Status::resource_exhausted("client does not read its responses")),
            }
        }
        service.board.update(registered.id, session.status());
        let now = Instant::now();
        match session.take_asked() {
            0 => waits = waits.filter(|w| *w > now),
            n => waits = pace.asked(n, now),
        }
        tokio::select! {
            // Both arms are cancel-safe: `message` keeps partial frames in the stream, `changed`
            // marks a value as seen only when it completes.
            r = requests.message(), if waits.is_none() => match r {
                Ok(Some(r)) => next = Some(r),
                Ok(None) => return Ok(()),
                Err(e) => {
                    tracing::debug!(node = %node.id, error = %e, "xDS stream ended");
                    return Ok(());
                }
            },
            c = changes.changed() => {
                if c.is_err() {
                    return Err(Status::unavailable("the server is shutting down"));
                }
                session.mark_dirty();
            }
            () = tokio::time::sleep_until(waits.unwrap_or(now)), if waits.is_some() => {}
            () = tokio::time::sleep_until(taken.as_ref().map_or(Instant::now(), |p| p.until)), if taken.is_some() => {}
            () = out.closed() => return Ok(()),
            () = service.stop.cancelled() => {
                return Err(Status::unavailable("the server is shutting down"));
            }
        }
    }
}

fn serve<S: ResourceSource, V: Variant, B>(
    service: AdsService<S>,
    req: http::Request<B>,
) -> http::Response<tonic::body::Body>
where
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<StdError> + std::fmt::Display + Send + 'static,
{
    let (head, body) = req.into_parts();
    let peer = head.extensions.get::<PeerInfo>().cloned();
    let peer = peer.unwrap_or_else(|| PeerInfo::plain(Transport::Plaintext, remote(&head.extensions)));
    let (tx, rx) = mpsc::channel(QUEUE);
    let errors = tx.clone();
    let requests = Requests::new(body, MAX_REQUEST);
    // The task ends with its stream: when the client goes, `out` closes.
    tokio::spawn(async move {
        if let Err(status) = run::<S, V, B>(service, peer, requests, tx).await {
            tracing::warn!(code = ?status.code(), message = status.message(), "xDS stream refused");
            let _ = errors.try_send(Err(status));
        }
    });
    let mut response = http::Response::new(tonic::body::Body::new(Responses::new(rx)));
    response
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/grpc"));
    response
}

/// Where a connection came from that is none of [`super::conn`].
fn remote(extensions: &http::Extensions) -> Option<std::net::SocketAddr> {
    let tcp = extensions.get::<tonic::transport::server::TcpConnectInfo>();
    tcp.and_then(tonic::transport::server::TcpConnectInfo::remote_addr)
}

impl<S: ResourceSource, B> tower::Service<http::Request<B>> for AdsService<S>
where
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<StdError> + std::fmt::Display + Send + 'static,
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
            let method = req.uri().path().rsplit('/').next().unwrap_or_default();
            Ok(match method {
                "StreamAggregatedResources" | "StreamSecrets" => serve::<S, Sotw, B>(service, req),
                "DeltaAggregatedResources" | "DeltaSecrets" => serve::<S, Delta, B>(service, req),
                _ => Status::unimplemented("only the streaming methods are served").into_http(),
            })
        })
    }
}

impl<S: ResourceSource, B> tower::Service<http::Request<B>> for SecretService<S>
where
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<StdError> + std::fmt::Display + Send + 'static,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, req: http::Request<B>) -> Self::Future {
        tower::Service::call(&mut self.0, req)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(nonce: &str, kib: usize) -> Push {
        let any = pb::Any { type_url: String::new(), value: vec![0; kib * 1024].into() };
        let resource = pb::Resource { resource: Some(any), ..pb::Resource::default() };
        Push {
            type_url: String::new(),
            version: String::new(),
            nonce: nonce.to_owned(),
            resources: vec![Arc::new(resource)],
            removed: vec![],
        }
    }

    #[tokio::test(start_paused = true)]
    async fn large_responses_wait_for_answers_to_others() {
        let all = Arc::new(Semaphore::new(UNANSWERED as usize));
        // Whatever is larger than all there is takes all there is.
        let first = place(&all, &push("1", 40 * 1024)).await.unwrap();
        assert!(place(&all, &push("2", LARGE as usize - 1)).await.is_none(), "small ones go at once");
        let (waiting, mine) = (Arc::clone(&all), push("3", 1024));
        let second = tokio::spawn(async move { place(&waiting, &mine).await.map(|p| p.nonce.clone()) });
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert!(!second.is_finished());
        drop(first);
        assert_eq!(second.await.unwrap().as_deref(), Some("3"));
    }

    #[test]
    fn who_asks_for_much_is_read_later() {
        let now = Instant::now() + Duration::from_secs(3600);
        let mut p = Pace(now);
        assert_eq!(p.asked(ASKED_AT_ONCE as usize, now), None);
        assert_eq!(p.asked(2, now), Some(now + 2 * ASKED_EVERY));
        // It has been forgotten by then.
        let later = now + ASKED_EVERY * (ASKED_AT_ONCE + 2);
        assert_eq!(p.asked(ASKED_AT_ONCE as usize, later), None);
        assert_eq!(p.asked(1, later), Some(later + ASKED_EVERY));
    }
}

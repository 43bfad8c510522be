//! The stream of messages to a processor and back.

use std::{
    collections::VecDeque,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use http::Method;
use mesh_model::proxy as model;

use crate::{
    http::{
        client,
        exchange::Upstream,
        headers::{HeaderId, Headers},
        message::{BodyKind, Frame},
        router,
    },
    upstream::{
        cluster::{ClusterSlot, Outcome, Permit},
        host::ActiveGuard,
        pool::Pool,
    },
    worker::Worker,
};

const PROCESS: &str = "/envoy.service.ext_proc.v3.ExternalProcessor/Process";
/// Bytes of one message of a processor: a body within the limit of buffers, and headers.
const MAX_MESSAGE: usize = 2 << 20;

/// A bidirectional stream.
pub(super) struct Call {
    up: Upstream,
    outbox: VecDeque<Bytes>,
    answered: bool,
    inbox: BytesMut,
    _pool: Rc<Pool>,
    _active: ActiveGuard,
    _permit: Permit,
}

/// Why there are no more messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ended {
    /// The processor is done.
    Done,
    Failed(String),
}

impl Call {
    /// Opens a stream; `Err` says why there is none.
    pub(super) async fn open(
        worker: &Rc<Worker>,
        slot: &Arc<ClusterSlot>,
        service: &model::GrpcService,
        limit: Duration,
    ) -> Result<Self, String> {
        let opening = Self::open_now(worker, slot, service);
        if limit.is_zero() {
            return opening.await;
        }
        tokio::time::timeout(limit, opening).await.unwrap_or_else(|_| Err("no connection in time".to_owned()))
    }

    async fn open_now(
        worker: &Rc<Worker>,
        slot: &Arc<ClusterSlot>,
        service: &model::GrpcService,
    ) -> Result<Self, String> {
        let cluster = slot.load().ok_or("no such cluster")?;
        let limit = cluster.config.limits.max_requests;
        let permit = Permit::take(&cluster.usage, |u| &u.requests, limit).ok_or("a limit of the cluster")?;
        let mut h = Headers::default();
        h.push_id(HeaderId::Te, b"trailers");
        h.push_id(HeaderId::ContentType, b"application/grpc");
        if let Some(t) = service.timeout.filter(|t| !t.is_zero()) {
            h.push_id(HeaderId::GrpcTimeout, format!("{}m", t.as_millis()).as_bytes());
        }
        for (n, v) in &service.metadata {
            h.push(n.as_bytes(), v.as_bytes());
        }
        let authority = if service.authority.is_empty() { &service.cluster } else { &service.authority };
        let mut head = client::head(Method::POST, authority, PROCESS, h, 0);
        head.body = BodyKind::Stream;
        let host = cluster.tables().pick(&worker.rng, None).cloned().ok_or("no healthy host")?;
        let active = ActiveGuard::new(&host.stats);
        match router::stream(worker, &cluster, &host, &head, true, None).await {
            Ok((up @ Upstream::H2(_), pool)) => Ok(Self {
                up,
                outbox: VecDeque::new(),
                answered: false,
                inbox: BytesMut::new(),
                _pool: pool,
                _active: active,
                _permit: permit,
            }),
            Ok((Upstream::H1(_), _)) => Err("the cluster does not speak HTTP/2".to_owned()),
            Err(_) => {
                cluster.observe(&host, Outcome::Failed);
                Err("no connection".to_owned())
            }
        }
    }

    /// Sends a message in its frame.
    pub(super) fn send(&mut self, message: Vec<u8>) {
        self.outbox.push_back(message.into());
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            // What fails here shows in the answer.
            if ready!(self.up.poll_room(cx)).is_err() {
                return Poll::Ready(());
            }
            let Some(m) = self.outbox.pop_front() else { return Poll::Ready(()) };
            if self.up.data(m).is_err() {
                return Poll::Ready(());
            }
        }
    }

    /// The next message.
    pub(super) fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, Ended>> {
        let _ = self.poll_send(cx);
        loop {
            if let Some(m) = unframe(&mut self.inbox).map_err(Ended::Failed)? {
                return Poll::Ready(Ok(m));
            }
            let failed = |what: String| Poll::Ready(Err(Ended::Failed(what)));
            if !self.answered {
                match ready!(self.up.poll_head(cx)) {
                    Ok(h) if h.status != 200 => return failed(format!("HTTP status {}", h.status)),
                    Ok(h) if h.headers.has(HeaderId::GrpcStatus) => {
                        return Poll::Ready(Err(ended(&h.headers)));
                    }
                    Ok(_) => self.answered = true,
                    Err(e) => return failed(format!("the stream broke off: {e:?}")),
                }
            }
            match ready!(self.up.poll_frame(cx)) {
                Some(Ok(Frame::Data(d))) => self.inbox.extend_from_slice(&d),
                Some(Ok(Frame::Trailers(t))) => return Poll::Ready(Err(ended(&t))),
                None => return failed("the stream ended without a status".to_owned()),
                Some(Err(e)) => return failed(format!("the stream broke off: {e:?}")),
            }
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        // So that the processor sees an end and not only a reset.
        let _ = self.up.finish(None);
    }
}

fn ended(h: &Headers) -> Ended {
    match h.str_id(HeaderId::GrpcStatus) {
        Some("0") => Ended::Done,
        Some(s) => Ended::Failed(format!("gRPC status {s}")),
        None => Ended::Failed("the stream ended without a status".to_owned()),
    }
}

/// The first message, once it is there.
fn unframe(buf: &mut BytesMut) -> Result<Option<Bytes>, String> {
    let Some((head, _)) = buf.split_first_chunk::<5>() else { return Ok(None) };
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if head[0] != 0 {
        return Err("a compressed message".to_owned());
    }
    if length > MAX_MESSAGE {
        return Err("a message that is too large".to_owned());
    }
    if buf.len() < 5 + length {
        return Ok(None);
    }
    buf.advance(5);
    Ok(Some(buf.split_to(length).freeze()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_in_any_pieces() {
        let wire = [&[0, 0, 0, 0, 2][..], b"hi", &[0, 0, 0, 0, 0], &[0, 0, 0, 0, 1], b"!"].concat();
        for step in 1..wire.len() {
            let (mut buf, mut out) = (BytesMut::new(), Vec::new());
            for piece in wire.chunks(step) {
                buf.extend_from_slice(piece);
                while let Some(m) = unframe(&mut buf).unwrap() {
                    out.push(m);
                }
            }
            assert_eq!(out, [&b"hi"[..], b"", b"!"], "{step}");
        }
        assert!(unframe(&mut BytesMut::from(&[1, 0, 0, 0, 0][..])).is_err());
        assert!(unframe(&mut BytesMut::from(&[0, 0xff, 0, 0, 0][..])).is_err());
    }
}

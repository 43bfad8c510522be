//! One request on a shared upstream connection.

use std::{
    cell::RefCell,
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{RecvStream, client::ResponseFuture};
use http::{Method, Request, Uri};

use super::send::{SendBody, stream_error};
use crate::{
    http::{
        headers::{HeaderId, Headers},
        message::{BodyKind, Frame, RequestHead, ResponseHead, StreamError},
    },
    upstream::pool::{H2Conn, StreamGuard},
};

pub(crate) struct H2Exchange {
    inner: RefCell<Inner>,
    guard: StreamGuard,
}

struct Inner {
    send: SendBody,
    response: Option<ResponseFuture>,
    recv: Option<RecvStream>,
    data_done: bool,
    /// The answer has no body, whatever its server believes.
    head: bool,
}

/// Why no stream was opened; the request was not sent.
#[derive(Debug)]
pub(crate) enum StartError {
    /// The connection takes no more; another may.
    Closed,
    /// The request cannot be expressed in HTTP/2.
    Invalid,
}

impl H2Exchange {
    pub(crate) fn start(conn: &Rc<H2Conn>, head: &RequestHead) -> Result<Self, StartError> {
        let mut request = Request::new(());
        let scheme = if head.https { "https" } else { "http" };
        let authority = if head.authority.is_empty() { "localhost" } else { &head.authority };
        let uri = Uri::builder().scheme(scheme).authority(authority);
        let uri = match head.path.as_str() {
            "*" if head.method == Method::OPTIONS => uri.path_and_query("*"),
            p => uri.path_and_query(p),
        };
        *request.uri_mut() = uri.build().map_err(|_| StartError::Invalid)?;
        *request.method_mut() = head.method.clone();
        *request.version_mut() = http::Version::HTTP_2;
        *request.headers_mut() = head.headers.to_map();
        let end = head.body == BodyKind::Empty;
        let mut send = conn.send.clone();
        let guard = StreamGuard::new(conn);
        match send.send_request(request, end) {
            Ok((response, stream)) => {
                conn.said();
                Ok(Self {
                    inner: RefCell::new(Inner {
                        send: SendBody::new(stream, end),
                        response: Some(response),
                        recv: None,
                        data_done: false,
                        head: head.method == Method::HEAD,
                    }),
                    guard,
                })
            }
            Err(e) => {
                tracing::debug!(error = %e, "upstream HTTP/2 connection takes no request");
                conn.retire();
                Err(StartError::Closed)
            }
        }
    }

    /// SPIFFE ID of the server.
    pub(crate) fn peer(&self) -> Option<std::sync::Arc<str>> {
        self.guard.conn().peer.clone()
    }

    pub(crate) fn poll_room(&self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        self.inner.borrow_mut().send.poll_drain(cx)
    }

    pub(crate) fn data(&self, data: Bytes) {
        self.guard.conn().said();
        self.inner.borrow_mut().send.data(data);
    }

    pub(crate) fn finish(&self, trailers: Option<&Headers>) {
        self.inner.borrow_mut().send.finish(trailers);
    }

    pub(crate) fn poll_head(&self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, StreamError>> {
        let inner = &mut *self.inner.borrow_mut();
        let Some(future) = inner.response.as_mut() else { return Poll::Ready(Err(StreamError::Protocol)) };
        let response = match ready!(Pin::new(future).poll(cx)) {
            Ok(r) => r,
            Err(e) => return Poll::Ready(Err(stream_error(&e))),
        };
        self.guard.conn().heard();
        inner.response = None;
        let (parts, recv) = response.into_parts();
        if !are_named(&parts.headers) {
            return Poll::Ready(Err(StreamError::Protocol));
        }
        let mut headers = Headers::from_map(&parts.headers);
        headers.retain(|id, _, _| !id.is_hop_by_hop());
        let length = headers.str_id(HeaderId::ContentLength).and_then(|v| v.parse().ok());
        let status = parts.status.as_u16();
        // Such answers end with their head (RFC 9110 section 6.4.1); the rest of one that does not is left unread.
        let ends = recv.is_end_stream() || inner.head || matches!(status, 204 | 304);
        let body = match (ends, length) {
            (true, _) => BodyKind::Empty,
            (_, Some(n)) => BodyKind::Length(n),
            _ => BodyKind::Stream,
        };
        inner.recv = Some(recv);
        Poll::Ready(Ok(ResponseHead { status, headers, body }))
    }

    pub(crate) fn poll_frame(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, StreamError>>> {
        let inner = &mut *self.inner.borrow_mut();
        let Some(recv) = inner.recv.as_mut() else { return Poll::Ready(None) };
        let frame = ready!(poll_recv(recv, &mut inner.data_done, cx));
        self.guard.conn().heard();
        Poll::Ready(frame)
    }
}

/// The next frame of a stream. A piece is asked for only when the other side has room, so its window is
/// given back at once.
pub(crate) fn poll_recv(
    recv: &mut RecvStream,
    data_done: &mut bool,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<Frame, StreamError>>> {
    while !*data_done {
        match ready!(recv.poll_data(cx)) {
            Some(Ok(b)) => {
                let _ = recv.flow_control().release_capacity(b.len());
                if b.is_empty() {
                    continue;
                }
                return Poll::Ready(Some(Ok(Frame::Data(b))));
            }
            Some(Err(e)) if e.reason() == Some(h2::Reason::NO_ERROR) && e.is_reset() => {
                // The peer answered early and wants no more of the request (RFC 9113 section 8.1).
                *data_done = true;
                return Poll::Ready(None);
            }
            Some(Err(e)) => return Poll::Ready(Some(Err(stream_error(&e)))),
            None => *data_done = true,
        }
    }
    match ready!(recv.poll_trailers(cx)) {
        Ok(Some(t)) if are_named(&t) => Poll::Ready(Some(Ok(Frame::Trailers(trailers(&t))))),
        Ok(Some(_)) => Poll::Ready(Some(Err(StreamError::Protocol))),
        Ok(None) => Poll::Ready(None),
        Err(e) => Poll::Ready(Some(Err(stream_error(&e)))),
    }
}

/// Whether names are tokens (RFC 9110 section 5.1): in HTTP/2 the `http` crate also takes a quotation mark, which no other
/// version can carry.
pub(super) fn are_named(map: &http::HeaderMap) -> bool {
    map.keys().all(|n| !n.as_str().contains('"'))
}

fn trailers(map: &http::HeaderMap) -> Headers {
    let mut t = Headers::from_map(map);
    t.retain(|id, _, _| !id.is_forbidden_trailer());
    t
}

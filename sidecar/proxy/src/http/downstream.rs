//! The client's side of one request, the same for both codecs.

use std::task::{Context, Poll};

use bytes::Bytes;

use super::{
    filtered::{Ahead, Bodies},
    headers::Headers,
    message::{Frame, ResponseHead, StreamError},
};

/// One request of a client. All methods take `&self`: a request's two directions are driven by one task.
pub(crate) trait Downstream {
    /// The next piece of the request body; `None` at its end.
    fn poll_frame(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, StreamError>>>;
    /// Ready when the client is gone and an answer has no reader.
    fn poll_gone(&self, cx: &mut Context<'_>) -> Poll<()>;
    /// Sends the response head. `end`: nothing follows.
    fn start(&self, head: &ResponseHead, end: bool) -> Result<(), StreamError>;
    /// Ready when more body may be given.
    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>>;
    /// A piece of the body, after [`Self::poll_room`].
    fn data(&self, data: Bytes) -> Result<(), StreamError>;
    /// Ends the response.
    fn finish(&self, trailers: Option<&Headers>) -> Result<(), StreamError>;
    /// Sends what is buffered.
    fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>>;
    /// Breaks off a response that cannot be completed, so that the client can tell.
    fn abort(&self);
    /// What filters read and changed; `None` where no filter looks at bodies.
    fn bodies(&self) -> Option<&Bodies> {
        None
    }
    /// Reads the request body until its end or until more than `limit` bytes are there; only where
    /// [`Self::bodies`] are kept.
    fn poll_ahead(&self, _cx: &mut Context<'_>, _limit: usize) -> Poll<Result<Ahead, StreamError>> {
        Poll::Ready(Ok(Ahead::More))
    }
    /// Requests are streams of a shared connection, as in HTTP/2 and HTTP/3.
    fn is_multiplexed(&self) -> bool;
}

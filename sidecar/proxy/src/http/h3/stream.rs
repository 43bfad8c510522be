//! One request of a client.

use std::{
    cell::RefCell,
    collections::VecDeque,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use quinn::{Connection, ReadError, RecvStream, SendStream};

use super::{
    Code,
    frame::{self, Event, Frames, Of, put_header},
    head,
    qpack::Refused,
};
use crate::http::{
    downstream::Downstream,
    headers::Headers,
    message::{BodyKind, Frame, MAX_HEAD, MAX_TRAILERS, RequestHead, ResponseHead, StreamError},
};

/// Most that is taken from quinn at a time; its pieces are datagrams' worth anyway.
const PIECE: usize = 64 * 1024;

/// Why there is no request to serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoHead {
    /// The client is to be told.
    Refused(u16),
    /// The client took it back, or the connection ends.
    Gone,
}

pub(super) struct H3Down {
    inner: RefCell<Inner>,
}

struct Inner {
    quic: Connection,
    recv: RecvStream,
    frames: Frames,
    /// Read and not looked at.
    input: Bytes,
    part: Part,
    /// Why the body is not whole.
    failed: Option<StreamError>,
    /// What is left of the announced length.
    left: Option<u64>,
    send: SendStream,
    pending: VecDeque<Bytes>,
    started: bool,
    ending: bool,
    /// Nothing more is sent.
    ended: bool,
    /// All of the answer was sent.
    finished: bool,
    /// Ready when the client wants no answer.
    gone: Option<Pin<Box<dyn Future<Output = ()>>>>,
}

/// What comes next from the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Body,
    /// Behind the trailers.
    End,
    Done,
}

impl H3Down {
    pub(super) fn new(quic: Connection, send: SendStream, recv: RecvStream) -> Self {
        Self {
            inner: RefCell::new(Inner {
                quic,
                recv,
                frames: Frames::new(Of::Request, MAX_HEAD),
                input: Bytes::new(),
                part: Part::Body,
                failed: None,
                left: None,
                send,
                pending: VecDeque::new(),
                started: false,
                ending: false,
                ended: false,
                finished: false,
                gone: None,
            }),
        }
    }

    /// Reads the head of the request.
    pub(super) fn poll_head(&self, https: bool, cx: &mut Context<'_>) -> Poll<Result<RequestHead, NoHead>> {
        let inner = &mut *self.inner.borrow_mut();
        let section = match ready!(inner.poll_event(cx)) {
            Ok(Some(Event::Headers(section))) => section,
            Ok(Some(Event::TooLarge)) => return Poll::Ready(Err(NoHead::Refused(431))),
            Ok(Some(_)) => {
                inner.broken(Code::FrameUnexpected);
                return Poll::Ready(Err(NoHead::Gone));
            }
            Ok(None) => {
                inner.reset(Code::RequestIncomplete);
                return Poll::Ready(Err(NoHead::Gone));
            }
            Err(_) => return Poll::Ready(Err(NoHead::Gone)),
        };
        inner.frames.set_limit(MAX_TRAILERS);
        // The end often comes with the head; whether it does decides how the request is passed on.
        let ended = inner.is_at_end(cx);
        Poll::Ready(match head::request(&section, https, ended) {
            Ok(head) => {
                if let BodyKind::Length(n) = head.body {
                    inner.left = Some(n);
                }
                Ok(head)
            }
            Err(Refused::Field(status)) => Err(NoHead::Refused(status)),
            Err(Refused::TooLarge) => Err(NoHead::Refused(431)),
            Err(Refused::Broken) => {
                inner.broken(Code::DecompressionFailed);
                Err(NoHead::Gone)
            }
        })
    }

    /// Whether an answer began.
    pub(super) fn is_answered(&self) -> bool {
        self.inner.borrow().started
    }

    /// Waits until the client has confirmed the whole answer, if there is one.
    pub(super) async fn confirmed(&self) {
        if self.inner.borrow().finished {
            poll_fn(|cx| self.poll_gone(cx)).await;
        }
    }

    /// Ends what is open of the stream: a body that nobody reads is not sent on, an answer without end breaks off.
    pub(super) fn close(&self, refused: bool) {
        let inner = &mut *self.inner.borrow_mut();
        if inner.part != Part::Done {
            let code = if refused { Code::MessageError } else { Code::NoError };
            let _ = inner.recv.stop(code.into());
        }
        if !inner.ended {
            let _ = inner.send.reset(Code::InternalError.into());
        }
    }
}

impl Inner {
    /// Ends the connection for what its client did.
    fn broken(&mut self, code: Code) {
        self.fail(StreamError::Protocol);
        self.quic.close(code.into(), b"");
    }

    fn fail(&mut self, e: StreamError) -> StreamError {
        self.part = Part::Done;
        self.failed = Some(e);
        e
    }

    fn reset(&mut self, code: Code) {
        self.part = Part::Done;
        self.ended = true;
        let _ = self.recv.stop(code.into());
        let _ = self.send.reset(code.into());
    }

    /// More bytes of the client; `false` at the end.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, StreamError>> {
        // The future has no state of its own, so a new one may go on where another was dropped.
        let chunk = ready!(pin!(self.recv.read_chunk(PIECE, true)).poll(cx));
        Poll::Ready(match chunk {
            Ok(Some(c)) => {
                self.input = c.bytes;
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(ReadError::Reset(_) | ReadError::ConnectionLost(_)) => Err(self.fail(StreamError::Reset)),
            Err(_) => Err(self.fail(StreamError::Protocol)),
        })
    }

    /// The next event; `None` at the end.
    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Event>, StreamError>> {
        loop {
            match self.frames.next(&mut self.input) {
                Ok(Some(e)) => return Poll::Ready(Ok(Some(e))),
                Ok(None) => {}
                Err(code) => {
                    self.broken(code);
                    return Poll::Ready(Err(StreamError::Protocol));
                }
            }
            if !ready!(self.poll_read(cx))? {
                if !self.frames.is_between() {
                    self.broken(Code::FrameError);
                    return Poll::Ready(Err(StreamError::Protocol));
                }
                self.part = Part::Done;
                return Poll::Ready(Ok(None));
            }
        }
    }

    /// Whether the stream is known to end here; what is read instead is kept.
    fn is_at_end(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.input.is_empty() || !self.frames.is_between() {
            return false;
        }
        match self.poll_read(cx) {
            Poll::Ready(Ok(false)) => {
                self.part = Part::Done;
                true
            }
            _ => false,
        }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, StreamError>>> {
        let malformed = |inner: &mut Self| {
            let _ = inner.recv.stop(Code::MessageError.into());
            Poll::Ready(Some(Err(inner.fail(StreamError::Protocol))))
        };
        if self.part == Part::Done {
            return Poll::Ready(self.failed.map(Err));
        }
        let event = match ready!(self.poll_event(cx)) {
            Ok(e) => e,
            Err(e) => return Poll::Ready(Some(Err(e))),
        };
        match event {
            // A length that is not kept makes a request malformed (RFC 9114 section 4.1.2).
            None if self.left.is_some_and(|n| n > 0) => malformed(self),
            None => Poll::Ready(None),
            Some(Event::Data(data)) if self.part == Part::Body => {
                if let Some(left) = &mut self.left {
                    match left.checked_sub(data.len() as u64) {
                        Some(n) => *left = n,
                        None => return malformed(self),
                    }
                }
                Poll::Ready(Some(Ok(Frame::Data(data))))
            }
            Some(Event::Headers(section)) if self.part == Part::Body => {
                if self.left.is_some_and(|n| n > 0) {
                    return malformed(self);
                }
                self.part = Part::End;
                match head::trailers(&section) {
                    Ok(t) => Poll::Ready(Some(Ok(Frame::Trailers(t)))),
                    Err(r) => {
                        if let Some(code) = r.code() {
                            self.broken(code);
                        }
                        malformed(self)
                    }
                }
            }
            Some(Event::TooLarge) => {
                let _ = self.recv.stop(Code::ExcessiveLoad.into());
                Poll::Ready(Some(Err(self.fail(StreamError::TooLarge))))
            }
            Some(_) => {
                self.broken(Code::FrameUnexpected);
                Poll::Ready(Some(Err(StreamError::Protocol)))
            }
        }
    }

    /// Ready when everything given so far was handed to the connection, which takes only what it may send.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        while !self.pending.is_empty() {
            let bufs = self.pending.make_contiguous();
            let written = ready!(pin!(self.send.write_chunks(bufs)).poll(cx));
            match written {
                Ok(w) => drop(self.pending.drain(..w.chunks)),
                Err(_) => {
                    self.pending.clear();
                    self.ended = true;
                    return Poll::Ready(Err(StreamError::Reset));
                }
            }
        }
        if self.ending && !self.ended {
            self.ended = true;
            self.finished = self.send.finish().is_ok();
        }
        Poll::Ready(Ok(()))
    }
}

impl Downstream for H3Down {
    fn poll_frame(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, StreamError>>> {
        self.inner.borrow_mut().poll_frame(cx)
    }

    fn poll_gone(&self, cx: &mut Context<'_>) -> Poll<()> {
        let inner = &mut *self.inner.borrow_mut();
        let gone = inner.gone.get_or_insert_with(|| {
            let stopped = inner.send.stopped();
            Box::pin(async move {
                let _ = stopped.await;
            })
        });
        gone.as_mut().poll(cx)
    }

    fn start(&self, head: &ResponseHead, end: bool) -> Result<(), StreamError> {
        let inner = &mut *self.inner.borrow_mut();
        inner.pending.extend(head::response(head));
        inner.started = true;
        inner.ending = end;
        Ok(())
    }

    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        self.inner.borrow_mut().poll_drain(cx)
    }

    fn data(&self, data: Bytes) -> Result<(), StreamError> {
        if data.is_empty() {
            return Ok(());
        }
        let inner = &mut *self.inner.borrow_mut();
        let mut header = Vec::with_capacity(9);
        put_header(&mut header, frame::DATA, data.len());
        inner.pending.extend([header.into(), data]);
        Ok(())
    }

    fn finish(&self, trailers: Option<&Headers>) -> Result<(), StreamError> {
        let inner = &mut *self.inner.borrow_mut();
        if let Some(t) = trailers.filter(|t| !t.is_empty()) {
            inner.pending.extend(head::end(t));
        }
        inner.ending = true;
        Ok(())
    }

    fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        self.inner.borrow_mut().poll_drain(cx)
    }

    fn abort(&self) {
        let inner = &mut *self.inner.borrow_mut();
        inner.pending.clear();
        if !inner.ended {
            inner.ended = true;
            let _ = inner.send.reset(Code::InternalError.into());
        }
    }

    fn is_multiplexed(&self) -> bool {
        true
    }
}

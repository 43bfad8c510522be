//! A request whose body or answer filters look at.
//!
//! Requests that no filter wants the body of never come here: the decision is made once for a connection
//! manager, and the plain path stays as it is. Around the codec's side of a request this puts what filters
//! need: reading the body ahead, up to a bound, and changing the answer piece by piece.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    task::{Context, Poll, ready},
};

use bytes::Bytes;

use super::{
    downstream::Downstream,
    headers::Headers,
    message::{Frame, ResponseHead, StreamError},
};

/// How much of a body there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ahead {
    /// All of it was read.
    Whole,
    /// The bound was reached before its end.
    More,
}

/// Changes an answer on its way to the client.
pub(crate) trait Encode {
    /// Looks at the head, which it may change. False: the answer is none of its business.
    fn start(&mut self, head: &mut ResponseHead, end: bool) -> bool;
    /// A piece of the body; empty if nothing is to be sent yet.
    fn data(&mut self, data: Bytes) -> Bytes;
    /// The end of the body: what is left of it, and the trailers that remain.
    fn finish(&mut self, trailers: Option<&Headers>) -> (Bytes, Option<Headers>);
}

/// Changes a request body on its way in.
pub(crate) trait Decode {
    fn data(&mut self, data: Bytes) -> Result<Bytes, StreamError>;
    /// The end of the body: whether it was a whole one.
    fn finish(&mut self) -> Result<(), StreamError>;
}

/// What a [`Process`] sends to the client.
pub(crate) enum Output {
    /// The head; true if nothing follows.
    Head(ResponseHead, bool),
    Data(Bytes),
    End(Option<Headers>),
}

/// Changes a request and its answer, waiting for somebody else to say how.
pub(crate) trait Process {
    /// The next piece of the request body, made of what `next` brings.
    fn poll_request(
        &mut self,
        cx: &mut Context<'_>,
        next: &mut dyn FnMut(&mut Context<'_>) -> Poll<Option<Result<Frame, StreamError>>>,
    ) -> Poll<Option<Result<Frame, StreamError>>>;
    /// The head of the answer; true if nothing follows.
    fn start(&mut self, head: &ResponseHead, end: bool);
    /// A piece of its body.
    fn data(&mut self, data: Bytes);
    /// Its end.
    fn finish(&mut self, trailers: Option<&Headers>);
    /// Whether more may be given although not all was taken.
    fn has_room(&self) -> bool;
    /// What is to be sent; `None` if all was that came. An error breaks the answer off.
    fn poll_output(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Output>, StreamError>>;
}

/// What filters read and changed of one request.
#[derive(Default)]
pub(crate) struct Bodies(RefCell<State>, RefCell<Option<Box<dyn Process>>>);

#[derive(Default)]
struct State {
    ahead: VecDeque<Bytes>,
    size: usize,
    trailers: Option<Headers>,
    ended: bool,
    decoder: Option<Box<dyn Decode>>,
    /// In the order of the filters; the answer passes them backwards.
    encoders: Vec<Box<dyn Encode>>,
}

impl Bodies {
    /// Adds a change of the answer.
    pub(crate) fn encode(&self, e: Box<dyn Encode>) {
        self.0.borrow_mut().encoders.push(e);
    }

    /// Sets the change of the request body.
    pub(crate) fn decode(&self, d: Box<dyn Decode>) {
        self.0.borrow_mut().decoder = Some(d);
    }

    /// Lets somebody else have what passes from now on.
    pub(crate) fn process(&self, p: Box<dyn Process>) {
        *self.1.borrow_mut() = Some(p);
    }

    /// Puts `body` in the place of what was read ahead; with `all` nothing follows it.
    pub(crate) fn replace(&self, body: Bytes, all: bool) {
        let s = &mut *self.0.borrow_mut();
        s.ahead.clear();
        s.size = body.len();
        if !body.is_empty() {
            s.ahead.push_back(body);
        }
        if all {
            s.ended = true;
            s.trailers = None;
            s.decoder = None;
        }
    }

    /// Bytes read ahead.
    pub(crate) fn len(&self) -> usize {
        self.0.borrow().size
    }

    /// Whether trailers were read ahead.
    pub(crate) fn has_trailers(&self) -> bool {
        self.0.borrow().trailers.is_some()
    }

    /// The first `limit` bytes read ahead.
    pub(crate) fn peek(&self, limit: usize) -> Vec<u8> {
        let s = self.0.borrow();
        let mut out = Vec::with_capacity(s.size.min(limit));
        for b in &s.ahead {
            let n = b.len().min(limit - out.len());
            out.extend_from_slice(&b[..n]);
        }
        out
    }
}

/// The client's side of a request that is nothing but its head, such as one that opens a tunnel.
pub(crate) struct HeadOnly;

impl Downstream for HeadOnly {
    fn poll_frame(&self, _: &mut Context<'_>) -> Poll<Option<Result<Frame, StreamError>>> {
        Poll::Ready(None)
    }
    fn poll_gone(&self, _: &mut Context<'_>) -> Poll<()> {
        Poll::Pending
    }
    fn start(&self, _: &ResponseHead, _: bool) -> Result<(), StreamError> {
        Err(StreamError::Protocol)
    }
    fn poll_room(&self, _: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        Poll::Ready(Err(StreamError::Protocol))
    }
    fn data(&self, _: Bytes) -> Result<(), StreamError> {
        Err(StreamError::Protocol)
    }
    fn finish(&self, _: Option<&Headers>) -> Result<(), StreamError> {
        Err(StreamError::Protocol)
    }
    fn poll_flush(&self, _: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        Poll::Ready(Ok(()))
    }
    fn abort(&self) {}
    fn is_multiplexed(&self) -> bool {
        true
    }
}

/// A codec's side of a request with filters around it.
pub(crate) struct Filtered<'a, D> {
    down: &'a D,
    bodies: Bodies,
    /// The head of the answer was sent.
    started: Cell<bool>,
}

impl<'a, D: Downstream> Filtered<'a, D> {
    pub(crate) fn new(down: &'a D) -> Self {
        Self { down, bodies: Bodies::default(), started: Cell::new(false) }
    }

    /// Sends what a [`Process`] has for the client; `None` without one.
    fn poll_process(&self, cx: &mut Context<'_>) -> Option<Poll<Result<(), StreamError>>> {
        let mut p = self.bodies.1.borrow_mut();
        let p = p.as_mut()?;
        Some(loop {
            if self.started.get() {
                match self.down.poll_room(cx) {
                    Poll::Ready(Ok(())) => {}
                    other => break other,
                }
            }
            let sent = match p.poll_output(cx) {
                Poll::Pending => break Poll::Pending,
                Poll::Ready(Ok(None)) => break Poll::Ready(Ok(())),
                Poll::Ready(Ok(Some(Output::Head(head, end)))) => {
                    self.started.set(!end);
                    self.encode_start(&head, end)
                }
                Poll::Ready(Ok(Some(Output::Data(data)))) => self.encode_data(data),
                Poll::Ready(Ok(Some(Output::End(trailers)))) => {
                    self.started.set(false);
                    self.encode_finish(trailers.as_ref())
                }
                Poll::Ready(Err(e)) => {
                    self.down.abort();
                    Err(e)
                }
            };
            if sent.is_err() {
                break Poll::Ready(sent);
            }
        })
    }

    fn poll_read(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, StreamError>>> {
        {
            let s = &mut *self.bodies.0.borrow_mut();
            if let Some(b) = s.ahead.pop_front() {
                return Poll::Ready(Some(Ok(Frame::Data(b))));
            }
            if s.ended {
                return Poll::Ready(s.trailers.take().map(|t| Ok(Frame::Trailers(t))));
            }
        }
        self.poll_decoded(cx)
    }

    fn encode_start(&self, head: &ResponseHead, end: bool) -> Result<(), StreamError> {
        let s = &mut *self.bodies.0.borrow_mut();
        if s.encoders.is_empty() {
            return self.down.start(head, end);
        }
        let mut head = head.clone();
        let mut kept: Vec<Box<dyn Encode>> = Vec::with_capacity(s.encoders.len());
        for mut e in std::mem::take(&mut s.encoders).into_iter().rev() {
            if e.start(&mut head, end) {
                kept.push(e);
            }
        }
        // From here on in the order in which the answer passes them.
        s.encoders = kept;
        self.down.start(&head, end)
    }

    fn encode_data(&self, data: Bytes) -> Result<(), StreamError> {
        let data = self
            .bodies
            .0
            .borrow_mut()
            .encoders
            .iter_mut()
            .fold(data, |d, e| if d.is_empty() { d } else { e.data(d) });
        if data.is_empty() { Ok(()) } else { self.down.data(data) }
    }

    fn encode_finish(&self, trailers: Option<&Headers>) -> Result<(), StreamError> {
        let s = &mut *self.bodies.0.borrow_mut();
        if s.encoders.is_empty() {
            return self.down.finish(trailers);
        }
        let mut trailers = trailers.cloned();
        let mut tail = Bytes::new();
        for e in &mut s.encoders {
            let mut out = if tail.is_empty() { Bytes::new() } else { e.data(tail) };
            let (rest, t) = e.finish(trailers.as_ref());
            if out.is_empty() {
                out = rest;
            } else if !rest.is_empty() {
                out = [out, rest].concat().into();
            }
            (tail, trailers) = (out, t);
        }
        if !tail.is_empty() {
            self.down.data(tail)?;
        }
        self.down.finish(trailers.as_ref())
    }

    fn poll_decoded(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, StreamError>>> {
        loop {
            let frame = ready!(self.down.poll_frame(cx));
            let s = &mut *self.bodies.0.borrow_mut();
            let Some(d) = s.decoder.as_mut() else { return Poll::Ready(frame) };
            match frame {
                Some(Ok(Frame::Data(b))) => match d.data(b) {
                    Ok(b) if b.is_empty() => {}
                    Ok(b) => return Poll::Ready(Some(Ok(Frame::Data(b)))),
                    Err(e) => return Poll::Ready(Some(Err(e))),
                },
                None | Some(Ok(Frame::Trailers(_))) => {
                    let whole = d.finish();
                    s.decoder = None;
                    return Poll::Ready(match whole {
                        Ok(()) => frame,
                        Err(e) => Some(Err(e)),
                    });
                }
                Some(Err(e)) => return Poll::Ready(Some(Err(e))),
            }
        }
    }
}

impl<D: Downstream> Downstream for Filtered<'_, D> {
    fn bodies(&self) -> Option<&Bodies> {
        Some(&self.bodies)
    }

    fn poll_ahead(&self, cx: &mut Context<'_>, limit: usize) -> Poll<Result<Ahead, StreamError>> {
        loop {
            {
                let s = self.bodies.0.borrow();
                if s.ended {
                    return Poll::Ready(Ok(Ahead::Whole));
                }
                if s.size > limit {
                    return Poll::Ready(Ok(Ahead::More));
                }
            }
            let frame = ready!(self.poll_decoded(cx));
            let s = &mut *self.bodies.0.borrow_mut();
            match frame {
                Some(Ok(Frame::Data(b))) => {
                    s.size += b.len();
                    s.ahead.push_back(b);
                }
                Some(Ok(Frame::Trailers(t))) => {
                    s.trailers = Some(t);
                    s.ended = true;
                }
                None => s.ended = true,
                Some(Err(e)) => return Poll::Ready(Err(e)),
            }
        }
    }

    fn poll_frame(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, StreamError>>> {
        match self.bodies.1.borrow_mut().as_mut() {
            Some(p) => p.poll_request(cx, &mut |cx| self.poll_read(cx)),
            None => self.poll_read(cx),
        }
    }

    fn poll_gone(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.down.poll_gone(cx)
    }

    fn start(&self, head: &ResponseHead, end: bool) -> Result<(), StreamError> {
        match self.bodies.1.borrow_mut().as_mut() {
            Some(p) => p.start(head, end),
            None => self.encode_start(head, end)?,
        }
        Ok(())
    }

    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        match self.poll_process(cx) {
            None => self.down.poll_room(cx),
            Some(Poll::Pending) => {
                let room = self.bodies.1.borrow().as_ref().is_some_and(|p| p.has_room());
                if room { Poll::Ready(Ok(())) } else { Poll::Pending }
            }
            Some(done) => done,
        }
    }

    fn data(&self, data: Bytes) -> Result<(), StreamError> {
        match self.bodies.1.borrow_mut().as_mut() {
            Some(p) => p.data(data),
            None => self.encode_data(data)?,
        }
        Ok(())
    }

    fn finish(&self, trailers: Option<&Headers>) -> Result<(), StreamError> {
        match self.bodies.1.borrow_mut().as_mut() {
            Some(p) => p.finish(trailers),
            None => self.encode_finish(trailers)?,
        }
        Ok(())
    }

    fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        if let Some(processing) = self.poll_process(cx) {
            ready!(processing)?;
        }
        self.down.poll_flush(cx)
    }

    fn abort(&self) {
        self.down.abort();
    }

    fn is_multiplexed(&self) -> bool {
        self.down.is_multiplexed()
    }
}

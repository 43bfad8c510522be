//! What is processed while it passes: a body piece by piece, and the answer.

use std::{
    collections::VecDeque,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use mesh_model::proxy::BodyMode;
use mesh_telemetry::metrics::ProcEvent;

use super::{
    EMPTY, ExtProc, MAX_BODY,
    link::{Failed, Link},
    wire::{self, Change, Part, Said},
};
use crate::http::{
    filtered::{Output, Process},
    headers::{HeaderId, Headers},
    local_reply::{self, LocalReply},
    message::{BodyKind, Frame, RequestHead, ResponseHead, StreamError},
};

/// Bytes of an answer that may wait for the processor before its server has to.
const WAITING: usize = 64 * 1024;

/// What one direction waits for an answer to.
enum Waiting {
    Head(ResponseHead, bool),
    Data(Bytes),
    Buffered { end: bool },
    Trailers(Headers),
}

enum Input {
    Head(ResponseHead, bool),
    Data(Bytes),
    End(Option<Headers>),
}

/// Both directions of an exchange as they pass.
pub(super) struct Processor {
    link: Link,
    request: Request,
    answer: Answer,
}

#[derive(Default)]
struct Request {
    waiting: Option<Waiting>,
    ready: VecDeque<Frame>,
    /// The processor has seen the end of the body.
    ended: bool,
    over: bool,
}

#[derive(Default)]
struct Answer {
    input: VecDeque<Input>,
    /// Bytes of it.
    size: usize,
    waiting: Option<Waiting>,
    output: VecDeque<Output>,
    /// A head that waits for the body, which is processed as a whole.
    held: Option<ResponseHead>,
    buffer: Vec<u8>,
    started: bool,
    ended: bool,
    /// What the server sends is not wanted any more.
    swallow: bool,
    failed: bool,
    /// The request is HEAD, whose answer has no body.
    bare: bool,
    /// The client understands gRPC's form of an error.
    grpc: bool,
}

impl Processor {
    pub(super) fn new(link: Link, head: &RequestHead) -> Self {
        let request = Request { ended: head.body == BodyKind::Empty, ..Request::default() };
        let (bare, grpc) = (head.method == http::Method::HEAD, head.is_grpc());
        Self { link, request, answer: Answer { bare, grpc, ..Answer::default() } }
    }

    fn shown<'f>(filter: &'f ExtProc) -> impl Fn(&[u8]) -> bool + 'f {
        |n| filter.shows(n)
    }

    /// An answer of our own in the place of the server's, or its end if that has begun.
    fn instead(&mut self, reply: LocalReply) {
        let a = &mut self.answer;
        self.link.close();
        a.swallow = true;
        a.held = None;
        a.waiting = None;
        if a.started {
            a.failed = true;
            return;
        }
        a.started = true;
        let mut head = ResponseHead { status: reply.status, headers: reply.headers, body: BodyKind::Empty };
        local_reply::stamp(&mut head.headers, "");
        if a.grpc {
            let status = reply.grpc.unwrap_or_else(|| local_reply::grpc_of_http(reply.status));
            head.status = 200;
            head.headers.set_id(HeaderId::ContentType, b"application/grpc");
            head.headers.set_id(HeaderId::GrpcStatus, status.to_string().as_bytes());
        }
        if reply.body.is_empty() || a.bare || a.grpc {
            a.output.push_back(Output::Head(head, true));
            return;
        }
        if reply.is_text {
            head.headers.push_id(HeaderId::ContentType, b"text/plain");
        }
        length(&mut head, reply.body.len());
        a.output.push_back(Output::Head(head, false));
        a.output.push_back(Output::Data(reply.body));
        a.output.push_back(Output::End(None));
    }

    fn refuse(&mut self, f: &Failed) {
        let status = f.status(self.link.filter.config.status_on_error);
        self.instead(LocalReply { status, ..LocalReply::default() });
    }

    /// The head may go out, unless it waits for the body.
    fn release(&mut self, mut head: ResponseHead, end: bool) {
        let body = if self.link.is_open() && !end { self.link.mode.response_body } else { BodyMode::None };
        match body {
            BodyMode::Buffered | BodyMode::BufferedPartial => self.answer.held = Some(head),
            BodyMode::None | BodyMode::Streamed => {
                if body == BodyMode::Streamed {
                    head.headers.remove_id(HeaderId::ContentLength);
                    head.body = BodyKind::Stream;
                }
                self.answer.started = true;
                self.answer.output.push_back(Output::Head(head, end));
            }
        }
    }

    /// Takes what the processor said, or that it says nothing, to what waited for it.
    fn answered(&mut self, waiting: Waiting, change: Option<Change>) -> Result<(), Failed> {
        let change = change.unwrap_or_default();
        match waiting {
            Waiting::Head(mut head, end) => {
                self.link.mutate(&change.headers, &mut head)?;
                if change.replace {
                    let body = change.body.unwrap_or_default();
                    self.answer.swallow = true;
                    self.link.close();
                    self.answer.started = true;
                    length(&mut head, body.len());
                    let bare = self.answer.bare || body.is_empty();
                    self.answer.output.push_back(Output::Head(head, bare));
                    if !bare {
                        self.answer.output.extend([Output::Data(body), Output::End(None)]);
                    }
                } else {
                    self.release(head, end);
                }
            }
            Waiting::Data(data) => {
                let data = change.body.unwrap_or(data);
                if !data.is_empty() {
                    self.answer.output.push_back(Output::Data(data));
                }
            }
            Waiting::Buffered { end } => {
                let body = match change.body {
                    Some(b) => b,
                    None => Bytes::from(std::mem::take(&mut self.answer.buffer)),
                };
                self.answer.buffer = Vec::new();
                self.link.mode.response_body = BodyMode::None;
                if let Some(mut head) = self.answer.held.take() {
                    self.link.mutate(&change.headers, &mut head)?;
                    if end {
                        length(&mut head, body.len());
                    } else {
                        head.headers.remove_id(HeaderId::ContentLength);
                        head.body = BodyKind::Stream;
                    }
                    self.answer.started = true;
                    self.answer.output.push_back(Output::Head(head, false));
                }
                if !body.is_empty() {
                    self.answer.output.push_back(Output::Data(body));
                }
            }
            Waiting::Trailers(mut t) => {
                self.link.mutate(&change.headers, &mut t)?;
                self.answer.output.push_back(Output::End(Some(t)));
            }
        }
        Ok(())
    }

    fn take(&mut self, input: Input) {
        let filter = Arc::clone(&self.link.filter);
        let shown = Self::shown(&filter);
        if self.answer.swallow {
            return;
        }
        let (open, mode) = (self.link.is_open(), self.link.mode);
        match input {
            Input::Head(head, end) => {
                if open && mode.response_headers {
                    let message = wire::response_headers(&head, end, &shown);
                    self.link.send(Part::ResponseHeaders, message);
                    self.answer.waiting = Some(Waiting::Head(head, end));
                } else {
                    self.release(head, end);
                }
            }
            Input::Data(data) => {
                let body =
                    if open || self.answer.held.is_some() { mode.response_body } else { BodyMode::None };
                match body {
                    BodyMode::None => self.answer.output.push_back(Output::Data(data)),
                    BodyMode::Streamed => {
                        self.link.send(Part::ResponseBody, wire::body(Part::ResponseBody, &data, false));
                        self.answer.waiting = Some(Waiting::Data(data));
                    }
                    BodyMode::Buffered | BodyMode::BufferedPartial => {
                        self.answer.buffer.extend_from_slice(&data);
                        if self.answer.buffer.len() <= MAX_BODY {
                            return;
                        }
                        if body == BodyMode::Buffered {
                            let f = Failed::Error("an answer that is too large".to_owned());
                            if let Err(f) = self.link.fail(f) {
                                return self.refuse(&f);
                            }
                        }
                        self.show_buffer(false);
                    }
                }
            }
            Input::End(trailers) => {
                let last = trailers.is_none();
                if self.answer.held.is_some() {
                    // The end comes again, when the body is through.
                    self.show_buffer(last);
                    self.answer.ended = true;
                    return self.answer.input.push_front(Input::End(trailers));
                }
                if open && mode.response_body == BodyMode::Streamed && last && !self.answer.ended {
                    self.answer.ended = true;
                    self.link.send(Part::ResponseBody, wire::body(Part::ResponseBody, &EMPTY, true));
                    self.answer.waiting = Some(Waiting::Data(EMPTY));
                    return self.answer.input.push_front(Input::End(None));
                }
                match trailers {
                    Some(t) if open && mode.response_trailers => {
                        let message = wire::trailers(Part::ResponseTrailers, &t, &shown);
                        self.link.send(Part::ResponseTrailers, message);
                        self.answer.waiting = Some(Waiting::Trailers(t));
                    }
                    t => self.answer.output.push_back(Output::End(t)),
                }
            }
        }
    }

    /// Shows what was buffered of the answer.
    fn show_buffer(&mut self, end: bool) {
        if self.link.is_open() {
            let message = wire::body(Part::ResponseBody, &self.answer.buffer, end);
            self.link.send(Part::ResponseBody, message);
        }
        // Without a processor this is answered with nothing at once.
        self.answer.waiting = Some(Waiting::Buffered { end });
    }

    /// A part that the processor was asked about.
    fn part(w: &Waiting, request: bool) -> Part {
        match (w, request) {
            (Waiting::Head(..), _) => Part::ResponseHeaders,
            (Waiting::Trailers(_), true) => Part::RequestTrailers,
            (Waiting::Trailers(_), false) => Part::ResponseTrailers,
            (_, true) => Part::RequestBody,
            (_, false) => Part::ResponseBody,
        }
    }

    /// What was said about `part`; an immediate answer is taken care of, and is an error here.
    fn poll_change(&mut self, cx: &mut Context<'_>, part: Part) -> Poll<Result<Option<Change>, StreamError>> {
        match ready!(self.link.poll_said(cx, part.of_request())) {
            Ok(Some(Said::Change(p, c))) if p == part => Poll::Ready(Ok(Some(c))),
            Ok(Some(Said::Immediate(i))) => {
                self.link.series.count(ProcEvent::Immediate);
                let reply = self.link.filter.reply(&i);
                self.instead(reply);
                Poll::Ready(Err(StreamError::Reset))
            }
            Ok(Some(_)) => {
                self.link.series.count(ProcEvent::Spurious);
                let f = Failed::Error("a message that nothing was asked about".to_owned());
                match self.link.fail(f) {
                    Ok(()) => Poll::Ready(Ok(None)),
                    Err(f) => {
                        self.refuse(&f);
                        Poll::Ready(Err(StreamError::Reset))
                    }
                }
            }
            Ok(None) => Poll::Ready(Ok(None)),
            Err(f) => {
                self.refuse(&f);
                Poll::Ready(Err(StreamError::Reset))
            }
        }
    }
}

fn length(head: &mut ResponseHead, n: usize) {
    head.body = BodyKind::Length(n as u64);
    head.headers.set_id(HeaderId::ContentLength, n.to_string().as_bytes());
}

impl Process for Processor {
    fn poll_request(
        &mut self,
        cx: &mut Context<'_>,
        next: &mut dyn FnMut(&mut Context<'_>) -> Poll<Option<Result<Frame, StreamError>>>,
    ) -> Poll<Option<Result<Frame, StreamError>>> {
        let filter = Arc::clone(&self.link.filter);
        loop {
            if let Some(w) = self.request.waiting.take() {
                let change = match self.poll_change(cx, Self::part(&w, true)) {
                    Poll::Ready(Ok(c)) => c.unwrap_or_default(),
                    Poll::Ready(Err(e)) => return Poll::Ready(Some(Err(e))),
                    Poll::Pending => {
                        self.request.waiting = Some(w);
                        return Poll::Pending;
                    }
                };
                match w {
                    Waiting::Trailers(mut t) => {
                        if let Err(f) = self.link.mutate(&change.headers, &mut t) {
                            self.refuse(&f);
                            return Poll::Ready(Some(Err(StreamError::Reset)));
                        }
                        self.request.ready.push_back(Frame::Trailers(t));
                        self.request.over = true;
                    }
                    Waiting::Data(data) => {
                        let data = change.body.unwrap_or(data);
                        if !data.is_empty() {
                            self.request.ready.push_back(Frame::Data(data));
                        }
                    }
                    Waiting::Head(..) | Waiting::Buffered { .. } => {}
                }
            }
            if let Some(f) = self.request.ready.pop_front() {
                return Poll::Ready(Some(Ok(f)));
            }
            if self.request.over {
                return Poll::Ready(None);
            }
            let (open, mode) = (self.link.is_open(), self.link.mode);
            let streamed = open && mode.request_body == BodyMode::Streamed;
            match ready!(next(cx)) {
                Some(Ok(Frame::Data(data))) if streamed => {
                    self.link.send(Part::RequestBody, wire::body(Part::RequestBody, &data, false));
                    self.request.waiting = Some(Waiting::Data(data));
                }
                Some(Ok(Frame::Trailers(t))) if open && mode.request_trailers => {
                    let message = wire::trailers(Part::RequestTrailers, &t, &|n| filter.shows(n));
                    self.link.send(Part::RequestTrailers, message);
                    self.request.waiting = Some(Waiting::Trailers(t));
                }
                None if streamed && !self.request.ended => {
                    self.request.ended = true;
                    self.request.over = true;
                    self.link.send(Part::RequestBody, wire::body(Part::RequestBody, &EMPTY, true));
                    self.request.waiting = Some(Waiting::Data(EMPTY));
                }
                other => return Poll::Ready(other),
            }
        }
    }

    fn start(&mut self, head: &ResponseHead, end: bool) {
        self.answer.input.push_back(Input::Head(head.clone(), end));
    }

    fn data(&mut self, data: Bytes) {
        self.answer.size += data.len();
        self.answer.input.push_back(Input::Data(data));
    }

    fn finish(&mut self, trailers: Option<&Headers>) {
        self.answer.input.push_back(Input::End(trailers.cloned()));
    }

    fn has_room(&self) -> bool {
        self.answer.size < WAITING
    }

    fn poll_output(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Output>, StreamError>> {
        loop {
            if let Some(o) = self.answer.output.pop_front() {
                return Poll::Ready(Ok(Some(o)));
            }
            if self.answer.failed {
                return Poll::Ready(Err(StreamError::Reset));
            }
            if let Some(w) = self.answer.waiting.take() {
                match self.poll_change(cx, Self::part(&w, false)) {
                    Poll::Ready(Ok(c)) => {
                        if let Err(f) = self.answered(w, c) {
                            self.refuse(&f);
                        }
                    }
                    // What stands in its place is in the output.
                    Poll::Ready(Err(_)) => {}
                    Poll::Pending => {
                        self.answer.waiting = Some(w);
                        return Poll::Pending;
                    }
                }
                continue;
            }
            let Some(input) = self.answer.input.pop_front() else { return Poll::Ready(Ok(None)) };
            if let Input::Data(d) = &input {
                self.answer.size -= d.len();
            }
            self.take(input);
        }
    }
}

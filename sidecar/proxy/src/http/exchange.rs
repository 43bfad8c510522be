//! One try of a request on one upstream connection: the request goes out while the answer comes in.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use tokio::time::Instant;

use super::{
    downstream::Downstream,
    h1::client::H1Exchange,
    h2::client::H2Exchange,
    headers::Headers,
    message::{BodyKind, Frame, ResponseHead, StreamError},
};
use crate::worker::alarm::Alarm;

/// An upstream stream of either protocol.
pub(crate) enum Upstream {
    H1(H1Exchange),
    H2(H2Exchange),
}

impl Upstream {
    pub(crate) fn poll_room(&self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        match self {
            Self::H1(x) => x.poll_room(cx),
            Self::H2(x) => x.poll_room(cx),
        }
    }

    pub(crate) fn data(&self, data: Bytes) -> Result<(), StreamError> {
        match self {
            Self::H1(x) => x.data(&data),
            Self::H2(x) => {
                x.data(data);
                Ok(())
            }
        }
    }

    pub(crate) fn finish(&self, trailers: Option<&Headers>) -> Result<(), StreamError> {
        match self {
            Self::H1(x) => x.finish(trailers),
            Self::H2(x) => {
                x.finish(trailers);
                Ok(())
            }
        }
    }

    fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        match self {
            Self::H1(x) => x.poll_flush(cx),
            Self::H2(x) => x.poll_room(cx),
        }
    }

    /// Flushes the end of the request.
    pub(crate) fn poll_end(&self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        ready!(self.poll_flush(cx))?;
        match self {
            Self::H1(x) => x.poll_shutdown(cx),
            Self::H2(_) => Poll::Ready(Ok(())),
        }
    }

    pub(crate) fn poll_head(&self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, StreamError>> {
        match self {
            Self::H1(x) => x.poll_head(cx),
            Self::H2(x) => x.poll_head(cx),
        }
    }

    pub(crate) fn poll_frame(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, StreamError>>> {
        match self {
            Self::H1(x) => x.poll_frame(cx),
            Self::H2(x) => x.poll_frame(cx),
        }
    }

    /// SPIFFE ID of the server.
    pub(crate) fn peer(&self) -> Option<Arc<str>> {
        match self {
            Self::H1(x) => x.peer(),
            Self::H2(x) => x.peer(),
        }
    }
}

/// What was sent of a request body, for as long as it may have to be sent again.
#[derive(Default)]
pub(crate) struct Replay {
    frames: Vec<Bytes>,
    trailers: Option<Headers>,
    size: usize,
    limit: usize,
    complete: bool,
    lost: bool,
}

impl Replay {
    /// Keeps up to `limit` bytes; 0 keeps nothing.
    pub(crate) fn new(limit: usize, body: BodyKind) -> Self {
        Self { limit, complete: body == BodyKind::Empty, ..Self::default() }
    }

    fn push(&mut self, data: &Bytes) {
        self.size += data.len();
        if self.size > self.limit {
            self.lost = true;
            self.frames = Vec::new();
        } else if !self.lost {
            self.frames.push(data.clone());
        }
    }

    /// Whether the request was received whole.
    pub(crate) fn is_complete(&self) -> bool {
        self.complete
    }

    /// Whether a new try can have the request from its beginning.
    pub(crate) fn is_intact(&self) -> bool {
        !self.lost
    }

    /// The whole body, if it was kept.
    pub(crate) fn whole(&self) -> Option<Vec<Bytes>> {
        (self.complete && !self.lost).then(|| self.frames.clone())
    }
}

/// How far a request body is; it outlives the pump between the two halves of an exchange.
#[derive(Clone, Copy)]
pub(crate) enum Stage {
    Replaying(usize),
    Streaming,
    Ending,
    Done,
    /// The upstream takes no more; its answer may still come.
    Refused,
}

impl Stage {
    pub(crate) fn first(body: BodyKind) -> Self {
        if body == BodyKind::Empty { Self::Ending } else { Self::Replaying(0) }
    }
}

/// Moves a request body.
pub(crate) struct RequestPump<'a, D> {
    down: &'a D,
    up: &'a Upstream,
    replay: &'a RefCell<Replay>,
    received: &'a Cell<u64>,
    stage: Stage,
}

impl<'a, D: Downstream> RequestPump<'a, D> {
    pub(crate) fn new(
        down: &'a D,
        up: &'a Upstream,
        replay: &'a RefCell<Replay>,
        received: &'a Cell<u64>,
        stage: Stage,
    ) -> Self {
        Self { down, up, replay, received, stage }
    }

    pub(crate) fn stage(&self) -> Stage {
        self.stage
    }

    fn is_done(&self) -> bool {
        matches!(self.stage, Stage::Done | Stage::Refused)
    }

    /// `Err` is the client's failure; the upstream's shows in its answer.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        match self.poll_inner(cx) {
            Poll::Ready(Err(Side::Up)) => {
                self.stage = Stage::Refused;
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(Side::Down(e))) => Poll::Ready(Err(e)),
            Poll::Ready(Ok(())) => Poll::Ready(Ok(())),
            Poll::Pending => Poll::Pending,
        }
    }

    fn poll_inner(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Side>> {
        let up = |r: Result<(), StreamError>| r.map_err(|_| Side::Up);
        loop {
            match self.stage {
                Stage::Replaying(at) => {
                    let replay = self.replay.borrow();
                    match replay.frames.get(at) {
                        Some(frame) => {
                            up(ready!(self.up.poll_room(cx)))?;
                            up(self.up.data(frame.clone()))?;
                            self.stage = Stage::Replaying(at + 1);
                        }
                        None if replay.complete => {
                            up(ready!(self.up.poll_room(cx)))?;
                            up(self.up.finish(replay.trailers.as_ref()))?;
                            self.stage = Stage::Ending;
                        }
                        None => self.stage = Stage::Streaming,
                    }
                }
                Stage::Streaming => {
                    up(ready!(self.up.poll_room(cx)))?;
                    let frame = match self.down.poll_frame(cx) {
                        Poll::Ready(f) => f,
                        Poll::Pending => {
                            if let Poll::Ready(Err(_)) = self.up.poll_flush(cx) {
                                return Poll::Ready(Err(Side::Up));
                            }
                            return Poll::Pending;
                        }
                    };
                    let mut replay = self.replay.borrow_mut();
                    match frame {
                        Some(Ok(Frame::Data(data))) => {
                            self.received.set(self.received.get() + data.len() as u64);
                            replay.push(&data);
                            up(self.up.data(data))?;
                        }
                        Some(Ok(Frame::Trailers(t))) => {
                            replay.complete = true;
                            up(self.up.finish(Some(&t)))?;
                            replay.trailers = Some(t);
                            self.stage = Stage::Ending;
                        }
                        Some(Err(e)) => return Poll::Ready(Err(Side::Down(e))),
                        None => {
                            replay.complete = true;
                            up(self.up.finish(None))?;
                            self.stage = Stage::Ending;
                        }
                    }
                }
                Stage::Ending => {
                    up(ready!(self.up.poll_end(cx)))?;
                    self.stage = Stage::Done;
                }
                Stage::Done | Stage::Refused => return Poll::Ready(Ok(())),
            }
        }
    }
}

enum Side {
    Down(StreamError),
    Up,
}

/// Why there is no answer to pass on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The upstream failed.
    Upstream(StreamError),
    /// The client failed or left.
    Downstream(StreamError),
    /// The request's time is over.
    Timeout,
    /// The try's time is over.
    PerTryTimeout,
    /// Nothing moved for too long.
    Idle,
    /// The stream lasted too long.
    Duration,
    /// The request took too long to arrive.
    Request,
}

/// Time limits of a request, on one timer.
pub(crate) struct Timers {
    alarm: Alarm,
    timeout: Option<Duration>,
    deadline: Option<Instant>,
    per_try: Option<Instant>,
    idle: Option<(Duration, Instant)>,
    /// The end of the stream, whatever it does.
    end: Option<Instant>,
    /// When all of the request must have arrived, until it has or its answer begins.
    receive: Option<Instant>,
    /// A try in which nothing moves: its limit, the next look, and what had moved at the last one.
    try_idle: Option<(Duration, Instant, u64)>,
    moved: Cell<u64>,
    seen: u64,
}

impl Timers {
    pub(crate) fn new(alarm: Alarm, timeout: Option<Duration>, idle: Option<Duration>) -> Self {
        let idle = idle.filter(|t| !t.is_zero()).map(|t| (t, Instant::now() + t));
        Self {
            alarm,
            timeout,
            deadline: None,
            per_try: None,
            idle,
            end: None,
            receive: None,
            try_idle: None,
            moved: Cell::new(0),
            seen: 0,
        }
    }

    /// Limits the whole stream.
    pub(crate) fn end_at(&mut self, end: Option<Instant>) {
        self.end = end;
    }

    /// Limits the arrival of the request.
    pub(crate) fn receive_until(&mut self, end: Option<Instant>) {
        self.receive = end;
    }

    /// A dial begins, which has only the request's own limits; `whole` says whether the request was received.
    pub(crate) fn begin_dial(&mut self, whole: bool) {
        (self.per_try, self.try_idle) = (None, None);
        if whole {
            self.arm();
        }
    }

    /// A try begins, and may be idle for this long.
    pub(crate) fn begin_try(&mut self, idle: Option<Duration>) {
        self.try_idle = idle.filter(|t| !t.is_zero()).map(|t| (t, Instant::now() + t, self.moved.get()));
    }

    /// The request was received whole: its timeout begins, once.
    fn arm(&mut self) {
        self.receive = None;
        if let Some(t) = self.timeout.take() {
            self.deadline = Some(Instant::now() + t);
        }
    }

    /// Waits, unless the request's time is over before.
    pub(crate) async fn back_off(&mut self, time: Duration) -> Result<(), Failure> {
        let end = Instant::now() + time;
        let limit = [(self.deadline, Failure::Timeout), (self.end, Failure::Duration)]
            .into_iter()
            .filter_map(|(at, f)| at.filter(|at| *at < end).map(|at| (at, f)))
            .min_by_key(|(at, _)| *at);
        match limit {
            None => tokio::time::sleep_until(end).await,
            Some((at, f)) => {
                tokio::time::sleep_until(at).await;
                return Err(f);
            }
        }
        Ok(())
    }

    fn touch(&self) {
        self.moved.set(self.moved.get() + 1);
    }

    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Failure> {
        loop {
            let idle = self.idle.map(|(_, at)| at);
            let try_idle = self.try_idle.map(|(_, at, _)| at);
            let all = [self.deadline, self.per_try, idle, self.end, try_idle, self.receive];
            let Some(next) = all.into_iter().flatten().min() else {
                return Poll::Pending;
            };
            ready!(self.alarm.poll(next, cx));
            if self.deadline.is_some_and(|d| d <= next) {
                return Poll::Ready(Failure::Timeout);
            }
            if self.end.is_some_and(|d| d <= next) {
                return Poll::Ready(Failure::Duration);
            }
            if self.receive.is_some_and(|d| d <= next) {
                return Poll::Ready(Failure::Request);
            }
            if self.per_try.is_some_and(|d| d <= next) {
                return Poll::Ready(Failure::PerTryTimeout);
            }
            if let Some((limit, at, seen)) = self.try_idle.as_mut().filter(|(_, at, _)| *at <= next) {
                if *seen == self.moved.get() {
                    return Poll::Ready(Failure::PerTryTimeout);
                }
                *seen = self.moved.get();
                *at = Instant::now() + *limit;
            }
            if let Some((limit, at)) = self.idle.as_mut().filter(|(_, at)| *at <= next) {
                // Activity is noticed when the timer fires, so that moving bytes costs no timer operation.
                if self.seen == self.moved.get() {
                    return Poll::Ready(Failure::Idle);
                }
                self.seen = self.moved.get();
                *at = Instant::now() + *limit;
            }
        }
    }
}

/// Sends the request and waits for the head of the answer. With `hold`, the body waits for that head (upgrades:
/// no byte of a refused upgrade may reach the server as a request).
pub(crate) async fn request<D: Downstream>(
    pump: &mut RequestPump<'_, D>,
    timers: &mut Timers,
    per_try: Option<Duration>,
    hold: bool,
) -> Result<ResponseHead, Failure> {
    timers.per_try = per_try.map(|t| Instant::now() + t);
    let (down, up, received) = (pump.down, pump.up, pump.received);
    let mut before = received.get();
    let head = poll_fn(|cx| {
        if hold {
            let _ = up.poll_flush(cx);
        } else if !pump.is_done()
            && let Poll::Ready(Err(e)) = pump.poll(cx)
        {
            return Poll::Ready(Err(Failure::Downstream(e)));
        }
        if pump.is_done() {
            timers.arm();
        }
        if let Poll::Ready(head) = up.poll_head(cx) {
            return Poll::Ready(head.map_err(Failure::Upstream));
        }
        if received.get() != before {
            before = received.get();
            timers.touch();
        }
        if let Poll::Ready(f) = timers.poll(cx) {
            return Poll::Ready(Err(f));
        }
        if down.poll_gone(cx).is_ready() {
            return Poll::Ready(Err(Failure::Downstream(StreamError::Reset)));
        }
        Poll::Pending
    })
    .await;
    timers.per_try = None;
    head
}

/// Moves the answer's body, and what is left of the request's. Returns the trailers.
pub(crate) async fn response<D: Downstream>(
    pump: &mut RequestPump<'_, D>,
    timers: &mut Timers,
    sent: &Cell<u64>,
    tunnel: bool,
) -> Result<Option<Headers>, Failure> {
    let (down, up) = (pump.down, pump.up);
    timers.receive = None;
    let mut trailers: Option<Headers> = None;
    let mut ending = false;
    let mut ended = false;
    let gone = |e: StreamError| Failure::Downstream(e);
    poll_fn(|cx| {
        if !pump.is_done()
            && let Poll::Ready(Err(e)) = pump.poll(cx)
        {
            return Poll::Ready(Err(gone(e)));
        }
        'response: while !ended {
            if ending {
                match down.poll_flush(cx) {
                    Poll::Ready(r) => {
                        r.map_err(gone)?;
                        ended = true;
                        break 'response;
                    }
                    Poll::Pending => break 'response,
                }
            }
            match down.poll_room(cx) {
                Poll::Ready(r) => r.map_err(gone)?,
                Poll::Pending => break 'response,
            }
            match up.poll_frame(cx) {
                Poll::Ready(Some(Ok(Frame::Data(data)))) => {
                    sent.set(sent.get() + data.len() as u64);
                    timers.touch();
                    down.data(data).map_err(Failure::Upstream)?;
                }
                Poll::Ready(Some(Ok(Frame::Trailers(t)))) => {
                    down.finish(Some(&t)).map_err(Failure::Upstream)?;
                    trailers = Some(t);
                    ending = true;
                }
                Poll::Ready(None) => {
                    down.finish(None).map_err(Failure::Upstream)?;
                    ending = true;
                }
                Poll::Ready(Some(Err(e))) => return Poll::Ready(Err(Failure::Upstream(e))),
                Poll::Pending => {
                    if let Poll::Ready(Err(e)) = down.poll_flush(cx) {
                        return Poll::Ready(Err(gone(e)));
                    }
                    break 'response;
                }
            }
        }
        // A tunnel ends when both directions have; an ordinary exchange with its answer.
        if ended && (!tunnel || pump.is_done()) {
            return Poll::Ready(Ok(trailers.take()));
        }
        if let Poll::Ready(f) = timers.poll(cx) {
            return Poll::Ready(Err(f));
        }
        if !tunnel && down.poll_gone(cx).is_ready() {
            return Poll::Ready(Err(gone(StreamError::Reset)));
        }
        Poll::Pending
    })
    .await
}

/// Sends a request whose answer nobody wants; returns its status.
pub(crate) async fn drop_answer(up: &Upstream, body: Vec<Bytes>, kind: BodyKind) -> Result<u16, StreamError> {
    for data in body {
        poll_fn(|cx| up.poll_room(cx)).await?;
        up.data(data)?;
    }
    if kind != BodyKind::Empty {
        poll_fn(|cx| up.poll_room(cx)).await?;
        up.finish(None)?;
    }
    poll_fn(|cx| up.poll_end(cx)).await?;
    let head = poll_fn(|cx| up.poll_head(cx)).await?;
    while let Some(frame) = poll_fn(|cx| up.poll_frame(cx)).await {
        frame?;
    }
    Ok(head.status)
}

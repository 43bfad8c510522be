//! The state of one request's processing that both of its directions share.

use std::{
    collections::VecDeque,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, ready},
};

use mesh_model::proxy::ProcessingMode;
use mesh_telemetry::metrics::{ProcEvent, ProcSeries};
use serde_json::{Map, Value};
use tokio::time::Instant;

use super::{
    ExtProc, NO_LIMIT,
    call::{Call, Ended},
    mutate::{self, Head, NotAllowed},
    wire::{self, Mutation, Part, Said},
};
use crate::worker::{Worker, alarm::Alarm};

/// Why processing failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failed {
    #[error("a message was not answered in time")]
    Timeout,
    #[error("a change that the rules make an error")]
    Mutation,
    #[error("{0}")]
    Error(String),
}

impl Failed {
    pub(super) fn details(&self) -> &'static str {
        match self {
            Self::Timeout => "ext_proc_error_per-message_timeout_exceeded",
            Self::Mutation => "ext_proc_error_invalid_mutation",
            Self::Error(_) => "ext_proc_error",
        }
    }

    /// Envoy answers 504 for silence, whatever the status of other errors is.
    pub(super) fn status(&self, on_error: u16) -> u16 {
        if matches!(self, Self::Timeout) { 504 } else { on_error }
    }
}

/// A side of the exchange, with what it waits for.
struct Side {
    alarm: Alarm,
    until: Option<Instant>,
    /// What the processor was asked about and has not answered.
    asked: Option<Part>,
    said: VecDeque<Said>,
}

/// The stream to the processor, shared by both directions.
pub(super) struct Link {
    pub(super) filter: Arc<ExtProc>,
    call: Option<Call>,
    pub(super) mode: ProcessingMode,
    allow: bool,
    pub(super) series: ProcSeries,
    /// Request and answer.
    sides: [Side; 2],
    pub(super) metadata: Map<String, Value>,
}

impl Link {
    pub(super) fn new(
        filter: Arc<ExtProc>,
        worker: &Rc<Worker>,
        mode: ProcessingMode,
        allow: bool,
        series: ProcSeries,
    ) -> Self {
        let side = || Side { alarm: worker.alarms.alarm(), until: None, asked: None, said: VecDeque::new() };
        let sides = [side(), side()];
        Self { filter, call: None, mode, allow, series, sides, metadata: Map::new() }
    }

    pub(super) fn open(&mut self, call: Call) {
        self.call = Some(call);
    }

    pub(super) fn is_open(&self) -> bool {
        self.call.is_some()
    }

    pub(super) fn close(&mut self) {
        if self.call.take().is_some() {
            self.series.count(ProcEvent::StreamClosed);
        }
    }

    /// Ends processing; an error unless what is not processed may pass.
    pub(super) fn fail(&mut self, f: Failed) -> Result<(), Failed> {
        tracing::debug!(error = %f, "external processing");
        self.call = None;
        self.series.count(ProcEvent::StreamFailed);
        if matches!(f, Failed::Timeout) {
            self.series.count(ProcEvent::Timeout);
        }
        if self.allow {
            self.series.count(ProcEvent::FailureAllowed);
            return Ok(());
        }
        Err(f)
    }

    pub(super) fn send(&mut self, part: Part, message: Vec<u8>) {
        let limit = self.filter.config.message_timeout;
        let limit = if limit.is_zero() { NO_LIMIT } else { limit };
        let side = &mut self.sides[usize::from(!part.of_request())];
        side.until = Some(Instant::now() + limit);
        side.asked = Some(part);
        if let Some(c) = &mut self.call {
            self.series.count(ProcEvent::Sent);
            c.send(message);
        }
    }

    /// What the processor said to the message of one side; `None` if it says nothing any more.
    pub(super) fn poll_said(
        &mut self,
        cx: &mut Context<'_>,
        request: bool,
    ) -> Poll<Result<Option<Said>, Failed>> {
        let mine = usize::from(!request);
        loop {
            if let Some(s) = self.sides[mine].said.pop_front() {
                self.sides[mine].until = None;
                return Poll::Ready(Ok(Some(s)));
            }
            let Some(call) = self.call.as_mut() else { return Poll::Ready(Ok(None)) };
            let message = match call.poll_message(cx) {
                Poll::Ready(Ok(m)) => m,
                Poll::Ready(Err(Ended::Done)) => {
                    self.close();
                    return Poll::Ready(Ok(None));
                }
                Poll::Ready(Err(Ended::Failed(e))) => {
                    return Poll::Ready(self.fail(Failed::Error(e)).map(|()| None));
                }
                Poll::Pending => {
                    let side = &mut self.sides[mine];
                    if let Some(at) = side.until {
                        ready!(side.alarm.poll(at, cx));
                        return Poll::Ready(self.fail(Failed::Timeout).map(|()| None));
                    }
                    return Poll::Pending;
                }
            };
            self.series.count(ProcEvent::Received);
            let Ok(answer) = wire::answer(&message) else {
                return Poll::Ready(
                    self.fail(Failed::Error("a message that is none".to_owned())).map(|()| None),
                );
            };
            self.metadata.extend(answer.metadata);
            let to = match &answer.said {
                Said::Change(part, _) => usize::from(!part.of_request()),
                _ => mine,
            };
            if let Said::Change(part, _) = &answer.said
                && matches!(part, Part::RequestHeaders | Part::ResponseHeaders)
                && self.filter.config.allow_mode_override
                && let Some(m) = &answer.mode
            {
                m.apply(&mut self.mode);
            }
            match answer.said {
                Said::Nothing => {
                    let Some(t) = answer.timeout else {
                        self.series.count(ProcEvent::Spurious);
                        let f = Failed::Error("a message that says nothing".to_owned());
                        return Poll::Ready(self.fail(f).map(|()| None));
                    };
                    let max = self.filter.config.max_message_timeout;
                    if t.as_millis() > 0 && t <= max {
                        self.sides[mine].until = Some(Instant::now() + t);
                    }
                }
                Said::Immediate(_) if self.filter.config.disable_immediate_response => {
                    self.series.count(ProcEvent::Spurious);
                    let f = Failed::Error("an immediate response, which is disabled".to_owned());
                    return Poll::Ready(self.fail(f).map(|()| None));
                }
                Said::Change(part, _) if self.sides[to].asked != Some(part) => {
                    self.series.count(ProcEvent::Spurious);
                    let f = Failed::Error("a message that nothing was asked about".to_owned());
                    return Poll::Ready(self.fail(f).map(|()| None));
                }
                said => {
                    self.sides[to].asked = None;
                    self.sides[to].said.push_back(said);
                    // The other side is driven by the same task, perhaps before this one.
                    if to != mine {
                        cx.waker().wake_by_ref();
                    }
                }
            }
        }
    }

    pub(super) fn mutate(&mut self, m: &Mutation, to: &mut dyn Head) -> Result<(), Failed> {
        match mutate::apply(m, &self.filter.rules, to) {
            Ok(ignored) => {
                self.series.rejected(ignored);
                Ok(())
            }
            Err(NotAllowed) => self.fail(Failed::Mutation),
        }
    }
}

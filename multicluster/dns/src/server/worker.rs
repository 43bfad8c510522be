//! What answers, whatever the question came by.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, watch};

use crate::{
    answer::{self, Outcome},
    forward::{self, Upstreams},
    metrics::Counts,
    names::Names,
    wire::{Code, Query, Transport},
    zone::Zone,
};

/// Answers with a view of the table of its own.
#[derive(Clone)]
pub(super) struct Worker {
    names: watch::Receiver<Arc<Names>>,
    table: Arc<Names>,
    upstreams: Arc<Upstreams>,
    counts: Arc<Counts>,
    turn: usize,
}

/// What is to be done.
pub(super) enum Step {
    /// So many bytes are to be sent.
    Reply(usize),
    /// Somebody else is to be asked.
    Wait(Waiting),
    /// Nothing.
    Nothing,
}

/// A question that waits for an upstream.
pub(super) struct Waiting {
    packet: Vec<u8>,
    transport: Transport,
    upstreams: Arc<Upstreams>,
    counts: Arc<Counts>,
    _place: OwnedSemaphorePermit,
}

impl Worker {
    pub(super) fn new(
        names: watch::Receiver<Arc<Names>>,
        upstreams: Arc<Upstreams>,
        counts: Arc<Counts>,
    ) -> Self {
        let table = names.borrow().clone();
        Self { names, table, upstreams, counts, turn: 0 }
    }

    /// Takes the newest table: once for each batch, without a lock unless it has changed.
    pub(super) fn refresh(&mut self) {
        // Without a sender the last table is the last.
        if self.names.has_changed().unwrap_or(false) {
            self.table = self.names.borrow_and_update().clone();
        }
    }

    /// `out` holds the largest answer of the transport.
    pub(super) fn handle(&mut self, packet: &[u8], out: &mut [u8], transport: Transport) -> Step {
        self.turn = self.turn.wrapping_add(1);
        let recursion = self.upstreams.any();
        match answer::answer(&self.table, packet, out, transport, self.turn, recursion) {
            Outcome::Reply { len, zone, code } => {
                self.counts.answered(zone, code);
                Step::Reply(len)
            }
            Outcome::Ignore => Step::Nothing,
            Outcome::Forward(query) => self.forward(&query, packet, out, transport),
        }
    }

    fn forward(&self, query: &Query<'_>, packet: &[u8], out: &mut [u8], transport: Transport) -> Step {
        let question = forward::question(query);
        let remembered = question.as_ref().and_then(|q| self.upstreams.remembered(q));
        if remembered.is_some() {
            let (bytes, code) = forward::encode(query, question, remembered, transport);
            self.counts.passed_on(code);
            return match out.get_mut(..bytes.len()) {
                Some(to) => {
                    to.copy_from_slice(&bytes);
                    Step::Reply(bytes.len())
                }
                None => Step::Nothing,
            };
        }
        let place = if self.upstreams.any() { self.upstreams.admit() } else { None };
        let Some(place) = place else {
            self.counts.answered(Zone::Foreign, Code::ServFail);
            return Step::Reply(answer::failed(query, Code::ServFail, out, transport));
        };
        let (upstreams, counts) = (self.upstreams.clone(), self.counts.clone());
        Step::Wait(Waiting { packet: packet.to_vec(), transport, upstreams, counts, _place: place })
    }
}

impl Waiting {
    /// The answer's bytes.
    pub(super) async fn answer(self) -> Vec<u8> {
        // It was read before.
        let Ok(query) = Query::parse(&self.packet) else { return vec![] };
        let question = forward::question(&query);
        let answer = match &question {
            Some(q) => self.upstreams.ask(q).await,
            None => None,
        };
        let (bytes, code) = forward::encode(&query, question, answer, self.transport);
        self.counts.passed_on(code);
        bytes
    }
}

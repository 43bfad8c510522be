//! What carries datagrams of sessions beside sockets.

use std::{
    cell::RefCell,
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use mesh_telemetry::metrics::UdpDrop;

use crate::options::{FlowError, FlowSender};

/// Datagrams that wait for a trunk's flow: the first flight of a connection.
const WAITING: usize = 8;

/// Things of which the log has just been told: traffic finds them out again and again.
#[derive(Default)]
pub(crate) struct Said(RefCell<HashMap<String, Instant>>);

/// How long nothing is said again, and of how many things that is known.
const QUIET: Duration = Duration::from_secs(60);
const THINGS: usize = 256;

impl Said {
    /// Whether this is worth a line.
    pub(super) fn is_news(&self, what: &str) -> bool {
        let mut all = self.0.borrow_mut();
        if all.get(what).is_some_and(|at| at.elapsed() < QUIET) {
            return false;
        }
        if all.len() >= THINGS {
            all.retain(|_, at| at.elapsed() < QUIET);
        }
        if all.len() < THINGS {
            all.insert(what.to_owned(), Instant::now());
        }
        true
    }
}

/// Sends datagrams of one session, now or never.
pub(super) trait Carrier {
    fn send(&self, data: &[u8]) -> Result<(), UdpDrop>;
}

/// A flow of a trunk.
pub(super) struct Trunked(pub(super) Arc<dyn FlowSender>);

impl Carrier for Trunked {
    fn send(&self, data: &[u8]) -> Result<(), UdpDrop> {
        sent(self.0.send(data))
    }
}

fn sent(r: Result<(), FlowError>) -> Result<(), UdpDrop> {
    r.map_err(|e| match e {
        FlowError::TooLarge => UdpDrop::TooLarge,
        FlowError::Full => UdpDrop::QueueFull,
        FlowError::Ended => UdpDrop::SendError,
    })
}

/// The way through a trunk, which may not be open yet.
#[derive(Default)]
pub(super) struct Way {
    to: RefCell<Option<Arc<dyn FlowSender>>>,
    waiting: RefCell<Vec<Bytes>>,
}

impl Way {
    pub(super) fn send(&self, data: &[u8]) -> Result<(), UdpDrop> {
        if let Some(to) = &*self.to.borrow() {
            return sent(to.send(data));
        }
        let mut waiting = self.waiting.borrow_mut();
        if waiting.len() >= WAITING {
            return Err(UdpDrop::QueueFull);
        }
        waiting.push(Bytes::copy_from_slice(data));
        Ok(())
    }

    /// Sends what waits; answers why something could not be sent.
    pub(super) fn open(&self, to: Arc<dyn FlowSender>) -> Vec<UdpDrop> {
        let waiting = self.waiting.take();
        let failed = waiting.iter().filter_map(|d| sent(to.send(d)).err()).collect();
        *self.to.borrow_mut() = Some(to);
        failed
    }
}

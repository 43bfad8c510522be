//! A controller that can be exchanged: whom a connection leads to, and so which one it should have, is known only when
//! its handshake is over.

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Instant,
};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;

use super::Congestion;

/// Which one a connection should have.
#[derive(Debug, Default)]
pub(crate) struct Chosen {
    cubic: AtomicBool,
}

impl Chosen {
    pub(crate) fn new(c: Congestion) -> Arc<Self> {
        let chosen = Self::default();
        chosen.set(c);
        Arc::new(chosen)
    }

    pub(crate) fn set(&self, c: Congestion) {
        self.cubic.store(c == Congestion::Cubic, Relaxed);
    }

    pub(crate) fn get(&self) -> Congestion {
        if self.cubic.load(Relaxed) { Congestion::Cubic } else { Congestion::Bbr }
    }
}

impl ControllerFactory for Chosen {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        let which = self.get();
        Box::new(Switch { inner: which.factory().build(now, mtu), chosen: self, which, mtu })
    }
}

/// The controller of one path.
struct Switch {
    chosen: Arc<Chosen>,
    which: Congestion,
    inner: Box<dyn Controller>,
    mtu: u16,
}

impl Controller for Switch {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.inner.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.inner.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest: Option<u64>) {
        self.inner.on_end_acks(now, in_flight, app_limited, largest);
        let wanted = self.chosen.get();
        if wanted != self.which {
            (self.inner, self.which) = (wanted.factory().build(now, self.mtu), wanted);
        }
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, persistent: bool, lost: u64) {
        self.inner.on_congestion_event(now, sent, persistent, lost);
    }

    fn on_mtu_update(&mut self, mtu: u16) {
        self.mtu = mtu;
        self.inner.on_mtu_update(mtu);
    }

    fn window(&self) -> u64 {
        self.inner.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        self.inner.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self {
            chosen: self.chosen.clone(),
            which: self.which,
            inner: self.inner.clone_box(),
            mtu: self.mtu,
        })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_controller_changes_when_the_peer_is_known() {
        let chosen = Chosen::new(Congestion::Bbr);
        let now = Instant::now();
        let mut c = chosen.clone().build(now, 1200);
        let bbr = c.window();
        chosen.set(Congestion::Cubic);
        let mut copy = c.clone_box();
        c.on_end_acks(now, 0, true, None);
        let cubic = Congestion::Cubic.factory().build(now, 1200).window();
        assert_ne!(bbr, cubic);
        assert_eq!((c.window(), copy.window()), (cubic, bbr));
        copy.on_end_acks(now, 0, true, None);
        assert_eq!(copy.window(), cubic);
    }
}

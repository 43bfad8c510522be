//! What the path delivers, sampled per acknowledgement (draft-ietf-ccwg-bbr, delivery rate).
//!
//! quinn tells a controller neither the packet numbers of acknowledged packets nor lets it attach state to one, but an
//! acknowledgement carries the instant at which its packet was sent, and all packets of one transmission share it. So
//! the state at sending is kept by instant.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Transmissions remembered: at 1 Gbit/s and ten packets each some six seconds.
const REMEMBERED: usize = 1 << 16;
/// Acknowledgements that come later than this after younger ones do not count.
const LATE: Duration = Duration::from_secs(2);

/// The connection as it was when a transmission left.
#[derive(Debug, Clone, Copy)]
struct Sent {
    at: Instant,
    delivered: u64,
    delivered_at: Instant,
    first: Instant,
    in_flight: u64,
    app_limited: bool,
}

/// What one batch of acknowledgements says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    /// Bytes per second.
    pub(super) rate: f64,
    /// Delivered when the youngest acknowledged packet was sent.
    pub(super) prior_delivered: u64,
    /// Bytes delivered in the sample's interval.
    pub(super) volume: u64,
    /// The application had nothing to send: the path may deliver more.
    pub(super) app_limited: bool,
}

#[derive(Debug, Clone)]
pub(super) struct Sampler {
    sent: VecDeque<Sent>,
    /// Bytes acknowledged so far.
    pub(super) delivered: u64,
    delivered_at: Option<Instant>,
    first: Option<Instant>,
    /// Samples of packets sent before more than this was delivered are limited by the application; 0 if none are.
    limited_until: u64,
    in_flight: u64,
    youngest: Option<Sent>,
}

impl Sampler {
    pub(super) fn new() -> Self {
        Self {
            sent: VecDeque::new(),
            delivered: 0,
            delivered_at: None,
            first: None,
            limited_until: 0,
            in_flight: 0,
            youngest: None,
        }
    }

    pub(super) fn on_sent(&mut self, now: Instant, bytes: u64) {
        if self.in_flight == 0 {
            (self.first, self.delivered_at) = (Some(now), Some(now));
        }
        self.in_flight += bytes;
        if let Some(last) = self.sent.back_mut().filter(|l| l.at == now) {
            last.in_flight = self.in_flight;
            return;
        }
        if self.sent.len() == REMEMBERED {
            self.sent.pop_front();
        }
        self.sent.push_back(Sent {
            at: now,
            delivered: self.delivered,
            delivered_at: self.delivered_at.unwrap_or(now),
            first: self.first.unwrap_or(now),
            in_flight: self.in_flight,
            app_limited: self.limited_until > 0 && self.delivered <= self.limited_until,
        });
    }

    fn find(&self, sent: Instant) -> Option<Sent> {
        self.sent.binary_search_by(|s| s.at.cmp(&sent)).ok().and_then(|i| self.sent.get(i)).copied()
    }

    pub(super) fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64) {
        self.delivered += bytes;
        self.delivered_at = Some(now);
        self.in_flight = self.in_flight.saturating_sub(bytes);
        if let Some(s) = self.find(sent).filter(|s| self.youngest.is_none_or(|y| y.at < s.at)) {
            self.first = Some(s.at);
            self.youngest = Some(s);
        }
    }

    /// Bytes in flight when the lost packet was sent, itself among them.
    pub(super) fn on_loss(&mut self, sent: Instant, bytes: u64) -> Option<u64> {
        self.in_flight = self.in_flight.saturating_sub(bytes);
        self.find(sent).map(|s| s.in_flight)
    }

    /// Ends a batch of acknowledgements.
    pub(super) fn finish(&mut self, now: Instant, in_flight: u64, app_limited: bool) -> Option<Sample> {
        // What is not ack-eliciting was counted as sent and is never acknowledged.
        self.in_flight = in_flight;
        if app_limited {
            self.limited_until = (self.delivered + in_flight).max(1);
        }
        let y = self.youngest.take()?;
        while self.sent.front().is_some_and(|s| in_flight == 0 || y.at.duration_since(s.at) > LATE) {
            self.sent.pop_front();
        }
        // The longer of the two is the bottleneck's: acknowledgements are often compressed, sending is in bursts.
        let interval = (y.at - y.first).max(now - y.delivered_at);
        let volume = self.delivered - y.delivered;
        (!interval.is_zero()).then(|| Sample {
            rate: volume as f64 / interval.as_secs_f64(),
            prior_delivered: y.delivered,
            volume,
            app_limited: y.app_limited,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_flow_is_measured_and_a_compressed_burst_is_not_believed() {
        let t = Instant::now();
        let at = |ms| t + Duration::from_millis(ms);
        let mut s = Sampler::new();
        // 1,000 bytes per millisecond with a round trip of 20 ms.
        for ms in 0..20 {
            s.on_sent(at(ms), 1000);
        }
        let mut last = None;
        for ms in 20..100 {
            s.on_ack(at(ms), at(ms - 20), 1000);
            last = s.finish(at(ms), 19_000, false);
            s.on_sent(at(ms), 1000);
        }
        let rate = last.unwrap().rate;
        assert!((rate / 1e6 - 1.0).abs() < 0.06, "{rate}");
        // Acknowledgements of twenty packets at once.
        for ms in 80..100 {
            s.on_ack(at(120), at(ms), 1000);
        }
        let rate = s.finish(at(120), 0, false).unwrap().rate;
        assert!(rate < 1.1e6, "{rate}");
    }

    #[test]
    fn what_the_application_limits_is_marked() {
        let t = Instant::now();
        let at = |ms| t + Duration::from_millis(ms);
        let mut s = Sampler::new();
        s.on_sent(at(0), 1000);
        s.on_ack(at(20), at(0), 1000);
        assert!(!s.finish(at(20), 0, true).unwrap().app_limited);
        s.on_sent(at(30), 1000);
        s.on_ack(at(50), at(30), 1000);
        assert!(s.finish(at(50), 0, false).unwrap().app_limited);
    }
}

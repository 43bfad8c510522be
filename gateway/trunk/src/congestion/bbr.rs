//! BBR after draft-ietf-ccwg-bbr, within what quinn lets a controller decide.
//!
//! - The model is the greatest delivery rate of the last two probing cycles and the least round trip of some seconds.
//! - quinn derives its pace from the window (5/4 windows per round trip), so the window is the only control. A pacing
//!   rate of the draft becomes the window that gives this rate at the present round trip, and the draft's congestion
//!   window (twice what the path holds) bounds it: a queue of others does not take our share, one of
//!   ours is drained.
//! - Bounds by loss are the draft's, long-term from probing and short-term between probes; but only for loss beyond
//!   what the path loses on its own (see `loss`), for which the window is made larger instead.
//! - A mark of congestion (ECN) counts as loss beyond the path's own.

use std::{
    any::Any,
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::{Duration, Instant},
};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;

use super::{
    loss::OwnLoss,
    rate::{Sample, Sampler},
};

/// Window before anything is known: 32 packets, as quinn's BBR has a far greater one and RFC 9002 ten.
const INITIAL_PACKETS: u64 = 32;
const MIN_PACKETS: u64 = 4;
/// Least round trips older than this are measured again.
const PROBE_RTT_INTERVAL: Duration = Duration::from_secs(5);
const PROBE_RTT_DURATION: Duration = Duration::from_millis(200);
/// A round trip of so many least ones cannot be our own queue, which [`Mode::gains`] bound. If none is shorter for as long,
/// the path is another one by now, and the least round trip is measured at once.
const FOREIGN: u32 = 3;
const FOREIGN_FOR: Duration = Duration::from_millis(500);
/// A round trip within this part of the least one confirms it.
const CONFIRMS: f64 = 17.0 / 16.0;
/// Growth of the bandwidth per round below which the pipe is full, and rounds of it.
const FULL_GROWTH: f64 = 1.25;
const FULL_ROUNDS: u32 = 3;
/// Growth that keeps a probe going.
const PROBE_GROWTH: f64 = 1.1;
/// Factor of a bound after loss, and part left free for others while not probing.
const BETA: f64 = 0.7;
const HEADROOM: f64 = 0.85;
/// A cycle of probing, plus up to a second at random so that flows do not probe together.
const CYCLE: Duration = Duration::from_secs(2);
/// A probe comes after as many rounds at the latest, for a fair share beside loss-based flows on short paths.
const CYCLE_ROUNDS: f64 = 63.0;
const EXTRA_ACKED_ROUNDS: u64 = 5;
/// Part of what was just delivered that is offered to see whether loss goes away, and what passes for it.
const TEST: f64 = 0.75;
const TESTED: f64 = 0.9;
/// A path's own loss is tested again after this long even if it explains what is lost.
const RETEST: Duration = Duration::from_secs(10);

/// Makes [`Bbr`] controllers.
#[derive(Debug, Clone, Default)]
pub struct BbrConfig {
    seed: Option<u64>,
}

impl BbrConfig {
    /// One whose probes come at reproducible times.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self { seed: Some(seed) }
    }
}

impl ControllerFactory for BbrConfig {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        let seed = self.seed.unwrap_or_else(|| RandomState::new().hash_one(0_u8));
        Box::new(Bbr::new(now, mtu, seed))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Startup,
    Drain,
    Down,
    Cruise,
    Refill,
    Up,
    ProbeRtt,
}

impl Mode {
    /// Pacing gain and window gain.
    fn gains(self) -> (f64, f64) {
        match self {
            Self::Startup => (2.77, 2.77),
            Self::Drain => (0.5, 2.0),
            Self::Down => (0.9, 2.0),
            Self::Cruise | Self::Refill => (1.0, 2.0),
            Self::Up => (1.25, 2.25),
            Self::ProbeRtt => (1.0, 0.5),
        }
    }

    /// Loss while probing sets the long-term bound, loss at other times the short-term ones.
    fn probes(self) -> bool {
        matches!(self, Self::Startup | Self::Refill | Self::Up)
    }
}

/// Sums over a round trip.
#[derive(Debug, Clone, Default)]
struct Round {
    acked: u64,
    lost: u64,
    marked: bool,
    /// Greatest delivery rate and volume of a sample.
    bandwidth: f64,
    volume: u64,
    app_limited: bool,
    /// In flight when the first packet was sent that was then lost.
    lost_in_flight: u64,
}

/// The controller of one path.
#[derive(Debug, Clone)]
pub struct Bbr {
    mtu: u64,
    mode: Mode,
    sampler: Sampler,
    own_loss: OwnLoss,
    window: u64,
    // The model: bytes per second, and the round trip.
    bandwidth: [f64; 2],
    min_rtt: Option<Duration>,
    min_rtt_at: Instant,
    /// Since when no round trip was short enough to be of the path that is known.
    foreign_since: Option<Instant>,
    /// When the round trip was last measured for that.
    foreign_probed: Option<Instant>,
    batch_rtt: Option<Duration>,
    smoothed: Duration,
    // Bounds in bytes and bytes per second, infinite if there is none.
    inflight_long: f64,
    inflight_short: f64,
    bandwidth_short: f64,
    // Rounds.
    rounds: u64,
    round: Round,
    round_at: Instant,
    round_end: u64,
    // Startup, and probes.
    full: bool,
    full_bandwidth: f64,
    full_rounds: u32,
    mode_at: Instant,
    mode_rounds: u32,
    cycle_at: Instant,
    cycle_rounds: u32,
    wait: Duration,
    raise: f64,
    random: u64,
    // Whose loss it is: rate delivered before the test, whether loss was unexplained since, whether it was tested.
    reference: f64,
    doubt: bool,
    tested: bool,
    tested_at: Instant,
    // Probing the round trip.
    probe_done: Option<Instant>,
    probe_rtt: Option<Duration>,
    // Acknowledgements beyond what the bandwidth explains.
    extra: [(u64, u64); 2],
    epoch_at: Instant,
    epoch_acked: u64,
    batch_acked: u64,
}

impl Bbr {
    fn new(now: Instant, mtu: u16, seed: u64) -> Self {
        let mtu = u64::from(mtu);
        Self {
            mtu,
            mode: Mode::Startup,
            sampler: Sampler::new(),
            own_loss: OwnLoss::default(),
            window: INITIAL_PACKETS * mtu,
            bandwidth: [0.0; 2],
            min_rtt: None,
            min_rtt_at: now,
            foreign_since: None,
            foreign_probed: None,
            batch_rtt: None,
            smoothed: Duration::ZERO,
            inflight_long: f64::INFINITY,
            inflight_short: f64::INFINITY,
            bandwidth_short: f64::INFINITY,
            rounds: 0,
            round: Round::default(),
            round_at: now,
            round_end: 0,
            full: false,
            full_bandwidth: 0.0,
            full_rounds: 0,
            mode_at: now,
            mode_rounds: 0,
            cycle_at: now,
            cycle_rounds: 0,
            wait: CYCLE,
            raise: 1.0,
            random: seed | 1,
            reference: 0.0,
            doubt: false,
            tested: true,
            tested_at: now,
            probe_done: None,
            probe_rtt: None,
            extra: [(0, 0); 2],
            epoch_at: now,
            epoch_acked: 0,
            batch_acked: 0,
        }
    }

    fn max_bandwidth(&self) -> f64 {
        self.bandwidth[0].max(self.bandwidth[1])
    }

    /// What the path holds without a queue, in bytes sent.
    fn bdp(&self) -> Option<f64> {
        let bandwidth = self.max_bandwidth().min(self.bandwidth_short);
        let min_rtt = self.min_rtt?.as_secs_f64();
        (bandwidth > 0.0).then(|| bandwidth * self.own_loss.scale() * min_rtt)
    }

    fn min_window(&self) -> u64 {
        MIN_PACKETS * self.mtu
    }

    fn enter(&mut self, mode: Mode, now: Instant) {
        (self.mode, self.mode_at, self.mode_rounds) = (mode, now, 0);
        match mode {
            Mode::Down => {
                let old =
                    now.saturating_duration_since(self.tested_at) > RETEST && self.own_loss.rate() > 0.0;
                self.tested = !(self.doubt || old);
                // xorshift64: only the times of probes depend on it.
                self.random ^= self.random << 13;
                self.random ^= self.random >> 7;
                self.random ^= self.random << 17;
                self.wait = CYCLE + Duration::from_millis(self.random % 1000);
                (self.cycle_at, self.cycle_rounds) = (now, 0);
                // Without a new measurement the old one stands: an idle application does not make a path slow.
                if self.bandwidth[1] > 0.0 {
                    self.bandwidth = [self.bandwidth[1], 0.0];
                }
            }
            Mode::Refill => {
                (self.bandwidth_short, self.inflight_short) = (f64::INFINITY, f64::INFINITY);
                (self.full_bandwidth, self.full_rounds) = (0.0, 0);
            }
            Mode::Up => (self.raise, self.full_bandwidth) = (1.0, self.max_bandwidth()),
            Mode::ProbeRtt => (self.probe_done, self.probe_rtt) = (None, None),
            Mode::Startup | Mode::Drain | Mode::Cruise => {}
        }
    }

    fn end_round(&mut self, now: Instant, in_flight: u64) {
        let r = std::mem::take(&mut self.round);
        let took = now.saturating_duration_since(std::mem::replace(&mut self.round_at, now)).as_secs_f64();
        self.rounds += 1;
        (self.mode_rounds, self.cycle_rounds) = (self.mode_rounds + 1, self.cycle_rounds + 1);
        let (packets, lost) = ((r.acked + r.lost) as f64 / self.mtu as f64, r.lost as f64 / self.mtu as f64);
        let excess = r.marked || self.own_loss.excess(packets, lost);
        let bandwidth = self.max_bandwidth();
        let grew = self.mode == Mode::Startup && bandwidth >= self.full_bandwidth * FULL_GROWTH;
        let offered = (r.acked + r.lost) as f64 / took.max(1e-6);
        if grew || (self.mode == Mode::Down && offered <= TESTED * self.reference) {
            self.own_loss.learn(packets, lost);
            self.tested |= self.mode == Mode::Down;
        } else {
            self.own_loss.relax(packets, lost);
        }
        self.doubt |= excess && !grew;
        if self.mode != Mode::Down {
            self.reference = r.bandwidth;
        }
        match self.mode {
            Mode::Startup => self.startup_round(&r, excess, grew),
            Mode::Up => {
                let growing = bandwidth >= self.full_bandwidth * PROBE_GROWTH;
                self.full_bandwidth = bandwidth;
                if excess {
                    self.bound(&r);
                    self.enter(Mode::Down, now);
                } else if self.mode_rounds >= 2 && !growing {
                    self.enter(Mode::Down, now);
                } else if in_flight as f64 >= 0.9 * self.inflight_long {
                    self.inflight_long += self.raise * self.mtu as f64;
                    self.raise *= 2.0;
                }
            }
            Mode::Refill if excess => {
                self.bound(&r);
                self.enter(Mode::Down, now);
            }
            Mode::Refill if self.mode_rounds >= 2 => self.enter(Mode::Up, now),
            _ => {}
        }
        if excess && !self.mode.probes() {
            let from = if self.bandwidth_short.is_finite() { self.bandwidth_short } else { bandwidth };
            self.bandwidth_short = (from * BETA).max(r.bandwidth);
            let from = if self.inflight_short.is_finite() { self.inflight_short } else { self.window as f64 };
            self.inflight_short = (from * BETA).max(r.volume as f64 * self.own_loss.scale());
        }
    }

    fn startup_round(&mut self, r: &Round, excess: bool, grew: bool) {
        if grew {
            (self.full_bandwidth, self.full_rounds) = (self.max_bandwidth(), 0);
        } else if !r.app_limited {
            self.full_rounds += 1;
            // Loss alone is no sign of a full pipe: a lossy one would never be filled.
            if excess {
                self.bound(r);
                self.full = true;
            }
            self.full |= self.full_rounds >= FULL_ROUNDS;
        }
    }

    /// A probe found where loss begins.
    fn bound(&mut self, r: &Round) {
        let floor = BETA * self.bdp().unwrap_or_default();
        self.inflight_long = (r.lost_in_flight as f64).max(floor).min(self.inflight_long.max(floor));
    }

    fn advance(&mut self, now: Instant, in_flight: u64) {
        let Some(bdp) = self.bdp() else { return };
        let drained = in_flight as f64 <= bdp + self.quantum();
        match self.mode {
            Mode::Startup if self.full => self.enter(Mode::Drain, now),
            Mode::Drain if drained || self.mode_rounds > 4 => self.enter(Mode::Down, now),
            Mode::Down if drained && self.mode_rounds > 0 && (self.tested || self.mode_rounds > 4) => {
                if self.tested {
                    (self.doubt, self.tested_at) = (false, now);
                }
                self.enter(Mode::Cruise, now);
            }
            _ => {}
        }
        if matches!(self.mode, Mode::Down | Mode::Cruise) {
            let rounds = (bdp / self.mtu as f64).clamp(8.0, CYCLE_ROUNDS);
            let waited = now.saturating_duration_since(self.cycle_at) >= self.wait;
            if waited || f64::from(self.cycle_rounds) >= rounds {
                self.enter(Mode::Refill, now);
            }
        }
        self.probe_min_rtt(now, in_flight, bdp);
    }

    fn probe_min_rtt(&mut self, now: Instant, in_flight: u64, bdp: f64) {
        if self.mode != Mode::ProbeRtt {
            let older = |t: Instant, than| now.saturating_duration_since(t) > than;
            let foreign = self.full
                && self.foreign_since.is_some_and(|t| older(t, FOREIGN_FOR))
                && self.foreign_probed.is_none_or(|t| older(t, PROBE_RTT_INTERVAL));
            if foreign {
                self.foreign_probed = Some(now);
            }
            if foreign || (self.full && older(self.min_rtt_at, PROBE_RTT_INTERVAL)) {
                self.enter(Mode::ProbeRtt, now);
            }
            return;
        }
        match self.probe_done {
            None if in_flight as f64 <= self.drained(bdp) * 0.5 + self.quantum() || self.mode_rounds > 2 => {
                // What is measured from here on saw a drained queue.
                (self.probe_done, self.probe_rtt) = (Some(now + PROBE_RTT_DURATION), None);
                self.mode_rounds = 0;
            }
            Some(done) if now >= done && self.mode_rounds > 0 => {
                self.min_rtt = self.probe_rtt.or(self.min_rtt);
                (self.min_rtt_at, self.foreign_since) = (now, None);
                self.enter(Mode::Cruise, now);
            }
            _ => {}
        }
    }

    /// What the path holds by what it delivered of late: a queue that built since it became slower drains, too.
    fn drained(&self, bdp: f64) -> f64 {
        let min_rtt = self.min_rtt.unwrap_or_default().as_secs_f64();
        bdp.min(self.reference * self.own_loss.scale() * min_rtt)
    }

    /// Bytes beyond the model that keep sender and receiver busy: an acknowledgement covers two packets.
    fn quantum(&self) -> f64 {
        3.0 * self.mtu as f64
    }

    fn set_window(&mut self, acked: u64) {
        let Some(bdp) = self.bdp() else {
            self.window += acked;
            return;
        };
        let (pace, most) = self.mode.gains();
        let extra = self.extra[0].1.max(self.extra[1].1) as f64;
        let min_rtt = self.min_rtt.unwrap_or_default().as_secs_f64().max(1e-6);
        let stretch = (self.smoothed.as_secs_f64() / min_rtt).max(1.0);
        let bounded = if self.mode == Mode::ProbeRtt {
            self.drained(bdp) * most
        } else {
            (bdp * most).min(bdp * pace * stretch)
        };
        let mut target = if self.mode == Mode::ProbeRtt { bounded } else { bounded + extra + self.quantum() };
        target = target.min(match self.mode {
            Mode::Refill | Mode::Up | Mode::Startup => self.inflight_long,
            _ => self.inflight_long * HEADROOM,
        });
        if self.mode == Mode::Down && !self.tested {
            target = target.min(TEST * self.reference * self.smoothed.as_secs_f64());
        }
        let target = target.min(self.inflight_short) as u64;
        self.window = if self.full {
            target.min(self.window + acked)
        } else if self.window < target {
            self.window + acked
        } else {
            self.window
        };
        self.window = self.window.max(self.min_window());
    }

    /// Aggregation of acknowledgements: a path that delivers in bursts needs a window for the pauses.
    fn aggregate(&mut self, now: Instant) {
        let bandwidth = self.max_bandwidth().min(self.bandwidth_short);
        let elapsed = now.saturating_duration_since(self.epoch_at).as_secs_f64();
        let mut expected = (bandwidth * elapsed) as u64;
        if self.epoch_acked <= expected {
            (self.epoch_at, self.epoch_acked, expected) = (now, 0, 0);
        }
        self.epoch_acked += self.batch_acked;
        let extra = (self.epoch_acked - expected.min(self.epoch_acked)).min(self.window);
        if self.rounds >= self.extra[1].0 + EXTRA_ACKED_ROUNDS {
            self.extra = [self.extra[1], (self.rounds, 0)];
        }
        self.extra[1].1 = self.extra[1].1.max(extra);
    }

    fn measure(&mut self, now: Instant, s: &Sample) {
        if self.min_rtt.is_some_and(|m| s.volume == 0 || m.is_zero()) {
            return;
        }
        self.round.bandwidth = self.round.bandwidth.max(s.rate);
        self.round.volume = self.round.volume.max(s.volume);
        self.round.app_limited |= s.app_limited;
        if !s.app_limited || s.rate >= self.max_bandwidth() {
            self.bandwidth[1] = self.bandwidth[1].max(s.rate);
        }
        let Some(rtt) = self.batch_rtt.take() else { return };
        self.probe_rtt = Some(self.probe_rtt.map_or(rtt, |p| p.min(rtt)));
        let foreign = self.min_rtt.is_some_and(|m| rtt > m.saturating_mul(FOREIGN));
        self.foreign_since = foreign.then(|| self.foreign_since.unwrap_or(now));
        match self.min_rtt {
            Some(m) if rtt >= m => {
                if rtt.as_secs_f64() <= m.as_secs_f64() * CONFIRMS {
                    self.min_rtt_at = now;
                }
            }
            _ => (self.min_rtt, self.min_rtt_at) = (Some(rtt), now),
        }
    }
}

impl Controller for Bbr {
    fn on_sent(&mut self, now: Instant, bytes: u64, _last_packet_number: u64) {
        self.sampler.on_sent(now, bytes);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _app_limited: bool, rtt: &RttEstimator) {
        self.sampler.on_ack(now, sent, bytes);
        self.round.acked += bytes;
        self.batch_acked += bytes;
        self.smoothed = rtt.get();
        let sample = now.saturating_duration_since(sent);
        self.batch_rtt = Some(self.batch_rtt.map_or(sample, |b| b.min(sample)));
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, _largest: Option<u64>) {
        let Some(sample) = self.sampler.finish(now, in_flight, app_limited) else { return };
        self.measure(now, &sample);
        self.aggregate(now);
        if sample.prior_delivered >= self.round_end {
            self.round_end = self.sampler.delivered;
            self.end_round(now, in_flight);
        }
        self.advance(now, in_flight);
        let acked = std::mem::take(&mut self.batch_acked);
        self.set_window(acked);
    }

    fn on_congestion_event(&mut self, _now: Instant, sent: Instant, persistent: bool, lost: u64) {
        let in_flight = self.sampler.on_loss(sent, lost).unwrap_or(self.window);
        self.round.lost += lost;
        self.round.marked |= lost == 0;
        if self.round.lost_in_flight == 0 {
            self.round.lost_in_flight = in_flight;
        }
        if persistent {
            // Nothing came through for several round trips: begin small, the model is where to grow back to.
            self.window = self.min_window();
        }
    }

    fn on_mtu_update(&mut self, mtu: u16) {
        self.mtu = u64::from(mtu);
        self.window = self.window.max(self.min_window());
    }

    fn window(&self) -> u64 {
        self.window
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut m = ControllerMetrics::default();
        m.congestion_window = self.window;
        m.pacing_rate =
            Some((self.max_bandwidth().min(self.bandwidth_short) * self.mode.gains().0 * 8.0) as u64);
        m
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        INITIAL_PACKETS * self.mtu
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

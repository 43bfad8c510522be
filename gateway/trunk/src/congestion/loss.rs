//! Which loss is ours.
//!
//! BBR bounds what is in flight when more than two in a hundred are lost. On a link that loses seven in a hundred of
//! anything, that bound would hold for ever. So loss without an explanation is put to the test: for a round trip
//! clearly less is offered than was just delivered. What is lost then is the path's own, and only what goes beyond it
//! is a sign of too much. A policer does not get by as random loss: below its rate it loses nothing.

/// Loss beyond the path's own that says that too much is in flight (draft-ietf-ccwg-bbr, `LossThresh`).
const THRESHOLD: f64 = 0.02;
/// No path is taken to lose more than this on its own.
const MOST: f64 = 0.2;
/// Packets that are remembered; of more, half is forgotten.
const PACKETS: f64 = 400.0;

/// The path's own loss, from counts in tests.
#[derive(Debug, Clone, Default)]
pub(super) struct OwnLoss {
    packets: f64,
    lost: f64,
}

impl OwnLoss {
    /// Part of all packets that the path loses on its own.
    pub(super) fn rate(&self) -> f64 {
        if self.packets < 1.0 { 0.0 } else { (self.lost / self.packets).min(MOST) }
    }

    /// How much must be sent for one to arrive.
    pub(super) fn scale(&self) -> f64 {
        1.0 / (1.0 - self.rate())
    }

    /// Whether so many of `packets` lost are more than the path's own loss explains, by two deviations.
    pub(super) fn excess(&self, packets: f64, lost: f64) -> bool {
        let own = self.rate();
        lost > packets * (own + THRESHOLD) + 2.0 * (packets * own.max(0.005)).sqrt() + 1.0
    }

    /// Learns from a round whose loss cannot be ours.
    pub(super) fn learn(&mut self, packets: f64, lost: f64) {
        (self.packets, self.lost) = (self.packets + packets, self.lost + lost);
        if self.packets > PACKETS {
            (self.packets, self.lost) = (self.packets / 2.0, self.lost / 2.0);
        }
    }

    /// Learns from any other round, if it lost clearly less.
    pub(super) fn relax(&mut self, packets: f64, lost: f64) {
        let own = packets * self.rate();
        if lost < own - 2.0 * own.sqrt() {
            self.learn(packets, lost);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_paths_own_loss_is_no_sign_of_too_much() {
        let mut own = OwnLoss::default();
        assert!(own.excess(100.0, 7.0) && !own.excess(100.0, 2.0));
        for _ in 0..40 {
            own.learn(100.0, 7.0);
        }
        assert!((own.rate() - 0.07).abs() < 0.005, "{}", own.rate());
        assert!(!own.excess(100.0, 7.0) && own.excess(100.0, 25.0));
        // A path that becomes better is believed, whatever is offered to it.
        for _ in 0..40 {
            own.relax(100.0, 0.0);
        }
        assert!(own.rate() < 0.045, "{}", own.rate());
        for _ in 0..40 {
            own.learn(100.0, 90.0);
        }
        assert!(own.rate() <= MOST);
    }
}

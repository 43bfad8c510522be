//! Which loss is ours.
//!
//! BBR bounds what is in flight when more than two in a hundred are lost. On a link that loses seven in a hundred of
//! anything, that bound would hold for ever. What a path loses even when it is offered clearly less than it was
//! seen to deliver is the path's own, and only what goes beyond it is a sign of too much. A policer does not get by as
//! random loss: below its rate it loses nothing.

/// Loss beyond the path's own that says that too much is in flight (draft-ietf-ccwg-bbr, `LossThresh`).
const THRESHOLD: f64 = 0.02;
/// No path is taken to lose more than this on its own.
const MOST: f64 = 0.2;
/// Less than this part of what the path delivered before cannot have caused a loss.
const BELOW: f64 = 0.95;
/// Packets for a full vote on the path's own loss, divided by the greatest weight of one round.
const PACKETS: f64 = 200.0;
const WEIGHT: f64 = 0.25;

#[derive(Debug, Clone, Default)]
pub(super) struct OwnLoss {
    rate: f64,
}

impl OwnLoss {
    /// Part of all packets that the path loses on its own.
    pub(super) fn rate(&self) -> f64 {
        self.rate
    }

    /// How much must be sent for one to arrive.
    pub(super) fn scale(&self) -> f64 {
        1.0 / (1.0 - self.rate)
    }

    /// Whether so many of `packets` lost are more than the path's own loss explains, by two deviations.
    pub(super) fn excess(&self, packets: f64, lost: f64) -> bool {
        lost > packets * (self.rate + THRESHOLD) + 2.0 * (packets * self.rate.max(0.005)).sqrt() + 1.0
    }

    /// Learns from a round in which `offered` (bytes per second) was sent to a path that delivers `bandwidth`.
    pub(super) fn learn(&mut self, packets: f64, lost: f64, offered: f64, bandwidth: f64, grew: bool) {
        if packets < 1.0 {
            return;
        }
        let below = grew || offered <= BELOW * bandwidth * self.scale();
        let far_less = lost < packets * self.rate - 2.0 * (packets * self.rate).sqrt();
        if below || far_less {
            let weight = (packets / PACKETS).min(WEIGHT);
            self.rate = (self.rate + weight * (lost / packets - self.rate)).clamp(0.0, MOST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_loss_is_learned_and_a_policer_is_not() {
        let mut random = OwnLoss::default();
        assert!(random.excess(100.0, 7.0));
        for _ in 0..40 {
            random.learn(100.0, 7.0, 90.0, 100.0, false);
        }
        assert!((random.rate() - 0.07).abs() < 0.005, "{}", random.rate());
        assert!(!random.excess(100.0, 7.0) && random.excess(100.0, 25.0));
        // A policer loses what is above its rate, nothing below.
        let mut policer = OwnLoss::default();
        for _ in 0..40 {
            policer.learn(125.0, 25.0, 125.0, 100.0, false);
            policer.learn(90.0, 0.0, 90.0, 100.0, false);
        }
        assert!(policer.rate() < 0.001 && policer.excess(125.0, 25.0), "{}", policer.rate());
        // And a path that becomes better is believed.
        for _ in 0..40 {
            random.learn(100.0, 0.0, 100.0, 100.0, false);
        }
        assert!(random.rate() < 0.05, "{}", random.rate());
    }
}

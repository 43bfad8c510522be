//! Congestion control of the trunk.
//!
//! One connection carries every session to a peer's gateway, so one window limits them all. A loss-based window
//! shrinks at every lost packet, whatever the loss means; on a long lossy link it falls below what the
//! sessions offer and they wait in seconds. [`Bbr`] measures instead what the path delivers.

mod bbr;
mod loss;
mod rate;
mod switch;

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

pub use bbr::{Bbr, BbrConfig};
use quinn::{
    AckFrequencyConfig, VarInt,
    congestion::{ControllerFactory, CubicConfig},
};
pub(crate) use switch::Chosen;

/// Packets that the peer may receive without acknowledging at once (draft-ietf-quic-ack-frequency, section 4). Every
/// acknowledgement is a system call and a packet to open on either side; QUIC's own rule is every second packet. With
/// eight, BBR got 86 % out of a policer with a small bucket where it gets 97 % (`tests/congestion`); with 24 it also lost
/// 17 % of its packets there.
const ACK_EVERY: u32 = 4;
/// And how long it may put off the acknowledgement of fewer packets; QUIC's own limit is 25 ms.
const ACK_WITHIN: Duration = Duration::from_millis(5);

/// Which congestion controller a trunk's connections use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Congestion {
    /// Model of the path after draft-ietf-ccwg-bbr.
    #[default]
    Bbr,
    /// CUBIC (RFC 9438), quinn's.
    Cubic,
}

impl Congestion {
    pub(crate) fn factory(self) -> Arc<dyn ControllerFactory + Send + Sync> {
        match self {
            Self::Bbr => Arc::new(BbrConfig::default()),
            Self::Cubic => Arc::new(CubicConfig::default()),
        }
    }
}

/// How often the peer is asked to acknowledge: rarely enough to be cheap, often enough for what is measured from it.
#[must_use]
pub fn acks() -> AckFrequencyConfig {
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(ACK_EVERY)).max_ack_delay(Some(ACK_WITHIN));
    acks
}

impl fmt::Display for Congestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bbr => "bbr",
            Self::Cubic => "cubic",
        })
    }
}

impl FromStr for Congestion {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "bbr" => Ok(Self::Bbr),
            "cubic" => Ok(Self::Cubic),
            _ => Err(format!("unsupported congestion control {s:?}: bbr or cubic")),
        }
    }
}

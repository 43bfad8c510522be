//! Congestion control of the trunk.
//!
//! One connection carries every session to a peer's gateway, so one window limits them all. A loss-based window
//! shrinks at every lost packet, whatever the loss means; on a long lossy link it falls below what the
//! sessions offer and they wait in seconds. [`Bbr`] measures instead what the path delivers.

mod bbr;
mod loss;
mod rate;

use std::{fmt, str::FromStr, sync::Arc};

pub use bbr::{Bbr, BbrConfig};
use quinn::congestion::{ControllerFactory, CubicConfig};

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

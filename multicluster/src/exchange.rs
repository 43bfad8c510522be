//! The registry exchange as state machines without I/O.
//!
//! An [`ExportLog`] is what a cluster tells everybody, a [`Feed`] what one importer has been told of it, an [`Import`]
//! what this cluster believes of one peer, a [`Follower`] when that peer is dialled; a [`Node`] is a member with all
//! of them. Tasks and streams around them only carry frames and the time.
//! Rules:
//! 1. Every change has a version; each change names the version before it, so a lost or reordered
//!    one is noticed at once and repaired by subscribing again from what is held.
//! 2. A lease renews everything a peer exports. Without one for its duration the import lapses: it
//!    is kept, marked, and used last. It is live again with the next lease.
//! 3. A lease carries a digest of the exporter's table; a different one starts over from nothing, but
//!    the old table serves until the new one is complete. Digests are kept up to date, not computed.
//! 4. Nothing that was withdrawn returns, except by a newer announcement.
//! 5. An exporter that does not know yet what it exports says nothing.
//! 6. A record that breaks a rule is refused alone, by name; the others count.

mod audience;
mod conflicts;
mod export;
mod feed;
mod follow;
mod import;
mod node;
mod pace;

pub(crate) use conflicts::conflict_pb;
pub use export::ExportLog;
pub use feed::{Feed, FeedError};
pub use follow::{DialBudget, Follower, Next, SILENCE_MS};
pub use import::{Dirty, Import, Persisted, Step};
pub use node::{Heard, Node, NodeError};

/// Versions of the exchange that this build speaks.
pub const PROTOCOL: (u32, u32) = (1, 2);
/// Version of this software, which peers show to their operators.
pub const SOFTWARE: &str = env!("CARGO_PKG_VERSION");
/// First version with leases between changes.
const PROTOCOL_PARTIAL: u32 = 2;

/// How long a lease holds, milliseconds: two renewals may be missed, and what remains of three
/// seconds is for the push that demotes the peer's endpoints in every proxy.
pub const LEASE_MS: u32 = 2700;
/// How often leases are sent, milliseconds.
pub const LEASE_INTERVAL_MS: u64 = 1000;

/// Changes of the exports within this time after one, milliseconds, are told together.
pub const PACE_MS: u64 = 200;

/// `(namespace, name)`: the same service in every cluster.
pub type ServiceKey = (String, String);

/// FNV-1a of an entry. The digest of a table is the sum over its entries, so that their order does not matter and a
/// change costs one entry.
fn entry_hash((ns, name): &ServiceKey, version: u64) -> u64 {
    let mut h: u64 = 0xcbf2_9ce4_8422_2325;
    for b in ns.bytes().chain([0]).chain(name.bytes()).chain([0]).chain(version.to_le_bytes()) {
        h = (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    h
}

#[cfg(test)]
mod tests;

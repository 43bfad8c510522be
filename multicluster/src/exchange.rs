//! The registry exchange as state machines without I/O.
//!
//! An [`ExportLog`] is what a cluster tells everybody; an [`Import`] is what it believes of one peer.
//! Rules:
//! 1. Every change has a version; each change names the version before it, so a lost or reordered
//!    one is noticed at once and repaired by subscribing again from what is held.
//! 2. A lease renews everything a peer exports. Without one for its duration the import lapses: it
//!    is kept, marked, and used last. It is live again with the next lease.
//! 3. A lease carries a digest of the exporter's table; a different one starts over from nothing, but
//!    the old table serves until the new one is complete.
//! 4. Nothing that was withdrawn returns, except by a newer announcement.

mod export;
mod import;

pub use export::ExportLog;
pub use import::{Import, ImportError, Persisted, Step};

/// How long a lease holds, milliseconds: two renewals may be missed, and what remains of three
/// seconds is for the push that demotes the peer's endpoints in every proxy.
pub const LEASE_MS: u32 = 2700;
/// How often leases are sent, milliseconds.
pub const LEASE_INTERVAL_MS: u64 = 1000;

/// `(namespace, name)`: the same service in every cluster.
pub type ServiceKey = (String, String);

/// Order-independent digest of a table: FNV-1a over each entry, added up.
fn digest<'a>(entries: impl Iterator<Item = (&'a ServiceKey, u64)>) -> u64 {
    entries.fold(0u64, |acc, ((ns, name), version)| {
        let mut h: u64 = 0xcbf2_9ce4_8422_2325;
        for b in ns.bytes().chain([0]).chain(name.bytes()).chain([0]).chain(version.to_le_bytes()) {
            h = (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        acc.wrapping_add(h)
    })
}

#[cfg(test)]
mod tests;

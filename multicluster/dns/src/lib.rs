//! Mesh DNS: the mesh's names answered from a table, everything else forwarded.
//!
//! Zones: `svc.cluster.local`, `svc.clusterset.local` (MCS DNS specification) and `global`. Below
//! them this server is authoritative: a name that the mesh does not have is NXDOMAIN, a name that it
//! has without addresses of the asked family is an empty answer. Short names (`reviews.books`) are
//! answered when the mesh has them and forwarded otherwise, since they may be anybody's. Anything
//! else is forwarded to the resolver behind, and SERVFAIL says that there is none: never NXDOMAIN
//! for a name that is not ours to deny.
//!
//! Not here yet: SRV and PTR records, per-pod names of headless services, negative-cache tuning.

mod names;
mod server;

pub use names::Names;
pub use server::{Server, StartError};

/// Time to live of the mesh's records, seconds: as long as a lease may take to lapse, so that no
/// client remembers a name longer than the mesh vouches for it.
pub const TTL: u32 = 3;

//! Mesh DNS: the mesh's names answered from a table, everything else forwarded.
//!
//! Zones: `svc.cluster.local`, `svc.clusterset.local` (MCS DNS specification) and `global`. Below
//! them this server is authoritative: a name that the mesh does not have is NXDOMAIN, a name that it
//! has without addresses of the asked family is an empty answer. Short names (`reviews.books`) are
//! answered when the mesh has them and forwarded otherwise, since they may be anybody's. Anything
//! else is forwarded to the resolver behind, and SERVFAIL says that there is none: never NXDOMAIN
//! for a name that is not ours to deny.
//!
//! Named ports have SRV records. What is denied is denied with the zone's SOA, whose minimum says for how long that may
//! be remembered (RFC 2308).
//!
//! Not here yet: PTR records, and names of single pods of headless services.

mod names;
mod server;

pub use names::{Host, Names, Port};
pub use server::{Server, StartError};

/// Time to live of the mesh's records, seconds: as long as a lease may take to lapse, so that no
/// client remembers a name longer than the mesh vouches for it.
pub const TTL: u32 = 3;

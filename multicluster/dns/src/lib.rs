//! Mesh DNS: the mesh's names answered from a table, everything else forwarded.
//!
//! Zones: `svc.cluster.local`, `clusterset.local` (MCS DNS specification) and `global`. Below
//! them this server is authoritative: a name that the mesh does not have is NXDOMAIN, a name that it
//! has without addresses of the asked family is an empty answer. Short names (`reviews.books`) are
//! answered for a workload when the mesh has them and forwarded otherwise, since they may be anybody's. Anything
//! else is forwarded to the resolvers behind, and SERVFAIL says that none answers: never NXDOMAIN
//! for a name that is not ours to deny.
//!
//! Named ports have SRV records, addresses of services and of named pods have PTR records. What is denied is denied with
//! the zone's SOA, whose minimum says for how long that may be remembered (RFC 2308).

mod answer;
mod forward;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod metrics;
mod names;
mod server;
mod wire;
mod zone;

pub use metrics::Metrics;
pub use names::{Host, Names, Pod, Port, in_mesh_zone};
pub use server::{ClusterOptions, ClusterServer, Server, StartError};

/// Time to live of the mesh's records, seconds: as long as a lease may take to lapse, so that no
/// client remembers a name longer than the mesh vouches for it.
pub const TTL: u32 = 3;

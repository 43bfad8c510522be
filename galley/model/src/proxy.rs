//! What a proxy executes: listeners, routes, clusters, endpoints, policies.
//!
//! The shape is Envoy's (`envoy.config.*.v3`), reduced to what Flotilla serves and free of
//! protobuf: pilot's generators produce these values, `mesh-xds` encodes them for any xDS client and
//! decodes what any xDS server sends, and the engine compiles them into its lookup tables. A field
//! that is here is honoured by the engine; what the wire can say and this model cannot is rejected
//! by name when it is decoded.

mod body;
mod cluster;
mod endpoint;
mod filter;
mod health;
mod jwt;
mod listener;
mod on_demand;
mod pattern;
mod policy;
mod processor;
mod rate_limit;
mod route;
mod telemetry;
mod udp;

pub use body::*;
pub use cluster::*;
pub use endpoint::*;
pub use filter::*;
pub use health::*;
pub use jwt::*;
pub use listener::*;
pub use on_demand::*;
pub use pattern::*;
pub use policy::*;
pub use processor::*;
pub use rate_limit::*;
pub use route::*;
pub use telemetry::*;
pub use udp::*;

/// Alerts by which a proxy that passes TLS on by server name says why it does not (RFC 8446, section 6.2).
pub mod alert {
    /// `unrecognized_name` (RFC 6066, section 3): nothing of this name is served here.
    pub const UNKNOWN_NAME: u8 = 112;
    /// The service is known, and none of its workloads can be reached. Not assigned by IANA: others take it for a
    /// failure as any.
    pub const NO_BACKEND: u8 = 241;
    /// The cluster in the name cannot be reached from here. Not assigned either.
    pub const NO_WAY: u8 = 242;
}

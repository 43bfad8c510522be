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
mod policy;
mod processor;
mod rate_limit;
mod route;
mod udp;

pub use body::*;
pub use cluster::*;
pub use endpoint::*;
pub use filter::*;
pub use health::*;
pub use jwt::*;
pub use listener::*;
pub use policy::*;
pub use processor::*;
pub use rate_limit::*;
pub use route::*;
pub use udp::*;

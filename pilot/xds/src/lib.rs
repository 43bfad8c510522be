//! xDS for every part of the mesh: wire types, the ADS server and client, configuration over MCP,
//! and the translation between Envoy's protobuf and [`mesh_model::proxy`].
//!
//! - [`server`]: a generic ADS server. Its protocol state ([`server::state`]) does no I/O.
//! - [`client`]: a generic ADS client that survives its server, and [`client::proxy`], which keeps
//!   what a proxy executes complete and consistent.
//! - [`mcp`]: configuration documents between components, on the same server and client.
//! - [`beside`]: calls of our own: [`links`], what gateways tell of the ways to other clusters; [`trust`], whom proxies
//!   trust; [`registration`], workloads that register themselves.
//! - [`bootstrap`]: Envoy's bootstrap file.
//! - [`codec`]: `mesh_model::proxy` to Envoy v3 protobuf and back.
//! - [`patch`]: what `EnvoyFilter` documents change of that.
//!
//! Protobuf stops here: nothing above this crate sees a wire type, except the opaque [`pb::Any`].

pub mod beside;
pub mod bootstrap;
pub mod bundles;
pub mod client;
pub mod codec;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod links;
pub mod mcp;
pub mod nds;
pub mod node;
pub mod patch;
pub mod pb;
pub mod process;
pub mod registration;
pub mod server;
pub mod trust;
pub mod type_url;
pub mod until;

pub use client::{AdsClient, ClientOptions, Endpoint};
pub use node::{NodeInfo, NodeKind};
pub use server::{AdsService, PeerInfo, ResourceSource, TypeSnapshot};

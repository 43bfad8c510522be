//! The data-plane engine of sidecars and gateways.
//!
//! It executes [`mesh_model::proxy`] resources and knows neither xDS nor protobuf. Each worker is a thread with
//! a current-thread runtime, its own listening sockets (`SO_REUSEPORT`) and its own connection pools, so a
//! request crosses no thread and takes no lock. [`Engine::apply`] compiles a [`ConfigSnapshot`] off the hot path
//! and publishes it by swapping pointers; connections in flight keep the filter chain that they began with and
//! look routes, clusters and hosts up in what is current.
//!
//! Deliberately absent: discovery, certificates' issuance, and any protocol to a control plane.

mod config;
mod engine;
mod export;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod http;
mod io;
mod listener;
mod matcher;
mod on_demand;
mod options;
mod rbac;
mod refusal;
pub mod simulate;
mod tcp;
mod tunnel;
mod udp;
mod upstream;
mod wire;
mod worker;

pub use config::{ApplyReport, ConfigSnapshot};
pub use engine::{ClusterStatus, Engine, EngineError, EngineStatus, HostStatus, ListenerStatus};
pub use options::{
    BoxedIo, ByteStream, DatagramFlow, Dialer, EngineOptions, FlowError, FlowSender, HeaderLookup,
    HookFuture, Hooks, NodeInfo, OnDemand, PolicyDecision, PolicyHook, RequestAttributes, RequestRecord,
    Settled, Wanted,
};
pub use worker::delivery::Deliveries;

//! Pilot: services and configuration in, configuration of every proxy out.
//!
//! Inputs are documents of galley (services, workloads, routing, policy) and of the federation
//! component (what peers export), and the services of [`consul`]. From them pilot builds one [`world::World`] per change, and from a
//! world and a proxy's node the [`generate`] functions, which are pure, make listeners, routes,
//! clusters and endpoints. [`source`] serves them over ADS; [`exports`] are published for the
//! federation component.
//!
//! What is deliberately absent: pods of other clusters. Remote services are weights behind gateways.

mod attachment;
pub mod config;
pub mod conflicts;
pub mod consul;
pub mod debug;
mod draining;
pub mod envoy_filter;
pub mod exports;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod gateway_api;
pub mod generate;
pub mod hosts;
pub mod index;
pub mod ingress;
mod issuers;
mod kubernetes;
pub mod links;
mod metrics;
mod providers;
pub mod proxy;
mod run;
pub mod simulate;
mod slots;
pub mod source;
pub mod trust;
pub mod v1alpha1;
pub mod workloads;
pub mod world;

pub use run::{Pilot, PilotHandle, PilotOptions};
pub use world::Settings;

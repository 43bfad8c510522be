//! Mixer: policy and telemetry over attributes.
//!
//! Proxies ask whether a request may pass (Check) and tell what happened (Report). Rules select by
//! expressions over attributes which handlers get which instances; handlers are adapters: denier,
//! list, memquota, stdio, prometheus. Everything else that Mixer ever had answers "unsupported" when
//! it is configured, by name, and the rest applies.
//!
//! Invariants:
//! - An expression that does not type-check never meets a request.
//! - An answer names every attribute that it depends on, so that a client may keep it; one that
//!   cannot say so is not kept.
//! - Memory is bounded whatever requests say: counters, series, answers and queues have limits.

mod adapters;
mod config;
mod dispatch;
mod expr;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod mixer;
mod server;

pub use self::{
    config::ConfigError,
    mixer::{Mixer, MixerHandle, MixerOptions, MixerService, Status},
    server::MixerApi,
};

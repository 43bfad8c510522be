//! What proxies and control planes say about themselves: metric families, access logs, traces.
//!
//! Nothing here is global: `main` owns the registry and hands it down, logs are written by threads that their
//! owner can stop, and no call on a request's path blocks or takes a lock that another worker holds for long.

pub mod access_log;
pub mod attributes;
pub mod check;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod metrics;
pub mod proto;
pub mod report;
pub mod trace;

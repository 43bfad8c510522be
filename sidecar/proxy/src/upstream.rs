//! Upstream clusters: hosts, balancing, health, connections.

pub(crate) mod cluster;
pub(crate) mod connect;
pub(crate) mod dns;
pub(crate) mod health;
pub(crate) mod host;
mod keepalive;
pub(crate) mod lb;
pub(crate) mod load;
pub(crate) mod names;
mod outlier;
pub(crate) mod pool;
mod recent;
mod schedule;
pub(crate) mod silence;

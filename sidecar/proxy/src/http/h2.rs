//! HTTP/2 on the `h2` crate.

pub(crate) mod client;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub(crate) mod send;
pub(crate) mod server;

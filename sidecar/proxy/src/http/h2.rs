//! HTTP/2 on the `h2` crate.

pub(crate) mod client;
pub(crate) mod send;
pub(crate) mod server;

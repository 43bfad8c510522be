//! Sockets, and what is learned from a connection before a filter chain takes it.

pub(crate) mod accept;
pub(crate) mod bind;
pub(crate) mod inspect;
pub(crate) mod proxy_protocol;
pub(crate) mod quic;

//! HTTP: codecs, and what happens to a request between them.

pub(crate) mod client;
pub(crate) mod downstream;
pub(crate) mod edge;
pub(crate) mod exchange;
pub(crate) mod filtered;
pub(crate) mod filters;
pub(crate) mod h1;
pub(crate) mod h2;
pub(crate) mod h3;
pub(crate) mod headers;
mod hedge;
pub(crate) mod local_reply;
pub(crate) mod message;
pub(crate) mod metadata;
mod mux;
pub(crate) mod path;
pub(crate) mod record;
pub(crate) mod router;
pub(crate) mod service;

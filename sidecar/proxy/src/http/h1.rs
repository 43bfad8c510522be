//! HTTP/1.x on `httparse`, strict about everything that two parsers could read differently.

pub(crate) mod body;
pub(crate) mod client;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(any(test, fuzzing))]
mod oracle;
pub(crate) mod parse;
pub(crate) mod server;

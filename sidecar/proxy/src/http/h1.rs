//! HTTP/1.x on `httparse`, strict about everything that two parsers could read differently.

pub(crate) mod body;
pub(crate) mod client;
#[cfg(test)]
mod oracle;
pub(crate) mod parse;
pub(crate) mod server;

//! The engine over real sockets.

mod http1;
mod support;
mod tcp;
mod tls;

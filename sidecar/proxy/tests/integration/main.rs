//! The engine over real sockets.

mod config;
mod http1;
mod http2;
mod jwt;
mod resilience;
mod routing;
mod support;
mod tcp;
mod tls;
mod tunnel;

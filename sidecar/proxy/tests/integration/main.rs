//! The engine over real sockets.

mod config;
mod ext_authz;
mod http1;
mod http2;
mod jwt;
mod rate_limit;
mod resilience;
mod routing;
mod support;
mod tcp;
mod tls;
mod tunnel;

//! The engine over real sockets.

mod balance;
mod bodies;
mod config;
mod drain;
mod ext_authz;
mod floods;
mod h2spec;
mod health;
mod http1;
mod http2;
mod http3;
mod jwt;
mod overload;
mod rate_limit;
mod refusals;
mod resilience;
mod routing;
mod silence;
mod slots;
mod splice;
mod support;
mod tcp;
mod tls;
mod tunnel;
mod udp;
mod udp_secure;

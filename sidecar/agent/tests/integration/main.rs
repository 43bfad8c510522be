//! The engine beside a real Envoy, by the same configuration.

mod added;
mod collected;
mod edge;
mod filters;
mod names;
mod on_routes;
mod policies;
mod processor;
mod side_by_side;
mod udp;
mod unix;

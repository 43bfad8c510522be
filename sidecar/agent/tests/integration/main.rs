//! The engine beside a real Envoy, by the same configuration; and a whole agent under a control plane.

mod added;
mod collected;
mod edge;
mod filters;
mod names;
mod on_routes;
mod policies;
mod process;
mod processor;
mod side_by_side;
mod udp;
mod unix;

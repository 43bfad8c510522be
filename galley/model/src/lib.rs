//! Plain data shared by every part of Flotilla.
//!
//! Three families live here, and nothing else: what users author ([`authored`]), what the control
//! planes know about services and peers ([`registry`], [`federation`]), and what a proxy executes
//! ([`proxy`]). No async, no I/O, no protobuf: parsers, wire codecs and engines are adapters in
//! other crates, so that each of them can be tested against values written by hand. [`flow`] is the one exception: what
//! engine and trunk both put in front of datagrams.

pub mod authored;
pub mod explain;
pub mod federation;
pub mod flow;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod id;
pub mod proxy;
mod rare;
pub mod registry;

pub use id::{ClusterId, IdError, Locality, NetworkId, SpiffeId, TrustDomain};
pub use rare::{Nothing, Rare};

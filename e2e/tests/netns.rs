//! Two clusters as network namespaces: real interception, real isolation, a link that breaks.
//!
//! Needs root, iproute2, iptables, ethtool, util-linux, curl, dnsmasq and dig, and a `flotilla` to test (see
//! [`flotilla_e2e::programs::flotilla`]): `cargo test -p flotilla-e2e --test netns -- --ignored
//! --test-threads=1 --nocapture`.

#[path = "support/certs.rs"]
mod certs;

#[path = "netns/borders.rs"]
mod borders;
#[path = "netns/capture.rs"]
mod capture;
#[path = "netns/choice.rs"]
mod choice;
#[path = "netns/cuts.rs"]
mod cuts;
#[path = "netns/edges.rs"]
mod edges;
#[path = "netns/failure.rs"]
mod failure;
#[path = "netns/machine.rs"]
mod machine;
#[path = "netns/matrix.rs"]
mod matrix;
#[path = "netns/nat.rs"]
mod nat;
#[path = "netns/policy.rs"]
mod policy;
#[path = "netns/repeated.rs"]
mod repeated;
#[path = "netns/rolling.rs"]
mod rolling;
#[path = "netns/security.rs"]
mod security;
#[path = "netns/security_1_0.rs"]
mod security_1_0;
#[path = "netns/sidecars.rs"]
mod sidecars;
#[path = "netns/soak.rs"]
mod soak;
#[path = "netns/software.rs"]
mod software;
#[path = "netns/spread.rs"]
mod spread;
#[path = "netns/support.rs"]
mod support;
#[path = "netns/tasks.rs"]
mod tasks;
#[path = "netns/trunk.rs"]
mod trunk;
#[path = "netns/trunk_load.rs"]
mod trunk_load;
#[path = "netns/udp.rs"]
mod udp;
#[path = "netns/udp_wan.rs"]
mod udp_wan;

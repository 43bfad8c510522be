//! What makes an engine a member of the mesh.
//!
//! An [`Agent`] proves its workload to the cluster's CA and keeps its certificate fresh, follows the
//! control plane, applies what it says to the engine, and serves the admin pages. Sidecar and
//! gateway differ in what they add to it, not in this.
//!
//! Invariants: the private key is made here and leaves the process only for a file of mode 0600; a
//! control plane that does not answer changes nothing about traffic; the engine never waits for
//! anything in this crate.

mod admin;
mod agent;
mod args;
mod limits;
mod mixer;
mod on_demand;
mod process;
mod restart;
mod standalone;
mod svid;
mod trust;

pub use agent::{Agent, AgentOptions, CONTROL_PLANE_NAME, control_plane, control_plane_id, mesh_root};
pub use args::ProxyArgs;
pub use limits::LimitArgs;
pub use mixer::{MixerArgs, MixerHook};
pub use process::Process;
pub use restart::{Restart, RestartArgs};
pub use standalone::{Standalone, StandaloneOptions};
pub use svid::{Renewal, SvidError, SvidOptions, SvidPem};
pub use trust::Roots;

pub(crate) mod pb {
    #![allow(missing_docs, unreachable_pub, clippy::all)]
    tonic::include_proto!("istio.v1.auth");
}

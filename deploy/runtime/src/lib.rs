//! What every deployed process shares: well-known ports, readiness, shutdown, hot restart, private files and memory, privileges,
//! admin pages and exit codes.

pub mod admin;
pub mod files;
pub mod handover;
mod harden;
pub mod ports;
mod privileges;
pub mod ready;
pub mod shutdown;

pub use privileges::{Right, RunAs, RunAsError};

/// What a role does first: goes on as another user, if it is asked to, keeping the rights in `keep`, and keeps its secrets
/// to itself.
///
/// # Errors
/// [`RunAsError`].
pub fn confine(run_as: Option<RunAs>, keep: &[Right]) -> Result<(), RunAsError> {
    if privileges::run_as(run_as, keep)? {
        eprintln!("note: running as root; --run-as UID gives that up");
    }
    harden::harden();
    Ok(())
}

/// Exit codes of every binary, the same everywhere so that scripts can rely on them.
pub mod exit {
    /// Done.
    pub const OK: u8 = 0;
    /// The answer is no: invalid configuration, a check that failed, a refused request.
    pub const FAILED: u8 = 1;
    /// The question could not be asked: unreadable file, unreachable control plane, bad flags.
    pub const UNUSABLE: u8 = 2;
}

/// Starts logging to stderr: `RUST_LOG` decides, `info` otherwise.
pub fn init_logging() {
    use tracing_subscriber::{EnvFilter, fmt};
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // A second call, as in tests that start several roles, keeps the first subscriber.
    let _ = fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(true).try_init();
}

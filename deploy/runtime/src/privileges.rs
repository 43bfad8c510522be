//! From root to a user without rights, before anything is done.

use std::{fmt, io, os::unix::process::CommandExt as _, process::Command, str::FromStr};

use rustix::{
    process::{getgid, getuid},
    thread::{
        CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities,
        configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
        set_capabilities_secure_bits, set_no_new_privs,
    },
};

/// A right of root's that a role needs for what it binds (`capabilities(7)`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// Ports below 1024.
    LowPorts,
    /// Listening on addresses of others, and speaking with them: interception by TPROXY.
    Transparent,
}

impl Right {
    fn capability(self) -> CapabilitySet {
        match self {
            Self::LowPorts => CapabilitySet::NET_BIND_SERVICE,
            // NET_RAW is less, and enough from Linux 5.17 on.
            Self::Transparent => CapabilitySet::NET_ADMIN,
        }
    }
}

/// A user and a group, by number: `UID`, or `UID:GID`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunAs {
    uid: u32,
    gid: u32,
}

impl fmt::Display for RunAs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.uid, self.gid)
    }
}

impl FromStr for RunAs {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (uid, gid) = s.split_once(':').unwrap_or((s, s));
        let number = |what: &str, n: &str| {
            let n: u32 = n.parse().map_err(|_| format!("{what} {n:?} is no number: write UID or UID:GID"))?;
            // The last one means "as it is" to the kernel.
            if n == u32::MAX { Err(format!("{what} {n} is none")) } else { Ok(n) }
        };
        let run_as = Self { uid: number("user", uid)?, gid: number("group", gid)? };
        if run_as.uid == 0 {
            return Err("user 0 is root: name another one, such as 1337".into());
        }
        Ok(run_as)
    }
}

/// Why a process cannot run as it should.
#[derive(Debug, thiserror::Error)]
pub enum RunAsError {
    /// Only root may become somebody else.
    #[error("--run-as {wanted}: this process runs as {uid}:{gid}, and only root can change that")]
    NotRoot {
        /// What was asked for.
        wanted: RunAs,
        /// What it is.
        uid: u32,
        /// Its group.
        gid: u32,
    },
    /// The kernel refuses.
    #[error("--run-as {0}: {1}")]
    Refused(RunAs, &'static str, #[source] io::Error),
}

/// Goes on as another user, for good: with no right of root's but `keep`, and no way to get one back. The program is started
/// again in place, under the same process ID, since only so do all its threads change; so call this first of all.
///
/// Answers whether it runs as root, if nothing was asked for.
///
/// # Errors
/// [`RunAsError`]; nothing goes on with more rights than it should.
pub(crate) fn run_as(wanted: Option<RunAs>, keep: &[Right]) -> Result<bool, RunAsError> {
    let (uid, gid) = (getuid().as_raw(), getgid().as_raw());
    let Some(wanted) = wanted else { return Ok(uid == 0) };
    if (uid, gid) == (wanted.uid, wanted.gid) {
        return Ok(false);
    }
    if uid != 0 {
        return Err(RunAsError::NotRoot { wanted, uid, gid });
    }
    let refused = |what| move |e: rustix::io::Errno| RunAsError::Refused(wanted, what, e.into());
    let (missing, error) = become_other(wanted, keep).map_err(refused("cannot give up root's rights"))?;
    Err(RunAsError::Refused(wanted, missing, error))
}

/// Returns only if the program could not be started again.
fn become_other(wanted: RunAs, keep: &[Right]) -> rustix::io::Result<(&'static str, io::Error)> {
    let keep = keep.iter().fold(CapabilitySet::empty(), |all, r| all | r.capability());
    let mine = capabilities(None)?;
    // A container may have fewer than root has; what is not there cannot be kept, and its use says so.
    let keep = keep & mine.permitted;
    for c in CapabilitySet::all() {
        if !keep.contains(c) && rustix::thread::capability_is_in_bounding_set(c).unwrap_or(false) {
            remove_capability_from_bounding_set(c)?;
        }
    }
    set_capabilities(None, CapabilitySets { inheritable: keep, ..mine })?;
    // Without it the kernel clears all of them with the change of the user.
    set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP)?;
    for c in keep {
        configure_capability_in_ambient_set(c, true)?;
    }
    set_no_new_privs(true)?;
    let program = match std::env::current_exe() {
        Ok(p) => p,
        Err(e) => return Ok(("the program's file is not known", e)),
    };
    let mut args = std::env::args_os();
    let mut again = Command::new(program);
    if let Some(name) = args.next() {
        again.arg0(name);
    }
    // This also leaves all other groups.
    Ok(("the program cannot be started again", again.args(args).uid(wanted.uid).gid(wanted.gid).exec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_numbers_and_not_root() {
        let parse = |s: &str| s.parse::<RunAs>().map(|r| r.to_string());
        assert_eq!(parse("1337"), Ok("1337:1337".into()));
        assert_eq!(parse("1337:0"), Ok("1337:0".into()));
        for (bad, says) in [
            ("", "no number"),
            ("nobody", "no number"),
            ("1:", "no number"),
            ("-1", "no number"),
            ("0", "root"),
            ("0:5", "root"),
            ("4294967295", "is none"),
        ] {
            let e = parse(bad).unwrap_err();
            assert!(e.contains(says), "{bad}: {e}");
        }
    }
}

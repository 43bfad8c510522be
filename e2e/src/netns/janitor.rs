//! Cleaning up, whatever happens to the test.

use std::{
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::Context;

/// Waits for the end of its input, then removes everything whose name starts with `$1`.
const SCRIPT: &str = r#"
cat >/dev/null
names=$(ip netns list | cut -d' ' -f1 | grep "^$1-")
for n in $names; do for p in $(ip netns pids "$n"); do kill -9 "$p" 2>/dev/null; done; done
for n in $names; do ip netns del "$n"; rm -rf "/etc/netns/$n"; done
[ -n "$FLOTILLA_KEEP" ] || rm -rf "$2"
"#;

/// A process that cleans up when this one drops it or ends.
pub(super) struct Janitor {
    child: Child,
}

impl Janitor {
    pub(super) fn start(prefix: &str, dir: &Path) -> anyhow::Result<Self> {
        let child = Command::new("sh")
            .args(["-c", SCRIPT, "janitor", prefix])
            .arg(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Ctrl-C is for the test; the janitor's work begins after it.
            .process_group(0)
            .spawn()
            .context("sh")?;
        Ok(Self { child })
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Removes what a run left behind that ended without its janitor (after a power cut of it).
pub(super) fn sweep() {
    let Ok(list) = crate::programs::must("ip netns list") else { return };
    for name in list.lines().filter_map(|l| l.split_whitespace().next()) {
        let pid = name.strip_prefix("flt").and_then(|n| n.split('w').next());
        let dead = pid.is_some_and(|p| p.parse::<u32>().is_ok() && !Path::new("/proc").join(p).exists());
        if dead {
            let prefix = name.split('-').next().unwrap_or(name);
            // Its input ends at once.
            if let Ok(j) = Janitor::start(prefix, &std::env::temp_dir().join(prefix)) {
                drop(j);
            }
        }
    }
}

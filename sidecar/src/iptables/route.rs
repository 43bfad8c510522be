//! Routing that goes with the rules: marked packets to the loopback interface, and the address of passed connections.

use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use super::plan::{Family, INBOUND_MARK, OUTBOUND_MARK, PASSED_V6, ROUTE_TABLE};

fn commands(family: Family, tproxy: bool) -> Vec<Vec<String>> {
    let words = |s: String| s.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let mut out = Vec::new();
    if tproxy {
        let (flag, all) = match family {
            Family::V4 => ("-4", "0.0.0.0/0"),
            Family::V6 => ("-6", "::/0"),
        };
        for mark in [INBOUND_MARK, OUTBOUND_MARK] {
            out.push(words(format!("{flag} rule add fwmark {mark} lookup {ROUTE_TABLE}")));
        }
        out.push(words(format!("{flag} route add local {all} dev lo table {ROUTE_TABLE}")));
    }
    if family == Family::V6 {
        out.push(words(format!("-6 addr add {PASSED_V6} dev lo")));
    }
    out
}

/// The commands, for a dry run.
pub(super) fn describe(family: Family, tproxy: bool) -> String {
    commands(family, tproxy).iter().map(|c| format!("ip {}\n", c.join(" "))).collect()
}

pub(super) fn install(family: Family, tproxy: bool) -> anyhow::Result<()> {
    for c in commands(family, tproxy) {
        let out =
            Command::new("ip").args(&c).output().context("ip cannot be run; install the package iproute2")?;
        if !out.status.success() {
            bail!("ip {}: {}", c.join(" "), String::from_utf8_lossy(&out.stderr).trim());
        }
    }
    Ok(())
}

/// Undoes both forms; what is not there is no error.
pub(super) fn clean(family: Family) {
    for mut c in commands(family, true) {
        if let Some(verb) = c.iter_mut().find(|w| *w == "add") {
            "del".clone_into(verb);
        }
        let run = || Command::new("ip").args(&c).stdout(Stdio::null()).stderr(Stdio::null()).status();
        // An installation may have been interrupted and repeated.
        while run().is_ok_and(|s| s.success()) {}
    }
}

//! The rules in the words of iptables-restore, a table at a time.

use std::{
    fmt::Write as _,
    io::Write as _,
    process::{Command, Stdio},
};

use anyhow::{Context, bail};

use super::plan::{
    Action, CAPTURE, Chain, DNS, Family, Hook, INBOUND, Match, OUTPUT, Table, UDP, UDP_INBOUND, applies,
};

/// Chains of other versions, which removal takes along.
const FORMER: [&str; 2] = ["FLOTILLA_IN_REDIRECT", "FLOTILLA_REDIRECT"];

pub(super) fn tool(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    }
}

fn table(t: Table) -> &'static str {
    match t {
        Table::Nat => "nat",
        Table::Mangle => "mangle",
    }
}

fn hook(h: Hook) -> &'static str {
    match h {
        Hook::Prerouting => "PREROUTING",
        Hook::Output => "OUTPUT",
    }
}

fn matches(list: &[Match]) -> String {
    let mut out = String::new();
    for m in list {
        // Writing to a string cannot fail.
        let _ = match m {
            Match::Tcp => write!(out, " -p tcp"),
            Match::Udp => write!(out, " -p udp"),
            Match::Syn => write!(out, " -p tcp --syn"),
            Match::NotSyn => write!(out, " -p tcp ! --syn"),
            Match::Original(m) => write!(out, " -m connmark --mark {m} -m conntrack --ctdir ORIGINAL"),
            Match::Port(p) => write!(out, " --dport {p}"),
            Match::To(n) => write!(out, " -d {n}"),
            Match::NotTo(n) => write!(out, " ! -d {n}"),
            Match::From(n) => write!(out, " -s {n}"),
            Match::Uid(u) => write!(out, " -m owner --uid-owner {u}"),
            Match::Gid(g) => write!(out, " -m owner --gid-owner {g}"),
            Match::ToLoopback => write!(out, " -o lo"),
            Match::FromLoopback => write!(out, " -i lo"),
            Match::Mark(m) => write!(out, " -m mark --mark {m}"),
        };
    }
    // `--syn` has said it already.
    out.replacen(" -p tcp --syn -p tcp", " -p tcp --syn", 1)
}

fn action(a: Action) -> String {
    match a {
        Action::Return => "RETURN".to_owned(),
        Action::Jump(chain) => chain.to_owned(),
        Action::Redirect(p) => format!("REDIRECT --to-ports {p}"),
        Action::Tproxy(p, mark) => format!("TPROXY --on-port {p} --tproxy-mark {mark}"),
        Action::Mark(m) | Action::MarkConnection(m) => format!("MARK --set-mark {m}"),
    }
}

/// Input of iptables-restore, which replaces a table as a whole or not at all.
pub(super) fn restore(chains: &[Chain], family: Family) -> String {
    let mut out = String::new();
    for t in [Table::Nat, Table::Mangle] {
        let here = || chains.iter().filter(|c| c.table == t);
        if here().next().is_none() {
            continue;
        }
        let _ = writeln!(out, "*{}", table(t));
        let mut named: Vec<&str> = here().map(|c| c.name).collect();
        named.dedup();
        for name in named {
            let _ = writeln!(out, ":{name} - [0:0]");
        }
        for c in here() {
            if let Some((h, m)) = &c.hook {
                let _ = writeln!(out, "-A {}{} -j {}", hook(*h), matches(m), c.name);
            }
        }
        for c in here() {
            for r in c.rules.iter().filter(|r| applies(r, family)) {
                let when = matches(&r.matches);
                if let Action::MarkConnection(m) = r.action {
                    let _ = writeln!(out, "-A {}{when} -j CONNMARK --set-mark {m}", c.name);
                }
                let _ = writeln!(out, "-A {}{when} -j {}", c.name, action(r.action));
            }
        }
        out.push_str("COMMIT\n");
    }
    out
}

/// Whether iptables can be run.
pub(super) fn is_there() -> bool {
    let mut c = Command::new("iptables-restore");
    c.arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
}

pub(super) fn install(family: Family, text: &str) -> anyhow::Result<()> {
    let tool = format!("{}-restore", tool(family));
    let mut child = Command::new(&tool)
        .args(["--noflush", "-w", "5"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{tool} cannot be run; install the package iptables"))?;
    child.stdin.take().context("no standard input")?.write_all(text.as_bytes())?;
    let out = child.wait_with_output()?;
    if !out.status.success() {
        bail!("{tool}: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}

/// Removes every rule of ours; what is not there is no error.
pub(super) fn clean(family: Family) {
    for t in [Table::Nat, Table::Mangle] {
        let run = |args: &[&str]| {
            Command::new(tool(family))
                .args(["-w", "5", "-t", table(t)])
                .args(args)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|s| s.success())
        };
        // An installation may have been interrupted and repeated: delete as long as there is one.
        while run(&["-D", "PREROUTING", "-p", "tcp", "-j", INBOUND]) {}
        while run(&["-D", "OUTPUT", "-p", "tcp", "-j", OUTPUT]) {}
        while run(&["-D", "PREROUTING", "-p", "udp", "-j", UDP_INBOUND]) {}
        while run(&["-D", "OUTPUT", "-p", "udp", "-j", UDP]) {}
        for protocol in ["udp", "tcp"] {
            while run(&["-D", "OUTPUT", "-p", protocol, "--dport", "53", "-j", DNS]) {}
        }
        let all = [INBOUND, OUTPUT, CAPTURE, DNS, UDP, UDP_INBOUND];
        for flag in ["-F", "-X"] {
            for c in all.iter().chain(&FORMER) {
                run(&[flag, c]);
            }
        }
    }
}

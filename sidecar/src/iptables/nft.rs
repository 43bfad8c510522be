//! The rules in the words of nft: one table of ours for both families, made and removed as a whole.

use std::{
    fmt::Write as _,
    io::Write as _,
    process::{Command, Stdio},
};

use anyhow::{Context, bail};
use ipnet::IpNet;

use super::plan::{Action, Chain, Hook, Match, Table};

/// Name of the table.
const TABLE: &str = "inet flotilla";

fn address(side: &str, n: &IpNet, not: bool) -> String {
    let family = if matches!(n, IpNet::V4(_)) { "ip" } else { "ip6" };
    format!(" {family} {side} {}{n}", if not { "!= " } else { "" })
}

fn matches(list: &[Match]) -> String {
    let mut out = String::new();
    let tcp = |m: &Match| matches!(m, Match::Tcp | Match::Syn);
    let port = list.iter().any(|m| matches!(m, Match::Port(_)));
    for m in list {
        // Writing to a string cannot fail.
        let _ = match m {
            Match::Syn => write!(out, " tcp flags & (fin | syn | rst | ack) == syn"),
            Match::NotSyn => write!(out, " tcp flags & (fin | syn | rst | ack) != syn"),
            Match::Original(m) => write!(out, " ct mark {m} ct direction original"),
            // A port says which protocol it is of.
            Match::Tcp | Match::Udp if port => Ok(()),
            Match::Tcp => write!(out, " meta l4proto tcp"),
            Match::Udp => write!(out, " meta l4proto udp"),
            Match::Port(p) => write!(out, " {} dport {p}", if list.iter().any(tcp) { "tcp" } else { "udp" }),
            Match::To(n) => write!(out, "{}", address("daddr", n, false)),
            Match::NotTo(n) => write!(out, "{}", address("daddr", n, true)),
            Match::From(n) => write!(out, "{}", address("saddr", n, false)),
            Match::Uid(u) => write!(out, " meta skuid {u}"),
            Match::Gid(g) => write!(out, " meta skgid {g}"),
            Match::ToLoopback => write!(out, " oifname \"lo\""),
            Match::FromLoopback => write!(out, " iifname \"lo\""),
            Match::Mark(m) => write!(out, " meta mark {m}"),
        };
    }
    out
}

fn action(a: Action) -> String {
    match a {
        Action::Return => "return".to_owned(),
        Action::Jump(chain) => format!("jump {chain}"),
        Action::Redirect(p) => format!("redirect to :{p}"),
        Action::Tproxy(p, mark) => format!("meta mark set {mark} tproxy to :{p} accept"),
        // The first mark decides, as the first of the other verdicts does.
        Action::Mark(m) => format!("meta mark set {m} accept"),
        Action::MarkConnection(m) => format!("ct mark set {m} meta mark set {m} accept"),
    }
}

/// The table; what was there before is replaced in the same transaction.
pub(super) fn ruleset(chains: &[Chain]) -> String {
    // Deleting needs something to delete.
    let mut out = format!("table {TABLE} {{}}\ndelete table {TABLE}\ntable {TABLE} {{\n");
    let mut named: Vec<(Table, &str)> = Vec::new();
    for c in chains {
        if !named.contains(&(c.table, c.name)) {
            named.push((c.table, c.name));
        }
    }
    // In the order of jumps: a chain must be there before one jumps to it.
    for (t, name) in named.into_iter().rev() {
        let _ = writeln!(out, "  chain {name} {{");
        for r in chains.iter().filter(|c| c.table == t && c.name == name).flat_map(|c| &c.rules) {
            let _ = writeln!(out, "   {} {}", matches(&r.matches), action(r.action));
        }
        out.push_str("  }\n");
    }
    for (t, h, kind) in [
        (Table::Nat, Hook::Prerouting, "type nat hook prerouting priority -100"),
        (Table::Nat, Hook::Output, "type nat hook output priority -100"),
        (Table::Mangle, Hook::Prerouting, "type filter hook prerouting priority -150"),
        (Table::Mangle, Hook::Output, "type route hook output priority -150"),
    ] {
        let calls: Vec<String> = chains
            .iter()
            .filter(|c| c.table == t)
            .filter_map(|c| {
                let (at, m) = c.hook.as_ref()?;
                (*at == h).then(|| format!("   {} jump {}", matches(m), c.name))
            })
            .collect();
        if !calls.is_empty() {
            let name = kind.split(' ').nth(3).unwrap_or_default();
            let table = if t == Table::Nat { "nat" } else { "mangle" };
            let _ = writeln!(out, "  chain {table}_{name} {{\n    {kind}; policy accept;");
            let _ = writeln!(out, "{}\n  }}", calls.join("\n"));
        }
    }
    out.push_str("}\n");
    out
}

/// Whether nft can be run.
pub(super) fn is_there() -> bool {
    let quiet = |c: &mut Command| c.stdout(Stdio::null()).stderr(Stdio::null()).status();
    quiet(Command::new("nft").arg("--version")).is_ok_and(|s| s.success())
}

pub(super) fn install(text: &str) -> anyhow::Result<()> {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("nft cannot be run; install the package nftables")?;
    child.stdin.take().context("no standard input")?.write_all(text.as_bytes())?;
    let out = child.wait_with_output()?;
    if !out.status.success() {
        bail!("nft: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}

/// Removes the table; one that is not there is no error.
pub(super) fn clean() {
    let mut c = Command::new("nft");
    let family_and_name = TABLE.split(' ');
    c.args(["delete", "table"]).args(family_and_name).stdout(Stdio::null()).stderr(Stdio::null());
    let _ = c.status();
}

//! Capturing a workload's traffic with iptables.
//!
//! Inbound TCP goes to the proxy's inbound port, outbound TCP to its outbound port, DNS to its
//! resolver. What the proxy itself sends is recognised by its user or group and left alone. Order of
//! the outbound chain: the proxy's own traffic (except to the workload's own address through the
//! mesh), loopback, excluded ports and ranges, then what is included. All rules live in chains of
//! their own, so removing them is exact and installing twice is the same as once.

use std::{
    fmt::Write as _,
    io::Write as _,
    process::{Command, Stdio},
};

use anyhow::{Context, bail, ensure};
use ipnet::IpNet;
use mesh_runtime::ports;

const INBOUND: &str = "FLOTILLA_INBOUND";
const IN_REDIRECT: &str = "FLOTILLA_IN_REDIRECT";
const OUTPUT: &str = "FLOTILLA_OUTPUT";
const REDIRECT: &str = "FLOTILLA_REDIRECT";
const DNS: &str = "FLOTILLA_DNS";
const CHAINS: [&str; 5] = [INBOUND, IN_REDIRECT, OUTPUT, REDIRECT, DNS];

/// Flags of `flotilla iptables`.
#[derive(Debug, Clone, clap::Args)]
pub struct IptablesArgs {
    /// Remove the rules instead of installing them
    #[arg(long)]
    pub remove: bool,
    /// Print what would be given to iptables-restore and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Interception mode; TPROXY is unsupported so far
    #[arg(short = 'm', long, default_value = "REDIRECT")]
    pub mode: String,
    /// Port of the proxy for outbound traffic
    #[arg(short = 'p', long, default_value_t = ports::OUTBOUND)]
    pub proxy_port: u16,
    /// Port of the proxy for inbound traffic
    #[arg(short = 'z', long, default_value_t = ports::INBOUND)]
    pub inbound_port: u16,
    /// User IDs of the proxy, whose traffic is not captured
    #[arg(short = 'u', long, value_delimiter = ',', default_value = "1337")]
    pub proxy_uid: Vec<u32>,
    /// Group IDs of the proxy, whose traffic is not captured
    #[arg(short = 'g', long, value_delimiter = ',', default_value = "1337")]
    pub proxy_gid: Vec<u32>,
    /// Inbound ports to capture; `*` is all, empty none
    #[arg(short = 'b', long, default_value = "*")]
    pub inbound_ports: String,
    /// Inbound ports not to capture
    #[arg(short = 'd', long, value_delimiter = ',')]
    pub exclude_inbound_ports: Vec<u16>,
    /// Outbound ranges to capture, CIDR; `*` is all, empty none
    #[arg(short = 'i', long, default_value = "*")]
    pub outbound_ranges: String,
    /// Outbound ranges not to capture
    #[arg(short = 'x', long, value_delimiter = ',')]
    pub exclude_outbound_ranges: Vec<IpNet>,
    /// Outbound ports not to capture
    #[arg(short = 'o', long, value_delimiter = ',')]
    pub exclude_outbound_ports: Vec<u16>,
    /// Send DNS (port 53) to the proxy's resolver on this port
    #[arg(long)]
    pub dns_port: Option<u16>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn tool(self) -> &'static str {
        match self {
            Self::V4 => "iptables",
            Self::V6 => "ip6tables",
        }
    }

    fn loopback(self) -> &'static str {
        match self {
            Self::V4 => "127.0.0.1/32",
            Self::V6 => "::1/128",
        }
    }

    fn has(self, n: &IpNet) -> bool {
        matches!((self, n), (Self::V4, IpNet::V4(_)) | (Self::V6, IpNet::V6(_)))
    }
}

/// Installs or removes the rules.
///
/// # Errors
/// Flags that are not valid or unsupported, a missing tool, rules that the kernel refuses (nothing
/// is installed then: a table is replaced as a whole).
pub fn run(args: &IptablesArgs) -> anyhow::Result<()> {
    ensure!(
        args.mode.eq_ignore_ascii_case("REDIRECT"),
        "--mode {}: unsupported; only REDIRECT is implemented",
        args.mode
    );
    let rules = [(Family::V4, restore(args, Family::V4)?), (Family::V6, restore(args, Family::V6)?)];
    if args.dry_run {
        for (family, text) in rules {
            println!("# {}-restore --noflush", family.tool());
            print!("{text}");
        }
        return Ok(());
    }
    for (family, text) in rules {
        let ipv6_is_off = family == Family::V6 && !std::path::Path::new("/proc/net/if_inet6").exists();
        if ipv6_is_off {
            continue;
        }
        clean(family);
        if !args.remove {
            install(family, &text)?;
        }
    }
    Ok(())
}

fn ports_list(flag: &str, text: &str) -> anyhow::Result<Vec<u16>> {
    text.split(',')
        .filter(|p| !p.is_empty())
        .map(|p| p.trim().parse().with_context(|| format!("{flag} {p:?}: expected a port, or *")))
        .collect()
}

/// Input of iptables-restore for the nat table.
fn restore(args: &IptablesArgs, family: Family) -> anyhow::Result<String> {
    let mut t = String::from("*nat\n");
    for c in CHAINS {
        writeln!(t, ":{c} - [0:0]")?;
    }
    let mut rule = |r: String| {
        t.push_str("-A ");
        t.push_str(&r);
        t.push('\n');
    };
    rule(format!("{REDIRECT} -p tcp -j REDIRECT --to-ports {}", args.proxy_port));
    rule(format!("{IN_REDIRECT} -p tcp -j REDIRECT --to-ports {}", args.inbound_port));

    // Inbound.
    if !args.inbound_ports.is_empty() {
        rule(format!("PREROUTING -p tcp -j {INBOUND}"));
        // The proxy's own ports answer for themselves.
        for own in [args.inbound_port, args.proxy_port, ports::READINESS, ports::PROXY_METRICS] {
            rule(format!("{INBOUND} -p tcp --dport {own} -j RETURN"));
        }
        for p in &args.exclude_inbound_ports {
            rule(format!("{INBOUND} -p tcp --dport {p} -j RETURN"));
        }
        if args.inbound_ports == "*" {
            rule(format!("{INBOUND} -p tcp -j {IN_REDIRECT}"));
        } else {
            for p in ports_list("--inbound-ports", &args.inbound_ports)? {
                rule(format!("{INBOUND} -p tcp --dport {p} -j {IN_REDIRECT}"));
            }
        }
    }

    // Outbound; DNS first, since everything that follows takes TCP of any port.
    let owners: Vec<String> = args
        .proxy_uid
        .iter()
        .map(|u| format!("--uid-owner {u}"))
        .chain(args.proxy_gid.iter().map(|g| format!("--gid-owner {g}")))
        .collect();
    if let Some(dns) = args.dns_port {
        for protocol in ["udp", "tcp"] {
            rule(format!("OUTPUT -p {protocol} --dport 53 -j {DNS}"));
        }
        for owner in &owners {
            rule(format!("{DNS} -m owner {owner} -j RETURN"));
        }
        for protocol in ["udp", "tcp"] {
            rule(format!("{DNS} -p {protocol} -j REDIRECT --to-ports {dns}"));
        }
    }
    rule(format!("OUTPUT -p tcp -j {OUTPUT}"));
    for owner in &owners {
        // A workload that calls itself by its service's address comes back through its own proxy.
        rule(format!("{OUTPUT} -o lo ! -d {} -m owner {owner} -j {IN_REDIRECT}", family.loopback()));
    }
    for owner in &owners {
        rule(format!("{OUTPUT} -m owner {owner} -j RETURN"));
    }
    rule(format!("{OUTPUT} -d {} -j RETURN", family.loopback()));
    for p in &args.exclude_outbound_ports {
        rule(format!("{OUTPUT} -p tcp --dport {p} -j RETURN"));
    }
    for n in args.exclude_outbound_ranges.iter().filter(|n| family.has(n)) {
        rule(format!("{OUTPUT} -d {n} -j RETURN"));
    }
    if args.outbound_ranges == "*" {
        rule(format!("{OUTPUT} -j {REDIRECT}"));
    } else {
        for n in args.outbound_ranges.split(',').filter(|n| !n.is_empty()) {
            let n: IpNet = n
                .trim()
                .parse()
                .with_context(|| format!("--outbound-ranges {n:?}: expected a CIDR, or *"))?;
            if family.has(&n) {
                rule(format!("{OUTPUT} -d {n} -j {REDIRECT}"));
            }
        }
        rule(format!("{OUTPUT} -j RETURN"));
    }
    t.push_str("COMMIT\n");
    Ok(t)
}

fn install(family: Family, text: &str) -> anyhow::Result<()> {
    let tool = format!("{}-restore", family.tool());
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
fn clean(family: Family) {
    let run = |args: &[&str]| {
        Command::new(family.tool())
            .args(["-w", "5", "-t", "nat"])
            .args(args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|s| s.success())
    };
    // An installation may have been interrupted and repeated: delete as long as there is one.
    while run(&["-D", "PREROUTING", "-p", "tcp", "-j", INBOUND]) {}
    while run(&["-D", "OUTPUT", "-p", "tcp", "-j", OUTPUT]) {}
    for protocol in ["udp", "tcp"] {
        while run(&["-D", "OUTPUT", "-p", protocol, "--dport", "53", "-j", DNS]) {}
    }
    for c in CHAINS {
        run(&["-F", c]);
    }
    for c in CHAINS {
        run(&["-X", c]);
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct P {
        #[command(flatten)]
        args: IptablesArgs,
    }

    fn text(flags: &[&str]) -> anyhow::Result<String> {
        let p = P::parse_from(std::iter::once("x").chain(flags.iter().copied()));
        restore(&p.args, Family::V4)
    }

    fn position(text: &str, what: &str) -> usize {
        text.lines().position(|l| l.contains(what)).unwrap_or_else(|| panic!("{what} is not in\n{text}"))
    }

    #[test]
    fn the_proxy_is_exempt_before_anything_is_redirected() {
        let t = text(&["-x", "10.9.0.0/16,fd00::/8", "-o", "5432", "-d", "22"]).unwrap();
        let redirect = position(&t, "FLOTILLA_OUTPUT -j FLOTILLA_REDIRECT");
        for before in [
            "FLOTILLA_OUTPUT -m owner --uid-owner 1337 -j RETURN",
            "FLOTILLA_OUTPUT -m owner --gid-owner 1337 -j RETURN",
            "-d 127.0.0.1/32 -j RETURN",
            "--dport 5432 -j RETURN",
            "-d 10.9.0.0/16 -j RETURN",
        ] {
            assert!(position(&t, before) < redirect, "{before}");
        }
        assert!(!t.contains("fd00"), "an IPv6 range has no place in the IPv4 table");
        assert!(
            position(&t, "--dport 22 -j RETURN") < position(&t, "FLOTILLA_INBOUND -p tcp -j FLOTILLA_IN")
        );
    }

    #[test]
    fn dns_comes_before_what_takes_every_port() {
        let t = text(&["--dns-port", "15053"]).unwrap();
        let all = position(&t, "OUTPUT -p tcp -j FLOTILLA_OUTPUT");
        assert!(position(&t, "OUTPUT -p tcp --dport 53 -j FLOTILLA_DNS") < all);
        let redirect = position(&t, "FLOTILLA_DNS -p udp -j REDIRECT --to-ports 15053");
        assert!(position(&t, "FLOTILLA_DNS -m owner --uid-owner 1337 -j RETURN") < redirect);
    }

    #[test]
    fn only_what_is_included() {
        let t = text(&["-i", "10.0.0.0/8", "-b", "80,443"]).unwrap();
        assert!(t.contains("FLOTILLA_OUTPUT -d 10.0.0.0/8 -j FLOTILLA_REDIRECT"));
        assert!(!t.contains("FLOTILLA_OUTPUT -j FLOTILLA_REDIRECT"));
        assert!(t.contains("--dport 443 -j FLOTILLA_IN_REDIRECT"));
        let t = text(&["-b", ""]).unwrap();
        assert!(!t.contains("PREROUTING"));
    }

    #[test]
    fn bad_flags_name_themselves() {
        assert!(text(&["-b", "http"]).unwrap_err().to_string().contains("--inbound-ports"));
        assert!(text(&["-i", "10.0.0.0/99"]).unwrap_err().to_string().contains("--outbound-ranges"));
        let p = P::parse_from(["x", "--mode", "TPROXY"]);
        assert!(run(&p.args).unwrap_err().to_string().contains("unsupported"));
    }
}

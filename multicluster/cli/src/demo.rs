//! `flotilla demo`: two clusters on this machine, joined and serving each other, told as a story.
//!
//! Everything is real: each control plane, gateway, sidecar and service is a process of its own on
//! loopback addresses of its own (`127.10.0.0/16` is the first cluster), and the story drives them
//! with the commands that an operator would type. No root, no network.

mod cluster;
mod config;
mod http;
mod process;
mod report;
mod story;

use std::path::PathBuf;

use anyhow::Context;
use mesh_runtime::exit;

pub(crate) use process::DIE_WITH_PARENT;
use report::Report;

/// Flags of `flotilla demo`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct DemoArgs {
    /// Run the story without a person, print a JSON report of every observation to standard output and
    /// exit with 1 if one differs from what was expected
    #[arg(long)]
    check: bool,
    /// Keep configuration, state and logs of all processes afterwards
    #[arg(long)]
    keep: bool,
    /// Directory for them; a temporary one by default
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Number of clusters; those beyond two run reviews v3 as well
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(2..=6))]
    clusters: u8,
    /// How gateways talk to each other
    #[arg(long, value_enum, default_value_t)]
    transport: TransportArg,
}

/// Transport between gateways.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum TransportArg {
    /// TCP by SNI
    #[default]
    Tcp,
    /// QUIC trunk
    Quic,
}

pub(crate) async fn run(args: DemoArgs) -> anyhow::Result<u8> {
    let (dir, made) = match &args.dir {
        Some(d) => (d.clone(), !d.exists()),
        None => (std::env::temp_dir().join(format!("flotilla-demo-{}", std::process::id())), true),
    };
    if std::fs::read_dir(&dir).is_ok_and(|mut d| d.next().is_some()) {
        anyhow::bail!("--dir {}: not empty; the demo starts from nothing", dir.display());
    }
    mesh_runtime::files::private_dir(&dir).with_context(|| dir.display().to_string())?;
    let stop = mesh_runtime::shutdown::on_signal()?;
    let mut report = Report::new(args.check);
    let told = {
        let story = story::Story::new(&args, &dir, &mut report)?;
        tokio::select! {
            told = story.tell(&stop) => told,
            () = stop.cancelled() => {
                eprintln!("\nstopping ...");
                Ok(())
            }
        }
        // The story owns every process; they are gone when it is dropped.
    };
    if args.keep {
        eprintln!("kept: {}", dir.display());
    } else if made {
        std::fs::remove_dir_all(&dir).with_context(|| dir.display().to_string())?;
    }
    if let Err(error) = &told {
        report.failed(&format!("{error:#}"));
    }
    if args.check {
        report.print_json()?;
    }
    if let Err(error) = told {
        eprintln!("error: the story ended early: {error:#}");
        if !args.keep {
            eprintln!("run it with --keep to look at the logs of all processes");
        }
        return Ok(exit::FAILED);
    }
    Ok(if report.all_as_expected() { exit::OK } else { exit::FAILED })
}

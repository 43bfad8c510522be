//! `flotilla-sidecar`: a workload's proxy without the control plane linked in.

use std::process::ExitCode;

use clap::Parser;

#[derive(Debug, Parser)]
#[command(name = "flotilla-sidecar", version, about = "A workload's proxy")]
struct Cli {
    #[command(flatten)]
    args: sidecar::SidecarArgs,
}

/// Unlike the system's allocator it gives memory back after a burst of connections, and it needs no more than a C
/// compiler to build.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // Agent work only: the engine has threads of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let result = match runtime {
        Ok(r) => r.block_on(sidecar::run(cli.args)),
        Err(e) => Err(e.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(mesh_runtime::exit::UNUSABLE)
        }
    }
}

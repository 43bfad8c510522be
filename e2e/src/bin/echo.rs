//! `flotilla-echo`: the workload of the end-to-end tests.

use std::{net::IpAddr, path::PathBuf};

use clap::Parser;
use mesh_testkit::{control, echo};

#[derive(Debug, Parser)]
#[command(name = "flotilla-echo", about = "A workload that answers and calls in every protocol")]
struct Args {
    #[command(flatten)]
    identity: echo::Identity,
    /// Address to listen on
    #[arg(long, default_value = "0.0.0.0")]
    listen: IpAddr,
    /// Unix socket by which a test orders calls
    #[arg(long)]
    control: PathBuf,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    tokio::select! {
        r = echo::serve(args.listen, args.identity) => r,
        r = control::serve(&args.control) => r,
    }
}

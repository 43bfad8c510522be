//! `flotilla-echo`: the workload of the end-to-end tests.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use clap::Parser;
use mesh_testkit::{control, echo, paced};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

#[derive(Debug, Parser)]
#[command(name = "flotilla-echo", about = "A workload that answers and calls in every protocol")]
struct Args {
    #[command(flatten)]
    identity: echo::Identity,
    /// Address to listen on
    #[arg(long, default_value = "0.0.0.0")]
    listen: IpAddr,
    /// Unix socket by which a test orders calls
    #[arg(long, required_unless_present_any = ["page", "paced"])]
    control: Option<PathBuf>,
    /// Serves only one page, here, and nothing of a workload
    #[arg(long)]
    page: Option<SocketAddr>,
    #[command(flatten)]
    pace: paced::Paced,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if let Some(at) = args.page {
        return page(at, &args.identity.workload).await;
    }
    if let Some(host) = &args.pace.paced {
        println!("{}", serde_json::to_string(&paced::run(&args.pace, host).await?)?);
        return Ok(());
    }
    let control = args.control.unwrap_or_default();
    tokio::select! {
        r = echo::serve(args.listen, args.identity) => r,
        r = control::serve(&control) => r,
    }
}

/// Answers every request with the name of who answers and the address that it sees as its client.
async fn page(at: SocketAddr, name: &str) -> anyhow::Result<()> {
    let listener = TcpListener::bind(at).await?;
    loop {
        let (stream, peer) = listener.accept().await?;
        let body = format!("page of {name} for {}", peer.ip().to_canonical());
        tokio::spawn(answer(stream, body));
    }
}

async fn answer(mut s: TcpStream, body: String) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|w| w == b"\r\n\r\n") {
        if s.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let answer =
        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
    s.write_all(answer.as_bytes()).await
}

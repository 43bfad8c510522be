//! Requests at fixed times on kept connections: what waits for an answer does not hold the next request back, and time
//! counts from when a request was due.

use std::time::Duration;

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    task::JoinSet,
    time::Instant,
};

use crate::ports;

/// What to send.
#[derive(Debug, Clone, clap::Args)]
pub struct Paced {
    /// Host whose TCP port is called at a fixed pace, instead of serving anything
    #[arg(long, value_name = "HOST")]
    pub paced: Option<String>,
    /// Connections
    #[arg(long, default_value_t = 64)]
    pub connections: u32,
    /// Time between two requests of a connection, in milliseconds
    #[arg(long, default_value_t = 40)]
    pub every: u64,
    /// Requests of each connection
    #[arg(long, default_value_t = 250)]
    pub requests: u32,
    /// Bytes of a request; an answer is somewhat longer
    #[arg(long, default_value_t = 1024)]
    pub size: usize,
}

/// Milliseconds from when a request was due to its answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Latency {
    pub answered: usize,
    pub failed: usize,
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

/// Sends and measures. The first tenth of the requests is for warming up and does not count.
///
/// # Errors
/// The name cannot be resolved, or nothing was answered.
pub async fn run(c: &Paced, host: &str) -> anyhow::Result<Latency> {
    let mut addresses = tokio::net::lookup_host((host, ports::TCP)).await.context("resolve")?;
    let address = addresses.next().context("the name has no address")?;
    let mut line = vec![b'x'; c.size.max(2) - 1];
    line.push(b'\n');
    let every = Duration::from_millis(c.every);
    // Connecting is not what is measured.
    let begin = Instant::now() + Duration::from_secs(3);
    let mut all = JoinSet::new();
    for n in 0..c.connections {
        let (line, requests) = (line.clone(), c.requests);
        let first = begin + every * n / c.connections;
        all.spawn(async move {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let (read, mut write) = stream.into_split();
            let sender = tokio::spawn(async move {
                for k in 0..requests {
                    tokio::time::sleep_until(first + every * k).await;
                    write.write_all(&line).await?;
                }
                // Kept open until every answer is read.
                Ok::<_, std::io::Error>(write)
            });
            let mut lines = BufReader::new(read).lines();
            let mut took = Vec::new();
            for k in 0..requests {
                let next = tokio::time::timeout(Duration::from_secs(30), lines.next_line()).await;
                let Ok(Ok(Some(_))) = next else { break };
                if k >= requests / 10 {
                    took.push((first + every * k).elapsed().as_secs_f64() * 1000.0);
                }
            }
            drop(sender);
            Ok::<_, std::io::Error>(took)
        });
    }
    let mut took = Vec::new();
    while let Some(r) = all.join_next().await {
        // A connection that breaks is missing among the answers.
        took.extend(r.context("a task")?.unwrap_or_default());
    }
    ensure!(!took.is_empty(), "nothing was answered");
    took.sort_by(f64::total_cmp);
    let at = |part: f64| took[((took.len() - 1) as f64 * part) as usize];
    let wanted = (c.connections * (c.requests - c.requests / 10)) as usize;
    Ok(Latency {
        answered: took.len(),
        failed: wanted - took.len(),
        p50: at(0.5),
        p99: at(0.99),
        p999: at(0.999),
        max: at(1.0),
    })
}

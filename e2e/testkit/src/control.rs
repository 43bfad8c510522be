//! Telling a workload to call others.
//!
//! One JSON line in ([`Calls`]), one JSON line out (the outcomes), over a unix socket: file names are
//! not part of a network namespace, so a test reaches every workload from where it is.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
};

use crate::call::{Calls, Kept, Outcome, call_on};

/// Clients at most.
const CONCURRENCY: u32 = 256;

/// Serves the control socket until an error.
///
/// # Errors
/// The socket cannot be bound.
pub async fn serve(socket: &Path) -> anyhow::Result<()> {
    let listener = UnixListener::bind(socket).with_context(|| socket.display().to_string())?;
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(async move {
            if let Err(e) = converse(stream).await {
                eprintln!("control: {e:#}");
            }
        });
    }
}

async fn converse(stream: UnixStream) -> anyhow::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    while let Some(line) = lines.next_line().await? {
        let calls: Calls = serde_json::from_str(&line)?;
        let mut answer = serde_json::to_vec(&run(calls).await)?;
        answer.push(b'\n');
        write.write_all(&answer).await?;
    }
    Ok(())
}

/// Makes all the calls from here.
pub async fn run(calls: Calls) -> Vec<Outcome> {
    let clients = calls.concurrency.clamp(1, CONCURRENCY);
    let (calls, made) = (Arc::new(calls), Arc::new(AtomicU32::new(0)));
    let end = Instant::now() + Duration::from_millis(calls.duration_ms);
    let tasks: Vec<_> = (0..clients)
        .map(|_| {
            let (calls, made) = (calls.clone(), made.clone());
            tokio::spawn(async move {
                let (mut outcomes, mut kept) = (Vec::new(), Kept::default());
                loop {
                    let done = if calls.duration_ms > 0 {
                        Instant::now() >= end
                    } else {
                        made.fetch_add(1, Ordering::Relaxed) >= calls.count
                    };
                    if done {
                        return outcomes;
                    }
                    outcomes.push(call_on(&calls, &mut kept).await);
                    if calls.pause_ms > 0 {
                        tokio::time::sleep(Duration::from_millis(calls.pause_ms)).await;
                    }
                }
            })
        })
        .collect();
    let mut all = Vec::new();
    for t in tasks {
        all.extend(t.await.unwrap_or_default());
    }
    all.sort_by_key(|o| o.at);
    all
}

/// Tells the workload behind `socket` to call.
///
/// # Errors
/// No workload answers there, or not in time.
pub async fn order(socket: &Path, calls: &Calls) -> anyhow::Result<Vec<Outcome>> {
    let rounds = u64::from(calls.count / calls.concurrency.max(1)) + 1;
    let longest = calls.duration_ms + calls.timeout_ms * rounds + 10_000;
    let exchange = async {
        let mut stream = UnixStream::connect(socket).await.with_context(|| socket.display().to_string())?;
        let mut line = serde_json::to_vec(calls)?;
        line.push(b'\n');
        stream.write_all(&line).await?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).await?;
        anyhow::Ok(serde_json::from_str(&answer)?)
    };
    tokio::time::timeout(Duration::from_millis(longest), exchange)
        .await
        .with_context(|| format!("{}: no answer", socket.display()))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Protocol;

    #[tokio::test]
    async fn as_many_calls_as_ordered() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("c");
        let server = socket.clone();
        let listening = tokio::spawn(async move { serve(&server).await });
        while !socket.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // Nothing listens on port 1: every call fails, and every failure is reported.
        let mut calls = Calls::new(Protocol::Tcp, "127.0.0.1", 7);
        (calls.port, calls.concurrency) = (Some(1), 3);
        let outcomes = order(&socket, &calls).await.unwrap();
        assert_eq!(outcomes.len(), 7);
        assert!(outcomes.iter().all(|o| !o.ok && o.error.contains("connect")), "{outcomes:?}");
        listening.abort();
    }
}

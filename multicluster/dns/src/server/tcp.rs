//! Questions over TCP (RFC 7766): several in flight on one connection, answered as answers come.

use std::{sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::timeout,
};

use super::worker::{Step, Worker};
use crate::wire::Transport;

/// An idle connection is closed after this, and one whose client does not take its answers.
const IDLE: Duration = Duration::from_secs(10);
/// Answers waiting on one connection.
const QUEUE: usize = 32;
/// Connections; further ones wait in the kernel's queue.
const CONNECTIONS: usize = 512;
/// After an error of the listener, such as too many files.
const PAUSE: Duration = Duration::from_millis(50);

/// Dropping it closes the connections, too.
pub(super) async fn serve(listener: TcpListener, worker: Worker) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        // The semaphore lives as long as this.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let worker = worker.clone();
                connections.spawn(async move {
                    let _place = place;
                    connection(stream, worker).await;
                });
            }
            Err(error) => {
                tracing::debug!(%error, "a connection was not accepted");
                tokio::time::sleep(PAUSE).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn connection(stream: TcpStream, mut worker: Worker) {
    let _ = stream.set_nodelay(true);
    let (mut from, mut to) = stream.into_split();
    let (answers, mut queue) = mpsc::channel::<Vec<u8>>(QUEUE);
    let reading = async move {
        let mut packet = Vec::new();
        // Not touched, and so not resident, beyond what answers need.
        let mut out = vec![0; usize::from(u16::MAX)];
        loop {
            let Ok(Ok(len)) = timeout(IDLE, from.read_u16()).await else { return };
            packet.resize(usize::from(len), 0);
            let Ok(Ok(_)) = timeout(IDLE, from.read_exact(&mut packet)).await else { return };
            worker.refresh();
            match worker.handle(&packet, &mut out, Transport::Tcp) {
                Step::Reply(len) => {
                    if answers.send(framed(&out[..len])).await.is_err() {
                        return;
                    }
                }
                Step::Wait(waiting) => {
                    let answers = answers.clone();
                    tokio::spawn(async move {
                        let _ = answers.send(framed(&waiting.answer().await)).await;
                    });
                }
                Step::Nothing => return,
            }
        }
    };
    let writing = async move {
        while let Some(bytes) = queue.recv().await {
            if !matches!(timeout(IDLE, to.write_all(&bytes)).await, Ok(Ok(()))) {
                return;
            }
        }
    };
    tokio::join!(reading, writing);
}

/// With its length before it.
fn framed(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len() + 2);
    out.extend(u16::try_from(bytes.len()).unwrap_or(u16::MAX).to_be_bytes());
    out.extend(bytes);
    out
}

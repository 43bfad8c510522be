//! Bulk over plain TCP, which passes through pipes.

use std::{fs, time::Duration};

use mesh_model::proxy::*;
use mesh_proxy::{EngineOptions, Hooks};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::*;

const C: &str = "outbound|3306||db.books.svc.cluster.local";

fn proxy(up: std::net::SocketAddr, splice: bool, idle: Option<Duration>) -> Proxy {
    let NetworkFilter::Tcp(mut t) = tcp_filter(C) else { unreachable!() };
    t.idle_timeout = idle;
    Proxy::with(EngineOptions { splice, ..EngineOptions::default() }, Hooks::default())
        .cluster(cluster(C, &[up]))
        .listener(listener(Direction::Outbound, vec![chain(vec![NetworkFilter::Tcp(t)])]))
        .run()
}

/// Pipes of this process.
fn pipes() -> usize {
    let fds = fs::read_dir("/proc/self/fd").unwrap().flatten();
    fds.filter(|e| fs::read_link(e.path()).is_ok_and(|l| l.to_string_lossy().starts_with("pipe:"))).count()
}

/// Bytes that no other position has in the same order.
fn pattern(from: u64, len: usize) -> Vec<u8> {
    let word = |n: u64| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes();
    (from / 8..).flat_map(word).take(len).collect()
}

const CHUNK: usize = 1 << 20;

async fn send(s: &mut (impl tokio::io::AsyncWrite + Unpin), total: u64) {
    let mut at = 0;
    while at < total {
        s.write_all(&pattern(at, CHUNK)).await.unwrap();
        at += CHUNK as u64;
    }
    s.shutdown().await.unwrap();
}

async fn receive(s: &mut (impl tokio::io::AsyncRead + Unpin)) -> u64 {
    let mut at = 0;
    let mut buf = vec![0; CHUNK];
    loop {
        let mut n = 0;
        while n < CHUNK {
            match tokio::time::timeout(WAIT, s.read(&mut buf[n..])).await.expect("bytes come").unwrap() {
                0 => break,
                m => n += m,
            }
        }
        assert!(buf[..n] == pattern(at, n), "bytes at {at} differ");
        at += n as u64;
        if n < CHUNK {
            return at;
        }
    }
}

const BULK: u64 = 32 << 20;

/// Sends and receives bulk at once, each direction ending on its own.
async fn both(s: TcpStream) {
    let (mut r, mut w) = s.into_split();
    let sending = tokio::spawn(async move { send(&mut w, BULK).await });
    assert_eq!(receive(&mut r).await, BULK);
    sending.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_in_both_directions_arrives_whole_and_is_counted() {
    let server = raw_server(|s, _| both(s)).await;
    let p = proxy(server, true, None);
    let watch = tokio::spawn(async {
        let mut most = 0;
        for _ in 0..20_000 {
            most = most.max(pipes());
            if most > 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        most
    });
    both(p.connect("l").await).await;
    watch.abort();
    let seen = watch.await.unwrap_or(0);
    assert!(seen > 0, "no pipe was used");
    let total = format!("}} {BULK}");
    for name in ["istio_tcp_received_bytes_total", "istio_tcp_sent_bytes_total"] {
        p.metric(&[name, &total]).await;
    }
    p.metric(&["istio_tcp_connections_closed_total", "} 1"]).await;
}

#[tokio::test]
async fn after_bulk_a_conversation_and_then_silence() {
    // Bulk, then lines back and forth on the same connection, then nothing.
    let server = raw_server(|mut s, _| async move {
        s.write_all(&vec![b'x'; 8 << 20]).await.unwrap();
        let mut buf = [0; 64];
        while let Ok(n) = s.read(&mut buf).await {
            if n == 0 || s.write_all(&buf[..n]).await.is_err() {
                break;
            }
        }
    })
    .await;
    let p = proxy(server, true, Some(Duration::from_millis(600)));
    let mut s = p.connect("l").await;
    let mut left = 8 << 20;
    let mut buf = vec![0; 1 << 16];
    while left > 0 {
        // The client is slow now and then.
        if left % 7 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        left -= tokio::time::timeout(WAIT, s.read(&mut buf)).await.expect("bytes come").unwrap();
    }
    for i in 0..100u32 {
        s.write_all(format!("line {i}\n").as_bytes()).await.unwrap();
        assert_eq!(read_until(&mut s, "\n").await, format!("line {i}\n"));
    }
    let begun = std::time::Instant::now();
    assert_eq!(read_all(&mut s).await, "", "the idle timeout ends it");
    assert!(begun.elapsed() >= Duration::from_millis(500), "{:?}", begun.elapsed());
    p.metric(&["istio_tcp_connections_closed_total", "} 1"]).await;
}

#[tokio::test]
async fn a_reader_that_stops_holds_the_writer_and_one_that_leaves_ends_it() {
    let (tx, mut rx) = tokio::sync::mpsc::unbounded_channel();
    let server = raw_server(move |mut s, _| {
        let tx = tx.clone();
        async move {
            let chunk = vec![b'x'; 1 << 16];
            let mut sent = 0usize;
            while let Ok(r) = tokio::time::timeout(Duration::from_millis(500), s.write_all(&chunk)).await {
                if r.is_err() {
                    break;
                }
                sent += chunk.len();
                assert!(sent < 256 << 20, "nothing held the writer back");
            }
            let _ = tx.send("held");
            // Reset by the proxy, once the client has left.
            while s.write_all(&chunk).await.is_ok() {}
            let _ = tx.send("ended");
        }
    })
    .await;
    let p = proxy(server, true, None);
    let mut s = p.connect("l").await;
    let mut got = 0;
    let mut buf = vec![0; 1 << 16];
    while got < 4 << 20 {
        got += s.read(&mut buf).await.unwrap();
    }
    let next = |e: &'static str| e;
    assert_eq!(tokio::time::timeout(WAIT, rx.recv()).await.unwrap(), Some(next("held")));
    drop(s);
    assert_eq!(tokio::time::timeout(WAIT, rx.recv()).await.unwrap(), Some(next("ended")));
    p.metric(&["istio_tcp_connections_closed_total", "} 1"]).await;
}

/// Threads that are workers; those of proxies before this one may still be ending.
fn workers() -> Vec<std::path::PathBuf> {
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten().map(|t| t.path());
    tasks.filter(|t| fs::read_to_string(t.join("comm")).is_ok_and(|n| n.trim() == "worker-0")).collect()
}

/// CPU time of a thread, seconds.
fn cpu(task: &std::path::Path) -> f64 {
    let stat = fs::read_to_string(task.join("schedstat")).unwrap();
    stat.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement; run it alone"]
async fn seconds_of_cpu_for_a_gigabyte() {
    const TOTAL: usize = 4 << 30;
    for (what, piece) in [("pieces of 256 KiB", 256 << 10), ("pieces of 16 KiB", 16 << 10)] {
        for splice in [false, true, false, true] {
            let server = raw_server(move |mut s, _| async move {
                let chunk = vec![b'x'; piece];
                for _ in 0..TOTAL / piece {
                    s.write_all(&chunk).await.unwrap();
                }
            })
            .await;
            let before = workers();
            let p = proxy(server, splice, None);
            let worker = loop {
                // It has its name a moment after it began.
                if let Some(w) = workers().into_iter().find(|w| !before.contains(w)) {
                    break w;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            };
            let begun = (cpu(&worker), std::time::Instant::now());
            let mut s = p.connect("l").await;
            let mut buf = vec![0; 1 << 20];
            let mut got = 0;
            while let Ok(n) = s.read(&mut buf).await {
                if n == 0 {
                    break;
                }
                got += n;
            }
            assert_eq!(got, TOTAL);
            let gb = TOTAL as f64 / f64::from(1 << 30);
            println!(
                "{what}, splice {splice:5}: {:.3} CPU s/GiB, {:.2} GiB/s",
                (cpu(&worker) - begun.0) / gb,
                gb / begun.1.elapsed().as_secs_f64()
            );
        }
    }
}

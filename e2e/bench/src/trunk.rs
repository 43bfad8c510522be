//! The QUIC trunk beside TCP by server name: the same two gateways, the same sessions, alternately.
//!
//! The gateways are real processes in two joined clusters; which transport west's gateway uses is switched by its
//! `MeshConfig`, so both sides have the same processes. A session begins with the ClientHello that the gateways lead
//! by; what follows stands for the inner session's records, which gateways never look into. It is not encrypted here,
//! so that the load leaves the core to whoever is measured. On loopback TCP has segments of 64 KiB and no checksums,
//! which no network has; `--mtu 1500` makes both transports send what fits into a network's packets.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

use crate::{
    Args,
    mesh::{Mesh, PORT, SERVICE},
    process::Process,
    report::Row,
};

/// Named scenarios.
pub(crate) const ALL: [(&str, &str); 2] = [
    ("trunk", "QUIC trunk against TCP by SNI between two gateways: bulk, 8 sessions"),
    ("trunk-1k", "the same: 1 KiB there and back, 32 sessions"),
];

/// Sessions of the bulk scenario.
const STREAMS: usize = 8;
/// Sessions of requests and replies.
const CALLERS: usize = 32;
/// Bytes of a request and of a reply.
const MESSAGE: usize = 1024;
/// What an application writes and reads at once.
const PIECE: usize = 128 * 1024;
/// Between the first byte and the first figure: windows and the path's MTU have been found by then.
const WARM_UP: Duration = Duration::from_millis(1500);
const SWITCH: Duration = Duration::from_secs(60);
const GIB: f64 = (1u64 << 30) as f64;
/// First byte of a session: everything is swallowed, or everything sent back.
const SWALLOW: u8 = 0;
const ECHO: u8 = 1;

/// Measures a scenario: the row of TCP and that of the trunk.
pub(crate) fn measure(args: &Args, scenario: &str) -> anyhow::Result<Vec<Row>> {
    let dir = tempfile::tempdir()?;
    pin(args.load_cpu)?;
    let mesh = Mesh::start(args, dir.path())?;
    let workload = Workload::start(mesh.east.workload())?;
    let mut rows = ["tcp", "trunk"].map(|side| Row {
        scenario: scenario.to_owned(),
        side: side.to_owned(),
        against: (side == "trunk").then(|| "tcp".to_owned()),
        ..Row::default()
    });
    for _ in 0..args.runs {
        for row in &mut rows {
            let quic = row.side == "trunk";
            let figures = switch(&mesh, quic).and_then(|()| {
                let profiled = quic.then_some(args.profile.as_deref()).flatten();
                run(args, &mesh, scenario == "trunk", &workload.swallowed, profiled)
            });
            match figures {
                Ok(figures) => row.add(&figures),
                Err(e) => row.error = Some(format!("{e:#}")),
            }
        }
    }
    drop(mesh);
    if args.keep {
        println!("{}", dir.keep().display());
    }
    Ok(rows.to_vec())
}

fn pin(cpu: usize) -> anyhow::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    Ok(rustix::thread::sched_setaffinity(None, &set)?)
}

/// Has west's gateway use a transport, and waits until it does.
fn switch(mesh: &Mesh, quic: bool) -> anyhow::Result<()> {
    mesh.west.transport(if quic { "quic" } else { "tcp" })?;
    let sessions = || mesh.west.metric("flotilla_trunk_quic_sessions_total");
    let begun = Instant::now();
    let mut last = anyhow::anyhow!("the other transport is still in use");
    while begun.elapsed() < SWITCH {
        let before = sessions()?;
        match call(&mut open(mesh, ECHO)?) {
            Ok(()) if (sessions()? > before) == quic => return Ok(()),
            Ok(()) => {}
            Err(e) => last = e.into(),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Err(last.context("the gateways do not switch"))
}

/// One run: throughput and what it cost the gateways.
fn run(
    args: &Args,
    mesh: &Mesh,
    bulk: bool,
    swallowed: &AtomicU64,
    profile: Option<&str>,
) -> anyhow::Result<Vec<(&'static str, f64)>> {
    let load = Load::start(mesh, bulk)?;
    std::thread::sleep(WARM_UP);
    let profiler = profile.map(|p| profiler(mesh, p)).transpose()?;
    let done = || if bulk { swallowed.load(Relaxed) } else { load.done.load(Relaxed) };
    let used = || mesh.gateways().map(Process::cpu).collect::<Vec<f64>>();
    let (before, cpu, begun) = (done(), used(), Instant::now());
    std::thread::sleep(Duration::from_secs(args.seconds));
    let (after, spent, wall) = (done(), used(), begun.elapsed().as_secs_f64());
    drop(profiler);
    load.end()?;
    let each: Vec<f64> = spent.iter().zip(&cpu).map(|(a, b)| a - b).collect();
    let [west, east] = each[..] else { bail!("there are not two gateways") };
    let n = (after - before) as f64;
    ensure!(n > 0.0, "nothing arrived");
    Ok(if bulk {
        let gbit = n * 8.0 / 1e9;
        vec![
            ("gbit_per_s", gbit / wall),
            ("gbit_per_cpu_s", gbit / (west + east)),
            ("cpu_s_per_gib", (west + east) / n * GIB),
            ("cpu_s_per_gib_west", west / n * GIB),
            ("cpu_s_per_gib_east", east / n * GIB),
        ]
    } else {
        let per = 1000.0 / n;
        vec![
            ("requests_per_s", n / wall),
            ("cpu_s_per_1k", (west + east) * per),
            ("cpu_s_per_1k_west", west * per),
            ("cpu_s_per_1k_east", east * per),
        ]
    })
}

fn profiler(mesh: &Mesh, command: &str) -> anyhow::Result<std::process::Child> {
    let pids: Vec<String> = mesh.gateways().map(|p| p.pid().to_string()).collect();
    Command::new("sh").args(["-c", &format!("{command} {}", pids.join(","))]).spawn().context("--profile")
}

/// Sessions under load.
struct Load {
    stop: Arc<AtomicBool>,
    /// Requests answered.
    done: Arc<AtomicU64>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl Load {
    fn start(mesh: &Mesh, bulk: bool) -> anyhow::Result<Self> {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut threads = Vec::new();
        for _ in 0..if bulk { STREAMS } else { CALLERS } {
            let mut s = open(mesh, if bulk { SWALLOW } else { ECHO })?;
            let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
            threads.push(std::thread::spawn(move || {
                let piece = vec![b'x'; PIECE];
                while !stop.load(Relaxed) {
                    if bulk {
                        s.write_all(&piece)?;
                    } else {
                        call(&mut s)?;
                        done.fetch_add(1, Relaxed);
                    }
                }
                Ok(())
            }));
        }
        Ok(Self { stop, done, threads })
    }

    fn end(self) -> anyhow::Result<()> {
        self.stop.store(true, Relaxed);
        for t in self.threads {
            t.join().map_err(|_| anyhow::anyhow!("a session's thread failed"))?.context("a session broke")?;
        }
        Ok(())
    }
}

/// A session through west's gateway to the service in east.
fn open(mesh: &Mesh, mode: u8) -> anyhow::Result<TcpStream> {
    let mut s = TcpStream::connect(mesh.west.east_west())?;
    s.set_nodelay(true)?;
    // Whatever goes wrong, nobody waits for ever.
    s.set_read_timeout(Some(Duration::from_secs(10)))?;
    s.set_write_timeout(Some(Duration::from_secs(10)))?;
    let name = format!("outbound_.{PORT}_._.{SERVICE}.bench.svc.east.clusterset.local");
    let mut first = client_hello(&name);
    first.push(mode);
    s.write_all(&first)?;
    Ok(s)
}

fn call(s: &mut TcpStream) -> io::Result<()> {
    s.write_all(&[b'q'; MESSAGE])?;
    s.read_exact(&mut [0; MESSAGE])
}

/// What a gateway reads of a session: a ClientHello of TLS 1.3 with a server name and ALPN `istio` (RFC 8446
/// section 4.1.2).
fn client_hello(name: &str) -> Vec<u8> {
    fn sized(width: usize, body: &[u8]) -> Vec<u8> {
        let len = (body.len() as u64).to_be_bytes();
        [&len[8 - width..], body].concat()
    }
    let extension = |kind: u8, body: &[u8]| [&[0, kind][..], &sized(2, body)].concat();
    let extensions = [
        extension(0, &sized(2, &[&[0][..], &sized(2, name.as_bytes())].concat())),
        extension(16, &sized(2, &sized(1, b"istio"))),
        extension(43, &[2, 3, 4]),
    ]
    .concat();
    let body = [&[3, 3][..], &[7; 32], &[0], &sized(2, &[0x13, 1]), &[1, 0], &sized(2, &extensions)].concat();
    let handshake = [&[1][..], &sized(3, &body)].concat();
    [&[22, 3, 1][..], &sized(2, &handshake)].concat()
}

/// The workload: swallows or sends back what follows the hello.
struct Workload {
    at: SocketAddr,
    swallowed: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Workload {
    fn start(at: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(at).with_context(|| at.to_string())?;
        let (swallowed, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, end) = (Arc::clone(&swallowed), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            for s in listener.incoming().flatten() {
                if end.load(Relaxed) {
                    return;
                }
                let count = Arc::clone(&count);
                // It ends with its session.
                std::thread::spawn(move || session(s, &count));
            }
        });
        Ok(Self { at, swallowed, stop, thread: Some(thread) })
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        // Wakes whoever accepts.
        if TcpStream::connect(self.at).is_ok()
            && let Some(t) = self.thread.take()
        {
            let _ = t.join();
        }
    }
}

fn session(mut s: TcpStream, count: &AtomicU64) -> io::Result<()> {
    s.set_nodelay(true)?;
    let mut head = [0; 5];
    s.read_exact(&mut head)?;
    let mut rest = vec![0; usize::from(u16::from_be_bytes([head[3], head[4]])) + 1];
    s.read_exact(&mut rest)?;
    let mut piece = vec![0; PIECE];
    let echo = rest.last() == Some(&ECHO);
    loop {
        let n = s.read(&mut piece)?;
        if n == 0 {
            return Ok(());
        }
        if echo {
            s.write_all(&piece[..n])?;
        } else {
            count.fetch_add(n as u64, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::client_hello;

    #[test]
    fn lengths_of_the_hello_fit() {
        let hello = client_hello("a.b");
        assert_eq!(usize::from(u16::from_be_bytes([hello[3], hello[4]])), hello.len() - 5);
        let body = u32::from_be_bytes([0, hello[6], hello[7], hello[8]]) as usize;
        assert_eq!(body, hello.len() - 9);
        assert!(hello.windows(3).any(|w| w == b"a.b"));
    }
}

//! An open-loop HTTP/1.1 client. Every connection owns a fixed share of the send slots. A request is timed from the
//! moment it is sent, or from its slot when the previous answer held it back: a stalled proxy is charged for the
//! requests it kept waiting (no coordinated omission), the coarse wake-up of a sleeping client is not.

use std::{
    io::{Read, Write},
    net::TcpStream,
    process::ExitCode,
    time::{Duration, Instant},
};

/// First argument of a process that is this client.
pub(crate) const COMMAND: &str = "openloop-client";

/// Arguments: ADDRESS RATE SECONDS CONNECTIONS HOST PATH.
pub(crate) fn main(a: &[String]) -> ExitCode {
    let [address, rate, seconds, connections, host, path] = a else {
        eprintln!("openloop-client ADDRESS RATE SECONDS CONNECTIONS HOST PATH");
        return ExitCode::from(2);
    };
    let (Ok(rate), Ok(seconds), Ok(connections)) =
        (rate.parse::<f64>(), seconds.parse::<f64>(), connections.parse::<usize>())
    else {
        return ExitCode::from(2);
    };
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: openloop\r\n\r\n").into_bytes();
    let total = (rate * seconds) as usize;
    let start = Instant::now() + Duration::from_millis(200);
    let threads: Vec<_> = (0..connections)
        .map(|id| {
            let (address, request) = (address.clone(), request.clone());
            std::thread::spawn(move || {
                let slots = (id..total)
                    .step_by(connections)
                    .map(|s| start + Duration::from_secs_f64(s as f64 / rate));
                connection(&address, &request, slots, start)
            })
        })
        .collect();
    let (mut times, mut bad) = (Vec::new(), 0);
    for t in threads {
        let Ok((t, b)) = t.join() else { return ExitCode::from(1) };
        times.extend(t);
        bad += b;
    }
    times.sort_unstable();
    let q = |p: f64| {
        let at = ((times.len() as f64 * p) as usize).min(times.len().saturating_sub(1));
        times.get(at).map_or(0.0, |ns| *ns as f64 / 1e3)
    };
    println!(
        "{}",
        serde_json::json!({"n": times.len(), "bad": bad, "p50_us": q(0.5), "p90_us": q(0.9), "p99_us": q(0.99)})
    );
    ExitCode::SUCCESS
}

fn connection(
    address: &str,
    request: &[u8],
    slots: impl Iterator<Item = Instant>,
    start: Instant,
) -> (Vec<u64>, u64) {
    let (mut times, mut bad, mut free) = (Vec::new(), 0, start);
    let mut stream: Option<TcpStream> = None;
    let mut buf = vec![0; 65536];
    for due in slots {
        if let Some(d) = due.checked_duration_since(Instant::now()) {
            std::thread::sleep(d);
        }
        let from = if free > due { due } else { Instant::now() };
        if stream.is_none() {
            stream = TcpStream::connect(address).ok();
            if let Some(s) = &stream {
                let _ = s.set_nodelay(true);
                let _ = s.set_read_timeout(Some(Duration::from_secs(5)));
            }
        }
        match stream.as_mut().map(|s| exchange(s, request, &mut buf)) {
            Some(Ok(true)) => times.push(u64::try_from(from.elapsed().as_nanos()).unwrap_or(u64::MAX)),
            Some(Ok(false)) => bad += 1,
            Some(Err(_)) | None => {
                bad += 1;
                stream = None;
            }
        }
        free = Instant::now();
    }
    (times, bad)
}

fn exchange(s: &mut TcpStream, request: &[u8], buf: &mut [u8]) -> std::io::Result<bool> {
    s.write_all(request)?;
    let (mut n, mut need) = (0, usize::MAX);
    while n < need {
        let k = s.read(&mut buf[n..])?;
        if k == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        n += k;
        if need == usize::MAX
            && let Some(end) = buf[..n].windows(4).position(|w| w == b"\r\n\r\n")
        {
            let head = String::from_utf8_lossy(&buf[..end]).to_ascii_lowercase();
            let length = head.split("content-length:").nth(1).and_then(|v| v.split_whitespace().next());
            need = end + 4 + length.and_then(|v| v.parse::<usize>().ok()).unwrap_or(0);
        }
    }
    Ok(buf[..n].starts_with(b"HTTP/1.1 200"))
}

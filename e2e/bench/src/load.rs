//! Load: wrk, h2load, iperf3, and the open-loop client.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

use crate::{openloop, process::tool};

/// Where and how load goes.
pub(crate) struct Target<'a> {
    pub(crate) cpu: usize,
    pub(crate) address: SocketAddr,
    pub(crate) host: &'a str,
    pub(crate) path: &'a str,
    /// gRPC over HTTP/2 in clear instead of HTTP/1.1.
    pub(crate) grpc: bool,
    /// A new connection for each request.
    pub(crate) close: bool,
    /// Further header lines.
    pub(crate) headers: Vec<String>,
    pub(crate) work: &'a Path,
}

fn strings<const N: usize>(args: [&str; N]) -> Vec<String> {
    args.map(str::to_owned).to_vec()
}

/// The number before or after a word in a tool's output.
fn number_after(text: &str, word: &str) -> Option<f64> {
    let rest = &text[text.find(word)? + word.len()..];
    let digits: String = rest.trim_start().chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    digits.parse().ok()
}

fn number_before(text: &str, word: &str) -> Option<f64> {
    let before = text[..text.find(word)?].trim_end();
    let digits: String = before
        .chars()
        .rev()
        .take_while(|c| c.is_ascii_digit() || *c == '.')
        .collect::<Vec<_>>()
        .into_iter()
        .rev()
        .collect();
    digits.parse().ok()
}

impl Target<'_> {
    /// As much as the core takes; requests done and failed.
    pub(crate) fn saturate(&self, seconds: u64, connections: usize) -> anyhow::Result<(f64, f64)> {
        let limit = Duration::from_secs(seconds + 30);
        let mut args;
        if self.grpc {
            args = strings(["h2load", "-c", "8"]);
            args.extend([
                "-m".into(),
                (connections / 8).max(1).to_string(),
                "-D".into(),
                seconds.to_string(),
            ]);
            args.extend(["-d".into(), self.work.join("body").display().to_string()]);
            args.extend(strings(["-H", "content-type: application/grpc", "-H", "te: trailers"]));
            args.push(format!("http://{}/echo", self.address));
        } else {
            args = strings(["wrk", "-t1"]);
            args.extend([format!("-c{connections}"), format!("-d{seconds}s")]);
            args.extend(["-H".into(), format!("Host: {}", self.host)]);
            for h in &self.headers {
                args.extend(["-H".into(), h.clone()]);
            }
            if self.close {
                args.extend(strings(["-H", "Connection: close"]));
            }
            args.push(format!("http://{}{}", self.address, self.path));
        }
        let out = tool(self.cpu, &args, limit)?;
        let (done, failed) = if self.grpc {
            let failed = number_before(&out, " failed,").unwrap_or(0.0)
                + number_before(&out, " errored,").unwrap_or(0.0);
            (number_before(&out, " succeeded,"), failed)
        } else {
            let count = |w| number_after(&out, w).unwrap_or(0.0);
            let sockets = out
                .find("Socket errors")
                .map_or(0.0, |_| ["connect ", "read ", "write ", "timeout "].into_iter().map(count).sum());
            (number_before(&out, " requests in"), sockets + count("Non-2xx or 3xx responses: "))
        };
        match done {
            Some(n) if n > 0.0 => Ok((n, failed)),
            _ => bail!("{} served nothing: {out}", args[0]),
        }
    }

    /// Latency at a fixed rate: p50, p90 and p99 in microseconds.
    pub(crate) fn latency(&self, rate: u32, seconds: u64) -> anyhow::Result<[f64; 3]> {
        let limit = Duration::from_secs(seconds + 30);
        if self.grpc {
            let log = self.work.join("h2load.log");
            let _ = std::fs::remove_file(&log);
            let mut args = strings(["h2load", "-c", "1", "-m", "100"]);
            args.extend([format!("--rps={rate}"), "-D".into(), seconds.to_string()]);
            args.extend(["-d".into(), self.work.join("body").display().to_string()]);
            args.extend(strings(["-H", "content-type: application/grpc", "-H", "te: trailers"]));
            args.push(format!("--log-file={}", log.display()));
            args.push(format!("http://{}/echo", self.address));
            tool(self.cpu, &args, limit)?;
            let text = std::fs::read_to_string(&log).context("h2load wrote no log")?;
            let mut us: Vec<f64> =
                text.lines().filter_map(|l| l.split_whitespace().nth(2)?.parse().ok()).collect();
            us.sort_by(f64::total_cmp);
            let q = |p: usize| us.get((us.len() * p / 100).min(us.len().saturating_sub(1))).copied();
            let (Some(a), Some(b), Some(c)) = (q(50), q(90), q(99)) else { bail!("h2load measured nothing") };
            return Ok([a, b, c]);
        }
        let me = std::env::current_exe()?.display().to_string();
        let args = vec![
            me,
            openloop::COMMAND.to_owned(),
            self.address.to_string(),
            rate.to_string(),
            seconds.to_string(),
            "32".to_owned(),
            self.host.to_owned(),
            self.path.to_owned(),
        ];
        let out = tool(self.cpu, &args, limit)?;
        let v: serde_json::Value = serde_json::from_str(out.lines().next().unwrap_or_default())
            .with_context(|| format!("open-loop client: {out}"))?;
        if v["bad"] != 0 {
            bail!("{} of {} requests failed at {rate}/s", v["bad"], v["n"]);
        }
        let q = |k: &str| v[k].as_f64().unwrap_or(0.0);
        Ok([q("p50_us"), q("p90_us"), q("p99_us")])
    }

    /// One request; true if it was answered with 200.
    pub(crate) fn once(&self) -> bool {
        let send = || -> std::io::Result<bool> {
            let mut s = TcpStream::connect_timeout(&self.address, Duration::from_secs(1))?;
            s.set_read_timeout(Some(Duration::from_secs(1)))?;
            write!(s, "GET {} HTTP/1.1\r\nHost: {}\r\n\r\n", self.path, self.host)?;
            let mut buf = [0; 1024];
            let n = s.read(&mut buf)?;
            Ok(buf[..n].starts_with(b"HTTP/1.1 200"))
        };
        send().unwrap_or(false)
    }

    /// Opens connections that have each served one request and then stay idle.
    pub(crate) fn idle(&self, count: usize) -> anyhow::Result<Vec<TcpStream>> {
        (0..count)
            .map(|_| {
                let mut s = TcpStream::connect(self.address)?;
                s.set_read_timeout(Some(Duration::from_secs(10)))?;
                write!(s, "GET {} HTTP/1.1\r\nHost: {}\r\n\r\n", self.path, self.host)?;
                let mut buf = [0; 4096];
                if s.read(&mut buf)? == 0 {
                    bail!("a connection was closed instead of being served");
                }
                Ok(s)
            })
            .collect()
    }
}

/// One stream of iperf3: bytes and seconds.
pub(crate) fn iperf(cpu: usize, address: SocketAddr, seconds: u64) -> anyhow::Result<(f64, f64)> {
    let mut args = strings(["iperf3", "-J", "-c"]);
    args.extend([
        address.ip().to_string(),
        "-p".into(),
        address.port().to_string(),
        "-t".into(),
        seconds.to_string(),
    ]);
    let out = tool(cpu, &args, Duration::from_secs(seconds + 30))?;
    let v: serde_json::Value = serde_json::from_str(&out).with_context(|| format!("iperf3: {out}"))?;
    let sum = &v["end"]["sum_received"];
    match (sum["bytes"].as_f64(), sum["seconds"].as_f64()) {
        (Some(b), Some(s)) if b > 0.0 => Ok((b, s)),
        _ => bail!("iperf3 moved nothing: {out}"),
    }
}

/// Scrapes metrics once a second until dropped, as Prometheus would.
pub(crate) struct Scraper {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

impl Scraper {
    pub(crate) fn start(admins: Vec<SocketAddr>) -> Self {
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = std::sync::Arc::clone(&stop);
        std::thread::spawn(move || {
            while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                let begun = Instant::now();
                for a in &admins {
                    let fetch = || -> std::io::Result<()> {
                        let mut s = TcpStream::connect(a)?;
                        s.set_read_timeout(Some(Duration::from_secs(2)))?;
                        write!(
                            s,
                            "GET /stats/prometheus HTTP/1.1\r\nHost: {a}\r\nConnection: close\r\n\r\n"
                        )?;
                        std::io::copy(&mut s, &mut std::io::sink())?;
                        Ok(())
                    };
                    let _ = fetch();
                }
                std::thread::sleep(Duration::from_secs(1).saturating_sub(begun.elapsed()));
            }
        });
        Self { stop }
    }
}

impl Drop for Scraper {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_in_what_tools_print() {
        let wrk = "  81334 requests in 5.00s, 23.1MB read\n  Socket errors: connect 0, read 2, write 0, timeout 1\n";
        assert_eq!(number_before(wrk, " requests in"), Some(81334.0));
        assert_eq!(number_after(wrk, "read "), Some(2.0));
        let h2load = "requests: 10 total, 10 started, 10 done, 9 succeeded, 1 failed, 0 errored, 0 timeout";
        assert_eq!(number_before(h2load, " succeeded,"), Some(9.0));
        assert_eq!(number_before(h2load, " failed,"), Some(1.0));
    }
}

//! Mixed load through pairs of sidecars while configuration changes every second and endpoints come and go.
//!
//! `FLOTILLA_SOAK_SECONDS=600 cargo test --release -p flotilla-e2e --test netns soak -- --ignored --nocapture` is the
//! long form; `cargo verify` runs the short one. No call may fail: every change leaves something that serves. And
//! after a first part the sidecars' memory must stay what it is.

use std::{
    fmt::Write as _,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use flotilla_e2e::{
    netns::{Cluster, NAMESPACE, Options, World},
    programs::Process,
};
use mesh_testkit::{
    call::{Calls, Protocol},
    ports,
};

use crate::support::{host, scenario, served_from};

/// Seconds of the short form.
const SHORT: u64 = 42;
/// Part of the time after which memory must be flat: a minute of ten, a third of the short form.
fn warm_up(seconds: u64) -> u64 {
    (seconds / 3).min(60)
}

/// What memory may grow by after that, in percent. The short form ends before the caches of all protocols are full.
fn growth_limit(seconds: u64) -> f64 {
    if seconds < 300 { 15.0 } else { 5.0 }
}

#[test]
#[ignore = "needs root, network namespaces and h2load"]
fn soak() {
    scenario("soak", async || {
        let seconds =
            std::env::var("FLOTILLA_SOAK_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(SHORT);
        let world = World::start(&Options {
            echo: env!("CARGO_BIN_EXE_flotilla-echo").into(),
            quic: false,
            trunk_transport: "quic",
            gateways: 1,
            namespace: |_| NAMESPACE,
            locality: |_| "",
            clusters: vec![(
                "west",
                vec![("client", "v1"), ("alpha", "v1"), ("alpha", "v2"), ("alpha", "v3")],
            )],
        })
        .await?;
        let west = &world.clusters[0];
        // What fails is looked up in the logs, so they are on.
        west.write(
            "mesh.yaml",
            "apiVersion: flotilla.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: mesh}\nspec: {accessLogFile: /dev/stdout}\n",
        )?;
        // Every listener is another one with its log, so the connections before it are closed in good order, which
        // h2load takes for an error: what it would send between GOAWAY and the close counts as failed.
        flotilla_e2e::netns::until("requests are logged", Duration::from_secs(20), async || {
            served_from(west.workload("client"), "alpha", &["west"]).await?;
            for w in ["client-v1", "alpha-v1", "alpha-v2", "alpha-v3"] {
                ensure!(west.log(&format!("{w}-proxy")).contains("\" 200 - via_upstream"), "not at {w}");
            }
            Ok(())
        })
        .await?;
        run(west, &world.dir, seconds).await
    });
}

/// Load that is not ours, on connections that are kept for five seconds at most: h2load makes no new one for a
/// connection that was closed in good order.
fn h2load(
    west: &Cluster,
    dir: &Path,
    name: &str,
    seconds: u64,
    extra: &str,
    port: u16,
) -> anyhow::Result<Process> {
    let script = format!(
        "end=$(($(date +%s) + {seconds})); while [ $(date +%s) -lt $end ]; do h2load -c 4 --rps 25 -D 5 {extra} \
         http://{}:{port}/; done; echo END",
        host("alpha")
    );
    let line =
        ["ip", "netns", "exec", &west.workload("client").netns, "sh", "-c", &script].map(str::to_owned);
    Process::start(name, dir, &line)
}

/// One second's configuration. All of them serve; what differs is how.
fn change(west: &Cluster, n: u64) -> anyhow::Result<()> {
    let weight = 10 + (n * 13) % 80;
    let mut text = String::new();
    write!(
        text,
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: alpha, namespace: {NAMESPACE}}}\n\
         spec:\n  hosts: [alpha]\n  http:\n  - match: [{{headers: {{x-none: {{exact: n{n}}}}}}}]\n    route:\n    \
         - {{destination: {{host: alpha, subset: v1}}}}\n  - timeout: {}s\n    headers: {{request: {{set: {{x-turn: \
         t{n}}}}}}}\n    route:\n    - {{destination: {{host: alpha, subset: v1}}, weight: {weight}}}\n    \
         - {{destination: {{host: alpha, subset: v2}}, weight: {}}}\n---\n",
        20 + n % 10,
        100 - weight
    )?;
    let lb = ["ROUND_ROBIN", "LEAST_REQUEST", "RANDOM"][(n / 7 % 3) as usize];
    write!(
        text,
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: alpha, namespace: {NAMESPACE}}}\n\
         spec:\n  host: alpha\n  trafficPolicy: {{loadBalancer: {{simple: {lb}}}}}\n  subsets:\n  \
         - {{name: v1, labels: {{version: v1}}}}\n  - {{name: v2, labels: {{version: v2}}}}\n---\n"
    )?;
    // A listener that comes and goes, and rules that always admit the client.
    if (n / 3).is_multiple_of(2) {
        write!(
            text,
            "apiVersion: v1\nkind: Service\nmetadata: {{name: flap, namespace: {NAMESPACE}}}\nspec:\n  selector: {{app: \
             alpha}}\n  ports:\n  - {{name: tcp-x, port: {}}}\n---\n",
            7000 + n % 50
        )?;
    }
    write!(
        text,
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: alpha, namespace: \
         {NAMESPACE}}}\nspec:\n  selector: {{matchLabels: {{app: alpha}}}}\n  action: ALLOW\n  rules:\n  \
         - from: [{{source: {{namespaces: [{NAMESPACE}, other{}]}}}}]\n---\n",
        n / 5
    )?;
    // An endpoint that comes and goes. It stays a workload with the same ports, so that whoever has not heard yet is
    // still served: to deregister it while its callers know it would be a failure that configuration explains.
    write!(
        text,
        "apiVersion: v1\nkind: Service\nmetadata: {{name: spare, namespace: {NAMESPACE}}}\nspec:\n  selector: {{app: \
         spare}}\n  ports:\n"
    )?;
    for p in Protocol::ALL {
        if p != Protocol::WebSocket {
            writeln!(text, "  - {{name: {}, port: {}}}", port_name(p), p.port())?;
        }
    }
    west.write("soak.yaml", &text)?;
    west.write_application(|w| w.version != "v3" || n.is_multiple_of(2))
}

/// Name of a port, which says its protocol.
fn port_name(p: Protocol) -> &'static str {
    match p {
        Protocol::Http1 | Protocol::WebSocket => "http",
        Protocol::Http2 => "http2",
        Protocol::Grpc => "grpc",
        Protocol::Tcp => "tcp",
        Protocol::TcpFirst => "tcp-first",
    }
}

/// Resident memory of the sidecars, MiB.
fn memory(west: &Cluster) -> anyhow::Result<Vec<f64>> {
    let of = |w: &str| {
        let pid = west.pid(&format!("{w}-proxy")).context("a proxy")?;
        let statm = std::fs::read_to_string(format!("/proc/{pid}/statm"))?;
        Ok(statm.split(' ').nth(1).context("statm")?.parse::<f64>()? / 256.0)
    };
    ["client-v1", "alpha-v1", "alpha-v2"].into_iter().map(of).collect()
}

fn median(samples: &[Vec<f64>], which: usize) -> f64 {
    let mut v: Vec<f64> = samples.iter().map(|s| s[which]).collect();
    v.sort_by(f64::total_cmp);
    v.get(v.len() / 2).copied().unwrap_or_default()
}

async fn run(west: &Cluster, dir: &Path, seconds: u64) -> anyhow::Result<()> {
    let client = west.workload("client");
    let load = [
        h2load(west, dir, "load-h1", seconds - 5, "--h1", ports::HTTP)?,
        h2load(west, dir, "load-h2", seconds - 5, "-m 5", ports::HTTP2)?,
    ];
    let begun = Instant::now();
    let end = begun + Duration::from_secs(seconds);
    let calls = async {
        let mut made = vec![(0usize, Vec::new()); Protocol::ALL.len()];
        while Instant::now() + Duration::from_secs(2) < end {
            let slice = (end - Instant::now()).min(Duration::from_secs(10)) - Duration::from_secs(1);
            let orders = Protocol::ALL.map(|p| {
                let mut c = Calls::new(p, &host("alpha"), 0);
                c.payload = "x".repeat(if p == Protocol::Http1 { 20_000 } else { 100 });
                (c.duration_ms, c.concurrency, c.pause_ms) = (slice.as_millis() as u64, 2, 20);
                c
            });
            let mut waiting = Vec::new();
            for c in &orders {
                waiting.push(client.call(c));
            }
            for (n, o) in futures(waiting).await.into_iter().enumerate() {
                for o in o? {
                    made[n].0 += 1;
                    if !o.ok {
                        made[n].1.push(o);
                    }
                }
            }
        }
        anyhow::Ok(made)
    };
    let changes = async {
        let mut samples = Vec::new();
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        for n in 0.. {
            tick.tick().await;
            if Instant::now() >= end {
                break;
            }
            change(west, n)?;
            samples.push(memory(west)?);
            if n % 60 == 59 {
                println!("   {:>4} s: {:.1?} MiB", n + 1, samples.last().unwrap_or(&vec![]));
            }
        }
        anyhow::Ok(samples)
    };
    let (made, samples) = tokio::try_join!(calls, changes)?;
    let mut failed = 0;
    for (p, (n, bad)) in Protocol::ALL.iter().zip(&made) {
        let example = bad.first().map(|o| format!(", such as {o:?}")).unwrap_or_default();
        println!("   {:<18} {n:>7} calls, {} failed{example}", p.name(), bad.len());
        failed += bad.len();
    }
    for l in load {
        let (runs, requests) = wait_for(&l).await?;
        println!(
            "   {:<18} {requests:>7} requests of h2load on kept connections, {runs} times, 0 failed",
            l.name
        );
        ensure!(requests > 10 * runs, "{}: {requests} requests in {runs} runs", l.name);
    }
    // The same number of samples at the end of the warm-up and at the end of all.
    let (warm, some) = (warm_up(seconds) as usize, (seconds / 8).clamp(5, 60) as usize);
    ensure!(samples.len() > warm + some, "{} samples", samples.len());
    let (first, last) = (&samples[warm..warm + some], &samples[samples.len() - some..]);
    for (i, name) in ["client", "alpha-v1", "alpha-v2"].iter().enumerate() {
        let (a, b) = (median(first, i), median(last, i));
        let growth = (b / a - 1.0) * 100.0;
        println!(
            "   memory of {name}'s sidecar: {a:.1} MiB after {warm} s, {b:.1} MiB at the end: {growth:+.1} %"
        );
        ensure!(growth < growth_limit(seconds), "memory of {name} grew by {growth:.1} %");
    }
    ensure!(failed == 0, "{failed} calls failed");
    println!("   {} changes of configuration", samples.len());
    Ok(())
}

/// Waits for the end of a load: runs, and requests, none of which may have failed.
async fn wait_for(load: &Process) -> anyhow::Result<(usize, usize)> {
    flotilla_e2e::netns::until(&load.name, Duration::from_secs(20), async || {
        ensure!(load.log().ends_with("END\n"), "has not ended");
        Ok(())
    })
    .await?;
    let log = load.log();
    let (mut runs, mut requests) = (0, 0);
    for line in log.lines() {
        if let Some(r) = line.strip_prefix("requests: ") {
            ensure!(r.contains(" 0 failed, 0 errored, 0 timeout"), "run {runs} of {}: {line}", load.name);
            runs += 1;
            requests += r.split(' ').next().and_then(|n| n.parse::<usize>().ok()).context("h2load")?;
        }
        ensure!(
            !line.starts_with("status codes:") || line.contains(" 0 4xx, 0 5xx"),
            "run {runs} of {}: {line}",
            load.name
        );
    }
    Ok((runs, requests))
}

/// All of them, side by side.
async fn futures<T>(all: Vec<impl Future<Output = T>>) -> Vec<T> {
    let mut all: Vec<_> = all.into_iter().map(|f| (Box::pin(f), None)).collect();
    std::future::poll_fn(|cx| {
        let mut pending = false;
        for (f, done) in &mut all {
            if done.is_none() {
                match f.as_mut().poll(cx) {
                    std::task::Poll::Ready(t) => *done = Some(t),
                    std::task::Poll::Pending => pending = true,
                }
            }
        }
        if pending { std::task::Poll::Pending } else { std::task::Poll::Ready(()) }
    })
    .await;
    all.into_iter().filter_map(|(_, t)| t).collect()
}

//! The samples of `deploy/samples/traffic`, one after the other, with what a client sees of each.

use std::{path::Path, time::Duration};

use anyhow::{Context, ensure};
use flotilla_e2e::{
    netns::{Cluster, NAMESPACE, Options, World, until},
    programs::Process,
};
use mesh_testkit::{
    call::{Calls, Protocol},
    echo::DELAY_MS,
};

use crate::support::{all_ok, calls, of_version, scenario, served_from};

const CONVERGE: Duration = Duration::from_secs(10);

/// A sample as it stands.
pub(crate) fn sample(name: &str) -> anyhow::Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/samples/traffic").join(name);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// The same in the namespace of the workloads.
pub(crate) fn in_namespace(text: &str) -> String {
    text.replace("metadata:\n", &format!("metadata:\n  namespace: {NAMESPACE}\n"))
}

/// Applies a sample to the namespace of the workloads.
fn apply(west: &Cluster, name: &str) -> anyhow::Result<()> {
    let text = sample(name)?;
    // A file that replaces another has its name; here each kind and name has one.
    let file = match name {
        "all-v1.yaml" | "one-user.yaml" | "half.yaml" | "all-v3.yaml" | "timeout.yaml" => "reviews.yaml",
        "delay.yaml" | "abort.yaml" => "ratings.yaml",
        "circuit-breaker.yaml" | "mirror.yaml" => "httpbin.yaml",
        other => other,
    };
    if name == "registry-only.yaml" {
        return west.write("mesh.yaml", &text);
    }
    west.write(file, &in_namespace(&text))
}

fn get(service: &str, count: u32) -> Calls {
    calls(Protocol::Http1, service, count)
}

fn with(mut c: Calls, header: &str, value: &str) -> Calls {
    c.headers.insert(header.into(), value.into());
    c
}

#[test]
#[ignore = "needs root and network namespaces"]
fn traffic_samples_do_what_they_say() {
    scenario("samples of traffic management", async || {
        let world = World::start(&Options {
            echo: env!("CARGO_BIN_EXE_flotilla-echo").into(),
            quic: false,
            trunk_transport: "quic",
            gateways: 1,
            namespace: |_| NAMESPACE,
            locality: |_| "",
            clusters: vec![(
                "west",
                vec![
                    ("client", "v1"),
                    ("reviews", "v1"),
                    ("reviews", "v2"),
                    ("reviews", "v3"),
                    ("ratings", "v1"),
                    ("httpbin", "v1"),
                    ("httpbin", "v2"),
                ],
            )],
        })
        .await?;
        let west = &world.clusters[0];
        for s in ["reviews", "ratings", "httpbin"] {
            served_from(west.workload("client"), s, &["west"]).await?;
        }
        routes(west).await?;
        timeouts_and_faults(west).await?;
        circuit_breaker(west).await?;
        mirror(west).await?;
        egress(west, &world.dir).await
    });
}

async fn routes(west: &Cluster) -> anyhow::Result<()> {
    let client = west.workload("client");
    let o = client.call(&get("reviews", 60)).await?;
    ensure!(["v1", "v2", "v3"].iter().all(|v| of_version(&o, v) > 0), "without a route all versions answer");
    apply(west, "subsets.yaml")?;
    apply(west, "all-v1.yaml")?;
    until("all v1", CONVERGE, async || {
        let o = client.call(&get("reviews", 30)).await?;
        ensure!(of_version(&o, "v1") == 30, "{} of 30", of_version(&o, "v1"));
        Ok(())
    })
    .await?;
    println!("   all-v1: 30 of 30");
    apply(west, "one-user.yaml")?;
    until("one user", CONVERGE, async || {
        let his = client.call(&with(get("reviews", 10), "end-user", "jason")).await?;
        let theirs = client.call(&with(get("reviews", 10), "end-user", "joe")).await?;
        let seen = (of_version(&his, "v2"), of_version(&theirs, "v1"));
        ensure!(seen == (10, 10), "{seen:?}");
        Ok(())
    })
    .await?;
    println!("   one-user: 10 of 10 to v2 for jason, 10 of 10 to v1 for joe");
    apply(west, "half.yaml")?;
    until("some v3", CONVERGE, async || {
        ensure!(of_version(&client.call(&get("reviews", 10)).await?, "v3") > 0, "none");
        Ok(())
    })
    .await?;
    let o = client.call(&get("reviews", 400)).await?;
    all_ok("half", &o)?;
    let share = of_version(&o, "v3") as f64 / 4.0;
    println!("   half: {share:.1} % of 400 to v3");
    // The standard deviation of 400 draws at one half is 2.5 points.
    ensure!((40.0..=60.0).contains(&share) && of_version(&o, "v2") == 0, "{share} %");
    apply(west, "all-v3.yaml")?;
    until("all v3", CONVERGE, async || {
        let n = of_version(&client.call(&get("reviews", 30)).await?, "v3");
        ensure!(n == 30, "{n} of 30");
        Ok(())
    })
    .await?;
    println!("   all-v3: 30 of 30");
    Ok(())
}

async fn timeouts_and_faults(west: &Cluster) -> anyhow::Result<()> {
    let client = west.workload("client");
    apply(west, "timeout.yaml")?;
    until("the timeout", CONVERGE, async || {
        let o = client.call(&with(get("reviews", 1), DELAY_MS, "2000")).await?;
        ensure!(o[0].status == 504 && (450.0..1_500.0).contains(&o[0].ms), "{:?}", o[0]);
        println!("   timeout: {} after {:.0} ms", o[0].status, o[0].ms);
        Ok(())
    })
    .await?;
    apply(west, "delay.yaml")?;
    until("the delay", CONVERGE, async || {
        let his = client.call(&with(get("ratings", 1), "end-user", "jason")).await?;
        ensure!(his[0].ok && (2_000.0..3_500.0).contains(&his[0].ms), "{:?}", his[0]);
        let theirs = client.call(&get("ratings", 5)).await?;
        all_ok("others", &theirs)?;
        ensure!(theirs.iter().all(|o| o.ms < 1_500.0), "{theirs:?}");
        println!("   delay: {:.0} ms for jason, {:.0} ms for another", his[0].ms, theirs[0].ms);
        Ok(())
    })
    .await?;
    apply(west, "abort.yaml")?;
    until("the abort", CONVERGE, async || {
        let his = client.call(&with(get("ratings", 5), "end-user", "jason")).await?;
        let aborted =
            his.iter().filter(|o| o.status == 500 && o.error.contains("fault filter abort")).count();
        ensure!(aborted == 5, "{aborted} of 5, {:?}", his[0]);
        all_ok("others", &client.call(&get("ratings", 5)).await?)
    })
    .await?;
    println!("   abort: 500 for jason, 200 for others");
    west.remove("ratings.yaml")
}

/// Requests to httpbin that the proxy of `workload` has refused for lack of room (flag `UO`).
fn overflow(west: &Cluster, workload: &str) -> anyhow::Result<u64> {
    let all = west.admin(workload, "/stats/prometheus")?;
    let refused = |l: &&str| {
        l.starts_with("istio_requests_total")
            && l.contains("response_flags=\"UO\"")
            && l.contains("destination_service_name=\"httpbin\"")
    };
    Ok(all.lines().filter(refused).filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok()).sum())
}

async fn circuit_breaker(west: &Cluster) -> anyhow::Result<()> {
    let client = west.workload("client");
    apply(west, "circuit-breaker.yaml")?;
    let mut many = with(get("httpbin", 40), DELAY_MS, "30");
    (many.concurrency, many.pause_ms) = (5, 20);
    // A service's pool settings hold at both ends (as in Istio): a server's proxy that still sees the connection that the
    // client has just left refuses what comes on the next one, and the client's passes its 503 on.
    let by_either = || -> anyhow::Result<(u64, u64)> {
        let servers = overflow(west, "httpbin-v1")? + overflow(west, "httpbin-v2")?;
        Ok((overflow(west, "client-v1")?, servers))
    };
    let before = by_either()?;
    let (mut seen, mut refusals) = ((0, 0), 0);
    until("the circuit breaker", CONVERGE, async || {
        let o = client.call(&many).await?;
        let refused = o.iter().filter(|o| o.status == 503 && o.error.contains("overflow")).count();
        refusals += refused as u64;
        seen = (o.iter().filter(|o| o.ok).count(), refused);
        ensure!(refused > 0 && seen.0 > 0 && seen.0 + refused == o.len(), "{seen:?}, {:?}", o.last());
        Ok(())
    })
    .await?;
    all_ok("one caller", &client.call(&get("httpbin", 20)).await?)?;
    // A request is counted after its answer has gone.
    let mut counted = (0, 0);
    until("all are counted", CONVERGE, async || {
        let now = by_either()?;
        counted = (now.0 - before.0, now.1 - before.1);
        ensure!(counted.0 + counted.1 == refusals && counted.0 > counted.1, "{counted:?} of {refusals}");
        Ok(())
    })
    .await?;
    println!(
        "   circuit-breaker: five callers {} times 200, {} times 503; counted by the client's proxy {}, by the servers' {}; \
         one caller 20 of 20",
        seen.0, seen.1, counted.0, counted.1
    );
    Ok(())
}

async fn mirror(west: &Cluster) -> anyhow::Result<()> {
    let client = west.workload("client");
    apply(west, "registry-only.yaml")?;
    apply(west, "mirror.yaml")?;
    until("the copies", CONVERGE, async || {
        let o = client.call(&get("httpbin", 20)).await?;
        ensure!(of_version(&o, "v1") == 20, "{} of 20 from v1", of_version(&o, "v1"));
        let log = west.log("httpbin-v2-proxy");
        let copies = log.lines().filter(|l| l.contains("httpbin.shop.svc.cluster.local-shadow")).count();
        ensure!(copies >= 20, "{copies} copies");
        println!("   mirror: 20 of 20 answers from v1, {copies} copies in v2's log");
        Ok(())
    })
    .await?;
    Ok(())
}

async fn egress(west: &Cluster, dir: &Path) -> anyhow::Result<()> {
    let client = west.workload("client");
    let control = dir.join("outside.sock");
    let echo = env!("CARGO_BIN_EXE_flotilla-echo");
    let line = format!(
        "ip netns exec {} {echo} --workload outside --cluster nowhere --listen 10.10.0.1 --control {}",
        west.netns("node"),
        control.display()
    );
    let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
    let _outside = Process::start("outside", dir, &words)?;
    let unknown = Calls::new(Protocol::Http1, "10.10.0.1", 1);
    until("nobody knows it", CONVERGE, async || {
        let o = client.call(&unknown).await?;
        ensure!(o[0].status == 502, "{:?}", o[0]);
        Ok(())
    })
    .await?;
    println!("   registry-only: 502 for an address that nobody declared");
    apply(west, "egress.yaml")?;
    let known = Calls::new(Protocol::Http1, "outside.example", 1);
    until("the service outside", CONVERGE, async || {
        let o = client.call(&known).await?;
        ensure!(o[0].ok && o[0].cluster == "nowhere", "{:?}", o[0]);
        Ok(())
    })
    .await?;
    let slow = client.call(&with(known, DELAY_MS, "3000")).await?;
    ensure!(slow[0].status == 504 && (950.0..2_500.0).contains(&slow[0].ms), "{:?}", slow[0]);
    println!("   egress: 200, and 504 after {:.0} ms from one that takes three seconds", slow[0].ms);
    // Undeclared addresses stay closed.
    let o = client.call(&unknown).await?;
    ensure!(o[0].status == 502, "{:?}", o[0]);
    Ok(())
}

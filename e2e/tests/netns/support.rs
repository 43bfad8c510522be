//! What the scenarios share.

use std::{collections::BTreeMap, future::Future, time::Duration};

use anyhow::{bail, ensure};
use flotilla_e2e::netns::{NAMESPACE, Options, Workload, World, until};
use mesh_testkit::call::{Calls, Outcome, Protocol};

/// Runs a scenario.
pub(crate) fn scenario<F: Future<Output = anyhow::Result<()>>>(name: &str, f: impl FnOnce() -> F) {
    println!("\n== {name}");
    let begun = std::time::Instant::now();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    if let Err(e) = runtime.expect("a runtime").block_on(f()) {
        panic!("{name}: {e:#}");
    }
    println!("   {:.1} s", begun.elapsed().as_secs_f64());
}

/// Clusters west and east: `client` in both, `alpha` in west, `beta` in east, `gamma` in both.
pub(crate) fn options(quic: bool) -> Options {
    Options {
        echo: env!("CARGO_BIN_EXE_flotilla-echo").into(),
        quic,
        trunk_transport: "quic",
        gateways: 1,
        namespace: |_| NAMESPACE,
        locality: |_| "",
        clusters: vec![
            ("west", vec![("client", "v1"), ("alpha", "v1"), ("gamma", "v1")]),
            ("east", vec![("client", "v1"), ("beta", "v1"), ("gamma", "v2")]),
        ],
    }
}

/// Name of a service for applications.
pub(crate) fn host(service: &str) -> String {
    format!("{service}.{NAMESPACE}.svc.cluster.local")
}

/// Calls of one kind.
pub(crate) fn calls(protocol: Protocol, service: &str, count: u32) -> Calls {
    let mut c = Calls::new(protocol, &host(service), count);
    c.payload = "hello".into();
    c
}

/// Requests of several clients for a time, as an application under load makes them.
pub(crate) fn load(service: &str, duration: Duration) -> Calls {
    let mut c = calls(Protocol::Http1, service, 0);
    c.duration_ms = u64::try_from(duration.as_millis()).expect("a short time");
    (c.concurrency, c.pause_ms, c.timeout_ms) = (4, 20, 5_000);
    c
}

/// Outcomes by the cluster that answered.
pub(crate) fn by_cluster(outcomes: &[Outcome]) -> BTreeMap<&str, usize> {
    let mut m = BTreeMap::new();
    for o in outcomes {
        *m.entry(if o.ok { o.cluster.as_str() } else { "failed" }).or_default() += 1;
    }
    m
}

/// Waits until calls to `service` are answered from every cluster of `clusters`.
pub(crate) async fn served_from(
    source: &Workload,
    service: &str,
    clusters: &[&str],
) -> anyhow::Result<Duration> {
    let what = format!("{} is answered from {clusters:?}", service);
    until(&what, Duration::from_secs(20), async || {
        let mut c = calls(Protocol::Http1, service, 8);
        c.timeout_ms = 2_000;
        let o = source.call(&c).await?;
        let by = by_cluster(&o);
        for cluster in clusters {
            ensure!(by.contains_key(cluster), "{by:?}, such as {:?}", o.iter().find(|o| !o.ok).or(o.last()));
        }
        ensure!(!by.contains_key("failed"), "{by:?}, {:?}", o.iter().find(|o| !o.ok));
        Ok(())
    })
    .await
}

/// `gamma` is everywhere, `beta` in east alone.
pub(crate) fn three_clusters(options: Options) -> Options {
    Options {
        clusters: vec![
            ("west", vec![("client", "v1"), ("gamma", "v1")]),
            ("east", vec![("client", "v1"), ("beta", "v1"), ("gamma", "v2")]),
            ("north", vec![("client", "v1"), ("gamma", "v3")]),
        ],
        ..options
    }
}

/// Waits until everything of [`options`] reaches everything.
pub(crate) async fn settled(world: &World) -> anyhow::Result<()> {
    for (cluster, services) in world.clusters.iter().zip([["beta", "gamma"], ["alpha", "gamma"]]) {
        let other = if cluster.name == "west" { "east" } else { "west" };
        served_from(cluster.workload("client"), services[0], &[other]).await?;
        served_from(cluster.workload("client"), services[1], &["west", "east"]).await?;
    }
    Ok(())
}

/// How many were answered by this version.
pub(crate) fn of_version(outcomes: &[Outcome], v: &str) -> usize {
    outcomes.iter().filter(|o| o.ok && o.version == v).count()
}

/// All calls succeeded.
pub(crate) fn all_ok(what: &str, outcomes: &[Outcome]) -> anyhow::Result<()> {
    if let Some(bad) = outcomes.iter().find(|o| !o.ok) {
        let n = outcomes.iter().filter(|o| !o.ok).count();
        bail!("{what}: {n} of {} calls failed, such as {bad:?}", outcomes.len());
    }
    Ok(())
}

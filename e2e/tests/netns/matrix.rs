//! Every source to every destination in every protocol, and what the link between clusters shows of it.

use std::{path::Path, process::Command};

use anyhow::{Context, ensure};
use flotilla_e2e::netns::{NAMESPACE, World};
use mesh_testkit::call::Protocol;

use crate::support::{all_ok, by_cluster, calls, options, scenario, settled};

/// In every request; nothing else on the machine says it.
const MARKER: &str = "flotilla-plaintext-marker-7d1c9b";

#[test]
#[ignore = "needs root and network namespaces"]
fn every_source_destination_and_protocol_and_nothing_to_read_on_the_way() {
    scenario("matrix", async || {
        let world = World::start(&options(false)).await?;
        settled(&world).await?;
        let pcap = world.dir.join("wan.pcap");
        world.wan.capture(&pcap)?;
        let failed = matrix(&world).await?;
        world.wan.end_capture()?;
        ensure!(failed.is_empty(), "failed:\n{}", failed.join("\n"));
        capture_is_opaque(&pcap)?;
        no_workload_key_on_gateways(&world)
    });
}

/// Prints the table; answers with what failed.
async fn matrix(world: &World) -> anyhow::Result<Vec<String>> {
    let mut failed = Vec::new();
    println!(
        "   {:<7} {:<14} {:<17} {:>6} {:>9}  answered by",
        "source", "destination", "protocol", "ok", "median"
    );
    for source in &world.clusters {
        for (service, kind) in [("alpha", "west"), ("beta", "east"), ("gamma", "both")] {
            for protocol in Protocol::ALL {
                let n = if kind == "both" { 12 } else { 4 };
                let mut c = calls(protocol, service, n);
                c.payload = MARKER.into();
                c.headers.insert("x-marker".into(), MARKER.into());
                let outcomes = source.workload("client").call(&c).await?;
                let by = by_cluster(&outcomes);
                let ok = outcomes.iter().filter(|o| o.ok).count();
                let mut times: Vec<f64> = outcomes.iter().map(|o| o.ms).collect();
                times.sort_by(f64::total_cmp);
                let median = times.get(times.len() / 2).copied().unwrap_or_default();
                println!(
                    "   {:<7} {:<14} {:<17} {ok:>3}/{n:<2} {median:>6.1} ms  {by:?}",
                    source.name,
                    format!("{service} ({kind})"),
                    protocol.name(),
                );
                let row = format!("{} -> {service} {}", source.name, protocol.name());
                if let Err(e) = all_ok(&row, &outcomes) {
                    failed.push(format!("{e:#}"));
                    continue;
                }
                let expected: &[&str] = if kind == "both" { &["east", "west"] } else { &[kind] };
                if by.keys().copied().collect::<Vec<_>>() != expected {
                    failed.push(format!("{row}: answered by {by:?}, expected {expected:?}"));
                }
                let caller = format!("spiffe://mesh.local/ns/{NAMESPACE}/sa/client");
                let wrong = outcomes.iter().find(|o| protocol.is_http() && o.caller != caller);
                if let Some(o) = wrong {
                    failed.push(format!("{row}: the server's sidecar saw {:?}, not {caller}", o.caller));
                }
            }
        }
    }
    Ok(failed)
}

/// Nothing of a request is in the capture, and the capture holds the sessions that carried them.
fn capture_is_opaque(pcap: &Path) -> anyhow::Result<()> {
    let bytes = std::fs::read(pcap).context("capture")?;
    let holds = |what: &[u8]| bytes.windows(what.len()).any(|w| w == what);
    println!("   capture on the link: {} bytes", bytes.len());
    // The service's name is in the clear, as SNI: proof that the sessions passed here.
    let sni = format!("outbound_.8080_._.beta.{NAMESPACE}.svc.east.clusterset.local");
    ensure!(holds(sni.as_bytes()), "no session for {sni} passed the link: the capture proves nothing");
    for plain in
        [MARKER, "HTTP/1.1", "POST / ", "GET / ", "PRI * HTTP/2.0", "x-marker", "grpc-status", "websocket"]
    {
        ensure!(!holds(plain.as_bytes()), "{plain:?} was on the link in the clear");
    }
    // The principal is part of certificates, which TLS 1.3 encrypts.
    ensure!(!holds(b"spiffe://"), "a certificate was on the link in the clear");
    Ok(())
}

/// Gateways hold one certificate and key, their own.
fn no_workload_key_on_gateways(world: &World) -> anyhow::Result<()> {
    for c in &world.clusters {
        let mut keys = 0;
        let mut files = vec![c.gateway_state()];
        while let Some(path) = files.pop() {
            if path.is_dir() {
                files.extend(std::fs::read_dir(&path)?.flatten().map(|e| e.path()));
                continue;
            }
            let content = std::fs::read(&path)?;
            let text = String::from_utf8_lossy(&content);
            let headers = text.split("-----BEGIN ").skip(1).filter_map(|s| s.split("-----").next());
            keys += headers.filter(|h| h.contains("PRIVATE KEY")).count();
            for (n, chain) in text.split("-----BEGIN CERTIFICATE-----").enumerate().skip(1) {
                let pem = format!("-----BEGIN CERTIFICATE-----{chain}");
                let shown = certificate(&pem)?;
                ensure!(
                    !shown.contains("/ns/") || shown.contains("/ns/flotilla-system/sa/eastwest"),
                    "{}, certificate {n}: {shown}",
                    path.display()
                );
            }
        }
        ensure!(keys <= 1, "{}: {keys} private keys in the gateway's state", c.name);
        let dump = c.admin("gw", "/config_dump")?;
        for word in ["PRIVATE KEY", "BEGIN CERTIFICATE"] {
            ensure!(!dump.contains(word), "{}: {word} in the gateway's configuration", c.name);
        }
        println!("   {}: the gateway's state holds {keys} key, its own (sa/eastwest)", c.name);
    }
    Ok(())
}

/// Subject alternative names of a certificate.
fn certificate(pem: &str) -> anyhow::Result<String> {
    use std::io::Write;
    let mut child = Command::new("openssl")
        .args(["x509", "-noout", "-ext", "subjectAltName"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .context("openssl")?;
    child.stdin.take().context("no input")?.write_all(pem.as_bytes())?;
    let out = child.wait_with_output()?;
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

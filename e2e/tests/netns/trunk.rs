//! Clusters joined by QUIC trunks.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use flotilla_e2e::{
    netns::{World, until},
    wan::Rule,
};
use mesh_testkit::call::Protocol;

use crate::support::{all_ok, by_cluster, calls, options, scenario, served_from, settled};

#[test]
#[ignore = "needs root and network namespaces"]
fn quic_carries_everything_and_tcp_takes_over_within_two_seconds() {
    scenario("QUIC trunk", async || {
        let world = World::start(&options(true)).await?;
        settled(&world).await?;
        let pcap = world.dir.join("quic.pcap");
        // A gateway that dialled before its peer had a certificate uses TCP until it tries again.
        let up = until("new sessions by QUIC", Duration::from_secs(60), async || {
            world.wan.capture(&pcap)?;
            for (source, service) in [(0, "beta"), (1, "alpha")] {
                let o = world.clusters[source]
                    .workload("client")
                    .call(&calls(Protocol::Tcp, service, 20))
                    .await?;
                all_ok(service, &o)?;
            }
            world.wan.end_capture()?;
            let (udp, tcp) = payload(&std::fs::read(&pcap)?)?;
            // Sessions that began over TCP stay there, the federation's among them.
            ensure!(udp > 2 * tcp, "{udp} bytes by UDP, {tcp} by TCP");
            Ok(())
        })
        .await?;
        println!("   new sessions are by QUIC after {:.1} s", up.as_secs_f64());
        world.wan.capture(&pcap)?;
        for (source, service) in [(0, "beta"), (1, "alpha")] {
            for protocol in Protocol::ALL {
                let outcomes =
                    world.clusters[source].workload("client").call(&calls(protocol, service, 6)).await?;
                all_ok(&format!("{service} {}", protocol.name()), &outcomes)?;
                println!(
                    "   {} -> {service} {:<17} {:?}",
                    world.clusters[source].name,
                    protocol.name(),
                    by_cluster(&outcomes)
                );
            }
        }
        world.wan.end_capture()?;
        let (udp, tcp) = payload(&std::fs::read(&pcap)?)?;
        println!("   on the link: {udp} bytes by UDP, {tcp} by TCP");
        ensure!(udp > tcp, "the trunk carried {udp} bytes, TCP {tcp}: it is not in use");

        // A network that drops UDP.
        world.wan.set_all(Rule { no_udp: true, ..Rule::CLEAN });
        let begun = Instant::now();
        let client = world.clusters[0].workload("client");
        let mut c = calls(Protocol::Http1, "beta", 1);
        c.timeout_ms = 2_000;
        let (mut failed, mut first) = (0, None);
        while begun.elapsed() < Duration::from_secs(10) {
            let o = client.call(&c).await?;
            if o.iter().all(|o| o.ok) {
                first = Some(begun.elapsed());
                break;
            }
            failed += 1;
        }
        let first = first.context("no answer within 10 s after UDP was dropped")?;
        println!("   UDP dropped: first answer by TCP after {:.2} s, {failed} failed", first.as_secs_f64());
        ensure!(first <= Duration::from_millis(2_200), "more than 2 s");
        all_ok("by TCP", &client.call(&calls(Protocol::Http1, "beta", 20)).await?)?;
        println!("   {}", explained(&world, "UDP to port 15443 of east's gateways").await?);
        world.wan.set_all(Rule::CLEAN);
        served_from(client, "beta", &["east"]).await?;
        println!("   {}", explained(&world, "QUIC (bbr), round trip").await?);
        Ok(())
    });
}

/// Waits until `flotilla explain` says `what` of the way to beta, and answers with the line. Gateways report every five
/// seconds, and QUIC is tried again after ten.
async fn explained(world: &World, what: &str) -> anyhow::Result<String> {
    let mut line = None;
    let took = until(&format!("explain says {what:?}"), Duration::from_secs(30), async || {
        let said = world.clusters[0].flotilla(&["explain", "client-v1.shop", "beta"])?;
        line = said.out.lines().find(|l| l.contains(what)).map(str::to_owned);
        ensure!(line.is_some(), "{}", said.out);
        Ok(())
    })
    .await?;
    Ok(format!("explain, after {:.1} s: {}", took.as_secs_f64(), line.unwrap_or_default().trim()))
}

/// Bytes of UDP and TCP payload in a capture, by port 15443.
pub(crate) fn payload(pcap: &[u8]) -> anyhow::Result<(usize, usize)> {
    let (mut udp, mut tcp) = (0, 0);
    let mut rest = pcap.get(24..).context("no capture")?;
    while let Some(head) = rest.get(..16) {
        let n = usize::try_from(u32::from_le_bytes(head[8..12].try_into()?))?;
        let frame = rest.get(16..16 + n).context("short capture")?;
        rest = &rest[16 + n..];
        if frame.get(12..14) != Some(&[8, 0]) {
            continue;
        }
        let ip = &frame[14..];
        let header = usize::from(ip[0] & 15) * 4;
        let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
        match ip[9] {
            17 => udp += total.saturating_sub(header + 8),
            6 => tcp += total.saturating_sub(header + usize::from(ip[header + 12] >> 4) * 4),
            _ => {}
        }
    }
    Ok((udp, tcp))
}

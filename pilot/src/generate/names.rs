//! The name table: what the workload's resolver answers for mesh names.
//!
//! A headless service is its workloads that are ready. Each has a name of its own, which is the workload's if it can be a
//! label: Kubernetes' specification leaves the identifier of an endpoint without a host name to the platform. Workloads
//! of other clusters are not known here, as exports tell weights and not pods, so they have neither.

use std::collections::BTreeMap;

use mesh_model::registry::{Endpoint, Health, Protocol, Resolution, ServicePort};
use mesh_xds::nds::{NameInfo, NamePod, NamePort, NameTable};

use super::Ctx;
use crate::index::{Entry, Origin};

pub(super) fn generate(ctx: &Ctx<'_>) -> NameTable {
    let mut table = BTreeMap::new();
    for e in ctx.visible() {
        let s = &e.service;
        let ips: Vec<String> = if s.headless {
            ready(e).map(|e| e.address.clone()).filter(|a| a.parse::<std::net::IpAddr>().is_ok()).collect()
        } else if matches!(s.resolution, Resolution::Passthrough | Resolution::ByName) && e.assigned_vip {
            // Its callers have real addresses to connect to; ours would lead nowhere.
            continue;
        } else {
            s.addresses.iter().map(ToString::to_string).collect()
        };
        if ips.is_empty() {
            continue;
        }
        let platform = !matches!(e.origin, Origin::Entry | Origin::Consul);
        let registry = match e.origin {
            Origin::Platform => "Kubernetes",
            Origin::Entry => "External",
            Origin::Consul => "Consul",
            Origin::Imported | Origin::Member => "Federation",
        };
        let mut alt_hosts = e.aliases.clone();
        if platform && e.origin != Origin::Member {
            alt_hosts.push(format!("{}.{}.svc", s.name, s.namespace));
            alt_hosts.push(format!("{}.{}", s.name, s.namespace));
            if s.namespace == ctx.proxy.namespace {
                alt_hosts.push(s.name.clone());
            }
        }
        let mut ips = ips;
        ips.sort();
        ips.dedup();
        table.insert(
            s.host.clone(),
            NameInfo {
                ips,
                registry: registry.to_owned(),
                shortname: if platform { s.name.clone() } else { String::new() },
                namespace: s.namespace.clone(),
                alt_hosts,
                ports: if platform { ports(e) } else { vec![] },
                headless: s.headless,
                pods: if s.headless { pods(ctx, e) } else { vec![] },
            },
        );
    }
    NameTable { table }
}

/// Endpoints that names lead to.
fn ready(e: &Entry) -> impl Iterator<Item = &Endpoint> {
    e.endpoints.iter().filter(|x| e.names_of_unready || x.health == Health::Healthy)
}

/// The workloads of a headless service that can have names.
fn pods(ctx: &Ctx<'_>, e: &Entry) -> Vec<NamePod> {
    let mut all = BTreeMap::<&str, NamePod>::new();
    for endpoint in ready(e).filter(|x| x.address.parse::<std::net::IpAddr>().is_ok()) {
        let Some((_, name)) = endpoint.workload.as_deref().and_then(|w| w.split_once('/')) else { continue };
        if !is_label(name) {
            continue;
        }
        let cluster = endpoint.cluster.as_ref().unwrap_or(&ctx.world.settings.cluster);
        let pod = all.entry(name).or_insert_with(|| NamePod {
            name: name.to_owned(),
            cluster: cluster.to_string(),
            ..NamePod::default()
        });
        if !pod.ips.contains(&endpoint.address) {
            pod.ips.push(endpoint.address.clone());
        }
        let udp = e.udp_ports.iter().any(|p| p.name == endpoint.service_port);
        let port =
            NamePort { name: endpoint.service_port.to_ascii_lowercase(), number: endpoint.port.into(), udp };
        if !port.name.is_empty() && !pod.ports.contains(&port) {
            pod.ports.push(port);
        }
    }
    all.into_values().collect()
}

/// Whether it can be one label of a name (RFC 1123).
fn is_label(s: &str) -> bool {
    (1..=63).contains(&s.len())
        && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !s.starts_with('-')
        && !s.ends_with('-')
}

/// Ports with names (MCS DNS specification: only these have SRV records).
fn ports(e: &Entry) -> Vec<NamePort> {
    let of = |udp: bool| {
        move |p: &ServicePort| NamePort { name: p.name.to_ascii_lowercase(), number: p.port.into(), udp }
    };
    let udp = e.udp_ports.iter().map(of(true));
    let tcp = e.service.ports.iter().filter(|p| p.protocol != Protocol::Udp).map(of(false));
    tcp.chain(udp).filter(|p| !p.name.is_empty()).collect()
}

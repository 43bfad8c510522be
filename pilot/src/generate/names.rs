//! The name table: what the workload's resolver answers for mesh names.

use std::collections::BTreeMap;

use mesh_model::registry::{Protocol, Resolution, ServicePort};
use mesh_xds::nds::{NameInfo, NamePort, NameTable};

use super::Ctx;
use crate::index::{Entry, Origin};

pub(super) fn generate(ctx: &Ctx<'_>) -> NameTable {
    let mut table = BTreeMap::new();
    for e in &ctx.visible {
        let s = &e.service;
        let ips: Vec<String> = if s.headless {
            e.endpoints
                .iter()
                .map(|e| e.address.clone())
                .filter(|a| a.parse::<std::net::IpAddr>().is_ok())
                .collect()
        } else if s.resolution == Resolution::Passthrough && e.assigned_vip {
            // Its callers have real addresses to connect to; ours would lead nowhere.
            continue;
        } else {
            s.addresses.iter().map(ToString::to_string).collect()
        };
        if ips.is_empty() {
            continue;
        }
        let platform = !matches!(e.origin, Origin::Entry);
        let registry = match e.origin {
            Origin::Platform => "Kubernetes",
            Origin::Entry => "External",
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
            },
        );
    }
    NameTable { table }
}

/// Ports with names (MCS DNS specification: only these have SRV records).
fn ports(e: &Entry) -> Vec<NamePort> {
    let of = |udp: bool| {
        move |p: &ServicePort| NamePort { name: p.name.to_ascii_lowercase(), number: p.port.into(), udp }
    };
    // Members do not have each other's ports of UDP.
    let udp = e.udp_ports.iter().filter(|_| e.origin == Origin::Platform).map(of(true));
    let tcp = e.service.ports.iter().filter(|p| p.protocol != Protocol::Udp).map(of(false));
    tcp.chain(udp).filter(|p| !p.name.is_empty()).collect()
}

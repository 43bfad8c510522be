//! Gateways: their workloads, the Services in front of these, certificates, and each other.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use mesh_model::authored::{Gateway, IntOrString, Secret, ServerTlsSettings, Service, Spec};

use super::{Findings, Resource, World, named};
use crate::{
    analyze::world::{Labels, Workload, shown},
    path::FieldPath,
};

fn pick(s: &Spec) -> Option<&Gateway> {
    match s {
        Spec::Gateway(g) => Some(g),
        _ => None,
    }
}

pub(super) fn check<'w, 'a>(world: &'w World<'a>, out: &mut Findings<'w, 'a>) {
    let secrets = secrets(world);
    let services: Vec<(&Resource<'a>, &Service)> = world
        .each(|s| match s {
            Spec::Service(x) => Some(&**x),
            _ => None,
        })
        .collect();
    for (r, g) in world.each(pick) {
        let workloads: Vec<&Workload<'a>> =
            world.workloads.iter().filter(|w| w.carries(&g.selector)).collect();
        if workloads.is_empty() && world.all_workloads && !usual(&g.selector) {
            let message = format!(
                "no workload carries the labels {}: correct the selector, or label the gateway's pods",
                shown(&g.selector)
            );
            out.add("IST0101", r, FieldPath::of("spec.selector"), message);
        } else {
            let all = world.all_workloads && !workloads.is_empty();
            ports(r, g, &workloads, &services, all, out);
        }
        // Where nothing is known of the workloads, their secrets are beside the Gateway or where gateways usually are.
        let namespaces = match workloads.first() {
            Some(w) => vec![w.namespace.as_str()],
            None => vec![r.namespace.as_str(), world.root_namespace.as_str()],
        };
        let all = world.all_workloads && !workloads.is_empty();
        credentials(r, g, &namespaces, &secrets, all, out);
    }
    conflicts(world, out);
    certificates(world, out);
}

/// All secrets by their full names.
pub(super) fn secrets<'a>(world: &World<'a>) -> BTreeMap<String, &'a Secret> {
    let all = world.each(|s| match s {
        Spec::Secret(x) => Some(&**x),
        _ => None,
    });
    all.map(|(r, s)| (r.full_name(), s)).collect()
}

/// Whether a selector is for the gateways that installations usually bring, whose workloads are seldom among the documents
/// of applications.
fn usual(selector: &Labels) -> bool {
    ["ingressgateway", "egressgateway"].iter().any(|name| {
        !selector.is_empty()
            && selector.iter().all(|(k, v)| {
                (k == "istio" && v == name) || (k == "app" && v.strip_prefix("istio-") == Some(name))
            })
    })
}

/// Ports of a Gateway that no Service leads to.
fn ports<'w, 'a>(
    r: &'w Resource<'a>,
    g: &Gateway,
    workloads: &[&Workload<'a>],
    services: &[(&Resource<'a>, &Service)],
    all: bool,
    out: &mut Findings<'w, 'a>,
) {
    if !all {
        return;
    }
    let mut open = BTreeSet::new();
    for w in workloads {
        for (_, s) in
            services.iter().filter(|(s, svc)| s.namespace == w.namespace && w.carries(&svc.selector))
        {
            for p in s.ports.iter().filter(|p| matches!(p.protocol.as_str(), "" | "TCP")) {
                match p.target_port {
                    Some(IntOrString::Int(n)) if n != 0 => open.extend([n, p.port]),
                    _ => open.extend([p.port]),
                }
            }
        }
    }
    for (i, port) in g.servers.iter().enumerate().filter_map(|(i, s)| Some((i, s.port.as_ref()?))) {
        if port.number != 0 && !open.contains(&port.number) {
            let message = format!(
                "no Service of the workloads {} leads to port {}: add it to the Service if clients come that way",
                shown(&g.selector),
                port.number
            );
            out.add("IST0162", r, FieldPath::of(&format!("spec.servers[{i}].port")), message);
        }
    }
}

/// Secrets that a Gateway names, in the namespace of its workloads.
fn credentials<'w, 'a>(
    r: &'w Resource<'a>,
    g: &Gateway,
    namespaces: &[&str],
    secrets: &BTreeMap<String, &Secret>,
    all: bool,
    out: &mut Findings<'w, 'a>,
) {
    for (i, tls) in g.servers.iter().enumerate().filter_map(|(i, s)| Some((i, s.tls.as_ref()?))) {
        let name = tls.credential_name.as_str();
        if name.is_empty() || name.contains("://") {
            continue;
        }
        let path = FieldPath::of(&format!("spec.servers[{i}].tls.credentialName"));
        credential(r, path, name, namespaces, secrets, all, out);
    }
}

/// A secret that a document names, in one of these namespaces.
pub(super) fn credential<'w, 'a>(
    r: &'w Resource<'a>,
    path: FieldPath,
    name: &str,
    namespaces: &[&str],
    secrets: &BTreeMap<String, &Secret>,
    all: bool,
    out: &mut Findings<'w, 'a>,
) {
    let qualified = |ns: &&str| if name.contains('/') { name.to_owned() } else { format!("{ns}/{name}") };
    let names: Vec<String> = namespaces.iter().map(qualified).collect();
    let full = names.iter().find(|n| secrets.contains_key(*n)).or(names.first()).cloned().unwrap_or_default();
    match secrets.get(&full) {
        Some(s) if !holds_certificate(s) => {
            let message = format!(
                "Secret {full} holds no certificate and key: it needs tls.crt and tls.key in PEM form"
            );
            out.add("IST0161", r, path, message);
        }
        // Secrets of gateways may also be files beside them; only a platform's documents are complete.
        None if all => {
            let message = format!(
                "Secret {full} does not exist: create it in the namespace of the gateway's workloads"
            );
            out.add("IST0101", r, path, message);
        }
        _ => {}
    }
}

/// Whether a secret has a certificate and a key, as far as their envelopes tell: PEM around DER. What is in these is not
/// looked at, neither their signatures nor how long they are good for.
fn holds_certificate(s: &Secret) -> bool {
    let value = |k: &str| -> Option<Vec<u8>> {
        if let Some(v) = s.string_data.get(k) {
            return Some(v.clone().into_bytes());
        }
        decode(s.data.get(k)?)
    };
    let has = |keys: [&str; 2], label: &str| {
        keys.iter().filter_map(|k| value(k)).any(|v| pem(&String::from_utf8_lossy(&v), label))
    };
    has(["tls.crt", "cert"], "CERTIFICATE") && has(["tls.key", "key"], "PRIVATE KEY")
}

fn decode(text: &str) -> Option<Vec<u8>> {
    let body: String = text.chars().filter(|c| !c.is_ascii_whitespace()).collect();
    base64::engine::general_purpose::STANDARD.decode(body).ok()
}

/// Whether the text has a PEM block whose label ends so, around a DER sequence as long as it says.
fn pem(text: &str, label: &str) -> bool {
    text.split("-----BEGIN ").skip(1).any(|block| {
        let Some((name, rest)) = block.split_once("-----") else { return false };
        let Some((body, _)) = rest.split_once("-----END ") else { return false };
        name.ends_with(label) && decode(body).is_some_and(|der| is_sequence(&der))
    })
}

fn is_sequence(der: &[u8]) -> bool {
    // X.690: tag 0x30, then the length in one byte, or in the n bytes that 0x80 + n announces.
    match der {
        [0x30, n @ 0..=0x7f, rest @ ..] => usize::from(*n) == rest.len(),
        [0x30, n @ 0x81..=0x84, rest @ ..] => {
            let n = usize::from(n & 0x7f);
            let length = rest.iter().take(n).fold(0usize, |l, b| l << 8 | usize::from(*b));
            rest.len().checked_sub(n) == Some(length)
        }
        _ => false,
    }
}

/// Gateways of the same proxies with the same port and host.
fn conflicts<'w, 'a>(world: &'w World<'a>, out: &mut Findings<'w, 'a>) {
    let mut by_host: BTreeMap<(u32, &str, &str), Vec<(&'w Resource<'a>, &'a Gateway)>> = BTreeMap::new();
    for (r, g) in world.each(pick) {
        for s in &g.servers {
            let number = s.port.as_ref().map_or(0, |p| p.number);
            for h in &s.hosts {
                let list = by_host.entry((number, &s.bind, h)).or_default();
                if !list.iter().any(|(o, _)| std::ptr::eq(*o, r)) {
                    list.push((r, g));
                }
            }
        }
    }
    let same_proxy = |a: &Labels, b: &Labels| {
        let nested = a.iter().all(|(k, v)| b.get(k) == Some(v)) || b.iter().all(|(k, v)| a.get(k) == Some(v));
        a == b || nested && world.workloads.iter().any(|w| w.carries(a) && w.carries(b))
    };
    let mut told: BTreeMap<(String, usize), BTreeSet<String>> = BTreeMap::new();
    for ((number, _, host), list) in by_host.iter().filter(|(_, l)| l.len() > 1) {
        for (r, g) in list {
            let others =
                list.iter().filter(|(o, og)| !std::ptr::eq(*o, *r) && same_proxy(&g.selector, &og.selector));
            let names: BTreeSet<String> = others.map(|(o, _)| o.full_name()).collect();
            let server = g.servers.iter().position(|s| {
                s.port.as_ref().is_some_and(|p| p.number == *number) && s.hosts.iter().any(|h| h == host)
            });
            let Some(server) = server.filter(|_| !names.is_empty()) else { continue };
            // One finding per server and set of others, not one per host.
            if told.insert((r.full_name(), server), names.clone()).as_ref() == Some(&names) {
                continue;
            }
            let message = format!(
                "Gateways {} are for the same proxies ({}) with the same port {number} and host {host:?}: only one of them is served. Merge them, or give them other hosts",
                names.into_iter().collect::<Vec<_>>().join(", "),
                shown(&g.selector)
            );
            out.add("IST0145", r, FieldPath::of(&format!("spec.servers[{server}].hosts")), message);
        }
    }
}

/// What a server's certificate is told by.
fn certificate(t: &ServerTlsSettings) -> Option<(&str, &str)> {
    if !t.credential_name.is_empty() {
        Some((&t.credential_name, ""))
    } else if !t.server_certificate.is_empty() && !t.private_key.is_empty() {
        Some((&t.server_certificate, &t.private_key))
    } else {
        None
    }
}

/// Gateways of the same proxies with the same certificate.
fn certificates<'w, 'a>(world: &'w World<'a>, out: &mut Findings<'w, 'a>) {
    let mut by_certificate: BTreeMap<(&str, &str), Vec<(&'w Resource<'a>, &'a Gateway)>> = BTreeMap::new();
    for (r, g) in world.each(pick) {
        for c in g.servers.iter().filter_map(|s| certificate(s.tls.as_ref()?)) {
            let list = by_certificate.entry(c).or_default();
            if !list.iter().any(|(o, _)| std::ptr::eq(*o, r)) {
                list.push((r, g));
            }
        }
    }
    for list in by_certificate.values().filter(|l| l.len() > 1) {
        for (r, g) in list {
            let within = |other: &Labels| g.selector.iter().all(|(k, v)| other.get(k) == Some(v));
            let others = list.iter().filter(|(o, og)| !std::ptr::eq(*o, *r) && within(&og.selector));
            let names: Vec<String> = others.map(|(o, _)| o.full_name()).collect();
            if !names.is_empty() {
                let message = format!(
                    "Gateways {} have the same certificate: HTTP/2 clients reuse a connection for hosts of both and get 404. Put the hosts into one Gateway",
                    names.join(", ")
                );
                out.add("IST0138", r, named(), message);
            }
        }
    }
}

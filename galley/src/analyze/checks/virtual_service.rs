//! Where routes lead, which gateways they are at, and who else has their hosts.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use mesh_model::authored::{Destination, Gateway, Spec, VirtualService, gateway_api};

use super::{Findings, Resource, World, named};
use crate::{
    analysis::qualify,
    analyze::hosts::{Found, matches, scopes},
    path::FieldPath,
};

fn pick(s: &Spec) -> Option<&VirtualService> {
    match s {
        Spec::VirtualService(v) => Some(v),
        _ => None,
    }
}

pub(super) fn check<'w, 'a>(world: &'w World<'a>, out: &mut Findings<'w, 'a>) {
    let index = Index::new(world);
    for (r, vs) in world.each(pick) {
        for d in destinations(vs) {
            destination(world, &index, r, vs, &d, out);
        }
        gateways(&index, r, vs, out);
        delegates(&index, r, vs, out);
        ineffective_subsets(&index, r, vs, out);
        claims(world, &index, r, vs, out);
    }
    conflicts(world, out);
}

/// What routes refer to.
struct Index<'w, 'a> {
    /// Subsets by host.
    subsets: HashMap<String, BTreeSet<&'a str>>,
    gateways: BTreeMap<String, &'a Gateway>,
    kubernetes: BTreeMap<String, &'a gateway_api::Gateway>,
    /// VirtualServices without hosts.
    delegates: BTreeSet<String>,
    /// VirtualServices that route a host of their own by subsets, by that host as it is written.
    by_subset: BTreeMap<&'a str, BTreeSet<String>>,
    /// Selectors of RequestAuthentications by namespace.
    tokens: HashMap<&'w str, Vec<super::super::world::Labels>>,
}

impl<'w, 'a> Index<'w, 'a> {
    fn new(world: &'w World<'a>) -> Self {
        let mut index = Self {
            subsets: HashMap::new(),
            gateways: BTreeMap::new(),
            kubernetes: BTreeMap::new(),
            delegates: BTreeSet::new(),
            by_subset: BTreeMap::new(),
            tokens: HashMap::new(),
        };
        for r in &world.resources {
            match r.spec() {
                Some(Spec::DestinationRule(dr)) => {
                    let subsets = index.subsets.entry(qualify(&dr.host, &r.namespace)).or_default();
                    subsets.extend(dr.subsets.iter().map(|s| s.name.as_str()));
                }
                Some(Spec::Gateway(g)) => {
                    index.gateways.insert(r.full_name(), g);
                }
                Some(Spec::KubernetesGateway(g)) => {
                    index.kubernetes.insert(r.full_name(), g);
                }
                Some(Spec::RequestAuthentication(a)) => {
                    let labels = a.selector.as_ref().map(|s| s.match_labels.clone()).unwrap_or_default();
                    index.tokens.entry(&r.namespace).or_default().push(labels);
                }
                Some(Spec::VirtualService(v)) => {
                    if v.hosts.is_empty() {
                        index.delegates.insert(r.full_name());
                    }
                    for d in v.http.iter().flat_map(|h| &h.route).filter_map(|d| d.destination.as_ref()) {
                        if !d.subset.is_empty() && v.hosts.contains(&d.host) {
                            index.by_subset.entry(&d.host).or_default().insert(r.full_name());
                        }
                    }
                }
                _ => {}
            }
        }
        index
    }
}

/// A destination, where it stands, and whether it is a shadow.
struct Place<'a> {
    destination: &'a Destination,
    path: String,
    mirror: bool,
}

fn destinations(vs: &VirtualService) -> Vec<Place<'_>> {
    let mut all = Vec::new();
    for (i, r) in vs.http.iter().enumerate() {
        for (j, d) in r.route.iter().enumerate() {
            all.extend(d.destination.as_ref().map(|d| Place {
                destination: d,
                path: format!("spec.http[{i}].route[{j}].destination"),
                mirror: false,
            }));
        }
        all.extend(r.mirror.as_ref().map(|d| Place {
            destination: d,
            path: format!("spec.http[{i}].mirror"),
            mirror: true,
        }));
        for (j, m) in r.mirrors.iter().enumerate() {
            all.extend(m.destination.as_ref().map(|d| Place {
                destination: d,
                path: format!("spec.http[{i}].mirrors[{j}].destination"),
                mirror: true,
            }));
        }
    }
    let tls = vs.tls.iter().map(|r| &r.route).enumerate().map(|r| ("tls", r));
    let tcp = vs.tcp.iter().map(|r| &r.route).enumerate().map(|r| ("tcp", r));
    for (list, (i, route)) in tls.chain(tcp) {
        for (j, d) in route.iter().enumerate() {
            all.extend(d.destination.as_ref().map(|d| Place {
                destination: d,
                path: format!("spec.{list}[{i}].route[{j}].destination"),
                mirror: false,
            }));
        }
    }
    all
}

fn destination<'w, 'a>(
    world: &World<'a>,
    index: &Index<'w, 'a>,
    r: &'w Resource<'a>,
    vs: &VirtualService,
    place: &Place<'_>,
    out: &mut Findings<'w, 'a>,
) {
    let d = place.destination;
    let what = if place.mirror { "mirror host" } else { "host" };
    let at = |field: &str| FieldPath::of(&format!("{}.{field}", place.path));
    match world.hosts.find(&d.host, &r.namespace, world.shown(vs)) {
        Found::Elsewhere => return,
        Found::Nowhere => {
            let full = qualify(&d.host, &r.namespace);
            let hint = match world.hosts.elsewhere(&d.host, &r.namespace) {
                Some(other) => format!("did you mean {other:?}?"),
                None => "create the Service or a ServiceEntry, or export it to this namespace".to_owned(),
            };
            out.add("IST0101", r, at("host"), format!("{what} {:?} ({full}) does not exist: {hint}", d.host));
            return;
        }
        Found::Here(host) => {
            let list = host.ports.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
            match &d.port {
                None if host.ports.len() > 1 => {
                    let message = format!("{:?} has several ports ({list}): name one in port.number", d.host);
                    out.add("IST0112", r, at("host"), message);
                }
                Some(p) if !host.ports.contains(&p.number) => {
                    let message = format!("{:?} has no port {}, but {list}", d.host, p.number);
                    out.add("IST0101", r, at("port"), message);
                }
                _ => {}
            }
        }
    }
    let subsets = index.subsets.get(&qualify(&d.host, &r.namespace));
    if !d.subset.is_empty() && !subsets.is_some_and(|s| s.contains(d.subset.as_str())) {
        let message = format!(
            "subset {:?} of {:?} does not exist: declare it in a DestinationRule for that host",
            d.subset, d.host
        );
        out.add("IST0101", r, at("subset"), message);
    }
}

/// `namespace/name` of a gateway that a document of `namespace` names.
fn gateway_name(name: &str, namespace: &str) -> String {
    if name.contains('/') {
        return name.to_owned();
    }
    let mut parts = name.split('.');
    match (parts.next(), parts.next()) {
        (Some(name), Some(ns)) => format!("{ns}/{name}"),
        _ => format!("{namespace}/{name}"),
    }
}

fn gateways<'w, 'a>(
    index: &Index<'w, 'a>,
    r: &'w Resource<'a>,
    vs: &VirtualService,
    out: &mut Findings<'w, 'a>,
) {
    for (i, g) in vs.gateways.iter().enumerate().filter(|(_, g)| *g != "mesh") {
        let path = FieldPath::of(&format!("spec.gateways[{i}]"));
        if g.contains("~istio-autogenerated-k8s-gateway~") {
            let message = format!(
                "{g:?} is made for a Gateway of the Gateway API: attach an HTTPRoute to that instead"
            );
            out.add("IST0165", r, path, message);
            continue;
        }
        let name = gateway_name(g, &r.namespace);
        let fits = if let Some(gateway) = index.gateways.get(&name) {
            let (own, _) = name.split_once('/').unwrap_or_default();
            gateway.servers.iter().flat_map(|s| &s.hosts).any(|h| {
                let (ns, host) = h.split_once('/').unwrap_or(("*", h));
                let seen = ns == "*" || (if ns == "." { own } else { ns }) == r.namespace;
                seen && vs.hosts.iter().any(|v| matches(host, v))
            })
        } else if let Some(gateway) = index.kubernetes.get(&name) {
            gateway.listeners.iter().any(|l| {
                let host = l.hostname.as_deref().unwrap_or_default();
                host.is_empty() || vs.hosts.iter().any(|v| matches(host, v))
            })
        } else {
            out.add(
                "IST0101",
                r,
                path,
                format!("gateway {g:?} does not exist: create Gateway {name}, or name another"),
            );
            continue;
        };
        if !fits {
            let message = format!(
                "Gateway {name} serves none of the hosts {}: add them to a server's hosts, or remove the gateway",
                vs.hosts.join(", ")
            );
            out.add("IST0132", r, path, message);
        }
    }
}

fn delegates<'w, 'a>(
    index: &Index<'w, 'a>,
    r: &'w Resource<'a>,
    vs: &VirtualService,
    out: &mut Findings<'w, 'a>,
) {
    for (i, d) in vs.http.iter().enumerate().filter_map(|(i, h)| Some((i, h.delegate.as_ref()?))) {
        let ns = if d.namespace.is_empty() { &r.namespace } else { &d.namespace };
        let name = format!("{ns}/{}", d.name);
        if !index.delegates.contains(&name) {
            let path = FieldPath::of(&format!("spec.http[{i}].delegate"));
            out.add(
                "IST0101",
                r,
                path,
                format!("there is no VirtualService {name} without hosts to delegate to"),
            );
        }
    }
}

fn ineffective_subsets<'w, 'a>(
    index: &Index<'w, 'a>,
    r: &'w Resource<'a>,
    vs: &VirtualService,
    out: &mut Findings<'w, 'a>,
) {
    if vs.gateways.is_empty() {
        return;
    }
    for (i, h) in vs.http.iter().enumerate() {
        for (j, d) in h.route.iter().enumerate() {
            let Some(d) = d.destination.as_ref().filter(|d| d.subset.is_empty()) else { continue };
            for other in index.by_subset.get(d.host.as_str()).into_iter().flatten() {
                let message = format!(
                    "subsets that VirtualService {other} has for {:?} do not apply to requests of this route's gateways: name the subsets here",
                    d.host
                );
                let path = FieldPath::of(&format!("spec.http[{i}].route[{j}].destination.host"));
                out.add("IST0140", r, path, message);
            }
        }
    }
}

/// Routes by a token's claims, at gateways whose workloads read no tokens.
fn claims<'w, 'a>(
    world: &'w World<'a>,
    index: &Index<'w, 'a>,
    r: &'w Resource<'a>,
    vs: &VirtualService,
    out: &mut Findings<'w, 'a>,
) {
    let all = vs.http.iter().enumerate().flat_map(|(i, h)| h.matches.iter().map(move |m| (i, m)));
    let mut keys =
        all.flat_map(|(i, m)| m.headers.keys().chain(m.without_headers.keys()).map(move |k| (i, k)));
    let Some((i, key)) = keys.find(|(_, k)| k.starts_with("@request.auth.claims")) else { return };
    for g in vs.gateways.iter().filter(|g| *g != "mesh") {
        let name = gateway_name(g, &r.namespace);
        let Some(gateway) = index.gateways.get(&name) else { continue };
        let reads = |w: &super::super::world::Workload<'_>| {
            [world.root_namespace.as_str(), w.namespace.as_str()]
                .iter()
                .flat_map(|ns| index.tokens.get(ns).into_iter().flatten())
                .any(|labels| w.carries(labels))
        };
        let blind = world.workloads.iter().find(|w| w.carries(&gateway.selector) && !reads(w));
        if let Some(w) = blind {
            let message = format!(
                "a route by {key:?} needs a RequestAuthentication for the workloads of Gateway {name}, such as {}/{}",
                w.namespace, w.name
            );
            out.add("IST0149", r, FieldPath::of(&format!("spec.http[{i}].match")), message);
        }
    }
}

/// VirtualServices of sidecars with the same host, where both can be seen.
fn conflicts<'w, 'a>(world: &'w World<'a>, out: &mut Findings<'w, 'a>) {
    let mut by_host: BTreeMap<(String, String), Vec<&'w Resource<'a>>> = BTreeMap::new();
    for (r, vs) in world.each(pick) {
        if !vs.gateways.is_empty() && !vs.gateways.iter().any(|g| g == "mesh") {
            continue;
        }
        for scope in scopes(world.shown(vs), &r.namespace) {
            let hosts: BTreeSet<String> = vs.hosts.iter().map(|h| qualify(h, &r.namespace)).collect();
            for h in hosts {
                by_host.entry((scope.clone(), h)).or_default().push(r);
            }
        }
    }
    let public: Vec<(&String, &Vec<&Resource<'a>>)> =
        by_host.iter().filter(|((scope, _), _)| scope == "*").map(|((_, h), list)| (h, list)).collect();
    let mut told = BTreeSet::new();
    for ((scope, host), list) in &by_host {
        let mut all = list.clone();
        if scope != "*" {
            all.extend(public.iter().filter(|(h, _)| matches(host, h)).flat_map(|(_, l)| l.iter().copied()));
        }
        if all.len() < 2 {
            continue;
        }
        let names = all.iter().map(|r| r.full_name()).collect::<BTreeSet<_>>();
        let names = names.into_iter().collect::<Vec<_>>().join(", ");
        for r in all {
            if told.insert(r.full_name()) {
                let message = format!(
                    "VirtualServices {names} have the same host {host:?} for sidecars, and only the oldest applies: merge them"
                );
                out.add("IST0109", r, named(), message);
            }
        }
    }
}

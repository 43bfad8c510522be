//! Building the index.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_model::{
    ClusterId, Locality, NetworkId, SpiffeId,
    authored::{
        IntOrString, Location, MeshConfig, Resolution as AuthoredResolution, Service as AuthoredService,
        WorkloadEntry, kubernetes::topology,
    },
    federation::{ExportedService, ImportedService},
    registry::{Endpoint, Health, Labels, Protocol, Resolution, Service, ServicePort, TlsMode},
};

use super::{
    Entry, Index, Local, Origin,
    made::{Borrowed, Kept, Made},
    slices::{PodIndex, Slices},
    vips,
};
use crate::{
    config::{Config, Doc, Problem},
    consul::FROM_CONSUL,
    hosts,
};

/// Set on workloads with a proxy that accepts mesh mTLS.
pub(crate) const TLS_MODE: &str = "security.istio.io/tlsMode";
/// Namespaces that a service is visible in.
const EXPORT_TO: &str = "networking.istio.io/exportTo";
/// Health that a platform or a health checker has written on a `WorkloadEntry`.
pub(crate) const HEALTH: &str = "flotilla.dev/health";
/// Port of east-west gateways unless their workload says another.
const EAST_WEST_PORT: u16 = 15443;

pub(super) struct Builder<'a> {
    pub(super) config: &'a Config,
    pub(super) local: &'a Local,
    pub(super) slices: Slices<'a>,
    pub(super) pods: PodIndex<'a>,
    workloads: HashMap<&'a str, Workloads<'a>>,
    imports: HashMap<(&'a str, &'a str), Vec<Arc<ImportedService>>>,
    pub(super) exports: BTreeSet<(&'a str, &'a str)>,
    pub(super) entries: BTreeMap<String, Arc<Entry>>,
    problems: Vec<Problem>,
    /// What was made for the index before, and what of it, or instead, is made for this one.
    before: &'a HashMap<String, Arc<Made>>,
    made: HashMap<String, Arc<Made>>,
}

/// Workloads of a namespace, found by their labels: a namespace has about as many services as workloads.
#[derive(Default)]
struct Workloads<'a> {
    all: Vec<&'a Doc<WorkloadEntry>>,
    by_label: HashMap<(&'a str, &'a str), Vec<usize>>,
}

impl<'a> Workloads<'a> {
    fn add(&mut self, w: &'a Doc<WorkloadEntry>) {
        let more = w.labels.iter().filter(|(k, _)| !w.spec.labels.contains_key(*k));
        for (k, v) in w.spec.labels.iter().chain(more) {
            self.by_label.entry((k, v)).or_default().push(self.all.len());
        }
        self.all.push(w);
    }

    /// Those with all of these labels, in their order; all without any.
    fn selected(&self, selector: &Labels) -> Vec<&'a Doc<WorkloadEntry>> {
        let lists = selector.iter().map(|(k, v)| self.by_label.get(&(k.as_str(), v.as_str())));
        let Some(lists) = lists.collect::<Option<Vec<_>>>() else { return vec![] };
        let Some(shortest) = lists.iter().min_by_key(|l| l.len()) else { return self.all.clone() };
        let in_all = |at: &&usize| lists.iter().all(|l| l.binary_search(at).is_ok());
        shortest.iter().filter(in_all).filter_map(|at| self.all.get(*at).copied()).collect()
    }
}

/// Builds the index, and tells what it could not use.
#[must_use]
pub fn build(config: &Config, local: &Local) -> (Index, Vec<Problem>) {
    build_after(config, local, &Index::default())
}

/// The same after another index: what is made of the same documents as there is shared with it.
#[must_use]
pub fn build_after(config: &Config, local: &Local, before: &Index) -> (Index, Vec<Problem>) {
    let nothing = HashMap::new();
    let same = before.kept.local.as_ref() == Some(local);
    let mut workloads: HashMap<&str, Workloads<'_>> = HashMap::new();
    for w in &config.workload_entries {
        workloads.entry(&w.namespace).or_default().add(w);
    }
    let mut imports: HashMap<(&str, &str), Vec<Arc<ImportedService>>> = HashMap::new();
    for i in &config.imports {
        // A peer that echoes our own services back would make a loop.
        if i.cluster != local.cluster && !cluster_local(&config.mesh, &i.service) {
            imports.entry((&i.service.namespace, &i.service.name)).or_default().push(i.clone());
        }
    }
    let mut slices = Slices::new();
    for s in &config.endpoint_slices {
        if let Some(service) = s.labels.get(topology::SERVICE_NAME) {
            slices.entry((&s.namespace, service)).or_default().push(s);
        }
    }
    let exports = config.service_exports.iter().map(|e| (e.namespace.as_str(), e.name.as_str())).collect();
    let mut b = Builder {
        config,
        local,
        pods: if slices.is_empty() { PodIndex::default() } else { PodIndex::new(&config.workload_entries) },
        slices,
        workloads,
        imports,
        exports,
        entries: BTreeMap::new(),
        problems: Vec::new(),
        before: if same { &before.kept.made } else { &nothing },
        made: HashMap::new(),
    };
    b.platform();
    b.consul();
    b.service_entries();
    b.exported_of_consul();
    b.imported();
    b.members();
    let east_west = b.east_west();
    let mut problems = std::mem::take(&mut b.problems);
    let (entries, made) = (b.entries, b.made);
    let index = finish(entries, east_west, &made, before, &mut problems);
    let kept = Kept { local: Some(local.clone()), made };
    (Index { kept, ..index }, problems)
}

fn finish(
    mut entries: BTreeMap<String, Arc<Entry>>,
    east_west: Vec<SocketAddr>,
    made: &HashMap<String, Arc<Made>>,
    before: &Index,
    problems: &mut Vec<Problem>,
) -> Index {
    let assigned: Vec<(String, IpAddr)> = {
        let without = entries
            .iter()
            .filter(|(h, e)| e.service.addresses.is_empty() && !e.service.headless && !h.starts_with('*'))
            .filter(|(_, e)| e.ranges.is_empty())
            .map(|(h, _)| h.as_str());
        vips::assign(without).into_iter().map(|(h, ip)| (h.to_owned(), ip)).collect()
    };
    for (host, ip) in assigned {
        let Some(e) = entries.get_mut(&host) else { continue };
        let kept = made.get(&host).zip(before.kept.made.get(&host)).is_some_and(|(a, b)| Arc::ptr_eq(a, b));
        match before.services.get(&host) {
            Some(old) if kept && old.assigned_vip && old.service.addresses == [ip] => *e = Arc::clone(old),
            _ => {
                let e = Arc::make_mut(e);
                e.service.addresses = vec![ip];
                e.assigned_vip = true;
            }
        }
    }
    let mut index = Index { east_west, ..Index::default() };
    for (host, entry) in &entries {
        for a in &entry.aliases {
            if entries.contains_key(a) || index.aliases.insert(a.clone(), host.clone()).is_some() {
                problems.push(Problem {
                    object: format!("Service {host}"),
                    message: format!("its alias {a} is taken by another service"),
                });
            }
        }
        // Members repeat the endpoints of the service they are part of.
        if entry.origin == Origin::Member {
            continue;
        }
        let host: Arc<str> = host.as_str().into();
        for (i, e) in entry.endpoints.iter().enumerate() {
            if let Ok(ip) = e.address.parse() {
                index.by_address.entry(ip).or_default().push((Arc::clone(&host), i));
            }
        }
    }
    index.services = entries;
    index
}

impl<'a> Builder<'a> {
    pub(super) fn problem(&mut self, object: impl Into<String>, message: impl Into<String>) {
        self.problems.push(Problem { object: object.into(), message: message.into() });
    }

    pub(super) fn identity(&self, namespace: &str, account: &str) -> Option<String> {
        if account.starts_with("spiffe://") {
            return SpiffeId::parse(account).ok().map(|id| id.as_str().to_owned());
        }
        let account = if account.is_empty() { "default" } else { account };
        SpiffeId::workload(&self.local.trust_domain, namespace, account).ok().map(|id| id.as_str().to_owned())
    }

    /// `Service` documents.
    fn platform(&mut self) {
        let config = self.config;
        for doc in &config.services {
            let spec = &doc.spec;
            let object = format!("Service {}/{}", doc.namespace, doc.name);
            let host = hosts::service_host(&doc.name, &doc.namespace);
            let of = self.ingredients(doc);
            if let Some(made) = self.before.get(&host).filter(|made| of.are_those_of(made)) {
                self.problems.extend(made.problems.iter().cloned());
                self.entries.insert(host.clone(), Arc::clone(&made.entry));
                self.made.insert(host, Arc::clone(made));
                continue;
            }
            let told = self.problems.len();
            let (mut ports, mut targets) = (Vec::new(), Vec::new());
            let (mut udp_ports, mut udp_targets) = (Vec::new(), Vec::new());
            for p in &spec.ports {
                if p.protocol.eq_ignore_ascii_case("SCTP") {
                    continue;
                }
                let Ok(number) = u16::try_from(p.port) else {
                    self.problem(&object, format!("port {} is ignored: above 65535", p.port));
                    continue;
                };
                if number == 0 {
                    continue;
                }
                if p.protocol.eq_ignore_ascii_case("UDP") {
                    udp_ports.push(ServicePort {
                        name: p.name.clone(),
                        port: number,
                        protocol: Protocol::Udp,
                    });
                    udp_targets.push(p.target_port.clone());
                    continue;
                }
                let protocol = Protocol::select(p.app_protocol.as_deref(), &p.name);
                if protocol == Protocol::Udp {
                    continue;
                }
                ports.push(ServicePort { name: p.name.clone(), port: number, protocol });
                targets.push(p.target_port.clone());
            }
            let external = spec.service_type == "ExternalName";
            let addresses: Vec<IpAddr> = if spec.cluster_ips.is_empty() {
                spec.cluster_ip.parse().into_iter().collect()
            } else {
                spec.cluster_ips.iter().filter_map(|a| a.parse().ok()).collect()
            };
            let export_to = doc
                .annotations
                .get(EXPORT_TO)
                .map(|v| v.split(',').map(|s| s.trim().to_owned()).filter(|s| !s.is_empty()).collect())
                .unwrap_or_default();
            let service = Service {
                host: host.clone(),
                name: doc.name.clone(),
                namespace: doc.namespace.clone(),
                addresses,
                ports,
                resolution: if external { Resolution::Dns } else { Resolution::Static },
                mesh_external: external,
                headless: spec.headless(),
                export_to,
                labels: (*doc.labels).clone(),
                created: doc.created,
            };
            let mut entry = self.entry(service, Origin::Platform);
            entry.udp_ports = udp_ports;
            entry.names_of_unready = spec.publish_not_ready_addresses;
            targets.append(&mut udp_targets);
            if external {
                for p in entry.service.ports.iter().chain(&entry.udp_ports) {
                    entry.endpoints.push(inline(&spec.external_name, p.port, &p.name));
                }
            } else if !self.slices(&mut entry, &spec.selector, &targets, &object) && !spec.selector.is_empty()
            {
                self.select_workloads(&mut entry, &spec.selector, &targets, &object);
            }
            self.merge_imports(&mut entry);
            let entry = Arc::new(entry);
            let problems = self.problems.get(told..).unwrap_or_default().to_vec();
            let made = Arc::new(Made { of: of.kept(), entry: Arc::clone(&entry), problems });
            self.made.insert(host.clone(), made);
            self.entries.insert(host, entry);
        }
    }

    /// What a `Service` is made of: everything that [`Builder::platform`] looks at for it, but for what the index is built for.
    fn ingredients(&self, doc: &'a Doc<AuthoredService>) -> Borrowed<'a> {
        let key = (doc.namespace.as_str(), doc.name.as_str());
        let slices = self.slices.get(&key).cloned().unwrap_or_default();
        let named = slices.iter().flat_map(|s| &s.spec.endpoints);
        let named = named.filter_map(|e| Some(self.pod(&doc.namespace, e, e.addresses.first()?)));
        let of_namespace =
            self.workloads.get(doc.namespace.as_str()).filter(|_| !doc.spec.selector.is_empty());
        let selected = of_namespace.into_iter().flat_map(|all| all.selected(&doc.spec.selector)).map(Some);
        let imports = self.imports.get(&key).into_iter().flatten();
        Borrowed {
            service: doc,
            workloads: named.chain(selected).collect(),
            slices,
            exported: self.exports.contains(&key),
            imports: imports.map(|i| (i.clone(), self.config.foreign_domain(&i.cluster).is_some())).collect(),
        }
    }

    pub(super) fn entry(&self, service: Service, origin: Origin) -> Entry {
        let exported = origin == Origin::Platform
            && self.exports.contains(&(service.namespace.as_str(), service.name.as_str()));
        Entry {
            service,
            ranges: vec![],
            origin,
            aliases: vec![],
            assigned_vip: false,
            udp_ports: vec![],
            endpoints: vec![],
            imports: vec![],
            identities: BTreeSet::new(),
            subject_alt_names: vec![],
            exported,
            names_of_unready: false,
        }
    }

    /// Adds the workloads of the service's namespace that a selector selects. `targets` are those of its ports and then
    /// of its UDP ports.
    fn select_workloads(
        &mut self,
        entry: &mut Entry,
        selector: &Labels,
        targets: &[Option<IntOrString>],
        object: &str,
    ) {
        self.select_where(entry, targets, object, selector, |_| true);
    }

    /// The same for those among them that are `wanted`.
    pub(super) fn select_where(
        &mut self,
        entry: &mut Entry,
        targets: &[Option<IntOrString>],
        object: &str,
        selector: &Labels,
        wanted: impl Fn(&Doc<WorkloadEntry>) -> bool,
    ) {
        let namespace = entry.service.namespace.clone();
        let selected: Vec<&Doc<WorkloadEntry>> = self
            .workloads
            .get(namespace.as_str())
            .into_iter()
            .flat_map(|all| all.selected(selector))
            .filter(|w| wanted(w))
            .collect();
        for w in selected {
            for (i, port) in entry.service.ports.iter().chain(&entry.udp_ports).enumerate() {
                let target = targets.get(i).and_then(Option::as_ref);
                match target_port(&w.spec, port, target) {
                    Ok(number) => {
                        let e = self.workload_endpoint(w, port, number);
                        match e {
                            Ok(e) => entry.endpoints.push(e),
                            Err(message) => {
                                self.problem(format!("WorkloadEntry {}/{}", w.namespace, w.name), message);
                                break;
                            }
                        }
                    }
                    Err(message) => self.problem(object, message),
                }
            }
            if let Some(id) = self.identity(&namespace, &w.spec.service_account) {
                entry.identities.insert(id);
            }
        }
    }

    pub(super) fn workload_endpoint(
        &self,
        w: &Doc<WorkloadEntry>,
        port: &ServicePort,
        number: u16,
    ) -> Result<Endpoint, String> {
        let spec = &w.spec;
        if spec.address.is_empty() {
            return Err("ignored: it has no address; workloads of other networks are imported through \
                        the federation, not listed"
                .to_owned());
        }
        // Nobody's proxy listens there, whatever its labels say.
        let unix = spec.address.starts_with(mesh_model::proxy::UNIX);
        let labels = workload_labels(w);
        let tls = match labels.get(TLS_MODE).or_else(|| w.labels.get(TLS_MODE)) {
            Some(v) if v == "istio" && !unix => TlsMode::Mutual,
            _ => TlsMode::Disabled,
        };
        let health = match w.annotations.get(HEALTH).map(String::as_str) {
            Some("unhealthy") => Health::Unhealthy,
            Some("draining") => Health::Draining,
            _ => Health::Healthy,
        };
        Ok(Endpoint {
            address: spec.address.clone(),
            port: if unix { 0 } else { number },
            service_port: port.name.clone(),
            service_account: spec.service_account.clone(),
            locality: Locality::from(spec.locality.clone()),
            network: NetworkId::new(&spec.network).ok(),
            cluster: Some(self.local.cluster.clone()),
            weight: spec.weight.max(1),
            health,
            tls,
            workload: Some(Arc::from(format!("{}/{}", w.namespace, w.name))),
            labels,
        })
    }

    /// `ServiceEntry` documents: one service per host.
    fn service_entries(&mut self) {
        let config = self.config;
        for doc in &config.service_entries {
            let spec = &doc.spec;
            let object = format!("ServiceEntry {}/{}", doc.namespace, doc.name);
            let (mut ports, mut targets) = (Vec::new(), Vec::new());
            let (mut udp_ports, mut udp_targets) = (Vec::new(), Vec::new());
            for p in &spec.ports {
                match u16::try_from(p.number) {
                    Ok(number) if number > 0 => {
                        let protocol = Protocol::parse(&p.protocol).unwrap_or(Protocol::Auto);
                        let port = ServicePort { name: p.name.clone(), port: number, protocol };
                        let target = (p.target_port > 0).then_some(IntOrString::Int(p.target_port));
                        if protocol == Protocol::Udp {
                            udp_ports.push(port);
                            udp_targets.push(target);
                        } else {
                            ports.push(port);
                            targets.push(target);
                        }
                    }
                    _ => self.problem(&object, format!("port {} is ignored", p.number)),
                }
            }
            targets.append(&mut udp_targets);
            let resolution = match spec.resolution {
                AuthoredResolution::None => Resolution::Passthrough,
                AuthoredResolution::Static => Resolution::Static,
                AuthoredResolution::Dns | AuthoredResolution::DnsRoundRobin => Resolution::Dns,
                AuthoredResolution::DynamicDns => Resolution::ByName,
            };
            let (mut addresses, mut ranges) = (Vec::new(), Vec::new());
            for a in &spec.addresses {
                match a.parse::<IpAddr>() {
                    Ok(ip) => addresses.push(ip),
                    Err(_) => match a.parse::<ipnet::IpNet>() {
                        Ok(net) if net.prefix_len() == net.max_prefix_len() => addresses.push(net.addr()),
                        Ok(net) => ranges.push(net.trunc()),
                        Err(_) => self.problem(&object, format!("address {a} is ignored: it is none")),
                    },
                }
            }
            if !ranges.is_empty() && !udp_ports.is_empty() {
                self.problem(&object, "ranges of addresses are ignored for its ports of UDP".to_owned());
            }
            for host in &spec.hosts {
                let host = host.to_ascii_lowercase();
                if !hosts::plausible(&host) {
                    self.problem(&object, format!("host {host:?} is ignored: not a DNS name"));
                    continue;
                }
                let consul = self.entries.get(&host).is_some_and(|e| e.origin == Origin::Consul);
                if self.entries.contains_key(&host) && !consul {
                    self.problem(&object, format!("host {host} is ignored: an older service has it"));
                    continue;
                }
                let service = Service {
                    host: host.clone(),
                    name: host.clone(),
                    namespace: doc.namespace.clone(),
                    addresses: addresses.clone(),
                    ports: ports.clone(),
                    resolution,
                    mesh_external: spec.location == Location::MeshExternal,
                    headless: false,
                    export_to: spec.export_to.clone(),
                    labels: (*doc.labels).clone(),
                    created: doc.created,
                };
                let mut entry = self.entry(service, Origin::Entry);
                entry.udp_ports.clone_from(&udp_ports);
                entry.ranges.clone_from(&ranges);
                entry.subject_alt_names.clone_from(&spec.subject_alt_names);
                if let Some(selector) = &spec.workload_selector {
                    self.select_workloads(&mut entry, &selector.labels, &targets, &object);
                }
                for e in &spec.endpoints {
                    self.inline_endpoint(&mut entry, e, &targets, &object);
                }
                if consul {
                    self.join_consul(entry);
                    continue;
                }
                // Without endpoints, the name itself is what is resolved.
                let named = resolution == Resolution::Dns && !host.starts_with('*');
                if entry.endpoints.is_empty() && (named || resolution == Resolution::ByName) {
                    for (i, p) in ports.iter().chain(&udp_ports).enumerate() {
                        let number = match targets.get(i) {
                            Some(Some(IntOrString::Int(n))) => u16::try_from(*n).unwrap_or(p.port),
                            _ => p.port,
                        };
                        entry.endpoints.push(inline(&host, number, &p.name));
                    }
                }
                self.entries.insert(host, Arc::new(entry));
            }
        }
    }

    fn inline_endpoint(
        &mut self,
        entry: &mut Entry,
        e: &WorkloadEntry,
        targets: &[Option<IntOrString>],
        object: &str,
    ) {
        let doc = Doc {
            name: e.address.clone(),
            namespace: entry.service.namespace.clone(),
            created: 0,
            labels: Arc::default(),
            annotations: Arc::default(),
            spec: Arc::new(e.clone()),
        };
        for (i, port) in entry.service.ports.iter().chain(&entry.udp_ports).enumerate() {
            let target = targets.get(i).and_then(Option::as_ref);
            let made = target_port(e, port, target).and_then(|n| self.workload_endpoint(&doc, port, n));
            match made {
                Ok(mut made) => {
                    made.workload = None;
                    entry.endpoints.push(made);
                }
                Err(message) => self.problem(object, format!("endpoint {}: {message}", e.address)),
            }
        }
        if !e.service_account.is_empty()
            && let Some(id) = self.identity(&entry.service.namespace, &e.service_account)
        {
            entry.identities.insert(id);
        }
    }

    /// Adds what peers run of a service.
    pub(super) fn merge_imports(&mut self, entry: &mut Entry) {
        let s = &entry.service;
        let key = (s.namespace.as_str(), s.name.as_str());
        let imports = self.imports.get(&key).cloned().unwrap_or_default();
        if !imports.is_empty() || entry.exported {
            entry.aliases = aliases(&s.name, &s.namespace);
        }
        for i in imports {
            // Who is of another trust domain is nobody that a workload here may be: see `generate/clusters.rs`.
            if self.config.foreign_domain(&i.cluster).is_some() {
                entry.imports.push(i);
                continue;
            }
            for a in &i.service.service_accounts {
                let own = format!("spiffe://{}/", self.local.trust_domain);
                match self.identity(&i.service.namespace, a).filter(|id| id.starts_with(&own)) {
                    Some(id) => {
                        entry.identities.insert(id);
                    }
                    None => self.problem(
                        format!("ImportedService {}/{}", i.cluster, entry.service.host),
                        format!("service account {a:?} is not valid"),
                    ),
                }
            }
            entry.imports.push(i);
        }
    }

    /// Services that only peers have. Conflicting definitions: the oldest export wins (MCS API).
    fn imported(&mut self) {
        let mut keys: Vec<(&str, &str)> = self.imports.keys().copied().collect();
        keys.sort_unstable();
        for (namespace, name) in keys {
            let host = hosts::service_host(name, namespace);
            if self.entries.contains_key(&host) {
                continue;
            }
            let Some(oldest) = self
                .imports
                .get(&(namespace, name))
                .and_then(|l| l.iter().min_by_key(|i| (i.service.exported_at, i.cluster.clone())))
                .cloned()
            else {
                continue;
            };
            let (udp, tcp) = oldest.service.ports.iter().cloned().partition(ServicePort::is_udp);
            let service = Service {
                host: host.clone(),
                name: name.to_owned(),
                namespace: namespace.to_owned(),
                addresses: vec![],
                ports: tcp,
                resolution: Resolution::Static,
                mesh_external: false,
                // Pods of other clusters are not known, so there is nothing but a VIP to offer.
                headless: false,
                export_to: vec![],
                labels: Labels::new(),
                created: oldest.service.exported_at,
            };
            let mut entry = self.entry(service, Origin::Imported);
            entry.udp_ports = udp;
            self.merge_imports(&mut entry);
            self.entries.insert(host, Arc::new(entry));
        }
    }

    /// The parts of services that single members run.
    fn members(&mut self) {
        let mut out = Vec::new();
        for e in self.entries.values() {
            if e.aliases.is_empty() {
                continue;
            }
            let part = |cluster: &ClusterId| {
                let s = &e.service;
                let host = hosts::member_host(&s.name, &s.namespace, cluster.as_str());
                let service = Service { host, addresses: vec![], headless: false, ..s.clone() };
                let mut m = Entry { service, origin: Origin::Member, aliases: vec![], ..(**e).clone() };
                m.imports.clear();
                m.endpoints.clear();
                m.exported = false;
                m
            };
            for i in &e.imports {
                let mut m = part(&i.cluster);
                m.imports = vec![i.clone()];
                out.push(m);
            }
            if e.exported {
                let mut m = part(&self.local.cluster);
                m.endpoints.clone_from(&e.endpoints);
                out.push(m);
            }
        }
        self.entries.extend(out.into_iter().map(|m| (m.service.host.clone(), Arc::new(m))));
    }

    /// Addresses of this cluster's own east-west gateways.
    fn east_west(&self) -> Vec<SocketAddr> {
        if !self.local.east_west.is_empty() {
            return self.local.east_west.clone();
        }
        let mut found: Vec<SocketAddr> = self
            .config
            .workload_entries
            .iter()
            .filter(|w| {
                let label = w.spec.labels.get("istio").or_else(|| w.labels.get("istio"));
                label.is_some_and(|v| v == "eastwestgateway")
            })
            // Whoever may register something there must not lead the traffic between clusters.
            .filter(|w| !w.annotations.contains_key(FROM_CONSUL))
            .filter(|w| w.annotations.get(HEALTH).is_none_or(|h| h == "healthy"))
            .filter_map(|w| {
                let port = w.spec.ports.get("tls").and_then(|p| u16::try_from(*p).ok());
                Some(SocketAddr::new(w.spec.address.parse().ok()?, port.unwrap_or(EAST_WEST_PORT)))
            })
            .collect();
        found.sort_unstable();
        found.dedup();
        found
    }
}

/// Labels of a workload: those of its template, completed by those of the object.
pub(crate) fn workload_labels(w: &Doc<WorkloadEntry>) -> Labels {
    let mut labels = w.spec.labels.clone();
    for (k, v) in w.labels.iter() {
        labels.entry(k.clone()).or_insert_with(|| v.clone());
    }
    labels
}

/// Names of a service in any cluster.
fn aliases(name: &str, namespace: &str) -> Vec<String> {
    vec![format!("{name}.{namespace}.{}", hosts::CLUSTERSET_DOMAIN), format!("{name}.{namespace}.global")]
}

fn inline(address: &str, port: u16, service_port: &str) -> Endpoint {
    Endpoint {
        address: address.to_owned(),
        port,
        service_port: service_port.to_owned(),
        labels: Labels::new(),
        service_account: String::new(),
        locality: Locality::default(),
        network: None,
        cluster: None,
        weight: 1,
        health: Health::Healthy,
        tls: TlsMode::Disabled,
        workload: None,
    }
}

/// Port of a workload that serves a service port: what the workload says for it, then the service's
/// target port (a name is looked up at the workload), then the service port itself.
fn target_port(w: &WorkloadEntry, port: &ServicePort, target: Option<&IntOrString>) -> Result<u16, String> {
    let number = match (w.ports.get(&port.name), target) {
        (Some(n), _) => *n,
        (None, Some(IntOrString::Int(n))) if *n > 0 => *n,
        (None, Some(IntOrString::String(name))) => match w.ports.get(name) {
            Some(n) => *n,
            None => {
                return Err(format!("targetPort {name:?} is not a port of workload {}", w.address));
            }
        },
        _ => u32::from(port.port),
    };
    match u16::try_from(number) {
        Ok(n) if n > 0 => Ok(n),
        _ => Err(format!("port {number} is not between 1 and 65535")),
    }
}

/// Whether `MeshConfig.serviceSettings` keep callers of a service in their own cluster. The most specific host decides.
fn cluster_local(mesh: &MeshConfig, service: &ExportedService) -> bool {
    if mesh.service_settings.is_empty() {
        return false;
    }
    let host = hosts::service_host(&service.name, &service.namespace);
    let all = mesh.service_settings.iter().filter_map(|s| Some((s.settings.as_ref()?, &s.hosts)));
    all.flat_map(|(set, hosts)| hosts.iter().map(move |h| (h, set.cluster_local)))
        .filter(|(h, _)| **h == host || hosts::covers(h, &host))
        .max_by_key(|(h, _)| (!h.starts_with('*'), h.len()))
        .is_some_and(|(_, local)| local)
}

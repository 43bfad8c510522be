//! Everything generators read, with the look-ups that several of them need.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_model::{
    ClusterId, NetworkId, TrustDomain,
    authored::{
        AuthenticationPolicy, DestinationRule, LocalityLbSetting, MutualTlsMode, Subset, TrafficPolicy,
        VirtualService, Visibility, VisibilityRule,
    },
    federation::Transport,
    registry::{Endpoint, Health, Labels},
};

pub(crate) use self::{
    egress::{Carries, Declared, Egress, Undeclared},
    lineage::{Lineage, Rerouted},
};
use crate::{
    config::{Config, Doc, Problem, exported, selects},
    envoy_filter::Selected,
    gateway_api::{self, CLIENT_CERTIFICATE, SEMANTICS},
    generate::telemetry::{self, Traced},
    hosts,
    index::{self, Entry, Index, Local, Origin},
    providers,
    proxy::{ProxyNode, Situation},
    v1alpha1,
};

mod egress;
mod lineage;
pub(crate) mod on_demand;
pub(crate) mod process;

/// Settings of a control plane that are not documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// This cluster.
    pub cluster: ClusterId,
    /// Its network.
    pub network: NetworkId,
    /// Its trust domain.
    pub trust_domain: TrustDomain,
    /// Own east-west gateways; empty means those that the registry knows.
    pub east_west: Vec<SocketAddr>,
    /// Whether peers can dial this cluster's east-west gateways. If not, the gateways keep connections to all peers'
    /// gateways, and peers that cannot be dialled either are reached through a third member.
    pub reachable: bool,
    /// Where east-west gateways find this cluster's federation endpoint.
    pub federation_address: Option<SocketAddr>,
    /// Transport to peers unless the mesh's configuration names one.
    pub transport: Transport,
}

/// A consistent input of all generators.
#[derive(Debug)]
pub struct World {
    /// Settings.
    pub settings: Settings,
    /// Documents.
    pub config: Config,
    /// Services.
    pub index: Index,
    /// What could not be used.
    pub problems: Vec<Problem>,
    /// Addresses of east-west gateways that are about to stop.
    draining: BTreeSet<IpAddr>,
    rules: BTreeMap<String, NamespaceRules>,
    virtual_services: VirtualServices,
    /// By namespace, positions in the configuration.
    peer_auth: HashMap<String, Vec<usize>>,
    authentication: v1alpha1::Authentication,
    /// Keys of labels by which some configuration tells callers apart.
    telling: Arc<BTreeSet<String>>,
    /// Namespaces whose ServiceEntries are seen by fewer than their `exportTo` says.
    bounded: BTreeMap<String, Visibility>,
    /// Spans go to a provider.
    traces: bool,
    /// Something prefers zones.
    zoned: bool,
    lineage: Lineage,
    rerouted: Option<Rerouted>,
}

#[derive(Debug, Default)]
struct NamespaceRules {
    exact: HashMap<String, Rule>,
    /// Longest first.
    wildcards: Vec<(String, Rule)>,
}

/// Destination rules of one namespace for one host, merged.
#[derive(Debug, Clone)]
struct Rule {
    rule: Arc<DestinationRule>,
    namespace: String,
}

/// Virtual services by host.
#[derive(Debug, Default)]
struct VirtualServices {
    exact: HashMap<String, Vec<usize>>,
    /// Longest first.
    wildcards: Vec<(String, usize)>,
    /// Resolved hosts of each document.
    hosts: Vec<Vec<String>>,
}

impl World {
    /// Prepares all look-ups.
    #[must_use]
    pub fn new(settings: Settings, config: Config) -> Self {
        Self::build(settings, config, &Index::default())
    }

    /// The world that follows this one: what did not change is shared with it, and known not to have changed.
    #[must_use]
    pub fn next(&self, settings: Settings, config: Config, draining: BTreeSet<IpAddr>) -> Self {
        Self::build(settings, config, &self.index).with_draining(draining).following(self)
    }

    fn build(settings: Settings, config: Config, before: &Index) -> Self {
        let trust_domain = config
            .mesh
            .trust_domain
            .as_deref()
            .and_then(|t| TrustDomain::new(t).ok())
            .unwrap_or_else(|| settings.trust_domain.clone());
        let settings = Settings { trust_domain, ..settings };
        let local = Local {
            cluster: settings.cluster.clone(),
            trust_domain: settings.trust_domain.clone(),
            east_west: settings.east_west.clone(),
        };
        let (index, found) = index::build_after(&config, &local, before);
        let mut problems = config.problems.clone();
        problems.extend(found);
        problems.extend(providers::problems(&config, &index));
        problems.extend(v1alpha1::problems(&config, &index));
        let authentication = v1alpha1::Authentication::new(&config, &index);
        let mut peer_auth: HashMap<String, Vec<usize>> = HashMap::new();
        for (i, p) in config.peer_authentications.iter().enumerate() {
            peer_auth.entry(p.namespace.clone()).or_default().push(i);
        }
        let rules = destination_rules(&config, &index);
        let virtual_services = virtual_services(&config, &index);
        let telling = telling_labels(&config);
        let zoned = config.mesh.zone_aware_lb_setting.is_some()
            || config.destination_rules.iter().any(|d| prefers_zones(&d.spec));
        let bounded = bounded(&config);
        let traces = telemetry::tracer(&config.mesh, &index).is_some_and(|t| t.is_ok());
        problems.sort();
        problems.dedup();
        Self {
            settings,
            config,
            index,
            problems,
            draining: BTreeSet::new(),
            rules,
            virtual_services,
            telling: Arc::new(telling),
            bounded,
            traces,
            zoned,
            lineage: Lineage::new(),
            rerouted: None,
            peer_auth,
            authentication,
        }
    }

    /// Gives a proxy whose workload registered itself the labels that it has as one of its group, by which policies select
    /// it. Answers whether it has others now.
    pub(crate) fn completed(&self, proxy: &mut ProxyNode) -> bool {
        if self.config.joined.is_empty() {
            return false;
        }
        let Some(address) = proxy.addresses.first() else { return false };
        match self.config.joined.get(&(proxy.namespace.clone(), *address)) {
            Some((account, labels)) if *account == proxy.service_account && *labels != proxy.labels => {
                proxy.labels.clone_from(labels);
                true
            }
            _ => false,
        }
    }

    /// A proxy with the patches that are for it, what is known of its workload, and what it gets on demand.
    #[must_use]
    pub fn patched(&self, proxy: &ProxyNode) -> ProxyNode {
        let filters = Selected::of(&self.config, proxy);
        let mut out = ProxyNode { filters, situation: self.situation(proxy), ..proxy.clone() };
        out.on_demand = on_demand::applies(&self.config, &out);
        if !proxy.router && !proxy.grpc {
            let port = u16::try_from(self.config.mesh.proxy_http_port).ok().filter(|p| *p != 0);
            out.http_proxy_port = proxy.http_proxy_port.or(port);
        }
        out
    }

    /// What is known of a proxy's own workload, where something depends on it.
    #[must_use]
    pub fn situation(&self, proxy: &ProxyNode) -> Situation {
        let neighbours = self.zoned.then(|| Arc::new(self.neighbours(proxy)));
        let mut gateways = self.config.gateways.iter().filter(|_| proxy.router);
        let client_certificate = gateways.find_map(|g| {
            let name = g.annotations.get(CLIENT_CERTIFICATE)?;
            g.is_served_by(&proxy.namespace, &proxy.labels).then(|| name.clone())
        });
        let told = self.traces && !proxy.flotilla && !proxy.grpc;
        let (mesh, cluster) = (self.settings.trust_domain.as_str(), self.settings.cluster.as_str());
        let traced = told.then(|| Arc::new(Traced::new(proxy, mesh, cluster)));
        Situation { neighbours, client_certificate, traced }
    }

    /// Healthy workloads of a proxy's service by zone, in its region.
    fn neighbours(&self, proxy: &ProxyNode) -> BTreeMap<String, u64> {
        let mut out = BTreeMap::new();
        let Some((own, instance)) = self.index.instances(&proxy.addresses).into_iter().next() else {
            return out;
        };
        let beside = own.endpoints.iter().filter(|e| {
            e.service_port == instance.service_port
                && e.health == Health::Healthy
                && e.locality.region == proxy.locality.region
        });
        for e in beside {
            *out.entry(e.locality.zone.clone()).or_default() += 1;
        }
        out
    }

    /// The same while east-west gateways at these addresses are about to stop.
    #[must_use]
    pub fn with_draining(self, draining: BTreeSet<IpAddr>) -> Self {
        Self { draining, ..self }
    }

    /// Whether the QUIC trunk leads to a peer, as both clusters are configured.
    #[must_use]
    pub fn has_trunk(&self, peer: &ClusterId) -> bool {
        let wanted = self.config.mesh.transport.unwrap_or(self.settings.transport) == Transport::Quic;
        self.config.peers.iter().filter(|p| p.id == *peer).any(|p| {
            // Who cannot be dialled is reached on what it dialled, by the trunk or not at all.
            let dialled = p.gateways.iter().any(|g| g.weight > 0);
            p.transports.contains(&Transport::Quic) && (wanted || !dialled)
        })
    }

    /// The same as what follows another world.
    #[must_use]
    fn following(mut self, before: &Self) -> Self {
        for (host, entry) in &mut self.index.services {
            if let Some(old) = before
                .index
                .services
                .get(host)
                .filter(|old| !Arc::ptr_eq(old, entry))
                .filter(|old| ***old == **entry)
            {
                *entry = Arc::clone(old);
            }
        }
        for (namespace, rules) in &mut self.rules {
            let Some(old) = before.rules.get(namespace) else { continue };
            for (host, r) in &mut rules.exact {
                // Those that are merged of several documents are made anew each time.
                if let Some(old) = old.exact.get(host).filter(|old| old.rule == r.rule) {
                    r.rule = Arc::clone(&old.rule);
                }
            }
        }
        if self.telling == before.telling {
            self.telling = Arc::clone(&before.telling);
        }
        self.lineage = Lineage::of(&self, before);
        self.rerouted = Rerouted::since(&self, before);
        self
    }

    /// What differs from the world before in nothing but the routes of some hosts.
    pub(crate) fn rerouted(&self) -> Option<&Rerouted> {
        self.rerouted.as_ref()
    }

    /// Numbers that two worlds have in common if parts of them are equal.
    pub(crate) fn lineage(&self) -> Lineage {
        self.lineage
    }

    /// This cluster's own east-west gateways, and whether they drain. Where all of them do none does: leaving one would
    /// only lead to the next.
    #[must_use]
    pub fn gateways(&self) -> Vec<(SocketAddr, bool)> {
        let all = &self.index.east_west;
        let drains = |g: &SocketAddr| self.draining.contains(&g.ip());
        let others = all.iter().any(|g| !drains(g));
        all.iter().map(|g| (*g, others && drains(g))).collect()
    }

    // ---------------------------------------------------------------- services

    /// Whether a service is visible to a proxy: by its `exportTo`, else by the mesh's default, and within the bounds that
    /// the mesh has for ServiceEntries.
    pub(crate) fn offers(&self, proxy: &ProxyNode, e: &Entry) -> bool {
        let s = &e.service;
        let within = !self.is_bounded(e)
            || self.bounded.get(&s.namespace) == Some(&Visibility::Namespace)
                && s.namespace == proxy.namespace;
        within
            && proxy.sees(&s.namespace, exported(&s.export_to, &self.config.mesh.default_service_export_to))
    }

    /// Whether fewer see a service than its `exportTo` says (`MeshConfig.serviceEntryVisibility`).
    pub(crate) fn is_bounded(&self, e: &Entry) -> bool {
        e.origin == Origin::Entry && self.bounded.contains_key(&e.service.namespace)
    }

    // ------------------------------------------------------------ destinations

    /// The destination rule that applies to a host for a client: of the client's namespace, then
    /// the service's, then the root namespace; the most specific host in the first that has one.
    #[must_use]
    pub fn destination_rule(&self, proxy: &ProxyNode, entry: &Entry) -> Option<Arc<DestinationRule>> {
        let root = self.config.root_namespace();
        for ns in [proxy.namespace.as_str(), entry.service.namespace.as_str(), root] {
            let Some(rules) = self.rules.get(ns) else { continue };
            let found = rules
                .exact
                .get(&entry.service.host)
                .or_else(|| {
                    rules
                        .wildcards
                        .iter()
                        .find(|(p, _)| hosts::covers(p, &entry.service.host))
                        .map(|(_, r)| r)
                })
                .filter(|r| {
                    let default = &self.config.mesh.default_destination_rule_export_to;
                    proxy.sees(&r.namespace, exported(&r.rule.export_to, default))
                })
                .filter(|r| {
                    r.rule.workload_selector.as_ref().is_none_or(|s| {
                        r.namespace == proxy.namespace && selects(&s.match_labels, &proxy.labels)
                    })
                });
            if let Some(r) = found {
                return Some(r.rule.clone());
            }
        }
        None
    }

    /// What a rule says ([`effective_policy`]) with the mesh's limits and passive health where it has none of its own
    /// (`MeshConfig.defaultTrafficPolicy`). They bring no failover between localities: as in Istio, that takes outlier
    /// detection of a rule.
    #[must_use]
    pub fn defaulted<'a>(&self, said: &'a TrafficPolicy) -> Cow<'a, TrafficPolicy> {
        let Some(d) = &self.config.mesh.default_traffic_policy else { return Cow::Borrowed(said) };
        let mut out = said.clone();
        if out.connection_pool.is_none() {
            out.connection_pool.clone_from(&d.connection_pool);
        }
        if out.outlier_detection.is_none() {
            out.outlier_detection.clone_from(&d.outlier_detection);
        }
        Cow::Owned(out)
    }

    /// Keys of labels by which routing, scoping or failover tell callers apart.
    #[must_use]
    pub fn telling_labels(&self) -> &Arc<BTreeSet<String>> {
        &self.telling
    }

    // --------------------------------------------------------- virtual services

    /// Whether a document with routes is visible to a proxy.
    pub(crate) fn shows(&self, proxy: &ProxyNode, d: &Doc<VirtualService>) -> bool {
        let default = &self.config.mesh.default_virtual_service_export_to;
        proxy.sees(&d.namespace, exported(&d.spec.export_to, default))
    }

    /// The virtual service that a proxy applies to a host, if `bound` says it is for this kind of
    /// proxy. The most specific host wins, then the oldest document.
    pub fn virtual_service<'a>(
        &'a self,
        proxy: &ProxyNode,
        host: &str,
        bound: impl Fn(&Doc<VirtualService>) -> bool,
    ) -> Option<&'a Doc<VirtualService>> {
        let list = &self.config.virtual_services;
        let usable = |i: usize| {
            let d = list.get(i)?;
            (self.shows(proxy, d) && bound(d)).then_some(d)
        };
        if let Some(found) =
            self.virtual_services.exact.get(host).into_iter().flatten().find_map(|i| usable(*i))
        {
            return Some(found);
        }
        self.virtual_services
            .wildcards
            .iter()
            .filter(|(p, _)| hosts::covers(p, host))
            .find_map(|(_, i)| usable(*i))
    }

    /// All virtual services with their resolved hosts, oldest first.
    pub fn virtual_services(&self) -> impl Iterator<Item = (&Doc<VirtualService>, &[String])> {
        self.config.virtual_services.iter().zip(self.virtual_services.hosts.iter().map(Vec::as_slice))
    }

    // ------------------------------------------------------------------ inbound

    /// mTLS mode of a proxy's port (PeerAuthentication): mesh, namespace, workload and port level, each overriding the
    /// one before unless `UNSET`. If none of them says anything, that of a Policy of 1.0; permissive without any.
    #[must_use]
    pub fn mtls_mode(&self, proxy: &ProxyNode, port: u16) -> MutualTlsMode {
        match self.peer_mode(&proxy.namespace, &proxy.labels, port) {
            MutualTlsMode::Unset => self
                .authn_policy(&proxy.namespace, &proxy.addresses, Some(port))
                .map_or(MutualTlsMode::Permissive, |p| v1alpha1::mode(&p.spec)),
            mode => mode,
        }
    }

    /// Whether the mesh's TLS at a proxy's port is for callers without a certificate as well. Only a Policy of 1.0 says so,
    /// where no PeerAuthentication says anything.
    #[must_use]
    pub fn allows_tls(&self, proxy: &ProxyNode, port: u16) -> bool {
        self.peer_mode(&proxy.namespace, &proxy.labels, port) == MutualTlsMode::Unset
            && self
                .authn_policy(&proxy.namespace, &proxy.addresses, Some(port))
                .is_some_and(|p| v1alpha1::allows_tls(&p.spec))
    }

    /// [`Self::mtls_mode`] of an endpoint of a service of this namespace.
    #[must_use]
    pub fn mtls_mode_of(&self, namespace: &str, e: &Endpoint) -> MutualTlsMode {
        match self.peer_mode(namespace, &e.labels, e.port) {
            MutualTlsMode::Unset => self
                .authentication
                .at(&self.config, namespace, std::iter::once(e.address.as_str()), Some(e.port))
                .map_or(MutualTlsMode::Permissive, |p| v1alpha1::mode(&p.spec)),
            mode => mode,
        }
    }

    /// The Policy of 1.0 that counts for a port of a workload, or for the whole of it.
    #[must_use]
    pub fn authn_policy(
        &self,
        namespace: &str,
        addresses: &[IpAddr],
        port: Option<u16>,
    ) -> Option<&Doc<AuthenticationPolicy>> {
        if self.authentication.is_empty() {
            return None;
        }
        let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        self.authentication.at(&self.config, namespace, texts.iter().map(String::as_str), port)
    }

    /// What PeerAuthentications say of a port; `UNSET` if nothing.
    fn peer_mode(&self, namespace: &str, labels: &Labels, port: u16) -> MutualTlsMode {
        let mut mode = MutualTlsMode::Unset;
        let mut set = |m: MutualTlsMode| {
            if m != MutualTlsMode::Unset {
                mode = m;
            }
        };
        let root = self.config.root_namespace();
        let of = |ns: &str| {
            self.peer_auth
                .get(ns)
                .into_iter()
                .flatten()
                .filter_map(|i| self.config.peer_authentications.get(*i))
        };
        let broad = |ns: &str| {
            of(ns)
                .find(|p| p.spec.selector.as_ref().is_none_or(|s| s.match_labels.is_empty()))
                .and_then(|p| p.spec.mtls.as_ref())
                .map_or(MutualTlsMode::Unset, |m| m.mode)
        };
        set(broad(root));
        if namespace != root {
            set(broad(namespace));
        }
        // Selectors in the root namespace have no effect.
        if let Some(p) = of(namespace).filter(|_| namespace != root).find(|p| {
            p.spec
                .selector
                .as_ref()
                .is_some_and(|s| !s.match_labels.is_empty() && selects(&s.match_labels, labels))
        }) {
            set(p.spec.mtls.as_ref().map_or(MutualTlsMode::Unset, |m| m.mode));
            if let Some(m) = p.spec.port_level_mtls.as_ref().and_then(|m| m.get(&port.to_string())) {
                set(m.mode);
            }
        }
        mode
    }
}

/// Namespaces of ServiceEntries that `MeshConfig.serviceEntryVisibility` bounds.
fn bounded(config: &Config) -> BTreeMap<String, Visibility> {
    let Some(v) = config.mesh.service_entry_visibility.as_ref().filter(|v| v.apply_to_sidecars) else {
        return BTreeMap::new();
    };
    let matches = |namespace: &str, r: &VisibilityRule| {
        let labels = config.gateway_api.namespaces.get(namespace);
        r.namespace_selector.as_ref().is_some_and(|s| gateway_api::known::selects(s, namespace, labels))
    };
    let of = |namespace: &str| {
        let mut policies = v.policies.iter();
        let first = policies.find(|p| p.matching_rules.iter().all(|r| matches(namespace, r)));
        first.map_or(v.default_visibility, |p| p.visibility)
    };
    let namespaces: BTreeSet<&str> = config.service_entries.iter().map(|d| d.namespace.as_str()).collect();
    let all = namespaces.into_iter().map(|n| (n.to_owned(), of(n)));
    all.filter(|(_, v)| matches!(v, Visibility::None | Visibility::Namespace)).collect()
}

/// Whether a rule prefers zones somewhere.
fn prefers_zones(rule: &DestinationRule) -> bool {
    let subsets = rule.subsets.iter().filter_map(|s| s.traffic_policy.as_ref());
    let mut all = rule.traffic_policy.iter().chain(subsets).flat_map(|p| {
        let ports = p.port_level_settings.iter().map(|s| &s.load_balancer);
        [&p.load_balancer].into_iter().chain(ports).flatten()
    });
    all.any(|l| l.zone_aware_lb_setting.is_some())
}

/// What `sourceLabels`, selectors and `failoverPriority` look at in a caller.
fn telling_labels(config: &Config) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    for d in &config.virtual_services {
        let s = &d.spec;
        let http = s.http.iter().flat_map(|r| &r.matches).map(|m| &m.source_labels);
        let tls = s.tls.iter().flat_map(|r| &r.matches).map(|m| &m.source_labels);
        let tcp = s.tcp.iter().flat_map(|r| &r.matches).map(|m| &m.source_labels);
        out.extend(http.chain(tls).chain(tcp).flat_map(|l| l.keys().cloned()));
    }
    let sidecars = config.sidecars.iter().filter_map(|d| d.spec.workload_selector.as_ref());
    out.extend(sidecars.flat_map(|w| w.labels.keys().cloned()));
    let zones = config.mesh.zone_aware_lb_setting.iter();
    out.extend(zones.flat_map(|z| &z.failover_priority).filter(|p| !p.contains('=')).cloned());
    let mut settings: Vec<&LocalityLbSetting> = config.mesh.locality_lb_setting.iter().collect();
    for d in &config.destination_rules {
        out.extend(d.spec.workload_selector.iter().flat_map(|w| w.match_labels.keys().cloned()));
        let policies = d.spec.traffic_policy.iter();
        for p in policies.chain(d.spec.subsets.iter().filter_map(|s| s.traffic_policy.as_ref())) {
            let ports = p.port_level_settings.iter().filter_map(|p| p.load_balancer.as_ref());
            let all = p.load_balancer.iter().chain(ports);
            settings.extend(all.filter_map(|l| l.locality_lb_setting.as_ref()));
        }
    }
    // `key=value` is about the endpoint alone.
    let keys = settings.into_iter().flat_map(|s| &s.failover_priority).filter(|p| !p.contains('='));
    out.extend(keys.cloned());
    out
}

fn destination_rules(config: &Config, index: &Index) -> BTreeMap<String, NamespaceRules> {
    let mut out: BTreeMap<String, NamespaceRules> = BTreeMap::new();
    for doc in &config.destination_rules {
        let host = hosts::resolve(&doc.spec.host, &doc.namespace);
        let host = index.canonical(&host).to_owned();
        let rules = out.entry(doc.namespace.clone()).or_default();
        let fresh = Rule { rule: doc.spec.clone(), namespace: doc.namespace.clone() };
        let slot = if host.starts_with('*') {
            match rules.wildcards.iter_mut().find(|(h, _)| *h == host) {
                Some((_, r)) => Some(r),
                None => {
                    rules.wildcards.push((host, fresh));
                    continue;
                }
            }
        } else {
            match rules.exact.get_mut(&host) {
                Some(r) => Some(r),
                None => {
                    rules.exact.insert(host, fresh);
                    continue;
                }
            }
        };
        // A later rule for the same host adds subsets, and a policy if there is none.
        if let Some(r) = slot {
            let mut merged = (*r.rule).clone();
            let known: BTreeSet<String> = merged.subsets.iter().map(|s| s.name.clone()).collect();
            merged.subsets.extend(doc.spec.subsets.iter().filter(|s| !known.contains(&s.name)).cloned());
            if merged.traffic_policy.is_none() {
                merged.traffic_policy.clone_from(&doc.spec.traffic_policy);
            }
            r.rule = Arc::new(merged);
        }
    }
    for rules in out.values_mut() {
        rules.wildcards.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then_with(|| a.0.cmp(&b.0)));
    }
    out
}

fn virtual_services(config: &Config, index: &Index) -> VirtualServices {
    let mut out = VirtualServices::default();
    for (i, doc) in config.virtual_services.iter().enumerate() {
        let mut resolved = Vec::new();
        let as_written = doc.annotations.contains_key(SEMANTICS);
        for h in &doc.spec.hosts {
            let host = if as_written { h.to_ascii_lowercase() } else { hosts::resolve(h, &doc.namespace) };
            let host = index.canonical(&host).to_owned();
            if host.starts_with('*') {
                out.wildcards.push((host.clone(), i));
            } else {
                out.exact.entry(host.clone()).or_default().push(i);
            }
            resolved.push(host);
        }
        out.hosts.push(resolved);
    }
    // Stable: of equal patterns the oldest document stays first.
    out.wildcards.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then_with(|| a.0.cmp(&b.0)));
    out
}

/// What a destination rule says for one port and subset. Blocks of the subset replace those of the
/// rule; settings of the port replace all of them.
#[must_use]
pub fn effective_policy(rule: Option<&DestinationRule>, subset: Option<&Subset>, port: u16) -> TrafficPolicy {
    let top = rule.and_then(|r| r.traffic_policy.as_ref());
    let sub = subset.and_then(|s| s.traffic_policy.as_ref());
    let of_port = |p: Option<&TrafficPolicy>| {
        p.and_then(|p| {
            p.port_level_settings
                .iter()
                .find(|s| s.port.as_ref().is_some_and(|sel| sel.number == u32::from(port)))
        })
        .cloned()
    };
    if let Some(p) = of_port(sub).or_else(|| of_port(top)) {
        return TrafficPolicy {
            load_balancer: p.load_balancer,
            connection_pool: p.connection_pool,
            outlier_detection: p.outlier_detection,
            tls: p.tls,
            ..TrafficPolicy::default()
        };
    }
    let pick = |f: fn(&TrafficPolicy) -> bool| sub.filter(|p| f(p)).or(top);
    TrafficPolicy {
        load_balancer: pick(|p| p.load_balancer.is_some()).and_then(|p| p.load_balancer.clone()),
        connection_pool: pick(|p| p.connection_pool.is_some()).and_then(|p| p.connection_pool.clone()),
        outlier_detection: pick(|p| p.outlier_detection.is_some()).and_then(|p| p.outlier_detection.clone()),
        tls: pick(|p| p.tls.is_some()).and_then(|p| p.tls.clone()),
        retry_budget: pick(|p| p.retry_budget.is_some()).and_then(|p| p.retry_budget.clone()),
        proxy_protocol: pick(|p| p.proxy_protocol.is_some()).and_then(|p| p.proxy_protocol.clone()),
        ..TrafficPolicy::default()
    }
}

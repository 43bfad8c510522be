//! Configuration as pilot works with it: typed documents in the order that conflicts are resolved
//! in, oldest first.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use mesh_model::{
    ClusterId, TrustDomain,
    authored::{
        AuthorizationPolicy, DestinationRule, EndpointSlice, ExportPolicy, Gateway, ImportPolicy, Kind,
        MeshConfig, PeerAction, PeerAuthentication, ProxyConfig, RequestAuthentication, Service,
        ServiceEntry, ServiceExport, Sidecar, Spec, VirtualService, WorkloadEntry, WorkloadGroup,
    },
    federation::{ForeignBundle, FormerCluster, ImportedService, ON_LAPSE, OnLapse, PeerCluster, type_url},
    registry::Labels,
};
use mesh_xds::mcp;
use serde::Serialize;

use crate::{
    consul::{Registered, Services},
    envoy_filter::Filter,
    gateway_api::{self, SERVED_IN},
    ingress,
    issuers::Discovered,
    kubernetes::Pods,
    v1alpha1,
};

/// Kinds that pilot reads from galley.
pub const GALLEY_KINDS: &[Kind] = &[
    Kind::Service,
    Kind::WorkloadEntry,
    Kind::WorkloadGroup,
    Kind::Node,
    Kind::Pod,
    Kind::EndpointSlice,
    Kind::ServiceEntry,
    Kind::VirtualService,
    Kind::DestinationRule,
    Kind::Gateway,
    Kind::Sidecar,
    Kind::PeerAuthentication,
    Kind::RequestAuthentication,
    Kind::AuthorizationPolicy,
    Kind::AuthnPolicy,
    Kind::MeshPolicy,
    Kind::RbacConfig,
    Kind::ClusterRbacConfig,
    Kind::ServiceRole,
    Kind::ServiceRoleBinding,
    Kind::ServiceExport,
    Kind::MeshConfig,
    Kind::ExportPolicy,
    Kind::ImportPolicy,
    Kind::GatewayClass,
    Kind::KubernetesGateway,
    Kind::HttpRoute,
    Kind::GrpcRoute,
    Kind::TlsRoute,
    Kind::TcpRoute,
    Kind::ReferenceGrant,
    Kind::BackendTlsPolicy,
    Kind::Ingress,
    Kind::IngressClass,
    Kind::EnvoyFilter,
    Kind::ProxyConfig,
    // For their labels, by which listeners choose.
    Kind::Namespace,
];

/// Types that pilot reads from the federation component.
pub const FEDERATION_TYPES: &[&str] =
    &[type_url::IMPORTED_SERVICE, type_url::PEER_CLUSTER, type_url::FORMER_CLUSTER, type_url::FOREIGN_BUNDLE];

/// A document with what its metadata says.
#[derive(Debug, Clone)]
pub struct Doc<T> {
    /// Name within its namespace.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Seconds since the epoch.
    pub created: u64,
    /// Labels of the object.
    pub labels: Arc<Labels>,
    /// Annotations of the object.
    pub annotations: Arc<Labels>,
    /// Content.
    pub spec: Arc<T>,
}

impl<T> Doc<T> {
    pub(crate) fn of(doc: &mcp::Document, spec: &Arc<T>) -> Self {
        let (namespace, name) = doc.namespaced_name();
        Self {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            created: doc.created,
            labels: Arc::new(doc.labels.clone()),
            annotations: Arc::new(doc.annotations.clone()),
            spec: spec.clone(),
        }
    }
}

/// Something in the configuration that pilot cannot do as written. Shown by `/debug/problems`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    /// Object, such as `VirtualService books/reviews`.
    pub object: String,
    /// What is wrong and what pilot does instead.
    pub message: String,
}

/// All configuration of this cluster and what peers export to it.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Services of the platform.
    pub services: Vec<Doc<Service>>,
    /// Workloads, pods among them.
    pub workload_entries: Vec<Doc<WorkloadEntry>>,
    /// What workloads may register themselves in.
    pub workload_groups: Vec<Doc<WorkloadGroup>>,
    /// Accounts and labels of those that did, by namespace and address.
    pub(crate) joined: HashMap<(String, IpAddr), (String, Labels)>,
    /// Where issuers have their keys that were named without.
    pub(crate) discovered: Discovered,
    /// Endpoints of services, from whoever controls them.
    pub endpoint_slices: Vec<Doc<EndpointSlice>>,
    /// Services from configuration.
    pub service_entries: Vec<Doc<ServiceEntry>>,
    /// Routing.
    pub virtual_services: Vec<Doc<VirtualService>>,
    /// Client-side policy.
    pub destination_rules: Vec<Doc<DestinationRule>>,
    /// Edges.
    pub gateways: Vec<Doc<Gateway>>,
    /// Scoping.
    pub sidecars: Vec<Doc<Sidecar>>,
    /// Settings of proxies.
    pub proxy_configs: Vec<Doc<ProxyConfig>>,
    /// Inbound mTLS.
    pub peer_authentications: Vec<Doc<PeerAuthentication>>,
    /// End-user tokens.
    pub request_authentications: Vec<Doc<RequestAuthentication>>,
    /// Inbound authorisation.
    pub authorization_policies: Vec<Doc<AuthorizationPolicy>>,
    /// Authentication and roles as release 1.0 writes them.
    pub v1alpha1: v1alpha1::Documents,
    /// Services of Consul.
    pub registered: Vec<Arc<Registered>>,
    /// What is exported.
    pub service_exports: Vec<Doc<ServiceExport>>,
    /// Settings; defaults without a document.
    pub mesh: Arc<MeshConfig>,
    /// Who may know of exports, oldest policy first.
    pub export_policies: Vec<Doc<ExportPolicy>>,
    /// Who is believed, oldest policy first.
    pub import_policies: Vec<Doc<ImportPolicy>>,
    /// What peers export, as far as they are believed.
    pub imports: Vec<Arc<ImportedService>>,
    /// The peers.
    pub peers: Vec<Arc<PeerCluster>>,
    /// Clusters that were members and are none.
    pub former: Vec<FormerCluster>,
    /// Roots of other trust domains, by domain.
    pub bundles: BTreeMap<String, ForeignBundle>,
    /// Patches of what is generated.
    pub envoy_filters: Vec<Doc<Filter>>,
    /// Those of the own trust domain.
    pub roots: Option<ForeignBundle>,
    /// Tells what is revoked in the own trust domain apart; `None` if that is nothing.
    pub revoked: Option<String>,
    /// Documents of the Gateway API as written; what they mean is among the others.
    pub gateway_api: gateway_api::Documents,
    /// Ingresses and their classes as written; what they mean is among the others.
    pub ingress: ingress::Documents,
    /// Documents that could not be read.
    pub problems: Vec<Problem>,
}

/// A document as it was read last.
struct Read {
    document: Arc<mcp::Document>,
    spec: Result<Spec, String>,
    /// Of an EnvoyFilter: its patches, typed once.
    filter: Option<Arc<Filter>>,
    labels: Arc<Labels>,
    annotations: Arc<Labels>,
}

impl Read {
    fn new(kind: Kind, document: &Arc<mcp::Document>) -> Self {
        let spec = Spec::from_json(kind, document.body.clone()).map_err(|e| e.to_string());
        let filter = match &spec {
            Ok(Spec::EnvoyFilter(f)) => Some(Arc::new(Filter::new(f))),
            _ => None,
        };
        Self {
            document: Arc::clone(document),
            spec,
            filter,
            labels: Arc::new(document.labels.clone()),
            annotations: Arc::new(document.annotations.clone()),
        }
    }
}

/// Reads documents, remembering those that did not change.
#[derive(Default)]
pub struct Reader {
    parsed: HashMap<Kind, HashMap<String, Read>>,
    imports: HashMap<String, (Arc<mcp::Document>, Arc<ImportedService>)>,
    pods: Pods,
}

impl Reader {
    /// Turns the states of both sources into a configuration.
    pub fn read(&mut self, galley: &mcp::ConfigState, federation: &mcp::ConfigState) -> Config {
        let mut config = Config::default();
        for kind in GALLEY_KINDS {
            let known = self.parsed.entry(*kind).or_default();
            let now = galley.documents.get(kind.type_url());
            known.retain(|name, _| now.is_some_and(|now| now.contains_key(name)));
            for (name, document) in now.into_iter().flatten() {
                let stale = known.get(name).is_none_or(|r| !Arc::ptr_eq(&r.document, document));
                if stale {
                    known.insert(name.clone(), Read::new(*kind, document));
                }
                let Some(read) = known.get(name) else { continue };
                match &read.spec {
                    Ok(spec) => config.add(read, spec),
                    Err(e) => config.problems.push(Problem {
                        object: format!("{} {name}", kind.name()),
                        message: format!("ignored: {e}"),
                    }),
                }
            }
        }
        config.workload_entries.append(&mut self.pods.workloads(galley));
        config.sort();

        let chosen: HashMap<_, _> = config
            .services
            .iter()
            .filter_map(|s| {
                let on_lapse = OnLapse::parse(s.annotations.get(ON_LAPSE)?)?;
                Some(((s.namespace.clone(), s.name.clone()), on_lapse))
            })
            .collect();
        let mut imports = HashMap::with_capacity(self.imports.len());
        for (name, doc) in federation.of(type_url::IMPORTED_SERVICE) {
            let import = match self.imports.remove(name) {
                Some((d, i)) if Arc::ptr_eq(&d, doc) => Ok(i),
                _ => doc.spec::<ImportedService>().map(Arc::new),
            };
            match import {
                Ok(i) => {
                    let believed = believed(&config, &chosen, &i);
                    config.imports.extend(believed);
                    imports.insert(name.clone(), (doc.clone(), i));
                }
                Err(e) => config.problems.push(Problem {
                    object: format!("ImportedService {name}"),
                    message: format!("ignored: {e}"),
                }),
            }
        }
        self.imports = imports;
        for (name, doc) in federation.of(type_url::PEER_CLUSTER) {
            match doc.spec::<PeerCluster>() {
                Ok(p) => config.peers.push(Arc::new(p)),
                Err(e) => config.problems.push(Problem {
                    object: format!("PeerCluster {name}"),
                    message: format!("ignored: {e}"),
                }),
            }
        }
        for (name, doc) in federation.of(type_url::FORMER_CLUSTER) {
            match doc.spec::<FormerCluster>() {
                Ok(f) => config.former.push(f),
                Err(e) => config.problems.push(Problem {
                    object: format!("FormerCluster {name}"),
                    message: format!("ignored: {e}"),
                }),
            }
        }
        for (name, doc) in federation.of(type_url::FOREIGN_BUNDLE) {
            match doc.spec::<ForeignBundle>() {
                Ok(b) if b.own.is_some() => {
                    config.revoked = mesh_identity::revoked_digest(&b.trust_domain, &b.roots, &b.revoked);
                    config.roots = Some(b);
                }
                Ok(b) => drop(config.bundles.insert(b.trust_domain.to_string(), b)),
                Err(e) => config.problems.push(Problem {
                    object: format!("ForeignBundle {name}"),
                    message: format!("ignored: {e}"),
                }),
            }
        }
        config.discover();
        config.imports.sort_by(|a, b| {
            (&a.service.namespace, &a.service.name, &a.cluster).cmp(&(
                &b.service.namespace,
                &b.service.name,
                &b.cluster,
            ))
        });
        config.peers.sort_by(|a, b| a.id.cmp(&b.id));
        config.former.sort_by(|a, b| a.id.cmp(&b.id));
        ingress::apply(&mut config);
        gateway_api::apply(&mut config);
        config
    }
}

/// An import as the policies let it in, if they do.
fn believed(
    config: &Config,
    chosen: &HashMap<(String, String), OnLapse>,
    i: &Arc<ImportedService>,
) -> Option<Arc<ImportedService>> {
    let matches = |list: &[String], name: &str| list.is_empty() || list.iter().any(|n| n == name);
    let mut rules = config.import_policies.iter().flat_map(|p| &p.spec.rules);
    let rule =
        rules.find(|r| matches(&r.peers, i.cluster.as_str()) && matches(&r.namespaces, &i.service.namespace));
    if rule.is_some_and(|r| r.action == PeerAction::Deny) {
        return None;
    }
    // Nearly always nobody has chosen anything, and a lookup needs owned names.
    let own = if chosen.is_empty() {
        None
    } else {
        chosen.get(&(i.service.namespace.clone(), i.service.name.clone())).copied()
    };
    let on_lapse = own.or_else(|| rule.and_then(|r| r.on_lapse)).unwrap_or_default();
    if on_lapse == i.on_lapse {
        return Some(i.clone());
    }
    Some(Arc::new(ImportedService { on_lapse, ..(**i).clone() }))
}

impl Config {
    /// The trust domain of a peer, if that is not the own one.
    #[must_use]
    pub fn foreign_domain(&self, cluster: &ClusterId) -> Option<&TrustDomain> {
        let at = self.peers.binary_search_by(|p| p.id.cmp(cluster)).ok()?;
        self.peers[at].trust_domain.as_ref()
    }

    /// Adds the services of Consul. Their instances are workloads, so that a `Service` can select them.
    pub fn register(&mut self, services: &Services) {
        for s in services.all() {
            self.problems.extend(s.problems.iter().cloned());
            self.workload_entries.extend(s.instances.iter().map(|(_, w)| w.clone()));
            self.registered.push(s.clone());
        }
        self.sort();
    }

    fn add(&mut self, doc: &Read, spec: &Spec) {
        let (namespace, name) = doc.document.namespaced_name();
        fn wrap<T>(doc: &Read, ns: &str, name: &str, spec: &Arc<T>) -> Doc<T> {
            Doc {
                name: name.to_owned(),
                namespace: ns.to_owned(),
                created: doc.document.created,
                labels: Arc::clone(&doc.labels),
                annotations: Arc::clone(&doc.annotations),
                spec: spec.clone(),
            }
        }
        macro_rules! into {
            ($list:ident, $s:expr) => {
                self.$list.push(wrap(doc, namespace, name, $s))
            };
        }
        if let Some(f) = &doc.filter {
            self.problems.extend(f.problems(&format!("{namespace}/{name}")));
            into!(envoy_filters, f);
            return;
        }
        match spec {
            Spec::Service(s) => into!(services, s),
            Spec::WorkloadEntry(s) => into!(workload_entries, s),
            Spec::WorkloadGroup(s) => into!(workload_groups, s),
            Spec::ServiceEntry(s) => into!(service_entries, s),
            Spec::VirtualService(s) => into!(virtual_services, s),
            Spec::DestinationRule(s) => into!(destination_rules, s),
            Spec::Gateway(s) => into!(gateways, s),
            Spec::Sidecar(s) => into!(sidecars, s),
            Spec::ProxyConfig(s) => into!(proxy_configs, s),
            Spec::PeerAuthentication(s) => into!(peer_authentications, s),
            Spec::RequestAuthentication(s) => into!(request_authentications, s),
            Spec::AuthorizationPolicy(s) => into!(authorization_policies, s),
            Spec::ServiceExport(s) => into!(service_exports, s),
            Spec::MeshConfig(s) => self.mesh = s.clone(),
            Spec::ExportPolicy(s) => into!(export_policies, s),
            Spec::ImportPolicy(s) => into!(import_policies, s),
            Spec::EndpointSlice(s) => into!(endpoint_slices, s),
            other if self.v1alpha1.add(&doc.document, other) => {}
            other if self.ingress.add(&doc.document, other) => {}
            // Pods and nodes are read together; others are not subscribed to.
            other => self.gateway_api.add(&doc.document, other),
        }
    }

    pub(crate) fn sort(&mut self) {
        by_age(&mut self.services);
        by_age(&mut self.workload_entries);
        by_age(&mut self.workload_groups);
        by_age(&mut self.endpoint_slices);
        by_age(&mut self.service_entries);
        by_age(&mut self.virtual_services);
        by_age(&mut self.destination_rules);
        by_age(&mut self.gateways);
        by_age(&mut self.sidecars);
        by_age(&mut self.proxy_configs);
        by_age(&mut self.peer_authentications);
        by_age(&mut self.request_authentications);
        by_age(&mut self.authorization_policies);
        by_age(&mut self.service_exports);
        by_age(&mut self.export_policies);
        by_age(&mut self.import_policies);
        self.v1alpha1.sort();
        self.gateway_api.sort();
        self.ingress.sort();
    }

    /// Certificates of a mesh that runs are of one trust domain, whatever its settings call it: under another name nobody
    /// would be found. Settings that came from another mesh say another one easily.
    pub fn keep_trust_domain(&mut self, own: &TrustDomain) {
        let Some(said) = self.mesh.trust_domain.as_deref().filter(|s| *s != own.as_str()) else { return };
        self.problems.push(Problem {
            object: "MeshConfig mesh".to_owned(),
            message: format!(
                "trustDomain {said:?} is ignored: the certificates of this mesh are of {own}; policies about the other name need it in trustDomainAliases"
            ),
        });
        self.mesh = Arc::new(MeshConfig { trust_domain: None, ..(*self.mesh).clone() });
    }

    /// Leaves out what is in namespaces that `MeshConfig.discoverySelectors` do not select. The mesh's own namespace is
    /// always selected.
    fn discover(&mut self) {
        let mesh = Arc::clone(&self.mesh);
        if mesh.discovery_selectors.is_empty() {
            return;
        }
        let root = self.root_namespace().to_owned();
        let labels = std::mem::take(&mut self.gateway_api.namespaces);
        let seen = |namespace: &str| {
            let of = labels.get(namespace);
            namespace == root
                || mesh.discovery_selectors.iter().any(|s| gateway_api::known::selects(s, namespace, of))
        };
        macro_rules! only {
            ($($list:expr),*) => { $($list.retain(|d| seen(&d.namespace));)* };
        }
        only!(
            self.services,
            self.workload_entries,
            self.workload_groups,
            self.endpoint_slices,
            self.service_entries,
            self.virtual_services,
            self.destination_rules,
            self.gateways,
            self.sidecars,
            self.proxy_configs,
            self.peer_authentications,
            self.request_authentications,
            self.authorization_policies,
            self.service_exports,
            self.envoy_filters
        );
        self.imports.retain(|i| seen(&i.service.namespace));
        self.v1alpha1.retain(&seen);
        self.gateway_api.retain(&seen);
        self.ingress.retain(&seen);
        self.gateway_api.namespaces = labels;
    }

    /// Namespace whose policies apply to the whole mesh.
    #[must_use]
    pub fn root_namespace(&self) -> &str {
        self.mesh.root_namespace.as_deref().unwrap_or("istio-system")
    }
}

/// `exportTo` of something, or what the mesh says of those that have none.
#[must_use]
pub(crate) fn exported<'a>(own: &'a [String], default: &'a [String]) -> &'a [String] {
    if own.is_empty() { default } else { own }
}

/// Orders documents as conflicts between them are resolved.
pub(crate) fn by_age<T>(list: &mut [Doc<T>]) {
    list.sort_by(|a, b| (a.created, &a.namespace, &a.name).cmp(&(b.created, &b.namespace, &b.name)));
}

impl Doc<Gateway> {
    /// Whether proxies of a namespace with these labels serve it. An authored one is served in every namespace.
    #[must_use]
    pub fn is_served_by(&self, namespace: &str, labels: &Labels) -> bool {
        self.annotations.get(SERVED_IN).is_none_or(|n| n == namespace) && selects(&self.spec.selector, labels)
    }
}

/// Whether `selector` is a subset of `labels`; an empty selector matches.
#[must_use]
pub fn selects(selector: &BTreeMap<String, String>, labels: &Labels) -> bool {
    selector.iter().all(|(k, v)| labels.get(k) == Some(v))
}

//! The Gateway API as a second way to write what Istio's kinds say.
//!
//! Its documents become `Gateway`, `VirtualService` and `DestinationRule` documents of this cluster's configuration, as in
//! Istio, so that generators, simulations and explanations know one model only. All of it is a pure function of the
//! configuration.
//!
//! | written | becomes |
//! |---|---|
//! | a listener | a `Gateway` with one server, called `<gateway>~<listener>` |
//! | HTTPRoutes and GRPCRoutes of a listener | a `VirtualService` for each host name, its rules in the order of this API |
//! | TLSRoutes and TCPRoutes of a listener | a `VirtualService` each |
//! | routes of a Service | one `VirtualService`; of another namespace's routes one that this namespace alone sees |
//! | BackendTLSPolicy | `tls` in the `DestinationRule` of its Service |
//!
//! Names with a `~` cannot be those of authored documents.

mod attach;
mod authorizers;
mod backend_tls;
mod backends;
mod http;
pub(crate) mod known;
mod l4;
mod listeners;
mod order;
mod rule;
mod session;
pub mod status;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use mesh_model::{
    authored::{
        self, Spec, VirtualService,
        gateway_api::{
            BackendTlsPolicy, Gateway, GatewayClass, GrpcRoute, HttpRoute, L4Route, ReferenceGrant,
        },
    },
    registry::Labels,
};
use mesh_xds::mcp;

use self::{
    attach::{Target, routes},
    http::Place,
    known::Known,
    listeners::{Serves, listeners},
    order::Candidate,
};
use crate::{
    config::{Config, Doc},
    hosts,
};

/// Names of this mesh as an implementation, ours and the one whose documents we execute.
const CONTROLLERS: [&str; 2] = ["flotilla.dev/gateway-controller", "istio.io/gateway-controller"];
/// Classes that need no document.
const CLASSES: [&str; 2] = ["flotilla", "istio"];
/// Label of the proxies that serve a Gateway, in its namespace.
pub const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
/// Annotation of made `Gateway` documents: the namespace of the proxies that serve them.
pub(crate) const SERVED_IN: &str = "flotilla.dev/gateway-namespace";
/// Annotation of made `Gateway` documents: the credential that their proxies show to backends whose TLS they verify.
pub(crate) const CLIENT_CERTIFICATE: &str = "flotilla.dev/backend-client-certificate";
/// Annotation of made `VirtualService` documents: a host without a dot is no service's short name, and prefixes of paths
/// are whole segments.
pub(crate) const SEMANTICS: &str = "flotilla.dev/gateway-api-semantics";

/// Documents of the Gateway API, oldest first, and what else their meaning depends on.
#[derive(Debug, Clone, Default)]
pub struct Documents {
    /// Classes.
    pub classes: Vec<Doc<GatewayClass>>,
    /// Gateways.
    pub gateways: Vec<Doc<Gateway>>,
    /// Routes of HTTP.
    pub http: Vec<Doc<HttpRoute>>,
    /// Routes of gRPC.
    pub grpc: Vec<Doc<GrpcRoute>>,
    /// Routes of TLS.
    pub tls: Vec<Doc<L4Route>>,
    /// Routes of TCP.
    pub tcp: Vec<Doc<L4Route>>,
    /// Who may refer to other namespaces.
    pub grants: Vec<Doc<ReferenceGrant>>,
    /// TLS to backends.
    pub backend_tls: Vec<Doc<BackendTlsPolicy>>,
    /// Labels of namespaces, by which listeners may choose.
    pub namespaces: BTreeMap<String, Labels>,
}

impl Documents {
    /// Leaves out what is in namespaces that are not seen.
    pub(crate) fn retain(&mut self, seen: &impl Fn(&str) -> bool) {
        self.gateways.retain(|d| seen(&d.namespace));
        self.http.retain(|d| seen(&d.namespace));
        self.grpc.retain(|d| seen(&d.namespace));
        self.tls.retain(|d| seen(&d.namespace));
        self.tcp.retain(|d| seen(&d.namespace));
        self.grants.retain(|d| seen(&d.namespace));
        self.backend_tls.retain(|d| seen(&d.namespace));
    }

    pub(crate) fn add(&mut self, doc: &mcp::Document, spec: &Spec) {
        match spec {
            Spec::GatewayClass(s) => self.classes.push(Doc::of(doc, s)),
            Spec::KubernetesGateway(s) => self.gateways.push(Doc::of(doc, s)),
            Spec::HttpRoute(s) => self.http.push(Doc::of(doc, s)),
            Spec::GrpcRoute(s) => self.grpc.push(Doc::of(doc, s)),
            Spec::TlsRoute(s) => self.tls.push(Doc::of(doc, s)),
            Spec::TcpRoute(s) => self.tcp.push(Doc::of(doc, s)),
            Spec::ReferenceGrant(s) => self.grants.push(Doc::of(doc, s)),
            Spec::BackendTlsPolicy(s) => self.backend_tls.push(Doc::of(doc, s)),
            Spec::Namespace(_) => drop(self.namespaces.insert(doc.name.clone(), doc.labels.clone())),
            _ => {}
        }
    }

    pub(crate) fn sort(&mut self) {
        crate::config::by_age(&mut self.classes);
        crate::config::by_age(&mut self.gateways);
        crate::config::by_age(&mut self.http);
        crate::config::by_age(&mut self.grpc);
        crate::config::by_age(&mut self.tls);
        crate::config::by_age(&mut self.tcp);
        crate::config::by_age(&mut self.grants);
        crate::config::by_age(&mut self.backend_tls);
    }

    fn is_empty(&self) -> bool {
        self.gateways.is_empty()
            && self.http.is_empty()
            && self.grpc.is_empty()
            && self.tls.is_empty()
            && self.tcp.is_empty()
            && self.backend_tls.is_empty()
    }
}

/// Adds to a configuration what its documents of the Gateway API say. The rest must be complete and sorted.
pub(crate) fn apply(config: &mut Config) {
    if config.gateway_api.is_empty() {
        return;
    }
    let known = Known::new(config);
    let listeners = listeners(&known);
    let gateways: Vec<_> = listeners.iter().flat_map(|l| l.documents(&known)).collect();
    let made = Made::new(&known, &listeners);
    let rules = backend_tls::rules(&known);
    let problems = status::problems(config);

    config.problems.extend(problems);
    config.gateways.extend(gateways.into_iter().chain(made.gateways));
    crate::config::by_age(&mut config.gateways);
    // The oldest document for a host is the one that counts, so a caller's own comes before those for everybody.
    let mut all = made.of_consumers;
    all.append(&mut config.virtual_services);
    all.extend(made.virtual_services);
    all.sort_by_key(|d| d.created);
    config.virtual_services = all;
    backend_tls::merge(&mut config.destination_rules, rules);
}

/// What routes become.
#[derive(Default)]
struct Made {
    gateways: Vec<Doc<authored::Gateway>>,
    virtual_services: Vec<Doc<VirtualService>>,
    of_consumers: Vec<Doc<VirtualService>>,
}

/// Where requests and connections of a Service's callers go.
#[derive(Default)]
struct Mesh {
    hosts: Vec<String>,
    http: Vec<Candidate>,
    tls: Vec<authored::TlsRoute>,
    tcp: Vec<authored::TcpRoute>,
    created: Option<u64>,
}

impl Made {
    fn new(known: &Known<'_>, listeners: &[Serves<'_>]) -> Self {
        let mut out = Self::default();
        // By listener and host.
        let mut edge: BTreeMap<(usize, String), Vec<Candidate>> = BTreeMap::new();
        // By namespace and name of the parent, and the namespace of callers if it is not every.
        let mut mesh: BTreeMap<(String, String, Option<String>), Mesh> = BTreeMap::new();
        for r in routes(known.docs) {
            for p in r.parents(known) {
                match attach::attach(known, listeners, &r, p) {
                    Target::Listeners(list) => {
                        for (i, names) in list {
                            let Some(l) = listeners.get(i) else { continue };
                            out.at_listener(known, l, &r, &names);
                            let place = Place::listener(l);
                            for name in l.isolated(listeners, names) {
                                edge.entry((i, name))
                                    .or_default()
                                    .extend(http::candidates(known, &r, &place));
                            }
                        }
                    }
                    Target::Service(s) => {
                        let consumer = (s.namespace != r.namespace()).then(|| r.namespace().to_owned());
                        let m = mesh
                            .entry((s.namespace.to_owned(), s.name.to_owned(), consumer))
                            .or_insert_with(|| Mesh { hosts: s.hosts.clone(), ..Mesh::default() });
                        m.created = Some(m.created.map_or(r.created(), |c| c.min(r.created())));
                        let place = Place::mesh(s.port);
                        m.http.extend(http::candidates(known, &r, &place));
                        m.tls.extend(l4::tls(known, &r, r.hostnames(), s.port, false));
                        m.tcp.extend(l4::tcp(known, &r, s.port, false));
                    }
                    Target::Ignored | Target::Refused(_) => {}
                }
            }
        }
        for (i, l) in listeners.iter().enumerate() {
            if let Some(name) = l.shadowed(listeners).filter(|n| !edge.contains_key(&(i, n.clone()))) {
                out.virtual_services.push(l.document(&name, vec![http::not_found()], l.gateway.created));
            }
        }
        for ((i, name), list) in edge {
            let Some(l) = listeners.get(i).filter(|_| !list.is_empty()) else { continue };
            let created = list.iter().map(|c| c.order.created()).min().unwrap_or_default();
            out.virtual_services.push(l.document(&name, order::sorted(list), created));
        }
        let mut producers: HashMap<(String, String), u64> = HashMap::new();
        // Those for everybody are first, since `None` is.
        for ((namespace, name, consumer), m) in mesh {
            let mut created = m.created.unwrap_or_default();
            let key = (namespace.clone(), name.clone());
            match &consumer {
                None => drop(producers.insert(key, created)),
                Some(_) => created = producers.get(&key).map_or(created, |p| created.min(*p)),
            }
            let export_to = if consumer.is_some() { vec![".".to_owned()] } else { vec!["*".to_owned()] };
            let list = if consumer.is_some() { &mut out.of_consumers } else { &mut out.virtual_services };
            list.push(virtual_service(
                consumer.as_deref().unwrap_or(&namespace),
                format!("{name}.{namespace}~mesh"),
                created,
                VirtualService {
                    hosts: m.hosts,
                    http: order::sorted(m.http),
                    tls: m.tls,
                    tcp: m.tcp,
                    export_to,
                    ..VirtualService::default()
                },
            ));
        }
        out
    }

    /// Routes of connections at a listener.
    fn at_listener(&mut self, known: &Known<'_>, l: &Serves<'_>, r: &attach::Route<'_>, names: &[String]) {
        let port = l.listener.port;
        let name = format!("{}~{}.{}.{}", l.name(), r.kind().name().to_lowercase(), r.namespace(), r.name());
        let tls = if l.passes() { l4::tls(known, r, names, port, true) } else { vec![] };
        let tcp = if l.passes() { vec![] } else { l4::tcp(known, r, port, true) };
        if tls.is_empty() && tcp.is_empty() {
            return;
        }
        let mut gateway = l.key();
        if r.kind() == attach::RouteKind::Tls && !l.passes() {
            // TLS ends here, and a chain of one server knows one destination: these names have their own.
            self.gateways.extend(l.server(known, &name, names));
            gateway = format!("{}/{name}", l.gateway.namespace);
        }
        let spec = VirtualService {
            hosts: names.to_vec(),
            gateways: vec![gateway],
            tls,
            tcp,
            ..VirtualService::default()
        };
        self.virtual_services.push(virtual_service(&l.gateway.namespace, name, r.created(), spec));
    }
}

fn virtual_service(namespace: &str, name: String, created: u64, spec: VirtualService) -> Doc<VirtualService> {
    made(namespace, name, created, [(SEMANTICS, "true".to_owned())], spec)
}

/// A document that nobody wrote.
fn made<T, const N: usize>(
    namespace: &str,
    name: String,
    created: u64,
    annotations: [(&str, String); N],
    spec: T,
) -> Doc<T> {
    Doc {
        name,
        namespace: namespace.to_owned(),
        created,
        labels: Arc::default(),
        annotations: Arc::new(annotations.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()),
        spec: Arc::new(spec),
    }
}

/// Host of a Service.
fn service_host(name: &str, namespace: &str) -> String {
    hosts::service_host(name, namespace)
}

#[cfg(test)]
mod tests;

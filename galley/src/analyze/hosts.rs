//! Which hosts exist, and who may see them.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use mesh_model::authored::Spec;

use super::world::{Labels, Resource};
use crate::analysis::{is_peer_name, qualify};

/// A host of the mesh.
#[derive(Debug, Clone)]
pub(super) struct Host<'a> {
    /// Ports by number.
    pub(super) ports: Vec<u32>,
    /// Labels of its workloads and their namespace; `None` if others make its endpoints.
    pub(super) selector: Option<(&'a str, &'a Labels)>,
    /// Labels of the endpoints that its document lists.
    pub(super) endpoints: Vec<&'a Labels>,
}

/// Hosts by who may see them: `*`, or a namespace.
#[derive(Debug, Default)]
pub(super) struct Hosts<'a> {
    scopes: HashMap<String, BTreeMap<String, Host<'a>>>,
    /// Suffixes of wildcards, with the whole name, by scope.
    wildcards: HashMap<String, Vec<(String, String)>>,
    known: BTreeSet<String>,
    /// Hosts that clusters share: those that are exported here.
    exported: BTreeSet<String>,
}

/// Whether a host exists.
pub(super) enum Found<'h, 'a> {
    /// With its ports.
    Here(&'h Host<'a>),
    /// As far as can be told: with a peer, or named by whoever asked.
    Elsewhere,
    /// No.
    Nowhere,
}

impl<'a> Hosts<'a> {
    pub(super) fn new(resources: &[Resource<'a>], known: &BTreeSet<String>, default: &[String]) -> Self {
        let mut hosts =
            Self { known: known.iter().map(|h| h.to_ascii_lowercase()).collect(), ..Self::default() };
        for r in resources {
            let ns = r.namespace.as_str();
            match r.spec() {
                Some(Spec::Service(s)) => {
                    let host = Host {
                        ports: s.ports.iter().map(|p| p.port).collect(),
                        selector: (!s.selector.is_empty())
                            .then_some(())
                            .and(r.parsed.typed.as_ref())
                            .map(|d| (d.metadata.namespace.as_str(), &s.selector)),
                        endpoints: vec![],
                    };
                    let to = r.annotations.get("networking.istio.io/exportTo");
                    let to: Vec<String> =
                        to.iter().flat_map(|t| t.split(',')).map(|t| t.trim().to_owned()).collect();
                    hosts.add(if to.is_empty() { default } else { &to }, ns, qualify(r.name, ns), &host);
                }
                Some(Spec::ServiceEntry(s)) => {
                    let selector = s.workload_selector.as_ref().map(|w| &w.labels);
                    let host = Host {
                        ports: s.ports.iter().map(|p| p.number).collect(),
                        selector: selector
                            .and_then(|l| Some((r.parsed.typed.as_ref()?.metadata.namespace.as_str(), l))),
                        endpoints: s.endpoints.iter().map(|e| &e.labels).collect(),
                    };
                    let to = if s.export_to.is_empty() { default } else { &s.export_to };
                    for h in &s.hosts {
                        hosts.add(to, ns, qualify(h, ns), &host);
                    }
                }
                Some(Spec::ServiceExport(_)) => {
                    hosts.exported.insert(qualify(r.name, ns));
                }
                _ => {}
            }
        }
        hosts
    }

    /// Whether a host may have workloads in other clusters.
    pub(super) fn shared(&self, host: &str, namespace: &str) -> bool {
        let name = qualify(host, namespace);
        self.exported.contains(&name) || self.known.contains(&name) || is_peer_name(&name)
    }

    fn add(&mut self, export_to: &[String], namespace: &str, name: String, host: &Host<'a>) {
        for scope in scopes(export_to, namespace) {
            if let Some(suffix) = name.strip_prefix('*') {
                self.wildcards.entry(scope.clone()).or_default().push((suffix.to_owned(), name.clone()));
            }
            self.scopes.entry(scope).or_default().insert(name.clone(), host.clone());
        }
    }

    /// The host that a document of `namespace` means, which is itself visible in `export_to`.
    pub(super) fn find(&self, host: &str, namespace: &str, export_to: &[String]) -> Found<'_, 'a> {
        let name = qualify(host, namespace);
        let get = |scope: &str, name: &str| self.scopes.get(scope).and_then(|m| m.get(name));
        let own;
        let seen_by: &[String] = if export_to.is_empty() {
            own = [".".to_owned()];
            &own
        } else {
            export_to
        };
        let found = get("*", &name).or_else(|| {
            seen_by.iter().find_map(|s| get(if s == "." { namespace } else { s.as_str() }, &name))
        });
        if let Some(h) = found {
            return Found::Here(h);
        }
        let bare = name.strip_prefix('*').unwrap_or(&name);
        for scope in ["*", namespace] {
            let list = self.wildcards.get(scope).map(Vec::as_slice).unwrap_or_default();
            if let Some((_, whole)) = list.iter().find(|(suffix, _)| bare.ends_with(suffix.as_str()))
                && let Some(h) = get(scope, whole)
            {
                return Found::Here(h);
            }
        }
        if is_peer_name(&name) || self.known.contains(&name) { Found::Elsewhere } else { Found::Nowhere }
    }

    /// The same name in another namespace, which is what a short name that leads nowhere most often meant.
    pub(super) fn elsewhere(&self, host: &str, namespace: &str) -> Option<&str> {
        let name = qualify(host, namespace);
        let (first, _) = name.strip_suffix(".svc.cluster.local")?.split_once('.')?;
        let fits = |h: &&String| {
            h.split_once('.').is_some_and(|(f, rest)| f == first && rest.ends_with(".svc.cluster.local"))
        };
        self.scopes.get("*")?.keys().find(fits).map(String::as_str)
    }
}

/// Who may see a document: `*`, or namespaces.
pub(super) fn scopes(export_to: &[String], namespace: &str) -> BTreeSet<String> {
    if export_to.is_empty() || export_to.iter().any(|e| e == "*") {
        return BTreeSet::from(["*".to_owned()]);
    }
    export_to.iter().map(|e| if e == "." { namespace.to_owned() } else { e.clone() }).collect()
}

/// Whether some name is meant by both.
pub(super) fn matches(a: &str, b: &str) -> bool {
    match (a.strip_prefix('*'), b.strip_prefix('*')) {
        (None, None) => a == b,
        (Some(s), None) => b.ends_with(s),
        (None, Some(s)) => a.ends_with(s),
        (Some(x), Some(y)) => x.ends_with(y) || y.ends_with(x),
    }
}

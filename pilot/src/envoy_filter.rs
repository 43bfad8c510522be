//! `EnvoyFilter` documents: which patches are for which proxy, and in which order.
//!
//! A document is read once and has a number from then on, which is another one when it changes. What a proxy's patches
//! are is decided by those numbers: proxies of a class have the same, so a document concerns the classes of the proxies
//! that it selects and no other.

use std::{
    collections::BTreeMap,
    fmt,
    hash::{Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use mesh_model::authored::{EnvoyConfigObjectPatch, EnvoyFilter, ProxyMatch};
use mesh_xds::patch::{Patch, Scope};
use regex::Regex;

use crate::{
    config::{Config, Problem, selects},
    proxy::ProxyNode,
};

/// Node metadata that says which version a proxy is of.
const VERSION: &str = "ISTIO_VERSION";
/// Label of the proxies of a `Gateway` of the Gateway API.
const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";

/// Patches that were left out, by document and position, and why.
pub(crate) type Refused = BTreeMap<(String, usize), String>;

/// What is said of them to operators.
pub(crate) fn problems(refused: &Refused) -> impl Iterator<Item = Problem> {
    refused.iter().map(|((object, index), why)| Problem {
        object: object.clone(),
        message: format!("configPatches[{index}]: left out of {why}"),
    })
}

/// A document, its patches typed.
#[derive(Debug, Clone)]
pub struct Filter {
    id: u64,
    spec: Arc<EnvoyFilter>,
    patches: Vec<One>,
    refused: Vec<String>,
}

/// Documents are the same if they are the same reading.
impl PartialEq for Filter {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

#[derive(Debug, Clone)]
struct One {
    index: usize,
    patch: Patch,
    version: Option<Regex>,
    metadata: BTreeMap<String, String>,
}

impl One {
    fn new(index: usize, p: &EnvoyConfigObjectPatch) -> Result<Self, String> {
        let patch = Patch::new(p).map_err(|e| e.to_string())?;
        let proxy = p.matches.as_ref().and_then(|m| m.proxy.clone()).unwrap_or_default();
        let ProxyMatch { proxy_version, metadata } = proxy;
        // What is longer is ignored, as validation says.
        let version = (!proxy_version.is_empty() && proxy_version.len() <= 1024)
            .then(|| Regex::new(&proxy_version))
            .transpose()
            .map_err(|e| format!("match.proxy.proxyVersion: {e}"))?;
        Ok(Self { index, patch, version, metadata })
    }

    fn is_for(&self, proxy: &ProxyNode) -> bool {
        let says = |key: &str| proxy.metadata.get(key).map(String::as_str);
        self.version.as_ref().is_none_or(|v| says(VERSION).is_some_and(|own| v.is_match(own)))
            && self.metadata.iter().all(|(k, v)| says(k) == Some(v))
    }
}

impl Filter {
    /// Types the patches of a document.
    #[must_use]
    pub fn new(spec: &Arc<EnvoyFilter>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let (mut patches, mut refused) = (Vec::new(), Vec::new());
        for (i, p) in spec.config_patches.iter().enumerate() {
            match One::new(i, p) {
                Ok(one) => patches.push(one),
                Err(why) => refused.push(format!("configPatches[{i}].{why}; this patch is left out")),
            }
        }
        Self { id: NEXT.fetch_add(1, Ordering::Relaxed), spec: Arc::clone(spec), patches, refused }
    }

    /// What is wrong with patches that are for nobody.
    pub(crate) fn problems(&self, name: &str) -> impl Iterator<Item = Problem> {
        self.refused
            .iter()
            .map(move |m| Problem { object: format!("EnvoyFilter {name}"), message: m.clone() })
    }

    /// As it is written.
    #[must_use]
    pub fn authored(&self) -> &EnvoyFilter {
        &self.spec
    }

    fn is_for(&self, namespace: &str, proxy: &ProxyNode) -> bool {
        if !self.spec.target_refs.is_empty() {
            // Services and classes are for waypoints, of which there are none.
            return namespace == proxy.namespace
                && self.spec.target_refs.iter().any(|t| {
                    t.kind == "Gateway"
                        && (t.namespace.is_empty() || t.namespace == namespace)
                        && proxy.labels.get(GATEWAY_NAME) == Some(&t.name)
                });
        }
        self.spec.workload_selector.as_ref().is_none_or(|s| selects(&s.labels, &proxy.labels))
    }
}

/// The patches for a proxy, in order.
#[derive(Clone, Default)]
pub struct Selected(Arc<Vec<Chosen>>);

#[derive(Clone)]
struct Chosen {
    filter: Arc<Filter>,
    object: Arc<str>,
    at: usize,
}

impl Chosen {
    fn one(&self) -> &One {
        &self.filter.patches[self.at]
    }

    fn key(&self) -> (u64, usize) {
        (self.filter.id, self.at)
    }
}

impl Selected {
    /// The patches for a proxy: documents of the root namespace come before those of its own, those of a lower priority
    /// before others, then older ones.
    #[must_use]
    pub fn of(config: &Config, proxy: &ProxyNode) -> Self {
        // As in Istio, a gRPC library gets none: what they name is not what it is given.
        if config.envoy_filters.is_empty() || proxy.grpc {
            return Self::default();
        }
        let root = config.root_namespace();
        let mut documents: Vec<_> = config
            .envoy_filters
            .iter()
            .filter(|d| d.namespace == root || d.namespace == proxy.namespace)
            .filter(|d| d.spec.is_for(&d.namespace, proxy))
            .collect();
        documents.sort_by_key(|d| (d.namespace != root, d.spec.spec.priority, d.created, d.name.clone()));
        let mut all = Vec::new();
        for d in documents {
            let object: Arc<str> = format!("EnvoyFilter {}/{}", d.namespace, d.name).into();
            for (at, one) in d.spec.patches.iter().enumerate() {
                if one.is_for(proxy) {
                    all.push(Chosen { filter: Arc::clone(&d.spec), object: Arc::clone(&object), at });
                }
            }
        }
        all.sort_by_key(|c| c.one().patch.phase());
        Self(Arc::new(all))
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether some change what is of a scope.
    #[must_use]
    pub fn concerns(&self, scope: Scope) -> bool {
        self.patches().any(|p| p.scope() == scope)
    }

    /// Those of a scope.
    #[must_use]
    pub fn only(&self, scope: Scope) -> Self {
        let of = |c: &&Chosen| c.one().patch.scope() == scope;
        if self.is_empty() {
            self.clone()
        } else {
            Self(Arc::new(self.0.iter().filter(of).cloned().collect()))
        }
    }

    /// The patches.
    pub fn patches(&self) -> impl Iterator<Item = &Patch> {
        self.0.iter().map(|c| &c.one().patch)
    }

    /// Remembers that one was left out; of several reasons the first.
    pub(crate) fn refuse(&self, at: usize, place: &str, why: &str, out: &mut Refused) {
        let Some(c) = self.0.get(at) else { return };
        out.entry((c.object.to_string(), c.one().index)).or_insert_with(|| format!("{place}: {why}"));
    }
}

impl PartialEq for Selected {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0.iter().map(Chosen::key).eq(other.0.iter().map(Chosen::key))
    }
}

impl Eq for Selected {}

impl Hash for Selected {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for c in self.0.iter() {
            c.key().hash(state);
        }
    }
}

impl fmt::Debug for Selected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|c| format!("{}[{}]", c.object, c.one().index))).finish()
    }
}

//! Authentication and access by role as release 1.0 writes them: `authentication.istio.io` and `rbac.istio.io`.
//!
//! They are about services where the newer kinds are about workloads, so a service stands for the ports of the workloads
//! behind it. Nothing has a generator of its own: a Policy is a mode of mTLS and a list of issuers in front of a port, and a
//! ServiceRole with its ServiceRoleBindings is rules as an AuthorizationPolicy has them ([`crate::generate`]).
//!
//! Of one workload the newer kind counts, each on its own ground, as in Istio 1.4 and 1.5, which knew both:
//!
//! | newer | for the workload it makes void |
//! |---|---|
//! | a PeerAuthentication that says a mode | `peers` of Policy and MeshPolicy |
//! | a RequestAuthentication with a rule | their `origins` |
//! | an AuthorizationPolicy that allows, denies or asks | RbacConfig, ServiceRole and ServiceRoleBinding |
//!
//! Policies of action `AUDIT` and dry runs decide nothing, so they make nothing void.
//!
//! Of Policies one counts, whole and alone: of the service and port, else the one called `default` of the namespace, else
//! the MeshPolicy. One without methods at a narrower scope turns authentication off.

mod problems;

use std::collections::{BTreeMap, HashMap};

use mesh_model::authored::{
    AuthenticationPolicy, MutualTlsMode, PeerMutualTlsMode, RbacConfig, ServiceRole, ServiceRoleBinding,
    Spec, TargetPort,
};
use mesh_xds::mcp;

pub(crate) use self::problems::{decides, problems};
use crate::{
    config::{Config, Doc},
    index::{Entry, Index, Origin},
};

/// Name of a policy of a whole namespace, of the mesh's, and of a configuration of roles.
pub(crate) const DEFAULT: &str = "default";

/// The documents, oldest first.
#[derive(Debug, Clone, Default)]
pub struct Documents {
    /// Authentication of services and namespaces.
    pub policies: Vec<Doc<AuthenticationPolicy>>,
    /// Of the mesh.
    pub mesh_policies: Vec<Doc<AuthenticationPolicy>>,
    /// Where access is by role.
    pub rbac_configs: Vec<Doc<RbacConfig>>,
    /// The same; if there is one, the others do not count.
    pub cluster_rbac_configs: Vec<Doc<RbacConfig>>,
    /// What may be done.
    pub roles: Vec<Doc<ServiceRole>>,
    /// Who may do it.
    pub bindings: Vec<Doc<ServiceRoleBinding>>,
}

impl Documents {
    /// Takes a document if it is one of these kinds.
    pub(crate) fn add(&mut self, doc: &mcp::Document, spec: &Spec) -> bool {
        match spec {
            Spec::AuthnPolicy(s) => self.policies.push(Doc::of(doc, s)),
            Spec::MeshPolicy(s) => self.mesh_policies.push(Doc::of(doc, s)),
            Spec::RbacConfig(s) => self.rbac_configs.push(Doc::of(doc, s)),
            Spec::ClusterRbacConfig(s) => self.cluster_rbac_configs.push(Doc::of(doc, s)),
            Spec::ServiceRole(s) => self.roles.push(Doc::of(doc, s)),
            Spec::ServiceRoleBinding(s) => self.bindings.push(Doc::of(doc, s)),
            _ => return false,
        }
        true
    }

    /// Leaves out what is in namespaces that are not seen.
    pub(crate) fn retain(&mut self, seen: &impl Fn(&str) -> bool) {
        self.policies.retain(|d| seen(&d.namespace));
        self.rbac_configs.retain(|d| seen(&d.namespace));
        self.roles.retain(|d| seen(&d.namespace));
        self.bindings.retain(|d| seen(&d.namespace));
    }

    pub(crate) fn sort(&mut self) {
        crate::config::by_age(&mut self.policies);
        crate::config::by_age(&mut self.mesh_policies);
        crate::config::by_age(&mut self.rbac_configs);
        crate::config::by_age(&mut self.cluster_rbac_configs);
        crate::config::by_age(&mut self.roles);
        crate::config::by_age(&mut self.bindings);
    }
}

/// Which Policy is for which port.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Authentication {
    /// By address and port of workloads whose services are targets: positions among the policies.
    targeted: HashMap<String, BTreeMap<u16, usize>>,
    namespaces: HashMap<String, usize>,
    mesh: Option<usize>,
}

impl Authentication {
    pub(crate) fn new(config: &Config, index: &Index) -> Self {
        let docs = &config.v1alpha1;
        let mut out =
            Self { mesh: docs.mesh_policies.iter().position(|p| p.name == DEFAULT), ..Self::default() };
        if docs.policies.is_empty() {
            return out;
        }
        let mut services: HashMap<(&str, &str), Vec<&Entry>> = HashMap::new();
        if docs.policies.iter().any(|p| !p.spec.targets.is_empty()) {
            for e in index.services.values().filter(|e| e.origin != Origin::Member) {
                services.entry((&e.service.namespace, &e.service.name)).or_default().push(e);
            }
        }
        for (i, p) in docs.policies.iter().enumerate() {
            if p.spec.targets.is_empty() {
                if p.name == DEFAULT {
                    out.namespaces.entry(p.namespace.clone()).or_insert(i);
                }
                continue;
            }
            for t in &p.spec.targets {
                for entry in services.get(&(p.namespace.as_str(), t.name.as_str())).into_iter().flatten() {
                    for e in entry.endpoints.iter().filter(|e| at(entry, &e.service_port, &t.ports)) {
                        out.targeted.entry(e.address.clone()).or_default().entry(e.port).or_insert(i);
                    }
                }
            }
        }
        out
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.targeted.is_empty() && self.namespaces.is_empty() && self.mesh.is_none()
    }

    /// The policy of a port of a workload. Without a port, of the workload: the oldest of its ports'.
    pub(crate) fn at<'c, 'a>(
        &self,
        config: &'c Config,
        namespace: &str,
        addresses: impl Iterator<Item = &'a str>,
        port: Option<u16>,
    ) -> Option<&'c Doc<AuthenticationPolicy>> {
        let docs = &config.v1alpha1;
        let of = |ports: &BTreeMap<u16, usize>| match port {
            Some(p) => ports.get(&p).copied(),
            None => ports.values().min().copied(),
        };
        // An address may be another namespace's elsewhere; a policy is for services of its own.
        let targeted = addresses
            .filter_map(|a| self.targeted.get(a).and_then(of))
            .filter(|i| docs.policies.get(*i).is_some_and(|p| p.namespace == namespace))
            .min();
        if let Some(i) = targeted.or_else(|| self.namespaces.get(namespace).copied()) {
            return docs.policies.get(i);
        }
        self.mesh.and_then(|i| docs.mesh_policies.get(i))
    }
}

/// Whether a port of a service, by its name, is one of these.
fn at(entry: &Entry, port: &str, wanted: &[TargetPort]) -> bool {
    let number = entry.service.ports.iter().chain(&entry.udp_ports).find(|p| p.name == port).map(|p| p.port);
    let is = |w: &TargetPort| match (w.number, &w.name) {
        (Some(n), _) => number.map(u32::from) == Some(n),
        (None, Some(name)) => name == port,
        (None, None) => false,
    };
    wanted.is_empty() || wanted.iter().any(is)
}

/// Whether callers of TLS need show no certificate (`allowTls`).
#[must_use]
pub fn allows_tls(p: &AuthenticationPolicy) -> bool {
    p.peers.iter().any(|m| m.mtls.as_ref().is_some_and(|m| m.allow_tls))
}

/// The mTLS mode that `peers` mean. None is off; what is optional is accepted with and without.
#[must_use]
pub fn mode(p: &AuthenticationPolicy) -> MutualTlsMode {
    if p.peers.is_empty() {
        return MutualTlsMode::Disable;
    }
    // Methods that nobody knows (galley refuses them) are none that lets anybody in.
    let permissive = |m: &mesh_model::authored::PeerMethod| {
        m.mtls.as_ref().is_some_and(|m| m.mode == PeerMutualTlsMode::Permissive)
    };
    if p.peer_is_optional || p.peers.iter().any(permissive) {
        MutualTlsMode::Permissive
    } else {
        MutualTlsMode::Strict
    }
}

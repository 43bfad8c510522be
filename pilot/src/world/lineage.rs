//! Which parts of a world are those of the one before it.
//!
//! What is generated depends on parts of the world. Where none of them changed, it need not be made again: see
//! [`crate::generate`] for which depends on which.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use mesh_model::authored::VirtualService;

use super::World;
use crate::{config::Doc, hosts};

/// Numbers of parts of a world: worlds that follow each other have the same number as long as the part is equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Lineage {
    /// Everything but services, their endpoints, their rules and their routes.
    pub(crate) environment: u64,
    /// That, the rules of services, and services apart from endpoints that no listener or name depends on.
    pub(crate) shape: u64,
    /// That and the routes.
    pub(crate) routing: u64,
}

fn fresh() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Hosts whose routes may differ at sidecars, where nothing else does.
#[derive(Debug)]
pub(crate) struct Rerouted {
    /// [`Lineage::routing`] of the world that they differ from.
    pub(crate) since: u64,
    exact: HashSet<String>,
    wildcards: Vec<String>,
    /// The documents say nothing that anything but virtual hosts is made of.
    plain: bool,
}

impl Rerouted {
    pub(super) fn since(now: &World, before: &World) -> Option<Self> {
        if now.lineage.shape != before.lineage.shape || now.lineage.routing == before.lineage.routing {
            return None;
        }
        let mut out =
            Self { since: before.lineage.routing, exact: HashSet::new(), wildcards: vec![], plain: true };
        let key = |d: &Doc<VirtualService>| (d.namespace.clone(), d.name.clone());
        let old: HashMap<_, _> = before.virtual_services().map(|(d, hosts)| (key(d), (d, hosts))).collect();
        if old.len() < before.config.virtual_services.len() {
            // Two of one name: which is which cannot be told.
            return None;
        }
        let mut kept = 0;
        let mut add = |d: &Doc<VirtualService>, hosts: &[String]| {
            // Routes of gateways alone are none that sidecars have.
            if crate::generate::bound_to_mesh(d) {
                let s = &d.spec;
                out.plain &=
                    s.tls.is_empty() && s.tcp.is_empty() && s.http.iter().all(|r| r.extras.is_none());
                for h in hosts {
                    if h.starts_with('*') {
                        out.wildcards.push(h.clone());
                    } else {
                        out.exact.insert(h.clone());
                    }
                }
            }
            // Others delegate to one without hosts.
            !d.spec.hosts.is_empty()
        };
        let mut hosted = true;
        for (d, hosts) in now.virtual_services() {
            match old.get(&key(d)) {
                Some((same, _)) if same_document(same, d) => kept += 1,
                Some((other, others)) => hosted &= add(other, others) & add(d, hosts),
                None => hosted &= add(d, hosts),
            }
        }
        if kept < old.len() {
            let there: HashSet<_> = now.virtual_services().map(|(d, _)| key(d)).collect();
            for (_, (d, hosts)) in old.iter().filter(|(k, _)| !there.contains(*k)) {
                hosted &= add(d, hosts);
            }
        }
        hosted.then_some(out)
    }

    /// All of these hosts, if they are known by name and nothing but their virtual hosts may differ.
    pub(crate) fn hosts(&self) -> Option<impl Iterator<Item = &str>> {
        (self.plain && self.wildcards.is_empty()).then(|| self.exact.iter().map(String::as_str))
    }

    /// Whether the routes of a host may differ.
    pub(crate) fn concerns(&self, host: &str) -> bool {
        self.exact.contains(host) || self.wildcards.iter().any(|w| hosts::covers(w, host))
    }
}

fn same_document<T: PartialEq>(a: &Doc<T>, b: &Doc<T>) -> bool {
    same(std::slice::from_ref(a), std::slice::from_ref(b))
}

/// Nearly always documents that did not change were not even read again.
fn same<T: PartialEq>(a: &[Doc<T>], b: &[Doc<T>]) -> bool {
    a.len() == b.len()
        && a.iter().zip(b).all(|(a, b)| {
            (Arc::ptr_eq(&a.spec, &b.spec) || a.spec == b.spec)
                && (&a.name, &a.namespace, a.created) == (&b.name, &b.namespace, b.created)
                && (Arc::ptr_eq(&a.labels, &b.labels) || a.labels == b.labels)
                && (Arc::ptr_eq(&a.annotations, &b.annotations) || a.annotations == b.annotations)
        })
}

impl Lineage {
    /// Of a world that follows none.
    pub(super) fn new() -> Self {
        Self { environment: fresh(), shape: fresh(), routing: fresh() }
    }

    pub(super) fn of(now: &World, before: &World) -> Self {
        let mut out = Self::new();
        if !same_environment(now, before) {
            return out;
        }
        out.environment = before.lineage.environment;
        if !same_shape(now, before) {
            return out;
        }
        out.shape = before.lineage.shape;
        if same(&now.config.virtual_services, &before.config.virtual_services) {
            out.routing = before.lineage.routing;
        }
        out
    }
}

fn same_environment(now: &World, before: &World) -> bool {
    let (a, b) = (&now.config, &before.config);
    now.settings == before.settings
        && now.draining == before.draining
        && now.index.east_west == before.index.east_west
        && now.telling == before.telling
        && now.bounded == before.bounded
        && (Arc::ptr_eq(&a.mesh, &b.mesh) || a.mesh == b.mesh)
        && a.peers == b.peers
        && a.former == b.former
        && a.bundles == b.bundles
        && a.roots == b.roots
        && a.discovered == b.discovered
        && same(&a.gateways, &b.gateways)
        && same(&a.sidecars, &b.sidecars)
        && same(&a.proxy_configs, &b.proxy_configs)
        && same(&a.peer_authentications, &b.peer_authentications)
        && same(&a.request_authentications, &b.request_authentications)
        && same(&a.authorization_policies, &b.authorization_policies)
        && same(&a.v1alpha1.policies, &b.v1alpha1.policies)
        && same(&a.v1alpha1.mesh_policies, &b.v1alpha1.mesh_policies)
        && same(&a.v1alpha1.rbac_configs, &b.v1alpha1.rbac_configs)
        && same(&a.v1alpha1.cluster_rbac_configs, &b.v1alpha1.cluster_rbac_configs)
        && same(&a.v1alpha1.roles, &b.v1alpha1.roles)
        && same(&a.v1alpha1.bindings, &b.v1alpha1.bindings)
        && now.authentication == before.authentication
        && same(&a.service_exports, &b.service_exports)
        && same(&a.export_policies, &b.export_policies)
        && same(&a.import_policies, &b.import_policies)
}

fn same_shape(now: &World, before: &World) -> bool {
    let (a, b) = (&now.index.services, &before.index.services);
    same(&now.config.destination_rules, &before.config.destination_rules)
        && a.len() == b.len()
        && a.values().zip(b.values()).all(|(a, b)| Arc::ptr_eq(a, b) || a.same_shape(b))
}

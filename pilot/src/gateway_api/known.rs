//! What references may lead to, and who may refer to it.

use std::collections::HashMap;

use mesh_model::{
    authored::{
        Service,
        gateway_api::{DefaultScope, Gateway, KubernetesSelector, ParentReference, SelectorExpression},
    },
    registry::Labels,
};

use super::{CLASSES, CONTROLLERS, Documents};
use crate::config::{Config, Doc};

/// This API's group.
pub(super) const GROUP: &str = "gateway.networking.k8s.io";
/// Label that every namespace has.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// A configuration, indexed for what this API asks.
pub(crate) struct Known<'a> {
    pub(super) docs: &'a Documents,
    pub(super) config: &'a Config,
    /// `None` for a service that only peers have.
    services: HashMap<(&'a str, &'a str), Option<&'a Service>>,
    /// Gateways that routes may have as parents without naming them (GEP-3793). Of several each is one.
    pub(super) defaults: Vec<ParentReference>,
}

impl<'a> Known<'a> {
    pub(super) fn new(config: &'a Config) -> Self {
        let imports = config.imports.iter().map(|i| ((&*i.service.namespace, &*i.service.name), None));
        let own = config.services.iter().map(|s| ((&*s.namespace, &*s.name), Some(&*s.spec)));
        let docs = &config.gateway_api;
        let mut out = Self { docs, config, services: imports.chain(own).collect(), defaults: vec![] };
        let default = |g: &&Doc<Gateway>| {
            g.spec.default_scope == Some(DefaultScope::All) && out.is_own_class(&g.spec.gateway_class_name)
        };
        let parents = docs.gateways.iter().filter(default).map(|g| ParentReference {
            namespace: Some(g.namespace.clone()),
            name: g.name.clone(),
            ..ParentReference::default()
        });
        out.defaults = parents.collect();
        out
    }

    /// A service, of which only this cluster's own tell their ports.
    pub(super) fn service(&self, namespace: &str, name: &str) -> Option<Option<&'a Service>> {
        self.services.get(&(namespace, name)).copied()
    }

    /// Whether Gateways of a class are this mesh's.
    pub(super) fn is_own_class(&self, class: &str) -> bool {
        match self.docs.classes.iter().find(|c| c.name == class) {
            Some(c) => CONTROLLERS.contains(&c.spec.controller_name.as_str()),
            None => CLASSES.contains(&class),
        }
    }

    /// Whether a namespace lets objects of a kind of another namespace refer to its own.
    pub(super) fn granted(&self, from: (&str, &str), to: (&str, &str, &str, &str)) -> bool {
        let (kind, namespace) = from;
        let (to_group, to_kind, to_namespace, to_name) = to;
        self.docs.grants.iter().filter(|g| g.namespace == to_namespace).any(|g| {
            g.spec.from.iter().any(|f| f.group == GROUP && f.kind == kind && f.namespace == namespace)
                && g.spec.to.iter().any(|t| {
                    let group = if t.group == "core" { "" } else { t.group.as_str() };
                    let named = t.name.as_deref().filter(|n| !n.is_empty());
                    group == to_group && t.kind == to_kind && named.is_none_or(|n| n == to_name)
                })
        })
    }

    /// Whether a namespace has the labels that a selector wants.
    pub(super) fn selects(&self, selector: &KubernetesSelector, namespace: &str) -> bool {
        selects(selector, namespace, self.docs.namespaces.get(namespace))
    }

    /// The Service that an address of a Gateway names, such as `edge.ingress.svc.cluster.local`.
    pub(super) fn service_by_host(&self, host: &str, namespace: &str) -> Option<&'a Doc<Service>> {
        let mut parts = host.split('.');
        let (name, ns) = (parts.next().unwrap_or_default(), parts.next().unwrap_or(namespace));
        let fits = match parts.next() {
            None => true,
            Some("svc") => {
                let rest: Vec<_> = parts.collect();
                rest.is_empty() || rest == ["cluster", "local"]
            }
            Some(_) => false,
        };
        self.config.services.iter().find(|s| fits && s.name == name && s.namespace == ns)
    }
}

/// Whether a namespace, with its labels if a document says them, has what a selector wants.
pub(crate) fn selects(selector: &KubernetesSelector, namespace: &str, labels: Option<&Labels>) -> bool {
    let value = |key: &str| match key {
        NAMESPACE_NAME => Some(namespace),
        _ => labels.and_then(|l| l.get(key)).map(String::as_str),
    };
    let holds = |e: &SelectorExpression| {
        // Of a namespace without a document nobody knows which labels it lacks.
        if labels.is_none() && e.key != NAMESPACE_NAME {
            return false;
        }
        let v = value(&e.key);
        let among = || v.is_some_and(|v| e.values.iter().any(|w| w == v));
        match e.operator.as_str() {
            "In" => among(),
            "NotIn" => !among(),
            "Exists" => v.is_some(),
            "DoesNotExist" => v.is_none(),
            // What cannot be judged lets nobody in.
            _ => false,
        }
    };
    selector.match_labels.iter().all(|(k, v)| value(k) == Some(v))
        && selector.match_expressions.iter().all(holds)
}

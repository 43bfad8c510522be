//! `status` of documents of the Gateway API, as data: this mesh has no API server to write it to.
//!
//! Conditions have the types and reasons of the API. What depends on an object's history (`lastTransitionTime`,
//! `observedGeneration`) is left out. Whether a Secret or ConfigMap exists is known to the gateway proxy alone, which has
//! its content in a directory, so `ResolvedRefs` is about kinds and grants.

use std::collections::BTreeMap;

use mesh_model::{
    authored::gateway_api::{BackendTlsPolicy, DefaultScope, Gateway, GatewayClass, ParentReference},
    registry::Labels,
};
use serde::Serialize;
use serde_json::json;

use super::{
    CONTROLLERS,
    attach::{self, Route, Target, routes},
    authorizers, backend_tls,
    backends::{Referrer, Unresolved, destination},
    known::{GROUP, Known},
    listeners::{Serves, listeners, proxies},
};
use crate::{
    config::{Config, Doc, Problem, selects},
    index::workload_labels,
};

/// Type of the condition of an object of which fields change nothing.
const IGNORED: &str = "flotilla.dev/FieldsIgnored";

/// What a proxy that serves Gateways is known by.
#[derive(Debug, Clone)]
pub struct GatewayProxy {
    /// Its namespace.
    pub namespace: String,
    /// Its labels.
    pub labels: Labels,
    /// Where it is.
    pub addresses: Vec<String>,
}

/// Whether something holds of an object, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Condition {
    /// What: `Accepted`, `ResolvedRefs`, `Programmed` ...
    #[serde(rename = "type")]
    pub condition: &'static str,
    /// `True` or `False`.
    pub status: &'static str,
    /// A word of the API.
    pub reason: &'static str,
    /// For people; empty if there is nothing to say.
    pub message: String,
}

impl Condition {
    fn holds(condition: &'static str) -> Self {
        Self { condition, status: "True", reason: condition, message: String::new() }
    }

    fn fails(condition: &'static str, reason: &'static str, message: impl Into<String>) -> Self {
        Self { condition, status: "False", reason, message: message.into() }
    }

    fn of(condition: &'static str, unresolved: Option<Unresolved>) -> Self {
        unresolved.map_or_else(|| Self::holds(condition), |u| Self::fails(condition, u.reason, u.message))
    }

    fn is_true(&self) -> bool {
        self.status == "True"
    }
}

/// Status of all documents.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Status {
    /// GatewayClasses.
    #[serde(rename = "GatewayClass")]
    pub classes: Vec<Object<Conditions>>,
    /// Gateways.
    #[serde(rename = "Gateway")]
    pub gateways: Vec<Object<GatewayStatus>>,
    /// Routes by kind.
    #[serde(flatten)]
    pub routes: BTreeMap<&'static str, Vec<Object<RouteStatus>>>,
    /// BackendTLSPolicies.
    #[serde(rename = "BackendTLSPolicy")]
    pub backend_tls: Vec<Object<PolicyStatus>>,
}

/// Status of one object.
#[derive(Debug, Clone, Serialize)]
pub struct Object<T> {
    /// Namespace; empty for a class.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Status.
    pub status: T,
}

impl<T> Object<T> {
    fn new<D>(doc: &Doc<D>, status: T) -> Self {
        Self { namespace: doc.namespace.clone(), name: doc.name.clone(), status }
    }
}

/// Conditions alone.
#[derive(Debug, Clone, Serialize)]
pub struct Conditions {
    /// Conditions.
    pub conditions: Vec<Condition>,
}

/// Status of a Gateway.
#[derive(Debug, Clone, Serialize)]
pub struct GatewayStatus {
    /// Addresses of the proxies that serve it.
    pub addresses: Vec<Address>,
    /// Conditions.
    pub conditions: Vec<Condition>,
    /// Its listeners.
    pub listeners: Vec<ListenerStatus>,
}

/// An address of a Gateway.
#[derive(Debug, Clone, Serialize)]
pub struct Address {
    /// `IPAddress`.
    #[serde(rename = "type")]
    pub address_type: &'static str,
    /// Value.
    pub value: String,
}

/// Status of a listener.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ListenerStatus {
    /// Name.
    pub name: String,
    /// Kinds of routes that it takes.
    pub supported_kinds: Vec<SupportedKind>,
    /// Routes that are attached.
    pub attached_routes: usize,
    /// Conditions.
    pub conditions: Vec<Condition>,
}

/// A kind of routes.
#[derive(Debug, Clone, Serialize)]
pub struct SupportedKind {
    /// API group.
    pub group: &'static str,
    /// Kind.
    pub kind: &'static str,
}

/// Status of a route.
#[derive(Debug, Clone, Serialize)]
pub struct RouteStatus {
    /// By parent.
    pub parents: Vec<ParentStatus>,
}

/// Status of a route at a parent.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ParentStatus {
    /// The reference, as written.
    #[serde(serialize_with = "as_written")]
    pub parent_ref: ParentReference,
    /// This implementation.
    pub controller_name: &'static str,
    /// Conditions.
    pub conditions: Vec<Condition>,
}

/// Status of a policy.
#[derive(Debug, Clone, Serialize)]
pub struct PolicyStatus {
    /// By what it is about.
    pub ancestors: Vec<AncestorStatus>,
}

/// Status of a policy for a target.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AncestorStatus {
    /// The target.
    #[serde(serialize_with = "as_written")]
    pub ancestor_ref: ParentReference,
    /// This implementation.
    pub controller_name: &'static str,
    /// Conditions.
    pub conditions: Vec<Condition>,
}

/// A reference without the fields that are not set.
fn as_written<S: serde::Serializer>(r: &ParentReference, s: S) -> Result<S::Ok, S::Error> {
    let fields = [
        ("group", r.group.as_ref().map(|v| json!(v))),
        ("kind", r.kind.as_ref().map(|v| json!(v))),
        ("namespace", r.namespace.as_ref().map(|v| json!(v))),
        ("name", Some(json!(r.name))),
        ("sectionName", r.section_name.as_ref().map(|v| json!(v))),
        ("port", r.port.map(|v| json!(v))),
    ];
    s.collect_map(fields.into_iter().filter_map(|(k, v)| v.map(|v| (k, v))))
}

/// The status of everything in a configuration. `connected` are gateway proxies that this control plane serves.
#[must_use]
pub fn status(config: &Config, connected: &[GatewayProxy]) -> Status {
    let known = Known::new(config);
    let listeners = listeners(&known);
    let mut attached = vec![0; listeners.len()];
    let mut out = Status::default();
    for r in routes(known.docs) {
        let parents: Vec<_> = r
            .parents(&known)
            .into_iter()
            .filter_map(|p| {
                let target = attach::attach(&known, &listeners, &r, p);
                if let Target::Listeners(list) = &target {
                    for (i, _) in list {
                        attached[*i] += 1;
                    }
                }
                let conditions = of_parent(&known, &r, &target)?;
                Some(ParentStatus { parent_ref: p.clone(), controller_name: CONTROLLERS[0], conditions })
            })
            .collect();
        let object = Object {
            namespace: r.namespace().to_owned(),
            name: r.name().to_owned(),
            status: RouteStatus { parents },
        };
        out.routes.entry(r.kind().name()).or_default().push(object);
    }
    let docs = known.docs;
    out.classes = docs.classes.iter().filter_map(class).collect();
    for g in docs.gateways.iter().filter(|g| known.is_own_class(&g.spec.gateway_class_name)) {
        let own: Vec<_> =
            listeners.iter().zip(&attached).filter(|(l, _)| std::ptr::eq(l.gateway, g)).collect();
        out.gateways.push(Object::new(g, gateway(&known, g, &own, connected)));
    }
    out.backend_tls = docs.backend_tls.iter().map(|p| policy(&known, p)).collect();
    out
}

/// What cannot be done as written. That no proxy has come yet is none of it.
pub(super) fn problems(config: &Config) -> Vec<Problem> {
    let status = status(config, &[]);
    let mut out = Vec::new();
    let mut add = |object: String, at: &str, conditions: &[Condition]| {
        let wrong = conditions.iter().filter(|c| match c.condition {
            "Accepted" | "ResolvedRefs" => !c.is_true(),
            "PartiallyInvalid" | IGNORED => c.is_true(),
            "Programmed" => c.reason == "AddressNotUsable",
            _ => false,
        });
        out.extend(wrong.map(|c| {
            let message = format!("{at}{}: {}", c.reason, c.message);
            Problem { object: object.clone(), message }
        }));
    };
    for c in &status.classes {
        add(format!("GatewayClass {}", c.name), "", &c.status.conditions);
    }
    for g in &status.gateways {
        let object = || format!("Gateway {}/{}", g.namespace, g.name);
        // Whether it is accepted is what its listeners say.
        let own: Vec<_> = g.status.conditions.iter().filter(|c| c.condition != "Accepted").cloned().collect();
        add(object(), "", &own);
        for l in &g.status.listeners {
            add(object(), &format!("listener {}: ", l.name), &l.conditions);
        }
    }
    for (kind, routes) in &status.routes {
        for r in routes {
            for p in &r.status.parents {
                add(format!("{kind} {}/{}", r.namespace, r.name), "", &p.conditions);
            }
        }
    }
    for p in &status.backend_tls {
        for a in &p.status.ancestors {
            add(format!("BackendTLSPolicy {}/{}", p.namespace, p.name), "", &a.conditions);
        }
    }
    out
}

fn class(c: &Doc<GatewayClass>) -> Option<Object<Conditions>> {
    let own = CONTROLLERS.contains(&c.spec.controller_name.as_str());
    own.then(|| {
        let accepted = match &c.spec.parameters_ref {
            None => Condition::holds("Accepted"),
            Some(_) => Condition::fails("Accepted", "InvalidParameters", "parametersRef is not supported"),
        };
        Object::new(c, Conditions { conditions: vec![accepted] })
    })
}

fn gateway(
    known: &Known<'_>,
    g: &Doc<Gateway>,
    own: &[(&Serves<'_>, &usize)],
    connected: &[GatewayProxy],
) -> GatewayStatus {
    let groups = proxies(known, g);
    let mut found: Vec<String> = Vec::new();
    let serves = |namespace: &str, labels: &Labels| {
        groups.iter().any(|(n, selector)| n == namespace && selects(selector, labels))
    };
    for p in connected.iter().filter(|p| serves(&p.namespace, &p.labels)) {
        found.extend(p.addresses.iter().cloned());
    }
    let here = found.len();
    for w in &known.config.workload_entries {
        if serves(&w.namespace, &workload_labels(w)) {
            found.push(w.spec.address.clone());
        }
    }
    found.sort();
    found.dedup();
    let unusable = || {
        let named =
            g.spec.addresses.iter().filter_map(|a| Some((a.address_type.as_deref()?, a.value.as_deref()?)));
        let bad =
            |(t, v): &(&str, &str)| *t == "Hostname" && known.service_by_host(v, &g.namespace).is_none();
        named.filter(bad).map(|(_, v)| v.to_owned()).next()
    };
    let listeners: Vec<ListenerStatus> = own.iter().map(|(l, n)| listener(l, **n, here > 0)).collect();
    let fine = own.iter().filter(|(l, _)| l.is_served()).count();
    let accepted = if fine == 0 {
        Condition::fails("Accepted", "ListenersNotValid", "no listener can be served")
    } else if fine < own.len() {
        let message = "some listeners cannot be served: see their conditions".to_owned();
        Condition { reason: "ListenersNotValid", message, ..Condition::holds("Accepted") }
    } else {
        Condition::holds("Accepted")
    };
    let programmed = if let Some(host) = unusable() {
        let says = format!("no Service is called {host}");
        Condition::fails("Programmed", "AddressNotUsable", says)
    } else if fine == 0 {
        Condition::fails("Programmed", "Invalid", "no listener can be served")
    } else if here == 0 {
        Condition::fails("Programmed", "Pending", waits(&groups))
    } else {
        Condition::holds("Programmed")
    };
    let mut conditions = vec![accepted, programmed];
    if g.spec.default_scope == Some(DefaultScope::All) {
        conditions.push(Condition::holds("DefaultGateway"));
    }
    conditions.extend(ignored(
        &unread(&g.spec),
        "Gateways are not deployed by this mesh, and no ListenerSets are read",
    ));
    let addresses = found.into_iter().map(|value| Address { address_type: "IPAddress", value }).collect();
    GatewayStatus { addresses, conditions, listeners }
}

/// Fields of a Gateway that are for somebody who deploys it, or for documents that nobody reads here.
fn unread(g: &Gateway) -> Vec<&'static str> {
    let infrastructure = g.infrastructure.as_ref();
    let all = [
        ("infrastructure.labels", infrastructure.is_some_and(|i| !i.labels.is_empty())),
        ("infrastructure.annotations", infrastructure.is_some_and(|i| !i.annotations.is_empty())),
        ("infrastructure.parametersRef", infrastructure.is_some_and(|i| i.parameters_ref.is_some())),
        ("allowedListeners", g.allowed_listeners.is_some()),
    ];
    all.into_iter().filter(|(_, there)| *there).map(|(field, _)| field).collect()
}

/// A condition of our own, for fields that change nothing: the API has none for what an implementation may leave out.
fn ignored(fields: &[&str], why: &str) -> Option<Condition> {
    (!fields.is_empty()).then(|| Condition {
        condition: IGNORED,
        status: "True",
        reason: "Unsupported",
        message: format!("{} changes nothing: {why}", fields.join(", ")),
    })
}

fn waits(groups: &[(String, BTreeMap<String, String>)]) -> String {
    let shown = groups.iter().map(|(n, selector)| {
        let labels: Vec<_> = selector.iter().map(|(k, v)| format!("{k}={v}")).collect();
        format!("{} in namespace {n}", labels.join(","))
    });
    let all: Vec<_> = shown.collect();
    format!("no gateway proxy with {} is connected to this control plane", all.join(" or "))
}

fn listener(l: &Serves<'_>, attached: usize, connected: bool) -> ListenerStatus {
    let conflict = l.conflict.clone();
    let accepted = match (l.speaks, &conflict) {
        (None, _) => {
            let says = format!("protocol {} is not served", l.listener.protocol);
            Condition::fails("Accepted", "UnsupportedProtocol", says)
        }
        (_, Some((reason, says))) => Condition::fails("Accepted", reason, says.clone()),
        _ => Condition::holds("Accepted"),
    };
    let conflicted = match conflict {
        Some((reason, message)) => Condition { condition: "Conflicted", status: "True", reason, message },
        None => Condition::fails("Conflicted", "NoConflicts", ""),
    };
    let resolved = match (&l.tls, &l.wrong_kind) {
        (Err(e), _) => Condition::of("ResolvedRefs", Some(e.clone())),
        (Ok(_), Some(k)) => {
            let says = format!("protocol {} does not take {k}", l.listener.protocol);
            Condition::fails("ResolvedRefs", "InvalidRouteKinds", says)
        }
        _ => Condition::holds("ResolvedRefs"),
    };
    let programmed = if !l.is_served() {
        Condition::fails("Programmed", "Invalid", "see the other conditions")
    } else if !connected {
        Condition::fails("Programmed", "Pending", "no gateway proxy is connected")
    } else {
        Condition::holds("Programmed")
    };
    ListenerStatus {
        name: l.listener.name.clone(),
        supported_kinds: l.kinds.iter().map(|k| SupportedKind { group: GROUP, kind: k.name() }).collect(),
        attached_routes: attached,
        conditions: vec![accepted, conflicted, resolved, programmed],
    }
}

/// Conditions of a route at a parent; `None` if that is somebody else's.
fn of_parent(known: &Known<'_>, r: &Route<'_>, target: &Target<'_>) -> Option<Vec<Condition>> {
    let (accepted, grants) = match target {
        Target::Ignored => return None,
        Target::Refused(e) => (Condition::fails("Accepted", e.reason, e.message.clone()), true),
        Target::Listeners(_) => (Condition::holds("Accepted"), true),
        Target::Service(_) => (Condition::holds("Accepted"), false),
    };
    let from = Referrer { kind: r.kind(), namespace: r.namespace(), grants };
    let bad = r.backends().into_iter().find_map(|b| destination(known, from, b).err());
    let bad = bad.or_else(|| {
        let rules = r.rules();
        let asked = rules.iter().flat_map(|r| r.filters).filter_map(|f| f.external_auth.as_ref());
        let mut of = asked.filter_map(|a| Some((a, a.backend_ref.as_ref()?)));
        of.find_map(|(a, b)| authorizers::destination(known, from, a, b).err())
    });
    let mut out = vec![accepted, Condition::of("ResolvedRefs", bad)];
    let unsupported = r.rules().into_iter().find_map(|r| r.unsupported());
    if let Some(what) = unsupported.filter(|_| out[0].is_true()) {
        out.push(Condition {
            condition: "PartiallyInvalid",
            status: "True",
            reason: "UnsupportedValue",
            message: format!("rules with {what} answer 500, since it is not supported"),
        });
    }
    Some(out)
}

fn policy(known: &Known<'_>, p: &Doc<BackendTlsPolicy>) -> Object<PolicyStatus> {
    let options: Vec<&str> = if p.spec.options.is_empty() { vec![] } else { vec!["options"] };
    let of = |t: &mesh_model::authored::gateway_api::PolicyTarget| {
        let accepted = match backend_tls::target(known, p, t) {
            Ok(_) => Condition::holds("Accepted"),
            Err(says) => Condition::fails("Accepted", "TargetNotFound", says),
        };
        let resolved = match backend_tls::unresolved(known, p) {
            None => Condition::holds("ResolvedRefs"),
            Some(says) => Condition::fails("ResolvedRefs", "InvalidCACertificateRef", says),
        };
        AncestorStatus {
            ancestor_ref: ParentReference {
                group: Some(t.group.clone()),
                kind: Some(t.kind.clone()),
                name: t.name.clone(),
                section_name: t.section_name.clone(),
                ..ParentReference::default()
            },
            controller_name: CONTROLLERS[0],
            conditions: [accepted, resolved]
                .into_iter()
                .chain(ignored(&options, "no option is known"))
                .collect(),
        }
    };
    Object::new(p, PolicyStatus { ancestors: p.spec.target_refs.iter().map(of).collect() })
}

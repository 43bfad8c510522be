//! Routes and what they are attached to.

use mesh_model::authored::gateway_api::{
    BackendRef, DefaultScope, GrpcRoute, HttpRoute, L4Route, ParentReference, RouteFilter,
};

use super::{
    Documents,
    http::Written,
    known::{GROUP, Known},
    listeners::Serves,
    service_host,
};
use crate::{config::Doc, hosts};

/// Kinds of routes that are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum RouteKind {
    Http,
    Grpc,
    Tls,
    Tcp,
}

impl RouteKind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Http => "HTTPRoute",
            Self::Grpc => "GRPCRoute",
            Self::Tls => "TLSRoute",
            Self::Tcp => "TCPRoute",
        }
    }
}

/// A route of any kind.
#[derive(Clone, Copy)]
pub(super) enum Route<'a> {
    Http(&'a Doc<HttpRoute>),
    Grpc(&'a Doc<GrpcRoute>),
    Tls(&'a Doc<L4Route>),
    Tcp(&'a Doc<L4Route>),
}

/// The same of the document of each kind.
macro_rules! of {
    ($route:expr, $d:ident => $what:expr) => {
        match $route {
            Route::Http($d) => $what,
            Route::Grpc($d) => $what,
            Route::Tls($d) | Route::Tcp($d) => $what,
        }
    };
}

impl<'a> Route<'a> {
    pub(super) fn kind(&self) -> RouteKind {
        match self {
            Self::Http(_) => RouteKind::Http,
            Self::Grpc(_) => RouteKind::Grpc,
            Self::Tls(_) => RouteKind::Tls,
            Self::Tcp(_) => RouteKind::Tcp,
        }
    }

    pub(super) fn name(&self) -> &'a str {
        of!(self, d => &d.name)
    }

    pub(super) fn namespace(&self) -> &'a str {
        of!(self, d => &d.namespace)
    }

    pub(super) fn created(&self) -> u64 {
        of!(self, d => d.created)
    }

    /// Parents that it names, and default Gateways that it names not.
    pub(super) fn parents<'k>(&self, known: &'k Known<'a>) -> Vec<&'k ParentReference> {
        let named: &'a [ParentReference] = of!(self, d => &d.spec.parent_refs);
        let mut out: Vec<&'k ParentReference> = named.iter().collect();
        if of!(self, d => d.spec.use_default_gateways) == Some(DefaultScope::All) {
            let same = |p: &ParentReference, d: &ParentReference| {
                p.name == d.name
                    && p.namespace.as_deref().unwrap_or(self.namespace())
                        == d.namespace.as_deref().unwrap_or_default()
                    && p.kind.as_deref().unwrap_or("Gateway") == "Gateway"
                    && p.group.as_deref().unwrap_or(GROUP) == GROUP
            };
            out.extend(known.defaults.iter().filter(|d| !named.iter().any(|p| same(p, d))));
        }
        out
    }

    pub(super) fn hostnames(&self) -> &'a [String] {
        of!(self, d => &d.spec.hostnames)
    }

    /// Rules of requests.
    pub(super) fn rules(&self) -> Vec<Written<'a>> {
        match self {
            Self::Http(d) => d.spec.rules.iter().map(Written::http).collect(),
            Self::Grpc(d) => d.spec.rules.iter().map(Written::grpc).collect(),
            Self::Tls(_) | Self::Tcp(_) => vec![],
        }
    }

    /// Everything that rules refer to as a backend, shadows and authorisers among them.
    pub(super) fn backends(&self) -> Vec<&'a BackendRef> {
        if let Self::Tls(d) | Self::Tcp(d) = self {
            return d.spec.rules.iter().flat_map(|r| &r.backend_refs).collect();
        }
        let other = |f: &'a RouteFilter| {
            let shadow = f.request_mirror.as_ref().and_then(|m| m.backend_ref.as_ref());
            shadow.or_else(|| f.external_auth.as_ref().and_then(|a| a.backend_ref.as_ref()))
        };
        let of = |r: Written<'a>| r.backends.iter().chain(r.filters.iter().filter_map(other));
        self.rules().into_iter().flat_map(of).collect()
    }
}

/// All routes.
pub(super) fn routes(docs: &Documents) -> impl Iterator<Item = Route<'_>> {
    let http = docs.http.iter().map(Route::Http).chain(docs.grpc.iter().map(Route::Grpc));
    http.chain(docs.tls.iter().map(Route::Tls)).chain(docs.tcp.iter().map(Route::Tcp))
}

/// What a reference to a parent leads to.
pub(super) enum Target<'a> {
    /// Somebody else's.
    Ignored,
    /// Nothing that takes the route.
    Refused(Refusal),
    /// These listeners, by position, with the host names that it has there.
    Listeners(Vec<(usize, Vec<String>)>),
    /// The callers of a service.
    Service(ServiceParent<'a>),
}

/// Why a route is not attached, in the API's word and in a sentence.
pub(super) struct Refusal {
    pub(super) reason: &'static str,
    pub(super) message: String,
}

fn refused<'a>(reason: &'static str, message: String) -> Target<'a> {
    Target::Refused(Refusal { reason, message })
}

/// A service whose callers are routed.
pub(super) struct ServiceParent<'a> {
    pub(super) namespace: &'a str,
    pub(super) name: &'a str,
    pub(super) hosts: Vec<String>,
    /// 0 is every port.
    pub(super) port: u32,
}

/// Finds what a route's reference leads to. `listeners` are all that are known.
pub(super) fn attach<'k, 'a: 'k>(
    known: &'k Known<'a>,
    listeners: &[Serves<'a>],
    route: &Route<'a>,
    parent: &'k ParentReference,
) -> Target<'k> {
    let namespace = parent.namespace.as_deref().unwrap_or(route.namespace());
    let group = parent.group.as_deref().unwrap_or(GROUP);
    match (group, parent.kind.as_deref().unwrap_or("Gateway")) {
        (GROUP, "Gateway") => at_gateway(known, listeners, route, parent, namespace),
        ("" | "core", "Service") => at_service(known, parent, namespace),
        ("networking.istio.io", "ServiceEntry") => {
            let mut all = known.config.service_entries.iter();
            match all.find(|e| e.name == parent.name && e.namespace == namespace) {
                None => no_parent("ServiceEntry", namespace, &parent.name),
                Some(e) => Target::Service(ServiceParent {
                    namespace,
                    name: &parent.name,
                    hosts: e.spec.hosts.clone(),
                    port: parent.port.unwrap_or(0),
                }),
            }
        }
        _ => Target::Ignored,
    }
}

fn no_parent<'a>(kind: &str, namespace: &str, name: &str) -> Target<'a> {
    refused("NoMatchingParent", format!("there is no {kind} {namespace}/{name}"))
}

fn at_service<'k>(known: &Known<'_>, parent: &'k ParentReference, namespace: &'k str) -> Target<'k> {
    let Some(service) = known.service(namespace, &parent.name) else {
        return no_parent("Service", namespace, &parent.name);
    };
    let ports = service.map(|s| s.ports.as_slice()).unwrap_or_default();
    let port = match &parent.section_name {
        None => parent.port.unwrap_or(0),
        Some(section) => match ports.iter().find(|p| p.name == *section) {
            Some(p) => p.port,
            None => {
                let says = format!("Service {namespace}/{} has no port called {section}", parent.name);
                return refused("NoMatchingParent", says);
            }
        },
    };
    if port != 0 && !ports.is_empty() && !ports.iter().any(|p| p.port == port) {
        return refused(
            "NoMatchingParent",
            format!("Service {namespace}/{} has no port {port}", parent.name),
        );
    }
    let hosts = vec![service_host(&parent.name, namespace)];
    Target::Service(ServiceParent { namespace, name: &parent.name, hosts, port })
}

fn at_gateway<'k>(
    known: &Known<'_>,
    listeners: &[Serves<'_>],
    route: &Route<'_>,
    parent: &ParentReference,
    namespace: &str,
) -> Target<'k> {
    let found = known.docs.gateways.iter().find(|g| g.name == parent.name && g.namespace == namespace);
    match found {
        None => return no_parent("Gateway", namespace, &parent.name),
        Some(g) if !known.is_own_class(&g.spec.gateway_class_name) => return Target::Ignored,
        Some(_) => {}
    }
    let named: Vec<(usize, &Serves<'_>)> = listeners
        .iter()
        .enumerate()
        .filter(|(_, l)| l.gateway.name == parent.name && l.gateway.namespace == namespace)
        .filter(|(_, l)| parent.section_name.as_ref().is_none_or(|s| *s == l.listener.name))
        .filter(|(_, l)| parent.port.is_none_or(|p| p == l.listener.port))
        .collect();
    if named.is_empty() {
        let section = parent.section_name.as_ref().map(|s| format!(" called {s}")).unwrap_or_default();
        let port = parent.port.map(|p| format!(" with port {p}")).unwrap_or_default();
        let says = format!("Gateway {namespace}/{} has no listener{section}{port}", parent.name);
        return refused("NoMatchingParent", says);
    }
    let allowed: Vec<_> = named.into_iter().filter(|(_, l)| l.allows(known, route)).collect();
    if allowed.is_empty() {
        let says = format!(
            "no listener of Gateway {namespace}/{} takes a {} of namespace {}: see its protocol and allowedRoutes",
            parent.name,
            route.kind().name(),
            route.namespace()
        );
        return refused("NotAllowedByListeners", says);
    }
    let fits = |(i, l): (usize, &Serves<'_>)| {
        // Bytes have no host.
        let names = if route.kind() == RouteKind::Tcp {
            vec!["*".to_owned()]
        } else {
            intersection(l.hostname(), route.hostnames())
        };
        (!names.is_empty()).then_some((i, names))
    };
    let fitting: Vec<_> = allowed.into_iter().filter_map(fits).collect();
    if fitting.is_empty() {
        let says =
            format!("no hostname of the route is one of a listener of Gateway {namespace}/{}", parent.name);
        return refused("NoMatchingListenerHostname", says);
    }
    Target::Listeners(fitting)
}

/// Host names that a route has at a listener; `*` is any.
pub(super) fn intersection(listener: Option<&str>, route: &[String]) -> Vec<String> {
    let mut out: Vec<String> = match (listener, route) {
        (None, []) => vec!["*".to_owned()],
        (None, names) => names.to_vec(),
        (Some(l), []) => vec![l.to_owned()],
        (Some(l), names) => names
            .iter()
            .filter_map(|n| {
                // The narrower of the two.
                if hosts::covers(l, n) { Some(n.clone()) } else { hosts::covers(n, l).then(|| l.to_owned()) }
            })
            .collect(),
    };
    out.sort();
    out.dedup();
    out
}

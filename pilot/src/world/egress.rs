//! What a workload may call, and on which listeners: the `egress` part of a `Sidecar`.
//!
//! A listener with a port has the services of its hosts that have that port; the one without, which comes last, has all
//! ports of its own. What only a route leads to is reached as well, but nobody may call it by name.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use mesh_model::{
    authored::{
        CaptureMode, Destination, HttpRoute, IstioEgressListener, OutboundTrafficMode, OutboundTrafficPolicy,
        Sidecar, VirtualService,
    },
    registry::Protocol,
};

use super::World;
use crate::{
    config::{Doc, selects},
    hosts,
    index::Entry,
    proxy::ProxyNode,
};

/// Protocol of an egress listener that takes requests for every service, as an HTTP proxy (Istio's word).
pub(crate) const HTTP_PROXY: &str = "HTTP_PROXY";

/// One way out of a workload.
#[derive(Debug)]
pub(crate) struct Egress<'a> {
    /// As written; `None` without a `Sidecar` that says something of egress.
    listener: Option<&'a IstioEgressListener>,
    /// `(namespace, host)`; of the namespace `.` is the proxy's.
    hosts: Vec<(&'a str, &'a str)>,
    /// Services that may be called on it, by host.
    pub(crate) services: Vec<&'a Arc<Entry>>,
}

/// What an egress listener with a port is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Carries {
    /// One protocol, to services that have the listener's port.
    Protocol(Protocol),
    /// Requests to whatever service they name.
    Proxied,
}

/// A listener that a `Sidecar` declares.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Declared {
    pub(crate) port: u16,
    pub(crate) carries: Carries,
    /// Address; `None` is that of the services, or of the environment.
    pub(crate) bind: Option<IpAddr>,
    /// Whether the workload connects to it itself (`captureMode: NONE`).
    pub(crate) connected: bool,
}

/// Where destinations that nobody declared are sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Undeclared<'a> {
    /// Nowhere.
    Refused,
    /// Where they are.
    Passed,
    /// Requests where their host's name leads, all else where it is.
    Named,
    /// To a proxy (`egressProxy`), as named in this namespace.
    Proxied(&'a Destination, &'a str),
}

impl<'a> Egress<'a> {
    fn of(listener: &'a IstioEgressListener) -> Self {
        let hosts = listener.hosts.iter().map(|h| h.split_once('/').unwrap_or(("*", h))).collect();
        Self { listener: Some(listener), hosts, services: vec![] }
    }

    /// The listener's port and what goes with it; `None` for the one that has all ports of its services. A Unix socket
    /// has no port, and galley says that there is no such listener.
    pub(crate) fn declared(&self) -> Option<Declared> {
        let l = self.listener?;
        let port = l.port.as_ref()?;
        let carries = if port.protocol.eq_ignore_ascii_case(HTTP_PROXY) {
            Carries::Proxied
        } else {
            Carries::Protocol(Protocol::parse(&port.protocol).unwrap_or(Protocol::Auto))
        };
        Some(Declared {
            port: u16::try_from(port.number).unwrap_or(0),
            carries,
            bind: l.bind.parse().ok(),
            connected: l.capture_mode == CaptureMode::None,
        })
    }

    /// Whether something of a namespace that is called one of these hosts is imported.
    fn imports<'h>(
        &self,
        proxy: &ProxyNode,
        namespace: &str,
        mut called: impl Iterator<Item = &'h str>,
    ) -> bool {
        if self.listener.is_none() {
            return true;
        }
        let of = |ns: &str| match ns {
            "*" => true,
            "." => namespace == proxy.namespace,
            "~" => false,
            other => namespace == other,
        };
        called.any(|c| self.hosts.iter().any(|(ns, host)| of(ns) && hosts::covers(host, c)))
    }

    /// Whether routes of a document count on it. A document without hosts is one that others delegate to.
    pub(crate) fn imports_routes(&self, proxy: &ProxyNode, namespace: &str, called: &[String]) -> bool {
        called.is_empty() || self.imports(proxy, namespace, called.iter().map(String::as_str))
    }

    fn takes(&self, proxy: &ProxyNode, e: &Entry) -> bool {
        let port = match self.declared() {
            Some(Declared { port, carries: Carries::Protocol(_), .. }) => Some(port),
            _ => None,
        };
        port.is_none_or(|p| e.port(p).is_some() || e.udp_port(p).is_some())
            && self.imports(
                proxy,
                &e.service.namespace,
                std::iter::once(e.service.host.as_str()).chain(e.aliases.iter().map(String::as_str)),
            )
    }
}

impl World {
    /// The `Sidecar` that applies to a workload: one that selects it, its namespace's, the root
    /// namespace's.
    #[must_use]
    pub fn sidecar(&self, proxy: &ProxyNode) -> Option<&Doc<Sidecar>> {
        if proxy.router {
            return None;
        }
        let all = &self.config.sidecars;
        let of_all = |ns: &str| all.iter().find(|s| s.namespace == ns && s.spec.workload_selector.is_none());
        let selected = |s: &&Doc<Sidecar>| {
            s.namespace == proxy.namespace
                && s.spec.workload_selector.as_ref().is_some_and(|w| selects(&w.labels, &proxy.labels))
        };
        let own = all.iter().find(selected).or_else(|| of_all(&proxy.namespace));
        own.or_else(|| of_all(self.config.root_namespace()))
    }

    /// The ways out of a workload, in the order of the document: one if nothing is said of them.
    fn ways_out(&self, proxy: &ProxyNode) -> Vec<Egress<'_>> {
        // A Sidecar without egress is about ingress only.
        let said = self.sidecar(proxy).map(|s| s.spec.egress.as_slice()).unwrap_or_default();
        if said.is_empty() {
            return vec![Egress { listener: None, hosts: vec![], services: vec![] }];
        }
        said.iter().map(Egress::of).collect()
    }

    /// The same with what may be called on each.
    pub(crate) fn egress<'a>(&'a self, proxy: &ProxyNode) -> Vec<Egress<'a>> {
        let mut out = self.ways_out(proxy);
        for e in self.index.services.values() {
            if self.offers(proxy, e) {
                for l in &mut out {
                    if l.takes(proxy, e) {
                        l.services.push(e);
                    }
                }
            }
        }
        out
    }

    /// Services that a proxy reaches: those that it may call, and those that routes lead to from there. By host.
    pub(crate) fn reached<'a>(&'a self, proxy: &ProxyNode, egress: &[Egress<'a>]) -> Vec<&'a Arc<Entry>> {
        if let [all] = egress
            && all.listener.is_none()
        {
            return all.services.clone();
        }
        let mut out: BTreeMap<&str, &'a Arc<Entry>> = BTreeMap::new();
        for e in egress.iter().flat_map(|l| &l.services) {
            out.insert(&e.service.host, e);
        }
        let mut add = |d: &Destination, namespace: &str| {
            if let Some(e) = self.index.get(&hosts::resolve(&d.host, namespace))
                && self.offers(proxy, e)
            {
                out.entry(&e.service.host).or_insert(e);
            }
        };
        for (doc, called) in self.virtual_services() {
            let counts = crate::generate::bound_to_mesh(doc)
                && self.shows(proxy, doc)
                && egress.iter().any(|l| l.imports_routes(proxy, &doc.namespace, called));
            if counts {
                destinations(&doc.spec, &mut |d| add(d, &doc.namespace));
            }
        }
        if let Undeclared::Proxied(d, namespace) = self.undeclared(proxy) {
            add(d, namespace);
        }
        out.into_values().collect()
    }

    /// The document with routes of a service, of those that count for this proxy.
    pub(crate) fn routes_of<'a>(
        &'a self,
        proxy: &ProxyNode,
        egress: &[Egress<'_>],
        e: &Entry,
    ) -> Option<&'a Doc<VirtualService>> {
        let names = || std::iter::once(e.service.host.as_str()).chain(e.aliases.iter().map(String::as_str));
        self.virtual_service(proxy, &e.service.host, |d| {
            crate::generate::bound_to_mesh(d)
                && egress.iter().any(|l| l.imports(proxy, &d.namespace, names()))
        })
    }

    /// The same for somebody who asks about one service.
    #[must_use]
    pub fn mesh_routes<'a>(&'a self, proxy: &ProxyNode, e: &Entry) -> Option<&'a Doc<VirtualService>> {
        self.routes_of(proxy, &self.ways_out(proxy), e)
    }

    /// What happens to destinations that nobody declared.
    pub(crate) fn undeclared(&self, proxy: &ProxyNode) -> Undeclared<'_> {
        let own = self.sidecar(proxy).and_then(|s| Some((s.spec.outbound_traffic_policy.as_ref()?, s)));
        let mode = |p: &OutboundTrafficPolicy| match p.mode {
            OutboundTrafficMode::RegistryOnly => Undeclared::Refused,
            OutboundTrafficMode::AllowAny => Undeclared::Passed,
            OutboundTrafficMode::AllowAnyDynamicDns => Undeclared::Named,
        };
        match own {
            Some((p, s)) => match (mode(p), &p.egress_proxy) {
                (Undeclared::Passed, Some(d)) => Undeclared::Proxied(d, s.namespace.as_str()),
                (mode, _) => mode,
            },
            None => self.config.mesh.outbound_traffic_policy.as_ref().map_or(Undeclared::Passed, mode),
        }
    }
}

/// Calls `f` with each destination that a document sends something to.
fn destinations(v: &VirtualService, f: &mut impl FnMut(&Destination)) {
    let http = |r: &HttpRoute, f: &mut dyn FnMut(&Destination)| {
        let mirrors = r.mirrors.iter().filter_map(|m| m.destination.as_ref());
        let routes = r.route.iter().filter_map(|d| d.destination.as_ref());
        let authorizers = r.extras.iter().flat_map(|e| &e.authorizers).map(|a| &a.destination);
        routes.chain(r.mirror.as_ref()).chain(mirrors).chain(authorizers).for_each(f);
    };
    v.http.iter().for_each(|r| http(r, f));
    let tls = v.tls.iter().flat_map(|r| &r.route);
    let tcp = v.tcp.iter().flat_map(|r| &r.route);
    tls.chain(tcp).filter_map(|r| r.destination.as_ref()).for_each(f);
}

//! Listeners of Gateways: what they serve and to whom.

use std::collections::{BTreeMap, BTreeSet};

use mesh_model::authored::{
    self, Port, Server, ServerTlsMode, ServerTlsSettings, VirtualService,
    gateway_api::{
        FromNamespaces, FrontendValidation, FrontendValidationMode, Gateway, Listener, ListenerTlsMode,
    },
};

use super::{
    CLIENT_CERTIFICATE, GATEWAY_NAME, SERVED_IN,
    attach::{Route, RouteKind},
    backends::{Unresolved, credential},
    known::{GROUP, Known},
    made, virtual_service,
};
use crate::{config::Doc, hosts};

/// Option of a listener by which Istio asks clients for certificates.
const TERMINATE_MODE: &str = "gateway.istio.io/tls-terminate-mode";

/// What a listener speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Speaks {
    Http,
    Https,
    /// TLS that ends here, or passes.
    Tls {
        passes: bool,
    },
    Tcp,
}

/// A listener of a Gateway that is this mesh's.
pub(crate) struct Serves<'a> {
    pub(super) gateway: &'a Doc<Gateway>,
    pub(super) listener: &'a Listener,
    /// `None`: a protocol that gateways do not serve.
    pub(super) speaks: Option<Speaks>,
    /// Kinds of routes that it takes.
    pub(super) kinds: Vec<RouteKind>,
    /// A kind that it names and cannot take.
    pub(super) wrong_kind: Option<String>,
    /// Why it shares no port with one before it: the API's word and a sentence.
    pub(super) conflict: Option<(&'static str, String)>,
    /// TLS, or why there is none.
    pub(super) tls: Result<Option<ServerTlsSettings>, Unresolved>,
}

/// The listeners of all Gateways of this mesh.
pub(super) fn listeners<'a>(known: &Known<'a>) -> Vec<Serves<'a>> {
    let own = known.docs.gateways.iter().filter(|g| known.is_own_class(&g.spec.gateway_class_name));
    let mut out: Vec<Serves<'a>> = Vec::new();
    for g in own {
        let first = out.len();
        for l in &g.spec.listeners {
            let serves = Serves::new(known, g, l, out.get(first..).unwrap_or_default());
            out.push(serves);
        }
    }
    out
}

impl<'a> Serves<'a> {
    fn new(
        known: &Known<'_>,
        gateway: &'a Doc<Gateway>,
        listener: &'a Listener,
        before: &[Serves<'_>],
    ) -> Self {
        let passes = listener.tls.as_ref().and_then(|t| t.mode) == Some(ListenerTlsMode::Passthrough);
        let speaks = match listener.protocol.as_str() {
            "HTTP" => Some(Speaks::Http),
            "HTTPS" => Some(Speaks::Https),
            "TLS" => Some(Speaks::Tls { passes }),
            "TCP" => Some(Speaks::Tcp),
            _ => None,
        };
        let possible: &[RouteKind] = match speaks {
            Some(Speaks::Http | Speaks::Https) => &[RouteKind::Http, RouteKind::Grpc],
            Some(Speaks::Tls { passes: true }) => &[RouteKind::Tls],
            Some(Speaks::Tls { passes: false }) => &[RouteKind::Tls, RouteKind::Tcp],
            Some(Speaks::Tcp) => &[RouteKind::Tcp],
            None => &[],
        };
        let wanted = listener.allowed_routes.as_ref().map(|a| a.kinds.as_slice()).unwrap_or_default();
        let find = |k: &authored::gateway_api::RouteKind| {
            let own = k.group.as_deref().unwrap_or(GROUP) == GROUP;
            possible.iter().find(|p| own && p.name() == k.kind).copied()
        };
        let kinds =
            if wanted.is_empty() { possible.to_vec() } else { wanted.iter().filter_map(find).collect() };
        let wrong_kind = wanted.iter().find(|k| find(k).is_none()).map(|k| k.kind.clone());
        let mut out = Self { gateway, listener, speaks, kinds, wrong_kind, conflict: None, tls: Ok(None) };
        out.conflict =
            before.iter().filter(|b| b.listener.port == listener.port).find_map(|b| out.conflict(b));
        out.tls = out.termination(known);
        out
    }

    /// Why it and another listener of the same Gateway cannot share their port.
    fn conflict(&self, other: &Serves<'_>) -> Option<(&'static str, String)> {
        let secure = |s: Option<Speaks>| matches!(s, Some(Speaks::Https | Speaks::Tls { .. }));
        let (mine, theirs) = (&self.listener.name, &other.listener.name);
        if self.speaks.is_none() || other.speaks.is_none() {
            return None;
        }
        if secure(self.speaks) != secure(other.speaks) || !secure(self.speaks) && self.speaks != other.speaks
        {
            let says = format!("listeners {theirs} and {mine} have the same port and different protocols");
            return Some(("ProtocolConflict", says));
        }
        let says = format!("listeners {theirs} and {mine} have the same port and hostname");
        (self.hostname() == other.hostname()).then_some(("HostnameConflict", says))
    }

    pub(super) fn hostname(&self) -> Option<&'a str> {
        self.listener.hostname.as_deref().filter(|h| !h.is_empty())
    }

    /// Whether TLS passes through.
    pub(super) fn passes(&self) -> bool {
        self.speaks == Some(Speaks::Tls { passes: true })
    }

    /// Whether there is anything to serve.
    pub(super) fn is_served(&self) -> bool {
        self.speaks.is_some() && self.conflict.is_none() && self.tls.is_ok()
    }

    /// Name of its document.
    pub(super) fn name(&self) -> String {
        format!("{}~{}", self.gateway.name, self.listener.name)
    }

    /// `namespace/name` of its document.
    pub(super) fn key(&self) -> String {
        format!("{}/{}", self.gateway.namespace, self.name())
    }

    /// Whether a route's kind and namespace may attach.
    pub(super) fn allows(&self, known: &Known<'_>, route: &Route<'_>) -> bool {
        let own = self.gateway.namespace.as_str();
        let namespaces = self.listener.allowed_routes.as_ref().and_then(|a| a.namespaces.as_ref());
        let from = namespaces.and_then(|n| n.from).unwrap_or(FromNamespaces::Same);
        let here = match from {
            FromNamespaces::All => true,
            FromNamespaces::Same => route.namespace() == own,
            FromNamespaces::None => false,
            FromNamespaces::Selector => namespaces
                .and_then(|n| n.selector.as_ref())
                .is_some_and(|s| known.selects(s, route.namespace())),
        };
        here && self.kinds.contains(&route.kind())
    }

    fn termination(&self, known: &Known<'_>) -> Result<Option<ServerTlsSettings>, Unresolved> {
        match self.speaks {
            Some(Speaks::Https | Speaks::Tls { passes: false }) => {}
            Some(Speaks::Tls { passes: true }) => {
                return Ok(Some(ServerTlsSettings {
                    mode: ServerTlsMode::Passthrough,
                    ..Default::default()
                }));
            }
            _ => return Ok(None),
        }
        let namespace = self.gateway.namespace.as_str();
        let tls = self.listener.tls.clone().unwrap_or_default();
        let mut out = ServerTlsSettings { mode: ServerTlsMode::Simple, ..ServerTlsSettings::default() };
        match tls.options.get(TERMINATE_MODE).map(String::as_str) {
            None | Some("SIMPLE") => {}
            Some("MUTUAL") => out.mode = ServerTlsMode::Mutual,
            Some("OPTIONAL_MUTUAL") => out.mode = ServerTlsMode::OptionalMutual,
            Some("ISTIO_MUTUAL") => {
                out.mode = ServerTlsMode::IstioMutual;
                return Ok(Some(out));
            }
            Some(other) => {
                let message = format!(
                    "{TERMINATE_MODE}: {other:?} is none of SIMPLE, MUTUAL, OPTIONAL_MUTUAL, ISTIO_MUTUAL"
                );
                return Err(Unresolved { reason: "InvalidCertificateRef", message });
            }
        }
        for r in &tls.certificate_refs {
            out.credential_names.push(credential(known, namespace, r, &["Secret"])?);
        }
        let Some(first) = out.credential_names.first().cloned() else {
            let message = "certificateRefs names no certificate".to_owned();
            return Err(Unresolved { reason: "InvalidCertificateRef", message });
        };
        if let [_] = out.credential_names.as_slice() {
            out.credential_names.clear();
        }
        out.credential_name = first;
        if let Some(v) = self.validation() {
            out.mode = match v.mode {
                Some(FrontendValidationMode::AllowInsecureFallback) => ServerTlsMode::OptionalMutual,
                _ => ServerTlsMode::Mutual,
            };
            let Some(r) = v.ca_certificate_refs.first() else {
                let message = "caCertificateRefs names no roots to verify clients by".to_owned();
                return Err(Unresolved { reason: "InvalidCACertificateRef", message });
            };
            let kinds = ["ConfigMap", "Secret"];
            out.ca_cert_credential_name = format!("{}-cacert", credential(known, namespace, r, &kinds)?);
        }
        Ok(Some(out))
    }

    /// How clients are verified: as the Gateway says for the port, as it says for all, or as the listener does (old form).
    fn validation(&self) -> Option<&FrontendValidation> {
        let frontend = self.gateway.spec.tls.as_ref().and_then(|t| t.frontend.as_ref());
        let own = || self.listener.tls.as_ref().and_then(|t| t.frontend_validation.as_ref());
        let Some(f) = frontend else { return own() };
        match f.per_port.iter().find(|p| p.port == self.listener.port) {
            Some(p) => p.tls.as_ref().and_then(|t| t.validation.as_ref()),
            None => f.default.as_ref().and_then(|t| t.validation.as_ref()).or_else(own),
        }
    }

    /// Its documents.
    pub(super) fn documents(&self, known: &Known<'_>) -> Vec<Doc<authored::Gateway>> {
        let names = [self.hostname().unwrap_or("*").to_owned()];
        self.server(known, &self.name(), &names)
    }

    /// Documents with one server for host names: one for each group of proxies that serve the Gateway.
    pub(super) fn server(
        &self,
        known: &Known<'_>,
        name: &str,
        names: &[String],
    ) -> Vec<Doc<authored::Gateway>> {
        let (true, Ok(tls)) = (self.is_served(), &self.tls) else { return vec![] };
        let server = Server {
            port: Some(Port {
                number: self.listener.port,
                protocol: self.listener.protocol.clone(),
                name: self.listener.name.clone(),
                ..Port::default()
            }),
            hosts: names.iter().map(|n| format!("*/{n}")).collect(),
            tls: tls.clone(),
            name: self.listener.name.clone(),
            ..Server::default()
        };
        let shown = self.client_certificate(known);
        let proxies = proxies(known, self.gateway).into_iter();
        proxies
            .map(|(namespace, selector)| {
                let spec = authored::Gateway { servers: vec![server.clone()], selector };
                let (at, created) = (&self.gateway.namespace, self.gateway.created);
                match &shown {
                    None => made(at, name.to_owned(), created, [(SERVED_IN, namespace)], spec),
                    Some(c) => {
                        let notes = [(SERVED_IN, namespace), (CLIENT_CERTIFICATE, c.clone())];
                        made(at, name.to_owned(), created, notes, spec)
                    }
                }
            })
            .collect()
    }

    /// What the Gateway's proxies show to backends. A reference that leads nowhere names what nobody has, so that
    /// backends that ask are not reached without.
    fn client_certificate(&self, known: &Known<'_>) -> Option<String> {
        let spec = &self.gateway.spec;
        let now = spec.tls.as_ref().and_then(|t| t.backend.as_ref());
        // The field has moved.
        let r = now.or(spec.backend_tls.as_ref())?.client_certificate_ref.as_ref()?;
        let name = credential(known, &self.gateway.namespace, r, &["Secret"]);
        Some(name.unwrap_or_else(|_| format!("invalid_{}", r.name)))
    }

    /// A document with routes of one of its hosts.
    pub(super) fn document(
        &self,
        host: &str,
        http: Vec<authored::HttpRoute>,
        created: u64,
    ) -> Doc<VirtualService> {
        let spec = VirtualService {
            hosts: vec![host.to_owned()],
            gateways: vec![self.key()],
            http,
            ..VirtualService::default()
        };
        virtual_service(&self.gateway.namespace, format!("{}~{host}", self.name()), created, spec)
    }

    /// Listeners of the same Gateway, port and protocol whose host names are part of this one's, or the other way round.
    fn beside<'l>(&'l self, all: &'l [Serves<'a>]) -> impl Iterator<Item = &'l Serves<'a>> {
        all.iter().filter(|o| {
            std::ptr::eq(o.gateway, self.gateway)
                && o.listener.port == self.listener.port
                && o.speaks == self.speaks
                && o.hostname() != self.hostname()
                && o.is_served()
        })
    }

    /// Those of a route's host names here for which there is no narrower listener: a request belongs to one listener.
    pub(super) fn isolated(&self, all: &[Serves<'a>], mut names: Vec<String>) -> Vec<String> {
        let own = self.hostname().unwrap_or("*");
        let narrower: BTreeSet<&str> =
            self.beside(all).filter_map(Serves::hostname).filter(|h| hosts::covers(own, h)).collect();
        names.retain(|n| !narrower.iter().any(|h| hosts::covers(h, n)));
        names
    }

    /// Its host name, if a wider listener would get its requests when it has no routes.
    pub(super) fn shadowed(&self, all: &[Serves<'a>]) -> Option<String> {
        let own = self.hostname()?;
        let http = matches!(self.speaks, Some(Speaks::Http | Speaks::Https)) && self.is_served();
        let wider = |o: &Serves<'_>| hosts::covers(o.hostname().unwrap_or("*"), own);
        (http && self.beside(all).any(wider)).then(|| own.to_owned())
    }
}

/// Who serves a Gateway, by namespace and labels: the proxies behind Services that `addresses` name, or those that carry
/// the Gateway's name.
pub(super) fn proxies(known: &Known<'_>, g: &Doc<Gateway>) -> Vec<(String, BTreeMap<String, String>)> {
    let named: Vec<&str> = g
        .spec
        .addresses
        .iter()
        .filter(|a| a.address_type.as_deref() == Some("Hostname"))
        .filter_map(|a| a.value.as_deref())
        .collect();
    if named.is_empty() {
        let selector = BTreeMap::from([(GATEWAY_NAME.to_owned(), g.name.clone())]);
        return vec![(g.namespace.clone(), selector)];
    }
    let services = named.iter().filter_map(|h| known.service_by_host(h, &g.namespace));
    // Without a selector it would be everybody.
    let chosen = services.filter(|s| !s.spec.selector.is_empty());
    chosen.map(|s| (s.namespace.clone(), s.spec.selector.clone())).collect()
}

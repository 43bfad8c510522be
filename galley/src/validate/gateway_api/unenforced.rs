//! What is accepted and not executed: fields for which the mesh has no means. Everything else of these kinds is.

use mesh_model::authored::gateway_api::{
    BackendRef, BackendTlsPolicy, FilterType, FrontendValidation, FrontendValidationMode, Gateway,
    GatewayClass, GrpcRoute, HttpRoute, L4Route, ObjectReference, RouteFilter, SessionPersistence,
};

use super::Findings;
use crate::path::Path;

/// Option of a listener that is read.
const TERMINATE_MODE: &str = "gateway.istio.io/tls-terminate-mode";
/// Classes of Istio that are no edges.
const OTHER_CLASSES: [&str; 4] = ["istio-waypoint", "istio-east-west", "istio-remote", "istio-agentgateway"];

pub(super) fn class(c: &GatewayClass, p: &Path<'_>, out: &mut Findings) {
    out.unenforced(c.parameters_ref.is_some(), p, "parametersRef");
}

pub(super) fn gateway(g: &Gateway, p: &Path<'_>, out: &mut Findings) {
    if OTHER_CLASSES.contains(&g.gateway_class_name.as_str()) {
        let says = format!("class {} is accepted but not enforced yet", g.gateway_class_name);
        out.warning(&p.key("gatewayClassName"), says);
    }
    out.unenforced(g.infrastructure.is_some(), p, "infrastructure");
    out.unenforced(g.allowed_listeners.is_some(), p, "allowedListeners");
    let addresses = p.key("addresses");
    for (i, a) in g.addresses.iter().enumerate() {
        if a.address_type.as_deref() != Some("Hostname") {
            let at = addresses.index(i);
            out.warning(
                &at.key("type"),
                "an address that is not a Hostname is accepted but not enforced yet: gateways listen where they run",
            );
        }
    }
    if let Some(t) = &g.tls {
        let tls = p.key("tls");
        let frontend = tls.key("frontend");
        if let Some(f) = &t.frontend {
            let default = f.default.as_ref().and_then(|d| d.validation.as_ref());
            validation(default, &frontend.key("default").key("validation"), out);
            let ports = frontend.key("perPort");
            for (i, port) in f.per_port.iter().enumerate() {
                let v = port.tls.as_ref().and_then(|t| t.validation.as_ref());
                let at = ports.index(i);
                validation(v, &at.key("tls").key("validation"), out);
            }
        }
    }
    let listeners = p.key("listeners");
    for (i, l) in g.listeners.iter().enumerate() {
        let at = listeners.index(i);
        if !l.protocol.is_empty() && !matches!(l.protocol.as_str(), "HTTP" | "HTTPS" | "TLS" | "TCP") {
            let says = format!("protocol {} is accepted but not enforced yet", l.protocol);
            out.warning(&at.key("protocol"), says);
        }
        let Some(t) = &l.tls else { continue };
        let tls = at.key("tls");
        validation(t.frontend_validation.as_ref(), &tls.key("frontendValidation"), out);
        let options = tls.key("options");
        for key in t.options.keys().filter(|k| *k != TERMINATE_MODE) {
            out.warning(&options.key(key), format!("option {key} is accepted but not enforced yet"));
        }
    }
}

fn first_alone(list: &[ObjectReference], p: &Path<'_>, out: &mut Findings) {
    for i in 1..list.len() {
        out.warning(
            &p.index(i),
            "more than one reference is accepted but not enforced yet: the first is used",
        );
    }
}

fn validation(v: Option<&FrontendValidation>, p: &Path<'_>, out: &mut Findings) {
    let Some(v) = v else { return };
    first_alone(&v.ca_certificate_refs, &p.key("caCertificateRefs"), out);
    if v.mode == Some(FrontendValidationMode::AllowInsecureFallback) {
        out.warning(
            &p.key("mode"),
            "AllowInsecureFallback is accepted but not enforced yet for certificates that are not valid: only clients \
             without one pass",
        );
    }
}

pub(super) fn http(r: &HttpRoute, p: &Path<'_>, out: &mut Findings) {
    let rules = p.key("rules");
    for (i, x) in r.rules.iter().enumerate() {
        rule(&x.filters, &x.backend_refs, x.session_persistence.as_ref(), &rules.index(i), out);
    }
}

pub(super) fn grpc(r: &GrpcRoute, p: &Path<'_>, out: &mut Findings) {
    let rules = p.key("rules");
    for (i, x) in r.rules.iter().enumerate() {
        rule(&x.filters, &x.backend_refs, x.session_persistence.as_ref(), &rules.index(i), out);
    }
}

fn rule(
    filters: &[RouteFilter],
    backends: &[BackendRef],
    persistence: Option<&SessionPersistence>,
    p: &Path<'_>,
    out: &mut Findings,
) {
    if persistence.is_some_and(|s| s.idle_timeout.is_some()) {
        let at = p.key("sessionPersistence");
        out.warning(&at.key("idleTimeout"), "is not supported: the rule answers 500");
    }
    let list = p.key("filters");
    for (i, f) in filters.iter().enumerate() {
        let at = list.index(i);
        if let Some(t @ FilterType::ExtensionRef) = f.filter_type {
            // Passing what it might have refused would open what its author believes closed.
            let says = format!("filter {t:?} is accepted but not enforced yet: the rule answers 500");
            out.warning(&at.key("type"), says);
        }
        if let Some(c) = &f.cors
            && c.allow_credentials == Some(true)
            && [&c.allow_headers, &c.expose_headers].iter().any(|l| l.iter().any(|h| h == "*"))
        {
            out.warning(&at.key("cors"), "'*' for headers is accepted but not enforced yet with credentials");
        }
    }
    let all = p.key("backendRefs");
    for (i, b) in backends.iter().enumerate() {
        let at = all.index(i);
        let list = at.key("filters");
        for (j, f) in b.filters.iter().enumerate() {
            use FilterType::{RequestHeaderModifier, ResponseHeaderModifier};
            match f.filter_type {
                None | Some(RequestHeaderModifier | ResponseHeaderModifier) => {}
                Some(t) => {
                    let says = format!("filter {t:?} of a backend is accepted but not enforced yet");
                    let at = list.index(j);
                    out.warning(&at.key("type"), says);
                }
            }
        }
    }
}

pub(super) fn l4(r: &L4Route, kind: &str, p: &Path<'_>, out: &mut Findings) {
    if kind == "UDPRoute" {
        out.warning(p, "UDPRoute is accepted but not enforced yet");
        return;
    }
    let rules = p.key("rules");
    for i in 1..r.rules.len() {
        out.warning(
            &rules.index(i),
            "has no effect: rules have no conditions, so that the first is the route",
        );
    }
}

pub(super) fn backend_tls(b: &BackendTlsPolicy, p: &Path<'_>, out: &mut Findings) {
    out.unenforced(!b.options.is_empty(), p, "options");
    if let Some(v) = &b.validation {
        let at = p.key("validation");
        first_alone(&v.ca_certificate_refs, &at.key("caCertificateRefs"), out);
        if v.well_known_ca_certificates.as_deref().is_some_and(|w| w.contains('/')) {
            let field = at.key("wellKnownCACertificates");
            out.warning(&field, "another set than System is accepted but not enforced yet: connections fail");
        }
    }
}

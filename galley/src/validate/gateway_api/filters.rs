//! Filters of routes.

use mesh_model::authored::gateway_api::{
    BackendRef, FilterType, HeaderModifier, HttpRule, PathMatchType, PathModifier, PathModifierType,
    RouteFilter,
};

use super::{METHODS, backend, count};
use crate::{
    path::Path,
    validate::common::{self, Findings},
};

pub(super) use mesh_model::authored::gateway_api::FilterType as Type;

/// Filters of an HTTPRoute.
pub(super) const HTTP: &[FilterType] = &[
    FilterType::RequestHeaderModifier,
    FilterType::ResponseHeaderModifier,
    FilterType::RequestMirror,
    FilterType::RequestRedirect,
    FilterType::UrlRewrite,
    FilterType::ExtensionRef,
    FilterType::Cors,
    FilterType::ExternalAuth,
];
/// Filters of a GRPCRoute.
pub(super) const GRPC: &[FilterType] = &[
    FilterType::RequestHeaderModifier,
    FilterType::ResponseHeaderModifier,
    FilterType::RequestMirror,
    FilterType::ExtensionRef,
];
/// Other routes have none.
pub(super) const NONE: &[FilterType] = &[];

pub(super) fn check(list: &[RouteFilter], allowed: &[FilterType], p: &Path<'_>, out: &mut Findings) {
    count(list.len(), 0, 16, p, out);
    let types: Vec<FilterType> = list.iter().filter_map(|f| f.filter_type).collect();
    for (i, f) in list.iter().enumerate() {
        let at = p.index(i);
        let Some(t) = f.filter_type else {
            out.error(&at.key("type"), "a type is required");
            continue;
        };
        if !allowed.contains(&t) {
            out.error(&at.key("type"), format!("filter {t:?} is not for this kind of route"));
        }
        let repeatable =
            matches!(t, FilterType::RequestMirror | FilterType::ExtensionRef | FilterType::ExternalAuth);
        if !repeatable && list[..i].iter().any(|o| o.filter_type == Some(t)) {
            out.error(&at.key("type"), format!("filter {t:?} is there twice"));
        }
        members(f, t, &at, out);
    }
    if types.contains(&FilterType::RequestRedirect) && types.contains(&FilterType::UrlRewrite) {
        out.error(p, "only one of RequestRedirect and URLRewrite is allowed");
    }
}

fn members(f: &RouteFilter, t: FilterType, p: &Path<'_>, out: &mut Findings) {
    for (set, of, field) in [
        (f.request_header_modifier.is_some(), FilterType::RequestHeaderModifier, "requestHeaderModifier"),
        (f.response_header_modifier.is_some(), FilterType::ResponseHeaderModifier, "responseHeaderModifier"),
        (f.request_mirror.is_some(), FilterType::RequestMirror, "requestMirror"),
        (f.request_redirect.is_some(), FilterType::RequestRedirect, "requestRedirect"),
        (f.url_rewrite.is_some(), FilterType::UrlRewrite, "urlRewrite"),
        (f.extension_ref.is_some(), FilterType::ExtensionRef, "extensionRef"),
        (f.cors.is_some(), FilterType::Cors, "cors"),
        (f.external_auth.is_some(), FilterType::ExternalAuth, "externalAuth"),
    ] {
        if of == t && !set {
            out.error(&p.key(field), format!("{field} is required by the filter's type"));
        } else if of != t && set {
            out.error(&p.key(field), format!("{field} does not belong to the filter's type"));
        }
    }
    if let Some(m) = &f.request_header_modifier {
        headers(m, &p.key("requestHeaderModifier"), out);
    }
    if let Some(m) = &f.response_header_modifier {
        headers(m, &p.key("responseHeaderModifier"), out);
    }
    if let Some(m) = &f.request_mirror {
        let at = p.key("requestMirror");
        match &m.backend_ref {
            Some(b) => object(b, &at.key("backendRef"), out),
            None => out.error(&at.key("backendRef"), "a backend is required"),
        }
        if m.percent.is_some() && m.fraction.is_some() {
            out.error(&at, "only one of percent and fraction is allowed");
        }
        if let Some(n) = m.percent {
            common::percent(n.into(), &at.key("percent"), out);
        }
        if let Some(x) = &m.fraction {
            let below = x.denominator.unwrap_or(100);
            if x.numerator < 0 || below < 1 || x.numerator > below {
                out.error(&at.key("fraction"), "expected 0 <= numerator <= denominator");
            }
        }
    }
    if let Some(r) = &f.request_redirect {
        let at = p.key("requestRedirect");
        if r.scheme.as_deref().is_some_and(|s| !matches!(s, "http" | "https")) {
            out.error(&at.key("scheme"), "neither http nor https");
        }
        if r.status_code.is_some_and(|c| !matches!(c, 301 | 302 | 303 | 307 | 308)) {
            out.error(&at.key("statusCode"), "none of 301, 302, 303, 307, 308");
        }
        if let Some(n) = r.port {
            common::port(n, &at.key("port"), out);
        }
        path(r.path.as_ref(), &at.key("path"), out);
    }
    if let Some(r) = &f.url_rewrite {
        path(r.path.as_ref(), &p.key("urlRewrite").key("path"), out);
    }
    if let Some(c) = &f.cors {
        let at = p.key("cors");
        for (list, field) in [
            (&c.allow_origins, "allowOrigins"),
            (&c.allow_methods, "allowMethods"),
            (&c.allow_headers, "allowHeaders"),
        ] {
            if list.len() > 1 && list.iter().any(|s| s == "*") {
                out.error(&at.key(field), "'*' cannot stand beside others");
            }
        }
        let known = |m: &&String| *m != "*" && !METHODS.contains(&m.as_str());
        if let Some(m) = c.allow_methods.iter().find(known) {
            out.error(&at.key("allowMethods"), format!("{m:?} is not a method"));
        }
        if c.max_age.is_some_and(|n| n < 1) {
            out.error(&at.key("maxAge"), "at least 1 second");
        }
    }
    if let Some(a) = &f.external_auth {
        let at = p.key("externalAuth");
        let fits = match a.protocol.as_str() {
            "GRPC" => a.http.is_none(),
            "HTTP" => a.grpc.is_none(),
            _ => false,
        };
        if !fits {
            out.error(
                &at.key("protocol"),
                "protocol GRPC may have grpc, protocol HTTP may have http, and no other is known",
            );
        }
        if let Some(h) = &a.http {
            let at = at.key("http");
            if !h.path.is_empty() {
                super::absolute_path(&h.path, &at.key("path"), out);
            }
            names(&h.allowed_headers, &at.key("allowedHeaders"), out);
            names(&h.allowed_response_headers, &at.key("allowedResponseHeaders"), out);
        }
        if let Some(g) = &a.grpc {
            names(&g.allowed_headers, &at.key("grpc").key("allowedHeaders"), out);
        }
        match &a.backend_ref {
            Some(b) => object(b, &at.key("backendRef"), out),
            None => out.error(&at.key("backendRef"), "a backend is required"),
        }
    }
}

/// A reference that has no share and no filters of its own.
fn object(b: &BackendRef, p: &Path<'_>, out: &mut Findings) {
    backend(b, p, out);
    for (there, field) in [(b.weight.is_some(), "weight"), (!b.filters.is_empty(), "filters")] {
        if there {
            out.error(&p.key(field), "is no field of this reference: it is that of backendRefs");
        }
    }
}

fn names(list: &[String], p: &Path<'_>, out: &mut Findings) {
    count(list.len(), 0, 64, p, out);
    for (i, n) in list.iter().enumerate() {
        common::header_name(n, &p.index(i), out);
    }
}

fn headers(m: &HeaderModifier, p: &Path<'_>, out: &mut Findings) {
    for (list, field) in [(&m.set, "set"), (&m.add, "add")] {
        let at = p.key(field);
        count(list.len(), 0, 16, &at, out);
        for (i, h) in list.iter().enumerate() {
            let at = at.index(i);
            common::header_name(&h.name, &at.key("name"), out);
            if h.value.is_empty() || h.value.bytes().any(|c| c.is_ascii_control() && c != b'\t') {
                out.error(&at.key("value"), "a value without control characters is required");
            }
        }
    }
    count(m.remove.len(), 0, 16, &p.key("remove"), out);
}

fn path(m: Option<&PathModifier>, p: &Path<'_>, out: &mut Findings) {
    let Some(m) = m else { return };
    let fits = match m.modifier_type {
        Some(PathModifierType::ReplaceFullPath) => {
            m.replace_full_path.is_some() && m.replace_prefix_match.is_none()
        }
        Some(PathModifierType::ReplacePrefixMatch) => {
            m.replace_prefix_match.is_some() && m.replace_full_path.is_none()
        }
        None => false,
    };
    if !fits {
        out.error(p, "type ReplaceFullPath needs replaceFullPath alone, ReplacePrefixMatch needs replacePrefixMatch alone");
    }
}

/// Replacing a prefix needs a rule that matches exactly one.
pub(super) fn prefixes(r: &HttpRule, p: &Path<'_>, out: &mut Findings) {
    let replaces = |m: Option<&PathModifier>| m.is_some_and(|m| m.replace_prefix_match.is_some());
    let of = |f: &RouteFilter| {
        replaces(f.request_redirect.as_ref().and_then(|r| r.path.as_ref()))
            || replaces(f.url_rewrite.as_ref().and_then(|r| r.path.as_ref()))
    };
    let prefix = r.matches.is_empty()
        || r.matches.len() == 1
            && r.matches[0]
                .path
                .as_ref()
                .is_none_or(|m| m.match_type.is_none_or(|t| t == PathMatchType::PathPrefix));
    if r.filters.iter().chain(r.backend_refs.iter().flat_map(|b| &b.filters)).any(of) && !prefix {
        out.error(&p.key("matches"), "replacePrefixMatch needs exactly one match, of type PathPrefix");
    }
}

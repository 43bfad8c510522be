//! Authorisers that single routes ask (`externalAuth` of the Gateway API, GEP-1494).
//!
//! Each has a filter of its own that stands in the listener and is off; a route turns on those that it names. So Envoy
//! does the same as our own proxies, and requests of other routes pay nothing. A filter is named after the rule that it is
//! of, so that no rule can ask, or be asked by, what another one says.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use mesh_model::{
    authored::{Authorizer, VirtualService},
    proxy::{
        AuthzService, BodySettings, ExtAuthz, GrpcService, HttpAuthz, HttpFilter, RouteConfiguration,
        StringMatch, other_than,
    },
};

use super::{Ctx, common::cluster_name, http::Scope};
use crate::{config::Doc, hosts};

/// Limit of one question, which the API does not say.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Names of headers of an authoriser's answer that describe this answer, or the way of it: the request that goes on has
/// its own.
const OF_THE_ANSWER: [&str; 12] = [
    "connection",
    "content-*",
    "date",
    "host",
    "keep-alive",
    "proxy-*",
    "server",
    "te",
    "trailer",
    "transfer-*",
    "upgrade",
    "x-envoy-*",
];

/// The filter of an authoriser; `None` if this proxy cannot ask it.
pub(super) fn filter(ctx: &Ctx<'_>, namespace: &str, a: &Authorizer) -> Option<ExtAuthz> {
    // A gRPC library asks nobody.
    if ctx.proxy.grpc {
        return None;
    }
    let entry = ctx.service(&hosts::resolve(&a.destination.host, namespace))?;
    let number = a.destination.port.as_ref().map(|p| p.number);
    let mut ports = entry.service.ports.iter().filter(|p| !p.is_udp());
    let port = match number {
        Some(n) => ports.find(|p| u32::from(p.port) == n)?,
        None => ports.next()?,
    };
    let (host, cluster) = (&entry.service.host, cluster_name(port.port, "", &entry.service.host));
    let shown = a.asks.forward_body.as_ref().map_or(0, |b| b.max_size);
    let grpc = a.asks.protocol == "GRPC";
    let common = ExtAuthz {
        // What the authoriser does not see whole does not pass.
        with_request_body: (shown > 0).then_some(BodySettings {
            max_bytes: shown,
            allow_partial: false,
            pack_as_bytes: grpc,
        }),
        on_routes: a.name.clone(),
        ..ExtAuthz::default()
    };
    if grpc {
        // Calls would fail in HTTP/1.
        if !port.protocol.is_http2() {
            return None;
        }
        let service =
            GrpcService { cluster, authority: host.clone(), timeout: Some(TIMEOUT), metadata: vec![] };
        let of = a.asks.grpc.as_ref();
        return Some(ExtAuthz {
            service: AuthzService::Grpc(service),
            allowed_headers: names(of.map_or(&[], |g| &g.allowed_headers)),
            include_tls_session: true,
            ..common
        });
    }
    let none = mesh_model::authored::gateway_api::HttpAuth::default();
    let of = a.asks.http.as_ref().unwrap_or(&none);
    let upstream = match of.allowed_response_headers.as_slice() {
        [] => other_than(&OF_THE_ANSWER),
        some => names(some),
    };
    let service = HttpAuthz {
        uri: format!("http://{host}"),
        cluster,
        timeout: TIMEOUT,
        path_prefix: of.path.trim_end_matches('/').to_owned(),
        allowed_upstream_headers: upstream,
        ..HttpAuthz::default()
    };
    Some(ExtAuthz {
        service: AuthzService::Http(Box::new(service)),
        allowed_headers: names(&of.allowed_headers),
        ..common
    })
}

fn names(list: &[String]) -> Vec<StringMatch> {
    list.iter().map(|n| StringMatch { ignore_case: true, ..StringMatch::exact(n) }).collect()
}

/// Authorisers that this proxy can ask, of all routes that it may have, by name.
pub(super) fn all(ctx: &Ctx<'_>) -> BTreeMap<String, HttpFilter> {
    let mut out = BTreeMap::new();
    let counts = |d: &&Doc<VirtualService>| {
        (ctx.proxy.router || Scope::Mesh.bound(d)) && ctx.world.shows(ctx.proxy, d)
    };
    for doc in ctx.world.config.virtual_services.iter().filter(counts) {
        for a in doc.spec.http.iter().filter_map(|r| r.extras.as_ref()).flat_map(|e| &e.authorizers) {
            if let Some(f) = filter(ctx, &doc.namespace, a) {
                out.entry(a.name.clone()).or_insert_with(|| HttpFilter::ExtAuthz(Arc::new(f)));
            }
        }
    }
    out
}

/// Their clusters, which no route leads to.
pub(super) fn clusters(ctx: &Ctx<'_>) -> Vec<String> {
    let of = |f: &HttpFilter| match f {
        HttpFilter::ExtAuthz(e) => Some(match &e.service {
            AuthzService::Grpc(g) => g.cluster.clone(),
            AuthzService::Http(h) => h.cluster.clone(),
        }),
        _ => None,
    };
    ctx.authorizers().values().filter_map(of).collect()
}

/// Those of them that these routes name.
pub(super) fn of(ctx: &Ctx<'_>, routes: &RouteConfiguration) -> Vec<HttpFilter> {
    let all = ctx.authorizers();
    if all.is_empty() {
        return vec![];
    }
    let on = routes.virtual_hosts.iter().flat_map(|v| &v.routes).flat_map(|r| &r.filters.authorizers);
    let on: std::collections::BTreeSet<&String> = on.collect();
    on.into_iter().filter_map(|name| all.get(name).cloned()).collect()
}

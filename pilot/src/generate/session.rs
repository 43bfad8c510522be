//! Sessions that stay on a host: of routes of the Gateway API, and of services with Istio's labels.
//!
//! Istio reads the labels if its operator asks for that; here a label is asking enough. What a route says comes before
//! what its first destination has.

use std::sync::Arc;

use mesh_model::{
    authored::{HttpRoute, VirtualService},
    proxy::{HttpFilter, RouteConfiguration, SessionState, StatefulSession},
};

use super::{Ctx, http::Scope};
use crate::{config::Doc, hosts, index::Entry};

/// Label of a service whose sessions stay on a host by a cookie: its name, or `name:path`.
const BY_COOKIE: &str = "istio.io/persistent-session";
/// The same by a header: its name.
const BY_HEADER: &str = "istio.io/persistent-session-header";

/// The session of requests to a service.
pub(super) fn of_service(e: &Entry) -> Option<StatefulSession> {
    let label = |name| e.service.labels.get(name).filter(|v| !v.is_empty());
    let state = match (label(BY_COOKIE), label(BY_HEADER)) {
        (Some(c), _) => {
            let (name, path) = c.split_once(':').unwrap_or((c, "/"));
            // The cookie is forgotten with the browser, as Istio has it.
            SessionState::Cookie { name: name.to_owned(), path: path.to_owned(), ttl: Default::default() }
        }
        (None, Some(h)) => SessionState::Header(h.to_ascii_lowercase()),
        (None, None) => return None,
    };
    Some(StatefulSession { state: Some(state), ..StatefulSession::default() })
}

/// The session of requests that a route takes.
pub(super) fn of_route(ctx: &Ctx<'_>, namespace: &str, r: &HttpRoute) -> Option<StatefulSession> {
    if let Some(s) = r.extras.as_ref().and_then(|e| e.session.as_ref()) {
        return Some(s.clone());
    }
    let first = r.route.first()?.destination.as_ref()?;
    of_service(ctx.service(&hosts::resolve(&first.host, namespace))?)
}

/// The filter that looks for sessions on routes that have them.
pub(super) fn filter() -> HttpFilter {
    HttpFilter::StatefulSession(Arc::default())
}

/// Whether requests that this proxy's workload sends may be of a session.
pub(super) fn any(ctx: &Ctx<'_>) -> bool {
    let of_rule = |d: &Doc<VirtualService>| {
        d.spec.http.iter().any(|r| r.extras.as_ref().is_some_and(|e| e.session.is_some()))
            && Scope::Mesh.bound(d)
            && ctx.world.shows(ctx.proxy, d)
    };
    ctx.world.config.virtual_services.iter().any(of_rule)
        || ctx.reached().iter().any(|e| {
            let labels = &e.service.labels;
            labels.contains_key(BY_COOKIE) || labels.contains_key(BY_HEADER)
        })
}

/// Whether requests on these routes may be.
pub(super) fn any_of(routes: &RouteConfiguration) -> bool {
    routes.virtual_hosts.iter().flat_map(|v| &v.routes).any(|r| r.filters.session.is_some())
}

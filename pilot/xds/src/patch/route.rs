//! Route configurations, virtual hosts and routes.

use envoy_types::pb::envoy::config::route::v3::{Route, RouteConfiguration, VirtualHost, route::Action};
use mesh_model::authored::{ApplyTo, PatchContext, PatchOperation, RouteMatch, RouteMatchAction};

use super::{Did, Patch, Place, Res, list};

/// Port of a route configuration of a sidecar: `9080`, `inbound|9080||`; or of a gateway: `http.80`,
/// `https.443.name.gateway.namespace`. Of the latter also the port's name and the gateway.
fn port(name: &str) -> (u32, &str, Option<String>) {
    let number = |s: &str| s.parse().unwrap_or(0);
    if let Some(rest) = name.strip_prefix("inbound|") {
        return (number(rest.split('|').next().unwrap_or_default()), "", None);
    }
    if let Some(rest) = name.strip_prefix("http.") {
        return (number(rest.split('.').next().unwrap_or_default()), "", None);
    }
    if let Some(rest) = name.strip_prefix("https.") {
        let parts: Vec<&str> = rest.splitn(4, '.').collect();
        if let [n, port, gateway, namespace] = parts[..] {
            return (number(n), port, Some(format!("{namespace}/{gateway}")));
        }
    }
    (number(name), "", None)
}

pub(super) fn is_for(p: &Patch, name: &str, place: &Place<'_>) -> bool {
    let Some(m) = &p.matches.route_configuration else { return true };
    let (number, port_name, gateway) = port(name);
    let of_gateway = place.context != PatchContext::Gateway
        || (m.port_name.is_empty() || m.port_name == port_name)
            && (m.gateway.is_empty() || gateway.as_ref() == Some(&m.gateway));
    (m.name.is_empty() || m.name == name) && (m.port_number == 0 || m.port_number == number) && of_gateway
}

fn is_for_host(p: &Patch, h: &VirtualHost) -> bool {
    let Some(m) = p.matches.route_configuration.as_ref().and_then(|m| m.vhost.as_ref()) else { return true };
    (m.name.is_empty() || m.name == h.name)
        && (m.domain_name.is_empty() || h.domains.contains(&m.domain_name))
}

fn route_match(p: &Patch) -> Option<&RouteMatch> {
    p.matches.route_configuration.as_ref()?.vhost.as_ref()?.route.as_ref()
}

fn is_for_route(m: &RouteMatch, r: &Route) -> bool {
    let action = match (&r.action, m.action) {
        (_, RouteMatchAction::Any) => true,
        (Some(Action::Route(_)), a) => a == RouteMatchAction::Route,
        (Some(Action::Redirect(_)), a) => a == RouteMatchAction::Redirect,
        (Some(Action::DirectResponse(_)), a) => a == RouteMatchAction::DirectResponse,
        _ => true,
    };
    (m.name.is_empty() || m.name == r.name) && action
}

/// Changes a route configuration that the patch is for.
pub(super) fn apply(p: &Patch, c: &mut RouteConfiguration, place: &Place<'_>) -> Res {
    if !is_for(p, &c.name, place) {
        return Ok(Did::Nothing);
    }
    match (p.to, p.operation) {
        (ApplyTo::RouteConfiguration, _) => {
            p.merge(c)?;
            Ok(Did::Changed)
        }
        (ApplyTo::VirtualHost, PatchOperation::Add) => {
            c.virtual_hosts.push(p.made()?);
            Ok(Did::Changed)
        }
        _ => {
            let mut all = Did::Nothing;
            let mut kept = Vec::with_capacity(c.virtual_hosts.len());
            for mut h in std::mem::take(&mut c.virtual_hosts) {
                match virtual_host(p, &mut h)? {
                    Did::Removed => all = Did::Changed,
                    Did::Changed => {
                        all = Did::Changed;
                        kept.push(h);
                    }
                    Did::Nothing => kept.push(h),
                }
            }
            c.virtual_hosts = kept;
            Ok(all)
        }
    }
}

/// Changes a virtual host, if the patch is for it.
pub(super) fn virtual_host(p: &Patch, h: &mut VirtualHost) -> Res {
    if !is_for_host(p, h) {
        return Ok(Did::Nothing);
    }
    if p.to == ApplyTo::HttpRoute {
        return routes(p, h);
    }
    match p.operation {
        PatchOperation::Remove => return Ok(Did::Removed),
        PatchOperation::Replace => *h = p.made()?,
        _ if p.merges() => p.merge(h)?,
        _ => return Ok(Did::Nothing),
    }
    Ok(Did::Changed)
}

fn routes(p: &Patch, h: &mut VirtualHost) -> Res {
    let m = route_match(p);
    let is_for = |r: &Route| m.is_none_or(|m| is_for_route(m, r));
    let before = h.routes.len();
    match p.operation {
        PatchOperation::Remove => {
            h.routes.retain(|r| !is_for(r));
            return Ok(if h.routes.len() < before { Did::Changed } else { Did::Nothing });
        }
        _ if p.merges() => {
            let mut did = Did::Nothing;
            for r in h.routes.iter_mut().filter(|r| is_for(r)) {
                p.merge(r)?;
                did = Did::Changed;
            }
            return Ok(did);
        }
        // Where no route is the one, there is no place.
        PatchOperation::InsertFirst if m.is_some() && !h.routes.iter().any(is_for) => {
            return Ok(Did::Nothing);
        }
        _ => {}
    }
    let matched: Option<&dyn Fn(&Route) -> bool> = if m.is_some() { Some(&is_for) } else { None };
    list::change(&mut h.routes, p.operation, matched, || p.made(), <[Route]>::len)
}

//! Route configurations of gateways: one virtual host per host of a bound `VirtualService` that a
//! server serves. Several documents for one host are concatenated by age, with routes that match
//! everything at the end.

use std::collections::{BTreeMap, BTreeSet};

use mesh_model::proxy::{Route, RouteConfiguration, RouteMatch};

use super::{
    Ctx,
    gateway::{self, Served},
    http::{self, Scope},
    routes::{Domains, virtual_host},
};
use crate::hosts;

struct Host {
    routes: Vec<Route>,
    /// Match everything; at most the first is ever reached.
    last: Vec<Route>,
    require_tls: bool,
}

pub(super) fn generate(ctx: &Ctx<'_>, name: &str, port: u16, servers: &[Served<'_>]) -> RouteConfiguration {
    let mut found: BTreeMap<String, Host> = BTreeMap::new();
    for s in servers {
        let own = BTreeSet::from([s.key()]);
        let scope = Scope::Gateways(&own);
        let redirect = s.server.tls.as_ref().is_some_and(|t| t.https_redirect);
        for (doc, vs_hosts) in ctx.world.virtual_services() {
            if doc.spec.http.is_empty() || !scope.bound(doc) || !ctx.world.shows(ctx.proxy, doc) {
                continue;
            }
            let served: Vec<&String> = vs_hosts
                .iter()
                .filter(|h| {
                    s.hosts().any(|(ns, own)| {
                        let ns_ok = match ns {
                            "*" => true,
                            "." => doc.namespace == s.gateway.namespace,
                            other => doc.namespace == other,
                        };
                        ns_ok && hosts::overlaps(own, h)
                    })
                })
                .collect();
            if served.is_empty() {
                continue;
            }
            let routes = http::routes(ctx, doc, port, scope);
            for h in served {
                // Of a wildcard host and an exact server, the narrower is what is served.
                let domain = s
                    .hosts()
                    .map(|(_, own)| own)
                    .find(|own| h.starts_with('*') && hosts::covers(h, own))
                    .map_or_else(|| h.clone(), |own| own.to_ascii_lowercase());
                let host = found.entry(domain).or_insert_with(|| Host {
                    routes: vec![],
                    last: vec![],
                    require_tls: false,
                });
                host.require_tls |= redirect;
                for r in &routes {
                    let all = r.matches == RouteMatch::any();
                    let list = if all { &mut host.last } else { &mut host.routes };
                    if !list.contains(r) {
                        list.push(r.clone());
                    }
                }
            }
        }
        // A redirect needs no route behind it.
        if redirect {
            for (_, h) in s.hosts() {
                found
                    .entry(h.to_ascii_lowercase())
                    .or_insert_with(|| Host { routes: vec![], last: vec![], require_tls: true })
                    .require_tls = true;
            }
        }
    }
    let http3 = servers.iter().any(|s| gateway::has_http3(ctx, s));
    let mut taken = Domains::default();
    let mut virtual_hosts = Vec::new();
    for (host, h) in found {
        let wanted =
            if host == "*" { vec![host.clone()] } else { vec![host.clone(), format!("{host}:{port}")] };
        let domains = taken.claim(wanted);
        if domains.is_empty() {
            continue;
        }
        let mut routes = h.routes;
        routes.extend(h.last.into_iter().take(1));
        let mut v = virtual_host(ctx, format!("{host}:{port}"), domains, routes);
        v.require_tls = h.require_tls;
        if http3 {
            // For a day, as Istio says it: a client that finds no way for UDP comes back over TCP (RFC 7838).
            v.response_headers.set.push(("alt-svc".to_owned(), format!("h3=\":{port}\"; ma=86400")));
        }
        virtual_hosts.push(v);
    }
    RouteConfiguration { name: name.to_owned(), virtual_hosts, on_demand: None }
}

//! Applies the patches of `EnvoyFilter` documents to what was generated. A proxy without any is not looked at.
//!
//! Envoy gets the patched message; our own proxies get what their decoder makes of it, so that everything that is made
//! of their configuration afterwards knows it too.

use std::{collections::HashMap, net::IpAddr};

use mesh_model::{
    authored::PatchContext,
    proxy::{RouteConfiguration, VirtualHost},
};
use mesh_xds::{
    patch::{self, Extensions, Made, Outcome, Patch, Place, Taken},
    type_url::{CDS, LDS, RDS},
};

use super::{
    Ctx, Generated,
    common::{BY_NAME, INBOUND_PASSTHROUGH},
};

/// Who has a domain, of one route configuration.
#[derive(Debug, Default)]
struct Owners(HashMap<String, String>);

impl Owners {
    fn claim(&mut self, h: &VirtualHost) {
        for d in &h.domains {
            self.0.insert(d.to_ascii_lowercase(), h.name.clone());
        }
    }
}

impl Taken for Owners {
    fn by(&self, domain: &str, host: &str) -> Option<String> {
        self.0.get(domain).filter(|owner| *owner != host).cloned()
    }
}

/// Patches what a part of a proxy's configuration consists of.
pub(super) fn apply(ctx: &Ctx<'_>, out: &mut Generated) {
    if ctx.proxy.filters.is_empty() {
        return;
    }
    let patches: Vec<&Patch> = ctx.proxy.filters.patches().collect();
    clusters(ctx, &patches, out);
    listeners(ctx, &patches, out);
    routes(ctx, &patches, out);
}

fn outside(ctx: &Ctx<'_>) -> PatchContext {
    if ctx.proxy.router { PatchContext::Gateway } else { PatchContext::SidecarOutbound }
}

fn whose(ctx: &Ctx<'_>) -> &'static str {
    if ctx.proxy.flotilla { "of our own proxies" } else { "of Envoy" }
}

/// What became of a resource, in its place. True if it is gone.
fn settle<M>(
    ctx: &Ctx<'_>,
    out: &mut Generated,
    t: &'static str,
    name: &str,
    what: &str,
    o: Outcome<M>,
    put: impl FnOnce(&mut Generated, M),
) -> bool {
    for (at, why) in &o.refused {
        ctx.proxy.filters.refuse(*at, &format!("{what} {name} {}", whose(ctx)), why, &mut out.refused);
    }
    match o.made {
        Made::Same => {}
        Made::Model(m) => put(out, m),
        Made::Wire(any, version) => drop(out.wire.insert((t, name.to_owned()), (any, version))),
        Made::Removed => return true,
    }
    false
}

fn clusters(ctx: &Ctx<'_>, patches: &[&Patch], out: &mut Generated) {
    for c in out.clusters.values().cloned().collect::<Vec<_>>() {
        let inbound = c.name.strip_prefix("inbound|");
        let services = inbound.map(|rest| served(ctx, rest)).unwrap_or_default();
        let context = match inbound {
            _ if ctx.proxy.router => PatchContext::Gateway,
            None if c.name != INBOUND_PASSTHROUGH => PatchContext::SidecarOutbound,
            _ => PatchContext::SidecarInbound,
        };
        let place = Place { context, services: &services, taken: None };
        let o = patch::cluster(&c, &place, patches, ctx.proxy.flotilla);
        let put = |out: &mut Generated, m| drop(out.clusters.insert(c.name.clone(), m));
        if settle(ctx, out, CDS, &c.name, "cluster", o, put) {
            out.clusters.remove(&c.name);
        }
    }
}

/// Services that an inbound cluster is of: its name tells only the port.
fn served(ctx: &Ctx<'_>, rest: &str) -> Vec<String> {
    let port = rest.split('|').next().and_then(|p| p.parse::<u16>().ok());
    let instances = ctx.world.index.instances(&ctx.proxy.addresses).into_iter();
    instances.filter(|(_, e)| Some(e.port) == port).map(|(e, _)| e.service.host.clone()).collect()
}

fn listeners(ctx: &Ctx<'_>, patches: &[&Patch], out: &mut Generated) {
    let extensions = Extensions::of(patches.iter().copied());
    for l in out.listeners.values().cloned().collect::<Vec<_>>() {
        let place = Place { context: patch::context(ctx.proxy.router, l.direction), ..Place::default() };
        let ours = ctx.proxy.flotilla.then_some(&extensions);
        let o = patch::listener(&l, &place, patches, ours);
        let put = |out: &mut Generated, m| drop(out.listeners.insert(l.name.clone(), m));
        if settle(ctx, out, LDS, &l.name, "listener", o, put) {
            out.listeners.remove(&l.name);
        }
    }
}

fn routes(ctx: &Ctx<'_>, patches: &[&Patch], out: &mut Generated) {
    let context = outside(ctx);
    for r in out.routes.values().cloned().collect::<Vec<_>>() {
        let prefix = format!("{}/", r.name);
        let apart = out.hosts.range(prefix.clone()..).take_while(|(n, _)| n.starts_with(&prefix));
        let apart: Vec<(String, VirtualHost)> = apart.map(|(n, h)| (n.clone(), h.clone())).collect();
        let mut owners = Owners::default();
        apart.iter().for_each(|(_, h)| owners.claim(h));
        let place = Place { context, services: &[], taken: Some(&owners) };
        let o = patch::routes(&r, &place, patches, ctx.proxy.flotilla);
        let put = |out: &mut Generated, m| drop(out.routes.insert(r.name.clone(), m));
        // Nothing removes a route configuration.
        settle(ctx, out, RDS, &r.name, "routes", o, put);
        let now: Option<&RouteConfiguration> = out.routes.get(&r.name);
        now.into_iter().flat_map(|r| &r.virtual_hosts).for_each(|h| owners.claim(h));
        for (name, h) in apart {
            let place = Place { context, services: &[], taken: Some(&owners) };
            let o = patch::virtual_host(&h, &r.name, &place, patches);
            if let Made::Model(m) = &o.made {
                owners.claim(m);
            }
            let put = |out: &mut Generated, m| drop(out.hosts.insert(name.clone(), m));
            if settle(ctx, out, RDS, &name, "virtual host", o, put) {
                out.hosts.remove(&name);
            }
        }
    }
}

/// Whether a name is one that generators give, which what is added must not take.
fn is_ours(name: &str) -> bool {
    let (ip, port) = name.rsplit_once('_').unwrap_or_default();
    name.is_empty()
        || [
            "virtualInbound",
            "virtualOutbound",
            "BlackHoleCluster",
            "PassthroughCluster",
            BY_NAME,
            INBOUND_PASSTHROUGH,
        ]
        .contains(&name)
        || ["inbound|", "outbound|", "outbound_.", "udp_"].iter().any(|p| name.starts_with(p))
        || ip.parse::<IpAddr>().is_ok() && port.parse::<u16>().is_ok()
}

/// Adds what patches add whole.
pub(super) fn add(ctx: &Ctx<'_>, out: &mut Generated) {
    if ctx.proxy.filters.is_empty() {
        return;
    }
    let sides: &[PatchContext] = if ctx.proxy.router {
        &[PatchContext::Gateway]
    } else {
        &[PatchContext::SidecarInbound, PatchContext::SidecarOutbound]
    };
    let all: Vec<&Patch> = ctx.proxy.filters.patches().collect();
    let extensions = Extensions::of(all.iter().copied());
    for (at, p) in all.iter().enumerate() {
        let Some((t, name)) = sides.iter().find_map(|s| p.adds(*s)) else { continue };
        let known = out.wire.contains_key(&(t, name.to_owned()))
            || t == LDS && out.listeners.contains_key(name)
            || t == CDS && out.clusters.contains_key(name);
        let done = if is_ours(name) || known {
            Err("name: is empty, or of the kind that the mesh gives, or another's; choose another".to_owned())
        } else if !ctx.proxy.flotilla {
            p.added().map(|made| drop(out.wire.insert((t, name.to_owned()), made)))
        } else if t == LDS {
            p.added_listener(&extensions).map(|l| out.listener(l))
        } else if t == CDS {
            p.added_cluster().map(|c| out.cluster(c))
        } else {
            // In place in the listeners that refer to it.
            Ok(())
        };
        if let Err(why) = done {
            ctx.proxy.filters.refuse(at, &format!("what is added {}", whose(ctx)), &why, &mut out.refused);
        }
    }
}

//! Why a request goes where it goes, or does not: the generators asked about one caller and one destination.
//!
//! Everything is read from the same world and made by the same code as what proxies get, so an explanation cannot
//! differ from the configuration. What only the network can tell (gateways, workloads) is found out elsewhere.

mod policy;

use std::collections::BTreeMap;

use mesh_model::{
    ClusterId,
    authored::{ClientTlsMode, MutualTlsMode},
    explain::{Step, Target, Way},
    federation::{LeaseState, OnLapse},
    proxy::{
        AbortKind, LbEndpoint, LoadAssignment, PathMatch, Route, RouteAction, RouteMatch, WeightedCluster,
    },
    registry::{Health, Labels, ServicePort, TlsMode},
};

pub use self::policy::{Request, readable};
use super::{
    Ctx,
    common::{PASSTHROUGH, cluster_name, member_sni},
    endpoints::{self, CLUSTER_LABEL},
    find, routes, udp,
};
use crate::{
    config::selects,
    exports, hosts,
    index::{Entry, Origin},
    proxy::{Interception, ProxyNode},
    world::{World, effective_policy},
};

/// Explains the way from a proxy to `to`, a host with an optional port, as far as this cluster knows it.
#[must_use]
pub fn outbound(proxy: &ProxyNode, world: &World, to: &str, request: &Request) -> Way {
    let ctx = Ctx::new(proxy, world);
    let principal = principal(world, &proxy.namespace, &proxy.service_account);
    let mut way = Way { steps: vec![], principal, host: String::new(), local: false, targets: vec![] };
    // A broken step ends the walk; what is known until then stays.
    let _ = walk(&ctx, to, request, &mut way);
    way
}

fn principal(world: &World, namespace: &str, account: &str) -> String {
    let account = if account.is_empty() { "default" } else { account };
    mesh_model::SpiffeId::workload(&world.settings.trust_domain, namespace, account)
        .map(|id| id.as_str().to_owned())
        .unwrap_or_default()
}

/// The walk has ended at a broken step.
struct Ended;

fn stop(way: &mut Way, step: &str, says: String, fix: impl Into<String>) -> Ended {
    way.steps.push(Step::broken(step, says, fix));
    Ended
}

fn walk(ctx: &Ctx<'_>, to: &str, request: &Request, way: &mut Way) -> Result<(), Ended> {
    // A URL may end so as well, and then it is a path.
    let datagrams = to.strip_suffix("/udp").filter(|t| !t.contains('/'));
    let (host, port) = split(datagrams.unwrap_or(to));
    let entry = name(ctx, host, way)?;
    let port = service_port(entry, port, datagrams.is_some(), way)?;
    let s = &entry.service;
    let clusters = if port.is_udp() {
        captured(ctx, way)?;
        vec![WeightedCluster::only(udp::cluster_name(port.port, &s.host))]
    } else if port.protocol.is_http() {
        route(ctx, entry, port, request, way)?
    } else {
        vec![WeightedCluster::only(cluster_name(port.port, "", &s.host))]
    };
    for to in &clusters {
        destination(ctx, to, request, way)?;
    }
    Ok(())
}

/// `host[:port]`, of which a URL may be what the user has at hand.
fn split(to: &str) -> (&str, Option<u16>) {
    let (scheme, rest) = to.split_once("://").map_or(("", to), |(s, r)| (s, r));
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let implied = match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    };
    match authority.rsplit_once(':').and_then(|(h, p)| Some((h, p.parse().ok()?))) {
        Some((host, port)) => (host, Some(port)),
        None => (authority, implied),
    }
}

fn name<'a>(ctx: &Ctx<'a>, host: &str, way: &mut Way) -> Result<&'a Entry, Ended> {
    let world = ctx.world;
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let tries = hosts::searched(&host, &ctx.proxy.namespace);
    let Some(entry) = tries.iter().find_map(|h| world.index.get(h)) else {
        way.host.clone_from(&tries[0]);
        return Err(unknown(ctx, &host, &tries[0], way));
    };
    way.host.clone_from(&entry.service.host);
    if find(ctx.visible(), &entry.service.host).is_none() {
        let says = format!("{} is not visible to namespace {}", entry.service.host, ctx.proxy.namespace);
        let fix = if world.is_bounded(entry) {
            "serviceEntryVisibility of MeshConfig bounds who sees it".to_owned()
        } else if world.offers(ctx.proxy, entry) {
            let sidecar = world.sidecar(ctx.proxy).map(|s| format!("{}/{}", s.namespace, s.name));
            format!(
                "add {}/{} to egress.hosts of Sidecar {}",
                entry.service.namespace,
                entry.service.host,
                sidecar.unwrap_or_default()
            )
        } else {
            format!("add {:?} or \"*\" to exportTo of the service", ctx.proxy.namespace)
        };
        return Err(stop(way, "name", says, fix));
    }
    let of = match entry.origin {
        Origin::Platform => "a service of this cluster",
        Origin::Entry => "a ServiceEntry",
        Origin::Consul => "a service of Consul",
        Origin::Imported => "imported",
        Origin::Member => "one member's part of a service",
    };
    let addresses: Vec<String> = entry.service.addresses.iter().map(ToString::to_string).collect();
    let from: Vec<&str> = entry.imports.iter().map(|i| i.cluster.as_str()).collect();
    let from = if from.is_empty() { String::new() } else { format!(", exported by {}", from.join(", ")) };
    way.steps
        .push(Step::ok("name", format!("{} ({}) is {of}{from}", entry.service.host, addresses.join(", "))));
    Ok(entry)
}

fn unknown(ctx: &Ctx<'_>, given: &str, host: &str, way: &mut Way) -> Ended {
    let world = ctx.world;
    let label = given.split('.').next().unwrap_or_default();
    let elsewhere: Vec<&str> = world
        .index
        .services
        .values()
        .filter(|e| e.service.name == label && e.origin != Origin::Member)
        .map(|e| e.service.host.as_str())
        .take(3)
        .collect();
    let member = host.strip_suffix(".clusterset.local").and_then(|h| h.rsplit('.').next());
    let known = |m: &str| {
        m == "svc"
            || m == world.settings.cluster.as_str()
            || world.config.peers.iter().any(|p| p.id.as_str() == m)
    };
    if let Some(m) = member.filter(|m| !known(m)) {
        let says = format!("{m} is not a member of the mesh");
        return stop(way, "name", says, "`flotilla clusters` lists the members");
    }
    let in_mesh = host.ends_with(".local") || host.ends_with(".global") || !given.contains('.');
    if !elsewhere.is_empty() {
        let fix = format!("did you mean {}?", elsewhere.join(" or "));
        return stop(way, "name", format!("nothing is called {host}"), fix);
    }
    if in_mesh {
        let namespace = host.split('.').nth(1).unwrap_or(&ctx.proxy.namespace);
        let says = format!("no Service {label} in {namespace} here, and no member exports one");
        let fix = format!(
            "in the cluster that runs it, apply a ServiceExport named {label} in namespace {namespace}; `flotilla \
             clusters` lists the members"
        );
        return stop(way, "name", says, fix);
    }
    if let Some(to) = ctx.undeclared() {
        let says = if ctx.names_undeclared() {
            format!(
                "{host} is not known to the mesh: requests go where its name leads, all else passes through, without policy"
            )
        } else if to == PASSTHROUGH {
            format!("{host} is not known to the mesh: traffic passes through without policy")
        } else {
            format!("{host} is not known to the mesh: traffic goes to the egressProxy, {to}")
        };
        way.steps.push(Step::warning("name", says, "a ServiceEntry makes it known"));
        return Ended;
    }
    let says = format!("{host} is not known, and outboundTrafficPolicy is REGISTRY_ONLY");
    stop(way, "name", says, "declare it with a ServiceEntry")
}

/// Whether the caller's datagrams get to its proxy at all.
fn captured(ctx: &Ctx<'_>, way: &mut Way) -> Result<(), Ended> {
    if !ctx.proxy.flotilla {
        let says = "the caller's proxy is not Flotilla's, which alone takes datagrams".to_owned();
        return Err(stop(way, "capture", says, "give the workload a `flotilla sidecar`"));
    }
    if ctx.proxy.interception != Interception::Tproxy {
        let says = "the caller's datagrams are not captured: its proxy is not started for TPROXY".to_owned();
        let fix = "`flotilla iptables --mode TPROXY --udp-ranges RANGES`, and `flotilla sidecar --meta \
                   INTERCEPTION_MODE=TPROXY`";
        return Err(stop(way, "capture", says, fix));
    }
    let says = "TPROXY; whether --udp-ranges has the service's address only the workload knows".to_owned();
    way.steps.push(Step::ok("capture", says));
    Ok(())
}

fn service_port<'e>(
    entry: &'e Entry,
    port: Option<u16>,
    datagrams: bool,
    way: &mut Way,
) -> Result<&'e ServicePort, Ended> {
    let s = &entry.service;
    let listed = || {
        let all: Vec<_> =
            s.ports.iter().chain(&entry.udp_ports).map(|p| format!("{} ({})", p.port, p.name)).collect();
        all.join(", ")
    };
    let Some(number) = port else {
        let first = s.ports.iter().find(|p| p.protocol.is_http()).or(s.ports.first());
        let Some(p) = first.filter(|_| !datagrams).or(entry.udp_ports.first()) else {
            return Err(stop(way, "port", "the service has no ports".into(), "add a port to it"));
        };
        let only =
            if s.ports.len() + entry.udp_ports.len() == 1 { "the only one" } else { "taken from its ports" };
        way.steps.push(Step::ok("port", format!("{} ({:?}), {only}", p.port, p.protocol)));
        return Ok(p);
    };
    // What a number means is said where it is one of both kinds.
    let tcp = entry.port(number).filter(|_| !datagrams);
    match tcp.or_else(|| entry.udp_port(number)) {
        Some(p) => {
            way.steps.push(Step::ok("port", format!("{number} ({}, {:?})", p.name, p.protocol)));
            Ok(p)
        }
        None => {
            let kind = if datagrams { " of UDP" } else { "" };
            let says = format!("{} has no port {number}{kind}", s.host);
            Err(stop(way, "port", says, format!("its ports are {}", listed())))
        }
    }
}

/// Whether a route takes the request; `None` if that depends on what was not given.
fn takes(m: &RouteMatch, request: &Request) -> Option<bool> {
    let path = request.path.split('?').next().unwrap_or_default();
    let (given, fold) =
        if m.case_sensitive { (path.to_owned(), false) } else { (path.to_ascii_lowercase(), true) };
    let wanted = |p: &str| if fold { p.to_ascii_lowercase() } else { p.to_owned() };
    let by_path = match &m.path {
        PathMatch::Prefix(p) => given.starts_with(&wanted(p)),
        PathMatch::Exact(p) => given == wanted(p),
        PathMatch::SegmentPrefix(p) => {
            given.strip_prefix(&wanted(p)).is_some_and(|r| r.is_empty() || r.starts_with('/'))
        }
        PathMatch::Regex(r) => regex::Regex::new(&format!("^(?:{r})$")).is_ok_and(|r| r.is_match(path)),
        PathMatch::Connect => false,
    };
    if !by_path {
        return Some(false);
    }
    (m.headers.is_empty() && m.query.is_empty()).then_some(true)
}

fn route(
    ctx: &Ctx<'_>,
    entry: &Entry,
    port: &ServicePort,
    request: &Request,
    way: &mut Way,
) -> Result<Vec<WeightedCluster>, Ended> {
    let all = routes::single(ctx, entry, port.port);
    let routes: &[Route] = all.virtual_hosts.first().map(|v| v.routes.as_slice()).unwrap_or_default();
    let conditional = routes.iter().take_while(|r| takes(&r.matches, request) != Some(true));
    let conditional = conditional.filter(|r| takes(&r.matches, request).is_none()).count();
    let taken = routes.iter().find(|r| takes(&r.matches, request) == Some(true));
    let doc = ctx.routes_of(entry);
    let by =
        doc.map_or("no VirtualService".to_owned(), |d| format!("VirtualService {}/{}", d.namespace, d.name));
    let Some(r) = taken else {
        let says = if conditional > 0 {
            format!("no route of {by} takes {} without further headers or query parameters", request.path)
        } else {
            format!("no route of {by} takes {}: the answer is 404", request.path)
        };
        return Err(stop(way, "route", says, "add a route without match at the end, or explain with --path"));
    };
    if let Some((kind, ppm)) = r.fault.as_ref().and_then(|f| f.abort) {
        let answer = match kind {
            AbortKind::Http(s) => format!("status {s}"),
            AbortKind::Grpc(s) => format!("gRPC status {s}"),
        };
        let says = format!("{by} aborts {} % of requests with {answer}", f64::from(ppm) / 10_000.0);
        let fix = format!("remove fault.abort from {by}");
        if ppm >= 1_000_000 {
            return Err(stop(way, "route", says, fix));
        }
        way.steps.push(Step::warning("route", says, fix));
    }
    match &r.action {
        RouteAction::Forward(f) => {
            let total: u64 = f.clusters.iter().map(|c| u64::from(c.weight)).sum::<u64>().max(1);
            let to: Vec<_> = f
                .clusters
                .iter()
                .filter(|c| c.weight > 0)
                .map(|c| format!("{} % {}", u64::from(c.weight) * 100 / total, c.cluster))
                .collect();
            let timeout =
                f.timeout.filter(|t| !t.is_zero()).map_or(String::new(), |t| format!(", timeout {t:?}"));
            let more = if conditional > 0 {
                format!("; {conditional} routes before it want headers or query parameters")
            } else {
                String::new()
            };
            way.steps.push(Step::ok("route", format!("{by}: {}{timeout}{more}", to.join(", "))));
            Ok(f.clusters.iter().filter(|c| c.weight > 0).cloned().collect())
        }
        RouteAction::Redirect(_) => {
            way.steps.push(Step::warning("route", format!("{by} answers with a redirect"), ""));
            Err(Ended)
        }
        RouteAction::Direct(d) => {
            let says = format!("{by} answers {} itself", d.status);
            if d.status >= 400 {
                return Err(stop(way, "route", says, format!("remove directResponse from {by}")));
            }
            way.steps.push(Step::warning("route", says, ""));
            Err(Ended)
        }
    }
}

/// `outbound|9080|v1|host`, or `outbound|53/udp||host`.
fn parse(cluster: &str) -> Option<(u16, bool, &str, &str)> {
    let mut it = cluster.split('|').skip(1);
    let (port, subset, host) = (it.next()?, it.next()?, it.next()?);
    let (number, udp) = port.strip_suffix("/udp").map_or((port, false), |p| (p, true));
    Some((number.parse().ok()?, udp, subset, host))
}

fn destination(ctx: &Ctx<'_>, to: &WeightedCluster, request: &Request, way: &mut Way) -> Result<(), Ended> {
    let Some((number, udp, subset, host)) = parse(&to.cluster) else { return Ok(()) };
    let Some(entry) = ctx.service(host) else {
        let says = format!("the route leads to {host}, which is not known or not visible here");
        return Err(stop(way, "route", says, "correct destination.host, or export the service"));
    };
    let found = if udp { entry.udp_port(number) } else { entry.port(number) };
    let Some(port) = found else {
        let says = format!("the route leads to port {number} of {host}, which has no such port");
        return Err(stop(way, "route", says, "correct destination.port.number"));
    };
    let rule = ctx.world.destination_rule(ctx.proxy, entry);
    let rule = rule.as_deref();
    let chosen = rule.and_then(|r| r.subsets.iter().find(|s| s.name == subset));
    if !subset.is_empty() && chosen.is_none() {
        let says = format!("the route leads to subset {subset} of {host}, which no DestinationRule defines");
        return Err(stop(
            way,
            "route",
            says,
            format!("add subset {subset} to the DestinationRule of {host}"),
        ));
    }
    let none = Labels::new();
    let labels = chosen.map_or(&none, |s| &s.labels);
    let policy = effective_policy(rule, chosen, number);
    let a = endpoints::assignment(ctx, entry, port, labels, &to.cluster, &policy);
    let (local, remote) = shares(&a);
    let total = local + remote.values().sum::<f64>();
    if total == 0.0 {
        return Err(nowhere(ctx, entry, port, labels, subset, way));
    }
    let own = entry.endpoints_of(port, labels).filter(|e| e.health == Health::Healthy);
    let own: Vec<_> = own.collect();
    let (mut says, mut without) = (vec![], vec![]);
    if local > 0.0 {
        says.push(format!("{} here ({:.0} %)", own.len(), local / total * 100.0));
    }
    for i in &entry.imports {
        let lapsed = i.lease == LeaseState::Lapsed;
        if lapsed && i.on_lapse == OnLapse::Refuse {
            says.push(format!("{} lapsed, and not used while it is", i.cluster));
            continue;
        }
        let share = remote.get(i.cluster.as_str()).copied().unwrap_or_default() / total * 100.0;
        let offers: u32 = groups(i, labels).map(|g| g.healthy_weight).sum();
        let serves = i.service.ports.iter().any(|p| p.is_same(port));
        if offers == 0 || !serves {
            says.push(format!("none in {}", i.cluster));
            continue;
        }
        says.push(format!("{} {} ({share:.0} %)", i.cluster, if lapsed { "lapsed" } else { "live" }));
        if udp && !ctx.world.has_trunk(&i.cluster) {
            without.push(i.cluster.to_string());
            continue;
        }
        way.targets.push(Target {
            cluster: i.cluster.to_string(),
            lapsed,
            share,
            sni: member_sni(
                number,
                subset,
                &entry.service.name,
                &entry.service.namespace,
                i.cluster.as_str(),
            ),
            identities: i.service.service_accounts.clone(),
            name: entry.service.name.clone(),
            namespace: entry.service.namespace.clone(),
            port: number,
            udp,
            subset: subset.to_owned(),
        });
    }
    way.steps.push(Step::ok("endpoints", format!("{}: {}", to.cluster, says.join(", "))));
    if !without.is_empty() {
        let says = format!("UDP needs the QUIC trunk, which there is not to {}", without.join(", "));
        let fix = "start both control planes with --transport quic,tcp, and all gateways with --trunk";
        if local == 0.0 && way.targets.is_empty() {
            return Err(stop(way, "transport", says, fix));
        }
        way.steps.push(Step::warning("transport", says, fix));
    }
    if local == 0.0 {
        return Ok(());
    }
    way.local = true;
    let off = policy.tls.as_ref().is_some_and(|t| t.mode == ClientTlsMode::Disable);
    if off
        && let Some(e) =
            own.iter().find(|e| ctx.world.mtls_mode_of(&entry.service.namespace, e) == MutualTlsMode::Strict)
    {
        let says = format!(
            "a DestinationRule turns mTLS off towards {host}, and PeerAuthentication of {} is STRICT",
            e.workload.as_deref().unwrap_or(&e.address)
        );
        return Err(stop(way, "mtls", says, "remove tls.mode DISABLE from the DestinationRule"));
    }
    let caller = way.principal.clone();
    let here = ctx.world.settings.cluster.as_str();
    let plain = off || own.iter().all(|e| e.tls != TlsMode::Mutual);
    let from = if plain { None } else { Some((caller.as_str(), here)) };
    let step = policy::step(ctx, entry, port, labels, from, request);
    let broken = step.is_broken();
    way.steps.push(step);
    if broken { Err(Ended) } else { Ok(()) }
}

fn groups<'a>(
    i: &'a mesh_model::federation::ImportedService,
    labels: &'a Labels,
) -> impl Iterator<Item = &'a mesh_model::federation::EndpointGroup> {
    i.service.groups.iter().filter(move |g| selects(labels, &g.labels))
}

/// Weight of the first priority: local, and by member.
fn shares(a: &LoadAssignment) -> (f64, BTreeMap<String, f64>) {
    let usable = |e: &&LbEndpoint| e.health == mesh_model::proxy::EndpointHealth::Healthy;
    let first =
        a.localities.iter().filter(|l| l.endpoints.iter().any(|e| usable(&e))).map(|l| l.priority).min();
    let mut local = 0.0;
    let mut remote: BTreeMap<String, f64> = BTreeMap::new();
    for l in a.localities.iter().filter(|l| Some(l.priority) == first) {
        let own: f64 = l.endpoints.iter().map(|e| f64::from(e.weight)).sum::<f64>().max(1.0);
        for e in l.endpoints.iter().filter(usable) {
            let weight = if l.weight > 0 {
                f64::from(l.weight) * f64::from(e.weight) / own
            } else {
                f64::from(e.weight)
            };
            match e.transport_labels.get(CLUSTER_LABEL) {
                None => local += weight,
                Some(c) => *remote.entry(c.clone()).or_default() += weight,
            }
        }
    }
    (local, remote)
}

/// Why a service has no endpoints.
fn nowhere(
    ctx: &Ctx<'_>,
    entry: &Entry,
    port: &ServicePort,
    labels: &Labels,
    subset: &str,
    way: &mut Way,
) -> Ended {
    let host = &entry.service.host;
    let of = if subset.is_empty() { host.clone() } else { format!("subset {subset} of {host}") };
    let here: Vec<_> = entry.endpoints_of(port, labels).collect();
    let offered: u32 = entry.imports.iter().flat_map(|i| groups(i, labels)).map(|g| g.healthy_weight).sum();
    if offered > 0 && ctx.world.index.east_west.is_empty() {
        let says = format!("members serve {of}, and this cluster has no east-west gateway to reach them");
        return stop(
            way,
            "endpoints",
            says,
            "start `flotilla gateway` and give its address to the control plane with --gateway-internal",
        );
    }
    if let Some(e) = here.first() {
        let states: Vec<_> = here
            .iter()
            .map(|e| format!("{} {:?}", e.workload.as_deref().unwrap_or(&e.address), e.health))
            .take(3)
            .collect();
        if here.iter().all(|e| e.health != Health::Healthy) {
            let says =
                format!("none of the {} endpoints of {of} is healthy: {}", here.len(), states.join(", "));
            return stop(way, "endpoints", says, "look at the workload's readiness");
        }
        let says = format!("endpoints of {of} are in network {:?}, which cannot be reached", e.network);
        return stop(way, "endpoints", says, "correct the network of the endpoint");
    }
    if !labels.is_empty() {
        let wanted: Vec<_> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
        let says = format!("no workload of {host} has the labels of subset {subset}: {}", wanted.join(","));
        return stop(way, "endpoints", says, "correct the labels of the subset, or deploy such a workload");
    }
    let empty: Vec<_> = entry.imports.iter().map(|i| i.cluster.to_string()).collect();
    let says = if empty.is_empty() {
        format!("{of} has no endpoints")
    } else {
        format!("{of} has no healthy endpoint here nor in {}", empty.join(", "))
    };
    let fix = if empty.is_empty() {
        "compare the service's selector with the labels of the workloads, and its targetPort with theirs"
            .to_owned()
    } else {
        format!("look at the workloads there; `flotilla explain` in {} tells more", empty.join(" or "))
    };
    stop(way, "endpoints", says, fix)
}

/// A service as a peer asks about it: what [`outbound`] cannot see from there. `principal` is the caller's SPIFFE ID
/// and `cluster` where it is certified.
#[must_use]
pub fn inbound(world: &World, ask: &Ask, request: &Request) -> Vec<Step> {
    let host = hosts::service_host(&ask.name, &ask.namespace);
    let entry = world.index.services.get(&host).filter(|e| e.origin == Origin::Platform);
    let export =
        world.config.service_exports.iter().find(|e| e.name == ask.name && e.namespace == ask.namespace);
    let export = export.is_some_and(|e| {
        // Whoever is not told of an export learns nothing of it here either.
        ClusterId::new(&ask.cluster).is_ok_and(|c| exports::audience(world, e).includes(&c))
    });
    // What is not exported is not told about either.
    let Some(entry) = entry.filter(|_| export) else {
        let says = format!("{}/{} is not exported", ask.namespace, ask.name);
        let fix = format!("apply a ServiceExport named {} in namespace {} there", ask.name, ask.namespace);
        return vec![Step::broken("export", says, fix)];
    };
    let mut steps = vec![Step::ok("export", format!("{}/{} is exported", ask.namespace, ask.name))];
    let found = if ask.udp { entry.udp_port(ask.port) } else { entry.port(ask.port) };
    let Some(port) = found else {
        let kind = if ask.udp { " of UDP" } else { "" };
        let says = format!("the service has no port {}{kind} there", ask.port);
        steps.push(Step::broken("port", says, "give the service the same ports in all clusters"));
        return steps;
    };
    let proxy = policy::viewer(world, &entry.service.namespace, &Labels::new(), vec![]);
    let ctx = Ctx::new(&proxy, world);
    let rule = world.destination_rule(&proxy, entry);
    let chosen = rule.as_deref().and_then(|r| r.subsets.iter().find(|s| s.name == ask.subset));
    if !ask.subset.is_empty() && chosen.is_none() {
        let says = format!("no DestinationRule defines subset {} there", ask.subset);
        steps.push(Step::broken("subset", says, "apply the DestinationRule in that cluster as well"));
        return steps;
    }
    let none = Labels::new();
    let labels = chosen.map_or(&none, |s| &s.labels);
    let all: Vec<_> = entry.endpoints_of(port, labels).collect();
    let able = |e: &&&mesh_model::registry::Endpoint| e.health == Health::Healthy && e.tls == TlsMode::Mutual;
    let ready = all.iter().filter(able).count();
    if ready == 0 {
        let bare = all.iter().any(|e| e.tls != TlsMode::Mutual);
        let (says, fix) = match (all.len(), bare) {
            (0, _) => ("the service has no workloads there".to_owned(), "deploy one, or withdraw the export"),
            (n, true) => (
                format!("none of its {n} workloads has a proxy, and peers reach nothing else"),
                "give the workloads a sidecar",
            ),
            (n, false) => {
                (format!("none of its {n} workloads is healthy"), "look at the workloads' readiness")
            }
        };
        steps.push(Step::broken("backend", says, fix));
        return steps;
    }
    steps.push(Step::ok("backend", format!("{ready} of {} workloads are ready", all.len())));
    steps.push(policy::step(&ctx, entry, port, labels, Some((&ask.principal, &ask.cluster)), request));
    steps
}

/// What a peer asks about.
#[derive(Debug, Clone, Default, serde::Deserialize)]
pub struct Ask {
    /// Service.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Service port.
    pub port: u16,
    /// The port is one of UDP.
    #[serde(default)]
    pub udp: bool,
    /// Subset; empty is all.
    #[serde(default)]
    pub subset: String,
    /// SPIFFE ID of the caller.
    pub principal: String,
    /// Cluster of the caller.
    pub cluster: String,
}

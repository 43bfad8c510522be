//! From the caller's proxy to the workloads'.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use mesh_model::{
    SpiffeId,
    proxy::{Cluster, Direction, EndpointHealth, LbPolicy, RbacAction, RetryOn, UpstreamHttp, UpstreamTls},
};
use mesh_proxy::{
    ConfigSnapshot,
    simulate::{Action, Arrival, Hello, Passage, Peer, Verdict, simulate},
};
use pilot::{
    generate::{self, Generated},
    proxy::ProxyNode,
    simulate::{self as pilot_simulate, Target},
    world::World,
};

use crate::{
    Error,
    answer::{
        Answer, Asked, Caller, Direct, Endpoint, Fault, Mirror, Outlier, Policy, Reason, Retries, Session,
        Share, TrafficPolicy, Weight,
    },
    assume::ASSUMED,
    question::{Question, Understood},
};

/// The proxy that the question begins at.
const AT_CALLER: &str = "caller";
/// Client of gateways (RFC 5737).
const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 7));

pub(crate) fn walk(world: &World, question: &Question) -> Result<Answer, Error> {
    let q = question.understand()?;
    let mut caller = pilot_simulate::caller(world, &q.namespace, &q.workload, &question.labels);
    if let Some(account) = &question.service_account {
        caller.proxy.service_account.clone_from(account);
    }
    let proxy = &caller.proxy;
    let principal = principal(world, proxy);
    let own = proxy.addresses.first().copied().unwrap_or(pilot_simulate::CALLER);
    let mut answer = Answer {
        caller: Caller {
            workload: question.from.clone(),
            proxy: if proxy.router { "gateway" } else { "sidecar" }.to_owned(),
            principal: principal.clone(),
            labels: proxy.labels.clone(),
            assumed: caller.assumed.clone(),
            on_demand: pilot_simulate::is_on_demand(world, proxy),
        },
        request: question.request.clone(),
        ..Answer::default()
    };
    let arrival = if proxy.router {
        Arrival {
            direction: Direction::Unspecified,
            destination: SocketAddr::new(own, q.port),
            source: question.source.unwrap_or(CLIENT),
            hello: q.hello.clone(),
            peer: None,
            request: q.request.clone(),
        }
    } else {
        let resolved = pilot_simulate::resolve(world, proxy, &q.host);
        answer.host = resolved.service.as_ref().map(|e| e.service.host.clone());
        answer.virtual_service =
            answer.host.as_ref().and_then(|h| pilot_simulate::virtual_service(world, proxy, h));
        Arrival {
            direction: Direction::Outbound,
            destination: SocketAddr::new(resolved.address, q.port),
            source: own,
            hello: q.hello.clone(),
            peer: None,
            // Inside of TLS the proxy sees none.
            request: q.request.clone().filter(|_| q.hello.is_none()),
        }
    };
    answer.destination = arrival.destination.to_string();
    let config = snapshot(generate::generate(proxy, world));
    let passage = simulate(&config, &arrival)?;
    let cluster = passage.cluster.as_ref().and_then(|c| config.clusters.get(c)).cloned();
    first(&mut answer, &passage, cluster.as_deref());
    let forwards = matches!(passage.action, Action::Forward | Action::ForwardTcp);
    for shown in &mut answer.endpoints {
        let at: Option<SocketAddr> = shown.address.parse().ok();
        if let Some(target) = at.and_then(|a| pilot_simulate::target(world, a.ip())) {
            shown.workload = Some(target.workload);
        }
    }
    if answer.endpoints.iter().any(is_assumed) {
        answer.endpoints.retain(|e| !is_assumed(e));
        answer.detail =
            "no document gives the service a workload; policies are those of one with its labels".into();
    }
    if forwards {
        let peer = Peer { principal, cluster: Some(world.settings.cluster.to_string()) };
        let http2 = cluster.as_ref().is_some_and(|c| c.http == UpstreamHttp::Http2);
        inbound(world, &q, &passage, own, &peer, http2, &mut answer)?;
    }
    Ok(answer)
}

/// See [`crate::Mesh::configuration`].
pub(crate) fn configuration(world: &World, from: &str) -> Result<serde_json::Value, Error> {
    let (namespace, name) =
        from.split_once('/').ok_or_else(|| crate::QuestionError::From(from.to_owned()))?;
    let caller = pilot_simulate::caller(world, namespace, name, &BTreeMap::new());
    let g = generate::generate(&caller.proxy, world);
    let value = |v: Result<serde_json::Value, serde_json::Error>| v.map_err(|e| Error::Name(e.to_string()));
    let mut all = value(serde_json::to_value((&g.listeners, &g.routes, &g.clusters, &g.endpoints)))?;
    if let Some(routes) = all.get_mut(1).and_then(serde_json::Value::as_object_mut) {
        for hosts in routes.values_mut().filter_map(|r| r.get_mut("virtual_hosts")) {
            let list = hosts.as_array_mut().map(std::mem::take).unwrap_or_default();
            let named = list.into_iter().map(|h| {
                let name = h.get("name").and_then(serde_json::Value::as_str).unwrap_or_default().to_owned();
                (name, h)
            });
            *hosts = named.collect();
        }
    }
    let filters = filters(all.get(0));
    let mut part = |i: usize| all.get_mut(i).map(serde_json::Value::take).unwrap_or_default();
    Ok(serde_json::json!({
        "listeners": part(0), "routes": part(1), "clusters": part(2), "endpoints": part(3), "filters": filters
    }))
}

/// HTTP filters by filter chain and kind, which are deep inside of listeners.
fn filters(listeners: Option<&serde_json::Value>) -> serde_json::Value {
    let list = |v: &serde_json::Value, key: &str| {
        v.get(key).and_then(serde_json::Value::as_array).cloned().unwrap_or_default()
    };
    let mut out = serde_json::Map::new();
    for l in listeners.and_then(serde_json::Value::as_object).into_iter().flat_map(|m| m.values()) {
        for chain in list(l, "filter_chains") {
            let name = chain.get("name").and_then(serde_json::Value::as_str).unwrap_or_default().to_owned();
            let of: serde_json::Map<String, serde_json::Value> = list(&chain, "filters")
                .iter()
                .filter_map(|f| f.get("Http"))
                .flat_map(|h| list(h, "filters"))
                .filter_map(|f| f.as_object().cloned())
                .flatten()
                .collect();
            out.insert(name, of.into());
        }
    }
    out.into()
}

fn is_assumed(e: &Endpoint) -> bool {
    e.workload.as_deref().is_some_and(|w| w.contains(ASSUMED))
}

fn principal(world: &World, proxy: &ProxyNode) -> String {
    SpiffeId::workload(&world.settings.trust_domain, &proxy.namespace, &proxy.service_account)
        .map(|id| id.as_str().to_owned())
        .unwrap_or_default()
}

fn snapshot(g: Generated) -> ConfigSnapshot {
    ConfigSnapshot {
        listeners: g.listeners.into_iter().map(|(n, l)| (n, Arc::new(l))).collect(),
        routes: g.routes.into_iter().map(|(n, r)| (n, Arc::new(r))).collect(),
        clusters: g.clusters.into_iter().map(|(n, c)| (n, Arc::new(c))).collect(),
        endpoints: g.endpoints.into_iter().map(|(n, e)| (n, Arc::new(e))).collect(),
    }
}

/// What the first proxy does.
fn first(a: &mut Answer, p: &Passage, cluster: Option<&Cluster>) {
    a.listener.clone_from(&p.listener);
    a.filter_chain.clone_from(&p.filter_chain);
    a.route_configuration.clone_from(&p.route_configuration);
    a.virtual_host.clone_from(&p.virtual_host);
    a.route = match (p.route.as_deref(), p.route_index) {
        (Some(""), Some(i)) => Some(format!("[{i}]")),
        (name, _) => name.map(str::to_owned),
    };
    if p.route
        .as_deref()
        .is_none_or(|r| matches!(r, "default" | "allow_any" | "allow_any_dynamic_dns" | "block_all"))
    {
        a.virtual_service = None;
    }
    let blocked = p.route.as_deref() == Some("block_all");
    a.action = if blocked { Action::Refuse } else { p.action }.as_str().to_owned();
    a.status = p.status;
    a.detail = told(p);
    a.location.clone_from(&p.location);
    a.weights = p.weights.iter().map(|w| weight(&w.cluster, w.weight)).collect();
    a.cluster.clone_from(&p.cluster);
    a.subset = p.cluster.as_deref().map(|c| weight(c, 1).subset);
    a.endpoints = p
        .endpoints
        .iter()
        .map(|e| Endpoint {
            address: e.address.clone(),
            workload: None,
            locality: e.locality.clone(),
            priority: e.priority,
            weight: e.weight,
            health: health(e.health),
            active: e.active,
            tls: tls(e.tls.as_ref()).unwrap_or("none"),
            sni: e.tls.as_ref().map(|t| t.sni.clone()).filter(|s| !s.is_empty()),
        })
        .collect();
    a.timeout = p.timeout.map(seconds);
    a.retries = p.retries.as_ref().map(|r| Retries {
        attempts: r.attempts,
        per_try_timeout: r.per_try_timeout.map(seconds),
        retry_on: r
            .on
            .iter()
            .map(|o| retry_on(*o).to_owned())
            .chain(r.status_codes.iter().map(ToString::to_string))
            .collect::<Vec<_>>()
            .join(","),
    });
    a.fault = p.fault.as_ref().map(|f| Fault {
        delay: f.delay.map(|(d, n)| Share { value: seconds(d), percentage: percent(n) }),
        abort: f.abort.map(|(s, n)| Share { value: s, percentage: percent(n) }),
    });
    a.mirrors = p
        .mirrors
        .iter()
        .map(|m| Mirror { cluster: m.cluster.clone(), percentage: percent(m.fraction) })
        .collect();
    a.hash.clone_from(&p.hash);
    a.session = p.session.as_ref().map(|s| Session {
        by: s.by,
        name: s.name.clone(),
        path: s.path.clone(),
        max_age: s.max_age.map(seconds),
        absolute_timeout: s.absolute.map(seconds),
        endpoint: s.host.clone(),
    });
    a.tunnel.clone_from(&p.tunnel);
    if let Some(r) = &p.upstream {
        a.upstream =
            Some(Direct { method: r.method.clone(), authority: r.authority.clone(), path: r.path.clone() });
        a.headers = joined(&r.headers);
    }
    a.response_headers = joined(&p.response_headers);
    a.traffic_policy = cluster.map(traffic_policy);
    noted(a, AT_CALLER, p, true);
}

/// Why, with policies by the names that their authors know.
fn told(p: &Passage) -> String {
    // Names that pilot gives to what REGISTRY_ONLY does.
    if p.route.as_deref() == Some("block_all") || p.cluster.as_deref() == Some("BlackHoleCluster") {
        return "nobody declared this destination, and outboundTrafficPolicy is REGISTRY_ONLY".to_owned();
    }
    let by = p.policies.iter().find(|s| s.decides && p.action == Action::Deny && !s.name.is_empty());
    by.map_or_else(|| p.detail.clone(), |s| format!("denied by {}", generate::explain::readable(&s.name)))
}

/// Policies, questions to others and reasons of one proxy.
fn noted(a: &mut Answer, at: &str, p: &Passage, reasons: bool) {
    a.policies.extend(p.policies.iter().map(|s| Policy {
        at: at.to_owned(),
        policy: generate::explain::readable(&s.name),
        action: match s.action {
            RbacAction::Allow => "ALLOW",
            RbacAction::Deny => "DENY",
            RbacAction::Log => "AUDIT",
        },
        verdict: match s.verdict {
            Verdict::Matches => "matches",
            Verdict::Misses => "misses",
            Verdict::Unknown => "unknown",
        },
        dry_run: s.dry_run,
        decides: s.decides,
    }));
    a.asks.extend(p.asks.iter().map(|w| Asked { at: at.to_owned(), who: w.clone() }));
    if reasons {
        a.reasons.extend(p.reasons.iter().map(|r| Reason {
            at: at.to_owned(),
            kind: r.kind,
            name: r.name.clone(),
            why: r.why.clone(),
        }));
    }
}

/// What the proxies of the endpoints' workloads do with what is sent to them. The answer becomes a refusal if all that
/// are asked refuse.
fn inbound(
    world: &World,
    q: &Understood,
    passage: &Passage,
    source: IpAddr,
    peer: &Peer,
    http2: bool,
    answer: &mut Answer,
) -> Result<(), Error> {
    let mut seen: Vec<(Target, Passage)> = Vec::new();
    for e in passage.endpoints.iter().filter(|e| e.active) {
        let Ok(destination) = e.address.parse::<SocketAddr>() else { continue };
        let Some(target) = pilot_simulate::target(world, destination.ip()) else { continue };
        let Some(proxy) = &target.proxy else { continue };
        // Replicas are alike.
        let like = |t: &Target| {
            t.proxy.as_ref().is_some_and(|p| p.labels == proxy.labels && p.namespace == proxy.namespace)
        };
        if seen.iter().any(|(t, _)| like(t)) {
            continue;
        }
        let mut request = passage.upstream.clone();
        if passage.action == Action::ForwardTcp {
            // Bytes that may be a request all the same.
            request = q.request.clone().filter(|_| q.hello.is_none());
        }
        if let Some(r) = &mut request {
            r.http2 |= http2;
            // What the caller's proxy says to the workload's is not for it.
            r.headers.retain(|(n, _)| n != "x-envoy-decorator-operation");
        }
        let arrival = Arrival {
            direction: Direction::Inbound,
            destination,
            source,
            hello: e
                .tls
                .as_ref()
                .map(hello)
                .or_else(|| q.hello.clone().filter(|_| !proxy_terminates(passage))),
            peer: e.tls.as_ref().filter(|t| t.certificate.is_some()).map(|_| peer.clone()),
            request,
        };
        let config = snapshot(generate::generate(proxy, world));
        let there = simulate(&config, &arrival)?;
        let there = Passage { detail: told(&there), ..there };
        noted(answer, &named(&target), &there, !forwarded(&there));
        seen.push((target, there));
    }
    let Some((target, worst)) = seen.iter().find(|(_, p)| !forwarded(p)) else { return Ok(()) };
    let says = format!("{}: {}", named(target), worst.detail);
    if seen.iter().all(|(_, p)| !forwarded(p)) {
        answer.action = worst.action.as_str().to_owned();
        answer.status = worst.status;
        answer.detail = says;
    } else {
        answer.detail = format!("some of the workloads refuse: {says}");
    }
    Ok(())
}

/// The workload by its name, or what it would be.
fn named(t: &Target) -> String {
    if !t.workload.contains(ASSUMED) {
        return t.workload.clone();
    }
    let what = t.workload.split_once(ASSUMED).map_or("", |(_, n)| n.trim());
    let ns = t.workload.split('/').next().unwrap_or_default();
    if !what.starts_with("Service ") {
        return format!("{ns}/{what}");
    }
    let labels = t.proxy.iter().flat_map(|p| &p.labels).filter(|(k, _)| !k.contains("tlsMode"));
    let shown: Vec<_> = labels.map(|(k, v)| format!("{k}={v}")).collect();
    format!("{ns}/({})", shown.join(","))
}

fn forwarded(p: &Passage) -> bool {
    matches!(p.action, Action::Forward | Action::ForwardTcp)
}

/// Whether the first proxy ends the client's TLS session: what it sends then is a request.
fn proxy_terminates(p: &Passage) -> bool {
    p.action == Action::Forward
}

fn hello(t: &UpstreamTls) -> Hello {
    Hello { sni: Some(t.sni.clone()).filter(|s| !s.is_empty()), alpn: t.alpn.clone() }
}

fn weight(cluster: &str, weight: u32) -> Weight {
    let mut parts = cluster.splitn(4, '|');
    let (direction, port, subset, host) = (parts.next(), parts.next(), parts.next(), parts.next());
    let named = matches!(direction, Some("outbound" | "inbound"));
    let of = |s: Option<&str>| s.filter(|_| named).unwrap_or_default().to_owned();
    Weight {
        cluster: cluster.to_owned(),
        host: of(host),
        subset: of(subset),
        port: port.filter(|_| named).and_then(|p| p.parse().ok()),
        weight,
    }
}

fn joined(headers: &[(String, String)]) -> BTreeMap<String, String> {
    let mut out: BTreeMap<String, String> = BTreeMap::new();
    for (n, v) in headers {
        out.entry(n.to_ascii_lowercase())
            .and_modify(|all| {
                all.push(',');
                all.push_str(v);
            })
            .or_insert_with(|| v.clone());
    }
    out
}

fn health(h: EndpointHealth) -> &'static str {
    match h {
        EndpointHealth::Healthy => "healthy",
        EndpointHealth::Degraded => "degraded",
        EndpointHealth::Unhealthy => "unhealthy",
        EndpointHealth::Draining => "draining",
    }
}

fn tls(t: Option<&UpstreamTls>) -> Option<&'static str> {
    t.map(|t| if t.certificate.is_some() { "mutual" } else { "simple" })
}

/// As Istio writes durations.
fn seconds(d: Duration) -> String {
    if d.subsec_nanos() == 0 { format!("{}s", d.as_secs()) } else { format!("{}s", d.as_secs_f64()) }
}

fn percent(ppm: u32) -> f64 {
    f64::from(ppm) / 10_000.0
}

fn retry_on(on: RetryOn) -> &'static str {
    match on {
        RetryOn::ServerError => "5xx",
        RetryOn::GatewayError => "gateway-error",
        RetryOn::ConnectFailure => "connect-failure",
        RetryOn::RefusedStream => "refused-stream",
        RetryOn::Reset => "reset",
        RetryOn::ResetBeforeRequest => "reset-before-request",
        RetryOn::Retriable4xx => "retriable-4xx",
        RetryOn::RetriableStatusCodes => "retriable-status-codes",
        RetryOn::RetriableHeaders => "retriable-headers",
        RetryOn::EnvoyRateLimited => "envoy-ratelimited",
        RetryOn::Cancelled => "cancelled",
        RetryOn::DeadlineExceeded => "deadline-exceeded",
        RetryOn::ResourceExhausted => "resource-exhausted",
        RetryOn::Internal => "internal",
        RetryOn::Unavailable => "unavailable",
    }
}

fn traffic_policy(c: &Cluster) -> TrafficPolicy {
    let limited = |n: u32| (n != u32::MAX).then_some(n);
    TrafficPolicy {
        load_balancer: match c.lb {
            LbPolicy::RoundRobin => "ROUND_ROBIN".to_owned(),
            LbPolicy::LeastRequest(_) => "LEAST_REQUEST".to_owned(),
            LbPolicy::Random => "RANDOM".to_owned(),
            LbPolicy::RingHash(n) => format!("RING_HASH({n})"),
            LbPolicy::Maglev(n) => format!("MAGLEV({n})"),
            LbPolicy::PeakEwma => "PEAK_EWMA".to_owned(),
            LbPolicy::Utilization => "BACKEND_UTILIZATION".to_owned(),
        },
        connect_timeout: seconds(c.connect_timeout),
        protocol: match c.http {
            UpstreamHttp::Http1 => "http1",
            UpstreamHttp::Http2 => "http2",
            UpstreamHttp::Downstream => "downstream",
            UpstreamHttp::Auto => "auto",
        },
        max_connections: limited(c.limits.max_connections),
        http1_max_pending_requests: limited(c.limits.max_pending),
        http2_max_requests: limited(c.limits.max_requests),
        max_retries: limited(c.limits.max_retries),
        max_requests_per_connection: Some(c.max_requests_per_connection).filter(|n| *n > 0),
        max_concurrent_streams: Some(c.http2.max_concurrent_streams).filter(|n| *n > 0),
        max_connection_duration: c.max_connection_duration.map(seconds),
        idle_timeout: c.idle_timeout.map(seconds),
        outlier_detection: c.outlier.as_ref().map(|o| Outlier {
            consecutive_5xx_errors: o.consecutive_5xx,
            consecutive_gateway_errors: o.consecutive_gateway,
            interval: seconds(o.interval),
            base_ejection_time: seconds(o.base_ejection),
            max_ejection_percent: o.max_percent,
            error_codes: o.error_codes.clone(),
        }),
        warmup: c.slow_start.map(|s| seconds(s.window)),
        tls: tls(c.tls.as_deref()),
    }
}

//! Clusters and endpoints as a gRPC client can execute them (gRFCs A27, A29, A32, A37, A42, A50).
//!
//! - All endpoints of a cluster have one transport. It is mutual TLS if the rule says `ISTIO_MUTUAL`, or if it says
//!   nothing and every endpoint takes nothing else; a sidecar that takes both knows mesh traffic by an ALPN that gRPC
//!   does not offer. Clear text otherwise; never instead of TLS that a rule asks for.
//! - Workloads of other clusters are behind gateways that route by a server name, which gRPC does not let us choose.
//! - Of outlier detection gRPC judges rates only. A host is ejected if all of its calls of an interval failed, and there
//!   were as many of them as consecutive errors are allowed.

use std::collections::BTreeSet;

use mesh_model::{
    authored::{ClientTlsMode, DestinationRule, MutualTlsMode, SimpleLb, Subset, TrafficPolicy},
    proxy::{
        CircuitBreakers, Cluster, Discovery, FailurePercentage, LbPolicy, LoadAssignment, OutlierDetection,
        UpstreamHttp2, UpstreamTls,
    },
    registry::{Labels, ServicePort, TlsMode},
};

use super::{
    super::{clusters, common::cluster_name, endpoints::CLUSTER_LABEL},
    Ctx, Entry, Generated, Left, effective_policy,
};

/// gRPC refuses larger rings.
const RING: u64 = 8_388_608;
/// Envoy's default, for a table that gRPC does not know.
const DEFAULT_RING: u64 = 1024;
/// Percent: gRPC ejects above it, so this is "all of them".
const ALL_FAILED: u32 = 99;

/// Clusters and endpoints of a service.
pub(super) fn outbound(
    ctx: &Ctx<'_>,
    out: &mut Generated,
    entry: &Entry,
    rule: Option<&DestinationRule>,
    left: &mut Left,
) {
    let mut made = Generated::default();
    clusters::outbound(ctx, &mut made, entry, rule);
    let subsets = rule.map(|r| r.subsets.as_slice()).unwrap_or_default();
    for port in entry.service.ports.iter().filter(|p| super::is_called(p)) {
        for subset in std::iter::once(None).chain(subsets.iter().map(Some)) {
            let name = cluster_name(port.port, subset.map_or("", |s| &s.name), &entry.service.host);
            let Some(cluster) = made.clusters.remove(&name) else { continue };
            one(ctx, out, &mut made, cluster, (entry, port, rule, subset), left);
        }
    }
}

fn one(
    ctx: &Ctx<'_>,
    out: &mut Generated,
    made: &mut Generated,
    mut c: Cluster,
    of: (&Entry, &ServicePort, Option<&DestinationRule>, Option<&Subset>),
    left: &mut Left,
) {
    let (entry, port, rule, subset) = of;
    let policy = effective_policy(rule, subset, port.port);
    match transport(ctx, &c, entry, port, subset, &policy, left) {
        Ok(tls) => c.tls = tls.map(Box::new),
        Err(what) => {
            left.insert(what);
            return;
        }
    }
    c.tls_matches.clear();
    if c.proxy_protocol.take().is_some() {
        left.insert("services that want a PROXY protocol");
        return;
    }
    let assignment = match &mut c.discovery {
        Discovery::Eds(name) => made.endpoints.remove(name),
        Discovery::StrictDns(a) => {
            let count = a.localities.iter().map(|l| l.endpoints.len()).sum::<usize>();
            if count != 1 {
                left.insert("services that are several names to be resolved");
                return;
            }
            c.discovery = Discovery::LogicalDns(std::mem::take(a));
            None
        }
        Discovery::Static(_) | Discovery::LogicalDns(_) => None,
        Discovery::OriginalDst | Discovery::ByName(_) => {
            left.insert(
                "services without endpoints of their own (resolution NONE, DYNAMIC_DNS, PASSTHROUGH)",
            );
            return;
        }
    };
    if let Some(mut a) = assignment {
        localities(&mut a, left);
        out.assignment(a);
    }
    balance(&mut c, &policy, left);
    limits(&mut c, &ctx.world.defaulted(&policy), left);
    out.cluster(c);
}

/// TLS to all endpoints; an error if they cannot be called as they should.
fn transport(
    ctx: &Ctx<'_>,
    c: &Cluster,
    entry: &Entry,
    port: &ServicePort,
    subset: Option<&Subset>,
    policy: &TrafficPolicy,
    left: &mut Left,
) -> Result<Option<UpstreamTls>, &'static str> {
    match policy.tls.as_ref().map(|t| t.mode) {
        Some(ClientTlsMode::Disable) => Ok(None),
        Some(ClientTlsMode::IstioMutual) => Ok(c.tls.as_deref().cloned()),
        Some(ClientTlsMode::Simple | ClientTlsMode::Mutual) => {
            Err("TLS other than ISTIO_MUTUAL: such services cannot be called")
        }
        None => {
            let none = Labels::new();
            let labels = subset.map_or(&none, |s| &s.labels);
            let namespace = &entry.service.namespace;
            let strict = |e: &mesh_model::registry::Endpoint| {
                e.tls == TlsMode::Mutual && ctx.world.mtls_mode_of(namespace, e) == MutualTlsMode::Strict
            };
            let all: Vec<bool> = entry.endpoints_of(port, labels).map(strict).collect();
            if all.contains(&true) && all.contains(&false) {
                left.insert("STRICT mTLS of a part of the endpoints, which are not reached");
            }
            let mesh = c.tls_matches.iter().find(|m| m.name == "tlsMode-istio").and_then(|m| m.tls.clone());
            Ok(mesh.filter(|_| !all.is_empty() && all.iter().all(|s| *s)))
        }
    }
}

/// Endpoints that can be reached directly. gRPC skips localities without weight and refuses gaps between priorities and
/// addresses that come twice.
fn localities(a: &mut LoadAssignment, left: &mut Left) {
    let mut seen = BTreeSet::new();
    for l in &mut a.localities {
        l.endpoints.retain(|e| {
            if e.transport_labels.contains_key(CLUSTER_LABEL) {
                left.insert("endpoints in other clusters");
                return false;
            }
            if e.address.parse::<std::net::IpAddr>().is_err() {
                left.insert("endpoints that are names or sockets");
                return false;
            }
            seen.insert((e.address.clone(), e.port))
        });
        for e in &mut l.endpoints {
            e.transport_labels.clear();
        }
        if l.weight == 0 {
            let sum: u64 = l.endpoints.iter().map(|e| u64::from(e.weight)).sum();
            l.weight = u32::try_from(sum).unwrap_or(u32::MAX);
        }
        // The sum of a priority's localities must be a number of 32 bits.
        l.weight = l.weight.clamp(1, u32::MAX / 4096);
    }
    a.localities.retain(|l| !l.endpoints.is_empty());
    a.localities.sort_by_key(|l| l.priority);
    let mut last = None;
    let mut priority = 0;
    for l in &mut a.localities {
        if last.is_some_and(|p| p != l.priority) {
            priority += 1;
        }
        last = Some(l.priority);
        l.priority = priority;
    }
}

fn balance(c: &mut Cluster, policy: &TrafficPolicy, left: &mut Left) {
    c.lb = match c.lb {
        LbPolicy::RingHash(size) => LbPolicy::RingHash(size.clamp(1, RING)),
        // Equal keys lead to equal hosts in both.
        LbPolicy::Maglev(_) => LbPolicy::RingHash(DEFAULT_RING),
        _ => LbPolicy::RoundRobin,
    };
    let lb = policy.load_balancer.as_ref();
    if lb.and_then(|l| l.simple).is_some_and(|s| !matches!(s, SimpleLb::RoundRobin | SimpleLb::Unspecified)) {
        left.insert("load balancers other than ROUND_ROBIN and consistent hashing, which it is instead");
    }
    if c.utilization.take().is_some() {
        left.insert("load balancers other than ROUND_ROBIN and consistent hashing, which it is instead");
    }
    if c.slow_start.take().is_some() {
        left.insert("warm-up of new endpoints");
    }
    c.locality_weighted = false;
}

fn limits(c: &mut Cluster, policy: &TrafficPolicy, left: &mut Left) {
    let max_requests = c.limits.max_requests;
    let other = CircuitBreakers { max_requests, ..CircuitBreakers::default() };
    let http2 = std::mem::take(&mut c.http2);
    let lifetime = c.max_connection_duration.take();
    if c.limits != other
        || c.max_requests_per_connection != 0
        || c.idle_timeout.is_some()
        || lifetime.is_some()
        || http2 != UpstreamHttp2::default()
    {
        left.insert("limits other than http2MaxRequests");
    }
    c.limits = other;
    c.max_requests_per_connection = 0;
    c.idle_timeout = None;
    c.keepalive = None;
    // Nobody asked for the one that services with remote endpoints have.
    let asked = c.outlier.take().filter(|_| policy.outlier_detection.is_some());
    c.outlier = asked.and_then(|o| {
        let counts = [o.consecutive_5xx, o.consecutive_gateway];
        let errors = counts.into_iter().filter(|n| *n > 0).min()?;
        Some(Box::new(OutlierDetection {
            failure_percentage: Some(FailurePercentage {
                threshold: ALL_FAILED,
                minimum_hosts: 1,
                request_volume: errors,
                enforcing: 100,
            }),
            interval: o.interval,
            base_ejection: o.base_ejection,
            max_ejection: o.max_ejection,
            max_percent: o.max_percent,
            ..OutlierDetection::default()
        }))
    });
}

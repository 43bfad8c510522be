//! Outbound clusters.

use std::{collections::BTreeMap, time::Duration};

use mesh_model::{
    SpiffeId,
    authored::{
        BackendUtilizationLb, ClientTlsMode, ClientTlsSettings, ConnectionPoolSettings, DestinationRule,
        H2UpgradePolicy, LoadBalancerSettings, OutlierDetection as AuthoredOutlier,
        ProxyProtocolVersion as Authored, RetryBudget as AuthoredBudget, SimpleLb, Subset,
        TcpKeepalive as AuthoredKeepalive, TrafficPolicy,
    },
    federation::ImportedService,
    proxy::{
        Cluster, Discovery, Http2Keepalive, LbPolicy, LeastRequest, LocalOrigin, NameCache, NamedHosts,
        OutlierDetection, ProxyProtocolVersion, RetryBudget, SecretRef, SlowStart, StringMatch, TUNNEL_ALPN,
        TcpKeepalive, TransportSocketMatch, UpstreamHttp, UpstreamTls, UtilizationLb, Validation,
    },
    registry::{Labels, Protocol, Resolution, ServicePort},
};

use super::{
    Ctx, Generated,
    common::{BLACK_HOLE, BY_NAME, PASSTHROUGH, cluster_name, member_sni, sni_name},
    endpoints::{self, CLUSTER_LABEL, TLS_LABEL},
    hbone,
};
use crate::{
    index::{Entry, Origin},
    world::effective_policy,
};

/// Roots for servers outside the mesh, where a user names none.
pub(crate) const SYSTEM_ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Passive health of services with remote endpoints: a gateway whose peer is broken is taken out for
/// this service and peer only, quickly, and tried again soon.
const REMOTE_OUTLIER: OutlierDetection = OutlierDetection {
    consecutive_5xx: 0,
    enforcing_5xx: 100,
    consecutive_gateway: 5,
    enforcing_gateway: 100,
    success_rate: None,
    failure_percentage: None,
    local_origin: None,
    interval: Duration::from_secs(5),
    base_ejection: Duration::from_secs(10),
    max_ejection: Duration::from_secs(300),
    max_percent: 100,
    error_codes: Vec::new(),
};

/// Where undeclared destinations go.
pub(super) fn base(ctx: &Ctx<'_>, out: &mut Generated) {
    out.cluster(ctx.black_hole());
    if !ctx.proxy.router {
        let mut c = ctx.passthrough(PASSTHROUGH);
        // There is nothing to eject, and each speaks what its client does.
        let defaults = ctx.world.config.mesh.default_traffic_policy.as_ref();
        pool(&mut c, defaults.and_then(|d| d.connection_pool.as_ref()), Protocol::Tcp);
        out.cluster(c);
        if ctx.names_undeclared() {
            out.cluster(by_name(ctx));
        }
    }
    debug_assert!(out.clusters.contains_key(BLACK_HOLE));
}

/// Hosts that nobody declared, by the name that a request has for them. As in Istio they have no limits of the mesh.
fn by_name(ctx: &Ctx<'_>) -> Cluster {
    let hosts = NamedHosts { cache: name_cache(), port: 0 };
    let mut c = Cluster {
        lb: LbPolicy::RoundRobin,
        http: UpstreamHttp::Downstream,
        ..ctx.base_cluster(BY_NAME, Discovery::ByName(hosts))
    };
    let said = ctx.world.config.mesh.outbound_traffic_policy.as_ref().and_then(|p| p.tls.as_ref());
    if let Some(t) = said.filter(|t| matches!(t.mode, ClientTlsMode::Simple | ClientTlsMode::Mutual)) {
        let whoever = Server { host: "*", identities: &[], by_name: true };
        c.tls = Some(Box::new(foreign_tls(ctx, &whoever, t, false)));
    }
    c
}

/// Clusters and endpoints of a service that the proxy may call.
pub(super) fn outbound(ctx: &Ctx<'_>, out: &mut Generated, entry: &Entry, rule: Option<&DestinationRule>) {
    for port in &entry.service.ports {
        add(ctx, out, entry, port, rule, None);
        for subset in rule.map(|r| r.subsets.as_slice()).unwrap_or_default() {
            add(ctx, out, entry, port, rule, Some(subset));
        }
    }
}

fn add(
    ctx: &Ctx<'_>,
    out: &mut Generated,
    entry: &Entry,
    port: &ServicePort,
    rule: Option<&DestinationRule>,
    subset: Option<&Subset>,
) {
    let subset_name = subset.map_or("", |s| s.name.as_str());
    let none = Labels::new();
    let labels = subset.map_or(&none, |s| &s.labels);
    let name = cluster_name(port.port, subset_name, &entry.service.host);
    let policy = effective_policy(rule, subset, port.port);
    let defaulted = ctx.world.defaulted(&policy);
    let lb = policy.load_balancer.as_ref();
    let passthrough = lb.is_some_and(|l| l.simple == Some(SimpleLb::Passthrough));

    let discovery = match entry.service.resolution {
        Resolution::Passthrough => Discovery::OriginalDst,
        Resolution::ByName => Discovery::ByName(NamedHosts {
            cache: name_cache(),
            port: entry.endpoints.iter().find(|e| e.service_port == port.name).map_or(port.port, |e| e.port),
        }),
        _ if passthrough => Discovery::OriginalDst,
        Resolution::Static => {
            let a = endpoints::assignment(ctx, entry, port, labels, &name, &policy);
            out.assignment(a);
            Discovery::Eds(name.clone())
        }
        Resolution::Dns => {
            Discovery::StrictDns(endpoints::assignment(ctx, entry, port, labels, &name, &policy))
        }
    };
    let mut c = ctx.base_cluster(&name, discovery);
    // Of hosts such as `reviews.books.svc.cluster.local` it is in the name.
    if entry.service.host.split('.').nth(2) != Some("svc") {
        c.namespace.clone_from(&entry.service.namespace);
    }
    c.stat_name = stat_name(
        &ctx.world.config.mesh.outbound_cluster_stat_name,
        entry,
        port,
        ("SUBSET_NAME", subset_name),
    );
    if matches!(c.discovery, Discovery::StrictDns(_)) {
        c.dns_refresh = ctx.world.config.mesh.dns_refresh_rate.map(Duration::from);
    }
    c.http = http_version(ctx, port.protocol);
    // Where the caller says which host it is, there is nothing to balance.
    match c.discovery {
        Discovery::ByName(_) | Discovery::OriginalDst => c.lb = LbPolicy::RoundRobin,
        _ => balance(&mut c, lb, ctx.proxy.flotilla),
    }
    c.slow_start = lb
        .and_then(slow_start)
        .filter(|_| matches!(c.discovery, Discovery::Eds(_) | Discovery::StrictDns(_)))
        .filter(|_| matches!(c.lb, LbPolicy::RoundRobin | LbPolicy::LeastRequest(_)));
    pool(&mut c, defaulted.connection_pool.as_ref(), port.protocol);
    if upgraded(ctx, entry, port, &defaulted) {
        c.http = UpstreamHttp::Http2;
    }
    c.limits.retry_budget = policy.retry_budget.as_ref().map(retry_budget);
    c.outlier = match &defaulted.outlier_detection {
        Some(o) => Some(Box::new(outlier(o))),
        None if entry.imports.is_empty() => None,
        None => {
            // Nobody asked for this detection, so it may prefer hosts but never leave a caller with none:
            // when all are ejected, all are used.
            c.panic_threshold = 1;
            Some(Box::new(REMOTE_OUTLIER))
        }
    };
    c.locality_weighted = match endpoints::zones::setting(ctx, &policy) {
        Some((_, zones)) => zones,
        None => endpoints::locality_setting(ctx, &policy).is_some_and(|s| !s.distribute.is_empty()),
    };
    if let Some(o) = &defaulted.outlier_detection
        && let Ok(p) = u32::try_from(o.min_health_percent)
    {
        c.panic_threshold = p.min(100);
    }
    transport(ctx, &mut c, entry, port, subset_name, &policy);
    // All endpoints must expect the header, whatever follows it; gateways of other clusters do not.
    if let Some(p) = policy.proxy_protocol.as_ref().filter(|_| entry.imports.is_empty()) {
        c.proxy_protocol = Some(match p.version {
            Authored::V1 => ProxyProtocolVersion::V1,
            Authored::V2 => ProxyProtocolVersion::V2,
        });
    }
    out.cluster(c);
}

/// A cluster's name in statistics, by a pattern of the mesh; empty without one.
pub(super) fn stat_name(pattern: &str, entry: &Entry, port: &ServicePort, own: (&str, &str)) -> String {
    if pattern.is_empty() {
        return String::new();
    }
    let s = &entry.service;
    let short = if s.host == s.name { s.host.clone() } else { format!("{}.{}", s.name, s.namespace) };
    let number = port.port.to_string();
    [
        ("SERVICE_FQDN", s.host.as_str()),
        ("SERVICE_PORT_NAME", &port.name),
        ("SERVICE_PORT", &number),
        ("SERVICE", &short),
        own,
    ]
    .iter()
    .fold(pattern.to_owned(), |text, (variable, value)| text.replace(&format!("%{variable}%"), value))
}

/// Where names are kept that requests ask for. Nobody who owns a name of a wildcard gets at the proxy's own host, or at
/// what answers on the link, such as a cloud's metadata.
pub(super) fn name_cache() -> NameCache {
    const INWARD: [&str; 8] = [
        "0.0.0.0/8",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "224.0.0.0/4",
        "::/127",
        "::ffff:0.0.0.0/96",
        "fe80::/10",
        "ff00::/8",
    ];
    let refused = INWARD.iter().filter_map(|net| net.parse().ok()).collect();
    NameCache { name: "mesh".to_owned(), refused, ..NameCache::default() }
}

fn http_version(_ctx: &Ctx<'_>, p: Protocol) -> UpstreamHttp {
    match p {
        p if p.is_http2() => UpstreamHttp::Http2,
        // What the application speaks is what its peer understands.
        Protocol::Auto => UpstreamHttp::Downstream,
        _ => UpstreamHttp::Http1,
    }
}

/// `ours`: the proxy knows policies that Envoy does not.
pub(super) fn balance(c: &mut Cluster, lb: Option<&LoadBalancerSettings>, ours: bool) {
    let Some(lb) = lb else { return };
    if let Some(h) = &lb.consistent_hash {
        c.lb = match (&h.maglev, &h.ring_hash) {
            (Some(m), _) => LbPolicy::Maglev(m.table_size.unwrap_or(65_537)),
            (None, Some(r)) => LbPolicy::RingHash(r.minimum_ring_size.unwrap_or(1024)),
            (None, None) => LbPolicy::RingHash(h.minimum_ring_size.filter(|s| *s > 0).unwrap_or(1024)),
        };
        return;
    }
    if let Some(u) = &lb.backend_utilization {
        c.lb = LbPolicy::Utilization;
        c.utilization = Some(Box::new(utilization(u)));
        return;
    }
    c.lb = match lb.simple {
        Some(SimpleLb::RoundRobin | SimpleLb::Passthrough) => LbPolicy::RoundRobin,
        Some(SimpleLb::Random) => LbPolicy::Random,
        Some(SimpleLb::PeakEwma) if ours => LbPolicy::PeakEwma,
        Some(SimpleLb::LeastConn | SimpleLb::LeastRequest | SimpleLb::PeakEwma | SimpleLb::Unspecified)
        | None => LbPolicy::LeastRequest(LeastRequest::default()),
    };
}

fn utilization(u: &BackendUtilizationLb) -> UtilizationLb {
    let default = UtilizationLb::default();
    UtilizationLb {
        // Zero is "not set".
        error_penalty: Some(u.error_utilization_penalty_percent)
            .filter(|n| *n > 0)
            .unwrap_or(default.error_penalty),
        metrics: u.metric_names_for_computing_utilization.clone(),
        blackout: u.weight_stabilization_period.map_or(default.blackout, Duration::from),
        expiration: u.weight_expiration_period.map_or(default.expiration, Duration::from),
        update: u.weight_update_period.map_or(default.update, Duration::from),
    }
}

/// How endpoints that are new get their share.
fn slow_start(lb: &LoadBalancerSettings) -> Option<SlowStart> {
    let w = lb.warmup.clone().unwrap_or_default();
    let window = w.duration.or(lb.warmup_duration_secs)?;
    // Both are bounded by validation.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let scaled =
        |v: Option<f64>, default: f64, by: f64| (v.unwrap_or(default).clamp(0.0, 1000.0) * by).round() as u32;
    Some(SlowStart {
        window: window.into(),
        aggression: scaled(w.aggression, 1.0, 1000.0).max(1),
        min_weight: scaled(w.minimum_percent, 10.0, 100.0).min(10_000),
    })
}

fn retry_budget(b: &AuthoredBudget) -> RetryBudget {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let share = (b.percent.unwrap_or(20.0).clamp(0.0, 100.0) * 100.0).round() as u32;
    RetryBudget {
        share,
        min_concurrency: b.min_retry_concurrency.unwrap_or(3),
        interval: b.budget_interval.map(Duration::from).unwrap_or_default(),
    }
}

/// A count that a user set; 0 and below is "not set".
fn count(n: i32) -> Option<u32> {
    u32::try_from(n).ok().filter(|n| *n > 0)
}

pub(super) fn keepalive(k: &AuthoredKeepalive) -> TcpKeepalive {
    TcpKeepalive {
        time: k.time.map_or(Duration::from_secs(7200), Duration::from),
        interval: k.interval.map(Duration::from),
        probes: Some(k.probes).filter(|n| *n > 0),
    }
}

/// Whether the mesh's default makes HTTP/2 of a service's HTTP/1.1: nobody knows what servers outside of it speak.
fn upgraded(ctx: &Ctx<'_>, entry: &Entry, port: &ServicePort, policy: &TrafficPolicy) -> bool {
    let said = policy.connection_pool.as_ref().and_then(|p| p.http.as_ref());
    ctx.world.config.mesh.h2_upgrade_policy == H2UpgradePolicy::Upgrade
        && said.is_none_or(|h| h.h2_upgrade_policy == H2UpgradePolicy::Default && !h.use_client_protocol)
        && port.protocol.is_http()
        && !entry.service.mesh_external
}

pub(super) fn pool(c: &mut Cluster, pool: Option<&ConnectionPoolSettings>, protocol: Protocol) {
    let Some(pool) = pool else { return };
    if let Some(t) = &pool.tcp {
        if let Some(n) = count(t.max_connections) {
            c.limits.max_connections = n;
        }
        if let Some(d) = t.connect_timeout {
            c.connect_timeout = d.into();
        }
        if let Some(k) = &t.tcp_keepalive {
            c.keepalive = Some(keepalive(k));
        }
        c.max_connection_duration = t.max_connection_duration.map(Duration::from);
    }
    if let Some(h) = &pool.http {
        if let Some(n) = count(h.http1_max_pending_requests) {
            c.limits.max_pending = n;
        }
        if let Some(n) = count(h.http2_max_requests) {
            c.limits.max_requests = n;
        }
        if let Some(n) = count(h.max_retries) {
            c.limits.max_retries = n;
        }
        c.max_requests_per_connection = count(h.max_requests_per_connection).unwrap_or(0);
        c.idle_timeout = h.idle_timeout.map(Duration::from);
        c.http2.max_concurrent_streams = count(h.max_concurrent_streams).unwrap_or(0);
        c.http2.keepalive = h
            .http2_keepalive
            .as_ref()
            .and_then(|k| Some(Http2Keepalive { interval: k.interval?.into(), timeout: k.timeout?.into() }));
        if h.use_client_protocol {
            c.http = UpstreamHttp::Downstream;
        } else if h.h2_upgrade_policy == H2UpgradePolicy::Upgrade && protocol.is_http() {
            c.http = UpstreamHttp::Http2;
        }
    }
}

pub(super) fn outlier(o: &AuthoredOutlier) -> OutlierDetection {
    let base = o.base_ejection_time.map_or(Duration::from_secs(30), Duration::from);
    // The 1.0 field counted gateway errors.
    let legacy = count(o.consecutive_errors);
    OutlierDetection {
        consecutive_5xx: o.consecutive_5xx_errors.unwrap_or(if legacy.is_some() { 0 } else { 5 }),
        consecutive_gateway: o.consecutive_gateway_errors.or(legacy).unwrap_or(0),
        interval: o.interval.map_or(Duration::from_secs(10), Duration::from),
        base_ejection: base,
        max_ejection: base.max(Duration::from_secs(300)),
        max_percent: count(o.max_ejection_percent).unwrap_or(10).min(100),
        local_origin: o.split_external_local_origin_errors.then(|| LocalOrigin {
            consecutive: o.consecutive_local_origin_failures.unwrap_or(5),
            enforcing: 100,
            success_rate: None,
            failure_percentage: None,
        }),
        error_codes: o
            .outlier_detection_http_error_codes
            .iter()
            .filter_map(|c| u16::try_from(*c).ok())
            .collect(),
        ..OutlierDetection::default()
    }
}

/// TLS to the endpoints: what a rule says, else mesh mTLS to those that have a proxy. Endpoints
/// behind gateways are always mesh mTLS: gateways route by its server name.
fn transport(
    ctx: &Ctx<'_>,
    c: &mut Cluster,
    entry: &Entry,
    port: &ServicePort,
    subset: &str,
    policy: &TrafficPolicy,
) {
    let http2 = c.http == UpstreamHttp::Http2;
    let s = &entry.service;
    let mesh = |sni: String| ctx.mesh_tls(&entry.identities, sni, http2);
    for i in &entry.imports {
        let sni = member_sni(port.port, subset, &s.name, &s.namespace, i.cluster.as_str());
        c.tls_matches.push(TransportSocketMatch {
            name: format!("cluster-{}", i.cluster),
            labels: BTreeMap::from([
                (CLUSTER_LABEL.to_owned(), i.cluster.to_string()),
                (TLS_LABEL.to_owned(), "istio".to_owned()),
            ]),
            tls: Some(UpstreamTls {
                validation: Validation {
                    sans: peers_identities(ctx, entry, i),
                    ..mesh(String::new()).validation
                },
                ..mesh(sni)
            }),
            hbone: false,
        });
    }
    // A member's part of a service is the service to its workloads.
    let own_host = if entry.origin == Origin::Member {
        crate::hosts::service_host(&s.name, &s.namespace)
    } else {
        s.host.clone()
    };
    let own_sni = sni_name(port.port, subset, &own_host);
    let foreign =
        policy.tls.as_ref().is_some_and(|t| matches!(t.mode, ClientTlsMode::Simple | ClientTlsMode::Mutual));
    if !foreign && ctx.proxy.tunnels && entry.endpoints.iter().any(|e| hbone::is_reached(&e.labels)) {
        c.tls_matches.push(TransportSocketMatch {
            name: "hbone".to_owned(),
            labels: BTreeMap::from([(hbone::TUNNEL_LABEL.to_owned(), "http".to_owned())]),
            tls: Some(hbone::upstream_tls(ctx, &entry.identities)),
            hbone: true,
        });
    }
    // Connections to a peer's proxy share a session if it takes that; one behind a gateway leads to one workload
    // only, and connections should spread.
    let tunnelled = |mut tls: UpstreamTls| {
        if ctx.proxy.tunnels && !port.protocol.is_http() {
            tls.alpn.insert(0, TUNNEL_ALPN.to_owned());
        }
        tls
    };
    match &policy.tls {
        None => {
            let automatic = ctx.world.config.mesh.enable_auto_mtls != Some(false);
            if !automatic || s.mesh_external || s.resolution != Resolution::Static {
                return;
            }
            c.tls_matches.push(TransportSocketMatch {
                name: "tlsMode-istio".to_owned(),
                labels: BTreeMap::from([(TLS_LABEL.to_owned(), "istio".to_owned())]),
                tls: Some(tunnelled(mesh(own_sni))),
                hbone: false,
            });
            c.tls_matches.push(TransportSocketMatch {
                name: "tlsMode-disabled".to_owned(),
                labels: BTreeMap::new(),
                tls: None,
                hbone: false,
            });
        }
        Some(t) => match t.mode {
            ClientTlsMode::Disable => {}
            ClientTlsMode::IstioMutual => {
                let sni = if t.sni.is_empty() { own_sni } else { t.sni.clone() };
                let mut tls = mesh(sni);
                if !t.subject_alt_names.is_empty() {
                    tls.validation.sans = t.subject_alt_names.iter().map(StringMatch::exact).collect();
                }
                c.tls = Some(Box::new(tunnelled(tls)));
            }
            ClientTlsMode::Simple | ClientTlsMode::Mutual => {
                let server = Server {
                    host: &s.host,
                    identities: &entry.subject_alt_names,
                    by_name: s.resolution == Resolution::ByName,
                };
                c.tls = Some(Box::new(foreign_tls(ctx, &server, t, http2)));
            }
        },
    }
}

/// Who may serve a peer's part of a service. A peer of another trust domain has identities of that domain alone, whatever
/// it announces, and no workload here is one of them.
fn peers_identities(ctx: &Ctx<'_>, entry: &Entry, import: &ImportedService) -> Vec<StringMatch> {
    let Some(domain) = ctx.world.config.foreign_domain(&import.cluster) else {
        return entry.identities.iter().map(StringMatch::exact).collect();
    };
    let of_it = |id: &&String| SpiffeId::parse(id).is_ok_and(|id| id.trust_domain() == domain.as_str());
    let named: Vec<_> =
        import.service.service_accounts.iter().filter(of_it).map(StringMatch::exact).collect();
    // No name at all would be any name.
    if named.is_empty() { vec![StringMatch::prefix(format!("spiffe://{domain}/"))] } else { named }
}

/// What a gateway of the Gateway API shows to servers that ask.
fn of_gateway(ctx: &Ctx<'_>) -> Option<SecretRef> {
    let name = ctx.proxy.situation.client_certificate.as_ref()?;
    Some(SecretRef::Sds(format!("kubernetes://{name}")))
}

/// A server outside of the mesh.
struct Server<'a> {
    host: &'a str,
    /// What its certificate is for, unless the settings of TLS say.
    identities: &'a [String],
    /// It is found by the name that a request has for it.
    by_name: bool,
}

/// TLS to a server outside the mesh.
fn foreign_tls(ctx: &Ctx<'_>, server: &Server<'_>, t: &ClientTlsSettings, http2: bool) -> UpstreamTls {
    let mutual = t.mode == ClientTlsMode::Mutual;
    let credential = |suffix: &str| SecretRef::Sds(format!("kubernetes://{}{suffix}", t.credential_name));
    let certificate = match (mutual, t.credential_name.is_empty()) {
        (false, _) => of_gateway(ctx),
        (true, false) => Some(credential("")),
        (true, true) => {
            Some(SecretRef::Files { chain: t.client_certificate.clone(), key: t.private_key.clone() })
        }
    };
    let file = |f: &str| SecretRef::Files { chain: f.to_owned(), key: String::new() };
    let trusted = if t.insecure_skip_verify == Some(true) {
        None
    } else if !t.credential_name.is_empty() {
        Some(credential("-cacert"))
    } else if !t.ca_certificates.is_empty() {
        Some(file(&t.ca_certificates))
    } else {
        Some(file(SYSTEM_ROOTS))
    };
    let files = trusted.is_some() && t.credential_name.is_empty();
    let crl = (files && !t.ca_crl.is_empty()).then(|| t.ca_crl.clone());
    let sni = match t.sni.as_str() {
        "" if server.host.starts_with('*') => String::new(),
        "" => server.host.to_owned(),
        sni => sni.to_owned(),
    };
    let wanted = if t.subject_alt_names.is_empty() { server.identities } else { &t.subject_alt_names };
    let mut sans: Vec<StringMatch> = wanted.iter().map(StringMatch::exact).collect();
    // Where the host is found by name, that is the one to ask for, and to be shown.
    let by_name = sni.is_empty() && server.by_name;
    // A chain to a public root proves little without the name.
    if sans.is_empty() && trusted.is_some() && !sni.is_empty() {
        sans.push(StringMatch::exact(&sni));
    }
    UpstreamTls {
        certificate,
        validation: Validation { trusted, sans, crl },
        sni,
        by_name,
        alpn: if http2 { vec!["h2".to_owned()] } else { vec![] },
    }
}

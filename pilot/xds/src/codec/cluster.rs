//! Clusters.

use std::{collections::HashMap, net::IpAddr, time::Duration};

pub(super) use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::{
    envoy::{
        config::{cluster::v3::cluster as c, core::v3 as core},
        extensions::{
            load_balancing_policies::client_side_weighted_round_robin::v3::ClientSideWeightedRoundRobin,
            upstreams::http::v3 as up,
        },
        r#type::v3 as typ,
    },
    google::protobuf as gp,
};
use mesh_model::proxy::{
    CircuitBreakers, Cluster, Discovery, Http2Keepalive, LbPolicy, LeastRequest, OutlierDetection,
    ProxyProtocolVersion, RetryBudget, SlowStart, TcpKeepalive, TransportSocketMatch, UpstreamHttp,
    UpstreamHttp2, UpstreamTls, UtilizationLb,
};

use super::{At, Bad, Res, common::*, each, endpoint, names, refuse, tls};

pub(super) mod health;
mod outlier;

/// Name of our policy among Envoy's extensions. It has no parameters.
const PEAK_EWMA: &str = "flotilla.peak_ewma";
const WEIGHTED: &str = "envoy.load_balancing_policies.client_side_weighted_round_robin";
const EMPTY: &str = "type.googleapis.com/google.protobuf.Empty";

/// Name of a transport socket whose TLS session carries CONNECT streams. Envoy has no such socket; it goes by the
/// type of the configuration, so that a foreign proxy would open plain mutual TLS to the endpoint.
const HBONE: &str = "flotilla.transport_sockets.hbone";
/// In Istio's metadata of a cluster.
const SERVICES: &str = "services";
const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
/// Envoy's defaults for absent fields.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const PANIC_THRESHOLD: u32 = 50;
/// Linux's.
const KEEPALIVE_TIME: Duration = Duration::from_secs(7200);
const DEFAULT_LIMITS: CircuitBreakers = CircuitBreakers {
    max_connections: 1024,
    max_pending: 1024,
    max_requests: 1024,
    max_retries: 3,
    retry_budget: None,
};

pub(super) fn encode(m: &Cluster) -> pb::Cluster {
    use c::{DiscoveryType as T, LbPolicy as P};
    let mut out = pb::Cluster {
        name: m.name.clone(),
        connect_timeout: Some(duration(m.connect_timeout)),
        transport_socket: m.tls.as_deref().map(tls::upstream),
        transport_socket_matches: m.tls_matches.iter().map(socket_match).collect(),
        circuit_breakers: Some(limits(&m.limits)),
        outlier_detection: m.outlier.as_deref().map(outlier::encode),
        health_checks: m.health.iter().map(|h| health::encode(h)).collect(),
        close_connections_on_host_health_failure: m.close_on_health_failure,
        alt_stat_name: m.stat_name.clone(),
        per_connection_buffer_limit_bytes: m.buffer_limit.and_then(u32v),
        ..Default::default()
    };
    let kind = match &m.discovery {
        Discovery::Eds(service) => {
            out.eds_cluster_config =
                Some(c::EdsClusterConfig { eds_config: ads(), service_name: service.clone() });
            T::Eds
        }
        Discovery::Static(a) => {
            out.load_assignment = Some(endpoint::encode(a));
            T::Static
        }
        Discovery::StrictDns(a) => {
            out.load_assignment = Some(endpoint::encode(a));
            T::StrictDns
        }
        Discovery::LogicalDns(a) => {
            out.load_assignment = Some(endpoint::encode(a));
            T::LogicalDns
        }
        Discovery::OriginalDst => T::OriginalDst,
        // Of another kind, which follows.
        Discovery::ByName(_) => T::Static,
    };
    if matches!(kind, T::StrictDns | T::LogicalDns) {
        out.dns_lookup_family = c::DnsLookupFamily::V4Preferred.into();
        // Its successor is in a type of cluster that proxies of last year do not have.
        #[allow(deprecated)]
        {
            out.dns_refresh_rate = m.dns_refresh.map(duration);
        }
    }
    out.cluster_discovery_type = Some(c::ClusterDiscoveryType::Type(kind.into()));
    if let Discovery::ByName(n) = &m.discovery {
        let (kind, metadata) = names::cluster(n);
        out.cluster_discovery_type = Some(c::ClusterDiscoveryType::ClusterType(kind));
        out.metadata = metadata;
    }
    if !m.namespace.is_empty() {
        let all = out.metadata.get_or_insert_default();
        all.filter_metadata.insert(endpoint::ISTIO.to_owned(), services(&m.name, &m.namespace));
    }
    let policy = match m.lb {
        // The only policy that Envoy allows there.
        _ if matches!(m.discovery, Discovery::OriginalDst | Discovery::ByName(_)) => P::ClusterProvided,
        LbPolicy::RoundRobin => {
            out.lb_config = m.slow_start.as_ref().map(|s| {
                let slow_start_config = Some(slow_start(s));
                c::LbConfig::RoundRobinLbConfig(c::RoundRobinLbConfig { slow_start_config })
            });
            P::RoundRobin
        }
        LbPolicy::LeastRequest(l) => {
            let default = LeastRequest::default();
            if m.slow_start.is_some() || l != default {
                out.lb_config = Some(c::LbConfig::LeastRequestLbConfig(c::LeastRequestLbConfig {
                    slow_start_config: m.slow_start.as_ref().map(slow_start),
                    choice_count: if l.choices == default.choices { None } else { u32v(l.choices) },
                    active_request_bias: (l.bias != default.bias).then(|| core::RuntimeDouble {
                        default_value: f64::from(l.bias) / 1000.0,
                        ..Default::default()
                    }),
                }));
            }
            P::LeastRequest
        }
        LbPolicy::Utilization => {
            let config = core::TypedExtensionConfig {
                name: WEIGHTED.to_owned(),
                typed_config: Some(any(&utilization(
                    m.utilization.as_deref().unwrap_or(&UtilizationLb::default()),
                ))),
            };
            let policy = pb::load_balancing_policy::Policy { typed_extension_config: Some(config) };
            out.load_balancing_policy = Some(pb::LoadBalancingPolicy { policies: vec![policy] });
            P::RoundRobin
        }
        LbPolicy::PeakEwma => {
            let config = core::TypedExtensionConfig {
                name: PEAK_EWMA.to_owned(),
                typed_config: Some(gp::Any { type_url: EMPTY.to_owned(), value: Vec::new() }),
            };
            let policy = pb::load_balancing_policy::Policy { typed_extension_config: Some(config) };
            out.load_balancing_policy = Some(pb::LoadBalancingPolicy { policies: vec![policy] });
            P::RoundRobin
        }
        LbPolicy::Random => P::Random,
        LbPolicy::RingHash(size) => {
            out.lb_config = Some(c::LbConfig::RingHashLbConfig(c::RingHashLbConfig {
                minimum_ring_size: Some(gp::UInt64Value { value: size }),
                ..Default::default()
            }));
            P::RingHash
        }
        LbPolicy::Maglev(size) => {
            out.lb_config = Some(c::LbConfig::MaglevLbConfig(c::MaglevLbConfig {
                table_size: Some(gp::UInt64Value { value: size }),
            }));
            P::Maglev
        }
    };
    out.lb_policy = policy.into();
    out.common_lb_config = Some(c::CommonLbConfig {
        healthy_panic_threshold: Some(typ::Percent { value: f64::from(m.panic_threshold) }),
        locality_config_specifier: m.locality_weighted.then(|| {
            c::common_lb_config::LocalityConfigSpecifier::LocalityWeightedLbConfig(
                c::common_lb_config::LocalityWeightedLbConfig::default(),
            )
        }),
        ignore_new_hosts_until_first_hc: m.health.as_ref().is_some_and(|h| h.ignore_new_hosts),
        ..Default::default()
    });
    if let Some(k) = m.keepalive {
        let secs = |d: Duration| u32v(u32::try_from(d.as_secs()).unwrap_or(u32::MAX));
        out.upstream_connection_options = Some(pb::UpstreamConnectionOptions {
            tcp_keepalive: Some(core::TcpKeepalive {
                keepalive_probes: k.probes.and_then(u32v),
                keepalive_time: secs(k.time),
                keepalive_interval: k.interval.and_then(secs),
            }),
            ..Default::default()
        });
    }
    if let Some((first, more)) = m.source.split_first() {
        let address = |ip: &IpAddr| core::SocketAddress {
            address: ip.to_string(),
            port_specifier: Some(core::socket_address::PortSpecifier::PortValue(0)),
            ..Default::default()
        };
        let extra = |ip| core::ExtraSourceAddress { address: Some(address(ip)), ..Default::default() };
        out.upstream_bind_config = Some(core::BindConfig {
            source_address: Some(address(first)),
            extra_source_addresses: more.iter().map(extra).collect(),
            ..Default::default()
        });
    }
    if let Some(v) = m.proxy_protocol {
        for s in out.transport_socket_matches.iter_mut().filter_map(|m| m.transport_socket.as_mut()) {
            *s = tls::proxy_protocol(v, std::mem::take(s));
        }
        if out.transport_socket.is_some() || out.transport_socket_matches.is_empty() {
            let inner = out.transport_socket.take().unwrap_or_else(tls::raw_buffer);
            out.transport_socket = Some(tls::proxy_protocol(v, inner));
        }
    }
    out.typed_extension_protocol_options = HashMap::from([(HTTP_OPTIONS.to_owned(), any(&http(m)))]);
    out
}

fn http(m: &Cluster) -> up::HttpProtocolOptions {
    use up::http_protocol_options as o;
    let explicit = |p| {
        o::UpstreamProtocolOptions::ExplicitHttpConfig(o::ExplicitHttpConfig { protocol_config: Some(p) })
    };
    let h1 = || core::Http1ProtocolOptions {
        header_key_format: m.preserve_case.then(super::http::preserve_case),
        ..Default::default()
    };
    let h2 = || core::Http2ProtocolOptions {
        allow_connect: true,
        max_concurrent_streams: Some(m.http2.max_concurrent_streams).filter(|n| *n > 0).and_then(u32v),
        connection_keepalive: m.http2.keepalive.map(|k| core::KeepaliveSettings {
            interval: Some(duration(k.interval)),
            timeout: Some(duration(k.timeout)),
            ..Default::default()
        }),
        ..Default::default()
    };
    let protocol = match m.http {
        UpstreamHttp::Http1 => explicit(o::explicit_http_config::ProtocolConfig::HttpProtocolOptions(h1())),
        UpstreamHttp::Http2 => explicit(o::explicit_http_config::ProtocolConfig::Http2ProtocolOptions(h2())),
        UpstreamHttp::Downstream => {
            o::UpstreamProtocolOptions::UseDownstreamProtocolConfig(o::UseDownstreamHttpConfig {
                http_protocol_options: Some(h1()),
                http2_protocol_options: Some(h2()),
                ..Default::default()
            })
        }
        UpstreamHttp::Auto => o::UpstreamProtocolOptions::AutoConfig(o::AutoHttpConfig {
            http_protocol_options: Some(h1()),
            http2_protocol_options: Some(h2()),
            ..Default::default()
        }),
    };
    let max = m.max_requests_per_connection;
    let limited = m.idle_timeout.is_some() || m.max_connection_duration.is_some() || max != 0;
    let common = limited.then(|| core::HttpProtocolOptions {
        idle_timeout: m.idle_timeout.map(duration),
        max_connection_duration: m.max_connection_duration.map(duration),
        max_requests_per_connection: if max == 0 { None } else { u32v(max) },
        ..Default::default()
    });
    up::HttpProtocolOptions {
        common_http_protocol_options: common,
        upstream_protocol_options: Some(protocol),
        outlier_detection: m.outlier.as_deref().and_then(outlier::errors),
        upstream_http_protocol_options: m.tls.as_deref().filter(|t| t.by_name).map(|t| {
            core::UpstreamHttpProtocolOptions {
                auto_sni: true,
                auto_san_validation: t.is_proven_by_name(),
                ..Default::default()
            }
        }),
        ..Default::default()
    }
}

fn socket_match(m: &TransportSocketMatch) -> c::TransportSocketMatch {
    let mut socket = m.tls.as_ref().map_or_else(tls::raw_buffer, tls::upstream);
    if m.hbone {
        socket.name = HBONE.to_owned();
    }
    c::TransportSocketMatch {
        name: m.name.clone(),
        r#match: Some(string_struct(&m.labels)),
        transport_socket: Some(socket),
    }
}

fn limits(l: &CircuitBreakers) -> pb::CircuitBreakers {
    pb::CircuitBreakers {
        thresholds: vec![pb::circuit_breakers::Thresholds {
            max_connections: u32v(l.max_connections),
            max_pending_requests: u32v(l.max_pending),
            max_requests: u32v(l.max_requests),
            max_retries: u32v(l.max_retries),
            retry_budget: l.retry_budget.map(|b| pb::circuit_breakers::thresholds::RetryBudget {
                budget_percent: Some(typ::Percent { value: f64::from(b.share) / 100.0 }),
                min_retry_concurrency: u32v(b.min_concurrency),
                budget_interval: (!b.interval.is_zero()).then(|| duration(b.interval)),
            }),
            track_remaining: true,
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn to_limits(b: Option<pb::CircuitBreakers>) -> Res<CircuitBreakers> {
    let Some(b) = b else { return Ok(DEFAULT_LIMITS) };
    refuse!(b; per_host_thresholds);
    // Only routes that ask for high priority use the other set, and those are refused.
    let Some(t) = b.thresholds.into_iter().find(|t| t.priority == 0) else { return Ok(DEFAULT_LIMITS) };
    refuse!(t; max_connection_pools);
    let or = |v: Option<gp::UInt32Value>, d| v.map_or(d, |v| v.value);
    // Envoy's defaults are a fifth of the requests, and three.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let share =
        |p: Option<typ::Percent>| (p.map_or(20.0, |p| p.value).clamp(0.0, 100.0) * 100.0).round() as u32;
    let retry_budget = match t.retry_budget {
        None => None,
        Some(b) => Some(RetryBudget {
            share: share(b.budget_percent),
            min_concurrency: or(b.min_retry_concurrency, 3),
            interval: opt(b.budget_interval).at("budget_interval")?.unwrap_or_default(),
        }),
    };
    Ok(CircuitBreakers {
        max_connections: or(t.max_connections, DEFAULT_LIMITS.max_connections),
        max_pending: or(t.max_pending_requests, DEFAULT_LIMITS.max_pending),
        max_requests: or(t.max_requests, DEFAULT_LIMITS.max_requests),
        max_retries: or(t.max_retries, DEFAULT_LIMITS.max_retries),
        retry_budget,
    })
}

fn slow_start(s: &SlowStart) -> c::SlowStartConfig {
    c::SlowStartConfig {
        slow_start_window: Some(duration(s.window)),
        aggression: Some(core::RuntimeDouble {
            default_value: f64::from(s.aggression) / 1000.0,
            ..Default::default()
        }),
        min_weight_percent: Some(typ::Percent { value: f64::from(s.min_weight) / 100.0 }),
    }
}

fn utilization(u: &UtilizationLb) -> ClientSideWeightedRoundRobin {
    ClientSideWeightedRoundRobin {
        blackout_period: Some(duration(u.blackout)),
        weight_expiration_period: Some(duration(u.expiration)),
        weight_update_period: Some(duration(u.update)),
        // A multiple of 1/100 that a float of 32 bits gives back as it was.
        #[allow(clippy::cast_precision_loss)]
        error_utilization_penalty: Some(gp::FloatValue { value: u.error_penalty as f32 / 100.0 }),
        metric_names_for_computing_utilization: u.metrics.clone(),
        ..Default::default()
    }
}

fn to_utilization(m: ClientSideWeightedRoundRobin) -> Res<UtilizationLb> {
    refuse!(m; slow_start_config);
    if m.enable_oob_load_report.is_some_and(|b| b.value) {
        return Err(Bad::unsupported("enable_oob_load_report", "reports beside the traffic"));
    }
    let default = UtilizationLb::default();
    let penalty = m.error_utilization_penalty.map_or(1.0, |v| v.value);
    if !(0.0..=1e6).contains(&penalty) {
        return Err(Bad::new("error_utilization_penalty", "is not within 0..1000000"));
    }
    Ok(UtilizationLb {
        // Within range by the check.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        error_penalty: (penalty * 100.0).round() as u32,
        metrics: m.metric_names_for_computing_utilization,
        blackout: opt(m.blackout_period).at("blackout_period")?.unwrap_or(default.blackout),
        expiration: opt(m.weight_expiration_period)
            .at("weight_expiration_period")?
            .unwrap_or(default.expiration),
        update: opt(m.weight_update_period).at("weight_update_period")?.unwrap_or(default.update),
    })
}

/// Absent parts have Envoy's defaults: an aggression of 1 and a tenth of the weight.
fn to_slow_start(s: c::SlowStartConfig) -> Res<Option<SlowStart>> {
    let aggression = s.aggression.map_or(1.0, |a| a.default_value);
    if !(aggression > 0.0 && aggression <= 1000.0) {
        return Err(Bad::new("aggression", "is not above 0 and at most 1000"));
    }
    let least = s.min_weight_percent.map_or(10.0, |p| p.value);
    // Within range by the checks.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let thousandths = |v: f64, by: f64| (v * by).round() as u32;
    let window = opt(s.slow_start_window).at("slow_start_window")?.unwrap_or_default();
    Ok((!window.is_zero()).then(|| SlowStart {
        window,
        aggression: thousandths(aggression, 1000.0).max(1),
        min_weight: thousandths(least.clamp(0.0, 100.0), 100.0),
    }))
}

#[allow(deprecated)]
pub(super) fn decode(mut m: pb::Cluster) -> Res<Cluster> {
    refuse!(m;
        transport_socket_matcher, max_requests_per_connection,
        lb_subset_config, filters, upstream_config, use_tcp_for_dns_lookups,
        dns_resolvers, connection_pool_per_downstream_connection, http_protocol_options,
        http2_protocol_options, common_http_protocol_options, upstream_http_protocol_options
    );
    let namespace = to_namespace(m.metadata.as_mut());
    let discovery = to_discovery(&mut m)?;
    let utilization = to_weighted(&mut m).at("load_balancing_policy")?.map(Box::new);
    let (lb, slow_start) = to_lb(&mut m, &discovery)?;
    let Http { version: http, http2, preserve_case, common, error_codes, names } =
        to_http(&mut m).at("typed_extension_protocol_options")?;
    let common_lb = m.common_lb_config.take().unwrap_or_default();
    let checks = std::mem::take(&mut m.health_checks);
    if checks.len() > 1 {
        return Err(Bad::unsupported("health_checks", "more than one health check"));
    }
    let ignore_new = common_lb.ignore_new_hosts_until_first_hc;
    let health = each("health_checks", checks, |h| health::decode(h, ignore_new))?.pop().map(Box::new);
    let locality_weighted = match common_lb.locality_config_specifier {
        Some(c::common_lb_config::LocalityConfigSpecifier::LocalityWeightedLbConfig(_)) => true,
        // Zone-aware routing needs the proxy's own cluster, which the mesh does not use; without it
        // Envoy falls back to plain balancing as well.
        Some(c::common_lb_config::LocalityConfigSpecifier::ZoneAwareLbConfig(_)) | None => false,
    };
    let source = m.upstream_bind_config.take().map_or(Ok(vec![]), to_source).at("upstream_bind_config")?;
    let (proxy_protocol, socket) = to_sockets(&mut m)?;
    let keepalive = m.upstream_connection_options.take().and_then(|o| o.tcp_keepalive).map(to_keepalive);
    Ok(Cluster {
        connect_timeout: m.connect_timeout.map_or(Ok(CONNECT_TIMEOUT), to_duration).at("connect_timeout")?,
        http,
        tls: to_named(socket, names, &discovery)?.map(Box::new),
        tls_matches: each("transport_socket_matches", m.transport_socket_matches, to_socket_match)?,
        limits: to_limits(m.circuit_breakers).at("circuit_breakers")?,
        outlier: m
            .outlier_detection
            .map(outlier::decode)
            .transpose()
            .at("outlier_detection")?
            .map(|o| Box::new(OutlierDetection { error_codes, ..o })),
        health,
        close_on_health_failure: m.close_connections_on_host_health_failure,
        lb: if utilization.is_some() { LbPolicy::Utilization } else { lb },
        utilization,
        slow_start,
        max_requests_per_connection: common.max_requests_per_connection.map_or(0, |v| v.value),
        idle_timeout: opt(common.idle_timeout)?,
        max_connection_duration: opt(common.max_connection_duration)?.filter(|d| !d.is_zero()),
        http2,
        // A percentage by its type; truncation is what Envoy does.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        panic_threshold: common_lb
            .healthy_panic_threshold
            .map_or(PANIC_THRESHOLD, |p| p.value.clamp(0.0, 100.0) as u32),
        locality_weighted,
        keepalive,
        source,
        proxy_protocol,
        stat_name: m.alt_stat_name,
        buffer_limit: m.per_connection_buffer_limit_bytes.map(|v| v.value),
        preserve_case,
        dns_refresh: opt(m.dns_refresh_rate).at("dns_refresh_rate")?,
        discovery,
        name: m.name,
        namespace,
    })
}

/// `services` of Istio's metadata: that of a cluster such as `outbound|443||api.example`.
fn services(cluster: &str, namespace: &str) -> gp::Struct {
    let host = cluster.rsplit('|').next().unwrap_or_default().to_owned();
    let fields = [("host", &host), ("name", &host), ("namespace", &namespace.to_owned())];
    let fields = fields.map(|(k, v)| (k.to_owned(), v));
    let service = string_struct(fields.iter().map(|(k, v)| (k, *v)));
    let value = |kind| gp::Value { kind: Some(kind) };
    let all = gp::ListValue { values: vec![value(gp::value::Kind::StructValue(service))] };
    let fields = HashMap::from([(SERVICES.to_owned(), value(gp::value::Kind::ListValue(all)))]);
    gp::Struct { fields }
}

/// Of the first of them; whatever else may be there says nothing to us.
fn to_namespace(m: Option<&mut core::Metadata>) -> String {
    use gp::value::Kind;
    let kind = m.and_then(|m| m.filter_metadata.get_mut(endpoint::ISTIO)?.fields.remove(SERVICES)?.kind);
    let Some(Kind::ListValue(all)) = kind else { return String::new() };
    match all.values.into_iter().next().and_then(|v| v.kind) {
        Some(Kind::StructValue(s)) => to_string_map(s).remove("namespace").unwrap_or_default(),
        _ => String::new(),
    }
}

/// TLS to the hosts, whose name may be that of the request (`auto_sni`, `auto_san_validation`). Where hosts are not found by
/// it, all requests of a connection would have to be of one name.
fn to_named(
    socket: Option<core::TransportSocket>,
    (sni, san): (bool, bool),
    discovery: &Discovery,
) -> Res<Option<UpstreamTls>> {
    let mut tls = socket.map(tls::to_upstream).transpose().at("transport_socket")?.flatten();
    if !sni && !san {
        return Ok(tls);
    }
    let field = "upstream_http_protocol_options";
    if !matches!(discovery, Discovery::ByName(_)) {
        return Err(Bad::unsupported(field, "a name of TLS for each request, unless hosts are found by it"));
    }
    if let Some(t) = &mut tls {
        t.by_name = sni;
        if san != t.is_proven_by_name() {
            return Err(Bad::unsupported(field, "auto_san_validation other than by auto_sni"));
        }
    }
    Ok(tls)
}

fn to_source(b: core::BindConfig) -> Res<Vec<IpAddr>> {
    refuse!(b; socket_options, local_address_selector);
    let mut all: Vec<core::SocketAddress> = b.source_address.into_iter().collect();
    for e in b.extra_source_addresses {
        refuse!(e; socket_options);
        all.extend(e.address);
    }
    all.into_iter()
        .map(|a| {
            a.address
                .parse()
                .map_err(|_| Bad::new("source_address", format!("{:?} is no IP address", a.address)))
        })
        .collect()
}

fn to_discovery(m: &mut pb::Cluster) -> Res<Discovery> {
    use c::DiscoveryType as T;
    let kind = match &m.cluster_discovery_type {
        Some(c::ClusterDiscoveryType::Type(t)) => T::try_from(*t).map_err(|_| Bad::unsupported("type", t))?,
        Some(c::ClusterDiscoveryType::ClusterType(t)) => {
            return names::to_cluster(t.clone(), m.metadata.take()).map(Discovery::ByName);
        }
        None => T::Static,
    };
    let mut inline = || endpoint::decode(m.load_assignment.take().unwrap_or_default()).at("load_assignment");
    Ok(match kind {
        T::Eds => Discovery::Eds(m.eds_cluster_config.take().unwrap_or_default().service_name),
        T::Static => Discovery::Static(inline()?),
        T::StrictDns => Discovery::StrictDns(inline()?),
        T::LogicalDns => Discovery::LogicalDns(inline()?),
        T::OriginalDst => {
            if let Some(c::LbConfig::OriginalDstLbConfig(o)) = m.lb_config.take() {
                refuse!(o; use_http_header, upstream_port_override, metadata_key);
            }
            Discovery::OriginalDst
        }
    })
}

fn to_lb(m: &mut pb::Cluster, discovery: &Discovery) -> Res<(LbPolicy, Option<SlowStart>)> {
    use c::LbPolicy as P;
    let policy = P::try_from(m.lb_policy).map_err(|_| Bad::unsupported("lb_policy", m.lb_policy))?;
    let config = m.lb_config.take();
    if let Some(extension) = m.load_balancing_policy.take() {
        return to_extension(extension).at("load_balancing_policy").map(|p| (p, None));
    }
    let slow = |s: Option<c::SlowStartConfig>| {
        s.map(to_slow_start).transpose().map(Option::flatten).at("slow_start_config")
    };
    let policy = match (policy, config) {
        (_, _) if matches!(discovery, Discovery::OriginalDst | Discovery::ByName(_)) => LbPolicy::RoundRobin,
        (P::RoundRobin, Some(c::LbConfig::RoundRobinLbConfig(o))) => {
            return Ok((LbPolicy::RoundRobin, slow(o.slow_start_config)?));
        }
        (P::LeastRequest, Some(c::LbConfig::LeastRequestLbConfig(o))) => {
            let slow = slow(o.slow_start_config)?;
            return Ok((to_least_request(o.choice_count, o.active_request_bias)?, slow));
        }
        (P::RoundRobin, _) => LbPolicy::RoundRobin,
        (P::LeastRequest, _) => LbPolicy::LeastRequest(LeastRequest::default()),
        (P::Random, _) => LbPolicy::Random,
        (P::RingHash, config) => {
            let o = match config {
                Some(c::LbConfig::RingHashLbConfig(o)) => o,
                _ => Default::default(),
            };
            refuse!(o; hash_function);
            LbPolicy::RingHash(o.minimum_ring_size.map_or(1024, |v| v.value))
        }
        (P::Maglev, config) => {
            let size = match config {
                Some(c::LbConfig::MaglevLbConfig(o)) => o.table_size.map(|v| v.value),
                _ => None,
            };
            LbPolicy::Maglev(size.unwrap_or(65_537))
        }
        (P::ClusterProvided | P::LoadBalancingPolicyConfig, _) => {
            return Err(Bad::unsupported("lb_policy", policy.as_str_name()));
        }
    };
    Ok((policy, None))
}

fn to_least_request(choices: Option<gp::UInt32Value>, bias: Option<core::RuntimeDouble>) -> Res<LbPolicy> {
    let choices = choices.map_or(2, |v| v.value);
    if !(2..=64).contains(&choices) {
        return Err(Bad::new("choice_count", format!("{choices} is not within 2..64")));
    }
    let bias = bias.map_or(1.0, |b| b.default_value);
    if !(0.0..=100.0).contains(&bias) {
        return Err(Bad::new("active_request_bias", format!("{bias} is not within 0..100")));
    }
    // Within range by the check.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let bias = (bias * 1000.0).round() as u32;
    Ok(LbPolicy::LeastRequest(LeastRequest { choices, bias }))
}

/// Takes the policy by utilisation, if that is the one.
fn to_weighted(m: &mut pb::Cluster) -> Res<Option<UtilizationLb>> {
    let policies = m.load_balancing_policy.as_ref().map_or(&[][..], |l| l.policies.as_slice());
    let configs = policies.iter().filter_map(|p| p.typed_extension_config.as_ref()?.typed_config.as_ref());
    // Of those that are known the first counts.
    let ours = |p: &pb::load_balancing_policy::Policy| {
        p.typed_extension_config.as_ref().is_some_and(|e| e.name == PEAK_EWMA)
    };
    if policies.first().is_some_and(ours) {
        return Ok(None);
    }
    let found = configs.into_iter().find(|a| is::<ClientSideWeightedRoundRobin>(a));
    let Some(config) = found.map(typed::<ClientSideWeightedRoundRobin>).transpose()? else { return Ok(None) };
    m.load_balancing_policy = None;
    to_utilization(config).map(Some)
}

/// The first policy of the list that is known, which is ours: Envoy's own come as `lb_policy`.
fn to_extension(m: pb::LoadBalancingPolicy) -> Res<LbPolicy> {
    let names: Vec<String> = m
        .policies
        .into_iter()
        .filter_map(|p| p.typed_extension_config)
        .map(|e| match e.typed_config {
            Some(c) if e.name == PEAK_EWMA && !c.value.is_empty() => format!("{PEAK_EWMA} with parameters"),
            _ => e.name,
        })
        .collect();
    if names.iter().any(|n| n == PEAK_EWMA) {
        return Ok(LbPolicy::PeakEwma);
    }
    Err(Bad::unsupported("policies", format_args!("none of {names:?}")))
}

fn to_keepalive(k: core::TcpKeepalive) -> TcpKeepalive {
    let secs = |v: gp::UInt32Value| Duration::from_secs(u64::from(v.value));
    TcpKeepalive {
        time: k.keepalive_time.map_or(KEEPALIVE_TIME, secs),
        interval: k.keepalive_interval.map(secs),
        probes: k.keepalive_probes.map(|v| v.value),
    }
}

/// How HTTP is spoken upstream.
#[derive(Default)]
struct Http {
    version: UpstreamHttp,
    http2: UpstreamHttp2,
    preserve_case: bool,
    common: core::HttpProtocolOptions,
    /// What passive health takes for errors.
    error_codes: Vec<u16>,
    /// `auto_sni` and `auto_san_validation`.
    names: (bool, bool),
}

fn to_http2(h: Option<core::Http2ProtocolOptions>) -> Res<UpstreamHttp2> {
    let h = h.unwrap_or_default();
    let keepalive = match h.connection_keepalive {
        None => None,
        Some(k) => {
            refuse!(k; connection_idle_interval);
            let interval = opt(k.interval).at("interval")?.filter(|d| !d.is_zero());
            let timeout = opt(k.timeout).at("timeout")?.unwrap_or_default();
            interval.map(|interval| Http2Keepalive { interval, timeout })
        }
    };
    Ok(UpstreamHttp2 { max_concurrent_streams: h.max_concurrent_streams.map_or(0, |v| v.value), keepalive })
}

fn to_http(m: &mut pb::Cluster) -> Res<Http> {
    use up::http_protocol_options as o;
    let mut options = std::mem::take(&mut m.typed_extension_protocol_options);
    let ours = options.remove(HTTP_OPTIONS);
    if let Some(name) = options.into_keys().next() {
        return Err(Bad::unsupported(name, "this extension"));
    }
    let Some(a) = ours else { return Ok(Http::default()) };
    let h: up::HttpProtocolOptions = typed(&a)?;
    refuse!(h;
        http_filters, header_validation_config, request_mirror_policies, hash_policy, retry_policy
    );
    let names = h.upstream_http_protocol_options.unwrap_or_default();
    refuse!(names; override_auto_sni_header);
    let common = h.common_http_protocol_options.unwrap_or_default();
    refuse!(common; max_stream_duration);
    let (version, http2, http1) = match h.upstream_protocol_options {
        Some(o::UpstreamProtocolOptions::ExplicitHttpConfig(e)) => match e.protocol_config {
            Some(o::explicit_http_config::ProtocolConfig::Http2ProtocolOptions(h)) => {
                (UpstreamHttp::Http2, Some(h), None)
            }
            Some(o::explicit_http_config::ProtocolConfig::Http3ProtocolOptions(_)) => {
                return Err(Bad::unsupported("explicit_http_config", "HTTP/3"));
            }
            Some(o::explicit_http_config::ProtocolConfig::HttpProtocolOptions(h)) => {
                (UpstreamHttp::Http1, None, Some(h))
            }
            None => (UpstreamHttp::Http1, None, None),
        },
        Some(o::UpstreamProtocolOptions::UseDownstreamProtocolConfig(c)) => {
            (UpstreamHttp::Downstream, c.http2_protocol_options, c.http_protocol_options)
        }
        Some(o::UpstreamProtocolOptions::AutoConfig(c)) => {
            (UpstreamHttp::Auto, c.http2_protocol_options, c.http_protocol_options)
        }
        None => (UpstreamHttp::Http1, None, None),
    };
    let preserve_case = super::http::to_preserve_case(http1.as_ref());
    let http2 = to_http2(http2).at("http2_protocol_options")?;
    let error_codes = match h.outlier_detection {
        Some(o) => outlier::to_errors(o).at("outlier_detection")?,
        None => vec![],
    };
    Ok(Http {
        version,
        http2,
        preserve_case,
        common,
        error_codes,
        names: (names.auto_sni, names.auto_san_validation),
    })
}

/// Takes the PROXY protocol off all sockets of a cluster; it is of the cluster here, so they must agree.
fn to_sockets(m: &mut pb::Cluster) -> Res<(Option<ProxyProtocolVersion>, Option<core::TransportSocket>)> {
    let (mut version, socket) = match m.transport_socket.take() {
        None => (None, None),
        Some(s) => tls::to_proxy_protocol(s).at("transport_socket").map(|(v, s)| (Some(v), s))?,
    };
    for (i, entry) in m.transport_socket_matches.iter_mut().enumerate() {
        let Some(s) = entry.transport_socket.take() else { continue };
        let field = format!("transport_socket_matches[{i}].transport_socket");
        let (v, inner) = tls::to_proxy_protocol(s).at(&field)?;
        entry.transport_socket = Some(inner.unwrap_or_else(tls::raw_buffer));
        if *version.get_or_insert(v) != v {
            return Err(Bad::unsupported(field, "a PROXY protocol of one socket and not of another"));
        }
    }
    Ok((version.flatten(), socket))
}

fn to_socket_match(m: c::TransportSocketMatch) -> Res<TransportSocketMatch> {
    let socket = m.transport_socket.ok_or_else(|| Bad::new("transport_socket", "is missing"))?;
    Ok(TransportSocketMatch {
        hbone: socket.name == HBONE,
        name: m.name,
        labels: m.r#match.map(to_string_map).unwrap_or_default(),
        tls: tls::to_upstream(socket).at("transport_socket")?,
    })
}

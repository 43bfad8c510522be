//! Listeners, filter chains and network filters.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

pub(super) use envoy_types::pb::envoy::config::listener::v3 as pb;
use envoy_types::pb::{
    envoy::{
        config::{accesslog::v3 as al, core::v3 as core, listener::v3 as l},
        extensions::filters::{
            listener::{
                http_inspector::v3::HttpInspector, original_dst::v3::OriginalDst,
                proxy_protocol::v3::ProxyProtocol, tls_inspector::v3::TlsInspector,
            },
            network::{
                connection_limit::v3::ConnectionLimit, ext_authz::v3::ExtAuthz,
                http_connection_manager::v3::HttpConnectionManager, local_ratelimit::v3::LocalRateLimit,
                rbac::v3::Rbac, sni_cluster::v3::SniCluster,
                sni_dynamic_forward_proxy::v3::FilterConfig as SniNames, tcp_proxy::v3 as tcp,
            },
            udp::udp_proxy::v3::UdpProxyConfig,
        },
    },
    google::protobuf as gp,
};
use mesh_model::proxy::{
    AccessLog, Direction, FilterChain, FilterChainMatch, HeaderOps, Listener, Mixer, NameCache,
    NetworkFilter, TcpProxy, TransportProtocol, Tunneling, WeightedCluster,
};
use prost::Name;

use super::{
    At, Bad, Res, common::*, each, ext_authz, http, names, on_demand, quic, rate_limit, rbac, refuse,
    telemetry, tls, udp,
};

/// Envoy's default.
const INSPECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Envoy's default.
const TCP_IDLE: Duration = Duration::from_secs(3600);

pub(super) fn encode(m: &Listener) -> pb::Listener {
    let mut filters = Vec::new();
    filters.extend(m.udp.as_deref().map(udp::filter));
    if m.inspect_quic {
        filters.push(listener_filter(QUIC_INSPECTOR, &TlsInspector::default()));
    }
    // The header of the PROXY protocol precedes everything else on the wire.
    if m.proxy_protocol {
        filters.push(listener_filter("envoy.filters.listener.proxy_protocol", &ProxyProtocol::default()));
    }
    // A UDP listener has no filter for that: the address comes with each datagram.
    if m.use_original_dst && m.udp.is_none() {
        filters.push(listener_filter("envoy.filters.listener.original_dst", &OriginalDst::default()));
    }
    if m.inspect_tls {
        filters.push(listener_filter("envoy.filters.listener.tls_inspector", &TlsInspector::default()));
    }
    if m.inspect_http {
        filters.push(listener_filter("envoy.filters.listener.http_inspector", &HttpInspector::default()));
    }
    let direction = match m.direction {
        Direction::Unspecified => core::TrafficDirection::Unspecified,
        Direction::Inbound => core::TrafficDirection::Inbound,
        Direction::Outbound => core::TrafficDirection::Outbound,
    };
    pb::Listener {
        name: m.name.clone(),
        address: Some(listen_address(m.address, m.is_udp())),
        udp_listener_config: match (m.udp.as_deref(), &m.quic) {
            (Some(u), _) => Some(udp::listener_config(u)),
            (None, q) => q.as_ref().map(quic::encode),
        },
        filter_chains: m.filter_chains.iter().map(|c| limited(m, c)).collect(),
        // The filter recovers the address; this field hands over, which an inbound listener never does.
        use_original_dst: (m.use_original_dst && m.direction != Direction::Inbound)
            .then_some(gp::BoolValue { value: true }),
        default_filter_chain: m.default_filter_chain.as_ref().map(|c| limited(m, c)),
        listener_filters: filters,
        listener_filters_timeout: Some(duration(m.inspect_timeout)),
        continue_on_listener_filters_timeout: true,
        transparent: m.transparent.then_some(gp::BoolValue { value: true }),
        traffic_direction: direction.into(),
        access_log: m.access_log.iter().map(refusal_log).collect(),
        bind_to_port: boolv(m.bind_to_port),
        metadata: m.mixer.as_deref().map(mixer),
        per_connection_buffer_limit_bytes: m.buffer_limit.and_then(u32v),
        ..Default::default()
    }
}

const CONNECTION_LIMIT: &str = "envoy.filters.network.connection_limit";

/// A chain with the listener's limit of connections in front.
fn limited(m: &Listener, c: &FilterChain) -> pb::FilterChain {
    let mut out = chain(c, m.quic.is_some());
    if let Some(n) = m.max_connections.filter(|_| !m.is_udp()) {
        let limit = ConnectionLimit {
            // By which it is the listener's and not one that somebody else has put there.
            stat_prefix: m.name.clone(),
            max_connections: Some(gp::UInt64Value { value: n.into() }),
            ..Default::default()
        };
        let config_type = Some(l::filter::ConfigType::TypedConfig(any(&limit)));
        out.filters.insert(0, pb::Filter { name: CONNECTION_LIMIT.to_owned(), config_type });
    }
    out
}

/// Takes a listener's limit out of its chains; all of them must have the same.
fn to_limit(m: &mut pb::Listener) -> Res<Option<u32>> {
    let name = m.name.clone();
    let mut seen = Vec::new();
    for c in m.filter_chains.iter_mut().chain(&mut m.default_filter_chain) {
        let Some(l::filter::ConfigType::TypedConfig(a)) =
            c.filters.first().and_then(|f| f.config_type.as_ref())
        else {
            seen.push(None);
            continue;
        };
        let limit: Option<ConnectionLimit> = is::<ConnectionLimit>(a).then(|| typed(a)).transpose()?;
        let Some(limit) = limit.filter(|l| l.stat_prefix == name) else {
            seen.push(None);
            continue;
        };
        refuse!(limit; delay, runtime_enabled);
        let n = limit.max_connections.map_or(0, |n| n.value);
        if n == 0 {
            return Err(Bad::new("max_connections", "must be at least 1"));
        }
        c.filters.remove(0);
        seen.push(Some(u32::try_from(n).unwrap_or(u32::MAX)));
    }
    let first = seen.first().copied().flatten();
    if seen.iter().any(|n| *n != first) {
        return Err(Bad::unsupported("filter_chains", "a connection_limit that other chains have not"));
    }
    Ok(first)
}

/// Metadata that says what [`Mixer`] does: no proxy has a filter for it any more.
const MIXER: &str = "flotilla.mixer";

fn mixer(m: &Mixer) -> core::Metadata {
    let (check, report, open) = ("check".to_owned(), "report".to_owned(), "fail_open".to_owned());
    let fail_open = m.fail_open.to_string();
    let fields = string_struct([(&check, &m.check), (&report, &m.report), (&open, &fail_open)]);
    core::Metadata { filter_metadata: [(MIXER.to_owned(), fields)].into(), ..Default::default() }
}

fn to_mixer(mut m: core::Metadata) -> Option<Mixer> {
    let mut fields = to_string_map(m.filter_metadata.remove(MIXER)?);
    Some(Mixer {
        check: fields.remove("check").unwrap_or_default(),
        report: fields.remove("report").unwrap_or_default(),
        // What cannot be read keeps requests out.
        fail_open: fields.remove("fail_open").is_some_and(|v| v == "true"),
    })
}

/// Envoy looks for server names in TLS only. For QUIC the filter is the same, at an address of UDP; no other proxy than
/// ours is sent it.
const QUIC_INSPECTOR: &str = "flotilla.filters.udp_listener.quic_inspector";

fn is_quic_inspector(f: &pb::ListenerFilter) -> bool {
    matches!(&f.config_type, Some(l::listener_filter::ConfigType::TypedConfig(a)) if is::<TlsInspector>(a))
}

/// `::` takes both families, as our own proxy binds it.
pub(super) fn listen_address(a: SocketAddr, udp: bool) -> core::Address {
    let mut out = socket_address(&a.ip().to_string(), a.port());
    if let Some(core::address::Address::SocketAddress(s)) = &mut out.address {
        s.ipv4_compat = a.is_ipv6() && a.ip().is_unspecified();
        if udp {
            s.protocol = core::socket_address::Protocol::Udp.into();
        }
    }
    out
}

#[allow(deprecated)]
pub(super) fn decode(mut m: pb::Listener) -> Res<Listener> {
    refuse!(m;
        additional_addresses, fcds_config, filter_chain_matcher, api_listener, connection_balance_config,
        listener_specifier, socket_options
    );
    let max_connections = to_limit(&mut m)?;
    let (ip, port, is_udp) = to_protocol_address(m.address)?;
    let ip: IpAddr = ip.parse().map_err(|_| Bad::new("address", format!("{ip:?} is not an IP address")))?;
    let (mut udp, mut quic, mut inspect_quic) = (None, None, false);
    let chains = !m.filter_chains.is_empty() || m.default_filter_chain.is_some();
    match (is_udp, m.udp_listener_config.take()) {
        // Connections that somebody else ends.
        (true, None) if chains && m.listener_filters.iter().any(is_quic_inspector) => {
            m.listener_filters.retain(|f| !is_quic_inspector(f));
            inspect_quic = true;
        }
        // Connections on datagrams are QUIC's; without any, the datagrams themselves are proxied.
        (true, c) if chains || c.as_ref().is_some_and(|c| c.quic_options.is_some()) => {
            quic = Some(quic::decode(c.unwrap_or_default()).at("udp_listener_config")?);
        }
        (true, c) => udp = Some(Box::new(udp::decode(std::mem::take(&mut m.listener_filters), c)?)),
        (false, Some(_)) => {
            return Err(Bad::new(
                "udp_listener_config",
                "needs an address with protocol UDP; this one is not of UDP",
            ));
        }
        (false, None) => {}
    }
    let (mut original_dst, mut inspect_tls, mut inspect_http, mut proxy_protocol) =
        (false, false, false, false);
    for (i, f) in m.listener_filters.into_iter().enumerate() {
        let field = format!("listener_filters[{i}]");
        refuse!(f; filter_disabled);
        let Some(l::listener_filter::ConfigType::TypedConfig(a)) = f.config_type else {
            return Err(Bad::unsupported(field, "a filter without typed_config"));
        };
        if is::<OriginalDst>(&a) {
            original_dst = true;
        } else if is::<TlsInspector>(&a) {
            inspect_tls = true;
        } else if is::<HttpInspector>(&a) {
            inspect_http = true;
        } else if is::<ProxyProtocol>(&a) {
            let p: ProxyProtocol = typed(&a).at(&field)?;
            refuse!(p; rules, disallowed_versions);
            if p.allow_requests_without_proxy_protocol {
                return Err(Bad::unsupported(field, "allow_requests_without_proxy_protocol"));
            }
            proxy_protocol = true;
        } else {
            return Err(Bad::unsupported(field, format_args!("filter {:?}", a.type_url)));
        }
    }
    let direction = match core::TrafficDirection::try_from(m.traffic_direction) {
        Ok(core::TrafficDirection::Inbound) => Direction::Inbound,
        Ok(core::TrafficDirection::Outbound) => Direction::Outbound,
        _ => Direction::Unspecified,
    };
    let bind_v1 = m.deprecated_v1.and_then(|d| d.bind_to_port);
    let is_quic = quic.is_some();
    let chain = |c| to_chain(c, is_quic);
    let listener = Listener {
        name: m.name,
        address: SocketAddr::new(ip, port),
        bind_to_port: bool_or(m.bind_to_port.or(bind_v1), true),
        use_original_dst: bool_or(m.use_original_dst, false) || original_dst,
        transparent: bool_or(m.transparent, false),
        direction,
        inspect_tls,
        inspect_http,
        proxy_protocol,
        inspect_timeout: m.listener_filters_timeout.map_or(Ok(INSPECT_TIMEOUT), to_duration)?,
        filter_chains: each("filter_chains", m.filter_chains, chain)?,
        default_filter_chain: m.default_filter_chain.map(chain).transpose().at("default_filter_chain")?,
        access_log: each("access_log", m.access_log, to_refusal_log)?,
        udp,
        quic,
        inspect_quic,
        buffer_limit: m.per_connection_buffer_limit_bytes.map(|v| v.value),
        max_connections,
        mixer: m.metadata.and_then(to_mixer).map(Box::new),
    };
    quic::check(&listener)?;
    Ok(listener)
}

/// Envoy's flag of a connection that no filter chain takes.
const NO_CHAIN: &str = "NR";

/// A listener's log sees every connection, those that a chain's own log has as well included; the
/// model's is about those without a chain.
fn refusal_log(l: &AccessLog) -> al::AccessLog {
    let flags = al::ResponseFlagFilter { flags: vec![NO_CHAIN.to_owned()] };
    let filter = al::access_log_filter::FilterSpecifier::ResponseFlagFilter(flags);
    al::AccessLog {
        filter: Some(al::AccessLogFilter { filter_specifier: Some(filter) }),
        ..telemetry::access_log(l)
    }
}

fn to_refusal_log(mut l: al::AccessLog) -> Res<AccessLog> {
    use al::access_log_filter::FilterSpecifier::ResponseFlagFilter;
    let spec = l.filter.as_ref().and_then(|f| f.filter_specifier.as_ref());
    // Any other filter is refused like everywhere.
    if matches!(spec, Some(ResponseFlagFilter(f)) if f.flags == [NO_CHAIN]) {
        l.filter = None;
    }
    telemetry::to_access_log(l)
}

fn listener_filter<T: Name>(name: &str, config: &T) -> pb::ListenerFilter {
    pb::ListenerFilter {
        name: name.to_owned(),
        config_type: Some(l::listener_filter::ConfigType::TypedConfig(any(config))),
        ..Default::default()
    }
}

fn chain(c: &FilterChain, quic: bool) -> pb::FilterChain {
    pb::FilterChain {
        name: c.name.clone(),
        filter_chain_match: (c.matches != FilterChainMatch::default()).then(|| chain_match(&c.matches)),
        filters: c.filters.iter().flat_map(|f| by_sni(f).into_iter().chain([filter(f)])).collect(),
        transport_socket: c.tls.as_ref().map(|t| tls::downstream(t, quic)),
        ..Default::default()
    }
}

#[allow(deprecated)]
fn to_chain(mut c: pb::FilterChain, quic: bool) -> Res<FilterChain> {
    if bool_or(c.use_proxy_proto, false) {
        return Err(Bad::unsupported("use_proxy_proto", "the deprecated field"));
    }
    let sni = to_sni(&mut c.filters)?;
    let mut filters = each("filters", c.filters, to_filter)?;
    match (sni, filters.last_mut()) {
        (None, _) => {}
        (names, Some(NetworkFilter::Tcp(t))) => t.names = names,
        _ => return Err(Bad::new("filters", "sni_dynamic_forward_proxy is for tcp_proxy")),
    }
    let terminal = |f: &NetworkFilter| {
        matches!(f, NetworkFilter::Tcp(_) | NetworkFilter::Http(_) | NetworkFilter::Udp(_))
    };
    if !filters.last().is_some_and(terminal) {
        return Err(Bad::new("filters", "the last filter must be tcp_proxy or http_connection_manager"));
    }
    let early = filters.len() - 1;
    if filters[..early].iter().any(terminal) {
        return Err(Bad::new("filters", "a terminal filter must be the last one"));
    }
    Ok(FilterChain {
        name: c.name,
        matches: to_chain_match(c.filter_chain_match.unwrap_or_default(), quic).at("filter_chain_match")?,
        tls: c
            .transport_socket
            .map(|s| tls::to_downstream(s, quic))
            .transpose()
            .at("transport_socket")?
            .flatten(),
        filters,
    })
}

fn chain_match(m: &FilterChainMatch) -> pb::FilterChainMatch {
    let transport = match m.transport_protocol {
        None => "",
        Some(TransportProtocol::Tls) => "tls",
        Some(TransportProtocol::RawBuffer) => "raw_buffer",
    };
    pb::FilterChainMatch {
        destination_port: m.destination_port.and_then(|p| u32v(u32::from(p))),
        prefix_ranges: m.destination_prefixes.iter().map(cidr).collect(),
        source_prefix_ranges: m.source_prefixes.iter().map(cidr).collect(),
        server_names: m.server_names.clone(),
        transport_protocol: transport.to_owned(),
        application_protocols: m.application_protocols.clone(),
        ..Default::default()
    }
}

fn to_chain_match(m: pb::FilterChainMatch, quic: bool) -> Res<FilterChainMatch> {
    refuse!(m; address_suffix, suffix_len, direct_source_prefix_ranges, source_type, source_ports);
    let transport_protocol = match m.transport_protocol.as_str() {
        "" => None,
        // What every connection of such a listener has.
        "quic" if quic => None,
        "tls" => Some(TransportProtocol::Tls),
        "raw_buffer" => Some(TransportProtocol::RawBuffer),
        other => return Err(Bad::unsupported("transport_protocol", format_args!("{other:?}"))),
    };
    let destination_port = match m.destination_port {
        None => None,
        Some(p) => Some(u16::try_from(p.value).map_err(|_| Bad::new("destination_port", "is above 65535"))?),
    };
    Ok(FilterChainMatch {
        destination_port,
        destination_prefixes: each("prefix_ranges", m.prefix_ranges, to_cidr)?,
        server_names: m.server_names,
        transport_protocol,
        application_protocols: m.application_protocols,
        source_prefixes: each("source_prefix_ranges", m.source_prefix_ranges, to_cidr)?,
    })
}

/// What resolves the SNI for the TCP proxy after it.
fn by_sni(f: &NetworkFilter) -> Option<pb::Filter> {
    let NetworkFilter::Tcp(TcpProxy { names: Some((cache, port)), .. }) = f else { return None };
    let config = l::filter::ConfigType::TypedConfig(any(&names::sni(cache, *port)));
    Some(pb::Filter { name: names::SNI_FILTER.to_owned(), config_type: Some(config) })
}

/// Takes it out.
fn to_sni(filters: &mut Vec<pb::Filter>) -> Res<Option<(NameCache, u16)>> {
    let config = |f: &pb::Filter| match &f.config_type {
        Some(l::filter::ConfigType::TypedConfig(a)) if is::<SniNames>(a) => Some(a.clone()),
        _ => None,
    };
    let Some((i, a)) = filters.iter().enumerate().find_map(|(i, f)| Some((i, config(f)?))) else {
        return Ok(None);
    };
    filters.remove(i);
    names::to_sni(typed(&a)?).at(format_args!("filters[{i}]")).map(Some)
}

fn filter(f: &NetworkFilter) -> pb::Filter {
    let (name, config) = match f {
        NetworkFilter::Rbac(r) => ("envoy.filters.network.rbac", any(&rbac::network(r))),
        NetworkFilter::Authz(a) => ("envoy.filters.network.ext_authz", any(&ext_authz::connection(a))),
        NetworkFilter::Limit(l) => ("envoy.filters.network.local_ratelimit", any(&rate_limit::network(l))),
        NetworkFilter::SniCluster => ("envoy.filters.network.sni_cluster", any(&SniCluster::default())),
        NetworkFilter::Tcp(t) => ("envoy.filters.network.tcp_proxy", any(&tcp_proxy(t))),
        NetworkFilter::Http(h) => ("envoy.filters.network.http_connection_manager", any(&http::encode(h))),
        NetworkFilter::Udp(u) => (udp::FILTER, any(&udp::encode(u))),
    };
    pb::Filter { name: name.to_owned(), config_type: Some(l::filter::ConfigType::TypedConfig(config)) }
}

fn to_filter(f: pb::Filter) -> Res<NetworkFilter> {
    let Some(l::filter::ConfigType::TypedConfig(a)) = f.config_type else {
        return Err(Bad::unsupported("config_type", "a filter without typed_config"));
    };
    if is::<HttpConnectionManager>(&a) {
        return Ok(NetworkFilter::Http(Box::new(http::from_wire(&a.value)?)));
    }
    if is::<tcp::TcpProxy>(&a) {
        return Ok(NetworkFilter::Tcp(to_tcp_proxy(typed(&a)?)?));
    }
    if is::<Rbac>(&a) {
        return Ok(NetworkFilter::Rbac(rbac::to_network(typed(&a)?)?));
    }
    if is::<ExtAuthz>(&a) {
        return Ok(NetworkFilter::Authz(ext_authz::to_connection(typed(&a)?)?));
    }
    if is::<LocalRateLimit>(&a) {
        return Ok(NetworkFilter::Limit(rate_limit::to_network(typed(&a)?)?));
    }
    if is::<SniCluster>(&a) {
        return Ok(NetworkFilter::SniCluster);
    }
    if is::<UdpProxyConfig>(&a) {
        return Ok(NetworkFilter::Udp(Box::new(udp::in_chain(typed(&a)?)?)));
    }
    Err(Bad::unsupported("typed_config", format_args!("filter {:?} ({})", f.name, a.type_url)))
}

fn tcp_proxy(t: &TcpProxy) -> tcp::TcpProxy {
    use tcp::tcp_proxy as tp;
    let clusters = match t.clusters.as_slice() {
        [one] => tp::ClusterSpecifier::Cluster(one.cluster.clone()),
        many => tp::ClusterSpecifier::WeightedClusters(tp::WeightedCluster {
            clusters: many
                .iter()
                .map(|c| tp::weighted_cluster::ClusterWeight {
                    name: c.cluster.clone(),
                    weight: c.weight,
                    ..Default::default()
                })
                .collect(),
        }),
    };
    tcp::TcpProxy {
        stat_prefix: if t.stat_prefix.is_empty() { "tcp".to_owned() } else { t.stat_prefix.clone() },
        idle_timeout: zero_off(t.idle_timeout),
        max_downstream_connection_duration: t.max_duration.map(duration),
        access_log: t.access_log.iter().map(telemetry::access_log).collect(),
        cluster_specifier: Some(clusters),
        tunneling_config: t.tunnel.as_ref().map(tunneling),
        on_demand: t.on_demand.map(on_demand::tcp),
        ..Default::default()
    }
}

fn tunneling(t: &Tunneling) -> tcp::tcp_proxy::TunnelingConfig {
    let ops = HeaderOps { add: t.headers.clone(), ..HeaderOps::default() };
    tcp::tcp_proxy::TunnelingConfig {
        hostname: t.hostname.clone(),
        headers_to_add: header_ops(&ops).0,
        use_post: t.post,
        ..Default::default()
    }
}

fn to_tunneling(t: tcp::tcp_proxy::TunnelingConfig) -> Res<Tunneling> {
    refuse!(t;
        propagate_response_headers, post_path, propagate_response_trailers, request_id_extension,
        request_id_header, request_id_metadata_key
    );
    if t.hostname.contains('%') {
        return Err(Bad::unsupported("hostname", "a format string"));
    }
    let HeaderOps { set, add, .. } = to_header_ops(t.headers_to_add, vec![]).at("headers_to_add")?;
    let headers = set.into_iter().chain(add).collect();
    Ok(Tunneling { hostname: t.hostname, headers, post: t.use_post })
}

#[allow(deprecated)]
fn to_tcp_proxy(m: tcp::TcpProxy) -> Res<TcpProxy> {
    use tcp::tcp_proxy as tp;
    refuse!(m;
        metadata_match, hash_policy, upstream_connect_mode
    );
    let clusters = match m.cluster_specifier {
        Some(tp::ClusterSpecifier::Cluster(c)) => vec![WeightedCluster::only(c)],
        Some(tp::ClusterSpecifier::WeightedClusters(w)) => w
            .clusters
            .into_iter()
            .map(|c| WeightedCluster { cluster: c.name, weight: c.weight, ..Default::default() })
            .collect(),
        None => return Err(Bad::new("cluster_specifier", "is missing")),
    };
    Ok(TcpProxy {
        stat_prefix: m.stat_prefix,
        clusters,
        idle_timeout: or_off(m.idle_timeout, TCP_IDLE).at("idle_timeout")?,
        max_duration: opt(m.max_downstream_connection_duration)
            .at("max_downstream_connection_duration")?
            .filter(|d| !d.is_zero()),
        access_log: each("access_log", m.access_log, telemetry::to_access_log)?,
        tunnel: m.tunneling_config.map(to_tunneling).transpose().at("tunneling_config")?,
        on_demand: m.on_demand.map(on_demand::to_tcp).transpose().at("on_demand")?.flatten(),
        names: None,
    })
}

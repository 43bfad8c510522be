//! The UDP proxy, which is a listener filter or, for datagrams of connections of QUIC, which Envoy does not have, the end
//! of a filter chain.

use envoy_types::pb::{
    envoy::{
        config::{core::v3 as core, listener::v3 as l},
        extensions::filters::udp::udp_proxy::v3::{self as udp, udp_proxy_config as config},
    },
    xds::{core::v3::TypedExtensionConfig, r#type::matcher::v3 as matcher},
};
use mesh_model::proxy::{UdpHash, UdpProxy};

use super::{At, Bad, Res, common::*, each, refuse, telemetry};

pub(super) const FILTER: &str = "envoy.filters.udp_listener.udp_proxy";

/// The listener filter.
pub(super) fn filter(u: &UdpProxy) -> l::ListenerFilter {
    l::ListenerFilter {
        name: FILTER.to_owned(),
        config_type: Some(l::listener_filter::ConfigType::TypedConfig(any(&encode(u)))),
        ..Default::default()
    }
}

pub(super) fn encode(u: &UdpProxy) -> udp::UdpProxyConfig {
    let hash = u.hash.as_ref().map(|h| match h {
        UdpHash::SourceIp => config::hash_policy::PolicySpecifier::SourceIp(true),
        UdpHash::Key(k) => config::hash_policy::PolicySpecifier::Key(k.clone()),
    });
    let route = TypedExtensionConfig {
        name: "route".to_owned(),
        typed_config: Some(any(&udp::Route { cluster: u.cluster.clone() })),
    };
    udp::UdpProxyConfig {
        stat_prefix: u.stat_prefix.clone(),
        idle_timeout: Some(duration(u.idle_timeout)),
        hash_policies: hash.map(|h| config::HashPolicy { policy_specifier: Some(h) }).into_iter().collect(),
        upstream_socket_config: socket_config(u.max_upstream, u16::MAX),
        use_per_packet_load_balancing: u.per_packet,
        access_log: u.access_log.iter().map(telemetry::access_log).collect(),
        route_specifier: Some(config::RouteSpecifier::Matcher(matcher::Matcher {
            on_no_match: Some(Box::new(matcher::matcher::OnMatch {
                on_match: Some(matcher::matcher::on_match::OnMatch::Action(route)),
                ..Default::default()
            })),
            matcher_type: None,
        })),
        ..Default::default()
    }
}

/// At the end of a chain: what comes inside of a connection is as long as that allows.
pub(super) fn in_chain(m: udp::UdpProxyConfig) -> Res<UdpProxy> {
    Ok(UdpProxy { max_downstream: u16::MAX, ..proxy(m)? })
}

/// What a listener says about its socket.
pub(super) fn listener_config(u: &UdpProxy) -> l::UdpListenerConfig {
    l::UdpListenerConfig {
        downstream_socket_config: socket_config(u.max_downstream, UdpProxy::MAX_DATAGRAM),
        ..Default::default()
    }
}

/// The only filter of a UDP listener.
pub(super) fn decode(
    filters: Vec<l::ListenerFilter>,
    listener: Option<l::UdpListenerConfig>,
) -> Res<UdpProxy> {
    let max_downstream = max_downstream(listener.unwrap_or_default()).at("udp_listener_config")?;
    let mut found = None;
    for (i, f) in filters.into_iter().enumerate() {
        let field = format!("listener_filters[{i}]");
        refuse!(f; filter_disabled);
        let Some(l::listener_filter::ConfigType::TypedConfig(a)) = f.config_type else {
            return Err(Bad::unsupported(field, "a filter without typed_config"));
        };
        if !is::<udp::UdpProxyConfig>(&a) || found.is_some() {
            let what = format_args!("filter {:?} of a UDP listener beside one udp_proxy", a.type_url);
            return Err(Bad::unsupported(field, what));
        }
        found = Some(typed(&a).and_then(proxy).at(&field)?);
    }
    let proxy = found.ok_or_else(|| Bad::new("listener_filters", "a UDP listener needs udp_proxy"))?;
    Ok(UdpProxy { max_downstream, ..proxy })
}

fn max_downstream(l: l::UdpListenerConfig) -> Res<u16> {
    refuse!(l; quic_options, udp_packet_packet_writer_config);
    to_socket_config(l.downstream_socket_config, UdpProxy::MAX_DATAGRAM).at("downstream_socket_config")
}

#[allow(deprecated)]
fn proxy(m: udp::UdpProxyConfig) -> Res<UdpProxy> {
    refuse!(m; use_original_src_ip, proxy_access_log, session_filters, tunneling_config, access_log_options);
    let cluster = match m.route_specifier {
        Some(config::RouteSpecifier::Cluster(c)) => c,
        Some(config::RouteSpecifier::Matcher(m)) => route(m).at("matcher")?,
        None => return Err(Bad::new("route_specifier", "is missing")),
    };
    if cluster.is_empty() {
        return Err(Bad::new("cluster", "is missing"));
    }
    let idle_timeout = m.idle_timeout.map_or(Ok(UdpProxy::IDLE_TIMEOUT), to_duration).at("idle_timeout")?;
    if idle_timeout.is_zero() {
        return Err(Bad::new("idle_timeout", "must be above zero"));
    }
    if m.hash_policies.len() > 1 {
        return Err(Bad::unsupported("hash_policies", "more than one"));
    }
    use config::hash_policy::PolicySpecifier as P;
    let hash = match m.hash_policies.into_iter().next().map(|h| h.policy_specifier) {
        None => None,
        Some(Some(P::SourceIp(true))) => Some(UdpHash::SourceIp),
        Some(Some(P::Key(k))) if !k.is_empty() => Some(UdpHash::Key(k)),
        Some(_) => return Err(Bad::new("hash_policies[0]", "needs source_ip: true, or a key")),
    };
    Ok(UdpProxy {
        stat_prefix: m.stat_prefix,
        cluster,
        idle_timeout,
        hash,
        per_packet: m.use_per_packet_load_balancing,
        max_downstream: UdpProxy::MAX_DATAGRAM,
        max_upstream: to_socket_config(m.upstream_socket_config, u16::MAX).at("upstream_socket_config")?,
        access_log: each("access_log", m.access_log, telemetry::to_access_log)?,
    })
}

/// The cluster of a matcher that has one route for everything.
fn route(m: matcher::Matcher) -> Res<String> {
    if m.matcher_type.is_some() {
        return Err(Bad::unsupported("matcher_type", "a route that depends on the datagram"));
    }
    let on = m.on_no_match.ok_or_else(|| Bad::new("on_no_match", "is missing"))?;
    refuse!(on; keep_matching);
    match on.on_match {
        Some(matcher::matcher::on_match::OnMatch::Action(a)) => {
            let a =
                a.typed_config.ok_or_else(|| Bad::new("on_no_match.action.typed_config", "is missing"))?;
            Ok(typed::<udp::Route>(&a).at("on_no_match.action")?.cluster)
        }
        _ => Err(Bad::unsupported("on_no_match", "another than an action")),
    }
}

fn socket_config(max: u16, default: u16) -> Option<core::UdpSocketConfig> {
    (max != default).then(|| core::UdpSocketConfig {
        max_rx_datagram_size: Some(envoy_types::pb::google::protobuf::UInt64Value { value: max.into() }),
        ..Default::default()
    })
}

/// `prefer_gro` changes no behaviour and is ignored.
fn to_socket_config(c: Option<core::UdpSocketConfig>, default: u16) -> Res<u16> {
    match c.and_then(|c| c.max_rx_datagram_size) {
        None => Ok(default),
        Some(v) => match u16::try_from(v.value) {
            Ok(n) if n > 0 => Ok(n),
            _ => Err(Bad::new("max_rx_datagram_size", "must be between 1 and 65535")),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use envoy_types::pb::envoy::extensions::filters::udp::udp_proxy::v3 as udp;
    use mesh_model::proxy::{AccessLog, AccessLogFormat, Direction, FileLog, Listener, UdpHash, UdpProxy};

    use super::{any, l};
    use crate::codec::{decode_listener, encode_listener, listener, pack};

    fn model() -> Listener {
        Listener {
            name: "dns".into(),
            address: "[::]:5353".parse().unwrap(),
            bind_to_port: false,
            use_original_dst: false,
            transparent: true,
            direction: Direction::Outbound,
            inspect_tls: false,
            inspect_http: false,
            proxy_protocol: false,
            inspect_timeout: Duration::from_secs(15),
            filter_chains: vec![],
            default_filter_chain: None,
            access_log: vec![],
            quic: None,
            inspect_quic: false,
            buffer_limit: None,
            max_connections: None,
            mixer: None,
            udp: Some(Box::new(UdpProxy {
                idle_timeout: Duration::from_secs(7),
                hash: Some(UdpHash::Key("k".into())),
                per_packet: true,
                max_downstream: 9000,
                max_upstream: 1500,
                access_log: vec![AccessLog::File(FileLog {
                    path: "/dev/stdout".into(),
                    format: AccessLogFormat::Text("%DURATION%\n".into()),
                    omit_empty: false,
                })],
                ..UdpProxy::to("outbound|5353/udp||dns")
            })),
        }
    }

    fn with(change: impl FnOnce(&mut udp::UdpProxyConfig)) -> Result<Listener, String> {
        let mut m = listener::encode(&model());
        let Some(l::listener_filter::ConfigType::TypedConfig(a)) = &mut m.listener_filters[0].config_type
        else {
            panic!()
        };
        let mut config: udp::UdpProxyConfig = super::typed(a).unwrap();
        change(&mut config);
        *a = any(&config);
        decode_listener(&pack(&m)).map_err(|e| e.to_string())
    }

    #[test]
    fn udp_listeners_round_trip() {
        let mut m = model();
        assert_eq!(decode_listener(&encode_listener(&m)).as_ref(), Ok(&m));
        m.udp = Some(Box::new(UdpProxy { hash: Some(UdpHash::SourceIp), ..UdpProxy::to("c") }));
        assert_eq!(decode_listener(&encode_listener(&m)).as_ref(), Ok(&m));
        // The older form, and Envoy's defaults.
        #[allow(deprecated)]
        let cluster = udp::udp_proxy_config::RouteSpecifier::Cluster("old".into());
        let l = with(|c| *c = udp::UdpProxyConfig { route_specifier: Some(cluster), ..Default::default() });
        let UdpProxy { cluster, idle_timeout, max_upstream, .. } = *l.unwrap().udp.unwrap();
        assert_eq!((cluster.as_str(), idle_timeout.as_secs(), max_upstream), ("old", 60, 65_535));
    }

    #[test]
    fn what_is_not_there_is_refused_by_name() {
        use udp::udp_proxy_config as c;
        let refused = |change: fn(&mut udp::UdpProxyConfig), field: &str| {
            let e = with(change).unwrap_err();
            assert!(e.contains(&format!("listener_filters[0].{field}")), "{e}");
        };
        refused(|c| c.use_original_src_ip = true, "use_original_src_ip");
        refused(|c| c.session_filters = vec![c::SessionFilter::default()], "session_filters");
        refused(|c| c.tunneling_config = Some(c::UdpTunnelingConfig::default()), "tunneling_config");
        refused(|c| c.route_specifier = None, "route_specifier");
        refused(|c| c.idle_timeout = Some(Default::default()), "idle_timeout");
        refused(|c| c.hash_policies = vec![c::HashPolicy::default(); 2], "hash_policies");
        refused(|c| c.hash_policies = vec![c::HashPolicy::default()], "hash_policies[0]");
        refused(
            |c| c.upstream_socket_config = super::socket_config(0, 1),
            "upstream_socket_config.max_rx_datagram_size",
        );
        // A listener that is half of one.
        let decode = |change: &dyn Fn(&mut l::Listener)| {
            let mut m = listener::encode(&model());
            change(&mut m);
            decode_listener(&pack(&m)).unwrap_err().to_string()
        };
        let e = decode(&|m| m.listener_filters.clear());
        assert!(e.contains("a UDP listener needs udp_proxy"), "{e}");
        let e = decode(&|m| m.filter_chains = vec![l::FilterChain::default()]);
        assert!(e.contains("udp_listener_config.quic_options"), "{e}");
        let e = decode(&|m| m.address = Some(super::socket_address("127.0.0.1", 1)));
        assert!(e.contains("udp_listener_config"), "{e}");
        let e = decode(&|m| m.udp_listener_config.as_mut().unwrap().quic_options = Some(Default::default()));
        assert!(e.contains("UdpProxyConfig"), "{e}");
    }
}

//! QUIC of a listener: its options, and the transport socket of its chains.

use envoy_types::pb::envoy::{
    config::{core::v3 as core, listener::v3 as pb},
    extensions::transport_sockets::{
        quic::v3::{QuicDownstreamTransport, QuicUpstreamTransport},
        tls::v3::{DownstreamTlsContext, UpstreamTlsContext},
    },
};
use mesh_model::proxy::{FilterChain, HttpCodec, Listener, NetworkFilter, QuicOptions};

use super::{At, Bad, Res, common::*, refuse};

pub(super) fn encode(q: &QuicOptions) -> pb::UdpListenerConfig {
    let protocol = core::QuicProtocolOptions {
        max_concurrent_streams: q.max_concurrent_streams.and_then(u32v),
        initial_stream_window_size: q.stream_window.and_then(u32v),
        initial_connection_window_size: q.connection_window.and_then(u32v),
        ..Default::default()
    };
    pb::UdpListenerConfig {
        quic_options: Some(pb::QuicProtocolOptions {
            quic_protocol_options: (protocol != core::QuicProtocolOptions::default()).then_some(protocol),
            idle_timeout: Some(duration(q.idle_timeout)),
            crypto_handshake_timeout: Some(duration(q.handshake_timeout)),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The options; a UDP listener without them, and without filter chains, forwards datagrams.
pub(super) fn decode(c: pb::UdpListenerConfig) -> Res<QuicOptions> {
    refuse!(c; udp_packet_packet_writer_config);
    let Some(q) = c.quic_options else {
        return Err(Bad::unsupported("quic_options", "a UDP listener with filter chains and without them"));
    };
    options(q).at("quic_options")
}

fn options(q: pb::QuicProtocolOptions) -> Res<QuicOptions> {
    refuse!(q;
        crypto_stream_config, proof_source_config, connection_id_generator_config,
        server_preferred_address_config, send_disable_active_migration, connection_debug_visitor_config,
        save_cmsg_config, reject_new_connections, max_sessions_per_event_loop
    );
    if q.enabled.and_then(|e| e.default_value).is_some_and(|v| !v.value) {
        return Err(Bad::unsupported("enabled.default_value", "a QUIC listener that is off (remove it)"));
    }
    let p = protocol(q.quic_protocol_options.unwrap_or_default()).at("quic_protocol_options")?;
    let own = QuicOptions::default();
    Ok(QuicOptions {
        max_concurrent_streams: p.max_concurrent_streams.map(|v| v.value),
        stream_window: p.initial_stream_window_size.map(|v| v.value),
        connection_window: p.initial_connection_window_size.map(|v| v.value),
        idle_timeout: opt(q.idle_timeout).at("idle_timeout")?.unwrap_or(own.idle_timeout),
        handshake_timeout: opt(q.crypto_handshake_timeout)
            .at("crypto_handshake_timeout")?
            .unwrap_or(own.handshake_timeout),
    })
}

fn protocol(p: core::QuicProtocolOptions) -> Res<core::QuicProtocolOptions> {
    refuse!(p;
        num_timeouts_to_trigger_port_migration, connection_keepalive, connection_options,
        client_connection_options, idle_network_timeout, max_packet_length, client_packet_writer,
        connection_migration, memory_reduction_timeout, enable_scone
    );
    Ok(p)
}

/// 0-RTT is off: whoever records such data can send it again (RFC 8446 section 8).
pub(super) fn transport(tls: DownstreamTlsContext) -> QuicDownstreamTransport {
    QuicDownstreamTransport {
        downstream_tls_context: Some(tls),
        enable_early_data: boolv(false),
        ..Default::default()
    }
}

/// The TLS context inside. What Envoy does unless it is told not to, 0-RTT, is not done here unless somebody asks for
/// it, and then it is refused.
pub(super) fn to_tls(q: QuicDownstreamTransport) -> Res<DownstreamTlsContext> {
    if q.enable_early_data.is_some_and(|v| v.value) {
        return Err(Bad::unsupported("enable_early_data", "0-RTT"));
    }
    if q.enable_resumption.is_some_and(|v| !v.value) {
        return Err(Bad::unsupported("enable_resumption", "switching off resumption"));
    }
    q.downstream_tls_context.ok_or_else(|| Bad::new("downstream_tls_context", "is missing"))
}

pub(super) fn upstream(tls: UpstreamTlsContext) -> QuicUpstreamTransport {
    QuicUpstreamTransport { upstream_tls_context: Some(tls) }
}

/// The TLS context inside; whether its ALPN is one that is spoken, [`tls`](super::tls) knows.
pub(super) fn to_upstream(q: QuicUpstreamTransport) -> Res<UpstreamTlsContext> {
    q.upstream_tls_context.ok_or_else(|| Bad::new("upstream_tls_context", "is missing"))
}

/// Holds a listener to what QUIC is: TLS and HTTP/3 or datagrams in every chain, and neither of that elsewhere.
pub(super) fn check(l: &Listener) -> Res<()> {
    let quic = l.quic.is_some();
    let takes = match (quic, l.inspect_quic) {
        (true, _) => Takes::Quic,
        (false, true) => Takes::Passing,
        (false, false) => Takes::Tcp,
    };
    if quic || l.inspect_quic {
        let inspects = l.inspect_tls || l.inspect_http || l.proxy_protocol || l.use_original_dst;
        if inspects {
            return Err(Bad::unsupported("listener_filters", "a listener filter of a QUIC listener"));
        }
        if l.transparent || !l.bind_to_port {
            let field = if l.transparent { "transparent" } else { "bind_to_port" };
            return Err(Bad::unsupported(field, "a QUIC listener that is not bound to its own address"));
        }
    }
    for (i, c) in l.filter_chains.iter().enumerate() {
        chain(c, takes).at(format_args!("filter_chains[{i}]"))?;
    }
    l.default_filter_chain.as_ref().map_or(Ok(()), |c| chain(c, takes)).at("default_filter_chain")
}

/// What a listener takes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Takes {
    Tcp,
    Quic,
    /// Connections of QUIC that it does not end.
    Passing,
}

fn chain(c: &FilterChain, takes: Takes) -> Res<()> {
    let udp = matches!(c.filters.last(), Some(NetworkFilter::Udp(_)));
    let quic = takes == Takes::Quic;
    match takes {
        Takes::Tcp if udp => return Err(Bad::new("filters", "udp_proxy needs a QUIC listener")),
        Takes::Passing if c.tls.is_some() => {
            return Err(Bad::new("transport_socket", "connections that are passed on are not ended"));
        }
        Takes::Passing if !udp || c.filters.len() != 1 => {
            return Err(Bad::new("filters", "connections of QUIC are passed on by udp_proxy alone"));
        }
        Takes::Passing => return Ok(()),
        Takes::Quic if udp && c.tls.is_some() => return Ok(()),
        _ => {}
    }
    let manager = match c.filters.last() {
        Some(NetworkFilter::Http(h)) => Some(h),
        _ => None,
    };
    let http3 = manager.is_some_and(|h| h.codec == HttpCodec::Http3);
    if !quic {
        return match http3 {
            true => Err(Bad::new("filters", "codec_type HTTP3 needs a QUIC listener")),
            false => Ok(()),
        };
    }
    if c.tls.is_none() {
        return Err(Bad::new("transport_socket", "must be envoy.transport_sockets.quic on a QUIC listener"));
    }
    if !http3 {
        let reason = "a QUIC listener needs an HTTP connection manager with codec_type HTTP3";
        return Err(Bad::new("filters", reason));
    }
    if manager.is_some_and(|h| h.connect) {
        return Err(Bad::unsupported("filters.upgrade_configs", "CONNECT over HTTP/3"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use envoy_types::pb::google::protobuf as gp;
    use mesh_model::proxy::{
        HttpConnectionManager, Rbac, RouteSource, UDP_ALPN, UdpProxy, UpstreamTls, Validation,
    };

    use super::*;
    use crate::codec::{decode_listener, encode_listener, listener, pack, tests, tls};

    fn model() -> Listener {
        let mut l = tests::listener();
        // No chain of QUIC has a filter for it.
        l.max_connections = None;
        l.quic = Some(QuicOptions {
            max_concurrent_streams: Some(50),
            stream_window: Some(65_536),
            connection_window: None,
            idle_timeout: Duration::from_secs(30),
            handshake_timeout: Duration::from_secs(5),
        });
        (l.inspect_tls, l.inspect_http, l.proxy_protocol, l.use_original_dst) = (false, false, false, false);
        (l.transparent, l.bind_to_port) = (false, true);
        l.filter_chains.truncate(1);
        l.default_filter_chain = None;
        let c = &mut l.filter_chains[0];
        c.matches.transport_protocol = None;
        c.filters = vec![NetworkFilter::Http(Box::new(HttpConnectionManager {
            codec: HttpCodec::Http3,
            connect: false,
            ..tests::hcm_model(RouteSource::Rds("https.443".into()))
        }))];
        l
    }

    fn refused(l: &pb::Listener, field: &str, reason: &str) {
        let e = decode_listener(&pack(l)).unwrap_err();
        assert!(e.field.contains(field) && e.reason.contains(reason), "{e}");
    }

    #[test]
    fn a_quic_listener_round_trips() {
        let l = model();
        let any = encode_listener(&l);
        assert_eq!(decode_listener(&any).unwrap(), l);
        let mut own = l.clone();
        own.quic = Some(QuicOptions::default());
        assert_eq!(decode_listener(&encode_listener(&own)).unwrap(), own);
        // What Envoy and Istio write of their own accord.
        let mut m = listener::encode(&l);
        let quic = pb::UdpListenerConfig { quic_options: Some(Default::default()), ..Default::default() };
        m.udp_listener_config = Some(quic);
        m.filter_chains[0].filter_chain_match.as_mut().unwrap().transport_protocol = "quic".into();
        assert_eq!(decode_listener(&pack(&m)).unwrap(), own);
    }

    fn rules() -> NetworkFilter {
        NetworkFilter::Rbac(Rbac { stat_prefix: "tcp.".into(), ..Rbac::default() })
    }

    fn datagrams(cluster: &str) -> NetworkFilter {
        NetworkFilter::Udp(Box::new(UdpProxy { max_downstream: u16::MAX, ..UdpProxy::to(cluster) }))
    }

    #[test]
    fn connections_that_carry_datagrams_round_trip() {
        let mut l = model();
        l.filter_chains[0].filters = vec![rules(), datagrams("inbound|5353/udp||")];
        assert_eq!(decode_listener(&encode_listener(&l)).as_ref(), Ok(&l));
        let tls = UpstreamTls {
            certificate: None,
            validation: Validation { trusted: None, sans: vec![], crl: None },
            sni: "outbound_.53_._.dns.books.svc.cluster.local".into(),
            by_name: false,
            alpn: vec![UDP_ALPN.into()],
        };
        let socket = tls::upstream(&tls);
        assert_eq!(socket.name, "envoy.transport_sockets.quic");
        assert_eq!(tls::to_upstream(socket).unwrap(), Some(tls.clone()));
        let http3 = QuicUpstreamTransport {
            upstream_tls_context: Some(UpstreamTlsContext { sni: "a".into(), ..Default::default() }),
        };
        let mut socket = tls::upstream(&tls);
        socket.config_type = Some(core::transport_socket::ConfigType::TypedConfig(any(&http3)));
        let e = tls::to_upstream(socket).unwrap_err();
        assert!(e.field.contains("alpn_protocols") && e.reason.contains("QUIC to upstreams"), "{e:?}");
        // Neither without TLS nor on TCP.
        let mut clear = l.clone();
        clear.filter_chains[0].tls = None;
        refused(&listener::encode(&clear), "transport_socket", "quic");
        l.quic = None;
        refused(&listener::encode(&l), "filter_chains[0].filters", "needs a QUIC listener");
    }

    #[test]
    fn connections_that_are_passed_on_round_trip() {
        let mut l = model();
        (l.quic, l.inspect_quic) = (None, true);
        let c = &mut l.filter_chains[0];
        (c.tls, c.filters) = (None, vec![datagrams("udp|outbound_.53_._.dns.books.svc.cluster.local")]);
        assert_eq!(decode_listener(&encode_listener(&l)).as_ref(), Ok(&l));
        let mut ends = l.clone();
        ends.filter_chains[0].tls = model().filter_chains[0].tls.clone();
        refused(&listener::encode(&ends), "transport_socket", "");
        l.filter_chains[0].filters.insert(0, rules());
        refused(&listener::encode(&l), "filter_chains[0].filters", "udp_proxy alone");
    }

    #[test]
    fn what_quic_cannot_be_is_refused_by_name() {
        let good = listener::encode(&model());
        let edit = |f: &dyn Fn(&mut pb::Listener)| {
            let mut m = good.clone();
            f(&mut m);
            m
        };
        let options = |f: &dyn Fn(&mut pb::QuicProtocolOptions)| {
            edit(&|m| f(m.udp_listener_config.as_mut().unwrap().quic_options.as_mut().unwrap()))
        };
        refused(
            &edit(&|m| m.udp_listener_config = None),
            "udp_listener_config.quic_options",
            "not supported",
        );
        refused(&options(&|q| q.reject_new_connections = true), "quic_options.reject_new_connections", "not");
        let off = core::RuntimeFeatureFlag { default_value: boolv(false), ..Default::default() };
        refused(&options(&|q| q.enabled = Some(off.clone())), "enabled.default_value", "remove it");
        let keepalive = core::QuicProtocolOptions {
            connection_keepalive: Some(Default::default()),
            ..Default::default()
        };
        let with = options(&|q| q.quic_protocol_options = Some(keepalive.clone()));
        refused(&with, "quic_options.quic_protocol_options.connection_keepalive", "not supported");
        // The address, the socket and the codec go together.
        let tcp = edit(&|m| {
            let Some(core::address::Address::SocketAddress(s)) = &mut m.address.as_mut().unwrap().address
            else {
                panic!()
            };
            s.protocol = 0;
        });
        refused(&tcp, "udp_listener_config", "protocol UDP");
        refused(
            &edit(&|m| m.filter_chains[0].transport_socket = None),
            "filter_chains[0].transport_socket",
            "quic",
        );
        let tls = listener::encode(&tests::listener()).filter_chains[0].transport_socket.clone();
        refused(
            &edit(&|m| m.filter_chains[0].transport_socket = tls.clone()),
            "transport_socket",
            "QuicDownstream",
        );
        let mut http2 = model();
        let NetworkFilter::Http(h) = &mut http2.filter_chains[0].filters[0] else { panic!() };
        h.codec = HttpCodec::Auto;
        refused(&listener::encode(&http2), "filter_chains[0].filters", "HTTP3");
        let NetworkFilter::Http(h) = &mut http2.filter_chains[0].filters[0] else { panic!() };
        (h.codec, h.connect) = (HttpCodec::Http3, true);
        refused(&listener::encode(&http2), "upgrade_configs", "CONNECT over HTTP/3");
        let mut on_tcp = model();
        on_tcp.quic = None;
        refused(&listener::encode(&on_tcp), "filter_chains[0].filters", "needs a QUIC listener");
        let mut inspects = model();
        inspects.inspect_tls = true;
        refused(&listener::encode(&inspects), "listener_filters", "not supported");
        // 0-RTT, asked for.
        let early = edit(&|m| {
            let socket = m.filter_chains[0].transport_socket.as_mut().unwrap();
            let Some(core::transport_socket::ConfigType::TypedConfig(a)) = &mut socket.config_type else {
                panic!()
            };
            let mut q: QuicDownstreamTransport = typed(a).unwrap();
            assert_eq!(q.enable_early_data, boolv(false));
            q.enable_early_data = Some(gp::BoolValue { value: true });
            *a = any(&q);
        });
        refused(&early, "enable_early_data", "0-RTT");
    }
}

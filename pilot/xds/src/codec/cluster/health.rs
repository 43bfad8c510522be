//! Active health checks.

use std::{net::IpAddr, time::Duration};

use envoy_types::pb::{
    envoy::{
        config::core::v3::{self as core, health_check as pb},
        config::endpoint::v3 as ep,
        r#type::v3 as typ,
    },
    google::protobuf as gp,
};
use mesh_model::proxy::{
    EndpointCheck, GrpcHealthCheck, HealthCheck, HealthCheckKind, HealthIntervals, HttpHealthCheck,
    TcpHealthCheck,
};

use crate::codec::{At, Bad, Res, common::*, each, refuse};

/// Envoy's default for a cluster that never had traffic.
const NO_TRAFFIC: Duration = Duration::from_secs(60);
/// A shorter interval would make an attack of a typing error.
const SHORTEST: Duration = Duration::from_millis(1);
/// What a TCP check may expect in all.
const MAX_PAYLOAD: usize = 64 * 1024;

pub(super) fn encode(h: &HealthCheck) -> core::HealthCheck {
    let i = &h.intervals;
    let time = |d: Duration| Some(duration(d));
    let some = |d: Duration| (!d.is_zero()).then(|| duration(d));
    core::HealthCheck {
        timeout: time(h.timeout),
        interval: time(i.healthy),
        initial_jitter: some(h.initial_jitter),
        interval_jitter: some(h.interval_jitter),
        interval_jitter_percent: h.interval_jitter_percent,
        unhealthy_threshold: u32v(h.unhealthy_threshold),
        healthy_threshold: u32v(h.healthy_threshold),
        alt_port: if h.alt_port == 0 { None } else { u32v(u32::from(h.alt_port)) },
        reuse_connection: boolv(h.reuse_connection),
        no_traffic_interval: time(i.no_traffic),
        no_traffic_healthy_interval: time(i.no_traffic_healthy),
        unhealthy_interval: time(i.unhealthy),
        unhealthy_edge_interval: time(i.failing),
        healthy_edge_interval: time(i.recovering),
        health_checker: Some(match &h.kind {
            HealthCheckKind::Http(k) => pb::HealthChecker::HttpHealthCheck(http(k)),
            HealthCheckKind::Grpc(k) => pb::HealthChecker::GrpcHealthCheck(pb::GrpcHealthCheck {
                service_name: k.service_name.clone(),
                authority: k.authority.clone(),
                initial_metadata: headers(&k.headers),
            }),
            HealthCheckKind::Tcp(k) => pb::HealthChecker::TcpHealthCheck(pb::TcpHealthCheck {
                send: (!k.send.is_empty()).then(|| payload(&k.send)),
                receive: k.receive.iter().map(|b| payload(b)).collect(),
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
}

fn http(k: &HttpHealthCheck) -> pb::HttpHealthCheck {
    let ranges = |all: &[(u16, u16)]| {
        all.iter().map(|r| typ::Int64Range { start: i64::from(r.0), end: i64::from(r.1) }).collect()
    };
    let method = core::RequestMethod::from_str_name(&k.method).unwrap_or(core::RequestMethod::Get);
    let codec = if k.http2 { typ::CodecClientType::Http2 } else { typ::CodecClientType::Http1 };
    pb::HttpHealthCheck {
        host: k.host.clone(),
        path: k.path.clone(),
        method: method.into(),
        codec_client_type: codec.into(),
        request_headers_to_add: headers(&k.headers),
        expected_statuses: ranges(&k.expected),
        retriable_statuses: ranges(&k.retriable),
        service_name_matcher: k.service_name.as_ref().map(string_match),
        ..Default::default()
    }
}

fn headers(all: &[(String, String)]) -> Vec<core::HeaderValueOption> {
    all.iter()
        .map(|(k, v)| core::HeaderValueOption {
            header: Some(core::HeaderValue { key: k.clone(), value: v.clone(), ..Default::default() }),
            ..Default::default()
        })
        .collect()
}

fn payload(bytes: &[u8]) -> pb::Payload {
    use std::fmt::Write as _;
    let text = bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, b| {
        // Writing to a string cannot fail.
        let _ = write!(out, "{b:02x}");
        out
    });
    pb::Payload { payload: Some(pb::payload::Payload::Text(text)) }
}

#[allow(deprecated)]
pub(super) fn decode(m: core::HealthCheck, ignore_new_hosts: bool) -> Res<HealthCheck> {
    refuse!(m;
        event_log_path, event_logger, event_service, always_log_health_check_failures,
        always_log_health_check_success, tls_options, transport_socket_match_criteria
    );
    let needed = |field: &str, d: Option<gp::Duration>| {
        let d = d.ok_or_else(|| Bad::new(field, "is missing"))?;
        to_duration(d).and_then(positive).at(field)
    };
    let or = |field: &str, d: Option<gp::Duration>, default: Duration| {
        d.map_or(Ok(default), |d| to_duration(d).and_then(positive)).at(field)
    };
    let any = |field: &str, d: Option<gp::Duration>| opt(d).at(field).map(Option::unwrap_or_default);
    let threshold = |field: &str, n: Option<gp::UInt32Value>| match n {
        Some(n) if n.value > 0 => Ok(n.value),
        Some(_) => Err(Bad::new(field, "is 0; it must be at least 1")),
        None => Err(Bad::new(field, "is missing")),
    };
    let timeout = needed("timeout", m.timeout)?;
    let healthy = needed("interval", m.interval)?;
    let unhealthy = or("unhealthy_interval", m.unhealthy_interval, healthy)?;
    let no_traffic = or("no_traffic_interval", m.no_traffic_interval, NO_TRAFFIC)?;
    Ok(HealthCheck {
        kind: match m.health_checker {
            Some(pb::HealthChecker::HttpHealthCheck(k)) => {
                HealthCheckKind::Http(to_http(k).at("http_health_check")?)
            }
            Some(pb::HealthChecker::GrpcHealthCheck(k)) => HealthCheckKind::Grpc(GrpcHealthCheck {
                service_name: k.service_name,
                authority: k.authority,
                headers: to_headers(k.initial_metadata).at("initial_metadata").at("grpc_health_check")?,
            }),
            Some(pb::HealthChecker::TcpHealthCheck(k)) => {
                HealthCheckKind::Tcp(to_tcp(k).at("tcp_health_check")?)
            }
            Some(pb::HealthChecker::CustomHealthCheck(k)) => {
                return Err(Bad::unsupported("custom_health_check", format_args!("{:?}", k.name)));
            }
            None => return Err(Bad::new("health_checker", "is missing")),
        },
        timeout,
        intervals: HealthIntervals {
            healthy,
            unhealthy,
            failing: or("unhealthy_edge_interval", m.unhealthy_edge_interval, unhealthy)?,
            recovering: or("healthy_edge_interval", m.healthy_edge_interval, healthy)?,
            no_traffic,
            no_traffic_healthy: or("no_traffic_healthy_interval", m.no_traffic_healthy_interval, no_traffic)?,
        },
        initial_jitter: any("initial_jitter", m.initial_jitter)?,
        interval_jitter: any("interval_jitter", m.interval_jitter)?,
        interval_jitter_percent: m.interval_jitter_percent,
        unhealthy_threshold: threshold("unhealthy_threshold", m.unhealthy_threshold)?,
        healthy_threshold: threshold("healthy_threshold", m.healthy_threshold)?,
        reuse_connection: bool_or(m.reuse_connection, true),
        alt_port: to_port(m.alt_port.map_or(0, |p| p.value)).at("alt_port")?,
        ignore_new_hosts,
    })
}

fn positive(d: Duration) -> Res<Duration> {
    if d < SHORTEST { Err(Bad::new("", "is shorter than 1ms")) } else { Ok(d) }
}

fn to_port(n: u32) -> Res<u16> {
    u16::try_from(n).map_err(|_| Bad::new("", "is above 65535"))
}

fn to_http(k: pb::HttpHealthCheck) -> Res<HttpHealthCheck> {
    use typ::CodecClientType as C;
    refuse!(k; send, receive, response_buffer_size, request_headers_to_remove);
    if !k.path.starts_with('/') || k.path.bytes().any(|b| b <= b' ' || b == 0x7f) {
        return Err(Bad::new("path", format!("{:?} is no path; it begins with \"/\"", k.path)));
    }
    let codec = C::try_from(k.codec_client_type)
        .map_err(|_| Bad::unsupported("codec_client_type", k.codec_client_type))?;
    if codec == C::Http3 {
        return Err(Bad::unsupported("codec_client_type", "HTTP/3"));
    }
    let method = core::RequestMethod::try_from(k.method).map_err(|_| Bad::unsupported("method", k.method))?;
    let method = match method {
        core::RequestMethod::MethodUnspecified => "GET",
        core::RequestMethod::Connect => return Err(Bad::unsupported("method", "CONNECT")),
        m => m.as_str_name(),
    };
    let mut expected = each("expected_statuses", k.expected_statuses, to_range)?;
    if expected.is_empty() {
        expected.push((200, 201));
    }
    Ok(HttpHealthCheck {
        host: k.host,
        path: k.path,
        method: method.to_owned(),
        http2: codec == C::Http2,
        headers: to_headers(k.request_headers_to_add).at("request_headers_to_add")?,
        expected,
        retriable: each("retriable_statuses", k.retriable_statuses, to_range)?,
        service_name: k.service_name_matcher.map(to_string_match).transpose().at("service_name_matcher")?,
    })
}

fn to_range(r: typ::Int64Range) -> Res<(u16, u16)> {
    let bad = || Bad::new("", format!("[{}, {}) is not within [100, 600)", r.start, r.end));
    let (start, end) = (u16::try_from(r.start).map_err(|_| bad())?, u16::try_from(r.end).map_err(|_| bad())?);
    if start < 100 || end > 600 || start >= end { Err(bad()) } else { Ok((start, end)) }
}

fn to_headers(all: Vec<core::HeaderValueOption>) -> Res<Vec<(String, String)>> {
    each("", all, |o| {
        let h = o.header.unwrap_or_default();
        if !h.raw_value.is_empty() {
            return Err(Bad::unsupported("raw_value", "a raw header value"));
        }
        let name = h.key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if h.key.is_empty() || !name || h.key.eq_ignore_ascii_case("host") {
            return Err(Bad::new("key", format!("{:?} cannot be set here", h.key)));
        }
        if h.value.bytes().any(|b| b < b' ' || b == 0x7f) {
            return Err(Bad::new("value", "holds a control character"));
        }
        if h.value.contains('%') {
            return Err(Bad::unsupported("value", "a value with %"));
        }
        Ok((h.key.to_ascii_lowercase(), h.value))
    })
}

fn to_tcp(k: pb::TcpHealthCheck) -> Res<TcpHealthCheck> {
    refuse!(k; proxy_protocol_config);
    let receive = each("receive", k.receive, to_payload)?;
    if receive.iter().map(Vec::len).sum::<usize>() > MAX_PAYLOAD {
        return Err(Bad::new("receive", "is longer than 64 KiB"));
    }
    Ok(TcpHealthCheck { send: k.send.map_or(Ok(vec![]), to_payload).at("send")?, receive })
}

fn to_payload(p: pb::Payload) -> Res<Vec<u8>> {
    let bytes = match p.payload {
        Some(pb::payload::Payload::Binary(b)) => b,
        Some(pb::payload::Payload::Text(t)) => {
            let digits = t.as_bytes();
            let pairs = digits.chunks(2).map(|c| {
                let text = std::str::from_utf8(c).ok().filter(|t| t.len() == 2 && !t.starts_with('+'))?;
                u8::from_str_radix(text, 16).ok()
            });
            pairs
                .collect::<Option<Vec<u8>>>()
                .ok_or_else(|| Bad::new("text", format!("{t:?} is not hexadecimal")))?
        }
        None => return Err(Bad::new("payload", "is missing")),
    };
    if bytes.is_empty() {
        return Err(Bad::new("", "is empty"));
    }
    Ok(bytes)
}

pub(in crate::codec) fn endpoint(e: &EndpointCheck) -> ep::endpoint::HealthCheckConfig {
    ep::endpoint::HealthCheckConfig {
        port_value: u32::from(e.port),
        hostname: e.hostname.clone(),
        address: (!e.address.is_empty()).then(|| socket_address(&e.address, 0)),
        disable_active_health_check: e.disabled,
    }
}

/// What an endpoint says about its checks.
pub(in crate::codec) fn to_endpoint(
    m: Option<ep::endpoint::HealthCheckConfig>,
) -> Res<Option<Box<EndpointCheck>>> {
    let m = m.unwrap_or_default();
    let address = match m.address {
        None => String::new(),
        Some(a) => {
            let (a, _) = to_socket_address(Some(a))?;
            a.parse::<IpAddr>().map_err(|_| Bad::new("address", format!("{a:?} is no IP address")))?;
            a
        }
    };
    let check = EndpointCheck {
        port: to_port(m.port_value).at("port_value")?,
        hostname: m.hostname,
        address,
        disabled: m.disable_active_health_check,
    };
    let nothing = check.port == 0 && check.hostname.is_empty() && check.address.is_empty() && !check.disabled;
    Ok((!nothing).then(|| Box::new(check)))
}

#[cfg(test)]
#[path = "health/tests.rs"]
mod tests;

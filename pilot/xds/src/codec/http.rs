//! The HTTP connection manager, its filters, and access logs.

use std::{sync::Arc, time::Duration};

use envoy_types::pb::{
    envoy::{
        config::core::v3 as core,
        extensions::{
            filters::{
                http::{
                    buffer::v3::Buffer, compressor::v3::Compressor, cors::v3::Cors,
                    dynamic_forward_proxy::v3::FilterConfig as DynamicForwardProxy, ext_authz::v3::ExtAuthz,
                    ext_proc::v3::ExternalProcessor, fault::v3::HttpFault, grpc_stats::v3 as grpc_stats,
                    grpc_web::v3::GrpcWeb, jwt_authn::v3::JwtAuthentication,
                    local_ratelimit::v3::LocalRateLimit, on_demand::v3::OnDemand, ratelimit::v3::RateLimit,
                    rbac::v3::Rbac, router::v3::Router, stateful_session::v3::StatefulSession,
                },
                network::http_connection_manager::v3 as hcm,
            },
            http::header_formatters::preserve_case::v3::PreserveCaseFormatterConfig,
        },
    },
    google::protobuf as gp,
};
use hcm::http_connection_manager as h;
use mesh_model::proxy::{
    AddedHeaders, ClientCertParts, EscapedSlashes, ForwardClientCert, HttpCodec, HttpConnectionManager,
    HttpFilter, HttpLimits, RouteConfiguration, RouteSource, Underscores,
};

use prost::Message as _;

use super::{
    At, Bad, Res, body, common::*, each, ext_authz, ext_proc, jwt, names, on_demand, rate_limit, rbac,
    refuse, route, split, telemetry,
};

const WEBSOCKET: &str = "websocket";
/// How `upgrade_configs` name plain CONNECT.
pub(super) const CONNECT: &str = "CONNECT";
/// Envoy's defaults.
const IDLE: Duration = Duration::from_secs(3600);
const STREAM_IDLE: Duration = Duration::from_secs(300);

pub(super) fn encode(m: &HttpConnectionManager) -> hcm::HttpConnectionManager {
    use h::{CodecType, ForwardClientCertDetails as F, RouteSpecifier, ServerHeaderTransformation as T};
    let codec = match m.codec {
        HttpCodec::Auto => CodecType::Auto,
        HttpCodec::Http1 => CodecType::Http1,
        HttpCodec::Http2 => CodecType::Http2,
        HttpCodec::Http3 => CodecType::Http3,
    };
    let routes = match &m.routes {
        RouteSource::Rds(name) => {
            RouteSpecifier::Rds(hcm::Rds { config_source: ads(), route_config_name: name.clone() })
        }
        RouteSource::Inline(r) => RouteSpecifier::RouteConfig(route::encode(r)),
    };
    let cert = match m.forward_client_cert {
        ForwardClientCert::Sanitize => F::Sanitize,
        ForwardClientCert::ForwardOnly => F::ForwardOnly,
        ForwardClientCert::AppendForward => F::AppendForward,
        ForwardClientCert::SanitizeSet => F::SanitizeSet,
        ForwardClientCert::AlwaysForwardOnly => F::AlwaysForwardOnly,
    };
    let mut filters: Vec<hcm::HttpFilter> = m.filters.iter().map(filter).collect();
    let router = Router { suppress_envoy_headers: m.headers.suppress_envoy, ..Default::default() };
    filters.push(named("envoy.filters.http.router", any(&router)));
    let (parts, limits) = (m.headers.client_cert, &m.limits);
    hcm::HttpConnectionManager {
        codec_type: codec.into(),
        stat_prefix: if m.stat_prefix.is_empty() { "http".to_owned() } else { m.stat_prefix.clone() },
        http_filters: filters,
        tracing: m.tracing.as_deref().map(telemetry::tracing),
        common_http_protocol_options: Some(core::HttpProtocolOptions {
            idle_timeout: zero_off(m.idle_timeout),
            max_stream_duration: m.max_stream_duration.map(duration),
            max_connection_duration: limits.max_connection_duration.map(duration),
            headers_with_underscores_action: underscores(limits.underscores).into(),
            ..Default::default()
        }),
        // Absolute URIs are what a client sends that uses us as its HTTP proxy.
        http_protocol_options: Some(core::Http1ProtocolOptions {
            allow_absolute_url: boolv(true),
            accept_http_10: m.accept_http_10,
            header_key_format: m.headers.preserve_case.then(preserve_case),
            ..Default::default()
        }),
        http2_protocol_options: http2(m),
        http3_protocol_options: (m.codec == HttpCodec::Http3).then(|| core::Http3ProtocolOptions {
            allow_extended_connect: m.websocket || m.connect,
            ..Default::default()
        }),
        server_name: m.server_name.clone(),
        server_header_transformation: if m.server_name.is_empty() { T::PassThrough } else { T::Overwrite }
            .into(),
        stream_idle_timeout: zero_off(m.stream_idle_timeout),
        request_headers_timeout: m.request_headers_timeout.map(duration),
        request_timeout: limits.request_timeout.map(duration),
        drain_timeout: limits.drain_timeout.map(duration),
        access_log: m.access_log.iter().map(telemetry::access_log).collect(),
        use_remote_address: boolv(m.use_remote_address),
        xff_num_trusted_hops: m.trusted_hops,
        preserve_external_request_id: m.preserve_request_id,
        generate_request_id: if m.headers.request_id { None } else { boolv(false) },
        append_x_forwarded_port: m.headers.forwarded_port,
        forward_client_cert_details: cert.into(),
        set_current_client_cert_details: m.forward_client_cert.tells().then(|| {
            h::SetCurrentClientCertDetails {
                subject: boolv(parts.subject),
                uri: parts.uri,
                dns: parts.dns,
                cert: parts.cert,
                chain: parts.chain,
                ..Default::default()
            }
        }),
        upgrade_configs: [(m.websocket, WEBSOCKET), (m.connect, CONNECT)]
            .into_iter()
            .filter(|(on, _)| *on)
            .map(|(_, kind)| h::UpgradeConfig { upgrade_type: kind.to_owned(), ..Default::default() })
            .collect(),
        normalize_path: boolv(m.normalize_path),
        merge_slashes: m.merge_slashes,
        path_with_escaped_slashes_action: escaped_slashes(m.escaped_slashes).into(),
        route_specifier: Some(routes),
        ..Default::default()
    }
}

/// Names of HTTP/1 headers keep their case.
pub(super) fn preserve_case() -> core::http1_protocol_options::HeaderKeyFormat {
    use core::http1_protocol_options::{HeaderKeyFormat, header_key_format::HeaderFormat};
    HeaderKeyFormat {
        header_format: Some(HeaderFormat::StatefulFormatter(core::TypedExtensionConfig {
            name: "preserve_case".to_owned(),
            typed_config: Some(any(&PreserveCaseFormatterConfig::default())),
        })),
    }
}

/// Whether names of HTTP/1 headers are to keep their case.
pub(super) fn to_preserve_case(o: Option<&core::Http1ProtocolOptions>) -> bool {
    use core::http1_protocol_options::header_key_format::HeaderFormat;
    let format = o.and_then(|o| o.header_key_format.as_ref()?.header_format.as_ref());
    match format {
        Some(HeaderFormat::StatefulFormatter(e)) => {
            e.typed_config.as_ref().is_some_and(is::<PreserveCaseFormatterConfig>)
        }
        _ => false,
    }
}

fn http2(m: &HttpConnectionManager) -> Option<core::Http2ProtocolOptions> {
    let l = &m.limits;
    let options = core::Http2ProtocolOptions {
        allow_connect: m.websocket || m.connect,
        max_concurrent_streams: l.max_concurrent_streams.and_then(u32v),
        initial_stream_window_size: l.stream_window.and_then(u32v),
        initial_connection_window_size: l.connection_window.and_then(u32v),
        ..Default::default()
    };
    (options != core::Http2ProtocolOptions::default()).then_some(options)
}

fn underscores(u: Underscores) -> core::http_protocol_options::HeadersWithUnderscoresAction {
    use core::http_protocol_options::HeadersWithUnderscoresAction as A;
    match u {
        Underscores::Allow => A::Allow,
        Underscores::Reject => A::RejectRequest,
        Underscores::Drop => A::DropHeader,
    }
}

fn to_underscores(v: i32) -> Res<Underscores> {
    use core::http_protocol_options::HeadersWithUnderscoresAction as A;
    match A::try_from(v) {
        Ok(A::Allow) => Ok(Underscores::Allow),
        Ok(A::RejectRequest) => Ok(Underscores::Reject),
        Ok(A::DropHeader) => Ok(Underscores::Drop),
        Err(_) => Err(Bad::unsupported("headers_with_underscores_action", v)),
    }
}

fn escaped_slashes(e: EscapedSlashes) -> h::PathWithEscapedSlashesAction {
    use h::PathWithEscapedSlashesAction as A;
    match e {
        EscapedSlashes::Keep => A::KeepUnchanged,
        EscapedSlashes::Reject => A::RejectRequest,
        EscapedSlashes::UnescapeAndRedirect => A::UnescapeAndRedirect,
        EscapedSlashes::UnescapeAndForward => A::UnescapeAndForward,
    }
}

fn to_escaped_slashes(v: i32) -> Res<EscapedSlashes> {
    use h::PathWithEscapedSlashesAction as A;
    match A::try_from(v) {
        // What Envoy does where nothing is said.
        Ok(A::ImplementationSpecificDefault | A::KeepUnchanged) => Ok(EscapedSlashes::Keep),
        Ok(A::RejectRequest) => Ok(EscapedSlashes::Reject),
        Ok(A::UnescapeAndRedirect) => Ok(EscapedSlashes::UnescapeAndRedirect),
        Ok(A::UnescapeAndForward) => Ok(EscapedSlashes::UnescapeAndForward),
        Err(_) => Err(Bad::unsupported("path_with_escaped_slashes_action", v)),
    }
}

/// Decodes the message; its routes one virtual host at a time.
pub(super) fn from_wire(bytes: &[u8]) -> Res<HttpConnectionManager> {
    /// `route_config` of `HttpConnectionManager`.
    const ROUTE_CONFIG: u64 = 4;
    let (rest, routes) = split::take(bytes, ROUTE_CONFIG)?;
    let m = hcm::HttpConnectionManager::decode(rest.as_slice()).map_err(|e| Bad::new("", e.to_string()))?;
    let inline = match routes.as_slice() {
        [] => None,
        [one] => Some(route::from_wire(one).map_err(|(_, b)| b).at("route_config")?),
        _ => return Err(Bad::new("route_config", "appears twice")),
    };
    decode(m, inline)
}

fn decode(m: hcm::HttpConnectionManager, inline: Option<RouteConfiguration>) -> Res<HttpConnectionManager> {
    use h::{CodecType, ForwardClientCertDetails as F, RouteSpecifier, ServerHeaderTransformation as T};
    refuse!(m;
        scheme_header_transformation, original_ip_detection_extensions,
        early_header_mutation_extensions, skip_xff_append, via, forward_client_cert_matcher,
        local_reply_config, strip_matching_host_port, strip_port_mode,
        strip_trailing_host_dot, path_normalization_options, typed_header_validation_config,
        forward_proto_config
    );
    let codec = match CodecType::try_from(m.codec_type) {
        Ok(CodecType::Auto) => HttpCodec::Auto,
        Ok(CodecType::Http1) => HttpCodec::Http1,
        Ok(CodecType::Http2) => HttpCodec::Http2,
        Ok(CodecType::Http3) => HttpCodec::Http3,
        Err(_) => return Err(Bad::new("codec_type", format!("{} is unknown", m.codec_type))),
    };
    let routes = match (m.route_specifier, inline) {
        (None, Some(r)) if r.on_demand.is_some() => {
            return Err(Bad::unsupported("route_config.vhds", "vhds of routes that do not come by rds"));
        }
        (None, Some(r)) => RouteSource::Inline(Arc::new(r)),
        (Some(RouteSpecifier::Rds(r)), None) => RouteSource::Rds(r.route_config_name),
        (Some(RouteSpecifier::ScopedRoutes(_)), None) => {
            return Err(Bad::unsupported("scoped_routes", "scoped routing"));
        }
        (Some(_), _) => return Err(Bad::new("route_specifier", "is set twice")),
        (None, None) => return Err(Bad::new("route_specifier", "is missing")),
    };
    let forward_client_cert = match F::try_from(m.forward_client_cert_details) {
        Ok(F::Sanitize) => ForwardClientCert::Sanitize,
        Ok(F::ForwardOnly) => ForwardClientCert::ForwardOnly,
        Ok(F::AppendForward) => ForwardClientCert::AppendForward,
        Ok(F::SanitizeSet) => ForwardClientCert::SanitizeSet,
        Ok(F::AlwaysForwardOnly) => ForwardClientCert::AlwaysForwardOnly,
        Err(_) => return Err(Bad::new("forward_client_cert_details", "is not known")),
    };
    let server_name = match T::try_from(m.server_header_transformation) {
        Ok(T::Overwrite) if m.server_name.is_empty() => "envoy".to_owned(),
        Ok(T::Overwrite) => m.server_name,
        Ok(T::PassThrough) => String::new(),
        _ => return Err(Bad::unsupported("server_header_transformation", "APPEND_IF_ABSENT")),
    };
    let (mut websocket, mut connect) = (false, false);
    for (i, u) in m.upgrade_configs.into_iter().enumerate() {
        let field = format!("upgrade_configs[{i}]");
        let which = if u.upgrade_type.eq_ignore_ascii_case(WEBSOCKET) {
            &mut websocket
        } else if u.upgrade_type.eq_ignore_ascii_case(CONNECT) {
            &mut connect
        } else {
            return Err(Bad::unsupported(field, format_args!("upgrade to {:?}", u.upgrade_type)));
        };
        if !u.filters.is_empty() {
            return Err(Bad::unsupported(field, "filters of an upgrade"));
        }
        *which |= bool_or(u.enabled, true);
    }
    let (filters, suppress_envoy) = to_filters(m.http_filters)?;
    let common = m.common_http_protocol_options.unwrap_or_default();
    let h2 = m.http2_protocol_options.unwrap_or_default();
    // Without it Envoy tells the hash alone.
    let parts = m.set_current_client_cert_details.unwrap_or_default();
    let request_headers_timeout =
        opt(m.request_headers_timeout).at("request_headers_timeout")?.filter(|d| !d.is_zero());
    Ok(HttpConnectionManager {
        stat_prefix: m.stat_prefix,
        codec,
        routes,
        filters,
        use_remote_address: bool_or(m.use_remote_address, false),
        trusted_hops: m.xff_num_trusted_hops,
        forward_client_cert,
        websocket,
        connect,
        server_name,
        normalize_path: bool_or(m.normalize_path, false),
        merge_slashes: m.merge_slashes,
        escaped_slashes: to_escaped_slashes(m.path_with_escaped_slashes_action)?,
        access_log: each("access_log", m.access_log, telemetry::to_access_log)?,
        tracing: m.tracing.map(|t| telemetry::to_tracing(t).map(Box::new)).transpose().at("tracing")?,
        idle_timeout: or_off(common.idle_timeout, IDLE).at("common_http_protocol_options")?,
        request_headers_timeout,
        stream_idle_timeout: or_off(m.stream_idle_timeout, STREAM_IDLE).at("stream_idle_timeout")?,
        max_stream_duration: opt(common.max_stream_duration)
            .at("common_http_protocol_options")?
            .filter(|d| !d.is_zero()),
        accept_http_10: m.http_protocol_options.as_ref().is_some_and(|o| o.accept_http_10),
        preserve_request_id: m.preserve_external_request_id,
        headers: AddedHeaders {
            request_id: bool_or(m.generate_request_id, true),
            forwarded_port: m.append_x_forwarded_port,
            suppress_envoy,
            client_cert: ClientCertParts {
                subject: bool_or(parts.subject, false),
                uri: parts.uri,
                dns: parts.dns,
                cert: parts.cert,
                chain: parts.chain,
            },
            preserve_case: to_preserve_case(m.http_protocol_options.as_ref()),
        },
        limits: HttpLimits {
            request_timeout: opt(m.request_timeout).at("request_timeout")?.filter(|d| !d.is_zero()),
            max_connection_duration: opt(common.max_connection_duration)
                .at("common_http_protocol_options")?
                .filter(|d| !d.is_zero()),
            // Nothing that a proxy of ours looks at.
            drain_timeout: None,
            underscores: to_underscores(common.headers_with_underscores_action)
                .at("common_http_protocol_options")?,
            max_concurrent_streams: h2.max_concurrent_streams.map(|v| v.value),
            stream_window: h2.initial_stream_window_size.map(|v| v.value),
            connection_window: h2.initial_connection_window_size.map(|v| v.value),
        },
    })
}

fn named(name: &str, config: gp::Any) -> hcm::HttpFilter {
    hcm::HttpFilter {
        name: name.to_owned(),
        config_type: Some(hcm::http_filter::ConfigType::TypedConfig(config)),
        ..Default::default()
    }
}

fn filter(f: &HttpFilter) -> hcm::HttpFilter {
    match f {
        HttpFilter::Rbac(r) => named("envoy.filters.http.rbac", any(&rbac::http(r))),
        HttpFilter::Jwt(j) => named(route::JWT, any(&jwt::encode(j))),
        HttpFilter::ExtAuthz(e) if e.on_routes.is_empty() => {
            named(route::EXT_AUTHZ, any(&ext_authz::encode(e)))
        }
        HttpFilter::ExtAuthz(e) => {
            hcm::HttpFilter { disabled: true, ..named(&e.on_routes, any(&ext_authz::encode(e))) }
        }
        HttpFilter::ExtProc(e) => named(route::EXT_PROC, any(&ext_proc::encode(e))),
        HttpFilter::LocalRateLimit(l) => named(route::LOCAL_RATE_LIMIT, any(&rate_limit::local(l))),
        HttpFilter::RateLimit(l) => named(route::RATE_LIMIT, any(&rate_limit::global(l))),
        HttpFilter::GrpcWeb => named("envoy.filters.http.grpc_web", any(&GrpcWeb::default())),
        HttpFilter::Compressor(c) => named(route::COMPRESSOR, any(&body::compressor(c))),
        HttpFilter::Buffer(n) => named(route::BUFFER, any(&body::buffer(*n))),
        HttpFilter::StatefulSession(s) => named(route::SESSION, any(&body::session(s))),
        HttpFilter::Names(c) => named(names::HTTP_FILTER, any(&names::http(c))),
        HttpFilter::OnDemand(o) => named(on_demand::FILTER, any(&on_demand::filter(*o))),
        HttpFilter::Cors => named(route::CORS, any(&Cors::default())),
        HttpFilter::Fault => named(route::FAULT, any(&HttpFault::default())),
        HttpFilter::GrpcStats => {
            use grpc_stats::filter_config::PerMethodStatSpecifier as S;
            let config = grpc_stats::FilterConfig {
                emit_filter_state: true,
                per_method_stat_specifier: Some(S::StatsForAllMethods(gp::BoolValue { value: false })),
                ..Default::default()
            };
            named("envoy.filters.http.grpc_stats", any(&config))
        }
    }
}

/// The filters before the router, and whether that one adds no `x-envoy-*`.
fn to_filters(list: Vec<hcm::HttpFilter>) -> Res<(Vec<HttpFilter>, bool)> {
    let mut suppress = false;
    let last = list.len().checked_sub(1).ok_or_else(|| Bad::new("http_filters", "is empty"))?;
    let mut out = Vec::with_capacity(last);
    for (i, f) in list.into_iter().enumerate() {
        let field = format!("http_filters[{i}]");
        let Some(hcm::http_filter::ConfigType::TypedConfig(a)) = f.config_type else {
            return Err(Bad::unsupported(field, "a filter without typed_config"));
        };
        let router = is::<Router>(&a);
        if router != (i == last) {
            return Err(Bad::new(field, "the router must be the last filter, and only there"));
        }
        if router {
            suppress = typed::<Router>(&a).at(&field)?.suppress_envoy_headers;
            continue;
        }
        // Only authorisers may be off and turned on by routes.
        if f.disabled && !is::<ExtAuthz>(&a) {
            return Err(Bad::unsupported(field, "a filter that is disabled"));
        }
        out.push(if is::<Rbac>(&a) {
            HttpFilter::Rbac(rbac::to_http(typed(&a).at(&field)?).at(&field)?)
        } else if is::<JwtAuthentication>(&a) {
            HttpFilter::Jwt(Arc::new(jwt::decode(typed(&a).at(&field)?).at(&field)?))
        } else if is::<ExtAuthz>(&a) {
            let mut e = ext_authz::decode(typed(&a).at(&field)?).at(&field)?;
            if f.disabled {
                e.on_routes = f.name;
            }
            HttpFilter::ExtAuthz(Arc::new(e))
        } else if is::<ExternalProcessor>(&a) {
            HttpFilter::ExtProc(Arc::new(ext_proc::decode(typed(&a).at(&field)?).at(&field)?))
        } else if is::<LocalRateLimit>(&a) {
            HttpFilter::LocalRateLimit(Arc::new(rate_limit::to_local(typed(&a).at(&field)?).at(&field)?))
        } else if is::<RateLimit>(&a) {
            HttpFilter::RateLimit(Arc::new(rate_limit::to_global(typed(&a).at(&field)?).at(&field)?))
        } else if is::<GrpcWeb>(&a) {
            HttpFilter::GrpcWeb
        } else if is::<Compressor>(&a) {
            HttpFilter::Compressor(Arc::new(body::to_compressor(typed(&a).at(&field)?).at(&field)?))
        } else if is::<Buffer>(&a) {
            HttpFilter::Buffer(body::to_buffer(typed(&a).at(&field)?).at(&field)?)
        } else if is::<StatefulSession>(&a) {
            HttpFilter::StatefulSession(Arc::new(body::to_session(typed(&a).at(&field)?).at(&field)?))
        } else if is::<DynamicForwardProxy>(&a) {
            HttpFilter::Names(names::to_http(typed(&a).at(&field)?).at(&field)?)
        } else if is::<OnDemand>(&a) {
            HttpFilter::OnDemand(on_demand::to_filter(typed(&a).at(&field)?).at(&field)?)
        } else if is::<Cors>(&a) {
            HttpFilter::Cors
        } else if is::<HttpFault>(&a) {
            let m: HttpFault = typed(&a).at(&field)?;
            if m.delay.is_some() || m.abort.is_some() || m.response_rate_limit.is_some() {
                return Err(Bad::unsupported(field, "a fault on the filter (only on routes)"));
            }
            HttpFilter::Fault
        } else if is::<grpc_stats::FilterConfig>(&a) {
            HttpFilter::GrpcStats
        } else if f.is_optional {
            // The server says that a client may do without it.
            continue;
        } else {
            return Err(Bad::unsupported(field, format_args!("filter {:?} ({})", f.name, a.type_url)));
        });
    }
    on_demand::order(&out)?;
    Ok((out, suppress))
}

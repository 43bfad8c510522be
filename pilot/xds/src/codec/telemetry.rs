//! Traces and access logs.

use std::{collections::BTreeMap, time::Duration};

use envoy_types::pb::{
    envoy::{
        config::{accesslog::v3 as al, core::v3 as core, trace::v3 as trace},
        extensions::{
            access_loggers::{file::v3 as file, grpc::v3 as grpc, open_telemetry::v3 as otlp},
            filters::network::http_connection_manager::v3::http_connection_manager as h,
            tracers::opentelemetry::resource_detectors::v3::EnvironmentResourceDetectorConfig,
        },
        r#type::{metadata::v3 as meta, tracing::v3 as typ_tracing, v3 as typ},
    },
    opentelemetry::proto::common::v1 as common_otlp,
};
use mesh_model::proxy::{
    AccessLog, AccessLogFormat, Collector, FileLog, GrpcLog, HttpCollector, NodeText, OtlpLog, OtlpTraces,
    TagValue, TraceProvider, Tracing, ZipkinTraces,
};
use typ_tracing::custom_tag as tag;

use super::{At, Bad, Res, common::*, each, refuse};

/// Under which key of metadata our own proxies find what they know of themselves.
const NODE: &str = "flotilla.node";
/// Envoy's limit of a call to Zipkin's collector where none is said.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Envoy's name of the detector that reads the environment.
const ENVIRONMENT: &str = "envoy.tracers.opentelemetry.resource_detectors.environment";

const NODE_TEXTS: [(NodeText, &str); 5] = [
    (NodeText::CanonicalService, "canonical_service"),
    (NodeText::CanonicalRevision, "canonical_revision"),
    (NodeText::Mesh, "mesh"),
    (NodeText::Namespace, "namespace"),
    (NodeText::Cluster, "cluster"),
];

pub(super) fn tracing(t: &Tracing) -> h::Tracing {
    h::Tracing {
        random_sampling: Some(typ::Percent { value: f64::from(t.sampling) / 100.0 }),
        max_path_tag_length: (t.max_path != Tracing::MAX_PATH).then(|| u32v(t.max_path)).flatten(),
        custom_tags: t.tags.iter().map(custom_tag).collect(),
        spawn_upstream_span: if t.upstream_spans { boolv(true) } else { None },
        provider: t.provider.as_ref().map(provider),
        ..Default::default()
    }
}

// A percentage by its type, so below 10,000 after scaling.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
pub(super) fn to_tracing(t: h::Tracing) -> Res<Tracing> {
    refuse!(t; operation, upstream_operation, no_context_propagation);
    let percent = t.random_sampling.map_or(100.0, |p| p.value).clamp(0.0, 100.0);
    Ok(Tracing {
        sampling: (percent * 100.0).round() as u32,
        max_path: t.max_path_tag_length.map_or(Tracing::MAX_PATH, |v| v.value),
        tags: each("custom_tags", t.custom_tags, to_custom_tag)?.into_iter().collect(),
        upstream_spans: bool_or(t.spawn_upstream_span, false),
        provider: t.provider.map(to_provider).transpose().at("provider")?,
    })
}

fn custom_tag((name, value): (&String, &TagValue)) -> typ_tracing::CustomTag {
    let value = match value {
        TagValue::Literal(value) => tag::Type::Literal(tag::Literal { value: value.clone() }),
        TagValue::Environment { name, default } => {
            tag::Type::Environment(tag::Environment { name: name.clone(), default_value: default.clone() })
        }
        TagValue::Header { name, default } => {
            tag::Type::RequestHeader(tag::Header { name: name.clone(), default_value: default.clone() })
        }
        TagValue::Node(text) => {
            let of = NODE_TEXTS.iter().find(|(t, _)| t == text);
            let segment = meta::metadata_key::path_segment::Segment::Key(
                of.map(|(_, key)| (*key).to_owned()).unwrap_or_default(),
            );
            tag::Type::Metadata(tag::Metadata {
                metadata_key: Some(meta::MetadataKey {
                    key: NODE.to_owned(),
                    path: vec![meta::metadata_key::PathSegment { segment: Some(segment) }],
                }),
                ..Default::default()
            })
        }
    };
    typ_tracing::CustomTag { tag: name.clone(), r#type: Some(value) }
}

fn to_custom_tag(t: typ_tracing::CustomTag) -> Res<(String, TagValue)> {
    if t.tag.is_empty() {
        return Err(Bad::new("tag", "is missing"));
    }
    let value = match t.r#type {
        Some(tag::Type::Literal(l)) => TagValue::Literal(l.value),
        Some(tag::Type::Environment(e)) => TagValue::Environment { name: e.name, default: e.default_value },
        Some(tag::Type::RequestHeader(r)) => TagValue::Header { name: r.name, default: r.default_value },
        Some(tag::Type::Metadata(m)) => TagValue::Node(to_node_text(m).at("metadata")?),
        Some(tag::Type::Value(_)) => return Err(Bad::unsupported("value", "a format")),
        None => return Err(Bad::new("type", "is missing")),
    };
    Ok((t.tag, value))
}

fn to_node_text(m: tag::Metadata) -> Res<NodeText> {
    use meta::metadata_key::path_segment::Segment;
    let key = m.metadata_key.unwrap_or_default();
    let path = match &key.path[..] {
        [meta::metadata_key::PathSegment { segment: Some(Segment::Key(k)) }] => Some(k.as_str()),
        _ => None,
    };
    let known = NODE_TEXTS.iter().find(|(_, k)| key.key == NODE && path == Some(*k));
    known.map(|(t, _)| *t).ok_or_else(|| Bad::unsupported("metadata_key", "metadata of requests"))
}

fn provider(p: &TraceProvider) -> trace::tracing::Http {
    let (name, config) = match p {
        TraceProvider::OpenTelemetry(o) => ("envoy.tracers.opentelemetry", any(&open_telemetry(o))),
        TraceProvider::Zipkin(z) => ("envoy.tracers.zipkin", any(&zipkin(z))),
        TraceProvider::Datadog { cluster, host, service_name } => (
            "envoy.tracers.datadog",
            any(&trace::DatadogConfig {
                collector_cluster: cluster.clone(),
                service_name: service_name.clone(),
                collector_hostname: host.clone(),
                ..Default::default()
            }),
        ),
        TraceProvider::SkyWalking(g) => (
            "envoy.tracers.skywalking",
            any(&trace::SkyWalkingConfig { grpc_service: Some(grpc_service(g)), client_config: None }),
        ),
    };
    trace::tracing::Http {
        name: name.to_owned(),
        config_type: Some(trace::tracing::http::ConfigType::TypedConfig(config)),
    }
}

fn to_provider(p: trace::tracing::Http) -> Res<TraceProvider> {
    let Some(trace::tracing::http::ConfigType::TypedConfig(a)) = p.config_type else {
        return Err(Bad::new("typed_config", "is missing"));
    };
    if is::<trace::OpenTelemetryConfig>(&a) {
        return Ok(TraceProvider::OpenTelemetry(to_open_telemetry(typed(&a)?)?));
    }
    if is::<trace::ZipkinConfig>(&a) {
        return Ok(TraceProvider::Zipkin(to_zipkin(typed(&a)?)?));
    }
    Err(Bad::unsupported("typed_config", format_args!("tracer {:?}", a.type_url)))
}

fn open_telemetry(o: &OtlpTraces) -> trace::OpenTelemetryConfig {
    let (grpc, http) = match &o.to {
        Collector::Grpc(g) => (Some(grpc_service(g)), None),
        Collector::Http(c) => (None, Some(http_service(c))),
    };
    let environment = || core::TypedExtensionConfig {
        name: ENVIRONMENT.to_owned(),
        typed_config: Some(any(&EnvironmentResourceDetectorConfig::default())),
    };
    trace::OpenTelemetryConfig {
        grpc_service: grpc,
        http_service: http,
        service_name: o.service_name.clone(),
        resource_detectors: o.environment.then(environment).into_iter().collect(),
        ..Default::default()
    }
}

fn to_open_telemetry(o: trace::OpenTelemetryConfig) -> Res<OtlpTraces> {
    refuse!(o; exporter, sampler, set_telemetry_sdk_resource_attributes, set_service_name_resource_attribute);
    refuse!(o; set_instrumentation_scope);
    let to = match (o.grpc_service, o.http_service) {
        (Some(g), None) => Collector::Grpc(to_grpc_service(g).at("grpc_service")?),
        (None, Some(s)) => Collector::Http(to_http_service(s).at("http_service")?),
        _ => return Err(Bad::new("grpc_service", "is missing, or http_service is there as well")),
    };
    let mut environment = false;
    for (i, d) in o.resource_detectors.into_iter().enumerate() {
        if !d.typed_config.is_some_and(|c| is::<EnvironmentResourceDetectorConfig>(&c)) {
            return Err(Bad::unsupported(
                format!("resource_detectors[{i}]"),
                format_args!("detector {:?}", d.name),
            ));
        }
        environment = true;
    }
    Ok(OtlpTraces { to, service_name: o.service_name, environment })
}

fn zipkin(z: &ZipkinTraces) -> trace::ZipkinConfig {
    use trace::zipkin_config::{CollectorEndpointVersion as V, TraceContextOption as C};
    let context = if z.w3c { C::UseB3WithW3cPropagation } else { C::UseB3 };
    trace::ZipkinConfig {
        trace_id_128bit: z.long_ids,
        shared_span_context: boolv(false),
        collector_endpoint_version: V::HttpJson.into(),
        trace_context_option: context.into(),
        collector_service: Some(http_service(&z.to)),
        ..Default::default()
    }
}

fn to_zipkin(z: trace::ZipkinConfig) -> Res<ZipkinTraces> {
    use trace::zipkin_config::{CollectorEndpointVersion as V, TraceContextOption as C};
    refuse!(z; timestamp_trace_ids);
    if z.collector_endpoint_version != i32::from(V::HttpJson) {
        return Err(Bad::unsupported("collector_endpoint_version", "another form than HTTP_JSON"));
    }
    // A span that both sides of a call report, with one ID.
    if bool_or(z.shared_span_context, true) {
        return Err(Bad::unsupported("shared_span_context", "spans that two proxies share"));
    }
    let to = match z.collector_service {
        Some(s) => to_http_service(s).at("collector_service")?,
        None => HttpCollector {
            authority: if z.collector_hostname.is_empty() {
                z.collector_cluster.clone()
            } else {
                z.collector_hostname
            },
            cluster: z.collector_cluster,
            path: z.collector_endpoint,
            timeout: TIMEOUT,
            headers: vec![],
        },
    };
    let w3c = z.trace_context_option == i32::from(C::UseB3WithW3cPropagation);
    Ok(ZipkinTraces { to, long_ids: z.trace_id_128bit, w3c })
}

fn http_service(c: &HttpCollector) -> core::HttpService {
    let header = |(k, v): &(String, String)| core::HeaderValueOption {
        header: Some(core::HeaderValue { key: k.clone(), value: v.clone(), ..Default::default() }),
        append_action: core::header_value_option::HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
        ..Default::default()
    };
    core::HttpService {
        http_uri: Some(http_uri(&format!("http://{}{}", c.authority, c.path), &c.cluster, c.timeout)),
        request_headers_to_add: c.headers.iter().map(header).collect(),
        ..Default::default()
    }
}

fn to_http_service(s: core::HttpService) -> Res<HttpCollector> {
    let (uri, cluster, timeout) = to_http_uri(s.http_uri).at("http_uri")?;
    let rest = uri.split_once("://").map_or(uri.as_str(), |(_, rest)| rest);
    let (authority, path) = match rest.find('/') {
        Some(at) => rest.split_at(at),
        None => (rest, "/"),
    };
    let headers = each("request_headers_to_add", s.request_headers_to_add, |o| {
        let h = o.header.ok_or_else(|| Bad::new("header", "is missing"))?;
        refuse!(h; raw_value);
        Ok((h.key, h.value))
    })?;
    Ok(HttpCollector { cluster, authority: authority.to_owned(), path: path.to_owned(), timeout, headers })
}

pub(super) fn access_log(l: &AccessLog) -> al::AccessLog {
    let (name, config) = match l {
        AccessLog::File(f) => ("envoy.access_loggers.file", any(&file_log(f))),
        AccessLog::Grpc(g) => {
            let common = grpc::CommonGrpcAccessLogConfig {
                filter_state_objects_to_log: g.filter_state.clone(),
                ..common(&g.log_name, &g.service)
            };
            if g.requests {
                let m = grpc::HttpGrpcAccessLogConfig {
                    common_config: Some(common),
                    additional_request_headers_to_log: g.request_headers.clone(),
                    additional_response_headers_to_log: g.response_headers.clone(),
                    additional_response_trailers_to_log: g.response_trailers.clone(),
                };
                ("envoy.access_loggers.http_grpc", any(&m))
            } else {
                let m = grpc::TcpGrpcAccessLogConfig { common_config: Some(common) };
                ("envoy.access_loggers.tcp_grpc", any(&m))
            }
        }
        AccessLog::Otlp(o) => ("envoy.access_loggers.open_telemetry", any(&otlp_log(o))),
    };
    al::AccessLog {
        name: name.to_owned(),
        filter: None,
        config_type: Some(al::access_log::ConfigType::TypedConfig(config)),
    }
}

fn common(log_name: &str, service: &mesh_model::proxy::GrpcService) -> grpc::CommonGrpcAccessLogConfig {
    grpc::CommonGrpcAccessLogConfig {
        log_name: log_name.to_owned(),
        grpc_service: Some(grpc_service(service)),
        transport_api_version: core::ApiVersion::V3.into(),
        ..Default::default()
    }
}

fn to_common(
    c: Option<grpc::CommonGrpcAccessLogConfig>,
) -> Res<(String, mesh_model::proxy::GrpcService, Vec<String>)> {
    let c = c.ok_or_else(|| Bad::new("common_config", "is missing"))?;
    refuse!(c; custom_tags);
    let service = c.grpc_service.ok_or_else(|| Bad::new("common_config.grpc_service", "is missing"))?;
    let service = to_grpc_service(service).at("common_config.grpc_service")?;
    Ok((c.log_name, service, c.filter_state_objects_to_log))
}

pub(super) fn to_access_log(l: al::AccessLog) -> Res<AccessLog> {
    refuse!(l; filter);
    let Some(al::access_log::ConfigType::TypedConfig(a)) = l.config_type else {
        return Err(Bad::new("typed_config", "is missing"));
    };
    if is::<grpc::HttpGrpcAccessLogConfig>(&a) {
        let m: grpc::HttpGrpcAccessLogConfig = typed(&a)?;
        let (log_name, service, filter_state) = to_common(m.common_config)?;
        return Ok(AccessLog::Grpc(Box::new(GrpcLog {
            service,
            log_name,
            requests: true,
            filter_state,
            request_headers: m.additional_request_headers_to_log,
            response_headers: m.additional_response_headers_to_log,
            response_trailers: m.additional_response_trailers_to_log,
        })));
    }
    if is::<grpc::TcpGrpcAccessLogConfig>(&a) {
        let m: grpc::TcpGrpcAccessLogConfig = typed(&a)?;
        let (log_name, service, filter_state) = to_common(m.common_config)?;
        return Ok(AccessLog::Grpc(Box::new(GrpcLog {
            service,
            log_name,
            requests: false,
            filter_state,
            request_headers: vec![],
            response_headers: vec![],
            response_trailers: vec![],
        })));
    }
    if is::<otlp::OpenTelemetryAccessLogConfig>(&a) {
        return Ok(AccessLog::Otlp(Box::new(to_otlp_log(typed(&a)?)?)));
    }
    Ok(AccessLog::File(to_file_log(typed(&a)?)?))
}

fn any_value(text: &str) -> common_otlp::AnyValue {
    common_otlp::AnyValue { value: Some(common_otlp::any_value::Value::StringValue(text.to_owned())) }
}

fn to_text(v: Option<common_otlp::AnyValue>) -> Res<String> {
    match v.and_then(|v| v.value) {
        None => Ok(String::new()),
        Some(common_otlp::any_value::Value::StringValue(s)) => Ok(s),
        Some(_) => Err(Bad::unsupported("value", "another value than a text")),
    }
}

#[allow(deprecated)]
fn otlp_log(o: &OtlpLog) -> otlp::OpenTelemetryAccessLogConfig {
    let attribute = |(key, value): (&String, &String)| common_otlp::KeyValue {
        key: key.clone(),
        value: Some(any_value(value)),
        ..Default::default()
    };
    otlp::OpenTelemetryAccessLogConfig {
        common_config: Some(common(&o.log_name, &o.service)),
        disable_builtin_labels: true,
        body: (!o.body.is_empty()).then(|| any_value(&o.body)),
        attributes: (!o.attributes.is_empty())
            .then(|| common_otlp::KeyValueList { values: o.attributes.iter().map(attribute).collect() }),
        ..Default::default()
    }
}

#[allow(deprecated)]
fn to_otlp_log(o: otlp::OpenTelemetryAccessLogConfig) -> Res<OtlpLog> {
    refuse!(o; http_service, grpc_service, resource_attributes, resource_detectors, formatters, custom_tags);
    let (log_name, service, _) = to_common(o.common_config)?;
    let attributes =
        each("attributes", o.attributes.unwrap_or_default().values, |kv| Ok((kv.key, to_text(kv.value)?)))?;
    Ok(OtlpLog {
        service,
        log_name,
        body: to_text(o.body).at("body")?,
        attributes: attributes.into_iter().collect::<BTreeMap<_, _>>(),
    })
}

fn file_log(l: &FileLog) -> file::FileAccessLog {
    use core::substitution_format_string::Format;
    let text = |s: &str| {
        Some(Format::TextFormatSource(core::DataSource {
            specifier: Some(core::data_source::Specifier::InlineString(s.to_owned())),
            ..Default::default()
        }))
    };
    let format = match &l.format {
        // Envoy's own line is another one.
        AccessLogFormat::Text(s) if s.is_empty() => text(AccessLogFormat::LINE),
        AccessLogFormat::Text(s) => text(s),
        AccessLogFormat::Json(map) => Some(Format::JsonFormat(string_struct(map))),
    };
    file::FileAccessLog {
        path: l.path.clone(),
        access_log_format: format.map(|f| {
            file::file_access_log::AccessLogFormat::LogFormat(core::SubstitutionFormatString {
                format: Some(f),
                omit_empty_values: l.omit_empty,
                ..Default::default()
            })
        }),
    }
}

#[allow(deprecated)]
fn to_file_log(m: file::FileAccessLog) -> Res<FileLog> {
    use core::{data_source::Specifier, substitution_format_string::Format};
    use file::file_access_log::AccessLogFormat as F;
    let mut omit_empty = false;
    let format = match m.access_log_format {
        None => AccessLogFormat::Text(String::new()),
        Some(F::Format(s)) => AccessLogFormat::Text(s),
        Some(F::JsonFormat(s) | F::TypedJsonFormat(s)) => AccessLogFormat::Json(to_string_map(s)),
        Some(F::LogFormat(f)) => {
            refuse!(f; formatters);
            omit_empty = f.omit_empty_values;
            match f.format {
                None => AccessLogFormat::Text(String::new()),
                Some(Format::TextFormat(s)) => AccessLogFormat::Text(s),
                Some(Format::JsonFormat(s)) => AccessLogFormat::Json(to_string_map(s)),
                Some(Format::TextFormatSource(d)) => match d.specifier {
                    Some(Specifier::InlineString(s)) if s == AccessLogFormat::LINE => {
                        AccessLogFormat::Text(String::new())
                    }
                    Some(Specifier::InlineString(s)) => AccessLogFormat::Text(s),
                    _ => return Err(Bad::unsupported("text_format_source", "a format that is not inline")),
                },
            }
        }
    };
    Ok(FileLog { path: m.path, format, omit_empty })
}

//! Where traces and access logs go.
//!
//! A collector is a service of the mesh, called through its cluster. A proxy that may not call it (`Sidecar`, `exportTo`)
//! has no such cluster, and tells nobody.

use std::{collections::BTreeMap, sync::LazyLock, time::Duration};

use mesh_model::{
    authored::{
        AccessLogEncoding, CustomTag, DatadogProvider, FileLogProvider, GrpcLogProvider, MeshConfig,
        OpenTelemetryProvider, OtlpLogProvider, ProviderHeader, ServiceAttributeEnrichment,
        TraceContextOption, TracingSettings, ZipkinProvider,
    },
    proxy::{
        AccessLog, AccessLogFormat, Collector, FileLog, GrpcLog, GrpcService, HttpCollector, NodeText,
        OtlpLog, OtlpTraces, TagValue, TraceProvider, Tracing, ZipkinTraces,
    },
};

use super::Ctx;
use crate::{
    generate::common::cluster_name,
    hosts::SERVICE_DOMAIN,
    index::Index,
    providers::{self, Target},
    proxy::ProxyNode,
};

/// Path of Zipkin's collector.
const ZIPKIN: &str = "/api/v2/spans";
/// Limit of a call to Zipkin's collector.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Istio's names of logs.
const REQUESTS: &str = "http_envoy_accesslog";
const CONNECTIONS: &str = "tcp_envoy_accesslog";
const RECORDS: &str = "otel_envoy_accesslog";
/// What Istio's Envoys put into entries besides.
const STATE: [&str; 2] = ["upstream_peer", "downstream_peer"];

/// The standard fields of a log in JSON.
const JSON_FIELDS: &[(&str, &str)] = &[
    ("authority", "%REQ(:AUTHORITY)%"),
    ("bytes_received", "%BYTES_RECEIVED%"),
    ("bytes_sent", "%BYTES_SENT%"),
    ("downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("duration", "%DURATION%"),
    ("method", "%REQ(:METHOD)%"),
    ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
    ("protocol", "%PROTOCOL%"),
    ("request_id", "%REQ(X-REQUEST-ID)%"),
    ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
    ("response_code", "%RESPONSE_CODE%"),
    ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
    ("response_flags", "%RESPONSE_FLAGS%"),
    ("route_name", "%ROUTE_NAME%"),
    ("start_time", "%START_TIME%"),
    ("upstream_cluster", "%UPSTREAM_CLUSTER%"),
    ("upstream_host", "%UPSTREAM_HOST%"),
    ("upstream_service_time", "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%"),
    ("upstream_transport_failure_reason", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"),
    ("user_agent", "%REQ(USER-AGENT)%"),
    ("x_forwarded_for", "%REQ(X-FORWARDED-FOR)%"),
];

/// The provider `envoy`.
static STANDARD_LOG: LazyLock<FileLogProvider> =
    LazyLock::new(|| FileLogProvider { path: "/dev/stdout".to_owned(), ..FileLogProvider::default() });

/// What a proxy's spans say of it, where it has to be told (an Envoy whose spans go to a provider of the mesh).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Traced {
    /// Name of its service, as Istio has it and by OpenTelemetry's conventions.
    service: String,
    conventional: String,
    tags: Vec<(&'static str, String)>,
}

impl Traced {
    pub(crate) fn new(proxy: &ProxyNode, mesh: &str, cluster: &str) -> Self {
        let text = |key: &str| proxy.metadata.get(key).map(String::as_str);
        let workload = text("WORKLOAD_NAME").unwrap_or("unknown_service");
        let label = |names: &[&str]| names.iter().find_map(|n| proxy.labels.get(*n)).map(String::as_str);
        let name = label(&["service.istio.io/canonical-name", "app"]).unwrap_or(workload);
        let tags = NodeText::ISTIO.map(|(tag, of)| {
            let value = match of {
                NodeText::CanonicalService => {
                    label(&["service.istio.io/canonical-name"]).unwrap_or("unknown")
                }
                NodeText::CanonicalRevision => {
                    label(&["service.istio.io/canonical-revision"]).unwrap_or("latest")
                }
                NodeText::Mesh => text("MESH_ID").unwrap_or(mesh),
                NodeText::Namespace => &proxy.namespace,
                NodeText::Cluster => text("CLUSTER_ID").unwrap_or(cluster),
            };
            (tag, value.to_owned())
        });
        Self {
            service: format!("{name}.{}", proxy.namespace),
            conventional: label(&["app.kubernetes.io/instance", "app.kubernetes.io/name"])
                .unwrap_or(workload)
                .to_owned(),
            tags: tags.into(),
        }
    }
}

/// Who takes spans.
pub(crate) enum Tracer<'a> {
    Zipkin(&'a ZipkinProvider),
    Datadog(&'a DatadogProvider),
    SkyWalking,
    OpenTelemetry(&'a OpenTelemetryProvider),
    /// By its address alone (`tracing.zipkin`, `tracing.datadog`).
    ZipkinAt,
    DatadogAt,
}

/// Who takes the mesh's spans, if its settings say so; `Err` says why nobody does.
pub(crate) fn tracer<'a>(
    mesh: &'a MeshConfig,
    index: &'a Index,
) -> Option<Result<(Tracer<'a>, Target<'a>), String>> {
    if let Some(name) = mesh.default_providers.as_ref().and_then(|d| d.tracing.first()) {
        let Some(p) = mesh.extension_providers.iter().find(|p| p.name == *name) else {
            return Some(Err(format!("MeshConfig.extensionProviders has no provider {name:?}")));
        };
        let (tracer, service, port, http2) = if let Some(z) = &p.zipkin {
            (Tracer::Zipkin(z), &z.service, z.port, false)
        } else if let Some(d) = &p.datadog {
            (Tracer::Datadog(d), &d.service, d.port, false)
        } else if let Some(s) = &p.skywalking {
            (Tracer::SkyWalking, &s.service, s.port, true)
        } else if let Some(o) = &p.opentelemetry {
            (Tracer::OpenTelemetry(o), &o.service, o.port, o.http.is_none())
        } else {
            return Some(Err(format!("provider {name:?} takes no spans")));
        };
        return Some(providers::target(index, name, service, port, http2).map(|t| (tracer, t)));
    }
    if mesh.enable_tracing == Some(false) {
        return None;
    }
    let d = mesh.default_config.as_ref()?;
    let of = |t: &'a TracingSettings| {
        let zipkin = t.zipkin.as_ref().map(|z| (Tracer::ZipkinAt, z.address.as_str()));
        zipkin.or_else(|| t.datadog.as_ref().map(|d| (Tracer::DatadogAt, d.address.as_str())))
    };
    let old = (!d.zipkin_address.is_empty()).then_some((Tracer::ZipkinAt, d.zipkin_address.as_str()));
    let (tracer, address) = d.tracing.as_ref().and_then(of).or(old)?;
    Some(at(index, address, false).map(|t| (tracer, t)))
}

/// The service at an address, `host:port`.
fn at<'a>(index: &'a Index, address: &str, http2: bool) -> Result<Target<'a>, String> {
    let target = address.rsplit_once(':').and_then(|(h, p)| Some((h, p.parse().ok()?)));
    let Some((host, port)) = target else {
        return Err(format!("{address:?} is not host:port"));
    };
    // Istio's addresses are short: `zipkin.istio-system:9411`.
    let long = format!("{host}.{SERVICE_DOMAIN}");
    let host = if index.services.contains_key(index.canonical(&long)) { &long } else { host };
    providers::target(index, address, host, port, http2)
}

/// Who gets log entries besides the file, where no provider is named.
fn log_service<'a>(mesh: &MeshConfig, index: &'a Index) -> Option<Result<Target<'a>, String>> {
    let named = mesh.default_providers.as_ref().is_some_and(|d| !d.access_logging.is_empty());
    let service = mesh.default_config.as_ref()?.envoy_access_log_service.as_ref()?;
    let used = mesh.enable_envoy_access_log_service && !named && !service.address.is_empty();
    used.then(|| at(index, &service.address, true))
}

/// What entries of a log are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Logged {
    Requests,
    Connections,
}

/// A collector of log entries.
fn log_target<'a>(
    index: &'a Index,
    p: &'a mesh_model::authored::ProviderDefinition,
) -> Option<Result<Target<'a>, String>> {
    let grpc = p.envoy_http_als.as_ref().or(p.envoy_tcp_als.as_ref()).map(|g| (&g.service, g.port));
    let (service, port) = grpc.or_else(|| p.envoy_otel_als.as_ref().map(|o| (&o.service, o.port)))?;
    Some(providers::target(index, &p.name, service, port, true))
}

/// Collectors that the mesh's settings name and that cannot be called.
pub(crate) fn problems(mesh: &MeshConfig, index: &Index) -> Vec<String> {
    let mut out = Vec::new();
    if let Some(Err(why)) = tracer(mesh, index) {
        out.push(format!("{why}; no spans go there"));
    }
    if let Some(Err(why)) = log_service(mesh, index) {
        out.push(format!("{why}; no log entries go there"));
    }
    for name in mesh.default_providers.iter().flat_map(|d| &d.access_logging) {
        let p = mesh.extension_providers.iter().find(|p| p.name == *name);
        if let Some(Err(why)) = p.and_then(|p| log_target(index, p)) {
            out.push(format!("{why}; no log entries go there"));
        }
    }
    out
}

/// Clusters of collectors that the proxy may call.
pub(super) fn clusters(ctx: &Ctx<'_>) -> Vec<String> {
    let (mesh, index) = (&ctx.world.config.mesh, &ctx.world.index);
    let spans = tracer(mesh, index).and_then(Result::ok).map(|(_, t)| t);
    let logs = mesh.default_providers.iter().flat_map(|d| &d.access_logging);
    let logs = logs.filter_map(|name| mesh.extension_providers.iter().find(|p| p.name == *name));
    let logs = logs.filter_map(|p| log_target(index, p)?.ok());
    let old = log_service(mesh, index).and_then(Result::ok);
    spans.into_iter().chain(logs).chain(old).filter_map(|t| ctx.cluster_of(&t)).collect()
}

impl<'a> Ctx<'a> {
    /// The cluster of a collector, if the proxy has it.
    fn cluster_of(&self, t: &Target<'a>) -> Option<String> {
        let entry = self.service(&t.entry.service.host).filter(|_| !self.proxy.grpc)?;
        Some(cluster_name(t.port, "", &entry.service.host))
    }

    fn grpc_service(&self, t: &Target<'a>) -> Option<GrpcService> {
        let cluster = self.cluster_of(t)?;
        Some(GrpcService { cluster, authority: t.entry.service.host.clone(), ..GrpcService::default() })
    }

    pub(super) fn access_log(&self, of: Logged) -> Vec<AccessLog> {
        let mesh = &self.world.config.mesh;
        if let Some(named) = mesh.default_providers.as_ref().filter(|d| !d.access_logging.is_empty()) {
            return named.access_logging.iter().filter_map(|name| self.named_log(name)).collect();
        }
        let service = log_service(mesh, &self.world.index).and_then(Result::ok);
        let service = service.and_then(|t| self.grpc_service(&t)).map(|service| {
            let name = if of == Logged::Requests { REQUESTS } else { CONNECTIONS };
            AccessLog::Grpc(Box::new(grpc_log(&GrpcLogProvider::default(), service, name)))
        });
        self.file_of_mesh().into_iter().chain(service).collect()
    }

    /// The log in `accessLogFile`.
    fn file_of_mesh(&self) -> Option<AccessLog> {
        let mesh = &self.world.config.mesh;
        let path = mesh.access_log_file.clone().filter(|p| !p.is_empty())?;
        let text = mesh.access_log_format.clone().unwrap_or_default();
        let format = match mesh.access_log_encoding {
            AccessLogEncoding::Text => AccessLogFormat::Text(text),
            AccessLogEncoding::Json => {
                // A JSON object of templates, or the standard fields.
                let custom: Option<BTreeMap<String, String>> = serde_json::from_str(&text).ok();
                AccessLogFormat::Json(custom.unwrap_or_else(standard_fields))
            }
        };
        Some(AccessLog::File(FileLog { path, format, omit_empty: false }))
    }

    fn named_log(&self, name: &str) -> Option<AccessLog> {
        let mut all = self.world.config.mesh.extension_providers.iter();
        let Some(p) = all.find(|p| p.name == *name) else {
            // Istio has it without a definition.
            return (name == "envoy").then(|| file_log(&STANDARD_LOG));
        };
        if let Some(f) = &p.envoy_file_access_log {
            return Some(file_log(f));
        }
        let service = self.grpc_service(&log_target(&self.world.index, p)?.ok()?)?;
        Some(match (&p.envoy_http_als, &p.envoy_tcp_als, &p.envoy_otel_als) {
            (Some(h), ..) => AccessLog::Grpc(Box::new(grpc_log(h, service, REQUESTS))),
            (_, Some(t), _) => AccessLog::Grpc(Box::new(grpc_log(t, service, CONNECTIONS))),
            (.., Some(o)) => AccessLog::Otlp(Box::new(otlp_log(o, service))),
            _ => return None,
        })
    }

    pub(super) fn tracing(&self) -> Option<Box<Tracing>> {
        let mesh = &self.world.config.mesh;
        let found = tracer(mesh, &self.world.index);
        if mesh.enable_tracing == Some(false) && found.is_none() {
            return None;
        }
        let settings = mesh.default_config.as_ref().and_then(|c| c.tracing.as_ref());
        let percent = settings.and_then(|t| t.sampling).or(mesh.trace_sampling).unwrap_or(1.0);
        // At most 10,000 by the clamp.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let sampling = (percent.clamp(0.0, 100.0) * 100.0).round() as u32;
        let found = found.and_then(Result::ok);
        let longest = [
            found.as_ref().map_or(0, |(t, _)| t.longest_path()),
            settings.map_or(0, |t| t.max_path_tag_length),
            Tracing::MAX_PATH,
        ];
        let provider = found.and_then(|(t, to)| self.trace_provider(&t, &to));
        let mut tags = BTreeMap::new();
        if settings.and_then(|t| t.enable_istio_tags).unwrap_or(true) {
            if self.proxy.flotilla {
                tags.extend(NodeText::ISTIO.map(|(tag, of)| (tag.to_owned(), TagValue::Node(of))));
            } else if let Some(t) = &self.proxy.situation.traced {
                tags.extend(t.tags.iter().map(|(k, v)| ((*k).to_owned(), TagValue::Literal(v.clone()))));
            }
        }
        let custom = settings.iter().flat_map(|t| &t.custom_tags);
        tags.extend(custom.filter_map(|(name, t)| Some((name.clone(), tag(t)?))));
        Some(Box::new(Tracing {
            sampling,
            max_path: longest.into_iter().find(|n| *n > 0).unwrap_or(Tracing::MAX_PATH),
            tags,
            upstream_spans: provider.is_some() && self.proxy.router
                || matches!(provider, Some(TraceProvider::SkyWalking(_))),
            provider,
        }))
    }

    fn trace_provider(&self, tracer: &Tracer<'_>, to: &Target<'a>) -> Option<TraceProvider> {
        let cluster = self.cluster_of(to)?;
        let host = to.entry.service.host.clone();
        // Ours knows its own name.
        let traced = self.proxy.situation.traced.as_deref();
        let named = |of: fn(&Traced) -> &String| traced.map(|t| of(t).clone()).unwrap_or_default();
        let post =
            |path: &str, timeout: Option<mesh_model::authored::Duration>, headers: &[ProviderHeader]| {
                HttpCollector {
                    cluster: cluster.clone(),
                    authority: host.clone(),
                    path: if path.starts_with('/') { path.to_owned() } else { format!("/{path}") },
                    timeout: timeout.map_or(TIMEOUT, Duration::from),
                    headers: values(headers),
                }
            };
        let zipkin = |to, long_ids, w3c| TraceProvider::Zipkin(ZipkinTraces { to, long_ids, w3c });
        Some(match tracer {
            Tracer::Zipkin(z) => {
                let path = if z.path.is_empty() { ZIPKIN } else { &z.path };
                let w3c = z.trace_context_option == TraceContextOption::UseB3WithW3cPropagation;
                zipkin(post(path, z.timeout, &z.headers), !z.enable_64bit_trace_id, w3c)
            }
            Tracer::ZipkinAt => zipkin(post(ZIPKIN, None, &[]), true, false),
            Tracer::OpenTelemetry(o) => {
                let conventional =
                    o.service_attribute_enrichment == ServiceAttributeEnrichment::OtelSemanticConventions;
                let to = match &o.http {
                    Some(h) => Collector::Http(post(&h.path, h.timeout, &h.headers)),
                    None => Collector::Grpc(GrpcService {
                        timeout: o.grpc.as_ref().and_then(|g| g.timeout).map(Duration::from),
                        metadata: o.grpc.as_ref().map(|g| values(&g.initial_metadata)).unwrap_or_default(),
                        ..self.grpc_service(to)?
                    }),
                };
                let detects = o.resource_detectors.as_ref().is_some_and(|r| r.environment.is_some());
                TraceProvider::OpenTelemetry(OtlpTraces {
                    to,
                    service_name: named(if conventional { |t| &t.conventional } else { |t| &t.service }),
                    environment: detects || conventional,
                })
            }
            // Ours does not speak these.
            Tracer::Datadog(_) | Tracer::DatadogAt | Tracer::SkyWalking if self.proxy.flotilla => {
                return None;
            }
            Tracer::Datadog(_) | Tracer::DatadogAt => {
                TraceProvider::Datadog { cluster, host, service_name: named(|t| &t.service) }
            }
            Tracer::SkyWalking => TraceProvider::SkyWalking(self.grpc_service(to)?),
        })
    }
}

impl Tracer<'_> {
    fn longest_path(&self) -> u32 {
        match self {
            Tracer::Zipkin(z) => z.max_tag_length,
            Tracer::Datadog(d) => d.max_tag_length,
            Tracer::OpenTelemetry(o) => o.max_tag_length,
            Tracer::SkyWalking | Tracer::ZipkinAt | Tracer::DatadogAt => 0,
        }
    }
}

/// Headers with their values; as in Istio, some are in the environment of the control plane.
fn values(headers: &[ProviderHeader]) -> Vec<(String, String)> {
    let value = |h: &ProviderHeader| match (&h.value, &h.env_name) {
        (Some(v), _) => v.clone(),
        (None, Some(name)) => std::env::var(name).unwrap_or_default(),
        (None, None) => String::new(),
    };
    headers.iter().map(|h| (h.name.clone(), value(h))).collect()
}

fn tag(t: &CustomTag) -> Option<TagValue> {
    match (&t.literal, &t.environment, &t.header) {
        (Some(l), ..) => Some(TagValue::Literal(l.value.clone())),
        (_, Some(e), _) => {
            Some(TagValue::Environment { name: e.name.clone(), default: e.default_value.clone() })
        }
        (.., Some(h)) => Some(TagValue::Header { name: h.name.clone(), default: h.default_value.clone() }),
        _ => None,
    }
}

fn standard_fields() -> BTreeMap<String, String> {
    JSON_FIELDS.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn file_log(p: &FileLogProvider) -> AccessLog {
    let format = p.log_format.as_ref();
    let labels = format.and_then(|f| f.labels.as_ref());
    AccessLog::File(FileLog {
        path: p.path.clone(),
        format: match labels {
            None => AccessLogFormat::Text(format.map(|f| f.text.clone()).unwrap_or_default()),
            Some(l) if l.is_empty() => AccessLogFormat::Json(standard_fields()),
            Some(l) => AccessLogFormat::Json(texts(l)),
        },
        omit_empty: p.omit_empty_values,
    })
}

/// Validation lets in texts alone.
fn texts(labels: &BTreeMap<String, serde_json::Value>) -> BTreeMap<String, String> {
    labels.iter().filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))).collect()
}

fn grpc_log(p: &GrpcLogProvider, service: GrpcService, name: &str) -> GrpcLog {
    let state = if p.filter_state_objects_to_log.is_empty() {
        STATE.map(str::to_owned).into()
    } else {
        p.filter_state_objects_to_log.clone()
    };
    GrpcLog {
        service,
        log_name: if p.log_name.is_empty() { name.to_owned() } else { p.log_name.clone() },
        requests: name == REQUESTS,
        filter_state: state,
        request_headers: p.additional_request_headers_to_log.clone(),
        response_headers: p.additional_response_headers_to_log.clone(),
        response_trailers: p.additional_response_trailers_to_log.clone(),
    }
}

fn otlp_log(p: &OtlpLogProvider, service: GrpcService) -> OtlpLog {
    let format = p.log_format.as_ref();
    let text = format.map(|f| f.text.as_str()).filter(|t| !t.is_empty());
    OtlpLog {
        service,
        log_name: if p.log_name.is_empty() { RECORDS.to_owned() } else { p.log_name.clone() },
        body: text.unwrap_or(AccessLogFormat::LINE).to_owned(),
        attributes: format.and_then(|f| f.labels.as_ref()).map(texts).unwrap_or_default(),
    }
}

//! Rules of `MeshConfig.extensionProviders`.

use std::collections::BTreeSet;

use mesh_model::authored::{
    AuthzRequestBody, Duration, FileLogProvider, MeshConfig, ProviderDefinition, ProviderHeader,
};

use super::proxies::ONLY_ENVOYS;
use crate::{
    path::Path,
    validate::common::{self, Findings},
};

pub(super) fn check(m: &MeshConfig, p: &Path<'_>, out: &mut Findings) {
    let list = &m.extension_providers;
    defaults(m, &p.key("defaultProviders"), out);
    let p = &p.key("extensionProviders");
    let mut names = BTreeSet::new();
    for (i, d) in list.iter().enumerate() {
        let at = p.index(i);
        if d.name.is_empty() {
            out.error(&at.key("name"), "the provider's name is required");
        } else if !names.insert(&d.name) {
            out.error(&at.key("name"), format!("there is another provider {:?}", d.name));
        }
        let others = others(d);
        if others.len()
            + usize::from(d.envoy_ext_authz_http.is_some())
            + usize::from(d.envoy_ext_authz_grpc.is_some())
            != 1
        {
            out.error(&at, "exactly one kind of provider is required, such as envoyExtAuthzHttp");
            continue;
        }
        if let Some(f) = &d.envoy_file_access_log {
            file_log(f, &at.key("envoyFileAccessLog"), out);
        }
        collector(d, &at, out);
        match (&d.envoy_ext_authz_http, &d.envoy_ext_authz_grpc) {
            (Some(h), None) => {
                let at = at.key("envoyExtAuthzHttp");
                common(&h.service, h.port, h.timeout, &h.status_on_error, &at, out);
                body(h.include_request_body_in_check.as_ref(), &at, out);
                if !h.path_prefix.is_empty() && !h.path_prefix.starts_with('/') {
                    out.error(&at.key("pathPrefix"), format!("{:?} does not begin with /", h.path_prefix));
                }
                if h.include_request_body_in_check.as_ref().is_some_and(|b| b.pack_as_bytes) {
                    let at = at.key("includeRequestBodyInCheck");
                    out.error(&at.key("packAsBytes"), "only a provider that speaks gRPC can be told bytes");
                }
                for (list, field) in [
                    (&h.include_headers_in_check, "includeHeadersInCheck"),
                    (&h.include_request_headers_in_check, "includeRequestHeadersInCheck"),
                    (&h.headers_to_upstream_on_allow, "headersToUpstreamOnAllow"),
                    (&h.headers_to_downstream_on_deny, "headersToDownstreamOnDeny"),
                    (&h.headers_to_downstream_on_allow, "headersToDownstreamOnAllow"),
                ] {
                    let at = at.key(field);
                    for (i, n) in list.iter().enumerate() {
                        pattern(n, &at.index(i), out);
                    }
                }
                let at = at.key("includeAdditionalHeadersInCheck");
                for (n, v) in &h.include_additional_headers_in_check {
                    common::header_name(n, &at.key(n), out);
                    common::header_value(v, &at.key(n), out);
                }
            }
            (None, Some(g)) => {
                let at = at.key("envoyExtAuthzGrpc");
                common(&g.service, g.port, g.timeout, &g.status_on_error, &at, out);
                body(g.include_request_body_in_check.as_ref(), &at, out);
            }
            _ => {}
        }
    }
}

/// Kinds that a provider is of, without authorisers.
fn others(d: &ProviderDefinition) -> Vec<&'static str> {
    [
        (d.envoy_file_access_log.is_some(), "envoyFileAccessLog"),
        (d.prometheus.is_some(), "prometheus"),
        (d.zipkin.is_some(), "zipkin"),
        (d.lightstep.is_some(), "lightstep"),
        (d.datadog.is_some(), "datadog"),
        (d.stackdriver.is_some(), "stackdriver"),
        (d.opencensus.is_some(), "opencensus"),
        (d.skywalking.is_some(), "skywalking"),
        (d.opentelemetry.is_some(), "opentelemetry"),
        (d.envoy_http_als.is_some(), "envoyHttpAls"),
        (d.envoy_tcp_als.is_some(), "envoyTcpAls"),
        (d.envoy_otel_als.is_some(), "envoyOtelAls"),
    ]
    .into_iter()
    .filter_map(|(set, field)| set.then_some(field))
    .collect()
}

fn defaults(m: &MeshConfig, p: &Path<'_>, out: &mut Findings) {
    let Some(d) = &m.default_providers else { return };
    let of = |name: &str| m.extension_providers.iter().find(|p| p.name == name);
    let logs = p.key("accessLogging");
    for (i, name) in d.access_logging.iter().enumerate() {
        let at = logs.index(i);
        match of(name) {
            // Istio has it without a definition.
            None if name == "envoy" => {}
            None => out.error(&at, format!("extensionProviders has no provider {name:?}")),
            Some(p)
                if p.envoy_file_access_log.is_none()
                    && p.envoy_http_als.is_none()
                    && p.envoy_tcp_als.is_none()
                    && p.envoy_otel_als.is_none() =>
            {
                out.warning(&at, format!("{name:?} takes no access log, and nothing is logged for it"));
            }
            Some(_) => {}
        }
    }
    let tracing = p.key("tracing");
    for (i, name) in d.tracing.iter().enumerate() {
        let at = tracing.index(i);
        let Some(p) = of(name) else {
            out.error(&at, format!("extensionProviders has no provider {name:?}"));
            continue;
        };
        if i > 0 {
            out.warning(&at, "only the first provider has effect");
        } else if p.datadog.is_some() || p.skywalking.is_some() {
            out.warning(&at, ONLY_ENVOYS);
        } else if p.zipkin.is_none() && p.opentelemetry.is_none() {
            out.warning(&at, format!("{name:?} takes no spans"));
        }
    }
    let metrics = p.key("metrics");
    for (i, name) in d.metrics.iter().enumerate().filter(|(_, n)| *n != "prometheus") {
        let at = metrics.index(i);
        out.warning(&at, format!("no proxy uses {name:?}: each has its metrics for Prometheus"));
    }
}

/// A provider that takes spans or log entries.
fn collector(d: &ProviderDefinition, p: &Path<'_>, out: &mut Findings) {
    if let Some(z) = &d.zipkin {
        let at = p.key("zipkin");
        common(&z.service, z.port, z.timeout, "", &at, out);
        headers(&z.headers, &at.key("headers"), out);
        if !z.path.is_empty() && !z.path.starts_with('/') {
            out.error(&at.key("path"), format!("{:?} does not begin with /", z.path));
        }
    }
    if let Some(x) = &d.datadog {
        common(&x.service, x.port, None, "", &p.key("datadog"), out);
    }
    if let Some(s) = &d.skywalking {
        let at = p.key("skywalking");
        common(&s.service, s.port, None, "", &at, out);
        if !s.access_token.is_empty() {
            out.warning(&at.key("accessToken"), "without effect, as in Istio");
        }
    }
    if let Some(o) = &d.opentelemetry {
        let at = p.key("opentelemetry");
        common(&o.service, o.port, None, "", &at, out);
        if o.http.is_some() && o.grpc.is_some() {
            out.error(&at, "only one of http and grpc is allowed");
        }
        if let Some(h) = &o.http {
            let at = at.key("http");
            if h.path.is_empty() {
                out.error(&at.key("path"), "the path is required, such as /v1/traces");
            }
            common::duration(h.timeout, &at.key("timeout"), out);
            headers(&h.headers, &at.key("headers"), out);
        }
        if let Some(g) = &o.grpc {
            let at = at.key("grpc");
            common::duration(g.timeout, &at.key("timeout"), out);
            headers(&g.initial_metadata, &at.key("initialMetadata"), out);
        }
        if o.resource_detectors.as_ref().is_some_and(|r| r.dynatrace.is_some()) {
            out.warning(
                &at.key("resourceDetectors").key("dynatrace"),
                "not supported: nobody reads such files",
            );
        }
        if o.dynatrace_sampler.is_some() {
            out.warning(&at.key("dynatraceSampler"), "not supported: sampling is by percentage");
        }
    }
    for (g, field) in [(&d.envoy_http_als, "envoyHttpAls"), (&d.envoy_tcp_als, "envoyTcpAls")] {
        let Some(g) = g else { continue };
        let at = p.key(field);
        common(&g.service, g.port, None, "", &at, out);
        for (list, field) in [
            (&g.additional_request_headers_to_log, "additionalRequestHeadersToLog"),
            (&g.additional_response_headers_to_log, "additionalResponseHeadersToLog"),
            (&g.additional_response_trailers_to_log, "additionalResponseTrailersToLog"),
        ] {
            let at = at.key(field);
            for (i, n) in list.iter().enumerate() {
                common::header_name(n, &at.index(i), out);
            }
            if !list.is_empty() && d.envoy_tcp_als.is_some() {
                out.error(&at, "connections have no headers: use envoyHttpAls");
            }
        }
    }
    if let Some(o) = &d.envoy_otel_als {
        let at = p.key("envoyOtelAls");
        common(&o.service, o.port, None, "", &at, out);
        for (k, v) in o.log_format.iter().flat_map(|f| &f.labels).flatten() {
            if !v.is_string() {
                out.error(&at.key("logFormat").key("labels").key(k), "only a text is supported here");
            }
        }
    }
    let gone = [
        (d.lightstep.is_some(), "lightstep"),
        (d.stackdriver.is_some(), "stackdriver"),
        (d.opencensus.is_some(), "opencensus"),
    ];
    for (_, field) in gone.into_iter().filter(|(set, _)| *set) {
        out.warning(&p.key(field), "not supported, as in today's Istio: use a provider of OpenTelemetry");
    }
}

fn headers(list: &[ProviderHeader], p: &Path<'_>, out: &mut Findings) {
    for (i, h) in list.iter().enumerate() {
        let at = p.index(i);
        common::header_name(&h.name, &at.key("name"), out);
        match (&h.value, &h.env_name) {
            (Some(v), None) => common::header_value(v, &at.key("value"), out),
            (None, Some(n)) if !n.is_empty() => {}
            _ => out.error(&at, "exactly one of value and envName is required"),
        }
    }
}

fn file_log(f: &FileLogProvider, p: &Path<'_>, out: &mut Findings) {
    if f.path.is_empty() {
        out.error(&p.key("path"), "the file is required, such as /dev/stdout");
    }
    let Some(format) = &f.log_format else { return };
    let at = p.key("logFormat");
    if format.labels.is_some() && !format.text.is_empty() {
        out.error(&at, "only one of text and labels is allowed");
    }
    for (k, v) in format.labels.iter().flatten() {
        if !v.is_string() {
            out.error(&at.key("labels").key(k), "only a text is supported here");
        }
    }
}

fn common(
    service: &str,
    port: u32,
    timeout: Option<Duration>,
    status: &str,
    p: &Path<'_>,
    out: &mut Findings,
) {
    let host = service.split_once('/').map_or(service, |(_, h)| h);
    if !common::is_fqdn(host) {
        out.error(
            &p.key("service"),
            format!("{service:?} is not [namespace/]host with a whole host name, as ext-authz.books.svc.cluster.local"),
        );
    }
    common::port(port, &p.key("port"), out);
    common::duration(timeout, &p.key("timeout"), out);
    // What Envoy's HttpStatus knows, less those that are no answers.
    if !status.is_empty() && !status.parse::<u16>().is_ok_and(|s| (200..=599).contains(&s)) {
        out.error(&p.key("statusOnError"), format!("{status:?} is not a status from 200 to 599"));
    }
}

fn body(b: Option<&AuthzRequestBody>, p: &Path<'_>, out: &mut Findings) {
    if b.is_some_and(|b| b.max_request_bytes == 0) {
        let at = p.key("includeRequestBodyInCheck");
        out.error(&at.key("maxRequestBytes"), "must be at least 1");
    }
}

/// A name of headers: exact, `prefix*`, `*suffix` or `*`.
fn pattern(n: &str, p: &Path<'_>, out: &mut Findings) {
    let plain = n.strip_prefix('*').or_else(|| n.strip_suffix('*')).unwrap_or(n);
    if n != "*" {
        common::header_name(plain, p, out);
    }
}

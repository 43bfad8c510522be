//! Rules of `MeshConfig.defaultConfig`.
//!
//! Istio writes most of it into what its injector starts. Nobody injects here: for what no proxy is told, whoever starts it
//! gives it flags, and a warning names the flag.

use mesh_model::authored::{
    ClientCertDetails, ConnectionSettings, MeshConfig, MetadataExchangeMode, ProxyDefaults, ProxyHeaders,
};

use super::share;
use crate::{
    path::Path,
    validate::{
        common::{self, Findings},
        envoy_filter, telemetry,
    },
};

/// Proxies that anybody has in front of a gateway. `x-forwarded-for` has an element for each.
const MAX_TRUSTED: u32 = 100;

/// Of providers whose protocol our own proxies do not speak.
pub(super) const ONLY_ENVOYS: &str = "Envoys alone send spans there; Flotilla's proxies send theirs where they are told at \
their start (--otlp)";

/// The address of a tracer.
fn address(a: &str, p: &Path<'_>, out: &mut Findings) {
    let port = a.rsplit_once(':').filter(|(h, _)| !h.is_empty()).map(|(_, port)| port.parse::<u16>());
    if !matches!(port, Some(Ok(1..))) {
        out.error(p, format!("{a:?} is not host:port, such as zipkin.istio-system:9411"));
    }
}

pub(super) fn check(d: &ProxyDefaults, m: &MeshConfig, p: &Path<'_>, out: &mut Findings) {
    let at = p.key("proxyMetadata");
    envoy_filter::on_demand(&d.proxy_metadata, &at, out);
    for k in d.proxy_metadata.keys().filter(|k| *k != envoy_filter::ON_DEMAND) {
        out.warning(
            &at.key(k),
            format!("proxies do not read it; only {} has an effect", envoy_filter::ON_DEMAND),
        );
    }
    if let Some(t) = &d.tracing {
        let at = p.key("tracing");
        if let Some(s) = t.sampling {
            share(s, &at.key("sampling"), out);
        }
        telemetry::tags(&t.custom_tags, false, &at.key("customTags"), out);
        let old = "not supported, as in today's Istio: use a provider of OpenTelemetry (extensionProviders)";
        for (set, field, message) in [
            (t.lightstep.is_some(), "lightstep", old),
            (t.stackdriver.is_some(), "stackdriver", old),
            (t.open_census_agent.is_some(), "openCensusAgent", old),
            (
                t.tls_settings.is_some(),
                "tlsSettings",
                "without effect: TLS to a service is a matter of its DestinationRule",
            ),
        ] {
            if set {
                out.warning(&at.key(field), message);
            }
        }
        if [t.zipkin.is_some(), t.datadog.is_some(), t.lightstep.is_some()].iter().filter(|s| **s).count() > 1
        {
            out.error(&at, "only one of zipkin, lightstep and datadog is allowed");
        }
        let providers = m.default_providers.as_ref().is_some_and(|d| !d.tracing.is_empty());
        for (a, field) in [(&t.zipkin, "zipkin"), (&t.datadog, "datadog")] {
            let Some(a) = a else { continue };
            let at = at.key(field);
            address(&a.address, &at.key("address"), out);
            if providers {
                out.warning(&at, "without effect: spans go to defaultProviders.tracing");
            } else if field == "datadog" {
                out.warning(&at, ONLY_ENVOYS);
            }
        }
    }
    if let Some(s) = &d.envoy_access_log_service {
        let at = p.key("envoyAccessLogService");
        address(&s.address, &at.key("address"), out);
        for (set, field) in
            [(s.tls_settings.is_some(), "tlsSettings"), (s.tcp_keepalive.is_some(), "tcpKeepalive")]
        {
            if set {
                out.warning(
                    &at.key(field),
                    "without effect: connections to a service are a matter of its DestinationRule",
                );
            }
        }
        if !m.enable_envoy_access_log_service {
            out.warning(&at, "without effect: enableEnvoyAccessLogService is not set");
        }
    }
    if !d.zipkin_address.is_empty() {
        address(&d.zipkin_address, &p.key("zipkinAddress"), out);
    }
    if let Some(t) = &d.gateway_topology {
        let at = p.key("gatewayTopology");
        if t.num_trusted_proxies > MAX_TRUSTED {
            out.error(
                &at.key("numTrustedProxies"),
                format!(
                    "{} proxies in front of a gateway ({MAX_TRUSTED} is the limit)",
                    t.num_trusted_proxies
                ),
            );
        }
        if t.forward_client_cert_details == ClientCertDetails::AlwaysForwardOnly {
            out.warning(
                &at.key("forwardClientCertDetails"),
                "whoever reaches a gateway says which certificate he has: only for gateways that nobody reaches but trusted proxies",
            );
        }
        if t.proxy_protocol.as_ref().is_some_and(|v| v.as_object().is_none_or(|o| !o.is_empty())) {
            out.error(&at.key("proxyProtocol"), "has no fields: {} turns it on");
        }
    }
    if let Some(h) = &d.proxy_headers {
        headers(h, &p.key("proxyHeaders"), out);
    }
    if let Some(c) = &d.connection_settings {
        connections(c, &p.key("connectionSettings"), out);
    }
    if let Some(n) = d.concurrency {
        common::not_negative(n.into(), &p.key("concurrency"), out);
    }
    for (n, field) in [(d.proxy_admin_port, "proxyAdminPort"), (d.status_port, "statusPort")] {
        // 0 is what a number is that nobody has set.
        if let Some(n) = n.filter(|n| !(0..=65_535).contains(n)) {
            out.error(&p.key(field), format!("{n} is not a port"));
        }
    }
    start(d, p, out);
}

fn headers(h: &ProxyHeaders, p: &Path<'_>, out: &mut Findings) {
    if let Some(s) = &h.server {
        if s.value.bytes().any(|c| !(b' '..=b'~').contains(&c)) {
            out.error(
                &p.key("server").key("value"),
                "a header's value of visible ASCII characters is needed",
            );
        }
        if s.disabled == Some(true) && !s.value.is_empty() {
            out.warning(&p.key("server").key("value"), "without effect: the header is disabled");
        }
    }
    if h.forwarded_client_cert == ClientCertDetails::AlwaysForwardOnly {
        out.warning(
            &p.key("forwardedClientCert"),
            "whoever reaches a workload says which certificate he has: only where nobody does but trusted proxies",
        );
    }
    if h.metadata_exchange_headers.as_ref().is_some_and(|m| m.mode == MetadataExchangeMode::InMesh) {
        out.warning(
            &p.key("metadataExchangeHeaders"),
            "without effect: no proxy here sends these headers to anybody",
        );
    }
}

/// Smallest window of HTTP/2 (RFC 9113 section 6.9.2), which is what it is unless somebody changes it.
const WINDOW: i32 = 65_535;

fn connections(c: &ConnectionSettings, p: &Path<'_>, out: &mut Findings) {
    for (n, field) in [
        (c.listener_per_connection_buffer_limit_bytes, "listenerPerConnectionBufferLimitBytes"),
        (c.cluster_per_connection_buffer_limit_bytes, "clusterPerConnectionBufferLimitBytes"),
    ] {
        if let Some(n) = n {
            common::not_negative(n.into(), &p.key(field), out);
        }
    }
    for (n, least, field) in [
        (c.http_max_concurrent_streams, 1, "httpMaxConcurrentStreams"),
        (c.http2_initial_stream_window_size, WINDOW, "http2InitialStreamWindowSize"),
        (c.http2_initial_connection_window_size, WINDOW, "http2InitialConnectionWindowSize"),
        (c.listener_connection_limit, 1, "listenerConnectionLimit"),
        (c.global_downstream_connection_limit, 1, "globalDownstreamConnectionLimit"),
    ] {
        if let Some(n) = n.filter(|n| *n < least) {
            out.error(&p.key(field), format!("{n} is less than {least}"));
        }
    }
}

/// What is decided where a proxy is started.
fn start(d: &ProxyDefaults, p: &Path<'_>, out: &mut Findings) {
    let flag = |flag: &str| format!("is decided where a proxy is started: {flag}");
    let file = || "without effect: there are no generated files".to_owned();
    let envoy = || "not supported: a matter of Envoy's own; it is started with its own bootstrap".to_owned();
    let injected = || "without effect: nobody injects proxies".to_owned();
    for (set, field, message) in [
        (!d.discovery_address.is_empty(), "discoveryAddress", flag("--discovery")),
        (
            !matches!(d.control_plane_auth_policy.as_str(), "" | "MUTUAL_TLS"),
            "controlPlaneAuthPolicy",
            "not supported: the control plane is always spoken to over mutual TLS".to_owned(),
        ),
        (!d.interception_mode.is_empty(), "interceptionMode", flag("--meta INTERCEPTION_MODE=TPROXY")),
        (!d.service_cluster.is_empty(), "serviceCluster", flag("--workload")),
        (!d.tracing_service_name.is_empty(), "tracingServiceName", flag("--workload")),
        (!d.config_path.is_empty(), "configPath", file()),
        (!d.binary_path.is_empty(), "binaryPath", file()),
        (!d.custom_config_file.is_empty(), "customConfigFile", flag("--bootstrap")),
        (!d.proxy_bootstrap_template_path.is_empty(), "proxyBootstrapTemplatePath", file()),
        (!d.runtime_values.is_empty(), "runtimeValues", envoy()),
        (d.stat_name_length.is_some(), "statNameLength", envoy()),
        (d.proxy_stats_matcher.is_some(), "proxyStatsMatcher", envoy()),
        (!d.extra_stat_tags.is_empty(), "extraStatTags", envoy()),
        (!d.statsd_udp_address.is_empty(), "statsdUdpAddress", envoy()),
        (d.envoy_metrics_service.is_some(), "envoyMetricsService", envoy()),
        (!d.envoy_metrics_service_address.is_empty(), "envoyMetricsServiceAddress", envoy()),
        (
            d.discovery_refresh_delay.is_some(),
            "discoveryRefreshDelay",
            "without effect: configuration is pushed".to_owned(),
        ),
        (
            d.connect_timeout.is_some(),
            "connectTimeout",
            "without effect here; connectTimeout of the MeshConfig itself counts".to_owned(),
        ),
        (!d.availability_zone.is_empty(), "availabilityZone", flag("--locality")),
        (d.sds.is_some(), "sds", "without effect: secrets always come by SDS".to_owned()),
        (!d.mesh_id.is_empty(), "meshId", "not supported: telemetry names the trust domain".to_owned()),
        (
            d.readiness_probe.is_some(),
            "readinessProbe",
            "without effect: probes of machines are in their WorkloadGroup".to_owned(),
        ),
        (d.hold_application_until_proxy_starts.is_some(), "holdApplicationUntilProxyStarts", injected()),
        (
            !d.ca_certificates_pem.is_empty(),
            "caCertificatesPem",
            "not supported: use caCertificates of the MeshConfig itself".to_owned(),
        ),
        (d.image.is_some(), "image", injected()),
        (d.private_key_provider.is_some(), "privateKeyProvider", envoy()),
        (d.file_flush_interval.is_some(), "fileFlushInterval", envoy()),
        (d.file_flush_min_size_kb.is_some(), "fileFlushMinSizeKb", envoy()),
        (d.stats_compression.is_some(), "statsCompression", envoy()),
    ] {
        if set {
            out.warning(&p.key(field), message);
        }
    }
}

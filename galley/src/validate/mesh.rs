//! Rules of MeshConfig: Istio's settings of the mesh, and our own.

mod providers;
mod proxies;

use mesh_model::{
    TrustDomain,
    authored::{
        ClientTlsMode, MeshConfig, Metadata, OutboundTrafficMode, ServiceEntryVisibility, TlsProtocol,
        TlsSettings, gateway_api::KubernetesSelector, ingress::IngressControllerMode,
    },
    proxy::{TLS_CURVES, is_cipher_expression},
};

use self::proxies::check as check_proxies;
use super::{
    common::{self, Findings},
    destination_rule::{client_tls, connection_pool, locality, outlier_detection},
    trust_domains,
    virtual_service::retries,
};
use crate::path::Path;

/// Variables of `inboundClusterStatName`.
const INBOUND_STAT: [&str; 5] =
    ["SERVICE", "SERVICE_FQDN", "SERVICE_PORT", "SERVICE_PORT_NAME", "TARGET_PORT"];
/// Variables of `outboundClusterStatName`.
const OUTBOUND_STAT: [&str; 5] =
    ["SERVICE", "SERVICE_FQDN", "SERVICE_PORT", "SERVICE_PORT_NAME", "SUBSET_NAME"];

pub(super) fn check(m: &MeshConfig, meta: &Metadata, p: &Path<'_>, out: &mut Findings) {
    let root = Path::root();
    if meta.name != "mesh" {
        out.error(&root.key("metadata").key("name"), "the only MeshConfig is named \"mesh\"");
    }
    if let Some(td) = &m.trust_domain {
        domain(td, &p.key("trustDomain"), out);
    }
    let aliases = p.key("trustDomainAliases");
    for (i, td) in m.trust_domain_aliases.iter().enumerate() {
        domain(td, &aliases.index(i), out);
    }
    if let Some(ns) = &m.root_namespace
        && !common::is_dns1123_label(ns)
    {
        out.error(&p.key("rootNamespace"), format!("{ns:?} is not a namespace"));
    }
    if let Some(l) = &m.locality_lb_setting {
        locality::check(l, &p.key("localityLbSetting"), out);
    }
    if let Some(d) = &m.default_traffic_policy {
        let at = p.key("defaultTrafficPolicy");
        if let Some(c) = &d.connection_pool {
            connection_pool(c, &at.key("connectionPool"), out);
        }
        if let Some(o) = &d.outlier_detection {
            outlier_detection(o, &at.key("outlierDetection"), out);
        }
    }
    if let Some(z) = &m.zone_aware_lb_setting {
        locality::check_zone_aware(z, &p.key("zoneAwareLbSetting"), out);
    }
    if let Some(v) = &m.service_entry_visibility {
        visibility(v, &p.key("serviceEntryVisibility"), out);
    }
    connections(m, p, out);
    services(m, p, out);
    ambient(m, p, out);
    if let Some(s) = m.trace_sampling {
        share(s, &p.key("traceSampling"), out);
    }
    trust_domains::check_certificates(&m.ca_certificates, &p.key("caCertificates"), out);
    providers::check(m, p, out);
    if let Some(d) = &m.default_config {
        check_proxies(d, m, &p.key("defaultConfig"), out);
    }
    if let Some(o) = &m.outbound_traffic_policy {
        let at = p.key("outboundTrafficPolicy");
        out.unenforced(o.egress_proxy.is_some(), &at, "egressProxy");
        if let Some(t) = &o.tls {
            let at = at.key("tls");
            client_tls(t, &at, out);
            if t.mode == ClientTlsMode::IstioMutual {
                out.error(
                    &at.key("mode"),
                    "hosts that nobody declared are not of the mesh: use SIMPLE or MUTUAL",
                );
            }
            if o.mode != OutboundTrafficMode::AllowAnyDynamicDns {
                out.warning(&at, "without effect: it is for mode ALLOW_ANY_DYNAMIC_DNS");
            }
        }
    }
    ingress(m, p, out);
    mixer(m, p, out);
    elsewhere(m, p, out);
}

/// Which Ingresses are served, and by which gateways.
fn ingress(m: &MeshConfig, p: &Path<'_>, out: &mut Findings) {
    let mode = p.key("ingressControllerMode");
    match m.ingress_mode() {
        None => out.error(
            &mode,
            format!("{:?} is not one of OFF, DEFAULT, STRICT (the default)", m.ingress_controller_mode),
        ),
        Some(IngressControllerMode::Unspecified) => {
            out.warning(&mode, "annotations do not count: Ingresses are served by their IngressClass alone");
        }
        Some(_) => {}
    }
}

fn domain(s: &str, p: &Path<'_>, out: &mut Findings) {
    if let Err(e) = TrustDomain::new(s) {
        out.error(p, e.to_string());
    }
}

fn share(percent: f64, p: &Path<'_>, out: &mut Findings) {
    if !(0.0..=100.0).contains(&percent) {
        out.error(p, format!("{percent} is outside of 0..100 percent"));
    }
}

fn connections(m: &MeshConfig, p: &Path<'_>, out: &mut Findings) {
    common::duration(m.connect_timeout, &p.key("connectTimeout"), out);
    common::duration(m.dns_refresh_rate, &p.key("dnsRefreshRate"), out);
    for (pattern, field, variables) in [
        (&m.inbound_cluster_stat_name, "inboundClusterStatName", INBOUND_STAT),
        (&m.outbound_cluster_stat_name, "outboundClusterStatName", OUTBOUND_STAT),
    ] {
        // Between two signs of percent stands a variable.
        let unknown = pattern.split('%').skip(1).step_by(2).find(|v| !variables.contains(v));
        if unknown.is_some() || pattern.matches('%').count() % 2 == 1 {
            let known: Vec<String> = variables.iter().map(|v| format!("%{v}%")).collect();
            out.error(&p.key(field), format!("{pattern:?}: variables are {}", known.join(", ")));
        }
    }
    common::duration_or_zero(m.protocol_detection_timeout, &p.key("protocolDetectionTimeout"), out);
    if let Some(k) = &m.tcp_keepalive {
        let at = p.key("tcpKeepalive");
        common::duration(k.time, &at.key("time"), out);
        common::duration(k.interval, &at.key("interval"), out);
    }
    for (port, field) in [
        (m.proxy_listen_port, "proxyListenPort"),
        (m.proxy_inbound_listen_port, "proxyInboundListenPort"),
        (Some(m.proxy_http_port).filter(|n| *n != 0), "proxyHttpPort"),
    ] {
        if let Some(n) = port {
            common::port(n, &p.key(field), out);
        }
    }
    if m.proxy_listen_port.unwrap_or(15001) == m.proxy_inbound_listen_port.unwrap_or(15006) {
        out.error(&p.key("proxyListenPort"), "is the port of inbound connections, too");
    }
    if let Some(r) = &m.default_http_retry_policy {
        let at = p.key("defaultHttpRetryPolicy");
        retries(r, &at, out);
        if r.per_try_timeout.is_some() {
            out.error(&at.key("perTryTimeout"), "is of single routes: set it in a VirtualService");
        }
    }
    if let Some(t) = &m.tls_defaults {
        tls(t, &p.key("tlsDefaults"), out);
    }
    if let Some(t) = &m.mesh_mtls {
        let at = p.key("meshMTLS");
        tls(t, &at, out);
        if t.min_protocol_version == TlsProtocol::V1_2 {
            let at = at.key("minProtocolVersion");
            out.warning(&at, "without effect: inside of the mesh there is TLS 1.3 alone");
        }
        if !t.cipher_suites.is_empty() {
            let at = at.key("cipherSuites");
            out.warning(
                &at,
                "without effect: suites can be chosen for TLS 1.2, and inside of the mesh there is 1.3 alone",
            );
        }
    }
}

fn tls(t: &TlsSettings, p: &Path<'_>, out: &mut Findings) {
    if matches!(t.min_protocol_version, TlsProtocol::V1_0 | TlsProtocol::V1_1) {
        out.error(&p.key("minProtocolVersion"), "TLS 1.0 and 1.1 are not supported: they are broken");
    }
    for (i, c) in t.ecdh_curves.iter().enumerate() {
        if !TLS_CURVES.contains(&c.as_str()) {
            let known = TLS_CURVES.join(", ");
            out.error(&p.key("ecdhCurves").index(i), format!("{c:?} is not one of {known}"));
        }
    }
    for (i, c) in t.cipher_suites.iter().enumerate() {
        if !is_cipher_expression(c) {
            out.warning(&p.key("cipherSuites").index(i), format!("{c:?} is not a cipher suite: ignored"));
        }
    }
}

fn services(m: &MeshConfig, p: &Path<'_>, out: &mut Findings) {
    for (list, field, none_allowed) in [
        (&m.default_service_export_to, "defaultServiceExportTo", true),
        (&m.default_virtual_service_export_to, "defaultVirtualServiceExportTo", false),
        (&m.default_destination_rule_export_to, "defaultDestinationRuleExportTo", false),
    ] {
        common::export_list(list, none_allowed, "", &p.key(field), out);
    }
    let settings = p.key("serviceSettings");
    for (i, s) in m.service_settings.iter().enumerate() {
        let at = settings.index(i);
        if s.hosts.is_empty() {
            out.error(&at.key("hosts"), "at least one host is required");
        }
        let hosts = at.key("hosts");
        for (i, h) in s.hosts.iter().enumerate() {
            common::host(h, &hosts.index(i), out);
        }
    }
    let selectors = p.key("discoverySelectors");
    for (i, s) in m.discovery_selectors.iter().enumerate() {
        selector(s, &selectors.index(i), out);
    }
}

fn selector(s: &KubernetesSelector, p: &Path<'_>, out: &mut Findings) {
    let expressions = p.key("matchExpressions");
    for (i, e) in s.match_expressions.iter().enumerate() {
        let at = expressions.index(i);
        if e.key.is_empty() {
            out.error(&at.key("key"), "the label is required");
        }
        let wanted = match e.operator.as_str() {
            "In" | "NotIn" => Some(true),
            "Exists" | "DoesNotExist" => Some(false),
            other => {
                out.error(
                    &at.key("operator"),
                    format!("{other:?} is not one of In, NotIn, Exists, DoesNotExist"),
                );
                None
            }
        };
        if wanted.is_some_and(|w| w == e.values.is_empty()) {
            let what = if e.values.is_empty() { "needs values" } else { "has no values" };
            out.error(&at.key("values"), format!("{} {what}", e.operator));
        }
    }
}

fn visibility(v: &ServiceEntryVisibility, p: &Path<'_>, out: &mut Findings) {
    if !v.apply_to_sidecars {
        out.warning(
            p,
            "without effect: without applyToSidecars it is for ambient proxies alone, and there are none here",
        );
    }
    let policies = p.key("policies");
    for (i, policy) in v.policies.iter().enumerate() {
        let at = policies.index(i);
        let rules = at.key("matchingRules");
        for (i, r) in policy.matching_rules.iter().enumerate() {
            let at = rules.index(i);
            match &r.namespace_selector {
                Some(s) => selector(s, &at.key("namespaceSelector"), out),
                None => out.warning(&at, "without a namespaceSelector it never matches, and so its policy"),
            }
        }
    }
}

/// What is about ztunnel and waypoints: it is looked at, and has no effect here.
fn ambient(m: &MeshConfig, p: &Path<'_>, out: &mut Findings) {
    let at = p.key("hboneIdleTimeout");
    common::duration(m.hbone_idle_timeout, &at, out);
    if m.hbone_idle_timeout.is_some() {
        out.warning(
            &at,
            "without effect: unused tunnels are closed after connectionPool.http.idleTimeout of their service, or 5 minutes",
        );
    }
    let scopes = p.key("serviceScopeConfigs");
    for (i, s) in m.service_scope_configs.iter().enumerate() {
        let at = scopes.index(i);
        for (of, field) in
            [(&s.namespace_selector, "namespaceSelector"), (&s.services_selector, "servicesSelector")]
        {
            if let Some(of) = of {
                selector(of, &at.key(field), out);
            }
        }
    }
    if !m.service_scope_configs.is_empty() {
        out.warning(
            &scopes,
            "without effect: it is of ambient clusters; what other clusters may call is said by a ServiceExport",
        );
    }
}

fn mixer(m: &MeshConfig, p: &Path<'_>, out: &mut Findings) {
    for (s, field) in
        [(&m.mixer_check_server, "mixerCheckServer"), (&m.mixer_report_server, "mixerReportServer")]
    {
        if !s.is_empty() {
            common::host_port(s, &p.key(field), out);
        }
    }
    if m.policy_check_fail_open && (m.mixer_check_server.is_empty() || m.disable_policy_checks) {
        out.warning(&p.key("policyCheckFailOpen"), "without effect: nobody is asked (mixerCheckServer)");
    }
    if m.enable_client_side_policy_check {
        let at = p.key("enableClientSidePolicyCheck");
        out.warning(&at, "not supported: Mixer is asked where requests enter a workload or the mesh");
    }
}

/// Who gets log entries where no provider is named.
fn log_service(m: &MeshConfig) -> Option<&str> {
    let service = m.default_config.as_ref()?.envoy_access_log_service.as_ref()?;
    Some(service.address.as_str()).filter(|a| !a.is_empty())
}

/// What is nobody's here, with what to do instead.
fn elsewhere(m: &MeshConfig, p: &Path<'_>, out: &mut Findings) {
    let old = "without effect: configuration and secrets are pushed, and nobody polls";
    for (set, field, message) in [
        (
            m.enable_envoy_access_log_service && log_service(m).is_none(),
            "enableEnvoyAccessLogService",
            "without effect: defaultConfig.envoyAccessLogService.address names nobody",
        ),
        (
            m.enable_prometheus_merge == Some(true),
            "enablePrometheusMerge",
            "without effect: a proxy's metrics are at its own port, and an application's at the application's",
        ),
        (
            m.verify_certificate_at_client == Some(false),
            "verifyCertificateAtClient",
            "without effect, as in Istio: servers are always verified; a DestinationRule with insecureSkipVerify makes an exception of one",
        ),
        (
            !m.config_sources.is_empty(),
            "configSources",
            "without effect: configuration comes from --config of the control plane",
        ),
        (
            !m.certificates.is_empty(),
            "certificates",
            "not supported: have DNS certificates issued by cert-manager, and name their Secrets in Gateways",
        ),
        (
            m.ca.is_some(),
            "ca",
            "not supported: plug an intermediate or a root of that CA into the control plane's own",
        ),
        (
            !matches!(m.auth_policy.as_str(), "" | "NONE"),
            "authPolicy",
            "without effect: mTLS is said by PeerAuthentication, and by MeshPolicy of release 1.0",
        ),
        (m.rds_refresh_delay.is_some(), "rdsRefreshDelay", old),
        (m.sds_refresh_delay.is_some(), "sdsRefreshDelay", old),
        (!m.sds_uds_path.is_empty(), "sdsUdsPath", old),
    ] {
        if set {
            out.warning(&p.key(field), message);
        }
    }
}

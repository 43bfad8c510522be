//! Rules of DestinationRule, and of the policies that other kinds share with it.

pub(super) mod locality;

use mesh_model::authored::{
    ClientTlsMode, ClientTlsSettings, ConnectionPoolSettings, DestinationRule, H2UpgradePolicy,
    LoadBalancerSettings, OutlierDetection, TrafficPolicy, TunnelSettings,
};

use super::common::{self, Findings};
use crate::path::Path;

pub(super) fn check(dr: &DestinationRule, namespace: &str, p: &Path<'_>, out: &mut Findings) {
    common::host(&dr.host, &p.key("host"), out);
    common::export_to(&dr.export_to, false, namespace, p, out);
    if dr.workload_selector.is_some() && dr.export_to.iter().any(|ns| ns != "." && ns != namespace) {
        out.error(
            &p.key("exportTo"),
            "a rule with a workloadSelector is for its own namespace: exportTo may only be ['.']",
        );
    }
    if let Some(t) = &dr.traffic_policy {
        traffic_policy(t, &p.key("trafficPolicy"), out);
    }
    let subsets = p.key("subsets");
    for (i, s) in dr.subsets.iter().enumerate() {
        let at = subsets.index(i);
        if !common::is_dns_label(&s.name) {
            out.error(&at.key("name"), format!("{:?} is not a DNS label", s.name));
        }
        if dr.subsets[..i].iter().any(|o| o.name == s.name) {
            out.error(&at.key("name"), format!("subset {:?} is declared twice", s.name));
        }
        common::labels(&s.labels, &at.key("labels"), out);
        if let Some(t) = &s.traffic_policy {
            traffic_policy(t, &at.key("trafficPolicy"), out);
        }
    }
    if let Some(w) = &dr.workload_selector {
        common::selector(&w.match_labels, &p.key("workloadSelector"), "matchLabels", out);
    }
}

fn traffic_policy(t: &TrafficPolicy, p: &Path<'_>, out: &mut Findings) {
    if *t == TrafficPolicy::default() {
        out.error(p, "a traffic policy needs at least one field");
    }
    blocks(&t.load_balancer, &t.connection_pool, &t.outlier_detection, &t.tls, p, out);
    let ports = p.key("portLevelSettings");
    for (i, s) in t.port_level_settings.iter().enumerate() {
        let at = ports.index(i);
        match &s.port {
            None => out.error(&at.key("port"), "a port is required"),
            Some(port) => common::port(port.number, &at.key("port").key("number"), out),
        }
        if s.load_balancer.is_none()
            && s.connection_pool.is_none()
            && s.outlier_detection.is_none()
            && s.tls.is_none()
        {
            out.error(&at, "a port's policy needs at least one field");
        }
        blocks(&s.load_balancer, &s.connection_pool, &s.outlier_detection, &s.tls, &at, out);
    }
    if t.tunnel.is_some() && t.proxy_protocol.is_some() {
        out.error(p, "only one of tunnel and proxyProtocol is allowed");
    }
    if let Some(x) = &t.tunnel {
        tunnel(x, &p.key("tunnel"), out);
    }
    if let Some(b) = &t.retry_budget {
        common::duration_or_zero(b.budget_interval, &p.key("retryBudget").key("budgetInterval"), out);
    }
}

fn tunnel(t: &TunnelSettings, p: &Path<'_>, out: &mut Findings) {
    if !matches!(t.protocol.as_str(), "" | "CONNECT" | "POST") {
        out.error(&p.key("protocol"), format!("{:?} is neither CONNECT nor POST", t.protocol));
    }
    if !common::is_fqdn(&t.target_host) && t.target_host.parse::<std::net::IpAddr>().is_err() {
        out.error(
            &p.key("targetHost"),
            format!("{:?} is neither a DNS name nor an IP address", t.target_host),
        );
    }
    common::port(t.target_port, &p.key("targetPort"), out);
}

fn blocks(
    lb: &Option<LoadBalancerSettings>,
    pool: &Option<ConnectionPoolSettings>,
    outlier: &Option<OutlierDetection>,
    tls: &Option<ClientTlsSettings>,
    p: &Path<'_>,
    out: &mut Findings,
) {
    if let Some(lb) = lb {
        load_balancer(lb, outlier.is_some(), &p.key("loadBalancer"), out);
    }
    if let Some(pool) = pool {
        connection_pool(pool, &p.key("connectionPool"), out);
    }
    if let Some(o) = outlier {
        outlier_detection(o, &p.key("outlierDetection"), out);
    }
    if let Some(t) = tls {
        client_tls(t, &p.key("tls"), out);
    }
}

fn load_balancer(lb: &LoadBalancerSettings, outlier: bool, p: &Path<'_>, out: &mut Findings) {
    let kinds = usize::from(lb.simple.is_some())
        + usize::from(lb.consistent_hash.is_some())
        + usize::from(lb.backend_utilization.is_some());
    if kinds > 1 {
        out.error(p, "only one of simple, consistentHash and backendUtilization is allowed");
    }
    if let Some(u) = &lb.backend_utilization {
        let at = p.key("backendUtilization");
        common::duration_or_zero(u.weight_stabilization_period, &at.key("weightStabilizationPeriod"), out);
        common::duration(u.weight_expiration_period, &at.key("weightExpirationPeriod"), out);
        common::duration(u.weight_update_period, &at.key("weightUpdatePeriod"), out);
    }
    if let Some(h) = &lb.consistent_hash {
        let at = p.key("consistentHash");
        let keys = usize::from(h.http_header_name.is_some())
            + usize::from(h.http_cookie.is_some())
            + usize::from(h.use_source_ip.is_some())
            + usize::from(h.http_query_parameter_name.is_some());
        if keys > 1 {
            out.error(
                &at,
                "only one of httpHeaderName, httpCookie, useSourceIp and httpQueryParameterName is allowed",
            );
        } else if keys == 0 {
            out.warning(
                &at,
                "nothing is hashed: set one of httpHeaderName, httpCookie, useSourceIp and httpQueryParameterName",
            );
        }
        if let Some(n) = &h.http_header_name {
            common::header_name(n, &at.key("httpHeaderName"), out);
        }
        if let Some(c) = &h.http_cookie {
            let at = at.key("httpCookie");
            if c.name.is_empty() {
                out.error(&at.key("name"), "a cookie needs a name");
            }
            let attributes = at.key("attributes");
            for (i, a) in c.attributes.iter().enumerate() {
                let at = attributes.index(i);
                if !is_cookie_text(&a.value) {
                    out.error(&at.key("value"), "control characters and semicolons end an attribute");
                }
                let at = at.key("name");
                if a.name.is_empty() {
                    out.error(&at, "an attribute needs a name");
                } else if !is_cookie_text(&a.name) {
                    out.error(&at, "control characters and semicolons end an attribute");
                } else if c.attributes[..i].iter().any(|o| o.name == a.name) {
                    out.error(&at, format!("attribute {:?} is there twice", a.name));
                }
            }
        }
        if h.minimum_ring_size.is_some_and(|n| n != 0) {
            out.warning(
                &at.key("minimumRingSize"),
                "minimumRingSize is deprecated; use ringHash.minimumRingSize",
            );
            if h.ring_hash.is_some() || h.maglev.is_some() {
                out.error(&at.key("minimumRingSize"), "cannot be combined with ringHash or maglev");
            }
        }
        if h.ring_hash.is_some() && h.maglev.is_some() {
            out.error(&at, "only one of ringHash and maglev is allowed");
        }
        let ring = h.ring_hash.as_ref().and_then(|r| r.minimum_ring_size).or(h.minimum_ring_size);
        if ring.is_some_and(|n| n > 8 << 20) {
            out.error(&at, "a ring has at most 8388608 entries");
        }
        if let Some(m) = &h.maglev
            && let n = m.table_size.unwrap_or(0)
            && (n >= 5_000_011 || !is_prime(n))
        {
            out.error(&at.key("maglev").key("tableSize"), format!("{n} is not a prime below 5000011"));
        }
    }
    if let Some(l) = &lb.locality_lb_setting {
        let at = p.key("localityLbSetting");
        locality::check(l, &at, out);
        let fails_over = !l.failover.is_empty() || !l.failover_priority.is_empty();
        if fails_over && !outlier {
            out.warning(&at, "without outlierDetection nothing fails over: set it beside loadBalancer");
        }
    }
    if let Some(z) = &lb.zone_aware_lb_setting {
        let at = p.key("zoneAwareLbSetting");
        if lb.locality_lb_setting.is_some() {
            out.error(&at, "only one of localityLbSetting and zoneAwareLbSetting is allowed");
        }
        locality::check_zone_aware(z, &at, out);
        let fails_over = !z.failover.is_empty() || !z.failover_priority.is_empty();
        if fails_over && !outlier {
            out.warning(&at, "without outlierDetection nothing fails over: set it beside loadBalancer");
        }
    }
    if let Some(w) = &lb.warmup {
        let at = p.key("warmup");
        match w.duration {
            None => out.error(&at.key("duration"), "a duration is required"),
            d => common::duration(d, &at.key("duration"), out),
        }
        if w.minimum_percent.is_some_and(|n| n > 100.0) {
            out.error(&at.key("minimumPercent"), "at most 100 percent");
        }
        if w.aggression.is_some_and(|n| n <= 0.0) {
            out.error(&at.key("aggression"), "must be greater than 0; 1 is linear");
        }
    }
    common::duration(lb.warmup_duration_secs, &p.key("warmupDurationSecs"), out);
}

/// Text that is one attribute of a cookie, and stays within its header (RFC 6265 section 4.1.1).
fn is_cookie_text(s: &str) -> bool {
    s.bytes().all(|b| (b' '..0x7f).contains(&b) && b != b';')
}

fn is_prime(n: u64) -> bool {
    n > 1 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

pub(super) fn connection_pool(c: &ConnectionPoolSettings, p: &Path<'_>, out: &mut Findings) {
    if c.tcp.is_none() && c.http.is_none() {
        out.error(p, "one of tcp and http is required");
    }
    if let Some(t) = &c.tcp {
        let at = p.key("tcp");
        common::not_negative(t.max_connections.into(), &at.key("maxConnections"), out);
        common::duration(t.connect_timeout, &at.key("connectTimeout"), out);
        common::duration(t.max_connection_duration, &at.key("maxConnectionDuration"), out);
        common::duration_or_zero(t.idle_timeout, &at.key("idleTimeout"), out);
        if let Some(k) = &t.tcp_keepalive {
            let at = at.key("tcpKeepalive");
            common::duration(k.time, &at.key("time"), out);
            common::duration(k.interval, &at.key("interval"), out);
        }
    }
    if let Some(h) = &c.http {
        let at = p.key("http");
        for (n, field) in [
            (h.http1_max_pending_requests, "http1MaxPendingRequests"),
            (h.http2_max_requests, "http2MaxRequests"),
            (h.max_requests_per_connection, "maxRequestsPerConnection"),
            (h.max_retries, "maxRetries"),
            (h.max_concurrent_streams, "maxConcurrentStreams"),
        ] {
            common::not_negative(n.into(), &at.key(field), out);
        }
        common::duration(h.idle_timeout, &at.key("idleTimeout"), out);
        if let Some(k) = &h.http2_keepalive {
            let at = at.key("http2KeepAlive");
            for (d, field) in [(k.interval, "interval"), (k.timeout, "timeout")] {
                match d {
                    None => out.error(&at.key(field), format!("{field} is required")),
                    d => common::duration(d, &at.key(field), out),
                }
            }
        }
        if h.use_client_protocol && h.h2_upgrade_policy == H2UpgradePolicy::Upgrade {
            out.error(&at, "useClientProtocol cannot be combined with h2UpgradePolicy UPGRADE");
        }
    }
}

pub(super) fn outlier_detection(o: &OutlierDetection, p: &Path<'_>, out: &mut Findings) {
    common::not_negative(o.consecutive_errors.into(), &p.key("consecutiveErrors"), out);
    if o.consecutive_errors != 0 {
        out.warning(
            &p.key("consecutiveErrors"),
            "consecutiveErrors is deprecated; use consecutiveGatewayErrors or consecutive5xxErrors",
        );
    }
    common::percent(o.max_ejection_percent.into(), &p.key("maxEjectionPercent"), out);
    common::percent(o.min_health_percent.into(), &p.key("minHealthPercent"), out);
    common::duration(o.interval, &p.key("interval"), out);
    common::duration(o.base_ejection_time, &p.key("baseEjectionTime"), out);
    if o.consecutive_local_origin_failures.is_some_and(|n| n > 0) && !o.split_external_local_origin_errors {
        out.error(
            &p.key("consecutiveLocalOriginFailures"),
            "needs splitExternalLocalOriginErrors, without it connect failures count as errors",
        );
    }
    let codes = p.key("outlierDetectionHttpErrorCodes");
    for (i, c) in o.outlier_detection_http_error_codes.iter().enumerate() {
        if !(100..=599).contains(c) {
            out.error(&codes.index(i), format!("{c} is no HTTP status: use 100 to 599"));
        }
    }
}

pub(super) fn client_tls(t: &ClientTlsSettings, p: &Path<'_>, out: &mut Findings) {
    let files =
        !t.client_certificate.is_empty() || !t.private_key.is_empty() || !t.ca_certificates.is_empty();
    let own_certificates = matches!(t.mode, ClientTlsMode::Simple | ClientTlsMode::Mutual);
    if own_certificates && !t.credential_name.is_empty() && (files || !t.ca_crl.is_empty()) {
        out.error(&p.key("credentialName"), "cannot be combined with paths of certificates or of a CRL");
    }
    match t.mode {
        ClientTlsMode::Mutual => {
            if t.credential_name.is_empty() {
                for (v, field) in
                    [(&t.client_certificate, "clientCertificate"), (&t.private_key, "privateKey")]
                {
                    if v.is_empty() {
                        out.error(&p.key(field), format!("mode MUTUAL needs {field} or credentialName"));
                    }
                }
            }
        }
        ClientTlsMode::IstioMutual => {
            if files || !t.credential_name.is_empty() {
                out.warning(
                    p,
                    "mode ISTIO_MUTUAL uses the mesh identity: other certificates are without effect",
                );
            }
        }
        ClientTlsMode::Disable => {
            if files || !t.credential_name.is_empty() || !t.sni.is_empty() {
                out.warning(p, "mode DISABLE: the other fields are without effect");
            }
        }
        ClientTlsMode::Simple => {}
    }
    if t.insecure_skip_verify == Some(true) && own_certificates {
        let secret = t.mode == ClientTlsMode::Simple && !t.credential_name.is_empty();
        if !t.ca_certificates.is_empty() || !t.subject_alt_names.is_empty() || secret {
            out.error(
                &p.key("insecureSkipVerify"),
                "contradicts caCertificates, subjectAltNames and the roots of credentialName: remove either",
            );
        } else {
            out.warning(
                &p.key("insecureSkipVerify"),
                "the server is not verified: anyone on the path can read and change the traffic",
            );
        }
    }
}

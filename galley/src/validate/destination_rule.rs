//! Rules of DestinationRule, and of the policies that other kinds share with it.

use mesh_model::authored::{
    ClientTlsMode, ClientTlsSettings, ConnectionPoolSettings, DestinationRule, H2UpgradePolicy,
    LoadBalancerSettings, LocalityLbSetting, OutlierDetection, SimpleLb, TrafficPolicy,
};

use super::common::{self, Findings};
use crate::path::Path;

pub(super) fn check(dr: &DestinationRule, p: &Path<'_>, out: &mut Findings) {
    common::host(&dr.host, &p.key("host"), out);
    common::export_to(&dr.export_to, false, p, out);
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
        common::labels(&w.match_labels, &p.key("workloadSelector").key("matchLabels"), out);
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
    out.unenforced(t.tunnel.is_some(), p, "tunnel");
    out.unenforced(t.retry_budget.is_some(), p, "retryBudget");
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
        load_balancer(lb, &p.key("loadBalancer"), out);
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

fn load_balancer(lb: &LoadBalancerSettings, p: &Path<'_>, out: &mut Findings) {
    if lb.simple == Some(SimpleLb::Passthrough) {
        out.warning(&p.key("simple"), "PASSTHROUGH is accepted but not enforced yet: ROUND_ROBIN is used");
    }
    if lb.simple.is_some() && lb.consistent_hash.is_some() {
        out.error(p, "only one of simple and consistentHash is allowed");
    }
    if let Some(h) = &lb.consistent_hash {
        let at = p.key("consistentHash");
        let keys = usize::from(h.http_header_name.is_some())
            + usize::from(h.http_cookie.is_some())
            + usize::from(h.use_source_ip.is_some())
            + usize::from(h.http_query_parameter_name.is_some());
        if keys != 1 {
            out.error(
                &at,
                "exactly one of httpHeaderName, httpCookie, useSourceIp and httpQueryParameterName is required",
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
            out.unenforced(!c.attributes.is_empty(), &at, "attributes");
        }
        if h.ring_hash.is_some() && h.maglev.is_some() {
            out.error(&at, "only one of ringHash and maglev is allowed");
        }
        let ring = h.ring_hash.as_ref().and_then(|r| r.minimum_ring_size).or(h.minimum_ring_size);
        if ring.is_some_and(|n| n > 8 << 20) {
            out.error(&at, "a ring has at most 8388608 entries");
        }
        if let Some(n) = h.maglev.as_ref().and_then(|m| m.table_size)
            && (n >= 5_000_011 || !is_prime(n))
        {
            out.error(&at.key("maglev").key("tableSize"), format!("{n} is not a prime below 5000011"));
        }
    }
    if let Some(l) = &lb.locality_lb_setting {
        locality(l, &p.key("localityLbSetting"), out);
    }
    out.unenforced(lb.warmup.is_some(), p, "warmup");
    out.unenforced(lb.warmup_duration_secs.is_some(), p, "warmupDurationSecs");
}

fn is_prime(n: u64) -> bool {
    n > 1 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

fn locality(l: &LocalityLbSetting, p: &Path<'_>, out: &mut Findings) {
    if !l.distribute.is_empty() && (!l.failover.is_empty() || !l.failover_priority.is_empty()) {
        out.error(p, "distribute cannot be combined with failover or failoverPriority");
    }
    let distribute = p.key("distribute");
    for (i, d) in l.distribute.iter().enumerate() {
        let at = distribute.index(i);
        if d.from.is_empty() {
            out.error(&at.key("from"), "a locality is required");
        }
        let sum: u64 = d.to.values().map(|w| u64::from(*w)).sum();
        if d.to.values().any(|w| *w == 0 || *w > 100) {
            out.error(&at.key("to"), "a weight must be within 1..100");
        } else if sum != 100 {
            out.error(&at.key("to"), format!("the weights add up to {sum}, not 100"));
        }
    }
    let failover = p.key("failover");
    for (i, f) in l.failover.iter().enumerate() {
        let at = failover.index(i);
        if f.from.is_empty() || f.to.is_empty() || f.from == f.to {
            out.error(&at, "two different regions are required");
        }
        if f.from.contains(['/', '*']) || f.to.contains(['/', '*']) {
            out.error(&at, "failover is between regions: no zones, no wildcards");
        }
    }
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
            out.unenforced(k.probes > 0, &at, "probes");
            out.unenforced(k.interval.is_some(), &at, "interval");
        }
        out.unenforced(t.max_connection_duration.is_some(), &at, "maxConnectionDuration");
        out.unenforced(t.idle_timeout.is_some(), &at, "idleTimeout");
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
        common::duration_or_zero(h.idle_timeout, &at.key("idleTimeout"), out);
        if h.use_client_protocol && h.h2_upgrade_policy == H2UpgradePolicy::Upgrade {
            out.error(&at, "useClientProtocol cannot be combined with h2UpgradePolicy UPGRADE");
        }
        out.unenforced(h.max_concurrent_streams != 0, &at, "maxConcurrentStreams");
        out.unenforced(h.http2_keepalive.is_some(), &at, "http2Keepalive");
    }
}

fn outlier_detection(o: &OutlierDetection, p: &Path<'_>, out: &mut Findings) {
    common::not_negative(o.consecutive_errors.into(), &p.key("consecutiveErrors"), out);
    common::percent(o.max_ejection_percent.into(), &p.key("maxEjectionPercent"), out);
    common::percent(o.min_health_percent.into(), &p.key("minHealthPercent"), out);
    common::duration(o.interval, &p.key("interval"), out);
    common::duration(o.base_ejection_time, &p.key("baseEjectionTime"), out);
    if o.consecutive_local_origin_failures.is_some() && !o.split_external_local_origin_errors {
        out.error(
            &p.key("consecutiveLocalOriginFailures"),
            "needs splitExternalLocalOriginErrors, without it connect failures count as errors",
        );
    }
    out.unenforced(o.split_external_local_origin_errors, p, "splitExternalLocalOriginErrors");
    out.unenforced(!o.outlier_detection_http_error_codes.is_empty(), p, "outlierDetectionHttpErrorCodes");
}

fn client_tls(t: &ClientTlsSettings, p: &Path<'_>, out: &mut Findings) {
    let files =
        !t.client_certificate.is_empty() || !t.private_key.is_empty() || !t.ca_certificates.is_empty();
    if !t.credential_name.is_empty() && files {
        out.error(&p.key("credentialName"), "cannot be combined with paths of certificates");
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
                out.error(p, "mode ISTIO_MUTUAL uses the mesh identity: certificates cannot be set");
            }
        }
        ClientTlsMode::Disable => {
            if files || !t.credential_name.is_empty() || !t.sni.is_empty() {
                out.warning(p, "mode DISABLE: the other fields are without effect");
            }
        }
        ClientTlsMode::Simple => {}
    }
    if t.insecure_skip_verify == Some(true) {
        if !t.ca_certificates.is_empty() || !t.subject_alt_names.is_empty() {
            out.error(
                &p.key("insecureSkipVerify"),
                "cannot be combined with caCertificates or subjectAltNames",
            );
        } else {
            out.warning(
                &p.key("insecureSkipVerify"),
                "the server is not verified: anyone on the path can read and change the traffic",
            );
        }
    }
    out.unenforced(!t.ca_crl.is_empty(), p, "caCrl");
}

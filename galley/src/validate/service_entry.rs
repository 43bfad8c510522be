//! Rules of ServiceEntry, WorkloadEntry and WorkloadGroup.

use std::net::IpAddr;

use mesh_model::{
    authored::{Port, ReadinessProbe, Resolution, ServiceEntry, WorkloadEntry, WorkloadGroup},
    registry::Protocol,
};

use super::common::{self, Findings};
use crate::path::Path;

pub(super) fn check(se: &ServiceEntry, namespace: &str, p: &Path<'_>, out: &mut Findings) {
    common::export_to(&se.export_to, true, namespace, p, out);
    let hosts = p.key("hosts");
    if se.hosts.is_empty() {
        out.error(&hosts, "at least one host is required");
    }
    for (i, h) in se.hosts.iter().enumerate() {
        common::host(h, &hosts.index(i), out);
        if h == "*" {
            out.error(&hosts.index(i), "host '*' would catch everything");
        } else if common::is_partial_wildcard(h) && se.resolution != Resolution::DynamicDns {
            out.warning(
                &hosts.index(i),
                format!("{h:?}: only a whole label is a wildcard elsewhere; write it as \"*.example.com\""),
            );
        }
    }
    addresses(se, p, out);
    let ports = p.key("ports");
    if se.ports.is_empty() {
        out.warning(&ports, "without ports nothing can be called");
    }
    for (i, port) in se.ports.iter().enumerate() {
        let at = ports.index(i);
        common::port(port.number, &at.key("number"), out);
        if port.target_port != 0 {
            common::port(port.target_port, &at.key("targetPort"), out);
        }
        if !port.protocol.is_empty() {
            common::protocol(&port.protocol, &at.key("protocol"), out);
        }
        if !common::is_dns_label(&port.name) {
            out.error(&at.key("name"), format!("{:?} is not a port name", port.name));
        }
        for (what, dup) in [
            ("name", se.ports[..i].iter().any(|o| o.name == port.name)),
            ("number", se.ports[..i].iter().any(|o| o.number == port.number)),
        ] {
            if dup {
                out.error(&at.key(what), format!("port {what} is used twice"));
            }
        }
    }
    if let Some(s) = &se.workload_selector {
        common::selector(&s.labels, &p.key("workloadSelector"), "labels", out);
        if !se.endpoints.is_empty() {
            out.error(&p.key("endpoints"), "only one of endpoints and workloadSelector is allowed");
        }
        if se.resolution == Resolution::None {
            out.warning(
                &p.key("workloadSelector"),
                "without effect: resolution NONE uses the caller's destination; use STATIC",
            );
        }
    }
    let opaque = |p: &Port| Protocol::parse(&p.protocol).is_none_or(|p| !p.is_http() && !p.is_tls());
    if se.resolution != Resolution::None && se.hosts.len() > 1 && se.ports.iter().any(opaque) {
        out.error(
            &hosts,
            "several hosts can only be told apart with HTTP or TLS: make one ServiceEntry per host for other ports",
        );
    }
    endpoints(se, p, out);
}

fn addresses(se: &ServiceEntry, p: &Path<'_>, out: &mut Findings) {
    let at = p.key("addresses");
    for (i, a) in se.addresses.iter().enumerate() {
        common::subnet(a, &at.index(i), out);
        if a.contains('/') && !matches!(se.resolution, Resolution::None | Resolution::Static) {
            out.error(&at.index(i), "a CIDR range needs resolution NONE or STATIC");
        }
    }
}

fn endpoints(se: &ServiceEntry, p: &Path<'_>, out: &mut Findings) {
    let at = p.key("endpoints");
    match se.resolution {
        Resolution::None => {
            if !se.endpoints.is_empty() {
                out.error(&at, "resolution NONE uses the caller's destination: endpoints cannot be set");
            }
        }
        Resolution::Static => {
            if se.endpoints.is_empty() && se.workload_selector.is_none() {
                out.warning(
                    &at,
                    "resolution STATIC without endpoints or a workloadSelector: every call fails",
                );
            }
        }
        Resolution::Dns | Resolution::DnsRoundRobin => {
            if se.endpoints.is_empty()
                && let Some(i) = se.hosts.iter().position(|h| !common::is_fqdn(h))
            {
                let hosts = p.key("hosts");
                out.error(
                    &hosts.index(i),
                    format!("{:?} is not a name that can be resolved: endpoints are required", se.hosts[i]),
                );
            }
            if se.resolution == Resolution::DnsRoundRobin && se.endpoints.len() > 1 {
                out.error(&at, "resolution DNS_ROUND_ROBIN takes one endpoint at most");
            }
        }
        Resolution::DynamicDns => {
            dynamic_dns(se, p, out);
        }
    }
    for (i, e) in se.endpoints.iter().enumerate() {
        let at = at.index(i);
        workload(e, &at, out);
        let is_ip = e.address.parse::<IpAddr>().is_ok();
        if se.resolution == Resolution::Static
            && !is_ip
            && !e.address.is_empty()
            && !e.address.starts_with("unix://")
        {
            out.error(
                &at.key("address"),
                format!("{:?} is not an IP address, resolution STATIC needs one", e.address),
            );
        }
        if se.resolution != Resolution::Static && e.address.starts_with("unix://") {
            out.error(&at.key("address"), "a unix socket needs resolution STATIC");
        }
        for name in e.ports.keys() {
            if !se.ports.iter().any(|p| p.name == *name) {
                out.error(&at.key("ports").key(name), format!("no port of the entry is named {name:?}"));
            }
        }
    }
}

fn dynamic_dns(se: &ServiceEntry, p: &Path<'_>, out: &mut Findings) {
    let hosts = p.key("hosts");
    for (i, h) in se.hosts.iter().enumerate() {
        if !h.starts_with('*') {
            out.error(&hosts.index(i), "resolution DYNAMIC_DNS is for wildcards; use DNS");
        }
    }
    for (set, field) in [(!se.addresses.is_empty(), "addresses"), (!se.endpoints.is_empty(), "endpoints")] {
        if set {
            out.error(&p.key(field), "resolution DYNAMIC_DNS takes the request's host: cannot be set");
        }
    }
    let ports = p.key("ports");
    for (i, port) in se.ports.iter().enumerate() {
        let named = Protocol::parse(&port.protocol);
        if !matches!(named, Some(Protocol::Http | Protocol::Http2 | Protocol::Grpc | Protocol::Tls)) {
            let at = ports.index(i);
            out.error(&at.key("protocol"), "resolution DYNAMIC_DNS needs HTTP, HTTP2, GRPC or TLS");
        }
    }
}

pub(super) fn check_workload(w: &WorkloadEntry, p: &Path<'_>, out: &mut Findings) {
    workload(w, p, out);
}

fn workload(w: &WorkloadEntry, p: &Path<'_>, out: &mut Findings) {
    let at = p.key("address");
    if let Some(path) = w.address.strip_prefix("unix://") {
        if !(path.starts_with('@') || path.starts_with('/') && !path.ends_with('/')) {
            out.error(&at, "a unix socket needs an absolute path, or @name");
        }
        if !w.ports.is_empty() {
            out.error(&p.key("ports"), "a unix socket has no ports");
        }
        out.warning(&at, common::OWN_SOCKETS);
    } else if w.address.is_empty() {
        if w.network.is_empty() {
            out.error(&at, "an address is required (or a network, whose gateway is used)");
        } else {
            out.warning(&at, format!("without an address the gateway of network {:?} is used", w.network));
        }
    } else if w.address.parse::<IpAddr>().is_err() && !common::is_fqdn(&w.address) {
        out.error(&at, format!("{:?} is neither an IP address nor a DNS name", w.address));
    }
    for (name, n) in &w.ports {
        let at = p.key("ports");
        let at = at.key(name);
        common::port(*n, &at, out);
        if !common::is_dns_label(name) {
            out.error(&at, format!("{name:?} is not a port name"));
        }
    }
    common::labels(&w.labels, &p.key("labels"), out);
    if !w.network.is_empty() && !common::is_dns1123_label(&w.network) {
        out.error(&p.key("network"), format!("{:?} is not a network: a DNS label in lower case", w.network));
    }
    if !w.service_account.is_empty() && !common::is_object_name(&w.service_account) {
        out.error(&p.key("serviceAccount"), format!("{:?} is not the name of an account", w.service_account));
    }
    if w.locality.matches('/').count() > 2 {
        out.error(&p.key("locality"), "expected region/zone/subzone");
    }
}

pub(super) fn check_group(g: &WorkloadGroup, p: &Path<'_>, out: &mut Findings) {
    match &g.template {
        None => out.error(&p.key("template"), "a template is required"),
        Some(t) => {
            let at = p.key("template");
            common::labels(&t.labels, &at.key("labels"), out);
            if !t.address.is_empty() {
                out.warning(&at.key("address"), "without effect: every workload brings its own address");
            }
        }
    }
    if let Some(m) = &g.metadata {
        common::labels(&m.labels, &p.key("metadata").key("labels"), out);
    }
    if let Some(probe) = &g.probe {
        readiness(probe, &p.key("probe"), out);
    }
}

fn readiness(r: &ReadinessProbe, p: &Path<'_>, out: &mut Findings) {
    for (n, field) in [
        (r.initial_delay_seconds, "initialDelaySeconds"),
        (r.timeout_seconds, "timeoutSeconds"),
        (r.period_seconds, "periodSeconds"),
        (r.success_threshold, "successThreshold"),
        (r.failure_threshold, "failureThreshold"),
    ] {
        common::not_negative(n.into(), &p.key(field), out);
    }
    let methods = usize::from(r.http_get.is_some())
        + usize::from(r.tcp_socket.is_some())
        + usize::from(r.exec.is_some())
        + usize::from(r.grpc.is_some());
    if methods != 1 {
        out.error(p, "exactly one of httpGet, tcpSocket, exec and grpc is required");
    }
    if let Some(h) = &r.http_get {
        let at = p.key("httpGet");
        common::port(h.port, &at.key("port"), out);
        if !matches!(h.scheme.as_str(), "" | "HTTP" | "HTTPS") {
            out.error(&at.key("scheme"), format!("{:?} is neither HTTP nor HTTPS", h.scheme));
        }
        let headers = at.key("httpHeaders");
        for (i, header) in h.http_headers.iter().enumerate() {
            let at = headers.index(i);
            if header.name.is_empty() || !header.name.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
            {
                out.error(&at.key("name"), format!("{:?} is not a header name", header.name));
            }
        }
    }
    if let Some(t) = &r.tcp_socket {
        common::port(t.port, &p.key("tcpSocket").key("port"), out);
    }
    if let Some(g) = &r.grpc {
        common::port(g.port, &p.key("grpc").key("port"), out);
    }
    if let Some(e) = &r.exec {
        let at = p.key("exec");
        if e.command.is_empty() {
            out.error(&at.key("command"), "a command is required");
        } else {
            out.warning(&at, "run only by a sidecar that was started with --exec-probes");
        }
    }
}

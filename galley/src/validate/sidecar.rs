//! Rules of Sidecar.

use mesh_model::authored::{CaptureMode, IstioEgressListener, IstioIngressListener, Sidecar};

use super::{
    common::{self, Findings},
    destination_rule::connection_pool,
    gateway,
};
use crate::path::Path;

pub(super) fn check(s: &Sidecar, p: &Path<'_>, out: &mut Findings) {
    if *s == Sidecar::default() {
        out.error(p, "an empty Sidecar says nothing: egress, ingress or outboundTrafficPolicy is required");
    }
    if let Some(w) = &s.workload_selector {
        common::labels(&w.labels, &p.key("workloadSelector").key("labels"), out);
    }
    let ingress = p.key("ingress");
    for (i, l) in s.ingress.iter().enumerate() {
        let at = ingress.index(i);
        ingress_listener(l, &at, out);
        let number = l.port.as_ref().map(|p| p.number);
        if number.is_some() && s.ingress[..i].iter().any(|o| o.port.as_ref().map(|p| p.number) == number) {
            out.error(&at.key("port").key("number"), "port is used twice");
        }
    }
    let egress = p.key("egress");
    for (i, l) in s.egress.iter().enumerate() {
        let at = egress.index(i);
        egress_listener(l, &at, out);
        if l.port.is_none() && i + 1 < s.egress.len() {
            out.error(&at, "the listener without port must be the only one and the last");
        }
    }
    if let Some(c) = &s.inbound_connection_pool {
        connection_pool(c, &p.key("inboundConnectionPool"), out);
    }
    out.unenforced(!s.ingress.is_empty(), p, "ingress");
    out.unenforced(s.inbound_connection_pool.is_some(), p, "inboundConnectionPool");
    if let Some(o) = &s.outbound_traffic_policy {
        out.unenforced(o.egress_proxy.is_some(), &p.key("outboundTrafficPolicy"), "egressProxy");
    }
}

fn ingress_listener(l: &IstioIngressListener, p: &Path<'_>, out: &mut Findings) {
    let at = p.key("port");
    match &l.port {
        None => out.error(&at, "a port is required"),
        Some(port) => {
            common::port(port.number, &at.key("number"), out);
            common::protocol(&port.protocol, &at.key("protocol"), out);
        }
    }
    if !l.bind.is_empty() && l.bind.parse::<std::net::IpAddr>().is_err() {
        out.error(&p.key("bind"), format!("{:?} is not an IP address", l.bind));
    }
    let endpoint = l.default_endpoint.as_str();
    let known = ["127.0.0.1:", "[::1]:", "0.0.0.0:", "[::]:"]
        .iter()
        .any(|prefix| endpoint.strip_prefix(prefix).is_some_and(|n| n.parse::<u16>().is_ok_and(|n| n > 0)));
    if !endpoint.is_empty() && !known && !endpoint.starts_with("unix:///") {
        out.error(
            &p.key("defaultEndpoint"),
            format!(
                "{endpoint:?} is none of 127.0.0.1:PORT, [::1]:PORT, 0.0.0.0:PORT, [::]:PORT, unix:///path"
            ),
        );
    }
    if let Some(t) = &l.tls {
        gateway::tls(t, &p.key("tls"), out);
    }
    if let Some(c) = &l.connection_pool {
        connection_pool(c, &p.key("connectionPool"), out);
    }
}

fn egress_listener(l: &IstioEgressListener, p: &Path<'_>, out: &mut Findings) {
    let unix = l.bind.starts_with("unix://");
    if let Some(port) = &l.port {
        let at = p.key("port");
        if !(unix && port.number == 0) {
            common::port(port.number, &at.key("number"), out);
        }
        common::protocol(&port.protocol, &at.key("protocol"), out);
    }
    if unix && l.capture_mode == CaptureMode::Iptables {
        out.error(&p.key("captureMode"), "a unix socket cannot be captured");
    } else if !unix && !l.bind.is_empty() && l.bind.parse::<std::net::IpAddr>().is_err() {
        out.error(&p.key("bind"), format!("{:?} is neither an IP address nor unix://", l.bind));
    }
    out.unenforced(l.port.is_some(), p, "port");
    out.unenforced(!l.bind.is_empty(), p, "bind");
    out.unenforced(l.capture_mode != CaptureMode::Default, p, "captureMode");
    let hosts = p.key("hosts");
    if l.hosts.is_empty() {
        out.error(&hosts, "at least one host is required");
    }
    for (i, h) in l.hosts.iter().enumerate() {
        let at = hosts.index(i);
        let Some((ns, host)) = h.split_once('/') else {
            out.error(&at, format!("{h:?} is not namespace/host"));
            continue;
        };
        if ns.len() > 1 && ns.starts_with('~') {
            // Ignoring it would show what its author wants hidden.
            out.error(&at, "excluding a namespace with '~' is not supported yet");
            continue;
        }
        if !matches!(ns, "*" | "." | "~") && !common::is_dns1123_label(ns) {
            out.error(&at, format!("{ns:?} is not a namespace, '*', '.' or '~'"));
        }
        common::host(host, &at, out);
    }
}

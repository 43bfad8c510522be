//! Rules of Sidecar.

use std::collections::BTreeSet;

use mesh_model::{
    authored::{
        CaptureMode, IstioEgressListener, IstioIngressListener, OutboundTrafficMode, Port, ServerTlsMode,
        Sidecar,
    },
    registry::Protocol,
};

use super::{
    common::{self, Findings},
    destination_rule::connection_pool,
    gateway,
};
use crate::path::Path;

pub(super) fn check(s: &Sidecar, namespace: &str, p: &Path<'_>, out: &mut Findings) {
    let says = Sidecar { workload_selector: None, ..s.clone() };
    if says == Sidecar::default() {
        out.error(p, "an empty Sidecar says nothing: egress, ingress or outboundTrafficPolicy is required");
    }
    if let Some(w) = &s.workload_selector {
        common::selector(&w.labels, &p.key("workloadSelector"), "labels", out);
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
        egress_listener(l, namespace, &at, out);
        let socket = |l: &IstioEgressListener| match &l.port {
            Some(port) if port.number != 0 => Some(port.number.to_string()),
            Some(_) => Some(l.bind.clone()),
            None => None,
        };
        let own = socket(l);
        if own.is_some() && s.egress[..i].iter().any(|o| socket(o) == own) {
            out.error(&at.key("port").key("number"), "port is used twice");
        }
        if l.port.is_none() && i + 1 < s.egress.len() {
            out.error(&at, "the listener without port must be the only one and the last");
        }
    }
    if let Some(c) = &s.inbound_connection_pool {
        connection_pool(c, &p.key("inboundConnectionPool"), out);
    }
    if let Some(o) = &s.outbound_traffic_policy {
        let at = p.key("outboundTrafficPolicy");
        if o.mode == OutboundTrafficMode::AllowAnyDynamicDns {
            out.error(&at.key("mode"), "ALLOW_ANY_DYNAMIC_DNS is for the whole mesh: set it in MeshConfig");
        }
        if o.tls.is_some() {
            out.error(&at.key("tls"), "is for the whole mesh: set it in MeshConfig");
        }
    }
    if let Some(o) = &s.outbound_traffic_policy
        && let Some(proxy) = &o.egress_proxy
    {
        let at = p.key("outboundTrafficPolicy");
        let at = at.key("egressProxy");
        if o.mode != OutboundTrafficMode::AllowAny {
            out.error(&at, "an egressProxy is for mode ALLOW_ANY");
        }
        if !common::is_fqdn(&proxy.host) {
            out.error(&at.key("host"), format!("{:?} is not a DNS name", proxy.host));
        }
        match &proxy.port {
            None => out.error(&at.key("port"), "a port is required"),
            Some(port) => common::port(port.number, &at.key("port").key("number"), out),
        }
    }
}

fn ingress_listener(l: &IstioIngressListener, p: &Path<'_>, out: &mut Findings) {
    let at = p.key("port");
    match &l.port {
        None => out.error(&at, "a port is required"),
        Some(port) => {
            listener_port(port, false, false, &at, out);
        }
    }
    if !l.bind.is_empty() && l.bind.parse::<std::net::IpAddr>().is_err() {
        out.error(&p.key("bind"), format!("{:?} is not an IP address", l.bind));
    }
    let endpoint = l.default_endpoint.as_str();
    let known = ["127.0.0.1:", "[::1]:", "0.0.0.0:", "[::]:", ":"]
        .iter()
        .any(|prefix| endpoint.strip_prefix(prefix).is_some_and(|n| n.parse::<u16>().is_ok_and(|n| n > 0)));
    let socket = endpoint.strip_prefix("unix://").is_some_and(is_socket_path);
    if !endpoint.is_empty() && !known && !socket {
        out.error(
            &p.key("defaultEndpoint"),
            format!(
                "{endpoint:?} is none of 127.0.0.1:PORT, [::1]:PORT, 0.0.0.0:PORT, [::]:PORT, unix:///path"
            ),
        );
    }
    if socket {
        out.warning(&p.key("defaultEndpoint"), common::OWN_SOCKETS);
    }
    if let Some(t) = &l.tls {
        let at = p.key("tls");
        for (set, field) in [
            (!t.subject_alt_names.is_empty(), "subjectAltNames"),
            (t.https_redirect, "httpsRedirect"),
            (!t.credential_name.is_empty(), "credentialName"),
            (!t.credential_names.is_empty(), "credentialNames"),
            (!t.tls_certificates.is_empty(), "tlsCertificates"),
        ] {
            if set {
                out.error(
                    &at.key(field),
                    format!("{field} is for gateways: a sidecar has paths of certificates"),
                );
            }
        }
        if matches!(t.mode, ServerTlsMode::IstioMutual | ServerTlsMode::AutoPassthrough) {
            out.error(&at.key("mode"), "a sidecar's listener ends TLS with mode SIMPLE or MUTUAL");
        }
        let protocol = l.port.as_ref().and_then(|p| Protocol::parse(&p.protocol));
        if !protocol.is_some_and(|p| p.is_tls()) {
            out.error(&at, "tls needs a port with protocol HTTPS or TLS");
        }
        gateway::tls(t, &at, out);
    }
    out.unenforced(socket, p, "defaultEndpoint");
    if let Some(c) = &l.connection_pool {
        let protocol = l.port.as_ref().and_then(|p| Protocol::parse(&p.protocol));
        if c.http.is_some() && !protocol.is_some_and(|p| p.is_http()) {
            out.warning(
                &p.key("connectionPool").key("http"),
                "without effect: the port's protocol is not HTTP",
            );
        }
        connection_pool(c, &p.key("connectionPool"), out);
    }
}

fn egress_listener(l: &IstioEgressListener, namespace: &str, p: &Path<'_>, out: &mut Findings) {
    let unix = l.bind.starts_with("unix://");
    if let Some(port) = &l.port {
        listener_port(port, true, unix, &p.key("port"), out);
    }
    if unix && !l.bind.strip_prefix("unix://").is_some_and(is_socket_path) {
        out.error(&p.key("bind"), format!("{:?} is not unix:///path or unix://@name", l.bind));
    }
    if unix && l.capture_mode == CaptureMode::Iptables {
        out.error(&p.key("captureMode"), "a unix socket cannot be captured");
    } else if !unix && !l.bind.is_empty() && l.bind.parse::<std::net::IpAddr>().is_err() {
        out.error(&p.key("bind"), format!("{:?} is neither an IP address nor unix://", l.bind));
    }
    out.unenforced(unix, p, "bind");
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
        common::scoped_host(host, false, &at, out);
    }
    duplicates(&l.hosts, namespace, &hosts, out);
}

fn listener_port(port: &Port, egress: bool, unix: bool, p: &Path<'_>, out: &mut Findings) {
    if !(unix && port.number == 0) {
        common::port(port.number, &p.key("number"), out);
    }
    // An egress listener may be a proxy for requests to every service of its hosts.
    let proxy = egress && port.protocol.eq_ignore_ascii_case("HTTP_PROXY");
    if !port.protocol.is_empty() && !proxy {
        common::protocol(&port.protocol, &p.key("protocol"), out);
    }
    if !port.name.is_empty() && !common::is_dns_label(&port.name) {
        out.error(&p.key("name"), format!("{:?} is not a port name", port.name));
    }
    if port.target_port != 0 {
        out.error(&p.key("targetPort"), "a Sidecar listens on number; remove targetPort");
    }
}

/// The path of a unix socket, or `@name` of an abstract one.
fn is_socket_path(path: &str) -> bool {
    path.starts_with('@') || path.starts_with('/') && !path.ends_with('/')
}

/// Hosts that others of the list have already.
fn duplicates(list: &[String], namespace: &str, p: &Path<'_>, out: &mut Findings) {
    let mut seen: BTreeSet<(&str, &str)> = BTreeSet::new();
    for (i, h) in list.iter().enumerate() {
        let Some((ns, host)) = h.split_once('/') else { continue };
        let ns = if ns == "." { namespace } else { ns };
        let covered = seen.contains(&(ns, host)) || seen.contains(&(ns, "*"));
        if covered || host == "*" && seen.iter().any(|(n, _)| *n == ns) {
            out.warning(&p.index(i), format!("{h:?} is there already: hosts of the list overlap"));
        }
        seen.insert((ns, host));
    }
    if seen.contains(&("*", "*")) && seen.iter().any(|(n, _)| *n != "*") {
        out.warning(p, "\"*/*\" is everything: the other hosts are without effect");
    }
}

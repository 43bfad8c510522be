//! Rules of ServiceEntry, WorkloadEntry and WorkloadGroup.

use std::net::IpAddr;

use mesh_model::authored::{Resolution, ServiceEntry, WorkloadEntry, WorkloadGroup};

use super::common::{self, Findings};
use crate::path::Path;

pub(super) fn check(se: &ServiceEntry, p: &Path<'_>, out: &mut Findings) {
    common::export_to(&se.export_to, true, p, out);
    let hosts = p.key("hosts");
    if se.hosts.is_empty() {
        out.error(&hosts, "at least one host is required");
    }
    for (i, h) in se.hosts.iter().enumerate() {
        common::host(h, &hosts.index(i), out);
        if h == "*" {
            out.error(&hosts.index(i), "host '*' would catch everything");
        }
    }
    addresses(se, p, out);
    let ports = p.key("ports");
    if se.ports.is_empty() {
        out.error(&ports, "at least one port is required");
    }
    for (i, port) in se.ports.iter().enumerate() {
        let at = ports.index(i);
        common::port(port.number, &at.key("number"), out);
        if port.target_port != 0 {
            common::port(port.target_port, &at.key("targetPort"), out);
        }
        common::protocol(&port.protocol, &at.key("protocol"), out);
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
        common::labels(&s.labels, &p.key("workloadSelector").key("labels"), out);
        if s.labels.is_empty() {
            out.error(&p.key("workloadSelector"), "at least one label is required");
        }
        if !se.endpoints.is_empty() {
            out.error(&p.key("endpoints"), "only one of endpoints and workloadSelector is allowed");
        }
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
    let resolution = p.key("resolution");
    match se.resolution {
        Resolution::None => {
            if !se.endpoints.is_empty() {
                out.error(&at, "resolution NONE uses the caller's destination: endpoints cannot be set");
            }
        }
        Resolution::Static => {
            if se.endpoints.is_empty() && se.workload_selector.is_none() {
                out.error(&at, "resolution STATIC needs endpoints or a workloadSelector");
            }
        }
        Resolution::Dns | Resolution::DnsRoundRobin => {
            if se.endpoints.is_empty() && se.hosts.iter().any(|h| h.starts_with('*')) {
                out.error(&p.key("hosts"), "a wildcard cannot be resolved: endpoints are required");
            }
            if se.resolution == Resolution::DnsRoundRobin && se.endpoints.len() > 1 {
                out.error(&at, "resolution DNS_ROUND_ROBIN takes one endpoint at most");
            }
        }
        Resolution::DynamicDns => out.error(&resolution, "resolution DYNAMIC_DNS is not supported yet"),
    }
    for (i, e) in se.endpoints.iter().enumerate() {
        let at = at.index(i);
        workload(e, &at, out);
        let is_ip = e.address.parse::<IpAddr>().is_ok();
        if se.resolution == Resolution::Static && !is_ip && !e.address.starts_with("unix://") {
            out.error(
                &at.key("address"),
                format!("{:?} is not an IP address, resolution STATIC needs one", e.address),
            );
        }
        for name in e.ports.keys() {
            if !se.ports.iter().any(|p| p.name == *name) {
                out.error(&at.key("ports").key(name), format!("no port of the entry is named {name:?}"));
            }
        }
    }
}

pub(super) fn check_workload(w: &WorkloadEntry, p: &Path<'_>, out: &mut Findings) {
    workload(w, p, out);
}

fn workload(w: &WorkloadEntry, p: &Path<'_>, out: &mut Findings) {
    let at = p.key("address");
    if let Some(path) = w.address.strip_prefix("unix://") {
        if !path.starts_with('/') {
            out.error(&at, "a unix socket needs an absolute path");
        }
        if !w.ports.is_empty() {
            out.error(&p.key("ports"), "a unix socket has no ports");
        }
        out.error(&at, "unix sockets are not supported yet");
    } else if w.address.is_empty() {
        if w.network.is_empty() {
            out.error(&at, "an address is required (or a network, whose gateway is used)");
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
                out.error(&at.key("address"), "a template has no address: every workload brings its own");
            }
        }
    }
    out.warning(p, "WorkloadGroup is accepted but not enforced yet: workloads do not register themselves");
}

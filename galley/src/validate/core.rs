//! Rules of Kubernetes' own kinds and of ServiceExport.

use std::net::IpAddr;

use mesh_model::authored::{
    EndpointSlice, IntOrString, Metadata, Pod, Secret, Service, ServiceExport, kubernetes::topology,
};

use super::common::{self, Findings};
use crate::path::Path;

pub(super) fn check_service(s: &Service, p: &Path<'_>, out: &mut Findings) {
    common::labels(&s.selector, &p.key("selector"), out);
    let kind = p.key("type");
    match s.service_type.as_str() {
        "" | "ClusterIP" | "NodePort" | "LoadBalancer" => {}
        "ExternalName" => {
            if !common::is_fqdn(&s.external_name) {
                out.error(&p.key("externalName"), format!("{:?} is not a DNS name", s.external_name));
            }
        }
        other => out.error(&kind, format!("unknown type {other:?}")),
    }
    if !matches!(s.session_affinity.as_str(), "" | "None" | "ClientIP") {
        out.error(
            &p.key("sessionAffinity"),
            format!("{:?} is neither None nor ClientIP", s.session_affinity),
        );
    }
    out.unenforced(s.session_affinity == "ClientIP", p, "sessionAffinity");
    out.unenforced(!s.external_ips.is_empty(), p, "externalIPs");
    out.unenforced(s.publish_not_ready_addresses, p, "publishNotReadyAddresses");
    let ips = std::iter::once((&s.cluster_ip, p.key("clusterIP")));
    let ips: Vec<_> = ips.chain(s.cluster_ips.iter().map(|ip| (ip, p.key("clusterIPs")))).collect();
    for (ip, at) in ips {
        if !matches!(ip.as_str(), "" | "None") && ip.parse::<IpAddr>().is_err() {
            out.error(&at, format!("{ip:?} is neither an IP address nor None"));
        }
    }
    let ports = p.key("ports");
    if s.ports.is_empty() && s.service_type != "ExternalName" && !s.headless() {
        out.error(&ports, "at least one port is required");
    }
    for (i, port) in s.ports.iter().enumerate() {
        let at = ports.index(i);
        common::port(port.port, &at.key("port"), out);
        if s.ports.len() > 1 && port.name.is_empty() {
            out.error(&at.key("name"), "a name is required when there are several ports");
        } else if !port.name.is_empty() && !common::is_dns1123_label(&port.name) {
            out.error(&at.key("name"), format!("{:?} is not a port name", port.name));
        }
        let protocol = |p: &mesh_model::authored::ServicePort| {
            if p.protocol.is_empty() { "TCP".to_owned() } else { p.protocol.clone() }
        };
        if !matches!(protocol(port).as_str(), "TCP" | "UDP" | "SCTP") {
            out.error(&at.key("protocol"), format!("{:?} is none of TCP, UDP, SCTP", port.protocol));
        }
        if s.ports[..i].iter().any(|o| !o.name.is_empty() && o.name == port.name) {
            out.error(&at.key("name"), format!("port name {:?} is used twice", port.name));
        }
        if s.ports[..i].iter().any(|o| o.port == port.port && protocol(o) == protocol(port)) {
            out.error(&at.key("port"), format!("port {} is used twice", port.port));
        }
        if let Some(IntOrString::Int(n)) = port.target_port {
            common::port(n, &at.key("targetPort"), out);
        }
        if port.protocol == "UDP" || port.protocol == "SCTP" {
            out.warning(&at, format!("{} is not carried by the mesh", port.protocol));
        }
    }
}

pub(super) fn check_pod(pod: &Pod, p: &Path<'_>, out: &mut Findings) {
    let (spec, status) = (p.key("spec"), p.key("status"));
    if !pod.status.pod_ip.is_empty() && pod.status.pod_ip.parse::<IpAddr>().is_err() {
        out.error(&status.key("podIP"), format!("{:?} is not an IP address", pod.status.pod_ip));
    }
    let containers = spec.key("containers");
    for (i, c) in pod.spec.containers.iter().enumerate() {
        let at = containers.index(i);
        let ports = at.key("ports");
        for (j, port) in c.ports.iter().enumerate() {
            common::port(port.container_port, &ports.index(j).key("containerPort"), out);
        }
    }
}

pub(super) fn check_slice(s: &EndpointSlice, meta: &Metadata, p: &Path<'_>, out: &mut Findings) {
    if !meta.labels.contains_key(topology::SERVICE_NAME) {
        let at = Path::root();
        let at = at.key("metadata");
        out.warning(
            &at.key("labels"),
            format!("without the label {} it belongs to no service", topology::SERVICE_NAME),
        );
    }
    let kind = s.address_type.as_str();
    if !matches!(kind, "IPv4" | "IPv6" | "FQDN") {
        out.error(&p.key("addressType"), format!("{kind:?} is none of IPv4, IPv6, FQDN"));
    }
    let ports = p.key("ports");
    for (i, port) in s.ports.iter().enumerate() {
        common::port(port.port, &ports.index(i).key("port"), out);
    }
    let endpoints = p.key("endpoints");
    for (i, e) in s.endpoints.iter().enumerate() {
        let at = endpoints.index(i);
        let at = at.key("addresses");
        if e.addresses.is_empty() {
            out.error(&at, "at least one address is required");
        }
        for a in &e.addresses {
            let fits = match a.parse::<IpAddr>() {
                Ok(ip) => {
                    if ip.is_ipv4() {
                        kind == "IPv4"
                    } else {
                        kind == "IPv6"
                    }
                }
                Err(_) => kind == "FQDN" && common::is_fqdn(a),
            };
            if !fits && matches!(kind, "IPv4" | "IPv6" | "FQDN") {
                out.error(&at, format!("{a:?} is not an address of type {kind}"));
            }
        }
    }
}

pub(super) fn check_secret(s: &Secret, p: &Path<'_>, out: &mut Findings) {
    // Messages never quote a value.
    let has = |k: &str| s.data.contains_key(k) || s.string_data.contains_key(k);
    if s.secret_type == "kubernetes.io/tls" {
        for k in ["tls.crt", "tls.key"] {
            if !has(k) {
                out.error(&p.key("data"), format!("a kubernetes.io/tls secret needs {k}"));
            }
        }
    }
    let data = p.key("data");
    for (k, v) in &s.data {
        let body = v.bytes().filter(|c| !c.is_ascii_whitespace());
        let ok = body.clone().count() % 4 == 0
            && body.clone().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'+' | b'/' | b'='));
        if !ok {
            out.error(&data.key(k), "not base64; use stringData for plain text");
        }
    }
}

pub(super) fn check_export(e: &ServiceExport, p: &Path<'_>, out: &mut Findings) {
    common::labels(&e.exported_labels, &p.key("exportedLabels"), out);
    out.unenforced(!e.exported_labels.is_empty(), p, "exportedLabels");
    out.unenforced(!e.exported_annotations.is_empty(), p, "exportedAnnotations");
}

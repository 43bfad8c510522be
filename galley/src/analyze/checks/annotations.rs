//! Annotations of Istio's domain: unknown, misplaced, deprecated, or with a value that is none.

use super::{Findings, Resource, World};
use crate::{node, path::FieldPath, validate::is_bool};

/// What an annotation's value must be.
#[derive(Clone, Copy)]
enum Check {
    Any,
    Bool,
    Uint,
    Port,
    Ports,
    PortsOrAll,
    Cidrs,
    CidrsOrAll,
    Interception,
    Quantity,
    Yaml,
}

/// An annotation: its name, the kinds it is for (none is any), what its value must be, and whether it is deprecated.
struct Known(&'static str, &'static [&'static str], Check, bool);

const POD: &[&str] = &["Pod"];

const KNOWN: &[Known] = &[
    Known("alpha.istio.io/canonical-serviceaccounts", &["Service"], Check::Any, true),
    Known("alpha.istio.io/kubernetes-serviceaccounts", &["Service"], Check::Any, true),
    Known("ambient.istio.io/bypass-inbound-capture", POD, Check::Any, false),
    Known("ambient.istio.io/dns-capture", POD, Check::Any, false),
    Known("ambient.istio.io/redirection", POD, Check::Any, false),
    Known("ambient.istio.io/waypoint-inbound-binding", &["GatewayClass", "Gateway"], Check::Any, false),
    Known("galley.istio.io/analyze-suppress", &[], Check::Any, false),
    Known("gateway.istio.io/controller-version", &[], Check::Any, false),
    Known("gateway.istio.io/name-override", &["Gateway"], Check::Any, false),
    Known("gateway.istio.io/service-account", &["Gateway"], Check::Any, false),
    Known("inject.istio.io/templates", POD, Check::Any, false),
    Known("istio.io/autoRegistrationGroup", &["WorkloadEntry"], Check::Any, false),
    Known("istio.io/connectedAt", &["WorkloadEntry"], Check::Any, false),
    Known("istio.io/disconnectedAt", &["WorkloadEntry"], Check::Any, false),
    Known("istio.io/dry-run", &["AuthorizationPolicy"], Check::Any, false),
    Known("istio.io/reroute-virtual-interfaces", POD, Check::Any, false),
    Known("istio.io/rev", &[], Check::Any, false),
    Known(
        "istio.io/use-waypoint-canary-weight",
        &["Service", "ServiceEntry", "Namespace"],
        Check::Any,
        false,
    ),
    Known("istio.io/workloadController", &["WorkloadEntry"], Check::Any, false),
    Known("kubernetes.io/ingress.class", &["Ingress"], Check::Any, false),
    Known("networking.istio.io/exportTo", &["Service"], Check::Any, false),
    Known("networking.istio.io/service-type", &["Gateway"], Check::Any, false),
    Known(
        "networking.istio.io/traffic-distribution",
        &["Namespace", "Service", "ServiceEntry"],
        Check::Any,
        false,
    ),
    Known("prometheus.istio.io/merge-metrics", POD, Check::Bool, false),
    Known("proxy.istio.io/config", POD, Check::Yaml, false),
    Known("proxy.istio.io/overrides", POD, Check::Any, false),
    Known("readiness.status.sidecar.istio.io/applicationPorts", POD, Check::Any, false),
    Known("readiness.status.sidecar.istio.io/failureThreshold", POD, Check::Uint, false),
    Known("readiness.status.sidecar.istio.io/initialDelaySeconds", POD, Check::Uint, false),
    Known("readiness.status.sidecar.istio.io/periodSeconds", POD, Check::Uint, false),
    Known("sidecar.istio.io/agentLogLevel", POD, Check::Any, false),
    Known("sidecar.istio.io/bootstrapOverride", POD, Check::Any, false),
    Known("sidecar.istio.io/componentLogLevel", POD, Check::Any, false),
    Known("sidecar.istio.io/discoveryAddress", POD, Check::Any, true),
    Known("sidecar.istio.io/extraStatTags", POD, Check::Any, true),
    Known("sidecar.istio.io/inject", POD, Check::Any, true),
    Known("sidecar.istio.io/interceptionMode", POD, Check::Interception, false),
    Known("sidecar.istio.io/logLevel", POD, Check::Any, false),
    Known("sidecar.istio.io/nativeSidecar", POD, Check::Any, false),
    Known("sidecar.istio.io/proxyCPU", POD, Check::Quantity, false),
    Known("sidecar.istio.io/proxyCPULimit", POD, Check::Quantity, false),
    Known("sidecar.istio.io/proxyImage", POD, Check::Any, false),
    Known("sidecar.istio.io/proxyImageType", POD, Check::Any, false),
    Known("sidecar.istio.io/proxyMemory", POD, Check::Quantity, false),
    Known("sidecar.istio.io/proxyMemoryLimit", POD, Check::Quantity, false),
    Known("sidecar.istio.io/rewriteAppHTTPProbers", POD, Check::Any, false),
    Known("sidecar.istio.io/statsCompression", POD, Check::Any, true),
    Known("sidecar.istio.io/statsEvictionInterval", POD, Check::Any, false),
    Known("sidecar.istio.io/statsFlushInterval", POD, Check::Any, false),
    Known("sidecar.istio.io/statsHistogramBins", POD, Check::Any, false),
    Known("sidecar.istio.io/statsHistogramBuckets", POD, Check::Any, false),
    Known("sidecar.istio.io/statsInclusionPrefixes", POD, Check::Any, true),
    Known("sidecar.istio.io/statsInclusionRegexps", POD, Check::Any, true),
    Known("sidecar.istio.io/statsInclusionSuffixes", POD, Check::Any, true),
    Known("sidecar.istio.io/status", &[], Check::Any, false),
    Known("sidecar.istio.io/userVolume", POD, Check::Any, false),
    Known("sidecar.istio.io/userVolumeMount", POD, Check::Any, false),
    Known("status.sidecar.istio.io/port", POD, Check::Port, false),
    Known("topology.istio.io/controlPlaneClusters", &["Namespace"], Check::Any, false),
    Known("traffic.istio.io/nodeSelector", &["Service"], Check::Any, false),
    Known("traffic.sidecar.istio.io/excludeInboundPorts", POD, Check::Ports, false),
    Known("traffic.sidecar.istio.io/excludeInterfaces", POD, Check::Any, false),
    Known("traffic.sidecar.istio.io/excludeOutboundIPRanges", POD, Check::Cidrs, false),
    Known("traffic.sidecar.istio.io/excludeOutboundPorts", POD, Check::Ports, false),
    Known("traffic.sidecar.istio.io/includeInboundPorts", POD, Check::PortsOrAll, false),
    Known("traffic.sidecar.istio.io/includeOutboundIPRanges", POD, Check::CidrsOrAll, false),
    Known("traffic.sidecar.istio.io/includeOutboundPorts", POD, Check::Any, false),
    Known("traffic.sidecar.istio.io/kubevirtInterfaces", POD, Check::Any, true),
];

pub(super) fn check<'w, 'a>(world: &'w World<'a>, out: &mut Findings<'w, 'a>) {
    for r in &world.resources {
        if matches!(r.kind, "Namespace" | "Service" | "Pod" | "Deployment") {
            for (name, value) in &r.annotations {
                one(r, r.kind, &r.labels, name, value, FieldPath::of("metadata.annotations").and(name), out);
            }
        }
    }
    // What a Deployment's template says becomes the pods'.
    for w in &world.workloads {
        let r = &world.resources[w.resource];
        if r.kind == "Pod" {
            continue;
        }
        for (name, value) in &w.annotations {
            let mut path = w.at.clone();
            path.0.pop();
            one(r, "Pod", &w.labels, name, value, path.and("metadata").and("annotations").and(name), out);
        }
    }
}

fn one<'w, 'a>(
    r: &'w Resource<'a>,
    kind: &str,
    labels: &super::super::world::Labels,
    name: &str,
    value: &str,
    path: FieldPath,
    out: &mut Findings<'w, 'a>,
) {
    let of_istio = name.split('/').next().is_some_and(|domain| domain.ends_with("istio.io"));
    if !of_istio && name != "kubernetes.io/ingress.class" {
        return;
    }
    let Ok(i) = KNOWN.binary_search_by(|k| k.0.cmp(name)) else {
        out.add(
            "IST0108",
            r,
            path,
            format!("annotation {name} does not exist: look for a misspelling, or remove it"),
        );
        return;
    };
    let Known(_, kinds, check, deprecated) = &KNOWN[i];
    let inject = name == "sidecar.istio.io/inject";
    if *deprecated && !(inject && labels.contains_key(name)) {
        let instead = if inject { ": use the label of the same name" } else { "" };
        out.add("IST0135", r, path.clone(), format!("annotation {name} is deprecated{instead}"));
    }
    if !kinds.is_empty() && !kinds.contains(&kind) {
        let message = format!("annotation {name} has no effect on a {kind}: it is for {}", kinds.join(", "));
        out.add("IST0107", r, path, message);
    } else if let Err(expected) = valid(*check, value) {
        out.add(
            "IST0125",
            r,
            path,
            format!("annotation {name}: {value:?} is not valid, expected {expected}"),
        );
    }
}

fn valid(check: Check, value: &str) -> Result<(), &'static str> {
    let ok = |ok: bool, expected: &'static str| if ok { Ok(()) } else { Err(expected) };
    let port = |s: &str| s.trim().parse::<u16>().is_ok();
    let list = |each: &dyn Fn(&str) -> bool| value.is_empty() || value.split(',').all(each);
    match check {
        Check::Any => Ok(()),
        Check::Bool => ok(is_bool(value), "true or false"),
        Check::Uint => ok(value.parse::<u32>().is_ok(), "a whole number"),
        Check::Port => ok(port(value), "a port"),
        Check::Ports => ok(list(&port), "ports, separated by commas"),
        Check::PortsOrAll => ok(value == "*" || list(&port), "'*', or ports, separated by commas"),
        Check::Cidrs => ok(list(&is_cidr), "CIDR ranges, separated by commas"),
        Check::CidrsOrAll => ok(value == "*" || list(&is_cidr), "'*', or CIDR ranges, separated by commas"),
        Check::Interception => {
            ok(matches!(value, "REDIRECT" | "TPROXY" | "NONE"), "REDIRECT, TPROXY or NONE")
        }
        Check::Quantity => ok(is_quantity(value), "a quantity such as 100m or 128Mi"),
        Check::Yaml => ok(
            node::Node::parse(value)
                .is_ok_and(|n| matches!(n.value, node::Value::Map(_) | node::Value::Null)),
            "YAML with the proxy's settings",
        ),
    }
}

fn is_cidr(s: &str) -> bool {
    s.parse::<ipnet::IpNet>().is_ok()
}

/// A number with one of Kubernetes' suffixes.
fn is_quantity(s: &str) -> bool {
    const SUFFIXES: [&str; 14] = ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei", "n", "u", "m", "k", "M", "G", "T", "P"];
    let number = SUFFIXES.iter().find_map(|x| s.strip_suffix(x)).or_else(|| s.strip_suffix('E')).unwrap_or(s);
    number.parse::<f64>().is_ok_and(f64::is_finite) && !number.contains(['i', 'I', 'n', 'N'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_in_order() {
        assert!(KNOWN.windows(2).all(|w| w[0].0 < w[1].0));
    }

    #[test]
    fn quantities() {
        for ok in ["1", "100m", "1.5", "128Mi", "2Gi", "1e3"] {
            assert!(is_quantity(ok), "{ok}");
        }
        for bad in ["", "m", "1 Gi", "abc", "1Kib", "inf", "nan"] {
            assert!(!is_quantity(bad), "{bad}");
        }
    }
}

//! Requests as attributes (Istio's vocabulary, `istioproxy` manifest).

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use mesh_model::SpiffeId;
use mesh_proxy::{HeaderLookup, RequestAttributes, RequestRecord};
use mesh_telemetry::attributes::Bag;

use crate::ProxyArgs;

/// Headers that a report leaves out.
const CREDENTIALS: [&str; 3] = ["authorization", "proxy-authorization", "cookie"];

/// The workload of this proxy.
pub(super) struct Node {
    /// What is always true, by the side that the workload is on.
    inbound: Bag,
    outbound: Bag,
}

impl Node {
    pub(super) fn new(args: &ProxyArgs) -> anyhow::Result<Self> {
        let identity = args.identity()?;
        let labels = args.label_map()?;
        let uid = format!("kubernetes://{}.{}", args.workload, args.namespace);
        // Pods of a Deployment have its name as a label; elsewhere the workload is the process.
        let side = |kind: &'static str, names: [&'static str; 10]| {
            let [uid_, name, ns, account, principal, workload, workload_ns, cluster, labels_, ip] = names;
            let mut b = Bag::default();
            b.set("context.reporter.kind", kind);
            b.set("context.reporter.uid", uid.as_str());
            b.set(uid_, uid.as_str());
            b.set(name, args.workload.as_str());
            b.set(ns, args.namespace.as_str());
            b.set(account, args.service_account.as_str());
            b.set(principal, identity.principal());
            b.set(workload, args.workload.as_str());
            b.set(workload_ns, args.namespace.as_str());
            b.set(cluster, args.cluster.as_str());
            b.set(labels_, labels.clone());
            b.set(ip, args.ip);
            b
        };
        Ok(Self {
            inbound: side(
                "inbound",
                [
                    "destination.uid",
                    "destination.name",
                    "destination.namespace",
                    "destination.serviceAccount",
                    "destination.principal",
                    "destination.workload.name",
                    "destination.workload.namespace",
                    "destination.cluster",
                    "destination.labels",
                    "destination.ip",
                ],
            ),
            outbound: side(
                "outbound",
                [
                    "source.uid",
                    "source.name",
                    "source.namespace",
                    "source.serviceAccount",
                    "source.principal",
                    "source.workload.name",
                    "source.workload.namespace",
                    "source.cluster",
                    "source.labels",
                    "source.ip",
                ],
            ),
        })
    }

    fn side(&self, inbound: bool) -> Bag {
        if inbound { self.inbound.clone() } else { self.outbound.clone() }
    }

    /// A request that is to be decided on, now.
    pub(super) fn request(&self, r: &RequestAttributes<'_>) -> Bag {
        let mut b = self.side(r.inbound);
        request(&mut b, r, false);
        let now = SystemTime::now();
        b.set("request.time", now);
        b.set("context.time", now);
        b
    }

    /// A request or connection that has just ended.
    pub(super) fn record(&self, r: &RequestRecord<'_>) -> Bag {
        let mut b = self.side(r.inbound);
        let now = SystemTime::now();
        let received = i64::try_from(r.request_bytes).unwrap_or(i64::MAX);
        let sent = i64::try_from(r.response_bytes).unwrap_or(i64::MAX);
        b.set("context.time", now);
        if r.flags != "-" {
            b.set_some("context.proxy_error_code", r.flags);
        }
        match r.request {
            Some(q) => {
                request(&mut b, q, true);
                b.set("request.time", before(now, r.duration));
                b.set("request.size", received);
                b.set("response.time", now);
                b.set("response.duration", r.duration);
                b.set("response.size", sent);
                b.set("response.code", i64::from(r.status));
                if let Some(h) = r.response_headers {
                    b.set("response.headers", headers(h, true));
                }
                if let Some(s) = r.grpc_status {
                    b.set("response.grpc_status", s.to_string());
                }
            }
            None => {
                b.set("context.protocol", "tcp");
                b.set("connection.event", "close");
                b.set("connection.duration", r.duration);
                b.set("connection.mtls", !r.source_principal.is_empty());
                for (name, value) in [
                    ("connection.received.bytes", received),
                    ("connection.received.bytes_total", received),
                    ("connection.sent.bytes", sent),
                    ("connection.sent.bytes_total", sent),
                ] {
                    b.set(name, value);
                }
                if r.inbound {
                    b.set("source.ip", r.source_ip);
                    peer(&mut b, r.source_principal);
                }
                service(&mut b, r.destination_service);
            }
        }
        b
    }
}

fn before(now: SystemTime, d: Duration) -> SystemTime {
    now.checked_sub(d).unwrap_or(SystemTime::UNIX_EPOCH)
}

fn request(b: &mut Bag, r: &RequestAttributes<'_>, report: bool) {
    b.set("context.protocol", r.protocol);
    b.set("connection.mtls", r.mtls);
    b.set("request.method", r.method);
    b.set("request.path", r.path);
    let (path, query) = r.path.split_once('?').unwrap_or((r.path, ""));
    b.set("request.url_path", path);
    if !query.is_empty() {
        b.set("request.query_params", parameters(query));
    }
    b.set("request.host", r.authority);
    b.set("request.scheme", r.scheme);
    b.set("request.headers", headers(r.headers, report));
    for (name, header) in
        [("request.id", "x-request-id"), ("request.useragent", "user-agent"), ("request.referer", "referer")]
    {
        if let Some(v) = r.headers.get(header) {
            b.set_some(name, &String::from_utf8_lossy(v));
        }
    }
    if r.inbound {
        b.set("source.ip", r.source_ip);
        b.set("source.port", i64::from(r.source_port));
        b.set("destination.port", i64::from(r.destination_port));
        b.set_some("source.cluster", r.source_cluster);
        peer(b, r.source_principal);
    }
    service(b, r.destination_service);
}

/// What a verified identity says about its bearer.
fn peer(b: &mut Bag, principal: &str) {
    let Ok(id) = SpiffeId::parse(principal) else { return };
    b.set("source.principal", id.principal());
    if let Some((namespace, account)) = id.namespace_and_account() {
        b.set("source.namespace", namespace);
        b.set("source.serviceAccount", account);
    }
}

fn service(b: &mut Bag, host: &str) {
    if host.is_empty() || host == "unknown" {
        return;
    }
    b.set("destination.service", host);
    b.set("destination.service.host", host);
    let mut parts = host.splitn(4, '.');
    if let (Some(name), Some(namespace), Some("svc")) = (parts.next(), parts.next(), parts.next()) {
        b.set("destination.service.name", name);
        b.set("destination.service.namespace", namespace);
        b.set("destination.service.uid", format!("istio://{namespace}/services/{name}"));
    } else {
        b.set("destination.service.name", host);
    }
}

/// Headers by lower-case name, values of the same name joined (RFC 9110 section 5.3).
fn headers(h: &dyn HeaderLookup, report: bool) -> BTreeMap<String, String> {
    let mut out: BTreeMap<String, String> = BTreeMap::new();
    h.for_each(&mut |name, value| {
        let name = String::from_utf8_lossy(name).to_ascii_lowercase();
        if report && (CREDENTIALS.contains(&name.as_str()) || name == "set-cookie") {
            return;
        }
        let value = String::from_utf8_lossy(value);
        out.entry(name)
            .and_modify(|v| {
                v.push(',');
                v.push_str(&value);
            })
            .or_insert_with(|| value.into_owned());
    });
    out
}

/// As they are written: not decoded, the first of a name wins.
fn parameters(query: &str) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    for part in query.split('&').filter(|p| !p.is_empty()) {
        let (k, v) = part.split_once('=').unwrap_or((part, ""));
        out.entry(k.to_owned()).or_insert_with(|| v.to_owned());
    }
    out
}

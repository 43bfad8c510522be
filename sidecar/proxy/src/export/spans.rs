//! Spans as OTLP (`opentelemetry.proto.trace.v1`) and for Zipkin (its API version 2).

use std::{
    borrow::Cow,
    sync::LazyLock,
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use mesh_model::proxy as model;
use mesh_telemetry::trace::{RequestSpan, environment_attributes};
use serde_json::{Map, json};

use crate::{options::NodeInfo, wire::Writer};

pub(super) const EXPORT: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
/// Values of `SpanKind` and `StatusCode`.
const SERVER: u64 = 2;
const CLIENT: u64 = 3;
const ERROR: u64 = 2;
/// Flags of a span: sampled, and it is known that its parent is remote.
const FLAGS: u32 = 0x301;
/// By Istio's convention.
const CANONICAL: &str = "service.istio.io/canonical-name";

/// What the environment says of the process.
static ENVIRONMENT: LazyLock<Vec<(String, String)>> = LazyLock::new(environment_attributes);

pub(super) fn nanos(t: SystemTime) -> u64 {
    let since = t.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// A `KeyValue` with a text.
pub(super) fn attribute(w: &mut Writer, field: u32, key: &str, value: &str) {
    w.message(field, |w| {
        w.text(1, key.as_bytes());
        w.message(2, |w| w.text(1, value.as_bytes()));
    });
}

/// A span as a field of `ScopeSpans`.
pub(super) fn otlp(s: &RequestSpan, out: &mut Vec<u8>) {
    let mut w = Writer::default();
    w.message(2, |w| {
        w.bytes(1, &s.context.trace_id.to_be_bytes());
        w.bytes(2, &s.context.span_id.to_be_bytes());
        if s.context.parent_id != 0 {
            w.bytes(4, &s.context.parent_id.to_be_bytes());
        }
        w.text(5, s.name.as_bytes());
        w.number(6, if s.server { SERVER } else { CLIENT });
        w.fixed64(7, nanos(s.start));
        w.fixed64(8, nanos(s.start + s.duration));
        for (k, v) in &s.attributes {
            attribute(w, 9, k, v);
        }
        if s.error {
            w.message(15, |w| w.number(3, ERROR));
        }
        w.fixed32(16, FLAGS);
    });
    out.append(&mut w.into_bytes());
}

/// `ExportTraceServiceRequest`.
pub(super) fn request(o: &model::OtlpTraces, node: &NodeInfo, spans: &[u8]) -> Writer {
    let mut w = Writer::default();
    w.message(1, |w| {
        w.message(1, |w| {
            let name =
                if o.service_name.is_empty() { service(node) } else { Cow::Borrowed(&*o.service_name) };
            attribute(w, 1, "service.name", &name);
            for (k, v) in ENVIRONMENT.iter().filter(|(k, _)| o.environment && k != "service.name") {
                attribute(w, 1, k, v);
            }
        });
        w.message(2, |w| {
            w.message(1, |w| {
                w.text(1, b"flotilla");
                w.text(2, env!("CARGO_PKG_VERSION").as_bytes());
            });
            w.append(spans);
        });
    });
    w
}

/// The proxy's service, as Istio names it: `<name>.<namespace>`.
fn service(node: &NodeInfo) -> Cow<'_, str> {
    let name = node.labels.get(CANONICAL).or_else(|| node.labels.get("app")).unwrap_or(&node.workload);
    Cow::Owned(format!("{name}.{}", node.namespace))
}

/// A span and a comma.
pub(super) fn zipkin(s: &RequestSpan, z: &model::ZipkinTraces, node: &NodeInfo, out: &mut Vec<u8>) {
    let micros = |n: u128| u64::try_from(n).unwrap_or(u64::MAX);
    let trace = s.context.trace_id;
    let tags: Map<String, serde_json::Value> =
        s.attributes.iter().map(|(k, v)| (k.clone().into_owned(), json!(v))).collect();
    let mut span = json!({
        "traceId": if z.long_ids || trace >> 64 != 0 { format!("{trace:032x}") } else { format!("{trace:016x}") },
        "id": format!("{:016x}", s.context.span_id),
        "kind": if s.server { "SERVER" } else { "CLIENT" },
        "name": s.name,
        "timestamp": nanos(s.start) / 1_000,
        "duration": micros(s.duration.as_micros()).max(1),
        "localEndpoint": {"serviceName": service(node)},
        "tags": tags,
    });
    if s.context.parent_id != 0 {
        span["parentId"] = json!(format!("{:016x}", s.context.parent_id));
    }
    out.extend_from_slice(span.to_string().as_bytes());
    out.push(b',');
}

/// A list of spans that each end with a comma.
pub(super) fn list(spans: &[u8]) -> Bytes {
    let mut body = Vec::with_capacity(spans.len() + 1);
    body.push(b'[');
    body.extend_from_slice(spans.strip_suffix(b",").unwrap_or(spans));
    body.push(b']');
    Bytes::from(body)
}

//! Log entries as Envoy's (`envoy.data.accesslog.v3`) and as OTLP (`opentelemetry.proto.logs.v1`).

use std::time::UNIX_EPOCH;

use mesh_model::proxy as model;
use mesh_telemetry::access_log::{Field, Format, LogRecord};

use super::spans::{attribute, nanos};
use crate::{options::NodeInfo, wire::Writer};

pub(super) const STREAM: &str = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs";
pub(super) const EXPORT: &str = "/opentelemetry.proto.collector.logs.v1.LogsService/Export";

/// Flags of answers and their fields of `ResponseFlags`; `UAEX` is a message.
const FLAGS: [(&str, u32); 23] = [
    ("UH", 2),
    ("UT", 3),
    ("LR", 4),
    ("UR", 5),
    ("UF", 6),
    ("UC", 7),
    ("UO", 8),
    ("NR", 9),
    ("DI", 10),
    ("FI", 11),
    ("RL", 12),
    ("RLSE", 14),
    ("DC", 15),
    ("URX", 16),
    ("SI", 17),
    ("IH", 18),
    ("DPE", 19),
    ("UMSDR", 20),
    ("DT", 23),
    ("UPE", 24),
    ("NC", 25),
    ("OM", 26),
    ("DF", 27),
];
/// `core.v3.RequestMethod`.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];

/// An entry as a field of the list that it is in.
pub(super) fn entry(r: &dyn LogRecord, log: &model::GrpcLog, out: &mut Vec<u8>) {
    let mut w = Writer::default();
    w.message(1, |w| {
        w.message(1, |w| common(w, r));
        if log.requests {
            request_and_answer(w, r, log);
        } else {
            w.message(2, |w| {
                w.number(1, number(r, Field::BytesReceived));
                w.number(2, number(r, Field::BytesSent));
            });
        }
    });
    out.append(&mut w.into_bytes());
}

/// `StreamAccessLogsMessage`: one that begins a stream, and is all of it.
pub(super) fn message(log: &model::GrpcLog, node: &NodeInfo, entries: &[u8]) -> Writer {
    let mut w = Writer::default();
    w.message(1, |w| {
        w.message(1, |w| {
            w.text(1, node.id.as_bytes());
            w.text(2, node.cluster.as_bytes());
        });
        w.text(2, log.log_name.as_bytes());
    });
    w.message(if log.requests { 2 } else { 3 }, |w| w.append(entries));
    w
}

/// A record as a field of `ScopeLogs`.
pub(super) fn record(
    r: &dyn LogRecord,
    body: Option<&Format>,
    attributes: &[(String, Format)],
    out: &mut Vec<u8>,
) {
    let mut w = Writer::default();
    w.message(2, |w| {
        w.fixed64(1, nanos(r.start()));
        if let Some(body) = body {
            body.render(r, |line| w.message(5, |w| w.text(1, line.trim_end_matches('\n').as_bytes())));
        }
        for (k, v) in attributes {
            v.render(r, |line| attribute(w, 6, k, line.trim_end_matches('\n')));
        }
        let trace = text(r, Field::TraceId);
        if let Ok(id) = u128::from_str_radix(&trace, 16) {
            w.bytes(9, &id.to_be_bytes());
        }
    });
    out.append(&mut w.into_bytes());
}

/// `ExportLogsServiceRequest`. As Istio asks Envoys for it, it has nothing but the records.
pub(super) fn request(records: &[u8]) -> Writer {
    let mut w = Writer::default();
    w.message(1, |w| {
        w.message(1, |_| {});
        w.message(2, |w| w.append(records));
    });
    w
}

fn text(r: &dyn LogRecord, f: Field) -> String {
    let mut out = String::new();
    if r.field(f, &mut out) { out } else { String::new() }
}

fn number(r: &dyn LogRecord, f: Field) -> u64 {
    text(r, f).parse().unwrap_or(0)
}

/// `core.v3.Address` of what is one; other hosts have names of their own.
fn address(w: &mut Writer, field: u32, a: &str) {
    let Ok(a) = a.parse::<std::net::SocketAddr>() else { return };
    w.message(field, |w| {
        w.message(1, |w| {
            w.text(2, a.ip().to_string().as_bytes());
            w.number(3, u64::from(a.port()));
        });
    });
}

fn millis(w: &mut Writer, field: u32, n: u64) {
    w.message(field, |w| {
        w.number(1, n / 1_000);
        w.number(2, n % 1_000 * 1_000_000);
    });
}

/// `AccessLogCommon`.
fn common(w: &mut Writer, r: &dyn LogRecord) {
    address(w, 2, &text(r, Field::DownstreamRemoteAddress));
    address(w, 3, &text(r, Field::DownstreamLocalAddress));
    let (sni, sans, subject) = (
        text(r, Field::RequestedServerName),
        text(r, Field::DownstreamPeerUriSan),
        text(r, Field::DownstreamPeerSubject),
    );
    if !sni.is_empty() || !sans.is_empty() || !subject.is_empty() {
        w.message(4, |w| {
            w.text(3, sni.as_bytes());
            w.message(5, |w| {
                for san in sans.split(',').filter(|s| !s.is_empty()) {
                    w.message(1, |w| w.text(1, san.as_bytes()));
                }
                w.text(2, subject.as_bytes());
            });
        });
    }
    let start = r.start().duration_since(UNIX_EPOCH).unwrap_or_default();
    w.message(5, |w| {
        w.number(1, start.as_secs());
        w.number(2, u64::from(start.subsec_nanos()));
    });
    let duration = text(r, Field::ResponseDuration);
    if let Ok(n) = duration.parse() {
        millis(w, 9, n);
    }
    let whole = number(r, Field::Duration);
    millis(w, 12, whole);
    address(w, 13, &text(r, Field::UpstreamHost));
    w.text(15, text(r, Field::UpstreamCluster).as_bytes());
    let flags = text(r, Field::ResponseFlags);
    if !matches!(flags.as_str(), "" | "-") {
        w.message(16, |w| {
            // In the order of their numbers.
            for (flag, field) in FLAGS {
                w.number(field, u64::from(flags.split(',').any(|f| f == flag)));
            }
            if flags.split(',').any(|f| f == "UAEX") {
                w.message(13, |w| w.number(1, 1));
            }
        });
    }
    w.text(18, text(r, Field::UpstreamTransportFailureReason).as_bytes());
    w.text(19, text(r, Field::RouteName).as_bytes());
    address(w, 20, &text(r, Field::DownstreamDirectRemoteAddress));
    millis(w, 23, whole);
    w.number(24, number(r, Field::UpstreamRequestAttemptCount));
    w.text(25, text(r, Field::ConnectionTerminationDetails).as_bytes());
}

fn header(r: &dyn LogRecord, name: &str) -> String {
    let mut out = String::new();
    if r.request_header(name, &mut out) { out } else { String::new() }
}

/// `HTTPAccessLogEntry` without what is common.
fn request_and_answer(w: &mut Writer, r: &dyn LogRecord, log: &model::GrpcLog) {
    let version = match &*text(r, Field::Protocol) {
        "HTTP/1.0" => 1,
        "HTTP/1.1" => 2,
        "HTTP/2" => 3,
        "HTTP/3" => 4,
        _ => 0,
    };
    w.number(2, version);
    w.message(3, |w| {
        let method = header(r, ":method");
        // What is in no list has no number.
        let known = METHODS.iter().position(|m| *m == method);
        w.number(1, known.map_or(0, |n| n as u64 + 1));
        w.text(2, header(r, ":scheme").as_bytes());
        w.text(3, header(r, ":authority").as_bytes());
        let path = header(r, ":path");
        w.text(5, path.as_bytes());
        for (field, name) in [
            (6, "user-agent"),
            (7, "referer"),
            (8, "x-forwarded-for"),
            (9, "x-request-id"),
            (10, "x-envoy-original-path"),
        ] {
            w.text(field, header(r, name).as_bytes());
        }
        w.number(12, number(r, Field::BytesReceived));
        for name in &log.request_headers {
            let mut value = String::new();
            if r.request_header(name, &mut value) {
                w.entry(13, name.to_ascii_lowercase().as_bytes(), value.as_bytes());
            }
        }
    });
    w.message(4, |w| {
        let status = number(r, Field::ResponseCode);
        if status != 0 {
            w.message(1, |w| w.number(1, status));
        }
        w.number(3, number(r, Field::BytesSent));
        for name in &log.response_headers {
            let mut value = String::new();
            if r.response_header(name, &mut value) {
                w.entry(4, name.to_ascii_lowercase().as_bytes(), value.as_bytes());
            }
        }
        for name in &log.response_trailers {
            let mut value = String::new();
            if r.response_trailer(name, &mut value) {
                w.entry(5, name.to_ascii_lowercase().as_bytes(), value.as_bytes());
            }
        }
        w.text(6, text(r, Field::ResponseCodeDetails).as_bytes());
    });
}

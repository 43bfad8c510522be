//! What the fuzz targets of `e2e/fuzz` run. It is not part of the product.

use std::{collections::BTreeMap, time::SystemTime};

use mesh_model::proxy::AccessLogFormat;
use prost::Message as _;

use crate::{
    access_log::{Field, Format, LogRecord},
    attributes::{GLOBAL_WORDS, compress, decode_report, decompress, references},
    proto::mixer_v1::{CompressedAttributes, ReferencedAttributes, ReportRequest},
    trace::{TraceContext, TraceHeaders},
};

/// What a client of Mixer sends: a bag, a report, and what an answer depends on.
pub fn attributes(data: &[u8]) {
    if let Ok(c) = CompressedAttributes::decode(data)
        && let Ok(bag) = decompress(&c)
    {
        for words in [GLOBAL_WORDS.len(), 10] {
            let again = decompress(&compress(&bag, words)).expect("what we write");
            // A number that is none is no number like itself.
            assert_eq!(format!("{again:?}"), format!("{bag:?}"));
        }
    }
    if let Ok(r) = ReportRequest::decode(data) {
        let mut bags = 0;
        let _ = decode_report(&r, |_| bags += 1);
        assert!(bags <= r.attributes.len());
    }
    if let Ok(r) = ReferencedAttributes::decode(data) {
        // What is said twice is one.
        assert!(references(&r).is_none_or(|l| l.len() <= r.attribute_matches.len()));
    }
}

/// A request of which everything is one text.
struct Request<'a>(&'a str);

impl LogRecord for Request<'_> {
    fn start(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH
    }
    fn field(&self, _: Field, out: &mut String) -> bool {
        out.push_str(self.0);
        true
    }
    fn request_header(&self, _: &str, out: &mut String) -> bool {
        out.push_str(self.0);
        true
    }
    fn response_header(&self, _: &str, out: &mut String) -> bool {
        out.push_str(self.0);
        true
    }
    fn response_trailer(&self, _: &str, _: &mut String) -> bool {
        false
    }
}

/// A format, and behind an empty line what a client says: it stays in its line, and JSON stays JSON.
pub fn access_log(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (format, said) = text.split_once("\n\n").unwrap_or((text, "a\"b\n\u{85}"));
    let json = BTreeMap::from([("a".to_owned(), format.to_owned())]);
    for f in [AccessLogFormat::Text(format.to_owned()), AccessLogFormat::Json(json)] {
        let Ok(formatter) = Format::new(&f) else { continue };
        let formatter = formatter.omitting(said.len().is_multiple_of(2));
        // The format is the operator's, and may have lines; with one of one line there is one.
        let lines = format.matches('\n').count();
        formatter.render(&Request(said), |line| match f {
            AccessLogFormat::Text(_) => {
                assert!(line.strip_suffix('\n').unwrap_or(line).matches('\n').count() <= lines, "{line:?}");
            }
            AccessLogFormat::Json(_) => {
                let v: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
                assert!(v.is_object());
            }
        });
    }
}

/// A caller's trace context, in each of its headers.
pub fn trace(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (first, second) = text.split_once('\n').unwrap_or((text, "00f067aa0ba902b7"));
    let all = [
        TraceHeaders { traceparent: Some(first), ..TraceHeaders::default() },
        TraceHeaders { b3: Some(first), ..TraceHeaders::default() },
        TraceHeaders { b3_trace_id: Some(first), b3_span_id: Some(second), ..TraceHeaders::default() },
    ];
    for h in all {
        let Some(c) = TraceContext::parse(&h) else { continue };
        let told = c.to_traceparent();
        let again =
            TraceContext::parse(&TraceHeaders { traceparent: Some(&told), ..TraceHeaders::default() });
        assert_eq!(again.expect("what we write").to_traceparent(), told);
        for (_, v) in c.to_b3().into_iter().flatten() {
            assert!(v.bytes().all(|b| b.is_ascii_hexdigit()));
        }
    }
}

#[cfg(test)]
#[path = "../../../e2e/fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::{replay::corpus, *};

    #[test]
    fn corpora() {
        corpus("attributes", attributes);
        corpus("access_log", access_log);
        corpus("trace", trace);
    }
}

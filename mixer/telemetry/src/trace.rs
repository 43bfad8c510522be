//! Trace context: W3C Trace Context and B3, read, continued and passed on; and the set-up of exporters.

use std::{
    borrow::Cow,
    cell::Cell,
    fmt::Write as _,
    time::{Duration, SystemTime},
};

use opentelemetry::{
    Context, KeyValue,
    trace::{
        Span as _, SpanBuilder, SpanContext, SpanId, SpanKind, Status, TraceContextExt as _, TraceFlags,
        TraceId, TraceState, Tracer as _, TracerProvider as _,
    },
};
use opentelemetry_otlp::WithExportConfig as _;
use opentelemetry_sdk::{
    resource::{EnvResourceDetector, ResourceDetector as _},
    trace::{IdGenerator, RandomIdGenerator, SdkTracer, SdkTracerProvider},
};
use tracing_subscriber::{EnvFilter, layer::SubscriberExt as _, util::SubscriberInitExt as _};

/// The position of a request in a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    /// Trace ID, not zero.
    pub trace_id: u128,
    /// ID of the current span, not zero.
    pub span_id: u64,
    /// ID of the parent span; 0 for a root.
    pub parent_id: u64,
    /// Sampling decision; `None` has not been made.
    pub sampled: Option<bool>,
}

/// Header values that a context can be read from.
#[derive(Debug, Clone, Copy, Default)]
pub struct TraceHeaders<'a> {
    /// `traceparent`.
    pub traceparent: Option<&'a str>,
    /// `b3`.
    pub b3: Option<&'a str>,
    /// `x-b3-traceid`.
    pub b3_trace_id: Option<&'a str>,
    /// `x-b3-spanid`.
    pub b3_span_id: Option<&'a str>,
    /// `x-b3-sampled`.
    pub b3_sampled: Option<&'a str>,
    /// `x-b3-flags`.
    pub b3_flags: Option<&'a str>,
}

fn hex(s: &str, digits: &[usize]) -> Option<u128> {
    if !digits.contains(&s.len()) || !s.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(s, 16).ok()
}

fn span(s: &str) -> Option<u64> {
    hex(s, &[16]).and_then(|v| u64::try_from(v).ok()).filter(|v| *v != 0)
}

impl TraceContext {
    /// Reads the context of the caller: W3C first, then single B3, then the `x-b3-*` headers.
    #[must_use]
    pub fn parse(h: &TraceHeaders<'_>) -> Option<Self> {
        h.traceparent
            .and_then(Self::traceparent)
            .or_else(|| h.b3.and_then(Self::b3))
            .or_else(|| Self::b3_headers(h))
    }

    fn traceparent(s: &str) -> Option<Self> {
        let mut it = s.trim().split('-');
        let version = it.next().and_then(|v| hex(v, &[2]))?;
        let trace_id = it.next().and_then(|v| hex(v, &[32])).filter(|v| *v != 0)?;
        let span_id = it.next().and_then(span)?;
        let flags = it.next().and_then(|v| hex(v, &[2]))?;
        // Version 0 has exactly four parts; later versions may add some (section 3.2.4).
        if version == 0xff || (version == 0 && it.next().is_some()) {
            return None;
        }
        Some(Self { trace_id, span_id, parent_id: 0, sampled: Some(flags & 1 == 1) })
    }

    fn b3(s: &str) -> Option<Self> {
        let mut it = s.split('-');
        let first = it.next()?;
        let trace_id = hex(first, &[16, 32]).filter(|v| *v != 0)?;
        let span_id = it.next().and_then(span)?;
        let sampled = match it.next() {
            Some("1" | "d") => Some(true),
            Some("0") => Some(false),
            Some(_) => return None,
            None => None,
        };
        Some(Self { trace_id, span_id, parent_id: 0, sampled })
    }

    fn b3_headers(h: &TraceHeaders<'_>) -> Option<Self> {
        let trace_id = h.b3_trace_id.and_then(|v| hex(v, &[16, 32])).filter(|v| *v != 0)?;
        let span_id = h.b3_span_id.and_then(span)?;
        let sampled = match (h.b3_flags, h.b3_sampled) {
            (Some("1"), _) => Some(true),
            (_, Some(s)) if s == "1" || s.eq_ignore_ascii_case("true") => Some(true),
            (_, Some(s)) if s == "0" || s.eq_ignore_ascii_case("false") => Some(false),
            _ => None,
        };
        Some(Self { trace_id, span_id, parent_id: 0, sampled })
    }

    /// A span below this one.
    #[must_use]
    pub fn child(self, span_id: u64) -> Self {
        Self { parent_id: self.span_id, span_id: span_id.max(1), ..self }
    }

    /// The first span of a new trace.
    #[must_use]
    pub fn root(trace_id: u128, span_id: u64, sampled: bool) -> Self {
        Self { trace_id: trace_id.max(1), span_id: span_id.max(1), parent_id: 0, sampled: Some(sampled) }
    }

    /// `traceparent` value.
    #[must_use]
    pub fn to_traceparent(self) -> String {
        let mut s = String::with_capacity(55);
        let _ = write!(
            s,
            "00-{:032x}-{:016x}-{:02x}",
            self.trace_id,
            self.span_id,
            u8::from(self.sampled == Some(true))
        );
        s
    }

    /// `x-b3-traceid`, `x-b3-spanid`, `x-b3-parentspanid` (if there is a parent) and `x-b3-sampled` (if decided).
    #[must_use]
    pub fn to_b3(self) -> [Option<(&'static str, String)>; 4] {
        [
            Some(("x-b3-traceid", format!("{:032x}", self.trace_id))),
            Some(("x-b3-spanid", format!("{:016x}", self.span_id))),
            (self.parent_id != 0).then(|| ("x-b3-parentspanid", format!("{:016x}", self.parent_id))),
            self.sampled.map(|s| ("x-b3-sampled", if s { "1".into() } else { "0".into() })),
        ]
    }
}

thread_local! {
    /// IDs for the span that is about to be built on this thread.
    static NEXT_IDS: Cell<Option<(u128, u64)>> = const { Cell::new(None) };
}

/// Gives spans the IDs that were already written into a request's headers.
#[derive(Debug, Default)]
struct PresetIds(RandomIdGenerator);

impl IdGenerator for PresetIds {
    fn new_trace_id(&self) -> TraceId {
        NEXT_IDS
            .get()
            .map_or_else(|| self.0.new_trace_id(), |(trace, _)| TraceId::from_bytes(trace.to_be_bytes()))
    }
    fn new_span_id(&self) -> SpanId {
        NEXT_IDS
            .get()
            .map_or_else(|| self.0.new_span_id(), |(_, span)| SpanId::from_bytes(span.to_be_bytes()))
    }
}

/// Takes the spans of proxied requests.
#[derive(Debug, Clone)]
pub struct SpanSink(SdkTracer);

/// A finished hop of a request.
#[derive(Debug)]
pub struct RequestSpan {
    /// Its place in the trace, as in the headers that were forwarded.
    pub context: TraceContext,
    /// Operation.
    pub name: String,
    /// Towards the workload rather than from it.
    pub server: bool,
    /// Start.
    pub start: SystemTime,
    /// Duration.
    pub duration: Duration,
    /// Whether it counts as an error.
    pub error: bool,
    /// Attributes.
    pub attributes: Vec<(Cow<'static, str>, String)>,
}

impl SpanSink {
    /// Queues a span for export; never blocks.
    pub fn record(&self, s: RequestSpan) {
        let parent = if s.context.parent_id == 0 {
            Context::new()
        } else {
            Context::new().with_remote_span_context(SpanContext::new(
                TraceId::from_bytes(s.context.trace_id.to_be_bytes()),
                SpanId::from_bytes(s.context.parent_id.to_be_bytes()),
                TraceFlags::SAMPLED,
                true,
                TraceState::default(),
            ))
        };
        let builder = SpanBuilder::from_name(s.name)
            .with_kind(if s.server { SpanKind::Server } else { SpanKind::Client })
            .with_start_time(s.start)
            .with_attributes(s.attributes.into_iter().map(|(k, v)| KeyValue::new(k, v)));
        NEXT_IDS.set(Some((s.context.trace_id, s.context.span_id)));
        let mut span = self.0.build_with_context(builder, &parent);
        NEXT_IDS.set(None);
        if s.error {
            span.set_status(Status::error(""));
        }
        span.end_with_timestamp(s.start + s.duration);
    }
}

/// What the environment says of this process: `OTEL_RESOURCE_ATTRIBUTES`, as OpenTelemetry reads it.
#[must_use]
pub fn environment_attributes() -> Vec<(String, String)> {
    let resource = EnvResourceDetector::new().detect();
    resource.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
}

/// Tracing could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TracingError {
    /// The exporter's endpoint is not usable.
    #[error("OTLP exporter")]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
    /// Another subscriber is installed.
    #[error("a tracing subscriber is already installed")]
    Installed(#[from] tracing_subscriber::util::TryInitError),
}

/// Flushes and stops exporters when it is shut down or dropped.
#[derive(Debug, Default)]
pub struct TracingGuard(Option<SdkTracerProvider>);

impl TracingGuard {
    /// Where proxies put the spans of sampled requests; `None` without an exporter.
    #[must_use]
    pub fn spans(&self) -> Option<SpanSink> {
        self.0.as_ref().map(|p| SpanSink(p.tracer("flotilla-proxy")))
    }

    /// Sends what is left; blocks for at most a few seconds.
    pub fn shutdown(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        if let Some(p) = self.0.take()
            && let Err(error) = p.shutdown_with_timeout(Duration::from_secs(3))
        {
            tracing::debug!(%error, "trace exporter did not finish");
        }
    }
}

impl Drop for TracingGuard {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Installs the process's subscriber: logs to standard error (filter from `RUST_LOG`, else `info`; JSON with
/// `json`), and spans to an OTLP collector if one is given. Call inside a tokio runtime when exporting.
///
/// # Errors
/// A subscriber exists, or the collector's address is not usable.
pub fn init_tracing(
    service_name: &str,
    otlp_endpoint: Option<&str>,
    json: bool,
) -> Result<TracingGuard, TracingError> {
    let provider = match otlp_endpoint {
        None => None,
        Some(endpoint) => {
            let exporter = opentelemetry_otlp::SpanExporter::builder()
                .with_tonic()
                .with_endpoint(endpoint)
                .with_timeout(Duration::from_secs(5))
                .build()?;
            let resource =
                opentelemetry_sdk::Resource::builder().with_service_name(service_name.to_owned()).build();
            let provider = SdkTracerProvider::builder()
                .with_id_generator(PresetIds::default())
                .with_batch_exporter(exporter)
                .with_resource(resource);
            Some(provider.build())
        }
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let otel = provider
        .as_ref()
        .map(|p| tracing_opentelemetry::layer().with_tracer(p.tracer(service_name.to_owned())));
    let registry = tracing_subscriber::registry().with(filter).with(otel);
    if json {
        registry.with(tracing_subscriber::fmt::layer().json().with_writer(std::io::stderr)).try_init()?;
    } else {
        registry.with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr)).try_init()?;
    }
    Ok(TracingGuard(provider))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, Default)]
    struct Memory(std::sync::Arc<std::sync::Mutex<Vec<opentelemetry_sdk::trace::SpanData>>>);

    impl opentelemetry_sdk::trace::SpanExporter for Memory {
        async fn export(
            &self,
            batch: Vec<opentelemetry_sdk::trace::SpanData>,
        ) -> opentelemetry_sdk::error::OTelSdkResult {
            self.0.lock().unwrap().extend(batch);
            Ok(())
        }
    }

    #[test]
    fn spans_have_the_ids_of_the_headers() {
        let memory = Memory::default();
        let provider = SdkTracerProvider::builder()
            .with_id_generator(PresetIds::default())
            .with_simple_exporter(memory.clone())
            .build();
        let sink = SpanSink(provider.tracer("t"));
        let root = TraceContext::root(7, 8, true);
        for context in [root, root.child(9)] {
            sink.record(RequestSpan {
                context,
                name: "reviews:9080/*".into(),
                server: true,
                start: SystemTime::UNIX_EPOCH,
                duration: Duration::from_secs(1),
                error: true,
                attributes: vec![("http.status_code".into(), "503".into())],
            });
        }
        let spans = memory.0.lock().unwrap();
        let ids: Vec<_> = spans
            .iter()
            .map(|s| {
                let c = &s.span_context;
                (
                    u128::from_be_bytes(c.trace_id().to_bytes()),
                    u64::from_be_bytes(c.span_id().to_bytes()),
                    u64::from_be_bytes(s.parent_span_id.to_bytes()),
                )
            })
            .collect();
        assert_eq!(ids, [(7, 8, 0), (7, 9, 8)]);
        assert_eq!(spans[0].end_time, SystemTime::UNIX_EPOCH + Duration::from_secs(1));
    }

    #[test]
    fn w3c() {
        let p = |s| TraceContext::parse(&TraceHeaders { traceparent: Some(s), ..TraceHeaders::default() });
        let c = p("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01").unwrap();
        assert_eq!(c.sampled, Some(true));
        assert_eq!(c.to_traceparent(), "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
        let child = c.child(0xb7);
        assert_eq!(child.to_traceparent(), "00-4bf92f3577b34da6a3ce929d0e0e4736-00000000000000b7-01");
        assert!(p("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00-more").is_some());
        for bad in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert!(p(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn b3() {
        let single = |s| TraceContext::parse(&TraceHeaders { b3: Some(s), ..TraceHeaders::default() });
        assert_eq!(
            single("80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-d").unwrap().sampled,
            Some(true)
        );
        assert_eq!(single("a3ce929d0e0e4736-e457b5a2e4d86bd1").unwrap().sampled, None);
        assert!(single("0").is_none());
        let h = TraceHeaders {
            b3_trace_id: Some("a3ce929d0e0e4736"),
            b3_span_id: Some("e457b5a2e4d86bd1"),
            b3_sampled: Some("0"),
            ..TraceHeaders::default()
        };
        let c = TraceContext::parse(&h).unwrap().child(5);
        let out: Vec<_> = c.to_b3().into_iter().flatten().collect();
        assert_eq!(out[0].1, "0000000000000000a3ce929d0e0e4736");
        assert_eq!(out[2], ("x-b3-parentspanid", "e457b5a2e4d86bd1".to_owned()));
        assert_eq!(out[3].1, "0");
    }
}

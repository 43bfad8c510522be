//! Spans and log entries on their way to collectors of the mesh.
//!
//! Each worker gathers what goes to one collector and sends it as one call, soon or when there is much of it, through the
//! cluster that the configuration names: so it is balanced, encrypted and counted like any request. Nothing waits for a
//! collector. What one that is slow or away does not take is dropped, and counted.

mod logs;
mod spans;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::Method;
use mesh_model::proxy as model;
use mesh_telemetry::{
    access_log::{Format, FormatError, LogRecord},
    trace::RequestSpan,
};
use tokio::sync::Notify;

use crate::{
    config::route::SlotOf,
    http::{client, headers::Headers},
    upstream::cluster::ClusterSlot,
    wire::Writer,
    worker::{Gauge, Worker},
};

/// How long things wait for others.
const WAIT: Duration = Duration::from_secs(1);
/// With so many bytes they do not.
const MUCH: usize = 64 * 1024;
/// What more there is is dropped.
const MOST: usize = 1024 * 1024;
/// Longest answer that is read.
const MAX_ANSWER: usize = 64 * 1024;
/// Limit of a call, unless the configuration has one; a limit of zero is none that it has.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A collector as configured: what is equal shares calls.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum To {
    Spans(model::TraceProvider),
    Entries(model::GrpcLog),
    Records(model::OtlpLog),
}

/// A compiled collector.
#[derive(Debug)]
pub(crate) struct Exporter {
    to: To,
    slot: Arc<ClusterSlot>,
    /// Formats of a record's body and attributes.
    body: Option<Format>,
    attributes: Vec<(String, Format)>,
}

/// Why a collector cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExportError {
    #[error("this proxy does not speak the protocol of {0}")]
    Unsupported(&'static str),
    #[error(transparent)]
    Format(#[from] FormatError),
}

impl Exporter {
    pub(crate) fn new(to: &To, slot: SlotOf<'_>) -> Result<Self, ExportError> {
        let format = |s: &str| Format::new(&model::AccessLogFormat::Text(s.to_owned()));
        let (mut body, mut attributes) = (None, Vec::new());
        let cluster = match to {
            To::Spans(model::TraceProvider::OpenTelemetry(o)) => match &o.to {
                model::Collector::Grpc(g) => &g.cluster,
                model::Collector::Http(h) => &h.cluster,
            },
            To::Spans(model::TraceProvider::Zipkin(z)) => &z.to.cluster,
            To::Spans(model::TraceProvider::Datadog { .. }) => {
                return Err(ExportError::Unsupported("Datadog's agent"));
            }
            To::Spans(model::TraceProvider::SkyWalking(_)) => {
                return Err(ExportError::Unsupported("SkyWalking"));
            }
            To::Entries(g) => &g.service.cluster,
            To::Records(o) => {
                body = (!o.body.is_empty()).then(|| format(&o.body)).transpose()?;
                for (k, v) in &o.attributes {
                    attributes.push((k.clone(), format(v)?));
                }
                &o.service.cluster
            }
        };
        Ok(Self { slot: slot(cluster), to: to.clone(), body, attributes })
    }

    /// Takes a span.
    pub(crate) fn span(self: &Arc<Self>, worker: &Rc<Worker>, span: &RequestSpan) {
        match &self.to {
            To::Spans(model::TraceProvider::OpenTelemetry(_)) => {
                worker.exports.put(worker, self, |out| spans::otlp(span, out));
            }
            To::Spans(model::TraceProvider::Zipkin(z)) => {
                worker.exports.put(worker, self, |out| spans::zipkin(span, z, &worker.options.node, out));
            }
            _ => {}
        }
    }

    /// Takes what a request or connection was.
    pub(crate) fn log(self: &Arc<Self>, worker: &Rc<Worker>, record: &dyn LogRecord) {
        match &self.to {
            To::Entries(g) => worker.exports.put(worker, self, |out| logs::entry(record, g, out)),
            To::Records(_) => worker.exports.put(worker, self, |out| {
                logs::record(record, self.body.as_ref(), &self.attributes, out);
            }),
            To::Spans(_) => {}
        }
    }

    /// Sends what was gathered.
    async fn send(&self, worker: &Rc<Worker>, items: &[u8]) -> Result<(), String> {
        let node = &worker.options.node;
        match &self.to {
            To::Spans(model::TraceProvider::OpenTelemetry(o)) => {
                let message = spans::request(o, node, items);
                match &o.to {
                    model::Collector::Grpc(g) => self.grpc(worker, g, spans::EXPORT, message).await,
                    model::Collector::Http(h) => {
                        let body = Bytes::from(message.into_bytes());
                        self.post(worker, h, "application/x-protobuf", body).await
                    }
                }
            }
            To::Spans(model::TraceProvider::Zipkin(z)) => {
                self.post(worker, &z.to, "application/json", spans::list(items)).await
            }
            To::Spans(_) => Ok(()),
            To::Entries(g) => {
                self.grpc(worker, &g.service, logs::STREAM, logs::message(g, node, items)).await
            }
            To::Records(o) => self.grpc(worker, &o.service, logs::EXPORT, logs::request(items)).await,
        }
    }

    async fn grpc(
        &self,
        worker: &Rc<Worker>,
        service: &model::GrpcService,
        method: &str,
        message: Writer,
    ) -> Result<(), String> {
        let limit = service.timeout.filter(|t| !t.is_zero()).unwrap_or(TIMEOUT);
        let message = Bytes::from(message.framed());
        client::grpc(worker, &self.slot, service, method, &message, limit, MAX_ANSWER).await.map(drop)
    }

    async fn post(
        &self,
        worker: &Rc<Worker>,
        to: &model::HttpCollector,
        content_type: &str,
        body: Bytes,
    ) -> Result<(), String> {
        let mut h = Headers::default();
        h.push(b"content-type", content_type.as_bytes());
        for (n, v) in &to.headers {
            h.set(n.as_bytes(), v.as_bytes());
        }
        let head = client::head(Method::POST, &to.authority, &to.path, h, body.len());
        let limit = Some(to.timeout).filter(|t| !t.is_zero()).unwrap_or(TIMEOUT);
        match client::call(worker, &self.slot, &head, body, limit, MAX_ANSWER).await {
            Ok(a) if (200..300).contains(&a.status) => Ok(()),
            Ok(a) => Err(format!("HTTP status {}", a.status)),
            Err(e) => Err(e.to_string()),
        }
    }
}

/// What a worker has gathered, by collector.
#[derive(Debug, Default)]
pub(crate) struct Exports(RefCell<HashMap<usize, Rc<Queue>>>);

#[derive(Debug)]
struct Queue {
    /// Keeps the address alive that it is found by.
    exporter: Arc<Exporter>,
    items: RefCell<Vec<u8>>,
    count: Cell<u64>,
    much: Notify,
    /// A proxy that drains waits for it.
    _pending: Gauge,
}

impl Exports {
    /// Gathers one more thing, which `encode` appends.
    fn put(&self, worker: &Rc<Worker>, exporter: &Arc<Exporter>, encode: impl FnOnce(&mut Vec<u8>)) {
        let key = Arc::as_ptr(exporter) as usize;
        let queue = {
            let mut all = self.0.borrow_mut();
            Rc::clone(all.entry(key).or_insert_with(|| {
                let queue = Rc::new(Queue {
                    exporter: Arc::clone(exporter),
                    items: RefCell::default(),
                    count: Cell::new(0),
                    much: Notify::new(),
                    _pending: Gauge::of(&worker.shared.totals, |t| &t.exporting),
                });
                tokio::task::spawn_local(flush(Rc::clone(worker), key, Rc::clone(&queue)));
                queue
            }))
        };
        let mut items = queue.items.borrow_mut();
        if items.len() >= MOST {
            worker.shared.metrics.exports_dropped().inc();
            return;
        }
        encode(&mut items);
        queue.count.set(queue.count.get() + 1);
        if items.len() >= MUCH {
            queue.much.notify_one();
        }
    }
}

/// Sends what comes until nothing does.
async fn flush(worker: Rc<Worker>, key: usize, queue: Rc<Queue>) {
    loop {
        let _ = tokio::time::timeout(WAIT, queue.much.notified()).await;
        let (items, count) = (queue.items.take(), queue.count.take());
        if let Err(error) = queue.exporter.send(&worker, &items).await {
            worker.shared.metrics.exports_dropped().inc_by(count);
            tracing::debug!(cluster = %queue.exporter.slot.name, %error, count, "spans or log entries are lost");
        }
        // Nothing is put between this look and the removal: there is no await.
        if queue.items.borrow().is_empty() {
            worker.exports.0.borrow_mut().remove(&key);
            return;
        }
    }
}

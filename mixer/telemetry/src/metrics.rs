//! Istio's standard metrics, with its names and labels, so that existing dashboards work.
//!
//! A request looks its series up once for each combination of labels and connection and keeps the
//! [`RequestSeries`] handle; after that it only adds to atomics. Histograms are our own because the ones of
//! `prometheus-client` lock a mutex at each observation.

mod proc;
mod route;
mod udp;

use std::{
    fmt::Write as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use prometheus_client::{
    encoding::{
        EncodeLabelSet, EncodeLabelValue, EncodeMetric, LabelValueEncoder, MetricEncoder, NoLabelSet,
    },
    metrics::{MetricType, TypedMetric, counter::Counter, family::Family},
    registry::Registry,
};

pub use self::proc::{ProcEvent, ProcSeries};
pub use self::route::RouteSeries;
pub use self::udp::{UdpDrop, UdpEnd, UdpHop, UdpSeries};
use self::{proc::ProcMetrics, route::RouteMetrics, udp::UdpMetrics};

/// Which side of a request reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The client's proxy, or a gateway.
    Source,
    /// The server's proxy.
    Destination,
}

impl EncodeLabelValue for Reporter {
    fn encode(&self, encoder: &mut LabelValueEncoder) -> Result<(), std::fmt::Error> {
        encoder.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// Labels of `istio_requests_total` and the HTTP histograms. Unknown values are `unknown`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    /// Who reports.
    pub reporter: Reporter,
    /// Workload of the caller.
    pub source_workload: Arc<str>,
    /// Namespace of the caller.
    pub source_workload_namespace: Arc<str>,
    /// SPIFFE ID of the caller.
    pub source_principal: Arc<str>,
    /// Cluster of the caller.
    pub source_cluster: Arc<str>,
    /// Workload that served.
    pub destination_workload: Arc<str>,
    /// Namespace of the workload that served.
    pub destination_workload_namespace: Arc<str>,
    /// SPIFFE ID of the workload that served.
    pub destination_principal: Arc<str>,
    /// Host of the service.
    pub destination_service: Arc<str>,
    /// Name of the service.
    pub destination_service_name: Arc<str>,
    /// Namespace of the service.
    pub destination_service_namespace: Arc<str>,
    /// Cluster that served.
    pub destination_cluster: Arc<str>,
    /// `http` or `grpc`.
    pub request_protocol: &'static str,
    /// HTTP status; 0 without an answer.
    pub response_code: u16,
    /// gRPC status; empty without one.
    pub grpc_response_status: Arc<str>,
    /// Envoy's response flags, or `-`.
    pub response_flags: Arc<str>,
    /// `mutual_tls`, `none` or `unknown`.
    pub connection_security_policy: &'static str,
}

/// Labels of the `istio_tcp_*` counters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TcpLabels {
    /// Who reports.
    pub reporter: Reporter,
    /// Workload of the caller.
    pub source_workload: Arc<str>,
    /// Namespace of the caller.
    pub source_workload_namespace: Arc<str>,
    /// SPIFFE ID of the caller.
    pub source_principal: Arc<str>,
    /// Cluster of the caller.
    pub source_cluster: Arc<str>,
    /// Workload that served.
    pub destination_workload: Arc<str>,
    /// Namespace of the workload that served.
    pub destination_workload_namespace: Arc<str>,
    /// SPIFFE ID of the workload that served.
    pub destination_principal: Arc<str>,
    /// Host of the service.
    pub destination_service: Arc<str>,
    /// Name of the service.
    pub destination_service_name: Arc<str>,
    /// Namespace of the service.
    pub destination_service_namespace: Arc<str>,
    /// Cluster that served.
    pub destination_cluster: Arc<str>,
    /// `tcp`.
    pub request_protocol: &'static str,
    /// Envoy's response flags, or `-`.
    pub response_flags: Arc<str>,
    /// `mutual_tls`, `none` or `unknown`.
    pub connection_security_policy: &'static str,
}

/// Bounds of the histograms, Envoy's defaults: milliseconds, and bytes with the same steps.
const BOUNDS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1000.0,
    2500.0,
    5000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

/// A histogram that is only atomics.
#[derive(Debug, Clone, Default)]
pub struct AtomicHistogram(Arc<HistogramCells>);

#[derive(Debug, Default)]
struct HistogramCells {
    /// In thousandths, so that sums need no floating-point loop.
    sum_milli: AtomicU64,
    buckets: [AtomicU64; BOUNDS.len() + 1],
}

impl AtomicHistogram {
    /// Adds a value in thousandths of its unit.
    pub fn observe_milli(&self, milli: u64) {
        self.0.sum_milli.fetch_add(milli, Relaxed);
        let value = milli as f64 / 1000.0;
        let at = BOUNDS.partition_point(|b| *b < value);
        if let Some(cell) = self.0.buckets.get(at) {
            cell.fetch_add(1, Relaxed);
        }
    }

    /// Number of observations.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.buckets.iter().map(|b| b.load(Relaxed)).sum()
    }
}

impl TypedMetric for AtomicHistogram {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for AtomicHistogram {
    fn encode(&self, mut encoder: MetricEncoder) -> Result<(), std::fmt::Error> {
        let bounds = BOUNDS.iter().copied().chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(self.0.buckets.iter().map(|b| b.load(Relaxed))).collect();
        // The count is derived from the buckets that were read, or a scrape in between would be inconsistent.
        let count = buckets.iter().map(|b| b.1).sum();
        let sum = self.0.sum_milli.load(Relaxed) as f64 / 1000.0;
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

/// The standard metric families. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct MeshMetrics {
    requests: Family<RequestLabels, Counter>,
    duration: Family<RequestLabels, AtomicHistogram>,
    request_bytes: Family<RequestLabels, AtomicHistogram>,
    response_bytes: Family<RequestLabels, AtomicHistogram>,
    tcp_opened: Family<TcpLabels, Counter>,
    tcp_closed: Family<TcpLabels, Counter>,
    tcp_sent: Family<TcpLabels, Counter>,
    tcp_received: Family<TcpLabels, Counter>,
    log_lines_dropped: Counter,
    exports_dropped: Counter,
    udp: UdpMetrics,
    proc: ProcMetrics,
    route: RouteMetrics,
}

/// One combination of labels of the HTTP metrics.
#[derive(Debug, Clone)]
pub struct RequestSeries {
    total: Counter,
    duration: AtomicHistogram,
    request_bytes: AtomicHistogram,
    response_bytes: AtomicHistogram,
}

impl RequestSeries {
    /// Counts a finished request.
    pub fn observe(&self, duration: Duration, request_bytes: u64, response_bytes: u64) {
        self.total.inc();
        self.duration.observe_milli(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX));
        self.request_bytes.observe_milli(request_bytes.saturating_mul(1000));
        self.response_bytes.observe_milli(response_bytes.saturating_mul(1000));
    }
}

/// One combination of labels of the TCP metrics.
#[derive(Debug, Clone)]
pub struct TcpSeries {
    /// `istio_tcp_connections_opened_total`.
    pub opened: Counter,
    /// `istio_tcp_connections_closed_total`.
    pub closed: Counter,
    /// `istio_tcp_sent_bytes_total`: towards the client.
    pub sent: Counter,
    /// `istio_tcp_received_bytes_total`: from the client.
    pub received: Counter,
}

impl MeshMetrics {
    /// Registers the families.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let m = Self::default();
        registry.register("istio_requests", "Requests", m.requests.clone());
        registry.register("istio_request_duration_milliseconds", "Duration of requests", m.duration.clone());
        registry.register("istio_request_bytes", "Size of request bodies", m.request_bytes.clone());
        registry.register("istio_response_bytes", "Size of response bodies", m.response_bytes.clone());
        registry.register("istio_tcp_connections_opened", "TCP connections opened", m.tcp_opened.clone());
        registry.register("istio_tcp_connections_closed", "TCP connections closed", m.tcp_closed.clone());
        registry.register(
            "istio_tcp_sent_bytes",
            "Bytes to the client of a TCP connection",
            m.tcp_sent.clone(),
        );
        registry.register(
            "istio_tcp_received_bytes",
            "Bytes from the client of a TCP connection",
            m.tcp_received.clone(),
        );
        registry.register(
            "flotilla_access_log_dropped",
            "Access log lines dropped because the writer was behind",
            m.log_lines_dropped.clone(),
        );
        registry.register(
            "flotilla_exports_dropped",
            "Spans and log entries that a collector of the mesh did not take",
            m.exports_dropped.clone(),
        );
        m.udp.register(registry);
        m.proc.register(registry);
        m.route.register(registry);
        m
    }

    /// The series of a combination of labels.
    #[must_use]
    pub fn request_series(&self, l: &RequestLabels) -> RequestSeries {
        RequestSeries {
            total: self.requests.get_or_create_owned(l),
            duration: self.duration.get_or_create_owned(l),
            request_bytes: self.request_bytes.get_or_create_owned(l),
            response_bytes: self.response_bytes.get_or_create_owned(l),
        }
    }

    /// The series of a combination of labels.
    #[must_use]
    pub fn tcp_series(&self, l: &TcpLabels) -> TcpSeries {
        TcpSeries {
            opened: self.tcp_opened.get_or_create_owned(l),
            closed: self.tcp_closed.get_or_create_owned(l),
            sent: self.tcp_sent.get_or_create_owned(l),
            received: self.tcp_received.get_or_create_owned(l),
        }
    }

    /// The counters of a UDP listener's sessions to a cluster.
    #[must_use]
    pub fn udp_series(&self, stat_prefix: &str, cluster: &str) -> UdpSeries {
        self.udp.series(stat_prefix, cluster)
    }

    /// The counters of an external processor.
    #[must_use]
    pub fn proc_series(&self, stat_prefix: &str) -> ProcSeries {
        self.proc.series(stat_prefix)
    }

    /// The counters of a route that has statistics of its own.
    #[must_use]
    pub fn route_series(&self, virtual_host: &str, stat_prefix: &str) -> RouteSeries {
        self.route.series(virtual_host, stat_prefix)
    }

    /// Lines that access-log writers had to drop.
    #[must_use]
    pub fn log_lines_dropped(&self) -> &Counter {
        &self.log_lines_dropped
    }

    /// Spans and log entries that no collector took.
    #[must_use]
    pub fn exports_dropped(&self) -> &Counter {
        &self.exports_dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels() -> RequestLabels {
        let u: Arc<str> = Arc::from("unknown");
        RequestLabels {
            reporter: Reporter::Destination,
            source_workload: u.clone(),
            source_workload_namespace: u.clone(),
            source_principal: u.clone(),
            source_cluster: u.clone(),
            destination_workload: Arc::from("reviews-v1"),
            destination_workload_namespace: u.clone(),
            destination_principal: u.clone(),
            destination_service: u.clone(),
            destination_service_name: u.clone(),
            destination_service_namespace: u.clone(),
            destination_cluster: u.clone(),
            request_protocol: "http",
            response_code: 200,
            grpc_response_status: Arc::from(""),
            response_flags: Arc::from("-"),
            connection_security_policy: "mutual_tls",
        }
    }

    #[test]
    fn families_have_istios_names() {
        let mut registry = Registry::default();
        let m = MeshMetrics::register(&mut registry);
        let s = m.request_series(&labels());
        s.observe(Duration::from_micros(1500), 10, 2_000);
        s.observe(Duration::from_millis(40), 0, 0);
        let mut out = String::new();
        prometheus_client::encoding::text::encode(&mut out, &registry).unwrap();
        assert!(
            out.contains("istio_requests_total{reporter=\"destination\",source_workload=\"unknown\""),
            "{out}"
        );
        assert!(out.contains("response_code=\"200\""), "{out}");
        let line = |name: &str, le: &str| {
            out.lines()
                .find(|l| l.starts_with(name) && l.contains(le))
                .and_then(|l| l.rsplit(' ').next())
                .map(str::to_owned)
        };
        assert_eq!(line("istio_request_duration_milliseconds_bucket", "le=\"1.0\"").as_deref(), Some("0"));
        assert_eq!(line("istio_request_duration_milliseconds_bucket", "le=\"5.0\"").as_deref(), Some("1"));
        assert_eq!(line("istio_request_duration_milliseconds_bucket", "le=\"+Inf\"").as_deref(), Some("2"));
        assert_eq!(line("istio_request_duration_milliseconds_count", "").as_deref(), Some("2"));
        assert_eq!(line("istio_request_duration_milliseconds_sum", "").as_deref(), Some("41.5"));
    }
}

//! What is noted about a request or TCP connection: for the access log, metrics and reports.

use std::{
    borrow::Cow,
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use mesh_model::proxy::Direction;
use mesh_telemetry::{
    access_log::{Field, LogRecord},
    metrics::{Reporter, RequestLabels, RequestSeries, RouteSeries, TcpLabels, TcpSeries},
    trace::{RequestSpan, TraceContext},
};

use prometheus_client::metrics::counter::Counter;

use super::{
    headers::{HeaderId, Headers},
    message::{RequestHead, ResponseHead},
    metadata::Metadata,
};
use crate::{
    config::listener::{AccessLog, HttpManager},
    options::{HeaderLookup, RequestAttributes, RequestRecord},
    upstream::{
        cluster::{ClusterSlot, ServiceName},
        host::Host,
    },
    worker::{Worker, connection::Connection},
};

macro_rules! flags {
    ($($id:ident = $name:literal,)*) => {
        /// Envoy's response flags.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub(crate) enum Flag { $($id,)* }
        const FLAGS: &[(Flag, &str)] = &[$((Flag::$id, $name),)*];
    };
}

flags! {
    Uh = "UH",
    Uf = "UF",
    Uo = "UO",
    Nr = "NR",
    Urx = "URX",
    Nc = "NC",
    Dt = "DT",
    Dc = "DC",
    Lr = "LR",
    Ur = "UR",
    Uc = "UC",
    Di = "DI",
    Fi = "FI",
    Rl = "RL",
    Rlse = "RLSE",
    Uaex = "UAEX",
    Si = "SI",
    Dpe = "DPE",
    Upe = "UPE",
    Ut = "UT",
    Om = "OM",
    Df = "DF",
}

/// Series remembered by a connection.
const CACHED_SERIES: usize = 8;
/// Hosts that clients of an inbound listener may turn into metric labels.
const MAX_SERVICES: usize = 128;

/// A service as the worker's table has it: others with its names are not the same.
#[derive(Debug, Clone)]
struct Same(Rc<ServiceName>);

impl PartialEq for Same {
    fn eq(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Same {}

/// What distinguishes the metric series of one connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SeriesKey {
    cluster: u64,
    service: Same,
    host: u64,
    status: u16,
    grpc: Option<u32>,
    flags: u32,
    is_grpc: bool,
}

/// A request.
pub(crate) struct Record {
    pub(crate) started: Instant,
    started_at: SystemTime,
    pub(crate) status: u16,
    flags: u32,
    pub(crate) details: Cow<'static, str>,
    pub(crate) transport_failure: String,
    pub(crate) route: Option<Arc<str>>,
    pub(crate) service: Option<Arc<str>>,
    pub(crate) cluster: Option<Arc<ClusterSlot>>,
    pub(crate) host: Option<Arc<Host>>,
    pub(crate) peer: Option<Arc<str>>,
    pub(crate) attempts: u32,
    pub(crate) bytes_received: u64,
    pub(crate) bytes_sent: u64,
    pub(crate) response: Option<ResponseHead>,
    pub(crate) trailers: Option<Headers>,
    pub(crate) grpc_status: Option<u32>,
    pub(crate) is_grpc: bool,
    pub(crate) remote: IpAddr,
    pub(crate) trace: Option<TraceContext>,
    /// What its route is called in traces, if it is in one.
    pub(crate) operation: Option<Arc<str>>,
    pub(crate) first_byte: Option<Instant>,
    /// Counters of the route, if it has some of its own.
    pub(crate) counted: Option<Arc<RouteSeries>>,
    /// What filters found out; most requests have none.
    pub(crate) metadata: Option<Box<Metadata>>,
}

impl Record {
    pub(crate) fn new(conn: &Connection, head: Option<&RequestHead>) -> Self {
        Self {
            started: Instant::now(),
            started_at: SystemTime::now(),
            status: 0,
            flags: 0,
            details: Cow::Borrowed(""),
            transport_failure: String::new(),
            route: None,
            counted: None,
            service: None,
            cluster: None,
            host: None,
            peer: None,
            attempts: 0,
            bytes_received: 0,
            bytes_sent: 0,
            response: None,
            trailers: None,
            grpc_status: None,
            is_grpc: head.is_some_and(RequestHead::is_grpc),
            remote: conn.peer.ip(),
            trace: None,
            operation: None,
            first_byte: None,
            metadata: None,
        }
    }

    pub(crate) fn flag(&mut self, f: Flag) {
        self.flags |= 1 << f as u8;
    }

    fn flags_text(&self) -> Cow<'static, str> {
        flags_text(self.flags)
    }

    /// Logs, counts and reports the finished request.
    pub(crate) fn finish(mut self, conn: &Connection, manager: &HttpManager, head: &RequestHead) {
        if self.is_grpc && self.grpc_status.is_none() {
            let status = |h: &Headers| h.str_id(HeaderId::GrpcStatus).and_then(|v| v.parse().ok());
            self.grpc_status = self
                .trailers
                .as_ref()
                .and_then(status)
                .or_else(|| self.response.as_ref().and_then(|r| status(&r.headers)));
        }
        if self.details.is_empty() {
            self.details = Cow::Borrowed("via_upstream");
        }
        let duration = self.started.elapsed();
        let service = self.destination_service(conn, head);
        self.series(conn, &service).observe(duration, self.bytes_received, self.bytes_sent);
        if let Some(c) = &self.counted {
            c.count(self.status);
        }
        if !manager.logs.is_empty() {
            let line = RequestLine { record: &self, conn, head: Some(head), duration };
            for log in &manager.logs {
                log.write(&conn.worker, &line);
            }
        }
        self.span(conn, manager, head, duration);
        if let Some(policy) = conn.worker.shared.hooks.policy.as_ref().filter(|p| p.reports()) {
            let attributes = attributes(conn, head, &service.host, self.is_grpc);
            policy.report(&RequestRecord {
                request: Some(&attributes),
                response_headers: self.response.as_ref().map(|r| &r.headers as &dyn HeaderLookup),
                status: self.status,
                grpc_status: self.grpc_status,
                flags: &self.flags_text(),
                duration,
                request_bytes: self.bytes_received,
                response_bytes: self.bytes_sent,
                upstream: self.host.as_ref().map_or("", |h| &h.display),
                source_principal: conn.principal(),
                source_ip: conn.peer.ip(),
                destination_service: &service.host,
                inbound: conn.inbound(),
            });
        }
    }

    fn span(&self, conn: &Connection, manager: &HttpManager, head: &RequestHead, duration: Duration) {
        let (Some(context), Some(tracing)) = (self.trace, &manager.tracing) else { return };
        let own = conn.worker.shared.hooks.spans.as_ref();
        if context.sampled != Some(true) || (tracing.to.is_none() && own.is_none()) {
            return;
        }
        // Of what enters a workload, its caller's proxy may have said it already.
        let said = head.headers.str_id(HeaderId::XEnvoyDecoratorOperation);
        let operation = said.or(self.operation.as_deref()).unwrap_or(&head.authority);
        let node = &conn.worker.options.node;
        let scheme = if head.https { "https" } else { "http" };
        let path = head.headers.str_id(HeaderId::XEnvoyOriginalPath).unwrap_or(&head.path);
        let path = &path[..path.floor_char_boundary(tracing.config.max_path as usize)];
        let header = |id| head.headers.str_id(id).unwrap_or_default().to_owned();
        let mut attributes: Vec<(Cow<'static, str>, String)> = [
            ("component", "proxy".to_owned()),
            ("http.method", head.method.as_str().to_owned()),
            ("http.url", format!("{scheme}://{}{path}", head.authority)),
            ("http.protocol", head.version.as_str().to_owned()),
            ("http.status_code", self.status.to_string()),
            ("user_agent", header(HeaderId::UserAgent)),
            ("peer.address", self.remote.to_string()),
            ("request_size", self.bytes_received.to_string()),
            ("response_size", self.bytes_sent.to_string()),
            ("response_flags", self.flags_text().into_owned()),
            ("upstream_cluster", self.cluster.as_ref().map_or_else(String::new, |c| c.name.to_string())),
            ("guid:x-request-id", header(HeaderId::XRequestId)),
            ("node_id", node.id.clone()),
        ]
        .map(|(k, v)| (Cow::Borrowed(k), v))
        .into();
        let error = self.status >= 500 || self.status == 0 || self.grpc_status.is_some_and(|s| s != 0);
        if error {
            attributes.push((Cow::Borrowed("error"), "true".to_owned()));
        }
        attributes.extend(tracing.tags(head, node).map(|(k, v)| (Cow::Owned(k), v)));
        let span = RequestSpan {
            context,
            name: operation.to_owned(),
            server: conn.inbound(),
            start: self.started_at,
            duration,
            error,
            attributes,
        };
        match (&tracing.to, own) {
            (Some(to), _) => to.span(&conn.worker, &span),
            (None, Some(own)) => own.record(span),
            (None, None) => {}
        }
    }

    /// Logs a request that could not even be read.
    pub(crate) fn finish_unread(self, conn: &Connection, manager: &HttpManager) {
        let line = RequestLine { record: &self, conn, head: None, duration: self.started.elapsed() };
        for log in &manager.logs {
            log.write(&conn.worker, &line);
        }
    }

    /// The service of a request: of the cluster, of the route's virtual host, or inbound what the client called it.
    pub(crate) fn destination_service(&self, conn: &Connection, head: &RequestHead) -> Rc<ServiceName> {
        let unknown = &conn.worker.shared.labels.unknown;
        if let Some(c) = &self.cluster
            && !c.service.host.is_empty()
        {
            return c.with_namespace(|ns| named(conn, &c.service.host, ns, unknown));
        }
        if let Some(s) = &self.service {
            return named(conn, s, "", unknown);
        }
        let host = head.authority.rsplit_once(':').map_or(head.authority.as_str(), |(h, _)| h);
        named(conn, host, "", unknown)
    }

    fn series(&self, conn: &Connection, service: &Rc<ServiceName>) -> RequestSeries {
        let key = SeriesKey {
            cluster: self.cluster.as_ref().map_or(0, |c| c.id),
            service: Same(Rc::clone(service)),
            host: self.host.as_ref().map_or(0, |h| h.stats.id),
            status: self.status,
            grpc: self.grpc_status,
            flags: self.flags,
            is_grpc: self.is_grpc,
        };
        let mut cache = conn.series.borrow_mut();
        if let Some(at) = cache.iter().position(|(k, _)| *k == key) {
            if at > 0 {
                cache.swap(0, at);
            }
            return cache[0].1.clone();
        }
        let series = conn.worker.shared.metrics.request_series(&self.labels(conn, service));
        cache.insert(0, (key, series.clone()));
        cache.truncate(CACHED_SERIES);
        series
    }

    fn labels(&self, conn: &Connection, service: &ServiceName) -> RequestLabels {
        let s = sides(conn, self.host.as_deref(), self.peer.as_ref());
        RequestLabels {
            reporter: s.reporter,
            source_workload: s.source_workload,
            source_workload_namespace: s.source_namespace,
            source_principal: s.source_principal,
            source_cluster: s.source_cluster,
            destination_workload: s.destination_workload,
            destination_workload_namespace: s.destination_namespace,
            destination_principal: s.destination_principal,
            destination_service: Arc::clone(&service.host),
            destination_service_name: Arc::clone(&service.name),
            destination_service_namespace: Arc::clone(&service.namespace),
            destination_cluster: s.destination_cluster,
            request_protocol: if self.is_grpc { "grpc" } else { "http" },
            response_code: self.status,
            grpc_response_status: self
                .grpc_status
                .map_or_else(|| Arc::from(""), |s| Arc::from(s.to_string())),
            response_flags: Arc::from(&*self.flags_text()),
            connection_security_policy: s.security,
        }
    }
}

fn flags_text(bits: u32) -> Cow<'static, str> {
    if bits == 0 {
        return Cow::Borrowed("-");
    }
    let mut out = String::new();
    for (f, name) in FLAGS {
        if bits & (1 << *f as u8) != 0 {
            if !out.is_empty() {
                out.push(',');
            }
            out.push_str(name);
        }
    }
    Cow::Owned(out)
}

/// A service by host, from a table of the worker: strangers choose hosts, so the table is bounded and what does
/// not fit is `unknown`. What is not said by the host is said by `namespace`, unless it is empty; inbound it is then the
/// workload's.
fn named(conn: &Connection, host: &str, namespace: &str, unknown: &Arc<str>) -> Rc<ServiceName> {
    let mut table = conn.worker.services.borrow_mut();
    if let Some(s) = table.get(host)
        && (namespace.is_empty() || *s.namespace == *namespace)
    {
        return Rc::clone(s);
    }
    let known = conn.outbound() || table.len() < MAX_SERVICES;
    let mut s = if known && !host.is_empty() {
        ServiceName::of_host(host)
    } else {
        ServiceName { host: Arc::clone(unknown), name: Arc::clone(unknown), namespace: Arc::clone(unknown) }
    };
    if s.namespace.is_empty() {
        s.namespace = match namespace {
            "" if conn.outbound() => Arc::clone(unknown),
            "" => Arc::clone(&conn.worker.shared.labels.namespace),
            told => Arc::from(told),
        };
    }
    let s = Rc::new(s);
    if table.len() < 16 * MAX_SERVICES {
        table.insert(if known { host.to_owned() } else { String::new() }, Rc::clone(&s));
    }
    s
}

/// Labels of both sides.
struct Sides {
    reporter: Reporter,
    source_workload: Arc<str>,
    source_namespace: Arc<str>,
    source_principal: Arc<str>,
    source_cluster: Arc<str>,
    destination_workload: Arc<str>,
    destination_namespace: Arc<str>,
    destination_principal: Arc<str>,
    destination_cluster: Arc<str>,
    security: &'static str,
}

fn sides(conn: &Connection, host: Option<&Host>, peer: Option<&Arc<str>>) -> Sides {
    let node = &conn.worker.shared.labels;
    let or = |s: Option<&Arc<str>>| {
        s.filter(|s| !s.is_empty()).map_or_else(|| Arc::clone(&node.unknown), Arc::clone)
    };
    if conn.listener.model.direction == Direction::Inbound {
        return Sides {
            reporter: Reporter::Destination,
            source_workload: Arc::clone(&conn.source.workload),
            source_namespace: Arc::clone(&conn.source.namespace),
            source_principal: Arc::clone(&conn.source.principal),
            source_cluster: Arc::clone(&conn.source.cluster),
            destination_workload: Arc::clone(&node.workload),
            destination_namespace: Arc::clone(&node.namespace),
            destination_principal: if conn.mtls() {
                Arc::clone(&node.principal)
            } else {
                Arc::clone(&node.unknown)
            },
            destination_cluster: Arc::clone(&node.cluster),
            security: if conn.mtls() { "mutual_tls" } else { "none" },
        };
    }
    Sides {
        reporter: Reporter::Source,
        source_workload: Arc::clone(&node.workload),
        source_namespace: Arc::clone(&node.namespace),
        source_principal: if peer.is_some() {
            Arc::clone(&node.principal)
        } else {
            Arc::clone(&node.unknown)
        },
        source_cluster: Arc::clone(&node.cluster),
        destination_workload: or(host.map(|h| &h.workload.name)),
        destination_namespace: or(host.map(|h| &h.workload.namespace)),
        destination_principal: or(peer),
        destination_cluster: or(host.map(|h| &h.workload.cluster)),
        security: "unknown",
    }
}

/// A request as hooks see it.
pub(crate) fn attributes<'a>(
    conn: &'a Connection,
    head: &'a RequestHead,
    service: &'a str,
    grpc: bool,
) -> RequestAttributes<'a> {
    RequestAttributes {
        method: head.method.as_str(),
        path: &head.path,
        authority: &head.authority,
        scheme: if head.https { "https" } else { "http" },
        headers: &head.headers,
        source_principal: conn.principal(),
        source_cluster: conn.peer_cluster(),
        source_ip: conn.peer.ip(),
        source_port: conn.peer.port(),
        destination_ip: conn.local.ip(),
        destination_port: conn.local.port(),
        destination_service: service,
        inbound: conn.inbound(),
        mtls: conn.mtls(),
        protocol: if grpc { "grpc" } else { "http" },
    }
}

struct RequestLine<'a> {
    record: &'a Record,
    conn: &'a Connection,
    head: Option<&'a RequestHead>,
    duration: Duration,
}

fn text(s: &str, out: &mut String) -> bool {
    out.push_str(s);
    !s.is_empty()
}

fn bytes(v: Option<&[u8]>, out: &mut String) -> bool {
    match v {
        Some(v) => {
            out.push_str(&String::from_utf8_lossy(v));
            true
        }
        None => false,
    }
}

fn number(n: impl std::fmt::Display, out: &mut String) -> bool {
    let _ = write!(out, "{n}");
    true
}

fn connection_field(f: Field, conn: &Connection, out: &mut String) -> bool {
    match f {
        Field::DownstreamLocalAddress => number(conn.local, out),
        Field::DownstreamLocalPort => number(conn.local.port(), out),
        Field::DownstreamDirectRemoteAddress => number(conn.direct_peer, out),
        Field::DownstreamPeerUriSan => {
            text(&conn.identity.as_ref().map(|i| i.uri_sans.join(",")).unwrap_or_default(), out)
        }
        Field::DownstreamPeerSubject => text(conn.identity.as_ref().map_or("", |i| &i.subject), out),
        Field::RequestedServerName => text(conn.sni.as_deref().unwrap_or_default(), out),
        Field::Hostname => text(&conn.worker.options.node.workload, out),
        Field::FilterChainName => text(&conn.chain.model.name, out),
        _ => false,
    }
}

impl LogRecord for RequestLine<'_> {
    fn start(&self) -> SystemTime {
        self.record.started_at
    }

    fn field(&self, field: Field, out: &mut String) -> bool {
        let r = self.record;
        match field {
            Field::Protocol => text(self.head.map_or("", |h| h.version.as_str()), out),
            Field::ResponseCode => number(r.status, out),
            Field::ResponseCodeDetails => text(&r.details, out),
            Field::ResponseFlags => text(&r.flags_text(), out),
            Field::UpstreamTransportFailureReason => text(&r.transport_failure, out),
            Field::BytesReceived => number(r.bytes_received, out),
            Field::BytesSent => number(r.bytes_sent, out),
            Field::Duration => number(self.duration.as_millis(), out),
            Field::ResponseDuration => match r.first_byte {
                Some(t) => number(t.duration_since(r.started).as_millis(), out),
                None => false,
            },
            Field::UpstreamHost => text(r.host.as_ref().map_or("", |h| &h.display), out),
            Field::UpstreamCluster => text(r.cluster.as_ref().map_or("", |c| &c.name), out),
            Field::UpstreamRequestAttemptCount => number(r.attempts, out),
            Field::DownstreamRemoteAddress => number(
                SocketAddr::new(
                    r.remote,
                    if r.remote == self.conn.peer.ip() { self.conn.peer.port() } else { 0 },
                ),
                out,
            ),
            Field::DownstreamRemoteAddressWithoutPort => number(r.remote, out),
            Field::RouteName => text(r.route.as_deref().unwrap_or_default(), out),
            Field::GrpcStatus => match r.grpc_status {
                Some(s) => number(s, out),
                None => false,
            },
            Field::TraceId => match r.trace {
                Some(t) => {
                    let _ = write!(out, "{:032x}", t.trace_id);
                    true
                }
                None => false,
            },
            other => connection_field(other, self.conn, out),
        }
    }

    fn request_header(&self, name: &str, out: &mut String) -> bool {
        let Some(head) = self.head else { return false };
        match crate::matcher::header_value(head, name.as_bytes()) {
            Some(v) => bytes(Some(&v), out),
            None => false,
        }
    }

    fn response_header(&self, name: &str, out: &mut String) -> bool {
        bytes(self.record.response.as_ref().and_then(|r| r.headers.get(name.as_bytes())), out)
    }

    fn response_trailer(&self, name: &str, out: &mut String) -> bool {
        bytes(self.record.trailers.as_ref().and_then(|t| t.get(name.as_bytes())), out)
    }

    fn metadata(&self, namespace: &str, keys: &[String], out: &mut String) -> bool {
        self.record.metadata.as_deref().is_some_and(|m| found(m, namespace, keys, out))
    }
}

/// Writes what filters found out; false if that is nothing.
fn found(m: &Metadata, namespace: &str, keys: &[String], out: &mut String) -> bool {
    let found = match keys {
        // A namespace as a whole is an object.
        [] => {
            let own = m.iter().filter(|(n, ..)| *n == namespace);
            Some(serde_json::Value::Object(own.map(|(_, k, v)| (k.to_owned(), v.clone())).collect()))
        }
        keys => m.get(namespace, keys).cloned(),
    };
    match found {
        Some(serde_json::Value::String(s)) => text(&s, out),
        Some(v) if v.as_object().is_none_or(|o| !o.is_empty()) => text(&v.to_string(), out),
        _ => false,
    }
}

/// A TCP connection.
pub(crate) struct TcpRecord {
    conn: Option<Rc<Connection>>,
    peer: SocketAddr,
    local: SocketAddr,
    sni: String,
    started: Instant,
    started_at: SystemTime,
    series: Option<TcpSeries>,
    /// The request that opened a tunnel, for logs.
    pub(crate) request: Option<Box<RequestHead>>,
    /// What it was answered; 0 without one.
    pub(crate) status: u16,
    /// SPIFFE ID of the server, where it is known without looking.
    pub(crate) principal: Option<Arc<str>>,
    pub(crate) cluster: Option<Arc<ClusterSlot>>,
    pub(crate) host: Option<Arc<Host>>,
    /// Hosts that were tried.
    pub(crate) attempts: u32,
    pub(crate) received: u64,
    pub(crate) sent: u64,
    pub(crate) flags: &'static str,
    pub(crate) details: String,
}

impl TcpRecord {
    pub(crate) fn new(conn: &Rc<Connection>) -> Self {
        Self {
            conn: Some(Rc::clone(conn)),
            peer: conn.peer,
            local: conn.local,
            sni: conn.sni.clone().unwrap_or_default(),
            started: conn.started,
            started_at: conn.started_at,
            series: None,
            request: None,
            status: 0,
            principal: None,
            cluster: None,
            host: None,
            attempts: 0,
            received: 0,
            sent: 0,
            flags: "-",
            details: String::new(),
        }
    }

    /// A connection that no filter chain served.
    pub(crate) fn refused(
        peer: SocketAddr,
        local: SocketAddr,
        sni: Option<&str>,
        flags: &'static str,
    ) -> Self {
        Self {
            conn: None,
            peer,
            local,
            sni: sni.unwrap_or_default().to_owned(),
            started: Instant::now(),
            started_at: SystemTime::now(),
            series: None,
            request: None,
            status: 0,
            principal: None,
            cluster: None,
            host: None,
            attempts: 0,
            received: 0,
            sent: 0,
            flags,
            details: String::new(),
        }
    }

    /// The upstream connection is there: counts the connection as opened.
    pub(crate) fn opened(&mut self) {
        if let Some(s) = self.find_series() {
            s.opened.inc();
            self.series = Some(s);
        }
    }

    /// Counters of bytes from and to the client.
    pub(crate) fn counters(&self) -> (Option<Counter>, Option<Counter>) {
        (self.series.as_ref().map(|s| s.received.clone()), self.series.as_ref().map(|s| s.sent.clone()))
    }

    fn find_series(&self) -> Option<TcpSeries> {
        let conn = self.conn.as_ref()?;
        let s = sides(conn, self.host.as_deref(), self.principal.as_ref());
        let unknown = &conn.worker.shared.labels.unknown;
        let service = match &self.cluster {
            Some(c) => c.with_namespace(|ns| named(conn, &c.service.host, ns, unknown)),
            None => named(conn, "", "", unknown),
        };
        Some(conn.worker.shared.metrics.tcp_series(&TcpLabels {
            reporter: s.reporter,
            source_workload: s.source_workload,
            source_workload_namespace: s.source_namespace,
            source_principal: s.source_principal,
            source_cluster: s.source_cluster,
            destination_workload: s.destination_workload,
            destination_workload_namespace: s.destination_namespace,
            destination_principal: s.destination_principal,
            destination_service: Arc::clone(&service.host),
            destination_service_name: Arc::clone(&service.name),
            destination_service_namespace: Arc::clone(&service.namespace),
            destination_cluster: s.destination_cluster,
            request_protocol: "tcp",
            response_flags: Arc::from("-"),
            connection_security_policy: s.security,
        }))
    }

    /// Begins later than its connection.
    pub(crate) fn starts_now(&mut self) {
        self.started = Instant::now();
        self.started_at = SystemTime::now();
    }

    /// A tunnel that is not opened.
    pub(crate) fn refuse(&mut self, status: u16, flags: &'static str, details: String) {
        self.status = status;
        self.flags = flags;
        self.details = details;
    }

    /// Counts and logs the finished connection.
    pub(crate) fn finish(self, logs: &[AccessLog]) {
        if let Some(s) = &self.series {
            s.closed.inc();
        }
        if let Some(conn) = &self.conn
            && let Some(policy) = conn.worker.shared.hooks.policy.as_ref().filter(|p| p.reports())
        {
            policy.report(&RequestRecord {
                request: None,
                response_headers: None,
                status: 0,
                grpc_status: None,
                flags: self.flags,
                duration: self.started.elapsed(),
                request_bytes: self.received,
                response_bytes: self.sent,
                upstream: self.host.as_ref().map_or("", |h| &h.display),
                source_principal: conn.principal(),
                source_ip: conn.peer.ip(),
                destination_service: self.cluster.as_ref().map_or("", |c| &c.service.host),
                inbound: conn.inbound(),
            });
        }
        if let Some(conn) = &self.conn {
            self.log(&conn.worker, logs);
        }
    }

    pub(crate) fn log(&self, worker: &Rc<Worker>, logs: &[AccessLog]) {
        for log in logs {
            log.write(worker, self);
        }
    }
}

impl LogRecord for TcpRecord {
    fn start(&self) -> SystemTime {
        self.started_at
    }

    fn field(&self, field: Field, out: &mut String) -> bool {
        match field {
            Field::ResponseCode => number(self.status, out),
            Field::Protocol => text(self.request.as_ref().map_or("", |h| h.version.as_str()), out),
            Field::ResponseFlags => text(self.flags, out),
            Field::ConnectionTerminationDetails => text(&self.details, out),
            Field::UpstreamTransportFailureReason if self.flags == "UF" => text(&self.details, out),
            Field::BytesReceived => number(self.received, out),
            Field::BytesSent => number(self.sent, out),
            Field::Duration => number(self.started.elapsed().as_millis(), out),
            Field::UpstreamHost => text(self.host.as_ref().map_or("", |h| &h.display), out),
            Field::UpstreamCluster => text(self.cluster.as_ref().map_or("", |c| &c.name), out),
            Field::UpstreamRequestAttemptCount if self.attempts > 0 => number(self.attempts, out),
            Field::DownstreamRemoteAddress => number(self.peer, out),
            Field::DownstreamRemoteAddressWithoutPort => number(self.peer.ip(), out),
            Field::DownstreamLocalAddress => number(self.local, out),
            Field::RequestedServerName => text(&self.sni, out),
            other => self.conn.as_ref().is_some_and(|c| connection_field(other, c, out)),
        }
    }

    fn request_header(&self, name: &str, out: &mut String) -> bool {
        let Some(head) = &self.request else { return false };
        crate::matcher::header_value(head, name.as_bytes()).is_some_and(|v| bytes(Some(&v), out))
    }
    fn response_header(&self, _: &str, _: &mut String) -> bool {
        false
    }
    fn response_trailer(&self, _: &str, _: &mut String) -> bool {
        false
    }

    fn metadata(&self, namespace: &str, keys: &[String], out: &mut String) -> bool {
        let of = self.conn.as_ref().and_then(|c| c.found.get());
        of.is_some_and(|m| found(m, namespace, keys, out))
    }
}

//! Listeners and filter chains, compiled, and the choice of a chain.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

use arc_swap::{ArcSwap, ArcSwapOption};
use ipnet::IpNet;
use mesh_identity::{IdentityError, SecretStore};
use mesh_model::proxy as model;
use mesh_telemetry::{
    access_log::{Format, LogRecord, LogSink},
    metrics::{MeshMetrics, UdpSeries},
};
use tokio_util::sync::CancellationToken;

use super::{
    CompileError, RouteSlot,
    route::{RouteTable, SlotOf},
};
use crate::{
    export::{Exporter, To},
    http::{
        filters::{
            compressor::Compressor,
            ext_authz::{ExtAuthz, connection::ConnectionAuthz},
            ext_proc::ExtProc,
            jwt::JwtAuthn,
            rate_limit::{
                bucket::Bucket,
                global::GlobalRateLimit,
                local::{self, LocalRateLimit},
            },
        },
        message::RequestHead,
    },
    options::NodeInfo,
    rbac::Rbac,
    tunnel::client::ConnectRequest,
    upstream::cluster::ClusterSlot,
    worker::Worker,
};

/// A listener that may be replaced in place while its sockets stay.
#[derive(Debug)]
pub(crate) struct ListenerSlot {
    pub(crate) name: String,
    pub(crate) current: ArcSwap<Listener>,
}

/// A compiled [`model::Listener`].
#[derive(Debug)]
pub(crate) struct Listener {
    pub(crate) model: Arc<model::Listener>,
    chains: Vec<Arc<Chain>>,
    default: Option<Arc<Chain>>,
    /// Positions in `chains` by destination port; chains without a port under `None`.
    by_port: HashMap<Option<u16>, Vec<usize>>,
    pub(crate) logs: Vec<AccessLog>,
    /// Connections that it has, those of its former versions included.
    open: Arc<AtomicU32>,
    /// Takes datagrams.
    pub(crate) udp: Option<Arc<UdpProxy>>,
}

/// A connection's place in a listener.
#[derive(Debug)]
pub(crate) struct ListenerPlace(Arc<AtomicU32>);

impl Drop for ListenerPlace {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// A compiled filter chain. It lives for as long as its connections.
#[derive(Debug)]
pub(crate) struct Chain {
    pub(crate) model: model::FilterChain,
    tls: Option<DownstreamTls>,
    /// Who is asked about a connection, in order.
    pub(crate) guards: Vec<Guard>,
    /// Each must have a token for a connection.
    pub(crate) limits: Vec<Bucket>,
    /// The SNI names the cluster.
    pub(crate) sni_cluster: bool,
    pub(crate) terminal: Terminal,
    /// Connections should end when they can.
    pub(crate) drain: CancellationToken,
    /// Connections end now.
    pub(crate) kill: CancellationToken,
}

/// A network filter that lets a connection pass or not.
#[derive(Debug)]
pub(crate) enum Guard {
    Rbac(Box<Rbac>),
    Authz(Box<ConnectionAuthz>),
}

#[derive(Debug)]
pub(crate) enum Terminal {
    Http(Arc<HttpManager>),
    Tcp(Box<TcpProxy>),
    Udp(Arc<UdpProxy>),
}

impl Terminal {
    /// Logs of what passes.
    pub(crate) fn logs(&self) -> &[AccessLog] {
        match self {
            Self::Http(h) => &h.logs,
            Self::Tcp(t) => &t.logs,
            Self::Udp(u) => &u.logs,
        }
    }
}

/// What a listener takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takes {
    Tcp,
    Quic,
    /// Datagrams of connections of QUIC that it does not end.
    Passing,
}

/// A compiled HTTP connection manager.
#[derive(Debug)]
pub(crate) struct HttpManager {
    pub(crate) config: model::HttpConnectionManager,
    routes: Routes,
    pub(crate) filters: Vec<HttpFilter>,
    /// Some filter looks at bodies.
    pub(crate) bodies: bool,
    /// Some filter asks for virtual hosts.
    pub(crate) on_demand: bool,
    pub(crate) logs: Vec<AccessLog>,
    pub(crate) tracing: Option<Box<Tracing>>,
}

#[derive(Debug)]
enum Routes {
    Slot(Arc<RouteSlot>),
    Inline(Arc<RouteTable>),
}

#[derive(Debug)]
pub(crate) enum HttpFilter {
    Rbac(Box<Rbac>),
    Jwt(Box<JwtAuthn>),
    ExtAuthz(Box<ExtAuthz>),
    ExtProc(Arc<ExtProc>),
    LocalRateLimit(Box<LocalRateLimit>),
    RateLimit(Box<GlobalRateLimit>),
    GrpcWeb,
    Compressor(Arc<Compressor>),
    Buffer(u32),
    StatefulSession(Arc<model::StatefulSession>),
    OnDemand(Option<model::OnDemandCluster>),
    Cors,
    Fault,
    GrpcStats,
    /// Names are resolved where a host is picked.
    Names,
}

impl HttpFilter {
    /// Whether the filter reads request bodies or changes answers.
    fn wants_bodies(&self) -> bool {
        match self {
            Self::ExtAuthz(e) => e.wants_bodies(),
            Self::ExtProc(_) | Self::GrpcWeb | Self::Compressor(_) | Self::Buffer(_) => true,
            _ => false,
        }
    }
}

/// A compiled TCP proxy.
#[derive(Debug)]
pub(crate) struct TcpProxy {
    pub(crate) config: model::TcpProxy,
    clusters: Vec<(Arc<ClusterSlot>, u64)>,
    total: u64,
    pub(crate) logs: Vec<AccessLog>,
    /// Connections go out as streams of a shared one.
    pub(crate) tunnel: Option<ConnectRequest>,
}

/// A compiled UDP proxy.
#[derive(Debug)]
pub(crate) struct UdpProxy {
    pub(crate) config: model::UdpProxy,
    pub(crate) cluster: Arc<ClusterSlot>,
    pub(crate) logs: Vec<AccessLog>,
    series: OnceLock<Arc<UdpSeries>>,
}

/// Where access is logged.
#[derive(Debug, Clone)]
pub(crate) enum AccessLog {
    /// A log with its format.
    File(Arc<Format>, Arc<LogSink>),
    /// A collector.
    Export(Arc<Exporter>),
}

impl AccessLog {
    pub(crate) fn write(&self, worker: &Rc<Worker>, record: &dyn LogRecord) {
        match self {
            Self::File(format, sink) => format.render(record, |line| sink.write(line)),
            Self::Export(to) => to.log(worker, record),
        }
    }
}

/// How spans of a connection manager are made.
#[derive(Debug)]
pub(crate) struct Tracing {
    pub(crate) config: model::Tracing,
    /// Where they go, if not where the process was told at its start.
    pub(crate) to: Option<Arc<Exporter>>,
    /// Tags that are the same for all requests.
    fixed: Vec<(String, String)>,
}

impl Tracing {
    fn new(t: &model::Tracing, names: &mut Names<'_>) -> Result<Self, CompileError> {
        let to = match &t.provider {
            Some(p) => Some((names.export)(&To::Spans(p.clone()), names.cluster)?),
            None => None,
        };
        let fixed = t.tags.iter().filter_map(|(name, value)| {
            let value = match value {
                model::TagValue::Literal(s) => s.clone(),
                model::TagValue::Environment { name, default } => {
                    std::env::var(name).ok().filter(|v| !v.is_empty()).unwrap_or_else(|| default.clone())
                }
                model::TagValue::Header { .. } | model::TagValue::Node(_) => return None,
            };
            (!value.is_empty()).then(|| (name.clone(), value))
        });
        Ok(Self { fixed: fixed.collect(), config: t.clone(), to })
    }

    /// Tags of a request's span.
    pub(crate) fn tags<'a>(
        &'a self,
        head: &'a RequestHead,
        node: &'a NodeInfo,
    ) -> impl Iterator<Item = (String, String)> + 'a {
        let of_request = self.config.tags.iter().filter_map(move |(tag, value)| {
            let value = match value {
                model::TagValue::Header { name, default } => {
                    let found = crate::matcher::header_value(head, name.to_ascii_lowercase().as_bytes());
                    found.map_or_else(|| default.clone(), |v| String::from_utf8_lossy(&v).into_owned())
                }
                model::TagValue::Node(text) => node.text(*text).to_owned(),
                model::TagValue::Literal(_) | model::TagValue::Environment { .. } => return None,
            };
            (!value.is_empty()).then(|| (tag.clone(), value))
        });
        self.fixed.iter().cloned().chain(of_request)
    }
}

/// TLS of a chain; the rustls configuration is made at the first handshake and reads secrets at each.
#[derive(Debug)]
struct DownstreamTls {
    spec: model::DownstreamTls,
    config: ArcSwapOption<rustls::ServerConfig>,
}

/// Finds or makes what chains refer to by name.
pub(crate) struct Names<'a> {
    pub(crate) cluster: SlotOf<'a>,
    pub(crate) route: &'a mut dyn FnMut(&str) -> Arc<RouteSlot>,
    pub(crate) log: &'a mut dyn FnMut(&str) -> Result<Arc<LogSink>, CompileError>,
    pub(crate) export: &'a mut dyn FnMut(&To, SlotOf<'_>) -> Result<Arc<Exporter>, CompileError>,
}

impl Names<'_> {
    fn logs(&mut self, logs: &[model::AccessLog]) -> Result<Vec<AccessLog>, CompileError> {
        logs.iter()
            .map(|l| match l {
                model::AccessLog::File(l) => {
                    let format = Format::new(&l.format)?.omitting(l.omit_empty);
                    Ok(AccessLog::File(Arc::new(format), (self.log)(&l.path)?))
                }
                model::AccessLog::Grpc(g) => {
                    (self.export)(&To::Entries(g.as_ref().clone()), self.cluster).map(AccessLog::Export)
                }
                model::AccessLog::Otlp(o) => {
                    (self.export)(&To::Records(o.as_ref().clone()), self.cluster).map(AccessLog::Export)
                }
            })
            .collect()
    }
}

/// What is known of a connection when its chain is chosen.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConnectionFacts<'a> {
    pub(crate) destination: SocketAddr,
    pub(crate) source: IpAddr,
    pub(crate) tls: bool,
    pub(crate) sni: Option<&'a str>,
    pub(crate) alpn: &'a [String],
}

impl Listener {
    /// A place for a connection, or that there is none. Connections are counted whether there is a limit or not: there may be
    /// one while they last.
    pub(crate) fn place(&self) -> Option<ListenerPlace> {
        let place = ListenerPlace(Arc::clone(&self.open));
        let before = self.open.fetch_add(1, Relaxed);
        self.model.max_connections.is_none_or(|n| before < n).then_some(place)
    }

    /// Compiles; chains that are equal to one of `previous` are taken over with their connections.
    pub(crate) fn new(
        model: Arc<model::Listener>,
        previous: Option<&Listener>,
        names: &mut Names<'_>,
    ) -> Result<Self, CompileError> {
        let takes = match (model.quic.is_some(), model.inspect_quic) {
            (true, _) => Takes::Quic,
            (false, true) => Takes::Passing,
            (false, false) => Takes::Tcp,
        };
        let mut chain = |c: &model::FilterChain| -> Result<Arc<Chain>, CompileError> {
            match previous.and_then(|p| p.all_chains().find(|o| o.model == *c)) {
                Some(same) => Ok(Arc::clone(same)),
                None => Ok(Arc::new(Chain::new(c, takes, names)?)),
            }
        };
        let chains: Vec<_> = model.filter_chains.iter().map(&mut chain).collect::<Result<_, _>>()?;
        let default = model.default_filter_chain.as_ref().map(&mut chain).transpose()?;
        let mut by_port: HashMap<Option<u16>, Vec<usize>> = HashMap::new();
        for (i, c) in chains.iter().enumerate() {
            by_port.entry(c.model.matches.destination_port).or_default().push(i);
        }
        let logs = names.logs(&model.access_log)?;
        let udp = match &model.udp {
            None => None,
            Some(_) if default.is_some() || !chains.is_empty() || takes != Takes::Tcp => {
                return Err(CompileError::Udp);
            }
            // Sessions of one that stays, stay.
            Some(u) => match previous.and_then(|p| p.udp.as_ref()).filter(|p| p.config == **u) {
                Some(same) => Some(Arc::clone(same)),
                None => Some(Arc::new(UdpProxy::new(u, names)?)),
            },
        };
        let open = previous.map(|p| Arc::clone(&p.open)).unwrap_or_default();
        Ok(Self { model, chains, default, by_port, logs, open, udp })
    }

    /// Whether its connections of QUIC carry datagrams.
    pub(crate) fn carries_datagrams(&self) -> bool {
        self.all_chains().any(|c| matches!(c.terminal, Terminal::Udp(_)))
    }

    pub(crate) fn all_chains(&self) -> impl Iterator<Item = &Arc<Chain>> {
        self.chains.iter().chain(&self.default)
    }

    fn at_port(&self, port: u16) -> &[usize] {
        // A chain for the port hides those for any port, whether or not the rest of it matches (Envoy).
        self.by_port.get(&Some(port)).or_else(|| self.by_port.get(&None)).map_or(&[], Vec::as_slice)
    }

    /// Whether the choice of a chain at this destination, or of a host by it, depends on a ClientHello, and on HTTP
    /// detection.
    pub(crate) fn inspection(&self, destination: SocketAddr) -> (bool, bool) {
        let by_sni =
            |c: &Chain| c.sni_cluster || matches!(&c.terminal, Terminal::Tcp(t) if t.config.names.is_some());
        let mut needs = (self.default.as_deref().is_some_and(by_sni), false);
        for i in self.at_port(destination.port()) {
            let chain = &self.chains[*i];
            let m = &chain.model.matches;
            let http =
                m.application_protocols.iter().any(|p| matches!(p.as_str(), "http/1.1" | "h2c" | "http/1.0"));
            needs.0 |= m.transport_protocol.is_some()
                || !m.server_names.is_empty()
                || !m.application_protocols.is_empty()
                || by_sni(chain);
            needs.1 |= http;
        }
        (needs.0 && self.model.inspect_tls, needs.1 && self.model.inspect_http)
    }

    /// The chain of a connection: at each step only the most specific candidates remain.
    pub(crate) fn chain(&self, f: &ConnectionFacts<'_>) -> Option<&Arc<Chain>> {
        let mut left: Vec<usize> = self.at_port(f.destination.port()).to_vec();
        let matches = |i: usize| &self.chains[i].model.matches;
        let narrow = |left: &mut Vec<usize>, rank: &dyn Fn(usize) -> Option<usize>| {
            let best = left.iter().filter_map(|i| rank(*i)).max();
            left.retain(|i| best.is_some() && rank(*i) == best);
        };
        narrow(&mut left, &|i| prefix_rank(&matches(i).destination_prefixes, f.destination.ip()));
        narrow(&mut left, &|i| name_rank(&matches(i).server_names, f.sni));
        narrow(&mut left, &|i| match matches(i).transport_protocol {
            None => Some(0),
            Some(model::TransportProtocol::Tls) => f.tls.then_some(1),
            Some(model::TransportProtocol::RawBuffer) => (!f.tls).then_some(1),
        });
        narrow(&mut left, &|i| {
            let p = &matches(i).application_protocols;
            if p.is_empty() { Some(0) } else { f.alpn.iter().any(|a| p.contains(a)).then_some(1) }
        });
        narrow(&mut left, &|i| prefix_rank(&matches(i).source_prefixes, f.source));
        left.first().and_then(|i| self.chains.get(*i)).or(self.default.as_ref())
    }
}

/// Rank of the longest prefix that contains the address; an empty list contains all of them.
fn prefix_rank(prefixes: &[IpNet], ip: IpAddr) -> Option<usize> {
    if prefixes.is_empty() {
        return Some(0);
    }
    prefixes.iter().filter(|n| n.contains(&ip)).map(|n| usize::from(n.prefix_len()) + 1).max()
}

fn name_rank(names: &[String], sni: Option<&str>) -> Option<usize> {
    if names.is_empty() {
        return Some(0);
    }
    let sni = sni?;
    names
        .iter()
        .filter_map(|n| match n.strip_prefix('*') {
            Some("") => Some(1),
            Some(suffix) => {
                let fits = sni.len() > suffix.len()
                    && sni.get(sni.len() - suffix.len()..).is_some_and(|s| s.eq_ignore_ascii_case(suffix));
                fits.then_some(suffix.len() + 1)
            }
            None => n.eq_ignore_ascii_case(sni).then_some(usize::MAX),
        })
        .max()
}

impl Chain {
    /// Whether its requests tell of clients' certificates themselves.
    pub(crate) fn shows_certificates(&self) -> bool {
        let Terminal::Http(m) = &self.terminal else { return false };
        let parts = m.config.headers.client_cert;
        m.config.forward_client_cert.tells() && (parts.cert || parts.chain)
    }

    fn new(c: &model::FilterChain, takes: Takes, names: &mut Names<'_>) -> Result<Self, CompileError> {
        let (mut guards, mut limits) = (vec![], vec![]);
        let mut sni_cluster = false;
        let mut terminal = None;
        for f in &c.filters {
            if terminal.is_some() {
                return Err(CompileError::BehindTerminal(c.name.clone()));
            }
            match f {
                model::NetworkFilter::Rbac(r) => guards.push(Guard::Rbac(Box::new(Rbac::new(r)?))),
                model::NetworkFilter::Authz(a) => {
                    guards.push(Guard::Authz(Box::new(ConnectionAuthz::new(a, names.cluster)?)));
                }
                model::NetworkFilter::Limit(l) => limits.push(local::bucket(&l.bucket)?),
                model::NetworkFilter::SniCluster => sni_cluster = true,
                model::NetworkFilter::Tcp(t) => {
                    terminal = Some(Terminal::Tcp(Box::new(TcpProxy::new(t, names)?)))
                }
                model::NetworkFilter::Http(h) => {
                    terminal = Some(Terminal::Http(Arc::new(HttpManager::new(h, names)?)))
                }
                model::NetworkFilter::Udp(u) => {
                    terminal = Some(Terminal::Udp(Arc::new(UdpProxy::new(u, names)?)))
                }
            }
        }
        let udp = matches!(terminal, Some(Terminal::Udp(_)));
        let quic = takes == Takes::Quic;
        let http3 = matches!(&terminal, Some(Terminal::Http(h)) if h.config.codec == model::HttpCodec::Http3);
        let refuse = |why| Err(CompileError::Quic(c.name.clone(), why));
        match (quic, http3) {
            _ if takes == Takes::Passing && (!udp || c.tls.is_some() || c.filters.len() != 1) => {
                return refuse("QUIC is passed on by a UDP proxy alone, without TLS");
            }
            _ if takes == Takes::Tcp && udp => return refuse("a UDP proxy needs a listener of UDP"),
            (true, false) if udp && c.tls.is_some() => {}
            (true, false) if udp => return refuse("QUIC needs a certificate"),
            (true, false) => return refuse("a QUIC listener needs an HTTP connection manager for HTTP/3"),
            (false, true) => return refuse("HTTP/3 needs a QUIC listener"),
            (true, true) if c.tls.is_none() => return refuse("QUIC needs a certificate"),
            (true, true) if matches!(&terminal, Some(Terminal::Http(h)) if h.config.connect) => {
                return refuse("CONNECT is not served over HTTP/3, other than for WebSockets");
            }
            _ => {}
        }
        let tls = c.tls.clone().map(|mut spec| {
            if quic {
                // All that QUIC can have (RFC 9001 section 4.2, RFC 9114 section 3.1), whatever else was written.
                spec.alpn = vec![if udp { model::UDP_ALPN } else { "h3" }.to_owned()];
                spec.min_version = model::TlsVersion::V1_3;
            }
            DownstreamTls { spec, config: ArcSwapOption::empty() }
        });
        Ok(Self {
            model: c.clone(),
            tls,
            guards,
            limits,
            sni_cluster,
            terminal: terminal.ok_or_else(|| CompileError::NoTerminal(c.name.clone()))?,
            drain: CancellationToken::new(),
            kill: CancellationToken::new(),
        })
    }

    /// The rustls configuration, if this chain terminates TLS.
    pub(crate) fn server_config(
        &self,
        secrets: &SecretStore,
    ) -> Option<Result<Arc<rustls::ServerConfig>, IdentityError>> {
        let tls = self.tls.as_ref()?;
        if let Some(c) = tls.config.load_full() {
            return Some(Ok(c));
        }
        let made = secrets.server_config(&tls.spec);
        if let Ok(c) = &made {
            tls.config.store(Some(Arc::clone(c)));
        }
        Some(made)
    }
}

impl HttpManager {
    fn new(c: &model::HttpConnectionManager, names: &mut Names<'_>) -> Result<Self, CompileError> {
        let routes = match &c.routes {
            model::RouteSource::Rds(name) => Routes::Slot((names.route)(name)),
            model::RouteSource::Inline(r) => {
                Routes::Inline(Arc::new(RouteTable::new(r, None, names.cluster)?))
            }
        };
        let filters = c
            .filters
            .iter()
            .map(|f| {
                Ok(match f {
                    model::HttpFilter::Rbac(r) => HttpFilter::Rbac(Box::new(Rbac::new(r)?)),
                    model::HttpFilter::Jwt(j) => HttpFilter::Jwt(Box::new(JwtAuthn::new(j, names.cluster)?)),
                    model::HttpFilter::ExtAuthz(e) => {
                        HttpFilter::ExtAuthz(Box::new(ExtAuthz::new(e, names.cluster)?))
                    }
                    model::HttpFilter::ExtProc(e) => {
                        HttpFilter::ExtProc(Arc::new(ExtProc::new(e, names.cluster)?))
                    }
                    model::HttpFilter::LocalRateLimit(l) => {
                        HttpFilter::LocalRateLimit(Box::new(LocalRateLimit::new(l, false)?))
                    }
                    model::HttpFilter::RateLimit(l) => {
                        HttpFilter::RateLimit(Box::new(GlobalRateLimit::new(l, names.cluster)?))
                    }
                    model::HttpFilter::GrpcWeb => HttpFilter::GrpcWeb,
                    model::HttpFilter::Compressor(c) => HttpFilter::Compressor(Arc::new(Compressor::new(c)?)),
                    model::HttpFilter::Buffer(n) => HttpFilter::Buffer(*n),
                    model::HttpFilter::StatefulSession(s) => HttpFilter::StatefulSession(Arc::clone(s)),
                    model::HttpFilter::Names(_) => HttpFilter::Names,
                    model::HttpFilter::OnDemand(o) => HttpFilter::OnDemand(*o),
                    model::HttpFilter::Cors => HttpFilter::Cors,
                    model::HttpFilter::Fault => HttpFilter::Fault,
                    model::HttpFilter::GrpcStats => HttpFilter::GrpcStats,
                })
            })
            .collect::<Result<Vec<_>, CompileError>>()?;
        let bodies = filters.iter().any(HttpFilter::wants_bodies);
        let at = c.filters.iter().position(|f| matches!(f, model::HttpFilter::OnDemand(_)));
        if c.filters[..at.unwrap_or(0)].iter().any(model::HttpFilter::reads_bodies) {
            return Err(CompileError::OnDemandOrder);
        }
        let (on_demand, logs) = (at.is_some(), names.logs(&c.access_log)?);
        let tracing = c.tracing.as_deref().map(|t| Tracing::new(t, names)).transpose()?.map(Box::new);
        Ok(Self { config: c.clone(), routes, filters, bodies, on_demand, logs, tracing })
    }

    /// The routes in force now; `None` until RDS has answered.
    pub(crate) fn routes(&self) -> Option<Arc<RouteTable>> {
        match &self.routes {
            Routes::Slot(s) => s.current.load_full(),
            Routes::Inline(t) => Some(Arc::clone(t)),
        }
    }
}

impl TcpProxy {
    fn new(c: &model::TcpProxy, names: &mut Names<'_>) -> Result<Self, CompileError> {
        if c.clusters.is_empty() {
            return Err(CompileError::NoCluster);
        }
        let only = c.clusters.len() == 1;
        let clusters: Vec<_> = c
            .clusters
            .iter()
            .map(|w| ((names.cluster)(&w.cluster), if only { 1 } else { u64::from(w.weight) }))
            .collect();
        let total = clusters.iter().map(|c| c.1).sum();
        if total == 0 {
            return Err(CompileError::NoWeight);
        }
        let tunnel = c.tunnel.as_ref().map(ConnectRequest::new).transpose()?;
        Ok(Self { config: c.clone(), clusters, total, logs: names.logs(&c.access_log)?, tunnel })
    }

    /// Picks a destination by weight.
    pub(crate) fn destination(&self, random: u64) -> &Arc<ClusterSlot> {
        let mut at = random % self.total;
        for (c, w) in &self.clusters {
            if at < *w {
                return c;
            }
            at -= w;
        }
        // A proxy without clusters is refused when it is compiled.
        &self.clusters[0].0
    }
}

impl UdpProxy {
    /// The workload's port, where the cluster is one of its own: `inbound|5353/udp||`.
    pub(crate) fn inbound_port(&self) -> Option<u16> {
        let (port, _) = self.config.cluster.strip_prefix("inbound|")?.split_once('/')?;
        port.parse().ok()
    }

    fn new(c: &model::UdpProxy, names: &mut Names<'_>) -> Result<Self, CompileError> {
        if c.idle_timeout.is_zero() {
            return Err(CompileError::Udp);
        }
        Ok(Self {
            config: c.clone(),
            cluster: (names.cluster)(&c.cluster),
            logs: names.logs(&c.access_log)?,
            series: OnceLock::new(),
        })
    }

    /// Its counters.
    pub(crate) fn series(&self, metrics: &MeshMetrics) -> &Arc<UdpSeries> {
        self.series
            .get_or_init(|| Arc::new(metrics.udp_series(&self.config.stat_prefix, &self.config.cluster)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn listener(chains: Vec<(&str, model::FilterChainMatch)>, default: bool) -> Listener {
        let tcp = || {
            vec![model::NetworkFilter::Tcp(model::TcpProxy {
                stat_prefix: String::new(),
                clusters: vec![model::WeightedCluster::only("c")],
                idle_timeout: None,
                max_duration: None,
                access_log: vec![],
                tunnel: None,
                on_demand: None,
                names: None,
            })]
        };
        let chain = |name: &str, matches| model::FilterChain {
            name: name.into(),
            matches,
            tls: None,
            filters: tcp(),
        };
        let l = model::Listener {
            name: "l".into(),
            address: "0.0.0.0:15006".parse().unwrap(),
            bind_to_port: true,
            use_original_dst: true,
            transparent: false,
            direction: model::Direction::Inbound,
            inspect_tls: true,
            inspect_http: true,
            proxy_protocol: false,
            inspect_timeout: Duration::from_secs(1),
            filter_chains: chains.into_iter().map(|(n, m)| chain(n, m)).collect(),
            default_filter_chain: default.then(|| chain("default", model::FilterChainMatch::default())),
            access_log: vec![],
            udp: None,
            quic: None,
            inspect_quic: false,
            buffer_limit: None,
            max_connections: None,
            mixer: None,
        };
        let mut names = Names {
            cluster: &mut ClusterSlot::new,
            route: &mut |_| unreachable!(),
            log: &mut |_| unreachable!(),
            export: &mut |_, _| unreachable!(),
        };
        Listener::new(Arc::new(l), None, &mut names).unwrap()
    }

    #[test]
    fn the_most_specific_chain_wins() {
        type M = model::FilterChainMatch;
        let tls = Some(model::TransportProtocol::Tls);
        let raw = Some(model::TransportProtocol::RawBuffer);
        let names = |n: &[&str]| n.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let l = listener(
            vec![
                ("any", M::default()),
                ("tls", M { transport_protocol: tls, ..M::default() }),
                (
                    "tls-alpn",
                    M { transport_protocol: tls, application_protocols: names(&["istio"]), ..M::default() },
                ),
                ("port", M { destination_port: Some(80), transport_protocol: raw, ..M::default() }),
                ("net", M { destination_prefixes: vec!["10.1.0.0/16".parse().unwrap()], ..M::default() }),
                (
                    "net-host",
                    M {
                        destination_prefixes: vec!["10.1.1.1/32".parse().unwrap()],
                        server_names: names(&["a.com"]),
                        ..M::default()
                    },
                ),
                (
                    "sni",
                    M { server_names: names(&["a.b.com", "*.com"]), transport_protocol: tls, ..M::default() },
                ),
                (
                    "sni-long",
                    M { server_names: names(&["*.b.com"]), transport_protocol: tls, ..M::default() },
                ),
                ("source", M { source_prefixes: vec!["9.9.9.0/24".parse().unwrap()], ..M::default() }),
            ],
            true,
        );
        let go = |dst: &str, tls: bool, sni: Option<&str>, alpn: &[&str], src: &str| {
            let alpn = names(alpn);
            let f = ConnectionFacts {
                destination: dst.parse().unwrap(),
                source: src.parse().unwrap(),
                tls,
                sni,
                alpn: &alpn,
            };
            l.chain(&f).map(|c| c.model.name.clone()).unwrap()
        };
        assert_eq!(go("1.1.1.1:1", false, None, &[], "2.2.2.2"), "any");
        assert_eq!(go("1.1.1.1:1", true, None, &[], "2.2.2.2"), "tls");
        assert_eq!(go("1.1.1.1:1", true, None, &["h2", "istio"], "2.2.2.2"), "tls-alpn");
        assert_eq!(go("1.1.1.1:80", false, None, &[], "2.2.2.2"), "port");
        assert_eq!(
            go("1.1.1.1:80", true, None, &[], "2.2.2.2"),
            "default",
            "a port match does not fall back"
        );
        assert_eq!(go("10.1.2.3:1", false, None, &[], "2.2.2.2"), "net");
        assert_eq!(go("10.1.1.1:1", true, Some("b.com"), &[], "2.2.2.2"), "default");
        assert_eq!(go("1.1.1.1:1", true, Some("A.B.com"), &[], "2.2.2.2"), "sni");
        assert_eq!(go("1.1.1.1:1", true, Some("x.b.com"), &[], "2.2.2.2"), "sni-long");
        assert_eq!(go("1.1.1.1:1", true, Some("x.c.com"), &[], "2.2.2.2"), "sni");
        assert_eq!(go("1.1.1.1:1", true, Some("com"), &[], "2.2.2.2"), "tls");
        assert_eq!(go("1.1.1.1:1", false, None, &[], "9.9.9.9"), "source");
        assert_eq!(l.inspection("1.1.1.1:1".parse().unwrap()), (true, false));
        assert_eq!(l.inspection("1.1.1.1:80".parse().unwrap()), (true, false));
    }

    #[test]
    fn no_inspection_where_it_decides_nothing() {
        let l = listener(
            vec![("plain", model::FilterChainMatch { destination_port: Some(3306), ..Default::default() })],
            true,
        );
        assert_eq!(l.inspection("1.1.1.1:3306".parse().unwrap()), (false, false));
        assert_eq!(l.inspection("1.1.1.1:80".parse().unwrap()), (false, false));
    }
}

//! Pieces of listeners and clusters that several generators use.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use mesh_model::{
    authored::{AccessLogEncoding, PathNormalization},
    proxy::{
        AccessLog, AccessLogFormat, CircuitBreakers, Cluster, Direction, Discovery, EscapedSlashes,
        FilterChain, FilterChainMatch, ForwardClientCert, HttpCodec, HttpConnectionManager, HttpFilter,
        LbPolicy, LeastRequest, Listener, LoadAssignment, NetworkFilter, OnDemandCluster, RouteConfiguration,
        RouteSource, SecretRef, StringMatch, TcpProxy, Tracing, UpstreamHttp, UpstreamHttp2, UpstreamTls,
        Validation, WeightedCluster,
    },
};

use super::{Ctx, authorizers, clusters, jwt, rbac, session};

/// Accepts and closes: where undeclared destinations go with `REGISTRY_ONLY`.
pub(super) const BLACK_HOLE: &str = "BlackHoleCluster";
/// Where undeclared destinations go with `ALLOW_ANY`.
pub(super) const PASSTHROUGH: &str = "PassthroughCluster";
/// Where connections to undeclared ports of the workload go.
pub(super) const INBOUND_PASSTHROUGH: &str = "InboundPassthroughCluster";

/// TCP connections without a byte are kept as long as Envoy keeps them.
const TCP_IDLE: Duration = Duration::from_secs(3600);
const HTTP_IDLE: Duration = Duration::from_secs(3600);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Waiting for the first bytes. A server-first protocol on an undeclared port loses this much per
/// connection; Istio's value has moved between 100 ms and 5 s and is off today.
pub(super) const INSPECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Fields of a JSON access log line.
const JSON_FIELDS: &[(&str, &str)] = &[
    ("authority", "%REQ(:AUTHORITY)%"),
    ("bytes_received", "%BYTES_RECEIVED%"),
    ("bytes_sent", "%BYTES_SENT%"),
    ("downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("duration", "%DURATION%"),
    ("method", "%REQ(:METHOD)%"),
    ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
    ("protocol", "%PROTOCOL%"),
    ("request_id", "%REQ(X-REQUEST-ID)%"),
    ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
    ("response_code", "%RESPONSE_CODE%"),
    ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
    ("response_flags", "%RESPONSE_FLAGS%"),
    ("route_name", "%ROUTE_NAME%"),
    ("start_time", "%START_TIME%"),
    ("upstream_cluster", "%UPSTREAM_CLUSTER%"),
    ("upstream_host", "%UPSTREAM_HOST%"),
    ("upstream_service_time", "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%"),
    ("upstream_transport_failure_reason", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"),
    ("user_agent", "%REQ(USER-AGENT)%"),
    ("x_forwarded_for", "%REQ(X-FORWARDED-FOR)%"),
];

/// Name of an outbound cluster, and of its load assignment.
pub(super) fn cluster_name(port: u16, subset: &str, host: &str) -> String {
    format!("outbound|{port}|{subset}|{host}")
}

/// The same as a server name; also the cluster's name at gateways that route by it.
pub(super) fn sni_name(port: u16, subset: &str, host: &str) -> String {
    format!("outbound_.{port}_.{subset}_.{host}")
}

/// The server name of a service in one member.
pub(super) fn member_sni(port: u16, subset: &str, name: &str, namespace: &str, cluster: &str) -> String {
    sni_name(port, subset, &crate::hosts::member_host(name, namespace, cluster))
}

impl Ctx<'_> {
    pub(super) fn access_log(&self) -> Vec<AccessLog> {
        let mesh = &self.world.config.mesh;
        let Some(path) = mesh.access_log_file.clone().filter(|p| !p.is_empty()) else { return vec![] };
        let text = mesh.access_log_format.clone().unwrap_or_default();
        let format = match mesh.access_log_encoding {
            AccessLogEncoding::Text => AccessLogFormat::Text(text),
            AccessLogEncoding::Json => {
                // A JSON object of templates, or the standard fields.
                let custom: Option<BTreeMap<String, String>> = serde_json::from_str(&text).ok();
                AccessLogFormat::Json(custom.unwrap_or_else(|| {
                    JSON_FIELDS.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
                }))
            }
        };
        vec![AccessLog { path, format }]
    }

    fn tracing(&self) -> Tracing {
        let percent = self.world.config.mesh.trace_sampling.unwrap_or(1.0).clamp(0.0, 100.0);
        // At most 10,000 by the clamp.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let sampling = (percent * 100.0).round() as u32;
        Tracing { sampling }
    }

    pub(super) fn connect_timeout(&self) -> Duration {
        self.world.config.mesh.default_connect_timeout.map_or(CONNECT_TIMEOUT, Duration::from)
    }

    /// The workload's own certificate.
    pub(super) fn own_certificate(&self) -> SecretRef {
        match &self.proxy.tls_files {
            Some((chain, key, _)) => SecretRef::Files { chain: chain.clone(), key: key.clone() },
            None => SecretRef::Sds("default".to_owned()),
        }
    }

    /// The roots of the mesh.
    pub(super) fn mesh_roots(&self) -> SecretRef {
        match &self.proxy.tls_files {
            Some((_, _, root)) => SecretRef::Files { chain: root.clone(), key: String::new() },
            None => SecretRef::Sds("ROOTCA".to_owned()),
        }
    }

    /// Mesh mTLS to peers with one of these identities.
    pub(super) fn mesh_tls<'s>(
        &self,
        identities: impl IntoIterator<Item = &'s String>,
        sni: String,
        http2: bool,
    ) -> UpstreamTls {
        let mut alpn = vec!["istio".to_owned()];
        if http2 {
            alpn.push("h2".to_owned());
        }
        UpstreamTls {
            certificate: Some(self.own_certificate()),
            validation: Validation {
                trusted: Some(self.mesh_roots()),
                sans: identities.into_iter().map(StringMatch::exact).collect(),
                crl: None,
            },
            sni,
            by_name: false,
            alpn,
        }
    }

    pub(super) fn tcp_filter(&self, stat_prefix: &str, clusters: Vec<WeightedCluster>) -> NetworkFilter {
        // Listeners of bytes stand there before anybody connects; where they lead is asked for by the first who does.
        let asks = self.proxy.on_demand && clusters.iter().any(|c| c.cluster.starts_with("outbound|"));
        NetworkFilter::Tcp(TcpProxy {
            stat_prefix: stat_prefix.to_owned(),
            clusters,
            idle_timeout: Some(TCP_IDLE),
            max_duration: None,
            access_log: self.access_log(),
            tunnel: None,
            on_demand: asks.then(OnDemandCluster::default),
            names: None,
        })
    }

    pub(super) fn tcp_to(&self, cluster: &str) -> NetworkFilter {
        self.tcp_filter(cluster, vec![WeightedCluster::only(cluster)])
    }

    /// A connection manager with the mesh's settings for one side.
    pub(super) fn hcm(&self, stat_prefix: &str, routes: RouteSource, side: Side) -> HttpConnectionManager {
        self.hcm_at(stat_prefix, routes, side, None)
    }

    /// The same in front of a port of the workload.
    pub(super) fn hcm_at(
        &self,
        stat_prefix: &str,
        routes: RouteSource,
        side: Side,
        port: Option<u16>,
    ) -> HttpConnectionManager {
        let mut filters = Vec::new();
        // It stands first: when a virtual host has come, those behind it begin anew with its routes.
        if side == Side::Outbound && self.proxy.on_demand {
            filters.push(HttpFilter::OnDemand(Some(OnDemandCluster::default())));
        }
        // Ours resolves names where it picks a host.
        if side == Side::Outbound && !self.proxy.flotilla && self.world.index.resolves_by_name() {
            filters.push(HttpFilter::Names(clusters::name_cache()));
        }
        // Who comes in is asked first; who leaves has been.
        if side != Side::Outbound {
            filters.extend(rbac::custom(self));
            filters.extend(jwt::filter(self, port));
            filters.extend(rbac::http(self).into_iter().map(HttpFilter::Rbac));
        }
        filters.push(HttpFilter::GrpcStats);
        if side != Side::Inbound {
            // A preflight carries nothing by which anybody could judge it, and is answered before.
            filters.push(HttpFilter::Cors);
            if side == Side::Outbound {
                filters.extend(self.authorizers().values().cloned());
            }
            filters.push(HttpFilter::Fault);
            // Where no session stays anywhere, nothing looks for one. An edge's listeners know their routes.
            if side == Side::Outbound && *self.sessions.get_or_init(|| session::any(self)) {
                filters.push(session::filter());
            }
        }
        let paths = self
            .world
            .config
            .mesh
            .path_normalization
            .as_ref()
            .map_or_else(Default::default, |p| p.normalization);
        HttpConnectionManager {
            stat_prefix: stat_prefix.to_owned(),
            codec: HttpCodec::Auto,
            routes,
            filters,
            use_remote_address: side == Side::Edge,
            trusted_hops: 0,
            forward_client_cert: match side {
                Side::Inbound => ForwardClientCert::AppendForward,
                Side::Outbound => ForwardClientCert::Sanitize,
                Side::Edge => ForwardClientCert::SanitizeSet,
            },
            websocket: true,
            // Applications use the outbound side as an HTTP proxy. Inbound it would carry bytes past the rules
            // about requests.
            connect: side == Side::Outbound,
            server_name: match side {
                // The workload's own answer keeps its name on the way through the client's proxy.
                Side::Outbound => String::new(),
                Side::Inbound | Side::Edge => "istio-envoy".to_owned(),
            },
            normalize_path: paths != PathNormalization::None,
            merge_slashes: matches!(
                paths,
                PathNormalization::MergeSlashes | PathNormalization::DecodeAndMergeSlashes
            ),
            escaped_slashes: match paths {
                PathNormalization::Default => EscapedSlashes::Reject,
                PathNormalization::DecodeAndMergeSlashes => EscapedSlashes::UnescapeAndForward,
                _ => EscapedSlashes::Keep,
            },
            access_log: self.access_log(),
            tracing: Some(self.tracing()),
            idle_timeout: Some(HTTP_IDLE),
            // Edges face strangers: a request head must arrive in time.
            request_headers_timeout: (side == Side::Edge).then_some(Duration::from_secs(60)),
            stream_idle_timeout: (side == Side::Edge).then_some(Duration::from_secs(300)),
            max_stream_duration: None,
            accept_http_10: true,
            preserve_request_id: side != Side::Edge,
        }
    }

    /// A connection manager of an edge, with what its routes need.
    pub(super) fn edge_filter(&self, stat_prefix: &str, routes: &RouteConfiguration) -> NetworkFilter {
        let source = RouteSource::Rds(routes.name.clone());
        let mut hcm = self.hcm(stat_prefix, source, Side::Edge);
        let fault = hcm.filters.iter().position(|f| *f == HttpFilter::Fault).unwrap_or(hcm.filters.len());
        hcm.filters.splice(fault..fault, authorizers::of(self, routes));
        if session::any_of(routes) {
            hcm.filters.push(session::filter());
        }
        NetworkFilter::Http(Box::new(hcm))
    }

    pub(super) fn http_filter(&self, stat_prefix: &str, routes: RouteSource, side: Side) -> NetworkFilter {
        NetworkFilter::Http(Box::new(self.hcm(stat_prefix, routes, side)))
    }

    /// A cluster with the mesh's defaults.
    pub(super) fn base_cluster(&self, name: &str, discovery: Discovery) -> Cluster {
        Cluster {
            name: name.to_owned(),
            namespace: String::new(),
            discovery,
            lb: LbPolicy::LeastRequest(LeastRequest::default()),
            connect_timeout: self.connect_timeout(),
            http: UpstreamHttp::Http1,
            tls: None,
            tls_matches: vec![],
            limits: CircuitBreakers::default(),
            outlier: None,
            health: None,
            close_on_health_failure: false,
            utilization: None,
            slow_start: None,
            max_requests_per_connection: 0,
            idle_timeout: None,
            // Never send to hosts that are known to be bad only because many are.
            panic_threshold: 0,
            locality_weighted: false,
            max_connection_duration: None,
            http2: UpstreamHttp2::default(),
            keepalive: None,
            source: vec![],
            proxy_protocol: None,
        }
    }

    pub(super) fn passthrough(&self, name: &str) -> Cluster {
        Cluster {
            lb: LbPolicy::RoundRobin,
            http: UpstreamHttp::Downstream,
            ..self.base_cluster(name, Discovery::OriginalDst)
        }
    }

    pub(super) fn black_hole(&self) -> Cluster {
        self.base_cluster(
            BLACK_HOLE,
            Discovery::Static(LoadAssignment {
                name: BLACK_HOLE.to_owned(),
                localities: vec![],
                overprovisioning: 140,
            }),
        )
    }
}

/// Which side of traffic a connection manager is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Towards the workload.
    Inbound,
    /// From the workload.
    Outbound,
    /// At a gateway.
    Edge,
}

/// A listener without chains.
pub(super) fn listener(name: String, address: SocketAddr, direction: Direction) -> Listener {
    Listener {
        name,
        address,
        bind_to_port: true,
        use_original_dst: false,
        transparent: false,
        direction,
        inspect_tls: false,
        inspect_http: false,
        proxy_protocol: false,
        inspect_timeout: INSPECT_TIMEOUT,
        filter_chains: vec![],
        default_filter_chain: None,
        access_log: vec![],
        udp: None,
        quic: None,
        inspect_quic: false,
    }
}

/// A chain without TLS.
pub(super) fn chain(
    name: impl Into<String>,
    matches: FilterChainMatch,
    filters: Vec<NetworkFilter>,
) -> FilterChain {
    FilterChain { name: name.into(), matches, tls: None, filters }
}

/// What the HTTP inspector finds.
pub(super) fn http_protocols() -> Vec<String> {
    ["http/1.0", "http/1.1", "h2c"].map(str::to_owned).to_vec()
}

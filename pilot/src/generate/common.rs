//! Pieces of listeners and clusters that several generators use.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use mesh_model::{
    authored::{ClientCertDetails, PathNormalization},
    proxy::{
        AddedHeaders, CircuitBreakers, ClientCertParts, Cluster, Direction, Discovery, EscapedSlashes,
        FilterChain, FilterChainMatch, ForwardClientCert, HttpCodec, HttpConnectionManager, HttpFilter,
        LbPolicy, LeastRequest, Listener, LoadAssignment, Mixer, NetworkFilter, OnDemandCluster, RetryPolicy,
        RouteConfiguration, RouteSource, SecretRef, StringMatch, TcpProxy, UpstreamHttp, UpstreamHttp2,
        UpstreamTls, Validation, WeightedCluster,
    },
};

use super::{Ctx, authorizers, clusters, http, jwt, rbac, session, telemetry};
use crate::proxy::{ConnectionLimits, HeaderSettings, ServerName, Topology};

/// Accepts and closes: where undeclared destinations go with `REGISTRY_ONLY`.
pub(super) const BLACK_HOLE: &str = "BlackHoleCluster";
/// Where undeclared destinations go with `ALLOW_ANY`.
pub(super) const PASSTHROUGH: &str = "PassthroughCluster";
/// Where requests to undeclared hosts go with `ALLOW_ANY_DYNAMIC_DNS`.
pub(super) const BY_NAME: &str = "AllowAnyDynamicDNSCluster";
/// Where connections to undeclared ports of the workload go.
pub(super) const INBOUND_PASSTHROUGH: &str = "InboundPassthroughCluster";

/// TCP connections without a byte are kept as long as Envoy keeps them.
const TCP_IDLE: Duration = Duration::from_secs(3600);
const HTTP_IDLE: Duration = Duration::from_secs(3600);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Waiting for the first bytes. A server-first protocol on an undeclared port loses this much per
/// connection; Istio's value has moved between 100 ms and 5 s and is off today.
pub(super) const INSPECT_TIMEOUT: Duration = Duration::from_millis(500);
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
    /// What is in front of gateways.
    pub(super) fn topology(&self) -> Topology {
        if !self.proxy.router {
            return Topology::default();
        }
        let of_mesh =
            self.world.config.mesh.default_config.as_ref().and_then(|c| c.gateway_topology.as_ref());
        self.proxy.topology.or(of_mesh.map(Topology::from)).unwrap_or_default()
    }

    /// Headers that the proxy adds.
    pub(super) fn headers(&self) -> &HeaderSettings {
        self.headers.get_or_init(|| {
            let of_mesh =
                || self.world.config.mesh.default_config.as_ref().and_then(|c| c.proxy_headers.as_ref());
            let own = self.proxy.headers.clone();
            own.unwrap_or_else(|| Arc::new(of_mesh().map(HeaderSettings::from).unwrap_or_default()))
        })
    }

    /// Limits that the proxy keeps.
    pub(super) fn connections(&self) -> &ConnectionLimits {
        self.connections.get_or_init(|| {
            let of_mesh = || {
                self.world.config.mesh.default_config.as_ref().and_then(|c| c.connection_settings.as_ref())
            };
            let of = |c| ConnectionLimits::of(c, self.proxy.router);
            self.proxy.connections.clone().unwrap_or_else(|| Arc::new(of_mesh().map(of).unwrap_or_default()))
        })
    }

    /// Port that outbound connections are captured to.
    pub(super) fn outbound_port(&self) -> u16 {
        port_or(self.world.config.mesh.proxy_listen_port, mesh_runtime::ports::OUTBOUND)
    }

    /// Port that inbound connections are captured to.
    pub(super) fn inbound_port(&self) -> u16 {
        port_or(self.world.config.mesh.proxy_inbound_listen_port, mesh_runtime::ports::INBOUND)
    }

    /// Mixer, for proxies that ask it: what passes between clusters is no request that enters.
    pub(super) fn mixer(&self) -> Option<Box<Mixer>> {
        let mesh = &self.world.config.mesh;
        let check = if mesh.disable_policy_checks { String::new() } else { mesh.mixer_check_server.clone() };
        let report = mesh.mixer_report_server.clone();
        let any = !(check.is_empty() && report.is_empty());
        (any && self.proxy.flotilla && !self.proxy.east_west)
            .then(|| Box::new(Mixer { check, report, fail_open: mesh.policy_check_fail_open }))
    }

    /// How long first bytes are waited for; zero is for ever.
    pub(super) fn inspect_timeout(&self) -> Duration {
        self.world.config.mesh.protocol_detection_timeout.map_or(INSPECT_TIMEOUT, Duration::from)
    }

    /// Retries of routes that have none of their own.
    pub(super) fn retry(&self) -> Option<RetryPolicy> {
        let of_mesh = self.world.config.mesh.default_http_retry_policy.as_ref();
        of_mesh.map_or_else(|| Some(http::default_retry()), http::retry)
    }

    pub(super) fn connect_timeout(&self) -> Duration {
        self.world.config.mesh.connect_timeout.map_or(CONNECT_TIMEOUT, Duration::from)
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
                sans: self.known_as(identities),
                crl: None,
            },
            sni,
            by_name: false,
            alpn,
        }
    }

    /// Identities, also under the other names of the trust domain.
    fn known_as<'s>(&self, identities: impl IntoIterator<Item = &'s String>) -> Vec<StringMatch> {
        let aliases = &self.world.config.mesh.trust_domain_aliases;
        let own = format!("spiffe://{}/", self.world.settings.trust_domain);
        let mut out = Vec::new();
        for id in identities {
            out.push(StringMatch::exact(id));
            if let Some(rest) = id.strip_prefix(&own) {
                out.extend(aliases.iter().map(|a| StringMatch::exact(format!("spiffe://{a}/{rest}"))));
            }
        }
        out
    }

    pub(super) fn tcp_filter(&self, stat_prefix: &str, clusters: Vec<WeightedCluster>) -> NetworkFilter {
        // Listeners of bytes stand there before anybody connects; where they lead is asked for by the first who does.
        let asks = self.proxy.on_demand && clusters.iter().any(|c| c.cluster.starts_with("outbound|"));
        NetworkFilter::Tcp(TcpProxy {
            stat_prefix: stat_prefix.to_owned(),
            clusters,
            idle_timeout: Some(TCP_IDLE),
            max_duration: None,
            access_log: self.access_log(telemetry::Logged::Connections),
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
        if side == Side::Outbound
            && !self.proxy.flotilla
            && (self.world.index.resolves_by_name() || self.names_undeclared())
        {
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
        let topology = self.topology();
        let (headers, connections) = (self.headers(), self.connections());
        let forward_client_cert = match side {
            Side::Inbound => client_cert(headers.client_cert, ForwardClientCert::AppendForward),
            Side::Outbound => ForwardClientCert::Sanitize,
            Side::Edge => client_cert(topology.client_cert, ForwardClientCert::SanitizeSet),
        };
        // Zero is no limit.
        let limit = |said: Option<Duration>, usual: Option<Duration>| said.or(usual).filter(|d| !d.is_zero());
        // Edges face strangers: a request head must arrive in time.
        let at_edges = |seconds| (side == Side::Edge).then_some(Duration::from_secs(seconds));
        HttpConnectionManager {
            stat_prefix: stat_prefix.to_owned(),
            codec: HttpCodec::Auto,
            routes,
            filters,
            use_remote_address: side == Side::Edge,
            trusted_hops: if side == Side::Edge { topology.trusted } else { 0 },
            forward_client_cert,
            websocket: true,
            // Applications use the outbound side as an HTTP proxy. Inbound it would carry bytes past the rules
            // about requests.
            connect: side == Side::Outbound,
            server_name: match side {
                // The workload's own answer keeps its name on the way through the client's proxy.
                Side::Outbound => String::new(),
                Side::Inbound | Side::Edge => match &headers.server {
                    ServerName::Usual => "istio-envoy".to_owned(),
                    ServerName::Own(name) => name.clone(),
                    ServerName::Upstream => String::new(),
                },
            },
            normalize_path: paths != PathNormalization::None,
            merge_slashes: connections.merge_slashes.unwrap_or(matches!(
                paths,
                PathNormalization::MergeSlashes | PathNormalization::DecodeAndMergeSlashes
            )),
            escaped_slashes: connections.escaped_slashes.unwrap_or(match paths {
                PathNormalization::Default => EscapedSlashes::Reject,
                PathNormalization::DecodeAndMergeSlashes => EscapedSlashes::UnescapeAndForward,
                _ => EscapedSlashes::Keep,
            }),
            access_log: self.access_log(telemetry::Logged::Requests),
            tracing: self.tracing(),
            idle_timeout: limit(connections.idle_timeout, Some(HTTP_IDLE)),
            request_headers_timeout: limit(connections.request_headers_timeout, at_edges(60)),
            stream_idle_timeout: limit(connections.stream_idle_timeout, at_edges(300)),
            max_stream_duration: limit(connections.max_stream_duration, None),
            accept_http_10: true,
            preserve_request_id: side != Side::Edge,
            headers: AddedHeaders {
                client_cert: match side {
                    _ if !forward_client_cert.tells() => ClientCertParts::NONE,
                    // What stands behind a gateway sees a client's certificate there alone, and all of it.
                    Side::Edge => ClientCertParts { cert: true, ..ClientCertParts::default() },
                    Side::Inbound | Side::Outbound => headers.added.client_cert,
                },
                ..headers.added
            },
            limits: connections.http,
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
            keepalive: self.world.config.mesh.tcp_keepalive.as_ref().map(clusters::keepalive),
            source: vec![],
            proxy_protocol: None,
            stat_name: String::new(),
            dns_refresh: None,
            buffer_limit: self.connections().cluster_buffer,
            preserve_case: self.headers().added.preserve_case,
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

fn client_cert(said: ClientCertDetails, usual: ForwardClientCert) -> ForwardClientCert {
    match said {
        ClientCertDetails::Undefined => usual,
        ClientCertDetails::SanitizeSet => ForwardClientCert::SanitizeSet,
        ClientCertDetails::Sanitize => ForwardClientCert::Sanitize,
        ClientCertDetails::ForwardOnly => ForwardClientCert::ForwardOnly,
        ClientCertDetails::AppendForward => ForwardClientCert::AppendForward,
        ClientCertDetails::AlwaysForwardOnly => ForwardClientCert::AlwaysForwardOnly,
    }
}

fn port_or(said: Option<u32>, default: u16) -> u16 {
    said.and_then(|p| u16::try_from(p).ok()).filter(|p| *p != 0).unwrap_or(default)
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
        buffer_limit: None,
        max_connections: None,
        mixer: None,
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

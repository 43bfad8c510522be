use std::{collections::BTreeMap, sync::Arc, time::Duration};

use envoy_types::pb::envoy::{
    config::{cluster::v3 as cds, core::v3 as core, listener::v3 as lds, route::v3 as rds},
    extensions::filters::{http::lua::v3::Lua, network::http_connection_manager::v3 as hcm},
};
use mesh_model::{Locality, proxy::*};
use proptest::prelude::*;

use super::{common::any as typed_any, *};

fn roots() -> Validation {
    Validation {
        trusted: Some(SecretRef::Sds("ROOTCA".into())),
        sans: vec![StringMatch::exact("spiffe://mesh.local/ns/a/sa/b"), StringMatch::suffix(".example.com")],
        crl: None,
    }
}

fn downstream_tls() -> DownstreamTls {
    DownstreamTls {
        certificate: SecretRef::Sds("default".into()),
        client_certificate: ClientCertificate::Required(roots()),
        alpn: vec!["h2".into(), "http/1.1".into()],
        min_version: TlsVersion::V1_3,
        options: TlsServerOptions {
            certificates: vec![SecretRef::Sds("kubernetes://second".into())],
            max_version: None,
            ciphers: vec!["ECDHE-RSA-AES128-GCM-SHA256".into()],
            curves: vec!["X25519".into(), "P-256".into()],
            pins: vec![CertificatePin::Whole([0xab; 32]), CertificatePin::PublicKey([7; 32])],
        },
    }
}

fn rbac() -> Rbac {
    let header = HeaderMatch {
        name: "x-a".into(),
        value: HeaderValueMatch::Value(StringMatch::prefix("b")),
        invert: true,
        missing_is_empty: true,
    };
    let policy = RbacPolicy {
        permissions: vec![Permission::And(vec![
            Permission::Or(vec![
                Permission::Header(header.clone()),
                Permission::Path(StringMatch::exact("/x")),
            ]),
            Permission::Not(Box::new(Permission::DestinationPort(80))),
            Permission::DestinationIp("10.0.0.0/8".parse().unwrap()),
            Permission::ServerName(StringMatch::suffix(".a")),
            Permission::Metadata(claim()),
            Permission::Any,
        ])],
        principals: vec![
            Principal::And(vec![
                Principal::Authenticated(Some(StringMatch::regex("spiffe://.*"))),
                Principal::Authenticated(None),
                Principal::Not(Box::new(Principal::SourceCluster(StringMatch::exact("east")))),
            ]),
            Principal::Or(vec![
                Principal::DirectRemoteIp("1.2.3.4/32".parse().unwrap()),
                Principal::RemoteIp("fd00::/8".parse().unwrap()),
                Principal::Header(header),
                Principal::Path(StringMatch::prefix("/")),
                Principal::Metadata(claim()),
            ]),
            Principal::Any,
        ],
    };
    Rbac {
        rules: Some(RbacRules {
            action: RbacAction::Deny,
            policies: BTreeMap::from([
                ("ns[a]-policy[b]-rule[0]".into(), policy.clone()),
                ("p2".into(), policy),
            ]),
        }),
        shadow: Some(RbacRules { action: RbacAction::Log, policies: BTreeMap::new() }),
        stat_prefix: "s".into(),
        shadow_stat_prefix: "t_".into(),
    }
}

fn jwt() -> JwtAuthn {
    use JwtRequirement as R;
    let remote = JwtProvider {
        issuer: "b".into(),
        jwks: JwksSource::Remote(RemoteJwks {
            uri: "https://b/keys".into(),
            cluster: "b".into(),
            timeout: Duration::from_secs(5),
            cache_duration: Duration::from_secs(300),
            async_fetch: true,
        }),
        clock_skew: Duration::from_secs(7),
        ..JwtProvider::default()
    };
    let full = JwtProvider {
        issuer: "a".into(),
        audiences: vec!["x".into()],
        subjects: Some(StringMatch::prefix("s")),
        require_expiration: true,
        max_lifetime: Some(Duration::from_secs(60)),
        jwks: JwksSource::Inline("{}".into()),
        forward: true,
        from_headers: vec![JwtHeader { name: "x-t".into(), value_prefix: "T ".into() }],
        from_params: vec!["p".into()],
        from_cookies: vec!["c".into()],
        forward_payload_header: "x-p".into(),
        pad_forward_payload_header: true,
        payload_in_metadata: "payload".into(),
        clear_route_cache: true,
        space_delimited_claims: vec!["scope".into()],
        clock_skew: Duration::from_secs(60),
        claim_to_headers: vec![JwtClaimToHeader { header: "x-c".into(), claim: "a.b".into() }],
    };
    let file = JwtProvider { jwks: JwksSource::File("/k".into()), ..JwtProvider::default() };
    let all = R::Any(vec![
        R::All(vec![R::Provider("a".into()), R::ProviderWithAudiences("b".into(), vec!["z".into()])]),
        R::AllowMissing,
        R::AllowMissingOrFailed,
        R::Always,
    ]);
    let rule = |requires| JwtRule { matches: RouteMatch::any(), requires };
    JwtAuthn {
        providers: BTreeMap::from([("a".into(), full), ("b".into(), remote), ("c".into(), file)]),
        rules: vec![
            rule(JwtRequires::Nothing),
            rule(JwtRequires::Inline(all)),
            rule(JwtRequires::Named("n".into())),
        ],
        requirements: BTreeMap::from([("n".into(), R::Provider("a".into()))]),
        bypass_cors_preflight: true,
    }
}

fn grpc_service() -> GrpcService {
    GrpcService {
        cluster: "c".into(),
        authority: "a".into(),
        timeout: Some(Duration::from_millis(30)),
        metadata: vec![("k".into(), "v".into())],
    }
}

fn collector() -> HttpCollector {
    HttpCollector {
        cluster: "c".into(),
        authority: "zipkin.ns:9411".into(),
        path: "/api/v2/spans".into(),
        timeout: Duration::from_secs(3),
        headers: vec![("k".into(), "v".into())],
    }
}

fn tracing() -> Tracing {
    let named = |name: &str| (name.to_owned(), "d".to_owned());
    let ((variable, a), (header, b)) = (named("V"), named("x-h"));
    Tracing {
        sampling: 123,
        max_path: 77,
        tags: BTreeMap::from([
            ("a".into(), TagValue::Literal("l".into())),
            ("b".into(), TagValue::Environment { name: variable, default: a }),
            ("c".into(), TagValue::Header { name: header, default: b }),
            ("d".into(), TagValue::Node(NodeText::CanonicalService)),
            ("e".into(), TagValue::Node(NodeText::Mesh)),
        ]),
        upstream_spans: true,
        provider: Some(TraceProvider::OpenTelemetry(OtlpTraces {
            to: Collector::Grpc(grpc_service()),
            service_name: "me".into(),
            environment: true,
        })),
    }
}

/// Who takes spans, in all forms that a proxy of ours takes.
fn providers() -> [Option<TraceProvider>; 4] {
    let otlp = |to| OtlpTraces { to, service_name: String::new(), environment: false };
    [
        None,
        tracing().provider,
        Some(TraceProvider::OpenTelemetry(otlp(Collector::Http(collector())))),
        Some(TraceProvider::Zipkin(ZipkinTraces { to: collector(), long_ids: true, w3c: true })),
    ]
}

#[test]
fn tracers_survive() {
    for provider in providers() {
        let t = Tracing { provider, ..tracing() };
        assert_eq!(super::telemetry::to_tracing(super::telemetry::tracing(&t)).unwrap(), t);
    }
    for provider in [
        TraceProvider::SkyWalking(grpc_service()),
        TraceProvider::Datadog { cluster: "c".into(), host: "h".into(), service_name: "s".into() },
    ] {
        let t = Tracing { provider: Some(provider), ..tracing() };
        let e = super::telemetry::to_tracing(super::telemetry::tracing(&t)).unwrap_err();
        assert!(
            format!("{e:?}").contains("provider.typed_config") && format!("{e:?}").contains("tracer"),
            "{e:?}"
        );
    }
    // The oldest form of Zipkin's, which other control planes still write, has no service.
    let mut t = super::telemetry::tracing(&tracing());
    let old = envoy_types::pb::envoy::config::trace::v3::ZipkinConfig {
        collector_cluster: "c".into(),
        collector_endpoint: "/api/v2/spans".into(),
        collector_endpoint_version: 1,
        shared_span_context: super::common::boolv(false),
        ..Default::default()
    };
    let typed =
        envoy_types::pb::envoy::config::trace::v3::tracing::http::ConfigType::TypedConfig(typed_any(&old));
    t.provider.as_mut().unwrap().config_type = Some(typed);
    let Some(TraceProvider::Zipkin(z)) = super::telemetry::to_tracing(t).unwrap().provider else { panic!() };
    assert_eq!((&*z.to.cluster, &*z.to.authority, &*z.to.path), ("c", "c", "/api/v2/spans"));
}

fn rate_limits() -> Vec<RateLimit> {
    use RateLimitAction as A;
    let headers = vec![HeaderMatch {
        name: "x".into(),
        value: HeaderValueMatch::Value(StringMatch::exact("1")),
        invert: false,
        missing_is_empty: false,
    }];
    let query = vec![QueryMatch { name: "q".into(), value: None }];
    vec![RateLimit {
        stage: 2,
        actions: vec![
            A::SourceCluster,
            A::DestinationCluster,
            A::RemoteAddress,
            A::MaskedRemoteAddress { v4: 24, v6: 64 },
            A::Header { name: "x".into(), key: "k".into(), skip_if_absent: true },
            A::Query { name: "q".into(), key: "k".into(), skip_if_absent: false },
            A::Generic { key: "generic_key".into(), value: "v".into() },
            A::HeaderMatch { key: "header_match".into(), value: "v".into(), expect: false, headers },
            A::QueryMatch { key: "z".into(), value: "v".into(), expect: true, query },
            A::Metadata {
                key: "k".into(),
                filter: "envoy.filters.http.jwt_authn".into(),
                path: vec!["payload".into(), "sub".into()],
                default: "nobody".into(),
                skip_if_absent: true,
            },
        ],
    }]
}

fn compressor() -> Compressor {
    Compressor {
        library: CompressionLibrary::Gzip { level: 9 },
        min_content_length: 100,
        content_types: vec![StringMatch::prefix("text/")],
        disable_on_etag: true,
        weaken_etag: true,
        remove_accept_encoding: true,
        uncompressible_statuses: vec![206],
    }
}

fn session() -> StatefulSession {
    let state = SessionState::Cookie { name: "s".into(), path: "/a".into(), ttl: Duration::from_secs(60) };
    StatefulSession { state: Some(state), ..StatefulSession::default() }
}

fn bucket() -> TokenBucket {
    TokenBucket { max_tokens: 10, tokens_per_fill: 2, fill_interval: Duration::from_secs(1) }
}

fn local_limit() -> LocalRateLimit {
    LocalRateLimit {
        stat_prefix: "s".into(),
        status: 503,
        bucket: Some(bucket()),
        enabled: 1_000_000,
        enforced: 500_000,
        request_headers: HeaderOps { add: vec![("a".into(), "b".into())], ..HeaderOps::default() },
        response_headers: HeaderOps { set: vec![("c".into(), "d".into())], ..HeaderOps::default() },
        descriptors: vec![LocalDescriptor { entries: vec![("k".into(), "v".into())], bucket: bucket() }],
        stage: 2,
        x_ratelimit_headers: true,
        always_consume_default: false,
        resource_exhausted: true,
        rules: vec![RateLimit { stage: 0, actions: vec![RateLimitAction::RemoteAddress] }],
        retry_after: true,
    }
}

fn global_limit() -> GlobalRateLimit {
    GlobalRateLimit {
        domain: "d".into(),
        stage: 1,
        service: grpc_service(),
        failure_mode_deny: true,
        status_on_error: 503,
        status: 420,
        resource_exhausted: true,
        x_ratelimit_headers: true,
        no_ratelimited_header: true,
        response_headers: HeaderOps { add: vec![("a".into(), "b".into())], ..HeaderOps::default() },
    }
}

fn authz_grpc() -> ExtAuthz {
    ExtAuthz {
        service: AuthzService::Grpc(grpc_service()),
        failure_mode_allow: true,
        failure_mode_allow_header_add: true,
        with_request_body: Some(BodySettings { max_bytes: 9, allow_partial: true, pack_as_bytes: true }),
        status_on_error: 503,
        allowed_headers: vec![StringMatch::prefix("x-")],
        disallowed_headers: vec![StringMatch::exact("x-y")],
        metadata_namespaces: vec!["envoy.filters.http.jwt_authn".into()],
        include_tls_session: true,
        enabled: 500_000,
        enabled_metadata: Some(claim()),
        clear_route_cache: true,
        on_routes: String::new(),
    }
}

fn authz_connection() -> ConnectionAuthz {
    ConnectionAuthz {
        stat_prefix: "a".into(),
        service: GrpcService { cluster: "c".into(), ..GrpcService::default() },
        failure_mode_allow: true,
        include_tls_session: true,
        enabled_metadata: Some(claim()),
    }
}

fn authz_http() -> ExtAuthz {
    let one = |s: &str| vec![StringMatch::exact(s)];
    let http = HttpAuthz {
        uri: "http://a/".into(),
        cluster: "c".into(),
        timeout: Duration::from_secs(1),
        path_prefix: "/check".into(),
        headers_to_add: vec![("a".into(), "b".into())],
        allowed_upstream_headers: one("u"),
        allowed_upstream_headers_to_append: one("v"),
        allowed_client_headers: one("w"),
        allowed_client_headers_on_success: one("x"),
        dynamic_metadata_from_headers: one("y"),
    };
    ExtAuthz { service: AuthzService::Http(Box::new(http)), ..ExtAuthz::default() }
}

fn claim() -> MetadataMatch {
    let exact = || ValueMatch::String(StringMatch::exact("x"));
    MetadataMatch {
        filter: "envoy.filters.http.jwt_authn".into(),
        path: vec!["payload".into(), "iss".into()],
        value: ValueMatch::Or(vec![
            exact(),
            ValueMatch::OneOf(Box::new(exact())),
            ValueMatch::Present(true),
            ValueMatch::Bool(true),
            ValueMatch::Null,
        ]),
        invert: true,
    }
}

fn ops() -> HeaderOps {
    HeaderOps {
        remove: vec!["a".into()],
        set: vec![("b".into(), "1".into())],
        add: vec![("c".into(), "2".into()), ("c".into(), "3".into())],
    }
}

fn route(name: &str, action: RouteAction) -> Route {
    Route {
        name: name.into(),
        matches: RouteMatch::any(),
        action,
        request_headers: Default::default(),
        response_headers: Default::default(),
        fault: None,
        cors: None,
        operation: String::new(),
        filters: Default::default(),
    }
}

pub(crate) fn routes() -> RouteConfiguration {
    let retry_header = HeaderMatch {
        name: "x-r".into(),
        value: HeaderValueMatch::Present(true),
        invert: false,
        missing_is_empty: false,
    };
    let rich = Route {
        matches: RouteMatch {
            path: PathMatch::Regex("/a/.*".into()),
            case_sensitive: false,
            headers: vec![
                HeaderMatch {
                    name: ":method".into(),
                    value: HeaderValueMatch::Value(StringMatch::exact("GET")),
                    invert: false,
                    missing_is_empty: false,
                },
                HeaderMatch {
                    name: "x".into(),
                    value: HeaderValueMatch::Present(false),
                    invert: false,
                    missing_is_empty: false,
                },
            ],
            query: vec![
                QueryMatch { name: "q".into(), value: Some(StringMatch::exact("1")) },
                QueryMatch { name: "r".into(), value: None },
            ],
            metadata: vec![claim(), MetadataMatch { invert: true, ..claim() }],
        },
        request_headers: ops().into(),
        response_headers: ops().into(),
        fault: Some(Box::new(Fault {
            delay: Some((Duration::from_millis(1500), 250_000)),
            abort: Some((AbortKind::Grpc(14), 1)),
        })),
        cors: Some(Box::new(Cors {
            allow_origins: vec![StringMatch::regex(".*")],
            allow_methods: "GET,POST".into(),
            allow_headers: "x-a".into(),
            expose_headers: "x-b".into(),
            max_age: "60".into(),
            allow_credentials: true,
            ignore_unmatched: true,
        })),
        operation: "svc:80/*".into(),
        filters: RouteFilters {
            jwt: Some(JwtOverride::Disabled),
            authorizers: vec!["authz/a".into(), "authz/b".into()],
            ext_proc: Some(ProcOverride::Disabled),
            ext_authz: Some(AuthzOverride::Check {
                context_extensions: BTreeMap::from([("a".into(), "b".into())]),
                no_body: true,
                with_request_body: None,
            }),
            local_rate_limit: Some(Box::new(local_limit())),
            rate_limits: rate_limits(),
            stat_prefix: "checkout".into(),
            host_rate_limits: HostRateLimits::Include,
            rate_limit: HostRateLimits::Ignore,
            buffer_limit: Some(1 << 20),
            buffer: Some(BufferOverride::Limit(9)),
            no_compression: true,
            session: Some(SessionOverride::Set(StatefulSession {
                absolute: Duration::from_millis(90_500),
                ..session()
            })),
            on_demand: Some(Some(OnDemandCluster { timeout: Duration::from_secs(2) })),
        }
        .into(),
        ..route(
            "rich",
            RouteAction::Forward(Box::new(Forward {
                cluster_header: None,
                clusters: vec![
                    WeightedCluster {
                        cluster: "a".into(),
                        weight: 80,
                        request_headers: ops().into(),
                        response_headers: ops().into(),
                    },
                    WeightedCluster { cluster: "b".into(), weight: 20, ..WeightedCluster::default() },
                ],
                timeout: Some(Duration::from_secs(3)),
                idle_timeout: Some(Duration::from_secs(9)),
                retry: Some(Box::new(RetryPolicy {
                    on: vec![
                        RetryOn::ConnectFailure,
                        RetryOn::RetriableStatusCodes,
                        RetryOn::RetriableHeaders,
                        RetryOn::EnvoyRateLimited,
                        RetryOn::Unavailable,
                    ],
                    status_codes: vec![503],
                    attempts: 2,
                    per_try_timeout: Some(Duration::from_millis(400)),
                    base_interval: Duration::from_millis(25),
                    max_interval: Duration::from_millis(250),
                    host_selection_attempts: 5,
                    per_try_idle_timeout: Some(Duration::from_secs(4)),
                    rate_limited: Some(RateLimitedBackOff {
                        headers: vec![
                            ResetHeader { name: "retry-after".into(), unix_time: false },
                            ResetHeader { name: "x-reset".into(), unix_time: true },
                        ],
                        max_interval: Duration::from_secs(60),
                    }),
                    retriable_headers: vec![retry_header.clone()],
                    retriable_request_headers: vec![retry_header],
                    leave_priorities: 2,
                })),
                hedge: true,
                max_stream: Some(StreamLimit {
                    max: Some(Duration::ZERO),
                    grpc_timeout_max: Some(Duration::from_secs(8)),
                    grpc_timeout_offset: Some(Duration::from_millis(5)),
                }),
                prefix_rewrite: None,
                regex_rewrite: Some(("^/a".into(), "/b".into())),
                host_rewrite: Some("h".into()),
                forwarded_host: true,
                mirrors: vec![Mirror { cluster: "m".into(), fraction: 1234 }],
                hash: vec![
                    HashPolicy::Header("h".into()),
                    HashPolicy::Cookie {
                        name: "c".into(),
                        path: "/".into(),
                        ttl: Some(Duration::ZERO),
                        attributes: vec![("SameSite".into(), "Lax".into()), ("Secure".into(), String::new())],
                    },
                    HashPolicy::SourceIp,
                    HashPolicy::Query("q".into()),
                ],
                connect: false,
            })),
        )
    };
    let plain = RouteAction::Forward(Box::new(Forward {
        clusters: vec![WeightedCluster::only("x")],
        prefix_rewrite: Some("/n".into()),
        ..Forward::default()
    }));
    let redirect = RouteAction::Redirect(Redirect {
        scheme: Some("https".into()),
        host: Some("h".into()),
        port: Some(8443),
        path: Some("/p".into()),
        prefix_rewrite: None,
        status: 308,
    });
    let mut exact = route("redirect", redirect);
    exact.matches.path = PathMatch::Exact("/e".into());
    let mut segment =
        route("direct", RouteAction::Direct(DirectResponse { status: 418, body: b"no".to_vec() }));
    segment.matches.path = PathMatch::SegmentPrefix("/s".into());
    let end = Forward { clusters: vec![WeightedCluster::only("inner")], connect: true, ..Forward::default() };
    let mut connect = route("connect", RouteAction::Forward(Box::new(end)));
    connect.matches.path = PathMatch::Connect;
    RouteConfiguration {
        name: "9080".into(),
        virtual_hosts: vec![VirtualHost {
            name: "v".into(),
            domains: vec!["a".into(), "*.b".into()],
            require_tls: true,
            attempt_count: true,
            routes: vec![rich, exact, segment, connect, route("plain", plain)],
            request_headers: ops().into(),
            response_headers: ops().into(),
            filters: RouteFilters {
                jwt: Some(JwtOverride::Named("n".into())),
                ext_authz: Some(AuthzOverride::Disabled),
                rate_limits: rate_limits(),
                buffer: Some(BufferOverride::Disabled),
                session: Some(SessionOverride::Disabled),
                on_demand: Some(None),
                ..RouteFilters::default()
            }
            .into(),
        }],
        on_demand: None,
    }
}

pub(crate) fn hcm_model(routes: RouteSource) -> HttpConnectionManager {
    HttpConnectionManager {
        stat_prefix: "in".into(),
        codec: HttpCodec::Auto,
        routes,
        filters: vec![
            HttpFilter::ExtAuthz(Arc::new(authz_grpc())),
            HttpFilter::ExtAuthz(Arc::new(authz_http())),
            HttpFilter::ExtAuthz(Arc::new(ExtAuthz { on_routes: "authz/a".into(), ..authz_http() })),
            HttpFilter::GrpcWeb,
            HttpFilter::Compressor(Arc::new(compressor())),
            HttpFilter::Compressor(Arc::new(Compressor::default())),
            HttpFilter::Buffer(7),
            HttpFilter::StatefulSession(Arc::new(session())),
            HttpFilter::StatefulSession(Arc::new(StatefulSession {
                state: Some(SessionState::Header("x-h".into())),
                strict: true,
                ..StatefulSession::default()
            })),
            HttpFilter::LocalRateLimit(Arc::new(local_limit())),
            HttpFilter::RateLimit(Arc::new(global_limit())),
            HttpFilter::Jwt(Arc::new(jwt())),
            HttpFilter::Rbac(rbac()),
            HttpFilter::GrpcStats,
            HttpFilter::Cors,
            HttpFilter::Fault,
        ],
        use_remote_address: true,
        trusted_hops: 2,
        forward_client_cert: ForwardClientCert::AppendForward,
        websocket: true,
        connect: true,
        server_name: "istio-envoy".into(),
        normalize_path: true,
        merge_slashes: true,
        escaped_slashes: EscapedSlashes::UnescapeAndForward,
        access_log: vec![
            AccessLog::File(FileLog {
                path: "/dev/stdout".into(),
                format: AccessLogFormat::Text(String::new()),
                omit_empty: false,
            }),
            AccessLog::File(FileLog {
                path: "/a".into(),
                format: AccessLogFormat::Text("%PROTOCOL%\n".into()),
                omit_empty: false,
            }),
            AccessLog::File(FileLog {
                path: "/b".into(),
                format: AccessLogFormat::Json(BTreeMap::from([("a".into(), "%PROTOCOL%".into())])),
                omit_empty: false,
            }),
            AccessLog::File(FileLog {
                path: "/c".into(),
                format: AccessLogFormat::Text(String::new()),
                omit_empty: true,
            }),
            AccessLog::File(FileLog {
                path: "/d".into(),
                format: AccessLogFormat::Json(BTreeMap::from([("a".into(), "%PROTOCOL%".into())])),
                omit_empty: true,
            }),
            AccessLog::Grpc(Box::new(GrpcLog {
                service: grpc_service(),
                log_name: "n".into(),
                requests: true,
                filter_state: vec!["s".into()],
                request_headers: vec!["a".into()],
                response_headers: vec!["b".into()],
                response_trailers: vec!["c".into()],
            })),
            AccessLog::Grpc(Box::new(GrpcLog {
                service: grpc_service(),
                log_name: "m".into(),
                requests: false,
                filter_state: vec![],
                request_headers: vec![],
                response_headers: vec![],
                response_trailers: vec![],
            })),
            AccessLog::Otlp(Box::new(OtlpLog {
                service: grpc_service(),
                log_name: "o".into(),
                body: "%PROTOCOL%".into(),
                attributes: BTreeMap::from([("a".into(), "%DURATION%".into())]),
            })),
        ],
        tracing: Some(Box::new(tracing())),
        idle_timeout: None,
        request_headers_timeout: Some(Duration::from_secs(7)),
        stream_idle_timeout: None,
        max_stream_duration: Some(Duration::from_secs(77)),
        accept_http_10: false,
        preserve_request_id: true,
        headers: AddedHeaders {
            request_id: false,
            forwarded_port: true,
            suppress_envoy: true,
            client_cert: ClientCertParts { subject: false, uri: true, dns: false, cert: true, chain: true },
            preserve_case: false,
        },
        limits: HttpLimits {
            request_timeout: Some(Duration::from_secs(8)),
            max_connection_duration: Some(Duration::from_secs(9)),
            drain_timeout: None,
            underscores: Underscores::Drop,
            max_concurrent_streams: Some(10),
            stream_window: Some(70_000),
            connection_window: Some(80_000),
        },
    }
}

pub(crate) fn listener() -> Listener {
    let tcp = NetworkFilter::Tcp(TcpProxy {
        stat_prefix: "t".into(),
        clusters: vec![WeightedCluster::only("a")],
        idle_timeout: Some(Duration::from_secs(60)),
        max_duration: Some(Duration::from_secs(90)),
        access_log: vec![],
        tunnel: Some(Tunneling {
            hostname: "db.local:443".into(),
            headers: vec![("x-a".into(), "b".into())],
            post: true,
        }),
        on_demand: Some(OnDemandCluster::default()),
        names: Some((NameCache::default(), 8443)),
    });
    let split = NetworkFilter::Tcp(TcpProxy {
        stat_prefix: "t".into(),
        clusters: vec![
            WeightedCluster { cluster: "a".into(), weight: 1, ..WeightedCluster::default() },
            WeightedCluster { cluster: "b".into(), weight: 3, ..WeightedCluster::default() },
        ],
        idle_timeout: None,
        max_duration: None,
        access_log: vec![],
        tunnel: None,
        on_demand: None,
        names: None,
    });
    Listener {
        name: "virtualInbound".into(),
        address: "0.0.0.0:15006".parse().unwrap(),
        bind_to_port: true,
        use_original_dst: true,
        transparent: true,
        direction: Direction::Inbound,
        inspect_tls: true,
        inspect_http: true,
        proxy_protocol: true,
        inspect_timeout: Duration::from_secs(1),
        filter_chains: vec![
            FilterChain {
                name: "mtls".into(),
                matches: FilterChainMatch {
                    destination_port: Some(9080),
                    destination_prefixes: vec!["10.0.0.1/32".parse().unwrap()],
                    server_names: vec!["*.local".into()],
                    transport_protocol: Some(TransportProtocol::Tls),
                    application_protocols: vec!["istio".into()],
                    source_prefixes: vec!["::/0".parse().unwrap()],
                },
                tls: Some(downstream_tls()),
                filters: vec![
                    NetworkFilter::Rbac(rbac()),
                    NetworkFilter::Authz(authz_connection()),
                    NetworkFilter::Http(Box::new(hcm_model(RouteSource::Inline(Arc::new(routes()))))),
                ],
            },
            FilterChain {
                name: "raw".into(),
                matches: FilterChainMatch {
                    transport_protocol: Some(TransportProtocol::RawBuffer),
                    ..FilterChainMatch::default()
                },
                tls: Some(DownstreamTls {
                    certificate: SecretRef::Files { chain: "/c".into(), key: "/k".into() },
                    client_certificate: ClientCertificate::Optional(Validation {
                        trusted: Some(SecretRef::Files { chain: "/r".into(), key: String::new() }),
                        sans: vec![],
                        crl: None,
                    }),
                    alpn: vec![],
                    min_version: TlsVersion::V1_2,
                    options: TlsServerOptions::default(),
                }),
                filters: vec![
                    NetworkFilter::Limit(ConnectionLimit { stat_prefix: "l".into(), bucket: bucket() }),
                    NetworkFilter::SniCluster,
                    split,
                ],
            },
        ],
        default_filter_chain: Some(FilterChain {
            name: "default".into(),
            matches: FilterChainMatch::default(),
            tls: None,
            filters: vec![tcp],
        }),
        access_log: vec![AccessLog::File(FileLog {
            path: "/dev/stdout".into(),
            format: AccessLogFormat::Text(String::new()),
            omit_empty: false,
        })],
        udp: None,
        quic: None,
        inspect_quic: false,
        buffer_limit: Some(77),
        max_connections: Some(700),
        mixer: Some(Box::new(Mixer { check: "m:9091".into(), report: "n:9091".into(), fail_open: true })),
    }
}

fn assignment() -> LoadAssignment {
    LoadAssignment {
        name: "outbound|80||a".into(),
        localities: vec![
            LocalityEndpoints {
                locality: Locality { region: "r".into(), zone: "z".into(), sub_zone: "s".into() },
                priority: 1,
                weight: 3,
                endpoints: vec![LbEndpoint {
                    address: "10.0.0.1".into(),
                    port: 80,
                    weight: 5,
                    health: EndpointHealth::Draining,
                    transport_labels: BTreeMap::from([
                        ("tlsMode".into(), "istio".into()),
                        ("flotilla.dev/cluster".into(), "east".into()),
                    ]),
                    workload: "a;b;c;;west".into(),
                    check: None,
                    slots: Slots::Asks(0xab),
                }],
            },
            LocalityEndpoints {
                endpoints: vec![
                    LbEndpoint {
                        address: "unix:///run/a.sock".into(),
                        port: 0,
                        weight: 1,
                        health: EndpointHealth::Healthy,
                        transport_labels: BTreeMap::new(),
                        workload: String::new(),
                        check: None,
                        slots: Slots::None,
                    },
                    LbEndpoint {
                        address: "internal:virtualInbound".into(),
                        port: 0,
                        weight: 1,
                        health: EndpointHealth::Healthy,
                        transport_labels: BTreeMap::new(),
                        workload: String::new(),
                        check: None,
                        slots: Slots::Serves([7, u32::MAX].into()),
                    },
                ],
                ..LocalityEndpoints::default()
            },
            LocalityEndpoints::default(),
        ],
        overprovisioning: 140,
    }
}

pub(crate) fn cluster() -> Cluster {
    let tls = UpstreamTls {
        certificate: Some(SecretRef::Sds("default".into())),
        validation: roots(),
        sni: "outbound_.80_._.a".into(),
        by_name: false,
        alpn: vec!["istio".into(), "h2".into()],
    };
    Cluster {
        name: "outbound|80||a".into(),
        namespace: "books".into(),
        discovery: Discovery::Eds("outbound|80||a".into()),
        lb: LbPolicy::RingHash(2048),
        connect_timeout: Duration::from_secs(10),
        http: UpstreamHttp::Http2,
        tls: None,
        tls_matches: vec![
            TransportSocketMatch {
                name: "tlsMode-istio".into(),
                labels: BTreeMap::from([("tlsMode".into(), "istio".into())]),
                tls: Some(tls.clone()),
                hbone: false,
            },
            TransportSocketMatch {
                name: "hbone".into(),
                labels: BTreeMap::from([("tunnel".into(), "http".into())]),
                tls: Some(tls),
                hbone: true,
            },
            TransportSocketMatch {
                name: "tlsMode-disabled".into(),
                labels: BTreeMap::new(),
                tls: None,
                hbone: false,
            },
        ],
        limits: CircuitBreakers {
            max_connections: 7,
            retry_budget: Some(RetryBudget {
                share: 2550,
                min_concurrency: 4,
                interval: Duration::from_millis(1500),
            }),
            ..CircuitBreakers::default()
        },
        outlier: Some(Box::new(OutlierDetection {
            consecutive_5xx: 0,
            consecutive_gateway: 5,
            interval: Duration::from_secs(1),
            base_ejection: Duration::from_secs(2),
            max_ejection: Duration::from_secs(300),
            max_percent: 100,
            error_codes: vec![429, 503],
            enforcing_gateway: 60,
            success_rate: Some(SuccessRate {
                minimum_hosts: 3,
                request_volume: 20,
                stdev_factor: 1500,
                enforcing: 90,
            }),
            failure_percentage: Some(FailurePercentage {
                threshold: 40,
                minimum_hosts: 2,
                request_volume: 9,
                enforcing: 50,
            }),
            local_origin: Some(LocalOrigin {
                consecutive: 4,
                enforcing: 80,
                success_rate: Some(SuccessRate {
                    minimum_hosts: 3,
                    request_volume: 20,
                    stdev_factor: 1500,
                    enforcing: 70,
                }),
                failure_percentage: None,
            }),
            ..OutlierDetection::default()
        })),
        health: Some(Box::new(HealthCheck {
            kind: HealthCheckKind::Http(HttpHealthCheck {
                host: "h".into(),
                path: "/live?a".into(),
                method: "HEAD".into(),
                http2: true,
                headers: vec![("x-a".into(), "b".into())],
                expected: vec![(200, 204), (301, 302)],
                retriable: vec![(500, 501)],
                service_name: Some(StringMatch::exact("s")),
            }),
            timeout: Duration::from_millis(700),
            intervals: HealthIntervals {
                healthy: Duration::from_secs(1),
                unhealthy: Duration::from_secs(2),
                failing: Duration::from_secs(3),
                recovering: Duration::from_secs(4),
                no_traffic: Duration::from_secs(5),
                no_traffic_healthy: Duration::from_secs(6),
            },
            initial_jitter: Duration::from_secs(7),
            interval_jitter: Duration::from_secs(8),
            interval_jitter_percent: 9,
            unhealthy_threshold: 3,
            healthy_threshold: 2,
            reuse_connection: false,
            alt_port: 8081,
            ignore_new_hosts: true,
        })),
        close_on_health_failure: true,
        utilization: None,
        slow_start: None,
        max_requests_per_connection: 9,
        idle_timeout: Some(Duration::from_secs(11)),
        panic_threshold: 0,
        locality_weighted: true,
        max_connection_duration: Some(Duration::from_secs(70)),
        http2: UpstreamHttp2 {
            max_concurrent_streams: 12,
            keepalive: Some(Http2Keepalive {
                interval: Duration::from_secs(20),
                timeout: Duration::from_millis(2500),
            }),
        },
        keepalive: Some(TcpKeepalive {
            time: Duration::from_secs(300),
            interval: Some(Duration::from_secs(30)),
            probes: Some(4),
        }),
        source: vec!["127.0.0.6".parse().unwrap(), "::6".parse().unwrap()],
        proxy_protocol: None,
        stat_name: String::new(),
        dns_refresh: None,
        buffer_limit: Some(78),
        preserve_case: false,
    }
}

#[test]
fn listeners_round_trip() {
    let l = listener();
    assert_eq!(decode_listener(&encode_listener(&l)).unwrap(), l);
    let mut rds = l.clone();
    rds.filter_chains[0].filters[2] = NetworkFilter::Http(Box::new(hcm_model(RouteSource::Rds("80".into()))));
    rds.use_original_dst = false;
    rds.bind_to_port = false;
    assert_eq!(decode_listener(&encode_listener(&rds)).unwrap(), rds);
}

/// Envoy counts connections in a filter of each chain; the listener's own limit is what all of them have.
#[test]
fn a_listeners_limit_is_that_of_all_its_chains() {
    use super::listener::pb::filter::ConfigType as config_type;
    use envoy_types::pb::envoy::extensions::filters::network::connection_limit::v3::ConnectionLimit;
    let wire = || super::listener::encode(&listener());
    let decoded = |l: super::listener::pb::Listener| super::listener::decode(l);
    for c in wire().filter_chains.iter().chain(&wire().default_filter_chain) {
        assert_eq!(c.filters[0].name, "envoy.filters.network.connection_limit");
    }
    // One that some chains have, or that is somebody else's.
    let mut some = wire();
    some.filter_chains[0].filters.remove(0);
    assert!(decoded(some).is_err());
    let with = |change: fn(&mut ConnectionLimit)| {
        let mut l = wire();
        for c in l.filter_chains.iter_mut().chain(&mut l.default_filter_chain) {
            let config = c.filters[0].config_type.as_mut();
            let Some(config_type::TypedConfig(a)) = config else { panic!() };
            let mut limit: ConnectionLimit = super::common::typed(a).unwrap();
            change(&mut limit);
            *a = typed_any(&limit);
        }
        decoded(l)
    };
    assert_eq!(with(|_| ()).unwrap().max_connections, Some(700));
    assert!(with(|l| l.stat_prefix = "other".into()).is_err());
    assert!(with(|l| l.max_connections = None).is_err());
    assert!(with(|l| l.delay = Some(Default::default())).is_err());
}

#[test]
fn routes_round_trip() {
    let r = routes();
    assert_eq!(decode_route(&encode_route(&r)).unwrap(), r);
}

#[test]
fn clusters_round_trip() {
    let base = cluster();
    let variants = [
        (Discovery::Static(assignment()), LbPolicy::RoundRobin, UpstreamHttp::Http1),
        (
            Discovery::StrictDns(assignment()),
            LbPolicy::LeastRequest(LeastRequest::default()),
            UpstreamHttp::Downstream,
        ),
        (Discovery::LogicalDns(assignment()), LbPolicy::Random, UpstreamHttp::Auto),
        (Discovery::OriginalDst, LbPolicy::RoundRobin, UpstreamHttp::Http1),
        (
            Discovery::ByName(NamedHosts { cache: NameCache::default(), port: 8443 }),
            LbPolicy::RoundRobin,
            UpstreamHttp::Http1,
        ),
        (Discovery::Eds(String::new()), LbPolicy::Maglev(65_537), UpstreamHttp::Http2),
    ];
    assert_eq!(decode_cluster(&encode_cluster(&base)).unwrap(), base);
    let slow_start =
        Some(SlowStart { window: Duration::from_millis(1500), aggression: 1700, min_weight: 1250 });
    for lb in [LbPolicy::RoundRobin, LbPolicy::LeastRequest(LeastRequest::default())] {
        let c = Cluster { lb, slow_start, ..base.clone() };
        assert_eq!(decode_cluster(&encode_cluster(&c)).unwrap(), c);
    }
    let kinds = [
        HealthCheckKind::Grpc(GrpcHealthCheck {
            service_name: "a.B".into(),
            authority: "x".into(),
            headers: vec![("k".into(), "v".into())],
        }),
        HealthCheckKind::Tcp(TcpHealthCheck {
            send: b"PING\0".to_vec(),
            receive: vec![b"+".to_vec(), vec![0xff]],
        }),
        HealthCheckKind::Tcp(TcpHealthCheck { send: vec![], receive: vec![] }),
    ];
    for kind in kinds {
        let health = base.health.clone().map(|h| Box::new(HealthCheck { kind, ..*h }));
        let c = Cluster { health, ..base.clone() };
        assert_eq!(decode_cluster(&encode_cluster(&c)).unwrap(), c);
    }
    let lb = LbPolicy::LeastRequest(LeastRequest { choices: 5, bias: 250 });
    let c = Cluster { lb, ..base.clone() };
    assert_eq!(decode_cluster(&encode_cluster(&c)).unwrap(), c);
    let utilization = Some(Box::new(UtilizationLb {
        error_penalty: 150,
        metrics: vec!["named_metrics.gpu".into()],
        blackout: Duration::ZERO,
        expiration: Duration::from_secs(9),
        update: Duration::from_millis(200),
    }));
    let c = Cluster { lb: LbPolicy::Utilization, utilization, ..base.clone() };
    assert_eq!(decode_cluster(&encode_cluster(&c)).unwrap(), c);
    let c = Cluster { lb: LbPolicy::PeakEwma, ..base.clone() };
    assert_eq!(decode_cluster(&encode_cluster(&c)).unwrap(), c);
    for http in [UpstreamHttp::Http1, UpstreamHttp::Downstream, UpstreamHttp::Auto] {
        let c = Cluster { http, preserve_case: true, http2: UpstreamHttp2::default(), ..base.clone() };
        assert_eq!(decode_cluster(&encode_cluster(&c)).unwrap(), c);
    }
    let c = Cluster { proxy_protocol: Some(ProxyProtocolVersion::V1), ..base.clone() };
    assert_eq!(decode_cluster(&encode_cluster(&c)).unwrap(), c);
    // The header is before every connection of a cluster or before none.
    let wire = |c| <cds::Cluster as prost::Message>::decode(&encode_cluster(c).value[..]).unwrap();
    let mut mixed = wire(&c);
    mixed.transport_socket_matches[1].transport_socket =
        wire(&base).transport_socket_matches[1].transport_socket.take();
    let e = decode_cluster(&pack(&mixed)).unwrap_err().to_string();
    assert!(e.contains("transport_socket_matches[1].transport_socket"), "{e}");
    for (discovery, lb, http) in variants {
        let c = Cluster {
            discovery,
            lb,
            http,
            tls_matches: vec![],
            tls: base.tls_matches[0].tls.clone().map(Box::new),
            outlier: None,
            max_connection_duration: None,
            http2: if http == UpstreamHttp::Http1 { UpstreamHttp2::default() } else { base.http2 },
            keepalive: None,
            source: vec![],
            proxy_protocol: Some(ProxyProtocolVersion::V2),
            idle_timeout: None,
            max_requests_per_connection: 0,
            locality_weighted: false,
            ..base.clone()
        };
        assert_eq!(decode_cluster(&encode_cluster(&c)).unwrap(), c);
    }
    // A name of TLS for each request is for hosts that are found by it.
    let mut c = Cluster {
        discovery: Discovery::ByName(NamedHosts { cache: NameCache::default(), port: 0 }),
        lb: LbPolicy::RoundRobin,
        tls: base.tls_matches[0].tls.clone().map(Box::new),
        tls_matches: vec![],
        ..base.clone()
    };
    for (sans, trusted) in [(vec![], true), (vec![StringMatch::exact("a")], true), (vec![], false)] {
        let tls = c.tls.as_mut().unwrap();
        (tls.sni, tls.by_name, tls.validation.sans) = (String::new(), true, sans);
        tls.validation.trusted = trusted.then(|| SecretRef::Sds("x".into()));
        assert_eq!(decode_cluster(&encode_cluster(&c)).unwrap(), c);
    }
    c.discovery = Discovery::Static(assignment());
    let e = decode_cluster(&encode_cluster(&c)).unwrap_err().to_string();
    assert!(e.contains("upstream_http_protocol_options"), "{e}");
}

#[test]
fn detection_has_envoys_defaults() {
    let decode = |o: cds::OutlierDetection| {
        let m = cds::Cluster { name: "c".into(), outlier_detection: Some(o), ..Default::default() };
        decode_cluster(&pack(&m)).map(|c| c.outlier.unwrap())
    };
    let o = decode(cds::OutlierDetection::default()).unwrap();
    assert_eq!((o.consecutive_5xx, o.consecutive_gateway, o.max_percent), (5, 0, 10));
    let rate = SuccessRate { minimum_hosts: 5, request_volume: 100, stdev_factor: 1900, enforcing: 100 };
    assert_eq!((o.success_rate, o.failure_percentage, o.local_origin), (Some(rate), None, None));
    let o = decode(cds::OutlierDetection {
        enforcing_success_rate: common::u32v(0),
        enforcing_failure_percentage: common::u32v(100),
        split_external_local_origin_errors: true,
        ..Default::default()
    })
    .unwrap();
    let failures = FailurePercentage { threshold: 85, minimum_hosts: 5, request_volume: 50, enforcing: 100 };
    assert_eq!((o.success_rate, o.failure_percentage), (None, Some(failures)));
    let local =
        LocalOrigin { consecutive: 5, enforcing: 100, success_rate: Some(rate), failure_percentage: None };
    assert_eq!(o.local_origin, Some(local));
    let e =
        decode(cds::OutlierDetection { detect_degraded_hosts: common::boolv(true), ..Default::default() });
    assert!(e.unwrap_err().to_string().contains("detect_degraded_hosts"));
}

#[test]
fn endpoints_round_trip() {
    let mut a = assignment();
    a.localities[0].endpoints[0].check = Some(Box::new(EndpointCheck {
        port: 8081,
        hostname: "h".into(),
        address: "10.9.9.9".into(),
        disabled: true,
    }));
    a.localities[0].endpoints[0].health = EndpointHealth::Degraded;
    assert_eq!(decode_endpoints(&encode_endpoints(&a)).unwrap(), a);
    let a = assignment();
    assert_eq!(decode_endpoints(&encode_endpoints(&a)).unwrap(), a);
}

#[test]
fn secrets_round_trip_and_do_not_print() {
    let s = Secret {
        name: "default".into(),
        kind: SecretKind::Certificate { chain: b"CHAIN".to_vec(), key: b"KEY".to_vec() },
    };
    assert_eq!(decode_secret(&encode_secret(&s)).unwrap(), s);
    assert!(!format!("{s:?}").contains("KEY"));
    let r = Secret { name: "ROOTCA".into(), kind: SecretKind::Roots(b"PEM".to_vec()) };
    assert_eq!(decode_secret(&encode_secret(&r)).unwrap(), r);
}

#[test]
fn versions_depend_on_content_alone() {
    let a = listener();
    assert_eq!(version(&a), version(&listener()));
    let mut b = a.clone();
    b.inspect_timeout = Duration::from_secs(2);
    assert_ne!(version(&a), version(&b));
}

fn error<T: std::fmt::Debug>(r: Result<T, DecodeError>, resource: &str, field: &str) {
    let e = r.unwrap_err();
    assert_eq!(e.resource, resource, "{e}");
    assert!(e.field.contains(field), "{e}");
}

#[test]
fn what_the_model_lacks_is_refused_by_name() {
    // An HTTP filter that we do not have.
    let lua = hcm::HttpFilter {
        name: "lua".into(),
        config_type: Some(hcm::http_filter::ConfigType::TypedConfig(typed_any(&Lua::default()))),
        ..Default::default()
    };
    let mut h = http::encode(&hcm_model(RouteSource::Rds("80".into())));
    h.http_filters.insert(0, lua.clone());
    let listener_with = |h: &hcm::HttpConnectionManager| lds::Listener {
        name: "l".into(),
        address: Some(common::socket_address("0.0.0.0", 80)),
        filter_chains: vec![lds::FilterChain {
            filters: vec![lds::Filter {
                name: "hcm".into(),
                config_type: Some(lds::filter::ConfigType::TypedConfig(typed_any(h))),
            }],
            ..Default::default()
        }],
        ..Default::default()
    };
    error(decode_listener(&pack(&listener_with(&h))), "l", "filter_chains[0].filters[0].http_filters[0]");
    // Unless the server says that it is optional.
    h.http_filters[0].is_optional = true;
    decode_listener(&pack(&listener_with(&h))).unwrap();

    let cases: Vec<(cds::Cluster, &str)> = vec![
        (
            cds::Cluster { health_checks: vec![core::HealthCheck::default()], ..Default::default() },
            "health_checks",
        ),
        (cds::Cluster { lb_policy: 7, ..Default::default() }, "lb_policy"),
        (
            cds::Cluster {
                cluster_discovery_type: Some(cds::cluster::ClusterDiscoveryType::ClusterType(
                    cds::cluster::CustomClusterType::default(),
                )),
                ..Default::default()
            },
            "cluster_type",
        ),
    ];
    for (mut c, field) in cases {
        c.name = "c".into();
        error(decode_cluster(&pack(&c)), "c", field);
    }

    let mut r = route::encode(&routes());
    r.virtual_hosts[0].routes[3].action = Some(rds::route::Action::Route(rds::RouteAction {
        cluster_specifier: Some(rds::route_action::ClusterSpecifier::ClusterHeader(String::new())),
        ..Default::default()
    }));
    error(decode_route(&pack(&r)), "9080", "virtual_hosts[0].routes[3].route.cluster_header");
    assert!(decode_route(&encode_cluster(&cluster())).unwrap_err().field.contains("type_url"));
}

proptest! {
    /// Whatever bytes come, decoding returns.
    #[test]
    fn garbage_is_an_error_not_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), flip in 0usize..4000) {
        for (t, good) in [
            (crate::type_url::LDS, encode_listener(&listener())),
            (crate::type_url::CDS, encode_cluster(&cluster())),
            (crate::type_url::RDS, encode_route(&routes())),
        ] {
            let raw = crate::pb::Any { type_url: t.to_owned(), value: bytes.clone().into() };
            let _ = (decode_listener(&raw), decode_cluster(&raw), decode_route(&raw), decode_endpoints(&raw));
            let mut mutated = good.value.to_vec();
            let at = flip % mutated.len();
            mutated[at] ^= bytes.first().copied().unwrap_or(1);
            let raw = crate::pb::Any { type_url: t.to_owned(), value: mutated.into() };
            let _ = (decode_listener(&raw), decode_cluster(&raw), decode_route(&raw));
        }
    }
}

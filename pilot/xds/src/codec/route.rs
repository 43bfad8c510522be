//! Route configurations.

mod retry;

use std::{collections::HashMap, time::Duration};

pub(super) use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::{
    config::{core::v3 as core, route::v3 as r},
    extensions::filters::{
        common::fault::v3 as fault_common,
        http::{cors::v3 as cors, fault::v3 as fault},
    },
    r#type::matcher::v3 as matcher,
};
use envoy_types::pb::{
    envoy::extensions::filters::http::{
        buffer::v3::BufferPerRoute, compressor::v3::CompressorPerRoute, ext_authz::v3::ExtAuthzPerRoute,
        ext_proc::v3::ExtProcPerRoute, jwt_authn::v3::PerRouteConfig as JwtPerRoute,
        local_ratelimit::v3::LocalRateLimit, on_demand::v3::PerRouteConfig as OnDemandPerRoute,
        ratelimit::v3::RateLimitPerRoute, stateful_session::v3::StatefulSessionPerRoute,
    },
    google::protobuf as gp,
};
use mesh_model::proxy::{
    AbortKind, Cors, DirectResponse, Fault, Forward, HashPolicy, HostRateLimits, Mirror, PathMatch,
    QueryMatch, Redirect, Route, RouteAction, RouteConfiguration, RouteFilters, RouteMatch, SessionOverride,
    StreamLimit, VirtualHost, WeightedCluster,
};

use prost::Message as _;

use self::retry::{retry, to_retry};
use super::{
    At, Bad, Res, body, common::*, each, ext_authz, ext_proc, http::CONNECT, jwt, on_demand, on_route,
    rate_limit, refuse, split,
};

pub(super) const CORS: &str = "envoy.filters.http.cors";
pub(super) const FAULT: &str = "envoy.filters.http.fault";
pub(super) const EXT_AUTHZ: &str = "envoy.filters.http.ext_authz";
pub(super) const EXT_PROC: &str = "envoy.filters.http.ext_proc";
pub(super) const LOCAL_RATE_LIMIT: &str = "envoy.filters.http.local_ratelimit";
pub(super) const RATE_LIMIT: &str = "envoy.filters.http.ratelimit";
pub(super) const COMPRESSOR: &str = "envoy.filters.http.compressor";
pub(super) const BUFFER: &str = "envoy.filters.http.buffer";
pub(super) const SESSION: &str = "envoy.filters.http.stateful_session";
pub(super) const JWT: &str = "envoy.filters.http.jwt_authn";
/// Envoy's timeout of a route that sets none.
const ROUTE_TIMEOUT: Duration = Duration::from_secs(15);

pub(super) fn encode(c: &RouteConfiguration) -> pb::RouteConfiguration {
    pb::RouteConfiguration {
        name: c.name.clone(),
        virtual_hosts: c.virtual_hosts.iter().map(virtual_host).collect(),
        vhds: on_demand::vhds(c.on_demand.as_ref()),
        // Clusters may arrive after the routes that name them.
        validate_clusters: boolv(false),
        ..Default::default()
    }
}

fn decode(m: pb::RouteConfiguration) -> Res<RouteConfiguration> {
    refuse!(m;
        internal_only_headers, response_headers_to_add, response_headers_to_remove,
        request_headers_to_add, request_headers_to_remove, cluster_specifier_plugins,
        request_mirror_policies, ignore_port_in_host_matching, vhost_header,
        ignore_path_parameters_in_path_matching, typed_per_filter_config, route_specifiers
    );
    Ok(RouteConfiguration {
        name: m.name,
        virtual_hosts: each("virtual_hosts", m.virtual_hosts, to_virtual_host)?,
        on_demand: on_demand::to_vhds(m.vhds)?,
    })
}

/// Decodes the message, one virtual host at a time. An error comes with the resource's name.
pub(super) fn from_wire(bytes: &[u8]) -> Result<RouteConfiguration, (String, Bad)> {
    /// `virtual_hosts` of `RouteConfiguration`.
    const VIRTUAL_HOSTS: u64 = 2;
    let damaged = |e: prost::DecodeError| Bad::new("", e.to_string());
    let (rest, hosts) = split::take(bytes, VIRTUAL_HOSTS).map_err(|b| (String::new(), b))?;
    let rest = pb::RouteConfiguration::decode(rest.as_slice()).map_err(|e| (String::new(), damaged(e)))?;
    let name = rest.name.clone();
    let host = |b: &[u8]| to_virtual_host(pb::VirtualHost::decode(b).map_err(damaged)?);
    let all = || {
        let mut out = decode(rest)?;
        out.virtual_hosts = each("virtual_hosts", hosts, host)?;
        Ok(out)
    };
    all().map_err(|b| (name, b))
}

pub(super) fn virtual_host(v: &VirtualHost) -> pb::VirtualHost {
    use r::virtual_host::TlsRequirementType as T;
    let (request_headers_to_add, request_headers_to_remove) = header_ops(&v.request_headers);
    let (response_headers_to_add, response_headers_to_remove) = header_ops(&v.response_headers);
    pb::VirtualHost {
        name: v.name.clone(),
        domains: v.domains.clone(),
        routes: v.routes.iter().map(route).collect(),
        require_tls: if v.require_tls { T::All } else { T::None }.into(),
        include_request_attempt_count: v.attempt_count,
        request_headers_to_add,
        request_headers_to_remove,
        response_headers_to_add,
        response_headers_to_remove,
        typed_per_filter_config: filters(&v.filters),
        rate_limits: rate_limit::rules(&v.filters.rate_limits),
        request_body_buffer_limit: v.filters.buffer_limit.map(|value| gp::UInt64Value { value }),
        ..Default::default()
    }
}

#[allow(deprecated)]
pub(super) fn to_virtual_host(v: pb::VirtualHost) -> Res<VirtualHost> {
    use r::virtual_host::TlsRequirementType as T;
    refuse!(v;
        matcher, cors, retry_policy, retry_policy_typed_config,
        hedge_policy, request_mirror_policies, route_specifiers
    );
    let (mut filters, rest) = to_filters(v.typed_per_filter_config)?;
    filters.rate_limits = rate_limit::to_rules(v.rate_limits)?;
    filters.buffer_limit = buffer_limit(v.request_body_buffer_limit, v.per_request_buffer_limit_bytes);
    if rest != (None, None) {
        return Err(Bad::unsupported("typed_per_filter_config", "a fault or CORS policy of a virtual host"));
    }
    let require_tls = match T::try_from(v.require_tls) {
        Ok(T::None) => false,
        Ok(T::All) => true,
        _ => return Err(Bad::unsupported("require_tls", "EXTERNAL_ONLY")),
    };
    Ok(VirtualHost {
        name: v.name,
        domains: v.domains,
        require_tls,
        attempt_count: v.include_request_attempt_count,
        routes: each("routes", v.routes, to_route)?,
        request_headers: to_header_ops(v.request_headers_to_add, v.request_headers_to_remove)?.into(),
        response_headers: to_header_ops(v.response_headers_to_add, v.response_headers_to_remove)?.into(),
        filters: filters.into(),
    })
}

/// Settings of filters by the filters' names.
fn filters(f: &RouteFilters) -> HashMap<String, gp::Any> {
    let mut out = HashMap::new();
    if let Some(j) = &f.jwt {
        out.insert(JWT.to_owned(), any(&jwt::per_route(j)));
    }
    if let Some(e) = &f.ext_authz {
        out.insert(EXT_AUTHZ.to_owned(), any(&ext_authz::per_route(e)));
    }
    on_route::authorizers(&f.authorizers, &mut out);
    if let Some(e) = &f.ext_proc {
        out.insert(EXT_PROC.to_owned(), any(&ext_proc::per_route(e)));
    }
    if let Some(b) = f.buffer {
        out.insert(BUFFER.to_owned(), any(&body::buffer_per_route(b)));
    }
    if f.no_compression {
        out.insert(COMPRESSOR.to_owned(), any(&body::compressor_off()));
    }
    if let Some(s) = &f.session {
        out.insert(SESSION.to_owned(), any(&body::session_per_route(s)));
        on_route::session_end(s, &mut out);
    }
    if let Some(o) = f.on_demand {
        out.insert(on_demand::FILTER.to_owned(), any(&on_demand::per_route(o)));
    }
    if let Some(l) = &f.local_rate_limit {
        out.insert(LOCAL_RATE_LIMIT.to_owned(), any(&rate_limit::local(l)));
    }
    if f.rate_limit != HostRateLimits::default() {
        out.insert(RATE_LIMIT.to_owned(), any(&rate_limit::per_route(f.rate_limit)));
    }
    out
}

/// Reverse of [`filters`], with those that only routes have. A filter may have any name; the type says which
/// it is.
fn to_filters(all: HashMap<String, gp::Any>) -> Res<(RouteFilters, (Option<Fault>, Option<Cors>))> {
    let mut out = RouteFilters::default();
    let (mut fault, mut cors, mut session_end) = (None, None, Duration::ZERO);
    for (name, a) in all {
        let field = format!("typed_per_filter_config[{name}]");
        if is::<r::FilterConfig>(&a) {
            let config = typed(&a).at(&field)?;
            on_route::decode(name, config, &mut out.authorizers, &mut session_end).at(&field)?;
        } else if is::<fault::HttpFault>(&a) {
            fault = Some(to_fault(typed(&a).at(&field)?).at(&field)?);
        } else if is::<cors::CorsPolicy>(&a) {
            cors = Some(to_cors(typed(&a).at(&field)?).at(&field)?);
        } else if is::<ExtAuthzPerRoute>(&a) {
            out.ext_authz = Some(ext_authz::to_per_route(typed(&a).at(&field)?).at(&field)?);
        } else if is::<ExtProcPerRoute>(&a) {
            out.ext_proc = Some(ext_proc::to_per_route(typed(&a).at(&field)?).at(&field)?);
        } else if is::<LocalRateLimit>(&a) {
            let l = rate_limit::to_local(typed(&a).at(&field)?).at(&field)?;
            out.local_rate_limit = Some(Box::new(l));
        } else if is::<RateLimitPerRoute>(&a) {
            out.rate_limit = rate_limit::to_per_route(typed(&a).at(&field)?).at(&field)?;
        } else if is::<BufferPerRoute>(&a) {
            out.buffer = Some(body::to_buffer_per_route(typed(&a).at(&field)?).at(&field)?);
        } else if is::<CompressorPerRoute>(&a) {
            body::to_compressor_off(typed(&a).at(&field)?).at(&field)?;
            out.no_compression = true;
        } else if is::<StatefulSessionPerRoute>(&a) {
            out.session = Some(body::to_session_per_route(typed(&a).at(&field)?).at(&field)?);
        } else if is::<OnDemandPerRoute>(&a) {
            out.on_demand = Some(on_demand::to_per_route(typed(&a).at(&field)?).at(&field)?);
        } else if is::<JwtPerRoute>(&a) {
            out.jwt = Some(jwt::to_per_route(typed(&a).at(&field)?).at(&field)?);
        } else {
            return Err(Bad::unsupported(field, "this filter"));
        }
    }
    // Entries come in any order.
    out.authorizers.sort();
    if let Some(SessionOverride::Set(s)) = &mut out.session {
        s.absolute = session_end;
    }
    Ok((out, (fault, cors)))
}

#[allow(deprecated)] // Envoy still reads it, and has nothing in its place.
fn route(m: &Route) -> pb::Route {
    let (request_headers_to_add, request_headers_to_remove) = header_ops(&m.request_headers);
    let (response_headers_to_add, response_headers_to_remove) = header_ops(&m.response_headers);
    let mut filters = filters(&m.filters);
    if let Some(f) = &m.fault {
        filters.insert(FAULT.to_owned(), any(&fault(f)));
    }
    if let Some(c) = &m.cors {
        filters.insert(CORS.to_owned(), any(&cors_policy(c)));
    }
    let action = match &m.action {
        RouteAction::Forward(f) => r::route::Action::Route(r::RouteAction {
            rate_limits: rate_limit::rules(&m.filters.rate_limits),
            include_vh_rate_limits: (m.filters.host_rate_limits == HostRateLimits::Include)
                .then_some(gp::BoolValue { value: true }),
            ..forward(f)
        }),
        RouteAction::Redirect(d) => r::route::Action::Redirect(redirect(d)),
        RouteAction::Direct(d) => r::route::Action::DirectResponse(direct(d)),
    };
    pb::Route {
        name: m.name.clone(),
        stat_prefix: m.filters.stat_prefix.clone(),
        r#match: Some(route_match(&m.matches)),
        decorator: (!m.operation.is_empty())
            .then(|| r::Decorator { operation: m.operation.clone(), ..Default::default() }),
        typed_per_filter_config: filters,
        request_body_buffer_limit: m.filters.buffer_limit.map(|value| gp::UInt64Value { value }),
        request_headers_to_add,
        request_headers_to_remove,
        response_headers_to_add,
        response_headers_to_remove,
        action: Some(action),
        ..Default::default()
    }
}

/// Bytes that are kept of a body, in the field's newer or older form.
fn buffer_limit(new: Option<gp::UInt64Value>, old: Option<gp::UInt32Value>) -> Option<u64> {
    new.map(|v| v.value).or(old.map(|v| u64::from(v.value)))
}

#[allow(deprecated)]
fn to_route(m: pb::Route) -> Res<Route> {
    refuse!(m; tracing, route_specifiers);
    let (mut filters, rest) = to_filters(m.typed_per_filter_config)?;
    filters.buffer_limit = buffer_limit(m.request_body_buffer_limit, m.per_request_buffer_limit_bytes);
    filters.stat_prefix = m.stat_prefix;
    let action = match m.action {
        Some(r::route::Action::Route(mut a)) => {
            let rules = std::mem::take(&mut a.rate_limits);
            filters.rate_limits = rate_limit::to_rules(rules).at("route")?;
            if bool_or(a.include_vh_rate_limits, false) {
                filters.host_rate_limits = HostRateLimits::Include;
            }
            RouteAction::Forward(Box::new(to_forward(a).at("route")?))
        }
        Some(r::route::Action::Redirect(a)) => RouteAction::Redirect(to_redirect(a).at("redirect")?),
        Some(r::route::Action::DirectResponse(a)) => RouteAction::Direct(to_direct(a).at("direct_response")?),
        Some(_) => return Err(Bad::unsupported("action", "this kind of action")),
        None => return Err(Bad::new("action", "is missing")),
    };
    Ok(Route {
        name: m.name,
        matches: to_route_match(m.r#match.unwrap_or_default()).at("match")?,
        action,
        request_headers: to_header_ops(m.request_headers_to_add, m.request_headers_to_remove)?.into(),
        response_headers: to_header_ops(m.response_headers_to_add, m.response_headers_to_remove)?.into(),
        fault: rest.0.map(Box::new),
        cors: rest.1.map(Box::new),
        filters: filters.into(),
        operation: m.decorator.map(|d| d.operation).unwrap_or_default(),
    })
}

pub(super) fn route_match(m: &RouteMatch) -> r::RouteMatch {
    use r::route_match::PathSpecifier as P;
    let path = match &m.path {
        PathMatch::Prefix(p) => P::Prefix(p.clone()),
        PathMatch::SegmentPrefix(p) => P::PathSeparatedPrefix(p.clone()),
        PathMatch::Exact(p) => P::Path(p.clone()),
        PathMatch::Regex(p) => P::SafeRegex(regex(p)),
        PathMatch::Connect => P::ConnectMatcher(r::route_match::ConnectMatcher::default()),
    };
    r::RouteMatch {
        case_sensitive: boolv(m.case_sensitive),
        headers: m.headers.iter().map(header_match).collect(),
        query_parameters: m.query.iter().map(query_match).collect(),
        dynamic_metadata: m.metadata.iter().map(metadata_match).collect(),
        path_specifier: Some(path),
        ..Default::default()
    }
}

pub(super) fn to_route_match(m: r::RouteMatch) -> Res<RouteMatch> {
    use r::route_match::PathSpecifier as P;
    refuse!(m; runtime_fraction, cookies, grpc, tls_context, filter_state);
    let path = match m.path_specifier {
        Some(P::Prefix(p)) => PathMatch::Prefix(p),
        Some(P::PathSeparatedPrefix(p)) => PathMatch::SegmentPrefix(p),
        Some(P::Path(p)) => PathMatch::Exact(p),
        Some(P::SafeRegex(p)) => PathMatch::Regex(p.regex),
        Some(P::ConnectMatcher(_)) => PathMatch::Connect,
        Some(P::PathMatchPolicy(p)) => {
            return Err(Bad::unsupported("path_match_policy", format_args!("extension {:?}", p.name)));
        }
        None => return Err(Bad::new("path_specifier", "is missing")),
    };
    Ok(RouteMatch {
        path,
        case_sensitive: bool_or(m.case_sensitive, true),
        headers: each("headers", m.headers, to_header_match)?,
        query: each("query_parameters", m.query_parameters, to_query_match)?,
        metadata: each("dynamic_metadata", m.dynamic_metadata, to_metadata_match)?,
    })
}

pub(super) fn query_match(q: &QueryMatch) -> r::QueryParameterMatcher {
    use r::query_parameter_matcher::QueryParameterMatchSpecifier as S;
    let spec = q.value.as_ref().map_or(S::PresentMatch(true), |m| S::StringMatch(string_match(m)));
    r::QueryParameterMatcher { name: q.name.clone(), query_parameter_match_specifier: Some(spec) }
}

pub(super) fn to_query_match(q: r::QueryParameterMatcher) -> Res<QueryMatch> {
    use r::query_parameter_matcher::QueryParameterMatchSpecifier as S;
    let value = match q.query_parameter_match_specifier {
        Some(S::StringMatch(m)) => Some(to_string_match(m).at("string_match")?),
        Some(S::PresentMatch(true)) | None => None,
        Some(S::PresentMatch(false)) => return Err(Bad::unsupported("present_match", "false")),
    };
    Ok(QueryMatch { name: q.name, value })
}

fn substitute((pattern, substitution): &(String, String)) -> matcher::RegexMatchAndSubstitute {
    matcher::RegexMatchAndSubstitute { pattern: Some(regex(pattern)), substitution: substitution.clone() }
}

fn weighted(c: &WeightedCluster) -> r::weighted_cluster::ClusterWeight {
    let (request_headers_to_add, request_headers_to_remove) = header_ops(&c.request_headers);
    let (response_headers_to_add, response_headers_to_remove) = header_ops(&c.response_headers);
    r::weighted_cluster::ClusterWeight {
        name: c.cluster.clone(),
        weight: u32v(c.weight),
        request_headers_to_add,
        request_headers_to_remove,
        response_headers_to_add,
        response_headers_to_remove,
        ..Default::default()
    }
}

fn to_weighted(c: r::weighted_cluster::ClusterWeight) -> Res<WeightedCluster> {
    refuse!(c; cluster_header, metadata_match, typed_per_filter_config, host_rewrite_specifier);
    Ok(WeightedCluster {
        cluster: c.name,
        weight: c.weight.map_or(0, |w| w.value),
        request_headers: to_header_ops(c.request_headers_to_add, c.request_headers_to_remove)?.into(),
        response_headers: to_header_ops(c.response_headers_to_add, c.response_headers_to_remove)?.into(),
    })
}

fn forward(f: &Forward) -> r::RouteAction {
    use r::route_action::{ClusterSpecifier as C, HostRewriteSpecifier as H};
    let cluster = match f.clusters.as_slice() {
        [] if f.cluster_header.is_some() => C::ClusterHeader(f.cluster_header.clone().unwrap_or_default()),
        [one] if *one == WeightedCluster::only(one.cluster.clone()) => C::Cluster(one.cluster.clone()),
        many => C::WeightedClusters(r::WeightedCluster {
            clusters: many.iter().map(weighted).collect(),
            ..Default::default()
        }),
    };
    let mirror = |m: &Mirror| r::route_action::RequestMirrorPolicy {
        cluster: m.cluster.clone(),
        runtime_fraction: Some(core::RuntimeFractionalPercent {
            default_value: Some(ppm(m.fraction)),
            ..Default::default()
        }),
        ..Default::default()
    };
    r::RouteAction {
        prefix_rewrite: f.prefix_rewrite.clone().unwrap_or_default(),
        regex_rewrite: f.regex_rewrite.as_ref().map(substitute),
        timeout: zero_off(f.timeout),
        idle_timeout: f.idle_timeout.map(duration),
        retry_policy: f.retry.as_deref().map(retry),
        hedge_policy: f
            .hedge
            .then(|| r::HedgePolicy { hedge_on_per_try_timeout: true, ..Default::default() }),
        max_stream_duration: f.max_stream.map(|l| r::route_action::MaxStreamDuration {
            max_stream_duration: l.max.map(duration),
            grpc_timeout_header_max: l.grpc_timeout_max.map(duration),
            grpc_timeout_header_offset: l.grpc_timeout_offset.map(duration),
        }),
        request_mirror_policies: f.mirrors.iter().map(mirror).collect(),
        hash_policy: f.hash.iter().map(hash).collect(),
        cluster_specifier: Some(cluster),
        host_rewrite_specifier: f.host_rewrite.clone().map(H::HostRewriteLiteral),
        append_x_forwarded_host: f.forwarded_host,
        upgrade_configs: if f.connect {
            vec![r::route_action::UpgradeConfig {
                upgrade_type: CONNECT.to_owned(),
                connect_config: Some(r::route_action::upgrade_config::ConnectConfig::default()),
                ..Default::default()
            }]
        } else {
            vec![]
        },
        ..Default::default()
    }
}

#[allow(deprecated)]
fn to_forward(a: r::RouteAction) -> Res<Forward> {
    use r::route_action::{ClusterSpecifier as C, HostRewriteSpecifier as H};
    refuse!(a;
        metadata_match, path_rewrite_policy, path_rewrite, early_data_policy, retry_policy_typed_config,
        priority, cors, internal_redirect_policy, internal_redirect_action
    );
    let mut cluster_header = None;
    let clusters = match a.cluster_specifier {
        Some(C::Cluster(c)) => vec![WeightedCluster::only(c)],
        Some(C::WeightedClusters(w)) => each("weighted_clusters.clusters", w.clusters, to_weighted)?,
        Some(C::ClusterHeader(h)) if h.is_empty() => return Err(Bad::new("cluster_header", "is empty")),
        Some(C::ClusterHeader(h)) => {
            cluster_header = Some(h.to_ascii_lowercase());
            vec![]
        }
        Some(_) => return Err(Bad::unsupported("cluster_specifier", "a cluster specifier extension")),
        None => return Err(Bad::new("cluster_specifier", "is missing")),
    };
    let host_rewrite = match a.host_rewrite_specifier {
        None => None,
        Some(H::HostRewriteLiteral(h)) => Some(h),
        Some(_) => return Err(Bad::unsupported("host_rewrite_specifier", "a rewrite that is not literal")),
    };
    let hedge = match a.hedge_policy {
        None => false,
        Some(h) => {
            refuse!(h; initial_requests, additional_request_chance);
            h.hedge_on_per_try_timeout
        }
    };
    let limit = |l: r::route_action::MaxStreamDuration| {
        Ok(StreamLimit {
            max: opt(l.max_stream_duration)?,
            grpc_timeout_max: opt(l.grpc_timeout_header_max)?,
            grpc_timeout_offset: opt(l.grpc_timeout_header_offset)?,
        })
    };
    let max_stream = a.max_stream_duration.map(limit).transpose().at("max_stream_duration")?;
    let mirror = |m: r::route_action::RequestMirrorPolicy| {
        refuse!(m; cluster_header, request_headers_mutations, host_rewrite_literal);
        let fraction = m.runtime_fraction.and_then(|f| f.default_value).map_or(1_000_000, |f| to_ppm(&f));
        Ok(Mirror { cluster: m.cluster, fraction })
    };
    let mut connect = false;
    for (i, u) in a.upgrade_configs.into_iter().enumerate() {
        let field = format!("upgrade_configs[{i}]");
        if !u.upgrade_type.eq_ignore_ascii_case(CONNECT) || !bool_or(u.enabled, true) {
            return Err(Bad::unsupported(field, format_args!("{:?} by route", u.upgrade_type)));
        }
        let Some(c) = u.connect_config else {
            return Err(Bad::unsupported(field, "a CONNECT that is passed on (no connect_config)"));
        };
        refuse!(c; proxy_protocol_config, allow_post);
        connect = true;
    }
    if connect && cluster_header.is_some() {
        return Err(Bad::unsupported("cluster_header", "a cluster from a header beside a connect_config"));
    }
    let regex_rewrite = a.regex_rewrite.map(|s| (s.pattern.unwrap_or_default().regex, s.substitution));
    Ok(Forward {
        clusters,
        cluster_header,
        timeout: or_off(a.timeout, ROUTE_TIMEOUT).at("timeout")?,
        idle_timeout: opt(a.idle_timeout).at("idle_timeout")?,
        retry: a.retry_policy.map(to_retry).transpose().at("retry_policy")?.map(Box::new),
        prefix_rewrite: (!a.prefix_rewrite.is_empty()).then_some(a.prefix_rewrite),
        regex_rewrite,
        host_rewrite,
        forwarded_host: a.append_x_forwarded_host,
        mirrors: each("request_mirror_policies", a.request_mirror_policies, mirror)?,
        hash: each("hash_policy", a.hash_policy, to_hash)?,
        hedge,
        max_stream,
        connect,
    })
}

fn hash(h: &HashPolicy) -> r::route_action::HashPolicy {
    use r::route_action::hash_policy as p;
    let spec = match h {
        HashPolicy::Header(n) => {
            p::PolicySpecifier::Header(p::Header { header_name: n.clone(), ..Default::default() })
        }
        HashPolicy::Cookie { name, path, ttl, attributes } => p::PolicySpecifier::Cookie(p::Cookie {
            name: name.clone(),
            path: path.clone(),
            ttl: ttl.map(duration),
            attributes: attributes
                .iter()
                .map(|(name, value)| p::CookieAttribute { name: name.clone(), value: value.clone() })
                .collect(),
        }),
        HashPolicy::SourceIp => {
            p::PolicySpecifier::ConnectionProperties(p::ConnectionProperties { source_ip: true })
        }
        HashPolicy::Query(n) => p::PolicySpecifier::QueryParameter(p::QueryParameter { name: n.clone() }),
    };
    r::route_action::HashPolicy { terminal: false, policy_specifier: Some(spec) }
}

fn to_hash(h: r::route_action::HashPolicy) -> Res<HashPolicy> {
    use r::route_action::hash_policy::PolicySpecifier as S;
    refuse!(h; terminal);
    Ok(match h.policy_specifier {
        Some(S::Header(p)) => {
            refuse!(p; regex_rewrite);
            HashPolicy::Header(p.header_name)
        }
        Some(S::Cookie(p)) => {
            let attributes = each("attributes", p.attributes, |a| {
                // They go into a header as they are.
                let bad = |s: &str| s.bytes().any(|b| b.is_ascii_control() || b == b';');
                if bad(&a.name) || bad(&a.value) {
                    return Err(Bad::new("name", "an attribute has a control character or a semicolon"));
                }
                Ok((a.name, a.value))
            })?;
            HashPolicy::Cookie { name: p.name, path: p.path, ttl: opt(p.ttl)?, attributes }
        }
        Some(S::ConnectionProperties(p)) if p.source_ip => HashPolicy::SourceIp,
        Some(S::QueryParameter(p)) => HashPolicy::Query(p.name),
        Some(S::FilterState(_)) => return Err(Bad::unsupported("filter_state", "hashing filter state")),
        Some(S::ConnectionProperties(_)) | None => return Err(Bad::new("policy_specifier", "is missing")),
    })
}

const REDIRECTS: &[(u16, r::redirect_action::RedirectResponseCode)] = {
    use r::redirect_action::RedirectResponseCode as C;
    &[
        (301, C::MovedPermanently),
        (302, C::Found),
        (303, C::SeeOther),
        (307, C::TemporaryRedirect),
        (308, C::PermanentRedirect),
    ]
};

fn redirect(d: &Redirect) -> r::RedirectAction {
    use r::redirect_action::{
        PathRewriteSpecifier as P, RedirectResponseCode as C, SchemeRewriteSpecifier as S,
    };
    let code = REDIRECTS.iter().find(|(n, _)| *n == d.status).map_or(C::MovedPermanently, |(_, c)| *c);
    let path = match (&d.path, &d.prefix_rewrite) {
        (Some(p), _) => Some(P::PathRedirect(p.clone())),
        (None, Some(p)) => Some(P::PrefixRewrite(p.clone())),
        (None, None) => None,
    };
    r::RedirectAction {
        host_redirect: d.host.clone().unwrap_or_default(),
        port_redirect: d.port.map_or(0, u32::from),
        response_code: code.into(),
        scheme_rewrite_specifier: d.scheme.clone().map(S::SchemeRedirect),
        path_rewrite_specifier: path,
        ..Default::default()
    }
}

fn to_redirect(a: r::RedirectAction) -> Res<Redirect> {
    use r::redirect_action::{
        PathRewriteSpecifier as P, RedirectResponseCode as C, SchemeRewriteSpecifier as S,
    };
    refuse!(a; strip_query);
    let code =
        C::try_from(a.response_code).map_err(|_| Bad::unsupported("response_code", a.response_code))?;
    let (path, prefix_rewrite) = match a.path_rewrite_specifier {
        None => (None, None),
        Some(P::PathRedirect(p)) => (Some(p), None),
        Some(P::PrefixRewrite(p)) => (None, Some(p)),
        Some(P::RegexRewrite(_)) => return Err(Bad::unsupported("regex_rewrite", "a regex in a redirect")),
        Some(P::PathRewrite(_)) => return Err(Bad::unsupported("path_rewrite", "a template in a redirect")),
    };
    Ok(Redirect {
        scheme: match a.scheme_rewrite_specifier {
            None | Some(S::HttpsRedirect(false)) => None,
            Some(S::HttpsRedirect(true)) => Some("https".to_owned()),
            Some(S::SchemeRedirect(s)) => Some(s),
        },
        host: (!a.host_redirect.is_empty()).then_some(a.host_redirect),
        port: match a.port_redirect {
            0 => None,
            p => Some(u16::try_from(p).map_err(|_| Bad::new("port_redirect", "is above 65535"))?),
        },
        path,
        prefix_rewrite,
        // The table lists every value of the enumeration.
        status: REDIRECTS.iter().find(|(_, c)| *c == code).map_or(301, |(n, _)| *n),
    })
}

fn direct(d: &DirectResponse) -> r::DirectResponseAction {
    let body = (!d.body.is_empty()).then(|| core::DataSource {
        specifier: Some(core::data_source::Specifier::InlineBytes(d.body.clone())),
        ..Default::default()
    });
    r::DirectResponseAction { status: u32::from(d.status), body, ..Default::default() }
}

fn to_direct(a: r::DirectResponseAction) -> Res<DirectResponse> {
    use core::data_source::Specifier as S;
    refuse!(a; body_format);
    let body = match a.body.and_then(|b| b.specifier) {
        None => vec![],
        Some(S::InlineBytes(b)) => b,
        Some(S::InlineString(s)) => s.into_bytes(),
        Some(_) => return Err(Bad::unsupported("body", "a body that is not inline")),
    };
    Ok(DirectResponse { status: status_code(a.status)?, body })
}

fn fault(f: &Fault) -> fault::HttpFault {
    let delay = f.delay.map(|(d, n)| fault_common::FaultDelay {
        percentage: Some(ppm(n)),
        fault_delay_secifier: Some(fault_common::fault_delay::FaultDelaySecifier::FixedDelay(duration(d))),
    });
    let abort = f.abort.map(|(kind, n)| {
        use fault::fault_abort::ErrorType as E;
        let error = match kind {
            AbortKind::Http(s) => E::HttpStatus(u32::from(s)),
            AbortKind::Grpc(s) => E::GrpcStatus(s),
        };
        fault::FaultAbort { percentage: Some(ppm(n)), error_type: Some(error), ..Default::default() }
    });
    fault::HttpFault { delay, abort, ..Default::default() }
}

fn to_fault(m: fault::HttpFault) -> Res<Fault> {
    refuse!(m; upstream_cluster, headers, downstream_nodes, max_active_faults, response_rate_limit);
    let share =
        |p: Option<envoy_types::pb::envoy::r#type::v3::FractionalPercent>| p.map_or(0, |f| to_ppm(&f));
    let delay = match m.delay {
        None => None,
        Some(d) => match d.fault_delay_secifier {
            Some(fault_common::fault_delay::FaultDelaySecifier::FixedDelay(t)) => {
                Some((to_duration(t).at("delay.fixed_delay")?, share(d.percentage)))
            }
            _ => return Err(Bad::unsupported("delay", "a delay from a header")),
        },
    };
    let abort = match m.abort {
        None => None,
        Some(a) => {
            use fault::fault_abort::ErrorType as E;
            refuse!(a; response_body);
            let kind = match a.error_type {
                Some(E::HttpStatus(s)) => AbortKind::Http(status_code(s).at("abort.http_status")?),
                Some(E::GrpcStatus(s)) => AbortKind::Grpc(s),
                _ => return Err(Bad::unsupported("abort", "an abort from a header")),
            };
            Some((kind, share(a.percentage)))
        }
    };
    Ok(Fault { delay, abort })
}

fn cors_policy(c: &Cors) -> cors::CorsPolicy {
    cors::CorsPolicy {
        allow_origin_string_match: c.allow_origins.iter().map(string_match).collect(),
        allow_methods: c.allow_methods.clone(),
        allow_headers: c.allow_headers.clone(),
        expose_headers: c.expose_headers.clone(),
        max_age: c.max_age.clone(),
        allow_credentials: boolv(c.allow_credentials),
        forward_not_matching_preflights: c.ignore_unmatched.then_some(gp::BoolValue { value: false }),
        ..Default::default()
    }
}

fn to_cors(m: cors::CorsPolicy) -> Res<Cors> {
    refuse!(m; filter_enabled, shadow_enabled, allow_private_network_access);
    Ok(Cors {
        allow_origins: each("allow_origin_string_match", m.allow_origin_string_match, to_string_match)?,
        allow_methods: m.allow_methods,
        allow_headers: m.allow_headers,
        expose_headers: m.expose_headers,
        max_age: m.max_age,
        allow_credentials: bool_or(m.allow_credentials, false),
        ignore_unmatched: !bool_or(m.forward_not_matching_preflights, true),
    })
}

//! Rate limits.

use envoy_types::pb::{
    envoy::{
        config::{core::v3 as core, ratelimit::v3 as service, route::v3 as r},
        extensions::{
            common::ratelimit::v3 as common,
            filters::{
                http::{local_ratelimit::v3 as local, ratelimit::v3 as global},
                network::local_ratelimit::v3 as network,
            },
        },
        r#type::{metadata::v3 as metadata, v3 as typ},
    },
    google::protobuf as gp,
};
use mesh_model::proxy::{
    ConnectionLimit, GlobalRateLimit, HeaderOps, HostRateLimits, LocalDescriptor, LocalRateLimit, RateLimit,
    RateLimitAction, TokenBucket,
};

use super::{At, Bad, Res, common::*, each, refuse, route};

const GENERIC_KEY: &str = "generic_key";
const HEADER_MATCH: &str = "header_match";
const QUERY_MATCH: &str = "query_match";

fn bucket(b: &TokenBucket) -> typ::TokenBucket {
    typ::TokenBucket {
        max_tokens: b.max_tokens,
        tokens_per_fill: u32v(b.tokens_per_fill),
        fill_interval: Some(duration(b.fill_interval)),
    }
}

fn to_bucket(b: typ::TokenBucket) -> Res<TokenBucket> {
    let fill = b.fill_interval.ok_or_else(|| Bad::new("fill_interval", "is missing"))?;
    Ok(TokenBucket {
        max_tokens: b.max_tokens,
        tokens_per_fill: b.tokens_per_fill.map_or(1, |v| v.value),
        fill_interval: to_duration(fill).at("fill_interval")?,
    })
}

pub(super) fn network(c: &ConnectionLimit) -> network::LocalRateLimit {
    network::LocalRateLimit {
        // Envoy wants one.
        stat_prefix: if c.stat_prefix.is_empty() { "limit".to_owned() } else { c.stat_prefix.clone() },
        token_bucket: Some(bucket(&c.bucket)),
        ..Default::default()
    }
}

pub(super) fn to_network(m: network::LocalRateLimit) -> Res<ConnectionLimit> {
    refuse!(m; runtime_enabled, share_key);
    Ok(ConnectionLimit {
        stat_prefix: m.stat_prefix,
        bucket: to_bucket(m.token_bucket.unwrap_or_default()).at("token_bucket")?,
    })
}

fn status(code: u16) -> Option<typ::HttpStatus> {
    (code != 429).then(|| typ::HttpStatus { code: i32::from(code) })
}

pub(super) fn local(m: &LocalRateLimit) -> local::LocalRateLimit {
    let entry =
        |(k, v): &(String, String)| common::rate_limit_descriptor::Entry { key: k.clone(), value: v.clone() };
    local::LocalRateLimit {
        stat_prefix: if m.stat_prefix.is_empty() { "limit".to_owned() } else { m.stat_prefix.clone() },
        status: status(m.status),
        token_bucket: m.bucket.as_ref().map(bucket),
        filter_enabled: Some(runtime_ppm(m.enabled)),
        filter_enforced: Some(runtime_ppm(m.enforced)),
        request_headers_to_add_when_not_enforced: header_ops(&m.request_headers).0,
        response_headers_to_add: header_ops(&m.response_headers).0,
        descriptors: m
            .descriptors
            .iter()
            .map(|d| common::LocalRateLimitDescriptor {
                entries: d.entries.iter().map(entry).collect(),
                token_bucket: Some(bucket(&d.bucket)),
                ..Default::default()
            })
            .collect(),
        stage: m.stage,
        enable_x_ratelimit_headers: i32::from(m.x_ratelimit_headers),
        always_consume_default_token_bucket: boolv(m.always_consume_default),
        rate_limited_as_resource_exhausted: m.resource_exhausted,
        rate_limits: rules(&m.rules),
        enable_retry_after_header: m.retry_after,
        ..Default::default()
    }
}

pub(super) fn to_local(m: local::LocalRateLimit) -> Res<LocalRateLimit> {
    refuse!(m;
        local_rate_limit_per_downstream_connection, local_cluster_rate_limit, vh_rate_limits
    );
    let descriptor = |d: common::LocalRateLimitDescriptor| {
        refuse!(d; shadow_mode);
        if d.entries.iter().any(|e| e.value.is_empty()) {
            return Err(Bad::unsupported("entries", "an entry for any value"));
        }
        Ok(LocalDescriptor {
            entries: d.entries.into_iter().map(|e| (e.key, e.value)).collect(),
            bucket: to_bucket(d.token_bucket.unwrap_or_default()).at("token_bucket")?,
        })
    };
    Ok(LocalRateLimit {
        stat_prefix: m.stat_prefix,
        status: to_status(m.status, 429).at("status")?,
        bucket: m.token_bucket.map(to_bucket).transpose().at("token_bucket")?,
        enabled: to_runtime_ppm(m.filter_enabled, 0),
        enforced: to_runtime_ppm(m.filter_enforced, 0),
        request_headers: to_ops(m.request_headers_to_add_when_not_enforced)?,
        response_headers: to_ops(m.response_headers_to_add)?,
        descriptors: each("descriptors", m.descriptors, descriptor)?,
        stage: m.stage,
        x_ratelimit_headers: m.enable_x_ratelimit_headers != 0,
        always_consume_default: bool_or(m.always_consume_default_token_bucket, true),
        resource_exhausted: m.rate_limited_as_resource_exhausted,
        rules: to_rules(m.rate_limits)?,
        retry_after: m.enable_retry_after_header,
    })
}

fn to_ops(add: Vec<core::HeaderValueOption>) -> Res<HeaderOps> {
    to_header_ops(add, vec![])
}

pub(super) fn global(m: &GlobalRateLimit) -> global::RateLimit {
    let mut grpc = grpc_service(&m.service);
    // The call's limit is the filter's field.
    let timeout = grpc.timeout.take();
    global::RateLimit {
        domain: m.domain.clone(),
        stage: m.stage,
        timeout,
        failure_mode_deny: m.failure_mode_deny,
        rate_limited_as_resource_exhausted: m.resource_exhausted,
        rate_limit_service: Some(service::RateLimitServiceConfig {
            grpc_service: Some(grpc),
            transport_api_version: core::ApiVersion::V3.into(),
        }),
        enable_x_ratelimit_headers: i32::from(m.x_ratelimit_headers),
        disable_x_envoy_ratelimited_header: m.no_ratelimited_header,
        rate_limited_status: status(m.status),
        response_headers_to_add: header_ops(&m.response_headers).0,
        status_on_error: (m.status_on_error != 500)
            .then(|| typ::HttpStatus { code: i32::from(m.status_on_error) }),
        ..Default::default()
    }
}

pub(super) fn to_global(m: global::RateLimit) -> Res<GlobalRateLimit> {
    refuse!(m;
        filter_enabled, filter_enforced, failure_mode_deny_percent, rate_limits, metadata_namespace,
        enable_retry_after_header
    );
    if !matches!(m.request_type.as_str(), "" | "both") {
        return Err(Bad::unsupported("request_type", "a limit of internal or external requests alone"));
    }
    let service = m.rate_limit_service.unwrap_or_default();
    let mut grpc = to_grpc_service(service.grpc_service.unwrap_or_default()).at("rate_limit_service")?;
    grpc.timeout = opt(m.timeout).at("timeout")?.or(grpc.timeout);
    Ok(GlobalRateLimit {
        domain: m.domain,
        stage: m.stage,
        service: grpc,
        failure_mode_deny: m.failure_mode_deny,
        status_on_error: to_status(m.status_on_error, 500).at("status_on_error")?,
        status: to_status(m.rate_limited_status, 429).at("rate_limited_status")?,
        resource_exhausted: m.rate_limited_as_resource_exhausted,
        x_ratelimit_headers: m.enable_x_ratelimit_headers != 0,
        no_ratelimited_header: m.disable_x_envoy_ratelimited_header,
        response_headers: to_ops(m.response_headers_to_add)?,
    })
}

pub(super) fn per_route(h: HostRateLimits) -> global::RateLimitPerRoute {
    use global::rate_limit_per_route::VhRateLimitsOptions as V;
    let v = match h {
        HostRateLimits::Override => V::Override,
        HostRateLimits::Include => V::Include,
        HostRateLimits::Ignore => V::Ignore,
    };
    global::RateLimitPerRoute { vh_rate_limits: v.into(), ..Default::default() }
}

pub(super) fn to_per_route(m: global::RateLimitPerRoute) -> Res<HostRateLimits> {
    use global::rate_limit_per_route::VhRateLimitsOptions as V;
    refuse!(m; override_option, rate_limits, domain);
    match V::try_from(m.vh_rate_limits) {
        Ok(V::Override) => Ok(HostRateLimits::Override),
        Ok(V::Include) => Ok(HostRateLimits::Include),
        Ok(V::Ignore) => Ok(HostRateLimits::Ignore),
        Err(_) => Err(Bad::unsupported("vh_rate_limits", m.vh_rate_limits)),
    }
}

/// Rules of a route or virtual host.
pub(super) fn rules(l: &[RateLimit]) -> Vec<r::RateLimit> {
    l.iter()
        .map(|l| r::RateLimit {
            stage: if l.stage == 0 { None } else { u32v(l.stage) },
            actions: l.actions.iter().map(action).collect(),
            ..Default::default()
        })
        .collect()
}

pub(super) fn to_rules(l: Vec<r::RateLimit>) -> Res<Vec<RateLimit>> {
    each("rate_limits", l, |l| {
        refuse!(l; disable_key, limit, hits_addend, apply_on_stream_done, x_ratelimit_option);
        Ok(RateLimit {
            stage: l.stage.map_or(0, |s| s.value),
            actions: each("actions", l.actions, to_action)?,
        })
    })
}

fn action(a: &RateLimitAction) -> r::rate_limit::Action {
    use a_::ActionSpecifier as S;
    use r::rate_limit::action as a_;
    let or_default = |key: &str, default: &str| if key == default { String::new() } else { key.to_owned() };
    let spec = match a {
        RateLimitAction::SourceCluster => S::SourceCluster(a_::SourceCluster {}),
        RateLimitAction::DestinationCluster => S::DestinationCluster(a_::DestinationCluster {}),
        RateLimitAction::RemoteAddress => S::RemoteAddress(a_::RemoteAddress {}),
        RateLimitAction::MaskedRemoteAddress { v4, v6 } => S::MaskedRemoteAddress(a_::MaskedRemoteAddress {
            v4_prefix_mask_len: u32v(u32::from(*v4)),
            v6_prefix_mask_len: u32v(u32::from(*v6)),
        }),
        RateLimitAction::Header { name, key, skip_if_absent } => S::RequestHeaders(a_::RequestHeaders {
            header_name: name.clone(),
            descriptor_key: key.clone(),
            skip_if_absent: *skip_if_absent,
        }),
        RateLimitAction::Query { name, key, skip_if_absent } => S::QueryParameters(a_::QueryParameters {
            query_parameter_name: name.clone(),
            descriptor_key: key.clone(),
            skip_if_absent: *skip_if_absent,
        }),
        RateLimitAction::Generic { key, value } => S::GenericKey(a_::GenericKey {
            descriptor_value: value.clone(),
            descriptor_key: or_default(key, GENERIC_KEY),
            ..Default::default()
        }),
        RateLimitAction::HeaderMatch { key, value, expect, headers } => {
            S::HeaderValueMatch(a_::HeaderValueMatch {
                descriptor_value: value.clone(),
                descriptor_key: or_default(key, HEADER_MATCH),
                expect_match: boolv(*expect),
                headers: headers.iter().map(header_match).collect(),
                ..Default::default()
            })
        }
        RateLimitAction::QueryMatch { key, value, expect, query } => {
            S::QueryParameterValueMatch(a_::QueryParameterValueMatch {
                descriptor_value: value.clone(),
                descriptor_key: or_default(key, QUERY_MATCH),
                expect_match: boolv(*expect),
                query_parameters: query.iter().map(route::query_match).collect(),
                ..Default::default()
            })
        }
        RateLimitAction::Metadata { key, filter, path, default, skip_if_absent } => {
            use metadata::metadata_key::{PathSegment, path_segment::Segment};
            S::Metadata(a_::MetaData {
                descriptor_key: key.clone(),
                metadata_key: Some(metadata::MetadataKey {
                    key: filter.clone(),
                    path: path
                        .iter()
                        .map(|k| PathSegment { segment: Some(Segment::Key(k.clone())) })
                        .collect(),
                }),
                default_value: default.clone(),
                skip_if_absent: *skip_if_absent,
                ..Default::default()
            })
        }
    };
    r::rate_limit::Action { action_specifier: Some(spec) }
}

fn to_action(a: r::rate_limit::Action) -> Res<RateLimitAction> {
    use r::rate_limit::action::ActionSpecifier as S;
    let or = |key: String, default: &str| if key.is_empty() { default.to_owned() } else { key };
    let bits = |v: Option<gp::UInt32Value>, max: u8| {
        let n = v.map_or(u32::from(max), |v| v.value);
        u8::try_from(n).ok().filter(|n| *n <= max).ok_or_else(|| Bad::new("mask_len", "is too long"))
    };
    Ok(match a.action_specifier {
        Some(S::SourceCluster(_)) => RateLimitAction::SourceCluster,
        Some(S::DestinationCluster(_)) => RateLimitAction::DestinationCluster,
        Some(S::RemoteAddress(_)) => RateLimitAction::RemoteAddress,
        Some(S::MaskedRemoteAddress(m)) => RateLimitAction::MaskedRemoteAddress {
            v4: bits(m.v4_prefix_mask_len, 32)?,
            v6: bits(m.v6_prefix_mask_len, 128)?,
        },
        Some(S::RequestHeaders(h)) => RateLimitAction::Header {
            name: h.header_name.to_ascii_lowercase(),
            key: h.descriptor_key,
            skip_if_absent: h.skip_if_absent,
        },
        Some(S::QueryParameters(q)) => RateLimitAction::Query {
            name: q.query_parameter_name,
            key: q.descriptor_key,
            skip_if_absent: q.skip_if_absent,
        },
        Some(S::GenericKey(g)) => {
            refuse!(g; default_value);
            RateLimitAction::Generic { key: or(g.descriptor_key, GENERIC_KEY), value: g.descriptor_value }
        }
        Some(S::HeaderValueMatch(h)) => {
            refuse!(h; default_value);
            RateLimitAction::HeaderMatch {
                key: or(h.descriptor_key, HEADER_MATCH),
                value: h.descriptor_value,
                expect: bool_or(h.expect_match, true),
                headers: each("headers", h.headers, to_header_match)?,
            }
        }
        Some(S::QueryParameterValueMatch(q)) => {
            refuse!(q; default_value);
            RateLimitAction::QueryMatch {
                key: or(q.descriptor_key, QUERY_MATCH),
                value: q.descriptor_value,
                expect: bool_or(q.expect_match, true),
                query: each("query_parameters", q.query_parameters, route::to_query_match)?,
            }
        }
        Some(S::Metadata(m)) => {
            use metadata::metadata_key::path_segment::Segment;
            refuse!(m; source);
            let key = m.metadata_key.unwrap_or_default();
            let path = each("path", key.path, |s| match s.segment {
                Some(Segment::Key(k)) => Ok(k),
                _ => Err(Bad::unsupported("segment", "another segment than a key")),
            })?;
            RateLimitAction::Metadata {
                key: m.descriptor_key,
                filter: key.key,
                path,
                default: m.default_value,
                skip_if_absent: m.skip_if_absent,
            }
        }
        Some(_) => return Err(Bad::unsupported("action_specifier", "this action")),
        None => return Err(Bad::new("action_specifier", "is missing")),
    })
}

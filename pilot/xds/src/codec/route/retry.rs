//! Retry policies of routes.

use std::time::Duration;

use envoy_types::pb::envoy::{
    config::route::v3 as r,
    extensions::retry::{
        host::previous_hosts::v3::PreviousHostsPredicate,
        priority::previous_priorities::v3::PreviousPrioritiesConfig,
    },
};
use mesh_model::proxy::{RateLimitedBackOff, ResetHeader, RetryOn, RetryPolicy};

use super::super::{At, Bad, Res, common::*, each, refuse};

const PREVIOUS_PRIORITIES: &str = "envoy.retry_priorities.previous_priorities";
const RETRY_BASE: Duration = Duration::from_millis(25);

const RETRY_ON: &[(RetryOn, &str)] = &[
    (RetryOn::ServerError, "5xx"),
    (RetryOn::GatewayError, "gateway-error"),
    (RetryOn::ConnectFailure, "connect-failure"),
    (RetryOn::RefusedStream, "refused-stream"),
    (RetryOn::Reset, "reset"),
    (RetryOn::ResetBeforeRequest, "reset-before-request"),
    (RetryOn::Retriable4xx, "retriable-4xx"),
    (RetryOn::RetriableStatusCodes, "retriable-status-codes"),
    (RetryOn::RetriableHeaders, "retriable-headers"),
    (RetryOn::EnvoyRateLimited, "envoy-ratelimited"),
    (RetryOn::Cancelled, "cancelled"),
    (RetryOn::DeadlineExceeded, "deadline-exceeded"),
    (RetryOn::ResourceExhausted, "resource-exhausted"),
    (RetryOn::Internal, "internal"),
    (RetryOn::Unavailable, "unavailable"),
];

pub(super) fn retry(p: &RetryPolicy) -> r::RetryPolicy {
    let on: Vec<&str> =
        p.on.iter().filter_map(|o| RETRY_ON.iter().find(|(k, _)| k == o).map(|(_, s)| *s)).collect();
    let previous = r::retry_policy::RetryHostPredicate {
        name: "envoy.retry_host_predicates.previous_hosts".to_owned(),
        config_type: Some(r::retry_policy::retry_host_predicate::ConfigType::TypedConfig(any(
            &PreviousHostsPredicate::default(),
        ))),
    };
    let avoid = p.host_selection_attempts > 0;
    r::RetryPolicy {
        retry_on: on.join(","),
        num_retries: u32v(p.attempts),
        per_try_timeout: p.per_try_timeout.map(duration),
        retry_host_predicate: if avoid { vec![previous] } else { vec![] },
        host_selection_retry_max_attempts: i64::from(p.host_selection_attempts),
        retriable_status_codes: p.status_codes.iter().map(|c| u32::from(*c)).collect(),
        retry_back_off: Some(r::retry_policy::RetryBackOff {
            base_interval: Some(duration(p.base_interval)),
            max_interval: Some(duration(p.max_interval)),
        }),
        retry_priority: (p.leave_priorities > 0).then(|| r::retry_policy::RetryPriority {
            name: PREVIOUS_PRIORITIES.to_owned(),
            config_type: Some(r::retry_policy::retry_priority::ConfigType::TypedConfig(any(
                &PreviousPrioritiesConfig {
                    update_frequency: i32::try_from(p.leave_priorities).unwrap_or(i32::MAX),
                },
            ))),
        }),
        per_try_idle_timeout: p.per_try_idle_timeout.map(duration),
        rate_limited_retry_back_off: p.rate_limited.as_ref().map(rate_limited),
        retriable_headers: p.retriable_headers.iter().map(header_match).collect(),
        retriable_request_headers: p.retriable_request_headers.iter().map(header_match).collect(),
        ..Default::default()
    }
}

pub(super) fn to_retry(p: r::RetryPolicy) -> Res<RetryPolicy> {
    refuse!(p; retry_options_predicates);
    let leave_priorities = p.retry_priority.map_or(Ok(0), to_priority).at("retry_priority")?;
    let mut on = Vec::new();
    for word in p.retry_on.split(',').map(str::trim).filter(|w| !w.is_empty()) {
        match RETRY_ON.iter().find(|(_, s)| *s == word) {
            Some((o, _)) if !on.contains(o) => on.push(*o),
            Some(_) => {}
            None => return Err(Bad::unsupported("retry_on", format_args!("{word:?}"))),
        }
    }
    let mut avoid = false;
    for h in &p.retry_host_predicate {
        if h.name != "envoy.retry_host_predicates.previous_hosts" {
            return Err(Bad::unsupported("retry_host_predicate", format_args!("extension {:?}", h.name)));
        }
        avoid = true;
    }
    let back_off = p.retry_back_off.unwrap_or_default();
    let base = back_off.base_interval.map_or(Ok(RETRY_BASE), to_duration).at("retry_back_off")?;
    let codes = p.retriable_status_codes.iter().map(|c| status_code(*c)).collect::<Res<Vec<u16>>>()?;
    let attempts = u32::try_from(p.host_selection_retry_max_attempts.max(0)).unwrap_or(u32::MAX);
    Ok(RetryPolicy {
        on,
        status_codes: codes,
        attempts: p.num_retries.map_or(1, |n| n.value),
        per_try_timeout: opt(p.per_try_timeout).at("per_try_timeout")?,
        base_interval: base,
        max_interval: back_off.max_interval.map_or(Ok(base * 10), to_duration).at("retry_back_off")?,
        host_selection_attempts: if avoid { attempts.max(1) } else { 0 },
        per_try_idle_timeout: opt(p.per_try_idle_timeout).at("per_try_idle_timeout")?,
        rate_limited: p
            .rate_limited_retry_back_off
            .map(to_rate_limited)
            .transpose()
            .at("rate_limited_retry_back_off")?,
        retriable_headers: each("retriable_headers", p.retriable_headers, to_header_match)?,
        retriable_request_headers: each(
            "retriable_request_headers",
            p.retriable_request_headers,
            to_header_match,
        )?,
        leave_priorities,
    })
}

fn to_priority(p: r::retry_policy::RetryPriority) -> Res<u32> {
    use r::retry_policy::retry_priority::ConfigType::TypedConfig;
    match p.config_type {
        Some(TypedConfig(a)) if is::<PreviousPrioritiesConfig>(&a) => {
            let c: PreviousPrioritiesConfig = typed(&a)?;
            u32::try_from(c.update_frequency)
                .ok()
                .filter(|n| *n > 0)
                .ok_or_else(|| Bad::new("update_frequency", "is not above 0"))
        }
        _ => Err(Bad::unsupported("typed_config", format_args!("extension {:?}", p.name))),
    }
}

fn rate_limited(b: &RateLimitedBackOff) -> r::retry_policy::RateLimitedRetryBackOff {
    use r::retry_policy::{ResetHeader as H, ResetHeaderFormat as F};
    let header = |h: &ResetHeader| H {
        name: h.name.clone(),
        format: if h.unix_time { F::UnixTimestamp } else { F::Seconds }.into(),
    };
    r::retry_policy::RateLimitedRetryBackOff {
        reset_headers: b.headers.iter().map(header).collect(),
        max_interval: Some(duration(b.max_interval)),
    }
}

fn to_rate_limited(b: r::retry_policy::RateLimitedRetryBackOff) -> Res<RateLimitedBackOff> {
    use r::retry_policy::ResetHeaderFormat as F;
    let header = |h: r::retry_policy::ResetHeader| {
        let unix_time = match F::try_from(h.format) {
            Ok(F::Seconds) => false,
            Ok(F::UnixTimestamp) => true,
            Err(_) => return Err(Bad::unsupported("format", h.format)),
        };
        Ok(ResetHeader { name: h.name.to_ascii_lowercase(), unix_time })
    };
    Ok(RateLimitedBackOff {
        headers: each("reset_headers", b.reset_headers, header)?,
        max_interval: b.max_interval.map_or(Ok(Duration::from_secs(300)), to_duration)?,
    })
}

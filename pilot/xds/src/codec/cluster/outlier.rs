//! Outlier detection. Detectors that a message does not switch off have Envoy's defaults, so a message without
//! `enforcing_success_rate` judges success rates.

use std::time::Duration;

use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3 as pb,
            common::matcher::v3::{
                HttpHeadersMatch, MatchPredicate,
                match_predicate::{MatchSet, Rule},
            },
        },
        extensions::upstreams::http::v3::http_protocol_options as up,
    },
    google::protobuf as gp,
};
use mesh_model::proxy::{
    FailurePercentage, HeaderMatch, HeaderValueMatch, LocalOrigin, OutlierDetection, StringMatch,
    StringMatchKind, SuccessRate,
};

use crate::codec::{At, Bad, Res, common::*, each, refuse};

const STATUS: &str = ":status";

/// A detector is switched by its enforcement, since zero is not a valid count.
fn detector(n: u32, percent: u32) -> (Option<gp::UInt32Value>, Option<gp::UInt32Value>) {
    if n == 0 { (None, u32v(0)) } else { (u32v(n), u32v(percent)) }
}

/// Reverse of [`detector`]: the count, 0 when it is switched off, and the enforcement.
fn to_detector(n: Option<gp::UInt32Value>, enforcing: u32) -> (u32, u32) {
    match (n.map_or(5, |v| v.value), enforcing.min(100)) {
        (0, _) | (_, 0) => (0, 100),
        on => on,
    }
}

pub(super) fn encode(o: &OutlierDetection) -> pb::OutlierDetection {
    let (all, enforcing_all) = detector(o.consecutive_5xx, o.enforcing_5xx);
    let (gateway, enforcing_gateway) = detector(o.consecutive_gateway, o.enforcing_gateway);
    let (local, enforcing_local) = match &o.local_origin {
        None => (None, None),
        Some(l) => detector(l.consecutive, l.enforcing),
    };
    // One set of numbers on the wire for answers and for what happens before them.
    let success = o.success_rate.or(o.local_origin.and_then(|l| l.success_rate));
    let failure = o.failure_percentage.or(o.local_origin.and_then(|l| l.failure_percentage));
    pb::OutlierDetection {
        consecutive_5xx: all,
        enforcing_consecutive_5xx: enforcing_all,
        consecutive_gateway_failure: gateway,
        enforcing_consecutive_gateway_failure: enforcing_gateway,
        interval: Some(duration(o.interval)),
        base_ejection_time: Some(duration(o.base_ejection)),
        max_ejection_time: Some(duration(o.max_ejection)),
        max_ejection_percent: u32v(o.max_percent),
        enforcing_success_rate: u32v(o.success_rate.map_or(0, |r| r.enforcing)),
        success_rate_minimum_hosts: success.and_then(|r| u32v(r.minimum_hosts)),
        success_rate_request_volume: success.and_then(|r| u32v(r.request_volume)),
        success_rate_stdev_factor: success.and_then(|r| u32v(r.stdev_factor)),
        enforcing_failure_percentage: o.failure_percentage.and_then(|f| u32v(f.enforcing)),
        failure_percentage_threshold: failure.and_then(|f| u32v(f.threshold)),
        failure_percentage_minimum_hosts: failure.and_then(|f| u32v(f.minimum_hosts)),
        failure_percentage_request_volume: failure.and_then(|f| u32v(f.request_volume)),
        split_external_local_origin_errors: o.local_origin.is_some(),
        consecutive_local_origin_failure: local,
        enforcing_consecutive_local_origin_failure: enforcing_local,
        enforcing_local_origin_success_rate: o
            .local_origin
            .and_then(|l| u32v(l.success_rate.map_or(0, |r| r.enforcing))),
        enforcing_failure_percentage_local_origin: o
            .local_origin
            .and_then(|l| l.failure_percentage)
            .and_then(|f| u32v(f.enforcing)),
        always_eject_one_host: boolv(true),
        ..Default::default()
    }
}

pub(super) fn decode(o: pb::OutlierDetection) -> Res<OutlierDetection> {
    refuse!(o; monitors, detect_degraded_hosts, max_ejection_time_jitter);
    let or = |v: Option<gp::UInt32Value>, d| v.map_or(d, |v| v.value);
    let time = |d: Option<gp::Duration>, default| d.map_or(Ok(default), to_duration);
    let base = time(o.base_ejection_time, Duration::from_secs(30)).at("base_ejection_time")?;
    let (consecutive_5xx, enforcing_5xx) =
        to_detector(o.consecutive_5xx, or(o.enforcing_consecutive_5xx, 100));
    let (consecutive_gateway, enforcing_gateway) =
        to_detector(o.consecutive_gateway_failure, or(o.enforcing_consecutive_gateway_failure, 0));
    let split = o.split_external_local_origin_errors;
    let success = SuccessRate {
        minimum_hosts: or(o.success_rate_minimum_hosts, 5),
        request_volume: or(o.success_rate_request_volume, 100),
        stdev_factor: or(o.success_rate_stdev_factor, 1900),
        enforcing: 0,
    };
    let failure = FailurePercentage {
        threshold: or(o.failure_percentage_threshold, 85),
        minimum_hosts: or(o.failure_percentage_minimum_hosts, 5),
        request_volume: or(o.failure_percentage_request_volume, 50),
        enforcing: 0,
    };
    let success = |enforcing: Option<gp::UInt32Value>| {
        let enforcing = or(enforcing, 100).min(100);
        (enforcing > 0).then_some(SuccessRate { enforcing, ..success })
    };
    let failure = |enforcing: Option<gp::UInt32Value>| {
        let enforcing = or(enforcing, 0).min(100);
        (enforcing > 0).then_some(FailurePercentage { enforcing, ..failure })
    };
    let local = to_detector(
        o.consecutive_local_origin_failure,
        or(o.enforcing_consecutive_local_origin_failure, 100),
    );
    Ok(OutlierDetection {
        consecutive_5xx,
        enforcing_5xx,
        consecutive_gateway,
        enforcing_gateway,
        success_rate: success(o.enforcing_success_rate),
        failure_percentage: failure(o.enforcing_failure_percentage),
        local_origin: split.then(|| LocalOrigin {
            consecutive: local.0,
            enforcing: local.1,
            success_rate: success(o.enforcing_local_origin_success_rate),
            failure_percentage: failure(o.enforcing_failure_percentage_local_origin),
        }),
        interval: time(o.interval, Duration::from_secs(10)).at("interval")?,
        base_ejection: base,
        max_ejection: time(o.max_ejection_time, base.max(Duration::from_secs(300)))
            .at("max_ejection_time")?,
        max_percent: or(o.max_ejection_percent, 10),
        // They come with the protocol options.
        error_codes: vec![],
    })
}

/// Answers that are errors, by their status. `None` leaves it at 5xx.
pub(super) fn errors(o: &OutlierDetection) -> Option<up::OutlierDetection> {
    let rule = |r| MatchPredicate { rule: Some(r) };
    let status = |code: &u16| {
        let value = HeaderValueMatch::Value(StringMatch::exact(code.to_string()));
        let headers = vec![header_match(&HeaderMatch {
            name: STATUS.to_owned(),
            value,
            invert: false,
            missing_is_empty: false,
        })];
        rule(Rule::HttpResponseHeadersMatch(HttpHeadersMatch { headers }))
    };
    let mut rules: Vec<MatchPredicate> = o.error_codes.iter().map(status).collect();
    let matcher = match rules.len() {
        0 => return None,
        1 => rules.pop(),
        _ => Some(rule(Rule::OrMatch(MatchSet { rules }))),
    };
    Some(up::OutlierDetection { error_matcher: matcher })
}

/// Reverse of [`errors`]; other matchers than those of statuses are not known.
pub(super) fn to_errors(o: up::OutlierDetection) -> Res<Vec<u16>> {
    let rules = match o.error_matcher.and_then(|m| m.rule) {
        None => return Ok(vec![]),
        Some(Rule::OrMatch(set)) => set.rules.into_iter().filter_map(|r| r.rule).collect(),
        Some(one) => vec![one],
    };
    each("error_matcher", rules, |rule| {
        let Rule::HttpResponseHeadersMatch(mut m) = rule else {
            return Err(Bad::unsupported("rule", "a match of other things than response headers"));
        };
        let only = m.headers.pop().filter(|_| m.headers.is_empty()).map(to_header_match).transpose()?;
        match only {
            Some(HeaderMatch {
                name,
                value: HeaderValueMatch::Value(s),
                invert: false,
                missing_is_empty: false,
            }) if name == STATUS => {
                let exact = match &s.kind {
                    StringMatchKind::Exact(code) => code.parse().ok(),
                    _ => None,
                };
                exact.ok_or_else(|| Bad::unsupported("headers", "a match of :status that is not one number"))
            }
            _ => Err(Bad::unsupported("headers", "anything but an exact :status")),
        }
    })
}

//! Pieces that several resources share.

use std::{net::IpAddr, time::Duration};

use envoy_types::pb::{
    envoy::{
        config::{core::v3 as core, route::v3 as route},
        r#type::{matcher::v3 as matcher, v3 as typ},
    },
    google::protobuf as gp,
};
use ipnet::IpNet;
use mesh_model::proxy::{self as model, HeaderOps, HeaderValueMatch, StringMatch, StringMatchKind};
use prost::Name;

use super::{At, Bad, Res, refuse};

pub(crate) fn any<T: Name>(m: &T) -> gp::Any {
    gp::Any { type_url: format!("type.googleapis.com/{}", T::full_name()), value: m.encode_to_vec() }
}

/// Unpacks a typed configuration; the type must be `T`.
pub(super) fn typed<T: Name + Default>(a: &gp::Any) -> Res<T> {
    if !is::<T>(a) {
        return Err(Bad::unsupported("", format_args!("{:?}", a.type_url)));
    }
    T::decode(a.value.as_slice()).map_err(|e| Bad::new("", e.to_string()))
}

/// Whether a typed configuration is a `T`.
pub(crate) fn is<T: Name>(a: &gp::Any) -> bool {
    a.type_url.rsplit('/').next() == Some(T::full_name().as_str())
}

pub(super) fn u32v(value: u32) -> Option<gp::UInt32Value> {
    Some(gp::UInt32Value { value })
}

pub(super) fn boolv(value: bool) -> Option<gp::BoolValue> {
    Some(gp::BoolValue { value })
}

pub(super) fn bool_or(v: Option<gp::BoolValue>, default: bool) -> bool {
    v.map_or(default, |v| v.value)
}

pub(super) fn duration(d: Duration) -> gp::Duration {
    gp::Duration {
        seconds: i64::try_from(d.as_secs()).unwrap_or(i64::MAX),
        // Below 10^9.
        nanos: d.subsec_nanos().cast_signed(),
    }
}

/// Seconds of the longest `google.protobuf.Duration`, ten thousand years. A longer one would overflow a clock that it is
/// added to, with a panic.
const LONGEST: u64 = 315_576_000_000;

pub(super) fn to_duration(d: gp::Duration) -> Res<Duration> {
    match (u64::try_from(d.seconds), u32::try_from(d.nanos)) {
        (Ok(s), Ok(n)) if n < 1_000_000_000 && s <= LONGEST => Ok(Duration::new(s, n)),
        (Ok(_), Ok(_)) => Err(Bad::new("", "is longer than 315576000000 s, or has a second of nanoseconds")),
        _ => Err(Bad::new("", "is not a positive duration")),
    }
}

/// A timeout that Envoy disables with zero and that has a default when absent.
pub(super) fn zero_off(d: Option<Duration>) -> Option<gp::Duration> {
    Some(duration(d.unwrap_or_default()))
}

/// Reverse of [`zero_off`].
pub(super) fn or_off(d: Option<gp::Duration>, default: Duration) -> Res<Option<Duration>> {
    let d = d.map_or(Ok(default), to_duration)?;
    Ok((!d.is_zero()).then_some(d))
}

/// A duration where absence means absence.
pub(super) fn opt(d: Option<gp::Duration>) -> Res<Option<Duration>> {
    d.map(to_duration).transpose()
}

pub(super) fn cidr(n: &IpNet) -> core::CidrRange {
    core::CidrRange { address_prefix: n.addr().to_string(), prefix_len: u32v(u32::from(n.prefix_len())) }
}

pub(super) fn to_cidr(c: core::CidrRange) -> Res<IpNet> {
    let bad = || Bad::new("", format!("{:?} is not an IP prefix", c.address_prefix));
    let ip: IpAddr = c.address_prefix.parse().map_err(|_| bad())?;
    let len = c.prefix_len.map_or(0, |l| l.value);
    IpNet::new(ip, u8::try_from(len).map_err(|_| bad())?).map_err(|_| bad())
}

pub(super) fn socket_address(address: &str, port: u16) -> core::Address {
    core::Address {
        address: Some(core::address::Address::SocketAddress(core::SocketAddress {
            address: address.to_owned(),
            port_specifier: Some(core::socket_address::PortSpecifier::PortValue(u32::from(port))),
            ..Default::default()
        })),
    }
}

/// Host and port, whose protocol does not matter: what is sent there says it.
pub(super) fn to_socket_address(a: Option<core::Address>) -> Res<(String, u16)> {
    to_protocol_address(a).map(|(address, port, _)| (address, port))
}

/// Host, port, and whether it is of UDP.
pub(super) fn to_protocol_address(a: Option<core::Address>) -> Res<(String, u16, bool)> {
    let Some(core::address::Address::SocketAddress(s)) = a.and_then(|a| a.address) else {
        return Err(Bad::unsupported("address", "an address other than socket_address"));
    };
    let udp = match core::socket_address::Protocol::try_from(s.protocol) {
        Ok(core::socket_address::Protocol::Tcp) => false,
        Ok(core::socket_address::Protocol::Udp) => true,
        Err(_) => return Err(Bad::unsupported("address.protocol", s.protocol)),
    };
    let Some(core::socket_address::PortSpecifier::PortValue(port)) = s.port_specifier else {
        return Err(Bad::unsupported("address.port_specifier", "a named port"));
    };
    let port = u16::try_from(port).map_err(|_| Bad::new("address.port_value", "is above 65535"))?;
    Ok((s.address, port, udp))
}

/// The aggregated stream as the source of a resource.
pub(super) fn ads() -> Option<core::ConfigSource> {
    Some(core::ConfigSource {
        resource_api_version: core::ApiVersion::V3.into(),
        config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::Ads(
            core::AggregatedConfigSource::default(),
        )),
        ..Default::default()
    })
}

pub(super) fn regex(r: &str) -> matcher::RegexMatcher {
    matcher::RegexMatcher { regex: r.to_owned(), ..Default::default() }
}

pub(super) fn string_match(m: &StringMatch) -> matcher::StringMatcher {
    use matcher::string_matcher::MatchPattern as P;
    let p = match &m.kind {
        StringMatchKind::Exact(s) => P::Exact(s.clone()),
        StringMatchKind::Prefix(s) => P::Prefix(s.clone()),
        StringMatchKind::Suffix(s) => P::Suffix(s.clone()),
        StringMatchKind::Contains(s) => P::Contains(s.clone()),
        StringMatchKind::Regex(s) => P::SafeRegex(regex(s)),
    };
    matcher::StringMatcher { ignore_case: m.ignore_case, match_pattern: Some(p) }
}

pub(super) fn to_string_match(m: matcher::StringMatcher) -> Res<StringMatch> {
    use matcher::string_matcher::MatchPattern as P;
    let kind = match m.match_pattern {
        Some(P::Exact(s)) => StringMatchKind::Exact(s),
        Some(P::Prefix(s)) => StringMatchKind::Prefix(s),
        Some(P::Suffix(s)) => StringMatchKind::Suffix(s),
        Some(P::Contains(s)) => StringMatchKind::Contains(s),
        Some(P::SafeRegex(r)) => StringMatchKind::Regex(r.regex),
        Some(P::Custom(_)) => return Err(Bad::unsupported("custom", "a custom string matcher")),
        None => return Err(Bad::new("match_pattern", "is missing")),
    };
    Ok(StringMatch { kind, ignore_case: m.ignore_case })
}

pub(super) fn header_match(h: &model::HeaderMatch) -> route::HeaderMatcher {
    use route::header_matcher::HeaderMatchSpecifier as S;
    let spec = match &h.value {
        HeaderValueMatch::Present(p) => S::PresentMatch(*p),
        HeaderValueMatch::Value(m) => S::StringMatch(string_match(m)),
    };
    route::HeaderMatcher {
        name: h.name.clone(),
        invert_match: h.invert,
        treat_missing_header_as_empty: h.missing_is_empty,
        header_match_specifier: Some(spec),
    }
}

#[allow(deprecated)]
pub(super) fn to_header_match(h: route::HeaderMatcher) -> Res<model::HeaderMatch> {
    use route::header_matcher::HeaderMatchSpecifier as S;
    let plain = |kind| HeaderValueMatch::Value(StringMatch { kind, ignore_case: false });
    let value = match h.header_match_specifier {
        None => HeaderValueMatch::Present(true),
        Some(S::PresentMatch(p)) => HeaderValueMatch::Present(p),
        Some(S::StringMatch(m)) => HeaderValueMatch::Value(to_string_match(m).at("string_match")?),
        Some(S::ExactMatch(s)) => plain(StringMatchKind::Exact(s)),
        Some(S::PrefixMatch(s)) => plain(StringMatchKind::Prefix(s)),
        Some(S::SuffixMatch(s)) => plain(StringMatchKind::Suffix(s)),
        Some(S::ContainsMatch(s)) => plain(StringMatchKind::Contains(s)),
        Some(S::SafeRegexMatch(r)) => plain(StringMatchKind::Regex(r.regex)),
        Some(S::RangeMatch(_)) => return Err(Bad::unsupported("range_match", "a range of numbers")),
    };
    if matches!(value, HeaderValueMatch::Present(_)) {
        refuse!(h; treat_missing_header_as_empty);
    }
    Ok(model::HeaderMatch {
        name: h.name.to_ascii_lowercase(),
        value,
        invert: h.invert_match,
        missing_is_empty: h.treat_missing_header_as_empty,
    })
}

/// Headers to add and to remove.
pub(super) fn header_ops(ops: &HeaderOps) -> (Vec<core::HeaderValueOption>, Vec<String>) {
    use core::header_value_option::HeaderAppendAction as A;
    let option = |(k, v): &(String, String), action: A| core::HeaderValueOption {
        header: Some(core::HeaderValue { key: k.clone(), value: v.clone(), ..Default::default() }),
        append_action: action.into(),
        ..Default::default()
    };
    let add = ops
        .set
        .iter()
        .map(|h| option(h, A::OverwriteIfExistsOrAdd))
        .chain(ops.add.iter().map(|h| option(h, A::AppendIfExistsOrAdd)))
        .collect();
    (add, ops.remove.clone())
}

#[allow(deprecated)]
pub(super) fn to_header_ops(add: Vec<core::HeaderValueOption>, remove: Vec<String>) -> Res<HeaderOps> {
    use core::header_value_option::HeaderAppendAction as A;
    let mut ops = HeaderOps { remove, ..HeaderOps::default() };
    for (i, o) in add.into_iter().enumerate() {
        let h = o.header.unwrap_or_default();
        if !h.raw_value.is_empty() {
            return Err(Bad::unsupported(format!("headers_to_add[{i}].raw_value"), "a raw header value"));
        }
        // The older boolean: false means overwrite, and it wins where it is set.
        let action = match o.append {
            Some(b) if !b.value => A::OverwriteIfExistsOrAdd,
            _ => A::try_from(o.append_action).unwrap_or(A::AppendIfExistsOrAdd),
        };
        match action {
            A::OverwriteIfExistsOrAdd => ops.set.push((h.key, h.value)),
            A::AppendIfExistsOrAdd => ops.add.push((h.key, h.value)),
            A::AddIfAbsent | A::OverwriteIfExists => {
                let field = format!("headers_to_add[{i}].append_action");
                return Err(Bad::unsupported(field, action.as_str_name()));
            }
        }
    }
    Ok(ops)
}

/// Parts per million.
pub(super) fn ppm(n: u32) -> typ::FractionalPercent {
    typ::FractionalPercent {
        numerator: n,
        denominator: typ::fractional_percent::DenominatorType::Million.into(),
    }
}

pub(super) fn to_ppm(f: &typ::FractionalPercent) -> u32 {
    use typ::fractional_percent::DenominatorType as D;
    let scale = match D::try_from(f.denominator) {
        Ok(D::TenThousand) => 100,
        Ok(D::Million) => 1,
        _ => 10_000,
    };
    f.numerator.saturating_mul(scale).min(1_000_000)
}

pub(super) fn string_struct<'a>(fields: impl IntoIterator<Item = (&'a String, &'a String)>) -> gp::Struct {
    let fields = fields
        .into_iter()
        .map(|(k, v)| (k.clone(), gp::Value { kind: Some(gp::value::Kind::StringValue(v.clone())) }))
        .collect();
    gp::Struct { fields }
}

/// String fields of a struct; others are skipped.
pub(super) fn to_string_map(s: gp::Struct) -> std::collections::BTreeMap<String, String> {
    s.fields
        .into_iter()
        .filter_map(|(k, v)| match v.kind {
            Some(gp::value::Kind::StringValue(s)) => Some((k, s)),
            _ => None,
        })
        .collect()
}

pub(super) fn status_code(n: u32) -> Res<u16> {
    match u16::try_from(n) {
        Ok(s) if (100..1000).contains(&s) => Ok(s),
        _ => Err(Bad::new("status", format!("{n} is not an HTTP status"))),
    }
}

pub(super) fn http_uri(uri: &str, cluster: &str, timeout: Duration) -> core::HttpUri {
    core::HttpUri {
        uri: uri.to_owned(),
        timeout: Some(duration(timeout)),
        http_upstream_type: Some(core::http_uri::HttpUpstreamType::Cluster(cluster.to_owned())),
    }
}

/// URI, cluster and timeout.
pub(super) fn to_http_uri(m: Option<core::HttpUri>) -> Res<(String, String, Duration)> {
    let m = m.unwrap_or_default();
    let Some(core::http_uri::HttpUpstreamType::Cluster(cluster)) = m.http_upstream_type else {
        return Err(Bad::new("cluster", "is missing"));
    };
    let timeout = m.timeout.ok_or_else(|| Bad::new("timeout", "is missing"))?;
    Ok((m.uri, cluster, to_duration(timeout).at("timeout")?))
}

/// A condition on what a filter noted about a request.
pub(super) fn metadata_match(m: &model::MetadataMatch) -> matcher::MetadataMatcher {
    use matcher::metadata_matcher::{PathSegment, path_segment::Segment};
    matcher::MetadataMatcher {
        filter: m.filter.clone(),
        path: m.path.iter().map(|k| PathSegment { segment: Some(Segment::Key(k.clone())) }).collect(),
        value: Some(value_match(&m.value)),
        invert: m.invert,
    }
}

pub(super) fn to_metadata_match(m: matcher::MetadataMatcher) -> Res<model::MetadataMatch> {
    use matcher::metadata_matcher::path_segment::Segment;
    let path = m
        .path
        .into_iter()
        .map(|s| match s.segment {
            Some(Segment::Key(k)) => Ok(k),
            None => Err(Bad::new("path", "has an empty segment")),
        })
        .collect::<Res<Vec<_>>>()?;
    if path.is_empty() {
        return Err(Bad::new("path", "is missing"));
    }
    let value = m.value.ok_or_else(|| Bad::new("value", "is missing"))?;
    Ok(model::MetadataMatch {
        filter: m.filter,
        path,
        value: to_value_match(value, 0).at("value")?,
        invert: m.invert,
    })
}

fn value_match(m: &model::ValueMatch) -> matcher::ValueMatcher {
    use matcher::{list_matcher, value_matcher::MatchPattern as P};
    let p = match m {
        model::ValueMatch::Null => P::NullMatch(matcher::value_matcher::NullMatch {}),
        model::ValueMatch::Bool(b) => P::BoolMatch(*b),
        model::ValueMatch::String(s) => P::StringMatch(string_match(s)),
        model::ValueMatch::Present(b) => P::PresentMatch(*b),
        model::ValueMatch::OneOf(v) => P::ListMatch(Box::new(matcher::ListMatcher {
            match_pattern: Some(list_matcher::MatchPattern::OneOf(Box::new(value_match(v)))),
        })),
        model::ValueMatch::Or(l) => {
            P::OrMatch(matcher::OrMatcher { value_matchers: l.iter().map(value_match).collect() })
        }
    };
    matcher::ValueMatcher { match_pattern: Some(p) }
}

fn to_value_match(m: matcher::ValueMatcher, depth: u32) -> Res<model::ValueMatch> {
    use matcher::{list_matcher, value_matcher::MatchPattern as P};
    if depth > 16 {
        return Err(Bad::new("", "is nested too deeply"));
    }
    Ok(match m.match_pattern {
        Some(P::NullMatch(_)) => model::ValueMatch::Null,
        Some(P::BoolMatch(b)) => model::ValueMatch::Bool(b),
        Some(P::StringMatch(s)) => model::ValueMatch::String(to_string_match(s).at("string_match")?),
        Some(P::PresentMatch(b)) => model::ValueMatch::Present(b),
        Some(P::ListMatch(l)) => match l.match_pattern {
            Some(list_matcher::MatchPattern::OneOf(v)) => {
                model::ValueMatch::OneOf(Box::new(to_value_match(*v, depth + 1).at("list_match.one_of")?))
            }
            None => return Err(Bad::new("list_match", "is empty")),
        },
        Some(P::OrMatch(o)) => model::ValueMatch::Or(super::each("or_match", o.value_matchers, |v| {
            to_value_match(v, depth + 1)
        })?),
        Some(P::DoubleMatch(_)) => return Err(Bad::unsupported("double_match", "a number")),
        None => return Err(Bad::new("match_pattern", "is missing")),
    })
}

/// Envoy's own client, over a cluster.
pub(super) fn grpc_service(g: &model::GrpcService) -> core::GrpcService {
    use core::grpc_service as s;
    core::GrpcService {
        timeout: g.timeout.map(duration),
        initial_metadata: header_values(&g.metadata),
        target_specifier: Some(s::TargetSpecifier::EnvoyGrpc(s::EnvoyGrpc {
            cluster_name: g.cluster.clone(),
            authority: g.authority.clone(),
            ..Default::default()
        })),
        ..Default::default()
    }
}

pub(super) fn to_grpc_service(g: core::GrpcService) -> Res<model::GrpcService> {
    use core::grpc_service::TargetSpecifier as T;
    refuse!(g; retry_policy);
    let Some(T::EnvoyGrpc(e)) = g.target_specifier else {
        return Err(Bad::unsupported("target_specifier", "another client than envoy_grpc"));
    };
    refuse!(e; retry_policy);
    Ok(model::GrpcService {
        cluster: e.cluster_name,
        authority: e.authority,
        timeout: opt(g.timeout).at("timeout")?,
        metadata: to_header_values("initial_metadata", g.initial_metadata)?,
    })
}

pub(super) fn header_values(l: &[(String, String)]) -> Vec<core::HeaderValue> {
    l.iter()
        .map(|(k, v)| core::HeaderValue { key: k.clone(), value: v.clone(), ..Default::default() })
        .collect()
}

pub(super) fn to_header_values(field: &str, l: Vec<core::HeaderValue>) -> Res<Vec<(String, String)>> {
    super::each(field, l, |h| {
        refuse!(h; raw_value);
        Ok((h.key, h.value))
    })
}

/// A share of requests whose runtime key is ignored.
pub(super) fn runtime_ppm(n: u32) -> core::RuntimeFractionalPercent {
    core::RuntimeFractionalPercent { default_value: Some(ppm(n)), ..Default::default() }
}

pub(super) fn to_runtime_ppm(f: Option<core::RuntimeFractionalPercent>, default: u32) -> u32 {
    f.map_or(default, |f| f.default_value.map_or(0, |v| to_ppm(&v)))
}

pub(super) fn string_list(l: &[StringMatch]) -> Option<matcher::ListStringMatcher> {
    (!l.is_empty()).then(|| matcher::ListStringMatcher { patterns: l.iter().map(string_match).collect() })
}

pub(super) fn to_string_list(field: &str, l: Option<matcher::ListStringMatcher>) -> Res<Vec<StringMatch>> {
    super::each(field, l.unwrap_or_default().patterns, to_string_match)
}

/// A status where Envoy has a default.
pub(super) fn to_status(s: Option<typ::HttpStatus>, default: u16) -> Res<u16> {
    s.map_or(Ok(default), |s| status_code(s.code.unsigned_abs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_that_no_clock_takes_are_refused() {
        let of = |seconds, nanos| to_duration(gp::Duration { seconds, nanos });
        for (seconds, nanos) in [(i64::MAX, 0), (315_576_000_001, 0), (-1, 0), (0, -1), (0, 1_000_000_000)] {
            assert!(of(seconds, nanos).is_err(), "{seconds} {nanos}");
        }
        let longest = of(315_576_000_000, 999_999_999).unwrap();
        assert!(std::time::Instant::now().checked_add(longest).is_some());
    }
}

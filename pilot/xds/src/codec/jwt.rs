//! Token authentication.

use std::{collections::BTreeMap, time::Duration};

use envoy_types::pb::{
    envoy::{
        config::core::v3 as core,
        extensions::filters::http::jwt_authn::v3::{self as jwt, jwt_provider as provider},
    },
    google::protobuf as gp,
};
use mesh_model::proxy::{
    JwksSource, JwtAuthn, JwtClaimToHeader, JwtHeader, JwtOverride, JwtProvider, JwtRequirement, JwtRequires,
    JwtRule, RemoteJwks,
};

use super::{At, Bad, Res, common::*, each, refuse, route};

/// Envoy's default.
const CACHE: Duration = Duration::from_secs(600);
/// Requirements nest in the wire format; deeper than this is an attack or a mistake.
const MAX_DEPTH: u32 = 16;

pub(super) fn encode(m: &JwtAuthn) -> jwt::JwtAuthentication {
    jwt::JwtAuthentication {
        providers: m.providers.iter().map(|(n, p)| (n.clone(), provider(p))).collect(),
        rules: m.rules.iter().map(rule).collect(),
        requirement_map: m.requirements.iter().map(|(n, r)| (n.clone(), requirement(r))).collect(),
        bypass_cors_preflight: m.bypass_cors_preflight,
        ..Default::default()
    }
}

pub(super) fn decode(m: jwt::JwtAuthentication) -> Res<JwtAuthn> {
    refuse!(m; filter_state_rules, strip_failure_response);
    let mut providers = BTreeMap::new();
    for (name, p) in m.providers {
        let p = to_provider(p).at(format_args!("providers[{name}]"))?;
        providers.insert(name, p);
    }
    let mut requirements = BTreeMap::new();
    for (name, r) in m.requirement_map {
        let r = to_requirement(r, 0).at(format_args!("requirement_map[{name}]"))?;
        requirements.insert(name, r);
    }
    Ok(JwtAuthn {
        providers,
        rules: each("rules", m.rules, to_rule)?,
        requirements,
        bypass_cors_preflight: m.bypass_cors_preflight,
    })
}

pub(super) fn per_route(o: &JwtOverride) -> jwt::PerRouteConfig {
    use jwt::per_route_config::RequirementSpecifier as S;
    let spec = match o {
        JwtOverride::Disabled => S::Disabled(true),
        JwtOverride::Named(n) => S::RequirementName(n.clone()),
    };
    jwt::PerRouteConfig { requirement_specifier: Some(spec) }
}

pub(super) fn to_per_route(m: jwt::PerRouteConfig) -> Res<JwtOverride> {
    use jwt::per_route_config::RequirementSpecifier as S;
    match m.requirement_specifier {
        Some(S::Disabled(true)) => Ok(JwtOverride::Disabled),
        Some(S::RequirementName(n)) => Ok(JwtOverride::Named(n)),
        Some(S::Disabled(false)) => Err(Bad::new("disabled", "must be true")),
        None => Err(Bad::new("requirement_specifier", "is missing")),
    }
}

fn provider(p: &JwtProvider) -> jwt::JwtProvider {
    use provider::JwksSourceSpecifier as S;
    let local = |s| S::LocalJwks(core::DataSource { specifier: Some(s), ..Default::default() });
    let jwks = match &p.jwks {
        JwksSource::Inline(s) => local(core::data_source::Specifier::InlineString(s.clone())),
        JwksSource::File(f) => local(core::data_source::Specifier::Filename(f.clone())),
        JwksSource::Remote(r) => S::RemoteJwks(jwt::RemoteJwks {
            http_uri: Some(http_uri(&r.uri, &r.cluster, r.timeout)),
            cache_duration: Some(duration(r.cache_duration)),
            async_fetch: r.async_fetch.then(jwt::JwksAsyncFetch::default),
            ..Default::default()
        }),
    };
    jwt::JwtProvider {
        issuer: p.issuer.clone(),
        audiences: p.audiences.clone(),
        subjects: p.subjects.as_ref().map(string_match),
        require_expiration: p.require_expiration,
        max_lifetime: p.max_lifetime.map(duration),
        forward: p.forward,
        from_headers: p
            .from_headers
            .iter()
            .map(|h| jwt::JwtHeader { name: h.name.clone(), value_prefix: h.value_prefix.clone() })
            .collect(),
        from_params: p.from_params.clone(),
        from_cookies: p.from_cookies.clone(),
        forward_payload_header: p.forward_payload_header.clone(),
        pad_forward_payload_header: p.pad_forward_payload_header,
        payload_in_metadata: p.payload_in_metadata.clone(),
        normalize_payload_in_metadata: (!p.space_delimited_claims.is_empty())
            .then(|| provider::NormalizePayload { space_delimited_claims: p.space_delimited_claims.clone() }),
        clear_route_cache: p.clear_route_cache,
        clock_skew_seconds: u32::try_from(p.clock_skew.as_secs()).unwrap_or(u32::MAX),
        claim_to_headers: p
            .claim_to_headers
            .iter()
            .map(|c| jwt::JwtClaimToHeader {
                header_name: c.header.clone(),
                claim_name: c.claim.clone(),
                ..Default::default()
            })
            .collect(),
        jwks_source_specifier: Some(jwks),
        ..Default::default()
    }
}

fn to_provider(p: jwt::JwtProvider) -> Res<JwtProvider> {
    use core::data_source::Specifier as D;
    use provider::JwksSourceSpecifier as S;
    // The size of the cache of verified tokens is the engine's own business.
    refuse!(p; header_in_metadata, failed_status_in_metadata);
    let jwks = match p.jwks_source_specifier {
        Some(S::LocalJwks(d)) => match d.specifier {
            Some(D::InlineString(s)) => JwksSource::Inline(s),
            Some(D::InlineBytes(b)) => JwksSource::Inline(
                String::from_utf8(b).map_err(|_| Bad::new("local_jwks.inline_bytes", "is not UTF-8"))?,
            ),
            Some(D::Filename(f)) => JwksSource::File(f),
            _ => return Err(Bad::unsupported("local_jwks", "an environment variable")),
        },
        Some(S::RemoteJwks(r)) => JwksSource::Remote(to_remote(r).at("remote_jwks")?),
        None => return Err(Bad::new("jwks_source_specifier", "is missing")),
    };
    let header = |h: jwt::JwtHeader| Ok(JwtHeader { name: h.name, value_prefix: h.value_prefix });
    let claim = |c: jwt::JwtClaimToHeader| {
        refuse!(c; claim_path);
        Ok(JwtClaimToHeader { header: c.header_name, claim: c.claim_name })
    };
    Ok(JwtProvider {
        issuer: p.issuer,
        audiences: p.audiences,
        subjects: p.subjects.map(to_string_match).transpose().at("subjects")?,
        require_expiration: p.require_expiration,
        max_lifetime: opt(p.max_lifetime).at("max_lifetime")?,
        jwks,
        forward: p.forward,
        from_headers: each("from_headers", p.from_headers, header)?,
        from_params: p.from_params,
        from_cookies: p.from_cookies,
        forward_payload_header: p.forward_payload_header,
        pad_forward_payload_header: p.pad_forward_payload_header,
        payload_in_metadata: p.payload_in_metadata,
        space_delimited_claims: p
            .normalize_payload_in_metadata
            .map(|n| n.space_delimited_claims)
            .unwrap_or_default(),
        clear_route_cache: p.clear_route_cache,
        clock_skew: Duration::from_secs(match p.clock_skew_seconds {
            0 => 60,
            n => u64::from(n),
        }),
        claim_to_headers: each("claim_to_headers", p.claim_to_headers, claim)?,
    })
}

fn to_remote(r: jwt::RemoteJwks) -> Res<RemoteJwks> {
    // A fetch that failed is repeated by the next request anyway, and until it succeeds nobody is waiting
    // for a listener.
    let (uri, cluster, timeout) = to_http_uri(r.http_uri).at("http_uri")?;
    Ok(RemoteJwks {
        uri,
        cluster,
        timeout,
        cache_duration: r.cache_duration.map_or(Ok(CACHE), to_duration).at("cache_duration")?,
        async_fetch: r.async_fetch.is_some(),
    })
}

fn rule(r: &JwtRule) -> jwt::RequirementRule {
    use jwt::requirement_rule::RequirementType as T;
    jwt::RequirementRule {
        r#match: Some(route::route_match(&r.matches)),
        requirement_type: match &r.requires {
            JwtRequires::Nothing => None,
            JwtRequires::Inline(r) => Some(T::Requires(requirement(r))),
            JwtRequires::Named(n) => Some(T::RequirementName(n.clone())),
        },
    }
}

fn to_rule(r: jwt::RequirementRule) -> Res<JwtRule> {
    use jwt::requirement_rule::RequirementType as T;
    Ok(JwtRule {
        matches: route::to_route_match(r.r#match.unwrap_or_default()).at("match")?,
        requires: match r.requirement_type {
            None => JwtRequires::Nothing,
            Some(T::Requires(r)) => JwtRequires::Inline(to_requirement(r, 0).at("requires")?),
            Some(T::RequirementName(n)) => JwtRequires::Named(n),
        },
    })
}

fn requirement(r: &JwtRequirement) -> jwt::JwtRequirement {
    use jwt::jwt_requirement::RequiresType as T;
    let list = |l: &[JwtRequirement]| l.iter().map(requirement).collect();
    let requires_type = match r {
        JwtRequirement::Provider(n) => Some(T::ProviderName(n.clone())),
        JwtRequirement::ProviderWithAudiences(n, a) => {
            Some(T::ProviderAndAudiences(jwt::ProviderWithAudiences {
                provider_name: n.clone(),
                audiences: a.clone(),
            }))
        }
        JwtRequirement::Any(l) => Some(T::RequiresAny(jwt::JwtRequirementOrList { requirements: list(l) })),
        JwtRequirement::All(l) => Some(T::RequiresAll(jwt::JwtRequirementAndList { requirements: list(l) })),
        JwtRequirement::AllowMissing => Some(T::AllowMissing(gp::Empty {})),
        JwtRequirement::AllowMissingOrFailed => Some(T::AllowMissingOrFailed(gp::Empty {})),
        JwtRequirement::Always => None,
    };
    jwt::JwtRequirement { requires_type }
}

fn to_requirement(r: jwt::JwtRequirement, depth: u32) -> Res<JwtRequirement> {
    use jwt::jwt_requirement::RequiresType as T;
    if depth > MAX_DEPTH {
        return Err(Bad::new("", "is nested too deeply"));
    }
    let list = |name: &str, l| each(name, l, |r| to_requirement(r, depth + 1));
    Ok(match r.requires_type {
        None => JwtRequirement::Always,
        Some(T::ProviderName(n)) => JwtRequirement::Provider(n),
        Some(T::ProviderAndAudiences(p)) => {
            JwtRequirement::ProviderWithAudiences(p.provider_name, p.audiences)
        }
        Some(T::RequiresAny(l)) => JwtRequirement::Any(list("requires_any", l.requirements)?),
        Some(T::RequiresAll(l)) => JwtRequirement::All(list("requires_all", l.requirements)?),
        Some(T::AllowMissing(_)) => JwtRequirement::AllowMissing,
        Some(T::AllowMissingOrFailed(_)) => JwtRequirement::AllowMissingOrFailed,
        Some(T::ExtractOnlyWithoutValidation(_)) => {
            return Err(Bad::unsupported("extract_only_without_validation", "an unverified token"));
        }
    })
}

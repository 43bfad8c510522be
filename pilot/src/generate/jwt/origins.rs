//! `origins` of a Policy of 1.0 as token authentication in front of a port.
//!
//! Unlike RequestAuthentication a token is *required*, unless `originIsOptional`: then requests pass whatever they have. A
//! valid token of any of the issuers will do. `triggerRules` say for which paths an issuer's token counts; where none does,
//! requests pass unseen.
//!
//! Token authentication has a list of matches of which the first decides, and no "this and not that" over lists of lists.
//! So where all issuers have the same single trigger rule, its excluded paths come first and ask for nothing. Else every set
//! of issuers that may be triggered together has an entry, larger sets first, whose conditions are about `:path`, query
//! included, which expressions of users' own could not be trusted with: galley refuses them there.

use std::sync::LazyLock;

use mesh_model::{
    authored::{self, Jwt, TriggerPath, TriggerRule},
    proxy::{
        HeaderMatch, HeaderValueMatch, JwtAuthn, JwtRequirement, JwtRequires, JwtRule, PathMatch, RouteMatch,
        StringMatch,
    },
};

use super::{Ctx, named, provider};

/// More entries than this galley refuses; here they mean that every request needs a token.
const MAX_ENTRIES: usize = 64;

/// Issuers of the policy of a port, or of a whole gateway.
fn issuers<'a>(
    ctx: &Ctx<'a>,
    port: Option<u16>,
) -> Option<(&'a authored::AuthenticationPolicy, Vec<&'a Jwt>)> {
    let (proxy, world) = (ctx.proxy, ctx.world);
    if proxy.east_west || (port.is_none() && !proxy.router) {
        return None;
    }
    let port = if proxy.router { None } else { port };
    let policy = &*world.authn_policy(&proxy.namespace, &proxy.addresses, port)?.spec;
    // A method that nobody knows (galley refuses it) is one that no token satisfies.
    static UNKNOWN: LazyLock<Jwt> = LazyLock::new(Jwt::default);
    let list = policy.origins.iter().map(|o| o.jwt.as_ref().unwrap_or(&UNKNOWN)).collect();
    (!policy.origins.is_empty()).then_some((policy, list))
}

/// Whether requests to a port need a token.
pub(super) fn required(ctx: &Ctx<'_>, port: u16) -> bool {
    issuers(ctx, Some(port)).is_some_and(|(p, _)| !p.origin_is_optional)
}

/// All issuers of a workload's ports, to fetch their keys.
pub(super) fn all(ctx: &Ctx<'_>) -> Vec<authored::JwtRule> {
    let ports: Vec<Option<u16>> = if ctx.proxy.router {
        vec![None]
    } else {
        super::super::inbound::served(ctx).into_iter().map(Some).collect()
    };
    ports.into_iter().filter_map(|p| issuers(ctx, p)).flat_map(|(_, list)| list).map(newer).collect()
}

/// The same issuer as today's kind says it.
fn newer(j: &Jwt) -> authored::JwtRule {
    let header = |name: &String| authored::JwtHeader {
        name: name.clone(),
        prefix: if name.eq_ignore_ascii_case("authorization") { "Bearer ".to_owned() } else { String::new() },
    };
    authored::JwtRule {
        issuer: j.issuer.clone(),
        audiences: j.audiences.clone(),
        jwks_uri: j.jwks_uri.clone(),
        jwks: j.jwks.clone(),
        from_headers: j.jwt_headers.iter().map(header).collect(),
        from_params: j.jwt_params.clone(),
        forward_original_token: true,
        ..authored::JwtRule::default()
    }
}

/// The filter of a port.
pub(super) fn filter(ctx: &Ctx<'_>, port: Option<u16>) -> Option<JwtAuthn> {
    let (policy, list) = issuers(ctx, port)?;
    let all: Vec<usize> = (0..list.len()).collect();
    let optional = policy.origin_is_optional;
    let any = |of: &[usize]| JwtRequires::Inline(one_of(of, optional));
    let rules = match single(&list) {
        Some(None) => vec![JwtRule { matches: RouteMatch::any(), requires: any(&all) }],
        Some(Some(t)) => {
            let excluded = t.excluded_paths.iter().map(|p| (path(p), JwtRequires::Nothing));
            let included = t.included_paths.iter().map(|p| (path(p), any(&all)));
            let everything = t.included_paths.is_empty().then(|| (RouteMatch::any(), any(&all)));
            let entries = excluded.chain(included).chain(everything);
            entries.map(|(matches, requires)| JwtRule { matches, requires }).collect()
        }
        None => combined(&list)
            .map(|sets| {
                sets.into_iter().map(|(matches, of)| JwtRule { matches, requires: any(&of) }).collect()
            })
            .unwrap_or_else(|| vec![JwtRule { matches: RouteMatch::any(), requires: any(&all) }]),
    };
    Some(JwtAuthn {
        providers: list.iter().enumerate().map(|(i, j)| (named(i), provider(ctx, &newer(j)))).collect(),
        rules,
        requirements: Default::default(),
        bypass_cors_preflight: true,
    })
}

fn one_of(issuers: &[usize], optional: bool) -> JwtRequirement {
    let mut list: Vec<JwtRequirement> = issuers.iter().map(|i| JwtRequirement::Provider(named(*i))).collect();
    if optional {
        list.push(JwtRequirement::AllowMissingOrFailed);
    }
    match list.len() {
        // Envoy refuses alternatives of which there is one; none at all lets nobody in.
        1 => list.remove(0),
        _ => JwtRequirement::Any(list),
    }
}

/// `Some(None)` if every request triggers all, `Some(Some(rule))` if all have this one rule and no other.
fn single<'a>(list: &[&'a Jwt]) -> Option<Option<&'a TriggerRule>> {
    let (first, rest) = list.split_first()?;
    if rest.iter().any(|j| j.trigger_rules != first.trigger_rules) {
        return None;
    }
    match first.trigger_rules.as_slice() {
        [] => Some(None),
        [one] => Some(Some(one)),
        _ => None,
    }
}

/// A path without its query, the whole of it.
fn path(p: &TriggerPath) -> RouteMatch {
    let path = match p {
        TriggerPath { exact: Some(s), .. } => PathMatch::Exact(s.clone()),
        TriggerPath { prefix: Some(s), .. } => PathMatch::Prefix(s.clone()),
        TriggerPath { suffix: Some(s), .. } => PathMatch::Regex(format!(".*{}", regex::escape(s))),
        TriggerPath { regex: Some(s), .. } => PathMatch::Regex(s.clone()),
        // Of nothing.
        _ => PathMatch::Regex("[^\\s\\S]".to_owned()),
    };
    RouteMatch { path, ..RouteMatch::any() }
}

/// Sets of issuers that are triggered together, larger ones first, with what triggers them. `None` if there are too many.
fn combined(list: &[&Jwt]) -> Option<Vec<(RouteMatch, Vec<usize>)>> {
    let mut sets: Vec<(Vec<HeaderMatch>, Vec<usize>)> = vec![(vec![], vec![])];
    for (i, j) in list.iter().enumerate() {
        let mut next = Vec::new();
        for (conditions, of) in sets {
            let with = |more: Vec<HeaderMatch>| {
                let mut of = of.clone();
                of.push(i);
                (conditions.iter().cloned().chain(more).collect(), of)
            };
            if j.trigger_rules.is_empty() {
                next.push(with(vec![]));
                continue;
            }
            next.extend(j.trigger_rules.iter().map(|t| with(met(t))));
            next.push((conditions, of));
        }
        sets = next;
        if sets.len() > MAX_ENTRIES {
            return None;
        }
    }
    sets.retain(|(_, of)| !of.is_empty());
    sets.sort_by_key(|(_, of)| std::cmp::Reverse(of.len()));
    Some(sets.into_iter().map(|(headers, of)| (RouteMatch { headers, ..RouteMatch::any() }, of)).collect())
}

/// When a rule asks for a token.
fn met(t: &TriggerRule) -> Vec<HeaderMatch> {
    let condition = |paths: &[TriggerPath], invert: bool| {
        let any: Vec<String> = paths.iter().filter_map(|p| expression(p, !invert)).collect();
        HeaderMatch {
            name: ":path".to_owned(),
            value: HeaderValueMatch::Value(StringMatch::regex(format!("(?:{})(?:\\?.*)?", any.join("|")))),
            invert,
            missing_is_empty: invert,
        }
    };
    let mut out = Vec::new();
    if t.excluded_paths.iter().any(|p| expression(p, false).is_some()) {
        out.push(condition(&t.excluded_paths, true));
    }
    if !t.included_paths.is_empty() {
        out.push(condition(&t.included_paths, false));
    }
    out
}

/// A path up to its query. Expressions of users' own match `unknown`: everything or nothing.
fn expression(p: &TriggerPath, unknown: bool) -> Option<String> {
    match p {
        TriggerPath { exact: Some(s), .. } => Some(regex::escape(s)),
        TriggerPath { prefix: Some(s), .. } => Some(format!("{}[^?]*", regex::escape(s))),
        TriggerPath { suffix: Some(s), .. } => Some(format!("[^?]*{}", regex::escape(s))),
        _ => unknown.then(|| "[^?]*".to_owned()),
    }
}

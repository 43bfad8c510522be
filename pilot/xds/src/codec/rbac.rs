//! Role-based access control filters.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::{
    config::rbac::v3 as rbac,
    extensions::filters::{http::rbac::v3 as http, network::rbac::v3 as network},
    r#type::matcher::v3 as matcher,
};
use mesh_model::proxy::{
    MetadataMatch, Permission, Principal, Rbac, RbacAction, RbacPolicy, RbacRules, StringMatch,
};

use super::{At, Bad, Res, common::*, each, refuse};

/// Dynamic metadata under which a source cluster condition travels.
const METADATA: &str = "flotilla.dev";
const CLUSTER_KEY: &str = "source.cluster";
/// Conditions nest in the wire format; deeper than this is an attack or a mistake.
const MAX_DEPTH: u32 = 32;

pub(super) fn http(r: &Rbac) -> http::Rbac {
    http::Rbac {
        rules: r.rules.as_ref().map(rules),
        rules_stat_prefix: r.stat_prefix.clone(),
        shadow_rules: r.shadow.as_ref().map(rules),
        shadow_rules_stat_prefix: r.shadow_stat_prefix.clone(),
        ..Default::default()
    }
}

pub(super) fn network(r: &Rbac) -> network::Rbac {
    network::Rbac {
        rules: r.rules.as_ref().map(rules),
        shadow_rules: r.shadow.as_ref().map(rules),
        shadow_rules_stat_prefix: r.shadow_stat_prefix.clone(),
        // Envoy wants one.
        stat_prefix: if r.stat_prefix.is_empty() { "tcp".to_owned() } else { r.stat_prefix.clone() },
        ..Default::default()
    }
}

pub(super) fn to_http(m: http::Rbac) -> Res<Rbac> {
    refuse!(m; matcher, shadow_matcher);
    Ok(Rbac {
        rules: m.rules.map(|r| to_rules(r).at("rules")).transpose()?,
        shadow: m.shadow_rules.map(|r| to_rules(r).at("shadow_rules")).transpose()?,
        stat_prefix: m.rules_stat_prefix,
        shadow_stat_prefix: m.shadow_rules_stat_prefix,
    })
}

pub(super) fn to_network(m: network::Rbac) -> Res<Rbac> {
    refuse!(m; matcher, shadow_matcher, enforcement_type, delay_deny);
    Ok(Rbac {
        rules: m.rules.map(|r| to_rules(r).at("rules")).transpose()?,
        shadow: m.shadow_rules.map(|r| to_rules(r).at("shadow_rules")).transpose()?,
        stat_prefix: m.stat_prefix,
        shadow_stat_prefix: m.shadow_rules_stat_prefix,
    })
}

fn rules(r: &RbacRules) -> rbac::Rbac {
    let action = match r.action {
        RbacAction::Allow => rbac::rbac::Action::Allow,
        RbacAction::Deny => rbac::rbac::Action::Deny,
        RbacAction::Log => rbac::rbac::Action::Log,
    };
    let policies = r
        .policies
        .iter()
        .map(|(name, p)| {
            let p = rbac::Policy {
                permissions: p.permissions.iter().map(permission).collect(),
                principals: p.principals.iter().map(principal).collect(),
                ..Default::default()
            };
            (name.clone(), p)
        })
        .collect();
    rbac::Rbac { action: action.into(), policies, ..Default::default() }
}

fn to_rules(r: rbac::Rbac) -> Res<RbacRules> {
    let action = match rbac::rbac::Action::try_from(r.action) {
        Ok(rbac::rbac::Action::Allow) => RbacAction::Allow,
        Ok(rbac::rbac::Action::Deny) => RbacAction::Deny,
        Ok(rbac::rbac::Action::Log) => RbacAction::Log,
        Err(_) => return Err(Bad::unsupported("action", r.action)),
    };
    let mut policies = BTreeMap::new();
    for (name, p) in r.policies {
        refuse!(p; condition, checked_condition);
        let path = format!("policies[{name}]");
        let p = RbacPolicy {
            permissions: each("permissions", p.permissions, |x| to_permission(x, 0)).at(&path)?,
            principals: each("principals", p.principals, |x| to_principal(x, 0)).at(&path)?,
        };
        policies.insert(name, p);
    }
    Ok(RbacRules { action, policies })
}

fn path(m: &StringMatch) -> matcher::PathMatcher {
    matcher::PathMatcher { rule: Some(matcher::path_matcher::Rule::Path(string_match(m))) }
}

fn to_path(m: matcher::PathMatcher) -> Res<StringMatch> {
    match m.rule {
        Some(matcher::path_matcher::Rule::Path(s)) => to_string_match(s),
        None => Err(Bad::new("path", "is missing")),
    }
}

fn permission(p: &Permission) -> rbac::Permission {
    use rbac::permission::{Rule as R, Set};
    let set = |l: &[Permission]| Set { rules: l.iter().map(permission).collect() };
    let rule = match p {
        Permission::Any => R::Any(true),
        Permission::And(l) => R::AndRules(set(l)),
        Permission::Or(l) => R::OrRules(set(l)),
        Permission::Not(p) => R::NotRule(Box::new(permission(p))),
        Permission::Header(h) => R::Header(header_match(h)),
        Permission::Path(m) => R::UrlPath(path(m)),
        Permission::DestinationIp(n) => R::DestinationIp(cidr(n)),
        Permission::DestinationPort(p) => R::DestinationPort(u32::from(*p)),
        Permission::ServerName(m) => R::RequestedServerName(string_match(m)),
        Permission::Metadata(m) => R::SourcedMetadata(dynamic(m)),
    };
    rbac::Permission { rule: Some(rule) }
}

fn deeper(depth: u32) -> Res<u32> {
    if depth >= MAX_DEPTH {
        return Err(Bad::new("", "nests too deeply"));
    }
    Ok(depth + 1)
}

#[allow(deprecated)]
fn to_permission(p: rbac::Permission, depth: u32) -> Res<Permission> {
    use rbac::permission::Rule as R;
    let d = deeper(depth)?;
    Ok(match p.rule {
        Some(R::Any(true)) => Permission::Any,
        Some(R::AndRules(s)) => Permission::And(each("and_rules", s.rules, |p| to_permission(p, d))?),
        Some(R::OrRules(s)) => Permission::Or(each("or_rules", s.rules, |p| to_permission(p, d))?),
        Some(R::NotRule(p)) => Permission::Not(Box::new(to_permission(*p, d).at("not_rule")?)),
        Some(R::Header(h)) => Permission::Header(to_header_match(h).at("header")?),
        Some(R::UrlPath(m)) => Permission::Path(to_path(m).at("url_path")?),
        Some(R::DestinationIp(c)) => Permission::DestinationIp(to_cidr(c).at("destination_ip")?),
        Some(R::DestinationPort(n)) => Permission::DestinationPort(
            u16::try_from(n).map_err(|_| Bad::new("destination_port", "is above 65535"))?,
        ),
        Some(R::RequestedServerName(m)) => {
            Permission::ServerName(to_string_match(m).at("requested_server_name")?)
        }
        Some(R::Any(false)) => return Err(Bad::new("any", "must be true")),
        Some(R::DestinationPortRange(_)) => {
            return Err(Bad::unsupported("destination_port_range", "a port range"));
        }
        Some(R::Metadata(m)) => Permission::Metadata(to_metadata_match(m).at("metadata")?),
        Some(R::SourcedMetadata(m)) => Permission::Metadata(sourced(m).at("sourced_metadata")?),
        Some(R::Matcher(m) | R::UriTemplate(m)) => {
            return Err(Bad::unsupported("matcher", format_args!("extension {:?}", m.name)));
        }
        None => return Err(Bad::new("rule", "is missing")),
    })
}

fn principal(p: &Principal) -> rbac::Principal {
    use rbac::principal::{Authenticated, Identifier as I, Set};
    let set = |l: &[Principal]| Set { ids: l.iter().map(principal).collect() };
    let id = match p {
        Principal::Any => I::Any(true),
        Principal::And(l) => I::AndIds(set(l)),
        Principal::Or(l) => I::OrIds(set(l)),
        Principal::Not(p) => I::NotId(Box::new(principal(p))),
        Principal::Authenticated(m) => {
            I::Authenticated(Authenticated { principal_name: m.as_ref().map(string_match) })
        }
        Principal::DirectRemoteIp(n) => I::DirectRemoteIp(cidr(n)),
        Principal::RemoteIp(n) => I::RemoteIp(cidr(n)),
        Principal::Header(h) => I::Header(header_match(h)),
        Principal::Path(m) => I::UrlPath(path(m)),
        Principal::Metadata(m) => I::SourcedMetadata(dynamic(m)),
        Principal::SourceCluster(m) => I::SourcedMetadata(rbac::SourcedMetadata {
            metadata_matcher: Some(source_cluster(m)),
            metadata_source: 0,
        }),
    };
    rbac::Principal { identifier: Some(id) }
}

fn dynamic(m: &MetadataMatch) -> rbac::SourcedMetadata {
    rbac::SourcedMetadata { metadata_matcher: Some(metadata_match(m)), metadata_source: 0 }
}

fn is_ours(m: &rbac::SourcedMetadata) -> bool {
    m.metadata_matcher.as_ref().is_some_and(|m| m.filter == METADATA)
}

/// A condition on dynamic metadata; routes have none that a condition could be about.
fn sourced(m: rbac::SourcedMetadata) -> Res<MetadataMatch> {
    if m.metadata_source != 0 {
        return Err(Bad::unsupported("metadata_source", "another source than the request's own metadata"));
    }
    to_metadata_match(m.metadata_matcher.unwrap_or_default())
}

fn source_cluster(m: &StringMatch) -> matcher::MetadataMatcher {
    use matcher::{metadata_matcher::PathSegment, value_matcher::MatchPattern};
    matcher::MetadataMatcher {
        filter: METADATA.to_owned(),
        path: vec![PathSegment {
            segment: Some(matcher::metadata_matcher::path_segment::Segment::Key(CLUSTER_KEY.to_owned())),
        }],
        value: Some(matcher::ValueMatcher {
            match_pattern: Some(MatchPattern::StringMatch(string_match(m))),
        }),
        invert: false,
    }
}

fn to_source_cluster(m: matcher::MetadataMatcher) -> Res<StringMatch> {
    use matcher::{metadata_matcher::path_segment::Segment, value_matcher::MatchPattern};
    let [segment] = m.path.as_slice() else {
        return Err(Bad::unsupported("", "matching on metadata"));
    };
    let key = matches!(&segment.segment, Some(Segment::Key(k)) if k == CLUSTER_KEY);
    match m.value.and_then(|v| v.match_pattern) {
        Some(MatchPattern::StringMatch(s)) if key && m.filter == METADATA && !m.invert => to_string_match(s),
        _ => Err(Bad::unsupported("", format_args!("matching on metadata {:?}", m.filter))),
    }
}

#[allow(deprecated)]
fn to_principal(p: rbac::Principal, depth: u32) -> Res<Principal> {
    use rbac::principal::Identifier as I;
    let d = deeper(depth)?;
    Ok(match p.identifier {
        Some(I::Any(true)) => Principal::Any,
        Some(I::AndIds(s)) => Principal::And(each("and_ids", s.ids, |p| to_principal(p, d))?),
        Some(I::OrIds(s)) => Principal::Or(each("or_ids", s.ids, |p| to_principal(p, d))?),
        Some(I::NotId(p)) => Principal::Not(Box::new(to_principal(*p, d).at("not_id")?)),
        Some(I::Authenticated(a)) => Principal::Authenticated(
            a.principal_name.map(|m| to_string_match(m).at("authenticated")).transpose()?,
        ),
        Some(I::DirectRemoteIp(c) | I::SourceIp(c)) => {
            Principal::DirectRemoteIp(to_cidr(c).at("direct_remote_ip")?)
        }
        Some(I::RemoteIp(c)) => Principal::RemoteIp(to_cidr(c).at("remote_ip")?),
        Some(I::Header(h)) => Principal::Header(to_header_match(h).at("header")?),
        Some(I::UrlPath(m)) => Principal::Path(to_path(m).at("url_path")?),
        Some(I::SourcedMetadata(m)) if is_ours(&m) => Principal::SourceCluster(
            to_source_cluster(m.metadata_matcher.unwrap_or_default()).at("sourced_metadata")?,
        ),
        Some(I::SourcedMetadata(m)) => Principal::Metadata(sourced(m).at("sourced_metadata")?),
        Some(I::Any(false)) => return Err(Bad::new("any", "must be true")),
        Some(I::FilterState(_)) => return Err(Bad::unsupported("filter_state", "matching on filter state")),
        Some(I::Metadata(m)) => Principal::Metadata(to_metadata_match(m).at("metadata")?),
        Some(I::Custom(c)) => return Err(Bad::unsupported("custom", format_args!("extension {:?}", c.name))),
        None => return Err(Bad::new("identifier", "is missing")),
    })
}

//! What other clusters may reach of a workload: what is exported to them, and nothing else.
//!
//! A cluster is not told of what is not exported to it, but its workloads could guess a name, and gateways pass on bytes
//! without knowing who sent them. The workload's own proxy knows, by the intermediate in the caller's certificate. A
//! port is open to every cluster to which one of its services is exported: a session does not tell which one it is for.
//!
//! Clusters that left or were evicted get in nowhere, although their certificates may still be valid.
//!
//! Callers without a certificate of the mesh are of no cluster; whether they get in is up to mTLS modes.

use std::collections::BTreeMap;

use mesh_model::{
    ClusterId,
    federation::{Audience, ForeignBundle},
    proxy::{Permission, Principal, RbacPolicy, StringMatch},
};

use crate::{exports, generate::Ctx};

/// Names of these rules, in logs, metrics and `flotilla explain`.
const NOT_EXPORTED: &str = "flotilla-not-exported";
const FORMER: &str = "flotilla-former-member";
const REVOKED: &str = "flotilla-revoked";

fn is(c: &ClusterId) -> Principal {
    Principal::SourceCluster(StringMatch::exact(c.as_str()))
}

/// Whoever is of a cluster, and of none of these.
fn of_others(these: Vec<Principal>) -> Principal {
    // Nearly always it is the first.
    let not = Principal::Not(Box::new(Principal::Or(these)));
    Principal::And(vec![not, Principal::SourceCluster(StringMatch::regex(".+"))])
}

/// What a rule of these means, and what to do about it, if `name` is one.
pub(in crate::generate) fn in_words(name: &str) -> Option<(&'static str, &'static str)> {
    if name == FORMER {
        return Some((
            "that cluster left the mesh or was evicted",
            "let it join again, with a token of the founder",
        ));
    }
    name.starts_with(NOT_EXPORTED).then_some((
        "no service of this port is exported to that cluster",
        "export it: a ServiceExport, its flotilla.dev/export-to annotation, and ExportPolicies",
    ))
}

/// DENY rules for a proxy's inbound traffic.
pub(super) fn rules(ctx: &Ctx<'_>) -> Vec<(String, RbacPolicy)> {
    // Gateways serve whom their configuration says.
    if ctx.proxy.router {
        return vec![];
    }
    let own = &ctx.world.settings.cluster;
    let mut open = BTreeMap::<u16, Audience>::new();
    for (entry, endpoint) in ctx.world.index.instances(&ctx.proxy.addresses) {
        let s = &entry.service;
        if !entry.exported || s.namespace != ctx.proxy.namespace {
            continue;
        }
        let mut exports = ctx.world.config.service_exports.iter();
        let Some(export) = exports.find(|e| e.namespace == s.namespace && e.name == s.name) else { continue };
        let audience = exports::audience(ctx.world, export);
        let before = open.remove(&endpoint.port).unwrap_or(Audience::Only([].into()));
        open.insert(endpoint.port, before.or(audience));
    }
    // A foreign proxy does not know of clusters, but it does of trust domains.
    if !ctx.proxy.flotilla {
        let mut out = by_domain(ctx, &open);
        if let Some(revoked) = &ctx.world.config.revoked {
            // It denies nobody: revocation lists decide in handshakes alone, and a chain of filters that is another one than
            // before lets connections from before it end.
            let nobody = Principal::Not(Box::new(Principal::Authenticated(None)));
            let nobody = Principal::And(vec![nobody, Principal::Authenticated(None)]);
            let policy = RbacPolicy { permissions: vec![Permission::Any], principals: vec![nobody] };
            out.push((format!("{REVOKED}[{revoked}]"), policy));
        }
        return out;
    }
    let mut out = Vec::new();
    let mut rule = |name: String, permission, principals| {
        out.push((name, RbacPolicy { permissions: vec![permission], principals }));
    };
    rule(NOT_EXPORTED.to_owned(), all_but(open.keys()), vec![of_others(vec![is(own)])]);
    for (port, audience) in open {
        let principals = match audience {
            Audience::All => continue,
            Audience::Only(set) => {
                vec![of_others(std::iter::once(own).chain(&set).map(is).collect())]
            }
            Audience::Except(set) => set.iter().filter(|c| *c != own).map(is).collect(),
        };
        rule(format!("{NOT_EXPORTED}-to-it[{port}]"), Permission::DestinationPort(port), principals);
    }
    let former: Vec<_> = ctx.world.config.former.iter().map(|f| is(&f.id)).collect();
    if !former.is_empty() {
        rule(FORMER.to_owned(), Permission::Any, former);
    }
    out
}

/// All ports but these.
fn all_but<'p>(ports: impl Iterator<Item = &'p u16>) -> Permission {
    match ports.map(|p| Permission::DestinationPort(*p)).collect::<Vec<_>>() {
        none if none.is_empty() => Permission::Any,
        some => Permission::Not(Box::new(Permission::Or(some))),
    }
}

/// For each other trust domain: what is exported to none of its clusters is closed to whoever is of it.
fn by_domain(ctx: &Ctx<'_>, open: &BTreeMap<u16, Audience>) -> Vec<(String, RbacPolicy)> {
    let rule = |(domain, bundle): (&String, &ForeignBundle)| {
        let ports = open.iter().filter(|(_, a)| bundle.clusters.iter().any(|c| a.includes(c)));
        let of_it = StringMatch::prefix(format!("spiffe://{domain}/"));
        let policy = RbacPolicy {
            permissions: vec![all_but(ports.map(|(p, _)| p))],
            principals: vec![Principal::Authenticated(Some(of_it))],
        };
        (format!("{NOT_EXPORTED}-to[{domain}]"), policy)
    };
    // Nothing is exported to a domain without clusters: AuthorizationPolicies say what it may.
    ctx.world.config.bundles.iter().filter(|(_, b)| !b.by_bundle).map(rule).collect()
}

//! `AuthorizationPolicy` as RBAC filters.
//!
//! Behind them all stands what no policy can open: what other clusters may reach (`peers.rs`).
//!
//! Where no AuthorizationPolicy decides anything, roles of 1.0 do (`roles.rs`).
//!
//! Order: AUDIT (never changes the outcome), DENY, ALLOW. Inside a source or operation fields are
//! ANDed and their values ORed; entries of `from` and `to` are ORed; `from`, `to` and every `when`
//! are ANDed.
//!
//! What cannot be evaluated is decided so that nobody gets in who should not:
//!
//! - a condition that this proxy cannot check (`source.cluster` on a foreign proxy) makes an ALLOW rule
//!   match nothing, and is dropped from a DENY rule, which then denies more;
//! - HTTP conditions on a TCP port likewise, and conditions on tokens where nobody looks at them (gRPC libraries);
//! - `CUSTOM` (`custom.rs`) whose provider cannot be asked denies what its rules match.

mod claims;
mod custom;
mod peers;
mod roles;

pub(crate) use self::roles::covered as by_role;
pub(super) use self::{
    custom::{applies_to as has_custom, clusters as authorizers, http as custom},
    peers::in_words as of_clusters,
    roles::in_words as of_roles,
};

use std::collections::BTreeMap;

use ipnet::IpNet;
use mesh_model::{
    authored::{AuthorizationAction, AuthorizationPolicy, AuthorizationRule, Condition, Operation, Source},
    proxy::{
        HeaderMatch, HeaderValueMatch, NetworkFilter, Permission, Principal, Rbac, RbacAction, RbacPolicy,
        RbacRules, StringMatch, StringMatchKind,
    },
};

use super::Ctx;
use crate::{attachment::Attachment, config::Doc};

/// Annotation of policies that are only evaluated and logged.
const DRY_RUN: &str = "istio.io/dry-run";

/// Rules for requests.
pub(super) fn http(ctx: &Ctx<'_>) -> Vec<Rbac> {
    filters(ctx, Traffic::Requests)
}

/// Rules for bytes.
pub(super) fn tcp(ctx: &Ctx<'_>) -> Vec<Rbac> {
    filters(ctx, Traffic::Bytes)
}

/// Rules that let nobody in.
pub(super) fn nobody() -> Rbac {
    let rules = RbacRules { action: RbacAction::Allow, policies: BTreeMap::new() };
    Rbac { rules: Some(rules), ..Rbac::default() }
}

/// All that stands before bytes.
pub(super) fn guards(ctx: &Ctx<'_>) -> Vec<NetworkFilter> {
    let mut out = custom::tcp(ctx);
    out.extend(tcp(ctx).into_iter().map(NetworkFilter::Rbac));
    out
}

/// Rules for datagrams.
pub(super) fn udp(ctx: &Ctx<'_>) -> Vec<Rbac> {
    filters(ctx, Traffic::Datagrams)
}

/// Whether a policy is only evaluated and logged.
pub(crate) fn is_dry_run(p: &Doc<AuthorizationPolicy>) -> bool {
    p.annotations.get(DRY_RUN).is_some_and(|v| v == "true")
}

/// What a filter looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Traffic {
    Requests,
    Bytes,
    Datagrams,
}

fn applies(ctx: &Ctx<'_>, p: &Doc<AuthorizationPolicy>) -> bool {
    let to = Attachment {
        namespace: &p.namespace,
        selector: p.spec.selector.as_ref(),
        target_ref: p.spec.target_ref.as_ref(),
        target_refs: &p.spec.target_refs,
    };
    to.includes(&ctx.world.config, ctx.proxy)
}

/// A rule of a policy that applies to a workload.
#[derive(Debug, Clone)]
pub struct AuthzRule {
    /// Namespace of the policy.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Position of the rule; `None` stands for a policy without rules, which matches nothing.
    pub index: Option<usize>,
    /// What a match means.
    pub action: AuthorizationAction,
    /// Whom `CUSTOM` asks.
    pub provider: Option<String>,
    /// There is such a provider, and the workload can ask it.
    pub can_ask: bool,
    /// It is only evaluated and logged.
    pub dry_run: bool,
    /// As the proxy evaluates it; `None` if it can match nothing there, such as a condition on requests for bytes.
    pub policy: Option<RbacPolicy>,
}

/// The rules that a workload's proxy asks, policy by policy, oldest first.
pub(super) fn each(ctx: &Ctx<'_>, http: bool) -> Vec<AuthzRule> {
    let mut out = Vec::new();
    for doc in ctx.world.config.authorization_policies.iter().filter(|p| applies(ctx, p)) {
        let action = match doc.spec.action {
            AuthorizationAction::Audit => RbacAction::Log,
            AuthorizationAction::Deny | AuthorizationAction::Custom => RbacAction::Deny,
            AuthorizationAction::Allow => RbacAction::Allow,
        };
        let rule = |index: Option<usize>, policy: Option<RbacPolicy>| AuthzRule {
            namespace: doc.namespace.clone(),
            name: doc.name.clone(),
            index,
            action: doc.spec.action,
            can_ask: doc.spec.action == AuthorizationAction::Custom && !custom::denies(ctx, doc),
            provider: doc.spec.provider.as_ref().map(|p| p.name.clone()),
            dry_run: is_dry_run(doc),
            policy,
        };
        if doc.spec.rules.is_empty() {
            out.push(rule(None, None));
        }
        let maker = Maker { ctx, namespace: &doc.namespace, http, action };
        out.extend(doc.spec.rules.iter().enumerate().map(|(i, r)| rule(Some(i), maker.rule(r))));
    }
    out.extend(roles::access(ctx).into_iter().flat_map(|a| a.each(ctx, http)));
    out
}

fn filters(ctx: &Ctx<'_>, traffic: Traffic) -> Vec<Rbac> {
    let http = traffic == Traffic::Requests;
    let mut enforced: BTreeMap<u8, BTreeMap<String, RbacPolicy>> = BTreeMap::new();
    let mut shadow: BTreeMap<u8, BTreeMap<String, RbacPolicy>> = BTreeMap::new();
    for doc in ctx.world.config.authorization_policies.iter().filter(|p| applies(ctx, p)) {
        let (slot, action) = match doc.spec.action {
            AuthorizationAction::Audit => (0, RbacAction::Log),
            // Somebody is asked.
            AuthorizationAction::Custom if traffic != Traffic::Datagrams && !custom::denies(ctx, doc) => {
                continue;
            }
            AuthorizationAction::Deny | AuthorizationAction::Custom => (1, RbacAction::Deny),
            AuthorizationAction::Allow => (2, RbacAction::Allow),
        };
        let dry = is_dry_run(doc);
        // An ALLOW policy without rules matches nothing and yet is there, so everything is denied.
        let rules = if dry { &mut shadow } else { &mut enforced }.entry(slot).or_default();
        for (i, rule) in doc.spec.rules.iter().enumerate() {
            let maker = Maker { ctx, namespace: &doc.namespace, http, action };
            if let Some(p) = maker.rule(rule) {
                rules.insert(format!("ns[{}]-policy[{}]-rule[{i}]", doc.namespace, doc.name), p);
            }
        }
    }
    if let Some(access) = roles::access(ctx) {
        for (dry, rules) in access.filters(ctx, http) {
            if dry { &mut shadow } else { &mut enforced }.entry(2).or_default().extend(rules);
        }
    }
    for (name, policy) in peers::rules(ctx) {
        enforced.entry(1).or_default().insert(name, policy);
    }
    let action = |slot| match slot {
        0 => RbacAction::Log,
        1 => RbacAction::Deny,
        _ => RbacAction::Allow,
    };
    let mut out = Vec::new();
    for slot in 0u8..=2 {
        let make = |m: Option<BTreeMap<String, RbacPolicy>>| {
            m.map(|policies| RbacRules { action: action(slot), policies })
        };
        let rules = make(enforced.remove(&slot));
        let dry = make(shadow.remove(&slot));
        if rules.is_some() || dry.is_some() {
            let stat_prefix = if http { String::new() } else { "tcp.".to_owned() };
            out.push(Rbac { rules, shadow: dry, stat_prefix, ..Rbac::default() });
        }
    }
    out
}

/// A condition that this proxy or protocol cannot check.
struct Unknown;

type Checked<T> = Result<T, Unknown>;

struct Maker<'a, 'w> {
    ctx: &'a Ctx<'w>,
    namespace: &'a str,
    http: bool,
    action: RbacAction,
}

impl Maker<'_, '_> {
    /// `None` if the rule matches nothing.
    fn rule(&self, rule: &AuthorizationRule) -> Option<RbacPolicy> {
        let mut common_permissions = Vec::new();
        let mut common_principals = Vec::new();
        for w in &rule.when {
            self.keep(self.when(w, &mut common_permissions, &mut common_principals))?;
        }
        let permissions = match rule.to.as_deref() {
            None | Some([]) => vec![and_permissions(common_permissions)],
            Some(list) => self.alternatives(list.iter().map(|t| t.operation.as_ref()), |m, o| {
                let mut all = common_permissions.clone();
                m.operation(o, &mut all)?;
                Some(and_permissions(all))
            })?,
        };
        let principals = match rule.from.as_deref() {
            None | Some([]) => vec![and_principals(common_principals)],
            Some(list) => self.alternatives(list.iter().map(|f| f.source.as_ref()), |m, s| {
                let mut all = common_principals.clone();
                m.source(s, &mut all)?;
                Some(and_principals(all))
            })?,
        };
        Some(RbacPolicy { permissions, principals })
    }

    /// Entries of which one must match; `None` if none can.
    fn alternatives<'i, I: 'i, O>(
        &self,
        list: impl Iterator<Item = Option<&'i I>>,
        f: impl Fn(&Self, &I) -> Option<O>,
    ) -> Option<Vec<O>> {
        let out: Vec<O> = list.flatten().filter_map(|i| f(self, i)).collect();
        (!out.is_empty()).then_some(out)
    }

    /// Applies the rule for unknown conditions: `None` gives up the entry.
    fn keep(&self, r: Checked<()>) -> Option<()> {
        match (r, self.action) {
            (Ok(()), _) | (Err(Unknown), RbacAction::Deny) => Some(()),
            (Err(Unknown), RbacAction::Allow | RbacAction::Log) => None,
        }
    }

    fn http_only(&self) -> Checked<()> {
        if self.http { Ok(()) } else { Err(Unknown) }
    }

    /// A gRPC library does not look at tokens.
    fn claims(&self) -> Checked<()> {
        if self.ctx.proxy.grpc { Err(Unknown) } else { self.http_only() }
    }

    fn operation(&self, o: &Operation, out: &mut Vec<Permission>) -> Option<()> {
        let fields: [(&[String], &[String], fn(&str) -> Option<Permission>, bool); 4] = [
            (&o.hosts, &o.not_hosts, host, true),
            (&o.methods, &o.not_methods, |v| Some(header_permission(":method", v)), true),
            (&o.paths, &o.not_paths, |v| Some(Permission::Path(path(v))), true),
            (&o.ports, &o.not_ports, |v| v.parse().ok().map(Permission::DestinationPort), false),
        ];
        for (yes, no, make, http) in fields {
            if yes.is_empty() && no.is_empty() {
                continue;
            }
            if http {
                let r = self.http_only();
                let unknown = r.is_err();
                self.keep(r)?;
                if unknown {
                    continue;
                }
            }
            permission_values(yes, no, make, out);
        }
        Some(())
    }

    fn source(&self, s: &Source, out: &mut Vec<Principal>) -> Option<()> {
        let ns = |v: &str| Some(Principal::Authenticated(Some(namespace(v))));
        let account = |v: &str| Some(Principal::Authenticated(Some(self.service_account(v))));
        principal_values(&s.principals, &s.not_principals, |v| self.principal(v), out);
        let domain_said = !s.trust_domains.is_empty() || !s.principals.is_empty();
        self.names(&s.namespaces, &s.not_namespaces, ns, domain_said, out);
        self.names(&s.service_accounts, &s.not_service_accounts, account, domain_said, out);
        principal_values(&s.trust_domains, &s.not_trust_domains, |v| self.trust_domain(v), out);
        principal_values(&s.ip_blocks, &s.not_ip_blocks, |v| net(v).map(Principal::DirectRemoteIp), out);
        principal_values(
            &s.remote_ip_blocks,
            &s.not_remote_ip_blocks,
            |v| net(v).map(Principal::RemoteIp),
            out,
        );
        if !(s.request_principals.is_empty() && s.not_request_principals.is_empty()) {
            let r = self.claims();
            let known = r.is_ok();
            self.keep(r)?;
            if known {
                principal_values(
                    &s.request_principals,
                    &s.not_request_principals,
                    |v| Some(claims::request_principal(v)),
                    out,
                );
            }
        }
        Some(())
    }

    /// Names without a trust domain. Whom they let in is of the own one: a namespace of another domain is somebody
    /// else's, whatever it is called. Whom they keep out may be of any.
    fn names(
        &self,
        yes: &[String],
        no: &[String],
        make: impl Fn(&str) -> Option<Principal>,
        domain_said: bool,
        out: &mut Vec<Principal>,
    ) {
        if domain_said || self.ctx.world.config.bundles.is_empty() {
            return principal_values(yes, no, make, out);
        }
        let own = || {
            let of = |domain: &str| {
                Principal::Authenticated(Some(StringMatch::prefix(format!("spiffe://{domain}/"))))
            };
            let domain = of(self.ctx.world.settings.trust_domain.as_str());
            match self.ctx.world.config.mesh.trust_domain_aliases.as_slice() {
                [] => domain,
                aliases => {
                    Principal::Or(std::iter::once(domain).chain(aliases.iter().map(|a| of(a))).collect())
                }
            }
        };
        if !yes.is_empty() && self.action == RbacAction::Allow {
            out.push(own());
        }
        principal_values(yes, &[], &make, out);
        if self.action == RbacAction::Deny {
            principal_values(&[], no, |v| Some(Principal::And(vec![own(), make(v)?])), out);
        } else {
            principal_values(&[], no, make, out);
        }
    }

    /// Names of the mesh's trust domain, if `domain` is one of several.
    fn same_domain(&self, domain: &str) -> Vec<&str> {
        let own = self.ctx.world.settings.trust_domain.as_str();
        let aliases = &self.ctx.world.config.mesh.trust_domain_aliases;
        let all = || std::iter::once(own).chain(aliases.iter().map(String::as_str));
        if aliases.is_empty() || !all().any(|d| d == domain) { vec![] } else { all().collect() }
    }

    /// A principal; one of the mesh's trust domain under any of its names.
    fn principal(&self, v: &str) -> Option<Principal> {
        let same = v.split_once('/').map(|(domain, rest)| (self.same_domain(domain), rest));
        match same.filter(|(domains, _)| !domains.is_empty()) {
            None => principal(v),
            Some((domains, rest)) => Some(Principal::Or(
                domains.iter().filter_map(|d| principal(&format!("{d}/{rest}"))).collect(),
            )),
        }
    }

    fn trust_domain(&self, v: &str) -> Option<Principal> {
        match self.same_domain(v) {
            domains if domains.is_empty() => trust_domain(v),
            domains => Some(Principal::Or(domains.iter().filter_map(|d| trust_domain(d)).collect())),
        }
    }

    fn service_account(&self, v: &str) -> StringMatch {
        let (ns, sa) = v.split_once('/').unwrap_or((self.namespace, v));
        StringMatch::regex(format!("spiffe://[^/]+/ns/{}/sa/{}", regex::escape(ns), regex::escape(sa)))
    }

    fn when(
        &self,
        c: &Condition,
        permissions: &mut Vec<Permission>,
        principals: &mut Vec<Principal>,
    ) -> Checked<()> {
        let (yes, no) = (c.values.as_slice(), c.not_values.as_slice());
        if let Some(name) = c.key.strip_prefix("request.headers[").and_then(|k| k.strip_suffix(']')) {
            self.http_only()?;
            let name = name.to_ascii_lowercase();
            // It refuses rules about these.
            if self.ctx.proxy.grpc && (name == ":scheme" || name.starts_with("grpc-")) {
                return Err(Unknown);
            }
            principal_values(yes, no, |v| Some(Principal::Header(header(&name, v, false))), principals);
            return Ok(());
        }
        if let Some(what) = c.key.strip_prefix("request.auth.") {
            self.claims()?;
            let make = claims::condition(what).ok_or(Unknown)?;
            principal_values(yes, no, |v| Some(make(v)), principals);
            return Ok(());
        }
        match c.key.as_str() {
            "source.ip" => principal_values(yes, no, |v| net(v).map(Principal::DirectRemoteIp), principals),
            "remote.ip" => principal_values(yes, no, |v| net(v).map(Principal::RemoteIp), principals),
            "source.namespace" => {
                let make = |v: &str| Some(Principal::Authenticated(Some(namespace(v))));
                self.names(yes, no, make, false, principals);
            }
            "source.serviceAccount" => {
                let make = |v: &str| Some(Principal::Authenticated(Some(self.service_account(v))));
                self.names(yes, no, make, false, principals);
            }
            "source.principal" => principal_values(yes, no, |v| self.principal(v), principals),
            "source.cluster" => {
                if !self.ctx.proxy.flotilla {
                    return Err(Unknown);
                }
                principal_values(yes, no, |v| Some(Principal::SourceCluster(pattern(v))), principals);
            }
            "destination.ip" => {
                permission_values(yes, no, |v| net(v).map(Permission::DestinationIp), permissions)
            }
            "destination.port" => {
                permission_values(yes, no, |v| v.parse().ok().map(Permission::DestinationPort), permissions);
            }
            "connection.sni" => {
                permission_values(yes, no, |v| Some(Permission::ServerName(pattern(v))), permissions);
            }
            _ => return Err(Unknown),
        }
        Ok(())
    }
}

/// Adds "any of `yes`" and "none of `no`". Values that cannot be parsed never match.
fn permission_values(
    yes: &[String],
    no: &[String],
    make: impl Fn(&str) -> Option<Permission>,
    out: &mut Vec<Permission>,
) {
    if !yes.is_empty() {
        out.push(Permission::Or(yes.iter().filter_map(|v| make(v)).collect()).or_never());
    }
    let none: Vec<Permission> = no.iter().filter_map(|v| make(v)).collect();
    if !none.is_empty() {
        out.push(Permission::Not(Box::new(Permission::Or(none))));
    }
}

fn principal_values(
    yes: &[String],
    no: &[String],
    make: impl Fn(&str) -> Option<Principal>,
    out: &mut Vec<Principal>,
) {
    if !yes.is_empty() {
        out.push(Principal::Or(yes.iter().filter_map(|v| make(v)).collect()).or_never());
    }
    let none: Vec<Principal> = no.iter().filter_map(|v| make(v)).collect();
    if !none.is_empty() {
        out.push(Principal::Not(Box::new(Principal::Or(none))));
    }
}

/// Envoy refuses an empty list of alternatives; it means "never".
trait OrNever {
    fn or_never(self) -> Self;
}

impl OrNever for Permission {
    fn or_never(self) -> Self {
        match self {
            Self::Or(l) if l.is_empty() => Self::Not(Box::new(Self::Any)),
            other => other,
        }
    }
}

impl OrNever for Principal {
    fn or_never(self) -> Self {
        match self {
            Self::Or(l) if l.is_empty() => Self::Not(Box::new(Self::Any)),
            other => other,
        }
    }
}

fn and_permissions(mut list: Vec<Permission>) -> Permission {
    match list.len() {
        0 => Permission::Any,
        1 => list.remove(0),
        _ => Permission::And(list),
    }
}

fn and_principals(mut list: Vec<Principal>) -> Principal {
    match list.len() {
        0 => Principal::Any,
        1 => list.remove(0),
        _ => Principal::And(list),
    }
}

fn net(v: &str) -> Option<IpNet> {
    v.parse().ok().or_else(|| v.parse::<std::net::IpAddr>().ok().map(IpNet::from))
}

/// Exact, `prefix*`, `*suffix`, or `*` for anything that is not empty.
fn pattern(v: &str) -> StringMatch {
    if v == "*" {
        StringMatch::regex(".+")
    } else if let Some(p) = v.strip_suffix('*') {
        StringMatch::prefix(p)
    } else if let Some(s) = v.strip_prefix('*') {
        StringMatch::suffix(s)
    } else {
        StringMatch::exact(v)
    }
}

fn principal(v: &str) -> Option<Principal> {
    let m = pattern(v);
    Some(Principal::Authenticated(match m.kind {
        StringMatchKind::Regex(_) => None,
        StringMatchKind::Exact(s) => Some(StringMatch::exact(format!("spiffe://{s}"))),
        StringMatchKind::Prefix(s) => Some(StringMatch::prefix(format!("spiffe://{s}"))),
        _ => Some(m),
    }))
}

fn trust_domain(v: &str) -> Option<Principal> {
    let m = pattern(v);
    Some(Principal::Authenticated(Some(match m.kind {
        StringMatchKind::Exact(s) => StringMatch::prefix(format!("spiffe://{s}/")),
        StringMatchKind::Prefix(s) => StringMatch::prefix(format!("spiffe://{s}")),
        StringMatchKind::Suffix(s) => StringMatch::regex(format!("spiffe://[^/]*{}/.*", regex::escape(&s))),
        _ => StringMatch::prefix("spiffe://"),
    })))
}

/// The namespace part of a SPIFFE ID.
fn namespace(v: &str) -> StringMatch {
    let inner = match pattern(v).kind {
        StringMatchKind::Exact(s) => regex::escape(&s),
        StringMatchKind::Prefix(s) => format!("{}[^/]*", regex::escape(&s)),
        StringMatchKind::Suffix(s) => format!("[^/]*{}", regex::escape(&s)),
        _ => "[^/]+".to_owned(),
    };
    StringMatch::regex(format!("spiffe://[^/]+/ns/{inner}/.*"))
}

fn header(name: &str, v: &str, ignore_case: bool) -> HeaderMatch {
    let value = if v == "*" {
        HeaderValueMatch::Present(true)
    } else {
        let mut m = pattern(v);
        m.ignore_case = ignore_case && !matches!(m.kind, StringMatchKind::Regex(_));
        HeaderValueMatch::Value(m)
    };
    HeaderMatch { name: name.to_owned(), value, invert: false, missing_is_empty: false }
}

fn header_permission(name: &str, v: &str) -> Permission {
    Permission::Header(header(name, v, false))
}

/// Host names compare without case.
fn host(v: &str) -> Option<Permission> {
    Some(Permission::Header(header(":authority", v, true)))
}

/// A path, or a template with `{*}` for one segment and `{**}` for the rest.
fn path(v: &str) -> StringMatch {
    if !v.contains("{*}") && !v.contains("{**}") {
        return pattern(v);
    }
    let parts: Vec<String> = v
        .split('/')
        .map(|s| match s {
            "{*}" => "[^/]+".to_owned(),
            "{**}" => ".*".to_owned(),
            s => regex::escape(s),
        })
        .collect();
    StringMatch::regex(parts.join("/"))
}

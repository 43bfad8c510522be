//! Whether a workload's authorization lets a caller in, as far as that is known without the request itself.

use std::net::IpAddr;

use mesh_model::{
    explain::Step,
    proxy::{
        HeaderMatch, HeaderValueMatch, Permission, Principal, Rbac, RbacAction, RbacPolicy, StringMatch,
        StringMatchKind,
    },
    registry::{Labels, ServicePort},
};

use super::super::{Ctx, rbac};
use crate::{
    index::Entry,
    proxy::{Interception, ProxyNode},
    world::World,
};

/// The request that is asked about.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(default)]
pub struct Request {
    /// Method.
    pub method: String,
    /// Path.
    pub path: String,
}

impl Default for Request {
    fn default() -> Self {
        Self { method: "GET".into(), path: "/".into() }
    }
}

/// A workload's proxy, as far as its policies go.
pub(super) fn viewer(world: &World, namespace: &str, labels: &Labels, addresses: Vec<IpAddr>) -> ProxyNode {
    ProxyNode {
        id: String::new(),
        router: false,
        east_west: false,
        addresses,
        namespace: namespace.to_owned(),
        service_account: String::new(),
        labels: labels.clone(),
        locality: Default::default(),
        network: Some(world.settings.network.clone()),
        interception: Interception::None,
        http_proxy_port: None,
        inbound: Default::default(),
        flotilla: true,
        grpc: false,
        takes_hosts: false,
        asks: None,
        can_ask: false,
        on_demand: false,
        tunnels: true,
        tls_files: None,
        topology: None,
        headers: None,
        connections: None,
        process: mesh_xds::process::ProcessSettings::default(),
        federation: None,
        metadata: Default::default(),
        filters: Default::default(),
        situation: Default::default(),
    }
}

/// Asks the policies of the workloads of a service. `from` is the caller's SPIFFE ID and cluster; `None` if it comes
/// without mTLS.
pub(super) fn step(
    ctx: &Ctx<'_>,
    entry: &Entry,
    port: &ServicePort,
    labels: &Labels,
    from: Option<(&str, &str)>,
    request: &Request,
) -> Step {
    let mut seen: Vec<&Labels> = Vec::new();
    let mut steps = Vec::new();
    for e in entry.endpoints_of(port, labels) {
        if seen.contains(&&e.labels) {
            continue;
        }
        seen.push(&e.labels);
        let at = e.address.parse().into_iter().collect();
        let proxy = viewer(ctx.world, &entry.service.namespace, &e.labels, at);
        let target = Ctx::new(&proxy, ctx.world);
        let http = port.protocol.is_http();
        let filters = if http { rbac::http(&target) } else { rbac::tcp(&target) };
        let facts = Facts { from, port: e.port, request: http.then_some(request) };
        steps.push(judge(&filters, &facts));
    }
    // The worst is what matters: some of the requests meet it.
    let Some(worst) = steps.iter().max_by_key(|s| s.state).cloned() else {
        return Step::ok("policy", "no workload to ask");
    };
    if worst.is_broken() && steps.iter().any(|s| !s.is_broken()) {
        return Step::warning("policy", format!("some workloads: {}", worst.says), worst.fix);
    }
    worst
}

fn judge(filters: &[Rbac], facts: &Facts<'_>) -> Step {
    let who = facts.from.map_or("a caller without mTLS".to_owned(), |(p, c)| format!("{p} of {c}"));
    let mut depends = None;
    let mut allowed = None;
    for rules in filters.iter().filter_map(|f| f.rules.as_ref()) {
        let verdicts: Vec<_> = rules.policies.iter().map(|(n, p)| (n, facts.policy(p))).collect();
        let sure = verdicts.iter().find(|(_, t)| *t == Some(true)).map(|(n, _)| *n);
        let unsure = verdicts.iter().find(|(_, t)| t.is_none()).map(|(n, _)| *n);
        match rules.action {
            RbacAction::Log => {}
            RbacAction::Deny => match (sure, unsure) {
                (Some(name), _) => {
                    if let Some((says, fix)) = rbac::of_clusters(name) {
                        return Step::broken("policy", format!("{says}, which denies {who}"), fix);
                    }
                    let says = format!("{} denies {who}", readable(name));
                    return Step::broken("policy", says, "change that rule, or call as somebody else");
                }
                (None, Some(name)) => depends = Some(format!("{} may deny it", readable(name))),
                _ => {}
            },
            RbacAction::Allow => match (sure, unsure) {
                (Some(name), _) => allowed = Some(readable(name)),
                (None, Some(name)) => depends = Some(format!("{} may allow it", readable(name))),
                (None, None) => {
                    let names: Vec<_> = rules.policies.keys().map(|n| readable(n)).take(3).collect();
                    let says = if names.is_empty() {
                        format!("an ALLOW policy without rules denies everything, {who} as well")
                    } else {
                        format!("no ALLOW rule lets {who} in: {}", names.join(", "))
                    };
                    let fix = format!(
                        "add the caller to `from.source.principals` of an ALLOW policy: {}",
                        facts.name()
                    );
                    return Step::broken("policy", says, fix);
                }
            },
        }
    }
    match (depends, allowed) {
        (Some(d), _) => Step::warning("policy", format!("depends on the request: {d}"), ""),
        (None, Some(name)) => Step::ok("policy", format!("{name} allows {who}")),
        (None, None) => Step::ok("policy", format!("nothing forbids {who}")),
    }
}

/// `ns[books]-policy[deny]-rule[0]` as `AuthorizationPolicy books/deny, rule 0`.
#[must_use]
pub fn readable(name: &str) -> String {
    let part = |key: &str| {
        let rest = name.split_once(&format!("{key}["))?.1;
        rest.split_once(']').map(|(v, _)| v)
    };
    if let Some(words) = rbac::of_roles(name) {
        return words;
    }
    match (part("ns"), part("policy"), part("rule")) {
        (Some(ns), Some(policy), Some(rule)) => format!("AuthorizationPolicy {ns}/{policy}, rule {rule}"),
        _ => name.to_owned(),
    }
}

struct Facts<'a> {
    from: Option<(&'a str, &'a str)>,
    port: u16,
    request: Option<&'a Request>,
}

/// `None` is "it depends".
type Truth = Option<bool>;

fn all(it: impl Iterator<Item = Truth>) -> Truth {
    let mut out = Some(true);
    for t in it {
        match t {
            Some(false) => return t,
            Some(true) => {}
            None => out = None,
        }
    }
    out
}

fn any(it: impl Iterator<Item = Truth>) -> Truth {
    all(it.map(|t| t.map(|b| !b))).map(|b| !b)
}

impl Facts<'_> {
    fn name(&self) -> &str {
        self.from.map_or("(none: the caller has no certificate)", |(p, _)| p.trim_start_matches("spiffe://"))
    }

    fn policy(&self, p: &RbacPolicy) -> Truth {
        all([
            any(p.permissions.iter().map(|p| self.permission(p))),
            any(p.principals.iter().map(|p| self.principal(p))),
        ]
        .into_iter())
    }

    fn permission(&self, p: &Permission) -> Truth {
        match p {
            Permission::Any => Some(true),
            Permission::And(l) => all(l.iter().map(|p| self.permission(p))),
            Permission::Or(l) => any(l.iter().map(|p| self.permission(p))),
            Permission::Not(p) => self.permission(p).map(|b| !b),
            Permission::DestinationPort(p) => Some(*p == self.port),
            Permission::Path(m) => matches(m, self.path()?),
            Permission::Header(h) => self.header(h),
            Permission::DestinationIp(_) | Permission::ServerName(_) | Permission::Metadata(_) => None,
        }
    }

    fn principal(&self, p: &Principal) -> Truth {
        match p {
            Principal::Any => Some(true),
            Principal::And(l) => all(l.iter().map(|p| self.principal(p))),
            Principal::Or(l) => any(l.iter().map(|p| self.principal(p))),
            Principal::Not(p) => self.principal(p).map(|b| !b),
            Principal::Authenticated(None) => Some(self.from.is_some()),
            Principal::Authenticated(Some(m)) => match self.from {
                Some((id, _)) => matches(m, id),
                None => Some(false),
            },
            Principal::SourceCluster(m) => match self.from {
                Some((_, cluster)) => matches(m, cluster),
                None => Some(false),
            },
            Principal::Path(m) => matches(m, self.path()?),
            Principal::Header(h) => self.header(h),
            Principal::DirectRemoteIp(_) | Principal::RemoteIp(_) | Principal::Metadata(_) => None,
        }
    }

    fn path(&self) -> Option<&str> {
        self.request.and_then(|r| r.path.split('?').next())
    }

    /// Only the method is known of the headers.
    fn header(&self, h: &HeaderMatch) -> Truth {
        let method = &self.request.filter(|_| h.name == ":method")?.method;
        match &h.value {
            HeaderValueMatch::Value(m) => matches(m, method).map(|b| b != h.invert),
            _ => None,
        }
    }
}

fn matches(m: &StringMatch, value: &str) -> Truth {
    let fold = |s: &str| if m.ignore_case { s.to_ascii_lowercase() } else { s.to_owned() };
    let v = fold(value);
    Some(match &m.kind {
        StringMatchKind::Exact(s) => v == fold(s),
        StringMatchKind::Prefix(s) => v.starts_with(&fold(s)),
        StringMatchKind::Suffix(s) => v.ends_with(&fold(s)),
        StringMatchKind::Contains(s) => v.contains(&fold(s)),
        StringMatchKind::Regex(r) => regex::Regex::new(&format!("^(?:{r})$")).ok()?.is_match(value),
    })
}

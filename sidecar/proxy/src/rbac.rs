//! Authorization: Envoy's RBAC model, compiled.
//!
//! Rules are evaluated in name order and the first policy that matches names the decision. `Allow` rules
//! deny what no policy matches; `Deny` rules deny what one does. Shadow rules never decide. A condition on
//! a request that is evaluated without one (on a TCP connection) is unknown rather than false: were it
//! false, its negation would hold and open a door; so nothing that contains it matches for `Allow`, and
//! everything does for `Deny`.
//!
//! Many policies are indexed ([`index`]), and long lists of exact alternatives are sets.

mod index;

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use mesh_model::proxy as model;

use self::index::Index;
use crate::{
    http::{
        message::RequestHead,
        metadata::{Metadata, MetadataMatcher},
    },
    matcher::{HeaderMatcher, RegexError, StringMatcher},
};

/// What is known about a connection and, for HTTP, a request.
pub(crate) struct Facts<'a> {
    pub(crate) local: SocketAddr,
    pub(crate) peer: IpAddr,
    /// Client address from `x-forwarded-for` where hops are trusted, else the peer's.
    pub(crate) remote: IpAddr,
    pub(crate) sni: Option<&'a str>,
    /// URI SANs of the peer's certificate; empty without mutual TLS.
    pub(crate) principals: &'a [String],
    pub(crate) authenticated: bool,
    pub(crate) cluster: Option<&'a str>,
    pub(crate) request: Option<&'a RequestHead>,
    /// What earlier filters found out about it.
    pub(crate) metadata: Option<&'a Metadata>,
}

/// Three-valued truth: `None` is unknown.
type Truth = Option<bool>;

fn not(t: Truth) -> Truth {
    t.map(|b| !b)
}

fn all(mut it: impl Iterator<Item = Truth>) -> Truth {
    let mut out = Some(true);
    it.find_map(|t| {
        match t {
            Some(false) => return Some(Some(false)),
            None => out = None,
            Some(true) => {}
        }
        None
    })
    .unwrap_or(out)
}

fn any(mut it: impl Iterator<Item = Truth>) -> Truth {
    let mut out = Some(false);
    it.find_map(|t| {
        match t {
            Some(true) => return Some(Some(true)),
            None => out = None,
            Some(false) => {}
        }
        None
    })
    .unwrap_or(out)
}

#[derive(Debug)]
enum Cond {
    Any,
    And(Vec<Cond>),
    Or(Vec<Cond>),
    Not(Box<Cond>),
    Header(HeaderMatcher),
    Path(StringMatcher),
    LocalIp(IpNet),
    LocalPort(u16),
    Sni(StringMatcher),
    Authenticated(Option<StringMatcher>),
    PeerIp(IpNet),
    RemoteIp(IpNet),
    Cluster(StringMatcher),
    Metadata(MetadataMatcher),
    /// Any of these is a principal of the peer.
    Principals(HashSet<String>),
    /// The path is one of these.
    Paths(HashSet<String>),
}

/// Rules nest as deep as their author wrote them; deeper than this is refused rather than recursed into.
const MAX_DEPTH: usize = 64;

/// Rules that cannot be compiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RbacError {
    #[error(transparent)]
    Regex(#[from] RegexError),
    #[error("conditions are nested deeper than {MAX_DEPTH}")]
    TooDeep,
}

impl Cond {
    fn permission(p: &model::Permission, depth: usize) -> Result<Self, RbacError> {
        if depth > MAX_DEPTH {
            return Err(RbacError::TooDeep);
        }
        let list = |l: &[model::Permission]| {
            l.iter().map(|p| Self::permission(p, depth + 1)).collect::<Result<_, _>>()
        };
        Ok(match p {
            model::Permission::Any => Self::Any,
            model::Permission::And(l) => Self::And(list(l)?),
            model::Permission::Or(l) => Self::Or(Self::permissions(l, depth + 1)?),
            model::Permission::Not(p) => Self::Not(Box::new(Self::permission(p, depth + 1)?)),
            model::Permission::Header(h) => Self::Header(HeaderMatcher::new(h)?),
            model::Permission::Path(m) => Self::Path(StringMatcher::new(m)?),
            model::Permission::DestinationIp(n) => Self::LocalIp(*n),
            model::Permission::DestinationPort(p) => Self::LocalPort(*p),
            model::Permission::ServerName(m) => Self::Sni(StringMatcher::new(m)?),
            model::Permission::Metadata(m) => Self::Metadata(MetadataMatcher::new(m)?),
        })
    }

    fn principal(p: &model::Principal, depth: usize) -> Result<Self, RbacError> {
        if depth > MAX_DEPTH {
            return Err(RbacError::TooDeep);
        }
        let list = |l: &[model::Principal]| {
            l.iter().map(|p| Self::principal(p, depth + 1)).collect::<Result<_, _>>()
        };
        Ok(match p {
            model::Principal::Any => Self::Any,
            model::Principal::And(l) => Self::And(list(l)?),
            model::Principal::Or(l) => Self::Or(Self::principals(l, depth + 1)?),
            model::Principal::Not(p) => Self::Not(Box::new(Self::principal(p, depth + 1)?)),
            model::Principal::Authenticated(m) => {
                Self::Authenticated(m.as_ref().map(StringMatcher::new).transpose()?)
            }
            model::Principal::DirectRemoteIp(n) => Self::PeerIp(*n),
            model::Principal::RemoteIp(n) => Self::RemoteIp(*n),
            model::Principal::Header(h) => Self::Header(HeaderMatcher::new(h)?),
            model::Principal::Path(m) => Self::Path(StringMatcher::new(m)?),
            model::Principal::SourceCluster(m) => Self::Cluster(StringMatcher::new(m)?),
            model::Principal::Metadata(m) => Self::Metadata(MetadataMatcher::new(m)?),
        })
    }

    /// Alternatives; many exact paths become one set.
    fn permissions(l: &[model::Permission], depth: usize) -> Result<Vec<Self>, RbacError> {
        alternatives(l, exact_path, Self::Paths, |p| Self::permission(p, depth))
    }

    /// Alternatives; many exact principals become one set.
    fn principals(l: &[model::Principal], depth: usize) -> Result<Vec<Self>, RbacError> {
        alternatives(l, exact_principal, Self::Principals, |p| Self::principal(p, depth))
    }

    fn eval(&self, f: &Facts<'_>) -> Truth {
        match self {
            Self::Any => Some(true),
            Self::And(l) => all(l.iter().map(|c| c.eval(f))),
            Self::Or(l) => any(l.iter().map(|c| c.eval(f))),
            Self::Not(c) => not(c.eval(f)),
            Self::Header(h) => f.request.map(|r| h.matches(r)),
            Self::Path(m) => f.request.map(|r| m.matches(r.path_only().as_bytes())),
            Self::LocalIp(n) => Some(n.contains(&f.local.ip())),
            Self::LocalPort(p) => Some(f.local.port() == *p),
            Self::Sni(m) => Some(m.matches(f.sni.unwrap_or_default().as_bytes())),
            Self::Authenticated(None) => Some(f.authenticated),
            Self::Authenticated(Some(m)) => {
                Some(f.authenticated && f.principals.iter().any(|p| m.matches(p.as_bytes())))
            }
            Self::PeerIp(n) => Some(n.contains(&f.peer)),
            Self::RemoteIp(n) => Some(n.contains(&f.remote)),
            Self::Cluster(m) => Some(f.cluster.is_some_and(|c| m.matches(c.as_bytes()))),
            Self::Metadata(m) => f.request.map(|_| m.matches(f.metadata)),
            Self::Principals(s) => Some(f.authenticated && f.principals.iter().any(|p| s.contains(p))),
            Self::Paths(s) => f.request.map(|r| s.contains(r.path_only())),
        }
    }
}

/// Fewer alternatives are compared one after the other as fast.
const MIN_SET: usize = 8;

fn exact(m: &model::StringMatch) -> Option<&str> {
    match &m.kind {
        model::StringMatchKind::Exact(s) if !m.ignore_case => Some(s),
        _ => None,
    }
}

fn exact_path(p: &model::Permission) -> Option<&str> {
    match p {
        model::Permission::Path(m) => exact(m),
        _ => None,
    }
}

fn exact_principal(p: &model::Principal) -> Option<&str> {
    match p {
        model::Principal::Authenticated(Some(m)) => exact(m),
        _ => None,
    }
}

fn alternatives<T>(
    list: &[T],
    exact: impl Fn(&T) -> Option<&str>,
    set: impl Fn(HashSet<String>) -> Cond,
    one: impl Fn(&T) -> Result<Cond, RbacError>,
) -> Result<Vec<Cond>, RbacError> {
    let all: HashSet<String> = list.iter().filter_map(&exact).map(str::to_owned).collect();
    if all.len() < MIN_SET {
        return list.iter().map(one).collect();
    }
    std::iter::once(Ok(set(all))).chain(list.iter().filter(|p| exact(p).is_none()).map(one)).collect()
}

#[derive(Debug)]
struct Policy {
    name: String,
    permissions: Vec<Cond>,
    principals: Vec<Cond>,
}

impl Policy {
    fn eval(&self, f: &Facts<'_>) -> Truth {
        all([&self.permissions, &self.principals].into_iter().map(|l| any(l.iter().map(|c| c.eval(f)))))
    }
}

#[derive(Debug)]
struct Rules {
    action: model::RbacAction,
    policies: Vec<Policy>,
    index: Option<Index>,
}

impl Rules {
    fn new(r: &model::RbacRules) -> Result<Self, RbacError> {
        let policies = r
            .policies
            .iter()
            .map(|(name, p)| {
                Ok(Policy {
                    name: name.clone(),
                    permissions: Cond::permissions(&p.permissions, 0)?,
                    principals: Cond::principals(&p.principals, 0)?,
                })
            })
            .collect::<Result<_, RbacError>>()?;
        Ok(Self { action: r.action, policies, index: Index::new(r.policies.values()) })
    }

    /// `Err` is a denial and names the policy, or `none`.
    fn check(&self, f: &Facts<'_>) -> Result<(), &str> {
        match self.matched(f) {
            None if self.action == model::RbacAction::Allow => Err("none"),
            Some(policy) if self.action == model::RbacAction::Deny => Err(policy),
            _ => Ok(()),
        }
    }

    /// The first policy that matches.
    fn matched(&self, f: &Facts<'_>) -> Option<&str> {
        let unknown_matches = self.action == model::RbacAction::Deny;
        let matches = |p: &Policy| p.eval(f).unwrap_or(unknown_matches);
        let matched = match &self.index {
            None => self.policies.iter().find(|p| matches(p)),
            Some(index) => index
                .first(f, |at| self.policies.get(at as usize).is_some_and(matches))
                .and_then(|at| self.policies.get(at as usize)),
        };
        matched.map(|p| p.name.as_str())
    }
}

/// What shadow rules said of a request or connection, for filters behind them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shadow {
    /// The policy that matched.
    policy: Option<String>,
    allows: bool,
}

/// A compiled [`model::Rbac`].
#[derive(Debug)]
pub(crate) struct Rbac {
    rules: Option<Rules>,
    shadow: Option<Rules>,
    /// Names under which [`Shadow`] is noted.
    policy_key: String,
    result_key: String,
}

impl Rbac {
    pub(crate) fn new(r: &model::Rbac) -> Result<Self, RbacError> {
        Ok(Self {
            rules: r.rules.as_ref().map(Rules::new).transpose()?,
            shadow: r.shadow.as_ref().map(Rules::new).transpose()?,
            policy_key: format!("{}shadow_effective_policy_id", r.shadow_stat_prefix),
            result_key: format!("{}shadow_engine_result", r.shadow_stat_prefix),
        })
    }

    /// `Err` is a denial and names the policy, or `none`.
    pub(crate) fn decide(&self, f: &Facts<'_>) -> Result<(), &str> {
        self.rules.as_ref().map_or(Ok(()), |r| r.check(f))
    }

    /// What each policy says, in the order in which they are asked: whether it is a dry run, what a match means, its
    /// name, and whether it matches.
    pub(crate) fn verdicts<'a>(
        &'a self,
        f: &Facts<'_>,
    ) -> impl Iterator<Item = (bool, model::RbacAction, &'a str, Option<bool>)> {
        let of = |dry, r: &'a Option<Rules>| {
            r.iter().flat_map(move |r| r.policies.iter().map(move |p| (dry, r.action, p)))
        };
        of(false, &self.rules)
            .chain(of(true, &self.shadow))
            .map(|(dry, a, p)| (dry, a, p.name.as_str(), p.eval(f)))
    }

    /// What shadow rules say, if there are any.
    pub(crate) fn shadow(&self, f: &Facts<'_>) -> Option<Shadow> {
        let rules = self.shadow.as_ref()?;
        let policy = rules.matched(f).map(str::to_owned);
        let allows = match rules.action {
            model::RbacAction::Allow => policy.is_some(),
            model::RbacAction::Deny => policy.is_none(),
            model::RbacAction::Log => true,
        };
        if !allows {
            tracing::debug!(policy = policy.as_deref().unwrap_or("none"), "shadow rules would deny access");
        }
        Some(Shadow { policy, allows })
    }

    /// Whether a rule of action LOG matches, if there are any: what a logger is told.
    pub(crate) fn audits(&self, f: &Facts<'_>) -> Option<bool> {
        let rules = self.rules.as_ref().filter(|r| r.action == model::RbacAction::Log)?;
        Some(rules.matched(f).is_some())
    }

    /// Notes what shadow rules said for filters behind this one, as Envoy does.
    pub(crate) fn note(&self, said: Shadow, namespace: &'static str, to: &mut Metadata) {
        let result = if said.allows { "allowed" } else { "denied" };
        to.set(namespace, self.result_key.clone(), Arc::new(result.into()));
        if let Some(policy) = said.policy {
            to.set(namespace, self.policy_key.clone(), Arc::new(policy.into()));
        }
    }

    /// `Err` is a denial, as text for the access log.
    pub(crate) fn check(&self, f: &Facts<'_>) -> Result<(), String> {
        match self.decide(f) {
            Err(policy) => {
                // The name appears in logs only; blanks would break their columns.
                let policy: String =
                    policy.chars().map(|c| if c.is_whitespace() { '_' } else { c }).collect();
                Err(format!("rbac_access_denied_matched_policy[{policy}]"))
            }
            Ok(()) => Ok(()),
        }
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;

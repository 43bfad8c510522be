//! Access by role (`rbac.istio.io`) as rules that allow.
//!
//! A service for which RbacConfig turns it on is closed but for what ServiceRoles of its namespace allow, to whom
//! ServiceRoleBindings give them. What is about services is decided here, and becomes the workload's ports; conditions on
//! requests and callers become those of an AuthorizationPolicy's rules. Ports of no such service stay as they are, by a rule
//! of their own.
//!
//! Nothing opens that its author did not write:
//!
//! - what stands in a role or binding and is not known here (galley refuses it) makes it match nothing, where release 1.0
//!   ignored the condition and let the rest speak;
//! - `group`, which 1.0 ignored as well, is the claim `groups` of a verified token (as in 1.1);
//! - RbacConfigs of several namespaces count together: a service is by role if any of them says so. Patterns among included
//!   services count as patterns, those among excluded ones do not;
//! - connections are by role like requests (as in 1.1), so that rules with methods or paths let none in. Methods and paths
//!   that are `*` are no conditions;
//! - a workload that no registry knows is taken for one of the Services whose selector fits its labels.
//!
//! Roles hold at sidecars, not at gateways, as in 1.0.

use std::collections::{BTreeMap, BTreeSet};

use mesh_model::{
    authored::{
        AccessRule, AuthorizationAction, AuthorizationRule, Condition, EnforcementMode, IntOrString,
        Operation, PrincipalBinding, RbacConfig, RbacMode, RuleTo, ServiceRole, ServiceRoleBinding, Subject,
    },
    proxy::{RbacAction, RbacPolicy},
};

use super::{AuthzRule, Ctx, Maker};
use crate::{
    config::{Config, Doc, selects},
    hosts,
    index::{Entry, Origin},
    v1alpha1::{DEFAULT, decides},
};

/// Name of the rule for ports whose access is not by role.
const OTHERS: &str = "not-by-role";

/// A service of the workload.
struct Served {
    host: String,
    name: String,
    mode: Option<EnforcementMode>,
    /// Of the workload; `None` if they are not known.
    ports: Option<BTreeSet<u16>>,
}

/// What roles allow at a workload.
pub(super) struct Access<'a> {
    rules: Vec<Role<'a>>,
    /// Ports whose access is by role; `None` is all.
    enforced: Option<BTreeSet<u16>>,
    /// The same with those where it is only tried.
    all: Option<BTreeSet<u16>>,
    any_enforced: bool,
    any_tried: bool,
}

/// A rule of a role, for a subject of a binding.
struct Role<'a> {
    role: &'a Doc<ServiceRole>,
    binding: &'a Doc<ServiceRoleBinding>,
    rule: usize,
    subject: usize,
    /// Only evaluated and logged.
    dry_run: bool,
    /// One for each meaning of `request.auth.principal`.
    part: usize,
    made: Option<AuthorizationRule>,
}

/// Whether and how access to a service is by role.
pub(crate) fn covered(config: &Config, e: &Entry) -> Option<EnforcementMode> {
    let names = || std::iter::once(&e.service.host).chain(&e.aliases).map(String::as_str);
    mode(config, &e.service.namespace, &names().collect::<Vec<_>>())
}

fn mode(config: &Config, namespace: &str, names: &[&str]) -> Option<EnforcementMode> {
    let docs = &config.v1alpha1;
    let list =
        if docs.cluster_rbac_configs.is_empty() { &docs.rbac_configs } else { &docs.cluster_rbac_configs };
    let covers = |c: &RbacConfig| match c.mode {
        RbacMode::Off => false,
        RbacMode::On => true,
        RbacMode::OnWithInclusion => c.inclusion.as_ref().is_none_or(|t| {
            t.namespaces.iter().any(|n| n == namespace)
                || t.services.iter().any(|s| names.iter().any(|n| text_matches(s, n)))
        }),
        RbacMode::OnWithExclusion => !c.exclusion.as_ref().is_some_and(|t| {
            t.namespaces.iter().any(|n| n == namespace)
                || t.services.iter().any(|s| names.contains(&s.as_str()))
        }),
    };
    let mut modes =
        list.iter().filter(|c| c.name == DEFAULT && covers(&c.spec)).map(|c| c.spec.enforcement_mode);
    let first = modes.next()?;
    Some(if modes.any(|m| m == EnforcementMode::Enforced) { EnforcementMode::Enforced } else { first })
}

/// Exact, `prefix*`, `*suffix` or `*`.
fn text_matches(pattern: &str, value: &str) -> bool {
    match (pattern, pattern.strip_suffix('*'), pattern.strip_prefix('*')) {
        ("*", _, _) => !value.is_empty(),
        (_, Some(start), _) => value.starts_with(start),
        (_, None, Some(end)) => value.ends_with(end),
        _ => pattern == value,
    }
}

/// Services of a workload and the ports at which it has them.
fn served(ctx: &Ctx<'_>) -> Vec<Served> {
    let config = &ctx.world.config;
    let namespace = &ctx.proxy.namespace;
    let mut found: BTreeMap<&str, Served> = BTreeMap::new();
    for (entry, e) in ctx.world.index.instances(&ctx.proxy.addresses) {
        let s = &entry.service;
        if s.namespace != *namespace || entry.origin == Origin::Member {
            continue;
        }
        let one = found.entry(&s.host).or_insert_with(|| Served {
            host: s.host.clone(),
            name: s.name.clone(),
            mode: covered(config, entry),
            ports: Some(BTreeSet::new()),
        });
        one.ports.iter_mut().for_each(|p| p.extend([e.port]));
    }
    if !found.is_empty() {
        return found.into_values().collect();
    }
    let selected = config.services.iter().filter(|s| {
        s.namespace == *namespace
            && !s.spec.selector.is_empty()
            && selects(&s.spec.selector, &ctx.proxy.labels)
    });
    selected
        .map(|s| {
            let host = hosts::service_host(&s.name, namespace);
            let number = |p: &mesh_model::authored::ServicePort| match &p.target_port {
                None => u16::try_from(p.port).ok(),
                Some(IntOrString::Int(n)) => u16::try_from(*n).ok(),
                Some(IntOrString::String(name)) => name.parse().ok(),
            };
            let ports = s.spec.ports.iter().map(number).collect();
            Served { mode: mode(config, namespace, &[&host]), host, name: s.name.clone(), ports }
        })
        .collect()
}

/// What roles allow at the workload; `None` if its access is not by role.
pub(super) fn access<'a>(ctx: &Ctx<'a>) -> Option<Access<'a>> {
    let config = &ctx.world.config;
    let docs = &config.v1alpha1;
    if ctx.proxy.router
        || (docs.rbac_configs.is_empty() && docs.cluster_rbac_configs.is_empty())
        || config.authorization_policies.iter().any(|p| super::applies(ctx, p) && decides(p))
    {
        return None;
    }
    let mut services = served(ctx);
    services.retain(|s| s.mode.is_some());
    if services.is_empty() {
        return None;
    }
    let ports = |keep: fn(&Served) -> bool| {
        let of = services.iter().filter(|s| keep(s)).map(|s| s.ports.clone());
        of.collect::<Option<Vec<_>>>().map(|l| l.into_iter().flatten().collect::<BTreeSet<u16>>())
    };
    let enforced = |s: &Served| s.mode == Some(EnforcementMode::Enforced);
    let mut rules = Vec::new();
    let bindings = docs.bindings.iter().filter(|b| b.namespace == ctx.proxy.namespace);
    for binding in bindings {
        let Some(r) = binding.spec.role_ref.as_ref().filter(|r| r.kind == "ServiceRole") else { continue };
        let role = docs.roles.iter().find(|d| d.namespace == binding.namespace && d.name == r.name);
        let Some(role) = role else { continue };
        for (i, rule) in role.spec.rules.iter().enumerate() {
            // Services where it is only tried are apart from those where it holds.
            for tried in [false, true] {
                let of = services.iter().filter(|s| enforced(s) != tried && at(ctx, rule, s));
                let places = places(ctx, rule, of);
                let dry_run = tried || binding.spec.mode == EnforcementMode::Permissive;
                for (j, subject) in binding.spec.subjects.iter().enumerate() {
                    for (by_token, ports) in &places {
                        let made = made(rule, subject, ports.as_ref(), *by_token);
                        let part = usize::from(*by_token) + 2 * usize::from(tried);
                        rules.push(Role { role, binding, rule: i, subject: j, dry_run, part, made });
                    }
                }
            }
        }
    }
    let any_tried = services.iter().any(|s| !enforced(s)) || rules.iter().any(|r| r.dry_run);
    Some(Access {
        rules,
        enforced: ports(|s| s.mode == Some(EnforcementMode::Enforced)),
        all: ports(|_| true),
        any_enforced: services.iter().any(enforced),
        any_tried,
    })
}

/// Whether a rule is for a service and the workload, as far as that does not depend on requests.
fn at(ctx: &Ctx<'_>, rule: &AccessRule, s: &Served) -> bool {
    let proxy = ctx.proxy;
    let any = |values: &[String], v: &str| values.iter().any(|p| text_matches(p, v));
    let holds = |key: &str, values: &[String]| match key {
        "destination.name" => any(values, &s.name),
        "destination.namespace" => any(values, &proxy.namespace),
        "destination.user" => {
            let account = &proxy.service_account;
            let domain = &ctx.world.settings.trust_domain;
            !account.is_empty()
                && (any(values, account)
                    || any(values, &format!("{domain}/ns/{}/sa/{account}", proxy.namespace)))
        }
        _ => match key.strip_prefix("destination.labels[").and_then(|k| k.strip_suffix(']')) {
            Some(label) => proxy.labels.get(label).is_some_and(|v| any(values, v)),
            // The proxy's to check, or nobody's.
            None => true,
        },
    };
    any(&rule.services, &s.host) && rule.constraints.iter().all(|c| holds(&c.key, &c.values))
}

/// Ports of the workload that a rule is for, by whether `request.auth.principal` is the token's there.
fn places<'s>(
    ctx: &Ctx<'_>,
    rule: &AccessRule,
    services: impl Iterator<Item = &'s Served>,
) -> BTreeMap<bool, Option<BTreeSet<u16>>> {
    let by_token = |port: Option<u16>| {
        let policy = ctx.world.authn_policy(&ctx.proxy.namespace, &ctx.proxy.addresses, port);
        policy.is_none_or(|p| p.spec.principal_binding == PrincipalBinding::UseOrigin)
    };
    let said: BTreeSet<u16> = rule.ports.iter().filter_map(|p| u16::try_from(*p).ok()).collect();
    let mut out: BTreeMap<bool, Option<BTreeSet<u16>>> = BTreeMap::new();
    for s in services {
        let ports = match (&s.ports, rule.ports.is_empty()) {
            (Some(own), true) => own.clone(),
            (Some(own), false) => own.intersection(&said).copied().collect(),
            (None, false) => said.clone(),
            (None, true) => {
                out.insert(by_token(None), None);
                continue;
            }
        };
        for p in ports.into_iter().filter(|p| !rule.not_ports.contains(&u32::from(*p))) {
            if let Some(list) = out.entry(by_token(Some(p))).or_insert_with(|| Some(BTreeSet::new())) {
                list.insert(p);
            }
        }
    }
    out
}

/// A rule for a subject in the words of today's kind; `None` if it can match nothing.
fn made(
    rule: &AccessRule,
    subject: &Subject,
    ports: Option<&BTreeSet<u16>>,
    by_token: bool,
) -> Option<AuthorizationRule> {
    // What a `*` matches is everything, also where there is no such thing as a method.
    let limit = |list: &[String]| if list.iter().any(|v| v == "*") { vec![] } else { list.to_vec() };
    // Templates were none.
    let literal = |p: &&String| !p.contains("{*}") && !p.contains("{**}");
    let paths = limit(&rule.paths);
    let readable: Vec<String> = paths.iter().filter(literal).cloned().collect();
    if readable.is_empty() && !paths.is_empty() {
        return None;
    }
    let operation = Operation {
        hosts: limit(&rule.hosts),
        not_hosts: rule.not_hosts.clone(),
        methods: limit(&rule.methods),
        not_methods: rule.not_methods.clone(),
        paths: readable,
        not_paths: rule.not_paths.clone(),
        ports: ports.into_iter().flatten().map(u16::to_string).collect(),
        not_ports: rule.not_ports.iter().map(u32::to_string).collect(),
    };
    let mut when = Vec::new();
    for c in &rule.constraints {
        let decided = ["destination.name", "destination.namespace", "destination.user"]
            .contains(&c.key.as_str())
            || c.key.starts_with("destination.labels[");
        if decided {
            continue;
        }
        let known = ["destination.ip", "destination.port"].contains(&c.key.as_str())
            || c.key.starts_with("request.headers[");
        if !known || c.values.is_empty() {
            return None;
        }
        when.push(Condition { key: c.key.clone(), values: c.values.clone(), not_values: vec![] });
    }
    who(subject, by_token, &mut when)?;
    let to = (operation != Operation::default()).then(|| vec![RuleTo { operation: Some(operation) }]);
    Some(AuthorizationRule { from: None, to, when })
}

/// Conditions on the caller; `None` if one is not known.
fn who(s: &Subject, by_token: bool, when: &mut Vec<Condition>) -> Option<()> {
    if *s == Subject::default() {
        return None;
    }
    let mut add = |key: &str, yes: &[String], no: &[String]| {
        if !yes.is_empty() || !no.is_empty() {
            when.push(Condition { key: key.to_owned(), values: yes.to_vec(), not_values: no.to_vec() });
        }
    };
    let bare = |v: &String| v.strip_prefix("spiffe://").unwrap_or(v).to_owned();
    let all = |list: &[String]| list.iter().map(bare).collect::<Vec<_>>();
    let some = |v: &String| if v.is_empty() { vec![] } else { vec![v.clone()] };
    if s.user != "*" {
        add("source.principal", &all(&some(&s.user)), &[]);
    }
    add("source.principal", &all(&s.names), &all(&s.not_names));
    add("request.auth.claims[groups]", &some(&s.group), &[]);
    add("request.auth.claims[groups]", &s.groups, &s.not_groups);
    add("source.namespace", &s.namespaces, &s.not_namespaces);
    add("source.ip", &s.ips, &s.not_ips);
    for (key, value) in &s.properties {
        let value = std::slice::from_ref(value);
        match key.as_str() {
            "source.user" | "source.principal" => add("source.principal", &all(value), &[]),
            "request.auth.principal" if !by_token => add("source.principal", &all(value), &[]),
            "source.ip"
            | "source.namespace"
            | "request.auth.principal"
            | "request.auth.audiences"
            | "request.auth.presenter" => add(key, value, &[]),
            k if k.starts_with("request.headers[") || k.starts_with("request.auth.claims[") => {
                add(key, value, &[]);
            }
            _ => return None,
        }
    }
    Some(())
}

impl Access<'_> {
    fn maker<'c, 'w>(&self, ctx: &'c Ctx<'w>, http: bool) -> Maker<'c, 'w> {
        Maker { ctx, namespace: &ctx.proxy.namespace, http, action: RbacAction::Allow }
    }

    /// What lets everybody in to the ports that are not among these.
    fn others(
        ctx: &Ctx<'_>,
        maker: &Maker<'_, '_>,
        ports: Option<&BTreeSet<u16>>,
    ) -> Option<(String, RbacPolicy)> {
        let not_ports = ports?.iter().map(u16::to_string).collect();
        let operation = Operation { not_ports, ..Operation::default() };
        let to = Some(vec![RuleTo { operation: Some(operation) }]);
        let rule = maker.rule(&AuthorizationRule { from: None, to, when: vec![] })?;
        Some((format!("ns[{}]-{OTHERS}", ctx.proxy.namespace), rule))
    }

    /// Rules that hold, and those that are only tried.
    pub(super) fn filters(&self, ctx: &Ctx<'_>, http: bool) -> Vec<(bool, BTreeMap<String, RbacPolicy>)> {
        let maker = self.maker(ctx, http);
        let mut out = Vec::new();
        for (dry, there, ports) in
            [(false, self.any_enforced, &self.enforced), (true, self.any_tried, &self.all)]
        {
            if !there {
                continue;
            }
            let mut rules: BTreeMap<String, RbacPolicy> =
                Self::others(ctx, &maker, ports.as_ref()).into_iter().collect();
            for r in self.rules.iter().filter(|r| r.dry_run == dry) {
                if let Some(p) = r.made.as_ref().and_then(|m| maker.rule(m)) {
                    rules.insert(r.id(), p);
                }
            }
            out.push((dry, rules));
        }
        out
    }

    /// The same one by one.
    pub(super) fn each(&self, ctx: &Ctx<'_>, http: bool) -> Vec<AuthzRule> {
        let maker = self.maker(ctx, http);
        let one = |name: String, index, dry_run, policy| AuthzRule {
            namespace: ctx.proxy.namespace.clone(),
            name,
            index,
            action: AuthorizationAction::Allow,
            provider: None,
            can_ask: false,
            dry_run,
            policy,
        };
        let mut out: Vec<AuthzRule> = self
            .rules
            .iter()
            .map(|r| {
                let name = format!("{} ({})", r.role.name, r.binding.name);
                one(name, Some(r.rule), r.dry_run, r.made.as_ref().and_then(|m| maker.rule(m)))
            })
            .collect();
        if self.any_enforced {
            // Closed, whatever there is of roles.
            out.push(match Self::others(ctx, &maker, self.enforced.as_ref()) {
                Some((_, p)) => one(OTHERS.to_owned(), Some(0), false, Some(p)),
                None => one(OTHERS.to_owned(), None, false, None),
            });
        }
        out
    }
}

impl Role<'_> {
    fn id(&self) -> String {
        format!(
            "ns[{}]-role[{}]-rule[{}]-binding[{}]-subject[{}]{}",
            self.role.namespace,
            self.role.name,
            self.rule,
            self.binding.name,
            self.subject,
            ["", "-token", "-tried", "-tried-token"].get(self.part).copied().unwrap_or_default()
        )
    }
}

/// A rule of these in words, if `name` is one.
pub(in crate::generate) fn in_words(name: &str) -> Option<String> {
    let part = |key: &str| {
        let rest = name.split_once(&format!("{key}["))?.1;
        rest.split_once(']').map(|(v, _)| v)
    };
    let ns = part("ns")?;
    if name.ends_with(OTHERS) {
        return Some(format!("the rule for ports of {ns} whose access is not by role"));
    }
    let (role, rule, binding) = (part("role")?, part("rule")?, part("binding")?);
    Some(format!("ServiceRole {ns}/{role}, rule {rule}, which ServiceRoleBinding {binding} gives"))
}

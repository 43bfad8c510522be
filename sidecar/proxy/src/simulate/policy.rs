//! What policies say of a connection or request.

use mesh_model::proxy as model;

use crate::rbac;

/// What one policy says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It matches.
    Matches,
    /// It does not.
    Misses,
    /// It looks at something that is not known here, such as a request on a connection of bytes.
    Unknown,
}

/// A policy that was asked.
#[derive(Debug, Clone)]
pub struct PolicySeen {
    /// Its name in the proxy.
    pub name: String,
    /// What a match means.
    pub action: model::RbacAction,
    /// What it says.
    pub verdict: Verdict,
    /// It is only evaluated and logged (dry run).
    pub dry_run: bool,
    /// It decided.
    pub decides: bool,
}

/// Asks all policies of a filter.
pub(super) fn ask(filter: &rbac::Rbac, facts: &rbac::Facts<'_>) -> Vec<PolicySeen> {
    let denial = filter.decide(facts).err();
    let mut out = Vec::new();
    for (dry_run, action, name, truth) in filter.verdicts(facts) {
        let verdict = match truth {
            Some(true) => Verdict::Matches,
            Some(false) => Verdict::Misses,
            None => Verdict::Unknown,
        };
        let decides = !dry_run
            && match action {
                model::RbacAction::Deny => denial == Some(name),
                model::RbacAction::Allow => {
                    denial.is_none()
                        && verdict == Verdict::Matches
                        && !out.iter().any(|p: &PolicySeen| p.decides)
                }
                model::RbacAction::Log => false,
            };
        out.push(PolicySeen { name: name.to_owned(), action, verdict, dry_run, decides });
    }
    if denial == Some("none") && !out.iter().any(|p| p.action == model::RbacAction::Allow && !p.dry_run) {
        // An ALLOW policy without rules has no name in the proxy.
        out.push(PolicySeen {
            name: String::new(),
            action: model::RbacAction::Allow,
            verdict: Verdict::Misses,
            dry_run: false,
            decides: true,
        });
    }
    out
}

/// Why a connection or request is denied, if it is: filters decide in order.
pub(super) fn denied(filters: &[Vec<PolicySeen>]) -> Option<String> {
    filters.iter().find_map(|seen| {
        let enforced = || seen.iter().filter(|p| !p.dry_run);
        if let Some(p) = enforced().find(|p| p.action == model::RbacAction::Deny && p.decides) {
            return Some(format!("denied by {}", p.name));
        }
        let mut allow = enforced().filter(|p| p.action == model::RbacAction::Allow).peekable();
        allow.peek()?;
        let all: Vec<_> = allow.collect();
        if all.iter().any(|p| p.verdict == Verdict::Matches) {
            return None;
        }
        Some("no ALLOW policy lets it in".to_owned())
    })
}

//! When the root may be replaced: the decisions, without I/O.
//!
//! 1. `prepare`: the new root is trusted by everybody, and signs nothing yet.
//! 2. `activate`: it signs. Whoever does not trust it by then would refuse what it signed, so every member must have
//!    acknowledged: its control plane has the bundle, and so has each of its connected proxies.
//! 3. `finish`: the old root is trusted no more. Whoever still shows a certificate under it would be refused, so no
//!    member and no connected proxy may.
//!
//! Each step done twice is done once. `abort` takes back the first; after the second there is only the way forward,
//! since certificates under the new root are in use. A member that is silent blocks: what it trusts is not known. One
//! that is gone for good is evicted, and then no member.

use std::{fmt, str::FromStr, time::Duration};

/// A report that is older says nothing of now; members report every two seconds.
pub const FRESH: Duration = Duration::from_secs(10);

/// How far a rotation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Phase {
    /// None is under way.
    #[default]
    Steady,
    /// The new root is trusted, the old one signs.
    Prepared,
    /// The new root signs, the old one is still trusted.
    Activated,
}

impl Phase {
    /// As it is written: `steady`, `prepared`, `activated`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Steady => "steady",
            Self::Prepared => "prepared",
            Self::Activated => "activated",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Phase {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        [Self::Steady, Self::Prepared, Self::Activated]
            .into_iter()
            .find(|p| p.as_str() == s)
            .ok_or_else(|| format!("{s:?} is no phase of a rotation"))
    }
}

/// What an operator asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Trust a new root.
    Prepare,
    /// Let it sign.
    Activate,
    /// Trust the old one no more.
    Finish,
    /// Trust the new one no more, which has not signed yet.
    Abort,
}

impl FromStr for Step {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "prepare" => Ok(Self::Prepare),
            "activate" => Ok(Self::Activate),
            "finish" => Ok(Self::Finish),
            "abort" => Ok(Self::Abort),
            other => Err(format!("{other:?} is no step of a rotation: prepare, activate, finish or abort")),
        }
    }
}

/// How a member stands, as it said last; this cluster is one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Who.
    pub cluster: String,
    /// How long ago it said so; `None` if it never did.
    pub age: Option<Duration>,
    /// The bundle that it has.
    pub sequence: u64,
    /// Pin of the root above its intermediate.
    pub root: String,
    /// Its connected proxies.
    pub proxies: u32,
    /// Of those, who have acknowledged that bundle.
    pub trusting: u32,
    /// Of those, whose certificate is under its intermediate of now.
    pub renewed: u32,
    /// Some of those who have not.
    pub late: Vec<String>,
    /// Why it cannot tell, or what it failed in.
    pub error: String,
}

/// A member that a step has to wait for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocker {
    /// Who.
    pub cluster: String,
    /// Why, in words.
    pub why: String,
}

/// What becomes of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is to be done.
    Go,
    /// It was done before; with what to tell.
    Done(String),
    /// Not yet.
    Blocked(Vec<Blocker>),
    /// It makes no sense now; with why.
    Wrong(String),
}

/// Decides on a step. `sequence` and `signing` are the bundle's number and the pin of its first root, `members` everybody
/// with this cluster.
#[must_use]
pub fn decide(phase: Phase, step: Step, sequence: u64, signing: &str, members: &[Report]) -> Verdict {
    let blocked = |why: &dyn Fn(&Report) -> Option<String>| {
        let waits: Vec<_> = members
            .iter()
            .filter_map(|m| Some(Blocker { cluster: m.cluster.clone(), why: silent(m).or_else(|| why(m))? }))
            .collect();
        if waits.is_empty() { Verdict::Go } else { Verdict::Blocked(waits) }
    };
    match (step, phase) {
        (Step::Prepare, Phase::Steady) | (Step::Abort, Phase::Prepared) => Verdict::Go,
        (Step::Prepare, Phase::Prepared) => Verdict::Done("a new root is prepared already".into()),
        (Step::Prepare, Phase::Activated) => Verdict::Wrong(
            "a rotation is under way and its new root signs already: finish it first (`flotilla ca rotate finish`)"
                .into(),
        ),
        (Step::Activate, Phase::Steady) => {
            Verdict::Wrong("no new root is prepared: `flotilla ca rotate prepare` comes first".into())
        }
        (Step::Activate, Phase::Prepared) => blocked(&|m| distrusts(m, sequence)),
        (Step::Activate, Phase::Activated) => Verdict::Done("the new root signs already".into()),
        (Step::Finish, Phase::Steady) => Verdict::Done("no rotation is under way".into()),
        (Step::Finish, Phase::Prepared) => {
            Verdict::Wrong("the new root does not sign yet: `flotilla ca rotate activate` comes first".into())
        }
        (Step::Finish, Phase::Activated) => {
            blocked(&|m| distrusts(m, sequence).or_else(|| shows_old(m, signing)))
        }
        (Step::Abort, Phase::Steady) => Verdict::Done("no rotation is under way".into()),
        (Step::Abort, Phase::Activated) => Verdict::Wrong(
            "the new root signs already, and certificates under it are in use: go on with `flotilla ca rotate finish`, \
             and rotate again if this root is not to stay"
                .into(),
        ),
    }
}

/// Why nothing is known of a member.
#[must_use]
pub fn silent(m: &Report) -> Option<String> {
    match m.age {
        None => Some(
            "has not reported since this control plane started: it is unreachable, or of a version that knows no rotation"
                .into(),
        ),
        Some(age) if age > FRESH => Some(format!("unreachable: last heard {} s ago", age.as_secs())),
        Some(_) if !m.error.is_empty() => Some(m.error.clone()),
        Some(_) => None,
    }
}

/// Why a member has not acknowledged a bundle.
#[must_use]
pub fn distrusts(m: &Report, sequence: u64) -> Option<String> {
    if m.sequence != sequence {
        return Some(format!("holds sequence {}, not {sequence}", m.sequence));
    }
    (m.trusting < m.proxies).then(|| {
        let n = m.proxies - m.trusting;
        format!("{n} of {} proxies not yet{}", m.proxies, named(m))
    })
}

/// Why a member still needs the old root.
fn shows_old(m: &Report, signing: &str) -> Option<String> {
    if m.root != signing {
        return Some("its intermediate is under the old root".into());
    }
    (m.renewed < m.proxies).then(|| {
        let n = m.proxies - m.renewed;
        format!("{n} of {} proxies have no certificate under the new root yet{}", m.proxies, named(m))
    })
}

fn named(m: &Report) -> String {
    if m.late.is_empty() { String::new() } else { format!(" ({})", m.late.join(", ")) }
}

#[cfg(test)]
mod tests;

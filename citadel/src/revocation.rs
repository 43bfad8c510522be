//! What the CA has revoked, as it is kept: `<state>/ca/revoked.json`.
//!
//! Rules:
//! 1. A certificate is revoked by its serial number, by whose key signed it: workloads' by the cluster's intermediate,
//!    intermediates by the root. The audit log knows which there are.
//! 2. A list of each authority whose key is here, also of one that has revoked nothing, since some who verify want one of
//!    every issuer. It is signed anew every day and holds for a week, so that nobody sees one that is too old who has heard
//!    anything of this cluster in the last six days.
//! 3. An intermediate that is replaced leaves a last list, which holds for as long as what it signed. Its key is gone then:
//!    what it signed is revoked by revoking it.
//! 4. What has expired goes off the list a day later.

use std::{collections::BTreeMap, fmt, str::FromStr, time::Duration};

use mesh_model::{ClusterId, SpiffeId, federation::RevocationList};
use rcgen::RevocationReason;
use serde::{Deserialize, Serialize};

/// A list is signed anew when it is this old.
pub(crate) const REFRESH: Duration = Duration::from_secs(86_400);
/// For how long a list holds.
pub(crate) const HOLDS: Duration = Duration::from_secs(7 * 86_400);
/// What has expired stays on the list for this long, seconds: clocks differ.
const AFTER: u64 = 86_400;
/// Certificates of one issuer that may be revoked: proxies are sent all of them.
pub(crate) const MAX_REVOKED: usize = 4096;

/// What to revoke.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// One certificate, by its serial number, hexadecimal.
    Serial(String),
    /// Every certificate of a workload that has not expired, and its tokens from before.
    Identity(SpiffeId),
    /// Every intermediate of a cluster that has not expired, and with them all that they signed.
    Cluster(ClusterId),
}

/// Why, as RFC 5280 section 5.3.1 has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Reason {
    /// Nothing is said.
    #[default]
    Unspecified,
    /// Somebody else has the key.
    KeyCompromise,
    /// Somebody else has the key of a CA.
    CaCompromise,
    /// There is another certificate.
    Superseded,
    /// What it was for is no more.
    CessationOfOperation,
    /// It may not be what it was any more.
    PrivilegeWithdrawn,
}

impl Reason {
    const ALL: [(&'static str, Self); 6] = [
        ("unspecified", Self::Unspecified),
        ("keyCompromise", Self::KeyCompromise),
        ("cACompromise", Self::CaCompromise),
        ("superseded", Self::Superseded),
        ("cessationOfOperation", Self::CessationOfOperation),
        ("privilegeWithdrawn", Self::PrivilegeWithdrawn),
    ];

    /// As a list says it; nothing for what says nothing (RFC 5280 section 5.3.1).
    pub(crate) fn code(self) -> Option<RevocationReason> {
        match self {
            Self::Unspecified => None,
            Self::KeyCompromise => Some(RevocationReason::KeyCompromise),
            Self::CaCompromise => Some(RevocationReason::CaCompromise),
            Self::Superseded => Some(RevocationReason::Superseded),
            Self::CessationOfOperation => Some(RevocationReason::CessationOfOperation),
            Self::PrivilegeWithdrawn => Some(RevocationReason::PrivilegeWithdrawn),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::ALL.iter().find(|(_, r)| r == self).map_or("", |(n, _)| n))
    }
}

impl FromStr for Reason {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(n, _)| n.eq_ignore_ascii_case(s)).map(|(_, r)| *r);
        found.ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|(n, _)| *n).collect();
            format!("{s:?} is no reason; one of {}", names.join(", "))
        })
    }
}

/// A certificate that was revoked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Revoked {
    /// Hexadecimal.
    pub serial: String,
    /// SPIFFE ID of a workload or of a cluster.
    pub of: String,
    /// SHA-256 of the intermediate that signed it; empty for a root.
    pub issuer: String,
    /// Why.
    pub reason: Reason,
    /// When, seconds since the epoch.
    pub at: u64,
    /// When it expires.
    pub until: u64,
}

/// What a request to revoke came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Revoked by it.
    pub revoked: Vec<Revoked>,
    /// Those that were before.
    pub already: usize,
    /// Serial numbers of those that an intermediate signed which has been replaced (rule 3).
    pub beyond: Vec<String>,
    /// Tokens of that workload from before are refused.
    pub tokens: bool,
}

/// The last list of an intermediate that was replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Former {
    pub(crate) list: RevocationList,
    /// When all has expired that it signed.
    pub(crate) until: u64,
}

/// The file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Records {
    /// Of the last lists; it only rises.
    pub(crate) number: u64,
    pub(crate) revoked: Vec<Revoked>,
    pub(crate) former: Vec<Former>,
    /// Tokens of a workload (`namespace/account`) count if they were issued after this, seconds since the epoch.
    pub(crate) tokens: BTreeMap<String, u64>,
}

impl Records {
    /// Leaves out what has expired.
    pub(crate) fn prune(&mut self, now: u64, longest_token: Duration) {
        self.revoked.retain(|r| r.until + AFTER > now);
        self.former.retain(|f| f.until > now);
        self.tokens.retain(|_, at| *at + longest_token.as_secs() + AFTER > now);
    }

    /// Those that one issuer signed.
    pub(crate) fn by<'a>(&'a self, issuer: &'a str) -> impl Iterator<Item = &'a Revoked> {
        self.revoked.iter().filter(move |r| r.issuer == issuer)
    }

    pub(crate) fn has(&self, serial: &str) -> bool {
        self.revoked.iter().any(|r| r.serial == serial)
    }

    /// Whether a token that was issued then counts.
    pub(crate) fn takes_token(&self, namespace: &str, account: &str, issued_at: u64) -> bool {
        // One that was issued in the same second may be from before.
        self.tokens.get(&format!("{namespace}/{account}")).is_none_or(|at| issued_at > *at)
    }
}

/// A serial number as it is kept, of what people type.
pub(crate) fn serial(s: &str) -> String {
    let hex: String = s.chars().filter(char::is_ascii_hexdigit).collect();
    hex.trim_start_matches("00").to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_have_their_names() {
        for (name, reason) in Reason::ALL {
            assert_eq!((name.parse(), reason.to_string().as_str()), (Ok(reason), name));
        }
        assert_eq!("KEYCOMPROMISE".parse(), Ok(Reason::KeyCompromise));
        assert!("whim".parse::<Reason>().unwrap_err().contains("keyCompromise"));
        assert_eq!(Reason::Unspecified.code(), None);
    }

    #[test]
    fn what_has_expired_goes_and_the_number_stays() {
        let one = |serial: &str, until| Revoked {
            serial: serial.into(),
            of: String::new(),
            issuer: String::new(),
            reason: Reason::default(),
            at: 0,
            until,
        };
        let mut r = Records { number: 9, ..Records::default() };
        r.revoked = vec![one("a", 1000), one("b", 1001)];
        r.tokens = [("books/old".to_owned(), 1), ("books/new".to_owned(), 80_000)].into();
        r.prune(1000 + AFTER, Duration::from_secs(500));
        assert_eq!((r.number, r.revoked.len(), r.revoked[0].serial.as_str()), (9, 1, "b"));
        assert_eq!(r.tokens.keys().collect::<Vec<_>>(), ["books/new"]);
        assert!(!r.takes_token("books", "new", 80_000) && r.takes_token("books", "new", 80_001));
        assert!(r.takes_token("books", "other", 0));
    }

    #[test]
    fn serial_numbers_are_read_in_every_form() {
        for s in ["40ab01", "40:AB:01", "00:40:ab:01"] {
            assert_eq!(serial(s), "40ab01");
        }
    }
}

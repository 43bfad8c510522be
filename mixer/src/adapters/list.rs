//! Checks a value against a list of its configuration.

use std::{collections::HashSet, net::IpAddr, time::Duration};

use ipnet::IpNet;
use mesh_model::authored::{ListCheckerParams, ListEntryType};
use regex::RegexSet;

use super::{CheckResult, Data, Input};

const INVALID_ARGUMENT: i32 = 3;
const NOT_FOUND: i32 = 5;
const PERMISSION_DENIED: i32 = 7;

#[derive(Debug)]
enum Entries {
    Exact(HashSet<String>),
    IgnoreCase(HashSet<String>),
    Networks(Vec<IpNet>),
    Patterns(RegexSet),
}

#[derive(Debug)]
pub(crate) struct List {
    entries: Entries,
    blacklist: bool,
    valid: Duration,
    uses: i32,
}

impl List {
    pub(super) fn new(p: &ListCheckerParams) -> Result<Self, String> {
        if !p.provider_url.is_empty() {
            return Err("lists from a URL (providerUrl) are not supported".into());
        }
        let list = &p.overrides;
        let entries = match p.entry_type {
            ListEntryType::Strings => Entries::Exact(list.iter().cloned().collect()),
            ListEntryType::CaseInsensitiveStrings => {
                Entries::IgnoreCase(list.iter().map(|s| s.to_lowercase()).collect())
            }
            ListEntryType::IpAddresses => Entries::Networks(
                list.iter()
                    .map(|s| {
                        s.parse::<IpNet>()
                            .or_else(|_| s.parse::<IpAddr>().map(IpNet::from))
                            .map_err(|_| format!("{s:?} is neither an IP address nor a CIDR range"))
                    })
                    .collect::<Result<_, _>>()?,
            ),
            ListEntryType::Regex => Entries::Patterns(
                regex::RegexSetBuilder::new(list)
                    .size_limit(10 << 20)
                    .build()
                    .map_err(|e| format!("not a regular expression: {e}"))?,
            ),
        };
        Ok(Self {
            entries,
            blacklist: p.blacklist,
            valid: p.caching_interval.map_or(Duration::from_secs(300), |d| d.0),
            uses: p.caching_use_count.unwrap_or(10_000),
        })
    }

    pub(super) fn check(&self, input: &Input) -> CheckResult {
        let result = |code, message| CheckResult { code, message, valid: self.valid, uses: self.uses };
        let Data::ListEntry(value) = &input.data else {
            return result(INVALID_ARGUMENT, "not a list entry".into());
        };
        let found = match &self.entries {
            Entries::Exact(set) => set.contains(value),
            Entries::IgnoreCase(set) => set.contains(&value.to_lowercase()),
            Entries::Patterns(set) => set.is_match(value),
            Entries::Networks(nets) => match value.parse::<IpAddr>() {
                Ok(ip) => nets.iter().any(|n| n.contains(&ip.to_canonical())),
                Err(_) => return result(INVALID_ARGUMENT, format!("{value} is not a valid IP address")),
            },
        };
        match (found, self.blacklist) {
            (true, true) => result(PERMISSION_DENIED, format!("{value} is blacklisted")),
            (false, false) => result(NOT_FOUND, format!("{value} is not whitelisted")),
            _ => result(0, String::new()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists() {
        let check = |kind, overrides: &[&str], blacklist, value: &str| {
            let p = ListCheckerParams {
                overrides: overrides.iter().map(|s| (*s).to_owned()).collect(),
                entry_type: kind,
                blacklist,
                ..Default::default()
            };
            let l = List::new(&p).unwrap();
            let r = l.check(&Input { instance: "i".into(), data: Data::ListEntry(value.into()) });
            (r.code, r.message)
        };
        use ListEntryType::{CaseInsensitiveStrings, IpAddresses, Regex, Strings};
        assert_eq!(check(Strings, &["v1", "v2"], false, "v1").0, 0);
        assert_eq!(check(Strings, &["v1", "v2"], false, "v3"), (5, "v3 is not whitelisted".into()));
        assert_eq!(check(Strings, &["v1"], true, "v1"), (7, "v1 is blacklisted".into()));
        assert_eq!(check(CaseInsensitiveStrings, &["Abc"], false, "aBC").0, 0);
        assert_eq!(check(IpAddresses, &["10.0.0.0/8"], false, "10.1.1.1").0, 0);
        assert_eq!(check(IpAddresses, &["10.0.0.0/8"], false, "::ffff:10.1.1.1").0, 0);
        assert_eq!(check(IpAddresses, &["10.0.0.1"], true, "10.0.0.2").0, 0);
        assert_eq!(check(IpAddresses, &["10.0.0.1"], true, "x").0, 3);
        assert_eq!(check(Regex, &["^v[12]$"], false, "v2").0, 0);
        let url = ListCheckerParams { provider_url: "http://x".into(), ..Default::default() };
        assert!(List::new(&url).unwrap_err().contains("not supported"));
    }
}

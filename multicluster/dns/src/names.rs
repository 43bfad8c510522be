//! The table of names.

use std::{collections::HashMap, net::IpAddr};

/// Zones that the mesh owns, without a trailing dot.
const ZONES: [&str; 3] = ["svc.cluster.local", "clusterset.local", "global"];

/// Version of the MCS DNS specification (section "dns-version").
const DNS_VERSION: &str = "1.0.0";

/// Addresses by lower-case host name without a trailing dot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names(HashMap<String, Vec<IpAddr>>);

/// What the table says of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found<'a> {
    /// These addresses, of any family.
    Addresses(&'a [IpAddr]),
    /// Text of the zone's version record.
    Version(&'static str),
    /// Below one of the mesh's zones, and not there.
    Missing,
    /// Above or at the apex of a zone: it exists and has no records.
    Empty,
    /// Not the mesh's.
    Foreign,
}

impl Names {
    /// Builds the table. `*.svc.cluster.local` hosts are also known by the short forms `name.ns` and
    /// `name.ns.svc`; a full name always wins over a short one.
    pub fn new(hosts: impl IntoIterator<Item = (String, Vec<IpAddr>)>) -> Self {
        let mut table = HashMap::new();
        let mut short: Vec<(String, Vec<IpAddr>)> = Vec::new();
        for (host, ips) in hosts {
            let host = host.trim_end_matches('.').to_ascii_lowercase();
            if let Some(base) = host.strip_suffix(".svc.cluster.local")
                && base.split('.').count() == 2
            {
                short.push((base.to_owned(), ips.clone()));
                short.push((format!("{base}.svc"), ips.clone()));
            }
            table.insert(host, ips);
        }
        for (name, ips) in short {
            table.entry(name).or_insert(ips);
        }
        Self(table)
    }

    /// How many names there are, short forms included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Looks up a lower-case name without a trailing dot.
    pub(crate) fn find(&self, name: &str) -> Found<'_> {
        if let Some(ips) = self.0.get(name) {
            return Found::Addresses(ips);
        }
        // `*.example.com` of a ServiceEntry: the longest suffix wins.
        let mut rest = name;
        while let Some((_, parent)) = rest.split_once('.') {
            if let Some(ips) = self.0.get(&format!("*.{parent}")) {
                return Found::Addresses(ips);
            }
            rest = parent;
        }
        if name == "dns-version.clusterset.local" {
            return Found::Version(DNS_VERSION);
        }
        for zone in ZONES {
            if name == zone {
                return Found::Empty;
            }
            if let Some(below) = name.strip_suffix(zone).and_then(|b| b.strip_suffix('.')) {
                // `svc.clusterset.local` and `ns.svc.cluster.local` are empty non-terminals (RFC 8020).
                let inner = format!(".{below}.{zone}");
                let exists = below == "svc" || self.0.keys().any(|k| k.ends_with(&inner));
                return if exists { Found::Empty } else { Found::Missing };
            }
        }
        Found::Foreign
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_table_says() {
        let ip: IpAddr = "240.240.0.1".parse().unwrap();
        let n = Names::new([
            ("Reviews.books.svc.cluster.local.".to_owned(), vec![ip]),
            ("ratings.books.svc.clusterset.local".to_owned(), vec![ip]),
            ("*.wild.example".to_owned(), vec![ip]),
        ]);
        let here = Found::Addresses(std::slice::from_ref(&ip));
        for name in [
            "reviews.books.svc.cluster.local",
            "reviews.books.svc",
            "reviews.books",
            "ratings.books.svc.clusterset.local",
            "a.wild.example",
            "a.b.wild.example",
        ] {
            assert_eq!(n.find(name), here, "{name}");
        }
        for name in ["nothing.books.svc.cluster.local", "x.ratings.books.svc.clusterset.local", "a.global"] {
            assert_eq!(n.find(name), Found::Missing, "{name}");
        }
        for name in
            ["books.svc.cluster.local", "svc.cluster.local", "svc.clusterset.local", "clusterset.local"]
        {
            assert_eq!(n.find(name), Found::Empty, "{name}");
        }
        for name in ["example.com", "nothing.books", "wild.example", "cluster.local", ""] {
            assert_eq!(n.find(name), Found::Foreign, "{name}");
        }
        assert_eq!(n.find("dns-version.clusterset.local"), Found::Version("1.0.0"));
    }
}

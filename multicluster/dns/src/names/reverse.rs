//! Names of addresses.
//!
//! A service's own address is its name's; a headless service has none, and its pods have names if their host names are
//! known. The MCS DNS specification gives an address a name of the cluster set only if it has no name of the cluster.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::{Host, PodRecords};
use crate::{
    wire,
    zone::{self, Zone},
};

const V4: &[u8] = b"\x07in-addr\x04arpa";
const V6: &[u8] = b"\x03ip6\x04arpa";
/// A pod may be of several services; an address with more names than this says little with any of them.
const MAX_NAMES: usize = 8;

#[derive(Debug, Default)]
pub(super) struct Reverse(HashMap<IpAddr, Entry>);

#[derive(Debug)]
struct Entry {
    rank: u8,
    names: Vec<Box<[u8]>>,
}

/// Which names an address is called by, best first.
fn rank(name: &[u8]) -> Option<u8> {
    match zone::of(name)?.0 {
        Zone::ClusterLocal => Some(0),
        Zone::Clusterset => Some(1),
        _ => None,
    }
}

impl Reverse {
    pub(super) fn add(&mut self, name: &[u8], host: &Host) {
        let Some(rank) = rank(name) else { return };
        if !host.headless {
            self.insert(&host.addresses, rank, name);
            return;
        }
        for pod in &host.pods {
            if let Some(own) = PodRecords::new(pod).and_then(|p| p.name_below(name)) {
                self.insert(&pod.addresses, rank, &own);
            }
        }
    }

    fn insert(&mut self, addresses: &[IpAddr], rank: u8, name: &[u8]) {
        let with_root: Box<[u8]> = [name, &[0]].concat().into();
        for ip in addresses {
            let entry = self.0.entry(*ip).or_insert(Entry { rank, names: vec![] });
            if rank < entry.rank {
                *entry = Entry { rank, names: vec![] };
            }
            if rank == entry.rank && entry.names.len() < MAX_NAMES && !entry.names.contains(&with_root) {
                entry.names.push(with_root.clone());
            }
        }
    }

    pub(super) fn find(&self, name: &[u8]) -> Option<&[Box<[u8]>]> {
        Some(&self.0.get(&address(name)?)?.names)
    }
}

/// The address that a reverse name is of (RFC 1035, section 3.5; RFC 3596, section 2.5).
fn address(name: &[u8]) -> Option<IpAddr> {
    let text = |label| std::str::from_utf8(label).ok();
    if let Some(end) = wire::offset_in(name, V4) {
        let mut octets = [0; 4];
        let mut at = 0;
        for octet in octets.iter_mut().rev() {
            let (label, rest) = wire::first(&name[at..end])?;
            // Not `+4` and not `04`, which are other names.
            let plain = label.iter().all(u8::is_ascii_digit) && (label == b"0" || label[0] != b'0');
            *octet = text(label).filter(|_| plain)?.parse().ok()?;
            at += rest;
        }
        return (at == end).then(|| Ipv4Addr::from(octets).into());
    }
    let end = wire::offset_in(name, V6).filter(|end| *end == 64)?;
    let mut bits = 0u128;
    for i in (0..32).rev() {
        let (label, _) = wire::first(&name[2 * i..end])?;
        let [digit] = label else { return None };
        bits = bits << 4 | u128::from(char::from(*digit).to_digit(16)?);
    }
    Some(Ipv6Addr::from_bits(bits).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_reverse_names() {
        let of = |n: &str| address(&wire::labels(n).unwrap()).map(|ip| ip.to_string());
        assert_eq!(of("4.3.240.240.in-addr.arpa").as_deref(), Some("240.240.3.4"));
        let v6 = "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa";
        assert_eq!(of(v6).as_deref(), Some("2001:db8::1"));
        for not in [
            "3.240.240.in-addr.arpa",
            "1.4.3.240.240.in-addr.arpa",
            "04.3.240.240.in-addr.arpa",
            "+4.3.240.240.in-addr.arpa",
            "256.3.240.240.in-addr.arpa",
            "in-addr.arpa",
            &v6[2..],
            &v6.replacen("1.", "g.", 1),
            &v6.replacen("1.0.", "10.", 1),
            "example.com",
        ] {
            assert_eq!(of(not), None, "{not}");
        }
    }
}

//! Virtual addresses for services whose registry gives none.
//!
//! From 240.240.0.0/16, at a position derived from the host, so that every control plane replica
//! and every restart assigns the same. Collisions move the later host (in alphabetical order) to
//! the next free position.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr},
};

/// Addresses in the range without its first and last.
const SIZE: u32 = 65_534;

/// Assigns an address to every host, in the given order, which must be sorted. The 65,535th host
/// and later ones get none.
pub(super) fn assign<'a>(hosts: impl Iterator<Item = &'a str>) -> Vec<(&'a str, IpAddr)> {
    let mut taken = HashSet::new();
    let mut out = Vec::new();
    for host in hosts {
        if taken.len() >= SIZE as usize {
            break;
        }
        let mut position = hash(host) % SIZE;
        while !taken.insert(position) {
            position = (position + 1) % SIZE;
        }
        let [.., hi, lo] = (position + 1).to_be_bytes();
        out.push((host, IpAddr::V4(Ipv4Addr::new(240, 240, hi, lo))));
    }
    out
}

/// FNV-1a, 32 bits.
fn hash(host: &str) -> u32 {
    host.bytes().fold(0x811c_9dc5, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_stable_unique_and_in_range() {
        let mut hosts: Vec<String> = (0..20_000).map(|i| format!("s{i}.ns.svc.cluster.local")).collect();
        hosts.sort();
        let a = assign(hosts.iter().map(String::as_str));
        let b = assign(hosts.iter().map(String::as_str));
        assert_eq!(a, b);
        let unique: HashSet<IpAddr> = a.iter().map(|(_, ip)| *ip).collect();
        assert_eq!(unique.len(), hosts.len());
        for (_, ip) in &a {
            let IpAddr::V4(v4) = ip else { panic!("{ip}") };
            assert_eq!(v4.octets()[..2], [240, 240]);
            assert!(![[0, 0], [255, 255]].contains(&[v4.octets()[2], v4.octets()[3]]));
        }
        // Alone, a host has the address that it has among few.
        assert_eq!(assign(["a.b"].into_iter())[0].1, assign(["a.b", "c.d"].into_iter())[0].1);
    }
}

//! PROXY protocol, versions 1 and 2: the client's real addresses, from a trusted load balancer in front or for a server
//! behind.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use mesh_model::proxy::ProxyProtocolVersion;

/// A decoded header: its length, and source and destination unless it is `LOCAL` or `UNKNOWN`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) len: usize,
    pub(crate) addresses: Option<(SocketAddr, SocketAddr)>,
}

/// The bytes are not a PROXY protocol header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no valid PROXY protocol header")]
pub(crate) struct Invalid;

const V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// Longest version 1 line.
const V1_MAX: usize = 107;
/// Type-length-values beyond this are not for us.
const V2_MAX: usize = 4096;

/// Decodes; `Ok(None)` asks for more bytes.
pub(crate) fn decode(buf: &[u8]) -> Result<Option<Header>, Invalid> {
    let n = buf.len().min(V2.len());
    if buf[..n] == V2[..n] {
        return v2(buf);
    }
    let n = buf.len().min(6);
    if buf[..n] != b"PROXY "[..n] {
        return Err(Invalid);
    }
    let Some(end) = buf.iter().take(V1_MAX).position(|b| *b == b'\n') else {
        return if buf.len() >= V1_MAX { Err(Invalid) } else { Ok(None) };
    };
    let line = std::str::from_utf8(&buf[..=end]).ok().and_then(|l| l.strip_suffix("\r\n")).ok_or(Invalid)?;
    let mut it = line.split(' ').skip(1);
    let family = it.next().ok_or(Invalid)?;
    if family == "UNKNOWN" {
        return Ok(Some(Header { len: end + 1, addresses: None }));
    }
    let mut ip = || it.next().and_then(|s| s.parse::<IpAddr>().ok()).ok_or(Invalid);
    let (src, dst) = (ip()?, ip()?);
    // `parse` would take a sign.
    let digits = |s: &&str| s.bytes().all(|b| b.is_ascii_digit());
    let mut port = || it.next().filter(digits).and_then(|s| s.parse::<u16>().ok()).ok_or(Invalid);
    let (sport, dport) = (port()?, port()?);
    let fits = matches!(
        (family, src, dst),
        ("TCP4", IpAddr::V4(_), IpAddr::V4(_)) | ("TCP6", IpAddr::V6(_), IpAddr::V6(_))
    );
    if !fits || it.next().is_some() {
        return Err(Invalid);
    }
    Ok(Some(Header {
        len: end + 1,
        addresses: Some((SocketAddr::new(src, sport), SocketAddr::new(dst, dport))),
    }))
}

fn v2(buf: &[u8]) -> Result<Option<Header>, Invalid> {
    let Some(head) = buf.get(..16) else { return Ok(None) };
    let len = usize::from(u16::from_be_bytes([head[14], head[15]]));
    if head[12] >> 4 != 2 || head[12] & 0xf > 1 || len > V2_MAX {
        return Err(Invalid);
    }
    let Some(body) = buf.get(16..16 + len) else { return Ok(None) };
    let port = |at: usize| body.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]])).ok_or(Invalid);
    let addresses = match (head[12] & 0xf, head[13]) {
        (0, _) => None,
        (_, 0x11) => {
            let ip = |at: usize| -> Result<IpAddr, Invalid> {
                let b: [u8; 4] = body.get(at..at + 4).and_then(|b| b.try_into().ok()).ok_or(Invalid)?;
                Ok(Ipv4Addr::from(b).into())
            };
            Some((SocketAddr::new(ip(0)?, port(8)?), SocketAddr::new(ip(4)?, port(10)?)))
        }
        (_, 0x21) => {
            let ip = |at: usize| -> Result<IpAddr, Invalid> {
                let b: [u8; 16] = body.get(at..at + 16).and_then(|b| b.try_into().ok()).ok_or(Invalid)?;
                Ok(Ipv6Addr::from(b).into())
            };
            Some((SocketAddr::new(ip(0)?, port(32)?), SocketAddr::new(ip(16)?, port(34)?)))
        }
        (_, 0x00) => None,
        _ => return Err(Invalid),
    };
    Ok(Some(Header { len: 16 + len, addresses }))
}

/// A header with source and destination; without them one that says that the proxy itself connects.
pub(crate) fn encode(v: ProxyProtocolVersion, addresses: Option<(SocketAddr, SocketAddr)>) -> Vec<u8> {
    // Both addresses are of one family: an IPv4 one becomes an IPv6 one where the other is.
    let addresses = addresses.map(|(s, d)| match (s.ip().to_canonical(), d.ip().to_canonical()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (IpAddr::V4(a), IpAddr::V4(b), s.port(), d.port()),
        (a, b) => (IpAddr::V6(mapped(a)), IpAddr::V6(mapped(b)), s.port(), d.port()),
    });
    match (v, addresses) {
        (ProxyProtocolVersion::V1, None) => b"PROXY UNKNOWN\r\n".to_vec(),
        (ProxyProtocolVersion::V1, Some((s, d, sp, dp))) => {
            let family = if s.is_ipv4() { "TCP4" } else { "TCP6" };
            format!("PROXY {family} {s} {d} {sp} {dp}\r\n").into_bytes()
        }
        (ProxyProtocolVersion::V2, None) => [V2, &[0x20, 0, 0, 0]].concat(),
        (ProxyProtocolVersion::V2, Some((s, d, sp, dp))) => {
            let mut out = V2.to_vec();
            let bytes = |ip: IpAddr| match ip {
                IpAddr::V4(ip) => ip.octets().to_vec(),
                IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            out.extend_from_slice(if s.is_ipv4() { &[0x21, 0x11, 0, 12] } else { &[0x21, 0x21, 0, 36] });
            for part in [bytes(s), bytes(d), sp.to_be_bytes().to_vec(), dp.to_be_bytes().to_vec()] {
                out.extend_from_slice(&part);
            }
            out
        }
    }
}

fn mapped(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_in_any_pieces() {
        let v1 = b"PROXY TCP4 1.2.3.4 5.6.7.8 1000 443\r\n";
        let mut v2 = V2.to_vec();
        v2.extend([0x21, 0x11, 0, 15, 1, 2, 3, 4, 5, 6, 7, 8, 0x03, 0xe8, 0x01, 0xbb, 9, 9, 9]);
        let want = Some(("1.2.3.4:1000".parse().unwrap(), "5.6.7.8:443".parse().unwrap()));
        for raw in [&v1[..], &v2] {
            for cut in 0..raw.len() {
                assert_eq!(decode(&raw[..cut]), Ok(None));
            }
            let mut more = raw.to_vec();
            more.extend_from_slice(b"rest");
            assert_eq!(decode(&more), Ok(Some(Header { len: raw.len(), addresses: want })));
        }
        assert_eq!(decode(b"PROXY UNKNOWN\r\n").unwrap().unwrap().addresses, None);
        let local = [V2, &[0x20, 0, 0, 0]].concat();
        assert_eq!(decode(&local).unwrap().unwrap(), Header { len: 16, addresses: None });
        for bad in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"PROXY TCP4 ::1 ::1 1 2\r\n",
            b"PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n",
            b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\n",
            b"PROXY TCP4 1.2.3.4 5.6.7.8 +1 2\r\n",
            b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2 3\r\n",
            b"PROXY TCP4 1.2.3.4  5.6.7.8 1 2\r\n",
            b"PROXY TCP4 01.2.3.4 5.6.7.8 1 2\r\n",
            b"PROXY\tTCP4 1.2.3.4 5.6.7.8 1 2\r\n",
            b"proxy TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
            b"PROXY UDP4 1.2.3.4 5.6.7.8 1 2\r\n",
        ] {
            assert_eq!(decode(bad), Err(Invalid), "{:?}", String::from_utf8_lossy(bad));
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_handled(
            tail in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300),
            text in "PROXY (TCP4|TCP6|UNKNOWN|UDP4)?[ 0-9a-f:.]{0,120}(\r\n|\n|\r)?.{0,20}",
        ) {
            let mut two = V2.to_vec();
            two.extend(&tail);
            for raw in [&tail, &two, text.as_bytes()] {
                if let Ok(Some(h)) = decode(raw) {
                    // A header is what it says in any pieces, and never longer than what was read.
                    proptest::prop_assert!(h.len <= raw.len());
                    proptest::prop_assert_eq!(decode(&raw[..h.len]), Ok(Some(h)));
                    proptest::prop_assert_eq!(decode(&raw[..h.len - 1]), Ok(None));
                }
            }
        }
    }

    #[test]
    fn version_2_in_both_families_with_what_may_follow() {
        let header =
            |head: [u8; 2], body: &[u8]| [V2, &head, &(body.len() as u16).to_be_bytes()[..], body].concat();
        let v6: Vec<u8> = [[0x20; 16], [0x30; 16]].concat();
        let ports = [0x03, 0xe8, 0x01, 0xbb];
        // A TLV of two bytes, and one that ends early: neither is ours to read.
        let tlvs = [0x04, 0, 2, 7, 7, 0x20, 0, 9];
        let raw = header([0x21, 0x21], &[&v6[..], &ports, &tlvs].concat());
        let got = decode(&raw).unwrap().unwrap();
        let want: (SocketAddr, SocketAddr) = (
            "[2020:2020:2020:2020:2020:2020:2020:2020]:1000".parse().unwrap(),
            "[3030:3030:3030:3030:3030:3030:3030:3030]:443".parse().unwrap(),
        );
        assert_eq!(got, Header { len: raw.len(), addresses: Some(want) });
        for cut in 0..raw.len() {
            assert_eq!(decode(&raw[..cut]), Ok(None));
        }
        // LOCAL with addresses that mean nothing, and an unspecified family.
        for raw in [header([0x20, 0x11], &[9; 12]), header([0x21, 0], &tlvs)] {
            assert_eq!(decode(&raw), Ok(Some(Header { len: raw.len(), addresses: None })));
        }
        for bad in [
            header([0x11, 0x11], &[0; 12]),
            header([0x22, 0x11], &[0; 12]),
            header([0x21, 0x11], &[0; 11]),
            header([0x21, 0x21], &[0; 35]),
            header([0x21, 0x12], &[0; 12]),
            header([0x21, 0x31], &[0; 216]),
            header([0x21, 0x11], &[0; V2_MAX + 1]),
        ] {
            assert_eq!(decode(&bad), Err(Invalid), "{bad:?}");
        }
    }

    #[test]
    fn what_is_written_is_read_alike() {
        let a = |s: &str| s.parse::<SocketAddr>().unwrap();
        for v in [ProxyProtocolVersion::V1, ProxyProtocolVersion::V2] {
            for (s, d) in [("1.2.3.4:5", "6.7.8.9:10"), ("[::1]:5", "[fd00::2]:10")] {
                let raw = encode(v, Some((a(s), a(d))));
                let want = Header { len: raw.len(), addresses: Some((a(s), a(d))) };
                assert_eq!(decode(&raw), Ok(Some(want)));
            }
            let mixed = encode(v, Some((a("1.2.3.4:5"), a("[fd00::2]:10"))));
            let (s, _) = decode(&mixed).unwrap().unwrap().addresses.unwrap();
            assert_eq!(s.ip().to_canonical(), a("1.2.3.4:5").ip());
            assert_eq!(decode(&encode(v, None)).unwrap().unwrap().addresses, None);
        }
    }
}

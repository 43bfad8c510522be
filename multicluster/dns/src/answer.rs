//! What is answered from the table, without waiting for anybody.

use crate::{
    TTL,
    names::{A_LEN, AAAA_LEN, DNS_VERSION, Found, Lookup, Names, PodRecords, Records},
    wire::{self, Bad, Code, Full, Owner, Query, Reply, Section, Transport},
    zone::Zone,
};

/// What becomes of a message.
pub(crate) enum Outcome<'q> {
    /// The reply is so many bytes.
    Reply { len: usize, zone: Zone, code: Code },
    /// Somebody else is to be asked.
    Forward(Box<Query<'q>>),
    /// Nothing is sent.
    Ignore,
}

/// Answers one message into `out`, which holds at least 512 bytes. `turn` is any number that changes from question to
/// question. `recursion` says whether others can be asked.
pub(crate) fn answer<'q>(
    names: &Names,
    packet: &'q [u8],
    out: &mut [u8],
    transport: Transport,
    turn: usize,
    recursion: bool,
) -> Outcome<'q> {
    let query = match Query::parse(packet) {
        Ok(q) => q,
        Err(Bad::Silent) => return Outcome::Ignore,
        Err(Bad::Code(code)) => {
            let len = wire::refuse(packet, code, out);
            return Outcome::Reply { len, zone: Zone::Invalid, code };
        }
    };
    let lookup = names.find(query.name());
    // RFC 6891, section 6.1.3. Other classes have no names here, and nobody is asked for them.
    let refused = match query.edns {
        Some(e) if e.version > 0 => Some(Code::BadVers),
        _ if query.class != wire::IN => Some(Code::Refused),
        _ => None,
    };
    if refused.is_none() && matches!(lookup.found, Found::Foreign) {
        return Outcome::Forward(Box::new(query));
    }
    let mut reply = Reply::new(&query, out, transport);
    reply.recursion = recursion;
    match refused {
        Some(code) => {
            reply.code = code;
            reply.authoritative = false;
        }
        None => {
            if fill(&mut reply, &query, &lookup, turn).is_err() {
                reply.truncate();
            }
        }
    }
    let code = reply.code;
    Outcome::Reply { len: reply.finish(), zone: lookup.zone, code }
}

/// A reply that only says why there is none.
pub(crate) fn failed(query: &Query<'_>, code: Code, out: &mut [u8], transport: Transport) -> usize {
    let mut reply = Reply::new(query, out, transport);
    reply.code = code;
    reply.authoritative = false;
    reply.finish()
}

fn fill(r: &mut Reply<'_, '_>, q: &Query<'_>, lookup: &Lookup<'_>, turn: usize) -> Result<(), Full> {
    if q.kind == wire::SOA && lookup.apex == Some(0) {
        return soa(r, Section::Answer, 0);
    }
    let found = match lookup.found {
        Found::Host(records) => addresses(r, records, q.kind, turn)?,
        Found::Service { host, target, port, udp } if matches!(q.kind, wire::SRV | wire::ANY) => {
            services(r, q, host, target, |p| p.port(port, udp), host.port(port, udp))?
        }
        Found::Version if matches!(q.kind, wire::TXT | wire::ANY) => {
            let text = DNS_VERSION.as_bytes();
            let length = [u8::try_from(text.len()).unwrap_or_default()];
            r.record(Section::Answer, Owner::Question(0), wire::TXT, TTL, &[&length, text])?;
            true
        }
        Found::Pointer(targets) if matches!(q.kind, wire::PTR | wire::ANY) => {
            for name in targets {
                r.record(Section::Answer, Owner::Question(0), wire::PTR, TTL, &[name])?;
            }
            true
        }
        Found::Missing => {
            r.code = Code::NxDomain;
            false
        }
        Found::Unknown => {
            r.code = Code::ServFail;
            r.authoritative = false;
            return Ok(());
        }
        Found::Service { .. } | Found::Version | Found::Pointer(_) | Found::Empty | Found::Foreign => false,
    };
    match lookup.apex {
        Some(apex) if !found => soa(r, Section::Authority, apex),
        _ => Ok(()),
    }
}

/// Whether there are any.
fn addresses(r: &mut Reply<'_, '_>, records: &Records, kind: u16, turn: usize) -> Result<bool, Full> {
    let mut any = false;
    for (family, a, len) in [(wire::A, &records.a, A_LEN), (wire::AAAA, &records.aaaa, AAAA_LEN)] {
        if a.count > 0 && (kind == family || kind == wire::ANY) {
            r.rotated(&a.bytes, a.count, turn % usize::from(a.count) * len)?;
            any = true;
        }
    }
    Ok(any)
}

/// SRV records of a named port: one with the service's name as its target or, if it is headless, one for each pod that
/// has a name. Additional addresses that do not fit are left out (RFC 2181, section 9).
fn services(
    r: &mut Reply<'_, '_>,
    q: &Query<'_>,
    host: &Records,
    target: usize,
    of_pod: impl Fn(&PodRecords) -> Option<u16>,
    own: Option<u16>,
) -> Result<bool, Full> {
    let service = &q.name_as_sent()[target..];
    let lower = &q.name()[target..];
    let mut of_pods = Vec::new();
    for pod in &host.pods {
        let (Some(port), Some(labels)) = (of_pod(pod), pod.labels_below(lower)) else { continue };
        // Names that begin further on cannot be pointed to.
        let at = r.position() + 12 + 6;
        r.record(Section::Answer, Owner::Question(0), wire::SRV, TTL, &[&srv(port), labels, service])?;
        if at < 1 << 14 {
            of_pods.push((at, pod));
        }
    }
    for (at, pod) in &of_pods {
        if additional(r, Owner::At(*at), &pod.records).is_err() {
            return Ok(true);
        }
    }
    if !of_pods.is_empty() {
        return Ok(true);
    }
    // A name without pods' names below it.
    let Some(port) = own else { return Ok(false) };
    r.record(Section::Answer, Owner::Question(0), wire::SRV, TTL, &[&srv(port), service])?;
    let _ = additional(r, Owner::Question(target), host);
    Ok(true)
}

/// Priority 0 and weight 100: Kubernetes' servers say the same of everything.
fn srv(port: u16) -> [u8; 6] {
    let [high, low] = port.to_be_bytes();
    [0, 0, 0, 100, high, low]
}

fn additional(r: &mut Reply<'_, '_>, owner: Owner, records: &Records) -> Result<(), Full> {
    records.data().try_for_each(|(kind, data)| r.record(Section::Additional, owner, kind, TTL, &[data]))
}

/// The start of the zone that begins at `apex`: its minimum is how long a denial may be remembered (RFC 2308, section 5).
fn soa(r: &mut Reply<'_, '_>, section: Section, apex: usize) -> Result<(), Full> {
    const SERVER: &[u8] = b"\x02ns\x08flotilla\x08internal\0";
    const MAIL: &[u8] = b"\x0ahostmaster\x08flotilla\x08internal\0";
    let mut numbers = [0; 20];
    for (to, n) in numbers.chunks_exact_mut(4).zip([1, 60, 60, 60, TTL]) {
        to.copy_from_slice(&n.to_be_bytes());
    }
    r.record(section, Owner::Question(apex), wire::SOA, TTL, &[SERVER, MAIL, &numbers])
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, LazyLock};

    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::{Host, Pod, Port};

    static NAMES: LazyLock<Names> = LazyLock::new(names);

    fn names() -> Names {
        let port = Port { name: "http".into(), number: 80, udp: false };
        let pods = (0..100).map(|i| Pod {
            name: format!("p{i}"),
            cluster: "east".into(),
            addresses: vec![[10, 0, 0, i].into(), std::net::Ipv6Addr::LOCALHOST.into()],
            ports: vec![port.clone()],
        });
        let pods: Vec<_> = pods.collect();
        let addresses = pods.iter().flat_map(|p| p.addresses.clone()).collect();
        let many = Arc::new(Host { addresses, headless: true, ports: vec![port], pods });
        Names::new(
            [("a.b.svc.cluster.local", &many), ("*.c", &many), ("a.b.svc.clusterset.local", &many)]
                .map(|(n, h)| (n.to_owned(), h.clone())),
        )
    }

    /// A question with a tail of any bytes.
    fn packet(name: &str, kind: u16, records: u8, tail: &[u8]) -> Vec<u8> {
        let mut p = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, records];
        p.extend(wire::labels(name).unwrap());
        p.extend([0, kind.to_be_bytes()[0], kind.to_be_bytes()[1], 0, 1]);
        p.extend(tail);
        p
    }

    fn check(packet: &[u8]) -> Result<(), TestCaseError> {
        for transport in [Transport::Udp, Transport::Tcp] {
            let mut out = vec![0; usize::from(u16::MAX)];
            let limit = Query::parse(packet).map_or(512, |q| q.limit(transport));
            match answer(&NAMES, packet, &mut out, transport, 7, true) {
                Outcome::Reply { len, .. } => {
                    prop_assert!((wire::HEADER..=limit).contains(&len), "{len} beyond {limit}");
                    let m = hickory_proto::op::Message::from_vec(&out[..len]);
                    prop_assert!(m.is_ok(), "{:?}: {:?}", m, &out[..len]);
                }
                Outcome::Forward(q) => {
                    let len = failed(&q, Code::ServFail, &mut out, transport);
                    prop_assert!(len <= limit);
                }
                Outcome::Ignore => {}
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_bytes_after_a_header(bytes in vec(any::<u8>(), 0..600)) {
            let mut p = vec![1, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1];
            p.extend(bytes);
            check(&p)?;
        }

        #[test]
        fn any_question(
            name in prop::sample::select(vec![
                "a.b.svc.cluster.local", "_http._tcp.a.b.svc.cluster.local", "_tcp.a.b", "x.c", "a.b.svc.clusterset.local",
                "_http._tcp.a.b.svc.clusterset.local", "p1.east.a.b.svc.clusterset.local", "svc.cluster.local", "global",
                "x.y.global", "dns-version.clusterset.local", "1.0.0.10.in-addr.arpa", "_http._tcp.x.c", "", "_._._",
            ]),
            kind in prop_oneof![any::<u16>(), prop::sample::select(vec![1u16, 6, 12, 16, 28, 33, 255])],
            records in 0u8..3,
            tail in prop_oneof![
                vec(any::<u8>(), 0..60),
                (any::<u16>(), 0u8..2, any::<u8>()).prop_map(|(size, version, flags)| {
                    let [high, low] = size.to_be_bytes();
                    vec![0, 0, 41, high, low, 0, version, flags, 0, 0, 0]
                }),
            ],
        ) {
            check(&packet(name, kind, records, &tail))?;
        }
    }

    #[test]
    fn what_is_too_large_is_asked_for_over_tcp() {
        let n = &*NAMES;
        let opt = [0, 0, 41, 4, 0xd0, 0, 0, 0, 0, 0, 0];
        let p = packet("_http._tcp.a.b.svc.clusterset.local", wire::SRV, 1, &opt);
        let mut out = vec![0; usize::from(u16::MAX)];
        let mut reply = |transport| match answer(n, &p, &mut out, transport, 0, true) {
            Outcome::Reply { len, .. } => hickory_proto::op::Message::from_vec(&out[..len]).unwrap(),
            _ => panic!(),
        };
        let short = reply(Transport::Udp);
        assert!(short.metadata.truncation && short.answers.is_empty() && short.edns.is_some());
        let whole = reply(Transport::Tcp);
        assert_eq!((whole.answers.len(), whole.additionals.len()), (100, 200));
        // Each target with the addresses of its pod.
        assert_eq!(whole.additionals[3].name.to_string(), "p1.east.a.b.svc.clusterset.local.");
    }

    #[test]
    fn clients_that_take_the_first_address_spread() {
        let n = &*NAMES;
        let p = packet("a.b.svc.cluster.local", wire::A, 0, &[]);
        let first = |turn| {
            let mut out = vec![0; usize::from(u16::MAX)];
            let Outcome::Reply { len, .. } = answer(n, &p, &mut out, Transport::Tcp, turn, true) else {
                panic!()
            };
            let m = hickory_proto::op::Message::from_vec(&out[..len]).unwrap();
            assert_eq!(m.answers.len(), 100);
            m.answers[0].data.to_string()
        };
        assert_eq!(
            [first(0), first(1), first(99), first(100)],
            ["10.0.0.0", "10.0.0.1", "10.0.0.99", "10.0.0.0"]
        );
    }
}

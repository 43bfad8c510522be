//! What the fuzz targets of `e2e/fuzz` run. It is not part of the product.

use std::sync::{Arc, LazyLock};

use hickory_proto::op::Message;

use crate::{
    Host, Names, Pod, Port,
    answer::{Outcome, answer, failed},
    forward,
    wire::{self, Code, Query, Transport},
};

/// A hundred pods with a port behind three names.
static NAMES: LazyLock<Names> = LazyLock::new(|| {
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
    let names = ["a.b.svc.cluster.local", "*.c", "a.b.svc.clusterset.local"];
    Names::new(names.map(|n| (n.to_owned(), many.clone())))
});

/// A question: what is answered can be read by others, is no larger than the client takes, and is to the question.
pub fn dns_question(packet: &[u8]) {
    for transport in [Transport::Udp, Transport::Tcp] {
        let mut out = vec![0; usize::from(u16::MAX)];
        let query = Query::parse(packet);
        let limit = query.as_ref().map_or(512, |q| q.limit(transport));
        match answer(&NAMES, packet, &mut out, transport, 7, true) {
            Outcome::Reply { len, .. } => {
                assert!((wire::HEADER..=limit).contains(&len), "{len} beyond {limit}");
                assert_eq!(out[..2], packet[..2]);
                let m = Message::from_vec(&out[..len]).expect("an answer that can be read");
                if let Ok(q) = query {
                    assert_eq!(m.metadata.id, q.id());
                    assert_eq!(m.queries.len(), 1);
                }
            }
            Outcome::Forward(q) => {
                assert!(failed(&q, Code::ServFail, &mut out, transport) <= limit);
                // What we read as one question is one to others, of the same name and kind.
                if let (Ok(m), Some(asked)) = (Message::from_vec(packet), forward::question(&q)) {
                    assert_eq!(m.queries.len(), 1);
                    assert_eq!(m.queries[0].name().to_lowercase(), asked.name().to_lowercase());
                    assert_eq!(m.queries[0].query_type(), asked.query_type());
                }
            }
            Outcome::Ignore => {}
        }
    }
}

/// Somebody else's answer, passed on to a client without and with EDNS.
pub fn dns_answer(packet: &[u8]) {
    let Ok(answer) = Message::from_vec(packet) else { return };
    let opt = [0, 0, 41, 4, 0xd0, 0, 0, 0x80, 0, 0, 0];
    for (records, tail) in [(0, &[][..]), (1, &opt)] {
        let mut asked = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, records];
        asked.extend(b"\x01x\x07example\0\0\x01\0\x01");
        asked.extend(tail);
        let Ok(query) = Query::parse(&asked) else { panic!("no question") };
        for transport in [Transport::Udp, Transport::Tcp] {
            let question = forward::question(&query);
            let (out, _) = forward::encode(&query, question, Some(answer.clone()), transport);
            assert!(out.len() <= query.limit(transport));
            let m = Message::from_vec(&out).expect("an answer that can be read");
            assert_eq!((m.metadata.id, m.queries.len()), (0xabcd, 1));
            assert!(!m.metadata.authoritative && !m.metadata.authentic_data);
            assert_eq!(m.edns.is_some(), records == 1);
        }
    }
}

#[cfg(test)]
#[path = "../../../e2e/fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::{replay::corpus, *};

    #[test]
    fn corpora() {
        corpus("dns_question", dns_question);
        corpus("dns_answer", dns_answer);
    }
}

//! Arbitrary packets: nothing panics, nothing is larger than the client takes, and what is answered can be read.

mod support;

use std::{net::UdpSocket, sync::LazyLock, time::Duration};

use hickory_proto::{
    op::{Message, MessageType},
    rr::RecordType,
};
use mesh_dns::Names;
use proptest::{collection::vec, prelude::*};
use support::{Running, bookstore, cluster, question};

/// One server for all cases, without anybody behind.
static SERVER: LazyLock<(tokio::runtime::Runtime, Running)> = LazyLock::new(|| {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let nobody = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let running = runtime.block_on(cluster(Names::for_cluster(bookstore()), vec![nobody]));
    (runtime, running)
});

/// Sends a packet and then a good question from the same socket: a worker that died would not answer it. What came for
/// the packet itself.
fn send(packet: &[u8]) -> Option<Vec<u8>> {
    let s = UdpSocket::bind("127.0.0.1:0").unwrap();
    s.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    s.connect(SERVER.1.address()).unwrap();
    s.send(packet).unwrap();
    let mut good = question("ratings.books.svc.clusterset.local", RecordType::A, None);
    good.metadata.id = 0xfeed;
    s.send(&good.to_vec().unwrap()).unwrap();
    let mut buf = vec![0; 65_535];
    let mut first = None;
    loop {
        let n = s.recv(&mut buf).expect("the server still answers");
        if buf[..2] == [0xfe, 0xed] && n > 12 && buf[7] == 1 {
            return first;
        }
        first = Some(buf[..n].to_vec());
    }
}

/// What a client may be sent: as much as its OPT record says, 512 bytes without.
fn limit(packet: &[u8]) -> usize {
    Message::from_vec(packet)
        .ok()
        .and_then(|m| m.edns)
        .map_or(512, |e| usize::from(e.max_payload().clamp(512, 1232)))
}

fn check(packet: &[u8]) -> Result<(), TestCaseError> {
    let Some(answer) = send(packet) else { return Ok(()) };
    // A packet that only this server can read may be one with EDNS.
    let limit = if Message::from_vec(packet).is_ok() { limit(packet) } else { 1232 };
    prop_assert!(answer.len() <= limit, "{} bytes for {packet:?}", answer.len());
    prop_assert_eq!(&answer[..2], &packet[..2]);
    let m = Message::from_vec(&answer).map_err(|e| TestCaseError::fail(format!("{e}: {answer:?}")))?;
    prop_assert_eq!(m.metadata.message_type, MessageType::Response);
    Ok(())
}

/// Names with something to say.
fn names() -> impl Strategy<Value = String> {
    prop::sample::select(vec![
        "ratings.books.svc.clusterset.local",
        "many.books.svc.clusterset.local",
        "db.books.svc.clusterset.local",
        "_sql._tcp.db.books.svc.clusterset.local",
        "_http._tcp.ratings.books.global",
        "db-0.east.db.books.svc.clusterset.local",
        "dns-version.clusterset.local",
        "4.3.240.240.in-addr.arpa",
        "nothing.books.global",
        "global",
    ])
    .prop_map(str::to_owned)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes(packet in vec(any::<u8>(), 0..1400)) {
        // Names outside the zones would be asked of nobody for seconds.
        let mut packet = packet;
        if packet.len() > 5 {
            packet[5] &= 0xfe;
        }
        check(&packet)?;
    }

    #[test]
    fn questions_of_any_kind(name in names(), kind in any::<u16>(), payload in prop::option::of(any::<u16>()),
                             version in 0u8..3) {
        let mut q = question(&name, RecordType::from(kind), payload);
        if let Some(e) = &mut q.edns {
            e.set_version(version);
        }
        check(&q.to_vec().unwrap())?;
    }

    #[test]
    fn damaged_questions(name in names(), payload in prop::option::of(any::<u16>()),
                         at in any::<prop::sample::Index>(), to in any::<u8>(), cut in 0usize..20) {
        let mut packet = question(&name, RecordType::A, payload).to_vec().unwrap();
        let i = at.index(packet.len());
        // The name stays one of the mesh's: others are somebody else's to answer.
        if !(12..12 + name.len() + 2).contains(&i) {
            packet[i] = to;
        }
        packet.truncate(packet.len() - cut.min(6));
        check(&packet)?;
    }
}

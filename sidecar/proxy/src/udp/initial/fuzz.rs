//! First packets of QUIC for the fuzzer, which cannot guess keys: what it says is also sealed as a client would seal it.

use super::*;

/// The client's choice for the server's connection ID (RFC 9001 Appendix A).
const ID: [u8; 8] = [0x83, 0x94, 0xc8, 0xf0, 0x3e, 0x51, 0x57, 0x08];

/// A datagram as it is, and the frames in one.
pub(crate) fn datagram(data: &[u8]) {
    if let Some(h) = header(data) {
        assert!(h.number_at <= h.end && h.end <= data.len());
        assert!(h.to.get().len() <= MAX_ID && h.from.get().len() <= MAX_ID);
        assert_eq!(next_packet(data), Some(h.end));
    }
    if let Some(n) = next_packet(data) {
        assert!(n > 0 && n <= data.len());
    }
    read(data);
    let (suite, Some(id)) = (SUITE.as_ref().unwrap(), Id::new(&ID)) else { return };
    let keys = suite.keys(&ID, rustls::Side::Client, Version::V1);
    let packet = |number, frames: &[u8]| {
        let mut frames = frames.to_vec();
        frames.resize(frames.len().max(1162), 0);
        seal(&keys.local, &id, &Id::default(), number, frames)
    };
    let Some(one) = packet(0, data) else { return };
    let h = header(&one).unwrap();
    let server = suite.keys(&ID, rustls::Side::Server, Version::V1);
    assert!(open(&server.remote, &one, &h).unwrap().starts_with(data));
    let whole = read(&one);
    // Its CRYPTO frames in two packets say what they say in one.
    if let (Seen::Yes(hello), Some((first, second))) = (whole, data.split_at_checked(data.len() / 2)) {
        let mut o = Opening::new(&one).unwrap();
        for (number, part) in [(1, second), (2, first), (3, data)] {
            if let Some(p) = packet(number, part) {
                match o.add(&p) {
                    Seen::Yes(again) if number == 3 => assert_eq!(again, hello),
                    _ => {}
                }
                bounded(&o);
            }
        }
    }
}

fn read(datagram: &[u8]) -> Seen<ClientHello> {
    let Some(mut o) = Opening::new(datagram) else { return Seen::No };
    let seen = o.add(datagram);
    bounded(&o);
    assert!(o.refuse(Refusal::NoBackend).is_some());
    seen
}

fn bounded(o: &Opening) {
    assert!(o.crypto.data.len() <= MAX_CRYPTO && o.crypto.have.len() <= MAX_PIECES + 1);
    assert!(o.crypto.have.windows(2).all(|w| w[0].1 < w[1].0), "{:?}", o.crypto.have);
}

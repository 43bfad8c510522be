use proptest::prelude::*;

use super::*;

fn hex(s: &str) -> Vec<u8> {
    let s: String = s.split_whitespace().collect();
    (0..s.len()).step_by(2).map(|i| u8::from_str_radix(&s[i..i + 2], 16).unwrap()).collect()
}

/// RFC 9001 Appendix A: the client's choice for the server's connection ID.
const ID: &str = "8394c8f03e515708";
/// The CRYPTO frame of A.2.
const HELLO: &str = "
    060040f1010000ed0303ebf8fa56f12939b9584a3896472ec40bb863cfd3e868
    04fe3a47f06a2b69484c00000413011302010000c000000010000e00000b6578
    616d706c652e636f6dff01000100000a00080006001d00170018001000070005
    04616c706e000500050100000000003300260024001d00209370b2c9caa47fba
    baf4559fedba753de171fa71f50f1ce15d43e994ec74d748002b000302030400
    0d0010000e0403050306030203080408050806002d00020101001c0002400100
    3900320408ffffffffffffffff05048000ffff07048000ffff08011001048000
    75300901100f088394c8f03e51570806048000ffff";

fn keys(side: rustls::Side) -> Keys {
    SUITE.as_ref().unwrap().keys(&hex(ID), side, Version::V1)
}

fn client(number: u32, mut frames: Vec<u8>, len: usize) -> Vec<u8> {
    frames.resize(len.max(frames.len()), 0);
    let id = Id::new(&hex(ID)).unwrap();
    seal(&keys(rustls::Side::Client).local, &id, &Id::default(), number, frames).unwrap()
}

fn crypto_frame(offset: usize, piece: &[u8]) -> Vec<u8> {
    let varint = |n: usize| (n as u16 | 0x4000).to_be_bytes();
    [&[6][..], &varint(offset), &varint(piece.len()), piece].concat()
}

fn read(datagram: &[u8]) -> Seen<ClientHello> {
    Opening::new(datagram).map_or(Seen::No, |mut o| o.add(datagram))
}

/// RFC 9001 Appendix A.2. The tag at its end covers every byte of header and payload, so header, sample and tag are
/// the packet.
#[test]
fn the_client_initial_of_the_rfc() {
    let packet = client(2, hex(HELLO), 1162);
    assert_eq!(packet.len(), 1200);
    assert_eq!(packet[..22], hex("c000000001088394c8f03e5157080000449e7b9aec34"));
    assert_eq!(packet[22..38], hex("d1b1c98dd7689fb8ec11d242b123dc9b"));
    assert_eq!(packet[1184..], hex("e221af44860018ab0856972e194cd934"));
    let Seen::Yes(hello) = read(&packet) else { panic!() };
    assert_eq!(hello.sni.as_deref(), Some("example.com"));
    assert_eq!(hello.alpn, ["alpn"]);
    // A datagram that a server must discard.
    assert!(Opening::new(&packet[..1199]).is_none());
    let short = client(2, hex(HELLO), 1161);
    assert!(Opening::new(&short).is_none());
}

/// RFC 9001 Appendix A.3: the server's answer, which shows the keys of the other direction.
#[test]
fn the_server_initial_of_the_rfc() {
    let packet = hex("cf000000010008f067a5502a4262b5004075c0d95a482cd0991cd25b0aac406a
        5816b6394100f37a1c69797554780bb38cc5a99f5ede4cf73c3ec2493a1839b3
        dbcba3f6ea46c5b7684df3548e7ddeb9c3bf9c73cc3f3bded74b562bfb19fb84
        022f8ef4cdd93795d77d06edbb7aaf2f58891850abbdca3d20398c276456cbc4
        2158407dd074ee");
    let h = header(&packet).unwrap();
    assert_eq!((h.to, h.from.get(), h.has_token), (Id::default(), &hex("f067a5502a4262b5")[..], false));
    let payload = open(&keys(rustls::Side::Client).remote, &packet, &h).unwrap();
    let expected = hex("02000000000600405a020000560303eefce7f7b37ba1d1632e96677825ddf739
        88cfc79825df566dc5430b9a045a1200130100002e00330024001d00209d3c94
        0d89690b84d08a60993c144eca684d1081287c834d5311bcf32bb9da1a002b00
        020304");
    assert_eq!(payload, expected);
    assert!(open(&keys(rustls::Side::Server).remote, &packet, &h).is_none(), "not the client's keys");
}

#[test]
fn a_hello_in_pieces_and_in_any_order() {
    let hello = hex(HELLO).split_off(4);
    let cut = [0, 50, 100, 101, 180, hello.len()];
    let pieces: Vec<Vec<u8>> = cut.windows(2).map(|w| crypto_frame(w[0], &hello[w[0]..w[1]])).collect();
    // In one packet, backwards, with pings between.
    let frames: Vec<u8> = pieces.iter().rev().flat_map(|p| [&[1][..], p].concat()).collect();
    assert!(matches!(read(&client(0, frames, 1162)), Seen::Yes(_)));
    // In packets of their own, the first one last, and one twice; and an ACK before.
    let mut o = Opening::new(&client(0, pieces[4].clone(), 1162)).unwrap();
    for (n, i) in [4, 2, 2, 1, 3].into_iter().enumerate() {
        let frames = [&[2, 0, 0, 0, 0][..], &pieces[i]].concat();
        assert_eq!(o.add(&client(n as u32, frames, 1162)), Seen::More);
    }
    let Seen::Yes(seen) = o.add(&client(9, pieces[0].clone(), 1162)) else { panic!() };
    assert_eq!(seen.sni.as_deref(), Some("example.com"));
    // Two packets in one datagram.
    let two = [client(0, pieces[..2].concat(), 0), client(1, pieces[2..].concat(), 1162)].concat();
    assert!(matches!(read(&two), Seen::Yes(_)));
}

#[test]
fn what_no_client_sends_is_refused() {
    for frames in [
        vec![0x1c, 0, 0, 0],                      // CONNECTION_CLOSE
        vec![0x08, 0, 1],                         // STREAM
        vec![0x30],                               // DATAGRAM
        vec![0x06, 0x80, 0xff, 0xff, 0xff, 1, 1], // far beyond any handshake
        crypto_frame(MAX_CRYPTO, &[1]),
        vec![0x06, 0, 0x7f, 0xff, 1],              // longer than the packet
        crypto_frame(0, b"\x02\x00\x00\x05hello"), // not a ClientHello
    ] {
        assert_eq!(read(&client(0, frames.clone(), 1162)), Seen::No, "{frames:?}");
    }
    // Pieces with more gaps than are kept.
    let frames: Vec<u8> = (0..=MAX_PIECES).flat_map(|i| crypto_frame(1 + i * 2, &[0])).collect();
    assert_eq!(read(&client(0, frames, 1162)), Seen::No);
}

#[test]
fn a_refusal_is_a_servers_last_word() {
    let packet = client(0, hex(HELLO), 1162);
    let o = Opening::new(&packet).unwrap();
    for why in [Refusal::UnknownName, Refusal::NoBackend, Refusal::NoWay] {
        let answer = o.refuse(why).unwrap();
        let h = header(&answer).unwrap();
        assert_eq!((h.to, h.from.get()), (Id::default(), &hex(ID)[..]));
        let payload = open(&keys(rustls::Side::Client).remote, &answer, &h).unwrap();
        assert_eq!(payload[..4], [0x1c, 0x41, why.code(), 0]);
        assert_eq!(payload[5..], *why.to_string().as_bytes());
    }
}

proptest! {
    /// A packet that was changed anywhere says nothing, as its tag does not fit any more, unless the change is behind it.
    #[test]
    fn changed_packets_say_nothing(at in 0usize..1200, by in 1u8..=255) {
        let mut packet = client(2, hex(HELLO), 1162);
        packet[at] ^= by;
        prop_assert!(!matches!(read(&packet), Seen::Yes(_)));
    }

    /// Whatever frames a client encrypts: decided or waiting, bounded, and no panic.
    #[test]
    fn any_frames_are_handled(
        frames in proptest::collection::vec(any::<u8>(), 0..1162),
        kinds in proptest::collection::vec((0usize..9000, proptest::collection::vec(any::<u8>(), 0..60)), 0..20),
    ) {
        let _ = read(&client(0, frames, 1162));
        let frames: Vec<u8> = kinds.iter().flat_map(|(o, p)| crypto_frame(*o, p)).collect();
        let packet = client(0, frames, 1162);
        if let Some(mut o) = Opening::new(&packet) {
            let _ = o.add(&packet);
            prop_assert!(o.crypto.data.len() <= MAX_CRYPTO && o.crypto.have.len() <= MAX_PIECES + 1);
        }
    }

    /// The same for hellos with changed bytes inside of a packet whose keys are right.
    #[test]
    fn changed_hellos_are_handled(changes in proptest::collection::vec((0usize..245, any::<u8>()), 1..8)) {
        let mut frame = hex(HELLO);
        for (at, to) in changes {
            frame[at] = to;
        }
        let _ = read(&client(0, frame, 1162));
    }

    #[test]
    fn any_bytes_are_handled(mut raw in proptest::collection::vec(any::<u8>(), 0..1500)) {
        let _ = header(&raw);
        let _ = next_packet(&raw);
        let _ = read(&raw);
        if raw.len() > 6 {
            raw[..5].copy_from_slice(&[0xc0, 0, 0, 0, 1]);
            raw[5] = 8;
            let _ = header(&raw);
            let _ = next_packet(&raw);
            raw.resize(1300, 7);
            let _ = read(&raw);
        }
    }
}

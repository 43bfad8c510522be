//! The first packets of a QUIC connection that somebody else ends: the name that its ClientHello asks for, and a way to
//! say no.
//!
//! Initial packets are encrypted with keys that follow from the connection ID in their header (RFC 9001 section 5.2),
//! so whoever sees the first of them can read it, and can answer in the server's place as long as the server has not.
//! Nothing later can be read or written here.
//!
//! A ClientHello may span packets, and its pieces (CRYPTO frames) come in any order, twice, or never. What is kept of
//! it is bounded by [`MAX_CRYPTO`] bytes and [`MAX_PIECES`] gaps; who needs more is no client of ours.

use std::sync::LazyLock;

use rustls::quic::{DirectionalKeys, Keys, Suite, Version};

use crate::{
    listener::inspect::{self, ClientHello, Seen},
    refusal::Refusal,
};

/// Datagrams with a client's Initial packet are at least this long (RFC 9000 section 14.1).
pub(super) const MIN_DATAGRAM: usize = 1200;
/// Longest connection ID, and the shortest that a client may choose for the server (RFC 9000 sections 17.2 and 7.2).
const MAX_ID: usize = 20;
const MIN_FIRST_ID: usize = 8;
/// Bytes of a ClientHello that are kept: three times what a post-quantum key share makes of it.
const MAX_CRYPTO: usize = 8 * 1024;
/// Pieces with gaps between them.
const MAX_PIECES: usize = 16;
const QUIC_V1: u32 = 1;

static SUITE: LazyLock<Option<Suite>> = LazyLock::new(|| {
    let provider = mesh_identity::crypto_provider();
    let aes = rustls::CipherSuite::TLS13_AES_128_GCM_SHA256;
    provider.cipher_suites.iter().find(|s| s.suite() == aes)?.tls13()?.quic_suite()
});

/// A connection ID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Id {
    len: u8,
    bytes: [u8; MAX_ID],
}

impl Id {
    fn new(b: &[u8]) -> Option<Self> {
        let mut bytes = [0; MAX_ID];
        bytes.get_mut(..b.len())?.copy_from_slice(b);
        Some(Self { len: u8::try_from(b.len()).ok()?, bytes })
    }

    fn get(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or_default()
    }
}

/// What can be read of an Initial packet without keys.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) to: Id,
    from: Id,
    /// A token of the server (Retry, NEW_TOKEN): the client has heard of it.
    pub(super) has_token: bool,
    /// Where the packet number is.
    number_at: usize,
    /// Where the packet ends.
    end: usize,
}

/// Reads fields and never past the end.
struct Cursor<'a> {
    all: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let out = self.all.get(self.at..self.at.checked_add(n)?)?;
        self.at += n;
        Some(out)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1).and_then(|b| b.first().copied())
    }

    /// RFC 9000 section 16.
    fn varint(&mut self) -> Option<u64> {
        let first = self.byte()?;
        let more = self.take((1 << (first >> 6)) - 1)?;
        Some(more.iter().fold(u64::from(first & 0x3f), |v, b| v << 8 | u64::from(*b)))
    }

    fn size(&mut self) -> Option<usize> {
        usize::try_from(self.varint()?).ok()
    }

    fn id(&mut self) -> Option<Id> {
        let n = usize::from(self.byte()?);
        Id::new(self.take(n)?)
    }

    fn is_empty(&self) -> bool {
        self.at >= self.all.len()
    }
}

/// Whether a datagram begins with an Initial packet of version 1, from a client or a server.
pub(super) fn is_initial(datagram: &[u8]) -> bool {
    matches!(datagram, [first, 0, 0, 0, 1, ..] if first & 0xf0 == 0xc0)
}

/// The header of an Initial packet at the beginning of `packets`; `None` if something else is there.
pub(super) fn header(packets: &[u8]) -> Option<Header> {
    if !is_initial(packets) {
        return None;
    }
    let mut c = Cursor { all: packets, at: 5 };
    let (to, from) = (c.id()?, c.id()?);
    let token = c.size()?;
    c.take(token)?;
    let len = c.size()?;
    let number_at = c.at;
    c.take(len)?;
    Some(Header { to, from, has_token: token > 0, number_at, end: c.at })
}

/// Where the next packet of a datagram begins, whatever packet with a long header stands at its beginning.
fn next_packet(packets: &[u8]) -> Option<usize> {
    let first = *packets.first()?;
    let version = u32::from_be_bytes(packets.get(1..5)?.try_into().ok()?);
    if first & 0xc0 != 0xc0 || version != QUIC_V1 {
        return None;
    }
    let mut c = Cursor { all: packets, at: 5 };
    c.id()?;
    c.id()?;
    match first & 0x30 {
        0x00 => return header(packets).map(|h| h.end),
        // 0-RTT and Handshake.
        0x10 | 0x20 => {}
        // Retry has no length, and nothing follows it.
        _ => return None,
    }
    let len = c.size()?;
    c.take(len)?;
    Some(c.at)
}

/// Bytes of a handshake, as they come.
#[derive(Debug, Default)]
struct Crypto {
    data: Vec<u8>,
    /// Parts of `data` that are there, in order and apart.
    have: Vec<(usize, usize)>,
}

impl Crypto {
    /// `None`: too much of it.
    fn add(&mut self, offset: usize, piece: &[u8]) -> Option<()> {
        let end = offset.checked_add(piece.len()).filter(|end| *end <= MAX_CRYPTO)?;
        if piece.is_empty() {
            return Some(());
        }
        if self.data.len() < end {
            self.data.resize(end, 0);
        }
        self.data.get_mut(offset..end)?.copy_from_slice(piece);
        let mut merged = (offset, end);
        self.have.retain(|(from, to)| {
            let apart = *to < merged.0 || merged.1 < *from;
            if !apart {
                merged = (merged.0.min(*from), merged.1.max(*to));
            }
            apart
        });
        let at = self.have.partition_point(|(from, _)| *from < merged.0);
        self.have.insert(at, merged);
        (self.have.len() <= MAX_PIECES).then_some(())
    }

    /// What is there without a gap.
    fn beginning(&self) -> &[u8] {
        match self.have.first() {
            Some((0, to)) => self.data.get(..*to).unwrap_or_default(),
            _ => &[],
        }
    }
}

/// A connection whose first packets are being read.
pub(super) struct Opening {
    /// What the client calls the server at first: keys follow from it.
    pub(super) to: Id,
    from: Id,
    keys: Keys,
    crypto: Crypto,
}

impl Opening {
    /// From a client's first datagram; `None` if it is none.
    pub(super) fn new(datagram: &[u8]) -> Option<Self> {
        let header = header(datagram)?;
        if datagram.len() < MIN_DATAGRAM || header.to.get().len() < MIN_FIRST_ID {
            return None;
        }
        let suite = SUITE.as_ref()?;
        let keys = suite.keys(header.to.get(), rustls::Side::Server, Version::V1);
        Some(Self { to: header.to, from: header.from, keys, crypto: Crypto::default() })
    }

    /// Adds a datagram and looks at what is there now: the ClientHello, not all of it, or none that could be read.
    /// Packets with other keys, and those that were changed on the way, say nothing.
    pub(super) fn add(&mut self, datagram: &[u8]) -> Seen<ClientHello> {
        let mut rest = datagram;
        while !rest.is_empty() {
            if let Some(h) = header(rest).filter(|h| h.to == self.to)
                && let Some(payload) = open(&self.keys.remote, rest, &h)
                && self.frames(&payload).is_none()
            {
                return Seen::No;
            }
            match next_packet(rest).and_then(|n| rest.get(n..)) {
                Some(next) => rest = next,
                None => break,
            }
        }
        inspect::hello_message(self.crypto.beginning())
    }

    /// Whether anything of the handshake could be read.
    pub(super) fn has_some(&self) -> bool {
        !self.crypto.have.is_empty()
    }

    /// Takes the pieces of the handshake out of the frames of a packet; `None` if a client would not send them.
    fn frames(&mut self, payload: &[u8]) -> Option<()> {
        let mut c = Cursor { all: payload, at: 0 };
        while !c.is_empty() {
            match c.varint()? {
                // PADDING and PING.
                0x00 | 0x01 => {}
                ack @ (0x02 | 0x03) => {
                    c.varint()?;
                    c.varint()?;
                    let ranges = c.varint()?;
                    c.varint()?;
                    for _ in 0..ranges {
                        c.varint()?;
                        c.varint()?;
                    }
                    if ack == 0x03 {
                        for _ in 0..3 {
                            c.varint()?;
                        }
                    }
                }
                0x06 => {
                    let offset = c.size()?;
                    let len = c.size()?;
                    let piece = c.take(len)?;
                    self.crypto.add(offset, piece)?;
                }
                // CONNECTION_CLOSE, and what must not be there (RFC 9000 section 12.4).
                _ => return None,
            }
        }
        Some(())
    }

    /// A datagram that ends the connection in the server's place: the client reads the reason as the alert of a server
    /// (RFC 9001 section 4.8).
    pub(super) fn refuse(&self, why: Refusal) -> Option<Vec<u8>> {
        let reason = why.to_string();
        let reason = reason.as_bytes();
        // CONNECTION_CLOSE of the transport: CRYPTO_ERROR and the alert, in no frame, and words.
        let mut payload = vec![0x1c, 0x41, why.code(), 0x00];
        payload.push(u8::try_from(reason.len()).ok().filter(|n| *n < 64)?);
        payload.extend_from_slice(reason);
        // The server's ID is any.
        seal(&self.keys.local, &self.from, &self.to, 0, payload)
    }
}

/// The payload of a packet of a client; `None` if its keys are others.
fn open(keys: &DirectionalKeys, packets: &[u8], h: &Header) -> Option<Vec<u8>> {
    let mut packet = packets.get(..h.end)?.to_vec();
    let sample_at = h.number_at + 4;
    let sample = packets.get(sample_at..sample_at + keys.header.sample_len())?;
    let (head, number) = packet.split_at_mut(h.number_at);
    keys.header.decrypt_in_place(sample, head.first_mut()?, number.get_mut(..4)?).ok()?;
    let len = usize::from(head.first()? & 0x03) + 1;
    // First packets have small numbers, so what is written is all of it (RFC 9000 section 17.1).
    let number = number.get(..len)?.iter().fold(0, |n, b| n << 8 | u64::from(*b));
    let mut payload = packet.split_off(h.number_at + len);
    let n = keys.packet.decrypt_in_place(number, &packet, &mut payload).ok()?.len();
    payload.truncate(n);
    Some(payload)
}

/// An Initial packet without a token.
fn seal(keys: &DirectionalKeys, to: &Id, from: &Id, number: u32, mut payload: Vec<u8>) -> Option<Vec<u8>> {
    let mut packet = vec![0xc3, 0, 0, 0, 1];
    for id in [to, from] {
        packet.push(id.len);
        packet.extend_from_slice(id.get());
    }
    packet.push(0);
    let len = u16::try_from(4 + payload.len() + keys.packet.tag_len()).ok().filter(|n| *n < 1 << 14)?;
    packet.extend_from_slice(&(len | 0x4000).to_be_bytes());
    let number_at = packet.len();
    packet.extend_from_slice(&number.to_be_bytes());
    let tag = keys.packet.encrypt_in_place(number.into(), &packet, &mut payload).ok()?;
    let sealed_at = packet.len();
    packet.append(&mut payload);
    packet.extend_from_slice(tag.as_ref());
    let sample = packet.get(sealed_at..sealed_at + keys.header.sample_len())?.to_vec();
    let (head, rest) = packet.split_at_mut(number_at);
    keys.header.encrypt_in_place(&sample, head.first_mut()?, rest.get_mut(..4)?).ok()?;
    Some(packet)
}

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;

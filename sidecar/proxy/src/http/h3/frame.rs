//! Frames (RFC 9114 section 7): bodies pass through as they come, other frames are read whole within a limit, and
//! unknown ones are skipped without being kept.

use bytes::{Buf, Bytes, BytesMut};

use super::Code;

pub(super) const DATA: u64 = 0x0;
pub(super) const HEADERS: u64 = 0x1;
const CANCEL_PUSH: u64 = 0x3;
pub(super) const SETTINGS: u64 = 0x4;
const PUSH_PROMISE: u64 = 0x5;
pub(super) const GOAWAY: u64 = 0x7;
const MAX_PUSH_ID: u64 = 0xd;
/// Frames of HTTP/2 whose numbers stand for nothing here (section 7.2.8).
const OF_HTTP2: [u64; 4] = [0x2, 0x6, 0x8, 0x9];

/// Payload of a frame on the control stream; all of them are a few numbers.
const MAX_CONTROL: u64 = 4096;

/// Reads a variable-length integer (RFC 9000 section 16); `None` wants more bytes.
pub(super) fn varint(buf: &[u8]) -> Option<(u64, usize)> {
    let first = *buf.first()?;
    let len = 1 << (first >> 6);
    let bytes = buf.get(..len)?;
    let value = bytes[1..].iter().fold(u64::from(first & 0x3f), |v, b| (v << 8) | u64::from(*b));
    Some((value, len))
}

/// Writes a variable-length integer; what is above 2^62 - 1 has no form and is cut to it.
pub(super) fn put_varint(out: &mut Vec<u8>, v: u64) {
    let bytes = v.to_be_bytes();
    match v {
        0..0x40 => out.push(bytes[7]),
        0x40..0x4000 => out.extend_from_slice(&[bytes[6] | 0x40, bytes[7]]),
        0x4000..0x4000_0000 => out.extend_from_slice(&[bytes[4] | 0x80, bytes[5], bytes[6], bytes[7]]),
        _ => {
            let mut bytes = v.min((1 << 62) - 1).to_be_bytes();
            bytes[0] |= 0xc0;
            out.extend_from_slice(&bytes);
        }
    }
}

/// The head of a frame.
pub(super) fn put_header(out: &mut Vec<u8>, kind: u64, len: usize) {
    put_varint(out, kind);
    put_varint(out, len as u64);
}

/// What a stream carries next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A piece of a body, never empty.
    Data(Bytes),
    /// A field section.
    Headers(Bytes),
    /// A field section beyond the limit; nothing more is read.
    TooLarge,
    /// A frame of the control stream.
    Control(u64, Bytes),
}

/// Whose frames they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    Request,
    Control,
}

/// Finds the frames in the pieces of a stream.
#[derive(Debug)]
pub(super) struct Frames {
    of: Of,
    state: State,
    /// Largest field section, encoded.
    limit: u64,
}

#[derive(Debug)]
enum State {
    /// Bytes of a head that came in pieces.
    Header(BytesMut),
    Data(u64),
    Whole(u64, u64, BytesMut),
    Skip(u64),
}

impl Frames {
    pub(super) fn new(of: Of, limit: usize) -> Self {
        Self { of, state: State::Header(BytesMut::new()), limit: limit as u64 }
    }

    /// Changes the limit for field sections to come.
    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit as u64;
    }

    /// Whether a stream may end here.
    pub(super) fn is_between(&self) -> bool {
        matches!(&self.state, State::Header(b) if b.is_empty())
    }

    /// The next event in `input`, which is consumed; `None` when it is used up.
    pub(super) fn next(&mut self, input: &mut Bytes) -> Result<Option<Event>, Code> {
        loop {
            match &mut self.state {
                State::Header(kept) => {
                    if input.is_empty() {
                        return Ok(None);
                    }
                    let Some((kind, len)) = header(kept, input) else { return Ok(None) };
                    if let Some(event) = self.begin(kind, len)? {
                        return Ok(Some(event));
                    }
                }
                State::Data(left) => {
                    let n = take(*left, input);
                    let data = input.split_to(n);
                    *left -= n as u64;
                    if *left == 0 {
                        self.state = State::Header(BytesMut::new());
                    } else if data.is_empty() {
                        return Ok(None);
                    }
                    if !data.is_empty() {
                        return Ok(Some(Event::Data(data)));
                    }
                }
                State::Skip(left) => {
                    let n = take(*left, input);
                    input.advance(n);
                    *left -= n as u64;
                    if *left > 0 {
                        return Ok(None);
                    }
                    self.state = State::Header(BytesMut::new());
                }
                State::Whole(kind, left, kept) => {
                    let n = take(*left, input);
                    let piece = input.split_to(n);
                    *left -= n as u64;
                    if *left > 0 {
                        kept.extend_from_slice(&piece);
                        return Ok(None);
                    }
                    let payload = if kept.is_empty() {
                        piece
                    } else {
                        kept.extend_from_slice(&piece);
                        kept.split().freeze()
                    };
                    let kind = *kind;
                    self.state = State::Header(BytesMut::new());
                    return Ok(Some(match kind {
                        HEADERS => Event::Headers(payload),
                        other => Event::Control(other, payload),
                    }));
                }
            }
        }
    }

    fn begin(&mut self, kind: u64, len: u64) -> Result<Option<Event>, Code> {
        let known =
            matches!(kind, DATA | HEADERS | CANCEL_PUSH | SETTINGS | PUSH_PROMISE | GOAWAY | MAX_PUSH_ID);
        let allowed = match self.of {
            Of::Request => matches!(kind, DATA | HEADERS),
            Of::Control => matches!(kind, CANCEL_PUSH | SETTINGS | GOAWAY | MAX_PUSH_ID),
        };
        if OF_HTTP2.contains(&kind) || (known && !allowed) {
            return Err(Code::FrameUnexpected);
        }
        self.state = match kind {
            DATA => State::Data(len),
            HEADERS if len > self.limit => return Ok(Some(Event::TooLarge)),
            _ if known && kind != HEADERS && len > MAX_CONTROL => return Err(Code::ExcessiveLoad),
            _ if known => State::Whole(kind, len, BytesMut::new()),
            _ => State::Skip(len),
        };
        Ok(None)
    }
}

fn take(left: u64, input: &Bytes) -> usize {
    usize::try_from(left).map_or(input.len(), |l| l.min(input.len()))
}

/// Type and length of a frame; `None` when `input` is used up before.
fn header(kept: &mut BytesMut, input: &mut Bytes) -> Option<(u64, u64)> {
    let parse = |buf: &[u8]| {
        let (kind, n) = varint(buf)?;
        let (len, m) = varint(&buf[n..])?;
        Some((kind, len, n + m))
    };
    if kept.is_empty() {
        if let Some((kind, len, n)) = parse(input) {
            input.advance(n);
            return Some((kind, len));
        }
        kept.extend_from_slice(input);
        input.clear();
        return None;
    }
    // Two numbers have 16 bytes at most.
    while input.has_remaining() {
        kept.extend_from_slice(&input.split_to(1));
        if let Some((kind, len, _)) = parse(kept) {
            kept.clear();
            return Some((kind, len));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u64, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        put_header(&mut out, kind, payload.len());
        out.extend_from_slice(payload);
        out
    }

    /// Events of a stream in pieces of one size; the data joined.
    fn read(of: Of, wire: &[u8], piece: usize) -> Result<(Vec<Event>, Vec<u8>, bool), Code> {
        let mut frames = Frames::new(of, 100);
        let (mut events, mut data) = (vec![], vec![]);
        for p in wire.chunks(piece.max(1)) {
            let mut input = Bytes::copy_from_slice(p);
            while let Some(e) = frames.next(&mut input)? {
                match e {
                    Event::Data(d) => data.extend_from_slice(&d),
                    Event::TooLarge => return Ok((vec![Event::TooLarge], data, false)),
                    e => events.push(e),
                }
            }
            assert!(input.is_empty());
        }
        Ok((events, data, frames.is_between()))
    }

    #[test]
    fn frames_in_any_pieces() {
        let wire = [
            frame(0x21, b"grease"),
            frame(HEADERS, b"fields"),
            frame(DATA, b""),
            frame(DATA, b"some"),
            frame(0x1f * 7 + 0x21, &[0; 70]),
            frame(DATA, b" body"),
            frame(HEADERS, b""),
        ]
        .concat();
        for piece in 1..wire.len() {
            let (events, data, end) = read(Of::Request, &wire, piece).unwrap();
            let headers = |s: &'static str| Event::Headers(Bytes::from_static(s.as_bytes()));
            assert_eq!(events, [headers("fields"), headers("")]);
            assert_eq!((data.as_slice(), end), (&b"some body"[..], true));
        }
        assert!(!read(Of::Request, &wire[..wire.len() - 1], 3).unwrap().2);
    }

    #[test]
    fn frames_that_are_refused() {
        for kind in [SETTINGS, GOAWAY, CANCEL_PUSH, PUSH_PROMISE, MAX_PUSH_ID, 2, 6, 8, 9] {
            assert_eq!(read(Of::Request, &frame(kind, b"x"), 1), Err(Code::FrameUnexpected), "{kind}");
        }
        for kind in [DATA, HEADERS, PUSH_PROMISE, 2, 6, 8, 9] {
            assert_eq!(read(Of::Control, &frame(kind, b"x"), 1), Err(Code::FrameUnexpected), "{kind}");
        }
        assert_eq!(read(Of::Request, &frame(HEADERS, &[0; 101]), 7).unwrap().0, [Event::TooLarge]);
        let mut settings = Vec::new();
        put_header(&mut settings, SETTINGS, 1 << 40);
        assert_eq!(read(Of::Control, &settings, 9), Err(Code::ExcessiveLoad));
        // A body may announce more than there is memory; nothing is reserved for it.
        let mut body = Vec::new();
        put_header(&mut body, DATA, usize::MAX >> 2);
        body.extend_from_slice(b"abc");
        assert_eq!(read(Of::Request, &body, 5).unwrap().1, b"abc");
    }

    proptest! {
        #[test]
        fn numbers_survive(v in 0u64..1 << 62) {
            let mut out = Vec::new();
            put_varint(&mut out, v);
            prop_assert_eq!(varint(&out), Some((v, out.len())));
            prop_assert_eq!(varint(&out[..out.len() - 1]), None);
        }

        #[test]
        fn pieces_do_not_matter(wire in proptest::collection::vec(any::<u8>(), 0..200), piece in 1usize..50) {
            for of in [Of::Request, Of::Control] {
                prop_assert_eq!(read(of, &wire, piece), read(of, &wire, wire.len()));
            }
        }
    }
}

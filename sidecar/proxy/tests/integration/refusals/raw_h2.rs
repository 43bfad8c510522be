//! HTTP/2 by hand: a client that sends what no library would.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const PRIORITY: u8 = 2;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
const GOAWAY: u8 = 7;
pub(crate) const CONTINUATION: u8 = 9;
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

/// A frame (RFC 9113 section 4.1).
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

/// An integer with a prefix of seven bits (RFC 7541 section 5.1).
fn integer(first: u8, mut n: usize, out: &mut Vec<u8>) {
    if n < 127 {
        out.push(first | n as u8);
        return;
    }
    out.push(first | 127);
    n -= 127;
    while n >= 128 {
        out.push((n % 128) as u8 | 128);
        n /= 128;
    }
    out.push(n as u8);
}

fn string(s: &[u8], out: &mut Vec<u8>) {
    integer(0, s.len(), out);
    out.extend(s);
}

/// A literal field that no table keeps (RFC 7541 section 6.2.2).
pub(crate) fn literal(name: &[u8], value: &[u8], out: &mut Vec<u8>) {
    out.push(0);
    string(name, out);
    string(value, out);
}

/// A literal field that enters the table (RFC 7541 section 6.2.1).
pub(crate) fn indexed(name: &[u8], value: &[u8], out: &mut Vec<u8>) {
    out.push(0x40);
    string(name, out);
    string(value, out);
}

pub(crate) fn block(fields: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (n, v) in fields {
        literal(n, v, &mut out);
    }
    out
}

/// What came of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Status(u16, String),
    Reset(u32),
    GoAway(u32),
    Closed,
    Nothing,
}

const CODES: [&str; 14] = [
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    "REFUSED_STREAM",
    "CANCEL",
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
];

impl Outcome {
    pub(crate) fn name(&self) -> String {
        let code = |c: &u32| CODES.get(*c as usize).copied().unwrap_or("?");
        match self {
            Self::Status(s, _) => s.to_string(),
            Self::Reset(c) => format!("RST {}", code(c)),
            Self::GoAway(c) => format!("GOAWAY {}", code(c)),
            Self::Closed => "closed".into(),
            Self::Nothing => "nothing".into(),
        }
    }
}

/// `:status` of the first field block of a connection.
fn status(block: &[u8]) -> u16 {
    let at = block.iter().position(|b| b & 0xe0 != 0x20).unwrap_or(0);
    let b = &block[at..];
    match b.first() {
        Some(i @ 0x88..=0x8e) => [200, 204, 206, 304, 400, 404, 500][usize::from(i - 0x88)],
        Some(0x48 | 0x08) => {
            let (huffman, len) = (b[1] & 0x80 != 0, usize::from(b[1] & 0x7f));
            let value = &b[2..2 + len];
            if !huffman {
                return std::str::from_utf8(value).unwrap().parse().unwrap();
            }
            // Digits: 0 to 2 have five bits, the others six that begin with 011 (RFC 7541 appendix B).
            let bits = value.iter().flat_map(|b| (0..8).rev().map(move |i| u16::from(b >> i & 1)));
            let bits: Vec<u16> = bits.collect();
            let (mut n, mut i) = (0, 0);
            for _ in 0..3 {
                let five = bits[i..i + 5].iter().fold(0, |n, b| n * 2 + b);
                let (digit, used) = if five < 3 {
                    (five, 5)
                } else {
                    (bits[i..i + 6].iter().fold(0, |n, b| n * 2 + b) - 0x19 + 3, 6)
                };
                n = n * 10 + digit;
                i += used;
            }
            n
        }
        other => panic!("no status: {other:?}"),
    }
}

pub(crate) struct RawH2 {
    pub(crate) io: TcpStream,
    buf: Vec<u8>,
}

impl RawH2 {
    pub(crate) async fn open(address: std::net::SocketAddr) -> Self {
        let mut io = TcpStream::connect(address).await.unwrap();
        let mut hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        hello.extend(frame(SETTINGS, 0, 0, &[]));
        io.write_all(&hello).await.unwrap();
        Self { io, buf: Vec::new() }
    }

    /// Sends; false if the peer takes no more.
    pub(crate) async fn send(&mut self, raw: &[u8]) -> bool {
        self.io.write_all(raw).await.is_ok()
    }

    async fn next(&mut self, limit: Duration) -> Result<(u8, u8, u32, Vec<u8>), Outcome> {
        loop {
            if self.buf.len() >= 9 {
                let len =
                    usize::from(self.buf[0]) << 16 | usize::from(self.buf[1]) << 8 | usize::from(self.buf[2]);
                if self.buf.len() >= 9 + len {
                    let all: Vec<u8> = self.buf.drain(..9 + len).collect();
                    let stream = u32::from_be_bytes([all[5] & 0x7f, all[6], all[7], all[8]]);
                    return Ok((all[3], all[4], stream, all[9..].to_vec()));
                }
            }
            let mut piece = [0; 16_384];
            match tokio::time::timeout(limit, self.io.read(&mut piece)).await {
                Err(_) => return Err(Outcome::Nothing),
                Ok(Ok(0) | Err(_)) => return Err(Outcome::Closed),
                Ok(Ok(n)) => self.buf.extend_from_slice(&piece[..n]),
            }
        }
    }

    /// Reads until it is known what comes of a stream; with a status, to the end of its body.
    pub(crate) async fn outcome(&mut self, stream: u32, limit: Duration) -> Outcome {
        let (mut seen, mut body) = (None, Vec::new());
        loop {
            let (kind, flags, id, payload) = match self.next(limit).await {
                Ok(f) => f,
                Err(o) => return o,
            };
            let code = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
            match kind {
                GOAWAY if code(4) != 0 => return Outcome::GoAway(code(4)),
                // An answer before the end of the request is followed by a reset without an error.
                RST_STREAM if id == stream && (seen.is_none() || code(0) != 0) => {
                    return Outcome::Reset(code(0));
                }
                HEADERS if id == stream && seen.is_none() => seen = Some(status(&payload)),
                DATA if id == stream => body.extend(payload),
                _ => {}
            }
            if id == stream
                && flags & END_STREAM != 0
                && matches!(kind, DATA | HEADERS)
                && let Some(s) = seen
            {
                return Outcome::Status(s, String::from_utf8_lossy(&body).into_owned());
            }
        }
    }
}

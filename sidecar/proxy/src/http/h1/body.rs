//! Bodies: fixed length, chunked, and until close.

use bytes::{Bytes, BytesMut};

use crate::http::{
    headers::{HeaderId, Headers},
    message::{Frame, MAX_TRAILERS, StreamError},
};

/// Longest chunk-size line; extensions are dropped, so nothing long is ever needed.
const MAX_CHUNK_LINE: usize = 512;
/// Largest piece handed on at once, so that one connection cannot hold the worker.
const MAX_PIECE: usize = 64 * 1024;
/// Trailer fields.
const MAX_TRAILER_FIELDS: usize = 32;

/// Decodes a body from a read buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decoder {
    /// The message is complete.
    Done,
    /// This many bytes remain.
    Length(u64),
    /// At a chunk-size line.
    ChunkSize,
    /// This many bytes remain of a chunk.
    ChunkData(u64),
    /// At the CRLF after a chunk's data.
    ChunkEnd,
    /// In the trailer section.
    Trailers,
    /// Raw bytes until the end of the connection.
    Raw,
}

/// What [`Decoder::decode`] found.
#[derive(Debug)]
pub(crate) enum Decoded {
    Frame(Frame),
    /// The body is complete.
    End,
    /// More bytes are needed.
    More,
}

impl Decoder {
    pub(crate) fn is_done(self) -> bool {
        self == Self::Done
    }

    /// The next frame out of `buf`.
    pub(crate) fn decode(&mut self, buf: &mut BytesMut) -> Result<Decoded, StreamError> {
        loop {
            match *self {
                Self::Done => return Ok(Decoded::End),
                Self::Raw => {
                    if buf.is_empty() {
                        return Ok(Decoded::More);
                    }
                    let n = buf.len().min(MAX_PIECE);
                    return Ok(Decoded::Frame(Frame::Data(buf.split_to(n).freeze())));
                }
                Self::Length(left) => {
                    if left == 0 {
                        *self = Self::Done;
                        continue;
                    }
                    let Some(piece) = take(buf, left) else { return Ok(Decoded::More) };
                    let left = left - piece.len() as u64;
                    *self = if left == 0 { Self::Done } else { Self::Length(left) };
                    return Ok(Decoded::Frame(Frame::Data(piece)));
                }
                Self::ChunkSize => {
                    let Some(end) = line_end(buf, MAX_CHUNK_LINE)? else { return Ok(Decoded::More) };
                    let size = chunk_size(&buf[..end - 2])?;
                    let _ = buf.split_to(end);
                    *self = if size == 0 { Self::Trailers } else { Self::ChunkData(size) };
                }
                Self::ChunkData(left) => {
                    let Some(piece) = take(buf, left) else { return Ok(Decoded::More) };
                    let left = left - piece.len() as u64;
                    *self = if left == 0 { Self::ChunkEnd } else { Self::ChunkData(left) };
                    return Ok(Decoded::Frame(Frame::Data(piece)));
                }
                Self::ChunkEnd => {
                    match buf.get(..2) {
                        Some(b"\r\n") => {}
                        Some(_) => return Err(StreamError::Protocol),
                        None if buf.first().is_some_and(|b| *b != b'\r') => {
                            return Err(StreamError::Protocol);
                        }
                        None => return Ok(Decoded::More),
                    }
                    let _ = buf.split_to(2);
                    *self = Self::ChunkSize;
                }
                Self::Trailers => return self.trailers(buf),
            }
        }
    }

    fn trailers(&mut self, buf: &mut BytesMut) -> Result<Decoded, StreamError> {
        if buf.starts_with(b"\r\n") {
            let _ = buf.split_to(2);
            *self = Self::Done;
            return Ok(Decoded::End);
        }
        let end = match super::parse::find_end(buf, &mut 0) {
            Ok(Some(end)) => end,
            Ok(None) if buf.len() > MAX_TRAILERS => return Err(StreamError::TooLarge),
            Ok(None) => return Ok(Decoded::More),
            Err(_) => return Err(StreamError::Protocol),
        };
        if end > MAX_TRAILERS {
            return Err(StreamError::TooLarge);
        }
        let block = buf.split_to(end);
        let mut fields = [httparse::EMPTY_HEADER; MAX_TRAILER_FIELDS];
        let Ok(httparse::Status::Complete((n, fields))) = httparse::parse_headers(&block, &mut fields) else {
            return Err(StreamError::Protocol);
        };
        if n != end {
            return Err(StreamError::Protocol);
        }
        let mut trailers = Headers::default();
        for f in fields {
            if !HeaderId::of(f.name.as_bytes()).is_forbidden_trailer() {
                trailers.push(f.name.as_bytes(), f.value);
            }
        }
        *self = Self::Done;
        Ok(if trailers.is_empty() { Decoded::End } else { Decoded::Frame(Frame::Trailers(trailers)) })
    }

    /// The connection ended: whether that completes the message.
    pub(crate) fn eof(&mut self) -> Result<(), StreamError> {
        match self {
            Self::Done | Self::Raw => {
                *self = Self::Done;
                Ok(())
            }
            _ => Err(StreamError::Reset),
        }
    }
}

fn take(buf: &mut BytesMut, left: u64) -> Option<Bytes> {
    if buf.is_empty() {
        return None;
    }
    let n = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len()).min(MAX_PIECE);
    Some(buf.split_to(n).freeze())
}

fn line_end(buf: &[u8], limit: usize) -> Result<Option<usize>, StreamError> {
    match buf.iter().take(limit).position(|b| *b == b'\n') {
        Some(at) if at > 0 && buf[at - 1] == b'\r' => Ok(Some(at + 1)),
        Some(_) => Err(StreamError::Protocol),
        None if buf.len() >= limit => Err(StreamError::TooLarge),
        None => Ok(None),
    }
}

fn chunk_size(line: &[u8]) -> Result<u64, StreamError> {
    let digits = line.iter().take_while(|b| b.is_ascii_hexdigit()).count();
    if digits == 0 || digits > 15 {
        return Err(StreamError::Protocol);
    }
    let rest = &line[digits..];
    // White space before `;` is bad white space (RFC 9112 section 7.1.1); control characters never belong.
    if !(rest.is_empty() || rest[0] == b';') || rest.iter().any(|b| (*b < 0x20 && *b != b'\t') || *b == 0x7f)
    {
        return Err(StreamError::Protocol);
    }
    let mut n = 0u64;
    for d in &line[..digits] {
        n = n * 16 + u64::from((*d as char).to_digit(16).unwrap_or(0));
    }
    Ok(n)
}

/// How a body is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoder {
    /// Nothing may be written.
    Empty,
    /// This many bytes remain.
    Length(u64),
    /// In chunks.
    Chunked,
    /// As is; the end is the end of the connection.
    Raw,
}

impl Encoder {
    /// Appends data; bytes beyond a declared length are a protocol error of the producer.
    pub(crate) fn data(&mut self, data: &[u8], out: &mut Vec<u8>) -> Result<(), StreamError> {
        match self {
            Self::Empty => {}
            Self::Length(left) => {
                *left = left.checked_sub(data.len() as u64).ok_or(StreamError::Protocol)?;
                out.extend_from_slice(data);
            }
            Self::Chunked => {
                if !data.is_empty() {
                    write_hex(data.len(), out);
                    out.extend_from_slice(b"\r\n");
                    out.extend_from_slice(data);
                    out.extend_from_slice(b"\r\n");
                }
            }
            Self::Raw => out.extend_from_slice(data),
        }
        Ok(())
    }

    /// Ends the body. `Err`: it is shorter than declared, and the connection must be closed.
    pub(crate) fn finish(
        &mut self,
        trailers: Option<&Headers>,
        out: &mut Vec<u8>,
    ) -> Result<(), StreamError> {
        match self {
            Self::Length(left) if *left > 0 => return Err(StreamError::Protocol),
            Self::Chunked => {
                out.extend_from_slice(b"0\r\n");
                if let Some(t) = trailers {
                    t.write_h1(out);
                }
                out.extend_from_slice(b"\r\n");
            }
            _ => {}
        }
        Ok(())
    }
}

fn write_hex(mut n: usize, out: &mut Vec<u8>) {
    let mut digits = [0u8; 16];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b"0123456789abcdef"[n & 15];
        n >>= 4;
        if n == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(raw: &[u8], step: usize) -> Result<(Vec<u8>, Option<Headers>, usize), StreamError> {
        let mut d = Decoder::ChunkSize;
        let mut buf = BytesMut::new();
        let mut out = Vec::new();
        let mut trailers = None;
        let mut fed = 0;
        loop {
            match d.decode(&mut buf)? {
                Decoded::Frame(Frame::Data(b)) => out.extend_from_slice(&b),
                Decoded::Frame(Frame::Trailers(t)) => trailers = Some(t),
                Decoded::End => return Ok((out, trailers, buf.len() + raw.len() - fed)),
                Decoded::More => {
                    if fed == raw.len() {
                        return Err(StreamError::Reset);
                    }
                    let n = step.min(raw.len() - fed);
                    buf.extend_from_slice(&raw[fed..fed + n]);
                    fed += n;
                }
            }
        }
    }

    #[test]
    fn chunks_in_any_pieces() {
        let raw = b"5;ext=\"a b\"\r\nhello\r\nA\r\n0123456789\r\n0\r\nX-T: 1\r\nContent-Length: 9\r\n\r\nGET";
        for step in [1, 2, 3, 7, 100] {
            let (data, trailers, left) = all(raw, step).unwrap();
            assert_eq!(data, b"hello0123456789");
            let t = trailers.unwrap();
            assert_eq!((t.len(), t.get(b"x-t")), (1, Some(&b"1"[..])));
            assert_eq!(left, 3);
        }
    }

    #[test]
    fn bad_chunks_are_refused() {
        for raw in [
            &b"5\nhello\r\n0\r\n\r\n"[..],
            b"5 \r\nhello\r\n0\r\n\r\n",
            b" 5\r\nhello\r\n0\r\n\r\n",
            b"+5\r\nhello\r\n0\r\n\r\n",
            b"0x5\r\nhello\r\n0\r\n\r\n",
            b"-1\r\nhello\r\n0\r\n\r\n",
            b"5;\x01\r\nhello\r\n0\r\n\r\n",
            b"5\r\nhelloXX0\r\n\r\n",
            b"5\r\nhello\n0\r\n\r\n",
            b"10000000000000000\r\nhello\r\n0\r\n\r\n",
            b"\r\nhello\r\n0\r\n\r\n",
            b"0\r\nX T: 1\r\n\r\n",
            b"0\r\nX: 1\n\r\n",
        ] {
            assert!(all(raw, 100).is_err(), "{:?}", String::from_utf8_lossy(raw));
        }
        let long = [b"5;".as_slice(), &[b'a'; 600]].concat();
        assert_eq!(all(&long, 1000).unwrap_err(), StreamError::TooLarge);
    }

    #[test]
    fn what_is_encoded_decodes() {
        let mut e = Encoder::Chunked;
        let mut out = Vec::new();
        e.data(b"hello", &mut out).unwrap();
        e.data(&[b'x'; 300], &mut out).unwrap();
        let mut t = Headers::default();
        t.push(b"grpc-status", b"0");
        e.finish(Some(&t), &mut out).unwrap();
        let (data, trailers, left) = all(&out, 11).unwrap();
        assert_eq!((data.len(), left), (305, 0));
        assert_eq!(trailers.unwrap().get_id(HeaderId::GrpcStatus), Some(&b"0"[..]));
        let mut e = Encoder::Length(3);
        assert!(e.data(b"abcd", &mut Vec::new()).is_err());
        assert!(Encoder::Length(3).finish(None, &mut Vec::new()).is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_handled(raw in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
            let _ = all(&raw, 17);
        }
    }
}

//! gRPC-Web (`envoy.filters.http.grpc_web`): gRPC for clients that see neither trailers nor, some of them, bytes.
//!
//! Trailers become a last frame of the body; in its text form the whole body is base64, piece by piece.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::{Bytes, BytesMut};

use crate::http::{
    filtered::{Bodies, Decode, Encode},
    headers::{HeaderId, Headers},
    local_reply::grpc_of_http,
    message::{BodyKind, RequestHead, ResponseHead, StreamError},
    record::Record,
};

/// Mark of the frame that holds trailers.
const TRAILERS: u8 = 0x80;

/// Makes a gRPC-Web request a gRPC one, and its answer a gRPC-Web one.
pub(crate) fn run(head: &mut RequestHead, bodies: Option<&Bodies>, rec: &mut Record) {
    let Some(bodies) = bodies else { return };
    let kind = |v: &[u8]| match v.split(|b| *b == b';').next().unwrap_or_default().trim_ascii() {
        b"application/grpc-web" | b"application/grpc-web+proto" => Some(false),
        b"application/grpc-web-text" | b"application/grpc-web-text+proto" => Some(true),
        _ => None,
    };
    let h = &mut head.headers;
    let Some(text) = h.get_id(HeaderId::ContentType).and_then(kind) else { return };
    let text_answer = h.get(b"accept").and_then(kind) == Some(true);
    h.remove_id(HeaderId::ContentLength);
    h.set_id(HeaderId::ContentType, b"application/grpc");
    h.set_id(HeaderId::Te, b"trailers");
    h.set(b"grpc-accept-encoding", b"identity,deflate,gzip");
    if head.body != BodyKind::Empty {
        head.body = BodyKind::Stream;
    }
    rec.is_grpc = true;
    if text {
        bodies.decode(Box::new(FromText(BytesMut::new())));
    }
    bodies.encode(Box::new(Web { text: text_answer, foreign: false }));
}

/// Base64, possibly several padded pieces in a row.
struct FromText(BytesMut);

impl Decode for FromText {
    fn data(&mut self, data: Bytes) -> Result<Bytes, StreamError> {
        self.0.extend_from_slice(&data);
        let whole = self.0.len() / 4 * 4;
        let block = self.0.split_to(whole);
        let mut out = Vec::with_capacity(whole / 4 * 3);
        for four in block.chunks_exact(4) {
            STANDARD.decode_vec(four, &mut out).map_err(|_| StreamError::Protocol)?;
        }
        Ok(out.into())
    }

    fn finish(&mut self) -> Result<(), StreamError> {
        if self.0.is_empty() { Ok(()) } else { Err(StreamError::Protocol) }
    }
}

struct Web {
    text: bool,
    /// The answer is not gRPC; its body means nothing to the client.
    foreign: bool,
}

impl Web {
    fn piece(&self, data: Bytes) -> Bytes {
        if self.text && !data.is_empty() { STANDARD.encode(data).into() } else { data }
    }
}

impl Encode for Web {
    fn start(&mut self, head: &mut ResponseHead, end: bool) -> bool {
        let h = &mut head.headers;
        let grpc = h.get_id(HeaderId::ContentType).is_some_and(|t| t.starts_with(b"application/grpc"));
        if !grpc {
            self.foreign = true;
            h.set_id(HeaderId::GrpcStatus, grpc_of_http(head.status).to_string().as_bytes());
            h.set_id(HeaderId::GrpcMessage, format!("HTTP status {}", head.status).as_bytes());
            head.status = 200;
        }
        let kind: &[u8] =
            if self.text { b"application/grpc-web-text+proto" } else { b"application/grpc-web+proto" };
        h.set_id(HeaderId::ContentType, kind);
        h.remove_id(HeaderId::ContentLength);
        if !end {
            head.body = BodyKind::Stream;
        }
        true
    }

    fn data(&mut self, data: Bytes) -> Bytes {
        if self.foreign { Bytes::new() } else { self.piece(data) }
    }

    fn finish(&mut self, trailers: Option<&Headers>) -> (Bytes, Option<Headers>) {
        let Some(t) = trailers.filter(|_| !self.foreign) else { return (Bytes::new(), None) };
        let mut lines = Vec::new();
        for (_, n, v) in t.iter() {
            lines.extend_from_slice(&n.to_ascii_lowercase());
            lines.extend_from_slice(b": ");
            lines.extend_from_slice(v);
            lines.extend_from_slice(b"\r\n");
        }
        let mut frame = vec![TRAILERS];
        frame.extend_from_slice(&u32::try_from(lines.len()).unwrap_or(u32::MAX).to_be_bytes());
        frame.append(&mut lines);
        (self.piece(frame.into()), None)
    }
}

/// Text in any pieces is what it is as a whole, and what is written is read.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(data: &[u8]) {
    let read = |text: &[u8], step: usize| {
        let (mut from, mut out) = (FromText(BytesMut::new()), Vec::new());
        for piece in text.chunks(step.max(1)) {
            out.extend_from_slice(&from.data(Bytes::copy_from_slice(piece)).ok()?);
            assert!(from.0.len() < 4);
        }
        from.finish().ok().map(|()| out)
    };
    let step = usize::from(data.first().copied().unwrap_or_default() & 15);
    assert_eq!(read(data, step), read(data, data.len()));
    let web = Web { text: true, foreign: false };
    let mut text = Vec::new();
    for piece in data.chunks(step.max(1)) {
        text.extend_from_slice(&web.piece(Bytes::copy_from_slice(piece)));
    }
    assert_eq!(read(&text, 7).as_deref(), Some(data));
    let mut trailers = Headers::default();
    trailers.push(b"grpc-message", data);
    let (frame, _) = Web { text: false, foreign: false }.finish(Some(&trailers));
    assert_eq!(frame[1..5], u32::try_from(frame.len() - 5).unwrap().to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_in_any_pieces() {
        // Two padded pieces in a row, as clients send a message in two.
        let text = format!("{}{}", STANDARD.encode(b"hello"), STANDARD.encode(b" world!"));
        for step in 1..9 {
            let mut d = FromText(BytesMut::new());
            let mut out = Vec::new();
            for piece in text.as_bytes().chunks(step) {
                out.extend_from_slice(&d.data(Bytes::copy_from_slice(piece)).unwrap());
            }
            d.finish().unwrap();
            assert_eq!(out, b"hello world!", "{step}");
        }
        assert!(FromText(BytesMut::new()).data(Bytes::from_static(b"!!!!")).is_err());
        let mut d = FromText(BytesMut::new());
        d.data(Bytes::from_static(b"aGk")).unwrap();
        assert!(d.finish().is_err());
    }
}

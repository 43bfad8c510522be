//! HTTP/1 for the fuzzer. Requests are read, forwarded and read again: by us and by hyper, which must see the same ones.

use bytes::BytesMut;
use http::Method;

use super::{
    body::{Decoded, Decoder, Encoder},
    client::write_head,
    oracle::{self, Understood},
    parse,
};
use crate::http::{
    headers::{HeaderId, Headers},
    message::{BodyKind, Frame, MAX_FIELDS, MAX_HEAD, RequestHead, StreamError},
};

/// Most fields that forwarding adds: host, length or coding, and three of a WebSocket that was HTTP/2's or 3's.
const ADDED: usize = 5;

/// What is left when all but the fields of one connection is compared.
type Fields = Vec<(Vec<u8>, Vec<u8>)>;

/// Requests of one connection.
pub(crate) fn requests(raw: &[u8]) {
    heads_in_pieces(raw);
    let _ = chunks(raw, 1, Decoder::ChunkSize);
    let ours = oracle::ours(raw);
    if ours.is_empty() {
        return;
    }
    let mut forwarded = Vec::new();
    let mut plain = true;
    for (head, u) in &ours {
        assert!(head.headers.iter().count() <= MAX_FIELDS);
        plain &= head.headers.len() + ADDED <= MAX_FIELDS;
        plain &= !head.opens_tunnel() && has_a_uri(head) && !head.authority.is_empty();
        forwarded.extend(forward(head, &u.body));
    }
    let ours: Vec<Understood> = ours.into_iter().map(|(_, u)| u).collect();
    if plain {
        let theirs = oracle::hypers(raw.to_vec());
        assert!(
            theirs.len() >= ours.len() && theirs[..ours.len()] == ours[..],
            "{ours:?}, but hyper: {theirs:?}"
        );
        let beyond = oracle::hypers(forwarded);
        assert_eq!(beyond, ours, "what is forwarded is not what came");
    }
}

/// hyper refuses characters that RFC 3986 excludes and clients send all the same, such as `>`. To be stricter is not to
/// understand something else.
fn has_a_uri(head: &RequestHead) -> bool {
    head.path.parse::<http::uri::PathAndQuery>().is_ok()
        && head.authority.parse::<http::uri::Authority>().is_ok()
}

/// A head is found at the same place however its bytes come.
fn heads_in_pieces(raw: &[u8]) {
    let whole = parse::find_end(raw, &mut 0);
    let mut scanned = 0;
    let step = 1 + raw.len() / 50;
    let mut last = Ok(None);
    for n in (0..raw.len()).step_by(step).chain([raw.len()]) {
        last = parse::find_end(&raw[..n], &mut scanned);
        if !matches!(last, Ok(None)) {
            break;
        }
    }
    assert_eq!(last, whole);
    if let Ok(Some(end)) = whole {
        assert!(end <= MAX_HEAD && raw[..end].ends_with(b"\r\n"));
    }
}

/// The request as a server behind us gets it; our own parser must read it as the same. Of upgrades only WebSockets get
/// so far, and what follows is no body then.
pub(crate) fn forward(head: &RequestHead, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    if head.authority.is_empty() || head.upgrade.as_deref().is_some_and(|u| u != "websocket") {
        return out;
    }
    let mut head = head.clone();
    if head.opens_tunnel() {
        head.body = BodyKind::Stream;
        head.headers.remove_id(HeaderId::ContentLength);
    }
    let head = &head;
    let mut encoder = write_head(head, &mut out);
    let end = parse::find_end(&out, &mut 0).expect("a head of whole lines").expect("a whole head");
    assert_eq!(end, out.len(), "the head has an end within");
    let again = match parse::request(&out, head.https) {
        Ok(p) => p,
        // What is added is more, which one that had as many as may be has no room for: a second proxy says so.
        Err(parse::HeadError::TooManyFields) if head.headers.len() + ADDED > MAX_FIELDS => return Vec::new(),
        Err(e) => panic!("we would refuse what we forward ({e}): {:?}", String::from_utf8_lossy(&out)),
    };
    let upgrade = head.upgrade.is_some();
    if head.method != again.head.method {
        assert!(upgrade && head.method == Method::CONNECT && again.head.method == Method::GET);
    }
    assert_eq!((&again.head.authority, &again.head.path), (&head.authority, &head.path));
    assert_eq!(fields(&again.head.headers, upgrade), fields(&head.headers, upgrade));
    assert_eq!(again.head.upgrade.is_some(), upgrade);
    let framed = match encoder {
        Encoder::Raw | Encoder::Empty => again.head.body == BodyKind::Empty,
        Encoder::Length(0) => again.head.body == BodyKind::Empty,
        Encoder::Length(n) => again.head.body == BodyKind::Length(n),
        Encoder::Chunked => again.head.body == BodyKind::Stream,
    };
    assert!(framed, "{encoder:?} is read as {:?}", again.head.body);
    let complete = !matches!(encoder, Encoder::Length(n) if n != body.len() as u64);
    if complete && encoder.data(body, &mut out).is_ok() {
        encoder.finish(None, &mut out).expect("the whole body was there");
    }
    out
}

fn fields(headers: &Headers, upgrade: bool) -> Fields {
    // TE is brought into its one form by whoever reads it.
    let mine = |id: HeaderId| {
        matches!(id, HeaderId::ContentLength | HeaderId::Te) || (upgrade && id == HeaderId::SecWebSocketKey)
    };
    let all = headers.iter().filter(|(id, ..)| !id.is_hop_by_hop() && !mine(*id));
    all.map(|(_, n, v)| (n.to_vec(), v.trim_ascii().to_vec())).collect()
}

type Body = (Vec<u8>, Option<Fields>, usize);

/// Data, trailers and how much is left of `raw`, if it comes in pieces of one size.
fn chunks(raw: &[u8], step: usize, mut decoder: Decoder) -> Result<Body, StreamError> {
    let (mut buf, mut out, mut trailers, mut fed) = (BytesMut::new(), Vec::new(), None, 0);
    loop {
        match decoder.decode(&mut buf)? {
            Decoded::Frame(Frame::Data(b)) => {
                assert!(!b.is_empty() && b.len() <= raw.len());
                out.extend_from_slice(&b);
            }
            Decoded::Frame(Frame::Trailers(t)) => {
                assert!(t.iter().all(|(id, ..)| !id.is_forbidden_trailer()));
                trailers = Some(fields(&t, false));
            }
            Decoded::End => return Ok((out, trailers, buf.len() + raw.len() - fed)),
            Decoded::More if fed == raw.len() => {
                decoder.eof()?;
                return Ok((out, trailers, 0));
            }
            Decoded::More => {
                let n = step.min(raw.len() - fed);
                buf.extend_from_slice(&raw[fed..fed + n]);
                fed += n;
            }
        }
    }
}

/// An answer to a method that the first byte names.
pub(crate) fn response(data: &[u8]) {
    let Some((which, raw)) = data.split_first() else { return };
    let method = [Method::GET, Method::HEAD, Method::CONNECT, Method::POST][usize::from(which % 4)].clone();
    heads_in_pieces(raw);
    let Ok(Some(end)) = parse::find_end(raw, &mut 0) else { return };
    let Ok(p) = parse::response(&raw[..end], &method) else { return };
    let (status, length) = (p.head.status, p.head.headers.count_id(HeaderId::ContentLength));
    assert!((100..=999).contains(&status) && length <= 1);
    assert!(
        p.head.headers.iter().all(|(id, ..)| !id.is_hop_by_hop() || (id, status) == (HeaderId::Upgrade, 101))
    );
    assert!(!(p.chunked && length == 1), "two framings");
    let tunnel = status == 101 || (method == Method::CONNECT && (200..300).contains(&status));
    let bodiless = method == Method::HEAD || status < 200 || matches!(status, 204 | 304);
    let decoder = match p.head.body {
        BodyKind::Empty => {
            assert!(
                bodiless
                    || p.head.headers.str_id(HeaderId::ContentLength).is_some_and(|n| n.parse() == Ok(0))
            );
            return;
        }
        BodyKind::Length(n) => {
            assert!(!tunnel && !bodiless && n > 0);
            Decoder::Length(n)
        }
        BodyKind::Stream if p.chunked && !tunnel => Decoder::ChunkSize,
        BodyKind::Stream => {
            assert!(tunnel || !p.keep_alive, "a body without an end on a connection that goes on");
            Decoder::Raw
        }
    };
    let body = &raw[end..];
    let whole = chunks(body, body.len().max(1), decoder);
    assert_eq!(chunks(body, 1 + usize::from(which >> 2), decoder).ok(), whole.as_ref().ok().cloned());
    // What was read is read again as we would write it.
    if let (Ok((data, ..)), Decoder::ChunkSize) = (whole, decoder) {
        let (mut out, mut e) = (Vec::new(), Encoder::Chunked);
        e.data(&data, &mut out).unwrap();
        e.finish(None, &mut out).unwrap();
        assert_eq!(chunks(&out, 3, Decoder::ChunkSize).ok(), Some((data, None, 0)));
    }
}

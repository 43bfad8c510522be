//! Field sections to heads and trailers, and back.

use bytes::Bytes;
use http::Method;

use super::{
    frame::{self, put_header},
    qpack::{self, Refused},
};
use crate::http::{
    headers::{HeaderId, Headers},
    message::{MAX_FIELDS, MAX_HEAD, MAX_TRAILERS, RequestHead, ResponseHead, Version},
    mux,
};

/// Pseudo-fields of a request (RFC 9114 section 4.3.1), each at most once and before all others: of two paths one
/// proxy would take the first and the next the last.
#[derive(Default)]
struct Request {
    method: Option<Method>,
    scheme: Option<String>,
    authority: Option<String>,
    path: Option<String>,
    protocol: Option<String>,
    host: Option<String>,
    headers: Headers,
    fields: usize,
}

/// Reads the head of a request; the status of a refusal stands in [`Refused::Field`].
pub(super) fn request(section: &[u8], https: bool, ended: bool) -> Result<RequestHead, Refused<u16>> {
    let headers = Headers::with_capacity(section.len() * 2 + 512, 32);
    let mut r = Request { headers, ..Request::default() };
    qpack::decode(section, MAX_HEAD, &mut |name, value| r.field(name, value))?;
    r.finish(https, ended).map_err(Refused::Field)
}

impl Request {
    fn field(&mut self, name: &[u8], value: &[u8]) -> Result<(), u16> {
        let Some(pseudo) = name.strip_prefix(b":") else {
            self.fields += 1;
            if self.fields > MAX_FIELDS {
                return Err(431);
            }
            check(name, value)?;
            if HeaderId::of(name) == HeaderId::Host {
                return once(&mut self.host, text(value)?);
            }
            return mux::push(&mut self.headers, name, value);
        };
        if self.fields > 0 {
            return Err(400);
        }
        match pseudo {
            b"method" => once(&mut self.method, Method::from_bytes(value).map_err(|_| 400u16)?),
            b"scheme" => once(&mut self.scheme, text(value)?),
            b"authority" => once(&mut self.authority, text(value)?),
            b"path" => once(&mut self.path, text(value)?),
            b"protocol" => once(&mut self.protocol, text(value)?.to_ascii_lowercase()),
            _ => Err(400),
        }
    }

    fn finish(self, https: bool, ended: bool) -> Result<RequestHead, u16> {
        let method = self.method.ok_or(400u16)?;
        let connect = method == Method::CONNECT;
        // A tunnel names no resource (section 4.4); everything else does.
        if (connect && self.protocol.is_none()) != (self.scheme.is_none() && self.path.is_none())
            || self.scheme.is_some() != self.path.is_some()
            || (self.protocol.is_some() && !connect)
            || self.path.as_deref() == Some("")
        {
            return Err(400);
        }
        if self.scheme.as_deref().is_some_and(|s| !matches!(s, "http" | "https")) {
            return Err(400);
        }
        let target = mux::Target {
            method,
            authority: self.authority.as_deref(),
            host: self.host.as_deref(),
            path: self.path.as_deref().unwrap_or_default(),
            protocol: self.protocol,
        };
        mux::head(Version::Http3, https, target, self.headers, ended)
    }
}

fn once<T>(slot: &mut Option<T>, value: T) -> Result<(), u16> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(400),
    }
}

fn text(value: &[u8]) -> Result<String, u16> {
    std::str::from_utf8(value).map(str::to_owned).map_err(|_| 400)
}

/// A field as RFC 9110 section 5 has it, with a name in lower case (RFC 9114 section 4.2).
fn check(name: &[u8], value: &[u8]) -> Result<(), u16> {
    let token = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"!#$%&'*+-.^_`|~".contains(b);
    let plain = |b: &u8| *b == b'\t' || (*b >= b' ' && *b != 0x7f);
    let blank = |b: Option<&u8>| b.is_some_and(|b| matches!(b, b' ' | b'\t'));
    let ok = !name.is_empty()
        && name.iter().all(token)
        && value.iter().all(plain)
        && !blank(value.first())
        && !blank(value.last());
    if ok { Ok(()) } else { Err(400) }
}

/// Reads trailers.
pub(super) fn trailers(section: &[u8]) -> Result<Headers, Refused<u16>> {
    let mut t = Headers::default();
    let mut fields = 0;
    qpack::decode(section, MAX_TRAILERS, &mut |name, value| {
        fields += 1;
        check(name, value)?;
        if fields > MAX_FIELDS {
            return Err(431);
        }
        t.push(name, value);
        Ok(())
    })?;
    t.retain(|id, _, _| !id.is_forbidden_trailer());
    Ok(t)
}

/// The frame of a response's head. What HTTP/3 cannot carry is left out.
pub(super) fn response(head: &ResponseHead) -> [Bytes; 2] {
    // An accepted upgrade is 200 (RFC 9220 section 3).
    let upgraded = head.status == 101;
    section(|out| {
        qpack::encode_status(out, if upgraded { 200 } else { head.status });
        fields(out, &head.headers, upgraded);
    })
}

/// The frame of trailers.
pub(super) fn end(trailers: &Headers) -> [Bytes; 2] {
    section(|out| fields(out, trailers, false))
}

fn fields(out: &mut Vec<u8>, headers: &Headers, upgraded: bool) {
    for (id, name, value) in headers.iter() {
        if !(id.is_hop_by_hop() || (upgraded && id == HeaderId::SecWebSocketAccept)) {
            qpack::encode(out, name, value);
        }
    }
}

fn section(write: impl FnOnce(&mut Vec<u8>)) -> [Bytes; 2] {
    let mut out = Vec::with_capacity(512);
    qpack::begin(&mut out);
    write(&mut out);
    let mut head = Vec::with_capacity(8);
    put_header(&mut head, frame::HEADERS, out.len());
    [head.into(), out.into()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::message::BodyKind;

    fn encoded(fields: &[(&str, &str)]) -> Vec<u8> {
        let mut out = vec![];
        qpack::begin(&mut out);
        for (n, v) in fields {
            // As it is: the encoder writes lower case.
            if n.bytes().any(|b| b.is_ascii_uppercase()) {
                out.push(0x20 | n.len() as u8);
                out.extend_from_slice(n.as_bytes());
                out.push(v.len() as u8);
                out.extend_from_slice(v.as_bytes());
            } else {
                qpack::encode(&mut out, n.as_bytes(), v.as_bytes());
            }
        }
        out
    }

    const GET: [(&str, &str); 4] =
        [(":method", "GET"), (":scheme", "https"), (":authority", "a.test"), (":path", "/p?q")];

    #[test]
    fn requests() {
        let all = [&GET[..], &[("cookie", "a=1"), ("x", "1"), ("cookie", "b=2"), ("te", "gzip")]].concat();
        let head = request(&encoded(&all), true, true).unwrap();
        assert_eq!(
            (head.authority.as_str(), head.path.as_str(), head.body),
            ("a.test", "/p?q", BodyKind::Empty)
        );
        assert_eq!(head.headers.str_id(HeaderId::Cookie), Some("a=1; b=2"));
        assert!(!head.headers.has(HeaderId::Te) && head.https && head.version == Version::Http3);
        let host = [GET[0], GET[1], GET[3], ("host", "h.test"), ("content-length", "3")];
        let head = request(&encoded(&host), true, false).unwrap();
        assert_eq!((head.authority.as_str(), head.body), ("h.test", BodyKind::Length(3)));
        let socket = [(":method", "CONNECT"), (":protocol", "WebSocket"), GET[1], GET[2], GET[3]];
        assert_eq!(request(&encoded(&socket), true, false).unwrap().upgrade.as_deref(), Some("websocket"));
        let tunnel = [(":method", "CONNECT"), (":authority", "a.test:443")];
        assert_eq!(request(&encoded(&tunnel), true, false).unwrap().path, "");
    }

    #[test]
    fn requests_that_two_could_read_differently() {
        let bad = |fields: &[(&str, &str)]| {
            assert_eq!(request(&encoded(fields), true, true).err(), Some(Refused::Field(400)), "{fields:?}");
        };
        let with = |extra: &[(&'static str, &'static str)]| bad(&[&GET[..], extra].concat());
        for i in [0, 1, 3] {
            let mut left = GET.to_vec();
            left.remove(i);
            bad(&left);
        }
        bad(&[GET[0], GET[1], GET[3]]);
        bad(&[(":method", "CONNECT"), (":authority", "a.test")]);
        for twice in GET {
            with(&[twice]);
        }
        with(&[(":status", "200")]);
        with(&[(":unknown", "1")]);
        with(&[(":protocol", "websocket")]);
        with(&[("X-Up", "1")]);
        with(&[("connection", "close")]);
        with(&[("transfer-encoding", "chunked")]);
        with(&[("upgrade", "websocket")]);
        with(&[("host", "b.test")]);
        with(&[("host", "a.test"), ("host", "a.test")]);
        with(&[("x", "a\r\nb: c")]);
        with(&[("x", "\0")]);
        with(&[("x", " a")]);
        with(&[("x y", "a")]);
        with(&[("", "a")]);
        with(&[("content-length", "1")]);
        with(&[("content-length", "+0")]);
        with(&[("content-length", "0"), ("content-length", "0")]);
        bad(&[GET[0], GET[1], GET[2], ("x", "1"), GET[3]]);
        bad(&[GET[0], ("x", "1"), GET[1], GET[2], GET[3]]);
        bad(&[GET[0], GET[1], (":authority", "user@a.test"), GET[3]]);
        bad(&[GET[0], GET[1], GET[2], (":path", "")]);
        bad(&[GET[0], GET[1], GET[2], (":path", "p")]);
        bad(&[GET[0], GET[1], GET[2], (":path", "/a#b")]);
        bad(&[GET[0], GET[1], GET[2], (":path", "*")]);
        bad(&[GET[0], (":scheme", "ftp"), GET[2], GET[3]]);
        bad(&[(":method", "G T"), GET[1], GET[2], GET[3]]);
        bad(&[(":method", "CONNECT"), GET[1], GET[2], GET[3]]);
        bad(&[(":method", "CONNECT"), (":protocol", "websocket"), GET[2]]);
        let many: Vec<_> = GET.into_iter().chain(std::iter::repeat_n(("x", "1"), MAX_FIELDS + 1)).collect();
        assert_eq!(request(&encoded(&many), true, true).err(), Some(Refused::Field(431)));
        let long = "x".repeat(MAX_HEAD);
        let large = [&GET[..], &[("x", long.as_str())]].concat();
        assert_eq!(request(&encoded(&large), true, true).err(), Some(Refused::TooLarge));
    }

    #[test]
    fn answers_and_trailers() {
        let mut headers = Headers::default();
        headers.push(b"X-Case", b"1");
        headers.push(b"connection", b"close");
        headers.push(b"sec-websocket-accept", b"z");
        let read = |[_, section]: [Bytes; 2]| {
            let mut out = vec![];
            qpack::decode::<()>(&section, 4096, &mut |n, v| {
                out.push(format!("{}={}", String::from_utf8_lossy(n), String::from_utf8_lossy(v)));
                Ok(())
            })
            .unwrap();
            out
        };
        let head = |status| ResponseHead { status, headers: headers.clone(), body: BodyKind::Stream };
        assert_eq!(read(response(&head(101))), [":status=200", "x-case=1"]);
        assert_eq!(read(response(&head(404))), [":status=404", "x-case=1", "sec-websocket-accept=z"]);
        assert_eq!(read(end(&headers)), ["x-case=1", "sec-websocket-accept=z"]);
        let t = trailers(&encoded(&[("x-sum", "1"), ("content-length", "3")])).unwrap();
        assert_eq!((t.get(b"x-sum"), t.len()), (Some(&b"1"[..]), 1));
        assert_eq!(trailers(&encoded(&[(":path", "/")])).err(), Some(Refused::Field(400)));
    }
}

//! Message heads.
//!
//! Smuggling lives in the gap between two parsers, so whatever RFC 9112 lets a recipient repair is an
//! error here: bare LF, several or malformed `Content-Length`, `Content-Length` beside
//! `Transfer-Encoding`, any coding other than a single `chunked`, folded lines, white space before the
//! colon, a missing, repeated or malformed `Host`. A proxy that refuses needs no agreement.

use std::io::BufRead;

use http::Method;

use crate::http::{
    headers::{HeaderId, Headers, list_has},
    message::{BodyKind, MAX_FIELDS, MAX_HEAD, RequestHead, ResponseHead, Version},
};

/// A head that cannot be accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HeadError {
    #[error("bare LF or CR in the message head")]
    BareLineEnd,
    #[error("malformed start line or header field")]
    Malformed,
    #[error("message head too large")]
    TooLarge,
    #[error("too many header fields")]
    TooManyFields,
    #[error("invalid request target")]
    Target,
    #[error("missing, repeated or invalid Host")]
    Host,
    #[error("ambiguous or invalid Content-Length")]
    ContentLength,
    #[error("unsupported or ambiguous Transfer-Encoding")]
    TransferEncoding,
    #[error("unsupported expectation")]
    Expectation,
    #[error("unsupported HTTP version")]
    Version,
    #[error("no HTTP/1 request line")]
    NotHttp,
}

impl HeadError {
    /// Status of the answer to a request with this error.
    pub(crate) fn status(self) -> u16 {
        match self {
            Self::TooLarge | Self::TooManyFields => 431,
            Self::Expectation => 417,
            Self::Version => 505,
            _ => 400,
        }
    }
}

/// Finds the end of a head, continuing at `scanned` (a line start). `Ok(None)`: more bytes are needed.
pub(crate) fn find_end(buf: &[u8], scanned: &mut usize) -> Result<Option<usize>, HeadError> {
    loop {
        let mut rest = &buf[*scanned..];
        // `skip_until` on a slice is a vectorised search and cannot fail.
        let n = rest.skip_until(b'\n').unwrap_or(0);
        let line = &buf[*scanned..*scanned + n];
        if line.last() != Some(&b'\n') {
            return if buf.len() > MAX_HEAD { Err(HeadError::TooLarge) } else { Ok(None) };
        }
        if n < 2 || line[n - 2] != b'\r' {
            return Err(HeadError::BareLineEnd);
        }
        *scanned += n;
        if *scanned > MAX_HEAD {
            return Err(HeadError::TooLarge);
        }
        if n == 2 {
            return Ok(Some(*scanned));
        }
    }
}

fn map_httparse(e: httparse::Error) -> HeadError {
    match e {
        httparse::Error::TooManyHeaders => HeadError::TooManyFields,
        _ => HeadError::Malformed,
    }
}

/// What is wrong with the version of a request line: one that we do not speak, or none at all.
fn version_error(buf: &[u8]) -> HeadError {
    let line = buf.split(|b| *b == b'\r').next().unwrap_or_default();
    let mut words = line.split(|b| *b == b' ');
    match (words.next(), words.next(), words.next(), words.next()) {
        (_, _, Some([b'H', b'T', b'T', b'P', b'/', major, b'.', minor]), None)
            if major.is_ascii_digit() && minor.is_ascii_digit() =>
        {
            HeadError::Version
        }
        _ if line.windows(5).any(|w| w == b"HTTP/") => HeadError::Malformed,
        _ => HeadError::NotHttp,
    }
}

/// A parsed request and what it says about its connection.
#[derive(Debug)]
pub(crate) struct ParsedRequest {
    pub(crate) head: RequestHead,
    pub(crate) keep_alive: bool,
}

/// Parses a complete head (as delimited by [`find_end`]).
pub(crate) fn request(buf: &[u8], https: bool) -> Result<ParsedRequest, HeadError> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut parsed = httparse::Request::new(&mut fields);
    match parsed.parse(buf) {
        Ok(httparse::Status::Complete(n)) if n == buf.len() => {}
        Err(httparse::Error::Version) => return Err(version_error(buf)),
        Err(e) => return Err(map_httparse(e)),
        Ok(_) => return Err(HeadError::Malformed),
    }
    let version = if parsed.version == Some(1) { Version::Http11 } else { Version::Http10 };
    let method =
        parsed.method.and_then(|m| Method::from_bytes(m.as_bytes()).ok()).ok_or(HeadError::Malformed)?;
    let target = parsed.path.ok_or(HeadError::Malformed)?;

    let mut headers = Headers::with_capacity(buf.len() + 512, parsed.headers.len() + 12);
    let mut host: Option<&[u8]> = None;
    let mut length: Option<u64> = None;
    let mut chunked = false;
    let mut keep_alive = version == Version::Http11;
    let mut close = false;
    let mut upgrade_listed = false;
    let mut nominated: Vec<Vec<u8>> = Vec::new();
    let mut expect_continue = false;
    for f in parsed.headers.iter() {
        let name = f.name.as_bytes();
        let id = HeaderId::of(name);
        match id {
            HeaderId::Host => {
                if host.replace(f.value).is_some() {
                    return Err(HeadError::Host);
                }
                continue;
            }
            HeaderId::ContentLength => {
                set_length(&mut length, f.value)?;
            }
            HeaderId::TransferEncoding => {
                if chunked || version == Version::Http10 || !f.value.eq_ignore_ascii_case(b"chunked") {
                    return Err(HeadError::TransferEncoding);
                }
                chunked = true;
            }
            HeaderId::Connection => {
                connection_options(f.value, &mut keep_alive, &mut close, &mut upgrade_listed, &mut nominated);
            }
            HeaderId::Expect => {
                if !f.value.eq_ignore_ascii_case(b"100-continue") {
                    return Err(HeadError::Expectation);
                }
                expect_continue = version == Version::Http11;
                continue;
            }
            _ => {}
        }
        headers.push(name, f.value);
    }
    if chunked && length.is_some() {
        return Err(HeadError::TransferEncoding);
    }
    let body = match (chunked, length) {
        (true, _) => BodyKind::Stream,
        (_, Some(0) | None) => BodyKind::Empty,
        (_, Some(n)) => BodyKind::Length(n),
    };
    let host = match host {
        Some(h) => Some(std::str::from_utf8(h).ok().filter(|h| is_authority(h)).ok_or(HeadError::Host)?),
        None if version == Version::Http11 => return Err(HeadError::Host),
        None => None,
    };
    let (authority, path) = split_target(&method, target, host)?;
    let upgrade = headers
        .get_id(HeaderId::Upgrade)
        // A handshake is a GET without a body (RFC 6455 section 4.1): what stands behind anything else is a body
        // to one reader and the new protocol to the next. Such a request is served without the upgrade.
        .filter(|_| upgrade_listed && version == Version::Http11)
        .filter(|_| method == Method::GET && body == BodyKind::Empty)
        .and_then(|v| std::str::from_utf8(v).ok())
        .map(str::to_ascii_lowercase);
    strip_connection(&mut headers, &nominated);
    if length.is_none() || matches!(body, BodyKind::Stream) {
        headers.remove_id(HeaderId::ContentLength);
    }
    let expect_continue = expect_continue && body != BodyKind::Empty;
    let head =
        RequestHead { method, version, https, authority, path, headers, body, upgrade, expect_continue };
    Ok(ParsedRequest { head, keep_alive: keep_alive && !close })
}

/// A parsed response and what it says about its connection.
#[derive(Debug)]
pub(crate) struct ParsedResponse {
    pub(crate) head: ResponseHead,
    pub(crate) keep_alive: bool,
    /// A `Stream` body is in chunks; else it runs until the connection ends.
    pub(crate) chunked: bool,
}

/// Parses a complete response head to a request with `method`.
pub(crate) fn response(buf: &[u8], method: &Method) -> Result<ParsedResponse, HeadError> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut parsed = httparse::Response::new(&mut fields);
    match parsed.parse(buf).map_err(map_httparse)? {
        httparse::Status::Complete(n) if n == buf.len() => {}
        _ => return Err(HeadError::Malformed),
    }
    let status = parsed.code.filter(|c| (100..=999).contains(c)).ok_or(HeadError::Malformed)?;
    let http11 = parsed.version == Some(1);
    let mut keep_alive = http11;
    let mut close = false;
    let mut headers = Headers::with_capacity(buf.len() + 256, parsed.headers.len() + 8);
    let mut length: Option<u64> = None;
    let mut chunked = false;
    let mut upgrade_listed = false;
    let mut nominated = Vec::new();
    for f in parsed.headers.iter() {
        let name = f.name.as_bytes();
        match HeaderId::of(name) {
            HeaderId::ContentLength => {
                set_length(&mut length, f.value)?;
            }
            HeaderId::TransferEncoding => {
                if chunked || !http11 || !f.value.eq_ignore_ascii_case(b"chunked") {
                    return Err(HeadError::TransferEncoding);
                }
                chunked = true;
            }
            HeaderId::Connection => {
                connection_options(f.value, &mut keep_alive, &mut close, &mut upgrade_listed, &mut nominated);
            }
            _ => {}
        }
        headers.push(name, f.value);
    }
    if chunked && length.is_some() {
        return Err(HeadError::TransferEncoding);
    }
    let upgrade = headers.get_id(HeaderId::Upgrade).map(<[u8]>::to_vec);
    strip_connection(&mut headers, &nominated);
    let tunnel = status == 101 || (*method == Method::CONNECT && (200..300).contains(&status));
    if tunnel || status < 200 || status == 204 {
        // No framing belongs there (RFC 9110 sections 8.6 and 9.3.6, RFC 9112 section 6.1), and a client that
        // believed it would wait for bytes or take the next answer for them.
        headers.remove_id(HeaderId::ContentLength);
        chunked = false;
    }
    let body = if tunnel {
        if let Some(u) = upgrade.filter(|_| status == 101) {
            headers.push_id(HeaderId::Upgrade, &u);
        }
        BodyKind::Stream
    } else if *method == Method::HEAD || status < 200 || status == 204 || status == 304 {
        BodyKind::Empty
    } else if chunked {
        BodyKind::Stream
    } else {
        match length {
            Some(0) => BodyKind::Empty,
            Some(n) => BodyKind::Length(n),
            None => {
                keep_alive = false;
                BodyKind::Stream
            }
        }
    };
    Ok(ParsedResponse {
        head: ResponseHead { status, headers, body },
        keep_alive: keep_alive && !close,
        chunked,
    })
}

/// A length: digits alone.
pub(crate) fn content_length(value: &[u8]) -> Result<u64, HeadError> {
    if value.is_empty() || value.len() > 19 || !value.iter().all(u8::is_ascii_digit) {
        return Err(HeadError::ContentLength);
    }
    Ok(value.iter().fold(0, |n, d| n * 10 + u64::from(d - b'0')))
}

/// Notes the only `Content-Length` of a message; a second one is an error even if it says the same.
fn set_length(length: &mut Option<u64>, value: &[u8]) -> Result<(), HeadError> {
    match length.replace(content_length(value)?) {
        None => Ok(()),
        Some(_) => Err(HeadError::ContentLength),
    }
}

/// `close` holds whatever another field says (RFC 9112 section 9.3).
fn connection_options(
    value: &[u8],
    keep_alive: &mut bool,
    close: &mut bool,
    upgrade: &mut bool,
    nominated: &mut Vec<Vec<u8>>,
) {
    if list_has(value, "close") {
        *close = true;
    } else if list_has(value, "keep-alive") {
        *keep_alive = true;
    }
    for token in value.split(|b| *b == b',').map(<[u8]>::trim_ascii) {
        match token.to_ascii_lowercase().as_slice() {
            b"" | b"close" | b"keep-alive" => {}
            b"upgrade" => *upgrade = true,
            t => nominated.push(t.to_vec()),
        }
    }
}

/// Removes hop-by-hop fields and those that `Connection` nominates, except fields that carry identity or
/// framing: a client must not be able to make the proxy drop them.
fn strip_connection(headers: &mut Headers, nominated: &[Vec<u8>]) {
    headers.retain(|id, _, value| match id {
        HeaderId::Te => list_has(value, "trailers"),
        id => !id.is_hop_by_hop(),
    });
    if headers.get_id(HeaderId::Te).is_some() {
        headers.set_id(HeaderId::Te, b"trailers");
    }
    for name in nominated {
        let protected = name.starts_with(b"x-forwarded-")
            || name.starts_with(b"x-envoy-")
            || name.starts_with(b"x-b3-")
            || matches!(
                HeaderId::of(name),
                HeaderId::Host
                    | HeaderId::ContentLength
                    | HeaderId::ContentType
                    | HeaderId::Authorization
                    | HeaderId::Cookie
                    | HeaderId::SetCookie
                    | HeaderId::XRequestId
                    | HeaderId::Traceparent
                    | HeaderId::Tracestate
                    | HeaderId::Te
            );
        if !protected {
            headers.remove(name);
        }
    }
}

/// `host[:port]` with nothing that a URI would read as another part.
pub(crate) fn is_authority(s: &str) -> bool {
    let ok = |b: u8| {
        b.is_ascii_alphanumeric()
            || matches!(
                b,
                b'.' | b'-'
                    | b'_'
                    | b'~'
                    | b':'
                    | b'['
                    | b']'
                    | b'%'
                    | b'*'
                    | b'!'
                    | b'$'
                    | b'&'
                    | b'\''
                    | b'('
                    | b')'
                    | b'+'
                    | b';'
                    | b'='
            )
    };
    if s.is_empty() || s.len() > 512 || !s.bytes().all(ok) {
        return false;
    }
    let after_host = match s.strip_prefix('[') {
        Some(v6) => match v6.split_once(']') {
            Some((addr, rest)) if addr.parse::<std::net::Ipv6Addr>().is_ok() => rest,
            _ => return false,
        },
        // Brackets belong to IPv6 addresses.
        None if s.contains(['[', ']']) => return false,
        None => match s.find(':') {
            Some(at) => &s[at..],
            None => "",
        },
    };
    match after_host.strip_prefix(':') {
        // `parse` would take a sign.
        Some(port) => port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok(),
        None => after_host.is_empty(),
    }
}

/// Bytes that may stand in a path and query: visible ASCII without a fragment.
pub(crate) fn is_path(s: &str) -> bool {
    s.bytes().all(|b| (0x21..0x7f).contains(&b) && b != b'#')
}

fn split_target(method: &Method, target: &str, host: Option<&str>) -> Result<(String, String), HeadError> {
    if !is_path(target) {
        return Err(HeadError::Target);
    }
    let host_or_empty = || host.unwrap_or_default().to_owned();
    if *method == Method::CONNECT {
        if !is_authority(target) || !target.contains(':') {
            return Err(HeadError::Target);
        }
        return Ok((target.to_owned(), String::new()));
    }
    if target.starts_with('/') {
        return Ok((host_or_empty(), target.to_owned()));
    }
    if target == "*" && *method == Method::OPTIONS {
        return Ok((host_or_empty(), target.to_owned()));
    }
    // Absolute form: its authority replaces Host (RFC 9112 section 3.2.2).
    let (scheme, rest) = target.split_once("://").ok_or(HeadError::Target)?;
    if !scheme.eq_ignore_ascii_case("http") && !scheme.eq_ignore_ascii_case("https") {
        return Err(HeadError::Target);
    }
    let at = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(at);
    if !is_authority(authority) {
        return Err(HeadError::Target);
    }
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    Ok((authority.to_owned(), path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(raw: &[u8]) -> Result<ParsedRequest, HeadError> {
        let mut scanned = 0;
        match find_end(raw, &mut scanned)? {
            Some(end) => request(&raw[..end], false),
            None => panic!("incomplete test input {:?}", String::from_utf8_lossy(raw)),
        }
    }

    #[test]
    fn what_could_be_smuggled_is_refused() {
        let cases: &[(&str, &[u8], u16)] = &[
            ("CL and TE", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            ("TE and CL", b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n", 400),
            ("two CL", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\n", 400),
            ("two equal CL", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\n", 400),
            ("CL list", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4, 4\r\n\r\n", 400),
            ("CL sign", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +4\r\n\r\n", 400),
            ("CL hex", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x4\r\n\r\n", 400),
            ("CL empty", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: \r\n\r\n", 400),
            ("CL overflow", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n", 400),
            ("TE identity", b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\n", 400),
            ("TE list", b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 400),
            ("TE twice", b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            ("TE xchunked", b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n", 400),
            ("TE vertical tab", b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n", 400),
            ("TE in 1.0", b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            ("space before colon", b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n", 400),
            ("folded line", b"GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\n 2\r\n\r\n", 400),
            ("bare LF", b"GET / HTTP/1.1\r\nHost: a\nX: 1\r\n\r\n", 400),
            ("bare LF end", b"GET / HTTP/1.1\r\nHost: a\r\n\n", 400),
            ("bare CR", b"GET / HTTP/1.1\r\nHost: a\r\nX: 1\r2\r\n\r\n", 400),
            ("NUL", b"GET / HTTP/1.1\r\nHost: a\r\nX: 1\x002\r\n\r\n", 400),
            ("no host", b"GET / HTTP/1.1\r\n\r\n", 400),
            ("empty host", b"GET / HTTP/1.1\r\nHost: \r\n\r\n", 400),
            ("two hosts", b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
            ("host list", b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
            ("host user", b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", 400),
            ("host path", b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
            ("host bracket", b"GET / HTTP/1.1\r\nHost: a]\r\n\r\n", 400),
            ("host port", b"GET / HTTP/1.1\r\nHost: a:99999\r\n\r\n", 400),
            ("fragment", b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("target", b"GET a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("target scheme", b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("star", b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("high bytes", b"GET /\xc3\xa4 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("connect", b"CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("header name", b"GET / HTTP/1.1\r\nHost: a\r\nX Y: 1\r\n\r\n", 400),
            ("version", b"GET / HTTP/3.0\r\nHost: a\r\n\r\n", 505),
            ("expect", b"GET / HTTP/1.1\r\nHost: a\r\nExpect: tea\r\n\r\n", 417),
        ];
        for (what, raw, status) in cases {
            match parse(raw) {
                Ok(_) => panic!("{what} was accepted"),
                Err(e) => assert_eq!(e.status(), *status, "{what}"),
            }
        }
    }

    #[test]
    fn limits_answer_431() {
        let mut many = b"GET / HTTP/1.1\r\nHost: a\r\n".to_vec();
        for i in 0..MAX_FIELDS {
            many.extend_from_slice(format!("x-{i}: 1\r\n").as_bytes());
        }
        many.extend_from_slice(b"\r\n");
        assert_eq!(parse(&many).unwrap_err().status(), 431);
        let long = vec![b'a'; MAX_HEAD + 1];
        assert_eq!(find_end(&long, &mut 0).unwrap_err().status(), 431);
    }

    #[test]
    fn forms_of_the_target() {
        let get = |t: &str| {
            parse(format!("GET {t} HTTP/1.1\r\nHost: h:80\r\n\r\n").as_bytes())
                .map(|p| (p.head.authority, p.head.path))
        };
        assert_eq!(get("/a?b").unwrap(), ("h:80".into(), "/a?b".into()));
        assert_eq!(get("http://x.y/a?b").unwrap(), ("x.y".into(), "/a?b".into()));
        assert_eq!(get("HTTP://x.y:1").unwrap(), ("x.y:1".into(), "/".into()));
        assert_eq!(get("http://x.y?q").unwrap(), ("x.y".into(), "/?q".into()));
        let c = parse(b"CONNECT x.y:443 HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
        assert_eq!((c.head.authority.as_str(), c.head.path.as_str()), ("x.y:443", ""));
    }

    #[test]
    fn close_wins() {
        for fields in
            ["close\r\nConnection: keep-alive", "keep-alive\r\nConnection: close", "keep-alive, close"]
        {
            let raw = format!("GET / HTTP/1.1\r\nHost: a\r\nConnection: {fields}\r\n\r\n");
            assert!(!parse(raw.as_bytes()).unwrap().keep_alive, "{fields}");
        }
    }

    #[test]
    fn connection_options_do_not_drop_identity() {
        let p = parse(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close, X-Drop, x-forwarded-for, Authorization\r\nX-Drop: 1\r\nX-Forwarded-For: 1.1.1.1\r\nAuthorization: t\r\nKeep-Alive: 5\r\nTE: trailers, gzip\r\n\r\n").unwrap();
        assert!(!p.keep_alive);
        let h = p.head.headers;
        assert!(h.get(b"x-drop").is_none());
        assert!(h.get(b"keep-alive").is_none());
        assert!(h.has(HeaderId::XForwardedFor) && h.has(HeaderId::Authorization));
        assert_eq!(h.get_id(HeaderId::Te), Some(&b"trailers"[..]));
    }

    #[test]
    fn responses_know_their_framing() {
        let r = |raw: &[u8], m: Method| {
            let end = find_end(raw, &mut 0).unwrap().unwrap();
            response(&raw[..end], &m)
        };
        let p = r(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", Method::GET).unwrap();
        assert!(p.keep_alive && p.head.body == BodyKind::Length(5));
        let p = r(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", Method::HEAD).unwrap();
        assert!(
            p.keep_alive && p.head.body == BodyKind::Empty && p.head.headers.has(HeaderId::ContentLength)
        );
        let p = r(b"HTTP/1.1 200 OK\r\n\r\n", Method::GET).unwrap();
        assert!(!p.keep_alive && p.head.body == BodyKind::Stream && !p.chunked);
        let p = r(b"HTTP/1.0 304 x\r\n\r\n", Method::GET).unwrap();
        assert!(!p.keep_alive && p.head.body == BodyKind::Empty);
        assert!(
            r(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", Method::GET)
                .is_err()
        );
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_handled(raw in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400)) {
            let mut scanned = 0;
            if let Ok(Some(end)) = find_end(&raw, &mut scanned) {
                let _ = request(&raw[..end], true);
                let _ = response(&raw[..end], &Method::GET);
            }
        }
    }
}

//! Requests in HTTP/2 that are forwarded in HTTP/1, where what is a value here could become a line there.

use super::{Row, check, raw_h2::*, shown, to};
use crate::support::*;

enum Answer {
    Refused,
    /// The head may have been passed on before its body was refused.
    BodyRefused,
    /// Served; the server sees the first and not the second.
    Served(&'static str, &'static str, &'static str),
}
use Answer::{BodyRefused, Refused, Served};

type Fields = Vec<(Vec<u8>, Vec<u8>)>;

struct Case {
    section: &'static str,
    what: &'static str,
    fields: Fields,
    /// Data, and trailers.
    data: Option<&'static [u8]>,
    trailers: Option<Fields>,
    answer: Answer,
}

fn own(fields: &[(&str, &str)]) -> Fields {
    fields.iter().map(|(n, v)| (n.as_bytes().to_vec(), v.as_bytes().to_vec())).collect()
}

/// The usual four, some of them replaced (or, by an empty name, left out), then more fields.
fn head(replace: &[(&str, &str)], more: &[(&str, &str)]) -> Fields {
    let mut out = Vec::new();
    for (n, v) in [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a")] {
        match replace.iter().find(|(r, _)| *r == n) {
            Some((_, "-")) => {}
            Some((_, with)) => out.push((n, *with)),
            None => out.push((n, v)),
        }
    }
    out.extend(more);
    own(&out)
}

fn cases() -> Vec<Case> {
    let case =
        |section, what, fields, answer| Case { section, what, fields, data: None, trailers: None, answer };
    let more = |fields: &[(&str, &str)]| head(&[], fields);
    let with = |name: &str, value: &str| head(&[(name, value)], &[]);
    let post = [(":method", "POST")];
    // The server answers when it has the whole body.
    let echo = [(":method", "POST"), (":path", "/echo")];
    let mut v = vec![
        case("8.2.1", "upper case in a name", more(&[("X-A", "1")]), Refused),
        case("8.2.1", "CRLF in a name", more(&[("x: 1\r\nevil", "1")]), Refused),
        case("8.2.1", "space in a name", more(&[("x y", "1")]), Refused),
        case("8.2.1", "colon in a name", more(&[("x:y", "1")]), Refused),
        case("8.2.1", "empty name", more(&[("", "1")]), Refused),
        case("8.2.1", "CRLF in a value", more(&[("x", "1\r\nevil: 1")]), Refused),
        case("8.2.1", "LF in a value", more(&[("x", "1\nevil: 1")]), Refused),
        case("8.2.1", "CR in a value", more(&[("x", "1\revil")]), Refused),
        case("8.2.1", "NUL in a value", more(&[("x", "1\0evil")]), Refused),
        case("8.2.2", "connection", more(&[("connection", "close")]), Refused),
        case("8.2.2", "transfer-encoding", head(&post, &[("transfer-encoding", "chunked")]), Refused),
        case("8.2.2", "keep-alive", more(&[("keep-alive", "5")]), Refused),
        case("8.2.2", "proxy-connection", more(&[("proxy-connection", "close")]), Refused),
        case("8.2.2", "upgrade", more(&[("upgrade", "websocket")]), Refused),
        case("8.2.2", "te that is not trailers", more(&[("te", "gzip")]), Refused),
        case(
            "8.2.2",
            "te: trailers",
            more(&[("te", "trailers")]),
            Served("te: trailers", "evil", "as it is"),
        ),
        case(
            "8.2.3",
            "cookies in pieces",
            more(&[("cookie", "a=1"), ("cookie", "b=2")]),
            Served("cookie: a=1; b=2", "cookie: b", "as one"),
        ),
        case("8.3", "pseudo-field behind a field", [own(&[("x", "1")]), head(&[], &[])].concat(), Refused),
        case("8.3", "unknown pseudo-field", more(&[(":evil", "1")]), Refused),
        case("8.3", ":status", more(&[(":status", "200")]), Refused),
        case("8.3", ":path twice", [head(&[], &[]), own(&[(":path", "/evil")])].concat(), Refused),
        case("8.3", ":authority twice", [head(&[], &[]), own(&[(":authority", "evil")])].concat(), Refused),
        case("8.3.1", "no :method", with(":method", "-"), Refused),
        case("8.3.1", "no :scheme", with(":scheme", "-"), Refused),
        case("8.3.1", "no :path", with(":path", "-"), Refused),
        case("8.3.1", "no :authority, no host", with(":authority", "-"), Refused),
        case("8.3.1", "empty :path", with(":path", ""), Refused),
        case("8.3.1", "relative :path", with(":path", "a"), Refused),
        case("8.3.1", "space in :path", with(":path", "/a HTTP/1.1"), Refused),
        case("8.3.1", "CRLF in :path", with(":path", "/ HTTP/1.1\r\nHost: evil\r\n\r\nGET /evil"), Refused),
        case(
            "8.3.1",
            "fragment in :path",
            with(":path", "/a#evil"),
            Served("GET /a ", "evil", "without the fragment"),
        ),
        case("8.3.1", "URI in :path", with(":path", "http://evil/"), Refused),
        case("8.3.1", "`*` without OPTIONS", with(":path", "*"), Refused),
        case("8.3.1", "space in :method", with(":method", "GET /evil"), Refused),
        case("8.3.1", "CRLF in :method", with(":method", "GET / HTTP/1.1\r\nevil: 1\r\n\r\nGET"), Refused),
        case("8.3.1", "CRLF in :scheme", with(":scheme", "http\r\nevil: 1"), Refused),
        case("8.3.1", "CRLF in :authority", with(":authority", "a\r\nevil: 1"), Refused),
        case("8.3.1", "user in :authority", with(":authority", "evil@a"), Refused),
        case("8.3.1", "path in :authority", with(":authority", "a/evil"), Refused),
        case("8.3.1", "empty :authority", with(":authority", ""), Refused),
        case("8.3.1", "host differs from :authority", more(&[("host", "evil")]), Refused),
        case("8.3.1", "host twice", more(&[("host", "a"), ("host", "a")]), Refused),
        case(
            "8.3.1",
            "host alone",
            head(&[(":authority", "-")], &[("host", "b")]),
            Served("host: b", "evil", "by its host"),
        ),
        case(
            "8.5",
            "CONNECT without :authority",
            head(&[(":method", "CONNECT"), (":scheme", "-"), (":path", "-"), (":authority", "-")], &[]),
            Refused,
        ),
        case("RFC 8441 4", ":protocol without CONNECT", more(&[(":protocol", "websocket")]), Refused),
        case(
            "RFC 8441 4",
            "unknown :protocol",
            head(&[(":method", "CONNECT")], &[(":protocol", "evil")]),
            Refused,
        ),
        case("8.1.1", "content-length without a body", head(&post, &[("content-length", "4")]), Refused),
        case("8.1.1", "content-length with a sign", head(&post, &[("content-length", "+0")]), Refused),
        case("8.1.1", "content-length as a list", head(&post, &[("content-length", "0, 0")]), Refused),
        case(
            "8.1.1",
            "content-length twice",
            head(&post, &[("content-length", "0"), ("content-length", "0")]),
            Refused,
        ),
        case("10.5.1", "a path of 70 kB", with(":path", &format!("/{}", "a".repeat(70_000))), Refused),
    ];
    let body = |what, length, data, answer| Case {
        data: Some(data),
        ..case("8.1.1", what, head(&echo, &[("content-length", length)]), answer)
    };
    v.push(body("less data than content-length", "5", b"ab", BodyRefused));
    v.push(body("more data than content-length", "2", b"abcde", BodyRefused));
    v.push(body("data as long as content-length", "2", b"ab", Served("ab", "evil", "as it is")));
    let trailers = |section, what, t: &[(&str, &str)], answer| Case {
        data: Some(b"ab"),
        trailers: Some(own(t)),
        ..case(section, what, head(if matches!(answer, BodyRefused) { &echo } else { &post }, &[]), answer)
    };
    v.push(trailers(
        "8.1",
        "pseudo-field in trailers",
        &[(":path", "/evil")],
        Served("POST / ", "evil", "it is dropped"),
    ));
    v.push(trailers(
        "8.2.2",
        "transfer-encoding in trailers",
        &[("transfer-encoding", "chunked")],
        BodyRefused,
    ));
    v.push(trailers(
        "RFC 9110 6.5.1",
        "content-length in trailers",
        &[("content-length", "9"), ("host", "evil"), ("x-t", "1")],
        Served("POST /", "evil", "it is dropped"),
    ));
    let many: Vec<_> = (0..101).map(|i| (format!("x-{i}"), "1".to_owned())).collect();
    let many: Vec<_> = many.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    v.push(case("10.5.1", "101 fields", more(&many), Refused));
    v
}

fn line(fields: &Fields) -> String {
    let all: Vec<_> = fields
        .iter()
        .filter(|(n, v)| {
            let usual: [(&[u8], &[u8]); 3] =
                [(b":scheme", b"http"), (b":method", b"GET"), (b":authority", b"a")];
            !usual.contains(&(n, v))
        })
        .map(|(n, v)| format!("{}={}", shown(n), shown(v)))
        .collect();
    let s = all.join(" ");
    if s.len() > 200 { format!("{}…", &s[..60]) } else { s }
}

pub(crate) async fn rows() -> Vec<Row> {
    let up = Upstream::new("up").await;
    let p = to(up.address);
    let (mut rows, mut wrong) = (Vec::new(), Vec::new());
    for c in cases() {
        let before = up.requests();
        let mut h2 = RawH2::open(p.address("l")).await;
        let borrowed: Vec<(&[u8], &[u8])> =
            c.fields.iter().map(|(n, v)| (n.as_slice(), v.as_slice())).collect();
        let head = block(&borrowed);
        let end = if c.data.is_none() { END_STREAM } else { 0 };
        let mut raw = Vec::new();
        let mut pieces = head.chunks(16_000).peekable();
        let mut kind = HEADERS;
        while let Some(piece) = pieces.next() {
            let last = if pieces.peek().is_none() { END_HEADERS } else { 0 };
            raw.extend(frame(kind, last | if kind == HEADERS { end } else { 0 }, 1, piece));
            kind = CONTINUATION;
        }
        if let Some(data) = c.data {
            raw.extend(frame(DATA, if c.trailers.is_none() { END_STREAM } else { 0 }, 1, data));
        }
        if let Some(t) = &c.trailers {
            let borrowed: Vec<(&[u8], &[u8])> = t.iter().map(|(n, v)| (n.as_slice(), v.as_slice())).collect();
            raw.extend(frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(&borrowed)));
        }
        h2.send(&raw).await;
        let outcome = h2.outcome(1, WAIT).await;
        let seen = up.requests() - before;
        let context = || format!("{}: {outcome:?}, {seen} seen upstream", c.what);
        let refused = match &outcome {
            Outcome::Status(s, _) => (400..500).contains(s),
            Outcome::Reset(_) | Outcome::GoAway(_) => true,
            Outcome::Closed | Outcome::Nothing => false,
        };
        let answer = match c.answer {
            Refused => {
                check(refused && seen == 0, &context, &mut wrong);
                outcome.name()
            }
            BodyRefused => {
                check(refused && seen <= 1, &context, &mut wrong);
                outcome.name()
            }
            Served(with, without, how) => {
                let Outcome::Status(200, body) = &outcome else {
                    wrong.push(context());
                    continue;
                };
                check(body.contains(with) && !body.contains(without) && seen == 1, &context, &mut wrong);
                format!("served, {how}")
            }
        };
        let mut input = line(&c.fields);
        if let Some(d) = c.data {
            input += &format!(" DATA {}", shown(d));
        }
        if let Some(t) = &c.trailers {
            input += &format!(" TRAILERS {}", line(t));
        }
        rows.push(Row { section: c.section, what: c.what, input, answer });
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n----\n"));
    rows
}

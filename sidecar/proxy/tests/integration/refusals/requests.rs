//! Requests in HTTP/1.

use super::{Row, check, shown, statuses, to};
use crate::support::*;

/// What becomes of a request.
enum Answer {
    /// Refused with this status; nothing reaches the server.
    Head(u16),
    /// Refused with this status; the request is well-formed and its connection goes on.
    Kept(u16),
    /// The head was passed on, then its body was refused with this status.
    Body(u16),
    /// Closed without a word.
    Closed,
    /// Served; the server sees the first and not the second.
    Served(&'static str, &'static str, &'static str),
    /// Two requests: the first served, the second refused.
    Second(u16),
}
use Answer::{Body, Closed, Head, Kept, Second, Served};

type Case = (&'static str, &'static str, Vec<u8>, Answer);

fn get(fields: &str) -> Vec<u8> {
    format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n").into_bytes()
}

fn post(fields: &str, body: &str) -> Vec<u8> {
    format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n{body}").into_bytes()
}

fn line(first: &str) -> Vec<u8> {
    format!("{first}\r\nHost: a\r\n\r\n").into_bytes()
}

fn host(fields: &str) -> Vec<u8> {
    format!("GET / HTTP/1.1\r\n{fields}\r\n").into_bytes()
}

fn chunks(body: &str) -> Vec<u8> {
    post("Transfer-Encoding: chunked\r\n", body)
}

fn bytes(raw: &[u8]) -> Vec<u8> {
    raw.to_vec()
}

const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";

fn cases() -> Vec<Case> {
    let te = |v: &str| post(&format!("Transfer-Encoding: {v}\r\n"), &format!("0\r\n\r\n{SMUGGLED}"));
    let cl = |v: &str| post(&format!("Content-Length: {v}\r\n"), &format!("abcd{SMUGGLED}"));
    let mut v: Vec<Case> = vec![
        // Lines.
        ("2.2", "bare LF ends a line", bytes(b"GET / HTTP/1.1\nHost: a\r\n\r\n"), Head(400)),
        ("2.2", "bare LF ends a field", bytes(b"GET / HTTP/1.1\r\nHost: a\nX: 1\r\n\r\n"), Head(400)),
        ("2.2", "bare LF ends the head", bytes(b"GET / HTTP/1.1\r\nHost: a\r\n\n"), Head(400)),
        ("2.2", "bare CR in a value", get("X: 1\r2\r\n"), Head(400)),
        ("2.2", "CR before CRLF", get("X: 1\r\r\n"), Head(400)),
        (
            "2.2",
            "white space before the first field",
            bytes(b"GET / HTTP/1.1\r\n Host: a\r\n\r\n"),
            Head(400),
        ),
        (
            "2.2",
            "an empty line before the request",
            bytes(b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"),
            Served("GET /", "smuggled", "one to four are skipped"),
        ),
        (
            "2.2",
            "five empty lines before the request",
            bytes(b"\r\n\r\n\r\n\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"),
            Head(400),
        ),
        ("2.2", "a bare LF before the request", bytes(b"\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"), Head(400)),
        // Version.
        ("2.3", "HTTP/0.9", bytes(b"GET /\r\n\r\n"), Head(400)),
        ("2.3", "lower case", line("GET / http/1.1"), Closed),
        ("2.3", "not a version", line("GET / HTTP/1.1x"), Head(400)),
        ("2.3", "no dot", line("GET / HTTP/11"), Head(400)),
        ("2.3", "a minor version that we do not know", line("GET / HTTP/1.2"), Head(505)),
        ("2.3", "HTTP/2 in a request line", line("GET / HTTP/2.0"), Head(505)),
        ("2.3", "a newer major version", line("GET / HTTP/3.0"), Head(505)),
        // Request line.
        ("3", "two spaces", line("GET  / HTTP/1.1"), Head(400)),
        ("3", "two spaces before the version", line("GET /  HTTP/1.1"), Head(400)),
        ("3", "tab for a space", line("GET\t/ HTTP/1.1"), Head(400)),
        ("3", "space behind the version", line("GET / HTTP/1.1 "), Head(400)),
        ("3", "space before the method", line(" GET / HTTP/1.1"), Head(400)),
        ("3.1", "method is no token", line("GE(T / HTTP/1.1"), Head(400)),
        ("3.1", "no method", line("/ HTTP/1.1"), Head(400)),
        // Target.
        ("3.2", "space in the target", line("GET /a b HTTP/1.1"), Head(400)),
        ("3.2", "relative", line("GET a HTTP/1.1"), Head(400)),
        ("3.2", "fragment", line("GET /a#b HTTP/1.1"), Head(400)),
        ("3.2", "control byte", line("GET /a\x01 HTTP/1.1"), Head(400)),
        ("3.2", "DEL", line("GET /a\x7f HTTP/1.1"), Head(400)),
        ("3.2", "bytes above ASCII", bytes(b"GET /\xc3\xa4 HTTP/1.1\r\nHost: a\r\n\r\n"), Head(400)),
        ("RFC 3986 6.2.2", "above the root", line("GET /../x HTTP/1.1"), Kept(400)),
        ("RFC 3986 6.2.2", "encoded slash", line("GET /a%2Fb HTTP/1.1"), Kept(400)),
        ("RFC 3986 6.2.2", "encoded NUL", line("GET /a%00 HTTP/1.1"), Kept(400)),
        (
            "RFC 3986 6.2.2",
            "dot segments",
            line("GET /a/%2e%2e/b HTTP/1.1"),
            Served("GET /b ", "..", "as `/b`"),
        ),
        ("3.2.2", "unknown scheme", line("GET ftp://a/ HTTP/1.1"), Head(400)),
        ("3.2.2", "no authority", line("GET http:///x HTTP/1.1"), Head(400)),
        ("3.2.2", "user in the authority", line("GET http://u@a/ HTTP/1.1"), Head(400)),
        (
            "3.2.2",
            "authority differs from Host",
            line("GET http://b.example/ HTTP/1.1"),
            Served("host: b.example", "host: a", "Host is replaced by the target's"),
        ),
        ("3.2.2", "no Host beside it", bytes(b"GET http://b/ HTTP/1.1\r\n\r\n"), Head(400)),
        ("3.2.3", "CONNECT to a path", line("CONNECT / HTTP/1.1"), Head(400)),
        ("3.2.3", "CONNECT without a port", line("CONNECT a HTTP/1.1"), Head(400)),
        ("3.2.4", "`*` without OPTIONS", line("GET * HTTP/1.1"), Head(400)),
        // Host.
        ("3.2", "no Host", host(""), Head(400)),
        ("3.2", "two Hosts", host("Host: a\r\nHost: a\r\n"), Head(400)),
        ("3.2", "list", host("Host: a, b\r\n"), Head(400)),
        ("3.2", "empty", host("Host:\r\n"), Head(400)),
        ("3.2", "user", host("Host: u@a\r\n"), Head(400)),
        ("3.2", "path", host("Host: a/b\r\n"), Head(400)),
        ("3.2", "space inside", host("Host: a b\r\n"), Head(400)),
        ("3.2", "port out of range", host("Host: a:99999\r\n"), Head(400)),
        ("3.2", "port with a sign", host("Host: a:+80\r\n"), Head(400)),
        ("3.2", "no IPv6 address", host("Host: [::g]\r\n"), Head(400)),
        ("3.2", "bytes above ASCII", bytes(b"GET / HTTP/1.1\r\nHost: \xc3\xa4\r\n\r\n"), Head(400)),
        // Fields.
        ("5.1", "space before the colon", get("X : 1\r\n"), Head(400)),
        ("5.1", "tab before the colon", get("X\t: 1\r\n"), Head(400)),
        ("5.1", "space in a name", get("X Y: 1\r\n"), Head(400)),
        ("5.1", "empty name", get(": 1\r\n"), Head(400)),
        ("5.1", "no colon", get("X\r\n"), Head(400)),
        ("5.1", "NUL in a name", get("X\0: 1\r\n"), Head(400)),
        (
            "5.1",
            "bytes above ASCII in a name",
            bytes(b"GET / HTTP/1.1\r\nHost: a\r\n\xc3\xa4: 1\r\n\r\n"),
            Head(400),
        ),
        ("5.2", "folded line", get("X: 1\r\n 2\r\n"), Head(400)),
        ("5.2", "line folded by a tab", get("X: 1\r\n\t2\r\n"), Head(400)),
        ("RFC 9110 5.5", "NUL in a value", get("X: 1\x002\r\n"), Head(400)),
        ("RFC 9110 5.5", "control byte in a value", get("X: 1\x012\r\n"), Head(400)),
        ("RFC 9110 5.5", "DEL in a value", get("X: 1\x7f2\r\n"), Head(400)),
        // Transfer-Encoding.
        (
            "6.1",
            "Content-Length, then Transfer-Encoding",
            post("Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", &format!("0\r\n\r\n{SMUGGLED}")),
            Head(400),
        ),
        (
            "6.1",
            "Transfer-Encoding, then Content-Length",
            post("Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", &format!("0\r\n\r\n{SMUGGLED}")),
            Head(400),
        ),
        (
            "6.1",
            "Content-Length 0 beside it",
            post("Content-Length: 0\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"),
            Head(400),
        ),
        (
            "6.1",
            "twice",
            post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"),
            Head(400),
        ),
        (
            "6.1",
            "twice, one of them unknown",
            post("Transfer-Encoding: chunked\r\nTransfer-encoding: cow\r\n", "0\r\n\r\n"),
            Head(400),
        ),
        ("6.1", "another coding first", te("gzip, chunked"), Head(400)),
        ("6.1", "chunked is not last", te("chunked, identity"), Head(400)),
        ("6.1", "identity", te("identity"), Head(400)),
        ("6.1", "not quite chunked", te("xchunked"), Head(400)),
        ("6.1", "vertical tab", te("\x0bchunked"), Head(400)),
        ("6.1", "parameter", te("chunked;q=1"), Head(400)),
        ("6.1", "quoted", te("\"chunked\""), Head(400)),
        ("6.1", "empty", te(""), Head(400)),
        (
            "6.1",
            "in HTTP/1.0",
            bytes(b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
            Head(400),
        ),
        ("6.1", "folded", post("Transfer-Encoding:\r\n chunked\r\n", "0\r\n\r\n"), Head(400)),
        ("6.1", "space before the colon", post("Transfer-Encoding : chunked\r\n", "0\r\n\r\n"), Head(400)),
        // Content-Length.
        ("6.2", "two that differ", post("Content-Length: 4\r\nContent-Length: 5\r\n", "abcde"), Head(400)),
        ("6.2", "two that agree", post("Content-Length: 4\r\nContent-Length: 4\r\n", "abcd"), Head(400)),
        ("6.2", "list", cl("4, 4"), Head(400)),
        ("6.2", "sign", cl("+4"), Head(400)),
        ("6.2", "negative", cl("-4"), Head(400)),
        ("6.2", "hexadecimal", cl("0x4"), Head(400)),
        ("6.2", "fraction", cl("4.0"), Head(400)),
        ("6.2", "space inside", cl("4 4"), Head(400)),
        ("6.2", "underscore", cl("4_0"), Head(400)),
        ("6.2", "empty", cl(""), Head(400)),
        ("6.2", "beyond 64 bits", cl("18446744073709551620"), Head(400)),
        // Chunks.
        ("7.1", "bare LF behind the size", chunks("4\nabcd\r\n0\r\n\r\n"), Body(400)),
        ("7.1", "space before the size", chunks(" 4\r\nabcd\r\n0\r\n\r\n"), Body(400)),
        ("7.1", "space behind the size", chunks("4 \r\nabcd\r\n0\r\n\r\n"), Body(400)),
        ("7.1", "sign", chunks("+4\r\nabcd\r\n0\r\n\r\n"), Body(400)),
        ("7.1", "negative", chunks("-4\r\nabcd\r\n0\r\n\r\n"), Body(400)),
        ("7.1", "prefix 0x", chunks("0x4\r\nabcd\r\n0\r\n\r\n"), Body(400)),
        ("7.1", "beyond 60 bits", chunks("fffffffffffffffff\r\nabcd\r\n0\r\n\r\n"), Body(400)),
        ("7.1", "no size", chunks("\r\nabcd\r\n0\r\n\r\n"), Body(400)),
        ("7.1", "more data than the size", chunks("4\r\nabcde\r\n0\r\n\r\n"), Body(400)),
        ("7.1", "bare LF behind the data", chunks("4\r\nabcd\n0\r\n\r\n"), Body(400)),
        ("7.1", "bare CR behind the data", chunks("4\r\nabcd\rX0\r\n\r\n"), Body(400)),
        ("7.1.1", "space before an extension", chunks("4 ;a=b\r\nabcd\r\n0\r\n\r\n"), Body(400)),
        ("7.1.1", "control byte in an extension", chunks("4;a=\x01\r\nabcd\r\n0\r\n\r\n"), Body(400)),
        ("7.1.1", "bare LF in an extension", chunks("4;a\nabcd\r\n0\r\n\r\n"), Body(400)),
        (
            "7.1.1",
            "an extension",
            chunks("4;a=b\r\nabcd\r\n0\r\n\r\n"),
            Served("POST /", "a=b", "it is dropped"),
        ),
        ("7.1.2", "trailer with a space in its name", chunks("0\r\nX Y: 1\r\n\r\n"), Body(400)),
        ("7.1.2", "trailer with a bare LF", chunks("0\r\nX: 1\n\r\n"), Body(400)),
        ("7.1.2", "folded trailer", chunks("0\r\nX: 1\r\n 2\r\n\r\n"), Body(400)),
        (
            "RFC 9110 6.5.1",
            "framing and routing in trailers",
            chunks(
                "0\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\nHost: evil\r\nAuthorization: evil\r\n\r\n",
            ),
            Served("POST /", "evil", "they are dropped"),
        ),
        // Expect, Upgrade, Connection.
        ("RFC 9110 10.1.1", "another expectation", get("Expect: tea\r\n"), Head(417)),
        (
            "RFC 9110 10.1.1",
            "100-continue in HTTP/1.0",
            bytes(b"POST / HTTP/1.0\r\nHost: a\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\nx"),
            Served("POST /", "100 Continue", "without 100"),
        ),
        (
            "RFC 9110 7.8",
            "h2c",
            get(
                "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n",
            ),
            Served("GET /", "upgrade", "without the upgrade"),
        ),
        (
            "RFC 9110 7.8",
            "WebSocket with a body",
            get("Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 4\r\n\r\nabcd"),
            Served("GET /", "upgrade", "without the upgrade"),
        ),
        (
            "RFC 6455 4.1",
            "WebSocket with POST",
            post("Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 0\r\n", ""),
            Served("POST /", "upgrade", "without the upgrade"),
        ),
        (
            "RFC 9110 7.6.1",
            "identity nominated by Connection",
            get("Connection: Authorization, X-Forwarded-For\r\nAuthorization: t\r\nX-Drop: 1\r\n"),
            Served("authorization: t", "connection:", "it stays"),
        ),
        (
            "RFC 9110 7.6.1",
            "a field nominated by Connection",
            get("Connection: X-Drop\r\nX-Drop: 1\r\n"),
            Served("GET /", "x-drop", "it is dropped"),
        ),
        (
            "RFC 9110 11.7.2",
            "credentials for this proxy",
            get("Proxy-Authorization: Basic eDp5\r\n"),
            Served("GET /", "proxy-auth", "they are dropped"),
        ),
        // Pipelining.
        ("9.3.2", "a second request that is refused", [get(""), get("X : 1\r\n")].concat(), Second(400)),
        ("9.3.2", "bytes behind a body", post("Content-Length: 4\r\n", "abcdX\r\n\r\n"), Second(400)),
    ];
    let long = "a".repeat(70_000);
    v.push(("RFC 6585 5", "a field of 70 kB", get(&format!("X: {long}\r\n")), Head(431)));
    v.push(("RFC 6585 5", "a target of 70 kB", line(&format!("GET /{long} HTTP/1.1")), Head(431)));
    let many: String = (0..101).map(|i| format!("X-{i}: 1\r\n")).collect();
    v.push(("RFC 6585 5", "101 fields beside Host", get(&many), Head(431)));
    v.push((
        "7.1.1",
        "an extension of 600 bytes",
        chunks(&format!("4;{}\r\nabcd\r\n0\r\n\r\n", &long[..600])),
        Body(400),
    ));
    v.push((
        "7.1.2",
        "trailers of 20 kB",
        chunks(&format!("0\r\nX: {}\r\n\r\n", &long[..20_000])),
        Body(400),
    ));
    let many: String = (0..33).map(|i| format!("X-{i}: 1\r\n")).collect();
    v.push(("7.1.2", "33 trailers", chunks(&format!("0\r\n{many}\r\n")), Body(400)));
    v
}

/// Cut in the middle: limits need long inputs.
fn abridged(raw: &[u8]) -> String {
    let s = shown(raw);
    if s.len() > 260 { format!("{}…", &s[..80]) } else { s }
}

/// What comes until the proxy closes; it says so if it does not.
async fn rest(s: &mut tokio::net::TcpStream) -> String {
    use tokio::io::AsyncReadExt as _;
    let mut out = Vec::new();
    let closed =
        tokio::time::timeout(std::time::Duration::from_secs(1), s.read_to_end(&mut out)).await.is_ok();
    String::from_utf8_lossy(&out).into_owned() + if closed { "" } else { "[still open]" }
}

/// One response, by its length.
async fn one(s: &mut tokio::net::TcpStream) -> String {
    use tokio::io::AsyncReadExt as _;
    let mut out = String::new();
    let mut buf = [0; 4096];
    loop {
        let n = tokio::time::timeout(WAIT, s.read(&mut buf)).await.expect("an answer").unwrap_or(0);
        out.push_str(&String::from_utf8_lossy(&buf[..n]));
        let r = Response::parse(&out);
        let length = r.header("content-length").and_then(|v| v.parse().ok());
        if n == 0 || length.is_some_and(|l: usize| r.body.len() >= l) {
            return out;
        }
    }
}

pub(crate) async fn rows() -> Vec<Row> {
    let up = Upstream::new("up").await;
    let p = to(up.address);
    let (mut rows, mut wrong) = (Vec::new(), Vec::new());
    for (section, what, raw, answer) in cases() {
        let before = up.requests();
        let mut s = p.connect("l").await;
        use tokio::io::AsyncWriteExt as _;
        // The proxy may close before it has read everything.
        let _ = s.write_all(&raw).await;
        // One that is served keeps its connection.
        let r = if matches!(answer, Served(..) | Kept(_)) { one(&mut s).await } else { rest(&mut s).await };
        let seen = up.requests() - before;
        let lower = r.to_ascii_lowercase();
        let got = statuses(&r);
        let closes = lower.contains("\r\nconnection: close\r\n");
        let context = || format!("{what}: {got:?}, {seen} seen upstream: {r}");
        check(!r.contains("/smuggled"), &context, &mut wrong);
        let said = match answer {
            Head(status) => {
                check(got == [status] && closes && seen == 0, &context, &mut wrong);
                format!("{status}, close")
            }
            Body(status) => {
                check(got == [status] && closes && seen <= 1, &context, &mut wrong);
                format!("{status}, close")
            }
            Kept(status) => {
                check(got == [status] && !closes && seen == 0, &context, &mut wrong);
                status.to_string()
            }
            Closed => {
                check(r.is_empty() && seen == 0, &context, &mut wrong);
                "closed: these are no bytes of HTTP/1".into()
            }
            Served(with, without, how) => {
                let ok =
                    got == [200] && lower.contains(&with.to_ascii_lowercase()) && !lower.contains(without);
                check(ok && seen == 1, &context, &mut wrong);
                format!("served, {how}")
            }
            Second(status) => {
                check(got == [200, status] && closes && seen == 1, &context, &mut wrong);
                format!("the first is served; {status}, close")
            }
        };
        rows.push(Row { section, what, input: abridged(&raw), answer: said });
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n----\n"));
    rows
}

//! Responses in HTTP/1.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::io::AsyncWriteExt as _;

use super::{Row, check, shown, statuses, to};
use crate::support::*;

/// What the client gets.
enum Answer {
    /// This status in the server's place.
    Error(u16),
    /// The server's status; the text holds the first and not the second; and how.
    Passed(u16, &'static str, &'static str, &'static str),
    /// The answer begins and breaks off.
    Broken,
}
use Answer::{Broken, Error, Passed};

const OK: &str = "HTTP/1.1 200 OK\r\n";

fn cases() -> Vec<(&'static str, &'static str, &'static str, String, Answer)> {
    let ok = |fields: &str, body: &str| format!("{OK}{fields}\r\n{body}");
    let second = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil";
    let mut v = vec![
        (
            "RFC 9112 6.1",
            "GET",
            "Content-Length and Transfer-Encoding",
            ok("Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"),
            Error(502),
        ),
        (
            "RFC 9112 6.2",
            "GET",
            "two Content-Lengths",
            ok("Content-Length: 4\r\nContent-Length: 4\r\n", "abcd"),
            Error(502),
        ),
        (
            "RFC 9112 6.2",
            "GET",
            "Content-Length with a sign",
            ok("Content-Length: +4\r\n", "abcd"),
            Error(502),
        ),
        (
            "RFC 9112 6.1",
            "GET",
            "unknown coding",
            ok("Transfer-Encoding: gzip, chunked\r\n", "0\r\n\r\n"),
            Error(502),
        ),
        (
            "RFC 9112 6.1",
            "GET",
            "chunked in HTTP/1.0",
            "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".into(),
            Error(502),
        ),
        ("RFC 9112 5.2", "GET", "folded line", ok("X: 1\r\n 2\r\n", ""), Error(502)),
        ("RFC 9112 5.1", "GET", "space before the colon", ok("Content-Length : 0\r\n", ""), Error(502)),
        ("RFC 9112 2.2", "GET", "bare LF", "HTTP/1.1 200 OK\nContent-Length: 0\n\n".into(), Error(502)),
        ("RFC 9110 5.5", "GET", "NUL in a value", ok("X: \x00\r\nContent-Length: 0\r\n", ""), Error(502)),
        (
            "RFC 9110 5.5",
            "GET",
            "response splitting by a bare CR",
            ok("Location: /\rSet-Cookie: evil\r\nContent-Length: 0\r\n", ""),
            Error(502),
        ),
        (
            "RFC 9112 4",
            "GET",
            "status of two digits",
            "HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n".into(),
            Error(502),
        ),
        (
            "RFC 9112 4",
            "GET",
            "status 000",
            "HTTP/1.1 000 OK\r\nContent-Length: 0\r\n\r\n".into(),
            Error(502),
        ),
        (
            "RFC 9112 2.3",
            "GET",
            "another version",
            "HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n".into(),
            Error(502),
        ),
        ("RFC 9112 2.1", "GET", "no HTTP", "SSH-2.0-OpenSSH\r\n\r\n".into(), Error(502)),
        (
            "RFC 9110 15.2.2",
            "GET",
            "101 that nobody asked for",
            format!("HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n{second}"),
            Error(502),
        ),
        (
            "RFC 9110 15.2",
            "GET",
            "an interim answer first",
            format!("HTTP/1.1 103 Early Hints\r\nLink: </evil>\r\n\r\n{OK}Content-Length: 2\r\n\r\nok"),
            Passed(200, "ok", "evil", "the interim answer is dropped"),
        ),
        (
            "RFC 9110 15.2",
            "GET",
            "17 interim answers",
            "HTTP/1.1 102 Processing\r\n\r\n".repeat(17) + OK + "Content-Length: 0\r\n\r\n",
            Error(502),
        ),
        (
            "RFC 9110 15.2",
            "GET",
            "interim answer with a length",
            format!("HTTP/1.1 100 Continue\r\nContent-Length: 4\r\n\r\n{OK}Content-Length: 2\r\n\r\nok"),
            Passed(200, "ok", "length: 4", "1xx has no body"),
        ),
        (
            "RFC 9110 15.3.5",
            "GET",
            "204 with a body",
            format!("HTTP/1.1 204 No Content\r\nContent-Length: {}\r\n\r\n{second}", second.len()),
            Passed(204, "204", "evil", "without body and length"),
        ),
        (
            "RFC 9110 15.4.5",
            "GET",
            "304 with a body",
            format!("HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n{second}"),
            Passed(304, "etag: x", "evil", "without the body"),
        ),
        (
            "RFC 9110 9.3.2",
            "HEAD",
            "a body to HEAD",
            ok("Content-Length: 4\r\n", "evil"),
            Passed(200, "content-length: 4", "evil", "without the body"),
        ),
        (
            "RFC 9112 6.3",
            "GET",
            "bytes behind the body",
            ok("Content-Length: 2\r\n", &format!("ok{second}")),
            Passed(200, "ok", "evil", "they are dropped"),
        ),
        (
            "RFC 9112 7.1",
            "GET",
            "chunk size with a sign",
            ok("Transfer-Encoding: chunked\r\n", "+4\r\nevil\r\n0\r\n\r\n"),
            Broken,
        ),
        (
            "RFC 9112 7.1",
            "GET",
            "data longer than the chunk",
            ok("Transfer-Encoding: chunked\r\n", "2\r\nokX\r\n0\r\n\r\n"),
            Broken,
        ),
        (
            "RFC 9112 8",
            "GET",
            "ends inside of a chunk",
            ok("Transfer-Encoding: chunked\r\n", "5\r\nok"),
            Broken,
        ),
        ("RFC 9112 8", "GET", "ends before its length", ok("Content-Length: 5\r\n", "ok"), Broken),
        (
            "RFC 9110 6.5.1",
            "GET",
            "framing in trailers",
            ok(
                "Transfer-Encoding: chunked\r\n",
                "2\r\nok\r\n0\r\nContent-Length: 9\r\nSet-Cookie: evil\r\n\r\n",
            ),
            Passed(200, "ok", "evil", "they are dropped"),
        ),
        ("RFC 9112 8", "GET", "nothing", String::new(), Error(503)),
        ("RFC 9112 8", "GET", "ends in the head", "HTTP/1.1 200 OK\r\nContent-".into(), Error(503)),
    ];
    let many: String = (0..101).map(|i| format!("X-{i}: 1\r\n")).collect();
    v.push(("9110 2.3", "GET", "101 fields", ok(&many, ""), Error(502)));
    v.push((
        "9110 2.3",
        "GET",
        "a field of 70 kB",
        ok(&format!("X: {}\r\n", "a".repeat(70_000)), ""),
        Error(502),
    ));
    v
}

pub(crate) async fn rows() -> Vec<Row> {
    let (mut rows, mut wrong) = (Vec::new(), Vec::new());
    for (section, method, what, raw, answer) in cases() {
        let connections = Arc::new(AtomicUsize::new(0));
        let (canned, opened) = (raw.clone(), connections.clone());
        let server = raw_server(move |mut s, _| {
            let canned = canned.clone();
            opened.fetch_add(1, Ordering::SeqCst);
            async move {
                let _ = read_until(&mut s, "\r\n\r\n").await;
                let _ = s.write_all(canned.as_bytes()).await;
                let _ = s.shutdown().await;
                let _ = read_all(&mut s).await;
            }
        })
        .await;
        let p = to(server);
        let mut client = p.connect("l").await;
        let request = format!("{method} / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
        let r = read_all(&mut client).await;
        let got = statuses(&r);
        let context = || format!("{what}: {got:?}: {r}");
        let said = match answer {
            Error(status) => {
                check(got == [status] && !r.contains("evil"), &context, &mut wrong);
                status.to_string()
            }
            Passed(status, with, without, how) => {
                let lower = r.to_ascii_lowercase();
                let ok = got == [status] && lower.contains(with) && !lower.contains(without);
                check(ok, &context, &mut wrong);
                check(status != 204 || !lower.contains("content-length"), &context, &mut wrong);
                format!("{status}, {how}")
            }
            Broken => {
                let complete = r.ends_with("0\r\n\r\n") || r.contains("content-length: 2");
                check(got.first() == Some(&200) && got.len() == 1 && !complete, &context, &mut wrong);
                "200 that breaks off".into()
            }
        };
        // No later request may meet what this connection still holds.
        let again = statuses(&p.raw("l", &request).await);
        check(!again.is_empty() && connections.load(Ordering::SeqCst) >= 2, &context, &mut wrong);
        let input = shown(raw.as_bytes());
        let input = if input.len() > 260 { format!("{}…", &input[..80]) } else { input };
        let what = if method == "GET" { what } else { "a body to HEAD" };
        rows.push(Row { section, what, input, answer: said });
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n----\n"));
    rows
}

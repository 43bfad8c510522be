use http::Method;
use proptest::prelude::*;

use super::*;

/// Pieces of requests, good and bad, in any combination.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let pick = |of: &'static [&'static str]| prop::sample::select(of);
    let first = (
        pick(&["GET", "POST", "PUT", "OPTIONS", "HEAD", "get", "X-Y"]),
        pick(&["/", "/a?b=c", "http://b/x", "http://b?q", "*", "/a;b", "//a", "/%2e%2e/a", "a"]),
        pick(&["HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/1.2"]),
        pick(&["\r\n", "\r\n", "\r\n", "\n", "\r\r\n"]),
    )
        .prop_map(|(m, t, v, e)| format!("{m} {t} {v}{e}"));
    let field = pick(&[
        "Host: a\r\n",
        "host:b\r\n",
        "Host: a:80 \r\n",
        "Content-Length: 4\r\n",
        "content-length:4\r\n",
        "Content-Length: 04\r\n",
        "Content-Length: 4,4\r\n",
        "Content-Length: 0\r\n",
        "Content-Length: 5\r\n",
        "Content-Length: +4\r\n",
        "Content-Length:\t4\r\n",
        "Transfer-Encoding: chunked\r\n",
        "Transfer-Encoding: Chunked\r\n",
        "transfer-encoding:\tchunked \r\n",
        "Transfer-Encoding: identity, chunked\r\n",
        "Transfer-Encoding: x\r\n",
        "Transfer-Encoding : chunked\r\n",
        "Connection: close\r\n",
        "Connection: keep-alive\r\n",
        "X: 1\r\n",
        "X: 1\n",
        "X: 1\r\n 2\r\n",
        "X:\r\n",
        "X : 1\r\n",
        ": 1\r\n",
        "X: \u{e4}\r\n",
    ]);
    let body = pick(&[
        "",
        "abcd",
        "abcde",
        "0\r\n\r\n",
        "4\r\nabcd\r\n0\r\n\r\n",
        "4;a=b\r\nabcd\r\n0\r\nX: 1\r\n\r\n",
        "04\r\nabcd\r\n000\r\n\r\n",
        "4\nabcd\n0\n\n",
        "4 \r\nabcd\r\n0\r\n\r\n",
        "4\r\nabcde\r\n0\r\n\r\n",
        "ffffffffffffffff4\r\nabcd\r\n0\r\n\r\n",
        "GET /smuggled HTTP/1.1\r\nHost: s\r\n\r\n",
    ]);
    let one = (
        first,
        prop::collection::vec(field, 0..5),
        pick(&["\r\n", "\r\n", "\r\n", "\n"]),
        body,
        any::<bool>(),
    );
    let one = one.prop_map(|(f, h, e, b, host)| {
        // Most combinations lack a Host; half of them get one, or hardly any would be accepted.
        let host = if host && !h.iter().any(|h| h.to_ascii_lowercase().starts_with("host")) {
            "Host: c\r\n"
        } else {
            ""
        };
        format!("{f}{host}{}{e}{b}", h.concat())
    });
    prop::collection::vec(one, 1..4).prop_map(|r| r.concat().into_bytes())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]
    #[test]
    fn what_we_accept_hyper_understands_alike(raw in request(), flip in any::<Option<(u16, u8)>>()) {
        let mut raw = raw;
        // Now and then a byte is another.
        if let Some((at, with)) = flip.filter(|(at, _)| at % 4 == 0) {
            let n = raw.len();
            raw[usize::from(at) % n] = with;
        }
        let ours: Vec<Understood> = ours(&raw).into_iter().map(|(_, u)| u).collect();
        // Methods with a form of target of their own are ours alone to understand.
        prop_assume!(!ours.iter().any(|u| u.method == Method::CONNECT.as_str()));
        // hyper refuses characters that RFC 3986 excludes and clients send all the same, such as `>`. To be stricter is
        // not to understand something else.
        prop_assume!(ours.iter().all(|u| u.path.parse::<http::uri::PathAndQuery>().is_ok()));
        let theirs = hypers(raw.clone());
        prop_assert!(
            theirs.len() >= ours.len() && theirs[..ours.len()] == ours[..],
            "{:?}\nours: {ours:?}\nhyper: {theirs:?}", String::from_utf8_lossy(&raw)
        );
    }
}

//! What the codecs refuse: every row is sent over a real socket, and the rows are the table of
//! `docs/refusals.md`, which this test compares (`BLESS=1` writes it anew).

mod http2;
pub(crate) mod raw_h2;
mod requests;
mod responses;

use std::fmt::Write as _;

use super::support::*;

/// A row of the table.
pub(crate) struct Row {
    /// Section of the specification.
    pub(crate) section: &'static str,
    /// What is wrong.
    pub(crate) what: &'static str,
    /// Bytes, as they are shown.
    pub(crate) input: String,
    /// Our answer.
    pub(crate) answer: String,
}

/// Bytes as a reader can type them.
pub(crate) fn shown(raw: &[u8]) -> String {
    let mut out = String::new();
    for b in raw {
        match b {
            b'\r' => out.push_str("\\r"),
            b'\n' => out.push_str("\\n"),
            b'\t' => out.push_str("\\t"),
            b'|' => out.push_str("\\x7c"),
            b'`' => out.push_str("\\x60"),
            0x20..0x7f => out.push(char::from(*b)),
            b => write!(out, "\\x{b:02x}").unwrap(),
        }
    }
    out
}

#[tokio::test]
async fn the_table_of_refusals_holds() {
    let parts = [
        (
            "Requests in HTTP/1",
            "Sections are of RFC 9112 unless they say otherwise. *close*: the connection ends with the answer. \
             Unless the answer says that it is served, no byte of the request reaches a server, or, where its head \
             had been passed on, the server sees it break off.",
            requests::rows().await,
        ),
        (
            "Responses in HTTP/1",
            "What a server sends, and what the client gets. Its connection is never used again.",
            responses::rows().await,
        ),
        (
            "Requests in HTTP/2 that would become HTTP/1",
            "Sections are of RFC 9113 unless they say otherwise. *RST* and *GOAWAY* with the error code.",
            http2::rows().await,
        ),
    ];
    let mut doc = "# What the codecs refuse\n\nWritten by `tests/integration/refusals.rs`, which sends every row over a \
                   socket; `BLESS=1 cargo test -p mesh-proxy refusals` writes it anew.\n"
        .to_owned();
    let mut count = 0;
    for (title, about, rows) in parts {
        write!(doc, "\n## {title}\n\n{about}\n\n| section | what | input | answer |\n|---|---|---|---|\n")
            .unwrap();
        for r in &rows {
            writeln!(doc, "| {} | {} | `{}` | {} |", r.section, r.what, r.input, r.answer).unwrap();
        }
        count += rows.len();
    }
    println!("  {count} rows hold");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/refusals.md");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(path, &doc).unwrap();
    }
    let there = std::fs::read_to_string(path).unwrap_or_default();
    let differs = doc.lines().zip(there.lines()).find(|(a, b)| a != b);
    assert!(doc == there, "docs/refusals.md is not of this test (BLESS=1 writes it): {differs:?}");
}

/// Notes what does not hold, so that one run shows all of it.
fn check(holds: bool, context: &dyn Fn() -> String, wrong: &mut Vec<String>) {
    if !holds {
        wrong.push(context());
    }
}

/// Statuses of all responses in what came back.
pub(crate) fn statuses(raw: &str) -> Vec<u16> {
    raw.match_indices("HTTP/1.1 ").filter_map(|(at, _)| raw[at + 9..].get(..3)?.parse().ok()).collect()
}

/// A proxy for one upstream, with websocket upgrades on.
pub(crate) fn to(up: std::net::SocketAddr) -> Proxy {
    simple(up).run()
}

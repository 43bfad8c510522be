//! Path normalisation, so that routes, policies and the upstream all see the same path.
//!
//! Policies and servers that read a path differently are how rules are walked around: `/admin/../x`,
//! `/%61dmin`, `//admin`, `/admin;x`, `\admin`. With normalisation on, percent-encoded unreserved characters are
//! decoded, dot segments removed (RFC 3986 section 6.2.2) and backslashes turned; an encoded NUL is refused. What an encoded
//! slash or backslash means differs from server to server, so what becomes of it is a setting.

use mesh_model::proxy::{EscapedSlashes, HttpConnectionManager};

/// A path that has no single reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ambiguous;

/// What is to be done with a path that was normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    Route,
    /// The client is told to ask for it as it is now.
    Redirect,
}

/// Normalises a path and query in place, as a connection manager wants it.
pub(crate) fn normalize(path: &mut String, c: &HttpConnectionManager) -> Result<Then, Ambiguous> {
    by(path, c.escaped_slashes, c.normalize_path, c.merge_slashes)
}

/// The same by its settings: escaped slashes, dot segments, and whether slashes are merged.
pub(crate) fn by(
    path: &mut String,
    escaped: EscapedSlashes,
    dots: bool,
    merge: bool,
) -> Result<Then, Ambiguous> {
    let then = slashes(path, escaped)?;
    base(path, dots, merge)?;
    Ok(then)
}

/// Does what is wanted with escaped slashes.
fn slashes(path: &mut String, action: EscapedSlashes) -> Result<Then, Ambiguous> {
    if action == EscapedSlashes::Keep || !path.starts_with('/') || !path.contains('%') {
        return Ok(Then::Route);
    }
    let end = path.find('?').unwrap_or(path.len());
    let (p, query) = path.split_at(end);
    let mut out = String::with_capacity(path.len());
    let mut rest = p;
    let mut found = false;
    while let Some(at) = rest.find('%') {
        let (before, escape) = rest.split_at(at);
        out.push_str(before);
        let plain = match escape.get(1..3) {
            Some("2f" | "2F") => Some('/'),
            Some("5c" | "5C") => Some('\\'),
            _ => None,
        };
        found |= plain.is_some();
        out.push(plain.unwrap_or('%'));
        rest = &escape[if plain.is_some() { 3 } else { 1 }..];
    }
    if !found {
        return Ok(Then::Route);
    }
    out.push_str(rest);
    out.push_str(query);
    match action {
        EscapedSlashes::Keep => {}
        EscapedSlashes::Reject => return Err(Ambiguous),
        EscapedSlashes::UnescapeAndForward => *path = out,
        EscapedSlashes::UnescapeAndRedirect => {
            *path = out;
            return Ok(Then::Redirect);
        }
    }
    Ok(Then::Route)
}

fn base(path: &mut String, dots: bool, merge: bool) -> Result<(), Ambiguous> {
    if !path.starts_with('/') || !(dots || merge) {
        return Ok(());
    }
    let (p, query) = match path.split_once('?') {
        Some((p, q)) => (p, Some(q)),
        None => (path.as_str(), None),
    };
    // Nearly all paths need no change; deciding that allocates nothing.
    let plain = !p.contains(['%', '\\']) && !p.contains("/.") && !p.contains("//");
    if plain {
        return Ok(());
    }
    let mut p = p.to_owned();
    if dots {
        p = remove_dots(&decode(&p)?)?;
    }
    if merge {
        let mut merged = String::with_capacity(p.len());
        for c in p.chars() {
            if c != '/' || !merged.ends_with('/') {
                merged.push(c);
            }
        }
        p = merged;
    }
    if let Some(q) = query {
        p.push('?');
        p.push_str(q);
    }
    *path = p;
    Ok(())
}

fn decode(p: &str) -> Result<String, Ambiguous> {
    let b = p.as_bytes();
    let mut out = Vec::with_capacity(b.len());
    let mut i = 0;
    while i < b.len() {
        match b[i] {
            b'\\' => out.push(b'/'),
            b'%' => {
                let hex = |at: usize| b.get(at).and_then(|c| (*c as char).to_digit(16));
                let (Some(h), Some(l)) = (hex(i + 1), hex(i + 2)) else { return Err(Ambiguous) };
                let c = (h * 16 + l) as u8;
                match c {
                    0 => return Err(Ambiguous),
                    c if c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'_' | b'~') => out.push(c),
                    _ => out.extend(b[i..i + 3].iter().map(u8::to_ascii_uppercase)),
                }
                i += 2;
            }
            c => out.push(c),
        }
        i += 1;
    }
    // Only characters of ASCII were changed.
    String::from_utf8(out).map_err(|_| Ambiguous)
}

fn remove_dots(p: &str) -> Result<String, Ambiguous> {
    let mut out: Vec<&str> = Vec::new();
    let mut segments = p.split('/').skip(1).peekable();
    while let Some(s) = segments.next() {
        let last = segments.peek().is_none();
        match s {
            "." => {
                if last {
                    out.push("");
                }
            }
            ".." => {
                // Above the root there is nothing; some servers disagree.
                out.pop().ok_or(Ambiguous)?;
                if last {
                    out.push("");
                }
            }
            s => out.push(s),
        }
    }
    Ok(format!("/{}", out.join("/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        for (path, want) in [
            ("/a/b?x=../y", Some("/a/b?x=../y")),
            ("/a/./b", Some("/a/b")),
            ("/a/../b", Some("/b")),
            ("/a/b/..", Some("/a/")),
            ("/a/%2e%2E/b", Some("/b")),
            ("/%61dmin", Some("/admin")),
            ("/a%2fb", Some("/a%2Fb")),
            ("/a%5Cb", Some("/a%5Cb")),
            ("/a/..%2fb", Some("/a/..%2Fb")),
            ("/a%00", None),
            ("/a%zz", None),
            ("/..", None),
            ("/a/../../b", None),
            ("/a\\..\\b", Some("/b")),
            ("//a///b", Some("/a/b")),
            ("/a%20b%c3%a4", Some("/a%20b%C3%A4")),
            ("/.hidden", Some("/.hidden")),
            ("/\u{e4}%2e", Some("/\u{e4}.")),
            ("*", Some("*")),
        ] {
            let mut p = path.to_owned();
            let got = base(&mut p, true, true).is_ok().then_some(p.as_str());
            assert_eq!(got, want, "{path}");
        }
        let mut p = "/a//b/../c".to_owned();
        base(&mut p, true, false).unwrap();
        assert_eq!(p, "/a//c");
    }

    #[test]
    fn escaped_slashes() {
        use EscapedSlashes::{Keep, Reject, UnescapeAndForward as Forward, UnescapeAndRedirect as Redirect};
        for (action, path, want) in [
            (Keep, "/a%2Fb", Ok((Then::Route, "/a%2Fb"))),
            (Reject, "/a%2Fb", Err(Ambiguous)),
            (Reject, "/a%5cb", Err(Ambiguous)),
            (Reject, "/a%20b?x=%2F", Ok((Then::Route, "/a%20b?x=%2F"))),
            (Forward, "/a%2F%2fb%5C%2e?x=%2F", Ok((Then::Route, "/a//b\\%2e?x=%2F"))),
            (Forward, "/a%252Fb", Ok((Then::Route, "/a%252Fb"))),
            (Forward, "/a%2", Ok((Then::Route, "/a%2"))),
            (Forward, "/%\u{e4}%2F", Ok((Then::Route, "/%\u{e4}/"))),
            (Redirect, "/a%2Fb", Ok((Then::Redirect, "/a/b"))),
            (Redirect, "/a/b", Ok((Then::Route, "/a/b"))),
        ] {
            let mut p = path.to_owned();
            let got = slashes(&mut p, action).map(|t| (t, p.as_str()));
            assert_eq!(got, want, "{action:?} {path}");
        }
    }
}

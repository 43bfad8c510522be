//! Text to tokens.

/// A token and where it starts, in bytes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Token {
    pub at: usize,
    pub kind: Kind,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Kind {
    Int(i64),
    Double(f64),
    String(String),
    Ident(String),
    /// An operator or a bracket.
    Op(&'static str),
}

/// Longer ones first.
const OPS: [&str; 16] =
    ["==", "!=", "&&", "||", "<=", ">=", "<", ">", "|", "+", "(", ")", "[", "]", ",", "."];

pub(super) fn lex(text: &str) -> Result<Vec<Token>, (usize, String)> {
    let mut out = Vec::new();
    let bytes = text.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        let c = bytes[i];
        if c.is_ascii_whitespace() {
            i += 1;
            continue;
        }
        let at = i;
        let kind = if c == b'"' {
            let (s, end) = quoted(text, i)?;
            i = end;
            Kind::String(s)
        } else if c == b'`' {
            let end = text[i + 1..].find('`').ok_or((at, "a raw string is not closed".to_owned()))?;
            i += end + 2;
            Kind::String(text[at + 1..at + 1 + end].to_owned())
        } else if c.is_ascii_digit() || c == b'-' && bytes.get(i + 1).is_some_and(u8::is_ascii_digit) {
            i += 1;
            while bytes.get(i).is_some_and(|c| c.is_ascii_digit() || *c == b'.') {
                i += 1;
            }
            let digits = &text[at..i];
            if digits.contains('.') {
                Kind::Double(digits.parse().map_err(|_| (at, format!("{digits:?} is not a number")))?)
            } else {
                Kind::Int(digits.parse().map_err(|_| (at, format!("{digits:?} is not a 64-bit number")))?)
            }
        } else if c.is_ascii_alphabetic() || c == b'_' {
            while bytes.get(i).is_some_and(|c| c.is_ascii_alphanumeric() || *c == b'_') {
                i += 1;
            }
            Kind::Ident(text[at..i].to_owned())
        } else if let Some(op) = OPS.iter().find(|op| text[i..].starts_with(**op)) {
            i += op.len();
            Kind::Op(op)
        } else {
            let c = text[i..].chars().next().unwrap_or_default();
            return Err((at, format!("unexpected character {c:?}")));
        };
        out.push(Token { at, kind });
    }
    Ok(out)
}

/// A string in double quotes with backslash escapes, and where it ends.
fn quoted(text: &str, start: usize) -> Result<(String, usize), (usize, String)> {
    let mut out = String::new();
    let mut chars = text[start + 1..].char_indices();
    while let Some((i, c)) = chars.next() {
        match c {
            '"' => return Ok((out, start + 1 + i + 1)),
            '\\' => match chars.next().map(|(_, c)| c) {
                Some('n') => out.push('\n'),
                Some('t') => out.push('\t'),
                Some('r') => out.push('\r'),
                Some(c @ ('"' | '\\' | '\'')) => out.push(c),
                _ => return Err((start + 1 + i, "unknown escape".to_owned())),
            },
            c => out.push(c),
        }
    }
    Err((start, "a string is not closed".to_owned()))
}

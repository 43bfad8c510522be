//! Patterns that the dialect has no words for.

use std::collections::BTreeMap;

use super::StringMatch;

/// Envoy refuses a pattern whose program is longer than 100 instructions. A step of the tree takes about seven, and a
/// letter one.
const LONGEST: usize = 80;
const STEP: usize = 7;

/// All names of headers but these (a `*` at the end is all that begin so) and but pseudo-headers, as patterns of which one has to fit. There is no negation, so the
/// words are laid out as a tree that a name has to leave, and the tree is cut where a pattern would be too long.
#[must_use]
pub fn other_than(words: &[&str]) -> Vec<StringMatch> {
    let mut out = Vec::new();
    let words: Vec<&[u8]> = words.iter().map(|w| w.as_bytes()).collect();
    cut(&words, "", &mut out);
    out
}

type Next<'w> = BTreeMap<u8, Vec<&'w [u8]>>;

fn next<'w>(words: &[&'w [u8]]) -> Next<'w> {
    let mut next = Next::new();
    for w in words {
        if let Some((first, rest)) = w.split_first() {
            next.entry(*first).or_default().push(rest);
        }
    }
    next
}

/// Whether a name that came so far has no way on.
fn is_lost(words: &[&[u8]]) -> bool {
    words.contains(&&b"*"[..])
}

fn steps(words: &[&[u8]]) -> usize {
    1 + next(words).values().filter(|rest| !is_lost(rest)).map(|rest| steps(rest)).sum::<usize>()
}

/// Patterns of what begins with `prefix` and leaves the tree behind it.
fn cut(words: &[&[u8]], prefix: &str, out: &mut Vec<StringMatch>) {
    let literal: String = prefix.bytes().map(escaped).collect();
    let root = prefix.is_empty();
    if steps(words) * STEP + prefix.len() <= LONGEST {
        out.push(StringMatch::regex(literal + &leaves(words, root)));
        return;
    }
    let next = next(words);
    out.push(StringMatch::regex(format!("{literal}{}", other(&next, root))));
    if !root && !words.iter().any(|w| w.is_empty()) {
        out.push(StringMatch::exact(prefix));
    }
    for (c, rest) in next.into_iter().filter(|(_, rest)| !is_lost(rest)) {
        cut(&rest, &format!("{prefix}{}", char::from(c)), out);
    }
}

fn leaves(words: &[&[u8]], root: bool) -> String {
    let next = next(words);
    let further = next.iter().filter(|(_, rest)| !is_lost(rest));
    let further = further.map(|(c, rest)| escaped(*c) + &leaves(rest, false));
    let ways: Vec<String> = std::iter::once(other(&next, root)).chain(further).collect();
    // Where a word ends, a name has to go on.
    let must = root || words.iter().any(|w| w.is_empty());
    format!("(?:{}){}", ways.join("|"), if must { "" } else { "?" })
}

/// What goes on as no word does.
fn other(next: &Next<'_>, root: bool) -> String {
    let firsts: String = next.keys().map(|c| escaped(*c)).collect();
    let never = if root { ":" } else { "" };
    if next.is_empty() { ".+".to_owned() } else { format!("[^{firsts}{never}].*") }
}

fn escaped(c: u8) -> String {
    let c = char::from(c);
    if c.is_ascii_alphanumeric() { c.to_string() } else { format!("\\{c}") }
}

#[cfg(test)]
mod tests {
    use super::{super::StringMatchKind, *};

    #[test]
    fn all_names_but_some() {
        let one = |s: &str| vec![StringMatch::regex(s)];
        assert_eq!(
            other_than(&["te", "t-a"]),
            one(r"(?:[^t:].*|t(?:[^\-e].*|\-(?:[^a].*|a(?:.+))?|e(?:.+))?)")
        );
        assert_eq!(other_than(&["te", "t-*"]), one(r"(?:[^t:].*|t(?:[^\-e].*|e(?:.+))?)"));
        assert_eq!(other_than(&["te", "tea"]), one(r"(?:[^t:].*|t(?:[^e].*|e(?:[^a].*|a(?:.+)))?)"));
        let cut = other_than(&["abcdefghijkl"]);
        let want = [StringMatch::regex("[^a:].*"), StringMatch::regex("a[^b].*"), StringMatch::exact("a")];
        assert_eq!(cut[..3], want);
        assert!(
            matches!(&cut[3].kind, StringMatchKind::Regex(r) if r.starts_with("ab(?:[^c].*|c(?:")),
            "{cut:?}"
        );
    }
}

//! Conditions on verified tokens, as conditions on what token authentication noted.
//!
//! A request principal is `iss/sub`. The proxy has the two apart, and issuers hold slashes themselves, so a
//! value is tried with every slash as the one between.

use mesh_model::proxy::{MetadataMatch, Principal, StringMatch, StringMatchKind, ValueMatch};

use super::pattern;
use crate::generate::jwt::PAYLOAD;

const FILTER: &str = "envoy.filters.http.jwt_authn";

/// The condition behind `request.auth.<what>`.
pub(super) fn condition(what: &str) -> Option<Box<dyn Fn(&str) -> Principal>> {
    let list = |path: Vec<String>| -> Option<Box<dyn Fn(&str) -> Principal>> {
        Some(Box::new(move |v| text_or_list(&path, pattern(v))))
    };
    match what {
        "principal" => Some(Box::new(request_principal)),
        "audiences" => list(vec!["aud".to_owned()]),
        "presenter" => list(vec!["azp".to_owned()]),
        _ => list(claim_path(what)?),
    }
}

/// `claims[a][b]` as its path; a dot is part of a name.
fn claim_path(what: &str) -> Option<Vec<String>> {
    let keys = what.strip_prefix("claims[")?.strip_suffix(']')?;
    let path: Vec<String> = keys.split("][").map(str::to_owned).collect();
    path.iter().all(|k| !k.is_empty() && !k.contains(['[', ']'])).then_some(path)
}

fn claim(path: &[String], value: ValueMatch) -> Principal {
    let path = std::iter::once(PAYLOAD.to_owned()).chain(path.iter().cloned()).collect();
    Principal::Metadata(MetadataMatch { filter: FILTER.to_owned(), path, value, invert: false })
}

fn text_or_list(path: &[String], m: StringMatch) -> Principal {
    let text = || ValueMatch::String(m.clone());
    claim(path, ValueMatch::Or(vec![text(), ValueMatch::OneOf(Box::new(text()))]))
}

/// `iss/sub` as a whole equals, begins or ends with a value, or is there at all.
pub(super) fn request_principal(v: &str) -> Principal {
    let both = |iss: StringMatch, sub: StringMatch| {
        let part = |name: &str, m| claim(&[name.to_owned()], ValueMatch::String(m));
        Principal::And(vec![part("iss", iss), part("sub", sub)])
    };
    let something = || StringMatch::regex(".+");
    let splits = |s: &str| -> Vec<(String, String)> {
        s.match_indices('/').map(|(at, _)| (s[..at].to_owned(), s[at + 1..].to_owned())).collect()
    };
    let any = |mut list: Vec<Principal>| match list.len() {
        0 => Principal::Not(Box::new(Principal::Any)),
        1 => list.remove(0),
        _ => Principal::Or(list),
    };
    match pattern(v).kind {
        StringMatchKind::Exact(s) => any(splits(&s)
            .into_iter()
            .map(|(iss, sub)| both(StringMatch::exact(iss), StringMatch::exact(sub)))
            .collect()),
        StringMatchKind::Prefix(s) => {
            let mut list = vec![both(StringMatch::prefix(&s), something())];
            for (iss, sub) in splits(&s) {
                let sub = if sub.is_empty() { something() } else { StringMatch::prefix(sub) };
                list.push(both(StringMatch::exact(iss), sub));
            }
            any(list)
        }
        StringMatchKind::Suffix(s) => {
            let mut list = vec![both(something(), StringMatch::suffix(&s))];
            for (iss, sub) in splits(&s) {
                let iss = if iss.is_empty() { something() } else { StringMatch::suffix(iss) };
                list.push(both(iss, StringMatch::exact(sub)));
            }
            any(list)
        }
        _ => both(something(), something()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claim_names() {
        let path = |s| claim_path(s).map(|p| p.join("|"));
        assert_eq!(path("claims[groups]").as_deref(), Some("groups"));
        assert_eq!(path("claims[a.b][c]").as_deref(), Some("a.b|c"));
        for bad in ["claims", "claims[]", "claims[a", "claims[a]b]", "claims[a][]", "other"] {
            assert_eq!(path(bad), None, "{bad}");
        }
        assert!(condition("nothing").is_none());
    }

    #[test]
    fn principals_with_slashes_in_the_issuer() {
        let both = |iss: &str, sub: &str| {
            let part = |n: &str, v: &str| claim(&[n.to_owned()], ValueMatch::String(StringMatch::exact(v)));
            Principal::And(vec![part("iss", iss), part("sub", sub)])
        };
        assert_eq!(request_principal("me@x/me"), both("me@x", "me"));
        let Principal::Or(l) = request_principal("https://a/b") else { panic!() };
        assert_eq!(l, [both("https:", "/a/b"), both("https:/", "a/b"), both("https://a", "b")]);
        assert_eq!(request_principal("none"), Principal::Not(Box::new(Principal::Any)));
        assert!(matches!(request_principal("*"), Principal::And(_)));
        assert!(matches!(request_principal("a/*"), Principal::Or(l) if l.len() == 2));
        assert!(matches!(request_principal("*/b"), Principal::Or(l) if l.len() == 2));
    }
}

//! Claims of verified tokens as conditions of routes: keys of `headers` and `withoutHeaders` in a VirtualService.

const PREFIX: &str = "@request.auth.claims";

/// What the key of a header condition is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderKey {
    /// A header.
    Header,
    /// A claim by its keys from the outside in: `@request.auth.claims.a.b`, or `@request.auth.claims[a][b]` where dots are
    /// part of names.
    Claim(Vec<String>),
    /// Neither.
    Malformed,
}

impl HeaderKey {
    /// Reads a key.
    #[must_use]
    pub fn of(name: &str) -> Self {
        let Some((head, rest)) = name.split_at_checked(PREFIX.len()) else { return Self::Header };
        if !head.eq_ignore_ascii_case(PREFIX) {
            return Self::Header;
        }
        let keys: Vec<String> = match (rest.strip_prefix('.'), rest.strip_prefix('[')) {
            (Some(dotted), _) => dotted.split('.').map(str::to_owned).collect(),
            (_, Some(bracketed)) => match bracketed.strip_suffix(']') {
                Some(inner) => inner.split("][").map(str::to_owned).collect(),
                None => return Self::Malformed,
            },
            _ => return Self::Malformed,
        };
        let good = |k: &String| !k.is_empty() && !k.contains(['[', ']']);
        if keys.iter().all(good) { Self::Claim(keys) } else { Self::Malformed }
    }
}

#[cfg(test)]
mod tests {
    use super::HeaderKey::{self, Claim, Header, Malformed};

    #[test]
    fn claims_are_told_from_headers() {
        let claim = |keys: &[&str]| Claim(keys.iter().map(|k| (*k).to_owned()).collect());
        for (name, expected) in [
            ("x", Header),
            ("", Header),
            ("@request.auth.claim", Header),
            ("ü@request.auth.claims", Header),
            ("@request.auth.claims.sub", claim(&["sub"])),
            ("@Request.Auth.Claims.Sub", claim(&["Sub"])),
            ("@request.auth.claims.a.b", claim(&["a", "b"])),
            ("@request.auth.claims[a.b][c]", claim(&["a.b", "c"])),
            ("@request.auth.claims", Malformed),
            ("@request.auth.claimsx", Malformed),
            ("@request.auth.claims.", Malformed),
            ("@request.auth.claims..a", Malformed),
            ("@request.auth.claims[", Malformed),
            ("@request.auth.claims[]", Malformed),
            ("@request.auth.claims[a", Malformed),
            ("@request.auth.claims[a]b]", Malformed),
            ("@request.auth.claims[a].b", Malformed),
        ] {
            assert_eq!(HeaderKey::of(name), expected, "{name}");
        }
    }
}

//! What a processor may change of headers, and the changes.

use http::Method;
use mesh_model::proxy as model;
use regex::bytes::Regex;

use super::wire::{How, Mutation};
use crate::{
    config::CompileError,
    http::{
        h1::parse::{is_authority, is_path},
        headers::{HeaderId, Headers},
        message::{RequestHead, ResponseHead},
    },
    matcher,
};

/// Compiled [`model::MutationRules`].
#[derive(Debug)]
pub(super) struct Rules {
    config: model::MutationRules,
    allow: Option<Regex>,
    disallow: Option<Regex>,
}

impl Default for Rules {
    /// Those of a message that is not passing but made.
    fn default() -> Self {
        let config =
            model::MutationRules { allow_all_routing: true, allow_envoy: true, ..Default::default() };
        Self { config, allow: None, disallow: None }
    }
}

/// A change that is an error.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NotAllowed;

impl Rules {
    pub(super) fn new(c: &model::MutationRules) -> Result<Self, CompileError> {
        let compile = |r: &Option<String>| r.as_deref().map(matcher::whole_regex).transpose();
        Ok(Self { allow: compile(&c.allow)?, disallow: compile(&c.disallow)?, config: c.clone() })
    }

    fn allows(&self, name: &str) -> bool {
        let c = &self.config;
        if self.disallow.as_ref().is_some_and(|r| r.is_match(name.as_bytes())) {
            return false;
        }
        if self.allow.as_ref().is_some_and(|r| r.is_match(name.as_bytes())) {
            return true;
        }
        let routing = matches!(name, "host" | ":authority" | ":scheme" | ":method");
        !(c.disallow_all
            || (routing && !c.allow_all_routing)
            || (c.disallow_system && name.starts_with(':'))
            || (!c.allow_envoy && name.starts_with("x-envoy-")))
    }
}

/// Something with headers: names with a colon are told apart.
pub(super) trait Head {
    fn headers(&mut self) -> &mut Headers;
    /// Sets a pseudo-header; false if there is none of that name or the value cannot be one.
    fn set_pseudo(&mut self, name: &str, value: &str) -> bool;
}

impl Head for RequestHead {
    fn headers(&mut self) -> &mut Headers {
        &mut self.headers
    }

    fn set_pseudo(&mut self, name: &str, value: &str) -> bool {
        match name {
            ":authority" | "host" if !value.is_empty() && is_authority(value) => {
                value.clone_into(&mut self.authority);
            }
            ":path" if value.starts_with('/') && is_path(value) => value.clone_into(&mut self.path),
            ":method" => match Method::from_bytes(value.as_bytes()) {
                // How the bytes behind the head are read depends on these.
                Ok(m) if m != Method::CONNECT && self.method != Method::CONNECT => self.method = m,
                _ => return false,
            },
            ":scheme" if matches!(value, "http" | "https") => self.https = value == "https",
            _ => return false,
        }
        true
    }
}

impl Head for ResponseHead {
    fn headers(&mut self) -> &mut Headers {
        &mut self.headers
    }

    fn set_pseudo(&mut self, name: &str, value: &str) -> bool {
        match (name, value.parse::<u16>()) {
            (":status", Ok(s)) if (200..600).contains(&s) => {
                self.status = s;
                true
            }
            _ => false,
        }
    }
}

impl Head for Headers {
    fn headers(&mut self) -> &mut Headers {
        self
    }

    fn set_pseudo(&mut self, _: &str, _: &str) -> bool {
        false
    }
}

/// Applies changes; how many were not allowed and ignored.
pub(super) fn apply(m: &Mutation, rules: &Rules, to: &mut dyn Head) -> Result<u64, NotAllowed> {
    let mut ignored = 0;
    let mut refuse = || {
        ignored += 1;
        if rules.config.disallow_is_error { Err(NotAllowed) } else { Ok(()) }
    };
    // The length is written by whoever knows the body: what a processor says of it changes nothing, and a processor
    // that changes a body has to say something.
    let length = |name: &String| HeaderId::of(name.as_bytes()) == HeaderId::ContentLength;
    for name in m.remove.iter().filter(|n| !length(n)) {
        // Without these there is no message.
        if name.starts_with(':') || name == "host" || !rules.allows(name) || framing(name) {
            refuse()?;
            continue;
        }
        to.headers().remove(name.as_bytes());
    }
    for (how, name, value) in m.set.iter().filter(|(_, n, _)| !length(n)) {
        if !rules.allows(name) {
            refuse()?;
            continue;
        }
        if name.starts_with(':') || name == "host" {
            if !std::str::from_utf8(value).is_ok_and(|v| to.set_pseudo(name, v)) {
                refuse()?;
            }
            continue;
        }
        let n = name.as_bytes();
        let valid = http::HeaderName::from_bytes(n).is_ok() && http::HeaderValue::from_bytes(value).is_ok();
        if !valid || framing(name) {
            refuse()?;
            continue;
        }
        let headers = to.headers();
        match how {
            How::Overwrite => headers.set(n, value),
            How::Append => headers.push(n, value),
        }
    }
    Ok(ignored)
}

/// Names that belong to one connection, and what asks for an answer before the answer: this proxy's to write, whatever
/// the rules say.
fn framing(name: &str) -> bool {
    let id = HeaderId::of(name.as_bytes());
    id.is_hop_by_hop() || id == HeaderId::Expect
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::client;

    fn change(
        rules: model::MutationRules,
        set: &[(&str, &str)],
        remove: &[&str],
    ) -> Result<(String, u64), NotAllowed> {
        let mut h = Headers::default();
        h.push(b"a", b"1");
        h.push(b"x-envoy-b", b"2");
        let mut head = client::head(Method::GET, "host.example", "/", h, 0);
        let m = Mutation {
            set: set.iter().map(|(n, v)| (How::Overwrite, (*n).to_owned(), v.as_bytes().to_vec())).collect(),
            remove: remove.iter().map(|s| (*s).to_owned()).collect(),
        };
        let ignored = apply(&m, &Rules::new(&rules).unwrap(), &mut head)?;
        let mut out = format!("{} {} {}", head.method, head.authority, head.path);
        for (_, n, v) in head.headers.iter() {
            out += &format!(" {}={}", n.escape_ascii(), v.escape_ascii());
        }
        Ok((out, ignored))
    }

    #[test]
    fn rules_say_what_may_be_changed() {
        let none = model::MutationRules::default();
        let all: &[(&str, &str)] = &[
            (":path", "/p"),
            (":method", "POST"),
            ("host", "evil"),
            ("x-envoy-b", "3"),
            ("c", "4"),
            (":x", "1"),
        ];
        let r = change(none.clone(), all, &["a"]).unwrap();
        assert_eq!(r, ("GET host.example /p x-envoy-b=2 c=4".into(), 4));
        let open = model::MutationRules { allow_all_routing: true, allow_envoy: true, ..none.clone() };
        let r = change(open.clone(), all, &[]).unwrap();
        assert_eq!(r, ("POST evil /p a=1 x-envoy-b=3 c=4".into(), 1));
        let closed = model::MutationRules {
            disallow_all: true,
            allow: Some("c|:path".into()),
            disallow: Some(":.*".into()),
            ..none.clone()
        };
        assert_eq!(
            change(closed, all, &["a"]).unwrap(),
            ("GET host.example / a=1 x-envoy-b=2 c=4".into(), 6)
        );
        let system = model::MutationRules { disallow_system: true, ..none.clone() };
        assert_eq!(change(system, &[(":path", "/p")], &[]).unwrap().1, 1);
        let strict = model::MutationRules { disallow_is_error: true, ..none };
        assert_eq!(change(strict, &[("host", "a")], &[]), Err(NotAllowed));
        // Never what frames the message, nor what is none.
        let bad: &[(&str, &str)] = &[
            ("content-length", "1"),
            ("transfer-encoding", "chunked"),
            ("c", "x\r\ny: 1"),
            ("c d", "1"),
            (":path", "no slash"),
            (":method", "CONNECT"),
            (":authority", "a b"),
            (":scheme", "ftp"),
        ];
        let r = change(open, bad, &[":path", "host", "content-length"]).unwrap();
        assert_eq!(r, ("GET host.example / a=1 x-envoy-b=2".into(), 9));
    }

    #[test]
    fn statuses() {
        use crate::http::message::BodyKind;
        let mut r = ResponseHead { status: 200, headers: Headers::default(), body: BodyKind::Empty };
        assert!(r.set_pseudo(":status", "418") && r.status == 418);
        for bad in ["101", "99", "600", "x", ""] {
            assert!(!r.set_pseudo(":status", bad), "{bad}");
        }
    }
}

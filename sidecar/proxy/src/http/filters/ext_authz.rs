//! External authorization (`envoy.filters.http.ext_authz`): somebody else says yes or no.
//!
//! A yes may change the request and the answer, a no brings its own answer. Without either the request is
//! refused, unless the configuration says that it may pass.

pub(crate) mod connection;
pub(super) mod grpc;
mod over_http;

use std::{rc::Rc, sync::Arc, time::Duration};

use mesh_model::proxy as model;
use serde_json::Value;

use super::{Passed, ahead};
use crate::{
    config::{
        CompileError,
        route::{Route, SlotOf},
    },
    http::{
        client,
        downstream::Downstream,
        filtered::Ahead,
        headers::{HeaderId, Headers},
        local_reply::LocalReply,
        message::{BodyKind, RequestHead},
        metadata::{Metadata, MetadataMatcher},
        record::{Flag, Record},
    },
    matcher::StringMatcher,
    upstream::cluster::ClusterSlot,
    worker::connection::Connection,
};

/// Envoy's default for gRPC.
const TIMEOUT: Duration = Duration::from_millis(200);
/// Bytes of an authoriser's answer.
const MAX_ANSWER: usize = 1 << 20;
/// Namespace of what an authoriser says about a request.
const METADATA: &str = "envoy.filters.http.ext_authz";

/// A compiled [`model::ExtAuthz`].
#[derive(Debug)]
pub(crate) struct ExtAuthz {
    config: model::ExtAuthz,
    service: Service,
    allowed: Vec<StringMatcher>,
    disallowed: Vec<StringMatcher>,
    enabled: Option<MetadataMatcher>,
}

#[derive(Debug)]
enum Service {
    Grpc(Arc<ClusterSlot>, model::GrpcService),
    Http(Box<over_http::HttpAuthz>),
}

/// How a header of the request is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Set,
    Append,
    AddIfAbsent,
    OverwriteIfExists,
}

/// A yes.
#[derive(Debug, Default)]
struct Yes {
    headers: Vec<(Change, String, Vec<u8>)>,
    remove: Vec<String>,
    response: Vec<(Change, String, Vec<u8>)>,
    query_set: Vec<(String, String)>,
    query_remove: Vec<String>,
    metadata: Vec<(String, Value)>,
}

impl Yes {
    fn changes_request(&self) -> bool {
        !(self.headers.is_empty()
            && self.remove.is_empty()
            && self.query_set.is_empty()
            && self.query_remove.is_empty())
    }
}

/// A no.
#[derive(Debug)]
struct No {
    status: u16,
    headers: Vec<(Change, String, Vec<u8>)>,
    body: Vec<u8>,
    metadata: Vec<(String, Value)>,
}

#[derive(Debug)]
enum Verdict {
    Yes(Box<Yes>),
    No(Box<No>),
    /// No answer; the reason is for the log.
    Error(String),
}

/// The part of a body that is shown.
struct Body {
    bytes: Vec<u8>,
    as_bytes: bool,
    partial: bool,
    /// `None` without a body being shown.
    asked: bool,
}

impl ExtAuthz {
    pub(crate) fn new(c: &model::ExtAuthz, slot: SlotOf<'_>) -> Result<Self, CompileError> {
        let service = match &c.service {
            model::AuthzService::Grpc(g) => Service::Grpc(slot(&g.cluster), g.clone()),
            model::AuthzService::Http(h) => Service::Http(Box::new(over_http::HttpAuthz::new(h, slot)?)),
        };
        Ok(Self {
            service,
            allowed: StringMatcher::all(&c.allowed_headers)?,
            disallowed: StringMatcher::all(&c.disallowed_headers)?,
            enabled: c.enabled_metadata.as_ref().map(MetadataMatcher::new).transpose()?,
            config: c.clone(),
        })
    }

    /// Whether request bodies are read.
    pub(crate) fn wants_bodies(&self) -> bool {
        self.config.with_request_body.is_some()
    }

    /// Whether a header is shown, where headers that nobody listed are shown or not by `default`.
    fn shows(&self, name: &[u8], default: bool) -> bool {
        let name = name.to_ascii_lowercase();
        let any = |l: &[StringMatcher]| l.iter().any(|m| m.matches(&name));
        !any(&self.disallowed) && (any(&self.allowed) || default)
    }

    /// Whether requests of a route are asked about.
    pub(crate) fn is_on(&self, route: Option<&Route>) -> bool {
        let name = &self.config.on_routes;
        name.is_empty() || route.is_some_and(|r| r.filters.authorizers.contains(name))
    }

    /// Who is asked, for people.
    pub(crate) fn whom(&self) -> String {
        let cluster = match &self.config.service {
            model::AuthzService::Grpc(g) => &g.cluster,
            model::AuthzService::Http(h) => &h.cluster,
        };
        format!("external authorization by {cluster}")
    }

    /// Whether a request of which this was found out is asked about.
    pub(crate) fn asks(&self, found: Option<&Metadata>) -> bool {
        self.enabled.as_ref().is_none_or(|m| m.matches(found))
    }

    pub(crate) async fn run<D: Downstream>(
        &self,
        conn: &Rc<Connection>,
        head: &mut RequestHead,
        on_route: Option<&model::AuthzOverride>,
        down: &D,
        passed: &mut Passed,
        rec: &mut Record,
    ) -> Result<(), LocalReply> {
        let mut settings = self.config.with_request_body;
        let mut extensions = None;
        match on_route {
            Some(model::AuthzOverride::Disabled) => return Ok(()),
            Some(model::AuthzOverride::Check { context_extensions, no_body, with_request_body }) => {
                extensions = Some(context_extensions);
                settings = with_request_body.or(settings).filter(|_| !no_body);
            }
            None => {}
        }
        if self.config.enabled < 1_000_000 && !conn.worker.rng.chance_ppm(self.config.enabled) {
            return Ok(());
        }
        if !self.asks(rec.metadata.as_deref()) {
            return Ok(());
        }
        let body = body(settings, head, down, rec).await?;
        let verdict = match &self.service {
            Service::Grpc(slot, g) => {
                let message = grpc::request(self, conn, head, &body, extensions, rec);
                let limit = g.timeout.filter(|t| !t.is_zero()).unwrap_or(TIMEOUT);
                match client::grpc(&conn.worker, slot, g, grpc::CHECK, &message, limit, MAX_ANSWER).await {
                    Ok(answer) => grpc::verdict(&answer),
                    Err(e) => Verdict::Error(e),
                }
            }
            Service::Http(h) => h.ask(self, conn, head, &body).await,
        };
        self.apply(verdict, head, passed, rec)
    }

    fn apply(
        &self,
        verdict: Verdict,
        head: &mut RequestHead,
        passed: &mut Passed,
        rec: &mut Record,
    ) -> Result<(), LocalReply> {
        match verdict {
            Verdict::Yes(yes) => {
                passed.reroute |= self.config.clear_route_cache && yes.changes_request();
                note(yes.metadata, rec);
                for name in yes.remove.iter().filter(|n| may_change(n.as_bytes())) {
                    head.headers.remove(name.as_bytes());
                }
                change(&mut head.headers, yes.headers);
                query(head, &yes.query_set, &yes.query_remove);
                for (how, name, value) in yes.response {
                    let edits = passed.response.get_or_insert_default();
                    // What the answer holds already is not known yet; a set replaces it.
                    match how {
                        Change::Append => edits.add.push(name.as_bytes(), &value),
                        _ => edits.set.push(name.as_bytes(), &value),
                    }
                }
                Ok(())
            }
            Verdict::No(no) => {
                note(no.metadata, rec);
                rec.flag(Flag::Uaex);
                rec.details = "ext_authz_denied".into();
                let mut headers = Headers::default();
                change(&mut headers, no.headers);
                Err(LocalReply {
                    status: no.status,
                    is_text: !headers.has(HeaderId::ContentType),
                    headers,
                    body: no.body.into(),
                    ..LocalReply::default()
                })
            }
            Verdict::Error(error) => {
                tracing::debug!(%error, "no answer of the authoriser");
                if self.config.failure_mode_allow {
                    if self.config.failure_mode_allow_header_add {
                        head.headers.set(b"x-envoy-auth-failure-mode-allowed", b"true");
                    }
                    return Ok(());
                }
                rec.flag(Flag::Uaex);
                rec.details = "ext_authz_error".into();
                Err(LocalReply { status: self.config.status_on_error, ..LocalReply::default() })
            }
        }
    }
}

/// Reads as much of the body as is to be shown.
async fn body<D: Downstream>(
    settings: Option<model::BodySettings>,
    head: &RequestHead,
    down: &D,
    rec: &mut Record,
) -> Result<Body, LocalReply> {
    let none = Body { bytes: vec![], as_bytes: false, partial: false, asked: false };
    let Some(s) =
        settings.filter(|_| down.bodies().is_some() && !head.opens_tunnel() && head.body != BodyKind::Empty)
    else {
        return Ok(none);
    };
    let limit = s.max_bytes as usize;
    // A filter that shows part of a body need not wait for more than that part.
    let ahead_limit = if s.allow_partial { limit.saturating_sub(1) } else { limit };
    let got = ahead(down, ahead_limit, rec).await?;
    if got == Ahead::More && !s.allow_partial {
        rec.details = "request_payload_too_large".into();
        return Err(LocalReply::text(413, "Payload Too Large"));
    }
    let Some(bodies) = down.bodies() else { return Ok(none) };
    let partial = got == Ahead::More || bodies.len() > limit;
    Ok(Body { bytes: bodies.peek(limit), as_bytes: s.pack_as_bytes, partial, asked: true })
}

fn note(metadata: Vec<(String, Value)>, rec: &mut Record) {
    for (k, v) in metadata {
        rec.metadata.get_or_insert_default().set(METADATA, k, Arc::new(v));
    }
}

/// Headers that decide where a request goes or how it is framed are not an authoriser's to change.
fn may_change(name: &[u8]) -> bool {
    let id = HeaderId::of(name);
    http::HeaderName::from_bytes(name).is_ok()
        && !id.is_hop_by_hop()
        && !matches!(id, HeaderId::Host | HeaderId::ContentLength | HeaderId::Expect)
}

fn change(headers: &mut Headers, changes: Vec<(Change, String, Vec<u8>)>) {
    for (how, name, value) in changes {
        let n = name.as_bytes();
        if !may_change(n) || http::HeaderValue::from_bytes(&value).is_err() {
            continue;
        }
        match how {
            Change::Set => headers.set(n, &value),
            Change::Append => headers.push(n, &value),
            Change::AddIfAbsent if headers.get(n).is_none() => headers.push(n, &value),
            Change::OverwriteIfExists if headers.get(n).is_some() => headers.set(n, &value),
            Change::AddIfAbsent | Change::OverwriteIfExists => {}
        }
    }
}

/// Sets and removes query parameters. What could not stand in a path is left out.
fn query(head: &mut RequestHead, set: &[(String, String)], remove: &[String]) {
    if set.is_empty() && remove.is_empty() {
        return;
    }
    let (path, old) = head.path.split_once('?').unwrap_or((&head.path, ""));
    let gone = |p: &str| {
        let name = p.split_once('=').map_or(p, |(n, _)| n);
        remove.iter().any(|r| r == name) || set.iter().any(|(n, _)| n == name)
    };
    let mut parts: Vec<String> =
        old.split('&').filter(|p| !p.is_empty() && !gone(p)).map(str::to_owned).collect();
    let plain = |s: &str| s.bytes().all(|b| (0x21..0x7f).contains(&b) && !matches!(b, b'#' | b'&' | b'?'));
    parts.extend(set.iter().filter(|(n, v)| plain(n) && plain(v)).map(|(n, v)| format!("{n}={v}")));
    head.path = if parts.is_empty() { path.to_owned() } else { format!("{path}?{}", parts.join("&")) };
}

/// An answer: what is refused has a status that can be sent, and what cannot be read is no yes.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(data: &[u8]) {
    match grpc::verdict(data) {
        // Whatever it changes, it stays one request.
        Verdict::Yes(yes) => {
            let mut head = super::fuzz_head();
            yes.remove
                .iter()
                .filter(|n| may_change(n.as_bytes()))
                .for_each(|n| head.headers.remove(n.as_bytes()));
            change(&mut head.headers, yes.headers);
            query(&mut head, &yes.query_set, &yes.query_remove);
            crate::http::h1::fuzz::forward(&head, &[]);
        }
        Verdict::No(no) => assert!(no.body.len() <= data.len()),
        Verdict::Error(e) => assert!(!e.is_empty()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::client;

    #[test]
    fn changes_keep_the_frame() {
        let mut h = Headers::default();
        h.push(b"a", b"1");
        let c = |how, n: &str, v: &[u8]| (how, n.to_owned(), v.to_vec());
        change(
            &mut h,
            vec![
                c(Change::Append, "a", b"2"),
                c(Change::AddIfAbsent, "a", b"3"),
                c(Change::OverwriteIfExists, "b", b"1"),
                c(Change::Set, "c", b"x\r\ny: 1"),
                c(Change::Set, ":path", b"/admin"),
                c(Change::Set, "Host", b"evil"),
                c(Change::Set, "transfer-encoding", b"chunked"),
                c(Change::Set, "expect", b"tea"),
                c(Change::AddIfAbsent, "d", b"4"),
            ],
        );
        let all: Vec<_> =
            h.iter().map(|(_, n, v)| format!("{}={}", n.escape_ascii(), v.escape_ascii())).collect();
        assert_eq!(all, ["a=1", "a=2", "d=4"]);
    }

    #[test]
    fn query_parameters() {
        let go = |path: &str, set: &[(&str, &str)], remove: &[&str]| {
            let mut head = client::head(http::Method::GET, "a", path, Headers::default(), 0);
            let set: Vec<_> = set.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
            let remove: Vec<_> = remove.iter().map(|s| (*s).to_owned()).collect();
            query(&mut head, &set, &remove);
            head.path
        };
        assert_eq!(go("/a?x=1&y", &[("x", "2")], &["y"]), "/a?x=2");
        assert_eq!(go("/a?x=1", &[], &["x"]), "/a");
        assert_eq!(go("/a", &[("z", "a b"), ("w", "1")], &[]), "/a?w=1");
    }
}

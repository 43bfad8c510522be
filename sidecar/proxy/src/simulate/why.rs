//! Why something was not chosen, in words.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_model::proxy as model;

use crate::{
    config::listener::ConnectionFacts,
    http::{
        message::RequestHead,
        metadata::{Metadata, MetadataMatcher},
    },
    matcher::{HeaderMatcher, QueryMatcher, StringMatcher, header_value, query_value},
};

/// Reasons of one kind that are listed; a mesh may have thousands of virtual hosts.
const MOST: usize = 50;

/// Why something that might have been chosen was not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// `filterChain`, `virtualHost` or `route`.
    pub kind: &'static str,
    /// Its name, or its position.
    pub name: String,
    /// Why.
    pub why: String,
}

#[derive(Default)]
pub(super) struct Reasons {
    list: Vec<Reason>,
}

impl Reasons {
    pub(super) fn done(self) -> Vec<Reason> {
        self.list
    }

    fn push(&mut self, kind: &'static str, name: String, why: String) {
        match self.list.iter().filter(|r| r.kind == kind).count() {
            n if n < MOST => self.list.push(Reason { kind, name, why }),
            MOST => self.list.push(Reason { kind, name: "...".into(), why: "and others".into() }),
            _ => {}
        }
    }

    pub(super) fn chains(
        &mut self,
        l: &model::Listener,
        chosen: Option<&model::FilterChain>,
        f: &ConnectionFacts<'_>,
    ) {
        let by_port =
            l.filter_chains.iter().any(|c| c.matches.destination_port == Some(f.destination.port()));
        for c in l.filter_chains.iter().filter(|c| chosen.is_none_or(|x| x.name != c.name || x != *c)) {
            let why = chain(&c.matches, by_port, f)
                .unwrap_or_else(|| "another chain matches more specifically".to_owned());
            self.push("filterChain", c.name.clone(), why);
        }
    }

    pub(super) fn virtual_hosts(
        &mut self,
        r: &model::RouteConfiguration,
        chosen: Option<&model::VirtualHost>,
        authority: &str,
    ) {
        for v in r.virtual_hosts.iter().filter(|v| chosen.is_none_or(|c| c.name != v.name)) {
            let shown: Vec<_> = v.domains.iter().take(4).map(String::as_str).collect();
            let more = if v.domains.len() > shown.len() { ", ..." } else { "" };
            let why = if v.domains.iter().any(|d| d == "*") {
                "a domain that names the host comes first".to_owned()
            } else {
                format!("no domain of it is {authority}: {}{more}", shown.join(", "))
            };
            self.push("virtualHost", v.name.clone(), why);
        }
    }

    pub(super) fn routes(
        &mut self,
        v: &model::VirtualHost,
        chosen: Option<usize>,
        head: &RequestHead,
        metadata: &Metadata,
    ) {
        for (i, r) in v.routes.iter().enumerate().filter(|(i, _)| Some(*i) != chosen) {
            let name = if r.name.is_empty() { format!("[{i}]") } else { format!("[{i}] {}", r.name) };
            let why = route(&r.matches, head, metadata).unwrap_or_else(|| match chosen {
                Some(c) if c < i => format!("route [{c}] comes first"),
                _ => "TLS is required".to_owned(),
            });
            self.push("route", name, why);
        }
    }
}

fn contains(prefixes: &[IpNet], ip: IpAddr) -> bool {
    prefixes.is_empty() || prefixes.iter().any(|p| p.contains(&ip))
}

fn list<T: ToString>(l: &[T]) -> String {
    l.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn chain(m: &model::FilterChainMatch, by_port: bool, f: &ConnectionFacts<'_>) -> Option<String> {
    let port = f.destination.port();
    match m.destination_port {
        Some(p) if p != port => return Some(format!("it is for port {p}, not {port}")),
        None if by_port => return Some(format!("chains for port {port} come first")),
        _ => {}
    }
    if !contains(&m.destination_prefixes, f.destination.ip()) {
        return Some(format!("it is for {}, not {}", list(&m.destination_prefixes), f.destination.ip()));
    }
    if !m.server_names.is_empty() {
        let Some(sni) = f.sni else {
            return Some(format!(
                "it is for server names {}, and the client names none",
                list(&m.server_names)
            ));
        };
        let fits = |n: &String| match n.strip_prefix('*') {
            Some(suffix) => {
                sni.len() > suffix.len() && sni.to_ascii_lowercase().ends_with(&suffix.to_ascii_lowercase())
            }
            None => n.eq_ignore_ascii_case(sni),
        };
        if !m.server_names.iter().any(fits) {
            return Some(format!("it is for server names {}, not {sni}", list(&m.server_names)));
        }
    }
    match m.transport_protocol {
        Some(model::TransportProtocol::Tls) if !f.tls => return Some("it is for TLS".into()),
        Some(model::TransportProtocol::RawBuffer) if f.tls => return Some("it is for clear text".into()),
        _ => {}
    }
    if !m.application_protocols.is_empty() && !f.alpn.iter().any(|a| m.application_protocols.contains(a)) {
        let given = if f.alpn.is_empty() { "none".to_owned() } else { list(f.alpn) };
        return Some(format!(
            "it is for protocols {}, and the client has {given}",
            list(&m.application_protocols)
        ));
    }
    if !contains(&m.source_prefixes, f.source) {
        return Some(format!("it is for clients in {}, not {}", list(&m.source_prefixes), f.source));
    }
    None
}

/// Why a route does not take a request; `None` if it would.
fn route(m: &model::RouteMatch, head: &RequestHead, metadata: &Metadata) -> Option<String> {
    let path = head.path_only();
    let (given, fold): (String, fn(&str) -> String) = if m.case_sensitive {
        (path.to_owned(), str::to_owned)
    } else {
        (path.to_ascii_lowercase(), |s| s.to_ascii_lowercase())
    };
    match &m.path {
        model::PathMatch::Prefix(p) if !given.starts_with(&fold(p)) => {
            return Some(format!("path {path} does not begin with {p}"));
        }
        model::PathMatch::SegmentPrefix(p)
            if !given
                .strip_prefix(fold(p.trim_end_matches('/')).as_str())
                .is_some_and(|r| r.is_empty() || r.starts_with('/')) =>
        {
            return Some(format!("path {path} does not begin with the segments {p}"));
        }
        model::PathMatch::Exact(p) if given != fold(p) => return Some(format!("path {path} is not {p}")),
        model::PathMatch::Regex(r) => match StringMatcher::new(&model::StringMatch::regex(r.clone())) {
            Ok(m) if m.matches(path.as_bytes()) => {}
            _ => return Some(format!("path {path} does not match the expression {r}")),
        },
        model::PathMatch::Connect if head.method != ::http::Method::CONNECT => {
            return Some("it is for CONNECT".into());
        }
        _ => {}
    }
    for h in &m.headers {
        if HeaderMatcher::new(h).is_ok_and(|m| m.matches(head)) {
            continue;
        }
        let given = header_value(head, h.name.to_ascii_lowercase().as_bytes());
        let given = match &given {
            Some(v) => format!("is {:?}", String::from_utf8_lossy(v)),
            None => "is not there".to_owned(),
        };
        let not = if h.invert { "not " } else { "" };
        let wanted = match &h.value {
            model::HeaderValueMatch::Present(true) => format!("{not}be there"),
            model::HeaderValueMatch::Present(false) => format!("{not}be absent"),
            model::HeaderValueMatch::Value(v) => format!("{not}{}", condition(v)),
        };
        return Some(format!("{} {given}, and must {wanted}", header_name(&h.name)));
    }
    for q in &m.query {
        if QueryMatcher::new(q).is_ok_and(|m| m.matches(head)) {
            continue;
        }
        let given = match head.query().and_then(|all| query_value(all, &q.name)) {
            Some(v) => format!("is {v:?}"),
            None => "is not there".to_owned(),
        };
        let wanted = q.value.as_ref().map_or("be there".to_owned(), condition);
        return Some(format!("query parameter {} {given}, and must {wanted}", q.name));
    }
    for c in &m.metadata {
        if MetadataMatcher::new(c).is_ok_and(|m| m.matches(Some(metadata))) {
            continue;
        }
        let given = match metadata.get(&c.filter, &c.path) {
            Some(v) => format!("is {v}"),
            None => "is not known of this request".to_owned(),
        };
        // The first key is where the filter keeps the whole of it.
        let name = c.path.iter().skip(1).map(|k| format!("[{k}]")).collect::<String>();
        let not = if c.invert { "is what the route is not for" } else { "is not what the route is for" };
        return Some(format!("claim {name} {given}, which {not}"));
    }
    None
}

fn header_name(name: &str) -> String {
    match name {
        ":method" => "the method".to_owned(),
        ":authority" => "the authority".to_owned(),
        ":scheme" => "the scheme".to_owned(),
        ":path" => "the path".to_owned(),
        other => format!("header {other}"),
    }
}

fn condition(m: &model::StringMatch) -> String {
    match &m.kind {
        model::StringMatchKind::Exact(s) => format!("be {s:?}"),
        model::StringMatchKind::Prefix(s) => format!("begin with {s:?}"),
        model::StringMatchKind::Suffix(s) => format!("end with {s:?}"),
        model::StringMatchKind::Contains(s) => format!("contain {s:?}"),
        model::StringMatchKind::Regex(s) => format!("match the expression {s}"),
    }
}

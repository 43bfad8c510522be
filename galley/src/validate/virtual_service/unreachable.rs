//! Rules of a VirtualService that no request reaches, since earlier ones take everything.
//!
//! What Istio tells as `VirtualServiceUnreachableRule` (a rule without effect) and
//! `VirtualServiceIneffectiveMatch` (a match without effect), by the same conditions: a rule without matches
//! before it, the same match before it, or a path prefix that a shorter one before it covers.

use std::collections::{BTreeMap, HashMap};

use mesh_model::authored::{HttpMatchRequest, HttpRoute, StringMatch, VirtualService};
use serde::Serialize;

use crate::{path::Path, validate::common::Findings};

const UNREACHABLE: &str = "IST0130";
const INEFFECTIVE: &str = "IST0131";

pub(super) fn check(vs: &VirtualService, p: &Path<'_>, out: &mut Findings) {
    let names: Vec<&str> = vs.http.iter().map(|r| r.name.as_str()).collect();
    let http = p.key("http");
    let plain = |m: &HttpMatchRequest| HttpMatchRequest { name: String::new(), ..m.clone() };
    let matches: Vec<Vec<String>> =
        vs.http.iter().map(|r| r.matches.iter().map(|m| text(&plain(m))).collect()).collect();
    let everything: Vec<bool> = vs.http.iter().map(|r| r.matches.iter().any(matches_everything)).collect();
    list(&matches, &everything, &names, &http, out);
    let last = everything.iter().position(|e| *e).map_or(vs.http.len(), |i| i + 1);
    prefixes(&vs.http[..last], &names, &http, out);
    let tls: Vec<Vec<String>> = vs.tls.iter().map(|r| r.matches.iter().map(text).collect()).collect();
    list(&tls, &[], &[], &p.key("tls"), out);
    let tcp: Vec<Vec<String>> = vs.tcp.iter().map(|r| r.matches.iter().map(text).collect()).collect();
    list(&tcp, &[], &[], &p.key("tcp"), out);
}

fn text<T: Serialize>(m: &T) -> String {
    serde_json::to_string(m).unwrap_or_default()
}

/// The rule by its name, or by its place.
fn called(names: &[&str], i: usize) -> String {
    match names.get(i) {
        Some(n) if !n.is_empty() => format!("{n:?}"),
        _ => format!("#{i}"),
    }
}

/// A match that has no condition but, at most, the path prefix of every path.
fn matches_everything(m: &HttpMatchRequest) -> bool {
    let all = HttpMatchRequest { uri: m.uri.clone(), name: m.name.clone(), ..HttpMatchRequest::default() };
    let any_path = match &m.uri {
        None | Some(StringMatch::Present) => true,
        Some(StringMatch::Prefix(prefix)) => prefix == "/",
        Some(_) => false,
    };
    *m == all && any_path
}

fn list(rules: &[Vec<String>], everything: &[bool], names: &[&str], p: &Path<'_>, out: &mut Findings) {
    let mut seen: HashMap<&str, usize> = HashMap::new();
    let mut takes_all: Option<usize> = None;
    for (i, matches) in rules.iter().enumerate() {
        let at = p.index(i);
        if let Some(before) = takes_all {
            out.coded(
                UNREACHABLE,
                &at,
                format!(
                    "never reached: rule {} before it matches everything; move that one to the end",
                    called(names, before)
                ),
            );
            continue;
        }
        if matches.is_empty() {
            takes_all = Some(i);
            continue;
        }
        let mut duplicates = 0;
        for (j, m) in matches.iter().enumerate() {
            if let Some(before) = seen.get(m.as_str()) {
                duplicates += 1;
                let at = at.key("match");
                out.coded(
                    INEFFECTIVE,
                    &at.index(j),
                    format!("without effect: rule {} has the same match; remove one", called(names, *before)),
                );
            } else {
                seen.insert(m, i);
            }
        }
        if duplicates == matches.len() {
            out.coded(UNREACHABLE, &at, "never reached: rules before it have all of its matches".into());
        }
        if everything.get(i) == Some(&true) {
            takes_all = Some(i);
        }
    }
}

/// What two matches on a path prefix are compared by. Conditions that cannot be compared as text count as any.
struct Prefix<'a> {
    rule: usize,
    index: usize,
    path: &'a str,
    port: u32,
    method: String,
    authority: String,
    maps: [BTreeMap<&'a str, String>; 3],
}

impl<'a> Prefix<'a> {
    fn of(rule: usize, index: usize, m: &'a HttpMatchRequest) -> Option<Self> {
        let Some(StringMatch::Prefix(path)) = &m.uri else { return None };
        if path.is_empty() {
            return None;
        }
        let map = |m: &'a BTreeMap<String, StringMatch>| {
            m.iter().map(|(k, v)| (k.as_str(), shown(Some(v)))).collect()
        };
        let method = shown(m.method.as_ref());
        Some(Self {
            rule,
            index,
            path,
            port: m.port,
            method: if method.is_empty() { "=GET".into() } else { method },
            authority: shown(m.authority.as_ref()),
            maps: [map(&m.headers), map(&m.query_params), map(&m.without_headers)],
        })
    }

    /// Whether everything that `later` matches is matched by this one.
    fn covers(&self, later: &Self) -> bool {
        let value = |a: &str, b: &str| a == b || a.starts_with(b);
        later.path.starts_with(self.path)
            && later.port == self.port
            && value(&self.method, &later.method)
            && value(&self.authority, &later.authority)
            && self.maps.iter().zip(&later.maps).all(|(a, b)| {
                a.len() == b.len() && a.iter().all(|(k, v)| b.get(k).is_some_and(|w| value(v, w)))
            })
    }
}

fn shown(m: Option<&StringMatch>) -> String {
    match m {
        Some(StringMatch::Exact(s)) if !s.is_empty() => format!("={s}"),
        Some(StringMatch::Prefix(s)) if !s.is_empty() => format!("^{s}"),
        _ => String::new(),
    }
}

/// Longest list that is compared pair by pair.
const MAX_PREFIXES: usize = 1_000;

fn prefixes(rules: &[HttpRoute], names: &[&str], p: &Path<'_>, out: &mut Findings) {
    let all: Vec<Prefix<'_>> = (rules.iter().enumerate())
        .flat_map(|(i, r)| r.matches.iter().enumerate().filter_map(move |(j, m)| Prefix::of(i, j, m)))
        .take(MAX_PREFIXES)
        .collect();
    for (n, later) in all.iter().enumerate() {
        let Some(before) = all[..n].iter().find(|b| b.path != later.path && b.covers(later)) else {
            continue;
        };
        let at = p.index(later.rule);
        let at = at.key("match");
        out.coded(
            INEFFECTIVE,
            &at.index(later.index),
            format!(
                "without effect: prefix {:?} is covered by prefix {:?} of rule {} before it; put the longer prefix first",
                later.path,
                before.path,
                called(names, before.rule)
            ),
        );
    }
}

//! Token authentication (`envoy.filters.http.jwt_authn`).
//!
//! - The first rule that matches decides; without one a request passes unseen.
//! - Every token found at a provider's places must be valid: a request with a good and a bad one would pass,
//!   and who comes next might believe the bad one.
//! - "Missing is allowed" means no token at all: one of an unknown issuer is refused.
//! - Headers that carry claims onward belong to this filter: what a client sends under their names is removed.
//! - A verified token is remembered by its worker until it expires or the keys change, so that the next request
//!   with it costs a lookup. Keys that expire are renewed by one request while the others go on.

pub(crate) mod cache;
mod keys;
mod remote;
mod token;

use std::{
    borrow::Cow,
    collections::HashMap,
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::Method;
use mesh_model::proxy as model;

use self::{
    cache::Verified,
    keys::KeySet,
    remote::Remote,
    token::{Claims, Status},
};
use super::super::{
    headers::HeaderId,
    local_reply::LocalReply,
    message::RequestHead,
    metadata::JWT,
    record::{Flag, Record},
};
use crate::{
    config::{
        CompileError,
        route::{Route, SlotOf},
    },
    matcher::{StringMatcher, cookie, query_value},
    upstream::host::unique_id,
    worker::{Worker, connection::Connection},
};

/// Requirements nest as their author wrote them; deeper than this is refused.
const MAX_DEPTH: usize = 16;
/// Longest part of a request's URI that a challenge repeats.
const MAX_REALM: usize = 256;

/// A compiled [`model::JwtAuthn`].
#[derive(Debug)]
pub(crate) struct JwtAuthn {
    providers: Vec<Provider>,
    rules: Vec<(Route, Option<Requirement>)>,
    named: HashMap<String, Requirement>,
    bypass_cors_preflight: bool,
}

#[derive(Debug)]
struct Provider {
    /// Key of its verified tokens.
    id: u64,
    config: model::JwtProvider,
    subjects: Option<StringMatcher>,
    audiences: Vec<String>,
    places: Vec<Place>,
    keys: Keys,
}

#[derive(Debug)]
enum Keys {
    /// `None`: no key in it can be used, and no token is valid.
    Local(Option<Arc<KeySet>>),
    Remote(Box<Remote>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Header { name: String, prefix: String },
    Param(String),
    Cookie(String),
}

#[derive(Debug)]
enum Requirement {
    Provider(usize, Option<Vec<String>>),
    Any(Vec<Requirement>, Bypass),
    All(Vec<Requirement>),
    Bypass(Bypass),
    Always,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bypass {
    No,
    Missing,
    Failed,
}

/// A verified token of the request and where it was.
struct Good {
    provider: usize,
    place: Place,
    token: Arc<Verified>,
}

/// Evaluation stops until a provider has keys.
struct Wait(usize);

/// A request under evaluation.
struct Request<'a> {
    worker: &'a Worker,
    head: &'a RequestHead,
    now: u64,
    /// Providers whose keys could not be fetched for this request.
    failed: &'a [usize],
}

impl JwtAuthn {
    pub(crate) fn new(c: &model::JwtAuthn, slot: SlotOf<'_>) -> Result<Self, CompileError> {
        let names: HashMap<&str, usize> =
            c.providers.keys().enumerate().map(|(i, n)| (n.as_str(), i)).collect();
        let providers =
            c.providers.iter().map(|(n, p)| Provider::new(n, p, slot)).collect::<Result<Vec<_>, _>>()?;
        let named = c
            .requirements
            .iter()
            .map(|(n, r)| Ok((n.clone(), Requirement::new(r, &names, 0)?)))
            .collect::<Result<HashMap<_, _>, CompileError>>()?;
        let rules = c
            .rules
            .iter()
            .map(|r| {
                let requires = match &r.requires {
                    model::JwtRequires::Nothing => None,
                    model::JwtRequires::Inline(r) => Some(Requirement::new(r, &names, 0)?),
                    model::JwtRequires::Named(n) => {
                        let r = c.requirements.get(n).ok_or_else(|| CompileError::Jwt(unknown(n)))?;
                        Some(Requirement::new(r, &names, 0)?)
                    }
                };
                Ok((Route::condition(&r.matches)?, requires))
            })
            .collect::<Result<_, CompileError>>()?;
        Ok(Self { providers, rules, named, bypass_cors_preflight: c.bypass_cors_preflight })
    }

    /// Position of the rule that decides about a request.
    pub(crate) fn rule(&self, head: &RequestHead) -> Option<usize> {
        self.rules.iter().position(|(m, _)| m.matches(head, None))
    }

    /// What a request must show; `Err` is a name on the route that nobody defined.
    fn requirement(
        &self,
        head: &RequestHead,
        on_route: Option<&model::JwtOverride>,
    ) -> Result<Option<&Requirement>, Status> {
        match on_route {
            Some(model::JwtOverride::Disabled) => Ok(None),
            Some(model::JwtOverride::Named(n)) => self.named.get(n).map(Some).ok_or(Status::NoRequirement),
            None => Ok(self.rules.iter().find(|(m, _)| m.matches(head, None)).and_then(|(_, r)| r.as_ref())),
        }
    }

    fn check(&self, r: &Requirement, q: &Request<'_>, good: &mut Vec<Good>) -> Result<Status, Wait> {
        match r {
            Requirement::Always => Ok(Status::Ok),
            Requirement::Provider(i, audiences) => self.verify(*i, audiences.as_deref(), q, good),
            Requirement::All(l) => {
                for r in l {
                    let s = self.check(r, q, good)?;
                    if s != Status::Ok {
                        return Ok(s);
                    }
                }
                Ok(Status::Ok)
            }
            Requirement::Any(l, bypass) => {
                // A real failure says more than a token of somebody else, and that more than none.
                let mut worst = Status::Missing;
                for r in l {
                    let before = good.len();
                    let s = self.check(r, q, good)?;
                    if s == Status::Ok {
                        return Ok(s);
                    }
                    if worst == Status::Missing || !matches!(s, Status::Missing | Status::UnknownIssuer) {
                        worst = s;
                    }
                    good.truncate(before);
                }
                Ok(match bypass {
                    Bypass::Failed => Status::Ok,
                    Bypass::Missing if worst == Status::Missing => Status::Ok,
                    _ => worst,
                })
            }
            Requirement::Bypass(bypass) => {
                let status = self.verify_all(q, good)?;
                Ok(if *bypass == Bypass::Failed || status == Status::Missing { Status::Ok } else { status })
            }
        }
    }

    /// Verifies the tokens at all providers' places, each by a provider that looks there.
    fn verify_all(&self, q: &Request<'_>, good: &mut Vec<Good>) -> Result<Status, Wait> {
        let mut status = Status::Missing;
        for (n, p) in self.providers.iter().enumerate() {
            for place in &p.places {
                if self.providers[..n].iter().any(|before| before.places.contains(place)) {
                    continue;
                }
                let mut wait = None;
                let s = place.tokens(q.head, &mut |token| {
                    let mut s = Status::UnknownIssuer;
                    for (i, p) in self.providers.iter().enumerate().filter(|(_, p)| p.places.contains(place))
                    {
                        match p.token(token, None, q, q.failed.contains(&i)) {
                            Ok(Ok(token)) => {
                                good.push(Good { provider: i, place: place.clone(), token });
                                return Status::Ok;
                            }
                            Ok(Err(Status::UnknownIssuer)) => {}
                            Ok(Err(e)) => s = e,
                            Err(NoKeys) => wait = Some(i),
                        }
                    }
                    s
                });
                if let Some(i) = wait {
                    return Err(Wait(i));
                }
                match s {
                    None => {}
                    Some(Status::Ok) => status = Status::Ok,
                    Some(s) => return Ok(s),
                }
            }
        }
        Ok(status)
    }

    /// Verifies all tokens at a provider's places.
    fn verify(
        &self,
        i: usize,
        audiences: Option<&[String]>,
        q: &Request<'_>,
        good: &mut Vec<Good>,
    ) -> Result<Status, Wait> {
        let Some(p) = self.providers.get(i) else { return Ok(Status::UnknownIssuer) };
        let mut status = Status::Missing;
        for place in &p.places {
            let mut waits = false;
            let mut each = |token: &str| match p.token(token, audiences, q, q.failed.contains(&i)) {
                Ok(Ok(token)) => {
                    good.push(Good { provider: i, place: place.clone(), token });
                    Status::Ok
                }
                Ok(Err(s)) => s,
                Err(NoKeys) => {
                    waits = true;
                    Status::FetchFailed
                }
            };
            let s = place.tokens(q.head, &mut each);
            if waits {
                return Err(Wait(i));
            }
            match s {
                None => {}
                Some(Status::Ok) => status = Status::Ok,
                Some(s) => return Ok(s),
            }
        }
        Ok(status)
    }

    /// Lets a request pass, with what its tokens say, or answers it; whether the route is to be looked for again.
    pub(crate) async fn run(
        &self,
        conn: &Rc<Connection>,
        head: &mut RequestHead,
        on_route: Option<&model::JwtOverride>,
        rec: &mut Record,
    ) -> Result<bool, LocalReply> {
        // Whatever the rules say about this request, nobody behind must take these for claims.
        for p in &self.providers {
            for h in std::iter::once(&p.config.forward_payload_header)
                .chain(p.config.claim_to_headers.iter().map(|c| &c.header))
                .filter(|h| !h.is_empty())
            {
                head.headers.remove(h.as_bytes());
            }
        }
        if self.bypass_cors_preflight
            && head.method == Method::OPTIONS
            && head.headers.get_id(HeaderId::Origin).is_some_and(|v| !v.is_empty())
            && head.headers.get_id(HeaderId::AccessControlRequestMethod).is_some_and(|v| !v.is_empty())
        {
            return Ok(false);
        }
        let requirement = match self.requirement(head, on_route) {
            Ok(None) => return Ok(false),
            Ok(Some(r)) => r,
            Err(s) => return Err(denied(head, s, rec)),
        };
        let (mut failed, mut waits) = (Vec::new(), 0);
        let (status, good) = loop {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
            let mut good = Vec::new();
            let q = Request { worker: &conn.worker, head, now, failed: &failed };
            match self.check(requirement, &q, &mut good) {
                Ok(s) => break (s, good),
                Err(Wait(i)) => {
                    waits += 1;
                    let there = match self.providers.get(i).map(|p| &p.keys) {
                        Some(Keys::Remote(r)) => Box::pin(r.wait(&conn.worker)).await,
                        _ => false,
                    };
                    // Keys that expire as fast as they come are as good as none.
                    if !there || waits > 2 * self.providers.len() {
                        failed.push(i);
                    }
                }
            }
        };
        for p in &self.providers {
            if let Keys::Remote(r) = &p.keys {
                r.renew_ahead(&conn.worker);
            }
        }
        if status != Status::Ok {
            return Err(denied(head, status, rec));
        }
        let mut reroute = false;
        for g in &good {
            reroute |= self.pass_on(g, head, rec);
        }
        Ok(reroute)
    }

    /// Writes what a token says into the request and its metadata; whether routes are to see that.
    fn pass_on(&self, g: &Good, head: &mut RequestHead, rec: &mut Record) -> bool {
        let Some(p) = self.providers.get(g.provider).map(|p| &p.config) else { return false };
        if !p.forward_payload_header.is_empty() {
            let mut payload = g.token.payload_base64.to_string();
            if p.pad_forward_payload_header {
                payload.extend(std::iter::repeat_n('=', (4 - payload.len() % 4) % 4));
            }
            head.headers.push(p.forward_payload_header.as_bytes(), payload.as_bytes());
        }
        for c in &p.claim_to_headers {
            let claim = c.claim.split('.').try_fold(&*g.token.payload, |v, key| v.get(key));
            if let Some(text) = claim.and_then(token::primitive) {
                // A claim may hold anything; what ends a line or a header must not reach one.
                if http::HeaderValue::from_str(&text).is_ok() {
                    head.headers.push(c.header.as_bytes(), text.as_bytes());
                }
            }
        }
        if !p.forward {
            g.place.remove(head);
        }
        if !p.payload_in_metadata.is_empty() {
            rec.metadata.get_or_insert_default().set(
                JWT,
                p.payload_in_metadata.clone(),
                Arc::clone(&g.token.metadata),
            );
        }
        p.clear_route_cache && !(p.payload_in_metadata.is_empty() && p.claim_to_headers.is_empty())
    }
}

fn unknown(name: &str) -> String {
    format!("requirement or provider {name:?} is not defined")
}

impl Requirement {
    fn new(
        r: &model::JwtRequirement,
        names: &HashMap<&str, usize>,
        depth: usize,
    ) -> Result<Self, CompileError> {
        use model::JwtRequirement as R;
        if depth > MAX_DEPTH {
            return Err(CompileError::Jwt(format!("requirements are nested deeper than {MAX_DEPTH}")));
        }
        let provider = |n: &str| names.get(n).copied().ok_or_else(|| CompileError::Jwt(unknown(n)));
        let list = |l: &[R]| l.iter().map(|r| Self::new(r, names, depth + 1)).collect::<Result<Vec<_>, _>>();
        Ok(match r {
            R::Provider(n) => Self::Provider(provider(n)?, None),
            R::ProviderWithAudiences(n, a) => {
                let audiences = a.iter().map(|a| token::audience(a).to_owned()).collect::<Vec<_>>();
                Self::Provider(provider(n)?, (!audiences.is_empty()).then_some(audiences))
            }
            R::Any(l) => {
                let bypass = match (l.contains(&R::AllowMissingOrFailed), l.contains(&R::AllowMissing)) {
                    (true, _) => Bypass::Failed,
                    (false, true) => Bypass::Missing,
                    (false, false) => Bypass::No,
                };
                let mut l = list(l)?;
                l.retain(|r| !matches!(r, Self::Bypass(_)));
                // Only a bypass is left: it is about every provider.
                if l.is_empty() { Self::Bypass(bypass) } else { Self::Any(l, bypass) }
            }
            R::All(l) => Self::All(list(l)?),
            R::AllowMissing => Self::Bypass(Bypass::Missing),
            R::AllowMissingOrFailed => Self::Bypass(Bypass::Failed),
            R::Always => Self::Always,
        })
    }
}

/// The provider has no keys yet.
struct NoKeys;

impl Provider {
    fn new(name: &str, c: &model::JwtProvider, slot: SlotOf<'_>) -> Result<Self, CompileError> {
        let bad = |e: String| CompileError::Jwt(format!("provider {name:?}: {e}"));
        let set = |text: &str| match KeySet::parse(text) {
            Ok(k) => Keys::Local(Some(Arc::new(k))),
            Err(error) => {
                tracing::warn!(provider = name, %error, "tokens cannot be verified");
                Keys::Local(None)
            }
        };
        let keys = match &c.jwks {
            model::JwksSource::Inline(text) => set(text),
            model::JwksSource::File(path) => {
                set(&std::fs::read_to_string(path).map_err(|e| bad(format!("{path:?}: {e}")))?)
            }
            model::JwksSource::Remote(r) => {
                Keys::Remote(Box::new(Remote::new(r, slot(&r.cluster)).map_err(bad)?))
            }
        };
        let mut places: Vec<Place> = c
            .from_headers
            .iter()
            .map(|h| Place::Header { name: h.name.clone(), prefix: h.value_prefix.clone() })
            .chain(c.from_params.iter().cloned().map(Place::Param))
            .chain(c.from_cookies.iter().cloned().map(Place::Cookie))
            .collect();
        if places.is_empty() {
            places.push(Place::Header { name: "authorization".into(), prefix: "Bearer ".into() });
            places.push(Place::Param("access_token".into()));
        }
        for h in std::iter::once(&c.forward_payload_header)
            .chain(c.claim_to_headers.iter().map(|c| &c.header))
            .filter(|h| !h.is_empty())
        {
            if http::HeaderName::from_bytes(h.as_bytes()).is_err() {
                return Err(CompileError::Header(h.clone()));
            }
        }
        Ok(Self {
            id: unique_id(),
            subjects: c.subjects.as_ref().map(StringMatcher::new).transpose()?,
            audiences: c.audiences.iter().map(|a| token::audience(a).to_owned()).collect(),
            config: c.clone(),
            places,
            keys,
        })
    }

    fn token(
        &self,
        raw: &str,
        audiences: Option<&[String]>,
        q: &Request<'_>,
        fetch_failed: bool,
    ) -> Result<Result<Arc<Verified>, Status>, NoKeys> {
        let generation = match &self.keys {
            Keys::Local(_) => 0,
            Keys::Remote(r) => r.generation(),
        };
        let known = q.worker.tokens.borrow_mut().get(self.id, generation, raw);
        if let Some(v) = known {
            return Ok(self.constraints(&v.claims, audiences, q.now).map(|()| v));
        }
        let parsed = match token::parse(raw) {
            Ok(p) => p,
            Err(s) => return Ok(Err(s)),
        };
        if let Err(s) = self.constraints(&parsed.claims, audiences, q.now) {
            return Ok(Err(s));
        }
        let (keys, generation) = match &self.keys {
            Keys::Local(Some(k)) => (Arc::clone(k), 0),
            Keys::Local(None) => return Ok(Err(Status::NoKeys)),
            Keys::Remote(r) => match r.keys() {
                Some(k) => k,
                None if fetch_failed => return Ok(Err(Status::FetchFailed)),
                None => return Err(NoKeys),
            },
        };
        if let Err(s) = keys.verify(&parsed) {
            return Ok(Err(s));
        }
        let verified = Arc::new(parsed.into_verified(&self.config.space_delimited_claims));
        q.worker.tokens.borrow_mut().put(self.id, generation, raw, &verified, q.now);
        Ok(Ok(verified))
    }

    /// Issuer, subject, time and audience, in Envoy's order.
    fn constraints(&self, c: &Claims, audiences: Option<&[String]>, now: u64) -> Result<(), Status> {
        let p = &self.config;
        if !p.issuer.is_empty() && p.issuer != c.issuer {
            return Err(Status::UnknownIssuer);
        }
        if self.subjects.as_ref().is_some_and(|m| !m.matches(c.subject.as_bytes())) {
            return Err(Status::Verification);
        }
        let skew = if p.clock_skew.is_zero() { Duration::from_secs(60) } else { p.clock_skew }.as_secs();
        if c.not_before.is_some_and(|t| now.saturating_add(skew) < t) {
            return Err(Status::NotYetValid);
        }
        match (c.expires, p.max_lifetime) {
            (Some(t), _) if now > t.saturating_add(skew) => return Err(Status::Expired),
            (Some(t), Some(max)) if t > now.saturating_add(max.as_secs()).saturating_add(skew) => {
                return Err(Status::Expired);
            }
            (None, Some(_)) => return Err(Status::Expired),
            (None, None) if p.require_expiration => return Err(Status::Expired),
            _ => {}
        }
        let allowed = audiences.unwrap_or(&self.audiences);
        if !allowed.is_empty() && !c.audiences.iter().any(|a| allowed.iter().any(|b| b == token::audience(a)))
        {
            return Err(Status::Audience);
        }
        Ok(())
    }
}

impl Place {
    /// Visits the tokens here; the first that is not good ends it.
    fn tokens(&self, head: &RequestHead, each: &mut dyn FnMut(&str) -> Status) -> Option<Status> {
        match self {
            Self::Header { name, prefix } => {
                let mut found = None;
                for value in head.headers.values(name.as_bytes()) {
                    // Neither UTF-8 nor a token, yet not nothing: it must not pass for a missing one.
                    let text = String::from_utf8_lossy(value);
                    let token = if prefix.is_empty() {
                        text.as_ref()
                    } else {
                        let Some(at) = text.find(prefix.as_str()) else { continue };
                        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
                        let rest = &text[at + prefix.len()..];
                        rest.find(legal).map_or(text.as_ref(), |at| &rest[at..])
                    };
                    let s = each(token);
                    found = Some(s);
                    if s != Status::Ok {
                        break;
                    }
                }
                found
            }
            Self::Param(name) => {
                let value = head.query().and_then(|q| query_value(q, name))?;
                Some(each(value))
            }
            Self::Cookie(name) => Some(each(cookie(&head.headers, name)?)),
        }
    }

    /// Takes the token out of the request; cookies stay, as in Envoy.
    fn remove(&self, head: &mut RequestHead) {
        match self {
            Self::Header { name, .. } => head.headers.remove(name.as_bytes()),
            Self::Param(name) => {
                let Some((path, query)) = head.path.split_once('?') else { return };
                let keep: Vec<&str> =
                    query.split('&').filter(|p| p.split_once('=').map_or(*p, |(n, _)| n) != name).collect();
                head.path =
                    if keep.is_empty() { path.to_owned() } else { format!("{path}?{}", keep.join("&")) };
            }
            Self::Cookie(_) => {}
        }
    }
}

/// 401 with a challenge (RFC 6750 section 3), or 403 for a token for somebody else.
fn denied(head: &RequestHead, status: Status, rec: &mut Record) -> LocalReply {
    rec.flag(Flag::Uaex);
    let details: String = status.text().chars().map(|c| if c.is_whitespace() { '_' } else { c }).collect();
    rec.details = Cow::Owned(format!("jwt_authn_access_denied{{{details}}}"));
    let code = if status == Status::Audience { 403 } else { 401 };
    let mut reply = LocalReply::text(code, status.text());
    let scheme = if head.https { "https" } else { "http" };
    let path: String = head.path.chars().filter(|c| !matches!(c, '"' | '\\')).take(MAX_REALM).collect();
    let mut challenge = format!("Bearer realm=\"{scheme}://{}{path}\"", head.authority);
    if status != Status::Missing {
        challenge.push_str(", error=\"invalid_token\"");
    }
    reply.headers.push(b"www-authenticate", challenge.as_bytes());
    reply
}

/// The header and claims of a token, or a key set behind an empty line: a token is what its parts say, and no key set of
/// a stranger says yes to it.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(data: &[u8]) {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (first, rest) = text.split_once('\n').unwrap_or((text, ""));
    let (second, keys) = rest.split_once('\n').unwrap_or((rest, first));
    let built = format!("{}.{}.AAAA", URL_SAFE_NO_PAD.encode(first), URL_SAFE_NO_PAD.encode(second));
    for raw in [first, built.as_str()] {
        let Ok(t) = token::parse(raw) else { continue };
        assert!(raw.starts_with(t.signed) && raw.split('.').count() == 3);
        assert!(t.claims.expires.is_none_or(|e| serde_json::to_string(&e).is_ok()));
        if let Ok(set) = KeySet::parse(keys) {
            assert!(set.verify(&t).is_err(), "a signature of three zero bytes");
        }
        let claims = t.claims.clone();
        let v = t.into_verified(&["scope".to_owned()]);
        assert_eq!(v.claims, claims);
        assert!(v.payload.is_object() && v.metadata.is_object());
        let again = URL_SAFE_NO_PAD.decode(v.payload_base64.as_bytes()).unwrap();
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&again).unwrap(), *v.payload);
    }
    let _ = KeySet::parse(text);
}

#[cfg(test)]
mod tests;

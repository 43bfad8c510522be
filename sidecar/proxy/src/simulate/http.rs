//! A request: prepared, routed, filtered and acted upon, in the order of `http::service`.

use std::time::Duration;

use ::http::Method;
use base64::Engine as _;
use mesh_model::proxy as model;
use serde_json::Value;

use super::{Action, Request, Simulation, Unusable, compile_routes, policy};
use crate::{
    config::{
        listener::{Chain, HttpFilter, HttpManager},
        route::{Action as RouteAction, Forward, Found, Route, VirtualHost},
    },
    http::{
        filters::{cross_origin, cross_origin_headers, session},
        headers::{HeaderId, Headers},
        local_reply::http_of_grpc,
        message::{BodyKind, RequestHead, Version},
        metadata::{JWT, Metadata, RBAC},
        path,
        router::{Limits, Rewrite},
        service::{location, redirect_to_tls, underscores},
    },
};

/// Retries of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retries {
    /// Tries beyond the first.
    pub attempts: u32,
    /// Limit of each try.
    pub per_try_timeout: Option<Duration>,
    /// Conditions.
    pub on: Vec<model::RetryOn>,
    /// Status codes that are a condition.
    pub status_codes: Vec<u16>,
}

/// What filters said so far.
#[derive(Default)]
struct Said {
    metadata: Metadata,
    response: Headers,
    /// The filter that is asked next.
    next: usize,
}

/// A shadow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirrored {
    /// Where it goes.
    pub cluster: String,
    /// Share of requests in 1/1,000,000.
    pub fraction: u32,
}

/// Faults of the route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultSeen {
    /// Delay and share in 1/1,000,000.
    pub delay: Option<(Duration, u32)>,
    /// Status of the answer and share in 1/1,000,000.
    pub abort: Option<(u16, u32)>,
}

/// A session that stays on a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionSeen {
    /// `cookie` or `header`.
    pub by: &'static str,
    /// Name of that.
    pub name: String,
    /// Path of a cookie; empty otherwise.
    pub path: String,
    /// How long a cookie lasts; `None` is until the client ends.
    pub max_age: Option<Duration>,
    /// When the session ends, whatever the client does.
    pub absolute: Option<Duration>,
    /// The host that the request asks for, if it gets it.
    pub host: Option<String>,
}

/// What an answer of the proxy's own looks like.
struct Answer {
    action: Action,
    status: u16,
    detail: String,
}

impl Simulation<'_> {
    pub(super) fn request(&mut self, chain: &Chain, manager: &HttpManager) -> Result<(), Unusable> {
        let Some(request) = self.arrival.request.clone() else {
            self.out.detail = "the chain speaks HTTP; without a request nothing more can be said".into();
            return Ok(());
        };
        let Some(mut head) = head(&request) else {
            self.answer(Action::Refuse, 400, "not a valid request");
            return Ok(());
        };
        let config = &manager.config;
        self.suppress = config.headers.suppress_envoy;
        if underscores(&mut head.headers, config.limits.underscores).is_err() {
            self.answer(
                Action::Refuse,
                400,
                "a header has an underscore in its name (unexpected_underscore)",
            );
            return Ok(());
        }
        match path::normalize(&mut head.path, config) {
            Ok(path::Then::Route) => {}
            Ok(path::Then::Redirect) => {
                self.answer(
                    Action::Redirect,
                    307,
                    "the path had escaped slashes (path_normalization_redirect)",
                );
                return Ok(());
            }
            Err(_) => {
                self.answer(
                    Action::Refuse,
                    400,
                    "the path has no single reading (path_normalization_failed)",
                );
                return Ok(());
            }
        }
        self.prepare(chain, manager, &mut head);
        if head.method == Method::CONNECT && !config.connect {
            self.answer(Action::Refuse, 403, "CONNECT is not accepted here");
            return Ok(());
        }
        let source = match &manager.config.routes {
            model::RouteSource::Inline(r) => Some(std::sync::Arc::clone(r)),
            model::RouteSource::Rds(name) => {
                self.out.route_configuration = Some(name.clone());
                self.config.routes.get(name).cloned()
            }
        };
        let Some(source) = source else {
            self.answer(Action::NotFound, 404, "its route configuration does not exist");
            return Ok(());
        };
        let table = compile_routes(&source)?;
        let at = table.position(&head.authority);
        let vhost_model = at.and_then(|i| source.virtual_hosts.get(i));
        self.reasons.virtual_hosts(&source, vhost_model, &head.authority);
        self.out.virtual_host = vhost_model.map(|v| v.name.clone());
        let mut said = Said::default();
        let (found, vhost, route, route_model) = loop {
            let found = table.find(&head, Some(&said.metadata));
            let (vhost, route) = match found {
                Found::Route(v, r) => (Some(v), Some(r)),
                Found::NeedsTls(v) | Found::NoRoute(v) => (Some(v), None),
                Found::NoHost => (None, None),
            };
            let at = match (vhost_model, route) {
                (Some(v), Some(_)) => first(v, &head, Some(&said.metadata))?,
                _ => None,
            };
            let route_model = vhost_model.zip(at).and_then(|(v, i)| v.routes.get(i));
            self.out.route_index = at;
            self.out.route = route_model.map(|r| r.name.clone());
            if let Some(r) = route
                && !r.operation.is_empty()
                && self.arrival.direction == model::Direction::Outbound
            {
                head.headers.set_id(HeaderId::XEnvoyDecoratorOperation, r.operation.as_bytes());
            }
            let asked = self.filters(chain, manager, &mut head, route.map(|r| &**r), route_model, &mut said);
            if !matches!(asked, Ok(true))
                && let Some(v) = vhost_model
            {
                self.reasons.routes(v, at, &head, &said.metadata);
            }
            match asked {
                // The route is looked for again, by what is known now.
                Ok(true) => {}
                Ok(false) => break (found, vhost, route, route_model),
                Err(a) => {
                    self.answer(a.action, a.status, &a.detail);
                    self.edits(&said.response);
                    return Ok(());
                }
            }
        };
        let response = said.response;
        let (Some(vhost), Some(route), Some(m)) = (vhost, route, route_model) else {
            if let Found::NeedsTls(_) = found {
                let reply = redirect_to_tls(&head);
                self.out.location = reply.headers.str_id(HeaderId::Location).map(str::to_owned);
                self.answer(Action::Redirect, reply.status, "TLS is required (httpsRedirect)");
            } else {
                let what = if vhost.is_some() { "route" } else { "virtual host" };
                self.answer(Action::NotFound, 404, &format!("no {what} takes the request (route_not_found)"));
            }
            return Ok(());
        };
        self.act(vhost, route, m, head, response);
        Ok(())
    }

    fn answer(&mut self, action: Action, status: u16, detail: &str) {
        self.out.action = action;
        self.out.status = Some(status);
        self.out.detail = detail.to_owned();
    }

    fn edits(&mut self, headers: &Headers) {
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        self.out.response_headers.extend(headers.iter().map(|(_, n, v)| (text(n), text(v))));
    }

    /// What `http::edge` writes, but for values that differ with each request.
    fn prepare(&self, chain: &Chain, manager: &HttpManager, head: &mut RequestHead) {
        let edge = manager.config.use_remote_address;
        let tls = chain.model.tls.is_some();
        if edge {
            head.headers.retain(|_, n, _| !(n.len() >= 8 && n[..8].eq_ignore_ascii_case(b"x-envoy-")));
            let mut value = head.headers.joined(b"x-forwarded-for").map_or_else(Vec::new, |v| v.into_owned());
            if !value.is_empty() {
                value.push(b',');
            }
            value.extend_from_slice(self.arrival.source.to_string().as_bytes());
            head.headers.set_id(HeaderId::XForwardedFor, &value);
            if manager.config.trusted_hops == 0 {
                head.headers.remove_id(HeaderId::XForwardedProto);
            }
        }
        let trusted = !edge || manager.config.trusted_hops > 0;
        if manager.config.headers.forwarded_port && !(trusted && head.headers.has(HeaderId::XForwardedPort)) {
            head.headers.set_number(HeaderId::XForwardedPort, self.arrival.destination.port().into());
        }
        match head.headers.get_id(HeaderId::XForwardedProto) {
            Some(p) => head.https = p.eq_ignore_ascii_case(b"https"),
            None => {
                head.https = tls && (edge || self.arrival.peer.is_none());
                head.headers.push_id(HeaderId::XForwardedProto, if head.https { b"https" } else { b"http" });
            }
        }
    }

    /// Asks the filters in order, from where they were; `Err` answers the request. Whether one wants the route looked for
    /// again, and is not the last word.
    fn filters(
        &mut self,
        chain: &Chain,
        manager: &HttpManager,
        head: &mut RequestHead,
        route: Option<&Route>,
        route_model: Option<&model::Route>,
        said: &mut Said,
    ) -> Result<bool, Answer> {
        let Said { metadata, response, next } = said;
        let principals: Vec<String> = self.arrival.peer.iter().map(|p| p.principal.clone()).collect();
        for (compiled, f) in manager.filters.iter().zip(&manager.config.filters).skip(*next) {
            *next += 1;
            match (compiled, f) {
                (HttpFilter::Rbac(rbac), _) => {
                    let mut facts = self.facts(chain, &principals);
                    facts.request = Some(head);
                    facts.metadata = Some(metadata);
                    let seen = policy::ask(rbac, &facts);
                    let said = rbac.shadow(&facts);
                    if let Some(said) = said {
                        rbac.note(said, RBAC, metadata);
                    }
                    let denied = policy::denied(std::slice::from_ref(&seen));
                    self.out.policies.extend(seen);
                    if let Some(detail) = denied {
                        return Err(Answer { action: Action::Deny, status: 403, detail });
                    }
                }
                (HttpFilter::Jwt(compiled), model::HttpFilter::Jwt(j)) => {
                    let rule = compiled.rule(head).and_then(|i| j.rules.get(i));
                    if let Some(wanted) = rule.and_then(|r| Wanted::of(j, &r.requires)) {
                        let for_routes = self.token(j, &wanted, head, metadata)?;
                        if for_routes {
                            return Ok(true);
                        }
                    }
                }
                (HttpFilter::Cors, _) => {
                    if let Some(cors) = route.and_then(|r| r.cors.as_ref()) {
                        match cross_origin(cors, head) {
                            Ok(None) => {}
                            Ok(Some(h)) => cross_origin_headers(&h, response),
                            Err(reply) => {
                                cross_origin_headers(&reply.headers, response);
                                let detail = "the preflight is answered by the CORS policy".to_owned();
                                return Err(Answer {
                                    action: Action::DirectResponse,
                                    status: reply.status,
                                    detail,
                                });
                            }
                        }
                    }
                }
                (HttpFilter::Fault, _) => {
                    if let Some(fault) = route_model.and_then(|r| r.fault.as_ref()) {
                        self.fault(fault)?;
                    }
                }
                (HttpFilter::StatefulSession(s), _) => {
                    let s = session::setting(s, route.and_then(|r| r.filters.session.as_ref()));
                    self.session = s.and_then(|s| session::run(s, head));
                }
                (HttpFilter::ExtAuthz(e), _) if !e.is_on(route) || !e.asks(Some(metadata)) => {}
                (HttpFilter::ExtAuthz(e), _) => self.out.asks.push(e.whom()),
                (HttpFilter::ExtProc(_), _) => self.out.asks.push("an external processor".into()),
                (HttpFilter::LocalRateLimit(_), _) => self.out.asks.push("a local rate limit".into()),
                (HttpFilter::RateLimit(_), _) => self.out.asks.push("a rate limit service".into()),
                _ => {}
            }
        }
        Ok(false)
    }

    fn fault(&mut self, fault: &model::Fault) -> Result<(), Answer> {
        let abort = fault.abort.map(|(kind, share)| match kind {
            model::AbortKind::Http(s) => (s, share),
            model::AbortKind::Grpc(s) => (http_of_grpc(s), share),
        });
        self.out.fault = Some(FaultSeen { delay: fault.delay, abort });
        match abort {
            Some((status, share)) if share >= 1_000_000 => Err(Answer {
                action: Action::DirectResponse,
                status,
                detail: "a fault aborts every request (fault_filter_abort)".into(),
            }),
            _ => Ok(()),
        }
    }

    /// Whether routes are to see it. A token is read and believed; its issuer must be one of those that will do.
    fn token(
        &mut self,
        jwt: &model::JwtAuthn,
        wanted: &Wanted<'_>,
        head: &RequestHead,
        metadata: &mut Metadata,
    ) -> Result<bool, Answer> {
        let answer = |optional: bool, detail: &str| match optional {
            true => Ok(false),
            false => Err(Answer { action: Action::Refuse, status: 401, detail: detail.to_owned() }),
        };
        let refuse = |detail: &str| answer(wanted.bad_passes, detail);
        let given = head.headers.str_id(HeaderId::Authorization).and_then(|v| v.split_once(' '));
        let Some((_, token)) = given.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")) else {
            return answer(wanted.none_passes, "the request has no token, and one is required");
        };
        let part = token.trim().split('.').nth(1).unwrap_or_default();
        let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(part.trim_end_matches('=')).ok();
        let Some(claims) =
            bytes.and_then(|b| serde_json::from_slice::<Value>(&b).ok()).filter(Value::is_object)
        else {
            return refuse("the token of the request is not a JWT");
        };
        let issuer = claims.get("iss").and_then(Value::as_str).unwrap_or_default();
        let mut known = jwt.providers.iter().filter(|(n, _)| wanted.providers.contains(&n.as_str()));
        let Some((_, p)) = known.find(|(_, p)| p.issuer.is_empty() || p.issuer == issuer) else {
            return refuse("no RequestAuthentication or Policy knows the issuer of the token");
        };
        let audiences: Vec<&str> = match claims.get("aud") {
            Some(Value::String(s)) => vec![s],
            Some(Value::Array(l)) => l.iter().filter_map(Value::as_str).collect(),
            _ => vec![],
        };
        if !p.audiences.is_empty() && !p.audiences.iter().any(|a| audiences.contains(&a.as_str())) {
            if wanted.bad_passes {
                return Ok(false);
            }
            return Err(Answer {
                action: Action::Refuse,
                status: 403,
                detail: "the audience of the token is not one of the RequestAuthentication's".into(),
            });
        }
        self.out.asks.push("keys of the token's issuer: here its signature and times are not checked".into());
        if !p.payload_in_metadata.is_empty() {
            metadata.set(JWT, p.payload_in_metadata.clone(), std::sync::Arc::new(claims));
            return Ok(p.clear_route_cache);
        }
        Ok(false)
    }

    fn act(
        &mut self,
        vhost: &VirtualHost,
        route: &Route,
        m: &model::Route,
        mut head: RequestHead,
        mut response: Headers,
    ) {
        let plain = |v: &str| v.to_owned();
        match &route.action {
            RouteAction::Direct(d) => {
                route.response_headers.response(&mut response, &plain);
                vhost.response_headers.response(&mut response, &plain);
                self.answer(Action::DirectResponse, d.status, "the route answers itself (directResponse)");
            }
            RouteAction::Redirect(r) => {
                self.out.location = Some(location(&head, r, route));
                route.response_headers.response(&mut response, &plain);
                vhost.response_headers.response(&mut response, &plain);
                self.answer(Action::Redirect, r.status, "");
            }
            RouteAction::Forward(f) => self.forward(f, vhost, route, m, &mut head, &mut response),
        }
        self.edits(&response);
    }

    fn forward(
        &mut self,
        f: &Forward,
        vhost: &VirtualHost,
        route: &Route,
        m: &model::Route,
        head: &mut RequestHead,
        response: &mut Headers,
    ) {
        let model::RouteAction::Forward(fm) = &m.action else { return };
        self.out.action = Action::Forward;
        let named = f.named_cluster(head).map(model::WeightedCluster::only);
        let to = match &named {
            Some(only) => std::slice::from_ref(only),
            None => &fm.clusters,
        };
        let kept = self.session.as_ref().and_then(|s| self.kept(s, to));
        let at = self.destinations(to, kept);
        self.out.session = self.session.as_ref().map(|s| seen(s, kept.is_some()));
        // A number that this destination's part of the sum contains.
        let random = to.iter().take(at).map(|c| u64::from(c.weight)).sum();
        let of_session = kept.and_then(|at| f.destinations().get(at));
        let destination = of_session.unwrap_or_else(|| f.destination(if to.len() > 1 { random } else { 0 }));
        let outbound = self.arrival.direction == model::Direction::Outbound;
        let limits = Limits::new(f, false, outbound, head);
        self.out.timeout = limits.timeout;
        self.out.retries = limits.retry.map(|r| Retries {
            attempts: limits.attempts,
            per_try_timeout: r.config.per_try_timeout,
            on: r.config.on.clone(),
            status_codes: r.config.status_codes.clone(),
        });
        let remote = self.arrival.source;
        let (timeout, suppress) = (limits.timeout, self.suppress);
        Rewrite { forward: f, route, vhost, destination, timeout, suppress, remote }.apply(head);
        self.out.mirrors = fm
            .mirrors
            .iter()
            .map(|m| Mirrored { cluster: m.cluster.clone(), fraction: m.fraction })
            .collect();
        self.out.hash = fm.hash.iter().map(hashed).collect();
        if self.nowhere() {
            self.out.status = Some(503);
        } else {
            let plain = |v: &str| v.to_owned();
            for edits in [&destination.response_headers, &route.response_headers, &vhost.response_headers] {
                edits.response(response, &plain);
            }
        }
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        self.out.upstream = Some(Request {
            method: head.method.to_string(),
            authority: head.authority.clone(),
            path: head.path.clone(),
            headers: head.headers.iter().map(|(_, n, v)| (text(n).to_ascii_lowercase(), text(v))).collect(),
            http2: head.version == Version::Http2,
        });
    }
}

/// Which route of a virtual host takes a request: a scan, where the proxy has an index.
fn first(
    v: &model::VirtualHost,
    head: &RequestHead,
    metadata: Option<&Metadata>,
) -> Result<Option<usize>, Unusable> {
    for (i, r) in v.routes.iter().enumerate() {
        let condition = Route::condition(&r.matches).map_err(|e| Unusable {
            kind: "route",
            name: format!("{}[{i}]", v.name),
            reason: e.to_string(),
        })?;
        if condition.matches(head, metadata) {
            return Ok(Some(i));
        }
    }
    Ok(None)
}

fn seen(s: &session::Session, kept: bool) -> SessionSeen {
    let (by, name, path, max_age) = match &s.state {
        model::SessionState::Cookie { name, path, ttl } => ("cookie", name, path.as_str(), *ttl),
        model::SessionState::Header(name) => ("header", name, "", Duration::ZERO),
    };
    let some = |d: Duration| (!d.is_zero()).then_some(d);
    SessionSeen {
        by,
        name: name.clone(),
        path: path.to_owned(),
        max_age: some(max_age),
        absolute: some(s.absolute),
        host: s.host.filter(|_| kept).map(|h| h.to_string()),
    }
}

fn hashed(h: &model::HashPolicy) -> String {
    match h {
        model::HashPolicy::Header(n) => format!("header {n}"),
        model::HashPolicy::Cookie { name, .. } => format!("cookie {name}"),
        model::HashPolicy::SourceIp => "source address".to_owned(),
        model::HashPolicy::Query(n) => format!("query parameter {n}"),
    }
}

/// A request as the codecs would have read it; `None` if they would not.
pub(super) fn head(r: &Request) -> Option<RequestHead> {
    let mut headers = Headers::default();
    for (n, v) in &r.headers {
        let name = ::http::HeaderName::from_bytes(n.as_bytes()).ok()?;
        ::http::HeaderValue::from_str(v).ok()?;
        headers.push(name.as_str().as_bytes(), v.as_bytes());
    }
    Some(RequestHead {
        method: Method::from_bytes(r.method.as_bytes()).ok()?,
        version: if r.http2 { Version::Http2 } else { Version::Http11 },
        https: false,
        authority: r.authority.clone(),
        path: r.path.clone(),
        headers,
        body: BodyKind::Empty,
        upgrade: None,
        expect_continue: false,
    })
}

/// What a rule of token authentication asks of a request.
#[derive(Default)]
struct Wanted<'a> {
    /// Whose tokens will do.
    providers: Vec<&'a str>,
    /// A request without a token passes.
    none_passes: bool,
    /// One with a bad token passes, without its claims.
    bad_passes: bool,
}

impl<'a> Wanted<'a> {
    /// `None` if it asks for nothing.
    fn of(jwt: &'a model::JwtAuthn, requires: &'a model::JwtRequires) -> Option<Self> {
        let mut out = Self::default();
        match requires {
            model::JwtRequires::Nothing => return None,
            model::JwtRequires::Inline(r) => out.add(r),
            model::JwtRequires::Named(n) => jwt.requirements.get(n).into_iter().for_each(|r| out.add(r)),
        }
        Some(out)
    }

    fn add(&mut self, r: &'a model::JwtRequirement) {
        match r {
            model::JwtRequirement::Provider(n) | model::JwtRequirement::ProviderWithAudiences(n, _) => {
                self.providers.push(n);
            }
            model::JwtRequirement::Any(l) | model::JwtRequirement::All(l) => {
                l.iter().for_each(|r| self.add(r))
            }
            model::JwtRequirement::AllowMissing => self.none_passes = true,
            model::JwtRequirement::AllowMissingOrFailed | model::JwtRequirement::Always => {
                self.none_passes = true;
                self.bad_passes = true;
            }
        }
    }
}

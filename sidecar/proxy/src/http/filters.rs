//! HTTP filters before the router: authorization, cross-origin requests, injected faults.

pub(crate) mod compressor;
pub(crate) mod ext_authz;
pub(crate) mod ext_proc;
pub(crate) mod grpc_web;
pub(crate) mod jwt;
pub(crate) mod rate_limit;
pub(crate) mod session;

use std::{future::poll_fn, rc::Rc, sync::Arc};

use http::Method;
use mesh_model::proxy::{AbortKind, BufferOverride, OnDemandCluster};

use self::session::Session;

use super::{
    downstream::Downstream,
    filtered::Ahead,
    headers::{HeaderId, Headers},
    local_reply::LocalReply,
    message::{BodyKind, RequestHead, StreamError},
    metadata::{AUDIT, RBAC},
    record::{Flag, Record},
};
use crate::{
    config::{
        listener::{HttpFilter, HttpManager},
        route::{Cors, Route},
    },
    on_demand,
    worker::connection::Connection,
};

/// A request to change in every way.
#[cfg(any(test, fuzzing))]
fn fuzz_head() -> RequestHead {
    let mut headers = Headers::default();
    headers.push(b"authorization", b"x");
    headers.push_id(HeaderId::Cookie, b"a=1");
    super::client::head(Method::POST, "a.test", "/p?q=1&r", headers, 3)
}

/// What filters decided about a request that goes on.
#[derive(Default)]
pub(crate) struct Passed {
    /// Cross-origin headers for the response.
    pub(crate) cors: Option<Headers>,
    /// A fault was injected: no retries, no timeout.
    pub(crate) faulted: bool,
    /// A session that stays on its host.
    pub(crate) session: Option<Box<Session>>,
    /// The route is looked for again.
    pub(crate) reroute: bool,
    /// A cluster that does not exist is asked for.
    pub(crate) on_demand: Option<OnDemandCluster>,
    /// A virtual host was asked for, and filters begin again.
    pub(crate) restart: bool,
    /// Of the routes, whose virtual hosts may be asked for, if the request has none.
    pub(crate) hosts: Option<Box<str>>,
    /// Headers that filters want in the response.
    pub(crate) response: Option<Box<ResponseEdits>>,
}

impl Passed {
    /// An answer of our own gets what filters want in every answer.
    pub(crate) fn finish(&self, mut reply: LocalReply) -> LocalReply {
        if let Some(cors) = &self.cors {
            cross_origin_headers(cors, &mut reply.headers);
        }
        if let Some(edits) = &self.response {
            edits.apply(&mut reply.headers);
        }
        reply
    }
}

/// Writes cross-origin headers into a response.
pub(crate) fn cross_origin_headers(cors: &Headers, to: &mut Headers) {
    for (id, _, v) in cors.iter() {
        if id == HeaderId::Vary {
            to.push_id(id, v);
        } else {
            to.set_id(id, v);
        }
    }
}

/// Headers for the response.
#[derive(Debug, Default)]
pub(crate) struct ResponseEdits {
    pub(crate) set: Headers,
    pub(crate) add: Headers,
}

impl ResponseEdits {
    pub(crate) fn apply(&self, headers: &mut Headers) {
        for (_, n, v) in self.set.iter() {
            headers.set(n, v);
        }
        for (_, n, v) in self.add.iter() {
            headers.push(n, v);
        }
    }
}

/// Runs the filters in order; `Err` answers the request.
pub(crate) async fn run<D: Downstream>(
    conn: &Rc<Connection>,
    manager: &HttpManager,
    head: &mut RequestHead,
    route: Option<&Route>,
    down: &D,
    passed: &mut Passed,
    rec: &mut Record,
    from: usize,
) -> Result<Option<usize>, LocalReply> {
    for (at, f) in manager.filters.iter().enumerate().skip(from) {
        match f {
            HttpFilter::Rbac(rbac) => {
                let mut facts = conn.facts(rec.remote, Some(head));
                facts.metadata = rec.metadata.as_deref();
                let said = rbac.shadow(&facts);
                let audited = rbac.audits(&facts);
                let decided = rbac.check(&facts);
                if let Some(said) = said {
                    rbac.note(said, RBAC, rec.metadata.get_or_insert_default());
                }
                if let Some(matched) = audited {
                    let (namespace, key) = AUDIT;
                    rec.metadata.get_or_insert_default().set(namespace, key, Arc::new(matched.into()));
                }
                if let Err(details) = decided {
                    rec.flag(Flag::Uaex);
                    rec.details = details.into();
                    return Err(LocalReply { grpc: Some(7), ..LocalReply::text(403, "RBAC: access denied") });
                }
            }
            HttpFilter::Jwt(j) => {
                // Boxed, so that requests without it do not carry its state.
                let on_route = route.and_then(|r| r.filters.jwt.as_ref());
                passed.reroute |= Box::pin(j.run(conn, head, on_route, rec)).await?;
            }
            HttpFilter::ExtAuthz(e) if !e.is_on(route) => {}
            HttpFilter::ExtAuthz(e) => {
                let on_route = route.and_then(|r| r.filters.ext_authz.as_ref());
                Box::pin(e.run(conn, head, on_route, down, passed, rec)).await?;
            }
            HttpFilter::ExtProc(e) => {
                let on_route = route.and_then(|r| r.filters.ext_proc.as_ref());
                Box::pin(e.run(conn, head, on_route, down, passed, rec)).await?;
            }
            HttpFilter::LocalRateLimit(l) => {
                let l = route.and_then(|r| r.filters.local_rate_limit.as_ref()).unwrap_or(l);
                l.run(conn, head, route, passed, rec)?;
            }
            HttpFilter::RateLimit(l) => {
                Box::pin(l.run(conn, head, route, passed, rec)).await?;
            }
            HttpFilter::GrpcWeb => grpc_web::run(head, down.bodies(), rec),
            HttpFilter::Compressor(c) => {
                if !route.is_some_and(|r| r.filters.no_compression) && !head.opens_tunnel() {
                    c.run(head, down.bodies());
                }
            }
            HttpFilter::Buffer(limit) => {
                let limit = match route.and_then(|r| r.filters.buffer) {
                    None => Some(*limit),
                    Some(BufferOverride::Limit(n)) => Some(n),
                    Some(BufferOverride::Disabled) => None,
                };
                if let Some(limit) = limit {
                    Box::pin(buffer(head, limit, down, rec)).await?;
                }
            }
            HttpFilter::StatefulSession(s) => {
                let s = session::setting(s, route.and_then(|r| r.filters.session.as_ref()));
                passed.session = s.and_then(|s| session::run(s, head)).map(Box::new);
            }
            HttpFilter::OnDemand(o) => {
                if let Some(routes) = passed.hosts.take() {
                    // Boxed, as above.
                    Box::pin(on_demand::host(conn, manager, &routes, &head.authority, down, rec)).await?;
                    if manager.routes().is_some_and(|t| t.host(&head.authority).is_some()) {
                        passed.restart = true;
                        return Ok(None);
                    }
                }
                passed.on_demand = route.and_then(|r| r.filters.on_demand).unwrap_or(*o);
            }
            HttpFilter::Cors => {
                if let Some(cors) = route.and_then(|r| r.cors.as_ref()) {
                    let answered = cross_origin(cors, head);
                    if answered.is_err() {
                        rec.details = "cors_response".into();
                    }
                    passed.cors = answered?;
                }
            }
            HttpFilter::Fault => {
                if let Some(fault) = route.and_then(|r| r.fault.as_ref()) {
                    let rng = &conn.worker.rng;
                    if let Some((delay, share)) = fault.delay
                        && rng.chance_ppm(share)
                    {
                        rec.flag(Flag::Di);
                        passed.faulted = true;
                        tokio::time::sleep(delay).await;
                    }
                    if let Some((abort, share)) = fault.abort
                        && rng.chance_ppm(share)
                    {
                        rec.flag(Flag::Fi);
                        rec.details = "fault_filter_abort".into();
                        return Err(match abort {
                            AbortKind::Http(status) => LocalReply::text(status, "fault filter abort"),
                            AbortKind::Grpc(status) => LocalReply {
                                grpc: Some(status),
                                ..LocalReply::text(
                                    super::local_reply::http_of_grpc(status),
                                    "fault filter abort",
                                )
                            },
                        });
                    }
                }
            }
            HttpFilter::GrpcStats | HttpFilter::Names => {}
        }
        if std::mem::take(&mut passed.reroute) {
            return Ok(Some(at + 1));
        }
    }
    Ok(None)
}

/// Waits for all of a body, which gets a length if it had none.
async fn buffer<D: Downstream>(
    head: &mut RequestHead,
    limit: u32,
    down: &D,
    rec: &mut Record,
) -> Result<(), LocalReply> {
    if head.body == BodyKind::Empty || head.opens_tunnel() || down.bodies().is_none() {
        return Ok(());
    }
    if ahead(down, limit as usize, rec).await? == Ahead::More {
        rec.details = "request_payload_too_large".into();
        return Err(LocalReply::text(413, "Payload Too Large"));
    }
    if let Some(bodies) = down.bodies()
        && head.body == BodyKind::Stream
        && !bodies.has_trailers()
    {
        let n = bodies.len() as u64;
        head.body = BodyKind::Length(n);
        head.headers.set_id(HeaderId::ContentLength, n.to_string().as_bytes());
    }
    Ok(())
}

/// Reads a body ahead; `Err` answers a client that did not send it.
async fn ahead<D: Downstream>(down: &D, limit: usize, rec: &mut Record) -> Result<Ahead, LocalReply> {
    poll_fn(|cx| down.poll_ahead(cx, limit)).await.map_err(|e| match e {
        StreamError::Reset | StreamError::Refused => {
            rec.flag(Flag::Dc);
            rec.details = "downstream_remote_disconnect".into();
            LocalReply::default()
        }
        StreamError::Protocol | StreamError::TooLarge => {
            rec.flag(Flag::Dpe);
            rec.details = "http1.codec_error".into();
            LocalReply::text(400, "Bad Request")
        }
    })
}

/// Answers a preflight, or returns the headers for the response.
pub(crate) fn cross_origin(cors: &Cors, head: &RequestHead) -> Result<Option<Headers>, LocalReply> {
    let Some(origin) = head.headers.get_id(HeaderId::Origin) else { return Ok(None) };
    let c = &cors.config;
    let preflight = head.method == Method::OPTIONS && head.headers.has(HeaderId::AccessControlRequestMethod);
    let mut h = Headers::default();
    if cors.origins.iter().any(|o| o.matches(origin)) {
        h.push_id(HeaderId::AccessControlAllowOrigin, origin);
    } else if !(preflight && c.ignore_unmatched) {
        return Ok(None);
    }
    // Without the origin the browser takes what follows for a no.
    if c.allow_credentials {
        h.push_id(HeaderId::AccessControlAllowCredentials, b"true");
    }
    let mut push = |id, v: &str| {
        if !v.is_empty() {
            h.push_id(id, v.as_bytes());
        }
    };
    if preflight {
        push(HeaderId::AccessControlAllowMethods, &c.allow_methods);
        push(HeaderId::AccessControlAllowHeaders, &c.allow_headers);
        push(HeaderId::AccessControlMaxAge, &c.max_age);
        return Err(LocalReply { status: 200, headers: h, ..LocalReply::default() });
    }
    push(HeaderId::AccessControlExposeHeaders, &c.expose_headers);
    // One cache must not serve one origin's answer to another.
    push(HeaderId::Vary, "Origin");
    Ok(Some(h))
}

//! HTTP filters before the router: authorization, cross-origin requests, injected faults.

pub(crate) mod jwt;

use std::rc::Rc;

use http::Method;
use mesh_model::proxy::AbortKind;

use super::{
    headers::{HeaderId, Headers},
    local_reply::LocalReply,
    message::RequestHead,
    record::{Flag, Record},
};
use crate::{
    config::{
        listener::{HttpFilter, HttpManager},
        route::{Cors, Route},
    },
    worker::connection::Connection,
};

/// What filters decided about a request that goes on.
#[derive(Default)]
pub(crate) struct Passed {
    /// Cross-origin headers for the response.
    pub(crate) cors: Option<Headers>,
    /// A fault was injected: no retries, no timeout.
    pub(crate) faulted: bool,
}

/// Runs the filters in order; `Err` answers the request.
pub(crate) async fn run(
    conn: &Rc<Connection>,
    manager: &HttpManager,
    head: &mut RequestHead,
    route: Option<&Route>,
    rec: &mut Record,
) -> Result<Passed, LocalReply> {
    let mut passed = Passed::default();
    for f in &manager.filters {
        match f {
            HttpFilter::Rbac(rbac) => {
                let mut facts = conn.facts(rec.remote, Some(head));
                facts.metadata = rec.metadata.as_deref();
                if let Err(details) = rbac.check(&facts) {
                    rec.flag(Flag::Uaex);
                    rec.details = details.into();
                    return Err(LocalReply { grpc: Some(7), ..LocalReply::text(403, "RBAC: access denied") });
                }
            }
            HttpFilter::Jwt(j) => {
                // Boxed, so that requests without it do not carry its state.
                Box::pin(j.run(conn, head, route.and_then(|r| r.filters.jwt.as_ref()), rec)).await?;
            }
            HttpFilter::Cors => {
                if let Some(cors) = route.and_then(|r| r.cors.as_ref()) {
                    passed.cors = cross_origin(cors, head, rec)?;
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
            HttpFilter::GrpcStats => {}
        }
    }
    Ok(passed)
}

/// Answers a preflight, or returns the headers for the response.
fn cross_origin(cors: &Cors, head: &RequestHead, rec: &mut Record) -> Result<Option<Headers>, LocalReply> {
    let Some(origin) = head.headers.get_id(HeaderId::Origin) else { return Ok(None) };
    if !cors.origins.iter().any(|o| o.matches(origin)) {
        return Ok(None);
    }
    let c = &cors.config;
    let mut h = Headers::default();
    h.push_id(HeaderId::AccessControlAllowOrigin, origin);
    if c.allow_credentials {
        h.push_id(HeaderId::AccessControlAllowCredentials, b"true");
    }
    let preflight = head.method == Method::OPTIONS && head.headers.has(HeaderId::AccessControlRequestMethod);
    let mut push = |id, v: &str| {
        if !v.is_empty() {
            h.push_id(id, v.as_bytes());
        }
    };
    if preflight {
        push(HeaderId::AccessControlAllowMethods, &c.allow_methods);
        push(HeaderId::AccessControlAllowHeaders, &c.allow_headers);
        push(HeaderId::AccessControlMaxAge, &c.max_age);
        rec.details = "cors_response".into();
        return Err(LocalReply { status: 200, headers: h, ..LocalReply::default() });
    }
    push(HeaderId::AccessControlExposeHeaders, &c.expose_headers);
    // One cache must not serve one origin's answer to another.
    push(HeaderId::Vary, "Origin");
    Ok(Some(h))
}

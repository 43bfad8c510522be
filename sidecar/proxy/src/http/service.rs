//! What happens to a request: prepare, route, filter, act, record.

use std::{
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use http::Method;
use mesh_model::proxy as model;

use super::{
    downstream::Downstream,
    edge,
    filtered::Filtered,
    filters,
    headers::{HeaderId, Headers},
    local_reply::{self, LocalReply},
    message::{BodyKind, RequestHead, Version},
    path::{self, Then},
    record::{Flag, Record, attributes},
    router,
};
use crate::{
    config::{
        listener::HttpManager,
        route::{Action, Found, Route, RouteTable, VirtualHost},
    },
    options::PolicyDecision,
    worker::{Gauge, connection::Connection},
};

/// Serves one request.
pub(crate) async fn handle<D: Downstream>(
    conn: &Rc<Connection>,
    manager: &Arc<HttpManager>,
    mut head: RequestHead,
    down: &D,
) {
    let _gauge = Gauge::new(&conn.worker.shared.totals, |t| &t.requests, |t| &t.requests_total);
    let mut rec = Record::new(conn, Some(&head));
    let Some(_place) = conn.worker.place() else {
        Box::pin(overloaded(conn, manager, &head, down, &mut rec)).await;
        return rec.finish(conn, manager, &head);
    };
    if manager.bodies {
        // Boxed, so that ordinary requests do not carry the larger state.
        Box::pin(answer(conn, manager, &mut head, &Filtered::new(down), &mut rec)).await;
    } else {
        answer(conn, manager, &mut head, down, &mut rec).await;
    }
    rec.finish(conn, manager, &head);
}

async fn answer<D: Downstream>(
    conn: &Rc<Connection>,
    manager: &Arc<HttpManager>,
    head: &mut RequestHead,
    down: &D,
    rec: &mut Record,
) {
    if let Err(reply) = serve(conn, manager, head, down, rec).await {
        Box::pin(local_reply::send(down, head, &manager.config.server_name, reply, rec)).await;
    }
}

/// Answers a request for which a worker that is behind has no place.
async fn overloaded<D: Downstream>(
    conn: &Connection,
    manager: &HttpManager,
    head: &RequestHead,
    down: &D,
    rec: &mut Record,
) {
    conn.worker.shared.totals.refused.fetch_add(1, Relaxed);
    rec.flag(Flag::Om);
    rec.details = "overload".into();
    let mut reply = LocalReply::text(503, "overloaded");
    reply.headers.push_id(HeaderId::XEnvoyOverloaded, b"true");
    local_reply::send(down, head, &manager.config.server_name, reply, rec).await;
}

/// Answers bytes that are not an acceptable request.
pub(crate) async fn refuse<D: Downstream>(
    conn: &Rc<Connection>,
    manager: &Arc<HttpManager>,
    down: &D,
    status: u16,
    version: Version,
) {
    let mut rec = Record::new(conn, None);
    rec.flag(Flag::Dpe);
    let details = if version == Version::Http3 { "http3.codec_error" } else { "http1.codec_error" };
    rec.details = details.into();
    let head = RequestHead {
        method: Method::GET,
        version,
        https: conn.tls,
        authority: String::new(),
        path: String::new(),
        headers: Headers::default(),
        body: BodyKind::Empty,
        upgrade: None,
        expect_continue: false,
    };
    let reason =
        http::StatusCode::from_u16(status).ok().and_then(|s| s.canonical_reason()).unwrap_or_default();
    let reply = LocalReply::text(status, reason);
    local_reply::send(down, &head, &manager.config.server_name, reply, &mut rec).await;
    rec.finish_unread(conn, manager);
}

/// Serves a request; `Err` is an answer of our own.
async fn serve<D: Downstream>(
    conn: &Rc<Connection>,
    manager: &Arc<HttpManager>,
    head: &mut RequestHead,
    down: &D,
    rec: &mut Record,
) -> Result<(), LocalReply> {
    let config = &manager.config;
    if head.version == Version::Http10 && !config.accept_http_10 {
        rec.details = "low_version".into();
        return Err(LocalReply::text(426, "Upgrade Required"));
    }
    if underscores(&mut head.headers, config.limits.underscores).is_err() {
        rec.details = "unexpected_underscore".into();
        return Err(LocalReply::text(400, "Bad Request"));
    }
    match path::normalize(&mut head.path, config) {
        Ok(Then::Route) => {}
        Ok(Then::Redirect) => {
            rec.details = "path_normalization_redirect".into();
            let mut reply = LocalReply { status: 307, ..LocalReply::default() };
            reply.headers.push_id(HeaderId::Location, head.path.as_bytes());
            return Err(reply);
        }
        Err(_) => {
            rec.details = "path_normalization_failed".into();
            return Err(LocalReply::text(400, "Bad Request"));
        }
    }
    edge::prepare(conn, manager, head, rec);
    upgrade(manager, head, rec)?;
    // The table is kept for the request: an update in between does not mix two versions.
    let mut table = manager.routes();
    let (mut vhost, mut route, mut needs_tls) = find(conn, table.as_deref(), head, rec);
    let mut passed = filters::Passed::default();
    let mut untouched =
        if manager.on_demand { may_ask(table.as_deref(), vhost.as_deref(), head, &mut passed) } else { None };
    let mut at = 0;
    loop {
        let next = filters::run(conn, manager, head, route.as_deref(), down, &mut passed, rec, at)
            .await
            .map_err(|r| passed.finish(r))?;
        if let (true, Some(before)) = (passed.restart, untouched.take()) {
            *head = *before;
            passed = filters::Passed::default();
            table = manager.routes();
            at = 0;
        } else if let Some(next) = next {
            // Filters behind the one that asked have the settings of the new route.
            at = next;
        } else {
            break;
        }
        (vhost, route, needs_tls) = find(conn, table.as_deref(), head, rec);
    }
    let (Some(vhost), Some(route)) = (vhost, route) else {
        if needs_tls {
            rec.details = "ssl_redirect".into();
            return Err(passed.finish(redirect_to_tls(head)));
        }
        rec.flag(Flag::Nr);
        rec.details = "route_not_found".into();
        return Err(passed.finish(LocalReply { status: 404, ..LocalReply::default() }));
    };
    policy(conn, head, rec, &route).await.map_err(|r| passed.finish(r))?;
    match &route.action {
        Action::Direct(d) => {
            rec.details = "direct_response".into();
            let mut reply = LocalReply {
                status: d.status,
                body: bytes::Bytes::copy_from_slice(&d.body),
                is_text: true,
                ..LocalReply::default()
            };
            finish_headers(&mut reply.headers, &route, &vhost, &passed);
            Err(reply)
        }
        Action::Redirect(r) => {
            rec.details = "direct_response".into();
            let mut reply = LocalReply { status: r.status, ..LocalReply::default() };
            reply.headers.push_id(HeaderId::Location, location(head, r, &route).as_bytes());
            finish_headers(&mut reply.headers, &route, &vhost, &passed);
            Err(reply)
        }
        Action::Forward(f) => {
            let ctx =
                router::Context { conn, manager, route: &route, vhost: &vhost, forward: f, passed: &passed };
            router::forward(&ctx, head, down, rec).await.map_err(|r| passed.finish(r))
        }
    }
}

/// A name with an underscore is one that servers may take for another.
pub(crate) struct Underscore;

/// Leaves out headers with an underscore in their names, or refuses them.
pub(crate) fn underscores(headers: &mut Headers, what: model::Underscores) -> Result<(), Underscore> {
    match what {
        model::Underscores::Allow => Ok(()),
        model::Underscores::Drop => {
            headers.retain(|_, name, _| !name.contains(&b'_'));
            Ok(())
        }
        model::Underscores::Reject => {
            let any = headers.iter().any(|(_, name, _)| name.contains(&b'_'));
            if any { Err(Underscore) } else { Ok(()) }
        }
    }
}

/// Where virtual hosts come on demand: lets the filter ask for the one that a request lacks, and keeps the head as it
/// is now. The filters begin again with the routes of the host, since some of them depend on these (as in Envoy).
fn may_ask(
    table: Option<&RouteTable>,
    vhost: Option<&VirtualHost>,
    head: &RequestHead,
    passed: &mut filters::Passed,
) -> Option<Box<RequestHead>> {
    match vhost {
        Some(v) => {
            v.touch();
            None
        }
        None => {
            passed.hosts.clone_from(&table?.on_demand);
            passed.hosts.as_ref().map(|_| Box::new(head.clone()))
        }
    }
}

/// Virtual host and route of a request, and whether it has none for want of TLS.
fn find(
    conn: &Connection,
    table: Option<&RouteTable>,
    head: &mut RequestHead,
    rec: &mut Record,
) -> (Option<Arc<VirtualHost>>, Option<Arc<Route>>, bool) {
    let found = table.map_or(Found::NoHost, |t| t.find(head, rec.metadata.as_deref()));
    let needs_tls = matches!(found, Found::NeedsTls(_));
    let (vhost, route) = match found {
        Found::Route(v, r) => (Some(Arc::clone(v)), Some(Arc::clone(r))),
        Found::NeedsTls(v) | Found::NoRoute(v) => (Some(Arc::clone(v)), None),
        Found::NoHost => (None, None),
    };
    if let Some(v) = &vhost {
        rec.service.clone_from(&v.service);
    }
    if let Some(r) = &route {
        rec.route = Some(Arc::clone(&r.name));
        rec.counted = match (&r.filters.stats, &vhost) {
            (Some(s), Some(v)) => Some(s.series(&conn.worker.shared.metrics, &v.name)),
            _ => None,
        };
        if rec.trace.is_some_and(|t| t.sampled == Some(true)) && !r.operation.is_empty() {
            rec.operation = Some(Arc::clone(&r.operation));
        }
        if !r.operation.is_empty() && conn.outbound() {
            head.headers.set_id(HeaderId::XEnvoyDecoratorOperation, r.operation.as_bytes());
        }
    }
    (vhost, route, needs_tls)
}

/// Accepts an upgrade or makes the request an ordinary one.
fn upgrade(manager: &HttpManager, head: &mut RequestHead, rec: &mut Record) -> Result<(), LocalReply> {
    match head.upgrade.as_deref() {
        Some("websocket") if manager.config.websocket => {
            head.body = BodyKind::Stream;
            head.headers.remove_id(HeaderId::ContentLength);
            Ok(())
        }
        // An HTTP/1 client that offers something else is served without it (RFC 9110 section 7.8); in HTTP/2 and
        // HTTP/3 the protocol is all there is to the request.
        Some(_) if !head.version.is_multiplexed() => {
            head.upgrade = None;
            Ok(())
        }
        Some(_) => {
            rec.details = "upgrade_failed".into();
            Err(LocalReply { status: 403, ..LocalReply::default() })
        }
        None => {
            if head.method == Method::CONNECT {
                if !manager.config.connect {
                    rec.details = "upgrade_failed".into();
                    return Err(LocalReply { status: 403, ..LocalReply::default() });
                }
                head.body = BodyKind::Stream;
            }
            Ok(())
        }
    }
}

/// Asks the policy hook, where the request enters a workload or the mesh.
pub(crate) async fn policy(
    conn: &Connection,
    head: &RequestHead,
    rec: &mut Record,
    route: &Route,
) -> Result<(), LocalReply> {
    let Some(hook) = &conn.worker.shared.hooks.policy else { return Ok(()) };
    if conn.outbound() || !hook.checks() {
        return Ok(());
    }
    if let Action::Forward(f) = &route.action
        && rec.cluster.is_none()
        && rec.service.is_none()
    {
        rec.cluster = Some(Arc::clone(&f.destination(0).cluster));
    }
    let service = rec.destination_service(conn, head);
    let attributes = attributes(conn, head, &service.host, rec.is_grpc);
    match hook.check(&attributes).await {
        PolicyDecision::Allow => Ok(()),
        PolicyDecision::Deny { status, body, grpc } => {
            rec.flag(Flag::Uaex);
            rec.details = "policy_denied".into();
            Err(LocalReply { grpc, ..LocalReply::text(status, body) })
        }
    }
}

/// Response headers of route and virtual host, and those of filters.
fn finish_headers(headers: &mut Headers, route: &Route, vhost: &VirtualHost, passed: &filters::Passed) {
    let plain = |v: &str| v.to_owned();
    route.response_headers.response(headers, &plain);
    vhost.response_headers.response(headers, &plain);
    if let Some(c) = &passed.cors {
        filters::cross_origin_headers(c, headers);
    }
    if let Some(edits) = &passed.response {
        edits.apply(headers);
    }
}

pub(crate) fn redirect_to_tls(head: &RequestHead) -> LocalReply {
    let host = strip_port(&head.authority);
    let mut reply = LocalReply { status: 301, ..LocalReply::default() };
    reply.headers.push_id(HeaderId::Location, format!("https://{host}{}", head.path).as_bytes());
    reply
}

fn strip_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((h, p)) if p.bytes().all(|b| b.is_ascii_digit()) && (!h.contains(':') || h.ends_with(']')) => h,
        _ => authority,
    }
}

/// Where a redirect leads.
pub(crate) fn location(head: &RequestHead, r: &model::Redirect, route: &Route) -> String {
    let old = if head.https { "https" } else { "http" };
    let scheme = r.scheme.as_deref().unwrap_or(old);
    let mut host = r.host.clone().unwrap_or_else(|| head.authority.clone());
    if let Some(port) = r.port {
        host = format!("{}:{port}", strip_port(&host));
    } else if r.host.is_none() && scheme != old {
        // A default port of the old scheme means nothing in the new one.
        let default = if old == "http" { ":80" } else { ":443" };
        if let Some(h) = host.strip_suffix(default) {
            host = h.to_owned();
        }
    }
    let path = match (&r.path, &r.prefix_rewrite) {
        (Some(p), _) => match (p.contains('?'), head.query()) {
            (false, Some(q)) => format!("{p}?{q}"),
            _ => p.clone(),
        },
        (None, Some(with)) => route.replace_matched(&head.path, with),
        (None, None) => head.path.clone(),
    };
    format!("{scheme}://{host}{path}")
}

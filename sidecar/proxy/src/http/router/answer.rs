//! The answer: passed on, or one of our own where there is none.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
};

use http::Method;

use super::{
    Context, TryError,
    request::{MAX_DURATION, expand, millis},
    tries::Open,
};
use crate::{
    config::route::Destination,
    http::{
        downstream::Downstream,
        exchange::{self, Failure, Replay, RequestPump, Stage, Timers},
        filters::cross_origin_headers,
        headers::HeaderId,
        local_reply::{self, LocalReply},
        message::{BodyKind, RequestHead, ResponseHead, StreamError},
        record::{Flag, Record},
    },
    upstream::{connect::ConnectError, names::NameError},
};

/// Envoy's answers and flags for what went wrong.
pub(super) fn failure(rec: &mut Record, e: &TryError, exhausted: bool) -> LocalReply {
    const PREFIX: &str = "upstream connect error or disconnect/reset before headers. ";
    if exhausted {
        rec.flag(Flag::Urx);
    }
    let reply = |rec: &mut Record, flag, details: &'static str, status, body: String| {
        rec.flag(flag);
        rec.details = details.into();
        LocalReply::text(status, body)
    };
    match e {
        TryError::NoHost => reply(rec, Flag::Uh, "no_healthy_upstream", 503, "no healthy upstream".into()),
        TryError::Name(e) => {
            let (flag, body) = match e {
                NameError::Full => (Flag::Uo, "DNS cache overflow"),
                NameError::Invalid | NameError::Unresolved => (Flag::Df, "DNS resolution failure"),
            };
            reply(rec, flag, e.details(), 503, body.into())
        }
        TryError::Overflow => {
            let mut r = reply(
                rec,
                Flag::Uo,
                "upstream_reset_before_response_started{overflow}",
                503,
                format!("{PREFIX}reset reason: overflow"),
            );
            r.headers.push_id(HeaderId::XEnvoyOverloaded, b"true");
            r
        }
        TryError::Connect(ConnectError::Timeout) => reply(
            rec,
            Flag::Uf,
            "upstream_reset_before_response_started{connection_timeout}",
            503,
            format!("{PREFIX}reset reason: connection timeout"),
        ),
        TryError::Connect(e) => {
            // The reason helps who reads the log; the client need not learn addresses or certificates.
            rec.transport_failure = e.to_string();
            reply(
                rec,
                Flag::Uf,
                "upstream_reset_before_response_started{remote_connection_failure}",
                503,
                format!("{PREFIX}reset reason: remote connection failure"),
            )
        }
        TryError::Invalid => reply(rec, Flag::Dpe, "request_not_forwardable", 400, "Bad Request".into()),
        TryError::Exchange(f) => match f {
            Failure::Timeout | Failure::PerTryTimeout => {
                reply(rec, Flag::Ut, "response_timeout", 504, "upstream request timeout".into())
            }
            Failure::Duration => LocalReply {
                grpc: Some(4),
                ..reply(rec, Flag::Dt, MAX_DURATION, 504, "downstream duration timeout".into())
            },
            Failure::Request => {
                rec.details = "request_overall_timeout".into();
                LocalReply::text(408, "request timeout")
            }
            Failure::Idle => reply(rec, Flag::Si, "stream_idle_timeout", 504, "stream timeout".into()),
            Failure::Upstream(StreamError::Protocol | StreamError::TooLarge) => reply(
                rec,
                Flag::Upe,
                "upstream_reset_before_response_started{protocol_error}",
                502,
                format!("{PREFIX}reset reason: protocol error"),
            ),
            Failure::Upstream(StreamError::Refused) => reply(
                rec,
                Flag::Ur,
                "upstream_reset_before_response_started{remote_refused_stream_reset}",
                503,
                format!("{PREFIX}reset reason: remote refused stream reset"),
            ),
            Failure::Upstream(StreamError::Reset) => reply(
                rec,
                Flag::Uc,
                "upstream_reset_before_response_started{connection_termination}",
                503,
                format!("{PREFIX}reset reason: connection termination"),
            ),
            Failure::Downstream(StreamError::Reset | StreamError::Refused) => {
                reply(rec, Flag::Dc, "downstream_remote_disconnect", 0, String::new())
            }
            Failure::Downstream(_) => reply(rec, Flag::Dpe, "http1.codec_error", 400, "Bad Request".into()),
        },
    }
}

/// The two directions of a request and what moved in them.
pub(super) struct Flow<'a, D> {
    pub(super) down: &'a D,
    pub(super) replay: &'a RefCell<Replay>,
    pub(super) received: &'a Cell<u64>,
    pub(super) sent: &'a Cell<u64>,
    /// `set-cookie` for the client.
    pub(super) cookie: Option<&'a str>,
}

/// Passes an answer on.
pub(super) async fn respond<D: Downstream>(
    ctx: &Context<'_>,
    destination: &Destination,
    open: &Open,
    timers: &mut Timers,
    request: &RequestHead,
    mut response: ResponseHead,
    flow: &Flow<'_, D>,
    rec: &mut Record,
) {
    let down = flow.down;
    finish_response(ctx, destination, &mut response, flow.cookie, rec);
    rec.status = response.status;
    let connect = request.method == Method::CONNECT && request.upgrade.is_none();
    let tunnel = response.status == 101 || (connect && (200..300).contains(&response.status));
    let end = response.body == BodyKind::Empty && !tunnel;
    let started = down.start(&response, end);
    rec.response = Some(response);
    if started.is_err() {
        rec.flag(Flag::Dc);
        return;
    }
    if end {
        if poll_fn(|cx| down.poll_flush(cx)).await.is_err() {
            rec.flag(Flag::Dc);
        }
        return;
    }
    // A refused upgrade is an ordinary answer; the bytes held back belong to nobody.
    let stage = if request.upgrade.is_some() && !tunnel { Stage::Refused } else { open.stage };
    let mut pump = RequestPump::new(down, &open.up, flow.replay, flow.received, stage);
    match exchange::response(&mut pump, timers, flow.sent, tunnel).await {
        Ok(trailers) => rec.trailers = trailers,
        Err(f) => {
            let (flag, details) = match f {
                Failure::Downstream(_) => (Flag::Dc, "downstream_remote_disconnect"),
                Failure::Timeout | Failure::PerTryTimeout => (Flag::Ut, "response_timeout"),
                Failure::Duration => (Flag::Dt, MAX_DURATION),
                // Disarmed when the answer begins.
                Failure::Idle | Failure::Request => (Flag::Si, "stream_idle_timeout"),
                Failure::Upstream(StreamError::Refused) => {
                    (Flag::Ur, "upstream_reset_after_response_started{remote_reset}")
                }
                Failure::Upstream(StreamError::Protocol | StreamError::TooLarge) => {
                    (Flag::Upe, "upstream_reset_after_response_started{protocol_error}")
                }
                Failure::Upstream(StreamError::Reset) => {
                    (Flag::Uc, "upstream_reset_after_response_started{connection_termination}")
                }
            };
            rec.flag(flag);
            rec.details = details.into();
            down.abort();
        }
    }
}

pub(super) fn finish_response(
    ctx: &Context<'_>,
    destination: &Destination,
    response: &mut ResponseHead,
    cookie: Option<&str>,
    rec: &Record,
) {
    let h = &mut response.headers;
    h.remove_id(HeaderId::XEnvoyInternal);
    h.remove_id(HeaderId::XEnvoyDecoratorOperation);
    if !ctx.manager.config.headers.suppress_envoy {
        h.set_number(HeaderId::XEnvoyUpstreamServiceTime, millis(rec.started.elapsed()));
    }
    for edits in [&destination.response_headers, &ctx.route.response_headers, &ctx.vhost.response_headers] {
        if !edits.is_empty() {
            edits.response(h, &|v| expand(v, rec.remote));
        }
    }
    if let Some(cors) = &ctx.passed.cors {
        cross_origin_headers(cors, h);
    }
    if let Some(edits) = &ctx.passed.response {
        edits.apply(h);
    }
    if let (Some(s), Some(host)) = (&ctx.passed.session, &rec.host) {
        s.remember(host, h);
    }
    if let Some(c) = cookie {
        h.push_id(HeaderId::SetCookie, c.as_bytes());
    }
    local_reply::stamp(h, &ctx.manager.config.server_name);
}

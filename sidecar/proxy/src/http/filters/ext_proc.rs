//! External processing (`envoy.filters.http.ext_proc`): a service sees a request and its answer while they pass, and
//! changes them.
//!
//! One stream of messages for each request. Headers of the request, and its body where that is wanted as a whole, are
//! processed before the request goes on; what comes piece by piece, and the answer, by a [`Processor`] around the
//! codec's side of the request. In each direction one message is out at a time, so what waits is bounded by a piece.
//!
//! An answer passes the processor before other filters change it, wherever the filter stands among them.

mod call;
mod link;
mod mutate;
mod process;
mod wire;

use std::{future::poll_fn, rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use mesh_model::proxy::{self as model, BodyMode, ProcessingMode};
use mesh_telemetry::metrics::{ProcEvent, ProcSeries};

use self::{
    call::Call,
    link::{Failed, Link},
    mutate::Rules,
    process::Processor,
    wire::{Change, Immediate, Part, Said},
};
use super::{Passed, ahead};
use crate::{
    config::{CompileError, route::SlotOf},
    http::{
        downstream::Downstream,
        filtered::Ahead,
        headers::{HeaderId, Headers},
        local_reply::LocalReply,
        message::{BodyKind, RequestHead},
        record::{Flag, Record},
    },
    matcher::StringMatcher,
    upstream::cluster::ClusterSlot,
    worker::connection::Connection,
};

/// Bytes of a body that is processed as a whole; Envoy's limit of a connection's buffer.
const MAX_BODY: usize = 1 << 20;
/// Namespace of what a processor says about a request.
const METADATA: &str = "envoy.filters.http.ext_proc";

/// A compiled [`model::ExtProc`].
#[derive(Debug)]
pub(crate) struct ExtProc {
    config: model::ExtProc,
    cluster: Arc<ClusterSlot>,
    rules: Rules,
    allowed: Vec<StringMatcher>,
    disallowed: Vec<StringMatcher>,
    series: std::sync::OnceLock<ProcSeries>,
}

/// Settings of a route, compiled.
#[derive(Debug, Clone)]
pub(crate) enum ProcOverride {
    Disabled,
    Set {
        mode: Option<ProcessingMode>,
        service: Option<(Arc<ClusterSlot>, model::GrpcService)>,
        allow: Option<bool>,
    },
}

impl ProcOverride {
    pub(crate) fn new(o: &model::ProcOverride, slot: SlotOf<'_>) -> Self {
        match o {
            model::ProcOverride::Disabled => Self::Disabled,
            model::ProcOverride::Set { mode, service, failure_mode_allow } => Self::Set {
                mode: *mode,
                service: service.as_ref().map(|g| (slot(&g.cluster), g.clone())),
                allow: *failure_mode_allow,
            },
        }
    }
}

impl ExtProc {
    pub(crate) fn new(c: &model::ExtProc, slot: SlotOf<'_>) -> Result<Self, CompileError> {
        Ok(Self {
            cluster: slot(&c.service.cluster),
            rules: Rules::new(&c.mutation_rules)?,
            allowed: StringMatcher::all(&c.allowed_headers)?,
            disallowed: StringMatcher::all(&c.disallowed_headers)?,
            series: std::sync::OnceLock::new(),
            config: c.clone(),
        })
    }

    /// Whether the processor is shown a header.
    fn shows(&self, name: &[u8]) -> bool {
        let name = name.to_ascii_lowercase();
        let any = |l: &[StringMatcher]| l.iter().any(|m| m.matches(&name));
        !any(&self.disallowed) && (self.allowed.is_empty() || any(&self.allowed))
    }

    pub(crate) async fn run<D: Downstream>(
        self: &Arc<Self>,
        conn: &Rc<Connection>,
        head: &mut RequestHead,
        on_route: Option<&ProcOverride>,
        down: &D,
        passed: &mut Passed,
        rec: &mut Record,
    ) -> Result<(), LocalReply> {
        let (mut mode, mut allow) = (self.config.mode, self.config.failure_mode_allow);
        let (mut cluster, mut service) = (&self.cluster, &self.config.service);
        match on_route {
            Some(ProcOverride::Disabled) => return Ok(()),
            Some(ProcOverride::Set { mode: m, service: s, allow: a }) => {
                mode = m.unwrap_or(mode);
                allow = a.unwrap_or(allow);
                if let Some((c, s)) = s {
                    (cluster, service) = (c, s);
                }
            }
            None => {}
        }
        let nothing =
            ProcessingMode { request_headers: false, response_headers: false, ..ProcessingMode::default() };
        if mode == nothing {
            return Ok(());
        }
        let series =
            self.series.get_or_init(|| conn.worker.shared.metrics.proc_series(&self.config.stat_prefix));
        series.count(ProcEvent::StreamStarted);
        let mut link = Link::new(Arc::clone(self), &conn.worker, mode, allow, series.clone());
        match Call::open(&conn.worker, cluster, service, self.config.message_timeout).await {
            Ok(call) => link.open(call),
            Err(e) => link.fail(Failed::Error(e)).map_err(|f| self.refuse(f, rec))?,
        }
        self.request(&mut link, head, down, passed, rec).await?;
        let tunnel = head.opens_tunnel();
        if let Some(bodies) = down.bodies()
            && link.is_open()
            && !tunnel
        {
            bodies.process(Box::new(Processor::new(link, head)));
        }
        Ok(())
    }

    /// Headers, and a body that is wanted as a whole.
    async fn request<D: Downstream>(
        &self,
        link: &mut Link,
        head: &mut RequestHead,
        down: &D,
        passed: &mut Passed,
        rec: &mut Record,
    ) -> Result<(), LocalReply> {
        let tunnel = head.opens_tunnel();
        if link.mode.request_headers && link.is_open() {
            let end = head.body == BodyKind::Empty && !tunnel;
            link.send(Part::RequestHeaders, wire::request_headers(head, end, &|n| self.shows(n)));
            if let Some(c) = self.said(link, Part::RequestHeaders, rec).await? {
                self.change(&c, link, head, passed, rec)?;
                if c.replace
                    && let Some(bodies) = down.bodies()
                {
                    let body = c.body.unwrap_or_default();
                    set_length(head, body.len());
                    bodies.replace(body, true);
                    link.mode.request_body = BodyMode::None;
                    link.mode.request_trailers = false;
                }
            }
        }
        if tunnel || head.body == BodyKind::Empty || !link.is_open() {
            return Ok(());
        }
        match link.mode.request_body {
            BodyMode::None => return Ok(()),
            BodyMode::Streamed => {
                // What becomes of its length is not known yet.
                head.headers.remove_id(HeaderId::ContentLength);
                head.body = BodyKind::Stream;
                return Ok(());
            }
            BodyMode::Buffered | BodyMode::BufferedPartial => {}
        }
        let got = ahead(down, MAX_BODY, rec).await?;
        if got == Ahead::More && link.mode.request_body == BodyMode::Buffered {
            rec.details = "request_payload_too_large".into();
            return Err(LocalReply::text(413, "Payload Too Large"));
        }
        let Some(bodies) = down.bodies() else { return Ok(()) };
        link.mode.request_body = BodyMode::None;
        let end = got == Ahead::Whole && !bodies.has_trailers();
        link.send(Part::RequestBody, wire::body(Part::RequestBody, &bodies.peek(usize::MAX), end));
        let Some(c) = self.said(link, Part::RequestBody, rec).await? else { return Ok(()) };
        self.change(&c, link, head, passed, rec)?;
        if got == Ahead::More {
            head.headers.remove_id(HeaderId::ContentLength);
            head.body = BodyKind::Stream;
        }
        if let Some(body) = c.body {
            if got == Ahead::Whole && !bodies.has_trailers() {
                set_length(head, body.len());
            } else {
                head.headers.remove_id(HeaderId::ContentLength);
                head.body = BodyKind::Stream;
            }
            bodies.replace(body, false);
        }
        Ok(())
    }

    /// What the processor said to a message; `None`: nothing more is processed.
    async fn said(
        &self,
        link: &mut Link,
        part: Part,
        rec: &mut Record,
    ) -> Result<Option<Change>, LocalReply> {
        let said = poll_fn(|cx| link.poll_said(cx, part.of_request())).await;
        for (k, v) in std::mem::take(&mut link.metadata) {
            rec.metadata.get_or_insert_default().set(METADATA, k, Arc::new(v));
        }
        match said {
            Ok(Some(Said::Change(p, c))) if p == part => Ok(Some(c)),
            Ok(Some(Said::Immediate(i))) => Err(self.immediate(link, &i, rec)?),
            Ok(Some(_)) => {
                link.series.count(ProcEvent::Spurious);
                link.fail(Failed::Error("a message that nothing was asked about".to_owned()))
                    .map_err(|f| self.refuse(f, rec))?;
                Ok(None)
            }
            Ok(None) => Ok(None),
            Err(f) => Err(self.refuse(f, rec)),
        }
    }

    fn change(
        &self,
        c: &Change,
        link: &mut Link,
        head: &mut RequestHead,
        passed: &mut Passed,
        rec: &mut Record,
    ) -> Result<(), LocalReply> {
        let changed = c.headers != wire::Mutation::default();
        if let Err(f) = link.mutate(&c.headers, head) {
            return Err(self.refuse(f, rec));
        }
        passed.reroute |= match self.config.route_cache {
            model::RouteCache::Asked => c.clear_route && changed,
            model::RouteCache::Clear => changed,
            model::RouteCache::Retain => false,
        };
        Ok(())
    }

    /// An answer in the place of the upstream's; `Err` if it may not give one, which counts as a failure.
    fn immediate(&self, link: &mut Link, i: &Immediate, rec: &mut Record) -> Result<LocalReply, LocalReply> {
        link.series.count(ProcEvent::Immediate);
        let reply = self.reply(i);
        rec.details = if i.details.is_empty() {
            "ext_proc_immediate_response".into()
        } else {
            clean(&i.details).into()
        };
        link.close();
        Ok(reply)
    }

    fn reply(&self, i: &Immediate) -> LocalReply {
        let mut headers = Headers::default();
        // Rules are about what passes; this is the processor's own.
        let _ = mutate::apply(&i.headers, &Rules::default(), &mut headers);
        LocalReply {
            status: i.status,
            is_text: !headers.has(HeaderId::ContentType),
            headers,
            body: i.body.clone(),
            grpc: i.grpc,
        }
    }

    fn refuse(&self, f: Failed, rec: &mut Record) -> LocalReply {
        rec.flag(Flag::Uaex);
        rec.details = f.details().into();
        LocalReply { status: f.status(self.config.status_on_error), ..LocalReply::default() }
    }
}

/// Details as they may stand in a log.
fn clean(s: &str) -> String {
    s.chars().map(|c| if c.is_ascii_graphic() { c } else { '_' }).take(128).collect()
}

fn set_length(head: &mut RequestHead, n: usize) {
    head.body = BodyKind::Length(n as u64);
    head.headers.set_id(HeaderId::ContentLength, n.to_string().as_bytes());
}

/// Nothing to wait for.
const NO_LIMIT: Duration = Duration::from_secs(1 << 30);

/// The empty piece.
const EMPTY: Bytes = Bytes::new();

/// An answer: whatever it changes, the request stays one, and what it says of a body is a part of it.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(data: &[u8]) {
    let data = bytes::Bytes::copy_from_slice(data);
    let Ok(answer) = wire::answer(&data) else { return };
    let changes = match &answer.said {
        wire::Said::Change(_, c) => {
            assert!(c.body.as_ref().is_none_or(|b| b.len() <= data.len()));
            &c.headers
        }
        wire::Said::Immediate(i) => {
            assert!(i.body.len() <= data.len());
            &i.headers
        }
        wire::Said::Nothing => return,
    };
    let mut head = super::fuzz_head();
    let _ = mutate::apply(changes, &mutate::Rules::default(), &mut head);
    crate::http::h1::fuzz::forward(&head, &[]);
    let mut head = crate::http::message::ResponseHead {
        status: 200,
        headers: head.headers,
        body: crate::http::message::BodyKind::Stream,
    };
    let _ = mutate::apply(changes, &mutate::Rules::default(), &mut head);
    assert!((200..600).contains(&head.status));
}

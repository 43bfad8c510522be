//! Names that are not the mesh's: asked of resolvers behind, and remembered.
//!
//! Upstreams are asked one after the other, beginning with the one that answered last. What counts as an answer is a set
//! of records or a denial; SERVFAIL, REFUSED, silence and referrals are failures, and only when all have failed is the
//! question answered SERVFAIL. Nothing is denied that no upstream has denied.
//!
//! Answers are remembered for as long as their records say, denials for as long as their SOA says (RFC 2308), and with
//! an age that has been counted down. A truncated answer over UDP is asked for again over TCP.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{DnsRequestOptions, Edns, Message, MessageType, OpCode, Query as DnsQuery, ResponseCode},
    rr::{Name, RecordType},
    serialize::binary::{BinDecodable as _, BinDecoder},
};
use hickory_resolver::{
    NameServerPool, PoolContext, ResponseCache, TlsConfig, TtlConfig,
    config::{NameServerConfig, ResolverOpts, ServerOrderingStrategy},
    net::{
        DnsError, DnsHandle as _, NetError, NoRecords, runtime::TokioRuntimeProvider, xfer::FirstAnswer as _,
    },
    system_conf::read_system_conf,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    StartError,
    metrics::Metrics,
    wire::{self, Code, Query, Reply, Transport},
};

/// A forwarded question is answered within this or with SERVFAIL: clients ask again after five seconds.
const DEADLINE: Duration = Duration::from_secs(4);
/// One upstream has this long, so that a second one has time left.
const ATTEMPT: Duration = Duration::from_millis(1500);
/// Answers remembered.
const CACHE: u64 = 8192;
/// Longest that an answer and a denial are remembered (RFC 2308, section 5 suggests one to three hours for those).
const MAX_TTL: Duration = Duration::from_secs(86_400);
const MAX_DENIAL: Duration = Duration::from_secs(3600);
/// Questions that wait for upstreams. Each holds a few kilobytes, so this is some megabytes.
const WAITING: u16 = 1024;

/// Resolvers behind, with what they have said.
pub(crate) struct Upstreams {
    servers: Vec<Upstream>,
    /// The one that answered last.
    first: AtomicUsize,
    cache: ResponseCache,
    waiting: Arc<Semaphore>,
    metrics: Metrics,
}

struct Upstream {
    pool: NameServerPool<TokioRuntimeProvider>,
    failures: Arc<AtomicU64>,
}

/// What a question has come to. `None` if nobody answered.
pub(crate) type Answer = Option<Message>;

impl Upstreams {
    /// # Errors
    /// If connections cannot be set up at all.
    pub(crate) fn new(addresses: &[SocketAddr], metrics: Metrics) -> Result<Self, StartError> {
        let mut options = ResolverOpts::default();
        options.timeout = ATTEMPT;
        options.attempts = 1;
        options.num_concurrent_reqs = 1;
        options.max_active_requests = WAITING.into();
        options.server_ordering_strategy = ServerOrderingStrategy::UserProvidedOrder;
        options.positive_max_ttl = Some(MAX_TTL);
        options.negative_max_ttl = Some(MAX_DENIAL);
        options.edns_payload_len = wire::MAX_PAYLOAD;
        let ttl = TtlConfig::from_opts(&options);
        let tls = TlsConfig::new().map_err(|e| StartError::Upstream(e.to_string()))?;
        let context = Arc::new(PoolContext::new(options, tls));
        let servers = addresses.iter().map(|a| {
            let mut server = NameServerConfig::udp_and_tcp(a.ip());
            for c in &mut server.connections {
                c.port = a.port();
            }
            let provider = TokioRuntimeProvider::default();
            let pool = NameServerPool::from_config([server], context.clone(), provider);
            Upstream { pool, failures: metrics.upstream(*a) }
        });
        Ok(Self {
            servers: servers.collect(),
            first: AtomicUsize::new(0),
            cache: ResponseCache::new(CACHE, ttl),
            waiting: Arc::new(Semaphore::new(WAITING.into())),
            metrics,
        })
    }

    /// Whether there is anybody to ask.
    pub(crate) fn any(&self) -> bool {
        !self.servers.is_empty()
    }

    /// What is remembered.
    pub(crate) fn remembered(&self, query: &DnsQuery) -> Option<Message> {
        let found = self.cache.get(query, Instant::now());
        if self.any() {
            self.metrics.cached(found.is_some());
        }
        message(found?)
    }

    /// A place among those who wait, if there is one.
    pub(crate) fn admit(&self) -> Option<OwnedSemaphorePermit> {
        let place = self.waiting.clone().try_acquire_owned().ok();
        if place.is_none() {
            self.metrics.unanswered();
        }
        place
    }

    /// Waits until nobody waits.
    pub(crate) async fn idle(&self) {
        // Never closed.
        let _ = self.waiting.acquire_many(WAITING.into()).await;
    }

    /// Asks until somebody answers.
    pub(crate) async fn ask(&self, query: &DnsQuery) -> Answer {
        let end = tokio::time::Instant::now() + DEADLINE;
        let first = self.first.load(Relaxed);
        for i in 0..self.servers.len() {
            let at = (first + i) % self.servers.len();
            let server = &self.servers[at];
            let until = end.min(tokio::time::Instant::now() + ATTEMPT);
            let mut options = DnsRequestOptions::default();
            options.edns_payload_len = wire::MAX_PAYLOAD;
            let asking = server.pool.lookup(query.clone(), options).first_answer();
            let result = match tokio::time::timeout_at(until, asking).await {
                Ok(r) => r.map(|r| r.into_message()),
                Err(_) => Err(NetError::Timeout),
            };
            if let Some(answer) = self.accept(query, result) {
                self.first.store(at, Relaxed);
                return Some(answer);
            }
            server.failures.fetch_add(1, Relaxed);
            if tokio::time::Instant::now() >= end {
                break;
            }
        }
        None
    }

    fn accept(&self, query: &DnsQuery, result: Result<Message, NetError>) -> Answer {
        if let Err(error) = &result
            && !is_denial(error)
        {
            tracing::debug!(%error, %query, "an upstream did not answer");
            return None;
        }
        let now = Instant::now();
        self.cache.insert(query.clone(), result.clone(), now);
        message(result)
    }
}

/// Whether there is somebody who said that there is nothing. Without SOA but with name servers it is a referral: whoever
/// sent it does not resolve.
fn is_denial(e: &NetError) -> bool {
    matches!(e, NetError::Dns(DnsError::NoRecordsFound(NoRecords { response_code, soa, ns, .. }))
        if matches!(response_code, ResponseCode::NXDomain)
            || (*response_code == ResponseCode::NoError && (soa.is_some() || ns.is_none())))
}

/// A denial as the message that it was.
fn message(result: Result<Message, NetError>) -> Option<Message> {
    match result {
        Ok(m) => Some(m),
        Err(NetError::Dns(DnsError::NoRecordsFound(n))) => {
            let mut m = Message::new(0, MessageType::Response, OpCode::Query);
            m.metadata.response_code = n.response_code;
            m.authorities = match (n.authorities, n.soa) {
                (Some(all), _) => all.to_vec(),
                (None, Some(soa)) => vec![soa.into_record_of_rdata()],
                (None, None) => vec![],
            };
            Some(m)
        }
        Err(_) => None,
    }
}

/// A question as upstreams are asked it.
pub(crate) fn question(query: &Query<'_>) -> Option<DnsQuery> {
    let name = Name::read(&mut BinDecoder::new(query.name_as_sent())).ok()?;
    Some(DnsQuery::query(name, RecordType::from(query.kind)))
}

/// Somebody else's answer to `question` as the answer to `query`, which it is made of.
pub(crate) fn encode(
    query: &Query<'_>,
    question: Option<DnsQuery>,
    answer: Answer,
    transport: Transport,
) -> (Vec<u8>, u16) {
    // In an update (RFC 2136) records may be empty, which they are not allowed to be in an answer.
    let answer = answer.filter(|m| m.metadata.op_code == OpCode::Query);
    let Some((mut m, question)) = answer.zip(question) else {
        let mut out = vec![0; usize::from(wire::MAX_PAYLOAD)];
        let len = crate::answer::failed(query, Code::ServFail, &mut out, transport);
        out.truncate(len);
        return (out, Code::ServFail as u16);
    };
    m.queries.clear();
    m.queries.push(question);
    m.signature = None;
    let code = u16::from(m.metadata.response_code);
    let d = &mut m.metadata;
    (d.id, d.message_type, d.op_code) = (query.id(), MessageType::Response, OpCode::Query);
    (d.authoritative, d.truncation, d.authentic_data, d.recursion_available) = (false, false, false, true);
    (d.recursion_desired, d.checking_disabled) = (query.recursion_desired(), query.checking_disabled());
    m.edns = query.edns.map(|e| {
        let mut own = Edns::new();
        own.set_max_payload(wire::MAX_PAYLOAD).set_version(0).set_dnssec_ok(e.dnssec_ok);
        own
    });
    let limit = query.limit(transport);
    let fits = |m: &Message| m.to_vec().ok().filter(|bytes| bytes.len() <= limit);
    let mut whole = fits(&m);
    if whole.is_none() && !m.additionals.is_empty() {
        m.additionals.clear();
        whole = fits(&m);
    }
    if let Some(bytes) = whole {
        return (bytes, code);
    }
    let mut out = vec![0; usize::from(wire::MAX_PAYLOAD)];
    let mut reply = Reply::new(query, &mut out, transport);
    reply.authoritative = false;
    reply.truncate();
    let len = reply.finish();
    out.truncate(len);
    (out, code)
}

/// The system's resolvers.
pub(crate) fn of_system() -> Vec<SocketAddr> {
    match read_system_conf() {
        Ok((config, _)) => {
            let mut all: Vec<_> = config.name_servers().iter().map(|s| SocketAddr::new(s.ip, 53)).collect();
            all.dedup();
            all
        }
        Err(error) => {
            tracing::warn!(%error, "no resolver of the system: foreign names get SERVFAIL");
            vec![]
        }
    }
}

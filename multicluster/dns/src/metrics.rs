//! Figures of a resolver.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter},
    registry::Registry,
};

use crate::{wire::Code, zone::Zone};

/// Codes that are counted under their names; the rest is one.
const CODES: [&str; 8] =
    ["NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED", "BADVERS", "OTHER"];

/// Counters of one worker: shared with nobody else that writes, so that counting costs no cache line.
#[derive(Debug, Default)]
pub(crate) struct Counts([[AtomicU64; CODES.len()]; Zone::ALL.len()]);

impl Counts {
    pub(crate) fn answered(&self, zone: Zone, code: Code) {
        let at = match code {
            Code::BadVers => 6,
            c => c as usize,
        };
        self.add(zone, at);
    }

    /// An answer with a code of somebody else's.
    pub(crate) fn passed_on(&self, code: u16) {
        self.add(Zone::Foreign, if code < 6 { usize::from(code) } else { 7 });
    }

    fn add(&self, zone: Zone, code: usize) {
        if let Some(c) = self.0.get(zone as usize).and_then(|z| z.get(code)) {
            c.fetch_add(1, Relaxed);
        }
    }
}

/// What resolvers of a process count.
#[derive(Debug, Clone, Default)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    workers: Mutex<Vec<Arc<Counts>>>,
    upstreams: Mutex<Vec<(SocketAddr, Arc<AtomicU64>)>>,
    hits: AtomicU64,
    misses: AtomicU64,
    unanswered: AtomicU64,
}

impl Metrics {
    /// Figures that nobody has counted in yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Shows them in a registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register_collector(Box::new(self.clone()));
    }

    pub(crate) fn worker(&self) -> Arc<Counts> {
        let counts = Arc::<Counts>::default();
        self.0.workers.lock().unwrap_or_else(PoisonError::into_inner).push(counts.clone());
        counts
    }

    pub(crate) fn upstream(&self, address: SocketAddr) -> Arc<AtomicU64> {
        let failures = Arc::<AtomicU64>::default();
        let mut all = self.0.upstreams.lock().unwrap_or_else(PoisonError::into_inner);
        all.push((address, failures.clone()));
        failures
    }

    pub(crate) fn cached(&self, hit: bool) {
        (if hit { &self.0.hits } else { &self.0.misses }).fetch_add(1, Relaxed);
    }

    pub(crate) fn unanswered(&self) {
        self.0.unanswered.fetch_add(1, Relaxed);
    }
}

impl Collector for Metrics {
    fn encode(&self, mut out: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let workers = self.0.workers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let help = "Questions answered, by zone and response code";
        let mut queries = out.encode_descriptor("flotilla_dns_queries", help, None, MetricType::Counter)?;
        for zone in Zone::ALL {
            for (i, code) in CODES.into_iter().enumerate() {
                let n: u64 = workers.iter().map(|w| w.0[zone as usize][i].load(Relaxed)).sum();
                if n > 0 {
                    let labels = [("zone", zone.label()), ("rcode", code)];
                    ConstCounter::new(n).encode(queries.encode_family(&labels)?)?;
                }
            }
        }
        let upstreams = self.0.upstreams.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let help = "Questions that an upstream did not answer, or refused, or failed to answer";
        let mut failures =
            out.encode_descriptor("flotilla_dns_upstream_failures", help, None, MetricType::Counter)?;
        for (address, n) in upstreams {
            let labels = [("upstream", address.to_string())];
            ConstCounter::new(n.load(Relaxed)).encode(failures.encode_family(&labels)?)?;
        }
        for (name, help, n) in [
            ("flotilla_dns_cache_hits", "Forwarded questions that the cache answered", &self.0.hits),
            ("flotilla_dns_cache_misses", "Forwarded questions that an upstream was asked", &self.0.misses),
            (
                "flotilla_dns_unanswered",
                "Questions turned down because too many wait for upstreams",
                &self.0.unanswered,
            ),
        ] {
            let counter = out.encode_descriptor(name, help, None, MetricType::Counter)?;
            ConstCounter::new(n.load(Relaxed)).encode(counter)?;
        }
        Ok(())
    }
}

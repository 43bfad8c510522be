//! Mixer beside the engine: every request that enters is checked, every one that ends is reported.
//!
//! - A check seldom leaves the process: answers are kept for what they depend on. Without an answer
//!   the request is denied with 503, or passes with `--mixer-fail-open`.
//! - A report never waits: it joins a bounded queue or is dropped and counted.
//! - Whom to ask is in the mesh's settings, and flags of the proxy go before these.
//! - `authorization`, `proxy-authorization` and `cookie` are there for a check, which may need them,
//!   and not in a report, where they would only end in somebody's log.

mod bag;

use std::sync::{
    Arc, Mutex, PoisonError, RwLock,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use anyhow::{Context, ensure};
use mesh_identity::SecretStore;
use mesh_model::proxy::Mixer;
use mesh_proxy::{HookFuture, PolicyDecision, PolicyHook, RequestAttributes, RequestRecord};
use mesh_telemetry::{
    attributes::Bag,
    check::{CheckClient, CheckOptions, Outcome, QuotaCharge},
    report::{ReportClient, ReportOptions},
};
use mesh_xds::client::lazy_channel;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::counter::ConstCounter,
    registry::Registry,
};

use crate::{ProxyArgs, control_plane};
use bag::Node;

/// Flags for Mixer.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct MixerArgs {
    /// Ask Mixer at HOST:PORT (usually the control plane's port 9091) about every inbound request, instead of mixerCheckServer
    /// of the mesh's settings
    #[arg(long, value_name = "HOST:PORT")]
    pub mixer_check: Option<String>,
    /// Report every request and connection to Mixer at HOST:PORT, instead of mixerReportServer of the mesh's settings
    #[arg(long, value_name = "HOST:PORT")]
    pub mixer_report: Option<String>,
    /// Let requests pass when Mixer does not answer
    #[arg(long)]
    pub mixer_fail_open: bool,
    /// Charge every inbound request to this quota instance, NAME or NAME=AMOUNT, where Mixer is asked; repeated
    #[arg(long, value_name = "NAME[=AMOUNT]")]
    pub mixer_quota: Vec<String>,
}

impl MixerArgs {
    fn charges(&self) -> anyhow::Result<Vec<QuotaCharge>> {
        self.mixer_quota
            .iter()
            .map(|q| {
                let (name, amount) = match q.split_once('=') {
                    None => (q.as_str(), 1),
                    Some((n, a)) => {
                        (n, a.parse().with_context(|| format!("--mixer-quota {q:?}: {a:?} is no amount"))?)
                    }
                };
                ensure!(!name.is_empty(), "--mixer-quota {q:?}: no name");
                ensure!(amount > 0, "--mixer-quota {q:?}: the amount must be more than 0");
                Ok(QuotaCharge { name: name.to_owned(), amount })
            })
            .collect()
    }
}

/// The engine's hook.
pub struct MixerHook {
    flags: MixerArgs,
    proxy: ProxyArgs,
    store: Arc<SecretStore>,
    charges: Vec<QuotaCharge>,
    node: Node,
    clients: Arc<Clients>,
}

/// Who is asked and told now.
#[derive(Default)]
struct Clients {
    /// What they were made for.
    settings: Mutex<Option<Mixer>>,
    now: RwLock<Pair>,
    checks: AtomicBool,
    reports: AtomicBool,
}

#[derive(Clone, Default)]
struct Pair {
    check: Option<CheckClient>,
    /// There should be somebody to check, and nobody can be asked.
    refuses: bool,
    report: Option<ReportClient>,
}

impl Clients {
    fn now(&self) -> Pair {
        self.now.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl MixerHook {
    /// A hook as the flags say. Connections are made when they are needed, with the workload's certificate, to a control
    /// plane of the mesh. Counters go into `registry`.
    ///
    /// Call it on the runtime that is to send the reports.
    ///
    /// # Errors
    /// Names the flag that is not valid.
    pub fn new(
        args: &MixerArgs,
        proxy: &ProxyArgs,
        store: &Arc<SecretStore>,
        registry: &mut Registry,
    ) -> anyhow::Result<Self> {
        for (flag, address) in [("--mixer-check", &args.mixer_check), ("--mixer-report", &args.mixer_report)]
        {
            if let Some(a) = address {
                ensure!(is_address(a), "{flag} {a:?}: expected host:port");
            }
        }
        let clients = Arc::new(Clients::default());
        registry.register_collector(Box::new(Counts(clients.clone())));
        let hook = Self {
            flags: args.clone(),
            proxy: proxy.clone(),
            store: store.clone(),
            charges: args.charges()?,
            node: Node::new(proxy)?,
            clients,
        };
        hook.make(&Mixer::default())?;
        Ok(hook)
    }

    /// Takes what the mesh's settings say, where no flag says otherwise. It is in force when this returns: requests are denied
    /// where they are to be checked and nobody can be asked. Call it on the runtime that is to send the reports.
    pub fn configure(&self, said: Option<&Mixer>) {
        let said = said.cloned().unwrap_or_default();
        if let Err(error) = self.make(&said) {
            tracing::error!(%error, check = %said.check, report = %said.report, "Mixer cannot be asked as the mesh's settings say");
        }
    }

    fn make(&self, said: &Mixer) -> anyhow::Result<()> {
        let mut settings = self.clients.settings.lock().unwrap_or_else(PoisonError::into_inner);
        if settings.as_ref() == Some(said) {
            return Ok(());
        }
        let of = |flag: &Option<String>, said: &str| {
            flag.clone().or_else(|| Some(said.to_owned()).filter(|s| !s.is_empty()))
        };
        let channel = |a: &str| {
            ensure!(is_address(a), "{a:?}: expected host:port");
            Ok(lazy_channel(&control_plane(&self.proxy, a, &self.store)?)?)
        };
        let (first, before) = (settings.is_none(), settings.clone().unwrap_or_default());
        let mut pair = self.clients.now();
        let mut failed = None;
        // Who stays keeps answers, and reports that wait.
        let check = of(&self.flags.mixer_check, &said.check);
        if first || check != of(&self.flags.mixer_check, &before.check) || said.fail_open != before.fail_open
        {
            let fail_open = self.flags.mixer_fail_open || said.fail_open;
            let options = CheckOptions { fail_open, ..CheckOptions::default() };
            match check.map(|a| anyhow::Ok(CheckClient::new(channel(&a)?, options))).transpose() {
                Ok(made) => (pair.check, pair.refuses) = (made, false),
                Err(e) => {
                    (pair.refuses, failed) = (pair.check.is_none() && !fail_open, Some(e));
                }
            }
        }
        let report = of(&self.flags.mixer_report, &said.report);
        if first || report != of(&self.flags.mixer_report, &before.report) {
            match report
                .map(|a| anyhow::Ok(ReportClient::start(channel(&a)?, ReportOptions::default())))
                .transpose()
            {
                Ok(made) => pair.report = made,
                Err(e) => failed = Some(e),
            }
        }
        let (checks, reports) = (pair.check.is_some() || pair.refuses, pair.report.is_some());
        *self.clients.now.write().unwrap_or_else(PoisonError::into_inner) = pair;
        self.clients.checks.store(checks, Relaxed);
        self.clients.reports.store(reports, Relaxed);
        *settings = Some(said.clone());
        failed.map_or(Ok(()), Err)
    }
}

fn is_address(a: &str) -> bool {
    a.rsplit_once(':').is_some_and(|(h, p)| !h.is_empty() && p.parse::<u16>().is_ok())
}

impl PolicyHook for MixerHook {
    fn check<'a>(&'a self, request: &'a RequestAttributes<'a>) -> HookFuture<'a, PolicyDecision> {
        let now = self.clients.now();
        let Some(client) = now.check else {
            let decision = if now.refuses {
                let body = "UNAVAILABLE:policy is not available".to_owned();
                PolicyDecision::Deny { status: 503, body, grpc: None }
            } else {
                PolicyDecision::Allow
            };
            return Box::pin(std::future::ready(decision));
        };
        Box::pin(async move {
            let bag: Bag = self.node.request(request);
            match client.check(&bag, &self.charges).await {
                Outcome::Allow => PolicyDecision::Allow,
                Outcome::Deny(d) => PolicyDecision::Deny {
                    status: d.http_status,
                    body: d.body,
                    // Mixer's codes are gRPC's.
                    grpc: u32::try_from(d.code).ok(),
                },
            }
        })
    }

    fn report(&self, record: &RequestRecord<'_>) {
        if let Some(client) = self.clients.now().report {
            // What is dropped is counted.
            let _ = client.report(self.node.record(record));
        }
    }

    fn checks(&self) -> bool {
        self.clients.checks.load(Relaxed)
    }

    fn reports(&self) -> bool {
        self.clients.reports.load(Relaxed)
    }
}

/// The clients' counts as metrics.
struct Counts(Arc<Clients>);

impl std::fmt::Debug for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Counts")
    }
}

impl Collector for Counts {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut out = Vec::new();
        let now = self.0.now();
        if let Some(c) = &now.check {
            let s = c.stats();
            out.extend([
                ("mixer_check_cache_hits", "Checks answered without asking Mixer", s.hits),
                ("mixer_check_calls", "Checks that asked Mixer", s.calls),
                ("mixer_check_failures", "Checks that Mixer did not answer", s.failures),
            ]);
        }
        if let Some(r) = &now.report {
            out.extend([
                ("mixer_reports_sent", "Reports that Mixer took", r.sent()),
                ("mixer_reports_dropped", "Reports lost to a full queue or a failed call", r.dropped()),
            ]);
        }
        for (name, help, value) in out {
            let counter = ConstCounter::new(value);
            let metric = encoder.encode_descriptor(name, help, None, counter.metric_type())?;
            counter.encode(metric)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

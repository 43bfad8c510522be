//! Mixer beside the engine: every request that enters is checked, every one that ends is reported.
//!
//! - A check seldom leaves the process: answers are kept for what they depend on. Without an answer
//!   the request is denied with 503, or passes with `--mixer-fail-open`.
//! - A report never waits: it joins a bounded queue or is dropped and counted.
//! - `authorization`, `proxy-authorization` and `cookie` are there for a check, which may need them,
//!   and not in a report, where they would only end in somebody's log.

mod bag;

use anyhow::{Context, ensure};
use mesh_identity::SecretStore;
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
    /// Ask Mixer at HOST:PORT (usually the control plane's port 9091) about every inbound request
    #[arg(long, value_name = "HOST:PORT")]
    pub mixer_check: Option<String>,
    /// Report every request and connection to Mixer at HOST:PORT
    #[arg(long, value_name = "HOST:PORT")]
    pub mixer_report: Option<String>,
    /// Let requests pass when Mixer does not answer
    #[arg(long, requires = "mixer_check")]
    pub mixer_fail_open: bool,
    /// Charge every inbound request to this quota instance, NAME or NAME=AMOUNT; repeated
    #[arg(long, value_name = "NAME[=AMOUNT]", requires = "mixer_check")]
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
    check: Option<CheckClient>,
    report: Option<ReportClient>,
    charges: Vec<QuotaCharge>,
    node: Node,
}

impl MixerHook {
    /// A hook as the flags say, `None` if they say nothing. Connections are made when they are needed, with
    /// the workload's certificate, to a control plane of the mesh. Counters go into `registry`.
    ///
    /// Call it on the runtime that is to send the reports.
    ///
    /// # Errors
    /// Names the flag that is not valid.
    pub fn new(
        args: &MixerArgs,
        proxy: &ProxyArgs,
        store: &SecretStore,
        registry: &mut Registry,
    ) -> anyhow::Result<Option<Self>> {
        if args.mixer_check.is_none() && args.mixer_report.is_none() {
            return Ok(None);
        }
        let channel = |flag: &str, address: &str| {
            let valid =
                address.rsplit_once(':').is_some_and(|(h, p)| !h.is_empty() && p.parse::<u16>().is_ok());
            ensure!(valid, "{flag} {address:?}: expected host:port");
            Ok(lazy_channel(&control_plane(proxy, address, store)?)?)
        };
        let check = match &args.mixer_check {
            None => None,
            Some(a) => {
                let options = CheckOptions { fail_open: args.mixer_fail_open, ..CheckOptions::default() };
                Some(CheckClient::new(channel("--mixer-check", a)?, options))
            }
        };
        let report = match &args.mixer_report {
            None => None,
            Some(a) => Some(ReportClient::start(channel("--mixer-report", a)?, ReportOptions::default())),
        };
        registry.register_collector(Box::new(Counts { check: check.clone(), report: report.clone() }));
        Ok(Some(Self { check, report, charges: args.charges()?, node: Node::new(proxy)? }))
    }
}

impl PolicyHook for MixerHook {
    fn check<'a>(&'a self, request: &'a RequestAttributes<'a>) -> HookFuture<'a, PolicyDecision> {
        let Some(client) = &self.check else { return Box::pin(std::future::ready(PolicyDecision::Allow)) };
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
        if let Some(client) = &self.report {
            // What is dropped is counted.
            let _ = client.report(self.node.record(record));
        }
    }
}

/// The clients' counts as metrics.
struct Counts {
    check: Option<CheckClient>,
    report: Option<ReportClient>,
}

impl std::fmt::Debug for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Counts")
    }
}

impl Collector for Counts {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut out = Vec::new();
        if let Some(c) = &self.check {
            let s = c.stats();
            out.extend([
                ("mixer_check_cache_hits", "Checks answered without asking Mixer", s.hits),
                ("mixer_check_calls", "Checks that asked Mixer", s.calls),
                ("mixer_check_failures", "Checks that Mixer did not answer", s.failures),
            ]);
        }
        if let Some(r) = &self.report {
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

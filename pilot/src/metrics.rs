//! Pilot's metrics, under Istio's names where they exist.

use std::sync::{Arc, atomic::Ordering};

use mesh_xds::{AdsService, server::StatusBoard};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
};

use crate::{run::Shared, source::PilotSource};

/// Reads values when they are scraped, so nothing has to be kept in step.
pub(crate) struct Metrics {
    source: Arc<PilotSource>,
    board: Arc<StatusBoard>,
    shared: Arc<Shared>,
}

impl Metrics {
    pub(crate) fn new(service: &AdsService<PilotSource>, shared: Arc<Shared>) -> Self {
        Self { source: service.source().clone(), board: service.status(), shared }
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics")
    }
}

fn int(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

impl Collector for Metrics {
    fn encode(&self, mut e: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut gauge = |name: &str, help: &str, value: i64| {
            let metric = ConstGauge::new(value);
            let encoder = e.encode_descriptor(name, help, None, metric.metric_type())?;
            metric.encode(encoder)
        };
        let world = self.source.world();
        let (services, routes) =
            world.as_ref().map_or((0, 0), |w| (w.index.services.len(), w.config.virtual_services.len()));
        let problems = self.shared.problems.lock().map_or(0, |p| p.len());
        gauge("pilot_xds", "Connected xDS clients", int(self.board.connected()))?;
        gauge("pilot_services", "Services known", int(services))?;
        gauge("pilot_virt_services", "Virtual services known", int(routes))?;
        gauge("pilot_config_problems", "Findings in the configuration", int(problems))?;
        if let Some(consul) = &self.shared.consul {
            let all = consul.status();
            let down = all.iter().filter(|a| !a.up).count();
            gauge("pilot_consul_agents", "Consul agents that are followed", int(all.len()))?;
            gauge(
                "pilot_consul_agents_down",
                "Those that do not answer; their last known services stay",
                int(down),
            )?;
            let sum = |f: fn(&crate::consul::AgentStatus) -> usize| int(all.iter().map(f).sum());
            gauge("pilot_consul_services", "Services of Consul known", sum(|a| a.services))?;
            gauge("pilot_consul_instances", "Instances of them", sum(|a| a.instances))?;
            gauge("pilot_consul_failing", "Services whose last query failed", sum(|a| a.failing))?;
        }
        let micros = self.shared.last_rebuild_micros.load(Ordering::Relaxed);
        gauge(
            "pilot_last_rebuild_microseconds",
            "Time that the last rebuild of the inputs took",
            i64::try_from(micros).unwrap_or(i64::MAX),
        )?;
        let mut counter = |name: &str, help: &str, value: u64| {
            let metric = ConstCounter::new(value);
            let encoder = e.encode_descriptor(name, help, None, metric.metric_type())?;
            metric.encode(encoder)
        };
        if let Some(consul) = &self.shared.consul {
            let all = consul.status();
            counter("pilot_consul_queries", "Queries to Consul", all.iter().map(|a| a.queries).sum())?;
            counter("pilot_consul_failures", "Those that failed", all.iter().map(|a| a.failures).sum())?;
        }
        counter("pilot_xds_pushes", "xDS responses sent", self.board.pushes())?;
        counter("pilot_total_xds_rejects", "xDS responses rejected by clients", self.board.rejects())?;
        counter("pilot_rebuilds", "Rebuilds of the inputs", self.shared.rebuilds.load(Ordering::Relaxed))
    }
}

//! Counts of checks, by cluster.

use std::{
    fmt,
    sync::{Mutex, PoisonError, Weak, atomic::Ordering::Relaxed},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use super::Counts;
use crate::{
    config::apply::Applier,
    upstream::{cluster::Cluster, host::Health},
};

/// Reads the counts of all clusters that are checked when metrics are asked for.
#[derive(Debug)]
pub(crate) struct HealthMetrics(pub(crate) Weak<Mutex<Applier>>);

type Read = fn(&Counts) -> u64;

const COUNTERS: [(&str, &str, Read); 6] = [
    ("attempt", "Health checks", |c| c.attempt.load(Relaxed)),
    ("success", "Health checks that found a host working", |c| c.success.load(Relaxed)),
    ("failure", "Health checks that found a host failing", |c| c.failure.load(Relaxed)),
    ("passive_failure", "Hosts that took themselves out", |c| c.passive_failure.load(Relaxed)),
    ("network_failure", "Health checks without an answer", |c| c.network_failure.load(Relaxed)),
    ("verify_cluster", "Health checks that another service answered", |c| c.verify_cluster.load(Relaxed)),
];

impl Collector for HealthMetrics {
    fn encode(&self, mut out: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(applier) = self.0.upgrade() else { return Ok(()) };
        let clusters: Vec<_> = {
            let applier = applier.lock().unwrap_or_else(PoisonError::into_inner);
            applier.all_clusters().filter(|c| c.config.health.is_some()).collect()
        };
        if clusters.is_empty() {
            return Ok(());
        }
        for (name, help, read) in COUNTERS {
            let name = format!("envoy_cluster_health_check_{name}");
            let mut family = out.encode_descriptor(&name, help, None, MetricType::Counter)?;
            for c in &clusters {
                let labels = [("envoy_cluster_name", c.config.name.as_str())];
                ConstCounter::new(read(&c.checks)).encode(family.encode_family(&labels)?)?;
            }
        }
        let gauges: [(&str, &str, fn(&Cluster) -> usize); 2] = [
            ("healthy", "Hosts that take traffic", |c| count(c, Health::Healthy)),
            ("degraded", "Hosts that take traffic of the second choice", |c| count(c, Health::Degraded)),
        ];
        for (name, help, read) in gauges {
            let name = format!("envoy_cluster_health_check_{name}");
            let mut family = out.encode_descriptor(&name, help, None, MetricType::Gauge)?;
            for c in &clusters {
                let labels = [("envoy_cluster_name", c.config.name.as_str())];
                let n = i64::try_from(read(c)).unwrap_or(i64::MAX);
                ConstGauge::new(n).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

fn count(c: &Cluster, health: Health) -> usize {
    c.tables().hosts.iter().filter(|h| h.health() == health).count()
}

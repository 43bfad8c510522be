//! Counters of routes that have statistics of their own; Envoy's `vhost.<host>.route.<prefix>.upstream_rq*` are the
//! model, with the names and labels that its Prometheus output has.

use std::sync::Arc;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    envoy_virtual_host: Arc<str>,
    envoy_route: Arc<str>,
    /// First digit of the status; empty without an answer.
    envoy_response_code_class: &'static str,
}

/// The family. Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct RouteMetrics(Family<Labels, Counter>);

/// One route's counters. Clones share them.
#[derive(Debug, Clone)]
pub struct RouteSeries([Counter; 6]);

impl RouteSeries {
    /// Counts a finished request by its status, which is 0 without an answer.
    pub fn count(&self, status: u16) {
        let class = usize::from(status / 100);
        if let Some(c) = self.0.get(class).or(self.0.first()) {
            c.inc();
        }
    }
}

impl RouteMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "envoy_vhost_route_upstream_rq",
            "Requests of routes with a stat_prefix",
            self.0.clone(),
        );
    }

    pub(super) fn series(&self, virtual_host: &str, prefix: &str) -> RouteSeries {
        let (host, route): (Arc<str>, Arc<str>) = (Arc::from(virtual_host), Arc::from(prefix));
        RouteSeries(["", "1", "2", "3", "4", "5"].map(|class| {
            self.0.get_or_create_owned(&Labels {
                envoy_virtual_host: Arc::clone(&host),
                envoy_route: Arc::clone(&route),
                envoy_response_code_class: class,
            })
        }))
    }
}

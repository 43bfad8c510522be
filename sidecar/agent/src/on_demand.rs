//! Clusters and virtual hosts that traffic asks for: the engine's question, passed on to the control plane's client.

use std::fmt;

use mesh_proxy::{HookFuture, OnDemand, Settled, Wanted};
use mesh_xds::client::proxy::on_demand::{Kind, OnDemandNames};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

/// What the engine is given.
pub(crate) struct Asking(pub(crate) OnDemandNames);

impl OnDemand for Asking {
    fn want<'a>(
        &'a self,
        what: Wanted<'a>,
        in_use: &'a dyn Fn(Wanted<'_>) -> bool,
    ) -> HookFuture<'a, Settled> {
        let used = |kind: Kind, name: &str| match kind {
            Kind::Cluster => in_use(Wanted::Cluster(name)),
            // A host has no slash, the name of a route configuration may have some.
            Kind::VirtualHost => name
                .rsplit_once('/')
                .is_some_and(|(routes, host)| in_use(Wanted::VirtualHost { routes, host })),
        };
        let wanted = match what {
            Wanted::Cluster(name) => self.0.want(Kind::Cluster, name, &used),
            Wanted::VirtualHost { host, .. } if host.contains('/') => {
                return Box::pin(async { Settled::Known });
            }
            Wanted::VirtualHost { routes, host } => {
                self.0.want(Kind::VirtualHost, &format!("{routes}/{host}"), &used)
            }
        };
        Box::pin(async move {
            let Ok(mut settled) = wanted else { return Settled::Refused };
            // The names live as long as the engine: nobody else drops what is waited for unsettled.
            let _ = settled.wait_for(|s| *s).await;
            Settled::Known
        })
    }
}

/// Reads the figures when metrics are asked for.
pub(crate) struct Figures(pub(crate) OnDemandNames);

impl fmt::Debug for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Figures")
    }
}

impl Collector for Figures {
    fn encode(&self, mut out: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let s = self.0.stats();
        if s.asked + s.refused == 0 && s.clusters + s.hosts == 0 {
            return Ok(());
        }
        let mut names =
            out.encode_descriptor("flotilla_on_demand_names", "Names subscribed", None, MetricType::Gauge)?;
        for (kind, n) in [("cluster", s.clusters), ("virtual_host", s.hosts), ("pending", s.pending)] {
            let n = ConstGauge::new(i64::try_from(n).unwrap_or(i64::MAX));
            n.encode(names.encode_family(&[("kind", kind)])?)?;
        }
        for (name, help, n) in [
            ("asked", "Times that a name was asked for", s.asked),
            ("evicted", "Names given up for others", s.evicted),
            ("refused", "Requests for names beyond the limit", s.refused),
        ] {
            let name = format!("flotilla_on_demand_{name}");
            let family = out.encode_descriptor(&name, help, None, MetricType::Counter)?;
            ConstCounter::new(n).encode(family)?;
        }
        Ok(())
    }
}

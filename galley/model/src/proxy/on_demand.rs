//! What a proxy fetches when traffic first needs it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use super::VirtualHost;

/// A cluster that does not exist is asked for (`on_demand.v3.OnDemandCds`, `TcpProxy.OnDemand`), and who needs it waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct OnDemandCluster {
    /// How long; after that it counts as missing.
    pub timeout: Duration,
}

impl Default for OnDemandCluster {
    /// Envoy's default.
    fn default() -> Self {
        Self { timeout: Duration::from_secs(5) }
    }
}

/// Virtual hosts of a route configuration that are asked for by the host of a request (`RouteConfiguration.vhds`).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct OnDemandHosts {
    /// Those that are there, by resource name. Not part of the resource on the wire. Their domains are none of the
    /// route configuration's own.
    pub hosts: BTreeMap<String, Arc<VirtualHost>>,
}

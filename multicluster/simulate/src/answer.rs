//! What is told, in the form in which scripts read it.

use std::collections::BTreeMap;

use serde::Serialize;

/// The way of a request.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// Who calls.
    pub caller: Caller,
    /// The request as it was asked about.
    pub request: String,
    /// The service's host, if the mesh knows one.
    pub host: Option<String>,
    /// Where the caller connects to.
    pub destination: String,
    /// Listener that takes the connection.
    pub listener: Option<String>,
    /// Its filter chain; empty if that has no name.
    pub filter_chain: Option<String>,
    /// Route configuration.
    pub route_configuration: Option<String>,
    /// Virtual host.
    pub virtual_host: Option<String>,
    /// Route, by name or by its position in the virtual host.
    pub route: Option<String>,
    /// VirtualService that it is from.
    pub virtual_service: Option<String>,
    /// `forward`, `forward-tcp`, `redirect`, `direct-response`, `deny`, `not-found`, `refuse` or `close`.
    pub action: String,
    /// Status, where a proxy answers itself.
    pub status: Option<u16>,
    /// What the proxy that the destination is is asked for, such as `CONNECT a.example:443`, where bytes go through one.
    pub tunnel: Option<String>,
    /// Why, where a proxy answers itself or does not forward.
    pub detail: String,
    /// Target of a redirect.
    pub location: Option<String>,
    /// Cluster; of several the heaviest.
    pub cluster: Option<String>,
    /// Subset of that cluster; empty for all of the service.
    pub subset: Option<String>,
    /// Destinations and their shares.
    pub weights: Vec<Weight>,
    /// Endpoints of the cluster.
    pub endpoints: Vec<Endpoint>,
    /// Limit of the whole request, such as `15s`; null is none.
    pub timeout: Option<String>,
    /// Retries; null is none.
    pub retries: Option<Retries>,
    /// Injected faults.
    pub fault: Option<Fault>,
    /// Shadows.
    pub mirrors: Vec<Mirror>,
    /// What consistent hashing looks at.
    pub hash: Vec<String>,
    /// A session that stays on a host; null is none.
    pub session: Option<Session>,
    /// Method, authority and path that go upstream.
    pub upstream: Option<Direct>,
    /// Request headers that go upstream, without values that differ with each request.
    pub headers: BTreeMap<String, String>,
    /// Headers that are set on the answer.
    pub response_headers: BTreeMap<String, String>,
    /// How the cluster is spoken to.
    pub traffic_policy: Option<TrafficPolicy>,
    /// Policies that are asked on the way, and what they say.
    pub policies: Vec<Policy>,
    /// What others decide.
    pub asks: Vec<Asked>,
    /// Why others were not chosen.
    pub reasons: Vec<Reason>,
}

/// Who calls.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Caller {
    /// `namespace/workload`.
    pub workload: String,
    /// `sidecar` or `gateway`.
    pub proxy: String,
    /// SPIFFE ID.
    pub principal: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// What no document says.
    pub assumed: Option<String>,
    /// Its proxy gets routes and clusters when it asks for them; told is what holds then.
    pub on_demand: bool,
}

/// A destination.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Weight {
    /// Cluster.
    pub cluster: String,
    /// Host of its service.
    pub host: String,
    /// Subset.
    pub subset: String,
    /// Port.
    pub port: Option<u16>,
    /// Relative to the sum of all.
    pub weight: u32,
}

/// An endpoint.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// `address:port`.
    pub address: String,
    /// `namespace/name` of its workload, if it is one of this cluster.
    pub workload: Option<String>,
    /// `region/zone/subzone`.
    pub locality: String,
    /// 0 is used first.
    pub priority: u32,
    /// Relative weight.
    pub weight: u32,
    /// `healthy`, `degraded`, `unhealthy` or `draining`.
    pub health: &'static str,
    /// Whether traffic goes to it as things are.
    pub active: bool,
    /// `mutual`, `simple` or `none`.
    pub tls: &'static str,
    /// Server name.
    pub sni: Option<String>,
}

/// Retries.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Retries {
    /// Beyond the first try.
    pub attempts: u32,
    /// Limit of each try.
    pub per_try_timeout: Option<String>,
    /// Conditions by Envoy's names, and status codes, divided by commas.
    pub retry_on: String,
}

/// A share of requests.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Share<T: Serialize> {
    /// What happens to them.
    pub value: T,
    /// Percent of requests.
    pub percentage: f64,
}

/// Faults.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Fault {
    /// Delay.
    pub delay: Option<Share<String>>,
    /// Status.
    pub abort: Option<Share<u16>>,
}

/// A shadow.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Mirror {
    /// Where it goes.
    pub cluster: String,
    /// Percent of requests.
    pub percentage: f64,
}

/// A session that stays on a host.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Session {
    /// `cookie` or `header`, in which the client keeps its host.
    pub by: &'static str,
    /// Its name.
    pub name: String,
    /// Path of a cookie; empty otherwise.
    pub path: String,
    /// How long a cookie lasts; null is as long as the client runs.
    pub max_age: Option<String>,
    /// When the session ends, whatever the client does.
    pub absolute_timeout: Option<String>,
    /// The endpoint to which this request stays; null if it is new or its endpoint is gone.
    pub endpoint: Option<String>,
}

/// A request line.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Direct {
    /// Method.
    pub method: String,
    /// Authority.
    pub authority: String,
    /// Path.
    pub path: String,
}

/// How a cluster is spoken to.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TrafficPolicy {
    /// Load balancing, by Istio's names.
    pub load_balancer: String,
    /// Connect timeout.
    pub connect_timeout: String,
    /// `http1`, `http2`, `downstream` or `auto`.
    pub protocol: &'static str,
    /// Null is no limit.
    pub max_connections: Option<u32>,
    /// Null is no limit.
    pub http1_max_pending_requests: Option<u32>,
    /// Null is no limit.
    pub http2_max_requests: Option<u32>,
    /// Null is no limit.
    pub max_retries: Option<u32>,
    /// Null is no limit.
    pub max_requests_per_connection: Option<u32>,
    /// Null is no limit.
    pub max_concurrent_streams: Option<u32>,
    /// Age at which a connection takes no more requests.
    pub max_connection_duration: Option<String>,
    /// Idle connections.
    pub idle_timeout: Option<String>,
    /// Passive health.
    pub outlier_detection: Option<Outlier>,
    /// How new endpoints warm up.
    pub warmup: Option<String>,
    /// TLS without regard to the endpoint: `simple`, `mutual`, or null.
    pub tls: Option<&'static str>,
}

/// Passive health.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Outlier {
    /// 0 is off.
    pub consecutive_5xx_errors: u32,
    /// 0 is off.
    pub consecutive_gateway_errors: u32,
    /// Between sweeps.
    pub interval: String,
    /// Times the number of ejections.
    pub base_ejection_time: String,
    /// Share of endpoints.
    pub max_ejection_percent: u32,
    /// Statuses that are errors; empty is 5xx.
    pub error_codes: Vec<u16>,
}

/// A policy.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    /// `caller`, or the `namespace/name` of the workload whose proxy asks it.
    pub at: String,
    /// Such as `AuthorizationPolicy books/deny, rule 0`.
    pub policy: String,
    /// `ALLOW`, `DENY` or `AUDIT`.
    pub action: &'static str,
    /// `matches`, `misses` or `unknown`.
    pub verdict: &'static str,
    /// It is only logged.
    pub dry_run: bool,
    /// It is the one that decides there.
    pub decides: bool,
}

/// What somebody else decides.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Asked {
    /// `caller`, or the `namespace/name` of the workload whose proxy asks.
    pub at: String,
    /// Who.
    pub who: String,
}

/// Why something was not chosen.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Reason {
    /// `caller`, or the `namespace/name` of the workload whose proxy chose.
    pub at: String,
    /// `filterChain`, `virtualHost` or `route`.
    pub kind: &'static str,
    /// Its name.
    pub name: String,
    /// Why.
    pub why: String,
}

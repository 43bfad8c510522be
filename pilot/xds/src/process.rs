//! Settings of a proxy's process (`istio.mesh.v1alpha1.ProxyConfig`), as proxies are told of them: one resource,
//! [`NAME`], for whoever asks. An Envoy never does: what of it can be said by configuration is in its configuration.
//!
//! Of the message only those fields are used that a process takes; what connections and headers are like is in
//! listeners and clusters.

use std::time::Duration;

use mesh_model::authored::{ConnectionSettings, ProxyDefaults};
use prost::Message as _;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{pb, type_url};

/// Name of the resource.
pub const NAME: &str = "proxy-config";

/// What is said of a process; `None` leaves things to its flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ProcessSettings {
    /// Worker threads; 0 is one per core.
    pub concurrency: Option<u32>,
    /// Time for connections of a process that another one has replaced.
    pub drain: Option<Duration>,
    /// Life of a process that another one has replaced.
    pub parent_shutdown: Option<Duration>,
    /// Time for connections at the end.
    pub termination_drain: Option<Duration>,
    /// Port of the admin pages.
    pub admin_port: Option<u16>,
    /// Port of readiness.
    pub status_port: Option<u16>,
    /// Connections of clients, of all listeners and threads together.
    pub max_connections: Option<u32>,
}

impl ProcessSettings {
    /// These, and others where these say nothing.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            concurrency: self.concurrency.or(other.concurrency),
            drain: self.drain.or(other.drain),
            parent_shutdown: self.parent_shutdown.or(other.parent_shutdown),
            termination_drain: self.termination_drain.or(other.termination_drain),
            admin_port: self.admin_port.or(other.admin_port),
            status_port: self.status_port.or(other.status_port),
            max_connections: self.max_connections.or(other.max_connections),
        }
    }

    /// Of a proxy's own `PROXY_CONFIG`, which is an object or its text.
    ///
    /// # Errors
    /// The field that cannot be read; `ProxyConfig` if all of it cannot.
    pub fn of_metadata(config: &Value) -> Result<Self, &'static str> {
        let all = metadata(config)?;
        let count = |camel, snake| number(&all, camel, snake, u32::MAX);
        let port = |camel, snake| {
            number(&all, camel, snake, u16::MAX.into()).map(|n| n.and_then(|n| port(n).ok()).flatten())
        };
        let time = |camel, snake| {
            let d = field::<mesh_model::authored::Duration>(&all, camel, snake);
            d.map(|d| d.map(Duration::from))
        };
        let c: Option<ConnectionSettings> = field(&all, "connectionSettings", "connection_settings")?;
        Ok(Self {
            concurrency: count("concurrency", "concurrency")?,
            drain: time("drainDuration", "drain_duration")?,
            parent_shutdown: time("parentShutdownDuration", "parent_shutdown_duration")?,
            termination_drain: time("terminationDrainDuration", "termination_drain_duration")?,
            admin_port: port("proxyAdminPort", "proxy_admin_port")?,
            status_port: port("statusPort", "status_port")?,
            max_connections: c.as_ref().and_then(limit),
        })
    }
}

/// A `PROXY_CONFIG` as an object.
///
/// # Errors
/// It is none.
pub fn metadata(config: &Value) -> Result<Map<String, Value>, &'static str> {
    let parsed = match config {
        Value::String(s) => serde_json::from_str(s).map_err(|_| "ProxyConfig")?,
        other => other.clone(),
    };
    match parsed {
        Value::Object(all) => Ok(all),
        _ => Err("ProxyConfig"),
    }
}

/// A field of it, whose name may be written in either way.
///
/// # Errors
/// Its name, if it cannot be read.
pub fn field<T: DeserializeOwned>(
    all: &Map<String, Value>,
    camel: &'static str,
    snake: &str,
) -> Result<Option<T>, &'static str> {
    let found = all.get(camel).or_else(|| all.get(snake));
    found.map(|v| serde_json::from_value(v.clone()).map_err(|_| camel)).transpose()
}

fn number(
    all: &Map<String, Value>,
    camel: &'static str,
    snake: &str,
    most: u32,
) -> Result<Option<u32>, &'static str> {
    let n: Option<u32> = field(all, camel, snake)?;
    if n.is_some_and(|n| n > most) { Err(camel) } else { Ok(n) }
}

/// 0 is none that anybody has said.
fn port(n: u32) -> Result<Option<u16>, String> {
    let n = u16::try_from(n).map_err(|_| format!("{n} is not a port"))?;
    Ok((n > 0).then_some(n))
}

fn limit(c: &ConnectionSettings) -> Option<u32> {
    c.global_downstream_connection_limit.and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0)
}

impl From<&ProxyDefaults> for ProcessSettings {
    /// Numbers that are none of these are refused by validation.
    fn from(d: &ProxyDefaults) -> Self {
        let time = |d: Option<mesh_model::authored::Duration>| d.map(Duration::from);
        let port = |n: Option<i32>| n.and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0);
        Self {
            concurrency: d.concurrency.and_then(|n| u32::try_from(n).ok()),
            drain: time(d.drain_duration),
            parent_shutdown: time(d.parent_shutdown_duration),
            termination_drain: time(d.termination_drain_duration),
            admin_port: port(d.proxy_admin_port),
            status_port: port(d.status_port),
            max_connections: d.connection_settings.as_ref().and_then(limit),
        }
    }
}

/// `istio.mesh.v1alpha1.ProxyConfig`.
#[derive(Clone, PartialEq, prost::Message)]
struct ProxyConfig {
    #[prost(message, optional, tag = "4")]
    drain_duration: Option<prost_types::Duration>,
    /// The number that it had as long as Istio had it.
    #[prost(message, optional, tag = "5")]
    parent_shutdown_duration: Option<prost_types::Duration>,
    #[prost(int32, tag = "11")]
    proxy_admin_port: i32,
    #[prost(message, optional, tag = "16")]
    concurrency: Option<i32>,
    #[prost(int32, tag = "26")]
    status_port: i32,
    #[prost(message, optional, tag = "29")]
    termination_drain_duration: Option<prost_types::Duration>,
    #[prost(message, optional, tag = "43")]
    connection_settings: Option<Connections>,
}

/// `ProxyConfig.ConnectionSettings`.
#[derive(Clone, PartialEq, prost::Message)]
struct Connections {
    #[prost(message, optional, tag = "18")]
    global_downstream_connection_limit: Option<i32>,
}

/// Seconds of the longest `google.protobuf.Duration`: with more a clock overflows.
const LONGEST: u64 = 315_576_000_000;

/// Encodes them.
#[must_use]
pub fn encode(s: &ProcessSettings) -> pb::Any {
    // Of a clock's range: what is authored has passed validation.
    let time = |d: Option<Duration>| d.and_then(|d| prost_types::Duration::try_from(d).ok());
    let count = |n: Option<u32>| n.and_then(|n| i32::try_from(n).ok());
    let port = |n: Option<u16>| n.map(i32::from).unwrap_or_default();
    let message = ProxyConfig {
        drain_duration: time(s.drain),
        parent_shutdown_duration: time(s.parent_shutdown),
        proxy_admin_port: port(s.admin_port),
        concurrency: count(s.concurrency),
        status_port: port(s.status_port),
        termination_drain_duration: time(s.termination_drain),
        connection_settings: count(s.max_connections)
            .map(|n| Connections { global_downstream_connection_limit: Some(n) }),
    };
    pb::Any { type_url: type_url::PROXY_CONFIG.to_owned(), value: message.encode_to_vec().into() }
}

/// Decodes them.
///
/// # Errors
/// Why they are none.
pub fn decode(any: &pb::Any) -> Result<ProcessSettings, String> {
    if any.type_url != type_url::PROXY_CONFIG {
        return Err(format!("{} instead of a ProxyConfig", any.type_url));
    }
    let m = ProxyConfig::decode(any.value.as_ref()).map_err(|e| e.to_string())?;
    let time = |name: &str, d: Option<prost_types::Duration>| {
        let read = |d| Duration::try_from(d).ok().filter(|d| d.as_secs() <= LONGEST);
        d.map(|d| read(d).ok_or_else(|| format!("{name} is negative or too long"))).transpose()
    };
    let count = |name: &str, n: Option<i32>| {
        n.map(|n| u32::try_from(n).map_err(|_| format!("{name} is negative"))).transpose()
    };
    let port = |n: i32| port(u32::try_from(n).map_err(|_| format!("{n} is not a port"))?);
    let limit = m.connection_settings.and_then(|c| c.global_downstream_connection_limit);
    Ok(ProcessSettings {
        concurrency: count("concurrency", m.concurrency)?,
        drain: time("drain_duration", m.drain_duration)?,
        parent_shutdown: time("parent_shutdown_duration", m.parent_shutdown_duration)?,
        termination_drain: time("termination_drain_duration", m.termination_drain_duration)?,
        admin_port: port(m.proxy_admin_port)?,
        status_port: port(m.status_port)?,
        max_connections: count("global_downstream_connection_limit", limit)?.filter(|n| *n > 0),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn all() -> ProcessSettings {
        ProcessSettings {
            concurrency: Some(0),
            drain: Some(Duration::from_millis(1500)),
            parent_shutdown: Some(Duration::from_secs(2)),
            termination_drain: Some(Duration::ZERO),
            admin_port: Some(15001),
            status_port: Some(65535),
            max_connections: Some(7),
        }
    }

    #[test]
    fn settings_survive_the_wire() {
        for s in [all(), ProcessSettings::default()] {
            assert_eq!(decode(&encode(&s)).unwrap(), s);
        }
    }

    #[test]
    fn nothing_else_is_taken_for_settings() {
        let with = |m: ProxyConfig| {
            decode(&pb::Any { value: m.encode_to_vec().into(), ..encode(&ProcessSettings::default()) })
        };
        assert_eq!(with(ProxyConfig::default()).unwrap(), ProcessSettings::default());
        for (m, name) in [
            (ProxyConfig { concurrency: Some(-1), ..Default::default() }, "concurrency"),
            (ProxyConfig { status_port: 65_536, ..Default::default() }, "65536"),
            (ProxyConfig { proxy_admin_port: -1, ..Default::default() }, "-1"),
            (
                ProxyConfig {
                    drain_duration: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
                    ..Default::default()
                },
                "drain_duration",
            ),
            (
                ProxyConfig {
                    drain_duration: Some(prost_types::Duration { seconds: i64::MAX, nanos: 0 }),
                    ..Default::default()
                },
                "drain_duration",
            ),
        ] {
            let e = with(m).unwrap_err();
            assert!(e.contains(name), "{e}");
        }
        let other = pb::Any { type_url: type_url::NDS.to_owned(), ..encode(&all()) };
        assert!(decode(&other).is_err());
    }

    #[test]
    fn metadata_say_it_in_either_way() {
        let camel = json!({"concurrency": 0, "drainDuration": "1.5s", "parentShutdownDuration": "2s",
            "terminationDrainDuration": "0s", "proxyAdminPort": 15001, "statusPort": 65535,
            "connectionSettings": {"globalDownstreamConnectionLimit": 7}});
        let snake = json!({"concurrency": 0, "drain_duration": "1.5s", "parent_shutdown_duration": "2s",
            "termination_drain_duration": "0s", "proxy_admin_port": 15001, "status_port": 65535,
            "connection_settings": {"globalDownstreamConnectionLimit": 7}});
        for v in [&camel, &snake, &json!(camel.to_string())] {
            assert_eq!(ProcessSettings::of_metadata(v), Ok(all()));
        }
        for (v, bad) in [
            (json!({"concurrency": -1}), "concurrency"),
            (json!({"statusPort": 70_000}), "statusPort"),
            (json!({"drainDuration": "soon"}), "drainDuration"),
            (json!("text"), "ProxyConfig"),
            (json!([]), "ProxyConfig"),
        ] {
            assert_eq!(ProcessSettings::of_metadata(&v), Err(bad));
        }
    }

    #[test]
    fn the_first_who_says_it_counts() {
        let first = ProcessSettings { concurrency: Some(3), ..Default::default() };
        let both = first.or(all());
        assert_eq!((both.concurrency, both.status_port), (Some(3), Some(65535)));
    }
}

use envoy_types::pb::envoy::config::cluster::v3 as cds;

use super::*;
use crate::codec::{common, decode_cluster, pack};

#[test]
fn health_checks_have_envoys_defaults_and_name_what_is_wrong() {
    use envoy_types::pb::envoy::config::core::v3::health_check as hc;
    let minute = |s| Some(common::duration(Duration::from_secs(s)));
    let good = core::HealthCheck {
        timeout: minute(1),
        interval: minute(2),
        unhealthy_threshold: common::u32v(3),
        healthy_threshold: common::u32v(2),
        health_checker: Some(hc::HealthChecker::HttpHealthCheck(hc::HttpHealthCheck {
            path: "/".into(),
            ..Default::default()
        })),
        ..Default::default()
    };
    let decode = |all: Vec<core::HealthCheck>| {
        let m = cds::Cluster { name: "c".into(), health_checks: all, ..Default::default() };
        decode_cluster(&pack(&m)).map(|c| *c.health.unwrap()).map_err(|e| e.to_string())
    };
    let h = decode(vec![good.clone()]).unwrap();
    let s = Duration::from_secs;
    let wanted = HealthIntervals {
        healthy: s(2),
        unhealthy: s(2),
        failing: s(2),
        recovering: s(2),
        no_traffic: s(60),
        no_traffic_healthy: s(60),
    };
    assert_eq!((h.intervals, h.reuse_connection, h.ignore_new_hosts), (wanted, true, false));
    let HealthCheckKind::Http(k) = h.kind else { panic!() };
    assert_eq!((k.method.as_str(), k.http2, k.expected), ("GET", false, vec![(200, 201)]));
    let tcp = |text: &str| {
        let text = hc::payload::Payload::Text(text.into());
        let send = Some(hc::Payload { payload: Some(text) });
        Some(hc::HealthChecker::TcpHealthCheck(hc::TcpHealthCheck { send, ..Default::default() }))
    };
    let http = |k: hc::HttpHealthCheck| Some(hc::HealthChecker::HttpHealthCheck(k));
    let header = |key: &str, value: &str| core::HeaderValueOption {
        header: Some(core::HeaderValue { key: key.into(), value: value.into(), ..Default::default() }),
        ..Default::default()
    };
    let range = envoy_types::pb::envoy::r#type::v3::Int64Range { start: 200, end: 700 };
    let path = || hc::HttpHealthCheck { path: "/".into(), ..Default::default() };
    let rows: Vec<(core::HealthCheck, &str)> = vec![
        (core::HealthCheck { timeout: None, ..good.clone() }, "health_checks[0].timeout: is missing"),
        (core::HealthCheck { interval: minute(0), ..good.clone() }, "interval: is shorter"),
        (core::HealthCheck { healthy_threshold: common::u32v(0), ..good.clone() }, "healthy_threshold"),
        (core::HealthCheck { health_checker: None, ..good.clone() }, "health_checker: is missing"),
        (core::HealthCheck { alt_port: common::u32v(70_000), ..good.clone() }, "alt_port: is above"),
        (core::HealthCheck { tls_options: Some(Default::default()), ..good.clone() }, "tls_options"),
        (core::HealthCheck { health_checker: tcp("0g"), ..good.clone() }, "tcp_health_check.send.text"),
        (core::HealthCheck { health_checker: tcp("+1"), ..good.clone() }, "tcp_health_check.send.text"),
        (core::HealthCheck { health_checker: tcp("abc"), ..good.clone() }, "is not hexadecimal"),
        (
            core::HealthCheck { health_checker: http(Default::default()), ..good.clone() },
            "http_health_check.path",
        ),
        (
            core::HealthCheck {
                health_checker: http(hc::HttpHealthCheck { expected_statuses: vec![range], ..path() }),
                ..good.clone()
            },
            "expected_statuses[0]: [200, 700)",
        ),
        (
            core::HealthCheck {
                health_checker: http(hc::HttpHealthCheck {
                    request_headers_to_add: vec![header("a", "b\r\nc: d")],
                    ..path()
                }),
                ..good.clone()
            },
            "control character",
        ),
        (
            core::HealthCheck {
                health_checker: http(hc::HttpHealthCheck {
                    request_headers_to_add: vec![header("Host", "b")],
                    ..path()
                }),
                ..good.clone()
            },
            "cannot be set",
        ),
    ];
    for (bad, text) in rows {
        let e = decode(vec![bad]).unwrap_err();
        assert!(e.contains(text), "{e} instead of {text}");
    }
    assert!(decode(vec![good.clone(), good]).unwrap_err().contains("more than one"));
}

//! A line of `flotilla clusters`. What is not known is `None` and shown as `-`.

use std::{
    collections::BTreeMap,
    time::{SystemTime, UNIX_EPOCH},
};

use multicluster::admin_pb::{BundleStatus, ClusterStatus};
use pilot::links::GatewayLinks;
use serde::Serialize;

use crate::output;

/// Longest name in the table; `-o wide` and JSON have all of it.
const NAME: usize = 14;
/// Longest version in the table.
const VERSION: usize = 10;

/// A peer, as JSON and as a line.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Row {
    pub(super) cluster: String,
    network: String,
    /// If it is not that of the cluster that is asked.
    pub(super) trust_domain: Option<String>,
    pub(super) state: String,
    pub(super) lease_age_ms: Option<u64>,
    pub(super) lag_changes: Option<u64>,
    /// Since what is imported was last known to be all that the peer exports.
    confirmed_age_ms: Option<u64>,
    imported_services: u32,
    offset: u64,
    /// `quic`, `tcp`, or `mixed` where gateways differ.
    pub(super) transport: Option<String>,
    why_tcp: Vec<String>,
    /// Why the transport was chosen, by gateway.
    transport_choice: Vec<String>,
    /// Congestion control of QUIC, by gateway.
    congestion: Vec<String>,
    pub(super) trunk_rtt_ms: Option<f64>,
    pub(super) trunk_loss_percent: Option<f64>,
    trunk_packets_sent_last_minute: Option<u64>,
    trunk_packets_lost_last_minute: Option<u64>,
    trunk_connections: Option<u32>,
    pub(super) control_rtt_ms: Option<f64>,
    pub(super) version: Option<String>,
    pub(super) protocol: Option<u32>,
    pub(super) certificate_expires_unix_seconds: Option<u64>,
    /// What its member record offers.
    transports: Vec<String>,
    gateways: Vec<String>,
    last_error: String,
    refused_records: u64,
    refusals: Vec<String>,
}

/// Members by trust domain, where there is more than one, with what is known of its bundle.
pub(super) fn domains(rows: &[Row], bundles: &[BundleStatus], now: u64) -> Vec<String> {
    let mut of: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for r in rows {
        if let Some(d) = &r.trust_domain {
            of.entry(d).or_default().push(&r.cluster);
        }
    }
    const MISSING: &str = "its bundle is missing: nobody of it is accepted";
    let bundle = |b: &BundleStatus| {
        let error = if b.error.is_empty() { String::new() } else { format!("; {}", b.error) };
        if b.roots == 0 {
            return format!("{MISSING}{error}");
        }
        let age = match b.confirmed_age {
            Some(a) => format!(", confirmed {a} s ago"),
            None if b.by_bundle && b.endpoint.is_empty() => String::new(),
            None => ", confirmed not yet".to_owned(),
        };
        format!(
            "bundle {} (roots: {}, end in {}){age}{error}",
            b.sequence,
            b.roots,
            left(Some(b.not_after), now)
        )
    };
    let line = |(domain, clusters): (&str, Vec<&str>)| {
        let held = bundles.iter().find(|b| b.trust_domain == domain && !b.by_bundle);
        format!("Trust domain {domain}: {}; {}", clusters.join(", "), held.map_or(MISSING.to_owned(), bundle))
    };
    let alone = |b: &BundleStatus| {
        let from = if b.endpoint.is_empty() { "its declaration" } else { &b.endpoint };
        format!("Trust domain {}, known by its bundle alone, from {from}: {}", b.trust_domain, bundle(b))
    };
    of.into_iter().map(line).chain(bundles.iter().filter(|b| b.by_bundle).map(alone)).collect()
}

pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}

impl Row {
    pub(super) fn new(c: &ClusterStatus, gateways: &[GatewayLinks]) -> Self {
        let m = c.member.clone().unwrap_or_default();
        let links: Vec<_> = gateways
            .iter()
            .flat_map(|g| g.peers.iter().filter(|p| p.cluster == m.cluster).map(move |p| (g, p)))
            .collect();
        let mut used: Vec<&str> =
            links.iter().map(|(_, p)| p.transport.as_str()).filter(|t| !t.is_empty()).collect();
        used.sort_unstable();
        used.dedup();
        let transport = match used.as_slice() {
            [] => None,
            [one] => Some((*one).to_owned()),
            _ => Some("mixed".to_owned()),
        };
        // Only gateways that counted packets count.
        let sum = |f: fn(&mesh_xds::links::PeerLink) -> Option<u64>| {
            links.iter().filter_map(|(_, p)| f(p)).reduce(u64::saturating_add)
        };
        let (sent, lost) = (sum(|p| p.packets_sent), sum(|p| p.packets_lost));
        let loss = sent.zip(lost).filter(|(sent, _)| *sent > 0);
        let why = |(g, p): &(&GatewayLinks, &mesh_xds::links::PeerLink)| {
            (!p.why_tcp.is_empty()).then(|| format!("gateway {}: {}", g.gateway, p.why_tcp))
        };
        let said = |of: fn(&mesh_xds::links::PeerLink) -> &String| {
            move |(g, p): &(&GatewayLinks, &mesh_xds::links::PeerLink)| {
                let text = of(p);
                (!text.is_empty()).then(|| format!("gateway {}: {text}", g.gateway))
            }
        };
        Self {
            transport,
            why_tcp: links.iter().filter_map(why).collect(),
            transport_choice: links.iter().filter_map(said(|p| &p.choice)).collect(),
            congestion: links.iter().filter_map(said(|p| &p.congestion)).collect(),
            trunk_rtt_ms: links.iter().filter_map(|(_, p)| p.rtt_us).max().map(ms),
            trunk_loss_percent: loss.map(|(sent, lost)| lost as f64 * 100.0 / sent as f64),
            trunk_packets_sent_last_minute: sent,
            trunk_packets_lost_last_minute: lost,
            trunk_connections: links.iter().map(|(_, p)| p.connections).reduce(u32::saturating_add),
            cluster: m.cluster,
            network: m.network,
            trust_domain: Some(m.trust_domain).filter(|d| !d.is_empty()),
            state: c.state.clone(),
            lease_age_ms: c.lease_age_ms,
            lag_changes: c.lag_changes,
            confirmed_age_ms: c.confirmed_age_ms,
            imported_services: c.imported_services,
            offset: c.offset,
            control_rtt_ms: c.control_rtt_us.map(ms),
            version: Some(c.software.clone()).filter(|s| !s.is_empty()),
            protocol: Some(c.protocol).filter(|p| *p > 0),
            certificate_expires_unix_seconds: c.certificate_not_after,
            transports: m.transports,
            gateways: m.gateways.into_iter().map(|g| g.address).collect(),
            last_error: c.last_error.clone(),
            refused_records: c.refused_records,
            refusals: c.refusals.clone(),
        }
    }

    fn cells(&self, now: u64, wide: bool) -> [String; 11] {
        let rtt = match (self.trunk_rtt_ms, self.control_rtt_ms) {
            (Some(t), _) => round_trip(t),
            (None, Some(c)) => format!("~{}", round_trip(c)),
            (None, None) => unknown(),
        };
        let whole = |s: &str| s.to_owned();
        [
            if wide { whole(&self.cluster) } else { cut(&self.cluster, NAME) },
            self.state.clone(),
            self.lease_age_ms.map_or_else(unknown, age),
            self.lag_changes.map_or_else(unknown, count),
            self.transport.clone().unwrap_or_else(unknown),
            rtt,
            self.trunk_loss_percent.map_or_else(unknown, |p| format!("{p:.1}%")),
            count(self.imported_services.into()),
            self.version.as_deref().map_or_else(unknown, |v| if wide { whole(v) } else { cut(v, VERSION) }),
            self.protocol.map_or_else(unknown, |p| p.to_string()),
            left(self.certificate_expires_unix_seconds, now),
        ]
    }

    /// What does not fit into a table.
    pub(super) fn remarks(&self) -> Vec<String> {
        let mut out = Vec::new();
        if !self.last_error.is_empty() {
            out.push(format!("{}: {}", self.cluster, self.last_error));
        }
        out.extend(self.why_tcp.iter().map(|w| format!("{}: TCP in place of QUIC, {w}", self.cluster)));
        if self.refused_records > 0 {
            out.push(format!(
                "{}: {} records refused, such as: {}",
                self.cluster,
                self.refused_records,
                self.refusals.join("; ")
            ));
        }
        out
    }
}

const HEAD: [&str; 11] =
    ["CLUSTER", "STATE", "LEASE", "LAG", "VIA", "RTT", "LOSS", "SERVICES", "VERSION", "PROTO", "CERT"];

/// All peers.
pub(super) fn table(rows: &[Row], wide: bool) -> String {
    let now = now();
    if !wide {
        return output::table(HEAD, rows.iter().map(|r| r.cells(now, false)));
    }
    let [a, b, c, d, e, f, g, h, i, j, k] = HEAD;
    let head = [a, b, c, d, e, f, g, h, i, j, k, "NETWORK", "ANNOUNCES", "GATEWAYS"];
    let wide = rows.iter().map(|r| {
        let [a, b, c, d, e, f, g, h, i, j, k] = r.cells(now, true);
        let or_unknown = |s: String| if s.is_empty() { unknown() } else { s };
        let more = [r.network.clone(), r.transports.join(","), r.gateways.join(",")].map(or_unknown);
        let [l, m, n] = more;
        [a, b, c, d, e, f, g, h, i, j, k, l, m, n]
    });
    output::table(head, wide)
}

fn unknown() -> String {
    "-".to_owned()
}

/// With `…` in the middle: names that begin alike often end differently.
fn cut(s: &str, most: usize) -> String {
    let n = s.chars().count();
    if n <= most {
        return s.to_owned();
    }
    let head = most / 2;
    let tail = most - head - 1;
    s.chars().take(head).chain(['…']).chain(s.chars().skip(n - tail)).collect()
}

fn age(ms: u64) -> String {
    match ms {
        0..100_000 => format!("{:.1}s", ms as f64 / 1000.0),
        100_000..7_200_000 => format!("{}m", ms / 60_000),
        7_200_000..172_800_000 => format!("{}h", ms / 3_600_000),
        _ => format!("{}d", ms / 86_400_000),
    }
}

fn count(n: u64) -> String {
    match n {
        0..100_000 => n.to_string(),
        100_000..10_000_000 => format!("{}k", n / 1000),
        _ => ">10M".to_owned(),
    }
}

fn round_trip(ms: f64) -> String {
    match ms {
        m if m < 10.0 => format!("{m:.1}ms"),
        m if m < 10_000.0 => format!("{m:.0}ms"),
        m => format!("{:.0}s", m / 1000.0),
    }
}

/// How long a certificate is still valid.
pub(super) fn left(ends: Option<u64>, now: u64) -> String {
    match ends {
        None => unknown(),
        Some(e) if e <= now => "ended".to_owned(),
        Some(e) => match e - now {
            s if s >= 2 * 86_400 => format!("{}d", s / 86_400),
            s if s >= 2 * 3600 => format!("{}h", s / 3600),
            s => format!("{}m", s / 60),
        },
    }
}

#[cfg(test)]
mod tests {
    use mesh_xds::links::PeerLink;
    use multicluster::pb::{Gateway, Member};

    use super::*;

    fn status(cluster: &str) -> ClusterStatus {
        let gateway =
            |n| Gateway { address: format!("[2001:db8:1234:5678:9abc:def0:0:{n}]:15443"), weight: 1 };
        let member = Member {
            cluster: cluster.into(),
            network: cluster.into(),
            gateways: (1..4).map(gateway).collect(),
            transports: vec!["quic".into(), "tcp".into()],
            ..Member::default()
        };
        ClusterStatus { member: Some(member), state: "connecting".into(), ..ClusterStatus::default() }
    }

    fn gateway(name: &str, peer: PeerLink) -> GatewayLinks {
        GatewayLinks { gateway: name.into(), address: None, age_seconds: 1.0, peers: vec![peer] }
    }

    #[test]
    fn what_is_not_known_is_a_dash_and_null() {
        let r = Row::new(&status("east"), &[]);
        let cells = r.cells(1000, false);
        assert_eq!(
            cells,
            ["east", "connecting", "-", "-", "-", "-", "-", "0", "-", "-", "-"].map(str::to_owned)
        );
        let json = serde_json::to_value(&r).unwrap();
        for field in [
            "leaseAgeMs",
            "lagChanges",
            "confirmedAgeMs",
            "transport",
            "trunkRttMs",
            "trunkLossPercent",
            "controlRttMs",
            "version",
            "protocol",
            "certificateExpiresUnixSeconds",
        ] {
            assert!(
                json[field].is_null() && json.as_object().unwrap().contains_key(field),
                "{field}: {json}"
            );
        }
        // A gateway that knows the peer and has sent nothing there.
        let idle = gateway("a.sys", PeerLink { cluster: "east".into(), ..PeerLink::default() });
        assert_eq!(Row::new(&status("east"), &[idle]).cells(1000, false), cells);
    }

    #[test]
    fn figures_of_gateways_are_of_their_peer_and_of_the_worst() {
        let link = |transport: &str, rtt_us, sent, lost| PeerLink {
            cluster: "east".into(),
            transport: transport.into(),
            connections: 1,
            rtt_us,
            packets_sent: sent,
            packets_lost: lost,
            why_tcp: String::new(),
            choice: String::new(),
            congestion: String::new(),
        };
        let a = gateway("a.sys", link("quic", Some(12_300), Some(900), Some(9)));
        let b = gateway("b.sys", link("quic", Some(80_000), Some(100), Some(11)));
        let c =
            gateway("c.sys", PeerLink { why_tcp: "UDP is blocked".into(), ..link("tcp", None, None, None) });
        let other = gateway("a.sys", PeerLink { cluster: "north".into(), ..link("tcp", None, None, None) });
        let mut s = status("east");
        s.control_rtt_us = Some(4200);
        let r = Row::new(&s, &[a.clone(), b.clone(), other.clone()]);
        assert_eq!(r.cells(0, false)[4..7], ["quic", "80ms", "2.0%"].map(str::to_owned));
        let r = Row::new(&s, &[a, b, c.clone(), other.clone()]);
        assert_eq!(r.transport.as_deref(), Some("mixed"));
        let r = Row::new(&s, &[c, other]);
        assert_eq!(r.cells(0, false)[4..7], ["tcp", "~4.2ms", "-"].map(str::to_owned));
        assert_eq!(r.remarks(), ["east: TCP in place of QUIC, gateway c.sys: UDP is blocked"]);
    }

    #[test]
    fn the_table_fits_a_hundred_columns() {
        let mut s = status(&format!("production-{}-eu", "x".repeat(40)));
        s.lease_age_ms = Some(99_999);
        s.lag_changes = Some(u64::MAX);
        s.imported_services = 20_000;
        s.control_rtt_us = Some(9_999_000);
        s.software = "10.20.30-rc.40+build.50".into();
        s.protocol = 12;
        s.certificate_not_after = Some(now() + 3650 * 86_400);
        s.last_error = "e".repeat(300);
        let link = PeerLink {
            cluster: s.member.clone().unwrap().cluster,
            transport: "quic".into(),
            packets_sent: Some(1),
            packets_lost: Some(1),
            ..PeerLink::default()
        };
        let r = Row::new(&s, &[gateway("a.sys", link)]);
        let narrow = table(std::slice::from_ref(&r), false);
        let widest = narrow.lines().map(|l| l.chars().count()).max().unwrap();
        assert!(widest <= 100, "{widest}\n{narrow}");
        assert_eq!(narrow.lines().count(), 2, "{narrow}");
        assert!(narrow.contains("product…xxx-eu") && narrow.contains("100.0%"), "{narrow}");
        let wide = table(&[r], true);
        assert!(wide.contains("9abc:def0:0:3]:15443") && wide.contains("quic,tcp"), "{wide}");
    }

    #[test]
    fn units() {
        let ages = [0, 1499, 99_999, 100_000, 7_200_000, 172_800_000].map(age);
        assert_eq!(ages, ["0.0s", "1.5s", "100.0s", "1m", "2h", "2d"]);
        assert_eq!(
            [0.04, 9.94, 10.0, 123.4, 12_000.0].map(round_trip),
            ["0.0ms", "9.9ms", "10ms", "123ms", "12s"]
        );
        assert_eq!(
            [Some(10), Some(10 + 90), Some(7210), Some(10 + 172_800), None].map(|e| left(e, 10)),
            ["ended", "1m", "2h", "2d", "-"]
        );
        assert_eq!(cut("abcdefgh", 8), "abcdefgh");
        assert_eq!(cut("abcdefghi", 8), "abcd…ghi");
    }
}

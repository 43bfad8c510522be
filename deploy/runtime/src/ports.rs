//! Well-known ports, the same in every manifest and every role.

/// Proxy administration, loopback.
pub const ADMIN: u16 = 15000;
/// Outbound traffic of a workload.
pub const OUTBOUND: u16 = 15001;
/// Inbound traffic of a workload; on UDP connections of QUIC that carry datagrams.
pub const INBOUND: u16 = 15006;
/// CONNECT streams over mutual TLS for a workload (HBONE).
pub const HBONE: u16 = 15008;
/// xDS in clear text, loopback only.
pub const XDS_PLAINTEXT: u16 = 15010;
/// xDS and certificate signing over mTLS.
pub const XDS: u16 = 15012;
/// Control-plane metrics and readiness.
pub const CONTROL_METRICS: u16 = 15014;
/// Federation between control planes, reached through east-west gateways.
pub const FEDERATION: u16 = 15016;
/// Agent metrics.
pub const AGENT_METRICS: u16 = 15020;
/// Readiness of a proxy.
pub const READINESS: u16 = 15021;
/// DNS.
pub const DNS: u16 = 15053;
/// Proxy metrics.
pub const PROXY_METRICS: u16 = 15090;
/// East-west traffic: TCP by SNI, UDP for the trunk.
pub const EAST_WEST: u16 = 15443;
/// UDP services of other clusters, from proxies of this one: QUIC by SNI. UDP only, and for this cluster only.
pub const EAST_WEST_UDP: u16 = 15444;
/// Mixer Check and Report.
pub const MIXER: u16 = 9091;

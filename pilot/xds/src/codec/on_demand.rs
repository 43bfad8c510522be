//! Clusters and virtual hosts that are asked for when traffic needs them.

use envoy_types::pb::envoy::{
    config::{core::v3 as core, route::v3 as route},
    extensions::filters::{http::on_demand::v3 as pb, network::tcp_proxy::v3::tcp_proxy as tcp},
};
use mesh_model::proxy::{HttpFilter, OnDemandCluster, OnDemandHosts};

use super::{At, Bad, Res, common::*, refuse};

pub(super) const FILTER: &str = "envoy.filters.http.on_demand";

/// Checks that a source speaks the incremental protocol, which alone has on-demand names. Which server it is does not
/// matter, as everywhere: all comes over the aggregated stream.
fn source(field: &str, s: Option<core::ConfigSource>) -> Res<()> {
    use core::{api_config_source::ApiType, config_source::ConfigSourceSpecifier as S};
    match s.and_then(|s| s.config_source_specifier) {
        Some(S::Ads(_)) => Ok(()),
        Some(S::ApiConfigSource(a)) => match ApiType::try_from(a.api_type) {
            Ok(ApiType::DeltaGrpc | ApiType::AggregatedDeltaGrpc) => Ok(()),
            _ => Err(Bad::unsupported(format!("{field}.api_config_source.api_type"), "all but DELTA_GRPC")),
        },
        Some(_) => Err(Bad::unsupported(field, "a source other than ads and api_config_source")),
        None => Err(Bad::new(field, "names no source")),
    }
}

pub(super) fn vhds(o: Option<&OnDemandHosts>) -> Option<route::Vhds> {
    o.map(|_| route::Vhds { config_source: ads() })
}

pub(super) fn to_vhds(v: Option<route::Vhds>) -> Res<Option<OnDemandHosts>> {
    v.map(|v| source("config_source", v.config_source).map(|()| OnDemandHosts::default()))
        .transpose()
        .at("vhds")
}

fn cds(o: OnDemandCluster) -> pb::OnDemandCds {
    pb::OnDemandCds { source: ads(), timeout: Some(duration(o.timeout)), ..Default::default() }
}

fn to_cds(m: pb::OnDemandCds) -> Res<OnDemandCluster> {
    refuse!(m; resources_locator);
    source("source", m.source)?;
    let timeout = opt(m.timeout).at("timeout")?;
    Ok(timeout.map_or_else(OnDemandCluster::default, |timeout| OnDemandCluster { timeout }))
}

pub(super) fn filter(o: Option<OnDemandCluster>) -> pb::OnDemand {
    pb::OnDemand { odcds: o.map(cds) }
}

pub(super) fn to_filter(m: pb::OnDemand) -> Res<Option<OnDemandCluster>> {
    m.odcds.map(to_cds).transpose().at("odcds")
}

pub(super) fn per_route(o: Option<OnDemandCluster>) -> pb::PerRouteConfig {
    pb::PerRouteConfig { odcds: o.map(cds) }
}

pub(super) fn to_per_route(m: pb::PerRouteConfig) -> Res<Option<OnDemandCluster>> {
    m.odcds.map(to_cds).transpose().at("odcds")
}

pub(super) fn tcp(o: OnDemandCluster) -> tcp::OnDemand {
    tcp::OnDemand { odcds_config: ads(), timeout: Some(duration(o.timeout)), ..Default::default() }
}

pub(super) fn to_tcp(m: tcp::OnDemand) -> Res<Option<OnDemandCluster>> {
    refuse!(m; resources_locator);
    // Envoy asks for nothing then.
    if m.odcds_config.is_none() {
        return Ok(None);
    }
    source("odcds_config", m.odcds_config)?;
    let timeout = opt(m.timeout).at("timeout")?;
    Ok(Some(timeout.map_or_else(OnDemandCluster::default, |timeout| OnDemandCluster { timeout })))
}

/// When a virtual host has arrived the filters begin again, with its routes. Those that may have read a body cannot.
pub(super) fn order(filters: &[HttpFilter]) -> Res<()> {
    let Some(at) = filters.iter().position(|f| matches!(f, HttpFilter::OnDemand(_))) else { return Ok(()) };
    match filters[..at].iter().position(HttpFilter::reads_bodies) {
        None => Ok(()),
        Some(before) => Err(Bad::new(
            format!("http_filters[{before}]"),
            format!("{FILTER} must stand before a filter that looks at bodies"),
        )),
    }
}

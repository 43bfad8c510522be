//! Clusters and virtual hosts that are asked for when traffic needs them.

use std::time::Duration;

use envoy_types::pb::envoy::{
    config::{core::v3 as core, route::v3 as route},
    extensions::filters::{http::on_demand::v3 as pb, network::tcp_proxy::v3::tcp_proxy as tcp},
};
use mesh_model::proxy::{HttpFilter, OnDemandCluster, OnDemandHosts};
use prost::Message as _;

use super::{At, Bad, Res, common::*, refuse};
use crate::pb as pb_any;

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

/// A virtual host as it is for one of the hosts that its patterns match: under another name, and with that domain alone.
/// Given to a client whole, it would keep requests for other hosts from asking for what is theirs.
#[must_use]
pub fn virtual_host_for(any: &pb_any::Any, name: &str, domain: &str) -> Option<pb_any::Any> {
    let mut host = route::VirtualHost::decode(&*any.value).ok()?;
    (host.name, host.domains) = (name.to_owned(), vec![domain.to_owned()]);
    Some(pb_any::Any { type_url: any.type_url.clone(), value: host.encode_to_vec().into() })
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

/// What Envoy waits for on behalf of a connection, unless told otherwise.
const TCP_TIMEOUT: Duration = Duration::from_secs(60);

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
    let timeout = opt(m.timeout).at("timeout")?.unwrap_or(TCP_TIMEOUT);
    Ok(Some(OnDemandCluster { timeout }))
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

#[cfg(test)]
mod tests {
    use mesh_model::proxy::{Compressor, ExtAuthz, RouteSource};

    use super::*;
    use crate::codec::{
        decode_listener, decode_route, decode_virtual_host, encode_listener, encode_route,
        encode_virtual_host, http, pack,
        tests::{hcm_model, listener},
    };

    fn refused<T: std::fmt::Debug>(r: Res<T>, field: &str, reason: &str) {
        let b = r.unwrap_err();
        assert_eq!(b.field, field);
        assert!(b.reason.contains(reason), "{}", b.reason);
    }

    #[test]
    fn what_is_asked_for_survives_the_wire() {
        for o in [None, Some(OnDemandCluster { timeout: Duration::from_millis(1500) })] {
            assert_eq!(to_filter(filter(o)).unwrap(), o);
            assert_eq!(to_per_route(per_route(o)).unwrap(), o);
            assert_eq!(o.map(tcp).map(to_tcp).transpose().unwrap().flatten(), o);
        }
        let cds = pb::OnDemandCds { source: ads(), ..Default::default() };
        assert_eq!(to_cds(cds).unwrap().timeout, Duration::from_secs(5), "Envoy's default");
        let unset = tcp::OnDemand { odcds_config: ads(), ..Default::default() };
        assert_eq!(to_tcp(unset).unwrap().unwrap().timeout, TCP_TIMEOUT);
        let mut l = listener();
        let mut h = hcm_model(RouteSource::Rds("r".into()));
        h.filters.insert(0, HttpFilter::OnDemand(Some(OnDemandCluster::default())));
        l.filter_chains[0].filters[2] = mesh_model::proxy::NetworkFilter::Http(Box::new(h));
        assert_eq!(decode_listener(&encode_listener(&l)).unwrap(), l);
        let config = mesh_model::proxy::RouteConfiguration {
            name: "r".into(),
            virtual_hosts: vec![],
            on_demand: Some(OnDemandHosts::default()),
        };
        assert_eq!(decode_route(&encode_route(&config)).unwrap(), config);
        let mut host = crate::codec::tests::routes().virtual_hosts.remove(0);
        assert_eq!(decode_virtual_host(&encode_virtual_host(&host)).unwrap(), host);
        // A header that names the cluster.
        if let mesh_model::proxy::RouteAction::Forward(f) = &mut host.routes[0].action {
            (f.clusters, f.cluster_header) = (vec![], Some("x-c".into()));
        }
        assert_eq!(decode_virtual_host(&encode_virtual_host(&host)).unwrap(), host);
    }

    #[test]
    fn what_cannot_be_asked_for_is_named() {
        use envoy_types::pb::envoy::config::core::v3::{
            ApiConfigSource, ConfigSource, api_config_source::ApiType, config_source::ConfigSourceSpecifier,
        };
        let of = |s| Some(ConfigSource { config_source_specifier: Some(s), ..Default::default() });
        let api = |t: ApiType| {
            of(ConfigSourceSpecifier::ApiConfigSource(ApiConfigSource {
                api_type: t.into(),
                ..Default::default()
            }))
        };
        let cds = |source| pb::OnDemandCds { source, ..Default::default() };
        assert!(to_cds(cds(api(ApiType::DeltaGrpc))).is_ok());
        refused(to_cds(cds(None)), "source", "names no source");
        refused(to_cds(cds(api(ApiType::Grpc))), "source.api_config_source.api_type", "DELTA_GRPC");
        let path = of(ConfigSourceSpecifier::PathConfigSource(core::PathConfigSource::default()));
        refused(to_cds(cds(path.clone())), "source", "not supported");
        refused(to_vhds(Some(route::Vhds { config_source: path })), "vhds.config_source", "not supported");
        let located = pb::OnDemandCds { resources_locator: "xdstp:x".into(), ..cds(ads()) };
        refused(to_cds(located), "resources_locator", "is set");

        // Filters begin again, which those that read bodies could not.
        let ask = HttpFilter::OnDemand(None);
        let plain = HttpFilter::ExtAuthz(std::sync::Arc::new(ExtAuthz::default()));
        assert!(order(&[plain, ask.clone(), HttpFilter::Buffer(1)]).is_ok());
        let compressor = HttpFilter::Compressor(std::sync::Arc::new(Compressor::default()));
        refused(order(&[HttpFilter::Cors, compressor, ask]), "http_filters[1]", "must stand before");

        // Only what comes by RDS has further hosts.
        let mut m = http::encode(&hcm_model(RouteSource::Inline(std::sync::Arc::new(
            mesh_model::proxy::RouteConfiguration {
                name: "r".into(),
                virtual_hosts: vec![],
                on_demand: Some(OnDemandHosts::default()),
            },
        ))));
        m.http_filters.truncate(0);
        m.http_filters
            .push(http::encode(&hcm_model(RouteSource::Rds("r".into()))).http_filters.pop().unwrap());
        refused(http::from_wire(&pack(&m).value), "route_config.vhds", "rds");
    }
}

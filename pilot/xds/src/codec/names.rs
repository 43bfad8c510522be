//! Clusters whose hosts are found by the name that a request or connection asks for: Envoy's dynamic forward proxy.

use std::collections::HashMap;

use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::cluster::{CustomClusterType, DnsLookupFamily},
            core::v3 as core,
        },
        extensions::{
            clusters::dynamic_forward_proxy::v3::{ClusterConfig, cluster_config as cc},
            common::dynamic_forward_proxy::v3::DnsCacheConfig,
            filters::{
                http::dynamic_forward_proxy::v3::{FilterConfig as HttpConfig, filter_config as hc},
                network::sni_dynamic_forward_proxy::v3::{FilterConfig as SniConfig, filter_config as sc},
            },
        },
        r#type::matcher::v3::AddressMatcher,
    },
    xds::core::v3::CidrRange,
};
use ipnet::IpNet;
use mesh_model::proxy::{NameCache, NamedHosts};

use super::{At, Bad, Res, common::*, each, refuse};

pub(super) const CLUSTER: &str = "envoy.clusters.dynamic_forward_proxy";
pub(super) const HTTP_FILTER: &str = "envoy.filters.http.dynamic_forward_proxy";
pub(super) const SNI_FILTER: &str = "envoy.filters.network.sni_dynamic_forward_proxy";

/// Key of the metadata that has the port of a cluster's hosts, which Envoy knows by the authority alone.
const METADATA: &str = "flotilla.names";
const PORT: &str = "port";

fn cache(c: &NameCache) -> DnsCacheConfig {
    DnsCacheConfig {
        name: c.name.clone(),
        dns_lookup_family: DnsLookupFamily::V4Preferred.into(),
        dns_refresh_rate: Some(duration(c.refresh)),
        host_ttl: Some(duration(c.ttl)),
        max_hosts: u32v(c.max_hosts),
        resolved_address_filter: (!c.refused.is_empty())
            .then(|| AddressMatcher { ranges: c.refused.iter().map(range).collect(), invert_match: false }),
        ..Default::default()
    }
}

fn range(net: &IpNet) -> CidrRange {
    let c = cidr(net);
    CidrRange { address_prefix: c.address_prefix, prefix_len: c.prefix_len }
}

#[allow(deprecated)]
fn to_cache(m: Option<DnsCacheConfig>) -> Res<NameCache> {
    let m = m.ok_or_else(|| Bad::new("dns_cache_config", "is missing"))?;
    refuse!(m;
        dns_cache_circuit_breaker, use_tcp_for_dns_lookups, dns_resolution_config, typed_dns_resolver_config,
        preresolve_hostnames, key_value_config, disable_dns_refresh_on_failure
    );
    if m.name.is_empty() {
        return Err(Bad::new("name", "is empty"));
    }
    // As for clusters of names: ours looks up both and prefers IPv4.
    match DnsLookupFamily::try_from(m.dns_lookup_family) {
        Ok(DnsLookupFamily::Auto | DnsLookupFamily::V4Preferred) => {}
        _ => return Err(Bad::unsupported("dns_lookup_family", "all but AUTO and V4_PREFERRED")),
    }
    let d = NameCache::default();
    let filter = m.resolved_address_filter.unwrap_or_default();
    refuse!(filter; invert_match);
    let to_net = |r: CidrRange| {
        to_cidr(core::CidrRange { address_prefix: r.address_prefix, prefix_len: r.prefix_len })
    };
    Ok(NameCache {
        name: m.name,
        max_hosts: m.max_hosts.map_or(d.max_hosts, |v| v.value),
        ttl: opt(m.host_ttl).at("host_ttl")?.unwrap_or(d.ttl),
        refresh: opt(m.dns_refresh_rate).at("dns_refresh_rate")?.unwrap_or(d.refresh),
        refused: each("ranges", filter.ranges, to_net).at("resolved_address_filter")?,
    })
}

/// The kind of a cluster, and its metadata.
pub(super) fn cluster(n: &NamedHosts) -> (CustomClusterType, Option<core::Metadata>) {
    let config = ClusterConfig {
        // Whether names prove anything is for the transport's own settings to say.
        allow_insecure_cluster_options: true,
        cluster_implementation_specifier: Some(cc::ClusterImplementationSpecifier::DnsCacheConfig(cache(
            &n.cache,
        ))),
        ..Default::default()
    };
    let port = (n.port != 0).then(|| core::Metadata {
        filter_metadata: HashMap::from([(
            METADATA.to_owned(),
            string_struct([(&PORT.to_owned(), &n.port.to_string())]),
        )]),
        typed_filter_metadata: HashMap::new(),
    });
    (CustomClusterType { name: CLUSTER.to_owned(), typed_config: Some(any(&config)) }, port)
}

pub(super) fn to_cluster(t: CustomClusterType, metadata: Option<core::Metadata>) -> Res<NamedHosts> {
    let Some(a) = t.typed_config.filter(is::<ClusterConfig>) else {
        return Err(Bad::unsupported("cluster_type", format_args!("extension {:?}", t.name)));
    };
    let m: ClusterConfig = typed(&a)?;
    refuse!(m; allow_coalesced_connections);
    let config = match m.cluster_implementation_specifier {
        Some(cc::ClusterImplementationSpecifier::DnsCacheConfig(c)) => Some(c),
        Some(cc::ClusterImplementationSpecifier::SubClustersConfig(_)) => {
            return Err(Bad::unsupported("sub_clusters_config", "a cluster for each name"));
        }
        None => None,
    };
    let mut said = metadata.map(|m| m.filter_metadata).unwrap_or_default();
    let port = said.remove(METADATA).map(to_string_map).unwrap_or_default().remove(PORT);
    let port = port.map_or(Ok(0), |p| p.parse());
    Ok(NamedHosts {
        cache: to_cache(config).at("cluster_type.dns_cache_config")?,
        port: port.map_err(|_| Bad::new("metadata", format!("{METADATA}.{PORT} is no port")))?,
    })
}

pub(super) fn http(c: &NameCache) -> HttpConfig {
    let implementation_specifier = Some(hc::ImplementationSpecifier::DnsCacheConfig(cache(c)));
    HttpConfig { implementation_specifier, ..Default::default() }
}

pub(super) fn to_http(m: HttpConfig) -> Res<NameCache> {
    refuse!(m; allow_dynamic_host_from_filter_state);
    match m.implementation_specifier {
        Some(hc::ImplementationSpecifier::DnsCacheConfig(c)) => to_cache(Some(c)).at("dns_cache_config"),
        Some(hc::ImplementationSpecifier::SubClusterConfig(_)) => {
            Err(Bad::unsupported("sub_cluster_config", "a cluster for each name"))
        }
        None => Err(Bad::new("dns_cache_config", "is missing")),
    }
}

pub(super) fn sni(c: &NameCache, port: u16) -> SniConfig {
    SniConfig {
        dns_cache_config: Some(cache(c)),
        port_specifier: Some(sc::PortSpecifier::PortValue(port.into())),
        ..Default::default()
    }
}

pub(super) fn to_sni(m: SniConfig) -> Res<(NameCache, u16)> {
    // Envoy's default.
    let port = m.port_specifier.map_or(443, |sc::PortSpecifier::PortValue(p)| p);
    let port = u16::try_from(port).map_err(|_| Bad::new("port_value", "is no port"))?;
    Ok((to_cache(m.dns_cache_config).at("dns_cache_config")?, port))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn named() -> NamedHosts {
        let cache = NameCache {
            name: "mesh".into(),
            max_hosts: 7,
            ttl: Duration::from_secs(9),
            refresh: Duration::from_millis(1500),
            refused: vec!["127.0.0.0/8".parse().unwrap(), "fe80::/10".parse().unwrap()],
        };
        NamedHosts { cache, port: 8443 }
    }

    #[test]
    fn named_hosts_survive_the_wire() {
        let n = named();
        let (kind, metadata) = cluster(&n);
        assert_eq!(to_cluster(kind, metadata).unwrap(), n);
        let (kind, metadata) = cluster(&NamedHosts { port: 0, ..n.clone() });
        assert!(metadata.is_none());
        assert_eq!(to_cluster(kind, None).unwrap().port, 0);
        assert_eq!(to_http(http(&n.cache)).unwrap(), n.cache);
        assert_eq!(to_sni(sni(&n.cache, 8443)).unwrap(), (n.cache, 8443));
        let bare = DnsCacheConfig { name: "default".into(), ..Default::default() };
        assert_eq!(to_cache(Some(bare)).unwrap(), NameCache::default(), "Envoy's defaults");
        let unsaid = SniConfig { port_specifier: None, ..sni(&NameCache::default(), 1) };
        assert_eq!(to_sni(unsaid).unwrap().1, 443);
    }

    #[test]
    fn what_is_not_known_of_names_is_refused() {
        let (mut kind, _) = cluster(&named());
        let mut metadata = cluster(&named()).1.unwrap();
        metadata.filter_metadata.insert(METADATA.into(), string_struct([(&PORT.into(), &"x".into())]));
        let e = to_cluster(kind.clone(), Some(metadata)).unwrap_err();
        assert_eq!((e.field.as_str(), e.reason.contains("is no port")), ("metadata", true));
        kind.typed_config = Some(any(&http(&named().cache)));
        assert_eq!(to_cluster(kind, None).unwrap_err().field, "cluster_type");
        let mut c = cache(&named().cache);
        c.dns_lookup_family = DnsLookupFamily::V6Only.into();
        assert_eq!(to_cache(Some(c)).unwrap_err().field, "dns_lookup_family");
        assert_eq!(to_cache(Some(DnsCacheConfig::default())).unwrap_err().field, "name");
        assert_eq!(to_cache(None).unwrap_err().field, "dns_cache_config");
        let too_high = SniConfig {
            port_specifier: Some(sc::PortSpecifier::PortValue(70_000)),
            ..sni(&named().cache, 1)
        };
        assert_eq!(to_sni(too_high).unwrap_err().field, "port_value");
    }
}

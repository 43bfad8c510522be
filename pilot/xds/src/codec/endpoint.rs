//! Load assignments.

use std::collections::HashMap;

pub(super) use envoy_types::pb::envoy::config::endpoint::v3 as pb;
use envoy_types::pb::envoy::config::{core::v3 as core, endpoint::v3 as ep};
use mesh_model::{Locality, proxy as model};

use super::{At, Bad, Res, cluster::health, common::*, each, refuse};

const MATCH: &str = "envoy.transport_socket_match";
/// Prefix of an address that is a listener of the same proxy.
const INTERNAL: &str = "internal:";
pub(super) const ISTIO: &str = "istio";
const FLOTILLA: &str = "flotilla";
/// Far above what a pilot hands out.
const MAX_SERVES: usize = 256;
/// Envoy's default.
const OVERPROVISIONING: u32 = 140;

pub(super) fn locality(l: &Locality) -> core::Locality {
    core::Locality { region: l.region.clone(), zone: l.zone.clone(), sub_zone: l.sub_zone.clone() }
}

pub(super) fn encode(a: &model::LoadAssignment) -> pb::ClusterLoadAssignment {
    pb::ClusterLoadAssignment {
        cluster_name: a.name.clone(),
        endpoints: a.localities.iter().map(group).collect(),
        policy: Some(ep::cluster_load_assignment::Policy {
            overprovisioning_factor: u32v(a.overprovisioning),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn group(l: &model::LocalityEndpoints) -> pb::LocalityLbEndpoints {
    pb::LocalityLbEndpoints {
        locality: Some(locality(&l.locality)),
        lb_endpoints: l.endpoints.iter().map(endpoint).collect(),
        load_balancing_weight: if l.weight == 0 { None } else { u32v(l.weight) },
        priority: l.priority,
        ..Default::default()
    }
}

fn endpoint(e: &model::LbEndpoint) -> pb::LbEndpoint {
    let mut filter_metadata = HashMap::new();
    if !e.transport_labels.is_empty() {
        filter_metadata.insert(MATCH.to_owned(), string_struct(&e.transport_labels));
    }
    if !e.workload.is_empty() {
        let workload = (&"workload".to_owned(), &e.workload);
        filter_metadata.insert(ISTIO.to_owned(), string_struct([workload]));
    }
    let slots = match &e.slots {
        model::Slots::None => None,
        model::Slots::Asks(s) => Some(("slot".to_owned(), slot(s))),
        model::Slots::Serves(all) => {
            Some(("serves".to_owned(), all.iter().map(slot).collect::<Vec<_>>().join(",")))
        }
    };
    if let Some((k, v)) = &slots {
        filter_metadata.insert(FLOTILLA.to_owned(), string_struct([(k, v)]));
    }
    let metadata = (!filter_metadata.is_empty())
        .then(|| core::Metadata { filter_metadata, typed_filter_metadata: HashMap::new() });
    let health = match e.health {
        model::EndpointHealth::Healthy => core::HealthStatus::Healthy,
        model::EndpointHealth::Degraded => core::HealthStatus::Degraded,
        model::EndpointHealth::Unhealthy => core::HealthStatus::Unhealthy,
        model::EndpointHealth::Draining => core::HealthStatus::Draining,
    };
    pb::LbEndpoint {
        health_status: health.into(),
        metadata,
        load_balancing_weight: u32v(e.weight.max(1)),
        host_identifier: Some(ep::lb_endpoint::HostIdentifier::Endpoint(ep::Endpoint {
            address: Some(address(e)),
            health_check_config: e.check.as_deref().map(health::endpoint),
            ..Default::default()
        })),
    }
}

fn slot(s: &u32) -> String {
    format!("{s:08x}")
}

fn to_slots(m: Option<HashMap<String, String>>) -> Res<model::Slots> {
    let parse = |s: &str| u32::from_str_radix(s, 16).map_err(|_| Bad::new("metadata.flotilla", "is no slot"));
    let Some(mut m) = m else { return Ok(model::Slots::None) };
    if let Some(s) = m.remove("slot") {
        return parse(&s).map(model::Slots::Asks);
    }
    let Some(all) = m.remove("serves") else { return Ok(model::Slots::None) };
    if all.split(',').nth(MAX_SERVES).is_some() {
        return Err(Bad::new("metadata.flotilla.serves", format!("has more than {MAX_SERVES} slots")));
    }
    Ok(model::Slots::Serves(all.split(',').map(parse).collect::<Res<_>>()?))
}

fn address(e: &model::LbEndpoint) -> core::Address {
    if let Some(path) = e.address.strip_prefix(model::UNIX) {
        let pipe = core::Pipe { path: path.to_owned(), mode: 0 };
        return core::Address { address: Some(core::address::Address::Pipe(pipe)) };
    }
    let Some(name) = e.address.strip_prefix(INTERNAL) else { return socket_address(&e.address, e.port) };
    use core::envoy_internal_address::AddressNameSpecifier::ServerListenerName;
    core::Address {
        address: Some(core::address::Address::EnvoyInternalAddress(core::EnvoyInternalAddress {
            address_name_specifier: Some(ServerListenerName(name.to_owned())),
            ..Default::default()
        })),
    }
}

fn to_address(a: Option<core::Address>) -> Res<(String, u16)> {
    use core::envoy_internal_address::AddressNameSpecifier::ServerListenerName;
    match a {
        Some(core::Address { address: Some(core::address::Address::EnvoyInternalAddress(i)) }) => {
            refuse!(i; endpoint_id);
            let Some(ServerListenerName(name)) = i.address_name_specifier else {
                return Err(Bad::new("server_listener_name", "is missing"));
            };
            Ok((format!("{INTERNAL}{name}"), 0))
        }
        Some(core::Address { address: Some(core::address::Address::Pipe(p)) }) => {
            refuse!(p; mode);
            if p.path.is_empty() {
                return Err(Bad::new("pipe.path", "is empty"));
            }
            Ok((format!("{}{}", model::UNIX, p.path), 0))
        }
        a => to_socket_address(a),
    }
}

pub(super) fn decode(m: pb::ClusterLoadAssignment) -> Res<model::LoadAssignment> {
    refuse!(m; named_endpoints);
    let policy = m.policy.unwrap_or_default();
    refuse!(policy; drop_overloads, weighted_priority_health);
    Ok(model::LoadAssignment {
        name: m.cluster_name,
        localities: each("endpoints", m.endpoints, to_group)?,
        overprovisioning: policy.overprovisioning_factor.map_or(OVERPROVISIONING, |v| v.value),
    })
}

fn to_group(l: pb::LocalityLbEndpoints) -> Res<model::LocalityEndpoints> {
    refuse!(l; lb_config);
    let loc = l.locality.unwrap_or_default();
    if l.priority > 127 {
        return Err(Bad::new("priority", "is above 127"));
    }
    Ok(model::LocalityEndpoints {
        locality: Locality { region: loc.region, zone: loc.zone, sub_zone: loc.sub_zone },
        priority: l.priority,
        weight: l.load_balancing_weight.map_or(0, |v| v.value),
        endpoints: each("lb_endpoints", l.lb_endpoints, to_endpoint)?,
    })
}

fn to_endpoint(e: pb::LbEndpoint) -> Res<model::LbEndpoint> {
    let Some(ep::lb_endpoint::HostIdentifier::Endpoint(host)) = e.host_identifier else {
        return Err(Bad::unsupported("endpoint_name", "an endpoint by name"));
    };
    let (address, port) = to_address(host.address).at("endpoint")?;
    let check = health::to_endpoint(host.health_check_config).at("health_check_config").at("endpoint")?;
    let mut metadata = e.metadata.unwrap_or_default().filter_metadata;
    let transport_labels = metadata.remove(MATCH).map(to_string_map).unwrap_or_default();
    let workload =
        metadata.remove(ISTIO).and_then(|s| to_string_map(s).remove("workload")).unwrap_or_default();
    let slots = to_slots(metadata.remove(FLOTILLA).map(|s| to_string_map(s).into_iter().collect()))?;
    use core::HealthStatus as H;
    let health = match H::try_from(e.health_status).unwrap_or(H::Unknown) {
        H::Unknown | H::Healthy => model::EndpointHealth::Healthy,
        H::Degraded => model::EndpointHealth::Degraded,
        H::Unhealthy | H::Timeout => model::EndpointHealth::Unhealthy,
        H::Draining => model::EndpointHealth::Draining,
    };
    Ok(model::LbEndpoint {
        address,
        port,
        weight: e.load_balancing_weight.map_or(1, |v| v.value.max(1)),
        health,
        transport_labels,
        workload,
        check,
        slots,
    })
}

//! Resources for gRPC libraries that execute xDS themselves, without a proxy.
//!
//! They read the same messages as Envoy and refuse a resource that holds what they do not know, so they are
//! written more narrowly (gRFC numbers in brackets):
//!
//! - an outbound listener is an `api_listener` with a connection manager and nothing else (A27); an inbound one
//!   has chains of one connection manager, whose routes say that the call is for the server itself (A36);
//! - certificates and roots are instances of a certificate provider that the bootstrap configures, never secrets or
//!   files; TLS parameters may not be said; names of a server are in the older field `match_subject_alt_names` (A29);
//! - a cluster has one transport socket for all of its endpoints (A29);
//! - names of HTTP filters are unique in a connection manager (A39).
//!
//! What of a model value has no place there is left out here without a word; whoever generates for gRPC leaves
//! in nothing whose loss would matter.

use envoy_types::pb::{
    envoy::{
        config::{core::v3 as core, listener::v3 as l, route::v3 as r},
        extensions::{
            filters::network::http_connection_manager::v3 as hcm, transport_sockets::tls::v3 as tls_pb,
        },
    },
    google::protobuf as gp,
};
use mesh_model::proxy::{
    ClientCertificate, Cluster, Direction, DownstreamTls, FilterChain, HttpConnectionManager, Listener,
    NetworkFilter, UpstreamTls,
};
use tls_pb::{
    CertificateProviderPluginInstance, CertificateValidationContext, CommonTlsContext,
    common_tls_context::ValidationContextType,
};

use super::{cluster, common::*, http, listener, pack};
use crate::pb;

/// The certificate provider that the bootstrap configures (Istio's name for it).
pub const CERTIFICATE_PROVIDER: &str = "default";
/// The provider's name for the workload's own certificate.
const OWN: &str = "default";
/// The provider's name for the roots of the mesh.
const ROOTS: &str = "ROOTCA";

/// Encodes a listener (LDS): one with direction outbound for a client, any other for a server.
#[must_use]
pub fn encode_listener(m: &Listener) -> pb::Any {
    pack(&if m.direction == Direction::Outbound { api(m) } else { server(m) })
}

fn manager(c: &FilterChain) -> Option<&HttpConnectionManager> {
    c.filters.iter().find_map(|f| match f {
        NetworkFilter::Http(h) => Some(&**h),
        _ => None,
    })
}

fn api(m: &Listener) -> l::Listener {
    let manager = m.filter_chains.iter().find_map(manager);
    let api_listener = manager.map(|h| any(&unique_names(http::encode(h))));
    l::Listener {
        name: m.name.clone(),
        api_listener: Some(l::ApiListener { api_listener }),
        ..Default::default()
    }
}

fn server(m: &Listener) -> l::Listener {
    let chain = |c: &FilterChain| {
        let manager = hcm::HttpConnectionManager {
            route_specifier: Some(hcm::http_connection_manager::RouteSpecifier::RouteConfig(own_calls())),
            ..unique_names(http::encode(manager(c)?))
        };
        Some(l::FilterChain {
            name: c.name.clone(),
            filters: vec![l::Filter {
                name: "envoy.filters.network.http_connection_manager".to_owned(),
                config_type: Some(l::filter::ConfigType::TypedConfig(any(&manager))),
            }],
            transport_socket: c.tls.as_ref().map(downstream),
            ..Default::default()
        })
    };
    l::Listener {
        name: m.name.clone(),
        address: Some(listener::listen_address(m.address, false)),
        filter_chains: m.filter_chains.iter().filter_map(chain).collect(),
        traffic_direction: core::TrafficDirection::Inbound.into(),
        ..Default::default()
    }
}

/// Every call is for the server that asks.
fn own_calls() -> r::RouteConfiguration {
    let route = r::Route {
        r#match: Some(r::RouteMatch {
            path_specifier: Some(r::route_match::PathSpecifier::Prefix("/".to_owned())),
            ..Default::default()
        }),
        action: Some(r::route::Action::NonForwardingAction(r::NonForwardingAction {})),
        ..Default::default()
    };
    r::RouteConfiguration {
        name: "inbound".to_owned(),
        virtual_hosts: vec![r::VirtualHost {
            name: "inbound".to_owned(),
            domains: vec!["*".to_owned()],
            routes: vec![route],
            ..Default::default()
        }],
        ..Default::default()
    }
}

/// The first filter of a name keeps it, since routes refer to it.
fn unique_names(mut m: hcm::HttpConnectionManager) -> hcm::HttpConnectionManager {
    for i in 1..m.http_filters.len() {
        let (before, rest) = m.http_filters.split_at_mut(i);
        if let Some(f) = rest.first_mut()
            && before.iter().any(|b| b.name == f.name)
        {
            f.name = format!("{}-{i}", f.name);
        }
    }
    m
}

/// Encodes a cluster (CDS).
#[must_use]
pub fn encode_cluster(m: &Cluster) -> pb::Any {
    pack(&cluster::pb::Cluster {
        transport_socket: m.tls.as_deref().map(upstream),
        transport_socket_matches: vec![],
        typed_extension_protocol_options: Default::default(),
        common_lb_config: None,
        ..cluster::encode(m)
    })
}

fn instance(certificate_name: &str) -> Option<CertificateProviderPluginInstance> {
    Some(CertificateProviderPluginInstance {
        instance_name: CERTIFICATE_PROVIDER.to_owned(),
        certificate_name: certificate_name.to_owned(),
    })
}

fn common(context: Option<CertificateValidationContext>) -> Option<CommonTlsContext> {
    Some(CommonTlsContext {
        tls_certificate_provider_instance: instance(OWN),
        validation_context_type: context.map(ValidationContextType::ValidationContext),
        ..Default::default()
    })
}

fn socket(config: gp::Any) -> core::TransportSocket {
    core::TransportSocket {
        name: "envoy.transport_sockets.tls".to_owned(),
        config_type: Some(core::transport_socket::ConfigType::TypedConfig(config)),
    }
}

// The newer field is not read by gRPC, which would then let any member of the mesh be the server.
#[allow(deprecated)]
fn upstream(t: &UpstreamTls) -> core::TransportSocket {
    let context = CertificateValidationContext {
        ca_certificate_provider_instance: instance(ROOTS),
        match_subject_alt_names: t.validation.sans.iter().map(string_match).collect(),
        ..Default::default()
    };
    socket(any(&tls_pb::UpstreamTlsContext {
        common_tls_context: common(Some(context)),
        ..Default::default()
    }))
}

fn downstream(t: &DownstreamTls) -> core::TransportSocket {
    let required = matches!(t.client_certificate, ClientCertificate::Required(_));
    let asked = !matches!(t.client_certificate, ClientCertificate::None);
    let context = asked.then(|| CertificateValidationContext {
        ca_certificate_provider_instance: instance(ROOTS),
        ..Default::default()
    });
    socket(any(&tls_pb::DownstreamTlsContext {
        common_tls_context: common(context),
        require_client_certificate: boolv(required),
        ..Default::default()
    }))
}

#[cfg(test)]
mod tests {
    use mesh_model::proxy::{
        HttpFilter, Rbac, RouteSource, SecretRef, StringMatch, TlsServerOptions, TlsVersion, UpstreamTls,
        Validation,
    };
    use prost::Message as _;

    use super::*;
    use crate::codec::tests;

    const ID: &str = "spiffe://mesh.local/ns/books/sa/reviews";

    fn manager_of(a: &gp::Any) -> hcm::HttpConnectionManager {
        typed(a).map_err(|b| b.reason).unwrap()
    }

    fn listener(direction: Direction) -> l::Listener {
        let rbac = || HttpFilter::Rbac(Rbac::default());
        let manager = HttpConnectionManager {
            filters: vec![rbac(), HttpFilter::Fault, rbac(), rbac()],
            ..tests::hcm_model(RouteSource::Rds("r".into()))
        };
        let own = SecretRef::Sds("default".into());
        let trusted = Validation { trusted: Some(SecretRef::Sds("ROOTCA".into())), sans: vec![], crl: None };
        let chain = FilterChain {
            name: "c".into(),
            matches: Default::default(),
            tls: Some(DownstreamTls {
                certificate: own,
                client_certificate: ClientCertificate::Required(trusted),
                alpn: vec!["h2".into()],
                min_version: TlsVersion::V1_3,
                options: TlsServerOptions::default(),
            }),
            filters: vec![NetworkFilter::Http(Box::new(manager))],
        };
        let m = Listener { direction, filter_chains: vec![chain], ..tests::listener() };
        l::Listener::decode(encode_listener(&m).value).unwrap()
    }

    fn names(m: &hcm::HttpConnectionManager) -> Vec<&str> {
        m.http_filters.iter().map(|f| f.name.as_str()).collect()
    }

    #[test]
    fn a_client_has_a_connection_manager_and_no_address() {
        let l = listener(Direction::Outbound);
        assert!(l.address.is_none() && l.filter_chains.is_empty() && l.listener_filters.is_empty());
        let manager = manager_of(&l.api_listener.unwrap().api_listener.unwrap());
        assert_eq!(
            names(&manager),
            [
                "envoy.filters.http.rbac",
                "envoy.filters.http.fault",
                "envoy.filters.http.rbac-2",
                "envoy.filters.http.rbac-3",
                "envoy.filters.http.router"
            ]
        );
    }

    #[test]
    fn a_server_is_where_calls_end() {
        let l = listener(Direction::Inbound);
        assert!(l.api_listener.is_none() && l.listener_filters.is_empty() && l.use_original_dst.is_none());
        let c = &l.filter_chains[0];
        assert!(c.filter_chain_match.is_none() && c.filters.len() == 1);
        let Some(l::filter::ConfigType::TypedConfig(a)) = &c.filters[0].config_type else { panic!("{c:?}") };
        use hcm::http_connection_manager::RouteSpecifier::RouteConfig;
        let Some(RouteConfig(routes)) = manager_of(a).route_specifier else { panic!("{a:?}") };
        let action = &routes.virtual_hosts[0].routes[0].action;
        assert!(matches!(action, Some(r::route::Action::NonForwardingAction(_))), "{action:?}");
        let Some(core::transport_socket::ConfigType::TypedConfig(a)) =
            &c.transport_socket.as_ref().unwrap().config_type
        else {
            panic!("{c:?}")
        };
        let tls: tls_pb::DownstreamTlsContext = typed(a).map_err(|b| b.reason).unwrap();
        assert!(bool_or(tls.require_client_certificate, false));
        let common = tls.common_tls_context.unwrap();
        assert!(common.tls_params.is_none() && common.tls_certificate_sds_secret_configs.is_empty());
        assert_eq!(common.tls_certificate_provider_instance, instance("default"));
        let Some(ValidationContextType::ValidationContext(v)) = common.validation_context_type else {
            panic!("no roots")
        };
        assert_eq!(v.ca_certificate_provider_instance, instance("ROOTCA"));
    }

    #[test]
    #[allow(deprecated)]
    fn a_servers_names_are_where_grpc_looks() {
        let tls = UpstreamTls {
            certificate: Some(SecretRef::Sds("default".into())),
            validation: Validation {
                trusted: Some(SecretRef::Sds("ROOTCA".into())),
                sans: vec![StringMatch::exact(ID)],
                crl: None,
            },
            sni: "x".into(),
            by_name: false,
            alpn: vec!["istio".into()],
        };
        let m = Cluster { tls: Some(Box::new(tls)), ..tests::cluster() };
        let c = cluster::pb::Cluster::decode(encode_cluster(&m).value).unwrap();
        assert!(c.transport_socket_matches.is_empty());
        let Some(core::transport_socket::ConfigType::TypedConfig(a)) =
            c.transport_socket.unwrap().config_type
        else {
            panic!("no TLS")
        };
        let tls: tls_pb::UpstreamTlsContext = typed(&a).map_err(|b| b.reason).unwrap();
        let common = tls.common_tls_context.unwrap();
        assert!(common.tls_params.is_none() && common.tls_certificates.is_empty());
        let Some(ValidationContextType::ValidationContext(v)) = common.validation_context_type else {
            panic!("no roots")
        };
        assert_eq!(v.match_subject_alt_names, [string_match(&StringMatch::exact(ID))]);
    }
}

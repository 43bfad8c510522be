//! Listeners of a server (gRFCs A29, A36, A41).
//!
//! A server asks by the address that it listens on, which may be the workload's or that of all interfaces. It gets one
//! chain: mutual TLS or clear text, as it cannot tell one from the other. A workload that is labelled as one that takes
//! mesh mTLS is called so by sidecars, so `PERMISSIVE` is `STRICT` there (as in Istio), and clear text elsewhere.
//!
//! A server without a listener accepts nothing, so a port that no service has is not served.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use mesh_model::{
    authored::MutualTlsMode,
    proxy::{
        ClientCertificate, Direction, DownstreamTls, FilterChain, FilterChainMatch, HttpFilter,
        NetworkFilter, RouteConfiguration, RouteSource, TlsServerOptions, TlsVersion, Validation,
    },
};

use super::{
    super::{
        common::{Side, chain, listener},
        inbound, jwt, rbac,
    },
    Ctx, Generated, Left,
};
use crate::index::TLS_MODE;

/// What stands before the address in the names of listeners: Istio's, and the one of gRPC's own documentation.
const PREFIXES: [&str; 2] = ["xds.istio.io/grpc/lds/inbound/", "grpc/server?xds.resource.listening_address="];

pub(super) fn listeners(ctx: &Ctx<'_>, out: &mut Generated) {
    let all = [IpAddr::from(Ipv4Addr::UNSPECIFIED), IpAddr::from(Ipv6Addr::UNSPECIFIED)];
    for number in inbound::served(ctx) {
        let chain = chain_of(ctx, number);
        for ip in ctx.proxy.addresses.iter().chain(&all) {
            let address = SocketAddr::new(*ip, number);
            for prefix in PREFIXES {
                let mut l = listener(format!("{prefix}{address}"), address, Direction::Inbound);
                l.filter_chains = vec![chain.clone()];
                out.listener(l);
            }
        }
    }
}

/// What of policies a server does not do.
pub(super) fn left(ctx: &Ctx<'_>, left: &mut Left) {
    if !inbound::served(ctx).is_empty()
        && inbound::served(ctx).iter().any(|p| jwt::filter(ctx, Some(*p)).is_some())
    {
        left.insert("RequestAuthentication: tokens are not looked at, and nobody has their claims; ports whose Policy requires one are closed");
    }
    if !inbound::served(ctx).is_empty() && rbac::has_custom(ctx) {
        left.insert(
            "AuthorizationPolicy of action CUSTOM: nobody is asked, and what its rules match is denied",
        );
    }
}

fn mode(ctx: &Ctx<'_>, number: u16) -> MutualTlsMode {
    let in_mesh = ctx.proxy.labels.get(TLS_MODE).is_some_and(|m| m == "istio");
    match ctx.world.mtls_mode(ctx.proxy, number) {
        MutualTlsMode::Permissive if in_mesh => MutualTlsMode::Strict,
        mode => mode,
    }
}

fn chain_of(ctx: &Ctx<'_>, number: u16) -> FilterChain {
    // Its routes are the encoder's business: there is one way to say that a call is for the server itself.
    let none = RouteConfiguration { name: "inbound".to_owned(), virtual_hosts: vec![], on_demand: None };
    let mut manager = ctx.hcm("inbound", RouteSource::Inline(none.into()), Side::Inbound);
    manager.filters = rbac::http(ctx).into_iter().map(HttpFilter::Rbac).collect();
    if jwt::required(ctx, number) {
        // It cannot look for the token without which nobody is to get in.
        manager.filters.insert(0, HttpFilter::Rbac(rbac::nobody()));
    }
    manager.access_log = vec![];
    let filters = vec![NetworkFilter::Http(Box::new(manager))];
    let trusted = Validation { trusted: Some(ctx.mesh_roots()), sans: vec![], crl: None };
    let tls = (mode(ctx, number) == MutualTlsMode::Strict).then(|| DownstreamTls {
        certificate: ctx.own_certificate(),
        client_certificate: ClientCertificate::Required(trusted),
        alpn: vec![],
        min_version: TlsVersion::V1_2,
        options: TlsServerOptions::default(),
    });
    FilterChain { tls, ..chain("inbound", FilterChainMatch::default(), filters) }
}

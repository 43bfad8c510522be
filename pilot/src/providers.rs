//! Providers of the mesh's settings (`MeshConfig.extensionProviders`): who may be asked about requests.

use std::sync::Arc;

use mesh_model::authored::{AuthorizationAction, GrpcAuthzProvider, HttpAuthzProvider, MeshConfig};

use crate::{
    config::{Config, Problem},
    generate::telemetry,
    index::{Entry, Index},
};

/// How an authoriser is asked.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind<'a> {
    Http(&'a HttpAuthzProvider),
    Grpc(&'a GrpcAuthzProvider),
}

/// A provider that can be asked.
#[derive(Debug, Clone)]
pub(crate) struct Provider<'a> {
    pub(crate) kind: Kind<'a>,
    pub(crate) entry: &'a Arc<Entry>,
    pub(crate) port: u16,
}

/// The provider of a name; `Err` says why there is none.
pub(crate) fn find<'a>(mesh: &'a MeshConfig, index: &'a Index, name: &str) -> Result<Provider<'a>, String> {
    let p = mesh
        .extension_providers
        .iter()
        .find(|p| p.name == name)
        .ok_or_else(|| format!("MeshConfig.extensionProviders has no provider {name:?}"))?;
    let (kind, service, port) = match (&p.envoy_ext_authz_http, &p.envoy_ext_authz_grpc) {
        (Some(h), None) => (Kind::Http(h), &h.service, h.port),
        (None, Some(g)) => (Kind::Grpc(g), &g.service, g.port),
        _ => return Err(format!("provider {name:?} is not of exactly one kind")),
    };
    let http2 = matches!(kind, Kind::Grpc(_));
    let target = target(index, name, service, port, http2)?;
    Ok(Provider { kind, entry: target.entry, port: target.port })
}

/// A service that a provider is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) entry: &'a Arc<Entry>,
    pub(crate) port: u16,
}

/// The service of a provider, `[<namespace>/]<host>`, with a port of `HTTP/2` if it is asked over gRPC.
pub(crate) fn target<'a>(
    index: &'a Index,
    name: &str,
    service: &str,
    port: u32,
    http2: bool,
) -> Result<Target<'a>, String> {
    let (namespace, host) = service.split_once('/').map_or((None, service), |(n, h)| (Some(n), h));
    let entry = index
        .services
        .get(index.canonical(host))
        .filter(|e| namespace.is_none_or(|n| n == e.service.namespace))
        .ok_or_else(|| format!("provider {name:?} names service {service:?}, which does not exist"))?;
    let of_service = entry.service.ports.iter().find(|p| u32::from(p.port) == port);
    let of_service = of_service
        .ok_or_else(|| format!("provider {name:?} names port {port}, which {service} does not have"))?;
    if http2 && !of_service.protocol.is_http2() {
        return Err(format!(
            "provider {name:?} is asked over gRPC, and port {port} of {service} is not one of it: call the port grpc"
        ));
    }
    Ok(Target { entry, port: of_service.port })
}

/// Policies whose provider cannot be asked, and collectors that cannot be told.
pub(crate) fn problems(config: &Config, index: &Index) -> Vec<Problem> {
    let custom =
        config.authorization_policies.iter().filter(|p| p.spec.action == AuthorizationAction::Custom);
    let denied = custom.filter_map(|p| {
        let name = p.spec.provider.as_ref().map_or("", |p| p.name.as_str());
        let why = find(&config.mesh, index, name).err()?;
        Some(Problem {
            object: format!("AuthorizationPolicy {}/{}", p.namespace, p.name),
            message: format!("{why}; what its rules match is denied"),
        })
    });
    let untold = telemetry::problems(&config.mesh, index)
        .into_iter()
        .map(|message| Problem { object: "MeshConfig".to_owned(), message });
    denied.chain(untold).collect()
}

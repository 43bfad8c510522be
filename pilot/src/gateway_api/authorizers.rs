//! Authorisers that rules ask (GEP-1494).

use mesh_model::{
    authored::{
        Destination,
        gateway_api::{BackendRef, ExternalAuth},
    },
    registry::Protocol,
};

use super::{
    backends::{Referrer, Unresolved, destination as of_backend},
    known::Known,
};

/// What names of their filters begin with.
pub(super) const AUTHORIZER: &str = "envoy.filters.http.ext_authz";

/// Where an authoriser is.
pub(super) fn destination(
    known: &Known<'_>,
    from: Referrer<'_>,
    asks: &ExternalAuth,
    b: &BackendRef,
) -> Result<Destination, Unresolved> {
    let found = of_backend(known, from, b)?;
    let namespace = b.namespace.as_deref().unwrap_or(from.namespace);
    let service = known.service(namespace, &b.name).flatten().filter(|_| asks.protocol == "GRPC");
    let port = service.and_then(|s| s.ports.iter().find(|p| Some(p.port) == b.port));
    match port.map(|p| Protocol::select(p.app_protocol.as_deref(), &p.name)) {
        // What other clusters or a ServiceEntry have is found out where it is asked.
        None => Ok(found),
        Some(p) if p.is_http2() => Ok(found),
        Some(_) => Err(Unresolved {
            reason: "UnsupportedProtocol",
            message: format!(
                "port {} of Service {namespace}/{} is not one of gRPC: call it grpc, or set its appProtocol",
                b.port.unwrap_or_default(),
                b.name
            ),
        }),
    }
}

//! What routes may do that Istio's `VirtualService` has no words for: nobody authors it there.

use super::{Destination, gateway_api::ExternalAuth};
use crate::proxy::StatefulSession;

/// More of an [`HttpRoute`](super::HttpRoute), from the Gateway API.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RouteExtras {
    /// Sessions that stay on a host.
    pub session: Option<StatefulSession>,
    /// Who is asked before a request passes, in this order.
    pub authorizers: Vec<Authorizer>,
}

/// Somebody who says yes or no to requests of a route.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Authorizer {
    /// Name of its filter, which no other rule's authoriser has.
    pub name: String,
    /// Where it is.
    pub destination: Destination,
    /// How it is asked, as written.
    pub asks: ExternalAuth,
}

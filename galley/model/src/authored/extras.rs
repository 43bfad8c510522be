//! What routes may do that Istio's `VirtualService` has no words for: nobody authors it there.

use crate::proxy::StatefulSession;

/// More of an [`HttpRoute`](super::HttpRoute), from the Gateway API.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RouteExtras {
    /// Sessions that stay on a host.
    pub session: Option<StatefulSession>,
}

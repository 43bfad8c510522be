//! Which proxies a policy is for.

use mesh_model::authored::{LabelSelector, PolicyTargetReference};

use crate::{
    config::{Config, selects},
    gateway_api::GATEWAY_NAME,
    proxy::ProxyNode,
};

/// What a policy of `security.istio.io` says of the workloads that it is for.
pub(crate) struct Attachment<'a> {
    /// Namespace of the policy.
    pub namespace: &'a str,
    /// Workloads by label.
    pub selector: Option<&'a LabelSelector>,
    /// One resource.
    pub target_ref: Option<&'a PolicyTargetReference>,
    /// Resources.
    pub target_refs: &'a [PolicyTargetReference],
}

impl Attachment<'_> {
    /// Whether it is for a proxy: one of its namespace, or from the root namespace any, that the selector chooses. With
    /// references, a gateway that serves one of these Gateways of the policy's own namespace; then it holds for all that the
    /// proxy serves.
    pub(crate) fn includes(&self, config: &Config, proxy: &ProxyNode) -> bool {
        if self.target_ref.is_some() || !self.target_refs.is_empty() {
            return self.target_refs.iter().chain(self.target_ref).any(|r| self.refers(config, proxy, r));
        }
        (self.namespace == proxy.namespace || self.namespace == config.root_namespace())
            && self.selector.is_none_or(|s| selects(&s.match_labels, &proxy.labels))
    }

    /// Other kinds are for waypoints, of which there are none (galley refuses them).
    fn refers(&self, config: &Config, proxy: &ProxyNode, r: &PolicyTargetReference) -> bool {
        if !proxy.router || proxy.east_west || r.kind != "Gateway" || r.group != "gateway.networking.k8s.io" {
            return false;
        }
        if self.namespace == proxy.namespace && proxy.labels.get(GATEWAY_NAME) == Some(&r.name) {
            return true;
        }
        // One that is served by the proxies behind a Service, which have no such label.
        let listeners = format!("{}~", r.name);
        let mut made = config.gateways.iter().filter(|g| g.namespace == self.namespace);
        made.any(|g| g.name.starts_with(&listeners) && g.is_served_by(&proxy.namespace, &proxy.labels))
    }
}

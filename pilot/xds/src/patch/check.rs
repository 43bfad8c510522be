//! What no proxy could use, whatever it makes of the rest: a patch that leads there is refused before anybody is sent
//! the result.

use std::collections::HashMap;

use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::Cluster,
            core::v3 as core,
            listener::v3::{Filter, FilterChain, Listener},
            route::v3::{RouteConfiguration, VirtualHost},
        },
        extensions::filters::network::http_connection_manager::v3 as hcm,
    },
    google::protobuf as gp,
};
use hcm::{http_connection_manager::RouteSpecifier, http_filter::ConfigType};

use super::{Taken, listener::manager};

type Checked = Result<(), String>;

/// Filters after which nothing comes, and which somebody must be.
const TERMINAL: [&str; 2] =
    ["envoy.filters.network.http_connection_manager", "envoy.filters.network.tcp_proxy"];
/// Filters that pass a connection on.
const PASSING: [&str; 6] = [
    "envoy.filters.network.rbac",
    "envoy.filters.network.local_ratelimit",
    "envoy.filters.network.sni_cluster",
    "envoy.filters.network.connection_limit",
    "envoy.filters.network.ext_authz",
    "envoy.filters.network.ratelimit",
];
const ROUTER: &str = "envoy.extensions.filters.http.router.v3.Router";

/// A listener has a name, an address and chains that can be told apart, each of which ends somewhere.
pub(super) fn listener(l: &Listener) -> Checked {
    if l.name.is_empty() {
        return Err("name: a listener needs one".into());
    }
    let udp = |a: &core::socket_address::Protocol| *a == core::socket_address::Protocol::Udp;
    match l.address.as_ref().and_then(|a| a.address.as_ref()) {
        None => return Err("address: a listener needs one".into()),
        // Datagrams may have a listener filter instead of chains.
        Some(core::address::Address::SocketAddress(a)) if udp(&a.protocol()) => {}
        Some(_) if l.filter_chains.is_empty() && l.default_filter_chain.is_none() => {
            return Err("filter_chains: none is left".into());
        }
        Some(_) => {}
    }
    if let Some(f) = l.listener_filters.iter().find(|f| f.name.is_empty() || f.config_type.is_none()) {
        return Err(format!("listener_filters: {:?} needs a name and typed_config", f.name));
    }
    for (i, c) in l.filter_chains.iter().enumerate() {
        chain(c).map_err(|e| format!("filter_chains[{i}].{e}"))?;
        let same = |o: &&FilterChain| {
            o.filter_chain_match.clone().unwrap_or_default()
                == c.filter_chain_match.clone().unwrap_or_default()
        };
        if l.filter_chains[..i].iter().find(same).is_some() {
            return Err(format!("filter_chains[{i}].filter_chain_match: is that of another chain"));
        }
    }
    l.default_filter_chain
        .as_ref()
        .map_or(Ok(()), |c| chain(c).map_err(|e| format!("default_filter_chain.{e}")))
}

fn chain(c: &FilterChain) -> Checked {
    let Some((last, before)) = c.filters.split_last() else { return Err("filters: none is left".into()) };
    if let Some(f) = c.filters.iter().find(|f| f.name.is_empty() || f.config_type.is_none()) {
        return Err(format!("filters: {:?} needs a name and typed_config", f.name));
    }
    if let Some(f) = before.iter().find(|f| TERMINAL.contains(&f.name.as_str())) {
        return Err(format!("filters: nothing comes after {}", f.name));
    }
    if PASSING.contains(&last.name.as_str()) {
        return Err(format!("filters: {} must be followed by another", last.name));
    }
    c.filters.iter().enumerate().try_for_each(|(i, f)| network(f).map_err(|e| format!("filters[{i}].{e}")))
}

fn network(f: &Filter) -> Checked {
    let Some(m) = manager(f) else { return Ok(()) };
    let router = |f: &hcm::HttpFilter| match &f.config_type {
        Some(ConfigType::TypedConfig(a)) => a.type_url.rsplit('/').next() == Some(ROUTER),
        _ => false,
    };
    let routers = m.http_filters.iter().filter(|f| router(f)).count();
    if routers != 1 || !m.http_filters.last().is_some_and(router) {
        return Err("http_filters: the router must be the last one, and only there".into());
    }
    if let Some(f) = m.http_filters.iter().find(|f| f.name.is_empty() || f.config_type.is_none()) {
        return Err(format!("http_filters: {:?} needs a name and a configuration", f.name));
    }
    match &m.route_specifier {
        None => Err("route_specifier: is missing".into()),
        Some(RouteSpecifier::RouteConfig(r)) => routes(r, None).map_err(|e| format!("route_config.{e}")),
        Some(_) => Ok(()),
    }
}

/// Every domain has one virtual host, and every route leads somewhere.
pub(super) fn routes(r: &RouteConfiguration, taken: Option<&dyn Taken>) -> Checked {
    let mut owners: HashMap<String, &str> = HashMap::new();
    for h in &r.virtual_hosts {
        virtual_host(h, taken)?;
        for d in &h.domains {
            if let Some(other) = owners.insert(d.to_ascii_lowercase(), &h.name) {
                return Err(format!("virtual_hosts[{}].domains: {d:?} is one of {other:?}", h.name));
            }
        }
    }
    Ok(())
}

pub(super) fn virtual_host(h: &VirtualHost, taken: Option<&dyn Taken>) -> Checked {
    let at = |e: &str| format!("virtual_hosts[{}].{e}", h.name);
    if h.name.is_empty() || h.domains.is_empty() {
        return Err(at("domains: a virtual host needs a name and domains"));
    }
    for d in &h.domains {
        if let Some(other) = taken.and_then(|t| t.by(&d.to_ascii_lowercase(), &h.name)) {
            return Err(at(&format!("domains: {d:?} is one of {other:?}")));
        }
    }
    match h
        .routes
        .iter()
        .position(|r| r.action.is_none() || r.r#match.as_ref().is_none_or(|m| m.path_specifier.is_none()))
    {
        Some(i) => Err(at(&format!("routes[{i}]: needs a match of the path and an action"))),
        None => Ok(()),
    }
}

/// A cluster has a name, and times that Envoy takes.
pub(super) fn cluster(c: &Cluster) -> Checked {
    if c.name.is_empty() {
        return Err("name: a cluster needs one".into());
    }
    let positive = |d: &gp::Duration| d.seconds > 0 || d.seconds == 0 && d.nanos > 0;
    if !c.connect_timeout.as_ref().is_none_or(positive) {
        return Err("connect_timeout: must be above 0".into());
    }
    if c.transport_socket.is_some() && c.transport_socket.as_ref().is_some_and(|s| s.name.is_empty()) {
        return Err("transport_socket.name: is missing".into());
    }
    Ok(())
}

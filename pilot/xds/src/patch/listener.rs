//! Listeners, their filter chains, and the filters of both.

use envoy_types::pb::envoy::{
    config::listener::v3::{
        Filter, FilterChain, Listener, ListenerFilter, filter::ConfigType,
        listener_filter::ConfigType as Config,
    },
    extensions::filters::network::http_connection_manager::v3 as hcm,
};
use envoy_types::pb::google::protobuf::Any;
use hcm::{http_connection_manager::RouteSpecifier, http_filter::ConfigType as HttpConfig};
use mesh_model::{
    authored::{
        ApplyTo, FilterClass, FilterMatch, ListenerMatch, PatchContext, PatchOperation, SubFilterMatch,
    },
    proxy as model,
};
use prost::Message as _;

use super::{
    Did, Patch, Place, Res, Scope, check, list, route,
    tree::{Content, Node},
};
use crate::codec::common::{any, is};

/// Listeners that take what is for many ports: their chains say the port.
const VIRTUAL: [&str; 2] = ["virtualInbound", "virtualOutbound"];
const CONNECTION_MANAGER: &str = "envoy.filters.network.http_connection_manager";

fn listener_match(p: &Patch) -> Option<&ListenerMatch> {
    p.matches.listener.as_ref()
}

fn is_for_listener(p: &Patch, name: &str, port: u32) -> bool {
    let Some(m) = listener_match(p) else { return true };
    if !m.name.is_empty() && m.name != name {
        return false;
    }
    let by_chain = p.to != ApplyTo::Listener && VIRTUAL.contains(&name);
    by_chain || m.port_number == 0 || m.port_number == port
}

/// Whether it may change a listener.
pub(super) fn is_for(p: &Patch, l: &model::Listener) -> bool {
    let whole = p.to == ApplyTo::Listener && p.operation == PatchOperation::Add;
    !whole && is_for_listener(p, &l.name, u32::from(l.address.port()))
}

fn is_for_chain(p: &Patch, listener: &str, c: &FilterChain) -> bool {
    let Some(m) = listener_match(p) else { return true };
    let matches = c.filter_chain_match.clone().unwrap_or_default();
    let port = matches.destination_port.map_or(0, |p| p.value);
    if VIRTUAL.contains(&listener) && m.port_number != 0 && m.port_number != port {
        return false;
    }
    let Some(m) = &m.filter_chain else { return true };
    let socket = c.transport_socket.as_ref().map_or("", |s| &s.name);
    (m.name.is_empty() || m.name == c.name)
        && (m.sni.is_empty() || matches.server_names.contains(&m.sni))
        && (m.transport_protocol.is_empty() || m.transport_protocol == matches.transport_protocol)
        && (m.application_protocols.is_empty()
            || m.application_protocols
                .split(',')
                .all(|p| matches.application_protocols.iter().any(|own| own == p)))
        && (m.transport_socket.is_empty() || m.transport_socket == socket)
        && (m.destination_port == 0 || m.destination_port == port)
}

fn filter_match(p: &Patch) -> Option<&FilterMatch> {
    listener_match(p)?.filter_chain.as_ref()?.filter.as_ref()
}

fn sub_match(p: &Patch) -> Option<&SubFilterMatch> {
    filter_match(p)?.sub_filter.as_ref()
}

/// Filters by the names that they have, or once had.
fn is_called(name: &str, wanted: &str) -> bool {
    let wanted = match wanted {
        "envoy.http_connection_manager" => CONNECTION_MANAGER,
        "envoy.tcp_proxy" => "envoy.filters.network.tcp_proxy",
        "envoy.router" => "envoy.filters.http.router",
        "envoy.lua" => "envoy.filters.http.lua",
        other => other,
    };
    name == wanted
}

/// Changes a listener that the patch is for.
pub(super) fn apply(p: &Patch, l: &mut Listener, place: &Place<'_>) -> Res {
    let name = l.name.clone();
    if p.scope() == Scope::Routes {
        return each_manager(
            l,
            |_| true,
            |_| true,
            |m| match &mut m.route_specifier {
                Some(RouteSpecifier::RouteConfig(r)) => {
                    let did = route::apply(p, r, place)?;
                    if did == Did::Changed {
                        check::routes(r, None)?;
                    }
                    Ok(did)
                }
                _ => Ok(Did::Nothing),
            },
        );
    }
    let in_chain = |c: &FilterChain| is_for_chain(p, &name, c);
    match p.to {
        ApplyTo::Listener if p.operation == PatchOperation::Remove => Ok(Did::Removed),
        ApplyTo::Listener => {
            p.merge(l)?;
            Ok(Did::Changed)
        }
        ApplyTo::ListenerFilter => listener_filters(p, &mut l.listener_filters),
        ApplyTo::FilterChain if p.operation == PatchOperation::Add => {
            l.filter_chains.push(p.made()?);
            Ok(Did::Changed)
        }
        ApplyTo::FilterChain if p.operation == PatchOperation::Remove => {
            let before = l.filter_chains.len();
            l.filter_chains.retain(|c| !in_chain(c));
            let default = l.default_filter_chain.take_if(|c| in_chain(c)).is_some();
            Ok(if default || l.filter_chains.len() < before { Did::Changed } else { Did::Nothing })
        }
        ApplyTo::FilterChain => each_chain(l, in_chain, |c| {
            p.merge(c)?;
            Ok(Did::Changed)
        }),
        ApplyTo::NetworkFilter => each_chain(l, in_chain, |c| network_filters(p, &mut c.filters)),
        _ => {
            let manager = |f: &Filter| filter_match(p).is_none_or(|m| is_called(&f.name, &m.name));
            each_manager(l, in_chain, manager, |m| http_filters(p, &mut m.http_filters))
        }
    }
}

fn each_chain(
    l: &mut Listener,
    wanted: impl Fn(&FilterChain) -> bool,
    mut f: impl FnMut(&mut FilterChain) -> Res,
) -> Res {
    let mut all = Did::Nothing;
    for c in l.filter_chains.iter_mut().chain(&mut l.default_filter_chain).filter(|c| wanted(c)) {
        if f(c)? == Did::Changed {
            all = Did::Changed;
        }
    }
    Ok(all)
}

fn each_manager(
    l: &mut Listener,
    chain: impl Fn(&FilterChain) -> bool,
    wanted: impl Fn(&Filter) -> bool,
    mut f: impl FnMut(&mut hcm::HttpConnectionManager) -> Res,
) -> Res {
    each_chain(l, chain, |c| {
        let mut all = Did::Nothing;
        for filter in c.filters.iter_mut().filter(|f| wanted(f)) {
            let Some(ConfigType::TypedConfig(config)) = &mut filter.config_type else { continue };
            if !is::<hcm::HttpConnectionManager>(config) {
                continue;
            }
            let mut m =
                hcm::HttpConnectionManager::decode(config.value.as_slice()).map_err(|e| e.to_string())?;
            if f(&mut m)? == Did::Changed {
                *config = any(&m);
                all = Did::Changed;
            }
        }
        Ok(all)
    })
}

fn listener_filters(p: &Patch, all: &mut Vec<ListenerFilter>) -> Res {
    let wanted = listener_match(p).map_or("", |m| &m.listener_filter);
    let matched = |f: &ListenerFilter| is_called(&f.name, wanted);
    if !p.merges() {
        let by: Option<&dyn Fn(&ListenerFilter) -> bool> =
            if wanted.is_empty() { None } else { Some(&matched) };
        return list::change(all, p.operation, by, || p.made(), <[_]>::len);
    }
    let mut did = Did::Nothing;
    for f in all.iter_mut().filter(|f| !wanted.is_empty() && matched(f)) {
        let Some(Config::TypedConfig(config)) = &f.config_type else { continue };
        if fits(p, config) {
            p.merge(f)?;
            did = Did::Changed;
        }
    }
    Ok(did)
}

/// What an `Any` of another type says cannot be merged with.
fn fits(p: &Patch, config: &Any) -> bool {
    let short = |url: &str| url.rsplit('/').next().unwrap_or_default().to_owned();
    match p.value.field("typed_config").map(|f| &f.content) {
        Some(Content::One(Node::Any(url, _))) => short(url) == short(&config.type_url),
        _ => true,
    }
}

fn network_filters(p: &Patch, all: &mut Vec<Filter>) -> Res {
    let wanted = filter_match(p);
    let matched = |f: &Filter| wanted.is_none_or(|m| is_called(&f.name, &m.name));
    if !p.merges() {
        let by: Option<&dyn Fn(&Filter) -> bool> = if wanted.is_some() { Some(&matched) } else { None };
        let place = |list: &[Filter]| {
            let rbac = list.iter().rposition(|f| is_called(&f.name, "envoy.filters.network.rbac"));
            match p.class {
                FilterClass::Authn => 0,
                FilterClass::Authz => rbac.map_or(0, |i| i + 1),
                _ => list.len().saturating_sub(1),
            }
        };
        return list::change(all, p.operation, by, || p.made(), place);
    }
    let mut did = Did::Nothing;
    for f in all.iter_mut().filter(|f| matched(f)) {
        let Some(ConfigType::TypedConfig(config)) = &f.config_type else { continue };
        if fits(p, config) {
            p.merge(f)?;
            did = Did::Changed;
        }
    }
    Ok(did)
}

/// Where a filter of a class goes that is added.
fn place(class: FilterClass, list: &[hcm::HttpFilter]) -> usize {
    let after = |names: &[&str]| list.iter().rposition(|f| names.contains(&f.name.as_str())).map(|i| i + 1);
    let authn = || after(&["envoy.filters.http.jwt_authn", "istio_authn"]);
    let authz = || after(&["envoy.filters.http.rbac", "envoy.filters.http.ext_authz"]);
    let stats = || {
        let names = ["istio.stats", "envoy.filters.http.grpc_stats"];
        list.iter().position(|f| names.contains(&f.name.as_str()))
    };
    let router = list.len().saturating_sub(1);
    match class {
        FilterClass::Unspecified => router,
        FilterClass::Authn => authn().unwrap_or(0),
        FilterClass::Authz => authz().or_else(authn).unwrap_or(0),
        FilterClass::Stats => stats().unwrap_or(router),
    }
}

fn http_filters(p: &Patch, all: &mut Vec<hcm::HttpFilter>) -> Res {
    let wanted = sub_match(p);
    let matched = |f: &hcm::HttpFilter| wanted.is_none_or(|m| is_called(&f.name, &m.name));
    if !p.merges() {
        let by: Option<&dyn Fn(&hcm::HttpFilter) -> bool> =
            if wanted.is_some() { Some(&matched) } else { None };
        return list::change(all, p.operation, by, || p.made(), |l| place(p.class, l));
    }
    let mut did = Did::Nothing;
    for f in all.iter_mut().filter(|f| matched(f)) {
        let Some(HttpConfig::TypedConfig(config)) = &f.config_type else { continue };
        if fits(p, config) {
            p.merge(f)?;
            did = Did::Changed;
        }
    }
    Ok(did)
}

/// The connection manager of a network filter.
pub(super) fn manager(f: &Filter) -> Option<hcm::HttpConnectionManager> {
    match &f.config_type {
        Some(ConfigType::TypedConfig(config)) if is::<hcm::HttpConnectionManager>(config) => {
            hcm::HttpConnectionManager::decode(config.value.as_slice()).ok()
        }
        _ => None,
    }
}

/// Contexts that a listener's direction means.
pub(super) fn context(gateway: bool, direction: model::Direction) -> PatchContext {
    match direction {
        _ if gateway => PatchContext::Gateway,
        model::Direction::Inbound => PatchContext::SidecarInbound,
        _ => PatchContext::SidecarOutbound,
    }
}

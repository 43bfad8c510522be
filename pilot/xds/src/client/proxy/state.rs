//! What has been accepted so far, and whether it is whole.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_model::{
    federation::ForeignBundle,
    proxy::{
        ClientCertificate, Cluster, Discovery, FilterChain, HttpFilter, Listener, NetworkFilter, RouteSource,
        SecretRef, Validation,
    },
};

use super::{
    Fixed, ProxyState,
    hosts::{self, Hosts},
    on_demand::{Asked, Kind},
};
use crate::{
    bundles,
    client::{Rejection, Update},
    codec::{self, DecodeError, extension},
    nds::NameTable,
    pb,
    process::{self, ProcessSettings},
    type_url::{BUNDLES, CDS, ECDS, EDS, LDS, NDS, PROXY_CONFIG, RDS, SDS, VHDS},
};

/// Types that only matter where something refers to them by name.
const BY_NAME: [&str; 4] = [EDS, RDS, SDS, ECDS];

#[derive(Default)]
pub(super) struct Inner {
    pub(super) state: ProxyState,
    /// What is there without the server and cannot be replaced by it.
    fixed: Option<Fixed>,
    /// Resources referred to by name that the server has said do not exist, or sent unusable.
    absent: BTreeSet<(&'static str, String)>,
    received: BTreeSet<&'static str>,
    pub(super) names: Option<Arc<NameTable>>,
    /// Of other trust domains, by domain.
    pub(super) bundles: BTreeMap<String, ForeignBundle>,
    /// Of the process, once something is known of them.
    pub(super) process: Option<ProcessSettings>,
    /// Configurations of filters.
    extensions: extension::Extensions,
    /// Which of them a listener follows.
    follows: BTreeMap<String, BTreeSet<String>>,
    /// What was accepted, as it came, for the file.
    pub(super) raw: BTreeMap<&'static str, BTreeMap<String, pb::Resource>>,
    hosts: Hosts,
    /// Names that are subscribed since traffic asked for them.
    pub(super) on_demand: BTreeMap<Kind, BTreeSet<String>>,
    /// Up to which round of asking that is so.
    pub(super) round: u64,
    /// Why there is nothing on demand.
    pub(super) without_on_demand: Option<&'static str>,
}

fn put<T>(
    map: &mut BTreeMap<String, Arc<T>>,
    r: &pb::Resource,
    any: &pb::Any,
    decode: fn(&pb::Any) -> Result<T, DecodeError>,
) -> Result<(), String> {
    map.insert(r.name.clone(), Arc::new(decode(any).map_err(reason)?));
    Ok(())
}

fn reason(e: DecodeError) -> String {
    format!("{}: {}", e.field, e.reason)
}

impl Inner {
    pub(super) fn new(fixed: Option<Fixed>) -> Self {
        let state = fixed.as_ref().map(|f| ProxyState::clone(&f.resources)).unwrap_or_default();
        Self { state, fixed, ..Self::default() }
    }

    pub(super) fn apply(&mut self, type_url: &str, mut update: Update) -> Vec<Rejection> {
        let types = [CDS, EDS, LDS, RDS, VHDS, NDS, SDS, ECDS, BUNDLES, PROXY_CONFIG];
        let Some(t) = types.into_iter().find(|t| *t == type_url) else {
            return update
                .changed
                .into_iter()
                .map(|r| Rejection { name: r.name, reason: format!("type {type_url} is not known") })
                .collect();
        };
        let mut bad = Vec::new();
        if t == VHDS {
            // What a host gives up another may have, in the same update.
            update.removed.drain(..).for_each(|n| self.remove(t, n));
            update.changed.iter().for_each(|r| self.hosts.give_up(r));
        }
        let expected = if t == VHDS { self.route_names() } else { BTreeSet::new() };
        for r in update.changed {
            let applied = match &r.resource {
                None => Err("no resource".to_owned()),
                Some(_) if self.is_fixed(t, &r.name) => {
                    Err("the bootstrap file has a static one of this name".to_owned())
                }
                Some(any) => match t {
                    CDS => put(&mut self.state.clusters, &r, any, codec::decode_cluster),
                    EDS => put(&mut self.state.endpoints, &r, any, codec::decode_endpoints),
                    LDS => self.listener(&r.name, any),
                    RDS => self.route(&r.name, any),
                    VHDS => self.hosts.take(&self.state.routes, &expected, &r, any),
                    SDS => self.secret(any),
                    ECDS => self.extension(any),
                    BUNDLES => bundles::decode(any).map(|b| drop(self.bundles.insert(r.name.clone(), b))),
                    PROXY_CONFIG => process::decode(any).map(|p| self.process = Some(p)),
                    _ => NameTable::from_any(any)
                        .map(|n| self.names = Some(Arc::new(n)))
                        .map_err(|e| e.to_string()),
                },
            };
            match applied {
                Ok(()) => {
                    self.absent.remove(&(t, r.name.clone()));
                    for alias in &r.aliases {
                        self.absent.remove(&(t, alias.clone()));
                    }
                    // Keys are kept by whoever takes them, not here.
                    if t != SDS {
                        self.raw.entry(t).or_default().insert(r.name.clone(), r);
                    }
                }
                Err(reason) => {
                    if t == VHDS {
                        self.hosts.keep(&r.name);
                    }
                    // Without an older version there is nothing to wait for.
                    self.absent.insert((t, r.name.clone()));
                    self.absent.extend(r.aliases.into_iter().map(|a| (t, a)));
                    bad.push(Rejection { name: r.name, reason });
                }
            }
        }
        for n in update.removed {
            self.remove(t, n);
        }
        if t == PROXY_CONFIG && bad.is_empty() {
            // Whoever has nothing to say has answered.
            self.process.get_or_insert_default();
        }
        self.received.insert(t);
        bad
    }

    fn remove(&mut self, t: &'static str, n: String) {
        if self.is_fixed(t, &n) {
            return;
        }
        match t {
            CDS => drop(self.state.clusters.remove(&n)),
            EDS => drop(self.state.endpoints.remove(&n)),
            LDS => {
                self.state.listeners.remove(&n);
                self.follows.remove(&n);
            }
            RDS => drop(self.state.routes.remove(&n)),
            VHDS => self.hosts.remove(&n),
            // Connections go on with the last one: a listener without its certificate would serve nobody.
            SDS => {}
            ECDS => self.without_extension(&n),
            BUNDLES => drop(self.bundles.remove(&n)),
            PROXY_CONFIG => self.process = None,
            _ => self.names = None,
        }
        if let Some(raw) = self.raw.get_mut(t) {
            raw.remove(&n);
        }
        self.absent.insert((t, n));
    }

    /// Names of route configurations that listeners refer to.
    fn route_names(&self) -> BTreeSet<String> {
        self.state.listeners.values().flat_map(|l| routes_of(l)).map(str::to_owned).collect()
    }

    fn is_fixed(&self, t: &str, name: &str) -> bool {
        self.fixed.as_ref().is_some_and(|f| match t {
            CDS => f.resources.clusters.contains_key(name),
            LDS => f.resources.listeners.contains_key(name),
            _ => false,
        })
    }

    fn listener(&mut self, name: &str, any: &pb::Any) -> Result<(), String> {
        let expanded = extension::expand(any, &self.extensions).map_err(reason)?;
        if expanded.missing.is_empty() {
            let listener = self.decode_listener(&expanded.listener)?;
            self.state.listeners.insert(name.to_owned(), Arc::new(listener));
        }
        if expanded.names.is_empty() {
            self.follows.remove(name);
        } else {
            self.follows.insert(name.to_owned(), expanded.names);
        }
        Ok(())
    }

    fn decode_listener(&self, any: &pb::Any) -> Result<Listener, String> {
        let listener = codec::decode_listener(any).map_err(reason)?;
        match self.without_on_demand {
            Some(why) if asks(&listener) => Err(format!("on_demand: {why}")),
            _ => Ok(listener),
        }
    }

    fn route(&mut self, name: &str, any: &pb::Any) -> Result<(), String> {
        let config = codec::decode_route(any).map_err(reason)?;
        match self.without_on_demand {
            Some(why) if config.on_demand.is_some() => return Err(format!("vhds: {why}")),
            _ => {}
        }
        self.state.routes.insert(name.to_owned(), Arc::new(config));
        Ok(())
    }

    fn secret(&self, any: &pb::Any) -> Result<(), String> {
        let secret = codec::decode_secret(any).map_err(reason)?;
        match &self.fixed {
            Some(f) => f.secrets.take(&secret),
            None => Err("secrets do not come from the control plane".to_owned()),
        }
    }

    /// Takes a filter's configuration if every listener that follows it can.
    fn extension(&mut self, any: &pb::Any) -> Result<(), String> {
        let (name, content) = extension::decode(any).map_err(reason)?;
        let before = self.extensions.insert(name.clone(), content);
        match self.refresh(&name) {
            Ok(listeners) => {
                self.state.listeners.extend(listeners);
                Ok(())
            }
            Err(reason) => {
                match before {
                    Some(b) => drop(self.extensions.insert(name, b)),
                    None => drop(self.extensions.remove(&name)),
                }
                Err(reason)
            }
        }
    }

    /// A configuration is gone: listeners go back to the default, or keep what they have.
    fn without_extension(&mut self, name: &str) {
        self.extensions.remove(name);
        if let Ok(listeners) = self.refresh(name) {
            self.state.listeners.extend(listeners);
        }
    }

    /// The listeners that follow a configuration, with what is known now.
    fn refresh(&self, name: &str) -> Result<Vec<(String, Arc<Listener>)>, String> {
        let mut out = Vec::new();
        for (listener, names) in &self.follows {
            let Some(any) = self.raw.get(LDS).and_then(|l| l.get(listener)).and_then(|r| r.resource.as_ref())
            else {
                continue;
            };
            if !names.contains(name) {
                continue;
            }
            let expanded = extension::expand(any, &self.extensions).map_err(reason)?;
            if expanded.missing.is_empty() {
                let decoded = self.decode_listener(&expanded.listener)?;
                out.push((listener.clone(), Arc::new(decoded)));
            }
        }
        Ok(out)
    }

    /// Names that listeners and clusters refer to, by type.
    pub(super) fn references(&self) -> BTreeMap<&'static str, BTreeSet<String>> {
        self.references_of(|_| true)
    }

    fn references_of(&self, counts: impl Fn(&str) -> bool) -> BTreeMap<&'static str, BTreeSet<String>> {
        let state = &self.state;
        let clusters = || state.clusters.iter().filter(|(n, _)| counts(n)).map(|(_, c)| c);
        let mut out: BTreeMap<&'static str, BTreeSet<String>> = BTreeMap::new();
        out.insert(RDS, state.listeners.values().flat_map(|l| routes_of(l)).map(str::to_owned).collect());
        out.insert(EDS, clusters().filter_map(|c| eds_name(c)).map(str::to_owned).collect());
        if let Some(fixed) = &self.fixed {
            let of = state.listeners.values().flat_map(|l| listener_secrets(l));
            let all = of.chain(clusters().flat_map(|c| cluster_secrets(c)));
            let wanted = all.filter(|n| !fixed.secret_names.contains(*n)).map(str::to_owned).collect();
            out.insert(SDS, wanted);
        }
        out.insert(ECDS, self.follows.values().flatten().cloned().collect());
        out
    }

    fn has(&self, t: &'static str, name: &str) -> bool {
        match t {
            RDS => self.state.routes.contains_key(name),
            EDS => self.state.endpoints.contains_key(name),
            SDS => self.fixed.as_ref().is_some_and(|f| f.secrets.has(name)),
            _ => self.extensions.contains_key(name),
        }
    }

    /// Whether the server has answered for everything it is asked for at all.
    pub(super) fn started(&self) -> bool {
        let asked = |t: &str| {
            self.fixed.as_ref().is_none_or(|f| match t {
                CDS => f.clusters,
                _ => f.listeners,
            })
        };
        [CDS, LDS].into_iter().all(|t| self.received.contains(t) || !asked(t))
    }

    pub(super) fn complete(&self) -> bool {
        self.started()
            // Hosts of our own control plane come unasked, and without them requests would be taken for ones to elsewhere.
            && (self.fixed.is_some() || self.received.contains(VHDS) || !self.has_hosts_on_demand())
            && self
                // What traffic asked for must not hold up the rest.
                .references_of(|n| !self.is_on_demand(Kind::Cluster, n))
                .into_iter()
                .all(|(t, names)| names.into_iter().all(|n| self.answered(t, &n)))
    }

    fn answered(&self, t: &'static str, name: &str) -> bool {
        self.has(t, name) || self.absent.contains(&(t, name.to_owned()))
    }

    fn is_on_demand(&self, kind: Kind, name: &str) -> bool {
        self.on_demand.get(&kind).is_some_and(|names| names.contains(name))
    }

    /// Whether all that a cluster refers to has been answered for.
    fn is_warm(&self, c: &Cluster) -> bool {
        eds_name(c).is_none_or(|n| self.answered(EDS, n))
            && self.fixed.as_ref().is_none_or(|f| {
                cluster_secrets(c).all(|n| f.secret_names.contains(n) || self.answered(SDS, n))
            })
    }

    /// Takes note of names that traffic asks for, and drops what belongs to those that were given up. Returns names
    /// that were subscribed before.
    pub(super) fn ask(&mut self, asked: Asked) -> BTreeMap<Kind, BTreeSet<String>> {
        let mut again: BTreeMap<Kind, BTreeSet<String>> = BTreeMap::new();
        self.round = asked.round;
        for (kind, name) in asked.ask {
            self.absent.remove(&(type_of(kind), name.clone()));
            if !self.on_demand.entry(kind).or_default().insert(name.clone()) {
                again.entry(kind).or_default().insert(name);
            }
        }
        for (kind, name) in asked.gone {
            if !self.on_demand.entry(kind).or_default().remove(&name) {
                continue;
            }
            let t = type_of(kind);
            self.absent.remove(&(t, name.clone()));
            match kind {
                // If the server has it among all clusters, it now has to say so (xDS protocol, "Unsubscribing").
                Kind::Cluster if !self.is_fixed(CDS, &name) => drop(self.state.clusters.remove(&name)),
                Kind::Cluster => {}
                Kind::VirtualHost => self.hosts.remove(&name),
            }
            if let Some(raw) = self.raw.get_mut(t) {
                raw.remove(&name);
            }
        }
        again
    }

    /// What there is to say about a name that traffic asked for: whether it is in `view`, `None` while that is open.
    pub(super) fn find(&self, view: &ProxyState, kind: Kind, name: &str) -> Option<bool> {
        let there = match kind {
            Kind::Cluster => view.clusters.contains_key(name),
            Kind::VirtualHost => self.hosts.is_in(&view.routes, name),
        };
        if there {
            return Some(true);
        }
        self.absent.contains(&(type_of(kind), name.to_owned())).then_some(false)
    }

    /// Whether some routes have further hosts.
    pub(super) fn has_hosts_on_demand(&self) -> bool {
        self.state.routes.values().any(|r| r.on_demand.is_some())
    }

    /// Whether there is something for a name.
    pub(super) fn holds(&self, kind: Kind, name: &str) -> bool {
        match kind {
            Kind::Cluster => self.state.clusters.contains_key(name),
            Kind::VirtualHost => self.hosts.resolve(name).is_some(),
        }
    }

    /// Whether a name that traffic asked for still has a purpose.
    pub(super) fn keeps(&self, kind: Kind, name: &str) -> bool {
        kind == Kind::Cluster || hosts::routes_of(&self.state.routes, name).is_some()
    }

    /// What is to be in force: clusters on demand when they are warm, routes with their hosts on demand.
    pub(super) fn view(&mut self) -> ProxyState {
        let mut view = self.state.clone();
        if let Some(names) = self.on_demand.get(&Kind::Cluster) {
            for n in names {
                if view.clusters.get(n).is_some_and(|c| !self.is_warm(c)) {
                    view.clusters.remove(n);
                }
            }
        }
        self.hosts.merge(&mut view.routes);
        view
    }

    /// Drops what nothing refers to any more.
    pub(super) fn prune(&mut self) {
        let references = self.references();
        let kept = |t: &str, n: &str| references.get(t).is_some_and(|names| names.contains(n));
        self.state.routes.retain(|n, _| kept(RDS, n));
        self.state.endpoints.retain(|n, _| kept(EDS, n));
        self.extensions.retain(|n, _| kept(ECDS, n));
        self.hosts.prune(&self.state.routes, references.get(RDS).unwrap_or(&BTreeSet::new()));
        let on_demand = &self.on_demand;
        let asked =
            |t: &str, n: &String| on_demand.iter().any(|(k, names)| type_of(*k) == t && names.contains(n));
        self.absent.retain(|(t, n)| kept(t, n) || asked(t, n));
        if let Some(raw) = self.raw.get_mut(VHDS) {
            let names: BTreeSet<&String> = self.hosts.names().collect();
            raw.retain(|n, _| names.contains(n));
        }
        for t in BY_NAME {
            if let Some(raw) = self.raw.get_mut(t) {
                raw.retain(|n, _| kept(t, n));
            }
        }
    }
}

/// The type of what a name stands for.
pub(super) fn type_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Cluster => CDS,
        Kind::VirtualHost => VHDS,
    }
}

/// Whether connections or requests of a listener may ask for clusters.
pub(crate) fn asks(l: &Listener) -> bool {
    chains(l).flat_map(|c| &c.filters).any(|f| match f {
        NetworkFilter::Tcp(t) => t.on_demand.is_some(),
        NetworkFilter::Http(h) => h.filters.iter().any(|f| matches!(f, HttpFilter::OnDemand(Some(_)))),
        _ => false,
    })
}

fn chains(l: &Listener) -> impl Iterator<Item = &FilterChain> {
    l.filter_chains.iter().chain(&l.default_filter_chain)
}

/// RDS names of a listener.
pub(crate) fn routes_of(l: &Listener) -> impl Iterator<Item = &str> {
    chains(l).flat_map(|c| &c.filters).filter_map(|f| match f {
        NetworkFilter::Http(h) => match &h.routes {
            RouteSource::Rds(name) => Some(name.as_str()),
            RouteSource::Inline(_) => None,
        },
        _ => None,
    })
}

/// EDS name of a cluster: its own unless it says another.
pub(crate) fn eds_name(c: &Cluster) -> Option<&str> {
    match &c.discovery {
        Discovery::Eds(s) if s.is_empty() => Some(&c.name),
        Discovery::Eds(s) => Some(s),
        _ => None,
    }
}

fn sds(r: &SecretRef) -> Option<&str> {
    match r {
        SecretRef::Sds(name) => Some(name),
        SecretRef::Files { .. } => None,
    }
}

fn trusted(v: &Validation) -> Option<&str> {
    v.trusted.as_ref().and_then(sds)
}

/// SDS names of a listener.
fn listener_secrets(l: &Listener) -> impl Iterator<Item = &str> {
    chains(l).filter_map(|c| c.tls.as_ref()).flat_map(|t| {
        let roots = match &t.client_certificate {
            ClientCertificate::None => None,
            ClientCertificate::Optional(v) | ClientCertificate::Required(v) => trusted(v),
        };
        [sds(&t.certificate), roots].into_iter().flatten()
    })
}

/// SDS names of a cluster.
fn cluster_secrets(c: &Cluster) -> impl Iterator<Item = &str> {
    c.tls
        .as_deref()
        .into_iter()
        .chain(c.tls_matches.iter().filter_map(|m| m.tls.as_ref()))
        .flat_map(|t| [t.certificate.as_ref().and_then(sds), trusted(&t.validation)].into_iter().flatten())
}

//! Virtual hosts that come on demand (VHDS), and their place among those of route configurations.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use mesh_model::proxy::{OnDemandHosts, RouteConfiguration, VirtualHost};

use crate::{codec, pb};

type Routes = BTreeMap<String, Arc<RouteConfiguration>>;

/// What has come, by resource name.
#[derive(Default)]
pub(super) struct Hosts {
    all: BTreeMap<String, Arc<VirtualHost>>,
    /// Names by which clients ask, and the resource that they lead to.
    aliases: BTreeMap<String, String>,
    /// By route configuration: domains, and the resource that has each.
    owners: HashMap<String, HashMap<String, String>>,
    generation: u64,
    /// What was merged last, and of what.
    merged: BTreeMap<String, Merged>,
}

struct Merged {
    base: Arc<RouteConfiguration>,
    generation: u64,
    whole: Arc<RouteConfiguration>,
}

/// The route configuration that a name `<route configuration>/<host>` belongs to, if it has hosts on demand.
pub(super) fn routes_of<'a>(routes: &'a Routes, name: &str) -> Option<&'a Arc<RouteConfiguration>> {
    // The name of a route configuration may itself have slashes.
    let mut at = name.match_indices('/').map(|(i, _)| i);
    at.find_map(|i| routes.get(&name[..i]).filter(|r| r.on_demand.is_some()))
}

/// The same of one that has not come yet, by the name by which it is asked for.
fn expected_of<'a>(routes: &Routes, expected: &'a BTreeSet<String>, name: &str) -> Option<&'a String> {
    let mut at = name.match_indices('/').map(|(i, _)| i);
    at.find_map(|i| expected.get(&name[..i]).filter(|r| !routes.contains_key(*r)))
}

fn has(host: &VirtualHost, domain: &str) -> bool {
    host.domains.iter().any(|d| d.eq_ignore_ascii_case(domain))
}

fn domains(host: &VirtualHost) -> impl Iterator<Item = String> {
    host.domains.iter().map(|d| d.to_ascii_lowercase())
}

impl Hosts {
    /// Takes one that its route configuration can have. `expected` are route configurations that listeners refer to:
    /// their hosts may come before them.
    pub(super) fn take(
        &mut self,
        routes: &Routes,
        expected: &BTreeSet<String>,
        r: &pb::Resource,
        any: &pb::Any,
    ) -> Result<(), String> {
        let host = codec::decode_virtual_host(any).map_err(|e| format!("{}: {}", e.field, e.reason))?;
        let known = routes_of(routes, &r.name);
        let config = known.map(|c| &c.name).or_else(|| expected_of(routes, expected, &r.name));
        let Some(config) = config else {
            return Err("no route configuration with vhds has this name before its slash".into());
        };
        for d in domains(&host) {
            let fixed = known.iter().flat_map(|c| &c.virtual_hosts);
            let fixed = fixed.into_iter().find(|h| has(h, &d)).map(|h| &h.name);
            let owners = self.owners.get(config);
            if let Some(other) =
                fixed.or_else(|| owners.and_then(|o| o.get(&d)).filter(|owner| **owner != r.name))
            {
                return Err(format!("domains: {d:?} is one of virtual host {other:?}"));
            }
        }
        let config = config.clone();
        self.disown(&r.name);
        let owners = self.owners.entry(config).or_default();
        owners.extend(domains(&host).map(|d| (d, r.name.clone())));
        self.all.insert(r.name.clone(), Arc::new(host));
        for alias in &r.aliases {
            self.aliases.insert(alias.clone(), r.name.clone());
        }
        self.generation += 1;
        Ok(())
    }

    /// Frees the domains that a new version of a host gives up, before any of its update is taken.
    pub(super) fn give_up(&mut self, r: &pb::Resource) {
        let (Some(old), Some(any)) = (self.all.get(&r.name), &r.resource) else { return };
        let Ok(new) = codec::decode_virtual_host(any) else { return };
        let given: Vec<String> = domains(old).filter(|d| !has(&new, d)).collect();
        self.free(&r.name, given);
    }

    /// A new version of a host was refused: the old one stays with all its domains, or goes if one has another host now.
    pub(super) fn keep(&mut self, name: &str) {
        let Some(old) = self.all.get(name).cloned() else { return };
        let mut lost = false;
        for owners in self.owners_of(name) {
            for d in domains(&old) {
                lost |= *owners.entry(d).or_insert_with(|| name.to_owned()) != name;
            }
        }
        if lost {
            self.remove(name);
        }
    }

    fn owners_of<'a>(&'a mut self, name: &'a str) -> impl Iterator<Item = &'a mut HashMap<String, String>> {
        let of = |config: &str| name.strip_prefix(config).is_some_and(|n| n.starts_with('/'));
        self.owners.iter_mut().filter(move |(c, _)| of(c)).map(|(_, owners)| owners)
    }

    /// The domains of a resource are free again.
    fn disown(&mut self, name: &str) {
        if let Some(old) = self.all.get(name).cloned() {
            self.free(name, domains(&old));
        }
    }

    fn free(&mut self, name: &str, given: impl IntoIterator<Item = String>) {
        for d in given {
            for owners in self.owners_of(name) {
                if owners.get(&d).is_some_and(|owner| owner == name) {
                    owners.remove(&d);
                }
            }
        }
    }

    /// Takes one away, by its own name or by one that leads to nothing else any more.
    pub(super) fn remove(&mut self, name: &str) {
        let alias = self.aliases.remove(name);
        let gone = if self.all.contains_key(name) {
            Some(name.to_owned())
        } else {
            alias.filter(|r| !self.aliases.values().any(|other| other == r))
        };
        if let Some(gone) = gone {
            self.disown(&gone);
            self.all.remove(&gone);
            self.aliases.retain(|_, r| *r != gone);
            self.generation += 1;
        }
    }

    /// The resource that a name leads to.
    pub(super) fn resolve(&self, name: &str) -> Option<&String> {
        self.all.get_key_value(name).map(|(n, _)| n).or_else(|| self.aliases.get(name))
    }

    /// Whether what a name leads to is part of these routes.
    pub(super) fn is_in(&self, routes: &Routes, name: &str) -> bool {
        let Some(resource) = self.resolve(name) else { return false };
        let config = routes_of(routes, name).and_then(|r| r.on_demand.as_ref());
        config.is_some_and(|o| o.hosts.contains_key(resource))
    }

    /// Drops those of route configurations that are gone or have none on demand any more.
    pub(super) fn prune(&mut self, routes: &Routes, expected: &BTreeSet<String>) {
        let there = |n: &str| routes_of(routes, n).is_some() || expected_of(routes, expected, n).is_some();
        let gone: BTreeSet<String> = self.all.keys().filter(|n| !there(n)).cloned().collect();
        if !gone.is_empty() {
            self.all.retain(|n, _| !gone.contains(n));
            for owners in self.owners.values_mut() {
                owners.retain(|_, owner| !gone.contains(owner));
            }
            self.owners.retain(|_, owners| !owners.is_empty());
            self.aliases.retain(|_, r| !gone.contains(r));
            self.generation += 1;
        }
        self.merged.retain(|n, _| routes.contains_key(n));
    }

    /// Resources that are kept.
    pub(super) fn names(&self) -> impl Iterator<Item = &String> {
        self.all.keys()
    }

    fn of(&self, prefix: &str) -> impl Iterator<Item = (&String, &Arc<VirtualHost>)> {
        let prefix = prefix.to_owned();
        self.all.range(prefix.clone()..).take_while(move |(n, _)| n.starts_with(&prefix))
    }

    /// Puts all in their places.
    pub(super) fn merge(&mut self, routes: &mut Routes) {
        for (name, base) in routes.iter_mut().filter(|(_, r)| r.on_demand.is_some()) {
            let known = self.merged.get(name);
            if let Some(m) = known.filter(|m| m.generation == self.generation && Arc::ptr_eq(&m.base, base)) {
                *base = Arc::clone(&m.whole);
                continue;
            }
            // The route configuration may have got a domain since that one of these has: then its own counts.
            let hosts: BTreeMap<_, _> = self
                .of(&format!("{name}/"))
                .filter(|(_, h)| !base.virtual_hosts.iter().any(|own| h.domains.iter().any(|d| has(own, d))))
                .map(|(n, h)| (n.clone(), Arc::clone(h)))
                .collect();
            let on_demand = Some(OnDemandHosts { hosts });
            let whole = Arc::new(RouteConfiguration { on_demand, ..(**base).clone() });
            let base = std::mem::replace(base, Arc::clone(&whole));
            let generation = self.generation;
            self.merged.insert(name.clone(), Merged { base, generation, whole });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str, domains: &[&str]) -> VirtualHost {
        VirtualHost {
            name: name.into(),
            domains: domains.iter().map(|d| (*d).to_owned()).collect(),
            require_tls: false,
            attempt_count: false,
            routes: vec![],
            request_headers: Default::default(),
            response_headers: Default::default(),
            filters: Default::default(),
        }
    }

    fn routes(name: &str, static_host: VirtualHost) -> Routes {
        let on_demand = Some(OnDemandHosts::default());
        let config = RouteConfiguration { name: name.into(), virtual_hosts: vec![static_host], on_demand };
        BTreeMap::from([(name.to_owned(), Arc::new(config))])
    }

    fn take(h: &mut Hosts, r: &Routes, name: &str, domains: &[&str], aliases: &[&str]) -> Result<(), String> {
        let any = codec::encode_virtual_host(&host(name, domains));
        let aliases = aliases.iter().map(|a| (*a).to_owned()).collect();
        h.take(
            r,
            &BTreeSet::from(["later".to_owned()]),
            &pb::Resource { name: name.into(), aliases, ..Default::default() },
            &any,
        )
    }

    fn merged(h: &mut Hosts, r: &Routes, name: &str) -> Vec<String> {
        let mut all = r.clone();
        h.merge(&mut all);
        all[name].on_demand.as_ref().unwrap().hosts.keys().cloned().collect()
    }

    #[test]
    fn hosts_find_their_routes_and_leave_by_any_name() {
        // A name with a slash of its own.
        let r = routes("a/b", host("static", &["Static.test"]));
        let mut h = Hosts::default();
        take(&mut h, &r, "a/b/x", &["x"], &["a/b/x", "a/b/y"]).unwrap();
        assert!(take(&mut h, &r, "a/x", &["z"], &[]).unwrap_err().contains("no route configuration"));
        assert!(h.resolve("a/b/y").is_some() && !h.is_in(&r, "a/b/y"), "not yet in force");
        let mut all = r.clone();
        h.merge(&mut all);
        assert!(h.is_in(&all, "a/b/y"));
        // Merged once while nothing changes.
        let mut again = r.clone();
        h.merge(&mut again);
        assert!(Arc::ptr_eq(&all["a/b"], &again["a/b"]));
        // One of two names leads to nothing: the other one still does.
        h.remove("a/b/y");
        assert!(h.resolve("a/b/y").is_none());
        assert_eq!(merged(&mut h, &r, "a/b"), ["a/b/x"]);
        h.remove("a/b/x");
        assert!(merged(&mut h, &r, "a/b").is_empty());
    }

    #[test]
    fn a_domain_has_one_host() {
        let r = routes("r", host("static", &["Static.test"]));
        let mut h = Hosts::default();
        take(&mut h, &r, "r/a", &["a", "b"], &[]).unwrap();
        take(&mut h, &r, "r/a", &["a", "c"], &[]).unwrap();
        for (domain, owner) in [("static.TEST", "static"), ("C", "r/a")] {
            let e = take(&mut h, &r, "r/other", &[domain], &[]).unwrap_err();
            assert!(e.starts_with("domains: ") && e.contains(owner), "{e}");
        }
        take(&mut h, &r, "r/other", &["b"], &[]).unwrap();
        // Those of a configuration that a listener waits for come before it.
        take(&mut h, &r, "later/a", &["a"], &[]).unwrap();
        h.prune(&r, &BTreeSet::from(["later".to_owned()]));
        let later = routes("later", host("static", &["x"]));
        assert_eq!(merged(&mut h, &later, "later"), ["later/a"]);
        // What one has left another may have.
        h.remove("later/a");
        take(&mut h, &r, "later/b", &["a"], &[]).unwrap();
        h.prune(&r, &BTreeSet::new());
        assert_eq!(merged(&mut h, &r, "r"), ["r/a", "r/other"]);
        // What the routes themselves say from now on counts.
        let r = routes("r", host("static", &["b"]));
        assert_eq!(merged(&mut h, &r, "r"), ["r/a"]);
        h.prune(&BTreeMap::new(), &BTreeSet::new());
        assert_eq!(h.names().count(), 0);
    }
}

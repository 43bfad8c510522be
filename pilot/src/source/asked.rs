//! Virtual hosts by the hosts of requests, for proxies that ask for them.
//!
//! A client asks for `<route configuration>/<host>`. The host is one of a virtual host's domains, or matches a pattern
//! among them as in Envoy: exact ones first, then the longest that begins with `*`, then the longest that ends with it,
//! then `*` itself, which is where requests end that are for nobody. Of patterns a client gets a virtual host of that one
//! host: with the pattern it would ask for no other that matches it, be it somebody else's.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher as _, RandomState},
    sync::Arc,
};

use mesh_model::proxy::VirtualHost;
use mesh_xds::{
    codec, pb,
    server::{Layer, OnDemand, Resolved, content_version},
};

/// The virtual hosts of a class.
#[derive(Debug)]
pub(super) struct Hosts {
    layer: Arc<Layer>,
    /// By a keyed hash of `<route configuration>/<domain>`: a mesh has ten such names for each service, in every class.
    exact: HashMap<u64, Entry>,
    hasher: RandomState,
    /// By route configuration, in the order in which they are tried.
    patterns: HashMap<String, Vec<(String, Arc<str>)>>,
}

#[derive(Debug, Clone)]
struct Entry {
    resource: Arc<str>,
    /// It has patterns as well, and so is not for a client as it is.
    part: bool,
}

/// Resource name of a virtual host, as the route configuration and the rest.
fn split(name: &str) -> Option<(&str, &str)> {
    // A host has no slash, a domain neither; the name of a route configuration may have some.
    name.rsplit_once('/')
}

impl Hosts {
    /// Of virtual hosts that were made, and of others that are what they were `before`. All are in `layer`.
    pub(super) fn new<'a>(
        made: impl Iterator<Item = (&'a String, &'a VirtualHost)>,
        kept: &[String],
        before: Option<&Self>,
        layer: Arc<Layer>,
    ) -> Self {
        let hasher = before.map(|b| b.hasher.clone()).unwrap_or_default();
        let mut out = Self { layer, exact: HashMap::new(), hasher, patterns: HashMap::new() };
        if let Some(b) = before {
            let kept: HashSet<&str> = kept.iter().map(String::as_str).collect();
            let same = b.exact.iter().filter(|(_, e)| kept.contains(&*e.resource));
            out.exact.extend(same.map(|(k, e)| (*k, e.clone())));
            for (config, patterns) in &b.patterns {
                let same = patterns.iter().filter(|(_, r)| kept.contains(&**r)).cloned();
                out.patterns.entry(config.clone()).or_default().extend(same);
            }
        }
        for (name, host) in made {
            let Some((config, _)) = split(name) else { continue };
            let resource: Arc<str> = name.as_str().into();
            let part = host.domains.iter().any(|d| d.contains('*'));
            for d in &host.domains {
                let d = d.to_ascii_lowercase();
                if d.contains('*') {
                    out.patterns.entry(config.to_owned()).or_default().push((d, Arc::clone(&resource)));
                } else {
                    let key = out.key(config, &d);
                    out.exact.insert(key, Entry { resource: Arc::clone(&resource), part });
                }
            }
        }
        for patterns in out.patterns.values_mut() {
            let rank = |p: &str| (p == "*", !p.starts_with('*'), usize::MAX - p.len());
            patterns.sort_by(|(a, _), (b, _)| (rank(a), a).cmp(&(rank(b), b)));
        }
        out
    }

    fn key(&self, config: &str, domain: &str) -> u64 {
        self.hasher.hash_one((config, domain))
    }

    /// The resource of the virtual host that has a host, and whether a client gets it as it is.
    fn find(&self, config: &str, host: &str) -> Option<(&Arc<pb::Resource>, bool)> {
        if let Some(e) = self.exact.get(&self.key(config, host)) {
            return Some((self.layer.get(&e.resource)?, !e.part));
        }
        let matches = |p: &str| match (p.strip_prefix('*'), p.strip_suffix('*')) {
            (Some(end), _) => host.len() > end.len() && host.ends_with(end),
            (_, Some(start)) => host.len() > start.len() && host.starts_with(start),
            _ => false,
        };
        let (_, resource) = self.patterns.get(config)?.iter().find(|(p, _)| matches(p))?;
        Some((self.layer.get(resource)?, false))
    }
}

impl OnDemand for Hosts {
    fn resolve(&self, name: &str) -> Option<Resolved> {
        let (config, host) = split(name)?;
        let host = host.to_ascii_lowercase();
        // As a domain it would be a pattern.
        if host.is_empty() || host.contains('*') {
            return None;
        }
        let (found, whole) = self.find(config, &host)?;
        if whole {
            return Some(Resolved { resource: Arc::clone(found), made: false });
        }
        let name = format!("{config}/{host}");
        let any = codec::virtual_host_for(found.resource.as_ref()?, &name, &host)?;
        let version = content_version(&any.value);
        let resource = pb::Resource { name, version, resource: Some(any), ..pb::Resource::default() };
        Some(Resolved { resource: Arc::new(resource), made: true })
    }
}

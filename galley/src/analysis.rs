//! Rules between documents: references to hosts, subsets, gateways and services.
//!
//! A VirtualService that routes to a host which neither the configuration nor a peer cluster knows
//! is an **error** when the host is a short name or one of the cluster's own domain, since nothing
//! but a registry could ever provide it: the document is withheld until the host appears. A document
//! that already serves is not taken back when a host vanishes; it gets a warning instead, since
//! removing its other routes would do more harm. Everything else that dangles is a warning.

use std::collections::BTreeMap;

use mesh_model::authored::{Destination, DestinationRule, Document, Spec, VirtualService};

use crate::{
    document::Key,
    path::{FieldPath, Path},
};

/// Domain of a cluster's own services.
const CLUSTER_DOMAIN: &str = "cluster.local";
/// Domains whose names peers provide.
const PEER_DOMAINS: [&str; 2] = [".clusterset.local", ".global"];

/// Everything that references are checked against.
#[derive(Debug, Default)]
pub(crate) struct Index {
    hosts: Counted<String>,
    /// What follows the asterisk.
    wildcards: Counted<String>,
    /// `namespace/name`.
    gateways: Counted<String>,
    /// The same.
    delegates: Counted<String>,
    /// Host and subset.
    subsets: Counted<(String, String)>,
}

/// What several documents may say, each of which may take it back.
#[derive(Debug)]
struct Counted<T>(BTreeMap<T, usize>);

impl<T> Default for Counted<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: Ord> Counted<T> {
    fn add(&mut self, item: T) {
        *self.0.entry(item).or_default() += 1;
    }

    fn remove(&mut self, item: &T) {
        if let Some(n) = self.0.get_mut(item) {
            *n = n.saturating_sub(1);
            if *n == 0 {
                self.0.remove(item);
            }
        }
    }
}

/// One thing that a document makes known.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Fact {
    Host(String),
    Wildcard(String),
    Gateway(String),
    Delegate(String),
    Subset(String, String),
}

/// What the analysis says about a document.
#[derive(Debug, Default)]
pub(crate) struct Analysis {
    /// Withhold the document, unless it serves already.
    pub errors: Vec<(FieldPath, String)>,
    /// Tell its author.
    pub warnings: Vec<(FieldPath, String)>,
}

/// The fully qualified form of a host in a document of `namespace`.
pub(crate) fn qualify(host: &str, namespace: &str) -> String {
    if host.contains('.') || host.starts_with('*') {
        host.trim_end_matches('.').to_ascii_lowercase()
    } else {
        format!("{}.{namespace}.svc.{CLUSTER_DOMAIN}", host.to_ascii_lowercase())
    }
}

/// What a document makes known.
fn facts(d: &Document) -> Vec<Fact> {
    let m = &d.metadata;
    let full_name = || format!("{}/{}", m.namespace, m.name);
    match &d.spec {
        Spec::Service(_) => vec![Fact::Host(qualify(&m.name, &m.namespace))],
        Spec::ServiceEntry(s) => s
            .hosts
            .iter()
            .map(|h| {
                let h = qualify(h, &m.namespace);
                match h.strip_prefix('*') {
                    Some(suffix) => Fact::Wildcard(suffix.to_owned()),
                    None => Fact::Host(h),
                }
            })
            .collect(),
        Spec::Gateway(_) => vec![Fact::Gateway(full_name())],
        Spec::VirtualService(v) if v.hosts.is_empty() => vec![Fact::Delegate(full_name())],
        Spec::DestinationRule(r) => {
            let host = qualify(&r.host, &m.namespace);
            r.subsets.iter().map(|s| Fact::Subset(host.clone(), s.name.clone())).collect()
        }
        _ => vec![],
    }
}

impl Index {
    /// An index of hosts that others know (imports from peers).
    pub(crate) fn of_hosts<'a>(extra: impl Iterator<Item = &'a String>) -> Self {
        let mut index = Self::default();
        extra.for_each(|h| index.hosts.add(h.to_ascii_lowercase()));
        index
    }

    /// Adds what a document makes known.
    pub(crate) fn add(&mut self, d: &Document) {
        for f in facts(d) {
            match f {
                Fact::Host(h) => self.hosts.add(h),
                Fact::Wildcard(w) => self.wildcards.add(w),
                Fact::Gateway(g) => self.gateways.add(g),
                Fact::Delegate(d) => self.delegates.add(d),
                Fact::Subset(host, name) => self.subsets.add((host, name)),
            }
        }
    }

    fn remove(&mut self, d: &Document) {
        for f in facts(d) {
            match f {
                Fact::Host(h) => self.hosts.remove(&h),
                Fact::Wildcard(w) => self.wildcards.remove(&w),
                Fact::Gateway(g) => self.gateways.remove(&g),
                Fact::Delegate(d) => self.delegates.remove(&d),
                Fact::Subset(host, name) => self.subsets.remove(&(host, name)),
            }
        }
    }

    /// Replaces documents by others, and says whether those make other things known.
    pub(crate) fn replace<'a>(
        &mut self,
        before: impl Iterator<Item = &'a Document> + Clone,
        after: impl Iterator<Item = &'a Document> + Clone,
    ) -> bool {
        let sorted = |all: &mut Vec<Fact>| all.sort();
        let mut old: Vec<Fact> = before.clone().flat_map(facts).collect();
        let mut new: Vec<Fact> = after.clone().flat_map(facts).collect();
        sorted(&mut old);
        sorted(&mut new);
        if old == new {
            return false;
        }
        before.for_each(|d| self.remove(d));
        after.for_each(|d| self.add(d));
        true
    }

    fn knows(&self, host: &str) -> bool {
        self.hosts.0.contains_key(host)
            || self.wildcards.0.keys().any(|suffix| host.ends_with(suffix.as_str()))
    }

    /// Checks one document.
    pub(crate) fn check(&self, key: &Key, spec: &Spec) -> Analysis {
        let mut out = Analysis::default();
        let root = Path::root();
        let p = &root.key("spec");
        match spec {
            Spec::VirtualService(vs) => self.virtual_service(vs, &key.namespace, p, &mut out),
            Spec::DestinationRule(dr) => self.destination_rule(dr, &key.namespace, p, &mut out),
            Spec::ServiceExport(_) if !self.knows(&qualify(&key.name, &key.namespace)) => {
                out.warnings.push((
                    FieldPath::key("metadata"),
                    format!("there is no Service {}/{}: nothing is exported", key.namespace, key.name),
                ));
            }
            _ => {}
        }
        out
    }

    fn destination_rule(&self, dr: &DestinationRule, namespace: &str, p: &Path<'_>, out: &mut Analysis) {
        let host = qualify(&dr.host, namespace);
        if !host.starts_with('*') && !self.knows(&host) && !is_peer_name(&host) {
            out.warnings.push((
                p.key("host").to_field_path(),
                format!("host {:?} ({host}) is not a known service", dr.host),
            ));
        }
    }

    fn virtual_service(&self, vs: &VirtualService, namespace: &str, p: &Path<'_>, out: &mut Analysis) {
        for (i, g) in vs.gateways.iter().enumerate() {
            let full = if g == "mesh" {
                continue;
            } else if let Some((ns, name)) = g.split_once('/') {
                format!("{}/{name}", if ns == "." { namespace } else { ns })
            } else if let Some((name, rest)) = g.split_once('.') {
                // 1.0 form: name.namespace.svc.domain.
                format!("{}/{name}", rest.split('.').next().unwrap_or_default())
            } else {
                format!("{namespace}/{g}")
            };
            if !self.gateways.0.contains_key(&full) {
                let path = p.key("gateways").index(i).to_field_path();
                out.warnings.push((path, format!("there is no Gateway {full}")));
            }
        }
        let http = p.key("http");
        for (i, r) in vs.http.iter().enumerate() {
            let at = http.index(i);
            if let Some(d) = &r.delegate {
                let ns = if d.namespace.is_empty() { namespace } else { &d.namespace };
                let full = format!("{ns}/{}", d.name);
                if !self.delegates.0.contains_key(&full) {
                    let path = at.key("delegate").to_field_path();
                    out.warnings.push((path, format!("there is no VirtualService {full} without hosts")));
                }
            }
            let route = at.key("route");
            for (j, d) in r.route.iter().enumerate() {
                self.destination(d.destination.as_ref(), namespace, &route.index(j).key("destination"), out);
            }
            self.destination(r.mirror.as_ref(), namespace, &at.key("mirror"), out);
            for (j, m) in r.mirrors.iter().enumerate() {
                let mirrors = at.key("mirrors");
                self.destination(
                    m.destination.as_ref(),
                    namespace,
                    &mirrors.index(j).key("destination"),
                    out,
                );
            }
        }
        let tls = vs.tls.iter().map(|r| &r.route).enumerate().map(|r| ("tls", r));
        let tcp = vs.tcp.iter().map(|r| &r.route).enumerate().map(|r| ("tcp", r));
        for (list, (i, route)) in tls.chain(tcp) {
            let at = p.key(list);
            let at = at.index(i);
            let at = at.key("route");
            for (j, d) in route.iter().enumerate() {
                self.destination(d.destination.as_ref(), namespace, &at.index(j).key("destination"), out);
            }
        }
    }

    fn destination(&self, d: Option<&Destination>, namespace: &str, p: &Path<'_>, out: &mut Analysis) {
        let Some(d) = d else { return };
        let host = qualify(&d.host, namespace);
        if !self.knows(&host) {
            if is_peer_name(&host) {
                return;
            }
            let path = p.key("host").to_field_path();
            if host.ends_with(&format!(".svc.{CLUSTER_DOMAIN}")) {
                let hint = match self.elsewhere(&host) {
                    Some(other) => format!(", did you mean {other:?}?"),
                    None => String::new(),
                };
                out.errors.push((path, format!("unknown host {:?}: no service {host}{hint}", d.host)));
            } else {
                let message =
                    format!("host {:?} is not a known service; a ServiceEntry would make it one", d.host);
                out.warnings.push((path, message));
            }
            return;
        }
        let subset = (host, d.subset.clone());
        if !d.subset.is_empty() && !self.subsets.0.contains_key(&subset) {
            let (host, _) = subset;
            out.warnings.push((
                p.key("subset").to_field_path(),
                format!("no DestinationRule declares subset {:?} of {host}", d.subset),
            ));
        }
    }

    /// A known service of the same name in another namespace.
    fn elsewhere(&self, host: &str) -> Option<&str> {
        let name = host.split('.').next()?;
        self.hosts
            .0
            .keys()
            .find(|h| h.split('.').next() == Some(name) && h.ends_with(CLUSTER_DOMAIN))
            .map(String::as_str)
    }
}

pub(crate) fn is_peer_name(host: &str) -> bool {
    PEER_DOMAINS.iter().any(|d| host.ends_with(d))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::parse_file;

    fn analyse(text: &str, extra: &[&str]) -> Vec<(String, Vec<String>, Vec<String>)> {
        let parsed = parse_file("t", &std::sync::Arc::new(text.as_bytes().to_vec()), "books");
        let documents: Vec<_> = parsed.iter().filter_map(|p| p.document.as_ref()).collect();
        let extra: Vec<String> = extra.iter().map(|s| (*s).to_owned()).collect();
        let mut index = Index::of_hosts(extra.iter());
        documents.iter().for_each(|d| index.add(d));
        parsed
            .iter()
            .filter_map(|p| {
                let a = index.check(p.key.as_ref()?, &p.document.as_ref()?.spec);
                let show =
                    |v: Vec<(FieldPath, String)>| v.into_iter().map(|(p, m)| format!("{p}: {m}")).collect();
                Some((p.key.as_ref()?.name.clone(), show(a.errors), show(a.warnings)))
            })
            .collect()
    }

    fn vs(host: &str, subset: &str) -> String {
        format!(
            "---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: vs}}\nspec:\n  hosts: [x]\n  gateways: [mesh, edge/gw]\n  http: [{{route: [{{destination: {{host: {host}, subset: '{subset}'}}}}]}}]\n"
        )
    }

    #[test]
    fn references() {
        let svc =
            "---\napiVersion: v1\nkind: Service\nmetadata: {name: reviews}\nspec: {ports: [{port: 80}]}\n";
        let (_, errors, warnings) = analyse(&vs("reviews", ""), &[]).pop().unwrap();
        assert_eq!(
            errors,
            [
                "spec.http[0].route[0].destination.host: unknown host \"reviews\": no service reviews.books.svc.cluster.local"
            ]
        );
        assert_eq!(warnings, ["spec.gateways[1]: there is no Gateway edge/gw"]);
        let known = |text: &str, extra: &[&str]| analyse(text, extra).pop().unwrap().1.is_empty();
        assert!(known(&format!("{svc}{}", vs("reviews", "")), &[]));
        assert!(known(&vs("reviews", ""), &["reviews.books.svc.cluster.local"]), "known from a peer");
        assert!(known(&vs("reviews.books.svc.clusterset.local", ""), &[]), "may come from a peer");
        assert!(known(&vs("reviews.books.global", ""), &[]));
        let (_, errors, warnings) = analyse(&vs("api.example.com", ""), &[]).pop().unwrap();
        assert!(errors.is_empty() && warnings.iter().any(|w| w.contains("ServiceEntry")));
        let entry = "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: e}\nspec: {hosts: ['*.example.com'], ports: [{number: 80, name: http, protocol: HTTP}]}\n";
        let (_, _, warnings) = analyse(&format!("{entry}{}", vs("api.example.com", "")), &[]).pop().unwrap();
        assert_eq!(warnings.len(), 1);
        let (_, _, warnings) = analyse(&format!("{svc}{}", vs("reviews", "v9")), &[]).pop().unwrap();
        assert!(warnings.iter().any(|w| w.contains("subset \"v9\"")), "{warnings:?}");
        let elsewhere = svc.replace("name: reviews", "name: reviews, namespace: other");
        let (_, errors, _) = analyse(&format!("{elsewhere}{}", vs("reviews", "")), &[]).pop().unwrap();
        assert!(errors[0].contains("did you mean \"reviews.other.svc.cluster.local\""), "{errors:?}");
    }
}

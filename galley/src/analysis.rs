//! Rules between documents: references to hosts, subsets, gateways and services.
//!
//! A VirtualService that routes to a host which neither the configuration nor a peer cluster knows
//! is an **error** when the host is a short name or one of the cluster's own domain, since nothing
//! but a registry could ever provide it: the document is withheld until the host appears. A document
//! that already serves is not taken back when a host vanishes; it gets a warning instead, since
//! removing its other routes would do more harm. Everything else that dangles is a warning.

use std::collections::{BTreeMap, BTreeSet};

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
    hosts: BTreeSet<String>,
    wildcards: Vec<String>,
    gateways: BTreeSet<String>,
    delegates: BTreeSet<String>,
    subsets: BTreeMap<String, BTreeSet<String>>,
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

impl Index {
    /// Indexes the documents, and hosts that others know (imports from peers).
    pub(crate) fn new<'a>(documents: impl Iterator<Item = &'a Document>, extra: &BTreeSet<String>) -> Self {
        let mut index =
            Self { hosts: extra.iter().map(|h| h.to_ascii_lowercase()).collect(), ..Self::default() };
        for d in documents {
            let m = &d.metadata;
            match &d.spec {
                Spec::Service(_) => {
                    index.hosts.insert(qualify(&m.name, &m.namespace));
                }
                Spec::ServiceEntry(s) => {
                    for h in &s.hosts {
                        let h = qualify(h, &m.namespace);
                        match h.strip_prefix('*') {
                            Some(suffix) => index.wildcards.push(suffix.to_owned()),
                            None => {
                                index.hosts.insert(h);
                            }
                        }
                    }
                }
                Spec::Gateway(_) => {
                    index.gateways.insert(format!("{}/{}", m.namespace, m.name));
                }
                Spec::VirtualService(v) if v.hosts.is_empty() => {
                    index.delegates.insert(format!("{}/{}", m.namespace, m.name));
                }
                Spec::DestinationRule(r) => {
                    let subsets = index.subsets.entry(qualify(&r.host, &m.namespace)).or_default();
                    subsets.extend(r.subsets.iter().map(|s| s.name.clone()));
                }
                _ => {}
            }
        }
        index
    }

    fn knows(&self, host: &str) -> bool {
        self.hosts.contains(host) || self.wildcards.iter().any(|suffix| host.ends_with(suffix.as_str()))
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
            if !self.gateways.contains(&full) {
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
                if !self.delegates.contains(&full) {
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
        if !d.subset.is_empty() && !self.subsets.get(&host).is_some_and(|s| s.contains(&d.subset)) {
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
            .iter()
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
        let parsed = parse_file("t", text.as_bytes(), "books");
        let documents: Vec<_> = parsed.iter().filter_map(|p| p.document.as_ref()).collect();
        let extra = extra.iter().map(|s| (*s).to_owned()).collect();
        let index = Index::new(documents.iter().copied(), &extra);
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

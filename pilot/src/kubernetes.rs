//! Pods as workloads: what their own documents and those of their nodes say.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use mesh_model::{
    authored::{
        Kind, Pod, Spec, WorkloadEntry,
        kubernetes::{has_sidecar, topology},
    },
    registry::Labels,
};
use mesh_xds::mcp;

use crate::config::Doc;

/// Pods that are workloads carry this annotation, so that endpoints of slices are not added twice.
pub(crate) const IS_POD: &str = "flotilla.dev/pod";
/// Label by which a pod says itself where it is, divided by dots since labels have no slashes.
const LOCALITY: &str = "istio-locality";

/// Pods that were read, by name: of a thousand mostly one changes.
#[derive(Default)]
pub(crate) struct Pods {
    known: HashMap<String, (Arc<mcp::Document>, String, Option<Doc<WorkloadEntry>>)>,
}

impl Pods {
    /// The workloads of all pods that run. Pods that cannot be read are reported with the other documents.
    pub(crate) fn workloads(&mut self, galley: &mcp::ConfigState) -> Vec<Doc<WorkloadEntry>> {
        let nodes: HashMap<&str, String> =
            galley.of(Kind::Node.type_url()).map(|(name, d)| (name.as_str(), locality(&d.labels))).collect();
        let mut known = HashMap::with_capacity(self.known.len());
        for (name, doc) in galley.of(Kind::Pod.type_url()) {
            let node = doc.body.pointer("/spec/nodeName").and_then(|n| n.as_str()).unwrap_or_default();
            let place = nodes.get(node).map(String::as_str).unwrap_or_default();
            let made = match self.known.remove(name) {
                Some((d, l, made)) if Arc::ptr_eq(&d, doc) && l == place => made,
                _ => workload(doc, place),
            };
            known.insert(name.clone(), (doc.clone(), place.to_owned(), made));
        }
        self.known = known;
        self.known.values().filter_map(|(_, _, w)| w.clone()).collect()
    }
}

fn locality(labels: &BTreeMap<String, String>) -> String {
    let of = |key| labels.get(key).map(String::as_str).unwrap_or_default();
    let all = [of(topology::REGION), of(topology::ZONE), of(topology::SUBZONE)].join("/");
    all.trim_end_matches('/').to_owned()
}

/// `None` for a pod that does not run or has no address yet.
fn workload(doc: &mcp::Document, place: &str) -> Option<Doc<WorkloadEntry>> {
    let Ok(Spec::Pod(pod)) = Spec::from_json(Kind::Pod, doc.body.clone()) else { return None };
    let status = &pod.status;
    if matches!(status.phase.as_str(), "Succeeded" | "Failed") {
        return None;
    }
    let address =
        Some(&status.pod_ip).filter(|a| !a.is_empty()).or_else(|| status.pod_ips.first().map(|p| &p.ip))?;
    if address.is_empty() {
        return None;
    }
    let mut annotations: Labels = doc.annotations.clone();
    annotations.insert(IS_POD.to_owned(), "true".to_owned());
    let ready = status.conditions.iter().find(|c| c.condition == "Ready");
    if ready.is_some_and(|c| c.status != "True") {
        annotations.insert(crate::index::HEALTH.to_owned(), "unhealthy".to_owned());
    }
    let mut labels: Labels = doc.labels.clone();
    let mode = if has_sidecar(&pod, &doc.labels, &doc.annotations) { "istio" } else { "disabled" };
    labels.insert(crate::index::TLS_MODE.to_owned(), mode.to_owned());
    let own = labels.get(LOCALITY).map(|l| l.replace('.', "/"));
    let (namespace, name) = doc.namespaced_name();
    Some(Doc {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        created: doc.created,
        annotations: Arc::new(annotations),
        spec: Arc::new(WorkloadEntry {
            address: address.clone(),
            ports: named_ports(&pod),
            locality: own.unwrap_or_else(|| place.to_owned()),
            service_account: pod.spec.service_account_name.clone(),
            labels: labels.clone(),
            ..WorkloadEntry::default()
        }),
        labels: Arc::new(labels),
    })
}

fn named_ports(pod: &Pod) -> BTreeMap<String, u32> {
    let ports = pod.spec.containers.iter().flat_map(|c| &c.ports);
    ports.filter(|p| !p.name.is_empty()).map(|p| (p.name.clone(), p.container_port)).collect()
}

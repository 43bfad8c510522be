//! What documents leave open: a mesh on paper is written before it runs.
//!
//! - A workload has a proxy unless its document says otherwise (`security.istio.io/tlsMode`, `sidecar.istio.io/inject:
//!   "false"`, host network): pods are written without what the injector adds.
//! - An endpoint in a slice without a pod's document is a pod with the labels that its service selects by.
//! - What makes pods (a Deployment) has one of them, if none of them is written down.
//! - A service whose workloads nobody has written down has one for each subset of its DestinationRules, so that policies
//!   can be asked. These are never listed as endpoints.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use galley::PodTemplate;
use mesh_model::authored::{Kind, kubernetes::topology};
use pilot::simulate::{ConfigState, Document};
use serde_json::{Value, json};

const TLS_MODE: &str = "security.istio.io/tlsMode";
const INJECT: &str = "sidecar.istio.io/inject";
/// Names of workloads that nobody has written down begin with this, which no name of an object may.
pub(crate) const ASSUMED: &str = "(assumed)";

type Labels = BTreeMap<String, String>;

/// Adds what is assumed.
pub(crate) fn assume(state: &mut ConfigState, templates: &[PodTemplate]) {
    proxies(state);
    pods_of_slices(state);
    let mut numbers = 0;
    pods_of_templates(state, templates, &mut numbers);
    workloads_of_services(state, &mut numbers);
}

/// An address that is nobody's: 198.18.0.0/15 is for benchmarks (RFC 2544).
fn address(number: &mut u16) -> String {
    *number = number.saturating_add(1);
    let [high, low] = number.to_be_bytes();
    format!("198.18.{high}.{low}")
}

fn workload_labels(state: &ConfigState) -> Vec<(String, Labels)> {
    [Kind::WorkloadEntry, Kind::Pod]
        .into_iter()
        .flat_map(|k| of(state, k))
        .map(|d| (namespace(&d).to_owned(), labels(&d)))
        .collect()
}

fn pods_of_templates(state: &mut ConfigState, templates: &[PodTemplate], number: &mut u16) {
    let workloads = workload_labels(state);
    for t in templates {
        if t.labels.is_empty() || workloads.iter().any(|(ns, l)| *ns == t.namespace && selects(&t.labels, l))
        {
            continue;
        }
        let mut labels = t.labels.clone();
        let refused =
            [t.labels.get(INJECT), t.annotations.get(INJECT)].into_iter().flatten().any(|v| v == "false");
        let mode = if refused { "disabled" } else { "istio" };
        labels.entry(TLS_MODE.to_owned()).or_insert_with(|| mode.to_owned());
        let body = json!({
            "address": address(number), "labels": labels, "serviceAccount": t.service_account, "ports": t.ports
        });
        let name = format!("{}/{ASSUMED} {}", t.namespace, t.name);
        put(state, Kind::WorkloadEntry, Document { name, body, ..Document::default() });
    }
}

fn of(state: &ConfigState, kind: Kind) -> Vec<Arc<Document>> {
    state.of(kind.type_url()).map(|(_, d)| d.clone()).collect()
}

fn put(state: &mut ConfigState, kind: Kind, d: Document) {
    state.documents.entry(kind.type_url().to_owned()).or_default().insert(d.name.clone(), Arc::new(d));
}

fn strings(v: Option<&Value>) -> Labels {
    let all = v.and_then(Value::as_object);
    all.into_iter().flatten().filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))).collect()
}

fn labels(d: &Document) -> Labels {
    let mut all = d.labels.clone();
    all.extend(strings(d.body.get("labels")));
    all
}

fn selects(selector: &Labels, labels: &Labels) -> bool {
    selector.iter().all(|(k, v)| labels.get(k) == Some(v))
}

fn proxies(state: &mut ConfigState) {
    for kind in [Kind::WorkloadEntry, Kind::Pod] {
        for d in of(state, kind) {
            let known = labels(&d);
            let refused =
                [known.get(INJECT), d.annotations.get(INJECT)].into_iter().flatten().any(|v| v == "false");
            let host = d.body.pointer("/spec/hostNetwork").and_then(Value::as_bool).unwrap_or(false);
            if known.contains_key(TLS_MODE) || refused || host {
                continue;
            }
            let mut d = (*d).clone();
            d.labels.insert(TLS_MODE.to_owned(), "istio".to_owned());
            put(state, kind, d);
        }
    }
}

fn namespace(d: &Document) -> &str {
    d.namespaced_name().0
}

fn pods_of_slices(state: &mut ConfigState) {
    let addresses: BTreeSet<String> = of(state, Kind::Pod)
        .iter()
        .filter_map(|d| Some(d.body.pointer("/status/podIP")?.as_str()?.to_owned()))
        .collect();
    let services = of(state, Kind::Service);
    for slice in of(state, Kind::EndpointSlice) {
        let Some(service) = slice.labels.get(topology::SERVICE_NAME) else { continue };
        let named = |d: &&Arc<Document>| d.namespaced_name() == (namespace(&slice), service.as_str());
        let selector =
            services.iter().find(named).map(|d| strings(d.body.get("selector"))).unwrap_or_default();
        if selector.is_empty() {
            // Something outside of the cluster.
            continue;
        }
        let endpoints = slice.body.get("endpoints").and_then(Value::as_array).cloned().unwrap_or_default();
        for e in endpoints {
            let Some(ip) = e.pointer("/addresses/0").and_then(Value::as_str) else { continue };
            if addresses.contains(ip) {
                continue;
            }
            let name = e.pointer("/targetRef/name").and_then(Value::as_str).unwrap_or(ip);
            let node = e.get("nodeName").cloned().unwrap_or(Value::Null);
            let mut labels = selector.clone();
            labels.insert(TLS_MODE.to_owned(), "istio".to_owned());
            let body = json!({"spec": {"nodeName": node}, "status": {"podIP": ip}});
            let name = format!("{}/{name}", namespace(&slice));
            put(state, Kind::Pod, Document { name, labels, body, ..Document::default() });
        }
    }
}

fn workloads_of_services(state: &mut ConfigState, number: &mut u16) {
    let workloads = workload_labels(state);
    let sliced: BTreeSet<(String, String)> = of(state, Kind::EndpointSlice)
        .iter()
        .filter_map(|d| Some((namespace(d).to_owned(), d.labels.get(topology::SERVICE_NAME)?.clone())))
        .collect();
    let rules = of(state, Kind::DestinationRule);
    for s in of(state, Kind::Service) {
        let (ns, name) = s.namespaced_name();
        let selector = strings(s.body.get("selector"));
        let known = workloads.iter().any(|(n, l)| n == ns && selects(&selector, l));
        if selector.is_empty() || known || sliced.contains(&(ns.to_owned(), name.to_owned())) {
            continue;
        }
        let hosts = [name.to_owned(), format!("{name}.{ns}"), format!("{name}.{ns}.svc.cluster.local")];
        let mut kinds: BTreeSet<Labels> = rules
            .iter()
            .filter(|r| {
                let host = r.body.get("host").and_then(Value::as_str).unwrap_or_default();
                hosts.iter().any(|h| h == host) && (host.contains('.') || namespace(r) == ns)
            })
            .flat_map(|r| r.body.get("subsets").and_then(Value::as_array).cloned().unwrap_or_default())
            .map(|subset| strings(subset.get("labels")))
            .collect();
        if kinds.is_empty() {
            kinds.insert(Labels::new());
        }
        for extra in kinds {
            let mut labels = selector.clone();
            labels.extend(extra);
            labels.insert(TLS_MODE.to_owned(), "istio".to_owned());
            let body = json!({"address": address(number), "labels": labels});
            let name = format!("{ns}/{ASSUMED} Service {name} {number}");
            put(state, Kind::WorkloadEntry, Document { name, body, ..Document::default() });
        }
    }
}

//! All documents, in the order and by the names that checks need.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::OnceLock,
};

use mesh_model::authored::{DestinationRule, Document, MeshConfig, ServiceEntry, Spec, VirtualService};

use super::hosts::Hosts;
use crate::{
    document::{Parsed, Tree},
    node::{Node, Value},
    path::FieldPath,
};

/// Namespace whose policies are for the whole mesh, unless a MeshConfig says otherwise.
const ROOT_NAMESPACE: &str = "istio-system";

pub(super) type Labels = BTreeMap<String, String>;

/// A document.
#[derive(Debug)]
pub(super) struct Resource<'a> {
    pub(super) parsed: &'a Parsed,
    pub(super) kind: &'a str,
    pub(super) namespace: String,
    pub(super) name: &'a str,
    pub(super) labels: Labels,
    pub(super) annotations: Labels,
    /// Made when it is first asked for.
    tree: OnceLock<Option<Tree>>,
}

impl<'a> Resource<'a> {
    fn new(parsed: &'a Parsed) -> Self {
        let report = &parsed.report;
        let tree = OnceLock::new();
        let read = || tree.get_or_init(|| parsed.places.tree()).as_deref();
        let (labels, annotations, namespace) =
            match (&parsed.typed, parsed.typed.is_none().then(read).flatten()) {
                (Some(d), _) => {
                    (d.metadata.labels.clone(), d.metadata.annotations.clone(), d.metadata.namespace.clone())
                }
                (None, Some(tree)) => {
                    let of = |field| {
                        tree.get("metadata").and_then(|m| m.get(field)).map(strings).unwrap_or_default()
                    };
                    let namespace = match report.namespace.as_str() {
                        "" if parsed.ignored && !CLUSTER_KINDS.contains(&report.kind.as_str()) => {
                            crate::DEFAULT_NAMESPACE
                        }
                        ns => ns,
                    };
                    (of("labels"), of("annotations"), namespace.to_owned())
                }
                (None, None) => (Labels::new(), Labels::new(), report.namespace.clone()),
            };
        Self { parsed, kind: &report.kind, namespace, name: &report.name, labels, annotations, tree }
    }

    /// The typed specification.
    pub(super) fn spec(&self) -> Option<&'a Spec> {
        self.parsed.typed.as_deref().map(|d: &'a Document| &d.spec)
    }

    /// The document's tree.
    pub(super) fn tree(&self) -> Option<&Node> {
        self.tree.get_or_init(|| self.parsed.places.tree()).as_deref()
    }

    /// `namespace/name`.
    pub(super) fn full_name(&self) -> String {
        mesh_model::authored::resource_name(&self.namespace, self.name)
    }
}

/// Kinds of the platform that are in no namespace.
const CLUSTER_KINDS: [&str; 8] = [
    "ClusterRole",
    "ClusterRoleBinding",
    "CustomResourceDefinition",
    "MutatingWebhookConfiguration",
    "PersistentVolume",
    "PriorityClass",
    "StorageClass",
    "ValidatingWebhookConfiguration",
];

/// Something that runs, or will: a Pod, what a Deployment makes, a WorkloadEntry.
#[derive(Debug)]
pub(super) struct Workload<'a> {
    /// Index of its document.
    pub(super) resource: usize,
    pub(super) namespace: String,
    pub(super) name: &'a str,
    pub(super) labels: Labels,
    pub(super) annotations: Labels,
    pub(super) containers: Vec<Container>,
    /// Path of its specification in the document.
    pub(super) at: FieldPath,
    pub(super) user: Option<i64>,
    pub(super) host_network: bool,
}

/// A container.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) name: String,
    pub(super) image: String,
    pub(super) user: Option<i64>,
    pub(super) init: bool,
}

impl Workload<'_> {
    /// Whether it carries all of these.
    pub(super) fn carries(&self, labels: &Labels) -> bool {
        labels.iter().all(|(k, v)| self.labels.get(k) == Some(v))
    }

    /// Whether its containers have the proxy.
    pub(super) fn has_proxy(&self) -> bool {
        self.containers.iter().any(|c| c.name == "istio-proxy" && !c.image.is_empty())
    }
}

/// All documents.
#[derive(Debug)]
pub(super) struct World<'a> {
    pub(super) resources: Vec<Resource<'a>>,
    pub(super) workloads: Vec<Workload<'a>>,
    pub(super) hosts: Hosts<'a>,
    /// Whether the documents are those of a platform, so that every workload is among them.
    pub(super) all_workloads: bool,
    pub(super) root_namespace: String,
    /// The mesh's settings.
    pub(super) mesh: Option<&'a MeshConfig>,
    /// Namespace documents by name.
    pub(super) namespaces: BTreeMap<&'a str, usize>,
    /// Namespaces that some document is in.
    pub(super) inhabited: BTreeSet<String>,
}

impl<'a> World<'a> {
    pub(super) fn new(parsed: impl Iterator<Item = &'a Parsed>, known_hosts: &BTreeSet<String>) -> Self {
        let resources: Vec<Resource<'a>> = parsed.map(Resource::new).collect();
        let mut workloads = Vec::new();
        let mut all_workloads = false;
        let mut root_namespace = ROOT_NAMESPACE.to_owned();
        let mut mesh = None;
        let mut namespaces = BTreeMap::new();
        for (i, r) in resources.iter().enumerate() {
            match r.spec() {
                Some(Spec::WorkloadEntry(w)) => workloads.push(Workload {
                    resource: i,
                    namespace: r.namespace.clone(),
                    name: r.name,
                    labels: w.labels.clone(),
                    annotations: Labels::new(),
                    containers: vec![],
                    at: FieldPath::key("spec"),
                    user: None,
                    host_network: false,
                }),
                Some(Spec::MeshConfig(m)) => {
                    mesh = Some(&**m);
                    if let Some(ns) = &m.root_namespace {
                        root_namespace.clone_from(ns);
                    }
                }
                Some(Spec::Namespace(_)) => {
                    namespaces.entry(r.name).or_insert(i);
                }
                _ => {}
            }
            if let Some(w) = pod(i, r) {
                all_workloads = true;
                workloads.push(w);
            }
        }
        let hosts =
            Hosts::new(&resources, known_hosts, exported(&[], mesh, |m| &m.default_service_export_to));
        let inhabited =
            resources.iter().filter(|r| !r.namespace.is_empty()).map(|r| r.namespace.clone()).collect();
        Self { resources, workloads, hosts, all_workloads, root_namespace, mesh, namespaces, inhabited }
    }

    /// `exportTo` of a VirtualService, or the mesh's.
    pub(super) fn shown<'s>(&'s self, vs: &'s VirtualService) -> &'s [String] {
        exported(&vs.export_to, self.mesh, |m| &m.default_virtual_service_export_to)
    }

    /// `exportTo` of a DestinationRule, or the mesh's.
    pub(super) fn applied<'s>(&'s self, dr: &'s DestinationRule) -> &'s [String] {
        exported(&dr.export_to, self.mesh, |m| &m.default_destination_rule_export_to)
    }

    /// `exportTo` of a ServiceEntry, or the mesh's.
    pub(super) fn offered<'s>(&'s self, se: &'s ServiceEntry) -> &'s [String] {
        exported(&se.export_to, self.mesh, |m| &m.default_service_export_to)
    }

    /// Documents whose specification is of one type.
    pub(super) fn each<T: 'a>(
        &self,
        pick: impl Fn(&'a Spec) -> Option<&'a T>,
    ) -> impl Iterator<Item = (&Resource<'a>, &'a T)> {
        self.resources.iter().filter_map(move |r| Some((r, pick(r.spec()?)?)))
    }

    /// Whether a workload gets a sidecar by what it and its namespace say; `None` if nobody says anything.
    pub(super) fn injected(&self, w: &Workload<'_>) -> Option<bool> {
        const INJECT: &str = "sidecar.istio.io/inject";
        if let Some(v) = w.labels.get(INJECT).or_else(|| w.annotations.get(INJECT)) {
            return Some(v == "true");
        }
        let ns = self.resources.get(*self.namespaces.get(w.namespace.as_str())?)?;
        Some(ns.labels.get("istio-injection").is_some_and(|v| v == "enabled"))
    }
}

/// The pod that a platform's document is or makes.
fn pod<'a>(resource: usize, r: &Resource<'a>) -> Option<Workload<'a>> {
    if !r.parsed.ignored && !matches!(r.spec(), Some(Spec::Pod(_))) {
        return None;
    }
    let at = match r.kind {
        "Pod" => "",
        "Deployment" | "ReplicaSet" | "StatefulSet" | "DaemonSet" | "ReplicationController" | "Job" => {
            "spec.template"
        }
        "CronJob" => "spec.jobTemplate.spec.template",
        _ => return None,
    };
    let root = r.tree()?;
    let template = at.split('.').filter(|s| !s.is_empty()).try_fold(root, |n, field| n.get(field))?;
    let of = |field| template.get("metadata").and_then(|m| m.get(field)).map(strings).unwrap_or_default();
    let spec = template.get("spec");
    let user = |n: &Node| match n.get("securityContext")?.get("runAsUser")?.value {
        Value::Int(n) => Some(n),
        _ => None,
    };
    let list = |field: &str, init: bool| -> Vec<Container> {
        let Some(Value::Seq(items)) = spec.and_then(|s| s.get(field)).map(|n| &n.value) else {
            return vec![];
        };
        let text = |n: &Node, f: &str| n.get(f).and_then(Node::as_str).unwrap_or_default().to_owned();
        items
            .iter()
            .map(|n| Container { name: text(n, "name"), image: text(n, "image"), user: user(n), init })
            .collect()
    };
    let mut containers = list("containers", false);
    containers.extend(list("initContainers", true));
    Some(Workload {
        resource,
        namespace: r.namespace.clone(),
        name: r.name,
        labels: of("labels"),
        annotations: of("annotations"),
        containers,
        at: FieldPath::of(at).and("spec"),
        user: spec.and_then(user),
        host_network: matches!(
            spec.and_then(|s| s.get("hostNetwork")).map(|n| &n.value),
            Some(Value::Bool(true))
        ),
    })
}

/// A mapping from text to text; other members are left out.
pub(crate) fn strings(n: &Node) -> Labels {
    let Value::Map(members) = &n.value else { return Labels::new() };
    members.iter().filter_map(|m| Some((m.key.clone(), m.value.as_str()?.to_owned()))).collect()
}

/// Labels as they are written in a selector.
pub(super) fn shown(labels: &Labels) -> String {
    labels.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(",")
}

/// `exportTo` of a document, or what the mesh's settings have for those that say nothing.
fn exported<'s>(
    own: &'s [String],
    mesh: Option<&'s MeshConfig>,
    default: fn(&MeshConfig) -> &Vec<String>,
) -> &'s [String] {
    match mesh {
        Some(m) if own.is_empty() => default(m),
        _ => own,
    }
}

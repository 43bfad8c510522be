//! What makes pods: no configuration of the mesh, and yet it says which workloads there will be.

use std::collections::BTreeMap;

use crate::{
    analyze::strings,
    document::Parsed,
    node::{Node, Value},
};

/// The pods that a Deployment or the like makes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodTemplate {
    /// Namespace.
    pub namespace: String,
    /// Name of what makes them.
    pub name: String,
    /// Their labels.
    pub labels: BTreeMap<String, String>,
    /// Their annotations.
    pub annotations: BTreeMap<String, String>,
    /// Account that they run as; empty is `default`.
    pub service_account: String,
    /// Named ports of their containers.
    pub ports: BTreeMap<String, u32>,
}

impl PodTemplate {
    /// Of a document that is none of the mesh's.
    pub(crate) fn read(p: &Parsed) -> Option<Self> {
        let at: &[&str] = match p.report.kind.as_str() {
            "Deployment" | "ReplicaSet" | "StatefulSet" | "DaemonSet" | "ReplicationController" | "Job" => {
                &["spec", "template"]
            }
            "CronJob" => &["spec", "jobTemplate", "spec", "template"],
            _ => return None,
        };
        let tree = p.places.tree()?;
        let template = at.iter().try_fold(&*tree, |n, field| n.get(field))?;
        let of = |field| template.get("metadata").and_then(|m| m.get(field)).map(strings).unwrap_or_default();
        let spec = template.get("spec")?;
        let list = |n: Option<&Node>| match n.map(|n| &n.value) {
            Some(Value::Seq(items)) => items.clone(),
            _ => vec![],
        };
        let ports = list(spec.get("containers")).into_iter().flat_map(|c| list(c.get("ports")));
        let port = |n: Node| match n.get("containerPort")?.value {
            Value::Int(number) => Some((n.get("name")?.as_str()?.to_owned(), u32::try_from(number).ok()?)),
            _ => None,
        };
        let namespace = match p.report.namespace.as_str() {
            "" => crate::DEFAULT_NAMESPACE,
            ns => ns,
        };
        Some(Self {
            namespace: namespace.to_owned(),
            name: p.report.name.clone(),
            labels: of("labels"),
            annotations: of("annotations"),
            service_account: spec
                .get("serviceAccountName")
                .and_then(Node::as_str)
                .unwrap_or_default()
                .to_owned(),
            ports: ports.filter_map(port).collect(),
        })
    }
}

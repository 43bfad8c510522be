//! Name, namespace, labels and annotations of a document.

use mesh_model::authored::Metadata;

use crate::{de::NodeDe, node::Node, path::FieldPath, report::DocumentReport, validate};

/// Kubernetes' `ObjectMeta`, so that a misspelt field is found.
#[derive(Default, serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct ObjectMeta {
    name: String,
    namespace: String,
    labels: std::collections::BTreeMap<String, String>,
    annotations: std::collections::BTreeMap<String, String>,
    creation_timestamp: Option<String>,
    #[serde(rename = "generateName")]
    _generate_name: serde::de::IgnoredAny,
    #[serde(rename = "uid")]
    _uid: serde::de::IgnoredAny,
    #[serde(rename = "resourceVersion")]
    _resource_version: serde::de::IgnoredAny,
    #[serde(rename = "generation")]
    _generation: serde::de::IgnoredAny,
    #[serde(rename = "selfLink")]
    _self_link: serde::de::IgnoredAny,
    #[serde(rename = "finalizers")]
    _finalizers: serde::de::IgnoredAny,
    #[serde(rename = "ownerReferences")]
    _owner_references: serde::de::IgnoredAny,
    #[serde(rename = "managedFields")]
    _managed_fields: serde::de::IgnoredAny,
    #[serde(rename = "deletionTimestamp")]
    _deletion_timestamp: serde::de::IgnoredAny,
    #[serde(rename = "deletionGracePeriodSeconds")]
    _deletion_grace_period_seconds: serde::de::IgnoredAny,
    #[serde(rename = "clusterName")]
    _cluster_name: serde::de::IgnoredAny,
}

pub(super) fn read(
    node: &Node,
    report: &mut DocumentReport,
    errors: &mut Vec<(FieldPath, String)>,
) -> Option<Metadata> {
    let base = FieldPath::key("metadata");
    let Some(meta) = node.get("metadata") else {
        errors.push((base, "metadata with a name is required".into()));
        return None;
    };
    // The name first, so that a report about a bad label still says whose.
    for (field, slot) in [("name", &mut report.name), ("namespace", &mut report.namespace)] {
        if let Some(s) = meta.get(field).and_then(Node::as_str) {
            s.clone_into(slot);
        }
    }
    let m: ObjectMeta = match serde::Deserialize::deserialize(NodeDe::new(meta)) {
        Ok(m) => m,
        Err(e) => {
            let (path, _, message) = e.into_parts();
            errors.push((path.under(&base), message));
            return None;
        }
    };
    let name = FieldPath::key("name").under(&base);
    if m.name.is_empty() {
        errors.push((name, "a name is required".into()));
    } else if !validate::is_object_name(&m.name) {
        errors.push((
            name,
            format!(
                "{:?} is not a name: up to 253 of a-z, 0-9, '-' and '.', alphanumeric at both ends",
                m.name
            ),
        ));
    }
    if !m.namespace.is_empty() && !validate::is_dns1123_label(&m.namespace) {
        errors.push((
            FieldPath::key("namespace").under(&base),
            format!(
                "{:?} is not a namespace: up to 63 of a-z, 0-9 and '-', alphanumeric at both ends",
                m.namespace
            ),
        ));
    }
    let creation_timestamp = match m.creation_timestamp.as_deref().map(parse_rfc3339) {
        None => 0,
        Some(Some(t)) => t,
        Some(None) => {
            errors.push((
                FieldPath::key("creationTimestamp").under(&base),
                "not a time such as 2026-11-23T04:45:00Z".into(),
            ));
            0
        }
    };
    Some(Metadata {
        name: m.name,
        namespace: m.namespace,
        labels: m.labels,
        annotations: m.annotations,
        creation_timestamp,
    })
}

/// Seconds since the epoch of an RFC 3339 time in UTC, as Kubernetes writes it.
pub(super) fn parse_rfc3339(s: &str) -> Option<u64> {
    let s = s.strip_suffix('Z')?;
    let (date, time) = s.split_once('T')?;
    let mut d = date.splitn(3, '-').map(|p| p.parse::<i64>().ok());
    let (y, m, day) = (d.next()??, d.next()??, d.next()??);
    let mut t = time.splitn(3, ':');
    let (h, min) = (t.next()?.parse::<i64>().ok()?, t.next()?.parse::<i64>().ok()?);
    let sec = t.next()?.split('.').next()?.parse::<i64>().ok()?;
    if !((1970..=9999).contains(&y) && (1..=12).contains(&m) && (1..=31).contains(&day)) {
        return None;
    }
    if !((0..24).contains(&h) && (0..60).contains(&min) && (0..=60).contains(&sec)) {
        return None;
    }
    // Days from civil (Howard Hinnant's algorithm), years that start in March.
    let (y, m) = if m > 2 { (y, m - 3) } else { (y - 1, m + 9) };
    let era = y / 400;
    let year_of_era = y - era * 400;
    let day_of_year = (153 * m + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let days = era * 146_097 + day_of_era - 719_468;
    u64::try_from(days * 86_400 + h * 3_600 + min * 60 + sec).ok()
}

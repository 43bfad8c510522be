//! Istio's own settings of the mesh: text under the key `mesh` of the ConfigMap `istio`.
//!
//! The text becomes a part of the document's tree, so that findings have lines of the file.

use crate::{
    node::{Member, Node, Value},
    path::{FieldPath, Segment},
};

/// Name of the ConfigMap.
const NAME: &str = "istio";
/// Key of the settings in it.
const MESH: &str = "mesh";
/// Key of the networks beside them.
const NETWORKS: &str = "meshNetworks";
/// Name of the document that the settings are.
pub(super) const NAME_OF_SETTINGS: &str = "mesh";

fn is_it(node: &Node) -> bool {
    let text = |n: &Node, key: &str| n.get(key).and_then(Node::as_str).map(str::to_owned);
    text(node, "apiVersion").as_deref() == Some("v1")
        && text(node, "kind").as_deref() == Some("ConfigMap")
        && node.get("metadata").and_then(|m| text(m, "name")).as_deref() == Some(NAME)
}

/// The settings, if this is the ConfigMap of them.
pub(super) fn settings(node: &Node) -> Option<&Node> {
    if is_it(node) { node.get("data")?.get(MESH) } else { None }
}

/// Where something of a specification is in a ConfigMap.
pub(super) fn path(mut path: FieldPath) -> FieldPath {
    if path.0.first() == Some(&Segment::Key("spec".to_owned())) {
        path.0.splice(..1, [Segment::Key("data".to_owned()), Segment::Key(MESH.to_owned())]);
    }
    path
}

/// Makes trees of texts in a document, or in the items of a list. Those that cannot be read stay text.
pub(super) fn expand(node: &mut Node, text: &str) {
    if node.get("kind").and_then(Node::as_str) == Some("List") {
        if let Some(Value::Seq(items)) = member(node, "items").map(|m| &mut m.value.value) {
            items.iter_mut().for_each(|n| expand_one(n, text));
        }
        return;
    }
    expand_one(node, text);
}

fn expand_one(node: &mut Node, text: &str) {
    if !is_it(node) {
        return;
    }
    let Some(m) = member(node, "data").and_then(|d| member(&mut d.value, MESH)) else { return };
    let (key, mesh) = (m.key_place.line, &mut m.value);
    let Some(mut tree) = mesh.as_str().and_then(|s| Node::parse(s).ok()) else { return };
    // Text that begins below its key is a block, whose lines are those of the file, unless it is in quotation marks; other
    // text is one line.
    let begin = mesh.place.line;
    let line = super::lines(text).nth(begin.saturating_sub(1) as usize).unwrap_or_default();
    let block = begin > key && !line.trim_start().starts_with(['"', '\'']);
    shift(&mut tree, &|line| if block { begin.saturating_add(line).saturating_sub(1) } else { begin });
    mesh.value = if tree.is_null() { Value::Map(vec![]) } else { tree.value };
}

fn shift(node: &mut Node, line: &impl Fn(u32) -> u32) {
    node.place.line = line(node.place.line);
    match &mut node.value {
        Value::Seq(items) => items.iter_mut().for_each(|n| shift(n, line)),
        Value::Map(members) => {
            for m in members {
                m.key_place.line = line(m.key_place.line);
                shift(&mut m.value, line);
            }
        }
        _ => {}
    }
}

fn member<'n>(node: &'n mut Node, key: &str) -> Option<&'n mut Member> {
    let Value::Map(members) = &mut node.value else { return None };
    members.iter_mut().find(|m| m.key == key)
}

/// Why the settings are none.
pub(super) fn not_a_mapping(settings: &Node) -> Option<String> {
    match &settings.value {
        Value::Map(_) => None,
        Value::String(s) => Some(match Node::parse(s) {
            Err(e) => format!("line {} of the text is not YAML: {}", e.place.line, e.message),
            Ok(n) => format!("expected settings of the mesh, found {}", n.describe()),
        }),
        _ => Some(format!("expected settings of the mesh, found {}", settings.describe())),
    }
}

/// Warnings about what is in the ConfigMap beside the settings.
pub(super) fn beside(node: &Node) -> Option<(FieldPath, String)> {
    settings(node)?;
    let networks = node.get("data")?.get(NETWORKS)?;
    let any = match networks.as_str().map(Node::parse) {
        Some(Ok(n)) => n.get("networks").is_some_and(|n| n.value != Value::Map(vec![])),
        _ => true,
    };
    let message = "without effect: members of the mesh announce their gateways, and nobody declares networks";
    any.then(|| (FieldPath::key("data").and(NETWORKS), message.to_owned()))
}

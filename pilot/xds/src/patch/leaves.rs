//! Whether a reader looks at what a patch says: each of its values is changed in turn, and a reader that sees no
//! difference does not look at it. So nothing need be said twice about what our own proxies honour.

use super::tree::{Content, Node, Tree, is_value, put_varint, varint};

/// Fields that name things and decide nothing; a reader may leave them alone.
const NAMES: &[&str] = &["stat_prefix", "name", "alt_stat_name", "runtime_key", "operation", "key_prefix"];

/// What a value is changed to.
pub(super) struct Variant {
    /// Path of the value, such as `circuit_breakers.thresholds[0].max_requests`.
    pub(super) path: String,
    pub(super) tree: Tree,
}

/// The patch with each of its values changed in turn.
pub(super) fn variants(tree: &Tree) -> Vec<Variant> {
    let mut out = Vec::new();
    message(tree, "", &mut |path, tree| out.push(Variant { path, tree }));
    out
}

fn message(tree: &Tree, path: &str, out: &mut dyn FnMut(String, Tree)) {
    for (i, f) in tree.fields.iter().enumerate() {
        let at = if path.is_empty() { f.name.to_owned() } else { format!("{path}.{}", f.name) };
        let with = |content: Option<Content>| {
            let mut t = tree.clone();
            match content {
                Some(c) => t.fields[i].content = c,
                None => drop(t.fields.remove(i)),
            }
            t
        };
        match &f.content {
            Content::One(Node::Scalar(..)) if NAMES.contains(&f.name) => {}
            // As good as unset.
            Content::One(Node::Scalar(_, v)) if !f.present && v.iter().all(|b| *b == 0) => {}
            Content::One(n) => node(n, &at, &mut |p, n| out(p, with(n.map(Content::One)))),
            Content::List(all) => {
                for (k, n) in all.iter().enumerate() {
                    node(n, &format!("{at}[{k}]"), &mut |p, n| {
                        let mut list = all.clone();
                        match n {
                            Some(n) => list[k] = n,
                            None => drop(list.remove(k)),
                        }
                        out(p, with(Some(Content::List(list))));
                    });
                }
            }
            Content::Map(entries) => {
                for (k, e) in entries.iter().enumerate() {
                    let key = e.text("key").unwrap_or_default();
                    let Some(value) = e.fields.iter().position(|f| f.name == "value") else { continue };
                    let Content::One(n) = &e.fields[value].content else { continue };
                    node(n, &format!("{at}[{key}]"), &mut |p, n| {
                        let mut all = entries.clone();
                        match n {
                            Some(n) => all[k].fields[value].content = Content::One(n),
                            None => drop(all.remove(k)),
                        }
                        out(p, with(Some(Content::Map(all))));
                    });
                }
            }
        }
    }
}

/// `None` takes the value away.
fn node(n: &Node, path: &str, out: &mut dyn FnMut(String, Option<Node>)) {
    match n {
        Node::Scalar(wire, v) => out(path.to_owned(), Some(Node::Scalar(*wire, other(*wire, v)))),
        Node::Message(m) | Node::Any(_, Some(m)) if m.fields.is_empty() && !is_value(m.message) => {
            out(path.to_owned(), None);
        }
        Node::Message(m) if is_value(m.message) => {
            // One value, whatever it is made of.
            out(path.to_owned(), Some(Node::Message(other_value(m))));
        }
        Node::Message(m) => message(m, path, &mut |p, t| out(p, Some(Node::Message(t)))),
        Node::Any(url, Some(m)) => {
            message(m, path, &mut |p, t| out(p, Some(Node::Any(url.clone(), Some(t)))))
        }
        Node::Any(..) => out(path.to_owned(), None),
    }
}

fn other_value(m: &Tree) -> Tree {
    match m.fields.first() {
        Some(f) => {
            let mut t = m.clone();
            if let Content::One(Node::Scalar(wire, v)) = &f.content {
                t.fields[0].content = Content::One(Node::Scalar(*wire, other(*wire, v)));
            }
            t
        }
        None => Tree::one(m.message),
    }
}

/// A value that is not this one, and as likely to be allowed.
fn other(wire: u32, v: &[u8]) -> Vec<u8> {
    match wire {
        0 => {
            // Downwards, since what is above may be cut to what is allowed.
            let mut out = Vec::new();
            let v = varint(&mut &*v).unwrap_or(0);
            put_varint(&mut out, v.checked_sub(1).unwrap_or(1));
            out
        }
        1 => match <[u8; 8]>::try_from(v) {
            Ok(b) => half(f64::from_le_bytes(b)).to_le_bytes().to_vec(),
            Err(_) => v.to_vec(),
        },
        5 => match <[u8; 4]>::try_from(v) {
            // Halves are exact in either type.
            Ok(b) => (half(f64::from(f32::from_le_bytes(b))) as f32).to_le_bytes().to_vec(),
            Err(_) => v.to_vec(),
        },
        _ => [v, b"x"].concat(),
    }
}

/// Percentages are cut at 100 and shares at 1.
fn half(v: f64) -> f64 {
    if v >= 1.0 { v / 2.0 } else { v + 0.5 }
}

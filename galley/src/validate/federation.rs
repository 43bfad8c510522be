//! Rules of membership, and of what is told to and believed of peers.

use mesh_model::{
    ClusterId,
    authored::{
        ClusterEviction, ExportPolicy, ImportPolicy, MembershipState, MeshMembership, Metadata, PeerAction,
    },
    federation::{EXPORT_TO, ON_LAPSE, OnLapse},
};

use super::common::{self, Findings};
use crate::path::Path;

/// A list that would be read as "all" although something was meant, or names what cannot exist.
fn names(peers: &[String], namespaces: &[String], p: &Path<'_>, out: &mut Findings) {
    let list = p.key("peers");
    for (i, c) in peers.iter().enumerate() {
        if let Err(e) = ClusterId::new(c) {
            out.error(&list.index(i), format!("{e}; leave peers out for all clusters"));
        }
    }
    let list = p.key("namespaces");
    for (i, n) in namespaces.iter().enumerate() {
        if !common::is_dns1123_label(n) {
            out.error(&list.index(i), format!("{n:?} is not a namespace; leave namespaces out for all"));
        }
    }
}

/// Every rule after one that matches everything is never read.
fn unreachable<'a>(
    rules: impl ExactSizeIterator<Item = (&'a [String], &'a [String])>,
    p: &Path<'_>,
    out: &mut Findings,
) {
    let (n, list) = (rules.len(), p.key("rules"));
    for (i, (peers, namespaces)) in rules.enumerate() {
        if peers.is_empty() && namespaces.is_empty() && i + 1 < n {
            out.warning(&list.index(i), "matches everything: the rules after it are never read");
            return;
        }
    }
}

pub(super) fn check_exports(s: &ExportPolicy, p: &Path<'_>, out: &mut Findings) {
    let list = p.key("rules");
    for (i, r) in s.rules.iter().enumerate() {
        names(&r.peers, &r.namespaces, &list.index(i), out);
    }
    unreachable(s.rules.iter().map(|r| (&*r.peers, &*r.namespaces)), p, out);
}

pub(super) fn check_imports(s: &ImportPolicy, p: &Path<'_>, out: &mut Findings) {
    let list = p.key("rules");
    for (i, r) in s.rules.iter().enumerate() {
        let p = list.index(i);
        names(&r.peers, &r.namespaces, &p, out);
        if r.action == PeerAction::Deny && r.on_lapse.is_some() {
            out.error(
                &p.key("onLapse"),
                "nothing is imported by a rule with action DENY; remove one of them",
            );
        }
    }
    unreachable(s.rules.iter().map(|r| (&*r.peers, &*r.namespaces)), p, out);
}

/// Longest path and longest reason, bytes.
const MAX_PATH: usize = 4096;
const MAX_REASON: usize = 256;

pub(super) fn check_membership(s: &MeshMembership, meta: &Metadata, p: &Path<'_>, out: &mut Findings) {
    let root = Path::root();
    if meta.name != "mesh" {
        out.error(&root.key("metadata").key("name"), "the only MeshMembership is named \"mesh\"");
    }
    let file = &s.token_file;
    let wrong = if file.starts_with("flt1.") {
        // Not quoted: it may be a secret.
        Some(
            "this is a join token; write it to a file (mode 0600) outside of the configuration and name that here",
        )
    } else if !file.is_empty() && (!file.starts_with('/') || file.len() > MAX_PATH) {
        Some("must be an absolute path on the control plane's machine, such as /etc/flotilla/join-token")
    } else {
        None
    };
    if let Some(wrong) = wrong {
        out.error(&p.key("tokenFile"), wrong);
    }
    if s.force && s.state != MembershipState::Left {
        out.error(
            &p.key("force"),
            "only a cluster that leaves can be forced; set state: left or remove force",
        );
    }
}

pub(super) fn check_eviction(s: &ClusterEviction, meta: &Metadata, p: &Path<'_>, out: &mut Findings) {
    if let Err(e) = ClusterId::new(&meta.name) {
        let path = Path::root();
        out.error(&path.key("metadata").key("name"), format!("{e}; name the document after the cluster"));
    }
    if s.reason.len() > MAX_REASON {
        out.error(&p.key("reason"), format!("{} bytes (at most {MAX_REASON})", s.reason.len()));
    }
}

fn annotation(meta: &Metadata, name: &str, out: &mut Findings, check: impl Fn(&str) -> Result<(), String>) {
    if let Some(value) = meta.annotations.get(name)
        && let Err(e) = check(value)
    {
        out.error(&Path::root().key("metadata").key("annotations").key(name), e);
    }
}

pub(super) fn check_export_to(meta: &Metadata, out: &mut Findings) {
    annotation(meta, EXPORT_TO, out, |value| {
        for c in value.split(',').map(str::trim).filter(|c| *c != "*") {
            ClusterId::new(c)
                .map_err(|e| format!("{e}; write clusters separated by commas, or * for all"))?;
        }
        Ok(())
    });
}

pub(super) fn check_on_lapse(meta: &Metadata, out: &mut Findings) {
    annotation(meta, ON_LAPSE, out, |value| {
        OnLapse::parse(value).map(|_| ()).ok_or_else(|| format!("{value:?} is not keep, demote or refuse"))
    });
}

//! Roots of other trust domains, which the proxy cannot ask for itself: they belong into the secret that its sessions
//! are verified with. Kept in a file, so that an agent that starts without a control plane takes none away.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use mesh_model::federation::ForeignBundle;
use mesh_runtime::files::write_private;
use mesh_xds::{
    AdsClient, ClientOptions, Endpoint, NodeInfo, bundles,
    client::{Handler, Mode, Names, Rejection, Update},
    type_url::BUNDLES,
};
use tokio::sync::watch;

/// With the version of each, by domain.
type Kept = BTreeMap<String, (String, ForeignBundle)>;

struct Follow {
    all: Kept,
    file: Option<PathBuf>,
    out: watch::Sender<Vec<ForeignBundle>>,
}

fn list(all: &Kept) -> Vec<ForeignBundle> {
    all.values().map(|(_, b)| b.clone()).collect()
}

/// Follows the control plane as `node`. The client ends with the handle.
pub(super) fn follow(
    endpoint: Endpoint,
    node: NodeInfo,
    state_dir: Option<&Path>,
) -> (AdsClient, watch::Receiver<Vec<ForeignBundle>>) {
    let file = state_dir.map(|d| d.join("bundles.json"));
    let all: Kept = match file.as_ref().map(std::fs::read) {
        Some(Ok(text)) => serde_json::from_slice(&text).unwrap_or_else(|error| {
            tracing::warn!(%error, "kept trust bundles are not usable; waiting for the control plane");
            Kept::default()
        }),
        _ => Kept::default(),
    };
    let versions = all.iter().map(|(n, (v, _))| (n.clone(), v.clone())).collect();
    let (out, bundles) = watch::channel(list(&all));
    let client = AdsClient::start_from(
        ClientOptions { endpoint, node, mode: Mode::Delta },
        &[(BUNDLES, Names::All)],
        BTreeMap::from([(BUNDLES.to_owned(), versions)]),
        |_| Follow { all, file, out },
    );
    (client, bundles)
}

impl Handler for Follow {
    fn on_update(&mut self, _: &str, update: Update) -> Result<(), Vec<Rejection>> {
        let mut bad = Vec::new();
        for r in update.changed {
            let decoded =
                r.resource.as_ref().ok_or_else(|| "no resource".to_owned()).and_then(bundles::decode);
            match decoded {
                Ok(b) => drop(self.all.insert(r.name, (r.version, b))),
                Err(reason) => bad.push(Rejection { name: r.name, reason }),
            }
        }
        for n in update.removed {
            self.all.remove(&n);
        }
        if let Some(file) = &self.file {
            // Plain data always serialises.
            let text = serde_json::to_vec(&self.all).unwrap_or_default();
            if let Err(error) = write_private(file, &text) {
                tracing::warn!(%error, "trust bundles are not kept; a restart will need the control plane");
            }
        }
        self.out.send_replace(list(&self.all));
        if bad.is_empty() { Ok(()) } else { Err(bad) }
    }
}

#[cfg(test)]
mod tests {
    use mesh_model::{ClusterId, TrustDomain};

    use super::*;

    #[test]
    fn bundles_come_go_and_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("bundles.json");
        let (out, seen) = watch::channel(vec![]);
        let mut follow = Follow { all: Kept::default(), file: Some(file.clone()), out };
        let bundle = ForeignBundle {
            trust_domain: TrustDomain::new("b.example").unwrap(),
            roots: "PEM".into(),
            clusters: vec![ClusterId::new("north").unwrap()],
            by_bundle: false,
            own: None,
            revoked: vec![],
        };
        let resource = mesh_xds::pb::Resource {
            name: "b.example".into(),
            version: "7".into(),
            resource: Some(bundles::encode(&bundle)),
            ..Default::default()
        };
        let bad = mesh_xds::pb::Resource { name: "c.example".into(), ..Default::default() };
        let update = Update { changed: vec![resource, bad], removed: vec![] };
        assert_eq!(follow.on_update(BUNDLES, update).unwrap_err()[0].name, "c.example");
        assert_eq!(seen.borrow().as_slice(), std::slice::from_ref(&bundle));
        let kept: Kept = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        assert_eq!(kept["b.example"], ("7".to_owned(), bundle));
        follow.on_update(BUNDLES, Update { changed: vec![], removed: vec!["b.example".into()] }).unwrap();
        assert!(seen.borrow().is_empty());
    }
}

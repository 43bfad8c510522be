//! Server credentials of a gateway from a directory, as mounted secrets are laid out.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_identity::SecretStore;
use tokio::task::JoinHandle;

/// Mounted secrets change by swapping symlinks, which file notification reports unreliably; looking
/// at a few modification times costs nothing.
const INTERVAL: Duration = Duration::from_secs(1);

/// Ends the task when dropped.
pub(crate) struct Follow(JoinHandle<()>);

impl Drop for Follow {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Loads `<dir>/<name>/{tls.crt,tls.key,ca.crt,ca.crl}` as `kubernetes://<name>` (and
/// `kubernetes://<name>-cacert`), now and whenever they change. One with `ca.crt` alone is what others are verified by;
/// `ca.crl` are revocation lists of `ca.crt` and whatever issuers are below it.
pub(crate) fn follow(dir: PathBuf, store: Arc<SecretStore>) -> Follow {
    Follow(tokio::spawn(async move {
        let mut seen = BTreeMap::new();
        loop {
            scan(&dir, &store, &mut seen);
            tokio::time::sleep(INTERVAL).await;
        }
    }))
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|m| m.modified()).ok()
}

fn scan(dir: &Path, store: &SecretStore, seen: &mut BTreeMap<String, [Option<SystemTime>; 4]>) {
    let entries = match std::fs::read_dir(dir) {
        Ok(e) => e,
        Err(error) => {
            if seen.insert(String::new(), [None; 4]).is_none() {
                tracing::warn!(dir = %dir.display(), %error, "no credentials");
            }
            return;
        }
    };
    let mut present = Vec::new();
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let [crt, key, ca, crl] = ["tls.crt", "tls.key", "ca.crt", "ca.crl"].map(|f| entry.path().join(f));
        let stamp = [modified(&crt), modified(&key), modified(&ca), modified(&crl)];
        let is_identity = stamp[0].is_some() && stamp[1].is_some();
        if !is_identity && stamp[2].is_none() {
            continue;
        }
        present.push(name.clone());
        if seen.insert(name.clone(), stamp) == Some(stamp) {
            continue;
        }
        let sds = format!("kubernetes://{name}");
        let loaded = (|| -> anyhow::Result<()> {
            if is_identity {
                store.set_identity(&sds, &std::fs::read(&crt)?, &std::fs::read(&key)?)?;
            } else {
                store.remove_identity(&sds);
            }
            if stamp[2].is_some() {
                let lists = stamp[3].map(|_| std::fs::read(&crl)).transpose()?;
                store.set_trust_and_lists(
                    &format!("{sds}-cacert"),
                    &std::fs::read(&ca)?,
                    lists.as_deref(),
                )?;
            }
            Ok(())
        })();
        match loaded {
            Ok(()) => tracing::info!(%name, "credential loaded"),
            Err(error) => {
                tracing::warn!(%name, error = %format!("{error:#}"), "credential not loaded; the last one stays")
            }
        }
    }
    seen.retain(|name, _| {
        let keep = name.is_empty() || present.contains(name);
        if !keep {
            store.remove_identity(&format!("kubernetes://{name}"));
            tracing::info!(%name, "credential removed");
        }
        keep
    });
}

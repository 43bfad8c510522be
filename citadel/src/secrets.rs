//! Certificates in files, one directory for each service account, as Citadel 1.0 kept its secrets `istio.<account>`.
//!
//! `<dir>/<namespace>/istio.<account>/{cert-chain.pem,key.pem,root-cert.pem}`, mode 0600, for programs that read certificates and
//! cannot ask for them. Rules:
//! 1. The three belong together: they are links through `..data`, which is replaced in one step, as mounted secrets of Kubernetes
//!    are. Whoever opens the directory once has one generation of them.
//! 2. They are made anew when half of the lifetime is left, or ten minutes, whichever is longer; when the roots or the
//!    intermediate are others; when the certificate was revoked; and when a file is missing or damaged.
//! 3. What is there stays while the CA cannot sign.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_identity::{PendingSvid, certificate_info, pem_certificates, root_pin};
use mesh_model::SpiffeId;
use mesh_runtime::files::{private_dir, write_private};

use crate::{Authority, AuthorityError, audit::Proof};

/// From one look to the next, as in 1.0.
const LOOK: Duration = Duration::from_secs(60);
/// With less than this left it is made anew in any case.
const MIN_GRACE: Duration = Duration::from_secs(600);
const DATA: &str = "..data";
const FILES: [&str; 3] = ["cert-chain.pem", "key.pem", "root-cert.pem"];

/// A service account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccount {
    namespace: String,
    name: String,
}

impl FromStr for ServiceAccount {
    type Err = String;

    /// `NAMESPACE/ACCOUNT`.
    fn from_str(s: &str) -> Result<Self, String> {
        // They become names of directories, and parts of a SPIFFE ID.
        let label = |p: &str| {
            let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
            !p.is_empty() && p.len() <= 253 && p.chars().all(good) && !p.starts_with('.')
        };
        match s.split_once('/') {
            Some((ns, sa)) if label(ns) && label(sa) => Ok(Self { namespace: ns.into(), name: sa.into() }),
            _ => Err(format!("{s:?} is not NAMESPACE/ACCOUNT")),
        }
    }
}

/// Which secrets are kept, and where.
#[derive(Debug, Clone, Default)]
pub struct SecretsOptions {
    /// Directory.
    pub dir: PathBuf,
    /// Whose.
    pub accounts: Vec<ServiceAccount>,
}

/// Keeps them for as long as it is polled.
pub(crate) async fn keep(authority: Arc<Authority>, options: SecretsOptions) {
    let options = Arc::new(options);
    let mut changes = authority.subscribe();
    loop {
        let (ca, all) = (authority.clone(), options.clone());
        // Files, and the audit log.
        let done = tokio::task::spawn_blocking(move || {
            for account in &all.accounts {
                match refresh(&ca, &all.dir, account) {
                    Ok(true) => {
                        tracing::info!(namespace = %account.namespace, account = %account.name, "secret written")
                    }
                    Ok(false) | Err(AuthorityError::Empty) => {}
                    Err(error) => {
                        tracing::error!(%error, namespace = %account.namespace, account = %account.name, "secret not written");
                    }
                }
            }
        });
        if let Err(error) = done.await {
            tracing::error!(%error, "secrets");
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            changed = changes.changed() => if changed.is_err() { return },
        }
    }
}

/// Makes an account's secret anew if that is due; answers whether it was.
fn refresh(ca: &Authority, dir: &Path, account: &ServiceAccount) -> Result<bool, AuthorityError> {
    let status = ca.status().ok_or(AuthorityError::Empty)?;
    let id = SpiffeId::workload(&status.trust_domain, &account.namespace, &account.name)
        .map_err(|e| AuthorityError::Refused(e.to_string()))?;
    let dir = dir.join(&account.namespace).join(format!("istio.{}", account.name));
    if good(ca, &dir, &id, &status.bundle_pem, &status.intermediate) {
        return Ok(false);
    }
    let pending = PendingSvid::generate(&id)?;
    let issued = ca.issue_for(&pending.csr_pem, &id, Duration::ZERO, &Proof::of("secret in files"))?;
    let contents = [issued.chain_without_root(), pending.key_pem.to_string(), status.bundle_pem];
    replace(&dir, &contents.map(zeroize::Zeroizing::new), &issued.serial)?;
    Ok(true)
}

/// Whether what is there is of use for a while yet.
fn good(ca: &Authority, dir: &Path, id: &SpiffeId, roots: &str, intermediate: &str) -> bool {
    let read = |name: &str| fs::read(dir.join(name)).ok();
    let (Some(chain), Some(_), Some(root)) = (read(FILES[0]), read(FILES[1]), read(FILES[2])) else {
        return false;
    };
    let Ok(info) = certificate_info(&chain) else { return false };
    let under = pem_certificates("chain", &chain).ok().and_then(|c| c.get(1).map(|i| root_pin(i)));
    let lasts = ca.workload_ttl().mul_f64(0.5).max(MIN_GRACE);
    let left = info.not_after.duration_since(SystemTime::now()).unwrap_or_default();
    // What lives for less than the grace anyway is made anew at half of it.
    let left_enough = left >= lasts.min(ca.workload_ttl().mul_f64(0.5));
    info.spiffe.as_ref() == Some(id)
        && root == roots.as_bytes()
        && under.as_deref() == Some(intermediate)
        && left_enough
        && !ca.has_revoked(&info.serial)
}

/// Replaces all three files in one step.
fn replace(dir: &Path, contents: &[zeroize::Zeroizing<String>; 3], name: &str) -> io::Result<()> {
    private_dir(dir)?;
    let generation = format!("..{name}");
    for (file, content) in FILES.iter().zip(contents) {
        write_private(&dir.join(&generation).join(file), content.as_bytes())?;
    }
    let before = fs::read_link(dir.join(DATA)).ok();
    let link = |target: &str, name: &str| {
        let new = dir.join(format!("{name}.new"));
        match fs::remove_file(&new) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        symlink(target, &new)?;
        fs::rename(&new, dir.join(name))
    };
    link(&generation, DATA)?;
    for file in FILES {
        let target = format!("{DATA}/{file}");
        if fs::read_link(dir.join(file)).ok().as_deref() != Some(Path::new(&target)) {
            link(&target, file)?;
        }
    }
    // Whoever has the old files open keeps them.
    if let Some(old) = before.filter(|b| b.as_os_str() != generation.as_str() && b.components().count() == 1)
    {
        fs::remove_dir_all(dir.join(old))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use mesh_identity::{SecretStore, WORKLOAD_SVID};
    use mesh_model::{ClusterId, TrustDomain};

    use super::*;
    use crate::revocation::{Reason, Target};

    const HOUR: Duration = Duration::from_secs(3600);

    struct Kept {
        dir: tempfile::TempDir,
        ca: Authority,
        account: ServiceAccount,
    }

    impl Kept {
        fn new(ttl: Duration) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let ca = Authority::load(ClusterId::new("west").unwrap(), dir.path().join("state"), ttl).unwrap();
            Self { dir, ca, account: "books/reviews".parse().unwrap() }
        }

        fn refresh(&self) -> Result<bool, AuthorityError> {
            refresh(&self.ca, &self.dir.path().join("secrets"), &self.account)
        }

        fn at(&self, file: &str) -> PathBuf {
            self.dir.path().join("secrets/books/istio.reviews").join(file)
        }

        fn chain(&self) -> Vec<u8> {
            fs::read(self.at("cert-chain.pem")).unwrap()
        }
    }

    #[test]
    fn a_secret_is_made_and_left_alone_while_it_is_good() {
        let k = Kept::new(HOUR);
        assert!(matches!(k.refresh(), Err(AuthorityError::Empty)));
        k.ca.found(&TrustDomain::default()).unwrap();
        assert!(k.refresh().unwrap());
        for file in FILES {
            let mode = fs::metadata(k.at(file)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{file}");
        }
        let info = certificate_info(&k.chain()).unwrap();
        assert_eq!(info.spiffe.unwrap().as_str(), "spiffe://mesh.local/ns/books/sa/reviews");
        // Key and certificate belong together, and the root is the mesh's.
        let key = fs::read(k.at("key.pem")).unwrap();
        SecretStore::new().set_identity(WORKLOAD_SVID, &k.chain(), &key).unwrap();
        assert_eq!(fs::read_to_string(k.at("root-cert.pem")).unwrap(), k.ca.status().unwrap().bundle_pem);
        let before = k.chain();
        assert!(!k.refresh().unwrap());
        assert_eq!(k.chain(), before);
    }

    #[test]
    fn it_is_made_anew_when_it_has_to_be() {
        let k = Kept::new(HOUR);
        k.ca.found(&TrustDomain::default()).unwrap();
        k.refresh().unwrap();
        let anew = |what: &str| {
            let before = k.chain();
            assert!(k.refresh().unwrap(), "{what}");
            assert_ne!(k.chain(), before, "{what}");
            assert!(!k.refresh().unwrap(), "{what}");
            // One generation, and what was before it is gone.
            let hidden = fs::read_dir(k.at("")).unwrap().map(|e| e.unwrap().file_name());
            assert_eq!(hidden.filter(|n| n.to_string_lossy().starts_with("..")).count(), 2, "{what}");
        };
        fs::remove_file(k.at("key.pem")).unwrap();
        anew("a missing file");
        let damaged = fs::read_link(k.at("..data")).unwrap();
        fs::write(k.at("").join(damaged).join("cert-chain.pem"), "nothing").unwrap();
        assert!(k.refresh().unwrap());
        let id = SpiffeId::parse("spiffe://mesh.local/ns/books/sa/reviews").unwrap();
        k.ca.revoke(&Target::Identity(id), Reason::KeyCompromise).unwrap();
        anew("a revoked certificate");
        k.ca.rotate(crate::rotation::Step::Prepare, None, &[]).unwrap();
        anew("another root");
        k.ca.rotate(crate::rotation::Step::Activate, None, &[]).unwrap();
        anew("another intermediate, and another root first");
    }

    /// The root is the same then.
    #[test]
    fn another_intermediate_makes_another_secret() {
        let (west, east) = (Kept::new(HOUR), tempfile::tempdir().unwrap());
        west.ca.found(&TrustDomain::default()).unwrap();
        let ca = Authority::load(ClusterId::new("east").unwrap(), east.path().join("state"), HOUR).unwrap();
        let sign = |csr: &str| west.ca.sign_intermediate(csr, ca.cluster()).unwrap();
        let (chain, status) = sign(&ca.request_intermediate().unwrap());
        ca.install_intermediate(&TrustDomain::default(), &chain, &status.bundle_pem).unwrap();
        let dir = east.path().join("secrets");
        assert!(refresh(&ca, &dir, &west.account).unwrap());
        let (chain, _) = sign(&ca.request_renewal().unwrap());
        ca.install_renewal(&chain).unwrap();
        assert!(refresh(&ca, &dir, &west.account).unwrap());
        assert!(!refresh(&ca, &dir, &west.account).unwrap());
    }

    #[test]
    fn it_is_renewed_at_half_of_its_life() {
        let k = Kept::new(Duration::from_secs(4));
        k.ca.found(&TrustDomain::default()).unwrap();
        k.refresh().unwrap();
        assert!(!k.refresh().unwrap());
        std::thread::sleep(Duration::from_millis(2500));
        assert!(k.refresh().unwrap());
    }

    /// Whoever reads through `..data` while it is replaced sees files that belong together.
    #[test]
    fn readers_see_one_generation() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("secret");
        let of = |n: u32| [(); 3].map(|()| zeroize::Zeroizing::new(n.to_string()));
        replace(&dir, &of(0), "0").unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let Ok(data) = fs::canonicalize(dir.join(DATA)) else { continue };
                    // A generation that went meanwhile is read anew.
                    let read: Vec<_> = FILES.iter().filter_map(|f| fs::read(data.join(f)).ok()).collect();
                    if read.len() == 3 {
                        assert!(read[0] == read[1] && read[1] == read[2] && !read[0].is_empty());
                    }
                }
            });
            for n in 1..200 {
                replace(&dir, &of(n), &n.to_string()).unwrap();
                for file in FILES {
                    assert_eq!(fs::read_to_string(dir.join(file)).unwrap(), n.to_string());
                }
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }

    #[test]
    fn names_are_names() {
        for bad in ["", "a", "a/", "/b", "a/../b", "../a/b", "a/b/c", "A/b", "a/.b", "a/b\n"] {
            assert!(bad.parse::<ServiceAccount>().is_err(), "{bad:?}");
        }
        assert!("istio-system/default".parse::<ServiceAccount>().is_ok());
    }
}

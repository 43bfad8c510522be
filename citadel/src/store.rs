//! Files of a CA, in the layout of Istio's `cacerts`.

use std::{
    io,
    path::{Path, PathBuf},
};

use mesh_identity::root_pin;
use mesh_runtime::files::write_private;
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::revocation::Records;

/// Everything as it is about to be.
const JOURNAL: &str = "next.json";
/// What was revoked.
const REVOKED: &str = "revoked.json";
/// Pending since a join.
pub(crate) const JOIN: &str = "pending";
/// Pending since a renewal.
pub(crate) const RENEWAL: &str = "renewal";

/// A key, which is overwritten in memory when it is dropped.
pub(crate) type Secret = Zeroizing<String>;

/// The directory that holds a CA.
#[derive(Debug, Clone)]
pub(crate) struct CaDir(PathBuf);

/// What is in it. Keys are PKCS #8 PEM.
#[derive(Default, Clone, Serialize, Deserialize)]
pub(crate) struct CaFiles {
    /// `root-cert.pem`: the trust bundle.
    pub(crate) root_cert: String,
    /// `root-key.pem`: only where the mesh was founded.
    pub(crate) root_key: Option<Secret>,
    /// `other-root-key.pem`: while the root is replaced, the key of the one that does not sign (yet, or any more).
    pub(crate) other_key: Option<Secret>,
    /// `roots.json`: the bundle as the holder of the root key announced it.
    pub(crate) announcement: Option<String>,
    /// `ca-cert.pem`: this cluster's intermediate.
    pub(crate) ca_cert: String,
    /// `ca-key.pem`.
    pub(crate) ca_key: Secret,
    /// `cert-chain.pem`: the intermediate and what lies between it and the root.
    pub(crate) cert_chain: String,
}

impl CaDir {
    pub(crate) fn new(state_dir: &Path) -> Self {
        Self(state_dir.join("ca"))
    }

    fn read(&self, name: &str) -> io::Result<Option<String>> {
        match std::fs::read_to_string(self.0.join(name)) {
            Ok(s) => Ok(Some(s)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(io::Error::new(e.kind(), format!("{}: {e}", self.0.join(name).display()))),
        }
    }

    fn read_secret(&self, name: &str) -> io::Result<Option<Secret>> {
        Ok(self.read(name)?.map(Zeroizing::new))
    }

    /// `None` if the cluster is in no mesh; an error if some files are missing, so that half a CA is
    /// never silently replaced. A change that was interrupted is completed first.
    pub(crate) fn load(&self) -> io::Result<Option<CaFiles>> {
        if let Some(text) = self.read_secret(JOURNAL)? {
            // It was written whole or not at all.
            let next: CaFiles = serde_json::from_str(&text).map_err(|e| {
                let path = self.0.join(JOURNAL);
                io::Error::new(io::ErrorKind::InvalidData, format!("{}: {e}", path.display()))
            })?;
            self.write_all(&next)?;
            self.remove(JOURNAL)?;
        }
        let parts = (self.read("root-cert.pem")?, self.read("ca-cert.pem")?, self.read_secret("ca-key.pem")?);
        match parts {
            (None, None, None) => Ok(None),
            (Some(root_cert), Some(ca_cert), Some(ca_key)) => Ok(Some(CaFiles {
                cert_chain: self.read("cert-chain.pem")?.unwrap_or_else(|| ca_cert.clone()),
                root_key: self.read_secret("root-key.pem")?,
                other_key: self.read_secret("other-root-key.pem")?,
                announcement: self.read("roots.json")?,
                root_cert,
                ca_cert,
                ca_key,
            })),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "{}: holds some but not all of root-cert.pem, ca-cert.pem and ca-key.pem; restore the missing \
                     ones or move the directory away",
                    self.0.display()
                ),
            )),
        }
    }

    /// Replaces everything at once: the whole of it is written to a journal first, from which [`Self::load`] completes
    /// what a crash interrupts.
    pub(crate) fn save(&self, f: &CaFiles) -> io::Result<()> {
        write_private(&self.0.join(JOURNAL), &Zeroizing::new(serde_json::to_vec(f)?))?;
        self.write_all(f)?;
        self.remove(JOURNAL)
    }

    fn write_all(&self, f: &CaFiles) -> io::Result<()> {
        for (name, content) in [
            ("root-key.pem", f.root_key.as_deref()),
            ("other-root-key.pem", f.other_key.as_deref()),
            ("ca-key.pem", Some(&*f.ca_key)),
            ("cert-chain.pem", Some(&f.cert_chain)),
            ("ca-cert.pem", Some(&f.ca_cert)),
            ("root-cert.pem", Some(&f.root_cert)),
            ("roots.json", f.announcement.as_ref()),
        ] {
            match content {
                Some(c) => write_private(&self.0.join(name), c.as_bytes())?,
                None => self.remove(name)?,
            }
        }
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match std::fs::remove_file(self.0.join(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// Removes everything; used when the cluster leaves its mesh.
    pub(crate) fn clear(&self) -> io::Result<()> {
        for name in [
            JOURNAL,
            "root-cert.pem",
            "ca-cert.pem",
            "cert-chain.pem",
            "ca-key.pem",
            "root-key.pem",
            "other-root-key.pem",
            "roots.json",
            REVOKED,
        ] {
            self.remove(name)?;
        }
        self.drop_pending(JOIN);
        self.drop_pending(RENEWAL);
        Ok(())
    }

    /// Key and request of an intermediate that is still to be signed: of a [`JOIN`] or a [`RENEWAL`].
    pub(crate) fn pending(&self, what: &str) -> io::Result<Option<(Secret, String)>> {
        Ok(self.read_secret(&format!("{what}-key.pem"))?.zip(self.read(&format!("{what}-csr.pem"))?))
    }

    pub(crate) fn save_pending(&self, what: &str, key: &str, csr: &str) -> io::Result<()> {
        write_private(&self.0.join(format!("{what}-key.pem")), key.as_bytes())?;
        write_private(&self.0.join(format!("{what}-csr.pem")), csr.as_bytes())
    }

    pub(crate) fn drop_pending(&self, what: &str) {
        for part in ["key", "csr"] {
            let _ = std::fs::remove_file(self.0.join(format!("{what}-{part}.pem")));
        }
    }

    /// Number of the bundle as it is now: one more than the last if the roots are others. It is kept when the cluster
    /// leaves, so that it only ever rises.
    pub(crate) fn bundle_sequence(&self, roots: &[CertificateDer<'_>]) -> io::Result<u64> {
        let kept = self.read("bundle-sequence")?.unwrap_or_default();
        let (number, of) = kept.trim().split_once(' ').unwrap_or(("0", ""));
        let number: u64 = number.parse().map_err(|_| {
            let path = self.0.join("bundle-sequence");
            io::Error::new(io::ErrorKind::InvalidData, format!("{}: is not a number", path.display()))
        })?;
        if of == digest(roots) {
            return Ok(number);
        }
        self.set_bundle_sequence(number + 1, roots)?;
        Ok(number + 1)
    }

    /// The number that these roots were announced under.
    pub(crate) fn set_bundle_sequence(&self, number: u64, roots: &[CertificateDer<'_>]) -> io::Result<()> {
        let text = format!("{number} {}\n", digest(roots));
        write_private(&self.0.join("bundle-sequence"), text.as_bytes())
    }

    pub(crate) fn save_announcement(&self, text: &str) -> io::Result<()> {
        write_private(&self.0.join("roots.json"), text.as_bytes())
    }

    pub(crate) fn revoked(&self) -> io::Result<Records> {
        let Some(text) = self.read(REVOKED)? else { return Ok(Records::default()) };
        serde_json::from_str(&text).map_err(|e| {
            let path = self.0.join(REVOKED);
            let why = format!("{}: {e}; without it nothing would be revoked any more", path.display());
            io::Error::new(io::ErrorKind::InvalidData, why)
        })
    }

    pub(crate) fn save_revoked(&self, records: &Records) -> io::Result<()> {
        write_private(&self.0.join(REVOKED), &serde_json::to_vec(records)?)
    }

    /// The key that signs workload tokens, made on first use.
    pub(crate) fn token_key(&self) -> io::Result<Option<Secret>> {
        self.read_secret("token-key.pem")
    }

    pub(crate) fn save_token_key(&self, pem: &str) -> io::Result<()> {
        write_private(&self.0.join("token-key.pem"), pem.as_bytes())
    }
}

fn digest(roots: &[CertificateDer<'_>]) -> String {
    roots.iter().map(|r| root_pin(r)).collect()
}

//! Files of a CA, in the layout of Istio's `cacerts`.

use std::{
    io,
    path::{Path, PathBuf},
};

use mesh_identity::root_pin;
use mesh_runtime::files::write_private;
use rustls_pki_types::CertificateDer;

/// The directory that holds a CA.
#[derive(Debug, Clone)]
pub(crate) struct CaDir(PathBuf);

/// What is in it. Keys are PKCS #8 PEM.
#[derive(Default, Clone)]
pub(crate) struct CaFiles {
    /// `root-cert.pem`: the trust bundle.
    pub(crate) root_cert: String,
    /// `root-key.pem`: only where the mesh was founded.
    pub(crate) root_key: Option<String>,
    /// `ca-cert.pem`: this cluster's intermediate.
    pub(crate) ca_cert: String,
    /// `ca-key.pem`.
    pub(crate) ca_key: String,
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

    /// `None` if the cluster is in no mesh; an error if some files are missing, so that half a CA is
    /// never silently replaced.
    pub(crate) fn load(&self) -> io::Result<Option<CaFiles>> {
        let parts = [self.read("root-cert.pem")?, self.read("ca-cert.pem")?, self.read("ca-key.pem")?];
        match parts {
            [None, None, None] => Ok(None),
            [Some(root_cert), Some(ca_cert), Some(ca_key)] => Ok(Some(CaFiles {
                cert_chain: self.read("cert-chain.pem")?.unwrap_or_else(|| ca_cert.clone()),
                root_key: self.read("root-key.pem")?,
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

    /// Writes keys before certificates: a crash leaves a state that `load` refuses or completes.
    pub(crate) fn save(&self, f: &CaFiles) -> io::Result<()> {
        if let Some(k) = &f.root_key {
            write_private(&self.0.join("root-key.pem"), k.as_bytes())?;
        }
        write_private(&self.0.join("ca-key.pem"), f.ca_key.as_bytes())?;
        write_private(&self.0.join("cert-chain.pem"), f.cert_chain.as_bytes())?;
        write_private(&self.0.join("ca-cert.pem"), f.ca_cert.as_bytes())?;
        write_private(&self.0.join("root-cert.pem"), f.root_cert.as_bytes())
    }

    /// Removes everything; used when the cluster leaves its mesh.
    pub(crate) fn clear(&self) -> io::Result<()> {
        for name in [
            "root-cert.pem",
            "ca-cert.pem",
            "cert-chain.pem",
            "ca-key.pem",
            "root-key.pem",
            "pending-key.pem",
            "pending-csr.pem",
        ] {
            match std::fs::remove_file(self.0.join(name)) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Key and request of an intermediate that is still to be signed.
    pub(crate) fn pending(&self) -> io::Result<Option<(String, String)>> {
        Ok(self.read("pending-key.pem")?.zip(self.read("pending-csr.pem")?))
    }

    pub(crate) fn save_pending(&self, key: &str, csr: &str) -> io::Result<()> {
        write_private(&self.0.join("pending-key.pem"), key.as_bytes())?;
        write_private(&self.0.join("pending-csr.pem"), csr.as_bytes())
    }

    pub(crate) fn drop_pending(&self) {
        for name in ["pending-key.pem", "pending-csr.pem"] {
            let _ = std::fs::remove_file(self.0.join(name));
        }
    }

    /// Number of the bundle as it is now: one more than the last if the roots are others. It is kept when the cluster
    /// leaves, so that it only ever rises.
    pub(crate) fn bundle_sequence(&self, roots: &[CertificateDer<'_>]) -> io::Result<u64> {
        let digest: String = roots.iter().map(|r| root_pin(r)).collect();
        let kept = self.read("bundle-sequence")?.unwrap_or_default();
        let (number, of) = kept.trim().split_once(' ').unwrap_or(("0", ""));
        let number: u64 = number.parse().map_err(|_| {
            let path = self.0.join("bundle-sequence");
            io::Error::new(io::ErrorKind::InvalidData, format!("{}: is not a number", path.display()))
        })?;
        if of == digest {
            return Ok(number);
        }
        let number = number + 1;
        write_private(&self.0.join("bundle-sequence"), format!("{number} {digest}\n").as_bytes())?;
        Ok(number)
    }

    /// The key that signs workload tokens, made on first use.
    pub(crate) fn token_key(&self) -> io::Result<Option<String>> {
        self.read("token-key.pem")
    }

    pub(crate) fn save_token_key(&self, pem: &str) -> io::Result<()> {
        write_private(&self.0.join("token-key.pem"), pem.as_bytes())
    }
}

//! A certificate authority that has nothing to do with the mesh's.

use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

/// A root that issues server and client certificates into files.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// Writes the root to `path`.
    pub(crate) fn write_root(&self, path: &Path) -> String {
        write(path, &self.pem);
        path.display().to_string()
    }

    /// Writes `tls.crt` and `tls.key` for `name` into `dir`, each replaced as a whole; answers with the paths.
    pub(crate) fn issue(&self, dir: &Path, name: &str) -> (String, String) {
        std::fs::create_dir_all(dir).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        let cert = params.signed_by(&key, &self.issuer).unwrap().pem();
        let (crt, pem) = (dir.join("tls.crt"), dir.join("tls.key"));
        write(&pem, &key.serialize_pem());
        write(&crt, &cert);
        let text = |p: PathBuf| p.display().to_string();
        (text(crt), text(pem))
    }
}

fn write(path: &Path, content: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, content).unwrap();
    std::fs::rename(new, path).unwrap();
}

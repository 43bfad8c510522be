//! Which certificates the log knows of: what can be revoked.

use std::{
    fs::File,
    io::{self, BufRead, BufReader},
};

use mesh_identity::{pem_certificates, root_pin};

use super::{AuditLog, Entry, Event, at, files};

/// A certificate that was issued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Certificate {
    /// Hexadecimal.
    pub(crate) serial: String,
    /// SPIFFE ID of a workload, or the name of a cluster.
    pub(crate) of: String,
    /// It is a cluster's.
    pub(crate) intermediate: bool,
    /// When it expires, seconds since the epoch.
    pub(crate) until: u64,
    /// SHA-256 of the intermediate that signed it; of an intermediate nothing is known.
    pub(crate) issuer: String,
}

impl AuditLog {
    /// All that were issued, as far back as the log reaches. Whoever changes the log can hide one; `verify` tells that.
    ///
    /// # Errors
    /// Those of the file system. A line that is none is passed over: it must not be in the way of a revocation.
    pub(crate) fn certificates(&self) -> io::Result<Vec<Certificate>> {
        let mut out = Vec::new();
        let mut issuer = String::new();
        for path in files(&self.dir)? {
            let file = BufReader::new(File::open(&path).map_err(at(&path))?);
            for line in file.lines() {
                let Ok(entry) = serde_json::from_str::<Entry>(&line.map_err(at(&path))?) else { continue };
                match entry.event {
                    // Another intermediate has another signer.
                    Event::Signer { chain } => {
                        let der = chain.get(1).map(|c| pem_certificates("signer", c.as_bytes()));
                        let der = der.and_then(Result::ok).and_then(|c| c.into_iter().next());
                        issuer = der.map(|d| root_pin(&d)).unwrap_or_default();
                    }
                    Event::Issued { serial, identity, not_after, .. } => out.push(Certificate {
                        serial,
                        of: identity,
                        intermediate: false,
                        until: not_after,
                        issuer: issuer.clone(),
                    }),
                    Event::Intermediate { serial, cluster, not_after, .. } => out.push(Certificate {
                        serial: crate::revocation::serial(&serial),
                        of: cluster,
                        intermediate: true,
                        until: not_after,
                        issuer: String::new(),
                    }),
                    _ => {}
                }
            }
        }
        Ok(out)
    }
}

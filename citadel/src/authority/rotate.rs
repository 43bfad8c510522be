//! Replacing the root: what [`crate::rotation`] decides, done.
//!
//! Every step is one replacement of the stored CA, complete or not begun. Files of the holder meanwhile:
//!
//! | phase | `root-cert.pem` | `root-key.pem` | `other-root-key.pem` |
//! |---|---|---|---|
//! | prepared | old, ..., new | of the old root | of the new root |
//! | activated | new, old, ... | of the new root | of the old root |

use mesh_identity::{TrustBundle, pem_certificates, root_pin};
use rcgen::{KeyPair, PublicKeyData as _};
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{
    Active, Authority, AuthorityError, AuthorityStatus, RootKey,
    sign::{new_intermediate, new_root},
};
use crate::{
    announcement::Announcement,
    rotation::{Blocker, Phase, Report, Step, Verdict, decide},
    store::{CaFiles, Secret},
};

/// What became of a step.
#[derive(Debug, Clone)]
pub struct Rotated {
    /// The CA now.
    pub status: AuthorityStatus,
    /// Whether anything was done.
    pub changed: bool,
    /// What to tell, if nothing was.
    pub says: String,
    /// Who has to be waited for.
    pub blockers: Vec<Blocker>,
}

impl Authority {
    /// Does a step of the rotation, where the root key is. `given` are certificate and key, PEM, of a root to prepare instead
    /// of a new one; `members` how everybody stands, this cluster included.
    ///
    /// # Errors
    /// [`AuthorityError::NoRootKey`], [`AuthorityError::BadRequest`] for a step that makes no sense now or a root that cannot
    /// be used, and those of signing and of the file system.
    pub fn rotate(
        &self,
        step: Step,
        given: Option<(String, String)>,
        members: &[Report],
    ) -> Result<Rotated, AuthorityError> {
        let _alone = self.alone();
        let active = self.active()?;
        if active.root.is_none() {
            return Err(AuthorityError::NoRootKey);
        }
        let s = &active.status;
        let same = |says: String, blockers| Rotated { status: s.clone(), changed: false, says, blockers };
        match decide(s.phase, step, s.bundle_sequence, &s.root_pin, members) {
            Verdict::Wrong(why) => return Err(AuthorityError::BadRequest(why)),
            Verdict::Blocked(b) => return Ok(same(String::new(), b)),
            Verdict::Done(says) => {
                if let Some((cert, _)) = given
                    && step == Step::Prepare
                    && pem_certificates("the new root", cert.as_bytes())?.first() != active.roots.last()
                {
                    return Err(AuthorityError::BadRequest(
                        "another new root is prepared already: `flotilla ca rotate abort` first".into(),
                    ));
                }
                return Ok(same(says, vec![]));
            }
            Verdict::Go => {}
        }
        let files = match step {
            Step::Prepare => active.prepared(given)?,
            Step::Activate => active.activated()?,
            Step::Finish => active.without(1)?,
            Step::Abort => active.without(active.roots.len().saturating_sub(1))?,
        };
        let own = (files.ca_cert != active.files.ca_cert).then_some("rotation of the root");
        let status = self.install(&files, own)?;
        tracing::info!(
            target: "audit", ?step, sequence = status.bundle_sequence, phase = %status.phase, signing = %status.root_pin,
            "the root is being rotated"
        );
        Ok(Rotated { status, changed: true, says: String::new(), blockers: vec![] })
    }

    /// Takes the roots that the holder of the root key announced; answers whether they were news.
    ///
    /// # Errors
    /// [`AuthorityError::Refused`] if this bundle's first root has not signed them, or they are older than what is here.
    pub fn take_announcement(&self, text: &str) -> Result<bool, AuthorityError> {
        let _alone = self.alone();
        let active = self.active()?;
        let s = &active.status;
        let new = Announcement::parse(text)?;
        if active.announcement.as_ref() == Some(&new) {
            return Ok(false);
        }
        let refused = |why: String| AuthorityError::Refused(format!("roots that were announced: {why}"));
        if active.root.is_some() {
            return Err(refused("the root key is here, and nobody else announces its roots".into()));
        }
        if new.bundle.trust_domain != s.trust_domain {
            return Err(refused(format!(
                "they are of {}, not of {}",
                new.bundle.trust_domain, s.trust_domain
            )));
        }
        if !active.roots.first().is_some_and(|first| new.signed_by(first)) {
            return Err(refused(format!("the root that signs here ({}) has not signed them", s.root_pin)));
        }
        let (held, told) = (s.bundle_sequence, new.bundle.sequence);
        let same = new.bundle.roots == active.roots;
        // A number that this cluster has counted by itself gives way to the holder's, as long as the roots are the same.
        let counted = active.announcement.is_none();
        let older = told < held && !(counted && same);
        let other = told == held && !same;
        if older || other || (told == held && !counted) {
            return Err(refused(format!("sequence {told} is not above {held}, which is here")));
        }
        let files =
            CaFiles { root_cert: new.bundle.pem(), announcement: Some(new.text()), ..active.files.clone() };
        self.install(&files, None)?;
        tracing::info!(
            target: "audit", sequence = told, phase = %new.phase, roots = new.bundle.roots.len(), "took new roots"
        );
        Ok(true)
    }
}

impl Active {
    fn key(&self) -> Result<KeyPair, AuthorityError> {
        Ok(KeyPair::from_pem(self.files.root_key.as_deref().ok_or(AuthorityError::NoRootKey)?)?)
    }

    fn other_key(&self) -> Result<KeyPair, AuthorityError> {
        let pem = self.files.other_key.as_deref();
        let pem = pem.ok_or_else(|| AuthorityError::Stored("other-root-key.pem is missing".into()))?;
        Ok(KeyPair::from_pem(pem)?)
    }

    /// The next bundle, with the signatures of all whose keys are here.
    fn announce(
        &self,
        roots: &[CertificateDer<'static>],
        phase: Phase,
        keys: &[&KeyPair],
    ) -> Result<(TrustBundle, String), AuthorityError> {
        let bundle = TrustBundle { roots: roots.to_vec(), ..self.bundle(self.status.bundle_sequence + 1)? };
        let all = self.roots.iter().chain(roots);
        let pin =
            |key: &KeyPair| all.clone().find(|r| belongs(key, r)).map(|r| root_pin(r)).unwrap_or_default();
        let keys: Vec<_> = keys.iter().map(|k| (pin(k), *k)).collect();
        let text = Announcement::sign(bundle.clone(), phase, &keys)?.text();
        Ok((bundle, text))
    }

    fn prepared(&self, given: Option<(String, String)>) -> Result<CaFiles, AuthorityError> {
        let (cert, key) = match given {
            Some((cert, key)) => {
                let key = Secret::from(key);
                self.usable(&cert, &key)?;
                (cert, key)
            }
            None => new_root(&self.status.trust_domain)?,
        };
        let mut roots = self.roots.clone();
        roots.extend(pem_certificates("the new root", cert.as_bytes())?);
        // A bundle has limits that one more may break.
        let pem = self.status.bundle_pem.clone() + &cert;
        TrustBundle::from_pem(self.status.trust_domain.clone(), pem.as_bytes(), 1, None)
            .map_err(|e| AuthorityError::BadRequest(e.to_string()))?;
        let (bundle, announcement) = self.announce(&roots, Phase::Prepared, &[&self.key()?])?;
        Ok(CaFiles {
            root_cert: bundle.pem(),
            other_key: Some(key),
            announcement: Some(announcement),
            ..self.files.clone()
        })
    }

    /// What must hold of a root that is plugged in.
    fn usable(&self, cert: &str, key: &str) -> Result<(), AuthorityError> {
        let bad = |why: &str| AuthorityError::BadRequest(format!("--root-cert: {why}"));
        let certs = pem_certificates("--root-cert", cert.as_bytes()).map_err(|e| bad(&e.to_string()))?;
        let [der] = certs.as_slice() else { return Err(bad("holds more than one certificate")) };
        let pair = KeyPair::from_pem(key)
            .map_err(|e| AuthorityError::BadRequest(format!("--root-key: is no usable key: {e}")))?;
        let (_, x) = X509Certificate::from_der(der).map_err(|e| bad(&e.to_string()))?;
        if !belongs(&pair, der) {
            return Err(AuthorityError::BadRequest("--root-key: does not belong to --root-cert".into()));
        }
        if self.roots.iter().any(|r| belongs(&pair, r)) {
            return Err(bad("its key is that of a root that is trusted already"));
        }
        if !x.is_ca() || x.verify_signature(None).is_err() {
            return Err(bad("is no root: a CA certificate that is signed by itself is needed"));
        }
        let path = x.basic_constraints().ok().flatten().and_then(|b| b.value.path_len_constraint);
        if path == Some(0) {
            return Err(bad("has path length 0: it could not sign intermediates"));
        }
        if !x.validity().is_valid() {
            return Err(bad("is expired or not valid yet"));
        }
        Ok(())
    }

    fn activated(&self) -> Result<CaFiles, AuthorityError> {
        let (old, new) = (self.key()?, self.other_key()?);
        let mut roots = self.roots.clone();
        let first = roots.pop().ok_or(AuthorityError::NoRootKey)?;
        roots.insert(0, first);
        let (bundle, announcement) = self.announce(&roots, Phase::Activated, &[&new, &old])?;
        let pem = bundle.pem();
        let new_key = Secret::from(new.serialize_pem());
        let root = RootKey::new(&pem, &new_key)?;
        let cluster = self.status.cluster()?;
        let (cert, key) = new_intermediate(&self.status.trust_domain, &cluster, &root)?;
        Ok(CaFiles {
            root_cert: pem,
            root_key: Some(new_key),
            other_key: Some(old.serialize_pem().into()),
            announcement: Some(announcement),
            ca_cert: cert.clone(),
            cert_chain: cert,
            ca_key: key,
        })
    }

    /// Without one of the roots, whose key is forgotten. It signs this once more, for whoever holds it as the first.
    fn without(&self, at: usize) -> Result<CaFiles, AuthorityError> {
        let mut roots = self.roots.clone();
        if at == 0 || at >= roots.len() {
            return Err(AuthorityError::Stored("there is no root to take away".into()));
        }
        roots.remove(at);
        let (bundle, announcement) =
            self.announce(&roots, Phase::Steady, &[&self.key()?, &self.other_key()?])?;
        Ok(CaFiles {
            root_cert: bundle.pem(),
            other_key: None,
            announcement: Some(announcement),
            ..self.files.clone()
        })
    }
}

impl AuthorityStatus {
    fn cluster(&self) -> Result<mesh_model::ClusterId, AuthorityError> {
        let info = mesh_identity::certificate_info(self.chain_pem.as_bytes())?;
        info.spiffe
            .and_then(|s| s.cluster_id())
            .ok_or_else(|| AuthorityError::Stored("the intermediate names no cluster".into()))
    }
}

/// Whether a key is that of a certificate.
pub(super) fn belongs(key: &KeyPair, cert: &CertificateDer<'_>) -> bool {
    X509Certificate::from_der(cert)
        .is_ok_and(|(_, c)| key.der_bytes() == c.public_key().subject_public_key.data.as_ref())
}

#[cfg(test)]
mod tests;

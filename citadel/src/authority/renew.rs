//! Intermediates renew before they end, and at once when another root signs.

use std::time::SystemTime;

use super::{Authority, AuthorityError, AuthorityStatus, first_pem, sign::new_intermediate};
use crate::store::{CaFiles, RENEWAL};

impl AuthorityStatus {
    /// Why the intermediate should be renewed; `None` while it need not.
    #[must_use]
    pub fn renewal_due(&self, now: SystemTime) -> Option<&'static str> {
        if self.issuer_pin != self.root_pin {
            return Some("another root signs");
        }
        let life = self.not_after.duration_since(self.not_before).unwrap_or_default();
        let age = now.duration_since(self.not_before).unwrap_or_default();
        (age > life.mul_f64(2.0 / 3.0)).then_some("two thirds of its life are over")
    }
}

impl Authority {
    /// The request for the next intermediate, with a key of its own; the same one until it is installed, so that a renewal
    /// can be repeated.
    ///
    /// # Errors
    /// [`AuthorityError::Empty`] in no mesh, [`AuthorityError::BadRequest`] where the root key is, which needs none.
    pub fn request_renewal(&self) -> Result<String, AuthorityError> {
        let _alone = self.alone();
        if self.active()?.root.is_some() {
            return Err(AuthorityError::BadRequest("the root key is here: nobody else has to sign".into()));
        }
        self.request(RENEWAL)
    }

    /// Installs what the root signed for [`Self::request_renewal`], PEM, this cluster's intermediate first.
    ///
    /// # Errors
    /// If it does not belong to the request, is for another cluster or domain, or is not under the root that signs; nothing
    /// is changed then.
    pub fn install_renewal(&self, chain: &str) -> Result<AuthorityStatus, AuthorityError> {
        let _alone = self.alone();
        let active = self.active()?;
        let (ca_key, _) = self
            .dir
            .pending(RENEWAL)?
            .ok_or_else(|| AuthorityError::BadRequest("no renewal was requested".into()))?;
        let files = CaFiles {
            ca_cert: first_pem(chain)?,
            cert_chain: chain.to_owned(),
            ca_key,
            ..active.files.clone()
        };
        let next = super::Active::check(&files, &self.cluster)?;
        if next.status.trust_domain != active.status.trust_domain {
            return Err(AuthorityError::Stored(format!(
                "the intermediate is of trust domain {}",
                next.status.trust_domain
            )));
        }
        if next.status.issuer_pin != active.status.root_pin {
            return Err(AuthorityError::Stored(
                "the intermediate is not under the root that signs now".into(),
            ));
        }
        let status = self.install(&files, None)?;
        self.dir.drop_pending(RENEWAL);
        tracing::info!(target: "audit", root = %status.root_pin, "this cluster has a new intermediate");
        Ok(status)
    }

    /// Renews this cluster's intermediate where the root key is, if that is due; answers whether it was.
    ///
    /// # Errors
    /// Those of signing and of the file system.
    pub fn renew_own(&self) -> Result<bool, AuthorityError> {
        let _alone = self.alone();
        let active = self.active()?;
        let Some(root) = &active.root else { return Ok(false) };
        let Some(why) = active.status.renewal_due(SystemTime::now()) else { return Ok(false) };
        // One that ends with its root would be due again at once.
        if active.status.issuer_pin == active.status.root_pin && active.status.not_after >= root.not_after {
            return Ok(false);
        }
        let (cert, ca_key) = new_intermediate(&active.status.trust_domain, &self.cluster, root)?;
        let files = CaFiles { ca_cert: cert.clone(), cert_chain: cert, ca_key, ..active.files.clone() };
        self.install(&files, Some(why))?;
        tracing::info!(target: "audit", why, "renewed this cluster's intermediate");
        Ok(true)
    }
}

//! Revoking certificates, and signing the lists that say so.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mesh_identity::{MAX_LIST, certificate_pem, pem_certificates, root_pin};
use mesh_model::{SpiffeId, federation::RevocationList};
use rcgen::{CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber};
use x509_parser::{
    extensions::ParsedExtension,
    prelude::{FromDer, X509Certificate},
};

use super::{Active, Authority, AuthorityError, rotate, sign::BACKDATE};
use crate::{
    audit::{self, Event},
    revocation::{self, Former, HOLDS, MAX_REVOKED, Outcome, REFRESH, Reason, Records, Revoked, Target},
    token,
};

/// What is revoked, and the lists that say so.
pub(super) struct Revocation {
    pub(super) records: Records,
    pub(super) lists: Vec<RevocationList>,
    signed: Option<SystemTime>,
}

impl Revocation {
    pub(super) fn new(records: Records) -> Self {
        Self { records, lists: vec![], signed: None }
    }
}

impl Authority {
    /// Revokes certificates. What the audit log cannot hold is not revoked either; both are small.
    ///
    /// # Errors
    /// [`AuthorityError::BadRequest`] if there is nothing of the kind to revoke, [`AuthorityError::NoRootKey`] for an
    /// intermediate where the root key is not, [`AuthorityError::Refused`] for what would cut off this cluster itself.
    pub fn revoke(&self, target: &Target, reason: Reason) -> Result<Outcome, AuthorityError> {
        let _alone = self.alone();
        let active = self.active()?;
        let now = audit::seconds(SystemTime::now());
        let known = self.audit.certificates()?;
        let wanted = |c: &audit::Certificate| match target {
            Target::Serial(s) => revocation::serial(s) == c.serial,
            Target::Identity(id) => !c.intermediate && id.as_str() == c.of,
            Target::Cluster(cluster) => c.intermediate && cluster.as_str() == c.of,
        };
        let mut found: Vec<_> = known.into_iter().filter(wanted).collect();
        if found.is_empty() && !matches!(target, Target::Identity(_)) {
            return Err(AuthorityError::BadRequest(match target {
                Target::Cluster(c) => format!(
                    "the audit log here knows of no intermediate of cluster {c}: is it the cluster with the root key?"
                ),
                _ => "the audit log here knows of no certificate with this serial number: revoke it where it was issued"
                    .to_owned(),
            }));
        }
        found.retain(|c| c.until > now);
        if found.is_empty() && !matches!(target, Target::Identity(_)) {
            return Err(AuthorityError::BadRequest("it has expired: nobody accepts it any more".into()));
        }
        let own = mesh_identity::certificate_info(active.status.chain_pem.as_bytes())?.serial;
        let own = revocation::serial(&own);
        let mut out = Outcome::default();
        let mut revocation = self.revocation();
        let mut next = revocation.records.clone();
        for c in found {
            if next.has(&c.serial) {
                out.already += 1;
                continue;
            }
            let issuer = if c.intermediate {
                if active.root.is_none() {
                    return Err(AuthorityError::NoRootKey);
                }
                if c.serial == own {
                    return Err(AuthorityError::Refused(
                        "that is the intermediate that this cluster signs with, and it would cut itself off: replace the \
                         root (`flotilla ca rotate`), which replaces it as well"
                            .into(),
                    ));
                }
                String::new()
            } else if c.issuer == active.status.intermediate {
                c.issuer
            } else {
                out.beyond.push(c.serial);
                continue;
            };
            let of = if c.intermediate {
                format!("spiffe://{}/cluster/{}", active.status.trust_domain, c.of)
            } else {
                c.of
            };
            let revoked = Revoked { serial: c.serial, of, issuer, reason, at: now, until: c.until };
            if next.by(&revoked.issuer).count() >= MAX_REVOKED {
                return Err(AuthorityError::Refused(format!(
                    "{MAX_REVOKED} certificates of this issuer are revoked already: revoke the intermediate instead"
                )));
            }
            next.revoked.push(revoked.clone());
            out.revoked.push(revoked);
        }
        if let Target::Identity(id) = target {
            out.tokens = true;
            let (ns, sa) = of_this_domain(id, &active)?;
            next.tokens.insert(format!("{ns}/{sa}"), now);
        }
        for r in &out.revoked {
            let event =
                Event::Revoked { serial: r.serial.clone(), of: r.of.clone(), reason: reason.to_string() };
            self.audited(&active, event)?;
            tracing::warn!(target: "audit", serial = %r.serial, of = %r.of, %reason, "revoked");
        }
        if let (true, Target::Identity(id)) = (out.revoked.is_empty(), target) {
            let event =
                Event::Revoked { serial: String::new(), of: id.to_string(), reason: reason.to_string() };
            self.audited(&active, event)?;
        }
        self.sign_lists(&active, &mut revocation, next)?;
        drop(revocation);
        self.changes.send_modify(|n| *n += 1);
        Ok(out)
    }

    /// Whether this CA has revoked a certificate, by the serial number that its audit log has.
    pub(crate) fn has_revoked(&self, serial: &str) -> bool {
        self.revocation().records.has(&revocation::serial(serial))
    }

    /// Whether a workload's token that was issued then is accepted.
    pub(crate) fn takes_token(&self, namespace: &str, account: &str, issued_at: u64) -> bool {
        self.revocation().records.takes_token(namespace, account, issued_at)
    }

    /// Signs the lists anew once they are old enough; answers whether they were.
    ///
    /// # Errors
    /// Those of signing and of the file system.
    pub fn refresh_lists(&self) -> Result<bool, AuthorityError> {
        let _alone = self.alone();
        let active = self.active()?;
        let mut revocation = self.revocation();
        let fresh = |t: SystemTime| SystemTime::now().duration_since(t).is_ok_and(|age| age < REFRESH);
        if revocation.signed.is_some_and(fresh) {
            return Ok(false);
        }
        let records = revocation.records.clone();
        self.sign_lists(&active, &mut revocation, records)?;
        drop(revocation);
        self.changes.send_modify(|n| *n += 1);
        Ok(true)
    }

    pub(super) fn revocation(&self) -> std::sync::MutexGuard<'_, Revocation> {
        self.revocation.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Signs lists of what is revoked by every authority whose key is here, and keeps both.
    pub(super) fn sign_lists(
        &self,
        active: &Active,
        revocation: &mut Revocation,
        mut records: Records,
    ) -> Result<(), AuthorityError> {
        let now = SystemTime::now();
        records.prune(audit::seconds(now), token::MAX_TTL);
        records.number += 1;
        // As long as anything that was signed before the next one: whoever counts lists that are too old as none cuts nobody off.
        let holds = HOLDS.max(self.workload_ttl + 2 * REFRESH);
        let mut lists = active.lists(&records, now + holds)?;
        lists.extend(records.former.iter().map(|f| f.list.clone()));
        // On the disk before anybody is told: a number is never given to two lists.
        self.dir.save_revoked(&records)?;
        *revocation = Revocation { records, lists, signed: Some(now) };
        Ok(())
    }

    /// The intermediate is replaced: what it signed is still out there.
    pub(super) fn succeed(&self, old: &Active) -> Result<Records, AuthorityError> {
        let mut records = self.revocation().records.clone();
        let until = (SystemTime::now() + self.workload_ttl).min(old.status.not_after);
        records.number += 1;
        if let Some(list) = old.own_list(&records, until + Duration::from_secs(3600))? {
            records.former.push(Former { list, until: audit::seconds(until) });
        }
        Ok(records)
    }
}

fn of_this_domain<'a>(id: &'a SpiffeId, active: &Active) -> Result<(&'a str, &'a str), AuthorityError> {
    let of = id.namespace_and_account().filter(|_| id.trust_domain() == active.status.trust_domain.as_str());
    of.ok_or_else(|| {
        AuthorityError::BadRequest(format!(
            "{id} is no workload of trust domain {}",
            active.status.trust_domain
        ))
    })
}

impl Active {
    /// A list of each authority whose key is here.
    fn lists(&self, records: &Records, until: SystemTime) -> Result<Vec<RevocationList>, AuthorityError> {
        let mut lists: Vec<_> = self.own_list(records, until)?.into_iter().collect();
        let mut of_root = |issuer: &Issuer<'_, KeyPair>, der: &rustls_pki_types::CertificateDer<'_>| {
            let number = records.number;
            let list = signed(issuer, der, number, records.by(""), until)?;
            if let Some(list) = list {
                lists.push(RevocationList { issuer: certificate_pem(der), list });
            }
            Ok::<_, AuthorityError>(())
        };
        if let (Some(root), Some(der)) = (&self.root, self.roots.first()) {
            of_root(&root.issuer, der)?;
        }
        // While the root is replaced there are two.
        if let Some(key) = &self.files.other_key {
            let key = KeyPair::from_pem(key)?;
            if let Some(der) = self.roots.iter().find(|r| rotate::belongs(&key, r)) {
                of_root(&Issuer::from_ca_cert_der(der, key)?, der)?;
            }
        }
        Ok(lists)
    }

    /// That of this cluster's intermediate.
    fn own_list(
        &self,
        records: &Records,
        until: SystemTime,
    ) -> Result<Option<RevocationList>, AuthorityError> {
        let chain = pem_certificates("cert-chain.pem", self.status.chain_pem.as_bytes())?;
        let Some(der) = chain.first() else { return Ok(None) };
        let until = until.min(self.status.not_after);
        let list = signed(&self.issuer, der, records.number, records.by(&root_pin(der)), until)?;
        Ok(list.map(|list| RevocationList { issuer: self.status.chain_pem.clone(), list }))
    }
}

/// A list, PEM; none of an authority that may not sign any.
fn signed<'a>(
    issuer: &Issuer<'_, KeyPair>,
    cert: &[u8],
    number: u64,
    revoked: impl Iterator<Item = &'a Revoked>,
    until: SystemTime,
) -> Result<Option<String>, AuthorityError> {
    let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(seconds);
    let revoked_certs = revoked
        .filter_map(|r| {
            Some(RevokedCertParams {
                serial_number: SerialNumber::from_slice(&bytes(&r.serial)?),
                revocation_time: at(r.at).into(),
                reason_code: r.reason.code(),
                invalidity_date: None,
            })
        })
        .collect();
    let params = CertificateRevocationListParams {
        this_update: (SystemTime::now() - BACKDATE).into(),
        next_update: until.into(),
        crl_number: number.into(),
        issuing_distribution_point: None,
        revoked_certs,
        key_identifier_method: key_id(cert),
    };
    match params.signed_by(issuer) {
        Ok(list) => {
            let pem = list.pem()?;
            if pem.len() > MAX_LIST {
                return Err(AuthorityError::Refused(format!(
                    "a revocation list would be over {MAX_LIST} bytes"
                )));
            }
            Ok(Some(pem))
        }
        Err(rcgen::Error::IssuerNotCrlSigner) if number > 0 => {
            tracing::warn!(
                "a CA certificate that was plugged in lacks the key usage cRLSign: it can revoke nothing"
            );
            Ok(None)
        }
        Err(e) => Err(e.into()),
    }
}

/// The key identifier that the issuer's certificate has, by which some find the list: others than we make them otherwise.
fn key_id(cert: &[u8]) -> KeyIdMethod {
    let found = X509Certificate::from_der(cert).ok().and_then(|(_, c)| {
        c.extensions().iter().find_map(|e| match e.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
            _ => None,
        })
    });
    found.map_or(KeyIdMethod::Sha256, KeyIdMethod::PreSpecified)
}

fn bytes(hex: &str) -> Option<Vec<u8>> {
    if hex.is_empty() || hex.len() % 2 == 1 {
        return None;
    }
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(hex.get(i..i + 2)?, 16).ok()).collect()
}

#[cfg(test)]
mod tests;

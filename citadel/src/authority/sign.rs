//! What the CA signs: workloads with the cluster's intermediate, and intermediates with the root.

use std::time::{Duration, SystemTime};

use mesh_model::{ClusterId, SpiffeId, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData as _, SanType, SerialNumber,
};

use super::{Active, Authority, AuthorityError, AuthorityStatus, Issued, RootKey, split_pem};
use crate::{
    audit::{self, Event, Proof},
    csr,
    store::Secret,
};

/// Certificates are valid from this long ago, so that clocks need not agree to the second.
pub(super) const BACKDATE: Duration = Duration::from_secs(300);
/// Lifetime of a root made by founding a mesh.
const ROOT_TTL: Duration = Duration::from_secs(10 * 365 * 86_400);
/// Lifetime of an intermediate.
const INTERMEDIATE_TTL: Duration = Duration::from_secs(365 * 86_400);

impl Authority {
    /// Signs another cluster's intermediate: `(chain, bundle)`.
    ///
    /// # Errors
    /// [`AuthorityError::NoRootKey`] where the root key is not; [`AuthorityError::Refused`] for this
    /// cluster's own name.
    pub fn sign_intermediate(
        &self,
        csr_pem: &str,
        cluster: &ClusterId,
    ) -> Result<(String, AuthorityStatus), AuthorityError> {
        self.sign_intermediate_for(csr_pem, cluster, &Proof::default())
    }

    /// The same, and says in the audit log on what proof.
    ///
    /// # Errors
    /// As [`Self::sign_intermediate`], and if it cannot be written there.
    pub fn sign_intermediate_for(
        &self,
        csr_pem: &str,
        cluster: &ClusterId,
        proof: &Proof,
    ) -> Result<(String, AuthorityStatus), AuthorityError> {
        let active = self.active()?;
        let root = active.root.as_ref().ok_or(AuthorityError::NoRootKey)?;
        if cluster == &self.cluster {
            return Err(AuthorityError::Refused(format!(
                "cluster {cluster} is this cluster; the newcomer needs another name"
            )));
        }
        let mut request = csr::parse(csr_pem)?;
        request.params = intermediate_params(&active.status.trust_domain, cluster, root.not_after)?;
        let event = Event::Intermediate {
            serial: request.params.serial_number.as_ref().map(hex_serial).unwrap_or_default(),
            cluster: cluster.to_string(),
            proof: proof.clone(),
            key: audit::sha256(request.public_key.der_bytes()),
            not_after: u64::try_from(request.params.not_after.unix_timestamp()).unwrap_or_default(),
        };
        let cert = request.signed_by(&root.issuer)?.pem();
        self.audited(&active, event)?;
        tracing::info!(target: "audit", %cluster, root = %active.status.root_pin, "signed an intermediate");
        Ok((cert, active.status.clone()))
    }

    /// Signs a workload certificate for an identity that the caller has proved.
    ///
    /// `ttl` of zero means the default.
    ///
    /// # Errors
    /// [`AuthorityError::BadRequest`] for a lifetime over the maximum or a bad request,
    /// [`AuthorityError::Refused`] for an identity of another trust domain.
    pub fn issue(
        &self,
        csr_pem: &str,
        identity: &SpiffeId,
        ttl: Duration,
        proof: &str,
    ) -> Result<Issued, AuthorityError> {
        self.issue_for(csr_pem, identity, ttl, &Proof::of(proof))
    }

    /// The same, with more to say of the proof in the audit log.
    ///
    /// # Errors
    /// As [`Self::issue`], and if it cannot be written there: what is not written is not issued.
    pub fn issue_for(
        &self,
        csr_pem: &str,
        identity: &SpiffeId,
        ttl: Duration,
        proof: &Proof,
    ) -> Result<Issued, AuthorityError> {
        self.sign_leaf(csr_pem, identity, ttl, &[], proof, Self::audited)
    }

    /// The same for the probe, whose certificates are handed to nobody.
    pub(crate) fn issue_probe(
        &self,
        csr_pem: &str,
        identity: &SpiffeId,
        ttl: Duration,
    ) -> Result<Issued, AuthorityError> {
        self.sign_leaf(csr_pem, identity, ttl, &[], &Proof::of("probe"), Self::probed)
    }

    /// Signs the control plane's own certificate, which also carries DNS names for foreign proxies.
    pub(crate) fn issue_control_plane(
        &self,
        csr_pem: &str,
        id: &SpiffeId,
        dns: &[String],
    ) -> Result<Issued, AuthorityError> {
        self.sign_leaf(csr_pem, id, Duration::ZERO, dns, &Proof::of("control plane"), Self::audited)
    }

    fn sign_leaf(
        &self,
        csr_pem: &str,
        identity: &SpiffeId,
        ttl: Duration,
        dns: &[String],
        proof: &Proof,
        note: fn(&Self, &Active, Event) -> Result<(), AuthorityError>,
    ) -> Result<Issued, AuthorityError> {
        let active = self.active()?;
        if identity.trust_domain() != active.status.trust_domain.as_str() {
            return Err(AuthorityError::Refused(format!(
                "{identity} is not of trust domain {}",
                active.status.trust_domain
            )));
        }
        if ttl > self.workload_ttl {
            return Err(AuthorityError::BadRequest(format!(
                "a lifetime of {} s is over the maximum of {} s",
                ttl.as_secs(),
                self.workload_ttl.as_secs()
            )));
        }
        let ttl = if ttl.is_zero() { self.workload_ttl } else { ttl };
        let now = SystemTime::now();
        // A leaf never outlives its issuer.
        let not_after = (now + ttl).min(active.status.not_after);
        let mut request = csr::parse(csr_pem)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.not_before = (now - BACKDATE).into();
        params.not_after = not_after.into();
        params.serial_number = Some(serial());
        params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into()?)];
        for name in dns {
            params.subject_alt_names.push(match name.parse() {
                Ok(ip) => SanType::IpAddress(ip),
                Err(_) => SanType::DnsName(name.as_str().try_into()?),
            });
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let hex = params.serial_number.as_ref().map(hex_serial).unwrap_or_default();
        request.params = params;
        let key = audit::sha256(request.public_key.der_bytes());
        let leaf = request.signed_by(&active.issuer)?.pem();
        let event = Event::Issued {
            serial: hex.clone(),
            identity: identity.to_string(),
            proof: proof.clone(),
            key,
            not_before: audit::seconds(now - BACKDATE),
            not_after: audit::seconds(not_after),
        };
        note(self, &active, event)?;
        let proof = &proof.kind;
        tracing::info!(target: "audit", %identity, serial = %hex, proof, cluster = %self.cluster, "issued");
        let mut chain = vec![leaf];
        chain.extend(split_pem(&active.status.chain_pem));
        chain.push(active.status.bundle_pem.clone());
        Ok(Issued { chain, not_after, serial: hex })
    }
}

impl RootKey {
    pub(super) fn new(cert_pem: &str, key_pem: &str) -> Result<Self, AuthorityError> {
        let not_after = mesh_identity::certificate_info(cert_pem.as_bytes())?.not_after;
        Ok(Self { issuer: Issuer::from_ca_cert_pem(cert_pem, KeyPair::from_pem(key_pem)?)?, not_after })
    }
}

/// A new root: certificate and key.
pub(super) fn new_root(trust_domain: &TrustDomain) -> Result<(String, Secret), AuthorityError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = base_params(SystemTime::now() + ROOT_TTL)?;
    params.distinguished_name.push(DnType::OrganizationName, trust_domain.as_str());
    // Roots that follow each other have different names, for whoever finds an issuer by its name.
    let number = params.serial_number.as_ref().map(hex_serial).unwrap_or_default();
    let name = format!("Flotilla root of {trust_domain} ({})", &number[..number.len().min(8)]);
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok((params.self_signed(&key)?.pem(), key.serialize_pem().into()))
}

/// An intermediate with a new key: certificate and key.
pub(super) fn new_intermediate(
    td: &TrustDomain,
    cluster: &ClusterId,
    root: &RootKey,
) -> Result<(String, Secret), AuthorityError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let cert = intermediate_params(td, cluster, root.not_after)?.signed_by(&key, &root.issuer)?.pem();
    Ok((cert, key.serialize_pem().into()))
}

pub(super) fn base_params(not_after: SystemTime) -> Result<CertificateParams, AuthorityError> {
    let now = SystemTime::now();
    let mut p = CertificateParams::default();
    p.distinguished_name = DistinguishedName::new();
    p.not_before = (now - BACKDATE).into();
    p.not_after = not_after.into();
    p.serial_number = Some(serial());
    Ok(p)
}

pub(super) fn intermediate_params(
    td: &TrustDomain,
    cluster: &ClusterId,
    issuer_ends: SystemTime,
) -> Result<CertificateParams, AuthorityError> {
    let mut p = base_params((SystemTime::now() + INTERMEDIATE_TTL).min(issuer_ends))?;
    p.distinguished_name.push(DnType::OrganizationName, td.as_str());
    p.distinguished_name.push(DnType::CommonName, format!("Flotilla cluster {cluster}"));
    p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    p.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    p.subject_alt_names = vec![SanType::URI(SpiffeId::cluster(td, cluster).as_str().try_into()?)];
    p.use_authority_key_identifier_extension = true;
    Ok(p)
}

/// 16 random bytes with the top bit clear (RFC 5280 section 4.1.2.2: positive, at most 20 octets).
pub(super) fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

pub(super) fn hex_serial(s: &SerialNumber) -> String {
    s.to_bytes().iter().map(|b| format!("{b:02x}")).collect()
}

//! Certificate verification against the store's current trust.
//!
//! Rules, beyond RFC 5280 path building (which webpki does):
//! 1. Any of the configured SAN conditions must hold for a URI or DNS SAN of the leaf; without
//!    conditions any name will do.
//! 2. Under the mesh's trust bundle the leaf must be an X509-SVID: exactly one URI SAN, a valid
//!    SPIFFE ID.
//! 3. Under the mesh's trust bundle an intermediate binds its cluster: it must be the first
//!    certificate after the leaf, and leaf and intermediate must be of one trust domain. This is the
//!    name constraint of the design, enforced here because webpki refuses every certificate below a
//!    CA with a URI name constraint extension instead of processing it.
//! 4. Each trust domain has roots of its own: the domain in the leaf's name chooses them, and no other root can vouch
//!    for it. A domain without a bundle is refused before any chain is built.
//! 5. A domain that one is federated with speaks for its clusters alone: the intermediate must be there and name one
//!    that is known to be of that domain, and the own domain's may not name such a one.
//! 6. A domain that is known by its bundle alone has no clusters: its intermediates need no name, as those of other makes
//!    have none, and may not name a cluster, which others would take for one of the mesh.
//! 7. Under the mesh's trust bundle nothing is accepted that its issuer has revoked (`revocation.rs`).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use arc_swap::ArcSwapOption;
use aws_lc_rs::digest::{SHA256, digest};
use mesh_model::{
    ClusterId, SpiffeId,
    proxy::{CertificatePin, StringMatch, StringMatchKind},
};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, RevocationCheckDepth,
    RevocationOptionsBuilder, UnknownStatusPolicy,
};

use crate::{CertificateIds, Revocations, peer::issuer_spiffe};

/// Roots of one trust entry.
pub(crate) enum Trust {
    /// For whoever they vouch for.
    ///
    /// If there are revocation lists, one of each issuer in the chain is wanted.
    Roots(Vec<TrustAnchor<'static>>, Vec<CertRevocationList<'static>>),
    /// By trust domain.
    Domains(BTreeMap<String, DomainTrust>),
}

/// Roots of one trust domain.
#[derive(Clone)]
pub(crate) struct DomainTrust {
    pub(crate) anchors: Vec<TrustAnchor<'static>>,
    /// When the roots end, seconds since the epoch: webpki does not look.
    pub(crate) ends: Vec<u64>,
    /// The domain's clusters; `None` for the own domain, which is free to have others, and for one that is known by its
    /// bundle alone.
    pub(crate) clusters: Option<BTreeSet<ClusterId>>,
    /// It is another domain than the own one.
    pub(crate) foreign: bool,
}

impl DomainTrust {
    /// Rule 6.
    fn by_bundle(&self) -> bool {
        self.foreign && self.clusters.is_none()
    }
}

/// Why a certificate of another trust domain is refused, where rustls has no word for it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrustRefusal {
    /// Nothing is known of the domain.
    #[error("there is no trust bundle of {0} here")]
    NoBundle(String),
    /// What is known is too old.
    #[error("every root in the trust bundle of {0} has expired")]
    Expired(String),
    /// The cluster is not one that speaks for the domain.
    #[error("cluster {cluster} is not known to be of trust domain {domain}")]
    Cluster {
        /// Of the certificate.
        domain: String,
        /// Of the intermediate; `(none)` without one.
        cluster: String,
    },
}

impl From<TrustRefusal> for Error {
    fn from(r: TrustRefusal) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(r))))
    }
}

/// The refusal in a handshake's error, if it is one of these.
#[must_use]
pub fn trust_refusal(e: &Error) -> Option<&TrustRefusal> {
    match e {
        Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) => inner.downcast_ref(),
        _ => None,
    }
}

/// A trust entry that may be replaced at any time; `None` until it is first set.
pub(crate) type TrustCell = Arc<ArcSwapOption<Trust>>;

pub(crate) struct Verifier {
    pub(crate) provider: Arc<CryptoProvider>,
    /// `None` verifies signatures only.
    pub(crate) trust: Option<TrustCell>,
    pub(crate) sans: Vec<StringMatch>,
    /// Apply the SVID rules.
    pub(crate) svid: bool,
    pub(crate) revocations: Arc<Revocations>,
    /// A server that asks without insisting.
    pub(crate) optional: bool,
    /// Without conditions for names, a server is to show the one that it was asked for.
    pub(crate) by_name: bool,
    /// One of these, if there are any.
    pub(crate) pins: Vec<CertificatePin>,
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verifier").field("sans", &self.sans).field("svid", &self.svid).finish_non_exhaustive()
    }
}

fn refused() -> Error {
    Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
}

fn webpki_error(e: webpki::Error) -> Error {
    use webpki::Error as W;
    Error::InvalidCertificate(match e {
        W::CertExpired { .. } => CertificateError::Expired,
        W::CertNotValidYet { .. } => CertificateError::NotValidYet,
        W::UnknownIssuer => CertificateError::UnknownIssuer,
        W::CertRevoked => CertificateError::Revoked,
        W::UnknownRevocationStatus => CertificateError::UnknownRevocationStatus,
        W::CrlExpired { .. } => CertificateError::ExpiredRevocationList,
        W::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        W::CertNotValidForName(_) => CertificateError::NotValidForName,
        _ => CertificateError::BadEncoding,
    })
}

impl Verifier {
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
        name: Option<&ServerName<'_>>,
    ) -> Result<(), Error> {
        let cert = EndEntityCert::try_from(leaf).map_err(webpki_error)?;
        if let Some(cell) = &self.trust {
            let trust = cell.load();
            // An entry that was not delivered yet trusts nobody.
            let trust = trust.as_ref().ok_or(Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
            self.chain(&cert, trust, intermediates, now, usage)?;
            if self.svid && !self.revocations.is_empty() {
                let shown = CertificateIds::of(std::iter::once(leaf).chain(intermediates));
                if self.revocations.revoked(&shown) {
                    return Err(Error::InvalidCertificate(CertificateError::Revoked));
                }
            }
        }
        if !self.pins.is_empty() && !self.is_pinned(leaf, &cert) {
            return Err(refused());
        }
        let allowed = (self.sans.is_empty() && !self.by_name)
            || (self.by_name && name.is_some_and(|n| cert.verify_is_valid_for_subject_name(n).is_ok()))
            || cert.valid_uri_names().any(|n| self.sans.iter().any(|m| san_matches(m, n)))
            || cert.valid_dns_names().any(|n| self.sans.iter().any(|m| san_matches(m, n)));
        if allowed { Ok(()) } else { Err(Error::InvalidCertificate(CertificateError::NotValidForName)) }
    }

    /// Whether the certificate is one of those that are known beforehand.
    fn is_pinned(&self, leaf: &CertificateDer<'_>, cert: &EndEntityCert<'_>) -> bool {
        let hash = |der: &[u8], pin: &[u8; 32]| digest(&SHA256, der).as_ref() == pin;
        let key = cert.subject_public_key_info();
        self.pins.iter().any(|pin| match pin {
            CertificatePin::Whole(h) => hash(leaf, h),
            CertificatePin::PublicKey(h) => hash(key.as_ref(), h),
        })
    }

    fn chain(
        &self,
        cert: &EndEntityCert<'_>,
        trust: &Trust,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<(), Error> {
        let build = |anchors: &[TrustAnchor<'static>], lists: &[CertRevocationList<'static>]| {
            let lists: Vec<_> = lists.iter().collect();
            // Without any there is nothing to look at.
            let revocation = RevocationOptionsBuilder::new(&lists).ok().map(|b| {
                b.with_depth(RevocationCheckDepth::Chain)
                    .with_status_policy(UnknownStatusPolicy::Deny)
                    .with_expiration_policy(ExpirationPolicy::Enforce)
                    .build()
            });
            let algorithms = self.provider.signature_verification_algorithms.all;
            let path = cert
                .verify_for_usage(algorithms, anchors, intermediates, now, usage, revocation, None)
                .map_err(webpki_error)?;
            let issuer = path.intermediate_certificates().next().map(|i| i.der().to_vec());
            Ok::<_, Error>(issuer)
        };
        if !self.svid {
            return match trust {
                Trust::Roots(anchors, lists) => build(anchors, lists).map(drop),
                // Such an entry is for names of the mesh alone.
                Trust::Domains(_) => Err(refused()),
            };
        }
        let mut uris = cert.valid_uri_names();
        let id = match (uris.next(), uris.next()) {
            (Some(one), None) => SpiffeId::parse(one).map_err(|_| refused())?,
            _ => return Err(refused()),
        };
        let (issuer, domains) = match trust {
            Trust::Roots(anchors, lists) => (build(anchors, lists)?, None),
            Trust::Domains(domains) => {
                let name = || id.trust_domain().to_owned();
                let domain = domains.get(id.trust_domain()).ok_or_else(|| TrustRefusal::NoBundle(name()))?;
                let issuer = if domain.ends.iter().all(|end| *end > now.as_secs()) {
                    build(&domain.anchors, &[])?
                } else {
                    let live =
                        domain.anchors.iter().zip(&domain.ends).filter(|(_, end)| **end > now.as_secs());
                    let live: Vec<_> = live.map(|(a, _)| a.clone()).collect();
                    if live.is_empty() {
                        return Err(TrustRefusal::Expired(name()).into());
                    }
                    build(&live, &[])?
                };
                (issuer, Some((domains, domain)))
            }
        };
        let cluster = match issuer {
            None => None,
            Some(issuer) => {
                if intermediates.first().map(AsRef::as_ref) != Some(issuer.as_slice()) {
                    return Err(refused());
                }
                match issuer_spiffe(&CertificateDer::from(issuer)) {
                    None if domains.is_some_and(|(_, d)| d.by_bundle()) => None,
                    Some(bound) if bound.trust_domain() == id.trust_domain() => bound.cluster_id(),
                    _ => return Err(refused()),
                }
            }
        };
        let Some((domains, domain)) = domains else { return Ok(()) };
        let known = match (&domain.clusters, &cluster) {
            (Some(clusters), Some(c)) => clusters.contains(c),
            (Some(_), None) => false,
            (None, Some(_)) if domain.foreign => false,
            (None, Some(c)) => !domains.values().filter_map(|d| d.clusters.as_ref()).any(|of| of.contains(c)),
            (None, None) => true,
        };
        if known {
            return Ok(());
        }
        let cluster = cluster.map_or_else(|| "(none)".to_owned(), |c| c.to_string());
        Err(TrustRefusal::Cluster { domain: id.trust_domain().to_owned(), cluster }.into())
    }
}

/// Regular expressions are refused when the configuration is built, so they never match here.
fn san_matches(m: &StringMatch, name: &str) -> bool {
    let fold = |s: &str| if m.ignore_case { s.to_ascii_lowercase() } else { s.to_owned() };
    let name = fold(name);
    match &m.kind {
        StringMatchKind::Exact(p) => name == fold(p),
        StringMatchKind::Prefix(p) => name.starts_with(&fold(p)),
        StringMatchKind::Suffix(p) => name.ends_with(&fold(p)),
        StringMatchKind::Contains(p) => name.contains(&fold(p)),
        StringMatchKind::Regex(_) => false,
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(end_entity, intermediates, now, KeyUsage::server_auth(), Some(server_name))?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Hints would pin the roots of the moment a configuration was built; clients of a mesh have
        // one identity and need none.
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        !self.optional
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity, intermediates, now, KeyUsage::client_auth(), None)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ServerCertVerifier::verify_tls12_signature(self, message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ServerCertVerifier::verify_tls13_signature(self, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ServerCertVerifier::supported_verify_schemes(self)
    }
}

//! Secrets.

use std::fmt;

use envoy_types::pb::envoy::config::core::v3 as core;

use super::{
    Bad, Res,
    common::any,
    refuse,
    tls::pb::{
        self, CertificateValidationContext, TlsCertificate, spiffe_cert_validator_config::TrustDomain,
    },
};

/// A secret as SDS carries it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    /// Resource name: `default`, `ROOTCA`, `kubernetes://<name>`.
    pub name: String,
    /// Content.
    pub kind: SecretKind,
}

/// Content of a [`Secret`].
#[derive(Clone, PartialEq, Eq)]
pub enum SecretKind {
    /// A certificate and its key.
    Certificate {
        /// PEM, leaf first.
        chain: Vec<u8>,
        /// PEM, PKCS#8.
        key: Vec<u8>,
    },
    /// Trusted roots, PEM.
    Roots(Vec<u8>),
    /// The same with revocation lists, PEM. For proxies that are not ours; it is encoded only.
    RootsAndLists {
        /// PEM.
        roots: Vec<u8>,
        /// PEM: one of each issuer of a workload's certificate, and unless `leaf_only` of each above it.
        lists: Vec<u8>,
        /// Only the workload's own certificate is looked for on them.
        leaf_only: bool,
    },
    /// Trusted roots of each trust domain, PEM: Envoy's SPIFFE certificate validator. For proxies that are not ours; it is
    /// encoded only.
    Domains(Vec<(String, Vec<u8>)>),
}

impl fmt::Debug for Secret {
    /// Never the content.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            SecretKind::Certificate { .. } => "certificate",
            SecretKind::Roots(_) => "roots",
            SecretKind::RootsAndLists { .. } => "roots and revocation lists",
            SecretKind::Domains(_) => "roots by trust domain",
        };
        f.debug_struct("Secret").field("name", &self.name).field("kind", &kind).finish_non_exhaustive()
    }
}

fn inline(bytes: &[u8]) -> Option<core::DataSource> {
    Some(core::DataSource {
        specifier: Some(core::data_source::Specifier::InlineBytes(bytes.to_vec())),
        ..Default::default()
    })
}

fn to_inline(d: Option<core::DataSource>, field: &str) -> Res<Vec<u8>> {
    match d.and_then(|d| d.specifier) {
        Some(core::data_source::Specifier::InlineBytes(b)) => Ok(b),
        Some(core::data_source::Specifier::InlineString(s)) => Ok(s.into_bytes()),
        // Read once, now: whoever sends the name sends it again when the content changes.
        Some(core::data_source::Specifier::Filename(name)) => {
            std::fs::read(&name).map_err(|e| Bad::new(field, format!("{name}: {e}")))
        }
        None => Err(Bad::new(field, "is missing")),
        Some(_) => Err(Bad::unsupported(field, "a secret from the environment")),
    }
}

/// Chooses the roots by the trust domain in the leaf's name, as our own proxies do.
fn spiffe(domains: &[(String, Vec<u8>)]) -> core::TypedExtensionConfig {
    let trust_domains = domains.iter().map(|(name, pem)| TrustDomain {
        name: name.clone(),
        trust_bundle: inline(pem),
        ..Default::default()
    });
    let config =
        pb::SpiffeCertValidatorConfig { trust_domains: trust_domains.collect(), ..Default::default() };
    core::TypedExtensionConfig {
        name: "envoy.tls.cert_validator.spiffe".to_owned(),
        typed_config: Some(any(&config)),
    }
}

pub(super) fn encode(s: &Secret) -> pb::Secret {
    let kind = match &s.kind {
        SecretKind::Certificate { chain, key } => pb::secret::Type::TlsCertificate(TlsCertificate {
            certificate_chain: inline(chain),
            private_key: inline(key),
            ..Default::default()
        }),
        SecretKind::Roots(pem) => pb::secret::Type::ValidationContext(CertificateValidationContext {
            trusted_ca: inline(pem),
            ..Default::default()
        }),
        SecretKind::RootsAndLists { roots, lists, leaf_only } => {
            pb::secret::Type::ValidationContext(CertificateValidationContext {
                trusted_ca: inline(roots),
                crl: inline(lists),
                only_verify_leaf_cert_crl: *leaf_only,
                ..Default::default()
            })
        }
        SecretKind::Domains(domains) => pb::secret::Type::ValidationContext(CertificateValidationContext {
            custom_validator_config: Some(spiffe(domains)),
            ..Default::default()
        }),
    };
    pb::Secret { name: s.name.clone(), r#type: Some(kind) }
}

pub(super) fn decode(m: pb::Secret) -> Res<Secret> {
    let kind = match m.r#type {
        Some(pb::secret::Type::TlsCertificate(t)) => {
            refuse!(t; pkcs12, private_key_provider, password);
            SecretKind::Certificate {
                chain: to_inline(t.certificate_chain, "tls_certificate.certificate_chain")?,
                key: to_inline(t.private_key, "tls_certificate.private_key")?,
            }
        }
        Some(pb::secret::Type::ValidationContext(v)) => {
            refuse!(v; crl, custom_validator_config, verify_certificate_hash, verify_certificate_spki);
            SecretKind::Roots(to_inline(v.trusted_ca, "validation_context.trusted_ca")?)
        }
        Some(pb::secret::Type::SessionTicketKeys(_)) => {
            return Err(Bad::unsupported("session_ticket_keys", "a shared session ticket key"));
        }
        Some(pb::secret::Type::GenericSecret(_)) => {
            return Err(Bad::unsupported("generic_secret", "a generic secret"));
        }
        None => return Err(Bad::new("type", "is missing")),
    };
    Ok(Secret { name: m.name, kind })
}

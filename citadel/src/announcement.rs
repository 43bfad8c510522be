//! How the holder of the root key tells the roots of the own trust domain.
//!
//! A bundle with its number and the phase of its rotation, signed by every root whose key the holder has. Whoever holds a
//! bundle believes another one that the first of its own roots has signed, and that has a higher number: members pass on
//! announcements, and none of them can make one. The signature covers the SHA-256 of each root, in their order, and
//! begins with words that no certificate begins with, so that a root signs nothing else by it.

use std::fmt::Write as _;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use mesh_identity::{MAX_DOCUMENT, TrustBundle, crypto_provider, root_pin};
use mesh_model::TrustDomain;
use rcgen::{KeyPair, SigningKey as _};
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{AuthorityError, rotation::Phase};

/// Signatures that are looked at.
const MAX_SIGNATURES: usize = 8;

/// Roots as they are told, checked but for their signatures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Announcement {
    pub(crate) bundle: TrustBundle,
    pub(crate) phase: Phase,
    signatures: Vec<Signature>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Signature {
    /// Pin of the root.
    root: String,
    /// Base64.
    signature: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Text {
    trust_domain: TrustDomain,
    sequence: u64,
    phase: String,
    /// PEM; the first signs.
    roots: String,
    signatures: Vec<Signature>,
}

impl Announcement {
    /// Signs with keys whose roots are named by their pins.
    pub(crate) fn sign(
        bundle: TrustBundle,
        phase: Phase,
        keys: &[(String, &KeyPair)],
    ) -> Result<Self, AuthorityError> {
        let message = message(&bundle, phase);
        let sign = |(root, key): &(String, &KeyPair)| {
            let signature = STANDARD.encode(key.sign(message.as_bytes())?);
            Ok::<_, rcgen::Error>(Signature { root: root.clone(), signature })
        };
        let signatures = keys.iter().map(sign).collect::<Result<_, _>>()?;
        Ok(Self { bundle, phase, signatures })
    }

    /// Reads what [`Self::text`] made.
    pub(crate) fn parse(text: &str) -> Result<Self, AuthorityError> {
        let bad = |e: String| AuthorityError::BadRequest(format!("announcement of roots: {e}"));
        if text.len() > 2 * MAX_DOCUMENT {
            return Err(bad(format!("is longer than {} bytes", 2 * MAX_DOCUMENT)));
        }
        let t: Text = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
        let phase = t.phase.parse().map_err(bad)?;
        let bundle = TrustBundle::from_pem(t.trust_domain, t.roots.as_bytes(), t.sequence, None)
            .map_err(|e| bad(e.to_string()))?;
        if t.sequence == 0 || t.signatures.len() > MAX_SIGNATURES {
            return Err(bad("sequence 0, or too many signatures".into()));
        }
        Ok(Self { bundle, phase, signatures: t.signatures })
    }

    pub(crate) fn text(&self) -> String {
        let text = Text {
            trust_domain: self.bundle.trust_domain.clone(),
            sequence: self.bundle.sequence,
            phase: self.phase.as_str().to_owned(),
            roots: self.bundle.pem(),
            signatures: self.signatures.clone(),
        };
        // Plain data always serialises.
        serde_json::to_string(&text).unwrap_or_default()
    }

    /// Whether a root has signed it.
    pub(crate) fn signed_by(&self, root: &CertificateDer<'_>) -> bool {
        let Ok((_, cert)) = X509Certificate::from_der(root) else { return false };
        let key = cert.public_key().subject_public_key.data.as_ref();
        let (pin, message) = (root_pin(root), message(&self.bundle, self.phase));
        let provider = crypto_provider();
        self.signatures.iter().filter(|s| s.root == pin).any(|s| {
            let Ok(signature) = STANDARD.decode(&s.signature) else { return false };
            // One that is for another kind of key just does not verify.
            provider
                .signature_verification_algorithms
                .all
                .iter()
                .any(|a| a.verify_signature(key, message.as_bytes(), &signature).is_ok())
        })
    }
}

fn message(bundle: &TrustBundle, phase: Phase) -> String {
    let mut out = format!(
        "flotilla roots of a trust domain, 1\n{}\n{}\n{phase}\n",
        bundle.trust_domain, bundle.sequence
    );
    for root in &bundle.roots {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{}", root_pin(root));
    }
    out
}

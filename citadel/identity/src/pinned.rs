//! First contact: a TLS client that trusts one root by its hash and nothing else.

use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwapOption;
use mesh_model::{ClusterId, proxy::StringMatch};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::{
    IdentityError, crypto_provider,
    peer::cluster_of_issuer,
    svid::root_pin,
    verify::{Trust, Verifier},
};

/// A client configuration for a server whose chain ends in a root with a known SHA-256.
#[derive(Debug)]
pub struct PinnedPeer {
    /// For one connection or several.
    pub config: Arc<ClientConfig>,
    reason: Arc<OnceLock<String>>,
}

impl PinnedPeer {
    /// `pin` is the hexadecimal SHA-256 of the root's DER; the server must present the root as the
    /// last certificate, have the SAN `san`, and be certified by the intermediate of `cluster`.
    ///
    /// # Errors
    /// If the TLS provider refuses the configuration.
    pub fn new(pin: &str, san: &str, cluster: ClusterId) -> Result<Self, IdentityError> {
        let reason = Arc::new(OnceLock::new());
        let provider = crypto_provider();
        let verifier = PinnedVerifier {
            pin: pin.to_ascii_lowercase(),
            cluster,
            inner: Verifier {
                provider: provider.clone(),
                trust: None,
                sans: vec![StringMatch::exact(san)],
                svid: true,
                revocations: Arc::default(),
                optional: false,
                by_name: false,
                pins: Vec::new(),
            },
            reason: reason.clone(),
        };
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Self { config: Arc::new(config), reason })
    }

    /// Why a handshake was refused, in words for a person.
    #[must_use]
    pub fn refusal(&self) -> Option<&str> {
        self.reason.get().map(String::as_str)
    }
}

#[derive(Debug)]
struct PinnedVerifier {
    pin: String,
    cluster: ClusterId,
    inner: Verifier,
    reason: Arc<OnceLock<String>>,
}

impl PinnedVerifier {
    fn refuse(&self, why: String) -> Error {
        let _ = self.reason.set(why);
        Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
    }
}

impl ServerCertVerifier for PinnedVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        // While a root is replaced there are two.
        let pinned = intermediates.iter().find(|c| root_pin(c) == self.pin);
        let Some(root) = pinned.or(intermediates.last()) else {
            return Err(self.refuse("the gateway answered without its mesh's root certificate".into()));
        };
        let seen = root_pin(root);
        if seen != self.pin {
            return Err(self.refuse(format!(
                "the gateway belongs to another mesh: its root is {seen}, the token pins {}",
                self.pin
            )));
        }
        let anchor = webpki::anchor_from_trusted_cert(root)
            .map_err(|e| self.refuse(format!("the pinned root cannot be used: {e}")))?
            .to_owned();
        let verifier = Verifier {
            provider: self.inner.provider.clone(),
            trust: Some(Arc::new(ArcSwapOption::from_pointee(Trust::Roots(vec![anchor], vec![])))),
            sans: self.inner.sans.clone(),
            svid: true,
            revocations: Arc::default(),
            optional: false,
            by_name: false,
            pins: Vec::new(),
        };
        verifier
            .verify_server_cert(end_entity, intermediates, name, ocsp, now)
            .map_err(|e| self.refuse(format!("the gateway's certificate is not valid: {e}")))?;
        match intermediates.first().and_then(cluster_of_issuer) {
            Some(c) if c == self.cluster => Ok(ServerCertVerified::assertion()),
            other => Err(self.refuse(format!(
                "the gateway leads to cluster {}, the token is of cluster {}",
                other.map_or_else(|| "(none)".to_owned(), |c| c.to_string()),
                self.cluster
            ))),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ServerCertVerifier::verify_tls12_signature(&self.inner, message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ServerCertVerifier::verify_tls13_signature(&self.inner, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ServerCertVerifier::supported_verify_schemes(&self.inner)
    }
}

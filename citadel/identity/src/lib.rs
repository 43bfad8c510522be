//! SVIDs, trust bundles and the TLS configurations made from them.
//!
//! The invariant of this crate: a rotation is one atomic swap of a [`SecretStore`] entry. Every
//! rustls configuration handed out before sees it at its next handshake, sessions that could be
//! resumed under the old trust are forgotten, and no established connection is touched. Private keys
//! live in memory inside rustls' signing keys and are never formatted.
//!
//! What it deliberately does not do: talk to anyone. Getting a certificate signed is citadel's and
//! the sidecar's business.

mod bundle;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod offer;
mod peer;
mod pinned;
mod revocation;
mod session;
mod store;
mod svid;
mod verify;

pub use bundle::{MAX_DOCUMENT, TrustBundle, certificate_pem};
pub use error::IdentityError;
pub use peer::{PeerIdentity, peer_identity};
pub use pinned::PinnedPeer;
pub use revocation::{CertificateIds, Ends, MAX_LIST, Revocations, SignedList, revoked_digest, told_revoked};
pub use store::{FEDERATION_SVID, ForeignTrust, SecretStore, TRUST_BUNDLE, WORKLOAD_SVID};
pub use svid::{CertificateInfo, PendingSvid, certificate_info, not_after, pem_certificates, root_pin};
pub use verify::{TrustRefusal, trust_refusal};

/// The process-wide crypto provider: aws-lc-rs, which offers X25519MLKEM768.
#[must_use]
pub fn crypto_provider() -> std::sync::Arc<rustls::crypto::CryptoProvider> {
    use std::sync::OnceLock;
    static PROVIDER: OnceLock<std::sync::Arc<rustls::crypto::CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider())).clone()
}

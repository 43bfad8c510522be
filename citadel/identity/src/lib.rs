//! SVIDs, trust bundles and the TLS configurations made from them.
//!
//! The invariant of this crate: a rotation is one atomic swap of a [`SecretStore`] entry, every
//! rustls configuration handed out before sees it at its next handshake, and no connection is
//! touched. Private keys live in memory inside [`CertifiedKey`]s and are never formatted.

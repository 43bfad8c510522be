//! What a TLS server offers: versions, cipher suites, groups of the key exchange, and one of several certificates.

use std::sync::Arc;

use mesh_model::proxy::{DownstreamTls, TlsVersion};
use rustls::{
    CipherSuite, NamedGroup, SignatureAlgorithm, SupportedCipherSuite, SupportedProtocolVersion,
    crypto::CryptoProvider,
    server::{ClientHello, ParsedCertificate, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::ServerName;

use crate::{IdentityError, store::IdentityCell};

/// OpenSSL's names of the suites of TLS 1.2 that there are.
const SUITES: [(&str, CipherSuite); 6] = [
    ("ECDHE-ECDSA-AES128-GCM-SHA256", CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256),
    ("ECDHE-RSA-AES128-GCM-SHA256", CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256),
    ("ECDHE-ECDSA-AES256-GCM-SHA384", CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384),
    ("ECDHE-RSA-AES256-GCM-SHA384", CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384),
    ("ECDHE-ECDSA-CHACHA20-POLY1305", CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256),
    ("ECDHE-RSA-CHACHA20-POLY1305", CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256),
];

/// BoringSSL's names of the groups that there are.
const CURVES: [(&str, NamedGroup); 4] = [
    ("X25519MLKEM768", NamedGroup::X25519MLKEM768),
    ("X25519", NamedGroup::X25519),
    ("P-256", NamedGroup::secp256r1),
    ("P-384", NamedGroup::secp384r1),
];

/// Versions between a server's lowest and highest.
pub(crate) fn versions(
    tls: &DownstreamTls,
) -> Result<&'static [&'static SupportedProtocolVersion], IdentityError> {
    static BOTH: [&SupportedProtocolVersion; 2] = [&rustls::version::TLS13, &rustls::version::TLS12];
    match (tls.min_version, tls.options.max_version.unwrap_or(TlsVersion::V1_3)) {
        (TlsVersion::V1_2, TlsVersion::V1_3) => Ok(&BOTH),
        (TlsVersion::V1_3, TlsVersion::V1_3) => Ok(&BOTH[..1]),
        (TlsVersion::V1_2, TlsVersion::V1_2) => Ok(&BOTH[1..]),
        (TlsVersion::V1_3, TlsVersion::V1_2) => {
            Err(IdentityError::Settings("the highest TLS version is lower than the lowest".into()))
        }
    }
}

/// The provider with what a server leaves of it.
pub(crate) fn provider(
    all: &Arc<CryptoProvider>,
    tls: &DownstreamTls,
) -> Result<Arc<CryptoProvider>, IdentityError> {
    let (ciphers, curves) = (&tls.options.ciphers, &tls.options.curves);
    if ciphers.is_empty() && curves.is_empty() {
        return Ok(all.clone());
    }
    let mut left = (**all).clone();
    if !ciphers.is_empty() {
        // Those of TLS 1.3 cannot be chosen, in Envoy neither.
        left.cipher_suites.retain(|s| s.tls13().is_some());
        left.cipher_suites.extend(suites(ciphers, &all.cipher_suites));
    }
    if !curves.is_empty() {
        let named = |name: &String| CURVES.iter().find(|(n, _)| n == name).map(|(_, g)| *g);
        let had = |g: NamedGroup| all.kx_groups.iter().copied().find(|k| k.name() == g);
        left.kx_groups = curves.iter().filter_map(named).filter_map(had).collect();
    }
    if left.kx_groups.is_empty() {
        return Err(IdentityError::Settings(format!("none of the curves {} is known", curves.join(", "))));
    }
    Ok(Arc::new(left))
}

/// Suites of TLS 1.2 by a list in OpenSSL's language, of which names, `ALL`, removals (`-`, `!`) and groups of equals
/// (`[A|B]`) are understood.
fn suites(list: &[String], all: &[SupportedCipherSuite]) -> Vec<SupportedCipherSuite> {
    let old: Vec<SupportedCipherSuite> = all.iter().copied().filter(|s| s.tls13().is_none()).collect();
    let mut out: Vec<SupportedCipherSuite> = Vec::new();
    let words = list.iter().flat_map(|entry| entry.split([':', ','])).map(|e| e.trim_matches(['[', ']']));
    for word in words.flat_map(|w| w.split('|')) {
        if let Some(name) = word.strip_prefix(['-', '!']) {
            out.retain(|s| !is_named(s, name));
            continue;
        }
        for s in old.iter().filter(|s| word == "ALL" || is_named(s, word)) {
            if !out.iter().any(|o| o.suite() == s.suite()) {
                out.push(*s);
            }
        }
    }
    out
}

fn is_named(s: &SupportedCipherSuite, name: &str) -> bool {
    SUITES.iter().any(|(n, suite)| *n == name && *suite == s.suite())
}

/// One certificate of several.
pub(crate) struct Choice(pub(crate) Vec<IdentityCell>);

impl std::fmt::Debug for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Choice")
    }
}

impl ResolvesServerCert for Choice {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let there: Vec<Arc<CertifiedKey>> = self.0.iter().filter_map(|c| c.load_full()).collect();
        let name = hello.server_name().and_then(|n| ServerName::try_from(n).ok());
        let rank = |k: &Arc<CertifiedKey>| {
            // What a client cannot verify is of no use to it, whatever its name.
            let verifies = k.key.choose_scheme(hello.signature_schemes()).is_some();
            let named = name.as_ref().is_some_and(|n| is_for(k, n));
            (verifies, named, k.key.algorithm() == SignatureAlgorithm::ECDSA)
        };
        // Of equals the first.
        there.into_iter().rev().max_by_key(rank)
    }
}

fn is_for(k: &CertifiedKey, name: &ServerName<'_>) -> bool {
    let Some(leaf) = k.cert.first() else { return false };
    ParsedCertificate::try_from(leaf).is_ok_and(|c| rustls::client::verify_server_name(&c, name).is_ok())
}

//! Named secrets, and rustls configurations that follow them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwapOption;
use mesh_model::{
    ClusterId, TrustDomain,
    federation::RevocationList,
    proxy::{ClientCertificate, DownstreamTls, SecretRef, StringMatchKind, UpstreamTls, Validation},
};
use rustls::{
    ClientConfig, ServerConfig, SignatureScheme, SupportedProtocolVersion,
    client::{ResolvesClientCert, Resumption},
    crypto::CryptoProvider,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateRevocationListDer, PrivateKeyDer, TrustAnchor, pem::PemObject};
use tokio::sync::watch;
use webpki::{CertRevocationList, OwnedCertRevocationList};

use crate::{
    IdentityError, Revocations, bundle, crypto_provider, offer, pem_certificates,
    session::{ClientSessions, ServerSessions},
    verify::{DomainTrust, Trust, TrustCell, Verifier},
};

/// SDS name of a workload's own certificate and key.
pub const WORKLOAD_SVID: &str = "default";
/// SDS name of the mesh's trust bundle.
pub const TRUST_BUNDLE: &str = "ROOTCA";

/// A control plane's own certificate with the root at the end of its chain, which newcomers that
/// only know the root's hash need to see.
pub const FEDERATION_SVID: &str = "federation";

pub(crate) type IdentityCell = Arc<ArcSwapOption<CertifiedKey>>;

/// Roots of a trust domain that this one is federated with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignTrust {
    /// The domain.
    pub trust_domain: TrustDomain,
    /// PEM.
    pub roots: String,
    /// Clusters that may speak for it; one that its root alone vouches for may not. `None` is a domain that is known by its
    /// bundle alone and has no clusters: certificates of it are accepted that name none.
    pub clusters: Option<BTreeSet<ClusterId>>,
}

/// What [`TRUST_BUNDLE`] is made of.
#[derive(Default)]
struct MeshTrust {
    own: Option<(TrustDomain, DomainTrust)>,
    /// As it was set, and as it is used.
    told: Vec<ForeignTrust>,
    foreign: BTreeMap<String, DomainTrust>,
}

/// Certificates, keys and bundles by SDS name.
///
/// Entries may be referred to before they arrive: handshakes that need them fail until then. All
/// methods are safe to call from any thread; readers take no lock.
pub struct SecretStore {
    provider: Arc<CryptoProvider>,
    cells: Mutex<Cells>,
    mesh: Mutex<MeshTrust>,
    revocations: Arc<Revocations>,
    trust_generation: Arc<AtomicU64>,
    /// Moves with every change: a client must not resume a session that it opened as somebody else,
    /// or as nobody.
    client_generation: Arc<AtomicU64>,
    changes: watch::Sender<u64>,
}

#[derive(Default)]
struct Cells {
    identities: BTreeMap<String, IdentityCell>,
    trusts: BTreeMap<String, TrustCell>,
}

impl std::fmt::Debug for SecretStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SecretStore")
    }
}

impl SecretStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            provider: crypto_provider(),
            cells: Mutex::default(),
            mesh: Mutex::default(),
            revocations: Arc::default(),
            trust_generation: Arc::default(),
            client_generation: Arc::default(),
            changes: watch::Sender::new(0),
        })
    }

    /// Sets or rotates a certificate chain (leaf first) and its key.
    ///
    /// # Errors
    /// If the PEM is damaged or key and certificate do not match; the old entry then stays.
    pub fn set_identity(&self, name: &str, chain_pem: &[u8], key_pem: &[u8]) -> Result<(), IdentityError> {
        let chain = pem_certificates(name, chain_pem)?;
        let key = PrivateKeyDer::from_pem_slice(key_pem).map_err(|_| IdentityError::Pem {
            what: name.to_owned(),
            reason: "holds no private key (PKCS #8, PKCS #1 or SEC 1)".into(),
        })?;
        let signer = self.provider.key_provider.load_private_key(key)?;
        let certified = CertifiedKey::new(chain, signer);
        certified.keys_match().map_err(|_| IdentityError::KeyMismatch(name.to_owned()))?;
        self.identity_cell(name).store(Some(Arc::new(certified)));
        self.changed();
        Ok(())
    }

    /// Sets or replaces a bundle of trusted roots. Sessions verified under the old one can no
    /// longer be resumed.
    ///
    /// # Errors
    /// If the PEM is damaged or holds no usable root; the old entry then stays.
    pub fn set_trust(&self, name: &str, roots_pem: &[u8]) -> Result<(), IdentityError> {
        self.set_trust_and_lists(name, roots_pem, None)
    }

    /// The same with revocation lists, PEM: one of each issuer in a peer's chain, that is not too old, or the peer is refused;
    /// so does Envoy.
    ///
    /// # Errors
    /// As [`Self::set_trust`], and for lists that cannot be read.
    pub fn set_trust_and_lists(
        &self,
        name: &str,
        roots_pem: &[u8],
        lists_pem: Option<&[u8]>,
    ) -> Result<(), IdentityError> {
        let (anchors, _) = anchors(name, roots_pem)?;
        let lists = lists_pem.map(|pem| lists(name, pem)).transpose()?.unwrap_or_default();
        self.trust_cell(name).store(Some(Arc::new(Trust::Roots(anchors, lists))));
        self.trust_changed();
        Ok(())
    }

    /// Sets or replaces the roots of the own trust domain in [`TRUST_BUNDLE`]. They vouch for no name of another.
    ///
    /// # Errors
    /// As [`Self::set_trust`].
    pub fn set_mesh_trust(&self, own: &TrustDomain, roots_pem: &[u8]) -> Result<(), IdentityError> {
        let (anchors, ends) = anchors(TRUST_BUNDLE, roots_pem)?;
        let mut mesh = self.mesh.lock().unwrap_or_else(PoisonError::into_inner);
        mesh.own = Some((own.clone(), DomainTrust { anchors, ends, clusters: None, foreign: false }));
        self.set_domains(&mesh);
        Ok(())
    }

    /// Replaces the roots of all other trust domains in [`TRUST_BUNDLE`]. What is not among them is refused from the next
    /// handshake on, and resumes no session. One that cannot be read is left out, and said to be; so is the own domain,
    /// whose roots are nobody else's to tell.
    ///
    /// # Errors
    /// The first that cannot be used; the others count.
    pub fn set_foreign_trust(&self, domains: Vec<ForeignTrust>) -> Result<(), IdentityError> {
        let mut mesh = self.mesh.lock().unwrap_or_else(PoisonError::into_inner);
        if mesh.told == domains {
            // Nobody's session ends for what did not change.
            return Ok(());
        }
        let mut failed = Ok(());
        mesh.foreign.clear();
        for d in &domains {
            match anchors(d.trust_domain.as_str(), d.roots.as_bytes()) {
                Ok((anchors, ends)) => {
                    let trust = DomainTrust { anchors, ends, clusters: d.clusters.clone(), foreign: true };
                    mesh.foreign.insert(d.trust_domain.to_string(), trust);
                }
                Err(e) if failed.is_ok() => failed = Err(e),
                Err(_) => {}
            }
        }
        mesh.told = domains;
        self.set_domains(&mesh);
        failed
    }

    /// Replaces the revocation lists of a trust domain with these roots (PEM), for [`TRUST_BUNDLE`]. Sessions from before
    /// can no longer be resumed.
    ///
    /// # Errors
    /// The first list that cannot be used; the others count.
    pub fn set_revoked(
        &self,
        domain: &TrustDomain,
        roots_pem: &str,
        lists: &[RevocationList],
    ) -> Result<(), IdentityError> {
        let (changed, result) = self.revocations.set(domain, roots_pem, lists);
        if changed {
            self.trust_changed();
        }
        result
    }

    /// What is revoked, for whoever serves connections.
    #[must_use]
    pub fn revocations(&self) -> Arc<Revocations> {
        self.revocations.clone()
    }

    /// Trust domains whose certificates are accepted as [`TRUST_BUNDLE`], the own one included.
    #[must_use]
    pub fn trust_domains(&self) -> Vec<String> {
        match self.trust_cell(TRUST_BUNDLE).load().as_deref() {
            Some(Trust::Domains(d)) => d.keys().cloned().collect(),
            _ => vec![],
        }
    }

    fn set_domains(&self, mesh: &MeshTrust) {
        // Without roots of its own a process is in no mesh, and nobody's peer.
        let Some((own, trust)) = &mesh.own else { return };
        let mut domains = mesh.foreign.clone();
        domains.insert(own.to_string(), trust.clone());
        self.trust_cell(TRUST_BUNDLE).store(Some(Arc::new(Trust::Domains(domains))));
        self.trust_changed();
    }

    fn trust_changed(&self) {
        self.trust_generation.fetch_add(1, Ordering::AcqRel);
        self.changed();
    }

    /// Whether the named certificate has arrived.
    #[must_use]
    pub fn has_identity(&self, name: &str) -> bool {
        self.identity_cell(name).load().is_some()
    }

    /// Whether the named bundle has arrived.
    #[must_use]
    pub fn has_trust(&self, name: &str) -> bool {
        self.trust_cell(name).load().is_some()
    }

    /// Removes a certificate; handshakes that need it fail from now on.
    pub fn remove_identity(&self, name: &str) {
        self.identity_cell(name).store(None);
        self.changed();
    }

    /// Counts changes of trusted roots; whoever caches verification results keys them by it.
    #[must_use]
    pub fn trust_generation(&self) -> u64 {
        self.trust_generation.load(Ordering::Acquire)
    }

    /// Wakes on every change of any entry.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// A server configuration that follows the store.
    ///
    /// # Errors
    /// [`IdentityError::Settings`] for settings that cannot be honoured,
    /// [`IdentityError::File`] for files that cannot be read.
    pub fn server_config(&self, tls: &DownstreamTls) -> Result<Arc<ServerConfig>, IdentityError> {
        let builder = ServerConfig::builder_with_provider(offer::provider(&self.provider, tls)?)
            .with_protocol_versions(offer::versions(tls)?)?;
        let pinned = |v: Verifier| Verifier { pins: tls.options.pins.clone(), ..v };
        let builder = match &tls.client_certificate {
            ClientCertificate::None => builder.with_no_client_auth(),
            ClientCertificate::Optional(v) => {
                builder.with_client_cert_verifier(Arc::new(pinned(self.verifier(v, true)?)))
            }
            ClientCertificate::Required(v) => {
                builder.with_client_cert_verifier(Arc::new(pinned(self.verifier(v, false)?)))
            }
        };
        let certificate = self.identity(&tls.certificate)?;
        let resolver: Arc<dyn ResolvesServerCert> = match tls.options.certificates.as_slice() {
            [] => Arc::new(Resolver(certificate)),
            more => {
                let more = more.iter().map(|r| self.identity(r)).collect::<Result<Vec<_>, _>>()?;
                Arc::new(offer::Choice([vec![certificate], more].concat()))
            }
        };
        let mut config = builder.with_cert_resolver(resolver);
        // Whoever orders suites means the order.
        config.ignore_client_order = !tls.options.ciphers.is_empty();
        config.alpn_protocols = tls.alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
        config.session_storage = Arc::new(ServerSessions::new(self.trust_generation.clone()));
        // One ticket is what a pooled client uses; more only cost CPU at each handshake.
        config.send_tls13_tickets = 1;
        Ok(Arc::new(config))
    }

    /// A client configuration that follows the store. The caller names the server (SNI) per
    /// connection; only the SAN conditions decide whom it accepts.
    ///
    /// # Errors
    /// As [`Self::server_config`].
    pub fn client_config(&self, tls: &UpstreamTls) -> Result<Arc<ClientConfig>, IdentityError> {
        let mesh = is_mesh(&tls.validation);
        let versions: &[&SupportedProtocolVersion] = if mesh {
            &[&rustls::version::TLS13]
        } else {
            &[&rustls::version::TLS13, &rustls::version::TLS12]
        };
        let builder = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(versions)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Verifier {
                by_name: tls.is_proven_by_name(),
                ..self.verifier(&tls.validation, false)?
            }));
        let mut config = match &tls.certificate {
            None => builder.with_no_client_auth(),
            Some(r) => builder.with_client_cert_resolver(Arc::new(Resolver(self.identity(r)?))),
        };
        config.alpn_protocols = tls.alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
        config.enable_sni = !tls.sni.is_empty() || tls.by_name;
        config.resumption = Resumption::store(Arc::new(ClientSessions::new(self.client_generation.clone())));
        Ok(Arc::new(config))
    }

    fn verifier(&self, v: &Validation, optional: bool) -> Result<Verifier, IdentityError> {
        if v.sans.iter().any(|m| matches!(m.kind, StringMatchKind::Regex(_))) {
            return Err(IdentityError::Settings(
                "a regular expression as a SAN condition is unsupported; use exact, prefix or suffix".into(),
            ));
        }
        let trust = match &v.trusted {
            None => None,
            Some(SecretRef::Sds(name)) => Some(self.trust_cell(name)),
            Some(SecretRef::Files { chain, .. }) => {
                let (name, lists) = match &v.crl {
                    None => (format!("file:{chain}"), None),
                    Some(crl) => (format!("file:{chain}:{crl}"), Some(read(crl)?)),
                };
                self.set_trust_and_lists(&name, &read(chain)?, lists.as_deref())?;
                Some(self.trust_cell(&name))
            }
        };
        Ok(Verifier {
            provider: self.provider.clone(),
            trust,
            sans: v.sans.clone(),
            svid: is_mesh(v),
            revocations: self.revocations.clone(),
            optional,
            by_name: false,
            pins: Vec::new(),
        })
    }

    fn identity(&self, r: &SecretRef) -> Result<IdentityCell, IdentityError> {
        match r {
            SecretRef::Sds(name) => Ok(self.identity_cell(name)),
            SecretRef::Files { chain, key } => {
                let name = format!("file:{chain}:{key}");
                self.set_identity(&name, &read(chain)?, &read(key)?)?;
                Ok(self.identity_cell(&name))
            }
        }
    }

    fn identity_cell(&self, name: &str) -> IdentityCell {
        let mut cells = self.cells.lock().unwrap_or_else(PoisonError::into_inner);
        cells.identities.entry(name.to_owned()).or_default().clone()
    }

    fn trust_cell(&self, name: &str) -> TrustCell {
        let mut cells = self.cells.lock().unwrap_or_else(PoisonError::into_inner);
        cells.trusts.entry(name.to_owned()).or_default().clone()
    }

    fn changed(&self) {
        self.client_generation.fetch_add(1, Ordering::AcqRel);
        self.changes.send_modify(|n| *n += 1);
    }
}

/// Roots, and when they end.
fn anchors(what: &str, pem: &[u8]) -> Result<(Vec<TrustAnchor<'static>>, Vec<u64>), IdentityError> {
    let roots = pem_certificates(what, pem)?;
    let mut anchors = Vec::with_capacity(roots.len());
    for der in &roots {
        let anchor = webpki::anchor_from_trusted_cert(der).map_err(|e| IdentityError::Certificate {
            what: what.to_owned(),
            reason: format!("a root cannot be used: {e}"),
        })?;
        anchors.push(anchor.to_owned());
    }
    let ends = roots.iter().map(|r| bundle::ends(r).unwrap_or(0)).collect();
    Ok((anchors, ends))
}

/// Revocation lists of a PEM text, of which there must be one.
fn lists(what: &str, pem: &[u8]) -> Result<Vec<CertRevocationList<'static>>, IdentityError> {
    let bad = |reason: String| IdentityError::Pem { what: format!("{what}: revocation lists"), reason };
    let read = |der: Result<CertificateRevocationListDer<'static>, _>| {
        let der = der.map_err(|_| bad("is no PEM".into()))?;
        let list =
            OwnedCertRevocationList::from_der(&der).map_err(|e| bad(format!("one cannot be read: {e}")))?;
        Ok::<_, IdentityError>(CertRevocationList::from(list))
    };
    let all = CertificateRevocationListDer::pem_slice_iter(pem).map(read).collect::<Result<Vec<_>, _>>()?;
    if all.is_empty() { Err(bad("holds none".into())) } else { Ok(all) }
}

fn read(path: &str) -> Result<Vec<u8>, IdentityError> {
    std::fs::read(path).map_err(|source| IdentityError::File { path: path.to_owned(), source })
}

/// Whether the SVID rules apply: verification against the mesh's own bundle.
fn is_mesh(v: &Validation) -> bool {
    matches!(&v.trusted, Some(SecretRef::Sds(n)) if n == TRUST_BUNDLE)
}

struct Resolver(IdentityCell);

impl std::fmt::Debug for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Resolver")
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load_full()
    }
}

impl ResolvesClientCert for Resolver {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.load_full()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests;

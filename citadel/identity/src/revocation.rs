//! Certificates that their issuers have revoked (RFC 5280 section 5).
//!
//! Rules:
//! 1. A list counts for certificates of the one who signed it, and for nobody else's: issuers are told apart by name and
//!    key, since a cluster's next intermediate has the name of the last.
//! 2. It is verified once, when it is told, and not in each handshake. One that is not under the roots of its domain is
//!    refused, and the others count.
//! 3. What no list names is not revoked. An issuer without a list, or with one that is older than it says it should be, cuts
//!    nobody off: lists are refreshed long before that, and a control plane that is away must not be able to stop a mesh.
//! 4. What is revoked stays so: it is refused in handshakes, resumes no session, and whoever serves a connection of it is
//!    told.

mod list;

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
};

use arc_swap::ArcSwap;
use aws_lc_rs::digest::{SHA256, digest};
use mesh_model::{TrustDomain, federation::RevocationList};
use rustls_pki_types::CertificateDer;
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, X509Certificate};

pub use list::{MAX_LIST, SignedList};

use crate::{IdentityError, pem_certificates};

type Hash = [u8; 32];

/// See [`Revocations::ends`].
pub type Ends =
    Arc<dyn Fn(&[CertificateDer<'static>]) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

fn hash(bytes: &[u8]) -> Hash {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, bytes).as_ref());
    out
}

/// By what revocation lists tell a certificate, and those of its chain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CertificateIds(Box<[Id]>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Id {
    issuer: Hash,
    serial: Box<[u8]>,
    subject: Hash,
    key: Hash,
}

impl CertificateIds {
    /// Of the certificates that a peer has shown. One that cannot be read is left out: no handshake gets past it.
    pub fn of<'a>(chain: impl IntoIterator<Item = &'a CertificateDer<'a>>) -> Self {
        let id = |der: &CertificateDer<'_>| {
            let (_, cert) = X509Certificate::from_der(der).ok()?;
            Some(Id {
                issuer: hash(cert.issuer().as_raw()),
                serial: serial(cert.raw_serial()),
                subject: hash(cert.subject().as_raw()),
                key: hash(cert.public_key().subject_public_key.data.as_ref()),
            })
        };
        Self(chain.into_iter().filter_map(id).collect())
    }
}

/// A serial number without what DER puts before it.
fn serial(bytes: &[u8]) -> Box<[u8]> {
    let from = bytes.iter().position(|b| *b != 0).unwrap_or(bytes.len());
    bytes[from..].into()
}

/// Whether an error came of the alert that a certificate was revoked (RFC 8446 section 6.2).
#[must_use]
pub fn told_revoked(e: &(dyn std::error::Error + 'static)) -> bool {
    let alert = rustls::Error::AlertReceived(rustls::AlertDescription::CertificateRevoked);
    let mut next = Some(e);
    while let Some(e) = next {
        if e.downcast_ref::<rustls::Error>().is_some_and(|e| *e == alert) {
            return true;
        }
        // What an I/O error was made of is not its source.
        next = match e.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => e.source(),
        };
    }
    false
}

/// What one issuer has revoked.
struct Issuer {
    name: Hash,
    key: Hash,
    /// It is in no chain that is shown.
    root: bool,
    serials: BTreeSet<Box<[u8]>>,
}

/// Of lists that cannot tell what is revoked apart, whatever their numbers and dates; `None` if nothing is revoked.
#[must_use]
pub fn revoked_digest(domain: &TrustDomain, roots_pem: &str, lists: &[RevocationList]) -> Option<String> {
    let roots = pem_certificates("roots", roots_pem.as_bytes()).ok()?;
    let mut all: Vec<_> = lists
        .iter()
        .filter_map(|l| SignedList::read(l, &roots, domain).ok())
        .flat_map(|l| l.serials.into_iter().map(move |s| (l.key, s)))
        .collect();
    all.sort();
    let text: Vec<u8> =
        all.iter().flat_map(|(key, serial)| key.iter().chain(serial.iter()).copied()).collect();
    let hash = hash(&text);
    (!all.is_empty()).then(|| hash.iter().take(8).map(|b| format!("{b:02x}")).collect())
}

/// As it was told, of each trust domain.
type Told = BTreeMap<String, (String, Vec<RevocationList>)>;

/// What is revoked now. Readers take no lock.
pub struct Revocations {
    /// Only those that have revoked anything.
    issuers: ArcSwap<Vec<Issuer>>,
    told: Mutex<Told>,
    changes: watch::Sender<u64>,
}

impl Default for Revocations {
    fn default() -> Self {
        Self { issuers: ArcSwap::default(), told: Mutex::default(), changes: watch::Sender::new(0) }
    }
}

impl std::fmt::Debug for Revocations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Revocations").field("issuers", &self.issuers.load().len()).finish_non_exhaustive()
    }
}

impl Revocations {
    /// Replaces the lists of a trust domain, whose roots are `roots` (PEM). Answers whether anything is different now.
    ///
    /// # Errors
    /// The first list that cannot be used; the others count.
    pub(crate) fn set(
        &self,
        domain: &TrustDomain,
        roots: &str,
        lists: &[RevocationList],
    ) -> (bool, Result<(), IdentityError>) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let known = told.get(domain.as_str());
        if known.map_or(lists.is_empty(), |(r, l)| r == roots && l == lists) {
            return (false, Ok(()));
        }
        told.insert(domain.to_string(), (roots.to_owned(), lists.to_vec()));
        let mut failed = Ok(());
        let mut issuers = Vec::new();
        for (domain, (roots, lists)) in told.iter() {
            let read = || Ok((TrustDomain::new(domain).ok(), pem_certificates("roots", roots.as_bytes())?));
            let of_domain = match read() {
                Ok((Some(d), roots)) => lists.iter().map(|l| SignedList::read(l, &roots, &d)).collect(),
                Ok((None, _)) => vec![],
                Err(e) => vec![Err(e)],
            };
            for list in of_domain {
                match list {
                    Ok(l) if l.serials.is_empty() => {}
                    Ok(l) => {
                        issuers.push(Issuer { name: l.name, key: l.key, root: l.root, serials: l.serials })
                    }
                    Err(e) if failed.is_ok() => failed = Err(e),
                    Err(_) => {}
                }
            }
        }
        self.issuers.store(Arc::new(issuers));
        self.changes.send_modify(|n| *n += 1);
        (true, failed)
    }

    /// Whether nothing is revoked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.issuers.load().is_empty()
    }

    /// Whether one of these certificates is revoked.
    #[must_use]
    pub fn revoked(&self, ids: &CertificateIds) -> bool {
        let issued = |by: &Issuer, id: &Id| by.name == id.issuer && by.serials.contains(&id.serial);
        // An issuer that is no root is among those that were shown, in whatever order.
        let shown = |by: &Issuer| ids.0.iter().any(|i| i.key == by.key && i.subject == by.name);
        self.issuers.load().iter().any(|by| ids.0.iter().any(|id| issued(by, id)) && (by.root || shown(by)))
    }

    /// Wakes whenever the lists are others.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Says of certificates that a peer has shown when one of them is revoked.
    #[must_use]
    pub fn ends(self: &Arc<Self>) -> Ends {
        let this = self.clone();
        Arc::new(move |chain| {
            let (this, ids) = (this.clone(), CertificateIds::of(chain));
            Box::pin(async move { this.until_revoked(&ids).await })
        })
    }

    /// Waits until one of these certificates is revoked.
    pub async fn until_revoked(&self, ids: &CertificateIds) {
        let mut changes = self.subscribe();
        while !self.revoked(ids) {
            // Who tells lives as long as this.
            if changes.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

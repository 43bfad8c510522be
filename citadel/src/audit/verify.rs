//! Reading the audit log, and saying where it was tampered with.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read as _},
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use mesh_identity::{crypto_provider, pem_certificates};
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{Entry, Event, MAX_LINE, SIGNATURE, sha256};

/// What a log that is whole says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verified {
    /// Numbers of the first and the last line; 0 of a log without lines. What was before the first was moved elsewhere.
    pub first: u64,
    /// See there.
    pub last: u64,
    /// SHA-256 of the last line, hexadecimal: of what follows, and of nothing else that is cut off, it is the proof.
    pub head: String,
}

/// The first line that is not as it was written.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// It cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something about it is wrong.
    #[error("{path}, line {line} (entry {number}): {why}")]
    Entry {
        /// Which file.
        path: String,
        /// Counts from 1.
        line: u64,
        /// The number that it has, or should have.
        number: u64,
        /// What.
        why: String,
    },
    /// Every line fits, but nobody who is trusted vouches for the last one.
    #[error("the last signer (entry {number}) is under none of the trusted roots: {why}")]
    Root {
        /// Its entry.
        number: u64,
        /// What.
        why: String,
    },
    /// A line that was there is not any more.
    #[error("the log does not hold entry {number} with SHA-256 {hash}: it was cut off or replaced")]
    Head {
        /// The entry.
        number: u64,
        /// What its line hashed to.
        hash: String,
    },
}

/// Reads every line of `files` in order and checks it: numbers, hashes, signatures, signers, and that the last signer is under
/// one of `roots` (PEM). `known` is an entry with its hash that was seen before. Each entry is handed on as soon as it is
/// checked by itself.
///
/// # Errors
/// The first line that is not as it was written.
pub fn verify(
    files: &[PathBuf],
    roots: &[u8],
    known: Option<(u64, &str)>,
    mut each: impl FnMut(&Entry),
) -> Result<Verified, Broken> {
    let mut v = Verified::default();
    let mut signer: Option<(u64, Vec<CertificateDer<'static>>)> = None;
    let mut found = known.is_none();
    for path in files {
        let name = path.display().to_string();
        let io = |source| Broken::Io { path: name.clone(), source };
        let mut lines = BufReader::new(File::open(path).map_err(io)?);
        for at in 1.. {
            let Some(line) = line(&mut lines).map_err(io)? else { break };
            let broken =
                |why: String| Broken::Entry { path: name.clone(), line: at, number: v.last + 1, why };
            let entry: Entry =
                serde_json::from_str(&line).map_err(|e| broken(format!("is no entry: {e}")))?;
            if v.last == 0 {
                v.first = entry.number;
            } else if entry.number != v.last + 1 {
                return Err(broken(format!("is numbered {}", entry.number)));
            } else if entry.previous != v.head {
                return Err(broken("does not follow the line before it: one of the two was changed".into()));
            }
            if let Event::Signer { chain } = &entry.event {
                let pem = chain.concat();
                let certs = pem_certificates("signer", pem.as_bytes()).map_err(|e| broken(e.to_string()))?;
                certified(&certs, entry.time / 1000).map_err(|e| broken(format!("its signer: {e}")))?;
                signer = Some((entry.number, certs));
            }
            let by = signer.as_ref().and_then(|(_, c)| c.first());
            match by {
                // A log that begins in the middle begins with lines of a signer that was named before.
                None if entry.number > 1 => {}
                None => return Err(broken("is signed by nobody that is named before".into())),
                Some(cert) if signed(&line, cert, entry.time / 1000) => {}
                Some(_) => return Err(broken("its signature is wrong".into())),
            }
            v.last = entry.number;
            v.head = sha256(line.as_bytes());
            found |= known.is_some_and(|(n, h)| n == v.last && h.eq_ignore_ascii_case(&v.head));
            each(&entry);
        }
    }
    if let Some((number, hash)) = known.filter(|_| !found) {
        return Err(Broken::Head { number, hash: hash.to_owned() });
    }
    if let Some((number, chain)) = signer {
        under(&chain, roots).map_err(|why| Broken::Root { number, why })?;
    } else if v.last > 0 {
        return Err(Broken::Root { number: v.last, why: "no signer is named in these files".into() });
    }
    Ok(v)
}

fn line(from: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut out = Vec::new();
    from.by_ref().take(MAX_LINE).read_until(b'\n', &mut out)?;
    if out.is_empty() {
        return Ok(None);
    }
    if out.pop() != Some(b'\n') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a line without end, or longer than any of this log",
        ));
    }
    String::from_utf8(out).map(Some).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, String> {
    X509Certificate::from_der(der).map(|(_, c)| c).map_err(|e| e.to_string())
}

/// The chain of a signer by itself: each is signed by the next, and all were valid then. It names the log's own account, so
/// that no workload's certificate signs a log.
fn certified(chain: &[CertificateDer<'_>], then: u64) -> Result<(), String> {
    if chain.len() < 2 {
        return Err("its chain is too short".into());
    }
    let then = i64::try_from(then).ok().and_then(|t| x509_parser::time::ASN1Time::from_timestamp(t).ok());
    let then = then.ok_or("its time is none")?;
    for (i, der) in chain.iter().enumerate() {
        let cert = parse(der)?;
        if !cert.validity().is_valid_at(then) {
            return Err(format!("certificate {i} was not valid then"));
        }
        let issuer = parse(chain.get(i + 1).unwrap_or(der))?;
        if !issuer.is_ca() || cert.verify_signature(Some(issuer.public_key())).is_err() {
            return Err(format!("certificate {i} is not signed by its successor"));
        }
    }
    let info = mesh_identity::certificate_info(pem(chain).as_bytes()).map_err(|e| e.to_string())?;
    let account = (crate::SYSTEM_NAMESPACE, crate::AUDIT_ACCOUNT);
    match info.spiffe.as_ref().and_then(|id| id.namespace_and_account()) {
        Some(of) if of == account => Ok(()),
        _ => Err("it is certified as somebody else".into()),
    }
}

fn pem(chain: &[CertificateDer<'_>]) -> String {
    let wrap = |der: &CertificateDer<'_>| {
        format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", STANDARD.encode(der))
    };
    chain.iter().map(wrap).collect()
}

/// Whether the chain's last certificate is one of the roots.
fn under(chain: &[CertificateDer<'_>], roots: &[u8]) -> Result<(), String> {
    let roots = pem_certificates("trusted roots", roots).map_err(|e| e.to_string())?;
    let last = chain.last().ok_or("it has no chain")?;
    if roots.contains(last) { Ok(()) } else { Err(format!("its root is {}", mesh_identity::root_pin(last))) }
}

fn signed(line: &str, cert: &CertificateDer<'_>, then: u64) -> bool {
    let Some((entry, rest)) = line.rsplit_once(SIGNATURE) else { return false };
    let Some(signature) = rest.strip_suffix("\"}").and_then(|s| STANDARD.decode(s).ok()) else {
        return false;
    };
    let Ok(cert) = parse(cert) else { return false };
    let then = i64::try_from(then).ok().and_then(|t| x509_parser::time::ASN1Time::from_timestamp(t).ok());
    if !then.is_some_and(|t| cert.validity().is_valid_at(t)) {
        return false;
    }
    let key = cert.public_key().subject_public_key.data.as_ref();
    let algorithms = crypto_provider().signature_verification_algorithms.all;
    algorithms.iter().any(|a| a.verify_signature(key, entry.as_bytes(), &signature).is_ok())
}

/// The files of the log in a state directory.
///
/// # Errors
/// If there is none.
pub fn log_of(state_dir: &Path) -> io::Result<Vec<PathBuf>> {
    super::files(&super::directory(state_dir))
}

//! The audit log of the CA: who was given which certificate, on what proof, and who was refused.
//!
//! `<state>/audit/issuance.jsonl`, one JSON object a line, mode 0600. Rules:
//! 1. Each line has the SHA-256 of the line before it and a signature over itself, so that nobody changes, removes or adds
//!    a line in the middle who does not hold the keys of the CA.
//! 2. The signing key is in memory alone, made anew with each start and each intermediate, and certified by the CA like a
//!    workload's. Its certificate is a line of its own before the first that it signs. A later signer's lines contain, by
//!    their hashes, all earlier ones: it is enough that the last signer is under a root that is trusted now.
//! 3. **What is not written is not issued.** Who could fill the disk could otherwise have certificates that nobody knows of;
//!    and there is time, since workloads renew at half of their certificates' life. The probe of the CA fails meanwhile.
//! 4. Refusals are written as they can be: a few a second, and how many were left out. They stop nothing.
//! 5. No line has a key, a token or a request; a token is named by a part of its hash.
//! 6. A file that is large enough is put aside, under the number of its last line, and the next one begins with the signer, so
//!    that each can be verified without those before it. Of those that were put aside the oldest is removed when there are
//!    more than are to be kept, and nothing in it is newer than a workload's certificate lives; intermediates that are
//!    valid still are written again, since they can be revoked. A line says how far the log was removed. The end of the log
//!    can be cut off without a trace in it; who needs to see that keeps the head that verifying shows elsewhere.
//! 7. The probe's certificates are handed to nobody. It is written that it works when that is news, and once a day.

mod find;
mod prune;
pub mod verify;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::digest::{SHA256, digest};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use mesh_runtime::files::private_dir;
use rcgen::{KeyPair, SigningKey as _};
use serde::{Deserialize, Serialize};

/// The file that is written to, and how those that were put aside begin.
const CURRENT: &str = "issuance.jsonl";
const ASIDE: &str = "issuance-";
/// Written and removed to see whether anything can be.
const TRIAL: &str = "trial";
/// A file of this size is put aside, bytes.
const LARGE: u64 = 16 * 1024 * 1024;
/// So many of those stay, unless said otherwise: a gibibyte.
pub const KEEP: usize = 64;
/// No line is longer, bytes: a chain of certificates is the largest.
const MAX_LINE: u64 = 64 * 1024;
/// Refusals that are written: at once, and each second.
const REFUSALS: (f64, f64) = (20.0, 5.0);
/// Longest text of others that is kept, bytes.
const MAX_TEXT: usize = 256;

/// How a caller proved who it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Proof {
    /// "certificate", "token", "control plane", …
    pub kind: String,
    /// Which: a part of the SHA-256 of the certificate or token, or what else names it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// Address of the caller, as far as there is one.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub caller: String,
}

impl Proof {
    /// One without more to say.
    #[must_use]
    pub fn of(kind: &str) -> Self {
        Self { kind: kind.to_owned(), ..Self::default() }
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Event {
    /// From here on lines are signed by the key in the first of these certificates, PEM; the last one is a root.
    Signer {
        /// Leaf first.
        chain: Vec<String>,
    },
    /// A certificate of a workload, or of the control plane.
    Issued {
        /// Hexadecimal.
        serial: String,
        /// SPIFFE ID.
        identity: String,
        /// On what.
        proof: Proof,
        /// SHA-256 of the public key, hexadecimal.
        key: String,
        /// Validity, seconds since the epoch.
        not_before: u64,
        /// The end of it.
        not_after: u64,
    },
    /// An intermediate, of this cluster or another one.
    Intermediate {
        /// Hexadecimal.
        serial: String,
        /// Whose.
        cluster: String,
        /// On what.
        proof: Proof,
        /// SHA-256 of the public key, hexadecimal.
        key: String,
        /// The end of its validity, seconds since the epoch.
        not_after: u64,
    },
    /// A certificate that was revoked.
    Revoked {
        /// Hexadecimal; empty if there was none left, and only tokens from before are refused.
        serial: String,
        /// SPIFFE ID of a workload or of a cluster.
        of: String,
        /// As RFC 5280 section 5.3.1 has it.
        reason: String,
    },
    /// Lines were removed, as the log is to be no larger.
    Removed {
        /// Number of the last of them.
        through: u64,
        /// SHA-256 of that line, hexadecimal.
        head: String,
    },
    /// Somebody who asked and was given nothing.
    Refused {
        /// Who it proved to be, if anybody.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        identity: String,
        /// On what.
        proof: Proof,
        /// Why.
        reason: String,
        /// Refusals before this one that were too many to write.
        #[serde(default, skip_serializing_if = "is_zero")]
        left_out: u64,
    },
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// A line, without its signature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Counts from 1.
    pub number: u64,
    /// Milliseconds since the epoch.
    pub time: u64,
    /// SHA-256 of the line before, without its end, hexadecimal; empty for the first.
    pub previous: String,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

impl Entry {
    /// When it was written, as RFC 3339 has it.
    #[must_use]
    pub fn written(&self) -> String {
        prost_types::Timestamp::from(UNIX_EPOCH + Duration::from_millis(self.time)).to_string()
    }
}

/// What is between an entry and its signature.
const SIGNATURE: &str = ",\"signature\":\"";

pub(crate) use find::Certificate;

/// The log of one CA.
pub(crate) struct AuditLog {
    dir: PathBuf,
    state: Mutex<State>,
}

struct State {
    file: Option<File>,
    size: u64,
    large: u64,
    /// Files that were put aside and stay.
    keep: usize,
    /// A file that was written to within this time stays in any case.
    young: Duration,
    number: u64,
    previous: String,
    signer: Option<Signer>,
    tokens: f64,
    filled: Instant,
    left_out: u64,
}

/// Who signs lines.
pub(crate) struct Signer {
    pub(crate) key: KeyPair,
    /// PEM, leaf first, root last.
    pub(crate) chain: Vec<String>,
    /// Of the intermediate that certified it: another one has another signer.
    pub(crate) issuer: String,
    /// When another one is due.
    pub(crate) until: SystemTime,
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(digest(&SHA256, bytes).as_ref())
}

pub(crate) fn seconds(t: SystemTime) -> u64 {
    t.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Text of somebody else, short enough to be kept.
fn short(s: &str) -> String {
    let mut end = s.len().min(MAX_TEXT);
    while !s.is_char_boundary(end) {
        end -= 1;
    }
    s[..end].to_owned()
}

fn at(path: &Path) -> impl Fn(io::Error) -> io::Error + '_ {
    move |e| io::Error::new(e.kind(), format!("audit log {}: {e}", path.display()))
}

/// Where the log of a state directory is.
#[must_use]
pub fn directory(state_dir: &Path) -> PathBuf {
    state_dir.join("audit")
}

impl AuditLog {
    /// Goes on where the log ends. A line that was not finished is one that a crash interrupted: what it was about was
    /// given to nobody.
    ///
    /// # Errors
    /// If it cannot be read, or its last line is none.
    pub(crate) fn open(state_dir: &Path) -> io::Result<Self> {
        let dir = directory(state_dir);
        private_dir(&dir)?;
        let path = dir.join(CURRENT);
        let mut state = State {
            file: None,
            size: 0,
            large: LARGE,
            keep: KEEP,
            young: Duration::MAX,
            number: 0,
            previous: String::new(),
            signer: None,
            tokens: REFUSALS.0,
            filled: Instant::now(),
            left_out: 0,
        };
        let mut file = open(&path).map_err(at(&path))?;
        state.size = whole(&mut file).map_err(at(&path))?;
        let last = match last_line(&mut file, state.size).map_err(at(&path))? {
            Some(line) => Some(line),
            // It may just have been put aside.
            None => match files(&dir)?.iter().rev().find(|p| p.as_path() != path) {
                None => None,
                Some(before) => {
                    let mut f = File::open(before).map_err(at(before))?;
                    let size = f.metadata().map_err(at(before))?.len();
                    last_line(&mut f, size).map_err(at(before))?
                }
            },
        };
        if let Some(line) = last {
            let entry: Entry = serde_json::from_str(&line).map_err(|e| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!(
                        "audit log {}: its last line is none of it ({e}); look at it with `flotilla ca audit verify`, and move \
                         the directory away to begin another log",
                        path.display()
                    ),
                )
            })?;
            (state.number, state.previous) = (entry.number, sha256(line.as_bytes()));
        }
        state.file = Some(file);
        Ok(Self { dir, state: Mutex::new(state) })
    }

    /// Whether another signer is due for lines under this intermediate.
    pub(crate) fn needs_signer(&self, issuer: &str) -> bool {
        let s = self.lock();
        s.signer.as_ref().is_none_or(|s| s.issuer != issuer || s.until <= SystemTime::now())
    }

    /// Lines are signed by somebody else from here on.
    pub(crate) fn set_signer(&self, signer: Signer) -> io::Result<()> {
        let mut s = self.lock();
        let event = Event::Signer { chain: signer.chain.clone() };
        let before = s.signer.replace(signer);
        let written = self.write(&mut s, event);
        if written.is_err() {
            // Nobody signs who is not named.
            s.signer = before;
        }
        written
    }

    /// How many files that were put aside stay, and how old what is in the others has to be.
    pub(crate) fn keep(&self, files: usize, young: Duration) {
        let mut s = self.lock();
        (s.keep, s.young) = (files.max(1), young);
    }

    /// Whether a line could be written now.
    pub(crate) fn writable(&self) -> io::Result<()> {
        let s = self.lock();
        let path = self.dir.join(TRIAL);
        let tried = || {
            let mut f = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
            f.write_all(&[0; 4096])?;
            f.sync_data()?;
            fs::remove_file(&path)
        };
        let done = tried().map_err(at(&path));
        drop(s);
        done
    }

    /// Adds a line; it is on the disk when this returns.
    pub(crate) fn append(&self, event: Event) -> io::Result<()> {
        let mut s = self.lock();
        self.write(&mut s, event)
    }

    /// Adds a line about somebody who was refused, if there were not too many of late.
    pub(crate) fn refused(&self, identity: &str, proof: Proof, reason: &str) {
        let mut s = self.lock();
        let now = Instant::now();
        let since = now.duration_since(s.filled).as_secs_f64();
        s.tokens = REFUSALS.1.mul_add(since, s.tokens).min(REFUSALS.0);
        s.filled = now;
        if s.tokens < 1.0 {
            s.left_out += 1;
            return;
        }
        s.tokens -= 1.0;
        let proof = Proof { kind: short(&proof.kind), id: short(&proof.id), caller: short(&proof.caller) };
        let left_out = s.left_out;
        let event = Event::Refused { identity: short(identity), proof, reason: short(reason), left_out };
        match self.write(&mut s, event) {
            Ok(()) => s.left_out = 0,
            Err(error) => {
                s.left_out += 1;
                tracing::error!(%error, "a refusal was not written to the audit log");
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, s: &mut State, event: Event) -> io::Result<()> {
        if s.size >= s.large && s.signer.is_some() {
            self.put_aside(s).map_err(at(&self.dir))?;
            // The one that is about to be named needs no other before it.
            if !matches!(event, Event::Signer { .. })
                && let Some(chain) = s.signer.as_ref().map(|s| s.chain.clone())
            {
                self.line(s, Event::Signer { chain })?;
            }
            for event in prune::prune(&self.dir, s.keep, s.young) {
                self.line(s, event)?;
            }
        }
        self.line(s, event)
    }

    fn line(&self, s: &mut State, event: Event) -> io::Result<()> {
        let path = self.dir.join(CURRENT);
        let signer = s.signer.as_ref().ok_or_else(|| io::Error::other("audit log: nobody signs it yet"))?;
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let entry = Entry {
            number: s.number + 1,
            time: u64::try_from(time).unwrap_or(u64::MAX),
            previous: s.previous.clone(),
            event,
        };
        let mut line = serde_json::to_string(&entry)?;
        // The entry is signed as it is written but for its closing brace.
        line.pop();
        let signature =
            signer.key.sign(line.as_bytes()).map_err(|e| io::Error::other(format!("audit log: {e}")))?;
        line = format!("{line}{SIGNATURE}{}\"}}", STANDARD.encode(signature));
        if s.file.is_none() {
            let mut file = open(&path).map_err(at(&path))?;
            s.size = whole(&mut file).map_err(at(&path))?;
            s.file = Some(file);
        }
        let Some(file) = s.file.as_mut() else { return Err(io::Error::other("audit log: not open")) };
        let bytes = format!("{line}\n");
        let written = file.write_all(bytes.as_bytes()).and_then(|()| file.sync_data());
        if let Err(e) = written {
            // Half a line is taken away again, or, if that fails as well, before the next one.
            let _ = file.set_len(s.size);
            s.file = None;
            return Err(at(&path)(e));
        }
        s.size += bytes.len() as u64;
        s.number += 1;
        s.previous = sha256(line.as_bytes());
        Ok(())
    }

    fn put_aside(&self, s: &mut State) -> io::Result<()> {
        s.file = None;
        let to = self.dir.join(format!("{ASIDE}{:020}.jsonl", s.number));
        fs::rename(self.dir.join(CURRENT), to)?;
        s.size = 0;
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn put_aside_at(&self, large: u64) {
        self.lock().large = large;
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)
}

/// Takes away what follows the last end of a line; answers with the size that is left.
fn whole(file: &mut File) -> io::Result<u64> {
    let size = file.metadata()?.len();
    let from = size.saturating_sub(MAX_LINE);
    file.seek(SeekFrom::Start(from))?;
    let mut tail = Vec::new();
    Read::by_ref(file).take(MAX_LINE).read_to_end(&mut tail)?;
    let kept = match tail.iter().rposition(|b| *b == b'\n') {
        Some(end) => from + end as u64 + 1,
        None if from == 0 => 0,
        None => {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "has no end of a line where one must be"));
        }
    };
    if kept != size {
        file.set_len(kept)?;
    }
    Ok(kept)
}

/// The last line of a file that ends with one.
fn last_line(file: &mut File, size: u64) -> io::Result<Option<String>> {
    if size == 0 {
        return Ok(None);
    }
    let from = size.saturating_sub(MAX_LINE);
    file.seek(SeekFrom::Start(from))?;
    let mut tail = Vec::new();
    Read::by_ref(file).take(size - from).read_to_end(&mut tail)?;
    // A line before it may be cut in the middle of a character.
    let text = String::from_utf8_lossy(&tail);
    let text = text.trim_end_matches('\n');
    Ok(Some(text.rsplit('\n').next().unwrap_or(text).to_owned()))
}

/// The files of a log in the order of their lines.
///
/// # Errors
/// Those of the file system.
pub fn files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).map_err(at(dir))? {
        let path = entry.map_err(at(dir))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
        if name == CURRENT {
            // After all that begin with the number of their last line.
            all.push((format!("{ASIDE}~"), path));
        } else if name.starts_with(ASIDE) && name.ends_with(".jsonl") {
            all.push((name, path));
        }
    }
    all.sort();
    Ok(all.into_iter().map(|(_, p)| p).collect())
}

/// For how long a signer signs that is certified for `ttl`.
pub(crate) fn until(ttl: Duration) -> SystemTime {
    SystemTime::now() + ttl / 2
}

#[cfg(test)]
mod tests;

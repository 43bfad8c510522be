//! Membership as configuration declares it: `MeshMembership` and `ClusterEviction` documents of galley.
//!
//! Rules:
//! 1. What is declared is compared with what is, again and again; what is so already is done. A restart or a second
//!    application changes nothing.
//! 2. A document that is gone declares nothing: the cluster stays as it is. Only `state: left` leaves.
//! 3. A token is only read while the cluster is in no mesh. One that was refused is not shown again until its file
//!    changes, or some minutes have passed; an issuer that cannot be reached is tried again with growing pauses.
//! 4. Whoever is declared evicted is evicted as often as it is a member, and refused as a newcomer here.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Read as _,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use mesh_identity::{pem_certificates, root_pin};
use mesh_model::{
    ClusterId,
    authored::{ClusterEviction, Kind, MembershipState, MeshMembership},
};
use mesh_xds::{
    Endpoint, NodeInfo,
    mcp::{ConfigClient, ConfigState},
};
use rand::RngExt as _;
use tokio::time::Instant;
use tonic::{Code, Request, Status};

use crate::{
    admin::AdminService,
    admin_pb::{self, EvictRequest, LeaveMeshRequest, PrepareJoinRequest, admin_server::Admin as _},
    authority_pb::{AuthorityStatus, StatusRequest, authority_client::AuthorityClient},
    join::{self, JoinError},
    state::Shared,
    token::{JoinToken, secret_hash, unix_now},
};

/// What is so is looked at again after this time, and a file after the other.
const STEADY: Duration = Duration::from_secs(10);
const FILE: Duration = Duration::from_secs(2);
/// Pauses between attempts.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// A token that was refused is shown again after this time.
const REFUSED: Duration = Duration::from_secs(300);
/// Largest file that may hold a token.
const MAX_FILE: u64 = 16 * 1024;
/// Evictions that are carried out; a mesh has no more members.
const MAX_EVICTIONS: usize = crate::membership::MAX_MEMBERS;

/// What is declared, and what became of it.
#[derive(Debug, Default)]
pub(crate) struct Declared {
    membership: Option<Outcome>,
    evictions: BTreeMap<ClusterId, (&'static str, String)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Outcome {
    state: MembershipState,
    phase: &'static str,
    message: String,
    since: u64,
}

impl Declared {
    /// Whether a cluster is declared evicted.
    pub(crate) fn evicts(&self, cluster: &ClusterId) -> bool {
        self.evictions.contains_key(cluster)
    }

    /// For operators.
    pub(crate) fn describe(&self) -> (Option<admin_pb::Declared>, Vec<admin_pb::DeclaredEviction>) {
        let membership = self.membership.as_ref().map(|o| admin_pb::Declared {
            state: word(o.state).to_owned(),
            phase: o.phase.to_owned(),
            message: o.message.clone(),
            since: o.since,
        });
        let evictions = self.evictions.iter().map(|(c, (phase, message))| admin_pb::DeclaredEviction {
            cluster: c.to_string(),
            phase: (*phase).to_owned(),
            message: message.clone(),
        });
        (membership, evictions.collect())
    }
}

fn word(s: MembershipState) -> &'static str {
    match s {
        MembershipState::Joined => "joined",
        MembershipState::Left => "left",
    }
}

/// What galley has of it.
#[derive(Debug, Default, PartialEq)]
struct Wanted {
    membership: Option<MeshMembership>,
    evictions: BTreeSet<ClusterId>,
}

impl Wanted {
    /// Galley has validated all of it; what is unreadable all the same is as if it were not there.
    fn read(state: &ConfigState) -> Self {
        let membership = state.of(Kind::MeshMembership.type_url()).find_map(|(name, d)| {
            d.spec()
                .inspect_err(|error| tracing::error!(%name, %error, "a MeshMembership is unreadable"))
                .ok()
        });
        let evictions = state.of(Kind::ClusterEviction.type_url()).filter_map(|(name, d)| {
            d.spec::<ClusterEviction>().ok()?;
            ClusterId::new(name).ok()
        });
        Self { membership, evictions: evictions.take(MAX_EVICTIONS).collect() }
    }
}

/// Why what is declared is not so.
struct Failure {
    message: String,
    /// When to try again.
    pause: Duration,
}

/// What was tried.
#[derive(Default)]
struct Attempts {
    failed: u32,
    not_before: Option<Instant>,
    /// Hash and answer of a token that was refused, and until when that holds.
    refused: Option<(String, String, Instant)>,
}

impl Attempts {
    fn pause(&self) -> Duration {
        let longest = PAUSE_MAX.min(PAUSE_MIN * 2u32.saturating_pow(self.failed.min(16)));
        longest.mul_f64(rand::rng().random_range(0.5..=1.0))
    }

    fn failure(&self, message: String) -> Failure {
        Failure { message, pause: self.pause() }
    }
}

/// Makes what is declared so, for as long as the component runs.
pub(crate) async fn follow(shared: Arc<Shared>, galley: Endpoint) {
    let types = [Kind::MeshMembership, Kind::ClusterEviction].map(Kind::type_url);
    let client = ConfigClient::start(galley, NodeInfo::component("federation"), &types);
    let mut documents = client.watch();
    let mut members = shared.members_changed.subscribe();
    let (mut wanted, mut attempts) = (Wanted::default(), Attempts::default());
    loop {
        let state = documents.borrow_and_update().clone();
        members.mark_unchanged();
        // Before galley has answered nothing is known of what is declared.
        if state.synced {
            let now = Wanted::read(&state);
            if now != wanted {
                (wanted, attempts) = (now, Attempts::default());
            }
            // First, so that who is declared evicted is refused before anything else happens.
            evictions(&shared, &wanted.evictions).await;
            membership(&shared, wanted.membership.as_ref(), &mut attempts).await;
        }
        let due = async {
            match attempts.not_before {
                Some(at) => tokio::time::sleep_until(at).await,
                None if wanted != Wanted::default() => tokio::time::sleep(STEADY).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = due => {}
            r = documents.changed() => if r.is_err() { return },
            r = members.changed() => if r.is_err() { return },
        }
    }
}

/// One comparison of what is declared with what is.
async fn membership(shared: &Arc<Shared>, wanted: Option<&MeshMembership>, attempts: &mut Attempts) {
    let Some(m) = wanted else {
        if shared.lock().declared.membership.take().is_some() {
            tracing::info!("membership is no longer declared: this cluster stays as it is");
        }
        attempts.not_before = None;
        return;
    };
    if attempts.not_before.is_some_and(|at| at > Instant::now()) {
        return;
    }
    let done = match m.state {
        MembershipState::Joined => joined(shared, m, attempts).await,
        MembershipState::Left => left(shared, m, attempts).await,
    };
    match done {
        Ok(()) => {
            *attempts = Attempts::default();
            say(shared, m.state, word(m.state), String::new());
        }
        Err(f) => {
            attempts.failed = attempts.failed.saturating_add(1);
            attempts.not_before = Some(Instant::now() + f.pause);
            say(shared, m.state, "failed", f.message);
        }
    }
}

/// Keeps and logs what is news.
fn say(shared: &Shared, state: MembershipState, phase: &'static str, message: String) {
    let mut t = shared.lock();
    let old = t.declared.membership.as_ref();
    if old.is_some_and(|o| (o.state, o.phase, &o.message) == (state, phase, &message)) {
        return;
    }
    if phase == "failed" {
        tracing::warn!(declared = word(state), reason = %message, "MeshMembership mesh: not so");
    } else {
        tracing::info!(declared = word(state), phase, "MeshMembership mesh");
    }
    t.declared.membership = Some(Outcome { state, phase, message, since: unix_now() });
}

/// The first attempt is told; the later ones are told by what becomes of them.
fn attempting(shared: &Shared, state: MembershipState, phase: &'static str, attempts: &Attempts) {
    if attempts.failed == 0 {
        say(shared, state, phase, String::new());
    }
}

async fn authority(shared: &Shared, attempts: &Attempts) -> Result<AuthorityStatus, Failure> {
    let status = async {
        AuthorityClient::new(shared.authority().await?).status(StatusRequest {}).await.map(|r| r.into_inner())
    };
    status.await.map_err(|s: Status| attempts.failure(s.message().to_owned()))
}

const FEDERATES: &str =
    "the token federates with another trust domain, which cannot be declared: use `flotilla join-cluster`";

async fn joined(shared: &Arc<Shared>, m: &MeshMembership, attempts: &mut Attempts) -> Result<(), Failure> {
    let status = authority(shared, attempts).await?;
    let read = read_token(PathBuf::from(&m.token_file)).await;
    if status.state == "active" {
        // The token has done its work, and its file may be gone. One of another mesh means that something else is wanted.
        let token = read.ok().and_then(|text| JoinToken::parse(&text, 0).ok());
        if token.as_ref().is_some_and(|t| t.federate.is_some()) {
            return Err(Failure { message: FEDERATES.to_owned(), pause: STEADY });
        }
        let roots = pem_certificates("bundle", status.bundle.as_bytes()).unwrap_or_default();
        return match token {
            Some(t) if !roots.iter().any(|r| root_pin(r) == t.pin) => Err(Failure {
                message: format!(
                    "spec.tokenFile: the token is of another mesh (of cluster {}), and this cluster is a member of {}: \
                     set state: left first",
                    t.cluster, status.trust_domain
                ),
                pause: STEADY,
            }),
            _ => Ok(()),
        };
    }
    // What is wrong with a file is seen without asking anybody, so it may be looked at often.
    let file = |message: String| Failure { message: format!("spec.tokenFile: {message}"), pause: FILE };
    if m.token_file.is_empty() {
        return Err(file(
            "this cluster is in no mesh: name a file with a token of `flotilla token create`, or found a mesh \
             with `flotilla found`"
                .into(),
        ));
    }
    let text = read.map_err(|e| {
        file(format!("{}: {e}; write a token of `flotilla token create` to it", m.token_file))
    })?;
    let token = JoinToken::parse(&text, unix_now()).map_err(|e| file(e.to_string()))?;
    if token.federate.is_some() {
        return Err(file(FEDERATES.to_owned()));
    }
    let hash = secret_hash(text.trim().as_bytes());
    if let Some((h, why, until)) = &attempts.refused
        && *h == hash
        && *until > Instant::now()
    {
        return Err(file(why.clone()));
    }
    attempting(shared, m.state, "joining", attempts);
    let admin = AdminService(shared.clone());
    let failed = |s: Status| attempts.failure(s.message().to_owned());
    let prepared =
        admin.prepare_join(Request::new(PrepareJoinRequest::default())).await.map_err(failed)?.into_inner();
    let answer = match join::join(&token, prepared).await {
        Ok(a) => a,
        Err(e @ JoinError::Unreachable { .. }) => return Err(attempts.failure(e.to_string())),
        Err(e) => {
            attempts.refused = Some((hash, e.to_string(), Instant::now() + REFUSED));
            return Err(file(e.to_string()));
        }
    };
    admin.complete_join(Request::new(answer)).await.map_err(failed)?;
    tracing::info!(target: "audit", through = %token.cluster, token = %token.id, "joined a mesh, as declared");
    Ok(())
}

async fn left(shared: &Arc<Shared>, m: &MeshMembership, attempts: &Attempts) -> Result<(), Failure> {
    let status = authority(shared, attempts).await?;
    if status.state != "active" {
        return Ok(());
    }
    attempting(shared, m.state, "leaving", attempts);
    let request = Request::new(LeaveMeshRequest { force: m.force, trust_domain: String::new() });
    let answer = AdminService(shared.clone()).leave(request).await;
    let peers = match answer {
        Ok(r) => r.into_inner().peers,
        // It stays as it is until somebody changes the document.
        Err(s) if s.code() == Code::FailedPrecondition => {
            return Err(Failure { message: format!("spec.state: {}", s.message()), pause: STEADY });
        }
        Err(s) => return Err(attempts.failure(s.message().to_owned())),
    };
    let open: Vec<_> = peers
        .into_iter()
        .filter(|p| p.references > 0 || !p.error.is_empty())
        .map(|p| match p.error.as_str() {
            "" => format!("{} still has {} references", p.cluster, p.references),
            e => format!("{}: {e}", p.cluster),
        })
        .collect();
    if open.is_empty() || m.force {
        return Ok(());
    }
    let why = format!("not confirmed ({}); spec.force: true leaves all the same", open.join("; "));
    Err(attempts.failure(why))
}

/// The text of a file that holds a token.
async fn read_token(path: PathBuf) -> Result<String, String> {
    let read = move || {
        let open = std::fs::File::open(path)?;
        if !open.metadata()?.is_file() {
            return Err(std::io::Error::other("it is no regular file"));
        }
        let mut text = String::new();
        open.take(MAX_FILE).read_to_string(&mut text)?;
        Ok(text)
    };
    match tokio::task::spawn_blocking(read).await {
        Ok(r) => r.map_err(|e| e.to_string()),
        Err(e) => Err(e.to_string()),
    }
}

async fn evictions(shared: &Arc<Shared>, wanted: &BTreeSet<ClusterId>) {
    {
        // From now on they are refused, whatever else is to be done.
        let mut t = shared.lock();
        t.declared.evictions.retain(|c, _| wanted.contains(c));
        for c in wanted {
            t.declared.evictions.entry(c.clone()).or_insert(("waiting", String::new()));
        }
    }
    for cluster in wanted {
        let outcome = if shared.trust_domain().is_none() {
            ("waiting", "this cluster is in no mesh".to_owned())
        } else if shared.lock().node.members.get(cluster).is_some_and(|m| m.evicted) {
            ("evicted", String::new())
        } else {
            let request = Request::new(EvictRequest { cluster: cluster.to_string() });
            match AdminService(shared.clone()).evict(request).await {
                Ok(_) => ("evicted", String::new()),
                Err(s) if s.code() == Code::NotFound => ("unknown", s.message().to_owned()),
                Err(s) => ("failed", s.message().to_owned()),
            }
        };
        let mut t = shared.lock();
        if let Some(old) = t.declared.evictions.get_mut(cluster)
            && *old != outcome
        {
            let (phase, message) = &outcome;
            tracing::info!(%cluster, phase, message, "ClusterEviction");
            *old = outcome;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn pauses_grow_to_a_minute() {
        for (failed, least, most) in [(0, 500, 1000), (3, 4000, 8000), (40, 30_000, 60_000)] {
            let pause = Attempts { failed, ..Attempts::default() }.pause();
            assert!((least..=most).contains(&pause.as_millis()), "{failed}: {pause:?}");
        }
    }

    #[tokio::test]
    async fn only_a_file_of_fair_size_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = |n: &str| dir.path().join(n);
        assert!(read_token(at("none")).await.unwrap_err().contains("No such file"));
        assert!(read_token(dir.path().into()).await.unwrap_err().contains("no regular file"));
        assert!(read_token("/dev/zero".into()).await.unwrap_err().contains("no regular file"));
        std::fs::write(at("big"), vec![b'x'; 100_000]).unwrap();
        assert_eq!(read_token(at("big")).await.unwrap().len() as u64, MAX_FILE);
        // As Kubernetes mounts secrets.
        std::fs::write(at("real"), "flt1.x.y\n").unwrap();
        symlink(at("real"), at("link")).unwrap();
        assert_eq!(read_token(at("link")).await.unwrap(), "flt1.x.y\n");
    }
}

//! Silence from another cluster, noticed before anybody's patience ends.
//!
//! A session to a workload of another cluster leads through gateways that see bytes only. What breaks behind the
//! first of them may break in silence: nothing refuses, and TCP holds out for minutes. So a shared session on which
//! something was sent and nothing came for a second is asked whether it still leads anywhere (HTTP/2 PING, RFC 9113
//! section 6.7, answered by the workload's own proxy), and a dial that hangs says the same. Where HTTP/1 is spoken, a new
//! session is made in order to ask.
//!
//! Silence is a suspicion, no proof: the session goes on, and only new requests go elsewhere, and only if there is an
//! elsewhere. Meanwhile the endpoints behind the suspected way are dialled in the background, a handshake and a PING each, and
//! whichever answers is used again at once: no request has to find out.

use std::{
    cell::Cell,
    future::poll_fn,
    rc::{Rc, Weak},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use h2::{Ping, PingPong};
use mesh_model::proxy::Slots;
use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout},
};

use super::{
    cluster::{Cluster, Permit},
    connect::{Want, connect_check, negotiated_h2, negotiated_tunnels},
    host::Host,
    keepalive::{self, Keep},
    pool::{H2Conn, start_h2},
};
use crate::worker::Worker;

/// How long nothing is heard of a session on which something was sent before it is asked.
const ASK: Duration = Duration::from_secs(1);
/// How often it is looked at meanwhile: the times of what is sent are not noted.
const LOOKS: u32 = 4;
/// A session that does not answer for so long, or four of its round trips, is suspected: together with [`ASK`] sooner
/// than a lease can lapse.
const PATIENCE: Duration = Duration::from_secs(1);
/// The same for a session that is made in order to ask, and that takes several round trips.
const HANDSHAKE: Duration = Duration::from_millis(1_500);
/// The same for a dial of traffic.
const DIAL: Duration = Duration::from_secs(2);
/// Pauses between dials in the background, which double; with [`DIAL`] a way that is back is used within five seconds.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(2));
/// After so long it is traffic that asks again.
const GIVE_UP: Duration = Duration::from_secs(60);
/// Endpoints that are dialled at once; what one of them shows stands for the others.
const DIALS: usize = 16;

/// Whether a host is behind a gateway of ours, in another cluster.
pub(super) fn is_far(host: &Host) -> bool {
    matches!(host.slots, Slots::Asks(_)) && !host.workload.cluster.is_empty()
}

/// Whether something was sent and nothing heard since, on a session or on all connections to one place.
#[derive(Debug, Default)]
pub(crate) struct Link {
    waits: Cell<bool>,
    /// How often something was heard.
    heard: Cell<u64>,
    /// Tells who watches that it waits again, or is gone.
    told: Rc<Notify>,
}

impl Link {
    /// Something was sent that should be answered.
    pub(crate) fn said(&self) {
        if !self.waits.replace(true) {
            self.told.notify_one();
        }
    }

    /// Something came, whatever it was.
    pub(crate) fn heard(&self) {
        self.waits.set(false);
        self.heard.set(self.heard.get().wrapping_add(1));
    }

    /// Whether something was sent and nothing heard since.
    pub(super) fn waits(&self) -> bool {
        self.waits.get()
    }

    /// How often something was heard.
    pub(super) fn count(&self) -> u64 {
        self.heard.get()
    }

    /// What was sent is no longer waited for.
    fn give_up(&self) {
        self.waits.set(false);
    }

    /// How often something was heard, if something was sent since.
    fn heard_before(&self) -> Option<u64> {
        self.waits.get().then(|| self.heard.get())
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.told.notify_one();
    }
}

/// Returns when nothing was heard for [`ASK`] although something was sent; false if the link is gone. Whoever gave up
/// meanwhile was not answered either.
async fn silent(link: &Weak<Link>, told: &Notify) -> bool {
    let waits = || link.upgrade().map(|l| l.heard_before());
    'heard: loop {
        let Some(now) = waits() else { return false };
        let Some(heard) = now else {
            told.notified().await;
            continue;
        };
        for _ in 0..LOOKS {
            sleep(ASK / LOOKS).await;
            if waits() != Some(Some(heard)) {
                continue 'heard;
            }
        }
        return true;
    }
}

/// Watches a session for as long as it is open: it is asked itself. `keep` has it asked from time to time as well, and
/// ends it when it does not answer.
pub(super) fn watch_session(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    want: Want,
    conn: &Rc<H2Conn>,
    link: &Rc<Link>,
    mut pings: PingPong,
    keep: Option<Keep>,
) {
    let (worker, cluster, host) = (Rc::clone(worker), Arc::clone(cluster), Arc::clone(host));
    let (link, told) = (Rc::downgrade(link), Rc::clone(&link.told));
    let conn = Rc::downgrade(conn);
    tokio::task::spawn_local(async move {
        let mut round_trip = Duration::ZERO;
        loop {
            let open = tokio::select! {
                open = silent(&link, &told) => open,
                () = keepalive::pause(keep.as_ref()) => link.strong_count() > 0,
            };
            if !open {
                return;
            }
            let asked = Instant::now();
            if pings.send_ping(Ping::opaque()).is_err() {
                return;
            }
            let answer = poll_fn(|cx| pings.poll_pong(cx));
            let patience = PATIENCE.max(round_trip * 4);
            let most = keep.as_ref().map_or(Duration::MAX, |k| k.times.timeout);
            match timeout(patience.min(most), answer).await {
                Ok(Ok(_)) => {}
                Ok(Err(_)) => return,
                Err(_) => {
                    // What waits there goes on waiting; nothing new joins it.
                    if suspect(&worker, &cluster, &host, want)
                        && let Some(c) = conn.upgrade()
                    {
                        c.retire();
                    }
                    let answer = poll_fn(|cx| pings.poll_pong(cx));
                    match timeout(most.saturating_sub(asked.elapsed()), answer).await {
                        Ok(Ok(_)) => trust(&worker, &cluster, &host),
                        Ok(Err(_)) => return,
                        Err(_) => return keep.iter().for_each(|k| k.end.notify_one()),
                    }
                }
            }
            round_trip = asked.elapsed();
            if let Some(l) = link.upgrade() {
                l.heard();
            }
        }
    });
}

/// Watches connections of one request each to one place. HTTP/1 has no question that is not a request, so a new
/// session is asked: a handshake whenever nothing was answered for a second.
pub(super) fn watch_place(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    want: Want,
) -> Rc<Link> {
    let (worker, cluster, host) = (Rc::clone(worker), Arc::clone(cluster), Arc::clone(host));
    let watched: Rc<Link> = Rc::default();
    let (link, told) = (Rc::downgrade(&watched), Rc::clone(&watched.told));
    tokio::task::spawn_local(async move {
        let mut took = Duration::ZERO;
        while silent(&link, &told).await {
            let asked = Instant::now();
            let now = current(&worker, &cluster);
            let patience = HANDSHAKE.max(took * 2);
            if timeout(patience, answers(&worker, &now, &host, want)).await != Ok(true) {
                suspect(&worker, &cluster, &host, want);
                // Whoever dials behind asks on; more traffic, if it comes here nevertheless, begins anew.
                if let Some(l) = link.upgrade() {
                    l.give_up();
                }
                continue;
            }
            took = asked.elapsed();
            if let Some(l) = link.upgrade() {
                l.heard();
            }
        }
    });
    watched
}

/// Returns when a dial has taken so long that its way is suspected; never if there is no other.
pub(crate) async fn of_dial(worker: &Rc<Worker>, cluster: &Arc<Cluster>, host: &Arc<Host>, want: Want) {
    if is_far(host) {
        sleep(DIAL).await;
        if suspect(worker, cluster, host, want) {
            return;
        }
    }
    std::future::pending().await
}

/// The cluster as it is configured now.
fn current(worker: &Worker, cluster: &Arc<Cluster>) -> Arc<Cluster> {
    let compiled = worker.shared.compiled.load();
    let slot = compiled.clusters.get(cluster.config.name.as_str());
    slot.and_then(|s| s.load()).unwrap_or_else(|| Arc::clone(cluster))
}

/// Whether requests now go elsewhere.
fn suspect(worker: &Rc<Worker>, cluster: &Arc<Cluster>, host: &Arc<Host>, want: Want) -> bool {
    let now = current(worker, cluster);
    let Some(others) = now.suspect(host) else { return false };
    dial_behind(worker, cluster, host, want, None);
    let others: Vec<_> = others.into_iter().filter(|o| o.stats.id != host.stats.id).collect();
    let (dialled, rest) = others.split_at(others.len().min(DIALS - 1));
    let rest: Arc<[Arc<Host>]> = rest.into();
    for o in dialled {
        dial_behind(worker, cluster, o, want, Some(Arc::clone(&rest)));
    }
    true
}

fn trust(worker: &Worker, cluster: &Arc<Cluster>, host: &Host) {
    current(worker, cluster).trust(&[host]);
}

/// Whether a new session leads to the workload's proxy.
async fn answers(worker: &Rc<Worker>, cluster: &Arc<Cluster>, host: &Arc<Host>, want: Want) -> bool {
    let Ok(io) = connect_check(worker, cluster, host, want).await else { return false };
    if !(want == Want::Http2 || negotiated_h2(&io) || negotiated_tunnels(&io)) {
        // The handshake is all that can be had.
        return true;
    }
    // Not what limits are for.
    let Some(permit) = Permit::take(&cluster.usage, |u| &u.sessions, u32::MAX) else { return false };
    let Ok((_conn, Some(mut pings))) = start_h2(worker, io, permit, None, None).await else {
        return false;
    };
    pings.ping(Ping::opaque()).await.is_ok()
}

/// Dials a suspected host until it answers; `stands_for` return with it.
fn dial_behind(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    want: Want,
    stands_for: Option<Arc<[Arc<Host>]>>,
) {
    if host.stats.dialled_behind.swap(true, Relaxed) {
        return;
    }
    let (worker, cluster, host) = (Rc::clone(worker), Arc::clone(cluster), Arc::clone(host));
    tokio::task::spawn_local(async move {
        let begun = Instant::now();
        let mut pause = PAUSE.0;
        loop {
            let now = current(&worker, &cluster);
            if host.stats.gone.load(Relaxed) || !now.still_suspected(&host) {
                break;
            }
            if timeout(DIAL, answers(&worker, &now, &host, want)).await.is_ok_and(|yes| yes) {
                let stands_for = stands_for.as_deref().unwrap_or_default();
                let back: Vec<&Host> =
                    std::iter::once(&*host).chain(stands_for.iter().map(|h| &**h)).collect();
                now.trust(&back);
                break;
            }
            if begun.elapsed() > GIVE_UP {
                break;
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
        host.stats.dialled_behind.store(false, Relaxed);
    });
}

//! Finding a way for a session: a connection that is there, one that can be made, or TCP.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use mesh_model::ClusterId;
use rand::RngExt as _;
use tokio::net::TcpStream;

use crate::{
    Carrier, Trunk, TrunkStream,
    choice::{self, Transport},
    endpoint::{Inner, TCP_HOLD, TCP_TIMEOUT},
    links::Link,
};

/// A QUIC handshake that takes longer is taken for blocked UDP; TCP then has half a second left of
/// the two in which a session must be under way.
pub const QUIC_PATIENCE: Duration = Duration::from_millis(1500);
/// How long TCP stands in when the peer answered and refused: it may only be starting.
const REFUSED_HOLD: Duration = Duration::from_secs(1);
/// Pauses between dials of a connection that is kept up; they double, with jitter.
const REDIAL: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));
/// Gateways of one cluster that one session tries after the first.
const OTHERS: usize = 3;
/// The name only has to be one: whom the certificate may name is checked afterwards.
pub(crate) const NAME: &str = "trunk.flotilla.internal";

/// What carries sessions to an address now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// QUIC.
    Quic,
    /// TCP, since QUIC failed recently or the path is short and clean.
    Tcp,
    /// Nothing was dialled yet.
    Unused,
}

impl Trunk {
    /// What carries sessions to `address` now.
    #[must_use]
    pub fn path(&self, address: SocketAddr) -> Path {
        if let Some(link) = self.inner.links.dialled(address) {
            if link.prefers_tcp() { Path::Tcp } else { Path::Quic }
        } else if self.inner.links.on_hold(address) {
            Path::Tcp
        } else {
            Path::Unused
        }
    }

    /// Opens a session to the gateway at `address`, which must be of cluster `expect`, or to another gateway of that
    /// cluster, if this one drains or cannot be reached.
    ///
    /// # Errors
    /// If neither QUIC nor TCP gets through, or the gateway is of another cluster.
    pub async fn dial(&self, address: SocketAddr, expect: Option<&ClusterId>) -> io::Result<TrunkStream> {
        let inner = &self.inner;
        let tcp_alone = inner.options.transport.of(expect) == Transport::Tcp;
        let link = if tcp_alone { None } else { inner.link(address, expect).await };
        if let Some(link) = link {
            check_cluster(&link, expect)?;
            if let Some(s) = inner.preferred_tcp(&link).await {
                return Ok(s);
            }
            if let Ok(s) = inner.session(&link).await {
                return Ok(s);
            }
            // It broke just now.
            if let Some(link) = expect.and_then(|c| inner.links.to_cluster(c))
                && let Ok(s) = inner.session(&link).await
            {
                return Ok(s);
            }
        }
        if tcp_alone {
            inner.links.choose_tcp(address, choice::SET);
        }
        let mut result = inner.tcp(address).await;
        if let (Err(_), Some(cluster)) = (&result, expect) {
            if !tcp_alone
                && let Some(link) = inner.other(address, cluster).await
                && let Ok(s) = inner.session(&link).await
            {
                return Ok(s);
            }
            for other in inner.gateways(cluster).into_iter().filter(|a| *a != address).take(OTHERS) {
                result = inner.tcp(other).await;
                if result.is_ok() {
                    break;
                }
            }
        }
        result
    }

    /// Opens a session to a cluster whose gateways cannot be dialled, on a connection that one of them dialled.
    ///
    /// # Errors
    /// If none of them is connected.
    pub async fn dial_cluster(&self, cluster: &ClusterId) -> io::Result<TrunkStream> {
        let links = &self.inner.links;
        for _ in 0..2 {
            let Some(link) = links.to_cluster(cluster).or_else(|| links.last_resort(cluster)) else { break };
            if let Ok(s) = self.inner.session(&link).await {
                return Ok(s);
            }
        }
        Err(nobody(cluster))
    }
}

pub(crate) fn nobody(cluster: &ClusterId) -> io::Error {
    io::Error::new(
        io::ErrorKind::NotConnected,
        format!("cluster {cluster} announces no gateway address, and no gateway of it is connected"),
    )
}

impl Inner {
    /// A connection to the gateway at `address`, or to another one of that cluster; `None` while TCP stands in.
    pub(crate) async fn link(
        self: &Arc<Self>,
        address: SocketAddr,
        expect: Option<&ClusterId>,
    ) -> Option<Arc<Link>> {
        let there = self.links.dialled(address);
        match there.clone().filter(|l| l.is_usable()) {
            Some(l) => Some(l),
            None => match expect.and_then(|c| self.links.to_cluster(c)) {
                Some(l) => {
                    if there.is_none() {
                        self.dial_behind(address);
                    }
                    Some(l)
                }
                None => match (there, expect) {
                    (None, _) => self.connect(address).await,
                    // Silence may be an outage of everything, which ends; a drain does not.
                    (Some(l), Some(cluster)) if l.draining() => {
                        self.other(address, cluster).await.or(Some(l))
                    }
                    (there, _) => there,
                },
            },
        }
    }

    async fn session(&self, link: &Arc<Link>) -> io::Result<TrunkStream> {
        match tokio::time::timeout(TCP_TIMEOUT, link.connection.open_bi()).await {
            Ok(Ok((send, receive))) => {
                self.metrics.quic_sessions.inc();
                Ok(TrunkStream::quic(send, receive, link.sessions.enter()))
            }
            Ok(Err(error)) => {
                tracing::info!(cluster = %link.cluster, %error, "a trunk broke");
                Err(error.into())
            }
            Err(_) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("cluster {} takes no more sessions on this connection", link.cluster),
            )),
        }
    }

    /// A session over TCP to the gateway of a link that prefers it.
    async fn preferred_tcp(&self, link: &Arc<Link>) -> Option<TrunkStream> {
        let address = link.dialled.filter(|_| link.prefers_tcp())?;
        match tokio::time::timeout(choice::PATIENCE, self.tcp(address)).await {
            Ok(Ok(s)) => Some(s),
            Ok(Err(_)) | Err(_) => {
                link.choose(Carrier::Quic, "TCP does not get through".to_owned());
                self.links.leave_tcp(address);
                None
            }
        }
    }

    /// The inner session authenticates the workload; plain TCP to a gateway is what Istio has too.
    async fn tcp(&self, address: SocketAddr) -> io::Result<TrunkStream> {
        let tcp = tokio::time::timeout(TCP_TIMEOUT, TcpStream::connect(address))
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        tcp.set_nodelay(true)?;
        self.metrics.tcp_sessions.inc();
        Ok(TrunkStream::tcp(tcp, self.links.tcp(address).enter()))
    }

    pub(crate) fn gateways(&self, cluster: &ClusterId) -> Vec<SocketAddr> {
        let p = self.peers.borrow();
        let gateways = p.as_ref().and_then(|p| p.0.get(cluster));
        gateways.into_iter().flatten().map(|g| g.address).collect()
    }

    /// A connection to another gateway of a cluster than the one at `address`.
    async fn other(self: &Arc<Self>, address: SocketAddr, cluster: &ClusterId) -> Option<Arc<Link>> {
        for other in self.gateways(cluster).into_iter().filter(|a| *a != address).take(OTHERS) {
            if let Some(link) = self.connect(other).await.filter(|l| l.cluster == *cluster) {
                return Some(link);
            }
        }
        None
    }

    /// Dials without anybody waiting for it.
    fn dial_behind(self: &Arc<Self>, address: SocketAddr) {
        if self.links.on_hold(address) {
            return;
        }
        let lock = self.dial_lock(address);
        if lock.try_lock().is_err() {
            return;
        }
        drop(lock);
        let inner = self.clone();
        tokio::spawn(async move { inner.connect(address).await });
    }

    /// The connection dialled at `address`, made if need be, or `None` while TCP stands in.
    pub(crate) async fn connect(self: &Arc<Self>, address: SocketAddr) -> Option<Arc<Link>> {
        let known = || match self.links.dialled(address).filter(|l| !l.draining()) {
            Some(l) => Some(Some(l)),
            None => self.links.on_hold(address).then_some(None),
        };
        if let Some(k) = known() {
            return k;
        }
        let lock = self.dial_lock(address);
        let _one = lock.lock().await;
        if let Some(k) = known() {
            return k;
        }
        self.quic(address).await
    }

    async fn quic(self: &Arc<Self>, address: SocketAddr) -> Option<Arc<Link>> {
        let congestion = self.congestion();
        let dial = async {
            let (connecting, runtime) = self.dial(address, congestion.clone()).map_err(|e| e.to_string())?;
            let connection = connecting.await.map_err(|e| e.to_string())?;
            Ok((connection, runtime))
        };
        // A peer that answers and refuses may only be starting; silence is a network that eats UDP.
        let (result, hold) = match tokio::time::timeout(QUIC_PATIENCE, dial).await {
            Ok(r) => (r, REFUSED_HOLD),
            Err(_) => (Err(format!("no answer by QUIC within {} ms", QUIC_PATIENCE.as_millis())), TCP_HOLD),
        };
        let result = result.and_then(|(c, on)| {
            self.admit(c, Some(address), congestion.clone(), &on)
                .ok_or("its certificate names no cluster".into())
        });
        match result {
            Ok(link) => {
                tracing::info!(%address, cluster = %link.cluster, "trunk is up");
                Some(link)
            }
            Err(error) => {
                tracing::warn!(%address, %error, "QUIC does not get through: TCP takes over");
                self.metrics.quic_failures.inc();
                self.links.hold(address, hold, error);
                None
            }
        }
    }
}

/// Keeps a connection to `address` up, for as long as the task runs.
pub(crate) async fn keep_up(inner: Arc<Inner>, cluster: ClusterId, address: SocketAddr) {
    let mut pause = REDIAL.0;
    loop {
        let link = {
            let lock = inner.dial_lock(address);
            let _one = lock.lock().await;
            // Not bound to what holds for sessions: nothing waits here.
            match inner.links.dialled(address).filter(|l| !l.draining()) {
                Some(l) => Some(l),
                None => inner.quic(address).await,
            }
        };
        if let Some(link) = link.filter(|l| l.cluster == cluster) {
            tokio::select! {
                _ = link.connection.closed() => {}
                () = link.until_draining() => {}
            }
            pause = REDIAL.0;
        }
        let jitter = rand::rng().random_range(0.5..1.0);
        tokio::time::sleep(pause.mul_f64(jitter)).await;
        pause = (pause * 2).min(REDIAL.1);
    }
}

pub(crate) fn check_cluster(link: &Link, expect: Option<&ClusterId>) -> io::Result<()> {
    match expect {
        Some(expect) if link.cluster != *expect => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("the gateway is of cluster {}, not of {expect}", link.cluster),
        )),
        _ => Ok(()),
    }
}

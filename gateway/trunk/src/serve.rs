//! What happens on a connection for as long as it lives, whoever dialled it: sessions of the peer are handed to the
//! east-west listener, its notices are heeded, and its silence is noticed.

use std::{net::SocketAddr, sync::Arc};

use quinn::VarInt;
use tokio::{net::TcpStream, runtime::Handle, sync::OwnedSemaphorePermit};

use crate::{
    DeliverTo, TrunkStream, choice,
    endpoint::{Inner, TCP_HOLD, TCP_TIMEOUT},
    flows,
    links::Link,
    watch::{self, Lost},
};

/// The only notice so far: the sender ends soon. It is the first byte of a unidirectional stream; unknown ones are
/// ignored, so that later versions may say more.
const DRAINING: u8 = 1;
/// A notice is a few bytes.
const NOTICE: usize = 64;

/// Takes a link in, and out again when its connection has ended.
pub(crate) fn start(inner: &Arc<Inner>, link: Arc<Link>, runtime: &Handle) {
    inner.links.insert(link.clone());
    let inner = inner.clone();
    runtime.spawn(async move {
        tokio::select! {
            () = sessions(&inner, &link) => {}
            () = notices(&link) => {}
            () = flows::take(&inner, &link) => {}
            () = silence(&inner, &link) => {}
            () = choice::measure(&inner, &link) => {}
            _ = link.connection.closed() => {}
        }
        link.flows.close();
        inner.links.remove(&link);
        tracing::info!(cluster = %link.cluster, address = %link.connection.remote_address(), "a trunk ended");
    });
}

async fn sessions(inner: &Arc<Inner>, link: &Arc<Link>) {
    while let Ok((send, receive)) = link.connection.accept_bi().await {
        let session = TrunkStream::quic(send, receive, link.sessions.enter());
        match &inner.options.deliver_to {
            DeliverTo::Channel(to) => {
                // Nobody takes any more: the gateway ends.
                let _ = to.send((session, link.connection.remote_address())).await;
            }
            DeliverTo::Address(to) => {
                let Ok(permit) = inner.deliveries.clone().acquire_owned().await else { return };
                tokio::spawn(connect(session, *to, permit));
            }
        }
        inner.metrics.accepted_sessions.inc();
    }
}

/// Carries a session over a connection to the listener.
async fn connect(mut session: TrunkStream, to: SocketAddr, permit: OwnedSemaphorePermit) {
    match tokio::time::timeout(TCP_TIMEOUT, TcpStream::connect(to)).await {
        Ok(Ok(mut local)) => {
            drop(permit);
            let _ = local.set_nodelay(true);
            // Whoever breaks first ends the session; both ends see it.
            let _ = tokio::io::copy_bidirectional(&mut session, &mut local).await;
        }
        Ok(Err(error)) => tracing::warn!(%error, %to, "the east-west listener is away"),
        Err(_) => tracing::warn!(%to, "the east-west listener does not answer"),
    }
}

async fn notices(link: &Link) {
    while let Ok(mut stream) = link.connection.accept_uni().await {
        // Too long or broken off: nothing that this version knows.
        let Ok(notice) = stream.read_to_end(NOTICE).await else { continue };
        if notice.first() == Some(&DRAINING) && link.drain() {
            tracing::info!(
                cluster = %link.cluster, address = %link.connection.remote_address(),
                "the gateway drains: new sessions go elsewhere"
            );
        }
    }
}

/// Tells the peer of a link that this gateway ends soon; returns when the peer has it.
pub(crate) async fn say_draining(link: Arc<Link>) {
    if !link.both_ways {
        return;
    }
    let said = async {
        let mut s = link.connection.open_uni().await?;
        s.write_all(&[DRAINING]).await?;
        let _ = s.finish();
        let _ = s.stopped().await;
        Ok::<_, std::io::Error>(())
    };
    if let Err(error) = said.await {
        tracing::debug!(cluster = %link.cluster, %error, "the peer was not told of the drain");
    }
}

/// Gives a connection up that leads nowhere: TCP takes over, or says at once that nobody is there. One that the peer
/// dialled, too, if it comes from where a gateway of the peer can be dialled.
async fn silence(inner: &Arc<Inner>, link: &Link) {
    // The peer may move, and this gateway may hear only later where it can be dialled.
    let known = || {
        let from = link.connection.remote_address().ip();
        inner.gateways(&link.cluster).into_iter().find(|a| a.ip() == from)
    };
    let Some(lost) = watch::lost(&link.connection, || link.dialled.or_else(known), &link.silent).await else {
        return;
    };
    let (reason, what) = match lost {
        Lost::Blocked => ("UDP stopped getting through", "UDP no longer gets through: TCP takes over"),
        Lost::Gone => ("the gateway did not answer any more", "the gateway is gone: its sessions end"),
    };
    // What came from the peer says nothing about a dial in the other direction.
    if let Some(address) = link.dialled {
        tracing::warn!(%address, cluster = %link.cluster, "{what}");
        inner.metrics.quic_failures.inc();
        inner.links.hold(address, TCP_HOLD, reason.to_owned());
    }
    link.connection.close(VarInt::from_u32(2), reason.as_bytes());
}

//! The importing side of an exchange: one task per peer.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::StreamExt;
use mesh_model::ClusterId;
use rand::RngExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    dial,
    exchange::{Next, SILENCE_MS},
    federate,
    pb::{exporter_frame, federation_client::FederationClient},
    roots,
    state::Shared,
};

/// Largest frame that a peer may send: a batch of members, or one service, with room.
const MAX_FRAME: usize = 256 * 1024;
const NOT_A_MEMBER: &str = "not a member any more";

/// Follows a peer for as long as it is a member.
pub(crate) async fn follow(shared: Arc<Shared>, peer: ClusterId) {
    loop {
        let nudged = shared.nudge.notified();
        let next = shared.lock().node.next(&peer, shared.now());
        match next {
            None => return,
            // Streams are read in `exchange`, which ends before this task is asked again.
            Some(Next::Close) => {}
            Some(Next::Wait(until)) => {
                let wait = Duration::from_millis(until.saturating_sub(shared.now()));
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = nudged => {}
                }
                continue;
            }
            Some(Next::Dial) => {}
        }
        let error = match exchange(&shared, &peer).await {
            Ok(()) => "the peer closed the exchange".to_owned(),
            Err(e) => e,
        };
        let now = shared.now();
        let mut t = shared.lock();
        t.node.lost(&peer, now, rand::rng().random_range(0.0..1.0));
        if !t.node.members.is_member(&peer) {
            return;
        }
        let link = t.links.entry(peer.clone()).or_default();
        if link.connected || link.last_error != error {
            tracing::info!(%peer, %error, "not connected");
        }
        link.connected = false;
        link.last_error = error;
    }
}

async fn exchange(shared: &Arc<Shared>, peer: &ClusterId) -> Result<(), String> {
    let addresses = {
        let t = shared.lock();
        let member = t.node.members.get(peer).ok_or(NOT_A_MEMBER)?;
        match shared.options.via {
            Some(own_gateway) => vec![own_gateway],
            None => member.gateways.iter().map(|g| g.address).collect(),
        }
    };
    let foreign = shared.lock().node.members.domain_of(peer).cloned();
    let trust_domain = foreign
        .as_ref()
        .map(ToString::to_string)
        .or_else(|| shared.trust_domain())
        .ok_or("this cluster is in no mesh")?;
    let (channel, certificate_ends) =
        dial::member(&shared.secrets, &trust_domain, peer, &addresses).await.map_err(|e| e.to_string())?;
    // Resubscriptions and acknowledgements; both are rare and small.
    let (tx, rx) = mpsc::channel(16);
    let subscribe = shared.lock().node.connected(peer, shared.now()).ok_or(NOT_A_MEMBER)?;
    tx.send(subscribe).await.map_err(|e| e.to_string())?;
    let bundles: Pin<Box<dyn Future<Output = ()> + Send>> = match foreign {
        Some(domain) => Box::pin(federate::follow(shared.clone(), peer.clone(), domain, channel.clone())),
        None => Box::pin(roots::follow(shared.clone(), peer.clone(), channel.clone())),
    };
    let mut client = FederationClient::new(channel).max_decoding_message_size(MAX_FRAME);
    let opened = client.exchange(ReceiverStream::new(rx));
    let mut frames = tokio::time::timeout(Duration::from_millis(SILENCE_MS), opened)
        .await
        .map_err(|_| "the exchange was not opened in time")?
        .map_err(|s| s.message().to_owned())?
        .into_inner();
    {
        let mut t = shared.lock();
        let link = t.links.entry(peer.clone()).or_default();
        link.connected = true;
        link.certificate_ends = certificate_ends;
        link.last_error.clear();
    }
    tracing::info!(%peer, "connected");
    // Ends with the connection.
    let _bundles = AbortOnDropHandle::new(tokio::spawn(bundles));
    loop {
        // Every frame sets the deadline anew.
        let deadline = match shared.lock().node.next(peer, shared.now()) {
            None => return Err(NOT_A_MEMBER.into()),
            Some(Next::Wait(until)) => until,
            Some(Next::Close | Next::Dial) => {
                return Err(format!("no frame for {} s", SILENCE_MS / 1000));
            }
        };
        let wait = Duration::from_millis(deadline.saturating_sub(shared.now()));
        let frame = match tokio::time::timeout(wait, frames.next()).await {
            Err(_) => continue,
            Ok(None) => return Ok(()),
            Ok(Some(Err(s))) => return Err(s.message().to_owned()),
            Ok(Some(Ok(f))) => f,
        };
        let (heard, refusal) = {
            let mut t = shared.lock();
            if let (Some(exporter_frame::Frame::Welcome(w)), Some(link)) = (&frame.frame, t.link(peer)) {
                link.protocol = w.protocol;
                link.runs(&w.software);
            }
            let heard = t.node.on_frame(peer, frame, shared.now()).ok_or(NOT_A_MEMBER)?;
            let import = t.node.imports.get(peer).filter(|_| heard.step.refused);
            // The first few by name: a hostile peer must not fill the log.
            let refusal = import.and_then(|i| match i.refusals() {
                (n, kept) if n == kept.len() as u64 => kept.last().cloned(),
                _ => None,
            });
            (heard, refusal)
        };
        if let Some(refusal) = refusal {
            tracing::warn!(%peer, %refusal, "refused a record");
        }
        shared.members_merged(&heard.merged).map_err(|e| e.to_string())?;
        match heard.reply {
            Some(f) if heard.step.resubscribe => tx.send(f).await.map_err(|e| e.to_string())?,
            // An acknowledgement that finds the queue full is not worth waiting for.
            Some(f) => drop(tx.try_send(f)),
            None => {}
        }
    }
}

//! The importing side of an exchange: one task per peer.

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use mesh_model::ClusterId;
use rand::RngExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    dial,
    pb::{
        ImporterFrame, Received, Subscribe, exporter_frame::Frame, federation_client::FederationClient,
        importer_frame,
    },
    service::PROTOCOL,
    state::Shared,
    wire,
};

/// Without a frame for this long (three leases) the stream is taken for dead and opened again.
const SILENCE: Duration = Duration::from_secs(3);
/// First pause before reconnecting; doubles up to [`MAX_PAUSE`], with jitter. Short, because a cluster
/// that comes back is to be used again within seconds.
const MIN_PAUSE: Duration = Duration::from_millis(200);
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// Follows a peer for as long as it is a member.
pub(crate) async fn follow(shared: Arc<Shared>, peer: ClusterId) {
    let mut pause = MIN_PAUSE;
    loop {
        let error = match exchange(&shared, &peer, &mut pause).await {
            Ok(()) => "the peer closed the exchange".to_owned(),
            Err(e) => e,
        };
        {
            let mut t = shared.lock();
            let link = t.links.entry(peer.clone()).or_default();
            if link.connected || link.last_error != error {
                tracing::info!(%peer, %error, "not connected");
            }
            link.connected = false;
            link.last_error = error;
        }
        let jitter = rand::rng().random_range(0.5..1.0);
        tokio::time::sleep(pause.mul_f64(jitter)).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

async fn exchange(shared: &Arc<Shared>, peer: &ClusterId, pause: &mut Duration) -> Result<(), String> {
    let (addresses, subscribe) = {
        let mut t = shared.lock();
        let member = t.members.get(peer).cloned().ok_or("not a member any more")?;
        let addresses = match shared.options.via {
            Some(own_gateway) => vec![own_gateway],
            None => member.gateways.iter().map(|g| g.address).collect(),
        };
        let epoch = t.members.get(&shared.options.cluster).map_or(1, |m| m.epoch);
        let this = wire::member_pb(&shared.self_member(epoch));
        let import = t.imports.get_mut(peer).ok_or("not imported any more")?;
        (addresses, subscription(import, this))
    };
    let trust_domain = shared.trust_domain().ok_or("this cluster is in no mesh")?;
    let channel =
        dial::member(&shared.secrets, &trust_domain, peer, &addresses).await.map_err(|e| e.to_string())?;
    // Resubscriptions and acknowledgements; both are rare and small.
    let (tx, rx) = mpsc::channel(16);
    tx.send(subscribe).await.map_err(|e| e.to_string())?;
    let mut frames = FederationClient::new(channel)
        .exchange(ReceiverStream::new(rx))
        .await
        .map_err(|s| s.message().to_owned())?
        .into_inner();
    {
        let mut t = shared.lock();
        let link = t.links.entry(peer.clone()).or_default();
        link.connected = true;
        link.last_error.clear();
    }
    tracing::info!(%peer, "connected");
    loop {
        let frame = match tokio::time::timeout(SILENCE, frames.next()).await {
            Err(_) => return Err(format!("no frame for {} s", SILENCE.as_secs())),
            Ok(None) => return Ok(()),
            Ok(Some(Err(s))) => return Err(s.message().to_owned()),
            Ok(Some(Ok(f))) => f,
        };
        *pause = MIN_PAUSE;
        if let Some(Frame::Members(m)) = &frame.frame {
            // A member list that cannot be read entirely is used as far as it can.
            let news = m.members.iter().cloned().filter_map(|m| wire::member(m).ok()).collect();
            shared.merge_members(news).map_err(|e| e.to_string())?;
            continue;
        }
        let is_lease = matches!(frame.frame, Some(Frame::Lease(_)));
        let (step, offset, kept, resubscribe) = {
            let now = shared.now();
            let mut t = shared.lock();
            let epoch = t.members.get(&shared.options.cluster).map_or(1, |m| m.epoch);
            let import = t.imports.get_mut(peer).ok_or("not imported any more")?;
            let step = import.on_frame(now, frame).map_err(|e| e.to_string())?;
            let this = step.resubscribe.then(|| wire::member_pb(&shared.self_member(epoch)));
            let again = this.map(|this| subscription(import, this));
            (step, import.offset(), step.changed.then(|| import.persist()), again)
        };
        if let Some(kept) = kept {
            if let Err(error) = shared.store.save_import(peer, &kept) {
                tracing::warn!(%peer, %error, "imports were not saved; a restart would start without them");
            }
            shared.publish();
        }
        if let Some(again) = resubscribe {
            tx.send(again).await.map_err(|e| e.to_string())?;
        } else if is_lease && !step.changed {
            let ack = importer_frame::Frame::Received(Received { offset });
            // An acknowledgement that finds the queue full is not worth waiting for.
            let _ = tx.try_send(ImporterFrame { frame: Some(ack) });
        }
    }
}

fn subscription(import: &mut crate::exchange::Import, this: crate::pb::Member) -> ImporterFrame {
    let (log_id, offset) = import.subscribe();
    ImporterFrame {
        frame: Some(importer_frame::Frame::Subscribe(Subscribe {
            min_protocol: PROTOCOL.0,
            max_protocol: PROTOCOL.1,
            log_id,
            offset,
            self_: Some(this),
        })),
    }
}

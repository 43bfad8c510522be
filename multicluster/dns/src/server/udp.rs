//! Datagrams of one workload.

use std::{sync::Arc, time::Duration};

use tokio::net::UdpSocket;

use super::{
    batch::LARGEST_QUESTION,
    worker::{Step, Worker},
};
use crate::wire::{MAX_PAYLOAD, Transport};

/// After an error of the socket, which may come at once again.
const PAUSE: Duration = Duration::from_millis(10);

pub(super) async fn serve(socket: Arc<UdpSocket>, mut worker: Worker) {
    let (mut packet, mut out) = (vec![0; LARGEST_QUESTION], vec![0; usize::from(MAX_PAYLOAD)]);
    loop {
        let (len, from) = match socket.recv_from(&mut packet).await {
            Ok(r) => r,
            Err(error) => {
                tracing::debug!(%error, "a question was not received");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        worker.refresh();
        match worker.handle(&packet[..len], &mut out, Transport::Udp) {
            Step::Reply(len) => {
                if let Err(error) = socket.send_to(&out[..len], from).await {
                    tracing::debug!(%error, "an answer was not sent");
                }
            }
            Step::Wait(waiting) => {
                let socket = socket.clone();
                tokio::spawn(async move {
                    let _ = socket.send_to(&waiting.answer().await, from).await;
                });
            }
            Step::Nothing => {}
        }
    }
}

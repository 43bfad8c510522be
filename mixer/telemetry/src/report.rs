//! The telemetry client: batches reports, never waits, counts what it drops.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tonic::transport::Channel;

use crate::{
    attributes::{Bag, ReportEncoder},
    proto::mixer_v1::{ReportRequest, mixer_client::MixerClient},
};

/// Largest batch.
const MAX_BATCH: usize = 1_000;

/// How a [`ReportClient`] behaves.
#[derive(Debug, Clone)]
pub struct ReportOptions {
    /// Bags that may wait for their batch. At 4,096, a proxy with 4,000 requests per second survives
    /// a second without an answer; beyond it, newer ones are dropped and counted.
    pub queue: usize,
    /// Longest time a bag waits for others.
    pub max_delay: Duration,
    /// Longest wait for an answer; then the batch is dropped.
    pub timeout: Duration,
}

impl Default for ReportOptions {
    fn default() -> Self {
        Self { queue: 4_096, max_delay: Duration::from_secs(1), timeout: Duration::from_secs(5) }
    }
}

#[derive(Debug, Default)]
struct Counts {
    sent: AtomicU64,
    dropped: AtomicU64,
}

/// A telemetry client. Clones share queue and connection; when the last one is dropped, what waits
/// is sent and the task ends.
#[derive(Debug, Clone)]
pub struct ReportClient {
    queue: mpsc::Sender<Bag>,
    counts: Arc<Counts>,
}

impl ReportClient {
    /// Starts a client on the current runtime.
    #[must_use]
    pub fn start(channel: Channel, options: ReportOptions) -> Self {
        let (queue, rx) = mpsc::channel(options.queue.max(1));
        let counts = Arc::new(Counts::default());
        tokio::spawn(run(rx, MixerClient::new(channel), options, counts.clone()));
        Self { queue, counts }
    }

    /// Adds a report. Never waits: false if it was dropped, because reports come faster than they
    /// are taken.
    pub fn report(&self, bag: Bag) -> bool {
        let taken = self.queue.try_send(bag).is_ok();
        if !taken {
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
        }
        taken
    }

    /// Reports that Mixer has taken.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.counts.sent.load(Ordering::Relaxed)
    }

    /// Reports that were dropped.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.counts.dropped.load(Ordering::Relaxed)
    }
}

async fn run(
    mut queue: mpsc::Receiver<Bag>,
    mut client: MixerClient<Channel>,
    options: ReportOptions,
    counts: Arc<Counts>,
) {
    let mut batch = ReportEncoder::default();
    while let Some(first) = queue.recv().await {
        let deadline = Instant::now() + options.max_delay;
        let mut next = Some(first);
        while let Some(bag) = next.take() {
            if !batch.push(&bag) {
                send(&mut client, &mut batch, &options, &counts).await;
                // An empty encoder takes any bag.
                let _ = batch.push(&bag);
            }
            if batch.len() >= MAX_BATCH {
                break;
            }
            // The end of the queue and the deadline both end the batch.
            next = tokio::time::timeout_at(deadline, queue.recv()).await.ok().flatten();
        }
        send(&mut client, &mut batch, &options, &counts).await;
    }
}

async fn send(
    client: &mut MixerClient<Channel>,
    batch: &mut ReportEncoder,
    options: &ReportOptions,
    counts: &Counts,
) {
    if batch.is_empty() {
        return;
    }
    let n = batch.len() as u64;
    let request: ReportRequest = batch.finish();
    let reason = match timeout(options.timeout, client.report(request)).await {
        Ok(Ok(_)) => {
            counts.sent.fetch_add(n, Ordering::Relaxed);
            return;
        }
        Ok(Err(status)) => status.message().to_owned(),
        Err(_) => "no answer in time".to_owned(),
    };
    counts.dropped.fetch_add(n, Ordering::Relaxed);
    tracing::debug!(reason, dropped = n, "reports were not taken");
}

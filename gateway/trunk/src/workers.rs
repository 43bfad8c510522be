//! Threads with a current-thread runtime each, on which connections live.

use std::io;

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;

/// The runtimes of a trunk. Dropping it ends them soon; nobody waits, since it may be dropped on one of them.
pub(crate) struct Workers {
    pub(crate) runtimes: Vec<Handle>,
    stop: CancellationToken,
}

impl Workers {
    /// Starts `n` threads; with none the connections live on the runtime of the caller.
    pub(crate) fn start(n: usize) -> io::Result<Self> {
        let stop = CancellationToken::new();
        let mut workers = Self { runtimes: vec![], stop: stop.clone() };
        for i in 0..n {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            workers.runtimes.push(runtime.handle().clone());
            let stop = stop.clone();
            let thread = std::thread::Builder::new().name(format!("trunk-{i}"));
            thread.spawn(move || runtime.block_on(stop.cancelled_owned()))?;
        }
        if n == 0 {
            workers.runtimes.push(Handle::current());
        }
        Ok(workers)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

//! The writer of an access log.
//!
//! A line that wakes a thread costs more than everything else about it, so lines gather: each worker appends to a
//! buffer of its own, and a thread takes all buffers ten times a second, or when one of them is full.

use std::{
    cell::Cell,
    fs::OpenOptions,
    io::{self, Write},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::Duration,
};

use prometheus_client::metrics::counter::Counter;

/// How long a line may wait for others.
const GATHER: Duration = Duration::from_millis(100);
/// A buffer of this size is written at once.
const FULL: usize = 64 * 1024;
/// What a buffer may hold while the writer is behind: some 3,000 lines; further ones are dropped and counted.
const MAX_BUFFERED: usize = 1024 * 1024;
/// Buffers; workers beyond this many share them.
const SHARDS: usize = 16;

/// A file that lines are written to by a thread of its own. Dropping it writes what is buffered.
#[derive(Debug)]
pub struct LogSink {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    dropped: Counter,
}

#[derive(Debug, Default)]
struct Shared {
    shards: [Mutex<Vec<u8>>; SHARDS],
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Some buffer is not empty.
    waiting: bool,
    /// Some buffer should not wait.
    full: bool,
    closed: bool,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number of this thread, so that workers do not meet at one buffer.
fn shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static MINE: Cell<Option<usize>> = const { Cell::new(None) });
    MINE.with(|mine| {
        let n = mine.get().unwrap_or_else(|| NEXT.fetch_add(1, Relaxed));
        mine.set(Some(n));
        n % SHARDS
    })
}

impl LogSink {
    /// Opens `path` for appending; `/dev/stdout` and `/dev/stderr` are this process's. Lines that the writer
    /// cannot keep up with are counted in `dropped`.
    ///
    /// # Errors
    /// The file cannot be opened, or no thread started.
    pub fn open(path: &str, dropped: Counter) -> io::Result<Self> {
        let out: Box<dyn Write + Send> = match path {
            "/dev/stdout" => Box::new(io::stdout()),
            "/dev/stderr" => Box::new(io::stderr()),
            p => Box::new(OpenOptions::new().create(true).append(true).open(p)?),
        };
        let shared = Arc::new(Shared::default());
        let writer = Arc::clone(&shared);
        let thread =
            std::thread::Builder::new().name("access-log".into()).spawn(move || writer.write_all(out))?;
        Ok(Self { shared, thread: Some(thread), dropped })
    }

    /// Adds a line; never waits for the file.
    pub fn write(&self, line: &str) {
        let (first, full) = {
            let mut buf = lock(&self.shared.shards[shard()]);
            let before = buf.len();
            if before + line.len() > MAX_BUFFERED {
                drop(buf);
                self.dropped.inc();
                return;
            }
            buf.extend_from_slice(line.as_bytes());
            (before == 0, before < FULL && buf.len() >= FULL)
        };
        if first || full {
            let mut s = lock(&self.shared.state);
            s.waiting = true;
            s.full |= full;
            drop(s);
            self.shared.changed.notify_one();
        }
    }
}

impl Drop for LogSink {
    fn drop(&mut self) {
        lock(&self.shared.state).closed = true;
        self.shared.changed.notify_one();
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

impl Shared {
    fn write_all(&self, mut out: Box<dyn Write + Send>) {
        let mut batch = Vec::new();
        loop {
            let closed = {
                let idle = |s: &mut State| !s.waiting && !s.closed;
                let s =
                    self.changed.wait_while(lock(&self.state), idle).unwrap_or_else(PoisonError::into_inner);
                let few = |s: &mut State| !s.full && !s.closed;
                let (mut s, _) =
                    self.changed.wait_timeout_while(s, GATHER, few).unwrap_or_else(PoisonError::into_inner);
                // Cleared before the buffers are taken: what comes in between asks again.
                s.waiting = false;
                s.full = false;
                s.closed
            };
            for shard in &self.shards {
                std::mem::swap(&mut batch, &mut *lock(shard));
                // A full disk must not stop the proxy; the next lines may find room again.
                let _ = out.write_all(&batch);
                batch.clear();
                batch.shrink_to(2 * FULL);
            }
            let _ = out.flush();
            if closed {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str) -> std::path::PathBuf {
        std::env::temp_dir().join(format!("flotilla-log-{name}-{}", std::process::id()))
    }

    #[test]
    fn a_sink_writes_everything_when_dropped() {
        let path = file("drop");
        let dropped = Counter::default();
        let sink = LogSink::open(path.to_str().unwrap(), dropped.clone()).unwrap();
        std::thread::scope(|s| {
            for t in 0..4 {
                let sink = &sink;
                s.spawn(move || (0..1000).for_each(|i| sink.write(&format!("{t} {i}\n"))));
            }
        });
        drop(sink);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!((text.lines().count(), dropped.get()), (4000, 0));
        let of = |t: &str| text.lines().filter(|l| l.starts_with(t)).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(of("2 "), (0..1000).map(|i| format!("2 {i}")).collect::<Vec<_>>());
    }

    #[test]
    fn a_line_does_not_wait_for_others_forever() {
        let path = file("alone");
        let sink = LogSink::open(path.to_str().unwrap(), Counter::default()).unwrap();
        for line in ["a\n", "b\n"] {
            sink.write(line);
            let begun = std::time::Instant::now();
            while !std::fs::read_to_string(&path).unwrap().ends_with(line) {
                assert!(begun.elapsed() < Duration::from_secs(30));
                std::thread::yield_now();
            }
        }
        drop(sink);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn what_does_not_fit_is_counted() {
        let dropped = Counter::default();
        let sink = LogSink::open("/dev/null", dropped.clone()).unwrap();
        sink.write(&"x".repeat(MAX_BUFFERED + 1));
        assert_eq!(dropped.get(), 1);
    }
}

//! A wide-area link in user space: Ethernet frames between the gateways of clusters, passed on by a
//! thread of the test, so that the test can cut, delay and lose them and see every one.
//!
//! The kernel's own emulation (netem) is not everywhere; packet sockets are. [`switch`] decides about
//! frames without any I/O; [`port`] reads and writes them.

mod port;
pub mod switch;

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context;

pub(crate) use self::port::enter;
pub use self::switch::{Counts, Rule};
use self::{port::Port, switch::Switch};

/// A running link; dropping it stops the thread.
pub struct Wan {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    switch: Mutex<Switch>,
    capture: Mutex<Option<BufWriter<File>>>,
    stop: AtomicBool,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic of another test leaves data that is still whole: every update is one assignment.
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wan {
    /// Starts passing frames between `interfaces` of the network namespace `namespace`.
    ///
    /// # Errors
    /// No such namespace or interface, or no permission for packet sockets.
    pub fn start(namespace: &str, interfaces: &[String]) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared {
            switch: Mutex::new(Switch::new(interfaces.len())),
            capture: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        let (said, hear) = std::sync::mpsc::sync_channel(1);
        let (names, ns, mine) = (interfaces.to_vec(), namespace.to_owned(), shared.clone());
        let thread = std::thread::Builder::new().name("wan".into()).spawn(move || {
            // The namespace is a property of a thread, so this one belongs to the link alone.
            let ports = port::enter(&ns)
                .and_then(|()| names.iter().map(|n| Port::open(n)).collect::<anyhow::Result<Vec<_>>>());
            match ports {
                Ok(ports) => {
                    let _ = said.send(Ok(()));
                    pass(&mine, &ports);
                }
                Err(e) => {
                    let _ = said.send(Err(e));
                }
            }
        })?;
        hear.recv().context("the link's thread ended")??;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Sets what happens to frames from one port to another; ports count from 0 in the order given.
    pub fn set(&self, from: usize, to: usize, rule: Rule) {
        lock(&self.shared.switch).set(from, to, rule);
    }

    /// Sets the rule of every direction.
    pub fn set_all(&self, rule: Rule) {
        let mut s = lock(&self.shared.switch);
        for from in 0..s.ports() {
            for to in 0..s.ports() {
                s.set(from, to, rule);
            }
        }
    }

    /// What was passed and what was not.
    pub fn counts(&self) -> Counts {
        lock(&self.shared.switch).counts()
    }

    /// Writes every frame that is passed from now on to a pcap file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn capture(&self, file: &Path) -> anyhow::Result<()> {
        let mut out = BufWriter::new(File::create(file).with_context(|| file.display().to_string())?);
        // pcap file header: magic, version 2.4, zone, accuracy, snap length, link type Ethernet.
        out.write_all(&0xa1b2_c3d4u32.to_le_bytes())?;
        out.write_all(&[2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 1, 0, 0, 0])?;
        *lock(&self.shared.capture) = Some(out);
        Ok(())
    }

    /// Ends the capture.
    ///
    /// # Errors
    /// The rest of the file cannot be written.
    pub fn end_capture(&self) -> io::Result<()> {
        match lock(&self.shared.capture).take() {
            Some(mut out) => out.flush(),
            None => Ok(()),
        }
    }
}

impl Drop for Wan {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

fn pass(shared: &Shared, ports: &[Port]) {
    let mut buffer = vec![0u8; 65_536];
    while !shared.stop.load(Ordering::Relaxed) {
        let due = lock(&shared.switch).next_due();
        let longest = Duration::from_millis(20);
        let wait = due.map_or(longest, |d| d.saturating_duration_since(Instant::now()).min(longest));
        for from in port::readable(ports, wait) {
            // A few frames of one port at a time, so that no direction starves another.
            for _ in 0..64 {
                let Some(n) = ports[from].receive(&mut buffer) else { break };
                lock(&shared.switch).offer(Instant::now(), from, &buffer[..n]);
            }
        }
        loop {
            let Some((to, frame)) = lock(&shared.switch).take_due(Instant::now()) else { break };
            if let Some(out) = lock(&shared.capture).as_mut() {
                // The test that reads the file sees a short one; nothing better can be done here.
                let _ = record(out, &frame);
            }
            ports[to].send(&frame);
        }
    }
}

fn record(out: &mut impl Write, frame: &[u8]) -> io::Result<()> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let n = u32::try_from(frame.len()).unwrap_or(u32::MAX);
    // The format's 32 bits of seconds.
    out.write_all(&(now.as_secs() as u32).to_le_bytes())?;
    out.write_all(&now.subsec_micros().to_le_bytes())?;
    out.write_all(&n.to_le_bytes())?;
    out.write_all(&n.to_le_bytes())?;
    out.write_all(frame)
}

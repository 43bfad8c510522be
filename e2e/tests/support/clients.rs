//! `openssl s_client`: a TLS client that says what it is told and shows what comes back.

use std::{
    io::{Read as _, Write as _},
    net::SocketAddr,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// A connection that stays open until dropped.
pub(crate) struct TlsClient {
    child: Child,
    stdin: ChildStdin,
    seen: Arc<Mutex<String>>,
}

impl TlsClient {
    /// Connects; `extra` are more flags of `openssl s_client`.
    pub(crate) fn connect(address: SocketAddr, server_name: &str, extra: &[&str]) -> Self {
        let mut child = Command::new("openssl")
            .args(["s_client", "-connect", &address.to_string(), "-servername", server_name])
            .args(["-quiet", "-ign_eof"])
            .args(extra)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let seen = Arc::new(Mutex::new(String::new()));
        let to = seen.clone();
        std::thread::spawn(move || {
            let mut buf = [0; 4096];
            while let Ok(n @ 1..) = stdout.read(&mut buf) {
                to.lock().unwrap().push_str(&String::from_utf8_lossy(&buf[..n]));
            }
        });
        Self { child, stdin, seen }
    }

    /// Sends a GET and waits until `expected` arrives; the error is what arrived instead.
    pub(crate) fn get(&mut self, host: &str, path: &str, expected: &str) -> Result<(), String> {
        self.seen.lock().unwrap().clear();
        let sent = write!(self.stdin, "GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n");
        let begun = Instant::now();
        loop {
            let seen = self.seen.lock().unwrap().clone();
            if seen.contains(expected) {
                return Ok(());
            }
            let ended = self.child.try_wait().unwrap();
            if ended.is_some() || begun.elapsed() > Duration::from_secs(10) {
                return Err(format!("{seen:?} (sent: {sent:?}, ended: {ended:?})"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for TlsClient {
    fn drop(&mut self) {
        // A process that has ended already is as dead as wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! Servers that tests put behind the mesh.

use std::{
    io::{BufRead, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

/// An HTTP/1.1 server that answers every request with its own name and the request's head, after it
/// has read the whole of it: an answer that overtakes its request ends the stream at a proxy, and
/// what is wrong with the rest of the request is then nobody's business any more.
pub(crate) struct HttpServer {
    pub(crate) address: SocketAddr,
    stop: Arc<AtomicBool>,
    accept: Option<JoinHandle<()>>,
}

impl HttpServer {
    /// Serves until dropped.
    pub(crate) fn start(address: SocketAddr, name: &'static str) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let accept = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                std::thread::spawn(move || answer(&stream, name));
            }
        });
        Self { address, stop, accept: Some(accept) }
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread, so that the address is free for the next test.
        let woken = TcpStream::connect(self.address).is_ok();
        if let Some(accept) = self.accept.take()
            && woken
        {
            let _ = accept.join();
        }
    }
}

fn answer(stream: &TcpStream, name: &str) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).ok()? == 0 {
                return None;
            }
        }
        discard_body(&mut reader, &head)?;
        let body = format!("served-by: {name}\n{}", head.trim_end());
        let mut writer = stream;
        write!(writer, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()).ok()?;
    }
}

/// Reads the body that `head` announces, by its length or in chunks without trailers.
fn discard_body(reader: &mut impl BufRead, head: &str) -> Option<()> {
    let value = |name: &str| {
        let mut lines = head.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.trim())
    };
    let mut discard =
        |length: u64| std::io::copy(&mut reader.by_ref().take(length), &mut std::io::sink()).ok();
    if let Some(length) = value("content-length") {
        return discard(length.parse().ok()?).map(drop);
    }
    if value("transfer-encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked")) {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size).ok()?;
            let size = u64::from_str_radix(size.trim(), 16).ok()?;
            // A chunk and the line break after it; the last one has no bytes.
            std::io::copy(&mut reader.by_ref().take(size.checked_add(2)?), &mut std::io::sink()).ok()?;
            if size == 0 {
                break;
            }
        }
    }
    Some(())
}

/// `openssl s_server`: a TLS server that is not ours. It answers GET with a status page.
pub(crate) struct TlsServer(Child);

impl TlsServer {
    pub(crate) fn start(address: SocketAddr, crt: &str, key: &str) -> Self {
        let child = Command::new("openssl")
            .args(["s_server", "-www", "-quiet", "-accept", &address.to_string(), "-cert", crt, "-key", key])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server = Self(child);
        super::until("openssl s_server", || TcpStream::connect(address).map(drop).map_err(|e| e.to_string()));
        server
    }
}

impl Drop for TlsServer {
    fn drop(&mut self) {
        // A process that has ended already is as dead as wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

//! Looks at the first bytes of a connection: a TLS ClientHello (SNI, ALPN), or HTTP.
//!
//! The bytes are kept and given to whoever serves the connection, so nothing is consumed. A ClientHello may
//! come in any number of pieces and records; what is larger than any sane one is treated as not TLS.

/// Largest ClientHello looked at; post-quantum key shares make 2 KiB usual.
pub(crate) const MAX_HELLO: usize = 32 * 1024;

/// What a ClientHello says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ClientHello {
    pub(crate) sni: Option<String>,
    pub(crate) alpn: Vec<String>,
}

/// Result of looking at a prefix of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Seen<T> {
    /// It is that.
    Yes(T),
    /// It is not.
    No,
    /// More bytes decide.
    More,
}

/// Looks for a ClientHello.
pub(crate) fn client_hello(buf: &[u8]) -> Seen<ClientHello> {
    // Reassembles the handshake message out of records (RFC 8446 section 5.1).
    let mut message: Vec<u8> = Vec::new();
    let mut at = 0;
    loop {
        let record = &buf[at..];
        match record.first() {
            Some(0x16) => {}
            Some(_) => return Seen::No,
            None => return Seen::More,
        }
        if record.get(1).is_some_and(|v| *v != 3) {
            return Seen::No;
        }
        let Some(header) = record.get(..5) else { return Seen::More };
        let len = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if len == 0 || len > 16 * 1024 + 256 {
            return Seen::No;
        }
        let have = &record[5..record.len().min(5 + len)];
        message.extend_from_slice(have);
        match hello_message(&message) {
            Seen::More => {}
            seen => return seen,
        }
        if have.len() < len {
            return Seen::More;
        }
        at += 5 + len;
    }
}

/// Looks for a ClientHello without records, as QUIC carries it.
pub(crate) fn hello_message(message: &[u8]) -> Seen<ClientHello> {
    if message.first().is_some_and(|t| *t != 1) {
        return Seen::No;
    }
    let Some(head) = message.get(..4) else { return Seen::More };
    let want = (usize::from(head[1]) << 16) | (usize::from(head[2]) << 8) | usize::from(head[3]);
    if want > MAX_HELLO {
        return Seen::No;
    }
    match message.get(4..4 + want) {
        Some(body) => parse_hello(body).map_or(Seen::No, Seen::Yes),
        None => Seen::More,
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let out = self.0.get(..n)?;
        self.0 = &self.0[n..];
        Some(out)
    }
    fn u16(&mut self) -> Option<usize> {
        self.take(2).map(|b| usize::from(u16::from_be_bytes([b[0], b[1]])))
    }
    fn vec8(&mut self) -> Option<Reader<'a>> {
        let n = usize::from(self.take(1)?[0]);
        self.take(n).map(Reader)
    }
    fn vec16(&mut self) -> Option<Reader<'a>> {
        let n = self.u16()?;
        self.take(n).map(Reader)
    }
}

fn parse_hello(body: &[u8]) -> Option<ClientHello> {
    let mut r = Reader(body);
    r.take(2 + 32)?;
    r.vec8()?;
    r.vec16()?;
    r.vec8()?;
    let mut out = ClientHello::default();
    if r.0.is_empty() {
        return Some(out);
    }
    let mut extensions = r.vec16()?;
    while !extensions.0.is_empty() {
        let kind = extensions.u16()?;
        let mut e = extensions.vec16()?;
        match kind {
            0 => {
                let mut list = e.vec16()?;
                while !list.0.is_empty() {
                    let kind = list.take(1)?[0];
                    let name = list.vec16()?;
                    if kind == 0 {
                        let name = std::str::from_utf8(name.0).ok()?;
                        let ok = !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic());
                        // Two names: one reader would take the first, the next the last (RFC 6066 section 3
                        // and RFC 8446 section 4.2 forbid it).
                        if !ok || out.sni.is_some() {
                            return None;
                        }
                        out.sni = Some(name.to_ascii_lowercase());
                    }
                }
            }
            16 => {
                let mut list = e.vec16()?;
                while !list.0.is_empty() {
                    let p = list.vec8()?;
                    out.alpn.push(String::from_utf8_lossy(p.0).into_owned());
                }
            }
            _ => {}
        }
    }
    Some(out)
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Looks for HTTP: `h2c`, `http/1.1` or `http/1.0`.
pub(crate) fn http(buf: &[u8]) -> Seen<&'static str> {
    let n = buf.len().min(PREFACE.len());
    if buf[..n] == PREFACE[..n] {
        return if n == PREFACE.len() { Seen::Yes("h2c") } else { Seen::More };
    }
    let line = buf.split(|b| *b == b'\n').next().unwrap_or_default();
    let complete = line.len() < buf.len();
    let method = line.iter().take_while(|b| b.is_ascii_uppercase() || **b == b'-').count();
    if method == 0 || method > 32 || line.get(method).is_some_and(|b| *b != b' ') {
        return Seen::No;
    }
    if !complete {
        // A method and a blank is convincing enough to wait for the rest of the line, within reason.
        return if buf.len() > 16 * 1024 { Seen::No } else { Seen::More };
    }
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if line.ends_with(b" HTTP/1.1") {
        Seen::Yes("http/1.1")
    } else if line.ends_with(b" HTTP/1.0") {
        Seen::Yes("http/1.0")
    } else {
        Seen::No
    }
}

/// Whether a stream begins with the HTTP/2 preface.
pub(crate) fn preface(buf: &[u8]) -> Seen<()> {
    let n = buf.len().min(PREFACE.len());
    match buf[..n] == PREFACE[..n] {
        true if n == PREFACE.len() => Seen::Yes(()),
        true => Seen::More,
        false => Seen::No,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(sni: &str, alpn: &[&str], record: usize) -> Vec<u8> {
        let mut ext = Vec::new();
        let vec16 = |v: &[u8]| [&(v.len() as u16).to_be_bytes()[..], v].concat();
        if !sni.is_empty() {
            let name = [&[0u8][..], &vec16(sni.as_bytes())].concat();
            ext.extend([&0u16.to_be_bytes()[..], &vec16(&vec16(&name))].concat());
        }
        let list: Vec<u8> = alpn.iter().flat_map(|p| [&[p.len() as u8][..], p.as_bytes()].concat()).collect();
        ext.extend([&16u16.to_be_bytes()[..], &vec16(&vec16(&list))].concat());
        let body = [&[3, 3][..], &[7; 32], &[0], &[0, 2, 0x13, 1], &[1, 0], &vec16(&ext)].concat();
        let message = [&[1, 0][..], &vec16(&body)].concat();
        message.chunks(record).flat_map(|c| [&[0x16, 3, 1][..], &vec16(c)].concat()).collect()
    }

    #[test]
    fn hello_in_any_pieces_and_records() {
        let sni = "outbound_.9080_._.reviews.books.svc.cluster.local";
        for record in [5, 64, 4096] {
            let h = hello(sni, &["istio", "h2"], record);
            for cut in 0..h.len() {
                assert_eq!(client_hello(&h[..cut]), Seen::More, "record {record} cut {cut}");
            }
            let Seen::Yes(c) = client_hello(&h) else { panic!("record {record}") };
            assert_eq!(c.sni.as_deref(), Some(sni));
            assert_eq!(c.alpn, ["istio", "h2"]);
        }
        assert_eq!(client_hello(&hello("a\0b", &[], 500)), Seen::No);
        assert_eq!(client_hello(b"GET / HTTP/1.1\r\n"), Seen::No);
        assert_eq!(client_hello(b"\x16\x02\x00"), Seen::No);
        let huge = [0x16, 3, 1, 0, 10, 1, 0xff, 0xff, 0xff];
        assert_eq!(client_hello(&huge), Seen::No);
    }

    #[test]
    fn http_versions() {
        assert_eq!(http(b"GET / HTTP/1.1\r\nHost"), Seen::Yes("http/1.1"));
        assert_eq!(http(b"GET / HTTP/1.0\r\n"), Seen::Yes("http/1.0"));
        assert_eq!(http(b"M-SEARCH * HTTP/1.1\r\n"), Seen::Yes("http/1.1"));
        assert_eq!(http(b"GE"), Seen::More);
        assert_eq!(http(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), Seen::Yes("h2c"));
        assert_eq!(http(b"PRI * HT"), Seen::More);
        assert_eq!(http(b"\0\0\0"), Seen::No);
        assert_eq!(http(b"HELO me\r\n"), Seen::No);
        assert_eq!(http(b""), Seen::More);
    }

    #[test]
    fn two_names_are_none() {
        let twice = |h: &[u8]| {
            // The extensions block again, with every length around it.
            let at = 5 + 4 + 2 + 32 + 1 + 4 + 2;
            let ext = &h[at + 2..];
            let all = [ext, ext].concat();
            let vec16 = |v: &[u8]| [&(v.len() as u16).to_be_bytes()[..], v].concat();
            let body = [&h[9..at], &vec16(&all)].concat();
            let message = [&[1, 0][..], &vec16(&body)].concat();
            [&[0x16, 3, 1][..], &vec16(&message)].concat()
        };
        let one = hello("a", &[], 4096);
        assert!(matches!(client_hello(&one), Seen::Yes(_)));
        assert_eq!(client_hello(&twice(&one)), Seen::No);
    }

    proptest::proptest! {
        /// What rustls would send and one changed byte: decided or waiting, never lost, whatever the pieces.
        #[test]
        fn mutated_hellos_are_decided_in_any_pieces(
            at in 0usize..200, with in proptest::prelude::any::<u8>(), record in 1usize..300,
        ) {
            let mut h = hello("reviews.books", &["h2"], record);
            let n = h.len();
            h[at % n] = with;
            let whole = client_hello(&h);
            for cut in 0..n {
                match client_hello(&h[..cut]) {
                    Seen::More => {}
                    early => { proptest::prop_assert_eq!(&early, &whole); }
                }
            }
        }

        #[test]
        fn any_bytes_are_handled(mut raw in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
            let _ = client_hello(&raw);
            let _ = http(&raw);
            if raw.len() > 9 {
                raw[0] = 0x16;
                raw[1] = 3;
                raw[3] = 0;
                raw[5] = 1;
                raw[6] = 0;
                raw[7] = 0;
                let _ = client_hello(&raw);
            }
        }
    }
}

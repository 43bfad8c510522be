//! As much of RFC 6455 as an echo needs: the handshake's key, and single text frames.

use std::io;

use aws_lc_rs::digest;
use base64::{Engine, engine::general_purpose::STANDARD};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Largest message, bytes.
const LIMIT: usize = 1 << 20;

/// `Sec-WebSocket-Accept` for a `Sec-WebSocket-Key` (section 4.2.2).
#[must_use]
pub fn accept(key: &str) -> String {
    let text = format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    STANDARD.encode(digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, text.as_bytes()))
}

/// Writes one text frame; clients must mask theirs (section 5.3).
///
/// # Errors
/// The connection's.
pub async fn write_text(io: &mut (impl AsyncWrite + Unpin), text: &[u8], mask: bool) -> io::Result<()> {
    let mut out = vec![0x81];
    let bit = if mask { 0x80 } else { 0 };
    match text.len() {
        n @ 0..=125 => out.push(bit | n as u8),
        n @ 126..=65_535 => {
            out.push(bit | 126);
            out.extend((n as u16).to_be_bytes());
        }
        n => {
            out.push(bit | 127);
            out.extend((n as u64).to_be_bytes());
        }
    }
    if mask {
        // Masking is against caches that mistake frames for requests; a constant is fine in a test.
        let key = [0x37, 0xfa, 0x21, 0x3d];
        out.extend(key);
        out.extend(text.iter().zip(key.iter().cycle()).map(|(b, k)| b ^ k));
    } else {
        out.extend(text);
    }
    io.write_all(&out).await?;
    io.flush().await
}

/// Reads one text frame; `None` when the other side closed.
///
/// # Errors
/// The connection's, a message beyond the limit, or a frame of another kind.
pub async fn read_text(io: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let bad = |m: &str| io::Error::new(io::ErrorKind::InvalidData, m.to_owned());
    let mut head = [0u8; 2];
    match io.read_exact(&mut head).await {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        r => r?,
    };
    match head[0] {
        0x81 => {}
        0x88 => return Ok(None),
        other => return Err(bad(&format!("unexpected frame {other:#x}"))),
    }
    let length = match head[1] & 0x7f {
        126 => usize::from(io.read_u16().await?),
        127 => usize::try_from(io.read_u64().await?).map_err(|_| bad("too long"))?,
        n => usize::from(n),
    };
    if length > LIMIT {
        return Err(bad("too long"));
    }
    let mut key = [0u8; 4];
    if head[1] & 0x80 != 0 {
        io.read_exact(&mut key).await?;
    }
    let mut data = vec![0; length];
    io.read_exact(&mut data).await?;
    for (b, k) in data.iter_mut().zip(key.iter().cycle()) {
        *b ^= k;
    }
    Ok(Some(data))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_accept_key_of_the_rfc() {
        assert_eq!(accept("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[tokio::test]
    async fn frames_of_every_length_form() {
        for (n, mask) in [(0, true), (125, false), (126, true), (70_000, true), (70_000, false)] {
            let (mut a, mut b) = tokio::io::duplex(200_000);
            let text = vec![b'x'; n];
            write_text(&mut a, &text, mask).await.unwrap();
            assert_eq!(read_text(&mut b).await.unwrap().unwrap(), text, "{n} {mask}");
        }
    }
}

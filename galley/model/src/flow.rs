//! Datagrams of many flows on one connection: the number of the flow in front of each.
//!
//! A number is twice that of the flow, one more if the datagram only says that the flow has ended, as a variable-length
//! integer of QUIC (RFC 9000 section 16). Whoever opens a flow chooses a number that it never used on this connection; the
//! first datagram opens it. Whether a datagram arrives is as certain as for any other, so an end that got lost is found
//! out by silence.

/// Most bytes in front of a datagram.
pub const HEADER: usize = 8;
/// Flows have numbers below this.
pub const LIMIT: u64 = 1 << 61;

/// What comes on a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame<'a> {
    /// A datagram, which may be empty.
    Data(u64, &'a [u8]),
    /// The flow has ended.
    End(u64),
}

fn put(number: u64, payload: &[u8]) -> Vec<u8> {
    let number = number.min((1 << 62) - 1);
    let mut out = Vec::with_capacity(HEADER + payload.len());
    let bytes = number.to_be_bytes();
    match number {
        0..0x40 => out.push(bytes[7]),
        0x40..0x4000 => out.extend([bytes[6] | 0x40, bytes[7]]),
        0x4000..0x4000_0000 => out.extend([bytes[4] | 0x80, bytes[5], bytes[6], bytes[7]]),
        _ => {
            out.push(bytes[0] | 0xc0);
            out.extend_from_slice(&bytes[1..]);
        }
    }
    out.extend_from_slice(payload);
    out
}

/// A datagram with its flow.
#[must_use]
pub fn data(flow: u64, payload: &[u8]) -> Vec<u8> {
    put(flow << 1, payload)
}

/// Says that a flow has ended.
#[must_use]
pub fn end(flow: u64) -> Vec<u8> {
    put(flow << 1 | 1, &[])
}

/// Reverse of [`data`] and [`end`]; `None` for what neither makes.
#[must_use]
pub fn read(frame: &[u8]) -> Option<Frame<'_>> {
    let (first, rest) = frame.split_first()?;
    let more = (1usize << (first >> 6)) - 1;
    let (number, payload) = rest.split_at_checked(more)?;
    let number = number.iter().fold(u64::from(first & 0x3f), |n, b| n << 8 | u64::from(*b));
    Some(if number & 1 == 0 { Frame::Data(number >> 1, payload) } else { Frame::End(number >> 1) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_as_they_were_made() {
        for flow in [0, 1, 31, 32, 8191, 8192, 0x1fff_ffff, 0x2000_0000, LIMIT - 1] {
            let d = data(flow, b"hello");
            assert!(d.len() <= HEADER + 5);
            assert_eq!(read(&d), Some(Frame::Data(flow, b"hello")));
            assert_eq!(read(&data(flow, b"")), Some(Frame::Data(flow, b"")));
            assert_eq!(read(&end(flow)), Some(Frame::End(flow)));
        }
        assert_eq!(data(5, b"x").len(), 2, "the usual one costs a byte");
        assert_eq!((read(&[]), read(&[0x40]), read(&[0xc0, 0, 0, 0])), (None, None, None));
    }
}

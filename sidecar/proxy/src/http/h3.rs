//! HTTP/3 (RFC 9114) over quinn: codec and server.
//!
//! The codec is here and not the `h3` crate's. That one (0.0.8) takes the last of two `:path` or `:authority`, buffers
//! frames of any length, names the last stream that it served as one that it did not (GOAWAY), knows no `:protocol` of
//! WebSockets, cannot tell that a client gave a stream up, and panics on a stream that is stopped while it is read
//! (`h3-quinn`). It is the client in `tests/integration/http3.rs`.
//!
//! QPACK (RFC 9204) has no dynamic table in either direction: nothing of a stream waits for another one, and a
//! connection has no memory that a client could fill.

mod frame;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod head;
mod qpack;
pub(crate) mod server;
mod stream;

use quinn::VarInt;

/// Error codes of connections and streams (RFC 9114 section 8.1, RFC 9204 section 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Code {
    NoError = 0x100,
    InternalError = 0x102,
    StreamCreation = 0x103,
    ClosedCriticalStream = 0x104,
    FrameUnexpected = 0x105,
    FrameError = 0x106,
    ExcessiveLoad = 0x107,
    IdError = 0x108,
    SettingsError = 0x109,
    MissingSettings = 0x10a,
    RequestRejected = 0x10b,
    RequestIncomplete = 0x10d,
    MessageError = 0x10e,
    DecompressionFailed = 0x200,
    EncoderStream = 0x201,
}

impl From<Code> for VarInt {
    fn from(c: Code) -> Self {
        Self::from_u32(c as u32)
    }
}

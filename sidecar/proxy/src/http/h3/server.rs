//! A downstream connection: one task for it, one for each stream.

use std::{future::poll_fn, rc::Rc, sync::Arc, sync::atomic::Ordering::Relaxed, time::Duration};

use bytes::Bytes;
use quinn::{Connection as Quic, RecvStream, SendStream, VarInt};
use tokio::time::Instant;

use super::{
    Code,
    frame::{self, Event, Frames, Of, put_header, put_varint, varint},
    stream::{H3Down, NoHead},
};
use crate::{
    config::listener::HttpManager,
    http::{
        downstream::Downstream as _,
        headers::{HeaderId, Headers},
        message::{BodyKind, MAX_HEAD, ResponseHead, Version},
        mux::{Streams, sleep_until},
        record::{Flag, Record},
        service,
    },
    worker::{connection::Connection, signals::Subscription},
};

/// Types of streams of one direction (RFC 9114 section 6.2, RFC 9204 section 4.2).
const CONTROL: u64 = 0x0;
const PUSH: u64 = 0x1;
const ENCODER: u64 = 0x2;
const DECODER: u64 = 0x3;
/// Streams of one direction that a client may have open: the three above and one of a kind that nobody knows.
pub(crate) const UNIDIRECTIONAL: u32 = 8;

/// Settings (RFC 9114 section 7.2.4.1, RFC 9220 section 3).
const MAX_FIELD_SECTION_SIZE: u64 = 0x6;
const ENABLE_CONNECT_PROTOCOL: u64 = 0x8;

/// The client must grant streams and take the settings in this time.
const OPENING: Duration = Duration::from_secs(10);
/// Says that a connection is about to end, and refuses nothing yet (RFC 9114 section 5.2).
const LAST_POSSIBLE: u64 = (1 << 62) - 4;
/// Between that and the number of the first request that is refused: what is on its way arrives meanwhile.
const WARNING: Duration = Duration::from_millis(100);

/// For a client to take the rest of an answer, where no time for idle streams is set.
const FLUSHING: Duration = Duration::from_secs(60);

/// Where a connection is on its way to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    No,
    /// Warned; refuses from then on.
    At(Instant),
    /// Refuses streams from this one on.
    From(u64),
}

/// Serves a connection until it ends or drains.
pub(crate) async fn serve(quic: Quic, conn: Rc<Connection>, manager: Arc<HttpManager>) {
    let opening = tokio::time::timeout(OPENING, open(&quic, manager.config.websocket));
    let Ok(Some(mut control)) = opening.await else {
        return quic.close(Code::ClosedCriticalStream.into(), b"");
    };
    let streams = Rc::new(Streams::new());
    let unconfirmed = Rc::new(Streams::new());
    let seen = Rc::new(Seen::default());
    let signals = conn.signals.subscribe();
    let mut ending = Ending::No;
    // The first request that was not seen.
    let mut next = 0;
    loop {
        if streams.is_idle() && unconfirmed.is_idle() && matches!(ending, Ending::From(_)) {
            return quic.close(Code::NoError.into(), b"");
        }
        let wake = match ending {
            Ending::No => {
                manager.config.idle_timeout.filter(|_| streams.is_idle()).map(|t| streams.last() + t)
            }
            Ending::At(at) => Some(at),
            Ending::From(_) => None,
        };
        tokio::select! {
            accepted = quic.accept_bi() => match accepted {
                Ok((send, recv)) => {
                    let id = VarInt::from(recv.id()).into_inner();
                    if matches!(ending, Ending::From(n) if id >= n) {
                        reject(send, recv);
                        continue;
                    }
                    next = next.max(id + 4);
                    streams.begin();
                    if streams.are_abandoned() {
                        tracing::debug!(peer = %conn.peer, "too many streams reset");
                        return quic.close(Code::ExcessiveLoad.into(), b"");
                    }
                    let (conn, manager) = (Rc::clone(&conn), Arc::clone(&manager));
                    let (quic, streams, unconfirmed) = (quic.clone(), Rc::clone(&streams), Rc::clone(&unconfirmed));
                    let arrival = conn.worker.arrival();
                    tokio::task::spawn_local(Box::pin(async move {
                        let down = H3Down::new(quic, send, recv);
                        let answered = stream(&conn, &manager, &down, arrival).await;
                        streams.end(answered);
                        // The close of a connection drops what the client has not confirmed.
                        unconfirmed.begin();
                        down.confirmed().await;
                        unconfirmed.end(true);
                    }));
                }
                Err(error) => {
                    tracing::debug!(%error, peer = %conn.peer, "HTTP/3 connection ended");
                    return;
                }
            },
            accepted = quic.accept_uni() => {
                let Ok(recv) = accepted else { return };
                tokio::task::spawn_local(unidirectional(quic.clone(), recv, Rc::clone(&seen)));
            }
            () = until(&signals, &conn, &manager), if ending == Ending::No => {
                goaway(&mut control, LAST_POSSIBLE).await;
                ending = Ending::At(Instant::now() + WARNING.max(quic.rtt() * 2));
            }
            () = signals.killed() => return quic.close(Code::NoError.into(), b""),
            () = unconfirmed.ended(), if matches!(ending, Ending::From(_)) => {}
            () = sleep_until(wake) => {
                let quiet = streams.is_idle();
                if ending == Ending::No && !quiet {
                    continue;
                }
                goaway(&mut control, next).await;
                ending = Ending::From(next);
            }
        }
    }
}

/// Waits until a connection should end when it can.
async fn until(signals: &Subscription, conn: &Connection, manager: &HttpManager) {
    tokio::select! {
        () = signals.drained() => {}
        () = conn.aged(manager) => {}
    }
}

/// Opens the control stream, which stays open as long as the connection. There are none for QPACK, which would have
/// nothing to say (RFC 9204 section 4.2).
async fn open(quic: &Quic, websocket: bool) -> Option<SendStream> {
    let mut control = quic.open_uni().await.ok()?;
    let mut settings = Vec::new();
    put_varint(&mut settings, MAX_FIELD_SECTION_SIZE);
    put_varint(&mut settings, MAX_HEAD as u64);
    if websocket {
        put_varint(&mut settings, ENABLE_CONNECT_PROTOCOL);
        put_varint(&mut settings, 1);
    }
    let mut out = Vec::new();
    put_varint(&mut out, CONTROL);
    put_header(&mut out, frame::SETTINGS, settings.len());
    out.extend_from_slice(&settings);
    control.write_all(&out).await.ok()?;
    Some(control)
}

/// Tells the client which requests are not served. One that grants no room for that learns it by the close.
async fn goaway(control: &mut SendStream, first: u64) {
    let (mut payload, mut out) = (Vec::new(), Vec::new());
    put_varint(&mut payload, first);
    put_header(&mut out, frame::GOAWAY, payload.len());
    out.extend_from_slice(&payload);
    let _ = tokio::time::timeout(WARNING, control.write_all(&out)).await;
}

/// Certainly not processed; the client may send it elsewhere.
fn reject(mut send: SendStream, mut recv: RecvStream) {
    let _ = recv.stop(Code::RequestRejected.into());
    let _ = send.reset(Code::RequestRejected.into());
}

/// Serves one stream; whether an answer began.
async fn stream(
    conn: &Rc<Connection>,
    manager: &Arc<HttpManager>,
    down: &H3Down,
    arrival: Option<std::time::Instant>,
) -> bool {
    let signals = conn.signals.subscribe();
    let mut refused = false;
    tokio::select! {
        () = answer(conn, manager, down, arrival, &mut refused) => {}
        () = signals.killed() => down.abort(),
    }
    down.close(refused);
    down.is_answered()
}

async fn answer(
    conn: &Rc<Connection>,
    manager: &Arc<HttpManager>,
    down: &H3Down,
    arrival: Option<std::time::Instant>,
    refused: &mut bool,
) {
    if conn.worker.is_stale(arrival) {
        overloaded(conn, manager, down);
    } else {
        let limit = manager.config.request_headers_timeout.or(manager.config.stream_idle_timeout);
        let head = poll_fn(|cx| down.poll_head(conn.tls, cx));
        let head = tokio::select! {
            head = head => head,
            () = sleep_until(limit.map(|l| Instant::now() + l)) => Err(NoHead::Refused(408)),
        };
        match head {
            Ok(head) => service::handle(conn, manager, head, down).await,
            Err(NoHead::Gone) => return,
            Err(NoHead::Refused(status)) => {
                *refused = true;
                Box::pin(service::refuse(conn, manager, down, status, Version::Http3)).await;
            }
        }
    }
    // What an answer of our own may have left.
    let limit = manager.config.stream_idle_timeout.unwrap_or(FLUSHING);
    let _ = tokio::time::timeout(limit, poll_fn(|cx| down.poll_flush(cx))).await;
}

/// Answers a stream that comes in an overload, as HTTP/2 does.
fn overloaded(conn: &Connection, manager: &HttpManager, down: &H3Down) {
    conn.worker.shared.totals.refused.fetch_add(1, Relaxed);
    let mut headers = Headers::default();
    headers.push_id(HeaderId::XEnvoyOverloaded, b"true");
    let _ = down.start(&ResponseHead { status: 503, headers, body: BodyKind::Empty }, true);
    if !manager.logs.is_empty() {
        let mut rec = Record::new(conn, None);
        rec.status = 503;
        rec.flag(Flag::Om);
        rec.details = "overload".into();
        rec.finish_unread(conn, manager);
    }
}

/// Which of the streams that exist once were seen.
#[derive(Default)]
struct Seen(std::cell::Cell<u8>);

impl Seen {
    /// Whether this is the first of its kind.
    fn first(&self, kind: u64) -> bool {
        let bit = 1 << kind;
        let new = self.0.get() & bit == 0;
        self.0.set(self.0.get() | bit);
        new
    }
}

/// Reads a stream of one direction to its end, and ends the connection if that must not be.
async fn unidirectional(quic: Quic, mut recv: RecvStream, seen: Rc<Seen>) {
    let mut kept = Vec::new();
    let (kind, n) = loop {
        // One that ends before it says what it is means nothing (section 6.2).
        let Ok(Some(chunk)) = recv.read_chunk(4096, true).await else { return };
        kept.extend_from_slice(&chunk.bytes);
        if let Some(found) = varint(&kept) {
            break found;
        }
    };
    let input = Bytes::from(kept).slice(n..);
    let once = matches!(kind, CONTROL | ENCODER | DECODER);
    let code = match kind {
        // Only servers push.
        PUSH => Code::StreamCreation,
        _ if once && !seen.first(kind) => Code::StreamCreation,
        CONTROL => control(&mut recv, input).await,
        // Nothing is granted that an encoder could fill; a decoder has nothing to acknowledge. Both are read so that
        // their end is noticed.
        ENCODER | DECODER => qpack(&mut recv, kind, input).await,
        _ => {
            let _ = recv.stop(Code::StreamCreation.into());
            return;
        }
    };
    quic.close(code.into(), b"");
}

/// Follows the client's control stream (section 6.2.1); returns the error that ends the connection.
async fn control(recv: &mut RecvStream, mut input: Bytes) -> Code {
    let mut frames = Frames::new(Of::Control, 0);
    let mut settled = false;
    let mut away = u64::MAX;
    loop {
        let event = match frames.next(&mut input) {
            Ok(e) => e,
            Err(code) => return code,
        };
        match event {
            None => match recv.read_chunk(4096, true).await {
                Ok(Some(chunk)) => input = chunk.bytes,
                _ => return Code::ClosedCriticalStream,
            },
            Some(Event::Control(frame::SETTINGS, payload)) => {
                if std::mem::replace(&mut settled, true) {
                    return Code::FrameUnexpected;
                }
                if let Err(code) = settings(&payload) {
                    return code;
                }
            }
            Some(_) if !settled => return Code::MissingSettings,
            Some(Event::Control(kind, payload)) => {
                // Each of them is one number; pushes that it may be about there are none.
                let Some((id, _)) = varint(&payload).filter(|(_, n)| *n == payload.len()) else {
                    return Code::FrameError;
                };
                if kind == frame::GOAWAY && std::mem::replace(&mut away, id) < id {
                    return Code::IdError;
                }
            }
            Some(_) => return Code::FrameUnexpected,
        }
    }
}

/// Checks the client's settings; none of them changes what is sent.
fn settings(mut payload: &[u8]) -> Result<(), Code> {
    let mut seen = Vec::new();
    while !payload.is_empty() {
        let (id, n) = varint(payload).ok_or(Code::FrameError)?;
        let (value, m) = varint(&payload[n..]).ok_or(Code::FrameError)?;
        payload = &payload[n + m..];
        // Those of HTTP/2 are reserved; a flag is 0 or 1.
        if (2..=5).contains(&id) || (id == ENABLE_CONNECT_PROTOCOL && value > 1) || seen.contains(&id) {
            return Err(Code::SettingsError);
        }
        seen.push(id);
    }
    Ok(())
}

/// Reads a stream of QPACK.
async fn qpack(recv: &mut RecvStream, kind: u64, mut input: Bytes) -> Code {
    loop {
        // All that an encoder may say to a table of size zero is that it has this size (RFC 9204 section 4.3.1).
        if kind == ENCODER && input.iter().any(|b| *b != 0x20) {
            return Code::EncoderStream;
        }
        match recv.read_chunk(4096, true).await {
            Ok(Some(chunk)) => input = chunk.bytes,
            _ => return Code::ClosedCriticalStream,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_a_client() {
        let encode = |pairs: &[(u64, u64)]| {
            let mut out = vec![];
            for (id, v) in pairs {
                put_varint(&mut out, *id);
                put_varint(&mut out, *v);
            }
            out
        };
        assert_eq!(settings(&encode(&[(6, 1 << 40), (1, 4096), (7, 16), (8, 1), (0x21, 5)])), Ok(()));
        assert_eq!(settings(&[]), Ok(()));
        for bad in [&[(2, 0)][..], &[(5, 1)], &[(8, 2)], &[(6, 1), (6, 1)]] {
            assert_eq!(settings(&encode(bad)), Err(Code::SettingsError), "{bad:?}");
        }
        let cut = encode(&[(6, 1 << 40)]);
        assert_eq!(settings(&cut[..cut.len() - 1]), Err(Code::FrameError));
        assert_eq!(settings(&cut[..1]), Err(Code::FrameError));
    }
}

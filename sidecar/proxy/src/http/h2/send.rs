//! Sends a body within flow control: a piece is taken only when the one before it has left.

use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, SendStream};
use http::HeaderMap;

use crate::http::{headers::Headers, message::StreamError};

pub(crate) struct SendBody {
    stream: SendStream<Bytes>,
    pending: Bytes,
    ending: bool,
    trailers: Option<Box<HeaderMap>>,
    ended: bool,
}

pub(crate) fn stream_error(e: &h2::Error) -> StreamError {
    match e.reason() {
        Some(Reason::REFUSED_STREAM) => StreamError::Refused,
        Some(Reason::PROTOCOL_ERROR | Reason::FRAME_SIZE_ERROR | Reason::COMPRESSION_ERROR) => {
            StreamError::Protocol
        }
        _ if e.is_go_away() && e.is_remote() && e.reason() == Some(Reason::NO_ERROR) => StreamError::Refused,
        _ => StreamError::Reset,
    }
}

impl SendBody {
    pub(crate) fn new(stream: SendStream<Bytes>, ended: bool) -> Self {
        Self { stream, pending: Bytes::new(), ending: false, trailers: None, ended }
    }

    pub(crate) fn data(&mut self, data: Bytes) {
        debug_assert!(self.pending.is_empty());
        self.pending = data;
    }

    pub(crate) fn finish(&mut self, trailers: Option<&Headers>) {
        self.ending = true;
        self.trailers = trailers.map(Headers::to_map).filter(|t| !t.is_empty()).map(Box::new);
    }

    /// Ready when everything given so far was handed to the connection.
    pub(crate) fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        while !self.pending.is_empty() {
            let mut room = self.stream.capacity();
            if room == 0 {
                self.stream.reserve_capacity(self.pending.len());
                room = self.stream.capacity();
            }
            if room == 0 {
                match ready!(self.stream.poll_capacity(cx)) {
                    Some(Ok(_)) => continue,
                    Some(Err(e)) => return Poll::Ready(Err(stream_error(&e))),
                    None => return Poll::Ready(Err(StreamError::Reset)),
                }
            }
            let piece = self.pending.split_to(room.min(self.pending.len()));
            let end = self.pending.is_empty() && self.ending && self.trailers.is_none();
            self.ended |= end;
            self.stream.send_data(piece, end).map_err(|e| stream_error(&e))?;
        }
        if self.ending && !self.ended {
            self.ended = true;
            match self.trailers.take() {
                Some(t) => self.stream.send_trailers(*t),
                None => self.stream.send_data(Bytes::new(), true),
            }
            .map_err(|e| stream_error(&e))?;
        }
        Poll::Ready(Ok(()))
    }

    pub(crate) fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.stream.poll_reset(cx).map(|_| ())
    }

    pub(crate) fn reset(&mut self, reason: Reason) {
        if !self.ended || !self.pending.is_empty() {
            self.stream.send_reset(reason);
        }
    }
}

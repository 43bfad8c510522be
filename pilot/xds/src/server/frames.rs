//! Messages of gRPC streams, each in memory of its own.
//!
//! A stream lives as long as its client, and a library's buffers keep the size of the largest message that they ever
//! held: that is what a client was sent when it came, megabytes for each. Here a message's memory goes with it.
//! No compression is offered, so whoever compresses is told so (gRPC over HTTP/2, "Compressed-Flag").

use std::{
    marker::PhantomData,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes, BytesMut};
use http_body::{Body, Frame};
use prost::Message;
use tokio::sync::mpsc;
use tonic::{Code, Status, codegen::http::HeaderMap};

/// Flag and length before a message.
const PREFIX: usize = 5;

/// Messages that a client sends.
pub(super) struct Requests<B, M> {
    body: Pin<Box<B>>,
    buffer: BytesMut,
    largest: usize,
    of: PhantomData<fn() -> M>,
}

impl<B, M> Requests<B, M>
where
    B: Body,
    B::Error: std::fmt::Display,
    M: Message + Default,
{
    /// Of this body; a message of more than `largest` bytes ends the stream.
    pub(super) fn new(body: B, largest: usize) -> Self {
        Self { body: Box::pin(body), buffer: BytesMut::new(), largest, of: PhantomData }
    }

    /// The next message; `None` at the end. Cancel-safe: what has been read of it stays.
    pub(super) async fn message(&mut self) -> Result<Option<M>, Status> {
        loop {
            if let Some(m) = self.whole()? {
                return Ok(Some(m));
            }
            let frame = std::future::poll_fn(|cx| self.body.as_mut().poll_frame(cx)).await;
            match frame {
                Some(Ok(f)) => {
                    if let Ok(mut data) = f.into_data() {
                        // `put` of the chunks, whatever they are.
                        while data.has_remaining() {
                            let chunk = data.chunk();
                            self.buffer.extend_from_slice(chunk);
                            let n = chunk.len();
                            data.advance(n);
                        }
                    }
                }
                Some(Err(e)) => return Err(Status::unknown(e.to_string())),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(Status::internal("the stream ended within a message")),
            }
        }
    }

    fn whole(&mut self) -> Result<Option<M>, Status> {
        let Some((prefix, rest)) = self.buffer.split_at_checked(PREFIX) else { return Ok(None) };
        let [flag, a, b, c, d] = *prefix else { return Ok(None) };
        if flag != 0 {
            return Err(Status::unimplemented("messages must not be compressed"));
        }
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > self.largest {
            let largest = self.largest;
            return Err(Status::out_of_range(format!("a message of {length} bytes; the limit is {largest}")));
        }
        if rest.len() < length {
            return Ok(None);
        }
        let mut bytes = self.buffer.split_to(PREFIX + length);
        bytes.advance(PREFIX);
        if self.buffer.is_empty() {
            self.buffer = BytesMut::new();
        }
        let message = M::decode(bytes).map_err(|e| Status::invalid_argument(e.to_string()))?;
        Ok(Some(message))
    }
}

/// Messages that a client is sent, and the status at their end.
pub(super) struct Responses<M> {
    from: Option<mpsc::Receiver<Result<M, Status>>>,
}

impl<M> Responses<M> {
    pub(super) fn new(from: mpsc::Receiver<Result<M, Status>>) -> Self {
        Self { from: Some(from) }
    }
}

impl<M: Message> Body for Responses<M> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Some(from) = &mut self.from else { return Poll::Ready(None) };
        let status = match ready!(from.poll_recv(cx)) {
            Some(Ok(message)) => match framed(&message) {
                Ok(bytes) => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
                Err(status) => status,
            },
            Some(Err(status)) => status,
            None => Status::new(Code::Ok, ""),
        };
        self.from = None;
        let mut trailers = HeaderMap::new();
        // A message that no header can hold leaves the code.
        if status.add_header(&mut trailers).is_err() {
            trailers.clear();
            let _ = Status::new(status.code(), "").add_header(&mut trailers);
        }
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.from.is_none()
    }
}

fn framed(message: &impl Message) -> Result<Bytes, Status> {
    let length = message.encoded_len();
    let Ok(said) = u32::try_from(length) else {
        return Err(Status::resource_exhausted("a message of more than 4 GiB"));
    };
    let mut out = Vec::with_capacity(PREFIX + length);
    out.push(0);
    out.extend_from_slice(&said.to_be_bytes());
    // A vector grows as it needs to, so this cannot fail.
    message.encode(&mut out).map_err(|e| Status::internal(e.to_string()))?;
    Ok(out.into())
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::pb::DeltaDiscoveryRequest;

    /// A body of these chunks.
    struct Chunks(VecDeque<Bytes>);

    impl Body for Chunks {
        type Data = Bytes;
        type Error = Status;
        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            Poll::Ready(self.0.pop_front().map(|b| Ok(Frame::data(b))))
        }
    }

    fn request(name: &str) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest { type_url: name.to_owned(), ..Default::default() }
    }

    #[tokio::test]
    async fn messages_come_whole_however_they_are_cut() {
        let mut all = Vec::new();
        for n in ["a", "", "ccc"] {
            all.extend_from_slice(&framed(&request(n)).unwrap());
        }
        for size in 1..=all.len() {
            let chunks = all.chunks(size).map(|c| Bytes::from(c.to_vec())).collect();
            let mut r = Requests::<_, DeltaDiscoveryRequest>::new(Chunks(chunks), 100);
            for n in ["a", "", "ccc"] {
                assert_eq!(r.message().await.unwrap(), Some(request(n)));
            }
            assert_eq!(r.message().await.unwrap(), None);
            assert_eq!(r.buffer.capacity(), 0);
        }
    }

    #[tokio::test]
    async fn what_is_no_message_ends_the_stream() {
        let good = framed(&request("a")).unwrap();
        let mut compressed = good.to_vec();
        compressed[0] = 1;
        for (bytes, code) in [
            (good[..good.len() - 1].to_vec(), Code::Internal),
            (good[..3].to_vec(), Code::Internal),
            (compressed, Code::Unimplemented),
            (vec![0, 0, 0, 0, 101], Code::OutOfRange),
            (vec![0, 255, 255, 255, 255], Code::OutOfRange),
            (vec![0, 0, 0, 0, 1, 255], Code::InvalidArgument),
        ] {
            let body = Chunks(VecDeque::from([Bytes::from(bytes)]));
            let e = Requests::<_, DeltaDiscoveryRequest>::new(body, 100).message().await.unwrap_err();
            assert_eq!(e.code(), code);
        }
    }
}

//! Small requests at fixed times on many streams of one connection, as sessions on a trunk are.

use std::time::{Duration, Instant};

use quinn_proto::{Connection, Dir, StreamId, VarInt};

/// A request and its answer have this size each.
const SIZE: u64 = 1024;

/// Which requests are sent, and what became of them.
pub(crate) struct Pace {
    pub(crate) streams: usize,
    pub(crate) every: Duration,
    pub(crate) requests: u32,
    pub(crate) from: Instant,
    open: Vec<StreamId>,
    answered: Vec<u64>,
    /// Milliseconds from when a request was due to its whole answer.
    pub(crate) took: Vec<f64>,
}

impl Pace {
    pub(crate) fn new(streams: usize, every: Duration, requests: u32, from: Instant) -> Self {
        Self { streams, every, requests, from, open: vec![], answered: vec![0; streams], took: vec![] }
    }

    fn due(&self, stream: usize, request: u64) -> Instant {
        let share = self.every * u32::try_from(stream).unwrap() / u32::try_from(self.streams).unwrap();
        self.from + share + self.every * u32::try_from(request).unwrap()
    }

    /// Every request's time and its stream.
    pub(crate) fn schedule(&self) -> impl Iterator<Item = (Instant, usize)> {
        (0..self.requests).flat_map(move |k| (0..self.streams).map(move |s| (self.due(s, u64::from(k)), s)))
    }

    pub(crate) fn send(&mut self, c: &mut Connection, stream: usize) {
        while self.open.len() <= stream {
            self.open.push(c.streams().open(Dir::Bi).expect("a stream"));
        }
        let written = c.send_stream(self.open[stream]).write(&[b'x'; SIZE as usize]).expect("room");
        assert_eq!(written as u64, SIZE);
    }

    /// An answer, or a part of one.
    pub(crate) fn receive(&mut self, now: Instant, c: &mut Connection, id: StreamId) {
        let stream = self.open.iter().position(|o| *o == id).expect("one of ours");
        let before = self.answered[stream];
        self.answered[stream] += read(c, id);
        for k in before / SIZE..self.answered[stream] / SIZE {
            let due = self.due(stream, k);
            // The first second is for starting.
            if due > self.from + Duration::from_secs(1) {
                self.took.push((now - due).as_secs_f64() * 1000.0);
            }
        }
    }
}

/// The other side: what comes is sent back.
pub(crate) fn echo(c: &mut Connection, id: StreamId) {
    let n = read(c, id);
    if n > 0 {
        let written = c.send_stream(id).write(&vec![b'x'; n as usize]).expect("room");
        assert_eq!(written as u64, n);
    }
}

fn read(c: &mut Connection, id: StreamId) -> u64 {
    let mut stream = c.recv_stream(id);
    let Ok(mut chunks) = stream.read(true) else { return 0 };
    let mut n = 0;
    while let Ok(Some(chunk)) = chunks.next(usize::MAX) {
        n += chunk.bytes.len() as u64;
    }
    let _ = chunks.finalize();
    n
}

pub(crate) const STREAMS: VarInt = VarInt::from_u32(1024);

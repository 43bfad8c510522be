//! A link in virtual time: quinn's own state machines at its ends, one bottleneck in between.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::BytesMut;
use quinn_proto::{
    ClientConfig, Connection, ConnectionHandle, DatagramEvent, Dir, Endpoint, EndpointConfig, Event,
    ServerConfig, StreamEvent, StreamId, TransportConfig, VarInt,
    congestion::ControllerFactory,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};

use crate::paced::{self, Pace};

pub(crate) type Factory = Arc<dyn ControllerFactory + Send + Sync>;

/// What lies between the ends.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Link {
    /// Bytes per second.
    pub(crate) rate: f64,
    /// Round trip without a queue.
    pub(crate) rtt: Duration,
    /// Bytes that wait before the bottleneck.
    pub(crate) queue: f64,
    /// Part of packets lost at random.
    pub(crate) loss: f64,
    /// Token bucket in bytes instead of a queue: what does not conform is dropped.
    pub(crate) policer: Option<f64>,
}

impl Link {
    pub(crate) fn new(mbit: f64, rtt: u64, queue_bdp: f64) -> Self {
        let (rate, rtt) = (mbit * 125_000.0, Duration::from_millis(rtt));
        Self { rate, rtt, queue: rate * rtt.as_secs_f64() * queue_bdp, loss: 0.0, policer: None }
    }
}

/// What one flow got.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Flow {
    /// Bytes that the receiving application read.
    pub(crate) goodput: f64,
    pub(crate) sent: u64,
    pub(crate) dropped: u64,
}

impl Flow {
    pub(crate) fn loss(&self) -> f64 {
        self.dropped as f64 / self.sent as f64
    }
}

/// What was seen after warming up.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) flows: Vec<Flow>,
    /// Mean wait before the bottleneck, in seconds.
    pub(crate) wait: f64,
    /// Part of the link's rate that arrived, of all flows.
    pub(crate) used: f64,
}

struct End {
    endpoint: Endpoint,
    connection: Option<(ConnectionHandle, Connection)>,
    stream: Option<StreamId>,
    starts: Instant,
    read: u64,
}

struct Packet {
    to: usize,
    bytes: BytesMut,
    /// No packet, but the time of a request on this stream.
    request: Option<usize>,
}

struct World {
    link: Link,
    /// What the link becomes, and when.
    then: Option<(Instant, Link)>,
    ends: Vec<End>,
    flying: BinaryHeap<Reverse<(Instant, u64)>>,
    packets: std::collections::HashMap<u64, Packet>,
    sequence: u64,
    busy: Instant,
    tokens: (f64, Instant),
    random: u64,
    flows: Vec<Flow>,
    waits: (f64, u64),
    pace: Option<Pace>,
}

fn address(end: usize) -> SocketAddr {
    (Ipv4Addr::new(10, 0, 0, u8::try_from(end + 1).unwrap()), 4433).into()
}

fn tls() -> (ClientConfig, ServerConfig) {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let key = rcgen::KeyPair::generate().unwrap();
    let cert = rcgen::CertificateParams::new(vec!["peer".into()]).unwrap().self_signed(&key).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(cert.der().clone()).unwrap();
    let client = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let server = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key.serialize_der().try_into().unwrap())
        .unwrap();
    (
        ClientConfig::new(Arc::new(QuicClientConfig::try_from(client).unwrap())),
        ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server).unwrap())),
    )
}

/// Bulk transfers with these controllers over one link; each begins a second after the one before. What is counted
/// begins at `warm` and ends at `until`.
pub(crate) fn run(link: Link, controllers: &[Factory], warm: u64, until: u64) -> Seen {
    let t0 = Instant::now();
    build(link, controllers, t0).drive(t0, Duration::from_secs(warm), Duration::from_secs(until))
}

/// One transfer over a link that becomes another one after `at` seconds; counted as in [`run`].
pub(crate) fn change(link: Link, at: u64, then: Link, controller: Factory, warm: u64, until: u64) -> Seen {
    let t0 = Instant::now();
    let mut w = build(link, &[controller], t0);
    w.then = Some((t0 + Duration::from_secs(at), then));
    w.drive(t0, Duration::from_secs(warm), Duration::from_secs(until))
}

/// Requests of 1 KiB on 64 streams, each every 40 ms for four seconds, and loss in both directions: milliseconds from
/// when each was due to its answer, sorted.
pub(crate) fn requests(link: Link, controller: Factory) -> Vec<f64> {
    let t0 = Instant::now();
    let mut w = build(link, &[controller], t0);
    let p = Pace::new(64, Duration::from_millis(40), 100, t0 + Duration::from_secs(1));
    for (at, stream) in p.schedule() {
        w.sequence += 1;
        w.packets.insert(w.sequence, Packet { to: 0, bytes: BytesMut::new(), request: Some(stream) });
        w.flying.push(Reverse((at, w.sequence)));
    }
    let sent = p.streams * (p.requests as usize - 26);
    w.pace = Some(p);
    w.drive(t0, Duration::from_secs(1), Duration::from_secs(200));
    let mut took = w.pace.take().map(|p| p.took).unwrap_or_default();
    assert!(took.len() >= sent, "{} of {sent} were answered", took.len());
    took.sort_by(f64::total_cmp);
    took
}

fn build(link: Link, controllers: &[Factory], t0: Instant) -> World {
    let mut w = World {
        link,
        then: None,
        ends: Vec::new(),
        flying: BinaryHeap::new(),
        packets: Default::default(),
        sequence: 0,
        busy: t0,
        tokens: (link.policer.unwrap_or_default(), t0),
        random: 0x9e37_79b9_7f4a_7c15,
        flows: vec![Flow::default(); controllers.len()],
        waits: (0.0, 0),
        pace: None,
    };
    let (client, server) = tls();
    for (n, factory) in controllers.iter().enumerate() {
        let mut t = TransportConfig::default();
        t.congestion_controller_factory(factory.clone())
            .send_window(32 << 20)
            .receive_window(VarInt::from_u32(64 << 20))
            .stream_receive_window(VarInt::from_u32(64 << 20))
            .max_concurrent_bidi_streams(paced::STREAMS)
            .ack_frequency_config(Some(mesh_trunk::congestion::acks()))
            .max_idle_timeout(None);
        let t = Arc::new(t);
        let (mut client, mut server) = (client.clone(), server.clone());
        client.transport_config(t.clone());
        server.transport_config(t);
        for (i, config) in [None, Some(Arc::new(server))].into_iter().enumerate() {
            let mut seed = [0; 32];
            seed[..2].copy_from_slice(&[n as u8 + 1, i as u8]);
            let mut c = EndpointConfig::default();
            c.rng_seed(Some(seed));
            w.ends.push(End {
                endpoint: Endpoint::new(Arc::new(c), config, true, Some(seed)),
                connection: None,
                stream: None,
                starts: t0 + Duration::from_secs(n as u64),
                read: 0,
            });
        }
        let (end, to) = (2 * n, address(2 * n + 1));
        let e = &mut w.ends[end];
        e.connection = Some(e.endpoint.connect(e.starts, client, to, "peer").unwrap());
    }
    w
}

impl World {
    fn drive(&mut self, t0: Instant, warm: Duration, until: Duration) -> Seen {
        let mut now;
        let mut before: Option<Vec<u64>> = None;
        for n in (0..self.ends.len()).step_by(2) {
            let at = self.ends[n].starts;
            self.sequence += 1;
            // Wakes the dialling end.
            self.packets.insert(self.sequence, Packet { to: n, bytes: BytesMut::new(), request: None });
            self.flying.push(Reverse((at, self.sequence)));
        }
        loop {
            let packet = self.flying.peek().map(|Reverse((t, _))| *t);
            let timers = self.ends.iter_mut().enumerate().filter_map(|(n, e)| {
                let (starts, c) = (e.starts, &mut e.connection.as_mut()?.1);
                Some((c.poll_timeout()?.max(starts), n))
            });
            let timer = timers.min();
            now = match (packet, timer) {
                (Some(p), Some((t, _))) => p.min(t),
                (Some(p), None) => p,
                (None, Some((t, _))) => t,
                // Everything was answered.
                (None, None) => break,
            };
            if now >= t0 + until {
                break;
            }
            if before.is_none() && now >= t0 + warm {
                before = Some(self.ends.iter().map(|e| e.read).collect());
                self.flows.fill(Flow::default());
                self.waits = (0.0, 0);
            }
            if let Some((_, link)) = self.then.take_if(|(at, _)| *at <= now) {
                self.link = link;
            }
            let end = if packet == Some(now) {
                let Reverse((_, sequence)) = self.flying.pop().unwrap();
                let p = self.packets.remove(&sequence).unwrap();
                if let (Some(stream), Some(pace)) = (p.request, &mut self.pace) {
                    pace.send(&mut self.ends[p.to].connection.as_mut().expect("connected").1, stream);
                } else {
                    self.receive(now, p.to, p.bytes);
                }
                p.to
            } else {
                let n = timer.unwrap().1;
                self.ends[n].connection.as_mut().unwrap().1.handle_timeout(now);
                n
            };
            self.pump(now, end);
        }
        let before = before.expect("warm");
        let seconds = (until - warm).as_secs_f64();
        for (n, f) in self.flows.iter_mut().enumerate() {
            f.goodput = (self.ends[2 * n + 1].read - before[2 * n + 1]) as f64 / seconds;
        }
        Seen {
            used: self.flows.iter().map(|f| f.goodput).sum::<f64>() / self.link.rate,
            flows: self.flows.clone(),
            wait: self.waits.0 / self.waits.1.max(1) as f64,
        }
    }

    fn receive(&mut self, now: Instant, to: usize, bytes: BytesMut) {
        if bytes.is_empty() {
            return;
        }
        let e = &mut self.ends[to];
        let mut buf = Vec::new();
        match e.endpoint.handle(now, address(to ^ 1), None, None, bytes, &mut buf) {
            Some(DatagramEvent::ConnectionEvent(_, event)) => {
                if let Some((_, c)) = &mut e.connection {
                    c.handle_event(event);
                }
            }
            Some(DatagramEvent::NewConnection(incoming)) => {
                e.connection =
                    Some(e.endpoint.accept(incoming, now, &mut buf, None).map_err(|e| e.cause).unwrap());
            }
            Some(DatagramEvent::Response(_)) | None => {}
        }
    }

    /// Lets an end do whatever it can do now.
    fn pump(&mut self, now: Instant, end: usize) {
        let e = &mut self.ends[end];
        let Some((handle, c)) = &mut e.connection else { return };
        if end.is_multiple_of(2) && self.pace.is_none() {
            if e.stream.is_none() && !c.is_handshaking() {
                e.stream = c.streams().open(Dir::Uni);
            }
            if let Some(s) = e.stream {
                static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
                while c.send_stream(s).write(&ZEROS).is_ok() {}
            }
        }
        while let Some(event) = c.poll() {
            match event {
                Event::Stream(StreamEvent::Opened { dir: Dir::Uni }) => {
                    e.stream = c.streams().accept(Dir::Uni)
                }
                Event::Stream(StreamEvent::Opened { dir: Dir::Bi }) => {
                    while let Some(id) = c.streams().accept(Dir::Bi) {
                        paced::echo(c, id);
                    }
                }
                Event::Stream(StreamEvent::Readable { id }) => match &mut self.pace {
                    Some(p) if end == 0 => p.receive(now, c, id),
                    Some(_) => paced::echo(c, id),
                    None => {}
                },
                Event::ConnectionLost { reason } => panic!("connection lost: {reason}"),
                _ => {}
            }
        }
        if let (1, Some(s)) = (end % 2, e.stream) {
            let mut stream = c.recv_stream(s);
            let mut chunks = stream.read(true).unwrap();
            while let Ok(Some(chunk)) = chunks.next(usize::MAX) {
                e.read += chunk.bytes.len() as u64;
            }
            let _ = chunks.finalize();
        }
        while let Some(event) = c.poll_endpoint_events() {
            if let Some(event) = e.endpoint.handle_event(*handle, event) {
                c.handle_event(event);
            }
        }
        let mut out = VecDeque::new();
        let mut buf = Vec::new();
        while let Some(t) = c.poll_transmit(now, 10, &mut buf) {
            let segment = t.segment_size.unwrap_or(t.size);
            out.extend(buf[..t.size].chunks(segment).map(BytesMut::from));
            buf.clear();
        }
        for bytes in out {
            if let Some(at) = self.carry(now, end, bytes.len() as f64) {
                self.sequence += 1;
                self.packets.insert(self.sequence, Packet { to: end ^ 1, bytes, request: None });
                self.flying.push(Reverse((at, self.sequence)));
            }
        }
    }

    /// When a packet arrives, if it does. Only data meet the bottleneck.
    fn carry(&mut self, now: Instant, from: usize, size: f64) -> Option<Instant> {
        let half = self.link.rtt / 2;
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let mut dropped = (self.random >> 11) as f64 / ((1_u64 << 53) as f64) < self.link.loss;
        if from % 2 == 1 {
            return (!dropped || self.pace.is_none()).then_some(now + half);
        }
        let flow = &mut self.flows[from / 2];
        flow.sent += 1;
        let mut at = now;
        if let Some(burst) = self.link.policer {
            let (tokens, since) = self.tokens;
            let tokens = (tokens + (now - since).as_secs_f64() * self.link.rate).min(burst);
            dropped |= tokens < size;
            self.tokens = (if dropped { tokens } else { tokens - size }, now);
        } else if !dropped {
            let wait = self.busy.saturating_duration_since(now).as_secs_f64();
            dropped = wait * self.link.rate + size > self.link.queue + size;
            if !dropped {
                self.busy = self.busy.max(now) + Duration::from_secs_f64(size / self.link.rate);
                at = self.busy;
                self.waits = (self.waits.0 + wait, self.waits.1 + 1);
            }
        }
        flow.dropped += u64::from(dropped);
        (!dropped).then_some(at + half)
    }
}

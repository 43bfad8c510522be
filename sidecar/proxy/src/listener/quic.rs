//! QUIC (RFC 9000): datagrams to connections, and those to the server of HTTP/3 or, between proxies of the mesh, to that
//! of applications' datagrams (`udp/inner.rs`).
//!
//! Each worker has a socket and an endpoint of its own. The kernel spreads clients over the sockets by their address;
//! what comes for another worker's connection after its client has moved is handed over (`socket.rs`).
//!
//! What a stranger can make a worker do is bounded before anything is known of him: beyond [`RETRY_FROM`] handshakes
//! in flight a client must show that it has the address that it says (RFC 9000 section 8.1.2), which costs the worker
//! a token and no state; beyond [`HANDSHAKES`] it is refused. A worker that is full or behind accepts nothing, as with
//! TCP; what arrives meanwhile waits in the endpoint, few and small, or is refused.

mod hello;
mod socket;

use std::{cell::Cell, rc::Rc, sync::Arc, time::Duration};

use mesh_model::proxy::QuicOptions;
use quinn::{
    Endpoint, EndpointConfig, IdleTimeout, Incoming, ServerConfig, TransportConfig, VarInt,
    rustls::pki_types::CertificateDer,
};
use tokio_util::sync::CancellationToken;

use self::hello::{Chooser, Initial};
pub(crate) use self::socket::{Ports, UdpPort};
use crate::{
    config::listener::{ListenerSlot, Terminal},
    http::{h3, record::TcpRecord},
    listener::accept::{authorized, canonical},
    options::EngineOptions,
    udp::inner,
    worker::{
        Admission, Gauge, Worker,
        connection::{Connection, SourceLabels},
    },
};

/// Handshakes of a worker in flight from which on addresses must be shown.
const RETRY_FROM: usize = 64;
/// Handshakes of a worker in flight; each holds some 10 KiB and costs a signature.
const HANDSHAKES: usize = 1024;
/// Clients that wait for the worker, and what each of them may have sent.
const WAITING: usize = 256;
const WAITING_BYTES: u64 = 16 * 1024;
/// No idle timeout is longer: connections of clients that are gone must end.
const LONGEST_IDLE: Duration = Duration::from_secs(3600);
/// Requests of a connection where the listener does not say it: Envoy's default, and what RFC 9114 section 6.1 asks for
/// at least. Each may hold a head that is not complete, which no window bounds.
const STREAMS: u32 = 100;
/// As for connections of HTTP/2.
const STREAMS_OF_WINDOW: u32 = 16;

/// Takes connections of a listener until it is gone; those that are there live on.
pub(crate) async fn listen(
    worker: Rc<Worker>,
    slot: Arc<ListenerSlot>,
    port: UdpPort,
    stop: CancellationToken,
) {
    let (endpoint, initial) = match endpoint(port) {
        Ok(made) => made,
        Err(error) => {
            tracing::error!(%error, listener = %slot.name, "cannot listen");
            return;
        }
    };
    let handshakes = Rc::new(Cell::new(0usize));
    loop {
        let admission = tokio::select! {
            a = worker.admit() => a,
            () = stop.cancelled() => break,
        };
        let incoming = tokio::select! {
            i = endpoint.accept() => i,
            () = stop.cancelled() => break,
        };
        let Some(incoming) = incoming else { break };
        let in_flight = handshakes.get();
        if in_flight >= RETRY_FROM && !incoming.remote_address_validated() {
            if let Err(e) = incoming.retry() {
                e.into_incoming().refuse();
            }
            continue;
        }
        if in_flight >= HANDSHAKES {
            incoming.refuse();
            continue;
        }
        handshakes.set(in_flight + 1);
        let shaking = Shaking(Rc::clone(&handshakes));
        let (worker, slot, initial) = (Rc::clone(&worker), Arc::clone(&slot), initial.clone());
        tokio::task::spawn_local(Box::pin(accepted(worker, slot, initial, incoming, shaking, admission)));
    }
    endpoint.set_server_config(None);
}

/// A handshake's place.
struct Shaking(Rc<Cell<usize>>);

impl Drop for Shaking {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

fn endpoint(port: UdpPort) -> std::io::Result<(Endpoint, Initial)> {
    let initial = Initial::new().map_err(std::io::Error::other)?;
    let mut config = EndpointConfig::default();
    let generator = port.generator();
    config.cid_generator(move || generator());
    // Only for what comes before a connection is accepted with a configuration of its own.
    let mut server = ServerConfig::with_crypto(Arc::new(initial.clone()));
    server
        .max_incoming(WAITING)
        .incoming_buffer_size(WAITING_BYTES)
        .incoming_buffer_size_total(WAITING_BYTES * WAITING as u64);
    let socket = socket::wrap(port)?;
    let runtime = Arc::new(quinn::TokioRuntime);
    Ok((Endpoint::new_with_abstract_socket(config, Some(server), socket, runtime)?, initial))
}

/// Limits of a connection: the listener's, which never exceed the worker's.
fn transport(q: &QuicOptions, o: &EngineOptions) -> TransportConfig {
    let least = |a: Option<u32>, b: u32| VarInt::from_u32(a.map_or(b, |a| a.min(b)));
    let connection = o.buffer_limit.saturating_mul(STREAMS_OF_WINDOW);
    let idle = q.idle_timeout.clamp(Duration::from_millis(1), LONGEST_IDLE);
    let mut t = TransportConfig::default();
    let streams = q.max_concurrent_streams.unwrap_or(STREAMS);
    t.max_concurrent_bidi_streams(least(Some(streams), o.max_concurrent_streams))
        .max_concurrent_uni_streams(VarInt::from_u32(h3::server::UNIDIRECTIONAL))
        .stream_receive_window(least(q.stream_window, o.buffer_limit))
        .receive_window(least(q.connection_window, connection))
        .send_window(u64::from(connection))
        .max_idle_timeout(IdleTimeout::try_from(idle).ok())
        .datagram_receive_buffer_size(None);
    t
}

/// From a first datagram to a connection that is served to its end.
async fn accepted(
    worker: Rc<Worker>,
    slot: Arc<ListenerSlot>,
    initial: Initial,
    incoming: Incoming,
    shaking: Shaking,
    admission: Admission,
) {
    let Some(_place) = worker.client() else { return incoming.refuse() };
    let totals = &worker.shared.totals;
    let _gauge = Gauge::new(totals, |t| &t.connections, |t| &t.connections_total);
    let listener = slot.current.load_full();
    let Some(options) = &listener.model.quic else { return incoming.refuse() };
    let peer = canonical(incoming.remote_address());
    // A dual-stack socket shows IPv4 as mapped addresses, as TCP does.
    let port = listener.model.address.port();
    let local = match incoming.local_ip() {
        Some(ip) => canonical((ip, port).into()),
        None => listener.model.address,
    };
    let chooser = Chooser::new(initial, Arc::clone(&listener), Arc::clone(&worker.secrets), peer, local);
    let choice = chooser.choice();
    let mut config = ServerConfig::with_crypto(Arc::new(chooser));
    config.transport_config(Arc::new(if listener.carries_datagrams() {
        inner::transport()
    } else {
        transport(options, &worker.options)
    }));
    let limit = options.handshake_timeout.min(worker.options.handshake_timeout);
    let Ok(connecting) = incoming.accept_with(Arc::new(config)) else { return };
    let quic = match tokio::time::timeout(limit, connecting).await {
        Ok(Ok(quic)) => quic,
        failed => {
            if let Ok(Err(error)) = failed {
                tracing::debug!(%error, %peer, "QUIC handshake");
            }
            let (sni, flag) = match choice.get() {
                Some(c) => (c.sni.as_deref(), if c.chain.is_none() { "NR" } else { "-" }),
                None => (None, "-"),
            };
            TcpRecord::refused(peer, local, sni, flag).log(&worker, &listener.logs);
            return;
        }
    };
    drop(shaking);
    let Some(chain) = choice.get().and_then(|c| c.chain.clone()) else { return };
    let certs = quic.peer_identity().and_then(|i| i.downcast::<Vec<CertificateDer<'static>>>().ok());
    let identity = certs.as_ref().and_then(|certs| mesh_identity::peer_identity(certs)).map(Arc::new);
    let client_chain =
        certs.filter(|_| chain.shows_certificates()).map(|c| c.into_boxed_slice()).unwrap_or_default();
    let mut local = local;
    let mut signals = worker.signals(&chain);
    if let Terminal::Udp(u) = &chain.terminal {
        // Rules are about the workload's port, not about that at which its proxy takes datagrams for all of them.
        local.set_port(u.inbound_port().unwrap_or(local.port()));
        signals = worker.signals_from(&chain, peer.ip());
    }
    let conn = Rc::new(Connection {
        source: SourceLabels::new(&worker, identity.as_deref()),
        worker: Rc::clone(&worker),
        signals,
        listener,
        peer,
        direct_peer: peer,
        local,
        redirected: false,
        sni: choice.get().and_then(|c| c.sni.clone()),
        tls: true,
        identity,
        client_chain,
        _place: None,
        started: std::time::Instant::now(),
        started_at: std::time::SystemTime::now(),
        series: Default::default(),
        peer_text: Default::default(),
        client_cert: Default::default(),
        found: Default::default(),
        chain,
    });
    let allowed = authorized(&conn).await;
    let session = quic.clone();
    let serving = async {
        match &conn.chain.terminal {
            Terminal::Http(manager) if allowed => {
                h3::server::serve(quic, Rc::clone(&conn), Arc::clone(manager)).await;
            }
            Terminal::Udp(_) if !allowed => inner::server::deny(&quic),
            Terminal::Udp(proxy) => inner::server::serve(quic, Rc::clone(&conn), Arc::clone(proxy)).await,
            _ => {}
        }
    };
    tokio::select! {
        () = serving => {}
        () = conn.revoked() => session.close(0u32.into(), b"revoked"),
    }
    drop(admission);
}

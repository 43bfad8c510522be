//! The choice of a filter chain inside of a handshake.
//!
//! A chain brings its certificate, and whether it wants one of the client, so it must be chosen before TLS begins, and
//! depends on what the ClientHello says. So the session that quinn drives first only collects the ClientHello, chooses,
//! and then is one of rustls' with the chain's configuration.

use std::{
    any::Any,
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use mesh_identity::SecretStore;
use quinn::crypto::{
    ExportKeyingMaterialError, HeaderKey, KeyPair, Keys, PacketKey, ServerConfig, Session,
    UnsupportedVersion, rustls::QuicServerConfig,
};
use quinn_proto::{
    ConnectionId, Side, TransportError, TransportErrorCode, transport_parameters::TransportParameters,
};

use crate::{
    config::listener::{Chain, ConnectionFacts, Listener},
    listener::inspect::{self, MAX_HELLO, Seen},
};

/// Alerts of TLS (RFC 8446 section 6).
const UNRECOGNIZED_NAME: u8 = 112;
const INTERNAL_ERROR: u8 = 80;
const DECODE_ERROR: u8 = 50;

/// What QUIC needs before TLS: keys that follow from the version (RFC 9001 section 5.2).
#[derive(Clone)]
pub(super) struct Initial(Arc<QuicServerConfig>);

impl Initial {
    pub(super) fn new() -> Result<Self, rustls::Error> {
        let builder = rustls::ServerConfig::builder_with_provider(mesh_identity::crypto_provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth();
        let config = builder.with_cert_resolver(Arc::new(Nobody));
        let quic = QuicServerConfig::try_from(config).map_err(|e| rustls::Error::General(e.to_string()))?;
        Ok(Self(Arc::new(quic)))
    }
}

#[derive(Debug)]
struct Nobody;

impl rustls::server::ResolvesServerCert for Nobody {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }
}

impl ServerConfig for Initial {
    fn initial_keys(&self, version: u32, id: &ConnectionId) -> Result<Keys, UnsupportedVersion> {
        self.0.initial_keys(version, id)
    }

    fn retry_tag(&self, version: u32, id: &ConnectionId, packet: &[u8]) -> [u8; 16] {
        self.0.retry_tag(version, id, packet)
    }

    /// Sessions begin with a [`Chooser`]; one that does not finds no certificate.
    fn start_session(self: Arc<Self>, version: u32, params: &TransportParameters) -> Box<dyn Session> {
        Arc::clone(&self.0).start_session(version, params)
    }
}

/// What was chosen.
pub(super) struct Choice {
    pub(super) sni: Option<String>,
    /// `None` ends the connection.
    pub(super) chain: Option<Arc<Chain>>,
}

/// The configuration of one connection.
pub(super) struct Chooser {
    initial: Initial,
    listener: Arc<Listener>,
    secrets: Arc<SecretStore>,
    peer: SocketAddr,
    local: SocketAddr,
    choice: Arc<OnceLock<Choice>>,
}

impl Chooser {
    pub(super) fn new(
        initial: Initial,
        listener: Arc<Listener>,
        secrets: Arc<SecretStore>,
        peer: SocketAddr,
        local: SocketAddr,
    ) -> Self {
        Self { initial, listener, secrets, peer, local, choice: Arc::default() }
    }

    /// Where the choice will be.
    pub(super) fn choice(&self) -> Arc<OnceLock<Choice>> {
        Arc::clone(&self.choice)
    }

    fn choose(&self, hello: inspect::ClientHello) -> Result<Arc<QuicServerConfig>, TransportError> {
        let facts = ConnectionFacts {
            destination: self.local,
            source: self.peer.ip(),
            tls: true,
            sni: hello.sni.as_deref(),
            alpn: &hello.alpn,
        };
        let chain = self.listener.chain(&facts).cloned();
        let config = match &chain {
            None => Err(alert(UNRECOGNIZED_NAME, "no filter chain")),
            Some(c) => match c.server_config(&self.secrets) {
                Some(Ok(c)) => {
                    QuicServerConfig::try_from(c).map_err(|_| alert(INTERNAL_ERROR, "no cipher for QUIC"))
                }
                Some(Err(error)) => {
                    tracing::warn!(%error, listener = %self.listener.model.name, "no TLS configuration");
                    Err(alert(INTERNAL_ERROR, "no TLS configuration"))
                }
                None => Err(alert(INTERNAL_ERROR, "no TLS in this filter chain")),
            },
        };
        let _ = self.choice.set(Choice { sni: hello.sni, chain });
        config.map(Arc::new)
    }
}

fn alert(code: u8, reason: &str) -> TransportError {
    TransportError { code: TransportErrorCode::crypto(code), frame: None, reason: reason.to_owned() }
}

impl ServerConfig for Chooser {
    fn initial_keys(&self, version: u32, id: &ConnectionId) -> Result<Keys, UnsupportedVersion> {
        self.initial.initial_keys(version, id)
    }

    fn retry_tag(&self, version: u32, id: &ConnectionId, packet: &[u8]) -> [u8; 16] {
        self.initial.retry_tag(version, id, packet)
    }

    fn start_session(self: Arc<Self>, version: u32, params: &TransportParameters) -> Box<dyn Session> {
        let fallback = Arc::clone(&self.initial.0).start_session(version, params);
        Box::new(Choosing {
            chooser: self,
            version,
            params: *params,
            hello: vec![],
            chosen: false,
            inner: fallback,
        })
    }
}

/// A session that becomes another one when the ClientHello is there.
struct Choosing {
    chooser: Arc<Chooser>,
    version: u32,
    params: TransportParameters,
    /// Collected so far.
    hello: Vec<u8>,
    chosen: bool,
    /// Until then one that has read nothing.
    inner: Box<dyn Session>,
}

impl Session for Choosing {
    fn initial_keys(&self, id: &ConnectionId, side: Side) -> Keys {
        self.inner.initial_keys(id, side)
    }

    fn handshake_data(&self) -> Option<Box<dyn Any>> {
        self.inner.handshake_data()
    }

    fn peer_identity(&self) -> Option<Box<dyn Any>> {
        self.inner.peer_identity()
    }

    fn early_crypto(&self) -> Option<(Box<dyn HeaderKey>, Box<dyn PacketKey>)> {
        self.inner.early_crypto()
    }

    fn early_data_accepted(&self) -> Option<bool> {
        self.inner.early_data_accepted()
    }

    fn is_handshaking(&self) -> bool {
        self.inner.is_handshaking()
    }

    fn read_handshake(&mut self, buf: &[u8]) -> Result<bool, TransportError> {
        if self.chosen {
            return self.inner.read_handshake(buf);
        }
        self.hello.extend_from_slice(buf);
        let hello = match inspect::hello_message(&self.hello) {
            Seen::Yes(hello) => hello,
            Seen::More if self.hello.len() <= MAX_HELLO => return Ok(false),
            _ => return Err(alert(DECODE_ERROR, "no ClientHello")),
        };
        let config = self.chooser.choose(hello)?;
        self.inner = config.start_session(self.version, &self.params);
        self.chosen = true;
        self.inner.read_handshake(&std::mem::take(&mut self.hello))
    }

    fn transport_parameters(&self) -> Result<Option<TransportParameters>, TransportError> {
        self.inner.transport_parameters()
    }

    fn write_handshake(&mut self, buf: &mut Vec<u8>) -> Option<Keys> {
        self.inner.write_handshake(buf)
    }

    fn next_1rtt_keys(&mut self) -> Option<KeyPair<Box<dyn PacketKey>>> {
        self.inner.next_1rtt_keys()
    }

    fn is_valid_retry(&self, id: &ConnectionId, header: &[u8], payload: &[u8]) -> bool {
        self.inner.is_valid_retry(id, header, payload)
    }

    fn export_keying_material(
        &self,
        output: &mut [u8],
        label: &[u8],
        context: &[u8],
    ) -> Result<(), ExportKeyingMaterialError> {
        self.inner.export_keying_material(output, label, context)
    }
}

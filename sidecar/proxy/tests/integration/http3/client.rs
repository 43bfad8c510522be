//! The client.

use std::{
    future::poll_fn,
    net::{SocketAddr, UdpSocket},
    sync::Arc,
};

use bytes::{Buf as _, Bytes, BytesMut};
use h3::client::{RequestStream, SendRequest};
use h3_quinn::{BidiStream, OpenStreams};
use quinn::{ClientConfig, Endpoint, crypto::rustls::QuicClientConfig};

use super::{client_config, *};

pub(crate) const CLIENT: &str = "spiffe://mesh.local/ns/out/sa/client";

pub(crate) type Answer = (http::Response<()>, Bytes, Option<http::HeaderMap>);

#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) endpoint: Endpoint,
    pub(crate) quic: quinn::Connection,
    send: SendRequest<OpenStreams, Bytes>,
    name: String,
}

/// A UDP endpoint for clients.
pub(crate) fn udp() -> Endpoint {
    Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap()
}

pub(crate) fn quic_config(ca: &Ca, name: &str, with_cert: bool) -> ClientConfig {
    let tls = client_config(ca, name, with_cert);
    ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()))
}

impl Client {
    pub(crate) async fn new(ca: &Ca, p: &Proxy, name: &str) -> Self {
        Self::connect(ca, p, name, false).await.unwrap()
    }

    pub(crate) async fn connect(ca: &Ca, p: &Proxy, name: &str, with_cert: bool) -> Result<Self, String> {
        let config = quic_config(ca, name, with_cert);
        Self::over(udp(), config, p.address("l"), name).await
    }

    pub(crate) async fn over(
        endpoint: Endpoint,
        config: ClientConfig,
        to: SocketAddr,
        name: &str,
    ) -> Result<Self, String> {
        let connecting = endpoint.connect_with(config, to, name).map_err(|e| e.to_string())?;
        let quic =
            tokio::time::timeout(WAIT, connecting).await.expect("in time").map_err(|e| e.to_string())?;
        let opened = h3::client::new(h3_quinn::Connection::new(quic.clone())).await;
        let (mut driver, send) = opened.map_err(|e| e.to_string())?;
        tokio::spawn(async move { poll_fn(|cx| driver.poll_close(cx)).await });
        Ok(Self { endpoint, quic, send, name: name.to_owned() })
    }

    /// The server's certificate.
    pub(crate) fn leaf(&self) -> Vec<u8> {
        let identity = self.quic.peer_identity().unwrap();
        let certs = identity.downcast::<Vec<rustls::pki_types::CertificateDer<'static>>>().unwrap();
        certs[0].to_vec()
    }

    /// Uses another port from now on, as behind an address translator that forgot.
    pub(crate) fn move_away(&self) {
        self.endpoint.rebind(UdpSocket::bind("127.0.0.1:0").unwrap()).unwrap();
    }

    pub(crate) async fn get(&self, path: &str) -> Result<Answer, String> {
        // Servers send trailers to those who ask for them.
        let r = http::Request::get(format!("https://{}{path}", self.name)).header("te", "trailers");
        self.send(r.body(()).unwrap(), None, None).await
    }

    pub(crate) async fn post(
        &self,
        path: &str,
        body: Bytes,
        trailers: Option<http::HeaderMap>,
    ) -> Result<Answer, String> {
        let r = http::Request::post(format!("https://{}{path}", self.name)).header("te", "trailers");
        self.send(r.body(()).unwrap(), Some(body), trailers).await
    }

    /// A request whose body is the caller's.
    pub(crate) async fn open(&self, path: &str) -> RequestStream<BidiStream<Bytes>, Bytes> {
        let r = http::Request::post(format!("https://{}{path}", self.name)).body(()).unwrap();
        self.send.clone().send_request(r).await.unwrap()
    }

    pub(crate) async fn send(
        &self,
        request: http::Request<()>,
        body: Option<Bytes>,
        trailers: Option<http::HeaderMap>,
    ) -> Result<Answer, String> {
        let text = |e: h3::error::StreamError| e.to_string();
        let stream = self.send.clone().send_request(request).await.map_err(text)?;
        let (mut up, mut down) = stream.split();
        let sending = async {
            if let Some(body) = body {
                // A server that has answered may want no more of it.
                if up.send_data(body).await.is_err() {
                    return;
                }
            }
            if let Some(t) = trailers {
                let _ = up.send_trailers(t).await;
            }
            let _ = up.finish().await;
        };
        let receiving = async {
            let head = down.recv_response().await.map_err(text)?;
            let mut body = BytesMut::new();
            while let Some(mut piece) = down.recv_data().await.map_err(text)? {
                body.extend_from_slice(&piece.copy_to_bytes(piece.remaining()));
            }
            let trailers = down.recv_trailers().await.map_err(text)?;
            Ok((head, body.freeze(), trailers))
        };
        let both = async { tokio::join!(sending, receiving).1 };
        tokio::time::timeout(WAIT, both).await.map_err(|_| "no answer in time".to_owned())?
    }
}

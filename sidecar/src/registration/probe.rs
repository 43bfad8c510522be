//! One look at a workload, as its `WorkloadGroup` says: a request, a connection, a command, or gRPC's own health protocol.
//!
//! Without a host it is the loopback address: from another one the workload's own proxy would see a stranger.

use std::{process::Stdio, sync::Arc};

use http_body_util::Empty;
use hyper::{Request, StatusCode, header::HOST};
use hyper_util::rt::TokioIo;
use mesh_model::authored::{
    ExecHealthCheck, GrpcHealthCheck, HttpHealthCheck, ReadinessProbe, TcpHealthCheck,
};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::net::TcpStream;
use tonic::{Request as Call, client::Grpc, codegen::http::uri::PathAndQuery, transport::Endpoint};

const LOOPBACK: &str = "127.0.0.1";

/// Answers why the workload is not well. The caller bounds the time.
pub(super) async fn once(p: &ReadinessProbe) -> Result<(), String> {
    if let Some(h) = &p.http_get {
        return http(h).await;
    }
    if let Some(t) = &p.tcp_socket {
        return tcp(t).await;
    }
    if let Some(g) = &p.grpc {
        return grpc(g).await;
    }
    match &p.exec {
        Some(e) => command(e).await,
        None => Err("the probe has no method".to_owned()),
    }
}

fn host(given: &str) -> &str {
    if given.is_empty() { LOOPBACK } else { given }
}

fn port(n: u32) -> Result<u16, String> {
    u16::try_from(n).map_err(|_| format!("port {n} is none"))
}

async fn connect(given: &str, n: u32) -> Result<TcpStream, String> {
    let to = (host(given), port(n)?);
    TcpStream::connect(to).await.map_err(|e| format!("{}:{}: {e}", to.0, to.1))
}

async fn tcp(t: &TcpHealthCheck) -> Result<(), String> {
    connect(&t.host, t.port).await.map(drop)
}

/// Any answer from 200 to 399 is a good one (Kubernetes).
async fn http(h: &HttpHealthCheck) -> Result<(), String> {
    let stream = connect(&h.host, h.port).await?;
    let path = match h.path.as_str() {
        "" => "/".to_owned(),
        p if p.starts_with('/') => p.to_owned(),
        p => format!("/{p}"),
    };
    let mut request = Request::get(path);
    let named = h.http_headers.iter().any(|x| x.name.eq_ignore_ascii_case("host"));
    if !named {
        request = request.header(HOST, format!("{}:{}", host(&h.host), h.port));
    }
    for x in &h.http_headers {
        request = request.header(&x.name, &x.value);
    }
    let request = request.body(Empty::<&[u8]>::new()).map_err(|e| format!("the probe's request: {e}"))?;
    let status = if h.scheme.eq_ignore_ascii_case("https") {
        let name = ServerName::try_from(host(&h.host).to_owned()).map_err(|e| e.to_string())?;
        let tls = tokio_rustls::TlsConnector::from(Arc::new(client()?));
        ask(tls.connect(name, stream).await.map_err(|e| format!("TLS: {e}"))?, request).await?
    } else {
        ask(stream, request).await?
    };
    if (200..400).contains(&status.as_u16()) { Ok(()) } else { Err(format!("the answer is {status}")) }
}

async fn ask<S>(stream: S, request: Request<Empty<&'static [u8]>>) -> Result<StatusCode, String>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    let driven = tokio::spawn(connection);
    let answer = sender.send_request(request).await.map(|r| r.status()).map_err(|e| e.to_string());
    // What follows the head is nobody's business here.
    driven.abort();
    answer
}

/// TLS to the workload itself, whose certificate nobody has to know (as kubelet does it).
fn client() -> Result<ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let any = Arc::new(Anyone(provider.clone()));
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?;
    Ok(config.dangerous().with_custom_certificate_verifier(any).with_no_client_auth())
}

#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// `grpc.health.v1.HealthCheckRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Ask {
    #[prost(string, tag = "1")]
    pub(super) service: String,
}

/// `grpc.health.v1.HealthCheckResponse`; 1 is `SERVING`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Status {
    #[prost(int32, tag = "1")]
    pub(super) status: i32,
}

async fn grpc(g: &GrpcHealthCheck) -> Result<(), String> {
    let to = Endpoint::from_shared(format!("http://{LOOPBACK}:{}", port(g.port)?));
    let channel = to.map_err(|e| e.to_string())?.connect().await.map_err(|e| format!("{e}"))?;
    let mut client = Grpc::new(channel);
    client.ready().await.map_err(|e| e.to_string())?;
    let codec = tonic_prost::ProstCodec::<Ask, Status>::default();
    let path = PathAndQuery::from_static("/grpc.health.v1.Health/Check");
    let ask = Call::new(Ask { service: g.service.clone() });
    let answer = client.unary(ask, path, codec).await.map_err(|s| s.message().to_owned())?;
    match answer.into_inner().status {
        1 => Ok(()),
        n => Err(format!("the status is {n}, not SERVING")),
    }
}

async fn command(e: &ExecHealthCheck) -> Result<(), String> {
    let (program, args) = e.command.split_first().ok_or("the command is empty")?;
    let ended = tokio::process::Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Who does not end in time is ended with the probe.
        .kill_on_drop(true)
        .status()
        .await
        .map_err(|e| format!("{program}: {e}"))?;
    if ended.success() { Ok(()) } else { Err(format!("{program}: {ended}")) }
}

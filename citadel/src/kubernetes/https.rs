//! Questions to an API server: JSON over HTTPS, one connection each, with limits on time and size.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, StatusCode, Uri, header};
use hyper_util::rt::TokioIo;
use mesh_identity::{IdentityError, crypto_provider, pem_certificates};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

/// Of what a server says of itself, characters that are repeated.
const MAX_WORDS: usize = 300;

/// Why there is no answer.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) why: String,
    /// If it was one that refuses.
    pub(super) status: Option<StatusCode>,
    /// What the server says of it, for logs.
    pub(super) said: String,
}

impl Failure {
    pub(super) fn new(why: impl Into<String>) -> Self {
        Self { why: why.into(), status: None, said: String::new() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

/// `https`, or `http` to this machine alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    text: String,
    host: String,
    port: u16,
    tls: bool,
}

impl Url {
    /// Reads one.
    ///
    /// # Errors
    /// What is wrong; a password in it is not repeated.
    pub fn parse(s: &str) -> Result<Self, String> {
        let uri: Uri = s.parse().map_err(|_| "is no URL".to_owned())?;
        let authority = uri.authority().ok_or("names no host")?;
        if authority.as_str().contains('@') {
            return Err("names a user".into());
        }
        if uri.query().is_some() {
            return Err("has a query".into());
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let local = host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") if local => false,
            _ => return Err("is not https (http is for this machine alone)".into()),
        };
        if host.is_empty() {
            return Err("names no host".into());
        }
        let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
        Ok(Self { text: s.to_owned(), host, port, tls })
    }

    /// Whether the credential for one is for the other as well.
    pub(super) fn is_server_of(&self, other: &Self) -> bool {
        (&self.host, self.port, self.tls) == (&other.host, other.port, other.tls)
    }

    /// The same server and path, and more path.
    pub(super) fn join(&self, path: &str) -> Self {
        Self { text: format!("{}{path}", self.text.trim_end_matches('/')), ..self.clone() }
    }

    /// What is at this path of another server at that of `self`.
    pub(super) fn with_path_of(&self, other: &Self) -> Option<Self> {
        let parse = |u: &Self| u.text.parse::<Uri>().ok();
        let (own, other) = (parse(self)?, parse(other)?);
        let text = format!("{}://{}{}", own.scheme_str()?, own.authority()?, other.path());
        Some(Self { text, ..self.clone() })
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Who asks, and by whom those who are asked are vouched for.
pub(super) struct Client {
    tls: Arc<ClientConfig>,
    credential: Option<PathBuf>,
}

impl Client {
    /// With authorities in a PEM file; without one only this machine can be asked.
    pub(super) fn new(ca: Option<&Path>, credential: Option<PathBuf>) -> Result<Self, IdentityError> {
        let mut roots = RootCertStore::empty();
        if let Some(path) = ca {
            let file = || path.display().to_string();
            let pem = std::fs::read(path).map_err(|source| IdentityError::File { path: file(), source })?;
            if roots.add_parsable_certificates(pem_certificates(&file(), &pem)?).0 == 0 {
                return Err(IdentityError::Pem { what: file(), reason: "holds no usable authority".into() });
            }
        }
        let mut tls = ClientConfig::builder_with_provider(crypto_provider())
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { tls: Arc::new(tls), credential })
    }

    /// What is at `url`, to which `of` has led: the credential is for the server of that.
    pub(super) async fn get(&self, url: &Url, of: &Url, limit: usize) -> Result<Value, Failure> {
        self.ask(Method::GET, url, Bytes::new(), limit, url.is_server_of(of)).await
    }

    pub(super) async fn post(&self, url: &Url, body: &Value, limit: usize) -> Result<Value, Failure> {
        self.ask(Method::POST, url, Bytes::from(body.to_string()), limit, true).await
    }

    async fn ask(
        &self,
        method: Method,
        url: &Url,
        body: Bytes,
        limit: usize,
        own: bool,
    ) -> Result<Value, Failure> {
        let uri: Uri = url
            .text
            .parse()
            .map_err(|_| Failure::new(format!("{}: the path cannot be asked for", url.host)))?;
        let mut request = Request::builder()
            .method(method)
            .uri(uri.path_and_query().map_or("/", |p| p.as_str()))
            .header(header::HOST, uri.authority().map_or("", |a| a.as_str()))
            // An API server refuses to tell its keys to whoever takes the first alone.
            .header(header::ACCEPT, "application/json, application/jwk-set+json")
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(path) = self.credential.as_ref().filter(|_| own) {
            let token = tokio::fs::read_to_string(path).await;
            let token = token.map_err(|e| Failure::new(format!("{}: {e}", path.display())))?;
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", token.trim()));
        }
        let failed = |e: &dyn fmt::Display| Failure::new(format!("{}: {e}", url.host));
        let tcp = TcpStream::connect((url.host.as_str(), url.port)).await.map_err(|e| failed(&e))?;
        if !url.tls {
            return over(tcp, request, url, body, limit).await;
        }
        let name = ServerName::try_from(url.host.clone()).map_err(|e| failed(&e))?;
        let connector = tokio_rustls::TlsConnector::from(self.tls.clone());
        let stream = connector.connect(name, tcp).await.map_err(|e| failed(&e))?;
        over(stream, request, url, body, limit).await
    }
}

async fn over<S>(
    stream: S,
    request: http::request::Builder,
    url: &Url,
    body: Bytes,
    limit: usize,
) -> Result<Value, Failure>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let failed = |e: &dyn fmt::Display| Failure::new(format!("{}: {e}", url.host));
    let request = request.body(Full::new(body)).map_err(|e| failed(&e))?;
    let (mut sender, driver) = hyper::client::conn::http1::Builder::new()
        .max_headers(64)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|e| failed(&e))?;
    let driver = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(driver));
    let response = sender.send_request(request).await.map_err(|e| failed(&e))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), limit).collect().await;
    let body =
        body.map_err(|e| failed(&format!("sends more than {limit} bytes, or no whole answer: {e}")))?;
    drop(driver);
    let body = body.to_bytes();
    if !status.is_success() {
        // An API server says in words what is missing.
        let said: Value = serde_json::from_slice(&body).unwrap_or_default();
        let said = said["message"].as_str().unwrap_or_default();
        let said = said.chars().filter(|c| !c.is_control()).take(MAX_WORDS).collect();
        return Err(Failure { status: Some(status), said, ..failed(&format!("answers {status}")) });
    }
    serde_json::from_slice(&body).map_err(|e| failed(&format!("answers with no JSON: {e}")))
}

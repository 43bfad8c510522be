//! HTTP to an agent: one request at a time on each of a few kept connections.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, Response, StatusCode, Uri, body::Incoming, client::conn::http1::SendRequest};
use hyper_util::rt::TokioIo;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use tokio::{net::TcpStream, time::timeout};

use super::watches::{Ask, Query};

/// TCP and TLS together.
const CONNECT: Duration = Duration::from_secs(5);
/// What an answer may take on top of the wait, of which Consul adds a sixteenth by itself.
const GRACE: Duration = Duration::from_secs(10);
/// An answer that is larger is not read.
const MAX_BODY: usize = 32 << 20;
/// Of an error's text, this much is repeated.
const MAX_TEXT: usize = 200;

/// Where an agent is, and who asks it.
#[derive(Debug, Clone)]
pub struct AgentOptions {
    /// `http://host:port` or `https://host:port`.
    pub url: String,
    /// File with the token; read before every question, so that it can be replaced.
    pub token_file: Option<PathBuf>,
    /// Datacenter to ask about; the agent's own unless set.
    pub datacenter: Option<String>,
    /// Roots that the agent's certificate must chain to; needed with `https`.
    pub ca_file: Option<PathBuf>,
    /// Certificate chain and key to show.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Why an agent cannot be asked, found before it is.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// Not an address of the two forms.
    #[error("{0:?} is not http://HOST:PORT or https://HOST:PORT")]
    Url(String),
    /// A secret would go over a network in clear text.
    #[error("{0}: a token is sent in clear text to loopback addresses only; use https")]
    ClearText(String),
    /// Nothing to verify the agent by.
    #[error(
        "{0}: https needs the roots that the agent's certificate chains to; name their file (--consul-ca-file)"
    )]
    NoRoots(String),
    /// A file of certificates or keys is not one.
    #[error("{path}: {reason}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Certificate, key and roots do not make a configuration.
    #[error("TLS configuration")]
    Tls(#[source] rustls::Error),
}

/// Why a question was not answered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    #[error("cannot connect to {address}")]
    Connect { address: String, source: std::io::Error },
    #[error("no answer in time")]
    Late,
    #[error("the connection broke")]
    Broken(#[from] hyper::Error),
    #[error("the token cannot be read: {0}")]
    Token(String),
    #[error("{status}: {text}")]
    Refused { status: StatusCode, text: String },
    #[error("the answer has more than {} MiB", MAX_BODY >> 20)]
    TooLarge,
    #[error(transparent)]
    Answer(#[from] super::answer::AnswerError),
}

impl AskError {
    /// What happened and why, in one line.
    pub(crate) fn told(&self) -> String {
        let mut out = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(e) = next {
            out.push_str(&format!(": {e}"));
            next = e.source();
        }
        out
    }
}

/// An answer.
pub(crate) struct Answer {
    /// `X-Consul-Index`; 0 if there was none.
    pub(crate) index: u64,
    /// The token does not let it tell everything.
    pub(crate) filtered: bool,
    pub(crate) body: Bytes,
}

type Connection = SendRequest<Empty<Bytes>>;

/// An agent.
pub(crate) struct Agent {
    options: AgentOptions,
    /// `host:port`.
    address: String,
    tls: Option<(ServerName<'static>, Arc<rustls::ClientConfig>)>,
    /// Connections without a question, at most as many as were open at once.
    idle: Mutex<Vec<Connection>>,
}

impl Agent {
    pub(crate) fn new(options: AgentOptions) -> Result<Self, OptionsError> {
        let bad = || OptionsError::Url(options.url.clone());
        let uri: Uri = options.url.parse().map_err(|_| bad())?;
        let host = uri.host().ok_or_else(bad)?;
        let https = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(bad()),
        };
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(bad());
        }
        let address = format!("{host}:{}", uri.port_u16().unwrap_or(if https { 8501 } else { 8500 }));
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let loopback =
            bare == "localhost" || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
        if !https && !loopback && options.token_file.is_some() {
            return Err(OptionsError::ClearText(options.url));
        }
        let tls = if https {
            let name = ServerName::try_from(bare.to_owned()).map_err(|_| bad())?;
            Some((name, Arc::new(tls(&options)?)))
        } else {
            None
        };
        Ok(Self { options, address, tls, idle: Mutex::default() })
    }

    pub(crate) fn url(&self) -> &str {
        &self.options.url
    }

    /// Asks, and waits for the answer as long as the question says.
    pub(crate) async fn ask(&self, ask: &Ask) -> Result<Answer, AskError> {
        let wait = if ask.index == 0 { Duration::ZERO } else { ask.wait + ask.wait / 16 };
        timeout(wait + CONNECT + GRACE, self.exchange(ask)).await.map_err(|_| AskError::Late)?
    }

    async fn exchange(&self, ask: &Ask) -> Result<Answer, AskError> {
        let request = self.request(ask).await?;
        let mut connection = self.connection().await?;
        let response = connection.send_request(request).await?;
        let answer = read(response).await?;
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        Ok(answer)
    }

    async fn request(&self, ask: &Ask) -> Result<Request<Empty<Bytes>>, AskError> {
        let mut request = Request::new(Empty::new());
        // What is written here by ourselves and escaped is a path.
        *request.uri_mut() = path(ask, self.options.datacenter.as_deref()).parse().unwrap_or_default();
        let headers = request.headers_mut();
        let host = self.address.parse().map_err(|_| AskError::Token("host".to_owned()))?;
        headers.insert(hyper::header::HOST, host);
        if let Some(file) = &self.options.token_file {
            let token = tokio::fs::read_to_string(file).await;
            let token = token.map_err(|e| AskError::Token(format!("{}: {e}", file.display())))?;
            let mut value: hyper::header::HeaderValue = token
                .trim()
                .parse()
                .map_err(|_| AskError::Token(format!("{}: not a token", file.display())))?;
            value.set_sensitive(true);
            headers.insert("x-consul-token", value);
        }
        Ok(request)
    }

    /// A connection that was left open, or a new one.
    async fn connection(&self) -> Result<Connection, AskError> {
        loop {
            let kept = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some(mut kept) = kept else { break };
            if kept.ready().await.is_ok() {
                return Ok(kept);
            }
        }
        match timeout(CONNECT, self.connect()).await {
            Ok(r) => r,
            Err(_) => Err(AskError::Late),
        }
    }

    async fn connect(&self) -> Result<Connection, AskError> {
        let failed = |source| AskError::Connect { address: self.address.clone(), source };
        let tcp = TcpStream::connect(&self.address).await.map_err(failed)?;
        tcp.set_nodelay(true).map_err(failed)?;
        // A way that was cut without a word is noticed after 25 seconds, not when the wait is over.
        let keepalive = socket2::TcpKeepalive::new().with_time(Duration::from_secs(10));
        let keepalive = keepalive.with_interval(Duration::from_secs(5)).with_retries(3);
        socket2::SockRef::from(&tcp).set_tcp_keepalive(&keepalive).map_err(failed)?;
        let Some((name, config)) = &self.tls else {
            return handshake(tcp).await;
        };
        let tls = tokio_rustls::TlsConnector::from(config.clone()).connect(name.clone(), tcp).await;
        handshake(tls.map_err(failed)?).await
    }
}

async fn handshake<T>(io: T) -> Result<Connection, AskError>
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await?;
    // Ends with its sender; how it ended is told to whoever waits for an answer.
    tokio::spawn(async move { drop(connection.await) });
    Ok(sender)
}

async fn read(response: Response<Incoming>) -> Result<Answer, AskError> {
    let status = response.status();
    let index =
        response.headers().get("x-consul-index").and_then(|v| v.to_str().ok()?.parse().ok()).unwrap_or(0);
    let filtered = response.headers().get("x-consul-results-filtered-by-acls").is_some_and(|v| v == "true");
    let mut body = response.into_body();
    let mut all = BytesMut::new();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            if all.len() + data.len() > MAX_BODY {
                return Err(AskError::TooLarge);
            }
            all.extend_from_slice(&data);
        }
    }
    if status != StatusCode::OK {
        let text: String = String::from_utf8_lossy(&all).trim().chars().take(MAX_TEXT).collect();
        return Err(AskError::Refused { status, text });
    }
    Ok(Answer { index, filtered, body: all.freeze() })
}

/// Path and query of a question.
fn path(ask: &Ask, datacenter: Option<&str>) -> String {
    let mut path = match &ask.query {
        Query::Catalog => "/v1/catalog/services?".to_owned(),
        Query::Critical => "/v1/health/state/critical?".to_owned(),
        Query::Service(name) => format!("/v1/health/service/{}?", escaped(name)),
    };
    if let Some(dc) = datacenter {
        path.push_str(&format!("dc={}&", escaped(dc)));
    }
    if ask.index > 0 {
        path.push_str(&format!("index={}&wait={}ms", ask.index, ask.wait.as_millis()));
    }
    path.trim_end_matches(['?', '&']).to_owned()
}

/// Everything but RFC 3986's unreserved characters, percent-encoded.
fn escaped(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    for b in s.bytes() {
        if b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(b));
        } else {
            out.push_str(&format!("%{b:02X}"));
        }
    }
    out
}

fn tls(options: &AgentOptions) -> Result<rustls::ClientConfig, OptionsError> {
    let pem = |path: &PathBuf, e: rustls_pki_types::pem::Error| OptionsError::Pem {
        path: path.clone(),
        reason: e.to_string(),
    };
    let certificates = |path: &PathBuf| -> Result<Vec<CertificateDer<'static>>, OptionsError> {
        let all = CertificateDer::pem_file_iter(path).map_err(|e| pem(path, e))?;
        let all: Vec<_> = all.collect::<Result<_, _>>().map_err(|e| pem(path, e))?;
        if all.is_empty() {
            return Err(OptionsError::Pem { path: path.clone(), reason: "no certificate in it".to_owned() });
        }
        Ok(all)
    };
    let ca = options.ca_file.as_ref().ok_or_else(|| OptionsError::NoRoots(options.url.clone()))?;
    let mut roots = rustls::RootCertStore::empty();
    for c in certificates(ca)? {
        roots.add(c).map_err(OptionsError::Tls)?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(OptionsError::Tls)?
        .with_root_certificates(roots);
    match &options.identity {
        None => Ok(builder.with_no_client_auth()),
        Some((chain, key)) => {
            let private = PrivateKeyDer::from_pem_file(key).map_err(|e| pem(key, e))?;
            builder.with_client_auth_cert(certificates(chain)?, private).map_err(OptionsError::Tls)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(url: &str) -> AgentOptions {
        AgentOptions {
            url: url.to_owned(),
            token_file: None,
            datacenter: None,
            ca_file: None,
            identity: None,
        }
    }

    #[test]
    fn addresses() {
        let at = |url: &str| Agent::new(options(url)).map(|a| a.address).map_err(|e| e.to_string());
        assert_eq!(at("http://127.0.0.1:1"), Ok("127.0.0.1:1".to_owned()));
        assert_eq!(at("http://consul.internal"), Ok("consul.internal:8500".to_owned()));
        assert_eq!(at("http://[::1]:8500/"), Ok("[::1]:8500".to_owned()));
        for bad in ["127.0.0.1:8500", "ftp://a", "http://", "http://a/v1", "http://a?x", ""] {
            assert!(at(bad).is_err_and(|e| e.contains("is not http://")), "{bad}");
        }
        assert!(at("https://a").is_err_and(|e| e.contains("roots")));
    }

    #[test]
    fn a_token_does_not_leave_the_host_in_clear_text() {
        let with = |url: &str| Agent::new(AgentOptions { token_file: Some("/t".into()), ..options(url) });
        assert!(with("http://127.0.0.1:8500").is_ok());
        assert!(with("http://[::1]:8500").is_ok());
        assert!(matches!(with("http://10.0.0.1:8500"), Err(OptionsError::ClearText(_))));
        assert!(matches!(with("http://localhost.example:8500"), Err(OptionsError::ClearText(_))));
    }
}

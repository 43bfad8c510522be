//! Where issuers of tokens have their keys, for rules that name an issuer alone: OpenID Connect Discovery 1.0.
//!
//! `<issuer>/.well-known/openid-configuration` names the `jwks_uri`, which proxies then fetch as if a document had said it. It
//! is asked for again from time to time; what was found stays while the issuer does not answer, and over a restart. Until
//! anything was found no token of the issuer is valid. Whoever writes such a rule makes the control plane ask that address:
//! what it answers is told to nobody but as this one URI.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Request, Uri, header};
use hyper_util::rt::TokioIo;
use mesh_identity::{crypto_provider, pem_certificates};
use rustls_pki_types::ServerName;
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::watch,
};
use tokio_util::task::AbortOnDropHandle;

use crate::config::{Config, Problem};

/// From one answer to the next question (Istio's).
const AGAIN: Duration = Duration::from_secs(20 * 60);
/// After a failure; doubled with each.
const RETRY: Duration = Duration::from_secs(1);
const MAX_RETRY: Duration = Duration::from_secs(300);
/// One question, with connection and TLS.
const PATIENCE: Duration = Duration::from_secs(5);
/// Largest answer, bytes.
const MAX_ANSWER: usize = 256 * 1024;
/// Issuers that are asked; a mesh has a few. The others are named to operators.
const MAX_ISSUERS: usize = 256;
const FILE: &str = "issuers.json";

/// Issuers and the URIs of their keys.
pub(crate) type Discovered = BTreeMap<String, String>;

/// Asks issuers for as long as it lives.
pub(crate) struct Issuers {
    known: Arc<watch::Sender<Discovered>>,
    asking: Mutex<BTreeMap<String, AbortOnDropHandle<()>>>,
    file: Option<PathBuf>,
    roots: PathBuf,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    issuer: String,
    jwks_uri: String,
}

impl Issuers {
    /// `keep`: the directory in which what was found is kept. `roots`: by whom issuers are vouched for, PEM.
    pub(crate) fn new(keep: Option<PathBuf>, roots: PathBuf) -> Self {
        let file = keep.map(|d| d.join(FILE));
        // A file that cannot be read is as good as none: issuers are asked anyway.
        let read = file.as_ref().and_then(|f| std::fs::read(f).ok());
        let known = read.and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default();
        Self { known: Arc::new(watch::Sender::new(known)), asking: Mutex::default(), file, roots }
    }

    /// Changes with what is known.
    pub(crate) fn watch(&self) -> watch::Receiver<Discovered> {
        self.known.subscribe()
    }

    /// What is known of the issuers that a configuration names without keys, who are asked from now on, and no others.
    pub(crate) fn of(&self, config: &Config) -> Discovered {
        let wanted = named(config);
        let mut asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        asking.retain(|i, _| wanted.contains(i.as_str()));
        for issuer in wanted.iter().take(MAX_ISSUERS) {
            asking.entry((*issuer).to_owned()).or_insert_with(|| {
                let (issuer, known) = ((*issuer).to_owned(), self.known.clone());
                let (file, roots) = (self.file.clone(), self.roots.clone());
                AbortOnDropHandle::new(tokio::spawn(follow(issuer, known, file, roots)))
            });
        }
        // What nobody names is forgotten; it is found again if somebody does.
        self.known.send_if_modified(|k| {
            k.retain(|i, _| wanted.contains(i.as_str()));
            false
        });
        self.known.borrow().clone()
    }
}

/// Says of issuers that are too many to be asked.
pub(crate) fn problem(config: &Config) -> Option<Problem> {
    let wanted = named(config);
    let first = wanted.iter().nth(MAX_ISSUERS)?;
    let message = format!(
        "{} issuers are named without keys, and {MAX_ISSUERS} are asked for them: no token of {first} and those behind it \
         is valid; name jwksUri",
        wanted.len()
    );
    Some(Problem { object: "RequestAuthentication".to_owned(), message })
}

/// Issuers of rules that have no keys.
fn named(config: &Config) -> BTreeSet<&str> {
    let now = config.request_authentications.iter().flat_map(|d| &d.spec.jwt_rules);
    let now = now.map(|r| (&r.issuer, &r.jwks, &r.jwks_uri));
    let policies = config.v1alpha1.policies.iter().chain(&config.v1alpha1.mesh_policies);
    let older = policies.flat_map(|d| &d.spec.origins).filter_map(|o| o.jwt.as_ref());
    let older = older.map(|j| (&j.issuer, &j.jwks, &j.jwks_uri));
    now.chain(older)
        .filter(|(issuer, jwks, uri)| jwks.is_empty() && uri.is_empty() && is_url(issuer))
        .map(|(issuer, ..)| issuer.as_str())
        .collect()
}

/// Whether an issuer can be asked: others are names alone.
fn is_url(issuer: &str) -> bool {
    issuer.starts_with("https://") || issuer.starts_with("http://")
}

async fn follow(
    issuer: String,
    known: Arc<watch::Sender<Discovered>>,
    file: Option<PathBuf>,
    roots: PathBuf,
) {
    let mut retry = RETRY;
    loop {
        let asked = tokio::time::timeout(PATIENCE, ask(&issuer, &roots)).await;
        let pause = match asked.unwrap_or_else(|_| Err("it does not answer".to_owned())) {
            Ok(uri) => {
                let news =
                    known.send_if_modified(|k| k.insert(issuer.clone(), uri.clone()).as_ref() != Some(&uri));
                if news {
                    tracing::info!(issuer, uri, "keys of an issuer were found");
                    let all = known.borrow().clone();
                    write(file.clone(), all).await;
                }
                retry = RETRY;
                AGAIN
            }
            Err(error) => {
                tracing::warn!(issuer, error, "where an issuer has its keys cannot be found");
                let pause = retry;
                retry = (retry * 2).min(MAX_RETRY);
                pause
            }
        };
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.9..1.1))).await;
    }
}

async fn write(file: Option<PathBuf>, known: Discovered) {
    let (Some(file), Ok(bytes)) = (file, serde_json::to_vec(&known)) else { return };
    let shown = file.display().to_string();
    let written =
        tokio::task::spawn_blocking(move || mesh_runtime::files::write_private(&file, &bytes)).await;
    if let Ok(Err(error)) = written {
        tracing::warn!(file = shown, %error, "where issuers have their keys cannot be kept over a restart");
    }
}

/// The `jwks_uri` of an issuer.
async fn ask(issuer: &str, roots: &std::path::Path) -> Result<String, String> {
    let text = format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'));
    let uri: Uri = text.parse().map_err(|_| "it is no URL".to_owned())?;
    let host = uri.host().ok_or("it names no host")?;
    let tls = uri.scheme_str() == Some("https");
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
    let tcp = TcpStream::connect((bare, port)).await.map_err(|e| format!("{host}: {e}"))?;
    let body = if tls {
        let name = ServerName::try_from(bare.to_owned()).map_err(|e| format!("{host}: {e}"))?;
        let connector = tokio_rustls::TlsConnector::from(Arc::new(client(roots)?));
        let stream = connector.connect(name, tcp).await.map_err(|e| format!("{host}: {e}"))?;
        get(stream, &uri).await
    } else {
        get(tcp, &uri).await
    };
    let body = body.map_err(|e| format!("{host}: {e}"))?;
    answered(issuer, &body).map_err(|e| format!("{host}: {e}"))
}

/// The `jwks_uri` of an answer.
fn answered(issuer: &str, body: &[u8]) -> Result<String, String> {
    let a: Answer = serde_json::from_slice(body).map_err(|e| format!("the answer: {e}"))?;
    // Discovery, section 4.3: who answers must be the issuer.
    if a.issuer.trim_end_matches('/') != issuer.trim_end_matches('/') {
        return Err("the answer is of another issuer".to_owned());
    }
    let uri = a.jwks_uri.parse::<Uri>().ok().filter(|_| is_url(&a.jwks_uri));
    let named = |u: &Uri| u.authority().is_some_and(|a| !a.host().is_empty() && !a.as_str().contains('@'));
    if !uri.as_ref().is_some_and(named) {
        return Err("its jwks_uri is no http or https URL of a host".to_owned());
    }
    Ok(a.jwks_uri)
}

/// Where an issuer's answer of any content leads is a URL with a host.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(data: &[u8]) {
    if let Ok(uri) = answered("https://issuer.example", data) {
        let read: Uri = uri.parse().expect("a URL");
        assert!(read.host().is_some_and(|h| !h.is_empty()), "{uri:?}");
        assert!(matches!(read.scheme_str(), Some("http" | "https")), "{uri:?}");
    }
}

fn client(roots: &std::path::Path) -> Result<rustls::ClientConfig, String> {
    let shown = roots.display().to_string();
    let pem = std::fs::read(roots).map_err(|e| format!("{shown}: {e}"))?;
    let mut store = rustls::RootCertStore::empty();
    store.add_parsable_certificates(pem_certificates(&shown, &pem).map_err(|e| e.to_string())?);
    let builder = rustls::ClientConfig::builder_with_provider(crypto_provider())
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12]);
    let mut config = builder.map_err(|e| e.to_string())?.with_root_certificates(store).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// Redirects are not followed: what a name means is the issuer's to say, in one place.
async fn get<S>(stream: S, uri: &Uri) -> Result<Bytes, String>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let request = Request::get(uri.path_and_query().map_or("/", |p| p.as_str()))
        .header(header::HOST, uri.authority().map_or("", |a| a.as_str()))
        .header(header::ACCEPT, "application/json")
        .body(Empty::<Bytes>::new())
        .map_err(|e| e.to_string())?;
    let (mut sender, driver) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    let _driver = AbortOnDropHandle::new(tokio::spawn(driver));
    let answer = sender.send_request(request).await.map_err(|e| e.to_string())?;
    if !answer.status().is_success() {
        return Err(format!("the answer is {}", answer.status()));
    }
    let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
    body.map(|b| b.to_bytes()).map_err(|_| format!("no whole answer of at most {MAX_ANSWER} bytes"))
}

#[cfg(test)]
mod tests;

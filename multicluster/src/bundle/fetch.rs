//! Asking a bundle endpoint, of either profile.
//!
//! The answer is another's: its length and the time that it may take are limited, and what is not a bundle as a whole is
//! none. Redirects are followed as the specification asks for, to URLs that an endpoint may have and under the same
//! verification, a few times and never stored.

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Request, Uri, header};
use hyper_util::rt::TokioIo;
use mesh_identity::{
    IdentityError, MAX_DOCUMENT, SecretStore, TRUST_BUNDLE, TrustBundle, crypto_provider, pem_certificates,
};
use mesh_model::{
    SpiffeId, TrustDomain,
    proxy::{SecretRef, StringMatch, UpstreamTls, Validation},
};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// From the first packet to the last byte, redirects included.
const PATIENCE: Duration = Duration::from_secs(15);
/// Redirects that are followed.
const MAX_REDIRECTS: usize = 3;

/// URL of a bundle endpoint (SPIFFE Federation, sections 5.2.1.1 and 5.2.2.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundleUrl {
    uri: Uri,
    host: String,
}

impl BundleUrl {
    /// Reads one: `https`, a host, and no user.
    ///
    /// # Errors
    /// [`FetchError::Url`] says what is wrong; a password in it is not repeated.
    pub fn parse(s: &str) -> Result<Self, FetchError> {
        let uri: Uri = s.parse().map_err(|_| FetchError::Url("it is no URL"))?;
        if uri.scheme_str() != Some("https") {
            return Err(FetchError::Url("it does not begin with https://"));
        }
        let authority = uri.authority().ok_or(FetchError::Url("it names no host"))?;
        if authority.as_str().contains('@') {
            return Err(FetchError::Url("it names a user"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() {
            return Err(FetchError::Url("it names no host"));
        }
        Ok(Self { uri, host })
    }

    fn port(&self) -> u16 {
        self.uri.port_u16().unwrap_or(443)
    }

    /// Where a `Location` of this endpoint's leads.
    pub(crate) fn redirected(&self, location: &str) -> Result<Self, FetchError> {
        if location.starts_with('/') && !location.starts_with("//") {
            let authority = self.uri.authority().map_or("", |a| a.as_str());
            return Self::parse(&format!("https://{authority}{location}"));
        }
        Self::parse(location)
    }
}

impl std::fmt::Display for BundleUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.uri.fmt(f)
    }
}

/// Why there is no bundle.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Not one that an endpoint may have.
    #[error("the URL cannot be that of a bundle endpoint: {0}")]
    Url(&'static str),
    /// No connection, or the server did not prove who it is.
    #[error("{host}: {source}")]
    Connection {
        /// Of the URL.
        host: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is too slow.
    #[error("no answer within {} s", PATIENCE.as_secs())]
    Slow,
    /// It speaks, but does not answer with a bundle.
    #[error("the endpoint {0}")]
    Answer(String),
    /// What it answers with cannot be used.
    #[error(transparent)]
    Bundle(#[from] IdentityError),
}

/// TLS for `https_web`: the host in the URL, vouched for by one of these authorities.
///
/// # Errors
/// If none of them can be used.
pub fn web_tls(roots_pem: &[u8]) -> Result<Arc<ClientConfig>, IdentityError> {
    const WHAT: &str = "authorities of the Web PKI";
    let mut roots = RootCertStore::empty();
    // A system's file may hold ones that webpki does not read; the others count.
    let (taken, _) = roots.add_parsable_certificates(pem_certificates(WHAT, roots_pem)?);
    if taken == 0 {
        return Err(IdentityError::Pem { what: WHAT.into(), reason: "none of them can be used".into() });
    }
    let mut config = ClientConfig::builder_with_provider(crypto_provider())
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// TLS for `https_spiffe`: an X509-SVID of this very ID, under the bundle of its trust domain.
///
/// # Errors
/// If the bundle cannot be used, or is of another domain.
pub fn spiffe_tls(bundle: &TrustBundle, id: &SpiffeId) -> Result<Arc<ClientConfig>, IdentityError> {
    if bundle.trust_domain.as_str() != id.trust_domain() {
        return Err(IdentityError::Settings(format!("{id} is not of trust domain {}", bundle.trust_domain)));
    }
    let store = SecretStore::new();
    store.set_mesh_trust(&bundle.trust_domain, bundle.pem().as_bytes())?;
    store.client_config(&UpstreamTls {
        certificate: None,
        validation: Validation {
            trusted: Some(SecretRef::Sds(TRUST_BUNDLE.into())),
            sans: vec![StringMatch::exact(id.as_str())],
            crl: None,
        },
        sni: "by-connection".into(),
        by_name: false,
        alpn: vec!["http/1.1".into()],
    })
}

/// The bundle of `domain` as an endpoint serves it now.
///
/// # Errors
/// [`FetchError`].
pub async fn fetch(
    url: &BundleUrl,
    domain: &TrustDomain,
    tls: Arc<ClientConfig>,
) -> Result<TrustBundle, FetchError> {
    let follow = async {
        let mut at = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            match ask(&at, tls.clone()).await? {
                Answer::Document(d) => return Ok(TrustBundle::parse(domain.clone(), &d)?),
                Answer::Elsewhere(to) => at = at.redirected(&to)?,
            }
        }
        Err(FetchError::Answer(format!("redirects more than {MAX_REDIRECTS} times")))
    };
    tokio::time::timeout(PATIENCE, follow).await.map_err(|_| FetchError::Slow)?
}

enum Answer {
    Document(String),
    Elsewhere(String),
}

async fn ask(url: &BundleUrl, tls: Arc<ClientConfig>) -> Result<Answer, FetchError> {
    let connection = |source| FetchError::Connection { host: url.host.clone(), source };
    let says = |e: hyper::Error| FetchError::Answer(format!("does not speak HTTP: {e}"));
    let name = ServerName::try_from(url.host.clone()).map_err(|_| FetchError::Url("its host is no name"))?;
    let tcp = TcpStream::connect((url.host.as_str(), url.port())).await.map_err(connection)?;
    let stream = TlsConnector::from(tls).connect(name, tcp).await.map_err(connection)?;
    let (mut sender, driver) = hyper::client::conn::http1::Builder::new()
        .max_headers(64)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(says)?;
    let driver = tokio::spawn(driver);
    let answer = async {
        let path = url.uri.path_and_query().map_or("/", |p| p.as_str());
        let authority = url.uri.authority().map_or("", |a| a.as_str());
        let request = Request::get(path)
            .header(header::HOST, authority)
            .header(header::ACCEPT, "application/json")
            .body(Empty::<Bytes>::new())
            .map_err(|_| FetchError::Url("its path cannot be asked for"))?;
        let response = sender.send_request(request).await.map_err(says)?;
        let status = response.status();
        if matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) {
            let to = response.headers().get(header::LOCATION).and_then(|l| l.to_str().ok());
            let to = to.ok_or_else(|| FetchError::Answer("redirects to nowhere".into()))?;
            return Ok(Answer::Elsewhere(to.to_owned()));
        }
        if status != hyper::StatusCode::OK {
            return Err(FetchError::Answer(format!("answers {status}")));
        }
        let body = Limited::new(response.into_body(), MAX_DOCUMENT).collect().await;
        let body = body.map_err(|e| {
            FetchError::Answer(format!("sends no whole bundle of {MAX_DOCUMENT} bytes at most: {e}"))
        })?;
        let text = String::from_utf8(body.to_bytes().to_vec());
        text.map(Answer::Document).map_err(|_| FetchError::Answer("sends what is no UTF-8".into()))
    };
    let answer = answer.await;
    // A connection is for one question.
    driver.abort();
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        for (text, host, port) in [
            ("https://b.example", "b.example", 443),
            ("https://b.example:8443/x/bundle.json?y=1", "b.example", 8443),
            ("https://[::1]:9/", "::1", 9),
        ] {
            let u = BundleUrl::parse(text).unwrap();
            assert_eq!((u.host.as_str(), u.port()), (host, port));
        }
        for bad in [
            "",
            "b.example",
            "http://b.example",
            "https://",
            "https://me:secret@b.example/",
            "https:///x",
            "/x",
        ] {
            let e = BundleUrl::parse(bad).unwrap_err().to_string();
            assert!(!e.contains("secret"), "{e}");
        }
        let u = BundleUrl::parse("https://b.example:8443/x").unwrap();
        assert_eq!(u.redirected("/y?z").unwrap().to_string(), "https://b.example:8443/y?z");
        assert_eq!(u.redirected("https://c.example/").unwrap().host, "c.example");
        for bad in ["http://b.example:8443/x", "//c.example/x", "y", "https://me@c.example/"] {
            assert!(u.redirected(bad).is_err(), "{bad}");
        }
    }
}

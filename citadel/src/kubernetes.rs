//! Service-account tokens of Kubernetes as proof of identity.
//!
//! Projected tokens of audience [`token::AUDIENCE`] name a service account, `system:serviceaccount:<namespace>:<name>`. They are
//! verified in one of two ways: by the keys of their issuer, which are found by OpenID Connect Discovery ([`oidc`]), or by
//! asking the API server (TokenReview), which also knows whether pod and account are still there. A token whose issuer is
//! configured is not asked about.

mod https;
mod oidc;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::Deserialize;
use serde_json::{Value, json};

pub use https::Url;

use crate::{AuthorityError, token::AUDIENCE};
use https::Client;
use oidc::Issuer;

/// Longest token that is looked at, bytes.
const MAX_TOKEN: usize = 16 * 1024;
/// Longest answer to a review, bytes.
const MAX_ANSWER: usize = 256 * 1024;
/// An API server that is slower is as good as none.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two lines of the log about the same trouble.
const PAUSE: Duration = Duration::from_secs(10);

/// Where tokens are verified.
#[derive(Debug, Clone, Default)]
pub struct KubernetesOptions {
    /// The API server, to ask about tokens.
    pub review: Option<Url>,
    /// Issuers whose tokens are verified by their keys.
    pub issuers: Vec<IssuerUrl>,
    /// Authorities of both, PEM.
    pub ca: Option<PathBuf>,
    /// What this process is to them: a bearer token, read anew for each question.
    pub credential: Option<PathBuf>,
}

/// An issuer, and where it is asked for its keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuerUrl {
    /// As in tokens and in its document.
    pub name: Url,
    /// Where that document is; the same unless another is given. Inside a cluster its API server is
    /// `https://kubernetes.default.svc`, outside it nobody knows that name.
    pub at: Url,
}

impl IssuerUrl {
    /// Reads `ISSUER` or `ISSUER=URL`.
    ///
    /// # Errors
    /// As for [`Url::parse`].
    pub fn parse(s: &str) -> Result<Self, String> {
        match s.split_once("=http") {
            None if s.ends_with('=') => Err("names nothing after =".into()),
            None => Url::parse(s).map(|name| Self { at: name.clone(), name }),
            Some((name, at)) => Ok(Self {
                name: Url::parse(name).map_err(|why| format!("the issuer {why}"))?,
                at: Url::parse(&format!("http{at}")).map_err(|why| format!("what follows = {why}"))?,
            }),
        }
    }
}

/// Who a token proves its bearer to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// Seconds since the epoch; 0 if it does not say.
    pub(crate) issued_at: u64,
    /// How it was verified, for the audit log.
    pub(crate) by: &'static str,
}

/// Verifies tokens.
pub(crate) struct Kubernetes {
    client: Arc<Client>,
    review: Option<Url>,
    issuers: Vec<Issuer>,
    /// When it was said last that the API server cannot be asked.
    warned: Mutex<Option<Instant>>,
}

/// What a token says before anything of it is believed.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Said {
    iss: String,
    iat: u64,
}

/// The issuer that a token claims, to choose who verifies it.
pub(crate) fn claimed_issuer(token: &str) -> String {
    said(token).iss
}

fn said(token: &str) -> Said {
    let payload = token.split('.').nth(1).filter(|_| token.len() <= MAX_TOKEN);
    let payload = payload.and_then(|p| URL_SAFE_NO_PAD.decode(p).ok());
    payload.and_then(|p| serde_json::from_slice(&p).ok()).unwrap_or_default()
}

pub(crate) fn refused(why: impl std::fmt::Display) -> AuthorityError {
    AuthorityError::Unauthenticated(format!("service-account token: {why}"))
}

pub(crate) fn unavailable(why: impl std::fmt::Display) -> AuthorityError {
    AuthorityError::Unavailable(format!("service-account token: {why}"))
}

/// `(namespace, name)` of a service account's user name.
pub(crate) fn account(user: &str) -> Result<(String, String), AuthorityError> {
    let mut it = user.split(':');
    match (it.next(), it.next(), it.next(), it.next(), it.next()) {
        (Some("system"), Some("serviceaccount"), Some(ns), Some(sa), None)
            if !ns.is_empty() && !sa.is_empty() =>
        {
            Ok((ns.to_owned(), sa.to_owned()))
        }
        _ => Err(refused("it is not of a service account")),
    }
}

impl Kubernetes {
    /// `None` if nothing is to be verified by it.
    ///
    /// # Errors
    /// If the authorities cannot be read.
    pub(crate) fn new(o: KubernetesOptions) -> Result<Option<Self>, AuthorityError> {
        if o.review.is_none() && o.issuers.is_empty() {
            return Ok(None);
        }
        let client = Arc::new(Client::new(o.ca.as_deref(), o.credential)?);
        let issuers = o.issuers.into_iter().map(|url| Issuer::new(url, client.clone())).collect();
        Ok(Some(Self { client, review: o.review, issuers, warned: Mutex::default() }))
    }

    /// Whether an issuer of this name is verified here at all.
    pub(crate) fn takes(&self, issuer: &str) -> bool {
        self.review.is_some() || self.issuers.iter().any(|i| i.is(issuer))
    }

    /// Verifies a token.
    ///
    /// # Errors
    /// [`AuthorityError::Unauthenticated`], or [`AuthorityError::Unavailable`] if nobody can be asked: the token may be good,
    /// and the caller may ask again.
    pub(crate) async fn prove(&self, token: &str) -> Result<Account, AuthorityError> {
        if token.len() > MAX_TOKEN {
            return Err(refused("it is too long"));
        }
        let said = said(token);
        if let Some(issuer) = self.issuers.iter().find(|i| i.is(&said.iss)) {
            return issuer.prove(token).await;
        }
        let Some(server) = &self.review else {
            return Err(refused(format!("its issuer {:?} is not one that is verified here", said.iss)));
        };
        let ask = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
            "spec": {"token": token, "audiences": [AUDIENCE]},
        });
        let url = server.join("/apis/authentication.k8s.io/v1/tokenreviews");
        let asked = self.client.post(&url, &ask, MAX_ANSWER);
        let answer = match tokio::time::timeout(PATIENCE, asked).await {
            Ok(Ok(a)) => a,
            Ok(Err(e)) => {
                let hint = match e.status.map(|s| s.as_u16()) {
                    Some(401) => " (--token-credential names a token that it knows)",
                    Some(403) => " (the account of --token-credential needs the role system:auth-delegator)",
                    _ => "",
                };
                return Err(self.away(&format!("the API server could not be asked: {e}{hint}"), &e.said));
            }
            Err(_) => return Err(self.away("the API server does not answer", "")),
        };
        let (namespace, name) = reviewed(&answer)?;
        Ok(Account { namespace, name, issued_at: said.iat, by: "token review" })
    }

    /// Callers are told what is wrong; what the server says of us is for who runs this, and so that callers do not fill the
    /// log, only now and then.
    fn away(&self, why: &str, said: &str) -> AuthorityError {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_none_or(|at| at.elapsed() >= PAUSE) {
            *warned = Some(Instant::now());
            tracing::warn!(said, "a service-account token cannot be verified: {why}");
        }
        unavailable(why)
    }
}

/// What the API server says of a token.
fn reviewed(answer: &Value) -> Result<(String, String), AuthorityError> {
    let status = &answer["status"];
    if let Some(e) = status["error"].as_str().filter(|e| !e.is_empty()) {
        return Err(refused(e.chars().filter(|c| !c.is_control()).take(200).collect::<String>()));
    }
    if status["authenticated"] != true {
        return Err(refused("the API server does not know it"));
    }
    // A server that knows of no audiences answers without, and takes a token for any.
    let audiences =
        status["audiences"].as_array().ok_or_else(|| refused("the API server names no audience"))?;
    if !audiences.iter().any(|a| a == AUDIENCE) {
        return Err(refused(format!("it is not for the audience {AUDIENCE}")));
    }
    account(status["user"]["username"].as_str().unwrap_or_default())
}

/// Whom a review of any content proves is whom it names, and for us.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz_review(data: &[u8]) {
    let Ok(answer) = serde_json::from_slice::<Value>(data) else { return };
    if let Ok((namespace, name)) = reviewed(&answer) {
        assert_eq!(answer["status"]["authenticated"], true);
        assert_eq!(answer["status"]["user"]["username"], format!("system:serviceaccount:{namespace}:{name}"));
    }
}

#[cfg(test)]
mod tests;

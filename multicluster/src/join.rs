//! The newcomer's side of a join: pinned first contact, one call.

use std::{io, time::Duration};

use mesh_identity::PinnedPeer;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinSet,
};
use tokio_rustls::client::TlsStream;

use crate::{
    admin_pb::PrepareJoinResponse,
    dial,
    membership::Bundle,
    pb::{JoinRequest, JoinResponse, federation_client::FederationClient},
    token::{JoinToken, TokenError},
};

/// The member signs within this time or the join is given up (and can be repeated).
const JOIN_TIMEOUT: Duration = Duration::from_secs(20);
/// Whoever connects proves the pinned root within this time.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Connections that are looked at at once.
const HANDSHAKES: usize = 32;
/// After a failure to accept.
const PAUSE: Duration = Duration::from_millis(100);

/// Why a join did not happen. Nothing has changed in either cluster unless it says so.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The token cannot be used.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// No gateway of the member answered.
    #[error(
        "cannot reach cluster {cluster}: {source}; check that this machine reaches one of its gateways ({gateways})"
    )]
    Unreachable {
        /// The member.
        cluster: String,
        /// Addresses tried.
        gateways: String,
        /// The last failure.
        #[source]
        source: std::io::Error,
    },
    /// The token is of a member that dials.
    #[error(
        "cluster {0} dials for this token: say where it is waited for (`flotilla join-cluster TOKEN --accept 0.0.0.0:15443`)"
    )]
    Waits(String),
    /// The member did not come.
    #[error(
        "cluster {cluster} has not dialled this one: {source}; does `flotilla token create --dial` still run there, and does \
         the address lead here?"
    )]
    NotDialled {
        /// The member.
        cluster: String,
        /// What came instead.
        #[source]
        source: std::io::Error,
    },
    /// The gateway is not the one the token was made for.
    #[error("refused to send the secret: {0}")]
    Impostor(String),
    /// The member refused.
    #[error("cluster {cluster} refused the join: {reason}")]
    Refused {
        /// The member.
        cluster: String,
        /// In its words.
        reason: String,
    },
    /// The token is for another trust domain.
    #[error(
        "the token is for a cluster of trust domain {0}, and this one is of {1}: create one with `flotilla token create \
         --federate {1}`"
    )]
    OtherDomain(String, String),
    /// The token is for a cluster with a root of its own.
    #[error(
        "the token is for a cluster of trust domain {0} that keeps its own root: found that mesh first (`flotilla found \
         --trust-domain {0}`), or create a token without --federate"
    )]
    NoRoot(String),
    /// The answer cannot be what the member meant to say.
    #[error("cluster {cluster} answered with a trust bundle that is not its mesh's: {reason}")]
    Bundle {
        /// The member.
        cluster: String,
        /// What is wrong with it.
        reason: String,
    },
    /// TLS could not be set up.
    #[error("TLS: {0}")]
    Tls(#[from] mesh_identity::IdentityError),
}

/// Dials a gateway of the token's cluster, checks the pinned root, and asks for membership.
///
/// # Errors
/// [`JoinError`].
pub async fn join(token: &JoinToken, newcomer: PrepareJoinResponse) -> Result<JoinResponse, JoinError> {
    if token.dials {
        return Err(JoinError::Waits(token.cluster.to_string()));
    }
    let pinned = pinned(token)?;
    let stream = dial::tls(&token.gateways, &dial::join_sni(&token.cluster), pinned.config.clone()).await;
    match (stream, pinned.refusal()) {
        (Ok(s), _) => ask(token, s, newcomer).await,
        (Err(_), Some(why)) => Err(JoinError::Impostor(why.to_owned())),
        (Err(e), None) => Err(unreachable(token, e)),
    }
}

/// The same where the member dials: waits at `listener` for a connection that leads to it, for `limit` at most. Whoever
/// else connects learns nothing, since this side is the client and shows its secret only to the pinned root.
///
/// # Errors
/// [`JoinError`].
pub async fn join_dialled(
    token: &JoinToken,
    listener: &TcpListener,
    limit: Duration,
    newcomer: PrepareJoinResponse,
) -> Result<JoinResponse, JoinError> {
    let end = tokio::time::Instant::now() + limit;
    let (results, mut found) = mpsc::channel(1);
    let mut handshakes = JoinSet::new();
    let mut last = io::Error::new(io::ErrorKind::TimedOut, "nobody has connected");
    loop {
        tokio::select! {
            accepted = listener.accept(), if handshakes.len() < HANDSHAKES => {
                let (tcp, from) = match accepted {
                    Ok(a) => a,
                    Err(e) => {
                        last = e;
                        tokio::time::sleep(PAUSE).await;
                        continue;
                    }
                };
                let (pinned, sni, results) = (pinned(token)?, dial::join_sni(&token.cluster), results.clone());
                // Side by side: somebody who connects and says nothing must not keep the member out.
                handshakes.spawn(async move {
                    let shaken = tokio::time::timeout(HANDSHAKE, dial::over(tcp, &sni, pinned.config.clone()));
                    let result = match shaken.await {
                        Ok(Ok(stream)) => Ok(stream),
                        Ok(Err(e)) => Err(pinned.refusal().map_or_else(|| e.to_string(), str::to_owned)),
                        Err(_) => Err("no TLS".to_owned()),
                    };
                    let _ = results.send(result.map_err(|why| format!("{from}: {why}"))).await;
                });
            }
            Some(result) = found.recv() => match result {
                Ok(stream) => return ask(token, stream, newcomer).await,
                Err(why) => last = io::Error::other(why),
            },
            Some(_) = handshakes.join_next() => {}
            () = tokio::time::sleep_until(end) => return Err(unreachable(token, last)),
        }
    }
}

fn pinned(token: &JoinToken) -> Result<PinnedPeer, JoinError> {
    let san = dial::control_plane_san(token.trust_domain.as_str());
    Ok(PinnedPeer::new(&token.pin, &san, token.cluster.clone())?)
}

fn unreachable(token: &JoinToken, source: io::Error) -> JoinError {
    let cluster = token.cluster.to_string();
    if token.dials {
        return JoinError::NotDialled { cluster, source };
    }
    let gateways = token.gateways.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    JoinError::Unreachable { cluster, gateways, source }
}

/// Shows the secret to whoever proved the pinned root.
async fn ask(
    token: &JoinToken,
    stream: TlsStream<TcpStream>,
    prepared: PrepareJoinResponse,
) -> Result<JoinResponse, JoinError> {
    let PrepareJoinResponse { newcomer, csr, bundle, members } = prepared;
    match (&token.federate, &bundle) {
        (Some(domain), Some(b)) if b.trust_domain != domain.as_str() => {
            return Err(JoinError::OtherDomain(domain.to_string(), b.trust_domain.clone()));
        }
        (Some(domain), None) => return Err(JoinError::NoRoot(domain.to_string())),
        _ => {}
    }
    let channel = dial::channel(stream).await.map_err(|e| unreachable(token, e))?;
    let request =
        JoinRequest { token_id: token.id.clone(), secret: token.secret(), newcomer, csr, bundle, members };
    let refused = |reason: String| JoinError::Refused { cluster: token.cluster.to_string(), reason };
    match tokio::time::timeout(JOIN_TIMEOUT, FederationClient::new(channel).join(request)).await {
        Ok(Ok(response)) => checked(token, response.into_inner()),
        Ok(Err(status)) => Err(refused(status.message().to_owned())),
        Err(_) => Err(refused(format!("no answer within {} s", JOIN_TIMEOUT.as_secs()))),
    }
}

/// The bundle that a federation begins with is of the mesh whose root the token pins.
fn checked(token: &JoinToken, response: JoinResponse) -> Result<JoinResponse, JoinError> {
    if token.federate.is_none() {
        return Ok(response);
    }
    let bad = |reason: String| JoinError::Bundle { cluster: token.cluster.to_string(), reason };
    let told = response.foreign.as_ref().ok_or_else(|| bad("there is none".into()))?;
    let bundle = Bundle::from_pb(told).map_err(|e| bad(e.to_string()))?.bundle;
    if bundle.trust_domain != token.trust_domain {
        return Err(bad(format!("it is of {}, the token of {}", bundle.trust_domain, token.trust_domain)));
    }
    if !bundle.has_pin(&token.pin) {
        return Err(bad("it lacks the root that the token pins".into()));
    }
    Ok(response)
}

//! The newcomer's side of a join: pinned first contact, one call.

use std::time::Duration;

use mesh_identity::PinnedPeer;

use crate::{
    dial,
    pb::{JoinRequest, JoinResponse, Member, federation_client::FederationClient},
    token::{JoinToken, TokenError},
};

/// The member signs within this time or the join is given up (and can be repeated).
const JOIN_TIMEOUT: Duration = Duration::from_secs(20);

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
    /// TLS could not be set up.
    #[error("TLS: {0}")]
    Tls(#[from] mesh_identity::IdentityError),
}

/// Dials a gateway of the token's cluster, checks the pinned root, and asks for membership.
///
/// # Errors
/// [`JoinError`].
pub async fn join(token: &JoinToken, newcomer: Member, csr: String) -> Result<JoinResponse, JoinError> {
    let cluster = token.cluster.to_string();
    let pinned = PinnedPeer::new(
        &token.pin,
        &dial::control_plane_san(token.trust_domain.as_str()),
        token.cluster.clone(),
    )?;
    let unreachable = |source| JoinError::Unreachable {
        cluster: cluster.clone(),
        gateways: token.gateways.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        source,
    };
    let stream = dial::tls(&token.gateways, &dial::join_sni(&token.cluster), pinned.config.clone()).await;
    let stream = match (stream, pinned.refusal()) {
        (Ok(s), _) => s,
        (Err(_), Some(why)) => return Err(JoinError::Impostor(why.to_owned())),
        (Err(e), None) => return Err(unreachable(e)),
    };
    let channel = dial::channel(stream).await.map_err(unreachable)?;
    let request =
        JoinRequest { token_id: token.id.clone(), secret: token.secret(), newcomer: Some(newcomer), csr };
    let refused = |reason: String| JoinError::Refused { cluster: cluster.clone(), reason };
    match tokio::time::timeout(JOIN_TIMEOUT, FederationClient::new(channel).join(request)).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(refused(status.message().to_owned())),
        Err(_) => Err(refused(format!("no answer within {} s", JOIN_TIMEOUT.as_secs()))),
    }
}

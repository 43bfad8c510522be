//! Talking to the control plane of this machine through the sockets in its state directory.

use std::path::{Path, PathBuf};

use anyhow::Context;
use mesh_xds::{Endpoint, client::channel};
use multicluster::{admin_pb::admin_client::AdminClient, authority_pb::authority_client::AuthorityClient};
use tonic::{Status, transport::Channel};

/// Which control plane a command is for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Local {
    /// State directory of the control plane.
    #[arg(long, env = "FLOTILLA_STATE_DIR", default_value = "/var/lib/flotilla")]
    pub(crate) state_dir: PathBuf,
}

/// Socket names in a state directory.
pub(crate) mod socket {
    /// Configuration, from galley.
    pub(crate) const GALLEY: &str = "galley.sock";
    /// Exports, from pilot.
    pub(crate) const PILOT: &str = "pilot.sock";
    /// Debug pages of pilot and galley.
    pub(crate) const DEBUG: &str = "debug.sock";
    /// Operators and imports.
    pub(crate) const FEDERATION: &str = "federation.sock";
    /// The CA.
    pub(crate) const CITADEL: &str = "citadel.sock";
}

impl Local {
    async fn channel(&self, name: &str) -> anyhow::Result<Channel> {
        let path = self.state_dir.join(name);
        channel(&Endpoint::Unix(path.clone())).await.with_context(|| unreachable(&path))
    }

    pub(crate) async fn admin(&self) -> anyhow::Result<AdminClient<Channel>> {
        Ok(AdminClient::new(self.channel(socket::FEDERATION).await?))
    }

    pub(crate) async fn authority(&self) -> anyhow::Result<AuthorityClient<Channel>> {
        Ok(AuthorityClient::new(self.channel(socket::CITADEL).await?))
    }

    /// A debug page: status and body.
    pub(crate) async fn debug(&self, path: &str) -> anyhow::Result<(u16, bytes::Bytes)> {
        self.ask(path, None).await
    }

    /// The same with a question, as JSON.
    pub(crate) async fn ask(
        &self,
        path: &str,
        question: Option<serde_json::Value>,
    ) -> anyhow::Result<(u16, bytes::Bytes)> {
        use http_body_util::{BodyExt, Full};
        let socket = self.state_dir.join(socket::DEBUG);
        let stream = tokio::net::UnixStream::connect(&socket).await.with_context(|| unreachable(&socket))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = hyper::Request::builder()
            .uri(path)
            .header("host", "flotilla")
            .header("content-type", "application/json");
        let request = match question {
            None => request.body(Full::<bytes::Bytes>::default())?,
            Some(q) => request.method("POST").body(Full::from(q.to_string()))?,
        };
        let response = sender.send_request(request).await?;
        let status = response.status().as_u16();
        Ok((status, response.into_body().collect().await?.to_bytes()))
    }
}

fn unreachable(path: &Path) -> String {
    format!(
        "no control plane answers at {}: is it running, and is --state-dir (or FLOTILLA_STATE_DIR) the same?",
        path.display()
    )
}

/// A refusal by a control plane, for a person.
pub(crate) fn refusal(status: &Status) -> String {
    status.message().to_owned()
}

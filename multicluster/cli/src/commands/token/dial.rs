//! A newcomer that cannot dial: its connection is made here, and led to the control plane.
//!
//! Only bytes pass. The TLS session is between the newcomer, which is its client, and the control plane, as if the
//! newcomer had dialled; who stands in between learns nothing, this program included.

use std::{
    collections::BTreeSet,
    io,
    net::SocketAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mesh_runtime::exit;
use multicluster::admin_pb::ClustersRequest;
use tokio::{io::copy_bidirectional, net::TcpStream, time::timeout};

use crate::local::{Local, refusal};

const CONNECT: Duration = Duration::from_secs(5);
/// A join is over by then.
const SESSION: Duration = Duration::from_secs(60);
/// Between attempts.
const PAUSE: Duration = Duration::from_secs(1);

async fn members(local: &Local) -> anyhow::Result<BTreeSet<String>> {
    match local.admin().await?.clusters(ClustersRequest {}).await {
        Ok(r) => Ok(r.into_inner().clusters.into_iter().filter_map(|c| Some(c.member?.cluster)).collect()),
        Err(s) => anyhow::bail!(refusal(&s)),
    }
}

async fn session(newcomer: SocketAddr, control_plane: SocketAddr) -> io::Result<()> {
    let connect = |to: SocketAddr, what: &'static str| async move {
        let failed = |e: io::Error| io::Error::new(e.kind(), format!("{what} {to}: {e}"));
        timeout(CONNECT, TcpStream::connect(to))
            .await
            .map_err(io::Error::from)
            .and_then(|r| r)
            .map_err(failed)
    };
    let mut own = connect(control_plane, "the control plane (--control-plane)").await?;
    let mut other = connect(newcomer, "the newcomer").await?;
    timeout(SESSION, copy_bidirectional(&mut own, &mut other)).await??;
    Ok(())
}

/// Dials until another member is there, or `expires`, seconds since the epoch, has come.
pub(super) async fn until_joined(
    local: &Local,
    newcomer: SocketAddr,
    control_plane: SocketAddr,
    expires: u64,
) -> anyhow::Result<u8> {
    eprintln!("Dialling {newcomer}; there, run `flotilla join-cluster TOKEN --accept {newcomer}` ...");
    let before = members(local).await?;
    let mut said = String::new();
    while SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() < expires {
        let result = session(newcomer, control_plane).await;
        if let Some(new) = members(local).await?.difference(&before).next() {
            eprintln!("Cluster {new} joined.");
            return Ok(exit::OK);
        }
        let now = match result {
            Ok(()) => "the newcomer ended the connection and has not joined".to_owned(),
            Err(e) => e.to_string(),
        };
        if now != said {
            eprintln!("  {now}; trying again");
            said = now;
        }
        tokio::time::sleep(PAUSE).await;
    }
    eprintln!("error: nobody joined before the token expired");
    Ok(exit::FAILED)
}

//! The engine's dialer for addresses of the form `trunk:<gateway address>`.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_identity::SecretStore;
use mesh_model::ClusterId;
use mesh_proxy::{BoxedIo, Dialer, HookFuture};
use mesh_trunk::{Trunk, TrunkError, TrunkMetrics, TrunkOptions};
use prometheus_client::registry::Registry;
use tokio::runtime::Handle;

/// Binds the trunk on the current runtime and answers with the engine's way into it.
pub(crate) fn start(
    options: TrunkOptions,
    secrets: &SecretStore,
    registry: &mut Registry,
) -> Result<Arc<dyn Dialer>, TrunkError> {
    let metrics = TrunkMetrics::register(registry);
    let trunk = Trunk::start(options, secrets, metrics)?;
    Ok(Arc::new(TrunkDialer { trunk: Arc::new(trunk), runtime: Handle::current() }))
}

struct TrunkDialer {
    trunk: Arc<Trunk>,
    /// The trunk's timers and sockets belong to this runtime, not to the engine's workers.
    runtime: Handle,
}

/// The peer that an inner name asks for: `….svc.<peer>.clusterset.local`, `federation.<peer>.…`.
fn expected(sni: &str) -> Option<ClusterId> {
    ClusterId::new(sni.strip_suffix(".clusterset.local")?.rsplit('.').next()?).ok()
}

impl Dialer for TrunkDialer {
    fn dial<'a>(&'a self, addr: &'a str, port: u16, sni: &'a str) -> HookFuture<'a, io::Result<BoxedIo>> {
        Box::pin(async move {
            let ip: IpAddr = addr.strip_prefix("trunk:").and_then(|a| a.parse().ok()).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidInput, format!("{addr:?} is no trunk"))
            })?;
            let (trunk, expect) = (self.trunk.clone(), expected(sni));
            let dial = self
                .runtime
                .spawn(async move { trunk.dial(SocketAddr::new(ip, port), expect.as_ref()).await });
            let stream = dial.await.map_err(io::Error::other)??;
            Ok(Box::new(stream) as BoxedIo)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_inner_name_says_which_cluster_to_expect() {
        let peer = |s| expected(s).map(|c| c.to_string());
        assert_eq!(
            peer("outbound_.9080_.v1_.reviews.books.svc.east.clusterset.local").as_deref(),
            Some("east")
        );
        assert_eq!(peer("federation.east.clusterset.local").as_deref(), Some("east"));
        assert_eq!(peer("outbound_.9080_._.reviews.books.svc.cluster.local"), None);
        assert_eq!(peer(""), None);
    }
}

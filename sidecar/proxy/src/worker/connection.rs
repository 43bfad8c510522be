//! A downstream connection and what is known about it.

use std::{
    cell::{OnceCell, RefCell},
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Instant, SystemTime},
};

use mesh_identity::{CertificateIds, PeerIdentity};
use mesh_model::proxy::Direction;
use mesh_telemetry::metrics::RequestSeries;
use rustls::pki_types::CertificateDer;

use super::{Worker, signals::Signals};
use crate::{
    config::listener::{Chain, HttpManager, Listener, ListenerPlace},
    http::{message::RequestHead, metadata::Metadata, record::SeriesKey},
    rbac::Facts,
};

/// A connection that a filter chain serves.
pub(crate) struct Connection {
    pub(crate) worker: Rc<Worker>,
    pub(crate) listener: Arc<Listener>,
    pub(crate) chain: Arc<Chain>,
    /// Its place in the listener, if it is one of the listener's own connections.
    pub(crate) _place: Option<ListenerPlace>,
    /// The peer, by PROXY protocol if the listener expects it.
    pub(crate) peer: SocketAddr,
    /// The peer of the socket.
    pub(crate) direct_peer: SocketAddr,
    /// Where the client meant to connect.
    pub(crate) local: SocketAddr,
    /// Whether that is another place than this proxy.
    pub(crate) redirected: bool,
    pub(crate) sni: Option<String>,
    pub(crate) tls: bool,
    pub(crate) identity: Option<Arc<PeerIdentity>>,
    /// What the peer has shown, where requests tell of it.
    pub(crate) client_chain: Box<[CertificateDer<'static>]>,
    pub(crate) source: SourceLabels,
    /// Tells its tasks to drain or end.
    pub(crate) signals: Rc<Signals>,
    pub(crate) started: Instant,
    pub(crate) started_at: SystemTime,
    /// Metric series used lately, most recent first.
    pub(crate) series: RefCell<Vec<(SeriesKey, RequestSeries)>>,
    /// The peer's address as text, once a request needs it.
    pub(crate) peer_text: OnceCell<Box<str>>,
    /// The peer's element of `x-forwarded-client-cert`, once a request needs it.
    pub(crate) client_cert: OnceCell<String>,
    /// What filters of the connection found out, for its log. Requests have their own.
    pub(crate) found: OnceCell<Box<Metadata>>,
}

/// Metric labels of the peer.
#[derive(Clone)]
pub(crate) struct SourceLabels {
    pub(crate) workload: Arc<str>,
    pub(crate) namespace: Arc<str>,
    pub(crate) principal: Arc<str>,
    pub(crate) cluster: Arc<str>,
}

impl SourceLabels {
    /// From the certificate: the service account stands for the workload, whose name a principal does not hold.
    pub(crate) fn new(worker: &Worker, identity: Option<&PeerIdentity>) -> Self {
        let unknown = || Arc::clone(&worker.shared.labels.unknown);
        let spiffe = identity.and_then(|i| i.spiffe.as_ref());
        let (namespace, account) = match spiffe.and_then(|s| s.namespace_and_account()) {
            Some((ns, sa)) => (Arc::from(ns), Arc::from(sa)),
            None => (unknown(), unknown()),
        };
        Self {
            workload: account,
            namespace,
            principal: spiffe.map_or_else(unknown, |s| Arc::from(s.as_str())),
            cluster: identity
                .and_then(|i| i.cluster.as_ref())
                .map_or_else(unknown, |c| Arc::from(c.as_str())),
        }
    }
}

/// Ready when one of the certificates that somebody has shown is revoked.
pub(crate) async fn revoked(worker: &Worker, shown: Option<&CertificateIds>) {
    match shown {
        Some(ids) => worker.secrets.revocations().until_revoked(ids).await,
        None => std::future::pending().await,
    }
}

impl Connection {
    /// When it is too old for further requests.
    pub(crate) fn ends(&self, manager: &HttpManager) -> Option<Instant> {
        manager.config.limits.max_connection_duration.map(|d| self.started + d)
    }

    /// Waits until then.
    pub(crate) async fn aged(&self, manager: &HttpManager) {
        match self.ends(manager) {
            Some(at) => tokio::time::sleep_until(at.into()).await,
            None => std::future::pending().await,
        }
    }

    /// Bytes that one of its streams may have buffered in each direction.
    pub(crate) fn buffer_limit(&self) -> u32 {
        let own = self.worker.options.buffer_limit;
        self.listener.model.buffer_limit.filter(|l| *l > 0).map_or(own, |l| l.min(own))
    }

    /// The peer's IP address as text.
    pub(crate) fn peer_text(&self) -> &str {
        self.peer_text.get_or_init(|| self.peer.ip().to_string().into())
    }

    pub(crate) fn inbound(&self) -> bool {
        self.listener.model.direction == Direction::Inbound
    }

    pub(crate) fn outbound(&self) -> bool {
        self.listener.model.direction == Direction::Outbound
    }

    pub(crate) fn mtls(&self) -> bool {
        self.tls && self.identity.is_some()
    }

    /// Ready when the peer's certificate is revoked; never for one without.
    pub(crate) async fn revoked(&self) {
        revoked(&self.worker, self.identity.as_deref().map(|i| &i.ids)).await;
    }

    /// SPIFFE ID of the peer, or empty.
    pub(crate) fn principal(&self) -> &str {
        self.identity.as_ref().and_then(|i| i.spiffe.as_ref()).map_or("", |s| s.as_str())
    }

    /// Cluster of the peer, or empty.
    pub(crate) fn peer_cluster(&self) -> &str {
        self.identity.as_ref().and_then(|i| i.cluster.as_ref()).map_or("", |c| c.as_str())
    }

    /// What authorization looks at.
    pub(crate) fn facts<'a>(
        &'a self,
        remote: std::net::IpAddr,
        request: Option<&'a RequestHead>,
    ) -> Facts<'a> {
        Facts {
            local: self.local,
            peer: self.direct_peer.ip(),
            remote,
            sni: self.sni.as_deref(),
            principals: self.identity.as_ref().map_or(&[], |i| i.uri_sans.as_slice()),
            authenticated: self.identity.is_some(),
            cluster: self.identity.as_ref().and_then(|i| i.cluster.as_ref()).map(|c| c.as_str()),
            request,
            metadata: None,
        }
    }
}

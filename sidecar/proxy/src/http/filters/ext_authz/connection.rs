//! External authorization of connections (`envoy.filters.network.ext_authz`), before their first byte.

use std::{rc::Rc, sync::Arc};

use mesh_model::proxy as model;

use super::{MAX_ANSWER, TIMEOUT, Verdict, grpc};
use crate::{
    config::{CompileError, route::SlotOf},
    http::{
        client,
        metadata::{Metadata, MetadataMatcher},
    },
    upstream::cluster::ClusterSlot,
    worker::connection::Connection,
};

/// A compiled [`model::ConnectionAuthz`].
#[derive(Debug)]
pub(crate) struct ConnectionAuthz {
    config: model::ConnectionAuthz,
    cluster: Arc<ClusterSlot>,
    enabled: Option<MetadataMatcher>,
}

impl ConnectionAuthz {
    pub(crate) fn new(c: &model::ConnectionAuthz, slot: SlotOf<'_>) -> Result<Self, CompileError> {
        Ok(Self {
            cluster: slot(&c.service.cluster),
            enabled: c.enabled_metadata.as_ref().map(MetadataMatcher::new).transpose()?,
            config: c.clone(),
        })
    }

    /// Whether a connection of which this was found out is asked about.
    pub(crate) fn asks(&self, found: &Metadata) -> bool {
        self.enabled.as_ref().is_none_or(|m| m.matches(Some(found)))
    }

    /// `Err` is a denial, as text for the access log.
    pub(crate) async fn check(&self, conn: &Rc<Connection>, found: &Metadata) -> Result<(), &'static str> {
        if !self.asks(found) {
            return Ok(());
        }
        let c = &self.config;
        let message = grpc::connection_request(conn, c.include_tls_session);
        let limit = c.service.timeout.filter(|t| !t.is_zero()).unwrap_or(TIMEOUT);
        let verdict = match client::grpc(
            &conn.worker,
            &self.cluster,
            &c.service,
            grpc::CHECK,
            &message,
            limit,
            MAX_ANSWER,
        )
        .await
        {
            Ok(answer) => grpc::verdict(&answer),
            Err(e) => Verdict::Error(e),
        };
        match verdict {
            Verdict::Yes(_) => Ok(()),
            Verdict::No(_) => Err("ext_authz_denied"),
            Verdict::Error(error) => {
                tracing::debug!(%error, "no answer of the authoriser");
                if c.failure_mode_allow { Ok(()) } else { Err("ext_authz_error") }
            }
        }
    }
}

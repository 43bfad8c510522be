//! Admin pages of a proxy: what it executes, what it refused, who it is. Never a key.

use std::sync::Arc;

use axum::{Json, Router, extract::State, routing::get};
use mesh_identity::{SecretStore, TRUST_BUNDLE, WORKLOAD_SVID};
use mesh_proxy::{ApplyReport, Engine};
use mesh_xds::client::proxy::{ClientHealth, ProxyState};
use serde_json::{Value, json};
use tokio::sync::watch;

#[derive(Clone)]
pub(crate) struct AdminState {
    pub(crate) engine: Arc<Engine>,
    pub(crate) state: watch::Receiver<Arc<ProxyState>>,
    pub(crate) health: watch::Receiver<ClientHealth>,
    pub(crate) report: watch::Receiver<Arc<ApplyReport>>,
    pub(crate) identity: watch::Receiver<String>,
    pub(crate) store: Arc<SecretStore>,
}

pub(crate) fn router(state: AdminState) -> Router {
    Router::new()
        .route("/config_dump", get(config_dump))
        .route("/clusters", get(clusters))
        .route("/certs", get(certs))
        .with_state(state)
}

async fn config_dump(State(s): State<AdminState>) -> Json<Value> {
    let state = s.state.borrow().clone();
    let health = s.health.borrow().clone();
    let report = s.report.borrow().clone();
    let rejected: Vec<Value> =
        health
            .rejected
            .iter()
            .map(|((t, n), reason)| json!({"type": t, "name": n, "reason": reason}))
            .chain(report.rejected.iter().map(
                |(kind, name, reason)| json!({"type": kind.to_string(), "name": name, "reason": reason}),
            ))
            .collect();
    Json(json!({
        "connected": health.connected,
        "synced": health.synced,
        "fromCache": health.from_cache,
        "rejected": rejected,
        "listeners": state.listeners,
        "routes": state.routes,
        "clusters": state.clusters,
        "endpoints": state.endpoints,
    }))
}

async fn clusters(State(s): State<AdminState>) -> Json<Value> {
    Json(serde_json::to_value(s.engine.status()).unwrap_or(Value::Null))
}

async fn certs(State(s): State<AdminState>) -> Json<Value> {
    Json(json!({
        "hasCertificate": s.store.has_identity(WORKLOAD_SVID),
        "hasTrustBundle": s.store.has_trust(TRUST_BUNDLE),
        "trustGeneration": s.store.trust_generation(),
        "lastError": *s.identity.borrow(),
    }))
}

//! The small HTTP servers of a process: readiness, metrics, debug pages.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus_client::registry::Registry;
use tokio::{net::TcpListener, task::JoinHandle};

use crate::ready::Readiness;

/// `/ready` (200 or 503 with the parts waited for) and `/healthz/ready` for the same.
pub fn ready_router(readiness: Readiness) -> Router {
    async fn ready(State(r): State<Readiness>) -> Response {
        let pending = r.pending();
        if pending.is_empty() {
            (StatusCode::OK, "ready\n").into_response()
        } else {
            (StatusCode::SERVICE_UNAVAILABLE, format!("waiting for {}\n", pending.join(", "))).into_response()
        }
    }
    Router::new().route("/ready", get(ready)).route("/healthz/ready", get(ready)).with_state(readiness)
}

/// `/metrics` and `/stats/prometheus` in OpenMetrics text.
pub fn metrics_router(registry: Arc<Registry>) -> Router {
    async fn metrics(State(registry): State<Arc<Registry>>) -> Response {
        let mut text = String::new();
        match prometheus_client::encoding::text::encode(&mut text, &registry) {
            Ok(()) => {
                ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
                    .into_response()
            }
            Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        }
    }
    Router::new()
        .route("/metrics", get(metrics))
        .route("/stats/prometheus", get(metrics))
        .with_state(registry)
}

/// Serves `router` on `address`; the task ends with the process or when aborted.
///
/// # Errors
/// If the address cannot be bound.
pub async fn serve(address: SocketAddr, router: Router) -> std::io::Result<(SocketAddr, JoinHandle<()>)> {
    serve_on(TcpListener::bind(address).await?, router)
}

/// The same at a socket that listens already.
///
/// # Errors
/// If it is none.
pub fn serve_on(listener: TcpListener, router: Router) -> std::io::Result<(SocketAddr, JoinHandle<()>)> {
    let bound = listener.local_addr()?;
    let task = tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, %bound, "admin server ended");
        }
    });
    Ok((bound, task))
}

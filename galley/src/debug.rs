//! What operators can look at.
//!
//! - `/debug/config_errors`: JSON array of the verdicts with errors or warnings, in the form of
//!   `flotilla validate -o json`.
//! - `/debug/configz`: JSON array of every document that applies, with `stale: true` where the file
//!   has a newer, invalid version. Values of secrets are not shown.

use std::sync::Arc;

use axum::{Json, Router, extract::State, routing::get};
use serde_json::{Value, json};

use crate::{galley::Shared, report::DocumentReport, store::shown};

pub(crate) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/debug/config_errors", get(config_errors))
        .route("/debug/configz", get(configz))
        .with_state(shared)
}

async fn config_errors(State(shared): State<Arc<Shared>>) -> Json<Vec<DocumentReport>> {
    let status = shared.status.borrow().clone();
    Json(status.reports.iter().filter(|r| !r.valid || !r.warnings.is_empty()).cloned().collect())
}

async fn configz(State(shared): State<Arc<Shared>>) -> Json<Vec<Value>> {
    let status = shared.status.borrow().clone();
    let documents = shared.documents.snapshot();
    let shown = documents.iter().map(|(key, d)| {
        json!({
            "apiVersion": d.api_version,
            "kind": key.kind.name(),
            "metadata": {
                "name": d.metadata.name,
                "namespace": d.metadata.namespace,
                "labels": d.metadata.labels,
                "creationTimestamp": d.metadata.creation_timestamp,
            },
            "stale": status.stale.contains(key),
            "spec": shown(&d.spec),
        })
    });
    Json(shown.collect())
}

//! What operators can look at.
//!
//! - `/debug/config_errors`: JSON array of the verdicts with errors or warnings, in the form of
//!   `flotilla validate -o json`.
//! - `/debug/analysis`: JSON array of findings, in the form of `flotilla analyze -o json`. Made when it is asked for.
//! - `/debug/configz`: JSON array of every document that applies, with `stale: true` where the file
//!   has a newer, invalid version. Values of secrets are not shown.

use std::sync::Arc;

use axum::{Json, Router, extract::State, http::StatusCode, routing::get};
use serde_json::{Value, json};

use crate::{
    analyze::{AnalyzeOptions, Message, analyze},
    galley::Shared,
    report::DocumentReport,
    store::shown,
};

pub(crate) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/debug/config_errors", get(config_errors))
        .route("/debug/analysis", get(analysis))
        .route("/debug/configz", get(configz))
        .with_state(shared)
}

async fn config_errors(State(shared): State<Arc<Shared>>) -> Json<Vec<DocumentReport>> {
    let status = shared.status.borrow().clone();
    let told = status.reports.iter().filter(|r| !r.valid || !r.warnings.is_empty());
    Json(told.map(|r| (**r).clone()).collect())
}

/// On the blocking pool: thousands of documents take a while.
async fn analysis(State(shared): State<Arc<Shared>>) -> Result<Json<Vec<Message>>, StatusCode> {
    let read = shared.read.borrow().clone();
    let options = AnalyzeOptions { known_hosts: (*read.hosts).clone(), ..AnalyzeOptions::default() };
    tokio::task::spawn_blocking(move || analyze(&read.parsed, &options))
        .await
        .map(Json)
        .map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Galley, GalleyOptions};

    #[tokio::test]
    async fn the_analysis_is_of_what_was_read_last() {
        let tmp = tempfile::tempdir().unwrap();
        let route = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: v}\nspec: {hosts: [a], http: [{route: [{destination: {host: a}}]}]}\n";
        std::fs::write(tmp.path().join("a.yaml"), route).unwrap();
        let mut options = GalleyOptions::new(vec![tmp.path().to_owned()], None);
        let (hosts, watched) = tokio::sync::watch::channel(Arc::default());
        options.extra_hosts = Some(watched);
        options.poll = std::time::Duration::from_millis(20);
        let galley = Galley::start(options).await.unwrap();
        let Json(messages) = analysis(State(galley.shared.clone())).await.unwrap();
        assert_eq!(messages.iter().map(|m| m.code).collect::<Vec<_>>(), ["IST0101"]);

        // A peer provides the host from now on.
        hosts.send_replace(Arc::new(["a.default.svc.cluster.local".to_owned()].into()));
        let settled = async {
            loop {
                let Json(messages) = analysis(State(galley.shared.clone())).await.unwrap();
                if messages.is_empty() {
                    return;
                }
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(10), settled).await.unwrap();
        galley.stop().await;
    }
}

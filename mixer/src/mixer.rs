//! The running component.

use std::{
    fmt::Write as _,
    io,
    sync::{Arc, atomic::Ordering},
};

use arc_swap::ArcSwap;
use axum::{Json, Router, extract::State, http::header, routing::get};
use mesh_model::authored::{Kind, Spec};
use mesh_telemetry::proto::mixer_v1::mixer_server::MixerServer;
use mesh_xds::{
    Endpoint, NodeInfo,
    mcp::{ConfigClient, ConfigState},
};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    adapters::{Handler, LogSink},
    config::{Config, ConfigError, KINDS, Object},
    server::{MixerApi, Shared},
};

/// Largest request: a batch of reports with long headers.
const MAX_MESSAGE: usize = 4 << 20;

/// What a mixer needs to know.
#[derive(Debug, Clone)]
pub struct MixerOptions {
    /// Where configuration comes from.
    pub galley: Endpoint,
    /// Namespace whose rules apply to every request.
    pub default_namespace: String,
}

impl MixerOptions {
    /// Options with the usual default namespace.
    #[must_use]
    pub fn new(galley: Endpoint) -> Self {
        Self { galley, default_namespace: "istio-system".into() }
    }
}

/// What is configured, and what is not and why.
#[derive(Debug, Clone, Default)]
pub struct Status {
    /// Whether configuration was received at all.
    pub synced: bool,
    /// Rules that apply.
    pub rules: usize,
    /// Handlers that are configured.
    pub handlers: usize,
    /// Objects that are left out.
    pub errors: Vec<ConfigError>,
}

/// The policy and telemetry hub.
#[derive(Debug)]
pub struct Mixer;

/// A running mixer. Dropping it stops it.
pub struct MixerHandle {
    shared: Arc<Shared>,
    sink: LogSink,
    status: watch::Receiver<Arc<Status>>,
    _stop: DropGuard,
}

/// The gRPC service of Check and Report, to be added to a tonic server.
pub type MixerService = MixerServer<MixerApi>;

impl Mixer {
    /// Starts following the configuration. Requests are answered at once, without rules (so
    /// everything is allowed) until configuration arrives; use [`MixerHandle::status`] for
    /// readiness.
    ///
    /// # Errors
    /// If the thread that writes logs cannot be started.
    pub fn start(options: MixerOptions) -> io::Result<MixerHandle> {
        let sink = LogSink::start(Box::new(io::stdout()), Box::new(io::stderr()))?;
        let shared = Arc::new(Shared {
            config: ArcSwap::default(),
            default_namespace: options.default_namespace,
            checks: 0.into(),
            denials: 0.into(),
            reports: 0.into(),
            invalid: 0.into(),
        });
        let types: Vec<&str> = KINDS.iter().map(|k| k.type_url()).collect();
        let client = ConfigClient::start(options.galley, NodeInfo::component("mixer"), &types);
        let (status_tx, status) = watch::channel(Arc::default());
        let stop = CancellationToken::new();
        let task = follow(client, shared.clone(), sink.clone(), status_tx);
        let token = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = token.cancelled() => {}
                () = task => {}
            }
        });
        Ok(MixerHandle { shared, sink, status, _stop: stop.drop_guard() })
    }
}

async fn follow(
    client: ConfigClient,
    shared: Arc<Shared>,
    sink: LogSink,
    status: watch::Sender<Arc<Status>>,
) {
    let mut state = client.watch();
    loop {
        let now = state.borrow_and_update().clone();
        if now.synced {
            let (objects, mut errors) = objects(&now);
            let old = shared.config.load_full();
            let mut config = Config::build(&objects, &old, &sink);
            errors.append(&mut config.errors);
            for e in &errors {
                if !status.borrow().errors.contains(e) {
                    tracing::warn!(object = %e.object, "configuration left out: {}", e.message);
                }
            }
            let rules = config.rules.values().map(Vec::len).sum();
            let handlers = config.handlers.len();
            shared.config.store(Arc::new(config));
            status.send_replace(Arc::new(Status { synced: true, rules, handlers, errors }));
        }
        if state.changed().await.is_err() {
            tracing::error!("the configuration is no longer followed");
            return;
        }
    }
}

/// Documents of all kinds, typed; in the order of kinds and names, so that the outcome does not
/// depend on when they arrived.
fn objects(state: &ConfigState) -> (Vec<Object>, Vec<ConfigError>) {
    let mut out = Vec::new();
    let mut errors = Vec::new();
    for kind in KINDS {
        for (_, d) in state.of(kind.type_url()) {
            let (namespace, name) = d.namespaced_name();
            match Spec::from_json(*kind, d.body.clone()) {
                Ok(spec) => out.push(Object { namespace: namespace.into(), name: name.into(), spec }),
                Err(e) => errors.push(ConfigError {
                    object: format!("{} {}", Kind::name(*kind), d.name),
                    message: e.to_string(),
                }),
            }
        }
    }
    (out, errors)
}

impl MixerHandle {
    /// The gRPC service.
    #[must_use]
    pub fn service(&self) -> MixerService {
        MixerServer::new(MixerApi(self.shared.clone())).max_decoding_message_size(MAX_MESSAGE)
    }

    /// What is configured.
    #[must_use]
    pub fn status(&self) -> Arc<Status> {
        self.status.borrow().clone()
    }

    /// What is configured, as it changes.
    #[must_use]
    pub fn watch_status(&self) -> watch::Receiver<Arc<Status>> {
        self.status.clone()
    }

    /// `/metrics`: what Prometheus handlers collect, and mixer's own counts, in OpenMetrics text.
    /// `/debug/config_errors`: JSON array of objects that are left out.
    pub fn metrics_router(&self) -> Router {
        let state =
            Exposed { shared: self.shared.clone(), sink: self.sink.clone(), status: self.status.clone() };
        Router::new()
            .route("/metrics", get(metrics))
            .route("/debug/config_errors", get(config_errors))
            .with_state(state)
    }

    /// The text of `/metrics` without the closing line, for a server that shows more.
    #[must_use]
    pub fn metrics_text(&self) -> String {
        text(&self.shared, &self.sink, self.status.borrow().errors.len())
    }
}

#[derive(Clone)]
struct Exposed {
    shared: Arc<Shared>,
    sink: LogSink,
    status: watch::Receiver<Arc<Status>>,
}

async fn metrics(State(s): State<Exposed>) -> ([(header::HeaderName, &'static str); 1], String) {
    let errors = s.status.borrow().errors.len();
    let body = text(&s.shared, &s.sink, errors) + "# EOF\n";
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], body)
}

async fn config_errors(State(s): State<Exposed>) -> Json<Vec<ConfigError>> {
    let status = s.status.borrow().clone();
    Json(status.errors.clone())
}

fn text(shared: &Shared, sink: &LogSink, errors: usize) -> String {
    let config = shared.config.load();
    let mut out = String::new();
    let mut dropped = 0;
    for h in config.handlers.values() {
        if let Handler::Prometheus(p) = &*h.handler {
            out.push_str(&p.encode());
            dropped += p.dropped();
        }
    }
    let _ = writeln!(
        out,
        "# HELP mixer_config_errors Objects of configuration that are left out.\n\
         # TYPE mixer_config_errors gauge\n\
         mixer_config_errors {errors}"
    );
    for (name, help, value) in [
        ("mixer_checks", "Check requests.", shared.checks.load(Ordering::Relaxed)),
        ("mixer_denials", "Check requests that were denied.", shared.denials.load(Ordering::Relaxed)),
        ("mixer_reports", "Reports taken.", shared.reports.load(Ordering::Relaxed)),
        (
            "mixer_invalid_requests",
            "Requests that could not be decoded.",
            shared.invalid.load(Ordering::Relaxed),
        ),
        ("mixer_stdio_dropped", "Log lines that were dropped.", sink.dropped()),
        ("mixer_prometheus_series_dropped", "Values of label sets beyond the limit.", dropped),
    ] {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} counter\n{name}_total {value}");
    }
    out
}

//! Serving the bundle of the own trust domain, for whoever asks.
//!
//! What is served is public. Askers are strangers: how many connections there are at a time, how long each may last and
//! how much is read of a request are limited, and nothing is done for one but to copy a text.

use std::{convert::Infallible, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt as _;
use http_body_util::Full;
use hyper::{Method, Request, Response, StatusCode, body::Incoming, header, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_identity::{IdentityError, SecretStore, TrustBundle, WORKLOAD_SVID};
use mesh_model::{
    TrustDomain,
    proxy::{ClientCertificate, DownstreamTls, SecretRef, TlsServerOptions, TlsVersion},
};
use mesh_xds::server::conn;
use tokio::{net::TcpListener, sync::Semaphore, task::JoinHandle};

use super::BundleEndpoints;
use crate::{StartError, state::Shared};

/// Name of the certificate from files in its store.
const WEB: &str = "bundle-endpoint";
/// Connections at a time, each for as long at most.
const MAX_CONNECTIONS: usize = 256;
const LIFETIME: Duration = Duration::from_secs(30);
const HEAD: Duration = Duration::from_secs(5);
/// How often the files are looked at.
const RENEWAL: Duration = Duration::from_secs(10);

/// Serves what is asked for, until the tasks are aborted.
pub(crate) async fn serve(
    endpoints: &BundleEndpoints,
    shared: &Arc<Shared>,
) -> Result<Vec<JoinHandle<()>>, StartError> {
    let mut tasks = Vec::new();
    let tls = |store: &SecretStore, name: &str| {
        store.server_config(&DownstreamTls {
            certificate: SecretRef::Sds(name.into()),
            client_certificate: ClientCertificate::None,
            alpn: vec!["http/1.1".into()],
            // What the specification asks for is Mozilla's intermediate configuration.
            min_version: TlsVersion::V1_2,
            options: TlsServerOptions::default(),
        })
    };
    let io = |what: String| move |source| StartError::Io { what, source };
    if let Some(address) = endpoints.spiffe {
        let listener =
            TcpListener::bind(address).await.map_err(io(format!("--bundle-endpoint {address}")))?;
        tasks.push(tokio::spawn(listen(listener, tls(&shared.secrets, WORKLOAD_SVID)?, shared.clone())));
    }
    if let Some((address, chain, key)) = &endpoints.web {
        let listener =
            TcpListener::bind(address).await.map_err(io(format!("--bundle-endpoint-web {address}")))?;
        let store = SecretStore::new();
        let mut files = Files { chain: chain.clone(), key: key.clone(), held: None };
        files.read(&store)?;
        tasks.push(tokio::spawn(listen(listener, tls(&store, WEB)?, shared.clone())));
        tasks.push(tokio::spawn(async move {
            let mut failed = String::new();
            loop {
                tokio::time::sleep(RENEWAL).await;
                let now = files.read(&store).err().map_or_else(String::new, |e| e.to_string());
                if now != failed && !now.is_empty() {
                    tracing::error!(error = %now, "the certificate of the bundle endpoint was not renewed");
                }
                failed = now;
            }
        }));
    }
    Ok(tasks)
}

/// A certificate that somebody else renews.
struct Files {
    chain: PathBuf,
    key: PathBuf,
    held: Option<(Vec<u8>, Vec<u8>)>,
}

impl Files {
    fn read(&mut self, store: &SecretStore) -> Result<(), IdentityError> {
        let read = |p: &PathBuf| {
            std::fs::read(p).map_err(|source| IdentityError::File { path: p.display().to_string(), source })
        };
        let now = (read(&self.chain)?, read(&self.key)?);
        if self.held.as_ref() != Some(&now) {
            store.set_identity(WEB, &now.0, &now.1)?;
            self.held = Some(now);
        }
        Ok(())
    }
}

async fn listen(listener: TcpListener, tls: Arc<rustls::ServerConfig>, shared: Arc<Shared>) {
    let mut connections = std::pin::pin!(conn::tls(listener, tls, None));
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));

    loop {
        // The semaphore is never closed.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let Some(Ok(stream)) = connections.next().await else { return };
        let shared = shared.clone();
        tokio::spawn(async move {
            let service = service_fn(|r| std::future::ready(Ok::<_, Infallible>(answer(&shared, &r))));
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .max_buf_size(16 * 1024)
                .serve_connection(TokioIo::new(stream), service);
            // What becomes of a stranger's connection is nobody's concern.
            let _ = tokio::time::timeout(LIFETIME, served).await;
            drop(place);
        });
    }
}

fn answer(shared: &Shared, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let (status, kind, text) = if request.uri().path() != "/" {
        (StatusCode::NOT_FOUND, "text/plain", "the bundle is at /\n".to_owned())
    } else if ![Method::GET, Method::HEAD].contains(request.method()) {
        (StatusCode::METHOD_NOT_ALLOWED, "text/plain", "only GET\n".to_owned())
    } else {
        match document(shared) {
            Some(d) => (StatusCode::OK, "application/json", d),
            None => (StatusCode::SERVICE_UNAVAILABLE, "text/plain", "in no mesh\n".to_owned()),
        }
    };
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-cache"));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(header::ALLOW, header::HeaderValue::from_static("GET, HEAD"));
    }
    response
}

/// The bundle as the CA of this process has it: while the root is replaced, both roots.
fn document(shared: &Shared) -> Option<String> {
    let t = shared.lock();
    let a = t.authority.as_ref()?;
    let domain = TrustDomain::new(&a.trust_domain).ok()?;
    let hint = Some(shared.options.refresh_hint);
    let bundle = TrustBundle::from_pem(domain, a.bundle.as_bytes(), a.bundle_sequence, hint);
    bundle
        .inspect_err(|error| tracing::error!(%error, "the own bundle is not served"))
        .ok()
        .map(|b| b.document())
}

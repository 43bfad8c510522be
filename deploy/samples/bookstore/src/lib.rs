//! A bookstore of four services, small enough to read and telling enough to watch a mesh with.
//!
//! `storefront` asks `catalog` for the books and `reviews` for what readers say; `reviews` v2 and v3
//! ask `ratings`. Every answer says which workload, version and cluster served it and which caller
//! its sidecar verified (`x-forwarded-client-cert`), and carries the answers it was made from, so a
//! page shows the whole path of a request.

mod call;
mod page;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use serde::{Deserialize, Serialize};

use call::{Client, Outcome};

/// Which service to be, and as whom.
#[derive(Debug, Clone, clap::Parser)]
#[command(about = "The sample bookstore: one of four services", disable_version_flag = true)]
pub struct Args {
    /// Service to be.
    #[arg(long, value_enum)]
    pub role: Role,
    /// Address to serve HTTP on.
    #[arg(long)]
    pub listen: SocketAddr,
    /// Version shown in answers; reviews v2 and v3 ask ratings, with black and red stars.
    #[arg(long, default_value = "v1")]
    pub version: String,
    /// Cluster shown in answers.
    #[arg(long, default_value = "local")]
    pub cluster: String,
    /// Namespace of the other services.
    #[arg(long, default_value = "bookstore")]
    pub namespace: String,
    /// HTTP proxy for calls to other services (the sidecar, where traffic is not intercepted).
    #[arg(long, env = "HTTP_PROXY")]
    pub http_proxy: Option<String>,
    /// Port of the other services.
    #[arg(long, default_value_t = 9080)]
    pub port: u16,
}

/// The four services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// The page.
    Storefront,
    /// The books.
    Catalog,
    /// What readers say.
    Reviews,
    /// Stars.
    Ratings,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Storefront => "storefront",
            Self::Catalog => "catalog",
            Self::Reviews => "reviews",
            Self::Ratings => "ratings",
        }
    }
}

/// Who served an answer and for whom.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Served {
    /// Service.
    pub service: String,
    /// Version.
    pub version: String,
    /// Cluster.
    pub cluster: String,
    /// SPIFFE ID of the caller as verified by the sidecar; empty without mTLS.
    pub caller: String,
    /// The content.
    pub data: serde_json::Value,
    /// Answers that this one was made from, or why there is none.
    pub calls: Vec<Outcome>,
}

struct App {
    args: Args,
    client: Client,
}

/// Titles on sale.
const BOOKS: [(u32, &str, &str); 3] = [
    (1, "The Comedy of Errors", "William Shakespeare"),
    (2, "Twenty Thousand Leagues Under the Seas", "Jules Verne"),
    (3, "Moby-Dick", "Herman Melville"),
];

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// If the address cannot be bound.
pub async fn run(args: Args) -> anyhow::Result<()> {
    use anyhow::Context;
    let listener = tokio::net::TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("listen on {}", args.listen))?;
    let client = Client::new(args.http_proxy.as_deref(), &args.namespace, args.port)?;
    let app = Arc::new(App { args, client });
    let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((s, _)) => s,
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
            _ = term.recv() => return Ok(()),
            _ = tokio::signal::ctrl_c() => return Ok(()),
        };
        let app = app.clone();
        tokio::spawn(async move {
            let service = service_fn(move |r| {
                let app = app.clone();
                async move { Ok::<_, std::convert::Infallible>(app.answer(r).await) }
            });
            let mut server = auto::Builder::new(TokioExecutor::new());
            server.http1().timer(TokioTimer::new());
            // A client that goes away is its own business.
            let _ = server.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

impl App {
    async fn answer(&self, r: Request<Incoming>) -> Response<Full<Bytes>> {
        if r.method() != Method::GET && r.method() != Method::HEAD {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
        }
        let path = r.uri().path().to_owned();
        let headers = r.headers();
        match (self.args.role, path.as_str()) {
            (_, "/healthz") => text(StatusCode::OK, "ok\n"),
            (Role::Storefront, "/") => {
                let served = self.storefront(headers).await;
                respond(StatusCode::OK, "text/html; charset=utf-8", page::render(&served))
            }
            (Role::Storefront, "/api/page") => json(&self.storefront(headers).await),
            (Role::Catalog, "/books") => json(&self.served(headers, books(), vec![])),
            (Role::Reviews, p) if p.starts_with("/reviews") => json(&self.reviews(headers).await),
            (Role::Ratings, p) if p.starts_with("/ratings") => {
                json(&self.served(headers, serde_json::json!({"1": 5, "2": 4, "3": 3}), vec![]))
            }
            _ => text(StatusCode::NOT_FOUND, "no such page\n"),
        }
    }

    fn served(&self, headers: &HeaderMap, data: serde_json::Value, calls: Vec<Outcome>) -> Served {
        Served {
            service: self.args.role.name().into(),
            version: self.args.version.clone(),
            cluster: self.args.cluster.clone(),
            caller: caller(headers),
            data,
            calls,
        }
    }

    async fn storefront(&self, headers: &HeaderMap) -> Served {
        let (catalog, reviews) = tokio::join!(
            self.client.get("catalog", "/books", headers),
            self.client.get("reviews", "/reviews", headers),
        );
        self.served(headers, serde_json::Value::Null, vec![catalog, reviews])
    }

    async fn reviews(&self, headers: &HeaderMap) -> Served {
        let stars = match self.args.version.as_str() {
            "v2" => Some("black"),
            "v3" => Some("red"),
            _ => None,
        };
        let calls = match stars {
            Some(_) => vec![self.client.get("ratings", "/ratings", headers).await],
            None => vec![],
        };
        let data = serde_json::json!({
            "stars": stars,
            "texts": {
                "1": "Two pairs of twins, and not one of them knows which cluster answered.",
                "2": "Deep, dark and well encrypted.",
                "3": "A long pursuit across the sea. The failover took three seconds.",
            },
        });
        self.served(headers, data, calls)
    }
}

/// The URI of the last element of `x-forwarded-client-cert`: the caller of this hop.
fn caller(headers: &HeaderMap) -> String {
    let value = headers.get("x-forwarded-client-cert").and_then(|v| v.to_str().ok()).unwrap_or_default();
    let last = value.rsplit(',').next().unwrap_or_default();
    last.split(';').find_map(|p| p.trim().strip_prefix("URI=")).unwrap_or_default().to_owned()
}

fn books() -> serde_json::Value {
    BOOKS
        .iter()
        .map(|(id, title, author)| serde_json::json!({"id": id, "title": title, "author": author}))
        .collect()
}

fn respond(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut r = Response::new(Full::new(Bytes::from(body)));
    *r.status_mut() = status;
    r.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    r
}

fn text(status: StatusCode, body: &str) -> Response<Full<Bytes>> {
    respond(status, "text/plain; charset=utf-8", body.to_owned())
}

fn json<T: Serialize>(value: &T) -> Response<Full<Bytes>> {
    match serde_json::to_string_pretty(value) {
        Ok(s) => respond(StatusCode::OK, "application/json", s + "\n"),
        Err(e) => text(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_caller_is_the_last_hops() {
        let mut h = HeaderMap::new();
        assert_eq!(caller(&h), "");
        let value = "By=spiffe://m/ns/b/sa/x;Hash=ab;Subject=\"\";URI=spiffe://m/ns/b/sa/first,\
                     By=spiffe://m/ns/b/sa/y;Hash=cd;URI=spiffe://m/ns/b/sa/last";
        h.insert("x-forwarded-client-cert", value.parse().unwrap());
        assert_eq!(caller(&h), "spiffe://m/ns/b/sa/last");
    }
}

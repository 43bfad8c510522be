//! Pages for operators and the command line. All are read-only JSON.
//!
//! | path | content |
//! |---|---|
//! | `/ready` | 200 once configuration has been read |
//! | `/debug/syncz` | per proxy and type: versions sent and acknowledged, `SYNCED`, `STALE` or `NACKED` with the reason |
//! | `/debug/config_dump?proxyID=<name>.<namespace>` | listeners, routes, clusters and endpoints of a proxy as the control plane sees them |
//! | `/debug/registryz` | services |
//! | `/debug/endpointz` | endpoints of every service, imports included |
//! | `/debug/configz` | documents read, by kind |
//! | `/debug/gatewayz` | `status` of the Gateway API's documents ([`gateway_api::status`]) |
//! | `/debug/ingressz` | `status` of Ingresses ([`ingress::status`]) |
//! | `/debug/explain` (POST, [`ExplainQuery`]) | the way from a proxy to a host, as far as this cluster knows it |
//! | `/debug/inspect` (POST, [`InspectQuery`]) | an exported service as a peer's caller meets it |
//! | `/debug/links` | what east-west gateways told lately of the ways to other clusters ([`GatewayLinks`]) |
//! | `/debug/trust` | how many proxies trust the own roots and show a certificate under the intermediate ([`TrustStatus`]) |
//! | `/debug/consulz` | Consul's agents and how following them goes ([`AgentStatus`]) |
//! | `/debug/problems` | what in the configuration cannot be done as written |

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError},
};

use axum::{
    Json, Router,
    extract::{Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use mesh_model::explain::{Step, Way};
use mesh_xds::{AdsService, NodeInfo, type_url};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::{
    config::Doc,
    consul::{AgentStatus, FROM_CONSUL},
    gateway_api::{
        self,
        status::{GatewayProxy, Status},
    },
    generate::explain::{self, Ask, Request},
    ingress,
    links::{GatewayLinks, Links},
    proxy::ProxyNode,
    run::Shared,
    source::PilotSource,
    trust::{Trust, TrustStatus},
    workloads::{WorkloadStatus, Workloads},
};

#[derive(Clone)]
struct Pages {
    service: AdsService<PilotSource>,
    ready: watch::Receiver<bool>,
    shared: Arc<Shared>,
    links: Arc<Links>,
    trust: Arc<Trust>,
    workloads: Arc<Workloads>,
}

pub(crate) fn router(
    service: AdsService<PilotSource>,
    ready: watch::Receiver<bool>,
    shared: Arc<Shared>,
    links: Arc<Links>,
    trust: Arc<Trust>,
    workloads: Arc<Workloads>,
) -> Router {
    Router::new()
        .route("/ready", get(is_ready))
        .route("/debug/syncz", get(syncz))
        .route("/debug/config_dump", get(config_dump))
        .route("/debug/registryz", get(registryz))
        .route("/debug/endpointz", get(endpointz))
        .route("/debug/configz", get(configz))
        .route("/debug/gatewayz", get(gatewayz))
        .route("/debug/ingressz", get(ingressz))
        .route("/debug/links", get(links_page))
        .route("/debug/trust", get(trusting))
        .route("/debug/workloadz", get(registered))
        .route("/debug/consulz", get(consulz))
        .route("/debug/problems", get(problems))
        .route("/debug/explain", post(explain_way))
        .route("/debug/inspect", post(inspect))
        .with_state(Pages { service, ready, shared, links, trust, workloads })
}

async fn is_ready(State(p): State<Pages>) -> Response {
    if *p.ready.borrow() {
        (StatusCode::OK, "ready\n").into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "configuration has not been read yet\n").into_response()
    }
}

/// A proxy in `/debug/syncz`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SyncStatus {
    /// `name.namespace`.
    pub proxy: String,
    /// Whole node ID.
    pub node: String,
    /// Cluster, from the node's metadata.
    pub cluster_id: String,
    /// `flotilla`, `envoy` ...
    pub user_agent: String,
    /// Seconds since its stream opened.
    pub connected_seconds: u64,
    /// It gets virtual hosts and clusters only if it asks for them.
    #[serde(default)]
    pub on_demand: bool,
    /// By short type name, such as `CDS`.
    pub types: BTreeMap<String, TypeSync>,
}

/// One type of a proxy in `/debug/syncz`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TypeSync {
    /// `SYNCED`, `STALE` or `NACKED`.
    pub status: String,
    /// Version last sent.
    pub sent: String,
    /// Version last acknowledged.
    pub acked: String,
    /// Names that it asked for; by none it has all that there is unasked.
    #[serde(default)]
    pub subscribed: usize,
    /// Why the last one was rejected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

fn proxy_name(n: &NodeInfo) -> String {
    format!("{}.{}", n.name, n.namespace)
}

async fn syncz(State(p): State<Pages>) -> Json<Vec<SyncStatus>> {
    let clients = p.service.status().clients();
    let list = clients.into_iter().map(|c| SyncStatus {
        proxy: proxy_name(&c.node),
        cluster_id: c.node.meta("CLUSTER_ID").unwrap_or_default().to_owned(),
        user_agent: c.node.user_agent.clone(),
        // An agent that fetches secrets and bundles asks for nothing.
        on_demand: c.types.contains_key(type_url::CDS) && p.service.source().is_on_demand(&c.node),
        connected_seconds: c.connected.elapsed().map_or(0, |d| d.as_secs()),
        node: c.node.id,
        types: c
            .types
            .into_iter()
            .map(|(t, s)| {
                let sync = TypeSync {
                    status: s.state().to_owned(),
                    sent: s.sent_version,
                    acked: s.acked_version,
                    subscribed: s.subscribed,
                    error: s.error,
                };
                (type_url::short(&t).to_owned(), sync)
            })
            .collect(),
    });
    Json(list.collect())
}

#[derive(Deserialize)]
struct ProxyQuery {
    #[serde(rename = "proxyID")]
    proxy: Option<String>,
}

async fn config_dump(State(p): State<Pages>, Query(q): Query<ProxyQuery>) -> Response {
    let Some(wanted) = q.proxy else {
        return (StatusCode::BAD_REQUEST, "proxyID=<name>.<namespace> is needed\n").into_response();
    };
    let source = p.service.source().clone();
    let node = source.nodes().into_iter().find(|n| n.id == wanted || proxy_name(n) == wanted);
    let Some(node) = node else {
        return (StatusCode::NOT_FOUND, format!("no connected proxy {wanted:?}\n")).into_response();
    };
    // Generating takes milliseconds in a large mesh; not on the threads that serve streams.
    let made =
        tokio::task::spawn_blocking(move || (source.is_on_demand(&node), source.configuration(&node))).await;
    match made {
        Ok((on_demand, Ok(mut g))) => Json(json!({
            "onDemand": on_demand,
            "patched": g.show_patched(),
            "listeners": g.listeners.values().collect::<Vec<_>>(),
            "routes": g.routes.values().collect::<Vec<_>>(),
            "clusters": g.clusters.values().collect::<Vec<_>>(),
            "endpoints": g.endpoints.values().collect::<Vec<_>>(),
        }))
        .into_response(),
        Ok((_, Err(e))) => (StatusCode::BAD_REQUEST, format!("{e}\n")).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn registryz(State(p): State<Pages>) -> Json<Value> {
    let world = p.service.source().world();
    let list = world.iter().flat_map(|w| w.index.services.values()).map(|e| {
        json!({
            "service": e.service,
            "origin": format!("{:?}", e.origin),
            "aliases": e.aliases,
            "assignedAddress": e.assigned_vip,
            "identities": e.identities,
            "exported": e.exported,
            "importedFrom": e.imports.iter().map(|i| i.cluster.to_string()).collect::<Vec<_>>(),
        })
    });
    Json(list.collect())
}

async fn endpointz(State(p): State<Pages>) -> Json<Value> {
    let world = p.service.source().world();
    let list = world
        .iter()
        .flat_map(|w| w.index.services.values())
        .map(|e| json!({ "host": e.service.host, "endpoints": e.endpoints, "imports": e.imports }));
    Json(list.collect())
}

async fn configz(State(p): State<Pages>) -> Json<Value> {
    fn list<T: Serialize>(docs: &[Doc<T>]) -> Value {
        docs.iter().map(|d| json!({"name": d.name, "namespace": d.namespace, "spec": &*d.spec})).collect()
    }
    let Some(w) = p.service.source().world() else { return Json(json!({})) };
    let c = &w.config;
    let (instances, workloads): (Vec<_>, Vec<_>) =
        c.workload_entries.iter().cloned().partition(|w| w.annotations.contains_key(FROM_CONSUL));
    Json(json!({
        "Service": list(&c.services),
        "WorkloadEntry": list(&workloads),
        "ConsulInstance": list(&instances),
        "ServiceEntry": list(&c.service_entries),
        "VirtualService": list(&c.virtual_services),
        "DestinationRule": list(&c.destination_rules),
        "Gateway": list(&c.gateways),
        "Sidecar": list(&c.sidecars),
        "EnvoyFilter": c.envoy_filters.iter().map(|d| json!({"name": d.name, "namespace": d.namespace, "spec": d.spec.authored()})).collect::<Vec<_>>(),
        "PeerAuthentication": list(&c.peer_authentications),
        "AuthorizationPolicy": list(&c.authorization_policies),
        "authentication.istio.io": json!({
            "Policy": list(&c.v1alpha1.policies),
            "MeshPolicy": list(&c.v1alpha1.mesh_policies),
        }),
        "rbac.istio.io": json!({
            "RbacConfig": list(&c.v1alpha1.rbac_configs),
            "ClusterRbacConfig": list(&c.v1alpha1.cluster_rbac_configs),
            "ServiceRole": list(&c.v1alpha1.roles),
            "ServiceRoleBinding": list(&c.v1alpha1.bindings),
        }),
        "ServiceExport": list(&c.service_exports),
        "gateway.networking.k8s.io": json!({
            "GatewayClass": list(&c.gateway_api.classes),
            "Gateway": list(&c.gateway_api.gateways),
            "HTTPRoute": list(&c.gateway_api.http),
            "GRPCRoute": list(&c.gateway_api.grpc),
            "TLSRoute": list(&c.gateway_api.tls),
            "TCPRoute": list(&c.gateway_api.tcp),
            "ReferenceGrant": list(&c.gateway_api.grants),
            "BackendTLSPolicy": list(&c.gateway_api.backend_tls),
        }),
        "networking.k8s.io": json!({
            "IngressClass": list(&c.ingress.classes),
            "Ingress": list(&c.ingress.ingresses),
        }),
        "MeshConfig": &*c.mesh,
        "ImportedService": c.imports,
        "PeerCluster": c.peers,
    }))
}

async fn gatewayz(State(p): State<Pages>) -> Json<Status> {
    let source = p.service.source();
    let Some(w) = source.world() else { return Json(Status::default()) };
    Json(gateway_api::status::status(&w.config, &connected(source)))
}

async fn ingressz(State(p): State<Pages>) -> Json<Vec<ingress::status::Object>> {
    let source = p.service.source();
    let Some(w) = source.world() else { return Json(vec![]) };
    Json(ingress::status::status(&w.config, &connected(source)))
}

/// Gateways at the edge that this control plane serves.
fn connected(source: &PilotSource) -> Vec<GatewayProxy> {
    let nodes = source.nodes();
    let routers = nodes.iter().filter(|n| n.kind == mesh_xds::NodeKind::Router && !n.is_east_west());
    let proxies = routers.filter_map(|n| ProxyNode::new(n).ok()).map(|p| GatewayProxy {
        addresses: p.addresses.iter().map(ToString::to_string).collect(),
        namespace: p.namespace,
        labels: p.labels,
    });
    proxies.collect()
}

async fn trusting(State(p): State<Pages>) -> Json<TrustStatus> {
    Json(p.trust.status(p.service.status().clients()))
}

async fn registered(State(p): State<Pages>) -> Json<Vec<WorkloadStatus>> {
    Json(p.workloads.all())
}

async fn links_page(State(p): State<Pages>) -> Json<Vec<GatewayLinks>> {
    Json(p.links.all())
}

async fn consulz(State(p): State<Pages>) -> Json<Vec<AgentStatus>> {
    Json(p.shared.consul.as_ref().map(|c| c.status()).unwrap_or_default())
}

async fn problems(State(p): State<Pages>) -> Json<Value> {
    let mut list = p.shared.problems.lock().unwrap_or_else(PoisonError::into_inner).clone();
    list.extend(p.service.source().problems());
    // What libraries without a proxy cannot do matters only where there are some.
    let (source, clients) = (p.service.source().clone(), p.service.status().clients());
    let found = tokio::task::spawn_blocking(move || {
        let mut all = source.grpc_problems(clients.iter().map(|c| &c.node));
        all.extend(source.on_demand_problems(clients.iter().map(|c| &c.node)));
        all.extend(source.mixer_problems(clients.iter().map(|c| &c.node)));
        all.extend(source.process_problems(clients.iter().map(|c| &c.node)));
        all
    })
    .await;
    list.extend(found.unwrap_or_default());
    list.sort();
    list.dedup();
    Json(json!(list))
}

/// Who calls whom, and with which request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExplainQuery {
    /// `name.namespace` of a connected proxy.
    pub from: String,
    /// Host with an optional port.
    pub to: String,
    /// Method.
    pub method: String,
    /// Path.
    pub path: String,
}

async fn explain_way(State(p): State<Pages>, Json(q): Json<ExplainQuery>) -> Response {
    let source = p.service.source().clone();
    let Some(world) = source.world() else {
        return (StatusCode::SERVICE_UNAVAILABLE, "starting\n").into_response();
    };
    let mut candidates = source.nodes().into_iter().filter(|n| n.kind == mesh_xds::NodeKind::Sidecar);
    let node = candidates.find(|n| n.id == q.from || proxy_name(n) == q.from);
    let Some(node) = node else {
        let all: Vec<_> = source.nodes().iter().map(proxy_name).collect();
        let known =
            world.config.workload_entries.iter().any(|w| format!("{}.{}", w.name, w.namespace) == q.from);
        let says = if known {
            format!("the proxy of {} is not connected to this control plane", q.from)
        } else {
            format!("no proxy is called {}", q.from)
        };
        let fix = if known {
            "start its proxy, or look at its log; it goes on with its last configuration".to_owned()
        } else {
            format!("connected are: {}", all.into_iter().take(8).collect::<Vec<_>>().join(", "))
        };
        let way = Way {
            steps: vec![Step::broken("proxy", says, fix)],
            principal: String::new(),
            host: q.to,
            local: false,
            targets: vec![],
        };
        return Json(way).into_response();
    };
    let mut first = sync_step(&p, &node);
    let made = tokio::task::spawn_blocking(move || {
        let proxy = ProxyNode::new(&node).map_err(|e| e.to_string())?;
        Ok::<_, String>(explain::outbound(&proxy, &world, &q.to, &Request { method: q.method, path: q.path }))
    })
    .await;
    match made {
        Ok(Ok(mut way)) => {
            first.append(&mut way.steps);
            way.steps = first;
            Json(way).into_response()
        }
        Ok(Err(e)) => (StatusCode::BAD_REQUEST, format!("{e}\n")).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// Whether the caller's proxy has taken what it was sent.
fn sync_step(p: &Pages, node: &NodeInfo) -> Vec<Step> {
    let name = proxy_name(node);
    let clients = p.service.status().clients();
    let refused = clients.iter().filter(|c| c.node.id == node.id).find_map(|c| {
        c.types.iter().find_map(|(t, s)| s.error.as_ref().map(|e| (type_url::short(t).to_owned(), e.clone())))
    });
    vec![match refused {
        Some((t, e)) => Step::warning(
            "proxy",
            format!("{name} refused a part of its {t}: {e}"),
            "it goes on with what it had; correct the configuration that the error names",
        ),
        None if p.service.source().is_on_demand(node) => Step::ok(
            "proxy",
            format!(
                "{name} is connected and has taken its configuration; routes and clusters it asks for with the first request"
            ),
        ),
        None => Step::ok("proxy", format!("{name} is connected and has taken its configuration")),
    }]
}

/// What a peer asks on behalf of one of its workloads.
#[derive(Debug, Clone, Deserialize)]
pub struct InspectQuery {
    #[serde(flatten)]
    ask: Ask,
    #[serde(flatten)]
    request: Request,
}

async fn inspect(State(p): State<Pages>, Json(q): Json<InspectQuery>) -> Response {
    let Some(world) = p.service.source().world() else {
        return (StatusCode::SERVICE_UNAVAILABLE, "starting\n").into_response();
    };
    Json(explain::inbound(&world, &q.ask, &q.request)).into_response()
}

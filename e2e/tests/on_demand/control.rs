//! A control plane that does what it is told, over real gRPC: incremental ADS alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{SocketAddr, TcpListener},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use envoy_types::pb::{
    envoy::service::discovery::v3::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
        aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
    },
    google::protobuf::Any,
};
use tokio::sync::{broadcast, mpsc};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// What a name that is subscribed gets.
#[derive(Clone)]
#[expect(clippy::large_enum_variant, reason = "a script has a handful")]
pub(crate) enum Answer {
    /// This, after a while.
    Resource(Resource, Duration),
    /// It does not exist: `removed_resources`.
    Absent,
    /// It does not exist: a resource that is nothing but aliases.
    Unresolved,
    /// Nothing at all.
    Silence,
}

#[derive(Default)]
pub(crate) struct World {
    /// What there is for whoever wants all, and what single names get; by type and name.
    all: BTreeMap<(String, String), Resource>,
    answers: BTreeMap<(String, String), Answer>,
    /// Names subscribed and given up, in order, by type.
    pub(crate) subscribed: Vec<(String, String)>,
    pub(crate) given_up: Vec<(String, String)>,
    pub(crate) refused: Vec<String>,
    nonce: u64,
}

#[derive(Clone)]
pub(crate) struct Control(Arc<Inner>);

struct Inner {
    world: Mutex<World>,
    pushes: broadcast::Sender<DeltaDiscoveryResponse>,
    stop: Mutex<CancellationToken>,
    address: SocketAddr,
}

fn short(type_url: &str) -> String {
    type_url.rsplit('.').next().unwrap_or_default().to_owned()
}

pub(crate) fn resource(name: &str, version: u32, any: mesh_xds::pb::Any) -> Resource {
    Resource {
        name: name.to_owned(),
        version: version.to_string(),
        resource: Some(Any { type_url: any.type_url, value: any.value.to_vec() }),
        ..Resource::default()
    }
}

fn type_of(r: &Resource) -> String {
    r.resource.as_ref().map(|a| a.type_url.clone()).unwrap_or_default()
}

impl Control {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let inner = Inner {
            world: Mutex::default(),
            pushes: broadcast::channel(64).0,
            stop: Mutex::default(),
            address: listener.local_addr().unwrap(),
        };
        let this = Self(Arc::new(inner));
        this.listen(listener);
        this
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.0.address
    }

    fn listen(&self, listener: TcpListener) {
        let (service, stop) = (self.clone(), self.0.stop.lock().unwrap().clone());
        listener.set_nonblocking(true).unwrap();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
                let serving = tonic::transport::Server::builder()
                    .add_service(AggregatedDiscoveryServiceServer::new(service))
                    .serve_with_incoming(incoming);
                tokio::select! {
                    r = serving => r.unwrap(),
                    () = stop.cancelled() => {}
                }
            });
            // Connections end with their runtime.
        });
    }

    /// Ends all connections and comes back at the same address, with no memory of its clients.
    pub(crate) fn restart(&self, away: Duration) {
        let before = std::mem::take(&mut *self.0.stop.lock().unwrap());
        before.cancel();
        std::thread::sleep(away);
        let begun = std::time::Instant::now();
        let listener = loop {
            match TcpListener::bind(self.0.address) {
                Ok(l) => break l,
                Err(e) if begun.elapsed() > Duration::from_secs(10) => panic!("{e}"),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        self.listen(listener);
    }

    /// Ends all connections and stays away.
    pub(crate) fn gone(&self) {
        self.0.stop.lock().unwrap().cancel();
    }

    pub(crate) fn world(&self) -> MutexGuard<'_, World> {
        self.0.world.lock().unwrap()
    }

    /// Is there for everybody from now on, and for those who are connected.
    pub(crate) fn has(&self, r: Resource) {
        self.world().all.insert((type_of(&r), r.name.clone()), r);
    }

    /// What a name gets from now on.
    pub(crate) fn answers(&self, type_url: &str, name: &str, answer: Answer) {
        self.world().answers.insert((type_url.to_owned(), name.to_owned()), answer);
    }

    /// Says something unasked.
    pub(crate) fn push(&self, type_url: &str, resources: Vec<Resource>, removed: &[&str]) {
        let response = DeltaDiscoveryResponse {
            type_url: type_url.to_owned(),
            resources,
            removed_resources: removed.iter().map(|n| (*n).to_owned()).collect(),
            ..DeltaDiscoveryResponse::default()
        };
        self.0.pushes.send(response).unwrap();
    }

    /// How often a name was subscribed.
    pub(crate) fn times(&self, type_url: &str, name: &str) -> usize {
        let key = (short(type_url), name.to_owned());
        self.world().subscribed.iter().filter(|s| **s == key).count()
    }

    /// What a request gets at once, and what it gets later.
    fn reply(
        &self,
        r: &DeltaDiscoveryRequest,
        first: bool,
    ) -> (Vec<Resource>, Vec<String>, Vec<(Resource, Duration)>) {
        let mut w = self.world();
        let kind = short(&r.type_url);
        w.subscribed.extend(r.resource_names_subscribe.iter().map(|n| (kind.clone(), n.clone())));
        w.given_up.extend(r.resource_names_unsubscribe.iter().map(|n| (kind.clone(), n.clone())));
        if let Some(e) = &r.error_detail {
            w.refused.push(format!("{kind}: {}", e.message));
        }
        let (mut now, mut gone, mut later) = (vec![], vec![], vec![]);
        let names: BTreeSet<&String> = r.resource_names_subscribe.iter().collect();
        if (first && names.is_empty()) || names.iter().any(|n| *n == "*") {
            now.extend(w.all.iter().filter(|((t, _), _)| *t == r.type_url).map(|(_, r)| r.clone()));
        }
        for name in names.into_iter().filter(|n| *n != "*") {
            let key = (r.type_url.clone(), name.clone());
            match (w.answers.get(&key), w.all.get(&key)) {
                (Some(Answer::Resource(r, wait)), _) if wait.is_zero() => now.push(r.clone()),
                (Some(Answer::Resource(r, wait)), _) => later.push((r.clone(), *wait)),
                (Some(Answer::Silence), _) => {}
                (Some(Answer::Unresolved), _) => now.push(Resource {
                    name: name.clone(),
                    version: "1".into(),
                    aliases: vec![name.clone()],
                    ..Resource::default()
                }),
                (None, Some(r)) => now.push(r.clone()),
                (Some(Answer::Absent), _) | (None, None) => gone.push(name.clone()),
            }
        }
        (now, gone, later)
    }

    fn nonce(&self) -> String {
        let mut w = self.world();
        w.nonce += 1;
        w.nonce.to_string()
    }

    async fn converse(
        self,
        mut requests: Streaming<DeltaDiscoveryRequest>,
        to: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    ) {
        let mut pushes = self.0.pushes.subscribe();
        let (wait, mut waited) = mpsc::channel::<(String, Resource)>(64);
        let mut types = BTreeSet::new();
        loop {
            let (type_url, resources, removed) = tokio::select! {
                r = requests.message() => {
                    let Ok(Some(r)) = r else { return };
                    let first = types.insert(r.type_url.clone());
                    let (now, gone, later) = self.reply(&r, first);
                    for (resource, after) in later {
                        let (wait, t) = (wait.clone(), r.type_url.clone());
                        tokio::spawn(async move {
                            tokio::time::sleep(after).await;
                            let _ = wait.send((t, resource)).await;
                        });
                    }
                    if now.is_empty() && gone.is_empty() && !first {
                        continue;
                    }
                    // Silence about names is not an answer.
                    if now.is_empty() && gone.is_empty() && !r.resource_names_subscribe.is_empty() {
                        continue;
                    }
                    (r.type_url, now, gone)
                }
                Some((t, resource)) = waited.recv() => (t, vec![resource], vec![]),
                Ok(p) = pushes.recv() => (p.type_url, p.resources, p.removed_resources),
            };
            let response = DeltaDiscoveryResponse {
                nonce: self.nonce(),
                system_version_info: "1".into(),
                type_url,
                resources,
                removed_resources: removed,
                ..DeltaDiscoveryResponse::default()
            };
            if to.send(Ok(response)).await.is_err() {
                return;
            }
        }
    }
}

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Control {
    type StreamAggregatedResourcesStream = Out<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Out<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("incremental only"))
    }

    async fn delta_aggregated_resources(
        &self,
        r: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (to, from) = mpsc::channel(16);
        tokio::spawn(self.clone().converse(r.into_inner(), to));
        Ok(Response::new(Box::pin(ReceiverStream::new(from))))
    }
}

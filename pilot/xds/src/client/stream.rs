//! One stream of an [`super::AdsClient`].

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use prost::Message as _;
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming, codegen::http::uri::PathAndQuery, transport::Channel};

use super::{
    ClientOptions, Handler, Known, Names, Rejection, Shared, Update,
    expiry::{Expiry, is_heartbeat, is_unresolved},
};
use crate::{
    mcp,
    node::NodeInfo,
    pb, process,
    server::{
        content_version,
        state::{MAX_TYPES, Mode},
    },
    type_url,
};

/// Largest response: 64 MiB holds a mesh of some 20,000 services for one proxy.
const MAX_RESPONSE: usize = 64 * 1024 * 1024;
/// Opening a stream on a connection that is up.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests waiting to be written; acknowledgements and subscriptions, one per type at a time. All subscriptions are queued
/// before the stream is open and anybody takes them, so there is room for as many types as a server takes.
const QUEUE: usize = MAX_TYPES;
/// A server that does not read our requests for this long is left.
const SEND_TIMEOUT: Duration = Duration::from_secs(20);
/// Rejections quoted in a NACK; the rest is counted.
const QUOTED: usize = 20;

/// How a stream ended.
pub(super) struct Outcome {
    /// Whether the server answered at least once: then the next attempt need not wait long.
    pub answered: bool,
    /// We are to say who we are again: the next stream begins at once.
    pub renamed: bool,
    /// For the log.
    pub reason: String,
}

pub(super) async fn run<H: Handler>(
    options: &ClientOptions,
    node: &Arc<NodeInfo>,
    channel: Channel,
    shared: &Shared,
    handler: &mut H,
    known: &mut Known,
    expiry: &mut Expiry,
) -> Outcome {
    let mut answered = false;
    let result = match options.mode {
        Mode::Delta => delta(node, channel, shared, handler, known, expiry, &mut answered).await,
        Mode::Sotw => sotw(node, channel, shared, handler, known, expiry, &mut answered).await,
    };
    let (renamed, reason) = match result {
        Ok(End::Closed) => (false, "closed by the server".to_owned()),
        Ok(End::Renamed) => (true, "the node has changed".to_owned()),
        Err(s) => (false, format!("{:?}: {}", s.code(), s.message())),
    };
    Outcome { answered, renamed, reason }
}

/// How a stream ends without an error.
enum End {
    Closed,
    /// The node is no longer the one that the stream began with.
    Renamed,
}

async fn open<Req, Resp>(
    channel: Channel,
    method: &'static str,
    rx: mpsc::Receiver<Req>,
) -> Result<Streaming<Resp>, Status>
where
    Req: prost::Message + 'static,
    Resp: prost::Message + Default + 'static,
{
    let opening = async move {
        let mut grpc = tonic::client::Grpc::new(channel).max_decoding_message_size(MAX_RESPONSE);
        grpc.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
        let codec = tonic_prost::ProstCodec::<Req, Resp>::default();
        let path = PathAndQuery::from_static(method);
        let response = grpc.streaming(Request::new(ReceiverStream::new(rx)), path, codec).await?;
        Ok(response.into_inner())
    };
    tokio::time::timeout(OPEN_TIMEOUT, opening)
        .await
        .unwrap_or_else(|_| Err(Status::deadline_exceeded("the server did not accept the stream")))
}

async fn send<T>(tx: &mpsc::Sender<T>, request: T) -> Result<(), Status> {
    match tokio::time::timeout(SEND_TIMEOUT, tx.send(request)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(Status::unavailable("stream closed")),
        Err(_) => Err(Status::deadline_exceeded("the server does not read")),
    }
}

/// The text of a NACK.
fn nack(rejections: &[Rejection]) -> pb::Status {
    let mut message = String::new();
    for r in rejections.iter().take(QUOTED) {
        if !message.is_empty() {
            message.push_str("; ");
        }
        message.push_str(&r.name);
        message.push_str(": ");
        message.extend(r.reason.chars().take(500));
    }
    if rejections.len() > QUOTED {
        message.push_str(&format!("; and {} more", rejections.len() - QUOTED));
    }
    // INVALID_ARGUMENT
    pb::Status { code: 3, message }
}

async fn delta<H: Handler>(
    who: &Arc<NodeInfo>,
    channel: Channel,
    shared: &Shared,
    handler: &mut H,
    known: &mut Known,
    expiry: &mut Expiry,
    answered: &mut bool,
) -> Result<End, Status> {
    let (tx, rx) = mpsc::channel::<pb::DeltaDiscoveryRequest>(QUEUE);
    let mut node = Some(who.to_pb());
    let mut sent: BTreeMap<String, Names> = BTreeMap::new();
    // Queued before the stream opens: a server may answer the headers only after a first message.
    subscribe_delta(shared, known, &mut sent, &mut node, &tx).await?;
    let path = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
    let mut responses: Streaming<pb::DeltaDiscoveryResponse> = open(channel, path, rx).await?;
    loop {
        tokio::select! {
            // Cancel-safe: partial frames stay in the stream; a notification that is not taken
            // stays stored.
            r = responses.message() => {
                let Some(response) = r? else { return Ok(End::Closed) };
                if !std::mem::replace(answered, true) {
                    handler.on_connection(true);
                }
                let ack = take_delta(response, handler, known, expiry);
                send(&tx, ack).await?;
            }
            () = shared.changed.notified() => {
                if !Arc::ptr_eq(who, &shared.node()) {
                    return Ok(End::Renamed);
                }
            }
            () = expiry.next() => expiry.expire(handler, known),
        }
        subscribe_delta(shared, known, &mut sent, &mut node, &tx).await?;
    }
}

fn take_delta<H: Handler>(
    response: pb::DeltaDiscoveryResponse,
    handler: &mut H,
    known: &mut Known,
    expiry: &mut Expiry,
) -> pb::DeltaDiscoveryRequest {
    let pb::DeltaDiscoveryResponse { type_url, nonce, mut resources, mut removed_resources, .. } = response;
    let all = resources.len();
    resources.retain_mut(|r| {
        let heartbeat = is_heartbeat(r);
        if heartbeat && known.get(&type_url).is_some_and(|k| k.contains_key(&r.name)) {
            expiry.set(&type_url, &r.name, r.ttl.as_ref());
        }
        if is_unresolved(r) {
            removed_resources.append(&mut r.aliases);
            return false;
        }
        !heartbeat
    });
    if all > 0 && resources.is_empty() && removed_resources.is_empty() {
        // Nothing but heartbeats.
        return pb::DeltaDiscoveryRequest { type_url, response_nonce: nonce, ..Default::default() };
    }
    let versions: Vec<(String, String, Option<prost_types::Duration>)> =
        resources.iter().map(|r| (r.name.clone(), r.version.clone(), r.ttl)).collect();
    let update = Update { changed: resources, removed: removed_resources.clone() };
    let result = handler.on_update(&type_url, update);
    let rejected: BTreeSet<&str> = match &result {
        Ok(()) => BTreeSet::new(),
        Err(list) => list.iter().map(|r| r.name.as_str()).collect(),
    };
    let have = known.entry(type_url.clone()).or_default();
    for (name, version, ttl) in versions {
        if !rejected.contains(name.as_str()) {
            expiry.set(&type_url, &name, ttl.as_ref());
            have.insert(name, version);
        }
    }
    for name in &removed_resources {
        if !rejected.contains(name.as_str()) {
            expiry.clear(&type_url, name);
            have.remove(name);
        }
    }
    let error_detail = result.as_ref().err().map(|l| nack(l));
    pb::DeltaDiscoveryRequest { type_url, response_nonce: nonce, error_detail, ..Default::default() }
}

/// Sends what separates the stream's subscriptions from the wanted ones.
async fn subscribe_delta(
    shared: &Shared,
    known: &mut Known,
    sent: &mut BTreeMap<String, Names>,
    node: &mut Option<pb::Node>,
    tx: &mpsc::Sender<pb::DeltaDiscoveryRequest>,
) -> Result<(), Status> {
    let mut again = shared.take_again();
    for ((_, type_url), names) in shared.wanted() {
        let mut req = pb::DeltaDiscoveryRequest { type_url: type_url.clone(), ..Default::default() };
        let (all, set) = names.parts();
        let have = known.entry(type_url.clone()).or_default();
        if !all {
            have.retain(|n, _| set.contains(n));
        }
        match sent.get(&type_url) {
            // An empty first request would mean everything.
            None if !all && set.is_empty() => continue,
            None => {
                req.resource_names_subscribe = set.iter().cloned().collect();
                if all && !set.is_empty() {
                    req.resource_names_subscribe.push("*".into());
                }
                req.initial_resource_versions = have.clone().into_iter().collect();
            }
            Some(old) => {
                let (all_before, before) = old.parts();
                let again = again.remove(&type_url).unwrap_or_default();
                let asked = set.iter().filter(|n| !before.contains(*n) || again.contains(*n));
                req.resource_names_subscribe = asked.cloned().collect();
                req.resource_names_unsubscribe = before.difference(set).cloned().collect();
                for gone in &req.resource_names_unsubscribe {
                    have.remove(gone);
                }
                match (all_before, all) {
                    (false, true) => req.resource_names_subscribe.push("*".into()),
                    (true, false) => req.resource_names_unsubscribe.push("*".into()),
                    _ => {}
                }
                if req.resource_names_subscribe.is_empty() && req.resource_names_unsubscribe.is_empty() {
                    continue;
                }
            }
        }
        req.node = node.take();
        send(tx, req).await?;
        sent.insert(type_url, names);
    }
    Ok(())
}

struct SotwType {
    names: Names,
    version: String,
    nonce: String,
    /// The version that was refused last, and how long its refusal waited.
    refused: Option<(String, Duration)>,
}

/// Some servers answer a refusal with what was refused, at once and for ever. The second refusal of a version waits this
/// long, each further one twice as long, up to [`MAX_REFUSAL_PAUSE`].
const REFUSAL_PAUSE: Duration = Duration::from_millis(200);
const MAX_REFUSAL_PAUSE: Duration = Duration::from_secs(10);

/// Answers that wait, by type.
#[derive(Default)]
struct Held(BTreeMap<String, (Instant, pb::DiscoveryRequest)>);

impl Held {
    /// Waits for the next one to be due. Cancel-safe: it only waits.
    async fn next(&self) {
        match self.0.values().map(|(at, _)| *at).min() {
            Some(at) => tokio::time::sleep_until(at).await,
            None => std::future::pending().await,
        }
    }

    fn due(&mut self) -> Vec<pb::DiscoveryRequest> {
        let now = Instant::now();
        let due: Vec<String> =
            self.0.iter().filter(|(_, (at, _))| *at <= now).map(|(t, _)| t.clone()).collect();
        due.iter().filter_map(|t| self.0.remove(t)).map(|(_, request)| request).collect()
    }
}

fn names_list(names: &Names) -> Vec<String> {
    match names {
        // Names beside all are of the incremental protocol.
        Names::All | Names::AllAnd(_) => vec![],
        Names::Some(set) => set.iter().cloned().collect(),
    }
}

async fn sotw<H: Handler>(
    who: &Arc<NodeInfo>,
    channel: Channel,
    shared: &Shared,
    handler: &mut H,
    known: &mut Known,
    expiry: &mut Expiry,
    answered: &mut bool,
) -> Result<End, Status> {
    let (tx, rx) = mpsc::channel::<pb::DiscoveryRequest>(QUEUE);
    let mut node = Some(who.to_pb());
    let mut types: BTreeMap<String, SotwType> = BTreeMap::new();
    let mut held = Held::default();
    subscribe_sotw(shared, &mut types, &mut node, &tx).await?;
    let path = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources";
    let mut responses: Streaming<pb::DiscoveryResponse> = open(channel, path, rx).await?;
    loop {
        tokio::select! {
            // Cancel-safe for the reasons given in `delta`.
            r = responses.message() => {
                let Some(response) = r? else { return Ok(End::Closed) };
                if !std::mem::replace(answered, true) {
                    handler.on_connection(true);
                }
                if let Some((pause, answer)) = take_sotw(response, handler, known, expiry, &mut types) {
                    // Another answer of this type that still waits is to a response that this one replaces.
                    held.0.remove(&answer.type_url);
                    if pause.is_zero() {
                        send(&tx, answer).await?;
                    } else {
                        held.0.insert(answer.type_url.clone(), (Instant::now() + pause, answer));
                    }
                }
            }
            () = held.next() => {
                for answer in held.due() {
                    send(&tx, answer).await?;
                }
            }
            () = shared.changed.notified() => {
                if !Arc::ptr_eq(who, &shared.node()) {
                    return Ok(End::Renamed);
                }
            }
            () = expiry.next() => expiry.expire(handler, known),
        }
        subscribe_sotw(shared, &mut types, &mut node, &tx).await?;
    }
}

fn take_sotw<H: Handler>(
    response: pb::DiscoveryResponse,
    handler: &mut H,
    known: &mut Known,
    expiry: &mut Expiry,
    types: &mut BTreeMap<String, SotwType>,
) -> Option<(Duration, pb::DiscoveryRequest)> {
    let pb::DiscoveryResponse { type_url, nonce, version_info, resources } = response;
    let Some(state) = types.get_mut(&type_url) else {
        tracing::debug!(type_url, "response for a type that was not asked for");
        return None;
    };
    let have = known.entry(type_url.clone()).or_default();
    let mut rejections = Vec::new();
    let mut present = BTreeSet::new();
    let mut changed = Vec::new();
    let mut heartbeats = 0;
    let all = resources.len();
    for any in resources {
        let (name, ttl, any) = match unwrap(any) {
            Ok(parts) => parts,
            Err(type_url) => {
                rejections.push(Rejection { name: type_url, reason: "no readable name".into() });
                continue;
            }
        };
        present.insert(name.clone());
        let Some(any) = any else {
            heartbeats += 1;
            if have.contains_key(&name) {
                expiry.set(&type_url, &name, ttl.as_ref());
            }
            continue;
        };
        let version = content_version(&any.value);
        if have.get(&name) == Some(&version) {
            expiry.set(&type_url, &name, ttl.as_ref());
        } else {
            changed.push(pb::Resource { version, name, resource: Some(any), ttl, ..Default::default() });
        }
    }
    // A response of heartbeats only says nothing about what it does not mention.
    let whole = type_url::full_state(&type_url) && (heartbeats == 0 || heartbeats < all);
    let removed: Vec<String> =
        if whole { have.keys().filter(|n| !present.contains(*n)).cloned().collect() } else { vec![] };
    let versions: Vec<(String, String, Option<prost_types::Duration>)> =
        changed.iter().map(|r| (r.name.clone(), r.version.clone(), r.ttl)).collect();
    if let Err(list) = handler.on_update(&type_url, Update { changed, removed: removed.clone() }) {
        rejections.extend(list);
    }
    for (name, version, ttl) in versions {
        if !rejections.iter().any(|r| r.name == name) {
            expiry.set(&type_url, &name, ttl.as_ref());
            have.insert(name, version);
        }
    }
    for n in &removed {
        expiry.clear(&type_url, n);
        have.remove(n);
    }
    state.nonce.clone_from(&nonce);
    let (pause, error_detail) = if rejections.is_empty() {
        state.version = version_info;
        state.refused = None;
        (Duration::ZERO, None)
    } else {
        let pause = match &state.refused {
            Some((version, pause)) if *version == version_info => {
                (*pause * 2).clamp(REFUSAL_PAUSE, MAX_REFUSAL_PAUSE)
            }
            _ => Duration::ZERO,
        };
        state.refused = Some((version_info, pause));
        (pause, Some(nack(&rejections)))
    };
    let answer = pb::DiscoveryRequest {
        version_info: state.version.clone(),
        resource_names: names_list(&state.names),
        type_url,
        response_nonce: nonce,
        error_detail,
        node: None,
    };
    Some((pause, answer))
}

async fn subscribe_sotw(
    shared: &Shared,
    types: &mut BTreeMap<String, SotwType>,
    node: &mut Option<pb::Node>,
    tx: &mpsc::Sender<pb::DiscoveryRequest>,
) -> Result<(), Status> {
    for ((_, type_url), names) in shared.wanted() {
        let fresh = !types.contains_key(&type_url);
        if fresh && matches!(&names, Names::Some(set) if set.is_empty()) {
            continue;
        }
        let state = types.entry(type_url.clone()).or_insert_with(|| SotwType {
            names: names.clone(),
            version: String::new(),
            nonce: String::new(),
            refused: None,
        });
        if !fresh && state.names == names {
            continue;
        }
        state.names = names;
        let mut resource_names = names_list(&state.names);
        if !fresh && state.names == Names::All {
            resource_names = vec!["*".into()];
        }
        let req = pb::DiscoveryRequest {
            version_info: state.version.clone(),
            node: node.take(),
            resource_names,
            type_url,
            response_nonce: state.nonce.clone(),
            error_detail: None,
        };
        send(tx, req).await?;
    }
    Ok(())
}

/// The first field of every resource that Envoy names is its name.
#[derive(Clone, PartialEq, prost::Message)]
struct Named {
    #[prost(string, tag = "1")]
    name: String,
}

/// Name, time to live and content of a resource of a state-of-the-world response. Without content it is a heartbeat.
fn unwrap(any: pb::Any) -> Result<(String, Option<prost_types::Duration>, Option<pb::Any>), String> {
    if any.type_url != type_url::RESOURCE {
        return match resource_name(&any) {
            Some(name) => Ok((name, None, Some(any))),
            None => Err(any.type_url),
        };
    }
    let r = pb::Resource::decode(any.value).map_err(|_| any.type_url)?;
    let inner = r.resource.as_ref().and_then(resource_name);
    match inner {
        Some(name) => Ok((name, r.ttl, r.resource)),
        None if !r.name.is_empty() => Ok((r.name, r.ttl, r.resource)),
        None => Err(type_url::RESOURCE.to_owned()),
    }
}

/// Name of a resource outside delta, where it is only inside the payload.
fn resource_name(any: &pb::Any) -> Option<String> {
    if any.type_url == mcp::RESOURCE_TYPE_URL {
        return mcp::Document::from_any(any).ok().map(|d| d.name);
    }
    if any.type_url == type_url::NDS {
        return Some("name-table".to_owned());
    }
    // Its first field is another's name.
    if any.type_url == type_url::PROXY_CONFIG {
        return Some(process::NAME.to_owned());
    }
    Named::decode(any.value.clone()).ok().map(|n| n.name).filter(|n| !n.is_empty())
}

#[cfg(test)]
mod tests;

//! Going the way of a session to a member's service: the lease, the own gateway, the tunnel, the member's gateway,
//! a workload's certificate, and what the member itself says of its part.

mod refusals;

use std::{fmt::Write as _, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use mesh_identity::{TRUST_BUNDLE, WORKLOAD_SVID, peer_identity};
use mesh_model::{
    ClusterId,
    explain::Step,
    federation::LeaseState,
    proxy::{SecretRef, StringMatch, UpstreamTls, Validation},
};
use mesh_xds::links::PeerLink;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::{
    io::AsyncReadExt as _,
    net::{TcpStream, UnixStream},
};
use tonic::Status;

use self::refusals::refused;
use crate::{
    admin_pb::TraceRequest,
    dial,
    pb::{InspectRequest, federation_client::FederationClient},
    state::Shared,
};

/// A page of steps is a few kilobytes.
const MAX_PAGE: usize = 256 * 1024;
/// Patience with each part of the way.
const PATIENCE: Duration = Duration::from_secs(5);
/// Steps that a member may tell.
const MAX_STEPS: usize = 16;
/// Characters of each text of theirs.
const MAX_TEXT: usize = 400;

/// How long a refusal of the client's certificate is waited for.
const REFUSAL: Duration = Duration::from_secs(1);

/// Clocks that differ by less are taken for equal: an answer takes its time, too.
const SKEW_MS: u64 = 2_000;

/// Milliseconds since the epoch.
pub(crate) fn now_ms() -> u64 {
    let d = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

/// Asks this cluster's pilot on behalf of a peer.
pub(crate) async fn ask_pilot(
    shared: &Arc<Shared>,
    peer: &ClusterId,
    r: &InspectRequest,
) -> Result<Vec<Step>, Status> {
    let Some(socket) = &shared.options.debug_socket else {
        return Err(Status::unimplemented("this cluster does not explain its side"));
    };
    let ask = json!({
        "name": r.name, "namespace": r.namespace, "port": u16::try_from(r.port).unwrap_or(0), "udp": r.udp,
        "subset": r.subset,
        // Whom a cluster may speak for is its own workloads; the certificate says which cluster asks.
        "principal": r.principal, "cluster": peer.as_str(), "method": r.method, "path": r.path,
    });
    pilot(socket, hyper::Method::POST, "/pilot/debug/inspect", ask.to_string()).await
}

/// What pilot knows of the roots that proxies trust.
pub(crate) async fn ask_trust<T: DeserializeOwned>(shared: &Shared) -> Result<T, Status> {
    let Some(socket) = &shared.options.debug_socket else {
        return Err(Status::unimplemented("pilot is not asked in this cluster"));
    };
    pilot(socket, hyper::Method::GET, "/pilot/debug/trust", String::new()).await
}

/// A page of pilot's.
async fn pilot<T: DeserializeOwned>(
    socket: &Path,
    method: hyper::Method,
    path: &str,
    body: String,
) -> Result<T, Status> {
    let body = tokio::time::timeout(PATIENCE, page(socket, method, path, body))
        .await
        .map_err(|_| Status::deadline_exceeded("pilot does not answer"))?
        .map_err(|e| Status::unavailable(format!("pilot: {e}")))?;
    serde_json::from_slice(&body).map_err(|e| Status::internal(format!("pilot's answer: {e}")))
}

async fn page(
    socket: &Path,
    method: hyper::Method,
    path: &str,
    body: String,
) -> Result<Bytes, Box<dyn std::error::Error + Send + Sync>> {
    let stream = UnixStream::connect(socket).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let request = hyper::Request::builder()
        .method(method)
        .uri(path)
        .header("host", "flotilla")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_PAGE).collect().await?.to_bytes();
    driver.abort();
    if !status.is_success() {
        return Err(format!("status {status}: {}", String::from_utf8_lossy(&body).trim()).into());
    }
    Ok(body)
}

/// Goes the whole way; the last step is the broken one, if any is.
pub(crate) async fn trace(shared: &Arc<Shared>, r: &TraceRequest) -> Result<Vec<Step>, Status> {
    let cluster = ClusterId::new(&r.cluster).map_err(|e| Status::invalid_argument(e.to_string()))?;
    let Some(own) = shared.trust_domain() else {
        let fix = "`flotilla found` or `flotilla join-cluster TOKEN` makes it a member";
        return Ok(vec![Step::broken("lease", "this cluster is in no mesh", fix)]);
    };
    let trust_domain = shared.lock().node.members.domain_of(&cluster).map_or(own, ToString::to_string);
    if r.sni.is_empty() {
        return Ok(control(shared, &trust_domain, &cluster).await);
    }
    let (lease, announced) = lease(shared, &cluster);
    let lapsed = lease.state != mesh_model::explain::State::Ok;
    let mut steps = vec![lease];
    // What the member says of its part is worth most where the network does not: it is asked whatever became of the
    // session, and speaks last.
    let addresses = shared.options.via.map_or(announced, |via| vec![via]);
    let datagrams = r.inspect.as_ref().is_some_and(|i| i.udp);
    // Datagrams have no session of TLS over TCP to try: what carries the members' own exchange is told.
    let session =
        if datagrams { None } else { Some(session(shared, r, "istio", &cluster, &addresses).await) };
    // After the session, which has just made gateways dial if nobody had.
    steps.extend(transport(shared, &cluster, datagrams).await);
    let reached = session.as_ref().is_none_or(|s| !s.is_broken());
    let there =
        member(shared, &trust_domain, &cluster, &addresses, r.inspect.clone().unwrap_or_default()).await;
    match there {
        Ok(there) => {
            let named = there.iter().any(Step::is_broken);
            // A missing export and a missing backend have one cause, which the member knows better.
            if reached || !named {
                steps.extend(session);
            }
            steps.extend(there);
        }
        Err(e) => {
            steps.extend(session);
            if reached {
                let says = format!("its control plane does not tell about its side: {e}");
                steps.push(Step::warning("peer", says, ""));
            }
        }
    }
    // A lapsed lease alone breaks nothing: what is behind it is used last. If nothing gets through, that is its cause.
    if lapsed && steps.len() > 1 {
        steps[0].state = mesh_model::explain::State::Warning;
    }
    let end = steps.iter().position(Step::is_broken).map_or(steps.len(), |i| i + 1);
    steps.truncate(end.max(1));
    Ok(steps)
}

/// What this cluster's gateways told of the way to a member; nothing if no gateway tells.
async fn transport(shared: &Shared, cluster: &ClusterId, datagrams: bool) -> Option<Step> {
    let socket = shared.options.debug_socket.as_ref()?;
    let told: Vec<GatewayReport> =
        pilot(socket, hyper::Method::GET, "/pilot/debug/links", String::new()).await.ok()?;
    let links: Vec<_> = told
        .iter()
        .flat_map(|g| g.peers.iter().map(move |p| (&g.gateway, p)))
        .filter(|(_, p)| p.cluster == cluster.as_str() && !p.transport.is_empty())
        .collect();
    // Where QUIC is meant and TCP stands in, it says why.
    let blocked = links.iter().find(|(_, p)| p.transport == "tcp" && !p.why_tcp.is_empty());
    if let Some((gateway, p)) = blocked {
        let says = format!("TCP, though QUIC is preferred; {gateway}: {}", p.why_tcp);
        let fix = format!("let UDP to port 15443 of {cluster}'s gateways pass, and its answers");
        if datagrams {
            return Some(Step::broken("transport", format!("UDP needs the QUIC trunk: {says}"), fix));
        }
        return Some(Step::warning("transport", says, fix));
    }
    if datagrams && !links.is_empty() && links.iter().all(|(_, p)| p.transport == "tcp" && p.connections == 0)
    {
        let says = "UDP needs the QUIC trunk, and the gateways talk over TCP".to_owned();
        let fix = "start both control planes with --transport quic,tcp, and all gateways with --trunk";
        return Some(Step::broken("transport", says, fix));
    }
    let (_, worst) = links.iter().max_by_key(|(_, p)| p.rtt_us)?;
    let mut says = worst.transport.to_uppercase();
    if worst.transport == "quic" && !worst.congestion.is_empty() {
        let _ = write!(says, " ({})", worst.congestion);
    }
    if let Some(us) = worst.rtt_us {
        let _ = write!(says, ", round trip {:.1} ms", us as f64 / 1e3);
    }
    let sum = |of: fn(&PeerLink) -> Option<u64>| links.iter().filter_map(|(_, p)| of(p)).sum::<u64>();
    let (sent, lost) = (sum(|p| p.packets_sent), sum(|p| p.packets_lost));
    if sent > 0 {
        let _ =
            write!(says, ", {:.1} % of {sent} packets lost in a minute", lost as f64 * 100.0 / sent as f64);
    }
    if !worst.choice.is_empty() {
        let _ = write!(says, "; chosen: {}", worst.choice);
    }
    Some(Step::ok("transport", says))
}

/// Of a gateway, as pilot shows it.
#[derive(serde::Deserialize)]
struct GatewayReport {
    gateway: String,
    peers: Vec<PeerLink>,
}

/// Only the way to a member's control plane.
async fn control(shared: &Arc<Shared>, trust_domain: &str, cluster: &ClusterId) -> Vec<Step> {
    let (lease, announced) = lease(shared, cluster);
    let mut steps = vec![lease];
    let addresses = shared.options.via.map_or(announced, |via| vec![via]);
    let ask = TraceRequest {
        sni: dial::federation_sni(cluster),
        identities: vec![dial::control_plane_san(trust_domain)],
        ..TraceRequest::default()
    };
    steps.push(session(shared, &ask, "h2", cluster, &addresses).await);
    if steps.iter().skip(1).any(Step::is_broken) {
        // The lease lapsed for this.
        steps[0].state = mesh_model::explain::State::Warning;
    }
    if steps.iter().all(|s| !s.is_broken()) {
        match member(shared, trust_domain, cluster, &addresses, InspectRequest::default()).await {
            Ok(said) => steps.extend(said.into_iter().filter(|s| s.step == "clock")),
            Err(e) => steps.push(Step::warning("peer", format!("its control plane: {e}"), "")),
        }
    }
    steps
}

fn lease(shared: &Shared, cluster: &ClusterId) -> (Step, Vec<SocketAddr>) {
    let now = shared.now();
    let t = shared.lock();
    let Some(member) = t.node.members.get(cluster).filter(|m| !m.left) else {
        let says = format!("{cluster} is not a member of the mesh");
        return (Step::broken("lease", says, "`flotilla clusters` lists the members"), vec![]);
    };
    let addresses = member.gateways.iter().map(|g| g.address).collect();
    let import = t.node.imports.get(cluster);
    let age = import.and_then(|i| i.lease_age(now));
    let live = import.is_some_and(|i| i.lease() == LeaseState::Live);
    let link = t.links.get(cluster).cloned().unwrap_or_default();
    let step = if live {
        Step::ok("lease", format!("renewed {:.1} s ago", age.unwrap_or(0) as f64 / 1000.0))
    } else {
        let age =
            age.map_or("never renewed".to_owned(), |a| format!("silent for {:.0} s", a as f64 / 1000.0));
        let why = if link.last_error.is_empty() { String::new() } else { format!(": {}", link.last_error) };
        let fix = format!(
            "is its control plane running, and can its gateway be reached at {}?",
            member.gateways.iter().map(|g| g.address.to_string()).collect::<Vec<_>>().join(", ")
        );
        Step::broken("lease", format!("lapsed, {age}; used only when nothing else is left{why}"), fix)
    };
    (step, addresses)
}

/// A TLS session by the service's server name, as a caller's sidecar opens one.
async fn session(
    shared: &Shared,
    r: &TraceRequest,
    alpn: &str,
    cluster: &ClusterId,
    addresses: &[SocketAddr],
) -> Step {
    let config = shared.secrets.client_config(&UpstreamTls {
        certificate: Some(SecretRef::Sds(WORKLOAD_SVID.into())),
        validation: Validation {
            trusted: Some(SecretRef::Sds(TRUST_BUNDLE.into())),
            sans: r.identities.iter().map(StringMatch::exact).collect(),
            crl: None,
        },
        sni: r.sni.clone(),
        by_name: false,
        alpn: vec![alpn.into()],
    });
    let config = match config {
        Ok(c) => c,
        Err(e) => {
            let says = format!("this control plane has no certificate to try with: {e}");
            return Step::broken("identity", says, "look at citadel: `flotilla doctor`");
        }
    };
    if addresses.is_empty() {
        return Step::broken(
            "gateway",
            format!("{cluster} announces no gateway"),
            "start its control plane with --gateway-address",
        );
    }
    let own = shared.options.via.is_some();
    let domain = shared.lock().node.members.domain_of(cluster).cloned();
    let mut last = None;
    for a in addresses {
        let gateway = if own { format!("the own gateway {a}") } else { format!("gateway {a} of {cluster}") };
        let tcp = match tokio::time::timeout(PATIENCE, TcpStream::connect(a)).await {
            Ok(Ok(s)) => s,
            Ok(Err(e)) => {
                let fix =
                    "start `flotilla gateway`, or correct its address (--gateway-via, --gateway-address)";
                last = Some(Step::broken("gateway", format!("{gateway}: {e}"), fix));
                continue;
            }
            Err(_) => {
                let says = format!("{gateway} does not answer within {} s", PATIENCE.as_secs());
                last = Some(Step::broken("gateway", says, "let TCP to its port 15443 pass"));
                continue;
            }
        };
        let Ok(name) = rustls_pki_types::ServerName::try_from(r.sni.clone()) else {
            return Step::broken("gateway", format!("{:?} is no server name", r.sni), "");
        };
        let handshake = tokio_rustls::TlsConnector::from(config.clone()).connect(name, tcp);
        return match tokio::time::timeout(PATIENCE, handshake).await {
            Ok(Ok(mut s)) => {
                // Who refuses the client says so after the handshake (TLS 1.3), and within a domain nobody does.
                if domain.is_some() {
                    let said = tokio::time::timeout(REFUSAL, s.read(&mut [0])).await;
                    if let Ok(Err(e)) = said {
                        return refused(&gateway, cluster, domain.as_ref(), r, &e);
                    }
                }
                let peer = s.get_ref().1.peer_certificates().and_then(peer_identity);
                let id = peer.as_ref().and_then(|p| p.spiffe.as_ref()).map(ToString::to_string);
                match peer.and_then(|p| p.cluster).filter(|c| c != cluster) {
                    Some(other) => Step::broken(
                        "backend",
                        format!("the session ends in cluster {other}"),
                        format!("two clusters announce the same gateway address {a}"),
                    ),
                    None => Step::ok("session", format!("{gateway}, ends at {}", id.unwrap_or_default())),
                }
            }
            Ok(Err(e)) => refused(&gateway, cluster, domain.as_ref(), r, &e),
            Err(_) => Step::broken(
                "tunnel",
                format!("{gateway} takes the session, and nothing answers within {} s", PATIENCE.as_secs()),
                format!(
                    "the way to {cluster} eats packets: look at firewalls, routes and the MTU between the gateways"
                ),
            ),
        };
    }
    last.unwrap_or_else(|| Step::broken("gateway", "no gateway", ""))
}

/// What a member says of its side.
async fn member(
    shared: &Arc<Shared>,
    trust_domain: &str,
    cluster: &ClusterId,
    addresses: &[SocketAddr],
    ask: InspectRequest,
) -> Result<Vec<Step>, String> {
    let exchange = async {
        let (channel, _) = dial::member(&shared.secrets, trust_domain, cluster, addresses)
            .await
            .map_err(|e| e.to_string())?;
        let answer = FederationClient::new(channel).max_decoding_message_size(MAX_PAGE).inspect(ask).await;
        answer.map(tonic::Response::into_inner).map_err(|s| s.message().to_owned())
    };
    let answer = tokio::time::timeout(PATIENCE * 2, exchange).await.map_err(|_| "no answer".to_owned())??;
    let mut steps: Vec<_> = answer.steps.into_iter().take(MAX_STEPS).map(clean).collect();
    steps.extend(clock(answer.now_ms, now_ms()).map(|(says, fix)| Step::warning("clock", says, fix)));
    Ok(steps)
}

/// Certificates are valid from one time to another, so clocks matter.
fn clock(theirs: u64, ours: u64) -> Option<(String, &'static str)> {
    if theirs == 0 || theirs.abs_diff(ours) <= SKEW_MS {
        return None;
    }
    let by = theirs.abs_diff(ours) as f64 / 1000.0;
    let way = if theirs > ours { "ahead of" } else { "behind" };
    Some((
        format!("its clock is {by:.0} s {way} the one here"),
        "let both run NTP: certificates depend on it",
    ))
}

/// A peer's text goes to a terminal: without control characters, and short.
fn clean(s: crate::pb::Step) -> Step {
    let text = |s: String| s.chars().filter(|c| !c.is_control()).take(MAX_TEXT).collect::<String>();
    let step = text(s.step);
    match s.state.as_str() {
        "broken" => Step::broken(&step, text(s.says), text(s.fix)),
        "warning" => Step::warning(&step, text(s.says), text(s.fix)),
        _ => Step::ok(&step, text(s.says)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peers_text_cannot_write_to_the_terminal() {
        let s = clean(crate::pb::Step {
            step: "back\x1b[2Jend".into(),
            state: "broken".into(),
            says: "x".repeat(5000),
            fix: "a\nb".into(),
        });
        assert_eq!((s.step.as_str(), s.says.len(), s.fix.as_str()), ("back[2Jend", MAX_TEXT, "ab"));
    }
}

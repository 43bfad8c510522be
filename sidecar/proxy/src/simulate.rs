//! What the engine would do with one connection and one request, without a network.
//!
//! The answer is made of the very pieces that serve traffic: listeners, chains, routes, policies and header changes are
//! compiled as in [`crate::Engine::apply`] and asked in the same order, so a simulation cannot say something else than
//! the proxy does. Only what a network would add is missing: chance (weights and faults are told with their shares), time,
//! the health that traffic teaches, and values that differ with each request (request IDs, trace context).
//!
//! - A token of the request is believed without looking at its signature, and the answer says so.
//! - What another process decides (external authorization, rate limits, Mixer) is listed as asked.

mod authz;
mod http;
mod policy;
mod upstream;
mod why;

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_model::proxy as model;

use self::why::Reasons;
pub use self::{
    authz::{Attributes, AuthzError, judge},
    http::{FaultSeen, Mirrored, Retries, SessionSeen},
    policy::{PolicySeen, Verdict},
    upstream::{EndpointSeen, Weight},
    why::Reason,
};
use crate::{
    config::{
        CompileError, ConfigSnapshot, RouteSlot,
        listener::{Chain, ConnectionFacts, Guard, Listener, Names, Terminal},
        route::RouteTable,
    },
    export::Exporter,
    http::{
        filters::session::Session,
        metadata::{CONNECTION_RBAC, Metadata},
    },
    rbac,
    upstream::cluster::ClusterSlot,
};

/// A connection, and the request that comes first on it.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// Which side of the proxy it comes to.
    pub direction: model::Direction,
    /// Where its client meant to connect to.
    pub destination: SocketAddr,
    /// Where it comes from.
    pub source: IpAddr,
    /// The TLS ClientHello that it begins with, if it does.
    pub hello: Option<Hello>,
    /// Who the client proves to be, where it is asked.
    pub peer: Option<Peer>,
    /// The request; `None` if the bytes are of no interest.
    pub request: Option<Request>,
}

/// What a TLS ClientHello says.
#[derive(Debug, Clone, Default)]
pub struct Hello {
    /// Server name.
    pub sni: Option<String>,
    /// Protocols, preferred first.
    pub alpn: Vec<String>,
}

/// The owner of a client certificate.
#[derive(Debug, Clone)]
pub struct Peer {
    /// SPIFFE ID.
    pub principal: String,
    /// Cluster whose intermediate signed it.
    pub cluster: Option<String>,
}

/// A request.
#[derive(Debug, Clone)]
pub struct Request {
    /// Method.
    pub method: String,
    /// `Host` or `:authority`.
    pub authority: String,
    /// Path and query.
    pub path: String,
    /// Further headers.
    pub headers: Vec<(String, String)>,
    /// HTTP/2 rather than HTTP/1.1.
    pub http2: bool,
}

/// What becomes of a connection or request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Action {
    /// Forwarded to a cluster, as a request.
    Forward,
    /// Forwarded to a cluster, as bytes.
    ForwardTcp,
    /// Answered with a redirect.
    Redirect,
    /// Answered by the proxy as its configuration says (`directResponse`, a fault, a preflight).
    DirectResponse,
    /// Refused by a policy.
    Deny,
    /// Answered with 404, since nothing takes it.
    NotFound,
    /// Answered with an error of the proxy's own.
    Refuse,
    /// The connection is closed.
    #[default]
    Close,
}

impl Action {
    /// The word for it in answers.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::ForwardTcp => "forward-tcp",
            Self::Redirect => "redirect",
            Self::DirectResponse => "direct-response",
            Self::Deny => "deny",
            Self::NotFound => "not-found",
            Self::Refuse => "refuse",
            Self::Close => "close",
        }
    }
}

/// The whole way through one proxy.
#[derive(Debug, Clone, Default)]
pub struct Passage {
    /// Listener, by name.
    pub listener: Option<String>,
    /// Filter chain, by name; empty if it has none.
    pub filter_chain: Option<String>,
    /// Route configuration, by name.
    pub route_configuration: Option<String>,
    /// Virtual host, by name.
    pub virtual_host: Option<String>,
    /// Route, by name; empty if it has none.
    pub route: Option<String>,
    /// Position of the route in its virtual host.
    pub route_index: Option<usize>,
    /// What becomes of it.
    pub action: Action,
    /// Status of an answer of the proxy's own.
    pub status: Option<u16>,
    /// Why the proxy answers itself or closes, in words.
    pub detail: String,
    /// Target of a redirect.
    pub location: Option<String>,
    /// Destinations and their shares; the heaviest is what the rest describes.
    pub weights: Vec<Weight>,
    /// The heaviest destination.
    pub cluster: Option<String>,
    /// Endpoints of that destination.
    pub endpoints: Vec<EndpointSeen>,
    /// What that destination is asked for, where it is a proxy that bytes go through.
    pub tunnel: Option<String>,
    /// Whole request; `None` is no limit.
    pub timeout: Option<std::time::Duration>,
    /// Retries, if any.
    pub retries: Option<Retries>,
    /// Shadows.
    pub mirrors: Vec<Mirrored>,
    /// Injected faults.
    pub fault: Option<FaultSeen>,
    /// A session that stays on a host.
    pub session: Option<SessionSeen>,
    /// What the hash of consistent hashing is made of.
    pub hash: Vec<String>,
    /// Method, authority, path and headers that go upstream.
    pub upstream: Option<Request>,
    /// Changes to headers of the answer, in order.
    pub response_headers: Vec<(String, String)>,
    /// Policies that were asked, in order.
    pub policies: Vec<PolicySeen>,
    /// What somebody else decides.
    pub asks: Vec<String>,
    /// Why others were not chosen.
    pub reasons: Vec<Reason>,
}

/// Configuration that cannot be simulated.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{kind} {name}: {reason}")]
pub struct Unusable {
    /// Kind of the resource.
    pub kind: &'static str,
    /// Its name.
    pub name: String,
    /// What is wrong.
    pub reason: String,
}

/// Sends a connection through a proxy with this configuration.
///
/// # Errors
/// If what it meets does not compile; the proxy would have refused that resource.
pub fn simulate(config: &ConfigSnapshot, arrival: &Arrival) -> Result<Passage, Unusable> {
    let mut s = Simulation {
        config,
        arrival,
        out: Passage::default(),
        reasons: Reasons::default(),
        session: None,
        suppress: false,
    };
    s.run()?;
    s.out.reasons = s.reasons.done();
    Ok(s.out)
}

struct Simulation<'a> {
    config: &'a ConfigSnapshot,
    arrival: &'a Arrival,
    out: Passage,
    reasons: Reasons,
    /// The router adds no headers of its own.
    suppress: bool,
    session: Option<Session>,
}

impl Simulation<'_> {
    fn run(&mut self) -> Result<(), Unusable> {
        let Some(model) = self.listener() else {
            self.out.detail = format!("no listener takes connections to {}", self.arrival.destination);
            return Ok(());
        };
        self.out.listener = Some(model.name.clone());
        let listener = compile(&model)?;
        let alpn = self.alpn(&listener);
        let a = self.arrival;
        let facts = ConnectionFacts {
            destination: a.destination,
            source: a.source,
            tls: a.hello.is_some(),
            sni: a.hello.as_ref().and_then(|h| h.sni.as_deref()),
            alpn: &alpn,
        };
        let chain = listener.chain(&facts).cloned();
        self.reasons.chains(&model, chain.as_deref().map(|c| &c.model), &facts);
        let Some(chain) = chain else {
            self.out.detail = match a.hello {
                Some(_) => "no filter chain takes it: the TLS session is refused".into(),
                None => "no filter chain takes it: the connection is closed".into(),
            };
            return Ok(());
        };
        self.out.filter_chain = Some(chain.model.name.clone());
        if !self.handshake(&chain) || !self.network_policies(&chain) {
            return Ok(());
        }
        match &chain.terminal {
            Terminal::Tcp(t) => self.bytes(&chain, &t.config),
            Terminal::Http(h) => self.request(&chain, h)?,
            Terminal::Udp(_) => self.out.detail = "the chain takes datagrams, which are not simulated".into(),
        }
        Ok(())
    }

    /// The listener that takes the connection, as `listener::accept` finds it.
    fn listener(&self) -> Option<Arc<model::Listener>> {
        let d = self.arrival.destination;
        let tcp = || self.config.listeners.values().filter(|l| !l.is_udp());
        let wildcard = |l: &model::Listener| {
            l.address.ip().is_unspecified()
                && l.address.port() == d.port()
                && (l.address.is_ipv6() || l.address.is_ipv4() == d.is_ipv4())
        };
        let exact = || tcp().find(|l| l.address == d);
        let any = |bound: bool| tcp().find(|l| l.bind_to_port == bound && wildcard(l));
        let bound = || tcp().find(|l| l.bind_to_port && l.address == d).or_else(|| any(true));
        let captures =
            tcp().find(|l| l.use_original_dst && l.bind_to_port && l.direction == self.arrival.direction);
        match self.arrival.direction {
            // An inbound listener keeps what it captures.
            model::Direction::Inbound => captures.or_else(bound),
            model::Direction::Outbound => exact().or_else(|| any(false)).or_else(|| any(true)).or(captures),
            model::Direction::Unspecified => bound(),
        }
        .cloned()
    }

    /// Protocols by which a chain may be chosen: the ClientHello's, or what the first bytes are seen to be.
    fn alpn(&self, listener: &Listener) -> Vec<String> {
        let (_, want_http) = listener.inspection(self.arrival.destination);
        match (&self.arrival.hello, &self.arrival.request) {
            (Some(h), _) => h.alpn.clone(),
            (None, Some(r)) if want_http => vec![if r.http2 { "h2c" } else { "http/1.1" }.to_owned()],
            _ => vec![],
        }
    }

    /// Whether the chain and the client agree on TLS.
    fn handshake(&mut self, chain: &Chain) -> bool {
        let Some(tls) = &chain.model.tls else { return true };
        if self.arrival.hello.is_none() {
            self.out.detail = "the filter chain wants TLS and the client speaks in clear".into();
            return false;
        }
        if matches!(tls.client_certificate, model::ClientCertificate::Required(_))
            && self.arrival.peer.is_none()
        {
            self.out.detail = "the filter chain wants a client certificate and there is none".into();
            return false;
        }
        true
    }

    /// What is known of the connection to policies.
    fn facts<'f>(&'f self, chain: &Chain, principals: &'f [String]) -> rbac::Facts<'f> {
        let a = self.arrival;
        let tls = chain.model.tls.is_some();
        let peer = a.peer.as_ref().filter(|_| tls);
        rbac::Facts {
            local: a.destination,
            peer: a.source,
            remote: a.source,
            sni: a.hello.as_ref().and_then(|h| h.sni.as_deref()),
            principals: if peer.is_some() { principals } else { &[] },
            authenticated: peer.is_some(),
            cluster: peer.and_then(|p| p.cluster.as_deref()),
            request: None,
            metadata: None,
        }
    }

    fn network_policies(&mut self, chain: &Chain) -> bool {
        if !chain.limits.is_empty() {
            self.out.asks.push("a local limit of connections".into());
        }
        let principals: Vec<String> = self.arrival.peer.iter().map(|p| p.principal.clone()).collect();
        let facts = self.facts(chain, &principals);
        let (mut seen, mut found, mut asked) = (Vec::new(), Metadata::default(), false);
        for guard in &chain.guards {
            match guard {
                Guard::Rbac(r) => {
                    if let Some(said) = r.shadow(&facts) {
                        r.note(said, CONNECTION_RBAC, &mut found);
                    }
                    seen.push(policy::ask(r, &facts));
                }
                Guard::Authz(a) => asked |= a.asks(&found),
            }
        }
        let denied = policy::denied(&seen);
        if asked {
            self.out.asks.push("external authorization".into());
        }
        self.out.policies.extend(seen.into_iter().flatten());
        if let Some(by) = denied {
            self.out.action = Action::Deny;
            self.out.detail = by;
            return false;
        }
        true
    }

    fn bytes(&mut self, chain: &Chain, tcp: &model::TcpProxy) {
        self.out.action = Action::ForwardTcp;
        let sni = self.arrival.hello.as_ref().and_then(|h| h.sni.clone());
        let named = sni.filter(|_| chain.sni_cluster).map(model::WeightedCluster::only);
        let to = match &named {
            Some(only) => std::slice::from_ref(only),
            None => &tcp.clusters,
        };
        self.destinations(to, None);
        self.out.tunnel = tcp.tunnel.as_ref().map(|t| {
            let method = if t.post { "POST" } else { "CONNECT" };
            format!("{method} {}", t.hostname)
        });
        if self.nowhere() {
            self.out.action = Action::Close;
        }
    }
}

/// Compiles a listener without opening its logs.
fn compile(model: &model::Listener) -> Result<Listener, Unusable> {
    let mut quiet = model.clone();
    quiet.access_log.clear();
    for c in quiet.filter_chains.iter_mut().chain(&mut quiet.default_filter_chain) {
        for f in &mut c.filters {
            match f {
                model::NetworkFilter::Tcp(t) => t.access_log.clear(),
                model::NetworkFilter::Http(h) => h.access_log.clear(),
                model::NetworkFilter::Udp(u) => u.access_log.clear(),
                _ => {}
            }
        }
    }
    if let Some(u) = &mut quiet.udp {
        u.access_log.clear();
    }
    let mut clusters: HashMap<String, Arc<ClusterSlot>> = HashMap::new();
    let mut names = Names {
        cluster: &mut |n| Arc::clone(clusters.entry(n.to_owned()).or_insert_with(|| ClusterSlot::new(n))),
        route: &mut |_| Arc::new(RouteSlot { current: arc_swap::ArcSwapOption::empty() }),
        log: &mut |path| {
            let source = std::io::ErrorKind::Unsupported.into();
            Err(CompileError::LogFile { path: path.to_owned(), source })
        },
        export: &mut |to, slot| Ok(Arc::new(Exporter::new(to, slot)?)),
    };
    Listener::new(Arc::new(quiet), None, &mut names).map_err(|e| Unusable {
        kind: "listener",
        name: model.name.clone(),
        reason: e.to_string(),
    })
}

/// Compiles a route configuration.
fn compile_routes(model: &model::RouteConfiguration) -> Result<RouteTable, Unusable> {
    RouteTable::new(model, None, &mut ClusterSlot::new).map_err(|e| Unusable {
        kind: "route",
        name: model.name.clone(),
        reason: e.to_string(),
    })
}

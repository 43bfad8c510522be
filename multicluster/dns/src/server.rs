//! The server: UDP and TCP, the mesh's names from the table, the rest from a resolver behind.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use hickory_proto::{
    op::{Edns, Metadata, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{A, AAAA, SOA, SRV, TXT},
    },
};
use hickory_resolver::{
    TokioResolver,
    config::{NameServerConfig, ResolverConfig},
    net::runtime::TokioRuntimeProvider,
};
use hickory_server::{
    Server as DnsServer,
    net::runtime::Time,
    server::{Request, RequestHandler, ResponseHandler, ResponseInfo},
    zone_handler::MessageResponseBuilder,
};
use tokio::{
    net::{TcpListener, UdpSocket},
    sync::watch,
};

use crate::{
    TTL,
    names::{Found, Host, Names, zone_of},
};

/// An idle TCP connection is closed after this.
const TCP_IDLE: Duration = Duration::from_secs(10);
/// Answers waiting on one TCP connection.
const TCP_QUEUE: usize = 32;
/// Largest answer over UDP that is offered.
const MAX_PAYLOAD: u16 = 1232;
/// A forwarded question is answered within this or with SERVFAIL.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(4);

/// Why it could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address is taken or not ours.
    #[error("cannot listen on {0}")]
    Bind(SocketAddr, #[source] io::Error),
    /// The resolver behind cannot be set up.
    #[error("resolver: {0}")]
    Upstream(String),
}

/// A running server; dropping it stops it.
pub struct Server {
    address: SocketAddr,
    _server: DnsServer<Handler>,
}

impl Server {
    /// Serves `names` on `address`, UDP and TCP. Foreign names go to `upstream`; `None` uses the
    /// system's resolvers, which must not lead back here (the capture rules exempt the proxy's user).
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(
        address: SocketAddr,
        upstream: Option<SocketAddr>,
        names: watch::Receiver<Arc<Names>>,
    ) -> Result<Self, StartError> {
        let bind = |e| StartError::Bind(address, e);
        let udp = UdpSocket::bind(address).await.map_err(bind)?;
        let address = udp.local_addr().map_err(bind)?;
        let tcp = TcpListener::bind(address).await.map_err(bind)?;
        Self::start_on(udp, tcp, upstream, names)
    }

    /// The same at sockets that are bound already.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start_on(
        udp: UdpSocket,
        tcp: TcpListener,
        upstream: Option<SocketAddr>,
        names: watch::Receiver<Arc<Names>>,
    ) -> Result<Self, StartError> {
        let address = udp.local_addr().map_err(|e| StartError::Upstream(e.to_string()))?;
        let resolver = resolver(upstream)?;
        let mut server = DnsServer::new(Handler { names, resolver });
        server.register_socket(udp);
        server.register_listener(tcp, TCP_IDLE, TCP_QUEUE);
        Ok(Self { address, _server: server })
    }

    /// Where it serves.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

fn resolver(upstream: Option<SocketAddr>) -> Result<Option<TokioResolver>, StartError> {
    let failed = |e: hickory_resolver::net::NetError| StartError::Upstream(e.to_string());
    let mut builder = match upstream {
        Some(a) => {
            let mut server = NameServerConfig::udp_and_tcp(a.ip());
            for c in &mut server.connections {
                c.port = a.port();
            }
            let config = ResolverConfig::from_name_servers(vec![server]);
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        }
        None => match TokioResolver::builder_tokio() {
            Ok(b) => b,
            Err(error) => {
                tracing::warn!(%error, "no resolver of the system: foreign names get SERVFAIL");
                return Ok(None);
            }
        },
    };
    let options = builder.options_mut();
    // Names come fully qualified; a search list here would look for them in the wrong place.
    options.ndots = 0;
    options.use_hosts_file = hickory_resolver::config::ResolveHosts::Never;
    builder.build().map(Some).map_err(failed)
}

struct Handler {
    names: watch::Receiver<Arc<Names>>,
    resolver: Option<TokioResolver>,
}

/// What to send back.
#[derive(Default)]
struct Answer {
    code: ResponseCode,
    authoritative: bool,
    records: Vec<Record>,
    /// Says how long a denial may be remembered.
    soa: Option<Record>,
    /// What whoever asked will ask next.
    additional: Vec<Record>,
}

impl Answer {
    fn code(code: ResponseCode) -> Self {
        Self { code, ..Self::default() }
    }
}

/// The start of a zone: its minimum is how long a denial may be remembered (RFC 2308, section 5).
fn soa(zone: &str) -> Option<Record> {
    let zone = Name::from_ascii(format!("{zone}.")).ok()?;
    let server = Name::from_ascii("ns.flotilla.internal.").ok()?;
    let mail = Name::from_ascii("hostmaster.flotilla.internal.").ok()?;
    let data = SOA::new(server, mail, 1, 60, 60, 60, TTL);
    Some(Record::from_rdata(zone, TTL, RData::SOA(data)))
}

fn addresses(name: &Name, host: &Host, kind: RecordType) -> Vec<Record> {
    host.addresses
        .iter()
        .filter_map(|ip| match (ip, kind) {
            (IpAddr::V4(a), RecordType::A | RecordType::ANY) => Some(RData::A(A(*a))),
            (IpAddr::V6(a), RecordType::AAAA | RecordType::ANY) => Some(RData::AAAA(AAAA(*a))),
            _ => None,
        })
        .map(|data| Record::from_rdata(name.clone(), TTL, data))
        .collect()
}

impl Handler {
    async fn answer(&self, name: &Name, kind: RecordType) -> Answer {
        let text = name.to_ascii().trim_end_matches('.').to_ascii_lowercase();
        let ours = |records: Vec<Record>, zone: Option<&str>| {
            let soa = zone.filter(|_| records.is_empty()).and_then(soa);
            Answer { authoritative: true, records, soa, ..Answer::default() }
        };
        let names = self.names.borrow().clone();
        match names.find(&text) {
            Found::Host(host) => ours(addresses(name, host, kind), zone_of(&text)),
            Found::Service { target, port } if matches!(kind, RecordType::SRV | RecordType::ANY) => {
                let Ok(to) = Name::from_ascii(format!("{target}.")) else {
                    return Answer::code(ResponseCode::ServFail);
                };
                let additional = match names.find(target) {
                    Found::Host(h) => addresses(&to, h, RecordType::ANY),
                    _ => vec![],
                };
                let srv = Record::from_rdata(name.clone(), TTL, RData::SRV(SRV::new(0, 100, port, to)));
                Answer { additional, ..ours(vec![srv], None) }
            }
            Found::Version(v) if kind == RecordType::TXT => {
                let txt = RData::TXT(TXT::new(vec![v.to_owned()]));
                ours(vec![Record::from_rdata(name.clone(), TTL, txt)], None)
            }
            Found::Service { .. } | Found::Version(_) => ours(vec![], zone_of(&text)),
            Found::Empty(zone) => ours(vec![], Some(zone)),
            Found::Missing(zone) => Answer { code: ResponseCode::NXDomain, ..ours(vec![], Some(zone)) },
            Found::Foreign => self.forward(name, kind).await,
        }
    }

    async fn forward(&self, name: &Name, kind: RecordType) -> Answer {
        let Some(resolver) = &self.resolver else { return Answer::code(ResponseCode::ServFail) };
        match tokio::time::timeout(FORWARD_TIMEOUT, resolver.lookup(name.clone(), kind)).await {
            Ok(Ok(found)) => Answer { records: found.answers().to_vec(), ..Answer::default() },
            Ok(Err(e)) if e.is_nx_domain() => Answer::code(ResponseCode::NXDomain),
            Ok(Err(e)) if e.is_no_records_found() => Answer::code(ResponseCode::NoError),
            Ok(Err(_)) | Err(_) => Answer::code(ResponseCode::ServFail),
        }
    }
}

#[async_trait::async_trait]
impl RequestHandler for Handler {
    async fn handle_request<R: ResponseHandler, T: Time>(
        &self,
        request: &Request,
        mut reply: R,
    ) -> ResponseInfo {
        let answer = match request.request_info() {
            Ok(info) => {
                let name = Name::from(info.query.name());
                self.answer(&name, info.query.query_type()).await
            }
            Err(_) => Answer::code(ResponseCode::FormErr),
        };
        let mut metadata = Metadata::response_from_request(&request.metadata);
        metadata.response_code = answer.code;
        metadata.authoritative = answer.authoritative;
        metadata.recursion_available = self.resolver.is_some();
        let mut builder = MessageResponseBuilder::from_message_request(request);
        let edns = request.edns.as_ref().map(|asked| {
            let mut e = Edns::new();
            // Without fragments on any path (DNS flag day 2020).
            e.set_max_payload(MAX_PAYLOAD).set_version(0);
            if asked.version() > 0 {
                // RFC 6891, section 6.1.3.
                metadata.response_code = ResponseCode::BADVERS;
            }
            e
        });
        if let Some(e) = &edns {
            builder.edns(e);
        }
        let known = metadata.response_code != ResponseCode::BADVERS;
        let answer = if known { answer } else { Answer::default() };
        let response = builder.build(
            metadata,
            answer.records.iter(),
            std::iter::empty(),
            answer.soa.iter(),
            answer.additional.iter(),
        );
        match reply.send_response(response).await {
            Ok(info) => info,
            Err(error) => {
                tracing::debug!(%error, "an answer was not sent");
                let mut failed = metadata;
                failed.response_code = ResponseCode::ServFail;
                ResponseInfo::from(hickory_proto::op::Header { metadata: failed, counts: Default::default() })
            }
        }
    }
}

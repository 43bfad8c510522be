//! Listeners of ingress and egress gateways, from the `Gateway` documents that select them.
//!
//! Servers of one port (and `bind`) share a listener: plain HTTP servers one route configuration, TLS servers one
//! chain per set of server names. Of several plain servers on a port only those of the oldest
//! protocol family are served, as two cannot share a socket.
//!
//! With `enableQuicListeners` the HTTPS servers of a port have a second listener on the same port of UDP.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use mesh_model::{
    authored::{Gateway, Server, ServerTlsMode, ServerTlsSettings, TlsProtocol, TlsSettings},
    proxy::{
        CertificatePin, ClientCertificate, Direction, DownstreamTls, FilterChain, FilterChainMatch,
        HttpCodec, Listener, NetworkFilter, QuicOptions, SecretRef, StringMatch, TLS_CURVES,
        TlsServerOptions, TlsVersion, TransportProtocol, Validation, is_cipher_expression,
    },
    registry::Protocol,
};

use super::{
    Ctx, Generated,
    common::{chain, listener},
    gateway_routes,
    http::Scope,
    rbac, tcp,
};
use crate::config::Doc;

/// A server with the document that it is in.
#[derive(Clone, Copy)]
pub(super) struct Served<'a> {
    pub(super) gateway: &'a Doc<Gateway>,
    pub(super) server: &'a Server,
    pub(super) number: u16,
    pub(super) protocol: Protocol,
}

impl Served<'_> {
    /// `namespace/name`.
    pub(super) fn key(&self) -> String {
        format!("{}/{}", self.gateway.namespace, self.gateway.name)
    }

    fn tls(&self) -> Option<&ServerTlsSettings> {
        self.server.tls.as_ref().filter(|_| self.protocol.is_tls())
    }

    /// Hosts without their namespace part.
    pub(super) fn hosts(&self) -> impl Iterator<Item = (&str, &str)> {
        self.server.hosts.iter().map(|h| h.split_once('/').unwrap_or(("*", h)))
    }
}

pub(super) fn generate(ctx: &Ctx<'_>, out: &mut Generated) {
    // By address as well: a server may have one of its own.
    let mut ports: BTreeMap<(u16, Option<IpAddr>), Vec<Served<'_>>> = BTreeMap::new();
    for gateway in &ctx.world.config.gateways {
        if !gateway.is_served_by(&ctx.proxy.namespace, &ctx.proxy.labels) {
            continue;
        }
        for server in &gateway.spec.servers {
            let Some(port) = &server.port else { continue };
            let Ok(number) = u16::try_from(port.number) else { continue };
            let protocol = Protocol::parse(&port.protocol).unwrap_or(Protocol::Tcp);
            let bind = server.bind.parse().ok();
            ports.entry((number, bind)).or_default().push(Served { gateway, server, number, protocol });
        }
    }
    for ((number, bind), servers) in ports {
        for l in port_listeners(ctx, out, number, bind, &servers) {
            out.listener(l);
        }
    }
}

/// Where the proxy really listens: a service in front of the gateway may map ports.
fn bound_port(ctx: &Ctx<'_>, number: u16) -> u16 {
    ctx.world
        .index
        .instances(&ctx.proxy.addresses)
        .into_iter()
        .find(|(e, i)| {
            e.service.namespace == ctx.proxy.namespace
                && e.service.ports.iter().any(|p| p.port == number && p.name == i.service_port)
        })
        .map_or(number, |(_, i)| i.port)
}

/// Whether a server is also one of HTTP/3: strangers may come to it, and TLS ends here.
pub(super) fn has_http3(ctx: &Ctx<'_>, s: &Served<'_>) -> bool {
    ctx.world.config.mesh.enable_quic_listeners
        && s.protocol == Protocol::Https
        && s.tls().is_some_and(|t| {
            t.max_protocol_version != TlsProtocol::V1_2
                && matches!(
                    t.mode,
                    ServerTlsMode::Simple | ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual
                )
        })
}

/// The same chain over QUIC.
fn over_quic(mut c: FilterChain) -> FilterChain {
    c.matches.transport_protocol = None;
    if let Some(tls) = &mut c.tls {
        tls.alpn = vec!["h3".to_owned()];
        tls.min_version = TlsVersion::V1_3;
        tls.options.ciphers.clear();
    }
    for f in &mut c.filters {
        if let NetworkFilter::Http(h) = f {
            h.codec = HttpCodec::Http3;
        }
    }
    c
}

fn port_listeners(
    ctx: &Ctx<'_>,
    out: &mut Generated,
    number: u16,
    own_address: Option<IpAddr>,
    servers: &[Served<'_>],
) -> Vec<Listener> {
    let bind = bound_port(ctx, number);
    let ip = own_address.unwrap_or(ctx.proxy.bind());
    let mut l = listener(format!("{ip}_{bind}"), SocketAddr::new(ip, bind), Direction::Unspecified);
    l.mixer = ctx.mixer();
    l.proxy_protocol = ctx.topology().proxy_protocol;

    let plain: Vec<Served<'_>> = servers.iter().filter(|s| s.tls().is_none()).copied().collect();
    if let Some(first) = plain.first() {
        if first.protocol.is_http() {
            let same: Vec<Served<'_>> = plain.iter().filter(|s| s.protocol.is_http()).copied().collect();
            let name = match own_address {
                None => format!("http.{number}"),
                Some(ip) => format!("http.{number}.{ip}"),
            };
            let routes = gateway_routes::generate(ctx, &name, number, &same);
            let filter = ctx.edge_filter(&format!("gateway_{number}"), &routes);
            out.route(routes);
            l.filter_chains.push(chain(name, FilterChainMatch::default(), vec![filter]));
        } else {
            l.filter_chains.extend(tcp_chains(ctx, first));
        }
    }
    // Istio's name for it.
    let name = format!("udp_{ip}_{bind}");
    let mut quic = listener(name, SocketAddr::new(ip, bind), Direction::Unspecified);
    quic.quic = Some(QuicOptions::default());
    for s in servers.iter().filter(|s| s.tls().is_some()) {
        for c in tls_chains(ctx, out, s) {
            if has_http3(ctx, s) {
                tcp::push(&mut quic.filter_chains, over_quic(c.clone()));
            }
            tcp::push(&mut l.filter_chains, c);
        }
    }
    l.inspect_tls = l
        .filter_chains
        .iter()
        .any(|c| !c.matches.server_names.is_empty() || c.matches.transport_protocol.is_some());
    // Plain and TLS servers on one port are told apart by the first bytes.
    if l.inspect_tls {
        for c in &mut l.filter_chains {
            if c.tls.is_none() && c.matches == FilterChainMatch::default() {
                c.matches.transport_protocol = Some(TransportProtocol::RawBuffer);
            }
        }
    }
    [l, quic].into_iter().filter(|l| !l.filter_chains.is_empty()).collect()
}

fn gateways(s: &Served<'_>) -> BTreeSet<String> {
    BTreeSet::from([s.key()])
}

/// Bytes that come in are let pass by policies first.
fn guarded(ctx: &Ctx<'_>, f: NetworkFilter) -> Vec<NetworkFilter> {
    let mut out = rbac::guards(ctx);
    out.push(f);
    out
}

/// Chains of a TCP server: the first `tcp` route of a bound document whose match fits.
fn tcp_chains(ctx: &Ctx<'_>, s: &Served<'_>) -> Vec<FilterChain> {
    let own = gateways(s);
    let scope = Scope::Gateways(&own);
    let mut out = Vec::new();
    for (doc, _) in ctx.world.virtual_services().filter(|(d, _)| scope.bound(d)) {
        for r in &doc.spec.tcp {
            let name = format!("{}/{}", doc.namespace, doc.name);
            let Some(f) = tcp::filter(ctx, &doc.namespace, s.number, &r.route, &name) else { continue };
            if r.matches.is_empty() {
                tcp::push(&mut out, chain(name, FilterChainMatch::default(), guarded(ctx, f)));
                return out;
            }
            for m in &r.matches {
                if (m.port == 0 || m.port == u32::from(s.number))
                    && scope.source_matches(
                        ctx,
                        &doc.namespace,
                        &m.gateways,
                        &m.source_labels,
                        &m.source_namespace,
                    )
                {
                    let matches = FilterChainMatch {
                        destination_prefixes: tcp::prefixes(&m.destination_subnets),
                        ..FilterChainMatch::default()
                    };
                    tcp::push(&mut out, chain(name.clone(), matches, guarded(ctx, f.clone())));
                }
            }
        }
    }
    out
}

/// Server names of a server; none means any.
fn server_names(s: &Served<'_>) -> Vec<String> {
    let names: Vec<String> = s.hosts().map(|(_, h)| h.to_ascii_lowercase()).collect();
    if names.iter().any(|n| n == "*") { vec![] } else { names }
}

fn tls_match(server_names: Vec<String>) -> FilterChainMatch {
    FilterChainMatch {
        server_names,
        transport_protocol: Some(TransportProtocol::Tls),
        ..FilterChainMatch::default()
    }
}

fn tls_chains(ctx: &Ctx<'_>, out: &mut Generated, s: &Served<'_>) -> Vec<FilterChain> {
    let Some(settings) = s.tls() else { return vec![] };
    match settings.mode {
        ServerTlsMode::Passthrough => passthrough_chains(ctx, s),
        ServerTlsMode::AutoPassthrough => {
            let mut chains = super::sni::auto_passthrough(ctx, out, s);
            for c in &mut chains {
                c.filters.splice(0..0, rbac::guards(ctx));
            }
            chains
        }
        _ => {
            let Some(tls) = termination(ctx, settings, s.protocol == Protocol::Https) else { return vec![] };
            let filters = if s.protocol == Protocol::Https {
                let port = s.server.port.as_ref().map(|p| p.name.as_str()).unwrap_or_default();
                let name = format!("https.{}.{port}.{}.{}", s.number, s.gateway.name, s.gateway.namespace);
                let routes = gateway_routes::generate(ctx, &name, s.number, std::slice::from_ref(s));
                let filter = ctx.edge_filter(&format!("gateway_{}", s.number), &routes);
                out.route(routes);
                vec![filter]
            } else {
                // Bytes inside the session that ends here.
                match tcp_chains(ctx, s).into_iter().next() {
                    Some(c) => c.filters,
                    None => return vec![],
                }
            };
            let name = format!("{}-{}", s.key(), s.number);
            vec![FilterChain { tls: Some(tls), ..chain(name, tls_match(server_names(s)), filters) }]
        }
    }
}

/// Chains of a server that only routes by server name.
fn passthrough_chains(ctx: &Ctx<'_>, s: &Served<'_>) -> Vec<FilterChain> {
    let own = gateways(s);
    let scope = Scope::Gateways(&own);
    let mut out = Vec::new();
    for (doc, _) in ctx.world.virtual_services().filter(|(d, _)| scope.bound(d)) {
        for r in &doc.spec.tls {
            let name = format!("{}/{}", doc.namespace, doc.name);
            let Some(f) = tcp::filter(ctx, &doc.namespace, s.number, &r.route, &name) else { continue };
            for m in &r.matches {
                let here = (m.port == 0 || m.port == u32::from(s.number))
                    && scope.source_matches(
                        ctx,
                        &doc.namespace,
                        &m.gateways,
                        &m.source_labels,
                        &m.source_namespace,
                    );
                let names: Vec<String> = m
                    .sni_hosts
                    .iter()
                    .map(|h| h.to_ascii_lowercase())
                    .filter(|h| s.hosts().any(|(_, own)| crate::hosts::overlaps(own, h)))
                    .collect();
                if here && !names.is_empty() {
                    tcp::push(&mut out, chain(name.clone(), tls_match(names), guarded(ctx, f.clone())));
                }
            }
        }
    }
    out
}

/// Certificates that alone a client may show. What cannot be read fits none: it must not open what it was to close.
fn pins(t: &ServerTlsSettings) -> Vec<CertificatePin> {
    let key = |text: &String| {
        let bytes = STANDARD.decode(text).ok().and_then(|b| <[u8; 32]>::try_from(b).ok());
        bytes.map(CertificatePin::PublicKey)
    };
    let none = CertificatePin::Whole([0; 32]);
    let hashes = t.verify_certificate_hash.iter().map(|h| CertificatePin::whole(h));
    hashes.chain(t.verify_certificate_spki.iter().map(key)).map(|p| p.unwrap_or(none)).collect()
}

pub(super) fn termination(ctx: &Ctx<'_>, t: &ServerTlsSettings, http: bool) -> Option<DownstreamTls> {
    let sds = |name: &str, suffix: &str| SecretRef::Sds(format!("kubernetes://{name}{suffix}"));
    let mut credentials: Vec<&String> = [&t.credential_name].into_iter().chain(&t.credential_names).collect();
    credentials.retain(|c| !c.is_empty());
    credentials.dedup();
    let credential = credentials.first();
    let mut options = TlsServerOptions::default();
    let (certificate, roots) = if t.mode == ServerTlsMode::IstioMutual {
        (ctx.own_certificate(), Some(ctx.mesh_roots()))
    } else if let Some(name) = credential {
        let ca = if t.ca_cert_credential_name.is_empty() {
            sds(name, "-cacert")
        } else {
            sds(&t.ca_cert_credential_name, "")
        };
        options.certificates = credentials.iter().skip(1).map(|name| sds(name, "")).collect();
        (sds(name, ""), Some(ca))
    } else {
        let (chain, key) = match t.tls_certificates.first() {
            Some(c) => (&c.server_certificate, &c.private_key),
            None => (&t.server_certificate, &t.private_key),
        };
        // Validation has refused it; a listener without a certificate would serve nobody.
        if chain.is_empty() || key.is_empty() {
            return None;
        }
        let files =
            |chain: &str, key: &str| SecretRef::Files { chain: chain.to_owned(), key: key.to_owned() };
        // The server's own count; a certificate's do where it has none.
        let mut ca =
            [&t.ca_certificates].into_iter().chain(t.tls_certificates.iter().map(|c| &c.ca_certificates));
        let ca = ca.find(|c| !c.is_empty()).map(|c| files(c, ""));
        let more = t.tls_certificates.iter().skip(1);
        options.certificates = more.map(|c| files(&c.server_certificate, &c.private_key)).collect();
        (SecretRef::Files { chain: chain.clone(), key: key.clone() }, ca)
    };
    let files = matches!(&roots, Some(SecretRef::Files { .. }));
    let validation = || Validation {
        trusted: roots.clone(),
        sans: t.subject_alt_names.iter().map(StringMatch::exact).collect(),
        crl: (files && !t.ca_crl.is_empty()).then(|| t.ca_crl.clone()),
    };
    let client_certificate = match t.mode {
        ServerTlsMode::Mutual | ServerTlsMode::IstioMutual => {
            // Without roots nobody could be verified.
            roots.as_ref()?;
            ClientCertificate::Required(validation())
        }
        ServerTlsMode::OptionalMutual => {
            roots.as_ref()?;
            ClientCertificate::Optional(validation())
        }
        _ => ClientCertificate::None,
    };
    let mesh = &ctx.world.config.mesh;
    let defaults = mesh.tls_defaults.as_ref().filter(|_| t.mode != ServerTlsMode::IstioMutual);
    let lowest = match (t.min_protocol_version, defaults) {
        (TlsProtocol::Auto, Some(d)) => d.min_protocol_version,
        (own, _) => own,
    };
    let min_version = match lowest {
        TlsProtocol::V1_3 => TlsVersion::V1_3,
        // Its clients are of the mesh.
        TlsProtocol::Auto if t.mode == ServerTlsMode::IstioMutual => TlsVersion::V1_3,
        _ => TlsVersion::V1_2,
    };
    if t.mode != ServerTlsMode::IstioMutual {
        options.max_version = (t.max_protocol_version == TlsProtocol::V1_2).then_some(TlsVersion::V1_2);
        // A proxy refuses a listener for a name that it does not know.
        let or = |own: &'_ [String], of: fn(&TlsSettings) -> &Vec<String>| match defaults {
            Some(d) if own.is_empty() => of(d).clone(),
            _ => own.to_vec(),
        };
        options.ciphers = known_names(&or(&t.cipher_suites, |d| &d.cipher_suites), is_cipher_expression);
        options.pins = pins(t);
        options.curves = known_names(&or(&t.ecdh_curves, |d| &d.ecdh_curves), |c| TLS_CURVES.contains(&c));
    }
    let mut alpn = if http { vec!["h2".to_owned(), "http/1.1".to_owned()] } else { vec![] };
    if t.mode == ServerTlsMode::IstioMutual {
        // What sidecars offer when they speak neither HTTP version by ALPN; a server that offers
        // protocols and shares none with its client refuses it (RFC 7301, section 3.2).
        alpn.push("istio".to_owned());
    }
    Some(DownstreamTls { certificate, client_certificate, alpn, min_version, options })
}

/// Names that are known, each once.
pub(super) fn known_names(list: &[String], known: impl Fn(&str) -> bool) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for name in list.iter().filter(|n| known(n)) {
        if !out.contains(name) {
            out.push(name.clone());
        }
    }
    out
}

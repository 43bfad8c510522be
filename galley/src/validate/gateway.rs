//! Rules of Gateway.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use mesh_model::{
    authored::{Gateway, Server, ServerTlsMode, ServerTlsSettings, TlsProtocol},
    proxy::{CertificatePin, TLS_CIPHERS, TLS_CURVES, is_cipher_expression},
    registry::Protocol,
};

use super::common::{self, Findings};
use crate::path::Path;

pub(super) fn check(g: &Gateway, name: &str, p: &Path<'_>, out: &mut Findings) {
    if !common::is_dns_label(name) {
        let root = Path::root();
        out.error(
            &root.key("metadata").key("name"),
            format!("{name:?} is not the name of a Gateway: up to 63 letters, digits and '-', without dots"),
        );
    }
    common::labels(&g.selector, &p.key("selector"), out);
    let servers = p.key("servers");
    if g.servers.is_empty() {
        out.error(&servers, "at least one server is required");
    }
    for (i, s) in g.servers.iter().enumerate() {
        let at = servers.index(i);
        server(s, &at, out);
        let name = s.port.as_ref().map_or("", |p| p.name.as_str());
        if !name.is_empty() && g.servers[..i].iter().any(|o| o.port.as_ref().is_some_and(|p| p.name == name))
        {
            out.error(&at.key("port").key("name"), format!("port name {name:?} is used twice"));
        }
    }
}

fn server(s: &Server, p: &Path<'_>, out: &mut Findings) {
    let hosts = p.key("hosts");
    if s.hosts.is_empty() {
        out.error(&hosts, "at least one host is required");
    }
    for (i, h) in s.hosts.iter().enumerate() {
        let at = hosts.index(i);
        let host = match h.split_once('/') {
            None => h.as_str(),
            Some((ns, host)) => {
                if !matches!(ns, "." | "*") && !common::is_dns_label(ns) {
                    out.error(&at, format!("{ns:?} is not a namespace, '.' or '*'"));
                }
                host
            }
        };
        common::scoped_host(host, true, &at, out);
    }
    out.unenforced(!s.default_endpoint.is_empty(), p, "defaultEndpoint");
    let unix = s.bind.starts_with("unix://");
    if unix {
        out.error(&p.key("bind"), "unix sockets are not supported yet");
    } else if !s.bind.is_empty() && s.bind.parse::<std::net::IpAddr>().is_err() {
        out.error(&p.key("bind"), format!("{:?} is not an IP address", s.bind));
    }
    let Some(port) = &s.port else {
        out.error(&p.key("port"), "a port is required");
        return;
    };
    let at = p.key("port");
    if !unix {
        common::port(port.number, &at.key("number"), out);
    }
    if port.name.is_empty() {
        out.error(&at.key("name"), "a port needs a name");
    }
    if port.target_port != 0 {
        out.error(&at.key("targetPort"), "a Gateway listens on number; remove targetPort");
    }
    let Some(protocol) = common::protocol(&port.protocol, &at.key("protocol"), out) else { return };
    match (&s.tls, protocol) {
        (None, Protocol::Https | Protocol::Tls) => {
            out.error(&p.key("tls"), format!("protocol {} needs tls settings", port.protocol));
        }
        (Some(t), proto) if proto.is_http() => {
            let only_redirect = ServerTlsSettings { https_redirect: t.https_redirect, ..Default::default() };
            if *t != only_redirect {
                out.error(
                    &p.key("tls"),
                    format!("protocol {} is plain text: only httpsRedirect is allowed", port.protocol),
                );
            }
        }
        (Some(t), Protocol::Https | Protocol::Tls) => tls(t, &p.key("tls"), out),
        (Some(_), _) => {
            out.error(&p.key("tls"), format!("protocol {} cannot have tls settings", port.protocol));
        }
        (None, _) => {}
    }
}

/// Certificates that are given as paths.
fn certificates(t: &ServerTlsSettings, p: &Path<'_>, out: &mut Findings) {
    let pair = |certificate: &str, key: &str, p: &Path<'_>, out: &mut Findings| {
        for (v, field) in [(certificate, "serverCertificate"), (key, "privateKey")] {
            if v.is_empty() {
                out.error(&p.key(field), format!("{field} is required"));
            }
        }
    };
    if t.tls_certificates.is_empty() {
        pair(&t.server_certificate, &t.private_key, p, out);
    }
    let list = p.key("tlsCertificates");
    for (i, c) in t.tls_certificates.iter().enumerate() {
        pair(&c.server_certificate, &c.private_key, &list.index(i), out);
    }
    let verifies = matches!(t.mode, ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual);
    let roots = t.tls_certificates.iter().map(|c| &c.ca_certificates).chain([&t.ca_certificates]);
    if verifies && roots.into_iter().all(String::is_empty) && t.ca_cert_credential_name.is_empty() {
        out.error(&p.key("caCertificates"), "the roots that clients are verified with are required");
    }
}

/// TLS of a server, also of a Sidecar's ingress listener.
pub(super) fn tls(t: &ServerTlsSettings, p: &Path<'_>, out: &mut Findings) {
    let files = !t.server_certificate.is_empty() || !t.private_key.is_empty();
    let sources = usize::from(files)
        + usize::from(!t.credential_name.is_empty())
        + usize::from(!t.credential_names.is_empty())
        + usize::from(!t.tls_certificates.is_empty());
    if sources > 1 {
        out.error(
            p,
            "only one of serverCertificate, credentialName, credentialNames and tlsCertificates is allowed",
        );
    }
    match t.mode {
        ServerTlsMode::Simple | ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual => {
            if sources == 0 {
                out.error(
                    p,
                    "a certificate is required: credentialName, or serverCertificate and privateKey",
                );
            } else if files || !t.tls_certificates.is_empty() {
                certificates(t, p, out);
            }
        }
        ServerTlsMode::IstioMutual => {
            if sources > 0 || !t.ca_certificates.is_empty() {
                out.error(p, "mode ISTIO_MUTUAL uses the mesh identity: certificates cannot be set");
            }
        }
        ServerTlsMode::Passthrough | ServerTlsMode::AutoPassthrough => {
            if sources > 0 {
                out.warning(p, "TLS is not terminated in this mode: certificates are without effect");
            }
        }
    }
    if t.https_redirect {
        out.warning(&p.key("httpsRedirect"), "without effect on a server that is not plain HTTP");
    }
    for (v, field) in
        [(t.min_protocol_version, "minProtocolVersion"), (t.max_protocol_version, "maxProtocolVersion")]
    {
        if matches!(v, TlsProtocol::V1_0 | TlsProtocol::V1_1) {
            out.error(&p.key(field), "TLS 1.0 and 1.1 are not supported: they are broken");
        }
    }
    if t.min_protocol_version == TlsProtocol::V1_3 && t.max_protocol_version == TlsProtocol::V1_2 {
        out.error(&p.key("maxProtocolVersion"), "is lower than minProtocolVersion");
    }
    let suites = p.key("cipherSuites");
    for (i, c) in t.cipher_suites.iter().enumerate() {
        if !is_cipher_expression(c) {
            out.warning(&suites.index(i), format!("{c:?} is not a cipher suite: ignored"));
        } else if t.cipher_suites[..i].contains(c) {
            out.warning(&suites.index(i), format!("{c:?} is there twice"));
        }
    }
    if !t.ca_crl.is_empty() && !t.credential_name.is_empty() {
        out.error(&p.key("caCrl"), "with credentialName the revocation list is part of the secret");
    }
    if !t.ca_crl.is_empty() && t.mode == ServerTlsMode::Simple {
        out.error(&p.key("caCrl"), "mode SIMPLE verifies no clients: a revocation list has no meaning");
    }
    let named = |c: &&String| TLS_CIPHERS.contains(&c.as_str());
    let had = |c: &String| TLS_CIPHERS[..6].contains(&c.as_str());
    // What is no name may stand for any.
    if t.cipher_suites.iter().all(|c| named(&c) || !is_cipher_expression(c))
        && t.cipher_suites.iter().any(|c| named(&c))
        && !t.cipher_suites.iter().any(had)
    {
        let message = format!("the engine has none of these suites, but {}", TLS_CIPHERS[..6].join(", "));
        if t.max_protocol_version == TlsProtocol::V1_2 {
            out.error(&suites, message);
        } else {
            out.warning(&suites, message + ": it serves clients of TLS 1.3 alone");
        }
    }
    let curves = p.key("ecdhCurves");
    for (i, c) in t.ecdh_curves.iter().enumerate() {
        if !TLS_CURVES.contains(&c.as_str()) {
            out.warning(&curves.index(i), format!("{c:?} is not a curve: ignored"));
        } else if t.ecdh_curves[..i].contains(c) {
            out.warning(&curves.index(i), format!("{c:?} is there twice"));
        }
    }
    if !t.ecdh_curves.is_empty() && !t.ecdh_curves.iter().any(|c| TLS_CURVES[..4].contains(&c.as_str())) {
        let message = format!("the engine has none of these curves, but {}", TLS_CURVES[..4].join(", "));
        out.error(&curves, message);
    }
    for (n, field) in
        [(t.credential_names.len(), "credentialNames"), (t.tls_certificates.len(), "tlsCertificates")]
    {
        if n > 2 {
            out.error(&p.key(field), "two certificates at most: one of RSA and one of ECDSA");
        }
    }
    pins(t, p, out);
    if t.insecure_skip_verify.is_some() {
        out.error(&p.key("insecureSkipVerify"), "insecureSkipVerify is not supported yet");
    }
}

/// Certificates that alone a client may show, by their hashes.
fn pins(t: &ServerTlsSettings, p: &Path<'_>, out: &mut Findings) {
    let (hashes, keys) = (p.key("verifyCertificateHash"), p.key("verifyCertificateSpki"));
    for (i, h) in t.verify_certificate_hash.iter().enumerate() {
        if CertificatePin::whole(h).is_none() {
            out.error(
                &hashes.index(i),
                format!("{h:?} is no SHA-256 of a certificate: 64 hexadecimal digits"),
            );
        }
    }
    for (i, k) in t.verify_certificate_spki.iter().enumerate() {
        if STANDARD.decode(k).ok().is_none_or(|b| b.len() != 32) {
            out.error(&keys.index(i), format!("{k:?} is no SHA-256 of a public key: base64 of 32 bytes"));
        }
    }
    let asks =
        matches!(t.mode, ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual | ServerTlsMode::IstioMutual);
    for (set, at) in
        [(!t.verify_certificate_hash.is_empty(), hashes), (!t.verify_certificate_spki.is_empty(), keys)]
    {
        if set && !asks {
            out.warning(
                &at,
                "without effect: clients are asked for a certificate with mode MUTUAL or OPTIONAL_MUTUAL",
            );
        }
        if set && t.mode == ServerTlsMode::IstioMutual {
            out.warning(&at, "without effect: ISTIO_MUTUAL goes by the identities of the mesh");
        }
    }
}

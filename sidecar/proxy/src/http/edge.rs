//! What a proxy writes about a request into its headers, and what it must not believe.
//!
//! At the edge of the mesh (`use_remote_address`) the client is a stranger: `x-envoy-*`, `x-forwarded-proto` and
//! request IDs of its own are dropped. Inside, they come from a proxy of the mesh and are kept.

use std::{fmt::Write as _, net::IpAddr};

use base64::Engine as _;
use mesh_identity::PeerIdentity;
use mesh_model::proxy::{ClientCertParts, ForwardClientCert, TraceProvider};
use mesh_telemetry::trace::{TraceContext, TraceHeaders};
use rustls::pki_types::CertificateDer;

use super::{
    headers::{HeaderId, Headers},
    message::RequestHead,
    record::Record,
};
use crate::{config::listener::HttpManager, worker::connection::Connection};

/// Prepares the headers of a request.
pub(crate) fn prepare(conn: &Connection, manager: &HttpManager, head: &mut RequestHead, rec: &mut Record) {
    let edge = manager.config.use_remote_address;
    if edge {
        head.headers.retain(|_, name, _| !(name.len() >= 8 && name[..8].eq_ignore_ascii_case(b"x-envoy-")));
    }
    // A caller of the mesh has been through this at its own proxy; what comes in may come from anywhere.
    if !conn.outbound() && head.headers.iter().any(|(_, name, _)| is_lookalike(name)) {
        head.headers.retain(|_, name, _| !is_lookalike(name));
    }
    rec.remote = forwarded_for(conn, manager, &mut head.headers);
    if edge {
        // Of a stranger's own there is none left.
        if rec.remote == conn.peer.ip() {
            head.headers.push_id(HeaderId::XEnvoyExternalAddress, conn.peer_text().as_bytes());
        } else {
            head.headers.push_id(HeaderId::XEnvoyExternalAddress, rec.remote.to_string().as_bytes());
        }
    }
    if edge && manager.config.trusted_hops == 0 {
        head.headers.remove_id(HeaderId::XForwardedProto);
    }
    match head.headers.get_id(HeaderId::XForwardedProto) {
        Some(p) => head.https = p.eq_ignore_ascii_case(b"https"),
        None => {
            head.https = conn.tls && (edge || !conn.mtls());
            head.headers.push_id(HeaderId::XForwardedProto, if head.https { b"https" } else { b"http" });
        }
    }
    if manager.config.headers.forwarded_port {
        let trusted = !edge || manager.config.trusted_hops > 0;
        if !(trusted && head.headers.has(HeaderId::XForwardedPort)) {
            head.headers.set_number(HeaderId::XForwardedPort, conn.local.port().into());
        }
    }
    let keep_id = head.headers.has(HeaderId::XRequestId) && (!edge || manager.config.preserve_request_id);
    if !keep_id && manager.config.headers.request_id {
        let id = uuid(conn.worker.rng.next(), conn.worker.rng.next());
        head.headers.set_id(HeaderId::XRequestId, &id);
    }
    client_cert(conn, manager, &mut head.headers);
    trace(conn, manager, &mut head.headers, rec);
}

/// Whether a name differs from one that proxies of the mesh vouch for in `_` for `-` alone. CGI and its heirs read both
/// as one name, so that `x_forwarded_client_cert` would be believed like the header that nobody can forge.
fn is_lookalike(name: &[u8]) -> bool {
    const VOUCHED: [&[u8]; 4] = [b"x-envoy-", b"x-forwarded-", b"x-request-id", b"x-b3-"];
    let same = |(a, b): (&u8, &u8)| a.eq_ignore_ascii_case(b) || (*a == b'_' && *b == b'-');
    name.contains(&b'_')
        && VOUCHED.iter().any(|v| name.len() >= v.len() && name.iter().zip(v.iter()).all(same))
}

/// Maintains `x-forwarded-for`; returns the client's address.
fn forwarded_for(conn: &Connection, manager: &HttpManager, headers: &mut Headers) -> IpAddr {
    let peer = conn.peer.ip();
    let hops = manager.config.trusted_hops as usize;
    let edge = manager.config.use_remote_address;
    let back = if edge { hops } else { hops + 1 };
    let mut remote = peer;
    if back > 0
        && let Some(all) = headers.joined(HeaderId::XForwardedFor.name().as_bytes())
        && let Some(address) = all.rsplit(|b| *b == b',').nth(back - 1)
        && let Some(ip) = std::str::from_utf8(address).ok().and_then(|s| s.trim().parse().ok())
    {
        remote = ip;
    }
    if edge {
        let mut value = headers
            .joined(HeaderId::XForwardedFor.name().as_bytes())
            .map_or_else(Vec::new, |v| v.into_owned());
        if !value.is_empty() {
            value.push(b',');
        }
        value.extend_from_slice(conn.peer_text().as_bytes());
        headers.set_id(HeaderId::XForwardedFor, &value);
    }
    remote
}

/// `x-forwarded-client-cert` (Envoy's format). Values come from a verified certificate, yet its subject is free
/// text: quotes and backslashes are escaped so that it cannot add elements.
fn client_cert(conn: &Connection, manager: &HttpManager, headers: &mut Headers) {
    let mode = manager.config.forward_client_cert;
    let identity = conn.identity.as_deref().filter(|_| conn.tls);
    if mode == ForwardClientCert::AlwaysForwardOnly {
        return;
    }
    let Some(identity) = identity else {
        headers.remove_id(HeaderId::XForwardedClientCert);
        return;
    };
    match mode {
        ForwardClientCert::Sanitize => headers.remove_id(HeaderId::XForwardedClientCert),
        ForwardClientCert::ForwardOnly | ForwardClientCert::AlwaysForwardOnly => {}
        ForwardClientCert::AppendForward | ForwardClientCert::SanitizeSet => {
            let v = conn
                .client_cert
                .get_or_init(|| cert_element(conn, identity, manager.config.headers.client_cert));
            if mode == ForwardClientCert::AppendForward
                && let Some(old) = headers.joined(HeaderId::XForwardedClientCert.name().as_bytes())
            {
                let mut joined = old.into_owned();
                joined.push(b',');
                joined.extend_from_slice(v.as_bytes());
                headers.set_id(HeaderId::XForwardedClientCert, &joined);
            } else {
                headers.set_id(HeaderId::XForwardedClientCert, v.as_bytes());
            }
        }
    }
}

/// What a connection adds for every one of its requests.
fn cert_element(conn: &Connection, identity: &PeerIdentity, parts: ClientCertParts) -> String {
    element(&conn.worker.options.node.principal, identity, &conn.client_chain, parts)
}

fn element(
    by: &str,
    identity: &PeerIdentity,
    chain: &[CertificateDer<'static>],
    parts: ClientCertParts,
) -> String {
    let mut v = String::new();
    if !by.is_empty() {
        let _ = write!(v, "By={by};");
    }
    v.push_str("Hash=");
    for b in identity.leaf_sha256 {
        let _ = write!(v, "{b:02x}");
    }
    for (name, shown, certs) in [("Cert", parts.cert, chain.get(..1)), ("Chain", parts.chain, Some(chain))] {
        if let Some(certs) = certs.filter(|c| shown && !c.is_empty()) {
            let _ = write!(v, ";{name}=\"");
            certs.iter().for_each(|c| escaped_pem(c, &mut v));
            v.push('"');
        }
    }
    if parts.subject {
        v.push_str(";Subject=\"");
        for c in identity.subject.chars().filter(|c| !c.is_control() && c.is_ascii()) {
            if matches!(c, '"' | '\\') {
                v.push('\\');
            }
            v.push(c);
        }
        v.push('"');
    }
    for (name, shown, sans) in
        [("URI", parts.uri, &identity.uri_sans), ("DNS", parts.dns, &identity.dns_sans)]
    {
        for san in sans.iter().filter(|_| shown) {
            if san.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b',' | b';' | b'"' | b'\\')) {
                let _ = write!(v, ";{name}={san}");
            }
        }
    }
    v
}

/// A certificate as PEM (RFC 7468), with what no header value should have escaped as in a URL.
fn escaped_pem(der: &CertificateDer<'_>, out: &mut String) {
    const LINE: usize = 64;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    out.push_str("-----BEGIN%20CERTIFICATE-----%0A");
    for (n, c) in text.chars().enumerate() {
        if n > 0 && n % LINE == 0 {
            out.push_str("%0A");
        }
        match c {
            '+' => out.push_str("%2B"),
            '/' => out.push_str("%2F"),
            '=' => out.push_str("%3D"),
            c => out.push(c),
        }
    }
    out.push_str("%0A-----END%20CERTIFICATE-----%0A");
}

/// Continues the caller's trace, or begins one, if tracing is on; else headers pass as they are.
fn trace(conn: &Connection, manager: &HttpManager, headers: &mut Headers, rec: &mut Record) {
    let Some(config) = manager.config.tracing.as_deref() else { return };
    let found = TraceHeaders {
        traceparent: headers.str_id(HeaderId::Traceparent),
        b3: headers.str_id(HeaderId::B3),
        b3_trace_id: headers.str_id(HeaderId::XB3TraceId),
        b3_span_id: headers.str_id(HeaderId::XB3SpanId),
        b3_sampled: headers.str_id(HeaderId::XB3Sampled),
        b3_flags: headers.str_id(HeaderId::XB3Flags),
    };
    let (w3c, b3) = (found.traceparent.is_some(), found.b3.is_some() || found.b3_trace_id.is_some());
    let rng = &conn.worker.rng;
    let sample = || (rng.next() % 10_000) < u64::from(config.sampling);
    let context = match TraceContext::parse(&found) {
        Some(c) => {
            let c = c.child(rng.next());
            TraceContext { sampled: Some(c.sampled.unwrap_or_else(sample)), ..c }
        }
        None => {
            // A state without a valid parent belongs to nothing.
            headers.remove_id(HeaderId::Tracestate);
            let id = (u128::from(rng.next()) << 64) | u128::from(rng.next());
            let short = matches!(&config.provider, Some(TraceProvider::Zipkin(z)) if !z.long_ids);
            let id = if short { id & u128::from(u64::MAX) } else { id };
            TraceContext::root(id, rng.next(), sample())
        }
    };
    rec.trace = Some(context);
    if w3c || !b3 {
        headers.set_id(HeaderId::Traceparent, context.to_traceparent().as_bytes());
    }
    if b3 || !w3c {
        headers.remove_id(HeaderId::B3);
        headers.remove_id(HeaderId::XB3ParentSpanId);
        for (name, value) in context.to_b3().into_iter().flatten() {
            headers.set(name.as_bytes(), value.as_bytes());
        }
    }
}

/// A version 4 UUID of two random numbers (RFC 9562 section 5.4), as text. Every request gets one, so it is made
/// by table rather than by formatting.
fn uuid(a: u64, b: u64) -> [u8; 36] {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let (a, b) = ((a & !0xf000) | 0x4000, (b & !(0xc << 60)) | (0x8 << 60));
    let mut out = [b'-'; 36];
    let mut at = 0;
    for byte in a.to_be_bytes().into_iter().chain(b.to_be_bytes()) {
        if matches!(at, 8 | 13 | 18 | 23) {
            at += 1;
        }
        out[at] = HEX[usize::from(byte >> 4)];
        out[at + 1] = HEX[usize::from(byte & 15)];
        at += 2;
    }
    out
}

#[cfg(test)]
mod tests {
    use mesh_model::proxy::ClientCertParts;
    use rustls::pki_types::{CertificateDer, pem::PemObject as _};

    #[test]
    fn text_of_a_certificate_cannot_add_elements() {
        let identity = mesh_identity::PeerIdentity {
            spiffe: None,
            cluster: None,
            uri_sans: vec!["spiffe://a/b".into(), "spiffe://a/b;URI=spiffe://evil".into(), "x\",By=y".into()],
            dns_sans: vec!["a.example".into(), "b;DNS=evil".into()],
            subject: "CN=a\",URI=spiffe://evil\\\r\nx: y\u{e4}".into(),
            leaf_sha256: [0; 32],
            ids: Default::default(),
        };
        let parts = ClientCertParts::default();
        let v = super::element("", &identity, &[], parts);
        let hash = "0".repeat(64);
        assert_eq!(
            v,
            format!(
                "Hash={hash};Subject=\"CN=a\\\",URI=spiffe://evil\\\\x: y\";URI=spiffe://a/b;DNS=a.example"
            )
        );
        // Of a hundred bytes, with all that base64 has.
        let der = CertificateDer::from((0..100u8).map(|n| n.wrapping_mul(7)).collect::<Vec<_>>());
        let none = ClientCertParts { subject: false, uri: false, dns: false, cert: true, chain: true };
        let v = super::element("spiffe://me", &identity, &[der.clone(), der.clone()], none);
        let part = |name: &str| {
            let at = v.find(&format!(";{name}=\"")).unwrap() + name.len() + 3;
            let text = &v[at..at + v[at..].find('"').unwrap()];
            assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b"%-".contains(&b)), "{text}");
            let text = [("%0A", "\n"), ("%20", " "), ("%2B", "+"), ("%2F", "/"), ("%3D", "=")]
                .iter()
                .fold(text.to_owned(), |t, (from, to)| t.replace(from, to));
            CertificateDer::pem_slice_iter(text.as_bytes()).collect::<Result<Vec<_>, _>>().unwrap()
        };
        assert_eq!((part("Cert"), part("Chain")), (vec![der.clone()], vec![der.clone(), der]));
        assert!(v.starts_with("By=spiffe://me;Hash=") && !v.contains("URI="), "{v}");
    }

    #[test]
    fn names_that_servers_take_for_ours() {
        for (name, is) in [
            ("x_forwarded_client_cert", true),
            ("X-Forwarded_For", true),
            ("x_request_id", true),
            ("x_envoy_original_path", true),
            ("x-forwarded-client-cert", false),
            ("x_custom", false),
            ("x_forw", false),
        ] {
            assert_eq!(super::is_lookalike(name.as_bytes()), is, "{name}");
        }
    }

    #[test]
    fn uuids_have_version_and_variant() {
        assert_eq!(&super::uuid(0, 0), b"00000000-0000-4000-8000-000000000000");
        assert_eq!(&super::uuid(u64::MAX, u64::MAX), b"ffffffff-ffff-4fff-bfff-ffffffffffff");
        let mixed = super::uuid(0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210);
        assert_eq!(&mixed, b"01234567-89ab-4def-bedc-ba9876543210");
    }
}

//! What the fuzz targets of `e2e/fuzz` run: every parser of bytes that strangers send to the engine, and what must hold of
//! what it answers. Each function takes any bytes, and panics if something does not hold. It is not part of the product.

use std::net::{IpAddr, SocketAddr};

use mesh_model::{
    flow,
    proxy::{EscapedSlashes, ProxyProtocolVersion},
};

use crate::{
    http::{filters, h1, h2, h3, headers::Headers, path, router},
    listener::{inspect, proxy_protocol},
    matcher, rbac, udp, upstream, wire,
};

/// A connection of HTTP/1 requests, by [`h1`].
pub fn h1_request(data: &[u8]) {
    h1::fuzz::requests(data);
}

/// The answer of an HTTP/1 server, in any pieces.
pub fn h1_response(data: &[u8]) {
    h1::fuzz::response(data);
}

/// A request of HTTP/2 as the `h2` crate hands it over: lines of `name: value`.
pub fn h2_request(data: &[u8]) {
    h2::fuzz::request(data);
}

/// A stream of HTTP/3: its frames, and a field section in QPACK.
pub fn h3(data: &[u8]) {
    h3::fuzz::stream(data);
    h3::fuzz::section(data);
}

/// The first bytes of a connection: PROXY protocol, a ClientHello, or HTTP.
pub fn first_bytes(data: &[u8]) {
    if let Ok(Some(h)) = proxy_protocol::decode(data) {
        assert!(h.len <= data.len());
        assert_eq!(proxy_protocol::decode(&data[..h.len]), Ok(Some(h)));
        assert_eq!(proxy_protocol::decode(&data[..h.len - 1]), Ok(None));
        for v in [ProxyProtocolVersion::V1, ProxyProtocolVersion::V2] {
            let again = proxy_protocol::encode(v, h.addresses);
            let read = proxy_protocol::decode(&again).unwrap().unwrap();
            assert_eq!(read.len, again.len());
            let plain = |(s, d): (SocketAddr, SocketAddr)| {
                (s.ip().to_canonical(), s.port(), d.ip().to_canonical(), d.port())
            };
            assert_eq!(read.addresses.map(plain), h.addresses.map(plain));
        }
    }
    let cut = usize::from(data.first().copied().unwrap_or_default()) * data.len() / 256;
    // Fewer bytes may leave the question open, and never answer it differently.
    settled(inspect::client_hello(&data[..cut]), inspect::client_hello(data));
    settled(inspect::hello_message(&data[..cut]), inspect::hello_message(data));
    settled(inspect::http(&data[..cut]), inspect::http(data));
    settled(inspect::preface(&data[..cut]), inspect::preface(data));
    // The same message in records of one byte.
    if data.len() < 2000
        && let inspect::Seen::Yes(hello) = inspect::hello_message(data)
    {
        let name = hello.sni.as_deref().unwrap_or("none");
        assert!(!name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic() && !b.is_ascii_uppercase()));
        let records: Vec<u8> = data.iter().flat_map(|b| [0x16, 3, 1, 0, 1, *b]).collect();
        assert_eq!(inspect::client_hello(&records), inspect::Seen::Yes(hello));
    }
}

fn settled<T: PartialEq + std::fmt::Debug>(part: inspect::Seen<T>, all: inspect::Seen<T>) {
    if part != inspect::Seen::More {
        assert_eq!(part, all);
    }
}

/// Datagrams to a gateway: QUIC's first packets, sealed as a client would, and frames of flows.
pub fn quic_initial(data: &[u8]) {
    udp::initial::fuzz::datagram(data);
    if let Some(frame) = flow::read(data) {
        let again = match frame {
            flow::Frame::Data(n, payload) => flow::data(n, payload),
            flow::Frame::End(n) => flow::end(n),
        };
        let same = match (frame, flow::read(&again)) {
            // What stands behind an end is nothing.
            (flow::Frame::End(a), Some(flow::Frame::End(b))) => a == b,
            (a, b) => Some(a) == b,
        };
        assert!(same, "{frame:?}");
    }
}

/// Normalisation of paths, under every setting.
pub fn paths(data: &[u8]) {
    let Some((settings, data)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (dots, merge) = (settings & 1 != 0, settings & 2 != 0);
    let escaped = match settings >> 2 & 3 {
        0 => EscapedSlashes::Keep,
        1 => EscapedSlashes::Reject,
        2 => EscapedSlashes::UnescapeAndForward,
        _ => EscapedSlashes::UnescapeAndRedirect,
    };
    let mut once = text.to_owned();
    if path::by(&mut once, escaped, dots, merge).is_err() {
        return;
    }
    // Nothing becomes a longer path, or one that a codec would have refused.
    assert!(once.len() <= text.len() + 1, "{text:?} became {once:?}");
    assert!(!h1::parse::is_path(text) || h1::parse::is_path(&once), "{text:?} became {once:?}");
    let query = |s: &str| s.split_once('?').map(|(_, q)| q.to_owned());
    assert_eq!(query(text), query(&once), "{text:?}");
    let plain = once.split('?').next().unwrap_or_default();
    if !plain.starts_with('/') {
        return;
    }
    if dots {
        assert!(!plain.split('/').any(|s| matches!(s, "." | "..")), "{text:?} became {once:?}");
        assert!(!plain.contains('\\'), "{text:?} became {once:?}");
        let lower = plain.to_ascii_lowercase();
        assert!(!lower.contains("%2e") && !lower.contains("%00"), "{text:?} became {once:?}");
    }
    if merge {
        assert!(!plain.contains("//"), "{text:?} became {once:?}");
    }
    // Who sees the result and normalises again sees the same: proxies stand in rows. Unescaping is no such thing, as
    // an escaped escape shows.
    let mut twice = once.clone();
    assert!(path::by(&mut twice, EscapedSlashes::Keep, dots, merge).is_ok(), "{text:?} became {once:?}");
    assert_eq!(once, twice, "{text:?}");
}

/// Values of header fields that the engine reads itself.
pub fn header_values(data: &[u8]) {
    if let Some(t) = router::grpc_timeout(data) {
        assert!(data.len() <= 9 && t.as_secs() <= 99_999_999 * 3600);
    }
    filters::session::fuzz(data);
    upstream::load::fuzz(data);
    let mut headers = Headers::default();
    headers.push(b"Cookie", data);
    headers.push(b"x-forwarded-for", data);
    if let Some(value) = matcher::cookie(&headers, "a") {
        assert!(!value.contains(';'));
    }
    if let Ok(text) = std::str::from_utf8(data) {
        if let Some(value) = matcher::query_value(text, "a") {
            assert!(!value.contains('&'));
        }
        if h1::parse::is_authority(text) {
            // What is a host here is one to the library that everybody else uses.
            let a = text.parse::<::http::uri::Authority>();
            assert!(a.is_ok_and(|a| a.as_str() == text) || text.contains(['%', '[', '*']), "{text:?}");
        }
    }
    // The list of addresses has as many entries in one field as in several.
    let one = headers.joined(b"x-forwarded-for").map(|v| v.into_owned()).unwrap_or_default();
    let last = |v: &[u8]| -> Option<IpAddr> {
        std::str::from_utf8(v.rsplit(|b| *b == b',').next()?).ok()?.trim().parse().ok()
    };
    let mut split = Headers::default();
    data.split(|b| *b == b',').for_each(|v| split.push(b"X-Forwarded-For", v));
    assert_eq!(split.joined(b"x-forwarded-for").map(|v| v.into_owned()).unwrap_or_default(), one);
    assert_eq!(last(&one), last(data));
}

/// A token and a key set.
pub fn jwt(data: &[u8]) {
    filters::jwt::fuzz(data);
}

/// Answers of authorisers, processors, rate limiters and health services.
pub fn service_answers(data: &[u8]) {
    let Some((which, data)) = data.split_first() else { return };
    match which % 4 {
        0 => filters::ext_authz::fuzz(data),
        1 => filters::ext_proc::fuzz(data),
        2 => filters::rate_limit::global::fuzz(data),
        _ => {
            let message = wire::unframe(data).ok();
            assert!(message.is_none_or(|m| m.len() + 5 == data.len()));
            wire::fuzz(data);
        }
    }
}

/// Policies about a request and about a connection.
pub fn policies(data: &[u8]) {
    rbac::fuzz::policies(data);
}

/// A body of gRPC-Web in text, and what is sent back.
pub fn grpc_web(data: &[u8]) {
    filters::grpc_web::fuzz(data);
}

#[cfg(test)]
#[path = "../../../e2e/fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::{replay::corpus, *};

    #[test]
    fn corpora() {
        corpus("h1_request", h1_request);
        corpus("h1_response", h1_response);
        corpus("h2_request", h2_request);
        corpus("h3", h3);
        corpus("first_bytes", first_bytes);
        corpus("quic_initial", quic_initial);
        corpus("paths", paths);
        corpus("header_values", header_values);
        corpus("jwt", jwt);
        corpus("service_answers", service_answers);
        corpus("grpc_web", grpc_web);
        corpus("policies", policies);
    }
}

//! Requests of HTTP/2 for the fuzzer. Frames and HPACK are the `h2` crate's, which has targets of its own; what it hands
//! over, any fields that the `http` crate can hold, becomes a head here.

use http::{HeaderName, HeaderValue, Method, Request, Uri};

use super::server::translate;
use crate::http::{h1, message::MAX_FIELDS};

/// Lines of `name: value`, pseudo-fields among them; the first byte says whether a body follows.
pub(crate) fn request(data: &[u8]) {
    let Some((flags, data)) = data.split_first() else { return };
    let (mut uri, mut request, mut protocol) = (Uri::builder(), Request::builder(), None);
    for line in data.split(|b| *b == b'\n') {
        let Some(at) = line.iter().skip(1).position(|b| *b == b':') else { continue };
        let (name, value) = (&line[..=at], line[at + 2..].trim_ascii());
        match name {
            b":method" => match Method::from_bytes(value) {
                Ok(m) => request = request.method(m),
                Err(_) => return,
            },
            b":scheme" => uri = uri.scheme(value),
            b":authority" => uri = uri.authority(value),
            b":path" => uri = uri.path_and_query(value),
            b":protocol" => protocol = std::str::from_utf8(value).ok(),
            name => {
                let (Ok(n), Ok(v)) = (HeaderName::from_lowercase(name), HeaderValue::from_bytes(value))
                else {
                    return;
                };
                request = request.header(n, v);
            }
        }
    }
    let Ok(uri) = uri.build() else { return };
    let Ok(request) = request.uri(uri).body(()) else { return };
    let (mut parts, ()) = request.into_parts();
    if let Some(p) = protocol {
        parts.extensions.insert(h2::ext::Protocol::from(p));
    }
    let Ok(head) = translate(&parts, true, flags & 1 == 1) else { return };
    assert!(head.headers.iter().count() <= MAX_FIELDS);
    h1::fuzz::forward(&head, &[]);
}

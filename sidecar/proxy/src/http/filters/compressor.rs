//! Compression of answers (`envoy.filters.http.compressor`).
//!
//! An answer that could be compressed says `vary: accept-encoding` even if this client does not want it: a cache
//! must not give one client what another asked for. Each piece is flushed, so that a stream stays one.

use std::io::Write as _;

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use mesh_model::proxy as model;

use crate::{
    config::CompileError,
    http::{
        filtered::{Bodies, Encode},
        headers::{HeaderId, Headers, list_has},
        message::{BodyKind, RequestHead, ResponseHead},
    },
    matcher::StringMatcher,
};

/// Envoy's list.
const TEXTS: [&str; 8] = [
    "application/javascript",
    "application/json",
    "application/xhtml+xml",
    "image/svg+xml",
    "text/css",
    "text/html",
    "text/plain",
    "text/xml",
];

/// A compiled [`model::Compressor`].
#[derive(Debug)]
pub(crate) struct Compressor {
    config: model::Compressor,
    types: Vec<StringMatcher>,
}

impl Compressor {
    pub(crate) fn new(c: &model::Compressor) -> Result<Self, CompileError> {
        Ok(Self { types: StringMatcher::all(&c.content_types)?, config: c.clone() })
    }

    /// Prepares to compress the answer.
    pub(crate) fn run(self: &std::sync::Arc<Self>, head: &mut RequestHead, bodies: Option<&Bodies>) {
        let accepted = accepts_gzip(head.headers.joined(b"accept-encoding").as_deref());
        if self.config.remove_accept_encoding {
            head.headers.remove(b"accept-encoding");
        }
        if let Some(b) = bodies {
            let model::CompressionLibrary::Gzip { level } = self.config.library;
            let level = Compression::new(u32::from(level.clamp(1, 9)));
            b.encode(Box::new(Gzip { filter: std::sync::Arc::clone(self), accepted, level, encoder: None }));
        }
    }

    fn compressible(&self, head: &ResponseHead) -> bool {
        let (c, h) = (&self.config, &head.headers);
        let long = match head.body {
            BodyKind::Empty => false,
            BodyKind::Length(n) => n >= u64::from(c.min_content_length),
            BodyKind::Stream => true,
        };
        let fits = match h.get_id(HeaderId::ContentType) {
            None => true,
            Some(t) => {
                let t = t.split(|b| *b == b';').next().unwrap_or_default().trim_ascii();
                if self.types.is_empty() {
                    TEXTS.iter().any(|x| x.as_bytes().eq_ignore_ascii_case(t))
                } else {
                    self.types.iter().any(|m| m.matches(t))
                }
            }
        };
        long && fits
            && head.status >= 200
            && !matches!(head.status, 204 | 304)
            && !c.uncompressible_statuses.contains(&head.status)
            && h.get(b"content-encoding").is_none()
            // Part of one form of a resource is no part of another.
            && h.get(b"content-range").is_none()
            && !h.joined(b"cache-control").is_some_and(|v| list_has(&v, "no-transform"))
            && !(c.disable_on_etag && h.get(b"etag").is_some())
    }
}

/// Whether `accept-encoding` (RFC 9110 section 12.5.3) prefers gzip to the bare answer.
fn accepts_gzip(value: Option<&[u8]>) -> bool {
    let Some(value) = value.and_then(|v| std::str::from_utf8(v).ok()) else { return false };
    let (mut gzip, mut any, mut identity) = (None, None, None);
    for part in value.split(',') {
        let mut it = part.split(';');
        let name = it.next().unwrap_or_default().trim();
        let q = it
            .find_map(|p| p.trim().strip_prefix("q=").or_else(|| p.trim().strip_prefix("Q=")))
            .map_or(1.0, |q| q.trim().parse::<f32>().unwrap_or(0.0));
        match name.to_ascii_lowercase().as_str() {
            "gzip" | "x-gzip" => gzip = Some(q),
            "*" => any = Some(q),
            "identity" => identity = Some(q),
            _ => {}
        }
    }
    let q = gzip.or(any).unwrap_or(0.0);
    q > 0.0 && identity.is_none_or(|i| q >= i)
}

struct Gzip {
    filter: std::sync::Arc<Compressor>,
    accepted: bool,
    level: Compression,
    encoder: Option<GzEncoder<Vec<u8>>>,
}

impl Encode for Gzip {
    fn start(&mut self, head: &mut ResponseHead, end: bool) -> bool {
        if end || !self.filter.compressible(head) {
            return false;
        }
        let h = &mut head.headers;
        if !h.joined(b"vary").is_some_and(|v| list_has(&v, "accept-encoding")) {
            h.push_id(HeaderId::Vary, b"Accept-Encoding");
        }
        if !self.accepted {
            return false;
        }
        if let Some(tag) = h.get(b"etag").map(<[u8]>::to_vec)
            && !tag.starts_with(b"W/")
        {
            // Other bytes than those that the tag stands for.
            if self.filter.config.weaken_etag {
                h.set(b"etag", &[b"W/", tag.as_slice()].concat());
            } else {
                h.remove(b"etag");
            }
        }
        h.remove_id(HeaderId::ContentLength);
        h.push(b"content-encoding", b"gzip");
        head.body = BodyKind::Stream;
        self.encoder = Some(GzEncoder::new(Vec::new(), self.level));
        true
    }

    fn data(&mut self, data: Bytes) -> Bytes {
        let Some(e) = self.encoder.as_mut() else { return data };
        // Writing to memory does not fail.
        if e.write_all(&data).and_then(|()| e.flush()).is_err() {
            tracing::error!("compression failed");
        }
        Bytes::from(std::mem::take(e.get_mut()))
    }

    fn finish(&mut self, trailers: Option<&Headers>) -> (Bytes, Option<Headers>) {
        let tail = self.encoder.take().and_then(|e| e.finish().ok()).unwrap_or_default();
        (Bytes::from(tail), trailers.cloned())
    }
}

#[cfg(test)]
mod tests {
    use super::accepts_gzip;

    #[test]
    fn preferences() {
        let yes = |s: &str| accepts_gzip(Some(s.as_bytes()));
        assert!(yes("gzip") && yes("br, GZIP;q=0.5") && yes("*") && yes("identity;q=0.5, gzip"));
        assert!(!accepts_gzip(None) && !yes("") && !yes("br") && !yes("gzip;q=0") && !yes("*;q=0"));
        assert!(!yes("*, gzip;q=0") && !yes("identity, gzip;q=0.5") && !yes("gzip;q=x"));
    }
}

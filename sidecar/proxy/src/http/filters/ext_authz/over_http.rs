//! An authoriser that speaks plain HTTP: 200 is yes, 5xx no answer, anything else no.

use std::{rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use mesh_model::proxy as model;
use serde_json::Value;

use super::{Body, Change, ExtAuthz, MAX_ANSWER, No, Verdict, Yes};
use crate::{
    config::{CompileError, route::SlotOf},
    http::{
        client::{self, Answer},
        headers::{HeaderId, Headers},
        message::RequestHead,
    },
    matcher::StringMatcher,
    upstream::cluster::ClusterSlot,
    worker::connection::Connection,
};

/// A compiled [`model::HttpAuthz`].
#[derive(Debug)]
pub(super) struct HttpAuthz {
    config: model::HttpAuthz,
    cluster: Arc<ClusterSlot>,
    upstream: Vec<StringMatcher>,
    upstream_append: Vec<StringMatcher>,
    client: Vec<StringMatcher>,
    client_on_success: Vec<StringMatcher>,
    metadata: Vec<StringMatcher>,
}

fn any(list: &[StringMatcher], name: &[u8]) -> bool {
    list.iter().any(|m| m.matches(name))
}

impl HttpAuthz {
    pub(super) fn new(c: &model::HttpAuthz, slot: SlotOf<'_>) -> Result<Self, CompileError> {
        for (n, v) in &c.headers_to_add {
            if http::HeaderName::from_bytes(n.as_bytes()).is_err() || http::HeaderValue::from_str(v).is_err()
            {
                return Err(CompileError::Header(n.clone()));
            }
        }
        Ok(Self {
            cluster: slot(&c.cluster),
            upstream: StringMatcher::all(&c.allowed_upstream_headers)?,
            upstream_append: StringMatcher::all(&c.allowed_upstream_headers_to_append)?,
            client: StringMatcher::all(&c.allowed_client_headers)?,
            client_on_success: StringMatcher::all(&c.allowed_client_headers_on_success)?,
            metadata: StringMatcher::all(&c.dynamic_metadata_from_headers)?,
            config: c.clone(),
        })
    }

    pub(super) async fn ask(
        &self,
        filter: &ExtAuthz,
        conn: &Rc<Connection>,
        head: &RequestHead,
        body: &Body,
    ) -> Verdict {
        let mut h = Headers::default();
        for (id, name, value) in head.headers.iter() {
            let always = id == HeaderId::Authorization;
            let framing = id.is_hop_by_hop() || matches!(id, HeaderId::ContentLength | HeaderId::Expect);
            if !framing && filter.shows(name, always) {
                h.push(name, value);
            }
        }
        if body.asked {
            h.set(b"x-envoy-auth-partial-body", if body.partial { b"true" } else { b"false" });
        }
        for (n, v) in &self.config.headers_to_add {
            h.set(n.as_bytes(), v.as_bytes());
        }
        let path = format!("{}{}", self.config.path_prefix, head.path);
        let mut out = client::head(head.method.clone(), &head.authority, &path, h, body.bytes.len());
        if body.bytes.is_empty() {
            out.headers.push_id(HeaderId::ContentLength, b"0");
        }
        out.https = head.https;
        let timeout =
            if self.config.timeout.is_zero() { Duration::from_millis(200) } else { self.config.timeout };
        let sent = Bytes::copy_from_slice(&body.bytes);
        match client::call(&conn.worker, &self.cluster, &out, sent, timeout, MAX_ANSWER).await {
            Err(e) => Verdict::Error(e.to_string()),
            Ok(a) if a.status >= 500 => Verdict::Error(format!("status {}", a.status)),
            Ok(a) if a.status == 200 => self.yes(&a),
            Ok(a) => self.no(a),
        }
    }

    fn yes(&self, a: &Answer) -> Verdict {
        let mut yes = Yes::default();
        for (_, name, value) in a.headers.iter() {
            let lower = String::from_utf8_lossy(name).to_ascii_lowercase();
            let n = lower.as_bytes();
            if lower == "x-envoy-auth-headers-to-remove" {
                let names = String::from_utf8_lossy(value);
                yes.remove.extend(names.split(',').map(|s| s.trim().to_owned()).filter(|s| !s.is_empty()));
                continue;
            }
            if any(&self.upstream, n) {
                yes.headers.push((Change::Set, lower.clone(), value.to_vec()));
            }
            if any(&self.upstream_append, n) {
                yes.headers.push((Change::Append, lower.clone(), value.to_vec()));
            }
            if any(&self.client_on_success, n) {
                yes.response.push((Change::Append, lower.clone(), value.to_vec()));
            }
            if any(&self.metadata, n) {
                let text = String::from_utf8_lossy(value).into_owned();
                yes.metadata.push((lower, Value::String(text)));
            }
        }
        Verdict::Yes(Box::new(yes))
    }

    fn no(&self, a: Answer) -> Verdict {
        let headers = a
            .headers
            .iter()
            .filter(|(id, n, _)| {
                // Our own codec frames the answer and our own clock dates it.
                !matches!(id, HeaderId::ContentLength | HeaderId::Date | HeaderId::Server)
                    && (self.client.is_empty()
                        || any(&self.client, &n.to_ascii_lowercase())
                        || matches!(id, HeaderId::Location)
                        || n.eq_ignore_ascii_case(b"www-authenticate"))
            })
            .map(|(_, n, v)| (Change::Append, String::from_utf8_lossy(n).to_ascii_lowercase(), v.to_vec()))
            .collect();
        Verdict::No(Box::new(No { status: a.status, headers, body: a.body.to_vec(), metadata: vec![] }))
    }
}

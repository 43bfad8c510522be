//! `envoy.service.auth.v3.Authorization`, in as much of its encoding as is needed.

use std::{collections::BTreeMap, net::SocketAddr};

use bytes::Bytes;

use super::{Body, Change, ExtAuthz, No, Verdict, Yes};
use crate::{
    http::{headers::HeaderId, message::RequestHead, record::Record},
    wire::{self, Field, WireError, Writer},
    worker::connection::Connection,
};

pub(super) const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";

fn address(w: &mut Writer, a: SocketAddr) {
    // core.v3.Address { socket_address { address, port_value } }
    w.message(1, |w| {
        w.message(1, |w| {
            w.text(2, a.ip().to_string().as_bytes());
            w.number(3, u64::from(a.port()));
        });
    });
}

/// A `CheckRequest` in its frame.
pub(super) fn request(
    filter: &ExtAuthz,
    conn: &Connection,
    head: &RequestHead,
    body: &Body,
    extensions: Option<&BTreeMap<String, String>>,
    rec: &Record,
) -> Bytes {
    let mut w = Writer::default();
    w.message(1, |w| {
        peers(w, conn);
        w.message(4, |w| {
            let now = std::time::SystemTime::now()
                .duration_since(std::time::SystemTime::UNIX_EPOCH)
                .unwrap_or_default();
            w.message(1, |w| {
                w.number(1, now.as_secs());
                w.number(2, u64::from(now.subsec_nanos()));
            });
            w.message(2, |w| http_request(w, filter, head, body));
        });
        for (k, v) in extensions.into_iter().flatten() {
            w.entry(10, k.as_bytes(), v.as_bytes());
        }
        if !filter.config.metadata_namespaces.is_empty() {
            w.message(11, |w| metadata(w, &filter.config.metadata_namespaces, rec));
        }
        if filter.config.include_tls_session {
            tls_session(w, conn);
        }
    });
    Bytes::from(w.framed())
}

/// A `CheckRequest` about a connection, in its frame.
pub(super) fn connection_request(conn: &Connection, include_tls_session: bool) -> Bytes {
    let mut w = Writer::default();
    w.message(1, |w| {
        peers(w, conn);
        if include_tls_session {
            tls_session(w, conn);
        }
    });
    Bytes::from(w.framed())
}

/// `source` and `destination`.
fn peers(w: &mut Writer, conn: &Connection) {
    w.message(1, |w| {
        address(w, conn.peer);
        w.text(4, conn.principal().as_bytes());
    });
    w.message(2, |w| {
        address(w, conn.local);
        w.text(4, if conn.tls { conn.worker.options.node.principal.as_bytes() } else { b"" });
    });
}

fn tls_session(w: &mut Writer, conn: &Connection) {
    if conn.tls {
        w.message(12, |w| w.text(1, conn.sni.as_deref().unwrap_or_default().as_bytes()));
    }
}

fn http_request(w: &mut Writer, filter: &ExtAuthz, head: &RequestHead, body: &Body) {
    let default = filter.allowed.is_empty();
    let scheme: &[u8] = if head.https { b"https" } else { b"http" };
    w.text(1, head.headers.get_id(HeaderId::XRequestId).unwrap_or_default());
    w.text(2, head.method.as_str().as_bytes());
    // One entry for each name, its values joined.
    let mut seen: Vec<&[u8]> = Vec::new();
    for (name, value) in [
        (&b":authority"[..], head.authority.as_bytes()),
        (b":method", head.method.as_str().as_bytes()),
        (b":path", head.path.as_bytes()),
        (b":scheme", scheme),
    ] {
        if filter.shows(name, default) {
            w.entry(3, name, value);
        }
    }
    for (_, name, _) in head.headers.iter() {
        if !seen.iter().any(|s| s.eq_ignore_ascii_case(name)) && filter.shows(name, default) {
            seen.push(name);
            if let Some(all) = head.headers.joined(name) {
                w.entry(3, &name.to_ascii_lowercase(), &all);
            }
        }
    }
    if body.asked && filter.shows(b"x-envoy-auth-partial-body", default) {
        w.entry(3, b"x-envoy-auth-partial-body", if body.partial { b"true" } else { b"false" });
    }
    w.text(4, head.path.as_bytes());
    w.text(5, head.authority.as_bytes());
    w.text(6, scheme);
    match head.headers.str_id(HeaderId::ContentLength).and_then(|v| v.parse::<u64>().ok()) {
        Some(n) => w.number(9, n),
        // As a signed number, -1 is ten bytes long.
        None => w.number(9, u64::MAX),
    }
    w.text(10, head.version.as_str().as_bytes());
    if body.as_bytes {
        w.bytes(12, &body.bytes);
    } else {
        w.text(11, &body.bytes);
    }
}

fn metadata(w: &mut Writer, namespaces: &[String], rec: &Record) {
    let Some(all) = rec.metadata.as_deref() else { return };
    for n in namespaces {
        let fields: serde_json::Map<String, serde_json::Value> =
            all.iter().filter(|(ns, _, _)| ns == n).map(|(_, k, v)| (k.to_owned(), v.clone())).collect();
        if !fields.is_empty() {
            // core.v3.Metadata { map<string, Struct> filter_metadata = 1 }
            w.message(1, |w| {
                w.text(1, n.as_bytes());
                w.message(2, |w| w.fields(&fields));
            });
        }
    }
}

/// What a `CheckResponse` says.
pub(super) fn verdict(message: &[u8]) -> Verdict {
    decode(message).unwrap_or_else(|e| Verdict::Error(e.to_string()))
}

fn decode(message: &[u8]) -> Result<Verdict, WireError> {
    let (mut code, mut metadata) = (0u64, Vec::new());
    let (mut yes, mut no) = (Yes::default(), None);
    wire::read(message, |n, f| {
        match n {
            1 => wire::read(f.bytes(), |n, f| {
                if n == 1 {
                    code = f.number();
                }
                Ok(())
            })?,
            2 | 5 => no = Some(denied(f.bytes())?),
            3 => yes = allowed(f.bytes())?,
            4 => metadata = wire::read_struct(f.bytes())?.into_iter().collect(),
            _ => {}
        }
        Ok(())
    })?;
    if code == 0 {
        yes.metadata = metadata;
        return Ok(Verdict::Yes(Box::new(yes)));
    }
    let mut no = no.unwrap_or(No { status: 403, headers: vec![], body: vec![], metadata: vec![] });
    no.metadata = metadata;
    Ok(Verdict::No(Box::new(no)))
}

/// `core.v3.HeaderValueOption`.
fn header(b: &[u8]) -> Result<(Change, String, Vec<u8>), WireError> {
    let (mut name, mut value, mut append, mut action) = (String::new(), Vec::new(), None, 0);
    wire::read(b, |n, f| {
        match n {
            1 => wire::read(f.bytes(), |n, f| {
                match n {
                    1 => name = f.text().to_ascii_lowercase(),
                    2 | 3 => value = f.bytes().to_vec(),
                    _ => {}
                }
                Ok(())
            })?,
            2 => {
                let mut on = false;
                wire::read(f.bytes(), |_, f| {
                    on = f.number() != 0;
                    Ok(())
                })?;
                append = Some(on);
            }
            3 => action = f.number(),
            _ => {}
        }
        Ok(())
    })?;
    let how = match (append, action) {
        (Some(true), _) => Change::Append,
        (None, 1) => Change::AddIfAbsent,
        (None, 3) => Change::OverwriteIfExists,
        _ => Change::Set,
    };
    Ok((how, name, value))
}

fn allowed(b: &[u8]) -> Result<Yes, WireError> {
    let mut yes = Yes::default();
    wire::read(b, |n, f: Field<'_>| {
        match n {
            2 => yes.headers.push(header(f.bytes())?),
            3 => yes.metadata = wire::read_struct(f.bytes())?.into_iter().collect(),
            5 => yes.remove.push(f.text().into_owned()),
            6 => yes.response.push(header(f.bytes())?),
            7 => {
                let (mut key, mut value) = (String::new(), String::new());
                wire::read(f.bytes(), |n, f| {
                    match n {
                        1 => key = f.text().into_owned(),
                        2 => value = f.text().into_owned(),
                        _ => {}
                    }
                    Ok(())
                })?;
                yes.query_set.push((key, value));
            }
            8 => yes.query_remove.push(f.text().into_owned()),
            _ => {}
        }
        Ok(())
    })?;
    Ok(yes)
}

fn denied(b: &[u8]) -> Result<No, WireError> {
    let mut no = No { status: 403, headers: vec![], body: vec![], metadata: vec![] };
    wire::read(b, |n, f| {
        match n {
            1 => wire::read(f.bytes(), |n, f| {
                if n == 1
                    && let Ok(s @ 200..=599) = u16::try_from(f.number())
                {
                    no.status = s;
                }
                Ok(())
            })?,
            2 => no.headers.push(header(f.bytes())?),
            3 => no.body = f.bytes().to_vec(),
            _ => {}
        }
        Ok(())
    })?;
    Ok(no)
}

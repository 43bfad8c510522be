//! Answers that the proxy gives itself.

use std::{cell::RefCell, fmt::Write as _, future::poll_fn, time::SystemTime};

use bytes::Bytes;

use super::{
    downstream::Downstream,
    headers::{HeaderId, Headers},
    message::{BodyKind, RequestHead, ResponseHead},
    record::Record,
};

/// An answer.
#[derive(Debug, Default)]
pub(crate) struct LocalReply {
    pub(crate) status: u16,
    pub(crate) body: Bytes,
    pub(crate) headers: Headers,
    /// gRPC status for gRPC requests; `None` is derived from `status`.
    pub(crate) grpc: Option<u32>,
    pub(crate) is_text: bool,
}

impl LocalReply {
    pub(crate) fn text(status: u16, body: impl Into<String>) -> Self {
        Self { status, body: Bytes::from(body.into()), is_text: true, ..Self::default() }
    }
}

/// gRPC status of an HTTP status (gRPC's `http-grpc-status-mapping.md`).
pub(crate) fn grpc_of_http(status: u16) -> u32 {
    match status {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    }
}

/// HTTP status of a gRPC status, for judging a host by it.
pub(crate) fn http_of_grpc(status: u32) -> u16 {
    match status {
        0 => 200,
        1 => 499,
        3 | 9 | 11 => 400,
        4 => 504,
        5 => 404,
        6 | 10 => 409,
        7 => 403,
        8 => 429,
        12 => 501,
        14 => 503,
        16 => 401,
        _ => 500,
    }
}

/// Sends an answer in the form that the client understands.
pub(crate) async fn send<D: Downstream>(
    down: &D,
    request: &RequestHead,
    server: &str,
    reply: LocalReply,
    rec: &mut Record,
) {
    let mut headers = reply.headers;
    let mut body = reply.body;
    let mut status = reply.status;
    if request.is_grpc() {
        let grpc = reply.grpc.unwrap_or_else(|| grpc_of_http(reply.status));
        rec.grpc_status = Some(grpc);
        headers.set_id(HeaderId::ContentType, b"application/grpc");
        headers.set_id(HeaderId::GrpcStatus, grpc.to_string().as_bytes());
        if !body.is_empty() {
            headers.set_id(HeaderId::GrpcMessage, percent_encode(&body).as_bytes());
        }
        body = Bytes::new();
        status = 200;
    } else if !body.is_empty() {
        if reply.is_text && !headers.has(HeaderId::ContentType) {
            headers.push_id(HeaderId::ContentType, b"text/plain");
        }
        headers.set_id(HeaderId::ContentLength, body.len().to_string().as_bytes());
    }
    stamp(&mut headers, server);
    let head = request.method == http::Method::HEAD;
    let kind = if body.is_empty() || head { BodyKind::Empty } else { BodyKind::Length(body.len() as u64) };
    let end = kind == BodyKind::Empty;
    let response = ResponseHead { status, headers, body: kind };
    rec.status = status;
    let sent = down.start(&response, end);
    rec.response = Some(response);
    if sent.is_err() {
        return;
    }
    if !end {
        rec.bytes_sent += body.len() as u64;
        if poll_fn(|cx| down.poll_room(cx)).await.is_err()
            || down.data(body).is_err()
            || down.finish(None).is_err()
        {
            down.abort();
            return;
        }
    }
    let _ = poll_fn(|cx| down.poll_flush(cx)).await;
}

/// `date`, and `server` if the proxy is to name itself.
pub(crate) fn stamp(headers: &mut Headers, server: &str) {
    if !headers.has(HeaderId::Date) {
        with_date(|d| headers.push_id(HeaderId::Date, d.as_bytes()));
    }
    if !server.is_empty() {
        headers.set_id(HeaderId::Server, server.as_bytes());
    }
}

fn percent_encode(s: &[u8]) -> String {
    let mut out = String::with_capacity(s.len());
    for b in s {
        match b {
            0x20..=0x7e if *b != b'%' => out.push(*b as char),
            _ => {
                let _ = write!(out, "%{b:02X}");
            }
        }
    }
    out
}

thread_local! {
    /// The current second and its text: one rendering a second serves all responses of a worker.
    static DATE: RefCell<(u64, String)> = const { RefCell::new((0, String::new())) };
}

fn with_date(f: impl FnOnce(&str)) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    DATE.with_borrow_mut(|(at, text)| {
        if *at != now || text.is_empty() {
            *at = now;
            *text = http_date(now);
        }
        f(text);
    });
}

/// IMF-fixdate (RFC 9110 section 5.6.7).
fn http_date(secs: u64) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let days = secs / 86_400;
    // Howard Hinnant's `civil_from_days`.
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    let day = doy - (153 * mp + 2) / 5 + 1;
    let weekday = DAYS.get((days % 7) as usize).copied().unwrap_or_default();
    let name = MONTHS.get(month as usize - 1).copied().unwrap_or_default();
    format!(
        "{weekday}, {day:02} {name} {year:04} {:02}:{:02}:{:02} GMT",
        secs % 86_400 / 3600,
        secs % 3600 / 60,
        secs % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_and_messages() {
        assert_eq!(http_date(0), "Thu, 01 Jan 1970 00:00:00 GMT");
        assert_eq!(http_date(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(http_date(1_709_210_096), "Thu, 29 Feb 2024 12:34:56 GMT");
        assert_eq!(percent_encode(b"a%b\n\xc3"), "a%25b%0A%C3");
        assert_eq!((grpc_of_http(503), grpc_of_http(403), grpc_of_http(418)), (14, 7, 2));
    }
}

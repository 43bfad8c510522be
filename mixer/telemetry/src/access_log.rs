//! Access logs: Envoy's format language, and a writer that never blocks a worker.

mod sink;

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fmt::Write as _,
    time::{SystemTime, UNIX_EPOCH},
};

pub use sink::LogSink;

use mesh_model::proxy::AccessLogFormat;

/// Longest line; what a client sent must not make it longer.
const MAX_LINE: usize = 16 * 1024;

/// What a log line may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // The names are Envoy's operators.
pub enum Field {
    Protocol,
    ResponseCode,
    ResponseCodeDetails,
    ConnectionTerminationDetails,
    ResponseFlags,
    UpstreamTransportFailureReason,
    BytesReceived,
    BytesSent,
    Duration,
    RequestDuration,
    ResponseDuration,
    UpstreamHost,
    UpstreamCluster,
    UpstreamLocalAddress,
    UpstreamRequestAttemptCount,
    DownstreamLocalAddress,
    DownstreamLocalPort,
    DownstreamRemoteAddress,
    DownstreamRemoteAddressWithoutPort,
    DownstreamDirectRemoteAddress,
    DownstreamPeerUriSan,
    DownstreamPeerSubject,
    DownstreamTlsVersion,
    RequestedServerName,
    RouteName,
    GrpcStatus,
    Hostname,
    TraceId,
    VirtualClusterName,
    FilterChainName,
    /// An operator that this proxy has no value for; logged as `-`.
    None,
}

/// A finished request or connection, as logs see it.
pub trait LogRecord {
    /// When it began.
    fn start(&self) -> SystemTime;
    /// Appends a value; false if there is none.
    fn field(&self, field: Field, out: &mut String) -> bool;
    /// Appends a request header or pseudo-header by lower-case name; false if there is none.
    fn request_header(&self, name: &str, out: &mut String) -> bool;
    /// Appends a response header by lower-case name; false if there is none.
    fn response_header(&self, name: &str, out: &mut String) -> bool;
    /// Appends a response trailer by lower-case name; false if there is none.
    fn response_trailer(&self, name: &str, out: &mut String) -> bool;
    /// Appends what filters found out, by namespace and keys from the outside in; false if there is nothing.
    fn metadata(&self, _namespace: &str, _keys: &[String], _out: &mut String) -> bool {
        false
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    StartTime(Option<String>),
    Field(Field),
    Request(String, Option<String>),
    Response(String, Option<String>),
    Trailer(String, Option<String>),
    /// Namespace and keys.
    Metadata(Vec<String>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Segment {
    Text(String),
    Value(Source, Option<usize>),
}

/// A compiled format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Format {
    shape: Shape,
    /// Values that are not there are left out.
    omit: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Shape {
    /// One line of text.
    Text(Template),
    /// One JSON object.
    Json(Vec<(String, Template)>),
}

/// A compiled string with operators.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template(Vec<Segment>);

/// A format string that cannot be compiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// A `%` without its partner.
    #[error("unterminated operator at byte {0}")]
    Unterminated(usize),
    /// Not an operator of Envoy.
    #[error("unknown operator {0:?}")]
    Unknown(String),
    /// Malformed arguments.
    #[error("malformed operator {0:?}")]
    Malformed(String),
}

impl Format {
    /// Compiles a format; empty text means [`AccessLogFormat::LINE`].
    ///
    /// # Errors
    /// A malformed or unknown operator.
    pub fn new(f: &AccessLogFormat) -> Result<Self, FormatError> {
        let shape = match f {
            AccessLogFormat::Text(s) if s.is_empty() => Shape::Text(Template::new(AccessLogFormat::LINE)?),
            AccessLogFormat::Text(s) => Shape::Text(Template::new(s)?),
            AccessLogFormat::Json(fields) => Shape::Json(Self::json(fields)?),
        };
        Ok(Self { shape, omit: false })
    }

    /// The same where values that are not there are left out, if `omit` says so: in text there is nothing instead of `-`,
    /// and an object has no key. What an operator says itself stays, such as `-` of a request without response flags.
    #[must_use]
    pub fn omitting(self, omit: bool) -> Self {
        Self { omit, ..self }
    }

    fn json(fields: &BTreeMap<String, String>) -> Result<Vec<(String, Template)>, FormatError> {
        fields.iter().map(|(k, v)| Ok((k.clone(), Template::new(v)?))).collect()
    }

    /// Renders one line with its line end and passes it on.
    pub fn render<T>(&self, r: &dyn LogRecord, then: impl FnOnce(&str) -> T) -> T {
        thread_local!(static LINE: RefCell<String> = const { RefCell::new(String::new()) });
        // A line that is rendered while another one is (none does) would find the place empty, not locked.
        let mut line = LINE.take();
        line.clear();
        self.append(r, &mut line);
        let result = then(&line);
        LINE.set(line);
        result
    }

    fn append(&self, r: &dyn LogRecord, out: &mut String) {
        let empty = if self.omit { "" } else { "-" };
        match &self.shape {
            Shape::Text(t) => {
                t.render(r, out, true, empty);
                if !out.ends_with('\n') {
                    out.push('\n');
                }
            }
            Shape::Json(fields) => {
                out.push('{');
                let mut value = String::new();
                let mut more = false;
                for (k, t) in fields {
                    value.clear();
                    let single = t.single();
                    let there = single.is_none_or(|(source, _)| append(source, r, &mut value));
                    if !there && self.omit {
                        continue;
                    }
                    if std::mem::replace(&mut more, true) {
                        out.push(',');
                    }
                    push_json(k, out);
                    out.push(':');
                    match single {
                        Some((source, None)) => {
                            if !there {
                                out.push_str("null");
                            } else if is_number(source)
                                && value.parse().is_ok_and(|n: i64| n.to_string() == value)
                            {
                                out.push_str(&value);
                            } else {
                                push_json(&value, out);
                            }
                        }
                        // What is cut or put together is a text.
                        _ => {
                            value.clear();
                            t.render(r, &mut value, false, empty);
                            push_json(&value, out);
                        }
                    }
                }
                out.push_str("}\n");
            }
        }
    }
}

fn is_number(s: &Source) -> bool {
    matches!(
        s,
        Source::Field(
            Field::ResponseCode
                | Field::BytesReceived
                | Field::BytesSent
                | Field::Duration
                | Field::RequestDuration
                | Field::ResponseDuration
                | Field::UpstreamRequestAttemptCount
        )
    )
}

fn push_json(s: &str, out: &mut String) {
    match serde_json::to_string(s) {
        Ok(q) => out.push_str(&q),
        Err(_) => out.push_str("\"\""),
    }
}

impl Template {
    /// Compiles a string with `%OPERATOR(argument):length%`; `%%` is a percent sign.
    ///
    /// # Errors
    /// A malformed or unknown operator.
    pub fn new(s: &str) -> Result<Self, FormatError> {
        let mut segments = Vec::new();
        let mut text = String::new();
        let mut rest = s;
        while let Some(at) = rest.find('%') {
            text.push_str(&rest[..at]);
            let after = &rest[at + 1..];
            if let Some(more) = after.strip_prefix('%') {
                text.push('%');
                rest = more;
                continue;
            }
            let end = operator_end(after).ok_or(FormatError::Unterminated(s.len() - rest.len() + at))?;
            if !text.is_empty() {
                segments.push(Segment::Text(std::mem::take(&mut text)));
            }
            segments.push(operator(&after[..end])?);
            rest = &after[end + 1..];
        }
        text.push_str(rest);
        if !text.is_empty() {
            segments.push(Segment::Text(text));
        }
        Ok(Self(segments))
    }

    /// The operator, and the longest that its value may be, if there is nothing else.
    fn single(&self) -> Option<(&Source, Option<usize>)> {
        match self.0.as_slice() {
            [Segment::Value(s, limit)] => Some((s, *limit)),
            _ => None,
        }
    }

    /// Appends the text, with `empty` for values that are not there.
    fn render(&self, r: &dyn LogRecord, out: &mut String, escape: bool, empty: &str) {
        for s in &self.0 {
            match s {
                Segment::Text(t) => out.push_str(t),
                Segment::Value(source, limit) => {
                    // Appended in place; the rare value that is too long or needs escapes is taken back.
                    let at = out.len();
                    if !append(source, r, out) || out.len() == at {
                        out.truncate(at);
                        out.push_str(empty);
                        continue;
                    }
                    let room = MAX_LINE.saturating_sub(at);
                    let cut = floor_char(&out[at..], limit.unwrap_or(usize::MAX).min(room));
                    out.truncate(at + cut);
                    if escape && out.as_bytes()[at..].iter().any(|b| needs_escape(*b)) {
                        let value = out.split_off(at);
                        push_escaped(&value, out);
                    }
                }
            }
        }
    }
}

/// Whether a byte may begin a character that is escaped: ASCII ones, and C1 controls in UTF-8.
fn needs_escape(b: u8) -> bool {
    b < 0x20 || matches!(b, b'"' | b'\\' | 0x7f | 0xc2)
}

/// What clients send must not break out of its quotes or its line.
fn push_escaped(s: &str, out: &mut String) {
    for c in s.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if c.is_control() => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
}

fn floor_char(s: &str, mut at: usize) -> usize {
    if at >= s.len() {
        return s.len();
    }
    while !s.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// The closing `%`, which does not count inside parentheses (time formats hold percent signs).
fn operator_end(s: &str) -> Option<usize> {
    let mut depth = 0;
    for (i, b) in s.bytes().enumerate() {
        match b {
            b'(' => depth += 1,
            b')' => depth -= 1,
            b'%' if depth <= 0 => return Some(i),
            _ => {}
        }
    }
    None
}

fn operator(s: &str) -> Result<Segment, FormatError> {
    let malformed = || FormatError::Malformed(s.to_owned());
    let (name, rest) = match s.find(['(', ':']) {
        Some(at) => s.split_at(at),
        None => (s, ""),
    };
    let (arg, rest) = match rest.strip_prefix('(') {
        Some(r) => {
            let end = r.rfind(')').ok_or_else(malformed)?;
            (Some(&r[..end]), &r[end + 1..])
        }
        None => (None, rest),
    };
    let limit = match rest.strip_prefix(':') {
        Some(n) => Some(n.parse().map_err(|_| malformed())?),
        None if rest.is_empty() => None,
        None => return Err(malformed()),
    };
    let header = || -> Result<(String, Option<String>), FormatError> {
        let arg = arg.filter(|a| !a.is_empty()).ok_or_else(malformed)?;
        let (main, alt) = match arg.split_once('?') {
            Some((m, a)) => (m, Some(a.to_ascii_lowercase())),
            None => (arg, None),
        };
        Ok((main.to_ascii_lowercase(), alt))
    };
    let source = match name {
        "START_TIME" => Source::StartTime(arg.filter(|a| !a.is_empty()).map(str::to_owned)),
        "REQ" => {
            let (a, b) = header()?;
            Source::Request(a, b)
        }
        "DYNAMIC_METADATA" => {
            let path: Vec<String> = arg.unwrap_or_default().split(':').map(str::to_owned).collect();
            if path.iter().any(String::is_empty) {
                return Err(malformed());
            }
            Source::Metadata(path)
        }
        "RESP" => {
            let (a, b) = header()?;
            Source::Response(a, b)
        }
        "TRAILER" => {
            let (a, b) = header()?;
            Source::Trailer(a, b)
        }
        _ => Source::Field(field(name).ok_or_else(|| FormatError::Unknown(name.to_owned()))?),
    };
    Ok(Segment::Value(source, limit))
}

fn field(name: &str) -> Option<Field> {
    Some(match name {
        "PROTOCOL" => Field::Protocol,
        "RESPONSE_CODE" => Field::ResponseCode,
        "RESPONSE_CODE_DETAILS" => Field::ResponseCodeDetails,
        "CONNECTION_TERMINATION_DETAILS" => Field::ConnectionTerminationDetails,
        "RESPONSE_FLAGS" | "RESPONSE_FLAGS_LONG" => Field::ResponseFlags,
        "UPSTREAM_TRANSPORT_FAILURE_REASON" => Field::UpstreamTransportFailureReason,
        "BYTES_RECEIVED" => Field::BytesReceived,
        "BYTES_SENT" => Field::BytesSent,
        "DURATION" => Field::Duration,
        "REQUEST_DURATION" => Field::RequestDuration,
        "RESPONSE_DURATION" => Field::ResponseDuration,
        "UPSTREAM_HOST" | "UPSTREAM_REMOTE_ADDRESS" => Field::UpstreamHost,
        "UPSTREAM_CLUSTER" | "UPSTREAM_CLUSTER_RAW" => Field::UpstreamCluster,
        "UPSTREAM_LOCAL_ADDRESS" => Field::UpstreamLocalAddress,
        "UPSTREAM_REQUEST_ATTEMPT_COUNT" => Field::UpstreamRequestAttemptCount,
        "DOWNSTREAM_LOCAL_ADDRESS" => Field::DownstreamLocalAddress,
        "DOWNSTREAM_LOCAL_PORT" => Field::DownstreamLocalPort,
        "DOWNSTREAM_REMOTE_ADDRESS" => Field::DownstreamRemoteAddress,
        "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => Field::DownstreamRemoteAddressWithoutPort,
        "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => Field::DownstreamDirectRemoteAddress,
        "DOWNSTREAM_PEER_URI_SAN" => Field::DownstreamPeerUriSan,
        "DOWNSTREAM_PEER_SUBJECT" => Field::DownstreamPeerSubject,
        "DOWNSTREAM_TLS_VERSION" => Field::DownstreamTlsVersion,
        "REQUESTED_SERVER_NAME" => Field::RequestedServerName,
        "ROUTE_NAME" => Field::RouteName,
        "GRPC_STATUS" | "GRPC_STATUS_NUMBER" => Field::GrpcStatus,
        "HOSTNAME" => Field::Hostname,
        "TRACE_ID" => Field::TraceId,
        "VIRTUAL_CLUSTER_NAME" => Field::VirtualClusterName,
        "FILTER_CHAIN_NAME" => Field::FilterChainName,
        "FILTER_STATE"
        | "ENVIRONMENT"
        | "CEL"
        | "METADATA"
        | "UPSTREAM_METADATA"
        | "DOWNSTREAM_LOCAL_URI_SAN"
        | "DOWNSTREAM_TLS_CIPHER"
        | "DOWNSTREAM_TLS_SESSION_ID"
        | "DOWNSTREAM_LOCAL_SUBJECT"
        | "DOWNSTREAM_PEER_ISSUER"
        | "DOWNSTREAM_PEER_FINGERPRINT_256"
        | "CONNECTION_ID"
        | "RESPONSE_TX_DURATION" => Field::None,
        _ => return None,
    })
}

fn append(s: &Source, r: &dyn LogRecord, out: &mut String) -> bool {
    let either = |get: &dyn Fn(&str, &mut String) -> bool, a: &str, b: &Option<String>, out: &mut String| {
        get(a, out) || b.as_ref().is_some_and(|b| get(b, out))
    };
    match s {
        Source::StartTime(f) => {
            match f {
                Some(f) => time(r.start(), f, out),
                None => iso_time(r.start(), out),
            }
            true
        }
        Source::Field(f) => r.field(*f, out),
        Source::Request(a, b) => either(&|n, o| r.request_header(n, o), a, b, out),
        Source::Response(a, b) => either(&|n, o| r.response_header(n, o), a, b, out),
        Source::Trailer(a, b) => either(&|n, o| r.response_trailer(n, o), a, b, out),
        Source::Metadata(path) => path.split_first().is_some_and(|(ns, keys)| r.metadata(ns, keys, out)),
    }
}

/// Appends a UTC time as in RFC 3339 with milliseconds. The part that lasts a second is kept for other lines.
fn iso_time(t: SystemTime, out: &mut String) {
    thread_local!(static SECOND: RefCell<(u64, String)> = const { RefCell::new((u64::MAX, String::new())) });
    let d = t.duration_since(UNIX_EPOCH).unwrap_or_default();
    SECOND.with_borrow_mut(|(second, text)| {
        if *second != d.as_secs() {
            *second = d.as_secs();
            text.clear();
            time(t, "%Y-%m-%dT%H:%M:%S.", text);
        }
        out.push_str(text);
    });
    let ms = d.subsec_millis();
    for digit in [ms / 100, ms / 10 % 10, ms % 10] {
        out.push(char::from(b'0' + digit as u8));
    }
    out.push('Z');
}

/// Appends a UTC time; the subset of `strftime` that Envoy documents for logs.
fn time(t: SystemTime, format: &str, out: &mut String) {
    let d = t.duration_since(UNIX_EPOCH).unwrap_or_default();
    let secs = d.as_secs();
    let (y, m, day) = civil(secs / 86_400);
    let (h, min, s) = (secs % 86_400 / 3600, secs % 3600 / 60, secs % 60);
    let mut it = format.chars().peekable();
    while let Some(c) = it.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let digits = it.peek().and_then(|c| c.to_digit(10));
        if digits.is_some() {
            it.next();
        }
        let _ = match it.next() {
            Some('Y') => write!(out, "{y:04}"),
            Some('m') => write!(out, "{m:02}"),
            Some('d') => write!(out, "{day:02}"),
            Some('H') => write!(out, "{h:02}"),
            Some('M') => write!(out, "{min:02}"),
            Some('S') => write!(out, "{s:02}"),
            Some('F') => write!(out, "{y:04}-{m:02}-{day:02}"),
            Some('T') => write!(out, "{h:02}:{min:02}:{s:02}"),
            Some('s') => write!(out, "{secs}"),
            Some('f') => {
                let nanos = format!("{:09}", d.subsec_nanos());
                let n = digits.unwrap_or(9).clamp(1, 9) as usize;
                write!(out, "{}", &nanos[..n])
            }
            Some('z') => write!(out, "+0000"),
            Some('Z') => write!(out, "UTC"),
            Some(other) => write!(out, "{other}"),
            None => Ok(()),
        };
    }
}

/// Year, month and day of a day since 1970 (Howard Hinnant's algorithm).
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let era = z / 146_097;
    let doe = z % 146_097;
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let m = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + u64::from(m <= 2), m, doy - (153 * mp + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    struct Sample;

    impl LogRecord for Sample {
        fn start(&self) -> SystemTime {
            UNIX_EPOCH + Duration::from_millis(1_709_210_096_789)
        }
        fn field(&self, field: Field, out: &mut String) -> bool {
            match field {
                Field::ResponseCode => out.push_str("200"),
                Field::ResponseFlags => out.push('-'),
                Field::UpstreamHost => out.push_str("10.0.0.1:80"),
                _ => return false,
            }
            true
        }
        fn request_header(&self, name: &str, out: &mut String) -> bool {
            match name {
                ":method" => out.push_str("GET"),
                ":path" => out.push_str("/a"),
                "user-agent" => out.push_str("x\" 200\r\ninjected"),
                _ => return false,
            }
            true
        }
        fn response_header(&self, _: &str, _: &mut String) -> bool {
            false
        }
        fn response_trailer(&self, _: &str, _: &mut String) -> bool {
            false
        }
        fn metadata(&self, namespace: &str, keys: &[String], out: &mut String) -> bool {
            let known = namespace == "envoy.common" && keys == ["access_log_hint"];
            out.push_str(if known { "true" } else { "" });
            known
        }
    }

    fn text(f: &str) -> String {
        Format::new(&AccessLogFormat::Text(f.into())).unwrap().render(&Sample, str::to_owned)
    }

    #[test]
    fn operators() {
        assert_eq!(text("%REQ(:METHOD)% %REQ(X-MISSING?:PATH)% %RESPONSE_CODE% 5%%"), "GET /a 200 5%\n");
        assert_eq!(text("%UPSTREAM_HOST:4% %BYTES_SENT%"), "10.0 -\n");
        assert_eq!(text("%START_TIME%"), "2024-02-29T12:34:56.789Z\n");
        assert_eq!(text("%START_TIME(%s.%6f)%"), "1709210096.789000\n");
        assert_eq!(
            text("%DYNAMIC_METADATA(envoy.common:access_log_hint)% %DYNAMIC_METADATA(a)%"),
            "true -\n"
        );
        for bad in [
            "%DYNAMIC_METADATA%",
            "%DYNAMIC_METADATA(a:)%",
            "%REQ(X",
            "%NOPE%",
            "%REQ%",
            "%RESPONSE_CODE:x%",
            "%REQ()%",
        ] {
            assert!(Template::new(bad).is_err(), "{bad}");
        }
        let line = text("");
        assert!(
            line.starts_with("[2024-02-29T12:34:56.789Z] \"GET /a -\" 200 - - - \"-\" - - - -"),
            "{line}"
        );
    }

    #[test]
    fn values_that_are_not_there_can_be_left_out() {
        let line =
            |f: AccessLogFormat| Format::new(&f).unwrap().omitting(true).render(&Sample, str::to_owned);
        assert_eq!(
            line(AccessLogFormat::Text("[%REQ(X)%] %BYTES_SENT:3%|%RESPONSE_FLAGS%|%RESPONSE_CODE%".into())),
            "[] |-|200\n"
        );
        let object = |fields: &[(&str, &str)]| {
            let fields = fields.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            line(AccessLogFormat::Json(fields))
        };
        let all = [
            ("a", "%REQ(X)%"),
            ("b", "%REQ(X):3%"),
            ("c", "%RESPONSE_CODE%"),
            ("d", "x%REQ(X)%"),
            ("e", "%REQ(X)%"),
            ("f", ""),
        ];
        assert_eq!(object(&all), "{\"c\":200,\"d\":\"x\",\"f\":\"\"}\n");
        assert_eq!(object(&all[..2]), "{}\n");
    }

    #[test]
    fn values_cannot_leave_their_place() {
        let line = text("\"%REQ(USER-AGENT)%\" end");
        assert_eq!(line, "\"x\\\" 200\\x0d\\x0ainjected\" end\n");
        let f = AccessLogFormat::Json(
            [
                ("a", "%REQ(USER-AGENT)%"),
                ("c", "%RESPONSE_CODE%"),
                ("m", "%REQ(X)%"),
                ("t", "x-%RESPONSE_CODE%"),
            ]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into(),
        );
        let line = Format::new(&f).unwrap().render(&Sample, str::to_owned);
        let v: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(v["a"], "x\" 200\r\ninjected");
        assert_eq!((&v["c"], &v["m"], &v["t"]), (&200.into(), &serde_json::Value::Null, &"x-200".into()));
    }
}

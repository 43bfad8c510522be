//! Writes logs and metrics to the standard streams, one JSON object per line.
//!
//! One thread writes for all handlers. Its queue is bounded: a reader of our output that stalls must
//! not stall policy, so lines are dropped and counted instead.

use std::{
    fmt,
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{SyncSender, TrySendError, sync_channel},
    },
    time::SystemTime,
};

use mesh_model::authored::{StdioLevel, StdioParams, StdioStream};
use serde_json::{Map, Value as Json};

use super::{Data, Input};
use crate::expr::{self, rfc3339};

/// Lines that wait: about a second of a busy mesh.
const QUEUE: usize = 8_192;

/// Where lines go.
#[derive(Clone)]
pub(crate) struct LogSink {
    queue: SyncSender<(bool, String)>,
    dropped: Arc<AtomicU64>,
}

impl fmt::Debug for LogSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogSink").field("dropped", &self.dropped()).finish_non_exhaustive()
    }
}

impl LogSink {
    /// Starts the writing thread; it ends with the last sink.
    pub(crate) fn start(
        mut out: Box<dyn Write + Send>,
        mut err: Box<dyn Write + Send>,
    ) -> std::io::Result<Self> {
        let (queue, lines) = sync_channel::<(bool, String)>(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let failed = dropped.clone();
        std::thread::Builder::new().name("mixer-stdio".into()).spawn(move || {
            for (to_err, line) in lines {
                let w = if to_err { &mut err } else { &mut out };
                // A closed pipe is not ours to repair; the count shows it.
                if w.write_all(line.as_bytes()).and_then(|()| w.flush()).is_err() {
                    failed.fetch_add(1, Ordering::Relaxed);
                }
            }
        })?;
        Ok(Self { queue, dropped })
    }

    fn send(&self, to_err: bool, line: String) {
        match self.queue.try_send((to_err, line)) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Lines dropped since the start.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
pub(crate) struct Stdio {
    sink: LogSink,
    to_err: bool,
    params: StdioParams,
}

fn rank(l: StdioLevel) -> u8 {
    match l {
        StdioLevel::Info => 0,
        StdioLevel::Warning => 1,
        StdioLevel::Error => 2,
    }
}

fn level_name(l: StdioLevel) -> &'static str {
    match l {
        StdioLevel::Info => "info",
        StdioLevel::Warning => "warn",
        StdioLevel::Error => "error",
    }
}

impl Stdio {
    pub(super) fn new(p: &StdioParams, sink: LogSink) -> Result<Self, String> {
        let to_err = match p.log_stream {
            StdioStream::Stdout => false,
            StdioStream::Stderr => true,
            StdioStream::File | StdioStream::RotatedFile => {
                return Err("only log streams STDOUT and STDERR are supported".into());
            }
        };
        Ok(Self { sink, to_err, params: p.clone() })
    }

    pub(super) fn report(&self, input: &Input) {
        let (level, time, fields) = match &input.data {
            Data::LogEntry { variables, timestamp, severity } => {
                let known = self.params.severity_levels.get(severity).copied();
                let level = known.unwrap_or(match severity.to_ascii_lowercase().as_str() {
                    "warning" | "warn" => StdioLevel::Warning,
                    "error" => StdioLevel::Error,
                    _ => StdioLevel::Info,
                });
                (level, *timestamp, variables.clone())
            }
            Data::Metric { value, dimensions } => {
                let mut fields = dimensions.clone();
                fields.insert("value".into(), value.clone());
                (self.params.metric_level, SystemTime::now(), fields)
            }
            _ => return,
        };
        if rank(level) < rank(self.params.output_level) {
            return;
        }
        let json = self.params.output_as_json.unwrap_or(true);
        self.sink.send(self.to_err, line(json, level, time, &input.instance, &fields));
    }
}

fn line(
    json: bool,
    level: StdioLevel,
    time: SystemTime,
    instance: &str,
    fields: &std::collections::BTreeMap<String, expr::Value>,
) -> String {
    if json {
        let mut object = Map::new();
        object.insert("level".into(), level_name(level).into());
        object.insert("time".into(), rfc3339(time).into());
        object.insert("instance".into(), instance.into());
        for (k, v) in fields {
            object.insert(k.clone(), v.to_json());
        }
        return format!("{}\n", Json::Object(object));
    }
    let mut out = format!("{}\t{}\t{instance}\t", rfc3339(time), level_name(level));
    // The values come from requests: quoted, so that they cannot forge a line.
    let object: Map<String, Json> = fields.iter().map(|(k, v)| (k.clone(), v.to_json())).collect();
    out.push_str(&Json::Object(object).to_string());
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_cannot_forge_a_line() {
        let fields = [("path".to_owned(), expr::Value::String("/a\n{\"level\":\"info\"}".into()))].into();
        for json in [true, false] {
            let l = line(json, StdioLevel::Warning, SystemTime::UNIX_EPOCH, "i", &fields);
            assert_eq!(l.matches('\n').count(), 1, "{l}");
            assert!(l.contains("warn") && l.contains("1970-01-01T00:00:00.000000Z"));
        }
    }
}

//! What was observed, for people as it happens and as JSON at the end.

use std::time::Instant;

use serde::Serialize;
use serde_json::Value;

/// One observation.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Observation {
    /// Part of the story.
    chapter: String,
    /// What was looked at.
    what: String,
    /// What should be seen.
    expected: String,
    /// What was seen.
    observed: Value,
    /// Whether they agree.
    ok: bool,
    /// Seconds since the start.
    at: f64,
}

/// All observations of a run.
pub(crate) struct Report {
    started: Instant,
    chapter: String,
    quiet: bool,
    observations: Vec<Observation>,
    error: Option<String>,
}

impl Report {
    /// With `json`, standard output is for the final report alone and the story goes to stderr.
    pub(crate) fn new(json: bool) -> Self {
        Self {
            started: Instant::now(),
            chapter: String::new(),
            quiet: json,
            observations: vec![],
            error: None,
        }
    }

    pub(crate) fn say(&self, line: &str) {
        if self.quiet {
            eprintln!("{line}");
        } else {
            println!("{line}");
        }
    }

    pub(crate) fn chapter(&mut self, title: &str) {
        self.chapter = title.to_owned();
        self.say(&format!("\n== {title}  [{:.1} s]", self.started.elapsed().as_secs_f64()));
    }

    /// Notes an observation and prints it.
    pub(crate) fn observe(&mut self, what: &str, expected: &str, observed: impl Into<Value>, ok: bool) {
        let observed = observed.into();
        let shown = match &observed {
            Value::String(s) => s.clone(),
            other => other.to_string(),
        };
        let verdict = if ok { "ok  " } else { "DIFFERS" };
        self.say(&format!("  {verdict} {what}: {shown}"));
        if !ok {
            self.say(&format!("          expected {expected}"));
        }
        self.observations.push(Observation {
            chapter: self.chapter.clone(),
            what: what.to_owned(),
            expected: expected.to_owned(),
            observed,
            ok,
            at: self.started.elapsed().as_secs_f64(),
        });
    }

    pub(crate) fn failed(&mut self, error: &str) {
        self.error = Some(error.to_owned());
    }

    pub(crate) fn all_as_expected(&self) -> bool {
        self.error.is_none() && self.observations.iter().all(|o| o.ok)
    }

    pub(crate) fn print_json(&self) -> anyhow::Result<()> {
        crate::output::json(&serde_json::json!({
            "ok": self.all_as_expected(),
            "seconds": self.started.elapsed().as_secs_f64(),
            "error": self.error,
            "observations": self.observations,
        }))
    }
}

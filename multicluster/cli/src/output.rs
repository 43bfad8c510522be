//! Tables that fit a terminal, JSON for scripts, progress for people.

use std::{io::Write as _, time::Duration};

use comfy_table::{ContentArrangement, Table, presets};

/// How to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    Text,
    /// For scripts.
    Json,
}

/// A table in the style of kubectl: no lines, columns as wide as needed.
pub(crate) fn table<const N: usize>(head: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut t = Table::new();
    t.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    t.set_header(head);
    for r in rows {
        t.add_row(r);
    }
    // Trailing padding only gets in the way when a line is copied.
    t.to_string().lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// Prints pretty JSON.
pub(crate) fn json<T: serde::Serialize>(value: &T) -> anyhow::Result<()> {
    text(&serde_json::to_string_pretty(value)?)
}

/// Prints text and a line's end. Whoever reads may have seen enough (`| head`), which is no fault.
pub(crate) fn text(text: &str) -> anyhow::Result<()> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

/// A duration for people: `420 ms`, `3.1 s`.
pub(crate) fn human(d: Duration) -> String {
    if d < Duration::from_secs(1) {
        format!("{} ms", d.as_millis())
    } else {
        format!("{:.1} s", d.as_secs_f64())
    }
}

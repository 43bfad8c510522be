//! `flotilla ca audit`: what the CA signed and whom it refused, and whether that is what it wrote.

use std::path::PathBuf;

use anyhow::Context;
use citadel::audit::{
    Entry, Event,
    verify::{Broken, log_of, verify},
};
use mesh_runtime::exit;
use serde_json::json;

use crate::{
    local::Local,
    output::{self, Format},
};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
It reads the files below --state-dir, also while no control plane runs. Every line is checked in any case; the exit code is 1 if \
one is not as it was written, and the first such line is named.

That lines at the end were cut off is seen with --head alone: `verify` shows the head, which has to be kept elsewhere.")]
pub(super) struct AuditArgs {
    /// Only say whether the log is as it was written, and its head
    #[arg(value_enum)]
    only: Option<Only>,
    #[command(flatten)]
    local: Local,
    /// Roots that the last signer has to be under, PEM; those of this cluster's CA by default
    #[arg(long, value_name = "FILE")]
    roots: Option<PathBuf>,
    /// An entry that must be there, as `verify` showed it: NUMBER:SHA256
    #[arg(long, value_name = "HEAD", value_parser = head)]
    head: Option<(u64, String)>,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Only {
    /// No entries
    Verify,
}

fn head(s: &str) -> Result<(u64, String), String> {
    let wrong = || "is not NUMBER:SHA256".to_owned();
    let (number, hash) = s.split_once(':').ok_or_else(wrong)?;
    if hash.len() != 64 || !hash.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(wrong());
    }
    Ok((number.parse().map_err(|_| wrong())?, hash.to_owned()))
}

pub(super) fn run(args: &AuditArgs) -> anyhow::Result<u8> {
    let dir = &args.local.state_dir;
    let files = log_of(dir)?;
    let roots = args.roots.clone().unwrap_or_else(|| dir.join("ca/root-cert.pem"));
    let roots = std::fs::read(&roots).with_context(|| format!("roots: {}", roots.display()))?;
    let mut written = Ok(());
    let known = args.head.as_ref().map(|(n, h)| (*n, h.as_str()));
    let done = verify(&files, &roots, known, |e| {
        if args.only.is_none() && written.is_ok() {
            written = show(e, args.output);
        }
    });
    written?;
    if let Err(e @ Broken::Io { .. }) = done {
        return Err(e.into());
    }
    let code = if done.is_ok() { exit::OK } else { exit::FAILED };
    match (done, args.output) {
        (Ok(v), Format::Json) if args.only.is_some() => {
            output::text(&json!({"intact": true, "first": v.first, "last": v.last, "head": format!("{}:{}", v.last, v.head)}).to_string())?;
        }
        (Err(e), Format::Json) if args.only.is_some() => {
            output::text(&json!({"intact": false, "reason": e.to_string()}).to_string())?;
        }
        (Ok(_), Format::Json) => {}
        (Ok(v), Format::Text) => {
            let from = if v.first > 1 {
                format!(", of which the first {} are not here", v.first - 1)
            } else {
                String::new()
            };
            output::text(&format!(
                "The log is as it was written: {} entries{from}. Head {}:{}",
                v.last, v.last, v.head
            ))?;
        }
        (Err(e), _) => eprintln!("error: the log is not as it was written: {e}"),
    }
    Ok(code)
}

fn show(e: &Entry, format: Format) -> anyhow::Result<()> {
    if format == Format::Json {
        return output::text(&serde_json::to_string(e)?);
    }
    let at = e.written();
    let what = match &e.event {
        Event::Signer { .. } => "the log is signed by another key from here on".to_owned(),
        Event::Issued { serial, identity, proof, .. } => {
            format!("issued {identity} serial {serial} on {} {} {}", proof.kind, proof.id, proof.caller)
        }
        Event::Intermediate { serial, cluster, proof, .. } => {
            format!("signed the intermediate of {cluster} serial {serial} on {}", proof.kind)
        }
        Event::Revoked { serial, of, reason } if serial.is_empty() => {
            format!("refuses tokens of {of} from before ({reason})")
        }
        Event::Revoked { serial, of, reason } => format!("revoked serial {serial} of {of} ({reason})"),
        Event::Removed { through, head } => {
            format!("removed the entries up to {through} (SHA-256 {head}), as the log is to be no larger")
        }
        Event::Refused { identity, proof, reason, left_out } => {
            let more =
                if *left_out > 0 { format!(" ({left_out} before it are not here)") } else { String::new() };
            let who = if identity.is_empty() { "somebody" } else { identity };
            format!("refused {who} on {} {} {}: {reason}{more}", proof.kind, proof.id, proof.caller)
        }
    };
    // Texts of callers are in it.
    let what: String = what.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    output::text(&format!("{} {at} {}", e.number, what.trim_end()))
}

//! `flotilla analyze`.

use std::{fmt::Write as _, path::PathBuf};

use anyhow::bail;
use galley::{AnalyzeOptions, Level, Message, Standing, Suppression};

use crate::output;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit status: 0 nothing at or above the failure threshold, 1 findings, 2 some file could not be read.\n\n\
    A document suppresses codes by its annotation galley.istio.io/analyze-suppress: \"IST0107,IST0108\" (or \"*\").\n\
    Selectors that match nothing are told only if Pods, Deployments or the like are among the documents."
)]
pub(crate) struct AnalyzeArgs {
    /// File or directory of documents, repeated; `-` is standard input
    #[arg(short = 'f', long = "filename", required_unless_present = "list")]
    files: Vec<PathBuf>,
    /// Output format; json is an array with one object per finding
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    /// Tell only of documents of this namespace, and of those in none
    #[arg(short, long, conflicts_with = "all_namespaces")]
    namespace: Option<String>,
    /// Tell of documents of all namespaces, which is the default
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Do not tell a code about a resource, `*` is any text; repeated: "IST0102=VirtualService foo.bar"
    #[arg(short = 'S', long = "suppress", value_name = "CODE=RESOURCE")]
    suppress: Vec<Suppression>,
    /// Lowest level of findings that fails the command
    #[arg(long, value_enum, default_value_t = Threshold::Error, ignore_case = true)]
    failure_threshold: Threshold,
    /// Lowest level of findings that is shown
    #[arg(long, value_enum, default_value_t = Threshold::Info, ignore_case = true)]
    output_threshold: Threshold,
    /// Hosts that exist although no document says so, in full; repeated
    #[arg(long = "known-host", value_name = "HOST")]
    known_hosts: Vec<String>,
    /// List every code, and why some of Istio's have no meaning here
    #[arg(short = 'L', long)]
    list: bool,
}

/// How to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
enum Format {
    /// For people.
    #[default]
    Table,
    /// For scripts.
    Json,
}

/// A level on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Threshold {
    Info,
    Warning,
    Error,
}

impl From<Threshold> for Level {
    fn from(t: Threshold) -> Self {
        match t {
            Threshold::Info => Self::Info,
            Threshold::Warning => Self::Warning,
            Threshold::Error => Self::Error,
        }
    }
}

pub(crate) fn run(args: &AnalyzeArgs) -> anyhow::Result<u8> {
    if args.list {
        list(args.output)?;
        return Ok(mesh_runtime::exit::OK);
    }
    if args.files.iter().filter(|f| f.as_os_str() == "-").count() > 1 {
        bail!("standard input can be read once only");
    }
    let options = AnalyzeOptions {
        namespace: args.namespace.clone(),
        suppressions: args.suppress.clone(),
        known_hosts: args.known_hosts.iter().cloned().collect(),
    };
    let report = galley::analyze_files(&args.files, &mut std::io::stdin(), &options);
    for (file, reason) in &report.unreadable {
        eprintln!("error: {file}: {reason}");
    }
    let lowest = Level::from(args.output_threshold);
    let shown: Vec<&Message> = report.messages.iter().filter(|m| m.level >= lowest).collect();
    match args.output {
        Format::Json => output::json(&shown)?,
        Format::Table => table(&shown, report.documents)?,
    }
    Ok(report.exit_code(args.failure_threshold.into()))
}

/// One finding per line, as compilers do: terminals and editors find the place.
fn table(messages: &[&Message], documents: usize) -> anyhow::Result<()> {
    let mut out = String::new();
    for m in messages {
        let _ = writeln!(
            out,
            "{} [{}] {} {}:{}: {}",
            m.level.name(),
            m.code,
            m.origin,
            m.reference.file,
            m.reference.line,
            m.message
        );
    }
    let count = |l: Level| messages.iter().filter(|m| m.level == l).count();
    let _ = write!(
        out,
        "{documents} documents: {} errors, {} warnings, {} infos",
        count(Level::Error),
        count(Level::Warning),
        count(Level::Info)
    );
    output::text(&out)
}

fn list(format: Format) -> anyhow::Result<()> {
    let all = galley::catalogue();
    if format == Format::Json {
        return output::json(&all);
    }
    let rows = all.iter().map(|c| {
        let (level, says) = match c.standing {
            Standing::Told => (c.level.name(), c.description.to_owned()),
            Standing::NotHere(why) => ("-", format!("not here: {why}")),
            Standing::Retired(why) => ("-", format!("retired by Istio: {why}")),
        };
        [c.code.to_owned(), level.to_owned(), c.name.to_owned(), says]
    });
    output::text(&output::table(["CODE", "LEVEL", "NAME", "WHEN"], rows))
}

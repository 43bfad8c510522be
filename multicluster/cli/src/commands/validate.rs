//! `flotilla validate`.

use std::path::PathBuf;

use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit status: 0 all documents are valid, 1 some are not, 2 some file could not be read."
)]
pub(crate) struct ValidateArgs {
    /// File or directory of documents, repeated; `-` is standard input
    #[arg(short = 'f', long = "filename", required = true)]
    files: Vec<PathBuf>,
    /// Output format; json is an array with one object per document
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

pub(crate) fn run(args: &ValidateArgs) -> anyhow::Result<u8> {
    let verdict = galley::validate_files(&args.files, &mut std::io::stdin());
    match args.output {
        Format::Json => output::json(&verdict.reports)?,
        Format::Text => print!("{}", galley::render_text(&verdict.reports)),
    }
    Ok(verdict.exit_code())
}

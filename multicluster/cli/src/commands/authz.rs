//! `flotilla authz`.

use std::{io::Read as _, path::PathBuf};

use anyhow::Context as _;
use flotilla_simulate::{Decision, Mesh, Options, RequestFile};

use crate::output::{self, Format};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum AuthzCommand {
    /// Say whether policies let a request in, by which rule, and what each rule missed
    Check(CheckArgs),
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
The request is a flat map of attributes, JSON or YAML; what is left out is not there:

  workload.namespace: shop                      # of the workload that is asked for, with workload.labels[x]
  workload.labels[app]: cart
  source.principal: mesh.local/ns/shop/sa/front # or source.namespace, source.serviceAccount; source.cluster, source.ip
  request.method: GET                           # request.host, request.url_path, request.headers[x]
  request.url_path: /items
  request.auth.claims[groups]: [admin]          # request.auth.principal, request.auth.audiences
  destination.port: 8080                        # destination.ip, remote.ip, connection.sni

Without any request.* it is a connection of bytes.

Exit status: 0 allowed, 1 denied, 2 the question could not be asked.")]
pub(crate) struct CheckArgs {
    /// File or directory of documents, repeated
    #[arg(short = 'f', long = "filename", required = true)]
    files: Vec<PathBuf>,
    /// The request; `-` is standard input
    #[arg(long)]
    request: PathBuf,
    /// Trust domain, unless a MeshConfig document names one
    #[arg(long, default_value = "mesh.local")]
    trust_domain: String,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Attributes of a request fit into this.
const MAX_REQUEST: u64 = 1 << 20;

pub(crate) fn run(command: &AuthzCommand) -> anyhow::Result<u8> {
    let AuthzCommand::Check(args) = command;
    let options = Options { trust_domain: args.trust_domain.clone(), assume: false, ..Options::default() };
    let mesh = Mesh::load(&args.files, &mut std::io::empty(), &options)?;
    super::simulate::warn(&mesh)?;
    let mut text = String::new();
    let name = args.request.display();
    if args.request.as_os_str() == "-" {
        std::io::stdin().take(MAX_REQUEST).read_to_string(&mut text)
    } else {
        std::fs::File::open(&args.request).and_then(|f| f.take(MAX_REQUEST).read_to_string(&mut text))
    }
    .with_context(|| format!("{name} cannot be read"))?;
    let request = RequestFile::parse(&text).with_context(|| format!("{name}"))?;
    let decision = mesh.authorize(&request).with_context(|| format!("{name}"))?;
    match args.output {
        Format::Json => output::json(&decision)?,
        Format::Text => output::text(&words(&decision))?,
    }
    Ok(u8::from(decision.decision != "allow"))
}

/// A policy with its kind. A role's has its binding behind it, which no name of a policy can have.
fn named(policy: &str) -> String {
    match policy.strip_suffix(')').and_then(|p| p.split_once(" (")) {
        Some((role, binding)) => format!("ServiceRole {role}, by ServiceRoleBinding {binding}"),
        None if policy.ends_with("/not-by-role") => {
            format!("{policy}: of no service whose access is by role")
        }
        None => format!("AuthorizationPolicy {policy}"),
    }
}

fn words(d: &Decision) -> String {
    let rule = |r: Option<usize>| r.map_or(String::new(), |r| format!(", rule {r}"));
    let by = match &d.policy {
        Some(p) => format!("{}{}", named(p), rule(d.rule)),
        None if d.decision == "deny" => "no ALLOW policy lets it in".to_owned(),
        None => "nothing forbids it".to_owned(),
    };
    let mut out = vec![format!("{}: {by}", d.decision)];
    out.extend(
        d.custom.iter().map(|p| format!("asks {p} first (CUSTOM); what follows holds if it says yes")),
    );
    out.extend(d.audit.iter().map(|p| format!("audit: AuthorizationPolicy {p}")));
    out.extend(d.dry_run.iter().map(|p| format!("dry run: {} matches", named(p))));
    for m in &d.missed {
        out.push(format!("{} {}{} does not match:", m.action, m.policy, rule(m.rule)));
        out.extend(m.conditions.iter().map(|c| format!("  {c}")));
    }
    out.join("\n")
}

//! `flotilla ca bundle`: trust bundles as SPIFFE and others write them, from here, an endpoint or a file.

use std::path::PathBuf;

use anyhow::{Context, bail};
use mesh_identity::{TrustBundle, not_after, root_pin};
use mesh_model::{SpiffeId, TrustDomain};
use mesh_runtime::exit;
use multicluster::{
    authority_pb::StatusRequest,
    bundle::{BundleUrl, SYSTEM_ROOTS, fetch, spiffe_tls, web_tls},
};

use super::{left, seconds};
use crate::{
    local::{Local, refusal},
    output,
};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Without --from and --file it is the bundle of this cluster's trust domain. What an endpoint of profile https_spiffe tells is \
verified by --bundle, which is that domain's bundle from elsewhere; one of https_web by --web-roots.

  flotilla ca bundle -o spiffe > a.example.json
  flotilla ca bundle --from https://b.example/ --trust-domain b.example -o pem
  flotilla ca bundle --from https://b.example/ --trust-domain b.example --bundle b.pem \\
    --endpoint-spiffe-id spiffe://b.example/ns/flotilla-system/sa/control-plane")]
pub(super) struct BundleArgs {
    #[command(flatten)]
    local: Local,
    /// URL of a bundle endpoint
    #[arg(long, value_name = "URL", requires = "trust_domain")]
    from: Option<String>,
    /// File with a bundle: PEM, or a SPIFFE document
    #[arg(long, requires = "trust_domain", conflicts_with = "from")]
    file: Option<PathBuf>,
    /// Whose bundle that is; a bundle does not say
    #[arg(long)]
    trust_domain: Option<TrustDomain>,
    /// Whom the certificate of an https_spiffe endpoint names; without it the profile is https_web
    #[arg(long, value_name = "SPIFFE_ID", requires_all = ["from", "bundle"])]
    endpoint_spiffe_id: Option<String>,
    /// Bundle that an https_spiffe endpoint is verified by, of the trust domain in --endpoint-spiffe-id
    #[arg(long, value_name = "FILE", requires = "endpoint_spiffe_id")]
    bundle: Option<PathBuf>,
    /// Authorities that an https_web endpoint is verified by, PEM
    #[arg(long, value_name = "FILE", default_value = SYSTEM_ROOTS)]
    web_roots: PathBuf,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Form,
}

#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum Form {
    /// For people
    #[default]
    Text,
    /// The roots, PEM
    Pem,
    /// A SPIFFE document (JSON)
    Spiffe,
}

pub(super) async fn run(args: BundleArgs) -> anyhow::Result<u8> {
    let bundle = match (&args.from, &args.file, &args.trust_domain) {
        (Some(url), _, Some(domain)) => from(url, domain, &args).await?,
        (None, Some(file), Some(domain)) => read("--file", file, domain)?,
        _ => own(&args.local).await?,
    };
    match args.output {
        Form::Spiffe => output::text(&bundle.document())?,
        Form::Pem => output::text(bundle.pem().trim_end())?,
        Form::Text => {
            let hint = bundle
                .refresh_hint
                .map_or(String::new(), |h| format!(", to be asked for every {} s", h.as_secs()));
            output::text(&format!("Trust domain {}, bundle {}{hint}", bundle.trust_domain, bundle.sequence))?;
            for r in &bundle.roots {
                output::text(&format!("root {}: {}", root_pin(r), left(not_after(r).map_or(0, seconds))))?;
            }
        }
    }
    Ok(exit::OK)
}

async fn own(local: &Local) -> anyhow::Result<TrustBundle> {
    let a = match local.authority().await?.status(StatusRequest {}).await {
        Ok(r) => r.into_inner(),
        Err(s) => bail!(refusal(&s)),
    };
    if a.state != "active" {
        bail!("cluster {} is in no mesh and has no bundle", a.cluster);
    }
    let domain = TrustDomain::new(&a.trust_domain)?;
    Ok(TrustBundle::from_pem(domain, a.bundle.as_bytes(), a.bundle_sequence, None)?)
}

fn read(flag: &str, file: &PathBuf, domain: &TrustDomain) -> anyhow::Result<TrustBundle> {
    let text = std::fs::read_to_string(file).with_context(|| format!("{flag} {}", file.display()))?;
    let read = if text.trim_start().starts_with('{') {
        TrustBundle::parse(domain.clone(), &text)
    } else {
        TrustBundle::from_pem(domain.clone(), text.as_bytes(), 0, None)
    };
    read.with_context(|| format!("{flag} {}", file.display()))
}

async fn from(url: &str, domain: &TrustDomain, args: &BundleArgs) -> anyhow::Result<TrustBundle> {
    let url = BundleUrl::parse(url).context("--from")?;
    let tls = match (&args.endpoint_spiffe_id, &args.bundle) {
        (Some(id), Some(file)) => {
            let id = SpiffeId::parse(id).context("--endpoint-spiffe-id")?;
            spiffe_tls(&read("--bundle", file, &TrustDomain::new(id.trust_domain())?)?, &id)?
        }
        _ => {
            let file = &args.web_roots;
            let pem = std::fs::read(file).with_context(|| format!("--web-roots {}", file.display()))?;
            web_tls(&pem).with_context(|| format!("--web-roots {}", file.display()))?
        }
    };
    fetch(&url, domain, tls).await.with_context(|| format!("--from {url}"))
}

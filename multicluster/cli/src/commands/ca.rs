//! `flotilla ca`: the roots of the mesh and replacing them, what was signed, and revoking it.

mod audit;
mod bundle;
mod revoke;

use std::{
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use citadel::rotation::{Report, distrusts, silent};
use mesh_identity::{certificate_info, pem_certificates, root_pin};
use mesh_runtime::exit;
use multicluster::{
    admin_pb::{CaRotateRequest, CaStatusRequest, CaStatusResponse},
    authority_pb::{AuthorityStatus, MemberRoots, ProbeRequest, StatusRequest},
};
use serde_json::{Value, json};

use super::doctor::in_words;
use crate::{
    local::{Local, refusal},
    output::{self, Format},
};

#[derive(Debug, clap::Args)]
pub(crate) struct CaArgs {
    #[command(subcommand)]
    command: CaCommand,
}

#[derive(Debug, clap::Subcommand)]
enum CaCommand {
    /// Show the roots, which of them signs, and this cluster's intermediate
    Show(AskArgs),
    /// Show how every member stands with the roots; of all of them only where the root key is
    #[command(after_help = "\
SEQ     number of the bundle that its control plane trusts
PROXIES of its connected proxies, those that have acknowledged that bundle
RENEWED of them, those whose certificate is under its intermediate of now
ROOT    the one above its intermediate")]
    Status(AskArgs),
    /// Let this cluster's CA sign a request as a workload's, and verify what it signed
    #[command(
        after_help = "Exit codes: 0 it signs, 1 it does not (or the cluster is in no mesh), 2 nobody answers."
    )]
    Probe(AskArgs),
    /// Show or export the bundle of this trust domain, or that of an endpoint or file
    Bundle(bundle::BundleArgs),
    /// Show what was signed and refused, and verify that the log of it is as it was written
    Audit(audit::AuditArgs),
    /// Revoke a certificate, all of a workload, or a cluster's intermediates
    Revoke(revoke::RevokeArgs),
    /// Replace the root, where its key is: prepare, activate, finish
    Rotate(RotateArgs),
}

#[derive(Debug, clap::Args)]
struct AskArgs {
    #[command(flatten)]
    local: Local,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Each step may be repeated, and nothing is done twice. Exit codes: 0 it is done, 1 it was refused (the answer names every \
member that has to be waited for, and why), 2 nobody answers.

A member that is gone for good blocks until it is evicted (`flotilla evict-cluster`). A proxy that is not connected when the \
rotation is finished needs the new root in its --root-cert, and starts anew. Meshes of other trust domains learn the roots by \
themselves; `flotilla ca status` shows what they were told.")]
struct RotateArgs {
    #[command(subcommand)]
    step: RotateStep,
}

#[derive(Debug, clap::Subcommand)]
enum RotateStep {
    /// Trust a new root everywhere; the old one goes on signing
    Prepare {
        #[command(flatten)]
        ask: AskArgs,
        /// A root to use instead of a new one, PEM
        #[arg(long, requires = "root_key")]
        root_cert: Option<PathBuf>,
        /// Its key, PEM (PKCS #8); it is kept in the state directory
        #[arg(long, requires = "root_cert")]
        root_key: Option<PathBuf>,
    },
    /// Let the new root sign; refused until every member, with all of its proxies, trusts it
    Activate(AskArgs),
    /// Trust the old root no more; refused while anybody shows a certificate under it
    Finish(AskArgs),
    /// Take back what was prepared; not after it was activated
    Abort(AskArgs),
}

pub(crate) async fn run(args: CaArgs) -> anyhow::Result<u8> {
    match args.command {
        CaCommand::Show(a) => show(a).await,
        CaCommand::Status(a) => status(a).await,
        CaCommand::Probe(a) => probe(a).await,
        CaCommand::Bundle(a) => bundle::run(a).await,
        CaCommand::Audit(a) => audit::run(&a),
        CaCommand::Revoke(a) => revoke::run(a).await,
        CaCommand::Rotate(RotateArgs { step }) => match step {
            RotateStep::Prepare { ask, root_cert, root_key } => {
                let read = |p: Option<PathBuf>, flag: &str| match p {
                    None => Ok(String::new()),
                    Some(p) => std::fs::read_to_string(&p).with_context(|| format!("{flag} {}", p.display())),
                };
                let (cert, key) = (read(root_cert, "--root-cert")?, read(root_key, "--root-key")?);
                rotate(ask, "prepare", cert, key).await
            }
            RotateStep::Activate(a) => rotate(a, "activate", String::new(), String::new()).await,
            RotateStep::Finish(a) => rotate(a, "finish", String::new(), String::new()).await,
            RotateStep::Abort(a) => rotate(a, "abort", String::new(), String::new()).await,
        },
    }
}

/// A root of the bundle.
struct Root {
    pin: String,
    not_after: u64,
    signs: bool,
}

fn seconds(t: SystemTime) -> u64 {
    t.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn roots(a: &AuthorityStatus) -> anyhow::Result<Vec<Root>> {
    let all = pem_certificates("the bundle", a.bundle.as_bytes())?;
    let root = |(n, der): (usize, &rustls::pki_types::CertificateDer<'_>)| Root {
        pin: root_pin(der),
        not_after: mesh_identity::not_after(der).map_or(0, seconds),
        signs: n == 0,
    };
    Ok(all.iter().enumerate().map(root).collect())
}

fn left(ends: u64) -> String {
    let left = (UNIX_EPOCH + Duration::from_secs(ends)).duration_since(SystemTime::now());
    left.map_or_else(|_| "expired".to_owned(), |l| format!("ends in {}", in_words(l)))
}

/// The beginning of a pin is enough to tell two roots apart.
fn short(pin: &str) -> &str {
    pin.get(..12).unwrap_or(pin)
}

async fn probe(args: AskArgs) -> anyhow::Result<u8> {
    let answer = args.local.authority().await?.probe(ProbeRequest {}).await;
    match (answer, args.output) {
        (Ok(p), Format::Json) => {
            let p = p.into_inner();
            output::json(&json!({"signs": true, "identity": p.identity, "serial": p.serial,
                "certificates": p.certificates, "tookMicroseconds": p.took_us}))?;
            Ok(exit::OK)
        }
        (Ok(p), Format::Text) => {
            let p = p.into_inner();
            output::text(&format!(
                "The CA signs: {} verified through {} certificates after {:.1} ms.",
                p.identity,
                p.certificates,
                // Far below what an f64 holds exactly.
                std::time::Duration::from_micros(p.took_us).as_secs_f64() * 1e3
            ))?;
            Ok(exit::OK)
        }
        (Err(s), _) if s.code() == tonic::Code::Unavailable => anyhow::bail!(refusal(&s)),
        (Err(s), Format::Json) => {
            output::json(&json!({"signs": false, "reason": s.message()}))?;
            Ok(exit::FAILED)
        }
        (Err(s), Format::Text) => {
            output::text(&format!("The CA does not sign: {}", s.message()))?;
            Ok(exit::FAILED)
        }
    }
}

async fn show(args: AskArgs) -> anyhow::Result<u8> {
    let a = match args.local.authority().await?.status(StatusRequest {}).await {
        Ok(r) => r.into_inner(),
        Err(s) => anyhow::bail!(refusal(&s)),
    };
    if a.state != "active" {
        match args.output {
            Format::Json => output::json(&json!({"cluster": a.cluster, "trustDomain": Value::Null}))?,
            Format::Text => println!("Cluster {} is in no mesh.", a.cluster),
        }
        return Ok(exit::FAILED);
    }
    let all = roots(&a)?;
    let own = certificate_info(a.chain.as_bytes())?;
    let ends = seconds(own.not_after);
    if args.output == Format::Json {
        let all: Vec<_> = all
            .iter()
            .map(|r| json!({"pin": r.pin, "signs": r.signs, "expiresUnixSeconds": r.not_after}))
            .collect();
        output::json(&json!({
            "cluster": a.cluster, "trustDomain": a.trust_domain, "sequence": a.bundle_sequence, "phase": a.phase,
            "holdsRootKey": a.holds_root_key, "roots": all,
            "intermediate": {
                "sha256": a.intermediate_sha256, "serial": own.serial, "root": a.issuer_pin,
                "expiresUnixSeconds": ends, "renewalDue": Some(&a.renewal_due).filter(|d| !d.is_empty()),
            },
            "revoked": a.revoked.iter().map(|r| json!({
                "serial": r.serial, "of": r.of, "reason": r.reason, "atUnixSeconds": r.at,
                "expiresUnixSeconds": r.until,
            })).collect::<Vec<_>>(),
        }))?;
        return Ok(exit::OK);
    }
    println!("Mesh {}, bundle {}, rotation: {}.", a.trust_domain, a.bundle_sequence, a.phase);
    for r in &all {
        let signs = match (r.signs, a.holds_root_key) {
            (true, true) => ", signs, its key is here",
            (true, false) => ", signs",
            _ => "",
        };
        println!("root {}: {}{signs}", r.pin, left(r.not_after));
    }
    let due =
        if a.renewal_due.is_empty() { String::new() } else { format!(", to be renewed: {}", a.renewal_due) };
    println!("intermediate of {}: {}, under root {}{due}", a.cluster, left(ends), short(&a.issuer_pin));
    for r in &a.revoked {
        println!("revoked {} of {} ({}): {}", r.serial, r.of, r.reason, left(r.until));
    }
    Ok(exit::OK)
}

fn report(m: &MemberRoots) -> Report {
    Report {
        cluster: m.cluster.clone(),
        age: m.age_ms.map(Duration::from_millis),
        sequence: m.sequence,
        root: m.root.clone(),
        proxies: m.proxies,
        trusting: m.trusting,
        renewed: m.renewed,
        late: m.late.clone(),
        error: m.error.clone(),
    }
}

/// Whether a member has acknowledged the bundle, in words.
fn state(m: &MemberRoots, sequence: u64) -> String {
    let r = report(m);
    silent(&r).or_else(|| distrusts(&r, sequence)).unwrap_or_else(|| "acknowledged".to_owned())
}

async fn status(args: AskArgs) -> anyhow::Result<u8> {
    let r: CaStatusResponse = match args.local.admin().await?.ca_status(CaStatusRequest {}).await {
        Ok(r) => r.into_inner(),
        Err(s) => anyhow::bail!(refusal(&s)),
    };
    let a = r.authority.unwrap_or_default();
    let sequence = a.bundle_sequence;
    if args.output == Format::Json {
        let members: Vec<_> = r
            .members
            .iter()
            .map(|m| {
                let state = state(m, sequence);
                json!({
                    "cluster": m.cluster, "sequence": m.sequence, "root": m.root, "proxies": m.proxies,
                    "trusting": m.trusting, "renewed": m.renewed, "late": m.late, "lastHeardMs": m.age_ms,
                    "acknowledged": state == "acknowledged", "state": state,
                })
            })
            .collect();
        let told: Vec<_> = r
            .told
            .iter()
            .map(|t| {
                json!({
                    "cluster": t.cluster, "trustDomain": t.trust_domain, "sequence": t.sequence,
                    "lastAskedMs": t.age_ms,
                })
            })
            .collect();
        output::json(&json!({
            "trustDomain": a.trust_domain, "sequence": sequence, "phase": a.phase, "root": a.root_pin,
            "holdsRootKey": a.holds_root_key, "members": members, "otherDomains": told,
            "revocationLists": r.lists.iter().map(|l| json!({
                "trustDomain": l.trust_domain, "cluster": Some(&l.cluster).filter(|c| !c.is_empty()), "issuer": l.issuer,
                "number": l.number, "revoked": l.revoked, "nextUpdateUnixSeconds": l.next_update,
            })).collect::<Vec<_>>(),
        }))?;
        return Ok(exit::OK);
    }
    if a.state != "active" {
        println!("Cluster {} is in no mesh.", a.cluster);
        return Ok(exit::OK);
    }
    println!(
        "Mesh {}, bundle {sequence}, rotation: {}, root {} signs.",
        a.trust_domain,
        a.phase,
        short(&a.root_pin)
    );
    let rows = r.members.iter().map(|m| {
        let heard =
            m.age_ms.map_or("-".to_owned(), |ms| format!("{:.1} s", Duration::from_millis(ms).as_secs_f64()));
        let of = |n: u32| format!("{n}/{}", m.proxies);
        let known = m.age_ms.is_some();
        let or = |s: String| if known { s } else { "-".to_owned() };
        [
            m.cluster.clone(),
            or(m.sequence.to_string()),
            or(of(m.trusting)),
            or(of(m.renewed)),
            or(short(&m.root).to_owned()),
            heard,
            state(m, sequence),
        ]
    });
    println!("{}", output::table(["CLUSTER", "SEQ", "PROXIES", "RENEWED", "ROOT", "HEARD", "STATE"], rows));
    for l in r.lists.iter().filter(|l| l.revoked > 0) {
        let by = if l.cluster.is_empty() { "the root" } else { &l.cluster };
        println!("{by} of {} has revoked {} (list {})", l.trust_domain, l.revoked, l.number);
    }
    for t in &r.told {
        println!("{} of {} was told bundle {}", t.cluster, t.trust_domain, t.sequence);
    }
    if !a.holds_root_key {
        println!("Of other members the cluster with the root key knows.");
    }
    Ok(exit::OK)
}

async fn rotate(args: AskArgs, step: &str, root_cert: String, root_key: String) -> anyhow::Result<u8> {
    let request = CaRotateRequest { step: step.to_owned(), root_cert, root_key };
    let done = match args.local.admin().await?.ca_rotate(request).await {
        Ok(r) => r.into_inner(),
        Err(s) => {
            eprintln!("error: {step}: {}", refusal(&s));
            return Ok(exit::FAILED);
        }
    };
    let a = done.status.unwrap_or_default();
    let refused = !done.blockers.is_empty();
    if args.output == Format::Json {
        let blockers: Vec<_> =
            done.blockers.iter().map(|b| json!({"cluster": b.cluster, "why": b.why})).collect();
        output::json(&json!({
            "step": step, "changed": done.changed, "phase": a.phase, "sequence": a.bundle_sequence,
            "root": a.root_pin, "says": done.says, "waitingFor": blockers,
        }))?;
    } else if refused {
        eprintln!("error: {step}: not yet, nothing was changed. It has to wait for");
        for b in &done.blockers {
            eprintln!("  {}: {}", b.cluster, b.why);
        }
    } else if done.changed {
        println!(
            "Done: bundle {}, rotation: {}, root {} signs.",
            a.bundle_sequence,
            a.phase,
            short(&a.root_pin)
        );
        println!("{}", next(step));
    } else {
        println!("Nothing to do: {}.", done.says);
    }
    Ok(if refused { exit::FAILED } else { exit::OK })
}

fn next(step: &str) -> &'static str {
    match step {
        "prepare" => {
            "Members and proxies are told; when `flotilla ca status` shows all of them: `flotilla ca rotate activate`."
        }
        "activate" => {
            "Members and proxies renew; when nobody needs the old root: `flotilla ca rotate finish`."
        }
        "finish" => "The old root is trusted no more. New proxies need the new one in --root-cert.",
        _ => "The new root is trusted no more, and its key is deleted.",
    }
}

//! `found`, `join-cluster`, `leave-cluster`, `evict-cluster`.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::Context;
use mesh_runtime::exit;
use multicluster::{
    admin_pb::{EvictRequest, LeaveMeshRequest, PrepareJoinRequest},
    authority_pb::FoundRequest,
    join::{join as dial_and_join, join_dialled},
    token::JoinToken,
};
use tokio::net::TcpListener;

use crate::{
    local::{Local, refusal},
    output::{self, Format, human},
};

#[derive(Debug, clap::Args)]
pub(crate) struct FoundArgs {
    #[command(flatten)]
    local: Local,
    /// Trust domain of the mesh; the control plane's (`flotilla control-plane --trust-domain`), and no other
    #[arg(long)]
    trust_domain: Option<String>,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

pub(crate) async fn found(args: FoundArgs) -> anyhow::Result<u8> {
    let request = FoundRequest { trust_domain: args.trust_domain.unwrap_or_default() };
    match args.local.authority().await?.found(request).await {
        Ok(r) => {
            let r = r.into_inner();
            match args.output {
                Format::Json => output::json(&serde_json::json!({
                    "trustDomain": r.trust_domain, "cluster": r.cluster, "rootPin": r.root_pin,
                    "rootCert": r.bundle,
                }))?,
                Format::Text => {
                    println!(
                        "Founded mesh {} with cluster {} as its first member.",
                        r.trust_domain, r.cluster
                    );
                    println!("Root certificate SHA-256: {}", r.root_pin);
                    println!(
                        "Next: `flotilla token create` here, `flotilla join-cluster TOKEN` in the next cluster."
                    );
                }
            }
            Ok(exit::OK)
        }
        Err(s) => {
            eprintln!("error: no mesh was founded: {}", refusal(&s));
            Ok(exit::FAILED)
        }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct JoinArgs {
    /// Join token from `flotilla token create`; `-` reads it from standard input
    token: String,
    /// Waits here for the member, which dials (`flotilla token create --dial`), such as 0.0.0.0:15443
    #[arg(long, value_name = "ADDRESS")]
    accept: Option<SocketAddr>,
    #[command(flatten)]
    local: Local,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

pub(crate) async fn join(args: JoinArgs) -> anyhow::Result<u8> {
    let started = Instant::now();
    let text = match args.token.as_str() {
        "-" => std::io::read_to_string(std::io::stdin()).context("standard input")?,
        t => t.to_owned(),
    };
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
    let say = |line: String| {
        if args.output == Format::Text {
            println!("{line}");
        }
    };
    let failed = |e: String| {
        eprintln!("error: not joined: {e}");
        Ok(exit::FAILED)
    };
    let token = match JoinToken::parse(&text, now) {
        Ok(t) => t,
        Err(e) => return failed(e.to_string()),
    };
    if args.accept.is_some() && !token.dials {
        return failed(format!(
            "cluster {} waits to be dialled: leave out --accept, or create the token with --dial",
            token.cluster
        ));
    }
    let listener = match args.accept {
        None => None,
        Some(at) => match TcpListener::bind(at).await {
            Ok(l) => Some(l),
            Err(e) => return failed(format!("--accept {at}: {e}")),
        },
    };
    let mut admin = args.local.admin().await?;
    let federates = token.federate.is_some();
    let joined = if federates { token.trust_domain.to_string() } else { String::new() };
    let prepared = match admin.prepare_join(PrepareJoinRequest { federate: joined }).await {
        Ok(r) => r.into_inner(),
        Err(s) if s.code() == tonic::Code::FailedPrecondition && !federates => {
            return failed(format!(
                "{}; or, to keep its root and federate, use a token of `flotilla token create --federate`",
                refusal(&s)
            ));
        }
        Err(s) => return failed(refusal(&s)),
    };
    let newcomer = prepared.newcomer.as_ref().context("the control plane did not say who it is")?;
    let name = newcomer.cluster.clone();
    let doing = if federates { "Federating with" } else { "Joining" };
    let answer = match &listener {
        None => {
            say(format!("{doing} mesh {} as {name} through {} ...", token.trust_domain, token.cluster));
            dial_and_join(&token, prepared).await
        }
        Some(l) => {
            say(format!(
                "{doing} mesh {} as {name}: waiting for {} to dial {} ...",
                token.trust_domain,
                token.cluster,
                l.local_addr()?
            ));
            let limit = Duration::from_secs(token.expires.saturating_sub(now));
            join_dialled(&token, l, limit, prepared).await
        }
    };
    drop(listener);
    let answer = match answer {
        Ok(a) => a,
        Err(e) => return failed(format!("{:#}", anyhow::Error::from(e))),
    };
    let did = if federates { "gave its mesh's trust bundle" } else { "signed this cluster's intermediate" };
    say(format!("  {} proved the pinned root and {did}", token.cluster));
    let root = answer.bundle.clone();
    let bundle = answer.foreign.as_ref().map(|b| b.document.clone());
    let members = match admin.complete_join(answer).await {
        Ok(r) => r.into_inner().members,
        Err(s) => return failed(refusal(&s)),
    };
    match args.output {
        Format::Json => output::json(&serde_json::json!({
            "trustDomain": token.trust_domain, "cluster": name, "members": members,
            "seconds": started.elapsed().as_secs_f64(), "rootCert": root,
            "federated": federates, "trustBundle": bundle,
        }))?,
        Format::Text => {
            println!("  members: {}", members.join(", "));
            println!("{} in {}.", if federates { "Federated" } else { "Joined" }, human(started.elapsed()));
        }
    }
    Ok(exit::OK)
}

#[derive(Debug, clap::Args)]
pub(crate) struct LeaveArgs {
    #[command(flatten)]
    local: Local,
    /// Leave although members cannot be told, which keep this cluster, lapsed, until an operator there
    /// runs `flotilla evict-cluster`; and although the root key, which leaving deletes, is here and others are members
    #[arg(long)]
    force: bool,
    /// Only end the federation with this trust domain, for every cluster of the own one. Who is alone in its mesh does so
    /// without, for all whom it is federated with, and keeps its root
    #[arg(long, value_name = "TRUST_DOMAIN")]
    federation: Option<String>,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

pub(crate) async fn leave(args: LeaveArgs) -> anyhow::Result<u8> {
    let request =
        LeaveMeshRequest { force: args.force, trust_domain: args.federation.clone().unwrap_or_default() };
    let answer = match args.local.admin().await?.leave(request).await {
        Ok(r) => r.into_inner(),
        Err(s) => {
            eprintln!("error: not left: {}", refusal(&s));
            return Ok(exit::FAILED);
        }
    };
    let clean = answer.peers.iter().all(|p| p.references == 0 && p.error.is_empty());
    if args.output == Format::Json {
        let peers: Vec<_> = answer
            .peers
            .iter()
            .map(|p| serde_json::json!({"cluster": p.cluster, "references": p.references, "error": p.error}))
            .collect();
        output::json(&serde_json::json!({"left": clean || args.force, "confirmed": clean, "peers": peers,
            "federations": answer.federations,
        }))?;
    } else {
        for p in &answer.peers {
            match p.error.as_str() {
                "" => println!("  {}: {} references left", p.cluster, p.references),
                e => println!("  {}: not confirmed: {e}", p.cluster),
            }
        }
        let federations = answer.federations.join(", ");
        match (clean, args.force) {
            (true, _) | (_, true) if !answer.federations.is_empty() => {
                println!("Ended the federation with {federations}: nobody of it is accepted any more.");
                println!("This cluster is still a member of {}.", answer.trust_domain);
            }
            (true, _) => println!("Left the mesh; no member refers to this cluster."),
            (false, true) => println!("Left the mesh; the members above may still refer to this cluster."),
            (false, false) => {
                println!(
                    "Nothing was changed here. Try again, or use --force to leave without confirmation."
                );
            }
        }
    }
    Ok(if clean || args.force { exit::OK } else { exit::FAILED })
}

#[derive(Debug, clap::Args)]
pub(crate) struct EvictArgs {
    /// The cluster that is dead, lost or no longer trusted
    cluster: String,
    #[command(flatten)]
    local: Local,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

pub(crate) async fn evict(args: EvictArgs) -> anyhow::Result<u8> {
    let request = EvictRequest { cluster: args.cluster.clone() };
    let r = match args.local.admin().await?.evict(request).await {
        Ok(r) => r.into_inner(),
        Err(s) => {
            eprintln!("error: not evicted: {}", refusal(&s));
            return Ok(exit::FAILED);
        }
    };
    if args.output == Format::Json {
        output::json(&serde_json::json!({
            "cluster": args.cluster, "changed": r.changed, "importedServices": r.imported_services,
            "told": r.told, "unreachable": r.unreachable, "pending": r.pending,
            "trustDomainEnded": r.domain_ended,
        }))?;
        return Ok(exit::OK);
    }
    if r.changed {
        println!(
            "Evicted {}: {} imported services and its gateways are gone here.",
            args.cluster, r.imported_services
        );
    } else {
        println!("{} was evicted before.", args.cluster);
    }
    if r.pending {
        println!("  some readers of this control plane have not taken that yet");
    }
    println!("  told: {}", if r.told.is_empty() { "-".to_owned() } else { r.told.join(", ") });
    if !r.unreachable.is_empty() {
        println!("  hear of it when they are reached: {}", r.unreachable.join(", "));
    }
    if !r.domain_ended.is_empty() {
        println!(
            "It was the last cluster of {} here: nobody of that trust domain is accepted any more.",
            r.domain_ended
        );
        return Ok(exit::OK);
    }
    println!(
        "Its certificates stay valid: to keep its workloads from calling services of this mesh directly, replace the \
         root or deny its cluster in an AuthorizationPolicy."
    );
    Ok(exit::OK)
}

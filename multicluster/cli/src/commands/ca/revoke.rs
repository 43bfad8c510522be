//! `flotilla ca revoke`: takes certificates back before they expire.

use citadel::revocation::Reason;
use mesh_model::{ClusterId, SpiffeId};
use mesh_runtime::exit;
use multicluster::authority_pb::{RevokeRequest, StatusRequest, revoke_request::Target};
use serde_json::json;

use super::{AskArgs, left};
use crate::{
    local::refusal,
    output::{self, Format},
};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
It is on a revocation list that this CA signs, and told to every proxy and every member of the mesh: new handshakes are refused \
within seconds, and connections that are open are closed. `flotilla ca show` shows what is revoked; it cannot be taken back.

A workload that was revoked by its identity gets a new certificate with a token that was issued afterwards. A cluster whose \
intermediates are revoked is a member still: `flotilla evict-cluster` ends that, and it returns by a new join.

Exit codes: 0 it is revoked, 1 it was refused, 2 nobody answers.")]
pub(super) struct RevokeArgs {
    #[command(flatten)]
    what: What,
    /// Why: unspecified, keyCompromise, cACompromise, superseded, cessationOfOperation or privilegeWithdrawn
    #[arg(long, default_value_t)]
    reason: Reason,
    #[command(flatten)]
    ask: AskArgs,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct What {
    /// One certificate, by its serial number as `flotilla ca audit` shows it
    #[arg(long, value_name = "HEX")]
    serial: Option<String>,
    /// Every certificate of a workload of this cluster, and its tokens from before: `ns/NAMESPACE/sa/ACCOUNT`, or the whole
    /// SPIFFE ID
    #[arg(long, value_name = "ID")]
    identity: Option<String>,
    /// Every intermediate of a cluster, and with it whatever that signed; where the root key is
    #[arg(long, value_name = "CLUSTER")]
    cluster: Option<ClusterId>,
}

pub(super) async fn run(args: RevokeArgs) -> anyhow::Result<u8> {
    let mut authority = args.ask.local.authority().await?;
    let target = match (args.what.serial, args.what.identity, args.what.cluster) {
        (Some(s), _, _) => Target::Serial(s),
        (_, Some(id), _) if id.starts_with("spiffe://") => Target::Identity(id),
        (_, Some(id), _) => {
            let domain = match authority.status(StatusRequest {}).await {
                Ok(a) => a.into_inner().trust_domain,
                Err(s) => anyhow::bail!(refusal(&s)),
            };
            let id = format!("spiffe://{domain}/{id}");
            Target::Identity(SpiffeId::parse(&id)?.to_string())
        }
        (_, _, cluster) => Target::Cluster(cluster.map(|c| c.to_string()).unwrap_or_default()),
    };
    let request = RevokeRequest { target: Some(target), reason: args.reason.to_string() };
    let done = match authority.revoke(request).await {
        Ok(r) => r.into_inner(),
        Err(s) if s.code() == tonic::Code::Unavailable => anyhow::bail!(refusal(&s)),
        Err(s) => {
            eprintln!("error: {}", refusal(&s));
            return Ok(exit::FAILED);
        }
    };
    if args.ask.output == Format::Json {
        let revoked: Vec<_> = done
            .revoked
            .iter()
            .map(|r| json!({"serial": r.serial, "of": r.of, "reason": r.reason, "expiresUnixSeconds": r.until}))
            .collect();
        output::json(&json!({
            "revoked": revoked, "already": done.already, "beyond": done.beyond, "tokensRefused": done.tokens,
        }))?;
        return Ok(exit::OK);
    }
    for r in &done.revoked {
        println!("revoked {} of {}; it {}", r.serial, r.of, left(r.until));
    }
    if done.already > 0 {
        println!("{} were revoked before.", done.already);
    }
    if done.revoked.is_empty() && done.already == 0 {
        println!("There is no certificate of it that has not expired.");
    }
    if done.tokens {
        println!("Its tokens from before are refused: `flotilla token workload` makes a new one.");
    }
    if !done.beyond.is_empty() {
        println!(
            "Not revoked, since an intermediate signed them that has been replaced: {}. Revoke that one, where the root key is \
             (`flotilla ca revoke --serial`; `flotilla ca audit` there shows it).",
            done.beyond.join(", ")
        );
    }
    Ok(exit::OK)
}

//! `flotilla clusters`: what this cluster knows of the others, from three who know it: the federation component (members,
//! leases, the control connection), the east-west gateways (the path of the data, as they told pilot) and the CA.

mod view;

use mesh_runtime::exit;
use multicluster::{
    admin_pb::{ClustersRequest, ClustersResponse},
    authority_pb::StatusRequest,
};
use pilot::links::GatewayLinks;

use self::view::{Row, now};
use crate::{
    local::{Local, refusal},
    output,
};

/// How to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
enum Format {
    /// For people, in 100 columns
    #[default]
    Text,
    /// The same with networks, addresses and transports that members announce
    Wide,
    /// For scripts: every field, with its unit in its name
    Json,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Columns; \"-\" is not known:
  LEASE    time since the peer's last lease; it holds for 2.7 s
  LAG      changes that the peer has told of and that are not applied here yet
  VIA      what carries sessions to it now, as the east-west gateways here see it: quic, tcp, or mixed
  RTT      smoothed round trip between gateways over QUIC, of the slowest; with \"~\" between the control planes instead
  LOSS     packets of QUIC lost during the last minute, towards the peer; TCP does not tell
  VERSION  of its software, and PROTO of the exchange that both speak
  CERT     time until its intermediate ends, as seen on the connection to it; the first line has this cluster's own
Gateways report every 5 s; what is older than 20 s is not shown.")]
pub(crate) struct ClustersArgs {
    #[command(flatten)]
    local: Local,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

pub(crate) async fn run(args: ClustersArgs) -> anyhow::Result<u8> {
    let r = match args.local.admin().await?.clusters(ClustersRequest {}).await {
        Ok(r) => r.into_inner(),
        Err(s) => anyhow::bail!(refusal(&s)),
    };
    // What these two do not answer is not known; the rest is.
    let own_ends = own_certificate(&args.local).await;
    let mut gateways = gateways(&args.local).await;
    // What was told before a member left says nothing of one.
    let is_member =
        |name: &str| r.clusters.iter().any(|c| c.member.as_ref().is_some_and(|m| m.cluster == name));
    for g in &mut gateways {
        g.peers.retain(|p| is_member(&p.cluster));
    }
    let rows: Vec<Row> = r.clusters.iter().map(|c| Row::new(c, &gateways)).collect();
    if args.output == Format::Json {
        output::json(&json(&r, own_ends, &rows, &gateways))?;
        return Ok(exit::OK);
    }
    if r.trust_domain.is_empty() {
        println!("Cluster {} is in no mesh.", r.self_);
        declared(&r);
        return Ok(exit::OK);
    }
    println!(
        "Mesh {}, seen from {} (version {}, certificate ends in {}):",
        r.trust_domain,
        r.self_,
        r.software,
        view::left(own_ends, now())
    );
    println!("{}", view::table(&rows, args.output == Format::Wide));
    for line in view::domains(&rows, &r.bundles, now()) {
        println!("{line}");
    }
    for line in &r.clashes {
        println!("{line}");
    }
    for line in rows.iter().flat_map(Row::remarks) {
        println!("{line}");
    }
    for c in &r.conflicts {
        let it = c.conflict.clone().unwrap_or_default();
        println!(
            "ServiceExport {}/{}: Conflict=True, {}: {} (says {})",
            it.namespace,
            it.name,
            it.reason,
            it.message,
            c.reported_by.join(", ")
        );
    }
    if !r.evicted.is_empty() {
        println!("Evicted: {}", r.evicted.join(", "));
    }
    declared(&r);
    Ok(exit::OK)
}

/// What the configuration declares, where it is not simply so.
fn declared(r: &ClustersResponse) {
    if let Some(d) = &r.declared {
        match (d.phase == d.state, d.message.as_str()) {
            (true, _) => println!("Declared (MeshMembership mesh): {}.", d.state),
            (false, "") => println!("Declared (MeshMembership mesh): {}, {}.", d.state, d.phase),
            (false, why) => println!("Declared (MeshMembership mesh): {}, {}: {why}", d.state, d.phase),
        }
    }
    for e in r.declared_evictions.iter().filter(|e| e.phase != "evicted") {
        println!("ClusterEviction {}: {}: {}", e.cluster, e.phase, e.message);
    }
}

/// When this cluster's intermediate ends, seconds since the epoch.
async fn own_certificate(local: &Local) -> Option<u64> {
    let status = local.authority().await.ok()?.status(StatusRequest {}).await.ok()?.into_inner();
    (status.state == "active").then(|| u64::try_from(status.intermediate_not_after).ok())?
}

/// What the gateways told lately.
async fn gateways(local: &Local) -> Vec<GatewayLinks> {
    match local.debug("/pilot/debug/links").await {
        Ok((200, body)) => serde_json::from_slice(&body).unwrap_or_default(),
        _ => vec![],
    }
}

fn json(
    r: &ClustersResponse,
    own_ends: Option<u64>,
    rows: &[Row],
    gateways: &[GatewayLinks],
) -> serde_json::Value {
    let conflicts: Vec<_> = r
        .conflicts
        .iter()
        .map(|c| {
            let it = c.conflict.clone().unwrap_or_default();
            serde_json::json!({
                "namespace": it.namespace, "name": it.name, "type": "Conflict", "status": "True",
                "reason": it.reason, "message": it.message, "winner": it.winner, "reportedBy": c.reported_by,
            })
        })
        .collect();
    let declared = r.declared.as_ref().map(|d| {
        serde_json::json!({
            "state": d.state, "phase": d.phase, "message": d.message, "sinceUnixSeconds": d.since,
        })
    });
    let evictions: Vec<_> = r
        .declared_evictions
        .iter()
        .map(|e| serde_json::json!({"cluster": e.cluster, "phase": e.phase, "message": e.message}))
        .collect();
    let bundles: Vec<_> = r
        .bundles
        .iter()
        .map(|b| {
            serde_json::json!({
                "trustDomain": b.trust_domain, "sequence": b.sequence, "roots": b.roots,
                "refreshHintSeconds": Some(b.refresh_hint).filter(|h| *h > 0),
                "expiresUnixSeconds": b.not_after, "confirmedAgeSeconds": b.confirmed_age, "error": b.error,
                "byBundle": b.by_bundle, "endpoint": Some(&b.endpoint).filter(|e| !e.is_empty()),
            })
        })
        .collect();
    serde_json::json!({
        "trustBundles": bundles, "nameClashes": r.clashes,
        "self": r.self_, "trustDomain": r.trust_domain, "version": r.software,
        "certificateExpiresUnixSeconds": own_ends, "clusters": rows, "gateways": gateways, "evicted": r.evicted,
        "exportConflicts": conflicts, "declared": declared, "declaredEvictions": evictions,
    })
}

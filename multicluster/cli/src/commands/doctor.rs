//! `flotilla doctor`.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mesh_identity::{CertificateInfo, certificate_info, pem_certificates};
use mesh_model::explain::{State, Step};
use mesh_runtime::exit;
use multicluster::{
    admin_pb::{BundleStatus, ClustersRequest, ClustersResponse, TraceRequest},
    authority_pb::StatusRequest,
};
use serde_json::Value;

use super::explain::{line, mark, steps};
use crate::{
    local::{Local, refusal},
    output::{self, Format},
};

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit codes: 0 all is well (there may be warnings), 1 something is broken, 2 nobody answers."
)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    local: Local,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Findings of one kind that are shown; the rest is counted.
const SHOWN: usize = 3;
/// An intermediate that ends sooner should have been renewed.
const SOON: Duration = Duration::from_secs(14 * 86_400);
/// A root that ends sooner should be replaced: whoever is away meanwhile has to come back before.
const ROOT_SOON: Duration = Duration::from_secs(90 * 86_400);

pub(crate) async fn run(args: DoctorArgs) -> anyhow::Result<u8> {
    let mut all = Vec::new();
    control_plane(&args.local, &mut all).await?;
    let in_mesh = certificates(&args.local, &mut all).await;
    configuration(&args.local, &mut all).await;
    consul(&args.local, &mut all).await;
    let gateways = proxies(&args.local, &mut all).await;
    declared(&args.local, &mut all).await;
    if in_mesh {
        members(&args.local, gateways, &mut all).await;
    }
    let broken = all.iter().filter(|s| s.is_broken()).count();
    let warnings = all.iter().filter(|s| s.state == State::Warning).count();
    if args.output == Format::Json {
        output::json(&serde_json::json!({"broken": broken, "warnings": warnings, "checks": all}))?;
    } else {
        for s in &all {
            println!("{}", line(mark(s.state), &s.step, &s.says));
            if !s.fix.is_empty() {
                println!("{}", line("", "", &format!("-> {}", s.fix)));
            }
        }
        println!("{broken} broken, {warnings} warnings.");
    }
    Ok(if broken > 0 { exit::FAILED } else { exit::OK })
}

async fn page(local: &Local, path: &str) -> Option<Value> {
    let (status, body) = local.debug(path).await.ok()?;
    (status == 200).then(|| serde_json::from_slice(&body).ok())?
}

async fn control_plane(local: &Local, out: &mut Vec<Step>) -> anyhow::Result<()> {
    // Nobody at the socket is no finding: there is nothing to ask.
    let (status, body) = local.debug("/pilot/ready").await?;
    out.push(if status == 200 {
        Step::ok("control plane", format!("answers at {}", local.state_dir.display()))
    } else {
        Step::broken(
            "control plane",
            String::from_utf8_lossy(&body).trim().to_owned(),
            "look at its log; it waits for galley's configuration",
        )
    });
    Ok(())
}

pub(super) fn in_words(d: Duration) -> String {
    match d.as_secs() {
        s if s >= 2 * 86_400 => format!("{} days", s / 86_400),
        s if s >= 2 * 3600 => format!("{} hours", s / 3600),
        s => format!("{} minutes", s / 60),
    }
}

fn validity(what: &str, not_after: SystemTime, soon: Duration, fix: &str) -> Step {
    let left = not_after.duration_since(SystemTime::now());
    match left {
        Err(ago) => {
            Step::broken("certificates", format!("{what} expired {} ago", in_words(ago.duration())), fix)
        }
        Ok(left) if left < soon => {
            Step::warning("certificates", format!("{what} expires in {}", in_words(left)), fix)
        }
        Ok(left) => Step::ok("certificates", format!("{what} is valid for {}", in_words(left))),
    }
}

/// Whether this cluster is in a mesh.
async fn certificates(local: &Local, out: &mut Vec<Step>) -> bool {
    let status = match local.authority().await {
        Ok(mut a) => a.status(StatusRequest {}).await.map_err(|s| refusal(&s)),
        Err(e) => Err(format!("{e:#}")),
    };
    let status = match status {
        Ok(s) => s.into_inner(),
        Err(e) => {
            out.push(Step::broken("certificates", format!("the CA does not answer: {e}"), "look at its log"));
            return false;
        }
    };
    if status.state != "active" {
        let fix = "`flotilla found` founds a mesh, `flotilla join-cluster TOKEN` joins one";
        out.push(Step::broken("mesh", "this cluster is in no mesh", fix));
        return false;
    }
    let root = if status.holds_root_key { ", and holds the root key" } else { "" };
    out.push(Step::ok("mesh", format!("{} is a member of {}{root}", status.cluster, status.trust_domain)));
    let until = UNIX_EPOCH + Duration::from_secs(u64::try_from(status.intermediate_not_after).unwrap_or(0));
    let fix = "it is renewed by the cluster with the root key: is that reachable? If not in time, leave and join again";
    out.push(
        match (validity("this cluster's intermediate", until, SOON, fix), status.renewal_due.as_str()) {
            (s, "") => s,
            (s, _) if s.state != State::Ok => s,
            (_, why) => Step::warning(
                "certificates",
                format!("this cluster's intermediate is to be renewed: {why}"),
                fix,
            ),
        },
    );
    if status.phase != "steady" && !status.phase.is_empty() {
        let says = format!("the root is being rotated ({}), bundle {}", status.phase, status.bundle_sequence);
        out.push(Step::warning("certificates", says, "`flotilla ca status` shows what is to be done"));
    }
    let roots = pem_certificates("bundle", status.bundle.as_bytes()).map_or(0, |c| c.len());
    match certificate_info(status.bundle.as_bytes()) {
        Ok(CertificateInfo { not_after, .. }) => {
            let what = if roots == 1 { "the root".to_owned() } else { format!("the first of {roots} roots") };
            let fix = "replace it before it ends, where its key is: `flotilla ca rotate prepare`";
            out.push(validity(&what, not_after, ROOT_SOON, fix));
        }
        Err(e) => out.push(Step::broken("certificates", format!("the roots cannot be read: {e}"), "")),
    }
    true
}

/// Adds findings, the first of them with their texts.
fn findings(out: &mut Vec<Step>, step: &str, state: State, all: Vec<(String, String)>) {
    let more = all.len().saturating_sub(SHOWN);
    for (n, (says, fix)) in all.into_iter().take(SHOWN).enumerate() {
        let says = if n + 1 == SHOWN && more > 0 { format!("{says} (and {more} more)") } else { says };
        out.push(Step { step: step.to_owned(), state, says, fix });
    }
}

async fn configuration(local: &Local, out: &mut Vec<Step>) {
    let before = out.len();
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let errors = page(local, "/galley/debug/config_errors").await.unwrap_or_default();
    let mut invalid = Vec::new();
    for r in errors.as_array().into_iter().flatten().filter(|r| r["valid"] == false) {
        let first = r["errors"].get(0).cloned().unwrap_or_default();
        let field = [&first["path"], &first["message"]].map(text);
        let field = field.into_iter().filter(|p| !p.is_empty()).collect::<Vec<_>>().join(": ");
        let place = [&r["file"], &r["kind"], &r["name"]].map(text);
        let place = place.into_iter().filter(|p| !p.is_empty()).collect::<Vec<_>>().join(" ");
        invalid.push((
            format!("{place}: {field}"),
            "`flotilla validate` tells all about a file; what was valid before is still in use".to_owned(),
        ));
    }
    findings(out, "configuration", State::Broken, invalid);
    let problems = page(local, "/pilot/debug/problems").await.unwrap_or_default();
    let problems = problems.as_array().into_iter().flatten();
    let problems =
        problems.map(|p| (format!("{}: {}", text(&p["object"]), text(&p["message"])), String::new()));
    findings(out, "configuration", State::Warning, problems.collect());
    if out.len() == before {
        out.push(Step::ok("configuration", "every document is valid and can be done as written"));
    }
}

/// Consul's agents; nothing without any.
async fn consul(local: &Local, out: &mut Vec<Step>) {
    let agents = page(local, "/pilot/debug/consulz").await.unwrap_or_default();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    for a in agents.as_array().into_iter().flatten() {
        let number = |k: &str| a[k].as_u64().unwrap_or_default();
        let (agent, error) = (
            a["agent"].as_str().unwrap_or_default(),
            a["error"].as_str().unwrap_or("it has not answered yet"),
        );
        let (services, failing) = (number("services"), number("failing"));
        out.push(if a["up"] != true {
            let ago = now.as_secs().saturating_sub(number("since"));
            Step::broken(
                "consul",
                format!(
                    "{agent} does not answer for {ago} s, {services} services are as it last told: {error}"
                ),
                "start the agent, or correct --consul and its token; it is asked again by itself",
            )
        } else if failing > 0 {
            Step::warning(
                "consul",
                format!("{agent}: {failing} of {services} services cannot be read: {error}"),
                "what was known of them stays; may the token read them and their nodes?",
            )
        } else if a["filtered"] == true {
            Step::warning(
                "consul",
                format!("{agent} tells of {services} services, and leaves out what the token may not see"),
                "if they are to be in the mesh, give the token service:read and node:read for them",
            )
        } else {
            let instances = number("instances");
            Step::ok("consul", format!("{agent} is followed: {services} services, {instances} instances"))
        });
    }
}

/// Whether an east-west gateway is connected.
async fn proxies(local: &Local, out: &mut Vec<Step>) -> bool {
    let clients = page(local, "/pilot/debug/syncz").await.unwrap_or_default();
    let clients: Vec<Value> = clients.as_array().cloned().unwrap_or_default();
    let (mut refused, mut late, mut gateway) = (Vec::new(), 0, false);
    for c in &clients {
        let node = c["node"].as_str().unwrap_or_default();
        gateway |= node.starts_with("router~");
        for (t, s) in c["types"].as_object().into_iter().flatten() {
            if let Some(e) = s["error"].as_str() {
                let says = format!("{} refused its {t}: {e}", c["proxy"].as_str().unwrap_or_default());
                refused.push((says, "it goes on with what it had; correct what the error names".to_owned()));
            }
            late += usize::from(s["status"] == "STALE");
        }
    }
    let any = !refused.is_empty();
    findings(out, "proxies", State::Broken, refused);
    let config = page(local, "/pilot/debug/configz").await.unwrap_or_default();
    let connected = |name: &str| clients.iter().any(|c| c["proxy"] == name);
    let mut missing = Vec::new();
    for w in config["WorkloadEntry"].as_array().into_iter().flatten() {
        let labels = &w["spec"]["labels"];
        let name = [&w["name"], &w["namespace"]].map(|v| v.as_str().unwrap_or_default()).join(".");
        if labels["security.istio.io/tlsMode"] == "istio" && !connected(&name) {
            missing.push((
                format!("the proxy of {name} is not connected"),
                "start it, or look at its log; it goes on with its last configuration".to_owned(),
            ));
        }
    }
    let none_missing = missing.is_empty();
    findings(out, "proxies", State::Warning, missing);
    if !any && none_missing {
        let late = if late > 0 { format!(", {late} types on their way") } else { String::new() };
        out.push(Step::ok("proxies", format!("{} connected, none refused anything{late}", clients.len())));
    }
    gateway
}

/// Membership that configuration declares and that is not so.
async fn declared(local: &Local, out: &mut Vec<Step>) {
    let Ok(mut admin) = local.admin().await else { return };
    // Who does not answer is found by the next check.
    let Ok(answer) = admin.clusters(ClustersRequest {}).await else { return };
    let c = answer.into_inner();
    if let Some(d) = c.declared.as_ref().filter(|d| d.phase == "failed") {
        let says = format!("MeshMembership mesh declares {}: {}", d.state, d.message);
        out.push(Step::broken("membership", says, "it is tried again; correct what the message names"));
    }
    for e in c.declared_evictions.iter().filter(|e| e.phase == "failed") {
        let says = format!("ClusterEviction {}: {}", e.cluster, e.message);
        out.push(Step::broken("membership", says, "correct or remove the document"));
    }
}

/// Roots of the trust domains that this one is federated with.
fn bundles(c: &ClustersResponse, out: &mut Vec<Step>) {
    findings(out, "members", State::Warning, c.clashes.iter().map(|c| (c.clone(), String::new())).collect());
    let foreign = c.clusters.iter().filter_map(|c| c.member.as_ref()).map(|m| m.trust_domain.as_str());
    for domain in foreign.filter(|d| !d.is_empty()).collect::<BTreeSet<_>>() {
        let Some(b) = c.bundles.iter().find(|b| b.trust_domain == domain && !b.by_bundle) else {
            out.push(Step::broken(
                "bundle",
                format!("there is no trust bundle of {domain}: nobody of it is accepted"),
                "a member that has it tells it within seconds; if none has, evict its clusters and federate again",
            ));
            continue;
        };
        out.push(bundle(b));
    }
    for b in c.bundles.iter().filter(|b| b.by_bundle) {
        if b.roots > 0 {
            out.push(bundle(b));
        } else {
            let why = if b.error.is_empty() { "nothing was told yet" } else { &b.error };
            let says = format!("there is no trust bundle of {}, which is declared: {why}", b.trust_domain);
            out.push(Step::broken(
                "bundle",
                says,
                "is its endpoint reachable, and does it prove who was declared?",
            ));
        }
    }
}

fn bundle(b: &BundleStatus) -> Step {
    let until = UNIX_EPOCH + Duration::from_secs(b.not_after);
    let what = format!("the trust bundle of {} (sequence {})", b.trust_domain, b.sequence);
    let fix = "its founder has to add a root; its control planes tell it by themselves";
    let ends = validity(&what, until, SOON, fix);
    // What is asked for in vain for three rounds is not asked for in passing.
    let late = b.confirmed_age.is_some_and(|a| a > 3 * b.refresh_hint.max(10));
    match (ends.state, b.error.as_str()) {
        (State::Broken, _) => Step { step: "bundle".into(), ..ends },
        (_, e) if !e.is_empty() => Step::warning(
            "bundle",
            format!("{what} was not renewed: {e}"),
            "what is there stays in use; if that mesh has new roots, its workloads are not accepted until it is taken",
        ),
        _ if late => Step::warning(
            "bundle",
            format!("{what} was last confirmed {} s ago", b.confirmed_age.unwrap_or(0)),
            "is a control plane of that domain reachable?",
        ),
        _ => Step { step: "bundle".into(), ..ends },
    }
}

async fn members(local: &Local, gateway: bool, out: &mut Vec<Step>) {
    let clusters = match local.admin().await {
        Ok(mut a) => a.clusters(ClustersRequest {}).await.map_err(|s| refusal(&s)),
        Err(e) => Err(format!("{e:#}")),
    };
    let clusters = match clusters {
        Ok(c) => {
            let c = c.into_inner();
            bundles(&c, out);
            c.clusters
        }
        Err(e) => {
            out.push(Step::broken("members", format!("federation does not answer: {e}"), "look at its log"));
            return;
        }
    };
    if clusters.is_empty() {
        out.push(Step::ok("members", "no other cluster is in the mesh yet"));
        return;
    }
    if !gateway {
        out.push(Step::broken(
            "gateway",
            "no gateway is connected to this control plane, and other clusters are reached through one",
            "start `flotilla gateway` with --meta=ROUTER_MODE=sni-dnat",
        ));
    }
    for c in clusters {
        let name = c.member.unwrap_or_default().cluster;
        let request = TraceRequest { cluster: name.clone(), ..TraceRequest::default() };
        let found = match local.admin().await {
            Ok(mut a) => a.trace(request).await.map(|r| steps(r.into_inner())).map_err(|s| refusal(&s)),
            Err(e) => Err(format!("{e:#}")),
        };
        let found = found.unwrap_or_else(|e| vec![Step::broken("federation", e, "")]);
        if found.iter().all(|s| s.state == State::Ok) {
            let lease = found.first().map(|s| s.says.clone()).unwrap_or_default();
            out.push(Step::ok(
                &format!("member {name}"),
                format!("lease {lease}, {} services", c.imported_services),
            ));
            continue;
        }
        for s in found.into_iter().filter(|s| s.state != State::Ok) {
            out.push(Step { step: format!("member {name}"), says: format!("{}: {}", s.step, s.says), ..s });
        }
    }
}

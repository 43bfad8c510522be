//! `flotilla explain FROM TO`.

use anyhow::{Context, bail};
use mesh_model::explain::{State, Step, Target, Way};
use mesh_runtime::exit;
use multicluster::{admin_pb::TraceRequest, pb};
use serde::Serialize;

use crate::{
    local::{Local, refusal},
    output::{self, Format},
};

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit codes: 0 requests get there, 1 a step is broken, 2 it could not be found out.\n\
                        It opens one TLS session to each remote cluster, and sends no request. Of UDP it tries nothing: it tells what carries it."
)]
pub(crate) struct ExplainArgs {
    /// Caller: a workload of this cluster, `<name>.<namespace>` as `flotilla proxy-status` shows it
    from: String,
    /// Destination: `host`, `host:port`, `host:port/udp` or a URL; short names are of the caller's namespace
    to: String,
    /// Method of the request
    #[arg(long, default_value = "GET")]
    method: String,
    /// Path of the request; that of a URL by default
    #[arg(long)]
    path: Option<String>,
    #[command(flatten)]
    local: Local,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// A step and where it is taken.
#[derive(Debug, Clone, Serialize)]
struct Placed {
    /// Empty for the caller's own cluster.
    cluster: String,
    #[serde(flatten)]
    step: Step,
}

/// Members that are asked; a service has seldom more.
const MAX_TARGETS: usize = 6;

pub(crate) async fn run(args: ExplainArgs) -> anyhow::Result<u8> {
    let path = args.path.clone().unwrap_or_else(|| path_of(&args.to));
    let question = serde_json::json!({
        "from": args.from, "to": args.to, "method": args.method, "path": path,
    });
    let (status, body) = args.local.ask("/pilot/debug/explain", Some(question)).await?;
    if status != 200 {
        bail!("{}", String::from_utf8_lossy(&body).trim());
    }
    let way: Way = serde_json::from_slice(&body).context("the control plane's answer")?;
    let mut steps: Vec<Placed> =
        way.steps.iter().map(|s| Placed { cluster: String::new(), step: s.clone() }).collect();
    let here = way.steps.iter().any(Step::is_broken);
    let mut reached: Vec<&str> = Vec::new();
    if way.local && !here {
        reached.push("this cluster");
    }
    if !here {
        for t in way.targets.iter().take(MAX_TARGETS) {
            let found = trace(&args, &way, t, &path).await;
            if !found.iter().any(Step::is_broken) {
                reached.push(&t.cluster);
            }
            steps.extend(found.into_iter().map(|step| Placed { cluster: t.cluster.clone(), step }));
        }
    }
    let broken = steps.iter().find(|s| s.step.is_broken());
    if args.output == Format::Json {
        output::json(&serde_json::json!({
            "from": args.from, "to": args.to, "host": way.host, "principal": way.principal,
            "reached": reached, "broken": broken, "steps": steps,
        }))?;
    } else {
        print(&steps);
        match broken {
            None if way.targets.is_empty() && !way.local => println!("Nothing is broken."),
            None => println!("Requests get there: {}.", reached.join(", ")),
            Some(b) => {
                let at = if b.cluster.is_empty() { String::new() } else { format!(" ({})", b.cluster) };
                let still = if reached.is_empty() {
                    String::new()
                } else {
                    format!(" Requests still get to {}.", reached.join(", "))
                };
                println!("Broken at {}{at}.{still}", b.step.step);
            }
        }
    }
    Ok(if broken.is_some() { exit::FAILED } else { exit::OK })
}

/// Path of a URL, `/` of everything else.
fn path_of(to: &str) -> String {
    let rest = to.split_once("://").map_or("", |(_, r)| r);
    rest.find('/').map_or("/", |i| &rest[i..]).to_owned()
}

async fn trace(args: &ExplainArgs, way: &Way, t: &Target, path: &str) -> Vec<Step> {
    let request = TraceRequest {
        cluster: t.cluster.clone(),
        sni: t.sni.clone(),
        identities: t.identities.clone(),
        inspect: Some(pb::InspectRequest {
            namespace: t.namespace.clone(),
            name: t.name.clone(),
            port: t.port.into(),
            udp: t.udp,
            subset: t.subset.clone(),
            principal: way.principal.clone(),
            method: args.method.clone(),
            path: path.to_owned(),
        }),
    };
    let answer =
        async { args.local.admin().await?.trace(request).await.map_err(|s| anyhow::anyhow!(refusal(&s))) };
    match answer.await {
        Ok(r) => steps(r.into_inner()),
        Err(e) => vec![Step::broken(
            "federation",
            format!("{e:#}"),
            "is the control plane whole? `flotilla doctor`",
        )],
    }
}

/// Steps from the wire.
pub(super) fn steps(r: pb::InspectResponse) -> Vec<Step> {
    let state = |s: &str| match s {
        "broken" => State::Broken,
        "warning" => State::Warning,
        _ => State::Ok,
    };
    r.steps
        .into_iter()
        .map(|s| Step { state: state(&s.state), step: s.step, says: s.says, fix: s.fix })
        .collect()
}

/// Everything of one place that is well, on one line; what is not, with its fix.
fn print(steps: &[Placed]) {
    let mut rest = steps;
    while let Some(first) = rest.first() {
        let n = rest.iter().take_while(|s| s.cluster == first.cluster).count();
        let (place, more) = rest.split_at(n);
        rest = more;
        let well = place.iter().all(|s| s.step.state == State::Ok);
        if well && !first.cluster.is_empty() {
            let all: Vec<_> = place.iter().map(|s| format!("{} {}", s.step.step, s.step.says)).collect();
            println!("{}", line("ok", &first.cluster, &all.join("; ")));
            continue;
        }
        for Placed { cluster, step } in place {
            let name =
                if cluster.is_empty() { step.step.clone() } else { format!("{cluster}: {}", step.step) };
            println!("{}", line(mark(step.state), &name, &step.says));
            if !step.fix.is_empty() {
                println!("{}", line("", "", &format!("-> {}", step.fix)));
            }
        }
    }
}

pub(super) fn mark(s: State) -> &'static str {
    match s {
        State::Ok => "ok",
        State::Warning => "warning",
        State::Broken => "BROKEN",
    }
}

pub(super) fn line(mark: &str, name: &str, says: &str) -> String {
    format!("{mark:<8} {name:<16} {says}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_of_a_url_is_taken() {
        for (to, path) in [
            ("http://reviews:9080/api/v1?x=1", "/api/v1?x=1"),
            ("http://reviews:9080", "/"),
            ("reviews:9080", "/"),
            ("reviews", "/"),
        ] {
            assert_eq!(path_of(to), path, "{to}");
        }
    }
}

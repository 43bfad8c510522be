//! `flotilla simulate`.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use flotilla_simulate::{Answer, Mesh, Options, Question};

use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  flotilla simulate -f mesh/ --from shop/frontend --request 'GET http://reviews:9080/x' -H 'end-user: jason'
  flotilla simulate -f mesh/ --from istio-system/istio-ingressgateway --request 'GET https://shop.example/'
  flotilla simulate -f mesh/ --from shop/worker --request tcp://db:5432 -o json

Documents are read as the control plane reads them, and the proxies' own code answers. Invalid documents are left out,
as a control plane leaves them out, and named on standard error. Chance is not taken: weights and faults are told with
their shares, and of several destinations the heaviest is followed.

Exit status: 0 the request reaches a workload or gets the answer that routes say, 1 it does not, 2 the question could not
be asked.")]
pub(crate) struct SimulateArgs {
    /// File or directory of documents, repeated; `-` is standard input
    #[arg(short = 'f', long = "filename", required = true)]
    files: Vec<PathBuf>,
    /// Who calls, as NAMESPACE/WORKLOAD; of a gateway, that the request comes to it
    #[arg(long, value_name = "NAMESPACE/WORKLOAD")]
    from: String,
    /// The request, as METHOD URL; schemes are http, https, h2c, grpc, tcp and tls
    #[arg(long)]
    request: String,
    /// Header of the request, as NAME: VALUE, repeated
    #[arg(short = 'H', long = "header", value_name = "NAME: VALUE")]
    headers: Vec<String>,
    /// Labels of the caller besides those in documents, as KEY=VALUE, repeated
    #[arg(long = "label", value_name = "KEY=VALUE")]
    labels: Vec<String>,
    /// Service account of the caller, instead of what documents say
    #[arg(long)]
    service_account: Option<String>,
    /// Address of a gateway's client
    #[arg(long, value_name = "IP")]
    source_ip: Option<IpAddr>,
    /// Take documents for all there is: workloads have a proxy only if they say so, and services only those workloads
    /// that are written down
    #[arg(long)]
    as_is: bool,
    /// Name of the cluster
    #[arg(long, default_value = "local")]
    cluster: String,
    /// Trust domain, unless a MeshConfig document names one
    #[arg(long, default_value = "mesh.local")]
    trust_domain: String,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

pub(crate) fn run(args: &SimulateArgs) -> anyhow::Result<u8> {
    let mut labels = BTreeMap::new();
    for l in &args.labels {
        let (k, v) = l.split_once('=').ok_or_else(|| anyhow::anyhow!("--label {l:?} is not KEY=VALUE"))?;
        labels.insert(k.to_owned(), v.to_owned());
    }
    let options = Options {
        cluster: args.cluster.clone(),
        trust_domain: args.trust_domain.clone(),
        assume: !args.as_is,
    };
    let mesh = Mesh::load(&args.files, &mut std::io::stdin(), &options)?;
    warn(&mesh)?;
    let question = Question {
        from: args.from.clone(),
        request: args.request.clone(),
        headers: args.headers.clone(),
        labels,
        service_account: args.service_account.clone(),
        source: args.source_ip,
    };
    let answer = mesh.ask(&question)?;
    match args.output {
        Format::Json => output::json(&answer)?,
        Format::Text => output::text(text(&answer).trim_end())?,
    }
    Ok(u8::from(!fine(&answer)))
}

/// Names what is no part of the mesh.
pub(crate) fn warn(mesh: &Mesh) -> anyhow::Result<()> {
    for r in mesh.validation().reports.iter().filter(|r| !r.valid) {
        for e in &r.errors {
            eprintln!("warning: {}:{}: {} is left out: {}", r.file, e.line, r.subject(), e.message);
        }
    }
    if mesh.validation().unreadable {
        anyhow::bail!("some file cannot be read");
    }
    for p in mesh.problems() {
        eprintln!("warning: {}: {}", p.object, p.message);
    }
    Ok(())
}

/// Whether the request gets what its routes promise.
fn fine(a: &Answer) -> bool {
    match a.action.as_str() {
        "forward" | "forward-tcp" => a.status.is_none(),
        "redirect" | "direct-response" => true,
        _ => false,
    }
}

fn text(a: &Answer) -> String {
    let mut rows: Vec<(&str, String)> = Vec::new();
    let mut row = |name, value: String| {
        if !value.is_empty() {
            rows.push((name, value));
        }
    };
    let say = |v: &Option<String>| v.clone().unwrap_or_default();
    row("caller", format!("{} ({}, {})", a.caller.workload, a.caller.proxy, a.caller.principal));
    row("assumed", say(&a.caller.assumed));
    if a.caller.on_demand {
        row("on demand", "what follows holds when the proxy has asked for it".to_owned());
    }
    row("host", say(&a.host));
    row("destination", a.destination.clone());
    row("listener", say(&a.listener));
    row("filter chain", say(&a.filter_chain));
    row("virtual host", say(&a.virtual_host));
    row("route", say(&a.route));
    row("virtual service", say(&a.virtual_service));
    row("redirect", say(&a.location));
    let total: u64 = a.weights.iter().map(|w| u64::from(w.weight)).sum::<u64>().max(1);
    for w in &a.weights {
        row("cluster", format!("{} % {}", u64::from(w.weight) * 100 / total, w.cluster));
    }
    for e in &a.endpoints {
        let of = e.workload.as_deref().map_or(String::new(), |w| format!(" {w}"));
        let state = if e.active { e.health.to_owned() } else { format!("{}, not used now", e.health) };
        let tls = if e.tls == "none" { "clear text".to_owned() } else { format!("{} TLS", e.tls) };
        row("endpoint", format!("{}{of} ({state}, {tls}, priority {})", e.address, e.priority));
    }
    row("timeout", say(&a.timeout));
    if let Some(r) = &a.retries {
        let each = r.per_try_timeout.as_ref().map_or(String::new(), |t| format!(", {t} each"));
        row("retries", format!("{}{each}, on {}", r.attempts, r.retry_on));
    }
    if let Some(f) = &a.fault {
        if let Some(d) = &f.delay {
            row("fault", format!("{} % delayed by {}", d.percentage, d.value));
        }
        if let Some(s) = &f.abort {
            row("fault", format!("{} % aborted with {}", s.percentage, s.value));
        }
    }
    for m in &a.mirrors {
        row("mirror", format!("{} % to {}", m.percentage, m.cluster));
    }
    if let Some(s) = &a.session {
        let stays = match &s.endpoint {
            Some(e) => format!("stays on {e}"),
            None => "begins: the answer tells the client its endpoint".to_owned(),
        };
        row("session", format!("{stays} (by {} {})", s.by, s.name));
    }
    if let Some(u) = &a.upstream {
        row("upstream", format!("{} {} to {}", u.method, u.path, u.authority));
    }
    for (n, v) in &a.headers {
        row("header", format!("{n}: {v}"));
    }
    for (n, v) in &a.response_headers {
        row("answer header", format!("{n}: {v}"));
    }
    // What only other clusters meet is of interest if it decides.
    for p in a.policies.iter().filter(|p| {
        p.decides || ["AuthorizationPolicy ", "ServiceRole "].iter().any(|k| p.policy.starts_with(k))
    }) {
        let decides = if p.decides { ", decides" } else { "" };
        let dry = if p.dry_run { ", dry run" } else { "" };
        row("policy", format!("{} {} {} at {}{dry}{decides}", p.action, p.policy, p.verdict, p.at));
    }
    for w in &a.asks {
        row("asks", format!("{} at {}", w.who, w.at));
    }
    for r in a.reasons.iter().filter(|r| r.kind == "route" || a.route.is_none()) {
        row("not", format!("{} {}: {}", r.kind, r.name, r.why));
    }
    let status = a.status.map_or(String::new(), |s| format!(" {s}"));
    let why = if a.detail.is_empty() { String::new() } else { format!(": {}", a.detail) };
    row("action", format!("{}{status}{why}", a.action));
    let width = rows.iter().map(|(n, _)| n.len()).max().unwrap_or(0);
    rows.into_iter().map(|(n, v)| format!("{n:width$}  {v}\n")).collect()
}

//! `flotilla proxy-status`, `flotilla proxy-config`.

use anyhow::{Context, bail};
use mesh_runtime::exit;
use serde_json::Value;

use crate::{
    local::Local,
    output::{self, Format},
};

#[derive(Debug, clap::Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    local: Local,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

async fn page(local: &Local, path: &str) -> anyhow::Result<Value> {
    let (status, body) = local.debug(path).await?;
    if status != 200 {
        bail!("{}", String::from_utf8_lossy(&body).trim());
    }
    serde_json::from_slice(&body).with_context(|| format!("the control plane's answer to {path}"))
}

/// Exit code 1 if some proxy refused something.
pub(crate) async fn status(args: StatusArgs) -> anyhow::Result<u8> {
    let all = page(&args.local, "/pilot/debug/syncz").await?;
    let clients = all.as_array().cloned().unwrap_or_default();
    let refused = all.to_string().contains("\"NACKED\"");
    if args.output == Format::Json {
        output::json(&all)?;
        return Ok(if refused { exit::FAILED } else { exit::OK });
    }
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let state = |c: &Value, t: &str| {
        let s = &c["types"][t]["status"];
        if s.is_null() { "-".to_owned() } else { text(s) }
    };
    let rows = clients.iter().map(|c| {
        [
            text(&c["proxy"]),
            text(&c["cluster_id"]),
            state(c, "CDS"),
            state(c, "LDS"),
            state(c, "EDS"),
            state(c, "RDS"),
        ]
    });
    println!("{}", output::table(["PROXY", "CLUSTER", "CDS", "LDS", "EDS", "RDS"], rows));
    for c in &clients {
        if c["on_demand"] == true {
            let asked = |t: &str| c["types"][t]["subscribed"].as_u64().unwrap_or_default();
            println!(
                "{} is on demand: it asked for {} hosts and {} clusters",
                text(&c["proxy"]),
                asked("VHDS"),
                asked("CDS")
            );
        }
        for (t, s) in c["types"].as_object().into_iter().flatten() {
            if let Some(e) = s["error"].as_str() {
                println!("{} refused {t}: {e}", text(&c["proxy"]));
            }
        }
    }
    Ok(if refused { exit::FAILED } else { exit::OK })
}

#[derive(Debug, clap::Args)]
pub(crate) struct ConfigArgs {
    /// Proxy, `<name>.<namespace>` as `flotilla proxy-status` shows it
    proxy: String,
    #[command(flatten)]
    local: Local,
    /// What to show
    #[arg(long, value_enum, default_value_t)]
    show: Part,
    /// Output format; json is the whole configuration
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
enum Part {
    /// A line for each resource
    #[default]
    Summary,
    /// Listeners, as JSON
    Listeners,
    /// Routes, as JSON
    Routes,
    /// Clusters, as JSON
    Clusters,
    /// Endpoints, as JSON
    Endpoints,
}

pub(crate) async fn config(args: ConfigArgs) -> anyhow::Result<u8> {
    if args.proxy.contains(['&', '?', '#', ' ', '/']) {
        bail!("{:?} is not a proxy name", args.proxy);
    }
    let (status, body) =
        args.local.debug(&format!("/pilot/debug/config_dump?proxyID={}", args.proxy)).await?;
    if status != 200 {
        eprintln!("error: {}", String::from_utf8_lossy(&body).trim());
        return Ok(exit::FAILED);
    }
    let dump: Value = serde_json::from_slice(&body).context("the control plane's configuration dump")?;
    let part = match args.show {
        Part::Summary => None,
        Part::Listeners => Some("listeners"),
        Part::Routes => Some("routes"),
        Part::Clusters => Some("clusters"),
        Part::Endpoints => Some("endpoints"),
    };
    match (part, args.output) {
        (Some(p), _) => output::json(&dump[p])?,
        (None, Format::Json) => output::json(&dump)?,
        (None, Format::Text) => {
            let mut rows = Vec::new();
            for kind in ["listeners", "routes", "clusters", "endpoints"] {
                match &dump[kind] {
                    Value::Object(o) => {
                        rows.extend(
                            o.iter().map(|(name, v)| [kind.to_owned(), name.clone(), detail(kind, v)]),
                        );
                    }
                    Value::Array(a) => rows.extend(a.iter().map(|v| {
                        [kind.to_owned(), v["name"].as_str().unwrap_or_default().to_owned(), detail(kind, v)]
                    })),
                    _ => {}
                }
            }
            println!("{}", output::table(["KIND", "NAME", "DETAIL"], rows));
            if dump["onDemand"] == true {
                println!("on demand: virtual hosts and outbound clusters come when the proxy asks for them");
            }
        }
    }
    Ok(exit::OK)
}

fn detail(kind: &str, v: &Value) -> String {
    let count = |v: &Value| v.as_array().map_or(0, Vec::len);
    match kind {
        "listeners" => {
            format!("{} ({} chains)", v["address"].as_str().unwrap_or_default(), count(&v["filter_chains"]))
        }
        "routes" => format!("{} virtual hosts", count(&v["virtual_hosts"])),
        "endpoints" => {
            let n: usize =
                v["localities"].as_array().into_iter().flatten().map(|l| count(&l["endpoints"])).sum();
            format!("{n} endpoints")
        }
        _ => v["lb"].as_str().unwrap_or_default().to_owned(),
    }
}

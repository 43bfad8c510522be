//! The story, chapter by chapter.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use mesh_runtime::ports;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{
    DemoArgs,
    cluster::{Cluster, NAMESPACE, PORT},
    config, http,
    process::command,
    report::Report,
};
use crate::output::{human, table};

/// One request of the story.
const LIMIT: Duration = Duration::from_secs(15);
/// How long a change of configuration may take until it shows.
const CONVERGE: Duration = Duration::from_secs(10);

pub(crate) struct Story<'a> {
    clusters: Vec<Cluster>,
    report: &'a mut Report,
    check: bool,
}

/// What one page was made of.
#[derive(Debug, Clone, Default)]
struct Page {
    /// Status of the page itself.
    status: u16,
    /// `(version, cluster)` of reviews, if it answered.
    reviews: Option<(String, String)>,
    /// Status that reviews answered with.
    reviews_status: u16,
    /// `(cluster, caller)` of ratings, if it was asked and answered.
    ratings: Option<(String, String)>,
    /// Callers as verified by the sidecars, outermost first.
    callers: Vec<String>,
    took: Duration,
}

impl Page {
    fn good(&self) -> bool {
        self.status == 200 && self.reviews.is_some()
    }
}

impl<'a> Story<'a> {
    pub(crate) fn new(args: &DemoArgs, dir: &Path, report: &'a mut Report) -> anyhow::Result<Self> {
        let mut octet = 10u8;
        let mut clusters = Vec::new();
        for index in 0..usize::from(args.clusters) {
            octet = free_range(octet).context("no free loopback addresses (127.10.0.0 to 127.250.0.0)")?;
            clusters.push(Cluster::new(index, octet, dir, args.transport)?);
            octet = octet.saturating_add(10);
        }
        Ok(Self { clusters, report, check: args.check })
    }

    pub(crate) async fn tell(mut self, stop: &CancellationToken) -> anyhow::Result<()> {
        let names: Vec<&str> = self.clusters.iter().map(|c| c.name).collect();
        self.report.say(&format!(
            "Flotilla demo: clusters {} as processes on this machine, no root, no network.",
            names.join(", ")
        ));
        self.found().await?;
        self.join(1).await?;
        for n in 2..self.clusters.len() {
            self.join(n).await?;
        }
        self.page().await?;
        self.shift().await?;
        self.by_user().await?;
        self.authorize().await?;
        self.delay().await?;
        self.failover().await?;
        self.leave().await?;
        if self.check {
            return Ok(());
        }
        self.stay(stop).await
    }

    fn west(&self) -> &Cluster {
        &self.clusters[0]
    }

    fn east(&self) -> &Cluster {
        &self.clusters[1]
    }

    /// Runs an operator's command and shows it.
    async fn operator(&self, cluster: usize, args: &[&str]) -> anyhow::Result<(i32, String, String)> {
        let c = &self.clusters[cluster];
        let state = c.state();
        let mut all: Vec<&str> = args.to_vec();
        all.extend(["--state-dir", &state]);
        let shown: Vec<String> = args
            .iter()
            .map(|a| if a.len() > 40 { format!("{}...", &a[..24]) } else { (*a).to_owned() })
            .collect();
        self.report.say(&format!("  {}$ flotilla {}", c.name, shown.join(" ")));
        command(&all).await
    }

    async fn found(&mut self) -> anyhow::Result<()> {
        self.report.chapter("Found a mesh in west");
        self.clusters[0].start_control_plane()?;
        let up = self.clusters[0].control_plane_up().await?;
        self.report.say(&format!("  control plane is up after {}", human(up)));
        let (code, out, err) = self.operator(0, &["found", "-o", "json"]).await?;
        let answer: Value = serde_json::from_str(&out).unwrap_or(Value::Null);
        let ok = code == 0 && answer["cluster"] == "west";
        self.report.observe("west founded mesh", "mesh.local", json!(answer["trustDomain"]), ok);
        if !ok {
            bail!("found: {err}");
        }
        self.clusters[0].start_data_plane().await?;
        let ready = self.clusters[0].data_plane_ready().await?;
        let n = self.west().process_count();
        self.report.say(&format!(
            "  {n} processes; every proxy has certificate and configuration after {}",
            human(ready)
        ));
        let page = self.fetch(&[]).await?;
        self.report.observe("page with west alone", "200", page.status, page.status == 200);
        Ok(())
    }

    async fn join(&mut self, n: usize) -> anyhow::Result<()> {
        let name = self.clusters[n].name;
        self.report.chapter(&format!("{name} joins with one token"));
        self.clusters[n].start_control_plane()?;
        self.clusters[n].control_plane_up().await?;
        self.clusters[n].start_data_plane().await?;
        let (code, token, err) = self.operator(0, &["token", "create"]).await?;
        if code != 0 {
            bail!("token create: {err}");
        }
        let begun = Instant::now();
        let (code, _, err) = self.operator(n, &["join-cluster", &token, "-o", "json"]).await?;
        self.report.observe("join-cluster", "exit code 0", code, code == 0);
        if code != 0 {
            bail!("join-cluster: {err}");
        }
        let joined = begun.elapsed();
        // The first answer that another cluster served, asked for in west.
        let first = loop {
            let page = self.fetch(&[]).await?;
            if page.reviews.as_ref().is_some_and(|(_, c)| c == name) {
                break begun.elapsed();
            }
            if begun.elapsed() > Duration::from_secs(30) {
                bail!("no answer from {name} within 30 s of the join");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        self.report.say(&format!("  joined after {}", human(joined)));
        self.report.observe(
            "from the command to the first cross-cluster 200 (seconds)",
            "under 10",
            round(first),
            first < Duration::from_secs(10),
        );
        self.clusters[n].data_plane_ready().await?;
        // The second use is refused.
        let (code, _, err) = self.operator(n, &["join-cluster", &token]).await?;
        self.report.observe("the same token again", "refused (exit code 1)", code, code == 1);
        self.report.say(&format!("       {err}"));
        let (_, out, _) = self.operator(0, &["clusters"]).await?;
        self.report.say(&indent(&out));
        Ok(())
    }

    async fn page(&mut self) -> anyhow::Result<()> {
        self.report.chapter("One page, two clusters");
        let pages = self.fetch_many(60, &[]).await?;
        let split = split(&pages);
        let served = |c: &str| split.iter().any(|((_, cluster), n)| cluster == c && *n > 0);
        self.show_split(&split, pages.len());
        let good = pages.iter().filter(|p| p.good()).count();
        self.report.observe("good pages of 60", "60", good, good == 60);
        self.report.observe("reviews served from west", "yes", served("west"), served("west"));
        self.report.observe("reviews served from east", "yes", served("east"), served("east"));
        let ratings = pages.iter().find_map(|p| p.ratings.clone());
        let expected = format!("spiffe://mesh.local/ns/{NAMESPACE}/sa/reviews");
        let ok = ratings.as_ref().is_some_and(|(c, caller)| c == "east" && *caller == expected);
        self.report.observe("caller that ratings in east verified", &expected, ratings.map(|r| r.1), ok);
        let storefront = format!("spiffe://mesh.local/ns/{NAMESPACE}/sa/storefront");
        let across = pages
            .iter()
            .filter(|p| p.reviews.as_ref().is_some_and(|(_, c)| c == "east"))
            .all(|p| p.callers.contains(&storefront));
        self.report.observe("reviews in east verified its caller in west", &storefront, across, across);
        Ok(())
    }

    async fn shift(&mut self) -> anyhow::Result<()> {
        self.report.chapter("A VirtualService moves 90/10 between versions, live");
        self.west().write("reviews.yaml", &config::shifted())?;
        let took = self.until_configured("\"weight\":90}").await?;
        self.report.say(&format!("  in force after {}", human(took)));
        let n = 300;
        let pages = self.fetch_many(n, &[]).await?;
        let split = split(&pages);
        self.show_split(&split, n);
        let v3 = pages.iter().filter(|p| p.reviews.as_ref().is_some_and(|(v, _)| v == "v3")).count();
        let share = v3 as f64 * 100.0 / n as f64;
        // 300 draws at 10 % have a standard deviation of 1.7 points; four of them is 7.
        let ok = (3.0..=17.0).contains(&share) && pages.iter().all(Page::good);
        self.report.observe(
            "share of v3, percent",
            "10 (3 to 17 of 300 requests)",
            (share * 10.0).round() / 10.0,
            ok,
        );
        Ok(())
    }

    async fn by_user(&mut self) -> anyhow::Result<()> {
        self.report.chapter("A header route for one user");
        self.west().write("reviews.yaml", &config::by_user("jason"))?;
        let jason = [("end-user", "jason")];
        let is = |p: &Page, v: &str| p.reviews.as_ref().is_some_and(|(got, _)| got == v);
        self.until(&jason, |p| p.iter().all(|p| is(p, "v2"))).await?;
        let his = self.fetch_many(20, &jason).await?;
        let others = self.fetch_many(20, &[]).await?;
        let (his, others) =
            (his.iter().filter(|p| is(p, "v2")).count(), others.iter().filter(|p| is(p, "v1")).count());
        self.report.observe("jason's pages with reviews v2", "20 of 20", his, his == 20);
        self.report.observe("other pages with reviews v1", "20 of 20", others, others == 20);
        Ok(())
    }

    async fn authorize(&mut self) -> anyhow::Result<()> {
        self.report.chapter("Only reviews may call ratings: a policy in east holds against west");
        let before = self.call_ratings().await?;
        self.report.observe(
            "storefront (west) calls ratings (east), no policy",
            "200",
            before.status,
            before.status == 200,
        );
        self.east().write("policy.yaml", &config::only_reviews())?;
        let begun = Instant::now();
        let denied = loop {
            let a = self.call_ratings().await?;
            if a.status != 200 || begun.elapsed() > CONVERGE {
                break a;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        let text = denied.text();
        let ok = denied.status == 403 && text == "RBAC: access denied";
        self.report.observe(
            "the same call under the policy",
            "403 RBAC: access denied",
            format!("{} {text}", denied.status),
            ok,
        );
        let reason = self.reason().await;
        let ok = reason.contains("rbac_access_denied_matched_policy");
        self.report.observe(
            "reason in the log of ratings' sidecar",
            "rbac_access_denied_matched_policy[none]",
            reason,
            ok,
        );
        let page = self.fetch_many(20, &[("end-user", "jason")]).await?;
        let served = page.iter().filter(|p| p.ratings.is_some()).count();
        self.report.observe("reviews still gets ratings", "20 of 20", served, served == 20);
        Ok(())
    }

    /// The response detail that ratings' sidecar logged for the refusal.
    async fn reason(&self) -> String {
        let begun = Instant::now();
        loop {
            let log = self.east().log("ratings-v1-sidecar");
            let found = log
                .split_whitespace()
                .find(|w| w.contains("rbac_access_denied"))
                .map(|w| w.trim_matches('"').to_owned());
            if let Some(f) = found {
                return f;
            }
            if begun.elapsed() > Duration::from_secs(3) {
                return "nothing logged".into();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// A call from storefront in west to ratings, through its sidecar.
    async fn call_ratings(&self) -> anyhow::Result<http::Answer> {
        let proxy = self.west().workload("storefront", "v1")?.proxy();
        let host = format!("ratings.{NAMESPACE}:{PORT}");
        http::get(proxy, &format!("http://{host}/ratings"), &host, &[], LIMIT).await
    }

    async fn delay(&mut self) -> anyhow::Result<()> {
        self.report.chapter("An injected delay, and the timeout that catches it");
        self.east().write("ratings.yaml", &config::delayed_ratings("2s"))?;
        self.west().write("reviews.yaml", &config::impatient("0.5s"))?;
        self.until(&[], |p| p.iter().all(|p| p.reviews_status == 504)).await?;
        let page = self.fetch(&[]).await?;
        self.report.observe(
            "what storefront got for reviews",
            "504",
            page.reviews_status,
            page.reviews_status == 504,
        );
        let ok = page.took >= Duration::from_millis(450) && page.took < Duration::from_millis(1900);
        self.report.observe("time of the page (seconds)", "0.5, not 2", round(page.took), ok);
        self.east().write("ratings.yaml", "")?;
        self.west().write("reviews.yaml", "")?;
        self.until(&[], |p| p.iter().all(Page::good)).await?;
        Ok(())
    }

    async fn failover(&mut self) -> anyhow::Result<()> {
        self.report.chapter("kill -9 of everything in east, while requests run");
        let load = Load::start(self.west().ingress());
        tokio::time::sleep(Duration::from_secs(2)).await;
        let killed = Instant::now();
        let n = self.clusters[1].kill_everything().await;
        self.report.say(&format!("  {n} processes killed"));
        tokio::time::sleep(Duration::from_secs(6)).await;
        let results = load.stop().await;
        let before = results.iter().filter(|r| r.at < killed).count();
        let before_east = results.iter().filter(|r| r.at < killed && r.cluster == "east").count();
        let after: Vec<_> = results.iter().filter(|r| r.at >= killed).collect();
        let failed: Vec<_> = after.iter().filter(|r| !r.ok).collect();
        let last = failed.iter().map(|r| r.at - killed).max().unwrap_or_default();
        self.report.observe(
            "requests before, of them served by east",
            "both",
            json!([before, before_east]),
            before_east > 0,
        );
        self.report.observe("requests after", "many", after.len(), after.len() > 50);
        let count = failed.len();
        self.report.observe("failed requests", "few: none that west could serve after 3 s", count, true);
        let ok = last <= Duration::from_secs(3);
        self.report.observe("time until none failed (seconds)", "3 at most", round(last), ok);
        let west_only =
            after.iter().filter(|r| r.at - killed > Duration::from_secs(3)).all(|r| r.cluster == "west");
        self.report.observe("west serves everything 3 s later", "true", west_only, west_only);

        self.report.chapter("East comes back and is used again");
        let begun = Instant::now();
        self.clusters[1].start_control_plane()?;
        self.clusters[1].control_plane_up().await?;
        self.clusters[1].start_data_plane().await?;
        let mut back = None;
        while begun.elapsed() < Duration::from_secs(30) {
            let page = self.fetch(&[]).await?;
            if page.reviews.is_some_and(|(_, c)| c == "east") {
                back = Some(begun.elapsed());
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.report.observe(
            "from the restart to the first answer from east (seconds)",
            "under 15",
            back.map(round),
            back.is_some_and(|b| b < Duration::from_secs(15)),
        );
        self.clusters[1].data_plane_ready().await?;
        Ok(())
    }

    async fn leave(&mut self) -> anyhow::Result<()> {
        self.report.chapter("East leaves");
        let (code, out, err) = self.operator(1, &["leave-cluster"]).await?;
        self.report.say(&indent(&format!("{out}{err}")));
        self.report.observe("leave-cluster", "exit code 0", code, code == 0);
        let (_, out, _) = self.operator(0, &["clusters", "-o", "json"]).await?;
        let listed: Value = serde_json::from_str(&out).unwrap_or(Value::Null);
        let members =
            listed["clusters"].as_array().map_or(0, |a| a.iter().filter(|c| c["cluster"] == "east").count());
        self.report.observe("east among west's members", "0", members, members == 0);
        // What west's proxies execute, all of it.
        let begun = Instant::now();
        let references = loop {
            let n = self.references_to_east().await?;
            if n == 0 || begun.elapsed() > CONVERGE {
                break n;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        self.report.observe("references to east in west's proxies", "0", references, references == 0);
        let pages = self.fetch_many(30, &[]).await?;
        let good = pages.iter().filter(|p| p.good()).count();
        self.report.observe("good pages of 30 without east", "30", good, good == 30);
        Ok(())
    }

    /// Mentions of east in the configuration of every proxy of west.
    async fn references_to_east(&self) -> anyhow::Result<usize> {
        let mut n = 0;
        let mut pages: Vec<_> = self.west().workloads.iter().map(|w| w.admin()).collect();
        pages.push((self.west().ingress().ip(), ports::ADMIN).into());
        pages.push((self.west().east_west().ip(), ports::ADMIN).into());
        let gateway = self.east().east_west().ip().to_string();
        for admin in pages {
            let dump = http::get(admin, "/config_dump", "admin", &[], LIMIT).await?.text();
            n += dump.matches("east.clusterset.local").count() + dump.matches(&gateway).count();
        }
        Ok(n)
    }

    async fn stay(&mut self, stop: &CancellationToken) -> anyhow::Result<()> {
        self.report.chapter("Yours");
        self.join_again().await?;
        let (west, east) = (self.west(), self.east());
        let ingress = west.ingress();
        let proxy = west.workload("storefront", "v1")?.proxy();
        self.report.say(&format!(
            "  East has joined again. Everything stays up until Ctrl-C.\n\n\
             \x20 The page, in a browser or with curl:\n\
             \x20   curl -H 'Host: {host}' http://{ingress}/\n\
             \x20   curl -H 'Host: {host}' http://{ingress}/api/page\n\
             \x20 As one user, and straight from a workload through its sidecar:\n\
             \x20   curl -H 'Host: {host}' -H 'end-user: jason' http://{ingress}/api/page\n\
             \x20   curl -x http://{proxy} http://ratings.{NAMESPACE}:{PORT}/ratings\n\
             \x20 What the mesh knows:\n\
             \x20   {exe} clusters --state-dir {ws}\n\
             \x20   {exe} proxy-status --state-dir {ws}\n\
             \x20   curl http://{admin}/config_dump\n\
             \x20 Configuration, applied as soon as a file is saved:\n\
             \x20   {wc}\n\x20   {ec}",
            host = config::HOST,
            exe = std::env::current_exe()?.display(),
            ws = west.state(),
            admin = west.workloads[0].admin(),
            wc = west.state().replace("/state", "/config"),
            ec = east.state().replace("/state", "/config"),
        ));
        stop.cancelled().await;
        self.report.say("\nstopping ...");
        Ok(())
    }

    async fn join_again(&mut self) -> anyhow::Result<()> {
        let (code, token, err) = self.operator(0, &["token", "create"]).await?;
        if code != 0 {
            bail!("token create: {err}");
        }
        let (code, _, err) = self.operator(1, &["join-cluster", &token]).await?;
        if code != 0 {
            bail!("join-cluster: {err}");
        }
        Ok(())
    }

    async fn fetch(&self, headers: &[(&str, &str)]) -> anyhow::Result<Page> {
        page(self.west().ingress(), headers).await
    }

    async fn fetch_many(&self, n: usize, headers: &[(&str, &str)]) -> anyhow::Result<Vec<Page>> {
        let mut all = Vec::with_capacity(n);
        for _ in 0..n {
            all.push(self.fetch(headers).await?);
        }
        Ok(all)
    }

    /// Waits until ten pages in a row look as wanted; answers how long that took.
    async fn until(
        &self,
        headers: &[(&str, &str)],
        wanted: impl Fn(&[Page]) -> bool,
    ) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        loop {
            let seen = begun.elapsed();
            let pages = self.fetch_many(10, headers).await?;
            if wanted(&pages) {
                return Ok(seen);
            }
            if begun.elapsed() > CONVERGE {
                bail!(
                    "the change did not show within {} s; last page: {:?}",
                    CONVERGE.as_secs(),
                    pages.last()
                );
            }
        }
    }

    /// Waits until the storefront's sidecar executes something that reads `text`.
    async fn until_configured(&self, text: &str) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        let admin = self.west().workload("storefront", "v1")?.admin();
        loop {
            let dump = http::get(admin, "/config_dump", "admin", &[], LIMIT).await?.text();
            if dump.replace(char::is_whitespace, "").contains(text) {
                return Ok(begun.elapsed());
            }
            if begun.elapsed() > CONVERGE {
                bail!("the change did not reach the sidecar within {} s", CONVERGE.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn show_split(&self, split: &BTreeMap<(String, String), usize>, n: usize) {
        let rows = split.iter().map(|((version, cluster), count)| {
            [
                format!("  {version}"),
                cluster.clone(),
                count.to_string(),
                format!("{:.1} %", *count as f64 * 100.0 / n as f64),
            ]
        });
        self.report.say(&indent(&table(["  REVIEWS", "CLUSTER", "REQUESTS", "SHARE"], rows)));
    }
}

/// The first octet pair from `from` on whose control-plane port is free.
fn free_range(from: u8) -> Option<u8> {
    (from..=250).find(|o| {
        [ports::XDS, ports::EAST_WEST]
            .iter()
            .all(|p| std::net::TcpListener::bind(SocketAddr::from(([127, *o, 0, 1], *p))).is_ok())
    })
}

async fn page(ingress: SocketAddr, headers: &[(&str, &str)]) -> anyhow::Result<Page> {
    let answer = http::get(ingress, "/api/page", config::HOST, headers, LIMIT).await?;
    let mut page = Page { status: answer.status, took: answer.took, ..Page::default() };
    let Ok(json) = answer.json() else { return Ok(page) };
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    page.callers.push(text(&json["caller"]));
    let reviews = json["calls"].as_array().into_iter().flatten().find(|c| c["service"] == "reviews");
    if let Some(r) = reviews {
        page.reviews_status = r["status"].as_u64().and_then(|s| u16::try_from(s).ok()).unwrap_or(0);
        let served = &r["served"];
        if page.reviews_status == 200 && served.is_object() {
            page.reviews = Some((text(&served["version"]), text(&served["cluster"])));
            page.callers.push(text(&served["caller"]));
            let inner = &served["calls"][0];
            if inner["status"] == 200 {
                page.ratings = Some((text(&inner["served"]["cluster"]), text(&inner["served"]["caller"])));
            }
        }
    }
    Ok(page)
}

fn split(pages: &[Page]) -> BTreeMap<(String, String), usize> {
    let mut out = BTreeMap::new();
    for p in pages {
        let key = p.reviews.clone().unwrap_or_else(|| ("no answer".into(), "-".into()));
        *out.entry(key).or_default() += 1;
    }
    out
}

/// One request of the background load.
struct Sample {
    at: Instant,
    ok: bool,
    cluster: String,
}

/// Requests in the background: eight clients, as fast as pages come, with a short pause between.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<tokio::task::JoinHandle<Vec<Sample>>>,
}

impl Load {
    fn start(ingress: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let clients = (0..8)
            .map(|_| {
                let stop = stop.clone();
                tokio::spawn(async move {
                    let mut samples = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        let p = page(ingress, &[]).await.unwrap_or_default();
                        // Counted when it ended: a request that hung through the failure belongs to it.
                        let cluster = p.reviews.as_ref().map(|r| r.1.clone()).unwrap_or_default();
                        samples.push(Sample { at: Instant::now(), ok: p.good(), cluster });
                        tokio::time::sleep(Duration::from_millis(40)).await;
                    }
                    samples
                })
            })
            .collect();
        Self { stop, clients }
    }

    async fn stop(self) -> Vec<Sample> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        for c in self.clients {
            all.extend(c.await.unwrap_or_default());
        }
        all
    }
}

fn round(d: Duration) -> f64 {
    (d.as_secs_f64() * 100.0).round() / 100.0
}

fn indent(text: &str) -> String {
    text.lines().map(|l| format!("    {l}")).collect::<Vec<_>>().join("\n")
}

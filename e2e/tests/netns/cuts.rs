//! Partial failures of the link and of a cluster, and what each costs: the table of `multicluster/README.md`.

use std::time::{Duration, SystemTime};

use anyhow::ensure;
use flotilla_e2e::{
    netns::{Cluster, World, exec},
    wan::Rule,
};
use mesh_testkit::call::{Calls, Outcome};

use crate::support::{by_cluster, load, options, scenario, served_from, three_clusters};

/// How long each failure lasts.
const CUT: Duration = Duration::from_secs(7);
/// From then on no new request goes where it is not answered.
const LEFT: u64 = 3_000;
/// From then on a lease that nobody renews has lapsed. What east sends while it hears nothing may still renew it once.
const LAPSED: u64 = 4_500;
/// And so soon after it is over the cluster is used again.
const AGAIN: Duration = Duration::from_secs(5);

const WEST: usize = 0;
const EAST: usize = 1;
const NORTH: usize = 2;

fn now() -> u64 {
    let d = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

/// What is broken.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Failure {
    /// Peers do not reach east's control plane.
    Control,
    /// East's gateway does not reach its workloads.
    Data,
    /// The link passes nothing from west to east.
    To,
    /// The link passes nothing from east to west.
    From,
    /// The link between west and east passes nothing; north reaches both.
    Pair,
    /// Nobody reaches east.
    All,
}

impl Failure {
    fn name(self) -> &'static str {
        match self {
            Self::Control => "peers do not reach east's control plane",
            Self::Data => "east's gateway does not reach its workloads",
            Self::To => "nothing passes from west to east",
            Self::From => "nothing passes from east to west",
            Self::Pair => "nothing passes between west and east",
            Self::All => "nothing passes to or from east",
        }
    }

    /// Whether the link is the reason, and leases lapse by it.
    fn of_link(self) -> bool {
        !matches!(self, Self::Control | Self::Data)
    }

    /// Breaks it, or mends it.
    fn set(self, world: &World, broken: bool) -> anyhow::Result<()> {
        let link = |from, to| world.link(from, to, if broken { Rule::CUT } else { Rule::CLEAN });
        let drop = |part: &str, rule: &str| -> anyhow::Result<()> {
            let rule = format!("iptables {} {rule} -j DROP", if broken { "-I" } else { "-D" });
            let args: Vec<&str> = rule.split(' ').collect();
            exec(&world.clusters[EAST].netns(part), &args)?.ok(&rule)?;
            Ok(())
        };
        match self {
            Self::Control => drop("cp", "INPUT -p tcp --dport 15016")?,
            Self::Data => drop("gw", "OUTPUT -d 10.10.1.0/24")?,
            Self::To => link(WEST, EAST),
            Self::From => link(EAST, WEST),
            Self::Pair => {
                link(WEST, EAST);
                link(EAST, WEST);
            }
            Self::All => {
                for other in [WEST, NORTH] {
                    link(other, EAST);
                    link(EAST, other);
                }
            }
        }
        Ok(())
    }
}

/// Requests of a client before, during and after a failure.
struct Seen {
    failed: usize,
    /// When the last one that failed was begun, ms after the failure began.
    last: u64,
    /// Answers to requests begun during the failure and after the lease, by cluster.
    late: Vec<Outcome>,
}

fn seen(outcomes: &[Outcome], from: u64, to: u64) -> Seen {
    let began = |o: &Outcome| o.at.saturating_sub(o.ms as u64);
    let failed = || outcomes.iter().filter(|o| !o.ok && began(o) < to);
    let late = |o: &&Outcome| began(o) > from + LEFT && began(o) < to;
    Seen {
        failed: failed().count(),
        last: failed().map(|o| began(o).saturating_sub(from)).max().unwrap_or(0),
        late: outcomes.iter().filter(late).cloned().collect(),
    }
}

#[test]
#[ignore = "needs root and network namespaces"]
fn what_each_partial_failure_costs() {
    scenario("partial failures", async || {
        let world = World::start(&three_clusters(options(false))).await?;
        for c in [WEST, NORTH] {
            served_from(world.clusters[c].workload("client"), "gamma", &["west", "east", "north"]).await?;
            served_from(world.clusters[c].workload("client"), "beta", &["east"]).await?;
        }
        let mut wrong = vec![];
        for failure in
            [Failure::Control, Failure::Data, Failure::To, Failure::From, Failure::Pair, Failure::All]
        {
            if let Err(e) = one(&world, failure).await {
                wrong.push(format!("{}: {e:#}", failure.name()));
            }
        }
        ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        Ok(())
    });
}

fn run(cluster: &Cluster, service: &str) -> tokio::task::JoinHandle<anyhow::Result<Vec<Outcome>>> {
    let client = cluster.workload("client").clone();
    // Callers that give up after a second, so that silence costs requests and not just time.
    let calls = Calls { timeout_ms: 1_000, ..load(service, CUT + Duration::from_secs(2)) };
    tokio::spawn(async move { client.call(&calls).await })
}

async fn one(world: &World, failure: Failure) -> anyhow::Result<()> {
    let (west, north) = (&world.clusters[WEST], &world.clusters[NORTH]);
    let runs = [(west, "gamma"), (west, "beta"), (north, "gamma"), (north, "beta")].map(|(c, s)| run(c, s));
    tokio::time::sleep(Duration::from_secs(2)).await;
    let begun = now();
    failure.set(world, true)?;
    tokio::time::sleep(CUT - Duration::from_millis(500)).await;
    let ended = now();
    let mut all = vec![];
    for r in runs {
        all.push(seen(&r.await??, begun, ended));
    }
    failure.set(world, false)?;
    let mut again = Duration::ZERO;
    for c in [west, north] {
        let t = served_from(c.workload("client"), "gamma", &["west", "east", "north"]).await?;
        again = again.max(t);
        again = again.max(served_from(c.workload("client"), "beta", &["east"]).await?);
    }

    println!("   {}, for {} s:", failure.name(), CUT.as_secs());
    for (who, s) in ["west -> gamma", "west -> beta", "north -> gamma", "north -> beta"].iter().zip(&all) {
        println!(
            "     {who:<15} {:>3} failed, the last begun after {:>4.1} s; after 3 s {:?}",
            s.failed,
            s.last as f64 / 1e3,
            by_cluster(&s.late)
        );
    }
    println!("     used again {:.1} s after it was over", again.as_secs_f64());
    ensure!(again <= AGAIN, "used again only after {again:?}");
    let [west_gamma, west_beta, north_gamma, north_beta] = &all[..] else { unreachable!("four runs") };
    for s in [west_gamma, north_gamma] {
        ensure!(s.late.len() > 100, "only {} requests", s.late.len());
        ensure!(s.last <= LEFT, "a request begun after {} ms failed that others could have served", s.last);
    }
    let due = begun + LAPSED;
    let from_east = |s: &Seen| s.late.iter().filter(|o| o.cluster == "east").count();
    // What cannot be used is left; what can be is used, if only as the last.
    let (west_reaches, north_reaches) = match failure {
        Failure::Control => (true, true),
        Failure::Data | Failure::All => (false, false),
        Failure::To | Failure::From | Failure::Pair => (false, true),
    };
    for (who, beta, gamma, reaches) in
        [("west", west_beta, west_gamma, west_reaches), ("north", north_beta, north_gamma, north_reaches)]
    {
        let answered = beta.late.iter().filter(|o| o.ok).count();
        if reaches {
            ensure!(beta.failed == 0, "{who}: {} requests to beta failed", beta.failed);
        } else {
            ensure!(answered == 0, "{who}: beta answered {answered} times");
        }
        let lapsed = failure == Failure::Control || (failure.of_link() && !reaches);
        if lapsed {
            let late = gamma.late.iter().filter(|o| o.cluster == "east" && o.at > due).count();
            ensure!(late == 0, "{who}: east answered {late} times after its lease");
        } else if reaches {
            ensure!(from_east(gamma) > 20, "{who}: east answered {} times", from_east(gamma));
        }
    }
    Ok(())
}

//! Configuration: routes, authorization, faults, mistakes, leaving, and the capture rules themselves.

use std::time::Duration;

use anyhow::{Context, ensure};
use flotilla_e2e::{
    netns::{NAMESPACE, World, exec, until},
    programs,
};
use mesh_testkit::{call::Protocol, echo::DELAY_MS};

use crate::support::{all_ok, by_cluster, calls, of_version, options, scenario, served_from, settled};

const CONVERGE: Duration = Duration::from_secs(10);

/// A VirtualService for `gamma` with the given `http` section.
fn gamma(http: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: gamma, namespace: {NAMESPACE}}}\n\
         spec:\n  hosts: [gamma]\n  http:\n{http}"
    )
}

fn to(subset: &str) -> String {
    format!("{{destination: {{host: gamma, subset: {subset}}}}}")
}

fn subsets() -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: gamma, namespace: {NAMESPACE}}}\n\
         spec:\n  host: gamma\n  subsets:\n  - {{name: v1, labels: {{version: v1}}}}\n  - {{name: v2, labels: {{version: \
         v2}}}}\n"
    )
}

#[test]
#[ignore = "needs root and network namespaces"]
fn routes_and_policy_hold_across_clusters_and_mistakes_are_kept_out() {
    scenario("routes, policy, mistakes, leaving", async || {
        let world = World::start(&options(false)).await?;
        settled(&world).await?;
        shift(&world).await?;
        by_header(&world).await?;
        mistakes(&world).await?;
        delay_and_timeout(&world).await?;
        authorization(&world).await?;
        leave(&world).await
    });
}

/// 90/10 between west's v1 and east's v2.
async fn shift(world: &World) -> anyhow::Result<()> {
    let west = &world.clusters[0];
    // Known to both sides of a call: to the caller that routes to subsets, and to the gateway that
    // finds their pods.
    for c in &world.clusters {
        c.write("subsets.yaml", &subsets())?;
    }
    let route = format!("  - route:\n    - {}\n", to("v2"));
    west.write("gamma.yaml", &gamma(&route))?;
    let client = west.workload("client");
    let took = until("all to v2", CONVERGE, async || {
        let o = client.call(&calls(Protocol::Http1, "gamma", 10)).await?;
        ensure!(of_version(&o, "v2") == 10, "{:?}, {:?}", by_cluster(&o), o.last());
        Ok(())
    })
    .await?;
    println!("   a route is in force after {:.1} s", took.as_secs_f64());
    let weighted =
        |v: &str, n: u32| format!("    - {{destination: {{host: gamma, subset: {v}}}, weight: {n}}}\n");
    west.write("gamma.yaml", &gamma(&format!("  - route:\n{}{}", weighted("v1", 90), weighted("v2", 10))))?;
    until("some to v1", CONVERGE, async || {
        let o = client.call(&calls(Protocol::Http1, "gamma", 10)).await?;
        ensure!(of_version(&o, "v1") > 0, "{:?}", by_cluster(&o));
        Ok(())
    })
    .await?;
    let o = client.call(&calls(Protocol::Http1, "gamma", 400)).await?;
    all_ok("90/10", &o)?;
    let share = of_version(&o, "v2") as f64 / 4.0;
    println!("   90/10: {share:.1} % of 400 requests went to v2 in east");
    // 400 draws at 10 % have a standard deviation of 1.5 points; four of them is 6.
    ensure!((4.0..=16.0).contains(&share), "{share} %");
    Ok(())
}

async fn by_header(world: &World) -> anyhow::Result<()> {
    let west = &world.clusters[0];
    west.write(
        "gamma.yaml",
        &gamma(&format!(
            "  - match: [{{headers: {{end-user: {{exact: jason}}}}}}]\n    route: [{}]\n  - route: [{}]\n",
            to("v2"),
            to("v1")
        )),
    )?;
    let client = west.workload("client");
    let mut his = calls(Protocol::Http1, "gamma", 10);
    his.headers.insert("end-user".into(), "jason".into());
    until("the header decides", CONVERGE, async || {
        let (a, b) = (client.call(&his).await?, client.call(&calls(Protocol::Http1, "gamma", 10)).await?);
        let (a, b) = (of_version(&a, "v2"), of_version(&b, "v1"));
        ensure!((a, b) == (10, 10), "{a} of 10 to v2, {b} of 10 to v1");
        Ok(())
    })
    .await?;
    println!("   header route: 10 of 10 to v2 for one user, 10 of 10 to v1 for the others");
    Ok(())
}

/// Each is refused by name, the rest of the same file applies, and what was there keeps serving.
async fn mistakes(world: &World) -> anyhow::Result<()> {
    let west = &world.clusters[0];
    let client = west.workload("client");
    let head = "apiVersion: networking.istio.io/v1\nkind: VirtualService\n";
    let bad = [
        (
            "unknown-field",
            format!(
                "{head}metadata: {{name: unknown-field, namespace: {NAMESPACE}}}\nspec: {{hosts: [alpha], htpp: []}}\n"
            ),
        ),
        (
            "unknown-host",
            format!(
                "{head}metadata: {{name: unknown-host, namespace: {NAMESPACE}}}\nspec: {{hosts: [alpha], http: [{{route: [{{destination: {{host: nowhere}}}}]}}]}}\n"
            ),
        ),
        (
            "bad-weights",
            format!(
                "{head}metadata: {{name: bad-weights, namespace: {NAMESPACE}}}\nspec: {{hosts: [alpha], http: [{{route: [{{destination: {{host: alpha}}, weight: -5}}, {{destination: {{host: gamma}}, weight: 50}}]}}]}}\n"
            ),
        ),
        ("gamma", gamma(&format!("  - route: [{}]\n", to("v2")))),
    ];
    // A good document between the bad ones: jason's header now decides by another name.
    let good = format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: good, namespace: {NAMESPACE}}}\nspec:\n  \
         hosts: [beta]\n  http:\n  - headers: {{response: {{add: {{x-good: \"yes\"}}}}}}\n    fault: {{abort: {{httpStatus: 418, \
         percentage: {{value: 100}}}}}}\n    route: [{{destination: {{host: beta}}}}]\n"
    );
    let mut file: Vec<String> = bad.iter().map(|(_, d)| d.clone()).collect();
    file.insert(2, good);
    west.write("mistakes.yaml", &file.join("---\n"))?;
    west.write("syntax.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: broken\n")?;
    until("the good document applies", CONVERGE, async || {
        let o = client.call(&calls(Protocol::Http1, "beta", 1)).await?;
        ensure!(o[0].status == 418, "{:?}", o[0]);
        Ok(())
    })
    .await?;
    let errors = west.debug("/galley/debug/config_errors")?;
    let text = errors.to_string();
    for (name, _) in &bad {
        let of = errors.as_array().into_iter().flatten().find(|e| e["name"] == *name && e["valid"] == false);
        let e = of.with_context(|| format!("{name} is not among {text}"))?;
        println!("   refused: {name}: {}", e["errors"][0]["message"].as_str().unwrap_or_default());
    }
    ensure!(text.contains("syntax.yaml"), "the file with the syntax error is not among {text}");
    // What was valid before goes on: the header route, and alpha without any route.
    let o = client.call(&calls(Protocol::Http1, "gamma", 10)).await?;
    ensure!(of_version(&o, "v1") == 10, "the last good route of gamma: {:?}", by_cluster(&o));
    all_ok("alpha", &client.call(&calls(Protocol::Http1, "alpha", 5)).await?)?;
    west.remove("mistakes.yaml")?;
    west.remove("syntax.yaml")?;
    served_from(client, "beta", &["east"]).await?;
    Ok(())
}

async fn delay_and_timeout(world: &World) -> anyhow::Result<()> {
    let west = &world.clusters[0];
    let client = west.workload("client");
    let fault = format!(
        "  - fault: {{delay: {{fixedDelay: 1s, percentage: {{value: 100}}}}}}\n    route: [{}]\n",
        to("v2")
    );
    west.write("gamma.yaml", &gamma(&fault))?;
    until("the delay", CONVERGE, async || {
        let o = client.call(&calls(Protocol::Http1, "gamma", 1)).await?;
        ensure!(o[0].ok && (1_000.0..2_000.0).contains(&o[0].ms), "{:?}", o[0]);
        println!("   injected delay of 1 s: 200 after {:.0} ms", o[0].ms);
        Ok(())
    })
    .await?;
    west.write("gamma.yaml", &gamma(&format!("  - timeout: 0.5s\n    route: [{}]\n", to("v2"))))?;
    let mut slow = calls(Protocol::Http1, "gamma", 1);
    slow.headers.insert(DELAY_MS.into(), "3000".into());
    until("the timeout", CONVERGE, async || {
        let o = client.call(&slow).await?;
        ensure!(o[0].status == 504 && (450.0..1_500.0).contains(&o[0].ms), "{:?}", o[0]);
        println!(
            "   timeout of 0.5 s against a workload in east that takes 3 s: 504 after {:.0} ms",
            o[0].ms
        );
        Ok(())
    })
    .await?;
    west.remove("gamma.yaml")?;
    served_from(client, "gamma", &["west", "east"]).await?;
    Ok(())
}

/// A policy in east holds against callers in west, by identity and by cluster.
async fn authorization(world: &World) -> anyhow::Result<()> {
    let (west, east) = (&world.clusters[0], &world.clusters[1]);
    let (client, gamma) = (west.workload("client"), west.workload("gamma"));
    let policy = |rules: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: beta, namespace: {NAMESPACE}}}\n\
             spec:\n  selector: {{matchLabels: {{app: beta}}}}\n  action: ALLOW\n  rules:\n{rules}"
        )
    };
    east.write(
        "policy.yaml",
        &policy(&format!("  - from: [{{source: {{principals: [mesh.local/ns/{NAMESPACE}/sa/gamma]}}}}]\n")),
    )?;
    until("client is denied", CONVERGE, async || {
        let o = client.call(&calls(Protocol::Http1, "beta", 1)).await?;
        ensure!(o[0].status == 403 && o[0].error.contains("RBAC: access denied"), "{:?}", o[0]);
        Ok(())
    })
    .await?;
    all_ok("gamma may", &gamma.call(&calls(Protocol::Http1, "beta", 5)).await?)?;
    let tcp = client.call(&calls(Protocol::Tcp, "beta", 1)).await?;
    ensure!(!tcp[0].ok, "TCP passed the policy: {tcp:?}");
    println!("   beta in east allows gamma of west; client of west: 403, and no TCP");
    east.write("policy.yaml", &policy("  - when: [{key: source.cluster, values: [east]}]\n"))?;
    until("west is denied", CONVERGE, async || {
        let o = gamma.call(&calls(Protocol::Http1, "beta", 1)).await?;
        ensure!(o[0].status == 403, "{:?}", o[0]);
        let o = east.workload("client").call(&calls(Protocol::Http1, "beta", 1)).await?;
        ensure!(o[0].ok, "{:?}", o[0]);
        Ok(())
    })
    .await?;
    println!("   beta in east allows its own cluster: 403 for west, 200 for east");
    east.remove("policy.yaml")?;
    served_from(client, "beta", &["east"]).await?;
    Ok(())
}

async fn leave(world: &World) -> anyhow::Result<()> {
    let (west, east) = (&world.clusters[0], &world.clusters[1]);
    let said = east.flotilla(&["leave-cluster"])?.ok("leave-cluster")?;
    println!("   leave-cluster: {}", said.lines().last().unwrap_or_default());
    let parts: Vec<String> = west.workloads.iter().map(|w| w.name()).chain(["gw".to_owned()]).collect();
    until("no reference to east in west", CONVERGE, async || {
        for part in &parts {
            let dump = west.admin(part, "/config_dump")?;
            let n = dump.matches("east.clusterset.local").count() + dump.matches(&*east.wan_ip()).count();
            ensure!(n == 0, "{n} in {part}");
        }
        Ok(())
    })
    .await?;
    let members = west.flotilla(&["clusters", "-o", "json"])?.ok("clusters")?;
    ensure!(!members.contains("\"east\""), "{members}");
    let o = west.workload("client").call(&calls(Protocol::Http1, "gamma", 20)).await?;
    all_ok("gamma without east", &o)?;
    println!("   zero references to east in {} proxies of west; gamma: {:?}", parts.len(), by_cluster(&o));
    Ok(())
}

#[test]
#[ignore = "needs root and network namespaces"]
fn capture_rules_are_removed_exactly() {
    scenario("flotilla iptables --remove", async || {
        let program = programs::flotilla()?.display().to_string();
        let ns = format!("flt{}w9-rules", std::process::id());
        programs::must(&format!("ip netns add {ns}"))?;
        let result = remove_exactly(&ns, &program);
        programs::must(&format!("ip netns del {ns}"))?;
        result
    });
}

fn remove_exactly(ns: &str, program: &str) -> anyhow::Result<()> {
    let run = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        exec(ns, &words)?.ok(line)
    };
    // Rules of somebody else, some of them easily taken for ours.
    for rule in [
        "iptables -t nat -N THEIRS",
        "iptables -t nat -A THEIRS -j RETURN",
        "iptables -t nat -A OUTPUT -p udp --dport 53 -d 9.9.9.9 -j REDIRECT --to-ports 5353",
        "iptables -t nat -A PREROUTING -p tcp --dport 8080 -j THEIRS",
        "iptables -t nat -A OUTPUT -p tcp -d 192.0.2.1 -j DNAT --to-destination 192.0.2.2",
        "iptables -A INPUT -p tcp --dport 22 -j ACCEPT",
    ] {
        run(rule)?;
    }
    let rules = || -> anyhow::Result<Vec<String>> {
        let all = run("iptables-save")?;
        Ok(all.lines().filter(|l| l.starts_with('-') || l.starts_with('*')).map(str::to_owned).collect())
    };
    let before = rules()?;
    run(&format!("{program} iptables --dns-port 15053 -x 192.0.2.0/24"))?;
    let installed = rules()?;
    ensure!(installed.len() > before.len() + 10, "{installed:?}");
    run(&format!("{program} iptables --dns-port 15053 -x 192.0.2.0/24"))?;
    ensure!(rules()? == installed, "installing twice is not the same as once: {:#?}", rules()?);
    run(&format!("{program} iptables --remove"))?;
    let after = rules()?;
    ensure!(after == before, "before: {before:#?}\nafter: {after:#?}");
    println!(
        "   {} rules installed, removed; the {} of others are as before",
        installed.len() - before.len(),
        before.len()
    );
    Ok(())
}

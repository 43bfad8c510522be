//! `flotilla explain` and `flotilla doctor` against faults that are put in on purpose: the right one must be named
//! first. Two clusters of processes; neither root nor network.

#[path = "lab/mod.rs"]
mod lab;

use std::process::Command;

use serde_json::Value;

use crate::lab::*;

/// The clusters; what is broken is mended before the next fault.
struct Lab {
    west: Cluster,
    east: Cluster,
}

const FROM: &str = "productpage-v1.bookstore";

/// What was named first: step, text and fix.
#[derive(Debug, Default, Clone)]
struct Named {
    step: String,
    says: String,
    fix: String,
    exit: i32,
    lines: usize,
}

fn first(list: &Value) -> Named {
    let all: Vec<&Value> = list.as_array().into_iter().flatten().collect();
    let of = |state: &str| all.iter().find(|s| s["state"] == state).copied();
    let s = of("broken").or_else(|| of("warning")).cloned().unwrap_or_default();
    let text = |k: &str| s[k].as_str().unwrap_or_default().to_owned();
    Named { step: text("step"), says: text("says"), fix: text("fix"), ..Named::default() }
}

fn run(c: &Cluster, args: &[&str]) -> (i32, String) {
    let out = Command::new(flotilla()).args(args).args(["--state-dir", &c.state()]).output().unwrap();
    let text =
        [out.stdout.as_slice(), out.stderr.as_slice()].map(|o| String::from_utf8_lossy(o).into_owned());
    (out.status.code().unwrap_or(-1), text.concat())
}

fn explain(c: &Cluster, from: &str, to: &str) -> Named {
    let (exit, out) = run(c, &["explain", from, to, "-o", "json"]);
    let v: Value = serde_json::from_str(&out).unwrap_or_default();
    let (_, people) = run(c, &["explain", from, to]);
    Named { exit, lines: people.lines().count(), ..first(&v["steps"]) }
}

fn doctor(c: &Cluster) -> Named {
    let (exit, out) = run(c, &["doctor", "-o", "json"]);
    let v: Value = serde_json::from_str(&out).unwrap_or_default();
    Named { exit, ..first(&v["checks"]) }
}

enum Ask {
    /// To where, from the product page in west.
    Explain(&'static str),
    /// From whom.
    ExplainFrom(&'static str, &'static str),
    Doctor,
}
use Ask::{Doctor, Explain, ExplainFrom};

struct Fault {
    what: &'static str,
    break_it: fn(&mut Lab),
    mend: fn(&mut Lab),
    ask: Ask,
    step: &'static str,
    says: &'static str,
}

const NOTHING: fn(&mut Lab) = |_| {};

fn west_only(content: &str, l: &mut Lab) {
    l.west.write("fault.yaml", content);
}

fn mended(l: &mut Lab) {
    l.west.write("fault.yaml", "---\n");
    l.east.write("fault.yaml", "---\n");
}

fn virtual_service(spec: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: fault, namespace: {NAMESPACE}}}\n\
         spec: {{hosts: [ratings], http: [{spec}]}}\n---\n"
    )
}

fn policy(app: &str, action: &str, rules: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: fault, namespace: {NAMESPACE}}}\n\
         spec: {{selector: {{matchLabels: {{app: {app}}}}}, action: {action}, rules: {rules}}}\n---\n"
    )
}

fn rule(host: &str, spec: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: fault, namespace: {NAMESPACE}}}\n\
         spec: {{host: {host}, {spec}}}\n---\n"
    )
}

fn base(l: &Lab) {
    l.west.write("app.yaml", &west(l, &entry("ratings", "v1", l.west.workload(2))));
    l.east.write("app.yaml", &east(&entry("reviews", "v1", l.east.workload(1))));
}

fn west(l: &Lab, ratings: &str) -> String {
    [
        MESH.to_owned(),
        strict(),
        service("productpage", "productpage", "http", 9080),
        service("ratings", "ratings", "http", 9080),
        entry("productpage", "v1", l.west.workload(1)),
        ratings.to_owned(),
    ]
    .concat()
}

fn east(reviews: &str) -> String {
    [
        MESH.to_owned(),
        strict(),
        service("reviews", "reviews", "http", 9080),
        export("reviews"),
        reviews.to_owned(),
    ]
    .concat()
}

fn faults() -> Vec<Fault> {
    let f = |what, break_it, mend, ask, step, says| Fault { what, break_it, mend, ask, step, says };
    vec![
        f(
            "unknown caller",
            NOTHING,
            NOTHING,
            ExplainFrom("nobody.bookstore", "reviews"),
            "proxy",
            "no proxy is called",
        ),
        f("unknown name", NOTHING, NOTHING, Explain("orders"), "name", "no member exports one"),
        f("wrong namespace", NOTHING, NOTHING, Explain("ratings.shop"), "name", "nothing is called"),
        f("wrong port", NOTHING, NOTHING, Explain("reviews:1234"), "port", "has no port 1234"),
        f(
            "no such member",
            NOTHING,
            NOTHING,
            Explain("reviews.bookstore.svc.mars.clusterset.local"),
            "name",
            "mars is not a member",
        ),
        f(
            "export withdrawn",
            |l| {
                let all = east(&entry("reviews", "v1", l.east.workload(1)));
                l.east.write("app.yaml", &all.replace(&export("reviews"), ""));
            },
            |l| base(l),
            Explain("reviews"),
            "name",
            "no member exports one",
        ),
        f(
            "route to a subset that nobody defines",
            |l| west_only(&virtual_service("{route: [{destination: {host: ratings, subset: v9}}]}"), l),
            mended,
            Explain("ratings"),
            "route",
            "subset v9",
        ),
        f(
            "subset without workloads",
            |l| {
                let vs = virtual_service("{route: [{destination: {host: ratings, subset: v9}}]}");
                west_only(&(vs + &rule("ratings", "subsets: [{name: v9, labels: {version: v9}}]")), l);
            },
            mended,
            Explain("ratings"),
            "endpoints",
            "version=v9",
        ),
        f(
            "injected abort",
            |l| {
                let abort = "{fault: {abort: {percentage: {value: 100}, httpStatus: 555}}, route: [{destination: {host: ratings}}]}";
                west_only(&virtual_service(abort), l);
            },
            mended,
            Explain("ratings"),
            "route",
            "aborts 100 %",
        ),
        f(
            "no route takes the path",
            |l| {
                let only = "{match: [{uri: {exact: /only}}], route: [{destination: {host: ratings}}]}";
                west_only(&virtual_service(only), l);
            },
            mended,
            Explain("http://ratings:9080/other"),
            "route",
            "the answer is 404",
        ),
        f(
            "direct response",
            |l| west_only(&virtual_service("{directResponse: {status: 503}}"), l),
            mended,
            Explain("ratings"),
            "route",
            "answers 503 itself",
        ),
        f(
            "hidden by a Sidecar",
            |l| {
                let s = format!(
                    "apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {{name: default, namespace: {NAMESPACE}}}\n\
                     spec: {{egress: [{{hosts: [\"other/*\"]}}]}}\n---\n"
                );
                west_only(&s, l);
            },
            mended,
            Explain("ratings"),
            "name",
            "is not visible",
        ),
        f(
            "hidden by exportTo",
            |l| {
                let s = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: x, namespace: other}\n\
                     spec: {hosts: [api.example.com], exportTo: [\".\"], ports: [{number: 80, name: http, protocol: HTTP}], \
                     resolution: DNS, location: MESH_EXTERNAL}\n---\n";
                west_only(s, l);
            },
            mended,
            Explain("http://api.example.com/"),
            "name",
            "is not visible",
        ),
        f(
            "unknown destination, REGISTRY_ONLY",
            |l| {
                let mesh = MESH
                    .replace("accessLogFile: /dev/stdout", "outboundTrafficPolicy: {mode: REGISTRY_ONLY}");
                let all = west(l, &entry("ratings", "v1", l.west.workload(2)));
                l.west.write("app.yaml", &all.replace(MESH, &mesh));
            },
            |l| base(l),
            Explain("https://example.org/"),
            "name",
            "REGISTRY_ONLY",
        ),
        f(
            "denied here",
            |l| {
                let rules = format!(
                    "[{{from: [{{source: {{principals: [\"mesh.local/ns/{NAMESPACE}/sa/productpage\"]}}}}]}}]"
                );
                west_only(&policy("ratings", "DENY", &rules), l);
            },
            mended,
            Explain("ratings"),
            "policy",
            "AuthorizationPolicy bookstore/fault, rule 0 denies",
        ),
        f(
            "nobody allows it here",
            |l| west_only(&policy("ratings", "ALLOW", "[{from: [{source: {namespaces: [other]}}]}]"), l),
            mended,
            Explain("ratings"),
            "policy",
            "no ALLOW rule lets",
        ),
        f(
            "method denied",
            |l| west_only(&policy("ratings", "DENY", "[{to: [{operation: {methods: [GET]}}]}]"), l),
            mended,
            Explain("ratings"),
            "policy",
            "denies",
        ),
        f(
            "denied there",
            |l| {
                let rules = "[{from: [{source: {principals: [\"*/sa/productpage\"]}}]}]";
                l.east.write("fault.yaml", &policy("reviews", "DENY", rules));
            },
            mended,
            Explain("reviews"),
            "policy",
            "of west",
        ),
        f(
            "the other cluster allows another cluster only",
            |l| {
                let rules = "[{when: [{key: source.cluster, values: [north]}]}]";
                l.east.write("fault.yaml", &policy("reviews", "ALLOW", rules));
            },
            mended,
            Explain("reviews"),
            "policy",
            "no ALLOW rule lets",
        ),
        f(
            "mTLS off towards STRICT",
            |l| west_only(&rule("ratings", "trafficPolicy: {tls: {mode: DISABLE}}"), l),
            mended,
            Explain("ratings"),
            "mtls",
            "STRICT",
        ),
        f(
            "no workload is selected",
            |l| {
                let all = west(l, &entry("ratings", "v1", l.west.workload(2)));
                l.west.write("app.yaml", &all.replace("selector: {app: ratings}", "selector: {app: nobody}"));
            },
            |l| base(l),
            Explain("ratings"),
            "endpoints",
            "has no endpoints",
        ),
        f(
            "the workload is not healthy",
            |l| {
                let bad = entry("ratings", "v1", l.west.workload(2)).replace(
                    "metadata: {name: ratings-v1,",
                    "metadata: {annotations: {flotilla.dev/health: unhealthy}, name: ratings-v1,",
                );
                l.west.write("app.yaml", &west(l, &bad));
            },
            |l| base(l),
            Explain("ratings"),
            "endpoints",
            "is healthy",
        ),
        f(
            "the workload there has no proxy",
            |l| {
                let bare = entry("reviews", "v1", l.east.workload(1))
                    .replace("security.istio.io/tlsMode: istio", "a: b");
                l.east.write("app.yaml", &east(&bare));
            },
            |l| base(l),
            Explain("reviews"),
            "endpoints",
            "nor in east",
        ),
        f(
            "the other cluster has no such subset",
            |l| {
                let vs = virtual_service("{route: [{destination: {host: reviews, subset: v1}}]}")
                    .replace("hosts: [ratings]", "hosts: [reviews]");
                west_only(&(vs + &rule("reviews", "subsets: [{name: v1, labels: {version: v1}}]")), l);
            },
            mended,
            Explain("reviews"),
            "subset",
            "no DestinationRule defines subset v1 there",
        ),
        f(
            "another identity than was announced",
            |l| {
                let other = entry("reviews", "v1", l.east.workload(1))
                    .replace("serviceAccount: reviews", "serviceAccount: other");
                l.east.write("app.yaml", &east(&other));
            },
            |l| base(l),
            Explain("reviews"),
            "identity",
            "not one that the member announced",
        ),
        f(
            "invalid configuration",
            |l| {
                west_only(
                    "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: bad}\nspec: {http: 7}\n",
                    l,
                )
            },
            mended,
            Doctor,
            "configuration",
            "fault.yaml",
        ),
        f(
            "export without a service",
            |l| west_only(&export("missing"), l),
            mended,
            Doctor,
            "configuration",
            "no Service of this name",
        ),
        f(
            "the proxy there is dead",
            |l| l.east.stop("reviews-sidecar"),
            |l| {
                let ip = l.east.workload(1);
                l.east.sidecar("reviews", "v1", ip, &[]);
            },
            Explain("reviews"),
            "backend",
            "reaches no workload",
        ),
        f(
            "the other cluster's gateway is down",
            |l| l.east.stop("eastwest"),
            |l| l.east.gateway(),
            Explain("reviews"),
            "tunnel",
            "cannot reach east's gateways",
        ),
        f(
            "the same, asked of the doctor",
            |l| l.east.stop("eastwest"),
            |l| l.east.gateway(),
            Doctor,
            "member east",
            "cannot reach east's gateways",
        ),
        f(
            "the own gateway is down",
            |l| l.west.stop("eastwest"),
            |l| l.west.gateway(),
            Explain("reviews"),
            "gateway",
            "the own gateway",
        ),
        f(
            "the same, asked of the doctor",
            |l| l.west.stop("eastwest"),
            |l| l.west.gateway(),
            Doctor,
            "gateway",
            "no gateway is connected",
        ),
        f(
            "the other control plane is down",
            |l| l.east.stop("control-plane"),
            |l| l.east.control_plane(),
            Explain("reviews"),
            "lease",
            "lapsed",
        ),
        f(
            "the caller's proxy is down",
            |l| l.west.stop("productpage-sidecar"),
            |l| {
                let ip = l.west.workload(1);
                l.west.sidecar("productpage", "v1", ip, &[]);
            },
            Explain("reviews"),
            "proxy",
            "is not connected",
        ),
        f(
            "the same, asked of the doctor",
            |l| l.west.stop("productpage-sidecar"),
            |l| {
                let ip = l.west.workload(1);
                l.west.sidecar("productpage", "v1", ip, &[]);
            },
            Doctor,
            "proxies",
            "productpage-v1.bookstore is not connected",
        ),
    ]
}

#[test]
#[ignore = "starts two clusters; cargo verify runs it"]
fn the_right_fault_is_named_first() {
    let dir = tempfile::tempdir().unwrap();
    let (w, e) = ranges();
    let mut l = Lab { west: Cluster::new("west", w, dir.path()), east: Cluster::new("east", e, dir.path()) };
    l.west.write("app.yaml", &west(&l, &entry("ratings", "v1", l.west.workload(2))));
    l.east.write("app.yaml", &east(&entry("reviews", "v1", l.east.workload(1))));
    mended(&mut l);
    l.west.control_plane();
    l.east.control_plane();
    let alone = doctor(&l.west);
    assert_eq!((alone.step.as_str(), alone.exit), ("mesh", 1), "{alone:?}");
    l.west.operator(&["found"]);
    l.west.gateway();
    let token = l.west.operator(&["token", "create"]);
    l.east.operator(&["join-cluster", &token]);
    l.east.gateway();
    let (p, r, v) = (l.west.workload(1), l.west.workload(2), l.east.workload(1));
    l.west.sidecar("productpage", "v1", p, &[]);
    l.west.sidecar("ratings", "v1", r, &[]);
    l.east.sidecar("reviews", "v1", v, &[]);

    let whole = |l: &Lab| {
        for to in ["reviews", "ratings"] {
            until("nothing is broken", || {
                let n = explain(&l.west, FROM, to);
                (n.exit == 0 && n.step.is_empty()).then_some(())
            });
        }
        let mut last = Named::default();
        until("the doctor finds nothing", || {
            let n = doctor(&l.west);
            if n.step != last.step {
                println!("     the doctor says: {}: {}", n.step, n.says);
                last = n.clone();
            }
            (n.exit == 0 && n.step.is_empty()).then_some(())
        });
    };
    whole(&l);
    for to in ["reviews", "ratings"] {
        println!("$ flotilla explain {FROM} {to}\n{}", run(&l.west, &["explain", FROM, to]).1);
    }
    println!("$ flotilla doctor\n{}", run(&l.west, &["doctor"]).1);

    let (mut rows, mut named) = (Rows::default(), 0);
    let all = faults();
    let total = all.len();
    for f in all {
        (f.break_it)(&mut l);
        let ask = || match f.ask {
            Explain(to) => explain(&l.west, FROM, to),
            ExplainFrom(from, to) => explain(&l.west, from, to),
            Doctor => doctor(&l.west),
        };
        // A change takes a moment, and so does a lease.
        let begun = std::time::Instant::now();
        let seen = loop {
            let n = ask();
            let right = n.step == f.step && n.says.contains(f.says);
            if right || begun.elapsed().as_secs() >= 15 {
                break n;
            }
            std::thread::sleep(std::time::Duration::from_millis(200));
        };
        let right = seen.step == f.step && seen.says.contains(f.says) && seen.lines <= 20;
        named += usize::from(right);
        println!(
            "{} {:<46} {}: {}{}",
            if right { "ok  " } else { "MISS" },
            f.what,
            seen.step,
            seen.says,
            if seen.fix.is_empty() { String::new() } else { format!("\n     -> {}", seen.fix) }
        );
        rows.add(f.what, format!("{}: {}", seen.step, seen.says), right);
        (f.mend)(&mut l);
    }
    whole(&l);
    println!("{named} of {total} faults named first");
    l.west.stop("control-plane");
    assert_eq!(run(&l.west, &["doctor"]).0, 2, "nobody to ask");
    rows.end();
}

//! Clusters and virtual hosts on demand (ODCDS, VHDS): one script for a control plane, played to a sidecar that executes a
//! bootstrap file and to a real Envoy with the same file. What clients and the control plane see must be the same.

#[path = "on_demand/control.rs"]
mod control;
#[path = "on_demand/stage.rs"]
mod stage;

use std::time::Duration;

use control::Answer;
use mesh_xds::{
    codec,
    type_url::{CDS, VHDS},
};
use stage::{Stage, Who, cluster, host, host_resource, request, until};

const NOW: Duration = Duration::ZERO;
const SOON: Duration = Duration::from_millis(300);

/// Plays a script to both, and compares what they show.
fn both(n: u8, script: impl Fn(&Stage) -> Vec<String>) -> Vec<String> {
    let seen: Vec<Vec<String>> = [Who::Envoy, Who::Flotilla].map(|who| script(&Stage::new(n, who))).into();
    for (a, b) in seen[0].iter().zip(&seen[1]) {
        eprintln!("{} {a:60} {b}", if a == b { " " } else { "!" });
    }
    assert_eq!(seen[0], seen[1], "Envoy, and ours");
    seen[1].clone()
}

#[test]
#[ignore = "needs the flotilla binary and Envoy; cargo verify builds and installs them"]
fn a_host_arrives_changes_and_goes() {
    let seen = both(1, |s| {
        let c = &s.control;
        let mut out = vec![];
        c.answers(VHDS, "main/a.test", Answer::Resource(host_resource("a.test", 1, "one", &[]), SOON));
        out.push(s.get("a.test", "/"));
        out.push(s.get("A.test", "/"));
        out.push(format!("{}", c.times(VHDS, "main/a.test")));
        // What is not there, said in both ways.
        c.answers(VHDS, "main/b.test", Answer::Unresolved);
        out.push(s.get("b.test", "/"));
        // By another name, and with a port.
        let aliased = host_resource("group", 1, "two", &["c.test", "c.test:8080"]);
        for name in ["main/c.test", "main/c.test:8080"] {
            c.answers(VHDS, name, Answer::Resource(aliased.clone(), NOW));
        }
        out.push(s.get("c.test", "/"));
        out.push(s.get("c.test:8080", "/"));
        // Live.
        c.push(VHDS, vec![host_resource("a.test", 2, "two", &[])], &[]);
        until("the change", || (s.get("a.test", "/") == "200 two").then_some(()));
        out.push(s.get("a.test", "/"));
        c.answers(VHDS, "main/a.test", Answer::Unresolved);
        c.push(VHDS, vec![], &["main/a.test"]);
        until("the removal", || s.get("a.test", "/").starts_with("404").then_some(()));
        out.push(s.get("a.test", "/"));
        out.push(s.get("static.test", "/"));
        // A body is kept until there is a host to have it.
        c.answers(VHDS, "main/post.test", Answer::Resource(host_resource("post.test", 1, "one", &[]), SOON));
        out.push(s.call("post.test", "/", "", &vec![b'x'; 3_000]));
        // Who leaves is not waited for; who asks later has it.
        c.answers(VHDS, "main/left.test", Answer::Resource(host_resource("left.test", 1, "one", &[]), SOON));
        s.leave("left.test", "/");
        out.extend(s.logged("left.test", 1));
        until("the host", || (s.get("left.test", "/") == "200 one").then_some(()));
        // No answer at all.
        c.answers(VHDS, "main/silent.test", Answer::Silence);
        out.push(s.get("silent.test", "/"));
        for host in ["a.test", "b.test", "silent.test"] {
            // Lines of two workers come in either order.
            out.push(until("a failure in the access log", || {
                s.logged(host, 1).into_iter().rfind(|l| !l.contains(" 200 "))
            }));
        }
        out.push(format!("{:?}", c.world().refused));
        out
    });
    let wanted = [
        "200 one",
        "200 one",
        "1",
        "404 ",
        "200 two",
        "200 two",
        "200 two",
        "404 ",
        "200 one",
        "200 one 3000",
        "left.test 0 DC downstream_remote_disconnect",
        "504 stream timeout",
        "a.test 404 NR route_not_found",
        "b.test 404 NR route_not_found",
        "silent.test 504 SI stream_idle_timeout",
        "[]",
    ];
    assert_eq!(seen, wanted);
}

#[test]
#[ignore = "needs the flotilla binary and Envoy; cargo verify builds and installs them"]
fn a_cluster_arrives_or_does_not() {
    let seen = both(2, |s| {
        let c = &s.control;
        let mut out = vec![];
        c.answers(CDS, "late-one", Answer::Resource(cluster("late-one", s.upstream(0)), SOON));
        out.push(s.get("static.test", "/late-one"));
        out.push(s.get("static.test", "/late-one"));
        c.answers(CDS, "by-header", Answer::Resource(cluster("by-header", s.upstream(1)), NOW));
        out.push(s.call("static.test", "/header", "x-cluster: by-header\r\n", b""));
        out.push(s.call("static.test", "/header", "", b""));
        out.push(s.call("static.test", "/header", "x-cluster: nobody\r\n", b""));
        // The route says no.
        out.push(s.get("static.test", "/off"));
        // The route waits for less.
        c.answers(CDS, "slow", Answer::Silence);
        let begun = std::time::Instant::now();
        out.push(s.get("static.test", "/slow"));
        let took = begun.elapsed();
        out.push(format!("{}", took > Duration::from_millis(900) && took < Duration::from_secs(4)));
        out.push(format!(
            "{} {} {}",
            c.times(CDS, "late-one"),
            c.times(CDS, "by-header"),
            c.times(CDS, "off")
        ));
        // A body is kept until there is somebody to have it.
        c.answers(CDS, "big", Answer::Resource(cluster("big", s.upstream(0)), SOON));
        out.push(s.call("static.test", "/big", "", &vec![b'x'; 300_000]));
        // By connection.
        c.answers(CDS, "tcp", Answer::Resource(cluster("tcp", s.upstream(1)), SOON));
        out.push(request(s.tcp, "x", "/", "", b""));
        out.push(request(s.tcp, "x", "/", "", b""));
        out.push(request(s.tcp_late, "x", "/", "", b""));
        out.push(format!("{}", c.times(CDS, "tcp")));
        // What the others got was seen. Each worker writes its lines when it has some, so no order is compared.
        let refused = until("four refusals in the access log", || {
            let mut all = s.logged("static.test", 4);
            all.retain(|l| l.contains(" 503 "));
            (all.len() >= 4).then_some(all)
        });
        out.extend(refused);
        let mut connections = s.logged("-", 3);
        connections.sort();
        out.extend(connections);
        // It goes, and others stay.
        c.answers(CDS, "late-one", Answer::Absent);
        c.push(CDS, vec![], &["late-one"]);
        until("the removal", || s.get("static.test", "/late-one").starts_with("503").then_some(()));
        out.push(s.call("static.test", "/header", "x-cluster: by-header\r\n", b""));
        out
    });
    let wanted = [
        "200 one",
        "200 one",
        "200 two",
        "503 ",
        "503 ",
        "503 ",
        "503 ",
        "true",
        "1 1 0",
        "200 one 300000",
        "200 two",
        "200 two",
        "closed",
        "1",
        "static.test 503 NC cluster_not_found",
        "static.test 503 NC cluster_not_found",
        "static.test 503 NC cluster_not_found",
        "static.test 503 NC cluster_not_found",
        "- 0 - -",
        "- 0 - -",
        "- 0 NC -",
        "200 two",
    ];
    assert_eq!(seen, wanted);
}

#[test]
#[ignore = "needs the flotilla binary and Envoy; cargo verify builds and installs them"]
fn a_hundred_wait_for_one_and_one_that_left_is_no_matter() {
    let seen = both(3, |s| {
        let c = &s.control;
        let mut out = vec![];
        for (kind, name) in [(VHDS, "main/many.test"), (CDS, "many")] {
            let resource = if kind == VHDS {
                host_resource("many.test", 1, "one", &[])
            } else {
                cluster("many", s.upstream(0))
            };
            c.answers(kind, name, Answer::Resource(resource, Duration::from_secs(1)));
            s.leave(if kind == VHDS { "many.test" } else { "static.test" }, "/many");
            let (authority, path) = if kind == VHDS { ("many.test", "/") } else { ("static.test", "/many") };
            let all: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..100).map(|_| scope.spawn(|| s.get(authority, path))).collect();
                threads.into_iter().map(|t| t.join().unwrap()).collect()
            });
            let good = all.iter().filter(|a| *a == "200 one").count();
            out.push(format!("{good} of {}: {:?}", all.len(), all.iter().find(|a| *a != "200 one")));
            out.push(format!("{name}: {}", c.times(kind, name)));
        }
        out
    });
    assert_eq!(seen, ["100 of 100: None", "main/many.test: 1", "100 of 100: None", "many: 1"]);
}

#[test]
#[ignore = "needs the flotilla binary and Envoy; cargo verify builds and installs them"]
fn a_control_plane_that_comes_back_is_asked_again() {
    let seen = both(4, |s| {
        let c = &s.control;
        c.answers(VHDS, "main/a.test", Answer::Resource(host_resource("a.test", 1, "one", &[]), NOW));
        c.answers(CDS, "many", Answer::Resource(cluster("many", s.upstream(0)), NOW));
        let mut out = vec![s.get("a.test", "/"), s.get("static.test", "/many")];
        c.answers(VHDS, "main/a.test", Answer::Resource(host_resource("a.test", 2, "two", &[]), NOW));
        c.answers(CDS, "many", Answer::Resource(cluster("many", s.upstream(1)), NOW));
        c.restart(Duration::from_millis(100));
        // Nobody asks for anything: what is in use is subscribed by itself.
        until("a new subscription", || {
            (c.times(VHDS, "main/a.test") >= 2 && c.times(CDS, "many") >= 2).then_some(())
        });
        until("the change", || (s.get("a.test", "/") == "200 two").then_some(()));
        until("the change", || (s.get("static.test", "/many") == "200 two").then_some(()));
        out.push(format!("{} {}", c.times(VHDS, "main/a.test"), c.times(CDS, "many")));
        out
    });
    assert_eq!(seen, ["200 one", "200 one", "2 2"]);
}

/// Envoy has no such limit.
#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn names_have_a_limit_and_what_is_used_keeps_its_place() {
    let s = Stage::with(5, Who::Flotilla, &["--max-on-demand", "4"]);
    let c = &s.control;
    c.answers(VHDS, "main/used.test", Answer::Resource(host_resource("used.test", 1, "one", &[]), NOW));
    assert_eq!(s.get("used.test", "/"), "200 one");
    for i in 0..20 {
        assert_eq!(s.get("used.test", "/"), "200 one");
        let name = format!("stranger-{i}.test");
        c.answers(VHDS, &format!("main/{name}"), Answer::Resource(host_resource(&name, 1, "two", &[]), NOW));
        assert_eq!(s.get(&name, "/"), "200 two", "{name}");
    }
    assert_eq!(c.times(VHDS, "main/used.test"), 1, "it never lost its place");
    until("names given up", || (c.world().given_up.len() >= 16).then_some(()));
    let page = s.metrics();
    assert!(page.contains("flotilla_on_demand_names{kind=\"virtual_host\"} 4\n"), "{page}");
    assert!(page.contains("flotilla_on_demand_evicted_total 17\n"), "{page}");
    // Four that everybody waits for: a fifth is refused and not asked for.
    for i in 0..5 {
        c.answers(VHDS, &format!("main/silent-{i}.test"), Answer::Silence);
    }
    std::thread::scope(|scope| {
        for i in 0..4 {
            let s = &s;
            scope.spawn(move || s.get(&format!("silent-{i}.test"), "/"));
        }
        until("all places taken", || {
            (0..4).all(|i| c.times(VHDS, &format!("main/silent-{i}.test")) == 1).then_some(())
        });
        assert_eq!(s.get("silent-4.test", "/"), "503 ");
        assert_eq!(c.times(VHDS, "main/silent-4.test"), 0);
        for i in 0..4 {
            c.push(VHDS, vec![], &[&format!("main/silent-{i}.test")]);
        }
    });
    let page = s.metrics();
    assert!(page.contains("flotilla_on_demand_refused_total 1\n"), "{page}");
}

/// A restart without a control plane has what traffic had asked for.
#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn what_was_asked_for_is_kept_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().to_str().unwrap().to_owned();
    let mut s = Stage::with(6, Who::Flotilla, &["--state-dir", &state]);
    s.control.answers(
        VHDS,
        "main/a.test",
        Answer::Resource(host_resource("a.test", 1, "late-one", &[]), NOW),
    );
    s.control.answers(CDS, "late-one", Answer::Resource(cluster("late-one", s.upstream(0)), NOW));
    assert_eq!(s.get("a.test", "/"), "200 one");
    let file = dir.path().join("xds.cache");
    until("the file", || {
        let text = std::fs::read(&file).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        (text.contains("host main/a.test") && text.contains("cluster late-one")).then_some(())
    });
    s.control.gone();
    s.again();
    assert_eq!(s.get("a.test", "/"), "200 one");
}

#[test]
fn a_host_is_what_the_script_says() {
    let r = codec::decode_virtual_host(&codec::encode_virtual_host(&host("a", "one"))).unwrap();
    assert_eq!(r, host("a", "one"));
}

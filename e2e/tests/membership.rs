//! Whole processes: what `flotilla clusters` tells of members, and membership that configuration declares.

#[expect(dead_code, unused_imports, reason = "what is shared is more than this test uses")]
mod support;

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use serde_json::Value;

use crate::support::*;

/// Long enough for what must not happen again to happen: the token's file is looked at every two seconds.
const AGAIN: std::time::Duration = std::time::Duration::from_secs(5);

fn clusters(c: &Cluster) -> Result<Value, String> {
    let o = c.flotilla(&["clusters", "-o", "json"]);
    if o.code != 0 {
        return Err(format!("{o:?}"));
    }
    serde_json::from_str(&o.out).map_err(|e| e.to_string())
}

/// Waits until what a cluster tells is so.
fn told(what: &str, c: &Cluster, so: impl Fn(&Value) -> bool) -> Value {
    until(what, || {
        let v = clusters(c)?;
        if so(&v) { Ok(v) } else { Err(format!("{v:#}")) }
    })
}

fn token(founder: &Cluster) -> String {
    let o = founder.flotilla(&["token", "create"]);
    assert_eq!(o.code, 0, "{o:?}");
    o.out.trim().to_owned()
}

fn keep(token: &str, at: &Path) {
    fs::write(at, token).unwrap();
    fs::set_permissions(at, fs::Permissions::from_mode(0o600)).unwrap();
}

fn figures(transport: Transport) {
    let mut west = Cluster::start("west", transport);
    let mut east = Cluster::start("east", transport);
    west.found();
    west.east_west_gateway();
    west.ready(west.host(3));
    let o = east.flotilla(&["join-cluster", &token(&west)]);
    assert_eq!(o.code, 0, "{o:?}");
    east.east_west_gateway();
    east.ready(east.host(3));
    let via = if transport == Transport::Quic { "quic" } else { "tcp" };
    for (c, peer) in [(&west, "east"), (&east, "west")] {
        let v = told("every figure", c, |v| {
            let p = &v["clusters"][0];
            let loss = if via == "quic" { p["trunkLossPercent"].is_number() } else { true };
            p["state"] == "connected" && p["transport"] == via && p["controlRttMs"].is_number() && loss
        });
        let p = &v["clusters"][0];
        assert_eq!(p["cluster"], peer);
        assert_eq!(p["version"], env!("CARGO_PKG_VERSION"));
        assert_eq!((&p["protocol"], &p["lagChanges"]), (&2.into(), &0.into()), "{p:#}");
        assert!(p["leaseAgeMs"].as_u64().unwrap() < 2700, "{p:#}");
        assert!(p["controlRttMs"].as_f64().unwrap() < 1000.0, "{p:#}");
        assert_eq!(p["trunkRttMs"].is_number(), via == "quic", "{p:#}");
        // TCP does not tell. Loopback loses nothing, but on a busy machine an answer may be so late that QUIC takes the packet
        // for lost.
        let loss = p["trunkLossPercent"].as_f64();
        assert_eq!(loss.is_some(), via == "quic", "{p:#}");
        assert!(loss.is_none_or(|l| l < 20.0), "{p:#}");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        for ends in [&p["certificateExpiresUnixSeconds"], &v["certificateExpiresUnixSeconds"]] {
            assert!(ends.as_u64().unwrap() > now, "{v:#}");
        }
        assert_eq!(v["gateways"][0]["gateway"], "eastwest.flotilla-system", "{v:#}");
    }
    let text = west.flotilla(&["clusters"]).out;
    println!("{text}");
    let wide = text.lines().map(|l| l.chars().count()).max().unwrap();
    assert!(wide <= 100, "{wide}:\n{text}");
    assert!(text.contains("east") && text.contains(via), "{text}");
    assert!(west.flotilla(&["clusters", "-o", "wide"]).out.contains(&east.east_west().to_string()));

    // A gateway that is away is not known any more, and nothing else breaks.
    west.kill("eastwest");
    let v = told("the gateway is forgotten", &west, |v| v["gateways"].as_array().is_some_and(Vec::is_empty));
    let p = &v["clusters"][0];
    assert!(p["transport"].is_null() && p["trunkRttMs"].is_null(), "{p:#}");
}

#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn clusters_tell_the_path_over_quic() {
    figures(Transport::Quic);
}

#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn clusters_tell_the_path_over_tcp() {
    figures(Transport::Tcp);
}

fn membership(spec: &str) -> String {
    format!(
        "apiVersion: flotilla.dev/v1alpha1\nkind: MeshMembership\nmetadata: {{name: mesh}}\nspec:\n{spec}"
    )
}

fn phase(v: &Value, phase: &str) -> bool {
    v["declared"]["phase"] == phase
}

#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn configuration_joins_and_leaves() {
    let mut west = Cluster::start("west", Transport::Tcp);
    let mut east = Cluster::start("east", Transport::Tcp);
    west.found();
    west.east_west_gateway();
    west.ready(west.host(3));
    west.write("membership.yaml", &membership("  state: joined\n"));
    told("the founder is what it is declared to be", &west, |v| phase(v, "joined"));

    // Declared before there is a token: it says what is missing, and goes on when it is there.
    let file = east.path("join-token");
    let joined = membership(&format!("  tokenFile: {}\n", file.display()));
    east.write("membership.yaml", &joined);
    let v = told("the missing file", &east, |v| phase(v, "failed"));
    let says = v["declared"]["message"].as_str().unwrap().to_owned();
    assert!(says.contains("spec.tokenFile") && says.contains("flotilla token create"), "{says}");
    keep(&token(&west), &file);
    told("the join", &east, |v| phase(v, "joined") && v["clusters"][0]["cluster"] == "west");
    east.east_west_gateway();
    east.ready(east.host(3));
    let connected = |v: &Value| v["clusters"][0]["state"] == "connected";
    told("west is connected", &west, connected);
    let certificate = fs::read(east.path("state/ca/cert-chain.pem")).unwrap();

    // A restart, with the used token still there.
    east.kill("control-plane");
    east.control_plane();
    told("after the restart", &east, |v| phase(v, "joined") && connected(v));
    assert!(!east.log("control-plane").contains("joined a mesh, as declared"), "it joined once");
    assert!(!west.log("control-plane").contains("refused a join"), "and asked once");
    assert_eq!(fs::read(east.path("state/ca/cert-chain.pem")).unwrap(), certificate);

    // What is deleted by accident leaves nothing.
    east.remove("membership.yaml");
    let v = told("nothing is declared", &east, |v| v["declared"].is_null());
    assert!(connected(&v), "{v:#}");

    east.write("membership.yaml", &membership("  state: left\n"));
    told("east left", &east, |v| phase(v, "left") && v["trustDomain"] == "");
    told("west forgot east", &west, |v| v["clusters"].as_array().is_some_and(Vec::is_empty));
    let lefts = |c: &Cluster| c.log("control-plane").matches("left the mesh").count();
    let before = lefts(&east);
    east.write("membership.yaml", &membership("  state: left\n  force: true\n"));
    std::thread::sleep(AGAIN);
    told("still left", &east, |v| phase(v, "left"));
    assert_eq!(lefts(&east), before, "a second application does nothing");

    // The token is used up, and that is said once: it is not tried again and again.
    east.write("membership.yaml", &joined);
    let v = told("the used token", &east, |v| {
        phase(v, "failed")
            && v["declared"]["message"].as_str().unwrap_or_default().contains("already used by")
    });
    assert!(v["declared"]["message"].as_str().unwrap().starts_with("spec.tokenFile: "), "{v:#}");
    std::thread::sleep(AGAIN);
    assert_eq!(west.log("control-plane").matches("refused a join").count(), 1);

    // Evicted by declaration, a newcomer of that name is refused before its token is used.
    west.write(
        "eviction.yaml",
        "apiVersion: flotilla.dev/v1alpha1\nkind: ClusterEviction\nmetadata: {name: east}\nspec: {reason: test}\n",
    );
    told("the eviction", &west, |v| {
        v["declaredEvictions"][0]["phase"] == "evicted" && v["evicted"][0] == "east"
    });
    keep(&token(&west), &file);
    told("east is refused", &east, |v| {
        v["declared"]["message"].as_str().unwrap_or_default().contains("ClusterEviction east")
    });
    west.remove("eviction.yaml");
    told("the eviction is gone", &west, |v| v["declaredEvictions"].as_array().is_some_and(Vec::is_empty));
    keep(&format!("{}\n\n", token(&west)), &file);
    told("east is back", &east, |v| phase(v, "joined") && connected(v));

    // The founder would take the root key with it.
    west.write("membership.yaml", &membership("  state: left\n"));
    let v = told("the founder stays", &west, |v| phase(v, "failed"));
    assert!(v["declared"]["message"].as_str().unwrap().contains("root key"), "{v:#}");
    assert!(connected(&v), "{v:#}");
    let doctor = west.flotilla(&["doctor"]);
    assert!(doctor.code == 1 && doctor.out.contains("MeshMembership mesh declares left"), "{doctor:?}");
}

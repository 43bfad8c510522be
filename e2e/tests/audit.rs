//! Whole processes: the CA's audit log says who got what on which proof, over restarts and a rotation.

#[expect(dead_code, unused_imports, reason = "what is shared is more than this test uses")]
mod support;

use std::fs;

use serde_json::Value;

use crate::support::*;

fn entries(c: &Cluster) -> Vec<Value> {
    let o = c.flotilla(&["ca", "audit", "-o", "json"]);
    assert_eq!(o.code, 0, "{o:?}");
    o.out.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn verify(c: &Cluster, more: &[&str]) -> (i32, Value) {
    let o = c.flotilla(&[&["ca", "audit", "verify", "-o", "json"][..], more].concat());
    (o.code, serde_json::from_str(&o.out).unwrap_or_else(|e| panic!("{e}: {o:?}")))
}

#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn the_audit_log_says_who_got_what_and_whether_it_is_whole() {
    let mut c = Cluster::founded();
    c.sidecar("storefront", c.workload(2), None);
    c.ready(c.workload(2));
    let id = format!("spiffe://mesh.local/ns/{NAMESPACE}/sa/storefront");
    let of_storefront = |c: &Cluster, proof: &str| {
        until(&format!("a certificate by {proof}"), || {
            let all = entries(c);
            let mut found = all.iter().filter(|e| e["event"] == "issued" && e["identity"] == id.as_str());
            let one = found.find(|e| e["proof"]["kind"] == proof).cloned();
            one.ok_or_else(|| format!("{all:#?}"))
        })
    };
    let first = of_storefront(&c, "token");
    assert_eq!(first["proof"]["id"].as_str().unwrap().len(), 16, "{first}");
    assert!(first["proof"]["caller"].as_str().unwrap().starts_with("127."), "{first}");
    let (code, v) = verify(&c, &[]);
    assert_eq!((code, &v["intact"]), (0, &Value::Bool(true)), "{v}");
    let head = v["head"].as_str().unwrap().to_owned();

    // The root is replaced, whereupon the proxy renews with its certificate; the control plane starts again.
    for step in ["prepare", "activate", "finish"] {
        until(step, || {
            let o = c.flotilla(&["ca", "rotate", step]);
            if o.code == 0 { Ok(()) } else { Err(format!("{o:?}")) }
        });
    }
    let renewed = of_storefront(&c, "certificate");
    assert_ne!(first["serial"], renewed["serial"]);
    c.kill("control-plane");
    c.control_plane();
    let (code, v) = verify(&c, &["--head", &head]);
    assert_eq!(code, 0, "{v}");

    // A hand in the log: the line is named, whoever reads it. The token is not in it.
    let path = c.path("state/audit/issuance.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    let token = fs::read_to_string(c.path("tokens/storefront")).unwrap_or_default();
    assert!(token.is_empty() || !text.contains(token.trim()));
    let serial = first["serial"].as_str().unwrap();
    let at = text.lines().position(|l| l.contains(serial)).unwrap() + 1;
    fs::write(&path, text.replace(serial, &serial.replace('a', "b").replace('1', "2"))).unwrap();
    let (code, v) = verify(&c, &[]);
    assert!(code == 1 && v["reason"].as_str().unwrap().contains(&format!("line {at} ")), "{v}");
    let o = c.flotilla(&["ca", "audit"]);
    assert!(o.code == 1 && o.err.contains(&format!("line {at} ")), "{o:?}");
    fs::write(&path, &text).unwrap();
    assert_eq!(verify(&c, &[]).0, 0);
}

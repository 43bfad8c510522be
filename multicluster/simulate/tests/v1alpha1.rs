//! Which paths need whose token, as a Policy of release 1.0 says with `triggerRules`.

mod support;

use serde_json::{Value, json};
use support::bookinfo;

const KEYS: &str = "{\"keys\":[{\"kty\":\"EC\",\"crv\":\"P-256\",\"x\":\"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4\",\"y\":\"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM\"}]}";

/// `{"alg":"none"}` and `{"iss":"i","sub":"s"}`.
const OF_I: &str = "authorization: Bearer eyJhbGciOiJub25lIn0.eyJpc3MiOiJpIiwic3ViIjoicyJ9.x";
/// The same of issuer `j`.
const OF_J: &str = "authorization: Bearer eyJhbGciOiJub25lIn0.eyJpc3MiOiJqIiwic3ViIjoicyJ9.x";

/// Whether requests of a path pass without a token, with one of issuer `i`, and with one of `j`.
#[track_caller]
fn check(origins: &[(&str, Value)], rows: &[(&str, [bool; 3])]) {
    let list: Vec<Value> = origins
        .iter()
        .map(|(issuer, rules)| json!({"jwt": {"issuer": issuer, "jwks": KEYS, "triggerRules": rules}}))
        .collect();
    let mesh = bookinfo().with(json!({"apiVersion": "authentication.istio.io/v1alpha1", "kind": "Policy",
        "metadata": {"name": "p", "namespace": "default"},
        "spec": {"targets": [{"name": "ratings"}], "peers": [{"mtls": {}}], "origins": list}}));
    for (path, want) in rows {
        let request = format!("GET http://ratings:9080{path}");
        let ask = |headers: &[&str]| {
            let a = mesh.try_ask("default/productpage-v1", &request, headers).unwrap();
            match (a["action"].as_str(), a["status"].as_u64()) {
                (Some("forward"), None) => true,
                (Some("refuse"), Some(401)) => false,
                other => panic!("{path}: {other:?}"),
            }
        };
        assert_eq!([ask(&[]), ask(&[OF_I]), ask(&[OF_J])], *want, "{path}");
    }
}

#[test]
fn one_rule() {
    let rule =
        json!([{"excludedPaths": [{"regex": "/a/.*"}, {"exact": "/h"}], "includedPaths": [{"prefix": "/"}]}]);
    check(
        &[("i", rule)],
        &[
            ("/a/b", [true; 3]),
            ("/h?x", [true; 3]),
            ("/hh", [false, true, false]),
            // What follows the path is none of it.
            ("/x?/a/b", [false, true, false]),
        ],
    );
    check(
        &[("i", json!([{"includedPaths": [{"exact": "/b"}]}]))],
        &[("/a", [true; 3]), ("/b", [false, true, false])],
    );
}

#[test]
fn several_rules_and_issuers() {
    // Any rule that is met asks for a token.
    let rules = json!([{"excludedPaths": [{"prefix": "/a"}]}, {"includedPaths": [{"exact": "/a/b"}, {"suffix": ".z"}]}]);
    check(
        &[("i", rules)],
        &[
            ("/a/c", [true; 3]),
            ("/a/b", [false, true, false]),
            ("/a/b?q", [false, true, false]),
            ("/a/x.z", [false, true, false]),
            ("/a/c?x=/a/b", [true; 3]),
            ("/a/c?.z", [true; 3]),
            ("/x", [false, true, false]),
            ("/x?/a", [false, true, false]),
        ],
    );
    // Of several issuers those count whose rules are met.
    let prefix = |p: &str| json!([{"includedPaths": [{"prefix": p}]}]);
    check(
        &[("i", prefix("/i")), ("j", prefix("/i/j"))],
        &[
            ("/x", [true; 3]),
            ("/i", [false, true, false]),
            ("/i/j", [false, true, true]),
            ("/x?/i/j", [true; 3]),
        ],
    );
    check(
        &[("i", json!([])), ("j", prefix("/j"))],
        &[("/x", [false, true, false]), ("/j", [false, true, true])],
    );
    check(&[("i", json!([])), ("j", json!([]))], &[("/x", [false, true, true])]);
}

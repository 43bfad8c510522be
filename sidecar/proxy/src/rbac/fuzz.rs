//! Policies for the fuzzer: what an index finds is what a search from the first to the last finds, and a rule that
//! allows is one that denies turned around.

use mesh_model::proxy::{self as model, RbacAction};

use super::{Facts, Rules};
use crate::http::{client, headers::Headers};

/// Policies in JSON, and behind an empty line a method, a path, the caller's principal and fields, a line for each.
pub(crate) fn policies(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (rules, request) = text.split_once("\n\n").unwrap_or((text, "GET\n/a"));
    let Ok(policies) = serde_json::from_str(rules) else { return };
    let mut lines = request.lines();
    let Ok(method) = lines.next().unwrap_or_default().parse() else { return };
    let path = lines.next().unwrap_or_default();
    let principals: Vec<String> =
        lines.next().filter(|p| !p.is_empty()).map(str::to_owned).into_iter().collect();
    let mut headers = Headers::default();
    for (n, v) in lines.filter_map(|l| l.split_once(':')) {
        headers.push(n.as_bytes(), v.as_bytes());
    }
    let head = client::head(method, "a.test", path, headers, 0);
    let facts = |request| Facts {
        local: ([10, 0, 0, 1], 9080).into(),
        peer: [10, 0, 0, 2].into(),
        remote: [1, 2, 3, 4].into(),
        sni: Some("outbound_.9080_._.a"),
        principals: &principals,
        authenticated: !principals.is_empty(),
        cluster: Some("east"),
        request,
        metadata: None,
    };
    let rules = |action| Rules::new(&model::RbacRules { action, policies: Clone::clone(&policies) });
    let (Ok(allow), Ok(deny)) = (rules(RbacAction::Allow), rules(RbacAction::Deny)) else { return };
    let (with, without) = (facts(Some(&head)), facts(None));
    for f in [&with, &without] {
        for r in [&allow, &deny] {
            let linear = r.policies.iter().find(|p| p.eval(f).unwrap_or(r.action == RbacAction::Deny));
            assert_eq!(r.matched(f), linear.map(|p| p.name.as_str()));
        }
    }
    // Of a request everything is known.
    assert_eq!(allow.check(&with).is_ok(), deny.check(&with).is_err());
    // What is unknown of bytes neither allows nor escapes a denial.
    assert!(allow.check(&without).is_err() || deny.check(&without).is_err());
}

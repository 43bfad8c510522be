//! Mixer in a sidecar: requests are checked before they reach the workload and reported after.
//!
//! One cluster of processes, in which the sidecar of `reviews` asks the control plane's Mixer with the
//! workload's certificate.

mod lab;

use std::time::Duration;

use lab::{Cluster, MESH, Rows, entry, get_with, ranges, service, until};

/// Denies one user; counts requests by code; limits another user to two requests.
const RULES: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: denier
metadata: {name: "no", namespace: bookstore}
spec: {status: {code: 7, message: go away}, validDuration: 60s}
---
apiVersion: config.istio.io/v1alpha2
kind: checknothing
metadata: {name: any, namespace: bookstore}
spec: {}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {name: mallory, namespace: bookstore}
spec:
  match: request.headers["end-user"] == "mallory" && source.principal == "mesh.local/ns/bookstore/sa/storefront"
  actions: [{handler: no.denier, instances: [any.checknothing]}]
---
apiVersion: config.istio.io/v1alpha2
kind: memquota
metadata: {name: mem, namespace: bookstore}
spec: {quotas: [{name: rq.quota.bookstore, maxAmount: 100, validDuration: 60s, overrides: [{dimensions: {user: greedy}, maxAmount: 2}]}]}
---
apiVersion: config.istio.io/v1alpha2
kind: quota
metadata: {name: rq, namespace: bookstore}
spec: {dimensions: {user: 'request.headers["end-user"] | "nobody"'}}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {name: limit, namespace: bookstore}
spec: {actions: [{handler: mem.memquota, instances: [rq.quota]}]}
---
apiVersion: config.istio.io/v1alpha2
kind: metric
metadata: {name: rc, namespace: bookstore}
spec: {value: "1", dimensions: {code: response.code, service: destination.service.name, from: 'source.serviceAccount | "unknown"'}}
---
apiVersion: config.istio.io/v1alpha2
kind: prometheus
metadata: {name: p, namespace: bookstore}
spec: {metrics: [{name: seen_total, instanceName: rc.metric.bookstore, kind: COUNTER, labelNames: [code, from, service]}]}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {name: count, namespace: bookstore}
spec: {match: 'context.reporter.kind == "inbound" && context.protocol == "http"', actions: [{handler: p.prometheus, instances: [rc.metric]}]}
"#;

#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn a_sidecar_asks_mixer_and_reports_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut west = Cluster::new("west", ranges().0, dir.path());
    let (storefront, reviews) = (west.workload(1), west.workload(2));
    west.write(
        "app.yaml",
        &[
            service("reviews", "reviews", "http", 9080),
            entry("storefront", "v1", storefront),
            entry("reviews", "v1", reviews),
        ]
        .concat(),
    );
    let mixer = format!("{}:9091", west.host(1));
    let settings = |more: &str| {
        let checks = format!("spec: {{mixerCheckServer: '{mixer}', {more}");
        MESH.replace("spec: {", &checks)
    };
    west.write("mesh.yaml", &settings(""));
    west.write("mixer.yaml", RULES);
    west.control_plane();
    west.operator(&["found"]);
    west.sidecar("storefront", "v1", storefront, &[]);
    // Whom to ask is in the mesh's settings, whom to tell a flag.
    west.sidecar("reviews", "v1", reviews, &[("mixer-report", mixer.clone()), ("mixer-quota", "rq".into())]);
    let call = |user: &str| {
        let user = format!("end-user: {user}\r\n");
        let uri = "http://reviews.bookstore:9080/reviews";
        get_with((storefront, 15001).into(), uri, &user).unwrap_or_default()
    };
    until("an answer", || (call("jason").status == 200).then_some(()));

    let mut rows = Rows::default();
    let denied = until("the denial", || Some(call("mallory")).filter(|a| a.status == 403));
    let body = String::from_utf8_lossy(&denied.body).into_owned();
    rows.add("a denied user", &body, body == "PERMISSION_DENIED:no.denier.bookstore:go away");
    let status = call("jason").status;
    rows.add("another user", status.to_string(), status == 200);

    west.write("mesh.yaml", &settings("disablePolicyChecks: true, "));
    until("settings that ask nobody", || Some(call("mallory")).filter(|a| a.status == 200));
    west.write("mesh.yaml", &settings(""));
    let denied = until("the denial, anew", || Some(call("mallory")).filter(|a| a.status == 403));
    rows.add("checks turned off, and on again", denied.status.to_string(), true);

    let codes: Vec<u16> = (0..6).map(|_| call("greedy").status).collect();
    let limited =
        codes.iter().filter(|c| **c == 200).count() == 2 && codes.iter().all(|c| [200, 429].contains(c));
    rows.add("six requests with a quota of two", format!("{codes:?}"), limited);

    // Reports come in batches, and the end of one may be in the middle of a row of requests.
    let line = |code: u16, number: &str| {
        let want =
            format!(r#"istio_seen_total{{code="{code}",from="storefront",service="reviews"}} {number}"#);
        until("the report", || {
            west.debug("/mixer/metrics").lines().find(|l| l.starts_with(&want)).map(str::to_owned)
        })
    };
    rows.add("requests counted by their code", line(200, ""), true);
    rows.add("denials counted", line(403, ""), true);
    rows.add("rejections counted", line(429, "4.0"), true);

    // Without Mixer, and without a kept answer, nothing passes: that is the default.
    west.stop("control-plane");
    let closed = until("the loss of Mixer", || {
        std::thread::sleep(Duration::from_millis(100));
        Some(call("someone new")).filter(|a| a.status == 503)
    });
    let body = String::from_utf8_lossy(&closed.body).into_owned();
    rows.add("without Mixer", &body, body == "UNAVAILABLE:policy is not available");
    rows.end();
}

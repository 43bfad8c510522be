//! EnvoyFilters on our own sidecars: what they can honour takes effect, what they cannot is named, and traffic goes on.

mod lab;

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

use lab::{Cluster, MESH, Rows, entry, flotilla, get, ranges, service, strict, until};

fn filter(name: &str, selector: &str, patches: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1alpha3\nkind: EnvoyFilter\nmetadata: {{name: {name}, namespace: bookstore}}\n\
         spec:\n  workloadSelector: {{labels: {{app: {selector}}}}}\n  priority: 1\n  configPatches:\n{patches}---\n"
    )
}

/// Lua, which our sidecars have not; a time, a route and a header, which they have.
const LUA: &str = "  - applyTo: HTTP_FILTER
    match: {context: SIDECAR_OUTBOUND, listener: {filterChain: {filter: {name: envoy.filters.network.http_connection_manager,
      subFilter: {name: envoy.filters.http.router}}}}}
    patch:
      operation: INSERT_BEFORE
      value:
        name: lua
        typed_config:
          '@type': type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua
          default_source_code: {inline_string: 'function envoy_on_request(h) end'}
";
const REST: &str = "  - applyTo: CLUSTER
    match: {cluster: {service: reviews.bookstore.svc.cluster.local}}
    patch: {operation: MERGE, value: {connect_timeout: 2.5s}}
  - applyTo: HTTP_ROUTE
    match: {context: SIDECAR_OUTBOUND, routeConfiguration: {vhost: {name: 'reviews.bookstore.svc.cluster.local:9080'}}}
    patch:
      operation: INSERT_FIRST
      value: {name: teapot, match: {path: /teapot}, direct_response: {status: 418}}
  - applyTo: VIRTUAL_HOST
    match: {context: SIDECAR_OUTBOUND, routeConfiguration: {vhost: {name: 'reviews.bookstore.svc.cluster.local:9080'}}}
    patch: {operation: MERGE, value: {request_headers_to_add: [{header: {key: x-patched, value: 'yes'}}]}}
";
/// Three requests a minute.
const LIMIT: &str = "  - applyTo: HTTP_FILTER
    match: {context: SIDECAR_INBOUND, listener: {filterChain: {filter: {name: envoy.filters.network.http_connection_manager,
      subFilter: {name: envoy.filters.http.router}}}}}
    patch:
      operation: INSERT_BEFORE
      value:
        name: envoy.filters.http.local_ratelimit
        typed_config:
          '@type': type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit
          stat_prefix: limit
          token_bucket: {max_tokens: 3, tokens_per_fill: 3, fill_interval: 60s}
          filter_enabled: {runtime_key: a, default_value: {numerator: 100, denominator: HUNDRED}}
          filter_enforced: {runtime_key: b, default_value: {numerator: 100, denominator: HUNDRED}}
";

#[test]
#[ignore = "starts processes; cargo verify runs it"]
fn sidecars_honour_patches_or_say_why_not() {
    let dir = tempfile::tempdir().unwrap();
    let mut west = Cluster::new("west", ranges().0, dir.path());
    let (storefront, reviews) = (west.workload(1), west.workload(2));
    west.write(
        "app.yaml",
        &[
            service("storefront", "storefront", "http", 9080),
            service("reviews", "reviews", "http", 9080),
            entry("storefront", "v1", storefront),
            entry("reviews", "v1", reviews),
            strict(),
            MESH.to_owned(),
        ]
        .concat(),
    );
    west.control_plane();
    west.operator(&["found"]);
    west.sidecar("storefront", "v1", storefront, &[]);
    west.sidecar("reviews", "v1", reviews, &[]);

    let mut rows = Rows::default();
    let through = |proxy: Ipv4Addr, path: &str| {
        let uri = format!("http://reviews.bookstore:9080{path}");
        get(SocketAddr::from((proxy, 15001)), &uri).unwrap_or_default().status
    };
    let status = |path: &str, wanted: u16| {
        let begun = Instant::now();
        loop {
            let seen = through(storefront, path);
            if seen == wanted || begun.elapsed() > Duration::from_secs(20) {
                return seen;
            }
            sleep(Duration::from_millis(100));
        }
    };
    let plain = status("/reviews", 200);
    rows.add("without patches", plain.to_string(), plain == 200);

    west.write("patches.yaml", &filter("some", "storefront", &[LUA, REST].concat()));
    let teapot = status("/teapot", 418);
    rows.add("a route", teapot.to_string(), teapot == 418);
    let plain = status("/reviews", 200);
    rows.add("beside a filter that it has not", plain.to_string(), plain == 200);
    let dump = west.debug("/pilot/debug/config_dump?proxyID=storefront-v1.bookstore");
    let dump: serde_json::Value = serde_json::from_str(&dump).unwrap_or_default();
    let of = |list: &str, name: &str| {
        let all = dump[list].as_array().cloned().unwrap_or_default();
        all.into_iter().find(|c| c["name"] == name).unwrap_or_default()
    };
    let cluster = of("clusters", "outbound|9080||reviews.bookstore.svc.cluster.local");
    let time = &cluster["connect_timeout"];
    rows.add("a cluster's time", time.to_string(), time["secs"] == 2 && time["nanos"] == 500_000_000);
    rows.add("a header of a virtual host", "x-patched", dump["routes"].to_string().contains("x-patched"));
    let problems = west.debug("/pilot/debug/problems");
    let named = problems.contains("EnvoyFilter bookstore/some") && problems.contains("configPatches[0]");
    rows.add("what is left out", problems.trim(), named && !problems.contains("configPatches[1]"));
    let doctor = Command::new(flotilla()).args(["doctor", "--state-dir", &west.state()]).output().unwrap();
    let doctor = String::from_utf8_lossy(&doctor.stdout).into_owned();
    rows.add("doctor", "names it", doctor.contains("EnvoyFilter bookstore/some"));
    let refused = west.operator(&["proxy-status", "-o", "json"]);
    rows.add("proxy-status", "nothing refused", !refused.contains("NACKED"));

    west.write("limit.yaml", &filter("limit", "reviews", LIMIT));
    let limited = status("/reviews", 429);
    rows.add("a rate limit", limited.to_string(), limited == 429);

    west.write("patches.yaml", "");
    west.write("limit.yaml", "");
    let plain = status("/reviews", 200);
    rows.add("without them again", plain.to_string(), plain == 200);
    let teapot = through(storefront, "/teapot");
    rows.add("... the route too", teapot.to_string(), teapot != 418);
    let quiet = until("no problem", || {
        let p = west.debug("/pilot/debug/problems");
        (!p.contains("EnvoyFilter")).then_some(p)
    });
    rows.add("... and nothing is left out", quiet.trim(), true);
    rows.end();
}

//! An Envoy as a sidecar: the mesh treats it as one of its own.
//!
//! Two clusters, in which `reviews` in west has an Envoy beside it, run with what `flotilla agent`
//! wrote. `ENVOY_BIN` names an Envoy, `FLOTILLA_BIN` the binary under test (else what
//! cargo built here).

mod lab;

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    thread::sleep,
    time::{Duration, Instant},
};

use lab::{Cluster, MESH, Rows, entry, export, flags, flotilla, get, id, ranges, service, strict, until};

/// Only the storefront may call reviews.
const ONLY_STOREFRONT: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: reviews, namespace: bookstore}
spec:
  selector: {matchLabels: {app: reviews}}
  action: ALLOW
  rules: [{from: [{source: {principals: [mesh.local/ns/bookstore/sa/storefront]}}]}]
";

fn serial(admin: SocketAddr) -> Option<String> {
    let certs = get(admin, "/certs")?.json();
    let leaf = certs["certificates"].as_array()?.iter().find_map(|c| c["cert_chain"].get(0))?.clone();
    Some(leaf["serial_number"].as_str()?.to_owned())
}

#[test]
#[ignore = "needs Envoy; cargo verify installs it"]
fn envoy_is_a_member_like_any_other() {
    let envoy = PathBuf::from(std::env::var_os("ENVOY_BIN").expect("ENVOY_BIN names an Envoy binary"));
    let dir = tempfile::tempdir().unwrap();
    let (w, e) = ranges();
    let mut west = Cluster::new("west", w, dir.path());
    let mut east = Cluster::new("east", e, dir.path());
    let (storefront, reviews, ratings) = (west.workload(1), west.workload(2), west.workload(3));
    let catalog = east.workload(1);
    west.write(
        "app.yaml",
        &[
            service("storefront", "storefront", "http", 9080),
            service("reviews", "reviews", "http", 9080),
            service("reviews-h2", "reviews", "http2", 9081),
            service("ratings", "ratings", "http", 9080),
            export("reviews"),
            entry("storefront", "v1", storefront),
            entry("reviews", "v2", reviews),
            entry("ratings", "v1", ratings),
            strict(),
            MESH.to_owned(),
        ]
        .concat(),
    );
    east.write(
        "app.yaml",
        &[
            service("catalog", "catalog", "http", 9080),
            export("catalog"),
            entry("catalog", "v1", catalog),
            strict(),
            MESH.to_owned(),
        ]
        .concat(),
    );

    west.control_plane();
    west.operator(&["found"]);
    west.gateway();
    east.control_plane();
    let token = west.operator(&["token", "create"]);
    east.operator(&["join-cluster", &token]);
    east.gateway();
    west.sidecar("storefront", "v1", storefront, &[]);
    west.sidecar("ratings", "v1", ratings, &[]);
    east.sidecar("catalog", "v1", catalog, &[]);

    // The workload with the Envoy.
    let agent = {
        let sds = dir.path().join("sds.sock").display().to_string();
        let mut f = west.app("reviews", "v2", reviews);
        f.extend([
            ("sds", sds),
            ("write-bootstrap", west.dir.join("state/envoy.json").display().to_string()),
        ]);
        flags("agent", &f)
    };
    west.spawn("reviews-agent", &flotilla(), &agent);
    west.ready(reviews, 15021, "/healthz/ready", "reviews-agent");
    let bootstrap = west.dir.join("state/envoy.json").display().to_string();
    let args = [
        "-c",
        &bootstrap,
        "--use-dynamic-base-id",
        "--disable-hot-restart",
        "--drain-strategy",
        "immediate",
        "--drain-time-s",
        "5",
        "--concurrency",
        "1",
        "-l",
        "warning",
    ];
    west.spawn("envoy", &envoy, &args.map(str::to_owned));
    west.ready(reviews, 15000, "/ready", "envoy");
    let admin = SocketAddr::from((reviews, 15000));

    let mut rows = Rows::default();
    let through = |proxy: Ipv4Addr, uri: &str| get((proxy, 15001).into(), uri).unwrap_or_default();
    let good = |proxy: Ipv4Addr, uri: &str| {
        let begun = Instant::now();
        loop {
            let a = through(proxy, uri);
            if a.status == 200 || begun.elapsed() > Duration::from_secs(20) {
                return a;
            }
            sleep(Duration::from_millis(100));
        }
    };
    let (h1, h2) = ("http://reviews.bookstore:9080/reviews", "http://reviews-h2.bookstore:9081/reviews");

    let a = good(storefront, h1);
    let served = a.json();
    rows.call("Flotilla -> Envoy, HTTP/1.1", &served, a.status.into(), "west", "storefront");
    let inner = &served["calls"][0];
    let status = inner["status"].as_u64().unwrap_or(0);
    rows.call("Envoy -> Flotilla, same cluster", &inner["served"], status, "west", "reviews");

    let a = good(storefront, h2);
    rows.call("Flotilla -> Envoy, HTTP/2", &a.json(), a.status.into(), "west", "storefront");
    let stats = get(admin, "/stats?filter=inbound.*9081.*downstream_cx_http2_total").map(|a| a.body);
    let stats = String::from_utf8(stats.unwrap_or_default()).unwrap();
    let http2 = stats.lines().any(|l| l.rsplit(' ').next().is_some_and(|n| n != "0"));
    rows.add("... which was HTTP/2 on the wire", stats.trim(), http2);

    let a = good(reviews, "http://catalog.bookstore:9080/books");
    rows.call("Envoy -> other cluster", &a.json(), a.status.into(), "east", "reviews");
    let a = good(catalog, h1);
    rows.call("other cluster -> Envoy", &a.json(), a.status.into(), "west", "catalog");

    let plain = get((reviews, 9080).into(), "/reviews").map_or(0, |a| a.status);
    rows.add("plaintext to Envoy, STRICT", format!("{plain} (0: closed)"), plain == 0);

    let before = good(ratings, h1).status;
    rows.add("ratings -> Envoy, no policy", before.to_string(), before == 200);
    west.write("policy.yaml", ONLY_STOREFRONT);
    // A connection that is open when the policy comes has one more answer under the old one.
    let denied = |from| until("the policy in Envoy", || Some(through(from, h1).status).filter(|s| *s == 403));
    rows.add("ratings -> Envoy, storefront only", denied(ratings).to_string(), true);
    rows.add("other cluster -> Envoy, storefront only", denied(catalog).to_string(), true);
    let allowed = through(storefront, h1).status;
    rows.add("storefront -> Envoy, storefront only", allowed.to_string(), allowed == 200);

    let dump = get(admin, "/config_dump?include_eds").map(|a| a.json()).unwrap_or_default();
    let text = dump.to_string();
    let clean = !text.contains("error_state") && text.contains("outbound|9080||catalog.bookstore");
    rows.add("Envoy's configuration", format!("{} bytes, no error_state", text.len()), clean);
    let status = west.operator(&["proxy-status", "-o", "json"]);
    rows.add(
        "proxy-status",
        "nothing refused or stale",
        !status.contains("NACKED") && !status.contains("STALE"),
    );
    let certs = get(admin, "/certs").map(|a| a.json()).unwrap_or_default().to_string();
    rows.add("Envoy's certificate", id("reviews"), certs.contains(&id("reviews")));

    // A new certificate reaches the running Envoy; until then the old one serves.
    let old = serial(admin).expect("a certificate in /certs");
    west.stop("reviews-agent");
    let alone = through(storefront, h1).status;
    rows.add("Envoy without its agent", alone.to_string(), alone == 200);
    fs::remove_file(west.dir.join("state/reviews-v2/svid-chain.pem")).unwrap();
    west.spawn("reviews-agent", &flotilla(), &agent);
    until("a new certificate in Envoy", || serial(admin).filter(|s| *s != old));
    let rotated = good(storefront, h1);
    rows.call(
        "Flotilla -> Envoy, new certificate",
        &rotated.json(),
        rotated.status.into(),
        "west",
        "storefront",
    );
    rows.end();
}

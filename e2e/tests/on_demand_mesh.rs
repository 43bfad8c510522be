//! Names on demand from our own control plane: a sidecar and an Envoy that get nothing but what their applications call.

mod lab;

use std::{
    net::Ipv4Addr,
    path::PathBuf,
    thread::sleep,
    time::{Duration, Instant},
};

use lab::{Cluster, MESH, Rows, entry, flags, flotilla, get, ranges, service, strict, until};
use serde_json::Value;

const ALL: [&str; 3] = ["reviews", "ratings", "catalog"];

fn mesh() -> String {
    let settings = "accessLogFile: /dev/stdout, outboundTrafficPolicy: {mode: REGISTRY_ONLY}, \
                    defaultConfig: {proxyMetadata: {FLOTILLA_ON_DEMAND: 'true'}}";
    MESH.replace("accessLogFile: /dev/stdout", settings)
}

/// A service whose namespace keeps it to itself, at the address of another that everybody may call.
fn secret(ip: Ipv4Addr) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: secret, namespace: vault}}\n\
         spec: {{hosts: [secret.example], exportTo: ['.'], ports: [{{number: 80, name: http, protocol: HTTP}}], \
         resolution: STATIC, endpoints: [{{address: {ip}, ports: {{http: 19080}}}}]}}\n---\n"
    )
}

fn timeout(of: &str, seconds: u32) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: {of}, namespace: bookstore}}\n\
         spec: {{hosts: [{of}], http: [{{timeout: {seconds}s, route: [{{destination: {{host: {of}}}}}]}}]}}\n---\n"
    )
}

/// What a proxy's admin page says it has, as text: of Envoy its `config_dump`, of ours what it keeps on disk.
struct Caller {
    who: &'static str,
    ip: Ipv4Addr,
    kept: Option<PathBuf>,
}

impl Caller {
    fn call(&self, uri: &str) -> u16 {
        get((self.ip, 15001).into(), uri).map_or(0, |a| a.status)
    }

    fn knows(&self) -> String {
        match &self.kept {
            // It is written once a second at most.
            Some(file) => {
                sleep(Duration::from_millis(1500));
                String::from_utf8_lossy(&std::fs::read(file).unwrap_or_default()).into_owned()
            }
            None => get((self.ip, 15000).into(), "/config_dump?include_eds")
                .map(|a| String::from_utf8_lossy(&a.body).into_owned())
                .unwrap_or_default(),
        }
    }
}

/// The control plane's row of a proxy.
fn synced(west: &Cluster, proxy: &str) -> Value {
    let all: Value = serde_json::from_str(&west.debug("/pilot/debug/syncz")).unwrap_or_default();
    let list = all.as_array().cloned().unwrap_or_default();
    // The agent beside an Envoy is a client of its own.
    list.into_iter().find(|c| c["proxy"] == proxy && !c["types"]["CDS"].is_null()).unwrap_or_default()
}

fn asked(row: &Value, t: &str) -> u64 {
    row["types"][t]["subscribed"].as_u64().unwrap_or(u64::MAX)
}

#[test]
#[ignore = "needs Envoy; cargo verify installs it"]
fn a_proxy_gets_what_it_asks_for_and_no_more() {
    let envoy = PathBuf::from(std::env::var_os("ENVOY_BIN").expect("ENVOY_BIN names an Envoy binary"));
    let dir = tempfile::tempdir().unwrap();
    let mut west = Cluster::new("west", ranges().0, dir.path());
    let (storefront, shop) = (west.workload(1), west.workload(2));
    let backends = [west.workload(3), west.workload(4), west.workload(5)];
    let mut app =
        vec![service("storefront", "storefront", "http", 9080), service("shop", "shop", "http", 9080)];
    app.extend([
        entry("storefront", "v1", storefront),
        entry("shop", "v1", shop),
        strict(),
        secret(backends[0]),
    ]);
    for (name, ip) in ALL.iter().zip(backends) {
        app.extend([service(name, name, "http", 9080), entry(name, "v1", ip), timeout(name, 10)]);
    }
    west.write("app.yaml", &app.concat());
    west.write("mesh.yaml", &mesh());
    west.control_plane();
    west.operator(&["found"]);
    for (name, ip) in ALL.iter().zip(backends) {
        west.sidecar(name, "v1", ip, &[]);
    }
    west.sidecar("storefront", "v1", storefront, &[]);
    // The workload with the Envoy.
    let agent = {
        // The bookstore has no role of that name; what it calls is said here.
        let mut f = west.app("storefront", "v1", shop);
        f.retain(|(k, _)| !["workload", "service-account", "token-file", "state-dir", "labels"].contains(k));
        let of = west.member("shop-v1", "bookstore", "shop", shop);
        f.extend(
            of.into_iter()
                .filter(|(k, _)| ["workload", "service-account", "token-file", "state-dir"].contains(k)),
        );
        f.extend([
            ("labels", "app=shop,version=v1".to_owned()),
            ("sds", dir.path().join("sds.sock").display().to_string()),
            ("write-bootstrap", west.dir.join("state/envoy.json").display().to_string()),
        ]);
        flags("agent", &f)
    };
    west.spawn("shop-agent", &flotilla(), &agent);
    west.ready(shop, 15021, "/healthz/ready", "shop-agent");
    let bootstrap = west.dir.join("state/envoy.json").display().to_string();
    let args = [
        "-c",
        &bootstrap,
        "--use-dynamic-base-id",
        "--disable-hot-restart",
        "--concurrency",
        "1",
        "-l",
        "warning",
    ];
    west.spawn("envoy", &envoy, &args.map(str::to_owned));
    west.ready(shop, 15000, "/ready", "envoy");

    let callers = [
        Caller { who: "Envoy", ip: shop, kept: None },
        Caller { who: "ours", ip: storefront, kept: Some(west.dir.join("state/storefront-v1/xds.cache")) },
    ];
    let proxies = ["shop-v1.bookstore", "storefront-v1.bookstore"];
    let mut rows = Rows::default();
    let (reviews, catalog) = ("http://reviews.bookstore:9080/reviews", "http://catalog.bookstore:9080/books");
    let served = |status: u16| status == 200;
    let eventually = |c: &Caller, uri: &str, wanted: &dyn Fn(u16) -> bool| {
        let begun = Instant::now();
        loop {
            let seen = c.call(uri);
            if wanted(seen) || begun.elapsed() > Duration::from_secs(20) {
                return seen;
            }
            sleep(Duration::from_millis(100));
        }
    };
    for (c, proxy) in callers.iter().zip(proxies) {
        let who = c.who;
        let row = until("the proxy", || Some(synced(&west, proxy)).filter(|r| r["on_demand"] == true));
        let before = c.knows();
        let none = !ALL.iter().any(|n| before.contains(&format!("outbound|9080||{n}")));
        rows.add(
            &format!("{who}: nothing before anybody calls"),
            format!("{} hosts", asked(&row, "VHDS")),
            none,
        );
        let first = c.call(reviews);
        rows.add(&format!("{who}: the first request waits and is served"), first.to_string(), served(first));
        let row = synced(&west, proxy);
        let names = (asked(&row, "VHDS"), asked(&row, "CDS"));
        rows.add(&format!("{who}: names after it"), format!("{names:?}"), names == (1, 1));
        let second = c.call(reviews);
        let row = synced(&west, proxy);
        let same = (asked(&row, "VHDS"), asked(&row, "CDS")) == names;
        rows.add(&format!("{who}: the second does not ask"), second.to_string(), served(second) && same);
        // The same service under another of its names is there already.
        let short = c.call("http://reviews:9080/reviews");
        let same = asked(&synced(&west, proxy), "VHDS") == names.0;
        rows.add(&format!("{who}: nor does another name of it"), short.to_string(), served(short) && same);
        let nobody = c.call("http://nobody.example/x");
        rows.add(&format!("{who}: who is not there, REGISTRY_ONLY"), nobody.to_string(), nobody == 502);
        let hidden = c.call("http://secret.example/x");
        let told = c.knows();
        let kept_in = !told.contains("||secret.example") && hidden == 502;
        rows.add(&format!("{who}: who is out of scope is not given"), hidden.to_string(), kept_in);
        let others = told.contains("outbound|9080||ratings") || told.contains("outbound|9080||catalog");
        rows.add(&format!("{who}: no other service"), format!("{} bytes", told.len()), !others);
    }

    // A change of what was asked for arrives; another's is not sent.
    let version = |proxy: &str, t: &str| synced(&west, proxy)["types"][t]["sent"].clone();
    let was: Vec<Value> = proxies.iter().map(|p| version(p, "VHDS")).collect();
    west.write("app.yaml", &app.concat().replace(&timeout("ratings", 10), &timeout("ratings", 11)));
    sleep(Duration::from_secs(2));
    let still: Vec<Value> = proxies.iter().map(|p| version(p, "VHDS")).collect();
    rows.add("another's change is not sent", format!("{still:?}"), still == was);
    west.write("app.yaml", &app.concat().replace(&timeout("reviews", 10), &timeout("reviews", 7)));
    for ((c, proxy), was) in callers.iter().zip(proxies).zip(&was) {
        let begun = Instant::now();
        while version(proxy, "VHDS") == *was && begun.elapsed() < Duration::from_secs(20) {
            sleep(Duration::from_millis(100));
        }
        let now = version(proxy, "VHDS");
        let what = format!("{}: a change of what was asked for arrives", c.who);
        let seven = c.kept.is_some() || c.knows().contains("\"7s\"");
        rows.add(&what, format!("{was} {now}"), now != *was && seven);
    }

    // The control plane goes and comes back: who is known stays known, who is new is asked for.
    west.stop("control-plane");
    for c in &callers {
        let kept = c.call(reviews);
        rows.add(&format!("{}: without a control plane", c.who), kept.to_string(), served(kept));
    }
    west.control_plane();
    for (c, proxy) in callers.iter().zip(proxies) {
        let row =
            until("the proxy comes back", || Some(synced(&west, proxy)).filter(|r| asked(r, "CDS") < 100));
        let names = (asked(&row, "VHDS"), asked(&row, "CDS"));
        rows.add(&format!("{}: names after a restart", c.who), format!("{names:?}"), names.1 >= 1);
        let after = eventually(c, catalog, &served);
        rows.add(&format!("{}: a new name after a restart", c.who), after.to_string(), served(after));
    }
    let status = west.operator(&["proxy-status"]);
    rows.add("proxy-status", "on demand", status.contains("shop-v1.bookstore is on demand: it asked for "));
    let status = west.operator(&["proxy-status", "-o", "json"]);
    rows.add("nothing refused", "", !status.contains("NACKED"));
    let summary = west.operator(&["proxy-config", "shop-v1.bookstore"]);
    let tells = summary.contains("on demand: ") && summary.contains("outbound|9080||ratings.bookstore");
    rows.add("proxy-config", "what may be asked for", tells);
    let problems = west.debug("/pilot/debug/problems");
    rows.add("problems", problems.trim(), problems.trim() == "[]");
    rows.end();
}

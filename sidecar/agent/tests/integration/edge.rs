//! What stands in the headers of a request about its client, behind proxies that are trusted and others: as Envoy has it.

use std::collections::BTreeMap;

use mesh_model::proxy::*;

use crate::side_by_side::{Pair, cluster, manager, route, send_from, server, to_up};

/// What is looked at, of all that reaches the server.
const SEEN: [&str; 6] = [
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-forwarded-client-cert",
    "x-envoy-external-address",
    "x-envoy-internal",
    "x-client",
];

async fn pair(change: impl Fn(&mut HttpConnectionManager)) -> Pair {
    let up = server(|r| {
        // Envoy makes one line of several.
        let mut all = BTreeMap::<String, Vec<String>>::new();
        for (n, v) in r.lines().filter_map(|l| l.split_once(':')) {
            let n = n.to_ascii_lowercase();
            if SEEN.contains(&n.as_str()) {
                all.entry(n).or_default().push(v.trim().replace(", ", ","));
            }
        }
        let all: Vec<_> = all.iter().map(|(n, v)| format!("{n}={}", v.join(","))).collect();
        (200, String::new(), all.join("; "))
    })
    .await;
    let mut r = route(to_up(), RouteFilters::default());
    r.request_headers = HeaderOps {
        set: vec![("x-client".into(), "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%".into())],
        ..HeaderOps::default()
    }
    .into();
    let mut m = manager(vec![], vec![r]);
    change(&mut m);
    Pair::new(m, vec![cluster("up", up, UpstreamHttp::Http1)]).await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn clients_behind_proxies() {
    let forwarded = [
        "",
        "x-forwarded-for: 8.8.1.1\r\n",
        "x-forwarded-for: 8.8.1.1, 8.8.2.2\r\n",
        "x-forwarded-for: 8.8.1.1\r\nx-forwarded-for: 8.8.2.2,8.8.3.3\r\n",
        "x-forwarded-for: 10.1.1.1,10.2.2.2\r\n",
        "x-forwarded-for: 2001:db8::1, 8.8.2.2\r\n",
        "x-forwarded-for: unknown, 8.8.2.2\r\n",
        "x-forwarded-for: 8.8.1.1, unknown\r\n",
        "x-forwarded-for: ,,\r\n",
    ];
    let schemes = [
        "",
        "x-forwarded-proto: https\r\n",
        "x-forwarded-proto: HTTPS\r\nx-envoy-external-address: 9.9.9.9\r\n",
    ];
    let mut different = Vec::new();
    for hops in [0, 1, 2] {
        for edge in [true, false] {
            let p = pair(|m| (m.use_remote_address, m.trusted_hops) = (edge, hops)).await;
            for f in forwarded {
                for s in schemes {
                    let request = format!("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{f}{s}\r\n");
                    // Envoy gives way to an address of its host where it sees loopback's first.
                    let ask = async |to| send_from("127.0.0.2", to, &request).await;
                    let (ours, theirs) = (ask(p.engine).await, ask(p.envoy).await);
                    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
                    if (ours.status, &ours.body) != (theirs.status, &theirs.body) {
                        different.push(format!(
                            "hops {hops}, edge {edge}, {f:?} {s:?}:\n  ours {} {}\n  Envoy {} {}",
                            ours.status,
                            text(&ours.body),
                            theirs.status,
                            text(&theirs.body)
                        ));
                    }
                }
            }
        }
    }
    assert!(different.is_empty(), "{} differ:\n{}", different.len(), different.join("\n"));
}

/// Who shows no certificate has none to be told of.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn certificates_that_a_client_says_it_has() {
    use ForwardClientCert::*;
    for mode in [Sanitize, ForwardOnly, AppendForward, SanitizeSet, AlwaysForwardOnly] {
        let p = pair(|m| m.forward_client_cert = mode).await;
        for said in ["", "x-forwarded-client-cert: By=a;URI=spiffe://b/c\r\n"] {
            let request = format!("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{said}\r\n");
            let a = p.alike(&request, &[]).await;
            let told = String::from_utf8_lossy(&a.body).contains("client-cert=By=a");
            assert_eq!(told, mode == AlwaysForwardOnly && !said.is_empty(), "{mode:?}");
        }
    }
}

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use super::*;
use crate::{
    config::Reader,
    generate::{self, tests::Docs, tests::settings},
    proxy::ProxyNode,
    world::World,
};

/// An issuer that answers with what `body` makes of its own URL.
async fn issuer(status: &'static str, body: fn(&str) -> String) -> (String, Arc<AtomicUsize>) {
    let l = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/realm", l.local_addr().unwrap());
    let (own, asked) = (url.clone(), Arc::new(AtomicUsize::new(0)));
    let count = asked.clone();
    tokio::spawn(async move {
        while let Ok((mut s, _)) = l.accept().await {
            let mut head = vec![0; 4096];
            let n = s.read(&mut head).await.unwrap_or(0);
            let head = String::from_utf8_lossy(&head[..n]).into_owned();
            count.fetch_add(1, Relaxed);
            let found = head.starts_with("GET /realm/.well-known/openid-configuration HTTP/1.1\r\n");
            let (status, body) = if found { (status, body(&own)) } else { ("404 x", String::new()) };
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            let _ = s.write_all(answer.as_bytes()).await;
        }
    });
    (url, asked)
}

fn good(own: &str) -> String {
    json!({"issuer": own, "jwks_uri": "https://keys.example/set", "token_endpoint": "x"}).to_string()
}

fn config(issuer: &str) -> Config {
    let docs = Docs::default()
        .add("RequestAuthentication", "books/users", json!({"jwtRules": [{"issuer": issuer}, {"issuer": "a-name"}, {"issuer": "https://other", "jwks": "{}"}]}));
    let (galley, federation) = docs.states();
    Reader::default().read(&galley, &federation)
}

#[tokio::test]
async fn keys_are_found_kept_and_used() {
    let dir = tempfile::tempdir().unwrap();
    let (url, asked) = issuer("200 OK", good).await;
    let issuers = Issuers::new(Some(dir.path().to_owned()), "/none".into());
    let mut seen = issuers.watch();
    assert_eq!(issuers.of(&config(&url)), Discovered::new());
    // Without keys no token is valid, and nobody is asked for any.
    let keys = |config: Config| {
        let world = World::new(settings(), config);
        let g = generate::generate(&ProxyNode::new(&generate::tests::productpage()).unwrap(), &world);
        g.clusters.contains_key("jwks|443||keys.example")
    };
    assert!(!keys(config(&url)));
    seen.wait_for(|k| !k.is_empty()).await.unwrap();
    let found = issuers.of(&config(&url));
    assert_eq!(found, Discovered::from([(url.clone(), "https://keys.example/set".to_owned())]));
    let mut with = config(&url);
    with.discovered = found.clone();
    assert!(keys(with));
    assert_eq!(asked.load(Relaxed), 1, "once for all who want it");
    // Who is named no more is asked no more, and nothing of him is told.
    assert_eq!(issuers.of(&Config::default()), Discovered::new());
    let file = dir.path().join(FILE);
    for _ in 0..200 {
        if file.exists() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let again = Issuers::new(Some(dir.path().to_owned()), "/none".into());
    assert_eq!(again.of(&config(&url)), found);
}

#[tokio::test]
async fn what_is_no_answer_is_none() {
    type Body = fn(&str) -> String;
    let bad: [(&str, Body, &str); 6] = [
        ("500 x", good, "500"),
        ("302 x", good, "302"),
        ("200 OK", |_| "{".to_owned(), "the answer"),
        (
            "200 OK",
            |_| json!({"issuer": "http://somebody", "jwks_uri": "https://k/"}).to_string(),
            "another issuer",
        ),
        ("200 OK", |own| json!({"issuer": own, "jwks_uri": "file:///etc/passwd"}).to_string(), "jwks_uri"),
        (
            "200 OK",
            |own| json!({"issuer": own, "x": " ".repeat(MAX_ANSWER), "jwks_uri": "https://k/"}).to_string(),
            "at most",
        ),
    ];
    for (status, body, why) in bad {
        let (url, _) = issuer(status, body).await;
        let error = ask(&url, "/none".as_ref()).await.unwrap_err();
        assert!(error.contains(why), "{why}: {error}");
    }
    // Over TLS only to whom the roots vouch for, and there are none.
    let (url, _) = issuer("200 OK", good).await;
    let error = ask(&url.replace("http:", "https:"), "/none".as_ref()).await.unwrap_err();
    assert!(error.contains("/none"), "{error}");
}

#[test]
fn those_who_are_too_many_are_named() {
    let of = |n: usize| {
        let rules: Vec<_> = (0..n).map(|i| json!({"issuer": format!("https://i{i:04}.example")})).collect();
        let docs = Docs::default().add("RequestAuthentication", "books/a", json!({"jwtRules": rules}));
        let (galley, federation) = docs.states();
        problem(&Reader::default().read(&galley, &federation)).map(|p| p.message)
    };
    assert_eq!(of(MAX_ISSUERS), None);
    let said = of(MAX_ISSUERS + 1).unwrap();
    assert!(said.contains("no token of https://i0256.example"), "{said}");
}

#[test]
fn who_is_asked() {
    let of = |v: Value| {
        let docs = Docs::default().add("RequestAuthentication", "books/a", json!({"jwtRules": [v]}));
        let (galley, federation) = docs.states();
        let config = Reader::default().read(&galley, &federation);
        named(&config).into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(of(json!({"issuer": "https://i.example"})), ["https://i.example"]);
    assert!(of(json!({"issuer": "https://i.example", "jwksUri": "https://k/"})).is_empty());
    assert!(of(json!({"issuer": "https://i.example", "jwks": "{}"})).is_empty());
    assert!(of(json!({"issuer": "somebody@example.com"})).is_empty());
}

//! Following an agent over a socket: what is sent, and what becomes of odd answers.

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use super::*;

/// An agent that answers each connection's requests with what `answer` makes of them: the raw response.
async fn agent(answer: impl Fn(&str) -> String + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let answer = Arc::new(answer);
    tokio::spawn(async move {
        while let Ok((mut s, _)) = listener.accept().await {
            let answer = answer.clone();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while s.read_buf(&mut head).await.is_ok_and(|n| n > 0) {
                    if head.ends_with(b"\r\n\r\n") {
                        let response = answer(&String::from_utf8_lossy(&head));
                        if response.is_empty() {
                            // As an agent does while nothing changes.
                            std::future::pending::<()>().await;
                        }
                        s.write_all(response.as_bytes()).await.unwrap();
                        head.clear();
                    }
                }
            });
        }
    });
    url
}

fn ok(index: u64, body: &[u8]) -> String {
    let body = String::from_utf8_lossy(body);
    format!("HTTP/1.1 200 OK\r\nx-consul-index: {index}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

fn options(url: &str, keep: Option<PathBuf>) -> ConsulOptions {
    let agent = AgentOptions {
        url: url.to_owned(),
        token_file: None,
        datacenter: None,
        ca_file: None,
        identity: None,
    };
    ConsulOptions { agents: vec![agent], naming: naming(), watches: 4, keep }
}

#[tokio::test]
async fn questions_carry_token_datacenter_index_and_wait() {
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "secret\n").unwrap();
    let (tx, mut heads) = tokio::sync::mpsc::channel(64);
    let url = agent(move |head| {
        let _ = tx.try_send(head.to_owned());
        match () {
            () if head.contains("index=") => String::new(),
            () if head.contains("/v1/catalog/services") => {
                ok(18, SERVICES).replacen("\r\n", "\r\nX-Consul-Results-Filtered-By-ACLs: true\r\n", 1)
            }
            () if head.contains("/service/web") => ok(15, WEB),
            () => ok(18, API),
        }
    })
    .await;
    let mut o = options(&url, None);
    o.agents[0].token_file = Some(token);
    o.agents[0].datacenter = Some("dc 1".to_owned());
    let consul = Consul::start(o).unwrap();
    assert!(consul.first().await);
    assert_eq!(consul.watch().borrow().all().count(), 2);
    let mut seen = Vec::new();
    while seen.len() < 6 {
        let head = heads.recv().await.unwrap();
        assert!(head.contains("x-consul-token: secret\r\n"), "{head}");
        seen.push(head.lines().next().unwrap().to_owned());
    }
    seen[1..3].sort();
    assert_eq!(
        seen[..3],
        [
            "GET /v1/catalog/services?dc=dc%201 HTTP/1.1",
            "GET /v1/health/service/api?dc=dc%201 HTTP/1.1",
            "GET /v1/health/service/web?dc=dc%201 HTTP/1.1",
        ]
    );
    assert!(
        seen[3..].contains(&"GET /v1/health/service/web?dc=dc%201&index=15&wait=45000ms HTTP/1.1".to_owned()),
        "{seen:?}"
    );
    let status = consul.status();
    assert!(status[0].filtered);
    assert!(
        status[0].up && status[0].services == 2 && status[0].instances == 3 && status[0].waiting == 2,
        "{status:?}"
    );
}

#[tokio::test]
async fn odd_answers_are_failures_that_take_nothing_away() {
    let big = format!("HTTP/1.1 200 OK\r\ncontent-length: 999999999\r\n\r\n{}", "x".repeat(33 << 20));
    for (response, says) in [
        ("HTTP/1.1 403 Forbidden\r\ncontent-length: 13\r\n\r\nACL not found".to_owned(), "ACL not found"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]".to_owned(), "not what Consul's interface"),
        ("SSH-2.0-OpenSSH\r\n\r\n".to_owned(), "broke"),
        (big, "more than 32 MiB"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let url = agent(move |_| response.clone()).await;
        let kept = BTreeMap::from([("web", answer::instances(WEB).unwrap().0)]);
        std::fs::write(dir.path().join(file_name(&url)), serde_json::to_vec(&kept).unwrap()).unwrap();
        let consul = Consul::start(options(&url, Some(dir.path().to_owned()))).unwrap();
        while consul.status()[0].failures == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(consul.watch().borrow().hosts(), BTreeSet::from(["web.service.consul".to_owned()]));
        let status = consul.status().remove(0);
        assert!(!status.up && !consul.watch().borrow().is_synced(), "{status:?}");
        assert!(status.error.as_deref().is_some_and(|e| e.contains(says)), "{says}: {status:?}");
    }
}

#[tokio::test]
async fn a_file_that_cannot_be_read_is_as_good_as_none() {
    let dir = tempfile::tempdir().unwrap();
    let url = agent(|head| if head.contains("index=") { String::new() } else { ok(1, b"{}") }).await;
    std::fs::write(dir.path().join(file_name(&url)), b"{").unwrap();
    let consul = Consul::start(options(&url, Some(dir.path().to_owned()))).unwrap();
    assert!(consul.first().await);
    assert_eq!(consul.watch().borrow().all().count(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_start_waits_three_seconds_for_an_agent_that_is_not_there() {
    // Bound and never accepted from: a connection that nobody answers.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let consul = Consul::start(options(&format!("http://{}", listener.local_addr().unwrap()), None)).unwrap();
    let begun = tokio::time::Instant::now();
    assert!(!consul.first().await);
    assert_eq!(begun.elapsed().as_secs(), 3);
    assert!(!consul.first().await, "and no longer the second time");
    assert_eq!(begun.elapsed().as_secs(), 3);
}

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering::Relaxed},
    },
};

use mesh_model::authored::ReadinessProbe;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use super::*;

fn read(v: Value) -> ReadinessProbe {
    serde_json::from_value(v).unwrap()
}

/// Answers every request with a status that may change; 0 hangs up. Keeps the last head.
async fn server(status: Arc<AtomicU16>, head: Arc<std::sync::Mutex<String>>) -> SocketAddr {
    let l = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = l.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut s, _)) = l.accept().await {
            let mut buf = vec![0; 4096];
            let n = s.read(&mut buf).await.unwrap_or(0);
            *head.lock().unwrap() = String::from_utf8_lossy(&buf[..n]).into_owned();
            let code = status.load(Relaxed);
            if code > 0 {
                let _ =
                    s.write_all(format!("HTTP/1.1 {code} x\r\ncontent-length: 0\r\n\r\n").as_bytes()).await;
            }
        }
    });
    at
}

#[tokio::test]
async fn a_request_is_what_the_probe_says() {
    let (status, head) = (Arc::new(AtomicU16::new(204)), Arc::default());
    let at = server(status.clone(), Arc::clone(&head)).await;
    let p = read(json!({"httpGet": {"path": "ready?x=1", "port": at.port(), "host": "127.0.0.1",
        "httpHeaders": [{"name": "x-probe", "value": "a b"}]}}));
    probe::once(&p).await.unwrap();
    let text = head.lock().unwrap().to_ascii_lowercase();
    assert!(text.starts_with("get /ready?x=1 http/1.1\r\n"), "{text}");
    assert!(text.contains("x-probe: a b\r\n") && text.contains(&format!("host: {at}\r\n")), "{text}");
    for (code, good) in [(200, true), (399, true), (400, false), (503, false), (0, false)] {
        status.store(code, Relaxed);
        assert_eq!(probe::once(&p).await.is_ok(), good, "{code}");
    }
    // A name of the application's own takes the place of the address.
    let named = read(
        json!({"httpGet": {"port": at.port(), "httpHeaders": [{"name": "Host", "value": "app.example"}]}}),
    );
    let _ = probe::once(&named).await;
    let text = head.lock().unwrap().to_ascii_lowercase();
    assert!(text.contains("host: app.example\r\n") && text.matches("host:").count() == 1, "{text}");
    let tls = read(json!({"httpGet": {"port": at.port(), "scheme": "HTTPS"}}));
    assert!(probe::once(&tls).await.unwrap_err().starts_with("TLS"), "it speaks in clear");
}

#[tokio::test]
async fn https_needs_no_certificate_that_anybody_knows() {
    let made = rcgen::generate_simple_self_signed(vec!["whoever".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let l = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = l.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (s, _) = l.accept().await.unwrap();
        let mut s = tokio_rustls::TlsAcceptor::from(Arc::new(config)).accept(s).await.unwrap();
        let _ = s.read(&mut [0; 4096]).await;
        s.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        let _ = s.shutdown().await;
    });
    probe::once(&read(json!({"httpGet": {"port": port, "scheme": "HTTPS"}}))).await.unwrap();
}

#[tokio::test]
async fn connections_commands_and_the_health_protocol() {
    let l = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = l.local_addr().unwrap().port();
    let tcp = read(json!({"tcpSocket": {"port": port}}));
    probe::once(&tcp).await.unwrap();
    drop(l);
    assert!(probe::once(&tcp).await.is_err());
    probe::once(&read(json!({"exec": {"command": ["sh", "-c", "exit 0"]}}))).await.unwrap();
    let failed = probe::once(&read(json!({"exec": {"command": ["sh", "-c", "exit 3"]}}))).await.unwrap_err();
    assert!(failed.contains('3'), "{failed}");
    assert!(probe::once(&read(json!({"exec": {"command": ["/no/such/program"]}}))).await.is_err());

    let (reporter, service) = tonic_health::server::health_reporter();
    reporter.set_service_status("shop", tonic_health::ServingStatus::NotServing).await;
    let incoming = tonic::transport::server::TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let port = incoming.local_addr().unwrap().port();
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    probe::once(&read(json!({"grpc": {"port": port}}))).await.unwrap();
    let shop = read(json!({"grpc": {"port": port, "service": "shop"}}));
    assert!(probe::once(&shop).await.unwrap_err().contains("not SERVING"));
    reporter.set_service_status("shop", tonic_health::ServingStatus::Serving).await;
    probe::once(&shop).await.unwrap();
    assert!(probe::once(&read(json!({"grpc": {"port": port, "service": "none"}}))).await.is_err());
}

/// What happens, second by second, while the clock stands still between them.
#[tokio::test(start_paused = true)]
async fn thresholds_periods_and_delays() {
    let (status, head) = (Arc::new(AtomicU16::new(200)), Arc::default());
    let at = server(status.clone(), head).await;
    let (health, mut seen) = watch::channel(Health { state: State::Unhealthy, reason: "new".into() });
    let p = read(json!({"httpGet": {"port": at.port()}, "initialDelaySeconds": 30, "periodSeconds": 5,
        "successThreshold": 2, "failureThreshold": 3}));
    let begun = tokio::time::Instant::now();
    let task = tokio::spawn(watch_health(p, health));
    let mut next = async |state| {
        seen.wait_for(|h| h.state == state).await.unwrap();
        begun.elapsed().as_secs()
    };
    assert_eq!(next(State::Healthy).await, 35, "the second success");
    status.store(500, Relaxed);
    assert_eq!(next(State::Unhealthy).await, 50, "the third failure");
    assert!(seen.borrow().reason.contains("500"));
    status.store(200, Relaxed);
    let mut next = async |state| {
        seen.wait_for(|h| h.state == state).await.unwrap();
        begun.elapsed().as_secs()
    };
    assert_eq!(next(State::Healthy).await, 60);
    task.abort();
}

#[tokio::test(start_paused = true)]
async fn who_does_not_answer_in_time_fails() {
    let l = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = l.local_addr().unwrap().port();
    let (health, mut seen) = watch::channel(Health { state: State::Healthy, reason: String::new() });
    let p = read(
        json!({"httpGet": {"port": port}, "periodSeconds": 1, "timeoutSeconds": 4, "failureThreshold": 1}),
    );
    let begun = tokio::time::Instant::now();
    let task = tokio::spawn(watch_health(p, health));
    seen.wait_for(|h| h.state == State::Unhealthy).await.unwrap();
    assert_eq!((begun.elapsed().as_secs(), seen.borrow().reason.as_str()), (4, "no answer within 4 s"));
    task.abort();
}

#[tokio::test]
async fn commands_are_run_where_that_was_asked_for() {
    let state = |commands| {
        let (health, seen) = watch::channel(Health { state: State::Unhealthy, reason: String::new() });
        let mut p = Probing { health, text: None, task: None };
        p.follow(r#"{"exec": {"command": ["true"]}, "periodSeconds": 1}"#, commands);
        (p, seen)
    };
    let (refused, seen) = state(Commands::Refused);
    assert!(refused.task.is_none() && seen.borrow().reason.contains("--exec-probes"));
    let (_run, mut seen) = state(Commands::Run);
    seen.wait_for(|h| h.state == State::Healthy).await.unwrap();
    // A group without a probe, and one that nobody can read.
    let (mut p, seen) = state(Commands::Refused);
    p.follow("", Commands::Refused);
    assert_eq!(seen.borrow().state, State::Healthy);
    p.follow("{", Commands::Refused);
    assert!(seen.borrow().state == State::Unhealthy && seen.borrow().reason.contains("cannot be read"));
}

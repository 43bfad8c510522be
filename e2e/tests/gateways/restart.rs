//! A gateway of the mesh is replaced while clients go on.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::{
    gateway, resolve,
    support::{Cluster, HttpServer, SYSTEM, curl, service, until_status},
    virtual_service,
};

#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn a_gateway_is_replaced_without_a_failed_request() {
    let mut west = Cluster::founded();
    let app = HttpServer::start((west.workload(1), 9080).into(), "shop");
    west.write("shop.yaml", &service("shop", west.workload(1), app.address.port(), ""));
    let servers = "  - port: {number: 8080, name: http, protocol: HTTP}\n    hosts: [shop.example]\n";
    let route = format!(
        "  hosts: [shop.example]\n  gateways: [{SYSTEM}/edge]\n  http:\n  \
         - route:\n    - destination: {{host: shop, port: {{number: 9080}}}}\n"
    );
    west.write("edge.yaml", &[gateway("edge", "ingress", servers), virtual_service("shop", &route)].concat());
    let ip = west.host(2);
    let base_id = format!("--base-id={}", 3_000_000 + std::process::id());
    // A trunk cannot be handed over, and is refused with it.
    let o = west.flotilla(&[
        "gateway",
        "--cluster=west",
        "--ip=127.0.0.1",
        "--workload=x",
        "--trunk=127.0.0.1:0",
        &base_id,
    ]);
    assert!(o.code == 2 && o.err.contains("--trunk does not go with --base-id"), "{o:?}");
    west.gateway("ingress", ip, &[&base_id]);
    let at = SocketAddr::from((ip, 8080));
    let shop = resolve("shop.example", at);
    until_status("the shop", 200, &["--resolve", &shop, "http://shop.example:8080/"]);

    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..3)
        .map(|_| {
            let stop = stop.clone();
            std::thread::spawn(move || {
                let mut n = 0;
                while !stop.load(Ordering::SeqCst) {
                    let status = get(at);
                    assert!(status.as_ref().is_ok_and(|s| s.starts_with("HTTP/1.1 200")), "{status:?}");
                    n += 1;
                }
                n
            })
        })
        .collect();
    for _ in 0..2 {
        west.replace_gateway("ingress", ip, &[&base_id, "--drain-time-s=20"]);
        std::thread::sleep(Duration::from_millis(300));
    }
    stop.store(true, Ordering::SeqCst);
    let n: usize = clients.into_iter().map(|c| c.join().unwrap()).sum();
    println!("{n} requests while a gateway was replaced twice, none failed");
    assert!(n > 10, "{n}");
    let ready = curl(&[&format!("http://{ip}:15021/healthz/ready")]);
    assert_eq!(ready.status, 200, "{ready:?}");
}

/// The status line of an answer on a connection of its own.
fn get(at: SocketAddr) -> std::io::Result<String> {
    let mut s = TcpStream::connect(at)?;
    s.set_read_timeout(Some(Duration::from_secs(20)))?;
    s.write_all(b"GET / HTTP/1.1\r\nhost: shop.example\r\nconnection: close\r\n\r\n")?;
    let mut line = String::new();
    BufReader::new(s).read_line(&mut line)?;
    Ok(line)
}

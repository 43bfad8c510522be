//! Servers at Unix sockets, which both proxies connect to.

use std::{
    os::unix::fs::MetadataExt as _,
    process::{Child, Command, Stdio},
    time::Duration,
};

use mesh_model::proxy::*;

use crate::side_by_side::{Pair, cluster, manager, route, to_up};

/// Answers what it is asked for with where it listens; `@` stands for the zero before an abstract name. Where it may, it
/// becomes another user before it listens, which is whose the socket is then.
const SERVER: &str = r#"
import os, socketserver, sys
at = sys.argv[1]
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        while self.rfile.readline().strip():
            pass
        self.wfile.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(at), at.encode()))
s = socketserver.ThreadingUnixStreamServer("\0" + at[1:] if at[0] == "@" else at, Handler, False)
s.server_bind()
if os.geteuid() == 0:
    os.setuid(65534)
s.server_activate()
s.serve_forever()
"#;

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn server(at: &str) -> Server {
    Server(Command::new("python3").args(["-c", SERVER, at]).stdin(Stdio::null()).spawn().unwrap())
}

fn at(path: &str) -> Cluster {
    let mut c = cluster("up", ([127, 0, 0, 1], 1).into(), UpstreamHttp::Http1);
    let Discovery::Static(a) = &mut c.discovery else { panic!() };
    let e = &mut a.localities[0].endpoints[0];
    (e.address, e.port) = (format!("unix://{path}"), 0);
    c
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn a_path_or_an_abstract_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s").display().to_string();
    let name = format!("@flotilla-{}", std::process::id());
    for to in [path.as_str(), &name] {
        let p = Pair::new(manager(vec![], vec![route(to_up(), RouteFilters::default())]), vec![at(to)]).await;
        let get = "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        assert_eq!(p.ask(get).await.0.status, 503, "nobody is there");
        assert_eq!(p.ask(get).await.1.status, 503, "nobody is there for Envoy");
        let _server = server(to);
        let end = tokio::time::Instant::now() + Duration::from_secs(20);
        while p.ask(get).await.1.status != 200 {
            assert!(tokio::time::Instant::now() < end, "{to}: no server");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let (ours, theirs) = p.ask(get).await;
        assert_eq!((theirs.status, String::from_utf8(theirs.body).unwrap().as_str()), (200, to));
        // Ours leaves what its own user serves alone, which everything here is unless root started it.
        let root = std::fs::metadata("/proc/self").unwrap().uid() == 0;
        assert_eq!(ours.status, if root { 200 } else { 503 });
        assert!(!root || ours.body == to.as_bytes(), "{ours:?}");
    }
}

//! The servers, in one pod.

use std::{
    fmt::Write as _,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use anyhow::{Context, ensure};
use flotilla_e2e::{
    netns::{NAMESPACE, World, exec, until},
    programs::{self, Process},
};

use super::SERVICES;

/// Running servers; dropping them kills them.
pub(crate) struct Servers(Mutex<Vec<Process>>);

/// Size of the file that is downloaded.
pub(crate) const FILE: u64 = 200 << 20;

impl Servers {
    pub(crate) async fn start(world: &World, scripts: &Path, python: &str) -> anyhow::Result<Self> {
        let west = &world.clusters[0];
        let netns = west.workload("server").netns.clone();
        let dir = world.dir.join("servers");
        std::fs::create_dir_all(&dir)?;
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755))?;
        let mut documents = String::new();
        for s in &SERVICES {
            let protocol = if s.protocol.is_empty() { "x".to_owned() } else { format!("{}-x", s.protocol) };
            write!(
                documents,
                "apiVersion: v1\nkind: Service\nmetadata: {{name: {}, namespace: {NAMESPACE}}}\nspec:\n  selector: \
                 {{app: server}}\n  ports:\n  - {{name: {protocol}, port: {}}}\n---\n",
                s.name, s.port
            )?;
        }
        west.write("software.yaml", &documents)?;
        let port = |name: &str| {
            SERVICES.iter().find(|s| s.name == name).map(|s| s.port.to_string()).unwrap_or_default()
        };
        let script = |name: &str| scripts.join(name).display().to_string();
        let mut all = Vec::new();
        let mut start = |name: &str, command: &[&str]| -> anyhow::Result<()> {
            let mut line: Vec<String> = ["ip", "netns", "exec", &netns].map(str::to_owned).to_vec();
            line.extend(command.iter().map(|s| (*s).to_owned()));
            all.push(Process::start(name, &dir, &line)?);
            Ok(())
        };
        start("pyhttp", &[python, &script("http_server.py"), &port("pyhttp")])?;
        start("sniffed", &[python, &script("http_server.py"), &port("sniffed")])?;
        start("nodejs", &["node", &script("node_server.js"), &port("nodejs")])?;
        start("grpcd", &[python, &script("grpc_server.py"), &port("grpcd")])?;
        start("wsd", &[python, &script("websocket_server.py"), &port("wsd")])?;
        start("tcpd", &[python, &script("tcp_server.py"), &port("tcpd")])?;
        let pages = dir.join("pages");
        std::fs::create_dir_all(&pages)?;
        std::fs::write(pages.join("index.html"), "a page of nginx\n")?;
        programs::must(&format!(
            "dd if=/dev/urandom of={}/file bs=1M count={} status=none",
            pages.display(),
            FILE >> 20
        ))?;
        start("nginx", &["nginx", "-p", &dir.display().to_string(), "-c", &nginx(&dir, &pages)?])?;
        start("nghttpd", &["nghttpd", "--no-tls", "-d", &pages.display().to_string(), &port("nghttpd")])?;
        let data = owned(&dir, "redis", "redis")?;
        start(
            "redis",
            &[
                "setpriv",
                "--reuid",
                "redis",
                "--regid",
                "redis",
                "--clear-groups",
                "redis-server",
                "--port",
                &port("redis"),
                "--bind",
                "0.0.0.0",
                "--protected-mode",
                "no",
                "--save",
                "",
                "--dir",
                &data,
            ],
        )?;
        let data = owned(&dir, "mariadb", "mysql")?;
        programs::run(
            "mariadb-install-db",
            &[
                "--no-defaults",
                "--user=mysql",
                "--skip-test-db",
                "--auth-root-authentication-method=normal",
                &format!("--datadir={data}"),
            ],
        )?
        .ok("mariadb-install-db")?;
        let init = dir.join("mariadb.sql");
        std::fs::write(
            &init,
            "CREATE USER lab@'%' IDENTIFIED BY 'lab';\nCREATE DATABASE lab;\nGRANT ALL ON lab.* TO lab@'%';\n",
        )?;
        start(
            "mariadb",
            &[
                "mariadbd",
                "--no-defaults",
                "--user=mysql",
                &format!("--datadir={data}"),
                &format!("--port={}", port("mariadb")),
                &format!("--socket={data}/sock"),
                "--skip-name-resolve",
                &format!("--init-file={}", init.display()),
                "--innodb-buffer-pool-size=16M",
            ],
        )?;
        let data = owned(&dir, "postgres", "postgres")?;
        let bin = newest("/usr/lib/postgresql")?.join("bin");
        let initdb = bin.join("initdb").display().to_string();
        programs::run(
            "setpriv",
            &[
                "--reuid",
                "postgres",
                "--regid",
                "postgres",
                "--clear-groups",
                &initdb,
                "-D",
                &data,
                "-A",
                "trust",
                "--no-sync",
            ],
        )?
        .ok("initdb")?;
        std::fs::write(Path::new(&data).join("pg_hba.conf"), "host all all 0.0.0.0/0 trust\n")?;
        let postgres = bin.join("postgres").display().to_string();
        start(
            "postgres",
            &[
                "setpriv",
                "--reuid",
                "postgres",
                "--regid",
                "postgres",
                "--clear-groups",
                &postgres,
                "-D",
                &data,
                "-p",
                &port("postgres"),
                "-c",
                "listen_addresses=0.0.0.0",
                "-c",
                "unix_socket_directories=",
                "-c",
                "fsync=off",
            ],
        )?;
        let servers = Self(all.into());
        for s in &SERVICES {
            until(s.name, Duration::from_secs(30), async || {
                servers.check()?;
                let listening = exec(&netns, &["ss", "-Hltn", &format!("sport = :{}", s.port)])?.ok("ss")?;
                ensure!(!listening.is_empty(), "does not listen");
                Ok(())
            })
            .await?;
        }
        // The configuration has reached the clients' sidecar when the last service has an address there.
        let client = west.workload("client").netns.clone();
        for s in &SERVICES {
            until(s.name, Duration::from_secs(30), async || {
                exec(&client, &["getent", "ahostsv4", s.name])?.ok("getent").map(drop)
            })
            .await?;
        }
        Ok(servers)
    }

    /// None has ended by itself.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        self.0.lock().map_err(|_| anyhow::anyhow!("poisoned"))?.iter_mut().try_for_each(Process::check)
    }
}

/// A directory of a system user.
fn owned(dir: &Path, name: &str, user: &str) -> anyhow::Result<String> {
    let path = dir.join(name);
    std::fs::create_dir_all(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700))?;
    let id = |flag| -> anyhow::Result<u32> {
        programs::run("id", &[flag, user])?.ok(user)?.trim().parse().context("id")
    };
    chown(&path, Some(id("-u")?), Some(id("-g")?))?;
    Ok(path.display().to_string())
}

fn newest(dir: &str) -> anyhow::Result<PathBuf> {
    let versions = std::fs::read_dir(dir).with_context(|| dir.to_owned())?;
    versions.flatten().map(|e| e.path()).max().context("no version of PostgreSQL")
}

fn nginx(dir: &Path, pages: &Path) -> anyhow::Result<String> {
    let config = dir.join("nginx.conf");
    let port = |name: &str| SERVICES.iter().find(|s| s.name == name).map_or(0, |s| s.port);
    let text = format!(
        "daemon off; pid {0}/nginx.pid; error_log stderr; user root;\nevents {{}}\nhttp {{\n  access_log off; root {1};\n  \
         client_body_temp_path {0}/body; proxy_temp_path {0}/proxy; fastcgi_temp_path {0}/fastcgi;\n  \
         uwsgi_temp_path {0}/uwsgi; scgi_temp_path {0}/scgi; keepalive_requests 1000000; gzip on; gzip_min_length 0;\n  \
         gzip_types text/html text/plain;\n  server {{ listen {2}; }}\n  server {{ listen {3} http2; }}\n}}\n",
        dir.display(),
        pages.display(),
        port("nginx"),
        port("nginx2"),
    );
    std::fs::write(&config, text)?;
    Ok(config.display().to_string())
}

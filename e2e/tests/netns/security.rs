//! Istio's security tasks, with what a person sees of each: mutual TLS and its migration, certificates, HTTPS of the
//! application, tokens, access rules, and an authoriser of one's own.
//!
//! `sleep` and `httpbin` are in namespace foo, `caller` and `store` in bar, all with sidecars; what has none calls from
//! the node and is served there as `legacy`.

use std::{os::unix::fs::PermissionsExt, path::Path, time::Duration};

use anyhow::{Context, ensure};
use flotilla_e2e::{
    netns::{Cluster, NAMESPACE, Options, World, exec, until},
    programs::{self, Process},
};

use crate::support::scenario;

pub(crate) const CONVERGE: Duration = Duration::from_secs(15);
pub(crate) const HTTPBIN: &str = "httpbin.foo.svc.cluster.local:8080";
pub(crate) const STORE: &str = "store.bar.svc.cluster.local:8080";
const LEGACY: &str = "legacy.old.svc.cluster.local:8080";

#[test]
#[ignore = "needs root, network namespaces and the programs that cargo verify installs"]
fn security_tasks_show_what_they_promise() {
    scenario("tasks of security", async || {
        let world = world().await?;
        let lab = Lab::new(&world)?;
        lab.authentication_policy().await?;
        lab.migration().await?;
        lab.certificates()?;
        lab.https().await?;
        lab.tokens().await?;
        lab.authorization().await?;
        lab.authoriser().await?;
        lab.health()?;
        lab.plugged_in_ca().await
    });
}

/// A cluster with these workloads.
pub(crate) async fn world() -> anyhow::Result<World> {
    World::start(&Options {
        echo: env!("CARGO_BIN_EXE_flotilla-echo").into(),
        quic: false,
        trunk_transport: "quic",
        gateways: 1,
        namespace: |s| match s {
            "caller" | "store" => "bar",
            "sleep" | "httpbin" | "authz" => "foo",
            _ => NAMESPACE,
        },
        locality: |_| "",
        clusters: vec![(
            "west",
            vec![("sleep", "v1"), ("httpbin", "v1"), ("caller", "v1"), ("store", "v1"), ("authz", "v1")],
        )],
    })
    .await
}

/// Status and exit code of curl: `200/0`, or `000/56` of a connection that is closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen(pub(crate) String, pub(crate) String);

impl Seen {
    pub(crate) fn code(&self) -> &str {
        &self.0
    }

    /// The connection was refused by whoever is asked for a certificate.
    pub(crate) fn closed(&self) -> bool {
        let exit = self.0.rsplit('/').next().unwrap_or_default();
        // Empty reply, a failed handshake, a reset while sending or receiving.
        self.0.starts_with("000/") && ["52", "35", "55", "56"].contains(&exit)
    }
}

/// Who calls.
#[derive(Debug, Clone, Copy)]
pub(crate) enum From {
    Pod(&'static str),
    /// Without a sidecar.
    Legacy,
}

pub(crate) struct Lab<'w> {
    pub(crate) world: &'w World,
    pub(crate) west: &'w Cluster,
    _legacy: Process,
}

impl<'w> Lab<'w> {
    pub(crate) fn new(world: &'w World) -> anyhow::Result<Self> {
        let west = &world.clusters[0];
        let echo = env!("CARGO_BIN_EXE_flotilla-echo");
        let control = world.dir.join("legacy.sock");
        let line = format!(
            "ip netns exec {} {echo} --workload legacy --cluster west --listen 10.10.0.1 --control {}",
            west.netns("node"),
            control.display()
        );
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let legacy = Process::start("legacy", &world.dir, &words)?;
        west.write(
            "legacy.yaml",
            "apiVersion: v1\nkind: Service\nmetadata: {name: legacy, namespace: old}\nspec:\n  selector: {app: legacy}\n  \
             ports:\n  - {name: http, port: 8080}\n---\napiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n\
             metadata: {name: legacy, namespace: old}\nspec: {address: 10.10.0.1, labels: {app: legacy}}\n",
        )?;
        Ok(Self { world, west, _legacy: legacy })
    }

    /// One request with curl.
    pub(crate) fn curl(&self, from: From, url: &str, more: &[&str]) -> anyhow::Result<Seen> {
        let mut args = vec!["curl", "-s", "-m", "10", "-o", "-", "-w", "\n%{http_code}/%{exitcode}", url];
        args.extend(more);
        let said = match from {
            From::Pod(p) => self.west.as_app(p, &args)?,
            From::Legacy => exec(&self.west.netns("node"), &args)?,
        };
        let (body, code) = said.out.rsplit_once('\n').unwrap_or(("", &said.out));
        Ok(Seen(code.to_owned(), body.to_owned()))
    }

    pub(crate) fn get(&self, from: From, host: &str) -> anyhow::Result<Seen> {
        match from {
            From::Legacy => {
                // No resolver of the mesh: by address.
                let (name, port) = host.split_once(':').context("host:port")?;
                let service = name.split('.').next().unwrap_or_default();
                let ip = if service == "legacy" { "10.10.0.1" } else { &*self.west.workload(service).ip };
                self.curl(from, &format!("http://{ip}:{port}/"), &[])
            }
            From::Pod(_) => self.curl(from, &format!("http://{host}/"), &[]),
        }
    }

    /// Waits until all of these are so.
    pub(crate) async fn becomes(&self, what: &str, wanted: &[(From, &str, &str)]) -> anyhow::Result<()> {
        until(what, CONVERGE, async || {
            for (from, host, want) in wanted {
                let seen = self.get(*from, host)?;
                let ok = match *want {
                    "closed" => seen.closed(),
                    code => seen.code() == format!("{code}/0"),
                };
                ensure!(ok, "{from:?} to {host}: {seen:?}, not {want}");
            }
            Ok(())
        })
        .await?;
        Ok(())
    }

    pub(crate) fn peers(&self, file: &str, namespace: &str, spec: &str) -> anyhow::Result<()> {
        self.west.write(
            file,
            &format!(
                "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {}, namespace: \
                 {namespace}}}\nspec: {spec}\n",
                file.trim_end_matches(".yaml")
            ),
        )
    }

    pub(crate) fn rule(&self, mode: &str) -> anyhow::Result<()> {
        self.west.write(
            "rule.yaml",
            &format!(
                "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: httpbin, namespace: foo}}\n\
                 spec: {{host: httpbin, trafficPolicy: {{tls: {{mode: {mode}}}}}}}\n"
            ),
        )
    }

    /// Tasks: Authentication Policy.
    async fn authentication_policy(&self) -> anyhow::Result<()> {
        let (sleep, caller, legacy) = (From::Pod("sleep"), From::Pod("caller"), From::Legacy);
        self.becomes(
            "everybody reaches everything",
            &[
                (sleep, HTTPBIN, "200"),
                (sleep, STORE, "200"),
                (caller, HTTPBIN, "200"),
                (legacy, HTTPBIN, "200"),
                (legacy, STORE, "200"),
                (sleep, LEGACY, "200"),
            ],
        )
        .await?;
        println!("   no policy: 200 for foo, bar and legacy, both ways");
        self.peers("mesh-mtls.yaml", "istio-system", "{mtls: {mode: STRICT}}")?;
        self.becomes(
            "strict for the mesh",
            &[
                (legacy, HTTPBIN, "closed"),
                (legacy, STORE, "closed"),
                (sleep, HTTPBIN, "200"),
                (caller, HTTPBIN, "200"),
                (sleep, LEGACY, "200"),
            ],
        )
        .await?;
        println!("   STRICT for the mesh: closed for legacy, 200 for sidecars, and from them to legacy");
        self.rule("DISABLE")?;
        self.becomes("plaintext to a strict server", &[(sleep, HTTPBIN, "503"), (caller, HTTPBIN, "503")])
            .await?;
        self.rule("ISTIO_MUTUAL")?;
        self.becomes("mutual TLS by a rule", &[(sleep, HTTPBIN, "200"), (caller, HTTPBIN, "200")]).await?;
        self.west.remove("rule.yaml")?;
        println!("   DestinationRule: DISABLE is 503 at a STRICT server, ISTIO_MUTUAL 200");
        self.peers("bar-mtls.yaml", "bar", "{mtls: {mode: PERMISSIVE}}")?;
        self.becomes("a namespace of its own", &[(legacy, STORE, "200"), (legacy, HTTPBIN, "closed")])
            .await?;
        self.west.remove("bar-mtls.yaml")?;
        self.peers(
            "workload-mtls.yaml",
            "foo",
            "{selector: {matchLabels: {app: httpbin}}, mtls: {mode: DISABLE}}",
        )?;
        self.becomes(
            "one workload",
            &[(legacy, HTTPBIN, "200"), (sleep, HTTPBIN, "200"), (legacy, STORE, "closed")],
        )
        .await?;
        self.peers(
            "workload-mtls.yaml",
            "foo",
            "{selector: {matchLabels: {app: httpbin}}, mtls: {mode: STRICT}, portLevelMtls: {'8080': {mode: DISABLE}}}",
        )?;
        let other = "httpbin.foo.svc.cluster.local:8081";
        until("one port", CONVERGE, async || {
            let http = self.get(legacy, HTTPBIN)?;
            let h2 = self.curl(
                legacy,
                &format!("http://{}:8081/", self.west.workload("httpbin").ip),
                &["--http2-prior-knowledge"],
            )?;
            ensure!(http.code() == "200/0" && h2.0.starts_with("000/"), "8080: {http:?}, 8081: {h2:?}");
            let own = self.curl(sleep, &format!("http://{other}/"), &["--http2-prior-knowledge"])?;
            ensure!(own.code() == "200/0", "{own:?}");
            Ok(())
        })
        .await?;
        self.west.remove("workload-mtls.yaml")?;
        self.west.remove("mesh-mtls.yaml")?;
        println!("   namespace, workload and port each override what is above them");
        Ok(())
    }

    /// Tasks: Mutual TLS Migration.
    async fn migration(&self) -> anyhow::Result<()> {
        let (sleep, legacy) = (From::Pod("sleep"), From::Legacy);
        self.peers("foo-mtls.yaml", "foo", "{mtls: {mode: PERMISSIVE}}")?;
        self.rule("DISABLE")?;
        self.becomes("both in clear", &[(sleep, HTTPBIN, "200"), (legacy, HTTPBIN, "200")]).await?;
        let secured = |way: &str| -> anyhow::Result<u64> {
            let page = self.west.admin("httpbin-v1", "/stats/prometheus")?;
            Ok(page
                .lines()
                .filter(|l| l.starts_with("istio_requests_total") && l.contains("reporter=\"destination\""))
                .filter(|l| l.contains(&format!("connection_security_policy=\"{way}\"")))
                .filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok())
                .sum::<f64>() as u64)
        };
        let before = secured("mutual_tls")?;
        self.rule("ISTIO_MUTUAL")?;
        until("the caller moves to mutual TLS", CONVERGE, async || {
            ensure!(
                self.get(sleep, HTTPBIN)?.code() == "200/0" && self.get(legacy, HTTPBIN)?.code() == "200/0"
            );
            ensure!(secured("mutual_tls")? > before, "nothing came by mutual TLS");
            Ok(())
        })
        .await?;
        self.peers("foo-mtls.yaml", "foo", "{mtls: {mode: STRICT}}")?;
        self.becomes("locked", &[(legacy, HTTPBIN, "closed"), (sleep, HTTPBIN, "200")]).await?;
        self.west.remove("rule.yaml")?;
        println!("   migration: clear, then mutual TLS beside clear, then closed for who has no certificate");
        Ok(())
    }

    /// Tasks: Mutual TLS Deep-Dive. `foo` is STRICT.
    fn certificates(&self) -> anyhow::Result<()> {
        let state = self.west.proxy_state(self.west.workload("sleep"));
        let file = |n: &str| state.join(n).display().to_string();
        let (chain, key, root) = (file("svid-chain.pem"), file("svid-key.pem"), file("root-cert.pem"));
        let mode = std::fs::metadata(&key)?.permissions().mode() & 0o777;
        ensure!(mode == 0o600, "the key's mode is {mode:o}");
        let pid = self.west.pid("sleep-v1-proxy").context("no proxy")?;
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"))?;
        let core = limits.lines().find(|l| l.starts_with("Max core file size")).unwrap_or_default();
        ensure!(core.split_whitespace().filter(|w| *w == "0").count() == 2, "{core}");
        let mem = std::fs::metadata(format!("/proc/{pid}/mem"))?;
        ensure!(std::os::unix::fs::MetadataExt::uid(&mem) == 0, "its user may read the proxy's memory");
        let text =
            programs::run("openssl", &["x509", "-in", &chain, "-noout", "-text"])?.ok("openssl x509")?;
        ensure!(text.contains("URI:spiffe://mesh.local/ns/foo/sa/sleep"), "{text}");
        let verified = programs::run("openssl", &["verify", "-CAfile", &root, "-untrusted", &chain, &chain])?
            .ok("openssl verify")?;
        let url = format!("https://{}:8080/", self.west.workload("httpbin").ip);
        let without = self.curl(From::Legacy, &url, &["-k"])?;
        ensure!(without.closed(), "without a certificate: {without:?}");
        let with = self.curl(From::Legacy, &url, &["-k", "--cert", &chain, "--key", &key])?;
        ensure!(with.code() == "200/0", "with the workload's certificate: {with:?}");
        println!(
            "   deep dive: key 0600, URI SAN spiffe://mesh.local/ns/foo/sa/sleep, {}; curl {} without certificate, {} with",
            verified.trim().rsplit(' ').next().unwrap_or_default(),
            without.code(),
            with.code()
        );
        // Nothing older than TLS 1.3 inside the mesh.
        let node = self.west.netns("node");
        for at in [format!("{}:8080", self.west.workload("httpbin").ip), "10.10.0.2:15012".to_owned()] {
            for (version, accepted) in [("-tls1_2", false), ("-tls1_3", true)] {
                let line = [
                    "timeout",
                    "10",
                    "openssl",
                    "s_client",
                    "-connect",
                    &at,
                    version,
                    "-cert",
                    &chain,
                    "-cert_chain",
                    &chain,
                    "-key",
                    &key,
                ];
                let said = exec(&node, &line)?;
                ensure!(
                    said.out.contains("BEGIN CERTIFICATE") == accepted,
                    "{at} {version}: {}{}",
                    said.out,
                    said.err
                );
            }
        }
        println!("   openssl s_client: TLS 1.2 is refused inside the mesh, TLS 1.3 taken");
        Ok(())
    }

    /// Tasks: Mutual TLS over HTTPS. `foo` is STRICT.
    async fn https(&self) -> anyhow::Result<()> {
        let dir = self.world.dir.join("https");
        std::fs::create_dir_all(&dir)?;
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755))?;
        let (cert, key) = (dir.join("cert.pem"), dir.join("key.pem"));
        programs::run(
            "openssl",
            &[
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-subj",
                "/CN=my-nginx",
                "-days",
                "1",
                "-addext",
                "subjectAltName=DNS:my-nginx.foo.svc.cluster.local",
                "-keyout",
                &key.display().to_string(),
                "-out",
                &cert.display().to_string(),
            ],
        )?
        .ok("openssl req")?;
        std::fs::create_dir_all(dir.join("pages"))?;
        std::fs::write(dir.join("pages/index.html"), "a page over HTTPS\n")?;
        let conf = dir.join("nginx.conf");
        let d = dir.display();
        std::fs::write(
            &conf,
            format!(
                "pid {d}/pid;\nerror_log {d}/error.log;\ndaemon off;\nuser root;\nevents {{}}\nhttp {{\n  access_log off;\n  \
                 client_body_temp_path {d}/t1; proxy_temp_path {d}/t2; fastcgi_temp_path {d}/t3; uwsgi_temp_path {d}/t4; \
                 scgi_temp_path {d}/t5;\n  server {{ listen 8443 ssl; ssl_certificate {d}/cert.pem; ssl_certificate_key \
                 {d}/key.pem; root {d}/pages; }}\n}}\n"
            ),
        )?;
        self.west.write(
            "nginx.yaml",
            "apiVersion: v1\nkind: Service\nmetadata: {name: my-nginx, namespace: foo}\nspec:\n  selector: {app: httpbin}\n  \
             ports:\n  - {name: https, port: 8443}\n",
        )?;
        let mut line: Vec<String> =
            ["ip", "netns", "exec", &self.west.workload("httpbin").netns].map(str::to_owned).to_vec();
        line.extend(["nginx", "-p", &d.to_string(), "-c", &conf.display().to_string()].map(str::to_owned));
        let _nginx = Process::start("nginx", &dir, &line)?;
        let url = "https://my-nginx.foo.svc.cluster.local:8443/";
        let ca = cert.display().to_string();
        until("HTTPS of the application inside mutual TLS", CONVERGE, async || {
            let seen = self.curl(From::Pod("sleep"), url, &["--cacert", &ca])?;
            ensure!(seen.code() == "200/0" && seen.1.contains("over HTTPS"), "{seen:?}");
            Ok(())
        })
        .await?;
        // The proxy's own user is not captured: its TLS meets the sidecar's, which asks for a certificate of the mesh.
        let w = self.west.workload("sleep");
        let ip = &self.west.workload("httpbin").ip;
        let resolve = format!("my-nginx.foo.svc.cluster.local:8443:{ip}");
        let raw = [
            "setpriv",
            "--reuid",
            "1337",
            "--regid",
            "1337",
            "--clear-groups",
            "curl",
            "-s",
            "-m",
            "10",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}/%{exitcode}",
            "--cacert",
            &ca,
            "--resolve",
            &resolve,
            url,
        ];
        let seen = Seen(exec(&w.netns, &raw)?.out, String::new());
        ensure!(seen.closed() || seen.0.ends_with("/60"), "{seen:?}");
        println!(
            "   HTTPS inside mutual TLS: 200 from the application, {} from the proxy's user",
            seen.code()
        );
        self.peers("foo-mtls.yaml", "foo", "{mtls: {mode: PERMISSIVE}}")?;
        until("HTTPS of the application alone", CONVERGE, async || {
            let plain = self.curl(From::Legacy, url, &["--cacert", &ca, "--resolve", &resolve])?;
            ensure!(plain.code() == "200/0", "without a sidecar: {plain:?}");
            Ok(())
        })
        .await?;
        println!("   PERMISSIVE: 200 for its own TLS without a sidecar as well");
        self.west.remove("nginx.yaml")?;
        Ok(())
    }

    /// A key, its JWKS, and tokens signed by it.
    pub(crate) fn keys(&self) -> anyhow::Result<Keys> {
        let key = self.world.dir.join("jwt-key.pem").display().to_string();
        programs::run(
            "openssl",
            &["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", &key],
        )?
        .ok("openssl genpkey")?;
        let said =
            programs::run("openssl", &["rsa", "-in", &key, "-noout", "-modulus"])?.ok("openssl rsa")?;
        let hex = said.trim().trim_start_matches("Modulus=").to_owned();
        let encode = format!(
            "import base64;print(base64.urlsafe_b64encode(bytes.fromhex('{hex}')).decode().rstrip('='))"
        );
        let n = programs::run("python3", &["-c", &encode])?.ok("python3")?;
        let jwks = format!(
            "{{\"keys\":[{{\"kty\":\"RSA\",\"kid\":\"k\",\"alg\":\"RS256\",\"use\":\"sig\",\"e\":\"AQAB\",\"n\":\"{}\"}}]}}",
            n.trim()
        );
        Ok(Keys { key, jwks })
    }

    /// Tasks: Authentication Policy, end-user authentication; Authorization for JWT.
    async fn tokens(&self) -> anyhow::Result<()> {
        let keys = self.keys()?;
        self.west.write(
            "jwt.yaml",
            &format!(
                "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: jwt, namespace: foo}}\nspec:\n  \
                 selector: {{matchLabels: {{app: httpbin}}}}\n  jwtRules:\n  - issuer: testing@example.com\n    jwks: '{}'\n",
                keys.jwks
            ),
        )?;
        let claims = |issuer: &str, expires: i64| {
            let now = std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or_default());
            format!(
                "{{\"iss\":\"{issuer}\",\"sub\":\"alice\",\"groups\":[\"staff\"],\"exp\":{}}}",
                now + expires
            )
        };
        let good = keys.sign(&claims("testing@example.com", 3600))?;
        let expired = keys.sign(&claims("testing@example.com", -3600))?;
        let stranger = keys.sign(&claims("somebody@example.com", 3600))?;
        let sleep = From::Pod("sleep");
        let code = |token: &str, path: &str| -> anyhow::Result<String> {
            let bearer = format!("authorization: Bearer {token}");
            let more: &[&str] = if token.is_empty() { &[] } else { &["-H", &bearer] };
            let seen = self.curl(sleep, &format!("http://{HTTPBIN}{path}"), more)?;
            Ok(seen.code().trim_end_matches("/0").to_owned())
        };
        until("tokens are looked at", CONVERGE, async || {
            ensure!(code("nonsense", "/")? == "401");
            Ok(())
        })
        .await?;
        let seen = [code("", "/")?, code(&good, "/")?, code(&expired, "/")?, code(&stranger, "/")?];
        ensure!(seen == ["200", "200", "401", "401"], "none, good, expired, another issuer's: {seen:?}");
        println!(
            "   tokens: 200 without one, 200 with one, 401 for nonsense, an expired one and another issuer's"
        );
        self.west.write(
            "jwt-required.yaml",
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: require-jwt, namespace: foo}\nspec:\n  \
             selector: {matchLabels: {app: httpbin}}\n  rules:\n  - from:\n    - source: {requestPrincipals: \
             [testing@example.com/alice]}\n    when:\n    - {key: 'request.auth.claims[groups]', values: [staff]}\n  - to:\n    \
             - operation: {paths: [/healthz]}\n",
        )?;
        until("a token is needed", CONVERGE, async || {
            let seen = [code("", "/")?, code(&good, "/")?, code("", "/healthz")?];
            ensure!(seen == ["403", "200", "200"], "{seen:?}");
            Ok(())
        })
        .await?;
        println!("   required: 403 without a token, 200 with one, and 200 for the path that is exempt");
        self.west.remove("jwt-required.yaml")?;

        // An issuer that says itself where its keys are.
        const ISSUER: &str = "http://10.10.0.1:9600";
        let pages = self.world.dir.join("issuer");
        std::fs::create_dir_all(pages.join(".well-known"))?;
        std::fs::write(pages.join("keys"), &keys.jwks)?;
        let metadata = format!("{{\"issuer\":\"{ISSUER}\",\"jwks_uri\":\"{ISSUER}/keys\"}}");
        std::fs::write(pages.join(".well-known/openid-configuration"), metadata)?;
        let line = format!(
            "ip netns exec {} python3 -m http.server --bind 10.10.0.1 --directory {} 9600",
            self.west.netns("node"),
            pages.display()
        );
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let _issuer = Process::start("issuer", &self.world.dir, &words)?;
        self.west.write(
            "jwt.yaml",
            &format!(
                "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: jwt, namespace: foo}}\nspec:\n  \
                 selector: {{matchLabels: {{app: httpbin}}}}\n  jwtRules: [{{issuer: '{ISSUER}'}}]\n"
            ),
        )?;
        let own = keys.sign(&claims(ISSUER, 3600))?;
        until("the issuer's keys are found", CONVERGE, async || {
            let seen = [code(&own, "/")?, code(&good, "/")?];
            ensure!(seen == ["200", "401"], "its own token, and that of the issuer before: {seen:?}");
            Ok(())
        })
        .await?;
        println!("   discovered: 200 with a token of an issuer that was named without keys");
        self.west.remove("jwt.yaml")?;
        Ok(())
    }

    pub(crate) fn policy(&self, file: &str, spec: &str) -> anyhow::Result<()> {
        self.west.write(
            file,
            &format!(
                "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {}, namespace: foo}}\nspec: {spec}\n",
                file.trim_end_matches(".yaml")
            ),
        )
    }

    /// Tasks: Authorization.
    async fn authorization(&self) -> anyhow::Result<()> {
        let (sleep, caller) = (From::Pod("sleep"), From::Pod("caller"));
        self.policy("nothing.yaml", "{}")?;
        until("nothing is allowed", CONVERGE, async || {
            let seen = self.get(sleep, HTTPBIN)?;
            ensure!(seen.code() == "403/0" && seen.1 == "RBAC: access denied", "{seen:?}");
            Ok(())
        })
        .await?;
        println!("   authorization: 403 `RBAC: access denied` where nothing is allowed");
        self.policy("reads.yaml", "{rules: [{to: [{operation: {methods: [GET]}}]}]}")?;
        self.becomes("reads of all", &[(sleep, HTTPBIN, "200"), (caller, HTTPBIN, "200")]).await?;
        let post = self.curl(sleep, &format!("http://{HTTPBIN}/"), &["-X", "POST", "-d", "x"])?;
        ensure!(post.code() == "403/0", "{post:?}");
        self.policy(
            "reads.yaml",
            "{selector: {matchLabels: {app: httpbin}}, rules: [{from: [{source: {principals: [mesh.local/ns/foo/sa/sleep]}}], to: [{operation: {methods: [GET]}}]}]}",
        )?;
        self.becomes("one account", &[(sleep, HTTPBIN, "200"), (caller, HTTPBIN, "403")]).await?;
        println!("   roles: GET for all, then for one service account alone; 403 for POST and for others");
        self.west.remove("nothing.yaml")?;
        self.west.remove("reads.yaml")?;
        self.policy(
            "tcp.yaml",
            "{selector: {matchLabels: {app: httpbin}}, action: DENY, rules: [{from: [{source: {namespaces: [bar]}}], to: [{operation: {ports: ['9001']}}]}]}",
        )?;
        until("bytes of one namespace", CONVERGE, async || {
            ensure!(self.banner("sleep")? && !self.banner("caller")?);
            Ok(())
        })
        .await?;
        self.west.remove("tcp.yaml")?;
        println!("   TCP: closed for namespace bar, open for foo");
        Ok(())
    }

    /// Whether the server that speaks first does.
    pub(crate) fn banner(&self, from: &str) -> anyhow::Result<bool> {
        // Of bash: sh has no /dev/tcp.
        let line = "exec 3<>/dev/tcp/httpbin.foo.svc.cluster.local/9001; head -c 1 <&3";
        let said = self.west.as_app(from, &["timeout", "3", "bash", "-c", line])?;
        Ok(!said.out.is_empty())
    }

    /// Tasks: External Authorization.
    async fn authoriser(&self) -> anyhow::Result<()> {
        let python = programs::venv_python();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/netns/software/authz_server.py");
        let copy = self.world.dir.join("authz_server.py");
        std::fs::copy(&script, &copy)?;
        let mut line: Vec<String> =
            ["ip", "netns", "exec", &self.west.workload("authz").netns].map(str::to_owned).to_vec();
        line.extend([python.as_str(), &copy.display().to_string(), "8000", "8500"].map(str::to_owned));
        let server = Process::start("authoriser", &self.world.dir, &line)?;
        self.west.write(
            "authoriser.yaml",
            "apiVersion: v1\nkind: Service\nmetadata: {name: ext-authz, namespace: foo}\nspec:\n  selector: {app: authz}\n  ports:\n  \
             - {name: http, port: 8000}\n  - {name: grpc, port: 8500}\n---\napiVersion: flotilla.dev/v1alpha1\nkind: MeshConfig\n\
             metadata: {name: mesh}\nspec:\n  extensionProviders:\n  - name: over-http\n    envoyExtAuthzHttp:\n      service: \
             ext-authz.foo.svc.cluster.local\n      port: 8000\n      timeout: 2s\n      includeRequestHeadersInCheck: [x-ext-authz]\n      \
             headersToUpstreamOnAllow: [x-ext-authz-check-result]\n      headersToDownstreamOnDeny: [x-ext-authz-check-result]\n  \
             - name: over-grpc\n    envoyExtAuthzGrpc: {service: ext-authz.foo.svc.cluster.local, port: 8500, timeout: 2s}\n",
        )?;
        let sleep = From::Pod("sleep");
        let ask = |path: &str, say: &str| {
            let header = format!("x-ext-authz: {say}");
            self.curl(sleep, &format!("http://{HTTPBIN}{path}"), &["-H", &header, "-D", "-"])
        };
        for provider in ["over-http", "over-grpc"] {
            self.policy(
                "ask.yaml",
                &format!(
                    "{{selector: {{matchLabels: {{app: httpbin}}}}, action: CUSTOM, provider: {{name: {provider}}}, rules: [{{to: [{{operation: {{paths: [/headers]}}}}]}}]}}"
                ),
            )?;
            until(provider, CONVERGE, async || {
                let (no, yes, other) =
                    (ask("/headers", "deny")?, ask("/headers", "allow")?, ask("/ip", "deny")?);
                ensure!(
                    no.code() == "403/0" && yes.code() == "200/0" && other.code() == "200/0",
                    "deny: {no:?}, allow: {yes:?}, another path: {other:?}"
                );
                if provider == "over-http" {
                    ensure!(no.1.contains("denied by the authoriser"), "{no:?}");
                    ensure!(no.1.contains("x-ext-authz-check-result: denied"), "{no:?}");
                    ensure!(yes.1.contains("\"x-ext-authz-check-result\":\"allowed\""), "{yes:?}");
                } else {
                    ensure!(
                        server.log().contains("grpc spiffe://mesh.local/ns/foo/sa/sleep 8080 /headers"),
                        "{}",
                        server.log()
                    );
                }
                Ok(())
            })
            .await?;
            println!("   {provider}: 403 for a no, 200 for a yes, and nobody is asked about other paths");
        }
        // Of bytes: the authoriser lets in to 9001 and not to 9000.
        self.policy(
            "ask.yaml",
            "{selector: {matchLabels: {app: httpbin}}, action: CUSTOM, provider: {name: over-grpc}, rules: [{to: [{operation: {ports: ['9001']}}]}]}",
        )?;
        let begun = server.log().matches(" 9001 ").count();
        until("connections are asked about", CONVERGE, async || {
            ensure!(
                self.banner("sleep")? && server.log().matches(" 9001 ").count() > begun,
                "{}",
                server.log()
            );
            Ok(())
        })
        .await?;
        drop(server);
        until("an authoriser that is away", CONVERGE, async || {
            ensure!(!self.banner("sleep")?);
            Ok(())
        })
        .await?;
        println!(
            "   bytes: a connection is asked about before its first byte, and closed when nobody answers"
        );
        self.west.remove("ask.yaml")
    }
}

impl Lab<'_> {
    /// Tasks: Citadel health checking.
    fn health(&self) -> anyhow::Result<()> {
        let said = self.west.flotilla(&["ca", "probe"])?.ok("ca probe")?;
        ensure!(said.contains("The CA signs") && said.contains("3 certificates"), "{said}");
        let page = |path: &str| self.curl(From::Legacy, &format!("http://10.10.0.2:15014{path}"), &[]);
        let health = page("/healthz/ca")?;
        ensure!(health.code() == "200/0" && health.1.trim() == "signs", "{health:?}");
        let metrics = page("/metrics")?;
        ensure!(metrics.1.lines().any(|l| l == "citadel_ca_signs 1"), "{metrics:?}");
        println!("   CA health: {}", said.trim());
        Ok(())
    }

    /// Tasks: Plugging in external CA key and certificate, here under proxies that run.
    async fn plugged_in_ca(&self) -> anyhow::Result<()> {
        let file = |n: &str| self.world.dir.join(n).display().to_string();
        let (cert, key) = (file("corporate-root.pem"), file("corporate-key.pem"));
        let mut line = vec!["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
        line.extend([
            "-subj",
            "/O=corporate/CN=corporate root",
            "-days",
            "30",
            "-keyout",
            &key,
            "-out",
            &cert,
        ]);
        line.extend(["-addext", "keyUsage=critical,keyCertSign,cRLSign"]);
        programs::run("openssl", &line)?.ok("openssl req")?;
        let rotate = |step: &[&str]| self.west.flotilla(&[&["ca", "rotate"], step].concat());
        rotate(&["prepare", "--root-cert", &cert, "--root-key", &key])?.ok("ca rotate prepare")?;
        let mut took = Vec::new();
        for step in ["activate", "finish"] {
            let waited = until(step, Duration::from_secs(60), async || {
                let said = rotate(&[step])?;
                ensure!(said.code == 0, "{}{}", said.out, said.err);
                ensure!(self.get(From::Pod("sleep"), HTTPBIN)?.code() == "200/0", "traffic");
                Ok(())
            })
            .await?;
            took.push(format!("{step} after {:.1} s", waited.as_secs_f64()));
        }
        let state = self.west.proxy_state(self.west.workload("sleep"));
        let own = |n: &str| state.join(n).display().to_string();
        let (chain, root) = (own("svid-chain.pem"), own("root-cert.pem"));
        let given = std::fs::read_to_string(&cert)?;
        // Who is told last that the old one is over is no less safe for it.
        until("the given root alone", CONVERGE, async || {
            let trusted = std::fs::read_to_string(&root)?;
            ensure!(trusted.trim() == given.trim(), "the workload trusts {trusted}");
            Ok(())
        })
        .await?;
        programs::run("openssl", &["verify", "-CAfile", &cert, "-untrusted", &chain, &chain])?
            .ok("openssl verify")?;
        ensure!(self.get(From::Pod("sleep"), HTTPBIN)?.code() == "200/0", "after it");
        println!(
            "   plugged-in CA: {}; the workload's root is the given one, and its chain verifies with it",
            took.join(", ")
        );
        Ok(())
    }
}

pub(crate) struct Keys {
    key: String,
    pub(crate) jwks: String,
}

impl Keys {
    pub(crate) fn sign(&self, claims: &str) -> anyhow::Result<String> {
        let script = "b() { base64 -w0 | tr '+/' '-_' | tr -d '='; }; \
             h=$(printf '{\"alg\":\"RS256\",\"kid\":\"k\",\"typ\":\"JWT\"}' | b); p=$(printf '%s' \"$1\" | b); \
             s=$(printf '%s.%s' \"$h\" \"$p\" | openssl dgst -sha256 -sign \"$2\" | b); echo \"$h.$p.$s\"";
        let said = programs::run("sh", &["-c", script, "sh", claims, &self.key])?.ok("signing a token")?;
        Ok(said.trim().to_owned())
    }
}

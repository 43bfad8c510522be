//! The security tasks of Istio 1.0 in its own words: MeshPolicy and Policy, RbacConfig, ServiceRole and
//! ServiceRoleBinding; what of them newer kinds make void; what a logger sees; and a node agent's signing request.

use anyhow::ensure;
use flotilla_e2e::{
    netns::until,
    programs::{self},
};

use crate::{
    security::{CONVERGE, From, HTTPBIN, Lab, STORE, world},
    support::scenario,
};

const SLEEP: From = From::Pod("sleep");
const CALLER: From = From::Pod("caller");

#[test]
#[ignore = "needs root, network namespaces and the programs that cargo verify installs"]
fn security_tasks_of_1_0_show_what_they_promise() {
    scenario("tasks of security as Istio 1.0 writes them", async || {
        let world = world().await?;
        let lab = Lab::new(&world)?;
        lab.mesh_policy().await?;
        lab.origins().await?;
        lab.roles().await?;
        lab.loggers().await?;
        lab.node_agent()
    });
}

fn authn(kind: &str, metadata: &str, spec: &str) -> String {
    format!(
        "apiVersion: authentication.istio.io/v1alpha1\nkind: {kind}\nmetadata: {metadata}\nspec: {spec}\n"
    )
}

fn rbac(kind: &str, name: &str, spec: &str) -> String {
    format!(
        "apiVersion: rbac.istio.io/v1alpha1\nkind: {kind}\nmetadata: {{name: {name}, namespace: foo}}\nspec: {spec}\n"
    )
}

impl Lab<'_> {
    /// Tasks: Authentication Policy.
    async fn mesh_policy(&self) -> anyhow::Result<()> {
        let all = [(SLEEP, HTTPBIN, "200"), (CALLER, HTTPBIN, "200"), (From::Legacy, HTTPBIN, "200")];
        self.becomes("everybody reaches everything", &all).await?;
        self.west.write("mesh.yaml", &authn("MeshPolicy", "{name: default}", "{peers: [{mtls: {}}]}"))?;
        self.becomes(
            "mTLS for the mesh",
            &[
                (From::Legacy, HTTPBIN, "closed"),
                (From::Legacy, STORE, "closed"),
                (SLEEP, HTTPBIN, "200"),
                (CALLER, HTTPBIN, "200"),
            ],
        )
        .await?;
        self.rule("DISABLE")?;
        self.becomes("plaintext to a strict server", &[(SLEEP, HTTPBIN, "503")]).await?;
        self.rule("ISTIO_MUTUAL")?;
        self.becomes("mutual TLS by a rule", &[(SLEEP, HTTPBIN, "200")]).await?;
        self.west.remove("rule.yaml")?;
        println!("   MeshPolicy: closed for legacy, 200 for sidecars, 503 for one whose rule says DISABLE");
        let bar = authn("Policy", "{name: default, namespace: bar}", "{peers: [{mtls: {mode: PERMISSIVE}}]}");
        self.west.write("bar.yaml", &bar)?;
        self.becomes("a namespace", &[(From::Legacy, STORE, "200"), (From::Legacy, HTTPBIN, "closed")])
            .await?;
        // Without peers: off, for one port of one service.
        let port = "{targets: [{name: httpbin, ports: [{number: 8080}]}]}";
        self.west.write("port.yaml", &authn("Policy", "{name: port, namespace: foo}", port))?;
        self.becomes("a port of a service", &[(From::Legacy, HTTPBIN, "200"), (SLEEP, HTTPBIN, "200")])
            .await?;
        let other = format!("http://{}:8081/", self.west.workload("httpbin").ip);
        let seen = self.curl(From::Legacy, &other, &["--http2-prior-knowledge"])?;
        ensure!(seen.0.starts_with("000/"), "its other port: {seen:?}");
        println!("   Policy: a namespace of its own, and a port of a service, each instead of what is wider");
        self.west.remove("port.yaml")?;
        self.becomes("the mesh's again", &[(From::Legacy, HTTPBIN, "closed")]).await?;
        self.peers("newer.yaml", "foo", "{mtls: {mode: PERMISSIVE}}")?;
        self.becomes("the newer kind", &[(From::Legacy, HTTPBIN, "200"), (SLEEP, HTTPBIN, "200")]).await?;
        self.west.remove("newer.yaml")?;
        self.becomes("without it", &[(From::Legacy, HTTPBIN, "closed")]).await?;
        println!("   a PeerAuthentication makes their peers void, and only while it is there");
        self.west.remove("bar.yaml")?;
        self.west.remove("mesh.yaml")
    }

    /// Tasks: Authentication Policy, end-user authentication.
    async fn origins(&self) -> anyhow::Result<()> {
        let keys = self.keys()?;
        let policy = |more: &str| {
            let spec = format!(
                "\n  targets: [{{name: httpbin}}]\n  peers:\n  - mtls:\n  principalBinding: USE_ORIGIN\n  origins:\n  \
                 - jwt:\n      issuer: testing@example.com\n      jwks: '{}'\n      \
                 triggerRules: [{{excludedPaths: [{{prefix: /healthz}}]}}]\n{more}",
                keys.jwks
            );
            self.west.write("jwt.yaml", &authn("Policy", "{name: jwt, namespace: foo}", &spec))
        };
        policy("")?;
        let claims = |seconds: i64| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            let at = now.map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or_default()) + seconds;
            format!("{{\"iss\":\"testing@example.com\",\"sub\":\"alice\",\"exp\":{at}}}")
        };
        let (good, expired) = (keys.sign(&claims(3600))?, keys.sign(&claims(-3600))?);
        let code = |token: &str, path: &str| -> anyhow::Result<String> {
            let bearer = format!("authorization: Bearer {token}");
            let more: &[&str] = if token.is_empty() { &[] } else { &["-H", &bearer] };
            let seen = self.curl(SLEEP, &format!("http://{HTTPBIN}{path}"), more)?;
            Ok(seen.code().trim_end_matches("/0").to_owned())
        };
        until("a token is required", CONVERGE, async || {
            let seen = [
                code("", "/")?,
                code(&good, "/")?,
                code(&expired, "/")?,
                code("nonsense", "/")?,
                code("", "/healthz/x?y")?,
                code("", "/x?/healthz")?,
            ];
            ensure!(seen == ["401", "200", "401", "401", "200", "401"], "{seen:?}");
            Ok(())
        })
        .await?;
        ensure!(self.get(From::Legacy, HTTPBIN)?.closed(), "its peers need a certificate");
        println!(
            "   origins: 401 without a token, expired or bad, 200 with one and for the path that is exempt"
        );
        policy("  originIsOptional: true\n")?;
        until("a token is optional", CONVERGE, async || {
            let seen = [code("", "/")?, code(&good, "/")?, code(&expired, "/")?];
            ensure!(seen == ["200", "200", "200"], "{seen:?}");
            Ok(())
        })
        .await?;
        println!("   originIsOptional: 200 with and without");
        self.west.remove("jwt.yaml")
    }

    /// Tasks: Authorization.
    async fn roles(&self) -> anyhow::Result<()> {
        let config = "{mode: ON_WITH_INCLUSION, inclusion: {namespaces: [foo]}}";
        self.west.write("rbac.yaml", &rbac("RbacConfig", "default", config))?;
        until("nobody has a role", CONVERGE, async || {
            let seen = self.get(SLEEP, HTTPBIN)?;
            ensure!(seen.code() == "403/0" && seen.1 == "RBAC: access denied", "{seen:?}");
            ensure!(self.get(SLEEP, STORE)?.code() == "200/0", "another namespace");
            ensure!(!self.banner("sleep")?, "bytes");
            Ok(())
        })
        .await?;
        println!("   RbacConfig: 403 `RBAC: access denied` in the namespace, bytes closed, 200 elsewhere");
        let role = |rule: &str| self.west.write("role.yaml", &rbac("ServiceRole", "viewer", rule));
        let bind = |subject: &str, mode: &str| {
            let spec = format!(
                "{{subjects: [{subject}], roleRef: {{kind: ServiceRole, name: viewer}}, mode: {mode}}}"
            );
            self.west.write("bind.yaml", &rbac("ServiceRoleBinding", "bind", &spec))
        };
        role(
            "{rules: [{services: ['*'], methods: [GET], constraints: [{key: 'destination.labels[app]', values: [httpbin]}]}]}",
        )?;
        bind("{user: '*'}", "ENFORCED")?;
        self.becomes("reads of all", &[(SLEEP, HTTPBIN, "200"), (CALLER, HTTPBIN, "200")]).await?;
        let post = self.curl(SLEEP, &format!("http://{HTTPBIN}/"), &["-X", "POST", "-d", "x"])?;
        ensure!(post.code() == "403/0", "{post:?}");
        role("{rules: [{services: [httpbin.foo.svc.cluster.local], methods: ['*']}]}")?;
        bind("{user: mesh.local/ns/foo/sa/sleep}", "ENFORCED")?;
        self.becomes("one account", &[(SLEEP, HTTPBIN, "200"), (CALLER, HTTPBIN, "403")]).await?;
        until("bytes of one account", CONVERGE, async || {
            ensure!(self.banner("sleep")? && !self.banner("caller")?);
            Ok(())
        })
        .await?;
        println!(
            "   roles: GET for all, then all of one service for one account, its bytes as well; 403 for others"
        );
        bind("{properties: {source.namespace: bar}}", "ENFORCED")?;
        self.becomes("a namespace", &[(SLEEP, HTTPBIN, "403"), (CALLER, HTTPBIN, "200")]).await?;
        bind("{properties: {source.namespace: bar}}", "PERMISSIVE")?;
        self.becomes("tried only", &[(SLEEP, HTTPBIN, "403"), (CALLER, HTTPBIN, "403")]).await
    }

    /// What is only tried or audited can be read in access logs. RBAC is on, and `caller` has a role on trial.
    async fn loggers(&self) -> anyhow::Result<()> {
        self.west.write(
            "log.yaml",
            "apiVersion: flotilla.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: mesh}\nspec:\n  accessLogFile: /dev/stdout\n  \
             accessLogFormat: \"seen %REQ(:PATH)% %RESPONSE_CODE% tried=%DYNAMIC_METADATA(envoy.filters.http.rbac:shadow_engine_result)% \
             audit=%DYNAMIC_METADATA(envoy.common:access_log_hint)%\\n\"\n",
        )?;
        // It decides nothing, so roles still count.
        self.policy("audit.yaml", "{action: AUDIT, rules: [{to: [{operation: {paths: [/audited]}}]}]}")?;
        until("marks in the access log", CONVERGE, async || {
            for (from, path) in [(SLEEP, "audited"), (CALLER, "plain")] {
                let seen = self.curl(from, &format!("http://{HTTPBIN}/{path}"), &[])?;
                ensure!(seen.code() == "403/0", "{seen:?}");
            }
            let log = self.west.log("httpbin-v1-proxy");
            for line in
                ["seen /audited 403 tried=denied audit=true", "seen /plain 403 tried=allowed audit=false"]
            {
                ensure!(
                    log.contains(line),
                    "{line:?} is not in the log: {}",
                    log.lines().last().unwrap_or_default()
                );
            }
            Ok(())
        })
        .await?;
        println!("   access log: tried=allowed for a role on trial, audit=true where an AUDIT rule matched");
        self.policy("newer.yaml", "{selector: {matchLabels: {app: httpbin}}, rules: [{}]}")?;
        self.becomes("the newer kind", &[(SLEEP, HTTPBIN, "200"), (CALLER, HTTPBIN, "200")]).await?;
        println!("   an AuthorizationPolicy makes roles void for its workloads");
        for file in ["newer.yaml", "audit.yaml", "log.yaml", "bind.yaml", "role.yaml", "rbac.yaml"] {
            self.west.remove(file)?;
        }
        Ok(())
    }

    /// `IstioCAService.HandleCSR`, by grpcio with a workload's certificate.
    fn node_agent(&self) -> anyhow::Result<()> {
        let state = self.west.proxy_state(self.west.workload("sleep"));
        let own = |n: &str| state.join(n).display().to_string();
        let (chain, key, root) = (own("svid-chain.pem"), own("svid-key.pem"), own("root-cert.pem"));
        let script =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/netns/software/csr_client.py");
        let python = programs::venv_python();
        let at = |n: &str| self.world.dir.join(n).display().to_string();
        let ask = |name: &str, with: bool| -> anyhow::Result<String> {
            let csr = at("agent.csr");
            let san = format!("subjectAltName=URI:spiffe://mesh.local/ns/foo/sa/{name}");
            let line = [
                "req",
                "-new",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-subj",
                "/O=agent",
            ];
            let key_out = at("agent-key.pem");
            programs::run(
                "openssl",
                &[&line[..], &["-addext", &san, "-keyout", &key_out, "-out", &csr]].concat(),
            )?
            .ok("openssl req")?;
            let (chain, key) = if with { (chain.as_str(), key.as_str()) } else { ("-", "-") };
            let command = [
                python.as_str(),
                &script.display().to_string(),
                "10.10.0.2:15012",
                "control-plane.flotilla-system.svc",
                &root,
                chain,
                key,
                &csr,
            ]
            .map(str::to_owned);
            let words: Vec<&str> = command.iter().map(String::as_str).collect();
            let said = flotilla_e2e::netns::exec(&self.west.netns("node"), &words)?;
            ensure!(said.code == 0, "{}{}", said.out, said.err);
            Ok(said.out)
        };
        let said = ask("sleep", true)?;
        let pem = said.strip_prefix("approved\n").unwrap_or_default();
        std::fs::write(at("agent.pem"), pem)?;
        let file = at("agent.pem");
        programs::run("openssl", &["verify", "-CAfile", &root, "-untrusted", &file, &file])?
            .ok("openssl verify")?;
        let text =
            programs::run("openssl", &["x509", "-in", &file, "-noout", "-text"])?.ok("openssl x509")?;
        ensure!(text.contains("URI:spiffe://mesh.local/ns/foo/sa/sleep"), "{said}{text}");
        let (other, nobody) = (ask("httpbin", true)?, ask("sleep", false)?);
        ensure!(other.starts_with("PERMISSION_DENIED"), "another's name: {other}");
        ensure!(nobody.starts_with("UNAUTHENTICATED"), "without a certificate: {nobody}");
        println!(
            "   HandleCSR: approved for the own name, PERMISSION_DENIED for another's, UNAUTHENTICATED for nobody"
        );
        Ok(())
    }
}

//! What runs in a cluster: starting it, stopping it, killing it, and knowing when it is ready.

use std::{
    os::unix::fs::{PermissionsExt, chown},
    time::Duration,
};

use anyhow::{Context, ensure};
use serde_json::json;

use super::*;

impl Cluster {
    /// Starts the control plane; it needs no mesh yet.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_control_plane(&mut self) -> anyhow::Result<()> {
        let flags = [
            ("cluster", self.name.to_owned()),
            ("state-dir", self.state().display().to_string()),
            ("config", self.dir.join("config").display().to_string()),
            ("gateway-via", format!("{}:15443", gateway_ip(0))),
            ("federation-address", format!("{CONTROL_PLANE}:15016")),
            ("transport", if self.quic { "quic,tcp" } else { "tcp" }.to_owned()),
        ];
        let mut command: Vec<String> = ["ip", "netns", "exec"].map(str::to_owned).to_vec();
        command.extend([self.netns("cp"), self.flotilla.display().to_string(), "control-plane".into()]);
        command.extend(flags.iter().map(|(k, v)| format!("--{k}={v}")));
        for n in 0..self.gateways {
            command.push(format!("--gateway-internal={}:15443", gateway_ip(n)));
            if !self.hidden {
                command.push(format!("--gateway-address={}:15443", self.gateway_wan_ip(n)));
            }
        }
        self.control_plane = Some(Process::start("control-plane", &self.dir.join("logs"), &command)?);
        Ok(())
    }

    /// `kill -9` of the control plane.
    pub fn kill_control_plane(&mut self) {
        self.control_plane = None;
    }

    /// `kill -9` of everything; answers how many programs.
    pub fn kill_everything(&mut self) -> usize {
        let n = self.data_plane.len() + usize::from(self.control_plane.is_some());
        // All at once: a cluster that dies does not die one by one.
        let pids: Vec<String> =
            self.control_plane.iter().chain(&self.data_plane).map(|p| p.id().to_string()).collect();
        let mut args = vec!["-9"];
        args.extend(pids.iter().map(String::as_str));
        let _ = programs::run("kill", &args);
        self.control_plane = None;
        self.data_plane.clear();
        n
    }

    /// `kill -9` of all workloads of a service and their proxies; answers how many programs.
    pub fn kill_service(&mut self, service: &str) -> usize {
        let names: Vec<String> = self
            .workloads
            .iter()
            .filter(|w| w.service == service)
            .flat_map(|w| [format!("{}-proxy", w.name()), format!("{}-app", w.name())])
            .collect();
        let (dead, alive): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.data_plane).into_iter().partition(|p| names.contains(&p.name));
        self.data_plane = alive;
        let pids: Vec<String> = dead.iter().map(|p| p.id().to_string()).collect();
        let mut args = vec!["-9"];
        args.extend(pids.iter().map(String::as_str));
        let _ = programs::run("kill", &args);
        dead.len()
    }

    /// Starts the workloads of a service again.
    ///
    /// # Errors
    /// A program cannot be started.
    pub fn start_service(&mut self, service: &str) -> anyhow::Result<()> {
        for w in self.workloads.clone().iter().filter(|w| w.service == service) {
            self.start_workload(w)?;
        }
        Ok(())
    }

    /// Starts the gateway, and a proxy and the application of every workload.
    ///
    /// # Errors
    /// A program cannot be started, or no token is to be had.
    pub fn start_data_plane(&mut self) -> anyhow::Result<()> {
        for n in 0..self.gateways {
            self.start_gateway(n)?;
        }
        for w in self.workloads.clone() {
            self.start_workload(&w)?;
        }
        Ok(())
    }

    /// Starts a gateway, counted from 0.
    ///
    /// # Errors
    /// It cannot be started, or no token is to be had.
    pub fn start_gateway(&mut self, n: usize) -> anyhow::Result<()> {
        let name = gateway_name(n);
        let mut flags = self.proxy(&name, SYSTEM, "eastwest", &gateway_ip(n))?;
        flags.extend(["--labels=istio=eastwestgateway".into(), "--meta=ROUTER_MODE=sni-dnat".into()]);
        if self.quic {
            flags.extend(["--trunk=0.0.0.0:15443".into(), "--trunk-deliver=127.0.0.1:15443".into()]);
            flags.push(format!("--trunk-transport={}", self.trunk_transport));
        }
        self.start_proxy(&name, "gateway", &self.gateway_netns(n), flags)
    }

    /// Where a gateway of [`Self::start_edge`] finds its credentials.
    #[must_use]
    pub fn edge_credentials(&self, name: &str) -> PathBuf {
        self.dir.join(format!("proxy-{name}/credentials"))
    }

    /// Starts a gateway with the label `istio: <name>gateway` in a namespace of its own, at an address of its own that
    /// ends in `number`; waits until it is ready. It starts as root, and gives that up but for ports below 1024.
    ///
    /// # Errors
    /// It cannot be started, or is not ready within half a minute.
    pub async fn start_edge(&mut self, name: &str, number: u8) -> anyhow::Result<String> {
        let (netns, ip) = (self.netns(name), format!("10.10.0.{number}"));
        self.pod(&netns, &ip, usize::from(number))?;
        let mut flags = self.proxy(name, SYSTEM, name, &ip)?;
        let credentials = self.edge_credentials(name);
        directory(&credentials, PROXY_UID)?;
        flags.push(format!("--labels=istio={name}gateway"));
        flags.push(format!("--credentials={}", credentials.display()));
        flags.push(format!("--run-as={PROXY_UID}"));
        let command = ["ip", "netns", "exec", &netns].map(str::to_owned).into_iter();
        let command = command.chain([self.flotilla.display().to_string(), "gateway".into()]).chain(flags);
        let command: Vec<String> = command.collect();
        self.data_plane.push(Process::start(&format!("{name}-proxy"), &self.dir.join("logs"), &command)?);
        until(&netns, Duration::from_secs(30), async || {
            for p in &mut self.data_plane {
                p.check()?;
            }
            ready(&netns, "http://127.0.0.1:15021/healthz/ready")
        })
        .await?;
        Ok(ip)
    }

    /// What the kernel says of a proxy (`/proc/PID/status`).
    ///
    /// # Errors
    /// It does not run.
    pub fn kernel_status(&self, name: &str) -> anyhow::Result<String> {
        let name = format!("{name}-proxy");
        let process = self.data_plane.iter().find(|p| p.name == name).context("no such proxy runs")?;
        Ok(std::fs::read_to_string(format!("/proc/{}/status", process.id()))?)
    }

    /// Stops a gateway with SIGTERM and waits for its end; answers how long that took.
    ///
    /// # Errors
    /// It does not run, or does not end.
    pub async fn stop_gateway(&mut self, n: usize) -> anyhow::Result<Duration> {
        let name = format!("{}-proxy", gateway_name(n));
        let at = self.data_plane.iter().position(|p| p.name == name).context("no such gateway runs")?;
        self.data_plane.remove(at).terminate(Duration::from_secs(20)).await
    }

    /// Waits until a gateway is ready.
    ///
    /// # Errors
    /// It is not within half a minute.
    pub async fn gateway_ready(&mut self, n: usize) -> anyhow::Result<Duration> {
        let netns = self.gateway_netns(n);
        until(&netns, Duration::from_secs(30), async || {
            for p in &mut self.data_plane {
                p.check()?;
            }
            ready(&netns, "http://127.0.0.1:15021/healthz/ready")
        })
        .await
    }

    fn start_workload(&mut self, w: &Workload) -> anyhow::Result<()> {
        let name = w.name();
        let rules =
            [&*self.flotilla.display().to_string(), "iptables", "--dns-port", "15053"].map(str::to_owned);
        exec(&w.netns, &rules.each_ref().map(String::as_str))?.ok("flotilla iptables")?;
        let mut flags = self.proxy(&name, w.namespace, w.service, &w.ip)?;
        flags.push(format!("--labels=app={},version={}", w.service, w.version));
        flags.push("--dns=127.0.0.1:15053".into());
        self.start_proxy(&name, "sidecar", &w.netns, flags)?;
        // Of a predecessor that was killed.
        let _ = std::fs::remove_file(&w.control);
        let app = [
            self.echo.display().to_string(),
            format!("--workload={}", w.service),
            format!("--version={}", w.version),
            format!("--cluster={}", self.name),
            format!("--control={}", w.control.display()),
        ];
        let command = as_user(&w.netns, APP_UID, app.to_vec());
        let process = Process::start(&format!("{name}-app"), &self.dir.join("logs"), &command)?;
        self.data_plane.push(process);
        Ok(())
    }

    /// Captures a workload's traffic anew, with these flags, and starts its proxy again for it. The workload gets an
    /// IPv6 address beside the other, ending alike.
    ///
    /// # Errors
    /// The rules are refused, or the proxy does not come up.
    pub async fn recapture(&mut self, service: &str, rules: &[&str], tproxy: bool) -> anyhow::Result<()> {
        let w = self.workload(service).clone();
        let name = w.name();
        self.data_plane.retain(|p| p.name != format!("{name}-proxy"));
        let program = self.flotilla.display().to_string();
        let mut all = vec![program.as_str(), "iptables", "--dns-port", "15053"];
        all.extend(rules);
        exec(&w.netns, &all)?.ok("flotilla iptables")?;
        let mut flags = self.proxy(&name, w.namespace, w.service, &w.ip)?;
        flags.push(format!("--labels=app={},version={}", w.service, w.version));
        flags.push("--dns=127.0.0.1:15053".into());
        flags.push(format!("--meta=INSTANCE_IPS={},{}", w.ip, w.ip6()));
        flags.push("--meta=HTTP_PROXY_PORT=15002".into());
        flags.push(format!("--meta=INTERCEPTION_MODE={}", if tproxy { "TPROXY" } else { "REDIRECT" }));
        let mut args = vec![program, "sidecar".to_owned()];
        args.extend(flags);
        let mut command = as_user(&w.netns, PROXY_UID, args);
        if tproxy {
            // Sockets that take connections for foreign addresses.
            let at = command.iter().position(|a| a == "--clear-groups").context("setpriv")?;
            let caps = ["--inh-caps", "+net_admin", "--ambient-caps", "+net_admin"].map(str::to_owned);
            command.splice(at..at, caps);
        }
        let process = Process::start(&format!("{name}-proxy"), &self.dir.join("logs"), &command)?;
        self.data_plane.push(process);
        until(&name, Duration::from_secs(30), async || {
            for p in &mut self.data_plane {
                p.check()?;
            }
            ready(&w.netns, "http://127.0.0.1:15021/healthz/ready")
        })
        .await?;
        Ok(())
    }

    /// Starts a workload's proxy again, as one that registers its workload in a group and says no labels of its own.
    ///
    /// # Errors
    /// The proxy does not come up.
    pub async fn register(&mut self, service: &str, group: &str) -> anyhow::Result<()> {
        let w = self.workload(service).clone();
        let name = w.name();
        self.data_plane.retain(|p| p.name != format!("{name}-proxy"));
        let mut flags = self.proxy(&name, w.namespace, w.service, &w.ip)?;
        flags.push("--dns=127.0.0.1:15053".into());
        flags.push(format!("--register={group}"));
        self.start_proxy(&name, "sidecar", &w.netns, flags)?;
        until(&name, Duration::from_secs(30), async || {
            for p in &mut self.data_plane {
                p.check()?;
            }
            ready(&w.netns, "http://127.0.0.1:15021/healthz/ready")
        })
        .await?;
        Ok(())
    }

    /// Gives the cluster's network IPv6.
    ///
    /// # Errors
    /// The kernel has none.
    pub fn enable_ipv6(&self) -> anyhow::Result<()> {
        let node = self.netns("node");
        let on = |netns: &str, dev: &str, ip: &str| -> anyhow::Result<()> {
            for which in ["all", "default", "lo", dev] {
                must(&format!("ip netns exec {netns} sysctl -qw net.ipv6.conf.{which}.disable_ipv6=0"))?;
            }
            must(&format!("ip -n {netns} -6 addr add {ip}/64 dev {dev} nodad"))?;
            Ok(())
        };
        on(&node, "br0", "fd00:10::1")?;
        for w in &self.workloads {
            on(&w.netns, "eth0", &w.ip6())?;
            must(&format!("ip -n {} -6 route add default via fd00:10::1", w.netns))?;
        }
        Ok(())
    }

    /// Runs a program in a workload's namespace as its application does.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn as_app(&self, service: &str, args: &[&str]) -> anyhow::Result<Said> {
        let w = self.workload(service);
        let all = as_user(&w.netns, APP_UID, args.iter().map(|a| (*a).to_owned()).collect());
        let words: Vec<&str> = all[1..].iter().map(String::as_str).collect();
        programs::run(&all[0], &words)
    }

    /// Starts a server of one page beside a workload, as an application.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_page(&mut self, service: &str, at: &str) -> anyhow::Result<()> {
        let w = self.workload(service).clone();
        let command = as_user(
            &w.netns,
            APP_UID,
            vec![
                self.echo.display().to_string(),
                format!("--workload={service}"),
                format!("--cluster={}", self.name),
                format!("--page={at}"),
            ],
        );
        self.data_plane.push(Process::start(&format!("{service}-page"), &self.dir.join("logs"), &command)?);
        Ok(())
    }

    /// Flags of a proxy, with a directory of its user for token, root and state.
    fn proxy(&self, name: &str, namespace: &str, account: &str, ip: &str) -> anyhow::Result<Vec<String>> {
        let dir = self.dir.join(format!("proxy-{name}"));
        directory(&dir, PROXY_UID)?;
        directory(&dir.join("state"), PROXY_UID)?;
        let args = ["token", "workload", "--namespace", namespace, "--service-account", account];
        let token = self.flotilla(&args)?.ok("token workload")?;
        let root = std::fs::read_to_string(self.state().join("ca/root-cert.pem")).context("root-cert.pem")?;
        for (file, content) in [("token", token), ("root-cert.pem", root)] {
            let path = dir.join(file);
            std::fs::write(&path, content)?;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
            chown(&path, Some(PROXY_UID), Some(PROXY_UID))?;
        }
        Ok([
            ("discovery", format!("{CONTROL_PLANE}:15012")),
            ("root-cert", dir.join("root-cert.pem").display().to_string()),
            ("token-file", dir.join("token").display().to_string()),
            ("ip", ip.to_owned()),
            ("workload", name.to_owned()),
            ("namespace", namespace.to_owned()),
            ("service-account", account.to_owned()),
            ("cluster", self.name.to_owned()),
            ("state-dir", dir.join("state").display().to_string()),
            ("concurrency", "1".to_owned()),
        ]
        .iter()
        .map(|(k, v)| format!("--{k}={v}"))
        .collect())
    }

    fn start_proxy(&mut self, name: &str, role: &str, netns: &str, flags: Vec<String>) -> anyhow::Result<()> {
        let mut args = vec![self.flotilla.display().to_string(), role.to_owned()];
        args.extend(flags);
        let command = as_user(netns, PROXY_UID, args);
        let process = Process::start(&format!("{name}-proxy"), &self.dir.join("logs"), &command)?;
        self.data_plane.push(process);
        Ok(())
    }

    /// Puts a real Envoy in the place of a workload's sidecar, with the sidecar's certificate. Names of
    /// `hosts` go to the workload's hosts file, since the resolver goes with the sidecar.
    ///
    /// # Errors
    /// Envoy cannot be started or gets no configuration.
    pub async fn replace_by_envoy(
        &mut self,
        service: &str,
        envoy: &Path,
        hosts: &[String],
    ) -> anyhow::Result<()> {
        let w = self.workload(service).clone();
        let (name, state) = (w.name(), self.proxy_state(&w));
        let mut names = "127.0.0.1 localhost\n".to_owned();
        for h in hosts {
            let line = exec(&w.netns, &["getent", "ahostsv4", h])?.ok(h)?;
            let ip = line.split_whitespace().next().context("no address")?;
            let _ = writeln!(names, "{ip} {h}");
        }
        self.data_plane.retain(|p| p.name != format!("{name}-proxy"));
        // In place: the workload has this very file mounted.
        std::fs::write(Path::new("/etc/netns").join(&w.netns).join("hosts"), names)?;
        let file = |f: &str| state.join(f).display().to_string();
        let (chain, key, root) = (file("svid-chain.pem"), file("svid-key.pem"), file("root-cert.pem"));
        let source = |f: &str| json!({"filename": f});
        let bootstrap = json!({
            "node": {
                "id": format!("sidecar~{}~{name}.{}~{}.svc.cluster.local", w.ip, w.namespace, w.namespace),
                "cluster": w.service,
                "metadata": {
                    "CLUSTER_ID": self.name, "NETWORK": self.name, "NAMESPACE": w.namespace, "MESH_ID": "mesh.local",
                    "SERVICE_ACCOUNT": w.service, "WORKLOAD_NAME": name, "INTERCEPTION_MODE": "REDIRECT",
                    "INSTANCE_IPS": w.ip, "LABELS": {"app": w.service, "version": w.version},
                    "TLS_CLIENT_CERT_CHAIN": chain, "TLS_CLIENT_KEY": key, "TLS_CLIENT_ROOT_CERT": root,
                }
            },
            "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 15000}}},
            "dynamic_resources": {
                "ads_config": {"api_type": "DELTA_GRPC", "transport_api_version": "V3",
                    "grpc_services": [{"envoy_grpc": {"cluster_name": "xds"}}]},
                "cds_config": {"ads": {}, "resource_api_version": "V3"},
                "lds_config": {"ads": {}, "resource_api_version": "V3"}
            },
            "static_resources": {"clusters": [{
                "name": "xds", "type": "STATIC", "connect_timeout": "2s",
                "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                    "explicit_http_config": {"http2_protocol_options": {}}}},
                "transport_socket": {"name": "tls", "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                    "sni": "control-plane.flotilla-system.svc",
                    "common_tls_context": {
                        "alpn_protocols": ["h2"],
                        // As a client Envoy offers 1.2 at most unless told otherwise.
                        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
                        "tls_certificates": [{"certificate_chain": source(&chain), "private_key": source(&key)}],
                        "validation_context": {"trusted_ca": source(&root)}}}},
                "load_assignment": {"cluster_name": "xds", "endpoints": [{"lb_endpoints": [{"endpoint": {"address":
                    {"socket_address": {"address": CONTROL_PLANE, "port_value": 15012}}}}]}]}
            }]}
        });
        let config = self.dir.join(format!("proxy-{name}/envoy.json"));
        std::fs::write(&config, bootstrap.to_string())?;
        chown(&config, Some(PROXY_UID), Some(PROXY_UID))?;
        let args = [
            public_copy(envoy, &self.dir)?.display().to_string(),
            "-c".into(),
            config.display().to_string(),
            "--concurrency".into(),
            "1".into(),
            "-l".into(),
            "warning".into(),
            "--use-dynamic-base-id".into(),
        ];
        let command = as_user(&w.netns, PROXY_UID, args.to_vec());
        let process = Process::start(&format!("{name}-envoy"), &self.dir.join("logs"), &command)?;
        self.data_plane.push(process);
        until("envoy", Duration::from_secs(30), async || {
            for p in &mut self.data_plane {
                p.check()?;
            }
            ready(&w.netns, "http://127.0.0.1:15000/ready")
        })
        .await?;
        Ok(())
    }

    /// Waits for the control plane.
    ///
    /// # Errors
    /// It is not up within half a minute.
    pub async fn control_plane_ready(&mut self) -> anyhow::Result<()> {
        let netns = self.netns("cp");
        let what = format!("control plane of {}", self.name);
        until(&what, Duration::from_secs(30), async || {
            if let Some(p) = &mut self.control_plane {
                p.check()?;
            }
            ready(&netns, "http://127.0.0.1:15014/ready")
        })
        .await?;
        Ok(())
    }

    /// Waits until every proxy has certificate and configuration.
    ///
    /// # Errors
    /// One has not within half a minute.
    pub async fn data_plane_ready(&mut self) -> anyhow::Result<()> {
        let mut all: Vec<String> = (0..self.gateways).map(|n| self.gateway_netns(n)).collect();
        all.extend(self.workloads.iter().map(|w| w.netns.clone()));
        for netns in all {
            until(&netns, Duration::from_secs(30), async || {
                for p in &mut self.data_plane {
                    p.check()?;
                }
                ready(&netns, "http://127.0.0.1:15021/healthz/ready")
            })
            .await?;
        }
        for w in &self.workloads {
            let what = w.control.display().to_string();
            until(&what, Duration::from_secs(10), async || {
                ensure!(w.control.exists(), "the application is not up");
                Ok(())
            })
            .await?;
        }
        Ok(())
    }
}

fn ready(netns: &str, page: &str) -> anyhow::Result<()> {
    let said = exec(netns, &["curl", "-sS", "-m", "2", "-w", " %{http_code}", page])?;
    ensure!(said.code == 0 && said.out.ends_with(" 200"), "{page}: {}{}", said.out, said.err);
    Ok(())
}

//! Datagrams between clusters: a captured client, a gateway on each side, a trunk between them, and a server that knows
//! nothing of any of that.

use std::{
    net::UdpSocket,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use flotilla_e2e::{
    netns::{Cluster, NAMESPACE, Options, World, exec, socket, until},
    wan::Rule,
};

use crate::{support::scenario, trunk::payload};

/// Ports of the service, and those at which the workload serves them.
const DNS: (u16, u16) = (5300, 5399);
const ECHO: (u16, u16) = (5301, 5398);
const NAME: &str = "answer.example.com";
const SAYS: &str = "192.0.2.77";
const SERVICE: &str = "names.shop.svc.clusterset.local";
const SECRET: &str = "for the eyes of the application alone";
const LIMIT: Duration = Duration::from_secs(40);

fn service(ip: &str, account: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: names, namespace: {NAMESPACE}}}\nspec:\n  \
         selector: {{family: names}}\n  ports:\n  - {{name: dns, port: {}, targetPort: {}, protocol: UDP}}\n  \
         - {{name: echo, port: {}, targetPort: {}, protocol: UDP}}\n---\n\
         apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: names, namespace: \
         {NAMESPACE}}}\nspec:\n  address: '{ip}'\n  serviceAccount: {account}\n  labels: {{family: names, \
         security.istio.io/tlsMode: istio}}\n---\n",
        DNS.0, DNS.1, ECHO.0, ECHO.1
    )
}

fn export() -> String {
    format!(
        "apiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\nmetadata: {{name: names, namespace: \
         {NAMESPACE}}}\n---\n"
    )
}

/// Only `gamma` may.
fn policy() -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: beta, namespace: \
         {NAMESPACE}}}\nspec:\n  selector: {{matchLabels: {{app: beta}}}}\n  action: ALLOW\n  rules:\n  - from: \
         [{{source: {{principals: [mesh.local/ns/{NAMESPACE}/sa/gamma]}}}}]\n    to: [{{operation: {{ports: \
         ['{}']}}}}]\n",
        ECHO.1
    )
}

/// Answers every datagram with a name and the datagram, until it is dropped.
struct Echo {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    fn start(netns: &str, name: &'static str) -> anyhow::Result<Self> {
        let s = socket(netns, &format!("0.0.0.0:{}", ECHO.1))?;
        s.set_read_timeout(Some(Duration::from_millis(100)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut buf = vec![0; 65_536];
            while !stopped.load(Relaxed) {
                let Ok((n, from)) = s.recv_from(&mut buf) else { continue };
                let _ = s.send_to(&[name.as_bytes(), b" ", &buf[..n]].concat(), from);
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// A client's socket: captured as everything of its namespace.
fn client(c: &Cluster, to: &str, port: u16) -> anyhow::Result<UdpSocket> {
    let s = socket(&c.workload("client").netns, "0.0.0.0:0")?;
    s.connect(format!("{to}:{port}"))?;
    s.set_read_timeout(Some(Duration::from_millis(500)))?;
    Ok(s)
}

/// Who answered.
fn ask(s: &UdpSocket, what: &str) -> anyhow::Result<String> {
    s.send(what.as_bytes())?;
    let mut buf = vec![0; 65_536];
    loop {
        let n = s.recv(&mut buf).context("no answer")?;
        let text = String::from_utf8_lossy(&buf[..n]).into_owned();
        // One to a question before may be late.
        if let Some(who) = text.strip_suffix(&format!(" {what}")) {
            return Ok(who.to_owned());
        }
    }
}

/// Round trips of datagrams that are sent at a steady pace, whatever becomes of those before; and how many got none.
fn round_trips(s: &UdpSocket, count: u32, pace: Duration) -> anyhow::Result<(Vec<Duration>, usize)> {
    let begun = Instant::now();
    let sender = s.try_clone()?;
    let thread = std::thread::spawn(move || {
        for i in 0..count {
            std::thread::sleep((begun + pace * i).saturating_duration_since(Instant::now()));
            let sent = begun.elapsed().as_micros() as u64;
            let _ = sender.send(&[&sent.to_be_bytes()[..], SECRET.as_bytes()].concat());
        }
    });
    let mut trips = Vec::new();
    let mut buf = [0; 2048];
    let end = begun + pace * count + Duration::from_secs(2);
    while trips.len() < count as usize && Instant::now() < end {
        let Ok(n) = s.recv(&mut buf) else { continue };
        // "beta ", and then what was sent.
        let Some(at) = buf[..n].get(5..13) else { continue };
        let sent = Duration::from_micros(u64::from_be_bytes(at.try_into()?));
        trips.push(begun.elapsed().saturating_sub(sent));
    }
    thread.join().expect("the sender");
    trips.sort_unstable();
    let lost = count as usize - trips.len();
    Ok((trips, lost))
}

fn at(sorted: &[Duration], percent: usize) -> Duration {
    sorted
        .get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1)))
        .copied()
        .unwrap_or_default()
}

/// Sum of the lines of a proxy's metrics with all these parts.
fn metric(netns: &str, parts: &[&str]) -> anyhow::Result<u64> {
    let page = exec(netns, &["curl", "-sS", "-m", "5", "http://127.0.0.1:15090/stats/prometheus"])?;
    let found = page.out.lines().filter(|l| parts.iter().all(|p| l.contains(p)));
    Ok(found.filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok()).sum())
}

fn dig(c: &Cluster, server: &str, port: u16, name: &str) -> anyhow::Result<String> {
    let (server, port) = (format!("@{server}"), port.to_string());
    let args = ["dig", "+short", "+time=1", "+tries=1", "+notcp", &server, "-p", &port, name];
    Ok(c.as_app("client", &args)?.out.trim().to_owned())
}

fn explain(c: &Cluster) -> anyhow::Result<String> {
    let to = format!("{SERVICE}:{}/udp", ECHO.0);
    Ok(c.flotilla(&["explain", &format!("client-v1.{NAMESPACE}"), &to])?.out)
}

struct Dnsmasq(std::process::Child);

impl Dnsmasq {
    fn start(netns: &str) -> anyhow::Result<Self> {
        let mut c = std::process::Command::new("ip");
        c.args(["netns", "exec", netns, "dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts"])
            .args(["--conf-file=/dev/null", "--pid-file=", "--user=nobody", "--bind-interfaces"])
            .args([&format!("--port={}", DNS.1), &format!("--address=/{NAME}/{SAYS}")]);
        Ok(Self(c.spawn()?))
    }
}

impl Drop for Dnsmasq {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn options(quic: bool, clusters: &[&'static str]) -> Options {
    let workloads = |c: &str| match c {
        "west" => vec![("client", "v1")],
        "east" => vec![("beta", "v1")],
        _ => vec![("beta", "v2")],
    };
    Options {
        echo: env!("CARGO_BIN_EXE_flotilla-echo").into(),
        quic,
        trunk_transport: "quic",
        gateways: 1,
        namespace: |_| NAMESPACE,
        locality: |_| "",
        clusters: clusters.iter().map(|c| (*c, workloads(c))).collect(),
    }
}

/// Gives the client's datagrams to its proxy.
async fn capture(c: &mut Cluster) -> anyhow::Result<()> {
    let flotilla = flotilla_e2e::programs::flotilla()?.display().to_string();
    let netns = c.workload("client").netns.clone();
    exec(&netns, &[flotilla.as_str(), "iptables", "--remove"])?.ok("flotilla iptables --remove")?;
    c.recapture("client", &["--mode", "TPROXY", "--udp-ranges", "240.240.0.0/16"], true).await
}

/// The service's address for callers of this cluster.
async fn address(c: &Cluster) -> anyhow::Result<String> {
    let mut vip = String::new();
    until("the service has a name", LIMIT, async || {
        vip = dig(c, "10.10.0.1", 53, SERVICE)?;
        ensure!(vip.starts_with("240.240."), "{vip:?}");
        Ok(())
    })
    .await?;
    Ok(vip)
}

#[test]
#[ignore = "needs root and network namespaces"]
fn datagrams_reach_services_of_other_clusters() {
    scenario("UDP between clusters", async || {
        let mut world = World::start(&options(true, &["west", "east", "north"])).await?;
        let far = world.clusters[1].workload("beta").clone();
        let other = world.clusters[2].workload("beta").clone();
        let (_dns, _echo) = (Dnsmasq::start(&far.netns)?, Echo::start(&far.netns, "beta")?);
        world.clusters[1].write("names.yaml", &service(&far.ip, "beta"))?;
        let caller = world.clusters[0].workload("client").netns.clone();
        capture(&mut world.clusters[0]).await?;

        // Nobody hears of what is not exported.
        tokio::time::sleep(Duration::from_secs(2)).await;
        ensure!(
            dig(&world.clusters[0], "10.10.0.1", 53, SERVICE)?.is_empty(),
            "it has a name before it is exported"
        );
        // Whoever guesses a name is refused by the far gateway, and told so: `unrecognized_name`.
        let name = format!("outbound_.{}_._.names.{NAMESPACE}.svc.east.clusterset.local", ECHO.0);
        until("the far gateway refuses the name", LIMIT, async || {
            let said = asked_by_a_stranger(&world.clusters[0], &name).await?;
            ensure!(said == "0x170", "{said}");
            Ok(())
        })
        .await?;
        world.clusters[1].write("export.yaml", &export())?;
        let vip = address(&world.clusters[0]).await?;
        let took = until("dig gets an answer from east", LIMIT, async || {
            let said = dig(&world.clusters[0], &vip, DNS.0, NAME)?;
            ensure!(said == SAYS, "{said:?}");
            Ok(())
        })
        .await?;
        // Now there is somebody who shows a certificate, which a stranger does not know.
        let said = asked_by_a_stranger(&world.clusters[0], &name).await?;
        ensure!(said.contains("certificate"), "{said}");
        let explained = explain(&world.clusters[0])?;
        ensure!(explained.contains("Requests get there: east"), "{explained}");
        println!("   dig @{vip} -p {}: {SAYS}, {} ms after the name", DNS.0, took.as_millis());
        let s = client(&world.clusters[0], &vip, ECHO.0)?;
        ensure!(ask(&s, "hello")? == "beta");
        // Longer than a packet, and empty.
        for what in ["x".repeat(4_000), "y".repeat(20_000), String::new()] {
            ensure!(ask(&s, &what)? == "beta", "{} bytes", what.len());
        }

        // What the wire shows.
        let pcap = world.dir.join("udp.pcap");
        world.wan.capture(&pcap)?;
        for i in 0..200 {
            ensure!(ask(&s, &format!("{SECRET} {i}"))? == "beta");
        }
        world.wan.end_capture()?;
        let seen = std::fs::read(&pcap)?;
        let (udp, tcp) = payload(&seen)?;
        ensure!(
            !seen.windows(SECRET.len()).any(|w| w == SECRET.as_bytes()),
            "the payload is on the wire in clear"
        );
        // What control planes say to each other may still be on a connection of TCP from when they joined.
        ensure!(udp > 400 * SECRET.len() && tcp < 1_000, "{udp} bytes by UDP, {tcp} by TCP");
        println!("   200 questions and answers on the link: {udp} bytes by UDP, {tcp} by TCP, none in clear");

        // Nobody waits for a datagram that is lost.
        let delay = Rule { delay: Duration::from_millis(20), ..Rule::CLEAN };
        world.wan.set_all(delay);
        let (clean, lost) = round_trips(&s, 1_000, Duration::from_millis(2))?;
        println!(
            "   20 ms each way:          p50 {:.1} ms, p99 {:.1} ms, {lost} of 1000 lost",
            ms(at(&clean, 50)),
            ms(at(&clean, 99))
        );
        ensure!(lost < 5, "{lost} lost where nothing is");
        world.wan.set_all(Rule { loss: 0.01, ..delay });
        let (lossy, lost) = round_trips(&s, 2_000, Duration::from_millis(2))?;
        println!(
            "   and 1 % loss each way:   p50 {:.1} ms, p99 {:.1} ms, worst {:.1} ms, {lost} of 2000 lost",
            ms(at(&lossy, 50)),
            ms(at(&lossy, 99)),
            ms(at(&lossy, 100))
        );
        ensure!((5..200).contains(&lost), "{lost} lost");
        // A round trip more is what waiting for a repetition would cost at least, and at this rate each loss would hold up
        // the twenty datagrams behind it: a fifth of all. (Congestion control may still hold up one in a hundred.)
        let limit = at(&clean, 50) + Duration::from_millis(40);
        ensure!(at(&lossy, 95) < limit, "p95 {:?}, p50 without loss {:?}", at(&lossy, 95), at(&clean, 50));
        world.wan.set_all(Rule::CLEAN);

        // A rule about the caller, which only the far proxy knows, and about one of the two ports.
        world.clusters[1].write("policy.yaml", &policy())?;
        let mut denied = 0;
        until("client is denied", LIMIT, async || {
            ensure!(ask(&s, "may I").is_err(), "it is answered");
            denied = metric(&caller, &["flotilla_udp_dropped_total", "kind=\"denied\""])?;
            ensure!(denied > 0, "nothing was counted as denied");
            Ok(())
        })
        .await?;
        for _ in 0..3 {
            ensure!(
                ask(&client(&world.clusters[0], &vip, ECHO.0)?, "and I").is_err(),
                "another one is answered"
            );
        }
        world.clusters[1].remove("policy.yaml")?;
        let took = until("client is let in again", LIMIT, async || ask(&s, "and now").map(drop)).await?;
        println!(
            "   denied by the far proxy ({denied} datagrams), let in again after {} ms",
            took.as_millis()
        );

        // Another cluster exports it, too; the first dies.
        let _north = Echo::start(&other.netns, "north")?;
        world.clusters[2].write("names.yaml", &(service(&other.ip, "beta") + &export()))?;
        until("both answer", LIMIT, async || {
            let mut who: Vec<String> = Vec::new();
            for _ in 0..8 {
                who.push(ask(&client(&world.clusters[0], &vip, ECHO.0)?, "who")?);
            }
            ensure!(who.iter().any(|w| w == "beta") && who.iter().any(|w| w == "north"), "{who:?}");
            Ok(())
        })
        .await?;
        let mut clients = Vec::new();
        while clients.len() < 4 {
            let c = client(&world.clusters[0], &vip, ECHO.0)?;
            if ask(&c, "who")? == "beta" {
                clients.push(c);
            }
        }
        world.clusters[1].kill_everything();
        let begun = Instant::now();
        let mut worst = Duration::ZERO;
        for c in &clients {
            loop {
                if ask(c, "still there").is_ok_and(|w| w == "north") {
                    break;
                }
                ensure!(begun.elapsed() < LIMIT, "a client of east is not answered by north");
            }
            worst = worst.max(begun.elapsed());
        }
        println!("   east killed: its clients are answered by north after {} ms", worst.as_millis());
        ensure!(worst < Duration::from_secs(10));

        // The last way is gone: it is said, and nothing leaves in clear.
        world.clusters[2].remove("names.yaml")?;
        until("nobody answers what nobody exports", LIMIT, async || {
            ensure!(ask(&clients[0], "anybody").is_err());
            Ok(())
        })
        .await?;
        Ok(())
    });
}

/// A path that is too narrow for a connection inside of the trunk: counted, and said with what to do.
#[test]
#[ignore = "needs root and network namespaces"]
fn a_path_that_is_too_narrow_is_named() {
    scenario("UDP over a narrow path", async || {
        let mut world = World::start(&options(true, &["west", "east"])).await?;
        let far = world.clusters[1].workload("beta").clone();
        let _echo = Echo::start(&far.netns, "beta")?;
        world.clusters[1].write("names.yaml", &(service(&far.ip, "beta") + &export()))?;
        capture(&mut world.clusters[0]).await?;
        for c in &mut world.clusters {
            let gw = c.gateway_netns(0);
            exec(&gw, &["ip", "link", "set", "wan0", "mtu", "1250"])?.ok("ip link set mtu")?;
            c.stop_gateway(0).await?;
            c.start_gateway(0)?;
            c.gateway_ready(0).await?;
        }
        let west = &world.clusters[0];
        let vip = address(west).await?;
        let s = client(west, &vip, ECHO.0)?;
        until("the gateway names the path", LIMIT, async || {
            ensure!(ask(&s, SECRET).is_err(), "it is answered through a path of 1250 bytes");
            ensure!(
                west.log("eastwest-proxy").contains("must let IP packets of 1300 bytes"),
                "nothing is said"
            );
            Ok(())
        })
        .await?;
        let counted = metric(&west.gateway_netns(0), &["flotilla_udp_dropped_total", "kind=\"too_large\""])?;
        let dropped = metric(&west.workload("client").netns, &["flotilla_udp_dropped_total", "|5301/udp|"])?;
        ensure!(
            counted > 0 && dropped > 0,
            "{counted} counted by the gateway, {dropped} by the caller's proxy"
        );
        println!(
            "   {counted} packets too large for the trunk, {dropped} datagrams dropped by the caller's proxy"
        );
        Ok(())
    });
}

/// What the own gateway answers to a connection of a stranger's that asks for this name.
async fn asked_by_a_stranger(c: &Cluster, name: &str) -> anyhow::Result<String> {
    let s = socket(&c.workload("client").netns, "0.0.0.0:0")?;
    let mut tls = rustls::ClientConfig::builder_with_provider(mesh_identity::crypto_provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    tls.alpn_protocols = vec![mesh_model::proxy::UDP_ALPN.into()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls)?;
    let endpoint = quinn::Endpoint::new(Default::default(), None, s, Arc::new(quinn::TokioRuntime))?;
    let config = quinn::ClientConfig::new(Arc::new(crypto));
    let connecting = endpoint.connect_with(config, "10.10.0.3:15444".parse()?, name)?;
    match tokio::time::timeout(Duration::from_secs(5), connecting).await {
        Ok(Ok(_)) => anyhow::bail!("a stranger was let in"),
        Ok(Err(quinn::ConnectionError::ConnectionClosed(c))) => Ok(format!("{:#x}", u64::from(c.error_code))),
        Ok(Err(e)) => Ok(e.to_string()),
        Err(_) => Ok("nothing".to_owned()),
    }
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

/// A cluster that nobody can dial is reached on the connection that it dialled; a network that drops UDP ends that, and
/// nothing takes another way.
#[test]
#[ignore = "needs root and network namespaces"]
fn datagrams_reach_a_cluster_behind_nat_while_udp_passes() {
    scenario("UDP to a cluster behind NAT", async || {
        let mut world = World::start_hidden(&options(true, &["west", "east"]), &["east"]).await?;
        let far = world.clusters[1].workload("beta").clone();
        let _echo = Echo::start(&far.netns, "beta")?;
        world.clusters[1].write("names.yaml", &(service(&far.ip, "beta") + &export()))?;
        capture(&mut world.clusters[0]).await?;
        let vip = address(&world.clusters[0]).await?;
        let s = client(&world.clusters[0], &vip, ECHO.0)?;
        until("an answer", LIMIT, async || ask(&s, "hello").map(drop)).await?;
        for i in 0..50 {
            ensure!(ask(&s, &i.to_string())? == "beta");
        }
        println!("   50 answers of a cluster that nobody can dial");
        let pcap = world.dir.join("cut.pcap");
        world.wan.capture(&pcap)?;
        world.wan.set_all(Rule { no_udp: true, ..Rule::CLEAN });
        ensure!(ask(&s, SECRET).is_err(), "it is answered without a way");
        tokio::time::sleep(Duration::from_secs(5)).await;
        ensure!(ask(&s, SECRET).is_err(), "it is answered without a way");
        world.wan.end_capture()?;
        let seen = std::fs::read(&pcap)?;
        ensure!(!seen.windows(SECRET.len()).any(|w| w == SECRET.as_bytes()), "it took another way, in clear");
        world.wan.set_all(Rule::CLEAN);
        let took = until("UDP passes again", LIMIT, async || ask(&s, "hello").map(drop)).await?;
        println!("   UDP was dropped and passes again: an answer after {:.1} s", took.as_secs_f64());
        Ok(())
    });
}

/// Gateways that talk over TCP carry no datagrams, and say so.
#[test]
#[ignore = "needs root and network namespaces"]
fn datagrams_need_the_trunk_and_whoever_lacks_it_is_told() {
    scenario("UDP without a trunk", async || {
        let mut world = World::start(&options(false, &["west", "east"])).await?;
        let far = world.clusters[1].workload("beta").clone();
        let _echo = Echo::start(&far.netns, "beta")?;
        world.clusters[1].write("names.yaml", &(service(&far.ip, "beta") + &export()))?;
        capture(&mut world.clusters[0]).await?;
        let west = &world.clusters[0];
        let vip = address(west).await?;
        let pcap = world.dir.join("tcp.pcap");
        world.wan.capture(&pcap)?;
        let s = client(west, &vip, ECHO.0)?;
        for _ in 0..6 {
            ensure!(ask(&s, SECRET).is_err(), "it is answered without a trunk");
        }
        world.wan.end_capture()?;
        let seen = std::fs::read(&pcap)?;
        ensure!(!seen.windows(SECRET.len()).any(|w| w == SECRET.as_bytes()), "it is on the wire in clear");
        let refused = metric(&west.gateway_netns(0), &["flotilla_udp_dropped_total", "kind=\"no_trunk\""])?;
        ensure!(refused > 0, "the gateway counted nothing");
        let dropped = metric(&west.workload("client").netns, &["flotilla_udp_dropped_total", "|5301/udp|"])?;
        ensure!(dropped > 0, "the caller's proxy counted nothing");
        let said = west.log("eastwest-proxy").matches("it needs the QUIC trunk").count();
        ensure!(said == 1, "the gateway said {said} times why");
        let explained = explain(west)?;
        ensure!(explained.contains("UDP needs the QUIC trunk"), "{explained}");
        println!(
            "   refused {refused} connections, said once why; {dropped} datagrams dropped by the caller's proxy"
        );
        Ok(())
    });
}

//! What TLS the ingress takes from the internet: every version and every suite that the local openssl can offer, and what
//! testssl.sh says of it.

use std::{
    collections::BTreeSet,
    io::Write as _,
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::{
    gateway,
    support::{Authority, Cluster, HttpServer, Outcome, SYSTEM, run, service, until_status},
    virtual_service,
};

/// TLS 1.3, and of TLS 1.2 what encrypts with authentication under keys that are gone afterwards.
const TLS13: [&str; 3] = ["TLS_AES_256_GCM_SHA384", "TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256"];
const TLS12: [&str; 3] = ["AES256-GCM-SHA384", "AES128-GCM-SHA256", "CHACHA20-POLY1305"];

/// What testssl.sh finds worth more than a note, and why it stays.
const FOUND: [(&str, &str); 2] = [
    ("cipher_order", "of suites that are all good a client without hardware for AES may choose ChaCha20"),
    ("secure_renego", "its own client finds no suite; openssl's, in the other test, sees the extension"),
];

struct Ingress {
    cluster: Cluster,
    _app: HttpServer,
    at: SocketAddr,
}

impl Ingress {
    /// `ec.example` and `rsa.example`, which has an intermediate, behind one address.
    fn start() -> Self {
        let mut cluster = Cluster::founded();
        let app = HttpServer::start((cluster.workload(1), 9080).into(), "shop");
        let credentials = cluster.credentials();
        let authority = Authority::new("public");
        authority.write_root(&cluster.path("ec-root.pem"));
        authority.issue(&credentials.join("ec"), "ec.example");
        rsa_chain(&cluster.path("rsa"), &credentials.join("rsa"));
        cluster.write("shop.yaml", &service("shop", cluster.workload(1), app.address.port(), ""));
        let server = |name: &str| {
            format!(
                "  - port: {{number: 8443, name: {name}, protocol: HTTPS}}\n    hosts: [{name}.example]\n    \
                 tls: {{mode: SIMPLE, credentialName: {name}}}\n"
            )
        };
        let route = format!(
            "  hosts: [ec.example, rsa.example]\n  gateways: [{SYSTEM}/edge]\n  http:\n  \
             - route:\n    - destination: {{host: shop, port: {{number: 9080}}}}\n"
        );
        let servers = [server("ec"), server("rsa")].concat();
        cluster.write(
            "edge.yaml",
            &[gateway("edge", "ingress", &servers), virtual_service("shop", &route)].concat(),
        );
        let ip = cluster.host(2);
        cluster.gateway("ingress", ip, &[]);
        let at = SocketAddr::from((ip, 8443));
        for name in ["ec.example", "rsa.example"] {
            let (to, url) = (crate::resolve(name, at), format!("https://{name}:8443/"));
            until_status("the ingress", 200, &["-k", "--resolve", &to, &url]);
        }
        Self { cluster, _app: app, at }
    }

    /// One handshake, with what is typed in it.
    fn handshake(&self, flags: &[&str], typed: &str) -> Outcome {
        let mut child = Command::new("openssl")
            .args(["s_client", "-connect", &self.at.to_string()])
            .args(flags)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Its end ends the connection.
        child.stdin.take().unwrap().write_all(typed.as_bytes()).unwrap();
        let o = child.wait_with_output().unwrap();
        let text = |b: Vec<u8>| String::from_utf8_lossy(&b).into_owned();
        Outcome { code: o.status.code().unwrap_or(-1), out: text(o.stdout), err: text(o.stderr) }
    }
}

/// Root, intermediate and `rsa.example` with RSA keys; the certificate is served with its intermediate.
fn rsa_chain(work: &Path, credentials: &Path) {
    std::fs::create_dir_all(work).unwrap();
    std::fs::create_dir_all(credentials).unwrap();
    let openssl = |line: &str| {
        let line = line.replace('@', &format!("{}/", work.display()));
        let o = run("openssl", &line.split_whitespace().collect::<Vec<_>>());
        assert_eq!(o.code, 0, "{line}: {o:?}");
    };
    let new = "req -newkey rsa:2048 -nodes";
    openssl(&format!("{new} -x509 -days 2 -subj /CN=root -keyout @root.key -out @root.crt"));
    let mut issuer = "root";
    for (name, extensions) in [
        ("middle", "basicConstraints=critical,CA:TRUE,pathlen:0\nkeyUsage=keyCertSign,cRLSign"),
        (
            "leaf",
            "subjectAltName=DNS:rsa.example\nextendedKeyUsage=serverAuth\nkeyUsage=digitalSignature,keyEncipherment",
        ),
    ] {
        std::fs::write(work.join("ext"), extensions).unwrap();
        openssl(&format!("{new} -subj /CN={name} -keyout @{name}.key -out @{name}.csr"));
        openssl(&format!(
            "x509 -req -in @{name}.csr -CA @{issuer}.crt -CAkey @{issuer}.key -CAcreateserial -days 2 -extfile @ext \
             -out @{name}.crt"
        ));
        issuer = name;
    }
    let read = |name: &str| std::fs::read_to_string(work.join(name)).unwrap();
    std::fs::write(credentials.join("tls.crt"), read("leaf.crt") + &read("middle.crt")).unwrap();
    std::fs::write(credentials.join("tls.key"), read("leaf.key")).unwrap();
}

#[test]
#[ignore = "needs the flotilla binary and testssl.sh; cargo verify builds and installs them"]
fn ingress_takes_modern_tls_alone() {
    let i = Ingress::start();
    let (at, json) = (i.at, i.cluster.path("found.json").display().to_string());
    // Both take their time, and neither minds the other.
    let beside = std::thread::spawn(move || testssl_finds_nothing_at_the_ingress(at, &json));
    every_suite(&i);
    beside.join().expect("testssl.sh found nothing");
}

fn every_suite(i: &Ingress) {
    let all = run("openssl", &["ciphers", "ALL:COMPLEMENTOFALL:@SECLEVEL=0"]).out;
    let all: Vec<&str> = all.trim().split(':').collect();
    assert!(all.len() > 60, "openssl offers too little for this to say anything: {all:?}");
    for (host, signed) in [("ec.example", "ECDHE-ECDSA-"), ("rsa.example", "ECDHE-RSA-")] {
        let mut taken = BTreeSet::new();
        let mut unsaid = BTreeSet::new();
        for &suite in &all {
            let old = format!("{suite}:@SECLEVEL=0");
            let mut flags = vec!["-servername", host];
            if suite.starts_with("TLS_") {
                flags.extend(["-tls1_3", "-ciphersuites", suite]);
            } else {
                // Some need something that both sides know.
                flags.extend(["-tls1_2", "-cipher", &old, "-psk", "00112233"]);
            }
            if suite.starts_with("SRP") {
                flags.extend(["-srpuser", "user", "-srppass", "pass:word"]);
            }
            let o = i.handshake(&flags, "");
            if o.out.contains(&format!("Cipher is {suite}\n")) {
                taken.insert(suite.to_owned());
            } else if !o.err.contains("alert") {
                unsaid.insert(suite);
            }
        }
        let wanted = TLS12.map(|s| format!("{signed}{s}"));
        let wanted: BTreeSet<String> = wanted.into_iter().chain(TLS13.map(str::to_owned)).collect();
        assert_eq!(taken, wanted, "{host}");
        // The others it refused itself: they were offered.
        assert_eq!(unsaid, BTreeSet::new(), "{host}");
        eprintln!("{host}: {} of {} suites are taken", taken.len(), all.len());
        for version in ["-tls1", "-tls1_1"] {
            let o = i.handshake(&["-servername", host, version, "-cipher", "ALL:@SECLEVEL=0"], "");
            assert!(o.code != 0 && o.err.contains("alert"), "{host} {version}: {o:?}");
        }
        for version in ["-tls1_2", "-tls1_3"] {
            let o = i.handshake(&["-servername", host, version], "");
            assert!(o.code == 0 && o.out.contains("Compression: NONE"), "{host} {version}: {o:?}");
            assert!(o.out.contains("Server Temp Key: X25519"), "{host} {version}: {o:?}");
        }
        // A second handshake in a connection fails, and the extension says that none can be slipped in.
        let o = i.handshake(&["-servername", host, "-tls1_2"], "R\n");
        assert!(o.code != 0 && o.err.contains("RENEGOTIATING"), "{host}: {o:?}");
        assert!(o.err.contains("no renegotiation"), "{host}: nobody answered: {o:?}");
        assert!(o.out.contains("Secure Renegotiation IS supported"), "{host}: {o:?}");
    }

    // Certificates as they were configured, the intermediate with its leaf, and the root not.
    let root = i.cluster.path("rsa/root.crt").display().to_string();
    let o = i.handshake(
        &["-servername", "rsa.example", "-showcerts", "-CAfile", &root, "-verify_return_error"],
        "",
    );
    let shown: Vec<&str> = o.out.lines().map(str::trim).filter(|l| l.starts_with("i:CN")).collect();
    assert_eq!((o.code, shown), (0, vec!["i:CN = middle", "i:CN = root"]), "{o:?}");

    // Who names nobody, or somebody else, gets no certificate at all.
    for flags in [&["-servername", "other.example"][..], &["-noservername"]] {
        let o = i.handshake(flags, "");
        assert!(o.code != 0 && o.out.contains("no peer certificate available"), "{flags:?}: {o:?}");
    }

    // A session is resumed by the name that it is of, and by no other.
    let session = i.cluster.path("session").display().to_string();
    for version in ["-tls1_2", "-tls1_3"] {
        // TLS 1.3 hands tickets out after the handshake: a request makes the client read on.
        let request = "GET / HTTP/1.1\r\nhost: ec.example\r\nconnection: close\r\n\r\n";
        let first = ["-servername", "ec.example", version, "-ign_eof", "-sess_out", &session];
        let o = i.handshake(&first, request);
        assert!(o.code == 0 && o.out.contains("New, TLSv1"), "{version}: {o:?}");
        let again = |host: &str| i.handshake(&["-servername", host, version, "-sess_in", &session], "");
        let o = again("ec.example");
        assert!(o.out.contains("Reused, TLSv1"), "{version}: {o:?}");
        let o = again("rsa.example");
        assert!(!o.out.contains("Reused, TLSv1"), "{version}: {o:?}");
    }
}

fn testssl_finds_nothing_at_the_ingress(at: SocketAddr, json: &str) {
    let host = "rsa.example";
    let (ip, to) = (format!("--ip={}", at.ip()), format!("{host}:{}", at.port()));
    let quiet = ["--quiet", "--color", "0", "--warnings", "batch", "--jsonfile", json, &ip];
    let checks = ["--protocols", "--std", "--fs", "--server-preference", "--vulnerable", &to];
    let o = run("testssl", &[&quiet[..], &checks].concat());
    let text = std::fs::read_to_string(json).unwrap_or_else(|e| panic!("{e}: {o:?}"));
    let found: Vec<Value> = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let of = |id: &str| {
        let mut all = found.iter().filter(|f| f["id"] == id);
        all.next().map_or("", |f| f["finding"].as_str().unwrap_or_default())
    };
    // It has seen what there is to see.
    let seen = ["SSLv2", "SSLv3", "TLS1", "TLS1_1", "TLS1_2", "TLS1_3"].map(|v| of(v).starts_with("offered"));
    assert_eq!(seen, [false, false, false, false, true, true], "{text}");
    assert!(found.len() > 40 && of("ROBOT").starts_with("not vulnerable"), "{text}");
    // What has no address is about the tool's own OpenSSL.
    let ours = found.iter().filter(|f| f["ip"] != "/");
    let serious = ours.filter(|f| !["OK", "INFO"].iter().any(|s| f["severity"] == *s));
    let serious: BTreeSet<&str> =
        serious.inspect(|f| eprintln!("{host}: {f}")).filter_map(|f| f["id"].as_str()).collect();
    assert_eq!(serious, FOUND.iter().map(|(id, _)| *id).collect(), "{host}");
    eprintln!("{host}: {} findings of testssl.sh; those that are more than notes are known", found.len());
}

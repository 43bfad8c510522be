//! Whole processes: a trust domain's bundle over HTTPS (SPIFFE Federation), asked for by ours and by SPIFFE's own library,
//! and what becomes of a domain that is known by its bundle alone.

#[expect(dead_code, unused_imports, reason = "what is shared is more than this test uses")]
mod support;

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::Value;

use crate::support::*;

const ENDPOINT: &str = "spiffe://a.example/ns/flotilla-system/sa/control-plane";

/// The mesh of `a.example`, which serves its bundle under both profiles, and the authority of its web certificate.
struct Served {
    a: Cluster,
    spiffe: String,
    web: String,
    authority: String,
}

impl Served {
    fn start() -> Self {
        let mut urls = (String::new(), String::new(), String::new());
        let a = Cluster::start_after_in("west", "a.example", |c| {
            let ip = c.host(1);
            let authority = Authority::new("web");
            let (cert, key) = authority.issue(&c.path("web"), &ip.to_string());
            urls = (
                format!("https://{ip}:15017/"),
                format!("https://{ip}:15018/"),
                authority.write_root(&c.path("web/root.pem")),
            );
            vec![
                format!("--bundle-endpoint={ip}:15017"),
                format!("--bundle-endpoint-web={ip}:15018"),
                format!("--bundle-endpoint-cert={cert}"),
                format!("--bundle-endpoint-key={key}"),
            ]
        });
        a.found();
        Self { a, spiffe: urls.0, web: urls.1, authority: urls.2 }
    }

    /// A file with the bundle as it is now.
    fn held(&self, form: &str, name: &str) -> String {
        let path = self.a.path(name);
        std::fs::write(&path, ok(&self.a, &["ca", "bundle", "-o", form])).unwrap();
        path.display().to_string()
    }

    fn pins(&self) -> Vec<String> {
        let v: Value = serde_json::from_str(&ok(&self.a, &["ca", "show", "-o", "json"])).unwrap();
        let roots = v["roots"].as_array().unwrap().clone();
        roots.iter().map(|r| r["pin"].as_str().unwrap().to_owned()).collect()
    }
}

fn ok(c: &Cluster, args: &[&str]) -> String {
    let o = c.flotilla(args);
    assert_eq!(o.code, 0, "{args:?}: {o:?}");
    o.out
}

/// What a cluster knows of `a.example`.
fn known(c: &Cluster) -> Value {
    let v: Value = serde_json::from_str(&ok(c, &["clusters", "-o", "json"])).unwrap();
    let all = v["trustBundles"].as_array().unwrap().clone();
    all.into_iter().find(|b| b["trustDomain"] == "a.example").unwrap_or_default()
}

fn document(url: &str, profile: &str, bundle: &str) -> String {
    let bundle = bundle.lines().fold(String::new(), |all, l| format!("{all}    {l}\n"));
    format!(
        "apiVersion: flotilla.dev/v1alpha1\nkind: FederatedTrustDomain\nmetadata: {{name: a}}\nspec:\n  trustDomain: \
         a.example\n  bundleEndpointURL: {url}\n{profile}  trustDomainBundle: |\n{bundle}"
    )
}

#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn a_bundle_is_served_and_followed_through_a_rotation() {
    let s = Served::start();
    let pins = s.pins();
    let pem = s.held("pem", "held.pem");
    let of = |more: &[&str]| {
        let args = [&["ca", "bundle", "--trust-domain", "a.example"][..], more].concat();
        s.a.flotilla(&args)
    };
    let o = of(&["--from", &s.web, "--web-roots", &s.authority]);
    assert!(o.code == 0 && o.out.contains(&pins[0]) && o.out.contains("every 1 s"), "{o:?}");
    let spiffe = ["--from", &s.spiffe, "--bundle", &pem, "--endpoint-spiffe-id"];
    let o = of(&[&spiffe[..], &[ENDPOINT]].concat());
    assert!(o.code == 0 && o.out.contains(&pins[0]), "{o:?}");
    // Each proves itself in its own way alone, and for one name.
    for wrong in [
        &["--from", &s.spiffe, "--web-roots", &s.authority][..],
        &[&spiffe[..], &["spiffe://a.example/ns/books/sa/reviews"]].concat(),
        &["--from", &s.web, "--bundle", &pem, "--endpoint-spiffe-id", ENDPOINT],
    ] {
        let o = of(wrong);
        assert!(o.code != 0 && o.out.is_empty(), "{wrong:?}: {o:?}");
    }
    // Strangers are told nothing else, and need no certificate.
    let web = ["--cacert", s.authority.as_str()];
    for (more, status) in [(&[""; 0][..], 200), (&["-X", "POST"], 405), (&["-I"], 200)] {
        assert_eq!(curl(&[&web[..], more, &[&s.web]].concat()).status, status, "{more:?}");
    }
    assert_eq!(curl(&[&web[..], &[&format!("{}x", s.web)]].concat()).status, 404);

    // Another mesh that is told of it by a document, and follows.
    let bundle = std::fs::read_to_string(&pem).unwrap();
    let profile =
        format!("  bundleEndpointProfile: {{type: https_spiffe, endpointSPIFFEID: '{ENDPOINT}'}}\n");
    let mut b = Cluster::start_after_in("north", "b.example", |c| {
        c.write("a.yaml", &document(&s.spiffe, &profile, &bundle));
        vec![]
    });
    b.found();
    let follows = |b: &Cluster, what: &str, roots: usize, sequence: u64| {
        until(what, || {
            let k = known(b);
            let so =
                k["roots"] == roots && k["sequence"] == sequence && k["error"] == "" && k["byBundle"] == true;
            if so && k["confirmedAgeSeconds"].is_u64() { Ok(()) } else { Err(format!("{k:#}")) }
        });
    };
    follows(&b, "the bundle is told", 1, 1);
    ok(&s.a, &["ca", "rotate", "prepare"]);
    follows(&b, "while the root is replaced it has both", 2, 2);
    let both = s.pins();
    until("the new root may sign", || {
        let o = s.a.flotilla(&["ca", "rotate", "activate"]);
        if o.code == 0 { Ok(()) } else { Err(format!("{o:?}")) }
    });
    // From here on the endpoint shows a certificate under a root that was not in the document.
    follows(&b, "the new root signs", 2, 3);
    until("the old root goes", || {
        let o = s.a.flotilla(&["ca", "rotate", "finish"]);
        if o.code == 0 { Ok(()) } else { Err(format!("{o:?}")) }
    });
    follows(&b, "the old root is gone", 1, 4);
    assert_ne!(both[0], s.pins()[0]);
    let text = ok(&b, &["clusters"]);
    assert!(text.contains("a.example, known by its bundle alone"), "{text}");

    // An endpoint that is away costs nothing, also over a restart, in which the document's root would open nothing.
    let Served { mut a, .. } = s;
    a.kill("control-plane");
    until("the endpoint is away", || {
        let k = known(&b);
        if k["error"] != "" && k["roots"] == 1 { Ok(()) } else { Err(format!("{k:#}")) }
    });
    b.kill("control-plane");
    b.control_plane();
    until("what was told is kept", || {
        let k = known(&b);
        if k["sequence"] == 4 && k["roots"] == 1 { Ok(()) } else { Err(format!("{k:#}")) }
    });
    let doctor = b.flotilla(&["doctor"]);
    assert!(doctor.out.contains("trust bundle of a.example"), "{doctor:?}");
    // What is no longer declared is forgotten.
    b.remove("a.yaml");
    until("it is forgotten", || {
        let k = known(&b);
        if k.is_null() { Ok(()) } else { Err(format!("{k:#}")) }
    });
}

/// go-spiffe, built from `foreign/bundle`.
fn foreign() -> PathBuf {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("foreign-bundle");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("foreign/bundle");
    let built = Command::new("go").arg("build").arg("-o").arg(&program).current_dir(source).status();
    assert!(built.expect("go, see `cargo verify`").success());
    program
}

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "needs the flotilla binary and Go; cargo verify builds and installs them"]
fn go_spiffe_reads_our_endpoints_and_we_read_its() {
    let s = Served::start();
    let program = foreign();
    let pins = s.pins();
    let held = s.held("spiffe", "held.json");
    let told = format!("sequence 1\nhint 1\nroot {}\n", pins[0]);
    let o = run(&program, &["web", "a.example", &s.web, &s.authority]);
    assert_eq!((o.code, o.out.as_str()), (0, told.as_str()), "{o:?}");
    let o = run(&program, &["spiffe", "a.example", &s.spiffe, &held, ENDPOINT]);
    assert_eq!((o.code, o.out.as_str()), (0, told.as_str()), "{o:?}");
    let o = run(&program, &["spiffe", "a.example", &s.spiffe, &held, "spiffe://a.example/other"]);
    assert_ne!(o.code, 0, "{o:?}");
    ok(&s.a, &["ca", "rotate", "prepare"]);
    let o = run(&program, &["spiffe", "a.example", &s.spiffe, &held, ENDPOINT]);
    assert!(s.pins().len() == 2 && s.pins().iter().all(|p| o.out.contains(p.as_str())), "{o:?}");

    // The other way round: its handler, under a certificate of the web.
    let authority = Authority::new("foreign");
    let roots = authority.write_root(&s.a.path("foreign.pem"));
    let (cert, key) = authority.issue(&s.a.path("foreign"), "127.0.0.1");
    let mut child = Command::new(program)
        .args(["serve", "a.example", &held, &cert, &key])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut address = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
    let _process = Process(child);
    let url = format!("https://{}/", address.trim());
    let out = ok(
        &s.a,
        &[
            "ca",
            "bundle",
            "--from",
            &url,
            "--trust-domain",
            "a.example",
            "--web-roots",
            &roots,
            "-o",
            "spiffe",
        ],
    );
    assert_eq!(out, std::fs::read_to_string(&held).unwrap());
}

//! `flotilla analyze` as operators and scripts see it.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

const WRONG: &str = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: v, namespace: books}\nspec: {hosts: [a], http: [{route: [{destination: {host: nobody}}]}]}\n";

/// Exit code, standard output and standard error.
fn analyze(args: &[&str], stdin: &str) -> (i32, String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_flotilla"))
        .arg("analyze")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that fails early does not read it.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    let out = child.wait_with_output().unwrap();
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    (out.status.code().unwrap(), text(&out.stdout), text(&out.stderr))
}

#[test]
fn findings_exit_codes_and_thresholds() {
    let (code, out, _) = analyze(&["-f", "-"], WRONG);
    assert_eq!(code, 1);
    assert!(out.starts_with("Error [IST0101] VirtualService books/v -:4: host \"nobody\""), "{out}");
    assert!(out.contains("1 documents: 1 errors, 0 warnings, 0 infos"), "{out}");
    let (code, out, _) = analyze(&["-f", "-", "-o", "json"], WRONG);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &json[0]["code"], &json[0]["reference"]["line"]), (1, &"IST0101".into(), &4.into()));
    for args in [
        &["-f", "-", "-n", "other"][..],
        &["-f", "-", "-S", "IST0101=VirtualService v.books"],
        &["-f", "-", "--known-host", "nobody.books.svc.cluster.local"],
    ] {
        assert_eq!(analyze(args, WRONG).0, 0, "{args:?}");
    }
    let info = "apiVersion: v1\nkind: Namespace\nmetadata: {name: n}\n";
    assert_eq!(analyze(&["-f", "-"], info).0, 0);
    assert_eq!(analyze(&["-f", "-", "--failure-threshold", "Info"], info).0, 1);
    let (code, out, _) = analyze(&["-f", "-", "--output-threshold", "warning"], info);
    assert_eq!((code, out.as_str()), (0, "1 documents: 0 errors, 0 warnings, 0 infos\n"));
}

#[test]
fn questions_that_cannot_be_asked() {
    let (code, _, err) = analyze(&["-f", "/none/such.yaml"], "");
    assert_eq!(code, 2);
    assert!(err.contains("/none/such.yaml: cannot be read"), "{err}");
    for args in
        [&[][..], &["-f", "-", "-S", "IST0101"], &["-f", "-", "-n", "a", "-A"], &["-f", "-", "-f", "-"]]
    {
        assert_eq!(analyze(args, "").0, 2, "{args:?}");
    }
}

#[test]
fn the_list_has_every_code() {
    let (code, out, _) = analyze(&["--list"], "");
    assert_eq!(code, 0);
    for c in galley::catalogue() {
        assert!(out.contains(c.code) && out.contains(c.name), "{} is missing", c.code);
    }
}

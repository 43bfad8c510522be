use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use mesh_telemetry::attributes::Bag;

use super::{
    manifest::{MANIFEST, type_of},
    *,
};

fn bag() -> Bag {
    let mut b = Bag::default();
    b.set("source.namespace", "books");
    b.set("request.path", "/api/v1/ratings");
    b.set("response.code", 404i64);
    b.set("connection.mtls", true);
    b.set("response.duration", Duration::from_millis(7));
    b.set("source.ip", std::net::IpAddr::from([10, 1, 2, 3]));
    b.set("request.time", SystemTime::UNIX_EPOCH + Duration::from_secs(951_827_415));
    b.set(
        "request.headers",
        BTreeMap::from([("end-user".to_owned(), "jason".to_owned()), ("x-empty".to_owned(), String::new())]),
    );
    b
}

#[test]
fn expressions_mean_what_they_say() {
    let yes = [
        r#"source.namespace == "books""#,
        r#"source.namespace != "films" && response.code == 404"#,
        r#"response.code >= 400 && response.code < 500"#,
        "connection.mtls",
        r#"(connection.mtls == false) == false"#,
        r#"request.headers["end-user"] == "jason""#,
        r#"request.headers["absent"] | "none" == "none""#,
        r#"(request.headers["a"] | request.headers["end-user"] | "x") == "jason""#,
        r#"match(request.path, "/api/*")"#,
        r#"match(request.path, "*ratings")"#,
        r#"match(request.path, "/api") == false"#,
        r#""v[0-9]+".matches(request.path)"#,
        r#"request.path.startsWith("/api") && request.path.endsWith("ratings")"#,
        r#"source.ip == ip("10.1.2.3")"#,
        r#"source.ip != ip("10.1.2.4")"#,
        r#"response.duration == "7ms""#,
        r#"response.duration < "1s""#,
        r#"request.time == timestamp("2000-02-29T12:30:15Z")"#,
        r#"request.time == timestamp("2000-02-29T14:30:15+02:00")"#,
        r#"dnsName("Foo.Example.COM.") == dnsName("foo.example.com")"#,
        r#"uri("HTTP://a/b") == uri("http://a/b")"#,
        r#"email("a@B.c") == email("a@b.c")"#,
        r#"conditional(connection.mtls, "mutual_tls", "none") == "mutual_tls""#,
        r#""a" + "b" == `ab`"#,
        "1 + 2 == 3",
        r#"toLower("ABC") == "abc" && size("abc") == 3"#,
        r#"(source.labels | emptyStringMap())["app"] | "unknown" == "unknown""#,
        r#"source.namespace == "10s" || true"#,
        r#"false || source.namespace == "books""#,
        r#"false && destination.namespace == "x" || true"#,
    ];
    let b = bag();
    for text in yes {
        let e = compile_as(text, Type::Bool).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert_eq!(e.eval_bool(&Tracked::new(&b)), Ok(true), "{text}");
    }
}

#[test]
fn mistakes_are_found_when_they_are_loaded() {
    for (text, at, message) in [
        ("source.nmespace == \"a\"", 1, "unknown attribute \"source.nmespace\""),
        ("response.code == \"404\"", 1, "two values of one type, here are int64 and string"),
        ("response.code && true", 1, "here are int64 and bool"),
        ("response.code && response.code", 1, "needs bool"),
        ("source.ip < source.ip", 1, "no order"),
        ("source.ip == ip(\"1.2.3\")", 17, "is not of type IP address"),
        ("source.namespace[\"a\"]", 1, "only a string map"),
        ("request.headers[1]", 17, "expected a string"),
        ("\"(\".matches(request.path)", 1, "not a regular expression"),
        ("request.path.matches(\"a\")", 1, "must be a literal"),
        ("nope(1)", 1, "unknown function"),
        ("match(request.path)", 1, "takes 2 arguments"),
        ("\"abc", 1, "not closed"),
        ("1 +", 4, "ends too early"),
        ("(1", 3, "expected \")\""),
        ("1 1", 3, "expected the end"),
        ("a $ b", 3, "unexpected character"),
        ("", 1, "ends too early"),
        ("99999999999999999999", 1, "64-bit"),
        ("conditional(1, 2, 3)", 13, "expected bool"),
    ] {
        let e = compile(text).unwrap_err();
        assert!(e.message.contains(message) && e.at == at, "{text}: {e:?}");
    }
    let e = compile_as("1", Type::Bool).unwrap_err();
    assert!(e.message.contains("type int64, expected bool"));
    for deep in ["(".repeat(10_000), "1+".repeat(2_000) + "1", "\"a\"".to_owned() + &".f()".repeat(500)] {
        assert!(compile(&deep).is_err());
    }
}

#[test]
fn what_was_looked_at_is_recorded() {
    let b = bag();
    let refs = |text: &str| -> Vec<(String, Option<String>, bool)> {
        let t = Tracked::new(&b);
        let _ = compile(text).unwrap().eval(&t);
        t.references().unwrap().into_iter().map(|r| (r.name, r.key, r.present)).collect()
    };
    let owned = |n: &str, k: Option<&str>, p| (n.to_owned(), k.map(str::to_owned), p);
    assert_eq!(
        refs(r#"destination.namespace | request.headers["end-user"] == "x""#),
        [owned("destination.namespace", None, false), owned("request.headers", Some("end-user"), true)]
    );
    assert_eq!(refs(r#"connection.mtls || source.namespace == "a""#), [owned("connection.mtls", None, true)]);
}

#[test]
fn an_absent_attribute_without_default_has_no_value() {
    let b = bag();
    let e = compile(r#"destination.namespace == "a""#).unwrap();
    assert_eq!(e.eval(&Tracked::new(&b)), Err(EvalError::Absent("destination.namespace".into())));
    let mut wrong = bag();
    wrong.set("response.code", "text");
    let e = compile("response.code | 1").unwrap();
    assert_eq!(e.eval(&Tracked::new(&wrong)), Err(EvalError::WrongType("response.code".into())));
}

#[test]
fn the_manifest_is_sorted_and_covers_the_word_list() {
    assert!(MANIFEST.is_sorted_by(|a, b| a.0 < b.0));
    for w in &mesh_telemetry::attributes::GLOBAL_WORDS[..90] {
        assert!(type_of(w).is_some(), "{w} has no type");
    }
    assert_eq!(
        rfc3339(SystemTime::UNIX_EPOCH + Duration::from_millis(951_827_415_500)),
        "2000-02-29T12:30:15.500000Z"
    );
}

proptest::proptest! {
    #[test]
    fn no_text_panics(text in "\\PC{0,60}") {
        let _ = compile(&text);
    }

    #[test]
    fn no_tokens_panic(text in "(source\\.ip|request\\.headers|\\[|\\]|\\(|\\)|\"a\"|match|\\.|,|==|\\||&&|1| ){0,20}") {
        if let Ok(e) = compile(&text) {
            let b = bag();
            let _ = e.eval(&Tracked::new(&b));
        }
    }
}

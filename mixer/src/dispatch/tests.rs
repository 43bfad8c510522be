use std::sync::{Arc, Mutex};

use mesh_model::authored::{Kind, Spec};
use serde_json::{Value as Json, json};

use super::*;
use crate::{adapters::LogSink, config::Object};

/// Collects what is written.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, b: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(b);
        Ok(b.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn sink() -> LogSink {
    LogSink::start(Box::new(std::io::sink()), Box::new(std::io::sink())).unwrap()
}

fn object(kind: Kind, namespace: &str, name: &str, spec: Json) -> Object {
    Object { namespace: namespace.into(), name: name.into(), spec: Spec::from_json(kind, spec).unwrap() }
}

fn build(objects: &[Object]) -> Config {
    Config::build(objects, &Config::default(), &sink())
}

fn ok(objects: &[Object]) -> Config {
    let c = build(objects);
    assert!(c.errors.is_empty(), "{:?}", c.errors);
    c
}

fn bag(pairs: &[(&'static str, &str)]) -> Bag {
    let mut b: Bag = pairs.iter().map(|(k, v)| (*k, *v)).collect();
    b.set("context.reporter.kind", "inbound");
    b.set("destination.namespace", "books");
    b
}

fn rule(condition: &str, handler: &str, instances: &[&str]) -> Object {
    let spec = json!({"match": condition, "actions": [{"handler": handler, "instances": instances}]});
    object(Kind::Rule, "books", &format!("{handler}-{}", instances[0]), spec)
}

#[test]
fn deny_by_rule() {
    let c = ok(&[
        object(Kind::Denier, "books", "no", json!({"status": {"code": 7, "message": "Not allowed"}})),
        object(Kind::CheckNothing, "books", "any", json!({})),
        rule(
            r#"source.labels["app"] == "reviews" && source.labels["version"] == "v3""#,
            "no.denier",
            &["any.checknothing"],
        ),
    ]);
    let mut v3 = bag(&[]);
    v3.set(
        "source.labels",
        std::collections::BTreeMap::from([("app".into(), "reviews".into()), ("version".into(), "v3".into())]),
    );
    let verdict = c.check(&v3, "istio-system");
    assert_eq!((verdict.result.code, verdict.result.message.as_str()), (7, "no.denier.books:Not allowed"));
    assert_eq!((verdict.result.valid, verdict.result.uses), (Duration::from_secs(5), 1_000));
    let refs = verdict.references.unwrap();
    assert!(
        refs.iter().any(|r| r.name == "source.labels" && r.key.as_deref() == Some("version") && r.present)
    );
    assert!(refs.iter().any(|r| r.name == "destination.namespace"));

    let other = c.check(&bag(&[]), "istio-system");
    assert_eq!((other.result.code, other.result.uses), (0, 10_000));
    let mut elsewhere = v3.clone();
    elsewhere.set("destination.namespace", "films");
    assert_eq!(c.check(&elsewhere, "istio-system").result.code, 0, "rules are of their namespace");
    elsewhere.set("context.reporter.kind", "outbound");
    elsewhere.set("source.namespace", "books");
    assert_eq!(c.check(&elsewhere, "istio-system").result.code, 7);
    assert_eq!(c.check(&bag(&[]), "books").result.code, 0);
}

#[test]
fn verdicts_combine() {
    let c = ok(&[
        object(
            Kind::ListChecker,
            "books",
            "white",
            json!({"overrides": ["v1", "v2"], "cachingInterval": "10s", "cachingUseCount": 5}),
        ),
        object(
            Kind::ListEntry,
            "books",
            "version",
            json!({"value": r#"request.headers["version"] | "none""#}),
        ),
        object(
            Kind::Handler,
            "books",
            "deny",
            json!({"compiledAdapter": "denier", "params": {"validDuration": "3s"}}),
        ),
        object(Kind::Instance, "books", "nothing", json!({"compiledTemplate": "checknothing"})),
        rule("", "white.listchecker", &["version.listentry"]),
        rule(r#"request.path == "/x""#, "deny", &["nothing"]),
    ]);
    let both = c.check(&bag(&[("request.path", "/x")]), "istio-system").result;
    assert_eq!(both.code, 5, "the first failure in the order of the rules");
    assert_eq!(both.message, "white.listchecker.books:none is not whitelisted, deny.handler.books:");
    assert_eq!((both.valid, both.uses), (Duration::from_secs(3), 5));
    let mut v1 = bag(&[]);
    v1.set("request.headers", std::collections::BTreeMap::from([("version".into(), "v1".into())]));
    assert_eq!(c.check(&v1, "istio-system").result.code, 0);
}

#[test]
fn quotas() {
    let c = ok(&[
        object(
            Kind::MemQuota,
            "books",
            "mem",
            json!({"quotas": [{"name": "requestcount.quota.books", "maxAmount": 2, "validDuration": "5s"}]}),
        ),
        object(
            Kind::Quota,
            "books",
            "requestcount",
            json!({"dimensions": {"source": r#"source.namespace | "unknown""#}}),
        ),
        rule("", "mem.memquota", &["requestcount.quota"]),
    ]);
    let b = bag(&[("source.namespace", "shop")]);
    let ask = |name: &str, amount| c.quota(&b, "istio-system", name, quota_args(amount, false, ""));
    assert_eq!(ask("requestcount", 2).grant.granted, 2);
    assert_eq!(ask("requestcount.quota.books", 1).grant.granted, 0);
    assert_eq!(ask("unknown", 7).grant, QuotaGrant { granted: 7, valid: DEFAULT_VALID });
    let other = bag(&[("source.namespace", "other")]);
    let g = c.quota(&other, "istio-system", "requestcount", quota_args(1, false, ""));
    assert_eq!(g.grant, QuotaGrant { granted: 1, valid: Duration::from_secs(5) });
    assert!(g.references.unwrap().iter().any(|r| r.name == "source.namespace" && r.present));
}

#[test]
fn reports() {
    let lines = Lines::default();
    let sink = LogSink::start(Box::new(lines.clone()), Box::new(std::io::sink())).unwrap();
    let objects = [
        object(Kind::Stdio, "books", "out", json!({"outputAsJson": true})),
        object(
            Kind::LogEntry,
            "books",
            "log",
            json!({
            "severity": "\"Warning\"", "timestamp": "request.time",
            "variables": {"path": r#"request.path | """#, "code": "response.code | 0"}}),
        ),
        object(
            Kind::Prometheus,
            "books",
            "prom",
            json!({"metrics": [{
            "name": "requests_total", "instanceName": "requestcount.metric.books", "kind": "COUNTER", "labelNames": ["code"]}]}),
        ),
        object(
            Kind::Metric,
            "books",
            "requestcount",
            json!({"value": "1", "dimensions": {"code": "response.code | 200"}}),
        ),
        rule(r#"context.protocol == "http""#, "out.stdio", &["log.logentry"]),
        rule("true", "prom.prometheus", &["requestcount.metric"]),
    ];
    let c = Config::build(&objects, &Config::default(), &sink);
    assert!(c.errors.is_empty(), "{:?}", c.errors);
    let mut b = bag(&[("context.protocol", "http"), ("request.path", "/a\nb")]);
    b.set("request.time", SystemTime::UNIX_EPOCH);
    b.set("response.code", 503i64);
    c.report(&b, "istio-system");
    c.report(&bag(&[("context.protocol", "tcp")]), "istio-system");
    drop(sink);

    // Reloading something else keeps what was counted.
    let c2 = Config::build(&objects[2..4], &c, &self::sink());
    assert!(Arc::ptr_eq(
        &c.handlers["prom.prometheus.books"].handler,
        &c2.handlers["prom.prometheus.books"].handler
    ));
    let crate::adapters::Handler::Prometheus(p) = &*c2.handlers["prom.prometheus.books"].handler else {
        panic!()
    };
    assert!(p.encode().contains("istio_requests_total{code=\"503\"} 1"), "{}", p.encode());

    let deadline = Instant::now() + Duration::from_secs(5);
    let text = loop {
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        if text.ends_with('\n') || Instant::now() > deadline {
            break text;
        }
        std::thread::yield_now();
    };
    assert_eq!(text.lines().count(), 1, "{text}");
    let line: Json = serde_json::from_str(text.trim()).unwrap();
    assert_eq!(line["level"], "warn");
    assert_eq!((line["code"].as_i64(), line["path"].as_str()), (Some(503), Some("/a\nb")));
    assert_eq!(line["instance"], "log.logentry.books");
}

#[test]
fn bad_objects_are_left_out_by_name() {
    let c = build(&[
        object(Kind::Denier, "books", "no", json!({})),
        object(Kind::CheckNothing, "books", "any", json!({})),
        object(Kind::ListEntry, "books", "typo", json!({"value": "source.nmespace"})),
        object(Kind::Metric, "books", "text", json!({"value": "source.namespace"})),
        object(Kind::Handler, "books", "opa", json!({"compiledAdapter": "opa"})),
        object(Kind::Handler, "books", "bad", json!({"compiledAdapter": "denier", "params": {"x": 1}})),
        object(Kind::ListChecker, "books", "url", json!({"providerUrl": "http://x"})),
        object(
            Kind::Prometheus,
            "books",
            "p1",
            json!({"metrics": [{"name": "a", "instanceName": "m", "kind": "GAUGE"}]}),
        ),
        object(
            Kind::Prometheus,
            "books",
            "p2",
            json!({"metrics": [{"name": "a", "instanceName": "m", "kind": "GAUGE"}]}),
        ),
        object(Kind::LogEntry, "books", "l", json!({"variables": {}})),
        object(
            Kind::Rule,
            "books",
            "not-bool",
            json!({"match": "1", "actions": [{"handler": "no.denier", "instances": ["any.checknothing"]}]}),
        ),
        object(
            Kind::Rule,
            "books",
            "no-handler",
            json!({"actions": [{"handler": "nope.denier", "instances": ["any.checknothing"]}]}),
        ),
        object(
            Kind::Rule,
            "books",
            "no-instance",
            json!({"actions": [{"handler": "no.denier", "instances": ["nope.checknothing"]}]}),
        ),
        object(
            Kind::Rule,
            "books",
            "misfit",
            json!({"actions": [{"handler": "no.denier", "instances": ["l.logentry"]}]}),
        ),
        object(Kind::Rule, "books", "header", json!({"requestHeaderOperations": [{}], "actions": []})),
        object(
            Kind::Rule,
            "books",
            "good",
            json!({"actions": [{"handler": "no.denier", "instances": ["any.checknothing"]}]}),
        ),
    ]);
    let errors: Vec<String> = c.errors.iter().map(|e| format!("{}: {}", e.object, e.message)).collect();
    for expected in [
        "listentry books/typo: value: unknown attribute \"source.nmespace\"",
        "metric books/text: value: the expression is of type string",
        "handler books/opa: unsupported adapter \"opa\"",
        "handler books/bad: params: unknown field `x`",
        "listchecker books/url: lists from a URL",
        "prometheus books/p2: metric istio_a belongs to p1.prometheus.books already",
        "rule books/not-bool: match: the expression is of type int64, expected bool",
        "rule books/no-handler: actions[0]: there is no handler \"nope.denier\"",
        "rule books/no-instance: actions[0]: there is no instance \"nope.checknothing\"",
        "rule books/misfit: actions[0]: adapter denier does not take instances of logentry",
        "rule books/header: requestHeaderOperations is not supported",
    ] {
        assert!(errors.iter().any(|e| e.starts_with(expected)), "missing {expected} in {errors:#?}");
    }
    assert_eq!(errors.len(), 11, "{errors:#?}");
    assert_eq!(c.check(&bag(&[]), "istio-system").result.code, 9, "the rest applies");
}

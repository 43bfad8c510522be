//! For every kind, documents that are accepted and documents that are refused, with the field that is to blame.
//!
//! A row is the specification as YAML; a refused one is followed by the path of the error, below `spec` unless it
//! begins with `/`.

mod edge;
mod gateway_api;
mod ingress;
mod mesh;
mod networking;
mod policy;
mod v1alpha1;

use crate::document::{Parsed, parse_file};

fn parse(api: &str, kind: &str, spec: &str) -> Parsed {
    let spec: String = spec.lines().map(|l| format!("  {l}\n")).collect();
    let text =
        format!("apiVersion: {api}\nkind: {kind}\nmetadata: {{name: x, namespace: books}}\nspec:\n{spec}");
    parse_text(&text)
}

fn parse_text(text: &str) -> Parsed {
    let mut all = parse_file("test.yaml", &std::sync::Arc::new(text.as_bytes().to_vec()), "default");
    assert_eq!(all.len(), 1, "{text}");
    all.pop().unwrap()
}

/// Accepted without an error; findings that are only said are not looked at.
#[track_caller]
fn accepts(api: &str, kind: &str, specs: &[&str]) {
    for spec in specs {
        let p = parse(api, kind, spec);
        assert!(
            p.report.valid && p.document.is_some(),
            "{kind} was refused:\n{spec}\n{:#?}",
            p.report.errors
        );
    }
}

/// Refused, with an error at the given path.
#[track_caller]
fn refuses(api: &str, kind: &str, rows: &[(&str, &str)]) {
    for (spec, path) in rows {
        let p = parse(api, kind, spec);
        assert!(!p.report.valid && p.document.is_none(), "{kind} was accepted:\n{spec}");
        let path = match path.strip_prefix('/') {
            Some(absolute) => absolute.to_owned(),
            None if path.is_empty() => "spec".to_owned(),
            None => format!("spec.{path}"),
        };
        let found = p.report.errors.iter().find(|e| e.path == path);
        assert!(found.is_some(), "{kind}\n{spec}\nexpected an error at {path}, got {:#?}", p.report.errors);
        assert!(found.is_some_and(|f| f.line > 0 && !f.message.is_empty()));
    }
}

/// Accepted, with a warning at the given path that has these words.
#[track_caller]
fn warns(api: &str, kind: &str, rows: &[(&str, &str, &str)]) {
    for (spec, path, words) in rows {
        let p = parse(api, kind, spec);
        assert!(p.report.valid, "{kind} was refused:\n{spec}\n{:#?}", p.report.errors);
        let path = if path.is_empty() { "spec".to_owned() } else { format!("spec.{path}") };
        let found = p.report.warnings.iter().any(|w| w.path == path && w.message.contains(words));
        assert!(found, "{kind}\n{spec}\nexpected {path}: {words}, got {:#?}", p.report.warnings);
    }
}

//! What the fuzz targets of `e2e/fuzz` run. It is not part of the product.

use std::sync::Arc;

use crate::{AnalyzeOptions, analyze::analyze, document::parse_file, node::Node};

/// A file of documents: what is wrong with one has a place in the file, and reading it again says the same.
pub fn documents(data: &[u8]) {
    let content = Arc::new(data.to_vec());
    let parsed = parse_file("f.yaml", &content, "default");
    let lines = data.split(|b| matches!(b, b'\n' | b'\r')).count();
    for p in &parsed {
        assert_eq!(p.report.valid, p.report.errors.is_empty());
        for f in p.report.errors.iter().chain(&p.report.warnings) {
            assert!(f.line as usize <= lines + 1, "line {} of {lines}: {}", f.line, f.message);
            assert!(!f.message.is_empty());
        }
    }
    let again = parse_file("f.yaml", &content, "default");
    let reports =
        |l: &[crate::document::Parsed]| l.iter().map(|p| format!("{:?}", p.report)).collect::<Vec<_>>();
    assert_eq!(reports(&parsed), reports(&again));
    let files = [Arc::new(parsed)];
    let options = AnalyzeOptions::default();
    let messages = analyze(&files, &options);
    assert!(messages.windows(2).all(|w| w[0].level >= w[1].level));
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = Node::parse(text);
    }
}

#[cfg(test)]
#[path = "../../e2e/fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::{replay::corpus, *};

    #[test]
    fn corpora() {
        corpus("documents", documents);
    }
}

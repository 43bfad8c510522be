//! What documents say of tests is true.

use std::path::Path;

/// Tests that `SECURITY.md` names, and every class has one.
#[test]
fn security_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = std::fs::read_to_string(root.join("SECURITY.md")).unwrap();
    let mut wrong = Vec::new();
    let mut named = 0;
    for (i, word) in text.split('`').enumerate() {
        // Between a pair of quotes.
        let Some((file, name)) = word.split_once(".rs::").filter(|_| i % 2 == 1) else { continue };
        named += 1;
        let source = std::fs::read_to_string(root.join(format!("{file}.rs"))).unwrap_or_default();
        let definition = source.find(&format!("fn {name}("));
        let is_test = definition.is_some_and(|at| {
            let before = &source[..at];
            // The attributes of the function, after the end of what stands before it.
            let from = before.rfind('}').map_or(0, |p| p + 1);
            before[from..].contains("#[test]") || before[from..].contains("#[tokio::test")
        });
        if !is_test {
            wrong.push(format!("{file}.rs::{name} is no test"));
        }
    }
    let table = text.split("## Attack classes").nth(1).and_then(|t| t.split("\n## ").next()).unwrap();
    let rows =
        table.lines().filter(|l| l.starts_with("| ") && !l.starts_with("| **") && !l.starts_with("| class"));
    for r in rows {
        if !r.contains(".rs::") {
            wrong.push(format!("no test: {r}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(named > 100, "{named} tests are named");
}

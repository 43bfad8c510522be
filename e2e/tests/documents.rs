//! What documents say of tests is true.

use std::{collections::BTreeSet, path::Path};

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

/// Each fuzz target has a binary, a corpus, a row in the table, and a crate that replays it.
#[test]
fn fuzz_targets_are_told_and_replayed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let fuzz = root.join("e2e/fuzz");
    let files = |dir: &str| -> BTreeSet<String> {
        let all = std::fs::read_dir(fuzz.join(dir)).unwrap().map(|f| f.unwrap().path());
        all.map(|p| p.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
    };
    let (binaries, corpora) = (files("targets"), files("corpus"));
    assert_eq!(binaries, corpora);
    let manifest = std::fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
    let readme = std::fs::read_to_string(fuzz.join("README.md")).unwrap();
    let runs = readme.split("## Runs").nth(1).unwrap();
    for t in &binaries {
        assert!(manifest.contains(&format!("path = \"targets/{t}.rs\"")), "{t} is not built");
        assert!(readme.contains(&format!("`{t}`")), "{t} is in no row of the targets");
        assert!(runs.contains(&format!("| `{t}` |")), "{t} has no row of runs");
        let body = std::fs::read_to_string(fuzz.join(format!("targets/{t}.rs"))).unwrap();
        let krate = body.split("| ").nth(1).and_then(|b| b.split("::").next()).unwrap();
        let path = manifest.lines().find_map(|l| {
            let (name, rest) = l.split_once(" = { path = \"../../")?;
            (name.replace('-', "_") == krate).then(|| rest.split('"').next())?
        });
        let path = path.unwrap_or_else(|| panic!("{t}: {krate} is no dependency"));
        let replay = std::fs::read_to_string(root.join(path).join("src/fuzz.rs")).unwrap();
        assert!(replay.contains(&format!("corpus(\"{t}\", {t})")), "{path} does not replay {t}");
    }
}

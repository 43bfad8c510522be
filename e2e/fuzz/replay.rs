//! Replays corpora of fuzz targets in ordinary tests; included by the crates that have targets.

use std::path::Path;

/// Runs a target on everything in its corpus; a missing or empty corpus is a failure. The last name printed is that of the
/// input on which it failed.
pub(crate) fn corpus(target: &str, run: impl Fn(&[u8])) {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dirs = here.ancestors().map(|a| a.join("e2e/fuzz/corpus").join(target));
    let dir = dirs.into_iter().find(|d| d.is_dir()).unwrap_or_else(|| panic!("{target} has no corpus"));
    let mut files: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|f| f.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", dir.display());
    for f in files {
        println!("{}", f.display());
        run(&std::fs::read(&f).unwrap());
    }
}

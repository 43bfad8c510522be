//! The dependency policy, over `cargo tree` and `cargo metadata`, without a network.
//!
//! 1. One TLS stack and one crypto provider: rustls on aws-lc-rs.
//! 2. Licences that go with Apache-2.0.
//! 3. One version of every crate whose types cross the borders of ours.
//! 4. Arrows between our crates point down only.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::Command,
};

use anyhow::{Context, bail};
use serde_json::Value;

/// Other TLS stacks and providers, which must not be built in.
const BANNED: [&str; 7] = ["ring", "openssl", "openssl-sys", "native-tls", "boring", "boring-sys", "mbedtls"];

/// Crates whose types appear in interfaces between ours.
const SHARED: [&str; 12] = [
    "bytes",
    "h2",
    "http",
    "http-body",
    "hyper",
    "hyper-util",
    "prost",
    "quinn",
    "rustls",
    "tokio",
    "tonic",
    "tower-service",
];

/// Licences accepted, as SPDX names in expressions.
const LICENCES: [&str; 13] = [
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "MIT",
    "MIT-0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "Unicode-3.0",
    "CC0-1.0",
    "0BSD",
    "Unlicense",
    "CDLA-Permissive-2.0",
];

/// Layers from the bottom up; a crate may use only crates of lower layers.
const LAYERS: [&[&str]; 8] = [
    &["mesh-model"],
    &["mesh-collections", "mesh-identity", "mesh-telemetry"],
    &["mesh-proxy", "mesh-trunk", "mesh-dns", "mesh-xds", "mesh-runtime"],
    &["mesh-agent", "mesh-testkit"],
    &["galley", "pilot", "citadel", "mixer", "sidecar", "gateway", "multicluster", "bookstore"],
    &["flotilla-simulate"],
    &["flotilla"],
    &["flotilla-e2e", "flotilla-bench", "flotilla-verify"],
];

/// Runs all rules and reports every violation.
///
/// # Errors
/// The violations, or why the metadata cannot be read.
pub(crate) fn check(root: &Path) -> anyhow::Result<()> {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let cargo = |args: &[&str]| -> anyhow::Result<Vec<u8>> {
        let out = Command::new("cargo").current_dir(root).args(args).output().context("cargo")?;
        if !out.status.success() {
            bail!("cargo {}: {}", args[0], String::from_utf8_lossy(&out.stderr).trim());
        }
        Ok(out.stdout)
    };
    let metadata = cargo(&["metadata", "--format-version", "1", "--locked", "--no-deps"])?;
    let metadata: Value = serde_json::from_slice(&metadata).context("cargo metadata")?;
    let tree = cargo(&[
        "tree",
        "--workspace",
        "--locked",
        "--edges",
        "normal,build",
        "--prefix",
        "none",
        "--format",
        "{p}|{l}",
        "--target",
        &target,
    ])?;
    let tree = String::from_utf8(tree).context("cargo tree")?;
    let mut wrong = Vec::new();
    let packages = packages(&tree, &metadata)?;
    wrong.extend(stacks(&packages));
    wrong.extend(licences(&packages));
    wrong.extend(arrows(&packages));
    for w in &wrong {
        eprintln!("  {w}");
    }
    if wrong.is_empty() {
        eprintln!(
            "  {} packages: one TLS stack, licences, shared interfaces and arrows as they should be",
            packages.len()
        );
        Ok(())
    } else {
        bail!("{} violations", wrong.len())
    }
}

struct Package {
    name: String,
    version: String,
    licence: String,
    ours: bool,
    /// Normal dependencies of our own, by package name.
    uses: BTreeSet<String>,
}

/// Packages that are really built on this platform, without those that only tests need: `cargo tree`
/// knows features exactly, `cargo metadata` names what features could bring in as well.
fn packages(tree: &str, metadata: &Value) -> anyhow::Result<Vec<Package>> {
    let list = metadata["packages"].as_array().context("no packages")?;
    let members: BTreeSet<&str> =
        metadata["workspace_members"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let mut declared: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for p in list.iter().filter(|p| p["id"].as_str().is_some_and(|id| members.contains(id))) {
        let uses = p["dependencies"].as_array().into_iter().flatten().filter(|d| d["kind"].is_null());
        let uses = uses.filter_map(|d| d["name"].as_str().map(str::to_owned)).collect();
        declared.insert(p["name"].as_str().unwrap_or_default(), uses);
    }
    let mut built = BTreeMap::new();
    for line in tree.lines().filter(|l| !l.is_empty()) {
        // name vVERSION [(source)]|licence
        let (package, licence) = line.split_once('|').with_context(|| format!("cargo tree: {line:?}"))?;
        let mut words = package.split_whitespace();
        let (name, version) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        built.insert((name, version), licence.trim_end_matches(" (*)"));
    }
    Ok(built
        .into_iter()
        .map(|((name, version), licence)| Package {
            name: name.to_owned(),
            version: version.trim_start_matches('v').to_owned(),
            licence: licence.to_owned(),
            ours: declared.contains_key(name),
            uses: declared.get(name).cloned().unwrap_or_default(),
        })
        .collect())
}

fn stacks(packages: &[Package]) -> Vec<String> {
    let mut wrong: Vec<String> = packages
        .iter()
        .filter(|p| BANNED.contains(&p.name.as_str()))
        .map(|p| format!("{} {} is a second TLS stack or crypto provider", p.name, p.version))
        .collect();
    for name in SHARED {
        let versions: Vec<&str> =
            packages.iter().filter(|p| p.name == name).map(|p| p.version.as_str()).collect();
        if versions.len() > 1 {
            wrong
                .push(format!("{name} crosses our borders and is there in versions {}", versions.join(", ")));
        }
    }
    wrong
}

fn licences(packages: &[Package]) -> Vec<String> {
    packages
        .iter()
        .filter(|p| !p.ours && !acceptable(&p.licence))
        .map(|p| format!("{} {}: licence {:?} is not on the list", p.name, p.version, p.licence))
        .collect()
}

/// Whether an SPDX expression can be satisfied with accepted licences. Parentheses group; the old
/// form `MIT/Apache-2.0` means `OR`.
fn acceptable(expression: &str) -> bool {
    let e = expression.replace('/', " OR ");
    split(&e, " OR ").iter().any(|alternative| {
        split(alternative, " AND ").iter().all(|term| {
            let term = term.trim();
            match term.strip_prefix('(').and_then(|t| t.strip_suffix(')')) {
                Some(inner) => acceptable(inner),
                None => LICENCES.contains(&term),
            }
        })
    })
}

/// Splits outside of parentheses.
fn split<'a>(text: &'a str, by: &str) -> Vec<&'a str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0usize, 0);
    for (i, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ if depth == 0 && i >= start && text[i..].starts_with(by) => {
                parts.push(&text[start..i]);
                start = i + by.len();
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn arrows(packages: &[Package]) -> Vec<String> {
    let layer = |name: &str| LAYERS.iter().position(|l| l.contains(&name));
    let mut wrong = Vec::new();
    for p in packages.iter().filter(|p| p.ours) {
        let Some(own) = layer(&p.name) else {
            wrong.push(format!("{} is in no layer: add it where it belongs", p.name));
            continue;
        };
        for used in &p.uses {
            if layer(used).is_some_and(|theirs| theirs >= own) {
                wrong.push(format!("{} uses {used}, which is not below it", p.name));
            }
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, version: &str, uses: &[&str]) -> Package {
        Package {
            name: name.into(),
            version: version.into(),
            licence: "MIT".into(),
            ours: layered(name),
            uses: uses.iter().map(|u| (*u).to_owned()).collect(),
        }
    }

    fn layered(name: &str) -> bool {
        LAYERS.iter().any(|l| l.contains(&name))
    }

    #[test]
    fn licence_expressions() {
        for ok in [
            "MIT",
            "MIT OR Apache-2.0",
            "MIT/Apache-2.0",
            "(MIT OR GPL-3.0) AND ISC",
            "GPL-2.0 OR (MIT AND BSD-3-Clause)",
            "Apache-2.0 WITH LLVM-exception OR GPL-2.0",
        ] {
            assert!(acceptable(ok), "{ok}");
        }
        for bad in ["", "GPL-3.0", "MIT AND GPL-3.0", "(MIT OR ISC) AND AGPL-3.0"] {
            assert!(!acceptable(bad), "{bad}");
        }
    }

    #[test]
    fn violations_are_found() {
        let good =
            [package("galley", "1", &["mesh-xds", "serde"]), package("mesh-xds", "1", &["mesh-model"])];
        assert!(arrows(&good).is_empty() && stacks(&good).is_empty());
        assert_eq!(arrows(&[package("galley", "1", &["pilot"])]).len(), 1, "components never use each other");
        assert_eq!(arrows(&[package("mesh-model", "1", &["mesh-xds"])]).len(), 1);
        assert_eq!(stacks(&[package("ring", "0.17.0", &[])]).len(), 1);
        assert_eq!(stacks(&[package("http", "0.2.0", &[]), package("http", "1.0.0", &[])]).len(), 1);
    }

    /// The workspace itself, so that a plain `cargo test` says what `cargo verify` would.
    #[test]
    fn this_workspace() {
        check(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap();
    }
}

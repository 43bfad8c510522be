//! Fields whose effect is not in an answer or a proxy's configuration, and the tests that hold them.

use std::path::{Path, PathBuf};

/// Field and test, as `file::name`.
pub(crate) const TESTS: &[(&str, &str)] = &[(
    "MeshConfig.transport",
    "pilot/src/generate/tests/gateways.rs::east_west_forwards_only_what_is_exported",
)];

/// Fields that are for people, and what they say.
pub(crate) const DESCRIPTIVE: &[(&str, &str)] = &[
    ("Gateway.servers[].name", "a name for people; Istio does nothing with it either"),
    ("api/GatewayClass.description", "for people"),
    ("api/L4Route.rules[].name", "for people"),
];

/// Whether there is such a test.
pub(crate) fn exists(test: &str) -> bool {
    let Some((file, name)) = test.rsplit_once("::") else { return false };
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(file);
    std::fs::read_to_string(path).is_ok_and(|t| t.contains(&format!("fn {name}(")))
}

//! Documents for every code.

/// A code and documents for it.
pub(super) struct Case {
    pub(super) code: &'static str,
    /// Documents that are told about; origin and line are those of the first set.
    pub(super) wrong: &'static [&'static str],
    pub(super) origin: &'static str,
    pub(super) line: u32,
    /// Documents that are not.
    pub(super) right: &'static [&'static str],
}

const fn case(
    code: &'static str,
    origin: &'static str,
    line: u32,
    wrong: &'static [&'static str],
    right: &'static [&'static str],
) -> Case {
    Case { code, wrong, origin, line, right }
}

/// A document of a kind, in namespace `n` unless given otherwise.
macro_rules! doc {
    ($api:literal, $kind:literal, $name:literal, $spec:literal) => {
        doc!($api, $kind, $name, "n", "", $spec)
    };
    ($api:literal, $kind:literal, $name:literal, $ns:literal, $meta:literal, $spec:literal) => {
        concat!(
            "---\napiVersion: ",
            $api,
            "\nkind: ",
            $kind,
            "\nmetadata:\n  name: ",
            $name,
            "\n  namespace: ",
            $ns,
            "\n",
            "  ",
            $meta,
            "\nspec: ",
            $spec,
            "\n"
        )
    };
}

macro_rules! net {
    ($($t:tt)*) => { doc!("networking.istio.io/v1", $($t)*) };
}

macro_rules! pod {
    ($name:literal, $labels:literal, $spec:literal) => {
        concat!(
            "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: ",
            $name,
            "\n  namespace: n\n  labels: ",
            $labels,
            "\nspec: ",
            $spec,
            "\n"
        )
    };
}

macro_rules! deployment {
    ($labels:literal, $spec:literal) => {
        concat!(
            "---\napiVersion: apps/v1\nkind: Deployment\nmetadata:\n  name: d\n  namespace: n\nspec:\n  template:\n    metadata: {labels: ",
            $labels, "}\n    spec: ", $spec, "\n"
        )
    };
}

macro_rules! namespace {
    ($labels:literal) => {
        concat!("---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: n\n  labels: ", $labels, "\n")
    };
}

macro_rules! service {
    ($name:literal, $spec:literal) => {
        doc!("v1", "Service", $name, $spec)
    };
}

macro_rules! patch {
    ($priority:literal, $patch:literal) => {
        concat!(
            "---\napiVersion: networking.istio.io/v1alpha3\nkind: EnvoyFilter\nmetadata: {name: f, namespace: n}\nspec:\n  priority: ",
            $priority, "\n  configPatches:\n  - ", $patch, "\n"
        )
    };
}

const HTTP_FILTER: &str =
    patch!("0", "{applyTo: HTTP_FILTER, patch: {operation: INSERT_BEFORE, value: {name: a}}}");

mod edge;
mod platform;
mod routing;

/// All of them.
pub(super) fn all() -> impl Iterator<Item = &'static Case> {
    [platform::CASES, routing::CASES, edge::CASES].into_iter().flatten()
}

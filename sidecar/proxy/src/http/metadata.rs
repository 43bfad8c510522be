//! What filters find out about a request, for those behind them (Envoy's dynamic metadata).

use std::{borrow::Cow, sync::Arc};

use mesh_model::proxy as model;
use serde_json::Value;

use crate::matcher::{RegexError, StringMatcher};

/// Namespace of verified tokens.
pub(crate) const JWT: &str = "envoy.filters.http.jwt_authn";

/// Namespace of what access rules found out about a request.
pub(crate) const RBAC: &str = "envoy.filters.http.rbac";
/// Namespace and key of whether a rule of action LOG (an AuthorizationPolicy's `AUDIT`) matched a request, as Envoy has it.
pub(crate) const AUDIT: (&str, &str) = ("envoy.common", "access_log_hint");
/// Namespace of what access rules found out about a connection.
pub(crate) const CONNECTION_RBAC: &str = "envoy.filters.network.rbac";

/// Values by namespace and key. A request has few, so they are a list.
#[derive(Debug, Default)]
pub(crate) struct Metadata(Vec<(Cow<'static, str>, Cow<'static, str>, Arc<Value>)>);

impl Metadata {
    /// Adds a value; one of the same name is replaced.
    pub(crate) fn set(
        &mut self,
        namespace: impl Into<Cow<'static, str>>,
        key: impl Into<Cow<'static, str>>,
        value: Arc<Value>,
    ) {
        let (namespace, key) = (namespace.into(), key.into());
        self.0.retain(|(n, k, _)| (n, k) != (&namespace, &key));
        self.0.push((namespace, key, value));
    }

    pub(crate) fn get(&self, namespace: &str, path: &[String]) -> Option<&Value> {
        let (first, rest) = path.split_first()?;
        let found = self.0.iter().find(|(n, k, _)| n == namespace && k == first)?;
        rest.iter().try_fold(&*found.2, |v, key| v.as_object()?.get(key))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str, &Value)> {
        self.0.iter().map(|(n, k, v)| (&**n, &**k, &**v))
    }
}

/// A compiled [`model::MetadataMatch`].
#[derive(Debug)]
pub(crate) struct MetadataMatcher {
    filter: String,
    path: Vec<String>,
    value: ValueMatcher,
    invert: bool,
}

#[derive(Debug)]
enum ValueMatcher {
    Null,
    Bool(bool),
    String(StringMatcher),
    Present(bool),
    OneOf(Box<ValueMatcher>),
    Or(Vec<ValueMatcher>),
}

impl MetadataMatcher {
    pub(crate) fn new(m: &model::MetadataMatch) -> Result<Self, RegexError> {
        Ok(Self {
            filter: m.filter.clone(),
            path: m.path.clone(),
            value: ValueMatcher::new(&m.value)?,
            invert: m.invert,
        })
    }

    pub(crate) fn matches(&self, metadata: Option<&Metadata>) -> bool {
        let value = metadata.and_then(|m| m.get(&self.filter, &self.path));
        value.is_some_and(|v| self.value.matches(v)) != self.invert
    }
}

impl ValueMatcher {
    fn new(m: &model::ValueMatch) -> Result<Self, RegexError> {
        Ok(match m {
            model::ValueMatch::Null => Self::Null,
            model::ValueMatch::Bool(b) => Self::Bool(*b),
            model::ValueMatch::String(s) => Self::String(StringMatcher::new(s)?),
            model::ValueMatch::Present(p) => Self::Present(*p),
            model::ValueMatch::OneOf(m) => Self::OneOf(Box::new(Self::new(m)?)),
            model::ValueMatch::Or(l) => Self::Or(l.iter().map(Self::new).collect::<Result<_, _>>()?),
        })
    }

    fn matches(&self, v: &Value) -> bool {
        match self {
            Self::Null => v.is_null(),
            Self::Bool(b) => v.as_bool() == Some(*b),
            Self::String(m) => v.as_str().is_some_and(|s| m.matches(s.as_bytes())),
            Self::Present(p) => *p,
            Self::OneOf(m) => v.as_array().is_some_and(|l| l.iter().any(|v| m.matches(v))),
            Self::Or(l) => l.iter().any(|m| m.matches(v)),
        }
    }
}

#[cfg(test)]
mod tests {
    use model::{StringMatch, ValueMatch as M};
    use serde_json::json;

    use super::*;

    #[test]
    fn values() {
        let mut m = Metadata::default();
        m.set(
            "f",
            "payload",
            Arc::new(json!({"iss": "a", "aud": ["x", "y"], "ok": true, "deep": {"n": null}})),
        );
        let check = |path: &[&str], value: M, invert| {
            let path = std::iter::once(&"payload").chain(path).map(|s| (*s).to_owned()).collect();
            MetadataMatcher::new(&model::MetadataMatch { filter: "f".into(), path, value, invert })
                .unwrap()
                .matches(Some(&m))
        };
        let s = |s: &str| M::String(StringMatch::exact(s));
        assert!(check(&["iss"], s("a"), false) && !check(&["iss"], s("a"), true));
        assert!(!check(&["iss"], s("b"), false) && !check(&["aud"], s("x"), false));
        let one = |v| M::OneOf(Box::new(v));
        assert!(check(&["aud"], one(s("y")), false) && !check(&["iss"], one(s("a")), false));
        assert!(check(&["iss"], M::Or(vec![one(s("a")), s("a")]), false));
        assert!(check(&["ok"], M::Bool(true), false) && check(&["deep", "n"], M::Null, false));
        assert!(check(&["iss"], M::Present(true), false) && !check(&["iss", "x"], M::Present(true), false));
        assert!(!check(&["none"], M::Null, false) && check(&["none"], s("a"), true));
        assert!(!check(&["iss"], M::Present(false), false), "never, as in Envoy");
    }
}

//! Patches of `EnvoyFilter` documents on what a control plane has generated.
//!
//! Semantics are Istio's (`networking.istio.io/v1alpha3`, "EnvoyConfigObjectPatch"), with these decisions:
//!
//! - `ADD` of a filter goes before the one that ends the list, and `filterClass` chooses another place for it: after
//!   authentication, after authorisation, before statistics.
//! - A wrapper replaces another, so that a `MERGE` can say `false` or 0; see [`tree`].
//! - A patch whose result no proxy could use is refused, alone and with a reason ([`check`]).
//! - Of our own proxies only those patches are for whose result the decoder takes, and of which it looks at every value
//!   ([`leaves`]): what it would ignore is refused by name.
//!
//! Patches are applied in the order of [`Patch::phase`], and of documents within a phase.

mod added;
mod check;
mod cluster;
mod leaves;
mod list;
mod listener;
mod resource;
mod route;
mod tree;

use mesh_model::authored::{
    ApplyTo, EnvoyConfigObjectMatch, EnvoyConfigObjectPatch, FilterClass, PatchContext, PatchOperation,
};
use prost::Name;

use self::tree::Tree;
pub use self::{
    added::Extensions,
    resource::{Made, Outcome, Place, Taken, cluster, context, listener, routes, virtual_host},
};
use crate::server::VersionHasher;

/// A patch that can never be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct PatchError {
    /// Path of the field in the patch, such as `patch.value.connect_timeout`.
    pub field: String,
    /// What is wrong with it.
    pub reason: String,
}

/// What a patch changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// Listeners and what is in them.
    Listeners,
    /// Routes, be they in a listener.
    Routes,
    /// Clusters.
    Clusters,
    /// Configurations of filters.
    Extensions,
}

/// One patch, its value typed.
#[derive(Debug, Clone)]
pub struct Patch {
    to: ApplyTo,
    operation: PatchOperation,
    class: FilterClass,
    matches: EnvoyConfigObjectMatch,
    value: Tree,
    version: String,
}

/// What one patch did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Did {
    Nothing,
    Changed,
    Removed,
}

type Res = Result<Did, String>;

impl Patch {
    /// Types a patch.
    ///
    /// # Errors
    /// [`PatchError`] if its value is no message of the kind that it is for, or the control plane does not make that kind.
    pub fn new(p: &EnvoyConfigObjectPatch) -> Result<Self, PatchError> {
        let bad = |field: &str, reason: &str| PatchError { field: field.into(), reason: reason.into() };
        let message = match p.apply_to {
            ApplyTo::Listener => "envoy.config.listener.v3.Listener",
            ApplyTo::FilterChain => "envoy.config.listener.v3.FilterChain",
            ApplyTo::NetworkFilter => "envoy.config.listener.v3.Filter",
            ApplyTo::ListenerFilter => "envoy.config.listener.v3.ListenerFilter",
            ApplyTo::HttpFilter => "envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter",
            ApplyTo::RouteConfiguration => "envoy.config.route.v3.RouteConfiguration",
            ApplyTo::VirtualHost => "envoy.config.route.v3.VirtualHost",
            ApplyTo::HttpRoute => "envoy.config.route.v3.Route",
            ApplyTo::Cluster => "envoy.config.cluster.v3.Cluster",
            ApplyTo::ExtensionConfig => "envoy.config.core.v3.TypedExtensionConfig",
            ApplyTo::Bootstrap => {
                return Err(bad(
                    "applyTo",
                    "the bootstrap is the proxy's own file and not made by the control plane; change it there",
                ));
            }
            ApplyTo::Invalid => return Err(bad("applyTo", "is required")),
        };
        let matches = p.matches.clone().unwrap_or_default();
        if matches.context == PatchContext::Waypoint {
            return Err(bad("match.context", "there are no waypoints"));
        }
        let Some(patch) = &p.patch else { return Err(bad("patch", "is required")) };
        use PatchOperation as O;
        let works = match p.apply_to {
            ApplyTo::Listener | ApplyTo::FilterChain | ApplyTo::Cluster => {
                matches!(patch.operation, O::Merge | O::MergeAndReplaceList | O::Add | O::Remove)
            }
            ApplyTo::RouteConfiguration => matches!(patch.operation, O::Merge | O::MergeAndReplaceList),
            ApplyTo::VirtualHost => {
                matches!(patch.operation, O::Merge | O::MergeAndReplaceList | O::Add | O::Remove | O::Replace)
            }
            ApplyTo::HttpRoute => !matches!(patch.operation, O::Invalid | O::Replace),
            ApplyTo::ExtensionConfig => patch.operation == O::Add,
            _ => patch.operation != O::Invalid,
        };
        if !works {
            return Err(bad("patch.operation", "has no effect on objects of this kind"));
        }
        let value = match (&patch.value, patch.operation) {
            (_, O::Remove) => Tree { message, fields: vec![] },
            (Some(v), _) => Tree::of(message, v).map_err(|(path, reason)| {
                let dot = if path.is_empty() || path.starts_with('[') { "" } else { "." };
                PatchError { field: format!("patch.value{dot}{path}"), reason }
            })?,
            (None, _) => return Err(bad("patch.value", "is required")),
        };
        let mut version = VersionHasher::default();
        version.write(serde_json::to_string(p).unwrap_or_default().as_bytes());
        Ok(Self {
            to: p.apply_to,
            operation: patch.operation,
            class: patch.filter_class,
            matches,
            value,
            version: version.finish(),
        })
    }

    /// What it changes.
    #[must_use]
    pub fn scope(&self) -> Scope {
        match self.to {
            ApplyTo::RouteConfiguration | ApplyTo::VirtualHost | ApplyTo::HttpRoute => Scope::Routes,
            ApplyTo::Cluster => Scope::Clusters,
            ApplyTo::ExtensionConfig => Scope::Extensions,
            _ => Scope::Listeners,
        }
    }

    /// Its turn: what is around comes before what is in it, changes of lists before those of their members, and what
    /// is added whole last, so that no other patch changes it. Routes are made before the listeners that hold them.
    #[must_use]
    pub fn phase(&self) -> u8 {
        let add = self.operation == PatchOperation::Add;
        let merge = self.merges();
        match self.to {
            ApplyTo::RouteConfiguration => 0,
            ApplyTo::VirtualHost => {
                if add {
                    4
                } else {
                    1
                }
            }
            ApplyTo::HttpRoute => {
                if merge || self.operation == PatchOperation::Remove {
                    2
                } else {
                    3
                }
            }
            ApplyTo::Listener => {
                if add {
                    19
                } else {
                    10
                }
            }
            ApplyTo::ListenerFilter => 11,
            ApplyTo::FilterChain => {
                if add {
                    17
                } else {
                    12
                }
            }
            ApplyTo::NetworkFilter => {
                if merge {
                    14
                } else {
                    13
                }
            }
            ApplyTo::HttpFilter => {
                if merge {
                    16
                } else {
                    15
                }
            }
            ApplyTo::Cluster => {
                if add {
                    21
                } else {
                    20
                }
            }
            _ => 30,
        }
    }

    fn merges(&self) -> bool {
        matches!(self.operation, PatchOperation::Merge | PatchOperation::MergeAndReplaceList)
    }

    fn is_for(&self, context: PatchContext) -> bool {
        self.matches.context == PatchContext::Any || self.matches.context == context
    }

    /// The value, as a message.
    fn made<T: Name + Default>(&self) -> Result<T, String> {
        T::decode(self.value.encode().as_slice()).map_err(|e| e.to_string())
    }

    /// The value merged into a message of the same type.
    fn merge<T: Name + Default>(&self, into: &mut T) -> Result<(), String> {
        self.merge_tree(&self.value, into)
    }

    fn merge_tree<T: Name + Default>(&self, tree: &Tree, into: &mut T) -> Result<(), String> {
        let replace = self.operation == PatchOperation::MergeAndReplaceList;
        let merged = tree.merge(&into.encode_to_vec(), replace).map_err(|_| "cannot be merged".to_owned())?;
        *into = T::decode(merged.as_slice()).map_err(|e| e.to_string())?;
        Ok(())
    }

    /// Merges into any message: what comes out is one if what went in was.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn fuzz_merge(&self, message: &[u8]) {
        use envoy_types::pb::envoy::config::{
            cluster::v3::Cluster, listener::v3::Listener, route::v3::Route,
        };
        fn into<T: Name + Default + PartialEq + std::fmt::Debug>(p: &Patch, message: &[u8]) {
            if p.value.message != T::full_name() {
                return;
            }
            let Ok(mut m) = T::decode(message) else { return };
            p.merge(&mut m).expect("a message and a value of its type");
        }
        into::<Cluster>(self, message);
        into::<Listener>(self, message);
        into::<Route>(self, message);
        for replace in [false, true] {
            let _ = self.value.merge(message, replace);
        }
    }

    /// The same with another value.
    fn with(&self, value: Tree) -> Self {
        Self { matches: self.matches.clone(), value, version: String::new(), ..*self }
    }
}

#[cfg(test)]
mod tests;

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

mod check;
mod cluster;
mod leaves;
mod list;
mod listener;
mod route;
mod tree;

use std::collections::BTreeMap;

use mesh_model::{
    authored::{
        ApplyTo, EnvoyConfigObjectMatch, EnvoyConfigObjectPatch, FilterClass, PatchContext, PatchOperation,
    },
    proxy as model,
};
use prost::Name;

use self::tree::Tree;
use crate::{
    codec::{self, DecodeError, extension},
    pb,
    server::VersionHasher,
    type_url::{CDS, ECDS, LDS},
};

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

/// Where a resource is.
#[derive(Debug, Clone, Default)]
pub struct Place<'a> {
    /// Side of the proxy: inbound or outbound of a sidecar, or gateway.
    pub context: PatchContext,
    /// Services of an inbound cluster, whose name says none.
    pub services: &'a [String],
    /// Names of domains that other virtual hosts of the same routes have.
    pub taken: Option<&'a dyn Taken>,
}

/// Domains that are somebody's.
pub trait Taken: std::fmt::Debug {
    /// The virtual host that has a domain, apart from the one that is patched.
    fn by(&self, domain: &str, host: &str) -> Option<String>;
}

/// What became of a resource.
#[derive(Debug, Clone, PartialEq)]
pub enum Made<M> {
    /// What it was.
    Same,
    /// Another one, of a proxy of ours.
    Model(M),
    /// Another one, of Envoy, with a version that follows from what it was made of.
    Wire(pb::Any, String),
    /// Nothing.
    Removed,
}

/// What patches did to a resource.
#[derive(Debug)]
pub struct Outcome<M> {
    /// The resource.
    pub made: Made<M>,
    /// Patches that were refused, by position, and why.
    pub refused: Vec<(usize, String)>,
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

    /// The same with another value.
    fn with(&self, value: Tree) -> Self {
        Self { matches: self.matches.clone(), value, version: String::new(), ..*self }
    }

    /// The name of what is added whole, and its type.
    #[must_use]
    pub fn adds(&self, context: PatchContext) -> Option<(&'static str, &str)> {
        let t = match self.to {
            ApplyTo::Listener => LDS,
            ApplyTo::Cluster => CDS,
            ApplyTo::ExtensionConfig => ECDS,
            _ => return None,
        };
        // Nobody means both sides of a sidecar.
        let here = self.is_for(context)
            && (self.matches.context != PatchContext::Any || context != PatchContext::SidecarInbound);
        (self.operation == PatchOperation::Add && here)
            .then(|| (t, self.value.text("name").unwrap_or_default()))
    }

    /// The resource that is added whole, for Envoy, and its version.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn added(&self) -> Result<(pb::Any, String), String> {
        let any = match self.to {
            ApplyTo::Listener => {
                let l = self.made()?;
                check::listener(&l)?;
                codec::pack(&l)
            }
            ApplyTo::Cluster => {
                let c = self.made()?;
                check::cluster(&c)?;
                codec::pack(&c)
            }
            _ => {
                let c: envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig = self.made()?;
                if c.name.is_empty() || c.typed_config.is_none() {
                    return Err("name and typed_config are needed".into());
                }
                codec::pack(&c)
            }
        };
        Ok((any, self.version.clone()))
    }

    /// The listener that is added, for a proxy of ours.
    ///
    /// # Errors
    /// Why that cannot honour it.
    pub fn added_listener(&self, extensions: &Extensions) -> Result<model::Listener, String> {
        self.honoured(|any| decode_listener(any, extensions))
    }

    /// The cluster that is added, for a proxy of ours.
    ///
    /// # Errors
    /// Why that cannot honour it.
    pub fn added_cluster(&self) -> Result<model::Cluster, String> {
        self.honoured(codec::decode_cluster)
    }

    fn honoured<M: PartialEq>(
        &self,
        decode: impl Fn(&pb::Any) -> Result<M, DecodeError>,
    ) -> Result<M, String> {
        let model = decode(&self.added()?.0).map_err(|e| format!("{}: {}", e.field, e.reason))?;
        for v in leaves::variants(&self.value) {
            let other = self.with(v.tree).added().ok().and_then(|(any, _)| decode(&any).ok());
            if other.as_ref() == Some(&model) {
                return Err(format!("{}: our proxy does not look at it", v.path));
            }
        }
        Ok(model)
    }
}

/// Configurations of filters that listeners refer to by name.
#[derive(Debug, Default, Clone)]
pub struct Extensions(BTreeMap<String, pb::Any>);

impl Extensions {
    /// Those that patches add.
    pub fn of<'a>(patches: impl IntoIterator<Item = &'a Patch>) -> Self {
        let added = patches.into_iter().filter(|p| p.to == ApplyTo::ExtensionConfig);
        Self(added.filter_map(|p| extension::decode(&p.added().ok()?.0).ok()).collect())
    }
}

/// For a proxy of ours, which is not sent them apart: in place.
fn decode_listener(any: &pb::Any, extensions: &Extensions) -> Result<model::Listener, DecodeError> {
    codec::decode_listener(&extension::expand(any, &extensions.0)?.listener)
}

/// The side of its proxy that a listener is on.
#[must_use]
pub fn context(gateway: bool, direction: model::Direction) -> PatchContext {
    listener::context(gateway, direction)
}

/// Patches a listener. With `ours` it is for a proxy of ours.
#[must_use]
pub fn listener(
    l: &model::Listener,
    place: &Place<'_>,
    patches: &[&Patch],
    ours: Option<&Extensions>,
) -> Outcome<model::Listener> {
    let concerns = |p: &Patch| {
        matches!(p.scope(), Scope::Listeners | Scope::Routes)
            && p.is_for(place.context)
            && (p.scope() == Scope::Routes || listener::is_for(p, l))
    };
    run(
        patches,
        concerns,
        || (codec::encode_listener(l), codec::version(l)),
        |p, m| listener::apply(p, m, place),
        check::listener,
        ours.map(|e| move |any: &pb::Any| decode_listener(any, e)),
    )
}

/// Patches a route configuration.
#[must_use]
pub fn routes(
    r: &model::RouteConfiguration,
    place: &Place<'_>,
    patches: &[&Patch],
    ours: bool,
) -> Outcome<model::RouteConfiguration> {
    let concerns =
        |p: &Patch| p.scope() == Scope::Routes && p.is_for(place.context) && route::is_for(p, &r.name, place);
    run(
        patches,
        concerns,
        || (codec::encode_route(r), codec::version(r)),
        |p, m| route::apply(p, m, place),
        |m| check::routes(m, place.taken),
        ours.then_some(codec::decode_route),
    )
}

/// Patches a virtual host that is apart from its route configuration.
#[must_use]
pub fn virtual_host(
    h: &model::VirtualHost,
    config: &str,
    place: &Place<'_>,
    patches: &[&Patch],
) -> Outcome<model::VirtualHost> {
    let concerns = |p: &Patch| {
        matches!(p.to, ApplyTo::VirtualHost | ApplyTo::HttpRoute)
            && p.operation_of_host()
            && p.is_for(place.context)
            && route::is_for(p, config, place)
    };
    run(
        patches,
        concerns,
        || (codec::encode_virtual_host(h), codec::version(h)),
        route::virtual_host,
        |m| check::virtual_host(m, place.taken),
        Some(codec::decode_virtual_host),
    )
}

/// Patches a cluster.
#[must_use]
pub fn cluster(
    c: &model::Cluster,
    place: &Place<'_>,
    patches: &[&Patch],
    ours: bool,
) -> Outcome<model::Cluster> {
    let concerns = |p: &Patch| {
        p.to == ApplyTo::Cluster && p.is_for(place.context) && cluster::is_for(p, &c.name, place.services)
    };
    run(
        patches,
        concerns,
        || (codec::encode_cluster(c), codec::version(c)),
        cluster::apply,
        check::cluster,
        ours.then_some(codec::decode_cluster),
    )
}

impl Patch {
    /// Whether it changes a host, other than putting one beside it.
    fn operation_of_host(&self) -> bool {
        self.to != ApplyTo::VirtualHost || self.operation != PatchOperation::Add
    }
}

fn run<T: Name + Default + Clone, M: PartialEq>(
    patches: &[&Patch],
    concerns: impl Fn(&Patch) -> bool,
    encode: impl FnOnce() -> (pb::Any, String),
    apply: impl Fn(&Patch, &mut T) -> Res,
    check: impl Fn(&T) -> Result<(), String>,
    ours: Option<impl Fn(&pb::Any) -> Result<M, DecodeError>>,
) -> Outcome<M> {
    let mut out = Outcome { made: Made::Same, refused: vec![] };
    let mine: Vec<(usize, &Patch)> =
        patches.iter().enumerate().map(|(i, p)| (i, *p)).filter(|(_, p)| concerns(p)).collect();
    if mine.is_empty() {
        return out;
    }
    let (any, version) = encode();
    // What was just encoded is whole.
    let Ok(mut now) = codec::unpack::<T>(&any) else { return out };
    let mut versions = VersionHasher::default();
    versions.write(version.as_bytes());
    for (i, p) in mine {
        let mut next = now.clone();
        match try_one(p, &now, &mut next, &apply, &check, ours.as_ref()) {
            Ok((Did::Nothing, _)) => {}
            Ok((Did::Removed, _)) => {
                out.made = Made::Removed;
                return out;
            }
            Ok((Did::Changed, model)) => {
                versions.write(p.version.as_bytes());
                out.made = match model {
                    Some(m) => Made::Model(m),
                    None => Made::Wire(codec::pack(&next), String::new()),
                };
                now = next;
            }
            Err(why) => out.refused.push((i, why)),
        }
    }
    if let Made::Wire(_, version) = &mut out.made {
        *version = versions.finish();
    }
    out
}

fn try_one<T: Name + Default + Clone, M: PartialEq>(
    p: &Patch,
    now: &T,
    next: &mut T,
    apply: impl Fn(&Patch, &mut T) -> Res,
    check: impl Fn(&T) -> Result<(), String>,
    ours: Option<&impl Fn(&pb::Any) -> Result<M, DecodeError>>,
) -> Result<(Did, Option<M>), String> {
    let did = apply(p, next)?;
    if did != Did::Changed {
        return Ok((did, None));
    }
    check(next)?;
    let Some(decode) = ours else { return Ok((did, None)) };
    let model = decode(&codec::pack(next)).map_err(|e| format!("{}: {}", e.field, e.reason))?;
    if p.operation != PatchOperation::Remove {
        for v in leaves::variants(&p.value) {
            let mut other = now.clone();
            if apply(&p.with(v.tree), &mut other).is_ok()
                && decode(&codec::pack(&other)).is_ok_and(|other| other == model)
            {
                return Err(format!("{}: our proxy does not look at it", v.path));
            }
        }
    }
    Ok((did, Some(model)))
}

#[cfg(test)]
mod tests;

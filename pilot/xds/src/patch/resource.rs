//! Patches on one resource: each in its turn, and each refused alone.

use mesh_model::{
    authored::{ApplyTo, PatchContext, PatchOperation},
    proxy as model,
};
use prost::Name;

use super::{
    Did, Extensions, Patch, Res, Scope, added::decode_listener, check, cluster as clusters, leaves,
    listener as listeners, route,
};
use crate::{
    codec::{self, DecodeError},
    pb,
    server::VersionHasher,
};

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

/// The side of its proxy that a listener is on.
#[must_use]
pub fn context(gateway: bool, direction: model::Direction) -> PatchContext {
    listeners::context(gateway, direction)
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
            && (p.scope() == Scope::Routes || listeners::is_for(p, l))
    };
    run(
        patches,
        concerns,
        || (codec::encode_listener(l), codec::version(l)),
        |p, m| listeners::apply(p, m, place),
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
        p.to == ApplyTo::Cluster && p.is_for(place.context) && clusters::is_for(p, &c.name, place.services)
    };
    run(
        patches,
        concerns,
        || (codec::encode_cluster(c), codec::version(c)),
        clusters::apply,
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

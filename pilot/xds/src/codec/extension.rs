//! HTTP filters whose configuration is a resource of its own (ECDS): they are put in place before a listener is
//! decoded, so that nothing else need know where a filter's configuration came from.

use std::collections::{BTreeMap, BTreeSet};

use envoy_types::pb::{
    envoy::{
        config::{
            core::v3::{ExtensionConfigSource, TypedExtensionConfig},
            listener::v3::{self as l, Listener},
        },
        extensions::filters::network::http_connection_manager::v3 as hcm,
    },
    google::protobuf as gp,
};

use super::{DecodeError, common, pack, unpack};
use crate::pb;

/// Configurations by filter name.
pub(crate) type Extensions = BTreeMap<String, pb::Any>;

/// A listener with its filters' configurations in place.
#[derive(Debug)]
pub(crate) struct Expanded {
    /// The listener; the same as before if it has no such filter.
    pub(crate) listener: pb::Any,
    /// Names of the configurations that it follows.
    pub(crate) names: BTreeSet<String>,
    /// Those that have not arrived and have no default: it cannot serve yet.
    pub(crate) missing: BTreeSet<String>,
}

/// Name and content of an ECDS resource.
pub(crate) fn decode(any: &pb::Any) -> Result<(String, pb::Any), DecodeError> {
    let m: TypedExtensionConfig = unpack(any)?;
    let content = m.typed_config.ok_or_else(|| DecodeError {
        resource: m.name.clone(),
        field: "typed_config".into(),
        reason: "is missing".into(),
    })?;
    Ok((m.name, pb::Any { type_url: content.type_url, value: content.value.into() }))
}

/// Puts configurations in place.
///
/// # Errors
/// [`DecodeError`] if the listener is damaged, or a configuration has a type that the filter does not allow.
pub(crate) fn expand(any: &pb::Any, extensions: &Extensions) -> Result<Expanded, DecodeError> {
    let mut m: Listener = unpack(any)?;
    let mut out = Expanded { listener: any.clone(), names: BTreeSet::new(), missing: BTreeSet::new() };
    let name = m.name.clone();
    let chains = m.filter_chains.iter_mut().chain(&mut m.default_filter_chain);
    for filter in chains.flat_map(|c| &mut c.filters) {
        let Some(l::filter::ConfigType::TypedConfig(config)) = &mut filter.config_type else { continue };
        if !common::is::<hcm::HttpConnectionManager>(config) {
            continue;
        }
        let as_any = pb::Any { type_url: config.type_url.clone(), value: config.value.clone().into() };
        let mut manager: hcm::HttpConnectionManager = unpack(&as_any)?;
        let before = out.names.len();
        for f in &mut manager.http_filters {
            let Some(hcm::http_filter::ConfigType::ConfigDiscovery(source)) = &f.config_type else {
                continue;
            };
            out.names.insert(f.name.clone());
            match content(&f.name, source, extensions) {
                Ok(Some(c)) => f.config_type = Some(hcm::http_filter::ConfigType::TypedConfig(c)),
                Ok(None) => drop(out.missing.insert(f.name.clone())),
                Err(reason) => {
                    let field = format!("http_filters[{}].config_discovery", f.name);
                    return Err(DecodeError { resource: name, field, reason });
                }
            }
        }
        if out.names.len() > before {
            *config = common::any(&manager);
        }
    }
    if !out.names.is_empty() {
        out.listener = pack(&m);
    }
    Ok(out)
}

fn content(
    name: &str,
    source: &ExtensionConfigSource,
    extensions: &Extensions,
) -> Result<Option<gp::Any>, String> {
    let short = |url: &str| url.rsplit('/').next().unwrap_or_default().to_owned();
    if let Some(c) = extensions.get(name) {
        let fits =
            source.type_urls.is_empty() || source.type_urls.iter().any(|t| short(t) == short(&c.type_url));
        if !fits {
            return Err(format!("{:?} is none of the types that the filter allows", c.type_url));
        }
        return Ok(Some(gp::Any { type_url: c.type_url.clone(), value: c.value.to_vec() }));
    }
    Ok(source.default_config.clone())
}

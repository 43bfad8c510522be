//! What patches add whole: listeners, clusters, and configurations of filters.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use mesh_model::{
    authored::{ApplyTo, PatchContext, PatchOperation},
    proxy as model,
};

use super::{Patch, check, leaves};
use crate::{
    codec::{self, DecodeError, extension},
    pb,
    type_url::{CDS, ECDS, LDS},
};

impl Patch {
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
                let c: TypedExtensionConfig = self.made()?;
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
pub struct Extensions(pub(super) BTreeMap<String, pb::Any>);

impl Extensions {
    /// Those that patches add.
    pub fn of<'a>(patches: impl IntoIterator<Item = &'a Patch>) -> Self {
        let added = patches.into_iter().filter(|p| p.to == ApplyTo::ExtensionConfig);
        Self(added.filter_map(|p| extension::decode(&p.added().ok()?.0).ok()).collect())
    }
}

/// For a proxy of ours, which is not sent them apart: in place.
pub(super) fn decode_listener(
    any: &pb::Any,
    extensions: &Extensions,
) -> Result<model::Listener, DecodeError> {
    codec::decode_listener(&extension::expand(any, &extensions.0)?.listener)
}

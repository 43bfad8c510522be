//! `dynamic_resources`: one aggregated stream to a static cluster.

use envoy_types::pb::envoy::config::{
    bootstrap::v3::bootstrap::DynamicResources,
    core::v3::{
        ApiConfigSource, ApiVersion, ConfigSource, api_config_source::ApiType,
        config_source::ConfigSourceSpecifier, grpc_service::TargetSpecifier,
    },
};
use prost::Message as _;

use super::Dynamic;
use crate::client::Mode;

/// Reads the encoded message; `None` if it is empty.
pub(super) fn decode(bytes: &[u8], warnings: &mut Vec<String>) -> Result<Option<Dynamic>, String> {
    let m = DynamicResources::decode(bytes).map_err(|e| e.to_string())?;
    for (set, name) in [
        (!m.lds_resources_locator.is_empty(), "lds_resources_locator"),
        (!m.cds_resources_locator.is_empty(), "cds_resources_locator"),
    ] {
        if set {
            return Err(format!("{name}: is set, which is not supported"));
        }
    }
    let listeners = aggregated(m.lds_config, "lds_config")?;
    let clusters = aggregated(m.cds_config, "cds_config")?;
    let Some(ads) = m.ads_config else {
        return if listeners || clusters {
            Err("ads_config: is missing, and lds_config or cds_config needs it".into())
        } else {
            Ok(None)
        };
    };
    let (cluster, mode) = stream(ads, warnings).map_err(|e| format!("ads_config.{e}"))?;
    Ok(Some(Dynamic { cluster, mode, clusters, listeners }))
}

fn aggregated(source: Option<ConfigSource>, field: &str) -> Result<bool, String> {
    let Some(source) = source else { return Ok(false) };
    match source.config_source_specifier {
        Some(ConfigSourceSpecifier::Ads(_)) => Ok(true),
        None => Err(format!("{field}: names no source")),
        Some(other) => {
            let name = match other {
                ConfigSourceSpecifier::ApiConfigSource(_) => "api_config_source",
                ConfigSourceSpecifier::PathConfigSource(_) => "path_config_source",
                ConfigSourceSpecifier::Self_(_) => "self",
                _ => "path",
            };
            Err(format!("{field}.{name}: is not supported; only ads is, with an ads_config"))
        }
    }
}

#[allow(deprecated)]
fn stream(ads: ApiConfigSource, warnings: &mut Vec<String>) -> Result<(String, Mode), String> {
    let mode = match ApiType::try_from(ads.api_type) {
        Ok(ApiType::Grpc | ApiType::AggregatedGrpc) => Mode::Sotw,
        Ok(ApiType::DeltaGrpc | ApiType::AggregatedDeltaGrpc) => Mode::Delta,
        _ => return Err("api_type: only GRPC and DELTA_GRPC are supported".into()),
    };
    if ads.transport_api_version == i32::from(ApiVersion::V2) {
        return Err("transport_api_version: only V3 is supported".into());
    }
    if !ads.config_validators.is_empty() {
        return Err("config_validators: is set, which is not supported".into());
    }
    if ads.rate_limit_settings.is_some() {
        warnings.push("dynamic_resources.ads_config.rate_limit_settings is ignored".into());
    }
    let count = ads.grpc_services.len();
    let Some(service) = ads.grpc_services.into_iter().next() else {
        return Err("grpc_services: is empty".into());
    };
    if count > 1 {
        return Err("grpc_services: more than one is not supported".into());
    }
    if !service.initial_metadata.is_empty() {
        return Err("grpc_services[0].initial_metadata: is set, which is not supported".into());
    }
    match service.target_specifier {
        Some(TargetSpecifier::EnvoyGrpc(g)) => Ok((g.cluster_name, mode)),
        Some(TargetSpecifier::GoogleGrpc(_)) => {
            Err("grpc_services[0].google_grpc: is not supported; envoy_grpc is".into())
        }
        None => Err("grpc_services[0]: names no cluster".into()),
    }
}

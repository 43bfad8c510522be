//! Entries of `typed_per_filter_config` that are a `FilterConfig`: what our own proxies are told of a route beside
//! Envoy's settings.

use std::{collections::HashMap, time::Duration};

use envoy_types::pb::{envoy::config::route::v3 as r, google::protobuf as gp};
use mesh_model::proxy::SessionOverride;

use super::{At, Bad, Res, common::*};

/// Where the end of sessions stands. Envoy has no such filter, and reads that it may do without.
const SESSION_END: &str = "flotilla.stateful_session";

/// Adds the end of sessions, if they have one.
pub(super) fn session_end(s: &SessionOverride, out: &mut HashMap<String, gp::Any>) {
    if let SessionOverride::Set(s) = s
        && !s.absolute.is_zero()
    {
        let config = r::FilterConfig {
            config: Some(any(&duration(s.absolute))),
            is_optional: true,
            ..Default::default()
        };
        out.insert(SESSION_END.to_owned(), any(&config));
    }
}

/// Reads an entry. One of somebody else's that need not be understood is passed over.
pub(super) fn decode(name: &str, c: r::FilterConfig, session_end: &mut Duration) -> Res<()> {
    match c.config {
        Some(a) if name == SESSION_END && !c.disabled => {
            *session_end = to_duration(typed(&a).at("config")?).at("config")?;
            Ok(())
        }
        _ if c.is_optional => Ok(()),
        _ => Err(Bad::unsupported("", "this filter")),
    }
}

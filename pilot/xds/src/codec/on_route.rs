//! Entries of `typed_per_filter_config` that are a `FilterConfig`: authorisers that a route turns on, and what our own
//! proxies are told of a route beside Envoy's settings.

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

/// Turns on the filters with these names. A configuration of no type says no more than that.
pub(super) fn authorizers(names: &[String], out: &mut HashMap<String, gp::Any>) {
    for name in names {
        let on = r::FilterConfig { config: Some(gp::Any::default()), ..Default::default() };
        out.insert(name.clone(), any(&on));
    }
}

/// Reads an entry. One of somebody else's that need not be understood is passed over.
pub(super) fn decode(
    name: String,
    c: r::FilterConfig,
    authorizers: &mut Vec<String>,
    session_end: &mut Duration,
) -> Res<()> {
    match c.config {
        Some(a) if name == SESSION_END && !c.disabled => {
            *session_end = to_duration(typed(&a).at("config")?).at("config")?;
            Ok(())
        }
        // Which filter it is does not stand here; one that may be off is an authoriser.
        Some(a) if a.type_url.is_empty() && !c.disabled => {
            authorizers.push(name);
            Ok(())
        }
        _ if c.is_optional => Ok(()),
        _ => Err(Bad::unsupported("", "this filter")),
    }
}

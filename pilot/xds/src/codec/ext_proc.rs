//! External processing.

use envoy_types::pb::{
    envoy::{
        config::common::mutation_rules::v3 as rules,
        extensions::filters::http::ext_proc::v3::{
            self as proc, external_processor::RouteCacheAction, processing_mode as pm,
        },
        r#type::v3 as typ,
    },
    google::protobuf as gp,
};
use mesh_model::proxy::{BodyMode, ExtProc, MutationRules, ProcOverride, ProcessingMode, RouteCache};

use super::{At, Bad, Res, common::*, refuse};

/// Envoy's default.
const ERROR: u16 = 500;

pub(super) fn encode(m: &ExtProc) -> proc::ExternalProcessor {
    let route_cache = match m.route_cache {
        RouteCache::Asked => RouteCacheAction::Default,
        RouteCache::Clear => RouteCacheAction::Clear,
        RouteCache::Retain => RouteCacheAction::Retain,
    };
    let forward = !m.allowed_headers.is_empty() || !m.disallowed_headers.is_empty();
    proc::ExternalProcessor {
        grpc_service: Some(grpc_service(&m.service)),
        failure_mode_allow: m.failure_mode_allow,
        processing_mode: Some(mode(&m.mode)),
        message_timeout: Some(duration(m.message_timeout)),
        max_message_timeout: (!m.max_message_timeout.is_zero()).then(|| duration(m.max_message_timeout)),
        mutation_rules: (m.mutation_rules != MutationRules::default()).then(|| mutation(&m.mutation_rules)),
        forward_rules: forward.then(|| proc::HeaderForwardingRules {
            allowed_headers: string_list(&m.allowed_headers),
            disallowed_headers: string_list(&m.disallowed_headers),
        }),
        allow_mode_override: m.allow_mode_override,
        disable_immediate_response: m.disable_immediate_response,
        route_cache_action: route_cache.into(),
        status_on_error: (m.status_on_error != ERROR)
            .then(|| typ::HttpStatus { code: i32::from(m.status_on_error) }),
        stat_prefix: m.stat_prefix.clone(),
        ..Default::default()
    }
}

pub(super) fn decode(m: proc::ExternalProcessor) -> Res<ExtProc> {
    refuse!(m;
        http_service, request_attributes, response_attributes, filter_metadata, metadata_options,
        observability_mode, deferred_close_timeout, send_body_without_waiting_for_header_response,
        allowed_override_modes, processing_request_modifier, on_processing_response,
        allow_content_length_header
    );
    let service = m.grpc_service.ok_or_else(|| Bad::new("grpc_service", "is missing"))?;
    let default = ExtProc::default();
    let route_cache = match RouteCacheAction::try_from(m.route_cache_action) {
        Ok(RouteCacheAction::Default) if m.disable_clear_route_cache => RouteCache::Retain,
        Ok(RouteCacheAction::Default) => RouteCache::Asked,
        Ok(_) if m.disable_clear_route_cache => {
            return Err(Bad::new("route_cache_action", "is set beside disable_clear_route_cache"));
        }
        Ok(RouteCacheAction::Clear) => RouteCache::Clear,
        Ok(RouteCacheAction::Retain) => RouteCache::Retain,
        Err(_) => return Err(Bad::unsupported("route_cache_action", m.route_cache_action)),
    };
    let forward = m.forward_rules.unwrap_or_default();
    Ok(ExtProc {
        service: to_grpc_service(service).at("grpc_service")?,
        failure_mode_allow: m.failure_mode_allow,
        mode: to_mode(m.processing_mode.unwrap_or_default()).at("processing_mode")?,
        message_timeout: m
            .message_timeout
            .map_or(Ok(default.message_timeout), to_duration)
            .at("message_timeout")?,
        max_message_timeout: m
            .max_message_timeout
            .map_or(Ok(default.max_message_timeout), to_duration)
            .at("max_message_timeout")?,
        mutation_rules: to_mutation(m.mutation_rules.unwrap_or_default()),
        allowed_headers: to_string_list("forward_rules.allowed_headers", forward.allowed_headers)?,
        disallowed_headers: to_string_list("forward_rules.disallowed_headers", forward.disallowed_headers)?,
        allow_mode_override: m.allow_mode_override,
        disable_immediate_response: m.disable_immediate_response,
        route_cache,
        status_on_error: to_status(m.status_on_error, ERROR).at("status_on_error")?,
        stat_prefix: m.stat_prefix,
    })
}

fn mode(m: &ProcessingMode) -> proc::ProcessingMode {
    let send = |on| i32::from(if on { pm::HeaderSendMode::Send } else { pm::HeaderSendMode::Skip });
    let body = |b| {
        i32::from(match b {
            BodyMode::None => pm::BodySendMode::None,
            BodyMode::Streamed => pm::BodySendMode::Streamed,
            BodyMode::Buffered => pm::BodySendMode::Buffered,
            BodyMode::BufferedPartial => pm::BodySendMode::BufferedPartial,
        })
    };
    proc::ProcessingMode {
        request_header_mode: send(m.request_headers),
        response_header_mode: send(m.response_headers),
        request_body_mode: body(m.request_body),
        response_body_mode: body(m.response_body),
        request_trailer_mode: send(m.request_trailers),
        response_trailer_mode: send(m.response_trailers),
    }
}

fn to_mode(m: proc::ProcessingMode) -> Res<ProcessingMode> {
    let send = |field: &str, v, default| match pm::HeaderSendMode::try_from(v) {
        Ok(pm::HeaderSendMode::Default) => Ok(default),
        Ok(pm::HeaderSendMode::Send) => Ok(true),
        Ok(pm::HeaderSendMode::Skip) => Ok(false),
        Err(_) => Err(Bad::unsupported(field, v)),
    };
    let body = |field: &str, v| match pm::BodySendMode::try_from(v) {
        Ok(pm::BodySendMode::None) => Ok(BodyMode::None),
        Ok(pm::BodySendMode::Streamed) => Ok(BodyMode::Streamed),
        Ok(pm::BodySendMode::Buffered) => Ok(BodyMode::Buffered),
        Ok(pm::BodySendMode::BufferedPartial) => Ok(BodyMode::BufferedPartial),
        Ok(other) => Err(Bad::unsupported(field, other.as_str_name())),
        Err(_) => Err(Bad::unsupported(field, v)),
    };
    Ok(ProcessingMode {
        request_headers: send("request_header_mode", m.request_header_mode, true)?,
        response_headers: send("response_header_mode", m.response_header_mode, true)?,
        request_body: body("request_body_mode", m.request_body_mode)?,
        response_body: body("response_body_mode", m.response_body_mode)?,
        request_trailers: send("request_trailer_mode", m.request_trailer_mode, false)?,
        response_trailers: send("response_trailer_mode", m.response_trailer_mode, false)?,
    })
}

fn mutation(r: &MutationRules) -> rules::HeaderMutationRules {
    rules::HeaderMutationRules {
        allow_all_routing: boolv(r.allow_all_routing),
        allow_envoy: boolv(r.allow_envoy),
        disallow_system: boolv(r.disallow_system),
        disallow_all: boolv(r.disallow_all),
        allow_expression: r.allow.as_deref().map(regex),
        disallow_expression: r.disallow.as_deref().map(regex),
        disallow_is_error: boolv(r.disallow_is_error),
    }
}

fn to_mutation(r: rules::HeaderMutationRules) -> MutationRules {
    MutationRules {
        allow_all_routing: bool_or(r.allow_all_routing, false),
        allow_envoy: bool_or(r.allow_envoy, false),
        disallow_system: bool_or(r.disallow_system, false),
        disallow_all: bool_or(r.disallow_all, false),
        allow: r.allow_expression.map(|e| e.regex),
        disallow: r.disallow_expression.map(|e| e.regex),
        disallow_is_error: bool_or(r.disallow_is_error, false),
    }
}

pub(super) fn per_route(o: &ProcOverride) -> proc::ExtProcPerRoute {
    use proc::ext_proc_per_route::Override as O;
    let o = match o {
        ProcOverride::Disabled => O::Disabled(true),
        ProcOverride::Set { mode: m, service, failure_mode_allow } => O::Overrides(proc::ExtProcOverrides {
            processing_mode: m.as_ref().map(mode),
            grpc_service: service.as_ref().map(grpc_service),
            failure_mode_allow: failure_mode_allow.map(|value| gp::BoolValue { value }),
            ..Default::default()
        }),
    };
    proc::ExtProcPerRoute { r#override: Some(o) }
}

#[allow(deprecated)]
pub(super) fn to_per_route(m: proc::ExtProcPerRoute) -> Res<ProcOverride> {
    use proc::ext_proc_per_route::Override as O;
    match m.r#override {
        Some(O::Disabled(true)) => Ok(ProcOverride::Disabled),
        Some(O::Overrides(o)) => overrides(o).at("overrides"),
        Some(O::Disabled(false)) => Err(Bad::new("disabled", "must be true")),
        None => Err(Bad::new("override", "is missing")),
    }
}

#[allow(deprecated)]
fn overrides(o: proc::ExtProcOverrides) -> Res<ProcOverride> {
    refuse!(o;
        async_mode, request_attributes, response_attributes, metadata_options, grpc_initial_metadata,
        processing_request_modifier
    );
    Ok(ProcOverride::Set {
        mode: o.processing_mode.map(to_mode).transpose().at("processing_mode")?,
        service: o.grpc_service.map(to_grpc_service).transpose().at("grpc_service")?,
        failure_mode_allow: o.failure_mode_allow.map(|b| b.value),
    })
}

#[cfg(test)]
mod tests {
    use mesh_model::proxy::{GrpcService, StringMatch};

    use super::*;

    #[test]
    fn processors_round_trip() {
        let service = GrpcService { cluster: "p".into(), ..GrpcService::default() };
        let all = ExtProc {
            service: service.clone(),
            failure_mode_allow: true,
            mode: ProcessingMode {
                request_headers: false,
                response_headers: false,
                request_body: BodyMode::BufferedPartial,
                response_body: BodyMode::Streamed,
                request_trailers: true,
                response_trailers: true,
            },
            message_timeout: std::time::Duration::from_secs(1),
            max_message_timeout: std::time::Duration::from_secs(9),
            mutation_rules: MutationRules {
                allow_all_routing: true,
                allow: Some("x-.*".into()),
                disallow_is_error: true,
                ..MutationRules::default()
            },
            allowed_headers: vec![StringMatch::exact("a")],
            disallowed_headers: vec![StringMatch::exact("b")],
            allow_mode_override: true,
            disable_immediate_response: true,
            route_cache: RouteCache::Clear,
            status_on_error: 503,
            stat_prefix: "s".into(),
        };
        let least = ExtProc { service: service.clone(), ..ExtProc::default() };
        for m in [all, least] {
            assert_eq!(decode(encode(&m)).unwrap(), m);
        }
        let set = ProcOverride::Set {
            mode: Some(ProcessingMode::default()),
            service: Some(service),
            failure_mode_allow: Some(true),
        };
        for o in [ProcOverride::Disabled, set] {
            assert_eq!(to_per_route(per_route(&o)).unwrap(), o);
        }
    }

    #[test]
    fn what_is_not_there_is_refused_by_name() {
        let refused = |change: fn(&mut proc::ExternalProcessor), field: &str| {
            let mut m = encode(&ExtProc::default());
            change(&mut m);
            assert_eq!(decode(m).unwrap_err().field, field);
        };
        refused(|m| m.observability_mode = true, "observability_mode");
        refused(|m| m.request_attributes = vec!["a".into()], "request_attributes");
        refused(|m| m.grpc_service = None, "grpc_service");
        refused(|m| m.metadata_options = Some(Default::default()), "metadata_options");
        refused(
            |m| m.processing_mode.as_mut().unwrap().response_body_mode = 4,
            "processing_mode.response_body_mode",
        );
        refused(
            |m| {
                m.disable_clear_route_cache = true;
                m.route_cache_action = RouteCacheAction::Clear.into();
            },
            "route_cache_action",
        );
    }
}

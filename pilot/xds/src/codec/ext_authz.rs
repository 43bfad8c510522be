//! External authorization.

use envoy_types::pb::envoy::{
    config::core::v3 as core,
    extensions::filters::{http::ext_authz::v3 as authz, network::ext_authz::v3 as network},
    r#type::{matcher::v3 as matcher, v3 as typ},
};
use mesh_model::proxy::{
    AuthzOverride, AuthzService, BodySettings, ConnectionAuthz, ExtAuthz, HttpAuthz, MetadataMatch,
};

use super::{At, Bad, Res, common::*, refuse};

const ALL: u32 = 1_000_000;

pub(super) fn encode(m: &ExtAuthz) -> authz::ExtAuthz {
    use authz::ext_authz::Services as S;
    let service = match &m.service {
        AuthzService::Grpc(g) => S::GrpcService(grpc_service(g)),
        AuthzService::Http(h) => S::HttpService(http(h)),
    };
    authz::ExtAuthz {
        services: Some(service),
        transport_api_version: core::ApiVersion::V3.into(),
        failure_mode_allow: m.failure_mode_allow,
        failure_mode_allow_header_add: m.failure_mode_allow_header_add,
        with_request_body: m.with_request_body.as_ref().map(body),
        status_on_error: (m.status_on_error != 403)
            .then(|| typ::HttpStatus { code: i32::from(m.status_on_error) }),
        allowed_headers: string_list(&m.allowed_headers),
        disallowed_headers: string_list(&m.disallowed_headers),
        metadata_context_namespaces: m.metadata_namespaces.clone(),
        include_tls_session: m.include_tls_session,
        filter_enabled: (m.enabled != ALL).then(|| runtime_ppm(m.enabled)),
        filter_enabled_metadata: m.enabled_metadata.as_ref().map(metadata_match),
        clear_route_cache: m.clear_route_cache,
        ..Default::default()
    }
}

pub(super) fn decode(m: authz::ExtAuthz) -> Res<ExtAuthz> {
    use authz::ext_authz::Services as S;
    refuse!(m;
        typed_metadata_context_namespaces, route_metadata_context_namespaces,
        route_typed_metadata_context_namespaces, deny_at_disable, include_peer_certificate, bootstrap_metadata_labels_key, encode_raw_headers,
        decoder_header_mutation_rules, validate_mutations, shadow_mode
    );
    let service = match m.services {
        Some(S::GrpcService(g)) => AuthzService::Grpc(to_grpc_service(g).at("grpc_service")?),
        Some(S::HttpService(h)) => AuthzService::Http(Box::new(to_http(h).at("http_service")?)),
        None => return Err(Bad::new("services", "is missing")),
    };
    Ok(ExtAuthz {
        service,
        failure_mode_allow: m.failure_mode_allow,
        failure_mode_allow_header_add: m.failure_mode_allow_header_add,
        with_request_body: m.with_request_body.map(to_body),
        status_on_error: to_status(m.status_on_error, 403).at("status_on_error")?,
        allowed_headers: to_string_list("allowed_headers", m.allowed_headers)?,
        disallowed_headers: to_string_list("disallowed_headers", m.disallowed_headers)?,
        metadata_namespaces: m.metadata_context_namespaces,
        include_tls_session: m.include_tls_session,
        enabled: to_runtime_ppm(m.filter_enabled, ALL),
        enabled_metadata: enabled_metadata(m.filter_enabled_metadata)?,
        clear_route_cache: m.clear_route_cache,
        on_routes: String::new(),
    })
}

fn enabled_metadata(m: Option<matcher::MetadataMatcher>) -> Res<Option<MetadataMatch>> {
    m.map(to_metadata_match).transpose().at("filter_enabled_metadata")
}

pub(super) fn connection(m: &ConnectionAuthz) -> network::ExtAuthz {
    network::ExtAuthz {
        stat_prefix: m.stat_prefix.clone(),
        grpc_service: Some(grpc_service(&m.service)),
        failure_mode_allow: m.failure_mode_allow,
        transport_api_version: core::ApiVersion::V3.into(),
        filter_enabled_metadata: m.enabled_metadata.as_ref().map(metadata_match),
        include_tls_session: m.include_tls_session,
        ..Default::default()
    }
}

pub(super) fn to_connection(m: network::ExtAuthz) -> Res<ConnectionAuthz> {
    refuse!(m; include_peer_certificate, bootstrap_metadata_labels_key, send_tls_alert_on_denial);
    let service = m.grpc_service.ok_or_else(|| Bad::new("grpc_service", "is missing"))?;
    Ok(ConnectionAuthz {
        stat_prefix: m.stat_prefix,
        service: to_grpc_service(service).at("grpc_service")?,
        failure_mode_allow: m.failure_mode_allow,
        include_tls_session: m.include_tls_session,
        enabled_metadata: enabled_metadata(m.filter_enabled_metadata)?,
    })
}

fn body(b: &BodySettings) -> authz::BufferSettings {
    authz::BufferSettings {
        max_request_bytes: b.max_bytes,
        allow_partial_message: b.allow_partial,
        pack_as_bytes: b.pack_as_bytes,
    }
}

fn to_body(b: authz::BufferSettings) -> BodySettings {
    BodySettings {
        max_bytes: b.max_request_bytes,
        allow_partial: b.allow_partial_message,
        pack_as_bytes: b.pack_as_bytes,
    }
}

fn http(h: &HttpAuthz) -> authz::HttpService {
    authz::HttpService {
        server_uri: Some(http_uri(&h.uri, &h.cluster, h.timeout)),
        path_prefix: h.path_prefix.clone(),
        authorization_request: (!h.headers_to_add.is_empty()).then(|| authz::AuthorizationRequest {
            headers_to_add: header_values(&h.headers_to_add),
            ..Default::default()
        }),
        authorization_response: Some(authz::AuthorizationResponse {
            allowed_upstream_headers: string_list(&h.allowed_upstream_headers),
            allowed_upstream_headers_to_append: string_list(&h.allowed_upstream_headers_to_append),
            allowed_client_headers: string_list(&h.allowed_client_headers),
            allowed_client_headers_on_success: string_list(&h.allowed_client_headers_on_success),
            dynamic_metadata_from_headers: string_list(&h.dynamic_metadata_from_headers),
        }),
        ..Default::default()
    }
}

#[allow(deprecated)]
fn to_http(h: authz::HttpService) -> Res<HttpAuthz> {
    refuse!(h; path_override, retry_policy);
    let (uri, cluster, timeout) = to_http_uri(h.server_uri).at("server_uri")?;
    let request = h.authorization_request.unwrap_or_default();
    if request.allowed_headers.is_some() {
        let field = "authorization_request.allowed_headers";
        return Err(Bad::unsupported(field, "the deprecated field (use allowed_headers of the filter)"));
    }
    let r = h.authorization_response.unwrap_or_default();
    Ok(HttpAuthz {
        uri,
        cluster,
        timeout,
        path_prefix: h.path_prefix,
        headers_to_add: to_header_values("authorization_request.headers_to_add", request.headers_to_add)?,
        allowed_upstream_headers: to_string_list("allowed_upstream_headers", r.allowed_upstream_headers)?,
        allowed_upstream_headers_to_append: to_string_list(
            "allowed_upstream_headers_to_append",
            r.allowed_upstream_headers_to_append,
        )?,
        allowed_client_headers: to_string_list("allowed_client_headers", r.allowed_client_headers)?,
        allowed_client_headers_on_success: to_string_list(
            "allowed_client_headers_on_success",
            r.allowed_client_headers_on_success,
        )?,
        dynamic_metadata_from_headers: to_string_list(
            "dynamic_metadata_from_headers",
            r.dynamic_metadata_from_headers,
        )?,
    })
}

pub(super) fn per_route(o: &AuthzOverride) -> authz::ExtAuthzPerRoute {
    use authz::ext_authz_per_route::Override as O;
    let o = match o {
        AuthzOverride::Disabled => O::Disabled(true),
        AuthzOverride::Check { context_extensions, no_body, with_request_body } => {
            O::CheckSettings(authz::CheckSettings {
                context_extensions: context_extensions.clone().into_iter().collect(),
                disable_request_body_buffering: *no_body,
                with_request_body: with_request_body.as_ref().map(body),
                ..Default::default()
            })
        }
    };
    authz::ExtAuthzPerRoute { r#override: Some(o) }
}

pub(super) fn to_per_route(m: authz::ExtAuthzPerRoute) -> Res<AuthzOverride> {
    use authz::ext_authz_per_route::Override as O;
    match m.r#override {
        Some(O::Disabled(true)) => Ok(AuthzOverride::Disabled),
        Some(O::CheckSettings(c)) => {
            refuse!(c; service_override);
            Ok(AuthzOverride::Check {
                context_extensions: c.context_extensions.into_iter().collect(),
                no_body: c.disable_request_body_buffering,
                with_request_body: c.with_request_body.map(to_body),
            })
        }
        Some(O::Disabled(false)) => Err(Bad::new("disabled", "must be true")),
        None => Err(Bad::new("override", "is missing")),
    }
}

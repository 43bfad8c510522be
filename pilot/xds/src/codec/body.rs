//! Compression, buffering, sessions that stay on a host.

use std::time::Duration;

use envoy_types::pb::envoy::{
    config::core::v3 as core,
    extensions::{
        compression::gzip::compressor::v3 as gzip,
        filters::http::{buffer::v3 as buf, compressor::v3 as comp, stateful_session::v3 as sess},
        http::stateful_session::{cookie::v3 as cookie, header::v3 as header},
    },
    r#type::http::v3 as http,
};
use mesh_model::proxy::{
    BufferOverride, CompressionLibrary, Compressor, SessionOverride, SessionState, StatefulSession,
};

use super::{At, Bad, Res, common::*, each, refuse};

/// zlib's own default.
const GZIP_LEVEL: u8 = 6;

fn extension(
    name: &str,
    config: envoy_types::pb::google::protobuf::Any,
) -> Option<core::TypedExtensionConfig> {
    Some(core::TypedExtensionConfig { name: name.to_owned(), typed_config: Some(config) })
}

pub(super) fn compressor(c: &Compressor) -> comp::Compressor {
    use comp::compressor as x;
    let CompressionLibrary::Gzip { level } = c.library;
    let library = gzip::Gzip {
        compression_level: if level == GZIP_LEVEL { 0 } else { i32::from(level) },
        ..Default::default()
    };
    comp::Compressor {
        compressor_library: extension("envoy.compression.gzip.compressor", any(&library)),
        response_direction_config: Some(x::ResponseDirectionConfig {
            common_config: Some(x::CommonDirectionConfig {
                min_content_length: u32v(c.min_content_length),
                content_type_matcher: c.content_types.iter().map(string_match).collect(),
                ..Default::default()
            }),
            disable_on_etag_header: c.disable_on_etag,
            weaken_etag_on_compress: c.weaken_etag,
            remove_accept_encoding_header: c.remove_accept_encoding,
            uncompressible_response_codes: c.uncompressible_statuses.iter().map(|s| u32::from(*s)).collect(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[allow(deprecated)]
pub(super) fn to_compressor(m: comp::Compressor) -> Res<Compressor> {
    refuse!(m;
        content_length, content_type, disable_on_etag_header, remove_accept_encoding_header, runtime_enabled,
        request_direction_config, choose_first
    );
    let library = m.compressor_library.unwrap_or_default();
    let Some(a) = library.typed_config.filter(is::<gzip::Gzip>) else {
        let what = format_args!("library {:?}", library.name);
        return Err(Bad::unsupported("compressor_library", what));
    };
    let g: gzip::Gzip = typed(&a).at("compressor_library")?;
    refuse!(g; compression_strategy);
    let level = match u8::try_from(g.compression_level) {
        Ok(0) => GZIP_LEVEL,
        Ok(n @ 1..=9) => n,
        _ => return Err(Bad::unsupported("compression_level", g.compression_level)),
    };
    let r = m.response_direction_config.unwrap_or_default();
    refuse!(r; status_header_enabled);
    let common = r.common_config.unwrap_or_default();
    refuse!(common; enabled);
    // The deprecated list names whole types.
    let mut content_types: Vec<_> =
        common.content_type.into_iter().map(mesh_model::proxy::StringMatch::exact).collect();
    content_types.extend(each("content_type_matcher", common.content_type_matcher, to_string_match)?);
    Ok(Compressor {
        library: CompressionLibrary::Gzip { level },
        min_content_length: common.min_content_length.map_or(30, |v| v.value),
        content_types,
        disable_on_etag: r.disable_on_etag_header,
        weaken_etag: r.weaken_etag_on_compress,
        remove_accept_encoding: r.remove_accept_encoding_header,
        uncompressible_statuses: each(
            "uncompressible_response_codes",
            r.uncompressible_response_codes,
            status_code,
        )?,
    })
}

pub(super) fn compressor_off() -> comp::CompressorPerRoute {
    comp::CompressorPerRoute { r#override: Some(comp::compressor_per_route::Override::Disabled(true)) }
}

pub(super) fn to_compressor_off(m: comp::CompressorPerRoute) -> Res<()> {
    match m.r#override {
        Some(comp::compressor_per_route::Override::Disabled(true)) => Ok(()),
        _ => Err(Bad::unsupported("override", "anything but disabled")),
    }
}

pub(super) fn buffer(n: u32) -> buf::Buffer {
    buf::Buffer { max_request_bytes: u32v(n) }
}

pub(super) fn to_buffer(m: buf::Buffer) -> Res<u32> {
    m.max_request_bytes.map(|v| v.value).ok_or_else(|| Bad::new("max_request_bytes", "is missing"))
}

pub(super) fn buffer_per_route(b: BufferOverride) -> buf::BufferPerRoute {
    use buf::buffer_per_route::Override as O;
    let o = match b {
        BufferOverride::Disabled => O::Disabled(true),
        BufferOverride::Limit(n) => O::Buffer(buffer(n)),
    };
    buf::BufferPerRoute { r#override: Some(o) }
}

pub(super) fn to_buffer_per_route(m: buf::BufferPerRoute) -> Res<BufferOverride> {
    use buf::buffer_per_route::Override as O;
    match m.r#override {
        Some(O::Disabled(true)) => Ok(BufferOverride::Disabled),
        Some(O::Buffer(b)) => Ok(BufferOverride::Limit(to_buffer(b).at("buffer")?)),
        _ => Err(Bad::new("override", "is missing")),
    }
}

pub(super) fn session(s: &StatefulSession) -> sess::StatefulSession {
    let state = s.state.as_ref().and_then(|state| match state {
        SessionState::Cookie { name, path, ttl } => {
            let c = http::Cookie {
                name: name.clone(),
                ttl: Some(duration(*ttl)),
                path: path.clone(),
                ..Default::default()
            };
            extension(
                "envoy.http.stateful_session.cookie",
                any(&cookie::CookieBasedSessionState { cookie: Some(c) }),
            )
        }
        SessionState::Header(name) => extension(
            "envoy.http.stateful_session.header",
            any(&header::HeaderBasedSessionState { name: name.clone() }),
        ),
    });
    sess::StatefulSession { session_state: state, strict: s.strict, ..Default::default() }
}

pub(super) fn to_session(m: sess::StatefulSession) -> Res<StatefulSession> {
    refuse!(m; status_on_strict_destination_not_found);
    let state = match m.session_state {
        None => None,
        Some(e) => {
            let Some(a) = e.typed_config else { return Err(Bad::new("session_state", "is missing")) };
            if is::<cookie::CookieBasedSessionState>(&a) {
                let c: cookie::CookieBasedSessionState = typed(&a).at("session_state")?;
                let c = c.cookie.unwrap_or_default();
                refuse!(c; attributes);
                Some(SessionState::Cookie {
                    name: c.name,
                    path: c.path,
                    ttl: c.ttl.map_or(Ok(Duration::ZERO), to_duration).at("ttl")?,
                })
            } else if is::<header::HeaderBasedSessionState>(&a) {
                let h: header::HeaderBasedSessionState = typed(&a).at("session_state")?;
                Some(SessionState::Header(h.name))
            } else {
                return Err(Bad::unsupported("session_state", format_args!("extension {:?}", e.name)));
            }
        }
    };
    Ok(StatefulSession { state, strict: m.strict, absolute: Duration::ZERO })
}

pub(super) fn session_per_route(s: &SessionOverride) -> sess::StatefulSessionPerRoute {
    use sess::stateful_session_per_route::Override as O;
    let o = match s {
        SessionOverride::Disabled => O::Disabled(true),
        SessionOverride::Set(s) => O::StatefulSession(session(s)),
    };
    sess::StatefulSessionPerRoute { r#override: Some(o) }
}

pub(super) fn to_session_per_route(m: sess::StatefulSessionPerRoute) -> Res<SessionOverride> {
    use sess::stateful_session_per_route::Override as O;
    match m.r#override {
        Some(O::Disabled(true)) => Ok(SessionOverride::Disabled),
        Some(O::StatefulSession(s)) => Ok(SessionOverride::Set(to_session(s).at("stateful_session")?)),
        _ => Err(Bad::new("override", "is missing")),
    }
}

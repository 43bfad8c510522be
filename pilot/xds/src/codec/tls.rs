//! TLS contexts and transport sockets.

use base64::Engine as _;
use envoy_types::pb::envoy::config::core::v3 as core;
pub(super) use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use envoy_types::pb::envoy::extensions::transport_sockets::{
    proxy_protocol::v3::ProxyProtocolUpstreamTransport,
    quic::v3::{QuicDownstreamTransport, QuicUpstreamTransport},
    raw_buffer::v3::RawBuffer,
};
use mesh_model::proxy::{
    CertificatePin, ClientCertificate, DownstreamTls, ProxyProtocolVersion, SecretRef, StringMatch,
    StringMatchKind, TlsServerOptions, TlsVersion, UDP_ALPN, UpstreamTls, Validation,
};
use pb::{
    CertificateValidationContext, CommonTlsContext, SdsSecretConfig, SubjectAltNameMatcher, TlsCertificate,
    TlsParameters,
    common_tls_context::{CombinedCertificateValidationContext, ValidationContextType as V},
    subject_alt_name_matcher::SanType,
    tls_parameters::TlsProtocol,
};

use super::{At, Bad, Res, common::*, each, quic, refuse};

/// Static cluster of a foreign proxy's bootstrap that is the agent's SDS socket (Istio's name for it).
pub(super) const AGENT_CLUSTER: &str = "sds-grpc";

fn file(name: &str) -> Option<core::DataSource> {
    Some(core::DataSource {
        specifier: Some(core::data_source::Specifier::Filename(name.to_owned())),
        ..Default::default()
    })
}

fn to_file(d: Option<core::DataSource>, field: &str) -> Res<String> {
    match d.and_then(|d| d.specifier) {
        Some(core::data_source::Specifier::Filename(f)) => Ok(f),
        None => Err(Bad::new(field, "is missing")),
        Some(_) => Err(Bad::unsupported(field, "an inline secret (only files and SDS are)")),
    }
}

/// Secrets never come from the control plane, which has no keys: a foreign proxy asks the agent
/// beside it, which its bootstrap names [`AGENT_CLUSTER`]; our own has them in its store.
fn sds(name: &str) -> SdsSecretConfig {
    use core::{api_config_source::ApiType, grpc_service as g};
    let agent = core::GrpcService {
        target_specifier: Some(g::TargetSpecifier::EnvoyGrpc(g::EnvoyGrpc {
            cluster_name: AGENT_CLUSTER.to_owned(),
            ..Default::default()
        })),
        ..Default::default()
    };
    let source = core::ApiConfigSource {
        api_type: ApiType::Grpc.into(),
        transport_api_version: core::ApiVersion::V3.into(),
        grpc_services: vec![agent],
        set_node_on_first_message_only: true,
        ..Default::default()
    };
    SdsSecretConfig {
        name: name.to_owned(),
        sds_config: Some(core::ConfigSource {
            resource_api_version: core::ApiVersion::V3.into(),
            config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::ApiConfigSource(
                source,
            )),
            // No limit: a listener that came up without its certificate would only reset connections.
            initial_fetch_timeout: Some(Default::default()),
            ..Default::default()
        }),
    }
}

/// A secret by name; servers are not told apart, but a file is not one.
#[allow(deprecated)]
fn to_sds(s: SdsSecretConfig) -> Res<SecretRef> {
    use core::config_source::ConfigSourceSpecifier as S;
    match s.sds_config.and_then(|c| c.config_source_specifier) {
        Some(S::PathConfigSource(_) | S::Path(_)) => {
            Err(Bad::unsupported("sds_config", "a watched file as the source of a secret"))
        }
        _ => Ok(SecretRef::Sds(s.name)),
    }
}

fn certificate(c: &mut CommonTlsContext, s: &SecretRef) {
    match s {
        SecretRef::Sds(name) => c.tls_certificate_sds_secret_configs.push(sds(name)),
        SecretRef::Files { chain, key } => c.tls_certificates.push(TlsCertificate {
            certificate_chain: file(chain),
            private_key: file(key),
            ..Default::default()
        }),
    }
}

#[allow(deprecated)]
fn to_certificates(c: &mut CommonTlsContext) -> Res<Vec<SecretRef>> {
    refuse!(c;
        tls_certificate_provider_instance, custom_tls_certificate_selector,
        tls_certificate_certificate_provider, tls_certificate_certificate_provider_instance,
        custom_handshaker, key_log
    );
    let certs = std::mem::take(&mut c.tls_certificates);
    let named = std::mem::take(&mut c.tls_certificate_sds_secret_configs);
    let mut out = each("tls_certificate_sds_secret_configs", named, to_sds)?;
    out.extend(each("tls_certificates", certs, |t| {
        refuse!(t; pkcs12, private_key_provider, password);
        Ok(SecretRef::Files {
            chain: to_file(t.certificate_chain, "certificate_chain")?,
            key: to_file(t.private_key, "private_key")?,
        })
    })?);
    Ok(out)
}

/// A client's, of which there is one.
fn to_certificate(c: &mut CommonTlsContext) -> Res<Option<SecretRef>> {
    let mut all = to_certificates(c)?;
    let first = all.pop();
    if all.is_empty() {
        Ok(first)
    } else {
        Err(Bad::unsupported("tls_certificates", "more than one certificate"))
    }
}

/// "URI or DNS" takes two matchers in Envoy; SPIFFE IDs are only ever URIs.
fn sans(list: &[StringMatch]) -> Vec<SubjectAltNameMatcher> {
    let mut out = Vec::new();
    for s in list {
        let spiffe = match &s.kind {
            StringMatchKind::Exact(v) | StringMatchKind::Prefix(v) => v.starts_with("spiffe://"),
            _ => false,
        };
        let types: &[SanType] = if spiffe { &[SanType::Uri] } else { &[SanType::Uri, SanType::Dns] };
        for t in types {
            out.push(SubjectAltNameMatcher {
                san_type: (*t).into(),
                matcher: Some(string_match(s)),
                ..Default::default()
            });
        }
    }
    out
}

fn to_sans(list: Vec<SubjectAltNameMatcher>) -> Res<Vec<StringMatch>> {
    let mut out: Vec<StringMatch> = Vec::new();
    for (i, s) in list.into_iter().enumerate() {
        let field = format!("match_typed_subject_alt_names[{i}]");
        match SanType::try_from(s.san_type) {
            Ok(SanType::Uri | SanType::Dns) => {}
            t => return Err(Bad::unsupported(field, format_args!("SAN type {t:?}"))),
        }
        let m = to_string_match(s.matcher.unwrap_or_default()).at(field)?;
        if !out.contains(&m) {
            out.push(m);
        }
    }
    Ok(out)
}

fn validation(v: &Validation) -> Option<V> {
    let context = CertificateValidationContext {
        match_typed_subject_alt_names: sans(&v.sans),
        crl: v.crl.as_deref().and_then(file),
        ..Default::default()
    };
    Some(match &v.trusted {
        None if v.sans.is_empty() => return None,
        None => V::ValidationContext(context),
        Some(SecretRef::Files { chain, .. }) => {
            V::ValidationContext(CertificateValidationContext { trusted_ca: file(chain), ..context })
        }
        Some(SecretRef::Sds(name)) => V::CombinedValidationContext(CombinedCertificateValidationContext {
            default_validation_context: Some(context),
            validation_context_sds_secret_config: Some(sds(name)),
            ..Default::default()
        }),
    })
}

fn empty_context() -> V {
    V::ValidationContext(CertificateValidationContext::default())
}

/// The part of a validation context that a proxy has without asking for it.
fn own_context(v: &mut V) -> Option<&mut CertificateValidationContext> {
    match v {
        V::ValidationContext(c) => Some(c),
        V::CombinedValidationContext(c) => {
            Some(c.default_validation_context.get_or_insert_with(Default::default))
        }
        _ => None,
    }
}

fn pin(v: &mut V, pins: &[CertificatePin]) {
    let Some(c) = own_context(v) else { return };
    for p in pins {
        match p {
            CertificatePin::Whole(h) => {
                c.verify_certificate_hash.push(h.iter().map(|b| format!("{b:02x}")).collect());
            }
            CertificatePin::PublicKey(h) => {
                c.verify_certificate_spki.push(base64::engine::general_purpose::STANDARD.encode(h));
            }
        }
    }
}

/// Takes them out.
fn to_pins(v: &mut V) -> Res<Vec<CertificatePin>> {
    let Some(c) = own_context(v) else { return Ok(vec![]) };
    let whole = |h: String| {
        CertificatePin::whole(&h)
            .ok_or_else(|| Bad::new("verify_certificate_hash", format!("{h:?} is no SHA-256")))
    };
    let key = |h: String| {
        let bytes = base64::engine::general_purpose::STANDARD.decode(&h).ok();
        bytes
            .and_then(|b| <[u8; 32]>::try_from(b).ok())
            .map(CertificatePin::PublicKey)
            .ok_or_else(|| Bad::new("verify_certificate_spki", format!("{h:?} is no SHA-256")))
    };
    let hashes = std::mem::take(&mut c.verify_certificate_hash).into_iter().map(whole);
    let keys = std::mem::take(&mut c.verify_certificate_spki).into_iter().map(key);
    hashes.chain(keys).collect()
}

#[allow(deprecated)]
fn to_context(c: CertificateValidationContext) -> Res<Validation> {
    refuse!(c;
        ca_certificate_provider_instance, system_root_certs, verify_certificate_spki, verify_certificate_hash,
        match_subject_alt_names, require_signed_certificate_timestamp, allow_expired_certificate,
        trust_chain_verification, custom_validator_config, only_verify_leaf_cert_crl, max_verify_depth
    );
    let trusted = match c.trusted_ca {
        None => None,
        ca => Some(SecretRef::Files { chain: to_file(ca, "trusted_ca")?, key: String::new() }),
    };
    let crl = match c.crl {
        None => None,
        crl => Some(to_file(crl, "crl")?),
    };
    Ok(Validation { trusted, sans: to_sans(c.match_typed_subject_alt_names)?, crl })
}

fn to_validation(v: Option<V>) -> Res<Option<Validation>> {
    Ok(match v {
        None => None,
        Some(V::ValidationContext(c)) => Some(to_context(c).at("validation_context")?),
        Some(V::ValidationContextSdsSecretConfig(s)) => {
            let trusted = to_sds(s).at("validation_context_sds_secret_config")?;
            Some(Validation { trusted: Some(trusted), sans: vec![], crl: None })
        }
        Some(V::CombinedValidationContext(c)) => {
            let mut v = to_context(c.default_validation_context.unwrap_or_default())
                .at("combined_validation_context")?;
            let sds = c.validation_context_sds_secret_config.ok_or_else(|| {
                Bad::new("combined_validation_context.validation_context_sds_secret_config", "is missing")
            })?;
            v.trusted =
                Some(to_sds(sds).at("combined_validation_context.validation_context_sds_secret_config")?);
            Some(v)
        }
        Some(_) => return Err(Bad::unsupported("validation_context_type", "a certificate provider")),
    })
}

fn parameters(min: TlsVersion, options: &TlsServerOptions) -> Option<TlsParameters> {
    let version = |v| match v {
        TlsVersion::V1_2 => TlsProtocol::TlSv12,
        TlsVersion::V1_3 => TlsProtocol::TlSv13,
    };
    Some(TlsParameters {
        tls_minimum_protocol_version: version(min).into(),
        // The default maximum of an Envoy client is TLS 1.2.
        tls_maximum_protocol_version: version(options.max_version.unwrap_or(TlsVersion::V1_3)).into(),
        cipher_suites: options.ciphers.clone(),
        ecdh_curves: options.curves.clone(),
        ..Default::default()
    })
}

/// Reverse of [`parameters`], but for the lowest version. The engine never had 1.0 and 1.1.
fn to_options(p: Option<TlsParameters>, certificates: Vec<SecretRef>) -> Res<TlsServerOptions> {
    let p = p.unwrap_or_default();
    let max_version = match TlsProtocol::try_from(p.tls_maximum_protocol_version) {
        Ok(TlsProtocol::TlsAuto | TlsProtocol::TlSv13) => None,
        Ok(TlsProtocol::TlSv12) => Some(TlsVersion::V1_2),
        _ => return Err(Bad::unsupported("tls_params.tls_maximum_protocol_version", "TLS below 1.2")),
    };
    let (ciphers, curves) = (p.cipher_suites, p.ecdh_curves);
    Ok(TlsServerOptions { certificates, max_version, ciphers, curves, pins: vec![] })
}

fn to_min_version(p: Option<&TlsParameters>) -> TlsVersion {
    // 1.0 and 1.1 are not offered by the engine; asking for less than it does is harmless.
    match p.and_then(|p| TlsProtocol::try_from(p.tls_minimum_protocol_version).ok()) {
        Some(TlsProtocol::TlSv13) => TlsVersion::V1_3,
        _ => TlsVersion::V1_2,
    }
}

fn socket<T: prost::Name>(name: &str, config: &T) -> core::TransportSocket {
    core::TransportSocket {
        name: name.to_owned(),
        config_type: Some(core::transport_socket::ConfigType::TypedConfig(any(config))),
    }
}

pub(super) fn raw_buffer() -> core::TransportSocket {
    socket("envoy.transport_sockets.raw_buffer", &RawBuffer::default())
}

/// What a connection begins with, and then `inner`.
pub(super) fn proxy_protocol(v: ProxyProtocolVersion, inner: core::TransportSocket) -> core::TransportSocket {
    use core::proxy_protocol_config::Version;
    let version = match v {
        ProxyProtocolVersion::V1 => Version::V1,
        ProxyProtocolVersion::V2 => Version::V2,
    };
    let config = ProxyProtocolUpstreamTransport {
        config: Some(core::ProxyProtocolConfig { version: version.into(), ..Default::default() }),
        transport_socket: Some(inner),
        ..Default::default()
    };
    socket("envoy.transport_sockets.upstream_proxy_protocol", &config)
}

/// Reverse of [`proxy_protocol`]; any other socket is its own inner one.
pub(super) fn to_proxy_protocol(
    s: core::TransportSocket,
) -> Res<(Option<ProxyProtocolVersion>, Option<core::TransportSocket>)> {
    use core::{proxy_protocol_config::Version, transport_socket::ConfigType};
    let a = match &s.config_type {
        Some(ConfigType::TypedConfig(a)) if is::<ProxyProtocolUpstreamTransport>(a) => a,
        _ => return Ok((None, Some(s))),
    };
    let m: ProxyProtocolUpstreamTransport = typed(a)?;
    refuse!(m; allow_unspecified_address, tlv_as_pool_key);
    let config = m.config.unwrap_or_default();
    refuse!(config; pass_through_tlvs, added_tlvs);
    let version = match Version::try_from(config.version) {
        Ok(Version::V1) => ProxyProtocolVersion::V1,
        Ok(Version::V2) => ProxyProtocolVersion::V2,
        _ => return Err(Bad::unsupported("config.version", config.version)),
    };
    Ok((Some(version), m.transport_socket))
}

pub(super) fn downstream(t: &DownstreamTls, over_quic: bool) -> core::TransportSocket {
    let mut common = CommonTlsContext {
        tls_params: parameters(t.min_version, &t.options),
        alpn_protocols: t.alpn.clone(),
        ..Default::default()
    };
    for c in [&t.certificate].into_iter().chain(&t.options.certificates) {
        certificate(&mut common, c);
    }
    let (require, v) = match &t.client_certificate {
        ClientCertificate::None => (false, None),
        ClientCertificate::Optional(v) => (false, Some(v)),
        ClientCertificate::Required(v) => (true, Some(v)),
    };
    common.validation_context_type = v.and_then(validation);
    // Who is not asked for a certificate shows none.
    if !t.options.pins.is_empty() && t.client_certificate != ClientCertificate::None {
        pin(common.validation_context_type.get_or_insert_with(empty_context), &t.options.pins);
    }
    let context = pb::DownstreamTlsContext {
        common_tls_context: Some(common),
        require_client_certificate: boolv(require),
        ..Default::default()
    };
    if over_quic {
        return socket("envoy.transport_sockets.quic", &quic::transport(context));
    }
    socket("envoy.transport_sockets.tls", &context)
}

fn config(s: core::TransportSocket) -> Res<envoy_types::pb::google::protobuf::Any> {
    match s.config_type {
        Some(core::transport_socket::ConfigType::TypedConfig(a)) => Ok(a),
        None => Err(Bad::new("typed_config", "is missing")),
    }
}

/// `None` is plaintext.
pub(super) fn to_downstream(s: core::TransportSocket, over_quic: bool) -> Res<Option<DownstreamTls>> {
    let a = config(s)?;
    if is::<RawBuffer>(&a) {
        return Ok(None);
    }
    let m: pb::DownstreamTlsContext = match (over_quic, is::<QuicDownstreamTransport>(&a)) {
        (true, true) => quic::to_tls(typed(&a)?)?,
        (false, false) => typed(&a)?,
        (true, false) => {
            return Err(Bad::new("typed_config", "must be QuicDownstreamTransport on a QUIC listener"));
        }
        (false, true) => {
            return Err(Bad::new("typed_config", "QuicDownstreamTransport needs a QUIC listener"));
        }
    };
    refuse!(m; require_sni, ocsp_staple_policy);
    let mut common = m.common_tls_context.unwrap_or_default();
    let mut certificates = to_certificates(&mut common)?;
    if certificates.is_empty() {
        return Err(Bad::new("tls_certificates", "is missing"));
    }
    let certificate = certificates.remove(0);
    let pins = common.validation_context_type.as_mut().map_or(Ok(vec![]), to_pins)?;
    let v = to_validation(common.validation_context_type.take())?;
    let client_certificate = match (bool_or(m.require_client_certificate, false), v) {
        (true, v) => {
            ClientCertificate::Required(v.unwrap_or(Validation { trusted: None, sans: vec![], crl: None }))
        }
        (false, Some(v)) => ClientCertificate::Optional(v),
        (false, None) => ClientCertificate::None,
    };
    Ok(Some(DownstreamTls {
        certificate,
        client_certificate,
        alpn: common.alpn_protocols,
        min_version: to_min_version(common.tls_params.as_ref()),
        options: TlsServerOptions { pins, ..to_options(common.tls_params, certificates)? },
    }))
}

pub(super) fn upstream(t: &UpstreamTls) -> core::TransportSocket {
    let mut common = CommonTlsContext {
        tls_params: parameters(TlsVersion::V1_2, &TlsServerOptions::default()),
        alpn_protocols: t.alpn.clone(),
        validation_context_type: validation(&t.validation),
        ..Default::default()
    };
    if let Some(c) = &t.certificate {
        certificate(&mut common, c);
    }
    let context =
        pb::UpstreamTlsContext { common_tls_context: Some(common), sni: t.sni.clone(), ..Default::default() };
    if t.carries_datagrams() {
        return socket("envoy.transport_sockets.quic", &quic::upstream(context));
    }
    socket("envoy.transport_sockets.tls", &context)
}

/// `None` is plaintext.
pub(super) fn to_upstream(s: core::TransportSocket) -> Res<Option<UpstreamTls>> {
    let a = config(s)?;
    if is::<RawBuffer>(&a) {
        return Ok(None);
    }
    let over_quic = is::<QuicUpstreamTransport>(&a);
    let m: pb::UpstreamTlsContext = if over_quic { quic::to_upstream(typed(&a)?)? } else { typed(&a)? };
    refuse!(m; auto_host_sni, auto_sni_san_validation);
    let mut common = m.common_tls_context.unwrap_or_default();
    let certificate = to_certificate(&mut common)?;
    let v = to_validation(common.validation_context_type.take())?;
    let tls = UpstreamTls {
        certificate,
        validation: v.unwrap_or(Validation { trusted: None, sans: vec![], crl: None }),
        sni: m.sni,
        by_name: false,
        alpn: common.alpn_protocols,
    };
    if tls.carries_datagrams() != over_quic {
        let what = format_args!("QUIC to upstreams other than for {UDP_ALPN}, which needs it");
        return Err(Bad::unsupported("alpn_protocols", what));
    }
    Ok(Some(tls))
}

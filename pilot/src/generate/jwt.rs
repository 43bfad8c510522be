//! `RequestAuthentication` as token authentication in front of authorisation.
//!
//! All documents that select the workload are one list of issuers. A request without a token passes, without
//! principal; one whose token is of none of them, or is not valid, is answered with 401. Keys of a `jwksUri`
//! are fetched by the proxy: from the service if the host is one, else over a cluster made for it.
//!
//! Where no such document has a rule, `origins` of a Policy of 1.0 count (`origins.rs`).

mod origins;

use std::{sync::Arc, time::Duration};

use mesh_model::{
    authored,
    proxy::{
        Cluster, Discovery, EndpointHealth, HttpFilter, JwksSource, JwtAuthn, JwtClaimToHeader, JwtHeader,
        JwtProvider, JwtRequirement, JwtRequires, JwtRule, LbEndpoint, LoadAssignment, LocalityEndpoints,
        MetadataMatch, RemoteJwks, RouteMatch, SecretRef, StringMatch, UpstreamTls, Validation, ValueMatch,
    },
};

use super::{Ctx, Generated, clusters::SYSTEM_ROOTS, common::cluster_name};
use crate::{attachment::Attachment, config::Doc};

/// Claims that are lists by custom.
const SPACE_DELIMITED: [&str; 2] = ["permission", "scope"];
/// Where the filter keeps what it knows.
const FILTER: &str = "envoy.filters.http.jwt_authn";
/// Key of the payload in the filter's metadata; Istio's.
pub(super) const PAYLOAD: &str = "payload";
const FETCH: Duration = Duration::from_secs(5);
/// How often istiod looks for new keys.
const CACHE: Duration = Duration::from_secs(20 * 60);

/// A route's condition on a claim, which is a text or a list of texts, or only has to be there.
pub(super) fn route_claim(path: Vec<String>, value: Option<StringMatch>, invert: bool) -> MetadataMatch {
    let value = match value {
        Some(m) => {
            let text = ValueMatch::String(m);
            ValueMatch::Or(vec![text.clone(), ValueMatch::OneOf(Box::new(text))])
        }
        None => ValueMatch::Present(true),
    };
    let path = std::iter::once(PAYLOAD.to_owned()).chain(path).collect();
    MetadataMatch { filter: FILTER.to_owned(), path, value, invert }
}

fn named(i: usize) -> String {
    format!("origins-{i}")
}

/// Whether requests to a port need a token.
pub(super) fn required(ctx: &Ctx<'_>, port: u16) -> bool {
    rules(ctx).is_empty() && origins::required(ctx, port)
}

/// The filter of a port of a workload, or of a gateway, if anything is for it.
pub(super) fn filter(ctx: &Ctx<'_>, port: Option<u16>) -> Option<HttpFilter> {
    let rules = rules(ctx);
    if rules.is_empty() {
        return origins::filter(ctx, port).map(|f| HttpFilter::Jwt(Arc::new(f)));
    }
    let mut any: Vec<JwtRequirement> = (0..rules.len()).map(|i| JwtRequirement::Provider(named(i))).collect();
    any.push(JwtRequirement::AllowMissing);
    Some(HttpFilter::Jwt(Arc::new(JwtAuthn {
        providers: rules.iter().enumerate().map(|(i, r)| (named(i), provider(ctx, r))).collect(),
        rules: vec![JwtRule {
            matches: RouteMatch::any(),
            requires: JwtRequires::Inline(JwtRequirement::Any(any)),
        }],
        requirements: Default::default(),
        bypass_cors_preflight: true,
    })))
}

/// Clusters of key servers that are not services.
pub(super) fn clusters(ctx: &Ctx<'_>, out: &mut Generated) {
    let rules = rules(ctx);
    let older = if rules.is_empty() { origins::all(ctx) } else { vec![] };
    for r in rules.into_iter().chain(&older) {
        let Some(from) = KeyServer::of(key_uri(ctx, r)) else { continue };
        if from.service(ctx).is_none() {
            out.cluster(from.cluster(ctx));
        }
    }
}

/// Clusters of services that have some issuer's keys, whoever asks for its tokens.
pub(super) fn services(ctx: &Ctx<'_>) -> Vec<String> {
    let config = &ctx.world.config;
    let now = config.request_authentications.iter().flat_map(|d| &d.spec.jwt_rules).map(|r| &r.jwks_uri);
    let now = now.chain(config.discovered.values());
    let policies = config.v1alpha1.policies.iter().chain(&config.v1alpha1.mesh_policies);
    let older = policies.flat_map(|d| &d.spec.origins).filter_map(|o| o.jwt.as_ref()).map(|j| &j.jwks_uri);
    now.chain(older).filter_map(|uri| KeyServer::of(uri)?.service(ctx)).collect()
}

/// Rules in the order of their issuers, so that the age of documents does not matter.
fn rules<'a>(ctx: &Ctx<'a>) -> Vec<&'a authored::JwtRule> {
    let config = &ctx.world.config;
    let attached = |d: &&Doc<authored::RequestAuthentication>| {
        let to = Attachment {
            namespace: &d.namespace,
            selector: d.spec.selector.as_ref(),
            target_ref: d.spec.target_ref.as_ref(),
            target_refs: &d.spec.target_refs,
        };
        to.includes(config, ctx.proxy)
    };
    let mut out: Vec<&authored::JwtRule> =
        config.request_authentications.iter().filter(attached).flat_map(|d| &d.spec.jwt_rules).collect();
    out.sort_by_key(|r| &r.issuer);
    out
}

/// Where a rule's keys are: as it says, or as its issuer did.
fn key_uri<'a>(ctx: &'a Ctx<'_>, r: &'a authored::JwtRule) -> &'a str {
    if r.jwks.is_empty() && r.jwks_uri.is_empty() {
        return ctx.world.config.discovered.get(&r.issuer).map_or("", String::as_str);
    }
    &r.jwks_uri
}

fn provider(ctx: &Ctx<'_>, r: &authored::JwtRule) -> JwtProvider {
    let uri = key_uri(ctx, r);
    let jwks = match KeyServer::of(uri) {
        Some(from) if r.jwks.is_empty() => JwksSource::Remote(RemoteJwks {
            uri: uri.to_owned(),
            cluster: from.service(ctx).unwrap_or_else(|| from.cluster_name()),
            timeout: r.timeout.map(Duration::from).filter(|t| !t.is_zero()).unwrap_or(FETCH),
            cache_duration: CACHE,
            async_fetch: true,
        }),
        // Without keys no token is valid.
        _ => JwksSource::Inline(r.jwks.clone()),
    };
    let mut space_delimited_claims: Vec<String> = SPACE_DELIMITED.map(str::to_owned).to_vec();
    space_delimited_claims
        .extend(r.space_delimited_claims.iter().filter(|c| !SPACE_DELIMITED.contains(&c.as_str())).cloned());
    JwtProvider {
        issuer: r.issuer.clone(),
        audiences: r.audiences.clone(),
        jwks,
        forward: r.forward_original_token,
        from_headers: r
            .from_headers
            .iter()
            .map(|h| JwtHeader { name: h.name.to_ascii_lowercase(), value_prefix: h.prefix.clone() })
            .collect(),
        from_params: r.from_params.clone(),
        from_cookies: r.from_cookies.clone(),
        forward_payload_header: r.output_payload_to_header.clone(),
        payload_in_metadata: PAYLOAD.to_owned(),
        // Routes of gateways may be by claims; elsewhere looking twice would be for nothing.
        clear_route_cache: ctx.proxy.router,
        space_delimited_claims,
        claim_to_headers: r
            .output_claim_to_headers
            .iter()
            .map(|c| JwtClaimToHeader { header: c.header.to_ascii_lowercase(), claim: c.claim.clone() })
            .collect(),
        ..JwtProvider::default()
    }
}

/// Where keys are fetched.
struct KeyServer<'a> {
    tls: bool,
    host: &'a str,
    port: u16,
}

impl<'a> KeyServer<'a> {
    fn of(uri: &'a str) -> Option<Self> {
        let (tls, rest) = match uri.strip_prefix("https://") {
            Some(rest) => (true, rest),
            None => (false, uri.strip_prefix("http://")?),
        };
        let authority = rest.split(['/', '?']).next()?;
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !authority.ends_with(']') => (host, port.parse().ok()?),
            _ => (authority, if tls { 443 } else { 80 }),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        (!host.is_empty()).then_some(Self { tls, host, port })
    }

    /// The cluster of the service that it is.
    fn service(&self, ctx: &Ctx<'_>) -> Option<String> {
        let entry = ctx.service(self.host)?;
        let there = entry.service.ports.iter().any(|p| p.port == self.port);
        there.then(|| cluster_name(self.port, "", &entry.service.host))
    }

    fn cluster_name(&self) -> String {
        format!("jwks|{}||{}", self.port, self.host)
    }

    fn cluster(&self, ctx: &Ctx<'_>) -> Cluster {
        let name = self.cluster_name();
        let endpoint = LbEndpoint {
            address: self.host.to_owned(),
            port: self.port,
            weight: 1,
            health: EndpointHealth::Healthy,
            transport_labels: Default::default(),
            workload: String::new(),
            check: None,
            slots: mesh_model::proxy::Slots::None,
        };
        let assignment = LoadAssignment {
            name: name.clone(),
            localities: vec![LocalityEndpoints { endpoints: vec![endpoint], ..LocalityEndpoints::default() }],
            overprovisioning: 140,
        };
        let mut c = ctx.base_cluster(&name, Discovery::StrictDns(assignment));
        c.tls = self.tls.then(|| {
            Box::new(UpstreamTls {
                certificate: None,
                validation: Validation {
                    trusted: Some(SecretRef::Files { chain: SYSTEM_ROOTS.to_owned(), key: String::new() }),
                    sans: vec![StringMatch::exact(self.host)],
                    crl: None,
                },
                sni: self.host.to_owned(),
                by_name: false,
                alpn: vec![],
            })
        });
        c
    }
}

#[cfg(test)]
mod tests {
    use super::KeyServer;

    #[test]
    fn key_servers() {
        let of = |uri| KeyServer::of(uri).map(|k| (k.tls, k.host.to_owned(), k.port));
        assert_eq!(of("https://a.example/keys"), Some((true, "a.example".into(), 443)));
        assert_eq!(of("http://a:8080?x"), Some((false, "a".into(), 8080)));
        assert_eq!(of("https://[::1]:8443/"), Some((true, "::1".into(), 8443)));
        assert_eq!(of("https://[::1]"), Some((true, "::1".into(), 443)));
        for bad in ["", "a.example", "ftp://a", "http:///", "http://a:x/"] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }
}

//! `CUSTOM`: somebody else is asked about what the rules match.
//!
//! As Istio does it: shadow rules, which decide nothing, note that a rule matched, and the filter behind them asks about
//! what has such a note. So one compiled matcher finds out what is asked, in our proxies and in Envoy. It stands before
//! everything else, since an answer may change a request that the other policies look at.
//!
//! Rules whose provider cannot be asked deny what they match, and so they do for datagrams, about which nobody can be
//! asked. A provider that speaks HTTP says nothing of bytes; for them its policies do not count, as in Istio.

use std::{collections::BTreeMap, time::Duration};

use mesh_model::{
    authored::{AuthorizationAction, AuthorizationPolicy, AuthzRequestBody},
    proxy::{
        AuthzService, BodySettings, ConnectionAuthz, ExtAuthz, GrpcService, HttpAuthz, HttpFilter,
        MetadataMatch, NetworkFilter, Rbac, RbacAction, RbacPolicy, RbacRules, StringMatch, ValueMatch,
    },
};

use super::{Ctx, Maker, applies, pattern};
use crate::{
    config::Doc,
    generate::common::cluster_name,
    providers::{self, Kind, Provider},
};

/// What notes of these rules begin with.
const NOTE: &str = "istio_ext_authz_";
/// What names of these rules begin with.
const RULE: &str = "istio-ext-authz-";
/// Istio's default.
const TIMEOUT: Duration = Duration::from_secs(600);

/// The provider of a policy, if this proxy can ask it.
fn provider<'a>(ctx: &Ctx<'a>, p: &Doc<AuthorizationPolicy>) -> Option<Provider<'a>> {
    // A gRPC library asks nobody.
    if ctx.proxy.grpc {
        return None;
    }
    let name = p.spec.provider.as_ref().map_or("", |p| p.name.as_str());
    let found = providers::find(&ctx.world.config.mesh, &ctx.world.index, name).ok()?;
    // What it may not call, it has no cluster of.
    ctx.service(&found.entry.service.host).map(|_| found)
}

/// Clusters of all providers that this proxy may call.
pub(in crate::generate) fn clusters(ctx: &Ctx<'_>) -> Vec<String> {
    let mesh = &ctx.world.config.mesh;
    let all = mesh.extension_providers.iter();
    let found = all.filter_map(|p| providers::find(mesh, &ctx.world.index, &p.name).ok());
    let callable = found.filter(|p| ctx.service(&p.entry.service.host).is_some());
    callable.map(|p| cluster_name(p.port, "", &p.entry.service.host)).collect()
}

/// Whether a policy's rules deny, as nobody can be asked.
pub(super) fn denies(ctx: &Ctx<'_>, p: &Doc<AuthorizationPolicy>) -> bool {
    provider(ctx, p).is_none()
}

/// Whether a policy of this kind is for the proxy.
pub(in crate::generate) fn applies_to(ctx: &Ctx<'_>) -> bool {
    let all = &ctx.world.config.authorization_policies;
    all.iter().any(|p| p.spec.action == AuthorizationAction::Custom && applies(ctx, p))
}

/// A provider and what it is asked about.
struct Asked<'a> {
    provider: Provider<'a>,
    rules: BTreeMap<String, RbacPolicy>,
}

fn asked<'a>(ctx: &Ctx<'a>, http: bool) -> BTreeMap<String, Asked<'a>> {
    let mut out = BTreeMap::<String, Asked<'a>>::new();
    let custom = ctx
        .world
        .config
        .authorization_policies
        .iter()
        .filter(|p| p.spec.action == AuthorizationAction::Custom && applies(ctx, p));
    for doc in custom {
        let Some(provider) = provider(ctx, doc) else { continue };
        let name = doc.spec.provider.as_ref().map(|p| p.name.clone()).unwrap_or_default();
        let maker = Maker { ctx, namespace: &doc.namespace, http, action: RbacAction::Deny };
        let of = out.entry(name).or_insert_with(|| Asked { provider, rules: BTreeMap::new() });
        for (i, rule) in doc.spec.rules.iter().enumerate() {
            if let Some(p) = maker.rule(rule) {
                of.rules.insert(format!("{RULE}ns[{}]-policy[{}]-rule[{i}]", doc.namespace, doc.name), p);
            }
        }
    }
    out.retain(|_, a| !a.rules.is_empty());
    out
}

/// The prefix of a provider's notes: Istio's where there is one provider.
fn note(name: &str, providers: usize) -> String {
    if providers == 1 { NOTE.to_owned() } else { format!("{NOTE}{name}_") }
}

fn noted(filter: &str, prefix: &str) -> MetadataMatch {
    MetadataMatch {
        filter: filter.to_owned(),
        path: vec![format!("{prefix}shadow_effective_policy_id")],
        value: ValueMatch::String(StringMatch::prefix(RULE)),
        invert: false,
    }
}

fn shadow(rules: BTreeMap<String, RbacPolicy>, prefix: &str) -> Rbac {
    Rbac {
        shadow: Some(RbacRules { action: RbacAction::Deny, policies: rules }),
        shadow_stat_prefix: prefix.to_owned(),
        ..Rbac::default()
    }
}

/// Filters for requests.
pub(in crate::generate) fn http(ctx: &Ctx<'_>) -> Vec<HttpFilter> {
    let all = asked(ctx, true);
    let providers = all.len();
    all.into_iter()
        .flat_map(|(name, a)| {
            let prefix = note(&name, providers);
            let ext = ExtAuthz {
                enabled_metadata: Some(noted("envoy.filters.http.rbac", &prefix)),
                ..ext_authz(&a.provider)
            };
            [HttpFilter::Rbac(shadow(a.rules, &prefix)), HttpFilter::ExtAuthz(ext.into())]
        })
        .collect()
}

/// Filters for bytes.
pub(in crate::generate) fn tcp(ctx: &Ctx<'_>) -> Vec<NetworkFilter> {
    let all = asked(ctx, false);
    let providers = all.len();
    let mut out = Vec::new();
    for (name, a) in all {
        let Kind::Grpc(g) = a.provider.kind else { continue };
        let prefix = note(&name, providers);
        out.push(NetworkFilter::Rbac(Rbac { stat_prefix: "tcp.".to_owned(), ..shadow(a.rules, &prefix) }));
        out.push(NetworkFilter::Authz(ConnectionAuthz {
            stat_prefix: "tcp.".to_owned(),
            service: grpc(&a.provider, g.timeout),
            failure_mode_allow: g.fail_open,
            include_tls_session: true,
            enabled_metadata: Some(noted("envoy.filters.network.rbac", &prefix)),
        }));
    }
    out
}

fn grpc(p: &Provider<'_>, timeout: Option<mesh_model::authored::Duration>) -> GrpcService {
    GrpcService {
        cluster: cluster_name(p.port, "", &p.entry.service.host),
        authority: p.entry.service.host.clone(),
        timeout: Some(timeout.map_or(TIMEOUT, Duration::from)),
        metadata: vec![],
    }
}

fn ext_authz(p: &Provider<'_>) -> ExtAuthz {
    let (fail_open, status, body, clear_route_cache) = match p.kind {
        Kind::Http(h) => {
            (h.fail_open, &h.status_on_error, h.include_request_body_in_check.as_ref(), h.clear_route_cache)
        }
        Kind::Grpc(g) => {
            (g.fail_open, &g.status_on_error, g.include_request_body_in_check.as_ref(), g.clear_route_cache)
        }
    };
    let common = ExtAuthz {
        failure_mode_allow: fail_open,
        with_request_body: body.map(shown),
        // Checked by galley.
        status_on_error: status.parse().unwrap_or(403),
        clear_route_cache,
        ..ExtAuthz::default()
    };
    match p.kind {
        Kind::Grpc(g) => {
            ExtAuthz { service: AuthzService::Grpc(grpc(p, g.timeout)), include_tls_session: true, ..common }
        }
        Kind::Http(h) => {
            let host = &p.entry.service.host;
            let shown = if h.include_request_headers_in_check.is_empty() {
                &h.include_headers_in_check
            } else {
                &h.include_request_headers_in_check
            };
            ExtAuthz {
                service: AuthzService::Http(Box::new(HttpAuthz {
                    uri: format!("http://{host}"),
                    cluster: cluster_name(p.port, "", host),
                    timeout: h.timeout.map_or(TIMEOUT, Duration::from),
                    path_prefix: h.path_prefix.clone(),
                    headers_to_add: h.include_additional_headers_in_check.clone().into_iter().collect(),
                    allowed_upstream_headers: names(&h.headers_to_upstream_on_allow),
                    allowed_upstream_headers_to_append: vec![],
                    allowed_client_headers: names(&h.headers_to_downstream_on_deny),
                    allowed_client_headers_on_success: names(&h.headers_to_downstream_on_allow),
                    dynamic_metadata_from_headers: vec![],
                })),
                allowed_headers: names(shown),
                ..common
            }
        }
    }
}

fn shown(b: &AuthzRequestBody) -> BodySettings {
    BodySettings {
        max_bytes: b.max_request_bytes,
        allow_partial: b.allow_partial_message,
        pack_as_bytes: b.pack_as_bytes,
    }
}

/// Names of headers: exact, `prefix*` or `*suffix`, without case.
fn names(list: &[String]) -> Vec<StringMatch> {
    list.iter().map(|n| StringMatch { ignore_case: n != "*", ..pattern(n) }).collect()
}

//! Rules of `MeshConfig.extensionProviders`.

use std::collections::BTreeSet;

use mesh_model::authored::{AuthzRequestBody, Duration, ProviderDefinition};

use super::super::common::{self, Findings};
use crate::path::Path;

pub(super) fn check(list: &[ProviderDefinition], p: &Path<'_>, out: &mut Findings) {
    let mut names = BTreeSet::new();
    for (i, d) in list.iter().enumerate() {
        let at = p.index(i);
        if d.name.is_empty() {
            out.error(&at.key("name"), "the provider's name is required");
        } else if !names.insert(&d.name) {
            out.error(&at.key("name"), format!("there is another provider {:?}", d.name));
        }
        match (&d.envoy_ext_authz_http, &d.envoy_ext_authz_grpc) {
            (Some(h), None) => {
                let at = at.key("envoyExtAuthzHttp");
                common(&h.service, h.port, h.timeout, &h.status_on_error, &at, out);
                body(h.include_request_body_in_check.as_ref(), &at, out);
                if !h.path_prefix.is_empty() && !h.path_prefix.starts_with('/') {
                    out.error(&at.key("pathPrefix"), format!("{:?} does not begin with /", h.path_prefix));
                }
                if h.include_request_body_in_check.as_ref().is_some_and(|b| b.pack_as_bytes) {
                    let at = at.key("includeRequestBodyInCheck");
                    out.error(&at.key("packAsBytes"), "only a provider that speaks gRPC can be told bytes");
                }
                for (list, field) in [
                    (&h.include_headers_in_check, "includeHeadersInCheck"),
                    (&h.include_request_headers_in_check, "includeRequestHeadersInCheck"),
                    (&h.headers_to_upstream_on_allow, "headersToUpstreamOnAllow"),
                    (&h.headers_to_downstream_on_deny, "headersToDownstreamOnDeny"),
                    (&h.headers_to_downstream_on_allow, "headersToDownstreamOnAllow"),
                ] {
                    let at = at.key(field);
                    for (i, n) in list.iter().enumerate() {
                        pattern(n, &at.index(i), out);
                    }
                }
                let at = at.key("includeAdditionalHeadersInCheck");
                for (n, v) in &h.include_additional_headers_in_check {
                    common::header_name(n, &at.key(n), out);
                    common::header_value(v, &at.key(n), out);
                }
            }
            (None, Some(g)) => {
                let at = at.key("envoyExtAuthzGrpc");
                common(&g.service, g.port, g.timeout, &g.status_on_error, &at, out);
                body(g.include_request_body_in_check.as_ref(), &at, out);
            }
            _ => out.error(&at, "exactly one of envoyExtAuthzHttp and envoyExtAuthzGrpc is required"),
        }
    }
}

fn common(
    service: &str,
    port: u32,
    timeout: Option<Duration>,
    status: &str,
    p: &Path<'_>,
    out: &mut Findings,
) {
    let host = service.split_once('/').map_or(service, |(_, h)| h);
    if !common::is_fqdn(host) {
        out.error(
            &p.key("service"),
            format!("{service:?} is not [namespace/]host with a whole host name, as ext-authz.books.svc.cluster.local"),
        );
    }
    common::port(port, &p.key("port"), out);
    common::duration(timeout, &p.key("timeout"), out);
    // What Envoy's HttpStatus knows, less those that are no answers.
    if !status.is_empty() && !status.parse::<u16>().is_ok_and(|s| (200..=599).contains(&s)) {
        out.error(&p.key("statusOnError"), format!("{status:?} is not a status from 200 to 599"));
    }
}

fn body(b: Option<&AuthzRequestBody>, p: &Path<'_>, out: &mut Findings) {
    if b.is_some_and(|b| b.max_request_bytes == 0) {
        let at = p.key("includeRequestBodyInCheck");
        out.error(&at.key("maxRequestBytes"), "must be at least 1");
    }
}

/// A name of headers: exact, `prefix*`, `*suffix` or `*`.
fn pattern(n: &str, p: &Path<'_>, out: &mut Findings) {
    let plain = n.strip_prefix('*').or_else(|| n.strip_suffix('*')).unwrap_or(n);
    if n != "*" {
        common::header_name(plain, p, out);
    }
}

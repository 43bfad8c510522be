//! Rules of other trust domains' roots: `FederatedTrustDomain`, and `caCertificates` of MeshConfig.

use mesh_model::{
    SpiffeId, TrustDomain,
    authored::{CertificateData, EndpointProfile, FederatedTrustDomain},
};

use super::common::Findings;
use crate::path::Path;

/// Longest bundle that is written into a document, bytes.
const MAX_BUNDLE: usize = 64 * 1024;

/// SPIFFE Federation, sections 5.2.1.1 and 5.2.2.1.
fn url(s: &str, p: &Path<'_>, out: &mut Findings) {
    let Some(rest) = s.strip_prefix("https://") else {
        return out.error(p, format!("{s:?} does not begin with https://"));
    };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    if authority.contains('@') {
        // Not quoted: it may be a password.
        out.error(p, "names a user, which the URL of a bundle endpoint may not");
    } else if authority.is_empty()
        || s.contains('#')
        || s.chars().any(|c| c.is_whitespace() || c.is_control())
    {
        out.error(
            p,
            format!("{s:?} is no URL of a bundle endpoint, such as https://example.org/bundle.json"),
        );
    }
}

fn domain(s: &str, p: &Path<'_>, out: &mut Findings) {
    if let Err(e) = TrustDomain::new(s) {
        out.error(p, e.to_string());
    }
}

/// That it is a bundle is seen by whoever reads certificates; here, that it looks like one.
fn roots(s: &str, p: &Path<'_>, out: &mut Findings) {
    if s.contains("PRIVATE KEY") {
        out.error(p, "holds a private key; only certificates of roots belong here");
    } else if s.len() > MAX_BUNDLE {
        out.error(p, format!("{} bytes (at most {MAX_BUNDLE})", s.len()));
    }
}

pub(super) fn check(s: &FederatedTrustDomain, p: &Path<'_>, out: &mut Findings) {
    domain(&s.trust_domain, &p.key("trustDomain"), out);
    let (bundle, endpoint) = (p.key("trustDomainBundle"), p.key("bundleEndpointURL"));
    roots(&s.trust_domain_bundle, &bundle, out);
    if s.bundle_endpoint_url.is_empty() {
        if s.trust_domain_bundle.is_empty() {
            out.error(&endpoint, "nothing says which roots the domain has; set it, or trustDomainBundle");
        }
        if s.bundle_endpoint_profile.is_some() {
            out.error(
                &p.key("bundleEndpointProfile"),
                "is of an endpoint; set bundleEndpointURL or remove it",
            );
        }
        return;
    }
    url(&s.bundle_endpoint_url, &endpoint, out);
    let profile = s.bundle_endpoint_profile.clone().unwrap_or_default();
    let of_profile = p.key("bundleEndpointProfile");
    let id = &of_profile.key("endpointSPIFFEID");
    match profile.kind {
        EndpointProfile::HttpsWeb if !profile.endpoint_spiffe_id.is_empty() => {
            out.error(id, "is of the profile https_spiffe; set type: https_spiffe or remove it");
        }
        EndpointProfile::HttpsWeb => {}
        EndpointProfile::HttpsSpiffe => match SpiffeId::parse(&profile.endpoint_spiffe_id) {
            Err(e) => out.error(id, format!("{e}; whom the endpoint's certificate names is required")),
            Ok(id) if id.trust_domain() == s.trust_domain && s.trust_domain_bundle.is_empty() => {
                out.error(
                    &bundle,
                    "the first answer of the endpoint is verified by it; set the domain's bundle",
                );
            }
            Ok(_) => {}
        },
    }
}

pub(super) fn check_certificates(all: &[CertificateData], p: &Path<'_>, out: &mut Findings) {
    for (i, c) in all.iter().enumerate() {
        let p = p.index(i);
        match (c.pem.is_empty(), c.spiffe_bundle_url.is_empty()) {
            (true, true) => out.error(&p, "is empty; set pem or spiffeBundleUrl"),
            (false, false) => {
                out.error(&p.key("spiffeBundleUrl"), "only one of pem and spiffeBundleUrl may be set")
            }
            (true, false) => url(&c.spiffe_bundle_url, &p.key("spiffeBundleUrl"), out),
            (false, true) => roots(&c.pem, &p.key("pem"), out),
        }
        out.unenforced(!c.cert_signers.is_empty(), &p, "certSigners");
        let domains = p.key("trustDomains");
        if c.trust_domains.is_empty() {
            // Istio adds them to the own domain's, whose roots are the CA's alone to tell here.
            out.error(
                &domains,
                "name the trust domains that these roots are of; those of the own one come from its CA",
            );
        }
        for (n, d) in c.trust_domains.iter().enumerate() {
            domain(d, &domains.index(n), out);
        }
    }
}

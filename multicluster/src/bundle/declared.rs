//! Trust domains as configuration declares them by their bundles: `FederatedTrustDomain` documents, and `caCertificates` of
//! the MeshConfig, as Istio has them.
//!
//! Rules, where a domain is declared more than once: a `FederatedTrustDomain` goes before MeshConfig, the first of them by
//! name before the others, and an endpoint before roots that are written down; roots of MeshConfig add up.

use std::collections::BTreeMap;

use mesh_identity::TrustBundle;
use mesh_model::{
    SpiffeId, TrustDomain,
    authored::{EndpointProfile, FederatedTrustDomain, Kind, MeshConfig},
};
use mesh_xds::mcp::ConfigState;

use super::BundleUrl;
use crate::{membership::MAX_DOMAINS, token::secret_hash};

/// What configuration says of one trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Declared {
    /// Where its bundle is served.
    pub(crate) endpoint: Option<Endpoint>,
    /// Its roots as they were written down: all there is, or what the endpoint is first verified by.
    pub(crate) written: Option<TrustBundle>,
    /// What cannot be used of it.
    pub(crate) error: String,
}

/// A bundle endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) url: BundleUrl,
    /// Whom it proves to be; `None` is `https_web`.
    pub(crate) spiffe: Option<SpiffeId>,
}

impl Declared {
    /// Differs for whatever is to be begun anew.
    pub(crate) fn fingerprint(&self) -> String {
        let (url, id) = self.endpoint.as_ref().map_or((String::new(), ""), |e| {
            (e.url.to_string(), e.spiffe.as_ref().map_or("", SpiffeId::as_str))
        });
        let written = self.written.as_ref().map(TrustBundle::document).unwrap_or_default();
        secret_hash(format!("{url}\n{id}\n{written}").as_bytes())
    }
}

/// What is declared.
pub(crate) fn read(state: &ConfigState) -> BTreeMap<TrustDomain, Declared> {
    let mut all = BTreeMap::new();
    for (_, doc) in state.of(Kind::FederatedTrustDomain.type_url()) {
        let Ok(spec) = doc.spec::<FederatedTrustDomain>() else { continue };
        let Ok(domain) = TrustDomain::new(&spec.trust_domain) else { continue };
        all.entry(domain.clone()).or_insert_with(|| of_document(&domain, &spec));
    }
    for (_, doc) in state.of(Kind::MeshConfig.type_url()) {
        let Ok(config) = doc.spec::<MeshConfig>() else { continue };
        for (domain, d) in of_mesh(&config) {
            all.entry(domain).or_insert(d);
        }
    }
    while all.len() > MAX_DOMAINS {
        if let Some((domain, _)) = all.pop_last() {
            tracing::error!(%domain, "more than {MAX_DOMAINS} trust domains are declared: this one is left out");
        }
    }
    all
}

fn of_document(domain: &TrustDomain, s: &FederatedTrustDomain) -> Declared {
    let mut d = Declared { endpoint: None, written: None, error: String::new() };
    let text = s.trust_domain_bundle.trim();
    if !text.is_empty() {
        let read = if text.starts_with('{') {
            TrustBundle::parse(domain.clone(), text)
        } else {
            TrustBundle::from_pem(domain.clone(), text.as_bytes(), 0, None)
        };
        match read {
            Ok(b) => d.written = Some(b),
            Err(e) => d.error = format!("spec.trustDomainBundle: {e}"),
        }
    }
    if !s.bundle_endpoint_url.is_empty() {
        let profile = s.bundle_endpoint_profile.clone().unwrap_or_default();
        let id = match profile.kind {
            EndpointProfile::HttpsWeb => Ok(None),
            EndpointProfile::HttpsSpiffe => SpiffeId::parse(&profile.endpoint_spiffe_id).map(Some),
        };
        match (BundleUrl::parse(&s.bundle_endpoint_url), id) {
            (Ok(url), Ok(spiffe)) => d.endpoint = Some(Endpoint { url, spiffe }),
            (Err(e), _) => d.error = format!("spec.bundleEndpointURL: {e}"),
            (_, Err(e)) => d.error = format!("spec.bundleEndpointProfile.endpointSPIFFEID: {e}"),
        }
    }
    d
}

fn of_mesh(config: &MeshConfig) -> BTreeMap<TrustDomain, Declared> {
    let mut all = BTreeMap::<TrustDomain, Declared>::new();
    for c in &config.ca_certificates {
        for domain in c.trust_domains.iter().filter_map(|d| TrustDomain::new(d).ok()) {
            let d = all.entry(domain.clone()).or_insert(Declared {
                endpoint: None,
                written: None,
                error: String::new(),
            });
            if c.spiffe_bundle_url.is_empty() {
                let held = d.written.as_ref().map(TrustBundle::pem).unwrap_or_default();
                let both = format!("{held}{}", c.pem);
                match TrustBundle::from_pem(domain, both.as_bytes(), 0, None) {
                    Ok(b) => d.written = Some(b),
                    Err(e) => d.error = format!("spec.caCertificates: {e}"),
                }
            } else {
                match BundleUrl::parse(&c.spiffe_bundle_url) {
                    Ok(url) => d.endpoint = Some(Endpoint { url, spiffe: None }),
                    Err(e) => d.error = format!("spec.caCertificates: {e}"),
                }
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use mesh_model::authored::{BundleEndpointProfile, CertificateData};
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    use super::*;

    fn root() -> String {
        let mut p = CertificateParams::default();
        p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        p.self_signed(&KeyPair::generate().unwrap()).unwrap().pem()
    }

    fn domain(s: &str) -> TrustDomain {
        TrustDomain::new(s).unwrap()
    }

    #[test]
    fn certificates_of_mesh_config() {
        let (one, two) = (root(), root());
        let data = |pem: &str, url: &str, domains: &[&str]| CertificateData {
            pem: pem.into(),
            spiffe_bundle_url: url.into(),
            trust_domains: domains.iter().map(|d| (*d).to_owned()).collect(),
            ..CertificateData::default()
        };
        let all = of_mesh(&MeshConfig {
            ca_certificates: vec![
                data(&one, "", &["b.example", "c.example"]),
                data(&two, "", &["b.example"]),
                data("", "https://d.example/x", &["d.example"]),
                data("junk", "", &["e.example"]),
            ],
            ..MeshConfig::default()
        });
        let roots = |d: &str| all[&domain(d)].written.as_ref().map_or(0, |b| b.roots.len());
        assert_eq!(
            [roots("b.example"), roots("c.example"), roots("d.example"), roots("e.example")],
            [2, 1, 0, 0]
        );
        let d = all[&domain("d.example")].endpoint.clone().unwrap();
        assert_eq!((d.url.to_string().as_str(), d.spiffe), ("https://d.example/x", None));
        assert!(all[&domain("e.example")].error.contains("caCertificates"), "{all:?}");
    }

    #[test]
    fn a_document_is_begun_anew_when_anything_changes() {
        let spec = FederatedTrustDomain {
            trust_domain: "b.example".into(),
            bundle_endpoint_url: "https://b.example/".into(),
            bundle_endpoint_profile: Some(BundleEndpointProfile {
                kind: EndpointProfile::HttpsSpiffe,
                endpoint_spiffe_id: "spiffe://b.example/endpoint".into(),
            }),
            trust_domain_bundle: root(),
        };
        let of = |s: &FederatedTrustDomain| of_document(&domain("b.example"), s);
        let first = of(&spec);
        assert_eq!((first.error.as_str(), first.written.as_ref().unwrap().roots.len()), ("", 1));
        // A bundle may be a SPIFFE document as well, which says the same.
        let json = FederatedTrustDomain {
            trust_domain_bundle: first.written.clone().unwrap().document(),
            ..spec.clone()
        };
        assert_eq!(of(&json).fingerprint(), first.fingerprint());
        let mut other = spec.clone();
        other.bundle_endpoint_profile.as_mut().unwrap().endpoint_spiffe_id += "/2";
        let web = FederatedTrustDomain { bundle_endpoint_profile: None, ..spec.clone() };
        let roots = FederatedTrustDomain { trust_domain_bundle: root(), ..spec.clone() };
        let url = FederatedTrustDomain { bundle_endpoint_url: "https://b.example/2".into(), ..spec };
        for changed in [other, web, roots, url] {
            assert_ne!(of(&changed).fingerprint(), first.fingerprint(), "{changed:?}");
        }
    }
}

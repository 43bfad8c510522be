//! Roots of trust domains, as proxies are told of them: one resource for each domain, of that name. Those of the own
//! domain come with the workload's certificate at first, and in this way from then on.

use mesh_model::{
    ClusterId, TrustDomain,
    federation::{ForeignBundle, OwnRoots, RevocationList},
};
use prost::Message as _;

use crate::{pb, type_url};

/// `flotilla.identity.v1.TrustBundle`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct TrustBundle {
    #[prost(string, tag = "1")]
    trust_domain: String,
    /// PEM.
    #[prost(string, tag = "2")]
    roots: String,
    #[prost(string, repeated, tag = "3")]
    clusters: Vec<String>,
    /// Only with the own domain's; an older proxy takes no roots of its own domain from here.
    #[prost(message, optional, tag = "4")]
    own: Option<Own>,
    /// An older proxy accepts nobody of such a domain.
    #[prost(bool, tag = "5")]
    by_bundle: bool,
    /// An older proxy takes what is revoked until it expires.
    #[prost(message, repeated, tag = "6")]
    revoked: Vec<Revoked>,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Revoked {
    /// PEM.
    #[prost(string, tag = "1")]
    issuer: String,
    /// PEM.
    #[prost(string, tag = "2")]
    list: String,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Own {
    #[prost(uint64, tag = "1")]
    sequence: u64,
    #[prost(string, tag = "2")]
    intermediate: String,
    #[prost(uint32, tag = "3")]
    renew_within_ms: u32,
    #[prost(bool, tag = "4")]
    unlisted: bool,
}

/// Encodes a bundle.
#[must_use]
pub fn encode(b: &ForeignBundle) -> pb::Any {
    let message = TrustBundle {
        trust_domain: b.trust_domain.to_string(),
        roots: b.roots.clone(),
        clusters: b.clusters.iter().map(ToString::to_string).collect(),
        by_bundle: b.by_bundle,
        revoked: b
            .revoked
            .iter()
            .map(|r| Revoked { issuer: r.issuer.clone(), list: r.list.clone() })
            .collect(),
        own: b.own.as_ref().map(|o| Own {
            sequence: o.sequence,
            intermediate: o.intermediate.clone(),
            renew_within_ms: o.renew_within_ms,
            unlisted: o.unlisted,
        }),
    };
    pb::Any { type_url: type_url::BUNDLES.to_owned(), value: message.encode_to_vec().into() }
}

/// Decodes one.
///
/// # Errors
/// Why it is none.
pub fn decode(any: &pb::Any) -> Result<ForeignBundle, String> {
    if any.type_url != type_url::BUNDLES {
        return Err(format!("{} instead of a trust bundle", any.type_url));
    }
    let m = TrustBundle::decode(any.value.as_ref()).map_err(|e| e.to_string())?;
    let clusters = m.clusters.iter().map(|c| ClusterId::new(c)).collect::<Result<_, _>>();
    Ok(ForeignBundle {
        trust_domain: TrustDomain::new(&m.trust_domain).map_err(|e| e.to_string())?,
        roots: m.roots,
        clusters: clusters.map_err(|e| e.to_string())?,
        by_bundle: m.by_bundle,
        own: m.own.map(|o| OwnRoots {
            sequence: o.sequence,
            intermediate: o.intermediate,
            renew_within_ms: o.renew_within_ms,
            unlisted: o.unlisted,
        }),
        revoked: m.revoked.into_iter().map(|r| RevocationList { issuer: r.issuer, list: r.list }).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundles_survive_the_wire() {
        let b = ForeignBundle {
            trust_domain: TrustDomain::new("b.example").unwrap(),
            roots: "PEM".into(),
            clusters: vec![ClusterId::new("north").unwrap()],
            by_bundle: false,
            own: None,
            revoked: vec![],
        };
        assert_eq!(decode(&encode(&b)).unwrap(), b);
        let alone = ForeignBundle { clusters: vec![], by_bundle: true, ..b.clone() };
        assert_eq!(decode(&encode(&alone)).unwrap(), alone);
        let own = OwnRoots { sequence: 3, intermediate: "ab".into(), renew_within_ms: 5000, unlisted: true };
        let own = ForeignBundle { own: Some(own), ..b.clone() };
        assert_eq!(decode(&encode(&own)).unwrap(), own);
        let list = RevocationList { issuer: "CERT".into(), list: "CRL".into() };
        let revoking = ForeignBundle { revoked: vec![list], ..b.clone() };
        assert_eq!(decode(&encode(&revoking)).unwrap(), revoking);
        let bad = ForeignBundle { clusters: vec![], ..b };
        let mut any = encode(&bad);
        any.value = [0x0a, 1, b'/'].to_vec().into();
        assert!(decode(&any).is_err());
        any.type_url = type_url::NDS.into();
        assert!(decode(&any).is_err());
    }
}

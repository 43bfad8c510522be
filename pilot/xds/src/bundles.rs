//! Roots of trust domains that the mesh is federated with, as proxies are told of them: one resource for each domain,
//! of that name. The own domain's roots do not come this way, but with the workload's certificate.

use mesh_model::{ClusterId, TrustDomain, federation::ForeignBundle};
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
}

/// Encodes a bundle.
#[must_use]
pub fn encode(b: &ForeignBundle) -> pb::Any {
    let message = TrustBundle {
        trust_domain: b.trust_domain.to_string(),
        roots: b.roots.clone(),
        clusters: b.clusters.iter().map(ToString::to_string).collect(),
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
        };
        assert_eq!(decode(&encode(&b)).unwrap(), b);
        let bad = ForeignBundle { clusters: vec![], ..b };
        let mut any = encode(&bad);
        any.value = [0x0a, 1, b'/'].to_vec().into();
        assert!(decode(&any).is_err());
        any.type_url = type_url::NDS.into();
        assert!(decode(&any).is_err());
    }
}

//! What the fuzz targets of `e2e/fuzz` run. It is not part of the product.

use crate::{ClusterId, SpiffeId, TrustDomain};

/// Names that certificates, peers and documents bring: what is one is written as it was read.
pub fn names(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(id) = SpiffeId::parse(text) {
        assert_eq!(id.as_str(), text);
        assert_eq!(format!("spiffe://{}{}", id.trust_domain(), id.path()), text);
        assert!(TrustDomain::new(id.trust_domain()).is_ok());
        if let Some((namespace, account)) = id.namespace_and_account() {
            let made = SpiffeId::workload(&id.domain(), namespace, account);
            assert_eq!(made.as_ref(), Ok(&id));
            // A workload is no cluster.
            assert_eq!(id.cluster_id(), None);
        }
        if let Some(c) = id.cluster_id() {
            assert_eq!(SpiffeId::cluster(&id.domain(), &c), id);
        }
        let json = serde_json::to_string(&id).expect("text");
        assert_eq!(serde_json::from_str::<SpiffeId>(&json).ok(), Some(id));
    }
    if let Ok(d) = TrustDomain::new(text) {
        assert_eq!(d.as_str(), text);
        assert!(SpiffeId::parse(&format!("spiffe://{text}/x")).is_ok());
    }
    if let Ok(c) = ClusterId::new(text) {
        assert_eq!(c.as_str(), text);
        let td = TrustDomain::default();
        assert_eq!(SpiffeId::cluster(&td, &c).cluster_id(), Some(c));
    }
}

#[cfg(test)]
#[path = "../../../e2e/fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::{replay::corpus, *};

    #[test]
    fn corpora() {
        corpus("names", names);
    }
}

//! Identifiers: cluster, network, trust domain, SPIFFE ID, locality.
//!
//! Newtypes that cannot hold an invalid value: parse at the edge, pass around without checks.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Why a string is not a valid identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Not an RFC 1123 DNS label: 1 to 63 of `a-z 0-9 -`, alphanumeric at both ends.
    #[error("{what} {value:?} is not a DNS label (1-63 of a-z, 0-9 and '-', alphanumeric at both ends)")]
    NotALabel {
        /// What the value was meant to be, for the message.
        what: &'static str,
        /// The rejected value.
        value: String,
    },
    /// Not a SPIFFE trust domain (SPIFFE-ID section 2.1).
    #[error("trust domain {0:?} is not valid (1-255 of a-z, 0-9, '.', '-' and '_')")]
    TrustDomain(String),
    /// Not a SPIFFE ID that Flotilla uses.
    #[error("{value:?} is not a SPIFFE ID: {reason}")]
    Spiffe {
        /// The rejected value.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
}

fn is_dns_label(s: &str) -> bool {
    let b = s.as_bytes();
    !b.is_empty()
        && b.len() <= 63
        && b.iter().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == b'-')
        && b[0] != b'-'
        && b[b.len() - 1] != b'-'
}

macro_rules! label_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Checks and wraps `value`.
            ///
            /// # Errors
            /// [`IdError::NotALabel`] unless `value` is an RFC 1123 DNS label.
            pub fn new(value: &str) -> Result<Self, IdError> {
                if is_dns_label(value) {
                    Ok(Self(Arc::from(value)))
                } else {
                    Err(IdError::NotALabel { what: $what, value: value.to_owned() })
                }
            }

            /// The label itself.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(s: &str) -> Result<Self, IdError> {
                Self::new(s)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let s = String::deserialize(d)?;
                Self::new(&s).map_err(serde::de::Error::custom)
            }
        }
    };
}

label_id! {
    /// A member of the federation: a DNS label, unique in the mesh.
    ClusterId, "cluster ID"
}

label_id! {
    /// A set of clusters whose workloads reach each other directly.
    NetworkId, "network"
}

/// The trust domain of a mesh (SPIFFE-ID section 2.1); `mesh.local` unless set.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// The trust domain of a mesh that did not choose one.
    pub const DEFAULT: &'static str = "mesh.local";

    /// Checks and wraps `value`.
    ///
    /// # Errors
    /// [`IdError::TrustDomain`] for characters or lengths that SPIFFE does not allow.
    pub fn new(value: &str) -> Result<Self, IdError> {
        let ok = !value.is_empty()
            && value.len() <= 255
            && value
                .bytes()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'.' | b'-' | b'_'));
        if ok { Ok(Self(Arc::from(value))) } else { Err(IdError::TrustDomain(value.to_owned())) }
    }

    /// The domain without the `spiffe://` scheme.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for TrustDomain {
    fn default() -> Self {
        Self(Arc::from(Self::DEFAULT))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

impl FromStr for TrustDomain {
    type Err = IdError;
    fn from_str(s: &str) -> Result<Self, IdError> {
        Self::new(s)
    }
}

impl Serialize for TrustDomain {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for TrustDomain {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let s = String::deserialize(d)?;
        Self::new(&s).map_err(serde::de::Error::custom)
    }
}

/// A SPIFFE ID: `spiffe://<trust domain>/<path>`.
///
/// Kept as one string with the offset of the path, since it is compared and logged far more often
/// than it is taken apart.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    uri: Arc<str>,
    path: u16,
}

const SCHEME: &str = "spiffe://";

impl SpiffeId {
    /// Parses a SPIFFE ID (SPIFFE-ID section 2): no query, fragment, userinfo, port, empty or dot
    /// segments, no trailing slash, 2048 bytes at most.
    ///
    /// # Errors
    /// [`IdError::Spiffe`] naming the rule that `value` breaks.
    pub fn parse(value: &str) -> Result<Self, IdError> {
        let fail = |reason| IdError::Spiffe { value: value.chars().take(256).collect(), reason };
        if value.len() > 2048 {
            return Err(fail("longer than 2048 bytes"));
        }
        let rest = value.strip_prefix(SCHEME).ok_or_else(|| fail("does not start with spiffe://"))?;
        let slash = rest.find('/').unwrap_or(rest.len());
        TrustDomain::new(&rest[..slash]).map_err(|_| fail("its trust domain is not valid"))?;
        let path = &rest[slash..];
        if !path.is_empty() {
            for seg in path[1..].split('/') {
                if seg.is_empty() || seg == "." || seg == ".." {
                    return Err(fail("its path has an empty or dot segment"));
                }
                if !seg.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'-' | b'_')) {
                    return Err(fail("its path has a character outside a-z A-Z 0-9 . - _"));
                }
            }
        }
        let path = u16::try_from(SCHEME.len() + slash).map_err(|_| fail("longer than 2048 bytes"))?;
        Ok(Self { uri: Arc::from(value), path })
    }

    /// The identity of a workload: `spiffe://<td>/ns/<namespace>/sa/<service account>`.
    ///
    /// # Errors
    /// [`IdError::Spiffe`] if a part has characters that SPIFFE does not allow.
    pub fn workload(td: &TrustDomain, namespace: &str, service_account: &str) -> Result<Self, IdError> {
        Self::parse(&format!("{SCHEME}{td}/ns/{namespace}/sa/{service_account}"))
    }

    /// The identity of a cluster's intermediate CA: `spiffe://<td>/cluster/<id>`.
    #[must_use]
    pub fn cluster(td: &TrustDomain, id: &ClusterId) -> Self {
        let uri = format!("{SCHEME}{td}/cluster/{id}");
        let path = (SCHEME.len() + td.as_str().len()) as u16;
        Self { uri: Arc::from(uri), path }
    }

    /// The whole URI.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// The trust domain part.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.uri[SCHEME.len()..self.path as usize]
    }

    /// The trust domain.
    #[must_use]
    pub fn domain(&self) -> TrustDomain {
        // It was checked when the ID was.
        TrustDomain(Arc::from(self.trust_domain()))
    }

    /// The path with its leading slash; empty for a bare trust domain.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.uri[self.path as usize..]
    }

    /// What policies call a principal: the ID without its scheme.
    #[must_use]
    pub fn principal(&self) -> &str {
        &self.uri[SCHEME.len()..]
    }

    /// `(namespace, service account)` if this is a workload identity.
    #[must_use]
    pub fn namespace_and_account(&self) -> Option<(&str, &str)> {
        let mut it = self.path().strip_prefix("/ns/")?.split('/');
        let ns = it.next()?;
        if it.next()? != "sa" {
            return None;
        }
        let sa = it.next()?;
        it.next().is_none().then_some((ns, sa))
    }

    /// The cluster if this is the identity of a cluster's intermediate.
    #[must_use]
    pub fn cluster_id(&self) -> Option<ClusterId> {
        ClusterId::new(self.path().strip_prefix("/cluster/")?).ok()
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.uri, f)
    }
}

impl FromStr for SpiffeId {
    type Err = IdError;
    fn from_str(s: &str) -> Result<Self, IdError> {
        Self::parse(s)
    }
}

impl Serialize for SpiffeId {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.uri)
    }
}

impl<'de> Deserialize<'de> for SpiffeId {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let s = String::deserialize(d)?;
        Self::parse(&s).map_err(serde::de::Error::custom)
    }
}

/// Where an endpoint runs: region, zone, sub-zone. Written `region/zone/subzone`; any part may be
/// empty from the right.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct Locality {
    /// Such as `eu-west1`.
    pub region: String,
    /// Such as `eu-west1-b`.
    pub zone: String,
    /// Finer than a zone, such as a rack.
    pub sub_zone: String,
}

impl From<String> for Locality {
    fn from(s: String) -> Self {
        let mut it = s.splitn(3, '/');
        let mut next = || it.next().unwrap_or_default().to_owned();
        Self { region: next(), zone: next(), sub_zone: next() }
    }
}

impl From<Locality> for String {
    fn from(l: Locality) -> Self {
        l.to_string()
    }
}

impl fmt::Display for Locality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.region)?;
        if !self.zone.is_empty() || !self.sub_zone.is_empty() {
            write!(f, "/{}", self.zone)?;
        }
        if !self.sub_zone.is_empty() {
            write!(f, "/{}", self.sub_zone)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spiffe_ids_come_apart() {
        let id = SpiffeId::parse("spiffe://mesh.local/ns/books/sa/reviews").unwrap();
        assert_eq!(id.trust_domain(), "mesh.local");
        assert_eq!(id.principal(), "mesh.local/ns/books/sa/reviews");
        assert_eq!(id.namespace_and_account(), Some(("books", "reviews")));
        assert_eq!(id.cluster_id(), None);
        let td = TrustDomain::default();
        let c = SpiffeId::cluster(&td, &ClusterId::new("east").unwrap());
        assert_eq!(c.as_str(), "spiffe://mesh.local/cluster/east");
        assert_eq!(c.cluster_id().unwrap().as_str(), "east");
        assert_eq!(SpiffeId::parse(c.as_str()).unwrap(), c);
    }

    #[test]
    fn malformed_spiffe_ids_are_refused() {
        for bad in [
            "",
            "mesh.local/ns/a/sa/b",
            "spiffe://",
            "spiffe://Mesh.local/ns/a/sa/b",
            "spiffe://mesh.local:80/ns/a/sa/b",
            "spiffe://u@mesh.local/ns/a/sa/b",
            "spiffe://mesh.local/",
            "spiffe://mesh.local/ns//sa/b",
            "spiffe://mesh.local/ns/../sa/b",
            "spiffe://mesh.local/ns/a/sa/b/",
            "spiffe://mesh.local/ns/a/sa/b?x=1",
            "spiffe://mesh.local/ns/a/sa/b#f",
            "spiffe://mesh.local/ns/a/sa/b%2f",
            "spiffe://mesh.local/ns/a\0/sa/b",
        ] {
            assert!(SpiffeId::parse(bad).is_err(), "{bad:?} was accepted");
        }
        assert!(SpiffeId::parse(&format!("spiffe://mesh.local/{}", "a".repeat(2048))).is_err());
    }

    #[test]
    fn labels() {
        for ok in ["a", "west-1", "0"] {
            assert!(ClusterId::new(ok).is_ok());
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", &"a".repeat(64)] {
            assert!(ClusterId::new(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn locality_round_trip() {
        for s in ["", "r", "r/z", "r/z/s"] {
            assert_eq!(Locality::from(s.to_owned()).to_string(), s);
        }
    }
}

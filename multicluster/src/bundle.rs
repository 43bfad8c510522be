//! SPIFFE bundle endpoints (SPIFFE Federation, sections 4 and 5): the own bundle is served, and those of trust domains that
//! are no Flotilla meshes are followed.
//!
//! Such a domain is known by its bundle alone. It is declared, never heard of: no member passes it on, and control planes
//! do not accept its certificates, since nobody of it is a peer. Proxies do.

pub(crate) mod declared;
mod fetch;
pub(crate) mod follow;
mod serve;

pub use fetch::{BundleUrl, FetchError, fetch, spiffe_tls, web_tls};
pub(crate) use serve::serve;

use std::{net::SocketAddr, path::PathBuf};

/// Where systems keep the authorities of the Web PKI.
pub const SYSTEM_ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Where the bundle of the own trust domain is served; each of the profiles if it has an address.
#[derive(Debug, Clone, Default)]
pub struct BundleEndpoints {
    /// Profile `https_spiffe`: the control plane shows its SVID.
    pub spiffe: Option<SocketAddr>,
    /// Profile `https_web`: an address, and files with a certificate chain and its key, PEM.
    pub web: Option<(SocketAddr, PathBuf, PathBuf)>,
    /// Authorities that `https_web` endpoints of others are verified by, a PEM file.
    pub web_roots: PathBuf,
}

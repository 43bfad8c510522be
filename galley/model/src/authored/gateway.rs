//! `networking.istio.io` Gateway.

use std::collections::BTreeMap;

use super::Port;

message! {
    /// What gateway proxies expose.
    pub struct Gateway {
        /// Listening servers, at least one.
        pub servers: Vec<Server>,
        /// Labels that the gateway's workloads carry; none selects every gateway.
        pub selector: BTreeMap<String, String>,
    }

    /// One port with its hosts.
    pub struct Server {
        /// Port.
        pub port: Option<Port>,
        /// Address to bind; all unless set.
        pub bind: String,
        /// `host`, `ns/host`, `./host` or `*/host`.
        pub hosts: Vec<String>,
        /// TLS.
        pub tls: Option<ServerTlsSettings>,
        /// Not implemented by anyone.
        pub default_endpoint: String,
        /// For statistics.
        pub name: String,
    }

    /// TLS of a server.
    pub struct ServerTlsSettings {
        /// Redirect plain HTTP to HTTPS with 301.
        pub https_redirect: bool,
        /// How.
        pub mode: ServerTlsMode,
        /// Path of the certificate chain.
        pub server_certificate: String,
        /// Path of the key.
        pub private_key: String,
        /// Path of the roots that clients are verified with.
        pub ca_certificates: String,
        /// Path of a revocation list.
        pub ca_crl: String,
        /// Secret with certificate and key.
        pub credential_name: String,
        /// Two secrets: RSA and ECDSA.
        pub credential_names: Vec<String>,
        /// Secret with the roots that clients are verified with.
        pub ca_cert_credential_name: String,
        /// Two pairs of paths: RSA and ECDSA.
        pub tls_certificates: Vec<TlsCertificate>,
        /// Names that a client's certificate may carry.
        pub subject_alt_names: Vec<String>,
        /// Base64 SHA-256 of client keys.
        pub verify_certificate_spki: Vec<String>,
        /// Hex SHA-256 of client certificates.
        pub verify_certificate_hash: Vec<String>,
        /// Lowest version.
        pub min_protocol_version: TlsProtocol,
        /// Highest version.
        pub max_protocol_version: TlsProtocol,
        /// Cipher suites of TLS 1.2.
        pub cipher_suites: Vec<String>,
        /// Curves of the key exchange.
        pub ecdh_curves: Vec<String>,
        /// Accept any client certificate.
        pub insecure_skip_verify: Option<bool>,
    }

    /// Certificate and key.
    pub struct TlsCertificate {
        /// Path of the certificate chain.
        pub server_certificate: String,
        /// Path of the key.
        pub private_key: String,
        /// Path of the roots.
        pub ca_certificates: String,
    }
}

choice! {
    /// What a server does with TLS.
    pub enum ServerTlsMode {
        /// Not terminated; routed by SNI.
        #[default]
        Passthrough,
        /// Terminated.
        Simple,
        /// Terminated, client certificate required.
        Mutual,
        /// Not terminated; the SNI names the destination.
        AutoPassthrough,
        /// Terminated with the mesh identity, client certificate required.
        IstioMutual,
        /// Terminated, client certificate verified if given.
        OptionalMutual,
    }
}

/// TLS protocol version of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
pub enum TlsProtocol {
    /// The proxy's choice: TLS 1.2 to 1.3.
    #[default]
    #[serde(rename = "TLS_AUTO")]
    Auto,
    /// TLS 1.0; refused.
    #[serde(rename = "TLSV1_0")]
    V1_0,
    /// TLS 1.1; refused.
    #[serde(rename = "TLSV1_1")]
    V1_1,
    /// TLS 1.2.
    #[serde(rename = "TLSV1_2")]
    V1_2,
    /// TLS 1.3.
    #[serde(rename = "TLSV1_3")]
    V1_3,
}

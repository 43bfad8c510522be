//! What can be wrong with certificates, keys and TLS settings.

/// Failures while loading secrets or building TLS configurations.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// PEM text that holds no certificate, no key, or is damaged.
    #[error("{what}: {reason}")]
    Pem {
        /// Which secret or file.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// The key does not belong to the certificate.
    #[error("{0}: the private key does not match the certificate")]
    KeyMismatch(String),
    /// A certificate that cannot be read.
    #[error("{what}: {reason}")]
    Certificate {
        /// Which secret or file.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// A setting that cannot be honoured.
    #[error("TLS settings: {0}")]
    Settings(String),
    /// A file that cannot be read.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// rustls refused a combination.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// Key generation or encoding failed.
    #[error("key generation: {0}")]
    Generate(String),
}

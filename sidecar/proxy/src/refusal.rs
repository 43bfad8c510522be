//! How a proxy that passes TLS on by its server name says why it does not: a fatal alert (RFC 8446, section 6.2) in
//! the place of the answer. Whoever is at the other end learns at once what a closed connection would not tell, and
//! one of our own tries another cluster without asking this one for every endpoint that it has here.

use std::{io, time::Duration};

use mesh_model::proxy::alert;
use rustls::AlertDescription;
use tokio::io::{AsyncWrite, AsyncWriteExt as _};

/// Longest time that saying so may take.
const PATIENCE: Duration = Duration::from_secs(1);

/// Why a session was not passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Nothing of this name is served here: not exported, or a port or subset that there is not.
    UnknownName,
    /// The service is known, and none of its workloads can be reached.
    NoBackend,
    /// The cluster in the name cannot be reached from here.
    NoWay,
}

impl Refusal {
    const ALL: [Self; 3] = [Self::UnknownName, Self::NoBackend, Self::NoWay];

    pub(crate) fn code(self) -> u8 {
        match self {
            Self::UnknownName => alert::UNKNOWN_NAME,
            Self::NoBackend => alert::NO_BACKEND,
            Self::NoWay => alert::NO_WAY,
        }
    }

    /// What a failed handshake says, if it is one of these.
    pub(crate) fn of(error: &io::Error) -> Option<Self> {
        let rustls::Error::AlertReceived(received) = error.get_ref()?.downcast_ref()? else { return None };
        let code = match received {
            AlertDescription::UnrecognisedName => alert::UNKNOWN_NAME,
            AlertDescription::Unknown(code) => *code,
            _ => return None,
        };
        Self::of_alert(code)
    }

    /// What an alert says, if it is one of these.
    pub(crate) fn of_alert(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|r| r.code() == code)
    }

    /// Says so, and that nothing follows; a client that does not take seven bytes is not waited for.
    pub(crate) async fn send(self, to: &mut (impl AsyncWrite + Unpin)) {
        // An alert record of TLS 1.2 and above: fatal, code.
        let record = [21, 3, 3, 0, 2, 2, self.code()];
        let say = async {
            to.write_all(&record).await?;
            to.shutdown().await
        };
        let _ = tokio::time::timeout(PATIENCE, say).await;
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::UnknownName => "the gateway knows no such service: it is not exported there",
            Self::NoBackend => "the gateway has no healthy backend for the service",
            Self::NoWay => "the gateway cannot reach the cluster",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn a_client_reads_the_reason() {
        let roots = rustls::RootCertStore::empty();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        for r in Refusal::ALL {
            let (client, mut server) = tokio::io::duplex(4096);
            let refuse = tokio::spawn(async move { r.send(&mut server).await });
            let name = "a.example".try_into().unwrap();
            let e = connector.connect(name, client).await.map(|_| ()).unwrap_err();
            assert_eq!(Refusal::of(&e), Some(r), "{e}");
            refuse.await.unwrap();
        }
        assert_eq!(Refusal::of(&io::ErrorKind::UnexpectedEof.into()), None);
    }
}

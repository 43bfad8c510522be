//! What a session that did not come to be means.

use mesh_identity::{TrustRefusal, trust_refusal};
use mesh_model::{ClusterId, TrustDomain, explain::Step, proxy::alert};
use rustls::{AlertDescription, CertificateError};

use crate::admin_pb::TraceRequest;

/// What a failed handshake means.
pub(super) fn refused(
    gateway: &str,
    cluster: &ClusterId,
    domain: Option<&TrustDomain>,
    r: &TraceRequest,
    e: &std::io::Error,
) -> Step {
    let inner = e.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    let code = match inner {
        Some(rustls::Error::AlertReceived(AlertDescription::UnrecognisedName)) => Some(alert::UNKNOWN_NAME),
        Some(rustls::Error::AlertReceived(AlertDescription::Unknown(c))) => Some(*c),
        _ => None,
    };
    match (code, inner) {
        (Some(alert::UNKNOWN_NAME), _) => Step::broken(
            "export",
            format!("a gateway knows no {}", r.sni),
            format!(
                "is the service, its port and subset exported in {cluster}? `flotilla clusters` there lists peers"
            ),
        ),
        (Some(alert::NO_BACKEND), _) => Step::broken(
            "backend",
            format!("{cluster}'s gateway reaches no workload of the service"),
            "look at the workloads there: is their proxy running, and does their address fit?",
        ),
        (Some(alert::NO_WAY), _) => Step::broken(
            "tunnel",
            format!("{gateway} cannot reach {cluster}'s gateways"),
            format!("let TCP and UDP to port 15443 of {cluster}'s gateways pass; are they running?"),
        ),
        (_, Some(e @ rustls::Error::InvalidCertificate(c))) => certificate(domain, e, c),
        (_, Some(rustls::Error::AlertReceived(a))) if domain.is_some() && about_certificates(*a) => {
            Step::broken(
                "identity",
                format!(
                    "{cluster} does not accept this cluster's certificates: it has no bundle of this trust domain, or an old one"
                ),
                "`flotilla clusters` and `flotilla doctor` there show its bundles; was this mesh evicted there?",
            )
        }
        _ => Step::broken(
            "backend",
            format!("the session ended in its handshake: {e}"),
            "look at the log of the gateways and of the workload's proxy",
        ),
    }
}

fn about_certificates(a: AlertDescription) -> bool {
    use AlertDescription as A;
    matches!(
        a,
        A::UnknownCA | A::CertificateUnknown | A::BadCertificate | A::CertificateExpired | A::DecryptError
    )
}

fn certificate(domain: Option<&TrustDomain>, e: &rustls::Error, c: &CertificateError) -> Step {
    use CertificateError as C;
    if let Some(refusal) = trust_refusal(e) {
        let fix = match refusal {
            TrustRefusal::NoBundle(_) => {
                "federate with that trust domain: `flotilla token create --federate` there"
            }
            TrustRefusal::Expired(_) => {
                "its founder needs a new root, and a control plane of it must be reached: `flotilla clusters` shows when \
                 its bundle was last confirmed"
            }
            TrustRefusal::Cluster { .. } => {
                "a cluster of that domain joins with its mesh: is it a member there, and is its ID its own?"
            }
        };
        return Step::broken("identity", refusal.to_string(), fix);
    }
    if let (Some(domain), C::UnknownIssuer | C::BadSignature) = (domain, c) {
        return Step::broken(
            "identity",
            format!("the workload's certificate is of no root in the trust bundle of {domain}"),
            "that mesh has other roots than it told: `flotilla clusters` shows the sequence of its bundle here, its own \
             control planes tell the new one",
        );
    }
    let e = c;
    let (says, fix) = match e {
        C::Expired | C::ExpiredContext { .. } => (
            "the workload's certificate has expired".to_owned(),
            "compare the clocks of both clusters; is the workload's proxy connected to its control plane?",
        ),
        C::NotValidYet | C::NotValidYetContext { .. } => {
            ("the workload's certificate is not valid yet".to_owned(), "compare the clocks of both clusters")
        }
        C::UnknownIssuer | C::BadSignature => (
            "the workload's certificate is not of this mesh's root".to_owned(),
            "let that cluster join this mesh again, or distribute the new root first",
        ),
        other => (
            format!("the workload's identity is not one that the member announced: {other}"),
            "which service account do its workloads run as?",
        ),
    };
    Step::broken("identity", says, fix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_bundle_is_named() {
        let b = TrustDomain::new("b.example").unwrap();
        let step = |domain, e: rustls::Error| {
            let rustls::Error::InvalidCertificate(c) = &e else { panic!("{e}") };
            certificate(domain, &e, c)
        };
        let domain = || "b.example".to_owned();
        let cases = [
            (TrustRefusal::NoBundle(domain()), "no trust bundle of b.example"),
            (TrustRefusal::Expired(domain()), "every root in the trust bundle of b.example has expired"),
            (
                TrustRefusal::Cluster { domain: domain(), cluster: "x".into() },
                "cluster x is not known to be of",
            ),
        ];
        for (refusal, says) in cases {
            let s = step(Some(&b), refusal.into());
            assert!(s.is_broken() && s.says.contains(says) && !s.fix.is_empty(), "{s:?}");
        }
        let unknown = || rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        assert!(step(Some(&b), unknown()).says.contains("no root in the trust bundle of b.example"));
        assert!(step(None, unknown()).says.contains("not of this mesh's root"));
    }
}

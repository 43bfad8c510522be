//! `IstioCAService`, the certificate signing of Istio 1.0, on the same authority as its successor.
//!
//! Who asks is proved by a client certificate of this cluster, by a bearer token in the call's metadata, or by a token as
//! `node_agent_credential`; a certificate in that field proves nothing, as certificates are no secret. Release 1.0.6 left
//! the names in a request to the caller. Here they are the caller's own or the request is refused, and the certificate says
//! what was proved, as always.

use std::time::Duration;

use rcgen::SanType;
use tonic::{Request, Response, Status};

use crate::{
    AuthorityError, csr,
    pb::istio::{CsrRequest, CsrResponse, CsrStatus, istio_ca_service_server},
    service::CertificateService,
};

#[tonic::async_trait]
impl istio_ca_service_server::IstioCaService for CertificateService {
    async fn handle_csr(&self, mut request: Request<CsrRequest>) -> Result<Response<CsrResponse>, Status> {
        let bare = !request.metadata().contains_key("authorization");
        let credential = std::mem::take(&mut request.get_mut().node_agent_credential);
        if bare && let Ok(token) = std::str::from_utf8(&credential) {
            // What cannot be a header is no token either.
            if let Ok(value) = format!("Bearer {}", token.trim()).parse()
                && !token.trim().is_empty()
            {
                request.metadata_mut().insert("authorization", value);
            }
        }
        let (id, proof) = self.proven_or_noted(&request).await?;
        let r = request.into_inner();
        let pem = String::from_utf8(r.csr_pem).map_err(|_| Status::invalid_argument("csr_pem is not PEM"))?;
        let asked = csr::parse(&pem)?;
        if asked.params.subject_alt_names.is_empty() {
            return Err(Status::invalid_argument(format!(
                "the signing request names nobody: its subject alternative name has to be {id}"
            )));
        }
        let own = |san: &SanType| matches!(san, SanType::URI(u) if u.as_str() == id.as_str());
        if !asked.params.subject_alt_names.iter().all(own) {
            let why =
                format!("the signing request asks for another name than the caller's own, which is {id}");
            self.0.refused(id.as_str(), proof, &why);
            return Err(AuthorityError::Refused(why).into());
        }
        let minutes = u64::try_from(r.requested_ttl_minutes)
            .map_err(|_| Status::invalid_argument("requested_ttl_minutes is negative"))?;
        let ttl = Duration::from_secs(minutes.saturating_mul(60));
        let issued = self.issue(pem, id, ttl, proof).await?;
        let (leaf, rest) =
            issued.chain.split_first().ok_or_else(|| Status::internal("nothing was signed"))?;
        // The last one is the bundle of roots, which callers have.
        let between = rest.split_last().map(|(_, between)| between.concat()).unwrap_or_default();
        Ok(Response::new(CsrResponse {
            is_approved: true,
            status: Some(CsrStatus::default()),
            signed_cert: leaf.clone().into_bytes(),
            cert_chain: between.into_bytes(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mesh_model::{ClusterId, SpiffeId, TrustDomain};
    use rcgen::{CertificateParams, KeyPair};
    use tonic::Code;

    use super::*;
    use crate::{Authority, pb::istio::istio_ca_service_server::IstioCaService};

    fn csr(names: &[&str]) -> Vec<u8> {
        let mut p = CertificateParams::default();
        p.subject_alt_names = names
            .iter()
            .map(|n| match n.strip_prefix("DNS:") {
                Some(d) => SanType::DnsName(d.try_into().unwrap()),
                None => SanType::URI((*n).try_into().unwrap()),
            })
            .collect();
        p.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap().into_bytes()
    }

    #[tokio::test]
    async fn names_are_the_callers_own() {
        let dir = tempfile::tempdir().unwrap();
        let day = Duration::from_secs(86_400);
        let a = Authority::load(ClusterId::new("west").unwrap(), dir.path().into(), day).unwrap();
        let service = CertificateService(Arc::new(a), None);
        let ask = async |csr_pem: Vec<u8>, credential: &str, requested_ttl_minutes| {
            service
                .handle_csr(Request::new(CsrRequest {
                    csr_pem,
                    node_agent_credential: credential.as_bytes().to_vec(),
                    credential_type: String::new(),
                    requested_ttl_minutes,
                }))
                .await
        };
        let own = "spiffe://mesh.local/ns/books/sa/web";
        let code = |r: Result<Response<CsrResponse>, Status>| r.unwrap_err().code();
        assert_eq!(code(ask(csr(&[own]), "x", 0).await), Code::FailedPrecondition, "of no mesh");
        service.0.found(&TrustDomain::default()).unwrap();
        let token = service.0.tokens().issue("books", "web", day).unwrap();

        let said = ask(csr(&[own]), &token, 60).await.unwrap().into_inner();
        assert!(said.is_approved && said.status == Some(CsrStatus::default()));
        let leaf = String::from_utf8(said.signed_cert).unwrap();
        let chain = String::from_utf8(said.cert_chain).unwrap();
        assert_eq!((leaf.matches("BEGIN").count(), chain.matches("BEGIN").count()), (1, 1));
        let der = x509_parser::pem::parse_x509_pem(leaf.as_bytes()).unwrap().1;
        let cert = der.parse_x509().unwrap();
        let san = cert.subject_alternative_name().unwrap().unwrap();
        assert!(format!("{san:?}").contains(own), "{san:?}");
        let v = cert.validity();
        let lives = v.not_after.timestamp() - v.not_before.timestamp();
        assert!((3600..5000).contains(&lives), "{lives}");
        let der = x509_parser::pem::parse_x509_pem(chain.as_bytes()).unwrap().1;
        cert.verify_signature(Some(der.parse_x509().unwrap().public_key())).unwrap();

        for (names, want) in [
            (vec![], Code::InvalidArgument),
            (vec!["spiffe://mesh.local/ns/books/sa/other"], Code::PermissionDenied),
            (vec![own, "spiffe://mesh.local/ns/books/sa/other"], Code::PermissionDenied),
            (vec![own, "DNS:istio-citadel.istio-system"], Code::PermissionDenied),
        ] {
            assert_eq!(code(ask(csr(&names), &token, 0).await), want, "{names:?}");
        }
        assert_eq!(code(ask(b"nonsense".to_vec(), &token, 0).await), Code::InvalidArgument);
        assert_eq!(code(ask(vec![0xff], &token, 0).await), Code::InvalidArgument);
        assert_eq!(code(ask(csr(&[own]), &token, -1).await), Code::InvalidArgument);
        assert_eq!(code(ask(csr(&[own]), &token, 1_000_000).await), Code::InvalidArgument);
        for bad in ["", "nonsense", "a\nb", &leaf] {
            assert_eq!(code(ask(csr(&[own]), bad, 0).await), Code::Unauthenticated, "{bad:?}");
        }
        assert!(SpiffeId::parse(own).is_ok());
    }
}

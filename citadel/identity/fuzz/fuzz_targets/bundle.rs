//! SPIFFE bundles: any text is refused, or is read as what it says.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_identity::TrustBundle;
use mesh_model::TrustDomain;

fuzz_target!(|text: &str| {
    let Ok(domain) = TrustDomain::new("b.example") else { return };
    if let Ok(b) = TrustBundle::parse(domain.clone(), text) {
        let again = TrustBundle::parse(domain, &b.document());
        assert!(again.is_ok_and(|again| again == b));
        let _ = (b.pem(), b.ends(), b.shares_root(&b));
    }
});

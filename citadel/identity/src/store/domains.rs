//! Handshakes between trust domains, each with a root of its own.

use super::*;
use crate::{TrustRefusal, trust_refusal};

const BEE: &str = "spiffe://b.example/ns/books/sa/bee";
const NORTH: &str = "spiffe://b.example/cluster/north";

fn foreign(domain: &str, root: &Ca, clusters: &[&str]) -> ForeignTrust {
    ForeignTrust {
        trust_domain: TrustDomain::new(domain).unwrap(),
        roots: root.pem(),
        clusters: Some(clusters.iter().map(|c| ClusterId::new(c).unwrap()).collect()),
    }
}

/// A process of a trust domain: who it is, and whose roots it has.
fn member(chain: &[&str], key: &str, domain: &str, root: &Ca, others: Vec<ForeignTrust>) -> Arc<SecretStore> {
    let s = SecretStore::new();
    s.set_identity(WORKLOAD_SVID, chain.concat().as_bytes(), key.as_bytes()).unwrap();
    s.set_mesh_trust(&TrustDomain::new(domain).unwrap(), root.pem().as_bytes()).unwrap();
    s.set_foreign_trust(others).unwrap();
    s
}

struct Two {
    a_root: Ca,
    b_root: Ca,
    west: Ca,
    north: Ca,
}

impl Two {
    fn new() -> Self {
        let (a_root, b_root) = (root(), root());
        Self { west: intermediate(&a_root, WEST), north: intermediate(&b_root, NORTH), a_root, b_root }
    }

    /// Of `mesh.local`, and knows `b.example` with its cluster north.
    fn a(&self) -> Arc<SecretStore> {
        let (leaf, key) = leaf(&self.west, &[A]);
        let others = vec![foreign("b.example", &self.b_root, &["north"])];
        member(&[&leaf, &self.west.pem()], &key, "mesh.local", &self.a_root, others)
    }

    /// Of `b.example`, with whatever chain, and knows `mesh.local` with its cluster west.
    fn b(&self, chain: &[&str], key: &str) -> Arc<SecretStore> {
        let others = vec![foreign("mesh.local", &self.a_root, &["west"])];
        member(chain, key, "b.example", &self.b_root, others)
    }

    fn good_b(&self) -> Arc<SecretStore> {
        let (leaf, key) = leaf(&self.north, &[BEE]);
        self.b(&[&leaf, &self.north.pem()], &key)
    }
}

fn dial(
    server: &SecretStore,
    client: &SecretStore,
    sans: &[&str],
) -> Result<(rustls::ServerConnection, rustls::ClientConnection), rustls::Error> {
    handshake(
        &server.server_config(&server_tls()).unwrap(),
        &client.client_config(&client_tls(sans)).unwrap(),
        &sni(),
    )
}

#[test]
fn each_domain_is_believed_by_its_own_roots() {
    let two = Two::new();
    let (a, b) = (two.a(), two.good_b());
    assert_eq!(a.trust_domains(), ["b.example", "mesh.local"]);
    for (server, client, who, cluster, san) in [(&b, &a, A, "west", BEE), (&a, &b, BEE, "north", A)] {
        let (s, c) = dial(server, client, &[san]).unwrap();
        let seen = peer_identity(s.peer_certificates().unwrap()).unwrap();
        assert_eq!((seen.spiffe.unwrap().as_str(), seen.cluster.unwrap().as_str()), (who, cluster));
        let seen = peer_identity(c.peer_certificates().unwrap()).unwrap();
        assert_eq!(seen.spiffe.unwrap().as_str(), san);
    }
    // The same namespace and account in the other domain is somebody else.
    let err = dial(&b, &a, &["spiffe://mesh.local/ns/books/sa/bee"]).unwrap_err();
    assert_eq!(err, rustls::Error::InvalidCertificate(rustls::CertificateError::NotValidForName));
}

#[test]
fn no_root_vouches_for_another_domain() {
    let two = Two::new();
    let (a, b) = (two.a(), two.good_b());
    let of_a = intermediate(&two.a_root, NORTH);
    let (forged, forged_key) = leaf(&of_a, &[BEE]);
    let (mixed, mixed_key) = leaf(&two.west, &[BEE]);
    let (direct, direct_key) = leaf(&two.a_root, &[BEE]);
    let (of_a_pem, north, west) = (of_a.pem(), two.north.pem(), two.west.pem());
    let cases: [(&str, &[&str], &str); 4] = [
        ("A's root, an intermediate that claims B", &[&forged, &of_a_pem], &forged_key),
        ("the same with B's real intermediate after it", &[&forged, &of_a_pem, &north], &forged_key),
        ("A's real intermediate, a leaf that claims B", &[&mixed, &west], &mixed_key),
        ("A's root itself", &[&direct], &direct_key),
    ];
    for (name, chain, key) in cases {
        let hostile = two.b(chain, key);
        // To whoever is of A, and of B; as a client, and as a server.
        for honest in [&a, &b] {
            for (role, e) in
                [("client", dial(honest, &hostile, &[])), ("server", dial(&hostile, honest, &[]))]
            {
                // No chain leads to B's root; these roots have one name.
                use rustls::CertificateError::{BadSignature, UnknownIssuer};
                let e = e.expect_err(name);
                let as_meant = matches!(e, rustls::Error::InvalidCertificate(BadSignature | UnknownIssuer));
                assert!(as_meant, "{name}, as a {role}: {e}");
            }
        }
    }
    // The other way round: B's root vouches for nobody of A.
    let of_b = intermediate(&two.b_root, WEST);
    let (forged, key) = leaf(&of_b, &[A]);
    let others = vec![foreign("b.example", &two.b_root, &["north"])];
    let hostile = member(&[&forged, &of_b.pem()], &key, "mesh.local", &two.a_root, others);
    for honest in [&a, &b] {
        assert!(dial(honest, &hostile, &[]).is_err() && dial(&hostile, honest, &[]).is_err());
    }
}

#[test]
fn a_domain_speaks_for_its_own_clusters() {
    let two = Two::new();
    let (a, b) = (two.a(), two.good_b());
    let refused = |honest: &SecretStore, hostile: &SecretStore| {
        let e = dial(honest, hostile, &[]).unwrap_err();
        trust_refusal(&e).cloned().unwrap_or_else(|| panic!("{e}"))
    };
    // A cluster that B has, or claims to have, and that nobody federated with; one of A's among them.
    for name in ["south", "west"] {
        let other = intermediate(&two.b_root, &format!("spiffe://b.example/cluster/{name}"));
        let (l, k) = leaf(&other, &[BEE]);
        let hostile = two.b(&[&l, &other.pem()], &k);
        let expected = TrustRefusal::Cluster { domain: "b.example".into(), cluster: name.into() };
        assert_eq!(refused(&a, &hostile), expected);
        // In its own domain clusters come and go, unless it takes the name of another domain's.
        assert_eq!(dial(&b, &hostile, &[]).is_ok(), name == "south");
    }
    let (l, k) = leaf(&two.b_root, &[BEE]);
    let expected = TrustRefusal::Cluster { domain: "b.example".into(), cluster: "(none)".into() };
    assert_eq!(refused(&a, &two.b(&[&l], &k)), expected);
}

#[test]
fn a_domain_without_a_bundle_is_nobody() {
    let two = Two::new();
    let (a, b) = (two.a(), two.good_b());
    let server = a.server_config(&server_tls()).unwrap();
    let client = b.client_config(&client_tls(&[A])).unwrap();
    handshake(&server, &client, &sni()).unwrap();
    let (s, _) = handshake(&server, &client, &sni()).unwrap();
    assert_eq!(s.handshake_kind(), Some(rustls::HandshakeKind::Resumed));
    // What is told again changes nothing.
    a.set_foreign_trust(vec![foreign("b.example", &two.b_root, &["north"])]).unwrap();
    let (s, _) = handshake(&server, &client, &sni()).unwrap();
    assert_eq!(s.handshake_kind(), Some(rustls::HandshakeKind::Resumed));
    // The bundle is removed: configurations handed out before refuse at once, and resume nothing.
    a.set_foreign_trust(vec![]).unwrap();
    let e = handshake(&server, &client, &sni()).unwrap_err();
    assert_eq!(trust_refusal(&e), Some(&TrustRefusal::NoBundle("b.example".into())));
    // Nobody tells the own domain's roots but who is of it.
    a.set_foreign_trust(vec![foreign("mesh.local", &two.b_root, &["north"])]).unwrap();
    let of_b = intermediate(&two.b_root, "spiffe://mesh.local/cluster/north");
    let (l, k) = leaf(&of_b, &[A]);
    assert!(dial(&a, &two.b(&[&l, &of_b.pem()], &k), &[]).is_err());
}

#[test]
fn a_bundle_of_expired_roots_is_named() {
    let two = Two::new();
    let mut params = ca_params(None);
    params.not_after = rcgen::date_time_ymd(2020, 1, 1);
    let old = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let a = two.a();
    let north = intermediate(&old, NORTH);
    let (l, k) = leaf(&north, &[BEE]);
    let b = two.b(&[&l, &north.pem()], &k);
    a.set_foreign_trust(vec![foreign("b.example", &old, &["north"])]).unwrap();
    let e = dial(&a, &b, &[]).unwrap_err();
    assert_eq!(trust_refusal(&e), Some(&TrustRefusal::Expired("b.example".into())));
    // While a root is replaced both are there, and the old one is not used.
    let both =
        ForeignTrust { roots: old.pem() + &two.b_root.pem(), ..foreign("b.example", &old, &["north"]) };
    a.set_foreign_trust(vec![both]).unwrap();
    assert!(dial(&a, &b, &[]).is_err());
    dial(&a, &two.good_b(), &[]).unwrap();
}

#[test]
fn a_domain_known_by_its_bundle_has_no_clusters() {
    let two = Two::new();
    let a = two.a();
    let alone = |root: &Ca| ForeignTrust { clusters: None, ..foreign("b.example", root, &[]) };
    a.set_foreign_trust(vec![alone(&two.b_root)]).unwrap();
    let shows = |issuer: &Ca, more: &[&str]| {
        let (l, k) = leaf(issuer, &[BEE]);
        let chain: Vec<&str> = std::iter::once(l.as_str()).chain(more.iter().copied()).collect();
        dial(&a, &two.b(&chain, &k), &[A])
    };
    // Its root, an intermediate without a name, one with a name of the domain.
    shows(&two.b_root, &[]).unwrap();
    let key = KeyPair::generate().unwrap();
    let unnamed = CertifiedIssuer::signed_by(ca_params(None), key, &two.b_root).unwrap();
    shows(&unnamed, &[&unnamed.pem()]).unwrap();
    let server = intermediate(&two.b_root, "spiffe://b.example/spire/server");
    shows(&server, &[&server.pem()]).unwrap();
    // One of another domain, and one that names a cluster, be it of this mesh.
    for name in ["spiffe://mesh.local/cluster/west", "spiffe://mesh.local/ns/a/sa/b"] {
        let of_a = intermediate(&two.b_root, name);
        assert!(shows(&of_a, &[&of_a.pem()]).is_err(), "{name}");
    }
    for cluster in ["west", "north"] {
        let named = intermediate(&two.b_root, &format!("spiffe://b.example/cluster/{cluster}"));
        let e = shows(&named, &[&named.pem()]).unwrap_err();
        let refusal = TrustRefusal::Cluster { domain: "b.example".into(), cluster: cluster.into() };
        assert_eq!(trust_refusal(&e), Some(&refusal));
    }
    // Other roots vouch for nobody of it, and it for nobody else; the own domain's intermediates need their names.
    assert!(shows(&two.a_root, &[]).is_err());
    let key = KeyPair::generate().unwrap();
    let unnamed = CertifiedIssuer::signed_by(ca_params(None), key, &two.a_root).unwrap();
    let (l, k) = leaf(&unnamed, &[A]);
    assert!(dial(&a, &two.b(&[&l, &unnamed.pem()], &k), &[]).is_err());
}

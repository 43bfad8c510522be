use std::time::Duration;

use mesh_xds::{AdsService, Endpoint, client::channel, codec::decode_secret, pb, server::conn};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, client::Grpc, codegen::http::uri::PathAndQuery};
use tonic_prost::ProstCodec;

use super::*;

fn pem(chain: &str) -> Option<Arc<SvidPem>> {
    Some(Arc::new(SvidPem { chain: chain.into(), key: b"key".to_vec(), roots: b"roots".to_vec() }))
}

#[tokio::test]
async fn a_rotated_certificate_is_pushed_over_the_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sds.sock");
    let (tx, rx) = watch::channel(pem("one"));
    let (_foreign, none) = watch::channel(vec![]);
    let (source, _task) = SecretSource::follow(TrustDomain::default(), rx, none);
    let server = tonic::transport::Server::builder()
        .add_service(AdsService::new(source).secrets())
        .serve_with_incoming(conn::unix(conn::bind_unix(&path).unwrap()));
    tokio::spawn(server);

    // As Envoy does: one stream for one name.
    let mut grpc = Grpc::new(channel(&Endpoint::Unix(path)).await.unwrap());
    grpc.ready().await.unwrap();
    let (ask, requests) = tokio::sync::mpsc::channel(4);
    let request = |nonce: &str, version: &str| pb::DiscoveryRequest {
        node: Some(pb::Node { id: "sidecar~10.0.0.1~a.b~b.svc.cluster.local".into(), ..pb::Node::default() }),
        type_url: SDS.into(),
        resource_names: vec!["default".into()],
        response_nonce: nonce.into(),
        version_info: version.into(),
        ..pb::DiscoveryRequest::default()
    };
    ask.send(request("", "")).await.unwrap();
    let codec = ProstCodec::<pb::DiscoveryRequest, pb::DiscoveryResponse>::default();
    let call = PathAndQuery::from_static("/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets");
    let mut answers =
        grpc.streaming(Request::new(ReceiverStream::new(requests)), call, codec).await.unwrap().into_inner();
    for chain in ["one", "two"] {
        let next = tokio::time::timeout(Duration::from_secs(5), answers.message()).await;
        let answer = next.expect("a push within five seconds").unwrap().unwrap();
        assert_eq!(answer.resources.len(), 1, "only the secret that was asked for");
        let secret = decode_secret(&answer.resources[0]).unwrap();
        assert_eq!(secret.name, "default");
        assert!(
            secret.kind == SecretKind::Certificate { chain: chain.into(), key: b"key".to_vec() },
            "{chain} was expected"
        );
        ask.send(request(&answer.nonce, &answer.version_info)).await.unwrap();
        tx.send_replace(pem("two"));
    }
}

#[tokio::test]
async fn only_the_socket_gets_secrets() {
    let (_tx, rx) = watch::channel(pem("one"));
    let (_foreign, none) = watch::channel(vec![]);
    let (source, _task) = SecretSource::follow(TrustDomain::default(), rx, none);
    let node = NodeInfo::component("x");
    let peer = |t| PeerInfo::plain(t, None);
    assert!(source.authorize(&peer(Transport::Unix), &node).is_ok());
    assert!(source.authorize(&peer(Transport::Tls), &node).is_err());
    assert!(source.authorize(&peer(Transport::Plaintext), &node).is_err());
    assert!(source.snapshot(&node, "other").resources().next().is_none());
    assert_eq!(format!("{:?}", pem("one")), "Some(SvidPem)");
}

/// With roots of another trust domain the proxy chooses by domain, and without them as ever.
#[tokio::test]
async fn roots_of_another_domain_are_pushed_and_taken_away() {
    use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
    use prost::Message as _;

    let (_pem, rx) = watch::channel(pem("one"));
    let (foreign, bundles) = watch::channel(vec![]);
    let own = TrustDomain::new("a.example").unwrap();
    let (source, _task) = SecretSource::follow(own.clone(), rx, bundles);
    let node = NodeInfo::component("x");
    let validation = || {
        let any = source.snapshot(&node, SDS).get("ROOTCA").unwrap().resource.clone().unwrap();
        match tls::Secret::decode(any.value.as_ref()).unwrap().r#type {
            Some(tls::secret::Type::ValidationContext(v)) => v,
            other => panic!("{other:?}"),
        }
    };
    assert!(validation().trusted_ca.is_some() && validation().custom_validator_config.is_none());
    let mut changes = source.changes();
    let of = |domain: &str| ForeignBundle {
        by_bundle: false,
        own: None,
        revoked: vec![],
        trust_domain: TrustDomain::new(domain).unwrap(),
        roots: format!("roots of {domain}"),
        clusters: vec![],
    };
    // What is told of the own domain is not taken.
    foreign.send_replace(vec![of("a.example"), of("b.example")]);
    changes.changed().await.unwrap();
    let v = validation();
    assert!(v.trusted_ca.is_none(), "no root is for everybody");
    let validator = v.custom_validator_config.unwrap();
    assert_eq!(validator.name, "envoy.tls.cert_validator.spiffe");
    let config = validator.typed_config.unwrap();
    assert!(config.type_url.ends_with("SPIFFECertValidatorConfig"), "{}", config.type_url);
    let config = tls::SpiffeCertValidatorConfig::decode(config.value.as_ref()).unwrap();
    let domains: Vec<_> = config.trust_domains.iter().map(|d| d.name.as_str()).collect();
    assert_eq!(domains, ["a.example", "b.example"]);
    foreign.send_replace(vec![]);
    changes.changed().await.unwrap();
    assert!(validation().trusted_ca.is_some());
}

/// Revocation lists, as far as they cut nobody off.
#[tokio::test]
async fn lists_are_pushed_while_anything_is_revoked() {
    use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
    use mesh_model::federation::{OwnRoots, RevocationList};
    use prost::Message as _;
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose, SanType,
    };

    type Ca = CertifiedIssuer<'static, KeyPair>;
    let params = |name: &str| {
        let mut p = CertificateParams::default();
        p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        p.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        p.distinguished_name.push(rcgen::DnType::CommonName, name);
        p
    };
    let root: Ca = CertifiedIssuer::self_signed(params("root"), KeyPair::generate().unwrap()).unwrap();
    let mut p = params("west");
    p.subject_alt_names = vec![SanType::URI("spiffe://mesh.local/cluster/west".try_into().unwrap())];
    let west: Ca = CertifiedIssuer::signed_by(p, KeyPair::generate().unwrap(), &root).unwrap();
    let list = |by: &Ca, ends: Duration| {
        let now = SystemTime::now();
        let p = rcgen::CertificateRevocationListParams {
            this_update: (now - Duration::from_secs(600)).into(),
            next_update: (now - Duration::from_secs(300) + ends).into(),
            crl_number: 1u64.into(),
            issuing_distribution_point: None,
            revoked_certs: vec![],
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        RevocationList { issuer: by.pem(), list: p.signed_by(by).unwrap().pem().unwrap() }
    };
    let hour = Duration::from_secs(3600);
    let roots = root.pem();
    let (_pem, rx) = watch::channel(Some(Arc::new(SvidPem {
        chain: b"chain".to_vec(),
        key: b"key".to_vec(),
        roots: roots.clone().into_bytes(),
    })));
    let told = |revoked: Vec<RevocationList>, unlisted| ForeignBundle {
        trust_domain: TrustDomain::default(),
        roots: roots.clone(),
        clusters: vec![],
        by_bundle: false,
        own: Some(OwnRoots { sequence: 1, intermediate: String::new(), renew_within_ms: 0, unlisted }),
        revoked,
    };
    let (foreign, bundles) = watch::channel(vec![told(vec![], false)]);
    let (source, _task) = SecretSource::follow(TrustDomain::default(), rx, bundles);
    let node = NodeInfo::component("x");
    let mut changes = source.changes();
    let (of_root, of_west) = (list(&root, hour), list(&west, hour));
    let both = format!("{}{}", of_root.list, of_west.list);
    // Without any, as ever; with all, the whole chain; without the root's, or with one that is too old, the leaf; not at all if
    // that would cut off a member.
    for (what, revoked, unlisted, want) in [
        ("all", vec![of_root.clone(), of_west.clone()], false, Some((both.clone(), false))),
        ("no root's", vec![of_west.clone()], false, Some((of_west.list.clone(), true))),
        (
            "old root's",
            vec![list(&root, Duration::ZERO), of_west.clone()],
            false,
            Some((of_west.list.clone(), true)),
        ),
        ("a member has none", vec![of_root.clone(), of_west.clone()], true, None),
        ("nothing is revoked", vec![], false, None),
    ] {
        foreign.send_replace(vec![told(revoked, unlisted)]);
        changes.changed().await.unwrap();
        let any = source.snapshot(&node, SDS).get("ROOTCA").unwrap().resource.clone().unwrap();
        let v = match tls::Secret::decode(any.value.as_ref()).unwrap().r#type {
            Some(tls::secret::Type::ValidationContext(v)) => v,
            other => panic!("{other:?}"),
        };
        assert!(v.trusted_ca.is_some(), "{what}");
        use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
        let text = v.crl.and_then(|c| c.specifier).map(|s| match s {
            Specifier::InlineBytes(b) => String::from_utf8(b).unwrap(),
            other => panic!("{other:?}"),
        });
        assert_eq!(text.map(|t| (t, v.only_verify_leaf_cert_crl)), want, "{what}");
    }

    // Who knows another domain as well gets them among the roots of the own, but only if the whole chain can be looked at.
    let other = ForeignBundle {
        trust_domain: TrustDomain::new("b.example").unwrap(),
        roots: "roots of b.example".to_owned(),
        own: None,
        ..told(vec![of_west.clone()], false)
    };
    for (what, revoked, unlisted, want) in [
        ("all", vec![of_root.clone(), of_west.clone()], false, format!("{roots}\n{both}")),
        ("no root's", vec![of_west.clone()], false, roots.clone()),
        ("a member has none", vec![of_root, of_west], true, roots.clone()),
    ] {
        foreign.send_replace(vec![told(revoked, unlisted), other.clone()]);
        changes.changed().await.unwrap();
        let any = source.snapshot(&node, SDS).get("ROOTCA").unwrap().resource.clone().unwrap();
        let Some(tls::secret::Type::ValidationContext(v)) =
            tls::Secret::decode(any.value.as_ref()).unwrap().r#type
        else {
            panic!("{what}");
        };
        let config = v.custom_validator_config.unwrap().typed_config.unwrap();
        let config = tls::SpiffeCertValidatorConfig::decode(config.value.as_ref()).unwrap();
        let bundles: Vec<_> =
            config.trust_domains.into_iter().map(|d| d.trust_bundle.unwrap().specifier).collect();
        use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
        let bytes = |s: &str| Some(Specifier::InlineBytes(s.as_bytes().to_vec()));
        assert_eq!(bundles, [bytes(&want), bytes("roots of b.example")], "{what}");
    }
}

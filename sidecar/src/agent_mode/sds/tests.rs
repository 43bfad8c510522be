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

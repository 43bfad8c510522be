//! Against a server that speaks the API server's protocol on loopback.

use std::{
    convert::Infallible,
    sync::{atomic::AtomicUsize, atomic::Ordering::Relaxed},
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use mesh_identity::PendingSvid;
use mesh_model::{ClusterId, SpiffeId, TrustDomain};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData as _};
use tokio::net::TcpListener;

use super::*;
use crate::{
    Authority,
    pb::istio::{IstioCertificateRequest, istio_certificate_service_server::IstioCertificateService as _},
    service::CertificateService,
};

/// What the server was asked, and what it answers.
#[derive(Default)]
struct Said {
    requests: Vec<(String, String, Value)>,
    review: Value,
    document: Value,
    jwks: Value,
    asked: AtomicUsize,
}

struct Server {
    url: Url,
    said: Arc<Mutex<Said>>,
}

impl Server {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = Url::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
        let said = Arc::new(Mutex::new(Said::default()));
        let answers = said.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let answers = answers.clone();
                let service = service_fn(move |r| answer(answers.clone(), r));
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        {
            let mut s = said.lock().unwrap();
            s.document = json!({"issuer": url.to_string(), "jwks_uri": format!("{url}/openid/v1/jwks")});
        }
        Self { url, said }
    }

    fn options(&self, review: bool) -> KubernetesOptions {
        KubernetesOptions {
            review: review.then(|| self.url.clone()),
            issuers: if review {
                vec![]
            } else {
                vec![IssuerUrl { name: self.url.clone(), at: self.url.clone() }]
            },
            ..KubernetesOptions::default()
        }
    }
}

async fn answer(
    said: Arc<Mutex<Said>>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let path = request.uri().path().to_owned();
    let accept = request.headers().get("accept").map_or("", |v| v.to_str().unwrap()).to_owned();
    let bearer = request.headers().get("authorization").map(|v| v.to_str().unwrap().to_owned());
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let mut s = said.lock().unwrap();
    s.requests.push((
        path.clone(),
        bearer.unwrap_or_default(),
        serde_json::from_slice(&body).unwrap_or_default(),
    ));
    s.asked.fetch_add(1, Relaxed);
    let answer = match path.as_str() {
        "/apis/authentication.k8s.io/v1/tokenreviews" => json!({"status": s.review}),
        "/.well-known/openid-configuration" => s.document.clone(),
        // As an API server has it: with the other type alone it answers 406.
        "/openid/v1/jwks" if accept.contains("application/jwk-set+json") => s.jwks.clone(),
        _ => Value::Null,
    };
    Ok(Response::new(Full::new(Bytes::from(answer.to_string()))))
}

/// A key of an issuer.
struct Key(KeyPair, &'static str);

impl Key {
    fn new(kid: &'static str) -> Self {
        Self(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap(), kid)
    }

    fn jwk(&self) -> Value {
        let point = self.0.der_bytes();
        let (x, y) = (URL_SAFE_NO_PAD.encode(&point[1..33]), URL_SAFE_NO_PAD.encode(&point[33..]));
        json!({"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": self.1, "x": x, "y": y})
    }

    fn sign(&self, claims: &Value) -> String {
        let header = Header { kid: Some(self.1.to_owned()), ..Header::new(Algorithm::ES256) };
        let key = EncodingKey::from_ec_pem(self.0.serialize_pem().as_bytes()).unwrap();
        jsonwebtoken::encode(&header, claims, &key).unwrap()
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn claims(issuer: &Url) -> Value {
    json!({
        "iss": issuer.to_string(), "aud": ["istio-ca"], "sub": "system:serviceaccount:books:reviews",
        "iat": now(), "nbf": now() - 5, "exp": now() + 600,
    })
}

fn verifier(o: KubernetesOptions) -> Kubernetes {
    Kubernetes::new(o).unwrap().unwrap()
}

#[tokio::test]
async fn the_api_server_is_asked_as_it_wants_to_be() {
    let server = Server::start().await;
    let dir = tempfile::tempdir().unwrap();
    let credential = dir.path().join("token");
    std::fs::write(&credential, "own-token\n").unwrap();
    let k = verifier(KubernetesOptions { credential: Some(credential), ..server.options(true) });
    let user = |u: &str| json!({"authenticated": true, "user": {"username": u}, "audiences": ["istio-ca"]});
    server.said.lock().unwrap().review = user("system:serviceaccount:books:reviews");
    let a = k.prove("opaque").await.unwrap();
    assert_eq!((a.namespace.as_str(), a.name.as_str(), a.by), ("books", "reviews", "token review"));
    let asked = server.said.lock().unwrap().requests[0].clone();
    assert_eq!(asked.1, "Bearer own-token");
    assert_eq!(
        asked.2,
        json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
            "spec": {"token": "opaque", "audiences": ["istio-ca"]},
        })
    );
    for (review, says) in [
        (json!({"authenticated": false}), "does not know"),
        (json!({}), "does not know"),
        (json!({"error": "token expired\u{1b}", "authenticated": true}), "expired"),
        (json!({"authenticated": true, "user": {"username": "system:serviceaccount:a:b"}}), "no audience"),
        (
            json!({"authenticated": true, "user": {"username": "system:serviceaccount:a:b"},
                "audiences": ["https://kubernetes.default.svc"]}),
            "not for the audience",
        ),
        (user("system:node:a"), "not of a service account"),
        (user("system:serviceaccount:a:b:c"), "not of a service account"),
        (user("system:serviceaccount::b"), "not of a service account"),
        (user(""), "not of a service account"),
    ] {
        server.said.lock().unwrap().review = review.clone();
        let e = k.prove("opaque").await.unwrap_err().to_string();
        assert!(e.contains(says) && !e.contains('\u{1b}'), "{review}: {e}");
    }
    assert!(k.prove(&"x".repeat(MAX_TOKEN + 1)).await.is_err());
    // Nobody there: nobody is believed.
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let review = Some(Url::parse(&format!("http://{gone}")).unwrap());
    let e = verifier(KubernetesOptions { review, ..Default::default() }).prove("opaque").await.unwrap_err();
    assert!(matches!(e, AuthorityError::Unavailable(_)), "{e}");
}

#[tokio::test]
async fn tokens_are_verified_by_the_keys_of_their_issuer() {
    let server = Server::start().await;
    let (key, other) = (Key::new("one"), Key::new("one"));
    server.said.lock().unwrap().jwks = json!({"keys": [key.jwk()]});
    let k = verifier(server.options(false));
    let good = claims(&server.url);
    let a = k.prove(&key.sign(&good)).await.unwrap();
    assert_eq!((a.namespace.as_str(), a.name.as_str()), ("books", "reviews"));
    assert!(a.issued_at >= now() - 5);
    let with = |field: &str, v: Value| {
        let mut c = good.clone();
        c[field] = v;
        c
    };
    for (what, bad) in [
        ("audience", with("aud", json!(["https://kubernetes.default.svc"]))),
        ("expired", with("exp", json!(now() - 3600))),
        ("not yet", with("nbf", json!(now() + 3600))),
        ("issuer", with("iss", json!("https://other.example"))),
        ("subject", with("sub", json!("someone"))),
    ] {
        assert!(k.prove(&key.sign(&bad)).await.is_err(), "{what}");
    }
    assert!(k.prove(&other.sign(&good)).await.is_err(), "another key of that name");
    let none = format!("{}.{}.", URL_SAFE_NO_PAD.encode(r#"{"alg":"none","kid":"one"}"#), "e30");
    assert!(k.prove(&none).await.is_err());
    // A secret that everybody knows is no key: that of HMAC would be the issuer's public one.
    let hmac = Header { kid: Some("one".into()), ..Header::new(Algorithm::HS256) };
    let forged = jsonwebtoken::encode(&hmac, &good, &EncodingKey::from_secret(key.0.der_bytes())).unwrap();
    assert!(k.prove(&forged).await.is_err());
    let asked = server.said.lock().unwrap().asked.load(Relaxed);
    assert_eq!(asked, 2, "the document and the keys, once");
    // Made-up keys make it ask no more often.
    for _ in 0..5 {
        assert!(k.prove(&Key::new("two").sign(&good)).await.is_err());
    }
    assert_eq!(server.said.lock().unwrap().asked.load(Relaxed), asked);
}

#[tokio::test]
async fn the_document_has_to_be_about_the_issuer() {
    let server = Server::start().await;
    let key = Key::new("one");
    {
        let mut s = server.said.lock().unwrap();
        s.jwks = json!({"keys": [key.jwk()]});
        s.document["issuer"] = json!("https://other.example");
    }
    let k = verifier(server.options(false));
    assert!(k.prove(&key.sign(&claims(&server.url))).await.is_err());
    server.said.lock().unwrap().document =
        json!({"issuer": server.url.to_string(), "jwks_uri": "file:///etc/x"});
    assert!(verifier(server.options(false)).prove(&key.sign(&claims(&server.url))).await.is_err());
}

#[tokio::test]
async fn a_workload_gets_its_certificate_with_such_a_token() {
    let server = Server::start().await;
    let key = Key::new("one");
    server.said.lock().unwrap().jwks = json!({"keys": [key.jwk()]});
    let dir = tempfile::tempdir().unwrap();
    let day = Duration::from_secs(86_400);
    let ca = Authority::load(ClusterId::new("west").unwrap(), dir.path().into(), day).unwrap();
    ca.found(&TrustDomain::default()).unwrap();
    let ca = Arc::new(ca);
    let service = CertificateService(ca.clone(), Some(Arc::new(verifier(server.options(false)))));
    let id = SpiffeId::parse("spiffe://mesh.local/ns/books/sa/reviews").unwrap();
    let ask = async |token: &str| {
        let csr = PendingSvid::generate(&id).unwrap().csr_pem;
        let mut r = tonic::Request::new(IstioCertificateRequest { csr, ..Default::default() });
        r.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        service.create_certificate(r).await
    };
    let chain = ask(&key.sign(&claims(&server.url))).await.unwrap().into_inner().cert_chain;
    let info = mesh_identity::certificate_info(chain[0].as_bytes()).unwrap();
    assert_eq!(info.spiffe, Some(id.clone()));
    // Its own tokens are what they were, and strangers' are nobody's.
    ask(&ca.tokens().issue("books", "reviews", day).unwrap()).await.unwrap();
    for bad in ["", "x", &key.sign(&json!({"iss": "https://other.example", "exp": now() + 60}))] {
        assert_eq!(ask(bad).await.unwrap_err().code(), tonic::Code::Unauthenticated, "{bad:?}");
    }
    // Who was revoked needs one from afterwards here as well.
    let before = key.sign(&claims(&server.url));
    ca.revoke(&crate::revocation::Target::Identity(id.clone()), Default::default()).unwrap();
    assert_eq!(ask(&before).await.unwrap_err().code(), tonic::Code::PermissionDenied);
    let log = std::fs::read_to_string(dir.path().join("audit/issuance.jsonl")).unwrap();
    assert!(log.contains("token of an issuer"));
}

/// An API server names its keys at the address at which pods reach it.
#[tokio::test]
async fn who_told_the_document_is_asked_for_the_keys_first() {
    let server = Server::start().await;
    let key = Key::new("one");
    let name = "https://kubernetes.default.svc";
    let dir = tempfile::tempdir().unwrap();
    let credential = dir.path().join("token");
    std::fs::write(&credential, "own-token").unwrap();
    {
        let mut s = server.said.lock().unwrap();
        s.jwks = json!({"keys": [key.jwk()]});
        s.document = json!({"issuer": name, "jwks_uri": "http://127.0.0.1:1/openid/v1/jwks"});
    }
    let issuer = IssuerUrl::parse(&format!("{name}={}", server.url)).unwrap();
    let options =
        KubernetesOptions { issuers: vec![issuer], credential: Some(credential), ..Default::default() };
    let good = claims(&Url::parse(name).unwrap());
    verifier(options.clone()).prove(&key.sign(&good)).await.unwrap();
    let asked: Vec<_> = server.said.lock().unwrap().requests.drain(..).map(|r| (r.0, r.1)).collect();
    let with = |path: &str| (path.to_owned(), "Bearer own-token".to_owned());
    assert_eq!(asked, [with("/.well-known/openid-configuration"), with("/openid/v1/jwks")]);

    // Others have their keys at another server, and no credential is for that one.
    let keys = Server::start().await;
    keys.said.lock().unwrap().jwks = json!({"keys": [key.jwk()]});
    {
        let mut s = server.said.lock().unwrap();
        s.jwks = Value::Null;
        s.document["jwks_uri"] = json!(format!("{}/openid/v1/jwks", keys.url));
    }
    verifier(options).prove(&key.sign(&good)).await.unwrap();
    assert_eq!(keys.said.lock().unwrap().requests[0].1, "");
}

#[test]
fn where_one_may_ask() {
    let i = IssuerUrl::parse("https://kubernetes.default.svc=https://10.0.0.1:6443").unwrap();
    assert_eq!(
        (i.name.to_string(), i.at.to_string()),
        ("https://kubernetes.default.svc".into(), "https://10.0.0.1:6443".into())
    );
    let i = IssuerUrl::parse("https://issuer.example/x").unwrap();
    assert_eq!(i.name, i.at);
    for bad in ["https://a.example=http://10.0.0.1", "kubernetes=https://a.example", "https://a.example="] {
        assert!(IssuerUrl::parse(bad).is_err(), "{bad}");
    }
    for good in [
        "https://10.0.0.1:6443",
        "https://kubernetes.default.svc",
        "http://127.0.0.1:8001",
        "http://[::1]:1/x",
    ] {
        assert_eq!(Url::parse(good).unwrap().to_string(), good);
    }
    for bad in ["", "kubernetes", "http://10.0.0.1", "https://me:secret@x", "https://x/?a=b", "ftp://x"] {
        let e = Url::parse(bad).unwrap_err();
        assert!(!e.contains("secret"), "{e}");
    }
}

//! What policies decide, at the engine and at a real Envoy: the same documents, as pilot makes rules of them for either,
//! and the same requests and connections, over mutual TLS, with tokens and without.
//!
//! `ENVOY_BIN` names an Envoy.

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use envoy_types::pb::envoy::config::{
    bootstrap::v3::{Bootstrap, bootstrap::StaticResources},
    cluster::v3::Cluster as EnvoyCluster,
    listener::v3::Listener as EnvoyListener,
};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use mesh_identity::SecretStore;
use mesh_model::{
    ClusterId, Locality, NetworkId, TrustDomain,
    federation::Transport,
    proxy::{
        ClientCertificate, Cluster, DirectResponse, Discovery, DownstreamTls, FilterChain, FilterChainMatch,
        HttpConnectionManager, HttpFilter, Listener, NetworkFilter, RouteAction, RouteSource, SecretRef,
        TlsVersion, Validation, WeightedCluster,
    },
};
use mesh_proxy::{ConfigSnapshot, Engine, EngineOptions, Hooks};
use mesh_xds::{NodeInfo, NodeKind, codec, mcp::ConfigState};
use pilot::{Settings, config::Reader, generate::Generated, source::PilotSource, world::World};
use prost::Message as _;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
};

const OURS: &str = "127.0.0.1";
const ENVOYS: &str = "127.0.0.2";
const CALLERS: [&str; 4] = [
    "spiffe://cluster.local/ns/shop/sa/front",
    "spiffe://cluster.local/ns/admin/sa/ops",
    "spiffe://cluster.local/ns/shop-two/sa/frontal",
    "spiffe://elsewhere.example/ns/shop/sa/front",
];
const SOURCES: [&str; 2] = ["127.0.0.10", "127.7.0.1"];

/// Who has issued tokens here.
const ISSUERS: [&str; 2] = ["https://a.example", "https://b.example"];

/// What a set of policies is asked about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum About {
    Requests,
    /// Requests of which some have tokens.
    Tokens,
    /// Connections.
    Bytes,
}

struct Set {
    name: String,
    port: u16,
    about: About,
    policies: String,
}

/// The workload that is asked, on a port of its own for each set of policies.
fn workload(port: u16, about: About) -> String {
    let protocol = if about == About::Bytes { "tcp" } else { "http" };
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: cart, namespace: shop}}\nspec: {{clusterIP: 10.9.0.1, selector: {{app: \
         cart}}, ports: [{{name: {protocol}, port: {port}}}]}}\n---\napiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: \
         {{name: cart, namespace: shop}}\nspec: {{address: 10.1.0.1, serviceAccount: cart, labels: {{app: cart, tier: back}}}}\n"
    )
}

fn policy(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: \
         {spec}\n"
    )
}

fn v1alpha1(kind: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: rbac.istio.io/v1alpha1\nkind: {kind}\nmetadata: {{name: {name}, namespace: shop}}\nspec: {spec}\n"
    )
}

/// Sets of policies, each about something of its own.
fn written(port: u16) -> Vec<(&'static str, String)> {
    let allow = |rules: &str| policy("a", &format!("{{rules: {rules}}}"));
    let role = |rules: &str| {
        v1alpha1("ClusterRbacConfig", "default", "{mode: ON}").replace(", namespace: shop", "")
            + &v1alpha1("ServiceRole", "r", &format!("{{rules: {rules}}}"))
    };
    let bind = |subjects: &str| {
        v1alpha1(
            "ServiceRoleBinding",
            "b",
            &format!("{{subjects: {subjects}, roleRef: {{kind: ServiceRole, name: r}}}}"),
        )
    };
    let every = "[{services: ['*'], methods: ['*']}]";
    vec![
        (
            "principals",
            allow("[{from: [{source: {principals: [cluster.local/ns/shop/sa/front, '*/sa/ops']}}]}]"),
        ),
        ("principals that begin", allow("[{from: [{source: {principals: ['cluster.local/ns/shop*']}}]}]")),
        (
            "any principal but",
            allow("[{from: [{source: {principals: ['*'], notPrincipals: ['*/sa/ops']}}]}]"),
        ),
        (
            "namespaces",
            allow(
                "[{from: [{source: {namespaces: [shop]}}, {source: {namespaces: ['adm*'], notIpBlocks: [127.7.0.0/16]}}]}]",
            ),
        ),
        ("no namespace", allow("[{from: [{source: {notNamespaces: [shop, 'x*']}}]}]")),
        (
            "addresses",
            allow(
                "[{from: [{source: {ipBlocks: [127.0.0.10]}}]}, {from: [{source: {remoteIpBlocks: [10.1.0.0/16]}}], to: [{operation: {methods: [POST]}}]}]",
            ),
        ),
        (
            "methods and paths",
            allow(
                "[{to: [{operation: {methods: [GET, 'P*'], paths: [/, '/items*', '*/edit'], notPaths: ['/items/../x', /items/8]}}]}]",
            ),
        ),
        ("templates of paths", allow("[{to: [{operation: {paths: ['/items/{*}', '/admin/{**}']}}]}]")),
        (
            "hosts",
            allow("[{to: [{operation: {hosts: [cart.shop, '*.example', 'CART*'], notHosts: ['b.*']}}]}]"),
        ),
        (
            "ports",
            allow(&format!(
                "[{{to: [{{operation: {{ports: ['{port}'], methods: [GET]}}}}, {{operation: {{notPorts: ['{port}']}}}}]}}]"
            )),
        ),
        (
            "headers",
            allow(
                "[{when: [{key: 'request.headers[x-v]', values: ['1', '2*'], notValues: ['2.9']}]}, {when: [{key: 'request.headers[X-W]', values: ['*']}]}]",
            ),
        ),
        ("no header", allow("[{when: [{key: 'request.headers[x-v]', notValues: ['1', '*9']}]}]")),
        ("server names", allow("[{when: [{key: connection.sni, values: [cart.shop, '*.example']}]}]")),
        (
            "conditions of the source",
            allow(
                "[{when: [{key: source.ip, values: [127.7.0.0/16]}, {key: source.namespace, values: ['shop*']}]}, {when: [{key: source.principal, notValues: ['*/ops', '*/front', '*/frontal']}]}, {when: [{key: remote.ip, values: [10.2.0.0/16]}]}]",
            ),
        ),
        (
            "conditions of the destination",
            allow(&format!(
                "[{{when: [{{key: destination.port, values: ['{port}']}}, {{key: destination.ip, values: [127.0.0.0/8]}}]}}]"
            )),
        ),
        (
            "tokens that nobody has",
            allow(
                "[{from: [{source: {requestPrincipals: ['*']}}]}, {when: [{key: 'request.auth.claims[g]', notValues: [a]}], to: [{operation: {methods: [GET]}}]}]",
            ),
        ),
        ("nobody", policy("a", "{}")),
        (
            "everybody but",
            policy(
                "a",
                "{action: DENY, rules: [{from: [{source: {principals: ['cluster.local/ns/admin/*', '*/ops']}}]}, {to: [{operation: {paths: ['/admin*']}}]}]}",
            ),
        ),
        (
            "deny before allow",
            allow("[{to: [{operation: {methods: [GET]}}]}]")
                + &policy(
                    "d",
                    "{action: DENY, rules: [{from: [{source: {notPrincipals: ['cluster.local/*']}}]}]}",
                ),
        ),
        (
            "several of each",
            allow("[{to: [{operation: {paths: [/items]}}]}]")
                + &policy("b", "{rules: [{from: [{source: {namespaces: [admin]}}]}]}")
                + &policy("d", "{action: DENY, rules: [{to: [{operation: {methods: [DELETE]}}]}]}"),
        ),
        (
            "dry run and audit",
            policy("a", "{action: DENY, rules: [{}]}")
                .replace("name: a,", "name: a, annotations: {istio.io/dry-run: 'true'},")
                + &policy("b", "{action: AUDIT, rules: [{}]}")
                + &policy("c", "{rules: [{to: [{operation: {methods: [GET]}}]}]}"),
        ),
        (
            "role of a service",
            role(
                "[{services: [cart.shop.svc.cluster.local], methods: [GET], paths: ['/items*', '*/edit']}, {services: [other.shop.svc.cluster.local], methods: ['*']}]",
            ) + &bind("[{user: cluster.local/ns/shop/sa/front}]"),
        ),
        (
            "role with constraints",
            role(
                "[{services: ['cart*'], methods: ['*'], constraints: [{key: 'request.headers[x-v]', values: ['1', '2*']}]}]",
            ) + &bind("[{properties: {source.namespace: shop}}, {properties: {source.ip: 127.7.0.0/16}}]"),
        ),
        (
            "role about the destination",
            role(&format!(
                "[{{services: ['*'], methods: ['*'], constraints: [{{key: 'destination.labels[tier]', values: [back]}}, {{key: destination.port, values: ['{port}']}}]}}]"
            )) + &bind("[{properties: {source.principal: '*/sa/ops'}}]"),
        ),
        ("role for everybody", role(every) + &bind("[{user: '*'}]")),
        ("role for nobody", role(every)),
        (
            "role on trial",
            role(every) + &bind("[{user: '*'}]").replace("roleRef:", "mode: PERMISSIVE, roleRef:"),
        ),
    ]
}

/// The same for requests with tokens.
fn of_tokens() -> Vec<(&'static str, String)> {
    let allow = |rules: &str| policy("a", &format!("{{rules: {rules}}}"));
    let principals = |p: &str| allow(&format!("[{{from: [{{source: {{{p}}}}}]}}]"));
    let when = |conditions: &str| allow(&format!("[{{when: [{conditions}]}}]"));
    vec![
        ("tokens", principals("requestPrincipals: ['https://a.example/front', 'https://b.example/*']")),
        ("tokens that begin or end", principals("requestPrincipals: ['https://a.ex*', '*/ops']")),
        ("no token", principals("notRequestPrincipals: ['*']")),
        ("no token of some", principals("notRequestPrincipals: ['https://a.example/*']")),
        ("groups", when("{key: 'request.auth.claims[groups]', values: [one, 'two*'], notValues: [three]}")),
        ("any group", when("{key: 'request.auth.claims[groups]', values: ['*']}")),
        ("no group", when("{key: 'request.auth.claims[groups]', notValues: [one]}")),
        ("claims in claims", when("{key: 'request.auth.claims[a][b]', values: [c, 'd*']}")),
        (
            "audiences and presenters",
            when(
                "{key: request.auth.audiences, values: [cart]}, {key: request.auth.presenter, values: ['p*']}",
            ),
        ),
        ("principals as conditions", when("{key: request.auth.principal, values: ['*/front']}")),
        (
            "deny by a claim",
            policy(
                "d",
                "{action: DENY, rules: [{when: [{key: 'request.auth.claims[groups]', values: [three]}]}]}",
            ),
        ),
        (
            "deny who has no token",
            policy(
                "d",
                "{action: DENY, rules: [{from: [{source: {notRequestPrincipals: ['*']}}], to: [{operation: {notPaths: ['/items*']}}]}]}",
            ),
        ),
        ("whoever has a valid one", String::new()),
    ]
}

/// Who may have which token, as release 1.0 writes it: `origins` are both issuers, with `triggers` at each.
fn of_origins(origins: impl Fn(&str) -> String) -> Vec<(&'static str, String)> {
    let policy = |triggers: &str, more: &str| {
        format!(
            "---\napiVersion: authentication.istio.io/v1alpha1\nkind: Policy\nmetadata: {{name: default, namespace: shop}}\nspec:\n  \
             peers: [{{mtls: {{}}}}]\n  origins: [{}]\n{more}",
            origins(triggers)
        )
    };
    let role = |subject: &str| {
        v1alpha1("ClusterRbacConfig", "default", "{mode: ON}").replace(", namespace: shop", "")
            + &v1alpha1("ServiceRole", "r", "{rules: [{services: ['*'], methods: ['*']}]}")
            + &v1alpha1(
                "ServiceRoleBinding",
                "b",
                &format!("{{subjects: [{subject}], roleRef: {{kind: ServiceRole, name: r}}}}"),
            )
    };
    const ORIGIN: &str = "  principalBinding: USE_ORIGIN\n";
    const OPTIONAL: &str = "  principalBinding: USE_ORIGIN\n  originIsOptional: true\n";
    let front = || role("{properties: {request.auth.principal: 'https://a.example/front'}}");
    vec![
        ("origins", policy("", ORIGIN)),
        ("origins of a role", policy("", ORIGIN) + &front()),
        ("origins that are optional", policy("", OPTIONAL)),
        ("origins of a role, optional", policy("", OPTIONAL) + &front()),
        (
            "peers of a role, beside origins",
            policy("", "") + &role("{properties: {request.auth.principal: cluster.local/ns/shop/sa/front}}"),
        ),
        (
            "claims of a role",
            policy("", ORIGIN) + &role("{properties: {'request.auth.claims[groups]': one}}"),
        ),
        (
            "origins but of some paths",
            policy(", triggerRules: [{excludedPaths: [{prefix: /items}]}]", ORIGIN),
        ),
        (
            "origins of some paths",
            policy(
                ", triggerRules: [{includedPaths: [{prefix: /admin}, {exact: /items}, {suffix: edit}]}]",
                ORIGIN,
            ),
        ),
    ]
}

/// Keys of an issuer.
struct Signer {
    key: KeyPair,
}

impl Signer {
    fn new() -> Self {
        Self { key: KeyPair::generate().unwrap() }
    }

    fn jwks(&self) -> String {
        // An uncompressed point: 4, then both coordinates.
        let (x, y) = self.key.public_key_raw()[1..].split_at(32);
        let jwk = json!({"kty": "EC", "crv": "P-256", "alg": "ES256", "x": BASE64.encode(x), "y": BASE64.encode(y)});
        json!({"keys": [jwk]}).to_string()
    }

    fn token(&self, claims: &Value) -> String {
        let key = EncodingKey::from_ec_der(self.key.serialized_der());
        jsonwebtoken::encode(&Header::new(Algorithm::ES256), claims, &key).unwrap()
    }
}

/// A document that takes tokens of both issuers, the same as 1.0 writes it, and tokens: good ones, bad ones, and none.
fn tokens() -> (String, Vec<(&'static str, String)>, Vec<String>) {
    let (a, b) = (Signer::new(), Signer::new());
    let origins = of_origins(|triggers| {
        let one = |issuer: &str, keys: &Signer, more: &str| {
            format!("{{jwt: {{issuer: '{issuer}', jwks: '{}'{more}{triggers}}}}}", keys.jwks())
        };
        format!("{}, {}", one(ISSUERS[0], &a, ""), one(ISSUERS[1], &b, ", audiences: [cart, other]"))
    });
    let document = format!(
        "---\napiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: both, namespace: shop}}\nspec:\n  \
         jwtRules:\n  - {{issuer: '{}', jwks: '{}'}}\n  - {{issuer: '{}', jwks: '{}', audiences: [cart, other]}}\n",
        ISSUERS[0],
        a.jwks(),
        ISSUERS[1],
        b.jwks()
    );
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let of = |issuer: &str, sub: &str, more: Value| {
        let mut claims = json!({"iss": issuer, "sub": sub, "exp": now + 3600});
        claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        claims
    };
    let bearer = |t: String| format!("authorization: Bearer {t}\r\n");
    let good = [
        bearer(a.token(&of(ISSUERS[0], "front", json!({"groups": ["one"], "aud": "cart", "azp": "p1"})))),
        bearer(a.token(&of(ISSUERS[0], "ops", json!({"groups": ["two-x", "three"], "a": {"b": "c"}})))),
        bearer(a.token(&of(
            ISSUERS[0],
            "front",
            json!({"groups": ["two"], "a": {"b": ["x", "dd"]}, "aud": ["x", "cart"], "azp": "q"}),
        ))),
        bearer(b.token(&of(ISSUERS[1], "front", json!({"groups": "one", "aud": ["cart"], "azp": "p"})))),
        bearer(b.token(&of(ISSUERS[1], "ops", json!({"groups": ["four"], "aud": "other"})))),
    ];
    let bad = [
        bearer(b.token(&of(ISSUERS[1], "front", json!({"aud": "nobody"})))),
        bearer(b.token(&of(ISSUERS[0], "front", json!({"groups": ["one"]})))),
        bearer(a.token(&of("https://c.example", "front", json!({})))),
        bearer(a.token(&json!({"iss": ISSUERS[0], "sub": "front", "exp": now - 3600}))),
        bearer("a.b.c".to_owned()),
        "authorization: Basic eDp5\r\n".to_owned(),
        String::new(),
    ];
    (document, origins, good.into_iter().chain(bad).collect())
}

struct Random(u32);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 16) as usize % n
    }

    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len())]
    }

    /// One or two of these, as a list.
    fn some(&mut self, of: &[&str]) -> String {
        let first = self.one(of);
        if self.below(2) == 0 { format!("['{first}']") } else { format!("['{first}', '{}']", self.one(of)) }
    }

    fn fields(&mut self, most: usize, of: &[(&str, &[&str])]) -> String {
        let mut out: Vec<String> = Vec::new();
        for _ in 0..=self.below(most) {
            let (field, values) = of[self.below(of.len())];
            if !out.iter().any(|o| o.starts_with(&format!("{field}:"))) {
                out.push(format!("{field}: {}", self.some(values)));
            }
        }
        format!("{{{}}}", out.join(", "))
    }
}

const NAMES: [&str; 6] = [
    "cluster.local/ns/shop/sa/front",
    "*/front",
    "cluster.local/ns/shop*",
    "*",
    "*/ops",
    "elsewhere.example/*",
];
const PLACES: [&str; 4] = ["127.0.0.10", "127.7.0.0/16", "10.1.0.0/16", "127.0.0.0/8"];
const PATHS: [&str; 8] =
    ["/", "/items", "/items/7", "/items*", "*/edit", "/admin*", "/items/{*}", "/{**}/edit"];
const HOSTS: [&str; 5] = ["cart.shop", "a.example", "*.example", "cart*", "b.*"];

/// Policies that nobody would write.
fn random(r: &mut Random, about: About) -> String {
    let mut out = String::new();
    for n in 0..=r.below(2) {
        let mut rules = Vec::new();
        for _ in 0..=r.below(2) {
            let mut parts = Vec::new();
            if r.below(3) > 0 {
                let source = r.fields(
                    2,
                    &[
                        ("principals", &NAMES),
                        ("notPrincipals", &NAMES),
                        ("namespaces", &["shop", "shop*", "*", "admin"]),
                        ("notNamespaces", &["shop", "adm*"]),
                        ("ipBlocks", &PLACES),
                        ("notIpBlocks", &PLACES),
                        ("remoteIpBlocks", &PLACES),
                        ("requestPrincipals", &["https://a.example/front", "*/ops", "https://b*", "*"]),
                    ],
                );
                parts.push(format!("from: [{{source: {source}}}]"));
            }
            // What is only about requests lets no connection in, and would leave little to compare.
            if about != About::Bytes && r.below(3) > 0 {
                let operation = r.fields(
                    2,
                    &[
                        ("methods", &["GET", "P*", "DELETE"]),
                        ("notMethods", &["GET", "*E"]),
                        ("paths", &PATHS),
                        ("notPaths", &PATHS),
                        ("hosts", &HOSTS),
                        ("notHosts", &HOSTS),
                    ],
                );
                parts.push(format!("to: [{{operation: {operation}}}]"));
            }
            if r.below(3) == 0 {
                let keys: &[&str] = match about {
                    About::Tokens => &[
                        "request.auth.principal",
                        "request.auth.claims[groups]",
                        "request.auth.claims[a][b]",
                        "request.auth.audiences",
                        "source.principal",
                    ],
                    About::Bytes => &["connection.sni", "source.principal", "source.ip"],
                    About::Requests => {
                        &["request.headers[x-v]", "connection.sni", "source.principal", "source.ip"]
                    }
                };
                let key = r.one(keys);
                let pool: &[&str] = match key {
                    "request.auth.principal" => &["https://a.example/front", "*/ops", "https://b*", "*"],
                    k if k.starts_with("request.auth") => &["one", "two*", "three", "cart", "c", "*"],
                    "source.ip" => &PLACES,
                    "source.principal" => &NAMES,
                    "connection.sni" => &["cart.shop", "*.example", "*"],
                    _ => &["1", "2*", "*9", "*"],
                };
                let field = r.one(&["values", "notValues"]);
                let values = r.some(pool);
                parts.push(format!("when: [{{key: '{key}', {field}: {values}}}]"));
            }
            rules.push(format!("{{{}}}", parts.join(", ")));
        }
        let action = r.one(&["ALLOW", "ALLOW", "DENY"]);
        out += &policy(&format!("p{n}"), &format!("{{action: {action}, rules: [{}]}}", rules.join(", ")));
    }
    out
}

/// A request and who sends it.
struct Ask {
    caller: usize,
    source: &'static str,
    sni: &'static str,
    text: String,
}

fn ask(r: &mut Random, about: About, tokens: &[String]) -> Ask {
    let path = r.one(&[
        "/",
        "/items",
        "/items?x=/admin",
        "/items/7",
        "/items/8",
        "/items/7/edit",
        "/admin/a/b",
        "/Items",
        "//items",
        "/items/../admin",
        "/items/%2e%2e/admin",
        "/items%2f7",
        "/%69tems",
    ]);
    let host = r.one(&["cart.shop", "CART.shop", "cart.shop:80", "a.example", "b.example:8080"]);
    let mut text = format!(
        "{} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n",
        r.one(&["GET", "POST", "DELETE"])
    );
    for line in [
        "x-v: 1",
        "x-v: 2.1",
        "x-v: 2.9",
        "X-W: a",
        "x-forwarded-for: 10.1.1.1",
        "x-forwarded-for: 10.1.1.1, 10.2.2.2",
    ] {
        if r.below(4) == 0 {
            let _ = write!(text, "{line}\r\n");
        }
    }
    if about == About::Tokens {
        text += &tokens[r.below(tokens.len())];
    }
    text += "content-length: 0\r\n\r\n";
    if about == About::Bytes {
        text = "ping".to_owned();
    }
    Ask {
        caller: r.below(CALLERS.len()),
        source: SOURCES[r.below(2)],
        sni: ["cart.shop", "x.example"][r.below(2)],
        text,
    }
}

/// An authority and what it has issued: PEM files.
struct Issued {
    dir: PathBuf,
}

impl Issued {
    fn new(dir: &Path) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.distinguished_name.push(DnType::CommonName, "policies");
        fs::write(dir.join("root.pem"), ca.self_signed(&key).unwrap().pem()).unwrap();
        let issuer = Issuer::new(ca, key);
        let issue = |name: &str, sans: Vec<SanType>| {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::default();
            params.subject_alt_names = sans;
            fs::write(dir.join(format!("{name}.pem")), params.signed_by(&key, &issuer).unwrap().pem())
                .unwrap();
            fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
        };
        let dns = |n: &str| SanType::DnsName(n.try_into().unwrap());
        issue("server", vec![dns("cart.shop"), dns("x.example")]);
        for (n, id) in CALLERS.iter().enumerate() {
            issue(&n.to_string(), vec![SanType::URI((*id).try_into().unwrap())]);
        }
        Self { dir: dir.to_owned() }
    }

    fn path(&self, file: &str) -> String {
        self.dir.join(file).display().to_string()
    }

    fn server(&self, about: About) -> DownstreamTls {
        let trusted = Some(SecretRef::Files { chain: self.path("root.pem"), key: String::new() });
        DownstreamTls {
            certificate: SecretRef::Files { chain: self.path("server.pem"), key: self.path("server.key") },
            client_certificate: ClientCertificate::Required(Validation { trusted, sans: vec![], crl: None }),
            alpn: if about == About::Bytes { vec![] } else { vec!["http/1.1".into()] },
            min_version: TlsVersion::V1_3,
            options: Default::default(),
        }
    }

    fn client(&self, caller: usize) -> Arc<rustls::ClientConfig> {
        let chain = |f: &str| {
            CertificateDer::pem_file_iter(self.path(f)).unwrap().map(Result::unwrap).collect::<Vec<_>>()
        };
        let mut roots = rustls::RootCertStore::empty();
        roots.add(chain("root.pem").remove(0)).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder =
            rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let key = PrivateKeyDer::from_pem_file(self.path(&format!("{caller}.key"))).unwrap();
        let builder = builder.unwrap().with_root_certificates(roots);
        Arc::new(builder.with_client_auth_cert(chain(&format!("{caller}.pem")), key).unwrap())
    }
}

/// What pilot makes of documents for the workload's proxy.
fn made(documents: &str, dir: &Path, port: u16, ours: bool) -> Generated {
    let file = dir.join(format!("{port}.yaml"));
    fs::write(&file, documents).unwrap();
    let loaded = galley::load_files(&[file], &mut std::io::empty());
    let invalid: Vec<_> = loaded.validation.reports.iter().filter(|r| !r.valid).collect();
    assert!(invalid.is_empty(), "{documents}\n{invalid:#?}");
    let settings = Settings {
        cluster: ClusterId::new("west").unwrap(),
        network: NetworkId::new("west").unwrap(),
        trust_domain: TrustDomain::new("cluster.local").unwrap(),
        east_west: vec![],
        reachable: true,
        federation_address: None,
        transport: Transport::Tcp,
    };
    let source = PilotSource::new();
    let config = Reader::default().read(&loaded.documents, &ConfigState::default());
    source.update(Arc::new(World::new(settings, config)));
    let Value::Object(metadata) = json!({"NAMESPACE": "shop", "SERVICE_ACCOUNT": "cart", "FLOTILLA": ours,
        "LABELS": {"app": "cart", "tier": "back"}, "INTERCEPTION_MODE": "REDIRECT"})
    else {
        unreachable!()
    };
    let ip: IpAddr = "10.1.0.1".parse().unwrap();
    let domain = "shop.svc.cluster.local";
    let node = NodeInfo::proxy(NodeKind::Sidecar, ip, "cart", "shop", domain, metadata, Locality::default());
    source.configuration(&node).unwrap()
}

/// The same as a listener of its own: rules and the settings of requests are pilot's. Whose request passes gets an answer at
/// once; whose connection does, what it sends.
fn listener(made: &Generated, port: u16, ours: bool, tls: DownstreamTls) -> Listener {
    let inbound = &made.listeners["virtualInbound"];
    let of_port = |c: &&FilterChain| c.matches.destination_port == Some(port) && c.tls.is_some();
    let mut filters =
        inbound.filter_chains.iter().find(of_port).expect("a chain of the port").filters.clone();
    match filters.last_mut() {
        Some(NetworkFilter::Http(m)) => answering(m),
        Some(NetworkFilter::Tcp(t)) => {
            (t.clusters, t.access_log) = (vec![WeightedCluster::only(ECHO)], vec![]);
        }
        other => panic!("{other:?}"),
    }
    let chain =
        FilterChain { name: "c".into(), matches: FilterChainMatch::default(), tls: Some(tls), filters };
    Listener {
        name: format!("l{port}"),
        address: SocketAddr::new(if ours { OURS } else { ENVOYS }.parse().unwrap(), port),
        bind_to_port: true,
        use_original_dst: false,
        transparent: false,
        inspect_tls: true,
        inspect_http: false,
        proxy_protocol: false,
        filter_chains: vec![chain],
        default_filter_chain: None,
        access_log: vec![],
        udp: None,
        quic: None,
        inspect_quic: false,
        buffer_limit: None,
        max_connections: None,
        mixer: None,
        ..inbound.clone()
    }
}

/// Where connections lead that are let in.
const ECHO: &str = "echo";

fn echo(made: &Generated, port: u16, at: SocketAddr) -> Cluster {
    let mut c = made.clusters[&format!("inbound|{port}||")].clone();
    c.name = ECHO.to_owned();
    let Discovery::Static(a) = &mut c.discovery else { panic!("{c:?}") };
    a.name = ECHO.to_owned();
    let endpoint = &mut a.localities[0].endpoints[0];
    (endpoint.address, endpoint.port) = (at.ip().to_string(), at.port());
    c
}

/// Leaves what decides about requests, and answers them.
fn answering(m: &mut HttpConnectionManager) {
    m.filters.retain(|f| matches!(f, HttpFilter::Rbac(_) | HttpFilter::Jwt(_)));
    let RouteSource::Inline(made) = &m.routes else { panic!("inbound routes are part of the listener") };
    let mut routes = (**made).clone();
    for r in routes.virtual_hosts.iter_mut().flat_map(|h| &mut h.routes) {
        r.action = RouteAction::Direct(DirectResponse { status: 200, body: vec![] });
    }
    m.routes = RouteSource::Inline(Arc::new(routes));
    (m.access_log, m.tracing) = (vec![], None);
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn envoy(listeners: &[Listener], cluster: &Cluster, dir: &Path) -> Running {
    let binary = std::env::var_os("ENVOY_BIN").expect("ENVOY_BIN names an Envoy binary");
    let listeners = listeners.iter().map(|l| EnvoyListener::decode(codec::encode_listener(l).value).unwrap());
    let clusters = vec![EnvoyCluster::decode(codec::encode_cluster(cluster).value).unwrap()];
    let resources =
        StaticResources { listeners: listeners.collect(), clusters, ..StaticResources::default() };
    let bootstrap = Bootstrap { static_resources: Some(resources), ..Bootstrap::default() };
    let file = dir.join("envoy.pb");
    fs::write(&file, bootstrap.encode_to_vec()).unwrap();
    let mut c = Command::new(binary);
    c.arg("-c").arg(&file).args(["--use-dynamic-base-id", "--concurrency", "1", "-l", "error"]);
    Running(c.stdin(Stdio::null()).spawn().unwrap())
}

fn engine(listeners: Vec<Listener>, cluster: Cluster) -> Engine {
    let mut snapshot = ConfigSnapshot::default();
    snapshot.clusters.insert(cluster.name.clone(), Arc::new(cluster));
    for l in listeners {
        let decoded = codec::decode_listener(&codec::encode_listener(&l)).unwrap();
        snapshot.listeners.insert(l.name.clone(), Arc::new(decoded));
    }
    let mut registry = prometheus_client::registry::Registry::default();
    let engine =
        Engine::start(EngineOptions::default(), SecretStore::new(), &mut registry, Hooks::default()).unwrap();
    assert_eq!(engine.apply(snapshot).rejected, []);
    engine
}

/// The status of an answer, or whether the connection was let in.
async fn send(to: SocketAddr, ask: &Ask, tls: &Arc<rustls::ClientConfig>) -> String {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(SocketAddr::new(ask.source.parse().unwrap(), 0)).unwrap();
    let tcp = socket.connect(to).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    let name = ServerName::try_from(ask.sni).unwrap();
    let mut s = tokio_rustls::TlsConnector::from(Arc::clone(tls)).connect(name, tcp).await.unwrap();
    s.write_all(ask.text.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    if ask.text == "ping" {
        let read = tokio::time::timeout(Duration::from_secs(20), s.read_buf(&mut answer)).await;
        return if read.expect("an end").unwrap_or(0) == 4 { "200" } else { "403" }.to_owned();
    }
    while !answer.windows(4).any(|w| w == b"\r\n\r\n") {
        let read = tokio::time::timeout(Duration::from_secs(20), s.read_buf(&mut answer)).await;
        if read.expect("an answer").unwrap_or(0) == 0 {
            break;
        }
    }
    String::from_utf8_lossy(&answer).split(' ').nth(1).unwrap_or("none").to_owned()
}

/// Ports that are free at both addresses, below those that clients get.
fn free_ports(n: usize) -> Vec<u16> {
    let is_free = |at: &str, port| std::net::TcpListener::bind((at, port)).is_ok();
    let free = (21_000..32_000).filter(|port| is_free(OURS, *port) && is_free(ENVOYS, *port));
    free.take(n).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Envoy; cargo verify installs it"]
async fn envoy_and_the_engine_decide_alike() {
    const REQUESTS: usize = 40;
    const CONNECTIONS: usize = 16;
    // Of each of the three.
    const RANDOM: usize = 15;
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let issued = Issued::new(dir);
    let (authentication, origins, tokens) = tokens();
    let mut r = Random(7);
    let count = 2 * written(1).len() + of_tokens().len() + origins.len() + 4 * RANDOM;
    let mut ports = free_ports(count).into_iter();
    let mut port = || ports.next().expect("a free port");
    let mut sets: Vec<Set> = Vec::new();
    for about in [About::Requests, About::Bytes] {
        for n in 0..written(1).len() {
            let port = port();
            let (name, policies) = written(port).swap_remove(n);
            sets.push(Set { name: name.to_owned(), port, about, policies });
        }
    }
    for (name, policies) in of_tokens().into_iter().chain(origins) {
        sets.push(Set { name: name.to_owned(), port: port(), about: About::Tokens, policies });
    }
    for about in [About::Requests, About::Requests, About::Tokens, About::Bytes] {
        for n in 0..RANDOM {
            sets.push(Set {
                name: format!("random {n}"),
                port: port(),
                about,
                policies: random(&mut r, about),
            });
        }
    }
    let documents = |s: &Set| {
        let newer = s.about == About::Tokens && !s.policies.contains("kind: Policy\n");
        let authentication = if newer { authentication.as_str() } else { "" };
        workload(s.port, s.about) + authentication + &s.policies
    };
    let listeners = |ours: bool| -> Vec<Listener> {
        let made =
            |s: &Set| listener(&made(&documents(s), dir, s.port, ours), s.port, ours, issued.server(s.about));
        sets.iter().map(made).collect()
    };
    let server = tokio::net::TcpListener::bind("127.0.0.3:0").await.unwrap();
    let at = server.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut s, _)) = server.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = s.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    let cluster = echo(&made(&documents(&sets[0]), dir, sets[0].port, true), sets[0].port, at);
    let _envoy = envoy(&listeners(false), &cluster, dir);
    let engine = engine(listeners(true), cluster);
    let begun = Instant::now();
    for Set { port, .. } in &sets {
        while TcpStream::connect((ENVOYS, *port)).await.is_err() {
            assert!(begun.elapsed() < Duration::from_secs(30), "Envoy does not take the configuration");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    let clients: Vec<_> = (0..CALLERS.len()).map(|c| issued.client(c)).collect();
    let (mut different, mut allowed, mut denied) = (Vec::new(), 0, 0);
    let (mut both, mut refused, mut asked) = (0, 0, 0);
    for Set { name, port, about, policies } in &sets {
        let (mut yes, mut no) = (0, 0);
        for _ in 0..if *about == About::Bytes { CONNECTIONS } else { REQUESTS } {
            let ask = ask(&mut r, *about, &tokens);
            asked += 1;
            let to = |ip: &str| SocketAddr::new(ip.parse().unwrap(), *port);
            let tls = &clients[ask.caller];
            let (a, b) = tokio::join!(send(to(OURS), &ask, tls), send(to(ENVOYS), &ask, tls));
            if a != b {
                different.push(format!(
                    "{name}: {a}, Envoy {b}: {} from {} to {:?}\n{}{policies}",
                    CALLERS[ask.caller], ask.source, ask.sni, ask.text
                ));
            }
            yes += usize::from(a == "200");
            no += usize::from(a == "403");
            refused += usize::from(a == "401");
        }
        let what = match about {
            About::Requests => "",
            About::Tokens => ", with tokens",
            About::Bytes => ", of connections",
        };
        println!("   {name}{what}: {yes} allowed, {no} denied");
        both += usize::from(yes > 0 && no > 0);
        (allowed, denied) = (allowed + yes, denied + no);
    }
    drop(engine);
    assert!(different.is_empty(), "{} of {asked}:\n{}", different.len(), different.join("\n"));
    println!(
        "   {asked} in all: {allowed} allowed, {denied} denied, {refused} without a token that is valid"
    );
    assert!(
        allowed > 1000 && denied > 1000 && refused > 150 && both >= 50,
        "{allowed} {denied} {refused} {both}"
    );
}

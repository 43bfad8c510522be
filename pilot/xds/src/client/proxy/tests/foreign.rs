//! What only control planes that are not ours do: times to live, filters as resources, secrets, static neighbours.

use envoy_types::pb::{
    envoy::{
        config::{core::v3 as core, listener::v3 as l},
        extensions::filters::network::http_connection_manager::v3 as hcm,
    },
    google::protobuf as gp,
};
use prost::{Message as _, Name};

use super::*;
use crate::codec::{Secret, SecretKind};

#[derive(Default)]
struct Taken(Mutex<BTreeSet<String>>);

impl SecretSink for Taken {
    fn take(&self, secret: &Secret) -> Result<(), String> {
        if secret.name == "damaged" {
            return Err("no certificate in it".into());
        }
        self.0.lock().unwrap().insert(secret.name.clone());
        Ok(())
    }
    fn has(&self, name: &str) -> bool {
        self.0.lock().unwrap().contains(name)
    }
}

fn fixed(resources: ProxyState) -> super::super::Fixed {
    super::super::Fixed {
        resources: Arc::new(resources),
        clusters: true,
        listeners: true,
        secret_names: BTreeSet::from(["here".to_owned()]),
        secrets: Arc::new(Taken::default()),
    }
}

fn foreign(addr: SocketAddr, mode: Mode, resources: ProxyState) -> ProxyClientOptions {
    ProxyClientOptions { fixed: Some(fixed(resources)), ..options(addr, mode, None) }
}

fn any<T: Name>(m: &T) -> gp::Any {
    gp::Any { type_url: format!("type.googleapis.com/{}", T::full_name()), value: m.encode_to_vec() }
}

fn wire<T: Name>(m: &T) -> pb::Any {
    let a = any(m);
    pb::Any { type_url: a.type_url, value: a.value.into() }
}

/// The listener of the other tests, with a filter `policy` that is a resource of its own.
fn following(route: &str, default: Option<gp::Any>) -> (String, pb::Any) {
    let (name, encoded) = listener(route);
    let mut m = l::Listener::decode(encoded.value).unwrap();
    for f in m.filter_chains.iter_mut().flat_map(|c| &mut c.filters) {
        let Some(l::filter::ConfigType::TypedConfig(a)) = &mut f.config_type else { continue };
        if !a.type_url.ends_with("HttpConnectionManager") {
            continue;
        }
        let mut h = hcm::HttpConnectionManager::decode(a.value.as_slice()).unwrap();
        let source = core::ExtensionConfigSource {
            config_source: Some(core::ConfigSource {
                config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::Ads(
                    core::AggregatedConfigSource::default(),
                )),
                ..Default::default()
            }),
            type_urls: vec![RBAC.into()],
            default_config: default.clone(),
            ..Default::default()
        };
        h.http_filters.insert(
            0,
            hcm::HttpFilter {
                name: "policy".into(),
                config_type: Some(hcm::http_filter::ConfigType::ConfigDiscovery(source)),
                ..Default::default()
            },
        );
        *a = any(&h);
    }
    (name, wire(&m))
}

const RBAC: &str = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC";

fn policy(prefix: &str) -> (String, pb::Any) {
    let rbac = envoy_types::pb::envoy::extensions::filters::http::rbac::v3::Rbac {
        rules_stat_prefix: prefix.into(),
        ..Default::default()
    };
    extension(any(&rbac))
}

fn extension(content: gp::Any) -> (String, pb::Any) {
    let m = core::TypedExtensionConfig { name: "policy".into(), typed_config: Some(content) };
    ("policy".into(), wire(&m))
}

/// The statistics prefix of the first filter of the first listener, if it is a policy.
fn prefix(s: &ProxyState) -> Option<String> {
    let l = s.listeners.values().next()?;
    l.filter_chains[0].filters.iter().find_map(|f| match f {
        NetworkFilter::Http(h) => h.filters.iter().find_map(|f| match f {
            model::HttpFilter::Rbac(r) => Some(r.stat_prefix.clone()),
            _ => None,
        }),
        _ => None,
    })
}

fn world(l: (String, pb::Any)) -> Vec<(&'static str, Vec<(String, pb::Any)>)> {
    vec![
        (CDS, vec![cluster("a")]),
        (EDS, vec![endpoints("a")]),
        (LDS, vec![l]),
        (RDS, vec![route("80", "a")]),
    ]
}

#[tokio::test]
async fn a_filter_may_be_a_resource_of_its_own() {
    for mode in [Mode::Delta, Mode::Sotw] {
        let (addr, source, _, _stop) = serve().await;
        source.set(&world(following("80", None)));
        let client = ProxyClient::start(foreign(addr, mode, ProxyState::default()));
        let mut state = client.state();
        let mut health = client.health();
        until(&mut health, "connection", |h| h.synced).await;
        // Without its filter the listener is not there yet, whatever else is.
        assert!(state.borrow().listeners.is_empty(), "{mode:?}");
        source.set(&[(ECDS, vec![policy("first")])]);
        let s = until(&mut state, "the filter", |s| prefix(s).is_some()).await;
        assert_eq!(prefix(&s).as_deref(), Some("first"));
        assert!(s.routes.contains_key("80"), "{mode:?}: what the listener refers to is there with it");
        // Replaced alone, without the listener being sent again.
        source.set(&[(ECDS, vec![policy("second")])]);
        until(&mut state, "its new version", |s| prefix(s).as_deref() == Some("second")).await;
        // Of a type that the listener does not allow: refused by name, and the old one stays.
        source.set(&[(ECDS, vec![extension(any(&core::Address::default()))])]);
        let h = until(&mut health, "the refusal", |h| !h.rejected.is_empty()).await;
        assert!(h.rejected[&(ECDS.to_owned(), "policy".to_owned())].contains("type"), "{h:?}");
        assert_eq!(prefix(&state.borrow()).as_deref(), Some("second"));
    }
}

#[tokio::test]
async fn a_default_serves_until_the_filter_comes() {
    let (addr, source, _, _stop) = serve().await;
    let rbac = envoy_types::pb::envoy::extensions::filters::http::rbac::v3::Rbac {
        rules_stat_prefix: "default".into(),
        ..Default::default()
    };
    source.set(&world(following("80", Some(any(&rbac)))));
    source.set(&[(ECDS, vec![])]);
    let client = ProxyClient::start(foreign(addr, Mode::Delta, ProxyState::default()));
    let mut state = client.state();
    until(&mut state, "the default", |s| prefix(s).as_deref() == Some("default")).await;
    source.set(&[(ECDS, vec![policy("sent")])]);
    until(&mut state, "the filter", |s| prefix(s).as_deref() == Some("sent")).await;
    source.set(&[(ECDS, vec![])]);
    until(&mut state, "the default again", |s| prefix(s).as_deref() == Some("default")).await;
}

#[tokio::test]
async fn what_is_not_renewed_goes_even_when_the_server_is_gone() {
    let (addr, source, _, stop) = serve().await;
    source.set(&world(listener("80")));
    let (name, any) = cluster("brief");
    let ttl = Some(prost_types::Duration { seconds: 0, nanos: 300_000_000 });
    let brief = pb::Resource { version: "1".into(), resource: Some(any), name, ttl, ..Default::default() };
    let snapshot = source.types.read().unwrap()[CDS].clone();
    let both = snapshot.resources().map(|r| pb::Resource::clone(r)).chain([brief]);
    source.types.write().unwrap().insert(CDS.into(), Arc::new(TypeSnapshot::from_versions(both)));
    source.set(&[(EDS, vec![endpoints("a"), endpoints("brief")])]);
    let client = ProxyClient::start(foreign(addr, Mode::Delta, ProxyState::default()));
    let mut state = client.state();
    until(&mut state, "both", |s| s.clusters.len() == 2).await;
    stop.cancel();
    let s = until(&mut state, "only what holds", |s| s.clusters.len() == 1).await;
    assert!(s.clusters.contains_key("a") && !s.listeners.is_empty());
}

#[tokio::test]
async fn static_resources_stay_and_are_completed() {
    let (addr, source, _, _stop) = serve().await;
    source.set(&world(listener("80")));
    source.set(&[
        (CDS, vec![cluster("a"), cluster("static")]),
        (EDS, vec![endpoints("a"), endpoints("static")]),
    ]);
    let mut c = crate::codec::tests::cluster();
    c.name = "static".into();
    c.discovery = Discovery::Eds("static".into());
    c.connect_timeout = Duration::from_secs(77);
    let mut here = ProxyState::default();
    here.clusters.insert(c.name.clone(), Arc::new(c));
    let client = ProxyClient::start(foreign(addr, Mode::Sotw, here));
    let s = until(&mut client.state(), "state", |s| s.clusters.len() == 2 && !s.listeners.is_empty()).await;
    assert_eq!(s.clusters["static"].connect_timeout, Duration::from_secs(77));
    assert!(s.endpoints.contains_key("static"), "endpoints of a static cluster come from the server");
    let h = until(&mut client.health(), "refusal", |h| !h.rejected.is_empty()).await;
    assert!(h.rejected[&(CDS.to_owned(), "static".to_owned())].contains("bootstrap"), "{h:?}");
    // Not sent any more: it stays.
    source.set(&[(CDS, vec![cluster("b")]), (EDS, vec![endpoints("b"), endpoints("static")])]);
    let s = until(&mut client.state(), "b", |s| s.clusters.contains_key("b")).await;
    assert!(s.clusters.contains_key("static") && !s.clusters.contains_key("a"));
}

#[tokio::test]
async fn secrets_are_fetched_by_name_before_who_needs_them_serves() {
    let (addr, source, _, _stop) = serve().await;
    let (name, encoded) = listener("80");
    let mut m = codec::decode_listener(&encoded).unwrap();
    m.filter_chains[0].tls = Some(model::DownstreamTls {
        certificate: model::SecretRef::Sds("cert".into()),
        client_certificate: model::ClientCertificate::Optional(model::Validation {
            trusted: Some(model::SecretRef::Sds("here".into())),
            sans: vec![],
            crl: None,
        }),
        alpn: vec![],
        min_version: model::TlsVersion::V1_3,
        options: model::TlsServerOptions::default(),
    });
    source.set(&world((name, codec::encode_listener(&m))));
    let client = ProxyClient::start(foreign(addr, Mode::Delta, ProxyState::default()));
    let mut state = client.state();
    until(&mut client.health(), "connection", |h| h.synced).await;
    assert!(state.borrow().listeners.is_empty());
    let secret = Secret { name: "cert".into(), kind: SecretKind::Roots(b"PEM".to_vec()) };
    source.set(&[(SDS, vec![("cert".into(), codec::encode_secret(&secret))])]);
    until(&mut state, "the listener", |s| !s.listeners.is_empty()).await;
}

use serde_json::json;

use super::*;

#[test]
fn versions_of_a_group_are_one_kind() {
    for v in ["v1", "v1beta1", "v1alpha3"] {
        assert_eq!(
            Kind::resolve(&format!("networking.istio.io/{v}"), "VirtualService"),
            Some(Kind::VirtualService)
        );
    }
    assert_eq!(Kind::resolve("v1", "Service").map(Kind::type_url), Some("core/v1/Service"));
    assert_eq!(Kind::resolve("networking.istio.io/v2", "VirtualService"), None);
    assert_eq!(Kind::resolve("networking.istio.io/v1", "Service"), None);
    for k in Kind::ALL {
        assert_eq!(Kind::from_type_url(k.type_url()), Some(*k));
        assert_eq!(Kind::resolve(&k.api_version(), k.name()), Some(*k));
    }
}

#[test]
fn specs_survive_the_wire() {
    let json = json!({
        "hosts": ["reviews"],
        "http": [{
            "match": [{"headers": {"end-user": {"exact": "jason"}, "x-any": {}}, "uri": {"prefix": "/a"}}],
            "route": [{"destination": {"host": "reviews", "subset": "v2", "port": {"number": 9080}}, "weight": 90}],
            "timeout": "1.5s", "retries": {"attempts": 3, "perTryTimeout": "2s"},
            "fault": {"delay": {"fixedDelay": "7s", "percentage": {"value": 0.5}}}
        }]
    });
    let spec = Spec::from_json(Kind::VirtualService, json).unwrap();
    let Spec::VirtualService(vs) = &spec else { panic!("{spec:?}") };
    assert_eq!(vs.http[0].timeout, Some("1500ms".parse().unwrap()));
    assert_eq!(vs.http[0].matches[0].headers["x-any"], StringMatch::Present);
    let again = Spec::from_json(Kind::VirtualService, spec.to_json()).unwrap();
    assert_eq!(again, spec);
}

#[test]
fn what_matters_of_an_empty_rule_survives_the_wire() {
    let spec = Spec::from_json(Kind::AuthorizationPolicy, json!({"rules": [{}], "selector": null})).unwrap();
    let Spec::AuthorizationPolicy(p) = Spec::from_json(Kind::AuthorizationPolicy, spec.to_json()).unwrap()
    else {
        panic!()
    };
    assert_eq!(p.rules, vec![AuthorizationRule::default()]);
    assert_eq!(p.selector, None);
}

#[test]
fn unknown_fields_are_refused_except_in_core_services() {
    let e = Spec::from_json(Kind::VirtualService, json!({"hosts": ["a"], "htp": []})).unwrap_err();
    assert!(e.to_string().contains("unknown field `htp`"), "{e}");
    let s = Spec::from_json(
        Kind::Service,
        json!({"ports": [{"port": 80, "targetPort": "web"}], "ipFamilies": ["IPv4"]}),
    );
    let Ok(Spec::Service(s)) = s else { panic!("{s:?}") };
    assert_eq!(s.ports[0].target_port, Some(IntOrString::String("web".into())));
}

#[test]
fn defaults_of_every_kind_round_trip() {
    for k in Kind::ALL {
        let spec = Spec::from_json(*k, serde_json::Value::Null).unwrap_or_else(|e| panic!("{k:?}: {e}"));
        assert_eq!(spec.kind(), *k);
        assert_eq!(Spec::from_json(*k, spec.to_json()).unwrap(), spec);
    }
}

#[test]
fn durations() {
    for (text, millis) in [
        ("1s", 1000),
        ("1.5s", 1500),
        ("250ms", 250),
        ("1h2m3.5s", 3_723_500),
        ("0s", 0),
        ("0", 0),
        (".5s", 500),
    ] {
        let d: Duration = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
        assert_eq!(d.0.as_millis(), millis, "{text}");
        assert_eq!(d.to_string().parse::<Duration>().unwrap(), d);
    }
    for bad in ["", "5", "1", "-1s", "1x", "s", "1s1", "1 s", ".s", "9999999999999999h", "1.0000000001s", "∞"]
    {
        assert!(bad.parse::<Duration>().is_err(), "{bad:?} was accepted");
    }
}

#[test]
fn secrets_do_not_leak_through_debug_or_redaction() {
    let s =
        Secret { string_data: [("tls.key".to_owned(), "hunter2".to_owned())].into(), ..Default::default() };
    let spec = Spec::Secret(Arc::new(s.clone()));
    assert!(!format!("{spec:?}").contains("hunter2"));
    assert!(!serde_json::to_string(&s.redacted()).unwrap().contains("hunter2"));
    assert!(spec.to_json().to_string().contains("hunter2"), "components need the value");
}

#[test]
fn only_one_string_condition() {
    assert!(serde_json::from_value::<StringMatch>(json!({"exact": "a", "prefix": "b"})).is_err());
    assert!(serde_json::from_value::<StringMatch>(json!({"suffix": "b"})).is_err());
}

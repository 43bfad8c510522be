use super::*;
use model::{Permission as Pm, Principal as Pr, RbacAction, StringMatch};

fn facts<'a>(principals: &'a [String], request: Option<&'a RequestHead>) -> Facts<'a> {
    Facts {
        local: "10.0.0.1:9080".parse().unwrap(),
        peer: "10.0.0.2".parse().unwrap(),
        remote: "1.2.3.4".parse().unwrap(),
        sni: Some("outbound_.9080_._.a"),
        principals,
        authenticated: !principals.is_empty(),
        cluster: Some("east"),
        request,
        metadata: None,
    }
}

fn rbac(action: RbacAction, permissions: Vec<Pm>, principals: Vec<Pr>) -> Rbac {
    let policy = model::RbacPolicy { permissions, principals };
    Rbac::new(&model::Rbac {
        rules: Some(model::RbacRules {
            action,
            policies: [("ns[a]-policy[p]-rule[0]".into(), policy)].into(),
        }),
        ..model::Rbac::default()
    })
    .unwrap()
}

#[test]
fn principals_and_places() {
    let me = ["spiffe://mesh.local/ns/a/sa/b".to_owned()];
    let ok = |pm, pr, principals: &[String]| {
        rbac(RbacAction::Allow, vec![pm], vec![pr]).check(&facts(principals, None)).is_ok()
    };
    assert!(ok(Pm::Any, Pr::Authenticated(None), &me));
    assert!(!ok(Pm::Any, Pr::Authenticated(None), &[]));
    assert!(ok(Pm::Any, Pr::Authenticated(Some(StringMatch::exact(me[0].clone()))), &me));
    assert!(!ok(Pm::Any, Pr::Authenticated(Some(StringMatch::exact("spiffe://mesh.local/ns/a/sa/c"))), &me));
    assert!(ok(Pm::DestinationPort(9080), Pr::SourceCluster(StringMatch::exact("east")), &[]));
    assert!(!ok(Pm::DestinationPort(9081), Pr::Any, &[]));
    assert!(ok(
        Pm::DestinationIp("10.0.0.0/8".parse().unwrap()),
        Pr::DirectRemoteIp("10.0.0.2/32".parse().unwrap()),
        &[]
    ));
    assert!(ok(Pm::Any, Pr::RemoteIp("1.2.3.0/24".parse().unwrap()), &[]));
    assert!(ok(
        Pm::ServerName(StringMatch::prefix("outbound_")),
        Pr::Not(Box::new(Pr::RemoteIp("9.9.9.9/32".parse().unwrap()))),
        &[]
    ));
    assert!(ok(Pm::Not(Box::new(Pm::DestinationPort(1))), Pr::Any, &[]));
}

#[test]
fn request_conditions_are_unknown_on_tcp() {
    let path = || Pm::Path(StringMatch::prefix("/admin"));
    let denied = |r: Rbac| r.check(&facts(&[], None)).is_err();
    // An ALLOW rule with such a condition allows nothing, negated or not; a DENY rule denies.
    assert!(denied(rbac(RbacAction::Allow, vec![path()], vec![Pr::Any])));
    assert!(denied(rbac(RbacAction::Allow, vec![Pm::Not(Box::new(path()))], vec![Pr::Any])));
    assert!(denied(rbac(RbacAction::Deny, vec![path()], vec![Pr::Any])));
    assert!(denied(rbac(RbacAction::Deny, vec![Pm::Not(Box::new(path()))], vec![Pr::Any])));
    assert!(!denied(rbac(
        RbacAction::Deny,
        vec![Pm::And(vec![path(), Pm::DestinationPort(1)])],
        vec![Pr::Any]
    )));
}

#[test]
fn denial_names_the_policy_and_empty_rules() {
    let r = rbac(RbacAction::Deny, vec![Pm::Any], vec![Pr::Any]);
    assert_eq!(
        r.check(&facts(&[], None)).unwrap_err(),
        "rbac_access_denied_matched_policy[ns[a]-policy[p]-rule[0]]"
    );
    let allow_nothing = Rbac::new(&model::Rbac {
        rules: Some(model::RbacRules { action: RbacAction::Allow, policies: Default::default() }),
        ..model::Rbac::default()
    })
    .unwrap();
    assert_eq!(
        allow_nothing.check(&facts(&[], None)).unwrap_err(),
        "rbac_access_denied_matched_policy[none]"
    );
    assert!(Rbac::new(&model::Rbac::default()).unwrap().check(&facts(&[], None)).is_ok());
    let mut deep = Pm::Any;
    for _ in 0..100 {
        deep = Pm::Not(Box::new(deep));
    }
    assert_eq!(Cond::permission(&deep, 0).unwrap_err(), RbacError::TooDeep);
}

fn request(path: &str) -> RequestHead {
    RequestHead {
        method: http::Method::GET,
        version: crate::http::message::Version::Http11,
        https: false,
        authority: "a".into(),
        path: path.into(),
        headers: Default::default(),
        body: crate::http::message::BodyKind::Empty,
        upgrade: None,
        expect_continue: false,
    }
}

/// Who is denied for a value is denied for it among others, in lines of their own.
#[test]
fn each_line_of_a_header_is_a_value() {
    let header = |value: StringMatch, invert| {
        Pm::Header(model::HeaderMatch {
            name: "X-V".into(),
            value: model::HeaderValueMatch::Value(value),
            invert,
            missing_is_empty: invert,
        })
    };
    let with = |values: &[&str]| {
        let mut r = request("/");
        values.iter().for_each(|v| r.headers.push(b"x-v", v.as_bytes()));
        r
    };
    let deny = rbac(RbacAction::Deny, vec![header(StringMatch::exact("bad"), false)], vec![Pr::Any]);
    let not = rbac(
        RbacAction::Deny,
        vec![Pm::Not(Box::new(header(StringMatch::exact("good"), false)))],
        vec![Pr::Any],
    );
    let inverted = rbac(RbacAction::Deny, vec![header(StringMatch::exact("good"), true)], vec![Pr::Any]);
    for (values, bad, no_good) in [
        (&[][..], false, true),
        (&["bad"], true, true),
        (&["good"], false, false),
        (&["good", "bad"], true, false),
        (&["bad", "good"], true, false),
        (&["good,bad"], false, true),
    ] {
        let r = with(values);
        for (rules, wanted) in [(&deny, bad), (&not, no_good), (&inverted, no_good)] {
            assert_eq!(rules.check(&facts(&[], Some(&r))).is_err(), wanted, "{values:?}");
        }
    }
}

mod indexed {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn identity() -> impl Strategy<Value = StringMatch> {
        let name = prop::sample::select(vec!["a", "b", "c"]);
        (0..8u8, name.clone(), name).prop_map(|(kind, ns, sa)| {
            let full = format!("spiffe://d/ns/{ns}/sa/{sa}");
            match kind {
                0..=2 => StringMatch::exact(full),
                3 => StringMatch::regex(format!("spiffe://[^/]+/ns/{ns}/.*")),
                4 => StringMatch::regex(format!("spiffe://[^/]+/ns/{ns}/sa/{sa}")),
                5 => StringMatch::prefix(format!("spiffe://d/ns/{ns}/")),
                6 => StringMatch { ignore_case: true, ..StringMatch::exact(full.to_uppercase()) },
                _ => StringMatch::suffix(format!("/{sa}")),
            }
        })
    }

    fn path() -> impl Strategy<Value = StringMatch> {
        let text = prop::sample::select(vec!["/", "/a", "/a/b", "/b", "/a/b/c"]);
        (0..4u8, text).prop_map(|(kind, s)| match kind {
            0 => StringMatch::exact(s),
            1 => StringMatch::prefix(s),
            2 => StringMatch::suffix(s),
            _ => StringMatch { ignore_case: true, ..StringMatch::prefix(s) },
        })
    }

    fn permission() -> impl Strategy<Value = Pm> {
        let leaf = prop_oneof![
            4 => path().prop_map(Pm::Path),
            1 => Just(Pm::Any),
            1 => prop::sample::select(vec![9080u16, 1]).prop_map(Pm::DestinationPort),
        ];
        leaf.prop_recursive(3, 12, 4, |inner| {
            prop_oneof![
                vec(inner.clone(), 0..4).prop_map(Pm::And),
                vec(inner.clone(), 0..4).prop_map(Pm::Or),
                inner.prop_map(|p| Pm::Not(Box::new(p))),
            ]
        })
    }

    fn principal() -> impl Strategy<Value = Pr> {
        let leaf = prop_oneof![
            4 => identity().prop_map(|m| Pr::Authenticated(Some(m))),
            1 => Just(Pr::Authenticated(None)),
            1 => Just(Pr::Any),
            1 => path().prop_map(Pr::Path),
        ];
        leaf.prop_recursive(3, 12, 4, |inner| {
            prop_oneof![
                vec(inner.clone(), 0..4).prop_map(Pr::And),
                vec(inner.clone(), 0..12).prop_map(Pr::Or),
                inner.prop_map(|p| Pr::Not(Box::new(p))),
            ]
        })
    }

    proptest! {
        /// The index changes nothing about who gets in and which policy is named.
        #[test]
        fn decides_like_a_linear_search(
            policies in vec((vec(permission(), 1..3), vec(principal(), 1..3)), 0..30),
            deny in prop::bool::ANY,
            who in vec(prop::sample::select(vec!["a/sa/a", "b/sa/c", "c/sa/b", "a/sa/b"]), 0..2),
            at in prop::sample::select(vec![None, Some("/"), Some("/a"), Some("/a/b?q"), Some("/A/b"), Some("/b/c")]),
        ) {
            let policies = policies
                .into_iter()
                .enumerate()
                .map(|(i, (permissions, principals))| (format!("p{i:02}"), model::RbacPolicy { permissions, principals }))
                .collect();
            let action = if deny { RbacAction::Deny } else { RbacAction::Allow };
            let indexed = Rules::new(&model::RbacRules { action, policies }).unwrap();
            let who: Vec<String> = who.iter().map(|w| format!("spiffe://d/ns/{w}")).collect();
            let head = at.map(request);
            let f = facts(&who, head.as_ref());
            let got = indexed.check(&f).map_err(str::to_owned);
            let linear = Rules { index: None, ..indexed };
            prop_assert_eq!(got, linear.check(&f).map_err(str::to_owned));
        }
    }
}

#[test]
fn a_thousand_policies_are_not_searched() {
    let policies = (0..1000)
        .map(|i| {
            let who = StringMatch::exact(format!("spiffe://d/ns/a/sa/s{i}"));
            let what =
                Pm::And(vec![Pm::Path(StringMatch::prefix(format!("/p{i}/"))), Pm::DestinationPort(9080)]);
            (
                format!("p{i:04}"),
                model::RbacPolicy { permissions: vec![what], principals: vec![Pr::Authenticated(Some(who))] },
            )
        })
        .collect();
    let rules = Rules::new(&model::RbacRules { action: RbacAction::Allow, policies }).unwrap();
    let index = rules.index.as_ref().expect("indexed");
    let me = ["spiffe://d/ns/a/sa/s777".to_owned()];
    let (right, wrong) = (request("/p777/x"), request("/p778/x"));
    let mut looked_at = 0;
    assert_eq!(
        index.first(&facts(&me, Some(&right)), |_| {
            looked_at += 1;
            true
        }),
        Some(777)
    );
    assert_eq!(looked_at, 1);
    assert!(rules.check(&facts(&me, Some(&right))).is_ok());
    assert_eq!(rules.check(&facts(&me, Some(&wrong))), Err("none"));
    // One policy with a thousand principals is a set.
    let all = (0..1000).map(|i| Pr::Authenticated(Some(StringMatch::exact(format!("s{i}"))))).collect();
    let Cond::Or(l) = Cond::principal(&Pr::Or(all), 0).unwrap() else { panic!() };
    assert!(matches!(l.as_slice(), [Cond::Principals(s)] if s.len() == 1000));
}

#[test]
fn a_rule_that_only_logs_marks_and_decides_nothing() {
    let log = |port| rbac(RbacAction::Log, vec![Pm::DestinationPort(port)], vec![Pr::Any]);
    let f = facts(&[], None);
    assert_eq!((log(9080).audits(&f), log(9081).audits(&f)), (Some(true), Some(false)));
    assert!(log(9080).check(&f).is_ok() && log(9081).check(&f).is_ok());
    // Of others there is nothing to be told.
    assert_eq!(rbac(RbacAction::Deny, vec![Pm::Any], vec![Pr::Any]).audits(&f), None);
    assert_eq!(rbac(RbacAction::Allow, vec![Pm::Any], vec![Pr::Any]).audits(&f), None);
}

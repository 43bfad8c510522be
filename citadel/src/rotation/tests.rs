use super::*;

const NEW: &str = "new";

fn member(cluster: &str) -> Report {
    Report {
        cluster: cluster.into(),
        age: Some(Duration::from_secs(1)),
        sequence: 2,
        root: NEW.into(),
        proxies: 3,
        trusting: 3,
        renewed: 3,
        ..Report::default()
    }
}

fn why(phase: Phase, step: Step, change: impl Fn(&mut Report)) -> String {
    let mut m = member("east");
    change(&mut m);
    match decide(phase, step, 2, NEW, &[member("west"), m]) {
        Verdict::Go => "go".into(),
        Verdict::Blocked(b) => {
            assert_eq!(b.len(), 1, "west blocks nothing: {b:?}");
            assert_eq!(b[0].cluster, "east");
            b[0].why.clone()
        }
        other => format!("{other:?}"),
    }
}

#[test]
fn every_step_in_every_phase() {
    use Phase::{Activated, Prepared, Steady};
    use Step::{Abort, Activate, Finish, Prepare};
    let all = [member("west")];
    let of = |phase, step| match decide(phase, step, 2, NEW, &all) {
        Verdict::Go => "go",
        Verdict::Done(_) => "done",
        Verdict::Wrong(_) => "wrong",
        Verdict::Blocked(_) => "blocked",
    };
    for (step, expected) in [
        (Prepare, ["go", "done", "wrong"]),
        (Activate, ["wrong", "go", "done"]),
        (Finish, ["done", "wrong", "go"]),
        (Abort, ["done", "go", "wrong"]),
    ] {
        assert_eq!([Steady, Prepared, Activated].map(|p| of(p, step)), expected, "{step:?}");
    }
}

#[test]
fn activation_waits_for_every_acknowledgement() {
    let why = |f: fn(&mut Report)| why(Phase::Prepared, Step::Activate, f);
    assert_eq!(why(|_| {}), "go");
    assert_eq!(why(|m| m.root = "old".into()), "go", "what signs now does not matter yet");
    assert_eq!(why(|m| m.renewed = 0), "go");
    assert_eq!(why(|m| m.sequence = 1), "holds sequence 1, not 2");
    assert_eq!(why(|m| m.sequence = 3), "holds sequence 3, not 2");
    assert_eq!(
        why(|m| {
            m.trusting = 1;
            m.late = vec!["a.books".into()];
        }),
        "2 of 3 proxies not yet (a.books)"
    );
    assert!(why(|m| m.age = None).contains("has not reported"));
    assert_eq!(why(|m| m.age = Some(FRESH + Duration::from_secs(1))), "unreachable: last heard 11 s ago");
    assert_eq!(why(|m| m.age = Some(FRESH)), "go");
    assert_eq!(why(|m| m.error = "pilot does not answer".into()), "pilot does not answer");
}

#[test]
fn the_end_waits_for_every_certificate() {
    let why = |f: fn(&mut Report)| why(Phase::Activated, Step::Finish, f);
    assert_eq!(why(|_| {}), "go");
    assert_eq!(why(|m| m.root = "old".into()), "its intermediate is under the old root");
    assert!(why(|m| m.renewed = 2).starts_with("1 of 3 proxies have no certificate under the new root"));
    assert_eq!(why(|m| m.sequence = 1), "holds sequence 1, not 2");
    assert!(why(|m| m.age = None).contains("has not reported"));
}

#[test]
fn all_who_block_are_named() {
    let mut all = vec![member("west"), member("east"), member("north")];
    all[1].sequence = 1;
    all[2].age = None;
    let Verdict::Blocked(b) = decide(Phase::Prepared, Step::Activate, 2, NEW, &all) else {
        panic!("two are not there yet")
    };
    assert_eq!(b.iter().map(|b| b.cluster.as_str()).collect::<Vec<_>>(), ["east", "north"]);
}

#[test]
fn words_are_read_as_they_are_written() {
    for p in [Phase::Steady, Phase::Prepared, Phase::Activated] {
        assert_eq!(p.to_string().parse::<Phase>().unwrap(), p);
    }
    assert!("".parse::<Phase>().is_err());
    assert!("Prepare".parse::<Step>().is_err());
}

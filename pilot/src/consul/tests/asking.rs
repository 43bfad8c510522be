//! What is asked, when, and what an answer changes.

use super::{
    super::watches::{Answered, Ask, Query, WAIT, Watches},
    *,
};

struct Bed {
    watches: Watches,
    now: Instant,
}

fn instances(id: &str) -> Answered {
    (vec![Instance { id: id.to_owned(), ..Instance::default() }], vec![])
}

fn names(all: &[&str]) -> BTreeSet<String> {
    all.iter().map(|n| (*n).to_owned()).collect()
}

impl Bed {
    fn new(lanes: usize) -> Self {
        let now = Instant::now();
        Self { watches: Watches::new(lanes, BTreeMap::new(), now), now }
    }

    fn pass(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
    }

    fn next(&mut self) -> Option<Ask> {
        self.watches.next(self.now)
    }

    /// Asks for the list and answers with these.
    fn list(&mut self, index: u64, all: &[&str]) -> Changed {
        let ask = self.next().unwrap();
        assert_eq!(ask.query, Query::Catalog);
        self.watches.listed(&ask, index, &names(all), self.now)
    }

    /// Everything that can be asked now, by name, with index.
    fn asks(&mut self) -> Vec<Ask> {
        std::iter::from_fn(|| self.next()).collect()
    }

    fn service(&mut self, name: &str) -> Ask {
        let all = self.asks();
        let found = all.iter().find(|a| a.query == Query::Service(name.to_owned()));
        found.unwrap_or_else(|| panic!("{name} is not asked for: {all:?}")).clone()
    }
}

#[test]
fn first_the_list_then_each_service_then_waiting() {
    let mut b = Bed::new(10);
    assert!(!b.watches.is_up());
    let ask = b.next().unwrap();
    assert_eq!((&ask.query, ask.index), (&Query::Catalog, 0));
    assert!(b.next().is_none(), "nothing is known of services yet");
    b.watches.listed(&ask, 7, &names(&["a", "b"]), b.now);
    assert!(b.watches.is_up() && !b.watches.is_synced());
    let asks = b.asks();
    assert_eq!(asks.iter().map(|a| a.index).collect::<Vec<_>>(), [0, 0]);
    for a in &asks {
        let changed = b.watches.told(a, 7, instances("1"), b.now);
        assert_eq!(changed.services.len(), 1);
    }
    assert!(b.watches.is_synced());
    assert!(b.next().is_none(), "not again so soon");
    b.pass(201);
    let asks = b.asks();
    assert_eq!(asks.len(), 3, "{asks:?}");
    assert!(asks.iter().all(|a| a.index == 7 && a.wait == WAIT), "{asks:?}");
    assert!(b.watches.wake().is_none(), "all of them wait");
}

#[test]
fn an_answer_changes_what_is_different() {
    let mut b = Bed::new(10);
    b.list(1, &["a"]);
    let a = b.service("a");
    b.watches.told(&a, 1, instances("1"), b.now);
    b.pass(201);
    let a = b.service("a");
    b.pass(30_000);
    let same = b.watches.told(&a, 2, instances("1"), b.now);
    assert_eq!(same, Changed::default());
    let a = b.service("a");
    let other = b.watches.told(&a, 3, instances("2"), b.now);
    assert_eq!(other.services, names(&["a"]));
    assert_eq!(b.watches.of("a"), Some(&instances("2")));
}

#[test]
fn an_index_that_went_back_is_forgotten() {
    let mut b = Bed::new(10);
    b.list(1, &["a"]);
    let a = b.service("a");
    b.watches.told(&a, 50, instances("1"), b.now);
    b.pass(201);
    let a = b.service("a");
    assert_eq!(a.index, 50);
    b.watches.told(&a, 20, instances("1"), b.now);
    b.pass(201);
    let a = b.service("a");
    assert_eq!(a.index, 0, "it is read anew");
    b.watches.told(&a, 0, instances("1"), b.now);
    b.pass(1000);
    assert_eq!(b.service("a").index, 1, "none counts as one");
}

#[test]
fn early_answers_without_news_slow_down() {
    let mut b = Bed::new(10);
    b.list(1, &["a"]);
    let mut asked = 0;
    let begun = b.now;
    while b.now < begun + Duration::from_secs(60) {
        for a in b.asks().iter().filter(|a| a.query != Query::Catalog) {
            asked += 1;
            // An agent without indices answers everything at once.
            b.watches.told(a, 0, instances("1"), b.now);
        }
        b.pass(50);
    }
    assert!((12..25).contains(&asked), "{asked}");
}

#[test]
fn news_are_limited_to_five_a_second() {
    let mut b = Bed::new(10);
    b.list(1, &["a"]);
    let (mut asked, begun) = (0_u64, b.now);
    while b.now < begun + Duration::from_secs(10) {
        for a in b.asks().iter().filter(|a| a.query != Query::Catalog) {
            asked += 1;
            b.watches.told(a, asked, instances(&asked.to_string()), b.now);
        }
        b.pass(10);
    }
    assert!((45..=51).contains(&asked), "{asked}");
}

#[test]
fn while_the_agent_is_away_one_query_looks_for_it() {
    let mut b = Bed::new(10);
    b.list(9, &["a", "b"]);
    for a in b.asks() {
        b.watches.told(&a, 9, instances("1"), b.now);
    }
    b.pass(201);
    let asks = b.asks();
    assert_eq!(asks.len(), 3);
    for a in &asks {
        b.watches.failed(a, b.now, 1.0);
    }
    assert!(!b.watches.is_up());
    let (mut pauses, mut last) = (vec![], b.now);
    while pauses.len() < 8 {
        b.pass(10);
        let asks = b.asks();
        assert!(asks.iter().all(|a| a.query == Query::Catalog && a.index == 0), "{asks:?}");
        for a in &asks {
            pauses.push((b.now - last).as_millis());
            last = b.now;
            b.watches.failed(a, b.now, 1.0);
        }
    }
    assert_eq!(pauses, [500, 1000, 2000, 4000, 8000, 15_000, 15_000, 15_000]);
    assert_eq!(b.watches.all().count(), 2, "what was known stays");
    // It is back, with an index that counts from the start, and has lost one service.
    b.pass(15_000);
    let changed = b.list(2, &["a"]);
    assert_eq!(changed.gone, names(&["b"]));
    assert!(b.watches.is_up());
    let a = b.service("a");
    assert_eq!(a.index, 0, "at once, and without waiting for an index of before");
    b.watches.told(&a, 2, instances("1"), b.now);
    assert!(b.watches.is_synced());
}

#[test]
fn pauses_after_failures_are_jittered() {
    let pause = |jitter: f64| {
        let mut b = Bed::new(1);
        let a = b.next().unwrap();
        b.watches.failed(&a, b.now, jitter);
        b.watches.wake().unwrap() - b.now
    };
    assert_eq!(pause(0.0), Duration::from_millis(250));
    assert_eq!(pause(1.0), Duration::from_millis(500));
    assert_eq!(pause(f64::MAX), Duration::from_millis(500));
}

#[test]
fn one_service_that_fails_holds_nobody_up() {
    let mut b = Bed::new(10);
    b.list(1, &["a", "b"]);
    let asks = b.asks();
    b.watches.told(&asks[0], 1, instances("1"), b.now);
    assert!(!b.watches.is_synced());
    b.watches.failed(&asks[1], b.now, 1.0);
    assert!(b.watches.is_synced() && b.watches.is_up());
    assert_eq!(b.watches.counts(), (2, 0, 1));
    b.pass(500);
    let again = b.service("b");
    assert_eq!(b.watches.told(&again, 1, instances("1"), b.now).services, names(&["b"]));
    assert_eq!(b.watches.counts().2, 0);
}

#[test]
fn more_services_than_lanes_take_turns() {
    let all: Vec<String> = (0..50).map(|i| format!("s{i:02}")).collect();
    let mut b = Bed::new(10);
    b.list(1, &all.iter().map(String::as_str).collect::<Vec<_>>());
    let mut open: Vec<(Ask, Instant)> = vec![];
    let mut last: BTreeMap<String, Vec<Instant>> = BTreeMap::new();
    let begun = b.now;
    while b.now < begun + Duration::from_secs(30) {
        for a in b.asks() {
            let Query::Service(name) = &a.query else { continue };
            last.entry(name.clone()).or_default().push(b.now);
            let wait = if a.index == 0 { Duration::ZERO } else { a.wait };
            open.push((a, b.now + wait));
        }
        assert!(open.len() <= 10, "{}", open.len());
        let (done, still): (Vec<_>, Vec<_>) = open.into_iter().partition(|(_, until)| *until <= b.now);
        open = still;
        for (a, _) in done {
            b.watches.told(&a, 1, instances("1"), b.now);
        }
        b.pass(20);
    }
    assert_eq!(last.len(), 50, "nobody is left out");
    for (name, times) in &last {
        let longest = times.windows(2).map(|w| w[1] - w[0]).max().unwrap();
        assert!(longest < Duration::from_secs(7), "{name}: {longest:?}");
        assert!(times.len() < 10, "{name} is polled: {}", times.len());
    }
}

#[test]
fn a_service_that_goes_and_comes_while_it_is_asked_for() {
    let mut b = Bed::new(10);
    b.list(1, &["a"]);
    let old = b.service("a");
    b.pass(201);
    assert_eq!(b.list(2, &[]).gone, names(&["a"]));
    b.pass(201);
    b.list(3, &["a"]);
    let new = b.service("a");
    assert_eq!(b.watches.counts().1, 2, "the old question is still open");
    b.watches.told(&old, 2, instances("old"), b.now);
    b.watches.told(&new, 3, instances("new"), b.now);
    assert_eq!(b.watches.of("a"), Some(&instances("new")));
    assert_eq!(b.watches.counts().1, 0);
    b.pass(1000);
    assert_eq!(b.asks().iter().filter(|a| a.query != Query::Catalog).count(), 1, "asked for once");
}

#[test]
fn what_was_kept_is_known_before_the_agent_answers() {
    let now = Instant::now();
    let kept = BTreeMap::from([("a".to_owned(), instances("1").0), ("gone".to_owned(), instances("2").0)]);
    let mut b = Bed { watches: Watches::new(10, kept, now), now };
    assert_eq!(b.watches.all().count(), 2);
    assert!(!b.watches.is_synced());
    assert_eq!(b.list(1, &["a"]).gone, names(&["gone"]));
    let a = b.service("a");
    assert_eq!(b.watches.told(&a, 1, instances("1"), b.now), Changed::default(), "no news");
    assert!(b.watches.is_synced());
}

/// Runs a bed of 50 services on 10 lanes, in which node `n` has `s07` and `s08`, until everyone has had some turns.
fn in_turns() -> (Bed, Vec<(Ask, Instant)>) {
    let all: Vec<String> = (0..50).map(|i| format!("s{i:02}")).collect();
    let mut b = Bed::new(10);
    b.list(1, &all.iter().map(String::as_str).collect::<Vec<_>>());
    let mut open = vec![];
    for _ in 0..400 {
        turn(&mut b, &mut open);
    }
    (b, open)
}

/// Twenty milliseconds; answers with the services that were asked for.
fn turn(b: &mut Bed, open: &mut Vec<(Ask, Instant)>) -> Vec<String> {
    let mut asked = vec![];
    for a in b.asks() {
        let wait = if a.index == 0 { Duration::ZERO } else { a.wait };
        if let Query::Service(name) = &a.query {
            asked.push(name.clone());
        }
        open.push((a, b.now + wait));
    }
    let (done, still): (Vec<_>, Vec<_>) = std::mem::take(open).into_iter().partition(|(_, t)| *t <= b.now);
    *open = still;
    for (a, _) in done {
        match &a.query {
            Query::Catalog => b.watches.failed(&a, b.now, 0.0),
            Query::Critical => b.watches.critical(&a, 1, BTreeSet::new(), b.now),
            Query::Service(name) => {
                let node = if name == "s07" || name == "s08" { "n" } else { "m" };
                let one = Instance { node: node.to_owned(), ..Instance::default() };
                drop(b.watches.told(&a, 1, (vec![one], vec![]), b.now));
            }
        }
    }
    b.pass(20);
    asked
}

#[test]
fn who_becomes_critical_is_next() {
    for (service, node, expected) in
        [("s31", "m", &["s31"][..]), ("", "n", &["s07", "s08"]), ("none", "n", &[])]
    {
        let (mut b, mut open) = in_turns();
        let critical =
            open.iter().position(|(a, _)| a.query == Query::Critical).expect("one query waits for it");
        let (ask, _) = open.remove(critical);
        // Those that wait themselves are told by their own queries.
        let waiting: BTreeSet<String> = open
            .iter()
            .filter_map(|(a, _)| match &a.query {
                Query::Service(n) => Some(n.clone()),
                _ => None,
            })
            .collect();
        b.watches.critical(&ask, 2, BTreeSet::from([(service.to_owned(), node.to_owned())]), b.now);
        let mut next = vec![];
        while next.len() < 5 {
            next.extend(turn(&mut b, &mut open));
        }
        let expected: Vec<&str> = expected.iter().copied().filter(|n| !waiting.contains(*n)).collect();
        assert_eq!(next[..expected.len()], expected, "{service} {node}: {next:?} while {waiting:?} wait");
        assert!(service == "none" || !expected.is_empty(), "{waiting:?}: nothing was left to see");
    }
}

#[test]
fn critical_checks_are_watched_only_where_services_take_turns() {
    let mut b = Bed::new(10);
    b.list(1, &["a", "b"]);
    assert!(b.asks().iter().all(|a| a.query != Query::Critical));
    let (b, open) = in_turns();
    assert_eq!(open.iter().filter(|(a, _)| a.query == Query::Critical).count(), 1);
    assert!(b.watches.is_up());
}

#[test]
fn whoever_answers_after_an_absence_is_asked_anew() {
    let mut b = Bed::new(10);
    b.list(9, &["a"]);
    let a = b.service("a");
    b.watches.told(&a, 9, instances("1"), b.now);
    b.pass(201);
    let asks = b.asks();
    // The service was answered before its connection broke, the list was not.
    for ask in &asks {
        match ask.query {
            Query::Catalog => b.watches.failed(ask, b.now, 1.0),
            _ => drop(b.watches.told(ask, 9, instances("1"), b.now)),
        }
    }
    b.pass(500);
    b.list(2, &["a"]);
    assert_eq!(b.service("a").index, 0);
}

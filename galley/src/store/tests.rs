use super::*;

fn file(path: &str, text: &str) -> SourceFile {
    SourceFile { path: path.into(), content: Ok(Arc::new(text.as_bytes().to_vec())), modified: 100 }
}

fn service(name: &str, port: u32) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: {port}}}]}}\n"
    )
}

fn route(name: &str, host: &str, timeout: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: {name}}}\nspec:\n  hosts: [{host}]\n  http: [{{route: [{{destination: {{host: {host}}}}}], timeout: {timeout}}}]\n"
    )
}

/// All that a store says after a reading.
struct Outcome {
    documents: BTreeMap<Key, Arc<Document>>,
    reports: Vec<Arc<DocumentReport>>,
    stale: BTreeSet<Key>,
}

fn outcome(s: &mut Store, files: &[SourceFile], hosts: Hosts<'_>) -> Outcome {
    s.update(files, hosts);
    Outcome {
        documents: s.documents().map(|(k, d)| (k.clone(), d.clone())).collect(),
        reports: s.reports().cloned().collect(),
        stale: s.stale().clone(),
    }
}

fn names(o: &Outcome) -> Vec<String> {
    o.documents.keys().map(ToString::to_string).collect()
}

fn port_of(o: &Outcome, name: &str) -> u32 {
    o.documents
        .values()
        .find_map(|d| match &d.spec {
            Spec::Service(s) if d.metadata.name == name => Some(s.ports[0].port),
            _ => None,
        })
        .unwrap()
}

fn update(s: &mut Store, files: &[SourceFile]) -> Outcome {
    outcome(s, files, Hosts::Known(&BTreeSet::new()))
}

#[test]
fn the_rest_applies_and_the_last_good_version_stays() {
    let mut s = Store::new("default");
    let o = update(&mut s, &[file("a", &(service("one", 80) + &service("two", 80)))]);
    assert_eq!(names(&o), ["Service default/one", "Service default/two"]);
    assert!(o.stale.is_empty());

    // A bad value keeps the old version, the neighbour's change applies.
    let o = update(&mut s, &[file("a", &(service("one", 99_999) + &service("two", 81)))]);
    assert_eq!((port_of(&o, "one"), port_of(&o, "two")), (80, 81));
    assert_eq!(o.stale.iter().map(ToString::to_string).collect::<Vec<_>>(), ["Service default/one"]);
    assert_eq!(o.reports.iter().filter(|r| !r.valid).count(), 1);

    // So does a syntax error.
    let broken = "---\napiVersion: v1\nkind: Service\nmetadata:\n  name: one\nspec: {ports: [\n";
    let o = update(&mut s, &[file("a", &(broken.to_owned() + &service("two", 82)))]);
    assert_eq!((port_of(&o, "one"), port_of(&o, "two")), (80, 82));

    // And text in which nothing can be named.
    let o = update(&mut s, &[file("a", "\u{0}garbage: [")]);
    assert_eq!((port_of(&o, "one"), port_of(&o, "two")), (80, 82));
    assert_eq!(o.stale.len(), 2);

    // And a file that cannot be read.
    let mut unreadable = file("a", "");
    unreadable.content = Err("permission denied".into());
    let o = update(&mut s, &[unreadable]);
    assert_eq!(names(&o).len(), 2);
    assert_eq!(o.reports[0].errors[0].message, "permission denied");

    // And a directory that is gone for the moment.
    let mut a = file("dir/a", &(service("one", 80) + &service("two", 82)));
    update(&mut s, &[a.clone()]);
    a.path = "dir".into();
    a.content = Err("no such directory".into());
    assert_eq!(names(&update(&mut s, &[a])).len(), 2);

    // Repaired, then deleted.
    let o = update(&mut s, &[file("a", &service("one", 90))]);
    assert_eq!(names(&o), ["Service default/one"]);
    assert_eq!(port_of(&o, "one"), 90);
    assert!(o.stale.is_empty());
    assert!(names(&update(&mut s, &[])).is_empty());
}

#[test]
fn a_document_that_was_never_good_does_not_apply() {
    let mut s = Store::new("default");
    let o = update(&mut s, &[file("a", &(service("one", 0) + &service("two", 80)))]);
    assert_eq!(names(&o), ["Service default/two"]);
    assert!(o.stale.is_empty());
}

#[test]
fn the_first_of_two_duplicates_by_path_applies() {
    let mut s = Store::new("default");
    let o = update(&mut s, &[file("b", &service("one", 2)), file("a", &service("one", 1))]);
    assert_eq!(port_of(&o, "one"), 1);
    let bad: Vec<_> = o.reports.iter().filter(|r| !r.valid).collect();
    assert_eq!(bad.len(), 1);
    assert_eq!(bad[0].file, "b");
    assert_eq!(bad[0].errors[0].message, "duplicate of Service default/one, which a has as document 1");
    assert_eq!((bad[0].errors[0].path.as_str(), bad[0].errors[0].line), ("metadata", 4));
    // The other takes over when the first is deleted.
    let o = update(&mut s, &[file("b", &service("one", 2))]);
    assert_eq!(port_of(&o, "one"), 2);
    assert!(o.reports.iter().all(|r| r.valid));
}

#[test]
fn an_unknown_host_withholds_a_document_until_it_appears() {
    let mut s = Store::new("default");
    let vs = route("vs", "reviews", "1s");
    let o = update(&mut s, &[file("a", &vs)]);
    assert!(names(&o).is_empty());
    let report = &o.reports[0];
    assert!(!report.valid);
    assert_eq!(report.errors[0].path, "spec.http[0].route[0].destination.host");
    assert_eq!(report.errors[0].line, 7);
    // It comes from a peer.
    let imports = BTreeSet::from(["reviews.default.svc.cluster.local".to_owned()]);
    let o = outcome(&mut s, &[file("a", &vs)], Hosts::Known(&imports));
    assert_eq!(names(&o).len(), 1);
    assert!(o.reports[0].valid);
    // The peer is gone: what serves is not taken back, but its author is told.
    let o = update(&mut s, &[file("a", &vs)]);
    assert_eq!(names(&o).len(), 1);
    assert!(o.reports[0].valid && o.reports[0].warnings[0].message.contains("stays"));
    // A new version with an unknown host is refused, the old one stays.
    let o = outcome(&mut s, &[file("a", &route("vs", "nowhere", "2s"))], Hosts::Known(&imports));
    assert_eq!(o.stale.len(), 1);
    let Spec::VirtualService(kept) = &o.documents.values().next().unwrap().spec else { panic!() };
    assert_eq!(kept.hosts, ["reviews"]);
}

#[test]
fn age_is_kept_while_a_document_exists() {
    let mut s = Store::new("default");
    let created = |o: &Outcome| o.documents.values().next().unwrap().metadata.creation_timestamp;
    assert_eq!(created(&update(&mut s, &[file("a", &service("one", 1))])), 100);
    let mut later = file("a", &service("one", 2));
    later.modified = 200;
    assert_eq!(created(&update(&mut s, &[later.clone()])), 100, "an edit does not make it younger");
    update(&mut s, &[]);
    assert_eq!(created(&update(&mut s, &[later])), 200);
}

/// Takes what another store has read last, without the way for few changes.
fn follow(s: &mut Store, other: &Store) {
    let read = |f: &File| File {
        content: f.content.clone(),
        modified: f.modified,
        parsed: Arc::clone(&f.parsed),
        reports: if f.content.is_err() { f.reports.clone() } else { vec![] },
    };
    s.files = other.files.iter().map(|(path, f)| (path.clone(), read(f))).collect();
    s.hosts.clone_from(&other.hosts);
    s.all();
}

#[test]
fn few_changes_have_the_same_result_as_all_of_them_would() {
    let rule = |host: &str, subset: &str| {
        format!(
            "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {host}}}\nspec: {{host: {host}, \
             subsets: [{{name: {subset}, labels: {{v: x}}}}]}}\n"
        )
    };
    let entry = |name: &str, host: &str| {
        format!(
            "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}}}\nspec: {{hosts: [{host}], \
             ports: [{{number: 80, name: http, protocol: HTTP}}]}}\n"
        )
    };
    let workload = |n: u32| {
        format!(
            "---\napiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: w{n}}}\nspec: {{address: \
             10.0.0.{n}}}\n"
        )
    };
    let mut seed = 1u32;
    let mut random = move |n: u32| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 16) % n
    };
    let paths = ["a", "b", "dir/c", "dir/d", "e"];
    let (mut few, mut all) = (Store::new("default"), Store::new("default"));
    let mut files: BTreeMap<&str, SourceFile> = BTreeMap::new();
    let (mut quick, mut kept, mut refused) = (0, 0, 0);
    for n in 0..1_500u32 {
        for _ in 0..=random(2) {
            let path = paths[random(5) as usize];
            // Names that nobody else has, and (rarely) such that others have as well.
            let own =
                |n: u32| format!("s{}{n}", path.len() * 10 + usize::from(path.as_bytes()[path.len() - 1]));
            let name = if random(12) == 0 { "shared".to_owned() } else { own(random(2)) };
            let other = format!("s{}{}", 10 + [97, 98, 101][random(3) as usize], random(2));
            let mut text = String::new();
            for _ in 0..random(4) {
                text += &match random(11) {
                    0..=2 => service(&name, 80 + random(3)),
                    3 | 4 => route(&name, &other, &format!("{}s", 1 + random(3))),
                    5 => rule(&name, ["v1", "v2"][random(2) as usize]),
                    6 => workload(random(20) + 1),
                    // Hosts that several documents may have.
                    9 => entry(&format!("e{name}"), &format!("{other}.default.svc.cluster.local")),
                    10 => {
                        entry(&format!("f{name}"), "far.default.svc.cluster.local")
                            + &route(&format!("g{name}"), "far", "1s")
                    }
                    7 if random(4) == 0 => service(&name, 99_999),
                    7 if random(4) == 0 => "---\nkind: [\n".to_owned(),
                    _ => route(&format!("r{name}"), &name, "1s")
                        .replace("]}", "], match: [{uri: {exact: /}}]}"),
                };
            }
            match random(14) {
                0 => drop(files.remove(path)),
                1 if random(3) == 0 => {
                    files.insert(path, SourceFile { content: Err("no".into()), ..file(path, "") });
                }
                _ => {
                    files.insert(path, SourceFile { modified: 100 + u64::from(n), ..file(path, &text) });
                }
            }
        }
        // A directory that cannot be read hides what is below it.
        if n % 97 > 85 {
            files.insert("dir", SourceFile { content: Err("no".into()), ..file("dir", "") });
        } else {
            files.remove("dir");
        }
        let hosts: BTreeSet<String> =
            (n % 500 > 400).then(|| "far.default.svc.cluster.local".to_owned()).into_iter().collect();
        let now: Vec<SourceFile> = files.values().cloned().collect();
        let change = few.update(&now, Hosts::Known(&hosts));
        follow(&mut all, &few);
        let told = |s: &Store| -> BTreeMap<Key, Document> {
            s.documents().map(|(k, d)| (k.clone(), (**d).clone())).collect()
        };
        assert_eq!(told(&few), told(&all), "{n}");
        assert!(few.reports().eq(all.reports()), "{n}");
        assert_eq!(few.stale(), all.stale(), "{n}");
        assert_eq!(few.seen, all.seen, "{n}");
        quick += u32::from(matches!(change, Change::Some(_)));
        kept += u32::from(!few.stale().is_empty());
        refused +=
            u32::from(few.reports().any(|r| r.errors.iter().any(|e| e.message.contains("unknown host"))));
    }
    assert!(quick > 250 && kept > 150 && refused > 150, "{quick} {kept} {refused}");
}

#[test]
fn changes_are_told_and_nothing_is_done_without_any() {
    let mut s = Store::new("default");
    let none = BTreeSet::new();
    let mut files =
        vec![file("a", &service("one", 1)), file("b", &(service("two", 1) + &route("v", "one", "1s")))];
    assert!(matches!(s.update(&files, Hosts::Known(&none)), Change::All));
    assert!(matches!(s.update(&files, Hosts::Known(&none)), Change::Nothing));
    files[0] = file("a", &service("one", 2));
    let Change::Some(told) = s.update(&files, Hosts::Known(&none)) else { panic!() };
    let told: Vec<_> = told.iter().map(|(k, d)| (k.to_string(), d.is_some())).collect();
    assert_eq!(told, [("Service default/one".to_owned(), true)]);
    // What refers to it is looked at, too, and stays as it is.
    let Change::Some(told) = s.update(&files[1..], Hosts::Known(&none)) else { panic!() };
    assert_eq!(
        told.iter().map(|(k, d)| (k.to_string(), d.is_some())).collect::<Vec<_>>(),
        [("Service default/one".to_owned(), false)]
    );
    assert!(s.reports().any(|r| r.warnings.iter().any(|w| w.message.contains("stays"))));
    // A document that moves to another file is there all the time.
    let moved = [file("b", &(service("two", 1) + &route("v", "two", "1s"))), file("c", &service("one", 2))];
    s.update(&moved, Hosts::Known(&none));
    let again = [file("b", &(service("one", 2) + &route("v", "two", "1s"))), file("c", &service("two", 1))];
    assert!(matches!(s.update(&again, Hosts::Known(&none)), Change::All));
    assert_eq!(s.documents().count(), 3);
}

/// Items of a list share a tree, which is made once for all that is said of them.
#[test]
fn thousands_of_findings_in_a_list_are_not_quadratic() {
    let list = |item: &dyn Fn(usize) -> String| {
        let items: Vec<String> = (0..2_000).map(item).collect();
        format!("apiVersion: v1\nkind: List\nitems:\n{}", items.concat())
    };
    let duplicates = list(&|_| "- {apiVersion: v1, kind: Namespace, metadata: {name: n}}\n".to_owned());
    let unknown = list(&|n| {
        format!(
            "- {{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {{name: v{n}}}, spec: {{hosts: [a], http: \
             [{{route: [{{destination: {{host: nobody}}}}]}}]}}}}\n"
        )
    });
    for (text, findings) in [(duplicates, 1_999), (unknown, 2_000)] {
        let started = std::time::Instant::now();
        let _ = parse_file("a", &Arc::new(text.clone().into_bytes()), "default");
        let once = started.elapsed();
        let mut s = Store::new("default");
        let started = std::time::Instant::now();
        let o = update(&mut s, &[file("a", &text)]);
        assert_eq!(o.reports.iter().filter(|r| !r.valid).count(), findings);
        // Parsed once more for the places of findings; each item anew would be thousands of times.
        assert!(started.elapsed() < once * 50, "{:?}, and {once:?} to parse it", started.elapsed());
    }
}

#[test]
fn thousands_of_documents_are_not_quadratic() {
    let text: String = (0..3_000)
        .map(|i| service(&format!("s{i}"), 80) + &route(&format!("v{i}"), &format!("s{i}"), "1s"))
        .collect();
    let mut s = Store::new("default");
    let started = std::time::Instant::now();
    let o = update(&mut s, &[file("a", &text)]);
    assert_eq!(o.documents.len(), 6_000);
    assert!(started.elapsed() < std::time::Duration::from_secs(20), "{:?}", started.elapsed());
    let started = std::time::Instant::now();
    update(&mut s, &[file("a", &text), file("b", &service("x", 1))]);
    assert!(
        started.elapsed() < std::time::Duration::from_secs(3),
        "unchanged files are parsed again: {:?}",
        started.elapsed()
    );
}

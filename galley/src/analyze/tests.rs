//! Every code has documents that bring it about, and documents that nearly do.

mod cases;
mod ingress;

use std::collections::BTreeSet;

use self::cases::Case;
use super::*;

fn run(text: &str, options: &AnalyzeOptions) -> Vec<Message> {
    analyze_files(&[PathBuf::from("-")], &mut text.as_bytes(), options).messages
}

fn of(text: &str, code: &str) -> Vec<Message> {
    run(text, &AnalyzeOptions::default()).into_iter().filter(|m| m.code == code).collect()
}

#[test]
fn every_code_is_told_where_it_should_be_and_only_there() {
    for Case { code, wrong, origin, line, right } in cases::all() {
        for (i, wrong) in wrong.iter().enumerate() {
            let found = of(wrong, code);
            let fits = |m: &Message| i > 0 || m.origin == *origin && m.reference.line == *line;
            assert!(
                found.iter().any(fits),
                "{code} was not told about {origin}, line {line}:\n{wrong}\n{:#?}",
                run(wrong, &AnalyzeOptions::default())
            );
            let c = catalogue::find(code).unwrap();
            assert!(found.iter().all(|m| m.name == c.name && m.level == c.level && !m.message.is_empty()));
        }
        for right in *right {
            let found = of(right, code);
            assert!(found.is_empty(), "{code} was told:\n{right}\n{found:#?}");
        }
    }
}

#[test]
fn every_code_that_is_told_has_a_case() {
    let told: BTreeSet<&str> =
        catalogue().iter().filter(|c| c.standing == Standing::Told).map(|c| c.code).collect();
    let cases: BTreeSet<&str> = cases::all().map(|c| c.code).collect();
    assert_eq!(told, cases);
    assert!(cases::all().all(|c| !c.wrong.is_empty() && !c.right.is_empty()));
}

#[test]
fn the_readme_has_every_code_that_is_told() {
    let readme = include_str!("../../README.md");
    for c in catalogue() {
        assert_eq!(readme.contains(c.code), c.standing == Standing::Told, "{}", c.code);
    }
}

const DANGLING: &str = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: v, namespace: books}\nspec: {hosts: [a], http: [{route: [{destination: {host: nobody}}]}]}\n";

/// Who says nothing of `exportTo` is seen as the mesh's settings say.
#[test]
fn visibility_by_the_settings_of_the_mesh() {
    let service = |ns: &str| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: reviews, namespace: {ns}}}\nspec: {{ports: [{{name: http, port: 80}}]}}\n"
        )
    };
    let routes = |ns: &str, host: &str| {
        format!(
            "---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: v, namespace: {ns}}}\n\
                 spec: {{hosts: [x.com], http: [{{route: [{{destination: {{host: {host}}}}}]}}]}}\n"
        )
    };
    let mesh = |spec: &str| {
        format!(
            "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: '{spec}'\n"
        )
    };
    let far = service("a") + &routes("b", "reviews.a.svc.cluster.local");
    assert!(of(&far, "IST0101").is_empty());
    assert_eq!(of(&(far.clone() + &mesh("defaultServiceExportTo: [.]")), "IST0101").len(), 1);
    assert!(of(&(far + &mesh("defaultVirtualServiceExportTo: [.]")), "IST0101").is_empty());
    let twice = service("a") + &routes("a", "reviews") + &service("b") + &routes("b", "reviews");
    assert!(!of(&twice, "IST0109").is_empty());
    assert!(of(&(twice + &mesh("defaultVirtualServiceExportTo: [.]")), "IST0109").is_empty());
}

#[test]
fn findings_are_suppressed_by_annotations_and_flags() {
    assert_eq!(of(DANGLING, "IST0101").len(), 1);
    for value in ["IST0101", "'IST0102,IST0101'", "'*'"] {
        let annotated = DANGLING.replace(
            "namespace: books",
            &format!("namespace: books, annotations: {{galley.istio.io/analyze-suppress: {value}}}"),
        );
        assert!(of(&annotated, "IST0101").is_empty(), "{value}");
    }
    let other = DANGLING.replace(
        "namespace: books",
        "namespace: books, annotations: {galley.istio.io/analyze-suppress: IST0102}",
    );
    assert_eq!(of(&other, "IST0101").len(), 1);
    let by_flag = |s: &str| {
        let options = AnalyzeOptions { suppressions: vec![s.parse().unwrap()], ..AnalyzeOptions::default() };
        run(DANGLING, &options).iter().all(|m| m.code != "IST0101")
    };
    for s in [
        "IST0101=VirtualService v.books",
        "IST0101=VirtualService books/v",
        "IST0101=VirtualService *.books",
        "IST0101=*",
    ] {
        assert!(by_flag(s), "{s}");
    }
    for s in ["IST0102=VirtualService v.books", "IST0101=VirtualService v.other", "IST0101=Gateway *"] {
        assert!(!by_flag(s), "{s}");
    }
}

#[test]
fn one_namespace_can_be_looked_at() {
    let two = format!("{DANGLING}---\n{}", DANGLING.replace("books", "other"));
    let of = |ns: &str| {
        let options = AnalyzeOptions { namespace: Some(ns.into()), ..AnalyzeOptions::default() };
        run(&two, &options).into_iter().map(|m| m.namespace).collect::<BTreeSet<_>>()
    };
    assert_eq!(of("books"), BTreeSet::from(["books".to_owned()]));
    assert!(of("third").is_empty());
}

#[test]
fn hosts_that_others_have_exist() {
    let options = AnalyzeOptions {
        known_hosts: BTreeSet::from(["nobody.books.svc.cluster.local".to_owned()]),
        ..AnalyzeOptions::default()
    };
    assert!(run(DANGLING, &options).is_empty());
    let peer = DANGLING.replace("nobody", "nobody.books.svc.clusterset.local");
    assert!(of(&peer, "IST0101").is_empty());
}

#[test]
fn exit_codes_and_json() {
    let report = analyze_files(&[PathBuf::from("-")], &mut DANGLING.as_bytes(), &AnalyzeOptions::default());
    assert_eq!((report.exit_code(Level::Error), report.documents), (1, 1));
    assert_eq!(
        serde_json::to_value(&report.messages).unwrap(),
        serde_json::json!([{
            "code": "IST0101", "name": "ReferencedResourceNotFound", "level": "Error",
            "origin": "VirtualService books/v", "namespace": "books",
            "message": "host \"nobody\" (nobody.books.svc.cluster.local) does not exist: create the Service or a ServiceEntry, or export it to this namespace",
            "reference": {"file": "-", "line": 4}
        }])
    );
    let info = "apiVersion: v1\nkind: Namespace\nmetadata: {name: n}\n";
    let report = analyze_files(&[PathBuf::from("-")], &mut info.as_bytes(), &AnalyzeOptions::default());
    assert_eq!([Level::Error, Level::Warning, Level::Info].map(|l| report.exit_code(l)), [0, 0, 1]);
    let absent =
        analyze_files(&[PathBuf::from("/none/such.yaml")], &mut "".as_bytes(), &AnalyzeOptions::default());
    assert_eq!(absent.exit_code(Level::Error), 2);
    assert_eq!(absent.unreadable.len(), 1);
}

#[test]
fn worst_first_and_each_once() {
    let text =
        format!("{DANGLING}---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: n}}\n---\n{DANGLING}");
    let messages = run(&text, &AnalyzeOptions::default());
    assert!(messages.windows(2).all(|w| w[0].level >= w[1].level), "{messages:#?}");
    let unique: BTreeSet<String> = messages.iter().map(|m| format!("{m:?}")).collect();
    assert_eq!(unique.len(), messages.len());
}

proptest::proptest! {
    #[test]
    fn no_documents_panic(kind in "(Pod|Deployment|CronJob|Service|Gateway|CustomResourceDefinition)", body in "[\\[\\]{}:,&*a-z1 \\n-]{0,120}") {
        for api in ["v1", "apps/v1", "networking.istio.io/v1", "apiextensions.k8s.io/v1"] {
            let text = format!("apiVersion: {api}\nkind: {kind}\nmetadata: {{name: a}}\nspec: {body}\nstatus: {body}\n");
            let _ = run(&text, &AnalyzeOptions::default());
        }
    }
}

#[test]
fn many_documents_are_analysed_in_time() {
    use std::fmt::Write as _;
    let mut text = String::new();
    for i in 0..1_500 {
        let _ = write!(
            text,
            "---\napiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {{name: g{i}, namespace: n}}\nspec: {{selector: {{a: b}}, servers: [{{port: {{number: 443, name: a, protocol: HTTPS}}, hosts: [h{i}.com], tls: {{mode: SIMPLE, credentialName: c{i}}}}}]}}\n\
             ---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: v{i}, namespace: n}}\nspec: {{hosts: [h{i}.com], gateways: [g{i}], http: [{{route: [{{destination: {{host: s{i}}}}}]}}]}}\n\
             ---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{i}, namespace: n}}\nspec: {{selector: {{app: a{i}}}, ports: [{{port: 80, name: http}}]}}\n"
        );
    }
    let start = std::time::Instant::now();
    let messages = run(&text, &AnalyzeOptions::default());
    assert!(messages.is_empty(), "{:?}", messages.first());
    // A debug build on a busy machine.
    assert!(start.elapsed() < std::time::Duration::from_secs(30), "{:?}", start.elapsed());
}

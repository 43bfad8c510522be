//! What is told about Ingresses, and what is not.

use super::{Message, run};
use crate::AnalyzeOptions;

const WEB: &str = "---\napiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: n}\nspec: {selector: {app: web}, ports: [{name: http, port: 80}, {name: grpc, port: 81}]}\n";
const EDGE: &str = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: edge, namespace: istio-system, labels: {istio: ingressgateway}}\nspec: {}\n";
const CLASSES: &str = "---\napiVersion: networking.k8s.io/v1\nkind: IngressClass\nmetadata: {name: own}\nspec: {controller: istio.io/ingress-controller}\n\
                       ---\napiVersion: networking.k8s.io/v1\nkind: IngressClass\nmetadata: {name: other}\nspec: {controller: k8s.io/ingress-nginx}\n";

/// An Ingress of a class; the fields of its specification stand at lines of their own.
fn ingress(name: &str, class: &str, fields: &str) -> String {
    let fields: String = fields.lines().map(|l| format!("  {l}\n")).collect();
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {{name: {name}, namespace: n}}\nspec:\n  ingressClassName: {class}\n{fields}"
    )
}

fn rules(host: &str, path: &str, service: &str, port: &str) -> String {
    format!(
        "rules: [{{host: {host}, http: {{paths: [{{path: {path}, pathType: Prefix, backend: {{service: {{name: {service}, port: {{{port}}}}}}}}}]}}}}]"
    )
}

fn told(documents: &[&str]) -> Vec<Message> {
    let all = run(&documents.concat(), &AnalyzeOptions::default());
    all.into_iter().filter(|m| m.origin.starts_with("Ingress ")).collect()
}

#[track_caller]
fn tells(documents: &[&str], want: &[(&str, &str, &str)]) {
    let told = told(documents);
    let fits = told.len() == want.len()
        && told.iter().zip(want).all(|(m, (code, origin, words))| {
            m.code == *code && m.origin == *origin && m.message.contains(words) && m.reference.line > 4
        });
    assert!(fits, "{}\n{told:#?}", documents.concat());
}

#[test]
fn backends() {
    let to = |service: &str, port: &str| ingress("i", "own", &rules("a.example", "/", service, port));
    tells(&[CLASSES, WEB, &to("web", "number: 80")], &[]);
    tells(&[CLASSES, WEB, &to("web", "name: grpc")], &[]);
    for (ingress, words) in [
        (to("shop", "number: 80"), "(shop.n.svc.cluster.local) does not exist"),
        (to("web", "number: 82"), "has no port 82, but 80, 81"),
        (to("web", "name: tcp"), "has no port \"tcp\", but http, grpc"),
    ] {
        tells(&[CLASSES, WEB, &ingress], &[("IST0101", "Ingress n/i", words)]);
    }
    let elsewhere = WEB.replace("namespace: n", "namespace: m");
    let words = "web.m.svc.cluster.local is of another namespace";
    tells(&[CLASSES, &elsewhere, &to("web", "number: 80")], &[("IST0101", "Ingress n/i", words)]);
}

/// Those of another controller are not the mesh's business.
#[test]
fn whose_they_are() {
    let of = |class: &str| ingress("i", class, &rules("a.example", "/", "nobody", "number: 80"));
    assert_eq!(told(&[CLASSES, &of("own")]).len(), 1);
    assert!(told(&[CLASSES, &of("other")]).is_empty());
    assert!(told(&[&of("lost")]).is_empty());
    let mesh = "---\napiVersion: flotilla.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: mesh}\nspec: {ingressControllerMode: DEFAULT}\n";
    assert_eq!(told(&[mesh, &of("lost")]).len(), 1);
}

#[test]
fn secrets() {
    let secure = ingress(
        "i",
        "own",
        &format!(
            "tls: [{{hosts: [a.example], secretName: c}}]\n{}",
            rules("a.example", "/", "web", "number: 80")
        ),
    );
    let secret = |namespace: &str| {
        format!(
            "---\napiVersion: v1\nkind: Secret\nmetadata: {{name: c, namespace: {namespace}}}\nstringData: {{tls.crt: hello, tls.key: world}}\n"
        )
    };
    // Without a platform's documents nobody knows which secrets there are.
    tells(&[CLASSES, WEB, &secure], &[]);
    let missing = ("IST0101", "Ingress n/i", "Secret istio-system/c does not exist");
    tells(&[CLASSES, WEB, EDGE, &secure], &[missing]);
    // Beside the Ingress it is of no use: gateways look in their own namespace.
    tells(&[CLASSES, WEB, EDGE, &secret("n"), &secure], &[missing]);
    let empty = ("IST0161", "Ingress n/i", "holds no certificate");
    tells(&[CLASSES, WEB, EDGE, &secret("istio-system"), &secure], &[empty]);
}

#[test]
fn hosts_and_paths_of_several() {
    let of = |name: &str, host: &str, path: &str, secret: &str| {
        let tls = format!("tls: [{{hosts: [{host}], secretName: {secret}}}]");
        ingress(name, "own", &format!("{tls}\n{}", rules(host, path, "web", "number: 80")))
    };
    let a = of("a", "a.example", "/x", "c");
    tells(&[CLASSES, WEB, &a, &of("b", "b.example", "/x", "d")], &[]);
    let both = "Ingresses n/a, n/b have TLS for the same host \"a.example\"";
    let twice = [("IST0145", "Ingress n/a", both), ("IST0145", "Ingress n/b", both)];
    tells(&[CLASSES, WEB, &a, &of("b", "a.example", "/y", "d")], &twice);
    // The rules are at the older one's Gateway, which has no TLS.
    let plain = ingress("a", "own", &rules("b.example", "/y", "web", "number: 80"));
    let lost = ("IST0132", "Ingress n/b", "rules of host \"b.example\" are those of Ingress n/a");
    tells(&[CLASSES, WEB, &plain, &of("b", "b.example", "/x", "d")], &[lost]);
    // A slash at the end says nothing.
    let shadow = ingress("b", "own", &rules("a.example", "/x/", "web", "number: 81"));
    tells(&[CLASSES, WEB, &a, &shadow], &[("IST0130", "Ingress n/b", "Ingress n/a leads path \"/x/\"")]);
}

//! Kubernetes' Ingress and IngressClass (`networking.k8s.io/v1`), and which Ingresses a mesh serves.

use std::collections::BTreeMap;

use super::MeshConfig;

/// Annotation by which an Ingress names its class, from before there was `ingressClassName`.
pub const INGRESS_CLASS: &str = "kubernetes.io/ingress.class";
/// Annotation of the class that an Ingress gets which names none.
const IS_DEFAULT: &str = "ingressclass.kubernetes.io/is-default-class";
/// `controller` of the classes that the mesh serves.
const CONTROLLER: &str = "istio.io/ingress-controller";
/// Label of gateways.
const GATEWAY_LABEL: &str = "istio";

message! {
    /// Hosts and paths that lead from the edge to Services of its namespace.
    pub struct Ingress {
        /// Name of its class.
        pub ingress_class_name: Option<String>,
        /// Hosts that are served over TLS.
        pub tls: Vec<IngressTls>,
        /// What leads where.
        pub rules: Vec<IngressRule>,
        /// Where requests go that no rule is about.
        pub default_backend: Option<IngressBackend>,
    }

    /// Hosts with one certificate.
    pub struct IngressTls {
        /// The hosts; none means all.
        pub hosts: Vec<String>,
        /// Secret with the certificate and its key.
        pub secret_name: String,
    }

    /// What leads where for a host.
    pub struct IngressRule {
        /// The host; empty means all. A wildcard is the first label.
        pub host: String,
        /// Paths.
        pub http: Option<HttpIngressRuleValue>,
    }

    /// Paths of a host.
    pub struct HttpIngressRuleValue {
        /// The paths.
        pub paths: Vec<HttpIngressPath>,
    }

    /// A path and where it leads.
    pub struct HttpIngressPath {
        /// The path.
        pub path: String,
        /// What the path means; required.
        pub path_type: Option<PathType>,
        /// Where it leads.
        pub backend: IngressBackend,
    }

    /// Where requests go: one of both.
    pub struct IngressBackend {
        /// A Service of the Ingress's namespace.
        pub service: Option<IngressServiceBackend>,
        /// Some other object of it.
        pub resource: Option<IngressResource>,
    }

    /// A port of a Service.
    pub struct IngressServiceBackend {
        /// Name of the Service.
        pub name: String,
        /// The port.
        pub port: ServiceBackendPort,
    }

    /// A port by one of both.
    pub struct ServiceBackendPort {
        /// Its name.
        pub name: String,
        /// Its number.
        pub number: u32,
    }

    /// An object of the same namespace.
    pub struct IngressResource {
        /// API group; none is Kubernetes' own.
        pub api_group: Option<String>,
        /// Kind.
        pub kind: String,
        /// Name.
        pub name: String,
    }

    /// Which controller serves the Ingresses of a class.
    pub struct IngressClass {
        /// Name of the controller, such as `istio.io/ingress-controller`.
        pub controller: String,
        /// More for the controller.
        pub parameters: Option<IngressClassParameters>,
    }

    /// An object that the controller of a class reads.
    pub struct IngressClassParameters {
        /// API group; none is Kubernetes' own.
        pub api_group: Option<String>,
        /// Kind.
        pub kind: String,
        /// Name.
        pub name: String,
        /// `Cluster` or `Namespace`.
        pub scope: String,
        /// Namespace, if that is its scope.
        pub namespace: Option<String>,
    }
}

/// What the path of an Ingress means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum PathType {
    /// The whole path.
    Exact,
    /// Its first segments.
    Prefix,
    /// The whole path, or with `*` or `.*` at the end its first segments.
    ImplementationSpecific,
}

/// `MeshConfig.ingressControllerMode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IngressControllerMode {
    /// Those whose class is one of the mesh's, but not by annotation.
    Unspecified,
    /// None.
    Off,
    /// Those of the mesh's class, and those of none.
    Default,
    /// Those of the mesh's class.
    Strict,
}

/// Why an Ingress is served or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IngressStanding {
    /// It is the mesh's.
    Served,
    /// It is another controller's, or the mesh serves none.
    Elsewhere,
    /// It has no class and the mesh serves only those that have.
    Unclassed,
    /// No IngressClass of its name exists.
    UnknownClass,
}

impl MeshConfig {
    /// Which Ingresses are served: those of the mesh's class unless set. `None` for a value that is none.
    #[must_use]
    pub fn ingress_mode(&self) -> Option<IngressControllerMode> {
        match self.ingress_controller_mode.as_str() {
            "" | "STRICT" => Some(IngressControllerMode::Strict),
            "DEFAULT" => Some(IngressControllerMode::Default),
            "OFF" => Some(IngressControllerMode::Off),
            "UNSPECIFIED" => Some(IngressControllerMode::Unspecified),
            _ => None,
        }
    }

    /// Value of the annotation of Ingresses that are the mesh's.
    #[must_use]
    pub fn ingress_class(&self) -> &str {
        if self.ingress_class.is_empty() { "istio" } else { &self.ingress_class }
    }

    /// Service in front of the gateways that serve Ingresses.
    #[must_use]
    pub fn ingress_service(&self) -> &str {
        if self.ingress_service.is_empty() { "istio-ingressgateway" } else { &self.ingress_service }
    }

    /// Labels of the gateways that serve Ingresses. Their label is mostly the Service's name; that of Istio's own
    /// installation is an exception.
    #[must_use]
    pub fn ingress_labels(&self) -> BTreeMap<String, String> {
        let value = match (self.ingress_selector.as_str(), self.ingress_service()) {
            ("", "istio-ingressgateway") => "ingressgateway",
            ("", service) => service,
            (selector, _) => selector,
        };
        BTreeMap::from([(GATEWAY_LABEL.to_owned(), value.to_owned())])
    }
}

/// A class with what its metadata says.
#[derive(Debug, Clone, Copy)]
pub struct NamedClass<'a> {
    /// Name.
    pub name: &'a str,
    /// Seconds since the epoch.
    pub created: u64,
    /// Annotations.
    pub annotations: &'a BTreeMap<String, String>,
    /// Content.
    pub class: &'a IngressClass,
}

impl Ingress {
    /// Whether a mesh with these settings and classes serves it. As in Istio the annotation goes before the class, and an
    /// Ingress without both gets the default class, as Kubernetes gives it when the Ingress is made: the newest.
    pub fn standing<'a>(
        &self,
        annotations: &BTreeMap<String, String>,
        mesh: &MeshConfig,
        classes: impl Iterator<Item = NamedClass<'a>>,
    ) -> IngressStanding {
        use IngressControllerMode::{Default, Off, Strict};
        use IngressStanding::{Elsewhere, Served, Unclassed, UnknownClass};
        let mode = mesh.ingress_mode();
        if mode.is_none() || mode == Some(Off) {
            return Elsewhere;
        }
        if let Some(named) = annotations.get(INGRESS_CLASS) {
            let own = named == mesh.ingress_class() && matches!(mode, Some(Default | Strict));
            return if own { Served } else { Elsewhere };
        }
        let class = match &self.ingress_class_name {
            Some(name) => classes.filter(|c| c.name == name).last(),
            None => classes
                .filter(|c| c.annotations.get(IS_DEFAULT).is_some_and(|v| v == "true"))
                .min_by_key(|c| (std::cmp::Reverse(c.created), c.name)),
        };
        match (class, &self.ingress_class_name) {
            (Some(c), _) if c.class.controller == CONTROLLER => Served,
            (Some(_), _) => Elsewhere,
            (None, _) if mode == Some(Default) => Served,
            (None, Some(_)) => UnknownClass,
            (None, None) => Unclassed,
        }
    }

    /// Its rules that have paths, by position and host; the host of all is `*`.
    pub fn hosts(&self) -> impl Iterator<Item = (usize, &str, &HttpIngressRuleValue)> {
        self.rules.iter().enumerate().filter_map(|(i, r)| {
            let host = if r.host.is_empty() { "*" } else { r.host.as_str() };
            Some((i, host, r.http.as_ref()?))
        })
    }
}

/// What a path is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum IngressPath<'a> {
    /// Nothing: every path fits.
    Any,
    /// The whole.
    Exact(&'a str),
    /// The first segments; a slash at the end says nothing.
    Prefix(&'a str),
}

impl HttpIngressPath {
    /// What it is compared with, as Istio reads those that are left to the implementation: the older syntax with `*`.
    #[must_use]
    pub fn condition(&self) -> IngressPath<'_> {
        let path = self.path.as_str();
        match (self.path_type, path) {
            (Some(PathType::Exact), p) => IngressPath::Exact(p),
            (Some(PathType::Prefix), p) => IngressPath::Prefix(p),
            (_, "" | "*" | "/*" | ".*") => IngressPath::Any,
            (_, p) => {
                let prefix = p.strip_suffix(".*").or_else(|| p.strip_suffix("/*"));
                prefix.map_or(IngressPath::Exact(p), IngressPath::Prefix)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(mode: &str, annotation: Option<&str>, class: Option<(&str, bool)>, default: bool) -> bool {
        let ingress = Ingress { ingress_class_name: class.map(|_| "c".to_owned()), ..Ingress::default() };
        let mesh = MeshConfig { ingress_controller_mode: mode.to_owned(), ..MeshConfig::default() };
        let own = annotation.map(|a| (INGRESS_CLASS.to_owned(), a.to_owned())).into_iter().collect();
        let annotations =
            if default { [(IS_DEFAULT.to_owned(), "true".to_owned())].into() } else { BTreeMap::new() };
        let controller = class.map_or(CONTROLLER, |(controller, _)| controller).to_owned();
        let document = IngressClass { controller, parameters: None };
        let there = default || class.is_some_and(|(_, there)| there);
        let all = there.then_some(NamedClass {
            name: "c",
            created: 1,
            annotations: &annotations,
            class: &document,
        });
        ingress.standing(&own, &mesh, all.into_iter()) == IngressStanding::Served
    }

    /// Istio's table, and what Kubernetes adds.
    #[test]
    fn which_are_served() {
        for mode in ["DEFAULT", "STRICT", "OFF", "UNSPECIFIED", "", "x"] {
            let strict = matches!(mode, "STRICT" | "");
            let on = strict || mode == "DEFAULT";
            let read = on || mode == "UNSPECIFIED";
            assert!(!standing(mode, Some("nginx"), None, false), "{mode}");
            assert_eq!(standing(mode, Some("istio"), None, false), on, "{mode}");
            assert_eq!(standing(mode, None, None, false), mode == "DEFAULT", "{mode}");
            assert!(!standing(mode, None, Some(("foo", true)), false), "{mode}");
            assert_eq!(standing(mode, None, Some((CONTROLLER, true)), false), read, "{mode}");
            // The annotation goes before the class.
            assert!(!standing(mode, Some("nginx"), Some((CONTROLLER, true)), false), "{mode}");
            assert_eq!(standing(mode, Some("istio"), Some(("foo", true)), false), on, "{mode}");
            // A class that nobody knows is none.
            assert_eq!(standing(mode, None, Some(("foo", false)), false), mode == "DEFAULT", "{mode}");
            assert_eq!(standing(mode, None, None, true), read, "{mode}");
        }
    }

    #[test]
    fn why_not() {
        let of = |name: Option<&str>| {
            let ingress = Ingress { ingress_class_name: name.map(str::to_owned), ..Ingress::default() };
            ingress.standing(&BTreeMap::new(), &MeshConfig::default(), std::iter::empty())
        };
        assert_eq!(of(None), IngressStanding::Unclassed);
        assert_eq!(of(Some("x")), IngressStanding::UnknownClass);
    }

    #[test]
    fn the_newest_default_class_counts() {
        let default = BTreeMap::from([(IS_DEFAULT.to_owned(), "true".to_owned())]);
        let own = IngressClass { controller: CONTROLLER.to_owned(), parameters: None };
        let other = IngressClass { controller: "x.example/y".to_owned(), parameters: None };
        let with = |own_created| {
            let named = |name, created, class| NamedClass { name, created, annotations: &default, class };
            let all = [named("a", own_created, &own), named("b", 5, &other)];
            Ingress::default().standing(&BTreeMap::new(), &MeshConfig::default(), all.into_iter())
        };
        assert_eq!(with(9), IngressStanding::Served);
        assert_eq!(with(5), IngressStanding::Served);
        assert_eq!(with(1), IngressStanding::Elsewhere);
    }

    #[test]
    fn gateways_by_selector_then_by_service() {
        let of = |selector: &str, service: &str| {
            let mesh = MeshConfig {
                ingress_selector: selector.to_owned(),
                ingress_service: service.to_owned(),
                ..MeshConfig::default()
            };
            mesh.ingress_labels().into_values().next().unwrap()
        };
        assert_eq!(of("", ""), "ingressgateway");
        assert_eq!(of("", "istio-ingressgateway"), "ingressgateway");
        assert_eq!(of("", "edge"), "edge");
        assert_eq!(of("front", "edge"), "front");
    }

    #[test]
    fn paths() {
        use IngressPath::{Any, Exact, Prefix};
        let of = |kind, path: &str| {
            let p = HttpIngressPath { path: path.to_owned(), path_type: kind, ..HttpIngressPath::default() };
            format!("{:?}", p.condition())
        };
        let exact = Some(PathType::Exact);
        assert_eq!(of(exact, "/a/*"), format!("{:?}", Exact("/a/*")));
        assert_eq!(of(Some(PathType::Prefix), "/a.*"), format!("{:?}", Prefix("/a.*")));
        for (path, want) in [
            ("", Any),
            ("/*", Any),
            (".*", Any),
            ("/a", Exact("/a")),
            ("/a/*", Prefix("/a")),
            ("/a.*", Prefix("/a")),
            ("/.*", Prefix("/")),
            ("/a*", Exact("/a*")),
        ] {
            assert_eq!(of(Some(PathType::ImplementationSpecific), path), format!("{want:?}"), "{path}");
        }
    }
}

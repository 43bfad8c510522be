//! Documents for every code.

/// A code and documents for it.
pub(super) struct Case {
    pub(super) code: &'static str,
    /// Documents that are told about; origin and line are those of the first set.
    pub(super) wrong: &'static [&'static str],
    pub(super) origin: &'static str,
    pub(super) line: u32,
    /// Documents that are not.
    pub(super) right: &'static [&'static str],
}

const fn case(
    code: &'static str,
    origin: &'static str,
    line: u32,
    wrong: &'static [&'static str],
    right: &'static [&'static str],
) -> Case {
    Case { code, wrong, origin, line, right }
}

/// A document of a kind, in namespace `n` unless given otherwise.
macro_rules! doc {
    ($api:literal, $kind:literal, $name:literal, $spec:literal) => {
        doc!($api, $kind, $name, "n", "", $spec)
    };
    ($api:literal, $kind:literal, $name:literal, $ns:literal, $meta:literal, $spec:literal) => {
        concat!(
            "---\napiVersion: ",
            $api,
            "\nkind: ",
            $kind,
            "\nmetadata:\n  name: ",
            $name,
            "\n  namespace: ",
            $ns,
            "\n",
            "  ",
            $meta,
            "\nspec: ",
            $spec,
            "\n"
        )
    };
}

macro_rules! net {
    ($($t:tt)*) => { doc!("networking.istio.io/v1", $($t)*) };
}

macro_rules! pod {
    ($name:literal, $labels:literal, $spec:literal) => {
        concat!(
            "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: ",
            $name,
            "\n  namespace: n\n  labels: ",
            $labels,
            "\nspec: ",
            $spec,
            "\n"
        )
    };
}

macro_rules! deployment {
    ($labels:literal, $spec:literal) => {
        concat!(
            "---\napiVersion: apps/v1\nkind: Deployment\nmetadata:\n  name: d\n  namespace: n\nspec:\n  template:\n    metadata: {labels: ",
            $labels, "}\n    spec: ", $spec, "\n"
        )
    };
}

macro_rules! namespace {
    ($labels:literal) => {
        concat!("---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: n\n  labels: ", $labels, "\n")
    };
}

macro_rules! service {
    ($name:literal, $spec:literal) => {
        doc!("v1", "Service", $name, $spec)
    };
}

macro_rules! patch {
    ($priority:literal, $patch:literal) => {
        concat!(
            "---\napiVersion: networking.istio.io/v1alpha3\nkind: EnvoyFilter\nmetadata: {name: f, namespace: n}\nspec:\n  priority: ",
            $priority, "\n  configPatches:\n  - ", $patch, "\n"
        )
    };
}

const HTTP_FILTER: &str =
    patch!("0", "{applyTo: HTTP_FILTER, patch: {operation: INSERT_BEFORE, value: {name: a}}}");

pub(super) const CASES: &[Case] = &[
    case(
        "IST0002",
        "VirtualService n/v",
        8,
        &[
            net!(
                "VirtualService",
                "v",
                "{hosts: [a], http: [{fault: {delay: {percent: 10, fixedDelay: 1s}}, redirect: {uri: /}}]}"
            ),
            net!("Sidecar", "s", "{outboundTrafficPolicy: {egressProxy: {host: a.b, port: {number: 1}}}}"),
            "apiVersion: apiextensions.k8s.io/v1\nkind: CustomResourceDefinition\nmetadata: {name: a}\nspec: {group: rbac.istio.io, names: {kind: ServiceRole}}\n",
        ],
        &[net!(
            "VirtualService",
            "v",
            "{hosts: [a], http: [{fault: {delay: {percentage: {value: 10}, fixedDelay: 1s}}, redirect: {uri: /}}]}"
        )],
    ),
    case(
        "IST0101",
        "VirtualService n/v",
        8,
        &[
            net!("VirtualService", "v", "{hosts: [a], http: [{route: [{destination: {host: nobody}}]}]}"),
            concat!(
                service!("a", "{ports: [{port: 80}]}"),
                net!(
                    "VirtualService",
                    "v",
                    "{hosts: [a], http: [{route: [{destination: {host: a, port: {number: 81}}}]}]}"
                )
            ),
            concat!(
                service!("a", "{ports: [{port: 80}]}"),
                net!(
                    "VirtualService",
                    "v",
                    "{hosts: [a], http: [{route: [{destination: {host: a, subset: v9}}]}]}"
                )
            ),
            concat!(
                service!("a", "{ports: [{port: 80}]}"),
                net!(
                    "VirtualService",
                    "v",
                    "{hosts: [a], http: [{route: [{destination: {host: a}}], mirror: {host: b}}]}"
                )
            ),
            net!("VirtualService", "v", "{hosts: [a], gateways: [nowhere], http: [{redirect: {uri: /}}]}"),
            net!("VirtualService", "v", "{hosts: [a], http: [{delegate: {name: nobody}}]}"),
            concat!(
                net!(
                    "ServiceEntry",
                    "e",
                    "other",
                    "",
                    "{hosts: [a.com], exportTo: [.], ports: [{number: 80, name: http, protocol: HTTP}]}"
                ),
                net!("VirtualService", "v", "{hosts: [a], tcp: [{route: [{destination: {host: a.com}}]}]}")
            ),
            concat!(
                pod!("p", "{app: a}", "{}"),
                net!(
                    "Gateway",
                    "g",
                    "{selector: {app: b}, servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: ['*']}]}"
                )
            ),
            concat!(
                pod!("p", "{app: a}", "{}"),
                net!("Sidecar", "s", "{workloadSelector: {labels: {app: b}}, egress: [{hosts: ['./*']}]}")
            ),
            concat!(
                pod!("p", "{app: a}", "{}"),
                doc!("telemetry.istio.io/v1", "Telemetry", "t", "{selector: {matchLabels: {app: b}}}")
            ),
            concat!(
                pod!("p", "{app: a}", "{}"),
                net!(
                    "Gateway",
                    "g",
                    "{selector: {app: a}, servers: [{port: {number: 443, name: a, protocol: HTTPS}, hosts: ['*'], tls: {mode: SIMPLE, credentialName: c}}]}"
                )
            ),
            concat!(
                namespace!("{}"),
                doc!(
                    "security.istio.io/v1",
                    "AuthorizationPolicy",
                    "p",
                    "{rules: [{from: [{source: {namespaces: [nowhere]}}]}]}"
                )
            ),
            doc!("multicluster.x-k8s.io/v1alpha1", "ServiceExport", "s", "{}"),
        ],
        &[
            concat!(
                service!("a", "{ports: [{port: 80}]}"),
                net!(
                    "VirtualService",
                    "v",
                    "{hosts: [a], http: [{route: [{destination: {host: a, port: {number: 80}}}]}]}"
                )
            ),
            concat!(
                net!(
                    "ServiceEntry",
                    "e",
                    "other",
                    "",
                    "{hosts: ['*.a.com'], exportTo: [n], ports: [{number: 80, name: http, protocol: HTTP}]}"
                ),
                net!(
                    "VirtualService",
                    "v",
                    "{hosts: [a], http: [{route: [{destination: {host: x.a.com}}]}]}"
                )
            ),
            concat!(
                net!("DestinationRule", "d", "{host: a, subsets: [{name: v1}]}"),
                service!("a", "{ports: [{port: 80}]}"),
                net!(
                    "VirtualService",
                    "v",
                    "{hosts: [a], http: [{route: [{destination: {host: a.n.svc.cluster.local, subset: v1}}]}]}"
                )
            ),
            // Nothing says that all workloads are among the documents.
            net!(
                "Gateway",
                "g",
                "{selector: {app: b}, servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: ['*']}]}"
            ),
            concat!(
                net!("WorkloadEntry", "w", "{address: 10.0.0.1, labels: {app: a}}"),
                net!("Sidecar", "s", "{workloadSelector: {labels: {app: b}}, egress: [{hosts: ['./*']}]}")
            ),
            concat!(
                namespace!("{}"),
                doc!(
                    "security.istio.io/v1",
                    "AuthorizationPolicy",
                    "p",
                    "{rules: [{from: [{source: {namespaces: [n, 'n*', '*']}}]}]}"
                )
            ),
            concat!(
                net!(
                    "Gateway",
                    "g",
                    "other",
                    "",
                    "{servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: [a.com]}]}"
                ),
                net!(
                    "VirtualService",
                    "v",
                    "{hosts: [a.com], gateways: [other/g, g.other.svc.cluster.local, mesh], http: [{redirect: {uri: /}}]}"
                )
            ),
            concat!(
                service!("s", "{ports: [{port: 80}]}"),
                doc!("multicluster.x-k8s.io/v1alpha1", "ServiceExport", "s", "{}")
            ),
        ],
    ),
    case(
        "IST0102",
        "Namespace n",
        5,
        &[namespace!("{}")],
        &[namespace!("{istio-injection: disabled}"), namespace!("{istio.io/rev: a}")],
    ),
    case(
        "IST0103",
        "Pod n/p",
        11,
        &[concat!(
            namespace!("{istio-injection: enabled}"),
            pod!("p", "{}", "{containers: [{name: app, image: a}]}")
        )],
        &[
            concat!(
                namespace!("{istio-injection: enabled}"),
                pod!(
                    "p",
                    "{}",
                    "{containers: [{name: app, image: a}], initContainers: [{name: istio-proxy, image: b}]}"
                )
            ),
            concat!(
                namespace!("{istio-injection: enabled}"),
                pod!("p", "{sidecar.istio.io/inject: 'false'}", "{containers: []}")
            ),
            concat!(namespace!("{istio-injection: enabled}"), pod!("p", "{}", "{hostNetwork: true}")),
            concat!(namespace!("{}"), pod!("p", "{}", "{containers: []}")),
        ],
    ),
    case(
        "IST0106",
        "VirtualService n/v",
        8,
        &[
            net!("VirtualService", "v", "{hosts: [a]}"),
            concat!(net!("DestinationRule", "d", "{host: a}"), net!("DestinationRule", "d", "{host: b}")),
            "apiVersion: v1\nkind: [\n",
        ],
        &[net!("DestinationRule", "d", "{host: a}")],
    ),
    case(
        "IST0107",
        "Service n/s",
        7,
        &[
            doc!(
                "v1",
                "Service",
                "s",
                "n",
                "annotations: {sidecar.istio.io/logLevel: debug}",
                "{ports: [{port: 80}]}"
            ),
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d, annotations: {sidecar.istio.io/inject: 'true'}}\nspec: {}\n",
        ],
        &[
            doc!(
                "v1",
                "Service",
                "s",
                "n",
                "annotations: {networking.istio.io/exportTo: '.', a.com/b: c}",
                "{ports: [{port: 80}]}"
            ),
            doc!("v1", "Pod", "p", "n", "annotations: {sidecar.istio.io/logLevel: debug}", "{}"),
        ],
    ),
    case(
        "IST0108",
        "Pod n/p",
        7,
        &[
            doc!("v1", "Pod", "p", "n", "annotations: {sidecar.istio.io/loglevel: debug}", "{}"),
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\nspec: {template: {metadata: {annotations: {x.istio.io/y: z}}, spec: {}}}\n",
        ],
        &[doc!("v1", "Pod", "p", "n", "annotations: {sidecar.istio.io/status: debug}", "{}")],
    ),
    case(
        "IST0109",
        "VirtualService n/a",
        5,
        &[
            concat!(
                net!("VirtualService", "a", "{hosts: [x], http: [{redirect: {uri: /}}]}"),
                net!(
                    "VirtualService",
                    "b",
                    "{hosts: [x.n.svc.cluster.local], gateways: [mesh, gw], http: [{redirect: {uri: /}}]}"
                )
            ),
            concat!(
                net!("VirtualService", "a", "{hosts: [x.com], exportTo: [.], http: [{redirect: {uri: /}}]}"),
                net!("VirtualService", "b", "other", "", "{hosts: ['*.com'], http: [{redirect: {uri: /}}]}")
            ),
        ],
        &[
            concat!(
                net!("VirtualService", "a", "{hosts: [x], http: [{redirect: {uri: /}}]}"),
                net!("VirtualService", "b", "{hosts: [x], gateways: [gw], http: [{redirect: {uri: /}}]}")
            ),
            concat!(
                net!("VirtualService", "a", "{hosts: [x.com], exportTo: [.], http: [{redirect: {uri: /}}]}"),
                net!(
                    "VirtualService",
                    "b",
                    "other",
                    "",
                    "{hosts: [x.com], exportTo: [.], http: [{redirect: {uri: /}}]}"
                )
            ),
        ],
    ),
    case(
        "IST0110",
        "Sidecar n/a",
        5,
        &[concat!(
            net!("Sidecar", "a", "{workloadSelector: {labels: {app: x}}, egress: [{hosts: ['./*']}]}"),
            net!("Sidecar", "b", "{workloadSelector: {labels: {version: v1}}, egress: [{hosts: ['./*']}]}"),
            net!("WorkloadEntry", "w", "{address: 10.0.0.1, labels: {app: x, version: v1}}")
        )],
        &[concat!(
            net!("Sidecar", "a", "{workloadSelector: {labels: {app: x}}, egress: [{hosts: ['./*']}]}"),
            net!("Sidecar", "b", "{workloadSelector: {labels: {app: y}}, egress: [{hosts: ['./*']}]}"),
            net!("WorkloadEntry", "w", "{address: 10.0.0.1, labels: {app: x, version: v1}}")
        )],
    ),
    case(
        "IST0111",
        "Sidecar n/a",
        5,
        &[concat!(
            net!("Sidecar", "a", "{egress: [{hosts: ['./*']}]}"),
            net!("Sidecar", "b", "{egress: [{hosts: ['./*']}]}")
        )],
        &[concat!(
            net!("Sidecar", "a", "{egress: [{hosts: ['./*']}]}"),
            net!("Sidecar", "b", "other", "", "{egress: [{hosts: ['./*']}]}")
        )],
    ),
    case(
        "IST0112",
        "VirtualService n/v",
        16,
        &[concat!(
            service!("a", "{ports: [{port: 80, name: http}, {port: 81, name: http-b}]}"),
            net!("VirtualService", "v", "{hosts: [a], http: [{route: [{destination: {host: a}}]}]}")
        )],
        &[
            concat!(
                service!("a", "{ports: [{port: 80, name: http}, {port: 81, name: http-b}]}"),
                net!(
                    "VirtualService",
                    "v",
                    "{hosts: [a], http: [{route: [{destination: {host: a, port: {number: 81}}}]}]}"
                )
            ),
            concat!(
                service!("a", "{ports: [{port: 80}]}"),
                net!("VirtualService", "v", "{hosts: [a], http: [{route: [{destination: {host: a}}]}]}")
            ),
        ],
    ),
    case(
        "IST0116",
        "Deployment n/d",
        5,
        &[concat!(
            deployment!("{app: a, sidecar.istio.io/inject: 'true'}", "{}"),
            service!("s", "{selector: {app: a}, ports: [{port: 80}]}"),
            service!("t", "{selector: {app: a}, ports: [{port: 80, protocol: UDP}]}")
        )],
        &[
            concat!(
                deployment!("{app: a}", "{}"),
                service!("s", "{selector: {app: a}, ports: [{port: 80}]}"),
                service!("t", "{selector: {app: a}, ports: [{port: 80, protocol: UDP}]}")
            ),
            concat!(
                deployment!("{app: a, sidecar.istio.io/inject: 'true'}", "{}"),
                service!("s", "{selector: {app: a}, ports: [{port: 80}]}"),
                service!("t", "{selector: {app: b}, ports: [{port: 80, protocol: UDP}]}")
            ),
        ],
    ),
    case(
        "IST0118",
        "Service n/s",
        8,
        &[service!("s", "{ports: [{port: 80, name: web}]}")],
        &[
            service!("s", "{ports: [{port: 80, name: web, appProtocol: http}]}"),
            service!(
                "s",
                "{ports: [{port: 80, name: GRPC-web-x}, {port: 3306, name: db}, {port: 53, name: d, protocol: UDP}]}"
            ),
        ],
    ),
    case(
        "IST0123",
        "Namespace n",
        6,
        &[namespace!("{istio-injection: enabled, istio.io/rev: a}")],
        &[namespace!("{istio-injection: disabled, istio.io/rev: a}")],
    ),
    case(
        "IST0125",
        "Pod n/p",
        7,
        &[
            doc!("v1", "Pod", "p", "n", "annotations: {sidecar.istio.io/interceptionMode: ALL}", "{}"),
            doc!(
                "v1",
                "Pod",
                "p",
                "n",
                "annotations: {traffic.sidecar.istio.io/excludeInboundPorts: '80,x'}",
                "{}"
            ),
            doc!(
                "v1",
                "Pod",
                "p",
                "n",
                "annotations: {traffic.sidecar.istio.io/includeOutboundIPRanges: 10.0.0.0}",
                "{}"
            ),
            doc!("v1", "Pod", "p", "n", "annotations: {sidecar.istio.io/proxyCPU: lots}", "{}"),
            doc!("v1", "Pod", "p", "n", "annotations: {proxy.istio.io/config: '[a'}", "{}"),
        ],
        &[doc!(
            "v1",
            "Pod",
            "p",
            "n",
            "annotations: {sidecar.istio.io/interceptionMode: TPROXY, traffic.sidecar.istio.io/excludeInboundPorts: '80, 81', traffic.sidecar.istio.io/includeOutboundIPRanges: '*', sidecar.istio.io/proxyCPU: 100m, proxy.istio.io/config: 'concurrency: 2', status.sidecar.istio.io/port: '15020'}",
            "{}"
        )],
    ),
    case(
        "IST0127",
        "AuthorizationPolicy n/p",
        16,
        &[
            concat!(
                pod!("p", "{app: a}", "{}"),
                doc!(
                    "security.istio.io/v1",
                    "AuthorizationPolicy",
                    "p",
                    "{selector: {matchLabels: {app: b}}}"
                )
            ),
            concat!(
                pod!("p", "{app: a}", "{}"),
                doc!("security.istio.io/v1", "AuthorizationPolicy", "p", "other", "", "{}")
            ),
        ],
        &[
            concat!(
                pod!("p", "{app: a}", "{}"),
                doc!(
                    "security.istio.io/v1",
                    "AuthorizationPolicy",
                    "p",
                    "{selector: {matchLabels: {app: a}}}"
                )
            ),
            concat!(
                pod!("p", "{app: a}", "{}"),
                doc!(
                    "security.istio.io/v1",
                    "AuthorizationPolicy",
                    "p",
                    "istio-system",
                    "",
                    "{selector: {matchLabels: {app: a}}}"
                )
            ),
            doc!("security.istio.io/v1", "AuthorizationPolicy", "p", "{selector: {matchLabels: {app: b}}}"),
        ],
    ),
    case(
        "IST0128",
        "DestinationRule n/d",
        8,
        &[net!("DestinationRule", "d", "{host: a.com, trafficPolicy: {tls: {mode: SIMPLE}}}")],
        &[
            net!(
                "DestinationRule",
                "d",
                "{host: a.com, trafficPolicy: {tls: {mode: SIMPLE, caCertificates: /a}}}"
            ),
            net!("DestinationRule", "d", "{host: a.com, trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}}"),
            net!(
                "DestinationRule",
                "d",
                "{host: a.com, workloadSelector: {matchLabels: {a: b}}, trafficPolicy: {tls: {mode: SIMPLE, credentialName: c}}}"
            ),
        ],
    ),
    case(
        "IST0129",
        "DestinationRule n/d",
        8,
        &[net!(
            "DestinationRule",
            "d",
            "{host: a.com, trafficPolicy: {portLevelSettings: [{port: {number: 443}, tls: {mode: SIMPLE}}]}}"
        )],
        &[net!(
            "DestinationRule",
            "d",
            "{host: a.com, trafficPolicy: {portLevelSettings: [{port: {number: 443}, tls: {mode: SIMPLE, caCertificates: /a}}]}}"
        )],
    ),
    case(
        "IST0130",
        "VirtualService n/v",
        8,
        &[net!("VirtualService", "v", "{hosts: [a], http: [{redirect: {uri: /}}, {redirect: {uri: /a}}]}")],
        &[net!(
            "VirtualService",
            "v",
            "{hosts: [a], http: [{match: [{uri: {exact: /}}], redirect: {uri: /b}}, {redirect: {uri: /a}}]}"
        )],
    ),
    case(
        "IST0131",
        "VirtualService n/v",
        8,
        &[net!(
            "VirtualService",
            "v",
            "{hosts: [a], http: [{match: [{uri: {prefix: /a}}], redirect: {uri: /b}}, {match: [{uri: {prefix: /ab}}], redirect: {uri: /a}}]}"
        )],
        &[net!(
            "VirtualService",
            "v",
            "{hosts: [a], http: [{match: [{uri: {prefix: /ab}}], redirect: {uri: /b}}, {match: [{uri: {prefix: /a}}], redirect: {uri: /a}}]}"
        )],
    ),
    case(
        "IST0132",
        "VirtualService n/v",
        16,
        &[
            concat!(
                net!(
                    "Gateway",
                    "g",
                    "{servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: ['*.a.com', other/b.com]}]}"
                ),
                net!("VirtualService", "v", "{hosts: [b.com], gateways: [g], http: [{redirect: {uri: /}}]}")
            ),
            concat!(
                doc!(
                    "gateway.networking.k8s.io/v1",
                    "Gateway",
                    "g",
                    "{gatewayClassName: c, listeners: [{name: a, port: 80, protocol: HTTP, hostname: a.com}]}"
                ),
                net!("VirtualService", "v", "{hosts: [b.com], gateways: [g], http: [{redirect: {uri: /}}]}")
            ),
        ],
        &[
            concat!(
                net!(
                    "Gateway",
                    "g",
                    "{servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: [./b.com]}]}"
                ),
                net!("VirtualService", "v", "{hosts: [b.com], gateways: [g], http: [{redirect: {uri: /}}]}")
            ),
            concat!(
                doc!(
                    "gateway.networking.k8s.io/v1",
                    "Gateway",
                    "g",
                    "{gatewayClassName: c, listeners: [{name: a, port: 80, protocol: HTTP}]}"
                ),
                net!("VirtualService", "v", "{hosts: [b.com], gateways: [g], http: [{redirect: {uri: /}}]}")
            ),
        ],
    ),
    case(
        "IST0133",
        "EnvoyFilter n/f",
        5,
        &[HTTP_FILTER],
        &[service!("s", "{ports: [{port: 80, name: http}]}")],
    ),
    case(
        "IST0134",
        "ServiceEntry n/e",
        8,
        &[net!("ServiceEntry", "e", "{hosts: ['*.a.com'], ports: [{number: 80, name: a, protocol: TCP}]}")],
        &[
            net!("ServiceEntry", "e", "{hosts: [a.com], ports: [{number: 80, name: a, protocol: TCP}]}"),
            net!(
                "ServiceEntry",
                "e",
                "{hosts: ['*.a.com'], addresses: [10.0.0.0/8], ports: [{number: 80, name: a, protocol: TCP}]}"
            ),
            net!("ServiceEntry", "e", "{hosts: ['*.a.com'], ports: [{number: 80, name: a, protocol: TLS}]}"),
        ],
    ),
    case(
        "IST0135",
        "Pod n/p",
        7,
        &[doc!("v1", "Pod", "p", "n", "annotations: {sidecar.istio.io/inject: 'true'}", "{}")],
        &[
            "apiVersion: v1\nkind: Pod\nmetadata: {name: p, labels: {sidecar.istio.io/inject: 'true'}, annotations: {sidecar.istio.io/inject: 'true'}}\nspec: {}\n",
        ],
    ),
    case(
        "IST0137",
        "Deployment n/d",
        5,
        &[concat!(
            deployment!("{app: a, sidecar.istio.io/inject: 'true'}", "{}"),
            service!("s", "{selector: {app: a}, ports: [{port: 80, targetPort: 8080}]}"),
            service!("t", "{selector: {app: a}, ports: [{port: 8080}]}")
        )],
        &[concat!(
            deployment!("{app: a, sidecar.istio.io/inject: 'true'}", "{}"),
            service!("s", "{selector: {app: a}, ports: [{port: 80, targetPort: 8080}]}"),
            service!("t", "{selector: {app: a}, ports: [{port: 80, targetPort: 8080}]}")
        )],
    ),
    case(
        "IST0138",
        "Gateway n/a",
        5,
        &[concat!(
            net!(
                "Gateway",
                "a",
                "{servers: [{port: {number: 443, name: a, protocol: HTTPS}, hosts: [a.com], tls: {mode: SIMPLE, credentialName: c}}]}"
            ),
            net!(
                "Gateway",
                "b",
                "{servers: [{port: {number: 443, name: a, protocol: HTTPS}, hosts: [b.com], tls: {mode: SIMPLE, credentialName: c}}]}"
            )
        )],
        &[concat!(
            net!(
                "Gateway",
                "a",
                "{selector: {x: a}, servers: [{port: {number: 443, name: a, protocol: HTTPS}, hosts: [a.com], tls: {mode: SIMPLE, credentialName: c}}]}"
            ),
            net!(
                "Gateway",
                "b",
                "{selector: {x: b}, servers: [{port: {number: 443, name: a, protocol: HTTPS}, hosts: [b.com], tls: {mode: SIMPLE, credentialName: c}}]}"
            )
        )],
    ),
    case(
        "IST0140",
        "VirtualService n/edge",
        16,
        &[concat!(
            net!(
                "VirtualService",
                "v",
                "{hosts: [a], http: [{route: [{destination: {host: a, subset: v1}}]}]}"
            ),
            net!(
                "VirtualService",
                "edge",
                "{hosts: [a.com], gateways: [g], http: [{route: [{destination: {host: a}}]}]}"
            )
        )],
        &[concat!(
            net!(
                "VirtualService",
                "v",
                "{hosts: [a], http: [{route: [{destination: {host: a, subset: v1}}]}]}"
            ),
            net!(
                "VirtualService",
                "edge",
                "{hosts: [a.com], gateways: [g], http: [{route: [{destination: {host: a, subset: v1}}]}]}"
            )
        )],
    ),
    case(
        "IST0144",
        "Pod n/p",
        8,
        &[
            pod!("p", "{}", "{securityContext: {runAsUser: 1337}}"),
            deployment!("{}", "{containers: [{name: app, securityContext: {runAsUser: 1337}}]}"),
        ],
        &[pod!(
            "p",
            "{}",
            "{securityContext: {runAsUser: 1000}, containers: [{name: istio-proxy, securityContext: {runAsUser: 1337}}]}"
        )],
    ),
    case(
        "IST0145",
        "Gateway n/a",
        8,
        &[
            concat!(
                net!(
                    "Gateway",
                    "a",
                    "{selector: {x: y}, servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: [a.com]}]}"
                ),
                net!(
                    "Gateway",
                    "b",
                    "{selector: {x: y}, servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: [b.com, a.com]}]}"
                )
            ),
            concat!(
                pod!("p", "{x: y, z: w}", "{}"),
                net!(
                    "Gateway",
                    "a",
                    "{selector: {x: y}, servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: [a.com]}]}"
                ),
                net!(
                    "Gateway",
                    "b",
                    "{selector: {x: y, z: w}, servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: [a.com]}]}"
                )
            ),
        ],
        &[
            concat!(
                net!(
                    "Gateway",
                    "a",
                    "{selector: {x: y}, servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: [a.com]}]}"
                ),
                net!(
                    "Gateway",
                    "b",
                    "{selector: {x: y}, servers: [{port: {number: 81, name: a, protocol: HTTP}, hosts: [a.com]}]}"
                )
            ),
            concat!(
                net!(
                    "Gateway",
                    "a",
                    "{selector: {x: y}, servers: [{port: {number: 80, name: a, protocol: HTTP}, bind: 10.0.0.1, hosts: [a.com]}]}"
                ),
                net!(
                    "Gateway",
                    "b",
                    "{selector: {x: y}, servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: [a.com]}]}"
                )
            ),
            concat!(
                net!(
                    "Gateway",
                    "a",
                    "{selector: {x: y}, servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: [a.com]}]}"
                ),
                net!(
                    "Gateway",
                    "b",
                    "{selector: {x: z}, servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: [a.com]}]}"
                )
            ),
        ],
    ),
    case(
        "IST0146",
        "Deployment n/d",
        10,
        &[deployment!("{}", "{containers: [{name: istio-proxy, image: auto}]}")],
        &[
            concat!(
                namespace!("{istio-injection: enabled}"),
                deployment!("{}", "{containers: [{name: istio-proxy, image: auto}]}")
            ),
            deployment!(
                "{sidecar.istio.io/inject: 'true'}",
                "{containers: [{name: istio-proxy, image: auto}]}"
            ),
            deployment!("{}", "{containers: [{name: app, image: auto}]}"),
        ],
    ),
    case(
        "IST0147",
        "Pod n/p",
        8,
        &[pod!("p", "{}", "{containers: [{name: istio-proxy, image: auto}]}")],
        &[pod!("p", "{}", "{containers: [{name: istio-proxy, image: proxy}]}")],
    ),
    case(
        "IST0149",
        "VirtualService n/v",
        24,
        &[concat!(
            pod!("p", "{app: gw}", "{}"),
            net!(
                "Gateway",
                "g",
                "{selector: {app: gw}, servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: ['*']}]}"
            ),
            net!(
                "VirtualService",
                "v",
                "{hosts: [a], gateways: [g], http: [{match: [{headers: {'@request.auth.claims.sub': {exact: x}}}], redirect: {uri: /}}]}"
            )
        )],
        &[concat!(
            pod!("p", "{app: gw}", "{}"),
            doc!(
                "security.istio.io/v1",
                "RequestAuthentication",
                "r",
                "{selector: {matchLabels: {app: gw}}, jwtRules: [{issuer: a, jwksUri: 'https://a'}]}"
            ),
            net!(
                "Gateway",
                "g",
                "{selector: {app: gw}, servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: ['*']}]}"
            ),
            net!(
                "VirtualService",
                "v",
                "{hosts: [a], gateways: [g], http: [{match: [{headers: {'@request.auth.claims.sub': {exact: x}}}], redirect: {uri: /}}]}"
            )
        )],
    ),
    case(
        "IST0150",
        "Service n/s",
        8,
        &[
            service!("s", "{type: ExternalName, externalName: a.com, ports: [{port: 80, name: web}]}"),
            service!("s", "{type: ExternalName, externalName: a.com, ports: [{port: 80, name: tcp}]}"),
        ],
        &[service!("s", "{type: ExternalName, externalName: a.com, ports: [{port: 80, name: http}]}")],
    ),
    case(
        "IST0151",
        "EnvoyFilter n/f",
        8,
        &[HTTP_FILTER],
        &[
            patch!("10", "{applyTo: HTTP_FILTER, patch: {operation: INSERT_BEFORE, value: {name: a}}}"),
            patch!("0", "{applyTo: HTTP_FILTER, patch: {operation: INSERT_FIRST, value: {name: a}}}"),
            patch!("0", "{applyTo: CLUSTER, patch: {operation: MERGE, value: {name: a}}}"),
        ],
    ),
    case(
        "IST0152",
        "EnvoyFilter n/f",
        8,
        &[patch!("1", "{applyTo: CLUSTER, patch: {operation: REPLACE, value: {name: a}}}")],
        &[patch!("1", "{applyTo: HTTP_FILTER, patch: {operation: REPLACE, value: {name: a}}}")],
    ),
    case(
        "IST0153",
        "EnvoyFilter n/f",
        8,
        &[patch!("1", "{applyTo: HTTP_ROUTE, patch: {operation: ADD, value: {name: a}}}")],
        &[patch!("1", "{applyTo: VIRTUAL_HOST, patch: {operation: ADD, value: {name: a}}}")],
    ),
    case(
        "IST0154",
        "EnvoyFilter n/f",
        8,
        &[patch!("1", "{applyTo: ROUTE_CONFIGURATION, patch: {operation: REMOVE}}")],
        &[patch!("1", "{applyTo: VIRTUAL_HOST, patch: {operation: REMOVE}}")],
    ),
    case(
        "IST0155",
        "EnvoyFilter n/f",
        9,
        &[patch!(
            "0",
            "{applyTo: HTTP_FILTER, match: {proxy: {proxyVersion: '1.*'}}, patch: {operation: INSERT_FIRST, value: {name: a}}}\n  - {applyTo: HTTP_FILTER, patch: {operation: INSERT_BEFORE, value: {name: a}}}"
        )],
        &[HTTP_FILTER],
    ),
    case(
        "IST0157",
        "Telemetry n/t",
        8,
        &[doc!("telemetry.istio.io/v1", "Telemetry", "t", "{accessLogging: [{}]}")],
        &[doc!(
            "telemetry.istio.io/v1",
            "Telemetry",
            "t",
            "{accessLogging: [{disabled: true}, {providers: [{name: a}]}]}"
        )],
    ),
    case(
        "IST0159",
        "Telemetry n/t",
        13,
        &[concat!(
            net!("WorkloadEntry", "w", "{address: 10.0.0.1, labels: {app: x}}"),
            doc!("telemetry.istio.io/v1", "Telemetry", "t", "{selector: {matchLabels: {app: x}}}"),
            doc!("telemetry.istio.io/v1", "Telemetry", "u", "{selector: {matchLabels: {app: x}}}")
        )],
        &[concat!(
            net!("WorkloadEntry", "w", "{address: 10.0.0.1, labels: {app: x}}"),
            doc!("telemetry.istio.io/v1", "Telemetry", "t", "{selector: {matchLabels: {app: x}}}"),
            doc!("telemetry.istio.io/v1", "Telemetry", "u", "{}")
        )],
    ),
    case(
        "IST0160",
        "Telemetry n/t",
        5,
        &[concat!(
            doc!("telemetry.istio.io/v1", "Telemetry", "t", "{}"),
            doc!("telemetry.istio.io/v1", "Telemetry", "u", "{}")
        )],
        &[concat!(
            doc!("telemetry.istio.io/v1", "Telemetry", "t", "{}"),
            doc!("telemetry.istio.io/v1", "Telemetry", "u", "other", "", "{}")
        )],
    ),
    case(
        "IST0161",
        "Gateway n/g",
        8,
        &[concat!(
            net!(
                "Gateway",
                "g",
                "{servers: [{port: {number: 443, name: a, protocol: HTTPS}, hosts: ['*'], tls: {mode: SIMPLE, credentialName: c}}]}"
            ),
            "---\napiVersion: v1\nkind: Secret\nmetadata: {name: c, namespace: n}\nstringData: {tls.crt: hello, tls.key: world}\n"
        )],
        &[concat!(
            net!(
                "Gateway",
                "g",
                "{servers: [{port: {number: 443, name: a, protocol: HTTPS}, hosts: ['*'], tls: {mode: SIMPLE, credentialName: c}}]}"
            ),
            "---\napiVersion: v1\nkind: Secret\nmetadata: {name: c, namespace: n}\nstringData:\n  tls.crt: |\n    -----BEGIN CERTIFICATE-----\n    AA==\n    -----END CERTIFICATE-----\n  tls.key: |\n    -----BEGIN PRIVATE KEY-----\n    AA==\n    -----END PRIVATE KEY-----\n"
        )],
    ),
    case(
        "IST0162",
        "Gateway n/g",
        24,
        &[concat!(
            pod!("p", "{app: gw}", "{}"),
            service!("s", "{selector: {app: gw}, ports: [{port: 80, targetPort: 8080}]}"),
            net!(
                "Gateway",
                "g",
                "{selector: {app: gw}, servers: [{port: {number: 443, name: a, protocol: TCP}, hosts: ['*']}]}"
            )
        )],
        &[concat!(
            pod!("p", "{app: gw}", "{}"),
            service!("s", "{selector: {app: gw}, ports: [{port: 80, targetPort: 8080}]}"),
            net!(
                "Gateway",
                "g",
                "{selector: {app: gw}, servers: [{port: {number: 8080, name: a, protocol: HTTP}, hosts: ['*']}]}"
            )
        )],
    ),
    case(
        "IST0165",
        "VirtualService n/v",
        8,
        &[net!(
            "VirtualService",
            "v",
            "{hosts: [a], gateways: ['n/gw~istio-autogenerated-k8s-gateway~http'], http: [{redirect: {uri: /}}]}"
        )],
        &[net!("VirtualService", "v", "{hosts: [a], gateways: [n/gw], http: [{redirect: {uri: /}}]}")],
    ),
    case(
        "IST0166",
        "AuthorizationPolicy n/p",
        16,
        &[concat!(
            pod!("p", "{gateway.networking.k8s.io/gateway-name: gw}", "{}"),
            doc!(
                "security.istio.io/v1",
                "AuthorizationPolicy",
                "p",
                "{selector: {matchLabels: {gateway.networking.k8s.io/gateway-name: gw}}}"
            )
        )],
        &[concat!(
            pod!("p", "{gateway.networking.k8s.io/gateway-name: gw}", "{}"),
            doc!(
                "security.istio.io/v1",
                "AuthorizationPolicy",
                "p",
                "{targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: gw}]}"
            )
        )],
    ),
    case(
        "IST0171",
        "HTTPRoute n/r",
        9,
        &[
            concat!(
                doc!("gateway.networking.k8s.io/v1", "HTTPRoute", "r", "{}"),
                "status: {parents: [{conditions: [{type: Accepted, status: 'False', reason: NoParent, message: m}]}]}\n"
            ),
            concat!(
                service!("s", "{ports: [{port: 80}]}"),
                "status: {conditions: [{type: istio.io/WaypointBound, status: 'False'}]}\n"
            ),
        ],
        &[concat!(
            doc!("gateway.networking.k8s.io/v1", "HTTPRoute", "r", "{}"),
            "status: {parents: [{conditions: [{type: Accepted, status: 'True'}]}]}\n"
        )],
    ),
    case(
        "IST0173",
        "DestinationRule n/d",
        24,
        &[
            concat!(
                service!("a", "{selector: {app: a}, ports: [{port: 80}]}"),
                net!("WorkloadEntry", "w", "{address: 10.0.0.1, labels: {app: a, version: v1}}"),
                net!("DestinationRule", "d", "{host: a, subsets: [{name: v2, labels: {version: v2}}]}")
            ),
            concat!(
                net!(
                    "ServiceEntry",
                    "e",
                    "{hosts: [a.com], resolution: STATIC, ports: [{number: 80, name: http, protocol: HTTP}], endpoints: [{address: 10.0.0.1, labels: {version: v1}}]}"
                ),
                net!("DestinationRule", "d", "{host: a.com, subsets: [{name: v2, labels: {version: v2}}]}")
            ),
        ],
        &[
            concat!(
                service!("a", "{selector: {app: a}, ports: [{port: 80}]}"),
                net!("WorkloadEntry", "w", "{address: 10.0.0.1, labels: {app: a, version: v1}}"),
                net!(
                    "DestinationRule",
                    "d",
                    "{host: a, subsets: [{name: v1, labels: {version: v1, topology.kubernetes.io/zone: z}}]}"
                )
            ),
            // Its workloads may be in another cluster.
            concat!(
                service!("a", "{selector: {app: a}, ports: [{port: 80}]}"),
                net!("DestinationRule", "d", "{host: a, subsets: [{name: v2, labels: {version: v2}}]}")
            ),
        ],
    ),
    case(
        "IST0174",
        "DestinationRule n/d",
        8,
        &[net!("DestinationRule", "d", "{host: nobody}")],
        &[
            concat!(service!("a", "{ports: [{port: 80}]}"), net!("DestinationRule", "d", "{host: a}")),
            net!("DestinationRule", "d", "{host: '*.local'}"),
            net!("DestinationRule", "d", "{host: a.n.svc.clusterset.local}"),
        ],
    ),
    case(
        "IST0177",
        "ServiceEntry n/a",
        5,
        &[concat!(
            net!("ServiceEntry", "a", "{hosts: [x.com], ports: [{number: 80, name: a, protocol: HTTP}]}"),
            net!(
                "ServiceEntry",
                "b",
                "{hosts: [x.com], exportTo: [.], ports: [{number: 80, name: a, protocol: TCP}]}"
            )
        )],
        &[concat!(
            net!("ServiceEntry", "a", "{hosts: [x.com], ports: [{number: 80, name: a, protocol: HTTP}]}"),
            net!("ServiceEntry", "b", "{hosts: [x.com], ports: [{number: 80, name: a, protocol: http}]}")
        )],
    ),
];

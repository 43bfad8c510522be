//! Codes about VirtualServices and DestinationRules.

use super::{Case, case};

pub(super) const CASES: &[Case] = &[
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
            // Gateways that everybody has are seldom among the documents.
            concat!(
                pod!("p", "{app: a}", "{}"),
                net!(
                    "Gateway",
                    "g",
                    "{selector: {istio: ingressgateway}, servers: [{port: {number: 443, name: a, protocol: HTTPS}, hosts: ['*'], tls: {mode: SIMPLE, credentialName: c}}]}"
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
                doc!("multicluster.x-k8s.io/v1alpha1", "ServiceExport", "a", "{}"),
                net!("WorkloadEntry", "w", "{address: 10.0.0.1, labels: {app: a, version: v1}}"),
                net!("DestinationRule", "d", "{host: a, subsets: [{name: v2, labels: {version: v2}}]}")
            ),
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
];

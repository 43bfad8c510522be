//! Codes about Gateways, ServiceEntries, EnvoyFilters, and kinds that select workloads.

use super::{Case, HTTP_FILTER, case};

pub(super) const CASES: &[Case] = &[
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
            // A pod that says nothing of itself is one.
            concat!(
                "---\napiVersion: v1\nkind: Pod\nmetadata: {name: p, labels: {app: a}}\n",
                doc!(
                    "security.istio.io/v1",
                    "AuthorizationPolicy",
                    "p",
                    "{selector: {matchLabels: {app: a}}}"
                )
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
        &[
            concat!(
                net!(
                    "Gateway",
                    "g",
                    "{servers: [{port: {number: 443, name: a, protocol: HTTPS}, hosts: ['*'], tls: {mode: SIMPLE, credentialName: c}}]}"
                ),
                "---\napiVersion: v1\nkind: Secret\nmetadata: {name: c, namespace: n}\nstringData: {tls.crt: hello, tls.key: world}\n"
            ),
            concat!(
                net!(
                    "Gateway",
                    "g",
                    "{servers: [{port: {number: 443, name: a, protocol: HTTPS}, hosts: ['*'], tls: {mode: SIMPLE, credentialName: c}}]}"
                ),
                // A sequence that is shorter than it says.
                "---\napiVersion: v1\nkind: Secret\nmetadata: {name: c, namespace: istio-system}\nstringData:\n  tls.crt: |\n    -----BEGIN CERTIFICATE-----\n    MAE=\n    -----END CERTIFICATE-----\n  tls.key: |\n    -----BEGIN PRIVATE KEY-----\n    MAA=\n    -----END PRIVATE KEY-----\n"
            ),
        ],
        &[concat!(
            net!(
                "Gateway",
                "g",
                "{servers: [{port: {number: 443, name: a, protocol: HTTPS}, hosts: ['*'], tls: {mode: SIMPLE, credentialName: c}}]}"
            ),
            "---\napiVersion: v1\nkind: Secret\nmetadata: {name: c, namespace: n}\nstringData:\n  tls.crt: |\n    -----BEGIN CERTIFICATE-----\n    MAA=\n    -----END CERTIFICATE-----\n  tls.key: |\n    -----BEGIN EC PARAMETERS-----\n    BgA=\n    -----END EC PARAMETERS-----\n    -----BEGIN EC PRIVATE KEY-----\n    MIEA\n    -----END EC PRIVATE KEY-----\n"
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

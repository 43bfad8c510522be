//! Codes about single documents, annotations, namespaces, pods and Services.

use super::{Case, HTTP_FILTER, case};

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
            doc!(
                "rbac.istio.io/v1alpha1",
                "ServiceRole",
                "r",
                "{rules: [{services: ['*'], methods: [GET]}]}"
            ),
        ],
        &[net!(
            "VirtualService",
            "v",
            "{hosts: [a], http: [{fault: {delay: {percentage: {value: 10}, fixedDelay: 1s}}, redirect: {uri: /}}]}"
        )],
    ),
    case(
        "IST0102",
        "Namespace n",
        5,
        &[namespace!("{}")],
        &[namespace!("{istio-injection: disabled}"), namespace!("{istio.io/rev: a}")],
    ),
    case(
        "IST0120",
        "Policy n/p",
        8,
        &[doc!(
            "authentication.istio.io/v1alpha1",
            "Policy",
            "p",
            "{targets: [{name: a}], peers: [{mtls: {}}]}"
        )],
        &[doc!("security.istio.io/v1", "PeerAuthentication", "p", "{mtls: {mode: STRICT}}")],
    ),
    case(
        "IST0121",
        "MeshPolicy default",
        8,
        &[doc!("authentication.istio.io/v1alpha1", "MeshPolicy", "default", "{peers: [{mtls: {}}]}")],
        &[doc!("security.istio.io/v1", "PeerAuthentication", "default", "{mtls: {mode: STRICT}}")],
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
        "IST0133",
        "EnvoyFilter n/f",
        4,
        &[
            "apiVersion: networking.istio.io/v1alpha3\nkind: EnvoyFilter\nmetadata: {name: f, namespace: n}\nspec: {configPatches: [{applyTo: BOOTSTRAP, patch: {operation: MERGE, value: {}}}]}\n",
        ],
        &[service!("s", "{ports: [{port: 80, name: http}]}"), HTTP_FILTER],
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
            concat!(
                doc!("security.istio.io/v1", "AuthorizationPolicy", "p", "{}"),
                "status: {conditions: [{type: WaypointAccepted, status: 'True', reason: PartiallyInvalid}]}\n"
            ),
        ],
        &[concat!(
            doc!("gateway.networking.k8s.io/v1", "HTTPRoute", "r", "{}"),
            "status: {parents: [{conditions: [{type: Accepted, status: 'True'}]}]}\n"
        )],
    ),
];

//! Fields whose effect is not in an answer or a proxy's configuration, and the tests that hold them.

use std::path::{Path, PathBuf};

/// Field and test, as `file::name`.
pub(crate) const TESTS: &[(&str, &str)] = &[
    (
        "MeshConfig.extensionProviders[].prometheus",
        "sidecar/proxy/tests/integration/resilience.rs::connect_failures_go_to_another_host",
    ),
    (
        "MeshConfig.serviceSettings[].hosts",
        "pilot/src/generate/tests/mesh.rs::services_of_their_cluster_alone",
    ),
    (
        "MeshConfig.serviceSettings[].settings.clusterLocal",
        "pilot/src/generate/tests/mesh.rs::services_of_their_cluster_alone",
    ),
    (
        "MeshConfig.transport",
        "pilot/src/generate/tests/gateways.rs::east_west_forwards_only_what_is_exported",
    ),
    ("MeshConfig.caCertificates[].pem", "multicluster/src/bundle/declared.rs::certificates_of_mesh_config"),
    (
        "MeshConfig.caCertificates[].spiffeBundleUrl",
        "multicluster/src/bundle/declared.rs::certificates_of_mesh_config",
    ),
    (
        "MeshConfig.caCertificates[].trustDomains",
        "multicluster/src/bundle/declared.rs::certificates_of_mesh_config",
    ),
    (
        "MeshConfig.extensionProviders[].datadog.service",
        "pilot/src/generate/tests/telemetry.rs::spans_of_envoys",
    ),
    (
        "MeshConfig.extensionProviders[].datadog.port",
        "pilot/src/generate/tests/telemetry.rs::spans_of_envoys",
    ),
    (
        "MeshConfig.extensionProviders[].datadog.maxTagLength",
        "pilot/src/generate/tests/telemetry.rs::spans_of_envoys",
    ),
    (
        "MeshConfig.extensionProviders[].skywalking.service",
        "pilot/src/generate/tests/telemetry.rs::spans_of_envoys",
    ),
    (
        "MeshConfig.extensionProviders[].skywalking.port",
        "pilot/src/generate/tests/telemetry.rs::spans_of_envoys",
    ),
    (
        "MeshConfig.extensionProviders[].zipkin.headers[].envName",
        "pilot/src/generate/tests/telemetry.rs::values_of_the_environment",
    ),
    ("MeshConfig.defaultConfig.tracing.datadog", "pilot/src/generate/tests/telemetry.rs::addresses_of_old"),
    ("MeshConfig.defaultConfig.tracing.enableIstioTags", "pilot/src/generate/tests/telemetry.rs::tags"),
    ("ProxyConfig.concurrency", "pilot/src/source/tests/process.rs::the_nearest_who_says_something_counts"),
    (
        "MeshConfig.defaultConfig.concurrency",
        "sidecar/agent/tests/integration/process.rs::a_process_starts_with_what_the_mesh_says_and_again_without_a_control_plane",
    ),
    (
        "MeshConfig.defaultConfig.statusPort",
        "sidecar/agent/tests/integration/process.rs::a_process_starts_with_what_the_mesh_says_and_again_without_a_control_plane",
    ),
    (
        "MeshConfig.defaultConfig.proxyAdminPort",
        "sidecar/agent/tests/integration/process.rs::a_process_starts_with_what_the_mesh_says_and_again_without_a_control_plane",
    ),
    (
        "MeshConfig.defaultConfig.drainDuration",
        "sidecar/agent/tests/integration/process.rs::times_hold_at_once_and_threads_after_a_restart",
    ),
    (
        "MeshConfig.defaultConfig.parentShutdownDuration",
        "sidecar/agent/src/process.rs::times_of_a_handover_likewise",
    ),
    (
        "MeshConfig.defaultConfig.terminationDrainDuration",
        "sidecar/agent/tests/integration/process.rs::times_hold_at_once_and_threads_after_a_restart",
    ),
    (
        "MeshConfig.defaultConfig.connectionSettings.globalDownstreamConnectionLimit",
        "sidecar/proxy/tests/integration/config.rs::connections_beyond_the_limit_of_all_workers_are_closed",
    ),
    ("EnvoyFilter.configPatches[].match.listener.name", "pilot/xds/src/patch/tests/listeners.rs::listeners"),
    (
        "EnvoyFilter.configPatches[].match.listener.portNumber",
        "pilot/xds/src/patch/tests/listeners.rs::listeners",
    ),
    (
        "EnvoyFilter.configPatches[].match.listener.listenerFilter",
        "pilot/xds/src/patch/tests/listeners.rs::listeners",
    ),
    (
        "EnvoyFilter.configPatches[].match.listener.filterChain.name",
        "pilot/xds/src/patch/tests/listeners.rs::listeners",
    ),
    (
        "EnvoyFilter.configPatches[].match.listener.filterChain.sni",
        "pilot/xds/src/patch/tests/listeners.rs::listeners",
    ),
    (
        "EnvoyFilter.configPatches[].match.listener.filterChain.transportProtocol",
        "pilot/xds/src/patch/tests/listeners.rs::listeners",
    ),
    (
        "EnvoyFilter.configPatches[].match.listener.filterChain.applicationProtocols",
        "pilot/xds/src/patch/tests/listeners.rs::listeners",
    ),
    (
        "EnvoyFilter.configPatches[].match.listener.filterChain.destinationPort",
        "pilot/xds/src/patch/tests/listeners.rs::listeners",
    ),
    (
        "EnvoyFilter.configPatches[].match.listener.filterChain.transportSocket",
        "pilot/xds/src/patch/tests/listeners.rs::listeners",
    ),
    (
        "EnvoyFilter.configPatches[].match.listener.filterChain.filter.name",
        "pilot/xds/src/patch/tests/listeners.rs::listeners",
    ),
    (
        "EnvoyFilter.configPatches[].match.listener.filterChain.filter.subFilter.name",
        "pilot/xds/src/patch/tests/listeners.rs::listeners",
    ),
    (
        "EnvoyFilter.configPatches[].match.routeConfiguration.name",
        "pilot/xds/src/patch/tests/routes.rs::routes",
    ),
    (
        "EnvoyFilter.configPatches[].match.routeConfiguration.portNumber",
        "pilot/xds/src/patch/tests/routes.rs::routes",
    ),
    (
        "EnvoyFilter.configPatches[].match.routeConfiguration.portName",
        "pilot/xds/src/patch/tests/routes.rs::routes",
    ),
    (
        "EnvoyFilter.configPatches[].match.routeConfiguration.gateway",
        "pilot/xds/src/patch/tests/routes.rs::routes",
    ),
    (
        "EnvoyFilter.configPatches[].match.routeConfiguration.vhost.name",
        "pilot/xds/src/patch/tests/routes.rs::routes",
    ),
    (
        "EnvoyFilter.configPatches[].match.routeConfiguration.vhost.domainName",
        "pilot/xds/src/patch/tests/routes.rs::routes",
    ),
    (
        "EnvoyFilter.configPatches[].match.routeConfiguration.vhost.route.name",
        "pilot/xds/src/patch/tests/routes.rs::routes",
    ),
    (
        "EnvoyFilter.configPatches[].match.routeConfiguration.vhost.route.action",
        "pilot/xds/src/patch/tests/routes.rs::routes",
    ),
    ("EnvoyFilter.configPatches[].match.cluster.name", "pilot/xds/src/patch/tests.rs::clusters"),
    ("EnvoyFilter.configPatches[].match.cluster.portNumber", "pilot/xds/src/patch/tests.rs::clusters"),
    ("EnvoyFilter.configPatches[].match.cluster.service", "pilot/xds/src/patch/tests.rs::clusters"),
    ("EnvoyFilter.configPatches[].match.cluster.subset", "pilot/xds/src/patch/tests.rs::clusters"),
    ("EnvoyFilter.configPatches[].match.context", "pilot/xds/src/patch/tests/listeners.rs::listeners"),
    (
        "EnvoyFilter.configPatches[].patch.filterClass",
        "pilot/xds/src/patch/tests/listeners.rs::filters_have_classes",
    ),
    ("EnvoyFilter.workloadSelector", "pilot/src/generate/tests/patches.rs::who_is_patched"),
    ("EnvoyFilter.targetRefs[]", "pilot/src/generate/tests/patches.rs::who_is_patched"),
    (
        "EnvoyFilter.configPatches[].match.proxy.proxyVersion",
        "pilot/src/generate/tests/patches.rs::who_is_patched",
    ),
    (
        "EnvoyFilter.configPatches[].match.proxy.metadata",
        "pilot/src/generate/tests/patches.rs::who_is_patched",
    ),
    ("EnvoyFilter.priority", "pilot/src/generate/tests/patches.rs::order_of_documents"),
    (
        "WorkloadGroup.metadata.labels",
        "pilot/src/workloads/tests.rs::an_entry_has_the_template_the_groups_metadata_and_its_own",
    ),
    (
        "WorkloadGroup.metadata.annotations",
        "pilot/src/workloads/tests.rs::an_entry_has_the_template_the_groups_metadata_and_its_own",
    ),
    (
        "WorkloadGroup.template",
        "pilot/src/workloads/tests.rs::an_entry_has_the_template_the_groups_metadata_and_its_own",
    ),
    (
        "WorkloadGroup.probe.initialDelaySeconds",
        "sidecar/src/registration/tests.rs::thresholds_periods_and_delays",
    ),
    ("WorkloadGroup.probe.periodSeconds", "sidecar/src/registration/tests.rs::thresholds_periods_and_delays"),
    (
        "WorkloadGroup.probe.successThreshold",
        "sidecar/src/registration/tests.rs::thresholds_periods_and_delays",
    ),
    (
        "WorkloadGroup.probe.failureThreshold",
        "sidecar/src/registration/tests.rs::thresholds_periods_and_delays",
    ),
    (
        "WorkloadGroup.probe.timeoutSeconds",
        "sidecar/src/registration/tests.rs::who_does_not_answer_in_time_fails",
    ),
    (
        "WorkloadGroup.probe.httpGet.path",
        "sidecar/src/registration/tests.rs::a_request_is_what_the_probe_says",
    ),
    (
        "WorkloadGroup.probe.httpGet.port",
        "sidecar/src/registration/tests.rs::a_request_is_what_the_probe_says",
    ),
    (
        "WorkloadGroup.probe.httpGet.host",
        "sidecar/src/registration/tests.rs::a_request_is_what_the_probe_says",
    ),
    (
        "WorkloadGroup.probe.httpGet.httpHeaders[].name",
        "sidecar/src/registration/tests.rs::a_request_is_what_the_probe_says",
    ),
    (
        "WorkloadGroup.probe.httpGet.httpHeaders[].value",
        "sidecar/src/registration/tests.rs::a_request_is_what_the_probe_says",
    ),
    (
        "WorkloadGroup.probe.httpGet.scheme",
        "sidecar/src/registration/tests.rs::https_needs_no_certificate_that_anybody_knows",
    ),
    (
        "WorkloadGroup.probe.tcpSocket.host",
        "sidecar/src/registration/tests.rs::connections_commands_and_the_health_protocol",
    ),
    (
        "WorkloadGroup.probe.tcpSocket.port",
        "sidecar/src/registration/tests.rs::connections_commands_and_the_health_protocol",
    ),
    (
        "WorkloadGroup.probe.exec.command",
        "sidecar/src/registration/tests.rs::connections_commands_and_the_health_protocol",
    ),
    (
        "WorkloadGroup.probe.grpc.port",
        "sidecar/src/registration/tests.rs::connections_commands_and_the_health_protocol",
    ),
    (
        "WorkloadGroup.probe.grpc.service",
        "sidecar/src/registration/tests.rs::connections_commands_and_the_health_protocol",
    ),
];

/// Fields that are for people, and what they say.
pub(crate) const DESCRIPTIVE: &[(&str, &str)] = &[
    ("Gateway.servers[].name", "a name for people; Istio does nothing with it either"),
    ("Gateway.servers[].defaultEndpoint", "Istio has never done anything with it; galley warns"),
    (
        "VirtualService.http[].websocketUpgrade",
        "of 1.0: upgrades are always accepted, as in Istio since; galley warns",
    ),
    ("api/GatewayClass.description", "for people"),
    ("api/L4Route.rules[].name", "for people"),
];

/// Whether there is such a test.
pub(crate) fn exists(test: &str) -> bool {
    let Some((file, name)) = test.rsplit_once("::") else { return false };
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(file);
    std::fs::read_to_string(path).is_ok_and(|t| t.contains(&format!("fn {name}(")))
}

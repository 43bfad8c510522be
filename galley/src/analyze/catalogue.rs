//! Every code of Istio's analysis: what it means here, or why it means nothing.

use serde::Serialize;

use super::Level;

/// Whether a code is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", tag = "standing", content = "reason")]
pub enum Standing {
    /// It is.
    Told,
    /// It has no meaning here, for this reason.
    NotHere(&'static str),
    /// Istio gave it up.
    Retired(&'static str),
}

/// A code of the analysis.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Code {
    /// Such as `IST0101`.
    pub code: &'static str,
    /// Istio's name for it.
    pub name: &'static str,
    /// How bad it is.
    pub level: Level,
    /// When it is told.
    pub description: &'static str,
    /// Whether it is.
    #[serde(flatten)]
    pub standing: Standing,
}

const fn told(code: &'static str, name: &'static str, level: Level, description: &'static str) -> Code {
    Code { code, name, level, description, standing: Standing::Told }
}

const fn not_here(code: &'static str, name: &'static str, level: Level, reason: &'static str) -> Code {
    Code { code, name, level, description: "", standing: Standing::NotHere(reason) }
}

const fn retired(code: &'static str, name: &'static str, reason: &'static str) -> Code {
    Code { code, name, level: Level::Info, description: "", standing: Standing::Retired(reason) }
}

use Level::{Error, Info, Warning};

const NO_INSTALL: &str = "Flotilla is not installed into Kubernetes by an operator";
const NO_AMBIENT: &str = "there is no ambient mode";
const NO_CRDS: &str = "documents are read as they are, whatever definitions a cluster has";

/// Every code, in order.
static CODES: &[Code] = &[
    not_here(
        "IST0001",
        "InternalError",
        Error,
        "a fault of the analysis is an error of the command, with exit code 2",
    ),
    told("IST0002", "Deprecated", Warning, "a field or kind is deprecated or without effect"),
    told(
        "IST0101",
        "ReferencedResourceNotFound",
        Error,
        "a host, port, subset, gateway, selector, secret, namespace, delegate or exported service does not exist",
    ),
    told("IST0102", "NamespaceNotInjected", Info, "a Namespace does not say whether its pods get a sidecar"),
    told(
        "IST0103",
        "PodMissingProxy",
        Warning,
        "a Pod of a namespace that is enabled for injection has no proxy",
    ),
    retired("IST0104", "GatewayPortNotOnWorkload", "now IST0162"),
    retired("IST0105", "IstioProxyImageMismatch", "now IST0158"),
    told("IST0106", "SchemaValidationError", Error, "`flotilla validate` refuses the document"),
    told(
        "IST0107",
        "MisplacedAnnotation",
        Warning,
        "an annotation of Istio is on a kind where it has no effect",
    ),
    told("IST0108", "UnknownAnnotation", Warning, "an annotation of Istio's domain does not exist"),
    told(
        "IST0109",
        "ConflictingMeshGatewayVirtualServiceHosts",
        Error,
        "two VirtualServices of the mesh have the same host",
    ),
    told("IST0110", "ConflictingSidecarWorkloadSelectors", Error, "two Sidecars select the same workload"),
    told(
        "IST0111",
        "MultipleSidecarsWithoutWorkloadSelectors",
        Error,
        "a namespace has two Sidecars without selector",
    ),
    told(
        "IST0112",
        "VirtualServiceDestinationPortSelectorRequired",
        Error,
        "a route to a service of several ports names none",
    ),
    retired(
        "IST0113",
        "MTLSPolicyConflict",
        "was about policies of authentication.istio.io beside DestinationRules; Istio gave it up with them",
    ),
    retired(
        "IST0114",
        "PolicySpecifiesPortNameThatDoesntExist",
        "was about policies of authentication.istio.io, a group that is gone",
    ),
    retired(
        "IST0115",
        "DestinationRuleUsesMTLSForWorkloadWithoutSidecar",
        "mTLS is automatic: it is used where both sides have a sidecar",
    ),
    told(
        "IST0116",
        "DeploymentAssociatedToMultipleServices",
        Warning,
        "Services of a Deployment have one port with different protocols",
    ),
    retired("IST0117", "DeploymentRequiresServiceAssociated", "a Deployment without Service is fine"),
    told(
        "IST0118",
        "PortNameIsNotUnderNamingConvention",
        Info,
        "a port's name says no protocol, so that it is detected",
    ),
    retired(
        "IST0119",
        "JwtFailureDueToInvalidServicePortPrefix",
        "was about policies of authentication.istio.io, a group that is gone",
    ),
    told(
        "IST0120",
        "PolicyResourceIsDeprecated",
        Info,
        "there is a Policy of authentication.istio.io, which newer kinds have taken the place of",
    ),
    told(
        "IST0121",
        "MeshPolicyResourceIsDeprecated",
        Info,
        "there is a MeshPolicy of authentication.istio.io, which newer kinds have taken the place of",
    ),
    retired("IST0122", "InvalidRegexp", "a regular expression that is none is refused, which is IST0106"),
    told(
        "IST0123",
        "NamespaceMultipleInjectionLabels",
        Warning,
        "a Namespace has labels that contradict each other about injection",
    ),
    told("IST0125", "InvalidAnnotation", Warning, "the value of an annotation of Istio is not valid"),
    not_here(
        "IST0126",
        "UnknownMeshNetworksServiceRegistry",
        Error,
        "there is no MeshNetworks: members announce their gateways",
    ),
    told("IST0127", "NoMatchingWorkloadsFound", Warning, "an AuthorizationPolicy is for no workload"),
    told(
        "IST0128",
        "NoServerCertificateVerificationDestinationLevel",
        Warning,
        "a DestinationRule's TLS names no roots",
    ),
    told(
        "IST0129",
        "NoServerCertificateVerificationPortLevel",
        Warning,
        "a DestinationRule's TLS of a port names no roots",
    ),
    told("IST0130", "VirtualServiceUnreachableRule", Warning, "a rule of a VirtualService is never reached"),
    told("IST0131", "VirtualServiceIneffectiveMatch", Info, "a match of a VirtualService is without effect"),
    told(
        "IST0132",
        "VirtualServiceHostNotFoundInGateway",
        Warning,
        "no host of a VirtualService is one of its Gateway's",
    ),
    told("IST0133", "SchemaWarning", Warning, "`flotilla validate` warns about the document"),
    told(
        "IST0134",
        "ServiceEntryAddressesRequired",
        Warning,
        "a ServiceEntry for TCP has no address, and none can be assigned to a wildcard",
    ),
    told("IST0135", "DeprecatedAnnotation", Info, "an annotation of Istio is deprecated"),
    not_here(
        "IST0136",
        "AlphaAnnotation",
        Info,
        "none of Istio's own checks tells it: nearly every annotation is alpha",
    ),
    told(
        "IST0137",
        "DeploymentConflictingPorts",
        Warning,
        "Services of a Deployment lead different ports to the same target port",
    ),
    told(
        "IST0138",
        "GatewayDuplicateCertificate",
        Warning,
        "Gateways of one proxy share a certificate, so that clients reuse connections across them",
    ),
    not_here("IST0139", "InvalidWebhook", Error, "there are no webhooks"),
    told(
        "IST0140",
        "IngressRouteRulesNotAffected",
        Warning,
        "a route of a gateway names no subset where another VirtualService of the host does",
    ),
    not_here("IST0141", "InsufficientPermissions", Error, NO_INSTALL),
    not_here("IST0142", "UnsupportedKubernetesVersion", Error, NO_INSTALL),
    not_here(
        "IST0143",
        "LocalhostListener",
        Error,
        "needs the sockets of running pods, which documents do not have",
    ),
    told("IST0144", "InvalidApplicationUID", Warning, "an application runs as the proxy's user, 1337"),
    told("IST0145", "ConflictingGateways", Error, "Gateways of one proxy have the same port and host"),
    told(
        "IST0146",
        "ImageAutoWithoutInjectionWarning",
        Warning,
        "a Deployment with `image: auto` is not enabled for injection",
    ),
    told(
        "IST0147",
        "ImageAutoWithoutInjectionError",
        Error,
        "a Pod has `image: auto`, which injection would have replaced",
    ),
    not_here(
        "IST0148",
        "NamespaceInjectionEnabledByDefault",
        Info,
        "there is no setting that injects everywhere",
    ),
    told(
        "IST0149",
        "JwtClaimBasedRoutingWithoutRequestAuthN",
        Error,
        "a route by a token's claims is at a gateway whose workloads read no tokens",
    ),
    told(
        "IST0150",
        "ExternalNameServiceTypeInvalidPortName",
        Warning,
        "a port of an ExternalName Service says no protocol",
    ),
    told(
        "IST0151",
        "EnvoyFilterUsesRelativeOperation",
        Warning,
        "an EnvoyFilter without priority depends on the order of others",
    ),
    told(
        "IST0152",
        "EnvoyFilterUsesReplaceOperationIncorrectly",
        Error,
        "REPLACE of an EnvoyFilter is for filters and virtual hosts",
    ),
    told(
        "IST0153",
        "EnvoyFilterUsesAddOperationIncorrectly",
        Error,
        "ADD of an EnvoyFilter has no effect on routes",
    ),
    told(
        "IST0154",
        "EnvoyFilterUsesRemoveOperationIncorrectly",
        Error,
        "REMOVE of an EnvoyFilter has no effect on routes",
    ),
    told(
        "IST0155",
        "EnvoyFilterUsesRelativeOperationWithProxyVersion",
        Warning,
        "as IST0151, where another filter of the name is for some versions of the proxy",
    ),
    not_here("IST0156", "UnsupportedGatewayAPIVersion", Error, NO_CRDS),
    told("IST0157", "InvalidTelemetryProvider", Warning, "the access log of a Telemetry goes nowhere"),
    not_here(
        "IST0158",
        "PodsIstioProxyImageMismatchInNamespace",
        Warning,
        "there is no injection, so that no image is expected",
    ),
    told(
        "IST0159",
        "ConflictingTelemetryWorkloadSelectors",
        Error,
        "two Telemetries select the same workload",
    ),
    told(
        "IST0160",
        "MultipleTelemetriesWithoutWorkloadSelectors",
        Error,
        "a namespace has two Telemetries without selector",
    ),
    told(
        "IST0161",
        "InvalidGatewayCredential",
        Error,
        "the secret of a Gateway holds no certificate and key",
    ),
    told("IST0162", "GatewayPortNotDefinedOnService", Warning, "no Service leads to a port of a Gateway"),
    not_here("IST0163", "InvalidExternalControlPlaneConfig", Warning, NO_INSTALL),
    not_here("IST0164", "ExternalControlPlaneAddressIsNotAHostname", Info, NO_INSTALL),
    told(
        "IST0165",
        "ReferencedInternalGateway",
        Warning,
        "a VirtualService names a Gateway that the Gateway API makes",
    ),
    told(
        "IST0166",
        "IneffectiveSelector",
        Warning,
        "a policy selects a Gateway of the Gateway API, which needs targetRefs",
    ),
    not_here("IST0167", "IneffectivePolicy", Warning, NO_AMBIENT),
    not_here("IST0168", "UnknownUpgradeCompatibility", Warning, NO_INSTALL),
    not_here("IST0169", "UpdateIncompatibility", Warning, NO_INSTALL),
    not_here(
        "IST0170",
        "MultiClusterInconsistentService",
        Warning,
        "members compare what they export, and tell the owners of exports that contradict each other",
    ),
    told(
        "IST0171",
        "NegativeConditionStatus",
        Warning,
        "a condition in the document's status says that it was not accepted",
    ),
    not_here("IST0172", "FutureUnsupportedGatewayAPIVersion", Warning, NO_CRDS),
    told(
        "IST0173",
        "DestinationRuleSubsetNotSelectPods",
        Error,
        "a subset selects no workload of its service",
    ),
    told(
        "IST0174",
        "UnknownDestinationRuleHost",
        Warning,
        "a DestinationRule is for a host that does not exist",
    ),
    not_here("IST0175", "JwksUriFetchUnrestricted", Warning, "a setting of istiod's environment"),
    not_here("IST0176", "GatewayAPICRDVersionBelowMinimum", Warning, NO_CRDS),
    told(
        "IST0177",
        "ConflictingServiceEntryProtocol",
        Warning,
        "ServiceEntries have the same host and port with different protocols",
    ),
];

/// Every code of Istio's analysis, in order.
#[must_use]
pub fn catalogue() -> &'static [Code] {
    CODES
}

pub(super) fn is_code(code: &str) -> bool {
    find(code).is_some()
}

pub(super) fn find(code: &str) -> Option<&'static Code> {
    let i = CODES.binary_search_by(|c| c.code.cmp(code)).ok()?;
    CODES.get(i)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_in_order_and_unique() {
        assert!(CODES.windows(2).all(|w| w[0].code < w[1].code));
        assert!(CODES.iter().all(|c| (c.standing == Standing::Told) != c.description.is_empty()));
        assert_eq!(find("IST0101").map(|c| c.name), Some("ReferencedResourceNotFound"));
        assert!(!is_code("IST0100"));
    }
}

//! What members of the federation tell each other, as data.
//!
//! Pilot publishes [`ExportedService`] records of its own cluster; the federation component sends
//! them to peers and publishes [`ImportedService`] and [`PeerCluster`] records, which pilot turns
//! into endpoints behind gateways. Cost follows exports: there are weights here, never pods.

use std::{collections::BTreeSet, net::SocketAddr};

use serde::{Deserialize, Serialize};

use crate::{
    ClusterId, Locality, NetworkId, TrustDomain,
    registry::{Labels, ServicePort},
};

/// A service that a cluster offers to its peers.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExportedService {
    /// Service name; with `namespace` it is the same service in every cluster (MCS sameness).
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Host in the exporting cluster, such as `ratings.books.svc.cluster.local`.
    pub host: String,
    /// Ports, in declared order.
    pub ports: Vec<ServicePort>,
    /// Headless services export names, not a VIP.
    #[serde(default)]
    pub headless: bool,
    /// Distinct label sets of its endpoints with their healthy weights, so that an importer's
    /// subsets select without knowing pods.
    pub groups: Vec<EndpointGroup>,
    /// Accounts its workloads run as; callers verify them.
    pub service_accounts: Vec<String>,
    /// Seconds since the epoch at which it was exported; the oldest export wins a conflict.
    pub exported_at: u64,
}

/// Which peers an export is for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Audience {
    /// Every member of the mesh.
    #[default]
    All,
    /// These alone.
    Only(BTreeSet<ClusterId>),
    /// Everybody else.
    Except(BTreeSet<ClusterId>),
}

impl Audience {
    /// Whether `peer` may know of the export.
    #[must_use]
    pub fn includes(&self, peer: &ClusterId) -> bool {
        match self {
            Self::All => true,
            Self::Only(set) => set.contains(peer),
            Self::Except(set) => !set.contains(peer),
        }
    }

    /// Whether it is everybody.
    #[must_use]
    pub fn is_all(&self) -> bool {
        *self == Self::All
    }
}

impl Audience {
    /// Those who are in both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        use Audience::{All, Except, Only};
        match (self, other) {
            (All, a) | (a, All) => a,
            (Only(a), Only(b)) => Only(&a & &b),
            (Except(a), Except(b)) => Except(&a | &b),
            (Only(a), Except(b)) | (Except(b), Only(a)) => Only(&a - &b),
        }
    }

    /// Those who are in either.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        use Audience::{All, Except, Only};
        let except = |set: BTreeSet<ClusterId>| if set.is_empty() { All } else { Except(set) };
        match (self, other) {
            (All, _) | (_, All) => All,
            (Only(a), Only(b)) => Only(&a | &b),
            (Except(a), Except(b)) => except(&a & &b),
            (Only(a), Except(b)) | (Except(b), Only(a)) => except(&b - &a),
        }
    }
}

/// What becomes of a peer's endpoints when its lease lapses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum OnLapse {
    /// They are used as before: for what is better answered by a cluster that cannot be heard than not at all.
    Keep,
    /// They are used when nothing else is left.
    #[default]
    Demote,
    /// They are not used.
    Refuse,
}

impl OnLapse {
    /// From an annotation.
    #[must_use]
    pub fn parse(s: &str) -> Option<Self> {
        match s {
            "keep" => Some(Self::Keep),
            "demote" => Some(Self::Demote),
            "refuse" => Some(Self::Refuse),
            _ => None,
        }
    }

    /// Whether it is what happens unless somebody says otherwise.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Annotation of a ServiceExport: peers that may know of it, separated by commas; `*` is all.
pub const EXPORT_TO: &str = "flotilla.dev/export-to";
/// Annotation of a Service: [`OnLapse`] of what peers export under its name.
pub const ON_LAPSE: &str = "flotilla.dev/on-lapse";

/// What pilot publishes of a service: the record that peers get, and who they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Offer {
    /// What is told.
    #[serde(flatten)]
    pub service: ExportedService,
    /// Who is told.
    #[serde(default, skip_serializing_if = "Audience::is_all")]
    pub audience: Audience,
}

impl From<ExportedService> for Offer {
    fn from(service: ExportedService) -> Self {
        Self { service, audience: Audience::All }
    }
}

/// Endpoints of an exported service that look the same from outside.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointGroup {
    /// Labels that all of them carry.
    pub labels: Labels,
    /// Where they run.
    pub locality: Locality,
    /// Sum of the weights of healthy members; 0 means present but none healthy.
    pub healthy_weight: u32,
    /// Slots that share this weight evenly: callers keep a session to each, so that their requests spread over the
    /// members. None: every session may lead to any member.
    #[serde(default)]
    pub slots: Vec<u32>,
}

/// State of the lease that covers everything imported from a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeaseState {
    /// Renewed within the lease's duration.
    Live,
    /// Lapsed: endpoints are demoted, used only when nothing else is left.
    Lapsed,
}

/// A service imported from one peer.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImportedService {
    /// The peer that exports it.
    pub cluster: ClusterId,
    /// Whether that peer's lease is live.
    pub lease: LeaseState,
    /// What it exports.
    pub service: ExportedService,
    /// What happens to it without a lease; the importer's choice.
    #[serde(default, skip_serializing_if = "OnLapse::is_default")]
    pub on_lapse: OnLapse,
}

/// An export whose definition contradicts an older one of the same service: the older one's counts (MCS API,
/// "Conflict" condition of a ServiceExport).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Conflict {
    /// Namespace of the service.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The cluster whose definition does not count.
    pub loser: ClusterId,
    /// The cluster whose definition counts.
    pub winner: ClusterId,
    /// What contradicts.
    pub reason: ConflictReason,
    /// Both values, as the loser's operator reads it.
    pub message: String,
}

/// What contradicts; in the words of the MCS API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ConflictReason {
    /// Ports of the same name or number differ.
    #[serde(rename = "PortConflict")]
    Port,
    /// One is headless and the other is not.
    #[serde(rename = "TypeConflict")]
    Type,
    /// Something that a newer version knows of.
    #[serde(rename = "Conflict")]
    Other,
}

impl ConflictReason {
    /// As the MCS API writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Port => "PortConflict",
            Self::Type => "TypeConflict",
            Self::Other => "Conflict",
        }
    }

    /// From a peer's words.
    #[must_use]
    pub fn parse(s: &str) -> Self {
        match s {
            "PortConflict" => Self::Port,
            "TypeConflict" => Self::Type,
            _ => Self::Other,
        }
    }
}

/// How gateways of two clusters talk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// TCP with the inner session's SNI, as Istio's east-west gateways.
    Tcp,
    /// QUIC trunk; TCP takes over when UDP does not pass.
    Quic,
}

/// A gateway address that a cluster announces.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewayAddress {
    /// Where peers dial; TCP and UDP on the same number.
    pub address: SocketAddr,
    /// Relative weight among the cluster's gateways.
    pub weight: u32,
}

/// Another member of the federation.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerCluster {
    /// Its ID.
    pub id: ClusterId,
    /// The network its workloads are in.
    pub network: NetworkId,
    /// Its trust domain if that is not the own one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust_domain: Option<TrustDomain>,
    /// Its east-west gateways.
    pub gateways: Vec<GatewayAddress>,
    /// Transports it accepts, preferred first.
    pub transports: Vec<Transport>,
    /// Whether its lease is live.
    pub lease: LeaseState,
}

/// A cluster that was a member and is none. Its certificates may be valid for a while yet.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FormerCluster {
    /// Its ID.
    pub id: ClusterId,
    /// It did not leave by itself.
    pub evicted: bool,
}

/// Roots of a trust domain that this one is federated with, and the clusters that speak for it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ForeignBundle {
    /// The domain.
    pub trust_domain: TrustDomain,
    /// PEM.
    pub roots: String,
    /// Members of it.
    pub clusters: Vec<ClusterId>,
    /// The domain is known by its bundle alone: it has no clusters here, and every certificate of it is accepted that names
    /// none.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub by_bundle: bool,
    /// Only with the roots of the own trust domain, which are told in the same way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own: Option<OwnRoots>,
    /// What the domain's authorities have revoked: empty if that is nothing, else a list of each of them, since some who
    /// verify want one of every issuer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub revoked: Vec<RevocationList>,
}

/// Certificates that their issuer has revoked (RFC 5280 section 5).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RevocationList {
    /// PEM: the certificate of who signed the list, and what lies between it and the root.
    pub issuer: String,
    /// PEM.
    pub list: String,
}

/// What is told of the roots of the own trust domain besides.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OwnRoots {
    /// Number of the bundle.
    pub sequence: u64,
    /// SHA-256 of the cluster's intermediate, hexadecimal: whoever shows a certificate under another one renews.
    pub intermediate: String,
    /// Over how long the proxies of the cluster spread that, milliseconds.
    pub renew_within_ms: u32,
    /// There is a member of whose CA no revocation list is known: some who verify would refuse everybody of it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unlisted: bool,
}

/// Type names of these records on the configuration protocol (MCP over xDS).
pub mod type_url {
    /// [`super::Offer`], served by pilot.
    pub const EXPORTED_SERVICE: &str = "flotilla.dev/v1alpha1/ExportedService";
    /// [`super::ImportedService`], served by the federation component.
    pub const IMPORTED_SERVICE: &str = "flotilla.dev/v1alpha1/ImportedService";
    /// [`super::Conflict`], served by pilot.
    pub const CONFLICT: &str = "flotilla.dev/v1alpha1/Conflict";
    /// [`super::PeerCluster`], served by the federation component.
    pub const PEER_CLUSTER: &str = "flotilla.dev/v1alpha1/PeerCluster";
    /// [`super::ForeignBundle`], served by the federation component.
    pub const FOREIGN_BUNDLE: &str = "flotilla.dev/v1alpha1/ForeignBundle";
    /// [`super::FormerCluster`], served by the federation component.
    pub const FORMER_CLUSTER: &str = "flotilla.dev/v1alpha1/FormerCluster";
}

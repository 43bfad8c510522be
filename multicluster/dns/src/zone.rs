//! The zones that the mesh owns.

use crate::wire;

/// Where a name belongs; labels of metrics, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Zone {
    /// `svc.cluster.local`.
    ClusterLocal,
    /// `clusterset.local`.
    Clusterset,
    /// `global`.
    Global,
    /// One of the others followed by `cluster.local`, as search lists make them.
    Search,
    /// Reverse names that the table has.
    Reverse,
    /// Names of the table outside the zones.
    Listed,
    /// Everything else.
    Foreign,
    /// What was not a question about a name.
    Invalid,
}

impl Zone {
    pub(crate) const ALL: [Self; 8] = [
        Self::ClusterLocal,
        Self::Clusterset,
        Self::Global,
        Self::Search,
        Self::Reverse,
        Self::Listed,
        Self::Foreign,
        Self::Invalid,
    ];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::ClusterLocal => "svc.cluster.local",
            Self::Clusterset => "clusterset.local",
            Self::Global => "global",
            Self::Search => "search",
            Self::Reverse => "reverse",
            Self::Listed => "listed",
            Self::Foreign => "foreign",
            Self::Invalid => "invalid",
        }
    }
}

/// Zones by their labels. Those of search lists are always empty: Kubernetes has nothing but `svc`, `pod`, `dns-version`
/// and its servers right below `cluster.local`, so nobody else is to be asked for
/// `reviews.books.svc.clusterset.local.cluster.local` (as RFC 6303 does for addresses that are nobody's).
const ZONES: [(Zone, &[u8]); 6] = [
    (Zone::ClusterLocal, b"\x03svc\x07cluster\x05local"),
    (Zone::Clusterset, b"\x0aclusterset\x05local"),
    (Zone::Global, b"\x06global"),
    (Zone::Search, b"\x03svc\x07cluster\x05local\x07cluster\x05local"),
    (Zone::Search, b"\x0aclusterset\x05local\x07cluster\x05local"),
    (Zone::Search, b"\x06global\x07cluster\x05local"),
];

/// The zone that a name is in or is, and where in the name it begins.
pub(crate) fn of(name: &[u8]) -> Option<(Zone, usize)> {
    ZONES.into_iter().find_map(|(zone, labels)| Some((zone, wire::offset_in(name, labels)?)))
}

/// Names that exist without any service.
pub(crate) fn always() -> impl Iterator<Item = &'static [u8]> {
    let zones = ZONES.into_iter().map(|(_, labels)| labels);
    zones.chain([&b"\x03svc\x0aclusterset\x05local"[..]])
}

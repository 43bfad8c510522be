//! Rules of TLSRoutes and TCPRoutes. They have no conditions, so the first one is the route.

use mesh_model::authored::{
    Destination, L4MatchAttributes, RouteDestination, TcpRoute, TlsMatchAttributes, TlsRoute,
};

use super::{
    attach::{Route, RouteKind},
    backends::{Referrer, split},
    known::Known,
};

/// A host that nobody has: connections to it are closed.
const NOWHERE: &str = "backend-not-found.invalid";

fn destinations(known: &Known<'_>, r: &Route<'_>, grants: bool) -> Vec<RouteDestination> {
    let (Route::Tls(d) | Route::Tcp(d)) = r else { return vec![] };
    let Some(rule) = d.spec.rules.first() else { return vec![] };
    let from = Referrer { kind: r.kind(), namespace: r.namespace(), grants };
    let shares = split(known, from, &rule.backend_refs, false);
    let to = |(d, weight, _)| RouteDestination { destination: Some(d), weight };
    let lost = i32::try_from(shares.lost).unwrap_or(i32::MAX);
    let mut out: Vec<_> = shares.valid.into_iter().map(to).collect();
    if lost > 0 || out.is_empty() {
        let destination = Some(Destination { host: NOWHERE.to_owned(), ..Destination::default() });
        out.push(RouteDestination { destination, weight: lost.max(1) });
    }
    out
}

/// A TLSRoute where sessions pass, by server name.
pub(super) fn tls(
    known: &Known<'_>,
    r: &Route<'_>,
    names: &[String],
    port: u32,
    grants: bool,
) -> Vec<TlsRoute> {
    if r.kind() != RouteKind::Tls {
        return vec![];
    }
    let matches =
        vec![TlsMatchAttributes { sni_hosts: names.to_vec(), port, ..TlsMatchAttributes::default() }];
    vec![TlsRoute { matches, route: destinations(known, r, grants) }]
}

/// A TCPRoute, or a TLSRoute whose sessions end here.
pub(super) fn tcp(known: &Known<'_>, r: &Route<'_>, port: u32, grants: bool) -> Vec<TcpRoute> {
    let fits = match r.kind() {
        RouteKind::Tcp => true,
        // In the mesh sessions always pass.
        RouteKind::Tls => grants,
        RouteKind::Http | RouteKind::Grpc => false,
    };
    if !fits {
        return vec![];
    }
    let matches =
        if port == 0 { vec![] } else { vec![L4MatchAttributes { port, ..L4MatchAttributes::default() }] };
    vec![TcpRoute { matches, route: destinations(known, r, grants) }]
}

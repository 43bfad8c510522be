//! Clusters.

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use mesh_model::authored::PatchOperation;

use super::{Did, Patch, Res};

/// Direction, port, subset and host of a name such as `outbound|9080|v1|reviews.books.svc.cluster.local`, or of the form
/// that is a server name.
fn parts(name: &str) -> Option<(&str, u32, &str, &str)> {
    let split = |by: &str| {
        let mut p = name.splitn(4, by);
        let all = (p.next()?, p.next()?, p.next()?, p.next()?);
        Some((all.0, all.1.parse().ok()?, all.2, all.3))
    };
    split("|").or_else(|| split("_."))
}

pub(super) fn is_for(p: &Patch, name: &str, services: &[String]) -> bool {
    if p.operation == PatchOperation::Add {
        return false;
    }
    let Some(m) = &p.matches.cluster else { return true };
    if !m.name.is_empty() {
        return m.name == name;
    }
    let (direction, port, subset, host) = parts(name).unwrap_or_default();
    let serves = match direction {
        "inbound" => services.contains(&m.service),
        _ => m.service == host,
    };
    (m.subset.is_empty() || m.subset == subset)
        && (m.service.is_empty() || serves)
        && (m.port_number == 0 || m.port_number == port)
}

pub(super) fn apply(p: &Patch, c: &mut Cluster) -> Res {
    if p.operation == PatchOperation::Remove {
        return Ok(Did::Removed);
    }
    const SOCKET: &str = "transport_socket";
    let Some(socket) = p.value.nested(SOCKET).filter(|_| !c.transport_socket_matches.is_empty()) else {
        p.merge(c)?;
        return Ok(Did::Changed);
    };
    // A socket of the cluster itself would be used beside those that it chooses from, so the one of that name is meant.
    let name = socket.text("name").unwrap_or_default();
    let sockets = c.transport_socket_matches.iter_mut().filter_map(|m| m.transport_socket.as_mut());
    let Some(found) = sockets.into_iter().find(|s| s.name == name) else {
        return Err(format!(
            "transport_socket: the cluster chooses among sockets of which none is called {name:?}"
        ));
    };
    p.merge_tree(socket, found)?;
    p.merge_tree(&p.value.without(SOCKET), c)?;
    Ok(Did::Changed)
}

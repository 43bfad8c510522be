//! What the fuzz targets of `e2e/fuzz` run. It is not part of the product.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use prost::Message as _;

use crate::{
    TypeSnapshot,
    bootstrap::Bootstrap,
    bundles, codec,
    mcp::Document,
    nds::NameTable,
    node::NodeInfo,
    patch::Patch,
    pb, process,
    server::state::{Mode, Session},
    type_url,
};

/// A resource as a control plane sends it, the kind in the first byte: what is understood is written as it was read.
pub fn xds_resources(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    let any = |t: &str| pb::Any { type_url: t.to_owned(), value: Bytes::copy_from_slice(data) };
    macro_rules! same {
        ($t:expr, $decode:path, $encode:path) => {
            if let Ok(read) = $decode(&any($t)) {
                let again = $decode(&$encode(&read)).expect("what we write");
                assert_eq!(format!("{again:?}"), format!("{read:?}"));
            }
        };
    }
    match kind % 8 {
        0 => same!(type_url::LDS, codec::decode_listener, codec::encode_listener),
        1 => same!(type_url::RDS, codec::decode_route, codec::encode_route),
        2 => same!(type_url::CDS, codec::decode_cluster, codec::encode_cluster),
        3 => same!(type_url::EDS, codec::decode_endpoints, codec::encode_endpoints),
        4 => same!(type_url::VHDS, codec::decode_virtual_host, codec::encode_virtual_host),
        5 => {
            if let Ok(read) = codec::decode_secret(&any(type_url::SDS)) {
                assert!(codec::decode_secret(&codec::encode_secret(&read)).is_ok_and(|again| again == read));
            }
        }
        6 => {
            if let Ok(read) = NameTable::decode(data) {
                assert!(NameTable::from_any(&read.to_any()).is_ok_and(|again| again == read));
            }
            let mut a = any("");
            a.type_url = type_url::BUNDLES.to_owned();
            if let Ok(b) = bundles::decode(&a) {
                assert!(bundles::decode(&bundles::encode(&b)).is_ok_and(|again| again == b));
            }
            a.type_url = type_url::PROXY_CONFIG.to_owned();
            if let Ok(p) = process::decode(&a) {
                assert!(process::decode(&process::encode(&p)).is_ok_and(|again| again == p));
            }
        }
        _ => {
            if let Ok(pb) = pb::Any::decode(data)
                && let Ok(d) = Document::from_any(&pb)
            {
                assert!(Document::from_any(&d.to_any()).is_ok_and(|again| again == d));
            }
            let a = Document { name: "n/a".into(), ..Document::default() }.to_any();
            let raw = pb::Any { type_url: a.type_url, value: Bytes::copy_from_slice(data) };
            if let Ok(d) = Document::from_any(&raw) {
                assert!(Document::from_any(&d.to_any()).is_ok_and(|again| again == d));
            }
        }
    }
}

/// Requests of a client, each behind its kind and two bytes of length: the server sends each resource that is wanted once,
/// nothing that is not, and waits for answers.
pub fn xds_requests(data: &[u8]) {
    let snapshot = |t: &str| {
        let resources = ["a", "b", "c"].map(|n| {
            let value = Bytes::from(format!("{t} {n}"));
            (n.to_owned(), pb::Any { type_url: t.to_owned(), value })
        });
        Arc::new(TypeSnapshot::build(resources))
    };
    let world: BTreeMap<&str, Arc<TypeSnapshot>> =
        [type_url::LDS, type_url::RDS, type_url::CDS, type_url::EDS, type_url::VHDS]
            .map(|t| (t, snapshot(t)))
            .into();
    let Some((mode, mut rest)) = data.split_first() else { return };
    let mode = if mode & 1 == 0 { Mode::Sotw } else { Mode::Delta };
    let mut session = Session::new(mode);
    let mut nonce = String::new();
    while let Some(([kind, a, b], next)) = rest.split_first_chunk::<3>() {
        let (one, next) = next.split_at(usize::from(u16::from_be_bytes([*a, *b])).min(next.len()));
        rest = next;
        let went = match mode {
            Mode::Sotw => {
                let Ok(mut r) = pb::DiscoveryRequest::decode(one) else { continue };
                if kind & 1 == 1 {
                    r.response_nonce.clone_from(&nonce);
                }
                let _ = NodeInfo::from_pb(r.node.as_ref());
                session.on_sotw(&r)
            }
            Mode::Delta => {
                let Ok(mut r) = pb::DeltaDiscoveryRequest::decode(one) else { continue };
                if kind & 1 == 1 {
                    r.response_nonce.clone_from(&nonce);
                }
                if let Ok(n) = NodeInfo::from_pb(r.node.as_ref()) {
                    // A node is what it is after it was told on.
                    assert!(NodeInfo::from_pb(Some(&n.to_pb())).is_ok_and(|again| again.id == n.id));
                }
                session.on_delta(&r)
            }
        };
        if went.is_err() {
            return;
        }
        let mut pushes = 0;
        while let Some(p) = session.poll(|t| world.get(t).cloned().unwrap_or_default()) {
            assert!(!p.nonce.is_empty() && p.nonce != nonce);
            assert!(session.awaits(&p.nonce));
            assert!(p.resources.len() <= 3, "three exist");
            nonce.clone_from(&p.nonce);
            pushes += 1;
            assert!(pushes <= 64, "one answer of each type is on its way");
        }
        let _ = (session.status(), session.take_asked());
    }
}

/// A bootstrap file in JSON, and in YAML.
pub fn bootstrap(data: &[u8]) {
    let json = Bootstrap::from_json(data);
    if let Ok(text) = std::str::from_utf8(data) {
        let yaml = Bootstrap::from_yaml(text);
        for problems in [json.as_ref().err(), yaml.as_ref().err()].into_iter().flatten() {
            assert!(!problems.is_empty() && problems.iter().all(|p| !p.is_empty()));
        }
    }
}

/// An `EnvoyFilter`'s patch in JSON, and behind an empty line the message that it is merged into.
pub fn patches(data: &[u8]) {
    let at = data.windows(2).position(|w| w == b"\n\n").unwrap_or(data.len());
    let (patch, message) = (&data[..at], data.get(at + 2..).unwrap_or_default());
    let Ok(p) = serde_json::from_slice(patch) else { return };
    let Ok(p) = Patch::new(&p) else { return };
    let _ = (p.scope(), p.phase(), p.added(), p.added_cluster());
    p.fuzz_merge(message);
}

#[cfg(test)]
#[path = "../../../e2e/fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::{replay::corpus, *};

    #[test]
    fn corpora() {
        corpus("xds_resources", xds_resources);
        corpus("xds_requests", xds_requests);
        corpus("bootstrap", bootstrap);
        corpus("patches", patches);
    }
}

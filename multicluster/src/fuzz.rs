//! What the fuzz targets of `e2e/fuzz` run. It is not part of the product.

use mesh_model::{ClusterId, SpiffeId, TrustDomain};
use prost::Message as _;

use crate::{
    bundle::BundleUrl,
    exchange::{Import, Persisted},
    membership::{Bundle, Membership},
    pb,
    token::JoinToken,
    wire::{self, MAX_RECORD, MAX_SERVICES},
};

/// Records that a peer tells: what is taken is written as it was read.
pub fn federation_records(data: &[u8]) {
    if let Some(s) = pb::Service::decode(data).ok().and_then(|s| wire::service(s).ok()) {
        let again = wire::service(wire::service_pb(&s));
        assert_eq!(again.as_ref(), Ok(&s));
        let other = TrustDomain::new("b.example").expect("a domain");
        if wire::of_domain(&s, Some(&other)).is_ok() {
            let own = |a: &String| SpiffeId::parse(a).is_ok_and(|id| id.domain() == other);
            assert!(s.service_accounts.iter().all(own), "accounts of a third domain");
        }
    }
    if let Some(m) = pb::Member::decode(data).ok().and_then(|m| wire::member(m).ok()) {
        assert_eq!(wire::member(wire::member_pb(&m)), Ok(m));
    }
    if let Some(b) = pb::TrustBundle::decode(data).ok().and_then(|b| Bundle::from_pb(&b).ok()) {
        assert!(Bundle::from_pb(&b.to_pb()).is_ok_and(|again| again.bundle == b.bundle));
    }
}

/// Messages of a stream, each behind one byte of its length.
fn messages<M: prost::Message + Default>(mut data: &[u8]) -> impl Iterator<Item = M> {
    std::iter::from_fn(move || {
        loop {
            let (length, rest) = data.split_first()?;
            let (one, rest) = rest.split_at(usize::from(*length).min(rest.len()));
            data = rest;
            if let Ok(m) = M::decode(one) {
                return Some(m);
            }
        }
    })
}

/// The stream of an exporter, and what it tells of members: the table stays within its limits, and what is kept of it is
/// the same after a restart.
pub fn federation_stream(data: &[u8]) {
    let mut import = Import::new(Persisted::default(), 0, 1000);
    let me = ClusterId::new("west").expect("a cluster");
    let peer = ClusterId::new("east").expect("a cluster");
    let mut members = Membership::new(me.clone(), [].into());
    let mut now = 0;
    for frame in messages::<pb::ExporterFrame>(data) {
        now += 100;
        if let Some(pb::exporter_frame::Frame::Members(m)) = &frame.frame {
            let news: Vec<_> = m.members.iter().filter_map(|m| wire::member(m.clone()).ok()).collect();
            members.hear(&peer, news);
            assert!(members.get(&me).is_none_or(|m| !m.left), "nobody but this cluster leaves for it");
        }
        let step = import.on_frame(now, frame);
        if step.resubscribe {
            import.subscribe();
        }
        import.tick(now);
        assert!(import.services().len() <= MAX_SERVICES);
        assert!(import.services().all(|s| wire::service_pb(s).encoded_len() <= 2 * MAX_RECORD));
        let _ = (import.lag(), import.lease_age(now), import.next_deadline(now), import.refusals());
    }
    let kept = import.persist();
    let again = Import::new(kept, now, 1000);
    assert_eq!(again.services().collect::<Vec<_>>(), import.services().collect::<Vec<_>>());
}

/// Text that an operator or a foreign endpoint gives: a join token, and where a bundle is.
pub fn federation_text(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for raw in [text.to_owned(), crate::token::frame(text)] {
        if let Ok(t) = JoinToken::parse(&raw, 0) {
            assert_eq!(t.secret().len(), 32);
            assert_eq!(JoinToken::parse(&t.encode(), 0), Ok(t));
        }
    }
    if let Ok(url) = BundleUrl::parse(text) {
        assert_eq!(BundleUrl::parse(&url.to_string()).ok(), Some(url));
    }
    if let Ok(to) = BundleUrl::parse("https://b.example:8443/x").expect("a URL").redirected(text) {
        assert!(to.to_string().starts_with("https://"));
    }
}

#[cfg(test)]
#[path = "../../e2e/fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::{replay::corpus, *};

    #[test]
    fn corpora() {
        corpus("federation_records", federation_records);
        corpus("federation_stream", federation_stream);
        corpus("federation_text", federation_text);
    }
}

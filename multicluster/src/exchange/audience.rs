//! Which peers may know of an export.

use mesh_model::{ClusterId, federation::Audience};

/// Those who are in either.
pub(super) fn union(a: &Audience, b: &Audience) -> Audience {
    use Audience::{All, Except, Only};
    match (a, b) {
        (All, _) | (_, All) => All,
        (Only(a), Only(b)) => Only(a.union(b).cloned().collect()),
        (Except(a), Except(b)) => Except(a.intersection(b).cloned().collect()),
        (Only(a), Except(b)) | (Except(b), Only(a)) => Except(b.difference(a).cloned().collect()),
    }
}

/// What an entry's hash adds to the digests of those who see it: to everybody's, and to those of single peers.
pub(super) fn shares(a: &Audience, hash: u64) -> (u64, Vec<(&ClusterId, u64)>) {
    match a {
        Audience::All => (hash, vec![]),
        Audience::Only(set) => (0, set.iter().map(|c| (c, hash)).collect()),
        Audience::Except(set) => (hash, set.iter().map(|c| (c, hash.wrapping_neg())).collect()),
    }
}

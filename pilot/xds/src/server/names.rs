//! Names that many streams hold, once in memory.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

static NAMES: Mutex<Option<Pool>> = Mutex::new(None);

#[derive(Default)]
struct Pool {
    names: HashSet<Arc<str>>,
    /// How many there may be before those that nobody holds are dropped.
    full: usize,
}

/// The name, as others hold it.
pub(super) fn shared(name: &str) -> Arc<str> {
    // A set is whole whatever happens between its calls.
    let mut pool = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    let pool = pool.get_or_insert_with(Pool::default);
    if let Some(known) = pool.names.get(name) {
        return Arc::clone(known);
    }
    if pool.names.len() >= pool.full {
        pool.names.retain(|n| Arc::strong_count(n) > 1);
        pool.full = pool.names.len() * 2 + 1024;
    }
    let name: Arc<str> = name.into();
    pool.names.insert(Arc::clone(&name));
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_there_once_and_go_with_their_holders() {
        let (a, b) = (shared("of-this-test"), shared("of-this-test"));
        assert!(Arc::ptr_eq(&a, &b));
        for n in 0..5000 {
            drop(shared(&format!("of-this-test-{n}")));
        }
        let pool = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
        let left = pool.as_ref().map_or(0, |p| p.names.iter().filter(|n| n.starts_with("of-this")).count());
        assert!(left < 2500, "{left}");
    }
}

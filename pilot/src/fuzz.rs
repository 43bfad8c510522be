//! What the fuzz targets of `e2e/fuzz` run. It is not part of the product.

use crate::{consul, issuers};

/// Answers of Consul and of an issuer of tokens, the kind in the first byte: bounded, in order, and the same again.
pub fn registry_answers(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 2 {
        0 => consul::fuzz(data),
        _ => issuers::fuzz(data),
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
        corpus("registry_answers", registry_answers);
    }
}

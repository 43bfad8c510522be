//! What the fuzz targets of `e2e/fuzz` run. It is not part of the product.

use std::sync::LazyLock;

use mesh_telemetry::attributes::{Bag, Value};

use crate::expr::{Tracked, compile};

static BAG: LazyLock<Bag> = LazyLock::new(|| {
    let mut bag = Bag::default();
    bag.set("source.namespace", "books");
    bag.set("response.code", 200i64);
    bag.set("request.path", "/a/b");
    bag.set("source.ip", Value::Bytes(vec![10, 0, 0, 1]));
    bag.set("request.headers", Value::StringMap([("a".to_owned(), "b".to_owned())].into()));
    bag
});

/// An expression in the words of attributes: compiles or not, has a value or not, and then always the same.
pub fn expressions(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(e) = compile(text) else { return };
    let first = e.eval(&Tracked::new(&BAG));
    assert_eq!(format!("{first:?}"), format!("{:?}", e.eval(&Tracked::new(&BAG))));
    if let Ok(v) = first {
        let _ = (v.to_text(), v.to_json(), v.to_number());
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
        corpus("expressions", expressions);
    }
}

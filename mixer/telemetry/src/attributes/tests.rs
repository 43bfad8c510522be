use proptest::prelude::*;

use super::{
    decode::{decode_report, encode_references, references},
    *,
};
use crate::proto::mixer_v1::{CompressedAttributes, ReferencedAttributes, ReportRequest};

fn bag() -> Bag {
    let mut b = Bag::default();
    b.set("source.namespace", "books");
    b.set("request.headers", BTreeMap::from([("end-user".to_owned(), "jason".to_owned())]));
    b.set("response.code", 200i64);
    b.set("connection.mtls", true);
    b.set("request.time", SystemTime::UNIX_EPOCH + Duration::from_millis(1_500));
    b.set("response.duration", Duration::from_micros(1_234));
    b.set("source.ip", std::net::IpAddr::from([10, 0, 0, 1]));
    b.set("custom.ratio", Value::Double(0.5));
    b
}

#[test]
fn the_word_list_has_no_duplicates_and_its_prefix_is_frozen() {
    let unique: std::collections::HashSet<_> = GLOBAL_WORDS.iter().collect();
    assert_eq!(unique.len(), GLOBAL_WORDS.len());
    // Part of the protocol: a change here breaks proxies of another version.
    assert_eq!(
        (GLOBAL_WORDS[0], GLOBAL_WORDS[40], GLOBAL_WORDS[100]),
        ("source.uid", "request.path", "access-control-allow-origin")
    );
}

#[test]
fn bags_survive_the_wire() {
    let b = bag();
    assert_eq!(decompress(&compress(&b, GLOBAL_WORDS.len())).unwrap(), b);
    // A receiver with a shorter list is sent words.
    let short = compress(&b, 10);
    assert_eq!(decompress(&short).unwrap(), b);
    assert!(short.words.iter().any(|w| w == "response.code"));
    assert!(compress(&b, GLOBAL_WORDS.len()).words.len() < short.words.len());
}

#[test]
fn reports_carry_differences() {
    let (a, mut b) = (bag(), bag());
    b.set("response.code", 503i64);
    let mut e = ReportEncoder::default();
    assert!(e.push(&a) && e.push(&b) && e.push(&b));
    let mut fewer = Bag::default();
    fewer.set("response.code", 1i64);
    assert!(!e.push(&fewer), "an attribute cannot disappear within a report");
    let r = e.finish();
    assert!(e.is_empty());
    assert_eq!(super::encode::names_of(&r.attributes[1]).len(), 1);
    assert_eq!(super::encode::names_of(&r.attributes[2]).len(), 0);
    let mut out = vec![];
    decode_report(&r, |b| out.push(b.clone())).unwrap();
    assert_eq!(out, [a, b.clone(), b]);
    assert!(e.push(&fewer));
}

#[test]
fn bad_indices_and_times_are_refused() {
    for i in [-1, i32::MIN, i32::MAX, 100_000] {
        let c = CompressedAttributes { strings: [(i, 0)].into(), ..Default::default() };
        assert_eq!(decompress(&c), Err(DictionaryError::UnknownIndex(i)));
    }
    let t = prost_types::Timestamp { seconds: i64::MAX, nanos: 0 };
    let c = CompressedAttributes { timestamps: [(0, t)].into(), ..Default::default() };
    assert!(matches!(decompress(&c), Err(DictionaryError::BadTime(_))));
}

#[test]
fn references_survive_the_wire() {
    let refs = vec![
        Reference { name: "request.headers".into(), key: Some("x-unheard-of".into()), present: false },
        Reference { name: "source.namespace".into(), key: None, present: true },
    ];
    assert_eq!(references(&encode_references(&refs, GLOBAL_WORDS.len())), Some(refs.clone()));
    let mut regex = encode_references(&refs, 0);
    regex.attribute_matches[0].condition = 3;
    assert_eq!(references(&regex), None, "a condition that cannot be checked must not be cached");
}

proptest! {
    #[test]
    fn no_message_panics(
        words in proptest::collection::vec(".{0,5}", 0..3),
        strings in proptest::collection::btree_map(any::<i32>(), any::<i32>(), 0..3),
        seconds in any::<i64>(), nanos in any::<i32>(),
    ) {
        let c = CompressedAttributes {
            words: words.clone(),
            strings: strings.clone(),
            durations: [(0, prost_types::Duration { seconds, nanos })].into(),
            ..Default::default()
        };
        let _ = decompress(&c);
        let _ = decode_report(&ReportRequest { attributes: vec![c], default_words: words.clone(), global_word_count: 1 }, |_| {});
        let _ = references(&ReferencedAttributes { words, attribute_matches: vec![] });
    }
}

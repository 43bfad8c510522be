//! HTTP/3 for the fuzzer.

use bytes::Bytes;

use super::{
    Code,
    frame::{Event, Frames, Of, varint},
    head,
    qpack::{self, Refused},
};
use crate::http::{
    h1,
    message::{MAX_FIELDS, MAX_HEAD, ResponseHead},
};

/// Events without data, the data joined, and whether the stream may end there.
type Read = Result<(Vec<Event>, Vec<u8>, bool), Code>;

/// A stream says the same in any pieces.
pub(crate) fn stream(data: &[u8]) {
    let step = 1 + usize::from(data.first().copied().unwrap_or_default() & 0x1f);
    for of in [Of::Request, Of::Control] {
        let whole = events(of, data, data.len());
        if let Ok((events, body, _)) = &whole {
            let sizes = events.iter().map(|e| match e {
                Event::Data(b) | Event::Headers(b) | Event::Control(_, b) => b.len(),
                Event::TooLarge => 0,
            });
            assert!(sizes.sum::<usize>() + body.len() <= data.len());
        }
        assert_eq!(events(of, data, step), whole);
    }
    if let Some((n, len)) = varint(data) {
        assert!(n < 1 << 62 && len <= 8);
    }
}

fn events(of: Of, wire: &[u8], piece: usize) -> Read {
    let mut frames = Frames::new(of, 100);
    let (mut events, mut data) = (vec![], vec![]);
    for p in wire.chunks(piece.max(1)) {
        let mut input = Bytes::copy_from_slice(p);
        while let Some(e) = frames.next(&mut input)? {
            match e {
                Event::Data(d) => data.extend_from_slice(&d),
                Event::TooLarge => return Ok((vec![Event::TooLarge], data, false)),
                e => events.push(e),
            }
        }
        assert!(input.is_empty());
    }
    Ok((events, data, frames.is_between()))
}

/// A field section: as fields, as the head of a request that is forwarded, and as trailers.
pub(crate) fn section(data: &[u8]) {
    let (mut fields, mut size) = (Vec::new(), 0);
    let all = qpack::decode::<()>(data, MAX_HEAD, &mut |n, v| {
        size += n.len() + v.len();
        fields.push((n.to_vec(), v.to_vec()));
        Ok(())
    });
    assert!(size + 32 * fields.len() <= MAX_HEAD);
    if all.is_ok() {
        let mut again = vec![];
        qpack::begin(&mut again);
        fields.iter().for_each(|(n, v)| qpack::encode(&mut again, n, v));
        let mut at = 0;
        let read = qpack::decode::<()>(&again, MAX_HEAD, &mut |n, v| {
            // Names are written in lower case.
            assert_eq!((n, v), (fields[at].0.to_ascii_lowercase().as_slice(), fields[at].1.as_slice()));
            at += 1;
            Ok(())
        });
        assert_eq!((read, at), (Ok(()), fields.len()));
    }
    let head = head::request(data, true, false);
    assert!(head.is_err() || all.is_ok());
    if let Ok(head) = head {
        assert!(head.headers.iter().count() <= MAX_FIELDS);
        h1::fuzz::forward(&head, &[]);
        // The fields of a request are as good as those of an answer.
        let answer = ResponseHead { status: 200, headers: head.headers, body: head.body };
        let [_, section] = head::response(&answer);
        let read = qpack::decode::<()>(&section, 2 * MAX_HEAD, &mut |_, _| Ok(()));
        assert!(matches!(read, Ok(()) | Err(Refused::TooLarge)));
    }
    if let Ok(t) = head::trailers(data) {
        assert!(t.iter().all(|(id, n, _)| !id.is_forbidden_trailer() && !n.starts_with(b":")));
    }
}

//! Taking long lists out of a message before it is decoded: ten thousand virtual hosts as protobuf structs would be
//! most of the memory of a proxy that executes them.

use super::{Bad, Res};

/// Takes the members of a repeated message field out of an encoded message; the rest is the same message without them.
/// (Protobuf encoding: a message is a sequence of fields in any order.)
pub(super) fn take(message: &[u8], number: u64) -> Res<(Vec<u8>, Vec<&[u8]>)> {
    let mut rest = Vec::new();
    let mut taken = Vec::new();
    let mut at = message;
    while !at.is_empty() {
        let start = at;
        let key = varint(&mut at)?;
        let length = match key & 7 {
            0 => {
                varint(&mut at)?;
                0
            }
            1 => 8,
            2 => usize::try_from(varint(&mut at)?).map_err(|_| damaged())?,
            5 => 4,
            _ => return Err(damaged()),
        };
        let (body, next) = at.split_at_checked(length).ok_or_else(damaged)?;
        at = next;
        if key == number << 3 | 2 {
            taken.push(body);
        } else {
            rest.extend_from_slice(&start[..start.len() - at.len()]);
        }
    }
    Ok((rest, taken))
}

fn damaged() -> Bad {
    Bad::new("", "is damaged")
}

fn varint(at: &mut &[u8]) -> Res<u64> {
    let mut v = 0u64;
    for i in 0..10 {
        let (byte, next) = at.split_first().ok_or_else(damaged)?;
        *at = next;
        v |= u64::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            return Ok(v);
        }
    }
    Err(damaged())
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::route::v3 as pb;
    use prost::Message as _;

    use super::*;

    #[test]
    fn the_parts_are_the_whole() {
        let hosts: Vec<pb::VirtualHost> =
            (0..3).map(|i| pb::VirtualHost { name: "x".repeat(200 * i), ..Default::default() }).collect();
        let whole =
            pb::RouteConfiguration { name: "r".into(), virtual_hosts: hosts.clone(), ..Default::default() };
        let bytes = whole.encode_to_vec();
        let (rest, taken) = take(&bytes, 2).unwrap();
        let rest = pb::RouteConfiguration::decode(rest.as_slice()).unwrap();
        assert_eq!(rest, pb::RouteConfiguration { name: "r".into(), ..Default::default() });
        let taken: Vec<_> = taken.into_iter().map(|b| pb::VirtualHost::decode(b).unwrap()).collect();
        assert_eq!(taken, hosts);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_split_or_refused(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..64)) {
            if let Ok((rest, taken)) = take(&bytes, 2) {
                proptest::prop_assert!(rest.len() + taken.iter().map(|t| t.len()).sum::<usize>() <= bytes.len());
            }
        }
    }
}

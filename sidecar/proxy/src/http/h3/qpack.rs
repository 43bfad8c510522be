//! QPACK (RFC 9204) without a dynamic table: what a peer may send to whoever grants it none, and what may be sent to
//! anybody.

mod tables;

use std::{collections::HashMap, sync::LazyLock};

use tables::{LENGTHS, STATIC};

use super::Code;

/// What a field costs beside its bytes (RFC 9114 section 4.2.2).
const OVERHEAD: usize = 32;

/// Why a field section is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused<E> {
    /// The connection is lost.
    Broken,
    /// It is larger than the limit.
    TooLarge,
    /// The receiver of the fields does not want one.
    Field(E),
}

impl<E> From<Short> for Refused<E> {
    fn from(_: Short) -> Self {
        Self::Broken
    }
}

/// Something is not what it says.
#[derive(Debug)]
struct Short;

/// Reads a field section of at most `limit` bytes, as the RFC counts them, and hands over its fields in order.
pub(super) fn decode<E>(
    section: &[u8],
    limit: usize,
    field: &mut dyn FnMut(&[u8], &[u8]) -> Result<(), E>,
) -> Result<(), Refused<E>> {
    let mut r = Reader(section);
    // The state of the table that it needs, which is none, and the base, which nothing refers to (section 4.5.1).
    if r.int(8)? != 0 {
        return Err(Refused::Broken);
    }
    r.int(7)?;
    let (mut name, mut value) = (Vec::new(), Vec::new());
    let mut size = 0usize;
    while let Some(first) = r.0.first().copied() {
        let (name, value): (&[u8], &[u8]) = match first {
            // Indexed (4.5.2); the bit behind says which table.
            0x80.. => {
                let (name, value) = indexed(r.int(6)?, first & 0x40)?;
                (name.as_bytes(), value.as_bytes())
            }
            // Literal with a name of a table (4.5.4).
            0x40..0x80 => {
                let (name, _) = indexed(r.int(4)?, first & 0x10)?;
                r.string(7, limit, &mut value)?;
                (name.as_bytes(), &value)
            }
            // Literal (4.5.6).
            0x20..0x40 => {
                r.string(3, limit, &mut name)?;
                r.string(7, limit, &mut value)?;
                (&name, &value)
            }
            // Refers to what the dynamic table does not have (4.5.3, 4.5.5).
            _ => return Err(Refused::Broken),
        };
        size += name.len() + value.len() + OVERHEAD;
        if size > limit {
            return Err(Refused::TooLarge);
        }
        field(name, value).map_err(Refused::Field)?;
    }
    Ok(())
}

fn indexed(at: u64, of_static: u8) -> Result<(&'static str, &'static str), Short> {
    if of_static == 0 {
        return Err(Short);
    }
    usize::try_from(at).ok().and_then(|at| STATIC.get(at)).copied().ok_or(Short)
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// An integer with a prefix of so many bits (RFC 7541 section 5.1).
    fn int(&mut self, prefix: u32) -> Result<u64, Short> {
        let (first, mut rest) = self.0.split_first().ok_or(Short)?;
        let mask = (1u64 << prefix) - 1;
        let mut v = u64::from(*first) & mask;
        if v == mask {
            let mut shift = 0;
            loop {
                let (b, next) = rest.split_first().ok_or(Short)?;
                rest = next;
                // Far above every length there is, and far below where it would wrap.
                if shift > 56 {
                    return Err(Short);
                }
                v += u64::from(b & 0x7f) << shift;
                shift += 7;
                if b & 0x80 == 0 {
                    break;
                }
            }
        }
        self.0 = rest;
        Ok(v)
    }

    /// A string whose length has a prefix of so many bits, behind a bit that says whether it is Huffman-coded.
    fn string<E>(&mut self, prefix: u32, limit: usize, out: &mut Vec<u8>) -> Result<(), Refused<E>> {
        let coded = self.0.first().ok_or(Short)? >> prefix & 1 == 1;
        let len = usize::try_from(self.int(prefix)?).map_err(|_| Short)?;
        let bytes = self.0.get(..len).ok_or(Short)?;
        self.0 = &self.0[len..];
        out.clear();
        if coded {
            return huffman(bytes, limit, out);
        }
        out.extend_from_slice(bytes);
        Ok(())
    }
}

/// The code by lengths: the first code of a length, aligned to the left, and where its symbols begin.
struct Huffman {
    /// Length, first code of the next length (aligned), first code (not aligned), position of its symbol.
    rows: Vec<(u32, u64, u32, usize)>,
    symbols: Vec<u16>,
}

static HUFFMAN: LazyLock<Huffman> = LazyLock::new(|| {
    let mut symbols: Vec<u16> = (0..LENGTHS.len() as u16).collect();
    symbols.sort_by_key(|s| LENGTHS[usize::from(*s)]);
    let (mut rows, mut code, mut at, mut before) = (vec![], 0u32, 0, 0);
    for len in 1..=30u32 {
        code <<= len - before;
        before = len;
        let n = LENGTHS.iter().filter(|l| u32::from(**l) == len).count();
        if n > 0 {
            rows.push((len, u64::from(code + n as u32) << (32 - len), code, at));
            code += n as u32;
            at += n;
        }
    }
    Huffman { rows, symbols }
});

/// Decodes a string; what is left over of its last byte must be the beginning of the end (RFC 7541 section 5.2).
fn huffman<E>(bytes: &[u8], limit: usize, out: &mut Vec<u8>) -> Result<(), Refused<E>> {
    let table = &*HUFFMAN;
    let (mut window, mut have) = (0u64, 0u32);
    let mut input = bytes.iter();
    loop {
        while have <= 32 {
            let Some(b) = input.next() else { break };
            window |= u64::from(*b) << (56 - have);
            have += 8;
        }
        if have == 0 {
            return Ok(());
        }
        // Ones follow the end, as padding has them: a code that needs them is too long.
        let ahead = (window | (u64::MAX >> have)) >> 32;
        let row = table.rows.iter().find(|(_, end, ..)| ahead < *end);
        let Some((len, _, first, at)) = row else { return Err(Refused::Broken) };
        if *len > have {
            let padding = have < 8 && window >> (64 - have) == (1 << have) - 1;
            return if padding { Ok(()) } else { Err(Refused::Broken) };
        }
        let symbol = table.symbols[at + (ahead >> (32 - len)) as usize - *first as usize];
        let Ok(b) = u8::try_from(symbol) else { return Err(Refused::Broken) };
        if out.len() >= limit {
            return Err(Refused::TooLarge);
        }
        out.push(b);
        window <<= len;
        have -= len;
    }
}

/// Where a name stands first in the static table.
static NAMES: LazyLock<HashMap<&'static [u8], usize>> = LazyLock::new(|| {
    let all = STATIC.iter().enumerate().rev();
    all.map(|(i, (name, _))| (name.as_bytes(), i)).collect()
});

/// Begins a field section.
pub(super) fn begin(out: &mut Vec<u8>) {
    out.extend_from_slice(&[0, 0]);
}

/// Appends a field; names are written in lower case.
pub(super) fn encode(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    let lower;
    let name = if name.iter().any(u8::is_ascii_uppercase) {
        lower = name.to_ascii_lowercase();
        &lower
    } else {
        name
    };
    match NAMES.get(name) {
        Some(first) => {
            let same = STATIC[*first..].iter().take_while(|(n, _)| n.as_bytes() == name);
            match same.zip(*first..).find(|((_, v), _)| v.as_bytes() == value) {
                Some((_, at)) => put_int(out, 0xc0, 6, at),
                None => {
                    put_int(out, 0x50, 4, *first);
                    put_int(out, 0, 7, value.len());
                    out.extend_from_slice(value);
                }
            }
        }
        None => {
            put_int(out, 0x20, 3, name.len());
            out.extend_from_slice(name);
            put_int(out, 0, 7, value.len());
            out.extend_from_slice(value);
        }
    }
}

/// Appends `:status`, which stands in the table in two places.
pub(super) fn encode_status(out: &mut Vec<u8>, status: u16) {
    let text =
        [b'0' + (status / 100 % 10) as u8, b'0' + (status / 10 % 10) as u8, b'0' + (status % 10) as u8];
    let found = STATIC.iter().position(|(n, v)| *n == ":status" && v.as_bytes() == text);
    match found {
        Some(at) => put_int(out, 0xc0, 6, at),
        None => encode(out, b":status", &text),
    }
}

fn put_int(out: &mut Vec<u8>, flags: u8, prefix: u32, v: usize) {
    let mask = (1usize << prefix) - 1;
    if v < mask {
        return out.push(flags | v as u8);
    }
    out.push(flags | mask as u8);
    let mut v = v - mask;
    while v >= 0x80 {
        out.push(0x80 | (v & 0x7f) as u8);
        v >>= 7;
    }
    out.push(v as u8);
}

impl<E> Refused<E> {
    /// The error of the connection, if that is what it costs.
    pub(super) fn code(&self) -> Option<Code> {
        matches!(self, Self::Broken).then_some(Code::DecompressionFailed)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Fields = Vec<(Vec<u8>, Vec<u8>)>;

    fn read(section: &[u8], limit: usize) -> Result<Fields, Refused<()>> {
        let mut fields = vec![];
        decode(section, limit, &mut |n, v| {
            fields.push((n.to_vec(), v.to_vec()));
            Ok(())
        })?;
        Ok(fields)
    }

    /// Codes as they follow from the lengths, found in another way than above.
    fn coded(text: &[u8]) -> Vec<u8> {
        let mut codes = vec![0u32; LENGTHS.len()];
        let (mut code, mut last) = (0u32, 5u8);
        for len in 5..=30u8 {
            for (symbol, l) in LENGTHS.iter().enumerate() {
                if *l == len {
                    code <<= len - last;
                    last = len;
                    codes[symbol] = code;
                    code += 1;
                }
            }
        }
        let mut bits = String::new();
        for b in text {
            let at = usize::from(*b);
            bits += &format!("{:0width$b}", codes[at], width = usize::from(LENGTHS[at]));
        }
        while !bits.len().is_multiple_of(8) {
            bits.push('1');
        }
        bits.as_bytes()
            .chunks(8)
            .map(|c| u8::from_str_radix(std::str::from_utf8(c).unwrap(), 2).unwrap())
            .collect()
    }

    fn hex(s: &str) -> Vec<u8> {
        let s: String = s.split_whitespace().collect();
        (0..s.len()).step_by(2).map(|i| u8::from_str_radix(&s[i..i + 2], 16).unwrap()).collect()
    }

    #[test]
    fn the_examples_of_the_standards() {
        // RFC 9204 appendix B.1.
        let section = hex("0000 510b 2f69 6e64 6578 2e68 746d 6c");
        assert_eq!(read(&section, 1000).unwrap(), [(b":path".to_vec(), b"/index.html".to_vec())]);
        // RFC 7541 appendix C.4.
        let mut out = vec![];
        huffman::<()>(&hex("f1e3 c2e5 f23a 6ba0 ab90 f4ff"), 100, &mut out).unwrap();
        assert_eq!(out, b"www.example.com");
        assert_eq!(coded(b"www.example.com"), hex("f1e3 c2e5 f23a 6ba0 ab90 f4ff"));
        out.clear();
        huffman::<()>(&hex("25a8 49e9 5bb8 e8b4 bf"), 100, &mut out).unwrap();
        assert_eq!(out, b"custom-value");
    }

    #[test]
    fn what_is_refused() {
        let broken = |s: &str| assert_eq!(read(&hex(s), 1000), Err(Refused::Broken), "{s}");
        // Nothing, a table, an entry of one, an index behind the static one.
        broken("");
        broken("00");
        broken("0200");
        broken("0000 80");
        broken("0000 10");
        broken("0000 00 00");
        broken("0000 ff 80 01");
        // Strings beyond the section, an integer without end, and padding that is none.
        broken("0000 51 05 61");
        broken("0000 ff ffffffffffffffffffffff");
        broken("0000 51 81 00");
        broken("0000 51 82 ffff");
        broken("0000 51 84 ffff ffff");
        let mut s = vec![];
        begin(&mut s);
        encode(&mut s, b"a", &[b'x'; 100]);
        assert_eq!(read(&s, 132), Err(Refused::TooLarge));
        assert!(read(&s, 133).is_ok());
        // Cut before it is stored: a coded string is up to eight fifths of its code.
        let mut s = hex("0000 51");
        put_int(&mut s, 0x80, 7, 100);
        s.extend_from_slice(&coded(&[b'0'; 160]));
        assert_eq!(read(&s, 100), Err(Refused::TooLarge));
    }

    #[test]
    fn statuses_and_names() {
        for status in [100u16, 103, 200, 204, 301, 404, 421, 503, 599] {
            let mut s = vec![];
            begin(&mut s);
            encode_status(&mut s, status);
            assert_eq!(read(&s, 100).unwrap(), [(b":status".to_vec(), status.to_string().into_bytes())]);
        }
        let mut s = vec![];
        begin(&mut s);
        encode(&mut s, b"Content-Type", b"application/json");
        assert_eq!(s, [0, 0, 0xc0 | 46]);
    }

    proptest! {
        #[test]
        fn fields_survive(
            fields in proptest::collection::vec(("[a-z:][a-z0-9-]{0,40}", proptest::collection::vec(any::<u8>(), 0..300)), 0..20)
        ) {
            let mut s = vec![];
            begin(&mut s);
            for (n, v) in &fields {
                encode(&mut s, n.as_bytes(), v);
            }
            let want: Fields = fields.into_iter().map(|(n, v)| (n.into_bytes(), v)).collect();
            prop_assert_eq!(read(&s, 1 << 20).unwrap(), want);
        }

        #[test]
        fn coded_strings_are_read(text in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut out = vec![];
            prop_assert_eq!(huffman::<()>(&coded(&text), 100, &mut out), Ok(()));
            prop_assert_eq!(out, text);
        }

        #[test]
        fn no_bytes_break_it(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(&bytes, 4096);
            let _ = read(&[&[0, 0], bytes.as_slice()].concat(), 4096);
            let _ = huffman::<()>(&bytes, 4096, &mut vec![]);
        }
    }
}

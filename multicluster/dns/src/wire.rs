//! Questions read from and answers written to the bytes of a message, without allocation (RFC 1035, RFC 6891).

/// Header of a message.
pub(crate) const HEADER: usize = 12;
/// Longest name, with its root label.
const MAX_NAME: usize = 255;
/// Largest answer over UDP that is offered: without fragments on any path (DNS flag day 2020).
pub(crate) const MAX_PAYLOAD: u16 = 1232;
/// What a client without EDNS takes over UDP.
const PLAIN_PAYLOAD: u16 = 512;
/// An OPT record without options.
const OPT_LEN: usize = 11;

pub(crate) const A: u16 = 1;
pub(crate) const SOA: u16 = 6;
pub(crate) const PTR: u16 = 12;
pub(crate) const TXT: u16 = 16;
pub(crate) const AAAA: u16 = 28;
pub(crate) const SRV: u16 = 33;
pub(crate) const OPT: u16 = 41;
pub(crate) const ANY: u16 = 255;
pub(crate) const IN: u16 = 1;

const QR: u16 = 0x8000;
const AA: u16 = 0x0400;
const TC: u16 = 0x0200;
const RD: u16 = 0x0100;
const RA: u16 = 0x0080;
const CD: u16 = 0x0010;
const OPCODE: u16 = 0x7800;

/// Response codes that are sent here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Code {
    #[default]
    NoError = 0,
    FormErr = 1,
    ServFail = 2,
    NxDomain = 3,
    NotImp = 4,
    Refused = 5,
    BadVers = 16,
}

/// How a question came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Udp,
    Tcp,
}

/// EDNS of a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Edns {
    payload: u16,
    pub(crate) version: u8,
    /// Copied into the answer (RFC 3225).
    pub(crate) dnssec_ok: bool,
}

/// A question.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Query<'a> {
    id: u16,
    flags: u16,
    /// Name, type and class as they came.
    question: &'a [u8],
    pub(crate) kind: u16,
    pub(crate) class: u16,
    pub(crate) edns: Option<Edns>,
    lower: [u8; MAX_NAME],
    lower_len: u8,
}

/// Why a message is not answered as a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bad {
    /// Not answered at all: no header, or itself an answer. Answering those would make loops.
    Silent,
    /// Answered with this alone.
    Code(Code),
}

fn u16_at(b: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*b.get(at)?, *b.get(at + 1)?]))
}

/// Past a name that may be compressed.
fn skip_name(b: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *b.get(at)? {
            0 => return Some(at + 1),
            n if n & 0xc0 == 0xc0 => return Some(at + 2),
            n if n & 0xc0 != 0 => return None,
            n => at += 1 + usize::from(n),
        }
    }
}

impl<'a> Query<'a> {
    pub(crate) fn parse(packet: &'a [u8]) -> Result<Self, Bad> {
        let head: &[u8; HEADER] = packet.first_chunk().ok_or(Bad::Silent)?;
        let word = |i: usize| u16::from_be_bytes([head[2 * i], head[2 * i + 1]]);
        let (id, flags) = (word(0), word(1));
        if flags & QR != 0 {
            return Err(Bad::Silent);
        }
        if flags & OPCODE != 0 {
            return Err(Bad::Code(Code::NotImp));
        }
        let malformed = Bad::Code(Code::FormErr);
        if word(2) != 1 {
            return Err(malformed);
        }
        let mut lower = [0; MAX_NAME];
        let mut at = HEADER;
        loop {
            let n = *packet.get(at).ok_or(malformed)?;
            if n == 0 {
                break;
            }
            let end = at + 1 + usize::from(n);
            // There is nothing before a question that a pointer could mean.
            if n & 0xc0 != 0 || end - HEADER >= MAX_NAME {
                return Err(malformed);
            }
            let label = packet.get(at..end).ok_or(malformed)?;
            lower[at - HEADER] = n;
            for (to, from) in lower[at - HEADER + 1..].iter_mut().zip(&label[1..]) {
                *to = from.to_ascii_lowercase();
            }
            at = end;
        }
        // Below 255, as checked for each label.
        let lower_len = u8::try_from(at - HEADER).unwrap_or(u8::MAX);
        let (kind, class) =
            (u16_at(packet, at + 1).ok_or(malformed)?, u16_at(packet, at + 3).ok_or(malformed)?);
        let end = at + 5;
        let records = usize::from(word(3)) + usize::from(word(4)) + usize::from(word(5));
        let edns = find_opt(packet, end, records).ok_or(malformed)?;
        Ok(Self { id, flags, question: &packet[HEADER..end], kind, class, edns, lower, lower_len })
    }

    /// The name in lower case, as labels without the root.
    pub(crate) fn name(&self) -> &[u8] {
        &self.lower[..usize::from(self.lower_len)]
    }

    /// The name as it came, with its root label.
    pub(crate) fn name_as_sent(&self) -> &'a [u8] {
        &self.question[..usize::from(self.lower_len) + 1]
    }

    pub(crate) fn id(&self) -> u16 {
        self.id
    }

    pub(crate) fn recursion_desired(&self) -> bool {
        self.flags & RD != 0
    }

    pub(crate) fn checking_disabled(&self) -> bool {
        self.flags & CD != 0
    }

    /// The largest answer that whoever asked takes.
    pub(crate) fn limit(&self, transport: Transport) -> usize {
        match transport {
            Transport::Tcp => usize::from(u16::MAX),
            Transport::Udp => {
                let offered = self.edns.map_or(PLAIN_PAYLOAD, |e| e.payload);
                // Less than 512 means 512 (RFC 6891, section 6.2.3).
                usize::from(offered.clamp(PLAIN_PAYLOAD, MAX_PAYLOAD))
            }
        }
    }
}

/// The OPT record among `count` records at `at`; `None` if they are not whole, or it is there twice.
fn find_opt(packet: &[u8], mut at: usize, count: usize) -> Option<Option<Edns>> {
    let mut found = None;
    for _ in 0..count {
        let root = packet.get(at) == Some(&0);
        at = skip_name(packet, at)?;
        let kind = u16_at(packet, at)?;
        let length = usize::from(u16_at(packet, at + 8)?);
        if kind == OPT {
            if found.is_some() || !root {
                return None;
            }
            found = Some(Edns {
                payload: u16_at(packet, at + 2)?,
                version: *packet.get(at + 5)?,
                dnssec_ok: packet.get(at + 6)? & 0x80 != 0,
            });
        }
        at += 10 + length;
        if at > packet.len() {
            return None;
        }
    }
    Some(found)
}

/// Where a record's name is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Owner {
    /// The name of the question, from this offset of it on.
    Question(usize),
    /// A name at this offset of the message.
    At(usize),
}

impl Owner {
    fn pointer(self) -> [u8; 2] {
        let at = match self {
            Self::Question(n) => HEADER + n,
            Self::At(n) => n,
        };
        // Callers keep offsets below 2^14: questions are short, and other names are checked.
        (0xc000 | u16::try_from(at & 0x3fff).unwrap_or_default()).to_be_bytes()
    }
}

/// Sections of a reply.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Section {
    Answer = 0,
    Authority = 1,
    Additional = 2,
}

/// What did not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full;

/// A reply in the making. Room for OPT is kept back.
pub(crate) struct Reply<'q, 'o> {
    query: &'q Query<'q>,
    out: &'o mut [u8],
    len: usize,
    /// End of what records may use.
    limit: usize,
    counts: [u16; 3],
    pub(crate) code: Code,
    pub(crate) authoritative: bool,
    pub(crate) recursion: bool,
    truncated: bool,
}

impl<'q, 'o> Reply<'q, 'o> {
    /// `out` holds at least what a question of the longest name needs: 512 bytes do.
    pub(crate) fn new(query: &'q Query<'q>, out: &'o mut [u8], transport: Transport) -> Self {
        let opt = if query.edns.is_some() { OPT_LEN } else { 0 };
        let limit = query.limit(transport).min(out.len()).saturating_sub(opt);
        let mut r = Self {
            query,
            out,
            len: HEADER,
            limit,
            counts: [0; 3],
            code: Code::NoError,
            authoritative: true,
            recursion: true,
            truncated: false,
        };
        // A question has at most 260 bytes, which every limit holds.
        let _ = r.put(query.question);
        r
    }

    /// Where the next byte goes.
    pub(crate) fn position(&self) -> usize {
        self.len
    }

    /// Bytes; nothing is written if they do not fit.
    pub(crate) fn put(&mut self, bytes: &[u8]) -> Result<(), Full> {
        let end = self.len + bytes.len();
        if end > self.limit {
            return Err(Full);
        }
        self.out[self.len..end].copy_from_slice(bytes);
        self.len = end;
        Ok(())
    }

    /// Counts records that [`Self::put`] wrote whole.
    pub(crate) fn count(&mut self, section: Section, records: u16) {
        self.counts[section as usize] += records;
    }

    /// A record without its data, whose length follows.
    pub(crate) fn head(&mut self, owner: Owner, kind: u16, ttl: u32, length: usize) -> Result<(), Full> {
        let mut b = [0; 12];
        b[..2].copy_from_slice(&owner.pointer());
        b[2..4].copy_from_slice(&kind.to_be_bytes());
        b[4..6].copy_from_slice(&IN.to_be_bytes());
        b[6..10].copy_from_slice(&ttl.to_be_bytes());
        b[10..].copy_from_slice(&u16::try_from(length).map_err(|_| Full)?.to_be_bytes());
        self.put(&b)
    }

    /// A whole record, or nothing.
    pub(crate) fn record(
        &mut self,
        section: Section,
        owner: Owner,
        kind: u16,
        ttl: u32,
        data: &[&[u8]],
    ) -> Result<(), Full> {
        let start = self.len;
        let length = data.iter().map(|d| d.len()).sum();
        let written =
            self.head(owner, kind, ttl, length).and_then(|()| data.iter().try_for_each(|d| self.put(d)));
        match written {
            Ok(()) => self.count(section, 1),
            Err(Full) => self.len = start,
        }
        written
    }

    /// Records of one kind that were encoded with the question as their owner, beginning with the one at `first`, so
    /// that clients which take the first one spread.
    pub(crate) fn rotated(&mut self, records: &[u8], count: u16, first: usize) -> Result<(), Full> {
        let start = self.len;
        let (before, after) = records.split_at(first.min(records.len()));
        let written = self.put(after).and_then(|()| self.put(before));
        match written {
            Ok(()) => self.count(Section::Answer, count),
            Err(Full) => self.len = start,
        }
        written
    }

    /// Says that more is to be had over TCP. What is there is taken back: half of a set is not a set.
    pub(crate) fn truncate(&mut self) {
        self.truncated = true;
        self.len = HEADER + self.query.question.len();
        self.counts = [0; 3];
    }

    /// Completes it and says how long it is.
    pub(crate) fn finish(mut self) -> usize {
        let q = self.query;
        if let Some(e) = q.edns {
            self.limit = self.out.len();
            let code = self.code as u16;
            let mut opt = [0; OPT_LEN];
            opt[1..3].copy_from_slice(&OPT.to_be_bytes());
            opt[3..5].copy_from_slice(&MAX_PAYLOAD.to_be_bytes());
            opt[5] = u8::try_from(code >> 4).unwrap_or_default();
            opt[7] = if e.dnssec_ok { 0x80 } else { 0 };
            if self.put(&opt).is_ok() {
                self.count(Section::Additional, 1);
            }
        }
        let mut flags = QR | (q.flags & (RD | CD)) | (self.code as u16 & 0xf);
        for (on, bit) in [(self.authoritative, AA), (self.truncated, TC), (self.recursion, RA)] {
            if on {
                flags |= bit;
            }
        }
        let [answers, authorities, additionals] = self.counts;
        for (i, word) in [q.id, flags, 1, answers, authorities, additionals].into_iter().enumerate() {
            self.out[2 * i..2 * i + 2].copy_from_slice(&word.to_be_bytes());
        }
        self.len
    }
}

/// A reply to what could not be read: the header alone.
pub(crate) fn refuse(packet: &[u8], code: Code, out: &mut [u8]) -> usize {
    let (Some(id), Some(flags)) = (u16_at(packet, 0), u16_at(packet, 2)) else { return 0 };
    let flags = QR | (flags & (OPCODE | RD)) | (code as u16 & 0xf);
    let Some(head) = out.first_chunk_mut::<HEADER>() else { return 0 };
    *head = [0; HEADER];
    head[..2].copy_from_slice(&id.to_be_bytes());
    head[2..4].copy_from_slice(&flags.to_be_bytes());
    HEADER
}

/// A name as labels without the root, in lower case; `None` if it cannot be a name.
pub(crate) fn labels(name: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(name.len() + 1);
    let name = name.trim_end_matches('.');
    if name.is_empty() {
        return Some(out);
    }
    for label in name.split('.') {
        let n = u8::try_from(label.len()).ok().filter(|n| (1..=63).contains(n))?;
        out.push(n);
        out.extend(label.bytes().map(|b| b.to_ascii_lowercase()));
    }
    (out.len() < MAX_NAME).then_some(out)
}

/// The first label of a name and the offset of the rest.
pub(crate) fn first(name: &[u8]) -> Option<(&[u8], usize)> {
    let end = 1 + usize::from(*name.first()?);
    Some((name.get(1..end)?, end))
}

/// Where `zone` begins in `name`, if `name` is it or below it.
pub(crate) fn offset_in(name: &[u8], zone: &[u8]) -> Option<usize> {
    let start = name.len().checked_sub(zone.len())?;
    if name[start..] != *zone {
        return None;
    }
    // The bytes may match in the middle of a label.
    let mut at = 0;
    while at < start {
        at += 1 + usize::from(*name.get(at)?);
    }
    (at == start).then_some(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(name: &str, tail: &[u8]) -> Vec<u8> {
        let mut p = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        p.extend(labels(name).unwrap());
        p.extend([0, 0, 1, 0, 1]);
        p.extend(tail);
        p
    }

    #[test]
    fn a_question_is_read() {
        let mut p = packet("a.bc", &[]);
        p[13] = b'A';
        let q = Query::parse(&p).unwrap();
        assert_eq!(q.name(), b"\x01a\x02bc");
        assert_eq!(q.name_as_sent(), b"\x01A\x02bc\0");
        assert_eq!((q.kind, q.class, q.id(), q.edns), (A, IN, 7, None));
        assert_eq!((q.limit(Transport::Udp), q.limit(Transport::Tcp)), (512, 65535));
        let mut with = packet("", &[0, 0, 41, 16, 0, 0, 0, 0x80, 0, 0, 0]);
        with[11] = 1;
        let q = Query::parse(&with).unwrap();
        assert_eq!(q.edns, Some(Edns { payload: 4096, version: 0, dnssec_ok: true }));
        assert_eq!((q.limit(Transport::Udp), q.name()), (1232, &b""[..]));
    }

    #[test]
    fn what_is_not_a_question_is_told_apart() {
        let parse = |p: &[u8]| Query::parse(p).unwrap_err();
        let good = packet("a", &[]);
        assert_eq!(parse(&good[..11]), Bad::Silent);
        let with = |at: usize, byte: u8| {
            let mut p = good.clone();
            p[at] = byte;
            p
        };
        for (what, p, expected) in [
            ("an answer", with(2, 0x81), Bad::Silent),
            ("an update", with(2, 0x28), Bad::Code(Code::NotImp)),
            ("no question", with(5, 0), Bad::Code(Code::FormErr)),
            ("two questions", with(5, 2), Bad::Code(Code::FormErr)),
            ("a pointer", with(12, 0xc0), Bad::Code(Code::FormErr)),
            ("a record that is not there", with(11, 1), Bad::Code(Code::FormErr)),
            ("half a question", good[..good.len() - 1].to_vec(), Bad::Code(Code::FormErr)),
        ] {
            assert_eq!(parse(&p), expected, "{what}");
        }
        let opt = [0, 0, 41, 2, 0, 0, 0, 0, 0, 0, 0];
        let mut twice = packet("a", &[opt, opt].concat());
        twice[11] = 2;
        assert_eq!(parse(&twice), Bad::Code(Code::FormErr));
    }

    #[test]
    fn zones_begin_at_labels() {
        let l = |n: &str| labels(n).unwrap();
        assert_eq!(offset_in(&l("a.global"), &l("global")), Some(2));
        assert_eq!(offset_in(&l("global"), &l("global")), Some(0));
        assert_eq!(offset_in(&l("notglobal"), &l("global")), None);
        // A label that holds the bytes of another name.
        assert_eq!(offset_in(b"\x08x\x06global", b"\x06global"), None);
        assert!(labels("a..b").is_none() && labels(&"a".repeat(64)).is_none());
        assert!(labels(&["a"; 128].join(".")).is_none(), "longer than a name can be");
    }
}

//! `envoy.service.ext_proc.v3`, in as much of its encoding as is needed.

use std::time::Duration;

use bytes::Bytes;
use mesh_model::proxy::{BodyMode, ProcessingMode};
use serde_json::{Map, Value};

use crate::{
    http::{
        headers::Headers,
        message::{RequestHead, ResponseHead},
    },
    wire::{self, Field, WireError, Writer},
};

/// Which part of an exchange a message is about; numbers of the fields of `ProcessingResponse`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    RequestHeaders = 1,
    ResponseHeaders = 2,
    RequestBody = 3,
    ResponseBody = 4,
    RequestTrailers = 5,
    ResponseTrailers = 6,
}

impl Part {
    pub(super) fn of_request(self) -> bool {
        matches!(self, Self::RequestHeaders | Self::RequestBody | Self::RequestTrailers)
    }
}

/// How a header is set. As Envoy does here, only the older `append` of the two fields that say it is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    Append,
    Overwrite,
}

/// `HeaderMutation`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Mutation {
    pub(super) set: Vec<(How, String, Vec<u8>)>,
    pub(super) remove: Vec<String>,
}

/// `CommonResponse`, and what stands beside it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) headers: Mutation,
    /// What the body becomes.
    pub(super) body: Option<Bytes>,
    /// `CONTINUE_AND_REPLACE`: nothing of the body as it was follows.
    pub(super) replace: bool,
    pub(super) clear_route: bool,
}

/// `ImmediateResponse`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Immediate {
    pub(super) status: u16,
    pub(super) headers: Mutation,
    pub(super) body: Bytes,
    pub(super) grpc: Option<u32>,
    pub(super) details: String,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    Change(Part, Change),
    Immediate(Immediate),
    /// Nothing but, possibly, more time.
    Nothing,
}

/// `ProcessingResponse`.
#[derive(Debug, PartialEq)]
pub(super) struct Answer {
    pub(super) said: Said,
    /// Names in `HeaderSendMode::Default` keep what they were.
    pub(super) mode: Option<ModeOverride>,
    pub(super) timeout: Option<Duration>,
    pub(super) metadata: Map<String, Value>,
}

/// `ProcessingMode` as a processor says it; `None` is as it was (headers) or as by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct ModeOverride {
    response_headers: Option<bool>,
    request_body: Option<BodyMode>,
    response_body: Option<BodyMode>,
    request_trailers: Option<bool>,
    response_trailers: Option<bool>,
}

impl ModeOverride {
    /// Headers of the request have passed already.
    pub(super) fn apply(&self, m: &mut ProcessingMode) {
        m.response_headers = self.response_headers.unwrap_or(m.response_headers);
        m.request_body = self.request_body.unwrap_or(BodyMode::None);
        m.response_body = self.response_body.unwrap_or(BodyMode::None);
        m.request_trailers = self.request_trailers.unwrap_or(false);
        m.response_trailers = self.response_trailers.unwrap_or(false);
    }
}

fn header(w: &mut Writer, name: &[u8], value: &[u8]) {
    w.message(1, |w| {
        w.text(1, &name.to_ascii_lowercase());
        w.bytes(3, value);
    });
}

fn map(w: &mut Writer, headers: &Headers, shown: &dyn Fn(&[u8]) -> bool) {
    for (_, n, v) in headers.iter() {
        if shown(n) {
            header(w, n, v);
        }
    }
}

pub(super) fn request_headers(head: &RequestHead, end: bool, shown: &dyn Fn(&[u8]) -> bool) -> Vec<u8> {
    let mut w = Writer::default();
    w.message(2, |w| {
        w.message(1, |w| {
            let pseudo: [(&[u8], &[u8]); 4] = [
                (b":authority", head.authority.as_bytes()),
                (b":path", head.path.as_bytes()),
                (b":method", head.method.as_str().as_bytes()),
                (b":scheme", if head.https { b"https" } else { b"http" }),
            ];
            for (n, v) in pseudo.iter().filter(|(n, _)| shown(n)) {
                header(w, n, v);
            }
            map(w, &head.headers, shown);
        });
        w.number(3, u64::from(end));
    });
    w.framed()
}

pub(super) fn response_headers(head: &ResponseHead, end: bool, shown: &dyn Fn(&[u8]) -> bool) -> Vec<u8> {
    let mut w = Writer::default();
    w.message(3, |w| {
        w.message(1, |w| {
            if shown(b":status") {
                header(w, b":status", head.status.to_string().as_bytes());
            }
            map(w, &head.headers, shown);
        });
        w.number(3, u64::from(end));
    });
    w.framed()
}

pub(super) fn body(part: Part, data: &[u8], end: bool) -> Vec<u8> {
    let mut w = Writer::default();
    w.message(part as u32 + 1, |w| {
        w.bytes(1, data);
        w.number(2, u64::from(end));
    });
    w.framed()
}

pub(super) fn trailers(part: Part, t: &Headers, shown: &dyn Fn(&[u8]) -> bool) -> Vec<u8> {
    let mut w = Writer::default();
    w.message(part as u32 + 1, |w| w.message(1, |w| map(w, t, shown)));
    w.framed()
}

/// Reads a `ProcessingResponse`.
pub(super) fn answer(b: &Bytes) -> Result<Answer, WireError> {
    let mut out = Answer { said: Said::Nothing, mode: None, timeout: None, metadata: Map::new() };
    wire::read(b, |n, f| {
        let part = match n {
            1 => Part::RequestHeaders,
            2 => Part::ResponseHeaders,
            3 => Part::RequestBody,
            4 => Part::ResponseBody,
            5 => Part::RequestTrailers,
            6 => Part::ResponseTrailers,
            7 => {
                out.said = Said::Immediate(immediate(b, f)?);
                return Ok(());
            }
            8 => {
                out.metadata = wire::read_struct(f.bytes())?;
                return Ok(());
            }
            9 => {
                out.mode = Some(mode(f)?);
                return Ok(());
            }
            10 => {
                out.timeout = Some(duration(f)?);
                return Ok(());
            }
            // What this does not know it cannot honour.
            11 => return Err(WireError),
            _ => return Ok(()),
        };
        let mut change = Change::default();
        wire::read(f.bytes(), |n, f| {
            if n == 1 {
                if matches!(part, Part::RequestTrailers | Part::ResponseTrailers) {
                    change.headers = mutation(f)?;
                } else {
                    change = common(b, f)?;
                }
            }
            Ok(())
        })?;
        out.said = Said::Change(part, change);
        Ok(())
    })?;
    Ok(out)
}

fn common(all: &Bytes, f: Field<'_>) -> Result<Change, WireError> {
    let mut c = Change::default();
    wire::read(f.bytes(), |n, f| {
        match n {
            1 => c.replace = f.number() == 1,
            2 => c.headers = mutation(f)?,
            3 => wire::read(f.bytes(), |n, f| {
                match n {
                    1 => c.body = Some(all.slice_ref(f.bytes())),
                    2 if f.number() != 0 => c.body = Some(Bytes::new()),
                    // `streamed_response` is for a mode that is not there.
                    3 => return Err(WireError),
                    _ => {}
                }
                Ok(())
            })?,
            5 => c.clear_route = f.number() != 0,
            _ => {}
        }
        Ok(())
    })?;
    Ok(c)
}

fn mutation(f: Field<'_>) -> Result<Mutation, WireError> {
    let mut m = Mutation::default();
    wire::read(f.bytes(), |n, f| {
        match n {
            1 => {
                let (mut name, mut value) = (String::new(), Vec::new());
                let mut how = How::Overwrite;
                wire::read(f.bytes(), |n, f| {
                    match n {
                        1 => wire::read(f.bytes(), |n, f| {
                            match n {
                                1 => name = f.text().to_ascii_lowercase(),
                                2 | 3 if !f.bytes().is_empty() => value = f.bytes().to_vec(),
                                _ => {}
                            }
                            Ok(())
                        })?,
                        2 => wire::read(f.bytes(), |n, f| {
                            if n == 1 && f.number() != 0 {
                                how = How::Append;
                            }
                            Ok(())
                        })?,
                        _ => {}
                    }
                    Ok(())
                })?;
                m.set.push((how, name, value));
            }
            2 => m.remove.push(f.text().to_ascii_lowercase()),
            _ => {}
        }
        Ok(())
    })?;
    Ok(m)
}

fn immediate(all: &Bytes, f: Field<'_>) -> Result<Immediate, WireError> {
    let mut i = Immediate { status: 200, ..Immediate::default() };
    wire::read(f.bytes(), |n, f| {
        match n {
            1 => wire::read(f.bytes(), |n, f| {
                if n == 1 {
                    let s = u16::try_from(f.number()).map_err(|_| WireError)?;
                    i.status = if (200..600).contains(&s) { s } else { return Err(WireError) };
                }
                Ok(())
            })?,
            2 => i.headers = mutation(f)?,
            3 => i.body = all.slice_ref(f.bytes()),
            4 => {
                i.grpc = Some(0);
                wire::read(f.bytes(), |n, f| {
                    if n == 1 {
                        i.grpc = Some(u32::try_from(f.number()).map_err(|_| WireError)?);
                    }
                    Ok(())
                })?;
            }
            5 => i.details = f.text().into_owned(),
            _ => {}
        }
        Ok(())
    })?;
    Ok(i)
}

fn mode(f: Field<'_>) -> Result<ModeOverride, WireError> {
    let mut m = ModeOverride::default();
    let send = |f: Field<'_>| match f.number() {
        0 => Ok(None),
        1 => Ok(Some(true)),
        2 => Ok(Some(false)),
        _ => Err(WireError),
    };
    let body = |f: Field<'_>| match f.number() {
        0 => Ok(Some(BodyMode::None)),
        1 => Ok(Some(BodyMode::Streamed)),
        2 => Ok(Some(BodyMode::Buffered)),
        3 => Ok(Some(BodyMode::BufferedPartial)),
        _ => Err(WireError),
    };
    wire::read(f.bytes(), |n, f| {
        match n {
            2 => m.response_headers = send(f)?,
            3 => m.request_body = body(f)?,
            4 => m.response_body = body(f)?,
            5 => m.request_trailers = send(f)?,
            6 => m.response_trailers = send(f)?,
            _ => {}
        }
        Ok(())
    })?;
    Ok(m)
}

fn duration(f: Field<'_>) -> Result<Duration, WireError> {
    let (mut secs, mut nanos) = (0, 0);
    wire::read(f.bytes(), |n, f| {
        match n {
            1 => secs = f.number(),
            2 => nanos = u32::try_from(f.number()).map_err(|_| WireError)?,
            _ => {}
        }
        Ok(())
    })?;
    // A negative number is a huge one here.
    if secs > 1 << 32 || nanos >= 1_000_000_000 { Err(WireError) } else { Ok(Duration::new(secs, nanos)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_read() {
        let mut w = Writer::default();
        w.message(1, |w| {
            w.message(1, |w| {
                w.number(1, 1);
                w.message(2, |w| {
                    w.message(1, |w| {
                        w.message(1, |w| {
                            w.text(1, b"X-A");
                            w.bytes(3, b"1");
                        });
                    });
                    w.text(2, b"X-B");
                });
                w.message(3, |w| w.bytes(1, b"new"));
                w.number(5, 1);
            });
        });
        w.message(9, |w| {
            w.number(2, 2);
            w.number(4, 2);
        });
        w.message(10, |w| w.number(1, 3));
        let a = answer(&w.into_bytes().into()).unwrap();
        let headers =
            Mutation { set: vec![(How::Overwrite, "x-a".into(), b"1".to_vec())], remove: vec!["x-b".into()] };
        let body = Some(Bytes::from_static(b"new"));
        let change = Change { headers, body, replace: true, clear_route: true };
        assert_eq!(a.said, Said::Change(Part::RequestHeaders, change));
        assert_eq!(a.timeout, Some(Duration::from_secs(3)));
        let mut m = ProcessingMode { request_body: BodyMode::Streamed, ..ProcessingMode::default() };
        a.mode.unwrap().apply(&mut m);
        let wanted = ProcessingMode {
            response_headers: false,
            response_body: BodyMode::Buffered,
            ..ProcessingMode::default()
        };
        assert_eq!(m, wanted);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_handled(b in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..120)) {
            let _ = answer(&b.into());
        }
    }
}

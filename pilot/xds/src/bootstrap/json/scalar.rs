//! Numbers, texts and enums.

use std::{collections::HashMap, fmt};

use base64::{
    Engine as _,
    alphabet::{STANDARD, URL_SAFE},
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde::de::{Error, Visitor};

use super::{FIXED32, FIXED64, Scalar, VARINT, bytes, tag, varint};

/// A scalar with its tag. False for `null`.
pub(super) struct ScalarValue<'a> {
    pub(super) scalar: Scalar,
    pub(super) number: u32,
    pub(super) out: &'a mut Vec<u8>,
}

impl ScalarValue<'_> {
    fn wrong<E: Error>(&self, what: impl fmt::Display) -> E {
        let wanted = match self.scalar {
            Scalar::Bool => "true or false",
            Scalar::String => "a string",
            Scalar::Bytes => "bytes in base64",
            Scalar::Int32 => "an integer of 32 bits",
            Scalar::Int64 => "an integer of 64 bits",
            Scalar::Uint32 => "a positive integer of 32 bits",
            Scalar::Uint64 => "a positive integer of 64 bits",
            Scalar::Float | Scalar::Double => "a number",
        };
        E::custom(format!("{what} is not {wanted}"))
    }

    fn varint(self, v: u64) -> bool {
        tag(self.out, self.number, VARINT);
        varint(self.out, v);
        true
    }

    fn integer<E: Error>(self, v: i128) -> Result<bool, E> {
        let fits = match self.scalar {
            Scalar::Int32 => i32::try_from(v).is_ok(),
            Scalar::Int64 => i64::try_from(v).is_ok(),
            Scalar::Uint32 => u32::try_from(v).is_ok(),
            Scalar::Uint64 => u64::try_from(v).is_ok(),
            Scalar::Float | Scalar::Double => return self.float(v as f64),
            Scalar::Bool | Scalar::String | Scalar::Bytes => false,
        };
        if !fits {
            return Err(self.wrong(v));
        }
        // Two's complement in 64 bits is how negative numbers travel.
        Ok(self.varint(v as u64))
    }

    fn float<E: Error>(self, v: f64) -> Result<bool, E> {
        // 2^63: beyond it no integer type here fits.
        const LIMIT: f64 = 9_223_372_036_854_775_808.0;
        match self.scalar {
            Scalar::Double => {
                tag(self.out, self.number, FIXED64);
                self.out.extend_from_slice(&v.to_le_bytes());
                Ok(true)
            }
            Scalar::Float => {
                tag(self.out, self.number, FIXED32);
                self.out.extend_from_slice(&(v as f32).to_le_bytes());
                Ok(true)
            }
            // 1.0 and 1e3 are integers.
            Scalar::Int32 | Scalar::Int64 | Scalar::Uint32 | Scalar::Uint64
                if v.fract() == 0.0 && v.abs() < LIMIT =>
            {
                self.integer(v as i128)
            }
            _ => Err(self.wrong(v)),
        }
    }
}

impl Visitor<'_> for ScalarValue<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a scalar")
    }

    fn visit_unit<E>(self) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_bool<E: Error>(self, v: bool) -> Result<bool, E> {
        if self.scalar == Scalar::Bool { Ok(self.varint(u64::from(v))) } else { Err(self.wrong(v)) }
    }

    fn visit_i64<E: Error>(self, v: i64) -> Result<bool, E> {
        self.integer(i128::from(v))
    }

    fn visit_u64<E: Error>(self, v: u64) -> Result<bool, E> {
        self.integer(i128::from(v))
    }

    fn visit_f64<E: Error>(self, v: f64) -> Result<bool, E> {
        self.float(v)
    }

    fn visit_str<E: Error>(self, v: &str) -> Result<bool, E> {
        match self.scalar {
            Scalar::String => bytes(self.out, self.number, v.as_bytes()),
            Scalar::Bytes => {
                let Some(b) = base64(v) else { return Err(self.wrong(format_args!("{v:?}"))) };
                bytes(self.out, self.number, &b);
            }
            // Only as the key of a map.
            Scalar::Bool => match v.parse() {
                Ok(b) => return self.visit_bool(b),
                Err(_) => return Err(self.wrong(format_args!("{v:?}"))),
            },
            Scalar::Float | Scalar::Double => match v {
                "NaN" => return self.float(f64::NAN),
                "Infinity" => return self.float(f64::INFINITY),
                "-Infinity" => return self.float(f64::NEG_INFINITY),
                _ => match v.parse() {
                    Ok(n) => return self.float(n),
                    Err(_) => return Err(self.wrong(format_args!("{v:?}"))),
                },
            },
            // 64-bit numbers are texts in JSON, and any integer may be.
            _ => match v.parse() {
                Ok(n) => return self.integer(n),
                Err(_) => return Err(self.wrong(format_args!("{v:?}"))),
            },
        }
        Ok(true)
    }
}

/// Either alphabet, with or without padding.
fn base64(text: &str) -> Option<Vec<u8>> {
    let alphabet = if text.contains(['-', '_']) { &URL_SAFE } else { &STANDARD };
    let config = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    GeneralPurpose::new(alphabet, config).decode(text).ok()
}

/// A value of an enum, by name or number. False for `null`.
pub(super) struct EnumValue<'a> {
    pub(super) values: &'a HashMap<&'static str, i32>,
    pub(super) number: u32,
    pub(super) out: &'a mut Vec<u8>,
}

impl EnumValue<'_> {
    fn write(self, v: i32) -> bool {
        tag(self.out, self.number, VARINT);
        varint(self.out, i64::from(v).cast_unsigned());
        true
    }
}

impl Visitor<'_> for EnumValue<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a value")
    }

    fn visit_unit<E>(self) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_i64<E: Error>(self, v: i64) -> Result<bool, E> {
        let v = i32::try_from(v).map_err(|_| E::custom(format!("{v} is not a value of this enum")))?;
        Ok(self.write(v))
    }

    fn visit_u64<E: Error>(self, v: u64) -> Result<bool, E> {
        let v = i32::try_from(v).map_err(|_| E::custom(format!("{v} is not a value of this enum")))?;
        Ok(self.write(v))
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<bool, E> {
        match self.values.get(name) {
            Some(v) => Ok(self.write(*v)),
            None => {
                let mut known: Vec<_> = self.values.keys().copied().collect();
                known.sort_unstable();
                Err(E::custom(format!("{name:?} is none of {}", known.join(", "))))
            }
        }
    }
}

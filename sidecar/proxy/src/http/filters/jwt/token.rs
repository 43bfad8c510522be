//! Tokens (RFC 7519): their three parts, and the claims that decide.

use std::sync::Arc;

use base64::{
    Engine as _,
    alphabet::URL_SAFE,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use jsonwebtoken::Algorithm;
use serde_json::Value;

use super::cache::Verified;

/// Base64url with or without padding; bits that mean nothing must be zero.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Result of verification; the texts are those that clients of Envoy know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    Missing,
    NotYetValid,
    Expired,
    Format,
    HeaderBase64,
    HeaderJson,
    HeaderAlg,
    AlgUnsupported,
    HeaderKid,
    PayloadBase64,
    PayloadJson,
    Claim,
    SignatureBase64,
    UnknownIssuer,
    Audience,
    Verification,
    NoKeyMatches,
    FetchFailed,
    NoKeys,
    NoRequirement,
}

impl Status {
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Missing => "Jwt is missing",
            Self::NotYetValid => "Jwt not yet valid",
            Self::Expired => "Jwt is expired",
            Self::Format => "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
            Self::HeaderBase64 => "Jwt header is an invalid Base64url encoded",
            Self::HeaderJson => "Jwt header is an invalid JSON",
            Self::HeaderAlg => "Jwt header [alg] field is required and must be a string",
            Self::AlgUnsupported => "Jwt header [alg] is not supported",
            Self::HeaderKid => "Jwt header [kid] field is not a string",
            Self::PayloadBase64 => "Jwt payload is an invalid Base64url encoded",
            Self::PayloadJson => "Jwt payload is an invalid JSON",
            Self::Claim => "Jwt payload has a field of the wrong type",
            Self::SignatureBase64 => "Jwt signature is an invalid Base64url encoded",
            Self::UnknownIssuer => "Jwt issuer is not configured",
            Self::Audience => "Audiences in Jwt are not allowed",
            Self::Verification => "Jwt verification fails",
            Self::NoKeyMatches => "Jwks doesn't have key to match kid or alg from Jwt",
            Self::FetchFailed => "Jwks remote fetch is failed",
            Self::NoKeys => "Jwks doesn't have any valid public key",
            Self::NoRequirement => "Wrong requirement_name in the route configuration",
        }
    }
}

/// Registered claims.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Claims {
    pub(super) issuer: String,
    pub(super) subject: String,
    pub(super) audiences: Vec<String>,
    /// Seconds since 1970.
    pub(super) expires: Option<u64>,
    pub(super) not_before: Option<u64>,
}

/// A token of the right form whose signature has not been looked at.
#[derive(Debug)]
pub(super) struct Parsed<'a> {
    pub(super) alg: Algorithm,
    pub(super) alg_name: String,
    pub(super) kid: String,
    /// What is signed.
    pub(super) signed: &'a str,
    /// Base64url without padding.
    pub(super) signature: &'a str,
    payload_base64: &'a str,
    payload: Value,
    pub(super) claims: Claims,
}

pub(super) fn parse(raw: &str) -> Result<Parsed<'_>, Status> {
    let mut parts = raw.split('.');
    let (Some(header), Some(payload), Some(signature), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(Status::Format);
    };
    let json: Value = serde_json::from_slice(&BASE64.decode(header).map_err(|_| Status::HeaderBase64)?)
        .map_err(|_| Status::HeaderJson)?;
    let alg_name = json.get("alg").and_then(Value::as_str).ok_or(Status::HeaderAlg)?.to_owned();
    // `none` is no algorithm.
    let alg = alg_name.parse::<Algorithm>().map_err(|_| Status::AlgUnsupported)?;
    let kid = match json.get("kid") {
        None => String::new(),
        Some(k) => k.as_str().ok_or(Status::HeaderKid)?.to_owned(),
    };
    let body: Value = serde_json::from_slice(&BASE64.decode(payload).map_err(|_| Status::PayloadBase64)?)
        .map_err(|_| Status::PayloadJson)?;
    if !body.is_object() {
        return Err(Status::PayloadJson);
    }
    if BASE64.decode(signature).is_err() {
        return Err(Status::SignatureBase64);
    }
    Ok(Parsed {
        alg,
        alg_name,
        kid,
        signed: &raw[..header.len() + 1 + payload.len()],
        signature: signature.trim_end_matches('='),
        payload_base64: payload.trim_end_matches('='),
        claims: claims(&body)?,
        payload: body,
    })
}

fn claims(v: &Value) -> Result<Claims, Status> {
    let text = |name: &str| match v.get(name) {
        None => Ok(String::new()),
        Some(s) => s.as_str().map(str::to_owned).ok_or(Status::Claim),
    };
    // Whole seconds; some issuers write fractions.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let time = |name: &str| match v.get(name) {
        None => Ok(None),
        Some(n) => match (n.as_u64(), n.as_f64()) {
            (Some(n), _) => Ok(Some(n)),
            (None, Some(f)) if (0.0..9e15).contains(&f) => Ok(Some(f as u64)),
            _ => Err(Status::Claim),
        },
    };
    let audiences = match v.get("aud") {
        None => vec![],
        Some(Value::String(s)) => vec![s.clone()],
        Some(Value::Array(l)) => {
            l.iter().map(|a| a.as_str().map(str::to_owned).ok_or(Status::Claim)).collect::<Result<_, _>>()?
        }
        Some(_) => return Err(Status::Claim),
    };
    // `iat` decides nothing, but a token that lies about its type is broken.
    time("iat")?;
    Ok(Claims {
        issuer: text("iss")?,
        subject: text("sub")?,
        audiences,
        expires: time("exp")?,
        not_before: time("nbf")?,
    })
}

impl Parsed<'_> {
    /// The token after its signature was found right.
    pub(super) fn into_verified(self, space_delimited: &[String]) -> Verified {
        let payload = Arc::new(self.payload);
        let mut metadata = Arc::clone(&payload);
        for name in space_delimited {
            if let Some(Value::String(s)) = payload.get(name)
                && let Some(slot) = Arc::make_mut(&mut metadata).get_mut(name)
            {
                *slot = s.split_ascii_whitespace().map(|w| Value::String(w.to_owned())).collect();
            }
        }
        Verified { claims: self.claims, payload_base64: self.payload_base64.into(), payload, metadata }
    }
}

/// An audience as it is compared: without scheme and closing slash.
pub(super) fn audience(a: &str) -> &str {
    let a = a.strip_prefix("https://").or_else(|| a.strip_prefix("http://")).unwrap_or(a);
    a.strip_suffix('/').unwrap_or(a)
}

/// A claim as a header value; lists and objects have none.
pub(super) fn primitive(v: &Value) -> Option<String> {
    match v {
        Value::String(s) if !s.is_empty() => Some(s.clone()),
        Value::Number(n) => Some(n.to_string()),
        Value::Bool(b) => Some(b.to_string()),
        _ => None,
    }
}

//! Sessions that stay on a host (GEP-1619).
//!
//! Each rule has sessions of its own: without a name that is written the cookie's or header's is made of the rule's. A
//! cookie of a session that may outlive the browser (`Permanent`) tells it how long; of one that may not, the time stands
//! in the value, where our own proxies look at it.

use std::time::Duration;

use mesh_model::{
    authored::{
        self,
        gateway_api::{CookieLifetime, PersistenceType, SessionPersistence},
    },
    proxy::{SessionState, StatefulSession},
};

use super::attach::Route;
use crate::slots;

/// Why a session cannot be kept as written.
pub(super) fn unsupported(s: &SessionPersistence) -> Option<&'static str> {
    // The API has dropped it: the client keeps the session, and a proxy does not see it pause.
    s.idle_timeout.is_some().then_some("an idleTimeout of sessionPersistence")
}

/// The session of a rule, which is called `rule`.
pub(super) fn kept(
    r: &Route<'_>,
    rule: &str,
    s: &SessionPersistence,
) -> Result<StatefulSession, &'static str> {
    if let Some(why) = unsupported(s) {
        return Err(why);
    }
    let absolute = s.absolute_timeout.as_deref().and_then(|t| t.parse::<authored::Duration>().ok());
    let absolute = absolute.map_or(Duration::ZERO, Duration::from);
    let written = |n: Option<&String>| n.or(s.session_name.as_ref()).filter(|n| !n.is_empty()).cloned();
    let of_rule = || slots::hash(&[r.kind().name(), r.namespace(), r.name(), rule]);
    if s.persistence_type == Some(PersistenceType::Header) {
        let name = written(s.header.as_ref().map(|h| &h.name));
        let name = name.unwrap_or_else(|| format!("x-session-{:08x}", of_rule()));
        let state = Some(SessionState::Header(name.to_ascii_lowercase()));
        return Ok(StatefulSession { state, absolute, ..StatefulSession::default() });
    }
    let cookies = || s.cookie.iter().chain(&s.cookie_config);
    let name = written(cookies().find_map(|c| c.name.as_ref()));
    let name = name.unwrap_or_else(|| format!("session-{:08x}", of_rule()));
    let path = cookies().find_map(|c| c.path.clone()).filter(|p| !p.is_empty());
    let path = path.unwrap_or_else(|| "/".to_owned());
    let lasts = cookies().any(|c| c.lifetime_type == Some(CookieLifetime::Permanent));
    // A cookie's age is in seconds, and one of none would be over at once.
    let whole = Duration::from_secs(absolute.as_secs() + u64::from(absolute.subsec_nanos() > 0));
    let (ttl, absolute) = if lasts { (whole, Duration::ZERO) } else { (Duration::ZERO, absolute) };
    let state = Some(SessionState::Cookie { name, path, ttl });
    Ok(StatefulSession { state, absolute, ..StatefulSession::default() })
}

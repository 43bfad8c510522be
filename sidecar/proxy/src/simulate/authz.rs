//! One policy asked about one request, and what it missed.

use std::net::{IpAddr, SocketAddr};

use mesh_model::proxy as model;
use serde_json::Value;

use super::{Request, Verdict, http::head};
use crate::{
    http::{
        message::RequestHead,
        metadata::{JWT, Metadata},
    },
    matcher::header_value,
    rbac::{Facts, Rbac},
};

/// What policies look at.
#[derive(Debug, Clone)]
pub struct Attributes {
    /// SPIFFE ID of the peer; `None` without mutual TLS.
    pub principal: Option<String>,
    /// Cluster whose intermediate signed its certificate.
    pub cluster: Option<String>,
    /// Address of the connection's other end.
    pub source: IpAddr,
    /// Address of the client.
    pub remote: IpAddr,
    /// Address and port of the workload.
    pub destination: SocketAddr,
    /// Server name of the TLS session.
    pub sni: Option<String>,
    /// The request; `None` for bytes.
    pub request: Option<Request>,
    /// Claims of the request's token, with the key that token authentication notes them under.
    pub token: Option<(String, Value)>,
}

/// Why attributes cannot be judged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthzError {
    /// Method, a header's name or value.
    #[error("the request is not valid HTTP: look at its method and headers")]
    Request,
    /// The policy.
    #[error("the proxy would refuse the policy: {0}")]
    Policy(String),
}

/// Whether a policy matches, and if not, each of its conditions that does not hold.
///
/// # Errors
/// [`AuthzError`].
pub fn judge(
    policy: &model::RbacPolicy,
    attributes: &Attributes,
) -> Result<(Verdict, Vec<String>), AuthzError> {
    let mut asked = Asked::new(attributes)?;
    let verdict = asked.policy(policy)?;
    if verdict == Verdict::Matches {
        return Ok((verdict, vec![]));
    }
    let mut missed = Vec::new();
    if asked.none_of(&policy.permissions, Part::permission)? {
        asked.permissions(&policy.permissions, &mut missed)?;
    }
    if asked.none_of(&policy.principals, Part::principal)? {
        asked.principals(&policy.principals, &mut missed)?;
    }
    missed.dedup();
    Ok((verdict, missed))
}

/// Part of a policy that can be asked on its own.
enum Part {}

impl Part {
    fn permission(p: &model::Permission) -> model::RbacPolicy {
        model::RbacPolicy { permissions: vec![p.clone()], principals: vec![model::Principal::Any] }
    }

    fn principal(p: &model::Principal) -> model::RbacPolicy {
        model::RbacPolicy { permissions: vec![model::Permission::Any], principals: vec![p.clone()] }
    }
}

struct Asked<'a> {
    a: &'a Attributes,
    head: Option<RequestHead>,
    metadata: Metadata,
    principals: Vec<String>,
}

impl<'a> Asked<'a> {
    fn new(a: &'a Attributes) -> Result<Self, AuthzError> {
        let head = match &a.request {
            None => None,
            Some(r) => Some(head(r).ok_or(AuthzError::Request)?),
        };
        let mut metadata = Metadata::default();
        if let Some((key, claims)) = &a.token {
            metadata.set(JWT, key.clone(), std::sync::Arc::new(claims.clone()));
        }
        Ok(Self { a, head, metadata, principals: a.principal.iter().cloned().collect() })
    }

    fn policy(&mut self, p: &model::RbacPolicy) -> Result<Verdict, AuthzError> {
        let rules = model::RbacRules {
            action: model::RbacAction::Allow,
            policies: [(String::new(), p.clone())].into(),
        };
        let rbac = Rbac::new(&model::Rbac { rules: Some(rules), ..model::Rbac::default() })
            .map_err(|e| AuthzError::Policy(e.to_string()))?;
        let facts = Facts {
            local: self.a.destination,
            peer: self.a.source,
            remote: self.a.remote,
            sni: self.a.sni.as_deref(),
            principals: &self.principals,
            authenticated: self.a.principal.is_some(),
            cluster: self.a.cluster.as_deref(),
            request: self.head.as_ref(),
            metadata: Some(&self.metadata),
        };
        let truth = rbac.verdicts(&facts).next().and_then(|(_, _, _, t)| t);
        Ok(match truth {
            Some(true) => Verdict::Matches,
            Some(false) => Verdict::Misses,
            None => Verdict::Unknown,
        })
    }

    fn none_of<T>(&mut self, list: &[T], part: fn(&T) -> model::RbacPolicy) -> Result<bool, AuthzError> {
        for p in list {
            if self.policy(&part(p))? == Verdict::Matches {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Alternatives of which none holds.
    fn permissions(&mut self, list: &[model::Permission], out: &mut Vec<String>) -> Result<(), AuthzError> {
        for p in list {
            if self.policy(&Part::permission(p))? == Verdict::Matches {
                continue;
            }
            match p {
                model::Permission::And(l) => {
                    for p in l {
                        self.permissions(std::slice::from_ref(p), out)?;
                    }
                }
                model::Permission::Or(l) if !l.is_empty() => out.push(self.any(l, Self::permission)),
                one => out.push(self.any(std::slice::from_ref(one), Self::permission)),
            }
        }
        Ok(())
    }

    fn principals(&mut self, list: &[model::Principal], out: &mut Vec<String>) -> Result<(), AuthzError> {
        for p in list {
            if self.policy(&Part::principal(p))? == Verdict::Matches {
                continue;
            }
            match p {
                model::Principal::And(l) => {
                    for p in l {
                        self.principals(std::slice::from_ref(p), out)?;
                    }
                }
                model::Principal::Or(l) if !l.is_empty() => out.push(self.any(l, Self::principal)),
                one => out.push(self.any(std::slice::from_ref(one), Self::principal)),
            }
        }
        Ok(())
    }

    /// `attribute is this, and must be one of these`.
    fn any<T>(&self, list: &[T], words: fn(&Self, &T) -> Words) -> String {
        let all: Vec<Words> = list.iter().map(|p| words(self, p)).collect();
        let Some(first) = all.first() else { return "nothing can match".to_owned() };
        let same = all.iter().all(|w| w.attribute == first.attribute);
        let is = first.value.as_ref().map_or("is not there".to_owned(), |v| format!("is {v:?}"));
        if !same {
            let each: Vec<String> = all.iter().map(|w| format!("{} {}", w.attribute, w.wanted)).collect();
            return format!("none of: {}", each.join("; "));
        }
        let wanted: Vec<&str> = all.iter().map(|w| w.wanted.as_str()).collect();
        format!("{} {is}, and must {}", first.attribute, wanted.join(" or "))
    }

    fn permission(&self, p: &model::Permission) -> Words {
        match p {
            model::Permission::Any => Words::new("everything", None, "match"),
            model::Permission::And(l) => self.all(l.iter().map(|p| self.permission(p))),
            model::Permission::Or(l) => self.either(l.iter().map(|p| self.permission(p))),
            model::Permission::Not(p) => self.permission(p).not(),
            model::Permission::Header(h) => self.header(h),
            model::Permission::Path(m) => self.path(m),
            model::Permission::DestinationIp(n) => {
                Words::new("destination.ip", Some(self.a.destination.ip().to_string()), &format!("be in {n}"))
            }
            model::Permission::DestinationPort(n) => Words::new(
                "destination.port",
                Some(self.a.destination.port().to_string()),
                &format!("be {n}"),
            ),
            model::Permission::ServerName(m) => {
                Words::new("connection.sni", self.a.sni.clone(), &condition(m))
            }
            model::Permission::Metadata(m) => self.claim(m),
        }
    }

    fn principal(&self, p: &model::Principal) -> Words {
        match p {
            model::Principal::Any => Words::new("everybody", None, "match"),
            model::Principal::And(l) => self.all(l.iter().map(|p| self.principal(p))),
            model::Principal::Or(l) => self.either(l.iter().map(|p| self.principal(p))),
            model::Principal::Not(p) => self.principal(p).not(),
            model::Principal::Authenticated(m) => self.peer(m.as_ref()),
            model::Principal::DirectRemoteIp(n) => {
                Words::new("source.ip", Some(self.a.source.to_string()), &format!("be in {n}"))
            }
            model::Principal::RemoteIp(n) => {
                Words::new("remote.ip", Some(self.a.remote.to_string()), &format!("be in {n}"))
            }
            model::Principal::Header(h) => self.header(h),
            model::Principal::Path(m) => self.path(m),
            model::Principal::SourceCluster(m) => {
                Words::new("source.cluster", self.a.cluster.clone(), &condition(m))
            }
            model::Principal::Metadata(m) => self.claim(m),
        }
    }

    fn all(&self, list: impl Iterator<Item = Words>) -> Words {
        Words::joined(list, " and ")
    }

    fn either(&self, list: impl Iterator<Item = Words>) -> Words {
        Words::joined(list, " or ")
    }

    fn path(&self, m: &model::StringMatch) -> Words {
        let path = self.head.as_ref().map(|h| h.path_only().to_owned());
        Words::new("request.url_path", path, &condition(m))
    }

    fn header(&self, h: &model::HeaderMatch) -> Words {
        let attribute = match h.name.as_str() {
            ":method" => "request.method".to_owned(),
            ":authority" => "request.host".to_owned(),
            name => format!("request.headers[{name}]"),
        };
        let value = self.head.as_ref().and_then(|r| {
            header_value(r, h.name.as_bytes()).map(|v| String::from_utf8_lossy(&v).into_owned())
        });
        let wanted = match &h.value {
            model::HeaderValueMatch::Present(true) => "be there".to_owned(),
            model::HeaderValueMatch::Present(false) => "not be there".to_owned(),
            model::HeaderValueMatch::Value(m) => condition(m),
        };
        let words = Words::new(&attribute, value, &wanted);
        if h.invert { words.not() } else { words }
    }

    /// Principals and their parts are conditions on the SPIFFE ID, which nobody writes.
    fn peer(&self, m: Option<&model::StringMatch>) -> Words {
        let id = self.a.principal.as_deref().map(|p| p.trim_start_matches("spiffe://").to_owned());
        let Some(m) = m else { return Words::new("source.principal", id, "be there") };
        if let model::StringMatchKind::Regex(r) = &m.kind
            && let Some(rest) = r.strip_prefix("spiffe://[^/]+/ns/")
        {
            let plain = rest.replace('\\', "");
            let part = |n: usize| id.as_deref().and_then(|p| p.split('/').nth(n)).map(str::to_owned);
            return match plain.strip_suffix("/.*") {
                Some(ns) => {
                    Words::new("source.namespace", part(2), &format!("be {ns:?}").replace("[^/]*", "*"))
                }
                None => Words::new(
                    "source.serviceAccount",
                    part(2).zip(part(4)).map(|(ns, sa)| format!("{ns}/{sa}")),
                    &format!("be {:?}", plain.replace("/sa/", "/")),
                ),
            };
        }
        let bare = |s: &str| s.trim_start_matches("spiffe://").to_owned();
        let kind = match &m.kind {
            model::StringMatchKind::Exact(s) => model::StringMatchKind::Exact(bare(s)),
            model::StringMatchKind::Prefix(s) => model::StringMatchKind::Prefix(bare(s)),
            other => other.clone(),
        };
        Words::new("source.principal", id, &condition(&model::StringMatch { kind, ..m.clone() }))
    }

    fn claim(&self, m: &model::MetadataMatch) -> Words {
        let path: String = m.path.iter().skip(1).map(|k| format!("[{k}]")).collect();
        let value = self.metadata.get(&m.filter, &m.path).map(|v| match v {
            Value::String(s) => s.clone(),
            other => other.to_string(),
        });
        let words = Words::new(&format!("request.auth.claims{path}"), value, &wanted_value(&m.value));
        if m.invert { words.not() } else { words }
    }
}

struct Words {
    attribute: String,
    value: Option<String>,
    wanted: String,
}

impl Words {
    fn new(attribute: &str, value: Option<String>, wanted: &str) -> Self {
        Self { attribute: attribute.to_owned(), value, wanted: wanted.to_owned() }
    }

    fn not(self) -> Self {
        Self { wanted: format!("not {}", self.wanted), ..self }
    }

    fn joined(list: impl Iterator<Item = Self>, with: &str) -> Self {
        let all: Vec<Self> = list.collect();
        let Some(first) = all.first() else { return Self::new("nothing", None, "match") };
        let same = all.iter().all(|w| w.attribute == first.attribute);
        let wanted: Vec<String> = all
            .iter()
            .enumerate()
            .map(
                |(i, w)| {
                    if same || i == 0 { w.wanted.clone() } else { format!("{} {}", w.attribute, w.wanted) }
                },
            )
            .collect();
        Self { attribute: first.attribute.clone(), value: first.value.clone(), wanted: wanted.join(with) }
    }
}

fn condition(m: &model::StringMatch) -> String {
    match &m.kind {
        model::StringMatchKind::Exact(s) => format!("be {s:?}"),
        model::StringMatchKind::Prefix(s) => format!("begin with {s:?}"),
        model::StringMatchKind::Suffix(s) => format!("end with {s:?}"),
        model::StringMatchKind::Contains(s) => format!("contain {s:?}"),
        model::StringMatchKind::Regex(s) if s == ".+" => "be there".to_owned(),
        model::StringMatchKind::Regex(s) => format!("match the expression {s}"),
    }
}

fn wanted_value(v: &model::ValueMatch) -> String {
    match v {
        model::ValueMatch::Null => "be null".to_owned(),
        model::ValueMatch::Bool(b) => format!("be {b}"),
        model::ValueMatch::String(m) => condition(m),
        model::ValueMatch::Present(_) => "be there".to_owned(),
        model::ValueMatch::OneOf(m) => format!("have an element that must {}", wanted_value(m)),
        // A text, or a list with it.
        model::ValueMatch::Or(l) => l.first().map(wanted_value).unwrap_or_default(),
    }
}

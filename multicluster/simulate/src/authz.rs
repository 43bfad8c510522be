//! Whether policies let one request in, by which rule, and what each rule missed.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use mesh_model::authored::AuthorizationAction;
use mesh_proxy::simulate::{Attributes, AuthzError, Request, Verdict, judge};
use pilot::{generate, world::World};
use serde::Serialize;
use serde_json::{Map, Value};

/// Key under which proxies note the claims of a verified token.
const CLAIMS: &str = "payload";
const NOWHERE: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

/// A request that cannot be judged.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Not a map.
    #[error("the request is not a flat map of attributes to values: {0}")]
    Syntax(String),
    /// Nobody knows the attribute.
    #[error(
        "{0}: unknown attribute; known are source.principal, source.namespace, source.serviceAccount, source.cluster, \
             source.ip, remote.ip, request.method, request.host, request.url_path, request.headers[x], \
             request.auth.principal, request.auth.audiences, request.auth.presenter, request.auth.claims[x], \
             destination.ip, destination.port, connection.sni, workload.namespace, workload.labels[x]"
    )]
    Attribute(String),
    /// The value is of another form.
    #[error("{attribute}: {value} is not {wanted}")]
    Value {
        /// Attribute.
        attribute: String,
        /// As given.
        value: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// It could not be judged.
    #[error(transparent)]
    Authz(#[from] AuthzError),
}

/// The answer.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    /// `allow` or `deny`.
    pub decision: &'static str,
    /// `namespace/name` of the policy that decides; null if none does.
    pub policy: Option<String>,
    /// Position of its rule.
    pub rule: Option<usize>,
    /// Provider that a CUSTOM policy asks first. What it says is not known here: the decision is what follows a yes. One
    /// that cannot be asked denies, if the files define any.
    pub custom: Option<String>,
    /// AUDIT policies that match.
    pub audit: Vec<String>,
    /// Policies that are only logged (dry run) and match.
    pub dry_run: Vec<String>,
    /// Rules that do not match, and which conditions of theirs do not hold.
    pub missed: Vec<Missed>,
}

/// A rule that does not match.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Missed {
    /// `namespace/name` of the policy.
    pub policy: String,
    /// Position of the rule; null for a policy without rules.
    pub rule: Option<usize>,
    /// `ALLOW`, `DENY`, `AUDIT` or `CUSTOM`.
    pub action: &'static str,
    /// Conditions that do not hold.
    pub conditions: Vec<String>,
}

/// A request as a flat map says it.
#[derive(Debug, Clone, Default)]
pub struct RequestFile {
    namespace: String,
    labels: BTreeMap<String, String>,
    principal: Option<String>,
    source_namespace: Option<String>,
    account: Option<String>,
    cluster: Option<String>,
    source: Option<IpAddr>,
    remote: Option<IpAddr>,
    destination: Option<IpAddr>,
    port: Option<u16>,
    sni: Option<String>,
    method: Option<String>,
    host: Option<String>,
    path: Option<String>,
    headers: Vec<(String, String)>,
    claims: Map<String, Value>,
}

impl RequestFile {
    /// Reads JSON or YAML.
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn parse(text: &str) -> Result<Self, RequestError> {
        let map: BTreeMap<String, Value> =
            serde_saphyr::from_str(text).map_err(|e| RequestError::Syntax(e.to_string()))?;
        let mut out = Self { namespace: galley::DEFAULT_NAMESPACE.to_owned(), ..Self::default() };
        for (key, value) in &map {
            out.set(key, value)?;
        }
        Ok(out)
    }

    fn set(&mut self, key: &str, value: &Value) -> Result<(), RequestError> {
        let wrong =
            |wanted| RequestError::Value { attribute: key.to_owned(), value: value.to_string(), wanted };
        let text = || match value {
            Value::String(s) => Ok(s.clone()),
            Value::Number(n) => Ok(n.to_string()),
            Value::Bool(b) => Ok(b.to_string()),
            _ => Err(wrong("a text")),
        };
        let ip = || text()?.parse::<IpAddr>().map_err(|_| wrong("an IP address"));
        let inner = |prefix: &str| key.strip_prefix(prefix).and_then(|k| k.strip_suffix(']'));
        match key {
            "source.principal" => self.principal = Some(text()?).filter(|p| !p.is_empty()),
            "source.namespace" => self.source_namespace = Some(text()?).filter(|p| !p.is_empty()),
            "source.serviceAccount" => self.account = Some(text()?).filter(|p| !p.is_empty()),
            "source.cluster" => self.cluster = Some(text()?),
            "source.ip" => self.source = Some(ip()?),
            "remote.ip" => self.remote = Some(ip()?),
            "destination.ip" => self.destination = Some(ip()?),
            "destination.port" => self.port = Some(text()?.parse().map_err(|_| wrong("a port"))?),
            "connection.sni" => self.sni = Some(text()?),
            "request.method" => self.method = Some(text()?),
            "request.host" => self.host = Some(text()?),
            "request.url_path" | "request.path" => self.path = Some(text()?),
            "request.auth.principal" => {
                let whole = text()?;
                // Subjects hold no slash as a rule, issuers do.
                let (iss, sub) = whole.rsplit_once('/').ok_or_else(|| wrong("ISSUER/SUBJECT"))?;
                self.claims.entry("iss").or_insert_with(|| iss.into());
                self.claims.entry("sub").or_insert_with(|| sub.into());
            }
            "request.auth.audiences" => {
                self.claims.insert("aud".to_owned(), value.clone());
            }
            "request.auth.presenter" => {
                self.claims.insert("azp".to_owned(), value.clone());
            }
            "workload.namespace" => self.namespace = text()?,
            _ => {
                if let Some(name) = inner("request.headers[") {
                    self.headers.push((name.to_ascii_lowercase(), text()?));
                } else if let Some(name) = inner("workload.labels[") {
                    self.labels.insert(name.to_owned(), text()?);
                } else if let Some(path) = inner("request.auth.claims[") {
                    let keys: Vec<&str> = path.split("][").collect();
                    claim(&mut self.claims, &keys, value)
                        .ok_or_else(|| wrong("a claim inside of another"))?;
                } else {
                    return Err(RequestError::Attribute(key.to_owned()));
                }
            }
        }
        Ok(())
    }

    /// The peer's SPIFFE ID. Of a namespace alone the account is nobody's.
    fn spiffe(&self, world: &World) -> Result<Option<String>, RequestError> {
        if let Some(p) = &self.principal {
            let bare = p.strip_prefix("spiffe://").unwrap_or(p);
            let namespace = bare.split('/').nth(2);
            let said = self.source_namespace.as_deref();
            if said.is_some() && bare.split('/').nth(1) == Some("ns") && namespace != said {
                return Err(RequestError::Value {
                    attribute: "source.namespace".to_owned(),
                    value: said.unwrap_or_default().to_owned(),
                    wanted: "the namespace in source.principal",
                });
            }
            return Ok(Some(format!("spiffe://{bare}")));
        }
        let domain = &world.settings.trust_domain;
        if let Some((ns, sa)) = self.account.as_deref().map(|a| {
            let own = self.source_namespace.as_deref().unwrap_or(&self.namespace);
            a.split_once('/').unwrap_or((own, a))
        }) {
            return Ok(Some(format!("spiffe://{domain}/ns/{ns}/sa/{sa}")));
        }
        Ok(self.source_namespace.as_ref().map(|ns| format!("spiffe://{domain}/ns/{ns}/sa/(unknown)")))
    }

    fn attributes(&self, world: &World) -> Result<Attributes, RequestError> {
        let http = self.method.is_some()
            || self.host.is_some()
            || self.path.is_some()
            || !self.headers.is_empty()
            || !self.claims.is_empty();
        let source = self.source.or(self.remote).unwrap_or(NOWHERE);
        Ok(Attributes {
            principal: self.spiffe(world)?,
            cluster: self.cluster.clone(),
            source,
            remote: self.remote.unwrap_or(source),
            destination: SocketAddr::new(self.destination.unwrap_or(NOWHERE), self.port.unwrap_or(0)),
            sni: self.sni.clone(),
            request: http.then(|| Request {
                method: self.method.clone().unwrap_or_else(|| "GET".to_owned()),
                authority: self.host.clone().unwrap_or_default(),
                path: self.path.clone().unwrap_or_else(|| "/".to_owned()),
                headers: self.headers.clone(),
                http2: false,
            }),
            token: (!self.claims.is_empty()).then(|| (CLAIMS.to_owned(), Value::Object(self.claims.clone()))),
        })
    }
}

/// Sets a claim inside of others.
fn claim(all: &mut Map<String, Value>, keys: &[&str], value: &Value) -> Option<()> {
    let (first, rest) = keys.split_first()?;
    if rest.is_empty() {
        all.insert((*first).to_owned(), value.clone());
        return Some(());
    }
    let inner = all.entry(*first).or_insert_with(|| Value::Object(Map::new()));
    claim(inner.as_object_mut()?, rest, value)
}

/// Judges a request as the workload's proxy would.
pub(crate) fn decide(world: &World, request: &RequestFile) -> Result<Decision, RequestError> {
    let attributes = request.attributes(world)?;
    let address = request.destination.unwrap_or(NOWHERE);
    let proxy = pilot::simulate::workload(world, &request.namespace, &request.labels, address);
    let rules = generate::authorization(&proxy, world, attributes.request.is_some());
    let defined = !world.config.mesh.extension_providers.is_empty();
    let mut out = Decision { decision: "allow", ..Decision::default() };
    let mut allows = false;
    let (mut denied, mut allowed, mut custom) = (None, None, None);
    for r in &rules {
        let policy = format!("{}/{}", r.namespace, r.name);
        let (verdict, conditions) = match &r.policy {
            Some(p) => judge(p, &attributes)?,
            None if r.index.is_none() => (Verdict::Misses, vec!["the policy has no rules".to_owned()]),
            None => (Verdict::Misses, vec!["it looks at requests, and this is none".to_owned()]),
        };
        // What cannot be known denies, and allows nothing.
        let denies = matches!(r.action, AuthorizationAction::Deny | AuthorizationAction::Custom);
        let matches = verdict == Verdict::Matches || (verdict == Verdict::Unknown && denies);
        if !r.dry_run && r.action == AuthorizationAction::Allow {
            allows = true;
        }
        if !matches {
            let action = match r.action {
                AuthorizationAction::Allow => "ALLOW",
                AuthorizationAction::Deny => "DENY",
                AuthorizationAction::Audit => "AUDIT",
                AuthorizationAction::Custom => "CUSTOM",
            };
            out.missed.push(Missed { policy, rule: r.index, action, conditions });
            continue;
        }
        let found = Some((policy.clone(), r.index));
        let once = |list: &mut Vec<String>| {
            if !list.contains(&policy) {
                list.push(policy.clone());
            }
        };
        match r.action {
            _ if r.dry_run => once(&mut out.dry_run),
            AuthorizationAction::Audit => once(&mut out.audit),
            AuthorizationAction::Custom => {
                // Files of policies alone do not say who can be asked; those of a mesh do.
                if !r.can_ask && defined {
                    custom = custom.or(found);
                }
                out.custom = out.custom.or_else(|| r.provider.clone());
            }
            AuthorizationAction::Deny => denied = denied.or(found),
            AuthorizationAction::Allow => allowed = allowed.or(found),
        }
    }
    let by = match (denied.or(custom), allowed) {
        (Some(by), _) => {
            out.decision = "deny";
            Some(by)
        }
        (None, Some(by)) => Some(by),
        (None, None) => {
            if allows {
                out.decision = "deny";
            }
            None
        }
    };
    (out.policy, out.rule) = by.map_or((None, None), |(p, r)| (Some(p), r));
    Ok(out)
}

//! Envoy's bootstrap file (`envoy.config.bootstrap.v3.Bootstrap`), JSON or YAML.
//!
//! Clusters, listeners and secrets are translated one at a time as the file is read, so that ten thousand of them
//! never exist as protobuf or as a tree. What cannot be honoured is refused with its path; what only concerns
//! statistics, watchdogs or the allocator of another program is ignored and reported as a warning.

mod dynamic;
pub(crate) mod json;
pub(crate) mod schema;

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
};

use bytes::Bytes;
use envoy_types::pb::envoy::config::bootstrap::v3 as wire;
use prost::Message as _;
use serde::{
    Deserializer,
    de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor},
};

use self::{
    json::{FieldName, FieldValue, MessageValue, Seen, Translator},
    schema::Message,
};
use crate::{
    client::{
        Mode,
        proxy::{ProxyState, asks, eds_name, routes_of},
    },
    codec::{self, DecodeError, Secret},
    node::{NodeInfo, NodeKind},
    pb,
    type_url::{CDS, LDS, SDS},
};

/// A larger file is a mistake.
const MAX_FILE: u64 = 256 * 1024 * 1024;
/// Problems that are listed; the rest is counted.
const LISTED: usize = 20;
/// YAML is read by people; machines write JSON.
const YAML_NODES: usize = 5_000_000;

/// What a bootstrap file says.
#[derive(Debug)]
pub struct Bootstrap {
    /// Who this proxy is, to a control plane and in its logs.
    pub node: NodeInfo,
    /// Where the admin pages are; without it there are none.
    pub admin: Option<SocketAddr>,
    /// Static listeners and clusters.
    pub resources: ProxyState,
    /// Static secrets.
    pub secrets: Vec<Secret>,
    /// The control plane; `None` if the file names none.
    pub dynamic: Option<Dynamic>,
    /// What was ignored.
    pub warnings: Vec<String>,
}

/// Where the rest comes from: `dynamic_resources`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dynamic {
    /// The static cluster that is the control plane.
    pub cluster: String,
    /// Variant of the protocol.
    pub mode: Mode,
    /// Whether clusters are asked for.
    pub clusters: bool,
    /// Whether listeners are asked for.
    pub listeners: bool,
}

/// Why a bootstrap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// It cannot be read.
    #[error("{}", file.display())]
    Read {
        /// Which file.
        file: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It says what this proxy cannot do, or is not a bootstrap.
    #[error("{}: {}", file.display(), problems.join("\n"))]
    Content {
        /// Which file.
        file: PathBuf,
        /// One line for each problem, beginning with the field's path.
        problems: Vec<String>,
    },
}

/// Fields without a meaning for this program: how another one counts, watches over itself and allocates.
const IGNORED: &[&str] = &[
    "application_log_config",
    "deferred_stat_options",
    "enable_dispatcher_stats",
    "flags_path",
    "layered_runtime",
    "memory_allocator_manager",
    "perf_tracing_file_path",
    "stats_config",
    "stats_flush_interval",
    "stats_flush_on_admin",
    "stats_server_version_override",
    "watchdog",
    "watchdogs",
];

impl Bootstrap {
    /// Reads a file: YAML if it is named `.yaml` or `.yml`, else JSON.
    ///
    /// # Errors
    /// [`BootstrapError`], with everything that is wrong as far as it can be seen.
    pub fn load(path: &Path) -> Result<Self, BootstrapError> {
        let content = |problems| BootstrapError::Content { file: path.to_owned(), problems };
        let read = |source| BootstrapError::Read { file: path.to_owned(), source };
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        let size = std::fs::metadata(path).map_err(read)?.len();
        if size > MAX_FILE {
            return Err(content(vec![format!("has {size} bytes; {MAX_FILE} is the limit")]));
        }
        match extension {
            "pb" | "pb_text" | "textproto" => {
                Err(content(vec!["is not JSON or YAML, which is what can be read".into()]))
            }
            "yaml" | "yml" => {
                let text = std::fs::read_to_string(path).map_err(read)?;
                Self::from_yaml(&text).map_err(content)
            }
            _ => {
                let text = std::fs::read(path).map_err(read)?;
                Self::from_json(&text).map_err(content)
            }
        }
    }

    /// Reads JSON.
    ///
    /// # Errors
    /// The problems, one a line.
    pub fn from_json(text: &[u8]) -> Result<Self, Vec<String>> {
        let mut json = serde_json::Deserializer::from_slice(text);
        let reader = Reader::default();
        let read = reader.read(&mut json)?;
        json.end().map_err(|e| vec![e.to_string()])?;
        Ok(read)
    }

    /// Reads YAML.
    ///
    /// # Errors
    /// The problems, one a line.
    pub fn from_yaml(text: &str) -> Result<Self, Vec<String>> {
        let options = serde_saphyr::options! {
            budget: serde_saphyr::budget! {
                max_depth: 128,
                max_nodes: YAML_NODES,
                max_events: 4 * YAML_NODES,
                max_aliases: 10_000,
                max_anchors: 1_000,
                max_documents: 1,
                max_total_scalar_bytes: 64 * 1024 * 1024,
            },
            duplicate_keys: serde_saphyr::DuplicateKeyPolicy::Error,
            strict_booleans: true,
            with_snippet: false,
            emit_comments: false,
        };
        let tree: serde_json::Value = serde_saphyr::from_str_with_options(text, options)
            .map_err(|e| vec![e.without_snippet().to_string()])?;
        Reader::default().read(tree)
    }
}

/// Collects what a file says.
struct Reader {
    t: Translator,
    out: Vec<u8>,
    bootstrap: Bootstrap,
    problems: Vec<String>,
    more: usize,
}

impl Default for Reader {
    fn default() -> Self {
        let node = NodeInfo { name: String::new(), cluster: String::new(), ..NodeInfo::component("") };
        let bootstrap = Bootstrap {
            node,
            admin: None,
            resources: ProxyState::default(),
            secrets: vec![],
            dynamic: None,
            warnings: vec![],
        };
        Self { t: Translator::new(), out: vec![], bootstrap, problems: vec![], more: 0 }
    }
}

impl Reader {
    fn read<'de, D: Deserializer<'de>>(mut self, d: D) -> Result<Bootstrap, Vec<String>> {
        if let Err(e) = d.deserialize_any(Top(&mut self)) {
            let path = self.t.path();
            let problem = if path.is_empty() { e.to_string() } else { format!("{path}: {e}") };
            // Nothing behind it was read.
            self.problems.push(problem);
        }
        self.check();
        if self.problems.is_empty() {
            return Ok(self.bootstrap);
        }
        if self.more > 0 {
            self.problems.push(format!("and {} more", self.more));
        }
        Err(self.problems)
    }

    /// What depends on more than one part of the file.
    fn check(&mut self) {
        let b = &self.bootstrap;
        let mut found = Vec::new();
        match &b.dynamic {
            Some(d) if b.resources.clusters.contains_key(&d.cluster) => {}
            Some(d) => found.push(format!("dynamic_resources: {:?} is not a static cluster", d.cluster)),
            None => {
                for c in b.resources.clusters.values().filter_map(|c| eds_name(c)) {
                    found.push(format!("static_resources: endpoints of {c:?} need an ads_config"));
                }
                for r in b.resources.listeners.values().flat_map(|l| routes_of(l)) {
                    found.push(format!("static_resources: routes {r:?} need an ads_config"));
                }
            }
        }
        let delta = b.dynamic.as_ref().is_some_and(|d| d.mode == Mode::Delta);
        for l in b.resources.listeners.values().filter(|l| !delta && asks(l)) {
            let name = &l.name;
            found.push(format!(
                "static_resources: on_demand of {name:?} needs an ads_config of api_type DELTA_GRPC"
            ));
        }
        // A part that was refused is missing everywhere else.
        if self.problems.is_empty() {
            for f in found {
                self.problem(f);
            }
        }
    }

    fn problem(&mut self, text: String) {
        if self.problems.len() < LISTED {
            self.problems.push(text);
        } else {
            self.more += 1;
        }
    }

    /// Reads a message that is not a list of resources into `self.out`.
    fn whole<'de, A: MapAccess<'de>>(&mut self, map: &mut A, message: &str) -> Result<bool, A::Error> {
        self.out.clear();
        let message = self.t.message(message)?;
        map.next_value_seed(MessageValue { t: &self.t, message, out: &mut self.out })
    }

    /// Takes one resource that was translated.
    fn resource(&mut self, kind: Resource) {
        let any = |type_url: &str, out: &[u8]| pb::Any {
            type_url: type_url.to_owned(),
            value: Bytes::copy_from_slice(out),
        };
        let state = &mut self.bootstrap.resources;
        let refused = match kind {
            Resource::Cluster => codec::decode_cluster(&any(CDS, &self.out)).map(|c| {
                let name = c.name.clone();
                state.clusters.insert(name.clone(), Arc::new(c)).map(|_| name)
            }),
            Resource::Listener => codec::decode_listener(&any(LDS, &self.out)).map(|mut l| {
                if l.name.is_empty() {
                    l.name = l.address.to_string();
                }
                let name = l.name.clone();
                state.listeners.insert(name.clone(), Arc::new(l)).map(|_| name)
            }),
            Resource::Secret => codec::decode_secret(&any(SDS, &self.out)).map(|s| {
                let twice = self.bootstrap.secrets.iter().any(|o| o.name == s.name).then(|| s.name.clone());
                self.bootstrap.secrets.push(s);
                twice
            }),
        };
        match refused {
            Ok(None) => {}
            Ok(Some(name)) => {
                let path = self.t.path();
                self.problem(format!("{path}: another one is named {name:?} as well"));
            }
            Err(DecodeError { resource, field, reason }) => {
                let path = self.t.path();
                self.problem(format!("{path}.{field}: {reason} (in {resource:?})"));
            }
        }
    }

    fn node(&mut self) -> Result<(), String> {
        let node = pb::Node::decode(self.out.as_slice()).map_err(|e| e.to_string())?;
        let from = NodeInfo::from_pb(Some(&pb::Node { id: String::new(), ..node.clone() }))
            .map_err(|e| e.to_string())?;
        self.bootstrap.node = NodeInfo {
            id: node.id.clone(),
            kind: NodeKind::Component,
            name: node.id,
            cluster: node.cluster,
            user_agent: "flotilla".to_owned(),
            incremental: false,
            ..from
        };
        Ok(())
    }

    #[allow(deprecated)]
    fn admin(&mut self) -> Result<(), String> {
        let admin = wire::Admin::decode(self.out.as_slice()).map_err(|e| e.to_string())?;
        for (set, name) in [
            (!admin.access_log.is_empty(), "access_log"),
            (!admin.access_log_path.is_empty(), "access_log_path"),
            (!admin.profile_path.is_empty(), "profile_path"),
            (admin.ignore_global_conn_limit, "ignore_global_conn_limit"),
        ] {
            if set {
                self.bootstrap.warnings.push(format!("admin.{name} is ignored"));
            }
        }
        if !admin.socket_options.is_empty() {
            return Err("admin.socket_options: is set, which is not supported".into());
        }
        if !admin.allow_paths.is_empty() {
            return Err("admin.allow_paths: is set, which is not supported".into());
        }
        let Some(address) = admin.address else { return Ok(()) };
        let (ip, port) = codec::socket_address(address).map_err(|e| format!("admin.{e}"))?;
        let ip: IpAddr = ip.parse().map_err(|_| format!("admin.address: {ip:?} is not an IP address"))?;
        self.bootstrap.admin = Some(SocketAddr::new(ip, port));
        Ok(())
    }
}

#[derive(Clone, Copy)]
enum Resource {
    Cluster,
    Listener,
    Secret,
}

/// The file as a whole.
struct Top<'a>(&'a mut Reader);

impl<'de> Visitor<'de> for Top<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an envoy.config.bootstrap.v3.Bootstrap")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let r = self.0;
        let message = r.t.message::<A::Error>("envoy.config.bootstrap.v3.Bootstrap")?;
        let mut seen = Seen::default();
        while let Some(field) = map.next_key_seed(FieldName { message: &message })? {
            r.t.enter(field.name);
            seen.check::<A::Error>(&field)?;
            match field.name {
                "static_resources" => map.next_value_seed(Static(r))?,
                "node" => {
                    r.whole(&mut map, "envoy.config.core.v3.Node")?;
                    if let Err(e) = r.node() {
                        r.problem(format!("node: {e}"));
                    }
                }
                "admin" => {
                    r.whole(&mut map, "envoy.config.bootstrap.v3.Admin")?;
                    if let Err(e) = r.admin() {
                        r.problem(e);
                    }
                }
                "dynamic_resources" => {
                    r.whole(&mut map, "envoy.config.bootstrap.v3.Bootstrap.DynamicResources")?;
                    match dynamic::decode(&r.out, &mut r.bootstrap.warnings) {
                        Ok(d) => r.bootstrap.dynamic = d,
                        Err(e) => r.problem(format!("dynamic_resources.{e}")),
                    }
                }
                name => {
                    // Read all the same: a mistake in it is one.
                    r.out.clear();
                    map.next_value_seed(FieldValue { t: &r.t, field, out: &mut r.out })?;
                    // Set to nothing, such as `{}`, still is set; `null` is not.
                    if r.out.is_empty() {
                        // Nothing.
                    } else if IGNORED.contains(&name) {
                        r.bootstrap.warnings.push(format!("{name} is ignored"));
                    } else {
                        r.problem(format!("{name}: is set, which is not supported"));
                    }
                }
            }
            r.t.leave();
        }
        Ok(())
    }
}

/// `static_resources`.
struct Static<'a>(&'a mut Reader);

impl<'de> DeserializeSeed<'de> for Static<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Static<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("listeners, clusters and secrets")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let r = self.0;
        let message = r.t.message::<A::Error>("envoy.config.bootstrap.v3.Bootstrap.StaticResources")?;
        let mut seen = Seen::default();
        while let Some(field) = map.next_key_seed(FieldName { message: &message })? {
            r.t.enter(field.name);
            seen.check::<A::Error>(&field)?;
            let (kind, message) = match field.name {
                "clusters" => (Resource::Cluster, "envoy.config.cluster.v3.Cluster"),
                "listeners" => (Resource::Listener, "envoy.config.listener.v3.Listener"),
                "secrets" => (Resource::Secret, "envoy.extensions.transport_sockets.tls.v3.Secret"),
                name => return Err(A::Error::custom(format!("{name} is not supported"))),
            };
            let message = r.t.message(message)?;
            map.next_value_seed(Resources { r, kind, message })?;
            r.t.leave();
        }
        Ok(())
    }
}

/// A list of resources.
struct Resources<'a> {
    r: &'a mut Reader,
    kind: Resource,
    message: Rc<Message>,
}

impl<'de> DeserializeSeed<'de> for Resources<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Resources<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let Self { r, kind, message } = self;
        for i in 0.. {
            r.t.enter_item(i);
            r.out.clear();
            let item = MessageValue { t: &r.t, message: Rc::clone(&message), out: &mut r.out };
            match seq.next_element_seed(item)? {
                None => {
                    r.t.leave();
                    break;
                }
                Some(false) => return Err(A::Error::custom("null has no place in a list")),
                Some(true) => r.resource(kind),
            }
            r.t.leave();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

//! Configuration documents to a dispatch table.
//!
//! Every object is checked on its own and against what it refers to; a bad one is left out by name
//! with its reason, and what does not depend on it goes on. Whether an instance fits its handler is
//! decided here, not when a request comes.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use mesh_model::authored::{self, Kind, Spec};

use crate::{
    adapters::{Handler, LogSink, Template},
    expr::{self, Expression, Type},
};

/// A document of configuration.
#[derive(Debug, Clone)]
pub(crate) struct Object {
    pub namespace: String,
    pub name: String,
    pub spec: Spec,
}

/// An object that is left out.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ConfigError {
    /// `kind namespace/name`.
    pub object: String,
    /// Why.
    pub message: String,
}

/// A handler and what it was built from, so that an unchanged one keeps its state.
#[derive(Debug, Clone)]
pub(crate) struct BuiltHandler {
    params: Spec,
    pub handler: Arc<Handler>,
}

/// Compiled fields of an instance.
#[derive(Debug)]
pub(crate) struct Instance {
    /// `name.kind.namespace`.
    pub full: Arc<str>,
    pub name: String,
    pub template: Template,
    pub fields: Fields,
}

#[derive(Debug)]
pub(crate) enum Fields {
    Nothing,
    ListEntry(Expression),
    Quota(BTreeMap<String, Expression>),
    LogEntry { variables: BTreeMap<String, Expression>, timestamp: Option<Expression>, severity: Expression },
    Metric { value: Expression, dimensions: BTreeMap<String, Expression> },
}

impl Instance {
    fn field_names(&self) -> Vec<&str> {
        match &self.fields {
            Fields::Nothing | Fields::ListEntry(_) => vec![],
            Fields::Quota(m)
            | Fields::LogEntry { variables: m, .. }
            | Fields::Metric { dimensions: m, .. } => m.keys().map(String::as_str).collect(),
        }
    }
}

/// A handler with the instances that it gets.
#[derive(Debug)]
pub(crate) struct Action {
    /// `name.kind.namespace`, part of the message of a denial.
    pub handler_name: Arc<str>,
    pub handler: Arc<Handler>,
    pub instances: Vec<Arc<Instance>>,
}

/// A rule that applies.
#[derive(Debug)]
pub(crate) struct Rule {
    /// `None` is always.
    pub condition: Option<Expression>,
    pub actions: Vec<Action>,
}

/// Everything that requests are dispatched by.
#[derive(Debug, Default)]
pub(crate) struct Config {
    /// Rules by namespace.
    pub rules: HashMap<String, Vec<Rule>>,
    /// Handlers by `name.kind.namespace`.
    pub handlers: BTreeMap<String, BuiltHandler>,
    pub errors: Vec<ConfigError>,
}

/// Kinds that mixer reads.
pub(crate) const KINDS: &[Kind] = &[
    Kind::Rule,
    Kind::Handler,
    Kind::Instance,
    Kind::Denier,
    Kind::ListChecker,
    Kind::MemQuota,
    Kind::Stdio,
    Kind::Prometheus,
    Kind::CheckNothing,
    Kind::ReportNothing,
    Kind::ListEntry,
    Kind::Quota,
    Kind::LogEntry,
    Kind::Metric,
];

struct Builder<'a> {
    errors: Vec<ConfigError>,
    handlers: BTreeMap<String, BuiltHandler>,
    instances: HashMap<String, Arc<Instance>>,
    old: &'a Config,
    sink: &'a LogSink,
    /// Names of Prometheus metrics and the handler that has them.
    metrics: HashMap<String, String>,
}

impl Config {
    /// Builds the table. Handlers whose parameters are those of `old` are taken over.
    pub(crate) fn build(objects: &[Object], old: &Config, sink: &LogSink) -> Self {
        let mut b = Builder {
            errors: vec![],
            handlers: BTreeMap::new(),
            instances: HashMap::new(),
            old,
            sink,
            metrics: HashMap::new(),
        };
        for o in objects {
            b.handler_or_instance(o);
        }
        let mut rules: HashMap<String, Vec<Rule>> = HashMap::new();
        for o in objects {
            if let Spec::Rule(r) = &o.spec
                && let Some(rule) = b.rule(o, r)
            {
                rules.entry(o.namespace.clone()).or_default().push(rule);
            }
        }
        Self { rules, handlers: b.handlers, errors: b.errors }
    }
}

impl Builder<'_> {
    fn reject(&mut self, o: &Object, message: impl Into<String>) {
        let object = format!("{} {}/{}", o.spec.kind().name(), o.namespace, o.name);
        self.errors.push(ConfigError { object, message: message.into() });
    }

    fn handler_or_instance(&mut self, o: &Object) {
        let full = |kind: &str| format!("{}.{kind}.{}", o.name, o.namespace);
        match &o.spec {
            Spec::Rule(_) => {}
            Spec::Handler(h) => {
                let kind = match h.compiled_adapter.as_str() {
                    "denier" => Kind::Denier,
                    "listchecker" => Kind::ListChecker,
                    "memquota" => Kind::MemQuota,
                    "stdio" => Kind::Stdio,
                    "prometheus" => Kind::Prometheus,
                    other => return self.reject(o, format!("unsupported adapter {other:?}")),
                };
                match Spec::from_json(kind, h.params.clone().unwrap_or_default()) {
                    Ok(params) => self.handler(o, full("handler"), params),
                    Err(e) => self.reject(o, format!("params: {e}")),
                }
            }
            Spec::Instance(i) => {
                let kind = match i.compiled_template.as_str() {
                    "checknothing" => Kind::CheckNothing,
                    "reportnothing" => Kind::ReportNothing,
                    "listentry" => Kind::ListEntry,
                    "quota" => Kind::Quota,
                    "logentry" => Kind::LogEntry,
                    "metric" => Kind::Metric,
                    other => return self.reject(o, format!("unsupported template {other:?}")),
                };
                match Spec::from_json(kind, i.params.clone().unwrap_or_default()) {
                    Ok(params) => self.instance(o, full("instance"), &params),
                    Err(e) => self.reject(o, format!("params: {e}")),
                }
            }
            Spec::Denier(_)
            | Spec::ListChecker(_)
            | Spec::MemQuota(_)
            | Spec::Stdio(_)
            | Spec::Prometheus(_) => {
                self.handler(o, full(o.spec.kind().name()), o.spec.clone());
            }
            _ => self.instance(o, full(o.spec.kind().name()), &o.spec),
        }
    }

    fn handler(&mut self, o: &Object, full: String, params: Spec) {
        let built = match self.old.handlers.get(&full) {
            Some(old) if old.params == params => old.clone(),
            _ => match Handler::new(&params, self.sink) {
                Ok(h) => BuiltHandler { params, handler: Arc::new(h) },
                Err(message) => return self.reject(o, message),
            },
        };
        if let Handler::Prometheus(p) = &*built.handler {
            for name in p.metric_names() {
                if let Some(other) = self.metrics.get(name) {
                    return self.reject(o, format!("metric {name} belongs to {other} already"));
                }
            }
            for name in p.metric_names() {
                self.metrics.insert(name.to_owned(), full.clone());
            }
        }
        self.handlers.insert(full, built);
    }

    fn instance(&mut self, o: &Object, full: String, params: &Spec) {
        match fields(params) {
            Ok((template, fields)) => {
                let full: Arc<str> = full.into();
                let i = Instance { full: full.clone(), name: o.name.clone(), template, fields };
                self.instances.insert(full.to_string(), Arc::new(i));
            }
            Err(message) => self.reject(o, message),
        }
    }

    fn rule(&mut self, o: &Object, r: &authored::Rule) -> Option<Rule> {
        let unsupported = [
            (r.sampling.is_some(), "sampling"),
            (!r.request_header_operations.is_empty(), "requestHeaderOperations"),
            (!r.response_header_operations.is_empty(), "responseHeaderOperations"),
        ];
        if let Some((_, field)) = unsupported.iter().find(|(set, _)| *set) {
            self.reject(o, format!("{field} is not supported"));
            return None;
        }
        let condition = match r.condition.trim() {
            "" => None,
            text => match expr::compile_as(text, Type::Bool) {
                Ok(e) => Some(e),
                Err(e) => {
                    self.reject(o, format!("match: {e}"));
                    return None;
                }
            },
        };
        let mut actions = Vec::new();
        for (i, a) in r.actions.iter().enumerate() {
            match self.action(&o.namespace, a) {
                Ok(action) => actions.push(action),
                // A rule of which only some actions exist would do half of what its author meant.
                Err(message) => {
                    self.reject(o, format!("actions[{i}]: {message}"));
                    return None;
                }
            }
        }
        if actions.is_empty() {
            self.reject(o, "a rule needs actions");
            return None;
        }
        Some(Rule { condition, actions })
    }

    fn action(&self, namespace: &str, a: &authored::Action) -> Result<Action, String> {
        let (handler_name, built) = resolve(&self.handlers, &a.handler, namespace, "handler")
            .ok_or_else(|| format!("there is no handler {:?}", a.handler))?;
        if a.instances.is_empty() {
            return Err("an action needs instances".into());
        }
        let mut instances = Vec::new();
        for name in &a.instances {
            let (_, i) = resolve(&self.instances, name, namespace, "instance")
                .ok_or_else(|| format!("there is no instance {name:?}"))?;
            built.handler.accepts(i.template, &i.full, &i.field_names())?;
            instances.push(i.clone());
        }
        Ok(Action { handler_name: handler_name.as_str().into(), handler: built.handler.clone(), instances })
    }
}

/// What can be looked up by full name.
trait Lookup<V> {
    fn find(&self, name: &str) -> Option<&V>;
}

impl<V> Lookup<V> for BTreeMap<String, V> {
    fn find(&self, name: &str) -> Option<&V> {
        self.get(name)
    }
}

impl<V> Lookup<V> for HashMap<String, V> {
    fn find(&self, name: &str) -> Option<&V> {
        self.get(name)
    }
}

/// Finds `name.kind.namespace`, `name.kind`, and for the generic kind `name` and `name.namespace`.
fn resolve<'a, V>(
    table: &'a impl Lookup<V>,
    reference: &str,
    namespace: &str,
    generic: &str,
) -> Option<(String, &'a V)> {
    let mut candidates = vec![
        reference.to_owned(),
        format!("{reference}.{namespace}"),
        format!("{reference}.{generic}.{namespace}"),
    ];
    if let Some((name, other)) = reference.rsplit_once('.') {
        candidates.push(format!("{name}.{generic}.{other}"));
    }
    candidates.into_iter().find_map(|c| table.find(&c).map(|v| (c, v)))
}

fn fields(params: &Spec) -> Result<(Template, Fields), String> {
    let typed =
        |field: &str, text: &str, kind| expr::compile_as(text, kind).map_err(|e| format!("{field}: {e}"));
    let any = |field: &str, map: &BTreeMap<String, String>| -> Result<BTreeMap<String, Expression>, String> {
        map.iter()
            .map(|(k, text)| {
                expr::compile(text).map(|e| (k.clone(), e)).map_err(|e| format!("{field}.{k}: {e}"))
            })
            .collect()
    };
    Ok(match params {
        Spec::CheckNothing(_) => (Template::CheckNothing, Fields::Nothing),
        Spec::ReportNothing(_) => (Template::ReportNothing, Fields::Nothing),
        Spec::ListEntry(p) => {
            let e = expr::compile(&p.value).map_err(|e| format!("value: {e}"))?;
            if !matches!(e.kind(), Type::String | Type::IpAddress) {
                return Err(format!("value: the expression is of type {}, expected string", e.kind()));
            }
            (Template::ListEntry, Fields::ListEntry(e))
        }
        Spec::Quota(p) => (Template::Quota, Fields::Quota(any("dimensions", &p.dimensions)?)),
        Spec::LogEntry(p) => {
            let timestamp = match p.timestamp.as_str() {
                "" => None,
                text => Some(typed("timestamp", text, Type::Timestamp)?),
            };
            // A bare word is meant as itself, in spite of the syntax.
            let bare = p.severity.bytes().all(|c| c.is_ascii_alphabetic());
            let severity = if bare {
                Expression::constant(&p.severity)
            } else {
                typed("severity", &p.severity, Type::String)?
            };
            let variables = any("variables", &p.variables)?;
            (Template::LogEntry, Fields::LogEntry { variables, timestamp, severity })
        }
        Spec::Metric(p) => {
            let value = expr::compile(&p.value).map_err(|e| format!("value: {e}"))?;
            if !matches!(value.kind(), Type::Int64 | Type::Double | Type::Duration) {
                return Err(format!(
                    "value: the expression is of type {}, expected a number or duration",
                    value.kind()
                ));
            }
            let dimensions = any("dimensions", &p.dimensions)?;
            (Template::Metric, Fields::Metric { value, dimensions })
        }
        other => return Err(format!("{} is not an instance", other.kind().name())),
    })
}

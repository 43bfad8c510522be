//! Evaluation, with a record of what was looked at.

use std::{cell::RefCell, cmp::Ordering, collections::BTreeSet, net::IpAddr};

use mesh_telemetry::attributes::{self, Bag, Reference};

use super::{
    Type, Value,
    compile::{Code, Expression, Order, convert},
};

/// Why an expression has no value for a bag.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EvalError {
    /// An attribute, or an entry of one, is absent and has no default.
    #[error("{0} is absent")]
    Absent(String),
    /// The sender's value has another type than the attribute.
    #[error("{0} does not have the type of its attribute")]
    WrongType(String),
    /// A conversion of a value failed.
    #[error("a value is not of type {0}")]
    Conversion(Type),
}

/// Most references of one evaluation that are worth reporting; with more, the answer is not cached.
const MAX_REFERENCES: usize = 256;

/// A bag that records what is looked at.
#[derive(Debug)]
pub(crate) struct Tracked<'a> {
    bag: &'a Bag,
    seen: RefCell<BTreeSet<Reference>>,
}

impl<'a> Tracked<'a> {
    pub(crate) fn new(bag: &'a Bag) -> Self {
        Self { bag, seen: RefCell::new(BTreeSet::new()) }
    }

    fn note(&self, name: &str, key: Option<&str>, present: bool) {
        let mut seen = self.seen.borrow_mut();
        if seen.len() <= MAX_REFERENCES {
            seen.insert(Reference { name: name.to_owned(), key: key.map(str::to_owned), present });
        }
    }

    /// A string attribute, looked at outside of any expression.
    pub(crate) fn str(&self, name: &str) -> Option<&'a str> {
        let v = self.bag.str(name);
        self.note(name, None, self.bag.get(name).is_some());
        v
    }

    /// What was looked at; `None` if that is too much to be worth it.
    pub(crate) fn references(&self) -> Option<Vec<Reference>> {
        let seen = self.seen.borrow();
        (seen.len() <= MAX_REFERENCES).then(|| seen.iter().cloned().collect())
    }

    fn attribute(&self, name: &str, kind: Type) -> Result<Value, EvalError> {
        let v = self.bag.get(name);
        self.note(name, None, v.is_some());
        let v = v.ok_or_else(|| EvalError::Absent(name.to_owned()))?;
        typed(v, kind).ok_or_else(|| EvalError::WrongType(name.to_owned()))
    }

    fn entry(&self, name: &str, key: &str) -> Result<Value, EvalError> {
        let v = self.bag.entry(name, key);
        self.note(name, Some(key), v.is_some());
        v.map(|s| Value::String(s.to_owned())).ok_or_else(|| EvalError::Absent(format!("{name}[{key:?}]")))
    }
}

/// The value of an attribute if it has the type that the manifest says.
fn typed(v: &attributes::Value, kind: Type) -> Option<Value> {
    use attributes::Value as A;
    Some(match (v, kind) {
        (A::String(s), Type::String) => Value::String(s.clone()),
        (A::Int64(n), Type::Int64) => Value::Int64(*n),
        (A::Double(n), Type::Double) => Value::Double(*n),
        (A::Bool(b), Type::Bool) => Value::Bool(*b),
        (A::Timestamp(t), Type::Timestamp) => Value::Timestamp(*t),
        (A::Duration(d), Type::Duration) => Value::Duration(*d),
        (A::StringMap(m), Type::StringMap) => Value::StringMap(m.clone()),
        (A::Bytes(b), Type::IpAddress) => Value::Ip(ip(b)?),
        _ => return None,
    })
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::from(v4));
    }
    // Equality of addresses must not depend on how the sender wrote an IPv4 one.
    <[u8; 16]>::try_from(bytes).ok().map(|b| IpAddr::from(b).to_canonical())
}

impl Expression {
    /// The value for a bag.
    pub(crate) fn eval(&self, bag: &Tracked<'_>) -> Result<Value, EvalError> {
        eval(&self.code, bag)
    }

    /// The value of an expression of type bool.
    pub(crate) fn eval_bool(&self, bag: &Tracked<'_>) -> Result<bool, EvalError> {
        boolean(&self.code, bag)
    }
}

fn eval(code: &Code, bag: &Tracked<'_>) -> Result<Value, EvalError> {
    Ok(match code {
        Code::Const(v) => v.clone(),
        Code::Attribute(name, kind) => bag.attribute(name, *kind)?,
        Code::Entry(name, key) => bag.entry(name, &text(key, bag)?)?,
        Code::Index(map, key) => {
            let key = text(key, bag)?;
            match eval(map, bag)? {
                Value::StringMap(mut m) => {
                    Value::String(m.remove(&key).ok_or_else(|| EvalError::Absent(format!("[{key:?}]")))?)
                }
                _ => return Err(EvalError::Conversion(Type::StringMap)),
            }
        }
        Code::Or(a, b) => Value::Bool(boolean(a, bag)? || boolean(b, bag)?),
        Code::And(a, b) => Value::Bool(boolean(a, bag)? && boolean(b, bag)?),
        Code::Default(a, b) => match eval(a, bag) {
            Err(EvalError::Absent(_)) => eval(b, bag)?,
            other => other?,
        },
        Code::Compare(order, a, b) => Value::Bool(compare(*order, &eval(a, bag)?, &eval(b, bag)?)),
        Code::Add(a, b) => match (eval(a, bag)?, eval(b, bag)?) {
            (Value::String(x), Value::String(y)) => Value::String(x + &y),
            (Value::Int64(x), Value::Int64(y)) => Value::Int64(x.saturating_add(y)),
            (Value::Double(x), Value::Double(y)) => Value::Double(x + y),
            _ => return Err(EvalError::Conversion(Type::String)),
        },
        Code::Match(s, pattern) => Value::Bool(glob(&text(s, bag)?, &text(pattern, bag)?)),
        Code::Matches(regex, s) => Value::Bool(regex.is_match(&text(s, bag)?)),
        Code::StartsWith(s, p) => Value::Bool(text(s, bag)?.starts_with(&text(p, bag)?)),
        Code::EndsWith(s, p) => Value::Bool(text(s, bag)?.ends_with(&text(p, bag)?)),
        Code::ToLower(s) => Value::String(text(s, bag)?.to_lowercase()),
        Code::Size(s) => Value::Int64(i64::try_from(text(s, bag)?.len()).unwrap_or(i64::MAX)),
        Code::Conditional(c, x, y) => {
            if boolean(c, bag)? {
                eval(x, bag)?
            } else {
                eval(y, bag)?
            }
        }
        Code::Convert(kind, s) => convert(*kind, &text(s, bag)?).ok_or(EvalError::Conversion(*kind))?,
    })
}

fn boolean(code: &Code, bag: &Tracked<'_>) -> Result<bool, EvalError> {
    match eval(code, bag)? {
        Value::Bool(b) => Ok(b),
        _ => Err(EvalError::Conversion(Type::Bool)),
    }
}

fn text(code: &Code, bag: &Tracked<'_>) -> Result<String, EvalError> {
    match eval(code, bag)? {
        Value::String(s) => Ok(s),
        _ => Err(EvalError::Conversion(Type::String)),
    }
}

/// `abc*` is a prefix, `*abc` a suffix, anything else equality.
fn glob(s: &str, pattern: &str) -> bool {
    if let Some(prefix) = pattern.strip_suffix('*') {
        s.starts_with(prefix)
    } else if let Some(suffix) = pattern.strip_prefix('*') {
        s.ends_with(suffix)
    } else {
        s == pattern
    }
}

fn compare(order: Order, a: &Value, b: &Value) -> bool {
    let ordering = match (a, b) {
        (Value::String(x), Value::String(y)) => Some(x.cmp(y)),
        (Value::Int64(x), Value::Int64(y)) => Some(x.cmp(y)),
        (Value::Double(x), Value::Double(y)) => x.partial_cmp(y),
        (Value::Timestamp(x), Value::Timestamp(y)) => Some(x.cmp(y)),
        (Value::Duration(x), Value::Duration(y)) => Some(x.cmp(y)),
        _ if a == b => Some(Ordering::Equal),
        _ => None,
    };
    match order {
        Order::Eq => ordering == Some(Ordering::Equal),
        Order::Ne => ordering != Some(Ordering::Equal),
        Order::Lt => ordering == Some(Ordering::Less),
        Order::Le => matches!(ordering, Some(Ordering::Less | Ordering::Equal)),
        Order::Gt => ordering == Some(Ordering::Greater),
        Order::Ge => matches!(ordering, Some(Ordering::Greater | Ordering::Equal)),
    }
}

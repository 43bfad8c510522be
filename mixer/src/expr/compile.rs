//! An untyped tree to a typed one.

use std::net::IpAddr;

use regex::Regex;

use super::{
    ExprError, Type, Value, manifest,
    parse::{Ast, Node, parse},
};

/// A typed expression.
#[derive(Debug, Clone)]
pub(crate) struct Expression {
    pub(super) code: Code,
    pub(super) kind: Type,
}

impl Expression {
    /// Type of its result.
    pub(crate) fn kind(&self) -> Type {
        self.kind
    }

    /// An expression that is always this string.
    pub(crate) fn constant(s: &str) -> Self {
        Self { code: Code::Const(Value::String(s.to_owned())), kind: Type::String }
    }
}

#[derive(Debug, Clone)]
pub(super) enum Code {
    Const(Value),
    Attribute(String, Type),
    /// An entry of a map attribute: only the entry is looked at.
    Entry(String, Box<Code>),
    /// An entry of a computed map.
    Index(Box<Code>, Box<Code>),
    Or(Box<Code>, Box<Code>),
    And(Box<Code>, Box<Code>),
    Default(Box<Code>, Box<Code>),
    Compare(Order, Box<Code>, Box<Code>),
    Add(Box<Code>, Box<Code>),
    Match(Box<Code>, Box<Code>),
    Matches(Regex, Box<Code>),
    StartsWith(Box<Code>, Box<Code>),
    EndsWith(Box<Code>, Box<Code>),
    ToLower(Box<Code>),
    Size(Box<Code>),
    Conditional(Box<Code>, Box<Code>, Box<Code>),
    /// A conversion that fails at run time on bad input.
    Convert(Type, Box<Code>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
}

/// Compiles an expression.
pub(crate) fn compile(text: &str) -> Result<Expression, ExprError> {
    let ast = parse(text)?;
    build(&ast).map_err(|(at, message)| ExprError {
        message,
        at: text[..at.min(text.len())].chars().count() + 1,
        text: text.chars().take(200).collect(),
    })
}

/// Compiles an expression that must have this type.
pub(crate) fn compile_as(text: &str, kind: Type) -> Result<Expression, ExprError> {
    let e = compile(text)?;
    if e.kind == kind {
        return Ok(e);
    }
    Err(ExprError {
        message: format!("the expression is of type {}, expected {kind}", e.kind),
        at: 1,
        text: text.chars().take(200).collect(),
    })
}

type Result<T, E = (usize, String)> = std::result::Result<T, E>;

fn build(ast: &Ast) -> Result<Expression> {
    let fail = |message: String| Err((ast.at, message));
    let typed = |code, kind| Ok(Expression { code, kind });
    match &ast.node {
        Node::Int(n) => typed(Code::Const(Value::Int64(*n)), Type::Int64),
        Node::Double(n) => typed(Code::Const(Value::Double(*n)), Type::Double),
        Node::Bool(b) => typed(Code::Const(Value::Bool(*b)), Type::Bool),
        // A string that reads as a duration is one.
        Node::String(s) => match s.parse::<mesh_model::authored::Duration>() {
            Ok(d) if s != "0" => typed(Code::Const(Value::Duration(d.0)), Type::Duration),
            _ => typed(Code::Const(Value::String(s.clone())), Type::String),
        },
        Node::Attribute(name) => match manifest::type_of(name) {
            Some(kind) => typed(Code::Attribute(name.clone(), kind), kind),
            None => fail(format!("unknown attribute {name:?}")),
        },
        Node::Index(map, key) => {
            let (m, k) = (build(map)?, build(key)?);
            if m.kind != Type::StringMap {
                return Err((map.at, format!("only a string map has entries, this is of type {}", m.kind)));
            }
            let k = string(k, key.at)?;
            match m.code {
                Code::Attribute(name, _) => typed(Code::Entry(name, Box::new(k)), Type::String),
                other => typed(Code::Index(Box::new(other), Box::new(k)), Type::String),
            }
        }
        Node::Binary(op, left, right) => binary(op, left, right, ast.at),
        Node::Call(name, receiver, args) => call(name, receiver.as_deref(), args, ast.at),
    }
}

fn string(e: Expression, at: usize) -> Result<Code> {
    match (e.kind, e.code) {
        (Type::String, code) => Ok(code),
        (kind, _) => Err((at, format!("expected a string, this is of type {kind}"))),
    }
}

fn binary(op: &str, left: &Ast, right: &Ast, at: usize) -> Result<Expression> {
    let (mut l, mut r) = (build(left)?, build(right)?);
    // A literal that reads as a duration is a string where a string is expected.
    let (left_kind, right_kind) = (l.kind, r.kind);
    for (own, other, side) in [(&mut l, right_kind, left), (&mut r, left_kind, right)] {
        if let (Node::String(s), Type::Duration) = (&side.node, own.kind)
            && other == Type::String
        {
            *own = Expression::constant(s);
        }
    }
    if l.kind != r.kind {
        return Err((at, format!("{op} needs two values of one type, here are {} and {}", l.kind, r.kind)));
    }
    let kind = l.kind;
    let (a, b) = (Box::new(l.code), Box::new(r.code));
    let compare =
        |order| Ok(Expression { code: Code::Compare(order, a.clone(), b.clone()), kind: Type::Bool });
    match op {
        "||" | "&&" if kind != Type::Bool => Err((at, format!("{op} needs bool, here is {kind}"))),
        "||" => Ok(Expression { code: Code::Or(a, b), kind }),
        "&&" => Ok(Expression { code: Code::And(a, b), kind }),
        "|" => Ok(Expression { code: Code::Default(a, b), kind }),
        "+" if matches!(kind, Type::String | Type::Int64 | Type::Double) => {
            Ok(Expression { code: Code::Add(a, b), kind })
        }
        "+" => Err((at, format!("values of type {kind} cannot be added"))),
        "==" => compare(Order::Eq),
        "!=" => compare(Order::Ne),
        _ if matches!(kind, Type::Bool | Type::StringMap | Type::IpAddress) => {
            Err((at, format!("values of type {kind} have no order")))
        }
        "<" => compare(Order::Lt),
        "<=" => compare(Order::Le),
        ">" => compare(Order::Gt),
        _ => compare(Order::Ge),
    }
}

fn call(name: &str, receiver: Option<&Ast>, args: &[Ast], at: usize) -> Result<Expression> {
    let arity = |n: usize| {
        if args.len() == n {
            Ok(())
        } else {
            Err((at, format!("{name} takes {n} arguments, here are {}", args.len())))
        }
    };
    let text = |i: usize| -> Result<Box<Code>> {
        let arg = &args[i];
        match &arg.node {
            Node::String(s) => Ok(Box::new(Code::Const(Value::String(s.clone())))),
            _ => string(build(arg)?, arg.at).map(Box::new),
        }
    };
    let own = |r: &Ast| -> Result<Box<Code>> {
        match &r.node {
            Node::String(s) => Ok(Box::new(Code::Const(Value::String(s.clone())))),
            _ => string(build(r)?, r.at).map(Box::new),
        }
    };
    let typed = |code, kind| Ok(Expression { code, kind });
    match (name, receiver) {
        ("match", None) => {
            arity(2)?;
            typed(Code::Match(text(0)?, text(1)?), Type::Bool)
        }
        ("matches", Some(r)) => {
            arity(1)?;
            let Node::String(pattern) = &r.node else {
                return Err((r.at, "the pattern of matches must be a literal".to_owned()));
            };
            let regex = regex::RegexBuilder::new(pattern)
                .size_limit(1 << 20)
                .build()
                .map_err(|e| (r.at, format!("not a regular expression: {e}")))?;
            typed(Code::Matches(regex, text(0)?), Type::Bool)
        }
        ("startsWith", Some(r)) => {
            arity(1)?;
            typed(Code::StartsWith(own(r)?, text(0)?), Type::Bool)
        }
        ("endsWith", Some(r)) => {
            arity(1)?;
            typed(Code::EndsWith(own(r)?, text(0)?), Type::Bool)
        }
        ("toLower", None) => {
            arity(1)?;
            typed(Code::ToLower(text(0)?), Type::String)
        }
        ("size", None) => {
            arity(1)?;
            typed(Code::Size(text(0)?), Type::Int64)
        }
        ("emptyStringMap", None) => {
            arity(0)?;
            typed(Code::Const(Value::StringMap(Default::default())), Type::StringMap)
        }
        ("conditional" | "conditionalString", None) => {
            arity(3)?;
            let (c, mut x, mut y) = (build(&args[0])?, build(&args[1])?, build(&args[2])?);
            for (e, arg) in [(&mut x, &args[1]), (&mut y, &args[2])] {
                if let (Node::String(s), "conditionalString") = (&arg.node, name) {
                    *e = Expression::constant(s);
                }
            }
            if c.kind != Type::Bool {
                return Err((args[0].at, format!("expected bool, this is of type {}", c.kind)));
            }
            if x.kind != y.kind || name == "conditionalString" && x.kind != Type::String {
                return Err((
                    at,
                    format!("{name} needs two values of one type, here are {} and {}", x.kind, y.kind),
                ));
            }
            let code = Code::Conditional(Box::new(c.code), Box::new(x.code), Box::new(y.code));
            typed(code, x.kind)
        }
        ("ip" | "timestamp" | "dnsName" | "email" | "uri", None) => {
            arity(1)?;
            let kind = match name {
                "ip" => Type::IpAddress,
                "timestamp" => Type::Timestamp,
                "dnsName" => Type::DnsName,
                "email" => Type::EmailAddress,
                _ => Type::Uri,
            };
            if let Node::String(s) = &args[0].node {
                let v =
                    convert(kind, s).ok_or_else(|| (args[0].at, format!("{s:?} is not of type {kind}")))?;
                return typed(Code::Const(v), kind);
            }
            typed(Code::Convert(kind, text(0)?), kind)
        }
        (_, None) => Err((at, format!("unknown function {name:?}"))),
        (_, Some(_)) => Err((at, format!("unknown method {name:?}"))),
    }
}

/// A string as a value of another type, in normal form.
pub(super) fn convert(kind: Type, s: &str) -> Option<Value> {
    let clean = |s: &str| {
        !s.is_empty() && s.len() <= 2_048 && !s.contains(|c: char| c.is_whitespace() || c.is_control())
    };
    match kind {
        Type::IpAddress => s.parse::<IpAddr>().ok().map(Value::Ip),
        Type::Timestamp => parse_time(s).map(Value::Timestamp),
        Type::DnsName => {
            let name = s.strip_suffix('.').unwrap_or(s).to_ascii_lowercase();
            let label = |l: &str| !l.is_empty() && l.len() <= 63;
            (clean(&name) && name.split('.').all(label)).then_some(Value::String(name))
        }
        Type::EmailAddress => {
            let (local, domain) = s.rsplit_once('@')?;
            (clean(s) && !local.is_empty() && !domain.is_empty())
                .then(|| Value::String(format!("{local}@{}", domain.to_ascii_lowercase())))
        }
        Type::Uri => {
            let (scheme, rest) = s.split_once(':')?;
            let ok = clean(s)
                && scheme.starts_with(|c: char| c.is_ascii_alphabetic())
                && scheme.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'));
            ok.then(|| Value::String(format!("{}:{rest}", scheme.to_ascii_lowercase())))
        }
        _ => None,
    }
}

/// RFC 3339 with `Z` or a numeric offset.
fn parse_time(s: &str) -> Option<std::time::SystemTime> {
    let (date, time) = s.split_once(['T', 't'])?;
    let mut d = date.splitn(3, '-').map(|p| p.parse::<i64>().ok());
    let (y, m, day) = (d.next()??, d.next()??, d.next()??);
    let zone = time.find(['Z', 'z', '+', '-'])?;
    let (clock, zone) = time.split_at(zone);
    let offset = match zone {
        "Z" | "z" => 0,
        z => {
            let (h, min) = z.get(1..)?.split_once(':')?;
            let minutes = h.parse::<i64>().ok()?.checked_mul(60)? + min.parse::<i64>().ok()?;
            if z.starts_with('-') { -minutes } else { minutes }
        }
    };
    let mut t = clock.splitn(3, ':');
    let (h, min) = (t.next()?.parse::<i64>().ok()?, t.next()?.parse::<i64>().ok()?);
    let sec: f64 = t.next()?.parse().ok()?;
    let in_range = (1970..=9999).contains(&y)
        && (1..=12).contains(&m)
        && (1..=31).contains(&day)
        && (0..24).contains(&h)
        && (0..60).contains(&min)
        && (0.0..61.0).contains(&sec)
        && offset.abs() <= 24 * 60;
    if !in_range {
        return None;
    }
    // Days from civil (Howard Hinnant's algorithm), years that start in March.
    let (y, m) = if m > 2 { (y, m - 3) } else { (y - 1, m + 9) };
    let era = y / 400;
    let year_of_era = y - era * 400;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + (153 * m + 2) / 5 + day - 1;
    let days = era * 146_097 + day_of_era - 719_468;
    let whole = days * 86_400 + h * 3_600 + (min - offset) * 60;
    let base = std::time::SystemTime::UNIX_EPOCH
        .checked_add(std::time::Duration::from_secs(u64::try_from(whole).ok()?))?;
    base.checked_add(std::time::Duration::from_secs_f64(sec))
}

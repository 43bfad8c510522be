//! Tokens to an untyped tree. Precedence as in Go, with `|` (default) binding tightest of the
//! binary operators but for `+`.

use super::{
    ExprError,
    lex::{Kind, Token, lex},
};

/// Longest expression.
const MAX_BYTES: usize = 4_096;
/// Deepest nesting of brackets: bounds the parser's stack.
const MAX_DEPTH: usize = 32;
/// Operators, calls and lookups of one expression: bounds the stack of everything that walks the tree.
const MAX_OPERATIONS: usize = 200;

/// A node and where it starts, in bytes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Ast {
    pub at: usize,
    pub node: Node,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    Int(i64),
    Double(f64),
    String(String),
    Bool(bool),
    /// An attribute, with its dots.
    Attribute(String),
    Index(Box<Ast>, Box<Ast>),
    Binary(&'static str, Box<Ast>, Box<Ast>),
    /// Function, receiver, arguments.
    Call(String, Option<Box<Ast>>, Vec<Ast>),
}

pub(super) fn parse(text: &str) -> Result<Ast, ExprError> {
    let fail = |(at, message): (usize, String)| ExprError {
        message,
        at: text[..at.min(text.len())].chars().count() + 1,
        text: text.chars().take(200).collect(),
    };
    if text.len() > MAX_BYTES {
        return Err(fail((0, format!("an expression has {MAX_BYTES} bytes at most"))));
    }
    let tokens = lex(text).map_err(fail)?;
    let mut p = Parser { tokens: &tokens, next: 0, end: text.len(), depth: 0, operations: 0 };
    let ast = p.binary(0).map_err(fail)?;
    match p.peek() {
        None => Ok(ast),
        Some(t) => Err(fail((t.at, "expected the end".to_owned()))),
    }
}

struct Parser<'a> {
    tokens: &'a [Token],
    next: usize,
    end: usize,
    depth: usize,
    operations: usize,
}

type Result<T, E = (usize, String)> = std::result::Result<T, E>;

/// Operators from the loosest to the tightest.
const LEVELS: [&[&str]; 5] = [&["||"], &["&&"], &["==", "!=", "<", "<=", ">", ">="], &["+"], &["|"]];

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<&'a Token> {
        self.tokens.get(self.next)
    }

    fn at(&self) -> usize {
        self.peek().map_or(self.end, |t| t.at)
    }

    fn take_op(&mut self, ops: &[&'static str]) -> Option<&'static str> {
        match self.peek()?.kind {
            Kind::Op(op) if ops.contains(&op) => {
                self.next += 1;
                Some(op)
            }
            _ => None,
        }
    }

    fn expect(&mut self, op: &'static str) -> Result<()> {
        self.take_op(&[op]).map(|_| ()).ok_or_else(|| (self.at(), format!("expected {op:?}")))
    }

    fn count(&mut self) -> Result<()> {
        self.operations += 1;
        if self.operations > MAX_OPERATIONS {
            return Err((self.at(), "the expression has too many operators".to_owned()));
        }
        Ok(())
    }

    fn binary(&mut self, level: usize) -> Result<Ast> {
        if level == 0 {
            self.depth += 1;
            if self.depth > MAX_DEPTH {
                return Err((self.at(), "the expression is nested too deep".to_owned()));
            }
        }
        let out = match LEVELS.get(level) {
            None => self.postfix(),
            Some(ops) => {
                let mut left = self.binary(level + 1)?;
                while let Some(op) = self.take_op(ops) {
                    self.count()?;
                    let right = self.binary(level + 1)?;
                    left = Ast { at: left.at, node: Node::Binary(op, Box::new(left), Box::new(right)) };
                }
                Ok(left)
            }
        };
        if level == 0 {
            self.depth -= 1;
        }
        out
    }

    /// A primary, then any number of `["key"]`, `.method(...)`.
    fn postfix(&mut self) -> Result<Ast> {
        let mut left = self.primary()?;
        loop {
            if self.take_op(&["["]).is_some() {
                self.count()?;
                let key = self.binary(0)?;
                self.expect("]")?;
                left = Ast { at: left.at, node: Node::Index(Box::new(left), Box::new(key)) };
            } else if self.take_op(&["."]).is_some() {
                self.count()?;
                let name = self.ident()?;
                self.expect("(")?;
                let args = self.arguments()?;
                left = Ast { at: left.at, node: Node::Call(name, Some(Box::new(left)), args) };
            } else {
                return Ok(left);
            }
        }
    }

    fn ident(&mut self) -> Result<String> {
        match self.peek() {
            Some(Token { kind: Kind::Ident(s), .. }) => {
                self.next += 1;
                Ok(s.clone())
            }
            _ => Err((self.at(), "expected a name".to_owned())),
        }
    }

    fn arguments(&mut self) -> Result<Vec<Ast>> {
        let mut args = Vec::new();
        if self.take_op(&[")"]).is_some() {
            return Ok(args);
        }
        loop {
            args.push(self.binary(0)?);
            if self.take_op(&[","]).is_none() {
                self.expect(")")?;
                return Ok(args);
            }
        }
    }

    fn primary(&mut self) -> Result<Ast> {
        let at = self.at();
        let Some(t) = self.peek() else { return Err((at, "the expression ends too early".to_owned())) };
        self.next += 1;
        let node = match &t.kind {
            Kind::Int(n) => Node::Int(*n),
            Kind::Double(n) => Node::Double(*n),
            Kind::String(s) => Node::String(s.clone()),
            Kind::Op("(") => {
                let inner = self.binary(0)?;
                self.expect(")")?;
                return Ok(inner);
            }
            Kind::Op(op) => return Err((at, format!("unexpected {op:?}"))),
            Kind::Ident(s) if s == "true" || s == "false" => Node::Bool(s == "true"),
            Kind::Ident(s) => return self.name(at, s.clone()),
        };
        Ok(Ast { at, node })
    }

    /// An attribute `a.b.c`, a function `f(...)`, or a method of an attribute `a.b.f(...)`.
    fn name(&mut self, at: usize, first: String) -> Result<Ast> {
        if self.take_op(&["("]).is_some() {
            let args = self.arguments()?;
            return Ok(Ast { at, node: Node::Call(first, None, args) });
        }
        let mut name = first;
        while let (Some(Token { kind: Kind::Op("."), .. }), Some(Token { kind: Kind::Ident(part), .. })) =
            (self.tokens.get(self.next), self.tokens.get(self.next + 1))
        {
            let is_method = matches!(self.tokens.get(self.next + 2), Some(Token { kind: Kind::Op("("), .. }));
            if is_method {
                break;
            }
            name.push('.');
            name.push_str(part);
            self.next += 2;
        }
        Ok(Ast { at, node: Node::Attribute(name) })
    }
}

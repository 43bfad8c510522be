//! Who asks for what.

use std::{collections::BTreeMap, net::IpAddr};

use mesh_proxy::simulate::{Hello, Request};

/// A question that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuestionError {
    /// The caller.
    #[error("--from {0:?} is not NAMESPACE/WORKLOAD")]
    From(String),
    /// The request as a whole.
    #[error("--request {0:?} is not METHOD URL, such as 'GET http://reviews:9080/x'")]
    Request(String),
    /// Its scheme.
    #[error("--request: scheme {0:?} is not one of http, https, grpc, h2c, tcp, tls")]
    Scheme(String),
    /// Its host.
    #[error("--request {0:?} names no host")]
    Host(String),
    /// Its port.
    #[error("--request {0:?}: a {1} URL needs a port from 1 to 65535")]
    Port(String, String),
    /// A header.
    #[error("--header {0:?} is not NAME: VALUE")]
    Header(String),
}

/// A question.
#[derive(Debug, Clone, Default)]
pub struct Question {
    /// `namespace/workload` of the caller; of a gateway, that the request comes to.
    pub from: String,
    /// `METHOD URL`.
    pub request: String,
    /// `name: value`.
    pub headers: Vec<String>,
    /// Labels of the caller, on top of what documents say.
    pub labels: BTreeMap<String, String>,
    /// Service account of the caller, instead of what documents say.
    pub service_account: Option<String>,
    /// Address of the client of a gateway.
    pub source: Option<IpAddr>,
}

/// A question, understood.
#[derive(Debug, Clone)]
pub(crate) struct Understood {
    pub(crate) namespace: String,
    pub(crate) workload: String,
    /// Host without port.
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) hello: Option<Hello>,
    /// `None` for bytes.
    pub(crate) request: Option<Request>,
}

impl Question {
    pub(crate) fn understand(&self) -> Result<Understood, QuestionError> {
        let (namespace, workload) = self
            .from
            .split_once('/')
            .filter(|(n, w)| !n.is_empty() && !w.is_empty() && !w.contains('/'))
            .ok_or_else(|| QuestionError::From(self.from.clone()))?;
        let bad = || QuestionError::Request(self.request.clone());
        let words: Vec<&str> = self.request.split_whitespace().collect();
        let (method, url) = match words.as_slice() {
            [url] => ("GET", *url),
            [method, url] => (*method, *url),
            _ => return Err(bad()),
        };
        let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
        let at = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(at);
        let path = match path {
            "" => "/".to_owned(),
            p if p.starts_with('?') => format!("/{p}"),
            p => p.split('#').next().unwrap_or_default().to_owned(),
        };
        let default = match scheme {
            "http" | "grpc" | "h2c" | "ws" => Some(80),
            "https" | "tls" | "grpcs" | "wss" => Some(443),
            "tcp" => None,
            other => return Err(QuestionError::Scheme(other.to_owned())),
        };
        let port_error = || QuestionError::Port(self.request.clone(), scheme.to_owned());
        // Of an IPv6 address, what follows the bracket.
        let (host, port) = match authority.rsplit_once(':') {
            Some((h, p)) if !p.ends_with(']') && (!h.contains(':') || h.ends_with(']')) => {
                (h, p.parse().ok().filter(|p| *p > 0).ok_or_else(port_error)?)
            }
            _ => (authority, default.ok_or_else(port_error)?),
        };
        if host.is_empty() {
            return Err(QuestionError::Host(self.request.clone()));
        }
        let http = !matches!(scheme, "tcp" | "tls");
        let http2 = matches!(scheme, "grpc" | "grpcs" | "h2c");
        let secure = default == Some(443);
        let mut headers = Vec::new();
        let mut named = None;
        for h in &self.headers {
            let (n, v) = h
                .split_once([':', '='])
                .filter(|(n, _)| !n.trim().is_empty())
                .ok_or_else(|| QuestionError::Header(h.clone()))?;
            let (n, v) = (n.trim().to_ascii_lowercase(), v.trim().to_owned());
            if n == "host" { named = Some(v) } else { headers.push((n, v)) }
        }
        if scheme.starts_with("grpc") && !headers.iter().any(|(n, _)| n == "content-type") {
            headers.push(("content-type".to_owned(), "application/grpc".to_owned()));
        }
        // As clients write it: without the scheme's own port.
        let shown = if default == Some(port) { host.to_owned() } else { authority.to_owned() };
        // The server name is that of the authority that the client wants, not of the address that it dials.
        let wanted = named.clone().unwrap_or_else(|| shown.clone());
        let sni = wanted.rsplit_once(':').map_or(wanted.as_str(), |(h, _)| h).to_owned();
        let hello = secure.then(|| Hello {
            sni: (sni.parse::<IpAddr>().is_err() && !sni.starts_with('[')).then_some(sni),
            alpn: match (http, http2) {
                (true, true) => vec!["h2".to_owned()],
                (true, false) => vec!["h2".to_owned(), "http/1.1".to_owned()],
                _ => vec![],
            },
        });
        let request = http.then(|| Request {
            method: method.to_owned(),
            authority: named.unwrap_or(shown),
            path,
            headers,
            http2,
        });
        Ok(Understood {
            namespace: namespace.to_owned(),
            workload: workload.to_owned(),
            host: host.to_owned(),
            port,
            hello,
            request,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(request: &str, headers: &[&str]) -> Result<Understood, QuestionError> {
        let headers = headers.iter().map(|h| (*h).to_owned()).collect();
        Question { from: "a/b".into(), request: request.into(), headers, ..Question::default() }.understand()
    }

    #[test]
    fn requests_as_people_write_them() {
        let q = ask("GET http://reviews:9080/x?y=1", &["end-user: jason"]).unwrap();
        let r = q.request.unwrap();
        assert_eq!((q.host.as_str(), q.port, r.authority.as_str()), ("reviews", 9080, "reviews:9080"));
        assert_eq!((r.path.as_str(), r.headers[0].1.as_str()), ("/x?y=1", "jason"));
        let q = ask("https://a.example", &[]).unwrap();
        assert_eq!((q.port, q.hello.unwrap().sni.as_deref()), (443, Some("a.example")));
        assert_eq!(q.request.unwrap().authority, "a.example");
        let q = ask("GET https://10.0.0.1:8443/", &["Host: a.example"]).unwrap();
        assert_eq!((q.port, q.hello.unwrap().sni.as_deref()), (8443, Some("a.example")));
        let q = ask("GET http://[fd00::1]:80/", &[]).unwrap();
        assert_eq!((q.host.as_str(), q.port), ("[fd00::1]", 80));
        let q = ask("tcp://mongo:27017", &[]).unwrap();
        assert!(q.request.is_none() && q.hello.is_none());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (r, says) in [
            ("", "METHOD URL"),
            ("GET ftp://x/", "scheme \"ftp\""),
            ("GET http:///x", "no host"),
            ("GET http://x:0/", "port"),
            ("tcp://x", "port"),
            ("A B C", "METHOD URL"),
        ] {
            assert!(ask(r, &[]).unwrap_err().to_string().contains(says), "{r}");
        }
        assert!(ask("GET http://x/", &["nonsense"]).unwrap_err().to_string().contains("NAME: VALUE"));
    }
}

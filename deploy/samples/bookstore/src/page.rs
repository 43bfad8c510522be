//! The storefront's page: books, what readers say, and the path that this very request took.

use std::fmt::Write;

use crate::{Served, call::Outcome};

const HEAD: &str = r#"<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>The Flotilla Bookstore</title><style>
:root{--ink:#1c2733;--paper:#f7f3ea;--sea:#0f4c5c;--foam:#e3eef0;--red:#c1432e;--line:#d9d2c3}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 Georgia,'Times New Roman',serif}
header{background:var(--sea);color:#fff;padding:2.2rem 1.5rem 1.8rem;text-align:center}
header h1{margin:0;font-weight:400;letter-spacing:.03em;font-size:2rem}header p{margin:.3rem 0 0;opacity:.8;font-style:italic}
main{max-width:62rem;margin:0 auto;padding:1.5rem}.books{display:grid;grid-template-columns:repeat(auto-fit,minmax(17rem,1fr));gap:1.2rem}
.book{background:#fff;border:1px solid var(--line);border-radius:.5rem;padding:1.2rem;box-shadow:0 1px 3px #0001}
.book h2{margin:0;font-size:1.15rem}.book .by{color:#6b7280;font-style:italic;margin:.1rem 0 .8rem}
.stars{letter-spacing:.15em;font-size:1.1rem}.red{color:var(--red)}.black{color:#111}.none{color:#9ca3af;font-size:.9rem}
.error{background:#fdecea;border:1px solid #f5c2bd;border-radius:.3rem;padding:.4rem .6rem;font:.85rem ui-monospace,monospace}
h3{margin:2rem 0 .6rem;font-weight:400;font-size:1.2rem;color:var(--sea)}
table{border-collapse:collapse;width:100%;background:#fff;font-size:.9rem}th,td{text-align:left;padding:.5rem .7rem;border:1px solid var(--line)}
th{background:var(--foam);font-weight:600}td code{font:.82rem ui-monospace,monospace}.c{display:inline-block;border-radius:1rem;padding:0 .6rem;background:var(--foam);color:var(--sea)}
.c.east{background:#fdf1d8;color:#8a5a00}footer{text-align:center;color:#6b7280;padding:1.5rem;font-size:.85rem}
</style></head><body>
<header><h1>The Flotilla Bookstore</h1><p>every page is printed by several harbours</p></header><main>
"#;

/// Renders a storefront answer.
pub(crate) fn render(s: &Served) -> String {
    let mut out = String::from(HEAD);
    let find = |name: &str| s.calls.iter().find(|c| c.service == name);
    let (catalog, reviews) = (find("catalog"), find("reviews"));
    let reviews_data = reviews.and_then(|r| r.served.as_deref());
    let ratings = reviews_data.and_then(|r| r.calls.first());
    out.push_str("<div class=books>");
    match catalog.and_then(|c| c.served.as_deref()) {
        Some(c) => {
            for book in c.data.as_array().into_iter().flatten() {
                let id = book["id"].to_string();
                let _ = write!(
                    out,
                    "<div class=book><h2>{}</h2><p class=by>{}</p>",
                    escape(book["title"].as_str().unwrap_or_default()),
                    escape(book["author"].as_str().unwrap_or_default())
                );
                match reviews_data {
                    Some(r) => {
                        let text = r.data["texts"][&id].as_str().unwrap_or_default();
                        let _ = write!(out, "<p>{}</p>{}", escape(text), stars(r, ratings, &id));
                    }
                    None => out.push_str(&trouble("Reviews", reviews)),
                }
                out.push_str("</div>");
            }
        }
        None => out.push_str(&trouble("The catalog", catalog)),
    }
    out.push_str(
        "</div><h3>How this page was made</h3><table><tr><th>service<th>version<th>cluster<th>caller, as its sidecar \
         verified it<th>answer</tr>",
    );
    row(&mut out, s, 0);
    out.push_str("</table></main><footer>Flotilla sample application</footer></body></html>\n");
    out
}

fn stars(reviews: &Served, ratings: Option<&Outcome>, id: &str) -> String {
    let Some(color) = reviews.data["stars"].as_str() else {
        return "<span class=none>no ratings in this version</span>".into();
    };
    match ratings.and_then(|r| r.served.as_deref()) {
        Some(r) => {
            let n = usize::try_from(r.data[id].as_u64().unwrap_or(0).min(5)).unwrap_or(0);
            format!("<span class=\"stars {}\">{}{}</span>", escape(color), "★".repeat(n), "☆".repeat(5 - n))
        }
        None => trouble("Ratings", ratings),
    }
}

fn trouble(what: &str, o: Option<&Outcome>) -> String {
    let (status, error) = o.map_or((0, ""), |o| (o.status, o.error.as_str()));
    format!("<div class=error>{what} unavailable: {status} {}</div>", escape(error))
}

fn row(out: &mut String, s: &Served, depth: usize) {
    let _ = write!(
        out,
        "<tr><td>{}{}<td>{}<td><span class=\"c {}\">{}</span><td><code>{}</code><td>200</tr>",
        "&nbsp;&nbsp;↳ ".repeat(depth.min(1)).repeat(depth),
        escape(&s.service),
        escape(&s.version),
        escape(&s.cluster),
        escape(&s.cluster),
        if s.caller.is_empty() { "-".into() } else { escape(&s.caller) },
    );
    for c in &s.calls {
        match &c.served {
            Some(inner) => row(out, inner, depth + 1),
            None => {
                let _ = write!(
                    out,
                    "<tr><td>{}{}<td>-<td>-<td>-<td><div class=error>{} {}</div></tr>",
                    "&nbsp;&nbsp;↳ ".repeat(depth + 1),
                    escape(&c.service),
                    c.status,
                    escape(&c.error)
                );
            }
        }
    }
}

fn escape(s: &str) -> String {
    s.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_is_escaped() {
        let s = Served {
            service: "storefront".into(),
            version: "<v>".into(),
            cluster: "west".into(),
            caller: String::new(),
            data: serde_json::Value::Null,
            calls: vec![Outcome {
                service: "catalog".into(),
                status: 503,
                served: None,
                error: "<script>alert(1)</script>".into(),
            }],
        };
        let html = render(&s);
        assert!(!html.contains("<script>") && html.contains("&lt;script&gt;") && html.contains("503"));
    }
}

//! Figures and how they are shown.

use std::collections::BTreeMap;

use serde_json::json;

/// What one scenario gave for one side: every figure of every run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Row {
    pub(crate) scenario: String,
    pub(crate) side: String,
    /// The side that this one's ratios are to.
    pub(crate) against: Option<String>,
    pub(crate) figures: BTreeMap<&'static str, Vec<f64>>,
    pub(crate) error: Option<String>,
}

impl Row {
    pub(crate) fn add(&mut self, run: &[(&'static str, f64)]) {
        for (k, v) in run {
            self.figures.entry(k).or_default().push(*v);
        }
    }

    fn median(&self, key: &str) -> Option<f64> {
        let mut v = self.figures.get(key)?.clone();
        v.sort_by(f64::total_cmp);
        let mid = v.len() / 2;
        if v.len() % 2 == 1 {
            v.get(mid).copied()
        } else {
            Some((v.get(mid.checked_sub(1)?)? + v.get(mid)?) / 2.0)
        }
    }

    fn range(&self, key: &str) -> Option<(f64, f64)> {
        let v = self.figures.get(key)?;
        Some((v.iter().copied().reduce(f64::min)?, v.iter().copied().reduce(f64::max)?))
    }
}

fn short(v: f64) -> String {
    let digits = if v == 0.0 { 0 } else { (3 - v.abs().log10().floor() as i32).clamp(0, 6) };
    format!("{v:.*}", digits as usize)
}

fn ratios(row: &Row, rows: &[Row]) -> BTreeMap<&'static str, f64> {
    let Some(base) = row.against.as_ref().and_then(|a| rows.iter().find(|r| r.side == *a)) else {
        return BTreeMap::new();
    };
    let ratio = |k: &&'static str| Some((*k, row.median(k)? / base.median(k).filter(|b| *b > 0.0)?));
    row.figures.keys().filter_map(ratio).collect()
}

/// Shows the rows of one scenario.
pub(crate) fn print(output: &str, rows: &[Row]) -> anyhow::Result<()> {
    match output {
        "json" => {
            for r in rows {
                let figures: BTreeMap<_, _> = r
                    .figures
                    .keys()
                    .map(|k| {
                        let (min, max) = r.range(k).unwrap_or_default();
                        (*k, json!({"median": r.median(k), "min": min, "max": max}))
                    })
                    .collect();
                let line = json!({
                    "scenario": r.scenario, "side": r.side, "against": r.against, "error": r.error,
                    "runs": r.figures.values().map(Vec::len).max(), "figures": figures, "ratios": ratios(r, rows),
                });
                println!("{}", serde_json::to_string(&line)?);
            }
        }
        "markdown" => {
            for r in rows {
                for (k, ratio) in ratios(r, rows) {
                    let base = rows.iter().find(|b| Some(&b.side) == r.against.as_ref());
                    let cell = |row: &Row| {
                        let (min, max) = row.range(k).unwrap_or_default();
                        let mid = row.median(k).unwrap_or_default();
                        format!("{} [{}, {}]", short(mid), short(min), short(max))
                    };
                    println!(
                        "| {} | {k} | {} | {} | **{}** |",
                        r.scenario,
                        base.map_or_else(String::new, cell),
                        cell(r),
                        short(ratio)
                    );
                }
            }
        }
        _ => {
            let mut t = comfy_table::Table::new();
            t.load_style(comfy_table::presets::UTF8_BORDERS_ONLY);
            let mut head = vec![rows.first().map_or_else(String::new, |r| r.scenario.clone())];
            for r in rows {
                head.push(r.side.clone());
                if let Some(a) = &r.against {
                    head.push(format!("{}/{a}", r.side));
                }
            }
            t.set_header(head);
            let keys: std::collections::BTreeSet<_> = rows.iter().flat_map(|r| r.figures.keys()).collect();
            for k in keys {
                let mut line = vec![(*k).to_owned()];
                for r in rows {
                    let cell = match (r.median(k), r.range(k)) {
                        (Some(m), Some((a, b))) => format!("{} [{}, {}]", short(m), short(a), short(b)),
                        _ => String::new(),
                    };
                    line.push(cell);
                    if r.against.is_some() {
                        line.push(ratios(r, rows).get(k).map_or_else(String::new, |v| short(*v)));
                    }
                }
                t.add_row(line);
            }
            println!("{t}");
        }
    }
    for r in rows {
        if let Some(e) = &r.error {
            eprintln!("{} {}: {e}", r.scenario, r.side);
        }
    }
    Ok(())
}

/// One line per scenario at the end: the figure that counts.
pub(crate) fn summary(output: &str, all: &[Row]) {
    if output != "table" || all.len() < 3 {
        return;
    }
    println!();
    for r in all {
        let same: Vec<Row> = all.iter().filter(|o| o.scenario == r.scenario).cloned().collect();
        for (k, v) in ratios(r, &same) {
            if k.starts_with("cpu_") || k == "conns_per_s" || k.ends_with("_mib") || k.starts_with("added_") {
                println!("{:18} {:24} {}", r.scenario, k, short(v));
            }
        }
    }
}

//! Metrics for Prometheus, with labels of the user's choice.
//!
//! Labels come from requests, so the number of series is bounded: beyond the limit, values of new
//! label sets are dropped and counted in `mixer_prometheus_series_dropped_total`.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use mesh_model::authored::{BucketsDefinition, PrometheusKind, PrometheusMetric, PrometheusParams};
use prometheus_client::{
    metrics::{
        counter::Counter,
        family::{Family, MetricConstructor},
        gauge::Gauge,
        histogram::Histogram,
    },
    registry::Registry,
};

use super::{Data, Input};

/// Series of one metric.
const MAX_SERIES: usize = 10_000;

type Labels = Vec<(String, String)>;
type FloatCounter = Counter<f64, AtomicU64>;
type FloatGauge = Gauge<f64, AtomicU64>;

#[derive(Debug, Clone)]
struct Buckets(Vec<f64>);

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

#[derive(Debug)]
enum Metric {
    Counter(Family<Labels, FloatCounter>),
    Gauge(Family<Labels, FloatGauge>),
    Distribution(Family<Labels, Histogram, Buckets>),
}

#[derive(Debug)]
struct Configured {
    name: String,
    metric: Metric,
    labels: Vec<String>,
    seen: Mutex<HashSet<Labels>>,
}

#[derive(Debug)]
pub(crate) struct Prometheus {
    registry: Registry,
    by_instance: HashMap<String, Vec<Configured>>,
    dropped: AtomicU64,
}

impl Prometheus {
    pub(super) fn new(p: &PrometheusParams) -> Result<Self, String> {
        let mut registry = Registry::default();
        let mut by_instance: HashMap<String, Vec<Configured>> = HashMap::new();
        let mut names = HashSet::new();
        for m in &p.metrics {
            let c = configure(m, &mut registry)?;
            if !names.insert(c.name.clone()) {
                return Err(format!("metric {} is listed twice", c.name));
            }
            by_instance.entry(m.instance_name.clone()).or_default().push(c);
        }
        Ok(Self { registry, by_instance, dropped: AtomicU64::new(0) })
    }

    /// Full names of the metrics, which no other handler may have as well.
    pub(crate) fn metric_names(&self) -> impl Iterator<Item = &str> {
        self.by_instance.values().flatten().map(|c| c.name.as_str())
    }

    /// A metric is configured by the full name of its instance, or by `name.namespace`.
    fn metrics(&self, instance: &str) -> Option<&Vec<Configured>> {
        self.by_instance.get(instance).or_else(|| {
            let mut parts = instance.rsplitn(3, '.');
            let (namespace, _kind, name) = (parts.next()?, parts.next()?, parts.next()?);
            self.by_instance.get(&format!("{name}.{namespace}"))
        })
    }

    pub(super) fn accepts(&self, instance: &str, dimensions: &[&str]) -> Result<(), String> {
        let Some(metrics) = self.metrics(instance) else {
            return Err(format!("the prometheus handler has no metric for {instance}"));
        };
        for m in metrics {
            let labels: std::collections::BTreeSet<&str> = m.labels.iter().map(String::as_str).collect();
            if labels != dimensions.iter().copied().collect() {
                return Err(format!(
                    "labels of metric {} ({}) are not the dimensions of {instance} ({})",
                    m.name,
                    m.labels.join(", "),
                    dimensions.join(", ")
                ));
            }
        }
        Ok(())
    }

    pub(super) fn report(&self, input: &Input) {
        let Data::Metric { value, dimensions } = &input.data else { return };
        let Some(value) = value.to_number().filter(|v| v.is_finite()) else { return };
        for m in self.metrics(&input.instance).into_iter().flatten() {
            let labels: Labels = m
                .labels
                .iter()
                .map(|l| (l.clone(), dimensions.get(l).map(crate::expr::Value::to_text).unwrap_or_default()))
                .collect();
            {
                let mut seen = m.seen.lock().unwrap_or_else(PoisonError::into_inner);
                if !seen.contains(&labels) {
                    if seen.len() >= MAX_SERIES {
                        self.dropped.fetch_add(1, Ordering::Relaxed);
                        continue;
                    }
                    seen.insert(labels.clone());
                }
            }
            match &m.metric {
                // A counter never falls.
                Metric::Counter(f) if value >= 0.0 => {
                    f.get_or_create(&labels).inc_by(value);
                }
                Metric::Counter(_) => {}
                Metric::Gauge(f) => {
                    f.get_or_create(&labels).set(value);
                }
                Metric::Distribution(f) => f.get_or_create(&labels).observe(value),
            }
        }
    }

    /// The metrics in OpenMetrics text, without the closing line.
    pub(crate) fn encode(&self) -> String {
        let mut out = String::new();
        if prometheus_client::encoding::text::encode(&mut out, &self.registry).is_err() {
            // Writing to a string fails only through a defect of an encoder.
            tracing::error!("metrics could not be encoded");
        }
        out.trim_end_matches("# EOF\n").to_owned()
    }

    /// Values dropped since the start.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

fn configure(m: &PrometheusMetric, registry: &mut Registry) -> Result<Configured, String> {
    let namespace = if m.namespace.is_empty() { "istio" } else { &m.namespace };
    let own = if m.name.is_empty() { m.instance_name.replace(['.', '-', '/'], "_") } else { m.name.clone() };
    let name = format!("{namespace}_{own}");
    let mut labels = m.label_names.clone();
    labels.sort();
    if labels.windows(2).any(|w| w[0] == w[1]) {
        return Err(format!("metric {name} lists a label twice"));
    }
    let help = m.description.trim_end_matches('.').to_owned();
    let metric = match m.kind {
        PrometheusKind::Counter => {
            let family = Family::default();
            // The encoder appends `_total`.
            registry.register(name.strip_suffix("_total").unwrap_or(&name), help, family.clone());
            Metric::Counter(family)
        }
        PrometheusKind::Gauge => {
            let family = Family::default();
            registry.register(&*name, help, family.clone());
            Metric::Gauge(family)
        }
        PrometheusKind::Distribution => {
            let family = Family::new_with_constructor(Buckets(buckets(m.buckets.as_ref())));
            registry.register(&*name, help, family.clone());
            Metric::Distribution(family)
        }
        PrometheusKind::Unspecified => return Err(format!("metric {name} has no kind")),
    };
    Ok(Configured { name, metric, labels, seen: Mutex::new(HashSet::new()) })
}

fn buckets(b: Option<&BucketsDefinition>) -> Vec<f64> {
    const DEFAULT: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
    let Some(b) = b else { return DEFAULT.to_vec() };
    if let Some(l) = &b.linear_buckets {
        (0..=l.num_finite_buckets.min(200)).map(|i| l.offset + l.width * f64::from(i)).collect()
    } else if let Some(e) = &b.exponential_buckets {
        (0..=e.num_finite_buckets.min(200)).map(|i| e.scale * e.growth_factor.powi(i.cast_signed())).collect()
    } else if let Some(e) = &b.explicit_buckets {
        e.bounds.clone()
    } else {
        DEFAULT.to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::expr::Value;

    fn dimensions(pairs: &[(&str, &str)]) -> std::collections::BTreeMap<String, Value> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), Value::String((*v).to_owned()))).collect()
    }

    fn metric(name: &str, kind: PrometheusKind) -> PrometheusMetric {
        PrometheusMetric {
            name: name.into(),
            instance_name: "m.metric.books".into(),
            kind,
            label_names: vec!["source".into(), "code".into()],
            ..Default::default()
        }
    }

    #[test]
    fn metrics() {
        let p = Prometheus::new(&PrometheusParams {
            metrics: vec![
                metric("requests_total", PrometheusKind::Counter),
                metric("size", PrometheusKind::Distribution),
            ],
            metrics_expiration_policy: None,
        })
        .unwrap();
        assert!(p.accepts("m.metric.books", &["code", "source"]).is_ok());
        assert!(p.accepts("m.metric.books", &["code"]).unwrap_err().contains("are not the dimensions"));
        assert!(p.accepts("x.metric.books", &[]).is_err());
        for _ in 0..3 {
            p.report(&Input {
                instance: "m.metric.books".into(),
                data: Data::Metric {
                    value: Value::Int64(2),
                    dimensions: dimensions(&[("source", "a\"\n"), ("code", "200")]),
                },
            });
        }
        let text = p.encode();
        assert!(text.contains("istio_requests_total{code=\"200\",source=\"a\\\"\\n\"} 6"), "{text}");
        assert!(text.contains("istio_size_bucket{le=\"2.5\",code=\"200\""), "{text}");
        assert!(!text.contains("EOF"));
    }

    #[test]
    fn series_are_bounded() {
        let p = Prometheus::new(&PrometheusParams {
            metrics: vec![metric("requests_total", PrometheusKind::Counter)],
            metrics_expiration_policy: None,
        })
        .unwrap();
        for i in 0..MAX_SERIES + 5 {
            let code = i.to_string();
            p.report(&Input {
                instance: "m.metric.books".into(),
                data: Data::Metric {
                    value: Value::Int64(1),
                    dimensions: dimensions(&[("source", "a"), ("code", &code)]),
                },
            });
        }
        assert_eq!(p.dropped(), 5);
    }
}

//! `config.istio.io/v1alpha2`: rules, handlers and instances of the policy and telemetry hub.
//!
//! Handlers and instances come in two forms: as `handler` with `compiledAdapter` and `params`, or as
//! a document of the adapter's own kind whose `spec` is the parameters. Both use the same parameter
//! types. Strings that are expressions over attributes are checked by mixer when it loads them.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Duration, StringMatch};

message! {
    /// When the match holds, each action's handler gets its instances.
    pub struct Rule {
        /// Expression of type bool; empty is always.
        #[serde(rename = "match")]
        pub condition: String,
        /// What is done.
        pub actions: Vec<Action>,
        /// Sampling of the rule; not supported.
        pub sampling: Option<Value>,
        /// Changes to request headers; not supported.
        pub request_header_operations: Vec<Value>,
        /// Changes to response headers; not supported.
        pub response_header_operations: Vec<Value>,
    }

    /// A handler and what it gets.
    pub struct Action {
        /// `name`, `name.namespace`, `name.kind` or `name.kind.namespace`.
        pub handler: String,
        /// Same forms.
        pub instances: Vec<String>,
        /// Name under which results are used; not supported.
        pub name: String,
    }

    /// A configured adapter.
    pub struct Handler {
        /// Name of a built-in adapter.
        pub compiled_adapter: String,
        /// Name of an adapter out of process; not supported.
        pub adapter: String,
        /// Its parameters.
        pub params: Option<Value>,
        /// Address of an adapter out of process; not supported.
        pub connection: Option<Value>,
    }

    /// Attributes mapped to a template's fields.
    pub struct Instance {
        /// Name of a built-in template.
        pub compiled_template: String,
        /// Name of a template out of process; not supported.
        pub template: String,
        /// Its fields.
        pub params: Option<Value>,
        /// Attributes that the output fills; not supported.
        pub attribute_bindings: BTreeMap<String, String>,
    }

    /// Always denies.
    pub struct DenierParams {
        /// What is answered; `FAILED_PRECONDITION` unless set.
        pub status: Option<RpcStatus>,
        /// How long the answer may be cached; 5 s unless set.
        pub valid_duration: Option<Duration>,
        /// How often the answer may be used; 1000 unless set.
        pub valid_use_count: Option<i32>,
    }

    /// `google.rpc.Status` without details.
    pub struct RpcStatus {
        /// `google.rpc.Code`.
        pub code: i32,
        /// Text.
        pub message: String,
    }

    /// Checks a value against a list.
    pub struct ListCheckerParams {
        /// Where the list is fetched; not supported, use `overrides`.
        pub provider_url: String,
        /// Between fetches; 60 s unless set.
        pub refresh_interval: Option<Duration>,
        /// How long a list is kept that cannot be fetched; 300 s unless set.
        pub ttl: Option<Duration>,
        /// How long an answer may be cached; 300 s unless set.
        pub caching_interval: Option<Duration>,
        /// How often an answer may be used; 10000 unless set.
        pub caching_use_count: Option<i32>,
        /// Entries.
        pub overrides: Vec<String>,
        /// What entries are.
        pub entry_type: ListEntryType,
        /// Deny what is listed, rather than what is not.
        pub blacklist: bool,
    }

    /// Counts in memory.
    pub struct MemQuotaParams {
        /// Quotas by full name of their instance.
        pub quotas: Vec<MemQuota>,
        /// How long a deduplication ID is remembered at least; 1 s unless set.
        pub min_deduplication_duration: Option<Duration>,
    }

    /// One quota.
    pub struct MemQuota {
        /// `name.kind.namespace` (or `name.namespace`) of the instance.
        pub name: String,
        /// Most that may be allocated.
        pub max_amount: i64,
        /// Window; zero is an allocation until released.
        pub valid_duration: Option<Duration>,
        /// The first whose dimensions all equal applies.
        pub overrides: Vec<MemQuotaOverride>,
    }

    /// Another limit for some dimensions.
    pub struct MemQuotaOverride {
        /// All must equal the instance's.
        pub dimensions: BTreeMap<String, String>,
        /// Most that may be allocated.
        pub max_amount: i64,
        /// Window.
        pub valid_duration: Option<Duration>,
    }

    /// Writes to the standard streams.
    pub struct StdioParams {
        /// Which stream.
        pub log_stream: StdioStream,
        /// Level by the instance's severity.
        pub severity_levels: BTreeMap<String, StdioLevel>,
        /// Level of metrics.
        pub metric_level: StdioLevel,
        /// JSON; on unless set.
        pub output_as_json: Option<bool>,
        /// Least level that is written.
        pub output_level: StdioLevel,
        /// Path of `FILE`; not supported.
        pub output_path: String,
        /// Of `ROTATED_FILE`; not supported.
        pub max_megabytes_before_rotation: Option<i32>,
        /// Of `ROTATED_FILE`; not supported.
        pub max_days_before_rotation: Option<i32>,
        /// Of `ROTATED_FILE`; not supported.
        pub max_rotated_files: Option<i32>,
    }

    /// Metrics for Prometheus.
    pub struct PrometheusParams {
        /// Metrics.
        pub metrics: Vec<PrometheusMetric>,
        /// Forget series that are not updated.
        pub metrics_expiration_policy: Option<MetricsExpirationPolicy>,
    }

    /// One metric.
    pub struct PrometheusMetric {
        /// Prefix; `istio` unless set.
        pub namespace: String,
        /// Name; the instance's unless set.
        pub name: String,
        /// `name.metric.namespace` of the instance.
        pub instance_name: String,
        /// Help text.
        pub description: String,
        /// What it counts.
        pub kind: PrometheusKind,
        /// Buckets of a distribution.
        pub buckets: Option<BucketsDefinition>,
        /// Names of the instance's dimensions.
        #[serde(alias = "label_names")]
        pub label_names: Vec<String>,
    }

    /// Buckets: one of the three.
    pub struct BucketsDefinition {
        /// Of equal width.
        pub linear_buckets: Option<LinearBuckets>,
        /// Growing.
        pub exponential_buckets: Option<ExponentialBuckets>,
        /// Listed.
        pub explicit_buckets: Option<ExplicitBuckets>,
    }

    /// Buckets of equal width.
    pub struct LinearBuckets {
        /// How many.
        pub num_finite_buckets: u32,
        /// How wide.
        pub width: f64,
        /// Where the first starts.
        pub offset: f64,
    }

    /// Growing buckets.
    pub struct ExponentialBuckets {
        /// How many.
        pub num_finite_buckets: u32,
        /// Factor between bounds.
        pub growth_factor: f64,
        /// First bound.
        pub scale: f64,
    }

    /// Listed buckets.
    pub struct ExplicitBuckets {
        /// Upper bounds, ascending.
        pub bounds: Vec<f64>,
    }

    /// Forgetting of series.
    pub struct MetricsExpirationPolicy {
        /// After how long without an update.
        pub metrics_expiry_duration: Option<Duration>,
        /// How often that is checked; half the duration unless set.
        pub expiry_check_interval_duration: Option<Duration>,
    }

    /// Input of a check without data.
    pub struct CheckNothingParams {}

    /// Input of a report without data.
    pub struct ReportNothingParams {}

    /// Input of a list check.
    pub struct ListEntryParams {
        /// Expression of type string.
        pub value: String,
    }

    /// Input of a quota.
    pub struct QuotaParams {
        /// Expressions of any type, by name.
        pub dimensions: BTreeMap<String, String>,
    }

    /// Input of a log.
    pub struct LogEntryParams {
        /// Expressions of any type, by name.
        pub variables: BTreeMap<String, String>,
        /// Expression of type timestamp; now unless set.
        pub timestamp: String,
        /// Expression of type string, or a bare word.
        pub severity: String,
        /// Expression of type string.
        #[serde(alias = "monitored_resource_type")]
        pub monitored_resource_type: String,
        /// Expressions by name.
        #[serde(alias = "monitored_resource_dimensions")]
        pub monitored_resource_dimensions: BTreeMap<String, String>,
    }

    /// Input of a metric.
    pub struct MetricParams {
        /// Expression of a numeric or duration type; a number may be written bare.
        pub value: String,
        /// Expressions of any type, by name.
        pub dimensions: BTreeMap<String, String>,
        /// Expression of type string.
        #[serde(alias = "monitored_resource_type")]
        pub monitored_resource_type: String,
        /// Expressions by name.
        #[serde(alias = "monitored_resource_dimensions")]
        pub monitored_resource_dimensions: BTreeMap<String, String>,
    }

    /// Which requests charge which quotas.
    pub struct QuotaSpec {
        /// All that match charge.
        pub rules: Vec<QuotaRule>,
    }

    /// Quotas of matching requests.
    pub struct QuotaRule {
        /// Any must hold; none matches everything.
        #[serde(rename = "match")]
        pub matches: Vec<AttributeMatch>,
        /// What is charged.
        pub quotas: Vec<QuotaCharge>,
    }

    /// Conditions that must all hold.
    pub struct AttributeMatch {
        /// By attribute name.
        pub clause: BTreeMap<String, StringMatch>,
    }

    /// An amount of a quota.
    pub struct QuotaCharge {
        /// Name of the quota instance.
        pub quota: String,
        /// More than 0.
        pub charge: i64,
    }

    /// Services that quotas apply to.
    pub struct QuotaSpecBinding {
        /// Which services.
        pub services: Vec<IstioService>,
        /// Which quotas.
        pub quota_specs: Vec<QuotaSpecReference>,
    }

    /// A service by name or by host.
    pub struct IstioService {
        /// Short name.
        pub name: String,
        /// Namespace; the document's unless set.
        pub namespace: String,
        /// Domain suffix.
        pub domain: String,
        /// Host; `*` is every service.
        pub service: String,
        /// Labels of the workloads; not supported.
        pub labels: BTreeMap<String, String>,
    }

    /// A [`QuotaSpec`] by name.
    pub struct QuotaSpecReference {
        /// Name.
        pub name: String,
        /// Namespace; the document's unless set.
        pub namespace: String,
    }
}

choice! {
    /// What entries of a list are.
    pub enum ListEntryType {
        /// Compared with case.
        #[default]
        Strings,
        /// Compared without case.
        CaseInsensitiveStrings,
        /// Addresses and CIDR ranges.
        IpAddresses,
        /// RE2 patterns.
        Regex,
    }

    /// Where stdio writes.
    pub enum StdioStream {
        /// Standard output.
        #[default]
        Stdout,
        /// Standard error.
        Stderr,
        /// A file; not supported.
        File,
        /// Files; not supported.
        RotatedFile,
    }

    /// Level of a log line.
    pub enum StdioLevel {
        /// Information.
        #[default]
        Info,
        /// Warning.
        Warning,
        /// Error.
        Error,
    }

    /// What a metric counts.
    pub enum PrometheusKind {
        /// Not set; refused.
        #[default]
        Unspecified,
        /// A current value.
        Gauge,
        /// A sum.
        Counter,
        /// A histogram.
        Distribution,
    }
}

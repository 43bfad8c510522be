//! Rules of Telemetry, WasmPlugin and TrafficExtension.

use std::collections::BTreeMap;

use mesh_model::authored::{
    CustomTag, EnvValueSource, ProviderRef, TagOperation, Telemetry, Tracing, TrafficExtension,
    TrafficSelector, VmConfig, WasmPlugin,
};

use super::{
    common::{self, Findings},
    security,
};
use crate::path::Path;

pub(super) fn check(t: &Telemetry, p: &Path<'_>, out: &mut Findings) {
    security::selector(t.selector.as_ref(), p, out);
    security::targets(t.target_ref.as_ref(), &t.target_refs, t.selector.is_some(), p, out);
    let tracing = p.key("tracing");
    if t.tracing.len() > 1 {
        out.warning(&tracing, "only the first entry has effect");
    }
    for (i, x) in t.tracing.iter().enumerate() {
        check_tracing(x, &tracing.index(i), out);
    }
    let metrics = p.key("metrics");
    for (i, m) in t.metrics.iter().enumerate() {
        let at = metrics.index(i);
        providers(&m.providers, &at, out);
        common::duration(m.reporting_interval, &at.key("reportingInterval"), out);
        let overrides = at.key("overrides");
        for (j, o) in m.overrides.iter().enumerate() {
            let at = overrides.index(j);
            let tags = at.key("tagOverrides");
            for (name, tag) in &o.tag_overrides {
                let at = tags.key(name);
                match tag.operation {
                    TagOperation::Upsert if tag.value.is_empty() => {
                        out.error(&at.key("value"), "operation UPSERT needs a value");
                    }
                    TagOperation::Remove if !tag.value.is_empty() => {
                        out.error(&at.key("value"), "operation REMOVE has no value");
                    }
                    _ => {}
                }
            }
            if let Some(s) = &o.matches {
                let at = at.key("match");
                if s.metric.is_some() && s.custom_metric.is_some() {
                    out.error(&at, "only one of metric and customMetric is allowed");
                }
                if s.custom_metric.as_ref().is_some_and(String::is_empty) {
                    out.error(&at.key("customMetric"), "the metric's name is required");
                }
            }
        }
    }
    let logging = p.key("accessLogging");
    for (i, l) in t.access_logging.iter().enumerate() {
        providers(&l.providers, &logging.index(i), out);
    }
    out.warning(p, "Telemetry is accepted but not enforced yet");
}

fn check_tracing(t: &Tracing, p: &Path<'_>, out: &mut Findings) {
    providers(&t.providers, p, out);
    if t.providers.len() > 1 {
        out.warning(&p.key("providers"), "only the first provider has effect");
    }
    if let Some(n) = t.random_sampling_percentage
        && !(0.0..=100.0).contains(&n)
    {
        out.error(&p.key("randomSamplingPercentage"), format!("{n} is outside of 0..100 percent"));
    }
    tags(&t.custom_tags, true, &p.key("customTags"), out);
}

/// Tags of spans; `formatter` is one of the kinds.
pub(super) fn tags(all: &BTreeMap<String, CustomTag>, formatter: bool, p: &Path<'_>, out: &mut Findings) {
    for (name, tag) in all {
        let at = p.key(name);
        if name.is_empty() {
            out.error(&at, "a tag needs a name");
        }
        let texts = [
            (tag.literal.as_ref().map(|l| &l.value), "literal", "value"),
            (tag.environment.as_ref().map(|e| &e.name), "environment", "name"),
            (tag.header.as_ref().map(|h| &h.name), "header", "name"),
            (tag.formatter.as_ref().map(|f| &f.value), "formatter", "value"),
        ];
        if tag.formatter.is_some() && !formatter {
            out.error(&at.key("formatter"), "unknown field: expected literal, environment or header");
        }
        if texts.iter().filter(|(t, ..)| t.is_some()).count() > 1 {
            out.error(&at, "only one of literal, environment, header and formatter is allowed");
        }
        for (text, kind, field) in texts {
            if text.is_some_and(|t| t.is_empty()) {
                out.error(&at.key(kind).key(field), format!("{field} is required"));
            }
        }
    }
}

fn providers(list: &[ProviderRef], p: &Path<'_>, out: &mut Findings) {
    let at = p.key("providers");
    if let Some(i) = list.iter().position(|r| r.name.is_empty()) {
        out.error(&at.index(i).key("name"), "the provider's name is required");
    }
}

pub(super) fn check_wasm(w: &WasmPlugin, p: &Path<'_>, out: &mut Findings) {
    security::selector(w.selector.as_ref(), p, out);
    security::targets(w.target_ref.as_ref(), &w.target_refs, w.selector.is_some(), p, out);
    module(&w.url, &w.sha256, &w.image_pull_secret, &w.plugin_name, p, out);
    machine(w.vm_config.as_ref(), p, out);
    traffic(&w.matches, p, out);
    // A filter may be what its author relies on to keep requests out.
    out.warning(p, "WasmPlugin is accepted but not enforced yet: requests pass without it");
}

pub(super) fn check_extension(x: &TrafficExtension, p: &Path<'_>, out: &mut Findings) {
    security::selector(x.selector.as_ref(), p, out);
    security::targets(None, &x.target_refs, x.selector.is_some(), p, out);
    if x.wasm.is_some() == x.lua.is_some() {
        out.error(p, "exactly one of wasm and lua is required");
    }
    if let Some(w) = &x.wasm {
        let at = p.key("wasm");
        module(&w.url, &w.sha256, &w.image_pull_secret, &w.plugin_name, &at, out);
        machine(w.vm_config.as_ref(), &at, out);
    }
    if let Some(l) = &x.lua {
        let at = p.key("lua");
        let at = at.key("inlineCode");
        if l.inline_code.is_empty() {
            out.error(&at, "a script is required");
        } else if l.inline_code.len() > 65_536 {
            out.error(&at, "the script has more than 64 KiB");
        }
    }
    traffic(&x.matches, p, out);
    out.warning(p, "TrafficExtension is accepted but not enforced yet: requests pass without it");
}

fn module(url: &str, sha256: &str, secret: &str, name: &str, p: &Path<'_>, out: &mut Findings) {
    let at = p.key("url");
    if url.is_empty() {
        out.error(&at, "the module's URL is required");
    } else if url.contains(char::is_whitespace) {
        out.error(&at, format!("{url:?} is not a URL"));
    } else if let Some((scheme, _)) = url.split_once("://")
        && !matches!(scheme, "file" | "http" | "https" | "oci")
    {
        out.error(&at, format!("scheme {scheme:?} is none of file, http, https, oci"));
    }
    let hex = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
    if !sha256.is_empty() && (sha256.len() != 64 || !sha256.bytes().all(hex)) {
        out.error(&p.key("sha256"), "expected 64 digits of 0-9 a-f");
    }
    if secret.len() > 253 {
        out.error(&p.key("imagePullSecret"), "longer than 253 characters");
    }
    if name.len() > 256 {
        out.error(&p.key("pluginName"), "longer than 256 characters");
    }
}

fn machine(vm: Option<&VmConfig>, p: &Path<'_>, out: &mut Findings) {
    let Some(vm) = vm else { return };
    let at = p.key("vmConfig");
    let at = at.key("env");
    for (i, v) in vm.env.iter().enumerate() {
        let at = at.index(i);
        if v.name.is_empty() || v.name.len() > 256 {
            out.error(&at.key("name"), "a name of up to 256 characters is required");
        } else if vm.env[..i].iter().any(|o| o.name == v.name) {
            out.error(&at.key("name"), format!("variable {:?} is there twice", v.name));
        }
        if v.value_from != EnvValueSource::Inline && !v.value.is_empty() {
            out.error(&at.key("value"), "a value is only for valueFrom INLINE");
        }
    }
}

fn traffic(list: &[TrafficSelector], p: &Path<'_>, out: &mut Findings) {
    let at = p.key("match");
    for (i, s) in list.iter().enumerate() {
        let at = at.index(i);
        let at = at.key("ports");
        for (j, port) in s.ports.iter().enumerate() {
            common::port(port.number, &at.index(j).key("number"), out);
        }
    }
}

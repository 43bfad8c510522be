//! `src/bootstrap/schema.txt` and `src/patch/extensions.txt` are cut from the descriptors that the crate envoy-types
//! ships; this test cuts them again and compares. After an update of that crate:
//! `UPDATE_SCHEMA=1 cargo test -p mesh-xds --test schema`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use prost::Message as _;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};

/// The file itself, and what may stand in an `Any` of it: packages whose messages are all kept.
const PACKAGES: &[&str] = &[
    "envoy.extensions.access_loggers.file.v3",
    "envoy.extensions.access_loggers.stream.v3",
    "envoy.extensions.compression.brotli.compressor.v3",
    "envoy.extensions.compression.gzip.compressor.v3",
    "envoy.extensions.filters.http.buffer.v3",
    "envoy.extensions.filters.http.compressor.v3",
    "envoy.extensions.filters.http.cors.v3",
    "envoy.extensions.filters.http.ext_authz.v3",
    "envoy.extensions.filters.http.ext_proc.v3",
    "envoy.extensions.filters.http.fault.v3",
    "envoy.extensions.filters.http.grpc_stats.v3",
    "envoy.extensions.filters.http.grpc_web.v3",
    "envoy.extensions.filters.http.health_check.v3",
    "envoy.extensions.filters.http.jwt_authn.v3",
    "envoy.extensions.filters.http.local_ratelimit.v3",
    "envoy.extensions.filters.http.on_demand.v3",
    "envoy.extensions.filters.http.ratelimit.v3",
    "envoy.extensions.filters.http.rbac.v3",
    "envoy.extensions.filters.http.router.v3",
    "envoy.extensions.filters.http.set_filter_state.v3",
    "envoy.extensions.filters.http.stateful_session.v3",
    "envoy.extensions.filters.listener.http_inspector.v3",
    "envoy.extensions.filters.listener.original_dst.v3",
    "envoy.extensions.filters.listener.proxy_protocol.v3",
    "envoy.extensions.filters.listener.tls_inspector.v3",
    "envoy.extensions.filters.network.connection_limit.v3",
    "envoy.extensions.filters.network.http_connection_manager.v3",
    "envoy.extensions.filters.network.local_ratelimit.v3",
    "envoy.extensions.filters.network.rbac.v3",
    "envoy.extensions.filters.network.sni_cluster.v3",
    "envoy.extensions.filters.network.tcp_proxy.v3",
    "envoy.extensions.filters.udp.udp_proxy.v3",
    "envoy.extensions.formatter.cel.v3",
    "envoy.extensions.formatter.metadata.v3",
    "envoy.extensions.formatter.req_without_query.v3",
    "envoy.extensions.http.stateful_session.cookie.v3",
    "envoy.extensions.http.stateful_session.header.v3",
    "envoy.extensions.load_balancing_policies.client_side_weighted_round_robin.v3",
    "envoy.extensions.load_balancing_policies.cluster_provided.v3",
    "envoy.extensions.load_balancing_policies.least_request.v3",
    "envoy.extensions.load_balancing_policies.maglev.v3",
    "envoy.extensions.load_balancing_policies.random.v3",
    "envoy.extensions.load_balancing_policies.ring_hash.v3",
    "envoy.extensions.load_balancing_policies.round_robin.v3",
    "envoy.extensions.load_balancing_policies.subset.v3",
    "envoy.extensions.retry.host.previous_hosts.v3",
    "envoy.extensions.transport_sockets.http_11_proxy.v3",
    "envoy.extensions.transport_sockets.proxy_protocol.v3",
    "envoy.extensions.transport_sockets.quic.v3",
    "envoy.extensions.transport_sockets.raw_buffer.v3",
    "envoy.extensions.transport_sockets.tls.v3",
    "envoy.extensions.upstreams.http.v3",
    "envoy.extensions.upstreams.tcp.v3",
];
const ROOTS: &[&str] =
    &["envoy.config.bootstrap.v3.Bootstrap", "envoy.service.discovery.v3.DiscoveryResponse"];

/// What a patch may hold besides: everything that Envoy's configuration can be made of.
const PATCHED: &[&str] = &["envoy.config.", "envoy.extensions."];

const HEAD: &str = "\
# Cut from the descriptors of envoy-types by tests/schema.rs; do not edit.
# M message; its fields are `name number type`, with * for repeated, + for map, and @n for member n of a oneof.
# E enum; its values are `name number`.
";

fn descriptors() -> PathBuf {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--manifest-path"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))
        .output()
        .expect("cargo metadata");
    let meta: serde_json::Value = serde_json::from_slice(&out.stdout).expect("its JSON");
    let package = meta["packages"].as_array().unwrap().iter().find(|p| p["name"] == "envoy-types").unwrap();
    Path::new(package["manifest_path"].as_str().unwrap()).with_file_name("src/generated/types.bin")
}

#[derive(Default)]
struct All {
    messages: BTreeMap<String, DescriptorProto>,
    enums: BTreeMap<String, EnumDescriptorProto>,
}

impl All {
    fn message(&mut self, scope: &str, m: DescriptorProto) {
        let name = format!("{scope}.{}", m.name());
        for n in &m.nested_type {
            self.message(&name, n.clone());
        }
        for e in &m.enum_type {
            self.enums.insert(format!("{name}.{}", e.name()), e.clone());
        }
        self.messages.insert(name, m);
    }
}

/// The table of what a bootstrap may hold, and of what is left for patches.
fn cut(set: FileDescriptorSet) -> (String, String) {
    let mut all = All::default();
    let mut todo: Vec<String> = ROOTS.iter().map(|r| (*r).to_owned()).collect();
    let mut patched = Vec::new();
    for file in set.file {
        let package = file.package().to_owned();
        for m in file.message_type {
            if PACKAGES.contains(&package.as_str()) {
                todo.push(format!("{package}.{}", m.name()));
            }
            if PATCHED.iter().any(|p| package.starts_with(p)) {
                patched.push(format!("{package}.{}", m.name()));
            }
            all.message(&package, m);
        }
        for e in file.enum_type {
            all.enums.insert(format!("{package}.{}", e.name()), e);
        }
    }
    let (kept, enums) = reached(&all, todo);
    let (more, more_enums) = reached(&all, patched);
    let more = more.difference(&kept).cloned().collect();
    let more_enums = more_enums.difference(&enums).cloned().collect();
    (table(&all, &kept, &enums), table(&all, &more, &more_enums))
}

/// Messages and enums that these are made of.
fn reached(all: &All, mut todo: Vec<String>) -> (BTreeSet<String>, BTreeSet<String>) {
    let mut kept = BTreeSet::new();
    let mut enums = BTreeSet::new();
    while let Some(name) = todo.pop() {
        let m = all.messages.get(&name).unwrap_or_else(|| panic!("{name} is not among the descriptors"));
        if !kept.insert(name) {
            continue;
        }
        for f in &m.field {
            let of = f.type_name().trim_start_matches('.').to_owned();
            match f.r#type() {
                Type::Message => todo.push(of),
                Type::Enum => drop(enums.insert(of)),
                _ => {}
            }
        }
    }
    (kept, enums)
}

fn table(all: &All, kept: &BTreeSet<String>, enums: &BTreeSet<String>) -> String {
    let mut text = HEAD.to_owned();
    for name in kept {
        writeln!(text, "M {name}").unwrap();
        for f in &all.messages[name].field {
            let of = f.type_name().trim_start_matches('.');
            let map = f.r#type() == Type::Message
                && all.messages[of].options.as_ref().is_some_and(|o| o.map_entry());
            let kind = match f.r#type() {
                Type::Message | Type::Enum => of,
                Type::Bool => "bool",
                Type::String => "string",
                Type::Bytes => "bytes",
                Type::Int32 => "int32",
                Type::Int64 => "int64",
                Type::Uint32 => "uint32",
                Type::Uint64 => "uint64",
                Type::Float => "float",
                Type::Double => "double",
                other => panic!("{name}.{}: {other:?} is new", f.name()),
            };
            let label = match f.label() {
                _ if map => "+",
                Label::Repeated => "*",
                _ => "",
            };
            assert_eq!(f.json_name(), camel(f.name()), "{name}: the reader derives JSON names");
            write!(text, "{} {} {label}{kind}", f.name(), f.number()).unwrap();
            if let (Some(n), false) = (f.oneof_index, f.proto3_optional()) {
                write!(text, " @{n}").unwrap();
            }
            text.push('\n');
        }
    }
    for name in enums {
        writeln!(text, "E {name}").unwrap();
        for v in &all.enums[name].value {
            writeln!(text, "{} {}", v.name(), v.number()).unwrap();
        }
    }
    text
}

fn camel(name: &str) -> String {
    let mut out = String::new();
    let mut up = false;
    for c in name.chars() {
        match c {
            '_' => up = true,
            c if up => {
                out.push(c.to_ascii_uppercase());
                up = false;
            }
            c => out.push(c),
        }
    }
    out
}

#[test]
fn the_schema_is_what_envoy_types_ships() {
    let bytes = std::fs::read(descriptors()).unwrap();
    let fresh = cut(FileDescriptorSet::decode(bytes.as_slice()).unwrap());
    for (file, fresh) in [("src/bootstrap/schema.txt", fresh.0), ("src/patch/extensions.txt", fresh.1)] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        if std::env::var_os("UPDATE_SCHEMA").is_some() {
            std::fs::write(&path, &fresh).unwrap();
        }
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(committed == fresh, "{} is stale; see the head of this test", path.display());
    }
}

//! Generates the gRPC services from their protos, without a protoc on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["proto/federation.proto", "proto/admin.proto", "../citadel/proto/authority.proto"];
    for f in files {
        println!("cargo::rerun-if-changed={f}");
    }
    let set = protox::compile(files, ["proto", "../citadel/proto"])?;
    tonic_prost_build::configure()
        // Ordered maps: equal services have equal bytes.
        .btree_map(".flotilla.federation.v1.Group")
        .bytes(".flotilla.federation.v1.Announce.service")
        .compile_fds(set)?;
    Ok(())
}

//! Generates the gRPC services from their protos, without a protoc on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["proto/federation.proto", "proto/admin.proto", "../citadel/proto/authority.proto"];
    for f in files {
        println!("cargo::rerun-if-changed={f}");
    }
    let set = protox::compile(files, ["proto", "../citadel/proto"])?;
    tonic_prost_build::configure().compile_fds(set)?;
    Ok(())
}

//! Generates the gRPC services from their protos, without a protoc on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["proto/istio_ca.proto", "proto/istio_ca_1_0.proto", "proto/authority.proto"];
    for f in files {
        println!("cargo::rerun-if-changed={f}");
    }
    tonic_prost_build::configure().compile_fds(protox::compile(files, ["proto"])?)?;
    Ok(())
}

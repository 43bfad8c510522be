//! Generates the client of the certificate service from its proto, without a protoc on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = "../../citadel/proto/istio_ca.proto";
    println!("cargo::rerun-if-changed={file}");
    let set = protox::compile([file], ["../../citadel/proto"])?;
    tonic_prost_build::configure().build_server(false).compile_fds(set)?;
    Ok(())
}

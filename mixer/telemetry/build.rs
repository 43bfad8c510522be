//! Compiles our own proto files with protox, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(["proto/mixer/v1/mixer.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .btree_map(".")
        .extern_path(".google.rpc", "crate::proto::google_rpc")
        .compile_fds(descriptors)?;
    Ok(())
}

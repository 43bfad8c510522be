#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mesh_proxy::fuzz::grpc_web(data));

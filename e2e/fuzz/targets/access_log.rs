#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mesh_telemetry::fuzz::access_log(data));

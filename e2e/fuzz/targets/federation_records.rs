#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| multicluster::fuzz::federation_records(data));

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mixer::fuzz::expressions(data));

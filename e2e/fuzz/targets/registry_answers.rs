#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pilot::fuzz::registry_answers(data));

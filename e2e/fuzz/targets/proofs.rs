#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| citadel::fuzz::proofs(data));

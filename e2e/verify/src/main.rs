//! flotilla-verify

fn main() {}

//! flotilla

fn main() {}

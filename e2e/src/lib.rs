//! End-to-end tests of Flotilla: clusters as network namespaces, the wide-area link between them,
//! and the scenarios in `tests/`.

pub mod kubernetes;
pub mod netns;
pub mod programs;
pub mod wan;

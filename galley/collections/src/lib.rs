//! mesh-collections

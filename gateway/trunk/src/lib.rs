//! mesh-trunk

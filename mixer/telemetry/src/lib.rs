//! mesh-telemetry

//! What operators type.

pub(crate) mod analyze;
pub(crate) mod authz;
pub(crate) mod ca;
pub(crate) mod clusters;
pub(crate) mod doctor;
pub(crate) mod explain;
pub(crate) mod mesh;
pub(crate) mod proxy;
pub(crate) mod simulate;
pub(crate) mod token;
pub(crate) mod validate;

//! Roles that are made of several components.

pub(crate) mod control_plane;
pub(crate) mod dns;

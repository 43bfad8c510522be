//! What users author.

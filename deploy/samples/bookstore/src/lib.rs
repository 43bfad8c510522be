//! bookstore

//! blocking.

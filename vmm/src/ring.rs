//! The restricted io_uring of the root disk.

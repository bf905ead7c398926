//! seat.

//! Counts with a bound that the whole system relies on.
//!
//! Called by whoever sizes a virtual machine. Refuses a count outside the bound, once, here.

use std::fmt;

/// Most vCPUs one sandbox may have.
pub const VCPUS_MAX: u8 = 8;

/// How many vCPUs a sandbox has: 1 to [`VCPUS_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VcpuCount(u8);

/// A vCPU count of {got} is outside 1 to 8
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a vCPU count of {got} is outside 1 to {VCPUS_MAX}")]
pub struct VcpuCountError {
    /// What was asked for.
    pub got: u32,
}

impl VcpuCount {
    /// Checks the bound.
    ///
    /// # Errors
    /// When `count` is 0 or above [`VCPUS_MAX`].
    pub fn new(count: u32) -> Result<Self, VcpuCountError> {
        match u8::try_from(count) {
            Ok(n @ 1..=VCPUS_MAX) => Ok(Self(n)),
            _ => Err(VcpuCountError { got: count }),
        }
    }

    /// The count, 1 to [`VCPUS_MAX`].
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }
}

impl fmt::Display for VcpuCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_hold() {
        assert!(VcpuCount::new(0).is_err());
        assert_eq!(VcpuCount::new(1).map(VcpuCount::get), Ok(1));
        assert_eq!(VcpuCount::new(8).map(VcpuCount::get), Ok(8));
        assert!(VcpuCount::new(9).is_err());
        assert!(VcpuCount::new(257).is_err(), "257 must not wrap to 1");
    }
}

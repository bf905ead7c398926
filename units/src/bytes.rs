//! Byte counts and guest addresses.
//!
//! Called wherever a size or a guest-physical address crosses a function boundary. Refuses
//! implicit conversion: a mebibyte count becomes bytes only through [`Mebibytes::to_bytes`].

use std::fmt;

/// Bytes in one page of the x86-64 base page size (Intel SDM vol. 3, 4.5).
pub const PAGE_BYTES: u64 = 4096;

/// A guest-physical address. Never a host address, and never an offset into a file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(u64);

impl Gpa {
    /// Wraps a raw guest-physical address.
    #[must_use]
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The raw address.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The address `bytes` further on, or `None` past the end of the address space.
    // There is no saturating_add: an address clamped to u64::MAX would look valid and not be.
    #[must_use]
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(raw) => Some(Self(raw)),
            None => None,
        }
    }

    /// Whether the address is a multiple of [`PAGE_BYTES`].
    #[must_use]
    pub const fn is_page_aligned(self) -> bool {
        self.0.is_multiple_of(PAGE_BYTES)
    }
}

impl fmt::Debug for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpa({:#x})", self.0)
    }
}

/// A whole number of mebibytes (2^20 bytes). 32 bits hold 4 PiB, more than any host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mebibytes(u32);

impl Mebibytes {
    /// A count of mebibytes.
    #[must_use]
    pub const fn new(count: u32) -> Self {
        Self(count)
    }

    /// The count of mebibytes.
    #[must_use]
    pub const fn count(self) -> u32 {
        self.0
    }

    /// The same amount in bytes. Cannot overflow: 2^32 * 2^20 = 2^52.
    #[must_use]
    pub const fn to_bytes(self) -> u64 {
        (self.0 as u64) << 20
    }

    /// The smallest whole count that holds `bytes`, or `None` when it does not fit 32 bits.
    #[must_use]
    pub fn covering_bytes(bytes: u64) -> Option<Self> {
        u32::try_from(bytes.div_ceil(1 << 20)).ok().map(Self)
    }
}

impl fmt::Display for Mebibytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0)
    }
}

const _: () = assert!(Mebibytes(u32::MAX).to_bytes() == (u32::MAX as u64) * 1024 * 1024);
const _: () = assert!(PAGE_BYTES.is_power_of_two());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mebibytes_round_up_and_refuse_what_does_not_fit() {
        assert_eq!(Mebibytes::covering_bytes(0), Some(Mebibytes::new(0)));
        assert_eq!(Mebibytes::covering_bytes(1), Some(Mebibytes::new(1)));
        assert_eq!(Mebibytes::covering_bytes(1 << 20), Some(Mebibytes::new(1)));
        assert_eq!(Mebibytes::covering_bytes((1 << 20) + 1), Some(Mebibytes::new(2)));
        assert_eq!(Mebibytes::covering_bytes(u64::MAX), None);
    }

    #[test]
    fn addresses_do_not_wrap() {
        assert_eq!(Gpa::new(u64::MAX).checked_add(1), None);
        assert_eq!(Gpa::new(4096).checked_add(1), Some(Gpa::new(4097)));
        assert!(Gpa::new(8192).is_page_aligned());
        assert!(!Gpa::new(8193).is_page_aligned());
    }
}
